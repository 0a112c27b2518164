"""Speed of encode_array(), by which corpora are written, against plain tiktoken.

    python tests/bench_tokenizer.py --tokenizers=../shared/data/llama2,/tmp/smollm2

Both have the same pattern and merges, and take turns in one process and one thread.
Texts are GSM8K's training problems, question and answer apart (chunks) or ten together
(documents), and the calculus book by paragraph and by page.

For a byte-level tokenizer the other side is tiktoken's encode_ordinary with the pattern
of tokenizer.json itself. For one with byte fallback it is encode_ordinary on text that
is already prepared, which leaves out all work on ids. Each byte-level tokenizer is also
timed with the words of Llama 3, and with those of Qwen after NFC. Printed are the median
ratio of the paired runs (above 1: faster than tiktoken), its spread, and tokens/s.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tiktoken

from data.lib.cli import opt, read_json, run
from data.lib.tokenizer import Tokenizer, byte_level_steps, read_split

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(kw_only=True)
class Settings:
    tokenizers: str = opt(help="folders with a tokenizer.json, separated by commas")
    data: str = opt("../shared/data", "folder with gsm8k/train.jsonl and calculus/calculus_made_easy.jsonl")
    repeats: int = opt(15, "alternating runs", low=3)


def read_texts(data: Path) -> dict[str, list[str]]:
    problems = [json.loads(line) for line in open(data / "gsm8k/train.jsonl", encoding="utf-8")]
    pages = [
        json.loads(line)["text"]
        for line in open(data / "calculus/calculus_made_easy.jsonl", encoding="utf-8")
    ]
    whole = [p["question"] + "\n" + p["answer"] for p in problems]
    return {
        "gsm8k chunks": [text for p in problems[:3000] for text in (p["question"], p["answer"])],
        "gsm8k documents": ["\n\n".join(whole[i : i + 10]) for i in range(0, 3000, 10)],
        "calculus chunks": [part for page in pages for part in page.split("\n\n") if part],
        "calculus documents": pages,
    }


def variants(folder: Path):
    """(name, tokenizer, plain tiktoken, function that prepares its texts)"""
    spec, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    tok = Tokenizer(spec, config)
    if tok.spaced:
        yield folder.name, tok, tok.encoding, tok.prepare
        return
    for name, change in (
        ("", {}),
        (" with Llama 3's words", byte_level_steps(LLAMA3)),
        (
            " with Qwen's words, NFC",
            byte_level_steps(LLAMA3.replace("{1,3}", "")) | {"normalizer": {"type": "NFC"}},
        ),
    ):
        tok = Tokenizer(spec | change, config)
        plain = tiktoken.Encoding(
            "plain",
            pat_str=read_split(spec | change),
            mergeable_ranks=tok.encoding._mergeable_ranks,
            special_tokens={},
        )
        yield folder.name + name, tok, plain, str


def seconds(encode, texts: list[str]) -> float:
    begin = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - begin


def main(s: Settings) -> None:
    for folder in s.tokenizers.split(","):
        for name, tok, plain, prepare in variants(Path(folder)):
            for kind, texts in read_texts(Path(s.data)).items():
                prepared = [prepare(text) for text in texts]
                n_tokens = sum(len(tok.encode(text)) for text in texts)
                theirs, ours = [], []
                for _ in range(s.repeats):
                    theirs.append(seconds(plain.encode_ordinary, prepared))
                    ours.append(seconds(tok.encode_array, texts))
                ratios = np.array(theirs) / np.array(ours)
                low, median, high = np.quantile(ratios, [0.1, 0.5, 0.9])
                spread = f"(10% to 90%: {low:.2f} to {high:.2f})"
                speed = f"{n_tokens / min(ours):>12,.0f} tokens/s"
                print(f"{name:<34} {kind:<19} ratio {median:.2f} {spread} {speed}", flush=True)


if __name__ == "__main__":
    run(main, Settings)
