"""The engine: samples from a model and scores with it, many sequences in one batch."""

import contextlib
import heapq
import math
import os
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from data.lib.cli import UserError
from data.lib.corpus import DRAW, hash_state

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
    """data.lib.corpus.hash_uniform's last round on the device: state (hash_state of the other keys) and position, int64 [n] -> [n] in [0, 1)."""

    def shift(h, bits):  # logical, of a signed number
        return (h >> bits) & ((1 << (64 - bits)) - 1)

    h = (state ^ position) - 0x61C8864680B583EB  # the constants of data/lib/corpus.py as signed numbers; overflow wraps
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

    def __init__(self, model, n_rows: int = 0, burst: int = 0):
        self.model, self.config, self.n_rows = model, model.config, n_rows
        self.device, self.shape, self.graphs = model.embed_tokens.weight.device, None, {}
        if self.device.type == "mps":
            raise UserError("--device=mps: the engine adds up in float64, which mps lacks; --device=cpu")
        self.rounded = self.device.type == "cuda"
        self.burst = burst or (8 if self.rounded else 1)
        self.pool = torch.cuda.graph_pool_handle() if self.rounded else None
        self.stops = {}  # sets of tokens that end a sample, on the device
        model.pack()
        self.dtype = model.embed_tokens.weight.dtype
        self.head = model.head()
        if self.device.type != "cuda":
            self.head = self.head.float()  # fp32 logits: only CUDA has products of bf16 into fp32

    # ---- the model on flat tokens

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        """ids, positions [N] -> hidden [N, n_embd]. attend(layer, q [N, n_head, head_dim], k, v [N, n_kv_head, head_dim])
        -> like q: only attention needs to know which tokens belong together."""

        def flat(layer, q, k, v):  # [1, heads, N, head_dim]
            return attend(layer, *(x[0].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)[None]

        return self.model(ids[None], positions[None], flat)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, n_embd] -> logits [n, n_vocab], added up and kept in fp32 whatever the weights."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, self.head.T, out_dtype=torch.float32)
        return F.linear(hidden.float(), self.head)

    # ---- memory

    def slot_bytes(self, C: int, prompt_len: int, max_new: int) -> int:
        """What one slot takes: keys and values, and what a step allocates for its cells (logits twice, scores, the widest layer;
        twice where steps are captured, for those have memory of their own)."""
        c, size = self.config, self.dtype.itemsize
        cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * size * (prompt_len + C * max_new)
        return cache + (2 if self.rounded else 1) * C * (10 * c.n_vocab + 8 * max_new + 4 * size * (c.n_head * (prompt_len + max_new) + 2 * c.n_hidden + 4 * c.n_embd))

    def wanted(self, samples: int, n_prompts: int) -> tuple[int, int]:
        """(cells side by side, cells of a slot), were memory no matter. Few prompts: more cells each."""
        rows = min(self.n_rows or 1024, samples * n_prompts)
        return rows, min(samples, max(self.CELLS, rows // n_prompts))

    def plan(self, samples: int, prompt_len: int, max_new: int, n_prompts: int, sharers: int = 1) -> tuple[int, int, int, int]:
        """(slots, cells of a slot, bytes that all of it takes beside the weights, bytes free). UserError when not even one prompt fits."""
        c, size = self.config, self.dtype.itemsize
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
        self.shape, dtype, where = (n_slots, prompt_len, max_new, C), self.dtype, dict(device=self.device)
        self.prompt = torch.zeros(c.n_layer, 2, n_slots, c.n_kv_head, prompt_len, c.head_dim, dtype=dtype, **where)
        self.own = torch.zeros(c.n_layer, 2, n_slots, c.n_kv_head, C, max_new, c.head_dim, dtype=dtype, **where)
        self.cells = torch.zeros(n_slots * C, dtype=torch.long, **where)  # the live ones first
        self.ids = torch.zeros(n_slots * C, max_new + 1, dtype=torch.long, **where)
        self.log_q = torch.zeros(n_slots * C, dtype=torch.float64, **where)
        self.state = torch.zeros(4, n_slots * C, dtype=torch.long, **where)
        self.base = torch.zeros(n_slots, dtype=torch.long, **where)  # tokens of each prompt but its last

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
