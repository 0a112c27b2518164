"""Model folders in Hugging Face's layout: config.json, model.safetensors, tokenizer files."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

from data.lib.cli import UserError, read_json, write_json
from data.lib.ranks import rank, whole
from data.lib.safetensors import read_safetensors, write_safetensors
from data.lib.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------ model folders on disk

HF_NAMES = {  # our name -> config.json's
    "n_vocab": ("vocab_size", int),
    "n_layer": ("num_hidden_layers", int),
    "n_head": ("num_attention_heads", int),
    "n_kv_head": ("num_key_value_heads", int),
    "n_embd": ("hidden_size", int),
    "n_hidden": ("intermediate_size", int),
    "head_dim": ("head_dim", int),
    "seq_len": ("max_position_embeddings", int),
    "rope_theta": ("rope_theta", float),
    "rope_scaling": ("rope_scaling", dict),
    "norm_eps": ("rms_norm_eps", float),
    "tie_embeddings": ("tie_word_embeddings", bool),
    "model_type": ("model_type", str),
    "attention_bias": ("attention_bias", bool),
    "dtype": ("dtype", str),
}  # fmt: skip
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SHARD_BYTES = 5_000_000_000


def fits(value, kind: type) -> bool:
    """Whether a value of config.json can be a size (int), a factor (float), a switch or a name."""
    if kind is int:
        return type(value) is int and 0 < value < 2**31
    return type(value) in (int, float) and 0 < value < 1e30 if kind is float else type(value) is kind


EXPECTED = {int: "a positive whole number", float: "a positive number", bool: "true or false", str: "a string"}


def read_config(folder: Path) -> dict:
    """config.json of a supported architecture. UserError names what is missing, wrong, or not supported: nothing is loaded approximately."""
    path, raw = folder / "config.json", read_json(folder / "config.json")
    family = raw.get("model_type")
    if family not in (*FAMILIES,) or (raw.get("architectures") or [FAMILIES[family]]) != [FAMILIES[family]]:
        named = f"model_type {family!r:.80}, architectures {raw.get('architectures')!r:.80}"
        raise UserError(f"{path}: {named}: supported are {', '.join(FAMILIES.values())}")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # the names of transformers 4 and 5
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling or rope_parameters is {rope!r:.80}, expected an object")
    kind, window, types = rope.get("rope_type", rope.get("type", "default")), raw.get("use_sliding_window"), raw.get("layer_types") or []
    only = {  # settings that change what the model computes, and the one value that is supported
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "rope_type": (kind if kind != "llama3" else "default", "default"),
        "rope_parameters": ({*rope} - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3_ROPE}, set()),
        "mlp_bias": (bool(raw.get("mlp_bias")), False),
        "use_sliding_window": (bool(window), False),
        "sliding_window": (bool(raw.get("sliding_window")) and window is None, False),
        "layer_types": (isinstance(types, list) and all(t == "full_attention" for t in types), True),
        "partial_rotary_factor": (raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1, 1),
        "quantization_config": (raw.get("quantization_config"), None),
    }
    for key, (value, supported) in only.items():
        if value != supported:
            raise UserError(f"{path}: {key} is {raw.get(key, value)!r:.200}, which is not supported")
    found = {"rope_theta": 1e4, "tie_word_embeddings": False, "attention_bias": False, "num_key_value_heads": raw.get("num_attention_heads")}
    found |= {"dtype": raw.get("torch_dtype") or "float32"} | {k: v for k, v in raw.items() if v is not None}
    found["rope_theta"] = rope.get("rope_theta", found["rope_theta"])
    found["rope_scaling"] = {k: rope.get(k) for k in LLAMA3_ROPE} if kind == "llama3" else None
    width, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if "head_dim" not in found and fits(width, int) and fits(heads, int):
        if width % heads:
            raise UserError(f"{path}: num_attention_heads {heads} does not divide hidden_size {width}, and there is no head_dim")
        found["head_dim"] = width // heads
    for name, (theirs, kind) in HF_NAMES.items():
        if found.get(theirs) is None and name != "rope_scaling":
            raise UserError(f"{path}: {theirs} is missing")
        if kind in EXPECTED and not fits(found[theirs], kind):
            raise UserError(f"{path}: {theirs} is {found[theirs]!r:.80}, expected {EXPECTED[kind]}")
    for theirs, value in (found["rope_scaling"] or {}).items():
        if not fits(value, float) or theirs == "high_freq_factor" and value <= rope["low_freq_factor"]:
            wanted = "a positive number, and low_freq_factor below high_freq_factor"
            raise UserError(f"{path}: {theirs} of rope_scaling is {value!r:.80}, expected {wanted}")
    config = SimpleNamespace(**{ours: found[theirs] for ours, (theirs, _) in HF_NAMES.items()})
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{path}: dtype is {config.dtype!r:.80}, expected float32, bfloat16 or float16")
    if config.n_head % config.n_kv_head or config.head_dim % 2:
        raise UserError(f"{path}: {config.n_head} query heads, {config.n_kv_head} key heads of {config.head_dim} coordinates do not fit together")
    return vars(config) | {"dtype": "float32" if config.dtype == "float16" else config.dtype}  # fp16 is read, and kept as what holds it exactly


def write_config(folder: Path, c, tok: Tokenizer) -> None:
    raw = {"architectures": [FAMILIES[c.model_type]], "hidden_act": "silu", "mlp_bias": False}
    raw |= {HF_NAMES[k][0]: v for k, v in asdict(c).items()} | {"torch_dtype": c.dtype, "bos_token_id": tok.bos, "eos_token_id": tok.eos}
    if c.rope_scaling:
        raw["rope_scaling"] = {"rope_type": "llama3"} | c.rope_scaling
    write_json(folder / "config.json", raw)


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json names, by our names; and that file."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists() and not path.exists():
        path, where, tensors = index, read_json(index).get("weight_map"), {}
        if not isinstance(where, dict) or not all(isinstance(f, str) and Path(f).name == f and f.endswith(".safetensors") for f in where.values()):
            raise UserError(f"{index}: weight_map should give a file of this folder for each tensor")
        for file in sorted({*where.values()}):
            held = read_safetensors(folder / file)
            for name in sorted({*held} ^ {name for name in where if where[name] == file}):
                raise UserError(f"{index}: {name!r:.80} is in {file} or there by the index, but not both")
            tensors |= held
    else:
        tensors = read_safetensors(path)
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}  # old files hold that constant
    for name in tensors:
        if "model." + name in tensors:
            raise UserError(f"{path}: {name:.80} is there twice, with and without the prefix model.")
    return {k.removeprefix("model."): v for k, v in tensors.items()}, path


def check_weights(folder: Path, c, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A folder's tensors, which are exactly those that its configuration describes, and finite; checked before the model is made."""
    tensors, path = read_weights(folder)
    if f"layers.{c.n_layer - 1}.mlp.up_proj.weight" not in tensors:
        raise UserError(f"{path}: model.layers.{c.n_layer - 1}.mlp.up_proj.weight is missing, but config.json has num_hidden_layers {c.n_layer}")
    if c.tie_embeddings and "lm_head.weight" in tensors:
        if not torch.equal(tensors.pop("lm_head.weight"), tensors.get("embed_tokens.weight", torch.zeros(0))):
            raise UserError(f"{path}: lm_head.weight differs from model.embed_tokens.weight, but config.json says tie_word_embeddings")
    for name in sorted({*shapes} ^ {*tensors}):
        raise UserError(f"{path}: {name:.80} is " + ("missing" if name in shapes else "not a weight of the model that config.json describes"))
    for name, t in tensors.items():
        if list(t.shape) != shapes[name]:
            raise UserError(f"{path}: {name} has shape {list(t.shape)}, config.json says {shapes[name]}")
        if not t.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values")
    return tensors


def save_model(folder, model, tok: Tokenizer) -> None:
    """Write a model folder in Hugging Face's layout; config.json comes last and marks it complete. Under FSDP all ranks call this."""
    folder, dtype = Path(folder), getattr(torch, model.config.dtype)
    params = {(k if k == "lm_head.weight" else "model." + k): p for k, p in model.named_parameters()}
    files, room = [{}], SHARD_BYTES
    for name, p in params.items():
        room -= p.numel() * dtype.itemsize
        if room < 0 and files[-1]:
            files.append({})
            room = SHARD_BYTES - p.numel() * dtype.itemsize
        files[-1][name] = p
    names = ["model.safetensors"] if len(files) == 1 else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file, group in zip(names, files):
        values = (whole(p) for p in group.values())
        if rank() == 0:
            write_safetensors(folder / file, {k: p.shape for k, p in group.items()}, values, dtype)
        else:
            for _ in values:
                pass
    if rank() == 0:
        if len(files) > 1:
            size = dtype.itemsize * sum(p.numel() for p in params.values())
            where = {name: file for file, group in zip(names, files) for name in group}
            write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
        tok.save(folder)
        write_config(folder, model.config, tok)
