"""report.html: its numbers, its bounds, hostile text, and a look at it in a real browser.

The browser is any Chromium on the PATH, or the one that CHROME names. It is driven by the two
pipes of --remote-debugging-pipe, so that no library and no port is needed.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, inside

import data.digits
import data.show
import em
import infer_thoughts
import train
from data.lib import report, thoughts_report
from data.lib.corpus import POSTERIOR, PRIOR, open_corpus, open_thoughts, write_corpus, write_thoughts
from data.lib.pictures import LOOKS, panels, top_of
from data.lib.results import comparisons, note_run, summarise
from data.lib.thoughts_report import as_trained, read_rounds, worth_a_look
from data.lib.tokenizer import make_tokenizer

NAMES = "chromium chromium-browser google-chrome google-chrome-stable chrome microsoft-edge".split()
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "&lt;b&gt; &amp; &#x41; ]]> --> </style></bdi></section>",
    "left \u202e\u2067 turned \u200f round \x1b[31m \0 end",
    "x" * 1_000_000,
]


# ------------------------------------------------------------------------------------- runs made by hand


def row(name: str, seed: int, rng) -> dict:
    made = {"name": name, "seed": seed, "flops": rng.random() * 1e12, "seconds": 60 * rng.random()}
    made |= {"accuracy": rng.random(), "accuracy_sampled": rng.random()}
    if name.startswith("raw"):
        return made | {"nll_document": 8 * rng.random()}
    made |= {"nll_thoughtless_document": 8 * rng.random(), "ess": 4 * rng.random()}
    made["nll_bound_document"] = {k: 5 * rng.random() for k in ("1", "4", "16")}
    if name != "M0":
        made["e_step"] = {"ess": 1 + rng.random(), "kept": rng.random(), "right_of_kept": rng.random()}
    return made


def make_round(folder: Path, corpus, draw, rng, model="M0", K=4) -> None:
    """An E-step's folder with random numbers; draw(i): K lists of ids."""
    n, numbers = corpus.n_chunks, np.flatnonzero(~corpus.questions)
    samples = {name: np.full((n, K), np.nan) for name in ("log_q", "log_p", "log_x", "log_w")}
    samples |= {"log_none": np.full(n, np.nan), "pick": np.full(n, -1.0)}
    samples |= {"length": np.zeros((n, K)), "finished": np.zeros((n, K))}
    for name in ("log_q", "log_p", "log_x"):
        samples[name][numbers] = -9 * rng.random((len(numbers), K))
    samples["log_w"] = samples["log_p"] - samples["log_q"]
    samples["log_none"][numbers] = -9 * rng.random(len(numbers))
    samples["pick"][numbers] = rng.integers(-1, K, len(numbers))
    samples["length"][numbers] = samples["finished"][numbers] = 1
    samples["log_w"][numbers[0], 0], samples["finished"][numbers[0], 0] = -np.inf, 0
    drawn = {int(i): draw(i) for i in numbers}
    spans = [drawn[i][int(k)] if (k := samples["pick"][i]) >= 0 else [] for i in range(n)]
    write_thoughts(folder, corpus, spans, {"model": f"x/{model}", "samples": K, "cut_off": 7}, samples)
    (folder / "settings.json").write_text(json.dumps({"corpus": str(corpus.folder), "seed": 1000}))
    (folder / "timing.json").write_text('{"seconds": 12.3, "tokens_per_s": 45}')
    flat, picked = [z for i in numbers for z in drawn[i]], open_thoughts(folder, corpus)
    lengths = [len(as_trained(corpus, d, picked.span, form)[0]) - 1
               for d in range(3) for form in (PRIOR, POSTERIOR)]  # fmt: skip
    lengths = np.minimum(lengths, thoughts_report.LONGEST - 1)
    arrays = {"chunks": numbers, "sizes": np.array(list(map(len, flat))).reshape(-1, K)}
    arrays |= {"ids": np.concatenate(flat), "docs": np.arange(3), "lengths": lengths}
    np.savez(folder / "shown.npz", **arrays, log_p=-rng.random(lengths.sum()).astype(np.float32))


def make_run(folder: Path, corpus, draw, iterations=3, seeds=2, **more) -> dict:
    """A run of em.py without a model; its results."""
    rng = np.random.default_rng(0)
    names = ["raw_tokens", "raw_flops", *(f"M{t}" for t in range(iterations + 1))]
    names += [f"uniform/M{iterations}", "gold"]
    rows = [row(name, seed, rng) for seed in range(seeds) for name in names]
    config = asdict(em.Settings(iterations=iterations, seeds=seeds, **more))
    results = {"config": config, "rows": rows, "summary": summarise(rows), "likelihood": []}
    results |= {"tests": comparisons(rows, f"M{iterations}", em.ARMS), "rules_nats_document": 0.609}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    for t in range(1, iterations + 1):
        make_round(folder / f"seed0/E{t}", corpus, draw, rng, f"M{t - 1}")
    return results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as large as the default one, and its page."""
    folder = tmp_path_factory.mktemp("report") / "run"
    inside(data.digits, f"--out_dir={folder}/seed0/data")
    corpus = open_corpus(folder / "seed0/data/raw")
    truth, rng = open_thoughts(folder / "seed0/data/raw_truth", corpus), np.random.default_rng(1)

    def draw(i):
        true = truth.span(i)
        return [true if rng.random() < 0.5 else rng.permutation(true) for _ in range(4)]

    results = make_run(folder, corpus, draw)
    note_run(folder, 321.0, ", peak memory of a stage 440 MB")
    begin = time.process_time()
    path = report.write_report(folder)
    return SimpleNamespace(
        folder=folder, results=results, path=path, seconds=time.process_time() - begin, corpus=corpus
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on text that wants to be more than text."""
    folder = tmp_path_factory.mktemp("hostile") / "<script>window.hacked = 3<"
    tok = make_tokenizer(n_vocab=256)
    documents = [[(text, True), (f"{text} {n}", False)] for n in range(3) for text in HOSTILE]
    write_corpus(folder / "seed0/data/raw", documents, tok, {})
    corpus, ids = open_corpus(folder / "seed0/data/raw"), list(map(tok.encode_array, HOSTILE))
    make_run(folder, corpus, lambda i: [ids[(i + k) % 5] for k in range(4)], 2, train=HOSTILE[0])
    return SimpleNamespace(folder=folder, path=report.write_report(folder), corpus=corpus)


class Cells(HTMLParser):
    """The tables of a page as lists of rows of cells, and the titles of its marks."""

    def __init__(self, page: str):
        super().__init__()
        self.tables, self.titles, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside in ("td", "th"):
            self.tables[-1][-1][-1] += text
        elif self.inside == "title":
            self.titles.append(text)


# ---------------------------------------------------------------------------------------------- its numbers


def test_numbers_are_those_of_results_json(run):
    cells = Cells(run.path.read_text())
    rows = run.results["rows"]
    columns = {"greedy": "accuracy", "sampled": "accuracy_sampled", "raw NLL": "nll_document"}
    columns |= {"thoughtless": "nll_thoughtless_document", "IWAE-16": "bound_16", "kept": "e_kept"}
    header, *lines = cells.tables[0]
    assert len(lines) == len(run.results["summary"]) == 8
    for summary, line in zip(run.results["summary"], lines):
        shown = dict(zip(header, line))
        assert shown["nats a document"] == summary["name"]
        for title, key in columns.items():
            mean, deviation = summary.get(key, (None, None))
            assert shown[title] == ("-" if mean is None else f"{mean:.3f} ±{deviation:.3f}"), (title, line)
    for t in range(4):
        mine = [r for r in rows if r["name"] == f"M{t}"]
        mean, spread = np.mean([r["accuracy"] for r in mine]), np.std([r["accuracy"] for r in mine], ddof=1)
        assert f"the loop, M{t}: {mean:.3f} ±{spread:.3f}" in cells.titles
        bound = np.mean([r["nll_bound_document"]["16"] for r in mine])
        assert any(title.startswith(f"IWAE-16, M{t}: {bound:.3f} ±") for title in cells.titles)
        ess = np.mean([r["ess"] for r in mine])
        assert any(title.startswith(f"effective samples (ESS), M{t}: {ess:.3f} ±") for title in cells.titles)
    gold = np.mean([r["accuracy"] for r in rows if r["name"] == "gold"])
    assert f"gold: {gold:.3f}" in cells.titles
    tests = {tuple(line[:2]): line for line in cells.tables[1]}
    of = next(t for t in run.results["tests"] if (t["a"], t["b"], t["figure"]) == ("M3", "M0", "accuracy"))
    assert tests["M3 - M0", "greedy"][2] == f"{of['difference']:+.3f} ±{of['se']:.3f}"


def test_a_card_has_the_numbers_of_samples_npz(run):
    page = run.path.read_text()
    assert page.count('<article class="card">') == 30
    card = re.search(r'<article class="card"><h4>chunk (\d+)</h4>.*?</article>', page, re.S)
    i = int(card[1])
    for t in (1, 2, 3):
        ends = '(?:<div class="round"|</article>)'
        shown = re.search(rf'data-t="{t - 1}">(.*?)</h4>(.*?){ends}', card[0], re.S)
        with np.load(run.folder / f"seed0/E{t}/samples.npz") as s:
            w = np.exp(s["log_w"][i] - s["log_w"][i].max())
            order = np.argsort(-w, kind="stable")
            gain = s["log_x"][i] - s["log_none"][i]
            numbers = np.stack([s["log_q"][i], s["log_p"][i], s["log_w"][i], gain], 1)[order]
            said = [f"{x:z.2f}" for x in numbers.ravel()]
            assert f"ESS {w.sum() ** 2 / (w**2).sum():.2f} of 4" in shown[1]
            picked = int(s["pick"][i])
        numbers = re.findall(r"<span>(?:log_[qpw]|gain) (.*?)</span>", shown[2])
        assert numbers == said
        weights = re.findall(r"</progress> <b>([\d.]+)", shown[2])
        assert weights == [f"{x:.3f}" for x in sorted(w / w.sum(), reverse=True)]
        marked = ["pick" in kind for kind in re.findall(r'<div class="k( pick)?">', shown[2])]
        assert marked == [k == picked for k in order]


def test_which_chunks(run):
    chunks, rounds = read_rounds(run.corpus, [run.folder / f"seed0/E{t}" for t in (1, 2, 3)])
    assert sorted(chunks) == np.flatnonzero(~run.corpus.questions).tolist()
    found = worth_a_look(chunks, rounds, 30)
    shown = [i for some in found.values() for i in some]
    assert len(shown) == len(set(shown)) == 30 and [len(x) for x in found.values()] == [7, 7, 7, 9]
    changed, largest, smallest, _ = found.values()
    for i in changed:
        assert len({tuple(r.thoughts.span(i)) for r in rounds}) > 1
    with np.load(run.folder / "seed0/E3/samples.npz") as s:
        best = np.argmax(s["log_w"], axis=1)
        gain = s["log_x"][np.arange(len(best)), best] - s["log_none"]
    left = np.delete(gain, [*np.flatnonzero(run.corpus.questions), *shown])
    assert min(gain[largest]) > np.nanmax(left) and max(gain[smallest]) < np.nanmin(left)


def test_what_ran(run):
    text = html.unescape(re.sub("<[^>]*>", " ", run.path.read_text()))
    assert "peak memory of a stage 440 MB" in text and "seconds 321" in text
    assert "python data/digits.py" in text
    assert re.search(r"E2 .*cut_off 7.*, seconds 12 .*python infer_thoughts.py --out_dir=\S+ --corpus=", text)
    (run.folder / "runs.jsonl").rename(run.folder / "gone")
    try:
        page = report.write_report(run.folder).read_text()
        assert "seconds 321" not in page, "an old run has no runs.jsonl"
    finally:
        (run.folder / "gone").rename(run.folder / "runs.jsonl")
        report.write_report(run.folder)


def test_small_soon_and_without_torch(run, hostile):
    assert run.seconds < 2, f"built in {run.seconds:.2f} s of processor time"
    assert run.path.stat().st_size < 1_000_000 and hostile.path.stat().st_size < 1_000_000
    assert hostile.path.read_text().count('class="card"') == 15, "each text is cut, none is left out"
    code = "import sys, em, data.show; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert len((ROOT / "data/lib/report.py").read_text().splitlines()) <= 400


def test_an_old_folder_shows_the_picks(run, tmp_path):
    """Without shown.npz: chunks that have a thought in each round, but no other thoughts and no shades."""
    shutil.copytree(run.folder, tmp_path / "old")
    for path in (tmp_path / "old").glob("seed0/E*/shown.npz"):
        path.unlink()
    page = report.write_report(tmp_path / "old").read_text()
    assert page.count('<article class="card">') == 30 and "ESS" not in page.split("<article")[1]
    assert not re.search(r'<span class="[mu ]*s\d"', page.split("<h3>Prior")[1])


def test_settings_of_em(run):
    assert inside(em, f"--report={run.folder}").stdout == f"{run.path}\n"
    refused = inside(em, f"--report={run.folder}", "--seeds=3", code=1).stderr
    assert "--report: makes a page of an old run" in refused and refused.count("\n") == 1
    assert "results.json: no such file" in inside(em, f"--report={run.folder}/seed0", code=1).stderr


def test_a_comparison_of_methods(tmp_path):
    rows = [{"name": name, "heldout": "heldout", "evaluation": {"mode": "raw"}, "accuracies": [0.25, 0.75],
             "accuracy": 0.5, "cut_off": 0.125, "documents": 3, "passes": 2.0, "train_tokens": [9]}
            for name in ("wrap", "latent")]  # fmt: skip
    (tmp_path / "compare.json").write_text(json.dumps({"config": {"compare": True}, "rows": rows}))
    cells = Cells(report.write_report(tmp_path).read_text())
    assert cells.tables[0][1][:4] == ["wrap", "0.500", "0.250 0.750", "0.125"]


def test_show_writes_a_page(run, hostile, tmp_path):
    """For any corpus: several rounds, one, or a teacher's thoughts, which nobody has weighed."""
    corpus, path = run.folder / "seed0/data/raw", tmp_path / "look.html"
    rounds = [run.folder / f"seed0/E{t}" for t in (1, 2)]
    assert inside(data.show, corpus, *rounds, f"--html={path}").stdout == f"{path}\n"
    page = path.read_text()
    assert page.count('type="range"') == 1 and 'id="thoughts"' in page and 'id="result"' not in page
    inside(data.show, corpus, run.folder / "seed0/data/raw_truth", f"--html={path}")
    page = path.read_text()
    assert 'type="range"' not in page and page.count('class="card"') == 30
    assert "<progress" not in page
    refused = inside(data.show, corpus, f"--html={path}", code=1).stderr
    assert "--html: shows thoughts; name CORPUS THOUGHTS" in refused
    (tmp_path / "E").mkdir()
    shutil.copytree(rounds[0], tmp_path / "E", dirs_exist_ok=True)
    whole = (tmp_path / "E/shown.npz").read_bytes()
    (tmp_path / "E/shown.npz").write_bytes(whole[:300])
    refused = inside(data.show, corpus, tmp_path / "E", f"--html={path}", code=1).stderr
    assert "shown.npz: damaged" in refused and refused.count("\n") == 1


# ------------------------------------------------------------------------------------- what an E-step keeps


def test_what_an_e_step_keeps(digits, tmp_path):
    """All thoughts of all chunks; tokens' log-probabilities that add up to log p and log q."""
    flags = [f"--corpus={digits}/warm", f"--thoughts={digits}/warm_thoughts", "--max_steps=40", "--n_layer=2"]
    inside(train, *flags, f"--out_dir={tmp_path}/M", "--device=cpu")
    flags = [f"--model={tmp_path}/M", f"--corpus={digits}/raw", "--max_new=24", "--part_size=25"]
    flags += ["--samples=3", "--workers=1", "--device=cpu"]
    inside(infer_thoughts, *flags, f"--out_dir={tmp_path}/E")
    corpus = open_corpus(digits / "raw")
    chunks, (only,) = read_rounds(corpus, [tmp_path / "E"])
    assert sorted(chunks) == sorted(only.samples) == np.flatnonzero(~corpus.questions).tolist()
    for i, s in only.samples.items():
        assert [len(z) for z in s["thoughts"]] == (s["length"] - s["finished"]).tolist()
        if (k := int(s["pick"])) >= 0:
            assert s["thoughts"][k].tolist() == only.thoughts.span(i).tolist()
    checked = 0
    for d, form in only.log_p:
        i, log_p = int(corpus.docs[d]) + 1, only.log_p[d, form]
        ids, parts = as_trained(corpus, d, only.thoughts.span, form)
        assert len(log_p) == len(ids) - 1
        if len(only.thoughts.span(i)):
            (begin, end), chunk = parts[1].thought, parts[1].chunk
            end = chunk[1] if form == PRIOR else end
            key = "log_p" if form == PRIOR else "log_q"
            s = only.samples[i]
            wanted = s[key][int(s["pick"])]
            assert log_p[begin - 1 : end - 1].sum() == pytest.approx(wanted, abs=1e-3)
            checked += 1
    assert checked >= 2 and len(only.log_p) == 2 * thoughts_report.DOCUMENTS


# -------------------------------------------------------------------------------------------------- colours

# What the red-blind and the green-blind see of linear RGB (Viénot, Brettel and Mollon 1999).
BLIND = [
    [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
]


def test_an_axis_ends_above_its_numbers():
    """Also where there are none: a corpus without questions has no accuracies."""
    assert top_of({}, {}) == pytest.approx(0.0102)
    for most, top in [(0.19, 0.2), (0.3, 0.3), (0.93, 1), (1.0, 1), (4.4, 6), (9.3, 10), (12.0, 20)]:
        assert top_of({"accuracy": ([[(0, 0.0), (1, most)]], [])}, {}) == pytest.approx(1.02 * top)
        assert top_of({"accuracy": ([[(0, 0.01)]], [])}, {"gold": most}) == pytest.approx(1.02 * top)


def test_the_colour_blind_tell_the_lines_apart():
    """By colour, in CIE Lab, or by the kind of line; the dash of a mean and its marks count as one."""

    def lab(colour, matrix):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(matrix) @ linear, 0, 1)
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        x, y, z = np.cbrt(np.maximum(to_xyz @ seen / [0.9505, 1, 1.089], 1e-3))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for panel in panels("M3", 4, "document"):
        looks = [LOOKS[name.split("/")[0]] for name in (*panel.curves, *panel.levels)]
        for n, (label, colour, line) in enumerate(looks):
            for other, theirs, their_line in looks[:n]:
                for matrix in [np.eye(3), *BLIND]:
                    apart = np.linalg.norm(lab(colour, matrix) - lab(theirs, matrix))
                    assert apart > 15 or line != their_line, (panel.title, label, other, apart)


# ------------------------------------------------------------------------------------------- a real browser


class Browser:
    """A headless Chromium that is told by JSON messages, each ended by a zero byte."""

    def __init__(self, path: str, folder: Path):
        ask, answer = os.pipe(), os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars".split()
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        shell = f'exec "$0" "$@" 3<&{ask[0]} 4>&{answer[1]}'  # it reads 3 and writes 4
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = ["bash", "-c", shell, path, *flags]
        self.child = subprocess.Popen(command, pass_fds=(ask[0], answer[1]), **quiet)
        os.close(ask[0]), os.close(answer[1])
        self.ask, self.answer = ask[1], answer[0]
        self.n, self.session, self.events, self.left = 0, {}, [], b""
        targets = self("Target.getTargets")["targetInfos"]
        page = next(x["targetId"] for x in targets if x["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.left:
            got = os.read(self.answer, 1 << 20)
            assert got, "the browser has ended"
            self.left += got
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def __call__(self, method: str, **params) -> dict:
        self.n += 1
        message = {"id": self.n, "method": method, "params": params} | self.session
        os.write(self.ask, json.dumps(message).encode() + b"\0")
        while (got := self.read()).get("id") != self.n:
            self.events.append(got)
        assert "error" not in got, got
        return got["result"]

    def open(self, path: Path, width: int) -> None:
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Page.navigate", url=path.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def js(self, code: str):
        got = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=39)

    def complaints(self) -> list[dict]:
        wrong = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [e for e in self.events if e["method"] in wrong]

    def asked_for(self) -> set[str]:
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return {e["params"]["request"]["url"] for e in sent}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = [os.environ.get("CHROME", ""), *NAMES]
    path = next(filter(None, map(shutil.which, filter(None, names))), None)
    if not path:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH, and CHROME names none")
    browser = Browser(path, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.child.terminate()
    browser.child.wait()


@pytest.mark.parametrize("width", [380, 1600])
def test_in_a_browser(run, browser, width):
    browser.open(run.path, width)
    assert not browser.complaints() and browser.asked_for() == {run.path.as_uri()}
    heights = "['result', 'thoughts', 'sequence', 'ran'].map(id => document.getElementById(id).offsetHeight)"
    assert all(height > 100 for height in browser.js(heights))
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("document.querySelectorAll('figure > svg').length") == 6
    seen = "[...document.querySelectorAll('.round')].filter(x => x.offsetHeight).map(x => x.dataset.t)"
    assert set(browser.js(seen)) == {"0"} and len(browser.js(seen)) == 32
    browser.js("document.querySelector('input').focus()")
    browser.press("ArrowRight")
    assert set(browser.js(seen)) == {"1"} and len(browser.js(seen)) == 32
    heads = "[...document.querySelectorAll('.round > h4')].filter(x => x.offsetHeight).map(x => x.innerText)"
    assert {said.split()[0] for said in browser.js(heads)} == {"E2"}
    browser.press("ArrowRight")
    assert set(browser.js(seen)) == {"2"}
    assert not browser.complaints()
    browser("Emulation.setEmulatedMedia", media="print")
    assert set(browser.js(seen)) == {"0", "1", "2"}, "on paper all rounds are shown"
    browser("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("width", [380, 1600])
def test_hostile_text_is_shown_and_not_run(hostile, browser, width):
    browser.open(hostile.path, width)
    assert not browser.complaints() and browser.asked_for() == {hostile.path.as_uri()}
    assert browser.js("typeof window.hacked") == "undefined"
    assert browser.js("document.scripts.length") == 1 and browser.js("document.images.length") == 0
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert "<script>window.hacked = 3<" in browser.js("document.querySelector('h1').innerText")
    text = browser.js("document.body.innerText")
    turned = "left ‹U+202E›‹U+2067› turned ‹U+200F› round ‹U+001B›[31m ‹U+0000› end"
    for shown in (*HOSTILE[:3], turned):
        assert shown in text, shown
    assert "tokens in all" in text and "--train" not in text
    assert not set("\u202e\u2067\u200f\x1b") & set(hostile.path.read_text())


def test_the_policy_lets_nothing_in(run, browser):
    """Even a script that stood in the page would not run, and nothing can be fetched."""
    browser.open(run.path, 1600)
    make = "let s = document.createElement('script'); s.textContent = 'window.hacked = 1'; "
    browser.js(f"{make}document.body.append(s)")
    browser.js("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 2\">')")
    fetched = browser.js("fetch('http://127.0.0.1:9/').then(() => 'fetched', () => 'refused')")
    assert browser.js("typeof window.hacked") == "undefined" and fetched == "refused"
    said = " ".join(json.dumps(e) for e in browser.complaints())
    assert said.count("Content Security Policy") >= 3
