"""How often the thoughts of word problems are right: valid equations that end in the text's answer.

    python tests/bench_words.py --raw=out/word/raw out/words/seed0/E1 out/words/seed0/uniform/E1

A thought such as "( 4 * 20 ) - 18 = 62" is right if its left side has the value of its right
side, and that is the answer in its text. What is left of a chain of equations is looked at
line by line. A wrong way to the right answer counts as right, so these shares are upper bounds.

`uniform/E1` has the same samples as `E1` and picks one of those that ended by chance, so its
share is that of a single sample; the difference is what weights and the rule of gain choose.
"""

import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data.lib.cli import opt, run
from data.lib.corpus import open_corpus, open_thoughts

SIGNS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
RANK = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclass(kw_only=True)
class Settings:
    raw: str = opt(help="the corpus folder whose thoughts were inferred")
    folders: list = opt(help="thoughts folders")


def value(text: str) -> Fraction | None:
    """The value of sums of numbers with brackets, exact; None for anything else."""
    words = re.findall(r"\d[\d,]*\.?\d*|[-+*/()]", text)
    if "".join(words) != re.sub(r"[\s$]", "", text) or not words or len(words) > 60:
        return None
    numbers, waiting = [], []

    def apply() -> None:
        b, a = numbers.pop(), numbers.pop()
        numbers.append(SIGNS[waiting.pop()](a, b))

    try:
        for word in words:
            if word[0].isdigit():
                numbers.append(Fraction(word.replace(",", "")))
            elif word == "(":
                waiting.append(word)
            elif word == ")":
                while waiting[-1] != "(":
                    apply()
                waiting.pop()
            else:
                while waiting and RANK.get(waiting[-1], 0) >= RANK[word]:
                    apply()
                waiting.append(word)
        while waiting:
            apply()
    except (IndexError, KeyError, ZeroDivisionError, ValueError):
        return None
    return numbers[0] if len(numbers) == 1 else None


def last_value(thought: str) -> Fraction | None:
    """Where a thought arrives, if each of its equations holds."""
    found = None
    for line in thought.strip().splitlines():
        sides = [value(side) for side in line.split("=")]
        if len(sides) < 2 or None in sides or max(sides) - min(sides) > Fraction(1, 100):
            return None
        found = sides[-1]
    return found


def is_right(thought: str, text: str) -> bool:
    """Whether a thought's equations hold and end in the answer that the text gives."""
    said = re.search(r"The answer is ([\d.,]*\d)", text)
    arrived = last_value(thought)
    if not said or arrived is None:
        return False
    return abs(arrived - Fraction(said[1].replace(",", ""))) <= Fraction(1, 100)


def main(s: Settings) -> None:
    corpus = open_corpus(s.raw)
    tok = corpus.tokenizer
    print("right of picks | picks | chunks | ess | gain of the picked | folder")
    for folder in s.folders:
        thoughts = open_thoughts(folder, corpus)
        samples = np.load(Path(folder) / "samples.npz", allow_pickle=False)
        numbers = np.flatnonzero(~corpus.questions)
        kept = [i for i in numbers if len(thoughts.span(i))]
        right = [is_right(tok.decode(thoughts.span(i)), tok.decode(corpus.chunk(i))) for i in kept]
        gain = samples["log_x"][kept, samples["pick"][kept]] - samples["log_none"][kept]
        share = np.mean(right) if kept else np.nan
        ess = thoughts.meta["ess"]
        print(f"{share:.3f} | {len(kept)} | {len(numbers)} | {ess:.2f} | {gain.mean():.2f} | {folder}")


if __name__ == "__main__":
    run(main, Settings)
