"""Tokenizers: tokenizer.json files as tiktoken encodings, and the marker tokens.

All tokenizers here are BPE: text is split into words, each word into units, and
neighbouring units are merged in a fixed order.

    make_tokenizer(texts, n_vocab)   256 bytes, and merges learned from `texts`
                                     (none for n_vocab=256: plain bytes)
    load_tokenizer(path)             a tokenizer.json in Hugging Face's format

A tokenizer.json is of one of two families:

    byte-level      units are bytes: GPT-2, Llama 3, SmolLM2, Qwen, make_tokenizer
    byte fallback   units are characters, or bytes where the vocabulary lacks one,
                    and a space goes before each text: Llama 2, TinyLlama

Ids equal those of the `tokenizers` library. A file for which that cannot be promised
is refused by name. What is written here opens in `tokenizers`, and in `transformers` (4
and 5) as a PreTrainedTokenizerFast, with the same ids. Text is never searched for added
tokens: a document that spells out "<|END_OF_LATENT|>" is encoded as ordinary characters.

decode(encode(text)) is the text again, as far as the family allows: Qwen's gives its
NFC form, byte fallback a space for each "▁", and SmolLM2's vocabulary lacks 8 bytes
that text can hold.

A document in pieces has the ids of its whole text: see encode_documents(). Only its
first piece gets byte fallback's space; text behind a marker is never a first piece.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import regex  # comes with tiktoken, which splits with the same syntax
import tiktoken

from data.lib.cli import UserError, read_json, replacing
from data.lib.sources import refuse_stand_in

MARKERS = (
    "<|START_OF_LATENT|>",
    "<|END_OF_LATENT|>",
    "<|PRIOR_PREFIX|>",
    "<|POSTERIOR_PREFIX|>",
)
BOS = "<|BOS|>"
EOS = "<|EOS|>"

# -------------------- patterns of words

# Words with the space before them, single digits (arithmetic is learned digit by
# digit), runs of signs, white space.
WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
GPT2_WORDS = CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# `tokenizers` finds digits with Rust's newer Unicode tables, letters with those that
# tiktoken has. These 13 digits are not yet in tiktoken's \p{N}.
NEW_DIGITS = r"\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"

# What SmolLM2 finds between digits, which it splits off first. For GPT-2's words the
# text ends at a digit, so white space before one stays whole.
BETWEEN_DIGITS = (
    CONTRACTIONS
    + rf"| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}{NEW_DIGITS}]+"
    + rf"|\s+(?![^\s\p{{N}}{NEW_DIGITS}])|\s+"
)

# A word of a byte fallback tokenizer. No token has a space behind another character,
# so no merge is lost by ending a word there.
SPACED_WORDS = " *[^ ]+| +"

# What oniguruma (`tokenizers`) and fancy-regex (tiktoken) read alike. \w, anchors
# and look-behind are not among it.
SAME_ATOM = r"""
    \\[pP]\{(?:[LMNPSZ][a-z]?|Han)\}
    | \\[sSdDrnt]
    | \\[^\w\s]
"""
SAME_PATTERN = re.compile(
    rf"""(?:
        {SAME_ATOM}
        | \[\^?(?:{SAME_ATOM}|(?!&&|--|~~)[^\]\[\\^])+\]  # a class, without operators
        | \((?:\?(?:i?:|[=!])|(?!\?))  # a group or a look-ahead begins
        | \)
        | \{{\d+(?:,\d*)?\}}(?!\+)
        | [^\\\[\](){{}}.^$]
    )+""",
    re.VERBOSE,
)

# Characters whose place in NFC was settled after Unicode 9. `tokenizers` normalizes
# by Unicode 9, and leaves them alone.
NEWER_RANGES = (
    "5c8-5c9 7fd 897-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c "
    "105c9-105e4 10d24-10f85 11070 1133b 11382-113d0 1145e 11839-11a99 11d42-1612f "
    "16d63-16ff1 1d127-1d128 1d250-1d281 1e08f-1e6f5"
)
NEWER_CHARACTER = re.compile(
    "([" + re.sub("([0-9a-f]+) ?", lambda code: chr(int(code[1], 16)), NEWER_RANGES) + "])"
)


class Refused(Exception):
    """A tokenizer.json that cannot be represented exactly: the field, its value, and why."""

    def __init__(self, field: str, value, why: str = "is not supported"):
        text = json.dumps(value, ensure_ascii=True)
        if len(text) > 100:
            text = text[:97] + "..."
        super().__init__(f"{field} {text} {why}")


class Family(NamedTuple):
    """How a tokenizer.json treats text before its merges."""

    pattern: str  # of the words, for tiktoken
    normalize: Callable[[str], str]  # what is done to a text first
    rules: dict  # what of this decides the ids; "prefix": the space before a text


class Tokenizer:
    """Ids for text, made from the contents of tokenizer.json and tokenizer_config.json.

    bos eos sol eol pri pos   ids of the special tokens
    markers                   the set of these
    n_vocab                   how many ids there are, special tokens included
    n_base                    how many of them the file has
    new_markers               ids of the markers that it lacked, appended behind its own
    sha256                    the identity: a hash of all that decides the ids
    """

    def __init__(self, spec: dict, config: dict):
        vocab, pairs, self.special = read_model(spec)
        self._add_markers(spec, vocab)
        self._name_bos_and_eos(config)
        model = spec["model"]
        self.spaced = bool(model.get("byte_fallback"))
        family = read_spaced(spec) if self.spaced else read_byte_level(spec)
        self.pattern = family.pattern
        self.normalize = family.normalize
        self.prefix = family.rules.get("prefix")
        self.pieces = pieces_of(vocab, self.spaced)
        self.pieces |= {i: name.encode() for name, i in self.special.items()}
        self.sizes = np.zeros(self.n_vocab, dtype=np.int32)  # bytes of each token
        self.sizes[[*self.pieces]] = [*map(len, self.pieces.values())]
        units = set(vocab) if self.spaced else set(byte_names())
        whole_words = []
        if model.get("ignore_merges"):
            whole_words = [token for token in vocab if token not in self.special]
        order = merge_order(pairs, units, whole_words)
        for name in self.special:
            if name in order or (name in vocab and len(name) == 1):
                raise Refused("added_tokens", name, "is also what ordinary text is made of")
        self._build(vocab, order)
        known = essence(vocab, pairs, self.special, family.rules)
        self.sha256 = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _add_markers(self, spec: dict, vocab: dict[str, int]) -> None:
        """Give the markers ids, behind the last one of the file if it lacks them."""
        self.n_base = 1 + max([*vocab.values(), *self.special.values()])
        added = [name for name in MARKERS if name not in self.special]
        for i, name in enumerate(added):
            self.special[name] = vocab.get(name, self.n_base + i)
        self.new_markers = [self.special[name] for name in added if name not in vocab]
        self.n_vocab = self.n_base + len(self.new_markers)
        self.sol, self.eol, self.pri, self.pos = (self.special[name] for name in MARKERS)
        markers = [added_token(name, self.special[name]) for name in added]
        self.spec = spec | {"added_tokens": spec.get("added_tokens", []) + markers}

    def _name_bos_and_eos(self, config: dict) -> None:
        bos = read_name(config, "bos_token", self.special)
        eos = read_name(config, "eos_token", self.special)
        if eos is None:
            field = "tokenizer_config.json, special_tokens_map.json, config.json beside it: eos_token"
            raise Refused(field, None, "must name one of its added tokens")
        # Other classes of transformers have rules of their own for words and first spaces.
        self.config = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
        if isinstance(config.get("added_tokens_decoder"), dict):
            # Where there is this table, some of those classes know no other added tokens.
            table = {str(self.special[name]): {"content": name} | FLAGS for name in MARKERS}
            self.config["added_tokens_decoder"] = config["added_tokens_decoder"] | table
        if bos is None:  # GPT-2's way: one token for both
            bos = eos
            self.config["bos_token"] = bos
        self.bos = self.special[bos]
        self.eos = self.special[eos]
        self.markers = frozenset((self.bos, self.eos, *map(self.special.get, MARKERS)))

    def _build(self, vocab: dict[str, int], order: list[str]) -> None:
        """Make the encoding.

        In tiktoken the rank of a byte sequence decides both the order of merges and
        the id. Where these differ, `table` leads from ranks to ids.
        """
        # Ids from n_vocab on stand for byte sequences that tiktoken must know and
        # the vocabulary does not have: id -> the ids of the vocabulary that are meant.
        self.stand_ins: dict[int, list[int]] = {}
        self.lacking = b""  # bytes that text can hold and the vocabulary has not
        ids = self._ids_of_characters(vocab) if self.spaced else self._ids_of_bytes(vocab)
        for token in order:
            piece = self.pieces[vocab[token]]
            if piece in ids:
                raise Refused("model.vocab", token, "stands for the same text as another token")
            ids[piece] = vocab[token]
        self.table = None
        # Those of single bytes are never compared.
        merged = [i for piece, i in ids.items() if len(piece) > 1]
        if merged != sorted(merged):  # the ids cannot be the ranks
            self.table = np.array(list(ids.values()), dtype=np.uint32)
            ids = {piece: rank for rank, piece in enumerate(ids)}
        self.encoding = tiktoken_of(self.pattern, ids)

    def _stand_in(self, meant: list[int]) -> int:
        i = self.n_vocab + len(self.stand_ins)
        self.stand_ins[i] = meant
        return i

    def _ids_of_bytes(self, vocab: dict[str, int]) -> dict[bytes, int]:
        ids = {}
        for b, name in enumerate(byte_names()):
            ids[bytes([b])] = vocab[name] if name in vocab else self._stand_in([])
        self.lacking = bytes(b for b in range(256) if ids[bytes([b])] in self.stand_ins)
        return ids

    def _ids_of_characters(self, vocab: dict[str, int]) -> dict[bytes, int]:
        """Byte fallback: the model starts from characters, tiktoken from bytes.

        So the bytes of each character are merged first of all. A first byte never
        follows another byte of a character, so this joins no two characters.
        """
        as_byte = [vocab[f"<0x{b:02X}>"] for b in range(256)]
        ids = {}
        for b in range(256):
            character = "▁" if b == 32 else chr(b)
            ids[bytes([b])] = vocab.get(character, as_byte[b]) if b < 128 else as_byte[b]
        for character in vocab:
            raw = character.encode()
            if len(character) > 1 or len(raw) == 1 or character == "▁":
                continue
            for n in range(2, len(raw)):
                if raw[:n] not in ids:
                    ids[raw[:n]] = self._stand_in([as_byte[b] for b in raw[:n]])
            ids[raw] = vocab[character]
        return ids

    def prepare(self, text: str) -> str:
        """A whole text as it is encoded."""
        text = self.normalize(text)
        opens = self.prefix == "always" or self.prefix and not text.startswith(" ")
        return " " + text if text and opens else text

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as uint32 [n_ids], without a list of Python's integers."""
        return self._encode(self.prepare(text))

    def encode_thought(self, text: str) -> np.ndarray:
        """The ids of a text behind a marker: nothing is put before it.

        So a thought opens with the token that it would have at the beginning of a line.
        """
        return self._encode(self.normalize(text))

    def _encode(self, text: str) -> np.ndarray:
        ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        if self.table is not None:
            ids = self.table.take(ids)
        if np.maximum.reduce(ids, initial=0) < self.n_vocab:  # there is no stand-in
            return ids
        if not self.spaced:
            return np.array(self._encode_without_lacking(text), dtype=np.uint32)
        meant = [j for i in ids.tolist() for j in self.stand_ins.get(i, (i,))]
        return np.array(meant, dtype=np.uint32)

    def encode_documents(self, documents: list[list[str]]) -> tuple[np.ndarray, np.ndarray, int]:
        """The ids of documents, each in pieces, end to end.

        uint32 [n_ids], how many each piece has (int64 [n_pieces]), and how many borders
        of pieces lie inside a token. A document has the ids of its whole text, but for
        such tokens: the tokens of their two sides replace them, so that the ids of each
        piece stand for its text. Llama 2 and SmolLM2 have no token beyond the end of a
        line or sentence; Llama 3 and Qwen have one for ".\\n".
        """
        found = [np.zeros(0, np.uint32)]
        sizes = []
        for pieces in documents:
            raws = []
            for piece in pieces:
                prepare = self.normalize if any(raws) else self.prepare
                raws.append(to_bytes(prepare(piece)))
            found.append(self._encode(b"".join(raws).decode()))
            sizes += [len(raw.translate(None, self.lacking)) for raw in raws]
        ids = np.concatenate(found)
        ends = np.cumsum(sizes, dtype=np.int64)  # in bytes; those of tokens are in `bounds`
        bounds = np.append(0, np.cumsum(self.sizes.take(ids)))
        at = np.searchsorted(bounds, ends)
        inside = bounds[at] != ends
        if inside.any():
            ids = self._cut(ids, bounds, np.unique(ends[inside]).tolist())
            at = np.searchsorted(np.append(0, np.cumsum(self.sizes.take(ids))), ends)
        return ids, np.diff(at, prepend=0), int(inside.sum())

    def _cut(self, ids: np.ndarray, bounds: np.ndarray, places: list[int]) -> np.ndarray:
        """The ids without the tokens that a place lies in, with their parts instead."""
        found, done = [], 0
        for i, inside in groupby(places, lambda place: np.searchsorted(bounds, place) - 1):
            raw = self.pieces[int(ids[i])]
            cuts = [0, *(place - bounds[i] for place in inside), len(raw)]
            found += [ids[done:i], *(self._encode_word(raw[a:b]) for a, b in pairwise(cuts))]
            done = i + 1
        return np.concatenate([*found, ids[done:]]).astype(np.uint32)

    def _encode_word(self, word: bytes) -> list[int]:
        ids = self.encoding._encode_single_piece(word) if word else []
        return ids if self.table is None else self.table[ids].tolist()

    @functools.cached_property
    def _first_word(self) -> tiktoken.Encoding:
        """Encodes a text as the bytes of its first word.

        Where words end, only tiktoken itself can say: the regex module knows other letters.
        """
        as_bytes = {bytes([b]): b for b in range(256)}
        return tiktoken_of(rf"\A(?:{self.pattern})", as_bytes)

    def _encode_without_lacking(self, text: str) -> list[int]:
        """The ids of a text with bytes that a byte-level vocabulary lacks.

        As in `tokenizers`, they vanish from their word before it is merged.
        """
        text = to_bytes(text).decode()
        ids = []
        start = 0
        width = 64
        while start < len(text):
            word = bytes(self._first_word.encode_ordinary(text[start : start + width]))
            end = start + len(word.decode())
            # The word may go on beyond the window, or look at the character after it.
            if end + 2 > start + width < len(text):
                width *= 2
                continue
            ids += self._encode_word(word.translate(None, self.lacking))
            start = end
            width = 64
        return ids

    def decode_bytes(self, ids, first: bool = True) -> bytes:
        """The bytes of the ids; an id without a name gives U+FFFD.

        first=False: behind other text or a marker, where a first space is the text's own.
        """
        raw = b"".join([self.pieces.get(int(i), b"\xef\xbf\xbd") for i in ids])
        return raw[1:] if first and self.spaced and raw[:1] == b" " else raw

    def decode(self, ids, first: bool = True) -> str:
        """Text of the ids, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, first).decode("utf-8", errors="replace")

    def save(self, folder) -> None:
        """Write what was read, and the markers, into a folder.

        The files are tokenizer.json and tokenizer_config.json.
        """
        files = {"tokenizer_config.json": self.config, "tokenizer.json": self.spec}
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False)
            with replacing(Path(folder) / name) as temporary:
                temporary.write_text(text, encoding="utf-8")


# -------------------- reading


def load_tokenizer(path) -> Tokenizer:
    """Read a tokenizer.json, or the folder that holds it.

    tokenizer_config.json beside it is read as well. UserError when a file is missing,
    damaged or refused.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    refuse_stand_in(path)
    spec = read_json(path)
    beside = path.with_name("tokenizer_config.json")
    config = read_json(beside) if beside.exists() else {}
    try:
        return Tokenizer(spec, with_names(config, path, spec))
    except Refused as e:
        raise UserError(f"{path}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        what = f"{type(e).__name__}: {str(e)[:100]!r}"
        raise UserError(f"{path}: damaged, or not a tokenizer.json ({what})") from None


def with_names(config: dict, path: Path, spec: dict) -> dict:
    """tokenizer_config.json with BOS and EOS from the files beside it, if it names no EOS."""
    if config.get("eos_token") is not None:
        return config
    names = {token["id"]: token["content"] for token in spec.get("added_tokens", [])}
    named = {}
    for beside in map(path.with_name, ("config.json", "special_tokens_map.json")):
        said = read_json(beside) if beside.exists() else {}
        for key in ("bos_token", "eos_token"):
            ids = said.get(f"{key}_id")  # one, or a list of them
            first = names.get(ids[0] if isinstance(ids, list) else ids)
            named[key] = said.get(key) or first or named.get(key)
    return config | {key: name for key, name in named.items() if config.get(key) is None}


def is_id(i) -> bool:
    return type(i) is int and 0 <= i < 2**31


def read_model(spec: dict) -> tuple[dict[str, int], list, dict[str, int]]:
    """The vocabulary, the merges as pairs, and the added tokens with their ids."""
    model = spec.get("model")
    kind = model.get("type") if isinstance(model, dict) else model
    if kind != "BPE" or not isinstance(model, dict):
        raise Refused("model.type", kind, "is not BPE")
    known = {"type", "vocab", "merges"}
    known |= {"unk_token", "fuse_unk", "byte_fallback", "ignore_merges"}
    for key, value in model.items():
        if value and key not in known:
            raise Refused(f"model.{key}", value)
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab or not all(map(is_id, vocab.values())):
        raise Refused("model.vocab", vocab, "must give each token an id")
    pairs = read_merges(model.get("merges"), vocab)
    special = read_added(spec.get("added_tokens", []), vocab)
    ids = Counter((vocab | special).values())
    if len(ids) != len(vocab | special):
        raise Refused("model.vocab", ids.most_common(1)[0][0], "is the id of two tokens")
    return vocab, pairs, special


def read_merges(merges, vocab: dict[str, int]) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise Refused("model.merges", merges, "must be a list")
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2
        is_known = is_pair and all(isinstance(part, str) and part in vocab for part in pair)
        if not is_known or "".join(pair) not in vocab:
            raise Refused("model.merges", merge, "must be two tokens whose merge is a token")
        pairs.append(tuple(pair))
    pair, times = Counter(pairs).most_common(1)[0] if pairs else ((), 1)
    if times > 1:
        raise Refused("model.merges", pair, "is listed twice")
    return pairs


def read_added(added, vocab: dict[str, int]) -> dict[str, int]:
    if not isinstance(added, list):
        raise Refused("added_tokens", added, "must be a list")
    special = {}
    for token in added:
        name = token.get("content") if isinstance(token, dict) else None
        i = token.get("id") if isinstance(token, dict) else None
        is_token = isinstance(name, str) and is_id(i)
        if not is_token or name in special or vocab.get(name, i) != i:
            raise Refused("added_tokens", token, "needs a content and an id of its own")
        if not name.strip():
            why = "is white space, which text must be searched for"
            raise Refused("added_tokens", name, why)
        special[name] = i
    return special


def read_name(config: dict, key: str, special: dict[str, int]) -> str | None:
    """The name of a special token in tokenizer_config.json."""
    name = config.get(key)
    if isinstance(name, dict):
        name = name.get("content")
    if name is not None and (not isinstance(name, str) or name not in special):
        field = f"tokenizer_config.json beside it: {key}"
        raise Refused(field, name, "is not among its added tokens")
    return name


def steps_of(spec: dict, field: str, key: str) -> list[dict]:
    """A normalizer or pre_tokenizer as a list of steps."""
    value = spec.get(field)
    steps = [value]
    if value is None:
        steps = []
    elif isinstance(value, dict) and value.get("type") == "Sequence":
        steps = value.get(key)
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise Refused(field, value)
    return steps


def read_byte_level(spec: dict) -> Family:
    normalizers = steps_of(spec, "normalizer", "normalizers")
    if normalizers not in ([], [{"type": "NFC"}]):
        raise Refused("normalizer", spec["normalizer"])
    pattern = read_split(spec)
    model = spec["model"]
    lacking = [name for name in byte_names() if name not in model["vocab"]]
    if lacking and (model.get("unk_token") is not None or model.get("ignore_merges")):
        raise Refused("model.vocab", lacking, "are missing")
    rules = {"normalizer": {"type": "NFC"} if normalizers else None}
    rules |= byte_level_steps(pattern)
    if model.get("ignore_merges"):
        rules["ignore_merges"] = True
    # What the pattern does not match is a word, too; tiktoken would leave it out.
    pattern = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    return Family(pattern, to_nfc if normalizers else str, rules)


def read_split(spec: dict) -> str:
    """The pattern of the words, from the pre_tokenizer of a byte-level tokenizer."""
    steps = steps_of(spec, "pre_tokenizer", "pretokenizers")
    level = steps[-1] if steps else {}
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        raise Refused("pre_tokenizer", spec.get("pre_tokenizer"))
    gpt2 = level.get("use_regex", True)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and gpt2:
        return GPT2_WORDS
    if kinds == ["Digits", "ByteLevel"] and gpt2 and steps[0].get("individual_digits"):
        return rf"[\p{{N}}{NEW_DIGITS}]|{BETWEEN_DIGITS}"
    split = steps[0]
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    if kinds != ["Split", "ByteLevel"] or gpt2 or not isolated:
        raise Refused("pre_tokenizer", spec["pre_tokenizer"])
    pattern = split.get("pattern")
    words = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not is_read_alike(words):
        raise Refused("pre_tokenizer: Split by", pattern)
    return words


def is_read_alike(pattern) -> bool:
    """Whether `tokenizers` and tiktoken find the same words by it, and never an empty one."""
    if not isinstance(pattern, str) or not SAME_PATTERN.fullmatch(pattern):
        return False
    try:
        return not regex.fullmatch(pattern, "")
    except regex.error:
        return False


def read_spaced(spec: dict) -> Family:
    """A tokenizer with byte fallback, for which "▁" is the space."""
    model = spec["model"]
    for name in ("▁", *(f"<0x{b:02X}>" for b in range(256))):
        if name not in model["vocab"]:
            raise Refused("model.vocab", name, "is missing")
    if model.get("ignore_merges"):
        raise Refused("model.ignore_merges", True, "is not supported with byte_fallback")
    for merge in model["merges"]:
        token = "".join(merge).replace(" ", "", 1)
        if "▁" in token.lstrip("▁"):
            raise Refused("model.merges", merge, "puts a space behind another character")
    normalizer = steps_of(spec, "normalizer", "normalizers")
    steps = steps_of(spec, "pre_tokenizer", "pretokenizers")
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if normalizer == [prepend, replace] and not steps:
        return Family(SPACED_WORDS, with_spaces, {"prefix": "always"})
    if normalizer or not steps:
        raise Refused("normalizer", spec.get("normalizer"))
    step = steps[0]
    is_metaspace = step.get("type") == "Metaspace" and step.get("replacement") == "▁"
    known_scheme = step.get("prepend_scheme") in ("first", "always")
    known_scheme = known_scheme and step.get("split") is False
    if len(steps) > 1 or not is_metaspace or not known_scheme:
        raise Refused("pre_tokenizer", spec["pre_tokenizer"])
    return Family(SPACED_WORDS, with_spaces, {"prefix": "unless there"})


def with_spaces(text: str) -> str:
    return text.replace("▁", " ")


def to_bytes(text: str) -> bytes:
    """The text in UTF-8; half a surrogate pair becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def to_nfc(text: str) -> str:
    """The text in the NFC of Unicode 9."""
    if unicodedata.is_normalized("NFC", text):
        return text
    parts = NEWER_CHARACTER.split(text)
    # Every other part is one of the newer characters.
    parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
    return "".join(parts)


# -------------------- merges


def merge_order(pairs: list, units: set[str], whole_words: list[str]) -> list[str]:
    """The tokens that tiktoken shall know besides its units, in the order of their merges.

    The model merges listed pairs, tiktoken any two neighbours that make a known token.
    That is the same if each token comes out of its own characters by a listed pair: two
    parts of a token can only be neighbours if that holds inside it. A token that does
    not come out at all is never made. With ignore_merges, a word that equals a token
    (one of `whole_words`) becomes it all the same, in tiktoken, too.
    """
    position = {pair: i for i, pair in enumerate(pairs)}
    tokens = dict.fromkeys([a + b for a, b in pairs] + whole_words)
    rank = {token: i for i, token in enumerate(tokens)}
    kept = []
    last = -1
    for token in rank:
        if len(token) == 1 or not units.issuperset(token):
            continue
        pair = last_merge(token, rank)
        if pair is None and not whole_words:
            continue
        if pair:
            if position.get(pair, -1) <= last:
                why = "comes out of other merges than those listed, or in another order"
                raise Refused("model.merges", token, why)
            last = position[pair]
        kept.append(token)
    return kept


def last_merge(token: str, rank: dict[str, int]) -> tuple[str, str] | None:
    """The two parts of `token` that are merged last when its characters are merged by rank.

    None when the merges do not reach it.
    """
    parts = list(token)
    while len(parts) > 2:
        ranks = [rank.get(a + b, len(rank)) for a, b in zip(parts, parts[1:])]
        best = min(ranks)
        if best == len(rank):
            return None
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def tiktoken_of(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    # Without any special token, encode_to_numpy is slow. Texts are never searched for it.
    special = {"<|never|>": 1 + max(ranks.values())}
    return tiktoken.Encoding("latent", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def pieces_of(vocab: dict[str, int], spaced: bool) -> dict[int, bytes]:
    """The bytes that each id stands for."""
    pieces = {}
    if spaced:
        pieces = {i: token.replace("▁", " ").encode() for token, i in vocab.items()}
        return pieces | {vocab[f"<0x{b:02X}>"]: bytes([b]) for b in range(256)}
    to_byte = {ord(name): b for b, name in enumerate(byte_names())}
    for token, i in vocab.items():
        text = token.translate(to_byte)
        spells_bytes = max(text, default="") < "\u0100"
        pieces[i] = text.encode("latin-1") if spells_bytes else token.encode()
    return pieces


def byte_names() -> list[str]:
    """The 256 bytes as visible characters, as GPT-2 and tokenizer.json files spell them.

    Printable Latin-1 characters stand for themselves, the other 68 bytes get the
    code points from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 324))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


# -------------------- writing


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


def added_token(name: str, i: int) -> dict:
    return {"id": i, "content": name} | FLAGS


def byte_level_steps(pattern: str) -> dict:
    """pre_tokenizer and decoder of a byte-level tokenizer.json with this pattern."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    return {"pre_tokenizer": steps, "post_processor": None, "decoder": level}


def essence(vocab: dict, pairs: list, special: dict, rules: dict) -> dict:
    """All that decides the ids, whatever the file looks like.

    For what make_tokenizer makes, it is the file itself.
    """
    by_id = sorted(special.items(), key=lambda item: item[1])
    added = [added_token(name, i) for name, i in by_id]
    model = {"type": "BPE", "vocab": vocab, "merges": pairs}
    return {"version": "1.0", "added_tokens": added, "model": model} | rules


# -------------------- making


def merge_pair(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """A word's parts with all neighbours (a, b) joined, from left to right."""
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def learn_merges(texts, n_merges: int) -> list[bytes]:
    """Byte-pair encoding (Sennrich et al. 2016).

    Returns the tokens made by merging the most frequent pair, `n_merges` times; fewer when
    no pair occurs twice. Ties go to the pair that sorts first, so the result depends on
    nothing but the texts. Counts are updated only in the words that a merge touches.
    """
    counts = Counter(word.encode() for text in texts for word in regex.findall(WORDS, text))
    words = [[word[i : i + 1] for i in range(len(word))] for word in counts]
    weights = list(counts.values())
    frequency = Counter()
    words_with = defaultdict(set)  # pair -> numbers of the words that may hold it

    def count(w: int, sign: int) -> None:
        for pair in zip(words[w], words[w][1:]):
            frequency[pair] += sign * weights[w]
            words_with[pair].add(w)

    for w in range(len(words)):
        count(w, +1)
    tokens = []
    while len(tokens) < n_merges and frequency:
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        if frequency[best] < 2:
            break
        for w in words_with.pop(best):
            count(w, -1)
            words[w] = merge_pair(words[w], best)
            count(w, +1)
        frequency.pop(best, None)
        token = b"".join(best)
        if token not in tokens:  # the same bytes can come out of two different pairs
            tokens.append(token)
    return tokens


def make_tokenizer(texts=(), n_vocab: int = 256) -> Tokenizer:
    """A byte-level tokenizer with at most `n_vocab` text tokens learned from `texts`.

    Six special tokens follow them.
    """
    names = byte_names()
    merged = learn_merges(texts, n_vocab - 256)
    learned = ["".join(names[b] for b in token) for token in merged]
    rank = {token: i for i, token in enumerate(learned)}
    vocab = {token: i for i, token in enumerate(names + learned)}
    special = {name: len(vocab) + i for i, name in enumerate((BOS, EOS, *MARKERS))}
    pairs = [list(last_merge(token, rank)) for token in learned]
    rules = {"normalizer": None} | byte_level_steps(WORDS)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    return Tokenizer(essence(vocab, pairs, special, rules), config)
