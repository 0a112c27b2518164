"""Infer the latent thoughts of a corpus (the E-step): sample K thoughts a chunk, weigh them, pick one.

For a chunk x with the chunks c before it, and a model that was trained on thoughts (train.py):

    sample   z_1 .. z_K  from  q(z | c, x),  at temperature 1 over the full vocabulary
    weigh    log_w_k  =  log p(z_k, x | c)  -  log q(z_k | c, x)
    pick     one z_k with probability  w_k / sum w

    q:  BOS c c c  SOL EOL  x x x x  SOL POS  z z z EOL            both score z and the EOL that ends it;
                                             [- log_q -]           p scores x, too. Markers are given.
    p:  BOS c c c  SOL PRI  z z z EOL  x x x x
                           [------ log_p -----]

(1/K) sum_k w_k is an unbiased estimate of p(x | c). So its log is a lower bound of log p(x | c) in expectation: the ELBO at
K = 1, and tighter with every K (IWAE, Burda et al. 2016). The pick tends to the exact posterior p(z | c, x) as K grows. A thought
that was cut off at --max_new has no EOL, thus weight 0; a chunk with all K cut off gets no thought. Both are counted.

    python infer_thoughts.py --model=out/M0 --corpus=out/digits/raw --out_dir=out/E1 --samples=4 --show=3

Writes a thoughts folder (data/corpus.py). Work is done in parts, each written once; the same command goes on where it was
cut off. Random numbers are keyed by (seed, chunk, sample, position), so a thought does not depend on what was sampled beside it.
"""

import shutil
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.cli import Progress, UserError, claim, opt, replacing, run, write_json
from data.corpus import DRAW, PICK, POSTERIOR, PRIOR, RAW, Corpus, hash_uniform, layout, open_corpus, write_thoughts
from data.stream import pad
from data.tokenizer import Tokenizer
from train import Config, Llama, load_model, pick_device


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt(help="corpus folder")
    model: str = opt(help="model folder, trained with thoughts")
    out_dir: str = opt(help="thoughts folder to write")
    samples: int = opt(4, "thoughts sampled a chunk (K)", low=1)
    max_new: int = opt(128, "longest thought in tokens, its EOL included", low=1)
    context: int = opt(3, "chunks before the chunk that are given, without their thoughts", low=0)
    part_size: int = opt(1000, "chunks a part: what a kill can cost", low=1)
    rows: int = opt(512, "thoughts sampled side by side", low=1)
    show: int = opt(0, "print this many chunks with all their thoughts", low=0)
    seed: int = opt(0, "sampling noise and picks")
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")


# ------------------------------------------------------------------------------------------------- sampler


class Cache:
    """Preallocated keys and values of all layers. A prompt's lie in a slot, once, and every row forked from it reads them there;
    what a row has sampled itself lies in the row.

        slots  [n_slots, n_kv_head, prompt_len, head_dim]      rows  [n_rows, n_kv_head, max_new, head_dim]
    """

    def __init__(self, c: Config, n_slots: int, prompt_len: int, n_rows: int, max_new: int, device):
        def empty(n, length):
            return [torch.zeros(n, c.n_kv_head, length, c.head_dim, device=device) for _ in range(c.n_layer)]

        self.slot_k, self.slot_v = empty(n_slots, prompt_len), empty(n_slots, prompt_len)
        self.row_k, self.row_v = empty(n_rows, max_new), empty(n_rows, max_new)

    def prefill(self, slots: torch.Tensor):
        """attend() for a batch of prompts, padded on the right: causal attention that fills the slots."""

        def attend(layer, q, k, v):
            T = k.shape[2]
            self.slot_k[layer][slots, :, :T], self.slot_v[layer][slots, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

        return attend

    def decode(self, slot, column, age, prompt_lengths):
        """attend() for one new token in each row. slot, age [n]: the row's prompt, and how many tokens it holds already;
        column [n]: its place among the rows of its prompt. prompt_lengths [n_slots].

        Queries of the rows of a prompt are laid side by side, [n_slots, width], so that its keys are read once for all.
        """
        P, S = int(prompt_lengths[slot].max()), int(age.max()) + 1
        n_slots, width, n = len(prompt_lengths), int(column.max()) + 1, len(slot)
        every = torch.arange(n, device=slot.device)
        seen = torch.cat((
            torch.arange(P, device=slot.device) < prompt_lengths[slot, None],
            torch.arange(S, device=slot.device) <= age[:, None],
        ), dim=1)  # fmt: skip
        mask = torch.where(seen, 0.0, -torch.inf)[:, None, None]  # [n, 1, 1, P + S]

        def attend(layer, q, k, v):
            n_kv, hd = k.shape[1], k.shape[3]
            group = q.shape[1] // n_kv  # query heads that share a key head
            self.row_k[layer][every, :, age], self.row_v[layer][every, :, age] = k[:, :, 0], v[:, :, 0]
            q = q.reshape(n, n_kv, group, hd) * hd**-0.5
            grid = q.new_zeros(n_slots, width, n_kv, group, hd)
            grid[slot, column] = q
            grid = grid.transpose(1, 2).reshape(n_slots, n_kv, width * group, hd)
            on_prompt = grid @ self.slot_k[layer][:, :, :P].mT  # [n_slots, n_kv, width * group, P]
            on_prompt = on_prompt.view(n_slots, n_kv, width, group, P)[slot, :, column]  # [n, n_kv, group, P]
            on_own = q @ self.row_k[layer][:n, :, :S].mT  # [n, n_kv, group, S]
            weight = torch.softmax(torch.cat((on_prompt, on_own), dim=-1) + mask, dim=-1)
            grid = weight.new_zeros(n_slots, width, n_kv, group, P)
            grid[slot, column] = weight[..., :P]
            grid = grid.transpose(1, 2).reshape(n_slots, n_kv, width * group, P)
            from_prompt = (grid @ self.slot_v[layer][:, :, :P]).view(n_slots, n_kv, width, group, hd)[slot, :, column]
            y = from_prompt + weight[..., P:] @ self.row_v[layer][:n, :, :S]  # [n, n_kv, group, hd]
            return y.reshape(n, n_kv * group, 1, hd)

        return attend

    def keep(self, rows: torch.Tensor) -> None:
        """Move the rows that still live to the front."""
        for cache in (self.row_k, self.row_v):
            for layer in cache:
                layer[: len(rows)] = layer[rows]


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """For each entry, how many earlier entries are equal to it: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order, rank = np.argsort(group, kind="stable"), np.empty_like(group)
    ordered = group[order]
    rank[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return rank


def draw(logits: torch.Tensor, uniform: np.ndarray, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of fp32 logits [n, n_vocab] by inverting the cumulated probabilities at uniform [n] in [0, 1).

    (tokens [n], their log-probabilities [n]). greedy: the likeliest token instead.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    if greedy:
        tokens = log_p.argmax(dim=-1)
    else:
        cumulated = log_p.double().exp().cumsum(dim=-1)
        point = torch.from_numpy(uniform).to(logits.device) * cumulated[:, -1]  # rounding: the sum is not quite 1
        tokens = torch.searchsorted(cumulated, point[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return tokens, log_p.gather(1, tokens[:, None])[:, 0]


@torch.inference_mode()
def generate(model: Llama, prompts, keys, samples: int, max_new: int, stop: set[int], seed: int, *,
             purpose: int = DRAW, greedy: bool = False, n_rows: int = 512, on_tokens=None) -> list[list[tuple]]:  # fmt: skip
    """Continue each prompt `samples` times until a token of `stop` or `max_new` tokens.

    prompts: lists of ids; keys: an integer each, which seeds its noise. Returns for each prompt its samples
    (ids with the stop token if there is one, finished, sum of the ids' log-probabilities).

    Continuous batching: a prompt is computed once and forked into rows; a row that finishes is given the next sample at
    once; when none is left, the finished rows are dropped, so that no step computes on dead rows. on_tokens(n) is told of
    every n sampled tokens.
    """
    device = model.embed_tokens.weight.device
    results = [[None] * samples for _ in prompts]
    todo = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))  # longest first, for little padding
    n_rows = min(n_rows, samples * len(prompts))
    prefill_batch = max(1, n_rows // samples // 4)
    n_slots = -(-n_rows // samples) + 2 * prefill_batch
    cache = Cache(model.config, n_slots, max(map(len, prompts), default=0), n_rows, max_new, device)
    first_logits = torch.zeros(n_slots, model.config.n_vocab, device=device)
    prompt_lengths = torch.zeros(n_slots, dtype=torch.long, device=device)
    free, unfinished = list(range(n_slots)), [0] * n_slots
    ready = deque()  # (prompt, sample, slot) that wait for a row
    # The state of each row. A row with prompt -1 is empty.
    prompt, sample, slot, age, last = np.full(n_rows, -1), *np.zeros((4, n_rows), dtype=np.int64)
    log_q, ids = np.zeros(n_rows), np.zeros((n_rows, max_new), dtype=np.int64)
    keys = np.asarray(keys)

    def prefill() -> None:
        batch = [todo.popleft() for _ in range(min(len(todo), len(free), prefill_batch))]
        slots = [free.pop() for _ in batch]
        inputs, _ = pad([np.append(prompts[i], 0) for i in batch], device)
        where = torch.tensor(slots, device=device)
        lengths = torch.tensor([len(prompts[i]) for i in batch], device=device)
        hidden = model(inputs, attend=cache.prefill(where))
        prompt_lengths[where] = lengths
        first_logits[where] = model.logits(hidden[torch.arange(len(batch), device=device), lengths - 1])
        for i, k in zip(batch, slots):
            unfinished[k] = samples
            ready.extend((i, j, k) for j in range(samples))

    def refill() -> np.ndarray:
        """Give empty rows the next samples; the rows that got one."""
        rows = np.flatnonzero(prompt < 0)
        while len(ready) < len(rows) and todo and free:
            prefill()
        rows = rows[: len(ready)]
        for row in rows:
            prompt[row], sample[row], slot[row] = ready.popleft()
            age[row], log_q[row] = 0, 0.0
        return rows

    def take(rows: np.ndarray, logits: torch.Tensor) -> None:
        """Draw a token for each row from its logits; hand out the samples that end with it."""
        uniform = hash_uniform(purpose, seed, keys[prompt[rows]], sample[rows], age[rows])
        tokens, log_p = draw(logits, uniform, greedy)
        last[rows] = tokens = tokens.cpu().numpy()
        ids[rows, age[rows]] = tokens
        log_q[rows] += log_p.double().cpu().numpy()
        age[rows] += 1
        stopped = np.isin(tokens, stop_ids)
        for row, finished in zip(rows[stopped | (age[rows] == max_new)], stopped[stopped | (age[rows] == max_new)]):
            results[prompt[row]][sample[row]] = (ids[row, : age[row]].copy(), bool(finished), float(log_q[row]))
            unfinished[slot[row]] -= 1
            if not unfinished[slot[row]]:
                free.append(slot[row])
            prompt[row] = -1
        if on_tokens:
            on_tokens(len(rows))

    stop_ids = np.array(sorted(stop))
    while True:
        while len(rows := refill()):
            take(rows, first_logits[slot[rows]])
        live = np.flatnonzero(prompt >= 0)
        if not len(live):
            return results
        if len(live) < len(prompt):  # nothing waits any more: drop the empty rows
            cache.keep(torch.from_numpy(live).to(device))
            prompt, sample, slot, age, last, log_q, ids = (a[live] for a in (prompt, sample, slot, age, last, log_q, ids))
        slots, columns, ages, inputs = (torch.from_numpy(a).to(device) for a in (slot, rank_in_group(slot), age - 1, last))
        attend = cache.decode(slots, columns, ages, prompt_lengths)
        hidden = model(inputs[:, None], (prompt_lengths[slots] + ages)[:, None], attend)
        take(np.arange(len(prompt)), model.logits(hidden[:, 0]))


# ----------------------------------------------------------------------------------- scoring and weighing


@torch.inference_mode()
def log_prob(model: Llama, prefixes, tails, batch_tokens: int = 8192) -> list[np.ndarray]:
    """Teacher-forced: for each prefix (ids) and each of its tails (ids), the sum of log p(token | all before it) over the tail.

    The one scoring function: log_q and log_p of thoughts, and the NLL of text. fp32 log-softmax over the whole vocabulary, float64
    sums. A prefix is computed once for all its tails, which read its keys and values. Returns an array for each prefix; an empty tail scores 0.
    """
    device, totals = model.embed_tokens.weight.device, [np.zeros(len(group)) for group in tails]
    todo = deque(sorted((i for i in range(len(prefixes)) if any(map(len, tails[i]))), key=lambda i: -len(prefixes[i]) - max(map(len, tails[i]))))
    while todo:
        K, first = len(tails[todo[0]]), todo[0]
        cost = len(prefixes[first]) + K * max(map(len, tails[first]))
        batch = [todo.popleft()]
        while todo and len(batch) * cost < batch_tokens and len(tails[todo[0]]) == K:
            batch.append(todo.popleft())
        head, _ = pad([np.append(prefixes[i], 0) for i in batch], device)  # [G, P]
        lengths = torch.tensor([len(prefixes[i]) for i in batch], device=device)
        _, tail = pad([np.append(0, z) for i in batch for z in tails[i]], device)  # [G * K, S], -1 where there is nothing
        keys = {}
        hidden = model(head, attend=remember(keys))
        hidden = hidden[torch.arange(len(batch), device=device), lengths - 1].repeat_interleave(K, 0)[:, None]  # predicts the tail's first token
        if tail.shape[1] > 1:
            positions = lengths.repeat_interleave(K)[:, None] + torch.arange(tail.shape[1] - 1, device=device)
            rest = model(tail[:, :-1].clamp(min=0), positions, after_prefix(keys, lengths, K))
            hidden = torch.cat((hidden, rest), dim=1)  # [G * K, S, n_embd]
        real = tail >= 0
        log_p = -F.cross_entropy(model.logits(hidden[real]), tail[real], reduction="none").double().cpu().numpy()
        sums = np.bincount(real.nonzero()[:, 0].cpu().numpy(), log_p, minlength=len(tail)).reshape(-1, K)
        for i, values in zip(batch, sums):
            totals[i] = values
    return totals


def remember(keys: dict):
    """attend(): causal attention that keeps keys and values, {layer: (k, v)}."""

    def attend(layer, q, k, v):
        keys[layer] = k, v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def after_prefix(keys: dict, lengths: torch.Tensor, K: int):
    """attend() for K tails behind each of G prefixes: tokens see their prefix (lengths [G], padded to P) and their own tail up to themselves."""
    G, P = len(lengths), keys[0][0].shape[2]
    hidden = torch.arange(P, device=lengths.device) >= lengths[:, None]
    prefix_mask = torch.zeros_like(hidden, dtype=torch.float).masked_fill(hidden, -torch.inf)[:, None, None]  # [G, 1, 1, P]

    def attend(layer, q, k, v):
        (pk, pv), n_kv, T, hd = keys[layer], k.shape[1], q.shape[2], q.shape[3]  # pk, pv: [G, n_kv, P, hd]
        group = q.shape[1] // n_kv  # query heads that share a key head

        def by_prefix(x):  # [G * K, n_kv, group * T, d] -> [G, n_kv, K * group * T, d]
            return x.view(G, K, n_kv, group * T, -1).transpose(1, 2).reshape(G, n_kv, K * group * T, -1)

        def by_tail(x):  # and back
            return x.view(G, n_kv, K, group * T, -1).transpose(1, 2).reshape(G * K, n_kv, group * T, -1)

        q = (q * hd**-0.5).reshape(G * K, n_kv, group * T, hd)
        on_prefix = by_tail(by_prefix(q) @ pk.mT + prefix_mask)  # [G * K, n_kv, group * T, P]
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1).repeat(group, 1)  # [group * T, T]
        on_own = (q @ k.mT).masked_fill(later, -torch.inf)  # [G * K, n_kv, group * T, T]
        weight = torch.softmax(torch.cat((on_prefix, on_own), dim=-1), dim=-1)
        y = by_tail(by_prefix(weight[..., :P]) @ pv) + weight[..., P:] @ v
        return y.reshape(G * K, n_kv * group, T, hd)

    return attend


@dataclass
class Samples:
    """K thoughts for each of n chunks. All arrays [n, K]; log_w is -inf where a thought was cut off."""

    thoughts: list[list[np.ndarray]]  # without EOL
    log_q: np.ndarray
    log_p: np.ndarray
    log_w: np.ndarray
    length: np.ndarray  # sampled tokens, with EOL
    finished: np.ndarray


def context_of(corpus: Corpus, i: int, s) -> list[int]:
    """The chunks given before chunk i: up to s.context, fewer if the sequence would exceed s.seq_len with s.max_new new tokens."""
    before = list(corpus.before(i, s.context))
    room = s.seq_len - s.max_new - 6 - (corpus.chunks[i + 1] - corpus.chunks[i])  # 6: BOS, five markers
    while before and corpus.chunks[i] - corpus.chunks[before[0]] > room:
        before.pop(0)
    return before


def write_chunk(tok: Tokenizer, corpus: Corpus, i: int, context: list[int], thought, form: int):
    """(ids, part) of chunk i in a form, behind its context as plain text."""
    chunks = [corpus.chunk(j) for j in (*context, i)]
    ids, parts = layout(tok, chunks, [None] * len(context) + [thought], [RAW] * len(context) + [form], end=False)
    return ids, parts[-1] if parts else None


@dataclass(frozen=True)
class Limits:
    """What bounds a prompt: see context_of."""

    context: int
    max_new: int
    seq_len: int


def infer(model: Llama, tok: Tokenizer, corpus: Corpus, numbers, samples: int, limits: Limits, seed: int, *,
          purpose: int = DRAW, n_rows: int = 512, on_tokens=None) -> Samples:  # fmt: skip
    """Sample and weigh `samples` thoughts for each chunk in `numbers`."""
    contexts = [context_of(corpus, i, limits) for i in numbers]
    prompts = [write_chunk(tok, corpus, i, c, None, POSTERIOR)[0] for i, c in zip(numbers, contexts)]
    drawn = generate(model, prompts, numbers, samples, limits.max_new, {tok.eol}, seed, purpose=purpose, n_rows=n_rows, on_tokens=on_tokens)
    finished = np.array([[f for _, f, _ in row] for row in drawn], dtype=bool).reshape(len(numbers), samples)
    length = np.array([[len(ids) for ids, _, _ in row] for row in drawn]).reshape(finished.shape)
    thoughts = [[ids[:-1] if done else ids for ids, done, _ in row] for row in drawn]
    scores = []
    for form in (POSTERIOR, PRIOR):
        prefixes, tails = [], []
        for i, c, row, done in zip(numbers, contexts, thoughts, finished):
            prefixes.append(write_chunk(tok, corpus, i, c, None, form)[0])
            written = [write_chunk(tok, corpus, i, c, z, form) if ok else ((), None) for z, ok in zip(row, done)]
            # q scores the thought; p scores the thought and then the chunk
            tails.append([ids[len(prefixes[-1]) : part.thought[1] if form == POSTERIOR else part.chunk[1]] if part else () for ids, part in written])
        scores.append(np.array(log_prob(model, prefixes, tails)).reshape(finished.shape))
    log_q, log_p = (np.where(finished, score, -np.inf) for score in scores)
    log_w = np.where(finished, scores[1] - scores[0], -np.inf)
    return Samples(thoughts, log_q, log_p, log_w, length, finished)


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


def ess(log_w: np.ndarray) -> np.ndarray:
    """Effective sample size (sum w)^2 / sum w^2 of each row of log_w [n, K]: 1 .. K, or 0 where all weigh nothing."""
    w = normalise(log_w)
    return w.sum(axis=1) ** 2 / np.maximum((w**2).sum(axis=1), 1e-300)


def bound(log_w: np.ndarray, k: int) -> np.ndarray:
    """IWAE-k estimates of log p(x | c) from log_w [n, K], K >= k: the mean over disjoint groups of k samples, [n].

    k = 1 is the ELBO. A group whose samples were all cut off has log 0; it is left out, and the log of the share of groups that
    remain is added: by Jensen's inequality that is a lower bound again. -inf where no group remains.
    """
    groups = log_w[:, : log_w.shape[1] // k * k].reshape(len(log_w), -1, k)
    log_mean = np.logaddexp.reduce(groups, axis=2) - np.log(k)  # [n, n_groups]
    alive = np.isfinite(log_mean)
    n = alive.sum(axis=1)
    total = np.where(alive, log_mean, 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        return np.where(n > 0, total / np.maximum(n, 1) + np.log(n / alive.shape[1]), -np.inf)


# ---------------------------------------------------------------------------------------------------- work


def run_part(path: Path, numbers: np.ndarray, model, tok, corpus: Corpus, s: Settings, on_tokens) -> None:
    """Infer one part and write it whole: every sampled thought, its numbers, and the pick."""
    limits = Limits(s.context, s.max_new, model.config.seq_len)
    got = infer(model, tok, corpus, numbers, s.samples, limits, s.seed, n_rows=s.rows, on_tokens=on_tokens)
    picks = pick(got.log_w, hash_uniform(PICK, s.seed, numbers))
    flat = [z for row in got.thoughts for z in row]
    arrays = dict(numbers=numbers, log_q=got.log_q, log_p=got.log_p, log_w=got.log_w, length=got.length, finished=got.finished)
    with replacing(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, pick=picks, ids=np.concatenate([*flat, []]).astype(np.int64), sizes=np.array([len(z) for z in flat]), **arrays)


def load_part(path: Path) -> tuple[dict, list[list[np.ndarray]]]:
    """A part's arrays, and its thoughts [n][K]."""
    with np.load(path, allow_pickle=False) as f:
        part = dict(f)
    flat = np.split(part.pop("ids"), np.cumsum(part.pop("sizes"))[:-1])
    K = part["log_w"].shape[1]
    return part, [flat[n : n + K] for n in range(0, len(flat), K)]


def merge(paths: list[Path], corpus: Corpus, tok: Tokenizer, s: Settings, counts: dict) -> dict:
    """Join the parts into the thoughts folder, with the settings and timing that lie beside them; its meta.json."""
    K, n = s.samples, corpus.n_chunks
    samples = {k: np.full((n, K), np.nan) for k in ("log_q", "log_p", "log_w")}
    samples |= {"length": np.zeros((n, K), np.int64), "finished": np.zeros((n, K), bool), "pick": np.full(n, -1)}
    spans, done = [()] * n, np.zeros(n, dtype=np.int64)
    for path in paths:
        part, thoughts = load_part(path)
        numbers = part.pop("numbers")
        done[numbers] += 1
        for key, values in part.items():
            samples[key][numbers] = values
        for i, picked, row in zip(numbers, part["pick"], thoughts):
            spans[i] = row[picked] if picked >= 0 else ()
    if done.max(initial=0) > 1 or done.sum() != counts["n_inferred"]:
        raise UserError(f"{paths[0].parent}: its parts do not cover the corpus once; remove it and run again")
    log_w, finished = samples["log_w"][done > 0], samples["finished"][done > 0]
    n_bytes = sum(tok.n_bytes(corpus.chunk(i)) for i in np.flatnonzero(done))
    bounds = {k: bound(log_w, k) for k in sorted({1, K})}
    counts |= {
        "cut_off": int((~finished).sum()),
        "all_cut_off": int((~finished.any(axis=1)).sum()),
        "empty_picks": int(sum(len(spans[i]) == 0 for i in np.flatnonzero(done & (samples["pick"] >= 0)))),
        "sampled_tokens": int(samples["length"].sum()),
    }
    figures = {
        "ess": float(ess(log_w).mean()),
        "cut_off_share": float((~finished).mean()),
        # nats a byte of the chunks that were inferred, over those with a finite bound (all_cut_off counts the others)
        "nll_bound": {k: float(-v[np.isfinite(v)].sum() / max(n_bytes, 1)) for k, v in bounds.items()},
    }
    meta = {"model": str(s.model), "samples": K, "temperature": 1.0, "seed": s.seed, "selection": "resample"} | counts | figures
    write_thoughts(s.out_dir, corpus, spans, meta, samples, [paths[0].with_name(name) for name in ("settings.json", "timing.json")])
    return meta


def show(path: Path, corpus: Corpus, tok: Tokenizer, n: int) -> None:
    """Print the first n chunks of a part with their thoughts, weights and pick."""
    part, thoughts = load_part(path)
    for row, i in enumerate(part["numbers"][:n]):
        before = "".join(tok.decode(corpus.chunk(j)) for j in corpus.before(i, 1))
        print(f"\nchunk {i} | before: {before!r} | text: {tok.decode(corpus.chunk(i))!r} | ess {ess(part['log_w'][row : row + 1])[0]:.2f}")
        for k, w in enumerate(normalise(part["log_w"][row : row + 1])[0]):
            mark = "->" if k == part["pick"][row] else "  "
            numbers = " ".join(f"{name} {part[name][row, k]:8.3f}" for name in ("log_q", "log_p", "log_w"))
            print(f"  {mark} {numbers} weight {w:.3f} | {tok.decode(thoughts[row][k])!r}" + ("" if part["finished"][row, k] else " (cut off)"))
    print()


def main(s: Settings) -> None:
    device = pick_device(s.device)
    model, tok = load_model(s.model, device)
    corpus = open_corpus(s.corpus, tok)
    if Path(s.out_dir).exists():
        claim(s.out_dir, s)
        print(f"{s.out_dir}: complete")
        return
    work = claim(s.out_dir + ".parts", s)
    sizes = np.diff(corpus.chunks)
    fits = sizes + 6 + s.max_new <= model.config.seq_len
    chosen = np.flatnonzero(~corpus.questions & (sizes > 0) & fits)
    counts = {
        "n_inferred": len(chosen),
        "n_questions": int(corpus.questions.sum()),
        "n_empty": int((sizes == 0).sum()),
        "n_too_long": int((~corpus.questions & ~fits).sum()),
        "n_short_context": sum(len(context_of(corpus, i, Limits(s.context, s.max_new, model.config.seq_len))) < len(corpus.before(i, s.context)) for i in chosen),
    }  # fmt: skip
    if not len(chosen):
        raise UserError(f"{s.corpus}: no chunk to infer thoughts for: {counts}")
    parts = [(work / f"{n:06d}.npz", chosen[i : i + s.part_size]) for n, i in enumerate(range(0, len(chosen), s.part_size))]
    missing = [part for part in parts if not part[0].exists()]
    finished = len(chosen) - sum(len(numbers) for _, numbers in missing)
    progress, begin, tokens = Progress("infer", len(chosen), "chunks", done=finished), time.time(), 0
    for path, numbers in missing:

        def on_tokens(n):
            nonlocal tokens
            tokens += n
            progress.update(min(finished, len(chosen) - 1), sampled=f"{tokens / (time.time() - begin):,.0f} tok/s")

        run_part(path, numbers, model, tok, corpus, s, on_tokens)
        finished += len(numbers)
    progress.update(finished, sampled=f"{tokens / (time.time() - begin):,.0f} tok/s")
    if s.show:
        show(parts[0][0], corpus, tok, s.show)
    seconds = time.time() - begin
    write_json(work / "timing.json", {"seconds": seconds, "tokens_per_s": tokens / seconds})
    meta = merge([path for path, _ in parts], corpus, tok, s, counts)
    shutil.rmtree(work)
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in meta.items() if k not in ("model", "nll_bound", "selection")))
    print("bound, nats a byte of these chunks: " + ", ".join(f"K={k} {v:.4f}" for k, v in meta["nll_bound"].items()))


if __name__ == "__main__":
    run(main, Settings)
