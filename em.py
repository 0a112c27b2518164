"""The EM loop: a model learns to think from a few examples, infers the thoughts of raw text, and learns from
those, again and again.

    data      a few documents with thoughts (warm), many without (raw), some held out
    M0        warm start: train.py on the documents with thoughts
    E-step t  infer_thoughts.py: M(t-1) samples K thoughts for each raw chunk, weighs them, picks one, or none
    M-step t  train.py on the raw documents with those thoughts: Mt. It starts where M1 started, whatever t
    raw rows  the raw documents without thoughts: raw_tokens takes as many steps as an M-step, raw_flops the
              arithmetic of the whole loop, to a percent or two
    eval      eval_math.py for every model, on the held-out documents

With p(z, x) the model that thinks and then writes and q(z | x) the one that reads and recovers thoughts (one
network is both), the E-step draws z from close to p(z | x) by importance sampling, and the M-step maximises
log p(z, x) + log q(z | x).

    python em.py                                     # the toy corpus, about six minutes on 2 CPU cores
    python em.py --controls                          # and everything that could explain the result away
    python em.py --controls --seeds=10 --seed=120    # over seeds: means, deviations, paired tests
    python em.py --samples=1 --iterations=1          # one round without a choice of thoughts
    python em.py --corpus=C --train="--n_layer=6 --n_embd=192 --n_head=6" --warm_train=--max_steps=900
    python em.py --corpus=C --base=M --benchmark=gsm8k    # from a pretrained model, with a benchmark for each
                                                     # model. With several GPUs the stages start by torchrun
    python em.py --compare --seeds=2                 # no loop: the methods of data/methods.py side by side

The controls (ARMS, and Seed.run), all from the same data and the same M0:

    warm_flops   the documents with thoughts alone, trained for the arithmetic of the whole loop: is it only
                 longer training?
    warm_x4      the same for four times M0's tokens: is M0 at its plateau?
    uniform      the loop with any thought that ended, whatever it weighs or gains
    weights      the loop with weights alone (the paper's rule)
    gain         the loop with the rule of gain alone (--min_gain)
    prior        thoughts from p(z | c), which has not read the text, weighed and kept by how well they
                 explain it: like STaR
    samples1, samples16   the loop with another K
    gold         an M-step on the true thoughts: the ceiling

FLOPs are 6 a parameter and trained token, and 2 a parameter and token that an E-step reads, samples or
scores; they add up along a row. Each stage is a command, printed as it starts; copy it, edit it, run it by
hand. A stage that is complete is skipped, one that was cut off goes on, so the same em.py command can be
repeated at any time. Everything of a seed lies in OUT_DIR/seedN; results.json and curves.png (compare.json
and compare.png) in OUT_DIR. This script reads numbers that the stages wrote; it imports no model code.
"""

import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.digits import true_nats
from data.lib.cli import UserError, duration, opt, read_json, run, write_json
from data.lib.corpus import open_corpus, open_thoughts
from data.lib.pictures import compare_table, plot, table, test_lines, value
from data.lib.stages import Stages, count_devices, only_run, peak_memory


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt("", "folder with warm, warm_thoughts, raw and heldout (data/digits.py, data/gsm8k.py); "
        "none: makes digits")  # fmt: skip
    out_dir: str = opt("", "where everything goes; none: out/CORPUS, or out/CORPUS-compare")
    controls: bool = opt(False, "run the controls, too")
    seeds: int = opt(1, "runs, with --seed and the numbers behind it", low=1)
    base: str = opt("", "model folder from which all models start; none: new weights, M-steps start from M0")
    iterations: int = opt(3, "EM iterations", low=1)
    samples: int = opt(4, "thoughts sampled a chunk in the E-step (K)", low=1)
    max_new: int = opt(64, "longest thought in tokens", low=1)
    train: str = opt("", 'more flags for every train.py, as in --train="--n_layer=6 --lr=1e-3"')
    warm_train: str = opt("", "more flags for the warm start, which win over --train's: M0 should reach its "
        "plateau; none: TOY_WARM for the made corpus")  # fmt: skip
    infer: str = opt("", "more flags for every infer_thoughts.py")
    eval: str = opt("", "more flags for every eval_math.py on the held-out documents")
    benchmark: str = opt("", "a benchmark of eval_math.py for each model, beside the held-out documents")
    benchmark_eval: str = opt("", "more flags for eval_math.py on the benchmark")
    compare: bool = opt(False, "no loop: a model for each method of data/methods.py and seed, --tokens each")
    tokens: int = opt(1_000_000, "with --compare: training tokens of each model", low=1)
    seed: int = opt(0, "seed of every stage", low=0)
    jobs: int = opt(0, "stages side by side, which share the cores; 0: one a core for the made corpus "
        "on a CPU, else 1", low=0)  # fmt: skip
    devices: int = opt(0, "devices that a stage works on, by torchrun; 0: all GPUs there are, or 1", low=0)
    device: str = opt("", "cpu, cuda, mps; none: the best there is")


TOY_WARM = "--max_steps=1800 --weight_decay=0.3"  # M0 at its plateau in nine seeds of ten, see README

# An E-step's flags that make a control of the loop. They win over --infer's.
ARMS = {
    "uniform": {"select": "uniform", "min_gain": -1e9},
    "samples1": {"samples": 1},
    "samples16": {"samples": 16},
    "weights": {"min_gain": -1e9},
    "gain": {"select": "uniform"},
    "prior": {"proposal": "prior"},
}


# ---------------------------------------------------------------------------------------------------- loop


class Seed:
    """The stages of one seed. Chains of stages that need nothing of each other are futures of `pool`; rows
    fill up as they end."""

    def __init__(self, s: Settings, seed: int, out_dir: Path, stages: Stages, pool: ThreadPoolExecutor):
        self.s, self.seed, self.stages, self.pool, self.rows = s, seed, stages, pool, {}
        self.folder = out_dir / f"seed{seed}"
        self.data = find_data(s, seed, self.folder, stages)
        self.evals: list[Future] = []

    def stage(self, name: str, script: str, last: str, flags: dict, more: str = "", order: int = 0) -> Path:
        """Run a stage that fills the folder `name` of this seed."""
        folder = self.folder / name
        flags = flags | {"out_dir": folder, "seed": self.seed, "device": self.s.device}
        self.stages.run(f"seed {self.seed} {name}", script, folder, last, flags, more, order)
        return folder

    def train(self, name: str, corpus: str, thoughts="", more: str = "", order: int = 0) -> Path:
        """Each M-step starts from the same weights, and only its thoughts are better: the base model's, as in
        the paper. The toy has no base model, so M0 is its."""
        s, m_step = self.s, corpus == "raw" and thoughts
        flags = {"corpus": self.data / corpus, "thoughts": thoughts}
        flags["init_from"] = s.base or (self.folder / "M0" if m_step else "")
        given = s.train
        if corpus == "warm":
            toy = not (s.warm_train or s.corpus or s.base)
            given = f"{TOY_WARM} {s.train}" if toy else f"{s.train} {s.warm_train}"
        return self.stage(name, "train.py", "config.json", flags, f"{given} {more}", order)

    def infer(self, t: int, arm: str, model: Path, order: int) -> Path:
        """The E-step of iteration t. Each has noise of its own: with the same numbers every round, the same
        chunks would be unlucky every time."""
        s, flags = self.s, {"corpus": self.data / "raw", "model": model}
        flags |= {"samples": s.samples, "max_new": s.max_new}
        own = {"seed": self.seed + 1000 * t} | ARMS.get(arm, {})
        more = " ".join([s.infer, *(f"--{key}={flag}" for key, flag in own.items())])
        return self.stage(f"{arm}/E{t}".lstrip("/"), "infer_thoughts.py", "timing.json", flags, more, order)

    def evaluate(self, name: str, mode: str, spent: float, e_step: Path | None, order: int) -> None:
        """Evaluate a model beside whatever runs, and keep its row. spent: see spent_on."""
        self.rows[name] = None
        self.evals.append(self.pool.submit(self.evaluate_now, name, mode, spent, e_step, order + 1))

    def evaluate_now(self, name: str, mode: str, spent: float, e_step: Path | None, order: int) -> None:
        s, model, truth = self.s, self.folder / name, self.data / "heldout_truth"
        asked = {"model": model, "mode": mode}
        flags = {"corpus": self.data / "heldout", "k": 1, "temperature": 1.0, "top_p": 1.0}
        flags["max_new"] = s.max_new  # for raw models, too: it decides which chunks have room for a thought
        if mode == "latent":
            flags |= {"thoughts": truth if truth.exists() else "", "samples": s.samples}
        self.stage(f"{name}/eval", "eval_math.py", "results.json", asked | flags, s.eval, order)
        row = make_row(name, model, e_step, self.data)
        row |= {"seed": self.seed, "flops": spent * 6 * n_params(model)}
        if s.benchmark:
            asked["benchmark"] = s.benchmark
            stage = f"{name}/benchmark"
            folder = self.stage(stage, "eval_math.py", "results.json", asked, s.benchmark_eval, order)
            row["benchmark"] = read_json(folder / "results.json")["accuracy"]
        self.rows[name] = row

    def warm_start(self) -> Path:
        model = self.train("M0", "warm", self.data / "warm_thoughts")
        self.evaluate("M0", "latent", spent_on(model), None, 0)
        return model

    def loop(self, arm: str, model: Path, rounds: range, spent: float, order: int) -> tuple[Path, float]:
        """EM from a model with an arm's E-steps: (the last model, what all of it took). Of an arm only the
        last is evaluated, and of another K the first, too: what more samples are worth in one E-step."""
        for t in rounds:
            name = f"{arm}/M{t}".lstrip("/")
            e_step = self.infer(t, arm, model, order)
            model = self.train(name, "raw", e_step, order=order)
            spent += spent_on(model, e_step)
            if t == self.s.iterations or not arm or (t == 1 and arm.startswith("samples")):
                self.evaluate(name, "latent", spent, e_step, order)
        return model, spent

    def single(self, name: str, corpus: str, thoughts="", more: str = "", order: int = 1) -> None:
        """A model that is trained once and evaluated."""
        model = self.train(name, corpus, thoughts, more, order)
        start = spent_on(self.folder / "M0") if name == "gold" and not self.s.base else 0
        self.evaluate(name, "latent" if thoughts else "raw", start + spent_on(model), None, order)

    def run(self) -> None:
        """All of it; the rows are complete when this returns."""
        submit, rounds = self.pool.submit, range(1, self.s.iterations + 1)
        chains = [submit(self.single, "raw_tokens", "raw")]
        model = self.warm_start()
        start = spent_on(model)
        if self.s.controls:
            for order, arm in enumerate(ARMS, 4):
                chains.append(submit(self.loop, arm, model, rounds, start, order))
        first, spent = self.loop("", model, rounds[:1], start, 0)
        chains.append(submit(self.loop, "", first, rounds[1:], spent, 0))
        # All rounds take what the first takes, but for the lengths of thoughts: so these need not wait for
        # the last.
        budget = f"--max_tokens={round(start + len(rounds) * (spent - start))}"
        chains.append(submit(self.single, "raw_flops", "raw", "", budget))
        if self.s.controls:
            thoughts, four_times = self.data / "warm_thoughts", f"--max_tokens={round(4 * start)}"
            chains.append(submit(self.single, "warm_flops", "warm", thoughts, budget, 3))
            chains.append(submit(self.single, "warm_x4", "warm", thoughts, four_times, 9))
            if (self.data / "raw_truth").exists():
                chains.append(submit(self.single, "gold", "raw", self.data / "raw_truth", "", 7))
        for chain in chains:
            chain.result()
        for one in self.evals:
            one.result()


def find_data(s: Settings, seed: int, folder: Path, stages: Stages, more: dict | None = None) -> Path:
    """The corpus folder, made first if none is given."""
    data = Path(s.corpus) if s.corpus else folder / "data"
    if not s.corpus:
        flags = {"out_dir": data, "seed": seed} | (more or {})
        stages.run(f"seed {seed} data", "data/digits.py", data, "heldout_truth/meta.json", flags)
    for part in ("warm", "warm_thoughts", "raw", "heldout"):
        if not (data / part / "meta.json").exists():
            makers = "data/digits.py or data/gsm8k.py"
            raise UserError(f"{data / part}: missing; make the corpus with {makers} --out_dir={data}")
    return data


def spent_on(model: Path, e_step: Path | None = None) -> float:
    """Training tokens of equal arithmetic that a model and its E-step took: a token that is only read or
    sampled costs a third."""
    tokens = read_json(model / "training.json")["train_tokens"]
    return tokens + (read_json(e_step / "meta.json")["computed_tokens"] / 3 if e_step else 0)


def n_params(model: Path) -> int:
    return read_json(model / "training.json")["n_params"]


def run_seeds(s: Settings, out_dir: Path, stages: Stages) -> list[dict]:
    """The rows of all seeds."""
    # A thread for each chain: they wait for their stages, which the slots of `stages` hold to --jobs.
    with ThreadPoolExecutor(32 * s.seeds + 32) as pool:
        try:
            numbers = range(s.seed, s.seed + s.seeds)
            seeds = list(pool.map(lambda seed: Seed(s, seed, out_dir, stages, pool), numbers))
            for done in [pool.submit(seed.run) for seed in seeds]:
                done.result()
        except BaseException:
            stages.stop()
            raise
    return [row for seed in seeds for row in in_order(seed.rows)]


def in_order(rows: dict) -> list[dict]:
    """A seed's rows as the report lists them, whatever ended first."""
    names = ["raw_tokens", "raw_flops", "warm_flops", "warm_x4"]
    names += sorted((name for name in rows if name[0] == "M"), key=lambda m: int(m[1:]))
    names += [name for arm in ARMS for name in rows if name.startswith(f"{arm}/")] + ["gold"]
    return [rows[name] for name in names if name in rows]


def run_compare(s: Settings, out_dir: Path, stages: Stages) -> list[dict]:
    """s.seeds models for each method, on the same raw documents and the same number of training tokens; a row
    for each method."""
    folder = out_dir / "methods"
    # Longer problems than the loop's: of two steps there are too few for raw-fresh to draw new ones without
    # end.
    data = find_data(s, s.seed, out_dir, stages, {"min_ops": 3, "max_ops": 5, "raw": 3000})
    flags = {"corpus": data, "out_dir": folder, "tokens": s.tokens, "seed": s.seed}
    stages.run("methods", "data/methods.py", folder, "meta.json", flags)
    rows = []
    for method in read_json(folder / "meta.json")["methods"]:
        thoughts = folder / method["thoughts"] if method["thoughts"] else ""
        evaluation = method["evaluation"] | ({"max_new": s.max_new} if thoughts else {})
        models = [out_dir / f"{method['name']}-seed{seed}" for seed in range(s.seed, s.seed + s.seeds)]
        for seed, model in enumerate(models, s.seed):
            common = {"seed": seed, "device": s.device}
            flags = {"corpus": folder / method["corpus"], "thoughts": thoughts, "out_dir": model}
            flags |= {"max_tokens": s.tokens} | common
            stages.run(model.name, "train.py", model, "config.json", flags, s.train)
            flags = {"corpus": folder / method["heldout"], "model": model, "out_dir": model / "eval"}
            flags |= evaluation | common
            stages.run(f"{model.name} eval", "eval_math.py", model / "eval", "results.json", flags, s.eval)
        rows.append(compare_row(method, evaluation, models))
    return rows


def compare_row(method: dict, evaluation: dict, models: list[Path]) -> dict:
    """A method's figures, gathered from the folders of its models."""
    results = [read_json(model / "eval/results.json") for model in models]
    training = [read_json(model / "training.json") for model in models]
    accuracies = [r["accuracy"] for r in results]
    return {
        "name": method["name"],
        "heldout": method["heldout"],
        "evaluation": evaluation,
        "accuracies": accuracies,
        "accuracy": sum(accuracies) / len(models),
        "cut_off": sum(r["cut_off"] for r in results) / sum(r["n"] for r in results),
        "nll": [r["nll_bound"]["16"] if method["thoughts"] else r["nll"] for r in results],
        "documents": method["documents"],
        "passes": training[0]["data"][0]["epochs"],
        "train_tokens": [t["train_tokens"] for t in training],
    }


# -------------------------------------------------------------------------------------------------- report


def pick_figures(thoughts: Path, raw: Path, truth: Path) -> dict:
    """kept: share of the chunks with a true thought that got one; right_of_kept: share of those that are it,
    token by token."""
    corpus = open_corpus(raw)
    picked, true = open_thoughts(thoughts, corpus), open_thoughts(truth, corpus)
    numbers = [i for i in range(corpus.n_chunks) if len(true.span(i))]
    kept = [i for i in numbers if len(picked.span(i))]
    right = sum(picked.span(i).tolist() == true.span(i).tolist() for i in kept)
    return {"kept": len(kept) / len(numbers), "right_of_kept": right / len(kept) if kept else None}


def make_row(name: str, model: Path, e_step: Path | None, data: Path) -> dict:
    """One model's figures, gathered from the folders of its stages. Accuracy is missing where the corpus has
    no questions."""
    training, results = read_json(model / "training.json"), read_json(model / "eval" / "results.json")
    row = {"name": name}
    if results.get("accuracy") is not None:
        row |= {k: results[k] for k in ("accuracy", "accuracy_se", "n")}
        row["accuracy_sampled"] = results["sampled"]["accuracy"]
    row |= {k: v for k, v in results.items() if k.startswith("nll")}
    row |= {"ess": results.get("ess"), "pick_right": results.get("pick_right")}
    row |= {"cut_off": results.get("cut_off_share"), "folder": str(model)}
    row |= {k: training[k] for k in ("tokens_per_s", "train_tokens")}
    row["seconds"] = training["seconds"] + read_json(model / "eval" / "timing.json")["seconds"]
    if e_step:  # what the model's own training thoughts were like
        meta, timing = read_json(e_step / "meta.json"), read_json(e_step / "timing.json")
        kept = ("ess", "cut_off", "all_cut_off", "nll_bound", "sampled_tokens", "computed_tokens")
        figures = {k: meta[k] for k in kept}
        if (data / "raw_truth").exists():
            figures |= pick_figures(e_step, data / "raw", data / "raw_truth")
        row["e_step"] = figures | timing
        row["seconds"] += timing["seconds"]
    return row


FIGURES = ("accuracy", "accuracy_sampled", "nll_document", "nll_thoughtless_document",
           "bound_1", "bound_4", "bound_16", "benchmark", "ess", "pick_right",
           "e_kept", "e_right_of_kept", "flops", "seconds")  # fmt: skip


def summarise(rows: list[dict]) -> list[dict]:
    """For each name of a row, {figure: (mean over seeds, standard deviation between them)}; None: of one."""
    out = []
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name]
        summary = {"name": name, "seeds": [r["seed"] for r in mine]}
        for key in FIGURES:
            values = [v for r in mine if (v := value(r, key)) is not None]
            if values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                summary[key] = float(np.mean(values)), deviation
        out.append(summary)
    return out


def sign_flip(differences) -> float:
    """Two-sided p of the mean of paired differences, by flipping their signs: if nothing is behind them, each
    sign was a fair coin.

    Exact over all 2^n flips for n <= 16, else over 65,536 seeded ones. With n = 10 the smallest p is 2 /
    1,024."""
    d = np.asarray(differences, dtype=float)
    n = len(d)
    if n <= 16:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # [2^n, n]
        return float((np.abs(signs @ d) >= abs(d.sum()) - 1e-9).mean())
    rng, hits = np.random.default_rng(0), 1  # the flips that were seen are themselves one
    for _ in range(64):
        hits += int((np.abs((1 - 2 * rng.integers(0, 2, (1024, n))) @ d) >= abs(d.sum()) - 1e-9).sum())
    return hits / 65537


def paired(differences) -> dict:
    """The mean of paired differences, its standard error, in how many pairs it is above 0, and p."""
    d = np.asarray(differences, dtype=float)
    error = float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else None
    figures = {"difference": float(d.mean()), "se": error, "above": int((d > 0).sum())}
    return figures | {"n": len(d), "p": sign_flip(d)}


def comparisons(rows: list[dict], last: str) -> list[dict]:
    """Paired differences between rows, seed by seed."""
    models = [f"M{t}" for t in range(int(last[1:]) + 1)]
    pairs = [*zip(models[1:], models), (last, "M0"), ("warm_x4", "M0")]
    pairs += [(last, "warm_flops"), (last, "warm_x4"), *((last, f"{arm}/{last}") for arm in ARMS)]
    pairs += [("M1", f"{arm}/M1") for arm in ARMS if arm.startswith("samples")]
    by_name = {}
    for r in rows:
        by_name.setdefault(r["name"], {})[r["seed"]] = r
    out = []
    for a, b in dict.fromkeys(pairs):
        both = [(x, by_name[b][seed]) for seed, x in by_name.get(a, {}).items() if seed in by_name.get(b, {})]
        for key in ("accuracy", "accuracy_sampled"):
            d = [x[key] - y[key] for x, y in both if key in x and key in y]
            if d:
                out.append({"a": a, "b": b, "figure": key} | paired(d))
    return out


def likelihood_gaps(rows: list[dict], last: str) -> list[dict]:
    """The last model's IWAE-16 bound against its own thoughtless NLL and the raw models' NLL: the same
    documents, the same tokens under the same givens, in nats a document; below 0 where the bound is lower.

    Documents of one seed share their models. So of several seeds each counts once, by the mean over its
    documents; of a single one the documents are the pairs. UserError when two models scored other documents.
    """
    wanted = {last: ("bound_16", "thoughtless"), "raw_tokens": ("nll",), "raw_flops": ("nll",)}
    nats = {}
    for r in rows:
        if r["name"] in wanted:
            with np.load(Path(r["folder"]) / "eval" / "likelihood.npz", allow_pickle=False) as f:
                nats[r["name"], r["seed"]] = {key: f[key] for key in ("doc", *wanted[r["name"]])}
    out = []
    for other, key in ((last, "thoughtless"), ("raw_tokens", "nll"), ("raw_flops", "nll")):
        seeds = [seed for name, seed in nats if name == last and (other, seed) in nats]
        pairs = [(nats[last, seed], nats[other, seed]) for seed in seeds]
        if any(not np.array_equal(a["doc"], b["doc"]) for a, b in pairs):
            both = "give both the same --max_new and --bound_docs"
            raise UserError(f"{last} and {other} scored other documents; {both}")
        d = [a["bound_16"] - b[key] for a, b in pairs]
        if d:
            of = "seeds" if len(d) > 1 else "documents"
            figures = paired([x.mean() for x in d] if len(d) > 1 else d[0])
            out.append({"a": f"{last} IWAE-16", "b": f"{other} {key}", "of": of} | figures)
    return out


def nats_of_rules(rows: list[dict], s: Settings, out_dir: Path) -> float | None:
    """Mean -log p of the scored answers under the toy's own rules, in nats a document; None for any other
    corpus."""
    nats = []
    for seed in dict.fromkeys(r["seed"] for r in rows):
        corpus = open_corpus(Path(s.corpus or out_dir / f"seed{seed}/data") / "heldout")
        if corpus.meta["source"].get("maker") != "data/digits.py":
            return None
        folder = next(Path(r["folder"]) for r in rows if r["seed"] == seed)
        scored = np.load(folder / "eval" / "likelihood.npz", allow_pickle=False)["doc"]
        nats.append(true_nats(corpus)[scored].mean())
    return float(np.mean(nats))


def report(s: Settings, rows: list[dict], out_dir: Path) -> str:
    """Write results.json (or compare.json); the report as text."""
    config = {k: v for k, v in asdict(s).items() if k not in ("out_dir", "device", "jobs")}
    if s.compare:
        write_json(out_dir / "compare.json", {"config": config, "rows": rows})
        return compare_table(rows)
    last, summary = f"M{s.iterations}", summarise(rows)
    tests, gaps, ruled = comparisons(rows, last), likelihood_gaps(rows, last), nats_of_rules(rows, s, out_dir)
    found = {"rows": rows, "summary": summary, "tests": tests, "likelihood": gaps}
    write_json(out_dir / "results.json", {"config": config} | found | {"rules_nats_document": ruled})
    text = table(summary)
    if ruled:
        text += f"\n\nUnder the corpus's own rules the scored answers have {ruled:.3f} nats a document."
    return text + "\n\n" + test_lines(tests, gaps)


def main(s: Settings) -> None:
    loop_only = ("iterations", "samples", "infer", "controls", "benchmark", "base", "warm_train", "jobs")
    for flag in loop_only if s.compare else ("tokens",):
        if getattr(s, flag) != getattr(Settings, flag):
            how = "with" if s.compare else "without"
            raise UserError(f"--{flag}: does nothing {how} --compare; leave it out")
    name = Path(s.corpus).name if s.corpus else "digits"
    out_dir = Path(s.out_dir or f"out/{name}{'-compare' if s.compare else ''}")
    gpu, devices = count_devices(s.device, s.devices)
    alone = gpu or devices > 1 or s.corpus or s.compare
    jobs = s.jobs or (1 if alone else os.cpu_count() or 1)
    begin = time.time()
    with only_run(out_dir) as lock:
        stages = Stages(jobs, devices, lock)
        rows = run_compare(s, out_dir, stages) if s.compare else run_seeds(s, out_dir, stages)
        text = report(s, rows, out_dir)
        drawn = plot(rows, out_dir / ("compare.png" if s.compare else "curves.png"), s)
    files = ("compare.json", "compare.png") if s.compare else ("results.json", "curves.png")
    print("\n" + text)
    picture = f", {out_dir}/{files[1]}" if drawn else "; no picture: matplotlib is not installed"
    print(f"\n{out_dir}/{files[0]}{picture}")
    print(f"in {duration(time.time() - begin)}{peak_memory()}")


if __name__ == "__main__":
    run(main, Settings)
