"""The paper's comparison of methods as data: what each method trains on.

From the same raw documents of data/digits.py:

    raw-repeat   raw/                         the documents, again and again
    latent       raw/ and latent_thoughts/    the same, with the steps as thoughts
    wrap         wrap/                        four paraphrases of each document, one
                                              in each style of STYLES; no reasoning
    wrap-cot     wrap_cot/                    the same, the steps written in the text
    raw-fresh    raw_fresh/                   new documents, as many as --tokens take,
                                              so that none repeats

For evaluation there are heldout/, heldout_begun/ and heldout_asked/: the same
problems, none of which is in any other folder. A question alone, "Start at 3. Add 8.",
might go on with another operation; only the marker of a thought says that it does not.
So raw models are given the words up to the answer ("... The last digit is"), and
paraphrasing ones the words that ask for it ("... What is the last digit?"), which they
know from the style "questions". Then no model has to guess where the question ends.

The teacher is scripted: rules that read a document's text and nothing else, never the
true thoughts. A document whose answer its steps do not reach is refused. For other
corpora: data/teacher.py. All folders share one tokenizer, learned here from all kinds
of text in equal shares: a token budget buys each method about as much to read.

    python data/methods.py --corpus=out/digits --out_dir=out/methods
    python em.py --compare       # makes both, trains and evaluates all
"""

import os
import random
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Iterator, NamedTuple

if not __package__:  # run as `python data/methods.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data import digits
from data.lib.cli import UserError, claim, opt, run, write_json
from data.lib.corpus import (
    POSTERIOR,
    PRIOR,
    marker_count,
    open_corpus,
    open_thoughts,
    write_corpus,
    write_thoughts,
)
from data.lib.tokenizer import make_tokenizer


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt(help="folder with raw and heldout, made by data/digits.py")
    out_dir: str = opt(help="where the folders go")
    tokens: int = opt(1_000_000, "training tokens of each method: what raw-fresh must last for", low=1)
    n_vocab: int = opt(512, "text tokens of the tokenizer", low=256)
    seed: int = opt(0, "another seed, other fresh documents")


# -------------------- the scripted teacher

PROBLEM = re.compile(
    r"""Start\ at\ (\d+)\.
        ((?:\ (?:Add|Subtract|Multiply\ by)\ \d+\.)+)
        \ The\ (?:last\ digit|remainder\ by\ (\d+))\ is\ (\d+)\.
    """,
    re.VERBOSE,
)


class Style(NamedTuple):
    start: str
    operations: dict[str, str]
    question: str
    answer: str  # formatted with what is asked, and the result


STYLES = {  # after WRAP's four
    "easy": Style(
        "We have {}.",
        {"+": "Put {} more.", "-": "Take {} away.", "*": "Make it {} times as much."},
        "",
        "The {} we get is {}.",
    ),
    "scholarly": Style(
        "Let the initial value be {}.",
        {"+": "Augment by {}.", "-": "Diminish by {}.", "*": "Scale by {}."},
        "",
        "Hence the {} equals {}.",
    ),
    "encyclopedia": Style(
        "A number has the value {}.",
        {"+": "It is increased by {}.", "-": "It is reduced by {}.", "*": "It is multiplied by {}."},
        "",
        "Its {} is {}.",
    ),
    "questions": Style(
        "Start at {}.",
        {sign: f"{word} {{}}." for sign, word in digits.OPERATIONS.items()},
        "What is the {}?",
        "It is {1}.",
    ),
}


class Problem(NamedTuple):
    start: int
    operations: tuple  # ((operation, operand), ...)
    asked: str  # "last digit"
    steps: list[tuple]  # (3, "+", 8, 1): 3 + 8 = 1
    result: int


def understand(text: str) -> Problem:
    """What a problem's text says, and the steps that it leaves out; UserError for other texts."""
    text = text.strip()
    found = PROBLEM.fullmatch(text)
    if not found:
        advice = "for other text: data/teacher.py with --style=wrap and wrap-cot"
        raise UserError(f"{text[:80]!r}: not a problem of data/digits.py; {advice}")
    start, told, modulus, answer = found.groups()
    signs = {word: sign for sign, word in digits.OPERATIONS.items()}
    pairs = re.findall(r"([A-Z][a-z ]+) (\d+)\.", told)
    operations = tuple((signs[word], int(operand)) for word, operand in pairs)
    steps, result = digits.solve((int(start), operations), int(modulus or 10))
    if result != int(answer):
        raise UserError(f"{text[:80]!r}: the steps lead to {result}; mend the document")
    asked = f"remainder by {modulus}" if modulus else "last digit"
    return Problem(int(start), operations, asked, steps, result)


def rewrite(problem: Problem, style: str, with_steps: bool) -> str:
    """A paraphrase. Steps stand behind their operations, or, where it asks a question, behind that."""
    words = STYLES[style]
    told = [words.operations[sign].format(operand) for sign, operand in problem.operations]
    steps = [f"{value} {sign} {operand} = {result}." for value, sign, operand, result in problem.steps]
    question = [words.question.format(problem.asked)] if words.question else []
    if with_steps and question:
        question += steps
    elif with_steps:
        told = [f"{operation} {step}" for operation, step in zip(told, steps)]
    answer = words.answer.format(problem.asked, problem.result)
    return " ".join([words.start.format(problem.start), *told, *question, answer])


# -------------------- documents


def read_documents(folder: str) -> tuple[dict, list[tuple[str, str]]]:
    """meta.json of a corpus of data/digits.py, and its (question, answer) documents."""
    corpus = open_corpus(folder)
    if corpus.n_chunks != 2 * corpus.n_docs:
        raise UserError(f"{folder}: expected documents of one problem each, by data/digits.py")
    texts = [corpus.text(i) for i in range(corpus.n_chunks)]
    return corpus.meta, list(zip(texts[::2], texts[1::2]))


def draw_fresh(recipe: dict, known: set[str], tok, tokens: float, seed: int) -> Iterator[tuple[str, str]]:
    """New documents of so many tokens, drawn as the raw ones were.

    No question is in `known` or comes twice. UserError when none is left.
    """
    names = {field.name for field in fields(digits.Settings)}
    s = digits.Settings(**{k: v for k, v in recipe.items() if k in names}, out_dir="")
    rng = random.Random(f"fresh {seed}")
    known, misses = set(known), 0
    while tokens > 0:
        question, _, answer = digits.write_problem(digits.draw_problem(rng, s), s.modulus)
        misses = misses + 1 if question in known else 0
        if misses == 1000:
            advice = "lower --tokens, or make the corpus with a higher --max_ops"
            raise UserError(f"raw-fresh: {len(known)} problems are used up; {advice}")
        if not misses:
            known.add(question)
            tokens -= 2 + len(tok.encode_documents([[question, answer]])[0])
            yield question, answer


def begin_answer(question: str, answer: str) -> tuple[str, str]:
    """The same document with the words before the result moved into the question."""
    words, space, result = answer.rpartition(" ")
    return question + words, space + result


def ask(question: str, answer: str) -> tuple[str, str]:
    """The same document with the words that ask for the answer in the question."""
    asked = understand(question + answer).asked
    return f"{question} What is the {asked}?", answer


def describe(name: str, folder: Path, heldout: str, thoughts: str = "") -> dict:
    """A method's folders, its size, and how its models are evaluated.

    Raw models may answer as long as their longest document.
    """
    corpus = open_corpus(folder)
    tokens = corpus.meta["n_tokens"] + 2 * corpus.n_docs  # BOS and EOS
    longest = int(np.diff(corpus.chunks[corpus.docs]).max())
    evaluation = {"mode": "raw", "max_answer": longest}
    if thoughts:
        meta = open_thoughts(folder.parent / thoughts, corpus).meta
        markers = int(marker_count([PRIOR, POSTERIOR]).mean())  # a fair coin chooses
        tokens += meta["n_tokens"] + markers * meta["n_thoughts"]
        evaluation = {"mode": "latent"}
    return {
        "name": name,
        "corpus": folder.name,
        "thoughts": thoughts,
        "heldout": heldout,
        "evaluation": evaluation,
        "documents": corpus.n_docs,
        "tokens": tokens,
    }


def main(s: Settings) -> None:
    meta, raw = read_documents(f"{s.corpus}/raw")
    _, heldout = read_documents(f"{s.corpus}/heldout")
    problems = [understand(question + answer) for question, answer in raw]
    out = claim(s.out_dir, s)
    wrap = [rewrite(p, style, with_steps=False) for style in STYLES for p in problems]
    worked = [rewrite(p, style, with_steps=True) for style in STYLES for p in problems]
    latent = [q + a + digits.write_thought(p.steps) for (q, a), p in zip(raw[:200], problems)]
    some = [text for kind in (latent, wrap, worked) for text in kind[:: max(1, len(kind) // 200)]]
    tok = make_tokenizer(some, s.n_vocab)
    known = {question for question, _ in raw + heldout}
    enough = s.tokens * 1.02  # train.py rounds to whole steps
    parts = {
        "raw": raw,
        "wrap": [(text,) for text in wrap],
        "wrap_cot": [(text,) for text in worked],
        "raw_fresh": draw_fresh(meta["source"], known, tok, enough, s.seed),
        "heldout": heldout,
        "heldout_begun": [begin_answer(q, a) for q, a in heldout],
        "heldout_asked": [ask(q, a) for q, a in heldout],
    }
    source = {"maker": "data/methods.py", "tokens": s.tokens, "seed": s.seed, "raw": meta["sha256"]}
    for name, documents in parts.items():
        # A document's last chunk is to be learned, what stands before it is given.
        chunks = ([(text, i < len(d) - 1) for i, text in enumerate(d)] for d in documents)
        write_corpus(out / name, chunks, tok, source | {"part": name})
    spans = (span for p in problems for span in ([], tok.encode_thought(digits.write_thought(p.steps))))
    made_by = {"source": source | {"teacher": "scripted"}}
    write_thoughts(out / "latent_thoughts", open_corpus(out / "raw"), spans, made_by)
    methods = [
        describe("raw-repeat", out / "raw", "heldout_begun"),
        describe("raw-fresh", out / "raw_fresh", "heldout_begun"),
        describe("wrap", out / "wrap", "heldout_asked"),
        describe("wrap-cot", out / "wrap_cot", "heldout_asked"),
        describe("latent", out / "raw", "heldout", "latent_thoughts"),
    ]
    for m in methods:
        size = f"{m['documents']:,} documents, {m['tokens']:,} tokens a pass"
        print(f"{m['name']:10}  {size}, {s.tokens / m['tokens']:.1f} passes")
    write_json(out / "meta.json", {"kind": "methods", "methods": methods})


if __name__ == "__main__":
    run(main, Settings)
