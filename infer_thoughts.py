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

Writes a thoughts folder (data/corpus.py), and in it samples.npz (for each sample log_q, log_p, log_w, log p(x | c, z) and length;
for each chunk its scores without a thought), meta.json (ESS, entropy of the weights, gains, what was dropped, lengths, bounds) and
examples.txt (50 chunks with all their thoughts). log_q is added up while sampling, from fp32 logits; on a random 1% of the chunks
log_q and log_p are compared with a teacher-forced function of eight lines, and the run stops where they differ (SUM_TOLERANCE).

Work is done in parts, each written once, by any number of these commands at the same time, on any machines that share --out_dir; one
that is killed costs the part it was at, and the last to finish joins the parts.

What is random is keyed by (seed, chunk, sample, position), so a sample depends on nothing that is computed beside it: not on batch, order,
number of workers, restarts. That is exact up to arithmetic: products of other shapes round their last bits differently, which can tip
a sample whose random number falls within 1e-6 of a border. The same parts on one kind of machine give the same bytes.
"""

import contextlib
import hashlib
import heapq
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from data.cli import Progress, UserError, append_jsonl, claim, hold, opt, read_json, replacing, run, write_json
from data.corpus import (
    CHECK,
    CONTEXT_FORM,
    DRAW,
    PICK,
    POSTERIOR,
    PRIOR,
    RAW,
    Corpus,
    hash_state,
    hash_uniform,
    layout,
    open_corpus,
    write_thoughts,
)  # fmt: skip
from data.tokenizer import Tokenizer
from train import Llama, load_model, pick_device, rope_table


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


# ------------------------------------------------------------------------------------------------- engine

# What is known of each cell: its newest token, how many it has sampled, the state of its noise, and whether (and how) it has ended.
LAST, AGE, NOISE, DONE = range(4)
ENDED, CUT_OFF = 1, 2


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """logits [n, n_vocab] with -inf for all but the likeliest tokens whose probabilities add up to top_p, or just beyond (Holtzman et al. 2020)."""
    V, total = logits.shape[1], torch.logsumexp(logits, dim=-1, keepdim=True)
    k = V if logits.is_cuda else min(V, 64)  # few tokens nearly always do; a GPU's captured step cannot look whether they did
    while True:
        values = logits.topk(k, dim=-1).values  # [n, k], falling
        mass = (values - total).exp().cumsum(dim=-1)
        if k == V or bool((mass[:, -1] >= top_p).all()):
            break
        k = min(V, 8 * k)
    kept = (mass < top_p).sum(dim=-1, keepdim=True).clamp(max=k - 1)
    return logits.masked_fill(logits < values.gather(1, kept), -torch.inf)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of fp32 logits [n, n_vocab] by inverting the cumulated probabilities at uniform [n] in [0, 1), float64.

    (tokens [n], their log-probabilities [n], float64, among what they were drawn from). temperature 0: the likeliest token. The cumulated
    sum is made of blocks: their masses first, then only the chosen block's tokens.
    """
    n, V = logits.shape
    greedy = temperature == 0
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_p < 1 and not greedy:
        logits = nucleus(logits, top_p)
    best = logits.amax(dim=-1, keepdim=True)
    mass = torch.exp(logits - best)  # [n, V]
    size = math.isqrt(V)
    full = V // size * size
    blocks = mass[:, :full].unflatten(1, (-1, size)).sum(-1, dtype=torch.float64)
    if full < V:
        blocks = torch.cat((blocks, mass[:, full:].sum(-1, keepdim=True, dtype=torch.float64)), dim=1)
    upto = blocks.cumsum(dim=1)
    total = upto[:, -1:]
    if greedy:
        tokens = logits.argmax(dim=-1, keepdim=True)
    else:
        point = uniform[:, None] * total
        block = torch.searchsorted(upto, point, right=True).clamp_(max=upto.shape[1] - 1)  # [n, 1]
        below, here = (upto - blocks).gather(1, block), blocks.gather(1, block)
        index = (block * size + torch.arange(size, device=logits.device)).clamp_(max=V - 1)
        inside = mass.gather(1, index).double()
        inside = inside.masked_fill_(block * size + torch.arange(size, device=logits.device) >= V, 0).cumsum(dim=1)
        # Scaled to what the block's tokens add up to one by one, and kept below it: whatever the rounding, a token with mass is found.
        point = ((point - below) / here).clamp_(0, 1 - 1e-12) * inside[:, -1:]
        tokens = block * size + torch.searchsorted(inside, point, right=True).clamp_(max=size - 1)
    log_p = (logits.gather(1, tokens) - best).double() - total.log()
    return tokens[:, 0], log_p[:, 0]


def keyed_uniform(state: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """data.corpus.hash_uniform's last round on the device: state (hash_state of the other keys) and position, int64 [n] -> [n] in [0, 1)."""

    def shift(h, bits):  # logical, of a signed number
        return (h >> bits) & ((1 << (64 - bits)) - 1)

    h = (state ^ position) - 0x61C8864680B583EB  # the constants of data/corpus.py as signed numbers; overflow wraps
    h = (h ^ shift(h, 30)) * -0x40A7B892E31B1A47
    h = (h ^ shift(h, 27)) * -0x6B2FB644ECCEEE15
    return shift(h ^ shift(h, 31), 12).double() * 2.0**-52


class Engine:
    """A model for sampling and scoring: tokens of all sequences lie flat in one batch, so that linear layers never see padding; q, k, v and gate,
    up are joined; one cache, whose size is planned before any work.

    A prompt has a slot, where its keys and values lie once; a slot has C cells, in each of which one of the prompt's K samples grows:

        prompt  [n_layer, 2, n_slots, n_kv_head, prompt_len, head_dim]        own  [n_layer, 2, n_slots, n_kv_head, C, max_new, head_dim]

    A step computes the live cells only. A cell whose sample ends takes the prompt's next one at once; a slot whose samples have all ended
    takes the next prompt, which is computed a piece at a time beside the cells that decode. Slot 0 is for padding.

    On a GPU `burst` steps run before the host looks again, each a captured CUDA graph for its number of cells and lengths (rounded up): no step
    waits for the host. n_rows: most cells; 0: as many as memory allows, up to 1024.
    """

    CELLS = 4  # C, if there are as many samples
    PIECE = 2048  # prompt tokens taken in beside a step
    SCORED = 8192  # tokens that are scored at once

    def __init__(self, model: Llama, n_rows: int = 0, burst: int = 0):
        self.model, self.config, self.n_rows = model, model.config, n_rows
        self.device, self.shape, self.rope, self.graphs = model.embed_tokens.weight.device, None, None, {}
        if self.device.type == "mps":
            raise UserError("--device=mps: the engine adds up in float64, which mps lacks; --device=cpu")
        self.rounded = self.device.type == "cuda"
        self.burst = burst or (8 if self.rounded else 1)
        self.pool = torch.cuda.graph_pool_handle() if self.rounded else None
        self.stops = {}  # sets of tokens that end a sample, on the device
        self.layers = [self.join(layer) for layer in model.layers]
        self.head = model.head()
        if self.device.type != "cuda":
            self.head = self.head.float()  # fp32 logits: only CUDA has products of bf16 into fp32

    @staticmethod
    @torch.no_grad()
    def join(layer) -> SimpleNamespace:
        """A block's weights, with q, k, v and gate, up joined; the model's own become views of them, so that nothing is held twice."""

        def joined(*linears):
            weight = torch.cat([linear.weight for linear in linears])
            for linear, part in zip(linears, weight.split([len(linear.weight) for linear in linears])):
                linear.weight.data = part
            return weight, None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])

        a, m = layer.self_attn, layer.mlp
        qkv, qkv_bias = joined(a.q_proj, a.k_proj, a.v_proj)
        return SimpleNamespace(
            norm=layer.input_layernorm, qkv=qkv, qkv_bias=qkv_bias, q_norm=a.q_norm, k_norm=a.k_norm, out=a.o_proj.weight, out_bias=a.o_proj.bias,
            mlp_norm=layer.post_attention_layernorm, gate_up=joined(m.gate_proj, m.up_proj)[0], down=m.down_proj.weight,
        )  # fmt: skip

    # ---- the model on flat tokens

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        """ids, positions [N] -> hidden [N, n_embd], as train.Llama. attend(layer, q [N, n_head, head_dim], k, v [N, n_kv_head, head_dim])
        -> like q: only attention needs to know which tokens belong together."""
        c, N = self.config, len(ids)
        half, n_qk = c.head_dim // 2, c.n_head + c.n_kv_head
        cos, sin = (table[positions][:, None] for table in self.rope)  # [N, 1, head_dim], [N, 1, head_dim / 2]
        x = self.model.embed_tokens(ids).to(self.layers[0].qkv.dtype)
        for i, w in enumerate(self.layers):
            qkv = F.linear(w.norm(x), w.qkv, w.qkv_bias).view(N, n_qk + c.n_kv_head, c.head_dim)
            qk, v = qkv[:, :n_qk], qkv[:, n_qk:]
            if c.qk_norm:
                qk = torch.cat((w.q_norm(qk[:, : c.n_head]), w.k_norm(qk[:, c.n_head :])), dim=1)
            turned = qk * cos  # train.rotate, in three passes
            turned[..., :half].addcmul_(qk[..., half:], sin, value=-1)
            turned[..., half:].addcmul_(qk[..., :half], sin)
            y = attend(i, turned[:, : c.n_head], turned[:, c.n_head :], v).reshape(N, -1)
            x = torch.addmm(x, y, w.out.T)
            if w.out_bias is not None:
                x = x + w.out_bias
            gate, up = F.linear(w.mlp_norm(x), w.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate) * up, w.down.T)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, n_embd] -> logits [n, n_vocab], added up and kept in fp32 whatever the weights."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, self.head.T, out_dtype=torch.float32)
        return F.linear(hidden.float(), self.head)

    # ---- memory

    def slot_bytes(self, C: int, prompt_len: int, max_new: int) -> int:
        """What one slot takes: keys and values, and what a step allocates for its cells (logits twice, scores, the widest layer;
        twice where steps are captured, for those have memory of their own)."""
        c, size = self.config, self.layers[0].qkv.itemsize
        cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * size * (prompt_len + C * max_new)
        return cache + (2 if self.rounded else 1) * C * (10 * c.n_vocab + 8 * max_new + 4 * size * (c.n_head * (prompt_len + max_new) + 2 * c.n_hidden + 4 * c.n_embd))

    def wanted(self, samples: int, n_prompts: int) -> tuple[int, int]:
        """(cells side by side, cells of a slot), were memory no matter. Few prompts: more cells each."""
        rows = min(self.n_rows or 1024, samples * n_prompts)
        return rows, min(samples, max(self.CELLS, rows // n_prompts))

    def plan(self, samples: int, prompt_len: int, max_new: int, n_prompts: int, sharers: int = 1) -> tuple[int, int, int, int]:
        """(slots, cells of a slot, bytes that all of it takes beside the weights, bytes free). UserError when not even one prompt fits."""
        c, size = self.config, self.layers[0].qkv.itemsize
        rows, C = self.wanted(samples, n_prompts)
        tokens = prompt_len + max_new + self.SCORED  # at once in a layer: a tail is scored whole, however long
        fixed = tokens * size * (8 * c.n_embd + 6 * c.n_hidden + 8 * c.n_head * c.head_dim) + (192 << 20)  # 192 MB: scored logits
        each, free = self.slot_bytes(C, prompt_len, max_new), free_memory(self.device) // sharers
        slots = min(-(-rows // C), int((0.8 * free - fixed) // each) - 1)
        if slots < 1:
            raise UserError(f"one prompt of {prompt_len} tokens with {C} samples of {max_new} needs {(fixed + 2 * each) / 1e9:.1f} GB, "
                            f"and 80% of {free / 1e9:.1f} GB free are to be had: lower --max_new, --before, --rows or --workers")  # fmt: skip
        return slots, C, int(fixed + (slots + 1) * each), free

    def reserve(self, samples: int, prompt_len: int, max_new: int, n_prompts: int) -> None:
        """Allocate the cache, unless the one that is there will do."""
        c, C, round_up = self.config, self.wanted(samples, n_prompts)[1], 64 if self.rounded else 1
        prompt_len, max_new = (-(-max(1, n) // round_up) * round_up for n in (prompt_len, max_new))
        if self.shape and self.shape[1] >= prompt_len and self.shape[2] >= max_new and self.shape[3] == C and self.n_prompts >= n_prompts:
            return
        self.n_prompts, self.graphs, self.prompt, self.own = n_prompts, {}, None, None  # given back first
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        n_slots = self.plan(samples, prompt_len, max_new, n_prompts)[0] + 1  # one for padding
        self.shape, dtype, where = (n_slots, prompt_len, max_new, C), self.layers[0].qkv.dtype, dict(device=self.device)
        self.prompt = torch.zeros(c.n_layer, 2, n_slots, c.n_kv_head, prompt_len, c.head_dim, dtype=dtype, **where)
        self.own = torch.zeros(c.n_layer, 2, n_slots, c.n_kv_head, C, max_new, c.head_dim, dtype=dtype, **where)
        self.cells = torch.zeros(n_slots * C, dtype=torch.long, **where)  # the live ones first
        self.ids = torch.zeros(n_slots * C, max_new + 1, dtype=torch.long, **where)
        self.log_q = torch.zeros(n_slots * C, dtype=torch.float64, **where)
        self.state = torch.zeros(4, n_slots * C, dtype=torch.long, **where)
        self.base = torch.zeros(n_slots, dtype=torch.long, **where)  # tokens of each prompt but its last
        self.extend_rope(prompt_len + max_new + 1)

    def extend_rope(self, length: int) -> None:
        if self.rope is None or len(self.rope[0]) < length:
            self.graphs, length = {}, max(length, self.config.seq_len)  # graphs would read the old tables
            cos, sin = rope_table(torch.arange(length, device=self.device)[None], self.config)  # [1, 1, length, head_dim]
            self.rope = cos[0, 0], sin[0, 0, :, : self.config.head_dim // 2]

    # ---- attention

    def attention(self, q, k, v, mask=None):
        """q [B, n_head, T, head_dim], k, v [B, n_kv_head, L, head_dim]; causal without a mask [B or 1, 1, T, L] of what is seen."""
        group = q.shape[1] // k.shape[1]
        if q.is_cuda and (mask is not None or q.dtype == torch.float32):  # no fused kernel there takes fewer key heads
            k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=group > 1)

    def decoding(self, cells: torch.Tensor, slots: int, P: int, S: int):
        """attend() of one new token in each of `cells` [n]: they see P positions of their prompt and S of their own, over the first `slots` slots.

        Queries are laid out by slot, so that the products read a prompt's keys once for all of its cells.
        """
        c = self.config
        n_kv, group, hd, scale = c.n_kv_head, c.n_head // c.n_kv_head, c.head_dim, c.head_dim**-0.5
        _, _, max_new, C = self.shape

        def hide(lengths, width):  # [m] -> [m * n_kv, 1, width]: 0 for what lies before a length, -inf from there on
            hidden = torch.arange(width, device=self.device) >= lengths[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.own.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            return mask.unflatten(0, (slots, -1))[:, None].expand(-1, n_kv, -1, -1).reshape(len(lengths) * n_kv, 1, width)

        age = self.state[AGE].clamp(max=max_new - 1)  # an ended cell may be computed again until the host looks
        hide_prompt, hide_own = hide(self.base[:slots], P), hide(age[: slots * C] + 1, S)
        head = cells[:, None] // C * n_kv + torch.arange(n_kv, device=self.device)  # [n, n_kv]
        place = ((head * C + cells[:, None] % C) * max_new + age[cells, None]).view(-1)  # of the new keys in the cache, [n * n_kv]

        def attend(layer, q, k, v):
            own, prompt = self.own[layer], self.prompt[layer, :, :slots, :, :P].reshape(2, slots * n_kv, P, hd)
            own[0].view(-1, hd).index_copy_(0, place, k.reshape(-1, hd))
            own[1].view(-1, hd).index_copy_(0, place, v.reshape(-1, hd))
            own = own[:, :slots, :, :, :S].reshape(2, slots * n_kv * C, S, hd)
            grid = q.new_zeros(slots * C, n_kv * group, hd).index_copy_(0, cells, q)  # zeros where no sample is alive
            grid = grid.view(slots, C, n_kv, group, hd).transpose(1, 2).reshape(slots * n_kv, C * group, hd)
            on_prompt = torch.baddbmm(hide_prompt, grid, prompt[0].mT, alpha=scale)  # [slots * n_kv, C * group, P]
            on_own = torch.baddbmm(hide_own, grid.view(-1, group, hd), own[0].mT, alpha=scale)  # [slots * n_kv * C, group, S]
            weight = torch.softmax(torch.cat((on_prompt.view(-1, group, P), on_own), dim=-1), dim=-1)
            y = weight.view(slots * n_kv, C * group, P + S)[..., :P] @ prompt[1]
            y = y.view(-1, group, hd).baddbmm_(weight[..., P:], own[1])  # [slots * n_kv * C, group, hd]
            y = y.view(slots, n_kv, C, group, hd).transpose(1, 2).reshape(slots * C, n_kv * group, hd)
            return y.index_select(0, cells)

        return attend

    def prefilling(self, slots: torch.Tensor, start: int, T: int):
        """attend() of positions start .. start + T of the prompts in `slots` [B], which it fills; they see what lies there before."""

        def attend(layer, q, k, v):
            q, k, v = (x.view(len(slots), T, -1, self.config.head_dim).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, head_dim]
            prompt, mask = self.prompt[layer], None
            prompt[0, slots, :, start : start + T], prompt[1, slots, :, start : start + T] = k, v
            if start:
                k, v = prompt[:, slots, :, : start + T]
                mask = torch.ones(T, start + T, dtype=torch.bool, device=self.device).tril(start)
            return self.attention(q, k, v, mask).transpose(1, 2).reshape(-1, q.shape[1], q.shape[3])

        return attend

    # ---- sampling

    def step(self, n: int, slots: int, P: int, S: int, stop: torch.Tensor, max_new: int, how: tuple[float, float], piece=None) -> None:
        """Sample a token in each of the first n of self.cells, and take in a piece of prompts. All on the device, nothing comes back."""
        cells = self.cells[:n]
        last, age, noise, done = self.state[:, cells]
        ids, positions = last, self.base[cells // self.shape[3]] + age
        attend = decode = self.decoding(cells, slots, P, S) if n else None
        if piece:
            prefill = self.prefilling(piece.slots, piece.start, piece.ids.shape[1])
            ids = torch.cat((ids, piece.ids.reshape(-1)))
            positions = torch.cat((positions, torch.arange(piece.start, piece.start + piece.ids.shape[1], device=self.device).repeat(len(piece.slots))))

            def attend(layer, q, k, v):
                y = prefill(layer, q[n:], k[n:], v[n:])
                return torch.cat((decode(layer, q[:n], k[:n], v[:n]), y)) if n else y

        hidden = self.forward(ids, positions, attend)
        if not n:
            return
        tokens, log_p = draw(self.logits(hidden[:n]), keyed_uniform(noise, age), *how)
        alive = done == 0
        self.ids[cells, age] = tokens
        self.log_q[cells] += torch.where(alive, log_p, 0.0)
        ended = (tokens[:, None] == stop).any(dim=1)
        now = torch.where(ended, ENDED, torch.where(age + 1 >= max_new, CUT_OFF, 0))
        self.state[:, cells] = torch.stack((tokens, age + alive, noise, torch.where(alive, now, done)))

    def advance(self, n: int, slots: int, P: int, S: int, max_new: int, how: tuple[float, float], piece) -> None:
        """`burst` steps, the first of which may take in prompts. On a GPU (`rounded`) sizes are rounded up, so that few different steps occur; those
        without prompts are captured as CUDA graphs."""
        if self.rounded and n:
            full = min(-(-n // 32) * 32, len(self.cells))
            self.cells[n:full] = 0  # a cell of slot 0, which has ended: computed, and never counted
            n, slots = full, min(-(-slots // 8) * 8, self.shape[0])
            P, S = min(-(-P // 64) * 64, self.shape[1]), min(-(-(S + self.burst) // 64) * 64, self.shape[2])
        for b in range(self.burst if n else 1):
            step = (n, slots, P, S if self.rounded else min(S + b, self.shape[2]), self.stop, max_new, how)
            if piece and b == 0:
                self.step(*step, piece)
            elif self.device.type == "cuda":
                self.replay(step)
            else:
                self.step(*step)

    def replay(self, step: tuple) -> None:
        """A step from its CUDA graph. The first of its kind runs as it is, which also warms up; the second is captured. All share one pool of memory."""
        if step not in self.graphs:
            self.graphs[step] = None
            return self.step(*step)
        if self.graphs[step] is None:
            torch.cuda.synchronize()
            self.graphs[step] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[step], pool=self.pool):
                self.step(*step)
        self.graphs[step].replay()

    @torch.inference_mode()
    def generate(self, prompts, keys, samples: int, max_new: int, stop: set[int], seed: int, *,
                 purpose: int = DRAW, temperature: float = 1.0, top_p: float = 1.0, on_tokens=None,
                 ends=None) -> list[list[tuple]]:  # fmt: skip
        """Continue each prompt `samples` times until a token of `stop` or `max_new` tokens.

        prompts: lists of ids; keys: an integer each, which seeds its noise, as does the sample's number.
        Returns for each prompt its samples (ids with the stop token if there is one, finished, sum of their
        log-probabilities: as sample_slowly).
        on_tokens(n) is told of every n sampled tokens. temperature 0: the likeliest tokens. top_p: of the likeliest tokens only, see nucleus.
        ends(ids) is asked every 8 tokens whether a sample has ended by what it says; it then counts as finished.

        A prompt's slot holds all of it but the last token, with which each of its samples begins. A start that all prompts share (few-shot
        examples) is computed once, in slot 0, and copied.
        """
        if not len(prompts):
            return []
        prompts, keys = [np.asarray(p, dtype=np.int64) for p in prompts], np.asarray(keys)
        self.reserve(samples, max(map(len, prompts)) - 1, max_new, len(prompts))
        n_slots, C, results = self.shape[0], self.shape[3], [[None] * samples for _ in prompts]
        self.stop = self.stops.setdefault(frozenset(stop), torch.tensor(sorted(stop), device=self.device))
        noise = hash_state(purpose, seed, keys[:, None], np.arange(samples))  # [n_prompts, samples]
        noise = noise.astype(np.int64)
        todo = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))  # longest first, for little padding
        free = list(range(1, n_slots))  # a heap: low slots first, so that the ones in use lie close together
        holder, begun, left = np.full(n_slots, -1), np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64)
        sample, cells, piece = np.zeros(n_slots * C, np.int64), np.zeros(0, np.int64), None
        state, base, log_q = (x.numpy() if self.device.type == "cpu" else x.cpu().numpy() for x in (self.state, self.base, self.log_q))
        state[DONE], base[:] = 0, 0
        state[DONE, 0] = ENDED  # for ever
        shared = shared_length(prompts)
        for start in range(0, shared, self.PIECE):
            ids = torch.from_numpy(prompts[0][None, start : min(start + self.PIECE, shared)]).to(self.device)
            self.step(0, 1, 1, 1, self.stop, max_new, (temperature, top_p), SimpleNamespace(slots=torch.tensor([0], device=self.device), start=start, ids=ids))

        def begin(cell: int) -> None:
            """Let the slot's next sample grow in the cell."""
            slot = cell // C
            i, j = holder[slot], begun[slot]
            sample[cell], begun[slot] = j, j + 1
            state[:, cell], log_q[cell] = (prompts[i][-1], 0, noise[i, j], 0), 0.0

        def next_piece():
            """The next prompts that share a length, or a part of one that is long, for free slots."""
            if piece and piece.start + piece.ids.shape[1] < piece.all.shape[1]:
                start = piece.start + piece.ids.shape[1]
                return SimpleNamespace(**vars(piece) | dict(start=start, ids=piece.all[:, start : start + self.PIECE]))
            if not todo or (len(cells) and 8 * len(free) < n_slots):
                return None
            width = len(prompts[todo[0]]) - 1
            batch = [todo.popleft() for _ in range(max(1, min(len(free), len(todo), self.PIECE // max(1, width - shared))))]
            slots, ids = [heapq.heappop(free) for _ in batch], np.zeros((len(batch), width), np.int64)
            for row, i, slot in zip(ids, batch, slots):
                row[: len(prompts[i]) - 1] = prompts[i][:-1]
                base[slot], left[slot], begun[slot], holder[slot] = len(prompts[i]) - 1, samples, 0, i
            ids, slots = torch.from_numpy(ids).to(self.device), torch.tensor(slots, device=self.device)
            if shared:
                self.prompt[:, :, slots, :, :shared] = self.prompt[:, :, :1, :, :shared]
            return SimpleNamespace(slots=slots, start=shared, all=ids, ids=ids[:, shared : shared + self.PIECE])

        while True:
            for cell in cells[(state[DONE, cells] == 0) & (state[AGE, cells] % 8 == 0) & (state[AGE, cells] > 0)].tolist() if ends else ():
                if ends(self.ids[cell, : state[AGE, cell]].cpu().numpy()):
                    state[DONE, cell] = ENDED
            gone = []
            for cell in cells[state[DONE, cells] > 0].tolist():
                slot, length = cell // C, state[AGE, cell]
                results[holder[slot]][sample[cell]] = (self.ids[cell, :length].cpu().numpy().copy(), bool(state[DONE, cell] == ENDED), float(log_q[cell]))
                left[slot] -= 1
                if begun[slot] < samples:
                    begin(cell)
                    continue
                gone.append(cell)
                if not left[slot]:
                    heapq.heappush(free, slot)
                    holder[slot] = -1
            if gone:
                cells = np.setdiff1d(cells, gone, assume_unique=True)
            piece = next_piece()
            if not len(cells) and not piece:
                return results
            slots = int(np.flatnonzero(holder >= 0)[-1]) + 1
            P, S = max(1, int(base[:slots].max())), int(state[AGE, cells].max(initial=0)) + 1
            self.cells[: len(cells)] = torch.from_numpy(cells)
            if self.device.type != "cpu":
                self.state.copy_(torch.from_numpy(state)), self.base.copy_(torch.from_numpy(base)), self.log_q.copy_(torch.from_numpy(log_q))
            before = int(state[AGE, cells].sum())
            self.advance(len(cells), slots, P, S, max_new, (temperature, top_p), piece if piece and piece.ids.shape[1] else None)
            if self.device.type != "cpu":
                state[:], log_q[:] = self.state.cpu().numpy(), self.log_q.cpu().numpy()
            if on_tokens and len(cells):
                on_tokens(int(state[AGE, cells].sum()) - before)
            if piece and piece.start + piece.ids.shape[1] == piece.all.shape[1]:
                new = [int(slot) * C + j for slot in piece.slots.tolist() for j in range(C)]
                for cell in new:
                    begin(cell)
                cells = np.sort(np.concatenate((cells, new)).astype(np.int64))

    # ---- scoring

    @torch.inference_mode()
    def score(self, prefixes, tails) -> list[list[np.ndarray]]:
        """Teacher-forced: for each prefix (ids) and each of its tails (ids), log p(token | all before it) of the tail's tokens.

        The one fast scoring function: log_p of thoughts and chunks, and the NLL of text. fp32 log-softmax over the whole vocabulary. A prefix is
        computed once for its tails, which read its keys and values (for as many tails as SCORED tokens allow).
        """
        results = [[np.zeros(len(tail)) for tail in group] for group in tails]
        units = []  # (tokens, prefix, its tails)
        for i, group in enumerate(tails):
            size, chosen = len(prefixes[i]), []
            for j, tail in enumerate(group):
                if chosen and size + len(tail) > self.SCORED:
                    units.append((size, i, chosen))
                    size, chosen = len(prefixes[i]), []
                if len(tail):
                    size, chosen = size + len(tail), [*chosen, j]
            if chosen:
                units.append((size, i, chosen))
        units.sort(key=lambda unit: -unit[0])
        while units:
            batch, size = [units.pop(0)], 0
            while units and size + units[0][0] <= self.SCORED - batch[0][0]:
                size += units[0][0]
                batch.append(units.pop(0))
            found = self.score_batch([prefixes[i] for _, i, _ in batch], [[tails[i][j] for j in chosen] for _, i, chosen in batch])
            for (_, i, chosen), values in zip(batch, found):
                for j, value in zip(chosen, values):
                    results[i][j] = value
        return results

    def score_batch(self, prefixes, tails) -> list[list[np.ndarray]]:
        flat_tails = [np.asarray(tail, dtype=np.int64) for group in tails for tail in group]
        owner = np.repeat(np.arange(len(prefixes)), [len(group) for group in tails])
        parts = [np.asarray(p, dtype=np.int64) for p in prefixes] + [tail[:-1] for tail in flat_tails]  # a tail's last token predicts nothing
        lengths = np.array([len(part) for part in parts])
        starts, G = np.cumsum(lengths) - lengths, len(prefixes)
        self.extend_rope(int(lengths[:G].max() + lengths[G:].max()) + 1)
        offset = np.where(np.arange(len(parts)) < G, 0, np.append(np.zeros(G, np.int64), lengths[:G][owner]))
        positions = np.concatenate([np.arange(n) + first for n, first in zip(lengths, offset)])

        def grid(first, last):  # index of each sequence's tokens, padded [rows, longest], and which are real
            column = np.arange(max(1, lengths[first:last].max()))
            real = column < lengths[first:last, None]
            return tuple(torch.from_numpy(x).to(self.device) for x in (np.where(real, starts[first:last, None] + column, 0), real))

        (head, head_real), (tail, tail_real) = grid(0, G), grid(G, len(parts))
        n_head, owners = int(lengths[:G].sum()), torch.from_numpy(owner).to(self.device)
        T = tail.shape[1]
        seen = torch.cat((head_real[owners][:, None].expand(-1, T, -1),
                          torch.ones(T, T, dtype=torch.bool, device=self.device).tril().expand(len(owner), -1, -1)), dim=2)[:, None]  # fmt: skip

        def attend(layer, q, k, v):
            y, (hq, hk, hv) = torch.empty_like(q), (x[head].transpose(1, 2) for x in (q, k, v))  # [G, heads, P, head_dim]
            y[:n_head] = self.attention(hq, hk, hv).transpose(1, 2)[head_real]
            if n_head < len(q):
                tq, tk, tv = (x[tail].transpose(1, 2) for x in (q, k, v))  # [R, heads, T, head_dim]
                tk, tv = torch.cat((hk[owners], tk), dim=2), torch.cat((hv[owners], tv), dim=2)  # [R, n_kv_head, P + T, head_dim]
                y[n_head:] = self.attention(tq, tk, tv, seen).transpose(1, 2)[tail_real]
            return y

        ids, positions = (torch.from_numpy(x).to(self.device) for x in (np.concatenate(parts), positions))
        hidden = self.forward(ids, positions, attend)
        ends = starts[:G] + lengths[:G] - 1  # where a tail's first token is predicted
        where = np.concatenate([np.append(ends[g], start + np.arange(n)) for g, start, n in zip(owner, starts[G:], lengths[G:])])
        where, targets = (torch.from_numpy(x).to(self.device) for x in (where, np.concatenate(flat_tails)))
        size = max(1, (64 << 20) // (4 * self.config.n_vocab))
        log_p = torch.cat([-F.cross_entropy(self.logits(hidden[where[i : i + size]]), targets[i : i + size], reduction="none")
                           for i in range(0, len(where), size)]).double().cpu().numpy()  # fmt: skip
        values = iter(np.split(log_p, np.cumsum([len(t) for t in flat_tails])[:-1]))
        return [[next(values) for _ in group] for group in tails]


def shared_length(prompts: list[np.ndarray]) -> int:
    """How many tokens all prompts begin with alike, short of any prompt's last; 0 where they are too few to matter."""
    n = min(map(len, prompts)) - 1
    first = prompts[0][:n]
    for p in prompts[1:]:
        differ = np.flatnonzero(p[:n] != first[:n])
        n = int(differ[0]) if len(differ) else n
    return n if n >= 32 and len(prompts) > 1 else 0


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU; of the machine or its container, whichever has less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        free.append(next(int(line.split()[1]) << 10 for line in open("/proc/meminfo") if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError, KeyError):
        stat = dict(line.split() for line in open("/sys/fs/cgroup/memory.stat"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(stat["file"])  # what caches files can be taken back
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) - used)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 if free else 2))
    return max(0, min(free, default=4 << 30))


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


def split_parts(corpus: Corpus, chosen: np.ndarray, size: int) -> list[np.ndarray]:
    """The chunks `chosen` in parts of about `size`, whole documents each."""
    docs, parts, start = corpus.doc_of(chosen), [], 0
    ends = np.append(np.flatnonzero(np.diff(docs)) + 1, len(chosen))  # behind each document's last chunk
    for end in ends:
        if end - start >= size or end == len(chosen):
            parts.append(chosen[start:end])
            start = end
    return parts


def do_parts(parts: list, engine: Engine, tok, corpus: Corpus, s: Settings, work: Path) -> None:
    """Take parts that nobody holds until all are there; UserError for those that failed."""
    total, failed = sum(len(numbers) for _, numbers in parts), {}
    n_done = sum(len(numbers) for path, numbers in parts if path.exists())
    progress, begin, tokens, looked = Progress("infer", total, "chunks", done=n_done), time.time(), 0, 0.0

    def on_tokens(n, last=False):
        nonlocal tokens, looked, n_done
        tokens += n
        if time.time() - looked > 1 or last:
            looked, n_done = time.time(), sum(len(numbers) for path, numbers in parts if path.exists())
            progress.update(n_done if last else min(n_done, total - 1), sampled=f"{tokens / (time.time() - begin):,.0f} tok/s a worker")

    while missing := [part for part in parts if not part[0].exists() and part[0] not in failed]:
        took = False
        for path, numbers in missing:
            with hold(path.with_suffix(".lock"), wait=False) as held:
                if not held or path.exists():
                    continue
                took = True
                try:
                    append_jsonl(work / "metrics.jsonl", run_part(path, numbers, engine, tok, corpus, s, on_tokens))
                except UserError as e:
                    failed[path] = e
                    print(f"infer_thoughts.py: part {path.stem} failed: {e}", file=sys.stderr, flush=True)
        if not took:
            time.sleep(0.2)  # others are at work on what is left
            on_tokens(0)
    if failed:
        raise UserError(f"{len(failed)} of {len(parts)} parts failed (see above), the first: {next(iter(failed.values()))}")
    on_tokens(0, last=True)


def helpers(s: Settings, n_workers: int, threads: int):
    """Start the other workers: this same command, quiet; each ends when we do."""
    flags = [f"--{k}={v}" for k, v in asdict(s).items() if v != ""]
    env = os.environ | {"EM_CHILD": "1", "INFER_WORKER": str(threads), "OMP_NUM_THREADS": str(threads)}
    return [subprocess.Popen([sys.executable, __file__, *flags], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env, start_new_session=True)
            for _ in range(n_workers - 1)]  # fmt: skip


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
        do_parts(list(zip(paths, parts)), engine, tok, corpus, s, work)
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
