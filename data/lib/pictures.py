"""What a person looks at: tables and pictures of em.py and report.html.

Rows and summaries: see results.py. `s` are em.py's settings. Without matplotlib
there are no pictures.
"""

import html
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.lib.cli import replacing
from data.lib.results import COLUMNS, summarise, unit_of, value

# {figure or row: (label, colour, line)}: Okabe and Ito's colours, for the
# colour-blind; where two are alike, their lines differ.
LOOKS = {
    "accuracy": ("the loop", "#0072B2", "-"),
    "accuracy_sampled": ("the loop", "#0072B2", "-"),
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
    "ess": ("effective samples (ESS)", "#0072B2", "-"),
}


class Panel(NamedTuple):
    title: str
    curves: tuple  # figures by iteration
    levels: dict  # {row: figure}: one number


def panels(last: str, k: int, unit: str) -> list[Panel]:
    """What is drawn of a loop; last: its last model; k: thoughts a chunk; unit: of likelihoods."""
    controls = "warm_flops", f"uniform/{last}", "gold", "raw_flops"
    names = {"accuracy": "greedy", "accuracy_sampled": "temperature 1"}
    found = []
    for key, how in names.items():
        levels = dict.fromkeys(controls, key)
        found.append(Panel(f"held-out accuracy, {how}", (key,), levels))
    nats = "nll_thoughtless_document", "bound_1", "bound_4", "bound_16"
    raw = dict.fromkeys(("raw_tokens", "raw_flops"), "nll_document")
    picks = "e_kept", "e_right_of_kept"
    return [
        *found,
        Panel(f"-log p, nats a {unit}", nats, raw),
        Panel("the thoughts it was trained on", picks, {}),
        Panel(f"effective samples of K = {k}", ("ess",), {}),
    ]


def numbers(panel: Panel, rows: list[dict], names: list[str]) -> tuple[dict, dict]:
    """({look: a curve}, {look: a level}), without what no row has.

    A curve: ([(iteration, value)] of each seed, [(iteration, mean, deviation)]).
    """
    known = {row["name"]: row for row in summarise(rows)}
    curves, levels = {}, {}
    for key in panel.curves:
        able = [t for t, name in enumerate(names) if key in known[name]]
        lines = {}
        for row in rows:
            if row["name"] in names and (v := value(row, key)) is not None:
                point = names.index(row["name"]), v
                lines.setdefault(row["seed"], []).append(point)
        if able:
            means = [(t, *known[names[t]][key]) for t in able]
            curves[key] = lines.values(), means
    for name, key in panel.levels.items():
        if key in known.get(name, {}):
            levels[name.split("/")[0]] = known[name][key][0]
    return curves, levels


def top_of(curves: dict, levels: dict) -> float:
    """Height of an axis: a bit above a round number that holds all."""
    lines = [line for lines, _ in curves.values() for line in lines]
    most = max([0.01, *levels.values(), *(v for line in lines for _, v in line)])
    power = 10 ** math.floor(math.log10(most))
    steps = (n * power for n in (1, 2, 3, 4, 6, 8, 10))
    return 1.02 * next(step for step in steps if step >= most)


def spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f}" + ("" if deviation is None else f" ±{deviation:.3f}")


def table_cells(rows: list[dict]) -> list[list[str]]:
    """The means over seeds, ± the deviation between them, under a header."""
    columns = {
        t: key for t, key in COLUMNS.items() if any(key in r for r in rows)
    }
    lines = [[f"nats a {unit_of(rows)}", *columns, "TFLOP", "seconds"]]
    for r in rows:
        cells = [
            spread(*r[key]) if key in r else "-" for key in columns.values()
        ]
        cells += [f"{r['flops'][0] / 1e12:.2f}", f"{r['seconds'][0]:.0f}"]
        lines.append([r["name"], *cells])
    return lines


def test_cells(tests: list[dict], gaps: list[dict]) -> list[list[str]]:
    """The comparisons under a header; nothing where nothing was compared."""
    titles = {figure: title for title, figure in COLUMNS.items()}
    titles["bound_16"] = "IWAE-16, nats a document"
    lines = ["paired,,difference ± standard error,above 0,p (sign flips)".split(",")]
    for t in [*(t for t in tests if t["n"] > 1), *gaps]:
        error = "" if t["se"] is None else f" ±{t['se']:.3f}"
        above = f"{t['above']} of {t['n']} {t.get('of', 'seeds')}"
        cells = f"{t['difference']:+.3f}{error}", above, f"{t['p']:.4f}"
        figure = titles.get(t.get("figure"), "nats a document")
        lines.append([f"{t['a']} - {t['b']}", figure, *cells])
    return lines if lines[1:] else []


def compare_cells(rows: list[dict]) -> list[list[str]]:
    """The comparison of methods."""
    titles = (
        "accuracy, of each seed, cut off, documents, passes, tokens, evaluated"
    )
    lines = [["", *titles.split(", ")]]
    for r in rows:
        how = [r["heldout"], *(f"{k} {v}" for k, v in r["evaluation"].items())]
        seeds = " ".join(f"{a:.3f}" for a in r["accuracies"])
        shares = f"{r['accuracy']:.3f}", seeds, f"{r['cut_off']:.3f}"
        tokens = f"{r['train_tokens'][0]:,}"
        amounts = f"{r['documents']:,}", f"{r['passes']:.1f}", tokens
        lines.append([r["name"], *shares, *amounts, ", ".join(how)])
    return lines


def align(lines: list[list[str]]) -> str:
    """Columns of equal width, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    out = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[0] = line[0].ljust(widths[0])
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def plot(rows: list[dict], path: Path, s) -> bool:
    """curves.png of a loop, or compare.png; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7 if s.compare else 15, 4), layout="constrained")
    (plot_compare if s.compare else plot_loop)(figure, rows, s)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return True


def plot_compare(figure, rows: list[dict], s) -> None:
    axis = figure.subplots()
    bars = axis.bar([r["name"] for r in rows], [r["accuracy"] for r in rows])
    axis.bar_label(bars, fmt="%.2f", padding=6)
    for i, r in enumerate(rows):
        axis.plot([i] * len(r["accuracies"]), r["accuracies"], "k.")
    title = f"accuracy after {s.tokens:,} tokens, {s.seeds} seeds (dots)"
    axis.set(title=title, ylim=(0, 1.1))
    axis.grid(axis="y", alpha=0.3)


def plot_loop(figure, rows: list[dict], s) -> None:
    """Seeds as thin lines, means as thick ones, controls as levels."""
    names = [f"M{t}" for t in range(s.iterations + 1)]
    drawn = panels(names[-1], s.samples, unit_of(rows))[:-1]
    for axis, panel in zip(figure.subplots(1, len(drawn)), drawn):
        curves, levels = numbers(panel, rows, names)
        for look, (lines, means) in curves.items():
            label, color, style = LOOKS[look]
            for line in lines:
                axis.plot(*zip(*line), color=color, alpha=0.25, linewidth=0.8)
            x, y, _ = zip(*means)
            how = {"marker": "o", "linewidth": 2, "label": label}
            axis.plot(x, y, style, color=color, **how)
        for look, height in levels.items():
            label, color, style = LOOKS[look]
            axis.axhline(height, color=color, linestyle=style, label=label)
        top = top_of(curves, levels)
        axis.set(title=panel.title, xlabel="EM iteration", ylim=(0, top))
        axis.set_xticks(range(len(names)), names)
        axis.grid(alpha=0.3)
        if curves or levels:
            axis.legend(fontsize=7)


# The same panels as SVG, for report.html, whose style has a class for each look.
# The axes in a picture of 380 by 224:
LEFT, RIGHT, TOP, BOTTOM = 34, 372, 8, 200


def svg_panel(panel: Panel, rows: list[dict], names: list[str]) -> str:
    """A panel with its numbers on hover; nothing where there are none."""
    curves, levels = numbers(panel, rows, names)
    if not curves:
        return ""
    top = top_of(curves, levels)

    def at(t, v):  # the place of a value of iteration t
        x = LEFT + (RIGHT - LEFT) * (t + 0.5) / len(names)
        return x, BOTTOM - (BOTTOM - TOP) * max(v, 0) / top

    def level(look, v):
        return svg_line(look, at(-0.5, v), at(len(names) - 0.5, v))

    parts = []
    for v in np.linspace(0, top / 1.02, 5):
        parts.append(level("grid", v))
        parts.append(svg_text(LEFT - 5, at(0, v)[1] + 4, f"{v:.3g}", "end"))
    for t, name in enumerate(names):
        parts.append(svg_text(at(t, 0)[0], BOTTOM + 18, name, "middle"))
    for look, v in levels.items():
        parts.append(hover(f"{LOOKS[look][0]}: {v:.3f}", level(look, v)))
    for look, (lines, means) in curves.items():
        for line in lines:
            parts.append(svg_line(f"{look} thin", *(at(*point) for point in line)))
        parts.append(svg_line(look, *(at(t, mean) for t, mean, _ in means)))
        for t, mean, deviation in means:
            (x, y), d = at(t, mean), deviation or 0
            mark = svg_line(look, at(t, mean - d), at(t, mean + d))
            mark += f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
            said = f"{LOOKS[look][0]}, {names[t]}: {spread(mean, deviation)}"
            parts.append(hover(said, mark))
    return svg_figure(panel.title, 224, parts, [*curves, *levels])


def svg_bars(title: str, bars: dict) -> str:
    """A bar for each {name: (accuracy, deviation or None)}."""
    parts = []
    for n, (name, figure) in enumerate(bars.items()):
        y, end = 22 * n + 11, 98 + 190 * figure[0]
        look = "accuracy" if name[0] == "M" else name.split("/")[0]
        bar = svg_line(f"{look} bar", (98, y), (end, y))
        bar += svg_text(92, y + 4, name, "end")
        bar += svg_text(end + 4, y + 4, spread(*figure))
        parts.append(hover(f"{name}: {spread(*figure)}", bar))
    return svg_figure(title, 22 * len(bars), parts) if bars else ""


def svg_figure(title: str, height: int, parts: list[str], looks=()) -> str:
    keys = ""
    for look in looks:
        line = svg_line(look, (0, 5), (30, 5))
        keys += f'<span><svg viewBox="0 0 30 10">{line}</svg> {LOOKS[look][0]}</span>'
    svg = f'<svg viewBox="0 0 380 {height}">{"".join(parts)}</svg>'
    return f"<figure><h4>{title}</h4>{svg}<figcaption>{keys}</figcaption></figure>"


def svg_line(kind: str, *points: tuple[float, float]) -> str:
    d = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{html.escape(kind)}" d="M{d}"/>'


def svg_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {at}>{html.escape(text)}</text>"


def hover(said: str, mark: str) -> str:
    return f"<g><title>{html.escape(said)}</title>{mark}</g>"
