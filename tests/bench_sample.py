"""E-step sampling against transformers' generate: same weights, prompts, K, longest thought and threads, in alternating runs.

    python tests/bench_sample.py --model=out/digits-samples4-seed0/M1 --corpus=out/digits-samples4-seed0/data/raw

transformers gets every help: its prompts are sorted by length (left-padded inside a batch), K samples by num_return_sequences, its best batch
size of those tried, EOL as the end token. Tokens are counted alike: sampled tokens up to and including EOL. Printed beside the rates: how much
of its work was padding of prompts and steps on rows that had ended.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data.cli import opt, run
from data.corpus import POSTERIOR, open_corpus
from infer_thoughts import Limits, context_of, generate, write_chunk
from train import load_model


@dataclass(kw_only=True)
class Settings:
    model: str = opt(help="model folder")
    corpus: str = opt(help="corpus folder")
    chunks: int = opt(512, "chunks to infer")
    samples: int = opt(4, "K")
    max_new: int = opt(64, "longest thought")
    repeats: int = opt(3, "alternating runs")
    threads: int = opt(2, "threads for both")


def theirs(reference, tok, prompts, s: Settings, batch: int) -> tuple[int, float, float, float]:
    """(tokens, seconds, share of prompt padding, share of decoding steps on ended rows)"""
    tokens = steps = padding = cells = 0
    begin = time.time()
    order = sorted(prompts, key=len)
    for i in range(0, len(order), batch):
        group = order[i : i + batch]
        width = max(map(len, group))
        ids = torch.full((len(group), width), tok.eos)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(group):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.from_numpy(prompt), 1
        out = reference.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=s.samples,
                                 max_new_tokens=s.max_new, eos_token_id=tok.eol, pad_token_id=tok.eos)[:, width:]  # fmt: skip
        ended = (out == tok.eol).int()
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1])
        tokens, steps = tokens + int(lengths.sum()), steps + out.numel()
        padding, cells = padding + int((mask == 0).sum()), cells + mask.numel()
    return tokens, time.time() - begin, padding / cells, 1 - tokens / steps


def main(s: Settings) -> None:
    import transformers

    torch.set_num_threads(s.threads)
    model, tok = load_model(s.model)
    reference = transformers.AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32)
    corpus = open_corpus(s.corpus, tok)
    numbers = np.flatnonzero(~corpus.questions)[: s.chunks]
    limits = Limits(3, s.max_new, model.config.seq_len)
    prompts = [write_chunk(tok, corpus, i, context_of(corpus, i, limits), None, POSTERIOR)[0] for i in numbers]
    best = (0.0, 0)
    for batch in (32, 128, 512):  # the best one for them
        tokens, seconds, padding, ended = theirs(reference, tok, prompts[:512], s, batch)
        print(f"transformers, {batch} prompts a batch: {tokens / seconds:,.0f} tokens/s", flush=True)
        best = max(best, (tokens / seconds, batch))
    ratios = []
    for _ in range(s.repeats):
        tokens, seconds, padding, ended = theirs(reference, tok, prompts, s, best[1])
        begin = time.time()
        drawn = generate(model, prompts, numbers, s.samples, s.max_new, {tok.eol}, 0)
        mine = sum(len(ids) for row in drawn for ids, _, _ in row) / (time.time() - begin)
        ratios.append(mine / (tokens / seconds))
        print(f"ours {mine:,.0f} tokens/s | transformers {tokens / seconds:,.0f} tokens/s ({padding:.0%} of prompt cells padding, "
              f"{ended:.0%} of decoding steps on ended rows) | ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
    print(f"median ratio {np.median(ratios):.2f}")


if __name__ == "__main__":
    run(main, Settings)
