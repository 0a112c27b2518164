"""Train a Llama-family model on text with latent thoughts (the M-step), or on plain text.

Maximise, over documents, the log-likelihood of their token sequences. A chunk x with a
thought z is written in one of two forms, by a coin flip drawn anew in each epoch
(layout() in data/lib/corpus.py writes both):

    prior      before SOL PRI z EOL x              teaches p(z, x | before): think, then write
    posterior  before SOL EOL x SOL POS z EOL      teaches q(z | before, x): read, then recover z

A chunk without a thought is written as x alone. The loss is the mean cross-entropy of all
tokens (--loss=completion: of those that answer a question). All parameters decay, as in the
paper's code and torchtitan; nanoGPT and Hugging Face's Trainer spare norms and biases.

    # the toy, on a CPU
    python train.py --corpus=out/digits/warm --thoughts=out/digits/warm_thoughts --out_dir=out/M0
    # one GPU, eight (FSDP2), two nodes of eight (HSDP)
    python train.py --preset=tinyllama-1.1b --init_from=FOLDER --corpus=C --thoughts=T --out_dir=M
    torchrun --nproc_per_node=8 train.py --preset=tinyllama-1.1b ...
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py ... --replicas=2
    # what would it take? and: only add the marker tokens
    python train.py --preset=tinyllama-1.1b --plan=8xH100
    python train.py --init_from=FOLDER --max_steps=0 --out_dir=OUT

Model folders (--init_from, --out_dir) have Hugging Face's layout. On several machines
--out_dir must be on a file system that all of them share.

The same command goes on where a run was cut off, also on other devices; on as many CPU
processes it ends in the same weights, bit for bit. SIGTERM and Ctrl-C save before they
end. Checkpoints contain a pickle: resume only your own.

Out of memory? First --micro_batch=4 (fewer rows at once, the same result), then
--recompute (a third slower), then more devices.

Source: Ruan, Band, Maddison, Hashimoto 2025, arXiv 2503.18866, sections 3 and 4.
"""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from data.lib import model_folder
from data.lib.checkpoint import Position, load_checkpoint, save_checkpoint
from data.lib.cli import UserError, claim, opt, run
from data.lib.kernels import attention, head_loss, joined, warn_of_slow_bfloat16
from data.lib.log import Interrupt, Log, write_report
from data.lib.plan import amounts, describe, micro_plan, print_plan, steps_of
from data.lib.presets import PRESETS
from data.lib.ranks import add_up, is_sharded, join_ranks, put, rank, shard_offset, world
from data.lib.stream import Batch, Stream, open_stream, rows_of
from data.lib.tokenizer import Tokenizer, load_tokenizer

# ---- settings


@dataclass(kw_only=True)
class Settings:
    preset: Literal[tuple(PRESETS)] = opt("toy", "defaults for a model and its recipe")
    # Input and output. Corpora and thoughts can be lists: --corpus=A,B --thoughts=TA,
    corpus: str = opt("", "corpus folders, with commas between")
    thoughts: str = opt("", "a thoughts folder for each corpus; none: plain text")
    weights: str = opt("", "share of the tokens from each corpus: 0.7,0.3; none: by size")
    init_from: str = opt("", "model folder to start from; none: new weights")
    marker_rows: Literal["random", "words"] = opt("random", "added markers: drawn rows, or those of words")
    out_dir: str = opt("", "model folder to write")
    thoughts_only: bool = opt(False, "leave out documents without any thought")
    bare: float = opt(0.0, "share of chunks without their thought, for --context=bare", low=0)
    val_corpus: str = opt("", "corpus folder for the validation loss")
    val_thoughts: str = opt("", "its thoughts folder")
    val_every: int = opt(100, "steps between validations (and one at the end)", low=1)
    # Model: the toy's size. With --init_from that folder decides.
    n_layer: int = opt(3, "transformer blocks", low=1)
    n_head: int = opt(2, "query heads", low=1)
    n_kv_head: int = opt(1, "key and value heads; below --n_head: grouped-query attention", low=1)
    n_embd: int = opt(64, "width", low=2)
    n_hidden: int = opt(0, "SwiGLU's width; 0: 8/3 of --n_embd, rounded up to 16", low=0)
    n_vocab: int = opt(0, "rows of the embedding; 0: as many as the tokenizer has ids", low=0)
    rope_theta: float = opt(20.0, "rotary base; 1e4 beyond a few hundred tokens", low=1)
    tie_embeddings: bool = opt(True, "one matrix for input and output embeddings")
    # Sequences
    seq_len: int = opt(512, "tokens a row", low=8)
    attention: Literal["padded", "packed", "document"] = opt(
        "padded", "a document a row; packed rows (the paper's); packed, attention within documents"
    )
    loss: Literal["all", "completion"] = opt("all", "of all tokens; of what answers a question")
    batch_size: int = opt(16, "rows an optimiser step, over all devices", low=1)
    micro_batch: int = opt(0, "rows that a device computes at once; 0: --batch_size / devices", low=0)
    # Optimisation
    max_steps: int = opt(300, "optimiser steps; 0: only write the model", low=0)
    max_tokens: int = opt(0, "if above 0: the number of steps comes from so many tokens", low=0)
    optimizer: Literal["muon", "adamw"] = opt("muon", "for the blocks' matrices; AdamW has the rest")
    lr: float = opt(1e-2, "peak learning rate of AdamW", low=0)
    muon_lr: float = opt(0.02, "peak learning rate of Muon", low=0)
    weight_decay: float = opt(0.1, "decoupled, of all parameters, norms and embeddings too", low=0)
    schedule: Literal["cosine", "wsd"] = opt("cosine", "wsd: warm-up, stable, decay")
    warmup: int = opt(10, "steps of linear warm-up", low=0)
    final_lr: float = opt(0.0, "end of the schedule, as a share of the peak", low=0)
    clip: float = opt(1.0, "largest gradient norm; 0: no clipping", low=0)
    # System
    dtype: Literal["auto", "float32", "bfloat16"] = opt(
        "auto", "of the arithmetic and the saved weights; auto: --init_from's, else float32"
    )
    compile: bool = opt(False, "torch.compile each block; a minute at the start")
    recompute: bool = opt(False, "recompute blocks in the backward pass: slower, far less memory")
    replicas: int = opt(1, "HSDP: copies of the model, each sharded over devices / replicas", low=1)
    save_every: int = opt(50, "steps between checkpoints; the newest two are kept", low=1)
    seed: int = opt(0, "initial weights, order of documents, coin flips", low=0)
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")
    plan: str = opt("", "only print sizes, memory and time for devices: 8xH100, ..., or here")


# What may differ between two runs that fill one folder: how the work is done.
HOW = ("device", "micro_batch", "compile", "recompute", "replicas", "save_every", "plan")


# ---- model


@dataclass(kw_only=True)
class Config:
    """What decides the shapes and the arithmetic of a model."""

    n_vocab: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_hidden: int
    head_dim: int
    seq_len: int
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's; no other kind is supported
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    model_type: str = "llama"  # or qwen2, qwen3
    attention_bias: bool = False
    dtype: str = "float32"  # of the arithmetic, and of the saved weights

    qkv_bias = property(lambda c: c.attention_bias or c.model_type == "qwen2")
    out_bias = property(lambda c: c.attention_bias and c.model_type != "qwen2")
    qk_norm = property(lambda c: c.model_type == "qwen3")


# attend(layer, q, k, v) -> y replaces causal self-attention. q and y: [B, n_head, T,
# head_dim]; k and v: [B, n_kv_head, T, head_dim]. The sampler passes one that keeps keys
# and values (data/lib/engine.py); the model itself knows of no cache.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Linear(nn.Linear):
    """Computes in the dtype of its input. On one device fp32 weights are cast here; under
    FSDP they arrive in that dtype."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = c.head_dim
        self.heads = (c.n_head, c.n_kv_head, c.n_kv_head)  # of q, k, v
        self.q_proj = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.qkv_proj = None  # the three projections as one, see Llama.pack

    def project(self, x):
        """x [B, T, n_embd] -> q [B, T, n_head, head_dim], k and v [B, T, n_kv_head, head_dim]."""
        if self.qkv_proj and not torch.is_grad_enabled():
            qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
            return qkv.split(self.heads, dim=2)
        products = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return [y.unflatten(-1, (-1, self.head_dim)) for y in products]

    def forward(self, x, rope, mask, attend: Attend | None):
        q, k, v = self.project(x)
        q = rotate(self.q_norm(q).transpose(1, 2), rope)  # [B, n_head, T, head_dim]
        k = rotate(self.k_norm(k).transpose(1, 2), rope)  # [B, n_kv_head, T, head_dim]
        v = v.transpose(1, 2)
        y = attend(self.layer, q, k, v) if attend else attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, T, n_embd]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.n_embd, c.n_hidden, bias=False)
        self.up_proj = Linear(c.n_embd, c.n_hidden, bias=False)
        self.down_proj = Linear(c.n_hidden, c.n_embd, bias=False)
        self.gate_up_proj = None  # the first two projections as one, see Llama.pack

    def forward(self, x):
        if self.gate_up_proj and not torch.is_grad_enabled():
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)
        self.recompute = False

    def compute(self, x, rope, mask, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, attend)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, rope, mask, attend):
        if self.recompute and torch.is_grad_enabled():
            return recompute_in_backward(self.compute, x, rope, mask, attend, use_reentrant=False)
        return self.compute(x, rope, mask, attend)


def rope_frequencies(c: Config) -> torch.Tensor:
    """The angle a position for each pair of coordinates, [head_dim / 2]. Llama 3 stretches
    the slow ones for longer contexts. The operations are transformers' one by one, so that
    the angles are equal to the last bit."""
    frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if not c.rope_scaling:
        return frequency
    factor, low, high, old_context = (c.rope_scaling[k] for k in model_folder.LLAMA3_ROPE)
    turns = old_context / (2 * math.pi / frequency)  # within the context of its first training
    # Pairs of many turns stay as they are; those of fewer than `low` are slowed by `factor`.
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def rope_table(positions, frequency, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions [B or 1, T], each [B or 1, 1, T, head_dim]; both halves are
    alike (Hugging Face's order)."""
    angle = positions[:, None, :, None].float() * frequency  # [B, 1, T, head_dim / 2]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, rope):
    """Rotary embedding (Su et al. 2021): turn the pairs (i, i + head_dim / 2) of each head
    by the angles of its position."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Llama(nn.Module):
    """Decoder-only transformer with Hugging Face's parameter names."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.frequency = None  # of rope; on the device from the first forward on
        # Values come later. To draw some on the meta device torch would import its
        # compiler, which takes seconds.
        values = torch.empty(c.n_vocab, c.n_embd)
        self.embed_tokens = nn.Embedding(c.n_vocab, c.n_embd, _weight=values)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.lm_head = None
        if not c.tie_embeddings:
            self.lm_head = Linear(c.n_embd, c.n_vocab, bias=False)

    def forward(
        self, ids, positions=None, attend: Attend | None = None, targets=None, documents=None
    ):
        """ids [B, T] -> hidden states [B, T, n_embd]; logits() gives the rest. With targets
        [B, T]: their summed cross-entropy in nats (-1: not counted), because under FSDP
        the head's weight is whole only inside of forward.

        positions [B, T] default to 0..T-1. `attend` replaces causal attention. documents
        [B, T] keeps attention within equal numbers.
        """
        T = ids.shape[1]
        if positions is None:
            positions = torch.arange(T, device=ids.device)[None]
        mask = None
        if documents is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
            same = documents[:, :, None] == documents[:, None, :]  # [B, T, T]
            mask = (same & causal)[:, None]  # [B, 1, T, T]
        dtype = getattr(torch, self.config.dtype)
        if self.frequency is None or self.frequency.device != ids.device:
            # Once, for a captured CUDA graph must not copy from the host.
            self.frequency = rope_frequencies(self.config).to(ids.device)
        x = self.embed_tokens(ids).to(dtype)
        rope = rope_table(positions, self.frequency, dtype)
        for layer in self.layers:
            x = layer(x, rope, mask, attend)
        x = self.norm(x)
        return x if targets is None else head_loss(x, self.head(), targets)

    def pack(self) -> None:
        """For sampling: q, k and v come from one product, gate and up from another. The
        parameters keep their names."""
        for layer in self.layers:
            heads, mlp = layer.self_attn, layer.mlp
            heads.qkv_proj = joined(heads.q_proj, heads.k_proj, heads.v_proj)
            mlp.gate_up_proj = joined(mlp.gate_proj, mlp.up_proj)

    def head(self) -> torch.Tensor:
        """The output embedding [n_vocab, n_embd]."""
        return (self.lm_head or self.embed_tokens).weight

    def logits(self, hidden):
        """hidden [..., n_embd] -> fp32 logits [..., n_vocab]."""
        return F.linear(hidden, self.head().to(hidden.dtype)).float()


# ---- weights and folders


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Normal(0, 1/sqrt(fan-in)), embeddings 0.1. Projections back into the residual stream
    are scaled down by depth (GPT-2). Norms are 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            put(p, torch.ones(p.shape) if "norm" in name else torch.zeros(p.shape))
            continue
        std = 0.1 if "embed" in name else p.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * model.config.n_layer)
        put(p, torch.randn(p.shape, generator=generator) * std)


def load_weights(model: Llama, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into a model, each rank its own part. Where an embedding has more rows
    than its tensor, the others are left as they are."""
    for name, p in model.named_parameters():
        put(p, tensors[name])


def build(c: Config, device: str, shard: Callable = lambda model: None) -> Llama:
    """A model without values on a device. It is sharded, if at all, while it is still on
    the meta device, so that no rank ever holds all of it."""
    try:
        with torch.device("meta"):
            model = Llama(c)
    except (RuntimeError, TypeError) as e:  # sizes that no tensor can have
        raise UserError(f"these sizes make no model ({str(e).splitlines()[0]})") from None
    shard(model)
    return model.to_empty(device=device)


def open_folder(folder: Path) -> tuple[Config, Tokenizer]:
    """Configuration and tokenizer of a model folder; UserError if they do not fit."""
    c = Config(**model_folder.read_config(folder))
    tok = load_tokenizer(folder)
    model_folder.check_vocabulary(folder, c.n_vocab, tok)
    return c, tok


def read_tensors(folder: Path, c: Config) -> dict[str, torch.Tensor]:
    """The weights of a folder with configuration c, checked before the model is made."""
    # This comes first, so that no config.json can ask for a billion layers.
    tensors, path = model_folder.read_weights(folder, c.n_layer)
    try:
        shapes = {name: list(p.shape) for name, p in build(c, "meta").named_parameters()}
    except UserError as e:
        raise UserError(f"{folder / 'config.json'}: {e}") from None
    return model_folder.check_weights(path, c, tensors, shapes)


def load_model(folder, device: str = "cpu", dtype: str = "float32") -> tuple[Llama, Tokenizer]:
    """Read a model folder for inference; UserError for anything that is missing, damaged or
    of another architecture."""
    folder = Path(folder)
    c, tok = open_folder(folder)
    if tok.new_markers:
        add = f"train.py --init_from={folder} --max_steps=0 --out_dir=..."
        raise UserError(f"{folder}: has no marker tokens; add them by {add}")
    tensors = read_tensors(folder, c)
    model = build(replace(c, dtype=dtype), device, lambda model: model.to(getattr(torch, dtype)))
    load_weights(model, tensors)
    return model.eval(), tok


def shard_model(model: Llama, s: Settings, dtype: str, device: str) -> None:
    """FSDP2: each block, then the rest, is sharded over the devices. Weights are gathered
    in `dtype`, gradients reduced in fp32 (as in the paper).

    --replicas=R (HSDP) shards over devices / R instead and keeps R copies: for several
    nodes with slow links between them.
    """
    if world() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, names = (world(),), ("shard",)
    if s.replicas > 1:
        shape, names = (s.replicas, world() // s.replicas), ("replicate", "shard")
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


# ---- optimisers


def newton_schulz(g: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Roughly the nearest (semi-)orthogonal matrix to each g [n, rows, cols]: singular
    values go to about 0.7 .. 1.2.

    Quintic iteration with Jordan et al.'s coefficients (kellerjordan.github.io/posts/muon).
    It is done in fp32: on a CPU bf16 takes a hundred times longer, and the matrices are
    small.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).contiguous()  # [n, short, long side]
    for _ in range(rounds):
        gram = x @ x.mT  # [n, short, short]
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT if tall else x


def muon_direction(g: torch.Tensor) -> torch.Tensor:
    """g [n, rows, cols] orthogonalised; tall matrices get longer steps."""
    _, rows, cols = g.shape
    return newton_schulz(g) * max(1, rows / cols) ** 0.5


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), for the weights that are matrices."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}
            for p in group["params"]:
                if is_sharded(p):
                    self.update_sharded(p, group)
                elif p.device.type == "cpu":
                    same_shape.setdefault(p.shape, []).append(p)
                else:
                    self.update_whole([p], group)
            for params in same_shape.values():  # together, which saves time on a CPU
                self.update_whole(params, group)

    def update_whole(self, params: list, group: dict) -> None:
        """Update matrices of one shape."""
        grads = [p.grad for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        directions = muon_direction(torch.stack(nesterov))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(directions.unbind()), alpha=-group["lr"])

    def update_sharded(self, p, group: dict) -> None:
        """Update a matrix whose rows are spread over ranks. Each rank orthogonalises all of
        it and keeps its rows: the result is right, but the work is not shared."""
        momentum = self.state[p]["momentum"]
        momentum.lerp_(p.grad, 1 - group["momentum"])
        nesterov = p.grad.lerp(momentum, group["momentum"]).full_tensor()
        direction = muon_direction(nesterov[None])[0]
        rows = p.to_local()
        first = shard_offset(p)
        rows.mul_(1 - group["lr"] * group["weight_decay"])
        rows.add_(direction[first : first + len(rows)], alpha=-group["lr"])


def make_optimizers(model: Llama, s: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices if asked for, AdamW for all else; each group remembers
    its peak rate. Their state exists before the first step, so that a checkpoint can be
    read into it."""
    matrices = []
    if s.optimizer == "muon":
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    decay = s.weight_decay
    adamw = torch.optim.AdamW(rest, s.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True)
    for p in rest:
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    optimizers = [adamw]
    if matrices:
        optimizers.append(Muon(matrices, lr=s.muon_lr, weight_decay=decay))
    for group in parameter_groups(optimizers):
        group["peak"] = group["lr"]
    return optimizers


def parameter_groups(optimizers) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def schedule(step: int, steps: int, warmup: int, final: float, kind: str = "cosine") -> float:
    """The learning rate at a step, as a share of its peak: linear warm-up, then a cosine
    down to `final`; or (wsd) constant, and linear over the last fifth."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "wsd":
        return final + (1 - final) * min(1.0, (steps - step) / max(1, steps // 5))
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


# ---- what a run is made of


def make_config(s: Settings, n_vocab: int) -> Config:
    """Configuration of a new model."""
    if s.n_embd % s.n_head or s.n_head % s.n_kv_head or (s.n_embd // s.n_head) % 2:
        raise UserError(
            f"--n_embd={s.n_embd} must be an even multiple of --n_head={s.n_head}, "
            f"and that a multiple of --n_kv_head={s.n_kv_head}"
        )
    if s.n_vocab and s.n_vocab < n_vocab:
        raise UserError(f"--n_vocab={s.n_vocab}: the tokenizer has {n_vocab} ids")
    same = ("n_layer", "n_head", "n_kv_head", "n_embd", "seq_len", "rope_theta", "tie_embeddings")
    return Config(
        **{name: getattr(s, name) for name in same},
        n_vocab=s.n_vocab or n_vocab,
        n_hidden=s.n_hidden or math.ceil(s.n_embd * 8 / 3 / 16) * 16,
        head_dim=s.n_embd // s.n_head,
        dtype="float32" if s.dtype == "auto" else s.dtype,
    )


def extend_config(s: Settings, c: Config, tok: Tokenizer) -> Config:
    """Configuration of a model that starts from a folder's c: with room for the markers,
    and in the dtype asked for."""
    for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
        asked, found = getattr(s, name), getattr(c, name)
        if asked not in (found, Settings.__dataclass_fields__[name].default):
            raise UserError(
                f"--{name}={asked}, but {s.init_from} has {found}; "
                "leave sizes to --init_from, or take its preset"
            )
    if s.max_steps and s.seq_len > c.seq_len:
        raise UserError(f"--seq_len={s.seq_len}: {s.init_from} was made for {c.seq_len} tokens at most")
    dtype = c.dtype if s.dtype == "auto" else s.dtype
    return replace(c, n_vocab=max(c.n_vocab, tok.n_vocab), dtype=dtype)


def open_all(s: Settings) -> tuple[Config, Config | None, Tokenizer | None, Stream | None]:
    """What a run is made of, read before anything is written: the model's configuration,
    that of --init_from, the tokenizer and the training stream.

    Raises UserError for what is missing or does not fit together.
    """
    source, tok, stream = None, None, None
    if s.init_from:
        source, tok = open_folder(Path(s.init_from))
    if s.corpus:
        stream = open_stream(s.corpus, s.thoughts, s.weights, tok, rows_of(s, s.seed))
        tok = stream.tok
    elif not s.plan and (s.max_steps or not source):
        raise UserError("--corpus=... is required: the corpus folder to train on")
    if not s.out_dir and not s.plan:
        raise UserError("--out_dir=... is required: the model folder to write")
    if source:
        return extend_config(s, source, tok), source, tok, stream
    if not stream and not s.n_vocab:
        needs = "--n_vocab, or a preset that has one"
        raise UserError(f"--plan without --corpus or --init_from needs {needs}")
    return make_config(s, tok.n_vocab if tok else s.n_vocab), None, tok, stream


def start_model(
    s: Settings, c: Config, tensors: dict | None, tok: Tokenizer | None, device: str
) -> Llama:
    """The model with its first weights, new ones or those of a folder, on this rank's
    device; sharded if there are several ranks."""
    model = build(c, device, lambda model: shard_model(model, s, c.dtype, device))
    if tensors is None:
        init_weights(model, s.seed)
    else:
        load_weights(model, tensors)
        if tok.new_markers:
            model_folder.add_markers(model, tok, s.marker_rows)
    for layer in model.layers:
        layer.recompute = s.recompute
        if s.compile:
            # Block by block: quick, without FSDP's hooks, and no parameter changes its name.
            layer.compute = torch.compile(layer.compute)
    return model


# ---- training

VAL_ROWS = 512  # documents (padded) or packed rows of the validation loss


def loss_of(model: Llama, batch: Batch, device: str) -> torch.Tensor:
    """Summed cross-entropy of a micro-batch in nats."""
    moved = [x if x is None else x.to(device, non_blocking=True) for x in batch]
    ids, targets, documents = moved
    return model(ids, targets=targets, documents=documents)


def train_step(
    model: Llama, optimizers, batches: list[Batch], n_targets: int, s: Settings, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimiser step on this rank's micro-batches; n_targets is that of all ranks.

    Returns this rank's part of the mean loss in nats a token, and the gradient norm, both
    as tensors that nobody has waited for.
    """
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        if world() > 1:
            model.set_requires_gradient_sync(i == len(batches) - 1)
        loss = loss_of(model, batch, device)
        # FSDP takes the mean of the gradients over ranks, but the sum is wanted.
        (loss * (world() / n_targets)).backward()
        total += loss.detach() / n_targets
    norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm.full_tensor() if is_sharded(norm) else norm


@torch.no_grad()
def validate(model: Llama, stream: Stream, micro_rows: int, device: str) -> float:
    """Mean loss in nats a token on the first VAL_ROWS rows of a stream, or on one epoch if
    that is less: the same rows each time."""
    n = min(VAL_ROWS, stream.rows_of_epoch())
    # Each rank has as many micro-batches, because FSDP gathers weights in each forward.
    groups = math.ceil(n / (micro_rows * world())) * world()
    batches = stream.micro_batches(0, n, groups, slice(rank(), None, world()))
    total = 0.0
    for batch in batches:
        total += loss_of(model, batch, device).item()
    if world() > 1:
        model.reshard()
    return add_up(total)[0] / stream.n_targets(0, n)


@dataclass
class Run:
    """What the training loop works with."""

    s: Settings
    device: str
    steps: int
    model: Llama
    optimizers: list
    stream: Stream | None
    validation: Stream | None

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; none behind the last one."""
        if step >= self.steps:
            return []
        size = self.s.batch_size
        micro_steps, _ = micro_plan(self.s, world())
        mine = slice(rank(), None, world())
        return self.stream.micro_batches(step * size, size, micro_steps * world(), mine)


def training_loop(job: Run, position: Position, interrupt: Interrupt) -> Position:
    """All steps from a position on; where they ended. An interrupt saves and exits."""
    s, model, optimizers = job.s, job.model, job.optimizers
    out_dir = Path(s.out_dir)
    log = Log(s, model.config, job.device, job.steps, position)
    tokens = position.tokens
    batches = job.batches(position.step)
    for step in range(position.step, job.steps):
        done = step + 1
        # Nothing draws from this generator, but a dropout that you add resumes exactly.
        torch.manual_seed((s.seed << 32) + step * world() + rank() & 2**63 - 1)
        share = schedule(step, job.steps, s.warmup, s.final_lr, s.schedule)
        for group in parameter_groups(optimizers):
            group["lr"] = group["peak"] * share
        n_targets = job.stream.n_targets(step * s.batch_size, s.batch_size)
        loss, norm = train_step(model, optimizers, batches, n_targets, s, job.device)
        tokens += n_targets
        if s.attention == "padded":
            tokens += s.batch_size  # a document's first token is no target, but is read
        begin = time.time()
        batches = job.batches(done)  # while a GPU still works on this step
        log.data_seconds += time.time() - begin
        loss, stop = add_up(loss.item(), interrupt.signal)  # each rank has a part of the mean
        norm = float(norm)
        log.step(done, loss, norm, share, tokens)
        if job.validation and (done % s.val_every == 0 or done == job.steps):
            _, micro_rows = micro_plan(s, world())
            val_loss = validate(model, job.validation, micro_rows, job.device)
            log.write({"step": done, "val_loss": val_loss})
        if done < job.steps and (stop or done % s.save_every == 0):
            save_checkpoint(out_dir, model, optimizers, Position(done, tokens, log.seconds()))
        if done < job.steps and stop:
            interrupt.leave(done)
    return Position(job.steps, tokens, log.seconds())


def train(s: Settings, device: str) -> None:
    """A whole run: read the inputs, make or resume the model, train it, write its folder."""
    config, source, tok, stream = open_all(s)
    validation = None
    if s.val_corpus:
        rows = replace(rows_of(s, seed=0), thoughts_only=False)
        validation = open_stream(s.val_corpus, s.val_thoughts, "", tok, rows)
    steps, step_tokens = steps_of(s, stream)
    if s.plan:
        print_plan(config, s, stream, steps, step_tokens, device)
        return
    micro_steps, micro_rows = micro_plan(s, world())
    out_dir = Path(s.out_dir)
    complete = (out_dir / "config.json").exists()
    tensors = None
    if source and not complete:
        tensors = read_tensors(Path(s.init_from), source)
    if rank() == 0:
        if complete and not (out_dir / "settings.json").exists():
            whose = "a model that train.py did not make"
            raise UserError(f"{out_dir}: holds {whose}; give another --out_dir")
        claim(out_dir, s, HOW)
    if complete:
        print(f"{out_dir}: complete")
        return
    add_up(0)  # no rank looks for checkpoints before the first one has made the folder
    warn_of_slow_bfloat16(device, config.dtype)
    model = start_model(s, config, tensors, tok, device)
    optimizers = make_optimizers(model, s)
    start = load_checkpoint(out_dir, model, optimizers)
    n_params = sum(p.numel() for p in model.parameters())
    work = f"{micro_steps} x {micro_rows} on each of {world()} x {device}"
    rows = f"{steps} steps of {s.batch_size} rows ({work})"
    print(f"{n_params:,} parameters, {rows}, from step {start.step}")
    if steps:
        for row in amounts(stream, steps * step_tokens):
            print(describe(row))
    job = Run(s, device, steps, model, optimizers, stream, validation)
    with Interrupt() as interrupt:
        end = training_loop(job, start, interrupt)
        if rank() == 0:
            write_report(s, stream, end, n_params)
        model_folder.save_model(out_dir, model, tok)
        if rank() == 0:
            shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)


def main(s: Settings) -> None:
    device = join_ranks(s.device)
    try:
        train(s, device)
    except torch.OutOfMemoryError as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"{device}: out of memory; lower --micro_batch or --seq_len, use --recompute, "
            f"or more devices ({reason})"
        ) from None
    # Not after an error: the other ranks may wait for this one, and it would wait for them.
    if dist.is_initialized():
        dist.barrier()  # gloo's threads can abort a process whose peer is already leaving
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, Settings, PRESETS)
