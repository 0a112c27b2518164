"""FineMath-4+ as the paper's corpora, end to end: list, fetch, and data/text.py with the paper's settings.

    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/finemath --dry_run     # what it will take: files, documents, disk, time
    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/finemath               # 18 GB fetched (needs huggingface_hub, pyarrow), then built
    python data/finemath.py --tokenizer=TinyLlama --out_dir=out/finemath "--files=finemath-4plus/*.parquet"     # files that are there already

Writes --out_dir/validation, warm, bootstrap and rest: split by the index in the shuffled order, without copies, and without documents that hold a question
of a test file in data/benchmarks (data/benchmarks.py; but MMLU's: "Which of the following is false?" is no sign of a leak). Any step can be cut off, and
the same command goes on: files are fetched one by one into --download_dir, at the commit noted there in listing.json.
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

if not __package__:  # run as `python data/finemath.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data import text
from data.lib.cli import Progress, UserError, duration, opt, read_json, run, write_json
from data.lib.corpus import token_dtype
from data.lib.sources import Damaged, Format, expand, from_hub, kind_of, optional, texts

REPO, FOLDER, SUFFIX, READER = "HuggingFaceTB/finemath", "finemath-4plus", ".parquet", "pyarrow"
DOCUMENTS, DOWNLOAD, TOKENS, TEXT = 6_699_493, 18_365_184_633, 9.6e9, 31e9  # its card: documents, bytes of parquet; tokens; bytes of text, about
RATE, SAMPLE = 12e6, 8 << 20  # bytes of text a second and worker (tests/README.md), until there is a file to measure with; bytes to measure with


@dataclass(kw_only=True)
class Settings:
    tokenizer: str = opt(help="the tokenizer.json of the model to be trained, or its folder")
    out_dir: str = opt(help="where the corpus folders go")
    files: str = opt("", "files that are there already, or quoted patterns, with commas between; none: fetch them")
    download_dir: str = opt("", "where fetched files go; none: OUT_DIR.files")
    limit: int = opt(0, "only the first so many files; 0: all", low=0)
    revision: str = opt("main", "which state of the data set is fetched: a branch, tag or commit")
    decontaminate: str = opt("auto", "benchmark files with commas between; auto: the test files in data/benchmarks but MMLU's; none")
    dedup: bool = opt(True, "keep one of several documents with the same text")
    skip_bad: bool = opt(False, "leave out damaged rows and the rest of damaged files, and count them")
    seed: int = opt(0, "another seed, another order and other chunks")
    workers: int = opt(0, "processes; 0: one for each core", low=0)
    dry_run: bool = opt(False, "print the plan and end")


def is_there(entry: dict) -> bool:
    return os.path.exists(entry["path"]) and os.path.getsize(entry["path"]) == entry["bytes"]


def listing(s: Settings) -> dict:
    """{"revision", "commit", "files": [{"file", "bytes"}]} of the data set, as noted when it was first fetched: a run that goes on has the same files."""
    note = Path(s.download_dir) / "listing.json"
    if note.exists():
        noted = read_json(note)
        if noted["revision"] != s.revision:
            raise UserError(f"{note}: of --revision={noted['revision']}; give that one or another --download_dir")
        return noted

    def ask(hub) -> dict:
        commit = hub.HfApi().dataset_info(REPO, revision=s.revision).sha
        entries = hub.HfApi().list_repo_tree(REPO, FOLDER, recursive=True, revision=commit, repo_type="dataset")
        return {"revision": s.revision, "commit": commit, "files": [{"file": e.path, "bytes": e.size} for e in entries if e.path.endswith(SUFFIX)]}

    try:
        return from_hub(REPO, "name files that are there by --files", ask)
    except UserError as e:
        if not s.dry_run:
            raise
        print(f"note: {e}")
        return {"files": [{"file": FOLDER, "bytes": DOWNLOAD}]}


def fetch(s: Settings, listed: dict, entries: list[dict]) -> None:
    """Fetch the files that are not there yet; one that breaks off goes on where it was."""
    Path(s.download_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(s.download_dir) / "listing.json", listed)
    progress, how = Progress("fetch", len(entries), "files"), {"repo_type": "dataset", "revision": listed["commit"], "local_dir": s.download_dir}
    for number, entry in enumerate(entries, 1):
        if not is_there(entry):
            from_hub(REPO, "name files that are there by --files", lambda hub: hub.hf_hub_download(REPO, entry["file"], **how))
        if not is_there(entry):
            raise UserError(f"{entry['path']}: not the {entry['bytes']:,} bytes that were listed; remove it, and the same command goes on")
        progress.update(number)


def measure(files: list[str], build: text.Settings) -> dict:
    """Build a corpus from the first documents of some of the files, with one worker: bytes on disk, documents, dropped, bytes of text, tokens, seconds."""
    chosen, on_disk, begin = files[:: -(-len(files) // 4)], 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with open(f"{folder}/sample.jsonl", "w", encoding="utf-8") as f:
            for path in chosen:
                size, at = 0, 0
                with contextlib.suppress(Damaged):  # the run itself will name it
                    for found in texts(path, Format(*kind_of(path), build.text_field, False, build.max_bytes), 0, text.TO_THE_END):
                        at = found.on_disk
                        if isinstance(found.text, bytes):
                            f.write(json.dumps({"text": found.text.decode()}) + "\n")
                            size += len(found.text)
                        if size > SAMPLE // len(chosen):
                            break
                on_disk += at
        text.main(replace(build, files=[f"{folder}/sample.jsonl"], out_dir=f"{folder}/out", splits="train=1", workers=1))
        counts, train = (read_json(f"{folder}/out/meta.json")[name] for name in ("counts", "splits"))
        return {"on_disk": on_disk, "documents": counts["documents_in"], "dropped": counts["documents_in"] - counts["documents_out"],
                "text": train["train"]["n_bytes"], "tokens": train["train"]["n_tokens"], "seconds": time.perf_counter() - begin}  # fmt: skip


def show_plan(s: Settings, build: text.Settings, entries: list[dict]) -> None:
    """Print what the run will take: from a sample of the files that are there, otherwise from what is known of FineMath-4+."""
    local = [e["path"] for e in entries if is_there(e)]
    m = measure(local, build) if local else {"on_disk": DOWNLOAD, "documents": DOCUMENTS, "dropped": 0, "text": TEXT, "tokens": TOKENS, "seconds": TEXT / RATE}
    total, left = (sum(e["bytes"] for e in some) for some in (entries, [e for e in entries if not is_there(e)]))
    n = round(total * (m["documents"] / m["on_disk"] if s.files else DOCUMENTS / DOWNLOAD))
    n_text, tokens, seconds = (m[name] * n / m["documents"] for name in ("text", "tokens", "seconds"))
    size, workers = tokens * token_dtype(text.tokenizer_of(s.tokenizer).n_vocab).itemsize, text.n_workers(s.workers)
    free = shutil.disk_usage(next(path for path in Path(s.out_dir).absolute().parents if path.exists())).free
    source = f"measured on {m['documents']:,} documents, {m['text'] / 1e6:.1f} MB; {m['dropped']:,} would be dropped" if local else "not measured: no file is there yet"
    train = n - -(-n // 1000)
    warm, bootstrap = -(-train // 20), train // 20 * 4 + min(max(train % 20 - 13, 0), 4)
    print(f"""files      {len(entries):,}, {total / 1e9:,.3f} GB; {left / 1e9:,.3f} GB of it to be fetched
documents  {n:,}: validation {n - train:,}, warm {warm:,}, bootstrap {bootstrap:,}, rest {train - warm - bootstrap:,}
text       {n_text / 1e9:,.3f} GB, {tokens / 1e9:,.3f} billion tokens ({source})
disk       {(left + n_text + 2 * size) / 1e9:,.3f} GB more while it runs, {size / 1e9:,.3f} GB of corpora in the end; {free / 1e9:,.3f} GB are free
time       {duration(seconds / workers)} with {workers} workers at {m['text'] / m['seconds'] / 1e6:.1f} MB/s each, after the download
left out   {'copies; ' if s.dedup else ''}documents with a question of {build.decontaminate.replace(',', ', ') or '(no benchmark: none is in data/benchmarks)'}""")


def main(s: Settings) -> None:
    s = replace(s, download_dir=s.download_dir or s.out_dir.rstrip("/") + ".files")
    known = ",".join(str(p) for p in sorted(Path(__file__).with_name("benchmarks").glob("*/test.jsonl")) if p.parent.name != "mmlu_stem")
    against = {"auto": known, "none": ""}.get(s.decontaminate, s.decontaminate)
    text.tokenizer_of(s.tokenizer), text.finder_of(against), s.files or optional(READER, FOLDER)  # rather now than after the download
    listed = {"files": [{"file": name, "bytes": os.path.getsize(name)} for name in expand(s.files.split(","))]} if s.files else listing(s)
    where = "" if s.files else s.download_dir
    entries = [e | {"path": os.path.join(where, e["file"])} for e in sorted(listed["files"], key=lambda e: e["file"])[: s.limit or None]]
    build = text.Settings(files=[e["path"] for e in entries], tokenizer=s.tokenizer, out_dir=s.out_dir, splits="paper",
                          decontaminate=against, dedup=s.dedup, skip_bad=s.skip_bad, seed=s.seed, workers=s.workers)  # fmt: skip
    if s.dry_run:
        return show_plan(s, build, entries)
    if not s.files and not (Path(s.out_dir) / "meta.json").exists():
        fetch(s, listed, entries)
    text.main(build)


if __name__ == "__main__":
    run(main, Settings)
