"""report.html: what a run, or an E-step, did and thought, for people with a browser.

A page is one file that asks nothing of any network. Text of corpora and models is
data: legible() escapes all of it, and the page's policy lets no script run but the
one below. The numbers are those of the files that the stages wrote; no model is run
and torch is not imported. What only an E-step knows is in its shown.npz
(data/lib/thoughts_report.py); where that is missing, the page says so.
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
from data.lib.pictures import LOOKS, compare_cells, panels, svg_bars, svg_panel, table_cells, test_cells
from data.lib.results import stage_cells
from data.lib.sources import read_jsonl
from data.lib.thoughts_report import LONGEST, Round, as_trained, read_rounds, worth_a_look

MOST = 1_000_000  # bytes of a page
# Chunks, and characters of a text or tokens of a sequence: the first that fit a page.
SIZES = (30, 1500), (30, 500), (15, 300), (6, 150), (2, 50), (1, 20)
THOUGHTS, CELL = 16, 2000  # the heaviest of a chunk; characters of a table's cell

# --------------------------------------------------------------------------------------------- the page

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1e23;--dim:#5b6470;
 --line:#d5dae0;--card:#f6f8fa}
body{margin:0 auto;max-width:1560px;padding:12px;background:var(--bg);
 color:var(--fg);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5em}h2{margin:1.6em 0 .3em;border-bottom:2px solid var(--line)}
h4,h5,p,figure{margin:.3em 0}h5,figcaption{font-size:.9em}
.dim,i,figcaption,.ask,.label,.n{color:var(--dim);font-weight:400}
nav a,.n span,.label,figcaption span{white-space:nowrap;margin-right:.8em}
a{color:var(--loop)}.lead{max-width:75ch}.label,.n{font-size:.78em}
.charts,.cards{display:grid;gap:16px;
 grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr))}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(620px,100%),1fr))}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--fg);font:12px system-ui,sans-serif}
.grid{stroke:var(--line)}.of{fill:none}.hit{fill:transparent;stroke:none}
.thin{opacity:.35}.mean{stroke-width:2.5}
figcaption svg{display:inline;width:30px;height:10px}
.scroll{overflow-x:auto;margin:1em 0}
table{border-collapse:collapse;font-size:.9em}
th,td{padding:2px 9px;text-align:right;vertical-align:top;
 border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child,.stages :is(th,td){text-align:left}
.stages td:last-child{min-width:420px;white-space:normal;
 font:.8em ui-monospace,monospace}
.card{background:var(--card);border:1px solid var(--line);
 border-radius:8px;padding:10px;overflow:hidden}
.piece,.seq{white-space:pre-wrap}table,.n,.w{font-variant-numeric:tabular-nums}
.k{display:grid;grid-template-columns:4em 1fr;gap:0 10px;
 padding:3px 6px;border-left:4px solid transparent}
.pick{border-color:var(--loop);background:var(--bg)}
.n{grid-column:2}.w{font-size:.85em}.bar{height:9px}
.track{fill:var(--line)}.fill{fill:var(--dim)}.pick .fill{fill:var(--loop)}
b.tag{color:var(--fg);border:2px solid var(--gold);border-radius:5px;padding:0 .3em}
b.loop{border-color:var(--loop)}
.slide{position:sticky;top:0;background:var(--bg);padding:8px 0;
 display:flex;gap:12px}
.slide input{flex:1;max-width:320px;accent-color:var(--loop)}
.seq{font:15px/1.3 ui-monospace,monospace}output{font-weight:600}
.seq span{padding:2px 0;margin:0 1px 5px 0;display:inline-block}
.seq .m{color:var(--bg);background:var(--fg);font-size:.8em;padding:3px 4px}
.seq .u{border-bottom:3px solid var(--loop)}
@media(min-width:1000px){.k{grid-template-columns:4em 1fr auto}
 .n{grid-column:auto;text-align:right}}
@media(max-width:700px){.stages td:last-child{white-space:nowrap}}
@media print{.slide{display:none}*{print-color-adjust:exact}
 .round[hidden]{display:block!important}.card,figure{break-inside:avoid}}
"""
JS = """
function show(t) {
  for (const round of document.querySelectorAll(".round")) round.hidden = round.dataset.t !== t;
  for (const slider of document.querySelectorAll("input")) {
    slider.value = t;
    slider.nextSibling.textContent = slider.dataset["name" + t];
    slider.oninput = () => show(slider.value);
  }
}
if (document.querySelector("input")) show("0");
"""
DARK = "--bg:#14171b;--fg:#e8eaed;--dim:#a3acb8;--line:#363c45;--card:#1c2026;"
SHADES = (0.1, 0.5, 1.5, 3, 6)  # nats of -log p, from which on a token is darker


def style() -> str:
    """The CSS, and a class for each of LOOKS and SHADES; on black colours are lighter."""
    rules, light, dark = "", "", DARK
    for n in range(1, len(SHADES) + 1):
        rules += f".s{n}{{background:rgba(213,94,0,{0.15 * n:.2f})}}"
    for name, (_, colour, _) in LOOKS.items():
        light += f"--{name}:{colour};"
        dark += f"--{name}:color-mix(in srgb,{colour} 62%,#fff);"
        rules += f".{name}{{stroke:var(--{name});color:var(--{name})}}"
        rules += f".{name}.dot,.{name}.block{{fill:var(--{name})}}"
    on_black = "@media screen and (prefers-color-scheme:dark)"
    return f"{CSS}:root{{{light}}}{on_black}{{:root{{{dark}}}}}{rules}"


def hash_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def page(title: str, content: str) -> str:
    """A whole file. Its policy allows the script and the style alone, by their hashes."""
    css, title, links = style(), legible(title), ""
    policy = f"default-src 'none'; style-src {hash_of(css)}; "
    policy += f"script-src {hash_of(JS)}; base-uri 'none'; form-action 'none'"
    for name in ("result", "thoughts", "sequence", "ran"):
        if f'id="{name}"' in content:
            links += f'<a href="#{name}">{name}</a>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{css}</style></head><body>"
        f"<h1>{title}</h1><nav>{links}</nav>{content}"
        f"<script>{JS}</script></body></html>\n"
    )


def section(name: str, title: str, *content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{"".join(content)}</section>'


def number(x: float) -> str:
    return f"{round(x, 2) + 0:.2f}".replace("-", "−")  # never -0.00


def legible(text: str) -> str:
    """Escaped text; what is not seen, or turns the text around, gives its number."""
    seen = []
    for c in text:
        odd = " " if unicodedata.category(c) == "Zs" else f"‹U+{ord(c):04X}›"
        seen.append(c if c.isprintable() or c in "\n\t" else odd)
    return html.escape("".join(seen))


def piece(tok, ids, most: int, kind: str = "") -> str:
    """Text of a corpus or a model in an element of its own, `most` characters of it."""
    text, more = tok.decode(ids[:most], first=False), ""
    if max(len(text), len(ids)) > most:
        more = f"<i> … cut off here; {len(ids):,} tokens in all</i>"
    text = legible(text[:most].strip())
    return f'<bdi class="piece {kind}">{text}</bdi>{more}'


def html_table(lines: list[list[str]], kind: str = "") -> str:
    """Cells of text, of which the first line is the header."""
    rows = ""
    for cell, line in zip(["th", *["td"] * len(lines)], lines):
        cells = (f"<{cell}>{legible(text[:CELL])}</{cell}>" for text in line)
        rows += f"<tr>{''.join(cells)}</tr>"
    return f'<div class="scroll"><table class="{kind}">{rows}</table></div>'


# ------------------------------------------------------------------------------------------- the result


def result(results: dict) -> str:
    """Part 1: pictures, and their numbers in tables."""
    rows, config = results["rows"], results["config"]
    if config.get("compare"):
        bars = [(r["name"], r["accuracy"], None) for r in rows]
        charts = [svg_bars("held-out accuracy", bars)]
        said, tables = "Accuracies are means over seeds.", [compare_cells(rows)]
    else:
        charts = loop_charts(rows, results["summary"], config)
        n = len({row["seed"] for row in rows})
        several = f"Means of {n} seeds (thin lines) ± deviation between them."
        said = several if n > 1 else "One seed."
        if nats := results.get("rules_nats_document"):
            said += " Under the corpus's own rules the scored answers have "
            said += f"{nats:.3f} nats a document."
        tests = results.get("tests", []), results.get("likelihood", [])
        tables = [table_cells(results["summary"]), test_cells(*tests)]
    said = f'<p class="lead">{said} Point at a mark for its number.</p>'
    charts = ['<div class="charts">', *charts, "</div>"]
    return section("result", "The result", said, *charts, *map(html_table, tables))


def loop_charts(rows: list[dict], summary: list[dict], config: dict) -> list[str]:
    names = [f"M{t}" for t in range(config["iterations"] + 1)]
    drawn = panels(names[-1], config["samples"])
    charts = [svg_panel(panel, rows, names) for panel in drawn]
    for key, title in (("accuracy", "greedy"), ("accuracy_sampled", "temperature 1")):
        bars = [(r["name"], *r[key]) for r in summary if key in r]
        charts.append(svg_bars(f"accuracy of all models, {title}", bars))
    return charts


# ----------------------------------------------------------------------------------------- the thoughts


ABOUT_THOUGHTS = """<p class="lead">The model has read each text and drawn thoughts
that may lie behind it. Bars are their weights p(thought, text) / q(thought | text)
as shares; gain is by how many nats a thought makes its text likelier. One is picked
by weight, unless it gains too little; from it the next model learns.</p>"""


def thoughts_part(corpus: Corpus, rounds: list[Round], truth, n: int, most: int) -> str:
    """Part 2: n chunks with all their thoughts."""
    groups = []
    for why, chunks in worth_a_look(rounds, n).items():
        cards = [card(corpus, rounds, truth, i, most) for i in chunks]
        groups.append(f'<h3>{len(cards)} chunks: {why}</h3><div class="cards">')
        groups += [*cards, "</div>"]
    return section("thoughts", "The thoughts", ABOUT_THOUGHTS, slide(rounds), *groups)


def slide(rounds: list[Round]) -> str:
    """The slider that chooses the round; none where there is one round."""
    names = (f' data-name{t}="{legible(r.name)}"' for t, r in enumerate(rounds))
    slider = f'<input type="range" min="0" max="{len(rounds) - 1}" value="0"'
    slider += f"{''.join(names)}><output></output>"
    return f'<label class="slide">E-step {slider}</label>' if len(rounds) > 1 else ""


def in_rounds(contents) -> str:
    begin = '<div class="round" data-t='
    return "".join(f'{begin}"{t}">{x}</div>' for t, x in enumerate(contents))


def card(corpus: Corpus, rounds: list[Round], truth, i: int, most: int) -> str:
    """A chunk with its context and the thoughts of each round."""
    tok, true = corpus.tokenizer, truth.span(i) if truth else []
    shown = [("given", corpus.chunk(j), "ask") for j in corpus.before(i, 3)]
    shown += [("text", corpus.chunk(i), ""), ("true thought", true, "")]
    lines = []
    for name, ids, kind in shown:
        label = f'<span class="label">{name}</span>'
        if len(ids):
            lines.append(f"<p>{label}{piece(tok, ids, most, kind)}</p>")
    lines.append(in_rounds(one_round(tok, r, true, i, most) for r in rounds))
    return f'<article class="card"><h4>chunk {i}</h4>{"".join(lines)}</article>'


def one_round(tok, r: Round, true, i: int, most: int) -> str:
    """The thoughts of chunk i in a round, the heaviest first."""
    picked = r.thoughts.span(i)
    s = {name: values[r.row[i]] for name, values in r.samples.items()}
    if not s or not s["length"].any():  # a teacher's, or none
        told = piece(tok, picked, most) if len(picked) else "<i>no thought</i>"
        return f"<h5>{legible(r.name)}</h5>{told}"
    w = np.exp(s["log_w"] - max(s["log_w"].max(), -1e300))
    w /= max(w.sum(), 1e-300)
    ess = 1 / (w**2).sum() if w.any() else 0
    said = f"ESS {ess:.2f} of {len(w)}, without a thought log p {number(s['log_none'])}"
    said += "" if s["pick"] >= 0 else "; none was picked"
    lines = [f'<h5>{legible(r.name)} <span class="dim">{said}</span></h5>']
    for k in np.argsort(-w, kind="stable")[:THOUGHTS]:
        is_pick = bool(k == s["pick"])
        ids = r.drawn[i][k] if i in r.drawn else picked if is_pick else None
        told, tags = "<i>(its text was not kept)</i>", ""
        if ids is not None:
            told = piece(tok, ids, most)
            right = len(true) > 0 and np.array_equal(ids, true)
            tags = '<b class="tag loop">picked</b> ' * is_pick
            tags += '<b class="tag gold">true</b>' * right
        lines.append(
            f'<div class="k{" pick" * is_pick}"><div class="w">{w[k]:.3f}'
            '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none">'
            '<rect class="track" width="100" height="8"/>'
            f'<rect class="fill" width="{100 * w[k]:.1f}" height="8"/></svg></div>'
            f'<div>{told}</div><div class="n">{figures(s, k)}{tags}</div></div>'
        )
    more = len(w) - THOUGHTS
    return "".join(lines) + (f"<i>and {more} lighter ones</i>" if more > 0 else "")


def figures(s: dict, k: int) -> str:
    if not s["finished"][k]:
        return "<div>cut off: it weighs nothing</div>"
    found = {key.replace("_", " "): s[key][k] for key in ("log_q", "log_p", "log_w")}
    found["gain"] = s["log_x"][k] - s["log_none"]
    spans = (f"<span>{name} {number(x)}</span>" for name, x in found.items())
    return f"<div>{''.join(spans)}</div>"


def sequence_part(corpus: Corpus, rounds: list[Round], most: int) -> str:
    """Part 3: a document as training sees it, in both forms."""
    known = set.intersection(*({d for d, _ in r.log_p} for r in rounds))
    has = {i for r in rounds for i in r.row if len(r.thoughts.span(i))}
    able = known or {int(corpus.doc_of(i)) for i in has}

    def changes(d):  # how many thoughts in all rounds, and how many different ones
        chunks = range(corpus.docs[d], corpus.docs[d + 1])
        spans = [z.tobytes() for r in rounds for i in chunks if len(z := r.thoughts.span(i))]
        return len(spans), len(set(spans))

    d = max(sorted(able)[:1000], key=changes, default=0)
    titles = {PRIOR: "Prior: think, then write", POSTERIOR: "Posterior: read, then recover"}
    parts, most = [], min(most, LONGEST)
    for form, title in titles.items():
        contents = (in_tokens(corpus, r, d, form, most) for r in rounds)
        parts.append(f"<h3>{title}</h3>{in_rounds(contents)}")
    shades = (f'<span class="s{n}"> {x:g} </span>' for n, x in enumerate(SHADES, 1))
    said = f"""<p class="lead">Document {d} as training sees it, with the thoughts that
were picked. Markers look like <span class="seq"><span class="m">SOL</span></span>;
underlined is what log q and log p add up (the loss counts all tokens, or what --loss
says). Shades are the model's −log p of a token, from
<span class="seq">{"".join(shades)}</span> nats on; point at a token for it.</p>"""
    return section("sequence", "One sequence, token by token", said, slide(rounds), *parts)


def in_tokens(corpus: Corpus, r: Round, d: int, form: int, most: int) -> str:
    """A document in a form, its tokens shaded by their log-probabilities."""
    tok, log_p = corpus.tokenizer, r.log_p.get((d, form))
    markers = ("bos", "eos", "sol", "eol", "pri", "pos")
    names = {getattr(tok, name): name.upper() for name in markers}
    ids, parts = as_trained(corpus, d, r.thoughts.span, form)
    scored = {n for part in parts for n in range(*part.thought)}
    if form == PRIOR:
        thought_of = (part.chunk for part in parts if part.thought[1])
        scored |= {n for chunk in thought_of for n in range(*chunk)}
    total, spans = 0.0, []
    for n, token in enumerate(ids[:most].tolist()):
        kinds, hover = ["m"] * (token in names) + ["u"] * (n in scored), ""
        if log_p is not None and 0 < n <= len(log_p):
            x = float(log_p[n - 1])
            kinds.append(f"s{np.searchsorted(SHADES, -x, side='right')}")
            hover = f' title="log p {number(x)}"'
            total += x if n in scored else 0
        text = tok.pieces.get(token, b"?").decode("utf-8", "replace")
        text = names.get(token) or legible(text)
        lines, text = "\n" * text.count("\n"), text.replace("\n", "↵")
        spans.append(f'<span class="{" ".join(kinds)}"{hover}>{text}</span>{lines}')
    said = f"the underlined: log {'p' if form == PRIOR else 'q'} = {number(total)}"
    if log_p is None:
        said = "no shades: this folder was made without shown.npz"
    cut = "<i> … cut off here</i>" * (len(ids) > most)
    title = f'<h5>{legible(r.name)} <span class="dim">{said}</span></h5>'
    return f'{title}<p class="seq">{"".join(spans)}{cut}</p>'


def what_ran(out_dir: Path, folder: Path, config: dict) -> str:
    """Part 4: runs, stages of one seed, settings."""
    path, lines = out_dir / "runs.jsonl", []
    runs = "<p>Machine, memory and versions were not recorded.</p>"
    if path.exists():
        lines = read_jsonl(str(path), json.loads, True)[-20:]
        keys = list(dict.fromkeys(key for run in lines for key in run))
        cells = ([str(run.get(key, "-")) for key in keys] for run in lines)
        runs = html_table([keys, *cells])
    settings = ([name, str(x)] for name, x in config.items() if x != "")
    settings = html_table([["setting of em.py", "value"], *settings])
    stages = html_table(stage_cells(folder)[:200], "stages")
    return section("ran", "What ran", runs, stages, settings)


def write_page(path: Path, title: str, corpus: Corpus | None, folders, around=("", "")) -> None:
    """Parts 2 and 3 between what is `around` them, as much as a page may hold."""
    rounds = read_rounds(corpus, folders) if corpus else []
    truth, inside = None, ""
    if corpus:
        known = Path(f"{corpus.folder}_truth")
        truth = open_thoughts(known, corpus) if known.exists() else None
    for n, most in SIZES:
        if rounds:
            inside = thoughts_part(corpus, rounds, truth, n, most)
            inside += sequence_part(corpus, rounds, most)
        text = page(title, around[0] + inside + around[1])
        if len(text.encode()) <= MOST:
            break
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_report(out_dir: Path) -> Path:
    """RUN/report.html; UserError where it is no run of em.py's."""
    path = out_dir / "report.html"
    compare = (out_dir / "compare.json").exists()
    results = read_json(out_dir / ("compare.json" if compare else "results.json"))
    first, config, corpus = result(results), results["config"], None
    folder = out_dir if compare else out_dir / f"seed{config['seed']}"
    e_steps = [meta.parent for meta in folder.glob("E*/meta.json")]
    e_steps = [e for e in e_steps if e.name[1:].isdigit()]  # none that is half done
    e_steps.sort(key=lambda e: int(e.name[1:]))
    if e_steps:
        raw = folder / "data/raw"
        if not raw.exists():
            raw = Path(read_json(e_steps[0] / "settings.json")["corpus"])
        corpus = open_corpus(raw) if raw.exists() else None
        missing = f"<p>No thoughts are shown: {legible(str(raw))} is not there.</p>"
        first += f"<p>What follows is of {folder.name}.</p>" if corpus else missing
    around = first, what_ran(out_dir, folder, config)
    title = f"Latent thoughts: {out_dir.resolve().name}"
    write_page(path, title, corpus, e_steps, around)
    return path
