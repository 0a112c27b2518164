"""FineMath-4+ as the paper's corpora: fetched, and made by data/text.py.

    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/fm --dry_run
    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/fm
    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/fm "--files=here/*.parquet"

The first prints what it will take. The second fetches 18 GB (by huggingface_hub and
pyarrow) and builds the corpora, the third builds them from files that are there.

Writes --out_dir/validation, warm, bootstrap and rest: split by the index in the
shuffled order, without copies, and without documents that hold a question of a
test file in data/benchmarks (but MMLU's, which are stock phrases). Any step can be
cut off, and the same command goes on. The files go to OUT_DIR.files, one by one.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# Run as `python data/finemath.py`, its package is the folder above.
if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data import text
from data.lib.cli import Progress, duration, opt, run
from data.lib.corpus import token_dtype
from data.lib.sources import expand, from_hub, optional

REPO = "HuggingFaceTB/finemath"
FILES = [f"finemath-4plus/train-{i:05d}-of-00064.parquet" for i in range(64)]
READER = "pyarrow"
INSTEAD = "name files that are there by --files"
# All of FineMath-4+: documents and bytes on disk as on its card, bytes of text and tokens roughly.
DOCUMENTS = 6_699_493
ON_DISK = 18_365_184_633
TEXT = 31e9
TOKENS = 9.6e9
SPEED = 12e6  # bytes of text a second and worker (tests/README.md)


@dataclass(kw_only=True)
class Settings:
    tokenizer: str = opt(
        help="tokenizer.json of the model to be trained, or its folder"
    )
    out_dir: str = opt(help="where the corpus folders go")
    files: str = opt("", "files or quoted patterns, commas between; none: fetch them")
    limit: int = opt(0, "only the first so many files; 0: all", low=0)
    decontaminate: str = opt(
        "auto", "benchmark files, commas between; auto: those in data/benchmarks; none"
    )
    dedup: bool = opt(True, "keep one of several documents with the same text")
    skip_bad: bool = opt(
        False, "leave out and count damaged rows and the rest of damaged files"
    )
    seed: int = opt(0, "another seed, another order and other chunks")
    workers: int = opt(0, "processes; 0: one for each core", low=0)
    dry_run: bool = opt(False, "print the plan and end")


# -------------------- fetch


def fetch(folder: Path, names: list[str]) -> None:
    """Fetch the missing files; one that broke off goes on where it was."""
    how = {"repo_type": "dataset", "local_dir": str(folder)}
    progress = Progress("fetch", len(names), "files")
    for number, name in enumerate(names, 1):
        if not (folder / name).exists():
            from_hub(
                REPO,
                INSTEAD,
                lambda hub, name=name: hub.hf_hub_download(REPO, name, **how),
            )
        progress.update(number)


# -------------------- plan


def gigabytes(n: float) -> str:
    return f"{n / 1e9:,.3f} GB"


def show_plan(s: Settings, build: text.Settings) -> None:
    """Print what the run will take, if its files are like the whole of FineMath-4+."""
    there = [os.path.getsize(path) for path in build.files if os.path.exists(path)]
    left = (len(build.files) - len(there)) * ON_DISK / len(FILES)
    total = left + sum(there)
    share = total / ON_DISK
    n = round(share * DOCUMENTS)
    corpora = (
        share * TOKENS * token_dtype(text.tokenizer_of(s.tokenizer).n_vocab).itemsize
    )
    workers = text.n_workers(s.workers)
    out = Path(s.out_dir).absolute()
    free = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    of = text.split_of(np.arange(n), n, None)
    counts = zip(text.PAPER, np.bincount(of, minlength=len(text.PAPER)))
    splits = ", ".join(f"{name} {count:,}" for name, count in counts)
    benchmarks = build.decontaminate.replace(",", ", ")
    benchmarks = benchmarks or "(no benchmark: none is in data/benchmarks)"
    print(
        f"files      {len(build.files):,}, {gigabytes(total)}; {gigabytes(left)} of it to be fetched\n"
        f"documents  {n:,}: {splits}\n"
        f"text       {gigabytes(share * TEXT)}, {share * TOKENS / 1e9:,.3f} billion tokens\n"
        f"disk       {gigabytes(left + share * TEXT + 2 * corpora)} more while it runs, "
        f"{gigabytes(corpora)} of corpora in the end; {gigabytes(free)} are free\n"
        f"time       {duration(share * TEXT / SPEED / workers)} with {workers} workers "
        f"at {SPEED / 1e6:.0f} MB/s each, after the download\n"
        f"left out   {'copies; ' if s.dedup else ''}documents with a question of {benchmarks}"
    )


# -------------------- main


def known_benchmarks() -> str:
    """The test files in data/benchmarks but MMLU's, with commas between."""
    paths = sorted(Path(__file__).with_name("benchmarks").glob("*/test.jsonl"))
    return ",".join(str(path) for path in paths if path.parent.name != "mmlu_stem")


def main(s: Settings) -> None:
    folder = Path(s.out_dir.rstrip("/") + ".files")
    against = {"auto": known_benchmarks(), "none": ""}.get(
        s.decontaminate, s.decontaminate
    )
    # What is wrong is said now rather than after the download.
    text.tokenizer_of(s.tokenizer)
    text.finder_of(against)
    names = expand(s.files.split(",")) if s.files else FILES
    names = names[: s.limit or None]
    if not s.files:
        optional(READER, FILES[0])
    files = names if s.files else [str(folder / name) for name in names]
    same = ("tokenizer", "out_dir", "dedup", "skip_bad", "seed", "workers")
    flags = {name: getattr(s, name) for name in same}
    build = text.Settings(files=files, splits="paper", decontaminate=against, **flags)
    if s.dry_run:
        show_plan(s, build)
        return
    if not s.files and not (Path(s.out_dir) / "meta.json").exists():
        fetch(folder, names)
    text.main(build)


if __name__ == "__main__":
    run(main, Settings)
