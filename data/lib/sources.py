"""Files of text, read piece by piece: jsonl, parquet and txt, plain or packed (.gz; .zst with zstandard).

expand(words)                     file names from names and patterns, sorted, each once
lines(stream, start, end, limit)  lines of a binary stream in bounded memory
texts(path, want, start, end)     the texts of a file, or of a part of it, each with its line
read_jsonl(path, parse, skip_bad) a small jsonl file as a list, each line through `parse`
"""

import glob
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.lib.cli import UserError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
KINDS |= {".txt": "txt", ".text": "txt", ".md": "txt"}
CODECS = (".gz", ".zst")
# How a file begins that is one JSON value: a list of objects, or an object over several lines
ONE_VALUE = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*(?:\{|\Z)|[\[{][ \t\r]*\n)")
BLOCK = 1 << 20  # bytes that are read at a time


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
        package = module.partition(".")[0]
        raise UserError(f"{path}: needs {package}; pip install {package}") from None


def from_hub(repo: str, instead: str, call: Callable):
    """call(huggingface_hub). UserError for any failure; `instead` says what else the user can do."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{repo}: fetching needs huggingface_hub; pip install huggingface_hub, or {instead}"
        ) from None
    try:
        return call(huggingface_hub)
    except Exception as e:  # its own errors, its HTTP library's, the system's: other ones in each release
        said = " ".join(str(e).split())[:150]
        raise UserError(
            f"{repo}: not fetched ({type(e).__name__}: {said}); the same command goes on, or {instead}"
        ) from None


# -------------------- files

# A file of a model folder: what may be there in its place, and what to do
SAVE = "is not read; transformers writes the other: {}.from_pretrained(FOLDER).save_pretrained(NEW)"
STAND_INS = {
    "config.json": ("adapter_config.json", "is a LoRA adapter's; merge it by peft into its model"),
    "model.safetensors": ("pytorch_model*.bin *.pth *.gguf", SAVE.format("AutoModelForCausalLM")),
    "tokenizer.json": ("tokenizer.model vocab.json", SAVE.format("AutoTokenizer")),
}
LFS = b"version https://git-lfs"


def refuse_stand_in(path: Path) -> None:
    """UserError where something else stands for a file of a model folder."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a file")
    if path.is_file():
        with open(path, "rb") as f:
            if f.read(len(LFS)) == LFS:
                raise UserError(f"{path}: a Git LFS pointer, not the file; `git lfs pull` fetches it")
        return
    patterns, what = STAND_INS.get(path.name, ("", ""))
    found = [name for pattern in patterns.split() for name in sorted(path.parent.glob(pattern))]
    if found and not path.exists():
        raise UserError(f"{path}: no such file; {found[0].name} beside it {what}")


def expand(words: list[str]) -> list[str]:
    """File names from names and quoted patterns, sorted, each name once. ** in a pattern stands for
    folders in folders. UserError when a name or pattern fits no file."""
    return sorted({name for word in words for name in names_of(word)})


def names_of(word: str) -> list[str]:
    """The files that a name or a pattern stands for."""
    names = [word]
    if not os.path.exists(word) and glob.has_magic(word):
        names = [name for name in glob.glob(word, recursive=True) if not os.path.isdir(name)]
        if not names:
            raise UserError(f"{word}: no file fits this pattern")
    for name in names:
        if os.path.isdir(name):
            raise UserError(f"{name}: a folder; name its files, as in '{name.rstrip('/')}/*.jsonl'")
        if not os.path.exists(name):
            raise UserError(f"{name}: no such file")
    return names


def codec_of(path: str) -> str:
    return next((codec for codec in CODECS if path.endswith(codec)), "")


def kind_of(path: str) -> tuple[str, str]:
    """("jsonl" | "parquet" | "txt", "" | ".gz" | ".zst") of a file name."""
    codec = codec_of(path)
    kind = KINDS.get(os.path.splitext(path.removesuffix(codec))[1].lower())
    if not kind:
        expected = "neither .jsonl, .parquet nor .txt (with .gz or .zst or without)"
        raise UserError(f"{path}: {expected}; rename it by what it is")
    if kind == "parquet" and codec:
        raise UserError(f"{path}: parquet has its own compression; unpack the file first")
    return kind, codec


class Unpacked(io.RawIOBase):
    """A .gz or .zst file as a stream that gives all there is before a damage, then EOFError. Python's
    gzip loses what it had unpacked last, and zstandard's own reader ends silently where a file was cut
    off."""

    def __init__(self, raw, path: str, codec: str):
        self.raw = raw
        self.left = b""  # unpacked and not yet read
        self.frame = None  # what unpacks; a file may hold several frames in a row
        if codec == ".gz":
            self.start = lambda: zlib.decompressobj(wbits=31)
            self.error = zlib.error
        else:
            zstd = optional("zstandard", path)
            self.start = lambda: zstd.ZstdDecompressor().decompressobj()
            self.error = zstd.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.left:
            packed = self.next_packed()
            if not packed:
                return 0
            try:
                # The rest of a memoryview is no copy.
                self.left = memoryview(self.frame.decompress(packed))
            except self.error as e:
                raise EOFError(str(e)) from None
        n = min(len(buffer), len(self.left))
        buffer[:n] = self.left[:n]
        self.left = self.left[n:]
        return n

    def next_packed(self) -> bytes:
        """Packed bytes for self.frame; none at the end."""
        ended = not self.frame or self.frame.eof
        packed = b""
        if self.frame and ended:
            packed = self.frame.unused_data.lstrip(b"\0")  # zeros may follow gzip's data
        # No more at a time, as zstandard may make 32 kB of each byte.
        packed = packed or self.raw.read(1 << 10)
        if not packed and not ended:
            raise EOFError("the file ends before its data do")
        if packed and ended:
            self.frame = self.start()
        return packed


def open_stream(path: str, codec: str):
    """(the unpacked stream, the file on disk, whose tell() says how far we are)"""
    raw = open(path, "rb")
    stream = io.BufferedReader(Unpacked(raw, path, codec), 1 << 16) if codec else raw
    return stream, raw


def lines(stream, start: int, end: int, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(place behind it, line) for each line that begins in [start, end). The line is None if it is
    longer than `limit` bytes. The stream stands at `start`, where a line begins."""
    at = start
    while at < end and (line := stream.readline(limit)):
        at += len(line)
        if len(line) == limit and not line.endswith(b"\n"):
            at = end_of_line(stream, at, limit)
            line = None
        yield at, line


def end_of_line(stream, at: int, limit: int) -> int:
    """Go on from `at` to the end of the line; where that is."""
    while block := stream.readline(limit):
        at += len(block)
        if block.endswith(b"\n"):
            break
    return at


def refuse_one_value(stream, path: str) -> None:
    """UserError for a file, not read yet, that is JSON but not an object a line."""
    if ONE_VALUE.match(stream.peek(64)[:64]):
        make = "make such a file by jq -c '[.] | flatten(1)[]'"
        raise UserError(f"{path}: one JSON value, expected an object on each line; {make}")


def skip_to(stream, start: int) -> int:
    """Go to the first line that begins at `start` or later; where that is."""
    return end_of_line(stream, stream.seek(start - 1), BLOCK) if start else 0


# -------------------- texts


class Found(NamedTuple):
    """A line, a row or a file."""

    line: int  # its number, from where the reading began
    on_disk: int  # how far the file has been read, in bytes
    # UTF-8, or why there is none; None: an empty line, which is no document
    text: bytes | Bad | None


class Wanted(NamedTuple):
    """What is looked for in a file."""

    field: str  # of jsonl and parquet
    max_bytes: int


def texts(path: str, want: Wanted, start: int, end: int) -> Iterator[Found]:
    """The texts that begin in bytes [start, end) of a file, which is all of it but for plain lines.
    Damaged is raised where the file cannot be read on."""
    refuse_stand_in(Path(path))
    kind, codec = kind_of(path)
    if kind == "parquet":
        yield from rows(path, want)
        return
    line = 0
    try:
        stream, raw = open_stream(path, codec)
        with raw:
            if kind == "txt":
                content = stream.read(want.max_bytes + 1)
                yield Found(1, raw.tell(), whole_text(content, want))
                return
            refuse_one_value(stream, path)
            at = skip_to(stream, start)
            for after, content in lines(stream, at, end, 4 * want.max_bytes + BLOCK):
                line += 1
                text = too_long(want)
                if content is not None:
                    text = None if content.isspace() else jsonl_text(content, want)
                yield Found(line, raw.tell() if codec else after, text)
    except EOFError as e:
        raise Damaged(f"damaged after line {line} ({e})") from None


def rows(path: str, want: Wanted) -> Iterator[Found]:
    """texts() of a parquet file."""
    parquet = optional("pyarrow.parquet", path)
    arrow = optional("pyarrow", path)
    size = os.path.getsize(path)
    row = 0
    try:
        # Without these two settings a whole row group is held in memory.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK) as file:
            columns = file.schema_arrow.names
            if want.field not in columns:
                has = f"it has {', '.join(columns)}: choose one with --text_field"
                raise UserError(f"{path}: no column {want.field!r}; {has}")
            how = {"batch_size": 16, "columns": [want.field], "use_threads": False}
            for batch in file.iter_batches(**how):
                for value in batch.column(0):
                    row += 1
                    on_disk = size * row // file.metadata.num_rows
                    yield Found(row, on_disk, row_text(value, want))
    except (arrow.ArrowException, OSError) as e:
        if getattr(e, "errno", None) is not None:  # the disk's own trouble
            raise
        said = str(e).splitlines()[0][:100]
        raise Damaged(f"damaged after row {row} ({said})") from None


def row_text(value, want: Wanted) -> bytes | Bad:
    try:
        return string_text(value.as_py(), want)
    except UnicodeDecodeError as e:
        return not_utf8(e)


def jsonl_text(line: bytes, want: Wanted) -> bytes | Bad:
    try:
        record = json.loads(line.decode("utf-8-sig" if line[:1] == b"\xef" else "utf-8"))
    except UnicodeDecodeError as e:
        return not_utf8(e, " of the line")
    except (ValueError, RecursionError) as e:
        return Bad("damaged", f"not JSON ({e})")
    if not isinstance(record, dict):
        return Bad("damaged", "expected a JSON object")
    if want.field not in record:
        names = " ".join(", ".join(list(record)[:8]).split())[:200]
        return Bad("damaged", f"no field {want.field!r} (--text_field); there are {names}")
    return string_text(record[want.field], want)


def string_text(value, want: Wanted) -> bytes | Bad:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        return Bad("damaged", f"field {want.field!r} is {kind}, expected text")
    try:
        value = value.removeprefix("\ufeff")  # a byte order mark is no text
        raw = value.encode()
    except UnicodeEncodeError:
        return Bad("not UTF-8", "half a surrogate pair, which UTF-8 cannot hold")
    if len(raw) > want.max_bytes:
        return too_long(want)
    return raw if value and not value.isspace() else Bad("empty", "no text")


def whole_text(raw: bytes, want: Wanted) -> bytes | Bad:
    if len(raw) > want.max_bytes:  # the rest was not read
        return too_long(want)
    try:
        return string_text(raw.decode(), want)
    except UnicodeDecodeError as e:
        return not_utf8(e)


def not_utf8(e: UnicodeDecodeError, where: str = "") -> Bad:
    return Bad("not UTF-8", f"not UTF-8 ({e.reason} at byte {e.start}{where})")


def too_long(want: Wanted) -> Bad:
    return Bad("over-long", f"longer than {want.max_bytes:,} bytes")


# -------------------- small jsonl files


def read_jsonl(path: str, parse: Callable, skip_bad: bool = False, hint: str = "") -> list:
    """parse(line) of each line of a jsonl file but blank ones. UserError for the first line that
    `parse` refuses by a ValueError, or, with skip_bad, a printed count. `hint` is added to "no such
    file"."""
    found = []
    bad = 0
    refuse_stand_in(Path(path))
    try:
        with open_stream(path, codec_of(path))[0] as f:
            refuse_one_value(f, path)
            for number, line in enumerate(io.TextIOWrapper(f, encoding="utf-8-sig"), 1):
                try:
                    found += [] if line.isspace() else [parse(line)]
                except (ValueError, RecursionError) as e:
                    if not skip_bad:
                        raise refused(f"{path}:{number}", e) from None
                    bad += 1
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{hint}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: {not_utf8(e)}") from None
    except EOFError as e:
        raise UserError(f"{path}: damaged ({e}); fetch it again") from None
    if bad:
        print(f"{path}: {bad} lines left out")
    return found


def refused(place: str, e: Exception) -> UserError:
    """What is said about a line that cannot be used."""
    said = f"not JSON ({e})" if isinstance(e, (json.JSONDecodeError, RecursionError)) else e
    return UserError(f"{place}: {said}; mend it")


def sizes(files: list[str]) -> list[dict]:
    """What identifies the files of a run that goes on later."""
    stats = [(name, Path(name).stat()) for name in files]
    return [{"file": name, "bytes": stat.st_size, "changed": stat.st_mtime_ns} for name, stat in stats]
