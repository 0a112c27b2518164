"""Train a Llama-family model on text with latent thoughts (the M-step), or on plain text (the baselines).

Maximise, over documents, the log-likelihood of their token sequences. A chunk x with a thought z is written in one of two
forms, by a coin flip drawn anew in each epoch (data/lib/corpus.py lays both out):

    prior      before SOL PRI z EOL x              teaches  p(z, x | before): think, then write
    posterior  before SOL EOL x SOL POS z EOL      teaches  q(z | before, x): read, then recover the thought

A chunk without a thought is written as x alone. The loss is the mean cross-entropy of all tokens (--loss=completion: of
those that answer a question).

    python train.py --corpus=out/digits/warm --thoughts=out/digits/warm_thoughts --out_dir=out/M0            # the toy, on a CPU
    python train.py --preset=tinyllama-1.1b --init_from=TinyLlama_v1.1 --corpus=C --thoughts=T --out_dir=M   # one GPU
    torchrun --nproc_per_node=8 train.py --preset=tinyllama-1.1b ...                                         # eight: FSDP2
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ... --replicas=2   # two nodes: HSDP
    python train.py --preset=tinyllama-1.1b --plan --plan_device=8xH100                                      # what would it take?
    python train.py --init_from=FOLDER --max_steps=0 --out_dir=OUT                                           # only add the markers

--init_from and --out_dir are model folders in Hugging Face's layout (config.json, model.safetensors, tokenizer files): what the hub
has opens here, what is written here opens in transformers. The same command goes on where a run was cut off, also on another number of
devices; on a CPU and the same number of processes it ends in the same weights, bit for bit. Whatever is random is a function of --seed and
the position in the stream, so a checkpoint holds weights, optimiser state and the step, nothing else. Checkpoints (torch.distributed.checkpoint) contain a pickle:
resume only your own.

Out of memory? First --micro_batch=4 (fewer rows at once, the same result), then --recompute (a third slower), then more devices.
--corpus=A,B --thoughts=TA, --weights=0.7,0.3 takes 70% of the tokens from A with thoughts and 30% from B as plain text.
--attention=padded is for short documents, a row each; packed fills rows and attends across documents, as in the paper; document
fills rows and attends within documents. SIGTERM and Ctrl-C save before they end (torchrun allows 30 seconds for it). On several
machines --out_dir must be on a file system that all of them share. MFU counts 6 FLOPs a parameter that multiplies and 12 T a query
coordinate and layer, against the dense bf16 peak of the device's data sheet.

Source: Ruan, Band, Maddison, Hashimoto 2025, arXiv 2503.18866, sections 3 and 4.
"""

import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from data.lib.checkpoint import load_checkpoint, save_checkpoint
from data.lib.cli import Progress, UserError, append_jsonl, claim, opt, run, write_json
from data.lib.corpus import open_corpus, open_thoughts
from data.lib.kernels import CausalAttention, head_loss
from data.lib.model_folder import LLAMA3_ROPE, check_weights, read_config, save_model
from data.lib.plan import amounts, flops_per_token, micro_plan, print_plan, this_device, used_memory
from data.lib.ranks import add_up, join_ranks, put, rank, shard_offset, whole, world
from data.lib.stream import Batch, Stream
from data.lib.tokenizer import Tokenizer, load_tokenizer

# What a preset changes; flags given beside it win. The paper's 1B recipe is in its section 4 and appendix.
BIG = dict(attention="packed", optimizer="adamw", lr=1e-4, final_lr=1e-6, weight_decay=0.01, warmup=1000, dtype="bfloat16", log_every=1, save_every=500, val_every=500)
TINYLLAMA = dict(n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_hidden=5632, seq_len=2048, rope_theta=1e4, tie_embeddings=False, n_vocab=32004)
SMOLLM2 = dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_hidden=1536, seq_len=1024, rope_theta=1e5, tie_embeddings=True, n_vocab=49156)
PRESETS = {
    "toy": {},
    "smollm2-135m": BIG | SMOLLM2 | dict(batch_size=8, micro_batch=2, lr=3e-4, warmup=20, save_every=50, val_every=50),
    "tinyllama-1.1b": BIG | TINYLLAMA | dict(batch_size=192, micro_batch=8, compile=True, max_steps=33060),
    "tinyllama-1.1b-warm": BIG | TINYLLAMA | dict(batch_size=96, micro_batch=8, compile=True, max_steps=4069),
}


@dataclass(kw_only=True)
class Settings:
    preset: Literal[tuple(PRESETS)] = opt("toy", "defaults for a model and its recipe")
    # what goes in and out; corpora and thoughts can be lists: --corpus=A,B --thoughts=TA,
    corpus: str = opt("", "corpus folders, with commas between")
    thoughts: str = opt("", "a thoughts folder for each corpus, in their order; none, or nothing between commas: plain text")
    weights: str = opt("", "share of the training tokens from each corpus, as in 0.7,0.3; none: by size")
    init_from: str = opt("", "model folder to start from; none: new weights")
    marker_rows: Literal["random", "words"] = opt("random", "embeddings of added markers: the paper's normal draw, or those of four words")
    out_dir: str = opt("", "model folder to write")
    bare: float = opt(0.0, "share of the chunks with a thought that are written without it, drawn anew each epoch; 0: the paper's", low=0)
    val_corpus: str = opt("", "corpus folder for the validation loss")
    val_thoughts: str = opt("", "its thoughts folder")
    val_every: int = opt(100, "steps between validations (and one at the end)", low=1)
    val_rows: int = opt(512, "documents (padded) or packed rows it is measured on, the same each time", low=1)
    # model: the toy's size; Llama-family throughout. With --init_from that folder decides
    n_layer: int = opt(3, "transformer blocks", low=1)
    n_head: int = opt(2, "query heads", low=1)
    n_kv_head: int = opt(1, "key and value heads; fewer than --n_head: grouped-query attention", low=1)
    n_embd: int = opt(64, "width", low=2)
    n_hidden: int = opt(0, "width inside the SwiGLU; 0: 8/3 of --n_embd, rounded up to 16", low=0)
    n_vocab: int = opt(0, "rows of the embedding; 0: as many as the tokenizer has ids", low=0)
    rope_theta: float = opt(20.0, "base of the rotary frequencies; 10000 for sequences beyond a few hundred tokens", low=1)
    tie_embeddings: bool = opt(True, "one matrix for input and output embeddings")
    # sequences
    seq_len: int = opt(512, "tokens a row", low=8)
    attention: Literal["padded", "packed", "document"] = opt("padded", "a document a row, its end cut off beyond --seq_len; rows packed full, "
        "attention across documents (the paper's); packed, attention within documents")  # fmt: skip
    loss: Literal["all", "completion"] = opt("all", "of all tokens; of what follows a question, thoughts in the prior form: fine-tuning")
    batch_size: int = opt(16, "rows an optimiser step, over all devices", low=1)
    micro_batch: int = opt(0, "rows that a device computes at once: fewer rows, less memory; 0: --batch_size / devices", low=0)
    # optimisation
    max_steps: int = opt(300, "optimiser steps; 0: only write the model", low=0)
    max_tokens: int = opt(0, "if above 0: as many steps as come nearest to this many training tokens", low=0)
    optimizer: Literal["muon", "adamw"] = opt("muon", "for the matrices of the blocks; AdamW always has the rest")
    lr: float = opt(1e-2, "peak learning rate of AdamW", low=0)
    muon_lr: float = opt(0.02, "peak learning rate of Muon", low=0)
    weight_decay: float = opt(0.1, "decoupled weight decay", low=0)
    schedule: Literal["cosine", "wsd"] = opt("cosine", "or warm-up, stable, decay: constant, and linear over the last fifth")
    warmup: int = opt(10, "steps of linear warm-up", low=0)
    final_lr: float = opt(0.0, "end of the schedule, as a share of the peak", low=0)
    clip: float = opt(1.0, "largest gradient norm; 0: no clipping", low=0)
    # system
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "of the arithmetic and of the saved weights, trained as float32 in any case; "
        "auto: as in --init_from, float32 for a new model")  # fmt: skip
    compile: bool = opt(False, "torch.compile each block; a minute at the start")
    recompute: bool = opt(False, "recompute each block in the backward pass: a third slower, far less memory")
    replicas: int = opt(1, "HSDP: copies of the model, each sharded over devices / replicas", low=1)
    log_every: int = opt(10, "steps between lines of metrics.jsonl", low=1)
    save_every: int = opt(50, "steps between checkpoints", low=1)
    keep: int = opt(2, "newest checkpoints that are kept", low=1)
    seed: int = opt(0, "initial weights, order of documents, coin flips", low=0)
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")
    plan: bool = opt(False, "print sizes, memory and time, and train nothing")
    plan_device: str = opt("", "what to plan for, as in 8xH100; none: what this command would run on")
    plan_mfu: float = opt(0.4, "share of the peak arithmetic that the plan expects", low=0.01)


# May differ between two runs that fill one folder: they decide how the work is done, not what comes out.
HOW = ("device", "micro_batch", "compile", "recompute", "replicas", "log_every", "save_every", "keep", "plan", "plan_device", "plan_mfu")


# --------------------------------------------------------------------------------------------------- model


@dataclass(kw_only=True)
class Config:
    n_vocab: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_hidden: int
    head_dim: int
    seq_len: int
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, the only kind there is here
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    model_type: str = "llama"  # a key of FAMILIES
    attention_bias: bool = False
    dtype: str = "float32"  # of the arithmetic, and of the saved weights

    qkv_bias = property(lambda c: c.attention_bias or c.model_type == "qwen2")
    out_bias = property(lambda c: c.attention_bias and c.model_type != "qwen2")
    qk_norm = property(lambda c: c.model_type == "qwen3")


# attend(layer, q, k, v) -> y, in place of causal self-attention. q, y: [B, n_head, T, head_dim]; k, v: [B, n_kv_head, T, head_dim].
# The sampler passes one that keeps keys and values (infer_thoughts.py); the model itself knows of no cache.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Linear(nn.Linear):
    """Computes in the dtype of its input: on one device fp32 master weights are cast here, under FSDP they arrive as bf16."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.heads = layer, c.head_dim, (c.n_head, c.n_kv_head, c.n_kv_head)
        self.q_proj = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.qkv_proj = None  # the three projections as one, see Llama.pack

    def project(self, x):
        """x [B, T, n_embd] -> q [B, T, n_head, head_dim], k and v [B, T, n_kv_head, head_dim]."""
        B, T, _ = x.shape
        if self.qkv_proj:
            return self.qkv_proj(x).view(B, T, -1, self.head_dim).split(self.heads, dim=2)
        return (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))

    def forward(self, x, rope, mask, attend: Attend | None):
        B, T, _ = x.shape
        q, k, v = self.project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), rope), rotate(k.transpose(1, 2), rope), v.transpose(1, 2)
        # q: [B, n_head, T, head_dim]; k, v: [B, n_kv_head, T, head_dim]
        if attend:
            y = attend(self.layer, q, k, v)
        elif q.device.type == "cpu" and mask is None and torch.is_grad_enabled() and (T > 128 or q.dtype == torch.bfloat16):
            y = CausalAttention.apply(q, k, v)
        else:
            group = q.shape[1] // k.shape[1]
            if q.is_cuda and (mask is not None or q.dtype == torch.float32):  # no fused kernel there takes fewer key heads
                k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=group > 1)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # [B, T, n_embd]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.n_embd, c.n_hidden, bias=False)
        self.up_proj = Linear(c.n_embd, c.n_hidden, bias=False)
        self.down_proj = Linear(c.n_hidden, c.n_embd, bias=False)
        self.gate_up_proj = None  # the two projections as one, see Llama.pack

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.gate_up_proj else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


@torch.no_grad()
def joined(*linears: Linear) -> Callable:
    """One product in place of several of the same input. Their weights become views of its weight: nothing is held twice."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    for linear, rows in zip(linears, weight.split([len(linear.weight) for linear in linears])):
        linear.weight.data = rows
    return lambda x: F.linear(x, weight, bias)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.n_embd, c.norm_eps), Attention(c, layer)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.n_embd, c.norm_eps), MLP(c)
        self.recompute = False

    def compute(self, x, rope, mask, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, attend)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, rope, mask, attend):
        if self.recompute and torch.is_grad_enabled():
            return recompute_in_backward(self.compute, x, rope, mask, attend, use_reentrant=False)
        return self.compute(x, rope, mask, attend)


def rope_frequencies(c: Config) -> torch.Tensor:
    """Angle a position for each pair of coordinates, [head_dim / 2]; Llama 3 stretches the slow ones for longer contexts.
    The operations are transformers' one by one, so that the angles are equal to the last bit."""
    frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if not c.rope_scaling:
        return frequency
    factor, low, high, before = (c.rope_scaling[k] for k in LLAMA3_ROPE)
    turns = before / (2 * math.pi / frequency)  # within the context that it was first trained on
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # many turns: as it is; less than `low`: slowed down by `factor`
    return (1 - keep) * frequency / factor + keep * frequency


def rope_table(positions: torch.Tensor, c: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions [B or 1, T]: each [B or 1, 1, T, head_dim], the halves alike (Hugging Face's order)."""
    angle = positions[:, None, :, None].float() * rope_frequencies(c).to(positions.device, non_blocking=True)  # [B, 1, T, head_dim / 2]
    angle = torch.cat((angle, angle), dim=-1)
    dtype = getattr(torch, c.dtype)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, rope):
    """Rotary embedding (Su et al. 2021): turn the pairs (i, i + head_dim/2) of each head by its position's angles."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Llama(nn.Module):
    """Decoder-only transformer with Hugging Face's parameter names. model(ids) gives hidden states, .logits() the rest.

    With targets it gives the loss instead: under FSDP the head's weight is whole only inside of forward.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        # Values come later (start_model, load_weights). To draw some on the meta device torch would import its compiler: seconds.
        self.embed_tokens = nn.Embedding(c.n_vocab, c.n_embd, _weight=torch.empty(c.n_vocab, c.n_embd))
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.lm_head = None if c.tie_embeddings else Linear(c.n_embd, c.n_vocab, bias=False)

    def forward(self, ids, positions=None, attend: Attend | None = None, targets=None, documents=None):
        """ids [B, T] -> hidden [B, T, n_embd], or, with targets [B, T], their summed cross-entropy in nats (-1: not counted).

        positions [B, T] default to 0..T-1; `attend` replaces causal attention; documents [B, T] keeps it within equal numbers.
        """
        T, mask = ids.shape[1], None
        if positions is None:
            positions = torch.arange(T, device=ids.device)[None]
        if documents is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
            mask = (documents[:, None, :, None] == documents[:, None, None, :]) & causal  # [B, 1, T, T]
        x, rope = self.embed_tokens(ids).to(getattr(torch, self.config.dtype)), rope_table(positions, self.config)
        for layer in self.layers:
            x = layer(x, rope, mask, attend)
        x = self.norm(x)
        return x if targets is None else head_loss(x, self.head(), targets)

    def pack(self) -> None:
        """For sampling: q, k and v are computed by one product, gate and up by another. The parameters keep their names."""
        for layer in self.layers:
            a, m = layer.self_attn, layer.mlp
            a.qkv_proj, m.gate_up_proj = joined(a.q_proj, a.k_proj, a.v_proj), joined(m.gate_proj, m.up_proj)

    def head(self) -> torch.Tensor:
        """The output embedding [n_vocab, n_embd]."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def logits(self, hidden):
        """hidden [..., n_embd] -> fp32 logits [..., n_vocab]."""
        return F.linear(hidden, self.head().to(hidden.dtype)).float()


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Normal(0, 1/sqrt(fan-in)), embeddings 0.1; projections back into the residual stream scaled down by depth (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.1 if "embed" in name else p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * model.config.n_layer)
            put(p, torch.randn(p.shape, generator=generator) * std)
        else:
            put(p, torch.ones(p.shape) if "norm" in name else torch.zeros(p.shape))  # norms, biases


def load_weights(model: Llama, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into a model, each rank its own part. Rows of an embedding that has more of them are left as they are."""
    for name, p in model.named_parameters():
        put(p, tensors[name])


VOCAB_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")


def add_markers(model: Llama, tok: Tokenizer, kind: str) -> None:
    """Give the markers that a tokenizer did not have their rows: normal(0, 1/sqrt(n_embd)) clamped at 3 sigma as in the paper's code,
    or those of four words, which a small model with little data keeps apart better."""
    words = [tok.encode(word)[-1] for word in (" thought", " end", " before", " after")]
    generator, std = torch.Generator().manual_seed(42), model.config.n_embd**-0.5
    for name, p in model.named_parameters():
        if name in VOCAB_WEIGHTS:
            rows = (torch.randn(4, model.config.n_embd, generator=generator) * std).clamp(-3 * std, 3 * std)
            rows = whole(p)[words] if kind == "words" else rows
            for row, i in zip(rows, tok.new_markers):
                put(p, row[None], i)


def build(c: Config, device: str, shard: Callable = lambda model: None) -> Llama:
    """A model without values on a device; sharded, if at all, while it is still on the meta device, so that no rank ever holds all."""
    try:
        with torch.device("meta"):
            model = Llama(c)
    except (RuntimeError, TypeError) as e:  # sizes that no tensor can have
        raise UserError(f"these sizes make no model ({str(e).splitlines()[0]})") from None
    shard(model)
    return model.to_empty(device=device)


def read_tensors(folder: Path, c: Config) -> dict[str, torch.Tensor]:
    """The weights of a folder whose configuration is c, checked against it before the model is made."""
    try:
        shapes = {name: list(p.shape) for name, p in build(c, "meta").named_parameters()}
    except UserError as e:
        raise UserError(f"{folder / 'config.json'}: {e}") from None
    return check_weights(folder, c, shapes)


def open_folder(folder: Path) -> tuple[Config, Tokenizer]:
    """Configuration and tokenizer of a model folder, which fit each other."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    c, tok = Config(**read_config(folder)), load_tokenizer(folder)
    if not tok.n_base <= c.n_vocab <= tok.n_base + 1024:  # some makers pad the embedding
        raise UserError(f"{folder}: tokenizer.json has {tok.n_base} ids, but vocab_size in config.json is {c.n_vocab}: they do not belong together")
    return c, tok


def load_model(folder, device: str = "cpu", dtype: str = "float32") -> tuple[Llama, Tokenizer]:
    """Read a model folder for inference; UserError for anything missing, damaged or of another architecture."""
    folder = Path(folder)
    c, tok = open_folder(folder)
    if tok.new_markers:
        raise UserError(f"{folder}: has no marker tokens; add them by train.py --init_from={folder} --max_steps=0 --out_dir=...")
    tensors = read_tensors(folder, c)
    model = build(replace(c, dtype=dtype), device, lambda model: model.to(getattr(torch, dtype)))
    load_weights(model, tensors)
    return model.eval(), tok


def shard_model(model: Llama, s: Settings, dtype: str, device: str) -> None:
    """FSDP2: each block, then the rest, is sharded over the devices; gathered in `dtype`, gradients reduced in fp32 (paper: the same).

    --replicas=R (HSDP) shards over devices / R instead, and keeps R copies: for several nodes with slow links between them.
    """
    if world() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind, shards = torch.device(device).type, world() // s.replicas
    if s.replicas > 1:
        mesh = init_device_mesh(kind, (s.replicas, shards), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


# ---------------------------------------------------------------------------------------------- optimisers


def newton_schulz(g: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix to each g [n, rows, cols], roughly: singular values go to about 0.7 .. 1.2.

    Quintic iteration with Jordan et al.'s coefficients (kellerjordan.github.io/posts/muon). In fp32: on a CPU bf16 takes a
    hundred times longer, and the matrices are small.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).contiguous()  # [n, short side, long side]
    for _ in range(rounds):
        gram = x @ x.mT  # [n, short, short]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024). For 2-D weights; on a CPU those of one shape are updated together. A sharded matrix
    is gathered and orthogonalised on every rank: right, but the work is not shared."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault((p.shape, None if type(p) is nn.Parameter and p.device.type == "cpu" else p), []).append(p)
            for ((rows, cols), alone), params in by_shape.items():
                sharded = alone if hasattr(alone, "device_mesh") else None
                momentum = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                if sharded is None:
                    torch._foreach_lerp_(momentum, grads, 1 - group["momentum"])
                    nesterov = torch._foreach_lerp(grads, momentum, group["momentum"])
                else:
                    nesterov = [grads[0].lerp(momentum[0].lerp_(grads[0], 1 - group["momentum"]), group["momentum"]).full_tensor()]
                updates = (newton_schulz(torch.stack(nesterov)) * max(1, rows / cols) ** 0.5).unbind()
                if sharded is not None:
                    first, params = shard_offset(sharded), [sharded.to_local()]
                    updates = [update[first : first + len(params[0])] for update in updates]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates), alpha=-group["lr"])


def make_optimizers(model: Llama, s: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices if asked for, AdamW for all else; each group remembers its peak rate.

    Their state is made here, not in the first step, so that a checkpoint can be read into it.
    """
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    if s.optimizer == "adamw":
        matrices = []
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=s.weight_decay, fused=True)]
    for p in rest:
        step = torch.zeros((), device=p.device)
        optimizers[0].state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if matrices:
        optimizers.append(Muon(matrices, lr=s.muon_lr, weight_decay=s.weight_decay))
        for p in matrices:
            optimizers[1].state[p] = {"momentum": torch.zeros_like(p)}
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def schedule(step: int, steps: int, warmup: int, final: float, kind: str = "cosine") -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine down to `final`; or (wsd) constant, and linear at the end."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "wsd":
        return final + (1 - final) * min(1.0, (steps - step) / max(1, steps // 5))
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


# ------------------------------------------------------------------------------------------------ training

SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden")


def make_config(s: Settings, n_vocab: int) -> Config:
    """Configuration of a new model."""
    if s.n_embd % s.n_head or s.n_head % s.n_kv_head or (s.n_embd // s.n_head) % 2:
        raise UserError(f"--n_embd={s.n_embd} must be an even multiple of --n_head={s.n_head}, and that a multiple of --n_kv_head={s.n_kv_head}")
    if s.n_vocab and s.n_vocab < n_vocab:
        raise UserError(f"--n_vocab={s.n_vocab}: the tokenizer has {n_vocab} ids")
    return Config(
        n_vocab=s.n_vocab or n_vocab, n_layer=s.n_layer, n_head=s.n_head, n_kv_head=s.n_kv_head, n_embd=s.n_embd,
        n_hidden=s.n_hidden or math.ceil(s.n_embd * 8 / 3 / 16) * 16, head_dim=s.n_embd // s.n_head, seq_len=s.seq_len,
        rope_theta=s.rope_theta, tie_embeddings=s.tie_embeddings, dtype="float32" if s.dtype == "auto" else s.dtype,
    )  # fmt: skip


def extend_config(s: Settings, c: Config, tok: Tokenizer) -> Config:
    """Configuration of a model that starts from a folder's: room for the markers, and the dtype asked for."""
    for name in SIZES:
        if getattr(s, name) not in (getattr(c, name), Settings.__dataclass_fields__[name].default):
            raise UserError(f"--{name}={getattr(s, name)}, but {s.init_from} has {getattr(c, name)}; leave sizes to --init_from, or take its preset")
    if s.max_steps and s.seq_len > c.seq_len:
        raise UserError(f"--seq_len={s.seq_len}: {s.init_from} was made for {c.seq_len} tokens at most")
    return replace(c, n_vocab=max(c.n_vocab, tok.n_vocab), dtype=c.dtype if s.dtype == "auto" else s.dtype)


def open_stream(corpora: str, thoughts: str, s: Settings, tok: Tokenizer | None, seed: int, weights: str = "") -> Stream:
    """The stream of the folders named in comma-separated lists; UserError for folders or lists that do not fit together."""
    folders = corpora.split(",")
    spans = thoughts.split(",") if thoughts else [""] * len(folders)
    opened = [open_corpus(folders[0], tok)]
    tok = tok or opened[0].tokenizer
    opened += [open_corpus(folder, tok) for folder in folders[1:]]
    try:
        shares = [float(w) for w in weights.split(",")] if weights else []
    except ValueError:
        shares = [0.0]
    if len(spans) != len(folders) or len(shares) not in (0, len(folders)) or not all(0 < w < math.inf for w in shares):
        raise UserError(f"--thoughts={thoughts} --weights={weights}: expected nothing, or one a corpus ({len(folders)}), weights above 0")
    for folder, corpus in zip(folders, opened):
        if corpus.n_docs == 0:
            raise UserError(f"{folder}: has no documents")
    return Stream(opened, [open_thoughts(t, c) if t else None for t, c in zip(spans, opened)], tok, s.seq_len, seed, s.attention, shares, s.bare, s.loss == "completion")


def open_all(s: Settings) -> tuple[Config, Config | None, Tokenizer | None, Stream | None]:
    """(the model's configuration, that of --init_from, tokenizer, stream): what a run is made of, read before anything is written."""
    source, tok = open_folder(Path(s.init_from)) if s.init_from else (None, None)
    stream = open_stream(s.corpus, s.thoughts, s, tok, s.seed, s.weights) if s.corpus else None
    if not stream and not s.plan and (s.max_steps or not source):
        raise UserError("--corpus=... is required: the corpus folder to train on")
    if s.bare > 1:
        raise UserError(f"--bare={s.bare}: expected a share, at most 1")
    if s.loss == "completion" and (s.attention != "padded" or not stream or not all(c.questions.any() for c in stream.corpora)):
        raise UserError("--loss=completion: needs --attention=padded, and corpora with questions (questions.npy), for instance data/gsm8k.py's")
    if not s.out_dir and not s.plan:
        raise UserError("--out_dir=... is required: the model folder to write")
    if not stream and not source and not s.n_vocab:
        raise UserError("--plan without --corpus or --init_from needs --n_vocab, or a preset that has one")
    tok = tok or (stream.tok if stream else None)
    config = extend_config(s, source, tok) if source else make_config(s, tok.n_vocab if tok else s.n_vocab)
    return config, source, tok, stream


def steps_of(s: Settings, stream: Stream | None) -> tuple[int, float]:
    """(optimiser steps, expected tokens of each)."""
    tokens = s.batch_size * (stream.mean_row() if stream else s.seq_len)
    return max(1, round(s.max_tokens / tokens)) if s.max_tokens and s.max_steps else s.max_steps, tokens


def start_model(s: Settings, c: Config, tensors: dict | None, tok: Tokenizer | None, device: str) -> Llama:
    """The model with its first weights, new ones or those of a folder, on this rank's device; sharded if there are several."""
    model = build(c, device, lambda model: shard_model(model, s, c.dtype, device))
    init_weights(model, s.seed) if tensors is None else load_weights(model, tensors)
    if tensors is not None and tok.new_markers:
        add_markers(model, tok, s.marker_rows)
    for layer in model.layers:
        layer.recompute = s.recompute
        if s.compile:
            layer.compute = torch.compile(layer.compute)  # block by block: quick, without FSDP's hooks, and no parameter changes its name
    return model


def train_step(model: Llama, optimizers, batches: list[Batch], n_targets: int, s: Settings, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimiser step on this rank's micro-batches; (its part of the mean loss in nats a token, gradient norm), not waited for."""
    total = torch.zeros((), device=device)
    for i, (ids, targets, documents) in enumerate(batches):
        if world() > 1:
            model.set_requires_gradient_sync(i == len(batches) - 1)
        documents = documents if documents is None else documents.to(device, non_blocking=True)
        loss = model(ids.to(device, non_blocking=True), targets=targets.to(device, non_blocking=True), documents=documents)
        (loss * (world() / n_targets)).backward()  # FSDP takes the mean over ranks; we want the sum
        total += loss.detach() / n_targets
    norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)  # once a step, after the last micro-batch
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm.full_tensor() if hasattr(norm, "device_mesh") else norm


@torch.no_grad()
def validate(model: Llama, stream: Stream, n: int, micro_rows: int, device: str) -> float:
    """Mean loss in nats a token on the first n rows of a stream, or on one epoch if that is less: always the same ones."""
    epoch = stream.epoch(0)
    n = min(n, len(epoch.doc) if stream.attention == "padded" else max(1, int(epoch.starts[-1]) // stream.seq_len))
    groups, total = math.ceil(n / (micro_rows * world())) * world(), 0.0  # each rank has as many: FSDP gathers weights in each forward
    for ids, targets, documents in stream.micro_batches(0, n, groups, slice(rank(), None, world())):
        total += model(ids.to(device), targets=targets.to(device), documents=documents if documents is None else documents.to(device)).item()
    if world() > 1:
        model.reshard()
    return add_up(total)[0] / stream.n_targets(0, n)


class Interrupt:
    """SIGTERM and SIGINT ask to save and leave after the step; one more, 5 seconds later, ends the run at once. (A job's manager and
    torchrun may each send one. torchrun kills what is still there after 30 seconds.)"""

    def __init__(self):
        self.signal, self.when = 0, math.inf
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        if time.time() > self.when + 5:
            os._exit(128 + number)
        self.signal, self.when = number, min(self.when, time.time())


class Log:
    """One line on the terminal and one in metrics.jsonl: what a step did, and how fast (the speed counts from this start of the run)."""

    def __init__(self, s: Settings, c: Config, device: str, steps: int, start: int, tokens: int, seconds: float):
        self.s, self.device, self.steps, self.first_tokens = s, device, steps, tokens
        self.progress, self.begin, self.data_seconds = Progress("train", steps, "steps", done=start), time.time() - seconds, 0.0
        self.peak, self.flops = this_device(device)[0], flops_per_token(c, s.seq_len)

    def seconds(self) -> float:
        """Spent on this run, before an interruption, too."""
        return time.time() - self.begin

    def step(self, done: int, loss: float, norm: float, share: float, tokens: int) -> None:
        spent = time.time() - self.progress.start
        rate, memory, data = (tokens - self.first_tokens) / spent, used_memory(self.device), self.data_seconds / spent
        mfu = rate * self.flops / (self.peak * world()) if self.peak else None
        shown = {"loss": f"{loss:.3f}", "lr": f"{self.s.lr * share:.1e}", "tokens": f"{rate:,.0f}/s", "mfu": f"{mfu:.1%}" if mfu else "n/a"}
        self.progress.update(done, **shown, mem=f"{memory / 1e9:.1f}GB", data=f"{data:.0%}")
        if done % self.s.log_every == 0 or done == self.steps:
            speed = {"tokens_per_s": round(rate), "mfu": mfu, "memory": memory, "data_share": data, "seconds": round(self.seconds(), 2)}
            self.write({"step": done, "loss": loss, "grad_norm": norm, "lr_share": share, "tokens": tokens} | speed)

    def write(self, record: dict) -> None:
        if rank() == 0:
            append_jsonl(Path(self.s.out_dir) / "metrics.jsonl", record)


def train(s: Settings, device: str) -> None:
    config, source, tok, stream = open_all(s)
    validation = open_stream(s.val_corpus, s.val_thoughts, s, tok, seed=0) if s.val_corpus else None
    steps, tokens_per_step = steps_of(s, stream)
    if s.plan:
        return print_plan(config, s, stream, steps, tokens_per_step, device)
    micro_steps, micro_rows = micro_plan(s, world())
    out_dir = Path(s.out_dir)
    tensors = read_tensors(Path(s.init_from), source) if source and not (out_dir / "config.json").exists() else None
    if rank() == 0:
        if (out_dir / "config.json").exists() and not (out_dir / "settings.json").exists():
            raise UserError(f"{out_dir}: holds a model that train.py did not make; give another --out_dir")
        claim(out_dir, s, HOW)
    if (out_dir / "config.json").exists():
        print(f"{out_dir}: complete")
        return
    add_up(0)  # no rank looks for checkpoints before the first has the folder
    model = start_model(s, config, tensors, tok, device)
    optimizers = make_optimizers(model, s)
    start, tokens, seconds = load_checkpoint(out_dir, model, optimizers)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} parameters, {steps} steps of {s.batch_size} rows ({micro_steps} x {micro_rows} on each of {world()} x {device}), from step {start}")
    for row in amounts(stream, steps * tokens_per_step) if steps else ():
        print(f"{row['corpus']}: {row['epochs']:.2f} epochs, {row['text_tokens']:,} tokens of text, {row['thought_tokens']:,} of thoughts")

    def batches_of(step: int) -> list[Batch]:
        mine = slice(rank(), None, world())
        return stream.micro_batches(step * s.batch_size, s.batch_size, micro_steps * world(), mine) if step < steps else []

    interrupt, log, batches = Interrupt(), Log(s, config, device, steps, start, tokens, seconds), batches_of(start)
    for step in range(start, steps):
        torch.manual_seed((s.seed << 32) + step * world() + rank() & 2**63 - 1)  # nothing draws from it; a dropout that you add resumes exactly
        share, done = schedule(step, steps, s.warmup, s.final_lr, s.schedule), step + 1
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * share
        n_targets = stream.n_targets(step * s.batch_size, s.batch_size)
        loss, norm = train_step(model, optimizers, batches, n_targets, s, device)
        tokens += n_targets + (s.batch_size if s.attention == "padded" else 0)  # a document's first token is given, but read
        data_begin = time.time()
        batches = batches_of(done)  # while a GPU is still at work on this step: then this time is no wait
        log.data_seconds += time.time() - data_begin
        (loss, stop), norm = add_up(loss.item(), interrupt.signal), float(norm)
        if not math.isfinite(loss + norm):
            raise UserError(f"{out_dir}: loss {loss}, gradient norm {norm} at step {step}; lower --lr or --muon_lr, and give another --out_dir")
        log.step(done, loss, norm, share, tokens)
        if validation and (done % s.val_every == 0 or done == steps):
            log.write({"step": done, "val_loss": validate(model, validation, s.val_rows, micro_rows, device)})
        if done < steps and (stop or done % s.save_every == 0):
            save_checkpoint(out_dir, model, optimizers, done, tokens, log.seconds(), s.keep)
        if done < steps and stop:
            print(f"\n{os.path.basename(sys.argv[0])}: interrupted; saved step {done}, the same command goes on from here", file=sys.stderr)
            sys.exit(128 + (interrupt.signal or signal.SIGTERM))
    seconds = log.seconds()
    if rank() == 0:
        cut_tokens = stream.cut_tokens(steps * s.batch_size) if steps else 0
        if cut_tokens:
            print(f"{cut_tokens:,} tokens beyond --seq_len={s.seq_len} were cut off")
        report = {"steps": steps, "train_tokens": tokens, "n_params": n_params, "cut_tokens": cut_tokens, "seconds": seconds}
        report |= {"tokens_per_s": tokens / max(seconds, 1e-9), "data": amounts(stream, tokens) if stream else []}
        write_json(out_dir / "training.json", report)
    save_model(out_dir, model, tok)
    if rank() == 0:
        shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)


def main(s: Settings) -> None:
    device = join_ranks(s.device)
    try:
        train(s, device)
    except torch.OutOfMemoryError as e:
        raise UserError(f"{device}: out of memory; lower --micro_batch or --seq_len, use --recompute, or more devices ({str(e).splitlines()[0]})") from None
    if dist.is_initialized():  # not after an error: the other ranks may wait for this one, and it would wait for them
        dist.barrier()  # gloo's threads can abort a process whose peer is already leaving
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, Settings, PRESETS)
