"""What a training run tells and what it listens to: the progress line, metrics.jsonl, and
the signals that ask it to stop."""

import math
import os
import signal
import sys
import time
from pathlib import Path

from data.lib.checkpoint import Position
from data.lib.cli import Progress, UserError, append_jsonl, write_json
from data.lib.plan import amounts, flops_per_token, this_device, used_memory
from data.lib.ranks import rank, world
from data.lib.stream import Stream


class Interrupt:
    """SIGTERM and SIGINT ask the run to save and to leave after the current step. A second signal ends
    it at once if it comes more than 5 seconds later: a job manager and torchrun may each send one for
    the same request. torchrun kills what is still there after 30 seconds."""

    def __init__(self):
        self.signal = 0
        self.when = math.inf
        self.handlers = {}  # the ones before

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame) -> None:
        if time.time() > self.when + 5:
            os._exit(128 + number)
        self.signal = number
        self.when = min(self.when, time.time())

    def leave(self, step: int) -> None:
        """End the process as the signal would have, and say how to go on."""
        name = os.path.basename(sys.argv[0])
        told = f"interrupted; saved step {step}, the same command goes on from here"
        print(f"\n{name}: {told}", file=sys.stderr)
        self.handlers.clear()  # a second signal must not disturb the end
        sys.exit(128 + (self.signal or signal.SIGTERM))  # another rank may have had it


class Log:
    """One line on the terminal for each step, and a thousand or so in metrics.jsonl. Speed is measured
    from this start of the run; `seconds` include the time before an interruption."""

    def __init__(self, s, config, device: str, steps: int, position: Position):
        self.s = s
        self.device = device
        self.progress = Progress("train", steps, "steps", done=position.step)
        self.begin = time.time() - position.seconds
        self.first_tokens = position.tokens
        self.data_seconds = 0.0  # spent on waiting for batches
        self.steps = steps
        self.every = max(1, steps // 1000)  # steps between lines of metrics.jsonl
        self.peak = this_device(device).flops
        self.flops = flops_per_token(config, s.seq_len)

    def seconds(self) -> float:
        return time.time() - self.begin

    def step(self, done: int, loss: float, norm: float, share: float, tokens: int) -> None:
        """Tell of a step: `done` steps and `tokens` tokens so far, the mean loss in nats a token, the
        gradient norm, and the learning rate as a share of its peak. Raises UserError if the loss or the
        norm is not finite."""
        if not math.isfinite(loss + norm):
            raise UserError(
                f"{self.s.out_dir}: loss {loss}, gradient norm {norm} at step {done - 1}; "
                "lower --lr or --muon_lr, and give another --out_dir"
            )
        spent = time.time() - self.progress.start
        rate = (tokens - self.first_tokens) / spent
        memory = used_memory(self.device)
        data = self.data_seconds / spent
        mfu = rate * self.flops / (self.peak * world()) if self.peak else None
        self.progress.update(
            done,
            loss=f"{loss:.3f}",
            lr=f"{self.s.lr * share:.1e}",
            tokens=f"{rate:,.0f}/s",
            mfu=f"{mfu:.1%}" if mfu else "n/a",
            mem=f"{memory / 1e9:.1f}GB",
            data=f"{data:.0%}",
        )
        if done % self.every and done < self.steps:
            return
        record = {
            "step": done,
            "loss": loss,
            "grad_norm": norm,
            "lr_share": share,
            "tokens": tokens,
            "tokens_per_s": round(rate),
            "mfu": mfu,
            "memory": memory,
            "data_share": data,
            "seconds": round(self.seconds(), 2),
        }
        self.write(record)

    def write(self, record: dict) -> None:
        """Append a line to metrics.jsonl (the first rank does)."""
        if rank() == 0:
            append_jsonl(Path(self.s.out_dir) / "metrics.jsonl", record)


def write_report(s, stream: Stream | None, end: Position, n_params: int) -> None:
    """training.json: what a run has trained on, and how fast."""
    cut_tokens = stream.cut_tokens(end.step * s.batch_size) if end.step else 0
    if cut_tokens:
        print(f"{cut_tokens:,} tokens beyond --seq_len={s.seq_len} were cut off")
    report = {
        "steps": end.step,
        "train_tokens": end.tokens,
        "n_params": n_params,
        "cut_tokens": cut_tokens,
        "seconds": end.seconds,
        "tokens_per_s": end.tokens / max(end.seconds, 1e-9),
        "data": amounts(stream, end.tokens) if stream else [],
    }
    write_json(Path(s.out_dir) / "training.json", report)
