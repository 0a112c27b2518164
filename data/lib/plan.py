"""Sizes, memory and hours of a training run before it starts, and what a device can do."""

import math
import os
import re
import resource
import sys
from typing import NamedTuple

import torch

from data.lib.cli import UserError
from data.lib.kernels import HeadLoss
from data.lib.ranks import world
from data.lib.stream import Stream

EXPECTED_MFU = 0.4  # share of the peak arithmetic that a plan counts on

# ---- devices


class Device(NamedTuple):
    """What a device can do."""

    name: str
    flops: float | None  # a second, dense bf16, by its maker's data sheet; None: not known
    memory: float  # bytes


DEVICES = [
    Device("H200", 989e12, 141e9),
    Device("H100", 989e12, 80e9),
    Device("B200", 2250e12, 180e9),
    Device("A100", 312e12, 80e9),
    Device("L40S", 362e12, 48e9),
    Device("A6000", 155e12, 48e9),
    Device("4090", 165e12, 24e9),
    Device("3090", 71e12, 24e9),
    Device("T4", 65e12, 16e9),
]


def known_device(name: str) -> Device | None:
    """The device whose name is part of this one, as H100 is of "NVIDIA H100 80GB HBM3"."""
    return next((device for device in DEVICES if device.name.lower() in name.lower()), None)


def this_device(device: str) -> Device:
    """The device that a process runs on; its peak is not known for a CPU."""
    if device.startswith("cuda"):
        found = torch.cuda.get_device_properties(device)
        known = known_device(found.name)
        return Device(found.name, known and known.flops, found.total_memory)
    return Device(device, None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def used_memory(device: str) -> int:
    """Peak bytes so far: allocated on a GPU, else resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- sizes of a model


class Sizes(NamedTuple):
    """Numbers of parameters."""

    all: int
    block: int
    matrices: int  # of a block
    multiplying: int  # all but an input embedding that is not the output embedding, too


def sizes(c) -> Sizes:
    """The sizes of a model with configuration c (train.Config), in closed form."""
    q = c.n_head * c.head_dim
    kv = c.n_kv_head * c.head_dim
    matrices = c.n_embd * (2 * q + 2 * kv + 3 * c.n_hidden)
    biases = (q + 2 * kv) * c.qkv_bias + c.n_embd * c.out_bias
    norms = 2 * c.n_embd + 2 * c.head_dim * c.qk_norm
    block = matrices + biases + norms
    embedding = c.n_vocab * c.n_embd
    multiplying = c.n_layer * block + c.n_embd + embedding
    n = multiplying + (0 if c.tie_embeddings else embedding)
    return Sizes(n, block, matrices, multiplying)


def flops_per_token(c, T: int) -> float:
    """FLOPs of the forward and backward pass for one token of a row of T.

    6 for each parameter that multiplies, and 12 T for each coordinate of the queries in
    each layer, as if attention were not causal. This is the count that MFU is usually
    quoted with (PaLM, appendix B).
    """
    return 6 * sizes(c).multiplying + 12 * c.n_layer * c.n_head * c.head_dim * T


def memory(c, s, n_devices: int, micro_rows: int, micro_steps: int) -> dict[str, float]:
    """Bytes that a device needs, by part.

    Weights, gradients and optimiser states are exact. Activations count the tensors that
    autograd keeps without torch.compile.
    """
    n, block, matrices, _ = sizes(c)
    shards = max(1, n_devices // s.replicas)
    tokens = micro_rows * s.seq_len
    size = getattr(torch, c.dtype).itemsize
    if shards > 1:  # two blocks and the rest are gathered at a time
        copies = size * (2 * block + n - c.n_layer * block)
    else:
        copies = size * n * (size < 4)
    # Under FSDP gradients stay whole between the micro-steps of a step.
    unreduced = 4 * n if shards > 1 and micro_steps > 1 else 0
    muon_saves = 4 * c.n_layer * matrices if s.optimizer == "muon" else 0
    # Kept of a block: the residual twice and its two norms; q and y; k and v; gate,
    # silu(gate), up and their product.
    kept = 4 * c.n_embd + 2 * (c.n_head + c.n_kv_head) * c.head_dim + 4 * c.n_hidden
    activations = c.n_layer * tokens * size * kept
    if s.recompute:  # one block, and what goes into each of the others
        activations = tokens * size * (kept + (c.n_layer - 1) * c.n_embd)
    logits = size * tokens * c.n_vocab
    if logits > HeadLoss.KEEP:
        logits = 2 * HeadLoss.PIECE["cuda"]
    return {
        "weights": 4 * n / shards,
        "their copies for computing": copies,
        "gradients": 4 * n / shards + unreduced,
        "optimiser": (8 * n - muon_saves) / shards,
        "activations": activations,
        "logits": logits + 4 * tokens * c.n_embd,
    }


# ---- the plan of a run


def micro_plan(s, n_devices: int) -> tuple[int, int]:
    """(micro-steps of an optimiser step, rows of each on a device)."""
    if s.replicas > n_devices or n_devices % s.replicas:
        raise UserError(f"--replicas={s.replicas} does not divide the {n_devices} devices")
    micro_batch = s.micro_batch or s.batch_size
    steps = math.ceil(s.batch_size / (n_devices * micro_batch))
    if s.batch_size < n_devices * steps:
        raise UserError(
            f"--batch_size={s.batch_size}: fewer rows than "
            f"{n_devices} devices in {steps} micro-steps need"
        )
    return steps, math.ceil(s.batch_size / (n_devices * steps))


def steps_of(s, stream: Stream | None) -> tuple[int, float]:
    """(optimiser steps, expected tokens of each)."""
    tokens = s.batch_size * (stream.mean_row() if stream else s.seq_len)
    if s.max_tokens and s.max_steps:
        return max(1, round(s.max_tokens / tokens)), tokens
    return s.max_steps, tokens


def amounts(stream: Stream, tokens: float) -> list[dict]:
    """What so many training tokens hold of each corpus: epochs, and tokens of text and of
    thoughts."""
    padded = stream.attention == "padded"
    documents = tokens / (stream.mean_row() if padded else stream.mean_document())
    rows = []
    for c, corpus in enumerate(stream.corpora):
        epochs = documents / sum(stream.takes) * stream.takes[c] / len(stream.docs[c])
        rows.append({
            "corpus": str(corpus.folder),
            "epochs": epochs,
            "text_tokens": round(epochs * stream.text_tokens[c]),
            "thought_tokens": round(epochs * stream.thought_tokens[c]),
        })  # fmt: skip
    return rows


def describe(row: dict) -> str:
    """A row of amounts() as a line."""
    return (
        f"{row['corpus']}: {row['epochs']:.2f} epochs, {row['text_tokens']:,} tokens of text, "
        f"{row['thought_tokens']:,} of thoughts"
    )


def planned_devices(s, device: str) -> tuple[int, Device]:
    """How many devices --plan is for, and of which kind."""
    if s.plan == "here":
        return world(), this_device(device)
    number, _, name = s.plan.rpartition("x")
    known = known_device(name)
    if not re.fullmatch(r"[1-9][0-9]*|", number) or not known:
        names = ", ".join(device.name for device in DEVICES)
        expected = f"here, or a number and one of {names}, as in 8xH100"
        raise UserError(f"--plan={s.plan}: expected {expected}")
    n_devices = int(number or 1)
    return n_devices, known._replace(name=f"{n_devices} x {name}")


def print_plan(c, s, stream: Stream | None, steps: int, step_tokens: float, device: str) -> None:
    """Print what a run takes; UserError if it does not fit.

    c is the model's train.Config, s the run's train.Settings, step_tokens the expected
    tokens of an optimiser step.
    """
    n_devices, kind = planned_devices(s, device)
    micro_steps, micro_rows = micro_plan(s, n_devices)
    parts = memory(c, s, n_devices, micro_rows, micro_steps)
    total = sum(parts.values())
    tokens = steps * step_tokens
    flops = flops_per_token(c, s.seq_len) * tokens

    def line(label: str, text: str) -> None:
        print(f"{label:<18}{text}")

    work = f"{s.batch_size} rows, {micro_steps} micro-steps of {micro_rows} rows"
    line("parameters", f"{sizes(c).all:,}")
    line("tokens a step", f"{step_tokens:,.0f}: {work} on each of {n_devices} devices")
    line("steps", f"{steps:,}, {tokens:,.0f} tokens")
    for row in amounts(stream, tokens) if stream else []:
        line("data", describe(row))
    for part, value in parts.items():
        line("memory", f"{value / 1e9:8.2f} GB  {part}")
    line("memory", f"{total / 1e9:8.2f} GB of {kind.memory / 1e9:.0f} GB on a device ({kind.name})")
    line("arithmetic", f"{flops:.3g} FLOPs")
    if kind.flops:
        hours = flops / (n_devices * kind.flops * EXPECTED_MFU) / 3600
        peak = f"{kind.flops / 1e12:,.3g} TFLOP/s"
        line("time", f"{hours:,.2f} hours at {EXPECTED_MFU:.0%} of {peak} a device")
    if total > kind.memory:
        raise UserError(
            f"needs {total / 1e9:.1f} GB a device, there are {kind.memory / 1e9:.1f}: lower "
            "--micro_batch or --seq_len, use --recompute, or more devices"
        )
