"""What the stages of tests/gpu.sh share: the JSON of a stage, scripts as commands, timing, kernels."""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data.lib.cli import ROOT, start, write_json

PACKAGES = "torch", "numpy", "tiktoken", "sympy", "triton", "transformers", "tokenizers"


def missing_packages() -> list[str]:
    """Packages that the stages use and that are not installed. Without triton torch.compile fails on a
    GPU, without transformers two comparisons are skipped, the others are needed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def about(device: str) -> dict:
    """The date, the card, and all versions that figures depend on."""
    there = [name for name in PACKAGES if name not in missing_packages()]
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in there},
        "missing": missing_packages(),
        "cores": os.cpu_count(),
        "card": None,
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "card_bytes": card.total_memory, "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version()}
        asked = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,utilization.gpu,power.draw"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", asked, "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            found["driver, clocks, temperature, use, power"] = done.stdout.strip()
    return found


def plain(value):
    """A value that JSON can hold: rounded to six digits, NaN and infinity as words."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | bool | int | None):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return str(value)


def what_failed() -> str:
    """The end of the traceback, without this machine's path to the project."""
    return traceback.format_exc().replace(f"{ROOT}/", "")[-6000:]


class Report:
    """The JSON of a stage, written anew with whatever is found. Threads may share it."""

    def __init__(self, path: Path, seconds: float, device: str, rehearse: bool):
        self.path = path
        self.begin = time.time()
        self.seconds = seconds
        self.device = device
        self.lock = threading.RLock()
        self.found = {}
        self.record = {"stage": path.stem, "rehearsal": rehearse, "seconds_allowed": seconds}
        self.record |= {"complete": False, "errors": {}, "skipped": {}, "seconds": {}}
        self.record |= {"found": self.found}
        signal.signal(signal.SIGTERM, self.time_is_up)
        self.say(f"stage {path.stem}, at most {seconds:.0f} s, on {device}")
        try:
            self.record |= about(device)
        except Exception:  # no GPU, say: the stage will tell of it, too
            self.record |= about("cpu")
            self.record["errors"]["about"] = what_failed()
        self.save()
        self.say(json.dumps({key: self.record[key] for key in ("card", "versions", "missing")}))

    def time_is_up(self, number, frame) -> None:
        """gpu.sh has sent SIGTERM. Commands that run end with this process (data/lib/cli.py, start)."""
        self.record["errors"]["time"] = "the time was over before the stage"
        self.close(complete=False)
        os._exit(1)

    def left(self) -> float:
        return self.begin + self.seconds - time.time()

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.begin:6.1f} s] {text}", flush=True)

    def save(self) -> None:
        with self.lock:
            self.record["seconds"]["all"] = time.time() - self.begin
            write_json(self.path, plain(self.record))

    def put(self, name: str, value) -> None:
        """Keep what was found, on disk at once."""
        with self.lock:
            self.found[name] = value
            self.save()
        self.say(f"{name}: {json.dumps(plain(value))[:1500]}")

    @contextlib.contextmanager
    def part(self, name: str):
        """A part of the stage: what goes wrong in it is kept with its traceback, and the stage goes on."""
        begin = time.time()
        self.say(f"{name} ...")
        try:
            yield
        except Exception as e:
            with self.lock:
                self.record["errors"][name] = what_failed()
            self.say(f"{name}: FAILED: {type(e).__name__}: {e}"[:1500])
        finally:
            with self.lock:
                self.record["seconds"][name] = time.time() - begin
                self.save()
            # Not in another thread, where it would break a capture of this one.
            if threading.current_thread() is threading.main_thread():
                free_device()

    def skip(self, name: str, needs: float, wanted: bool = True, why: str = "") -> bool:
        """Whether a part is left out: because of `why`, or because it needs more seconds than are left."""
        if wanted and self.left() >= needs:
            return False
        self.record["skipped"][name] = why or f"{self.left():.0f} s left, it needs {needs:.0f}"
        self.say(f"{name}: skipped: {self.record['skipped'][name]}")
        return True

    def close(self, complete: bool) -> None:
        self.record["complete"] = complete
        self.save()
        failed = ", ".join(self.record["errors"]) or "none"
        skipped = ", ".join(self.record["skipped"]) or "none"
        self.say(f"stage {self.path.stem}: complete {complete}; failed: {failed}; skipped: {skipped}")


# ---- commands


def script(name: str, more: dict | None = None, **flags) -> str:
    """Run a script of the project to its end; what it printed. RuntimeError with the end of that if it
    fails. more: added to the environment."""
    child = start(name, flags, env=more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        out = child.stdout.read()  # communicate() would close its standard input, which ends it
        child.wait()
    finally:
        child.kill()
    if child.returncode:
        raise RuntimeError(f"{name} {flags}: exit code {child.returncode}\n{out[-4000:]}")
    return out


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file; none if it is not there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- the device


def free_device() -> None:
    """Give cached memory back, also what an error's traceback held."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> dict:
    """The most bytes since forget_peak: of tensors, and taken from the device."""
    if device != "cuda":
        return {"tensors": 0, "taken": 0}
    return {"tensors": torch.cuda.max_memory_allocated(), "taken": torch.cuda.max_memory_reserved()}


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def seconds_of(work, device: str, repeats: int = 20, captured: bool = False) -> float:
    """Median seconds of work(), after one run that warms up. captured: replayed as a CUDA graph, so that
    launches take no time."""
    work()
    wait(device)
    run = work
    if captured and device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        run = graph.replay
        run()
        wait(device)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def ceilings(device: str) -> dict:
    """What this device reads a second (a large sum) and multiplies (a large bf16 product)."""
    size = 1 << 30 if device == "cuda" else 1 << 22
    numbers = torch.ones(size, dtype=torch.bfloat16, device=device)
    n = 8192 if device == "cuda" else 256
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    copy = torch.empty_like(numbers)
    return {
        "read_bytes_a_second": numbers.nbytes / seconds_of(lambda: numbers.view(torch.float32).sum(), device),
        "copied_bytes_a_second": 2 * numbers.nbytes / seconds_of(lambda: copy.copy_(numbers), device),
        "bf16_flops_a_second": 2 * n**3 / seconds_of(lambda: a @ b, device),
    }


KINDS = {  # of kernels, by their names; the first that fits
    "fused attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|gemv|splitk|::mm\b|::bmm|::addmm|::baddbmm|linear",
    "optimiser": r"adam|multi_tensor",
    "compiled": r"triton",
}


def kernels(work, device: str) -> dict:
    """Where the device's time goes in work(): seconds by kind of kernel, and the largest kernels."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    work()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        work()
        wait(device)
    kinds, names = {}, []
    for event in profiled.key_averages():
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        fits = (kind for kind, pattern in KINDS.items() if re.search(pattern, event.key, re.IGNORECASE))
        kind = next(fits, "other")
        kinds[kind] = kinds.get(kind, 0.0) + spent
        names.append((spent, event.count, event.key[:120]))
    return {"seconds": kinds, "largest": sorted(names, reverse=True)[:14]}
