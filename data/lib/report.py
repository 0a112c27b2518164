"""report.html: what a run, or an E-step, did and thought, for a browser.

A page is one file that asks nothing of any network. Text of corpora and models is
data: legible() escapes it, and the page's policy lets only the script below run.
torch is not imported.
"""

import base64
import hashlib
import html
import json
import unicodedata
from pathlib import Path

import numpy as np

from data.lib.cli import read_json, replacing
from data.lib.corpus import POSTERIOR, PRIOR, Corpus, open_corpus, open_thoughts
from data.lib.pictures import (
    LOOKS,
    compare_cells,
    panels,
    svg_bars,
    svg_panel,
    table_cells,
    test_cells,
)
from data.lib.results import stage_notes, summarise, unit_of
from data.lib.sources import read_jsonl
from data.lib.thoughts_report import (
    LONGEST,
    Round,
    as_trained,
    read_rounds,
    worth_a_look,
)

MOST = 1_000_000  # bytes of a page
CHUNKS = 30, 15, 5, 1  # the first that fits, of 50 n characters a text

CSS = """
:root{color-scheme:light dark;
 --accent:light-dark(#0072b2,#62a8d1);
 --dim:color-mix(in srgb,CanvasText 66%,Canvas);
 --line:color-mix(in srgb,CanvasText 18%,Canvas)}
body{max-width:1560px;margin:auto;padding:0 12px;
 font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h4,p,figure{margin:.4em 0}
section>p{max-width:80ch}
i,small,figcaption{color:var(--dim);font-size:.8em}
nav *,small span,figcaption span{margin-right:.8em;white-space:nowrap}
nav{position:sticky;top:0;padding:6px 0;background:Canvas}
input,progress{accent-color:var(--accent)}
progress{width:4em}
.many{display:grid;gap:16px;
 grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr))}
.card{border:1px solid var(--line);border-radius:8px;padding:10px}
bdi,.seq{white-space:pre-wrap}
.k{padding-left:6px;border-left:4px solid transparent}
.pick{border-color:var(--accent)}
svg{display:block;width:100%}
figcaption svg{display:inline;width:30px}
text{fill:CanvasText;font:12px system-ui,sans-serif}
path{fill:none;stroke:var(--c,var(--dim));stroke-width:2.5}
circle{fill:var(--c);stroke:transparent;stroke-width:20}
.grid{stroke:var(--line);stroke-width:1}
.thin{stroke-width:1;opacity:.4}
.bar{stroke-width:14;stroke-dasharray:none}
.scroll{overflow-x:auto;margin:1em 0}
td,th{padding:2px 9px;white-space:nowrap;text-align:right;
 border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}
.seq{font:15px/1.9 ui-monospace,monospace}
.seq span{padding:2px 0;margin-right:1px}
.m{color:Canvas;background:CanvasText}
.u{border-bottom:3px solid var(--accent)}
@media screen and (prefers-color-scheme:dark){svg{filter:brightness(1.6)}}
@media print{:root{color-scheme:light}nav{position:static}
 *{print-color-adjust:exact}.round[hidden]{display:block}}
"""
JS = """
const slider = document.querySelector("input");
function show() {
  for (const round of document.querySelectorAll(".round"))
    round.hidden = round.dataset.t !== slider.value;
}
if (slider) show(slider.oninput = show);
"""
DASHES = {"-": "none", "--": "7 4", ":": "2 3", "-.": "8 3 2 3"}
for n in range(6):
    CSS = f".s{n}{{background:rgba(213,94,0,{0.15 * n:.2f})}}{CSS}"
for look, (_, colour, line) in LOOKS.items():
    CSS = f".{look}{{--c:{colour};stroke-dasharray:{DASHES[line]}}}{CSS}"
HASH = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
POLICY = "default-src 'none'; style-src 'unsafe-inline'; "
POLICY += f"script-src 'sha256-{HASH}'"


def page(title: str, parts: dict, n_rounds: int) -> str:
    """A file of parts {name: (title, content)}; a slider chooses the round."""
    title, links, content = legible(title), "", ""
    for name, (heading, text) in parts.items():
        links += f'<a href="#{name}">{name}</a>'
        content += f'<section id="{name}"><h2>{legible(heading)}</h2>{text}</section>'
    if n_rounds > 1:
        links += f'round <input type="range" max="{n_rounds - 1}" value="0">'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width">
<title>{title}</title><style>{CSS}</style></head>
<body><h1>{title}</h1><nav>{links}</nav>{content}
<script>{JS}</script></body></html>
"""


def legible(text: str) -> str:
    """Escaped; what is not seen, or turns text around, gives its number."""
    seen = []
    for c in text:
        odd = " " if unicodedata.category(c) == "Zs" else f"‹U+{ord(c):04X}›"
        seen.append(c if c.isprintable() or c in "\n\t" else odd)
    return html.escape("".join(seen))


def piece(tok, ids, most: int) -> str:
    """`most` characters of a text, in an element of its own."""
    text, more = tok.decode(ids[:most], first=False), ""
    if max(len(text), len(ids)) > most:
        more = f"<i> … of {len(ids):,} tokens in all</i>"
    return f"<bdi>{legible(text[:most].strip())}</bdi>{more}"


def html_table(lines: list[list[str]]) -> str:
    """Cells of text, of which the first line is the header."""
    rows = ""
    for cell, line in zip(["th", *["td"] * len(lines)], lines):
        cells = (f"<{cell}>{legible(text)}</{cell}>" for text in line)
        rows += f"<tr>{''.join(cells)}</tr>"
    return f'<div class="scroll"><table>{rows}</table></div>'


def result(results: dict) -> str:
    """Part 1: pictures, and their numbers in tables."""
    rows, config = results["rows"], results["config"]
    if config["compare"]:
        charts, tables = [], [compare_cells(rows)]
    else:
        names = [f"M{t}" for t in range(config["iterations"] + 1)]
        drawn = panels(names[-1], config["samples"], unit_of(rows))
        charts = [svg_panel(panel, rows, names) for panel in drawn]
        summary, gaps = summarise(rows), results["likelihood"]
        bars = {r["name"]: r["accuracy"] for r in summary if "accuracy" in r}
        charts.append(svg_bars("greedy accuracy of all models", bars))
        tables = [table_cells(summary), test_cells(results["tests"], gaps)]
    tables = "".join(map(html_table, tables))
    return f'{ABOUT_RESULT}<div class="many">{"".join(charts)}</div>{tables}'


ABOUT_RESULT = """<p>Means over seeds (thin lines), ± the deviation between them.
Point at a mark for its number.</p>"""
ABOUT_THOUGHTS = """<p>Thoughts that the model drew when it had read a text.
Bars are their weights p(thought, text) / q(thought | text) as shares; gain is by how
many nats a thought makes its text likelier.</p>"""
ABOUT_SEQUENCE = """<p>Document {} as training sees it, with the picked thoughts:
<span class="m">markers</span>; <span class="u">what log p or log q adds up</span>;
darker tokens were less likely, a shade a nat.</p>"""


def in_rounds(contents) -> str:
    begin = '<div class="round" data-t='
    return "".join(f'{begin}"{t}">{x}</div>' for t, x in enumerate(contents))


def card(corpus: Corpus, rounds: list[Round], truth, i: int, most: int) -> str:
    """A chunk with its context and the thoughts of each round."""
    tok, true = corpus.tokenizer, truth.span(i) if truth else ()
    shown = [("given", corpus.chunk(j)) for j in corpus.before(i, 3)]
    shown += [("text", corpus.chunk(i)), ("true thought", true)]
    lines = ""
    for name, ids in shown:
        if len(ids):
            lines += f"<p><small>{name}</small> {piece(tok, ids, most)}</p>"
    lines += in_rounds(one_round(tok, r, true, i, most) for r in rounds)
    return f'<article class="card"><h4>chunk {i}</h4>{lines}</article>'


def one_round(tok, r: Round, true, i: int, most: int) -> str:
    """The thoughts of chunk i in a round, the heaviest first."""
    s, name = r.samples.get(i), legible(r.thoughts.folder.name)
    if not s:  # a teacher's, which nobody has weighed
        return f"<h4>{name}</h4>{piece(tok, r.thoughts.span(i), most)}"
    w = np.exp(s["log_w"] - max(s["log_w"].max(), -1e300))  # all can be -inf
    w /= max(w.sum(), 1e-300)
    ess = w.sum() / max((w**2).sum(), 1e-300)
    said = f"ESS {ess:.2f} of {len(w)}, no thought: log p {s['log_none']:z.2f}"
    lines = f"<h4>{name} <small>{said}</small></h4>"
    for k in np.argsort(-w, kind="stable"):
        pick, ids = " pick" * bool(k == s["pick"]), s["thoughts"][k]
        tags = "<b>picked</b> " if pick else ""
        tags += "<b>true</b> " * (len(true) > 0 and np.array_equal(ids, true))
        tags += "" if s["finished"][k] else "<b>cut off</b> "
        figures = {key: s[key][k] for key in ("log_q", "log_p", "log_w")}
        figures["gain"] = s["log_x"][k] - s["log_none"]
        said = [f"<span>{key} {x:z.2f}</span>" for key, x in figures.items()]
        bar = f'<progress value="{w[k]:.3f}"></progress> <b>{w[k]:.3f}</b>'
        small = f"<small>{' '.join([bar, *said])}</small>"
        lines += f'<div class="k{pick}">{piece(tok, ids, most)} {tags}<br>{small}</div>'
    return lines


def sequence(corpus: Corpus, rounds: list[Round], d: int, most: int) -> str:
    """Part 3: document d in both forms."""
    text = ABOUT_SEQUENCE.format(d)
    forms = {
        PRIOR: "Prior: think, then write",
        POSTERIOR: "Posterior: read, recover",
    }
    for form, title in forms.items():
        contents = (in_tokens(corpus, r, d, form, most) for r in rounds)
        text += f"<h3>{title}</h3>{in_rounds(contents)}"
    return text


def in_tokens(corpus: Corpus, r: Round, d: int, form: int, most: int) -> str:
    """A document in a form, its tokens shaded by their log-probabilities."""
    tok, log_p = corpus.tokenizer, r.log_p.get((d, form), ())
    markers = ("bos", "eos", "sol", "eol", "pri", "pos")
    names = {getattr(tok, name): name.upper() for name in markers}
    ids, parts = as_trained(corpus, d, r.thoughts.span, form)
    scored, total, spans = set(), 0.0, ""
    for part in parts:
        scored |= set(range(*part.thought))
        if form == PRIOR and part.thought[1]:
            scored |= set(range(*part.chunk))
    for n, token in enumerate(ids[:most].tolist()):
        kinds, hover = "m" * (token in names) + " u" * (n in scored), ""
        if 0 < n <= len(log_p):
            x = float(log_p[n - 1])
            kinds += f" s{min(5, round(-x))}"
            hover = f' title="log p {x:z.2f}"'
            total += x if n in scored else 0
        text = tok.pieces.get(token, b"?").decode("utf-8", "replace")
        text = names.get(token) or legible(text).replace("\n", "↵\n")
        spans += f'<span class="{kinds}"{hover}>{text}</span>'
    which = "log p" if form == PRIOR else "log q"
    said = f"{which} {total:z.2f}" if len(log_p) else ""
    said += " of what is shown" * (len(ids) > most and len(log_p) > 0)
    title = f"{legible(r.thoughts.folder.name)} <small>{said}</small>"
    cut = "<i> … cut off here</i>" * (len(ids) > most)
    return f'<h4>{title}</h4><p class="seq">{spans}{cut}</p>'


def what_ran(out_dir: Path, folder: Path, config: dict) -> str:
    """Part 4: settings, runs, the stages of one seed."""
    path, text = out_dir / "runs.jsonl", ""
    runs = read_jsonl(str(path), json.loads, True) if path.exists() else []
    notes = [("settings", config, ""), *(("run", run, "") for run in runs)]
    for name, said, command in notes + stage_notes(folder):
        shown = ", ".join(f"{key} {x}" for key, x in said.items() if x != "")
        text += f"<p><b>{legible(name)}</b> {legible(shown)}"
        text += f"<br><small>{legible(command)}</small></p>"
    return text


def write_page(
    path: Path, title: str, corpus, folders, first=(), last=()
) -> None:
    """Parts 2 and 3 between `first` and `last`, as much as a page holds."""
    for n in CHUNKS:
        parts = dict(first)
        if folders:
            parts |= thoughts_parts(corpus, folders, n, 50 * n)
        text = page(title, parts | dict(last), len(folders))
        if len(text.encode()) <= MOST:
            break
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def thoughts_parts(corpus: Corpus, folders, n: int, most: int) -> dict:
    """Parts 2 and 3, with n chunks and `most` characters of a text."""
    chunks, rounds = read_rounds(corpus, folders)
    known, text = Path(f"{corpus.folder}_truth"), ABOUT_THOUGHTS
    truth = open_thoughts(known, corpus) if known.exists() else None
    for why, some in worth_a_look(chunks, rounds, n).items():
        cards = "".join(card(corpus, rounds, truth, i, most) for i in some)
        text += (
            f'<h3>{len(some)} chunks: {why}</h3><div class="many">{cards}</div>'
        )
    # The one with the longest thoughts, of those with shades if any.
    begins = rounds[-1].thoughts.chunks[corpus.docs]
    able = {d for d, _ in rounds[-1].log_p} or {
        corpus.doc_of(i) for i in chunks
    }
    d = max(sorted(able), key=np.diff(begins).item, default=0)
    tokens = sequence(corpus, rounds, d, min(most, LONGEST))
    return {
        "thoughts": ("Thoughts", text),
        "sequence": ("One sequence", tokens),
    }


def write_report(out_dir: Path) -> Path:
    """RUN/report.html; UserError where it is no run of em.py's."""
    compare = (out_dir / "compare.json").exists()
    results = read_json(
        out_dir / ("compare.json" if compare else "results.json")
    )
    config, folder, corpus, e_steps = results["config"], out_dir, None, []
    if not compare:
        folder = out_dir / f"seed{config['seed']}"
        corpus = open_corpus(Path(config["corpus"] or folder / "data") / "raw")
        e_steps = [folder / f"E{t}" for t in range(1, config["iterations"] + 1)]
    first = {"result": ("Result", result(results))}
    last = {
        "ran": (f"What ran: {folder.name}", what_ran(out_dir, folder, config))
    }
    title = f"Latent thoughts: {out_dir.resolve().name}"
    path = out_dir / "report.html"
    write_page(path, title, corpus, e_steps, first, last)
    return path
