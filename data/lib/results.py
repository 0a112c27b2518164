"""What em.py makes of the numbers that its stages wrote: rows, means over seeds, paired tests.

A row is what is kept of one model (make_row). A summary has a pair for each figure:
the mean over seeds, and the standard deviation between them. This file imports no
model code.
"""

import math
import os
import platform
import shlex
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from data.lib.cli import UserError, append_jsonl, read_json
from data.lib.corpus import open_corpus, open_thoughts

FIGURES = (
    "accuracy",
    "accuracy_sampled",
    "nll_document",
    "nll_thoughtless_document",
    "bound_1",
    "bound_4",
    "bound_16",
    "benchmark",
    "ess",
    "pick_right",
    "e_kept",
    "e_right_of_kept",
    "flops",
    "seconds",
)


# ----------------------------------------------------------------------------------------------------- rows


def make_row(name: str, model: Path, e_step: Path | None, data: Path) -> dict:
    """One model's figures, gathered from the folders of its stages.

    The accuracies are missing where the corpus has no questions.
    """
    training = read_json(model / "training.json")
    results = read_json(model / "eval" / "results.json")
    row = {"name": name, "folder": str(model)}
    if results.get("accuracy") is not None:
        row |= {key: results[key] for key in ("accuracy", "accuracy_se", "n")}
        row["accuracy_sampled"] = results["sampled"]["accuracy"]
    row |= {key: figure for key, figure in results.items() if key.startswith("nll")}
    row["ess"] = results.get("ess")
    row["pick_right"] = results.get("pick_right")
    row["cut_off"] = results.get("cut_off_share")
    row |= {key: training[key] for key in ("tokens_per_s", "train_tokens")}
    row["seconds"] = training["seconds"]
    row["seconds"] += read_json(model / "eval" / "timing.json")["seconds"]
    if e_step:
        row["e_step"] = figures_of_thoughts(e_step, data)
        row["seconds"] += row["e_step"]["seconds"]
    return row


def figures_of_thoughts(e_step: Path, data: Path) -> dict:
    """What the thoughts were like that a model was trained on."""
    meta = read_json(e_step / "meta.json")
    keys = ("ess", "cut_off", "all_cut_off", "nll_bound", "sampled_tokens", "computed_tokens")
    figures = {key: meta[key] for key in keys}
    if (data / "raw_truth").exists():
        figures |= pick_figures(e_step, data / "raw", data / "raw_truth")
    return figures | read_json(e_step / "timing.json")


def pick_figures(thoughts: Path, raw: Path, truth: Path) -> dict:
    """How good the picked thoughts are, for a corpus whose true thoughts are known.

    kept: the share of the chunks with a true thought that got one. right_of_kept:
    the share of those whose thought is the true one, token by token.
    """
    corpus = open_corpus(raw)
    picked, true = open_thoughts(thoughts, corpus), open_thoughts(truth, corpus)
    numbers = [i for i in range(corpus.n_chunks) if len(true.span(i))]
    kept = [i for i in numbers if len(picked.span(i))]
    right = sum(picked.span(i).tolist() == true.span(i).tolist() for i in kept)
    return {
        "kept": len(kept) / len(numbers),
        "right_of_kept": right / len(kept) if kept else None,
    }


def value(row: dict, key: str) -> float | None:
    """A row's figure by its name in FIGURES; the bounds are in nats a document."""
    if key.startswith("bound_"):
        return row.get("nll_bound_document", {}).get(key.removeprefix("bound_"))
    if key.startswith("e_"):
        return row.get("e_step", {}).get(key.removeprefix("e_"))
    return row.get(key)


def in_order(rows: dict, arms) -> list[dict]:
    """A seed's rows {name: row} as the report lists them, whatever ended first."""
    models = [name for name in rows if name[0] == "M"]
    names = ["raw_tokens", "raw_flops", "warm_flops", "warm_x4"]
    names += sorted(models, key=lambda model: int(model[1:]))
    for arm in arms:
        of_arm = [name for name in rows if name.startswith(f"{arm}/")]
        names += sorted(of_arm, key=lambda name: int(name.rpartition("M")[2]))
    return [rows[name] for name in [*names, "gold"] if name in rows]


def summarise(rows: list[dict]) -> list[dict]:
    """For each name of a row {figure:

    (mean over seeds, standard deviation between them)}; None: one seed.
    """
    summaries = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        summary = {"name": name, "seeds": [row["seed"] for row in mine]}
        for key in FIGURES:
            values = [v for row in mine if (v := value(row, key)) is not None]
            if values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                summary[key] = float(np.mean(values)), deviation
        summaries.append(summary)
    return summaries


def note_run(out_dir: Path, seconds: float, memory: str) -> None:
    """A line in runs.jsonl: when, how long, on what, with which versions."""
    packages = ("torch", "numpy", "tiktoken", "sympy")
    versions = {"python": platform.python_version()} | {p: metadata.version(p) for p in packages}
    ended = time.strftime("%Y-%m-%d %H:%M:%S")
    record = {"ended": ended, "seconds": round(seconds), "memory": memory.strip(", ")}
    record |= {"machine": f"{platform.platform()}, {os.cpu_count()} cores"} | versions
    append_jsonl(out_dir / "runs.jsonl", record)


LEFT_OUT = """cut_off all_cut_off no_gain empty_picks n_empty n_too_long n_short_context cut_tokens no_answer
forced not_graded answers_too_long too_long questions_too_long empty docs_left_out short_context killed"""


def stage_cells(folder: Path) -> list[list[str]]:
    """What ran in a folder: a header, and a line for each stage that is complete."""
    left = "cut off, left out, dropped"
    lines = [[f"stage of {folder.name}", "seconds", "tokens", left, "command"]]
    scripts = {"training.json": "train.py", "samples.npz": "infer_thoughts.py"}
    scripts["results.json"] = "eval_math.py"
    begun = {path: path.stat().st_mtime for path in folder.rglob("settings.json")}
    for stage in (path.parent for path in sorted(begun, key=begun.get)):
        settings = read_json(stage / "settings.json")
        maker = "data/digits.py" if "max_ops" in settings else "data/methods.py"
        script = next((s for name, s in scripts.items() if (stage / name).exists()), maker)
        files = ("meta.json", "training.json", "results.json", "timing.json")
        found = [read_json(stage / name) for name in files if (stage / name).exists()]
        said = {key: figure for numbers in found for key, figure in numbers.items()}
        counts = {k: said[k] for k in LEFT_OUT.split() if said.get(k)}
        names = {k: k.removeprefix("n_").replace("_", " ") for k in counts}
        left = ", ".join(f"{names[k]} {n:,}" for k, n in counts.items())
        flags = {k: v for k, v in settings.items() if v != ""} | {"out_dir": stage}
        words = [f"--{k}={v}" for k, v in flags.items()]
        command = shlex.join(["python", script, *words])
        seconds = f"{said['seconds']:.1f}" if "seconds" in said else "-"
        tokens = said.get("train_tokens") or said.get("sampled_tokens")
        tokens = f"{tokens:,}" if tokens else "-"
        name = str(stage.relative_to(folder))
        lines.append([name, seconds, tokens, left or "-", command])
    return lines


# ------------------------------------------------------------------------------------------------ statistics


def sign_flip(differences) -> float:
    """Two-sided p-value of the mean of paired differences, by flipping their signs.

    If there is no effect, each sign was a fair coin. The p-value is exact over all
    2^n flips for n <= 16, and comes from 65,536 seeded flips beyond. With n = 10
    the smallest is 2 / 1,024.
    """
    d = np.asarray(differences, dtype=float)
    n, least = len(d), abs(d.sum()) - 1e-9
    if n <= 16:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # [2^n, n]
        return float((np.abs(signs @ d) >= least).mean())
    rng = np.random.default_rng(0)
    hits = 1  # the signs that were seen are themselves one of the flips
    for _ in range(64):
        signs = 1 - 2 * rng.integers(0, 2, (1024, n))
        hits += int((np.abs(signs @ d) >= least).sum())
    return hits / 65537


def paired(differences) -> dict:
    """The mean of paired differences, its standard error, in how many pairs it is above 0, and p."""
    d = np.asarray(differences, dtype=float)
    return {
        "difference": float(d.mean()),
        "se": float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else None,
        "above": int((d > 0).sum()),
        "n": len(d),
        "p": sign_flip(d),
    }


def pairs_of(last: str, arms) -> list[tuple[str, str]]:
    """The names of rows that are compared, (a, b) for a - b. last: the model of the last iteration."""
    models = [f"M{t}" for t in range(int(last[1:]) + 1)]
    pairs = [*zip(models[1:], models)]
    pairs += [(last, "M0"), ("warm_x4", "M0"), (last, "warm_flops"), (last, "warm_x4")]
    pairs += [(last, f"{arm}/{last}") for arm in arms]
    pairs += [("M1", f"{arm}/M1") for arm in arms if arm.startswith("samples")]
    return list(dict.fromkeys(pairs))


def comparisons(rows: list[dict], last: str, arms) -> list[dict]:
    """The paired differences of accuracy between rows, seed by seed."""
    by_name = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["seed"]] = row
    found = []
    for a, b in pairs_of(last, arms):
        of_a, of_b = by_name.get(a, {}), by_name.get(b, {})
        both = [(of_a[seed], of_b[seed]) for seed in of_a if seed in of_b]
        for key in ("accuracy", "accuracy_sampled"):
            d = [x[key] - y[key] for x, y in both if key in x and key in y]
            if d:
                found.append({"a": a, "b": b, "figure": key} | paired(d))
    return found


def likelihood_gaps(rows: list[dict], last: str) -> list[dict]:
    """The last model's IWAE-16 bound less its own thoughtless NLL, and less the raw models' NLL.

    All are of the same documents and the same tokens under the same givens, in nats
    a document. Documents of one seed share their models. So of several seeds each
    counts once, by the mean over its documents; of a single one the documents are
    the pairs. UserError when two models scored other documents.
    """
    wanted = {last: ("bound_16", "thoughtless"), "raw_tokens": ("nll",), "raw_flops": ("nll",)}
    nats = {}
    for row in rows:
        if row["name"] in wanted:
            path = Path(row["folder"]) / "eval" / "likelihood.npz"
            with np.load(path, allow_pickle=False) as f:
                arrays = {key: f[key] for key in ("doc", *wanted[row["name"]])}
            nats[row["name"], row["seed"]] = arrays
    gaps = []
    for other, key in ((last, "thoughtless"), ("raw_tokens", "nll"), ("raw_flops", "nll")):
        seeds = [seed for name, seed in nats if name == last and (other, seed) in nats]
        pairs = [(nats[last, seed], nats[other, seed]) for seed in seeds]
        if any(not np.array_equal(a["doc"], b["doc"]) for a, b in pairs):
            both = "give both the same --max_new and --bound_docs"
            raise UserError(f"{last} and {other} scored other documents; {both}")
        d = [a["bound_16"] - b[key] for a, b in pairs]
        if d:
            names = {"a": f"{last} IWAE-16", "b": f"{other} {key}"}
            of = {"of": "seeds" if len(d) > 1 else "documents"}
            gaps.append(names | of | paired([x.mean() for x in d] if len(d) > 1 else d[0]))
    return gaps
