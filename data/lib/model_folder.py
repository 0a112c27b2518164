"""Model folders in Hugging Face's layout: config.json, model.safetensors, tokenizer files.

A folder may be a download, so it is untrusted. Its configuration is checked key by key
and its tensors against that configuration, before a model is made. What is not supported
is refused: nothing is loaded approximately.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch

from data.lib.cli import UserError, read_json, write_json
from data.lib.ranks import put, rank, whole
from data.lib.safetensors import read_safetensors, write_safetensors
from data.lib.sources import refuse_stand_in
from data.lib.tokenizer import Tokenizer

# ---- config.json

NAMES = {  # our name -> config.json's, and the kind of its value
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
}
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MAX_PADDING = 1024  # rows that some makers add to the embedding, for speed
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3_ROPE}
EXPECTED = {int: "a positive whole number", float: "a positive number"}
EXPECTED |= {bool: "true or false", str: "a string"}


def fits(value, kind: type) -> bool:
    """Whether a value of config.json can be a size (int), a factor (float), a switch
    (bool) or a name (str)."""
    if kind is int:
        return type(value) is int and 0 < value < 2**31
    if kind is float:
        return type(value) in (int, float) and 0 < value < 1e30
    return type(value) is kind


def read_config(folder: Path) -> dict:
    """config.json of a supported architecture as the arguments of train.Config. Raises UserError that
    names what is missing, wrong or not supported."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    path = folder / "config.json"
    refuse_stand_in(path)
    raw = read_json(path)
    check_family(path, raw)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers 4 and 5
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling or rope_parameters is {rope!r:.80}, expected an object")
    check_supported(path, raw, rope)
    found = with_defaults(path, raw, rope)
    for name, (theirs, kind) in NAMES.items():
        value = found.get(theirs)
        if name != "rope_scaling" and not fits(value, kind):
            said = "missing" if value is None else f"{value!r:.80}, expected {EXPECTED[kind]}"
            raise UserError(f"{path}: {theirs} is {said}")
    config = {name: found[theirs] for name, (theirs, _) in NAMES.items()}
    if config["rope_scaling"]:
        check_llama3_rope(path, config["rope_scaling"])
    if config["dtype"] not in ("float32", "bfloat16", "float16"):
        said = f"{config['dtype']!r:.80}, expected float32, bfloat16 or float16"
        raise UserError(f"{path}: dtype is {said}")
    if config["dtype"] == "float16":
        config["dtype"] = "float32"  # which holds it exactly
    if config["n_head"] % config["n_kv_head"] or config["head_dim"] % 2:
        heads = f"{config['n_head']} query heads, {config['n_kv_head']} key heads"
        raise UserError(f"{path}: {heads} of {config['head_dim']} coordinates do not fit together")
    return config


def check_family(path: Path, raw: dict) -> None:
    family = raw.get("model_type")
    known = family in list(FAMILIES)  # a list, because what was read may not be hashable
    if known and (raw.get("architectures") or [FAMILIES[family]]) == [FAMILIES[family]]:
        return
    named = f"model_type {family!r:.80}, architectures {raw.get('architectures')!r:.80}"
    raise UserError(f"{path}: {named}: supported are {', '.join(FAMILIES.values())}")


def check_supported(path: Path, raw: dict, rope: dict) -> None:
    """Refuse settings that change what a model computes in a way that ours does not."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    window = raw.get("use_sliding_window")  # Qwen's switch for its sliding_window
    partial = raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1
    types = raw.get("layer_types") or []
    plain_layers = isinstance(types, list) and all(t == "full_attention" for t in types)
    supported = {
        "hidden_act": raw.get("hidden_act", "silu") == "silu",
        "rope_type": rope_type in ("default", "llama3"),
        "rope_parameters": {*rope} <= ROPE_KEYS,
        "mlp_bias": not raw.get("mlp_bias"),
        "use_sliding_window": not window,
        "sliding_window": not raw.get("sliding_window") or window is not None,
        "layer_types": plain_layers,
        "partial_rotary_factor": partial == 1,
        "quantization_config": raw.get("quantization_config") is None,
    }
    for key, fine in supported.items():
        if not fine:
            value = rope_type if key == "rope_type" else raw.get(key, rope)
            raise UserError(f"{path}: {key} is {value!r:.200}, which is not supported")


def with_defaults(path: Path, raw: dict, rope: dict) -> dict:
    """config.json's keys with what it may leave out, which was not always written."""
    heads = raw.get("num_attention_heads")
    width = raw.get("hidden_size")
    found = {
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_key_value_heads": heads,
        "dtype": raw.get("torch_dtype") or "float32",
    }
    # As in transformers, where these sizes do not follow from others
    if raw["model_type"] == "qwen3":
        found["head_dim"] = 128
    if raw["model_type"] != "llama" and "num_key_value_heads" not in raw:
        found["num_key_value_heads"] = 32
    found |= {key: value for key, value in raw.items() if value is not None}
    found["rope_theta"] = rope.get("rope_theta", found["rope_theta"])
    is_llama3 = rope.get("rope_type", rope.get("type")) == "llama3"
    found["rope_scaling"] = {key: rope.get(key) for key in LLAMA3_ROPE} if is_llama3 else None
    if "head_dim" not in found and fits(width, int) and fits(heads, int):
        if width % heads:
            problem = f"num_attention_heads {heads} does not divide hidden_size {width}"
            raise UserError(f"{path}: {problem}, and there is no head_dim")
        found["head_dim"] = width // heads
    return found


def check_llama3_rope(path: Path, scaling: dict) -> None:
    for key, value in scaling.items():  # low_freq_factor comes before high_freq_factor
        fine = fits(value, float)
        if fine and key == "high_freq_factor":
            fine = value > scaling["low_freq_factor"]
        if not fine:
            wanted = "a positive number, and low_freq_factor below high_freq_factor"
            raise UserError(f"{path}: {key} of rope_scaling is {value!r:.80}, expected {wanted}")


def check_vocabulary(folder: Path, n_vocab: int, tok: Tokenizer) -> None:
    """UserError unless a model with so many embeddings can belong to the tokenizer."""
    if not tok.n_base <= n_vocab <= tok.n_base + MAX_PADDING:
        raise UserError(
            f"{folder}: tokenizer.json has {tok.n_base} ids, but vocab_size in config.json "
            f"is {n_vocab}: they do not belong together"
        )


def write_config(folder: Path, c, tok: Tokenizer) -> None:
    """config.json of a train.Config, as transformers 4 and 5 read it."""
    raw = {"architectures": [FAMILIES[c.model_type]], "hidden_act": "silu", "mlp_bias": False}
    raw |= {NAMES[name][0]: value for name, value in asdict(c).items()}
    raw |= {"torch_dtype": c.dtype, "bos_token_id": tok.bos, "eos_token_id": tok.eos}
    if c.rope_scaling:
        raw["rope_scaling"] = {"rope_type": "llama3"} | c.rope_scaling
    write_json(folder / "config.json", raw)


# ---- reading weights


def read_weights(folder: Path, n_layer: int) -> tuple[dict[str, torch.Tensor], Path]:
    """The tensors of model.safetensors, or of the shards that its index names, by our names (without
    the prefix "model."); and the file that names them. UserError unless there are so many layers."""
    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.exists() and not path.exists():
        path = index
        found = read_shards(folder, index)
    else:
        found = read_safetensors(path)
    tensors = {}
    for name, tensor in found.items():
        if name.endswith("rotary_emb.inv_freq"):  # a constant that old files hold
            continue
        if "model." + name in found:
            raise UserError(f"{path}: {name:.80} is there twice, with and without the prefix model.")
        tensors[name.removeprefix("model.")] = tensor
    last = f"layers.{n_layer - 1}.mlp.up_proj.weight"
    if last not in tensors:
        says = f"config.json has num_hidden_layers {n_layer}"
        raise UserError(f"{path}: model.{last} is missing, but {says}")
    return tensors, path


def read_shards(folder: Path, index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files that an index names; each tensor must be in its file."""
    refuse_stand_in(index)
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(is_shard_name(file) for file in where.values()):
        raise UserError(f"{index}: weight_map should give a file of this folder for each tensor")
    tensors = {}
    for file in sorted({*where.values()}):
        held = read_safetensors(folder / file)
        listed = {name for name in where if where[name] == file}
        for name in sorted({*held} ^ listed):
            raise UserError(f"{index}: {name!r:.80} is in {file} or there by the index, but not both")
        tensors |= held
    return tensors


def is_shard_name(file) -> bool:
    """Whether this is a file name without a folder: an index must not lead elsewhere."""
    return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")


def check_weights(path: Path, c, tensors: dict, shapes: dict[str, list[int]]) -> dict:
    """The tensors of file `path` for a train.Config c, without the copy of an embedding
    that is tied. They are exactly those of `shapes` and finite; UserError otherwise."""
    if c.tie_embeddings and "lm_head.weight" in tensors:
        tensors = tensors.copy()
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.get("embed_tokens.weight", torch.zeros(0))):
            differs = "lm_head.weight differs from model.embed_tokens.weight"
            raise UserError(f"{path}: {differs}, but config.json says tie_word_embeddings")
    for name in sorted({*shapes} ^ {*tensors}):
        if name in shapes:
            raise UserError(f"{path}: {name:.80} is missing")
        raise UserError(f"{path}: {name:.80} is not a weight of the model that config.json describes")
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if shape != shapes[name]:
            raise UserError(f"{path}: {name} has shape {shape}, config.json says {shapes[name]}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values")
    return tensors


# ---- marker tokens

MARKER_WORDS = (" thought", " end", " before", " after")


def add_markers(model, tok: Tokenizer, kind: str) -> None:
    """Give rows of the embeddings to the four markers that a tokenizer did not have.

    kind "random": normal(0, 1/sqrt(n_embd)) clamped at 3 sigma, as in the paper's code.
    kind "words": the rows of four words, which a small model that has little data keeps
    apart better.
    """
    words = [tok.encode(word)[-1] for word in MARKER_WORDS]
    width = model.config.n_embd
    std = width**-0.5
    generator = torch.Generator().manual_seed(42)
    for name, p in model.named_parameters():
        if name not in ("embed_tokens.weight", "lm_head.weight"):
            continue
        rows = torch.randn(4, width, generator=generator) * std
        rows = rows.clamp(-3 * std, 3 * std)
        if kind == "words":
            rows = whole(p)[words]
        for row, marker in zip(rows, tok.new_markers):
            put(p, row[None], marker)


# ---- writing a folder

SHARD_BYTES = 5_000_000_000


def save_model(folder, model, tok: Tokenizer) -> None:
    """Write a model folder. config.json comes last and marks it complete. Under FSDP all
    ranks call this, and the first one writes."""
    folder = Path(folder)
    dtype = getattr(torch, model.config.dtype)
    params = {}
    for name, p in model.named_parameters():
        params[name if name == "lm_head.weight" else "model." + name] = p
    files = split_into_files(params, dtype.itemsize)
    for file, group in files.items():
        values = (whole(p) for p in group.values())  # one at a time
        if rank() == 0:
            shapes = {name: p.shape for name, p in group.items()}
            write_safetensors(folder / file, shapes, values, dtype)
        else:
            for _ in values:  # takes part in gathering them
                pass
    if rank() > 0:
        return
    if len(files) > 1:
        size = dtype.itemsize * sum(p.numel() for p in params.values())
        where = {name: file for file, group in files.items() for name in group}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)
    tok.save(folder)
    write_config(folder, model.config, tok)


def split_into_files(params: dict, itemsize: int) -> dict[str, dict]:
    """{file: {name: parameter}}, files of at most SHARD_BYTES unless one tensor is larger."""
    groups = [{}]
    room = SHARD_BYTES
    for name, p in params.items():
        size = p.numel() * itemsize
        if size > room and groups[-1]:
            groups.append({})
            room = SHARD_BYTES
        groups[-1][name] = p
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def fingerprint(model) -> str:
    """A hash of a model folder's weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()
