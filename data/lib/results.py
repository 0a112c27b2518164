"""What em.py makes of the numbers of its stages: rows, means, paired tests.

A row is what is kept of one model (make_row), a summary its mean over seeds and the
deviation between them.
"""

import json
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

# The columns of em.py's table, and the figure of a row that is in each.
COLUMNS = {
    "benchmark": "benchmark",
    "greedy": "accuracy",
    "sampled": "accuracy_sampled",
    "raw NLL": "nll_document",
    "thoughtless": "nll_thoughtless_document",
    "-ELBO": "bound_1",
    "IWAE-4": "bound_4",
    "IWAE-16": "bound_16",
    "ESS": "ess",
    "kept": "e_kept",
    "right of kept": "e_right_of_kept",
}
FIGURES = (*COLUMNS.values(), "pick_right", "flops", "seconds")


def make_row(name: str, model: Path, e_step: Path | None, data: Path) -> dict:
    """One model's figures, gathered from the folders of its stages.

    The accuracies are missing where the corpus has no questions.
    """
    training = read_json(model / "training.json")
    results = read_json(model / "eval" / "results.json")
    row = {"name": name, "folder": str(model)}
    if results.get("accuracy") is not None:
        row |= {key: results[key] for key in ("accuracy", "accuracy_se", "n")}
        if "sampled" in results:
            row["accuracy_sampled"] = results["sampled"]["accuracy"]
    row |= {key: x for key, x in results.items() if key.startswith("nll")}
    row |= {key: results.get(key) for key in ("ess", "pick_right")}
    row["cut_off"] = results.get("cut_off_share")
    row |= {key: training[key] for key in ("tokens_per_s", "train_tokens")}
    row["seconds"] = training["seconds"]
    row["seconds"] += read_json(model / "eval" / "timing.json")["seconds"]
    if e_step:
        row["e_step"] = figures_of_thoughts(e_step, data)
        row["seconds"] += row["e_step"]["seconds"]
    return row


def figures_of_thoughts(e_step: Path, data: Path) -> dict:
    """What the thoughts were like that a model was trained on.

    kept: the share of the chunks with a true thought that got one. right_of_kept:
    the share of those that got the true one, token by token.
    """
    meta = read_json(e_step / "meta.json")
    keys = "ess cut_off all_cut_off nll_bound sampled_tokens computed_tokens".split()
    figures = {key: meta[key] for key in keys} | read_json(e_step / "timing.json")
    truth = data / "raw_truth"
    if truth.exists():
        corpus = open_corpus(data / "raw")
        picked, true = (
            open_thoughts(e_step, corpus),
            open_thoughts(truth, corpus),
        )
        numbers = [i for i in range(corpus.n_chunks) if len(true.span(i))]
        kept = [i for i in numbers if len(picked.span(i))]
        right = [np.array_equal(picked.span(i), true.span(i)) for i in kept]
        figures["kept"] = len(kept) / len(numbers)
        figures["right_of_kept"] = sum(right) / len(kept) if kept else None
    return figures


def unit_of(rows: list[dict]) -> str:
    """What nats are told for; documents of plain text differ in length."""
    return "document" if any("accuracy" in row for row in rows) else "byte"


def value(row: dict, key: str) -> float | None:
    """A row's figure by its name in FIGURES; nats as unit_of says."""
    unit = "_document" if "accuracy" in row else ""
    key = key.replace("_document", unit)
    if key.startswith("bound_"):
        return row.get(f"nll_bound{unit}", {}).get(key.removeprefix("bound_"))
    if key.startswith("e_"):
        return row.get("e_step", {}).get(key.removeprefix("e_"))
    return row.get(key)


def in_order(rows: dict, arms) -> list[dict]:
    """A seed's rows {name: row} as the report lists them."""
    models = [f"M{t}" for t in range(len(rows))]
    names = ["raw_tokens", "raw_flops", "warm_flops", "warm_x4", *models]
    names += [f"{arm}/{model}" for arm in arms for model in models]
    return [rows[name] for name in [*names, "gold"] if name in rows]


def summarise(rows: list[dict]) -> list[dict]:
    """Of each name {figure: (mean, deviation between seeds; None: one seed)}."""
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
    record = {
        "ended": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(seconds),
        "memory": memory.strip(", "),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    packages = "torch", "numpy", "tiktoken", "sympy"
    record |= {name: metadata.version(name) for name in packages}
    append_jsonl(out_dir / "runs.jsonl", record)


def stage_notes(folder: Path) -> list[tuple[str, dict, str]]:
    """(name, what it counted, command) of each stage, the oldest first."""
    scripts = {
        "training.json": "train.py",
        "samples.npz": "infer_thoughts.py",
        "results.json": "eval_math.py",
        "heldout_truth": "data/digits.py",
        "meta.json": "data/methods.py",
    }
    age = {path: path.stat().st_mtime for path in folder.glob("*/**/settings.json")}
    notes = []
    for path in sorted(age, key=age.get):
        stage, settings, said = path.parent, read_json(path), {}
        for name in ("meta", "training", "results", "timing"):
            file = stage / f"{name}.json"
            said |= read_json(file) if file.exists() else {}
        known = said.keys() - settings.keys()
        counts = {k: x for k, x in said.items() if type(x) is int and k in known}
        counts["seconds"] = round(said.get("seconds", 0))
        made_by = [scripts[file] for file in scripts if (stage / file).exists()]
        if not made_by:
            continue  # a stage that was cut off
        flags = {"out_dir": stage} | {k: x for k, x in settings.items() if x != ""}
        words = (f"--{k}={x}" for k, x in flags.items())
        command = shlex.join(["python", made_by[0], *words])
        notes.append((str(stage.relative_to(folder)), counts, command))
    return notes


def sign_flip(differences) -> float:
    """Two-sided p-value of the mean of paired differences, by flipping their signs.

    All 2^n flips for n <= 16, 65,536 seeded ones beyond.
    """
    d, rng = np.asarray(differences, dtype=float), np.random.default_rng(0)
    n, least = len(d), abs(d.sum()) - 1e-9
    if n <= 16:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # [2^n, n]
        return float((np.abs(signs @ d) >= least).mean())
    hits = 1  # the signs that were seen are themselves one of the flips
    for _ in range(64):
        signs = 1 - 2 * rng.integers(0, 2, (1024, n))
        hits += int((np.abs(signs @ d) >= least).sum())
    return hits / 65537


def paired(differences) -> dict:
    """The mean of paired differences, its error, how many are above 0, and p."""
    d = np.asarray(differences, dtype=float)
    return {
        "difference": float(d.mean()),
        "se": float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else None,
        "above": int((d > 0).sum()),
        "n": len(d),
        "p": sign_flip(d),
    }


def pairs_of(last: str, arms) -> list[tuple[str, str]]:
    """The rows that are compared, (a, b) for a - b. last: the last M-step's."""
    models = [f"M{t}" for t in range(int(last[1:]) + 1)]
    pairs = [*zip(models[1:], models)]
    pairs += [
        (last, "M0"),
        ("gold", "M0"),
        ("warm_x4", "M0"),
        (last, "warm_flops"),
        (last, "warm_x4"),
    ]
    pairs += [(last, f"{arm}/{last}") for arm in arms]
    pairs += [("M1", f"{arm}/M1") for arm in arms if arm.startswith("samples")]
    return list(dict.fromkeys(pairs))


# The figures that are compared (nats a document), and what one seed has many of.
PAIRED = {
    "accuracy": "problems",
    "accuracy_sampled": "problems",
    "bound_16": "documents",
}


def to_pair(row: dict, alone: bool) -> dict:
    """{figure: [its number]}, or (alone) the numbers of all problems or documents."""
    if not alone:
        numbers = row | {"bound_16": row.get("nll_bound_document", {}).get("16")}
        return {key: [x] for key in PAIRED if (x := numbers.get(key)) is not None}
    folder, found = Path(row["folder"]) / "eval", {}
    if "accuracy" in row:
        lines = (folder / "responses.jsonl").read_bytes().splitlines()
        records = [json.loads(line)["responses"] for line in lines]
        right = [[x["correct"] for x in record] for record in records]
        found["accuracy"] = [greedy for greedy, *_ in right]
        if "accuracy_sampled" in row:
            found["accuracy_sampled"] = [np.mean(others) for _, *others in right]
    with np.load(folder / "likelihood.npz", allow_pickle=False) as f:
        return found | {"bound_16": f["bound_16"]} if "bound_16" in f else found


def comparisons(rows: list[dict], last: str, arms) -> list[dict]:
    """The paired differences between rows in the figures of PAIRED, seed by seed.

    With one seed they are paired problem by problem (as if they were independent) and
    document by document, which says nothing about other seeds.
    """
    known = {(row["name"], row["seed"]): row for row in rows}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    alone = len(seeds) == 1
    found = []
    for a, b in pairs_of(last, arms):
        pairs = [(known.get((a, seed)), known.get((b, seed))) for seed in seeds]
        pairs = [
            (to_pair(x, alone), to_pair(y, alone)) for x, y in pairs if x and y
        ]
        for key, of in PAIRED.items():
            both = [(x[key], y[key]) for x, y in pairs if key in x and key in y]
            if both:
                d = [np.subtract(x, y, dtype=float) for x, y in both]
                of = of if alone else "seeds"
                test = {"a": a, "b": b, "figure": key, "of": of}
                found.append(test | paired(np.concatenate(d)))
    return found


def likelihood_gaps(rows: list[dict], last: str) -> list[dict]:
    """The last model's IWAE-16 bound less its thoughtless NLL, and the raw models' NLL.

    In nats a document. Documents of one seed share their models, so they are pairs
    only where there is one; several seeds are paired by their means. UserError when
    two models scored other documents.
    """
    nats = {}
    for row in rows:
        if row["name"] in (last, "raw_tokens", "raw_flops"):
            path = Path(row["folder"]) / "eval" / "likelihood.npz"
            with np.load(path, allow_pickle=False) as f:
                nats[row["name"], row["seed"]] = dict(f)
    gaps = []
    for other in (last, "raw_tokens", "raw_flops"):
        key = "thoughtless" if other == last else "nll"
        seeds = [seed for name, seed in nats if name == last and (other, seed) in nats]
        pairs = [(nats[last, seed], nats[other, seed]) for seed in seeds]
        if not pairs:
            continue
        same = "doc", "bytes", "tokens"
        if any(not np.array_equal(a[k], b[k]) for a, b in pairs for k in same):
            both = "give both the same --max_new, --bound_docs and --seq_len"
            raise UserError(f"{last} and {other} scored other documents; {both}")
        d = [a["bound_16"] - b[key] for a, b in pairs]
        of = "seeds" if len(d) > 1 else "documents"
        pair = {"a": f"{last} IWAE-16", "b": f"{other} {key}", "of": of}
        gaps.append(pair | paired([x.mean() for x in d] if len(d) > 1 else d[0]))
    return gaps
