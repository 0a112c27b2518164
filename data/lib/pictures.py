"""What a person looks at: em.py's tables as text, and its pictures.

A row is what em.py keeps of a model (make_row), a summary has a pair (mean,
deviation between seeds) for each figure. `s` are em.py's settings. matplotlib is
imported where it is used; without it there are no pictures.
"""

from pathlib import Path

import numpy as np

from data.lib.cli import replacing


def value(row: dict, key: str) -> float | None:
    """A row's figure by name; "bound_16" in nats a document."""
    if key.startswith("bound_"):
        return row.get("nll_bound_document", {}).get(key.removeprefix("bound_"))
    return row.get("e_step", {}).get(key.removeprefix("e_")) if key.startswith("e_") else row.get(key)


def table(rows: list[dict]) -> str:
    """The means over seeds as text, with the standard deviation between seeds where there are several."""

    def cell(r, key, digits):
        if key not in r:
            return "-"
        mean, deviation = r[key]
        return f"{mean:.{digits}f}" + ("" if deviation is None else f" ±{deviation:.{digits}f}")

    columns = [
        ("greedy", "accuracy", 3),
        ("sampled", "accuracy_sampled", 3),
        ("raw NLL", "nll_document", 3),
        ("thoughtless", "nll_thoughtless_document", 3),
        ("-ELBO", "bound_1", 3),
        ("IWAE-4", "bound_4", 3),
        ("IWAE-16", "bound_16", 3),
        ("ESS", "ess", 2),
        ("kept", "e_kept", 3),
        ("right of kept", "e_right_of_kept", 3),
    ]
    if any("benchmark" in r for r in rows):
        columns.insert(0, ("benchmark", "benchmark", 3))
    lines = [["", *(title for title, _, _ in columns), "TFLOP", "seconds"]]
    for r in rows:
        ends = [f"{r['flops'][0] / 1e12:.2f}", f"{r['seconds'][0]:.0f}"]
        lines.append([r["name"], *(cell(r, key, digits) for _, key, digits in columns), *ends])
    return align(lines)


def test_lines(tests: list[dict], gaps: list[dict]) -> str:
    """The comparisons as text."""
    lines = []
    shown = [t | {"of": "seeds"} for t in tests if t["n"] > 1]
    shown += [g | {"figure": "nats a document"} for g in gaps]
    names = {"accuracy": "greedy", "accuracy_sampled": "sampled"}
    for t in shown:
        spread = "" if t["se"] is None else f" ±{t['se']:.3f}"
        figure, difference = names.get(t["figure"], t["figure"]), f"{t['difference']:+.3f}{spread}"
        above = f"{t['above']} of {t['n']} {t['of']}"
        lines.append([f"{t['a']} - {t['b']}", figure, difference, above, f"{t['p']:.4f}"])
    header = ["paired", "", "difference ± standard error", "above 0", "p (sign flips)"]
    return align([header, *lines]) if lines else ""


def compare_table(rows: list[dict]) -> str:
    """The comparison of methods as text."""
    lines = [["", "accuracy", "of each seed", "cut off", "documents", "passes", "tokens", "evaluated"]]
    for r in rows:
        how = ", ".join([r["heldout"], *(f"{k} {v}" for k, v in r["evaluation"].items())])
        of_each = " ".join(f"{a:.3f}" for a in r["accuracies"])
        amounts = [f"{r['documents']:,}", f"{r['passes']:.1f}", f"{r['train_tokens'][0]:,}"]
        lines.append([r["name"], f"{r['accuracy']:.3f}", of_each, f"{r['cut_off']:.3f}", *amounts, how])
    return align(lines)


def align(lines: list[list[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    out = []
    for line in lines:
        cells = [line[0].ljust(first), *(cell.rjust(w) for cell, w in zip(line[1:], others))]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def plot(rows: list[dict], path: Path, s) -> bool:
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


def plot_compare(rows: list[dict], plt, s):
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.bar([r["name"] for r in rows], [r["accuracy"] for r in rows], color=["C3", "C3", "C1", "C1", "C0"])
    for i, r in enumerate(rows):
        axis.plot([i] * len(r["accuracies"]), r["accuracies"], "k.")
        at = (i, r["accuracy"])
        axis.annotate(f"{r['accuracy']:.2f}", at, (0, 8), textcoords="offset points", ha="center")
    title = f"held-out accuracy after {s.tokens:,} training tokens, {s.seeds} seeds (dots)"
    axis.set(title=title, ylim=(0, 1.1))
    axis.grid(axis="y", alpha=0.3)
    return figure


def plot_loop(rows: list[dict], plt, s):
    """All seeds as thin lines, their mean as a thick one; the controls' means as marks behind the last
    iteration."""
    names = [f"M{t}" for t in range(s.iterations + 1)]
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")

    def curve(axis, key, color, label):
        known = {(r["name"], r["seed"]): value(r, key) for r in rows}
        x = [t for t, m in enumerate(names) if any(v is not None for (n, _), v in known.items() if n == m)]
        lines = [[known.get((names[t], seed)) for t in x] for seed in dict.fromkeys(r["seed"] for r in rows)]
        lines = np.array(lines, dtype=float)  # [seeds, iterations]; nan: no such figure
        if x:
            for line in lines:
                axis.plot(x, line, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(x, np.nanmean(lines, axis=0), color=color, marker="o", linewidth=2, label=label)

    def level(axis, name, key, color, style):
        values = [v for r in rows if r["name"] == name and (v := value(r, key)) is not None]
        if values:
            label = name.split("/")[0] + (": NLL" if "nll" in key else "")
            axis.axhline(np.mean(values), color=color, linestyle=style, label=label)

    for axis, key, title in ((axes[0], "accuracy", "greedy"), (axes[1], "accuracy_sampled", "temperature 1")):
        curve(axis, key, "C0", "the loop")
        level(axis, "warm_flops", key, "C1", "--")
        level(axis, f"uniform/M{s.iterations}", key, "C4", "-.")
        level(axis, "gold", key, "C2", ":")
        level(axis, "raw_flops", key, "C3", "--")
        axis.set(title=f"held-out accuracy, {title}", ylim=(0, 1.02))
    curve(axes[2], "nll_thoughtless_document", "C1", "thoughtless")
    curve(axes[2], "bound_1", "#9ecae1", "-ELBO")
    curve(axes[2], "bound_4", "#4292c6", "IWAE-4")
    curve(axes[2], "bound_16", "#084594", "IWAE-16")
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
