"""The loss on 4 x 2048 tokens, 32,004 classes, width 2048, bf16: memory above inputs and
gradients, time, and the difference from the plain loss.

Ours (kernels.HeadLoss), torch's own chunked one where it exists (2.13), and the plain loss, each
in a process of its own.

    python tests/bench_loss.py
    python tests/bench_loss.py --device=cuda
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from data.lib import kernels
from data.lib.cli import opt, run


@dataclass(kw_only=True)
class Settings:
    which: Literal["all", "ours", "torch", "plain"] = opt("all", "which loss")
    rows: int = opt(4, "rows of 2048 tokens", low=1)
    classes: int = opt(32004, "vocabulary", low=2)
    dim: int = opt(2048, "width", low=1)
    device: str = opt("cpu", "cpu or cuda")


def plain(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def torchs(hidden, weight, targets):
    return F.linear_cross_entropy(
        hidden, weight, targets, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    )


def peak(device: str, reset: bool = False) -> int:
    """Bytes at the highest point since the last reset: of the device, or resident ones of this
    process (Linux)."""
    if device == "cuda":
        value = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
            value = torch.cuda.memory_allocated()
        return value
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:" if reset else "VmHWM:")[1].split()[0]) * 1024


def measure(loss, s: Settings) -> dict:
    """Extra bytes, seconds of forward and backward, the loss and sums of the gradients' absolute values."""
    torch.manual_seed(0)
    hidden = torch.randn(s.rows * 2048, s.dim, device=s.device).bfloat16().requires_grad_()
    weight = (
        (torch.randn(s.classes, s.dim, device=s.device) * s.dim**-0.5).bfloat16().requires_grad_()
    )
    targets = torch.randint(0, s.classes, (s.rows * 2048,), device=s.device)
    loss(hidden[:64], weight[:128], targets[:64] % 128).backward()  # libraries are loaded
    hidden.grad = weight.grad = None
    before, begin = peak(s.device, reset=True), time.perf_counter()
    value = loss(hidden, weight, targets)
    value.backward()
    seconds, value = time.perf_counter() - begin, value.item()
    extra = peak(s.device) - before - 2 * (hidden.numel() + weight.numel())
    return {
        "extra_MB": extra / 1e6,
        "seconds": seconds,
        "loss": value,
        "grads": [float(p.grad.float().abs().sum()) for p in (hidden, weight)],
    }


def main(s: Settings) -> None:
    losses = {"ours": kernels.HeadLoss.apply, "torch": torchs, "plain": plain}
    if s.which != "all":
        print(json.dumps(measure(losses[s.which], s)))
        return
    for name in losses:
        if name == "torch" and not hasattr(F, "linear_cross_entropy"):
            continue
        flags = [f"--{k}={v}" for k, v in vars(s).items() if k != "which"]
        done = subprocess.run(
            [sys.executable, __file__, f"--which={name}", *flags], capture_output=True, text=True
        )
        print(f"{name:6}", done.stdout.strip() or done.stderr.strip().splitlines()[-1])


if __name__ == "__main__":
    run(main, Settings)
