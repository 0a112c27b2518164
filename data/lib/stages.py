"""Run scripts as commands: each fills a folder, several run side by side, one that is complete is skipped.

Stages.run() is what em.py calls. A stage is `python SCRIPT --flag=value ...` (or torchrun, where there are
several devices), printed as it starts. It counts as complete when the file that it writes last is there.
"""

import contextlib
import heapq
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from data.lib.cli import UserError, duration, read_json

ROOT = Path(__file__).resolve().parents[2]  # where the scripts are


@contextlib.contextmanager
def only_run(out_dir: Path):
    """Hold out_dir against other runs. Stages inherit the lock: one that outlives a killed em.py is waited
    for."""
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield ()
        return
    with open(out_dir / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out_dir}: another run is at work here; waiting for it to end", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield (f.fileno(),)


class Slots:
    """Lets n threads in at a time, of those that wait the one with the lowest number."""

    def __init__(self, n: int):
        self.free, self.waiting, self.count, self.changed = n, [], 0, threading.Condition()

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
        self, name: str, script: str, folder: Path, last: str, flags: dict, more: str = "", order: int = 0
    ) -> None:
        """`python script --flag=value ...`, which fills `folder`, unless the file it writes last is there.
        The flags in the string `more` win. order: of the stages that wait, those with the lowest start first.
        UserError if it fails or was made by other flags."""
        done = folder / last
        flags = {k: str(v) for k, v in flags.items() if v != ""}
        for word in shlex.split(more):
            key, has_value, value = word.removeprefix("--").partition("=")
            flags[key] = value if has_value else "true"
        if done.exists():
            return self.already(name, script, folder, done, flags)
        with self.slots.hold(order):
            code = self.start(name, script, folder, [f"--{k}={v}" for k, v in flags.items()])
        if code and not self.stopped:  # the first to fail ends the others, and all chains tell of it
            self.failure = f"stage {name} ended with exit code {code} (see above); "
            self.failure += "the same command goes on from there"
            self.stop()
        if self.stopped:
            raise UserError(self.failure)

    @staticmethod
    def already(name: str, script: str, folder: Path, done: Path, flags: dict) -> None:
        made_by = read_json(folder / "settings.json")
        changed = [k for k, v in flags.items() if k in made_by and not same(made_by[k], v)]
        if changed:
            how = "; ".join(f"--{k}={made_by[k]} became {flags[k]}" for k in changed)
            raise UserError(f"{folder}: made with other settings ({how}); give another --out_dir")
        newer = (ROOT / script).stat().st_mtime > done.stat().st_mtime
        but = f"; but {script} has changed since: give another --out_dir to run it anew" if newer else ""
        print(f"{name}: complete{but}")

    def start(self, name: str, script: str, folder: Path, flags: list[str]) -> int:
        """The exit code of a script. Side by side with others it writes into a log, whose end is shown when
        it fails."""
        launch = [str(ROOT / script)]
        if self.devices > 1 and script in ("train.py", "infer_thoughts.py"):
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.devices}"]
            launch = torchrun + launch
        env, log, begin = os.environ | {"EM_CHILD": "1"}, None, time.time()
        if self.jobs > 1:
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        shown = "torchrun --standalone " + launch[3] if len(launch) > 1 else "python"
        with self.guard:
            if self.stopped:
                return 1
            print(f"\n{name}: $ {shown} {shlex.join([script, *flags])}", flush=True)
            if self.jobs > 1:
                folder.parent.mkdir(parents=True, exist_ok=True)
                log = open(f"{folder}.log", "ab")
            # Its own session: Ctrl-C reaches only us. Its standard input: when we die, however we die, it
            # closes and the stage ends.
            child = subprocess.Popen(
                [sys.executable, *launch, *flags], stdin=subprocess.PIPE, start_new_session=True,
                pass_fds=self.lock, env=env, stdout=log, stderr=log,
            )  # fmt: skip
            self.children.add(child)
        code = child.wait()
        self.children.discard(child)
        if log:
            log.close()
            if code and not self.stopped:
                print(Path(log.name).read_text(errors="replace")[-2000:], file=sys.stderr, flush=True)
            elif not code:
                print(f"{name}: done in {duration(time.time() - begin)}", flush=True)
        return code

    def stop(self) -> None:
        """End all children and start no more."""
        with self.guard:
            self.stopped = True
            for child in list(self.children):
                child.terminate()


def same(made_by, flag: str) -> bool:
    """Whether a setting that was stored is what a flag says: 0.0 is --min_gain=0, and -1e9 is -inf, which
    JSON has not."""
    if isinstance(made_by, float):
        with contextlib.suppress(ValueError):
            return made_by == max(float(flag), -1e9)
    return str(made_by) == flag or (isinstance(made_by, bool) and made_by == (flag.lower() in ("true", "1")))


def count_devices(device: str, asked: int) -> tuple[bool, int]:
    """(whether there is a GPU, devices that a stage works on), from --device and --devices as given."""
    if device not in ("", "cuda"):
        return device.startswith(("cuda", "mps")), max(1, asked)
    # In a process of its own: here torch would take memory beside the stages for as long as they run.
    code = "import torch; print(torch.cuda.device_count(), int(torch.backends.mps.is_available()))"
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    cuda, mps = map(int, found.stdout.split())
    return cuda + mps > 0, asked or max(1, cuda)


def peak_memory() -> str:
    """Largest resident memory of any stage, where the system tells (kilobytes on Linux, bytes on a Mac)."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", peak memory of a stage {peak / 1e6:,.0f} MB"
