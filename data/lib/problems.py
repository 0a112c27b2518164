"""Benchmarks: one record a problem, whatever the file's fields; where files lie, and worked examples."""

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

# ============================================================================================== PART ONE: THE EVALUATION
# ---------------------------------------------------------------------------------------------- problems and examples

DATA = Path(__file__).resolve().parent.parent
N_SHOTS = {"gsm8k": 8, "math": 4, "math500": 4, "mmlu_stem": 4}


class Item(NamedTuple):
    """A problem of a benchmark. `about`: level and subject, where the file has them."""

    question: str
    solution: str
    answer: str
    about: dict

    question_text = property(lambda self: f"Problem:\n{self.question}\n\nSolution:\n")

    @property
    def answer_text(self) -> str:
        """The sentence that a response must end with; in dollar signs where the problem writes its formulas so."""
        return f"\nThe final answer is ${self.answer}$." if "$" in self.question + self.solution else f"\nThe final answer is {self.answer}."


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, as published; UserError for one that is damaged."""
    if path.suffix == ".parquet":
        parquet, arrow = optional("pyarrow.parquet", str(path)), optional("pyarrow", str(path))
        try:
            return parquet.read_table(path).to_pylist()
        except (OSError, arrow.ArrowException) as e:
            raise UserError(f"{path}: not a parquet file ({e})") from None
    if path.suffix == ".csv":  # MMLU's, without a head
        try:
            rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
        except (csv.Error, UnicodeDecodeError) as e:
            raise UserError(f"{path}: not a csv file in UTF-8 ({e})") from None
        return [{"question": row[0], "choices": row[1:-1], "answer": "ABCDEFGHIJ".find(row[-1]) if len(row[-1]) == 1 else -1} if len(row) > 2 else {} for row in rows]
    if path.suffix == ".json":  # one problem, a list of them, or jsonl under another name
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(path.read_text(encoding="utf-8"))
            return value if isinstance(value, list) else [value]
    return read_jsonl(str(path), json.loads, skip_bad=None)


def fault(row) -> str:
    """Why a row is no problem; "" when it is one: a question, and an answer in one of four forms."""
    if not isinstance(row, dict):
        return "expected a JSON object"
    question, answer, choices, solution = row.get("question", row.get("problem")), row.get("answer"), row.get("choices"), row.get("solution") or ""
    if not isinstance(question, str) or not question.strip() or not isinstance(solution, str):
        return 'field "question", "problem" or "solution" is missing or no text'
    if isinstance(choices, list) and choices and len(choices) <= 10:
        return "" if answer in (*range(len(choices)), *"ABCDEFGHIJ"[: len(choices)]) else 'field "answer" names none of the choices'
    if answer is None:
        return "" if re.search(r"\\f?boxed\b", solution) else 'field "answer" is missing, and the solution has no \\boxed answer'
    good = answer.rpartition("####")[2].strip() if isinstance(answer, str) else isinstance(answer, (int, float)) and not isinstance(answer, bool)
    return "" if good else 'field "answer" is empty, or neither text nor a number'


def read_item(row: dict, where: str) -> Item:
    """A row of GSM8K, MATH, MATH-500, MMLU or any {question, answer}, told apart by its fields."""
    if why := fault(row):
        raise UserError(f"{where}: {why} (expected are rows of GSM8K, MATH, MMLU, or question and answer)")
    question, answer, solution, choices = row.get("question", row.get("problem")), row.get("answer"), row.get("solution") or "", row.get("choices")
    if isinstance(choices, list) and 0 < len(choices) <= 10:
        letters = "ABCDEFGHIJ"[: len(choices)]
        answer = letters[answer] if isinstance(answer, int) else answer
        question = "\n".join([question.strip(), *(f"({a}) {c}" for a, c in zip(letters, choices))])
    elif isinstance(answer, str) and "####" in answer:
        solution, _, answer = answer.rpartition("####")
        solution = re.sub(r"<<[^<>]*>>", "", solution)
    elif answer is None:
        answer = extract_answer(solution)
    if not answer and answer != 0:
        raise UserError(f"{where}: its solution says no answer")
    about = {"level": str(row["level"]).removeprefix("Level ")} if row.get("level") is not None else {}
    about |= {"subject": str(row.get("subject") or row.get("type"))} if row.get("subject") or row.get("type") else {}
    return Item(question.strip(), " ".join(solution.split("\n\n")).strip(), str(answer).strip(), about)


def find_file(s, split: str) -> Path:
    """The file of a split: named by a flag, or in data/benchmarks."""
    named = s.train_file if split == "train" else s.file or (s.benchmark if s.benchmark not in N_SHOTS else "")
    folder = DATA / "benchmarks" / s.benchmark
    places = [Path(named)] if named else [folder / f"{split}.jsonl", folder / f"{split}.parquet"]
    found = next((path for path in places if path.is_file()), None)
    if found is None and s.benchmark not in N_SHOTS and split != "train":
        raise UserError(f"{places[0]}: no such file; --benchmark is one of {', '.join(N_SHOTS)}, or a .jsonl or .parquet file")
    if found is None:
        known = s.benchmark in N_SHOTS and (s.benchmark, split) != ("math500", "train")  # MATH-500 has no training problems
        source = f"; get it by `python data/benchmarks.py {s.benchmark}`" if known else ""
        raise UserError(f"{places[0]}: no such file{source}, or name it by --{'train_file' if split == 'train' else 'file'}=FILE")
    return found


def read_items(path: Path) -> list[Item]:
    items = [read_item(row, f"{path}:{number}") for number, row in enumerate(read_rows(path), 1)]
    if not items:
        raise UserError(f"{path}: holds no problem")
    return items


def choose_shots(s, tested: list[Item]) -> list[Item]:
    """The worked examples, in their order; none of them is also tested."""
    n = s.n_shots if s.n_shots >= 0 else N_SHOTS.get(s.benchmark, 4 if s.shots else 0)
    if not n:
        return []
    if not s.shots and s.benchmark not in N_SHOTS:
        raise UserError(f"--n_shots={n}: {s.benchmark} has no examples of ours; give --shots=FILE")
    own = DATA / "shots" / ("math" if s.benchmark == "math500" else s.benchmark)
    path = find_file(s, "train") if s.shots == "train" else Path(s.shots or f"{own}.jsonl")
    if not path.is_file():
        raise UserError(f"{path}: no such file; --shots is a file of worked examples, or train")
    questions = {item.question for item in tested}
    items = [item for item in read_items(path) if item.solution and item.question not in questions]
    if s.shots == "train":
        random.Random(s.seed).shuffle(items)
    if len(items) < n:
        raise UserError(f"{path}: {len(items)} examples with a solution that are not tested, but --n_shots={n}")
    return items[:n]
