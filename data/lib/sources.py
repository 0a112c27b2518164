"""Files of text, read piece by piece: jsonl, parquet and txt, plain or compressed (.gz; .zst when zstandard is installed).

    expand(words)                     file names from names and patterns, sorted, each once
    lines(stream, start, end, limit)  lines of a binary stream in bounded memory
    texts(path, kind, ...)            the texts of a file from any position on, each with its line
    read_jsonl(path, parse, skip_bad) a small jsonl file as a list, each line through `parse`
"""

import glob
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.lib.cli import UserError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt", ".text": "txt", ".md": "txt"}
CODECS = (".gz", ".zst")


class Bad(ValueError):
    """A document that cannot be used: `reason` is what it is counted as."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Damaged(Exception):
    """A file that cannot be read on from here."""


def optional(module: str, path: str):
    """Import a package that only some files need."""
    try:
        return __import__(module, fromlist=["*"])
    except ImportError:
        raise UserError(f"{path}: needs {module.partition('.')[0]}; pip install {module.partition('.')[0]}") from None


def from_hub(repo: str, instead: str, call: Callable):
    """call(huggingface_hub); whatever goes wrong there is one line, which names what else the user can do."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{repo}: fetching needs huggingface_hub; pip install huggingface_hub, or {instead}") from None
    try:
        return call(huggingface_hub)
    except Exception as e:  # its own errors, its HTTP library's and the system's, other ones in each release
        said = " ".join(str(e).split())[:150]
        raise UserError(f"{repo}: not fetched ({type(e).__name__}: {said}); the same command goes on, or {instead}") from None


# ---------------------------------------------------------------------------------------------------------- files


def expand(words: list[str]) -> list[str]:
    """File names from names and patterns (quoted ones, with ** for folders in folders), sorted, each file once; UserError when there is none."""
    found: dict[str, str] = {}
    for word in words:
        names = [word]
        if word != "-" and not os.path.exists(word) and glob.has_magic(word):
            names = [name for name in glob.glob(word, recursive=True) if not os.path.isdir(name)]
            if not names:
                raise UserError(f"{word}: no file fits this pattern")
        for name in names:
            if name != "-" and os.path.isdir(name):
                raise UserError(f"{name}: a folder; name its files, as in '{name.rstrip('/')}/*.jsonl'")
            if name != "-" and not os.path.exists(name):
                raise UserError(f"{name}: no such file")
            real = name if name == "-" else os.path.realpath(name)
            found[real] = min(name, found.get(real, name))
    return sorted(found.values())


def kind_of(path: str, given: str = "auto") -> tuple[str, str]:
    """("jsonl" | "parquet" | "txt", "" | ".gz" | ".zst") of a file name, or what was given."""
    name, codec = os.path.splitext(path)
    name, codec = (name, codec) if codec in CODECS else (path, "")
    kind = KINDS.get(os.path.splitext(name)[1].lower()) if given == "auto" else given
    if not kind:
        raise UserError(f"{path}: neither .jsonl, .parquet nor .txt (with .gz or .zst or without); say what it is with --format=...")
    if kind == "parquet" and codec:
        raise UserError(f"{path}: parquet has its own compression; unpack the file first")
    return kind, codec


class Unpacked(io.RawIOBase):
    """A .gz or .zst file as a stream that gives all there is before a damage, and says so where the file was cut off. (gzip loses what it
    had unpacked last, zstandard's own reader ends silently.)"""

    def __init__(self, raw, path: str, codec: str):
        self.raw, self.left, self.frame = raw, b"", None
        if codec == ".gz":
            self.start, self.error = lambda: zlib.decompressobj(wbits=31), zlib.error
        else:
            zstd = optional("zstandard", path)
            self.start, self.error = lambda: zstd.ZstdDecompressor().decompressobj(), zstd.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.left:
            packed = self.frame.unused_data.lstrip(b"\0") if self.frame and self.frame.eof else b""  # zeros may follow gzip's data
            packed = packed or self.raw.read(1 << 10)  # no more: zstandard may make 32 KB of each byte
            if not packed:
                if self.frame and not self.frame.eof:
                    raise EOFError("the file ends before its data do")
                return 0
            if not self.frame or self.frame.eof:
                self.frame = self.start()
            try:
                self.left = memoryview(self.frame.decompress(packed))  # whose rest is no copy
            except self.error as e:
                raise EOFError(str(e)) from None
        n = min(len(buffer), len(self.left))
        buffer[:n], self.left = self.left[:n], self.left[n:]
        return n


def open_stream(path: str, codec: str):
    """(the unpacked stream, the file on disk, whose tell() says how far we are)"""
    raw = open(path, "rb")
    return (io.BufferedReader(Unpacked(raw, path, codec), 1 << 16) if codec else raw), raw


def lines(stream, start: int, end: int, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(place behind it, line) for each line that begins in [start, end); None for one longer than `limit` bytes.

    The stream stands at `start`, where a line begins.
    """
    at = start
    while at < end and (line := stream.readline(limit)):
        at += len(line)
        if len(line) == limit and not line.endswith(b"\n"):
            while rest := stream.readline(limit):
                at += len(rest)
                if rest.endswith(b"\n"):
                    break
            line = None
        yield at, line


def skip_to(stream, start: int, packed: bool) -> int:
    """Go to the first line that begins at `start` or later; where that is."""
    if packed:  # a position that we noted ourselves: a line begins there
        left = start
        while left and (block := stream.read(min(left, 1 << 20))):
            left -= len(block)
        return start
    if not start:
        return 0
    at = stream.seek(start - 1)
    while block := stream.readline(1 << 20):
        at += len(block)
        if block.endswith(b"\n"):
            break
    return at


# ---------------------------------------------------------------------------------------------------------- texts


class Found(NamedTuple):
    """One line, row or file: its number, the position to go on from, bytes read of the file on disk, and its text as UTF-8, or why there is
    none; None for an empty line, which is no document."""

    line: int
    after: int
    on_disk: int
    text: bytes | Bad | None


class Format(NamedTuple):
    """How texts lie in a file."""

    kind: str  # jsonl, parquet, txt
    codec: str
    field: str  # of jsonl and parquet
    by_line: bool  # txt: a line is a document, otherwise the file is one
    max_bytes: int


def texts(path: str, form: Format, start: int, end: int, line: int = 0) -> Iterator[Found]:
    """The texts that begin in [start, end), after the first `line` lines. Positions are bytes of the unpacked file, or rows (parquet). Damaged is
    raised where a file cannot be read on.
    """
    try:
        if form.kind == "parquet":
            yield from rows(path, form, start, end)
            return
        stream, raw = open_stream(path, form.codec)
        with raw:
            if form.kind == "txt" and not form.by_line:
                if start:  # it was read before the run was cut off
                    return
                whole = stream.read(form.max_bytes + 1)
                yield Found(1, end, raw.tell(), check(whole, form) if len(whole) <= form.max_bytes else too_long(form))
                return
            at = skip_to(stream, start, bool(form.codec))
            parse = jsonl_text if form.kind == "jsonl" else line_text
            for after, content in lines(stream, at, end, 4 * form.max_bytes + (1 << 20)):
                line += 1
                text = too_long(form) if content is None else None if content.isspace() else parse(content, form)
                yield Found(line, after, raw.tell() if form.codec else after, text)
    except EOFError as e:
        raise Damaged(f"damaged after line {line} ({e})") from None


def rows(path: str, form: Format, start: int, end: int) -> Iterator[Found]:
    parquet, arrow = optional("pyarrow.parquet", path), optional("pyarrow", path)
    row, size = 0, os.path.getsize(path)
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:  # without these two, a row group is held whole
            if form.field not in file.schema_arrow.names:
                raise UserError(f"{path}: no column {form.field!r}; it has {', '.join(file.schema_arrow.names)}: choose one with --text_field")
            for batch in file.iter_batches(batch_size=16, columns=[form.field], use_threads=False):
                if row + len(batch) <= start:
                    row += len(batch)
                    continue
                for value in batch.column(0):
                    row += 1
                    if start < row <= end:
                        yield Found(row, row, size * row // file.metadata.num_rows, row_text(value, form))
    except (arrow.ArrowException, OSError) as e:
        if getattr(e, "errno", None) is not None:  # the disk's own trouble
            raise
        raise Damaged(f"damaged after row {row} ({str(e).splitlines()[0][:100]})") from None


def row_text(value, form: Format) -> bytes | Bad:
    try:
        return string_text(value.as_py(), form)
    except UnicodeDecodeError as e:
        return Bad("not UTF-8", f"not UTF-8 ({e.reason} at byte {e.start})")


def jsonl_text(line: bytes, form: Format) -> bytes | Bad:
    try:
        record = json.loads(line.decode("utf-8-sig" if line[:1] == b"\xef" else "utf-8"))
    except UnicodeDecodeError as e:
        return Bad("not UTF-8", f"not UTF-8 ({e.reason} at byte {e.start} of the line)")
    except (ValueError, RecursionError) as e:
        return Bad("damaged", f"not JSON ({e})")
    if not isinstance(record, dict):
        return Bad("damaged", "expected a JSON object")
    if form.field not in record:
        return Bad("damaged", f"no field {form.field!r} (--text_field); there are {' '.join(', '.join(list(record)[:8]).split())[:200]}")
    return string_text(record[form.field], form)


def line_text(line: bytes, form: Format) -> bytes | Bad:
    return check(line.removesuffix(b"\n").removesuffix(b"\r"), form)


def string_text(value, form: Format) -> bytes | Bad:
    if not isinstance(value, str):
        return Bad("damaged", f"field {form.field!r} is {'null' if value is None else type(value).__name__}, expected text")
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        return Bad("not UTF-8", "half a surrogate pair, which UTF-8 cannot hold")
    if len(raw) > form.max_bytes:
        return too_long(form)
    return raw if value and not value.isspace() else Bad("empty", "no text")


def check(raw: bytes, form: Format) -> bytes | Bad:
    try:
        return string_text(raw.decode(), form)
    except UnicodeDecodeError as e:
        return Bad("not UTF-8", f"not UTF-8 ({e.reason} at byte {e.start})")


def too_long(form: Format) -> Bad:
    return Bad("over-long", f"longer than {form.max_bytes:,} bytes")


# ------------------------------------------------------------------------------------------------- small jsonl files


def read_jsonl(path: str, parse: Callable, skip_bad: bool = False, hint: str = "") -> list:
    """parse(line) of each line of a jsonl file. UserError for the first line that `parse` refuses by a ValueError, or,
    with skip_bad, a printed count."""
    found, bad = [], 0
    try:
        with open_stream(path, kind_of(path, "jsonl")[1])[0] as f:
            for number, line in enumerate(io.TextIOWrapper(f, encoding="utf-8"), 1):
                try:
                    found.append(parse(line))
                except (ValueError, RecursionError) as e:
                    if not skip_bad:
                        e = f"not JSON ({e})" if isinstance(e, (json.JSONDecodeError, RecursionError)) else e
                        raise UserError(f"{path}:{number}: {e}; mend it{' or give --skip_bad' if skip_bad is False else ''}") from None
                    bad += 1
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{hint}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 ({e.reason} at byte {e.start})") from None
    except EOFError as e:
        raise UserError(f"{path}: damaged ({e}); fetch it again") from None
    if bad:
        print(f"{path}: {bad} lines left out")
    return found


def sizes(files: list[str]) -> list[dict]:
    """What identifies the files of a run that goes on later."""
    stats = [(name, Path(name).stat()) for name in files]
    return [{"file": name, "bytes": stat.st_size, "changed": stat.st_mtime_ns} for name, stat in stats]
