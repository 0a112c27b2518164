"""Tokenizers: tokenizer.json files as tiktoken encodings, and the marker tokens.

All tokenizers here are byte-level BPE: text is split into words by a pattern, each word into bytes, and the bytes are
merged in a fixed order; whatever comes in can be encoded, and decoding gives it back byte for byte. Two sources:

    make_tokenizer(texts, n_vocab)   256 bytes, plus merges learned from `texts` (none for n_vocab=256: plain bytes)
    load_tokenizer(path)             a tokenizer.json of that family in Hugging Face's format (GPT-2, SmolLM2, ...)

What is written here opens in the `tokenizers` and `transformers` libraries with the same ids. Text is never searched for
special tokens: a document that spells out "<|END_OF_LATENT|>" is encoded as ordinary characters.
"""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import regex  # comes with tiktoken, which splits with the same syntax
import tiktoken

from data.cli import UserError, read_json, replacing

MARKERS = ("<|START_OF_LATENT|>", "<|END_OF_LATENT|>", "<|PRIOR_PREFIX|>", "<|POSTERIOR_PREFIX|>")
BOS, EOS = "<|BOS|>", "<|EOS|>"

# Words with the space before them, single digits (arithmetic is learned digit by digit), runs of signs, white space.
WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Ids for text. `bos eos sol eol pri pos` are the special tokens, `n_vocab` counts all, `sha256` is the identity."""

    def __init__(self, pattern: str, ranks: dict[bytes, int], special: dict[str, int], bos: str, eos: str):
        self.pattern, self.ranks, self.special = pattern, ranks, special
        self.bos_name, self.eos_name = bos, eos
        self.bos, self.eos = special[bos], special[eos]
        self.sol, self.eol, self.pri, self.pos = (special[m] for m in MARKERS)
        self.n_vocab = 1 + max(max(ranks.values()), max(special.values()))
        self.encoding = tiktoken.Encoding("latent", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.sha256 = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Text of the ids, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids], errors="replace")

    def n_bytes(self, ids) -> int:
        """How many bytes of text the ids stand for."""
        return len(self.encoding.decode_bytes([int(i) for i in ids]))

    def to_json(self) -> dict:
        """The content of tokenizer.json, as Hugging Face's tokenizers library reads it."""
        names = byte_names()
        spell = {token: "".join(names[b] for b in token) for token in self.ranks}
        added = [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for name, i in sorted(self.special.items(), key=lambda item: item[1])
        ]
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        merges = [[spell[part] for part in self._parts(token)] for token, _ in by_rank if len(token) > 1]
        return {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "model": {"type": "BPE", "vocab": {spell[t]: i for t, i in by_rank}, "merges": merges},
        }

    def _parts(self, token: bytes) -> list[bytes]:
        """The two tokens whose merge made `token`: what is left of its bytes when only earlier merges are allowed."""
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [(self.ranks.get(a + b, self.n_vocab), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            rank, i = min(pairs)
            if rank >= self.ranks[token]:
                raise UserError(f"tokenizer: token {token!r} cannot be reached by merges")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def save(self, folder) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self.bos_name, "eos_token": self.eos_name}
        for name, content in (("tokenizer_config.json", config), ("tokenizer.json", self.to_json())):
            with replacing(Path(folder) / name) as temporary:
                temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def byte_names() -> list[str]:
    """GPT-2's spelling of the 256 bytes as visible characters, which tokenizer.json files use: byte -> character.

    Printable Latin-1 characters stand for themselves, the other 68 bytes get the code points from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    name = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [name[b] for b in range(256)]


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
    tokens = [bytes([b]) for b in range(256)] + learn_merges(texts, n_vocab - 256)
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {name: len(ranks) + i for i, name in enumerate((BOS, EOS, *MARKERS))}
    return Tokenizer(WORDS, ranks, special, BOS, EOS)


def load_tokenizer(path) -> Tokenizer:
    """Read a tokenizer.json (or the folder that holds it). Markers that it lacks are appended after its last id.

    Only what can be represented exactly is read: byte-level BPE whose ids follow the order of its merges. UserError otherwise.
    """
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    spec = read_json(path)
    try:
        model, pattern = spec["model"], split_pattern(spec["pre_tokenizer"])
        if model["type"] != "BPE" or pattern is None or spec.get("normalizer") is not None:
            raise UserError(f"{path}: only byte-level BPE without a normalizer is supported, not {model['type']} of this kind")
        special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        to_byte = {name: b for b, name in enumerate(byte_names())}
        ranks = {bytes(to_byte[c] for c in t): i for t, i in model["vocab"].items() if t not in special}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        ids = [model["vocab"][a + b] for a, b in merges]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not a byte-level tokenizer.json ({type(e).__name__}: {e})") from None
    if ids != sorted(ids) or len(ids) + 256 != len(ranks):
        raise UserError(f"{path}: its ids do not follow its merges; tiktoken cannot represent it exactly")
    next_id = 1 + max([*ranks.values(), *special.values()])
    for marker in MARKERS:
        if marker not in special:
            special[marker], next_id = next_id, next_id + 1
    beside = path.with_name("tokenizer_config.json")
    config = read_json(beside) if beside.exists() else {}
    names = [config.get(key) for key in ("bos_token", "eos_token")]
    names = [n["content"] if isinstance(n, dict) else n for n in names]
    if names[1] not in special:
        raise UserError(f"{beside}: eos_token {names[1]!r} is not among the special tokens of {path.name}")
    bos = names[0] if names[0] in special else names[1]  # GPT-2's way: one token for both
    return Tokenizer(pattern, ranks, special, bos, names[1])


def split_pattern(pre: dict) -> str | None:
    """The word pattern of a pre_tokenizer entry, or None when it is not one that tiktoken can follow."""
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(splits) > 1:
        return None
    if not splits:
        return GPT2_WORDS if last.get("use_regex", True) else None
    split = splits[0]
    plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"] and not last.get("use_regex", True)
    return split["pattern"].get("Regex") if plain else None
