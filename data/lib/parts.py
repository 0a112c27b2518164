"""Work in parts that any number of processes share: each part is written once, and the last to finish joins them."""

import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.lib.cli import Progress, UserError, append_jsonl, hold
from data.lib.corpus import Corpus


def split_parts(corpus: Corpus, chosen: np.ndarray, size: int) -> list[np.ndarray]:
    """The chunks `chosen` in parts of about `size`, whole documents each."""
    docs, parts, start = corpus.doc_of(chosen), [], 0
    ends = np.append(np.flatnonzero(np.diff(docs)) + 1, len(chosen))  # behind each document's last chunk
    for end in ends:
        if end - start >= size or end == len(chosen):
            parts.append(chosen[start:end])
            start = end
    return parts


def do_parts(parts: list, do_part, work: Path) -> None:
    """Take parts that nobody holds until all are there; UserError for those that failed."""
    total, failed = sum(len(numbers) for _, numbers in parts), {}
    n_done = sum(len(numbers) for path, numbers in parts if path.exists())
    progress, begin, tokens, looked = Progress("infer", total, "chunks", done=n_done), time.time(), 0, 0.0

    def on_tokens(n, last=False):
        nonlocal tokens, looked, n_done
        tokens += n
        if time.time() - looked > 1 or last:
            looked, n_done = time.time(), sum(len(numbers) for path, numbers in parts if path.exists())
            progress.update(n_done if last else min(n_done, total - 1), sampled=f"{tokens / (time.time() - begin):,.0f} tok/s a worker")

    while missing := [part for part in parts if not part[0].exists() and part[0] not in failed]:
        took = False
        for path, numbers in missing:
            with hold(path.with_suffix(".lock"), wait=False) as held:
                if not held or path.exists():
                    continue
                took = True
                try:
                    append_jsonl(work / "metrics.jsonl", do_part(path, numbers, on_tokens))
                except UserError as e:
                    failed[path] = e
                    print(f"infer_thoughts.py: part {path.stem} failed: {e}", file=sys.stderr, flush=True)
        if not took:
            time.sleep(0.2)  # others are at work on what is left
            on_tokens(0)
    if failed:
        raise UserError(f"{len(failed)} of {len(parts)} parts failed (see above), the first: {next(iter(failed.values()))}")
    on_tokens(0, last=True)


def helpers(s, n_workers: int, threads: int):
    """Start the other workers: this same command, quiet; each ends when we do."""
    flags = [f"--{k}={v}" for k, v in asdict(s).items() if v != ""]
    env = os.environ | {"EM_CHILD": "1", "INFER_WORKER": str(threads), "OMP_NUM_THREADS": str(threads)}
    return [subprocess.Popen([sys.executable, sys.argv[0], *flags], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env, start_new_session=True)
            for _ in range(n_workers - 1)]  # fmt: skip
