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

    python em.py                                     # the toy corpus, a few minutes on 2 CPU cores
    python em.py --controls                          # and everything that could explain the result away
    python em.py --controls --seeds=10 --seed=110    # over seeds: means, deviations, paired tests
    python em.py --samples=1 --iterations=1          # one round without a choice of thoughts
    python em.py --corpus=C --train="--n_layer=6 --n_embd=192 --n_head=6" --warm_train=--max_steps=900
    python em.py --corpus=C --base=M --benchmark=gsm8k    # from a pretrained model; a benchmark for each model.
                                                     # With several GPUs the stages start by torchrun
    python em.py --compare --seeds=2                 # no loop: the methods of data/methods.py side by side

The controls (ARMS, and Seed.run), all from the same data and the same M0:

    warm_flops   the documents with thoughts alone, trained for the arithmetic of the whole loop: is it only
                 longer training?
    warm_x4      the same for four times M0's tokens: is M0 at its plateau?
    uniform      the loop with any thought that ended, whatever it weighs or gains
    weights      the loop with weights alone (the paper's rule)
    gain         the loop with the rule of gain alone (--min_gain)
    prior        thoughts from p(z | c), which has not read the text, weighed and kept by how well they explain
                 it: like STaR
    samples1, samples16   the loop with another K
    gold         an M-step on the true thoughts: the ceiling

FLOPs are 6 a parameter and trained token, and 2 a parameter and token that an E-step reads, samples or
scores; they add up along a row. Each stage is a command, printed as it starts; copy it, edit it, run it by
hand. A stage that is complete is skipped, one that was cut off goes on, so the same em.py command can be
repeated at any time. Everything of a seed lies in OUT_DIR/seedN; results.json and curves.png (compare.json
and compare.png) in OUT_DIR. This script reads numbers that the stages wrote; it imports no model code.
"""

import contextlib
import heapq
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.cli import UserError, duration, opt, read_json, replacing, run, write_json
from data.corpus import open_corpus, open_thoughts
from data.digits import true_nats

HERE = Path(__file__).resolve().parent


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt("", "folder with warm, warm_thoughts, raw and heldout (data/digits.py, data/gsm8k.py); none: makes digits")
    out_dir: str = opt("", "where everything goes; none: out/CORPUS, or out/CORPUS-compare")
    controls: bool = opt(False, "run the controls, too")
    seeds: int = opt(1, "runs, with --seed and the numbers behind it", low=1)
    base: str = opt("", "model folder from which every model starts; none: new weights, and M-steps start from M0")
    iterations: int = opt(3, "EM iterations", low=1)
    samples: int = opt(4, "thoughts sampled a chunk in the E-step (K)", low=1)
    max_new: int = opt(64, "longest thought in tokens", low=1)
    train: str = opt("", 'more flags for every train.py, as in --train="--n_layer=6 --lr=1e-3"')
    warm_train: str = opt("", "more flags for the warm start, which win over --train's: M0 should reach its plateau; none: TOY_WARM "
        "for the made corpus")  # fmt: skip
    infer: str = opt("", "more flags for every infer_thoughts.py")
    eval: str = opt("", "more flags for every eval_math.py on the held-out documents")
    benchmark: str = opt("", "a benchmark of eval_math.py for each model, beside the held-out documents")
    benchmark_eval: str = opt("", "more flags for eval_math.py on the benchmark, as in --benchmark_eval=--max_new=256")
    compare: bool = opt(False, "no loop: one model for each method of data/methods.py and seed, trained on as many tokens")
    tokens: int = opt(1_000_000, "with --compare: training tokens of each model", low=1)
    seed: int = opt(0, "seed of every stage", low=0)
    jobs: int = opt(0, "stages side by side, which share the cores; 0: one a core for the made corpus on a CPU, else 1", low=0)
    devices: int = opt(0, "devices that a stage works on, by torchrun; 0: all GPUs there are, or 1", low=0)
    device: str = opt("", "cpu, cuda, mps; none: the best there is")


TOY_WARM = "--max_steps=1800 --weight_decay=0.3"  # M0 near its plateau, see README

# An E-step's flags that make a control of the loop. They win over --infer's.
ARMS = {
    "uniform": {"select": "uniform", "min_gain": -1e9},
    "samples1": {"samples": 1},
    "samples16": {"samples": 16},
    "weights": {"min_gain": -1e9},
    "gain": {"select": "uniform"},
    "prior": {"proposal": "prior"},
}


# -------------------------------------------------------------------------------------------------- stages


@contextlib.contextmanager
def only_run(out_dir: Path):
    """Hold out_dir against other runs. Stages inherit the lock: one that outlives a killed em.py is waited
    for."""
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield ()
        return
    with open(out_dir / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out_dir}: another run is at work here; waiting for it to end", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield (f.fileno(),)


class Slots:
    """Lets n threads in at a time, of those that wait the one with the lowest number."""

    def __init__(self, n: int):
        self.free, self.waiting, self.count, self.changed = n, [], 0, threading.Condition()

    @contextlib.contextmanager
    def hold(self, order: int):
        with self.changed:
            self.count += 1
            ticket = order, self.count
            heapq.heappush(self.waiting, ticket)
            self.changed.wait_for(lambda: self.free and self.waiting[0] == ticket)
            heapq.heappop(self.waiting)
            self.free -= 1
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.free += 1
                self.changed.notify_all()


@dataclass
class Stages:
    """Starts the other scripts as commands, `jobs` of them side by side. lock: file numbers that they
    inherit."""

    jobs: int = 1
    devices: int = 1
    lock: tuple = ()
    children: set = field(default_factory=set)
    stopped: bool = False
    failure: str = "stopped"

    def __post_init__(self):
        self.slots, self.guard = Slots(self.jobs), threading.Lock()

    def run(self, name: str, script: str, folder: Path, last: str, flags: dict, more: str = "", order: int = 0) -> None:
        """`python script --flag=value ...`, which fills `folder`, unless the file it writes last is there.
        The flags in the string `more` win. order: of the stages that wait, those with the lowest start first.
        UserError if it fails or was made by other flags."""
        done = folder / last
        flags = {k: str(v) for k, v in flags.items() if v != ""}
        for word in shlex.split(more):
            key, has_value, value = word.removeprefix("--").partition("=")
            flags[key] = value if has_value else "true"
        if done.exists():
            return self.already(name, script, folder, done, flags)
        with self.slots.hold(order):
            code = self.start(name, script, folder, [f"--{k}={v}" for k, v in flags.items()])
        if code and not self.stopped:  # the first to fail ends the others, and all chains tell of it
            self.failure = f"stage {name} ended with exit code {code} (see above); the same command goes on from there"
            self.stop()
        if self.stopped:
            raise UserError(self.failure)

    @staticmethod
    def already(name: str, script: str, folder: Path, done: Path, flags: dict) -> None:
        made_by = read_json(folder / "settings.json")
        changed = [f"--{k}={made_by.get(k)} became {v}" for k, v in flags.items() if k in made_by and not same(made_by[k], v)]
        if changed:
            raise UserError(f"{folder}: made with other settings ({'; '.join(changed)}); give another --out_dir")
        newer = (HERE / script).stat().st_mtime > done.stat().st_mtime
        print(f"{name}: complete" + (f"; but {script} has changed since: give another --out_dir to run it anew" if newer else ""))

    def start(self, name: str, script: str, folder: Path, flags: list[str]) -> int:
        """The exit code of a script. Side by side with others it writes into a log, whose end is shown when
        it fails."""
        launch = [str(HERE / script)]
        if self.devices > 1 and script in ("train.py", "infer_thoughts.py"):
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.devices}", *launch]
        env, log, begin = os.environ | {"EM_CHILD": "1"}, None, time.time()
        if self.jobs > 1:
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        shown = "torchrun --standalone " + launch[3] if len(launch) > 1 else "python"
        with self.guard:
            if self.stopped:
                return 1
            print(f"\n{name}: $ {shown} {shlex.join([script, *flags])}", flush=True)
            if self.jobs > 1:
                folder.parent.mkdir(parents=True, exist_ok=True)
                log = open(f"{folder}.log", "ab")
            # Its own session: Ctrl-C reaches only us. Its standard input: when we die, however we die, it
            # closes and the stage ends.
            child = subprocess.Popen([sys.executable, *launch, *flags], stdin=subprocess.PIPE, start_new_session=True,
                                     pass_fds=self.lock, env=env, stdout=log, stderr=log)  # fmt: skip
            self.children.add(child)
        code = child.wait()
        self.children.discard(child)
        if log:
            log.close()
            if code and not self.stopped:
                print(Path(log.name).read_text(errors="replace")[-2000:], file=sys.stderr, flush=True)
            elif not code:
                print(f"{name}: done in {duration(time.time() - begin)}", flush=True)
        return code

    def stop(self) -> None:
        """End all children and start no more."""
        with self.guard:
            self.stopped = True
            for child in list(self.children):
                child.terminate()


def same(made_by, flag: str) -> bool:
    """Whether a setting that was stored is what a flag says: 0.0 is --min_gain=0, and -1e9 is -inf, which
    JSON has not."""
    if isinstance(made_by, float):
        with contextlib.suppress(ValueError):
            return made_by == max(float(flag), -1e9)
    return str(made_by) == flag or (isinstance(made_by, bool) and made_by == (flag.lower() in ("true", "1")))


def how_many(s: Settings) -> tuple[int, int]:
    """(stages side by side, devices a stage)."""
    devices, gpu = max(1, s.devices), s.device.startswith(("cuda", "mps"))
    if s.device in ("", "cuda"):  # counted in a process of its own: here torch would take memory beside the stages
        count = "import torch; print(torch.cuda.device_count(), int(torch.backends.mps.is_available()))"
        found = subprocess.run([sys.executable, "-c", count], stdout=subprocess.PIPE, text=True, check=True).stdout
        cuda, mps = map(int, found.split())
        gpu, devices = cuda + mps > 0, s.devices or max(1, cuda)
    alone = gpu or devices > 1 or s.corpus
    return s.jobs or (1 if alone else os.cpu_count() or 1), devices


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
        flags = {"corpus": self.data / "raw", "model": model, "samples": self.s.samples, "max_new": self.s.max_new}
        own = {"seed": self.seed + 1000 * t} | ARMS.get(arm, {})
        more = " ".join([self.s.infer, *(f"--{key}={flag}" for key, flag in own.items())])
        return self.stage(f"{arm}/E{t}".lstrip("/"), "infer_thoughts.py", "timing.json", flags, more, order)

    def evaluate(self, name: str, mode: str, spent: float, e_step: Path | None, order: int) -> None:
        """Evaluate a model beside whatever runs, and keep its row. spent: see spent_on."""
        self.rows[name] = None
        self.evals.append(self.pool.submit(self.evaluate_now, name, mode, spent, e_step, order + 1))

    def evaluate_now(self, name: str, mode: str, spent: float, e_step: Path | None, order: int) -> None:
        s, model, truth = self.s, self.folder / name, self.data / "heldout_truth"
        asked, flags = {"model": model, "mode": mode}, {"corpus": self.data / "heldout", "k": 1, "temperature": 1.0, "top_p": 1.0}
        flags["max_new"] = s.max_new  # raw models never use it, but it decides which chunks have room for a thought
        if mode == "latent":
            flags |= {"thoughts": truth if truth.exists() else "", "samples": s.samples}
        self.stage(f"{name}/eval", "eval_math.py", "results.json", asked | flags, s.eval, order)
        row = make_row(name, model, e_step, self.data) | {"seed": self.seed, "flops": spent * 6 * n_params(model)}
        if s.benchmark:
            folder = self.stage(f"{name}/benchmark", "eval_math.py", "results.json", asked | {"benchmark": s.benchmark}, s.benchmark_eval, order)
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
            chains += [submit(self.loop, arm, model, rounds, start, order) for order, arm in enumerate(ARMS, 4)]
        first, spent = self.loop("", model, rounds[:1], start, 0)
        chains.append(submit(self.loop, "", first, rounds[1:], spent, 0))
        # All rounds take what the first takes, but for the lengths of thoughts: so these need not wait for
        # the last.
        budget = f"--max_tokens={round(start + len(rounds) * (spent - start))}"
        chains.append(submit(self.single, "raw_flops", "raw", "", budget))
        if self.s.controls:
            thoughts = self.data / "warm_thoughts"
            chains.append(submit(self.single, "warm_flops", "warm", thoughts, budget, 3))
            chains.append(submit(self.single, "warm_x4", "warm", thoughts, f"--max_tokens={round(4 * start)}", 8))
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
        stages.run(f"seed {seed} data", "data/digits.py", data, "heldout_truth/meta.json", {"out_dir": data, "seed": seed} | (more or {}))
    for part in ("warm", "warm_thoughts", "raw", "heldout"):
        if not (data / part / "meta.json").exists():
            raise UserError(f"{data / part}: missing; make the corpus with data/digits.py or data/gsm8k.py --out_dir={data}")
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
            seeds = list(pool.map(lambda seed: Seed(s, seed, out_dir, stages, pool), range(s.seed, s.seed + s.seeds)))
            for done in [pool.submit(seed.run) for seed in seeds]:
                done.result()
        except BaseException:
            stages.stop()
            raise
    return [row for seed in seeds for row in in_order(seed.rows)]


def in_order(rows: dict) -> list[dict]:
    """A seed's rows as the report lists them, whatever ended first."""
    names = ["raw_tokens", "raw_flops", "warm_flops", "warm_x4", *sorted((name for name in rows if name[0] == "M"), key=lambda m: int(m[1:]))]
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
            flags = {"corpus": folder / method["corpus"], "thoughts": thoughts, "out_dir": model, "max_tokens": s.tokens} | common
            stages.run(model.name, "train.py", model, "config.json", flags, s.train)
            flags = {"corpus": folder / method["heldout"], "model": model, "out_dir": model / "eval"} | evaluation | common
            stages.run(f"{model.name} eval", "eval_math.py", model / "eval", "results.json", flags, s.eval)
        results, training = ([read_json(model / name) for model in models] for name in ("eval/results.json", "training.json"))
        accuracies = [r["accuracy"] for r in results]
        row = {"name": method["name"], "heldout": method["heldout"], "evaluation": evaluation, "accuracies": accuracies}
        row |= {"accuracy": sum(accuracies) / s.seeds, "cut_off": sum(r["cut_off"] for r in results) / sum(r["n"] for r in results)}
        row |= {"nll": [r["nll_bound"]["16"] if thoughts else r["nll"] for r in results], "documents": method["documents"]}
        rows.append(row | {"passes": training[0]["data"][0]["epochs"], "train_tokens": [t["train_tokens"] for t in training]})
    return rows


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
        row |= {k: results[k] for k in ("accuracy", "accuracy_se", "n")} | {"accuracy_sampled": results["sampled"]["accuracy"]}
    row |= {k: v for k, v in results.items() if k.startswith("nll")}
    row |= {"ess": results.get("ess"), "pick_right": results.get("pick_right"), "cut_off": results.get("cut_off_share")}
    row |= {"tokens_per_s": training["tokens_per_s"], "train_tokens": training["train_tokens"], "folder": str(model)}
    row["seconds"] = training["seconds"] + read_json(model / "eval" / "timing.json")["seconds"]
    if e_step:  # what the model's own training thoughts were like
        meta, timing = read_json(e_step / "meta.json"), read_json(e_step / "timing.json")
        figures = {k: meta[k] for k in ("ess", "cut_off", "all_cut_off", "nll_bound", "sampled_tokens", "computed_tokens")}
        if (data / "raw_truth").exists():
            figures |= pick_figures(e_step, data / "raw", data / "raw_truth")
        row["e_step"] = figures | timing
        row["seconds"] += timing["seconds"]
    return row


def value(row: dict, key: str) -> float | None:
    """A row's figure by name; "bound_16" in nats a document."""
    if key.startswith("bound_"):
        return row.get("nll_bound_document", {}).get(key.removeprefix("bound_"))
    return row.get("e_step", {}).get(key.removeprefix("e_")) if key.startswith("e_") else row.get(key)


FIGURES = ("accuracy", "accuracy_sampled", "nll_document", "nll_thoughtless_document", "bound_1", "bound_4", "bound_16",
           "benchmark", "ess", "pick_right", "e_kept", "e_right_of_kept", "flops", "seconds")  # fmt: skip


def summarise(rows: list[dict]) -> list[dict]:
    """For each name of a row, {figure: (mean over seeds, standard deviation between them)}; None: of one."""
    out = []
    for name in dict.fromkeys(r["name"] for r in rows):
        summary, mine = {"name": name, "seeds": [r["seed"] for r in rows if r["name"] == name]}, [r for r in rows if r["name"] == name]
        for key in FIGURES:
            values = [v for r in mine if (v := value(r, key)) is not None]
            if values:
                summary[key] = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
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


def comparisons(rows: list[dict], last: str) -> list[dict]:
    """Paired differences between rows, seed by seed: the mean, its standard error, in how many seeds it is
    above 0, p."""
    models = [f"M{t}" for t in range(int(last[1:]) + 1)]
    pairs = [*zip(models[1:], models), (last, "M0"), ("warm_x4", "M0"), (last, "warm_flops"), (last, "warm_x4")]
    pairs += [(m, f"{arm}/{m}") for arm in ARMS for m in ("M1", last) if m == last or arm.startswith("samples")]
    by_name = {name: {r["seed"]: r for r in rows if r["name"] == name} for name in dict.fromkeys(r["name"] for r in rows)}
    out = []
    for a, b in dict.fromkeys(pairs):
        for key in ("accuracy", "accuracy_sampled"):
            both = [(x.get(key), by_name[b][seed].get(key)) for seed, x in by_name.get(a, {}).items() if seed in by_name.get(b, {})]
            d = np.array([x - y for x, y in both if x is not None and y is not None])
            if len(d):
                error = float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else None
                out.append({"a": a, "b": b, "figure": key, "difference": float(d.mean()), "se": error, "above": int((d > 0).sum())}
                           | {"n": len(d), "p": sign_flip(d)})  # fmt: skip
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
            raise UserError(f"{last} and {other} scored other documents; give both the same --max_new and --bound_docs")
        d = [a["bound_16"] - b[key] for a, b in pairs]
        if d:
            d = np.array([x.mean() for x in d]) if len(d) > 1 else d[0]
            out.append({"a": f"{last} IWAE-16", "b": f"{other} {key}", "difference": float(d.mean())}
                       | {"se": float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else None, "above": int((d > 0).sum())}
                       | {"n": len(d), "of": "seeds" if len(seeds) > 1 else "documents", "p": sign_flip(d)})  # fmt: skip
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
        nats.append(true_nats(corpus)[np.load(folder / "eval" / "likelihood.npz", allow_pickle=False)["doc"]].mean())
    return float(np.mean(nats))


def table(rows: list[dict]) -> str:
    """The means over seeds as text, with the standard deviation between seeds where there are several."""

    def cell(r, key, digits):
        if key not in r:
            return "-"
        mean, deviation = r[key]
        return f"{mean:.{digits}f}" + ("" if deviation is None else f" ±{deviation:.{digits}f}")

    columns = (("greedy", "accuracy", 3), ("sampled", "accuracy_sampled", 3), ("raw NLL", "nll_document", 3),
               ("thoughtless", "nll_thoughtless_document", 3), ("-ELBO", "bound_1", 3), ("IWAE-4", "bound_4", 3),
               ("IWAE-16", "bound_16", 3), ("ESS", "ess", 2), ("kept", "e_kept", 3), ("right of kept", "e_right_of_kept", 3))  # fmt: skip
    if any("benchmark" in r for r in rows):
        columns = (("benchmark", "benchmark", 3), *columns)
    lines = [["", *(title for title, _, _ in columns), "TFLOP", "seconds"]]
    for r in rows:
        ends = [f"{r['flops'][0] / 1e12:.2f}", f"{r['seconds'][0]:.0f}"]
        lines.append([r["name"], *(cell(r, key, digits) for _, key, digits in columns), *ends])
    return align(lines)


def test_lines(tests: list[dict], gaps: list[dict]) -> str:
    """The comparisons as text."""
    lines = []
    shown = [t | {"of": "seeds"} for t in tests if t["n"] > 1] + [g | {"figure": "nats a document"} for g in gaps]
    names = {"accuracy": "greedy", "accuracy_sampled": "sampled"}
    for t in shown:
        spread = "" if t["se"] is None else f" ±{t['se']:.3f}"
        lines.append([f"{t['a']} - {t['b']}", names.get(t["figure"], t["figure"]), f"{t['difference']:+.3f}{spread}",
                      f"{t['above']} of {t['n']} {t['of']}", f"{t['p']:.4f}"])  # fmt: skip
    header = ["paired", "", "difference ± standard error", "above 0", "p (sign flips)"]
    return align([header, *lines]) if lines else ""


def compare_table(rows: list[dict]) -> str:
    """The comparison of methods as text."""
    lines = [["", "accuracy", "of each seed", "cut off", "documents", "passes", "tokens", "evaluated"]]
    for r in rows:
        how = ", ".join([r["heldout"], *(f"{k} {v}" for k, v in r["evaluation"].items())])
        of_each = " ".join(f"{a:.3f}" for a in r["accuracies"])
        lines.append([r["name"], f"{r['accuracy']:.3f}", of_each, f"{r['cut_off']:.3f}", f"{r['documents']:,}",
                      f"{r['passes']:.1f}", f"{r['train_tokens'][0]:,}", how])  # fmt: skip
    return align(lines)


def align(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def plot(rows: list[dict], path: Path, s: Settings) -> bool:
    """curves.png: accuracy, likelihood and picks by iteration; or compare.png. False where matplotlib is
    missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = (plot_compare if s.compare else plot_loop)(rows, plt, s)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return True


def plot_compare(rows: list[dict], plt, s: Settings):
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.bar([r["name"] for r in rows], [r["accuracy"] for r in rows], color=["C3", "C3", "C1", "C1", "C0"])
    for i, r in enumerate(rows):
        axis.plot([i] * len(r["accuracies"]), r["accuracies"], "k.")
        axis.annotate(f"{r['accuracy']:.2f}", (i, r["accuracy"]), (0, 8), textcoords="offset points", ha="center")
    axis.set(title=f"held-out accuracy after {s.tokens:,} training tokens, {s.seeds} seeds (dots)", ylim=(0, 1.1))
    axis.grid(axis="y", alpha=0.3)
    return figure


def plot_loop(rows: list[dict], plt, s: Settings):
    """All seeds as thin lines, their mean as a thick one; the controls' means as marks behind the last
    iteration."""
    names = [f"M{t}" for t in range(s.iterations + 1)]
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")

    def curve(axis, key, color, label):
        x = [t for t, name in enumerate(names) if any(value(r, key) is not None for r in rows if r["name"] == name)]
        known = {(r["name"], r["seed"]): value(r, key) for r in rows}
        lines = [[known.get((names[t], seed)) for t in x] for seed in dict.fromkeys(r["seed"] for r in rows)]
        lines = np.array(lines, dtype=float)  # [seeds, iterations]; nan: no such figure
        if x:
            for line in lines:
                axis.plot(x, line, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(x, np.nanmean(lines, axis=0), color=color, marker="o", linewidth=2, label=label)

    def level(axis, name, key, color, style):
        values = [v for r in rows if r["name"] == name and (v := value(r, key)) is not None]
        if values:
            axis.axhline(np.mean(values), color=color, linestyle=style, label=name.split("/")[0] + (": NLL" if "nll" in key else ""))

    for axis, key, title in ((axes[0], "accuracy", "greedy"), (axes[1], "accuracy_sampled", "temperature 1")):
        curve(axis, key, "C0", "the loop")
        for name, color, style in (("warm_flops", "C1", "--"), (f"uniform/M{s.iterations}", "C4", "-."), ("gold", "C2", ":"),
                                   ("raw_flops", "C3", "--")):  # fmt: skip
            level(axis, name, key, color, style)
        axis.set(title=f"held-out accuracy, {title}", ylim=(0, 1.02))
    curve(axes[2], "nll_thoughtless_document", "C1", "thoughtless")
    for key, color, label in (("bound_1", "#9ecae1", "-ELBO"), ("bound_4", "#4292c6", "IWAE-4"), ("bound_16", "#084594", "IWAE-16")):
        curve(axes[2], key, color, label)
    level(axes[2], "raw_tokens", "nll_document", "C3", ":")
    level(axes[2], "raw_flops", "nll_document", "C3", "--")
    axes[2].set(title="-log p of held-out answers, nats a document")
    curve(axes[3], "e_kept", "C5", "chunks that got a thought")
    curve(axes[3], "e_right_of_kept", "C2", "of those, the right one")
    axes[3].set(title="the thoughts it was trained on", ylim=(0, 1.02))
    for axis in axes:
        axis.set(xlabel="EM iteration")
        axis.set_xticks(range(len(names)), names)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure


def report(s: Settings, rows: list[dict], out_dir: Path) -> str:
    """Write results.json (or compare.json); the report as text."""
    config = {k: v for k, v in asdict(s).items() if k not in ("out_dir", "device", "jobs")}
    if s.compare:
        write_json(out_dir / "compare.json", {"config": config, "rows": rows})
        return compare_table(rows)
    last, summary = f"M{s.iterations}", summarise(rows)
    tests, gaps, ruled = comparisons(rows, last), likelihood_gaps(rows, last), nats_of_rules(rows, s, out_dir)
    found = {"rows": rows, "summary": summary, "tests": tests, "likelihood": gaps, "rules_nats_document": ruled}
    write_json(out_dir / "results.json", {"config": config} | found)
    known = f"\n\nUnder the corpus's own rules the scored answers have {ruled:.3f} nats a document." if ruled else ""
    return table(summary) + known + "\n\n" + test_lines(tests, gaps)


def main(s: Settings) -> None:
    loop_only = ("iterations", "samples", "infer", "controls", "benchmark", "base", "warm_train", "jobs")
    for flag in loop_only if s.compare else ("tokens",):
        if getattr(s, flag) != getattr(Settings, flag):
            raise UserError(f"--{flag}: does nothing {'with' if s.compare else 'without'} --compare; leave it out")
    name = Path(s.corpus).name if s.corpus else "digits"
    out_dir = Path(s.out_dir or f"out/{name}{'-compare' if s.compare else ''}")
    jobs, devices = how_many(s)
    jobs = 1 if s.compare else jobs
    begin = time.time()
    with only_run(out_dir) as lock:
        stages = Stages(jobs, devices, lock)
        rows = run_compare(s, out_dir, stages) if s.compare else run_seeds(s, out_dir, stages)
        text = report(s, rows, out_dir)
        drawn = plot(rows, out_dir / ("compare.png" if s.compare else "curves.png"), s)
    files = ("compare.json", "compare.png") if s.compare else ("results.json", "curves.png")
    print("\n" + text)
    print(f"\n{out_dir}/{files[0]}" + (f", {out_dir}/{files[1]}" if drawn else "; no picture: matplotlib is not installed"))
    print(f"in {duration(time.time() - begin)}{peak_memory()}")


def peak_memory() -> str:
    """Largest resident memory of any stage, where the system tells (kilobytes on Linux, bytes on a Mac)."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", peak memory of a stage {peak / 1e6:,.0f} MB"


if __name__ == "__main__":
    run(main, Settings)
