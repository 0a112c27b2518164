"""Results of eval_math.py as text, and the comparison of finished runs."""

import os
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np

from data.lib.cli import UserError, read_json, write_json
from data.lib.problems import read_rows
from data.lib.scores import mean_and_error, paired, paired_difference

# A results.json with this score has answers, one without has a likelihood only.
FLEXIBLE = "exact_match,flexible-extract"
STRICT = "exact_match,strict-match"
NO_RESPONSES = "no results of a benchmark (results.json and responses.jsonl)"
# The arrays of likelihood.npz that are compared.
MEASURES = {"nll": "NLL", "thoughtless": "thoughtless NLL", "bound_16": "IWAE-16"}


def compare(folders: list[str], out_dir: Path) -> None:
    """Compare runs on the same problems, or on the same documents; UserError for others."""
    names = short_names(folders)
    results = [read_json(Path(folder) / "results.json") for folder in folders]
    paths = [Path(folder) / "likelihood.npz" for folder in folders]
    graded = [FLEXIBLE in r for r in results]
    measured = all(path.exists() for path in paths)
    if not all(graded) and not measured:
        raise UserError(f"{folders[graded.index(False)]}: {NO_RESPONSES}")
    pairs, nats = [], {}
    if all(graded):
        pairs = compare_accuracy(folders, names)
        print_accuracy(names, results, pairs)
    if measured:
        nats = compare_likelihood(paths, names)
        print_likelihood(nats)
    out_dir.mkdir(parents=True, exist_ok=True)
    runs = [{"folder": str(folder)} | r for folder, r in zip(folders, results)]
    write_json(out_dir / "compare.json", {"runs": runs, "pairs": pairs, "likelihood": nats})
    print(f"{out_dir}/compare.json")


def short_names(folders: list[str]) -> list[str]:
    """The folders without the folder that all of them lie in."""
    shared = os.path.commonprefix(folders) if len(folders) > 1 else ""
    return [folder[shared.rfind("/") + 1 :] for folder in folders]


# -------------------- what is compared


def compare_accuracy(folders: list[str], names: list[str]) -> list[dict]:
    """The paired tests of all pairs of runs; UserError if their problems differ."""
    runs = []
    for folder in folders:
        right = read_verdicts(folder)
        runs.append(right)
        if right.keys() != runs[0].keys():
            common = len(right.keys() & runs[0].keys())
            counts = f"{len(right)} and {len(runs[0])}, {common} in common"
            raise UserError(f"{folder}: asked other problems than {folders[0]}: {counts}")
    pairs = []
    for i, j in combinations(range(len(runs)), 2):
        pairs.append({"first": names[i], "second": names[j]} | paired(runs[i], runs[j]))
    return pairs


def read_verdicts(folder: str) -> dict:
    """{problem: whether its greedy response is right} of a run."""
    path = Path(folder) / "responses.jsonl"
    if not path.exists():
        raise UserError(f"{folder}: {NO_RESPONSES}")
    right = {}
    for record in read_rows(path):
        name = f"{record['question']}-{record['problem']}"
        right[name] = record["responses"][0]["correct"]
    return right


def compare_likelihood(paths: list[Path], names: list[str]) -> dict:
    """{documents, rows, pairs} of some likelihood.npz; UserError if their documents differ.

    In nats a document. Rows are means over documents, pairs the paired differences
    second - first, each with its standard error.
    """
    tables = [read_table(path) for path in paths]
    columns = {}
    for path, name, table in zip(paths, names, tables):
        if str(table["corpus"]) != str(tables[0]["corpus"]):
            raise UserError(f"{path}: measured on another corpus than {paths[0]}")
        if any(not np.array_equal(table[key], tables[0][key]) for key in ("doc", "bytes", "tokens")):
            need = "give both the same --bound_docs and --max_new"
            raise UserError(f"{path}: measured on other documents or chunks than {paths[0]}; {need}")
        for key, label in MEASURES.items():
            if key in table:
                columns[f"{name} {label}"] = table[key]
    rows, pairs = [], []
    for label, column in columns.items():
        mean, error = mean_and_error(column)
        rows.append({"name": label, "nats": mean, "nats_se": error})
    for first, second in combinations(columns, 2):
        mean, error = paired_difference(columns[first], columns[second])
        pair = {"first": first, "second": second}
        pairs.append(pair | {"difference": mean, "difference_se": error})
    return {"documents": len(tables[0]["doc"]), "rows": rows, "pairs": pairs}


def read_table(path: Path) -> dict:
    """The arrays of a likelihood.npz; UserError when it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return dict(f)
    except (ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: damaged ({e}); remove its folder and run again") from None


# -------------------- text and tables


def print_results(results: dict) -> None:
    """The single figures of results.json on one line."""
    said = []
    for name, value in results.items():
        if isinstance(value, dict) or "," in name:
            continue  # the harness's names repeat what "accuracy" says
        if isinstance(value, float):
            value = f"{value:.4g}"
        said.append(f"{name} {value}")
    print(", ".join(said))


def print_nats(figures: dict) -> None:
    if "nll" in figures:
        said = f"NLL {figures['nll']:.4f}"
    else:
        bounds = [f"K={k} {v:.4f}" for k, v in figures["nll_bound"].items()]
        said = f"without a thought {figures['nll_thoughtless']:.4f}, "
        said += f"bounds {', '.join(bounds)}"
    print(f"nats a byte of {figures['bound_chunks']} chunks: {said}")


def print_table(rows: list[list]) -> None:
    """A table in Markdown; the first row is its header."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    print("\n".join(lines))


def print_accuracy(names: list[str], results: list[dict], pairs: list[dict]) -> None:
    heads = "mode, n, shots, flexible, strict, mean of k, maj@k, pass@k, cut off, no answer"
    rows = [["", *heads.split(", ")]]
    for name, r in zip(names, results):
        row = [name, r["mode"], r["n"], r.get("n_shots", "-")]
        row.append(f"{r['accuracy']:.3f} ± {r['accuracy_se']:.3f}")
        row.append(f"{r[STRICT]:.3f}")
        sampled = r.get("sampled", {})
        k = sampled.get("k", 0)
        for key in ("accuracy", f"maj@{k}", f"pass@{k}"):
            row.append(f"{sampled[key]:.3f}" if key in sampled else "-")
        rows.append([*row, r["cut_off"], r["no_answer"]])
    print_table(rows)
    for p in pairs:
        difference = f"{p['difference']:+.3f} ± {p['difference_se']:.3f}"
        only = f"{p['only_second']} against {p['only_first']} problems that only one solves"
        print(f"{p['second']} - {p['first']}: {difference}, {only}, p = {p['p']:.2g}")


def print_likelihood(nats: dict) -> None:
    """The rows and pairs of compare_likelihood() as text."""
    rows = [["", f"nats a document, of {nats['documents']}"]]
    for r in nats["rows"]:
        rows.append([r["name"], f"{r['nats']:.4f} ± {r['nats_se']:.4f}"])
    print_table(rows)
    for p in nats["pairs"]:
        difference = f"{p['difference']:+.4f} ± {p['difference_se']:.4f}"
        print(f"{p['second']} - {p['first']}: {difference} nats a document")
