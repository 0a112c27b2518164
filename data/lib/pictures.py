"""What a person looks at: em.py's tables, and its pictures; report.html shares both.

A row is what em.py keeps of a model (make_row), a summary has a pair (mean,
deviation between seeds) for each figure. `s` are em.py's settings. matplotlib is
imported where it is used; without it there are no pictures.
"""

import html
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.lib.cli import replacing
from data.lib.results import value

# {name: (label, colour, line)}. The colours are Okabe and Ito's, which the
# colour-blind tell apart; where two are alike, their lines differ.
LOOKS = {
    "loop": ("the loop", "#0072B2", "-"),
    "warm_flops": ("warm_flops", "#E69F00", "--"),
    "uniform": ("uniform", "#CC79A7", "-."),
    "gold": ("gold", "#009E73", ":"),
    "raw_flops": ("raw_flops", "#D55E00", "--"),
    "raw_tokens": ("raw_tokens", "#D55E00", ":"),
    "nll_thoughtless_document": ("thoughtless", "#E69F00", "-"),
    "bound_1": ("-ELBO", "#56B4E9", "-"),
    "bound_4": ("IWAE-4", "#0072B2", "--"),
    "bound_16": ("IWAE-16", "#00406B", "-"),
    "e_kept": ("chunks that got a thought", "#CC79A7", "-"),
    "e_right_of_kept": ("of those, the right one", "#009E73", "-"),
    "e_ess": ("effective samples (ESS)", "#0072B2", "-"),
}


class Panel(NamedTuple):
    title: str
    curves: dict  # {look: figure by iteration}
    levels: dict  # {look: (row, its figure)}: one number
    top: float | None = 1.02  # of the axis; None: as high as the numbers


def panels(last: str, k: int) -> list[Panel]:
    """What is drawn of a loop; last: the model of its last iteration; k: samples a chunk."""
    rows = {name: name for name in ("warm_flops", "gold", "raw_flops")}
    rows["uniform"] = f"uniform/{last}"
    found = []
    for key, title in (("accuracy", "greedy"), ("accuracy_sampled", "temperature 1")):
        levels = {look: (name, key) for look, name in rows.items()}
        found.append(Panel(f"held-out accuracy, {title}", {"loop": key}, levels))
    nats = ("nll_thoughtless_document", "bound_1", "bound_4", "bound_16")
    raw = {name: (name, "nll_document") for name in ("raw_tokens", "raw_flops")}
    title = "-log p of answers, nats a document"
    found.append(Panel(title, dict(zip(nats, nats)), raw, None))
    picks = {key: key for key in ("e_kept", "e_right_of_kept")}
    found.append(Panel("the thoughts it was trained on", picks, {}))
    ess = Panel(f"effective samples of K = {k} in the E-step", {"e_ess": "e_ess"}, {}, 1.02 * k)
    return [*found, ess]


def curve(rows: list[dict], names: list[str], key: str) -> tuple[list[int], np.ndarray]:
    """A figure by iteration: where any seed has it, and [seeds, iterations]; nan: no such figure."""
    known = {(r["name"], r["seed"]): value(r, key) for r in rows}
    x = [t for t, m in enumerate(names) if any(v is not None for (n, _), v in known.items() if n == m)]
    lines = [[known.get((names[t], seed)) for t in x] for seed in dict.fromkeys(r["seed"] for r in rows)]
    return x, np.array(lines, dtype=float)


def level(rows: list[dict], name: str, key: str) -> float | None:
    """The mean over seeds of a row's figure."""
    values = [v for r in rows if r["name"] == name and (v := value(r, key)) is not None]
    return float(np.mean(values)) if values else None


def table(rows: list[dict]) -> str:
    """The means over seeds as text, with the standard deviation between seeds where there are several."""
    return align(table_cells(rows))


def table_cells(rows: list[dict]) -> list[list[str]]:
    """The cells of table(), a list for each line; the first names the columns."""

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
    return lines


def test_lines(tests: list[dict], gaps: list[dict]) -> str:
    """The comparisons as text."""
    lines = test_cells(tests, gaps)
    return align(lines) if lines else ""


def test_cells(tests: list[dict], gaps: list[dict]) -> list[list[str]]:
    """The cells of test_lines(), with a header; none where nothing was compared."""
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
    return [header, *lines] if lines else []


def compare_table(rows: list[dict]) -> str:
    """The comparison of methods as text."""
    return align(compare_cells(rows))


def compare_cells(rows: list[dict]) -> list[list[str]]:
    lines = [["", "accuracy", "of each seed", "cut off", "documents", "passes", "tokens", "evaluated"]]
    for r in rows:
        how = ", ".join([r["heldout"], *(f"{k} {v}" for k, v in r["evaluation"].items())])
        of_each = " ".join(f"{a:.3f}" for a in r["accuracies"])
        amounts = [f"{r['documents']:,}", f"{r['passes']:.1f}", f"{r['train_tokens'][0]:,}"]
        lines.append([r["name"], f"{r['accuracy']:.3f}", of_each, f"{r['cut_off']:.3f}", *amounts, how])
    return lines


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
    colors = [LOOKS["loop" if r["name"] == "latent" else "raw_flops"][1] for r in rows]
    axis.bar([r["name"] for r in rows], [r["accuracy"] for r in rows], color=colors)
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
    for axis, panel in zip(axes, panels(names[-1], s.samples)):  # all but the last
        for look, key in panel.curves.items():
            label, color, style = LOOKS[look]
            x, lines = curve(rows, names, key)
            if x:
                axis.plot(x, lines.T, color=color, alpha=0.25, linewidth=0.8)
                mean = np.nanmean(lines, axis=0)
                axis.plot(x, mean, style, color=color, marker="o", linewidth=2, label=label)
        for look, (name, key) in panel.levels.items():
            label, color, style = LOOKS[look]
            if (height := level(rows, name, key)) is not None:
                axis.axhline(height, color=color, linestyle=style, label=label)
        if panel.top:
            axis.set_ylim(0, panel.top)
        axis.set(title=panel.title, xlabel="EM iteration")
        axis.set_xticks(range(len(names)), names)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure


# The same panels as SVG, for report.html, whose style colours the names of LOOKS.
DASHES = {"-": "", "--": "7 4", ":": "2 3", "-.": "8 3 2 3"}
# The axes in a picture of 380 by 224.
LEFT, RIGHT, TOP, BOTTOM = 34, 372, 8, 200


def svg_panel(panel: Panel, rows: list[dict], names: list[str]) -> str:
    """A panel with its numbers on hover; nothing where there are none."""
    curves = {look: curve(rows, names, key) for look, key in panel.curves.items()}
    curves = {look: found for look, found in curves.items() if found[0]}
    levels = {look: level(rows, *of) for look, of in panel.levels.items()}
    levels = {look: height for look, height in levels.items() if height is not None}
    if not curves:
        return ""
    highest = [*levels.values(), *(np.nanmax(lines) for _, lines in curves.values())]
    top = panel.top or 1.02 * max(1, math.ceil(max(highest)))

    def at(v):
        return round(BOTTOM - (BOTTOM - TOP) * v / top, 1)

    parts = []
    for v in np.linspace(0, top / 1.02, 5):
        parts.append(f'<path class="grid" d="M{LEFT} {at(v)}H{RIGHT}"/>')
        parts.append(svg_text(LEFT - 5, at(v) + 4, f"{v:.3g}", "end"))
    step = (RIGHT - LEFT) / len(names)
    places = [LEFT + step * (t + 0.5) for t in range(len(names))]
    for x, name in zip(places, names):
        parts.append(svg_text(x, BOTTOM + 18, name, "middle"))
    for look, height in levels.items():
        said = f"<title>{LOOKS[look][0]}: {height:.3f}</title>"
        line = svg_line(look, f"M{LEFT} {at(height)}H{RIGHT}")
        parts.append(f"<g>{said}{line}</g>")
    for look, (x, lines) in curves.items():
        x = [(places[t], names[t]) for t in x]
        parts += svg_curve(look, x, lines, at)
    keys = []
    for look in [*curves, *levels]:
        line = f'<svg viewBox="0 0 30 10">{svg_line(look, "M0 5H30")}</svg>'
        keys.append(f"<span>{line} {LOOKS[look][0]}</span>")
    return svg_figure(panel.title, 224, parts, keys)


def svg_figure(title: str, height: int, parts: list[str], keys=()) -> str:
    svg = f'<svg viewBox="0 0 380 {height}" role="img">{"".join(parts)}</svg>'
    key = f"<figcaption>{''.join(keys)}</figcaption>" if keys else ""
    return f"<figure><h4>{title}</h4>{svg}{key}</figure>"


def svg_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def svg_line(look: str, d: str, kind: str = "mean") -> str:
    dash = DASHES[LOOKS[look][2]]
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{look} {kind} of" d="{d}"{dash}/>'


def svg_curve(look: str, x: list[tuple], lines: np.ndarray, at) -> list[str]:
    """All seeds as thin lines, their mean as a thick one, deviations as upright ones."""
    found = [of_all[np.isfinite(of_all)] for of_all in lines.T]
    means = [float(values.mean()) for values in found]
    parts = []
    for kind, line in [*(("thin", line) for line in lines), ("mean", means)]:
        pairs = [(a, v) for (a, _), v in zip(x, line) if math.isfinite(v)]
        points = "L".join(f"{a:.1f} {at(v)}" for a, v in pairs)
        parts += [svg_line(look, f"M{points}", kind)] if points else []
    for (a, name), mean, values in zip(x, means, found):
        spread, said = 0.0, f"{LOOKS[look][0]}, {name}: {mean:.3f}"
        if len(values) > 1:
            spread = float(values.std(ddof=1))
            said += f" ±{spread:.3f}, {len(values)} seeds"
        ends = f"M{a:.1f} {at(max(0, mean - spread))}V{at(mean + spread)}"
        place = f'cx="{a:.1f}" cy="{at(mean)}"'
        dots = f'<circle class="{look} dot" {place} r="4"/>'
        dots += f'<circle class="hit" {place} r="14"/>'  # easier to point at
        parts.append(f"<g><title>{said}</title>{svg_line(look, ends, '')}{dots}</g>")
    return parts


def svg_bars(title: str, rows: list[tuple]) -> str:
    """A bar for each (name, accuracy, its deviation between seeds or None)."""
    parts = []
    for n, (name, mean, spread) in enumerate(rows):
        y, width, name = 22 * n, 190 * mean, html.escape(name)
        ours = name[0] == "M" or name == "latent"
        look = "loop" if ours else name.split("/")[0]
        kind = f"{look} block" if look in LOOKS else "fill"
        number = f"{mean:.3f}" + ("" if spread is None else f" ±{spread:.3f}")
        size = f'x="98" y="{y + 4}" width="{width:.1f}" height="14"'
        bar = f'<rect class="{kind}" {size}/>'
        texts = svg_text(92, y + 15, name, "end") + svg_text(102 + width, y + 15, number)
        parts.append(f"<g><title>{name}: {number}</title>{bar}{texts}</g>")
    return svg_figure(title, 22 * len(rows) + 4, parts) if rows else ""
