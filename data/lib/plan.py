"""Sizes, memory and hours of a training run before it starts, and what a device can do."""

import math
import os
import sys
import time

import torch

from data.lib.cli import UserError
from data.lib.kernels import HeadLoss
from data.lib.ranks import world
from data.lib.stream import Stream

# ---------------------------------------------------------------------------------------------------- plan

PEAKS = {  # dense bf16 FLOP/s and bytes, by a part of the device's name (makers' data sheets)
    "H200": (989e12, 141e9), "H100": (989e12, 80e9), "B200": (2250e12, 180e9), "A100": (312e12, 80e9), "L40S": (362e12, 48e9),
    "A6000": (155e12, 48e9), "4090": (165e12, 24e9), "3090": (71e12, 24e9), "T4": (65e12, 16e9),
}  # fmt: skip


def peak_of(name: str) -> tuple[float, float] | None:
    return next((peak for key, peak in PEAKS.items() if key.lower() in name.lower()), None)


def sizes(c) -> dict[str, int]:
    """Number of parameters: all, of a block, of a block's matrices, and those that multiply (all but an input embedding of its own)."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    matrices = c.n_embd * (2 * q + 2 * kv + 3 * c.n_hidden)
    biases = (q + 2 * kv) * c.qkv_bias + c.n_embd * c.out_bias
    block = matrices + biases + 2 * c.n_embd + 2 * c.head_dim * c.qk_norm
    n = c.n_layer * block + c.n_embd + c.n_vocab * c.n_embd * (1 if c.tie_embeddings else 2)
    return {"all": n, "block": block, "matrices": matrices, "multiplying": n - (0 if c.tie_embeddings else c.n_vocab * c.n_embd)}


def flops_per_token(c, T: int) -> float:
    """Forward and backward: 6 a parameter that multiplies, and 12 T a coordinate of the queries in each layer, as if attention were not
    causal (PaLM, appendix B; the count that MFU is usually quoted with)."""
    return 6 * sizes(c)["multiplying"] + 12 * c.n_layer * c.n_head * c.head_dim * T


def memory(c, s, n_devices: int, micro_rows: int, micro_steps: int) -> dict[str, float]:
    """Bytes a device needs, by part. Weights, gradients and optimiser states are exact; activations count what autograd keeps (eager)."""
    n, n_block, n_matrices, _ = sizes(c).values()
    shards, tokens, size = max(1, n_devices // s.replicas), micro_rows * s.seq_len, getattr(torch, c.dtype).itemsize
    n_root = n - c.n_layer * n_block
    # Kept of a block: the residual twice and its two norms; q and y; k and v; gate, silu(gate), up and their product.
    block = tokens * size * (4 * c.n_embd + 2 * c.n_head * c.head_dim + 2 * c.n_kv_head * c.head_dim + 4 * c.n_hidden)
    gathered = size * (2 * n_block + n_root) if shards > 1 else size * n * (size < 4)
    logits = size * tokens * c.n_vocab
    return {
        "weights": 4 * n / shards,
        "their copies for computing": gathered,
        "gradients": 4 * n / shards + (4 * n if shards > 1 and micro_steps > 1 else 0),
        "optimiser": (8 * n - 4 * c.n_layer * n_matrices * (s.optimizer == "muon")) / shards,
        "activations": block + (c.n_layer - 1) * tokens * size * c.n_embd if s.recompute else c.n_layer * block,
        "logits": (logits if logits <= HeadLoss.KEEP else 2 * HeadLoss.PIECE["cuda"]) + 4 * tokens * c.n_embd,
    }


def micro_plan(s, n_devices: int) -> tuple[int, int]:
    """(micro-steps of an optimiser step, rows of each on a device)."""
    if s.replicas > n_devices or n_devices % s.replicas:
        raise UserError(f"--replicas={s.replicas} does not divide the {n_devices} devices")
    steps = math.ceil(s.batch_size / (n_devices * (s.micro_batch or s.batch_size)))
    if s.batch_size < n_devices * steps:
        raise UserError(f"--batch_size={s.batch_size}: fewer rows than {n_devices} devices in {steps} micro-steps need")
    return steps, math.ceil(s.batch_size / (n_devices * steps))


def amounts(stream: Stream, tokens: float) -> list[dict]:
    """What so many training tokens hold of each corpus: epochs, and tokens of text and of thoughts."""
    documents = tokens / stream.mean_row() if stream.attention == "padded" else tokens / stream.mean_document()
    rows = []
    for c, (corpus, take) in enumerate(zip(stream.corpora, stream.takes)):
        epochs = documents / sum(stream.takes) * take / corpus.n_docs
        text, thoughts = (round(epochs * n) for n in (len(corpus.tokens), stream.thought_counts[c][1]))
        rows.append({"corpus": str(corpus.folder), "epochs": epochs, "text_tokens": text, "thought_tokens": thoughts})
    return rows


def print_plan(c, s, stream: Stream | None, steps: int, tokens_per_step: float, device: str) -> None:
    """What a run takes; UserError if it does not fit."""
    n_devices, _, name = s.plan_device.rpartition("x") if s.plan_device else (str(world()), "", "")
    if not (n_devices or "1").isdigit() or (s.plan_device and not peak_of(name)):
        raise UserError(f"--plan_device={s.plan_device}: expected a number and one of {', '.join(PEAKS)}, as in 8xH100")
    n_devices = int(n_devices or 1)
    if s.plan_device:
        (peak, room), name = peak_of(name), f"{n_devices} x {name}"
    else:
        peak, room, name = this_device(device)
        peak = peak or measured_peak(device, getattr(torch, c.dtype))
    micro_steps, micro_rows = micro_plan(s, n_devices)
    parts = memory(c, s, n_devices, micro_rows, micro_steps)
    total, flops = sum(parts.values()), flops_per_token(c, s.seq_len) * tokens_per_step * steps
    lines = [
        f"parameters        {sizes(c)['all']:,}",
        f"tokens a step     {tokens_per_step:,.0f}: {s.batch_size} rows, {micro_steps} micro-steps of {micro_rows} rows on each of {n_devices} devices",
        f"steps             {steps:,}, {steps * tokens_per_step:,.0f} tokens",
        *[f"data              {row['corpus']}: {row['epochs']:.2f} epochs, {row['text_tokens']:,} tokens of text, {row['thought_tokens']:,} of thoughts"
          for row in (amounts(stream, steps * tokens_per_step) if stream else ())],
        *[f"memory            {value / 1e9:8.2f} GB  {part}" for part, value in parts.items()],
        f"memory            {total / 1e9:8.2f} GB of {room / 1e9:.0f} GB on a device ({name})",
        f"arithmetic        {flops:.3g} FLOPs",
    ]
    hours = flops / (n_devices * peak * s.plan_mfu) / 3600
    lines.append(f"time              {hours:,.2f} hours at {s.plan_mfu:.0%} of {peak / 1e12:,.3g} TFLOP/s a device")
    print("\n".join(lines))
    if total > room:
        raise UserError(f"needs {total / 1e9:.1f} GB a device, there are {room / 1e9:.1f}: lower --micro_batch or --seq_len, use --recompute, or more devices")


def this_device(device: str) -> tuple[float | None, float, str]:
    """(peak FLOP/s or None where it isn't known, bytes of memory, name) of a device."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return (peak_of(properties.name) or [None])[0], properties.total_memory, properties.name
    try:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        room = math.inf
    return None, room, device


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, for devices whose peak isn't known."""
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(times)


def used_memory(device: str) -> int:
    """Peak bytes so far: of the device, or resident ones of this process; 0 where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
