"""Look at a corpus folder and the thoughts for it, or check that every byte is sound.

    python data/show.py out/digits/warm --n=3
    python data/show.py out/digits/warm out/digits/warm_thoughts
    python data/show.py CORPUS THOUGHTS --check
    python data/show.py CORPUS E1 E2 E3 --html=look.html    # 30 chunks, for a browser

Shown are counts, lengths, and random documents in full, in colour on a
terminal unless NO_COLOR is set. Texts come from anywhere, so characters that
would steer the terminal are replaced. --check says in one line what the first
damage is, and exits with an error.
"""

import hashlib
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as `python data/show.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data.lib.cli import UserError, opt, read_json, run
from data.lib.corpus import Corpus, Thoughts, open_corpus, open_thoughts
from data.lib.report import write_page
from data.lib.thoughts_report import read_npz

BOLD, DIM, CYAN = 1, 2, 36
BLOCK = 1 << 22  # tokens that are checked at once


@dataclass(kw_only=True)
class Settings:
    folders: list = opt(
        help="a corpus folder, and, if wanted, a thoughts folder for it; several with --html"
    )
    n: int = opt(3, "random documents to show", low=0)
    seed: int = opt(0, "which ones")
    check: bool = opt(False, "verify hashes, offsets and ids instead")
    html: str = opt(
        "", "write a page of chunks and their thoughts into this file instead"
    )


# -------------------- showing


def colour(text: str, code: int) -> str:
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"


def printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def histogram(name: str, lengths: np.ndarray) -> str:
    """Lengths in bins of powers of two, a row of # signs for each."""
    if not len(lengths):
        return f"{name}: none"
    bins = np.frexp(lengths)[1]  # 0: 0; 1: 1; 2: 2 to 3; 3: 4 to 7 ...
    counts = np.bincount(bins)
    lines = [
        f"tokens of {name}: mean {lengths.mean():.1f}, "
        f"median {np.median(lengths):.0f}, longest {lengths.max():,}"
    ]
    for b in range(bins.min(), len(counts)):
        label = f"{2**b // 2:,} to {2**b - 1:,}" if b > 1 else str(b)
        n_signs = -(-50 * counts[b] // counts.max())  # rounded up
        lines.append(f"  {label:>20} {counts[b]:>10,} {'#' * n_signs}")
    return "\n".join(lines)


def summary(corpus: Corpus, thoughts: Thoughts | None) -> str:
    meta, sizes = corpus.meta, np.diff(corpus.chunks)
    n_tokens = len(corpus.tokens)
    lines = [
        f"{corpus.folder}: {corpus.n_docs:,} documents, {corpus.n_chunks:,} chunks "
        f"({corpus.questions.sum():,} of them questions), {n_tokens:,} tokens, "
        f"{meta.get('n_bytes', 0):,} bytes, vocabulary {meta['n_vocab']:,}",
        f"source: {meta.get('source')}",
        histogram("a chunk", sizes),
    ]
    if thoughts:
        lengths = np.diff(thoughts.chunks)
        has = lengths > 0
        n = len(thoughts.tokens)
        lines += [
            f"{thoughts.folder}: {has.sum():,} thoughts, {n:,} tokens: "
            f"{n / max(1, n_tokens):.2f} for each token of text, "
            f"{n / max(1, sizes[has].sum()):.2f} for each of the chunks that have one",
            histogram("a thought", lengths[has]),
        ]
    return printable("\n".join(lines))


def document(corpus: Corpus, thoughts: Thoughts | None, d: int) -> str:
    """A document with a line before each chunk, and its thought before its text."""
    tok = corpus.tokenizer
    lines = [colour(f"=== document {d} ===", BOLD)]
    for i in range(corpus.docs[d], corpus.docs[d + 1]):
        chunk = corpus.chunk(i)
        kind = " (question)" if corpus.questions[i] else ""
        lines.append(colour(f"--- chunk {i}{kind}, {len(chunk)} tokens", DIM))
        thought = thoughts.span(i) if thoughts else ()
        if len(thought):
            text = printable(tok.decode(thought, first=False).strip())
            lines.append(colour(f"[thought, {len(thought)} tokens: {text}]", CYAN))
        lines.append(printable(corpus.text(i)).strip("\n"))
    return "\n".join(lines)


# -------------------- checking


def expect(good: bool, path, otherwise: str) -> None:
    if not good:
        raise UserError(f"{path}: {otherwise}; make the folder again")


def check(corpus: Corpus, thoughts: Thoughts | None) -> None:
    """UserError for the first damage.

    Offsets, sizes and kinds of file were checked when the folders were opened.
    docs.npy and questions.npy have no hash.
    """
    tok, meta, folder = corpus.tokenizer, corpus.meta, corpus.folder
    same = (tok.sha256, tok.n_vocab) == (meta["tokenizer"], meta["n_vocab"])
    expect(same, folder / "tokenizer.json", "not the tokenizer that meta.json names")
    said = meta["questions"]
    same = said == (folder / "questions.npy").exists()
    expect(same, folder / "meta.json", f"questions {said}, but the file says otherwise")
    empty = np.diff(corpus.chunks[corpus.docs]) == 0
    expect(not empty.any(), folder / "docs.npy", f"document {first(empty)} is empty")
    counts = {"n_docs": corpus.n_docs, "n_chunks": corpus.n_chunks}
    check_spans(corpus, counts, tok.markers)
    if thoughts:
        check_thoughts(corpus, thoughts)


def check_thoughts(corpus: Corpus, thoughts: Thoughts) -> None:
    folder, tok = thoughts.folder, corpus.tokenizer
    has = np.diff(thoughts.chunks) > 0
    counts = {"n_vocab": corpus.meta["n_vocab"], "n_thoughts": int(has.sum())}
    check_spans(thoughts, counts, tok.markers)
    asked = has & corpus.questions
    what = f"chunk {first(asked)} is a question and has a thought"
    expect(not asked.any(), folder / "chunks.npy", what)
    path = folder / "samples.npz"  # a teacher's thoughts have none
    rows = {name: len(x) for name, x in read_npz(path).items()}
    good = set(rows.values()) <= {corpus.n_chunks}
    expect(good, path, f"rows {rows}, expected {corpus.n_chunks} of each")


def check_spans(part: Corpus | Thoughts, counts: dict, never: frozenset[int]) -> None:
    """The counts in meta.json, the ids, and the hash of tokens.bin and chunks.npy.

    never: ids that must not occur.
    """
    meta, folder, tokens = part.meta, part.folder, part.tokens
    for name, n in (counts | {"n_tokens": len(tokens)}).items():
        said = meta.get(name, n)
        expect(
            said == n, folder / "meta.json", f"{name} {said}, but the files hold {n}"
        )
    digest = hashlib.sha256()
    path = folder / "tokens.bin"
    for start in range(0, len(tokens), BLOCK):
        block = np.ascontiguousarray(tokens[start : start + BLOCK])
        digest.update(block.tobytes())
        too_high = block >= meta["n_vocab"]
        bad = too_high | np.isin(block, sorted(never))
        at = first(bad)
        what = f"not below {meta['n_vocab']}" if too_high[at] else "a special token"
        expect(not bad.any(), path, f"token {start + at} is {block[at]}, {what}")
    digest.update(np.asarray(part.chunks, dtype=np.int64).tobytes())
    same = meta.get("sha256", digest.hexdigest()) == digest.hexdigest()
    expect(
        same, path, "its bytes, or those of chunks.npy, do not have meta.json's hash"
    )


def first(which: np.ndarray) -> int:
    """Index of the first that is true; 0 if none is."""
    return int(which.argmax()) if len(which) else 0


# -------------------- main


def open_folders(folders: list[str]) -> tuple[Corpus, Thoughts | None]:
    """The corpus and the thoughts; UserError says what to name instead."""
    if len(folders) > 2:
        expected = "expected CORPUS or CORPUS THOUGHTS"
        raise UserError(f"{folders[2]}: one folder too many; {expected}")
    folder = Path(folders[0])
    path = folder / "meta.json"
    kind = read_json(path).get("kind") if path.exists() else None
    if kind == "thoughts":
        first_the_corpus = "name the corpus they belong to first: CORPUS"
        raise UserError(f"{folder}: holds thoughts; {first_the_corpus} {folder}")
    inside = sorted(str(meta.parent) for meta in folder.glob("*/meta.json"))
    if kind != "corpus" and inside:
        raise UserError(f"{folder}: no corpus itself; name one of {', '.join(inside)}")
    corpus = open_corpus(folder)
    return corpus, open_thoughts(folders[1], corpus) if len(folders) > 1 else None


def main(s: Settings) -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters
    corpus, thoughts = open_folders(s.folders[:2] if s.html else s.folders)
    if s.html:
        folders = [Path(folder) for folder in s.folders[1:]]
        if not folders:
            raise UserError("--html: shows thoughts; name CORPUS THOUGHTS")
        write_page(
            Path(s.html), f"{corpus.folder.name}: chunks and thoughts", corpus, folders
        )
        return print(s.html)
    if s.check:
        check(corpus, thoughts)
        parts = [corpus, thoughts] if thoughts else [corpus]
        said = [f"{part.folder}, {len(part.tokens):,} tokens" for part in parts]
        return print("sound: " + "; ".join(said))
    print(summary(corpus, thoughts))
    n = min(s.n, corpus.n_docs)
    for d in sorted(random.Random(s.seed).sample(range(corpus.n_docs), n)):
        print("\n" + document(corpus, thoughts, d))


if __name__ == "__main__":
    run(main, Settings)
