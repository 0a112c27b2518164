"""Corpora and thoughts on disk, and the one function that writes token sequences.

A corpus folder:
    tokens.bin     ids of all chunks, end to end: a document has those of its whole text
    chunks.npy     int64 [n_chunks + 1] into tokens
    docs.npy       int64 [n_docs + 1] into chunks
    questions.npy  bool [n_chunks] (optional)
    meta.json      counts, hash, source; beside it the tokenizer's files

A thoughts folder, for one corpus, with one span for each chunk:
    tokens.bin     ids of all thoughts, end to end
    chunks.npy     int64 [n_chunks + 1] into tokens; an empty span: no thought
    samples.npz    log_q, log_p, log_w ... if an E-step made the folder
    meta.json      which corpus, which model, how the thoughts were chosen

tokens.bin is uint16 when the vocabulary fits, else uint32, and is memory-mapped. A
question (questions.npy) is a chunk that is only ever given: it carries no thought,
the E-step passes over it, and eval_math.py prompts with it. Without the file every
chunk may carry a thought, as in the paper. A folder appears under its name when it
is complete, never before.
"""

import dataclasses
import functools
import hashlib
import itertools
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.lib.cli import UserError, new_folder, read_json, write_json
from data.lib.tokenizer import Tokenizer, load_tokenizer

RAW, PRIOR, POSTERIOR = 0, 1, 2  # the three ways to write a chunk

# -------------------- sequences


class Part(NamedTuple):
    """Where one chunk went, as half-open ranges of positions.

    `thought` includes the EOL that ends it.
    """

    thought: tuple[int, int]
    chunk: tuple[int, int]


def marker_count(form):
    """How many markers a form (or each of an array of forms) writes beside a thought.

    They are SOL PRI EOL or SOL EOL SOL POS EOL. A chunk of plain text has none.
    """
    return np.array([0, 3, 5])[form]


def layout(tok: Tokenizer, chunks, thoughts, forms, end: bool = True) -> tuple[np.ndarray, list[Part]]:
    """A document as token ids (int64) and the place of each chunk and thought in it.

    A document is BOS, its chunks, EOS (left out with end=False). Each chunk x takes
    one of three forms:

        RAW          x x x x
        PRIOR        SOL PRI  z z z EOL  x x x x             teaches p(z, x | before)
                              [thought]  [chunk]
        POSTERIOR    SOL EOL  x x x x  SOL POS  z z z EOL    teaches q(z | before, x)
                              [chunk]           [thought]

    The markers SOL PRI, SOL EOL and SOL POS are given, never scored; the EOL after
    a thought belongs to the thought. The posterior form opens with SOL EOL for the
    first chunk, too. The last thought may be None: the sequence then stops behind
    SOL PRI or SOL POS and is the prompt to sample it. A chunk with an empty thought
    is written in the form asked for.
    """
    ids, parts = [tok.bos], []

    def put(*pieces) -> tuple[int, int]:
        start = len(ids)
        for piece in pieces:
            ids.extend(piece)
        return start, len(ids)

    nothing = (0, 0)
    for x, z, form in zip(chunks, thoughts, forms, strict=True):
        if form == RAW:
            parts.append(Part(nothing, put(x)))
        elif form == PRIOR:
            put([tok.sol, tok.pri])
            if z is None:
                return np.array(ids, dtype=np.int64), parts
            parts.append(Part(thought=put(z, [tok.eol]), chunk=put(x)))
        else:
            put([tok.sol, tok.eol])
            where = put(x)
            put([tok.sol, tok.pos])
            if z is None:
                return np.array(ids, dtype=np.int64), parts
            parts.append(Part(thought=put(z, [tok.eol]), chunk=where))
    if end:
        ids.append(tok.eos)
    return np.array(ids, dtype=np.int64), parts


def hash_state(*keys) -> np.ndarray:
    """uint64 numbers, one for each tuple of integer keys (arrays broadcast).

    This is splitmix64 (Steele et al. 2014), folded over the keys.
    """
    with np.errstate(over="ignore"):
        h = np.zeros(1, dtype=np.uint64)
        for key in keys:
            h = (h ^ np.asarray(key, dtype=np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def hash_uniform(*keys) -> np.ndarray:
    """Numbers in [0, 1), one for each tuple of integer keys (arrays broadcast).

    The same keys give the same number, anywhere.

    Coin flips, sampling noise and picks come from here, so they depend on (seed,
    document, chunk, sample, position) and on nothing else: not on batches, order or
    restarts.
    """
    return (hash_state(*keys) >> np.uint64(12)).astype(np.float64) * 2.0**-52


# The first key of hash_uniform says what the number is for, so that no two uses
# share one.
FORM_COIN, DRAW, PICK, TEST_DRAW, CONTEXT_FORM, CHECK = 1, 2, 3, 4, 5, 6


# -------------------- reading


@dataclasses.dataclass
class Corpus:
    folder: Path
    meta: dict
    tokens: np.ndarray  # [n_tokens], memory-mapped
    chunks: np.ndarray  # [n_chunks + 1]
    docs: np.ndarray  # [n_docs + 1]
    questions: np.ndarray  # [n_chunks] bool

    n_docs = property(lambda self: len(self.docs) - 1)
    n_chunks = property(lambda self: len(self.chunks) - 1)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)

    def chunk(self, i: int) -> np.ndarray:
        return self.tokens[self.chunks[i] : self.chunks[i + 1]]

    def raw(self, i: int) -> bytes:
        """The text of chunk i in UTF-8."""
        opens = self.chunks[i] == self.chunks[self.docs[self.doc_of(i)]]
        return self.tokenizer.decode_bytes(self.chunk(i), first=opens)

    def text(self, i: int) -> str:
        return self.raw(i).decode("utf-8", errors="replace")

    def doc_of(self, i):
        """The document that chunk i (or each of an array of chunks) belongs to."""
        return np.searchsorted(self.docs, i, side="right") - 1

    def before(self, i: int, n: int) -> range:
        """The up to n chunks before chunk i in its document: its context."""
        return range(max(i - n, int(self.docs[self.doc_of(i)])), i)


@dataclasses.dataclass
class Thoughts:
    folder: Path
    meta: dict
    tokens: np.ndarray
    chunks: np.ndarray

    def span(self, i: int) -> np.ndarray:
        """The thought of chunk i as ids; empty: it has none."""
        return self.tokens[self.chunks[i] : self.chunks[i + 1]]


def open_corpus(folder, tokenizer: Tokenizer | None = None) -> Corpus:
    """Open a corpus folder.

    UserError when it is missing, incomplete, truncated or made with another
    tokenizer.
    """
    folder = Path(folder)
    meta = read_meta(folder, "corpus")
    tokens, chunks = read_spans(folder, meta)
    docs = read_offsets(folder / "docs.npy", len(chunks) - 1)
    questions = np.zeros(len(chunks) - 1, dtype=bool)
    if meta["questions"]:
        questions = read_array(folder / "questions.npy")
        if questions.shape != (len(chunks) - 1,) or questions.dtype != bool:
            wanted = f"expected {len(chunks) - 1} booleans"
            raise UserError(f"{folder / 'questions.npy'}: {wanted}; make the folder again")
    if tokenizer and tokenizer.sha256 != meta["tokenizer"]:
        how = "make the corpus or the model again with one tokenizer"
        raise UserError(f"{folder}: made with another tokenizer than the model's; {how}")
    corpus = Corpus(folder, meta, tokens, chunks, docs, questions)
    if tokenizer:
        corpus.tokenizer = tokenizer  # the same one: its files need not be read again
    return corpus


def open_thoughts(folder, corpus: Corpus) -> Thoughts:
    """Open a thoughts folder for a corpus.

    UserError when it belongs to another corpus, is incomplete or truncated.
    """
    folder = Path(folder)
    meta = read_meta(folder, "thoughts")
    if meta["corpus"] != corpus.meta["sha256"]:
        why = f"these thoughts were made for another corpus than {corpus.folder}"
        raise UserError(f"{folder}: {why}")
    tokens, chunks = read_spans(folder, meta)
    if len(chunks) != len(corpus.chunks):
        why = f"{len(chunks) - 1} spans, but the corpus has {corpus.n_chunks} chunks"
        raise UserError(f"{folder / 'chunks.npy'}: {why}")
    return Thoughts(folder, meta, tokens, chunks)


def read_meta(folder: Path, kind: str) -> dict:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such {kind} folder")
    meta = read_json(folder / "meta.json")
    of_kind = {"tokenizer", "sha256", "questions"} if kind == "corpus" else {"corpus"}
    complete = {"kind", "n_vocab"} | of_kind <= set(meta)
    if not complete or meta["kind"] != kind or type(meta["n_vocab"]) is not int:
        raise UserError(f"{folder / 'meta.json'}: not the meta.json of a {kind} folder")
    return meta


def read_array(path: Path) -> np.ndarray:
    try:
        # A plain view, for slices of an np.memmap are slow to make.
        return np.load(path, allow_pickle=False, mmap_mode="r").view(np.ndarray)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make the folder again") from None
    except (ValueError, EOFError, OSError) as e:
        raise UserError(f"{path}: damaged ({e}); make the folder again") from None


def read_offsets(path: Path, total: int) -> np.ndarray:
    """Offsets that start at 0, never fall, and end at `total`."""
    offsets = read_array(path)
    a_list = offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) > 0
    if not a_list or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise UserError(f"{path}: not a list of rising int64 offsets; make the folder again")
    if offsets[-1] != total:
        why = f"ends at {offsets[-1]}, expected {total}"
        raise UserError(f"{path}: {why}: a file of the folder was cut off; make it again")
    return offsets


def read_spans(folder: Path, meta: dict) -> tuple[np.ndarray, np.ndarray]:
    """tokens.bin (memory-mapped) and chunks.npy, checked against each other."""
    path = folder / "tokens.bin"
    dtype = token_dtype(meta["n_vocab"])
    if not path.exists():
        raise UserError(f"{path}: no such file; make the folder again")
    size = path.stat().st_size
    if size % dtype.itemsize:
        why = f"{size} bytes is no whole number of {dtype} tokens"
        raise UserError(f"{path}: {why}: cut off; make the folder again")
    tokens = np.zeros(0, dtype)
    if size:
        tokens = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    return tokens, read_offsets(folder / "chunks.npy", len(tokens))


def token_dtype(n_vocab: int) -> np.dtype:
    return np.dtype(np.uint16 if n_vocab <= 65536 else np.uint32)


# -------------------- writing


class Offsets:
    """An .npy file of int64 offsets, as np.save writes it.

    Its length is known only when it is complete, so the header is written last.
    """

    HEADER = 128

    def __init__(self, path: Path):
        self.f = open(path, "wb+")
        self.n = 0
        self.last = 0
        self.f.write(bytes(self.HEADER))
        self.add([0])

    def add(self, lengths) -> None:
        offsets = self.last + np.cumsum(lengths, dtype=np.int64)
        self.f.write(offsets.tobytes())
        self.n += len(offsets)
        if len(offsets):
            self.last = int(offsets[-1])

    def close(self, digest=None) -> None:
        self.f.seek(0)
        header = {"descr": "<i8", "fortran_order": False, "shape": (self.n,)}
        np.lib.format.write_array_header_1_0(self.f, header)
        assert self.f.tell() == self.HEADER
        while digest and (block := self.f.read(1 << 20)):
            digest.update(block)
        self.f.close()


class SpanWriter:
    """tokens.bin and chunks.npy of a folder, span by span; and the hash of what is in both."""

    def __init__(self, folder: Path, n_vocab: int):
        self.dtype = token_dtype(n_vocab)
        self.digest = hashlib.sha256()
        self.n_full = 0  # spans that are not empty
        self.tokens = open(folder / "tokens.bin", "wb")
        self.chunks = Offsets(folder / "chunks.npy")

    def add(self, ids, lengths) -> None:
        """Spans of these lengths, their ids end to end."""
        raw = np.asarray(ids, dtype=self.dtype).tobytes()
        self.digest.update(raw)
        self.tokens.write(raw)
        self.chunks.add(lengths)
        self.n_full += int(np.count_nonzero(lengths))

    def close(self) -> tuple[int, int, str]:
        """(spans, tokens, hash)."""
        self.tokens.close()
        self.chunks.close(self.digest)
        return self.chunks.n - 1, self.chunks.last, self.digest.hexdigest()


class CorpusWriter:
    """A corpus folder that grows by whole documents."""

    def __init__(self, folder: Path, tok: Tokenizer):
        self.folder = folder
        self.tok = tok
        self.spans = SpanWriter(folder, tok.n_vocab)
        self.docs = Offsets(folder / "docs.npy")
        self.questions = []
        self.n_bytes = 0

    def add(self, ids, lengths, chunks, n_bytes: int, questions=()) -> None:
        """Documents of so many chunks, chunks of so many ids, all ids end to end.

        questions: for each chunk whether it is one; none: no chunk of this corpus is.
        """
        self.spans.add(ids, lengths)
        self.docs.add(chunks)
        self.questions += questions
        self.n_bytes += n_bytes

    def close(self, source: dict) -> dict:
        """Write what is left to write; the counts."""
        self.docs.close()
        n_chunks, n_tokens, sha256 = self.spans.close()
        if any(self.questions):
            np.save(self.folder / "questions.npy", np.array(self.questions, dtype=bool))
        self.tok.save(self.folder)
        counts = {
            "n_docs": self.docs.n - 1,
            "n_chunks": n_chunks,
            "n_tokens": n_tokens,
            "n_bytes": self.n_bytes,
        }
        meta = {
            "kind": "corpus",
            "tokenizer": self.tok.sha256,
            "n_vocab": self.tok.n_vocab,
            "sha256": sha256,
            "questions": any(self.questions),
        }
        write_json(self.folder / "meta.json", meta | counts | {"source": source})
        return counts


def write_corpus(folder, documents, tok: Tokenizer, source: dict) -> None:
    """Write a corpus folder from documents, each a list of (text, is_question) chunks.

    UserError for an empty document.
    """
    with new_folder(folder) as temporary:
        writer = CorpusWriter(temporary, tok)
        documents = iter(documents)
        while some := list(itertools.islice(documents, 256)):
            for number, document in enumerate(some, writer.docs.n - 1):
                if not any(text for text, _ in document):
                    why = f"document {number} is empty; leave it out of the source"
                    raise UserError(f"{folder}: {why}")
            pieces = [[text for text, _ in document] for document in some]
            questions = [is_question for document in some for _, is_question in document]
            n_bytes = sum(len(piece.encode()) for document in pieces for piece in document)
            ids, lengths, _ = tok.encode_documents(pieces)
            writer.add(ids, lengths, list(map(len, some)), n_bytes, questions)
        writer.close(source)


def write_thoughts(folder, corpus: Corpus, spans, meta: dict, samples=None, files=()) -> None:
    """Write a thoughts folder, with copies of `files` in it.

    spans: one list of ids for each chunk of the corpus; an empty one is no thought.
    samples: the arrays of samples.npz, if there are any.
    """
    with new_folder(folder) as temporary:
        writer = SpanWriter(temporary, corpus.meta["n_vocab"])
        spans = (np.asarray(span, dtype=writer.dtype) for span in spans)
        while some := list(itertools.islice(spans, 1024)):
            writer.add(np.concatenate(some), list(map(len, some)))
        n_spans, n_tokens, sha256 = writer.close()
        if n_spans != corpus.n_chunks:
            raise ValueError(f"{n_spans} thoughts for {corpus.n_chunks} chunks")
        if samples:
            np.savez(temporary / "samples.npz", **samples)
        for file in files:
            shutil.copy(file, temporary)
        own = {
            "kind": "thoughts",
            "corpus": corpus.meta["sha256"],
            "n_vocab": corpus.meta["n_vocab"],
            "sha256": sha256,
            "n_thoughts": writer.n_full,
            "n_tokens": n_tokens,
        }
        write_json(temporary / "meta.json", own | meta)


def chunks_of(document) -> list[tuple[str, bool]]:
    """[(text, is_question), ...] of a document's (question, thought, answer) triples.

    Each problem but the first begins on a line of its own.
    """
    chunks = []
    for i, (question, _, answer) in enumerate(document):
        chunks += [("\n" * (i > 0) + question, True), (answer, False)]
    return chunks


def write_parts(documents: dict, tok: Tokenizer, out_dir: Path, source: dict, thoughts: dict) -> None:
    """Write {part: documents} as a corpus each.

    A document is a list of (question, thought, answer). `thoughts` {part: name} names the
    folders for the thoughts of some parts.
    """
    for part, docs in documents.items():
        source = source | {"part": part}
        write_corpus(out_dir / part, (chunks_of(d) for d in docs), tok, source)
        if part in thoughts:
            answers = (thought for d in docs for _, thought, _ in d)
            spans = (span for thought in answers for span in ([], tok.encode_thought(thought)))
            corpus = open_corpus(out_dir / part)
            write_thoughts(out_dir / thoughts[part], corpus, spans, {"source": source})
        print(f"{out_dir / part}: {len(docs)} documents")
