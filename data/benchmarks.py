"""The benchmarks that eval_math.py reads: GSM8K, MATH, MATH-500 and the STEM subjects of MMLU, fetched, or imported from files that are there.

    python data/benchmarks.py all                                 # fetch all four (needs huggingface_hub and pyarrow); or some: gsm8k math500
    python data/benchmarks.py gsm8k=grade-school-math math=MATH   # import folders
    python data/benchmarks.py math500.test=sample.jsonl           # import a file whose name does not say which split it is

BENCHMARK is NAME, NAME=PATH or NAME.SPLIT=PATH; a PATH is a file, or a folder with all that is in it:

    gsm8k      jsonl or parquet of {question, answer}, the answer ending in "#### 72"
    math       hendrycks/math (a json file a problem, in folders by subject), or jsonl or parquet of {problem, level, type, solution}
    math500    jsonl or parquet of {problem, solution, answer, subject, level}; test only
    mmlu_stem  csv (question, four choices, a letter), parquet or jsonl of {question, subject, choices, answer}; subjects but STEM's are left out

Written to --out_dir/NAME/train.jsonl and test.jsonl, the fields as published. Names of files and folders tell the split (MMLU's dev is its train;
validation, auxiliary and socratic files are left out, by count). A row that eval_math.py could not read is refused, with file and line.
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
from data.lib.problems import fault, read_rows
from data.lib.sources import from_hub

SOURCES = {"gsm8k": ("openai/gsm8k", ["main/*.parquet"]), "math": ("EleutherAI/hendrycks_math", ["*/*.parquet"]),
           "math500": ("HuggingFaceH4/MATH-500", ["test.jsonl"]), "mmlu_stem": ("cais/mmlu", ["all/test-*.parquet", "all/dev-*.parquet"])}  # fmt: skip
PUBLISHED = {"gsm8k": {"train": 7473, "test": 1319}, "math": {"train": 7500, "test": 5000}, "math500": {"test": 500}, "mmlu_stem": {"train": 90, "test": 3018}}
STEM = ("abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science", "college_mathematics", "college_physics",
        "computer_security", "conceptual_physics", "electrical_engineering", "elementary_mathematics", "high_school_biology", "high_school_chemistry",
        "high_school_computer_science", "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning")  # fmt: skip
SPLITS = {"train": "train", "dev": "train", "test": "test", "val": "", "validation": ""}
LEFT_OUT = {"auxiliary", "socratic"}  # MMLU's and GSM8K's, beside what is published as train


@dataclass(kw_only=True)
class Settings:
    benchmarks: list = opt(help="gsm8k, math, math500, mmlu_stem, or all; each alone (fetched) or as NAME=PATH (imported)")
    out_dir: str = opt(str(Path(__file__).resolve().with_suffix("")), "where the folders go; eval_math.py looks in the default")


def split_of(path: Path) -> str:
    """What the names say, the file's before its folders': "train", "test", or "" for neither."""
    words = [re.findall("[a-z]+", part.lower()) for part in reversed(path.parts)]
    said = next(filter(None, ({SPLITS[word] for word in part if word in SPLITS} for part in words)), {""})
    return "" if len(said) > 1 or LEFT_OUT & set(sum(words, [])) else said.pop()


def natural(path: Path) -> list:
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", path.as_posix())]  # 2.json before 10.json


def collect(name: str, root: Path, split: str) -> tuple[dict[str, list[dict]], Counter]:
    """{split: rows} of a file or folder, and what was left out. `split` is given, or "" to be told by the names."""
    files = [root] if root.is_file() else sorted((path for path in root.rglob("*") if path.suffix in (".jsonl", ".json", ".parquet", ".csv")), key=natural)
    found, left = {}, Counter()
    for path in files:
        place = path.relative_to(root.parent)
        of = split or split_of(place)
        if not of and path == root:
            raise UserError(f"{path}: its name says neither train nor test; say which by {name}.test={path}")
        for number, row in enumerate(read_rows(path) if of else (), 1):
            if why := fault(row):
                raise UserError(f"{path}:{number}: {why}; mend it or take it out")
            if name == "mmlu_stem":
                row = row if row.get("subject") or row.get("type") else row | {"subject": next((x for x in STEM if x in place.as_posix()), "")}
                if str(row.get("subject") or row.get("type")).lower().replace(" ", "_") not in STEM:
                    left["questions of other subjects"] += 1
                    continue
            found.setdefault(of, []).append(row)
        left["files of neither split"] += not of
    if not found:
        raise UserError(f"{root}: {'holds no problem of ' + name if root.exists() else 'no such file or folder'}")
    return found, +left


def write(path: Path, rows: list[dict], published: int) -> None:
    """One jsonl, whole or absent; UserError when another one is there."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.exists() and path.read_bytes() != text:
        raise UserError(f"{path}: is there with other problems; remove it first, or give another --out_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(text)
    print(f"{path}: {len(rows):,} problems, " + ("as published" if len(rows) == published else f"{published:,} were published"))


def main(s: Settings) -> None:
    for word in sum((list(SOURCES) if word == "all" else [word] for word in s.benchmarks), []):
        name, _, source = word.partition("=")
        name, _, split = name.partition(".")
        if name not in SOURCES or split not in ("", "train", "test") or (split and not source):
            raise UserError(f"{word}: expected {', '.join(SOURCES)} or all, as NAME, NAME=PATH or NAME.test=PATH")
        folder = Path(s.out_dir) / name
        if not source and (folder / "test.jsonl").exists():  # test.jsonl is written last
            print(f"{folder}: there already")
            continue
        repo, patterns = SOURCES[name]
        fetch = lambda hub: hub.snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)  # noqa: E731
        found, left = collect(name, Path(source or from_hub(repo, f"name files that are there: {name}=FOLDER", fetch)).absolute(), split)
        for of, rows in sorted(found.items(), reverse=True):  # train, then test
            write(folder / f"{of}.jsonl", rows, PUBLISHED[name].get(of, 0))
        print("".join(f"  left out: {n:,} {why}\n" for why, n in left.items()), end="")


if __name__ == "__main__":
    run(main, Settings)
