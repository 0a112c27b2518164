"""Infer the latent thoughts of a corpus (the E-step): sample K thoughts a chunk, weigh them, pick one.

For a chunk x with the chunks c before it, and a model that was trained on thoughts (train.py):

    sample   z_1 .. z_K  from  q(z | c, x),  at temperature 1 over the full vocabulary
    weigh    log_w_k  =  log p(z_k, x | c)  -  log q(z_k | c, x)
    pick     one z_k with probability  w_k / sum w                                              (--select)
             but none if the text is likelier without:  log p(x | c, z_k) - log_none < --min_gain

    q:  BOS c c c  SOL EOL  x x x x  SOL POS  z z z EOL            both score z and the EOL that ends it;
                                             [- log_q -]           p scores x, too. Markers are given.
    p:  BOS c c c  SOL PRI  z z z EOL  x x x x
                           [------ log_p -----]

The same text without a thought, in the two ways in which training writes it:

    none:   BOS c c c  SOL EOL  x x x x          alone:   BOS c c c  x x x x         log_sol scores the SOL
                               [log_none]                            [log_alone]     behind c: a choice there.

The pick tends to the exact posterior p(z | c, x) as K grows. A thought that was cut off at --max_new has no
EOL, thus weight 0; a chunk with all K cut off gets no thought. Both are counted.

--min_gain. Weights compare the K thoughts only with one another: when all K mislead, one is picked all the
same, and training on it teaches p to expect thoughts that do not fit their text. So a pick that gains less
than --min_gain nats over log_none is dropped: its chunk goes to training without a thought, and is counted
(no_gain). The paper has no such rule (--min_gain=-inf); RLP (arXiv 2510.01265) takes the same difference as
its reward.

What the bounds bound. A text shows no markers, so there are three ways to write it. They add up to:

    p_text(x | c)  =  p(x | c)  +  p(SOL | c) * ((1 - e) * p(x | c, SOL PRI)  +  e * p(x | c, SOL EOL))
                      alone                      behind a thought                none        e = NO_THOUGHT

(1/K) sum_k w_k is an unbiased estimate of p(x, |z| < max_new | c, SOL PRI): of what x gets behind thoughts
that end in time. It is no estimate of p(x | c). In the sum it stands for p(x | c, SOL PRI), which is never
less. So by Jensen the log of the sum is in expectation at most log p_text: the ELBO at K = 1, tighter with
every K (IWAE, Burda et al. 2016). Whatever is cut off, the bound is finite and holds, and each cut-off makes
it worse. With thoughts in the context, c depends on earlier text and on random numbers only. So the sum over
a document's chunks bounds the log of a probability of whole documents too, by whatever rule the picks are
made.

    --context=thoughts  c is up to --before earlier chunks with the thoughts that were picked for them, as in
                        training. Documents advance chunk by chunk: sequential importance sampling. If picks
                        are drawn by weight and none is dropped, the product of a document's (1/K) sum_k w_k
                        is unbiased for p(x_1, x_2 ...) behind thoughts that end in time.
    --context=bare      c is plain text: the paper's choice. In training a model sees such contexts only by
                        train.py --bare=SHARE, which writes that share of the chunks without their thoughts.

    python infer_thoughts.py --model=out/M0 --corpus=out/digits/raw --out_dir=out/E1 --samples=4 --show=3      # a CPU, or one GPU
    torchrun --nproc_per_node=8 infer_thoughts.py --model=M0 --corpus=C --out_dir=E1 --max_new=1024            # eight
    python infer_thoughts.py ... --select=uniform --min_gain=-inf             # neither weights nor --min_gain

Writes a thoughts folder (data/lib/corpus.py), and in it samples.npz (for each sample log_q, log_p, log_w, log p(x | c, z) and length;
for each chunk its scores without a thought), meta.json (ESS, entropy of the weights, gains, what was dropped, lengths, bounds) and
examples.txt (50 chunks with all their thoughts). log_q is added up while sampling, from fp32 logits; on a random 1% of the chunks
log_q and log_p are compared with a teacher-forced function of eight lines, and the run stops where they differ (SUM_TOLERANCE).

Work is done in parts, each written once, by any number of these commands at the same time, on any machines that share --out_dir; one
that is killed costs the part it was at, and the last to finish joins the parts.

What is random is keyed by (seed, chunk, sample, position), so a sample depends on nothing that is computed beside it: not on batch, order,
number of workers, restarts. That is exact up to arithmetic: products of other shapes round their last bits differently, which can tip
a sample whose random number falls within 1e-6 of a border. The same parts on one kind of machine give the same bytes.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Literal

import numpy as np
import torch

from data.lib.cli import UserError, claim, hold, opt, read_json, replacing, run, write_json
from data.lib.corpus import (
    CHECK,
    CONTEXT_FORM,
    DRAW,
    PICK,
    POSTERIOR,
    PRIOR,
    RAW,
    Corpus,
    hash_uniform,
    layout,
    open_corpus,
    write_thoughts,
)  # fmt: skip
from data.lib.engine import Engine
from data.lib.parts import do_parts, helpers, split_parts
from data.lib.ranks import pick_device
from data.lib.tokenizer import Tokenizer
from train import Llama, load_model


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt(help="corpus folder")
    model: str = opt(help="model folder, trained with thoughts")
    out_dir: str = opt(help="thoughts folder to write")
    samples: int = opt(4, "thoughts sampled a chunk (K)", low=1)
    max_new: int = opt(128, "longest thought in tokens, its EOL included", low=1)
    context: Literal["bare", "thoughts"] = opt("thoughts", "earlier chunks as plain text, or with their picked thoughts")
    before: int = opt(3, "chunks before the chunk that are given", low=0)
    proposal: Literal["posterior", "prior"] = opt("posterior", "who thinks: q(z | c, x), or the prior p(z | c), "
        "which has not read the text; weights and bounds hold for both")  # fmt: skip
    select: Literal["resample", "argmax", "uniform"] = opt("resample", "by weight, the heaviest, any")
    min_gain: float = opt(0.0, "drop picks that gain fewer nats for their text; -inf: none", low=-math.inf)
    part_size: int = opt(0, "chunks a part: what a kill can cost; 0: 500 on a CPU, 20000 on a GPU", low=0)
    rows: int = opt(0, "thoughts sampled side by side, at most; 0: 1024, fewer where memory is short", low=0)
    workers: int = opt(0, "processes that share the work on a CPU; 0: one a core for models below 20M parameters, else one", low=0)
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "of the weights; auto: bfloat16 on a GPU, float32 elsewhere")
    show: int = opt(0, "print this many chunks with all their thoughts", low=0)
    seed: int = opt(0, "sampling noise and picks", low=0)
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")


# --------------------------------------------------------------------- the slow reference: all of it in plain steps
# What the engine below must reproduce: one sequence at a time, no cache, a whole forward pass for every token. Read this first.


@torch.inference_mode()
def sample_slowly(model: Llama, prompt, key: int, sample: int, max_new: int, stop: set[int], seed: int, purpose: int = DRAW) -> tuple:
    """One continuation of a prompt: (ids with the stop token if there is one, finished, sum of their log-probabilities)."""
    ids, log_q = list(prompt), 0.0
    for position in range(max_new):
        hidden = model(torch.tensor([ids], device=model.embed_tokens.weight.device))
        log_p = torch.log_softmax(model.logits(hidden[0, -1]).double(), dim=-1)  # [n_vocab]
        uniform = hash_uniform(purpose, seed, key, sample, position)[0]
        cumulated = log_p.exp().cumsum(dim=0)
        token = int(torch.searchsorted(cumulated, uniform * cumulated[-1], right=True).clamp(max=len(log_p) - 1))
        ids.append(token)
        log_q += float(log_p[token])
        if token in stop:
            return ids[len(prompt) :], True, log_q
    return ids[len(prompt) :], False, log_q


@torch.inference_mode()
def score_slowly(model: Llama, ids, start: int, end: int) -> float:
    """Teacher-forced: sum of log p(ids[t] | ids[:t]) for t in [start, end)."""
    ids = torch.as_tensor(ids, device=model.embed_tokens.weight.device)
    log_p = torch.log_softmax(model.logits(model(ids[None, :-1])[0, start - 1 : end - 1]).double(), dim=-1)
    return float(log_p.gather(1, ids[start:end, None]).sum())


# ---------------------------------------------------------------------------------------- prompts and weights


NOTHING = MappingProxyType({})  # no chunk has a picked thought in the context


@dataclass(frozen=True)
class Limits:
    """What bounds a prompt: chunks before it, tokens of a thought, tokens of a sequence."""

    before: int
    max_new: int
    seq_len: int


def fits(corpus: Corpus, max_new: int, seq_len: int) -> np.ndarray:
    """Which chunks leave room for a thought of max_new tokens and six tokens around both, [n_chunks] bool."""
    return np.diff(corpus.chunks) + 6 + max_new <= seq_len


def can_think(corpus: Corpus, max_new: int, seq_len: int) -> np.ndarray:
    """Which chunks can carry a thought, [n_chunks] bool: no question, not empty, not too long."""
    return ~corpus.questions & (np.diff(corpus.chunks) > 0) & fits(corpus, max_new, seq_len)


def context_of(corpus: Corpus, i: int, limits: Limits, picked=NOTHING) -> list[int]:
    """The chunks given before chunk i: up to limits.before, fewer if the sequence would exceed seq_len with max_new new tokens."""
    before = list(corpus.before(i, limits.before))
    sizes = [int(corpus.chunks[j + 1] - corpus.chunks[j]) + (len(picked[j][0]) + 5 if j in picked else 0) for j in before]
    room = limits.seq_len - limits.max_new - 6 - (corpus.chunks[i + 1] - corpus.chunks[i])  # 6: BOS, five markers
    while before and sum(sizes) > room:
        before.pop(0), sizes.pop(0)
    return before


def write_chunk(tok: Tokenizer, corpus: Corpus, i: int, context: list[int], thought, form: int, picked=NOTHING):
    """(ids, part) of chunk i in a form, behind its context: as plain text, but for chunks in picked {chunk: (thought, form)}."""
    given = [picked.get(j, ((), RAW)) for j in context]
    chunks = [corpus.chunk(j) for j in (*context, i)]
    ids, parts = layout(tok, chunks, [z for z, _ in given] + [thought], [f for _, f in given] + [form], end=False)
    return ids, parts[-1] if len(parts) == len(chunks) else None


@dataclass
class Samples:
    """K thoughts for each of n chunks. Arrays are [n, K] where not said otherwise; a thought that was cut off has log_w -inf."""

    thoughts: list[list[np.ndarray]]  # without EOL
    log_q: np.ndarray  # log q(z | c, x)
    log_p: np.ndarray  # log p(z, x | c)
    log_x: np.ndarray  # log p(x | c, z)
    log_w: np.ndarray
    length: np.ndarray  # sampled tokens, with EOL
    finished: np.ndarray
    log_none: np.ndarray  # [n] log p(x | c, SOL EOL): the first half of the posterior form
    log_alone: np.ndarray  # [n] log p(x | c): as training writes a chunk without a thought
    log_sol: np.ndarray  # [n] log p(SOL | c)
    computed: np.ndarray  # [n] tokens that the model has read, sampled and scored for the chunk
    pick: np.ndarray  # [n] index of the pick; -1: none

    @property
    def gain(self) -> np.ndarray:
        """[n, K] nats by which each thought makes its text likelier; -inf for one that was cut off."""
        return self.log_x - self.log_none[:, None]

    def chosen(self, row: int):
        """The picked thought of a chunk; None: it has none."""
        k = self.pick[row]
        return None if k < 0 else self.thoughts[row][k]


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """For each entry, how many earlier entries are equal to it: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order, rank = np.argsort(group, kind="stable"), np.empty_like(group)
    ordered = group[order]
    rank[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return rank


def infer(engine: Engine, tok: Tokenizer, corpus: Corpus, numbers, samples: int, limits: Limits, seed: int, *,
          context: str = "bare", proposal: int = POSTERIOR, select: str = "resample", min_gain: float = -math.inf,
          purpose: int = DRAW, on_tokens=None, picked=None) -> Samples:  # fmt: skip
    """Sample, weigh and pick among `samples` thoughts for each chunk in `numbers`.

    context="thoughts": documents advance side by side, a chunk of each at a time, so that every pick stands
    in the context of the next. Each earlier chunk there takes the prior or the posterior form by a coin of
    its own, as in training; without a pick it is plain text. The picks are put into the dict `picked`, if
    given. proposal: the form whose thoughts are sampled, POSTERIOR or PRIOR. min_gain: see choose.
    """
    numbers, picked = np.asarray(numbers), {} if picked is None else picked
    wave = rank_in_group(corpus.doc_of(numbers)) if context == "thoughts" else np.zeros(len(numbers), np.int64)
    rows, waves = [], []
    for turn in range(wave.max(initial=0) + 1):
        rows.append(np.flatnonzero(wave == turn))
        here = numbers[rows[-1]]
        contexts = [context_of(corpus, i, limits, picked) for i in here]
        prompts = [write_chunk(tok, corpus, i, c, None, proposal, picked)[0] for i, c in zip(here, contexts)]
        stop, how = {tok.eol}, dict(purpose=purpose, on_tokens=on_tokens)
        drawn = engine.generate(prompts, here, samples, limits.max_new, stop, seed, **how)
        got = weigh(engine, tok, corpus, here, contexts, drawn, picked)
        got.computed += np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        got.pick = choose(select, got.log_w, got.gain, min_gain, hash_uniform(PICK, seed, here))
        waves.append(got)
        for row, i in enumerate(here if context == "thoughts" else []):
            z = got.chosen(row)
            if z is not None and len(z):  # an empty one is written as in training: as no thought
                picked[int(i)] = z, PRIOR if hash_uniform(CONTEXT_FORM, seed, i)[0] < 0.5 else POSTERIOR
    order = np.argsort(np.concatenate(rows))
    whole = {}
    for name in Samples.__dataclass_fields__:
        values = [getattr(got, name) for got in waves]
        if isinstance(values[0], np.ndarray):
            whole[name] = np.concatenate(values)[order]
        else:
            flat = [x for value in values for x in value]
            whole[name] = [flat[k] for k in order]
    return Samples(**whole)


def weigh(engine: Engine, tok, corpus: Corpus, numbers: np.ndarray, contexts, drawn, picked: dict) -> Samples:
    """What Engine.generate has drawn for the chunks `numbers` in their contexts, weighed; none is picked yet.

    UserError for a log-probability that is not finite.
    """
    shape = len(numbers), len(drawn[0]) if drawn else 1
    finished = np.array([[done for _, done, _ in row] for row in drawn], dtype=bool).reshape(shape)
    length = np.array([[len(ids) for ids, _, _ in row] for row in drawn], dtype=np.int64).reshape(shape)
    log_q = np.array([[q for _, _, q in row] for row in drawn], dtype=np.float64).reshape(shape)
    thoughts = [[ids[:-1] if done else ids for ids, done, _ in row] for row in drawn]

    # One prefix a chunk, up to its context. Tails: x alone, SOL EOL x, and SOL PRI z EOL x of ended thoughts.
    prefixes, tails = [], []
    for i, c, row, done in zip(numbers, contexts, thoughts, finished):
        bare, part = write_chunk(tok, corpus, i, c, None, RAW, picked)
        start, x = part.chunk[0], bare[part.chunk[0] :]
        thinking = [
            write_chunk(tok, corpus, i, c, z, PRIOR, picked)[0][start:] if ok else ()
            for z, ok in zip(row, done)
        ]
        prefixes.append(bare[:start])
        tails.append([x, [tok.sol, tok.eol, *x], *thinking])
    scores = engine.score(prefixes, tails)
    log_alone = np.array([alone.sum() for alone, *_ in scores])
    log_sol = np.array([none[0] for _, none, *_ in scores])
    log_none = np.array([none[2:].sum() for _, none, *_ in scores])
    log_p, log_x = np.full((2, *shape), -np.inf)
    for row, (alone, _, *behind) in enumerate(scores):
        for k in np.flatnonzero(finished[row]):
            log_p[row, k] = behind[k][2:].sum()  # the two markers are given
            log_x[row, k] = behind[k][len(behind[k]) - len(alone) :].sum()

    bad = ~np.isfinite(log_alone + log_none + log_sol) | (finished & ~np.isfinite(log_p + log_q)).any(axis=1)
    if bad.any():
        raise UserError(f"chunk {numbers[bad][0]}: log-probabilities are not finite; the model's weights or the arithmetic are broken")
    log_w = np.where(finished, log_p - log_q, -np.inf)
    log_q = np.where(finished, log_q, -np.inf)
    scored = [len(prefix) + sum(map(len, group)) for prefix, group in zip(prefixes, tails)]
    computed, pick = length.sum(axis=1) + np.array(scored, dtype=np.int64), np.full(len(numbers), -1)
    of_chunks = (log_none, log_alone, log_sol, computed, pick)
    return Samples(thoughts, log_q, log_p, log_x, log_w, length, finished, *of_chunks)


def normalise(log_w: np.ndarray) -> np.ndarray:
    """log_w [n, K] -> weights that sum to 1 in each row; a row of -inf becomes zeros."""
    best = log_w.max(axis=1, keepdims=True)
    w = np.exp(log_w - np.where(np.isfinite(best), best, 0.0))
    return w / np.maximum(w.sum(axis=1, keepdims=True), 1e-300)


def pick(log_w: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Index of the thought drawn in proportion to w, for each row of log_w [n, K] and uniform [n]; -1 if all weigh nothing."""
    w = normalise(log_w)
    cumulated = w.cumsum(axis=1)
    index = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(axis=1)
    return np.where(w.sum(axis=1) > 0, np.minimum(index, w.shape[1] - 1), -1)


def choose(select: str, log_w: np.ndarray, gain: np.ndarray, min_gain: float, uniform) -> np.ndarray:
    """The pick of each row by the rule --select, [n]; log_w, gain [n, K], uniform [n].

    -1: no thought ended, or the pick gains less than min_gain nats. Then it is dropped and not drawn again,
    for a second draw would follow another distribution than the posterior.
    """
    alive = np.isfinite(log_w)
    if select == "argmax":
        drawn = np.where(alive.any(axis=1), log_w.argmax(axis=1), -1)
    else:
        drawn = pick(log_w if select == "resample" else np.where(alive, 0.0, -np.inf), uniform)
    return np.where(gain[np.arange(len(gain)), drawn] < min_gain, -1, drawn)


def ess(log_w: np.ndarray) -> np.ndarray:
    """Effective sample size (sum w)^2 / sum w^2 of each row of log_w [n, K]: 1 .. K, or 0 where all weigh nothing."""
    w = normalise(log_w)
    return w.sum(axis=1) ** 2 / np.maximum((w**2).sum(axis=1), 1e-300)


# e in p_text: how often there is no thought behind SOL. A model has no say in it, for the marker that comes
# next is learned from the coin between the two forms.
NO_THOUGHT = 0.01


def bound(got, k: int) -> np.ndarray:
    """IWAE-k estimates of log p_text(x | c) in nats, [n], always finite. k = 1: the ELBO.

    got: Samples, or whatever has its log_w [n, K], log_none, log_alone, log_sol [n]. The K >= k samples are
    cut into groups of k, and the estimate is the mean over the groups of

        log(p(x | c) + p(SOL | c) * ((1 - e) * (1/k) sum w + e * p(x | c, SOL EOL)))        e = NO_THOUGHT

    A thought that was cut off has w = 0. So what stands in the log is unbiased for p_text with
    p(x, |z| < max_new | c, SOL PRI) in place of p(x | c, SOL PRI), which is never less. By Jensen the
    expectation is at most log p_text. It rises with k and with max_new; for the same samples, each cut-off
    lowers the value itself.
    """
    groups = got.log_w[:, : got.log_w.shape[1] // k * k].reshape(len(got.log_w), -1, k)
    behind_thought = np.logaddexp.reduce(groups, axis=2) - np.log(k)  # [n, n_groups]; -inf: all cut off
    behind_none = got.log_none[:, None]
    behind_sol = np.logaddexp(np.log1p(-NO_THOUGHT) + behind_thought, np.log(NO_THOUGHT) + behind_none)
    return np.logaddexp(got.log_alone[:, None], got.log_sol[:, None] + behind_sol).mean(axis=1)


def thoughtless(got) -> np.ndarray:
    """log(p(x | c) + p(SOL | c) * p(x | c, SOL EOL)) in nats, [n]: without thoughts. got: see bound()."""
    return np.logaddexp(got.log_alone, got.log_sol + got.log_none)


def check(model: Llama, tok: Tokenizer, corpus: Corpus, numbers, got: Samples, limits: Limits, picked,
          proposal: int = POSTERIOR) -> np.ndarray:  # fmt: skip
    """[2, 2]: largest differences of [log_q, log_p] from score_slowly over all thoughts of the chunks.

    Each is the difference of a sum of n tokens, in nats: over n in the first row, over sqrt(n) in the second.
    """
    worst = np.zeros((2, 2))
    for row, i in enumerate(numbers):
        c = context_of(corpus, i, limits, picked)
        for z, ok, *fast in zip(got.thoughts[row], got.finished[row], got.log_q[row], got.log_p[row]):
            for side, form in enumerate((proposal, PRIOR) if ok else ()):
                ids, part = write_chunk(tok, corpus, i, c, z, form, picked)
                start, end = part.thought[0], (part.thought if side == 0 else part.chunk)[1]
                n, difference = end - start, abs(score_slowly(model, ids, start, end) - fast[side])
                worst[:, side] = np.maximum(worst[:, side], (difference / n, difference / n**0.5))
    return worst


# ---------------------------------------------------------------------------------------------------- work

# By how much a sum over n tokens may differ from score_slowly's, in nats: by TOLERANCE * n and SUM_TOLERANCE
# * sqrt(n). Rounding goes up as often as down, so its sum grows as the square root of n. An error that is
# alike at every token grows as n, and tilts the weights: with 0.1 nats a token alone, a thought of 500 tokens
# could be off by 50 nats; now by 5.6. bfloat16's rounding, measured on SmolLM2-135M: 0.05 in the root of the
# mean square, at most 0.11.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
SUM_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
OF_SAMPLES = ("log_q", "log_p", "log_x", "log_w", "length", "finished")  # [n, K] in samples.npz
OF_CHUNKS = ("log_none", "log_alone", "log_sol", "computed", "pick")  # [n]
CHECKED = ("log_q", "log_p", "log_q_sum", "log_p_sum")  # check()'s numbers: over n, and over sqrt(n)
EXAMPLES = 50  # chunks of the first part that are written out in full


def run_part(path: Path, numbers: np.ndarray, engine: Engine, tok, corpus: Corpus, s: Settings, on_tokens) -> dict:
    """Infer one part and write it whole: the numbers of every sample, and the picked thoughts. A line for metrics.jsonl."""
    begin, limits, picked = time.time(), Limits(s.before, s.max_new, engine.config.seq_len), {}
    proposal = PRIOR if s.proposal == "prior" else POSTERIOR
    rules = dict(context=s.context, proposal=proposal, select=s.select, min_gain=s.min_gain)
    rules |= dict(on_tokens=on_tokens, picked=picked)
    got = infer(engine, tok, corpus, numbers, s.samples, limits, s.seed, **rules)
    sampled = time.time()
    checked = np.flatnonzero(hash_uniform(CHECK, s.seed, numbers) < 0.01)
    if not len(checked) and path.stem == "000000":
        checked = np.array([0])
    subset = Samples(**{k: [v[r] for r in checked] if isinstance(v, list) else v[checked] for k, v in vars(got).items()})
    worst = check(engine.model, tok, corpus, numbers[checked], subset, limits, picked, proposal)
    dtype = engine.config.dtype
    allowed = np.array([[TOLERANCE[dtype]], [SUM_TOLERANCE[dtype]]])
    if not (worst <= allowed).all():
        each, whole = worst.max(axis=1)
        raise UserError(
            f"the engine's log_q or log_p differs from the slow function by {each:.2g} nats a token (at most "
            f"{TOLERANCE[dtype]} wanted), and over a thought by {whole:.2g} nats times the root of its "
            f"tokens (at most {SUM_TOLERANCE[dtype]} wanted): nothing of this part is kept"
        )
    spans = [z if (z := got.chosen(row)) is not None else np.zeros(0, np.int64) for row in range(len(numbers))]
    shown = numbers[: EXAMPLES if path.stem == "000000" else 0]
    examples = [describe(tok, corpus, i, got, row) for row, i in enumerate(shown)]
    arrays = {k: getattr(got, k) for k in (*OF_SAMPLES, *OF_CHUNKS)}
    arrays |= {"numbers": numbers, "ids": np.concatenate([*spans, []]).astype(np.int64), "sizes": np.array([len(z) for z in spans])}
    with replacing(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, check=worst, n_checked=len(checked), examples=np.array(examples, dtype=str), **arrays)
    tokens, end = int(got.length.sum()), time.time()
    return {"part": path.stem, "begin": begin, "end": end, "tokens": tokens, "tokens_per_s": tokens / (sampled - begin),
            "ess": float(ess(got.log_w).mean()), "cut_off": float((~got.finished).mean()), "check": worst.tolist()}  # fmt: skip


def describe(tok: Tokenizer, corpus: Corpus, i: int, got: Samples, row: int) -> str:
    """A chunk with its K thoughts, their numbers and the pick, to be read in a terminal."""
    before = "".join(tok.decode(corpus.chunk(j)) for j in corpus.before(i, 1))
    size = ess(got.log_w[row : row + 1])[0]
    lines = [f"chunk {i} | before: {before!r} | text: {tok.decode(corpus.chunk(i))!r} | "
             f"log p(x | c, no thought) {got.log_none[row]:.3f} | ess {size:.2f}"]  # fmt: skip
    for k, weight in enumerate(normalise(got.log_w[row : row + 1])[0]):
        mark = "->" if k == got.pick[row] else "  "
        numbers = " ".join(f"{name} {getattr(got, name)[row, k]:8.3f}" for name in ("log_q", "log_p", "log_w"))
        cut = "" if got.finished[row, k] else " (cut off)"
        text = tok.decode(got.thoughts[row][k])
        lines.append(f"  {mark} {numbers} gain {got.gain[row, k]:7.3f} weight {weight:.3f} | {text!r}{cut}")
    return "\n".join(lines)


def figures(part: dict, n_bytes: int) -> dict:
    """What the samples of all inferred chunks tell, for meta.json; None: the mean of nothing.

    part: the arrays of OF_SAMPLES and OF_CHUNKS. gain: log p(x | c, z) - log_none, in nats. nll_bound
    {k: -bound()}, nll_thoughtless (-thoughtless()) and nll_alone (-log_alone) are of all these chunks,
    whatever was cut off: in nats a byte, and with _chunk in nats a chunk.
    """
    got = SimpleNamespace(**part)
    log_w, finished = got.log_w, got.finished
    w, K = normalise(log_w), log_w.shape[1]
    n_alive = finished.sum(axis=1)
    even = finished / np.maximum(n_alive, 1)[:, None]
    gain = got.log_x - got.log_none[:, None]
    picked = got.pick >= 0
    edges = 2 ** np.arange(int(got.length.max(initial=1)).bit_length() + 1)
    bounds = {k: bound(got, k) for k in sorted({1, K} | {2**b for b in range(K.bit_length()) if 2**b <= K})}

    def mean(x):
        return float(x.mean()) if x.size else None

    def nll(per: int, tail: str = "") -> dict:
        each = {str(k): float(-v.sum() / max(per, 1)) for k, v in bounds.items()}
        alone, none = (float(-v.sum() / max(per, 1)) for v in (got.log_alone, thoughtless(got)))
        return {f"nll_bound{tail}": each, f"nll_thoughtless{tail}": none, f"nll_alone{tail}": alone}

    lengths = [(got.length >= a) & (got.length < b) for a, b in zip(edges, edges[1:])]
    return {
        "ess": mean(ess(log_w)),
        "weight_entropy": mean(-(w * np.log(np.maximum(w, 1e-300))).sum(axis=1)),  # 0: one thought has all; log K: all weigh the same
        "pick_not_uniform": mean(np.abs(w - even)[n_alive > 0].sum(axis=1) / 2),  # share of picks that a uniform choice would make otherwise
        "gain": mean(gain[finished]),
        "gain_picked": mean(gain[picked, got.pick[picked]]),
        "no_gain": int((~picked & (n_alive > 0)).sum()),  # chunks whose pick was dropped by --min_gain
        "cut_off_share": mean(~finished),
        "lengths": {f"{a}-{b - 1}": int(inside.sum()) for a, b, inside in zip(edges, edges[1:], lengths)},
    } | nll(n_bytes) | nll(len(log_w), "_chunk")  # fmt: skip


def merge(paths: list[Path], corpus: Corpus, tok: Tokenizer, s: Settings, counts: dict) -> dict:
    """Join the parts into the thoughts folder, with the files that lie beside them; its meta.json. UserError unless each chunk is there once."""
    K, n = s.samples, corpus.n_chunks
    samples = {k: np.full((n, K), np.nan) for k in OF_SAMPLES} | {k: np.full(n, np.nan) for k in OF_CHUNKS}
    samples |= {"length": np.zeros((n, K), np.int64), "finished": np.zeros((n, K), bool), "pick": np.full(n, -1)}
    spans, done, worst, n_checked, examples = [()] * n, np.zeros(n, dtype=np.int64), np.zeros((2, 2)), 0, []
    for path in paths:
        with np.load(path, allow_pickle=False) as f:
            part = dict(f)
        numbers = part["numbers"]
        done[numbers] += 1
        for key in samples:
            samples[key][numbers] = part[key]
        for i, z in zip(numbers, np.split(part["ids"], np.cumsum(part["sizes"])[:-1])):
            spans[i] = z
        worst, n_checked = np.maximum(worst, part["check"]), n_checked + int(part["n_checked"])
        examples += part["examples"].tolist()
    if done.max(initial=0) > 1 or done.sum() != counts["n_inferred"]:
        raise UserError(f"{paths[0].parent}: its parts do not cover the corpus once; remove it and run again")
    inferred = {k: v[done > 0] for k, v in samples.items()}
    n_bytes = sum(tok.n_bytes(corpus.chunk(i)) for i in np.flatnonzero(done))
    counts |= {
        "cut_off": int((~inferred["finished"]).sum()),
        "all_cut_off": int((~inferred["finished"].any(axis=1)).sum()),
        "empty_picks": int(sum(len(spans[i]) == 0 for i in np.flatnonzero(done & (samples["pick"] >= 0)))),
        "sampled_tokens": int(samples["length"].sum()),
        "computed_tokens": int(np.nansum(samples["computed"])),
        "checked": {"chunks": n_checked} | dict(zip(CHECKED, worst.ravel().tolist())),
    }
    how = {"model": str(s.model), "samples": K, "max_new": s.max_new, "temperature": 1.0, "seed": s.seed, "selection": s.select}
    how |= {"proposal": s.proposal, "min_gain": s.min_gain, "context": s.context, "before": s.before, "weights": fingerprint(s.model)}
    meta = how | counts | figures(inferred, n_bytes)
    work = paths[0].parent
    (work / "examples.txt").write_text("\n\n".join(examples) + "\n", encoding="utf-8")
    stages = [json.loads(line) for line in open(work / "metrics.jsonl", encoding="utf-8")] if (work / "metrics.jsonl").exists() else []
    seconds, reached = 0.0, 0.0  # time in which anyone was at work
    for line in sorted(stages, key=lambda line: line["begin"]):
        seconds, reached = seconds + max(0.0, line["end"] - max(reached, line["begin"])), max(reached, line["end"])
    write_json(work / "timing.json", {"seconds": seconds, "tokens_per_s": sum(line["tokens"] for line in stages) / max(seconds, 1e-9)})
    names = ("settings.json", "timing.json", "metrics.jsonl", "examples.txt")
    write_thoughts(s.out_dir, corpus, spans, meta, samples, [work / name for name in names if (work / name).exists()])
    return meta


def fingerprint(model) -> str:
    """A hash of a model folder's weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def report(meta: dict) -> str:
    """meta.json in a few lines."""

    def of(name: str, form: str) -> str:
        return "-" if meta[name] is None else format(meta[name], form)

    n, lengths, checked = meta["samples"], meta["lengths"].items(), meta["checked"]
    bounds = [f"K={k} {v:.4f} ({meta['nll_bound_chunk'][k]:.3f})" for k, v in meta["nll_bound"].items()]
    others = [f"{name} {meta[k]:.4f} ({meta[f'{k}_chunk']:.3f})"
              for name, k in (("no thought", "nll_thoughtless"), ("no marker", "nll_alone"))]  # fmt: skip
    lines = [
        f"{meta['n_inferred']} chunks, {n} thoughts each, {meta['sampled_tokens']:,} tokens; "
        f"cut off {meta['cut_off']} ({meta['cut_off_share']:.1%}), "
        f"chunks with all cut off {meta['all_cut_off']}, "
        f"picks dropped for a gain below {meta['min_gain'] if meta['min_gain'] > -1e9 else -math.inf:g} nats {meta['no_gain']}, "
        f"empty picks {meta['empty_picks']}",
        f"ess {of('ess', '.2f')} of {n}, entropy of weights {of('weight_entropy', '.3f')} nats, "
        f"picks that a uniform choice would make otherwise {of('pick_not_uniform', '.1%')}",
        f"gain of a thought, log p(x|c,z) - log p(x|c, no thought): {of('gain', '.2f')} nats, "
        f"of the picked {of('gain_picked', '.2f')}",
        "tokens a thought: " + ", ".join(f"{k}: {v}" for k, v in lengths if v),
        "bound of -log p, nats a byte (a chunk): " + ", ".join(bounds) + "; " + ", ".join(others),
        f"checked against the slow function on {checked['chunks']} chunks: "
        f"log_q within {checked['log_q']:.1e}, log_p within {checked['log_p']:.1e} nats a token; "
        f"over a thought within {checked['log_q_sum']:.1e} and {checked['log_p_sum']:.1e} nats "
        "times the root of its tokens",
    ]
    if meta["gain"] is None:
        lines[2] = "no thought ended: raise --max_new, or train the model longer"
    return "\n".join(lines)


def main(s: Settings) -> None:
    s.min_gain = max(s.min_gain, -1e9)  # JSON has no infinity
    alone, rank = "INFER_WORKER" not in os.environ, int(os.environ.get("RANK", 0))
    if "WORLD_SIZE" in os.environ and torch.cuda.is_available() and s.device in ("", "cuda"):  # torchrun: each rank is a worker of its own
        s.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if rank:
        sys.stdout = open(os.devnull, "w")
    device = pick_device(s.device)
    device = "cpu" if device == "mps" and not s.device else device  # float64 sums, which mps lacks
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    model, tok = load_model(s.model, device, s.dtype if s.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32")
    corpus = open_corpus(s.corpus, tok)
    free = ("device", "workers", "show")
    if Path(s.out_dir).exists():
        claim(s.out_dir, s, free)
        print(f"{s.out_dir}: complete")
        return show(s)
    limits, sizes = Limits(s.before, s.max_new, model.config.seq_len), np.diff(corpus.chunks)
    chosen = np.flatnonzero(can_think(corpus, s.max_new, limits.seq_len))
    counts = {
        "n_inferred": len(chosen),
        "n_questions": int(corpus.questions.sum()),
        "n_empty": int((sizes == 0).sum()),
        "n_too_long": int((~corpus.questions & ~fits(corpus, s.max_new, limits.seq_len)).sum()),
        "n_short_context": sum(len(context_of(corpus, i, limits)) < len(corpus.before(i, s.before)) for i in chosen),
    }  # fmt: skip
    if not len(chosen):
        raise UserError(f"{s.corpus}: no chunk to infer thoughts for: {counts}")
    parts = split_parts(corpus, chosen, s.part_size or (500 if device == "cpu" else 20000))
    longest = limits.seq_len - s.max_new
    if s.context == "bare":
        longest = max(6 + int(sizes[[*context_of(corpus, i, limits), i]].sum()) for i in chosen)
    threads, small = torch.get_num_threads(), sum(p.numel() for p in model.parameters()) < 20e6
    n_workers = min(s.workers or (threads if small else 1), len(parts)) if device == "cpu" and alone else 1
    engine, work = Engine(model), Path(s.out_dir + ".parts")
    work.mkdir(parents=True, exist_ok=True)
    with hold(work / "lock"):  # the cells are planned once, for all who work on this folder: shapes decide the last bits
        if Path(s.out_dir).exists():  # joined a moment ago
            shutil.rmtree(work, ignore_errors=True)
            print(f"{s.out_dir}: complete")
            return
        claim(work, s, free)
        if not (work / "plan.json").exists():
            engine.n_rows = s.rows
            slots, cells, planned, memory = engine.plan(s.samples, longest, s.max_new, max(map(len, parts)), n_workers)
            rows = slots * cells
            write_json(work / "plan.json", {"rows": rows, "prompt_len": longest, "bytes": planned, "threads": max(1, threads // n_workers)})
            print(f"plan: {rows} thoughts side by side, prompts of up to {longest} tokens: {planned / 1e9:.2f} GB a worker beside the weights, "
                  f"{memory / 1e9:.1f} GB free")  # fmt: skip
    print("chunks: " + ", ".join(f"{k.removeprefix('n_').replace('_', ' ')} {v}" for k, v in counts.items()), flush=True)
    plan = read_json(work / "plan.json")
    engine.n_rows = plan["rows"]
    if device == "cpu":
        torch.set_num_threads(plan["threads"])
    others = helpers(s, n_workers, plan["threads"])
    paths = [work / f"{n:06d}.npz" for n in range(len(parts))]
    try:
        do_parts(list(zip(paths, parts)), lambda path, numbers, on_tokens: run_part(path, numbers, engine, tok, corpus, s, on_tokens), work)
        with hold(work / "lock"):
            if alone and not Path(s.out_dir).exists():
                for path in paths:  # whoever wrote the part may still be at its line of metrics.jsonl
                    with hold(path.with_suffix(".lock")):
                        pass
                merge(paths, corpus, tok, s, counts)
                shutil.rmtree(work, ignore_errors=True)
    except FileNotFoundError:
        if not Path(s.out_dir).exists():
            raise
        # else another worker was first to join the parts, and has removed them
    finally:
        for child in others:
            child.stdin.close()  # ends it, if it has not ended
            child.wait()
    if alone:
        print(report(read_json(Path(s.out_dir) / "meta.json")))
        show(s)


def show(s: Settings) -> None:
    """Print the first --show chunks with all their thoughts."""
    if s.show:
        text = (Path(s.out_dir) / "examples.txt").read_text(encoding="utf-8")
        print("\n" + "\n\n".join(text.rstrip().split("\n\nchunk ")[: s.show]).replace("\n\n", "\n\nchunk "))


if __name__ == "__main__":
    run(main, Settings)
