"""The toy corpus: chains of arithmetic modulo 10, whose true thoughts are known.

    question (given)   Start at 3. Add 8. Multiply by 9.
    thought (latent)   3 + 8 -> 1 * 9 -> 9
    answer             The last digit is 9.

A document is one or several problems, each a question chunk and an answer chunk. Written to --out_dir:

    warm/  warm_thoughts/      documents with their thoughts, for the warm start
    raw/                       documents without, for the EM loop
    heldout/                   documents for evaluation
    raw_truth/  heldout_truth/ the true thoughts of the last two: for reporting only, no training or E-step opens them

All problems are different from each other, over the three parts, so no held-out problem is ever trained on. The same seed
gives the same bytes.

    python data/digits.py --out_dir=out/digits
    python data/digits.py --out_dir=out/hard --max_ops=8 --modulus=13 --problems=3
"""

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
    """The (operation, operand) pairs that there are. A factor is left out if it makes more than two numbers alike (modulo 10: 0 and
    5): behind it a wrong step would not show in the answer, and thoughts with mistakes would pass for good ones."""
    pairs = [(operation, operand) for operation in s.operations for operand in range(s.modulus)]
    return [(operation, operand) for operation, operand in pairs if operation != "*" or math.gcd(operand, s.modulus) <= 2]


def draw_problem(rng: random.Random, s: Settings) -> tuple:
    """(start, ((operation, operand), ...)), all numbers below the modulus. No (operation, operand) occurs twice in a problem, so that
    each step of the thought can be found in the question by what it says."""
    return rng.randrange(s.modulus), tuple(rng.sample(pairs_of(s), rng.randint(s.min_ops, s.max_ops)))


def solve(problem: tuple, modulus: int) -> tuple[list[tuple[int, str, int, int]], int]:
    """The running steps (value, operation, operand, new value), and the result."""
    value, steps = problem[0], []
    for op, operand in problem[1]:
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[op] % modulus
        steps.append((value, op, operand, result))
        value = result
    return steps, value


def write_thought(steps: list[tuple]) -> str:
    """The steps as one chain. The space in front: " 3" is the same token everywhere."""
    return f" {steps[0][0]}" + "".join(f" {op} {operand} -> {result}" for _, op, operand, result in steps)


def write_problem(problem: tuple, modulus: int) -> tuple[str, str, str]:
    """Question, thought and answer as text."""
    steps, result = solve(problem, modulus)
    question = " ".join([f"Start at {problem[0]}."] + [f"{OPERATIONS[op]} {operand}." for op, operand in problem[1]])
    asked = "The last digit" if modulus == 10 else f"The remainder by {modulus}"
    return question, write_thought(steps), f" {asked} is {result}."


def make_documents(s: Settings) -> dict[str, list]:
    """{"warm" | "raw" | "heldout": documents}, each a list of problems, all different. UserError when too few exist."""
    if not s.operations or set(s.operations) - set(OPERATIONS) or len(set(s.operations)) < len(s.operations):
        raise UserError(f"--operations={s.operations}: expected some of + - *, each once")
    n_pairs = len(pairs_of(s))
    exist = sum(s.modulus * math.perm(n_pairs, n) for n in range(s.min_ops, s.max_ops + 1))
    needed = (s.warm + s.raw + s.heldout) * s.problems
    if s.min_ops > s.max_ops:
        raise UserError(f"--min_ops={s.min_ops} is above --max_ops={s.max_ops}")
    if s.max_ops > n_pairs:
        raise UserError(f"--max_ops={s.max_ops}: a problem never repeats an operation with its operand, and there are {n_pairs}")
    if needed * 2 > exist:
        raise UserError(f"{needed} problems wanted, {exist} exist: raise --max_ops or --modulus, or ask for at most half of them")
    rng, seen, documents = random.Random(s.seed), set(), {}
    for part in ("warm", "raw", "heldout"):
        documents[part] = []
        for _ in range(getattr(s, part)):
            document = []
            while len(document) < s.problems:
                problem = draw_problem(rng, s)
                if problem not in seen:
                    seen.add(problem)
                    document.append(write_problem(problem, s.modulus))
            documents[part].append(document)
    return documents


def true_nats(corpus: Corpus) -> np.ndarray:
    """-log p(answers | what stands before them) of each document under the rules above, [n_docs]. corpus: made by this script.

    The answer follows from the question; all that is left to guess is that the question is over. After n operations it is with
    probability 1 / (max_ops - n + 1), by the uniform draw of their number. (That no problem comes twice makes short ones a little
    rarer.) A model that always expects the end would score these tokens better, and pay for it at the questions.
    """
    recipe, nats = corpus.meta["source"], np.zeros(corpus.n_docs)
    for i in np.flatnonzero(corpus.questions):
        n = corpus.tokenizer.decode(corpus.chunk(i)).count(".") - 1  # "Start at 3." comes before the first
        nats[corpus.doc_of(i)] += math.log(recipe["max_ops"] - n + 1)
    return nats


def main(s: Settings) -> None:
    documents = make_documents(s)
    if s.tokenizer:
        tok = load_tokenizer(s.tokenizer)
    else:
        tok = make_tokenizer((text for d in documents["warm"] for problem in d for text in problem), s.n_vocab)
    source = {"maker": "data/digits.py"} | {k: v for k, v in asdict(s).items() if k != "out_dir"}
    thoughts = {"warm": "warm_thoughts", "raw": "raw_truth", "heldout": "heldout_truth"}
    write_parts(documents, tok, claim(s.out_dir, s), source, thoughts)


if __name__ == "__main__":
    run(main, Settings)
