"""A full training step (forward, backward, clip, AdamW) beside transformers' model in an equally
tuned plain loop, alternating.

Both have the same weights, batches, threads and optimiser (torch's fused AdamW), and compute the
loss of the same targets. bfloat16 is fp32 weights with bf16 arithmetic: transformers' under
torch.autocast. It prints ratios, because machines are shared.

    python tests/bench_train.py                                  # the toy
    python tests/bench_train.py --model=FOLDER --rows=2 --seq_len=512    # a real one, e.g. SmolLM2-135M
"""

import contextlib
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import train
from data.lib import model_folder
from data.lib.cli import opt, run
from data.lib.stream import Batch
from data.lib.tokenizer import make_tokenizer


@dataclass(kw_only=True)
class Settings:
    model: str = opt("", "model folder; none: the toy of train.py's defaults")
    dtype: Literal["float32", "bfloat16", "both"] = opt("both", "of the arithmetic")
    rows: int = opt(32, "rows a step", low=1)
    seq_len: int = opt(56, "tokens a row (the toy's documents: about 56)", low=8)
    steps: int = opt(20, "steps a run", low=1)
    repeats: int = opt(5, "alternating runs", low=1)
    threads: int = opt(2, "threads for both", low=1)
    compile: bool = opt(False, "torch.compile for both")
    device: str = opt("cpu", "cpu or cuda")


def theirs(folder: Path, s: Settings, dtype: torch.dtype):
    """step(batch) of transformers' model: its own attention (sdpa), the loss on flat logits,
    torch's clipping and fused AdamW."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(
        s.device
    )
    if s.compile:
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )

    def step(batch: Batch) -> float:
        with (
            torch.autocast(s.device, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        ):
            logits = model(batch.ids.to(s.device), use_cache=False).logits
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), batch.targets.to(s.device).flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def ours(folder: Path, s: Settings, dtype: str):
    settings = train.Settings(optimizer="adamw", lr=1e-5, clip=1.0)
    config = train.open_folder(folder)[0]
    model = train.build(replace(config, dtype=dtype), s.device)
    train.load_weights(model, train.read_tensors(folder, config))
    if s.compile:
        for layer in model.layers:
            layer.compute = torch.compile(layer.compute)
    optimizers = train.make_optimizers(model, settings)
    return lambda batch: float(
        train.train_step(model, optimizers, [batch], batch.targets.numel(), settings, s.device)[0]
    )


def compare(folder: Path, s: Settings, dtype: str) -> None:
    rng, n_vocab, batches = np.random.default_rng(0), train.open_folder(folder)[0].n_vocab, []
    for _ in range(s.steps):
        ids = torch.from_numpy(rng.integers(0, n_vocab, (s.rows, s.seq_len + 1)))
        batches.append(Batch(ids[:, :-1], ids[:, 1:], None))
    steps = {
        "ours": ours(folder, s, dtype),
        "transformers": theirs(folder, s, getattr(torch, dtype)),
    }
    losses = {
        name: step(batches[0]) for name, step in steps.items()
    }  # warm-up, and they should agree
    print(f"{dtype}: first losses {losses}")
    ratios = []
    for _ in range(s.repeats):
        seconds = {name: [] for name in steps}
        for batch in (
            batches
        ):  # step by step in turn, and medians: another program's burst hits both, or counts little
            for name, step in steps.items():
                begin = time.perf_counter()
                step(batch)
                seconds[name].append(time.perf_counter() - begin)
        speed = {name: s.rows * s.seq_len / np.median(times) for name, times in seconds.items()}
        ratios.append(speed["ours"] / speed["transformers"])
        told = [f"{name} {value:,.0f} tokens/s" for name, value in speed.items()]
        print(f"  {' | '.join(told)} | ratio {ratios[-1]:.2f}", flush=True)
    print(f"{dtype}: median ratio {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    with tempfile.TemporaryDirectory() as folder:
        if not s.model:
            tok = make_tokenizer()
            model = train.start_model(
                train.Settings(), train.make_config(train.Settings(), tok.n_vocab), None, tok, "cpu"
            )
            model_folder.save_model(folder, model, tok)
        for dtype in ("float32", "bfloat16") if s.dtype == "both" else (s.dtype,):
            compare(Path(s.model or folder), s, dtype)


if __name__ == "__main__":
    run(main, Settings)
