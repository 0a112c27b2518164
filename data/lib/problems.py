"""Benchmark problems: one record a problem, whatever the published file calls its fields.

A file's rows are read as published (read_rows), and each becomes an Item (read_item) or
is refused with its file and line. choose_shots picks worked examples.
`s` of find_file and choose_shots are the settings of eval_math.py.
"""

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data.lib.answers import BOX, boxed, braces
from data.lib.cli import UserError
from data.lib.sources import ONE_VALUE, optional, read_jsonl, refuse_stand_in, refused

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
        """The sentence that a response must end with. The answer stands in dollar signs where the
        problem writes its formulas so."""
        dollar = "$" if "$" in self.question + self.solution else ""
        return f"\nThe final answer is {dollar}{self.answer}{dollar}."


# -------------------- rows of a file


def read_rows(path: Path, use: Callable = lambda row: row) -> list:
    """use(row) of each row of a file as published. UserError for a damaged file, and for a row that
    `use` refuses by a ValueError."""
    refuse_stand_in(path)
    kinds = {".parquet": parquet_rows, ".csv": csv_rows, ".json": json_rows}
    rows = kinds[path.suffix](path) if path.suffix in kinds else None
    if rows is None:
        return read_jsonl(str(path), lambda line: use(json.loads(line)), skip_bad=None)
    used = []
    for number, row in rows:
        try:
            used.append(use(row))
        except ValueError as e:
            raise refused(f"{path}:{number}", e) from None
    return used


def json_rows(path: Path) -> list[tuple[int, dict]] | None:
    """One problem, or a list of them. What is neither may be jsonl under this name."""
    raw = path.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        if ONE_VALUE.match(raw):
            raise refused(str(path), e) from None
        return None
    return list(enumerate(value if isinstance(value, list) else [value], 1))


def parquet_rows(path: Path) -> list[tuple[int, dict]]:
    parquet = optional("pyarrow.parquet", str(path))
    arrow = optional("pyarrow", str(path))
    try:
        return list(enumerate(parquet.read_table(path).to_pylist(), 1))
    except (OSError, arrow.ArrowException) as e:
        raise UserError(f"{path}: not a parquet file ({e})") from None


def csv_rows(path: Path) -> list[tuple[int, dict]]:
    """(line, row) of a csv file with a header, or in MMLU's form without one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        found = [(reader.line_num, cells) for cells in reader if any(cells)]
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a csv file in UTF-8 ({e})") from None
    header = [name if name in LETTERS else name.lower() for name in found[0][1]] if found else []
    if {"question", "answer"} <= {*header}:
        return [(line, dict(zip(header, cells))) for line, cells in found[1:]]
    return [(line, mmlu_row(*cells)) for line, cells in found]


def mmlu_row(question: str, *cells: str) -> dict:
    """The question, its choices, the answer's letter. read_item() refuses too few of them."""
    *choices, letter = cells or [""]
    answer = LETTERS.find(letter) if letter_of(letter, len(LETTERS)) else -1
    return {"question": question, "choices": choices, "answer": answer}


# -------------------- rows to problems


def is_said(value) -> bool:
    """Whether there is a text, or a number: true, NaN and infinity are none."""
    if isinstance(value, str):
        return bool(value.strip())
    return type(value) in (int, float) and abs(value) < math.inf


def choices_of(row: dict) -> list:
    """The choices of a question, under one of three names; empty for none."""
    letters = [row.get(letter) for letter in LETTERS]
    while letters and not is_said(letters[-1]):
        letters.pop()
    choices = row.get("choices") or row.get("options") or (letters if len(letters) > 1 else [])
    if not isinstance(choices, list) or not all(map(is_said, choices)):
        raise ValueError('field "choices" or "options" is no list, or one is empty')
    if len(choices) > len(LETTERS):
        raise ValueError(f"there are {len(choices)} choices, at most {len(LETTERS)} are read")
    return choices


def letter_of(answer, n: int) -> str:
    """The letter of the choice that an answer names by it or by its number from 0 on; or ""."""
    if isinstance(answer, str):
        return answer.strip() if answer.strip() in [*LETTERS[:n]] else ""
    return LETTERS[int(answer)] if is_said(answer) and answer in range(n) else ""


def last_box(solution: str) -> str:
    """What the last \\boxed of a solution holds, which is the answer in MATH; "" if it is open."""
    starts = [m.start() for m in BOX.finditer(solution)]
    if not starts:
        return ""
    brace = solution.find("{", starts[-1])
    is_open = brace >= 0 and braces(solution, brace) is None
    return "" if is_open else boxed(solution, starts[-1]) or ""


def read_item(row) -> Item:
    """A row of GSM8K, MATH, MMLU or any {question, answer}, told apart by its fields. ValueError for
    anything else."""
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    question = row.get("question", row.get("problem"))
    solution = row.get("solution") or ""
    answer = row.get("answer")
    if not isinstance(question, str) or not question.strip() or not isinstance(solution, str):
        raise ValueError('field "question", "problem" or "solution" is missing or no text')
    why = 'field "answer" is empty, or neither text nor a number'
    if choices := choices_of(row):
        why = 'field "answer" names none of the choices'
        answer = letter_of(answer, len(choices))
        shown = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices)]
        question = "\n".join([question.strip(), *shown])
    elif answer is None:
        why = 'field "answer" is missing, and so is the solution\'s last \\boxed, or it is empty'
        answer = last_box(solution)
    elif isinstance(answer, str) and "####" in answer:
        # GSM8K: the solution, with <<2+3=5>> for a calculator, then "#### 5".
        solution, _, answer = answer.rpartition("####")
        solution = re.sub(r"<<[^<>]*>>", "", solution)
    if not is_said(answer):
        raise ValueError(why)
    f"{question}{solution}{answer}".encode()  # refuses half a surrogate pair
    # A blank line would look like the end of an example.
    solution = " ".join(solution.split("\n\n")).strip()
    return Item(question.strip(), solution, str(answer).strip(), about_of(row))


def checked(row) -> dict:
    """The row; ValueError when it is no problem."""
    read_item(row)
    return row


def about_of(row: dict) -> dict:
    """{level, subject}, each where the row has it: "Level 3" -> "3"."""
    about = {}
    if is_said(row.get("level")):
        about["level"] = str(row["level"]).removeprefix("Level ")
    subject = row.get("subject") or row.get("type")
    if is_said(subject):
        about["subject"] = str(subject)
    return about


def read_items(path: Path) -> list[Item]:
    """All problems of a file; UserError for a row that is none, and for a file without any."""
    items = read_rows(path, read_item)
    if not items:
        raise UserError(f"{path}: holds no problem")
    return items


# -------------------- files and worked examples


def find_file(s, split: str) -> Path:
    """The file of a split ("train" or "test"): a flag's, or in data/benchmarks."""
    ours = s.benchmark in N_SHOTS
    named = s.train_file if split == "train" else s.file or ("" if ours else s.benchmark)
    folder = DATA / "benchmarks" / s.benchmark
    places = [folder / f"{split}.jsonl", folder / f"{split}.parquet"]
    places = [Path(named)] if named else places
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
    """The worked examples, in their order; none of them is also tested. --shots=train draws them from
    the training problems by --seed."""
    n = s.n_shots if s.n_shots >= 0 else N_SHOTS.get(s.benchmark, 4 if s.shots else 0)
    if not n:
        return []
    path = shots_file(s, n)
    questions = {item.question for item in tested}
    items = [x for x in read_items(path) if x.solution and x.question not in questions]
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
