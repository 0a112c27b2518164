"""Benchmark problems: one record a problem, whatever the published file calls its fields.

A file's rows are read as published (read_rows), and each becomes an Item (read_item) or
is refused with its file and line (fault says why). choose_shots picks worked examples.
`s` of find_file and choose_shots are the settings of eval_math.py.
"""

import contextlib
import csv
import io
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from data.lib.cli import UserError
from data.lib.grader import extract_answer
from data.lib.sources import optional, read_jsonl

DATA = Path(__file__).resolve().parent.parent
N_SHOTS = {"gsm8k": 8, "math": 4, "math500": 4, "mmlu_stem": 4}
LETTERS = "ABCDEFGHIJ"  # of the choices of a question


class Item(NamedTuple):
    """A problem of a benchmark; `about` has its level and subject where the file has them."""

    question: str
    solution: str
    answer: str
    about: dict

    @property
    def question_text(self) -> str:
        return f"Problem:\n{self.question}\n\nSolution:\n"

    @property
    def answer_text(self) -> str:
        """The sentence that a response must end with.

        The answer stands in dollar signs where the problem writes its formulas so.
        """
        dollar = "$" if "$" in self.question + self.solution else ""
        return f"\nThe final answer is {dollar}{self.answer}{dollar}."


# ------------------------------------- rows of a file


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, as published; UserError for one that is damaged."""
    if path.suffix == ".parquet":
        return parquet_rows(path)
    if path.suffix == ".csv":
        return csv_rows(path)
    if path.suffix == ".json":
        # One problem, or a list of them. What is neither may be jsonl under this name.
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(path.read_text(encoding="utf-8"))
            return value if isinstance(value, list) else [value]
    return read_jsonl(str(path), json.loads, skip_bad=None)


def parquet_rows(path: Path) -> list[dict]:
    parquet = optional("pyarrow.parquet", str(path))
    arrow = optional("pyarrow", str(path))
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as e:
        raise UserError(f"{path}: not a parquet file ({e})") from None


def csv_rows(path: Path) -> list[dict]:
    """MMLU's form, which has no header: the question, its choices, the answer's letter."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a csv file in UTF-8 ({e})") from None
    rows = []
    for line in lines:
        if len(line) < 3:
            rows.append({})  # which fault() refuses, with its line
            continue
        question, *choices, letter = line
        answer = LETTERS.find(letter) if len(letter) == 1 else -1
        rows.append({"question": question, "choices": choices, "answer": answer})
    return rows


# ------------------------------------- rows to problems


def question_of(row: dict):
    return row.get("question", row.get("problem"))


def has_choices(row: dict) -> bool:
    choices = row.get("choices")
    return isinstance(choices, list) and 0 < len(choices) <= len(LETTERS)


def fault(row) -> str:
    """Why a row is no problem; "" when it is one: a question, and an answer in one of four forms."""
    if not isinstance(row, dict):
        return "expected a JSON object"
    question = question_of(row)
    solution = row.get("solution") or ""
    if not isinstance(question, str) or not question.strip() or not isinstance(solution, str):
        return 'field "question", "problem" or "solution" is missing or no text'
    return answer_fault(row, solution)


def answer_fault(row: dict, solution: str) -> str:
    answer = row.get("answer")
    if has_choices(row):
        n = len(row["choices"])
        named = answer in (*range(n), *LETTERS[:n])
        return "" if named else 'field "answer" names none of the choices'
    if answer is None:
        if re.search(r"\\f?boxed\b", solution):
            return ""
        return 'field "answer" is missing, and the solution has no \\boxed answer'
    if isinstance(answer, str):
        good = bool(answer.rpartition("####")[2].strip())
    else:
        good = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    return "" if good else 'field "answer" is empty, or neither text nor a number'


def read_item(row: dict, where: str) -> Item:
    """A row of GSM8K, MATH, MATH-500, MMLU or any {question, answer}, told apart by its fields.

    where: "file:line", for the message of the UserError when the row is no problem.
    """
    if why := fault(row):
        expected = "expected are rows of GSM8K, MATH, MMLU, or question and answer"
        raise UserError(f"{where}: {why} ({expected})")
    question = question_of(row).strip()
    answer = row.get("answer")
    solution = row.get("solution") or ""
    if has_choices(row):
        if isinstance(answer, int):
            answer = LETTERS[answer]
        choices = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"])]
        question = "\n".join([question, *choices])
    elif isinstance(answer, str) and "####" in answer:
        # GSM8K: the solution, with <<2+3=5>> for a calculator, then "#### 5".
        solution, _, answer = answer.rpartition("####")
        solution = re.sub(r"<<[^<>]*>>", "", solution)
    elif answer is None:
        answer = extract_answer(solution)
    if not answer and answer != 0:
        raise UserError(f"{where}: its solution says no answer")
    # A blank line would look like the end of an example.
    solution = " ".join(solution.split("\n\n")).strip()
    return Item(question, solution, str(answer).strip(), about_of(row))


def about_of(row: dict) -> dict:
    """{level, subject}, each where the row has it: "Level 3" -> "3"."""
    about = {}
    if row.get("level") is not None:
        about["level"] = str(row["level"]).removeprefix("Level ")
    subject = row.get("subject") or row.get("type")
    if subject:
        about["subject"] = str(subject)
    return about


def read_items(path: Path) -> list[Item]:
    """All problems of a file; UserError for a row that is none, and for a file without any."""
    items = []
    for number, row in enumerate(read_rows(path), 1):
        items.append(read_item(row, f"{path}:{number}"))
    if not items:
        raise UserError(f"{path}: holds no problem")
    return items


# ------------------------------------- files and worked examples


def find_file(s, split: str) -> Path:
    """The file of a split ("train" or "test"), named by a flag or lying in data/benchmarks; or UserError."""
    ours = s.benchmark in N_SHOTS
    if split == "train":
        named = s.train_file
    else:
        named = s.file or ("" if ours else s.benchmark)
    folder = DATA / "benchmarks" / s.benchmark
    places = [folder / f"{split}.jsonl", folder / f"{split}.parquet"]
    if named:
        places = [Path(named)]
    for path in places:
        if path.is_file():
            return path
    missing = f"{places[0]}: no such file"
    if split == "test" and not ours:
        names = ", ".join(N_SHOTS)
        raise UserError(f"{missing}; --benchmark is one of {names}, or a .jsonl or .parquet file")
    flag = "train_file" if split == "train" else "file"
    # MATH-500 is published without training problems.
    if ours and (s.benchmark, split) != ("math500", "train"):
        missing += f"; get it by `python data/benchmarks.py {s.benchmark}`"
    raise UserError(f"{missing}, or name it by --{flag}=FILE")


def choose_shots(s, tested: list[Item]) -> list[Item]:
    """The worked examples, in their order; none of them is also tested.

    --shots=train draws them from the training problems by --seed.
    """
    n = s.n_shots
    if n < 0:
        n = N_SHOTS.get(s.benchmark, 4 if s.shots else 0)
    if not n:
        return []
    path = shots_file(s, n)
    questions = {item.question for item in tested}
    solved = [item for item in read_items(path) if item.solution]
    items = [item for item in solved if item.question not in questions]
    if s.shots == "train":
        random.Random(s.seed).shuffle(items)
    if len(items) < n:
        found = f"{len(items)} examples with a solution that are not tested"
        raise UserError(f"{path}: {found}, but --n_shots={n}")
    return items[:n]


def shots_file(s, n: int) -> Path:
    if s.shots == "train":
        return find_file(s, "train")
    if not s.shots and s.benchmark not in N_SHOTS:
        raise UserError(f"--n_shots={n}: {s.benchmark} has no examples of ours; give --shots=FILE")
    ours = "math" if s.benchmark == "math500" else s.benchmark
    path = Path(s.shots or DATA / "shots" / f"{ours}.jsonl")
    if not path.is_file():
        raise UserError(f"{path}: no such file; --shots is a file of worked examples, or train")
    return path
