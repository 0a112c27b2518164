"""From raw text to corpora: read, clean, shuffle, split, cut into chunks, encode.

    python data/text.py FILE... --tokenizer=TinyLlama/tokenizer.json --out_dir=out/text
    python data/text.py "finemath/*.parquet" --tokenizer=T --out_dir=out/finemath --splits=paper --dedup --decontaminate=gsm8k.jsonl,math.jsonl
    zcat pages.jsonl.gz | python data/text.py - --tokenizer=T --out_dir=out/pages --splits=train=0.98,heldout=0.02

FILE is jsonl, parquet or txt, compressed (.gz, .zst) or not, a quoted pattern, or - for stdin. Each split becomes a corpus folder in --out_dir:

    --splits=train=0.98,heldout=0.02   shares of the shuffled documents
    --splits=paper                     by their index i: validation (i % 1000 == 0), and of the others, counted anew,
                                       warm (i % 20 == 0), bootstrap (i % 20 in 13..16), rest

A document is left out, and counted, when it is empty, not UTF-8, longer than --max_bytes, a second copy (--dedup) or holds a benchmark's question
(--decontaminate: 13 words in a row, data/lib/decontaminate.py). Documents in = documents out + those; meta.json has the counts, dropped.jsonl
file, line and reason of each but the empty ones and the copies. A damaged line or file stops the run, or is counted as well with --skip_bad.

The order is that of a hash of text and seed, the chunks hang on the text and the seed alone (data/lib/chunking.py). So the folders are the same, byte for byte,
whatever the number of workers and the order of files. Three steps, of which finished parts are kept when a run is cut off:

    scan     a piece of input -> its documents, sorted by hash          work/scan-TASK-PART.text, .index, .json
    encode   a range of hashes from all pieces -> chunks as tokens      work/tokens-RANGE.bin, .npz
    join     -> the corpus folders, meta.json, and work/ goes away

Disk: the text once and its tokens twice while it runs. Memory: about 200 MB a worker, whatever the size of the input.
"""

import contextlib
import errno
import gc
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

if not __package__:  # run as `python data/text.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data.lib.chunking import chunk, text_digest
from data.lib.cli import Progress, UserError, claim, hold, new_folder, opt, read_json, run, write_json
from data.lib.corpus import CorpusWriter, token_dtype
from data.lib.decontaminate import Finder
from data.lib.sources import Bad, Damaged, Format, expand, kind_of, read_jsonl, sizes, texts
from data.lib.tokenizer import Tokenizer, load_tokenizer

PART = 32 << 20  # bytes of text a part of the scan holds, and of input a task begins with
RANGES, RANGE_LOW, RANGE_HIGH = 64, 4 << 20, 32 << 20  # into how many ranges of hashes the text is cut, and how many bytes one may have
COST = 300  # bytes of memory that a document takes beside its text, or a dropped one in all
BATCH = 1 << 19  # bytes of text that are decontaminated or encoded at a time
TO_THE_END = 1 << 62
CHECKED = 100  # every how many-th document is decoded again and compared


@dataclass(kw_only=True)
class Settings:
    files: list = opt(help="jsonl, parquet or txt, also .gz and .zst; patterns in quotes; - for stdin")
    tokenizer: str = opt(help="the tokenizer.json of the model to be trained, or its folder")
    out_dir: str = opt(help="where the corpus folders go")
    text_field: str = opt("text", "the field (jsonl) or column (parquet) that holds the text")
    format: Literal["auto", "jsonl", "parquet", "txt"] = opt("auto", "auto: by the file's name; stdin is jsonl")
    txt: Literal["file", "line"] = opt("file", "of a txt file, what is a document")
    splits: str = opt("train=1", "paper, or name=share,... that sum to 1")
    decontaminate: str = opt("", "benchmark files (jsonl with question, problem or text), separated by commas")
    dedup: bool = opt(False, "keep one of several documents with the same text")
    skip_bad: bool = opt(False, "leave out damaged lines and the rest of damaged files, and count them")
    max_bytes: int = opt(5_000_000, "longer documents are left out", low=1)
    seed: int = opt(0, "another seed, another order and other chunks")
    workers: int = opt(0, "processes; 0: one for each core", low=0)


# --------------------------------------------------------------------------------------------------------- splits


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
        if not re.fullmatch(r"\w[\w-]*", name) or name in shares or name == "work" or not 0 < value <= 1:
            raise UserError(f"--splits={spec}: expected paper, or name=share,... as in train=0.98,heldout=0.02; {item!r} is none")
        shares[name] = value
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"--splits={spec}: the shares sum to {sum(shares.values()):g}, expected 1")
    return shares


PAPER = ("validation", "warm", "bootstrap", "rest")
PAPER_DOCS = 15  # with that many, each of them has a document; bootstrap's is the last to come


def borders_by_share(n_docs: int, shares: dict[str, float]) -> np.ndarray:
    """[splits + 1]: the index at which each split begins."""
    return np.round(np.cumsum([0, *shares.values()]) * n_docs).astype(np.int64)


def split_of(index: np.ndarray, n_docs: int, shares: dict[str, float] | None) -> np.ndarray:
    """The number of the split that each document belongs to, by its index in the shuffled order."""
    if shares is None:  # as BoLT's prepare_hf_datasets.sh: every 1000th line, and the residue of the line number in what is left
        residue = (index - index // 1000 - 1) % 20
        return np.where(index % 1000 == 0, 0, np.where(residue == 0, 1, np.where((residue >= 13) & (residue <= 16), 2, 3)))
    return np.searchsorted(borders_by_share(n_docs, shares)[1:-1], index, side="right")


# ---------------------------------------------------------------------------------------------------------- scan


def plan(files: list[str], s: Settings) -> list[list[tuple[str, int, int]]]:
    """The input as tasks of about PART bytes, each a list of (file, start, end). Only plain lines can be read from the middle."""
    tasks, room = [], 0
    for path in files:
        (kind, codec), size = kind_of(path, s.format), os.path.getsize(path)
        cut = not codec and (kind == "jsonl" or kind == "txt" and s.txt == "line")
        borders = [*range(0, size, PART), TO_THE_END] if cut and size else [0, TO_THE_END]
        for start, end in zip(borders, borders[1:]):
            weight = min(PART, size - start)
            if not tasks or weight > room:
                tasks.append([])
                room = PART
            tasks[-1].append((path, start, end))
            room -= max(weight, 1 << 12)  # many tiny files are work, too
    return tasks


def questions_of(path: str) -> list[str]:
    def parse(line: str) -> str:
        record = json.loads(line)
        for field in ("question", "problem", "text"):
            if isinstance(record, dict) and isinstance(record.get(field), str):
                return record[field]
        raise ValueError("no field question, problem or text")

    return read_jsonl(path, parse, skip_bad=None)


@lru_cache(maxsize=1)
def finder_of(paths: str) -> Finder | None:
    questions = [question for path in paths.split(",") if path for question in questions_of(path)]
    if paths and not questions:
        raise UserError(f"--decontaminate={paths}: holds no question")
    return Finder(questions) if paths else None


class Part:
    """Documents on their way into one part of the scan, with what was left out."""

    def __init__(self):
        self.raws: list[bytes] = []
        self.places: list[tuple[int, int]] = []  # (piece, which of its lines in this part) of each
        self.size, self.counts, self.dropped, self.lines = 0, Counter(), [], Counter()

    def drop(self, piece: int, line: int, bad: Bad) -> None:
        self.counts[bad.reason] += 1
        if bad.reason != "empty":
            self.dropped.append([piece, line, bad.reason, str(bad)])

    def decontaminate(self, finder: Finder) -> None:
        kept = []
        for first, last in batches([len(raw) for raw in self.raws]):
            found = finder.find([raw.decode() for raw in self.raws[first:last]])
            for i, (_, words) in sorted(found.items()):
                self.drop(*self.places[first + i], Bad("contaminated", words))
            kept += [raw for i, raw in enumerate(self.raws[first:last]) if i not in found]
        self.raws = kept

    def write(self, name: Path, s: Settings, state: dict) -> None:
        """The documents in the order of their hashes. The .json comes last: with it the part is complete."""
        if s.decontaminate:
            self.decontaminate(finder_of(s.decontaminate))
        order = sorted((text_digest(raw, s.seed), raw) for raw in self.raws)
        self.raws = []
        index = np.zeros((len(order), 3), dtype="<u8")  # the two halves of the hash, bytes of text
        index[:, :2] = np.frombuffer(b"".join(digest for digest, _ in order), dtype=">u8").reshape(-1, 2)
        index[:, 2] = [len(raw) for _, raw in order]
        put(name.with_suffix(".text"), (raw for _, raw in order))
        put(name.with_suffix(".index"), [index.tobytes()])
        done = {"kept": len(order), "bytes": int(index[:, 2].sum()), "counts": self.counts, "dropped": self.dropped, "lines": self.lines}
        put(name.with_suffix(".json"), [json.dumps(done | state).encode()])


def put(path: Path, buffers) -> None:
    """Write a file of work/ under a name of this process, then rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        f.writelines(buffers)
    os.replace(temporary, path)


def scan(s: Settings, work: Path, number: int, pieces: list) -> Iterator[int]:
    """Write the parts of one task that are not there yet; yields how many bytes of the input have been read."""
    n_parts, at, line, last = 0, 0, 0, False
    position = pieces[0][1]
    while not last and (name := work / f"scan-{number:05d}-{n_parts:05d}.json").exists():
        state = read_json(name)
        at, position, line, last = state["piece"], state["position"], state["line"], state["last"]
        n_parts += 1
    part, read = Part(), [0] * len(pieces)
    while at < len(pieces) and not last:
        path, start, end = pieces[at]
        form = Format(*kind_of(path, s.format), s.text_field, s.txt == "line", s.max_bytes)
        try:
            for found in texts(path, form, position, end, line):
                part.lines[at], line, position = part.lines[at] + found.line - line, found.line, found.after
                if found.text is None:
                    continue
                if isinstance(found.text, Bad):
                    refuse(s, path, found.line, start, found.text)
                    part.drop(at, part.lines[at], found.text)
                else:
                    part.raws.append(found.text)
                    part.places.append((at, part.lines[at]))
                    part.size += len(found.text)
                part.size += COST
                if part.size >= PART:
                    part.write(work / f"scan-{number:05d}-{n_parts:05d}", s, {"piece": at, "position": position, "line": line, "last": False})
                    part, n_parts, read[at] = Part(), n_parts + 1, found.on_disk - start
                    yield sum(read)
        except Damaged as e:
            if not s.skip_bad:
                raise UserError(f"{path}: {e}; mend it, or use what comes before with --skip_bad") from None
            part.dropped.append([at, part.lines[at], "damaged file", str(e)])
        read[at] = min(os.path.getsize(path), end) - start
        at, line, position = at + 1, 0, pieces[at + 1][1] if at + 1 < len(pieces) else 0
    if not last:
        part.write(work / f"scan-{number:05d}-{n_parts:05d}", s, {"piece": at, "position": position, "line": line, "last": True})
    yield sum(min(os.path.getsize(path), end) - start for path, start, end in pieces)


def refuse(s: Settings, path: str, line: int, start: int, bad: Bad) -> None:
    """Stop at what is damaged, unless it is to be counted. The line is counted from `start` on."""
    if bad.reason == "damaged" and not s.skip_bad:
        raise UserError(f"{path}:{line + lines_before(path, start)}: {bad}; mend it or give --skip_bad")


def lines_before(path: str, start: int) -> int:
    """How many lines begin before `start`."""
    n, last = 0, b"\n"
    if not start:
        return 0
    with open(path, "rb") as f:
        while start > 0 and (block := f.read(min(1 << 20, start))):
            n, start, last = n + block.count(b"\n"), start - len(block), block[-1:]
    return n + (last != b"\n")


# --------------------------------------------------------------------------------------------------------- encode


def borders_of(parts: list[Path]) -> np.ndarray:
    """[parts, ranges + 1, 2]: at which document, and at which byte of its text, each range of hashes begins in each part."""
    total = sum(part.with_suffix(".text").stat().st_size + part.with_suffix(".index").stat().st_size * COST // 24 for part in parts)
    n = -(-total // min(max(total // RANGES, RANGE_LOW), RANGE_HIGH))
    edges = np.array([i * 2**64 // n for i in range(1, n)], dtype=np.uint64)
    borders = np.zeros((len(parts), n + 1, 2), dtype=np.int64)
    for i, part in enumerate(parts):
        index = np.fromfile(part.with_suffix(".index"), dtype="<u8").reshape(-1, 3)
        rows = [0, *np.searchsorted(index[:, 0], edges, side="left"), len(index)]
        borders[i] = np.stack([rows, np.concatenate([[0], np.cumsum(index[:, 2])]).astype(np.int64)[rows]], axis=1)
    return borders


def documents_of(parts: list[Path], borders: np.ndarray) -> list[tuple[int, int, bytes]]:
    """(hash, second half of the hash, text) of one range of hashes, from all parts, in order. borders: [parts, 2, 2]"""
    found = []
    for part, ((row, at), (row_end, end)) in zip(parts, borders.tolist()):
        if row == row_end:
            continue
        with open(part.with_suffix(".index"), "rb") as f:
            f.seek(24 * row)
            index = np.frombuffer(f.read(24 * (row_end - row)), dtype="<u8").reshape(-1, 3)
        with open(part.with_suffix(".text"), "rb") as f:
            f.seek(at)
            text = f.read(end - at)
        ends = np.cumsum(index[:, 2]).tolist()
        found += zip(index[:, 0].tolist(), index[:, 1].tolist(), (text[a:b] for a, b in zip([0, *ends], ends)))
    found.sort()
    return found


@lru_cache(maxsize=1)
def tokenizer_of(path: str) -> Tokenizer:
    return load_tokenizer(path)


def encode(s: Settings, work: Path, number: int, parts: list[Path], borders: np.ndarray) -> Iterator[int]:
    """Write the tokens of one range of hashes; yields how many bytes of text it was."""
    name = work / f"tokens-{number:05d}"
    if not name.with_suffix(".npz").exists():
        documents = documents_of(parts, borders)
        n_found = len(documents)
        if s.dedup:  # copies have one hash, so they are neighbours
            documents = [doc for i, doc in enumerate(documents) if not i or doc != documents[i - 1]]
        sizes = [len(raw) for _, _, raw in documents]
        coded = [encode_batch(s, documents[a:b]) for a, b in batches(sizes)]
        tokens, lengths, chunks, tests = zip(*coded) if coded else ([], [], [], [])
        put(name.with_suffix(".bin"), tokens)
        arrays = io.BytesIO()
        np.savez(arrays, lengths=join_arrays(lengths), chunks=join_arrays(chunks), bytes=np.array(sizes, np.uint32),
                 counts=np.array([n_found - len(documents), *np.sum(tests or [[0, 0]], axis=0)]))  # fmt: skip
        put(name.with_suffix(".npz"), [arrays.getvalue()])
    yield int((borders[:, 1, 1] - borders[:, 0, 1]).sum())


def join_arrays(arrays) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint32), *arrays])


def batches(sizes: list[int]) -> list[tuple[int, int]]:
    """[(first, last + 1), ...]: runs of documents of about BATCH bytes."""
    borders, room = [0], BATCH
    for i, size in enumerate(sizes):
        room -= size
        if room <= 0 or i + 1 == len(sizes):
            borders.append(i + 1)
            room = BATCH
    return list(zip(borders, borders[1:]))


def encode_batch(s: Settings, documents: list[tuple[int, int, bytes]]) -> tuple[bytes, np.ndarray, np.ndarray, tuple[int, int]]:
    """Their tokens as bytes, how many each chunk has, how many chunks each document has, and (checked, not given back by decoding)."""
    tok, digests = tokenizer_of(s.tokenizer), [first.to_bytes(8, "big") + second.to_bytes(8, "big") for first, second, _ in documents]
    pieces = chunk([raw.decode() for _, _, raw in documents], digests)
    chunks = list(map(len, pieces))
    ids, lengths = tok.encode_pieces(list(chain.from_iterable(pieces)))
    ends, of_doc, checked, differ = np.cumsum(lengths), np.cumsum([0, *chunks]), 0, 0
    for i, (_, second, raw) in enumerate(documents):
        if second % CHECKED == 0:
            spans = [ids[ends[j] - lengths[j] : ends[j]] for j in range(of_doc[i], of_doc[i + 1])]
            checked, differ = checked + 1, differ + (b"".join(map(tok.decode_bytes, spans)) != raw)
    return ids.astype(token_dtype(tok.n_vocab)).tobytes(), lengths.astype(np.uint32), np.array(chunks, np.uint32), (checked, differ)


# ----------------------------------------------------------------------------------------------------------- join


def join(s: Settings, out: Path, work: Path, n_ranges: int, n_docs: int, source: dict) -> dict[str, dict]:
    """The corpus folders from the tokens of all ranges; {split: counts}."""
    shares, tok, index = read_splits(s.splits), tokenizer_of(s.tokenizer), 0
    names = list(shares) if shares else PAPER
    for i, name in enumerate(names):
        if n_docs < PAPER_DOCS and name == "bootstrap" if shares is None else borders_by_share(n_docs, shares)[i + 1] == borders_by_share(n_docs, shares)[i]:
            raise UserError(f"--splits={s.splits}: {n_docs} documents leave none for {name}; give more text or other shares")
    progress = Progress("join", n_ranges, "ranges")
    with contextlib.ExitStack() as stack:
        writers = [CorpusWriter(stack.enter_context(new_folder(out / name)), tok) for name in names]
        for number in range(n_ranges):
            tokens = np.fromfile(work / f"tokens-{number:05d}.bin", dtype=token_dtype(tok.n_vocab))
            with np.load(work / f"tokens-{number:05d}.npz") as arrays:
                lengths, chunks, sizes = arrays["lengths"], arrays["chunks"], arrays["bytes"]
            of_doc = split_of(np.arange(index, index + len(chunks)), n_docs, shares)
            of_chunk = np.repeat(of_doc, chunks)
            of_token = np.repeat(of_chunk.astype(np.uint16), lengths) if len(names) > 1 else None
            for i, writer in enumerate(writers):
                mine = tokens if of_token is None else tokens[of_token == i]
                writer.add(mine, lengths[of_chunk == i], chunks[of_doc == i], int(sizes[of_doc == i].sum()))
            index += len(chunks)
            progress.update(number + 1)
        return {name: writer.close(source | {"split": name}) for name, writer in zip(names, writers)}


# ------------------------------------------------------------------------------------------------------ processes


def serve(pipe, function: Callable) -> None:
    """A worker: runs function(*task) for each task it is sent and sends back what that yields, None at its end, or what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends us
    gc.freeze()  # or the tokenizer's many objects are gone through again and again
    threading.Thread(target=lambda: (wait([multiprocessing.parent_process().sentinel]), os._exit(1)), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                for result in function(*pipe.recv()):
                    pipe.send(result)
                pipe.send(None)
            except (UserError, OSError) as e:
                pipe.send(e)


def spread(function: Callable, tasks: list[tuple], workers: int) -> Iterator[tuple[int, object]]:
    """(number of a task, what function(*task) yields) in the order in which it comes, from several processes."""
    if workers <= 1 or len(tasks) <= 1:
        yield from ((number, result) for number, task in enumerate(tasks) for result in function(*task))
        return
    waiting, busy, processes = list(enumerate(tasks))[::-1], {}, []
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")  # a fork has the tokenizer already
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(theirs, function), daemon=True))
            processes[-1].start()
            theirs.close()
            busy[ours] = give(ours, waiting)
        while busy:
            for pipe in wait(list(busy)):
                try:
                    result = pipe.recv()
                except EOFError:
                    raise UserError("a worker was ended from outside (out of memory?); the same command goes on, with --workers=1 if need be") from None
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    yield busy[pipe], result
                elif waiting:
                    busy[pipe] = give(pipe, waiting)
                else:
                    del busy[pipe]
    finally:
        for process in processes:
            process.kill()


def give(pipe, waiting: list) -> int:
    number, task = waiting.pop()
    pipe.send(task)
    return number


def follow(label: str, function: Callable, tasks: list[tuple], total: int, workers: int) -> None:
    """Run all tasks and show how many of `total` bytes they have done."""
    progress, done = Progress(label, max(round(total / 1e6), 1), "MB"), [0] * len(tasks)
    for number, read in spread(function, tasks, workers):
        done[number] = read
        progress.update(min(round(sum(done) / 1e6), progress.total - 1))
    progress.update(progress.total)


# ----------------------------------------------------------------------------------------------------------- main


def save_stdin(work: Path, s: Settings) -> str:
    """stdin as a file, so that a run that was cut off can go on; UserError when it brings something else the second time."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("-: nothing is piped in; as in: zcat pages.jsonl.gz | python data/text.py - ...")
    path, digests = work / ("stdin.jsonl" if s.format == "auto" else "stdin"), []
    with open(path.with_suffix(".tmp"), "wb") as f:
        shutil.copyfileobj(sys.stdin.buffer, f, 1 << 20)
    if not path.exists():
        os.replace(path.with_suffix(".tmp"), path)
        return str(path)
    for file in (path, path.with_suffix(".tmp")):
        with open(file, "rb") as f:
            digests.append(hashlib.file_digest(f, "sha256").digest())
    path.with_suffix(".tmp").unlink()
    if digests[0] != digests[1]:
        raise UserError(f"-: stdin brings other text than when this run began; remove {work.parent} or give another --out_dir")
    return str(path)


def same_input(files: list[str], s: Settings, note: Path) -> None:
    """UserError when a file changed since this run began: its finished parts would not fit the others."""
    benchmarks = [name for name in s.decontaminate.split(",") if name]
    now = {"input": sizes([*files, *benchmarks]), "tokenizer": tokenizer_of(s.tokenizer).sha256, "format": 1}
    if not note.exists():
        write_json(note, now)
    before = read_json(note)
    changed = [entry["file"] for entry in now["input"] if entry not in before["input"]] or ["the list of files"] * (before["input"] != now["input"])
    changed += [s.tokenizer] * (before["tokenizer"] != now["tokenizer"])
    if changed:
        raise UserError(f"{changed[0]}: changed since this run began; remove {note.parent.parent} or give another --out_dir")


def name_of(path: str, out: Path) -> str:
    return "-" if Path(path).parent == out / "work" else path


def summary(tasks: list, parts: list[Path], ranges: list[Path], out: Path) -> dict:
    """The counts of the whole run; writes dropped.jsonl on the way. Lines of a file that was read in several parts are numbered through."""
    counts, kept, before = Counter(), 0, Counter()
    with open(out / "dropped.jsonl.tmp", "w", encoding="utf-8", errors="backslashreplace") as f:  # half surrogates as JSON writes them
        for part in parts:
            state, pieces = read_json(part.with_suffix(".json")), tasks[int(part.name.split("-")[1])]
            kept += state["kept"]
            counts.update(state["counts"])
            for piece, line, reason, note in state["dropped"]:
                path = pieces[piece][0]
                f.write(json.dumps({"file": name_of(path, out), "line": before[path] + line, "reason": reason, "note": note}, ensure_ascii=False) + "\n")
                counts["damaged files"] += reason == "damaged file"
            for piece, n in state["lines"].items():
                before[pieces[int(piece)][0]] += n
    copies, checked, differ = np.sum([np.load(name)["counts"] for name in ranges], axis=0).tolist() if ranges else (0, 0, 0)
    damaged_files = counts.pop("damaged files", 0)
    drops = {reason: counts[reason] for reason in ("empty", "not UTF-8", "over-long", "damaged", "contaminated")} | {"copies": copies}
    whole = {"documents_in": kept + sum(counts.values()), "documents_out": kept - copies, "dropped": drops, "damaged_files": damaged_files}
    return whole | {"round_trips_checked": checked, "round_trips_that_differ": differ}


def show(counts: dict, splits: dict[str, dict], out: Path) -> None:
    drops = [f"{n:,} {reason}" for reason, n in counts["dropped"].items() if n]
    kept = f"{counts['documents_out']:,} out"
    print(f"{counts['documents_in']:,} documents in = {' + '.join([kept, *drops])}")
    if counts["damaged_files"]:
        print(f"{counts['damaged_files']:,} damaged files, read up to the damage")
    for name, c in splits.items():
        print(f"{out / name}: {c['n_docs']:,} documents, {c['n_chunks']:,} chunks, {c['n_tokens']:,} tokens, {c['n_bytes']:,} bytes")


def main(s: Settings) -> None:
    names = read_splits(s.splits) or PAPER
    tokenizer_of(s.tokenizer)
    finder_of(s.decontaminate)
    files = expand(s.files)
    for path in files:
        kind_of(path, "jsonl" if path == "-" and s.format == "auto" else s.format)
    fresh = not os.path.exists(os.path.join(s.out_dir, "settings.json"))
    for name in ("work", "meta.json", *names) if fresh else ():
        if os.path.lexists(os.path.join(s.out_dir, name)):  # not ours, and it would be replaced
            raise UserError(f"{os.path.join(s.out_dir, name)}: is there already; remove it or give another --out_dir")
    out = claim(s.out_dir, s, free=("workers", "skip_bad"))
    work = out / "work"
    with alone(work / "lock"):
        try:
            build(s, out, work, files)
        except (UserError, OSError) as e:
            if fresh and not any(name.stat().st_size for name in work.glob("scan-*.text")):
                clear(out, work)  # nothing to go on from: the flags may be mended and tried again
            if getattr(e, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"{out}: the disk is full; make room, and the same command goes on: finished parts are kept") from None


def n_workers(asked: int) -> int:
    return asked or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def clear(out: Path, work: Path) -> None:
    shutil.rmtree(work)
    for name in ("settings.json", "dropped.jsonl.tmp"):
        (out / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there are other files in it
        out.rmdir()


@contextlib.contextmanager
def alone(lock: Path):
    """Hold the folder; a run that was just killed gets a few seconds to let go of it."""
    for _attempt in range(50):
        lock.parent.mkdir(exist_ok=True)  # the other run may have removed it at its end
        with hold(lock, wait=False) as held:
            if held:
                yield
                return
        time.sleep(0.1)
    raise UserError(f"{lock.parent.parent}: another run is at work there; wait for it or give another --out_dir")


def build(s: Settings, out: Path, work: Path, files: list[str]) -> None:
    if (out / "meta.json").exists():
        meta = read_json(out / "meta.json")
        print(f"{out}: complete already")
        show(meta["counts"], meta["splits"], out)
        shutil.rmtree(work)
        return
    for left in work.glob("*.tmp"):
        left.unlink()
    workers = n_workers(s.workers)
    files = [save_stdin(work, s) if path == "-" else path for path in files]
    same_input(files, s, work / "input.json")
    tasks = plan(files, s)
    follow("scan", scan, [(s, work, i, pieces) for i, pieces in enumerate(tasks)], sum(map(os.path.getsize, files)), workers)
    parts = sorted(name.with_suffix("") for name in work.glob("scan-*.json"))
    n_bytes = sum(part.with_suffix(".text").stat().st_size for part in parts)
    if not n_bytes:
        counts = summary(tasks, parts, [], out)
        why = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items() if n)
        raise UserError(f"{', '.join(s.files)}: no document is left of {counts['documents_in']:,} documents" + f" ({why})" * bool(why))
    borders = borders_of(parts)
    ranges = [work / f"tokens-{i:05d}.npz" for i in range(borders.shape[1] - 1)]
    follow("encode", encode, [(s, work, i, parts, borders[:, i : i + 2]) for i in range(len(ranges))], n_bytes, workers)
    same_input(files, s, work / "input.json")  # now as well: a file that was written to while it was read
    counts = summary(tasks, parts, ranges, out)
    settings = {k: v for k, v in asdict(s).items() if k not in ("files", "out_dir", "workers", "skip_bad")}
    source = {"maker": "data/text.py", "chunks": "1 + Poisson(7) sentences, at most 20"} | settings
    splits = join(s, out, work, len(ranges), counts["documents_out"], source | {"counts": counts})
    if sum(c["n_docs"] for c in splits.values()) + sum(counts["dropped"].values()) != counts["documents_in"]:
        raise RuntimeError(f"documents were lost: {counts}, {splits}")
    os.replace(out / "dropped.jsonl.tmp", out / "dropped.jsonl")
    listed = [{"file": name_of(entry["file"], out), "bytes": entry["bytes"]} for entry in sizes(files)]
    write_json(out / "meta.json", {"kind": "text", "files": listed, "counts": counts, "splits": splits, "source": source})
    show(counts, splits, out)
    if counts["round_trips_that_differ"]:
        print(f"note: {counts['round_trips_that_differ']} of {counts['round_trips_checked']} checked documents are not what this tokenizer decodes to")
    shutil.rmtree(work)


if __name__ == "__main__":
    run(main, Settings)
