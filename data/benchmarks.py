"""Fetch or import the benchmarks of eval_math.py: GSM8K, MATH, MATH-500, MMLU's STEM part.

    python data/benchmarks.py all                                 # fetch all four
    python data/benchmarks.py gsm8k=grade-school-math math=MATH   # import folders
    python data/benchmarks.py math500.test=sample.jsonl           # a file of a known split

BENCHMARK is NAME (fetched; needs huggingface_hub and pyarrow), NAME=PATH or
NAME.SPLIT=PATH. A PATH is a file, or a folder with all that is in it:

    gsm8k      jsonl or parquet of {question, answer}, the answer ending in "#### 72"
    math       hendrycks/math (a json file a problem, in folders by subject), or
               jsonl or parquet of {problem, level, type, solution}
    math500    jsonl or parquet of {problem, solution, answer, subject, level}; test only
    mmlu_stem  csv (question, four choices, a letter), or parquet or jsonl of
               {question, subject, choices, answer}; only STEM's subjects are kept

The names of files and folders tell the split: MMLU's dev is its train; validation,
auxiliary and socratic files are left out, and counted. train.jsonl and test.jsonl in
--out_dir/NAME have the fields as published. A row that eval_math.py could not read is
refused, with its file and line.
"""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as `python data/benchmarks.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data.lib.cli import UserError, opt, replacing, run
from data.lib.problems import checked, read_rows
from data.lib.sources import from_hub

# Where each is published, and which files of it are wanted; how many problems it has.
SOURCES = {
    "gsm8k": ("openai/gsm8k", ["main/*.parquet"]),
    "math": ("EleutherAI/hendrycks_math", ["*/*.parquet"]),
    "math500": ("HuggingFaceH4/MATH-500", ["test.jsonl"]),
    "mmlu_stem": ("cais/mmlu", ["all/test-*.parquet", "all/dev-*.parquet"]),
}
PUBLISHED = {
    "gsm8k": {"train": 7473, "test": 1319},
    "math": {"train": 7500, "test": 5000},
    "math500": {"test": 500},
    "mmlu_stem": {"train": 90, "test": 3018},
}
STEM = """
    abstract_algebra astronomy college_biology college_chemistry
    college_computer_science college_mathematics college_physics computer_security
    conceptual_physics electrical_engineering elementary_mathematics
    high_school_biology high_school_chemistry high_school_computer_science
    high_school_mathematics high_school_physics high_school_statistics machine_learning
""".split()
SPLITS = {"train": "train", "dev": "train", "test": "test", "val": "", "validation": ""}
LEFT_OUT = {"auxiliary", "socratic"}  # MMLU's and GSM8K's, beside what is published as train
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
HERE = str(Path(__file__).resolve().with_suffix(""))  # data/benchmarks


@dataclass(kw_only=True)
class Settings:
    benchmarks: list = opt(help="gsm8k, math, math500, mmlu_stem or all; or NAME=PATH")
    out_dir: str = opt(HERE, "where the folders go; eval_math.py looks in the default")


def split_of(path: Path) -> str:
    """What the names say, the file's before its folders': "train", "test", or "" for neither."""
    parts = [re.findall("[a-z]+", part.lower()) for part in reversed(path.parts)]
    if any(LEFT_OUT.intersection(words) for words in parts):
        return ""
    for words in parts:
        said = {SPLITS[word] for word in words if word in SPLITS}
        if said:
            return said.pop() if len(said) == 1 else ""
    return ""


def natural(path: Path) -> list:
    """A key for sorting that puts 2.json before 10.json."""
    pieces = re.split(r"(\d+)", path.as_posix())
    return [int(piece) if piece.isdecimal() else piece for piece in pieces]


def stem_row(row: dict, place: Path) -> dict | None:
    """A row of MMLU with its subject, or None if that is not one of STEM. Of csv files, only the names
    tell the subject."""
    subject = row.get("subject") or row.get("type")
    if not subject:
        subject = next((name for name in STEM if name in place.as_posix()), "")
        row = row | {"subject": subject}
    return row if str(subject).lower().replace(" ", "_") in STEM else None


def collect(name: str, root: Path, split: str) -> tuple[dict[str, list[dict]], Counter]:
    """({split: rows} of a file or folder, counts of what was left out). split: "train" or "test", or ""
    where the names of the files tell it."""
    files = [root]
    if not root.is_file():
        files = [path for path in root.rglob("*") if path.suffix in SUFFIXES]
        files.sort(key=natural)
    found, left_out = {}, Counter()
    for path in files:
        place = path.relative_to(root.parent)
        file_split = split or split_of(place)
        if not file_split:
            if path == root:
                say = f"say which by {name}.test={path}"
                raise UserError(f"{path}: its name says neither train nor test; {say}")
            left_out["files of neither split"] += 1
            continue
        rows = read_rows(path, checked)
        if name == "mmlu_stem":
            kept = [stem_row(row, place) for row in rows]
            rows = [row for row in kept if row]
            left_out["questions of other subjects"] += len(kept) - len(rows)
        if rows:
            found.setdefault(file_split, []).extend(rows)
    if not found:
        why = f"holds no problem of {name}" if root.exists() else "no such file or folder"
        raise UserError(f"{root}: {why}")
    return found, left_out


def write(path: Path, rows: list[dict], published: int) -> None:
    """Write one jsonl file; UserError when another one is there."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.exists() and path.read_bytes() != text:
        instead = "remove it first, or give another --out_dir"
        raise UserError(f"{path}: is there with other problems; {instead}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(text)
    beside = "as published" if len(rows) == published else f"{published:,} were published"
    print(f"{path}: {len(rows):,} problems, {beside}")


def fetch(name: str) -> str:
    """The folder into which a benchmark was fetched from the Hugging Face hub."""
    repo, patterns = SOURCES[name]

    def download(hub):
        return hub.snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)

    return from_hub(repo, f"name files that are there: {name}=FOLDER", download)


def make(word: str, out_dir: Path) -> None:
    """Carry out one BENCHMARK of the command line."""
    name, _, source = word.partition("=")
    name, _, split = name.partition(".")
    known = name in SOURCES and split in ("", "train", "test")
    if not known or (split and not source):
        names = ", ".join(SOURCES)
        forms = "NAME, NAME=PATH or NAME.test=PATH"
        raise UserError(f"{word}: expected {names} or all, as {forms}")
    folder = out_dir / name
    if not source and (folder / "test.jsonl").exists():  # test.jsonl is written last
        print(f"{folder}: there already")
        return
    found, left_out = collect(name, Path(source or fetch(name)).absolute(), split)
    for file_split in ("train", "test"):
        if file_split in found:
            published = PUBLISHED[name].get(file_split, 0)
            write(folder / f"{file_split}.jsonl", found[file_split], published)
    for why, n in (+left_out).items():
        print(f"  left out: {n:,} {why}")


def main(s: Settings) -> None:
    for word in s.benchmarks:
        for benchmark in SOURCES if word == "all" else [word]:
            make(benchmark, Path(s.out_dir))


if __name__ == "__main__":
    run(main, Settings)
