"""Tokenizers: tokenizer.json files as tiktoken encodings, and the marker tokens.

All tokenizers here are BPE: text is split into words, each word into units, and the units are merged in a fixed order.

    make_tokenizer(texts, n_vocab)   256 bytes, plus merges learned from `texts` (none for n_vocab=256: plain bytes)
    load_tokenizer(path)             a tokenizer.json in Hugging Face's format, of one of two kinds:

    byte-level      units are bytes; GPT-2, Llama 3, SmolLM2, Qwen, and what make_tokenizer makes
    byte fallback   units are characters, or bytes where the vocabulary lacks one; a space goes before each text; Llama 2, TinyLlama

Ids equal those of the `tokenizers` library; a file for which that cannot be promised is refused by name. What is written here
opens in `tokenizers` and `transformers` with the same ids. Text is never searched for added tokens: a document that spells out
"<|END_OF_LATENT|>" is encoded as ordinary characters. decode(encode(text)) is the text again, as far as the family allows:
Qwen's gives its NFC form, a byte fallback tokenizer a space for each "▁"; SmolLM2's vocabulary lacks 8 bytes that text can hold.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken, which splits with the same syntax
import tiktoken

from data.lib.cli import UserError, read_json, replacing

MARKERS = ("<|START_OF_LATENT|>", "<|END_OF_LATENT|>", "<|PRIOR_PREFIX|>", "<|POSTERIOR_PREFIX|>")
BOS, EOS = "<|BOS|>", "<|EOS|>"
NEVER = "<|never|>"  # tiktoken's only special token: no text is ever searched for it, but for encode_pieces(), which puts it there itself

# Words with the space before them, single digits (arithmetic is learned digit by digit), runs of signs, white space.
WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits before GPT-2's words (SmolLM2): a digit ends the text for what stands before it, so white space before one stays whole.
# `tokenizers` finds digits with Rust's newer Unicode tables, letters with those that tiktoken has: 13 digits are not yet in \p{N}.
NEW_DIGITS = r"\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
DIGIT_WORDS = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}{NEW_DIGITS}]+|\s+(?![^\s\p{{N}}{NEW_DIGITS}])|\s+"
# A word of a byte fallback tokenizer: no piece of the vocabulary has a space behind another character, so no merge is lost.
SPACED_WORDS = " *[^ ]+| +"
# In Llama 2's none has an ASCII letter beside another ASCII character, either. So words end there as well, and more of them are found whole, not merged.
LETTERS, SIGNS = "[A-Za-z]+", r"[\x00-\x1f!-@\[-`{-\x7f]+"
PARTED_WORDS = rf" *(?:(?:{LETTERS}|{SIGNS})?[^\x00-\x7f]+)+(?:{LETTERS}|{SIGNS})?| *(?:{LETTERS}|{SIGNS})| +"
# What oniguruma (`tokenizers`) and fancy-regex (tiktoken) read alike; \w is not among it, nor are anchors and look-behind.
SAME_ATOM = r"\\[pP]\{(?:[LMNPSZ][a-z]?|Han)\}|\\[sSdDrnt]|\\[^\w\s]"
SAME_CLASS = rf"\[\^?(?:{SAME_ATOM}|(?!&&|--|~~)[^\]\[\\^])+\]"
SAME_PATTERN = re.compile(rf"(?:{SAME_ATOM}|{SAME_CLASS}|\((?:\?(?:i?:|[=!])|(?!\?))|\)|\{{\d+(?:,\d*)?\}}(?!\+)|[^\\\[\](){{}}.^$])+")
# Characters whose place in NFC was settled after Unicode 9, which is what `tokenizers` normalizes by: it leaves them alone.
NEWER = ("5c8-5c9 7fd 897-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c 105c9-105e4 10d24-10f85 11070 1133b 11382-113d0 1145e "
         "11839-11a99 11d42-1612f 16d63-16ff1 1d127-1d128 1d250-1d281 1e08f-1e6f5")  # fmt: skip
NEWER_CHARACTER = re.compile("([" + "".join("-".join(chr(int(end, 16)) for end in ends.split("-")) for ends in NEWER.split()) + "])")


class Refused(Exception):
    """A tokenizer.json that cannot be represented exactly: the field, its value, and why."""

    def __init__(self, field: str, value, why: str = "is not supported"):
        text = json.dumps(value, ensure_ascii=True)
        super().__init__(f"{field} {text if len(text) <= 100 else text[:97] + '...'} {why}")


class Tokenizer:
    """Ids for text, made from the contents of tokenizer.json and tokenizer_config.json.

    `bos eos sol eol pri pos` are the special tokens, `n_vocab` counts all, `sha256` is the identity: of all that decides the ids.
    Markers that the file lacked are appended after its last id: `new_markers` are their ids, `n_base` counts the others.
    """

    def __init__(self, spec: dict, config: dict):
        vocab, pairs, self.special = read_model(spec)
        self.n_base = 1 + max([*vocab.values(), *self.special.values()])
        added = [name for name in MARKERS if name not in self.special]
        self.special |= {name: vocab.get(name, self.n_base + i) for i, name in enumerate(added)}
        self.new_markers = [self.special[name] for name in added if name not in vocab]
        self.n_vocab = self.n_base + len(self.new_markers)
        self.spec = spec | {"added_tokens": spec.get("added_tokens", []) + [added_token(name, self.special[name]) for name in added]}
        bos, eos = (read_name(config, key, self.special) for key in ("bos_token", "eos_token"))
        if eos is None:
            raise Refused("tokenizer_config.json beside it: eos_token", None, "must name one of its added tokens")
        bos = bos or eos  # GPT-2's way: one token for both
        self.config = config | {key: name for key, name in (("bos_token", bos), ("eos_token", eos)) if read_name(config, key, self.special) != name}
        self.bos, self.eos = self.special[bos], self.special[eos]
        self.sol, self.eol, self.pri, self.pos = (self.special[name] for name in MARKERS)

        self.spaced = bool(spec["model"].get("byte_fallback"))
        pattern, self.prepare, rules = read_spaced(spec) if self.spaced else read_byte_level(spec)
        units = set(vocab) if self.spaced else set(byte_names())
        words = [token for token in vocab if token not in self.special] if spec["model"].get("ignore_merges") else []
        order = merge_order(pairs, units, words)
        for name in self.special:
            if name in order or name in vocab and len(name) == 1:
                raise Refused("added_tokens", name, "is also what ordinary text is made of")
        self.pieces = pieces_of(vocab, self.spaced) | {i: name.encode() for name, i in self.special.items()}
        self._build(pattern, vocab, order)
        self.sha256 = hashlib.sha256(json.dumps(essence(vocab, pairs, self.special, rules), sort_keys=True).encode()).hexdigest()

    def _build(self, pattern: str, vocab: dict[str, int], order: dict[str, int]) -> None:
        """The encoding: ranks in tiktoken decide both the order of merges and the ids, so where these differ, a table follows.

        Ids from n_vocab on are odd ones: byte sequences that tiktoken must know and the vocabulary does not. `odd` spells them.
        """
        self.odd: dict[int, list[int]] = {}

        def odd(spelled: list[int]) -> int:
            self.odd[self.n_vocab + len(self.odd)] = spelled
            return self.n_vocab + len(self.odd) - 1

        if self.spaced:  # tiktoken starts from bytes, the model from characters: these are put together before all other merges
            as_byte = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
            ids = {bytes([b]): vocab.get("▁" if b == 32 else chr(b), as_byte[b]) if b < 128 else as_byte[b] for b in range(256)}
            for character in vocab:
                raw = character.encode()
                if len(character) == 1 and len(raw) > 1 and character != "▁":
                    for n in range(2, len(raw)):  # a first byte never follows another, so these steps never join two characters
                        if raw[:n] not in ids:
                            ids[raw[:n]] = odd([as_byte[b] for b in raw[:n]])
                    ids[raw] = vocab[character]
        else:
            ids = {bytes([b]): vocab[name] if name in vocab else odd([]) for b, name in enumerate(byte_names())}
        for token in order:
            if self.pieces[vocab[token]] in ids:
                raise Refused("model.vocab", token, "stands for the same text as another token")
            ids[self.pieces[vocab[token]]] = vocab[token]
        self.pattern, self.table, self.fast = pattern, None, None
        if not rising(ids):  # ranks are positions, and a table leads from them to ids
            self.table = np.array(list(ids.values()), dtype=np.uint32)
            usual = {piece: i for piece, i in ids.items() if piece.isascii() and b"  " not in piece}  # Llama 2's ids follow its merges in these
            self.fast = tiktoken_of(pattern, usual) if self.spaced and rising(usual) else None
            ids = {piece: rank for rank, piece in enumerate(ids)}
        self.encoding = tiktoken_of(pattern, ids)

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids as uint32: what a corpus is written from, without a list of Python's integers between."""
        text = self.prepare(text)
        usual = self.spaced and text.isascii()
        if usual and self.fast and "  " not in text:
            return self.fast.encode_to_numpy(text, disallowed_special=())
        ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        if self.table is not None:
            ids = self.table.take(ids)
        if self.odd and not usual and np.maximum.reduce(ids, initial=0) >= self.n_vocab:
            ids = [j for i in ids.tolist() for j in self.odd.get(i, (i,))] if self.spaced else self._encode_without_odd(text)
        return np.asarray(ids, dtype=np.uint32)

    def encode_pieces(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of several texts, end to end, and how many each has: encode_array of each, but in one call for all.

        A special token of tiktoken's, which the vocabulary knows nothing of, stands behind each text: what lies between two of them is encoded alone.
        """
        joined = NEVER.join([*map(self.prepare, texts), ""])
        if joined.count(NEVER) == len(texts):
            ids = self.encoding.encode_to_numpy(joined, allowed_special={NEVER}, disallowed_special=())
            is_end = ids == self.encoding.encode_single_token(NEVER)
            lengths = np.diff(np.flatnonzero(is_end), prepend=-1) - 1
            ids = ids[~is_end]
            if self.table is not None:
                ids = self.table.take(ids)
            if not self.odd or np.maximum.reduce(ids, initial=0) < self.n_vocab:
                return ids, lengths
        each = [self.encode_array(text) for text in texts]
        return np.concatenate([np.zeros(0, np.uint32), *each]), np.array([len(ids) for ids in each], dtype=np.int64)

    def _encode_without_odd(self, text: str) -> list[int]:
        """The ids of a text with bytes that the vocabulary lacks: as in `tokenizers`, they vanish from their word before it is merged.

        Where words end, only tiktoken itself can say: the regex module knows other letters. It gets a window of the text.
        """
        first = tiktoken_of(rf"\A(?:{self.pattern})", {bytes([b]): b for b in range(256)})
        lacking = bytes(b for b, name in enumerate(byte_names()) if name not in self.spec["model"]["vocab"])
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates become U+FFFD, as in tiktoken
        ids, start, width = [], 0, 64
        while start < len(text):
            word = bytes(first.encode_ordinary(text[start : start + width]))
            end = start + len(word.decode())
            if end + 2 > start + width < len(text):  # a word may go on beyond the window, or look at the character after it
                width *= 2
                continue
            word = word.translate(None, lacking)
            ids += self.encoding._encode_single_piece(word) if word else []
            start, width = end, 64
        return ids if self.table is None else self.table[ids].tolist()

    def decode_bytes(self, ids) -> bytes:
        raw = b"".join([self.pieces.get(int(i), b"\xef\xbf\xbd") for i in ids])  # an id without a name: U+FFFD
        return raw[1:] if self.spaced and raw[:1] == b" " else raw

    def decode(self, ids) -> str:
        """Text of the ids, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def n_bytes(self, ids) -> int:
        """How many bytes of text the ids stand for."""
        return len(self.decode_bytes(ids))

    def save(self, folder) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder: what was read, and the markers."""
        for name, content in (("tokenizer_config.json", self.config), ("tokenizer.json", self.spec)):
            with replacing(Path(folder) / name) as temporary:
                temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# -------------------------------------------------------------------------------------------------- reading


def load_tokenizer(path) -> Tokenizer:
    """Read a tokenizer.json (or the folder that holds it) and the tokenizer_config.json beside it; UserError when it is refused."""
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    spec, beside = read_json(path), path.with_name("tokenizer_config.json")
    config = read_json(beside) if beside.exists() else {}
    try:
        return Tokenizer(spec, config)
    except Refused as e:
        raise UserError(f"{path}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise UserError(f"{path}: damaged, or not a tokenizer.json ({type(e).__name__}: {str(e)[:100]!r})") from None


def read_model(spec: dict) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    """The vocabulary, the merges, and the added tokens with their ids."""
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise Refused("model.type", model.get("type") if isinstance(model, dict) else model, "is not BPE")
    for key, value in model.items():
        if value and key not in ("type", "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"):
            raise Refused(f"model.{key}", value)
    vocab, merges, added = model.get("vocab"), model.get("merges"), spec.get("added_tokens", [])
    if not isinstance(vocab, dict) or not vocab or not all(type(i) is int and 0 <= i < 2**31 for i in vocab.values()):
        raise Refused("model.vocab", vocab, "must give each token an id")
    if not isinstance(merges, list) or not isinstance(added, list):
        raise Refused("added_tokens" if isinstance(merges, list) else "model.merges", added if isinstance(merges, list) else merges, "must be a list")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) if isinstance(pair, list) else () for pair in merges]
    for pair, listed in zip(pairs, merges):
        if len(pair) != 2 or not all(isinstance(part, str) and part in vocab for part in pair) or "".join(pair) not in vocab:
            raise Refused("model.merges", listed, "must be two tokens whose merge is a token")
    if len(set(pairs)) != len(pairs):
        raise Refused("model.merges", Counter(pairs).most_common(1)[0][0], "is listed twice")
    special = {}
    for token in added:
        name, i = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(name, str) or type(i) is not int or not 0 <= i < 2**31 or name in special or vocab.get(name, i) != i:
            raise Refused("added_tokens", token, "needs a content and an id of its own")
        if not name.strip():
            raise Refused("added_tokens", name, "is white space, which text must be searched for")
        special[name] = i
    ids = Counter((vocab | special).values())
    if len(ids) != len(vocab | special):
        raise Refused("model.vocab", ids.most_common(1)[0][0], "is the id of two tokens")
    return vocab, pairs, special


def read_name(config: dict, key: str, special: dict[str, int]) -> str | None:
    """The name of a special token in tokenizer_config.json."""
    name = config.get(key)
    name = name.get("content") if isinstance(name, dict) else name
    if name is not None and (not isinstance(name, str) or name not in special):
        raise Refused(f"tokenizer_config.json beside it: {key}", name, "is not among its added tokens")
    return name


def steps_of(spec: dict, field: str, key: str) -> list[dict]:
    """A normalizer or pre_tokenizer as a list of steps."""
    value = spec.get(field)
    steps = [] if value is None else value.get(key) if isinstance(value, dict) and value.get("type") == "Sequence" else [value]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise Refused(field, value)
    return steps


def read_byte_level(spec: dict):
    """(pattern for tiktoken, function that prepares a text, what decides the ids) of a byte-level tokenizer."""
    normalizers = steps_of(spec, "normalizer", "normalizers")
    if normalizers not in ([], [{"type": "NFC"}]):
        raise Refused("normalizer", spec["normalizer"])
    pattern = read_split(spec)
    model, lacking = spec["model"], [name for name in byte_names() if name not in spec["model"]["vocab"]]
    if lacking and (model.get("unk_token") is not None or model.get("ignore_merges")):
        raise Refused("model.vocab", lacking, "are missing")
    rules = {"normalizer": {"type": "NFC"} if normalizers else None} | byte_level_steps(pattern)
    rules |= {"ignore_merges": True} if model.get("ignore_merges") else {}
    # What the pattern does not match is a word, too; for tiktoken it would not exist without the last alternative.
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+", nfc if normalizers else str, rules


def read_split(spec: dict) -> str:
    """The pattern of the words, from the pre_tokenizer of a byte-level tokenizer."""
    *before, last = steps_of(spec, "pre_tokenizer", "pretokenizers") or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        raise Refused("pre_tokenizer", spec.get("pre_tokenizer"))
    kinds, gpt2 = [step.get("type") for step in before], last.get("use_regex", True)
    if kinds == [] and gpt2:
        return GPT2_WORDS
    if kinds == ["Digits"] and gpt2:
        return (rf"[\p{{N}}{NEW_DIGITS}]|" if before[0].get("individual_digits") else rf"\p{{N}}+|[{NEW_DIGITS}]+|") + DIGIT_WORDS
    if kinds != ["Split"] or gpt2 or before[0].get("behavior") != "Isolated" or before[0].get("invert"):
        raise Refused("pre_tokenizer", spec["pre_tokenizer"])
    pattern = before[0].get("pattern")
    pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
    try:
        if isinstance(pattern, str) and SAME_PATTERN.fullmatch(pattern) and not regex.fullmatch(pattern, ""):
            return pattern
    except regex.error:
        pass
    raise Refused("pre_tokenizer: Split by", before[0].get("pattern"))


def read_spaced(spec: dict):
    """The same three of a tokenizer with byte fallback, for which "▁" is the space."""
    normalizer, steps = steps_of(spec, "normalizer", "normalizers"), steps_of(spec, "pre_tokenizer", "pretokenizers")
    model, vocab = spec["model"], spec["model"]["vocab"]
    for name in ("▁", *(f"<0x{b:02X}>" for b in range(256))):
        if name not in vocab:
            raise Refused("model.vocab", name, "is missing")
    if model.get("ignore_merges"):
        raise Refused("model.ignore_merges", True, "is not supported with byte_fallback")
    tokens = ["".join(merge).replace(" ", "", 1) for merge in model["merges"]]
    for merge, token in zip(model["merges"], tokens):
        if "▁" in token.lstrip("▁"):
            raise Refused("model.merges", merge, "puts a space behind another character")
    words = SPACED_WORDS if re.search(f"{LETTERS}{SIGNS}|{SIGNS}{LETTERS}", " ".join(tokens)) else PARTED_WORDS
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if normalizer == prepend and not steps:
        return words, space_first, {"prefix": "always"}
    if normalizer or not steps:
        raise Refused("normalizer", spec.get("normalizer"))
    step = steps[0]
    known = step.get("type") == "Metaspace" and step.get("replacement") == "▁" and step.get("split") is False
    if len(steps) > 1 or not known or step.get("prepend_scheme") not in ("first", "always"):
        raise Refused("pre_tokenizer", spec["pre_tokenizer"])
    return words, space_unless_there, {"prefix": "unless there"}


def space_first(text: str) -> str:
    return " " + text.replace("▁", " ") if text else ""


def space_unless_there(text: str) -> str:
    text = text.replace("▁", " ")
    return text if text.startswith(" ") or not text else " " + text


def nfc(text: str) -> str:
    if unicodedata.is_normalized("NFC", text):
        return text
    return "".join(part if i % 2 else unicodedata.normalize("NFC", part) for i, part in enumerate(NEWER_CHARACTER.split(text)))


def merge_order(pairs: list, units: set[str], words: list[str]) -> dict[str, int]:
    """The tokens that tiktoken shall know besides its units, in the order of their merges: token -> rank.

    The model merges listed pairs, tiktoken whatever two neighbours make a known token. That is the same if each token comes out
    of its own characters by a pair that is listed: two parts of a token can only be neighbours if that holds inside it. A token
    that does not come out at all is never made; with ignore_merges (`words`), a word that equals it still becomes it, in tiktoken, too.
    """
    position = {pair: i for i, pair in enumerate(pairs)}
    rank: dict[str, int] = {}
    for a, b in pairs:
        rank.setdefault(a + b, len(rank))
    for token in words:
        rank.setdefault(token, len(rank))
    kept, before = {}, -1
    for token in rank:
        if len(token) == 1 or not units.issuperset(token):
            continue
        pair = last_merge(token, rank)
        if pair is None and not words:
            continue
        if pair and position.get(pair, -1) <= before:
            raise Refused("model.merges", token, "comes out of other merges than those listed, or in another order")
        before = position[pair] if pair else before
        kept[token] = len(kept)
    return kept


def rising(ids: dict[bytes, int]) -> bool:
    """Whether ids can be the ranks. Those of single bytes are never compared."""
    merged = [i for piece, i in ids.items() if len(piece) > 1]
    return merged == sorted(merged)


def tiktoken_of(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    never = {NEVER: 1 + max(ranks.values())}  # without any special token, encode_to_numpy is slow
    return tiktoken.Encoding("latent", pat_str=pattern, mergeable_ranks=ranks, special_tokens=never)


def last_merge(token: str, rank: dict[str, int]) -> tuple[str, str] | None:
    """The two parts whose merge gives `token` when its characters are merged in the order of rank; None when it is not reached."""
    parts = list(token)
    while len(parts) > 2:
        ranks = [rank.get(a + b, len(rank)) for a, b in zip(parts, parts[1:])]
        best = min(ranks)
        if best == len(rank):
            return None
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def pieces_of(vocab: dict[str, int], spaced: bool) -> dict[int, bytes]:
    """The bytes that each id stands for."""
    if spaced:
        return {i: token.replace("▁", " ").encode() for token, i in vocab.items()} | {vocab[f"<0x{b:02X}>"]: bytes([b]) for b in range(256)}
    to_byte = {ord(name): b for b, name in enumerate(byte_names())}
    latin = {token: token.translate(to_byte) for token in vocab}
    return {vocab[token]: text.encode("latin-1") if max(text, default="") < "\u0100" else token.encode() for token, text in latin.items()}


def byte_names() -> list[str]:
    """GPT-2's spelling of the 256 bytes as visible characters, which tokenizer.json files use: byte -> character.

    Printable Latin-1 characters stand for themselves, the other 68 bytes get the code points from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    name = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [name[b] for b in range(256)]


def added_token(name: str, i: int) -> dict:
    return {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def byte_level_steps(pattern: str) -> dict:
    """The pre_tokenizer and the decoder of a byte-level tokenizer.json with this pattern."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None, "decoder": level}


def essence(vocab: dict, pairs: list, special: dict, rules: dict) -> dict:
    """All that decides the ids, whatever the file looks like; for what make_tokenizer makes, the file itself."""
    added = [added_token(name, i) for name, i in sorted(special.items(), key=lambda item: item[1])]
    return {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": pairs}} | rules


# --------------------------------------------------------------------------------------------------- making


def learn_merges(texts, n_merges: int) -> list[bytes]:
    """Byte-pair encoding (Sennrich et al. 2016): the tokens made by merging, `n_merges` times, the most frequent pair.

    Ties go to the pair that sorts first, so the result depends on nothing but the texts. Fewer merges come back when no
    pair occurs twice. Counts are updated only in the words that a merge touches.
    """
    counts = Counter(word.encode() for text in texts for word in regex.findall(WORDS, text))
    words = [[word[i : i + 1] for i in range(len(word))] for word in counts]
    weights = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> how often; pair -> words that may hold it

    def count(w: int, sign: int) -> None:
        for pair in zip(words[w], words[w][1:]):
            pairs[pair] += sign * weights[w]
            where[pair].add(w)

    for w in range(len(words)):
        count(w, +1)
    tokens = []
    while len(tokens) < n_merges and pairs:
        a, b = best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        for w in where.pop(best):
            count(w, -1)
            parts, i = words[w], 0
            while i < len(parts) - 1:
                if parts[i] == a and parts[i + 1] == b:
                    parts[i : i + 2] = [a + b]
                i += 1
            count(w, +1)
        pairs.pop(best, None)
        if a + b not in tokens:  # the same bytes can come out of two different pairs
            tokens.append(a + b)
    return tokens


def make_tokenizer(texts=(), n_vocab: int = 256) -> Tokenizer:
    """A byte-level tokenizer with at most `n_vocab` text tokens learned from `texts`, and six special ones after them."""
    names = byte_names()
    learned = ["".join(names[b] for b in token) for token in learn_merges(texts, n_vocab - 256)]
    rank = {token: i for i, token in enumerate(learned)}
    vocab = {token: i for i, token in enumerate(names + learned)}
    special = {name: len(vocab) + i for i, name in enumerate((BOS, EOS, *MARKERS))}
    spec = essence(vocab, [list(last_merge(token, rank)) for token in learned], special, {"normalizer": None} | byte_level_steps(WORDS))
    return Tokenizer(spec, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS})
