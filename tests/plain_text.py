"""The text and the prompt of "Plain text through the loop" (tests/README.md).

    python tests/plain_text.py --data=../shared/data --out_dir=out/plain

writes docs.jsonl: Calculus Made Easy in parts of up to 6,000 characters, then GSM8K's training problems
with their solutions, seven to a document; and prompt.txt for data/teacher.py: two examples
in the form of eval_math.py's own prompt, which begins with "Problem:" and ends with "Solution:".
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.gsm8k import read_problem
from data.lib.cli import opt, run

PART, LEAST = 6000, 1500  # characters of a part of the book
PROBLEMS = 7  # to a document
PROMPT = """Tom has 3 boxes of 12 eggs. He breaks 5. How many eggs are whole?
He had 3 x 12 = 36 eggs. 36 - 5 = 31 are whole.
The answer is 31.

Solution:
Eggs in all: 3 x 12 = 36. The whole eggs are those in all less the broken ones: 36 - 5 = 31.

Problem:
If $y = x^2$, then the slope at $x = 3$ is 6.

Solution:
The derivative of $x^2$ is $2x$. At $x = 3$ that is 2 x 3 = 6.

Problem:
{passage}"""


@dataclass(kw_only=True)
class Settings:
    data: str = opt("../shared/data", "folder with calculus/ and gsm8k/")
    out_dir: str = opt("out/plain", "where docs.jsonl and prompt.txt go")
    problems: int = opt(1400, "how many of GSM8K's problems", low=0)


def parts_of_book(text: str) -> list[str]:
    """Whole paragraphs, up to PART characters together; what is left at the end if it is not too short."""
    parts, part = [], ""
    for paragraph in text.split("\n\n"):
        if part and len(part) + len(paragraph) > PART:
            parts.append(part)
            part = ""
        part += ("\n\n" if part else "") + paragraph
    return parts + [part] * (len(part) > LEAST)


def plain(line: str) -> str:
    """A problem and its solution as text."""
    question, solution, answer = read_problem(line)
    return f"{question}\n{solution}\nThe answer is {answer}."


def main(s: Settings) -> None:
    docs = []
    for path in sorted((Path(s.data) / "calculus").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            docs += parts_of_book(json.loads(line)["text"])
    n = len(docs)
    lines = (Path(s.data) / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = list(map(plain, lines[: s.problems]))
    docs += ["\n\n".join(rows[i : i + PROBLEMS]) for i in range(0, len(rows), PROBLEMS)]
    out_dir = Path(s.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"text": doc}) + "\n" for doc in docs)
    (out_dir / "docs.jsonl").write_text(text, encoding="utf-8")
    (out_dir / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    print(f"{out_dir}/docs.jsonl: {n} parts of the book, {len(docs) - n} documents of problems")


if __name__ == "__main__":
    run(main, Settings)
