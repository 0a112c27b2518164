"""From raw text to corpora: sentences, chunks, files, splits, counts, decontamination, kills."""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, inside, script

import data.text as text_module
from data.lib.chunking import LIMIT, LONG, MOST, chunk, sentence_ends, text_digest
from data.lib.cli import UserError, help_text, opt, read_json, read_settings
from data.lib.corpus import open_corpus, write_corpus
from data.lib.decontaminate import Finder, fold, letters
from data.lib.sources import expand, lines, read_jsonl
from data.lib.tokenizer import load_tokenizer, make_tokenizer
from data.text import Settings, split_of

sys.path.insert(0, str(ROOT / "tests"))
from bench_data import perturbed, planted, punkt_ends, read, sentences_a_chunk, torn

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent: no real text to read")


def chunks_of(text: str, seed: int = 0) -> list[str]:
    return chunk([text], [text_digest(text.encode(), seed)])[0]


def sentences(text: str) -> list[str]:
    ends = sentence_ends(text)
    return [text[a:b] for a, b in zip([0, *ends], ends)]


# ----------------------------------------------------------------------- sentences

# ¦ marks where sentences end.
CASES = [
    'It rains. ¦She stays.¦ He goes!¦ Why?¦ "Because."¦ So it is.',
    "One.\n\n¦Two\n\n¦Three.  \n \n¦Four",
    "See e.g. Fig. 3 and Eq. (4), i.e. what Dr. A. B. Smith et al. found.¦ Then go on.",
    "It costs 3.14 or 1,234.50 euros, v. 2.0.1, at 5 p.m. Next day.¦ See No. 5 on p. 7.¦ No.¦ Yes.",
    "I saw https://example.org/a.b?c=d. ¦Then me@example.org wrote.¦ See www.x.org. ¦Good!",
    "Let $y = 3. Then x$ be it.¦ Let $$a. B\n\nc. D$$ be.¦ Now \\(u. V\\) and \\[p. Q\n\nr! S\\] end.",
    "We have \\begin{align*} a &= 1. \\\\\n\n B &= 2. \\end{align*}¦ Thus $z = 4.$¦ And so on.¦"
    " \\\\[2pt] No. ¦More\\]",
    "She paid $5. ¦He bought 3 for $10 each.¦ It was $2.50 off, or $3 and $4, $5-$6. ¦And $7. ¦Done.",
    "Then \\$5. ¦And $x$. ¦Or $x_1, \\ldots.$ and so on.",
    "1. Wash it.\n¦2. Dry it.\n¦  a. Fold it.\n¦- Put it away.\n¦* Done.\n¦# Title\nText. ¦IV. is a number.",
    "Code:\n\n¦```python\nx = 1. \n\nY = 2! Z\n```\n¦- An item. ¦End.",
    "Code:\n\n¦    if a. B:\n        return x(1)\n\n    print(2). Then\n\n¦Text. ¦Text.",
    "Table:\n\n¦| a. B | c |\n|---|---|\n| d! E | f. G |\n\n¦After. ¦That.",
    "a. B | c\n--- | ---\nd. E | f! G\n\n¦After.",
    "Use `a. B` here.¦ `c. D` is code, `e`.¦ Then.¦ See <pre>a. B\n\nC.</pre> there.¦ The end.",
    'Wait... what?¦ He said: "Go. ¦Now."¦ (Yes.)¦ [No!]¦ It is.',
    "今天下雨。¦我在家。¦「真的？」¦是。。。¦真的？！¦2月。",
    'राम गया।¦ उसने कहा "जाओ।"¦ वह गया॥१॥¦ धर्म॥¦ बस',
    "وہ گیا۔¦ کیوں؟¦ ذهب إلى البيت.¦ نعم",
    "値は３．１４である．¦次に、図１．¦ Նա գնաց։¦ 12։30 էր։¦ ｱｲ｡¦｢ｴｵ｡｣¦ｶ",
    "Is [itex]x. Y[/itex] so?¦ Then [tex]y = 3.[/tex]¦ Now [MATH]a. B\n\nC[/MATH].¦ [tex] Do.¦ End.",
    "Take <math>a. B</math> here.¦ Done.",
    "Who is J. K. Rowling?¦ Me and I.¦ Then x. ¦Was it plan B. Then?",
    "U.S. troops and Ph.D. students, cf. Sec. 2, vol. 3, approx. Five, at 3. 5 and so on.",
    "   \n\nLeading space. ¦And trailing.  \n\n ",
]


@pytest.mark.parametrize("case", CASES)
def test_sentences(case):
    found = sentences(case.replace("¦", ""))
    assert "".join(found) == case.replace("¦", "") and all(piece.strip() for piece in found)
    assert [piece.strip() for piece in found] == [piece.strip() for piece in case.split("¦")]


def test_white_space_goes_to_the_front_and_blank_lines_to_the_back():
    assert sentences("A b.  C d.\n\n\nE f.\n G") == ["A b.", "  C d.\n\n\n", "E f.", "\n G"]
    assert sentences("\n\n A. B") == ["\n\n A. B"] and sentences(" \n ") == [" \n "] and sentences("") == []


def test_long_texts_without_a_stop_are_cut_at_white_space_outside_of_formulas():
    text = (
        "word " * 300
        + "$"
        + "x + y " * 100
        + "$ "
        + "12 345 678 " * 200
        + "http://example.org/"
        + "a" * 900
        + " "
        + "more words " * 200
    )
    pieces = sentences(text)
    assert "".join(pieces) == text and max(map(len, pieces)) <= LIMIT
    assert not any(torn(text, sentence_ends(text)).values())
    assert all(len(p) <= LONG for p in sentences("word " * 5000))
    for endless in (
        "x" * 50_000,
        "$" + "x " * 20_000 + "$",
        "7" * 9000,
        "\\begin{a}" + "b\n\n" * 9000,
        "```\n" + "c " * 9000,
        "a,1234," * 3000,
    ):
        pieces = sentences(endless)
        assert "".join(pieces) == endless and max(map(len, pieces)) <= LIMIT
    assert not any(
        a[-1].isdigit() and b[0].isdigit()
        for a, b in zip(sentences("a,1234," * 3000), sentences("a,1234," * 3000)[1:])
    )


# fmt: off
SCRAPS = [
    "$", "$$", "\\[", "\\]", "\\(", "\\)", "\\begin{a}", "\\end{a}", "```", "`", "\n", "\n\n",
    "\r\n\r\n", "    ", "\t", "| ", "|---|", ". ", "! ", "? ", "1. ", "- ", "* ", "# ", "(a) ",
    "e.g. ", "Dr. ", "3.14", "9.", "A.", "?!", "…", ".) ", "}$ ", ":", "\xa0", "\u3000", "\r",
    " " * 20, "http://a.b", "Ab", "cd ", "é", "数。", "🎉", "\u2028", "\x00", "\u0301", "\ufeff",
    "<pre>", "</pre>", "\\", "$5 and a ", "[tex]", "[/tex]", "।", "॥१ ", "؟\" ", "｡",
]
# fmt: on


def random_text(rng: random.Random) -> str:
    n = rng.choice((1, 3, 10, 40, 150))
    if rng.random() < 0.5:
        return "".join(rng.choice(SCRAPS) for _ in range(n))
    return "".join(
        chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), rng.randrange(128))))
        for _ in range(n)
    )


def test_ten_thousand_random_documents_come_back():
    rng, tok = random.Random(0), make_tokenizer()
    for _ in range(100):
        texts = [random_text(rng) for _ in range(100)]
        all_pieces = chunk(texts, [text_digest(text.encode(), 0) for text in texts])
        for text, pieces in zip(texts, all_pieces, strict=True):
            assert "".join(pieces) == text and all(pieces)
            ends = sentence_ends(text)
            assert ends == sorted(set(ends)) and ends[-1] == len(text)
        ids, lengths, _ = tok.encode_documents(all_pieces)
        spans = np.split(ids, np.cumsum(lengths)[:-1])
        assert [*map(tok.decode, spans)] == [piece for pieces in all_pieces for piece in pieces]


def test_texts_beside_each_other_change_nothing():
    texts = [case.replace("¦", "") for case in CASES] + ["", "\n\n", ".", "A.", ". B", "", "- a", ""]
    rng = random.Random(2)
    for _ in range(50):
        rng.shuffle(texts)
        digests = [text_digest(text.encode(), 0) for text in texts]
        assert chunk(texts, digests) == [chunks_of(text) for text in texts]
    assert chunk([], []) == [] and chunks_of("") == [] and sentence_ends("") == []


def test_sentences_and_chunks_are_those_of_earlier_releases():
    """Another rule gives all corpora other hashes: this digest is that of the first, array-based code."""
    rng, digest = random.Random(4), hashlib.sha256()
    texts = [case.replace("¦", "") for case in CASES]
    texts += ["".join(rng.choice(SCRAPS) for _ in range(rng.choice((1, 10, 40, 400)))) for _ in range(2000)]
    for text in texts:
        digest.update(json.dumps([sentence_ends(text), chunks_of(text)]).encode())
    assert digest.hexdigest() == "040d8c7e9df56e1b8bcc1a3b122abf1201583120d000ca29c0ab2762bbe0ae93"


def test_nothing_takes_quadratic_time():
    begin = time.perf_counter()
    scraps = ["$a ", "\\begin{a} ", "$1 a b ", "[ .", "*\n", "| a\n", "``` \n", "    \n", ".", "!", "।"]
    for scrap in SCRAPS + scraps:
        text = scrap * (20_000 // len(scrap))
        assert sentence_ends(text)[-1] == len(text)
    for text in ("!" * 20_000 + ")" * 20_000, "." * 200_000, "a" + "\n    " * 20_000 + "\nb"):
        assert sentence_ends(text)[-1] == len(text)
    assert time.perf_counter() - begin < 30


def test_many_cuts_in_a_long_text_are_quick():
    begin = time.perf_counter()
    many = ("word " * 700 + "`c. D` $x$. Then ") * 500  # 1.8 MB, each sentence of which has to be cut
    assert len(sentence_ends(many)) > 500 and time.perf_counter() - begin < 8, (
        "code and formulas are found once, not for each cut"
    )


@needs_shared
def test_real_text_comes_back():
    for path in sorted((SHARED / "data").glob("*/*.json*")):
        with open(path, encoding="utf-8") as f:
            records = list(f) if path.suffix == ".jsonl" else [f.read()]
        texts = []
        for line in records:
            texts += [line, *(v for v in json.loads(line).values() if isinstance(v, str))]
        for i in range(0, len(texts), 1000):
            some = texts[i : i + 1000]
            chunks = chunk(some, [text_digest(text.encode(), 1) for text in some])
            for text, pieces in zip(some, chunks, strict=True):
                assert "".join(pieces) == text and (pieces or not text)


@needs_shared
def test_nothing_is_torn_in_the_calculus_book():
    pages = read(SHARED / "data/calculus/calculus_made_easy.jsonl", "text")
    ends = [sentence_ends(page) for page in pages]
    assert all(not any(torn(page, e).values()) for page, e in zip(pages, ends)) and sum(map(len, ends)) > 2500
    pytest.importorskip("nltk")
    assert sum(torn(page, punkt_ends(page))["formulas"] for page in pages) > 100, (
        "the measure finds what is torn"
    )


def test_chunk_lengths():
    text, counts = "This is a sentence. " * 8000, []
    ends = sentence_ends(text)
    for seed in range(10):
        counts += sentences_a_chunk(text, ends, seed)[:-1]
    assert abs(np.mean(counts) - 8) < 0.3 and max(counts) <= MOST and min(counts) == 1
    expected = 7  # the variance of the Poisson part
    assert abs(np.var(counts) - expected) < 0.3


def test_chunks_hang_on_text_and_seed_alone():
    text = "One more sentence here. " * 100
    assert chunks_of(text, 3) == chunks_of(text, 3)
    assert chunks_of(text, 3) != chunks_of(text, 4)


# ------------------------------------------------------------------------- folders

DOCUMENTS = [
    f"Document {i} has a number. It says: {i * 7919 % 1000}. "
    + "And so it goes on. " * (i % 30)
    + ("Ünïcode 数学。" if i % 5 == 0 else "")
    for i in range(300)
]


def write_jsonl(path: Path, texts, field: str = "text") -> Path:
    path.write_text(
        "".join(json.dumps({"id": i, field: t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tok")
    make_tokenizer(DOCUMENTS[:50], 400).save(folder)
    return folder


def build(tok: Path, out: Path, *files, **flags) -> dict:
    """Run text.py in this process; meta.json."""
    text_module.main(
        Settings(
            files=[str(f) for f in files], tokenizer=str(tok), out_dir=str(out), **{"workers": 1} | flags
        )
    )
    return json.loads((out / "meta.json").read_text())


def texts_of(folder: Path) -> list[str]:
    corpus = open_corpus(folder)

    docs = [range(a, b) for a, b in zip(corpus.docs, corpus.docs[1:])]
    return ["".join(corpus.text(i) for i in chunks) for chunks in docs]


def content(folder: Path, *but: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in but
    }


def test_documents_come_back_and_are_shuffled(tok, tmp_path):
    meta = build(tok, tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    found = texts_of(tmp_path / "out/train")
    assert sorted(found) == sorted(DOCUMENTS) and found != DOCUMENTS
    assert (
        meta["counts"]["documents_in"] == meta["counts"]["documents_out"] == 300
        and not (tmp_path / "out/work").exists()
    )
    other = build(tok, tmp_path / "other", tmp_path / "a.jsonl", seed=1)
    assert texts_of(tmp_path / "other/train") != found and other["splits"]["train"]["n_bytes"] == sum(
        len(d.encode()) for d in DOCUMENTS
    )
    corpus = open_corpus(tmp_path / "out/train")
    expected = [chunks_of(t) for t in found]
    assert [corpus.text(i) for i in range(corpus.n_chunks)] == sum(expected, [])
    assert corpus.chunk(0).tolist() == corpus.tokenizer.encode(expected[0][0])


def test_makers_of_other_corpora_write_the_same_folder(tok, tmp_path):
    """digits.py and gsm8k.py go through write_corpus: for the same chunks it writes what text.py writes."""
    build(tok, tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    documents = [[(piece, False) for piece in chunks_of(t)] for t in texts_of(tmp_path / "out/train")]
    source = json.loads((tmp_path / "out/train/meta.json").read_text())["source"]
    write_corpus(tmp_path / "same", iter(documents), load_tokenizer(tok), source)
    assert content(tmp_path / "same") == content(tmp_path / "out/train")
    np.save(tmp_path / "x.npy", np.load(tmp_path / "same/chunks.npy"))
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "same/chunks.npy").read_bytes()


def test_the_same_bytes_for_any_order_size_of_parts_and_number_of_workers(tok, tmp_path, monkeypatch):
    first, second = (
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:170]),
        write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[170:] + DOCUMENTS[:5]),
    )
    flags = {"splits": "train=0.9,heldout=0.1", "dedup": True}
    build(tok, tmp_path / "one", first, second, **flags)
    monkeypatch.setattr(text_module, "PART", 5000)
    monkeypatch.setattr(text_module, "RANGE_LOW", 3000)
    monkeypatch.setattr(text_module, "BATCH", 2000)
    build(tok, tmp_path / "two", second, first, workers=3, **flags)
    assert content(tmp_path / "one", "settings.json") == content(tmp_path / "two", "settings.json")
    with gzip.open(tmp_path / "all.jsonl.gz", "wb") as f:
        f.write(second.read_bytes() + first.read_bytes())
    meta = build(tok, tmp_path / "three", tmp_path / "all.jsonl.gz", **flags)
    assert meta["counts"]["dropped"]["copies"] == 5
    for split in ("train", "heldout"):
        assert content(tmp_path / "one" / split, "meta.json") == content(
            tmp_path / "three" / split, "meta.json"
        )


def test_every_kind_of_file_gives_the_same(tok, tmp_path):
    plain = write_jsonl(tmp_path / "plain.jsonl", DOCUMENTS)
    build(tok, tmp_path / "plain", plain)
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(plain.read_bytes()[:9000]) + gzip.compress(plain.read_bytes()[9000:])
    )  # two members
    (tmp_path / "many").mkdir()
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"many/{i}.txt").write_text(document, encoding="utf-8")
    kinds = {"gz": ("a.jsonl.gz", {}), "many": ("many/*.txt", {})}
    if zstd := pytest.importorskip("zstandard", reason="optional"):
        packer = zstd.ZstdCompressor()
        (tmp_path / "a.jsonl.zst").write_bytes(
            packer.compress(plain.read_bytes()[:9000]) + packer.compress(plain.read_bytes()[9000:])
        )
        kinds["zst"] = ("a.jsonl.zst", {})
    if pa := pytest.importorskip("pyarrow", reason="optional"):
        import pyarrow.parquet as pq

        pq.write_table(
            pa.table({"n": list(range(300)), "body": DOCUMENTS}), tmp_path / "a.parquet", row_group_size=70
        )
        kinds["parquet"] = ("a.parquet", {"text_field": "body"})
    for name, (files, flags) in kinds.items():
        build(tok, tmp_path / name, tmp_path / files, **flags)
        assert content(tmp_path / name / "train", "meta.json") == content(
            tmp_path / "plain/train", "meta.json"
        ), name


def test_what_is_dropped_is_counted_and_listed(tok, tmp_path):
    a, b, c = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.txt"
    with open(a, "wb") as f:
        for line in (
            b'{"text": "Good one."}',
            b"",
            b'{"text": "  "}',
            b'{"text": "caf\xe9"}',
            b'{"text": "half \\ud83d"}',
            b'{"text": "' + b"x" * 500 + b'"}',
            b"{oops",
            b'{"other": 1}',
            b'{"text": null}',
            b"[]",
            b'{"text": "Good one."}',
            b"\xef\xbb\xbf" + b'{"text": "Good two."}\r',
        ):
            f.write(line + b"\n")
    packed = gzip.compress(b'{"text": "Good three."}\n' * 3 + os.urandom(5000).hex().encode())
    b.write_bytes(packed[: len(packed) // 2])
    c.write_text("Good four.", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:7: not JSON .*--skip_bad"):
        build(tok, tmp_path / "out", a, b, c, max_bytes=400)
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: damaged after line \d.*--skip_bad"):
        build(tok, tmp_path / "out", b, c, max_bytes=400)
    meta = build(tok, tmp_path / "out", a, b, c, max_bytes=400, skip_bad=True, dedup=True)
    counts = meta["counts"]
    assert (
        counts["dropped"]
        == {"empty": 1, "not UTF-8": 2, "over-long": 1, "damaged": 4, "contaminated": 0, "copies": 3}
        and counts["damaged_files"] == 1
    )
    assert counts["documents_in"] == 15 == counts["documents_out"] + sum(counts["dropped"].values())
    assert sorted(texts_of(tmp_path / "out/train")) == ["Good four.", "Good one.", "Good three.", "Good two."]
    listed = [json.loads(line) for line in open(tmp_path / "out/dropped.jsonl", encoding="utf-8")]
    assert [(d["line"], d["reason"]) for d in listed if d["file"] == str(a)] == [
        (4, "not UTF-8"),
        (5, "not UTF-8"),
        (6, "over-long"),
        (7, "damaged"),
        (8, "damaged"),
        (9, "damaged"),
        (10, "damaged"),
    ]
    assert any(d["reason"] == "damaged file" for d in listed)


def test_a_byte_order_mark_is_no_text(tok, tmp_path):
    mark = "\ufeff"
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{mark * (name == 'a')}Good one.", encoding="utf-8")
    write_jsonl(tmp_path / "c.jsonl", [f"{mark}Good one.", mark])
    meta = build(tok, tmp_path / "out", *sorted(tmp_path.glob("*.*")), dedup=True)
    assert texts_of(tmp_path / "out/train") == ["Good one."]
    assert meta["counts"]["dropped"]["copies"] == 2 and meta["counts"]["dropped"]["empty"] == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_git_lfs_pointer_is_no_text(tok, tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(UserError, match=f"{name}: a Git LFS pointer, not the file"):
        build(tok, tmp_path / "out", tmp_path / name, skip_bad=True)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_one_json_value_is_named(tok, tmp_path, indent, packed):
    for value in ([{"text": "Good one."}] * 3, {"text": "Good one."} if indent else [{"text": "x" * 3000}]):
        raw = json.dumps(value, indent=indent).encode()
        path = tmp_path / ("a.json.gz" if packed else "a.json")
        path.write_bytes(gzip.compress(raw) if packed else raw)
        for skip_bad in (False, True):
            with pytest.raises(UserError, match="one JSON value, expected an object on each line; make"):
                build(tok, tmp_path / "out", path, skip_bad=skip_bad, max_bytes=100)
        with pytest.raises(UserError, match="one JSON value"):
            read_jsonl(str(path), json.loads)
    raw = b'[1]\n{"text": "Good one."}'
    path.write_bytes(gzip.compress(raw) if packed else raw)
    build(tok, tmp_path / "mixed", path, skip_bad=True)
    assert texts_of(tmp_path / "mixed/train") == ["Good one."]


def test_lines_are_numbered_through_the_ranges_of_a_file(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "PART", 700)
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:50])
    raw = path.read_bytes().split(b"\n")
    raw[20], raw[41] = b"{", b"{"
    path.write_bytes(b"\n".join([b"", *raw, b"", b""]))
    with pytest.raises(UserError, match=r"a\.jsonl:22: "):
        build(tok, tmp_path / "out", path)
    build(tok, tmp_path / "out", path, skip_bad=True)
    assert [json.loads(line)["line"] for line in open(tmp_path / "out/dropped.jsonl")] == [22, 43]


def test_damaged_zst_and_parquet(tok, tmp_path):
    zstd, pq = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    packed = zstd.ZstdCompressor().compress(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS).read_bytes())
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(UserError, match="no column 'body'; it has text"):
        build(tok, tmp_path / "out", tmp_path / "a.parquet", text_field="body")
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.parquet").write_bytes(whole[:50] + b"\xff" * 200 + whole[250:])
    for name in ("a.jsonl.zst", "a.parquet", "b.parquet"):
        with pytest.raises(UserError, match=f"{name}: damaged after"):
            build(tok, tmp_path / "out", tmp_path / name)


def test_missing_packages_are_named(tok, tmp_path, monkeypatch):
    for name, module in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"x")
        for loaded in (module, f"{module}.parquet"):
            monkeypatch.setitem(sys.modules, loaded, None)
        with pytest.raises(UserError, match=f"{name}: needs {module}; pip install {module}"):
            build(tok, tmp_path / "out", tmp_path / name)


def test_a_full_disk_is_one_line_and_the_run_goes_on(tok, tmp_path, monkeypatch):
    path, put = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), text_module.put
    build(tok, tmp_path / "good", path)

    def full(target, buffers):
        if target.suffix == ".npz":
            raise OSError(errno.ENOSPC, "No space left on device")
        put(target, buffers)

    monkeypatch.setattr(text_module, "put", full)
    with pytest.raises(UserError, match="the disk is full; make room, and the same command goes on"):
        build(tok, tmp_path / "out", path)
    monkeypatch.setattr(text_module, "put", put)
    build(tok, tmp_path / "out", path)
    assert content(tmp_path / "out") == content(tmp_path / "good")


def test_a_run_that_goes_on_refuses_other_input_and_other_settings(tok, tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with monkeypatch.context() as m:
        m.setattr(text_module, "join", lambda *_: (_ for _ in ()).throw(UserError("stop")))
        with pytest.raises(UserError, match="stop"):
            build(tok, tmp_path / "out", path)
    with pytest.raises(UserError, match="--seed=0 became 1"):
        build(tok, tmp_path / "out", path, seed=1)
    path.write_text(path.read_text() + '{"text": "More."}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: changed since this run began"):
        build(tok, tmp_path / "out", path)
    build(tok, tmp_path / "new", path)
    capsys.readouterr()
    build(tok, tmp_path / "new", path)
    assert "complete already" in capsys.readouterr().out and not (tmp_path / "new/work").exists()


def test_flags_can_be_mended_when_nothing_was_made(tok, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS, "content")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no field 'text' .--text_field.; there are id, content"):
        build(tok, tmp_path / "out", path)
    assert not (tmp_path / "out").exists()
    build(tok, tmp_path / "out", path, text_field="content")


# -------------------------------------------------------------------------- splits


def test_paper_splits():
    of = split_of(np.arange(100_000), 100_000, None)
    train = [i for i in range(100_000) if i % 1000]  # the paper's train file, by line
    expected = {i: 0 for i in range(0, 100_000, 1000)} | {
        i: 1 if j % 20 == 0 else 2 if j % 20 in (13, 14, 15, 16) else 3 for j, i in enumerate(train)
    }
    assert of.tolist() == [expected[i] for i in range(100_000)]


def test_splits_in_folders(tok, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    build(tok, tmp_path / "all", path)
    order = texts_of(tmp_path / "all/train")
    meta = build(tok, tmp_path / "paper", path, splits="paper")
    assert {name: c["n_docs"] for name, c in meta["splits"].items()} == {
        "validation": 1,
        "warm": 15,
        "bootstrap": 60,
        "rest": 224,
    }
    assert (
        texts_of(tmp_path / "paper/warm") == order[1::20]
        and texts_of(tmp_path / "paper/validation") == order[:1]
    )
    meta = build(tok, tmp_path / "share", path, splits="a=0.5,b=0.3,c=0.2")
    assert [c["n_docs"] for c in meta["splits"].values()] == [150, 90, 60] and texts_of(
        tmp_path / "share/b"
    ) == order[150:240]
    with pytest.raises(UserError, match="300 documents leave none for c"):
        build(tok, tmp_path / "none", path, splits="a=0.5,b=0.499,c=0.001")


# ----------------------------------------------------------------- decontamination

QUESTIONS = [
    "Janet has 16 eggs per day and eats three for breakfast every morning; "
    "how many are left for the café at 2 per egg?",
    "What is the sum of the first five odd primes?",
    "Compute 2 + 2.",
    "Find x.",
    "A a b c d e f g h i j k l m n o p?",
]


def test_decontamination():
    finder = Finder(QUESTIONS)
    hits = [
        "JANET HAS 16 EGGS\nper day   and eats three, for breakfast; every morning! More text.",
        "x " * 50 + QUESTIONS[0].replace("é", "e\u0301").upper(),
        "so what IS the sum-of the first: five odd primes",
        "compute\n(2+2)",
        " Find X ",
        "a A b,c d e f g h i j k l m n o p",
    ]
    misses = [
        "has 16 eggs per day and eats three for breakfast every",
        "Janet has 116 eggs per day and eats three for breakfast, every",
        "",
        "\0",
        "Janet has 16 eggs per day and eats two for breakfast every morning; how many are left",
        "what is the sum of the first five odd primers",
        "somewhat is the sum of the first five odd primes",
        "Compute 2 + 2 and more",
        "Find x. Then y.",
    ]
    texts = hits + misses
    random.Random(0).shuffle(texts)
    assert {texts[i] for i in finder.find(texts)} == set(hits)
    assert finder.find([]) == {} or finder.find([""]) == {}


def test_letters():
    assert letters(fold("A 1,000.5\u00a0É\u0301 ﬁx_y «Straße»")) == "a10005efixystrasse".encode()


@needs_shared
def test_planted_questions_are_found_and_nothing_else(tok, tmp_path):
    """A tenth of the figure in the README: 2,000 documents; against a slow search that shares no code."""
    rng, data = random.Random(1), SHARED / "data/gsm8k"
    questions, documents = (
        read(data / "test.jsonl", "question"),
        read(data / "train.jsonl", "question", "answer")[:2000],
    )
    holders = rng.sample(range(2000), 50)
    for i, question in zip(holders, rng.sample(questions, 50)):
        documents[i] += "\n" + planted(question, rng)
    words = lambda text: re.findall(r"[a-z0-9]+", text.lower())  # noqa: E731
    grams = {tuple(w[i : i + 13]) for w in map(words, questions) for i in range(len(w) - 12)}
    slow = {
        d
        for d in documents
        if any(tuple(w[i : i + 13]) in grams for w in [words(d)] for i in range(len(w) - 12))
    }
    meta = build(
        tok,
        tmp_path / "out",
        write_jsonl(tmp_path / "a.jsonl", documents),
        decontaminate=f"{data}/test.jsonl",
    )
    kept = set(texts_of(tmp_path / "out/train"))
    assert not kept & {documents[i] for i in holders} and meta["counts"]["dropped"]["contaminated"] == len(
        documents
    ) - len(kept)
    dropped = set(documents) - kept
    assert slow <= dropped and dropped <= slow | {documents[i] for i in holders} and len(dropped) < 55
    listed = [json.loads(line) for line in open(tmp_path / "out/dropped.jsonl")]
    assert {d["line"] - 1 for d in listed} >= set(holders) and all(
        len(d["note"].split()) >= 8 for d in listed
    )


def test_the_same_as_a_slow_search_on_random_words():
    rng = random.Random(2)
    vocabulary = [f"w{i:02d}" for i in range(12)]
    for _ in range(30):
        questions = [" ".join(rng.choices(vocabulary, k=rng.randint(11, 18))) for _ in range(5)]
        texts = [
            " ".join(
                rng.choices(vocabulary, k=20)
                + rng.choice(questions).split()[rng.randint(0, 3) :]
                + rng.choices(vocabulary, k=5)
            )
            for _ in range(40)
        ]

        def holds(text: str) -> bool:
            joined = f" {text} "
            runs = [q.split()[i : i + 13] for q in questions for i in range(max(len(q.split()) - 12, 1))]
            return any(f" {' '.join(run)} " in joined for run in runs)

        assert set(Finder(questions).find(texts)) == {i for i, text in enumerate(texts) if holds(text)}


# --------------------------------------------------------------------------- kills

SMALL = """
import data.text as t

t.PART = t.RANGE_LOW = {part}
t.RANGES = 1000
t.BATCH = 3000
t.run(t.main, t.Settings)
"""


def kill_and_go_on(tok: Path, tmp_path: Path, kills: int, copies: int) -> None:
    rng = random.Random(kills)
    path = write_jsonl(tmp_path / "a.jsonl", [perturbed(d, rng) for d in DOCUMENTS * copies])
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as f:
        f.write(write_jsonl(tmp_path / "b.txt", [perturbed(d, rng) for d in DOCUMENTS * copies]).read_bytes())
    command = [
        sys.executable,
        "-c",
        SMALL.format(part=20_000),
        str(path),
        str(tmp_path / "b.jsonl.gz"),
        f"--tokenizer={tok}",
        "--workers=2",
        "--dedup",
        "--splits=paper",
    ]
    begin, whole, out = time.time(), tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, f"--out_dir={whole}"], cwd=ROOT, check=True, capture_output=True)
    spent, hit = time.time() - begin, 0
    while hit < kills:
        process = subprocess.Popen([*command, f"--out_dir={out}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(0.3 + rng.random() * (spent - 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            hit += 1
        else:  # it got to its end: once more from the start
            assert process.returncode == 0 and content(out) == content(whole)
            shutil.rmtree(out)
    subprocess.run([*command, f"--out_dir={out}"], cwd=ROOT, check=True, capture_output=True)
    assert content(out) == content(whole) and (out / "meta.json").exists()


def test_killed_three_times(tok, tmp_path):
    kill_and_go_on(tok, tmp_path, 3, 5)


@pytest.mark.long
def test_killed_twenty_times(tok, tmp_path):
    kill_and_go_on(tok, tmp_path, 20, 60)


def test_interrupt_ends_in_one_line_and_no_worker_stays(tok, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 200)
    command = [
        sys.executable,
        "-c",
        SMALL.format(part=100_000),
        str(path),
        f"--tokenizer={tok}",
        "--workers=2",
        f"--out_dir={tmp_path / 'out'}",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(200):
        if list((tmp_path / "out").glob("work/tokens-*.npz")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and err.strip().count("\n") == 0 and "the same command goes on" in err
    time.sleep(0.3)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def dies(number):
    os.kill(os.getpid(), signal.SIGKILL)
    yield number


def test_a_worker_that_is_killed_is_reported(tok, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a worker was ended from outside"):
        list(text_module.spread(dies, [(0,), (1,)], 2))


# -------------------------------------------------------------------- command line


def test_settings_with_words():
    @dataclasses.dataclass(kw_only=True)
    class Both:
        files: list = opt(help="what to read")
        n: int = opt(1, "a number")

    s = read_settings(Both, ["a", "--n=3", "-", "b c"])
    assert s.files == ["a", "-", "b c"] and s.n == 3
    with pytest.raises(UserError, match=r"FILE \.\.\. is required: what to read"):
        read_settings(Both, ["--n=2"])
    with pytest.raises(UserError, match="--files: no such setting"):
        read_settings(Both, ["--files=a"])
    assert (
        "  FILE ... " in help_text(Both, "doc")
        and "--n=int" in help_text(Both, "doc")
        and "--files" not in help_text(Both, "doc")
    )

    @dataclasses.dataclass(kw_only=True)
    class Flags:
        n: int = opt(1, "a number")

    with pytest.raises(UserError, match="--name=value"):
        read_settings(Flags, ["a"])


WRONG = [
    (["x.jsonl"], "x.jsonl: no such file"),
    (["*.nothing"], "no file fits this pattern"),
    (["data"], "data: a folder"),
    (["README.md", "--splits=a=2"], "--splits=a=2"),
    (["README.md", "--splits=a=0.5,b=0.4"], "sum to 0.9"),
    (["README.md", "--dedupe"], "did you mean --dedup?"),
    (["README.md", "--decontaminate=no.jsonl"], "no.jsonl: no such file"),
    (["LICENSE"], "rename it by what it is"),
    ([], "FILE ... is required"),
    (["/dev/null"], "rename it"),
]


@pytest.mark.parametrize("flags,message", WRONG, ids=[" ".join(f) for f, _ in WRONG])
def test_wrong_input_ends_in_one_line(flags, message, tok, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    err = inside(text_module, *flags, f"--tokenizer={tok}", f"--out_dir={tmp_path / 'out'}", code=1).stderr
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help():
    text = script("data/text.py", "--help").stdout
    assert "python data/text.py FILE" in text and all(
        f"--{f.name}=" in text for f in dataclasses.fields(Settings) if f.name != "files"
    )


def test_empty_input_is_refused(tok, tmp_path):
    for content, why in (
        ("\n\n", "of 0 documents"),
        ('{"text": " "}\n{"text": ""}', "of 2 documents .2 empty"),
    ):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match=f"no document is left {why}"):
            build(tok, tmp_path / "out", tmp_path / "a.jsonl")
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- hostile input


def test_an_empty_file_is_no_trouble(tok, tmp_path):
    for name, said in (
        ("a.jsonl", "of 0 documents"),
        ("a.txt", "of 1 documents .1 empty"),
        ("a.jsonl.gz", "of 0 documents"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=said):
            build(tok, tmp_path / "out", tmp_path / name)
    assert (
        build(tok, tmp_path / "out", tmp_path / "a.jsonl", write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[:3]))[
            "counts"
        ]["documents_in"]
        == 3
    )


def test_half_surrogates_in_fields_and_file_names_can_be_listed(tok, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_bytes(b'{"text": "Good."}\n{"\\ud800": 1}\n')
    build(tok, tmp_path / "out", path, skip_bad=True)
    (listed,) = [json.loads(line) for line in open(tmp_path / "out/dropped.jsonl", encoding="utf-8")]
    assert listed["file"] == str(path) and "there are \ud800" in listed["note"]
    (tmp_path / "a.jsonl").write_text('{"a\\nb": 1}\n')
    with pytest.raises(UserError, match="there are a b; mend it"):
        build(tok, tmp_path / "one", tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["work", "train", "meta.json"])
def test_nothing_of_the_users_is_removed(tok, tmp_path, name):
    mine = tmp_path / "out" / name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    for text in ('{"text": "Good."}\n', "{"):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(
            UserError, match=f"out/{name}: is there already; remove it or give another --out_dir"
        ):
            build(tok, tmp_path / "out", tmp_path / "a.jsonl")
        assert mine.exists() and not (tmp_path / "out/settings.json").exists()


def test_a_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine.txt").write_text("x")
    with pytest.raises(UserError, match="c: holds other files; remove it or give another --out_dir"):
        write_corpus(tmp_path / "c", [[("a", False)]], make_tokenizer(), {})
    assert (tmp_path / "c/mine.txt").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_txt_files_are_read_once_when_cut_off(tok, tmp_path, monkeypatch, packed):
    for i, document in enumerate(DOCUMENTS[:6]):
        raw = document.encode()
        (tmp_path / f"{i}.txt{'.gz' * packed}").write_bytes(gzip.compress(raw) if packed else raw)
    put = text_module.put

    def stops(target, buffers):
        put(target, buffers)
        if target.suffix == ".json":
            raise UserError("stop")

    monkeypatch.setattr(text_module, "PART", 80)  # of which each document is more
    for _ in range(8):
        monkeypatch.setattr(text_module, "put", stops)
        with contextlib.suppress(UserError):
            build(tok, tmp_path / "out", tmp_path / "*.txt*")
    monkeypatch.setattr(text_module, "put", put)
    assert build(tok, tmp_path / "out", tmp_path / "*.txt*")["counts"]["documents_in"] == 6
    assert sorted(texts_of(tmp_path / "out/train")) == sorted(DOCUMENTS[:6])


def test_many_splits(tok, tmp_path):
    names = [f"s{i}" for i in range(300)]
    meta = build(
        tok,
        tmp_path / "out",
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS),
        splits=",".join(f"{n}={1 / 300}" for n in names),
    )
    assert (
        sorted(sum((texts_of(tmp_path / "out" / n) for n in names), [])) == sorted(DOCUMENTS)
        and len(meta["splits"]) == 300
    )


def test_the_papers_splits_need_fifteen_documents(tok, tmp_path):
    assert {
        c["n_docs"]
        for c in build(
            tok, tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:15]), splits="paper"
        )["splits"].values()
    } == {1, 12}
    with pytest.raises(UserError, match="14 documents leave none for bootstrap"):
        build(tok, tmp_path / "b", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:14]), splits="paper")


def test_parts_are_small_however_short_the_documents(tok, tmp_path, monkeypatch):
    """A document takes memory beside its text, and so does a dropped one: both bound parts and ranges."""
    write_jsonl(tmp_path / "one.jsonl", map(str, range(5000)))
    (tmp_path / "a.jsonl").write_text('{"text": "Good."}\n' + "{\n" * 5000)
    monkeypatch.setattr(text_module, "PART", 300_000)
    monkeypatch.setattr(text_module, "RANGE_LOW", 300_000)
    monkeypatch.setattr(text_module.shutil, "rmtree", lambda path, **_: None)
    build(tok, tmp_path / "one", tmp_path / "one.jsonl")
    build(tok, tmp_path / "two", tmp_path / "a.jsonl", skip_bad=True)
    for name in ("one", "two"):
        assert (
            max(
                read_json(part)["kept"] + len(read_json(part)["dropped"])
                for part in (tmp_path / name / "work").glob("scan-*.json")
            )
            <= 1000
        )
    assert max(len(np.load(part)["bytes"]) for part in (tmp_path / "one/work").glob("tokens-*.npz")) < 1500


def value_and_peak(expression: str) -> list[int]:
    """What it gives in a process of its own, and the megabytes that process held at most."""
    code = f"""
import re
from data.lib.sources import *

value = {expression}
status = open("/proc/self/status").read()
print(value, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024)
"""
    return list(
        map(
            int,
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.split(),
        )
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_parquet_in_little_memory_and_by_row(tok, tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    bad = pa.array([b"Good one.", b"caf\xe9", b"Good two.", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet:4: field 'text' is null"):
        build(tok, tmp_path / "out", tmp_path / "a.parquet")
    dropped = build(tok, tmp_path / "out", tmp_path / "a.parquet", skip_bad=True)["counts"]["dropped"]
    assert (
        dropped["not UTF-8"] == 1
        and dropped["damaged"] == 1
        and texts_of(tmp_path / "out/train") in (["Good one.", "Good two."], ["Good two.", "Good one."])
    )
    line = "".join(random.Random(0).choices("abcdefghijkl ", k=2000))
    pq.write_table(
        pa.table({"text": [f"{i} {line}" for i in range(50_000)]}),
        tmp_path / "b.parquet",
        row_group_size=10**9,
        use_dictionary=False,
        compression="none",
    )
    code = f"sum(1 for _ in texts({str(tmp_path / 'b.parquet')!r}, Wanted('text', 10**6), 0, 1 << 62))"
    n, megabytes = value_and_peak(code)
    assert n == 50_000 and megabytes < 130, "the row group has 100 MB"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_what_unpacks_to_a_thousandfold_takes_little_memory(tmp_path, codec):
    raw = b"{" + b" " * (1 << 27) + b"}\nx\n"
    packed = (
        gzip.compress(raw, 1)
        if codec == ".gz"
        else pytest.importorskip("zstandard").ZstdCompressor().compress(raw)
    )
    (tmp_path / f"a{codec}").write_bytes(packed)
    stream = f"open_stream({str(tmp_path / f'a{codec}')!r}, {codec!r})[0]"
    n, megabytes = value_and_peak(f"[at for at, _ in lines({stream}, 0, 1 << 62, 1 << 20)][-1]")
    assert n == len(raw) and megabytes < 130


def test_links_and_the_same_name_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    os.symlink("a.txt", "b.txt")
    assert expand(["b.txt", "a.txt", "*.txt"]) == ["a.txt", "b.txt"]
    os.symlink("nowhere", "c.txt")
    with pytest.raises(UserError, match="c.txt: no such file"):
        expand(["*.txt"])


def test_a_file_that_changes_while_it_is_read(tok, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    monkeypatch.setattr(
        text_module, "borders_of", lambda parts, of=text_module.borders_of: (os.utime(path), of(parts))[1]
    )
    with pytest.raises(UserError, match=r"a\.jsonl: changed since this run began"):
        build(tok, tmp_path / "out", path)


def test_a_file_that_cannot_be_opened_leaves_nothing_behind(tok, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("data.lib.sources.open_stream", refused)
    with pytest.raises(PermissionError):
        build(tok, tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- sources


def test_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "[x].txt", "deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*words):
        return [os.path.relpath(n, tmp_path) for n in expand([str(tmp_path / w) for w in words])]

    assert (
        names("*.txt", "a.txt") == ["[x].txt", "a.txt", "b.txt"]
        and names("[x].txt") == ["[x].txt"]
        and "deep/c.txt" in names("**/*.txt")
    )


def test_a_line_without_end_takes_no_memory(tmp_path):
    (tmp_path / "a").write_bytes(b"ab\n" + b"x" * 100_000 + b"\ncd")
    with open(tmp_path / "a", "rb") as f:
        assert list(lines(f, 0, 1 << 60, 1000)) == [(3, b"ab\n"), (100_004, None), (100_006, b"cd")]


def test_read_jsonl(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write('{"a": 1}\n{\n')
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:2: .*mend it"):
        read_jsonl(str(tmp_path / "a.jsonl.gz"), json.loads)
    assert read_jsonl(str(tmp_path / "a.jsonl.gz"), json.loads, skip_bad=True) == [{"a": 1}]


def test_texts_side_by_side_are_encoded_apart(tok):
    ours = load_tokenizer(tok)
    texts = ["One.", " Two <|never|> three", "", "数学 🎉", "<|END_OF_LATENT|>"]
    for some in (texts, [text for text in texts if "never" not in text], [], [""]):
        ids, lengths, n_cut = ours.encode_documents([[text] for text in some])
        assert ids.tolist() == [i for text in some for i in ours.encode(text)] and not n_cut
        assert lengths.tolist() == [len(ours.encode(text)) for text in some]


@needs_shared
def test_documents_have_the_ids_of_their_whole_texts(tmp_path):
    """From text.py's folders; and it counts the borders of chunks that lie inside a token."""
    llama = load_tokenizer(SHARED / "data/llama2")
    documents = [*DOCUMENTS, "a" + "word" * 26_000]  # cut where no token ends, into 26 sentences
    meta = build(SHARED / "data/llama2", tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", documents))
    corpus, found = open_corpus(tmp_path / "out/train"), texts_of(tmp_path / "out/train")
    assert sorted(found) == sorted(documents) and corpus.n_chunks > 2 * corpus.n_docs
    same = []
    for text, a, b in zip(found, corpus.chunks[corpus.docs], corpus.chunks[corpus.docs[1:]]):
        same.append(corpus.tokens[a:b].tolist() == llama.encode(text))
    assert same == [text in DOCUMENTS for text in found]
    assert meta["counts"]["chunk_borders_inside_tokens"] == np.diff(corpus.docs)[same.index(False)] - 1 > 0
