"""The E-step against transformers, in alternating runs.

    python tests/bench_sample.py --model=out/digits/seed0/M1 --corpus=out/digits/seed0/data/raw
    python tests/bench_sample.py --model=SMOLLM2_TRAINED --corpus=GSM8K/raw --chunks=64 --max_new=128 \\
        --batches=16,64
    python tests/bench_sample.py --model=TINYLLAMA_TRAINED --corpus=C --chunks=2048 --max_new=512 \\
        --dtype=bfloat16 --peer=false --hbm=3350    # on an H100

Both have the same weights, prompts, K, longest thought and threads. transformers gets every help: its
prompts are sorted by length and left-padded inside a batch, it takes K samples by num_return_sequences
and its best batch size of --batches, and the markers are its end tokens. The time of its log q is not
counted; that of log p is, for whole sequences, sorted, in batches. Ours is infer(): samples with log q,
log p and log p(x | c). Tokens are counted alike: sampled tokens up to and including the one that ends
it. --processes=2 shares the chunks between two processes with half of the threads each. The last line
says how far the sampler is from reading its bytes and computing its FLOPs at the measured speed of this
machine.
"""

import contextlib
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data.lib.cli import opt, run
from data.lib.corpus import POSTERIOR, PRIOR, open_corpus
from data.lib.engine import Engine, Sampling
from infer_thoughts import EStep, Limits, context_of, infer, write_chunk
from train import load_model


@dataclass(kw_only=True)
class Settings:
    model: str = opt(help="model folder")
    corpus: str = opt(help="corpus folder")
    chunks: int = opt(512, "chunks to infer")
    samples: int = opt(4, "K")
    max_new: int = opt(64, "longest thought")
    batches: str = opt("32,128,512", "batch sizes that transformers may choose from, in prompts")
    repeats: int = opt(3, "alternating runs")
    threads: int = opt(2, "threads for both, over all processes")
    processes: str = opt("1,2", "ways to share the threads that are tried, of both")
    rows: int = opt(0, "--rows of infer_thoughts.py")
    dtype: str = opt("float32", "of both")
    peer: bool = opt(True, "run transformers")
    hbm: float = opt(0.0, "GB/s of the device's memory; 0: measured")


HELD = {}  # what a worker process keeps between calls


def prepare(s: Settings, share: int, shares: int) -> None:
    """Load the models and this process's share of the chunks."""
    import transformers

    torch.set_num_threads(max(1, s.threads // shares))
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tok = load_model(s.model, device, s.dtype)
    corpus = open_corpus(s.corpus, tok)
    numbers = np.flatnonzero(~corpus.questions)[: s.chunks][share::shares]
    limits = Limits(3, s.max_new, model.config.seq_len)
    HELD.update(
        s=s,
        tok=tok,
        corpus=corpus,
        numbers=numbers,
        limits=limits,
        engine=Engine(model, s.rows),
        device=device,
    )
    if s.peer:
        HELD["peer"] = transformers.AutoModelForCausalLM.from_pretrained(
            s.model, dtype=getattr(torch, s.dtype)
        ).to(device)


def padded(rows, fill: int, left: bool):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.long)
    for k, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(0, len(row))
        ids[k, where], mask[k, where] = torch.as_tensor(row), 1
    return ids.to(HELD["device"]), mask.to(HELD["device"])


@torch.inference_mode()
def theirs(batch: int) -> dict:
    """Tokens, seconds of sampling and in all, and two shares: of padding among prompt tokens, and of
    decoding steps on ended rows."""
    s, tok, corpus, reference, limits = (HELD[k] for k in ("s", "tok", "corpus", "peer", "limits"))
    tokens = steps = padding = n_ids = 0
    begin, drawn = time.time(), {}
    contexts = {i: context_of(corpus, i, limits) for i in HELD["numbers"]}
    prompts = {i: write_chunk(corpus, i, c, None, POSTERIOR)[0] for i, c in contexts.items()}
    order = sorted(prompts, key=lambda i: len(prompts[i]))
    for k in range(0, len(order), batch):
        group = order[k : k + batch]
        ids, mask = padded([prompts[i] for i in group], tok.eos, left=True)
        out = reference.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=s.samples,
            max_new_tokens=s.max_new,
            eos_token_id=sorted(tok.markers),
            pad_token_id=tok.eos,
        )[:, ids.shape[1] :].cpu()
        ended = torch.isin(out, torch.tensor(sorted(tok.markers))).int()
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1])
        tokens, steps = tokens + int(lengths.sum()), steps + out.numel()
        padding, n_ids = padding + int((mask == 0).sum()), n_ids + mask.numel()
        for j, i in enumerate(group):
            drawn[i] = [
                z[: n - 1].numpy()
                for z, n in zip(
                    out[j * s.samples : (j + 1) * s.samples], lengths[j * s.samples : (j + 1) * s.samples]
                )
            ]
    sampled = time.time()
    written = [write_chunk(corpus, i, contexts[i], z, PRIOR) for i in order for z in drawn[i]]
    written.sort(key=lambda pair: len(pair[0]))
    for k in range(0, len(written), batch):
        ids, mask = padded([w for w, _ in written[k : k + batch]], tok.eos, left=False)
        hidden = reference.model(ids[:, :-1], attention_mask=mask[:, :-1]).last_hidden_state
        real = torch.zeros_like(ids[:, 1:], dtype=torch.bool)
        for row, (_, part) in enumerate(written[k : k + batch]):
            real[row, part.thought[0] - 1 : part.chunk[1] - 1] = True
        for piece, target in zip(
            hidden[real].split(512), ids[:, 1:][real].split(512)
        ):  # only what is scored, in pieces that fit the cache
            torch.nn.functional.cross_entropy(reference.lm_head(piece).float(), target, reduction="none")
    return {
        "tokens": tokens,
        "sampling": sampled - begin,
        "total": time.time() - begin,
        "padding": padding / n_ids,
        "ended": 1 - tokens / steps,
    }


def ours(_=None) -> dict:
    """The same of infer(); its sampling is timed alone as well."""
    s, tok, corpus, numbers, limits, engine = (
        HELD[k] for k in ("s", "tok", "corpus", "numbers", "limits", "engine")
    )
    prompts = [write_chunk(corpus, i, context_of(corpus, i, limits), None, POSTERIOR)[0] for i in numbers]
    begin = time.time()
    engine.generate(prompts, numbers, s.samples, Sampling(s.max_new, tok.markers))
    sampled = time.time()
    got = infer(engine, corpus, numbers, EStep(limits, s.samples))
    return {"tokens": int(got.length.sum()), "sampling": sampled - begin, "total": time.time() - sampled}


def rate(work, amount: float, repeats: int = 20) -> float:
    """The amount that `work` does, a second: the best of 5 rounds."""

    def synchronize():
        if HELD["device"] == "cuda":
            torch.cuda.synchronize()

    work()
    times = []
    for _ in range(5):
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize()
        times.append(time.perf_counter() - begin)
    return amount * repeats / min(times)


def recorded_steps() -> np.ndarray:
    """Of each step of the sampler: lanes, prompt_len, own_len, prefilled tokens: float64 [4, n_steps]."""
    s, engine, tok, corpus = (HELD[k] for k in ("s", "engine", "tok", "corpus"))
    prompts = [
        write_chunk(corpus, i, context_of(corpus, i, HELD["limits"]), None, POSTERIOR)[0]
        for i in HELD["numbers"]
    ]
    runner, steps = engine.runner, []
    run = runner.run

    def recording(step, sampling):
        shape = step.shape
        prefilled = step.prefill.ids.size if step.prefill else 0
        for k in range(runner.steps_per_sync):
            steps.append((shape.n_lanes, shape.prompt_len, shape.own_len + k, prefilled * (k == 0)))
        return run(step, sampling)

    runner.run = recording
    engine.generate(prompts, HELD["numbers"], s.samples, Sampling(s.max_new, tok.markers))
    runner.run = run
    return np.array(steps, dtype=float).T


def limit() -> tuple[str, float]:
    """Bytes and FLOPs of the sampled tokens against what this machine reads and multiplies a second."""
    s, engine = HELD["s"], HELD["engine"]
    c, where, dtype = engine.config, {"device": HELD["device"]}, engine.runner.dtype
    big = torch.ones(64 << 20, **where)
    bandwidth = s.hbm * 1e9 or rate(lambda: big.sum(), big.nbytes, 2)
    n, P, S, prefilled = recorded_steps()
    matrices = sum(p.numel() for layer in engine.model.layers for p in layer.parameters() if p.ndim == 2)
    head, kv = c.n_vocab * c.n_embd, 2 * c.n_layer * c.n_kv_head * c.head_dim
    read = (dtype.itemsize * (matrices + head + kv * (n / s.samples * P + n * S / 2))).sum()
    attention = 2 * c.n_layer * c.n_head * c.head_dim * 2 * n * (P + S / 2)
    flops = (2 * matrices * (n + prefilled) + 2 * head * n + attention).sum()
    rows = int(np.percentile(n, 75))
    x = torch.randn(rows, c.n_embd, dtype=dtype, **where)
    w = torch.randn(2 * c.n_hidden, c.n_embd, dtype=dtype, **where)  # as gate and up
    speed = rate(lambda: torch.nn.functional.linear(x, w), 2 * rows * w.numel(), 50)
    text = (
        f"{len(n)} steps of {n.mean():.0f} rows on average: {read / 1e9:.2f} GB at "
        f"{bandwidth / 1e9:.1f} GB/s = {read / bandwidth:.2f} s; {flops / 1e9:.0f} GFLOP at "
        f"{speed / 1e9:.0f} GFLOP/s ({rows} rows) = {flops / speed:.2f} s"
    )
    return text, max(read / bandwidth, flops / speed)


class Pool:
    """n processes with their share each."""

    def __init__(self, s: Settings, n: int):
        context = multiprocessing.get_context("spawn")
        self.workers = []
        for share in range(n):
            mine, other = context.Pipe()
            context.Process(target=serve, args=(other, s, share, n), daemon=True).start()
            self.workers.append(mine)
        self.ask(None)

    def ask(self, work, *args):
        """Run work in all of them at once; what they return, with the wall time in which all had ended."""
        for worker in self.workers:
            worker.send((work, args))
        answers = [worker.recv() for worker in self.workers]
        if work is None or not isinstance(answers[0], dict):
            return answers[0]
        joined = {k: max(a[k] for a in answers) for k in answers[0]}
        return joined | {"tokens": sum(a["tokens"] for a in answers)}


def serve(pipe, s: Settings, share: int, shares: int) -> None:
    """A worker: does what it is asked until the asker ends."""
    prepare(s, share, shares)
    with contextlib.suppress(EOFError):
        while True:
            work, args = pipe.recv()
            pipe.send(work(*args) if work else None)


def main(s: Settings) -> None:
    ways = [int(n) for n in s.processes.split(",")]
    pools = {n: Pool(s, n) for n in ways}
    best = {}
    for n in ways if s.peer else []:
        for batch in map(int, s.batches.split(",")):
            got = pools[n].ask(theirs, batch)
            print(
                f"transformers, {n} x {s.threads // n} threads, {batch} prompts a batch: "
                f"{got['tokens'] / got['sampling']:,.0f} tokens/s",
                flush=True,
            )
            best[n] = max(best.get(n, (0, 0)), (got["tokens"] / got["sampling"], batch))
    runs = {}
    for _ in range(s.repeats):
        for n in ways:
            for who, work, args in (
                ("ours", ours, ()),
                *([("transformers", theirs, (best[n][1],))] if s.peer else []),
            ):
                got = pools[n].ask(work, *args)
                rates = got["tokens"] / got["sampling"], got["tokens"] / got["total"]
                runs.setdefault((who, n), []).append(rates)
                more = (
                    f" ({got['padding']:.0%} of prompt tokens are padding, "
                    f"{got['ended']:.0%} of decoding steps on ended rows)"
                    if "ended" in got
                    else ""
                )
                print(
                    f"{who}, {n} x {s.threads // n} threads: sampling {rates[0]:,.0f} tokens/s, "
                    f"whole E-step {got['total']:.1f} s: {rates[1]:,.0f} tokens/s{more}",
                    flush=True,
                )
    for n in ways if s.peer else []:
        for m in ways:
            ratios = np.array(runs["ours", n]) / np.array(runs["transformers", m])
            low, mid, high = ratios.min(0), np.median(ratios, 0), ratios.max(0)
            print(
                f"ours {n} x {s.threads // n} against transformers {m} x {s.threads // m}: "
                f"sampling {mid[0]:.2f} ({low[0]:.2f} to {high[0]:.2f}), "
                f"whole E-step {mid[1]:.2f} ({low[1]:.2f} to {high[1]:.2f})"
            )
    text, least = pools[ways[0]].ask(limit)
    got = pools[ways[0]].ask(ours)
    print(
        f"limit: {text}; sampling took {got['sampling']:.2f} s, "
        f"{got['sampling'] / least:.1f} times the nearer one"
    )


if __name__ == "__main__":
    run(main, Settings)
