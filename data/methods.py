"""The paper's comparison of methods as data: from the same raw digits documents, what each method trains on.

    raw-repeat       raw/                          the documents, again and again
    latent           raw/ with latent_thoughts/    the same documents, a thought for each answer: the steps
    wrap             wrap/                         four paraphrases of each document, one in each style of STYLES; no reasoning
    wrap-cot         wrap_cot/                     the same paraphrases with the steps written out inside the text
    raw-fresh        raw_fresh/                    new documents, as many as --tokens take, so that none repeats
    evaluation       heldout/  heldout_begun/  heldout_asked/    the same problems, none of them in any other folder

The teacher is scripted: rules that read a document's text, question and answer, and nothing else. It never opens the true thoughts. It works the steps
out as a strong model would, and a document whose answer its steps do not reach is refused. For other corpora: data/teacher.py and a real teacher.

All folders share one tokenizer, learned here from all kinds of text in equal shares: so a token budget buys each method about as much to read. meta.json
says how each is evaluated. Every wording ends in the answer; the style "questions" keeps the question's words, so each method has met such beginnings.
A question alone, "Start at 3. Add 8.", may go on with another operation; a thought's marker says that it does not. So raw models are given the words
up to the answer ("... The last digit is"), paraphrasing ones those that ask for it ("... What is the last digit?"): none has to guess where it ends.

    python data/methods.py --corpus=out/digits --out_dir=out/methods --tokens=1000000     # corpus: raw and heldout of data/digits.py
    python em.py --compare                                                                # makes both, trains and evaluates all
"""

import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

if not __package__:  # run as `python data/methods.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data import digits
from data.lib.cli import UserError, claim, opt, run, write_json
from data.lib.corpus import open_corpus, open_thoughts, write_corpus, write_thoughts
from data.lib.tokenizer import make_tokenizer


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt(help="folder with raw and heldout, made by data/digits.py")
    out_dir: str = opt(help="where the folders go")
    tokens: int = opt(1_000_000, "training tokens of each method: what raw-fresh must last for", low=1)
    n_vocab: int = opt(512, "text tokens of the tokenizer", low=256)
    seed: int = opt(0, "another seed, other fresh documents")


PROBLEM = re.compile(r"Start at (\d+)\.((?: (?:Add|Subtract|Multiply by) \d+\.)+) The (?:last digit|remainder by (\d+)) is (\d+)\.")
STYLES = {  # after WRAP's four: how it starts, each operation, what is asked, the answer
    "easy": ("We have {}.", {"+": "Put {} more.", "-": "Take {} away.", "*": "Make it {} times as much."}, "", "The {} we get is {}."),
    "scholarly": ("Let the initial value be {}.", {"+": "Augment by {}.", "-": "Diminish by {}.", "*": "Scale by {}."}, "", "Hence the {} equals {}."),
    "encyclopedia": ("A number has the value {}.", {"+": "It is increased by {}.", "-": "It is reduced by {}.", "*": "It is multiplied by {}."}, "", "Its {} is {}."),
    "questions": ("Start at {}.", {op: f"{word} {{}}." for op, word in digits.OPERATIONS.items()}, "What is the {}?", "It is {1}."),
}  # fmt: skip


class Problem(NamedTuple):
    start: int
    operations: tuple  # ((operation, operand), ...)
    asked: str  # "last digit"
    steps: list[tuple]  # (3, "+", 8, 1): 3 + 8 = 1
    result: int


def understand(text: str) -> Problem:
    """What a problem's text says, and the steps that it leaves out."""
    m = PROBLEM.fullmatch(text.strip())
    if not m:
        raise UserError(f"{text.strip()[:80]!r}: not a problem of data/digits.py; for other text: data/teacher.py with --style=wrap and wrap-cot")
    symbol = {word: op for op, word in digits.OPERATIONS.items()}
    operations = tuple((symbol[word], int(n)) for word, n in re.findall(r"([A-Z][a-z ]+) (\d+)\.", m[2]))
    steps, result = digits.solve((int(m[1]), operations), int(m[3] or 10))
    if result != int(m[4]):
        raise UserError(f"{text.strip()[:80]!r}: the steps lead to {result}; mend the document")
    asked = f"remainder by {m[3]}" if m[3] else "last digit"
    return Problem(int(m[1]), operations, asked, steps, result)


def think(p: Problem) -> str:
    return digits.write_thought(p.steps)


def rewrite(p: Problem, style: str, with_steps: bool) -> str:
    """A paraphrase. Steps stand behind the operation that they carry out, or, where a question is asked first, behind the question."""
    starts, words, asks, answers = STYLES[style]
    told = [words[op].format(n) for op, n in p.operations]
    steps = [f"{value} {op} {operand} = {result}." for value, op, operand, result in p.steps]
    if with_steps and not asks:
        told = [f"{operation} {step}" for operation, step in zip(told, steps)]
    behind = [asks.format(p.asked), *(steps if with_steps else [])] if asks else []
    return " ".join([starts.format(p.start), *told, *behind, answers.format(p.asked, p.result)])


def read_documents(folder: str) -> tuple[dict, list[tuple[str, str]]]:
    """meta.json of a corpus of data/digits.py, and its documents as (question, answer); UserError for any other corpus."""
    corpus = open_corpus(folder)
    if corpus.meta["source"].get("maker") != "data/digits.py" or corpus.n_chunks != 2 * corpus.n_docs:
        raise UserError(f"{folder}: expected documents of one problem each by data/digits.py; the scripted teacher knows no other, data/teacher.py does")
    texts = [corpus.tokenizer.decode(corpus.chunk(i)) for i in range(corpus.n_chunks)]
    return corpus.meta, list(zip(texts[::2], texts[1::2]))


def draw_fresh(recipe: dict, known: set[str], tok, tokens: float, seed: int) -> Iterator[tuple[str, str]]:
    """`tokens` of new documents, drawn as the raw ones were: none is in `known` or comes twice. UserError when none is left."""
    s = digits.Settings(out_dir="", **{k: v for k, v in recipe.items() if k in digits.Settings.__dataclass_fields__})
    rng, known, misses = random.Random(f"fresh {seed}"), set(known), 0
    while tokens > 0:
        question, _, answer = digits.write_problem(digits.draw_problem(rng, s), s.modulus)
        misses = misses + 1 if question in known else 0
        if misses == 1000:
            raise UserError(f"raw-fresh: {len(known)} problems are used up; lower --tokens, or make the corpus with a higher --max_ops")
        if not misses:
            known.add(question)
            tokens -= 2 + len(tok.encode_array(question)) + len(tok.encode_array(answer))
            yield question, answer


def describe(name: str, folder: Path, heldout: str, thoughts: str = "") -> dict:
    """A method's folders, its size, and how its models are evaluated: raw ones may answer as long as their longest document."""
    corpus = open_corpus(folder)
    tokens, longest = corpus.meta["n_tokens"] + 2 * corpus.n_docs, int(np.diff(corpus.chunks[corpus.docs]).max())
    if thoughts:  # and 3 or 5 markers with each
        meta = open_thoughts(folder.parent / thoughts, corpus).meta
        tokens += meta["n_tokens"] + 4 * meta["n_thoughts"]
    how = {"mode": "latent"} if thoughts else {"mode": "raw", "max_answer": longest}
    return {"name": name, "corpus": folder.name, "thoughts": thoughts, "heldout": heldout, "evaluation": how, "documents": corpus.n_docs, "tokens": tokens}


def main(s: Settings) -> None:
    (meta, raw), (_, heldout) = read_documents(f"{s.corpus}/raw"), read_documents(f"{s.corpus}/heldout")
    problems, out = [understand(q + a) for q, a in raw], claim(s.out_dir, s)
    wrap, cot = ([(rewrite(p, style, with_steps),) for style in STYLES for p in problems] for with_steps in (False, True))
    some = [q + a + think(p) for (q, a), p in zip(raw[:200], problems)]
    tok = make_tokenizer(some + [text for texts in (wrap, cot) for (text,) in texts[:: max(1, len(texts) // 200)]], s.n_vocab)
    fresh = draw_fresh(meta["source"], {q for q, _ in raw + heldout}, tok, s.tokens * 1.02, s.seed)  # 2% more: train.py rounds to whole steps
    begun = [(q + (given := a[: a.rindex(" ")]), a[len(given) :]) for q, a in heldout]
    asked = [(f"{q} What is the {understand(q + a).asked}?", a) for q, a in heldout]
    parts = {"raw": raw, "wrap": wrap, "wrap_cot": cot, "raw_fresh": fresh, "heldout": heldout, "heldout_begun": begun, "heldout_asked": asked}
    source = {"maker": "data/methods.py", "tokens": s.tokens, "seed": s.seed, "raw": meta["sha256"]}
    for name, documents in parts.items():  # a question is what stands before the last chunk
        write_corpus(out / name, ([(text, i < len(d) - 1) for i, text in enumerate(d)] for d in documents), tok, source | {"part": name})
    spans = (span for p in problems for span in ([], tok.encode_array(think(p))))
    write_thoughts(out / "latent_thoughts", open_corpus(out / "raw"), spans, {"source": source | {"teacher": "scripted"}})
    methods = [describe(*method) for method in (
        ("raw-repeat", out / "raw", "heldout_begun"), ("raw-fresh", out / "raw_fresh", "heldout_begun"), ("wrap", out / "wrap", "heldout_asked"),
        ("wrap-cot", out / "wrap_cot", "heldout_asked"), ("latent", out / "raw", "heldout", "latent_thoughts"))]  # fmt: skip
    for m in methods:
        print(f"{m['name']:10}  {m['documents']:,} documents, {m['tokens']:,} tokens a pass, {s.tokens / m['tokens']:.1f} passes")
    write_json(out / "meta.json", {"kind": "methods", "methods": methods})


if __name__ == "__main__":
    run(main, Settings)
