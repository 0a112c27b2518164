"""Work in parts that any number of processes share, on any machines that see the same disk.

The job is to make one folder, OUT_DIR. Until it is complete, all lies in OUT_DIR.parts:

    lock              held while the plan is made, and while the parts are joined
    settings.json     what the work was begun with; other settings are refused
    plan.json         what all workers must agree on (see agree)
    000000.npz ...    the parts that are done, each with a .lock beside it that
                      is held by whoever is at work on that part
    metrics.jsonl     a line for each part

A worker takes any part that is not there yet and that nobody holds. The system lets
go of a lock when its process ends, however it ends, so a kill costs the part that was
in progress and nothing else. The first to find all parts there joins them.

This file knows nothing of what a part holds: the caller gives one function that makes
a part, and one that joins all of them.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.lib.cli import Progress, UserError, append_jsonl, claim, hold, read_json, start, write_json
from data.lib.corpus import Corpus


def split_parts(corpus: Corpus, chosen: np.ndarray, size: int) -> list[np.ndarray]:
    """The chunks `chosen` in parts of about `size` chunks, whole documents each."""
    last_of_document = np.flatnonzero(np.diff(corpus.doc_of(chosen)))
    parts, begin = [], 0
    for end in [*(last_of_document + 1), len(chosen)]:
        if end - begin >= size or end == len(chosen):
            parts.append(chosen[begin:end])
            begin = end
    return parts


@dataclass(frozen=True)
class Work:
    """One job: the folder that it makes, and the chunks of each part."""

    out_dir: Path
    parts: list[np.ndarray]

    @property
    def folder(self) -> Path:
        """Where the parts lie until they are joined."""
        return self.out_dir.with_name(self.out_dir.name + ".parts")

    def path(self, n: int) -> Path:
        return self.folder / f"{n:06d}.npz"


def agree(work: Work, settings, free: tuple, make_plan) -> dict | None:
    """The plan that all workers of this job follow; None if the job is done.

    The first worker makes the plan, by make_plan(): a dict that JSON can hold.
    UserError if the job was begun with other settings, but for those in `free`.
    """
    if not work.out_dir.exists():
        work.folder.mkdir(parents=True, exist_ok=True)
        with hold_if_there(work.folder / "lock") as held:
            # Another worker may have joined the parts just now.
            if held and not work.out_dir.exists():
                claim(work.folder, settings, free)
                path = work.folder / "plan.json"
                if not path.exists():
                    write_json(path, make_plan())
                return read_json(path)
    if not work.out_dir.exists():
        raise UserError(f"{work.folder}: was removed while it was in use; run the command again")
    claim(work.out_dir, settings, free)
    shutil.rmtree(work.folder, ignore_errors=True)
    return None


@contextlib.contextmanager
def helpers(script: str, settings, n: int, threads: int):
    """Run `n` more processes of the same command, quietly, while the block runs."""
    flags = asdict(settings) | {"workers": 1}
    # In a session of their own Ctrl-C does not reach them: they end when we do.
    how = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    env = {"OMP_NUM_THREADS": str(threads)}
    children = [start(script, flags, env=env, **how) for _ in range(n)]
    try:
        yield
    finally:
        for child in children:
            child.stdin.close()  # ends the child, if it has not ended
            child.wait()


def finish(work: Work, make_part, join) -> None:
    """Make the missing parts together with all other workers, and join them.

    make_part(path, numbers, on_tokens) writes the part of the chunks `numbers` whole,
    calls on_tokens(n) for every n tokens sampled, and returns its line for
    metrics.jsonl. join(paths) makes the folder out_dir. UserError if parts failed.
    """
    do_parts(work, make_part)
    with hold_if_there(work.folder / "lock") as held:
        if held and not work.out_dir.exists():
            paths = [work.path(n) for n in range(len(work.parts))]
            for path in paths:
                # Whoever wrote the part may still be at its line of metrics.jsonl.
                with hold(path.with_suffix(".lock")):
                    pass
            join(paths)
    shutil.rmtree(work.folder, ignore_errors=True)


def do_parts(work: Work, make_part) -> None:
    """Take parts that nobody holds until all are there, or all are joined."""
    watch, failed = Watch(work), {}
    while not work.out_dir.exists():
        todo = [n for n in range(len(work.parts)) if n not in failed and not work.path(n).exists()]
        if not todo:
            break
        taken = [take(work, n, make_part, watch.add, failed) for n in todo]
        if not any(taken):  # others are at work on what is left
            time.sleep(0.2)
            watch.add(0)
    if failed:
        first = next(iter(failed.values()))
        raise UserError(f"{len(failed)} of {len(work.parts)} parts failed, the first: {first}")
    watch.show(watch.total)


def take(work: Work, n: int, make_part, on_tokens, failed: dict) -> bool:
    """Make part n, unless it is there or in other hands; whether we tried.

    A UserError is printed and noted in `failed`: the other parts go on.
    """
    path = work.path(n)
    with hold_if_there(path.with_suffix(".lock"), wait=False) as held:
        if not held or path.exists() or work.out_dir.exists():
            return False
        try:
            line = make_part(path, work.parts[n], on_tokens)
            append_jsonl(work.folder / "metrics.jsonl", line)
        except UserError as error:
            failed[n] = error
            script = Path(sys.argv[0]).name
            print(f"{script}: part {path.stem} failed: {error}", file=sys.stderr, flush=True)
    return True


@contextlib.contextmanager
def hold_if_there(path: Path, wait: bool = True):
    """As cli.hold; yields False, too, where the folder of `path` is gone.

    Another worker may join the parts and remove them at any moment, also between a
    look whether the folder is there and the opening of the lock. So we do not look.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(hold(path, wait))
        except FileNotFoundError:
            held = False
        yield held


class Watch:
    """Counts the tokens that this worker samples, and shows the progress of all."""

    def __init__(self, work: Work):
        self.work = work
        self.total = sum(map(len, work.parts))
        self.progress = Progress("infer", self.total, "chunks", done=self.n_done())
        self.begin, self.tokens, self.looked = time.time(), 0, 0.0

    def n_done(self) -> int:
        """Chunks in the parts that are there, whoever made them."""
        return sum(len(chunks) for n, chunks in enumerate(self.work.parts) if self.work.path(n).exists())

    def add(self, n: int) -> None:
        self.tokens += n
        if time.time() - self.looked > 1:  # a look costs a disk access for each part
            self.looked = time.time()
            self.show(min(self.n_done(), self.total - 1))

    def show(self, n_done: int) -> None:
        rate = self.tokens / max(1e-9, time.time() - self.begin)
        self.progress.update(n_done, sampled=f"{rate:,.0f} tok/s a worker")


def read_parts(paths: list[Path]) -> dict[str, np.ndarray]:
    """The arrays of all parts, each joined along its first axis."""
    parts = []
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            parts.append(dict(file))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def timing(folder: Path) -> dict:
    """Seconds in which any worker was at work, and tokens a second, by metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = sorted(map(json.loads, lines), key=lambda record: record["begin"])
    seconds, reached = 0.0, 0.0  # the times of several workers overlap
    for record in records:
        seconds += max(0.0, record["end"] - max(reached, record["begin"]))
        reached = max(reached, record["end"])
    tokens = sum(record["tokens"] for record in records)
    return {"seconds": seconds, "tokens_per_s": tokens / max(seconds, 1e-9)}
