"""data/show.py: what it prints, and that --check finds every kind of damage in one line."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, inside, script

import data.show
from data.lib.corpus import open_corpus, write_corpus, write_thoughts
from data.lib.tokenizer import make_tokenizer
from data.show import histogram


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    tmp_path, tok = tmp_path_factory.mktemp("show"), make_tokenizer(n_vocab=256)
    documents = [[(f"Question {d}", True), (f"\nAnswer {d} with \033[31mcodes.", False)] for d in range(30)]
    write_corpus(tmp_path / "C", documents, tok, {"maker": "a test"})
    corpus = open_corpus(tmp_path / "C")
    write_thoughts(
        tmp_path / "T", corpus, (tok.encode(f"because {i}") if i % 4 == 1 else [] for i in range(60)), {}
    )
    return tmp_path


@pytest.fixture
def made(whole, tmp_path) -> tuple[Path, Path]:
    """A corpus and its thoughts, which a test may damage."""
    for name in ("C", "T"):
        shutil.copytree(whole / name, tmp_path / name)
    return tmp_path / "C", tmp_path / "T"


def show(made, *more, code=0):
    return inside(data.show, *made, *more, code=code)


def test_what_it_prints(made):
    out = show(made, "--n=30").stdout
    assert "30 documents, 60 chunks (30 of them questions)" in out and "15 thoughts, 147 tokens" in out
    assert (
        "=== document 29 ===\n--- chunk 58 (question), 11 tokens\nQuestion 29\n"
        "--- chunk 59, 27 tokens\nAnswer 29 with \ufffd[31mcodes." in out
    )
    assert "--- chunk 57, 27 tokens\n[thought, 10 tokens: because 57]\nAnswer 28" in out and "\033" not in out
    few = [show(made, f"--seed={seed}").stdout for seed in (0, 0, 1)]
    assert few[0].count("=== document") == 3 and few[0] == few[1] != few[2]
    assert show(made[:1], "--n=1000").stdout.count("=== document") == 30
    assert "=== document" in script("data/show.py", str(made[0]), env={"PYTHONIOENCODING": "ascii"}).stdout


def test_which_folders(made, tmp_path):
    fails = lambda *folders: show(folders, code=1).stderr  # noqa: E731
    assert "FOLDER ... is required: a corpus folder" in fails() and "did you mean --check" in fails(
        made[0], "--chek"
    )
    assert f"name the corpus they belong to first: CORPUS {made[1]}" in fails(
        made[1]
    ) and "one folder too many" in fails(*made, made[1])
    assert f"no corpus itself; name one of {made[0]}, {made[1]}" in fails(
        tmp_path
    ) and "no such corpus folder" in fails(tmp_path / "no")
    assert "not the meta.json of a thoughts folder" in fails(made[0], made[0])


def test_histogram():
    text = histogram("a chunk", np.array([0, 1, 4, 5, 7, 8, 2000]))
    assert (
        len(text.splitlines()) == 1 + 12
        and "4 to 7          3 " + "#" * 50 in text
        and "1,024 to 2,047          1 " in text
    )
    assert "longest 2,000" in text and histogram("a thought", np.array([])) == "a thought: none"


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colour_on_a_terminal_only(made, no_color):
    theirs, ours = pty.openpty()
    command = [sys.executable, str(ROOT / "data/show.py"), *map(str, made), "--n=4"]
    child = subprocess.Popen(command, stdout=ours, env=os.environ | {"NO_COLOR": no_color})
    os.close(ours)
    out = b""
    while True:
        try:
            piece = os.read(theirs, 65536)
        except OSError:
            break
        if not piece:
            break
        out += piece
    assert child.wait() == 0 and b"[thought" in out
    assert (b"\033[36m[thought" in out) == (not no_color) and b"\033[31m" not in out


def edit(path: Path, change) -> None:
    if path.suffix == ".npy":
        values = np.load(path)
        np.save(path, change(values))
    elif path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        path.write_bytes(change(path.read_bytes()))


def put(values: np.ndarray, i: int, value) -> np.ndarray:
    values[i] = value
    return values


DAMAGE = {
    "an id out of range": (
        "C/tokens.bin",
        lambda b: b[:40] + b"\x10\x27" + b[42:],
        "token 20 is 10000, not below 262",
    ),
    "a marker": ("C/tokens.bin", lambda b: b[:40] + b"\x02\x01" + b[42:], "token 20 is 258, a special token"),
    "a changed byte": ("C/tokens.bin", lambda b: b[:40] + b"x" + b[41:], "meta.json's hash"),
    "a moved border": ("C/chunks.npy", lambda v: put(v, 3, v[3] + 1), "meta.json's hash"),
    "cut off": ("C/tokens.bin", lambda b: b[:-4], "chunks.npy"),
    "half a token": ("C/tokens.bin", lambda b: b[:-1], "whole number"),
    "falling offsets": ("C/docs.npy", lambda v: put(v, 3, v[5]), "docs.npy"),
    "an empty document": ("C/docs.npy", lambda v: put(v, 3, v[4]), "document 3 is empty"),
    "a count": ("C/meta.json", lambda m: m | {"n_docs": 31}, "n_docs 31, but the files hold 30"),
    "another tokenizer": ("C/meta.json", lambda m: m | {"tokenizer": "0"}, "tokenizer.json"),
    "no number": ("C/meta.json", lambda m: m | {"n_vocab": "262"}, "not the meta.json of a corpus folder"),
    "forgotten questions": (
        "C/meta.json",
        lambda m: m | {"questions": False},
        "questions False, but the file says otherwise",
    ),
    "questions": ("C/questions.npy", lambda v: v[:-1], "questions.npy"),
    "a thought's byte": ("T/tokens.bin", lambda b: b"x" + b[1:], "meta.json's hash"),
    "a thought's id": ("T/tokens.bin", lambda b: b"\xff\xff" + b[2:], "token 0 is 65535"),
    "thoughts of another corpus": ("T/meta.json", lambda m: m | {"corpus": "0"}, "another corpus"),
    "the number of thoughts": ("T/meta.json", lambda m: m | {"n_thoughts": 3}, "n_thoughts 3"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds_damage(made, name):
    file, change, message = DAMAGE[name]
    edit(made[0].parent / file, change)
    done = show(made, "--check", code=1)
    assert message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_check_finds_a_thought_of_a_question(made):
    corpus = open_corpus(made[0])
    write_thoughts(
        made[1], corpus, (corpus.tokenizer.encode("because") if i == 4 else [] for i in range(60)), {}
    )
    assert "chunk 4 is a question and has a thought" in show(made, "--check", code=1).stderr


def test_check_reads_samples(made):
    assert show(made, "--check").stdout.startswith("sound: ")
    np.savez(made[1] / "samples.npz", log_w=np.zeros((60, 4)), pick=np.zeros(60))
    show(made, "--check")
    np.savez(made[1] / "samples.npz", log_w=np.zeros((59, 4)), pick=np.zeros(60))
    assert "samples.npz: rows" in show(made, "--check", code=1).stderr
    whole = (made[1] / "samples.npz").read_bytes()
    (made[1] / "samples.npz").write_bytes(whole[:300])
    assert "samples.npz: damaged" in show(made, "--check", code=1).stderr
    (made[1] / "samples.npz").write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert "samples.npz: damaged" in show(made, "--check", code=1).stderr
    shutil.rmtree(made[1])
    assert "no such thoughts folder" in show(made, code=1).stderr
