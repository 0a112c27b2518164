"""The stages of tests/gpu.sh, one a process:

    right    the engine against the slow reference, graph replay against plain steps, a training step
             against transformers, resuming, FSDP2 on one device
    train    speed and memory of training the 1.1B preset
    sample   speed and memory of an E-step with it, and where the time goes
    words    the EM loop on word problems (tests/gpu_words.py)

    python tests/gpu_stages.py --stage=right --out_dir=OUT --work=SCRATCH --seconds=100

With --rehearse sizes are tiny and the device is the CPU; captured graphs are then not tried.
"""

import contextlib
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from gpu_report import (
    Report,
    ceilings,
    forget_peak,
    free_device,
    kernels,
    peak_bytes,
    read_lines,
    script,
    seconds_of,
    wait,
)

import data.lib.engine as engine_file
import infer_thoughts
import train
from data.lib import model_folder
from data.lib.cli import opt, run, start
from data.lib.corpus import POSTERIOR, Corpus, hash_uniform, open_corpus
from data.lib.engine import Engine, PrefillChunk, Sampling, Shape
from data.lib.plan import flops_per_token, known_device, memory, sizes
from data.lib.presets import PRESETS
from data.lib.safetensors import read_safetensors
from data.lib.stream import Batch
from infer_thoughts import EStep, Limits, context_of, infer, sample_slowly, write_chunk


@dataclass(kw_only=True)
class Settings:
    stage: Literal["right", "train", "sample", "words", "fsdp"] = opt(help="which")
    out_dir: str = opt("tests/gpu", "where STAGE.json goes")
    work: str = opt(help="scratch folder, shared by the stages")
    seconds: float = opt(300.0, "time for the stage", low=1)
    rehearse: bool = opt(False, "tiny sizes on the CPU")
    weights: str = opt("tests/gpu/weights", "what tests/gpu_words.py --pack has written")


# ---- models and text that need no files

FAKE = SimpleNamespace(bos=1, eos=2, sol=3, eol=4, pri=5, pos=6, n_vocab=0, markers=frozenset({4}))
FIRST_WORD = 7


@torch.no_grad()
def fake_model(c: train.Config, device: str, mean_thought: float = 0.0) -> train.Llama:
    """A model with random weights in its own dtype.

    mean_thought: EOL then gets the share of one in so many tokens. The first coordinate of the residual
    stream is the same everywhere, and EOL's row of the head reads nothing but that. Some ten tokens share
    the rest: the fewer they are, the rarer is a sample that rounding tips.
    """
    torch.manual_seed(0)
    model = train.build(c, device, lambda model: model.to(getattr(torch, c.dtype)))
    scales = {"embed_tokens.weight": 0.5, "lm_head.weight": (4.0 if mean_thought else 0.6) * c.n_embd**-0.5}
    for name, p in model.named_parameters():
        p.fill_(1.0) if p.ndim == 1 else p.normal_(std=scales.get(name, 0.6 * p.shape[1] ** -0.5))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p[0] = 0.0
    if mean_thought:
        model.embed_tokens.weight[:, 0] = 4.0
        ids = torch.randint(FIRST_WORD, c.n_vocab, (1, 64), device=device)
        hidden = model(ids)[0]  # [64, n_embd]
        others = model.logits(hidden).logsumexp(dim=-1).mean()
        row = torch.zeros_like(model.head()[FAKE.eol])
        row[0] = (others - np.log(mean_thought)) / hidden[:, 0].float().mean()
        model.head()[FAKE.eol] = row
    return model.eval()


def fake_corpus(n: int, length: int, n_vocab: int) -> Corpus:
    """n documents of one chunk of random tokens."""
    tokens = np.random.default_rng(0).integers(FIRST_WORD, n_vocab, n * length)
    chunks, docs = np.arange(n + 1) * length, np.arange(n + 1)
    corpus = Corpus(Path("memory"), {}, tokens, chunks, docs, np.zeros(n, dtype=bool))
    corpus.tokenizer = FAKE
    return corpus


def big_config(s: Settings, dtype: str) -> train.Config:
    """The 1.1B preset's model; a tiny one of the same form in a rehearsal."""
    settings = train.Settings(**PRESETS["tinyllama-1.1b"])
    if s.rehearse:
        tiny = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=96, n_vocab=256, seq_len=128)
        settings = replace(settings, **tiny)
    return replace(train.make_config(settings, settings.n_vocab), dtype=dtype)


# ---- right


def toy_train(s: Settings) -> dict:
    sizes = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 128}
    if s.rehearse:
        sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    return sizes | {"optimizer": "adamw", "lr": 3e-3, "batch_size": 16}


def make_toy(report: Report, s: Settings, digits: Path, folder: Path) -> None:
    """A digits corpus and a model that was trained on it on the device, by commands."""
    n = {"warm": 40, "raw": 8, "heldout": 16} if s.rehearse else {"warm": 300, "raw": 200, "heldout": 100}
    script("data/digits.py", out_dir=digits, min_ops=1, max_ops=3, **n)
    flags = toy_train(s) | {"max_steps": 30 if s.rehearse else 300, "device": report.device}
    given = {"corpus": digits / "warm", "thoughts": digits / "warm_thoughts"}
    script("train.py", **given, **flags, out_dir=folder)
    report.put("toy: last step of training", read_lines(folder / "metrics.jsonl")[-1])


def prompts_of(corpus: Corpus, numbers, limits: Limits) -> list[np.ndarray]:
    """The posterior's prompts of chunks, in contexts of plain text."""
    contexts = [context_of(corpus, i, limits) for i in numbers]
    return [write_chunk(corpus, i, c, None, POSTERIOR)[0] for i, c in zip(numbers, contexts)]


def compare_drawn(one: list, other: list) -> dict:
    """How far two results of Engine.generate agree."""
    pairs = [(a, b) for x, y in zip(one, other) for a, b in zip(x, y)]
    alike = [np.array_equal(a[0], b[0]) for a, b in pairs]
    errors = [abs(a[2] - b[2]) for (a, b), same in zip(pairs, alike) if same]
    found = {"samples": len(pairs), "different": len(pairs) - sum(alike)}
    found["tokens"] = sum(len(a[0]) for a, _ in pairs)
    return found | {"largest difference of log_q": max(errors, default=0.0)}


@torch.inference_mode()
def beside_border(model, prompt, sampling: Sampling, names: tuple, one, other) -> float:
    """How far the random number lies beside the share of the first token of `one` that `other` does not have:
    0 where it lies within, some millionths where rounding has tipped it. names: the keys of its noise."""
    at = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), None)
    if at is None:  # one ended, and the other went on behind the same token
        return float("inf")
    ids = torch.tensor([[*prompt, *one[:at]]], device=model.embed_tokens.weight.device)
    p = torch.softmax(model.logits(model(ids)[0, -1]).double(), dim=-1)
    upto, point = p.cumsum(dim=0), hash_uniform(sampling.purpose, sampling.seed, *names, at)[0]
    token = int(one[at])
    return max(0.0, float(upto[token] - p[token] - point), float(point - upto[token]))


def against_slow(report: Report, s: Settings, model, corpus: Corpus, max_new: int, name: str) -> None:
    """fp32: the engine's samples are sample_slowly's, token by token. One may differ where its random number
    lies within a hundred-thousandth of a border, of which a large vocabulary has many."""
    numbers = np.flatnonzero(~corpus.questions)[: 2 if s.rehearse else 16].tolist()
    prompts = prompts_of(corpus, numbers, Limits(3, max_new, model.config.seq_len))
    sampling = Sampling(max_new, frozenset({corpus.tokenizer.eol}))
    fast = Engine(model).generate(prompts, numbers, 4, sampling)
    slow = [
        [sample_slowly(model, prompt, sampling, i, k) for k in range(4)]
        for i, prompt in zip(numbers, prompts)
    ]
    found = compare_drawn(fast, slow)
    found["beside the border"] = [
        beside_border(model, prompts[i], sampling, (numbers[i], k), one[0].tolist(), list(other[0]))
        for i, pair in enumerate(zip(fast, slow))
        for k, (one, other) in enumerate(zip(*pair))
        if not np.array_equal(one[0], other[0])
    ]
    report.put(f"{name}: engine against the slow sampler, fp32", found)
    if max(found["beside the border"], default=0) > 1e-5 or found["largest difference of log_q"] > 1e-2:
        raise AssertionError(f"picks must be equal in fp32: {found}")


def against_plain(report: Report, s: Settings, model, corpus: Corpus, max_new: int, name: str) -> None:
    """Replayed graphs do what the same steps do without a graph: sampled, from the nucleus, and
    again with another cache."""
    numbers = np.flatnonzero(~corpus.questions)[: 8 if s.rehearse else 48]
    found, stop = {}, frozenset({corpus.tokenizer.eol})
    replayed, plain_engine = Engine(model), Engine(model)
    plain_engine.runner.replay = plain_engine.runner.decode
    ways = {"sampled": {}, "nucleus": {"top_p": 0.9}}
    ways["longer, so with another cache"] = {"max_new": 2 * max_new}
    if s.rehearse:
        del ways["nucleus"]
    for way, more in ways.items():
        sampling = Sampling(**{"max_new": max_new, "stop": stop, "seed": 1} | more)
        prompts = prompts_of(corpus, numbers, Limits(3, sampling.max_new, model.config.seq_len))
        results = [e.generate(prompts, numbers, 4, sampling) for e in (replayed, plain_engine)]
        found[way] = compare_drawn(*results)
        captured = [graph for graph in replayed.runner.graphs.values() if graph]
        found[way]["graphs so far"] = len(captured)
    report.put(f"{name}: graph replay against plain steps, {model.config.dtype}", found)
    if any(row["different"] for row in found.values()):
        raise AssertionError("a replayed graph draws other tokens than the same steps without one")


def against_score(report: Report, s: Settings, model, corpus: Corpus, max_new: int, name: str) -> None:
    """infer()'s log_q and log_p within the tolerances of infer_thoughts.py."""
    dtype = model.config.dtype
    numbers = np.flatnonzero(~corpus.questions)[: 2 if s.rehearse else 24]
    e_step = EStep(Limits(3, max_new, model.config.seq_len), samples=4)
    picked = {}
    got = infer(Engine(model), corpus, numbers, e_step, picked)
    worst = infer_thoughts.check(model, corpus, numbers, got, e_step, picked)
    each, whole = worst
    found = {"[log_q, log_p] a token": each, "[log_q, log_p] over a thought": whole}
    allowed = infer_thoughts.TOLERANCE[dtype], infer_thoughts.SUM_TOLERANCE[dtype]
    report.put(f"{name}: scores against the slow ones, {dtype}", found | {"allowed": allowed})
    if (name, dtype) == ("wide", "bfloat16"):
        # Its logits reach 18, which bf16 rounds by a sixteenth: a thought of one token can miss that limit.
        worst[0] = np.minimum(worst[0], infer_thoughts.TOLERANCE[dtype])
    infer_thoughts.refuse_errors(worst, dtype)


def engine_parts(report: Report, s: Settings, digits: Path, folder: Path) -> None:
    """The engine on the trained toy, and on a wide model with 8 query heads a key head."""
    c = train.Config(
        n_vocab=512 if s.rehearse else 32004, n_layer=2 if s.rehearse else 4, n_head=16, n_kv_head=2,
        n_embd=128 if s.rehearse else 1024, n_hidden=256 if s.rehearse else 2816,
        head_dim=8 if s.rehearse else 64, seq_len=1024,
    )  # fmt: skip
    length, max_new = (20, 8) if s.rehearse else (150, 64)
    for dtype in ("float32", "bfloat16"):
        with report.part(f"toy {dtype}"):
            model, tok = train.load_model(folder, report.device, dtype)
            corpus = open_corpus(digits / "raw", tok)
            engine_checks(report, s, model, corpus, 32, "toy")
        with report.part(f"wide {dtype}"):
            model = fake_model(replace(c, dtype=dtype), report.device, mean_thought=max_new / 3)
            corpus = fake_corpus(48, length, c.n_vocab)
            engine_checks(report, s, model, corpus, max_new, "wide")


def engine_checks(report: Report, s: Settings, model, corpus: Corpus, max_new: int, name: str) -> None:
    """All comparisons of one model; each is tried, whatever the others say."""
    dtype = model.config.dtype
    if dtype == "float32":
        with report.part(f"{name} {dtype}: slow sampler"):
            against_slow(report, s, model, corpus, max_new, name)
    with report.part(f"{name} {dtype}: graphs"):
        against_plain(report, s, model, corpus, max_new, name)
    with report.part(f"{name} {dtype}: scores"):
        against_score(report, s, model, corpus, max_new, name)


def against_transformers(report: Report, s: Settings, folder: Path) -> None:
    """Losses of the same steps with the same weights, by tests/bench_train.py's two loops."""
    import bench_train

    rows, seq_len = (2, 32) if s.rehearse else (8, 512)
    n_vocab = train.open_folder(folder)[0].n_vocab
    rng = np.random.default_rng(0)
    ids = [torch.from_numpy(rng.integers(0, n_vocab, (rows, seq_len + 1))) for _ in range(4)]
    batches = [Batch(x[:, :-1], x[:, 1:], None) for x in ids]
    for dtype, allowed in (("float32", 1e-3), ("bfloat16", 0.03)):
        how = bench_train.Settings(device=report.device, dtype=dtype, rows=rows, seq_len=seq_len)
        ours = bench_train.ours(folder, how, dtype)
        theirs = bench_train.theirs(folder, how, getattr(torch, dtype))
        losses = {"ours": list(map(ours, batches)), "transformers": list(map(theirs, batches))}
        worst = np.abs(np.subtract(losses["ours"], losses["transformers"])).max()
        found = losses | {"largest difference": worst, "allowed": allowed}
        report.put(f"training steps beside transformers, {dtype}", found)
        if not worst <= allowed:
            raise AssertionError(f"losses differ by {worst}")


def train_flags(report: Report, s: Settings, out_dir: Path, **more) -> dict:
    data = Path(s.work) / "digits"
    given = {"corpus": data / "warm", "thoughts": data / "warm_thoughts", "val_corpus": data / "heldout"}
    flags = given | toy_train(s) | {"max_steps": 40, "save_every": 10, "val_every": 20, "dtype": "bfloat16"}
    if s.rehearse:
        flags |= {"max_steps": 12, "save_every": 4, "val_every": 12, "dtype": "float32"}
    return flags | {"device": report.device, "out_dir": out_dir} | more


def cut_off_and_resumed(report: Report, s: Settings, out_dir: Path, **more) -> None:
    """A run that is killed behind its first checkpoint, and the same command again."""
    child = start("train.py", train_flags(report, s, out_dir, **more))
    while child.poll() is None and not list((out_dir / "checkpoints").glob("0*[0-9]")):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = sorted(path.name for path in (out_dir / "checkpoints").glob("*"))
    report.put(f"{out_dir.name}: killed with these checkpoints", left)
    script("train.py", **train_flags(report, s, out_dir, **more))


def sharded(report: Report, s: Settings, out_dir: Path) -> None:
    """The run under FSDP2 on one device: fsdp() in a process with a process group."""
    group = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": "29533", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    flags = {"stage": "fsdp", "work": s.work, "out_dir": out_dir, "rehearse": s.rehearse}
    script("tests/gpu_stages.py", group, **flags)


class Several(int):
    """World size 1 that train.py takes for more, so that it shards over one device."""

    def __eq__(self, other):
        return False

    def __gt__(self, other):
        return True

    __hash__ = int.__hash__


def fsdp(s: Settings) -> None:
    train.world = lambda: Several(1)
    where = SimpleNamespace(device="cpu" if s.rehearse else "cuda")
    flags = train_flags(where, s, Path(s.out_dir))
    train.main(train.Settings(**{key: str(x) if isinstance(x, Path) else x for key, x in flags.items()}))


def curve(out_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(out_dir / "metrics.jsonl") if "loss" in line}


def training_runs(report: Report, s: Settings) -> None:
    """Runs that must have one curve: undisturbed, killed and resumed, under FSDP2, compiled. bf16 sums on
    a GPU have no fixed order, so curves are compared within 0.05 nats a token."""
    work = Path(s.work) / "runs"
    with ThreadPoolExecutor(4) as pool:
        jobs = {
            "whole": lambda out: script("train.py", **train_flags(report, s, out)),
            "resumed": lambda out: cut_off_and_resumed(report, s, out),
            "fsdp": lambda out: sharded(report, s, out),
        }
        if not s.rehearse:  # on a CPU compiling takes half a minute
            # Without validations in between: each of their shapes would be compiled, too.
            how = {"compile": True, "val_every": 1000}
            jobs["compiled"] = lambda out: script("train.py", **train_flags(report, s, out, **how))
        done = {name: pool.submit(job, work / name) for name, job in jobs.items()}
        for name, job in done.items():  # the whole one first; the compiled one, which takes longest, last
            with report.part(f"training: {name}"):
                job.result()
                if name != "whole":
                    compare_runs(report, s, work, name)


def compare_runs(report: Report, s: Settings, work: Path, name: str) -> None:
    """The curve and the weights of a run beside those of the undisturbed one."""
    whole, found = curve(work / "whole"), curve(work / name)
    steps = sorted(whole.keys() & found.keys())
    worst = max(abs(whole[step] - found[step]) for step in steps)
    one, other = [read_safetensors(work / run / "model.safetensors") for run in ("whole", name)]
    apart = max(float((one[key].float() - x.float()).abs().max()) for key, x in other.items())
    report.put(f"training: {name}", {"steps": len(steps), "loss": worst, "weights": apart})
    if not (worst < 0.05 and len(steps) == (12 if s.rehearse else 40)):
        raise AssertionError(f"{name}: {len(steps)} steps, losses differ by {worst}")


def right(report: Report, s: Settings) -> None:
    digits, folder = Path(s.work) / "digits", Path(s.work) / "toy"
    with report.part("the toy, by commands"):
        make_toy(report, s, digits, folder)
    with ThreadPoolExecutor(1) as pool:  # other processes, while this one checks the engine
        runs = pool.submit(training_runs, report, s)
        engine_parts(report, s, digits, folder)
        with report.part("infer_thoughts.py"):
            flags = {"corpus": digits / "raw", "model": folder, "max_new": 32, "device": report.device}
            out_dir = Path(s.work) / "thoughts"
            script("infer_thoughts.py", **flags, dtype="bfloat16", out_dir=out_dir)
            meta = infer_thoughts.read_json(out_dir / "meta.json")
            keys = "n_inferred", "cut_off_share", "ess", "gain_picked", "checked"
            report.put("infer_thoughts.py, bfloat16", {key: meta[key] for key in keys})
        without = "" if "transformers" not in report.record["missing"] else "transformers is not installed"
        if not report.skip("transformers", 15, not without, without):
            with report.part("transformers"):
                against_transformers(report, s, folder)
        runs.result()


# ---- train


def clear(model: train.Llama) -> None:
    """Back to blocks that are not compiled."""
    for layer in model.layers:
        layer.__dict__.pop("compute", None)
    torch._dynamo.reset()


def random_batches(s: Settings, c: train.Config, rows: int, n: int) -> list[Batch]:
    ids = torch.randint(0, c.n_vocab, (n, rows, c.seq_len + 1))
    return [Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), None) for x in ids]


def timed_steps(report: Report, batches: list, step, steps: int) -> dict:
    """Tokens a second of whole optimiser steps, the first ones left out, and the memory they took."""
    forget_peak(report.device)
    begin = time.perf_counter()
    loss = step(batches)
    wait(report.device)
    warm = time.perf_counter() - begin
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        loss = step(batches)
        wait(report.device)
        times.append(time.perf_counter() - begin)
    tokens = sum(batch.ids.numel() for batch in batches)
    found = {"tokens_a_second": tokens / min(times), "steps": times, "first_step": warm, "loss": float(loss)}
    return found | {"peak_bytes": peak_bytes(report.device)}


def mfu(report: Report, c: train.Config, rate: float) -> float | None:
    """The share of the data sheet's peak."""
    known = known_device(report.record["card"] or "")
    return rate * flops_per_token(c, c.seq_len) / known.flops if known else None


def our_step(model, optimizers, settings, device: str):
    def step(batches):
        n = sum(batch.targets.numel() for batch in batches)
        return train.train_step(model, optimizers, batches, n, settings, device)[0]

    return step


@contextlib.contextmanager
def backend(name: str):
    """Attention by the flash kernel, for comparison: torch 2.11 takes cuDNN's on an H100. What was compiled
    with the other is not to be found again, because torch's cache does not know the kernel."""
    if name != "flash":
        yield
        return
    from torch._functorch import config
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True), config.patch(enable_autograd_cache=False):
        yield


def speed_of(report: Report, s: Settings, model, optimizers, rows: int, how: str) -> None:
    """One row of the table: `how` is plain, compiled, or flash (compiled, another attention)."""
    c, micro = model.config, 2 if s.rehearse else 3
    preset = train.Settings(**PRESETS["tinyllama-1.1b"])
    settings = replace(preset, micro_batch=rows, batch_size=micro * rows, seq_len=c.seq_len)
    name = f"{how}, {rows} rows"
    clear(model)
    with report.part(name), backend(how):
        if how != "plain":
            for layer in model.layers:
                layer.compute = torch.compile(layer.compute, backend="eager" if s.rehearse else "inductor")
        batches = random_batches(s, c, rows, micro)
        step = our_step(model, optimizers, settings, report.device)
        found = timed_steps(report, batches, step, 1 if s.rehearse else 3)
        found |= {"mfu": mfu(report, c, found["tokens_a_second"])}
        planned = memory(c, settings, 1, rows, micro)
        found["planned_bytes"] = sum(planned.values())
        if how != "plain":
            found["graphs compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            torch._dynamo.utils.counters.clear()
        report.put(name, found)
        if rows == (2 if s.rehearse else 8):
            report.put(f"planned bytes, {rows} rows", planned)
            report.put(f"kernels, {name}", kernels(lambda: step(batches[:1]), report.device))
    for p in model.parameters():
        p.grad = None


def their_speed(report: Report, s: Settings, c: train.Config, rows: int) -> None:
    """transformers' model in an equally tuned plain loop: fp32 weights, autocast, fused AdamW."""
    import transformers

    folder = Path(s.work) / "config"
    folder.mkdir(exist_ok=True)
    model_folder.write_config(folder, c, FAKE)
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(report.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

    def step(batches):
        for batch in batches:
            ids, targets = batch.ids.to(report.device), batch.targets.to(report.device)
            with torch.autocast(report.device, torch.bfloat16):
                logits = model(ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    micro = 2 if s.rehearse else 3
    found = timed_steps(report, random_batches(s, c, rows, micro), step, 1 if s.rehearse else 3)
    report.put(f"transformers, {rows} rows", found | {"mfu": mfu(report, c, found["tokens_a_second"])})


def train_speed(report: Report, s: Settings) -> None:
    with report.part("ceilings"):
        report.put("ceilings", ceilings(report.device))
    c = big_config(s, "bfloat16")
    report.put("parameters", sizes(c).all)
    with report.part("the model"):
        model = fake_model(replace(c, dtype="float32"), report.device).train()
        model.config = c  # fp32 weights, bf16 arithmetic
        optimizers = train.make_optimizers(model, train.Settings(**PRESETS["tinyllama-1.1b"]))
    # With the seconds that each needs, and what must be left for transformers behind it.
    ours = [(8, "plain", 10), (8, "compiled", 20), (16, "compiled", 15), (8, "flash", 15)]
    ours += [(4, "compiled", 15)]
    for rows, how, needs in [(2, "plain", 0), (2, "compiled", 0)] if s.rehearse else ours:
        if not report.skip(f"{how}, {rows} rows", needs):
            speed_of(report, s, model, optimizers, rows, how)
    clear(model)
    del model, optimizers
    free_device()
    without = "" if "transformers" not in report.record["missing"] else "transformers is not installed"
    for rows in (2,) if s.rehearse else (8, 4):
        if not report.skip(f"transformers, {rows} rows", 0 if s.rehearse else 12, not without, without):
            with report.part(f"transformers, {rows} rows"):
                their_speed(report, s, c, rows)
    summary = {name: row["tokens_a_second"] for name, row in report.found.items() if "rows" in name and
               "tokens_a_second" in row}  # fmt: skip
    report.put("tokens a second", summary)


# ---- sample


class Recorder:
    """Takes the place of a Runner's run() and keeps of each call: its seconds, the tokens it sampled, the
    positions of keys and values that these must read, and the prompt tokens it took in."""

    def __init__(self, engine: Engine):
        self.runner = engine.runner
        self.run = engine.runner.run
        self.rows = []
        engine.runner.run = self

    def __call__(self, step, sampling):
        begin = time.perf_counter()
        lengths, growing = self.run(step, sampling)
        spent = time.perf_counter() - begin
        new = lengths - step.lengths
        # A token reads its own thought so far; a prompt is read once for all its lanes.
        own = (step.lengths * new + new * (new + 1) / 2).sum()
        slots = np.unique(step.lanes // self.runner.layout.lanes)
        prompt = self.runner.prompt_len.cpu().numpy()[slots].sum() * new.max(initial=0)
        taken_in = step.prefill.ids.size if step.prefill else 0
        self.rows.append((spent, new.sum(), own + prompt, new.max(initial=0), taken_in, len(new)))
        return lengths, growing

    def table(self) -> np.ndarray:
        return np.array(self.rows, dtype=float).T


def least_seconds(c: train.Config, table: np.ndarray, read: float, flops: float) -> dict:
    """What reading the weights and the keys once a step takes, and multiplying the prompts."""
    _, _, positions, steps, taken_in, _ = table
    matrices = c.n_layer * sizes(c).matrices
    weights = 2 * (matrices + c.n_vocab * c.n_embd) * steps.sum()
    keys = 2 * 2 * c.n_layer * c.n_kv_head * c.head_dim * positions.sum()
    found = {"weights": weights / read, "keys and values": keys / read}
    found["prompts"] = 2 * matrices * taken_in.sum() / flops
    return found | {"all": sum(found.values())}


def generate_speed(report: Report, engine: Engine, work: tuple, samples: int, found: dict) -> np.ndarray:
    """Two passes: the first captures the graphs, the second has them. The second one's table."""
    for name in ("first pass, with captures", "second pass"):
        recorder = Recorder(engine)
        wait(report.device)
        begin = time.perf_counter()
        engine.generate(*work[:2], samples, work[2])
        spent = time.perf_counter() - begin
        engine.runner.run = recorder.run
        table = recorder.table()
        row = {"seconds": spent, "tokens": table[1].sum(), "tokens_a_second": table[1].sum() / spent}
        row["seconds on the host between steps"] = spent - table[0].sum()
        row["calls"] = table.shape[1]
        row["graphs"] = sum(graph is not None for graph in engine.runner.graphs.values())
        found[name] = row
        report.put("sampling", found)
    return table


def against_limit(report: Report, c: train.Config, table: np.ndarray, spent: float, found: dict) -> None:
    """Sampling beside the limit: all of it, and the calls that take no prompts in and are nearly full."""
    top = found["ceilings"]
    read, flops = top["read_bytes_a_second"], top["bf16_flops_a_second"]
    least = least_seconds(c, table, read, flops)
    found["limit of all"] = least | {"share": least["all"] / spent}
    full = (table[4] == 0) & (table[5] >= 0.9 * table[5].max())
    if full.any():
        least = least_seconds(c, table[:, full], read, flops)
        spent = table[0, full].sum()
        row = {"tokens_a_second": table[1, full].sum() / spent, "calls": int(full.sum()), "seconds": spent}
        found["limit of full steps without prompts"] = least | row | {"share": least["all"] / spent}
    report.put("sampling", found)


def steady_state(engine: Engine, prompt_len: int, own_len: int, samples: int) -> tuple[Shape, int]:
    """Fill the runner's lanes as in the middle of a run; the shape of a step, and its lanes."""
    runner, layout = engine.runner, engine.runner.layout
    n_slots = min(layout.n_slots - 1, max(1, 1024 // layout.lanes))
    n = n_slots * layout.lanes
    runner.lanes.zero_()
    runner.lanes[:n] = torch.arange(layout.lanes, layout.lanes + n, device=runner.device)
    runner.prompt_len.fill_(min(prompt_len, layout.prompt_len))
    runner.length.fill_(own_len)
    runner.growing.fill_(False)
    up = 64 if runner.static_shapes else 1
    own = min(engine_file.round_up(own_len + up, up), layout.max_new)  # as Runner.shape_of does
    return Shape(n, n_slots + 1, min(prompt_len, layout.prompt_len), own), n


@torch.inference_mode()
def where_time_goes(report: Report, s: Settings, engine: Engine, lengths: tuple, sampling) -> None:
    """One step of all lanes as a captured graph, whole and without a part of it: a part takes the
    difference. Then the kernels by name."""
    runner, real_draw = engine.runner, engine_file.draw
    shape, n = steady_state(engine, *lengths, 4)
    if sampling.stop not in runner.stops:
        runner.stops[sampling.stop] = runner.put(sorted(sampling.stop))
    c, device, repeats = engine.config, report.device, 2 if s.rehearse else 15
    logits = torch.randn(n, c.n_vocab, device=device)
    tokens = torch.full((n,), FIRST_WORD, device=device)
    log_p = torch.zeros(n, dtype=torch.float64, device=device)

    def step():
        runner.decode(shape, sampling)

    found = {"lanes": n, "shape": str(shape), "whole": seconds_of(step, device, repeats, True)}
    report.put("a step", found)
    try:
        runner.attend_decoding = lambda lanes, shape: lambda layer, q, k, v: q
        found["attention"] = found["whole"] - seconds_of(step, device, repeats, True)
        del runner.attend_decoding
        runner.logits = lambda hidden: logits
        found["head"] = found["whole"] - seconds_of(step, device, repeats, True)
        del runner.logits
        engine_file.draw = lambda *_: (tokens, log_p)
        found["draw"] = found["whole"] - seconds_of(step, device, repeats, True)
    finally:
        engine_file.draw = real_draw
        runner.__dict__.pop("attend_decoding", None)
        runner.__dict__.pop("logits", None)
    found["the rest"] = found["whole"] - found["attention"] - found["head"] - found["draw"]
    found["launched one by one"] = seconds_of(step, device, repeats)
    report.put("a step", found)
    report.put("kernels of a step", kernels(step, device))


@torch.inference_mode()
def fused_attention(report: Report, s: Settings, engine: Engine, lengths: tuple) -> None:
    """A layer's attention of one token in each lane, ours beside torch's fused kernel for sequences of
    several lengths: over the prompts, over the samples so far, joined by their log-sum-exps. An experiment:
    ours writes the scores to memory, and this does not."""
    runner, layout = engine.runner, engine.runner.layout
    shape, n = steady_state(engine, *lengths, 4)
    lanes, device, c = runner.lanes[:n], report.device, engine.config
    B, C, hd, n_kv = shape.n_slots, layout.lanes, c.head_dim, c.n_kv_head
    group = c.n_head // n_kv
    q = torch.randn(n, c.n_head, hd, device=device, dtype=runner.dtype)
    k, v = torch.randn(2, n, n_kv, hd, device=device, dtype=runner.dtype)
    runner.prompts.normal_()
    runner.own.normal_()

    def ours():
        return runner.attend_decoding(lanes, shape)(0, q, k, v)

    def part(q, cache, width: int, longest: int, lengths):
        """q [sequences, queries, hd], cache [2, all positions, hd] -> y like q, log-sum-exp."""
        m, queries, _ = q.shape
        ends_q = torch.arange(m + 1, device=device, dtype=torch.int32) * queries
        ends_k = torch.arange(m + 1, device=device, dtype=torch.int32) * width
        key, value = cache[:, : m * width, None].unbind()
        y, lse, *_ = torch.ops.aten._flash_attention_forward(
            q.reshape(-1, 1, hd), key, value, ends_q, ends_k, queries, longest, 0.0, False, False,
            seqused_k=lengths.int())  # fmt: skip
        return y.view_as(q), lse.reshape(-1)[: m * queries].view(m, queries, 1)

    y = ours()
    prompt_len = runner.prompt_len[:B].repeat_interleave(n_kv)
    own_len = (runner.length[: B * C] + 1).view(B, 1, C).expand(B, n_kv, C).flatten()
    # Queries [B, C, n_kv, group, hd] -> [B * n_kv, C * group, hd], as in attend_decoding.
    laid = q.new_zeros(B * C, c.n_head, hd).index_copy_(0, lanes, q)
    laid = laid.view(B, C, n_kv, group, hd).transpose(1, 2).reshape(B * n_kv, C * group, hd)
    prompts = runner.prompts[0].view(2, -1, hd)
    own = runner.own[0].view(2, -1, hd)

    def fused():
        on_prompt, weight = part(laid, prompts, layout.prompt_len, shape.prompt_len, prompt_len)
        on_own, own_weight = part(laid.view(-1, group, hd), own, layout.max_new, shape.own_len, own_len)
        share = torch.sigmoid(weight.view_as(own_weight) - own_weight)
        return on_own.lerp(on_prompt.view_as(on_own), share.to(on_own.dtype))

    theirs = fused().view(B, n_kv, C, group, hd).transpose(1, 2).reshape(B * C, c.n_head, hd)[lanes]
    apart = ((y - theirs).float().norm() / y.float().norm()).item()
    found = {"relative difference": apart, "ours": seconds_of(ours, device, 15, True)}
    report.put("attention of a layer", found)
    found["fused"] = seconds_of(fused, device, 15, True)
    report.put("attention of a layer", found)


@torch.inference_mode()
def prefill_speed(report: Report, s: Settings, engine: Engine, prompt_len: int) -> None:
    """A chunk of prompts alone."""
    prompt_len = min(prompt_len, engine.runner.layout.prompt_len)
    n = max(1, engine.PREFILL_TOKENS // prompt_len)
    n = min(n, engine.runner.layout.n_slots - 1)
    ids = np.random.default_rng(0).integers(FIRST_WORD, engine.config.n_vocab, (n, prompt_len))
    chunk = PrefillChunk(np.arange(1, n + 1), np.full(n, prompt_len), 0, 0, ids, True)
    spent = seconds_of(lambda: engine.runner.prefill(chunk), report.device, 5)
    report.put("prompts alone", {"tokens": ids.size, "seconds": spent, "tokens_a_second": ids.size / spent})


def sample_speed(report: Report, s: Settings) -> None:
    found = {}
    with report.part("ceilings"):
        found["ceilings"] = ceilings(report.device)
    c = big_config(s, "bfloat16")
    c = replace(c, seq_len=2048)
    # In a rehearsal everything is as small as it can be.
    n, prompt_len, max_new, scored = (6, 24, 16, 4) if s.rehearse else (768, 512, 512, 128)
    model = fake_model(c, report.device, mean_thought=0.4 * max_new)
    limits, samples = Limits(0, max_new, c.seq_len), 4
    corpus = fake_corpus(n, prompt_len - infer_thoughts.AROUND, c.n_vocab)
    numbers = np.arange(n)
    prompts = prompts_of(corpus, numbers, limits)
    sampling = Sampling(max_new, frozenset({FAKE.eol}))
    engine = Engine(model)
    weights = torch.cuda.memory_allocated() if report.device == "cuda" else 0
    found["prompt"] = len(prompts[0])
    found["planned (slots, lanes, bytes, free)"] = engine.plan(samples, len(prompts[0]), max_new, n)
    forget_peak(report.device)
    with report.part("sampling"):
        table = generate_speed(report, engine, (prompts, numbers, sampling), samples, found)
        found["peak_bytes"] = peak_bytes(report.device)
        found["peak_bytes of the weights"] = weights
        against_limit(report, c, table, found["second pass"]["seconds"], found)
    with report.part("a step"):
        where_time_goes(report, s, engine, (prompt_len, max_new // 3), sampling)
    with report.part("prompts"):
        prefill_speed(report, s, engine, prompt_len)
    if not report.skip("fused attention", 30, not s.rehearse, "a CPU has no such kernel"):
        with report.part("fused attention"):
            fused_attention(report, s, engine, (prompt_len, max_new // 3))
    if report.skip("the whole E-step", 0 if s.rehearse else 25):
        return
    with report.part("the whole E-step"):
        e_step = EStep(limits, samples)
        infer(engine, corpus, numbers[:scored], e_step)  # captures the graphs that both of these replay
        begin = time.perf_counter()
        engine.generate(prompts[:scored], numbers[:scored], samples, sampling)
        drawn = time.perf_counter() - begin
        forget_peak(report.device)
        got = infer(engine, corpus, numbers[:scored], e_step)
        spent = time.perf_counter() - begin - drawn
        row = {"chunks": scored, "seconds": spent, "of them sampling": drawn, "tokens": got.length.sum()}
        row |= {"chunks_a_second": scored / spent, "computed_tokens": got.computed.sum()}
        row |= {"peak_bytes": peak_bytes(report.device), "mean thought": got.length.mean()}
        report.put("the whole E-step", row | {"ended": got.finished.mean()})


# ---- main


def words(report: Report, s: Settings) -> None:
    import gpu_words

    gpu_words.words(report, s)


STAGES = {"right": right, "train": train_speed, "sample": sample_speed, "words": words}


def main(s: Settings) -> None:
    if s.stage == "fsdp":
        return fsdp(s)
    path = Path(s.out_dir) / f"{s.stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = Report(path, s.seconds, "cpu" if s.rehearse else "cuda", s.rehearse)
    complete = False
    with report.part("stage"):
        STAGES[s.stage](report, s)
        complete = True
    report.close(complete)
    sys.stdout.flush()
    # Threads may still wait for commands that nobody needs any more.
    os._exit(0 if complete and not report.record["errors"] else 1)


if __name__ == "__main__":
    run(main, Settings)
