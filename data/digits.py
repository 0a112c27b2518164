"""The toy corpus: chains of arithmetic modulo 10, whose true thoughts are known.

    question (given)   Start at 3. Add 8. Multiply by 9.
    thought (latent)   3 + 8 -> 1 * 9 -> 9
    answer             The last digit is 9.

A document is one or several problems, each a question chunk and an answer chunk.
Written to --out_dir:

    warm/  warm_thoughts/      documents with their thoughts, for the warm start
    raw/                       documents without, for the EM loop
    heldout/                   documents for evaluation
    raw_truth/  heldout_truth/ the true thoughts of the last two: for reports and
                               the control gold; no stage of the loop opens them

All problems are different from each other, over the three parts, so no held-out
problem is ever trained on. The same seed gives the same bytes.

    python data/digits.py --out_dir=out/digits
    python data/digits.py --out_dir=out/hard --max_ops=8 --modulus=13 --problems=3
"""

import itertools
import math
import os
import random
import sys
from dataclasses import asdict, dataclass

if not __package__:  # run as `python data/digits.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data.lib.cli import UserError, claim, opt, run
from data.lib.corpus import Corpus, write_parts
from data.lib.tokenizer import load_tokenizer, make_tokenizer

OPERATIONS = {"+": "Add", "-": "Subtract", "*": "Multiply by"}


@dataclass(kw_only=True)
class Settings:
    out_dir: str = opt(help="where the folders go")
    warm: int = opt(100, "documents with thoughts", low=1)
    raw: int = opt(600, "documents without", low=1)
    heldout: int = opt(1000, "documents for evaluation", low=1)
    min_ops: int = opt(2, "fewest operations a problem", low=1)
    max_ops: int = opt(4, "most operations a problem", low=1)
    operations: str = opt("+*", "which there are: any of + - *")
    modulus: int = opt(10, "arithmetic modulo this", low=2)
    problems: int = opt(1, "problems a document", low=1)
    tokenizer: str = opt("", "a tokenizer.json; none: learn one from the warm documents")
    n_vocab: int = opt(320, "text tokens of the learned tokenizer; 256: plain bytes", low=256)
    seed: int = opt(0, "another seed, other problems")


def pairs_of(s: Settings) -> list[tuple[str, int]]:
    """The (operation, operand) pairs that there are.

    A factor is left out if it makes more than two numbers alike (modulo 10: 0 and 5).
    Behind it a wrong step would not show in the answer, and thoughts with mistakes
    would pass for good ones.
    """
    pairs = []
    for operation in s.operations:
        for operand in range(s.modulus):
            if operation != "*" or math.gcd(operand, s.modulus) <= 2:
                pairs.append((operation, operand))
    return pairs


def draw_problem(rng: random.Random, s: Settings) -> tuple:
    """(start, ((operation, operand), ...)), all numbers below the modulus.

    No (operation, operand) occurs twice in a problem, so that each step of the thought
    can be found in the question by what it says.
    """
    start = rng.randrange(s.modulus)
    n_ops = rng.randint(s.min_ops, s.max_ops)
    return start, tuple(rng.sample(pairs_of(s), n_ops))


def solve(problem: tuple, modulus: int) -> tuple[list[tuple[int, str, int, int]], int]:
    """The running steps (value, operation, operand, new value), and the result."""
    value, operations = problem
    steps = []
    for operation, operand in operations:
        results = {"+": value + operand, "-": value - operand, "*": value * operand}
        result = results[operation] % modulus
        steps.append((value, operation, operand, result))
        value = result
    return steps, value


def write_thought(steps: list[tuple]) -> str:
    """The steps as one chain. With the space in front, " 3" is the same token everywhere."""
    chain = f" {steps[0][0]}"
    for _, operation, operand, result in steps:
        chain += f" {operation} {operand} -> {result}"
    return chain


def write_problem(problem: tuple, modulus: int) -> tuple[str, str, str]:
    """Question, thought and answer as text."""
    start, operations = problem
    steps, result = solve(problem, modulus)
    sentences = [f"Start at {start}."]
    for operation, operand in operations:
        sentences.append(f"{OPERATIONS[operation]} {operand}.")
    asked = "The last digit" if modulus == 10 else f"The remainder by {modulus}"
    return " ".join(sentences), write_thought(steps), f" {asked} is {result}."


def check_settings(s: Settings) -> None:
    """UserError where there are too few different problems, or none."""
    known = set(s.operations) <= set(OPERATIONS)
    if not s.operations or not known or len(set(s.operations)) < len(s.operations):
        raise UserError(f"--operations={s.operations}: expected some of + - *, each once")
    if s.min_ops > s.max_ops:
        raise UserError(f"--min_ops={s.min_ops} is above --max_ops={s.max_ops}")
    n_pairs = len(pairs_of(s))
    if s.max_ops > n_pairs:
        why = "a problem never repeats an operation with its operand"
        raise UserError(f"--max_ops={s.max_ops}: {why}, and there are {n_pairs}")
    lengths = range(s.min_ops, s.max_ops + 1)
    exist = sum(s.modulus * math.perm(n_pairs, n) for n in lengths)
    needed = (s.warm + s.raw + s.heldout) * s.problems
    if needed * 2 > exist:
        advice = "raise --max_ops or --modulus, or ask for at most half of them"
        raise UserError(f"{needed} problems wanted, {exist} exist: {advice}")


def make_documents(s: Settings) -> dict[str, list]:
    """{"warm" | "raw" | "heldout": documents}, each a list of problems, all different.

    UserError when too few exist.
    """
    check_settings(s)
    rng = random.Random(s.seed)
    seen = set()

    def new_problem() -> tuple[str, str, str]:
        while (problem := draw_problem(rng, s)) in seen:
            pass
        seen.add(problem)
        return write_problem(problem, s.modulus)

    documents = {}
    for part in ("warm", "raw", "heldout"):
        documents[part] = []
        for _ in range(getattr(s, part)):
            documents[part].append([new_problem() for _ in range(s.problems)])
    return documents


def true_nats(corpus: Corpus) -> np.ndarray:
    """-log p(answers | what stands before them) of each document, [n_docs], in nats.

    corpus: one that this script made, by the rules above. The answer follows from the
    question. All that is left to guess is that the question is over, and after n
    operations it is with probability 1 / (max_ops - n + 1), since their number is drawn
    uniformly. (That no problem comes twice makes short ones a little rarer.) A model
    that always expects the end would score these tokens better, and pay for it at the
    questions.
    """
    max_ops = corpus.meta["source"]["max_ops"]
    nats = np.zeros(corpus.n_docs)
    for i in np.flatnonzero(corpus.questions):
        question = corpus.text(i)
        n = question.count(".") - 1  # "Start at 3." comes before the first operation
        nats[corpus.doc_of(i)] += math.log(max_ops - n + 1)
    return nats


def main(s: Settings) -> None:
    documents = make_documents(s)
    if s.tokenizer:
        tok = load_tokenizer(s.tokenizer)
    else:
        problems = itertools.chain.from_iterable(documents["warm"])
        texts = itertools.chain.from_iterable(problems)
        tok = make_tokenizer(texts, s.n_vocab)
    source = {"maker": "data/digits.py"} | asdict(s)
    source.pop("out_dir")
    thoughts = {"warm": "warm_thoughts", "raw": "raw_truth", "heldout": "heldout_truth"}
    write_parts(documents, tok, claim(s.out_dir, s), source, thoughts)


if __name__ == "__main__":
    run(main, Settings)
