"""Results of eval_math.py as text, and the comparison of finished runs: tables, a picture."""

import os
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np

from data.lib.cli import UserError, read_json, replacing, write_json
from data.lib.problems import read_rows
from data.lib.scores import mean_and_error, paired, paired_difference

# A results.json with this score has answers, one without has a likelihood only.
FLEXIBLE = "exact_match,flexible-extract"
STRICT = "exact_match,strict-match"
STRICT_ERROR = "exact_match_stderr,strict-match"
NO_RESPONSES = "no results of a benchmark (results.json and responses.jsonl)"
# The arrays of likelihood.npz that are compared.
MEASURES = {"nll": "NLL", "thoughtless": "thoughtless NLL", "bound_16": "IWAE-16"}


def compare(folders: list[str], out_dir: Path) -> None:
    """Compare runs on the same problems, or on the same documents; UserError for others."""
    names = short_names(folders)
    results = [read_json(Path(folder) / "results.json") for folder in folders]
    nats, why_not = compare_likelihood(folders, names)
    graded = [FLEXIBLE in r for r in results]
    if not all(graded) and (any(graded) or not nats):
        more = f"; {why_not}" if why_not else ""
        raise UserError(f"{folders[graded.index(False)]}: {NO_RESPONSES}{more}")
    pairs = []
    if all(graded):
        pairs = compare_accuracy(folders, names)
        print_accuracy(names, results, pairs)
    if nats:
        print_likelihood(nats)
    elif why_not:
        print(f"likelihood: not compared; {why_not}")
    out_dir.mkdir(parents=True, exist_ok=True)
    runs = [{"folder": str(folder)} | r for folder, r in zip(folders, results)]
    write_json(out_dir / "compare.json", {"runs": runs, "pairs": pairs, "likelihood": nats})
    if not all(graded):
        picture = "; no picture: it would show accuracies, and there are none"
    elif draw_comparison(names, results, out_dir / "compare.png"):
        picture = f", {out_dir}/compare.png"
    else:
        picture = "; no picture: matplotlib is not installed"
    print(f"{out_dir}/compare.json{picture}")


def short_names(folders: list[str]) -> list[str]:
    """The folders without the folder that all of them lie in."""
    shared = os.path.commonprefix(folders) if len(folders) > 1 else ""
    return [folder[shared.rfind("/") + 1 :] for folder in folders]


def pairs_of(items: list) -> list[tuple[int, int]]:
    """The numbers of all (first, second), ordered by the second."""
    return sorted(combinations(range(len(items)), 2), key=lambda pair: pair[1])


# ------------------------------------- what is compared


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
    for i, j in pairs_of(runs):
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


def compare_likelihood(folders: list[str], names: list[str]) -> tuple[dict, str]:
    """({documents, rows, pairs}, "") of all folders' likelihood.npz, or ({}, why not).

    In nats a document. Rows are means over documents, pairs the paired differences
    second - first, each with its standard error.
    """
    paths = [Path(folder) / "likelihood.npz" for folder in folders]
    missing = [path for path in paths if not path.exists()]
    if missing:
        return {}, f"{missing[0]}: no such file" if len(missing) < len(paths) else ""
    tables = [read_table(path) for path in paths]
    columns = {}
    for folder, name, table in zip(folders, names, tables):
        if why_not := unlike(table, tables[0], folders[0]):
            return {}, f"{folder}: measured on {why_not}"
        for key, label in MEASURES.items():
            if key in table:
                columns[f"{name} {label}"] = table[key]
    rows, pairs = [], []
    for label, column in columns.items():
        mean, error = mean_and_error(column)
        rows.append({"name": label, "nats": mean, "nats_se": error})
    labels = list(columns)
    for i, j in pairs_of(labels):
        first, second = labels[i], labels[j]
        mean, error = paired_difference(columns[first], columns[second])
        pair = {"first": first, "second": second}
        pairs.append(pair | {"difference": mean, "difference_se": error})
    return {"documents": len(tables[0]["doc"]), "rows": rows, "pairs": pairs}, ""


def unlike(table: dict, first: dict, folder: str) -> str:
    """On what else a table was measured than the first one, that of `folder`; "": on the same."""
    if str(table["corpus"]) != str(first["corpus"]):
        return f"another corpus than {folder}"
    for key in ("doc", "bytes", "tokens"):
        if not np.array_equal(table[key], first[key]):
            need = "give both the same --bound_docs and --max_new"
            return f"other documents or chunks than {folder}; {need}"
    return ""


def read_table(path: Path) -> dict:
    """The arrays of a likelihood.npz; UserError when it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as f:
            table = dict(f)
    except (ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: damaged ({e}); remove its folder and run again") from None
    if not {"corpus", "doc", "bytes", "tokens"} <= table.keys():
        raise UserError(f"{path}: not a likelihood.npz of eval_math.py")
    return table


# ------------------------------------- text, tables, picture


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


def bars_of(result: dict) -> dict:
    """{label: (score, its standard error)} for the picture."""
    bars = {
        "flexible": (result["accuracy"], result["accuracy_se"]),
        "strict": (result[STRICT], result[STRICT_ERROR]),
    }
    if "sampled" in result:
        sampled = result["sampled"]
        k = sampled["k"]
        bars["mean of k samples"] = (sampled["accuracy"], sampled["accuracy_se"])
        if k > 1:
            bars["maj@k"] = (sampled[f"maj@{k}"], np.nan)
        bars["pass@k"] = (sampled[f"pass@{k}"], np.nan)
    return bars


def draw_comparison(names: list[str], results: list[dict], path: Path) -> bool:
    """Bars of the scores that all runs have. False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (2 + 1.6 * len(names), 4)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    place = np.arange(len(names))
    runs = [bars_of(r) for r in results]
    labels = [label for label in runs[0] if all(label in bars for bars in runs)]
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        values, errors = zip(*(bars[label] for bars in runs))
        shift = (i - (len(labels) - 1) / 2) * width
        axis.bar(place + shift, values, width, yerr=errors, capsize=2, label=label)
    axis.set_xticks(place, names)
    axis.set(ylabel="share of problems", ylim=(0, 1))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    return True
