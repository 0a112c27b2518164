"""The EM loop: a model learns to think from a few examples, infers the thoughts of raw text, and learns from those, again and again.

    data      a few documents with thoughts (warm), many without (raw), some held out
    M0        warm start: train.py on the documents with thoughts
    E-step t  infer_thoughts.py: M(t-1) samples K thoughts for every raw chunk, weighs them, picks one
    M-step t  train.py from scratch on the raw documents with those thoughts: Mt
    baselines on the raw documents without thoughts: raw_tokens (as many epochs as an M-step), raw_flops (as many training tokens)
    eval      eval_math.py for every model, on the held-out documents

With p(z, x) the model that thinks and then writes and q(z | x) the one that reads and recovers thoughts (one network is both), the
E-step draws z from close to p(z | x) by importance sampling, and the M-step maximises log p(z, x) + log q(z | x).

    python em.py                                     # the toy corpus, about 4 minutes on 2 CPU cores
    python em.py --iterations=1 --samples=1          # one round without a choice of thoughts
    python em.py --infer="--select=uniform" --out_dir=out/no-weights          # the E-step without weights; or argmax, or mcmc
    python em.py --corpus=out/gsm8k --train="--n_layer=6 --n_embd=192 --n_head=6" --out_dir=out/gsm8k-em
    python em.py --compare                           # instead of the loop: the methods of data/methods.py side by side; 11 minutes of CPU time

Each stage is a command, printed as it starts; copy it, edit it, run it by hand. A stage that is complete is skipped, one that was cut
off goes on, so the same em.py command can be repeated at any time. Writes results.json and curves.png (compare.json and compare.png) into --out_dir.
This script reads numbers that the stages wrote; it imports no model code.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data.cli import UserError, duration, opt, read_json, replacing, run, write_json
from data.corpus import open_corpus, open_thoughts

HERE = Path(__file__).resolve().parent


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt("", "folder with warm, warm_thoughts, raw and heldout (data/digits.py, data/gsm8k.py); none: makes digits")
    out_dir: str = opt("", "where everything goes; none: out/CORPUS-samplesK-seedN, or out/CORPUS-compare-seedN")
    compare: bool = opt(False, "no loop: one model for each method of data/methods.py and seed, trained on as many tokens")
    tokens: int = opt(1_000_000, "with --compare: training tokens of each model", low=1)
    seeds: int = opt(2, "with --compare: models of each method; the first has --seed, each further one the next", low=1)
    iterations: int = opt(3, "EM iterations", low=1)
    samples: int = opt(4, "thoughts sampled a chunk in the E-step (K)", low=1)
    max_new: int = opt(64, "longest thought in tokens", low=1)
    train: str = opt("", 'more flags for every train.py, as in --train="--n_layer=6 --lr=1e-3"')
    infer: str = opt("", "more flags for every infer_thoughts.py")
    eval: str = opt("", "more flags for every eval_math.py")
    seed: int = opt(0, "seed of every stage")
    device: str = opt("", "cpu, cuda, mps; none: the best there is")


# -------------------------------------------------------------------------------------------------- stages


@contextlib.contextmanager
def only_run(out_dir: Path):
    """Hold out_dir against other runs. Stages inherit the lock: one that outlives a killed em.py is waited for."""
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


def stage(name: str, script: str, folder: Path, last: str, flags: dict, more: str, lock: tuple) -> None:
    """Run `python script --flag=value ...`, which fills `folder`, unless the file it writes last is there. UserError if it fails or was
    made by other flags."""
    done = folder / last
    flags = {k: str(v) for k, v in flags.items() if v != ""}
    for word in shlex.split(more):
        key, _, value = word.removeprefix("--").partition("=")
        flags[key] = value
    if done.exists():
        made_by = read_json(folder / "settings.json")
        changed = [f"--{k}={made_by.get(k)} became {v}" for k, v in flags.items() if k in made_by and str(made_by[k]) != v]
        if changed:
            raise UserError(f"{folder}: made with other settings ({'; '.join(changed)}); give another --out_dir")
        newer = (HERE / script).stat().st_mtime > done.stat().st_mtime
        print(f"{name}: complete" + (f"; but {script} has changed since: give another --out_dir to run it anew" if newer else ""))
        return
    command = [script] + [f"--{k}={v}" for k, v in flags.items()]
    print(f"\n{name}: $ python {shlex.join(command)}", flush=True)
    # Its own session: Ctrl-C reaches only us. Its standard input: when we die, however we die, it closes and the stage ends.
    child = subprocess.Popen(
        [sys.executable, str(HERE / script), *command[1:]], stdin=subprocess.PIPE, start_new_session=True, pass_fds=lock,
        env=os.environ | {"EM_CHILD": "1"},
    )  # fmt: skip
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if code:
        raise UserError(f"stage {name} ended with exit code {code} (see above); the same command goes on from there")


def find_data(s: Settings, out_dir: Path, lock: tuple) -> Path:
    """The corpus folder, made first if none is given."""
    data = Path(s.corpus) if s.corpus else out_dir / "data"
    if not s.corpus:
        stage("data", "data/digits.py", data, "heldout_truth/meta.json", {"out_dir": data, "seed": s.seed}, "", lock)
    for part in ("warm", "warm_thoughts", "raw", "heldout"):
        if not (data / part / "meta.json").exists():
            raise UserError(f"{data / part}: missing; make the corpus with data/digits.py or data/gsm8k.py --out_dir={data}")
    return data


def run_all(s: Settings, out_dir: Path, lock: tuple) -> list[dict]:
    """All stages of the loop in order; the rows of the report."""
    data = find_data(s, out_dir, lock)
    truth = data / "heldout_truth" if (data / "heldout_truth").exists() else ""
    common = {"seed": s.seed, "device": s.device}
    rows = []

    def train(name: str, corpus: Path, thoughts="", more: str = "") -> Path:
        folder = out_dir / name
        flags = {"corpus": corpus, "thoughts": thoughts, "out_dir": folder} | common
        stage(name, "train.py", folder, "config.json", flags, f"{s.train} {more}", lock)
        return folder

    def evaluate(name: str, mode: str, e_step: Path | None = None) -> None:
        model, folder = out_dir / name, out_dir / name / "eval"
        flags = {"corpus": data / "heldout", "model": model, "mode": mode, "out_dir": folder, "k": 1, "temperature": 1.0, "top_p": 1.0} | common
        if mode == "latent":
            flags |= {"thoughts": truth, "samples": s.samples, "max_new": s.max_new}
        stage(f"{name} eval", "eval_math.py", folder, "results.json", flags, s.eval, lock)
        rows.append(make_row(name, model, e_step, data))

    train("raw_tokens", data / "raw")
    evaluate("raw_tokens", "raw")
    model = train("M0", data / "warm", data / "warm_thoughts")
    evaluate("M0", "latent")
    for t in range(1, s.iterations + 1):
        thoughts = out_dir / f"E{t}"
        flags = {"corpus": data / "raw", "model": model, "out_dir": thoughts, "samples": s.samples, "max_new": s.max_new} | common
        if t > 1 and "--select=mcmc" in shlex.split(s.infer):
            flags["previous"] = out_dir / f"E{t - 1}"
        stage(f"E{t}", "infer_thoughts.py", thoughts, "timing.json", flags, s.infer, lock)
        model = train(f"M{t}", data / "raw", thoughts)
        evaluate(f"M{t}", "latent", thoughts)
    budget = read_json(out_dir / "M1" / "training.json")["train_tokens"]
    train("raw_flops", data / "raw", more=f"--max_tokens={budget}")
    evaluate("raw_flops", "raw")
    return [rows[0], rows[-1], *rows[1:-1]]


def run_compare(s: Settings, out_dir: Path, lock: tuple) -> list[dict]:
    """s.seeds models for each method, on the same raw documents and the same number of training tokens; a row for each method."""
    folder = out_dir / "methods"
    flags = {"corpus": find_data(s, out_dir, lock), "out_dir": folder, "tokens": s.tokens, "seed": s.seed}
    stage("methods", "data/methods.py", folder, "meta.json", flags, "", lock)
    rows = []
    for method in read_json(folder / "meta.json")["methods"]:
        thoughts = folder / method["thoughts"] if method["thoughts"] else ""
        evaluation = method["evaluation"] | ({"max_new": s.max_new} if thoughts else {})
        models = [out_dir / f"{method['name']}-seed{seed}" for seed in range(s.seed, s.seed + s.seeds)]
        for seed, model in enumerate(models, s.seed):
            common = {"seed": seed, "device": s.device}
            flags = {"corpus": folder / method["corpus"], "thoughts": thoughts, "out_dir": model, "max_tokens": s.tokens} | common
            stage(model.name, "train.py", model, "config.json", flags, s.train, lock)
            flags = {"corpus": folder / method["heldout"], "model": model, "out_dir": model / "eval"} | evaluation | common
            stage(f"{model.name} eval", "eval_math.py", model / "eval", "results.json", flags, s.eval, lock)
        results, training = ([read_json(model / name) for model in models] for name in ("eval/results.json", "training.json"))
        row = {"name": method["name"], "heldout": method["heldout"], "evaluation": evaluation, "accuracies": [r["accuracy"] for r in results]}
        row |= {"accuracy": sum(row["accuracies"]) / s.seeds, "cut_off": sum(r["cut_off"] for r in results) / sum(r["n"] for r in results)}
        row |= {"nll": [r["nll_bound"]["16"] if thoughts else r["nll"] for r in results], "documents": method["documents"]}
        rows.append(row | {"passes": training[0]["data"][0]["epochs"], "train_tokens": [t["train_tokens"] for t in training]})
    return rows


# -------------------------------------------------------------------------------------------------- report


def right_share(thoughts: Path, raw: Path, truth: Path) -> float:
    """Of the chunks with a true thought, the share whose picked thought is the same, token by token."""
    corpus = open_corpus(raw)
    picked, true = open_thoughts(thoughts, corpus), open_thoughts(truth, corpus)
    numbers = [i for i in range(corpus.n_chunks) if len(true.span(i))]
    return sum(picked.span(i).tolist() == true.span(i).tolist() for i in numbers) / len(numbers)


def make_row(name: str, model: Path, e_step: Path | None, data: Path) -> dict:
    """One model's figures, gathered from the folders of its stages."""
    training, results = read_json(model / "training.json"), read_json(model / "eval" / "results.json")
    row = {"name": name} | {k: results[k] for k in ("accuracy", "accuracy_se", "n")} | {"accuracy_sampled": results["sampled"]["accuracy"]}
    row |= {"nll": results["nll"]} if "nll" in results else {"nll_bound": results["nll_bound"]}
    row |= {"ess": results.get("ess"), "pick_right": results.get("pick_right"), "cut_off": results.get("cut_off_share")}
    row |= {"tokens_per_s": training["tokens_per_s"], "train_tokens": training["train_tokens"]}
    row["seconds"] = training["seconds"] + read_json(model / "eval" / "timing.json")["seconds"]
    if e_step:  # what the model's own training thoughts were like
        meta, timing = read_json(e_step / "meta.json"), read_json(e_step / "timing.json")
        figures = {"ess": meta["ess"], "cut_off": meta["cut_off"], "all_cut_off": meta["all_cut_off"], "nll_bound": meta["nll_bound"]}
        truth = data / "raw_truth"
        figures["pick_right"] = right_share(e_step, data / "raw", truth) if truth.exists() else None
        row["e_step"] = figures | {"sampled_tokens": meta["sampled_tokens"]} | timing
        row["seconds"] += timing["seconds"]
    return row


def table(rows: list[dict]) -> str:
    """The report as text."""

    def number(x, digits=3):
        return "-" if x is None else f"{x:.{digits}f}"

    header = ["", *"accuracy,sampled,NLL,-ELBO,IWAE-4,IWAE-16,ESS,picks right,cut off,trained on,tokens/s,sampling,seconds".split(",")]
    lines = [header]
    for r in rows:
        bounds, e_step = r.get("nll_bound", {}), r.get("e_step", {})
        lines.append([
            r["name"], f"{r['accuracy']:.3f} ±{r['accuracy_se']:.3f}", number(r["accuracy_sampled"]), number(r.get("nll"), 4),
            *(number(bounds.get(k), 4) for k in ("1", "4", "16")), number(r["ess"], 2), number(r["pick_right"]), number(r["cut_off"]),
            number(e_step.get("pick_right")), f"{r['tokens_per_s']:,.0f}", f"{e_step['tokens_per_s']:,.0f}" if e_step else "-", f"{r['seconds']:.0f}",
        ])  # fmt: skip
    return align(lines)


def compare_table(rows: list[dict]) -> str:
    """The comparison as text."""
    lines = [["", "accuracy", "of each seed", "cut off", "documents", "passes", "tokens", "evaluated"]]
    for r in rows:
        how = ", ".join([r["heldout"], *(f"{k} {v}" for k, v in r["evaluation"].items())])
        lines.append([r["name"], f"{r['accuracy']:.3f}", " ".join(f"{a:.3f}" for a in r["accuracies"]), f"{r['cut_off']:.3f}", f"{r['documents']:,}",
                      f"{r['passes']:.1f}", f"{r['train_tokens'][0]:,}", how])  # fmt: skip
    return align(lines)


def align(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))) for line in lines)


def plot(rows: list[dict], path: Path, s: Settings) -> bool:
    """curves.png: accuracy, likelihood and the picks, by iteration; or compare.png. False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = (plot_compare if s.compare else plot_loop)(rows, plt, s)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
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
    models = [r for r in rows if "nll_bound" in r]
    raw = [r for r in rows if "nll" in r]
    x = list(range(len(models)))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    left.errorbar(x, [r["accuracy"] for r in models], [r["accuracy_se"] for r in models], marker="o", capsize=3, color="C0", label="with thoughts")
    for r, style in zip(raw, ("--", ":")):
        left.axhline(r["accuracy"], linestyle=style, color="C3", label=r["name"])
        middle.axhline(r["nll"], linestyle=style, color="C3", label=f"{r['name']}: NLL")
    for k, color in zip(("1", "4", "16"), ("#9ecae1", "#4292c6", "#084594")):
        middle.plot(x, [r["nll_bound"][k] for r in models], marker="o", color=color, label="-ELBO" if k == "1" else f"-IWAE-{k}")
    right.plot(x, [r["ess"] / s.samples for r in models], marker="o", color="C2", label=f"effective samples / {s.samples}")
    if all(r["pick_right"] is not None for r in models):
        right.plot(x, [r["pick_right"] for r in models], marker="o", color="C1", label="picks that are right")
    for axis, title in (
        (left, "held-out accuracy"),
        (middle, "held-out text, nats a byte (lower is better)"),
        (right, "inferred thoughts, held out"),
    ):
        axis.set(title=title, xlabel="EM iteration", xticks=x)
        axis.set_xticks(x, [r["name"] for r in models])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_ylim(0, 1)
    right.set_ylim(0, 1.05)
    return figure


def main(s: Settings) -> None:
    for flag in ("iterations", "samples", "infer") if s.compare else ("tokens", "seeds"):
        if getattr(s, flag) != getattr(Settings, flag):
            raise UserError(f"--{flag}: does nothing {'with' if s.compare else 'without'} --compare; leave it out")
    name = Path(s.corpus).name if s.corpus else "digits"
    out_dir = Path(s.out_dir or f"out/{name}-{'compare' if s.compare else f'samples{s.samples}'}-seed{s.seed}")
    report, picture = ("compare.json", "compare.png") if s.compare else ("results.json", "curves.png")
    begin = time.time()
    with only_run(out_dir) as lock:
        rows = (run_compare if s.compare else run_all)(s, out_dir, lock)
        config = {k: v for k, v in asdict(s).items() if k not in ("out_dir", "device")}
        write_json(out_dir / report, {"config": config, "rows": rows})
        drawn = plot(rows, out_dir / picture, s)
    print("\n" + (compare_table if s.compare else table)(rows))
    print(f"\n{out_dir}/{report}" + (f", {out_dir}/{picture}" if drawn else "; no picture: matplotlib is not installed"))
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
