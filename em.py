"""The EM loop: a model learns to think from a few examples, infers the thoughts of
raw text, and learns from those, again and again.

    data      a few documents with thoughts (warm), many without (raw), held-out ones
    M0        the warm start: train.py on the documents with thoughts
    E-step t  infer_thoughts.py: M(t-1) samples K thoughts for each raw chunk,
              weighs them, and picks one or none
    M-step t  train.py on the raw documents with those thoughts gives Mt; it always
              starts where M1 started
    raw rows  models of the raw documents without thoughts: raw_tokens with the steps
              of an M-step, raw_flops with about the arithmetic of the whole loop
    eval      eval_math.py for every model, on the held-out documents

p(z, x) thinks and then writes, q(z | x) reads and recovers the thought; one network is
both. The E-step draws z from close to p(z | x) by importance sampling, and the M-step
maximises log p(z, x) + log q(z | x).

    python em.py                       # the toy corpus, some minutes on 2 CPU cores
    python em.py --controls            # and all that could explain the result away
    python em.py --controls --only=raw_tokens,uniform  # just these rows beside the loop
    python em.py --controls --seeds=10 --seed=120      # means, deviations, paired tests
    python em.py --corpus=C --base=M --benchmark=gsm8k
    python em.py --preset=word-problems --corpus=C --base=M
    python em.py --compare --seeds=2   # no loop: the methods of data/methods.py

With several GPUs training and E-steps start by torchrun. Controls use the same data:
    warm_flops   the documents with thoughts alone, trained for the arithmetic of the
                 whole loop: is the gain only longer training?
    warm_x4      the same for four times M0's tokens: is M0 at its plateau?
    uniform      the loop with any thought that ended, whatever it weighs or gains
    weights      the loop with weights alone (the paper's rule)
    gain         the loop with the rule of gain alone (--min_gain)
    prior        thoughts from p(z | c), which has not read the text, weighed and kept
                 by how well they explain it, as in STaR
    samples1, samples16   the loop with another K
    gold         an M-step on the true thoughts: the ceiling

FLOPs are 6 a parameter and trained token, and 2 a parameter and token that an E-step
reads, samples or scores. They add up along a row.
Each stage is a command that is printed as it starts: copy it, edit it, run it by
hand. A complete stage is skipped, and one that was cut off goes on, so the same em.py
command can be repeated at any time. Everything of a seed lies in OUT_DIR/seedN;
results.json and curves.png (or compare.json and compare.png) in OUT_DIR, and
report.html, to look at.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from data.digits import true_nats
from data.lib.cli import LEAST, UserError, claim, duration, opt, read_json, run, write_json
from data.lib.corpus import open_corpus
from data.lib.pictures import align, compare_cells, plot, table_cells, test_cells
from data.lib.presets import EM_PRESETS
from data.lib.problems import find_file
from data.lib.report import write_report
from data.lib.results import (
    comparisons,
    in_order,
    likelihood_gaps,
    make_row,
    note_run,
    summarise,
)
from data.lib.side_by_side import run_methods
from data.lib.stages import Stages, count_devices, only_run, peak_memory, read_words


@dataclass(kw_only=True)
class Settings:
    preset: Literal[tuple(EM_PRESETS)] = opt(
        "toy", "defaults for a corpus and its recipe"
    )
    # the data and the loop
    corpus: str = opt(
        "", "folder with warm, warm_thoughts, raw and heldout; none: makes digits"
    )
    out_dir: str = opt(
        "", "where everything goes; none: out/CORPUS, or out/CORPUS-compare"
    )
    report: str = opt(
        "", "an old run's folder: make its report.html anew, and nothing else"
    )
    base: str = opt(
        "", "model folder that all models start from; none: M-steps start from M0"
    )
    m_steps_from: Literal["base", "M0"] = opt(
        "base", "with --base: where M-steps start"
    )
    iterations: int = opt(3, "EM iterations", low=1)
    samples: int = opt(4, "thoughts sampled a chunk in the E-step (K)", low=1)
    max_new: int = opt(64, "longest thought in tokens", low=1)
    # what is compared
    controls: bool = opt(False, "run the controls, too")
    only: str = opt("", "with --controls: just these rows beside the loop; none: all")
    compare: bool = opt(
        False, "no loop: a model for each method of data/methods.py and seed"
    )
    tokens: int = opt(1_000_000, "with --compare: training tokens of each model", low=1)
    benchmark: str = opt("", "a benchmark of eval_math.py for each model, too")
    seed: int = opt(0, "seed of every stage", low=0)
    seeds: int = opt(1, "runs, with --seed and the numbers behind it", low=1)
    # more flags for the stages
    train: str = opt("", 'for every train.py, as in --train="--n_layer=6 --lr=1e-3"')
    warm_train: str = opt(
        "",
        "for the warm start, which win over --train's; none: TOY_WARM for made digits",
    )
    infer: str = opt("", "for every infer_thoughts.py")
    eval: str = opt("", "for every eval_math.py on the held-out documents")
    benchmark_eval: str = opt("", "for every eval_math.py on the benchmark")
    # how it is run
    jobs: int = opt(
        0, "stages side by side; 0: one a core for digits on a CPU, else 1", low=0
    )
    devices: int = opt(
        0, "devices of a stage, by torchrun; 0: all GPUs there are, or 1", low=0
    )
    device: str = opt("", "cpu, cuda, mps; none: the best there is")


# With these M0 is at its plateau in nine seeds of ten, see tests/README.md.
TOY_WARM = "--max_steps=1800 --weight_decay=0.3"

# An E-step's flags that make a control of the loop. They win over --infer's.
ARMS = {
    "uniform": {"select": "uniform", "min_gain": LEAST},
    "samples1": {"samples": 1},
    "samples16": {"samples": 16},
    "weights": {"min_gain": LEAST},
    "gain": {"select": "uniform"},
    "prior": {"proposal": "prior"},
}
RAW_ROWS = ("raw_tokens", "raw_flops")
CONTROLS = ("warm_flops", "warm_x4", *ARMS, "gold")
# What may differ between two runs into one folder: what is run, and how.
FREE = "controls only iterations seed seeds benchmark device devices jobs".split()


# -------------------- loop


class Seed:
    """The stages of one seed: chains that need nothing of each other are futures of `pool`.

    `rows` fills up as they end. Of the stages that wait, the lowest `order` starts first.
    """

    def __init__(self, s: Settings, seed: int, out_dir: Path, stages: Stages, pool):
        self.s = s
        self.seed = seed
        self.stages = stages
        self.pool = pool
        self.folder = out_dir / f"seed{seed}"
        self.data = find_data(s, seed, self.folder, stages)
        claim(self.folder, s, FREE)
        self.rows: dict[str, dict] = {}
        self.evals: list[Future] = []

    def stage(
        self, name: str, script: str, last: str, flags: dict, more="", order=0
    ) -> Path:
        """Run a stage that fills the folder `name` of this seed;

        `last` is the file that it writes last.
        """
        folder = self.folder / name
        flags = flags | {"out_dir": folder, "seed": self.seed, "device": self.s.device}
        self.stages.run(
            f"seed {self.seed} {name}", script, folder, last, flags, more, order
        )
        return folder

    def train(self, name: str, corpus: str, thoughts="", more="", order=0) -> Path:
        """Train a model on a part of the corpus.

        Each M-step starts from the same weights: the base model's, as in the paper, or
        M0's. The toy has no base, and from M0 fewer steps will do (--m_steps_from).
        """
        s = self.s
        m_step = corpus == "raw" and thoughts
        flags = {"corpus": self.data / corpus, "thoughts": thoughts}
        from_m0 = m_step and (not s.base or s.m_steps_from == "M0")
        flags["init_from"] = self.folder / "M0" if from_m0 else s.base
        given = s.train
        if corpus == "warm":
            toy = not (s.warm_train or s.corpus or s.base)
            given = f"{TOY_WARM} {s.train}" if toy else f"{s.train} {s.warm_train}"
        return self.stage(
            name, "train.py", "config.json", flags, f"{given} {more}", order
        )

    def infer(self, t: int, arm: str, model: Path, order: int) -> Path:
        """The E-step of iteration t.

        Each has noise of its own: with the same numbers every round, the same
        chunks would be unlucky every time.
        """
        s = self.s
        flags = {"corpus": self.data / "raw", "model": model}
        flags |= {"samples": s.samples, "max_new": s.max_new}
        own = {"seed": self.seed + 1000 * t} | ARMS.get(arm, {})
        more = " ".join([s.infer, *(f"--{key}={flag}" for key, flag in own.items())])
        name = f"{arm}/E{t}".lstrip("/")
        return self.stage(name, "infer_thoughts.py", "timing.json", flags, more, order)

    def evaluate(
        self, name: str, mode: str, spent: float, e_step: Path | None, order: int
    ) -> None:
        """Evaluate a model beside whatever runs, and keep its row. spent: see spent_on."""
        evaluation = self.pool.submit(
            self.evaluate_now, name, mode, spent, e_step, order + 1
        )
        self.evals.append(evaluation)

    def evaluate_now(
        self, name: str, mode: str, spent: float, e_step: Path | None, order: int
    ) -> None:
        s, model = self.s, self.folder / name
        script, last = "eval_math.py", "results.json"
        asked = {"model": model, "mode": mode}
        flags = {
            "corpus": self.data / "heldout",
            "k": 1,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        # For raw models, too: it decides which chunks have room for a thought.
        flags["max_new"] = s.max_new
        if mode == "latent":
            truth = self.data / "heldout_truth"
            flags["thoughts"] = truth if truth.exists() else ""
            flags["samples"] = s.samples
        self.stage(f"{name}/eval", script, last, asked | flags, s.eval, order)
        row = make_row(name, model, e_step, self.data)
        row["seed"] = self.seed
        row["flops"] = spent * 6 * read_json(model / "training.json")["n_params"]
        if s.benchmark:
            flags = asked | {"benchmark": s.benchmark}
            folder = f"{name}/benchmark"
            folder = self.stage(folder, script, last, flags, s.benchmark_eval, order)
            row["benchmark"] = read_json(folder / "results.json")["accuracy"]
        self.rows[name] = row

    def loop(
        self, arm: str, model: Path, rounds: range, spent: float, order: int
    ) -> tuple[Path, float]:
        """EM from a model with an arm's E-steps: (the last model, what all of it took).

        Of an arm only the last model is evaluated; of another K the first one, too,
        which tells what more samples are worth in one E-step.
        """
        for t in rounds:
            e_step = self.infer(t, arm, model, order)
            name = f"{arm}/M{t}".lstrip("/")
            model = self.train(name, "raw", e_step, order=order)
            spent += spent_on(model, e_step)
            first_of_k = t == 1 and arm.startswith("samples")
            if not arm or t == self.s.iterations or first_of_k:
                self.evaluate(name, "latent", spent, e_step, order)
        return model, spent

    def single(self, name: str, corpus: str, thoughts="", more="", order=1) -> None:
        """A model that is trained once and evaluated."""
        model = self.train(name, corpus, thoughts, more, order)
        spent = spent_on(model)
        if name == "gold" and (not self.s.base or self.s.m_steps_from == "M0"):
            spent += spent_on(self.folder / "M0")
        self.evaluate(name, "latent" if thoughts else "raw", spent, None, order)

    def run(self) -> None:
        """All of it; the rows are complete when this returns."""
        submit = self.pool.submit
        rounds = range(1, self.s.iterations + 1)
        chains = [submit(self.single, "raw_tokens", "raw")] if wanted(self.s, "raw_tokens") else []
        model = self.train("M0", "warm", self.data / "warm_thoughts")
        start = spent_on(model)
        self.evaluate("M0", "latent", start, None, 0)
        for order, arm in enumerate(ARMS, 4):
            if wanted(self.s, arm):
                chains.append(submit(self.loop, arm, model, rounds, start, order))
        first, spent = self.loop("", model, rounds[:1], start, 0)
        chains.append(submit(self.loop, "", first, rounds[1:], spent, 0))
        # Each round takes what the first one takes, but for the lengths of its
        # thoughts. So the models that take the arithmetic of the whole loop need
        # not wait for its last round.
        budget = f"--max_tokens={round(start + len(rounds) * (spent - start))}"
        chains += self.single_rows(start, budget)
        for chain in chains:
            chain.result()
        for evaluation in self.evals:
            evaluation.result()

    def single_rows(self, start: float, budget: str) -> list[Future]:
        """The rows of one model each that wait for the first round."""
        submit = self.pool.submit
        warm, truth = self.data / "warm_thoughts", self.data / "raw_truth"
        four_times = f"--max_tokens={round(4 * start)}"
        chains = {
            "raw_flops": ("raw", "", budget),
            "warm_flops": ("warm", warm, budget, 3),
            "warm_x4": ("warm", warm, four_times, 9),
            "gold": ("raw", truth, "", 7),
        }
        if not truth.exists():
            chains.pop("gold")
        return [
            submit(self.single, n, *how)
            for n, how in chains.items()
            if wanted(self.s, n)
        ]


def wanted(s: Settings, row: str) -> bool:
    """Whether a row beside those of the loop is asked for."""
    if not s.controls:
        return row in RAW_ROWS
    return row in (s.only.split(",") if s.only else (*RAW_ROWS, *CONTROLS))


def find_data(s: Settings, seed: int, folder: Path, stages: Stages, **more) -> Path:
    """The corpus folder, made first if none is given; `more` are flags of data/digits.py."""
    data = Path(s.corpus) if s.corpus else folder / "data"
    if not s.corpus:
        flags = {"out_dir": data, "seed": seed} | more
        last = "heldout_truth/meta.json"
        stages.run(f"seed {seed} data", "data/digits.py", data, last, flags)
    for part in ("warm", "warm_thoughts", "raw", "heldout"):
        if not (data / part / "meta.json").exists():
            makers = "data/teacher.py"
            if part != "warm_thoughts":
                makers = "data/digits.py, gsm8k.py, or text.py with --splits"
            raise UserError(f"{data / part}: missing; it is made by {makers}")
    if s.only and wanted(s, "gold") and not (data / "raw_truth").exists():
        raise UserError(f"--only=gold: {data}/raw_truth is missing (gsm8k.py --truth)")
    return data


def spent_on(model: Path, e_step: Path | None = None) -> float:
    """The arithmetic of a model and its E-step, counted in training tokens.

    A token that is only read, sampled or scored costs a third of one that is
    trained on.
    """
    tokens = read_json(model / "training.json")["train_tokens"]
    if e_step:
        tokens += read_json(e_step / "meta.json")["computed_tokens"] / 3
    return tokens


def run_seeds(s: Settings, out_dir: Path, stages: Stages) -> list[dict]:
    """The rows of all seeds."""
    # A thread for each chain: they wait for their stages, which the slots of
    # `stages` hold to --jobs.
    with ThreadPoolExecutor(32 * s.seeds + 32) as pool:
        try:
            numbers = range(s.seed, s.seed + s.seeds)
            seeds = [
                pool.submit(Seed, s, seed, out_dir, stages, pool) for seed in numbers
            ]
            seeds = [seed.result() for seed in seeds]
            for done in [pool.submit(seed.run) for seed in seeds]:
                done.result()
        except BaseException:
            stages.stop()
            raise
    return [row for seed in seeds for row in in_order(seed.rows, ARMS)]


def run_compare(s: Settings, out_dir: Path, stages: Stages) -> list[dict]:
    """A row for each method of data/methods.py."""
    # The problems are longer than the loop's: of those with two steps there are so
    # few that raw-fresh would soon have seen them all.
    data = find_data(s, s.seed, out_dir, stages, min_ops=3, max_ops=5, raw=3000)
    return run_methods(s, data, out_dir, stages)


# -------------------- report


def nats_of_rules(rows: list[dict], s: Settings, out_dir: Path) -> float | None:
    """Mean -log p of the scored answers under the toy's rules, in nats a document.

    None for any other corpus, whose rules nobody knows.
    """
    nats = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        corpus = open_corpus(Path(s.corpus or out_dir / f"seed{seed}/data") / "heldout")
        if corpus.meta["source"].get("maker") != "data/digits.py":
            return None
        folder = next(Path(row["folder"]) for row in rows if row["seed"] == seed)
        path = folder / "eval" / "likelihood.npz"
        scored = np.load(path, allow_pickle=False)["doc"]
        nats.append(true_nats(corpus)[scored].mean())
    return float(np.mean(nats))


def report_compare(s: Settings, rows: list[dict], out_dir: Path, config: dict) -> str:
    """Write compare.json and compare.png; the report as text."""
    write_json(out_dir / "compare.json", {"config": config, "rows": rows})
    files = written(rows, s, out_dir / "compare.json", "compare.png")
    return f"{align(compare_cells(rows))}\n\n{files}"


def report_loop(s: Settings, rows: list[dict], out_dir: Path, config: dict) -> str:
    """Write results.json and curves.png; the report as text."""
    last = f"M{s.iterations}"
    results = {
        "config": config,
        "rows": rows,
        "summary": summarise(rows),
        "tests": comparisons(rows, last, ARMS),
        "likelihood": likelihood_gaps(rows, last),
        "rules_nats_document": nats_of_rules(rows, s, out_dir),
    }
    write_json(out_dir / "results.json", results)
    text = align(table_cells(results["summary"]))
    if results["rules_nats_document"]:
        nats = f"{results['rules_nats_document']:.3f} nats a document"
        text += f"\n\nUnder the corpus's own rules the scored answers have {nats}."
    tests = align(test_cells(results["tests"], results["likelihood"]))
    files = written(rows, s, out_dir / "results.json", "curves.png")
    return f"{text}\n\n{tests}\n\n{files}"


def written(rows: list[dict], s: Settings, path: Path, picture: str) -> str:
    """Draw the picture beside `path`; a line that names both files."""
    drawn = plot(rows, path.with_name(picture), s)
    if drawn:
        return f"{path}, {path.with_name(picture)}"
    return f"{path}; no picture: matplotlib is not installed"


def check_settings(s: Settings) -> None:
    """UserError for a flag that does nothing beside the others."""
    if s.report and s != Settings(report=s.report):
        raise UserError("--report: makes a page of an old run; leave out the others")
    if s.preset != "toy" and not (s.corpus and s.base):
        raise UserError(
            f"--preset={s.preset}: needs --corpus and --base; see data/README.md"
        )
    of_loop = "iterations samples infer controls benchmark base warm_train jobs m_steps_from"
    for flag in of_loop.split() if s.compare else ["tokens"]:
        if getattr(s, flag) != getattr(Settings, flag):
            how = "with" if s.compare else "without"
            raise UserError(f"--{flag}: does nothing {how} --compare; leave it out")
    for row in filter(None, s.only.split(",")):
        if row not in (*RAW_ROWS, *CONTROLS):
            raise UserError(f"--only={row}: expected {', '.join(RAW_ROWS + CONTROLS)}")
    if s.only and s.preset == "toy" and not s.controls:
        raise UserError("--only: says which rows; add --controls")
    if s.benchmark:
        flags = read_words(s.benchmark_eval)
        if "finetune" in flags:
            raise UserError("--benchmark_eval=--finetune: run eval_math.py by hand")
        named = SimpleNamespace(benchmark=s.benchmark, file=flags.get("file", ""))
        find_file(named, "test")


def main(s: Settings) -> None:
    check_settings(s)
    if s.report:
        return print(write_report(Path(s.report)))
    begin = time.time()
    name = Path(s.corpus).name if s.corpus else "digits"
    out_dir = Path(s.out_dir or f"out/{name}{'-compare' if s.compare else ''}")
    gpu, devices = count_devices(s.device, s.devices)
    alone = gpu or devices > 1 or s.corpus or s.compare
    jobs = s.jobs or (1 if alone else os.cpu_count() or 1)
    config = asdict(s)
    for free in ("out_dir", "report", "device", "jobs"):
        config.pop(free)
    with only_run(out_dir) as lock:
        stages = Stages(jobs, devices, lock)
        rows = (run_compare if s.compare else run_seeds)(s, out_dir, stages)
        text = (report_compare if s.compare else report_loop)(s, rows, out_dir, config)
        seconds, memory = time.time() - begin, peak_memory()
        print(f"\n{text}\nin {duration(seconds)}{memory}", flush=True)
        note_run(out_dir, seconds, memory)
        print(write_report(out_dir))


if __name__ == "__main__":
    run(main, Settings, EM_PRESETS)
