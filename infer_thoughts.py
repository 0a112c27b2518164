"""Infer the latent thoughts of a corpus: the E-step.

For each chunk x of a text, with the chunks c before it, a model that was
trained on thoughts (train.py) does three things:

    sample   z_1 .. z_K  from  q(z | c, x), at temperature 1
    weigh    log_w_k  =  log p(z_k, x | c)  -  log q(z_k | c, x)
    pick     one z_k with probability  w_k / sum w           (--select)
             but none if the text is likelier without any:
             log p(x | c, z_k)  -  log_none  <  --min_gain

q is the posterior: it has read x. p is the prior: it has not. Both are the
same model, and a marker says which one is meant. Markers are given. What is
scored is z with the EOL that ends it, and under p also x:

    q:  BOS c c c  SOL EOL  x x x x  SOL POS  z z z EOL
                                             [- log_q -]

    p:  BOS c c c  SOL PRI  z z z EOL  x x x x
                           [------ log_p -----]

The same text without a thought, in the two ways in which training writes it:

    none:   BOS c c c  SOL EOL  x x x x      alone:  BOS c c c  x x x x
                               [log_none]                      [log_alone]

One marker is scored, for the bounds: log_sol is log p(SOL | c), SOL or the text.

As K grows, the pick tends to a sample of the exact posterior p(z | c, x). A
thought cut off at --max_new tokens or by another marker has no EOL, so its
weight is 0. A chunk whose thoughts were all cut off gets none. Both are counted.

Why --min_gain: weights compare the K thoughts only with one another. When all
of them mislead, one is picked nevertheless, and p learns to expect thoughts
that do not fit their text. So a pick that gains fewer than --min_gain nats
over log_none is dropped, and its chunk is trained on without a thought. The
paper has no such rule (--min_gain=-inf). RLP (arXiv 2510.01265) has the same
difference as its reward. Where thoughts can say the answer ("3 + 2 = 1"), all
gain. With --gain_by=evidence the chunk is asked instead, and p(z | c) counts, too:

    log (1/K) sum w  -  log_none  <  --min_gain

What the bounds bound. A text shows no markers, so there are three ways to
write it. With e = NO_THOUGHT = 0.01 their probabilities add up to

    p_text(x | c)  =  p(x | c)                               alone
                   +  p(SOL | c) (1 - e) p(x | c, SOL PRI)   behind a thought
                   +  p(SOL | c)    e    p(x | c, SOL EOL)   none

The mean weight is an unbiased estimate of p(x, |z| < max_new | c, SOL PRI):
only thoughts that end, in time. It replaces p(x | c, SOL PRI), which is at
least as large. So by Jensen's inequality the log of the sum is in expectation at most
log p_text: the ELBO at K = 1, tighter with every K (IWAE, Burda et al. 2016).
It is finite whatever is cut off, and each cut-off makes it worse.

    --context=thoughts  c has the thoughts that were picked for its chunks, as
                        in training; so documents advance chunk by chunk
    --context=bare      c is plain text: the paper's choice; in training a
                        model sees that only with train.py --bare

With thoughts in c this is sequential importance sampling: if picks are drawn
by weight and none is dropped, the product of a document's mean weights is
unbiased for p(x_1, x_2 ...) behind thoughts that end in time. Whatever rule
makes the picks, c depends only on earlier text and random numbers, so a
document's summed bounds bound the log of a probability of documents.

    python infer_thoughts.py --model=M0 --corpus=C/raw --out_dir=E1 --show=3
    torchrun --nproc_per_node=8 infer_thoughts.py --model=M0 ...  # eight GPUs

The thoughts folder (data/lib/corpus.py) also holds samples.npz (see OF_SAMPLES
and OF_CHUNKS), meta.json (counts, gains, bounds), examples.txt and shown.npz. The
work is done in parts, shared by any number of these commands: see data/lib/parts.py.

Every random number is keyed by (seed, chunk, sample, position), so batches,
order, workers and restarts change no sample. But products of other shapes round
their last bits differently, which can tip a sample whose random number falls
within 1e-6 of a border.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Literal

import numpy as np
import torch

from data.lib.cli import LEAST, UserError, claim, opt, read_json, replacing, run, write_json
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
    marker_count,
    open_corpus,
    write_thoughts,
)
from data.lib.engine import Engine, Sampling
from data.lib.kernels import warn_of_slow_bfloat16
from data.lib.model_folder import fingerprint
from data.lib.parts import Work, agree, finish, helpers, read_parts, split_parts, timing
from data.lib.ranks import worker_device
from data.lib.thoughts_report import for_people, report, show, write_for_people
from train import Llama, load_model


@dataclass(kw_only=True)
class Settings:
    # what is read and written
    corpus: str = opt(help="corpus folder")
    model: str = opt(help="model folder, trained with thoughts")
    out_dir: str = opt(help="thoughts folder to write")
    # how thoughts are sampled
    samples: int = opt(4, "thoughts sampled a chunk (K)", low=1)
    max_new: int = opt(128, "longest thought in tokens, its EOL included", low=1)
    context: Literal["bare", "thoughts"] = opt(
        "thoughts", "earlier chunks as plain text, or with their picked thoughts"
    )
    before: int = opt(3, "chunks before the chunk that are given", low=0)
    proposal: Literal["posterior", "prior"] = opt(
        "posterior", "what thoughts are drawn from: q(z | c, x), or p(z | c)"
    )
    seed: int = opt(0, "sampling noise and picks")
    # how one is picked
    select: Literal["resample", "argmax", "uniform"] = opt(
        "resample", "by weight, the heaviest, any that ended"
    )
    min_gain: float = opt(0.0, "drop picks that gain fewer nats; -inf: none", low=-math.inf)
    gain_by: Literal["text", "evidence"] = opt("text", "the pick, or the mean weight of all")
    # the machine
    part_size: int = opt(0, "chunks a part; 0: 100 to 500 on a CPU, or 20000", low=0)
    rows: int = opt(0, "most thoughts side by side; 0: what memory allows", low=0)
    workers: int = opt(0, "processes on a CPU; 0: one a core for models below 20M parameters", low=0)
    dtype: Literal["auto", "float32", "bfloat16"] = opt(
        "auto", "of the weights; auto: bfloat16 on a GPU, float32 elsewhere"
    )
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")
    show: int = opt(0, "print this many chunks with all their thoughts", low=0)


# -------------------- the slow reference
# What the engine must reproduce: one sequence at a time, no cache, a whole
# forward pass for every token. Read this first.


@torch.inference_mode()
def sample_slowly(model: Llama, prompt, sampling: Sampling, key: int, sample: int):
    """One continuation of a prompt, at temperature 1.

    (ids with the stop token if there is one, whether there is one, sum of the
    log-probabilities of the ids in nats). key and sample seed its noise.
    """
    device = model.embed_tokens.weight.device
    ids, log_q = list(prompt), 0.0
    for position in range(sampling.max_new):
        hidden = model(torch.tensor([ids], device=device))  # [1, T, n_embd]
        logits = model.logits(hidden[0, -1]).double()  # [n_vocab]
        log_p = torch.log_softmax(logits, dim=-1)
        cumulated = log_p.exp().cumsum(dim=0)
        keys = sampling.purpose, sampling.seed, key, sample, position
        point = hash_uniform(*keys)[0] * cumulated[-1]
        token = torch.searchsorted(cumulated, point, right=True)
        token = min(int(token), len(log_p) - 1)
        ids.append(token)
        log_q += float(log_p[token])
        if token in sampling.stop:
            return ids[len(prompt) :], True, log_q
    return ids[len(prompt) :], False, log_q


@torch.inference_mode()
def score_slowly(model: Llama, ids, start: int, end: int) -> float:
    """Sum of log p(ids[t] | ids[:t]) for t in [start, end), in nats."""
    ids = torch.as_tensor(ids, device=model.embed_tokens.weight.device)
    hidden = model(ids[None, :-1])[0, start - 1 : end - 1]  # [end - start, n_embd]
    log_p = torch.log_softmax(model.logits(hidden).double(), dim=-1)
    return float(log_p.gather(1, ids[start:end, None]).sum())


# -------------------- prompts and contexts

# Tokens beside texts and thoughts: the markers of the longer form, and BOS.
MARKERS = int(marker_count(POSTERIOR))
AROUND = 1 + MARKERS
NOTHING = MappingProxyType({})  # no chunk has a picked thought


@dataclass(frozen=True)
class Limits:
    """What bounds a prompt."""

    before: int  # chunks before the chunk
    max_new: int  # tokens of a thought, with its EOL
    seq_len: int  # tokens of a sequence


def fits(corpus: Corpus, max_new: int, seq_len: int) -> np.ndarray:
    """Which chunks leave room for a thought of max_new tokens, [n_chunks]."""
    return np.diff(corpus.chunks) + AROUND + max_new <= seq_len


def can_think(corpus: Corpus, max_new: int, seq_len: int) -> np.ndarray:
    """Which chunks can carry a thought: no question, not empty, fits."""
    full = np.diff(corpus.chunks) > 0
    return ~corpus.questions & full & fits(corpus, max_new, seq_len)


def context_of(corpus: Corpus, i: int, limits: Limits, picked=NOTHING) -> list[int]:
    """The chunks that are given before chunk i, in their order.

    Up to limits.before; fewer where the sequence would exceed limits.seq_len.
    """
    room = limits.seq_len - limits.max_new - AROUND - len(corpus.chunk(i))
    context = []
    for j in reversed(corpus.before(i, limits.before)):
        room -= len(corpus.chunk(j))
        if j in picked:
            thought, _ = picked[j]
            room -= len(thought) + MARKERS
        if room < 0:
            break
        context.insert(0, j)
    return context


def write_chunk(corpus: Corpus, i: int, context, thought, form: int, picked=NOTHING):
    """Chunk i in a form behind its context: (ids, its Part), see layout().

    Chunks of the context are plain text, but for those in picked {chunk:
    (thought, form)}. thought None: the ids are a prompt for the thought, and
    there is no Part.
    """
    given = [picked.get(j, ((), RAW)) for j in context]
    thoughts, forms = zip(*given, (thought, form))
    chunks = [corpus.chunk(j) for j in (*context, i)]
    ids, parts = layout(corpus.tokenizer, chunks, thoughts, forms, end=False)
    return ids, parts[-1] if len(parts) == len(chunks) else None


# -------------------- sample, weigh and pick


@dataclass(frozen=True)
class EStep:
    """How thoughts are sampled and picked."""

    limits: Limits
    samples: int = 4  # K
    context: str = "bare"  # "thoughts": with the picks of earlier chunks
    proposal: int = POSTERIOR  # whose thoughts are sampled; or PRIOR
    select: str = "resample"  # see choose
    min_gain: float = -math.inf  # see choose
    gain_by: str = "text"  # or "evidence"
    seed: int = 0
    purpose: int = DRAW  # the first key of the noise


@dataclass
class Samples:
    """K thoughts for each of n chunks. Logs are in nats; cut off: -inf."""

    thoughts: np.ndarray  # [n, K] of arrays of ids, without EOL
    log_q: np.ndarray  # [n, K] log q(z | c, x)
    log_p: np.ndarray  # [n, K] log p(z, x | c)
    log_x: np.ndarray  # [n, K] log p(x | c, z)
    log_w: np.ndarray  # [n, K] log_p - log_q
    length: np.ndarray  # [n, K] sampled tokens, with EOL
    finished: np.ndarray  # [n, K] bool: not cut off
    log_none: np.ndarray  # [n] log p(x | c, SOL EOL)
    log_alone: np.ndarray  # [n] log p(x | c)
    log_sol: np.ndarray  # [n] log p(SOL | c)
    computed: np.ndarray  # [n] tokens that were read, sampled and scored
    pick: np.ndarray  # [n] index of the picked thought; -1: none

    @property
    def gain(self) -> np.ndarray:
        """[n, K] nats by which each thought makes its text likelier."""
        return self.log_x - self.log_none[:, None]

    def chosen(self, row: int):
        """The picked thought of a chunk; None: it has none."""
        k = self.pick[row]
        return None if k < 0 else self.thoughts[row, k]

    def take(self, rows) -> "Samples":
        """The same of some chunks, or in another order."""
        return Samples(**{name: x[rows] for name, x in vars(self).items()})


def infer(engine: Engine, corpus: Corpus, numbers, e_step: EStep, picked=None, on_tokens=None) -> Samples:
    """Sample, weigh and pick among K thoughts for the chunks `numbers`.

    With thoughts in the context, documents advance side by side, one chunk of
    each at a time, so that every pick stands in the context of the next chunk.
    The picks are put into the dict `picked`: {chunk: (thought, form)}.
    on_tokens(n) is told of every n sampled tokens.
    """
    numbers = np.asarray(numbers)
    picked = {} if picked is None else picked
    turn = np.zeros(len(numbers), dtype=np.int64)
    if e_step.context == "thoughts":
        turn = rank_in_group(corpus.doc_of(numbers))
    rows, found = [], []
    for now in range(turn.max(initial=0) + 1):
        here = np.flatnonzero(turn == now)
        got = infer_side_by_side(engine, corpus, numbers[here], e_step, picked, on_tokens)
        if e_step.context == "thoughts":
            remember(picked, numbers[here], got, e_step.seed)
        rows.append(here)
        found.append(vars(got))
    whole = {name: np.concatenate([x[name] for x in found]) for name in found[0]}
    return Samples(**whole).take(np.argsort(np.concatenate(rows)))


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """How many earlier entries equal each: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    rank = np.empty_like(group)
    rank[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return rank


def infer_side_by_side(
    engine: Engine, corpus: Corpus, numbers, e_step: EStep, picked, on_tokens
) -> Samples:
    """infer() for chunks of which none stands in the context of another."""
    contexts = [context_of(corpus, i, e_step.limits, picked) for i in numbers]
    how = e_step.proposal, picked
    prompts = [write_chunk(corpus, i, c, None, *how)[0] for i, c in zip(numbers, contexts)]
    markers = corpus.tokenizer.markers  # each ends a thought
    sampling = Sampling(e_step.limits.max_new, markers, e_step.seed, e_step.purpose)
    read = np.array(list(map(len, prompts)), dtype=np.int64)
    scores = [None] * len(numbers)

    def score(slots: dict, drawn) -> None:
        """Score what has ended, while the engine holds the keys of the contexts."""
        prefixes, tails = [], []
        for row in slots.values():
            prefix, group = write_tails(corpus, numbers[row], contexts[row], drawn[row], picked)
            prefixes.append(prefix)
            tails.append(group)
            read[row] += sum({tail.tobytes(): len(tail) for tail in group}.values())
        for row, found in zip(slots.values(), engine.score(prefixes, tails, list(slots))):
            scores[row] = found

    drawn = engine.generate(prompts, numbers, e_step.samples, sampling, on_tokens, on_ended=score)
    got = weigh(numbers, drawn, scores, corpus.tokenizer.eol)
    got.computed += read
    uniform = hash_uniform(PICK, e_step.seed, numbers)
    gain = got.gain if e_step.gain_by == "text" else evidence(got.log_w, got.log_none)
    got.pick = choose(e_step.select, got.log_w, gain, e_step.min_gain, uniform)
    return got


def remember(picked: dict, numbers, got: Samples, seed: int) -> None:
    """Put the picks into `picked`, each in the form of a coin of its own.

    As in training, where an empty thought is written as none, too.
    """
    coins = hash_uniform(CONTEXT_FORM, seed, numbers)
    for row, (i, coin) in enumerate(zip(numbers, coins)):
        thought = got.chosen(row)
        if thought is not None and len(thought):
            picked[int(i)] = thought, PRIOR if coin < 0.5 else POSTERIOR


def weigh(numbers, drawn, scores, eol: int) -> Samples:
    """What Engine.generate has drawn for these chunks, weighed; none is picked.

    scores: for each chunk log p of the tokens of write_tails(). UserError for
    a log-probability that is not finite.
    """
    shape = len(numbers), len(drawn[0]) if drawn else 1
    thoughts = np.empty(shape, dtype=object)
    length = np.zeros(shape, dtype=np.int64)
    finished = np.zeros(shape, dtype=bool)
    log_q, log_p, log_x = np.full((3, *shape), -np.inf)
    log_none, log_alone, log_sol = np.zeros((3, len(numbers)))
    for row, (alone, none, *behind) in enumerate(scores):
        log_alone[row] = alone.sum()
        log_sol[row] = none[0]
        log_none[row] = none[2:].sum()  # behind SOL EOL
        for k, (ids, _, log_prob) in enumerate(drawn[row]):
            length[row, k] = len(ids)
            finished[row, k] = ids[-1] == eol
            thoughts[row, k] = ids[:-1] if ids[-1] == eol else ids
            log_q[row, k] = log_prob
        for k, tail in zip(np.flatnonzero(finished[row]), behind, strict=True):
            log_p[row, k] = tail[2:].sum()  # behind SOL PRI, which are given
            log_x[row, k] = tail[len(tail) - len(alone) :].sum()

    log_w = log_p - log_q
    finite = (np.isfinite(log_w) | ~finished).all(axis=1)
    finite &= np.isfinite(log_alone + log_none + log_sol)
    if not finite.all():
        raise UserError(
            f"chunk {numbers[~finite][0]}: log-probabilities are not finite; "
            "the model's weights or the arithmetic are broken"
        )
    log_q = np.where(finished, log_q, -np.inf)
    of_samples = thoughts, log_q, log_p, log_x, log_w, length, finished
    of_chunks = log_none, log_alone, log_sol, length.sum(axis=1)
    return Samples(*of_samples, *of_chunks, pick=np.full(len(numbers), -1))


def write_tails(corpus: Corpus, i: int, context, drawn, picked):
    """What is scored of chunk i: (prefix, tails).

    All tails follow the same prefix: BOS and the context. They are x alone,
    SOL EOL x, and SOL PRI z EOL x for each of `drawn` that has ended.
    """
    tok = corpus.tokenizer
    alone, part = write_chunk(corpus, i, context, None, RAW, picked)
    prefix, x = np.split(alone, [part.chunk[0]])
    tails = [x, np.array([tok.sol, tok.eol, *x])]
    for ids, *_ in drawn:
        if ids[-1] == tok.eol:
            whole, _ = write_chunk(corpus, i, context, ids[:-1], PRIOR, picked)
            tails.append(whole[len(prefix) :])
    return prefix, tails


def normalise(log_w: np.ndarray) -> np.ndarray:
    """log_w [n, K] -> weights that sum to 1 in each row; all -inf: zeros."""
    best = log_w.max(axis=1, keepdims=True)
    w = np.exp(log_w - np.where(np.isfinite(best), best, 0.0))
    return w / np.maximum(w.sum(axis=1, keepdims=True), 1e-300)


def pick(log_w: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Index drawn in proportion to w in each row of log_w [n, K].

    uniform [n]: random numbers in [0, 1). -1: all weigh nothing.
    """
    w = normalise(log_w)
    cumulated = w.cumsum(axis=1)
    index = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(axis=1)
    index = np.minimum(index, w.shape[1] - 1)
    return np.where(w.sum(axis=1) > 0, index, -1)


def choose(select: str, log_w, gain, min_gain: float, uniform) -> np.ndarray:
    """The pick of each row by the rule --select, [n].

    log_w, gain [n, K], uniform [n]. -1: no thought ended, or the pick gains
    less than min_gain nats and is dropped. It is not drawn again: a second
    draw would follow another distribution than the posterior.
    """
    ended = np.isfinite(log_w)
    if select == "argmax":
        drawn = np.where(ended.any(axis=1), log_w.argmax(axis=1), -1)
    elif select == "uniform":
        drawn = pick(np.where(ended, 0.0, -np.inf), uniform)
    else:
        drawn = pick(log_w, uniform)
    gained = gain[np.arange(len(gain)), drawn]
    return np.where(gained < min_gain, -1, drawn)


def evidence(log_w: np.ndarray, log_none: np.ndarray) -> np.ndarray:
    """Nats by which thoughts, all together, make each text likelier: [n, K], equal in a row."""
    mean = np.logaddexp.reduce(log_w, axis=1) - np.log(log_w.shape[1])
    return np.broadcast_to((mean - log_none)[:, None], log_w.shape)


def ess(log_w: np.ndarray) -> np.ndarray:
    """Effective sample size of each row of log_w [n, K]; all -inf: 0."""
    w = normalise(log_w)
    return w.sum(axis=1) ** 2 / np.maximum((w**2).sum(axis=1), 1e-300)


# -------------------- bounds

# e in p_text: how often there is no thought behind SOL. A model has no say in
# it: the marker that comes next is learned from the coin between two forms.
NO_THOUGHT = 0.01


def bound(got, k: int) -> np.ndarray:
    """IWAE-k estimates of log p_text(x | c) in nats, [n]. k = 1: the ELBO.

    got: Samples, or whatever has its log_w [n, K], log_none, log_alone and
    log_sol [n]. The K >= k samples are cut into groups of k, and the estimate
    is the mean over the groups of

        log(p(x | c) + p(SOL | c) ((1 - e) (1/k) sum w + e p(x | c, SOL EOL)))

    A thought that was cut off has w = 0. The estimate is always finite, and its
    expectation rises with k and with max_new. See the top of this file.
    """
    n, K = got.log_w.shape
    groups = got.log_w[:, : K // k * k].reshape(n, -1, k)  # [n, n_groups, k]
    behind_thought = np.logaddexp.reduce(groups, axis=2) - np.log(k)
    behind_none = got.log_none[:, None]
    behind_sol = np.logaddexp(
        np.log1p(-NO_THOUGHT) + behind_thought, np.log(NO_THOUGHT) + behind_none
    )
    alone, sol = got.log_alone[:, None], got.log_sol[:, None]
    return np.logaddexp(alone, sol + behind_sol).mean(axis=1)


def thoughtless(got) -> np.ndarray:
    """log(p(x | c) + p(SOL | c) p(x | c, SOL EOL)) in nats, [n]."""
    return np.logaddexp(got.log_alone, got.log_sol + got.log_none)


# -------------------- the check against the slow reference

# By how much a sum over n tokens may differ from score_slowly's, in nats:
# TOLERANCE * n and SUM_TOLERANCE * sqrt(n). Rounding goes up as often as down,
# so its sum grows as the root of n. An error that is alike at every token grows
# as n, and tilts the weights. Measured on SmolLM2-135M, bfloat16 rounds by 0.05
# in the root of the mean square, and by at most 0.11.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
SUM_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


def check(model: Llama, corpus: Corpus, numbers, got: Samples, e_step: EStep, picked):
    """[2, 2]: largest errors of [log_q, log_p] of all thoughts, in nats.

    Each is a sum's difference from score_slowly's, divided by the number n of
    its tokens in the first row, and by sqrt(n) in the second. Both sides run
    train.Llama, whose packed products tests/test_engine.py checks.
    """
    worst = np.zeros((2, 2))
    for row, i in enumerate(numbers):
        context = context_of(corpus, i, e_step.limits, picked)
        for k in np.flatnonzero(got.finished[row]):
            thought = got.thoughts[row, k]
            q_ids, q = write_chunk(corpus, i, context, thought, e_step.proposal, picked)
            p_ids, p = write_chunk(corpus, i, context, thought, PRIOR, picked)
            fast = got.log_q[row, k], got.log_p[row, k]
            spans = (q_ids, *q.thought), (p_ids, p.thought[0], p.chunk[1])
            for side, (ids, start, end) in enumerate(spans):
                n = end - start
                error = abs(score_slowly(model, ids, start, end) - fast[side])
                each = error / n, error / n**0.5
                worst[:, side] = np.maximum(worst[:, side], each)
    return worst


def refuse_errors(worst: np.ndarray, dtype: str) -> None:
    """UserError unless check()'s result is within the tolerances."""
    each, whole = worst.max(axis=1)
    if each <= TOLERANCE[dtype] and whole <= SUM_TOLERANCE[dtype]:
        return  # not so for NaN
    raise UserError(
        f"the engine's log_q or log_p differs from the slow function by {each:.2g} "
        f"nats a token (at most {TOLERANCE[dtype]} wanted), and over a thought by "
        f"{whole:.2g} nats times the root of its tokens (at most "
        f"{SUM_TOLERANCE[dtype]} wanted): nothing of this part is kept"
    )


# -------------------- parts

OF_SAMPLES = ("log_q", "log_p", "log_x", "log_w", "length", "finished")  # [n, K]
OF_CHUNKS = ("log_none", "log_alone", "log_sol", "computed", "pick")  # [n]
# What samples.npz says of a chunk for which nothing was inferred; else NaN.
BLANK = {"length": 0, "finished": False, "pick": -1}


def run_part(path: Path, numbers, engine: Engine, corpus: Corpus, s: Settings, on_tokens) -> dict:
    """Infer one part and write it whole; its line for metrics.jsonl."""
    begin = time.time()
    is_first = path.stem == "000000"
    limits = Limits(s.before, s.max_new, engine.config.seq_len)
    proposal = PRIOR if s.proposal == "prior" else POSTERIOR
    how = proposal, s.select, s.min_gain, s.gain_by, s.seed
    e_step, picked = EStep(limits, s.samples, s.context, *how), {}
    got = infer(engine, corpus, numbers, e_step, picked, on_tokens)

    checked = np.flatnonzero(hash_uniform(CHECK, s.seed, numbers) < 0.01)
    if is_first and not len(checked):
        checked = np.array([0])
    some = got.take(checked)
    worst = check(engine.model, corpus, numbers[checked], some, e_step, picked)
    refuse_errors(worst, engine.config.dtype)

    nothing = np.zeros(0, dtype=np.int64)
    chosen = map(got.chosen, range(len(numbers)))
    spans = [nothing if thought is None else thought for thought in chosen]
    weights, sizes = normalise(got.log_w), ess(got.log_w)
    arrays = {name: getattr(got, name) for name in OF_SAMPLES + OF_CHUNKS}
    arrays |= {
        "numbers": numbers,
        "ids": np.concatenate([nothing, *spans]),
        "sizes": np.array([len(span) for span in spans]),
        "check": worst[None],
        "n_checked": np.array([len(checked)]),
    }
    arrays |= for_people(engine.model, corpus, numbers, got, weights, sizes, is_first)
    with replacing(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, **arrays)
    return {
        "part": path.stem,
        "begin": begin,
        "end": time.time(),
        "tokens": int(got.length.sum()),
        "ess": float(sizes.mean()),
        "cut_off": float((~got.finished).mean()),
    }


def join(paths: list[Path], corpus: Corpus, s: Settings, counts: dict) -> None:
    """Make the thoughts folder of all parts.

    UserError unless each chunk that was to be inferred is there once.
    """
    work = paths[0].parent
    arrays = read_parts(paths)
    numbers = arrays["numbers"]
    n = len(np.unique(numbers))
    if not n == len(numbers) == counts["n_inferred"]:
        reason = "its parts do not cover the corpus once; remove it and run again"
        raise UserError(f"{work}: {reason}")
    spans = [()] * corpus.n_chunks
    ends = np.cumsum(arrays["sizes"])
    for i, span in zip(numbers, np.split(arrays["ids"], ends[:-1])):
        spans[i] = span
    samples = {}
    for name in OF_SAMPLES + OF_CHUNKS:
        shape = corpus.n_chunks, *arrays[name].shape[1:]
        samples[name] = np.full(shape, BLANK.get(name, np.nan))
        samples[name][numbers] = arrays[name]

    settings = "model samples max_new seed proposal min_gain gain_by context before"
    how = {name: getattr(s, name) for name in settings.split()}
    how |= {"temperature": 1.0, "selection": s.select}
    how["weights"] = fingerprint(s.model)
    n_bytes = sum(len(corpus.raw(i)) for i in numbers)
    found = figures(SimpleNamespace(**arrays), n_bytes)
    worst = arrays["check"].max(axis=0).ravel().tolist()
    checked = {"chunks": int(arrays["n_checked"].sum())}
    checked |= zip(("log_q", "log_p", "log_q_sum", "log_p_sum"), worst)
    meta = how | counts | found | {"checked": checked}

    write_json(work / "timing.json", timing(work))
    write_for_people(work, arrays)
    names = "settings.json timing.json metrics.jsonl examples.txt shown.npz".split()
    files = [work / name for name in names if (work / name).exists()]
    write_thoughts(s.out_dir, corpus, spans, meta, samples, files)


def figures(got, n_bytes: int) -> dict:
    """What the samples of all inferred chunks tell, for meta.json, in nats.

    got: the arrays of OF_SAMPLES and OF_CHUNKS. None: the mean of nothing.
    """
    w = normalise(got.log_w)
    n_ended = got.finished.sum(axis=1)
    uniform = got.finished / np.maximum(n_ended, 1)[:, None]
    differ = np.abs(w - uniform).sum(axis=1) / 2
    gain = got.log_x - got.log_none[:, None]
    picked = got.pick >= 0
    # Thoughts of 1 token, of 2 to 3, of 4 to 7 ...
    counts = np.bincount(np.frexp(got.length)[1].ravel())[1:]
    lengths = {f"{2**b}-{2 ** (b + 1) - 1}": int(n) for b, n in enumerate(counts)}

    def mean(x):
        return float(x.mean()) if x.size else None

    found = {
        "cut_off": int((~got.finished).sum()),
        "cut_off_share": mean(~got.finished),
        "all_cut_off": int((n_ended == 0).sum()),
        "empty_picks": int((got.length[picked, got.pick[picked]] == 1).sum()),
        "no_gain": int((~picked & (n_ended > 0)).sum()),  # dropped by --min_gain
        "sampled_tokens": int(got.length.sum()),
        "computed_tokens": int(got.computed.sum()),
        "lengths": lengths,
        "ess": mean(ess(got.log_w)),
        # 0: one thought has all the weight; log K: all weigh the same
        "weight_entropy": mean(-(w * np.log(np.maximum(w, 1e-300))).sum(axis=1)),
        # share of the picks that would be others, were they drawn uniformly
        "pick_not_uniform": mean(differ[n_ended > 0]),
        "gain": mean(gain[got.finished]),
        "gain_picked": mean(gain[picked, got.pick[picked]]),
    }
    return found | nll(got, "", n_bytes) | nll(got, "_chunk", len(w))


def nll(got, unit: str, n: int) -> dict:
    """-bound() for some k, -thoughtless() and -log_alone: sums over chunks / n.

    Whatever is cut off, all chunks count. n: bytes or chunks.
    """

    def total(log_p):
        return float(-log_p.sum() / max(n, 1))

    K = got.log_w.shape[1]
    ks = sorted({K} | {2**b for b in range(K.bit_length())})
    return {
        f"nll_bound{unit}": {str(k): total(bound(got, k)) for k in ks},
        f"nll_thoughtless{unit}": total(thoughtless(got)),
        f"nll_alone{unit}": total(got.log_alone),
    }


# -------------------- main


def survey(corpus: Corpus, chosen: np.ndarray, limits: Limits) -> tuple[dict, int]:
    """How many chunks are inferred, and how many not, for meta.json.

    And the tokens of the longest prompt, if its context is plain text.
    """
    sizes = np.diff(corpus.chunks)
    n_short, longest = 0, 0
    for i in chosen:
        context = context_of(corpus, i, limits)
        n_short += len(context) < len(corpus.before(i, limits.before))
        longest = max(longest, AROUND + int(sizes[[*context, i]].sum()))
    too_long = ~fits(corpus, limits.max_new, limits.seq_len) & (sizes > 0)
    counts = {
        "n_inferred": len(chosen),
        "n_questions": int(corpus.questions.sum()),
        "n_empty": int((sizes == 0).sum()),
        "n_too_long": int((~corpus.questions & too_long).sum()),
        "n_short_context": n_short,
    }
    return counts, longest


FREE = ("device", "workers", "show")  # may differ between runs that fill one folder


def main(s: Settings) -> None:
    s = replace(s, min_gain=max(s.min_gain, LEAST))
    device = worker_device(s.device)
    on_cpu = device == "cpu"
    dtype = s.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    warn_of_slow_bfloat16(device, dtype)
    model, tok = load_model(s.model, device, dtype)
    corpus = open_corpus(s.corpus, tok)
    if Path(s.out_dir).exists():
        claim(s.out_dir, s, FREE)
        print(f"{s.out_dir}: complete")
        return show(s.out_dir, s.show)
    limits = Limits(s.before, s.max_new, model.config.seq_len)
    chosen = np.flatnonzero(can_think(corpus, s.max_new, limits.seq_len))
    counts, longest = survey(corpus, chosen, limits)
    if not len(chosen):
        raise UserError(f"{s.corpus}: no chunk to infer thoughts for: {counts}")
    if s.context == "thoughts":
        thoughts = s.before * (s.max_new + MARKERS)
        longest = min(longest + thoughts, limits.seq_len - s.max_new)
    small = sum(p.numel() for p in model.parameters()) < 20e6
    part_size = s.part_size or (20000 if not on_cpu else 500 if small else 100)
    parts = split_parts(corpus, chosen, part_size)
    work = Work(Path(s.out_dir), parts)
    engine = Engine(model, s.rows)
    threads, n_workers = torch.get_num_threads(), 1
    if on_cpu:
        n_workers = min(s.workers or (threads if small else 1), len(parts))

    def make_plan() -> dict:
        """One plan for all workers: shapes decide the last bits of every sum."""
        size = max(map(len, parts))
        slots, lanes, n_bytes, free = engine.plan(s.samples, longest, s.max_new, size, n_workers)
        print(
            f"plan: {slots * lanes} thoughts side by side, prompts of up to "
            f"{longest} tokens: {n_bytes / 1e9:.2f} GB a worker beside the weights, "
            f"{free / 1e9:.1f} GB free"
        )
        return {"rows": slots * lanes, "threads": max(1, threads // n_workers)}

    plan = agree(work, s, FREE, make_plan)
    if plan is None:  # another worker has just joined the parts
        return show(s.out_dir, s.show)
    said = ", ".join(f"{name[2:]} {n}" for name, n in counts.items())  # no "n_"
    print("chunks: " + said.replace("_", " "), flush=True)
    engine.n_rows = plan["rows"]
    if on_cpu:
        torch.set_num_threads(plan["threads"])

    def make_part(path, numbers, on_tokens):
        return run_part(path, numbers, engine, corpus, s, on_tokens)

    with helpers("infer_thoughts.py", s, n_workers - 1, plan["threads"]):
        finish(work, make_part, lambda paths: join(paths, corpus, s, counts))
    print(report(read_json(Path(s.out_dir) / "meta.json")))
    show(s.out_dir, s.show)


if __name__ == "__main__":
    run(main, Settings)
