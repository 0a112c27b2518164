"""From raw text to corpora: read, clean, shuffle, split, cut into chunks, encode.

    python data/text.py FILE... --tokenizer=TinyLlama --out_dir=out/text
    python data/text.py "pages/*.parquet" --tokenizer=T --out_dir=out/math --splits=paper

FILE is jsonl, parquet or txt (a document each), compressed (.gz, .zst) or not, or a
quoted pattern. Each split becomes a corpus folder in --out_dir:

    --splits=train=0.98,heldout=0.02   shares of the shuffled documents
    --splits=paper                     validation: i % 1000 == 0 for the index i; of the
                                       others, counted anew, warm: i % 20 == 0,
                                       bootstrap: i % 20 in 13..16; and the rest

A document is left out when it is empty, not UTF-8, longer than --max_bytes, a
second copy (--dedup) or holds a benchmark's question (--decontaminate: see
data/lib/decontaminate.py). meta.json has the count of each kind: documents in =
documents out + those. dropped.jsonl lists file, line and reason, but not of the
empty ones and the copies. A damaged line or file stops the run; with --skip_bad
it is counted as well.

Order and chunks depend on text and seed alone. So the folders are the same, byte
for byte, for any number of workers and any order of files. Finished tasks are kept
when a run is cut off:

    scan     32 MB or a packed file -> documents, sorted by hash
             work/scan-TASK-PART.text, .index, .json, and scan-TASK.done
    encode   a range of hashes, from all tasks -> chunks as tokens
             work/tokens-RANGE.bin, .npz
    join     -> the corpus folders and meta.json; work/ is removed
"""

import contextlib
import errno
import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

# Run as `python data/text.py`, its package is the folder above.
if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data.lib.chunking import chunk, text_digest
from data.lib.cli import Progress, UserError, claim, hold, new_folder, opt, read_json, run, write_json
from data.lib.corpus import CorpusWriter, token_dtype
from data.lib.decontaminate import Finder
from data.lib.sources import Bad, Damaged, Found, Wanted, expand, kind_of, lines, read_jsonl, sizes, texts
from data.lib.tokenizer import Tokenizer, load_tokenizer

# Sizes in bytes
PART = 32 << 20  # of text in a part of the scan, and of input in a task
BATCH = 1 << 19  # of text that is decontaminated or encoded at a time
RANGE_LOW = 4 << 20  # of text in a range of hashes, at least
RANGE_HIGH = 32 << 20  # and at most
COST = 300  # of memory for a document beside its text, or for one left out
ROW = 24  # of an index: two halves of the hash, bytes of text

RANGES = 64  # of hashes, unless they get too small
TO_THE_END = 1 << 62


@dataclass(kw_only=True)
class Settings:
    files: list = opt(help="jsonl, parquet, txt, also .gz and .zst")
    tokenizer: str = opt(help="tokenizer.json of the model to be trained, or its folder")
    out_dir: str = opt(help="where the corpus folders go")
    text_field: str = opt("text", "the field or column that holds the text")
    splits: str = opt("train=1", "paper, or name=share,... that sum to 1")
    decontaminate: str = opt("", "benchmark files: jsonl with question, problem or text; commas between")
    dedup: bool = opt(False, "keep one of several documents with the same text")
    skip_bad: bool = opt(False, "leave out and count damaged lines and the rest of damaged files")
    max_bytes: int = opt(5_000_000, "longer documents are left out", low=1)
    seed: int = opt(0, "another seed, another order and other chunks")
    workers: int = opt(0, "processes; 0: one for each core", low=0)


@lru_cache(maxsize=1)
def tokenizer_of(path: str) -> Tokenizer:
    return load_tokenizer(path)


# -------------------- splits

PAPER = ("validation", "warm", "bootstrap", "rest")


def read_splits(spec: str) -> dict[str, float] | None:
    """{name: share} of --splits; None: the paper's. UserError when it is neither."""
    if spec == "paper":
        return None
    shares: dict[str, float] = {}
    for item in spec.split(","):
        name, _, share = item.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1
        taken = name in shares or name == "work"
        if taken or not re.fullmatch(r"\w[\w-]*", name) or not 0 < value <= 1:
            raise UserError(
                f"--splits={spec}: expected paper, or name=share,... as in "
                f"train=0.98,heldout=0.02; {item!r} is none"
            )
        shares[name] = value
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"--splits={spec}: the shares sum to {total:g}, expected 1")
    return shares


def split_of(index: np.ndarray, n_docs: int, shares: dict[str, float] | None) -> np.ndarray:
    """[n]: the number of the split of each document, by its index in the shuffle."""
    if shares is not None:
        begins = np.cumsum([0, *shares.values()]) * n_docs
        begins = np.round(begins).astype(np.int64)
        return np.searchsorted(begins[1:-1], index, side="right")
    # As in BoLT's prepare_hf_datasets.sh: every 1000th line is for validation;
    # what is left is split by its own line numbers.
    residue = (index - index // 1000 - 1) % 20
    bootstrap = (residue >= 13) & (residue <= 16)
    return np.select([index % 1000 == 0, residue == 0, bootstrap], [0, 1, 2], 3)


# -------------------- scan


class Piece(NamedTuple):
    """What begins in [start, end) of a file, in bytes."""

    path: str
    start: int
    end: int


def plan(files: list[str]) -> list[list[Piece]]:
    """The input as tasks of about PART bytes each."""
    tasks: list[list[Piece]] = []
    room = 0
    for path in files:
        for piece in pieces_of(path):
            weight = min(PART, os.path.getsize(path) - piece.start)
            if not tasks or weight > room:
                tasks.append([])
                room = PART
            tasks[-1].append(piece)
            room -= max(weight, 1 << 12)  # many tiny files are work, too
    return tasks


def pieces_of(path: str) -> list[Piece]:
    """Only files of plain lines can be read from the middle."""
    size = os.path.getsize(path)
    by_line = kind_of(path) == ("jsonl", "")
    starts = range(0, size, PART) if by_line and size else [0]
    return [Piece(path, a, b) for a, b in zip(starts, [*starts[1:], TO_THE_END])]


def questions_of(path: str) -> list[str]:
    """The questions of a benchmark file."""

    def parse(line: str) -> str:
        record = json.loads(line)
        for field in ("question", "problem", "text"):
            if isinstance(record, dict) and isinstance(record.get(field), str):
                return record[field]
        raise ValueError("no field question, problem or text")

    return read_jsonl(path, parse)


@lru_cache(maxsize=1)
def finder_of(paths: str) -> Finder | None:
    """What looks for the questions of these files, commas between; or None."""
    if not paths:
        return None
    questions = [q for path in paths.split(",") if path for q in questions_of(path)]
    if not questions:
        raise UserError(f"--decontaminate={paths}: holds no question")
    return Finder(questions)


class Part:
    """Documents on their way into one part of the scan, and what was left out."""

    def __init__(self):
        self.raws: list[bytes] = []
        self.places: list[tuple[int, int]] = []  # (piece, line) of each document
        self.size = 0  # bytes of memory
        self.counts = Counter()  # {reason: documents left out}
        self.dropped: list[list] = []  # [piece, line, reason, note]
        # {piece: its lines in this part}; all line numbers here are counted so
        self.lines = Counter()

    def add(self, piece: int, found: Found) -> None:
        """Add what was found in a piece: a document, or the reason why there is none."""
        self.lines[piece] += found.line > 0  # line 0 is the file itself
        if found.text is None:
            return
        if isinstance(found.text, Bad):
            self.drop(piece, self.lines[piece], found.text)
        else:
            self.raws.append(found.text)
            self.places.append((piece, self.lines[piece]))
            self.size += len(found.text)
        self.size += COST

    def drop(self, piece: int, line: int, bad: Bad) -> None:
        self.counts[bad.reason] += 1
        if bad.reason != "empty":
            self.dropped.append([piece, line, bad.reason, str(bad)])

    def decontaminate(self, finder: Finder) -> None:
        kept = []
        for first, last in batches([len(raw) for raw in self.raws]):
            found = finder.find([raw.decode() for raw in self.raws[first:last]])
            for i in range(first, last):
                if i - first in found:
                    _, words = found[i - first]
                    self.drop(*self.places[i], Bad("contaminated", words))
                else:
                    kept.append(self.raws[i])
        self.raws = kept

    def write(self, name: Path, s: Settings) -> None:
        """Write the documents in the order of their hashes."""
        finder = finder_of(s.decontaminate)
        if finder:
            self.decontaminate(finder)
        order = sorted((text_digest(raw, s.seed), raw) for raw in self.raws)
        self.raws = []
        digests = b"".join(digest for digest, _ in order)
        index = np.zeros((len(order), 3), dtype="<u8")  # [documents, 3]
        index[:, :2] = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
        index[:, 2] = [len(raw) for _, raw in order]
        put(name.with_suffix(".text"), (raw for _, raw in order))
        put(name.with_suffix(".index"), [index.tobytes()])
        said = {"kept": len(order), "counts": self.counts}
        said |= {"lines": self.lines, "dropped": self.dropped}
        put(name.with_suffix(".json"), [json.dumps(said).encode()])


def put(path: Path, buffers) -> None:
    """Write a file of work/ under a name of this process, then rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        f.writelines(buffers)
    os.replace(temporary, path)


def scan(s: Settings, work: Path, number: int, pieces: list[Piece]) -> Iterator[int]:
    """Write the documents of one task in parts; yields how many bytes are read."""
    name = f"scan-{number:05d}"
    on_disk = [min(os.path.getsize(p.path), p.end) - p.start for p in pieces]
    if not (work / f"{name}.done").exists():
        part = Part()
        n_parts = 0
        for i, piece in enumerate(pieces):
            for found in read_piece(s, piece):
                part.add(i, found)
                if part.size >= PART:
                    part.write(work / f"{name}-{n_parts:05d}", s)
                    part = Part()
                    n_parts += 1
                    yield sum(on_disk[:i]) + found.on_disk - piece.start
        part.write(work / f"{name}-{n_parts:05d}", s)
        put(work / f"{name}.done", [])
    yield sum(on_disk)


def read_piece(s: Settings, piece: Piece) -> Iterator[Found]:
    """What is found in a piece; UserError at what is damaged, unless it is counted."""
    want = Wanted(s.text_field, s.max_bytes)
    try:
        for found in texts(piece.path, want, piece.start, piece.end):
            if not s.skip_bad:
                refuse_damage(piece, found)
            yield found
    except Damaged as e:
        if not s.skip_bad:
            raise UserError(f"{piece.path}: {e}; mend it, or use what comes before with --skip_bad") from None
        yield Found(0, os.path.getsize(piece.path), Bad("damaged file", str(e)))


def refuse_damage(piece: Piece, found: Found) -> None:
    """UserError for a damaged line, with its number in the whole file."""
    bad = found.text
    if not isinstance(bad, Bad) or bad.reason != "damaged":
        return
    with open(piece.path, "rb") as f:
        before = sum(1 for _ in lines(f, 0, piece.start, 1 << 20))
    raise UserError(f"{piece.path}:{before + found.line}: {bad}; mend it or give --skip_bad")


# -------------------- encode


class Document(NamedTuple):
    """Documents are sorted as these tuples are."""

    first: int  # half of the hash
    second: int
    raw: bytes


def read_index(part: Path, first: int = 0, last: int | None = None) -> np.ndarray:
    """[documents, 3] of a part's index: two halves of the hash, bytes of text."""
    count = -1 if last is None else 3 * (last - first)
    path = part.with_suffix(".index")
    return np.fromfile(path, "<u8", count, offset=first * ROW).reshape(-1, 3)


def borders_of(parts: list[Path]) -> np.ndarray:
    """Where each range of hashes begins in each part.

    [parts, ranges + 1, 2]: the number of a document, and the byte of its text.
    """
    edges = range_edges(parts)
    borders = []
    for part in parts:
        index = read_index(part)
        rows = [0, *np.searchsorted(index[:, 0], edges, side="left"), len(index)]
        offsets = np.append(0, np.cumsum(index[:, 2].astype(np.int64)))
        borders.append(np.stack([rows, offsets[rows]], axis=1))
    return np.stack(borders)


def range_edges(parts: list[Path]) -> np.ndarray:
    """[ranges - 1]: the first hash of each range but the first."""
    total = 0
    for part in parts:
        total += part.with_suffix(".text").stat().st_size
        total += part.with_suffix(".index").stat().st_size // ROW * COST
    n = -(-total // min(max(total // RANGES, RANGE_LOW), RANGE_HIGH))
    return np.array([i * 2**64 // n for i in range(1, n)], dtype=np.uint64)


def documents_of(parts: list[Path], borders: np.ndarray) -> list[Document]:
    """The documents of a range of hashes, in order. borders: [parts, 2, 2]"""
    found = []
    for part, ((row, start), (row_end, _)) in zip(parts, borders.tolist()):
        with open(part.with_suffix(".text"), "rb") as f:
            f.seek(start)
            for first, second, size in read_index(part, row, row_end).tolist():
                found.append(Document(first, second, f.read(size)))
    return sorted(found)


def encode(s: Settings, work: Path, number: int, parts: list[Path], borders: np.ndarray) -> Iterator[int]:
    """Write the tokens of one range of hashes; yields how many bytes of text it was."""
    name = work / f"tokens-{number:05d}"
    if not name.with_suffix(".npz").exists():
        documents = documents_of(parts, borders)
        n_found = len(documents)
        if s.dedup:  # copies have the same hash, so they are neighbours
            documents = [document for document, _ in groupby(documents)]
        write_tokens(s, name, documents, n_copies=n_found - len(documents))
    yield int((borders[:, 1, 1] - borders[:, 0, 1]).sum())


def write_tokens(s: Settings, name: Path, documents: list[Document], n_copies: int) -> None:
    """Write the tokens of a range; the .npz, last, makes it complete.

    It holds `lengths` (tokens of each chunk), `chunks` and `bytes` (of each
    document), and `counts`: copies, and borders of chunks inside a token.
    """
    tok = tokenizer_of(s.tokenizer)
    sizes = [len(document.raw) for document in documents]
    tokens = []
    lengths = [np.zeros(0, np.uint32)]
    chunks = []
    n_cut = 0
    for first, last in batches(sizes):
        pieces = chunks_of(documents[first:last])
        ids, counts, cut = tok.encode_documents(pieces)
        n_cut += cut
        tokens.append(ids.astype(token_dtype(tok.n_vocab)).tobytes())
        lengths.append(counts.astype(np.uint32))
        chunks += map(len, pieces)
    put(name.with_suffix(".bin"), tokens)
    arrays = {"lengths": np.concatenate(lengths), "chunks": np.array(chunks, np.uint32)}
    arrays["bytes"] = np.array(sizes, np.uint32)
    arrays["counts"] = [n_copies, n_cut]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    put(name.with_suffix(".npz"), [buffer.getvalue()])


def chunks_of(documents: list[Document]) -> list[list[str]]:
    halves = [(d.first.to_bytes(8, "big"), d.second.to_bytes(8, "big")) for d in documents]
    digests = [first + second for first, second in halves]
    return chunk([d.raw.decode() for d in documents], digests)


def batches(sizes: list[int]) -> list[tuple[int, int]]:
    """[(first, last + 1), ...]: runs of documents of about BATCH bytes."""
    borders = [0]
    room = BATCH
    for i, size in enumerate(sizes):
        room -= size
        if room <= 0 or i + 1 == len(sizes):
            borders.append(i + 1)
            room = BATCH
    return list(zip(borders, borders[1:]))


# -------------------- join


def join(s: Settings, out: Path, work: Path, n_ranges: int, n_docs: int, source: dict) -> dict:
    """The corpus folders from the tokens of all ranges; {split: counts}."""
    shares = read_splits(s.splits)
    names = list(shares or PAPER)
    tok = tokenizer_of(s.tokenizer)
    progress = Progress("join", n_ranges, "ranges")
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(new_folder(out / name)) for name in names]
        writers = [CorpusWriter(folder, tok) for folder in folders]
        index = 0
        for number in range(n_ranges):
            name = work / f"tokens-{number:05d}"
            tokens = np.fromfile(name.with_suffix(".bin"), dtype=token_dtype(tok.n_vocab))
            with np.load(name.with_suffix(".npz")) as npz:
                arrays = npz["lengths"], npz["chunks"], npz["bytes"]
            n = len(arrays[1])
            of_doc = split_of(np.arange(index, index + n), n_docs, shares)
            add_range(writers, tokens, *arrays, of_doc)
            index += n
            progress.update(number + 1)
        counts = {n: w.close(source | {"split": n}) for n, w in zip(names, writers)}
        for name, count in counts.items():
            if not count["n_docs"]:
                raise UserError(
                    f"--splits={s.splits}: {n_docs} documents leave none for {name}; "
                    "give more text or other shares"
                )
        return counts


def add_range(writers: list, tokens, lengths, chunks, doc_bytes, of_doc) -> None:
    """Give each writer its documents. of_doc: [documents]: number of the writer."""
    of_chunk = np.repeat(of_doc, chunks)
    of_token = np.repeat(of_chunk.astype(np.uint16), lengths)
    for i, writer in enumerate(writers):
        mine = tokens[of_token == i]
        n_bytes = int(doc_bytes[of_doc == i].sum())
        writer.add(mine, lengths[of_chunk == i], chunks[of_doc == i], n_bytes)


# -------------------- processes


def start_worker() -> None:
    """What a worker does before its first task."""
    # At Ctrl-C the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Otherwise the many objects of the tokenizer are gone through again and again.
    gc.freeze()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def whole(function: Callable, task: tuple) -> int:
    """The last that function(*task) yields."""
    return list(function(*task))[-1]


def spread(function: Callable, tasks: list[tuple], workers: int) -> Iterator[tuple[int, int]]:
    """(number of a task, what it yields); from several processes only the last of it."""
    if workers <= 1 or len(tasks) <= 1:
        for number, task in enumerate(tasks):
            for result in function(*task):
                yield number, result
        return
    # A fork has the tokenizer already; elsewhere it may not be safe.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(min(workers, len(tasks)), context, start_worker) as pool:
        jobs = {pool.submit(whole, function, task): i for i, task in enumerate(tasks)}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException as e:  # Ctrl-C, too
            for worker in multiprocessing.active_children():
                worker.kill()
            # Before Python 3.11.5 a task would wait for ever to be read (gh-94777).
            pool._call_queue._reader.close()
            if not isinstance(e, BrokenProcessPool):
                raise
            raise UserError(
                "a worker was ended from outside (out of memory?); "
                "the same command goes on, with --workers=1 if need be"
            ) from None


def follow(label: str, function: Callable, tasks: list[tuple], total: int, workers: int) -> None:
    """Run all tasks and show how many of `total` bytes they have done."""
    progress = Progress(label, max(round(total / 1e6), 1), "MB")
    done = [0] * len(tasks)
    for number, read in spread(function, tasks, workers):
        done[number] = read
        progress.update(min(round(sum(done) / 1e6), progress.total - 1))
    progress.update(progress.total)


# -------------------- main


def n_workers(asked: int) -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: what taskset or a batch system allows
        return asked or len(os.sched_getaffinity(0))
    return asked or os.cpu_count() or 1


def same_input(files: list[str], s: Settings, note: Path) -> None:
    """UserError when a file changed since this run began: the parts would not fit."""
    benchmarks = [name for name in s.decontaminate.split(",") if name]
    now = {"input": sizes([*files, *benchmarks]), "tokenizer": tokenizer_of(s.tokenizer).sha256}
    if not note.exists():
        write_json(note, now)
    before = read_json(note)
    changed = [entry["file"] for entry in now["input"] if entry not in before["input"]]
    if before["input"] != now["input"]:
        changed.append("the list of files")
    if before["tokenizer"] != now["tokenizer"]:
        changed.append(s.tokenizer)
    if changed:
        raise UserError(
            f"{changed[0]}: changed since this run began; "
            f"remove {note.parent.parent} or give another --out_dir"
        )


def list_dropped(tasks: list[list[Piece]], parts: list[Path], out: Path) -> dict:
    """Write dropped.jsonl.tmp; {"kept": documents, reason: documents}."""
    counts = Counter()
    before = Counter()  # {file: its lines in earlier parts}
    # Half a surrogate pair, as JSON may have it, is written as JSON writes it.
    how = {"encoding": "utf-8", "errors": "backslashreplace"}
    with open(out / "dropped.jsonl.tmp", "w", **how) as f:
        for part in parts:
            state = read_json(part.with_suffix(".json"))
            pieces = tasks[int(part.name.split("-")[1])]
            counts["kept"] += state["kept"]
            counts.update(state["counts"])
            for piece, line, reason, note in state["dropped"]:
                path = pieces[piece].path
                entry = {"file": path, "line": before[path] + line, "reason": reason, "note": note}
                f.write(json.dumps(entry, ensure_ascii=False) + "\n")
            for piece, n in state["lines"].items():
                before[pieces[int(piece)].path] += n
    return counts


def summary(tasks: list[list[Piece]], parts: list[Path], ranges: list[Path], out: Path) -> dict:
    """The counts of the whole run."""
    counts = list_dropped(tasks, parts, out)
    damaged_files = counts.pop("damaged file", 0)
    counted = [np.load(name)["counts"] for name in ranges]
    copies, cut = np.sum([[0, 0], *counted], axis=0).tolist()
    reasons = ("empty", "not UTF-8", "over-long", "damaged", "contaminated")
    return {
        "documents_in": sum(counts.values()),
        "documents_out": counts["kept"] - copies,
        "dropped": {reason: counts[reason] for reason in reasons} | {"copies": copies},
        "damaged_files": damaged_files,
        "chunk_borders_inside_tokens": cut,
    }


def show(counts: dict, splits: dict[str, dict], out: Path) -> None:
    """Print the counts of a finished run."""
    parts = [f"{counts['documents_out']:,} out"]
    parts += [f"{n:,} {reason}" for reason, n in counts["dropped"].items() if n]
    print(f"{counts['documents_in']:,} documents in = {' + '.join(parts)}")
    if counts["damaged_files"]:
        print(f"{counts['damaged_files']:,} damaged files, read up to the damage")
    if n := counts.get("chunk_borders_inside_tokens"):
        print(f"{n:,} chunks end inside a token, which is cut there")
    for name, c in splits.items():
        print(
            f"{out / name}: {c['n_docs']:,} documents, {c['n_chunks']:,} chunks, "
            f"{c['n_tokens']:,} tokens, {c['n_bytes']:,} bytes"
        )


def refuse_others(out_dir: str, names: list[str]) -> None:
    """UserError when something of the user's would be replaced."""
    for name in names:
        path = os.path.join(out_dir, name)
        if os.path.lexists(path):
            raise UserError(f"{path}: is there already; remove it or give another --out_dir")


def clear(out: Path, work: Path) -> None:
    """Leave no trace of a run that made nothing."""
    shutil.rmtree(work)
    for name in ("settings.json", "dropped.jsonl.tmp"):
        (out / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there are other files in it
        out.rmdir()


def make_documents(s: Settings, out: Path, work: Path, files: list[str]):
    """Scan the input: (tasks, parts). UserError when no document is left."""
    tasks = plan(files)
    total = sum(map(os.path.getsize, files))
    scans = [(s, work, i, pieces) for i, pieces in enumerate(tasks)]
    follow("scan", scan, scans, total, n_workers(s.workers))
    parts = sorted(name.with_suffix("") for name in work.glob("scan-*.json"))
    if not any(part.with_suffix(".text").stat().st_size for part in parts):
        counts = summary(tasks, parts, [], out)
        why = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items() if n)
        raise UserError(
            f"{', '.join(s.files)}: no document is left of {counts['documents_in']:,} documents"
            + (f" ({why})" if why else "")
        )
    return tasks, parts


def make_tokens(s: Settings, work: Path, parts: list[Path]) -> list[Path]:
    """Encode all documents: the .npz of each range of hashes."""
    borders = borders_of(parts)
    n_ranges = borders.shape[1] - 1
    jobs = [(s, work, i, parts, borders[:, i : i + 2]) for i in range(n_ranges)]
    n_bytes = sum(part.with_suffix(".text").stat().st_size for part in parts)
    follow("encode", encode, jobs, n_bytes, n_workers(s.workers))
    return [work / f"tokens-{i:05d}.npz" for i in range(n_ranges)]


def build(s: Settings, out: Path, work: Path, files: list[str]) -> None:
    """The whole run, or what is left of it."""
    for left in work.glob("*.tmp"):
        left.unlink()
    same_input(files, s, work / "input.json")
    tasks, parts = make_documents(s, out, work, files)
    ranges = make_tokens(s, work, parts)
    # Now as well: a file may have changed while it was read.
    same_input(files, s, work / "input.json")
    counts = summary(tasks, parts, ranges, out)
    free = ("files", "out_dir", "workers", "skip_bad")
    source = {"maker": "data/text.py", "chunks": "1 + Poisson(7) sentences, at most 20"}
    source |= {name: value for name, value in asdict(s).items() if name not in free}
    n_docs = counts["documents_out"]
    splits = join(s, out, work, len(ranges), n_docs, source | {"counts": counts})
    os.replace(out / "dropped.jsonl.tmp", out / "dropped.jsonl")
    listed = [{"file": e["file"], "bytes": e["bytes"]} for e in sizes(files)]
    meta = {"kind": "text", "files": listed, "counts": counts}
    write_json(out / "meta.json", meta | {"splits": splits, "source": source})
    show(counts, splits, out)


def main(s: Settings) -> None:
    # Refuse wrong flags before anything is written.
    names = read_splits(s.splits) or PAPER
    tokenizer_of(s.tokenizer)
    finder_of(s.decontaminate)
    files = expand(s.files)
    for path in files:
        kind_of(path)
    fresh = not os.path.exists(os.path.join(s.out_dir, "settings.json"))
    if fresh:
        refuse_others(s.out_dir, ["work", "meta.json", *names])
    out = claim(s.out_dir, s, free=("workers", "skip_bad"))
    work = out / "work"
    work.mkdir(exist_ok=True)
    with hold(work / "lock"):  # a second run waits for the first
        work.mkdir(exist_ok=True)
        if (out / "meta.json").exists():
            meta = read_json(out / "meta.json")
            print(f"{out}: complete already")
            show(meta["counts"], meta["splits"], out)
        else:
            with explained(out, work, fresh):
                build(s, out, work, files)
        shutil.rmtree(work)


@contextlib.contextmanager
def explained(out: Path, work: Path, fresh: bool):
    """Clear up after a run that made nothing, and say it when the disk is full."""
    try:
        yield
    except (UserError, OSError) as e:
        if fresh and not any(name.stat().st_size for name in work.glob("scan-*.text")):
            clear(out, work)  # so the flags may be mended and tried again
        if getattr(e, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{out}: the disk is full; make room, and the same command goes on: finished parts are kept"
        ) from None


if __name__ == "__main__":
    run(main, Settings)
