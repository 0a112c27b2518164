"""Look at a corpus folder, and at the thoughts for it: counts, lengths, and random documents in full; or check that every byte of it is sound.

    python data/show.py out/digits/warm --n=3
    python data/show.py out/digits/warm out/digits/warm_thoughts      # with the thoughts for it
    python data/show.py CORPUS THOUGHTS --check                       # one line about the first damage, and a non-zero exit code

In colour on a terminal, unless NO_COLOR is set. Characters that would steer the terminal are shown as a replacement character: texts come from anywhere.
"""

import hashlib
import os
import random
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as `python data/show.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data.lib.cli import UserError, opt, read_json, run
from data.lib.corpus import Corpus, Thoughts, open_corpus, open_thoughts

BOLD, DIM, CYAN = 1, 2, 36


@dataclass(kw_only=True)
class Settings:
    folders: list = opt(help="a corpus folder, and, if wanted, a thoughts folder for it")
    n: int = opt(3, "random documents to show", low=0)
    seed: int = opt(0, "which ones")
    check: bool = opt(False, "verify hashes, offsets and ids instead")


def colour(text: str, code: int) -> str:
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
    lines = [f"{corpus.folder}: {corpus.n_docs:,} documents, {corpus.n_chunks:,} chunks ({corpus.questions.sum():,} of them questions), {len(corpus.tokens):,} tokens, "
             f"{m.get('n_bytes', 0):,} bytes, vocabulary {m['n_vocab']:,}", f"source: {m.get('source')}", histogram("a chunk", sizes)]  # fmt: skip
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
        if thoughts and len(z := thoughts.span(i)):
            lines.append(colour(f"[thought, {len(z)} tokens: {printable(tok.decode(z).strip())}]", CYAN))
        lines.append(printable(tok.decode(corpus.chunk(i))).strip("\n"))
    return "\n".join(lines)


def expect(good: bool, path, otherwise: str) -> None:
    if not good:
        raise UserError(f"{path}: {otherwise}; make the folder again")


def check_spans(folder, meta: dict, tokens: np.ndarray, chunks: np.ndarray, special: list[int], **counts) -> None:
    """The counts in meta.json, that every id is one of text, and the hash of tokens.bin and chunks.npy."""
    for name, n in (counts | {"n_tokens": len(tokens)}).items():
        expect(meta.get(name, n) == n, folder / "meta.json", f"{name} {meta.get(name)}, but the files hold {n}")
    digest = hashlib.sha256()
    for start in range(0, len(tokens), 1 << 22):
        block = np.ascontiguousarray(tokens[start : start + (1 << 22)])
        digest.update(block.tobytes())
        bad = (block >= meta["n_vocab"]) | np.isin(block, special)
        what = f"not below {meta['n_vocab']}" if block[bad.argmax()] >= meta["n_vocab"] else "a special token"
        expect(not bad.any(), folder / "tokens.bin", f"token {start + bad.argmax()} is {block[bad.argmax()]}, {what}")
    digest.update(np.asarray(chunks, dtype=np.int64).tobytes())
    expect(meta.get("sha256", digest.hexdigest()) == digest.hexdigest(), folder / "tokens.bin", "its bytes, or those of chunks.npy, do not have meta.json's hash")


def check(corpus: Corpus, thoughts: Thoughts | None) -> None:
    """UserError for the first damage. Offsets, sizes and kinds of file were checked when the folders were opened; docs.npy and questions.npy have no hash."""
    tok, meta, folder = corpus.tokenizer, corpus.meta, corpus.folder
    expect((tok.sha256, tok.n_vocab) == (meta["tokenizer"], meta["n_vocab"]), folder / "tokenizer.json", "not the tokenizer that meta.json names")
    expect((folder / "questions.npy").exists() == meta["questions"], folder / "meta.json", f"questions {meta['questions']}, but the file says otherwise")
    empty = np.diff(corpus.chunks[corpus.docs]) == 0
    expect(not empty.any(), folder / "docs.npy", f"document {empty.argmax() if len(empty) else 0} is empty")
    markers = [tok.bos, tok.eos, tok.sol, tok.eol, tok.pri, tok.pos]
    check_spans(folder, meta, corpus.tokens, corpus.chunks, markers, n_docs=corpus.n_docs, n_chunks=corpus.n_chunks)
    if not thoughts:
        return
    meta, folder, has = thoughts.meta, thoughts.folder, np.diff(thoughts.chunks) > 0
    never = [tok.eol] if "samples" in meta else markers  # a sampled thought can hold any id but EOL; a teacher's holds text only
    check_spans(folder, meta, thoughts.tokens, thoughts.chunks, never, n_vocab=corpus.meta["n_vocab"], n_thoughts=int(has.sum()))
    asked = has & corpus.questions
    expect(not asked.any(), folder / "chunks.npy", f"chunk {asked.argmax() if len(asked) else 0} is a question and has a thought")
    try:
        rows = {name: len(values) for name, values in np.load(folder / "samples.npz", allow_pickle=False).items()}
    except FileNotFoundError:  # a teacher's have none
        rows = {}
    except (ValueError, EOFError, OSError, TypeError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{folder / 'samples.npz'}: damaged ({e}); make the folder again") from None
    expect(set(rows.values()) <= {corpus.n_chunks}, folder / "samples.npz", f"rows {rows}, expected {corpus.n_chunks} of each")


def open_folders(folders: list[str]) -> tuple[Corpus, Thoughts | None]:
    """The corpus and the thoughts that were named; UserError that says what to name instead."""
    first = Path(folders[0])
    if len(folders) > 2:
        raise UserError(f"{folders[2]}: one folder too many; expected CORPUS or CORPUS THOUGHTS")
    meta = read_json(first / "meta.json") if (first / "meta.json").exists() else {}
    if meta.get("kind") == "thoughts":
        raise UserError(f"{first}: holds thoughts; name the corpus they belong to first: CORPUS {first}")
    inside = sorted(str(path.parent) for path in first.glob("*/meta.json"))
    if meta.get("kind") != "corpus" and inside:
        raise UserError(f"{first}: no corpus itself; name one of {', '.join(inside)}")
    corpus = open_corpus(first)
    return corpus, open_thoughts(folders[1], corpus) if len(folders) > 1 else None


def main(s: Settings) -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters
    corpus, thoughts = open_folders(s.folders)
    if s.check:
        check(corpus, thoughts)
        return print("sound: " + "; ".join(f"{part.folder}, {len(part.tokens):,} tokens" for part in (corpus, thoughts) if part))
    print(summary(corpus, thoughts))
    for d in sorted(random.Random(s.seed).sample(range(corpus.n_docs), min(s.n, corpus.n_docs))):
        print("\n" + document(corpus, thoughts, d))


if __name__ == "__main__":
    run(main, Settings)
