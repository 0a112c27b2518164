"""Look at a corpus folder, and at the thoughts for it: counts, lengths, and random documents in full; or check that every byte of it is sound.

    python data/show.py --corpus=out/digits/warm --thoughts=out/digits/warm_thoughts --n=3
    python data/show.py --corpus=C --thoughts=T --check      # one line about the first damage, and a non-zero exit code

In colour on a terminal, unless NO_COLOR is set. Characters that would steer the terminal are shown as a replacement character: texts come from anywhere.
"""

import hashlib
import os
import random
import sys
import zipfile
import zlib
from dataclasses import dataclass

if not __package__:  # run as `python data/show.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data.cli import UserError, opt, run
from data.corpus import Corpus, Thoughts, open_corpus, open_thoughts

BLOCK = 1 << 22  # tokens that are checked at once
DIM, BOLD, THOUGHT = "2", "1", "36"


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt(help="corpus folder")
    thoughts: str = opt("", "a thoughts folder for it")
    n: int = opt(3, "random documents to show", low=0)
    seed: int = opt(0, "which ones")
    check: bool = opt(False, "verify hashes, offsets and ids instead")


def colour(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def histogram(name: str, lengths: np.ndarray) -> str:
    """Lengths in bins of powers of two, a row of signs each."""
    if not len(lengths):
        return f"{name}: none"
    bins = np.frexp(lengths)[1]  # 0; 1; 2 to 3; 4 to 7; ...
    counts = np.bincount(bins)
    head = f"tokens of {name}: mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, longest {lengths.max():,}"
    rows = [f"  {f'{1 << b >> 1:,} to {(1 << b) - 1:,}' if b > 1 else str(b):>20} {n:>10,} {'#' * -(-50 * n // counts.max())}" for b, n in enumerate(counts)]
    return "\n".join([head, *rows[bins.min() :]])


def summary(corpus: Corpus, thoughts: Thoughts | None) -> str:
    sizes, m = np.diff(corpus.chunks), corpus.meta
    lines = [f"{corpus.folder}: {corpus.n_docs:,} documents, {corpus.n_chunks:,} chunks ({corpus.questions.sum():,} of them questions), {len(corpus.tokens):,} tokens, {m.get('n_bytes', 0):,} bytes, vocabulary {m['n_vocab']:,}, source {m.get('source')}",
             histogram("a chunk", sizes)]  # fmt: skip
    if thoughts:
        lengths, n = np.diff(thoughts.chunks), len(thoughts.tokens)
        ratios = [n / max(1, total) for total in (len(corpus.tokens), sizes[lengths > 0].sum())]
        lines += [f"{thoughts.folder}: {(lengths > 0).sum():,} thoughts, {n:,} tokens: {ratios[0]:.2f} for each token of text, "
                  f"{ratios[1]:.2f} for each of the chunks that have one", histogram("a thought", lengths[lengths > 0])]  # fmt: skip
    return printable("\n".join(lines))


def document(corpus: Corpus, thoughts: Thoughts | None, d: int) -> str:
    """A document with a line before each chunk, and its thought before its text."""
    lines, tok = [colour(f"=== document {d} ===", BOLD)], corpus.tokenizer
    for i in range(corpus.docs[d], corpus.docs[d + 1]):
        lines.append(colour(f"--- chunk {i}{' (question)' if corpus.questions[i] else ''}, {len(corpus.chunk(i))} tokens", DIM))
        z = thoughts.span(i) if thoughts else ()
        if len(z):
            lines.append(colour(f"[thought, {len(z)} tokens: {printable(tok.decode(z).strip())}]", THOUGHT))
        lines.append(printable(tok.decode(corpus.chunk(i))).strip("\n"))
    return "\n".join(lines)


def check_spans(folder, meta: dict, tokens: np.ndarray, chunks: np.ndarray, special: list[int]) -> None:
    """The hash of tokens.bin and chunks.npy, and that every id is one of text."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), BLOCK):
        block = np.ascontiguousarray(tokens[start : start + BLOCK])
        digest.update(block.tobytes())
        bad = np.flatnonzero((block >= meta["n_vocab"]) | np.isin(block, special))
        if len(bad):
            what = f"not below {meta['n_vocab']}" if block[bad[0]] >= meta["n_vocab"] else "a special token"
            raise UserError(f"{folder / 'tokens.bin'}: token {start + bad[0]} is {block[bad[0]]}, {what}; make the folder again")
    digest.update(np.asarray(chunks, dtype=np.int64).tobytes())
    if "sha256" in meta and digest.hexdigest() != meta["sha256"]:
        raise UserError(f"{folder / 'tokens.bin'}: its bytes, or those of chunks.npy, are not those of meta.json's hash; make the folder again")


def check(corpus: Corpus, thoughts: Thoughts | None) -> None:
    """UserError for the first damage. Offsets, sizes and kinds of file were checked when the folders were opened."""
    tok, path = corpus.tokenizer, corpus.folder / "meta.json"
    if tok.sha256 != corpus.meta["tokenizer"] or tok.n_vocab != corpus.meta["n_vocab"]:
        raise UserError(f"{corpus.folder / 'tokenizer.json'}: not the tokenizer that meta.json names; make the folder again")
    for name, n in (("n_docs", corpus.n_docs), ("n_chunks", corpus.n_chunks), ("n_tokens", len(corpus.tokens))):
        if corpus.meta.get(name, n) != n:
            raise UserError(f"{path}: {name} {corpus.meta[name]}, but the files hold {n}; make the folder again")
    empty = np.flatnonzero(np.diff(corpus.chunks[corpus.docs]) == 0)
    if len(empty):
        raise UserError(f"{corpus.folder / 'docs.npy'}: document {empty[0]} is empty; make the folder again")
    markers = [tok.bos, tok.eos, tok.sol, tok.eol, tok.pri, tok.pos]
    check_spans(corpus.folder, corpus.meta, corpus.tokens, corpus.chunks, markers)
    if thoughts:
        check_thoughts(corpus, thoughts, markers)


def check_thoughts(corpus: Corpus, thoughts: Thoughts, markers: list[int]) -> None:
    meta, has, samples = thoughts.meta, np.diff(thoughts.chunks) > 0, thoughts.folder / "samples.npz"
    for name, n in (("n_vocab", corpus.meta["n_vocab"]), ("n_thoughts", int(has.sum())), ("n_tokens", len(thoughts.tokens))):
        if meta.get(name, n) != n:
            raise UserError(f"{thoughts.folder / 'meta.json'}: {name} {meta[name]}, expected {n}; make the folder again")
    # A sampled thought can hold any id but EOL; a teacher's holds text only.
    check_spans(thoughts.folder, meta, thoughts.tokens, thoughts.chunks, [corpus.tokenizer.eol] if "samples" in meta else markers)
    if (has & corpus.questions).any():
        raise UserError(f"{thoughts.folder / 'chunks.npy'}: chunk {(has & corpus.questions).argmax()} is a question and has a thought; make the folder again")
    if samples.exists():
        try:
            rows = {name: len(values) for name, values in np.load(samples, allow_pickle=False).items()}
        except (ValueError, EOFError, OSError, TypeError, zipfile.BadZipFile, zlib.error) as e:
            raise UserError(f"{samples}: damaged ({e}); make the folder again") from None
        if set(rows.values()) - {corpus.n_chunks}:
            raise UserError(f"{samples}: rows {rows}, expected {corpus.n_chunks} of each; make the folder again")


def main(s: Settings) -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters
    corpus = open_corpus(s.corpus)
    thoughts = open_thoughts(s.thoughts, corpus) if s.thoughts else None
    if s.check:
        check(corpus, thoughts)
        return print(f"sound: {s.corpus}, {len(corpus.tokens):,} tokens" + (f"; {s.thoughts}, {len(thoughts.tokens):,} tokens" if thoughts else ""))
    print(summary(corpus, thoughts))
    for d in sorted(random.Random(s.seed).sample(range(corpus.n_docs), min(s.n, corpus.n_docs))):
        print("\n" + document(corpus, thoughts, d))


if __name__ == "__main__":
    run(main, Settings)
