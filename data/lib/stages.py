"""Run scripts as commands: each fills a folder, and one that is complete is skipped.

Stages.run() is what em.py calls. A stage is `python SCRIPT --flag=value ...` (or
torchrun, where there are several devices), printed as it starts. It counts as
complete when the file that it writes last is there.
"""

import contextlib
import heapq
import os
import resource
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from data.lib.cli import LEAST, ROOT, UserError, duration, hold, read_json, start


@contextlib.contextmanager
def only_run(out_dir: Path):
    """Hold out_dir against other runs; yields the file numbers that its stages inherit.

    They hold the lock, too: a stage that outlives a killed em.py is waited for.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = out_dir / "lock"
    with hold(lock, wait=False) as held:
        if held:
            yield () if held is True else (held,)
            return
    print(f"{out_dir}: another run is at work here; waiting for it to end", flush=True)
    with hold(lock) as held:
        yield () if held is True else (held,)


class Slots:
    """Lets n threads in at a time, of those that wait the one with the lowest number."""

    def __init__(self, n: int):
        self.free = n
        self.waiting = []  # a heap of (order, ticket)
        self.count = 0  # tickets given out
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, order: int):
        with self.changed:
            self.count += 1
            ticket = order, self.count
            heapq.heappush(self.waiting, ticket)
            self.changed.wait_for(lambda: self.free and self.waiting[0] == ticket)
            heapq.heappop(self.waiting)
            self.free -= 1
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.free += 1
                self.changed.notify_all()


@dataclass
class Stages:
    """Starts the other scripts as commands, `jobs` of them side by side. lock: file numbers that they
    inherit."""

    jobs: int = 1
    devices: int = 1
    lock: tuple = ()
    children: set = field(default_factory=set)
    stopped: bool = False
    failure: str = "stopped"

    def __post_init__(self):
        self.slots, self.guard = Slots(self.jobs), threading.Lock()

    def run(
        self, name: str, script: str, folder: Path, last: str, flags: dict, more="", order=0
    ) -> None:
        """`python script --flag=value ...`, which fills `folder`.

        It is skipped when the file that it writes last is there. The flags in the string
        `more` win over `flags`. Of the stages that wait, the one with the lowest order
        starts first. UserError if it fails, or was made by other flags.
        """
        flags = {key: str(flag) for key, flag in flags.items() if flag != ""}
        flags |= read_words(more)
        if (folder / last).exists():
            return self.already(name, script, folder, last, flags)
        with self.slots.hold(order):
            code = self.start(name, script, folder, flags)
        if code and not self.stopped:
            # The first to fail ends the others, and all chains tell of it.
            self.failure = f"stage {name} ended with exit code {code} (see above); "
            self.failure += "the same command goes on from there"
            self.stop()
        if self.stopped:
            raise UserError(self.failure)

    @staticmethod
    def already(name: str, script: str, folder: Path, last: str, flags: dict) -> None:
        """Say that a stage is complete; UserError if it was made by other flags."""
        made_by = read_json(folder / "settings.json")
        changed = [
            f"--{key}={made_by[key]} became {flag}"
            for key, flag in flags.items()
            if key in made_by and not same(made_by[key], flag)
        ]
        if changed:
            how = f"made with other settings ({'; '.join(changed)})"
            raise UserError(f"{folder}: {how}; give another --out_dir")
        newer = (ROOT / script).stat().st_mtime > (folder / last).stat().st_mtime
        how = "give another --out_dir to run it anew"
        but = f"; but {script} has changed since: {how}" if newer else ""
        print(f"{name}: complete{but}")

    def start(self, name: str, script: str, folder: Path, flags: dict) -> int:
        """The exit code of a script.

        Side by side with others it writes into a log, whose end is shown when it fails.
        """
        torchrun = self.devices > 1 and script in ("train.py", "infer_thoughts.py")
        launcher = ["-m", "torch.distributed.run", "--standalone"] if torchrun else []
        if torchrun:
            launcher.append(f"--nproc_per_node={self.devices}")
        env, log, begin = {}, None, time.time()
        if self.jobs > 1:
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        with self.guard:
            if self.stopped:
                return 1
            shown = " ".join(["torchrun", *launcher[2:]]) if launcher else "python"
            words = shlex.join([script, *(f"--{key}={flag}" for key, flag in flags.items())])
            print(f"\n{name}: $ {shown} {words}", flush=True)
            if self.jobs > 1:
                folder.parent.mkdir(parents=True, exist_ok=True)
                log = open(f"{folder}.log", "ab")
            # A session of its own, so that Ctrl-C reaches only this process.
            how = {"start_new_session": True, "pass_fds": self.lock, "stdout": log, "stderr": log}
            child = start(script, flags, launcher, env, **how)
            self.children.add(child)
        code = child.wait()
        self.children.discard(child)
        if log:
            log.close()
            self.tell(name, Path(log.name), code, time.time() - begin)
        return code

    def tell(self, name: str, log: Path, code: int, seconds: float) -> None:
        """What is shown of a stage that wrote into a log: its time, or the log's end."""
        if not code:
            print(f"{name}: done in {duration(seconds)}", flush=True)
        elif not self.stopped:
            print(log.read_text(errors="replace")[-2000:], file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End all children and start no more."""
        with self.guard:
            self.stopped = True
            for child in list(self.children):
                child.terminate()


def read_words(flags: str) -> dict[str, str]:
    """'--lr=1e-3 --compile' as {"lr": "1e-3", "compile": "true"}."""
    found = {}
    try:
        words = shlex.split(flags)
    except ValueError as e:
        raise UserError(f"{flags}: {e}; flags of a stage are written as in a shell") from None
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"{flags}: flags of a stage are written --name=value, not {word}")
        key, has_value, flag = word[2:].partition("=")
        found[key] = flag if has_value else "true"
    return found


def same(made_by, flag: str) -> bool:
    """Whether a stored setting is what a flag says: 0.0 is --min_gain=0, and True is true.

    JSON has no infinity, so -inf is stored as LEAST.
    """
    if isinstance(made_by, bool):
        return made_by == (flag.lower() in ("true", "1"))
    if isinstance(made_by, float):
        with contextlib.suppress(ValueError):
            return made_by == max(float(flag), LEAST)
    return str(made_by) == flag


def count_devices(device: str, asked: int) -> tuple[bool, int]:
    """(whether there is a GPU, devices that a stage works on), from --device and --devices as given."""
    if device not in ("", "cuda"):
        return device.startswith(("cuda", "mps")), max(1, asked)
    # In a process of its own: here torch would take memory beside the stages for as
    # long as they run.
    code = "import torch; print(torch.cuda.device_count(), int(torch.backends.mps.is_available()))"
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    cuda, mps = map(int, found.stdout.split())
    return cuda + mps > 0, asked or max(1, cuda)


def peak_memory() -> str:
    """Largest resident memory of any stage (Linux tells kilobytes, a Mac bytes)."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", peak memory of a stage {peak / 1e6:,.0f} MB"
