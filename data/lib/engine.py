"""The engine samples from a model and scores with it, many sequences at once.

A prompt has a slot, where its keys and values are computed once. A slot has a
few lanes, and in each lane one of the prompt's samples (a Sequence) grows:

    prompts  [n_layer, 2, n_slots, n_kv_head, prompt_len, head_dim]
    own      [n_layer, 2, n_slots, n_kv_head, lanes, max_new, head_dim]

A lane whose sample has ended takes the prompt's next sample; a slot whose
samples have all ended takes the next prompt, once score() has read its keys.
Slot 0 is special: it keeps the start that all prompts share, and its first
lane serves as padding.

Scheduler decides what a step computes and knows no torch. Runner owns all
that lies on the device. Engine.generate alternates between them: schedule,
run, postprocess. The tokens of all sequences lie flat in one batch, so that
only attention has to know which of them belong together.
"""

import contextlib
import heapq
import os
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.lib.cli import UserError
from data.lib.corpus import DRAW, hash_state
from data.lib.drawing import draw, keyed_uniform
from data.lib.kernels import attention


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    The noise of a token depends on purpose, seed, the key of the prompt, the
    number of the sample and the position, and never on the batch.
    """

    max_new: int  # tokens at most
    stop: frozenset[int]  # each of these tokens ends a sample
    seed: int = 0
    purpose: int = DRAW  # see data/lib/corpus.py
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # below 1: only tokens of the nucleus


@dataclass(frozen=True)
class Layout:
    """Sizes of the cache."""

    n_slots: int  # slot 0 included
    prompt_len: int
    max_new: int
    lanes: int  # of each slot


@dataclass(frozen=True)
class Shape:
    """How much of the lanes and of the cache a decoding step reads."""

    n_lanes: int
    n_slots: int
    prompt_len: int
    own_len: int


# -------------------- the scheduler


@dataclass
class Sequence:
    """One sample of a prompt."""

    prompt: int
    sample: int
    last_token: int  # of the prompt: the sample begins by reading it
    noise: int  # the state of keyed_uniform
    lane: int = 0
    length: int = 0  # tokens sampled, known when it has ended


@dataclass
class PrefillChunk:
    """Some positions of the prompts in some slots."""

    slots: np.ndarray  # [B]
    lengths: np.ndarray  # [B], of the whole prompts without their last tokens
    shared_len: int  # positions that are copied from slot 0
    start: int  # position of the first of ids
    ids: np.ndarray  # [B, T], padded; T = 0: the shared start was all
    last: bool  # the prompts are complete with it, and samples can start


@dataclass
class Step:
    """What the device does until the host looks again."""

    lanes: np.ndarray  # [n], ascending: where a token is sampled
    lengths: np.ndarray  # [n], tokens sampled there so far
    started: list[Sequence]  # since the last step
    prefill: PrefillChunk | None
    shape: Shape


class Scheduler:
    """Decides which prompts are prefilled when, and which samples grow where.

    prompts: int64 arrays. noise: int64 [n_prompts, samples], a state for each
    sample. prefill_tokens: how many are taken in by one step.
    """

    def __init__(self, prompts, noise, layout: Layout, prefill_tokens: int):
        self.prompts = prompts
        self.noise = noise
        self.layout = layout
        self.prefill_tokens = prefill_tokens
        # Longest first, so that prompts of one chunk need little padding.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.waiting = deque(order)
        # A heap keeps the slots in use close together, and steps small.
        self.free_slots = list(range(1, layout.n_slots))
        self.prompt_len = np.zeros(layout.n_slots, np.int64)
        self.pending = {}  # slot -> its samples that have not begun
        self.ended = {}  # slot -> its prompt, whose samples have all ended
        self.running = {}  # lane -> Sequence
        self.lengths = np.zeros(layout.n_slots * layout.lanes, np.int64)
        self.started = []
        self.chunks = deque()  # of the prompts that have slots
        self.shared_len = shared_length(prompts)
        if self.shared_len:
            shared = prompts[0][None, : self.shared_len]
            self.add_chunks(np.array([0]), shared, 0)

    def schedule(self) -> Step | None:
        """The next step; None when all samples have ended.

        It takes in prompts or samples tokens. A GPU reads all weights for
        few lanes, too, so that samples wait until the slots are full.
        """
        prefill = self.next_prefill()
        lanes = np.fromiter(() if prefill else self.running, np.int64)
        lanes.sort()
        if not len(lanes) and not prefill:
            return None
        lengths = self.lengths[lanes]
        n_slots = max(self.pending, default=0) + 1
        prompt_len = max(1, int(self.prompt_len[:n_slots].max()))
        own_len = int(lengths.max(initial=0)) + 1
        shape = Shape(len(lanes), n_slots, prompt_len, own_len)
        started, self.started = self.started, []
        return Step(lanes, lengths, started, prefill, shape)

    def next_prefill(self) -> PrefillChunk | None:
        """The next chunk, if there is one to compute now.

        Prompts wait until an eighth of the slots is free, unless nothing runs:
        to prefill many of them takes little longer than one.
        """
        busy = self.running and 8 * len(self.free_slots) < self.layout.n_slots
        if not self.chunks and self.waiting and not busy:
            self.fill_slots()
        return self.chunks.popleft() if self.chunks else None

    def fill_slots(self) -> None:
        """Fill slots: one long prompt or several; a shared start counts an eighth."""
        width = len(self.prompts[self.waiting[0]]) - 1
        n = self.prefill_tokens // max(1, width - self.shared_len, width // 8)
        n = max(1, min(n, len(self.free_slots), len(self.waiting)))
        slots = np.array([heapq.heappop(self.free_slots) for _ in range(n)])
        ids = np.zeros((n, width), np.int64)
        for slot, row in zip(slots.tolist(), ids):
            prompt = self.place(self.waiting.popleft(), slot)
            row[: len(prompt)] = prompt
        self.add_chunks(slots, ids, self.shared_len)

    def add_chunks(self, slots, ids, shared_len: int) -> None:
        """Cut ids [B, L] into chunks, behind what they get from slot 0."""
        size, width = self.prefill_tokens, ids.shape[1]
        lengths = self.prompt_len[slots]
        for start in range(shared_len, max(width, shared_len + 1), size):
            part = ids[:, start : start + size]
            last = start + size >= width
            chunk = PrefillChunk(slots, lengths, shared_len, start, part, last)
            self.chunks.append(chunk)

    def place(self, prompt: int, slot: int) -> np.ndarray:
        """Give a slot to a prompt; returns its tokens but the last."""
        ids = self.prompts[prompt]
        last_token = int(ids[-1])
        self.prompt_len[slot] = len(ids) - 1
        self.pending[slot] = deque(
            Sequence(prompt, sample, last_token, noise)
            for sample, noise in enumerate(self.noise[prompt].tolist())
        )
        return ids[:-1]

    def start(self, lane: int) -> None:
        """Let the next sample of the slot's prompt grow in a lane."""
        sequence = self.pending[lane // self.layout.lanes].popleft()
        sequence.lane = lane
        self.running[lane] = sequence
        self.started.append(sequence)
        self.lengths[lane] = 0

    def refill(self, lane: int, prompt: int) -> None:
        """Start the prompt's next sample in a lane, if there is one."""
        slot = lane // self.layout.lanes
        if self.pending[slot]:
            self.start(lane)
        elif not any(lane in self.running for lane in self.lanes_of(slot)):
            del self.pending[slot]
            self.ended[slot] = prompt

    def take_ended(self) -> dict[int, int]:
        """{slot: prompt} of slots whose samples have all ended; they are free now.

        Empty until prompts that wait could have an eighth of all slots.
        """
        free = len(self.free_slots) if self.waiting else 0
        if self.running and 8 * (len(self.ended) + free) < self.layout.n_slots:
            return {}
        ended, self.ended = self.ended, {}
        for slot in ended:
            heapq.heappush(self.free_slots, slot)
        return ended

    def lanes_of(self, slot: int) -> range:
        first = slot * self.layout.lanes
        return range(first, first + self.layout.lanes)

    def postprocess(self, step: Step, lengths, growing) -> list[Sequence]:
        """Take in what a step has sampled; returns the sequences that ended.

        lengths [n], growing bool [n]: of the step's lanes, after the step.
        """
        self.lengths[step.lanes] = lengths
        ended = []
        for lane in step.lanes[~growing].tolist():
            ended.append(self.running.pop(lane))
            ended[-1].length = int(self.lengths[lane])
            self.refill(lane, ended[-1].prompt)
        if step.prefill and step.prefill.last:
            for slot in step.prefill.slots.tolist():
                # Slot 0 holds what the prompts share, and no samples.
                for lane in self.lanes_of(slot) if slot else ():
                    self.start(lane)
        return ended


def shared_length(prompts: list[np.ndarray]) -> int:
    """How many tokens all prompts begin with, the last of each left out.

    0 where they are too few to matter, and for a single prompt.
    """
    shortest = min(map(len, prompts)) - 1
    starts = np.stack([prompt[:shortest] for prompt in prompts])
    alike = (starts == starts[0]).all(axis=0)  # [shortest]
    n = int(alike.cumprod().sum())
    return n if n >= 32 and len(prompts) > 1 else 0


# -------------------- the device


class Runner:
    """The model, the cache and the state of all lanes, on the model's device.

    steps_per_sync: tokens sampled in each lane before the host looks again.
    On a GPU the sizes of steps are rounded up, so that few different ones
    occur; each is captured as a CUDA graph and never waits for the host.
    """

    def __init__(self, model, steps_per_sync: int = 0):
        self.model = model
        self.config = model.config
        self.device = model.embed_tokens.weight.device
        self.dtype = model.embed_tokens.weight.dtype
        self.on_cuda = self.device.type == "cuda"
        if self.on_cuda:  # graphs are captured on the current device
            torch.cuda.set_device(self.device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape
        self.static_shapes = self.on_cuda
        self.steps_per_sync = steps_per_sync or (8 if self.on_cuda else 1)
        self.stops = {}  # sets of stop tokens, on the device
        self.release()
        model.pack()
        # fp32 logits: only CUDA multiplies bf16 matrices into fp32.
        self.head = model.head() if self.on_cuda else model.head().float()

    def release(self) -> None:
        """Give the cache back."""
        self.layout = None
        self.prompts = None
        self.own = None
        self.graphs = {}
        if self.on_cuda:
            torch.cuda.empty_cache()
            # A pool without graphs is dead: torch refuses to capture into it again.
            self.graph_pool = torch.cuda.graph_pool_handle()

    def allocate(self, layout: Layout) -> None:
        """Make the cache and the state of its lanes."""
        c = self.config
        n_lanes = layout.n_slots * layout.lanes

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        heads = (c.n_layer, 2, layout.n_slots, c.n_kv_head)
        prompts = (*heads, layout.prompt_len, c.head_dim)
        own = (*heads, layout.lanes, layout.max_new, c.head_dim)
        self.prompts = zeros(*prompts, dtype=self.dtype)
        self.own = zeros(*own, dtype=self.dtype)
        self.prompt_len = zeros(layout.n_slots)
        self.lanes = zeros(n_lanes)  # those of the step come first
        self.last_token = zeros(n_lanes)
        self.length = zeros(n_lanes)
        self.noise = zeros(n_lanes)
        self.growing = zeros(n_lanes, dtype=torch.bool)  # never in lane 0
        self.log_q = zeros(n_lanes, dtype=torch.float64)
        self.ids = zeros(n_lanes, layout.max_new + 1)
        self.layout = layout

    def put(self, array) -> Tensor:
        return torch.as_tensor(array, device=self.device)

    # ---- what the host sends and what it gets back

    def run(self, step: Step, sampling: Sampling):
        """Compute a step. Returns the lengths of its lanes, int64 [n], and
        which of them grow on, bool [n]."""
        self.upload(step, sampling)
        if step.prefill:
            if step.prefill.ids.size:  # else upload() has copied all of it
                self.prefill(step.prefill)
            return step.lengths, step.lengths > 0  # of no lane
        decode, shape = self.replay if self.on_cuda else self.decode, self.shape_of(step)
        for _ in range(self.steps_per_sync):
            decode(shape, sampling)
        lanes = self.lanes[: len(step.lanes)]
        state = torch.stack((self.length[lanes], self.growing[lanes].long()))
        lengths, growing = state.cpu().numpy()
        return lengths, growing > 0

    def upload(self, step: Step, sampling: Sampling) -> None:
        """Tell the device which lanes decode, and what is new in them."""
        self.lanes[:] = 0  # padding, which is computed but never grows
        self.lanes[: len(step.lanes)] = self.put(step.lanes)
        if sampling.stop not in self.stops:
            self.stops[sampling.stop] = self.put(sorted(sampling.stop))
        if step.started:
            rows = [(s.lane, s.last_token, s.noise) for s in step.started]
            lanes, last_token, noise = self.put(rows).T
            self.last_token[lanes] = last_token
            self.noise[lanes] = noise
            self.length[lanes] = 0
            self.log_q[lanes] = 0.0
            self.growing[lanes] = True
        if step.prefill:
            slots, n = self.put(step.prefill.slots), step.prefill.shared_len
            self.prompt_len[slots] = self.put(step.prefill.lengths)
            self.prompts[:, :, slots, :, :n] = self.prompts[:, :, :1, :, :n]

    def shape_of(self, step: Step) -> Shape:
        """The shape of a step, with room until the next sync."""
        shape, layout = step.shape, self.layout
        own_len = shape.own_len + self.steps_per_sync - 1
        lanes, slots, tokens = (32, 8, 64) if self.static_shapes else (1, 1, 1)
        return Shape(
            min(round_up(shape.n_lanes, lanes), len(self.lanes)),
            min(round_up(shape.n_slots, slots), layout.n_slots),
            min(round_up(shape.prompt_len, tokens), layout.prompt_len),
            min(round_up(own_len, tokens), layout.max_new),
        )

    def read(self, lanes) -> tuple[np.ndarray, np.ndarray]:
        """What was sampled in lanes [n]: ids [n, max_new + 1], log_q [n]."""
        lanes = self.put(np.asarray(lanes, dtype=np.int64))
        return self.ids[lanes].cpu().numpy(), self.log_q[lanes].cpu().numpy()

    def replay(self, shape: Shape, sampling: Sampling) -> None:
        """decode() as a CUDA graph.

        The first step of a kind runs as it is, which warms up, and the second
        is captured. All graphs share one pool of memory.
        """
        kind = shape, replace(sampling, seed=0, purpose=0)
        if kind not in self.graphs:
            self.graphs[kind] = None
            return self.decode(shape, sampling)
        if self.graphs[kind] is None:
            torch.cuda.synchronize()
            self.graphs[kind] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[kind], pool=self.graph_pool):
                self.decode(shape, sampling)
        self.graphs[kind].replay()

    # ---- the model on flat tokens

    def decode(self, shape: Shape, sampling: Sampling) -> None:
        """Sample a token in each of the first lanes.

        Nothing comes back from the device.
        """
        lanes = self.lanes[: shape.n_lanes]
        length = self.length[lanes]
        ids = self.last_token[lanes]
        positions = self.prompt_len[lanes // self.layout.lanes] + length
        attend = self.attend_decoding(lanes, shape)
        hidden = self.forward(ids, positions, attend)
        uniform = keyed_uniform(self.noise[lanes], length)
        logits = self.logits(hidden)
        tokens, log_p = draw(logits, uniform, sampling.temperature, sampling.top_p)
        # Samples that had ended before are not counted.
        growing = self.growing[lanes]
        self.ids[lanes, length] = tokens
        self.last_token[lanes] = tokens
        self.log_q[lanes] += torch.where(growing, log_p, 0.0)
        length = length + growing
        self.length[lanes] = length
        stopped = (tokens[:, None] == self.stops[sampling.stop]).any(dim=1)
        self.growing[lanes] = growing & ~stopped & (length < sampling.max_new)

    def prefill(self, chunk: PrefillChunk) -> None:
        """Put the keys and values of a chunk into the cache."""
        B, T = chunk.ids.shape
        positions = torch.arange(T, device=self.device) + chunk.start
        attend = self.attend_prefill(chunk)
        self.forward(self.put(chunk.ids).flatten(), positions.repeat(B), attend)

    def forward(self, ids, positions, attend) -> Tensor:
        """ids [N], positions [N] -> hidden [N, n_embd].

        attend(layer, q, k, v) computes attention: q [N, n_head, head_dim],
        k and v [N, n_kv_head, head_dim] -> like q.
        """

        def flat(layer, q, k, v):  # [1, heads, N, head_dim]
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            return attend(layer, q, k, v).transpose(0, 1)[None]

        return self.model(ids[None], positions[None], flat)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, n_embd] -> fp32 [n, n_vocab], also added up in fp32."""
        if self.on_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, self.head.T, out_dtype=torch.float32)
        return F.linear(hidden.float(), self.head)

    # ---- attention

    def lower_triangle(self, rows: int, columns: int, diagonal: int = 0):
        ones = torch.ones(rows, columns, dtype=torch.bool, device=self.device)
        return ones.tril(diagonal)

    def attend_prefill(self, chunk: PrefillChunk):
        """attend() of a chunk, which sees itself and all that lies before it
        in its prompts, and enters the cache."""
        T = chunk.ids.shape[1]
        start, stop = chunk.start, chunk.start + T
        slots = self.put(chunk.slots)
        mask = self.lower_triangle(T, stop, start) if start else None

        def attend(layer, q, k, v):
            # [B * T, heads, head_dim] -> [B, heads, T, head_dim]
            q, k, v = (x.unflatten(0, (-1, T)).transpose(1, 2) for x in (q, k, v))
            cache = self.prompts[layer]
            cache[0, slots, :, start:stop] = k
            cache[1, slots, :, start:stop] = v
            if start:
                k, v = cache[:, slots, :, :stop]
            return attention(q, k, v, mask).transpose(1, 2).flatten(0, 1)

        return attend

    def attend_decoding(self, lanes: Tensor, shape: Shape):
        """attend() of one new token in each of `lanes` [n].

        Queries are laid out by slot, so that the products read the keys of a
        prompt once for all of its lanes.
        """
        c = self.config
        n_kv, hd = c.n_kv_head, c.head_dim
        group = c.n_head // n_kv
        B, P, S = shape.n_slots, shape.prompt_len, shape.own_len
        C, max_new = self.layout.lanes, self.layout.max_new
        # Ended samples are computed, too, until the host looks.
        length = self.length.clamp(max=max_new - 1)
        hide_prompt = self.hide(self.prompt_len[:B], P, B)
        hide_own = self.hide(length[: B * C] + 1, S, B)
        # Where the new keys lie among the rows of a layer's cache.
        slot, lane = (lanes // C)[:, None], (lanes % C)[:, None]
        head = slot * n_kv + torch.arange(n_kv, device=self.device)
        place = (head * C + lane) * max_new + length[lanes, None]
        place = place.flatten()  # [n * n_kv]

        def attend(layer, q, k, v):
            own = self.own[layer]
            own[0].view(-1, hd).index_copy_(0, place, k.reshape(-1, hd))
            own[1].view(-1, hd).index_copy_(0, place, v.reshape(-1, hd))
            own = own[:, :B, :, :, :S].reshape(2, B * n_kv * C, S, hd)
            prompt = self.prompts[layer, :, :B, :, :P].reshape(2, B * n_kv, P, hd)
            # Queries [B, C, n_kv, group, hd] -> [B * n_kv, C * group, hd],
            # zero where no sample grows.
            q = q.new_zeros(B * C, c.n_head, hd).index_copy_(0, lanes, q)
            q = q.view(B, C, n_kv, group, hd).transpose(1, 2)
            q = q.reshape(B * n_kv, C * group, hd)
            scale = hd**-0.5
            on_prompt = torch.baddbmm(hide_prompt, q, prompt[0].mT, alpha=scale)
            on_prompt = on_prompt.view(-1, group, P)  # [B * n_kv * C, group, P]
            q = q.view(-1, group, hd)
            on_own = torch.baddbmm(hide_own, q, own[0].mT, alpha=scale)
            scores = torch.cat((on_prompt, on_own), dim=-1)
            weight = torch.softmax(scores, dim=-1)
            y = weight.view(B * n_kv, C * group, P + S)[..., :P] @ prompt[1]
            y = y.view(-1, group, hd).baddbmm_(weight[..., P:], own[1])
            y = y.view(B, n_kv, C, group, hd).transpose(1, 2)
            return y.reshape(B * C, c.n_head, hd).index_select(0, lanes)

        return attend

    def hide(self, lengths, width: int, n_slots: int) -> Tensor:
        """lengths [n_slots * m] -> [n_slots * n_kv_head * m, 1, width].

        0 for positions below a length and -inf for the others, to be added to
        the scores.
        """
        lengths = lengths.view(n_slots, 1, -1, 1)
        hidden = torch.arange(width, device=self.device) >= lengths
        hidden = hidden.expand(-1, self.config.n_kv_head, -1, -1)
        hidden = hidden.reshape(-1, 1, width)
        term = torch.zeros_like(hidden, dtype=self.dtype)
        return term.masked_fill_(hidden, -torch.inf)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# -------------------- the engine


class Engine:
    """Samples from a model and scores with it.

    n_rows: how many samples grow side by side at most; 0: as many as memory
    allows, up to 1024.
    """

    LANES = 4  # of a slot, if prompts have as many samples
    PREFILL_TOKENS = 2048  # taken in by one step; a GPU takes as many as it scores
    SCORE_TOKENS = 8192  # scored at once

    def __init__(self, model, n_rows: int = 0, steps_per_sync: int = 0):
        self.model = model
        self.config = model.config
        self.device = model.embed_tokens.weight.device
        if self.device.type == "mps":
            raise UserError("--device=mps: the engine needs float64, which mps lacks; take --device=cpu")
        self.n_rows = n_rows
        self.n_prompts = 0  # for which the cache has been planned
        self.runner = Runner(model, steps_per_sync)
        if self.runner.on_cuda:
            self.PREFILL_TOKENS = self.SCORE_TOKENS

    # ---- memory

    def slot_bytes(self, lanes: int, prompt_len: int, max_new: int) -> int:
        """Bytes of one slot: its keys and values, and what a step allocates for
        each lane (logits twice, scores, the widest layer)."""
        c = self.config
        size = self.runner.dtype.itemsize
        position = 2 * c.n_layer * c.n_kv_head * c.head_dim * size
        scores = c.n_head * (prompt_len + max_new)
        lane = 4 * size * (scores + 2 * c.n_hidden + 4 * c.n_embd)
        lane += 10 * c.n_vocab + 8 * max_new
        if self.runner.static_shapes:
            lane *= 2  # captured steps have memory of their own
        return position * (prompt_len + lanes * max_new) + lanes * lane

    def wanted_lanes(self, samples: int, n_prompts: int) -> tuple[int, int]:
        """(lanes in all, lanes of a slot) if memory did not matter.

        The fewer the prompts, the more lanes each.
        """
        n_lanes = min(self.n_rows or 1024, samples * n_prompts)
        return n_lanes, min(samples, max(self.LANES, n_lanes // n_prompts))

    def plan(self, samples, prompt_len, max_new, n_prompts, sharers: int = 1):
        """(slots, lanes of a slot, bytes beside the weights, bytes free), ints.

        sharers: processes that share the memory. UserError when not even one
        prompt fits.
        """
        c = self.config
        n_lanes, lanes = self.wanted_lanes(samples, n_prompts)
        # A tail is scored whole, however long it is.
        tokens = prompt_len + max_new + self.SCORE_TOKENS
        layer = 8 * c.n_embd + 6 * c.n_hidden + 8 * c.n_head * c.head_dim
        fixed = tokens * self.runner.dtype.itemsize * layer
        fixed += 192 << 20  # for the logits of what is scored
        each = self.slot_bytes(lanes, prompt_len, max_new)
        free = free_memory(self.device) // sharers
        slots = min(-(-n_lanes // lanes), int((0.8 * free - fixed) // each) - 1)
        if slots < 1:
            needed = (fixed + 2 * each) / 1e9
            raise UserError(
                f"one prompt of {prompt_len} tokens with {lanes} samples of "
                f"{max_new} needs {needed:.1f} GB, and 80% of {free / 1e9:.1f} GB "
                "free may be used: lower --max_new, --before, --rows or --workers"
            )
        return slots, lanes, int(fixed + (slots + 1) * each), free

    def reserve(self, samples, prompt_len, max_new, n_prompts) -> None:
        """Allocate the cache, unless the one that is there will do."""
        multiple = 64 if self.runner.static_shapes else 1
        prompt_len = round_up(max(1, prompt_len), multiple)
        max_new = round_up(max(1, max_new), multiple)
        have = self.runner.layout
        if have and self.n_prompts >= n_prompts:
            same = have.lanes == self.wanted_lanes(samples, n_prompts)[1]
            if same and have.prompt_len >= prompt_len and have.max_new >= max_new:
                return
        self.n_prompts = n_prompts
        self.runner.release()
        slots, lanes, *_ = self.plan(samples, prompt_len, max_new, n_prompts)
        self.runner.allocate(Layout(slots + 1, prompt_len, max_new, lanes))

    # ---- sampling

    @torch.inference_mode()
    def generate(
        self, prompts, keys, samples, sampling: Sampling, on_tokens=None, ends=None, on_ended=None
    ) -> list[list[tuple]]:
        """Continue each prompt `samples` times, as sample_slowly does.

        prompts: ids, at least one each. keys: an integer for each prompt,
        which seeds its noise. Returns the samples of each prompt: (ids with
        the stop token if there is one, whether it finished, the sum of its
        log-probabilities). on_tokens(n) is told of every n sampled tokens.
        ends(ids) is asked every 8 tokens whether a sample has ended by what
        it says; it then counts as finished. on_ended({slot: i}, results) is told
        of prompts i whose samples are complete; till it returns, score() can
        read the keys of prompts[i][:-1] from those slots.
        """
        if not len(prompts):
            return []
        prompts = [np.asarray(p, dtype=np.int64) for p in prompts]
        longest = max(map(len, prompts)) - 1
        self.reserve(samples, longest, sampling.max_new, len(prompts))
        keys = np.asarray(keys)[:, None], np.arange(samples)
        noise = hash_state(sampling.purpose, sampling.seed, *keys).astype(np.int64)
        layout = self.runner.layout
        scheduler = Scheduler(prompts, noise, layout, self.PREFILL_TOKENS)
        results = [[None] * samples for _ in prompts]
        while step := scheduler.schedule():
            lengths, growing = self.runner.run(step, sampling)
            if on_tokens and len(lengths):
                on_tokens(int((lengths - step.lengths).sum()))
            if ends:
                self.ask(ends, step.lanes, lengths, growing)
            ended = scheduler.postprocess(step, lengths, growing)
            read = self.runner.read([sequence.lane for sequence in ended])
            for sequence, ids, log_q in zip(ended, *read):
                ids = ids[: sequence.length].copy()
                stopped = int(ids[-1]) in sampling.stop
                finished = stopped or len(ids) < sampling.max_new
                row = results[sequence.prompt]
                row[sequence.sample] = ids, finished, float(log_q)
            ended = scheduler.take_ended()
            if ended and on_ended:
                on_ended(ended, results)
        return results

    def ask(self, ends, lanes, lengths, growing) -> None:
        """Stop the growth of samples that have ended by what they say."""
        asked = np.flatnonzero(growing & (lengths % 8 == 0))
        ids, _ = self.runner.read(lanes[asked])
        for i, row in zip(asked, ids):
            growing[i] = not ends(row[: lengths[i]])

    # ---- scoring

    @torch.inference_mode()
    def score(self, prefixes, tails, slots=None) -> list[list[np.ndarray]]:
        """log p(token | all before it) of the tokens of each prefix's tails.

        prefixes: ids, at least one each. tails: for each prefix a list of ids.
        slots: those of prompts that begin with the prefixes, see generate().
        Returns a float64 array in place of each tail. This is the one fast
        scoring function: log_p of thoughts and chunks, and the NLL of text. Of
        equal tails it computes one.
        """
        tails = [[tuple(np.asarray(t).tolist()) for t in group] for group in tails]
        # The last token of a prefix predicts the first one of a tail.
        known = np.array([len(prefix) - 1 for prefix in prefixes])
        cached = known if slots is not None else np.zeros_like(known)

        def size(row):  # (i, tail); what is read from the cache counts an eighth
            return len(row[1]) + known[row[0]] - cached[row[0]] * 7 // 8

        rows = [(i, t) for i, group in enumerate(tails) for t in dict.fromkeys(group) if t]
        rows.sort(key=size, reverse=True)
        log_p = {}
        for batch in fill(rows, size, self.SCORE_TOKENS):
            n = np.array([cached[i] for i, _ in batch])
            ids = [[*prefixes[i][k:], *tail[:-1]] for (i, tail), k in zip(batch, n)]
            of_rows = None if slots is None else [slots[i] for i, _ in batch]
            found = self.score_batch(ids, [tail for _, tail in batch], n, of_rows)
            log_p |= zip(batch, found)
        none = np.zeros(0)
        return [[log_p[i, t] if t else none for t in row] for i, row in enumerate(tails)]

    def score_batch(self, ids, tails, n_cached, slots) -> list[np.ndarray]:
        """log p of the tokens of tails; ids: of each row those that are computed,
        behind n_cached [R] that lie in slots [R] of the cache."""
        put = self.runner.put
        lengths = np.array(list(map(len, ids)))
        stops = np.cumsum(lengths)
        attend = self.attend_rows(stops - lengths, lengths, n_cached, slots)
        positions = [np.arange(n) + first for n, first in zip(lengths, n_cached)]
        positions = put(np.concatenate(positions))
        hidden = self.runner.forward(put(np.concatenate(ids)), positions, attend)
        source = [np.arange(stop - len(tail), stop) for stop, tail in zip(stops, tails)]
        source = put(np.concatenate(source))
        target = put(np.concatenate(tails))
        n = max(1, (64 << 20) // (4 * self.config.n_vocab))  # 64 MB of logits
        log_p = [
            -F.cross_entropy(self.runner.logits(hidden[s]), t, reduction="none")
            for s, t in zip(source.split(n), target.split(n))
        ]
        log_p = torch.cat(log_p).double().cpu().numpy()
        return np.split(log_p, np.cumsum([len(tail) for tail in tails])[:-1])

    def attend_rows(self, starts, lengths, n_cached, slots):
        """attend() of R rows of tokens, behind what the cache holds of each."""
        row, back = self.padded(starts, lengths)  # [R, T]
        (R, T), P = row.shape, int(n_cached.max())
        mask, cache = None, self.runner.prompts
        if P:  # what is seen of the cache, and of the row itself: [R, 1, T, P + T]
            slots = self.runner.put(slots)
            seen = self.runner.put(np.arange(P) < n_cached[:, None])
            causal = self.runner.lower_triangle(T, T).expand(R, -1, -1)
            mask = torch.cat((seen[:, None].expand(-1, T, -1), causal), dim=2)[:, None]

        def attend(layer, q, k, v):
            # [N, heads, head_dim] -> [R, heads, T, head_dim]
            q, k, v = (x[row].transpose(1, 2) for x in (q, k, v))
            if P:
                k = torch.cat((cache[layer, 0, slots, :, :P], k), dim=2)
                v = torch.cat((cache[layer, 1, slots, :, :P], v), dim=2)
            return attention(q, k, v, mask).transpose(1, 2)[back]

        return attend

    def padded(self, starts, lengths) -> tuple[Tensor, tuple]:
        """Index [n, longest] of the tokens of sequences, and the rows and columns
        of those that are real: a mask as an index would wait for the device."""
        column = np.arange(max(1, lengths.max()))
        real = column < lengths[:, None]
        index = np.where(real, starts[:, None] + column, 0)
        return self.runner.put(index), tuple(map(self.runner.put, np.nonzero(real)))


def fill(items, size, limit: int) -> list[list]:
    """Lists of consecutive items, largest first; each counts as much as the
    first of its list, to which it is padded. One that is too large is alone."""
    lists = []
    for item in items:
        if not lists or (len(lists[-1]) + 1) * size(lists[-1][0]) > limit:
            lists.append([])
        lists[-1].append(item)
    return lists


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had of the GPU, or of the machine or its
    container, whichever has less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # no Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit there
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").open())
        # What only caches files can be taken back.
        free = min(free, limit - used + int(stat["file"]))
    return max(0, free)
