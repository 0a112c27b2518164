"""FineMath-4+ as the paper's corpora: fetched, and made by data/text.py.

    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/fm --dry_run
    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/fm
    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/fm "--files=here/*.parquet"

The first prints what it will take: files, documents, disk, time. The second
fetches 18 GB (it needs huggingface_hub and pyarrow) and builds the corpora, the
third builds them from files that are there already.

Writes --out_dir/validation, warm, bootstrap and rest: split by the index in the
shuffled order, without copies, and without documents that hold a question of a
test file in data/benchmarks (data/benchmarks.py). MMLU's are not looked for:
"Which of the following is false?" is no sign of a leak. Any step can be cut off,
and the same command goes on. The files go to --download_dir, one by one, at the
commit noted there in listing.json.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

# Run as `python data/finemath.py`, its package is the folder above.
if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data import text
from data.lib.cli import Progress, UserError, duration, opt, read_json, run, write_json
from data.lib.corpus import token_dtype
from data.lib.sources import Damaged, Format, expand, from_hub, kind_of, optional, texts

REPO = "HuggingFaceTB/finemath"
FOLDER = "finemath-4plus"
SUFFIX = ".parquet"
READER = "pyarrow"
INSTEAD = "name files that are there by --files"
SAMPLE = 8 << 20  # bytes of text to measure with
# All of FineMath-4+, until there is a file to measure with: documents and bytes
# on disk as on its card, bytes of text and tokens roughly, and the seconds of
# one worker at 12 MB/s (tests/README.md).
WHOLE = {
    "documents": 6_699_493,
    "on_disk": 18_365_184_633,
    "dropped": 0,
    "text": 31e9,
    "tokens": 9.6e9,
    "seconds": 31e9 / 12e6,
}


@dataclass(kw_only=True)
class Settings:
    tokenizer: str = opt(help="tokenizer.json of the model to be trained, or its folder")
    out_dir: str = opt(help="where the corpus folders go")
    files: str = opt("", "files or quoted patterns, commas between; none: fetch them")
    download_dir: str = opt("", "where fetched files go; none: OUT_DIR.files")
    limit: int = opt(0, "only the first so many files; 0: all", low=0)
    revision: str = opt("main", "branch, tag or commit of the data set")
    decontaminate: str = opt("auto", "benchmark files, commas between; auto: those in data/benchmarks; none")
    dedup: bool = opt(True, "keep one of several documents with the same text")
    skip_bad: bool = opt(False, "leave out and count damaged rows and the rest of damaged files")
    seed: int = opt(0, "another seed, another order and other chunks")
    workers: int = opt(0, "processes; 0: one for each core", low=0)
    dry_run: bool = opt(False, "print the plan and end")


# -------------------------------------------------------------------------- fetch


def is_there(entry: dict) -> bool:
    path = entry["path"]
    return os.path.exists(path) and os.path.getsize(path) == entry["bytes"]


def listing(s: Settings) -> dict:
    """{"revision", "commit", "files": [{"file", "bytes"}]} of the data set.

    It is noted when files are first fetched, so a run that goes on has the same files.
    """
    note = Path(s.download_dir) / "listing.json"
    if note.exists():
        noted = read_json(note)
        if noted["revision"] != s.revision:
            raise UserError(
                f"{note}: of --revision={noted['revision']}; give that one or another --download_dir"
            )
        return noted

    def ask(hub) -> dict:
        api = hub.HfApi()
        commit = api.dataset_info(REPO, revision=s.revision).sha
        how = {"recursive": True, "revision": commit, "repo_type": "dataset"}
        entries = api.list_repo_tree(REPO, FOLDER, **how)
        entries = [e for e in entries if e.path.endswith(SUFFIX)]
        files = [{"file": e.path, "bytes": e.size} for e in entries]
        return {"revision": s.revision, "commit": commit, "files": files}

    try:
        return from_hub(REPO, INSTEAD, ask)
    except UserError as e:
        if not s.dry_run:
            raise
        print(f"note: {e}")
        return {"files": [{"file": FOLDER, "bytes": WHOLE["on_disk"]}]}


def fetch(s: Settings, listed: dict, entries: list[dict]) -> None:
    """Fetch the missing files; one that broke off goes on where it was."""
    Path(s.download_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(s.download_dir) / "listing.json", listed)
    how = {"repo_type": "dataset", "revision": listed["commit"]}
    how["local_dir"] = s.download_dir
    progress = Progress("fetch", len(entries), "files")
    for number, entry in enumerate(entries, 1):
        if not is_there(entry):
            args = (REPO, entry["file"])
            from_hub(REPO, INSTEAD, lambda hub: hub.hf_hub_download(*args, **how))
        if not is_there(entry):
            raise UserError(
                f"{entry['path']}: not the {entry['bytes']:,} bytes that were listed; "
                "remove it, and the same command goes on"
            )
        progress.update(number)


# --------------------------------------------------------------------------- plan


def measure(files: list[str], build: text.Settings) -> dict:
    """Build a corpus from the first documents of some files with one worker.

    {"on_disk", "text": bytes, "documents", "dropped", "tokens", "seconds"}
    """
    chosen = files[:: -(-len(files) // 4)]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sample = f"{folder}/sample.jsonl"
        with open(sample, "w", encoding="utf-8") as f:
            on_disk = sum(copy_some(path, f, SAMPLE // len(chosen), build) for path in chosen)
        how = {"files": [sample], "out_dir": f"{folder}/out"}
        text.main(replace(build, splits="train=1", workers=1, **how))
        meta = read_json(f"{folder}/out/meta.json")
    counts = meta["counts"]
    return {
        "on_disk": on_disk,
        "documents": counts["documents_in"],
        "dropped": counts["documents_in"] - counts["documents_out"],
        "text": meta["splits"]["train"]["n_bytes"],
        "tokens": meta["splits"]["train"]["n_tokens"],
        "seconds": time.perf_counter() - begin,
    }


def copy_some(path: str, sample, n_bytes: int, build: text.Settings) -> int:
    """Write the first documents of a file as jsonl; the bytes on disk it took."""
    size = 0
    on_disk = 0
    form = Format(*kind_of(path), build.text_field, False, build.max_bytes)
    with contextlib.suppress(Damaged):  # the run itself will name it
        for found in texts(path, form, 0, text.TO_THE_END):
            on_disk = found.on_disk
            if isinstance(found.text, bytes):
                sample.write(json.dumps({"text": found.text.decode()}) + "\n")
                size += len(found.text)
            if size > n_bytes:
                break
    return on_disk


def gigabytes(n: float) -> str:
    return f"{n / 1e9:,.3f} GB"


def show_plan(s: Settings, build: text.Settings, entries: list[dict]) -> None:
    """Print what the run will take: from a sample of the files, or from WHOLE."""
    local = [e["path"] for e in entries if is_there(e)]
    m = measure(local, build) if local else WHOLE
    total = sum(e["bytes"] for e in entries)
    left = sum(e["bytes"] for e in entries if not is_there(e))
    density = m if s.files else WHOLE
    n = round(total * (density["documents"] / density["on_disk"]))
    n_text = m["text"] * n / m["documents"]
    tokens = m["tokens"] * n / m["documents"]
    seconds = m["seconds"] * n / m["documents"]
    corpora = tokens * token_dtype(text.tokenizer_of(s.tokenizer).n_vocab).itemsize
    workers = text.n_workers(s.workers)
    out = Path(s.out_dir).absolute()
    free = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    source = "not measured: no file is there yet"
    if local:
        source = f"measured on {m['documents']:,} documents, {m['text'] / 1e6:.1f} MB; "
        source += f"{m['dropped']:,} would be dropped"
    of = text.split_of(np.arange(n), n, None)
    counts = zip(text.PAPER, np.bincount(of, minlength=len(text.PAPER)))
    splits = ", ".join(f"{name} {count:,}" for name, count in counts)
    benchmarks = build.decontaminate.replace(",", ", ")
    benchmarks = benchmarks or "(no benchmark: none is in data/benchmarks)"
    print(
        f"files      {len(entries):,}, {gigabytes(total)}; {gigabytes(left)} of it to be fetched\n"
        f"documents  {n:,}: {splits}\n"
        f"text       {gigabytes(n_text)}, {tokens / 1e9:,.3f} billion tokens ({source})\n"
        f"disk       {gigabytes(left + n_text + 2 * corpora)} more while it runs, "
        f"{gigabytes(corpora)} of corpora in the end; {gigabytes(free)} are free\n"
        f"time       {duration(seconds / workers)} with {workers} workers "
        f"at {m['text'] / m['seconds'] / 1e6:.1f} MB/s each, after the download\n"
        f"left out   {'copies; ' if s.dedup else ''}documents with a question of {benchmarks}"
    )


# --------------------------------------------------------------------------- main


def known_benchmarks() -> str:
    """The test files in data/benchmarks but MMLU's, with commas between."""
    paths = sorted(Path(__file__).with_name("benchmarks").glob("*/test.jsonl"))
    return ",".join(str(path) for path in paths if path.parent.name != "mmlu_stem")


def main(s: Settings) -> None:
    s = replace(s, download_dir=s.download_dir or s.out_dir.rstrip("/") + ".files")
    against = {"auto": known_benchmarks(), "none": ""}.get(s.decontaminate, s.decontaminate)
    # What is wrong is said now rather than after the download.
    text.tokenizer_of(s.tokenizer)
    text.finder_of(against)
    if s.files:
        names = expand(s.files.split(","))
        files = [{"file": name, "bytes": os.path.getsize(name)} for name in names]
        listed = {"files": files}
    else:
        optional(READER, FOLDER)
        listed = listing(s)
    chosen = sorted(listed["files"], key=lambda e: e["file"])[: s.limit or None]
    folder = "" if s.files else s.download_dir
    entries = [e | {"path": os.path.join(folder, e["file"])} for e in chosen]
    files = [e["path"] for e in entries]
    same = ("tokenizer", "out_dir", "dedup", "skip_bad", "seed", "workers")
    flags = {name: getattr(s, name) for name in same}
    build = text.Settings(files=files, splits="paper", decontaminate=against, **flags)
    if s.dry_run:
        show_plan(s, build, entries)
        return
    if not s.files and not (Path(s.out_dir) / "meta.json").exists():
        fetch(s, listed, entries)
    text.main(build)


if __name__ == "__main__":
    run(main, Settings)
