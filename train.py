"""Train a Llama-family model on text with latent thoughts (the M-step), or on plain text (the baselines).

Maximise, over documents, the log-likelihood of their token sequences. A chunk x with a thought z is written in one of two
forms, by a coin flip drawn anew in each epoch (data/corpus.py draws both):

    prior      before SOL PRI z EOL x              teaches  p(z, x | before): think, then write
    posterior  before SOL EOL x SOL POS z EOL      teaches  q(z | before, x): read, then recover the thought

A chunk without a thought is written as x alone. The loss is the mean cross-entropy of all tokens.

    python train.py --corpus=out/digits/warm --thoughts=out/digits/warm_thoughts --out_dir=out/M0      # with thoughts
    python train.py --corpus=out/digits/raw --out_dir=out/raw                                          # plain text
    python train.py ... --n_layer=6 --n_embd=256 --n_head=4 --n_kv_head=2 --optimizer=adamw --device=cuda

--out_dir becomes a model folder in Hugging Face's Llama layout (config.json, model.safetensors, tokenizer files; opens in
transformers), with metrics.jsonl beside it. A run that was cut off goes on from checkpoint.pt under the same command, and
ends in the same weights. Source: Ruan, Band, Maddison, Hashimoto 2025, arXiv 2503.18866, sections 3 and 4.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.cli import Progress, UserError, append_jsonl, claim, opt, read_json, replacing, run, write_json
from data.corpus import FORM_COIN, POSTERIOR, PRIOR, RAW, Corpus, Thoughts, hash_uniform, layout, open_corpus, open_thoughts
from data.tokenizer import Tokenizer, load_tokenizer


@dataclass(kw_only=True)
class Settings:
    # what goes in and out
    corpus: str = opt(help="corpus folder")
    thoughts: str = opt("", "thoughts folder for that corpus; none: train on the plain text")
    out_dir: str = opt(help="model folder to write")
    val_corpus: str = opt("", "corpus folder for the validation loss")
    val_thoughts: str = opt("", "its thoughts folder")
    val_every: int = opt(100, "steps between validations (and one at the end)", low=1)
    # model: the toy's size; Llama-family throughout
    n_layer: int = opt(4, "transformer blocks", low=1)
    n_head: int = opt(2, "query heads", low=1)
    n_kv_head: int = opt(1, "key and value heads; fewer than --n_head: grouped-query attention", low=1)
    n_embd: int = opt(64, "width", low=2)
    n_hidden: int = opt(0, "width inside the SwiGLU; 0: 8/3 of --n_embd, rounded up to 16", low=0)
    seq_len: int = opt(512, "longest sequence; what a document has beyond it is cut off and counted", low=8)
    rope_theta: float = opt(20.0, "base of the rotary frequencies; 10000 for sequences beyond a few hundred tokens", low=1)
    tie_embeddings: bool = opt(True, "one matrix for input and output embeddings")
    # optimisation
    steps: int = opt(600, "optimiser steps", low=1)
    max_tokens: int = opt(0, "if above 0: as many steps as come nearest to this many training tokens", low=0)
    batch_size: int = opt(32, "documents a step", low=1)
    accumulate: int = opt(1, "micro-batches a step is cut into, to save memory", low=1)
    optimizer: Literal["muon", "adamw"] = opt("muon", "for the matrices of the blocks; AdamW always has the rest")
    lr: float = opt(4e-3, "peak learning rate of AdamW", low=0)
    muon_lr: float = opt(0.02, "peak learning rate of Muon", low=0)
    weight_decay: float = opt(0.01, "decoupled weight decay", low=0)
    warmup: int = opt(10, "steps of linear warm-up", low=0)
    final_lr: float = opt(0.0, "end of the cosine, as a share of the peak", low=0)
    clip: float = opt(1.0, "largest gradient norm; 0: no clipping", low=0)
    # system
    log_every: int = opt(10, "steps between lines of metrics.jsonl", low=1)
    save_every: int = opt(50, "steps between checkpoints", low=1)
    seed: int = opt(0, "initial weights, order of documents, coin flips")
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")


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
    norm_eps: float = 1e-5
    tie_embeddings: bool = False


# attend(layer, q, k, v) -> y, in place of causal self-attention. q, y: [B, n_head, T, head_dim]; k, v: [B, n_kv_head, T, head_dim].
# The sampler passes one that keeps keys and values (infer_thoughts.py); the model itself knows of no cache.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RMSNorm(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c.n_embd)), c.norm_eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)

    def forward(self, x, rope, attend: Attend | None):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rope), rotate(k, rope)  # q: [B, n_head, T, head_dim]; k, v: [B, n_kv_head, T, head_dim]
        if attend:
            y = attend(self.layer, q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # [B, T, n_embd]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.up_proj = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.down_proj = nn.Linear(c.n_hidden, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c), Attention(c, layer)
        self.post_attention_layernorm, self.mlp = RMSNorm(c), MLP(c)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


def rope_table(positions: torch.Tensor, c: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions [B or 1, T]: each [B or 1, 1, T, head_dim], the halves alike (Hugging Face's order)."""
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=positions.device) / c.head_dim)
    angle = positions[:, None, :, None].float() * frequency  # [B, 1, T, head_dim / 2]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary embedding (Su et al. 2021): turn the pairs (i, i + head_dim/2) of each head by its position's angles."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Llama(nn.Module):
    """Decoder-only transformer with Hugging Face's parameter names. model(ids) gives hidden states, .logits() the rest."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.n_vocab, c.n_embd)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = RMSNorm(c)
        self.lm_head = nn.Linear(c.n_embd, c.n_vocab, bias=False)
        if c.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids, positions=None, attend: Attend | None = None):
        """ids [B, T] -> hidden [B, T, n_embd]. positions [B, T] default to 0..T-1; `attend` replaces causal attention."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x, rope = self.embed_tokens(ids), rope_table(positions, self.config)
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)

    def logits(self, hidden):
        """hidden [..., n_embd] -> fp32 logits [..., n_vocab]."""
        return self.lm_head(hidden).float()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, 1/sqrt(fan-in)), embeddings 0.1; projections back into the residual stream scaled down by depth (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.1 if "embed" in name else p.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.config.n_layer)
                p.copy_(torch.randn(p.shape, generator=generator) * std)


# ------------------------------------------------------------------------------------ model folders on disk

HF_NAMES = {  # our name -> config.json's
    "n_vocab": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "n_hidden": "intermediate_size", "head_dim": "head_dim",
    "seq_len": "max_position_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
HF_FIXED = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def write_safetensors(path, tensors: dict[str, torch.Tensor]) -> None:
    """8 bytes of header length, a JSON header, then the raw fp32 values end to end (the safetensors format)."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [offset, offset + 4 * t.numel()]}
        offset += 4 * t.numel()
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for t in tensors.values():
            f.write(t.detach().float().cpu().contiguous().numpy().tobytes())


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """All tensors of a file written as above; UserError when it is missing, cut off or not of that format."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; the model folder is missing or was not finished")
    raw = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    try:
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        if len(raw) < 8 or start > len(raw):
            raise ValueError("the header is longer than the file")
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = t["data_offsets"]
            if t["dtype"] != "F32" or first != end or last - first != 4 * math.prod(t["shape"]):
                raise ValueError(f"{name}: expected F32 values that tile the file")
            tensors[name] = torch.from_numpy(raw[start + first : start + last].view(np.float32).reshape(t["shape"]).copy())
            end = last
        if start + end != len(raw):
            raise ValueError(f"{len(raw)} bytes, the header says {start + end}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: damaged ({e}); make the model again") from None
    return tensors


def save_model(folder, model: Llama, tok: Tokenizer) -> None:
    """Write a model folder in Hugging Face's Llama layout; config.json comes last and marks it complete."""
    folder, c = Path(folder), model.config
    tensors = {(k if k == "lm_head.weight" else "model." + k): v for k, v in model.state_dict().items()}
    if c.tie_embeddings:
        del tensors["lm_head.weight"]
    write_safetensors(folder / "model.safetensors", tensors)
    tok.save(folder)
    sizes = {HF_NAMES[k]: v for k, v in asdict(c).items()}
    write_json(folder / "config.json", HF_FIXED | sizes | {"dtype": "float32", "bos_token_id": tok.bos, "eos_token_id": tok.eos})


def load_model(folder, device: str = "cpu") -> tuple[Llama, Tokenizer]:
    """Read a model folder that save_model wrote; UserError for anything missing, damaged or of another architecture."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    raw = read_json(folder / "config.json")
    try:
        for key, value in HF_FIXED.items():
            if raw[key] != value:
                raise UserError(f"{folder / 'config.json'}: {key} is {raw[key]!r}; only {value!r} is supported")
        config = Config(**{ours: raw[theirs] for ours, theirs in HF_NAMES.items()})
        with torch.device("meta"):
            model = Llama(config)
    except (KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{folder / 'config.json'}: damaged ({type(e).__name__}: {e})") from None
    tensors = {k.removeprefix("model."): v for k, v in read_safetensors(folder / "model.safetensors").items()}
    if config.tie_embeddings and "embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if expected != {k: tuple(v.shape) for k, v in tensors.items()}:
        wrong = [k for k in sorted(expected | tensors) if k not in tensors or expected.get(k) != tuple(tensors[k].shape)]
        raise UserError(f"{folder / 'model.safetensors'}: {wrong[0]} does not fit config.json")
    model.load_state_dict(tensors, assign=True)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{folder / 'model.safetensors'}: holds NaN or infinite weights")
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.to(device).eval(), load_tokenizer(folder)


def pick_device(name: str) -> str:
    if name:
        try:
            torch.zeros(1, device=name)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device={name}: {str(e).splitlines()[0]}") from None
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ---------------------------------------------------------------------------------------------- optimisers


def newton_schulz(g: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix to each g [n, rows, cols], roughly: singular values go to about 0.7 .. 1.2.

    Quintic iteration with Jordan et al.'s coefficients (kellerjordan.github.io/posts/muon). In fp32: on a CPU bf16 takes a
    hundred times longer, and the matrices are small.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[1] > g.shape[2]
    x = g.mT if wide else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x.mT @ x  # [n, cols, cols], the smaller side
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x.mT if wide else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024). For 2-D weights; those of one shape are updated together."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                momentum = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(momentum, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momentum, group["momentum"])
                updates = newton_schulz(torch.stack(nesterov)) * max(1, rows / cols) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"])


def make_optimizers(model: Llama, s: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices if asked for, AdamW for all else; each group remembers its peak rate."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    if s.optimizer == "adamw":
        matrices = []
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=s.muon_lr, weight_decay=s.weight_decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def schedule(step: int, steps: int, warmup: int, final: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------- data


class Documents:
    """The training stream: position n of it is document n % n_docs of the shuffle of epoch n // n_docs.

    Order and coin flips are functions of (seed, epoch, document), so a position is all that resuming needs.
    """

    def __init__(self, corpus: Corpus, thoughts: Thoughts | None, tok: Tokenizer, seq_len: int, seed: int):
        self.corpus, self.thoughts, self.tok, self.seq_len, self.seed = corpus, thoughts, tok, seq_len, seed
        self.order, self.order_epoch, self.cut_tokens = None, None, 0

    def sequence(self, doc: int, epoch: int) -> np.ndarray:
        """A document as ids; each chunk that has a thought takes the prior or the posterior form by a coin flip."""
        numbers = range(self.corpus.docs[doc], self.corpus.docs[doc + 1])
        chunks = [self.corpus.chunk(i) for i in numbers]
        thoughts = [self.thoughts.span(i) if self.thoughts else () for i in numbers]
        coins = hash_uniform(FORM_COIN, self.seed, epoch, np.array(numbers))
        forms = [RAW if not len(z) else PRIOR if coin < 0.5 else POSTERIOR for z, coin in zip(thoughts, coins)]
        ids, _ = layout(self.tok, chunks, thoughts, forms)
        self.cut_tokens += max(0, len(ids) - self.seq_len)
        return ids[: self.seq_len]

    def at(self, position: int) -> np.ndarray:
        epoch, index = divmod(position, self.corpus.n_docs)
        if epoch != self.order_epoch:
            self.order_epoch = epoch
            self.order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.corpus.n_docs)
        return self.sequence(int(self.order[index]), epoch)

    def batch(self, step: int, size: int) -> list[np.ndarray]:
        """The documents of a step, sorted by length so that micro-batches are padded little."""
        return sorted((self.at(step * size + i) for i in range(size)), key=len)

    def mean_length(self) -> float:
        """Expected tokens a document: BOS and EOS, text, thoughts, and 3 or 5 markers with each thought."""
        n_thoughts = (np.diff(self.thoughts.chunks) > 0).sum() if self.thoughts else 0
        thought_tokens = len(self.thoughts.tokens) if self.thoughts else 0
        return 2 + (len(self.corpus.tokens) + thought_tokens + 4 * n_thoughts) / self.corpus.n_docs


def pad(sequences: list[np.ndarray], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as inputs [B, T] and targets [B, T], shifted by one; -1 marks targets that are padding."""
    ids = np.full((len(sequences), max(map(len, sequences))), -1, dtype=np.int64)
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = sequence
    ids = torch.from_numpy(ids).to(device)
    return ids[:, :-1].clamp(min=0), ids[:, 1:]


def loss_sum(model: Llama, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats of targets [B, T] given ids [B, T]; padding takes no part and costs no logits."""
    real = targets >= 0
    return F.cross_entropy(model.logits(model(ids)[real]), targets[real], reduction="sum")


@torch.no_grad()
def validate(model: Llama, documents: Documents, batch_size: int, device: str) -> float:
    """Mean loss in nats a token on the first 512 documents, always with the same coin flips."""
    sequences = sorted((documents.sequence(doc, 0) for doc in range(min(512, documents.corpus.n_docs))), key=len)
    batches = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
    total = sum(loss_sum(model, *pad(batch, device)).item() for batch in batches)
    return total / sum(len(sequence) - 1 for sequence in sequences)


def open_documents(corpus: str, thoughts: str, seq_len: int, seed: int, tok: Tokenizer | None = None) -> Documents:
    opened = open_corpus(corpus, tok)
    if opened.n_docs == 0:
        raise UserError(f"{corpus}: has no documents")
    return Documents(opened, open_thoughts(thoughts, opened) if thoughts else None, tok or opened.tokenizer, seq_len, seed)


# ------------------------------------------------------------------------------------------------ training


def make_config(s: Settings, n_vocab: int) -> Config:
    if s.n_embd % s.n_head or s.n_head % s.n_kv_head or (s.n_embd // s.n_head) % 2:
        raise UserError(f"--n_embd={s.n_embd} must be an even multiple of --n_head={s.n_head}, and that a multiple of --n_kv_head={s.n_kv_head}")
    return Config(
        n_vocab=n_vocab, n_layer=s.n_layer, n_head=s.n_head, n_kv_head=s.n_kv_head, n_embd=s.n_embd,
        n_hidden=s.n_hidden or math.ceil(s.n_embd * 8 / 3 / 16) * 16, head_dim=s.n_embd // s.n_head, seq_len=s.seq_len,
        rope_theta=s.rope_theta, tie_embeddings=s.tie_embeddings,
    )  # fmt: skip


def train_step(model: Llama, optimizers, sequences: list[np.ndarray], s: Settings, device: str) -> tuple[float, float]:
    """One optimiser step on a list of sequences; (mean loss in nats a token, gradient norm)."""
    n_targets = sum(len(sequence) - 1 for sequence in sequences)
    size, total = math.ceil(len(sequences) / s.accumulate), 0.0
    for i in range(0, len(sequences), size):
        loss = loss_sum(model, *pad(sequences[i : i + size], device)) / n_targets
        loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)  # once a step, after the last micro-batch
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(total), float(norm)


def save_checkpoint(path: Path, model, optimizers, step: int, tokens: int, seconds: float) -> None:
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    with replacing(path) as temporary:
        torch.save(state | {"step": step, "tokens": tokens, "seconds": seconds}, temporary)


def load_checkpoint(path: Path, model, optimizers) -> tuple[int, int, float]:
    """(step, tokens, seconds) to go on from; (0, 0, 0.0) without a checkpoint."""
    if not path.exists():
        return 0, 0, 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except Exception as e:  # torch.load has a dozen kinds for a damaged file
        raise UserError(f"{path}: damaged ({type(e).__name__}); remove it to start from the beginning") from None
    return state["step"], state["tokens"], state["seconds"]


def main(s: Settings) -> None:
    device = pick_device(s.device)
    documents = open_documents(s.corpus, s.thoughts, s.seq_len, s.seed)
    tok = documents.tok
    validation = open_documents(s.val_corpus, s.val_thoughts, s.seq_len, s.seed, tok) if s.val_corpus else None
    model = Llama(make_config(s, tok.n_vocab))
    model.init_weights(s.seed)
    model.to(device)
    out_dir = claim(s.out_dir, s)
    if (out_dir / "config.json").exists():
        print(f"{out_dir}: complete")
        return
    optimizers = make_optimizers(model, s)
    steps = s.steps if not s.max_tokens else max(1, round(s.max_tokens / (s.batch_size * documents.mean_length())))
    start, tokens, seconds = load_checkpoint(out_dir / "checkpoint.pt", model, optimizers)
    n_params = sum(p.numel() for p in model.parameters())
    epochs = steps * s.batch_size / documents.corpus.n_docs
    print(f"{n_params:,} parameters, {steps} steps of {s.batch_size} documents, {epochs:.1f} epochs, from step {start}, on {device}")
    progress = Progress("train", steps, "steps", done=start)
    begin, first_tokens = time.time() - seconds, tokens
    for step in range(start, steps):
        share = schedule(step, steps, s.warmup, s.final_lr)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * share
        sequences = documents.batch(step, s.batch_size)
        loss, norm = train_step(model, optimizers, sequences, s, device)
        if not math.isfinite(loss):
            raise UserError(f"{out_dir}: loss is {loss} at step {step}; lower --lr or --muon_lr, and give another --out_dir")
        tokens += sum(map(len, sequences))
        done = step + 1
        rate = (tokens - first_tokens) / (time.time() - progress.start)
        progress.update(done, loss=f"{loss:.3f}", lr=f"{s.lr * share:.1e}", tokens=f"{rate:,.0f}/s")
        if done % s.log_every == 0 or done == steps:
            record = {"step": done, "loss": loss, "grad_norm": norm, "lr_share": share, "tokens": tokens}
            append_jsonl(out_dir / "metrics.jsonl", record | {"seconds": round(time.time() - begin, 2)})
        if validation and (done % s.val_every == 0 or done == steps):
            val_loss = validate(model, validation, s.batch_size, device)
            append_jsonl(out_dir / "metrics.jsonl", {"step": done, "val_loss": val_loss})
        if done % s.save_every == 0 and done < steps:
            save_checkpoint(out_dir / "checkpoint.pt", model, optimizers, done, tokens, time.time() - begin)
    if documents.cut_tokens:
        print(f"{documents.cut_tokens} tokens beyond --seq_len={s.seq_len} were cut off")
    seconds = time.time() - begin
    report = {"steps": steps, "train_tokens": tokens, "n_params": n_params, "cut_tokens": documents.cut_tokens}
    write_json(out_dir / "training.json", report | {"seconds": seconds, "tokens_per_s": tokens / seconds})
    save_model(out_dir, model, tok)
    (out_dir / "checkpoint.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    run(main, Settings)
