"""data/finemath.py against a made-up hub.

It plans, fetches, goes on, makes the same corpora as data/text.py, and says what is missing.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import script

from data import finemath, text
from data.lib.cli import UserError, read_json
from data.lib.corpus import open_corpus
from data.lib.tokenizer import make_tokenizer

QUESTION = (
    "Janet has 16 eggs per day and eats three for breakfast every morning; "
    "how many are left for the market at 2 per egg?"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """Three files of a hundred documents, one a copy and one with a benchmark's question; a tokenizer."""
    folder = tmp_path_factory.mktemp("finemath")
    documents = [f"Page {i}. " + "And so it goes on. " * (i % 20) for i in range(300)]
    documents[150], documents[200] = documents[50], f"See this: {QUESTION.upper()} Good."
    for i in range(3):
        path = (
            folder / f"hub/finemath-4plus/train-0000{i}-of-00003.jsonl"
        )  # the real ones are parquet, which needs a package
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"url": "u", "text": d}) + "\n" for d in documents[100 * i : 100 * i + 100])
        )
    (folder / "tok").mkdir()
    make_tokenizer(documents[:20], 300).save(folder / "tok")
    (folder / "benchmarks/gsm8k").mkdir(parents=True)
    (folder / "benchmarks/gsm8k/test.jsonl").write_text(
        json.dumps({"question": QUESTION, "answer": "#### 26"}) + "\n"
    )
    (folder / "benchmarks/mmlu_stem").mkdir()
    (folder / "benchmarks/mmlu_stem/test.jsonl").write_text(
        json.dumps({"question": "And so it goes on."}) + "\n"
    )
    return SimpleNamespace(folder=folder, documents=documents)


@pytest.fixture
def hub(made, monkeypatch) -> SimpleNamespace:
    """huggingface_hub's functions over that folder. `fails`: a file that breaks off when it is fetched."""
    hub = SimpleNamespace(asked=[], fails="")

    def hf_hub_download(repo, file, *, repo_type, local_dir):
        assert (repo, repo_type) == (finemath.REPO, "dataset")
        hub.asked.append(Path(file).stem[6:])
        if hub.fails and hub.fails in file:
            raise ConnectionError("reset")
        (Path(local_dir) / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.folder / "hub" / file, Path(local_dir) / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    files = [f"finemath-4plus/train-0000{i}-of-00003.jsonl" for i in range(3)]
    monkeypatch.setattr(finemath, "FILES", files)
    monkeypatch.setattr(finemath, "READER", "json")
    monkeypatch.setattr(finemath, "__file__", str(made.folder / "finemath.py"))  # its benchmarks
    return hub


def settings(made, out: Path, **flags) -> finemath.Settings:
    return finemath.Settings(
        **{"tokenizer": str(made.folder / "tok"), "out_dir": str(out), "workers": 1} | flags
    )


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("settings.json", "meta.json")
    }


def test_cut_off_and_gone_on(made, hub, tmp_path, capsys):
    out, hub.fails = tmp_path / "out", "00001"
    with pytest.raises(
        UserError,
        match=r"finemath: not fetched \(ConnectionError: reset\); the same command goes on, or name files",
    ):
        finemath.main(settings(made, out))
    assert not out.exists() and len(list((tmp_path / "out.files").rglob("*.jsonl"))) == 1
    hub.fails = ""
    finemath.main(settings(made, out))
    assert hub.asked == [f"0000{i}-of-00003" for i in (0, 1, 1, 2)], "whole files are not fetched again"
    counts = read_json(out / "meta.json")["counts"]
    assert (
        counts["dropped"]["copies"] == 1
        and counts["dropped"]["contaminated"] == 1
        and counts["documents_out"] == 298
    ), "MMLU's short question is no reason"
    shutil.rmtree(tmp_path / "out.files")
    finemath.main(settings(made, tmp_path / "again"))
    assert content(tmp_path / "again") == {
        k: v.replace(b"out.files", b"again.files") for k, v in content(out).items()
    }
    capsys.readouterr()
    finemath.main(settings(made, tmp_path / "again"))
    assert "complete already" in capsys.readouterr().out


def test_files_that_are_there_give_what_text_gives(made, hub, tmp_path):
    pattern, benchmark = str(made.folder / "hub/*/*.jsonl"), str(made.folder / "benchmarks/gsm8k/test.jsonl")
    finemath.main(settings(made, tmp_path / "a", files=pattern))
    how = {
        "tokenizer": str(made.folder / "tok"),
        "splits": "paper",
        "dedup": True,
        "decontaminate": benchmark,
    }
    text.main(text.Settings(files=[pattern], out_dir=str(tmp_path / "b"), workers=1, **how))
    assert content(tmp_path / "a") == content(tmp_path / "b") and not hub.asked
    assert [open_corpus(tmp_path / "a" / split).n_docs for split in text.PAPER] == [1, 15, 60, 222]
    finemath.main(settings(made, tmp_path / "c", files=pattern, limit=2, dedup=False, decontaminate="none"))
    assert read_json(tmp_path / "c/meta.json")["counts"]["documents_out"] == 200


def test_parquet_gives_the_same(made, hub, tmp_path, monkeypatch):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for i in range(3):
        pq.write_table(
            pa.table({"url": ["u"] * 100, "text": made.documents[100 * i : 100 * i + 100]}),
            tmp_path / f"{i}.parquet",
        )
    for name, files in (("a", made.folder / "hub/*/*.jsonl"), ("b", tmp_path / "*.parquet")):
        finemath.main(settings(made, tmp_path / name, files=str(files)))
    for split in text.PAPER:
        assert content(tmp_path / "a" / split) == content(tmp_path / "b" / split)


def test_the_plan(made, hub, tmp_path, capsys):
    finemath.main(settings(made, tmp_path / "out", files=str(made.folder / "hub/*/*.jsonl"), dry_run=True))
    out = capsys.readouterr().out
    assert "gsm8k/test.jsonl" in out and "0.000 GB of it to be fetched" in out
    finemath.main(settings(made, tmp_path / "out", dry_run=True))
    out = capsys.readouterr().out
    assert "files      3, 18.365 GB; 18.365 GB of it to be fetched" in out
    assert not hub.asked and not list(tmp_path.iterdir()), "nothing is written or asked for"


def test_the_plan_for_all_of_it_without_a_network(made, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    finemath.main(settings(made, tmp_path / "out", dry_run=True, workers=2))
    out = capsys.readouterr().out
    assert "6,699,493: validation 6,700, warm 334,640, bootstrap 1,338,556, rest 5,019,597" in out, (
        "the paper's numbers"
    )
    assert "9.600 billion tokens" in out and "time       21m32s with 2 workers" in out
    need = "needs huggingface_hub; pip install huggingface_hub, or name files that are there by --files"
    with pytest.raises(UserError, match=need):
        finemath.main(settings(made, tmp_path / "out"))


def test_numbers_of_documents(made, hub, tmp_path, monkeypatch, capsys):
    for n in (15, 999, 1001, 20_014, 20_020):
        monkeypatch.setattr(finemath, "DOCUMENTS", n)
        files = [str(tmp_path / name) for name in finemath.FILES]
        how = text.Settings(files=files, tokenizer="", out_dir="")
        finemath.show_plan(settings(made, tmp_path / "o"), how)
        said = [
            int(x.replace(",", ""))
            for x in re.findall(r"(?:validation|warm|bootstrap|rest) ([\d,]+)", capsys.readouterr().out)
        ]
        assert said == np.bincount(text.split_of(np.arange(n), n, None), minlength=4).tolist()


def test_what_is_wrong_is_said_before_anything_is_fetched(made, hub, tmp_path, monkeypatch):
    for flags, message in (
        ({"tokenizer": "/no/such"}, "no such"),
        ({"decontaminate": "no.jsonl"}, "no.jsonl: no such file"),
        ({"files": "*.nothing"}, "no file fits"),
    ):
        with pytest.raises(UserError, match=message):
            finemath.main(settings(made, tmp_path / "out", **flags))
    monkeypatch.setattr(finemath, "READER", "pyarrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow"):
        finemath.main(settings(made, tmp_path / "out"))
    assert not hub.asked and not list(tmp_path.iterdir())


def test_command_line(made, tmp_path):
    flags = [
        f"--tokenizer={made.folder / 'tok'}",
        f"--out_dir={tmp_path / 'out'}",
        f"--files={made.folder / 'hub/*/*.jsonl'}",
        "--decontaminate=none",
        "--workers=1",
    ]
    assert "time       0m00s" in script("data/finemath.py", *flags, "--dry_run").stdout
    assert "300 documents in = 299 out + 1 copies" in script("data/finemath.py", *flags).stdout
