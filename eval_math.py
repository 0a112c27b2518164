"""Evaluate a model folder on held-out problems: accuracy of its answers, and the likelihood it gives to the text.

Accuracy: for each question of the corpus (questions.npy), generate and grade the answer chunk that follows.
    --mode=latent    BOS c c c  SOL PRI -> z z z EOL x x x      the model thinks, then answers; only x is graded
    --mode=raw       BOS c c c -> x x x                         the model answers at once
greedy, and sampled at temperature 1 (one sample a problem). A thought that does not end within --max_new tokens counts as wrong.

Likelihood, in nats a byte of the documents' text (all chunks, questions included; BOS, EOS and markers are not scored):
    raw       nll         -log p(text)
    latent    nll_bound   -log p(questions) minus a bound of log p(x | c) for every other chunk, from thoughts that the model
                          infers as in the E-step: minus the ELBO (K = 1) and IWAE-4, IWAE-16. Upper bounds: lower is better.
The chunks before a chunk, up to --before of them, are given as in infer_thoughts.py: as text (--context=bare), or with the thoughts that the
model infers for them, one picked from --samples (--context=thoughts; the bounds then come from a run of their own for each K).

    python eval_math.py --corpus=out/digits/heldout --model=out/M1 --out_dir=out/M1/eval
    python eval_math.py --corpus=out/digits/heldout --model=out/raw --mode=raw --out_dir=out/raw/eval

Writes results.json and responses.jsonl (one line a problem) into --out_dir.
"""

import json
import math
import re
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from data.cli import Progress, UserError, claim, opt, replacing, run, write_json
from data.corpus import PICK, PRIOR, RAW, TEST_DRAW, Corpus, hash_uniform, open_corpus, open_thoughts
from infer_thoughts import NOTHING, Engine, Limits, bound, context_of, ess, infer, pick, rank_in_group, write_chunk
from train import load_model, pick_device

BOUNDS = (1, 4, 16)


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt(help="corpus folder, held out")
    model: str = opt(help="model folder")
    out_dir: str = opt(help="where the results go")
    thoughts: str = opt("", "the true thoughts of the corpus, if known: to report how often the picked thought is right")
    mode: Literal["latent", "raw"] = opt("latent", "think first, or answer at once")
    samples: int = opt(4, "thoughts a chunk (K) for the effective sample size and the share of right picks", low=1)
    max_new: int = opt(128, "longest thought in tokens, its EOL included", low=1)
    max_answer: int = opt(32, "longest answer in tokens", low=1)
    context: Literal["bare", "thoughts"] = opt("thoughts", "earlier chunks as plain text, or (latent mode) with thoughts that the model infers for them")
    before: int = opt(3, "chunks before a chunk that are given", low=0)
    bound_docs: int = opt(250, "documents for the likelihood, the first ones; 0: all", low=0)
    rows: int = opt(0, "sequences generated side by side, at most; 0: 1024, fewer where memory is short", low=0)
    seed: int = opt(0, "sampling noise")
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")


# -------------------------------------------------------------------------------------------------- grading


def extract_answer(response: str) -> str | None:
    """The last number in the first line of a response, as it stands there; None if there is none."""
    lines = response.strip().splitlines()
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", lines[0]) if lines else []
    return numbers[-1] if numbers else None


def grade(response: str, gold: str) -> bool:
    """Whether the answer in the response has the value of the answer in the gold text."""

    def value(text: str) -> Fraction | None:
        number = extract_answer(text[:1000])
        try:
            return None if number is None else Fraction(number.replace(",", ""))
        except (ValueError, ZeroDivisionError):
            return None

    return value(gold) is not None and value(response) == value(gold)


# ------------------------------------------------------------------------------------------------- accuracy


def problems_of(corpus: Corpus) -> np.ndarray:
    """The chunks to be answered: those that follow a question in the same document."""
    after_question = np.flatnonzero(corpus.questions[:-1]) + 1
    same_doc = corpus.doc_of(after_question) == corpus.doc_of(after_question - 1)
    return after_question[same_doc & ~corpus.questions[after_question]]


def answer(engine: Engine, tok, corpus: Corpus, numbers, s: Settings, greedy: bool, picked=NOTHING) -> list[dict]:
    """Generate and grade the chunks `numbers`: dicts of prompt's chunk, thought, response, extracted, gold, correct, tokens."""
    limits = Limits(s.before, s.max_new + s.max_answer, engine.config.seq_len)
    contexts = [context_of(corpus, i, limits, picked) for i in numbers]
    form, stop = (PRIOR, {tok.eos, tok.sol}) if s.mode == "latent" else (RAW, {tok.eos, tok.sol, tok.eol})
    # The prompt is the context and, in latent mode, SOL PRI: the layout of a chunk whose thought is still unknown.
    prompts = [write_chunk(tok, corpus, i, c, None, PRIOR, picked)[0] for i, c in zip(numbers, contexts)]
    prompts = [p if form == PRIOR else p[:-2] for p in prompts]
    longest = s.max_answer + (s.max_new if form == PRIOR else 0)
    drawn = engine.generate(prompts, numbers, 1, longest, stop, s.seed, purpose=TEST_DRAW, greedy=greedy)
    records = []
    for i, [(ids, finished, _)] in zip(numbers, drawn):
        ids = list(ids[:-1] if finished else ids)
        ended = tok.eol in ids
        thought, response = (ids[: ids.index(tok.eol)], ids[ids.index(tok.eol) + 1 :]) if ended else (ids, [])
        if form == RAW:
            thought, response = [], ids
        response, gold = tok.decode(response), tok.decode(corpus.chunk(i))
        record = {"chunk": int(i), "thought": tok.decode(thought), "response": response, "gold": gold}
        record |= {"extracted": extract_answer(response), "correct": grade(response, gold)}
        records.append(record | {"tokens": len(ids), "cut_off": form == PRIOR and not ended})
    return records


def accuracy(records: list[dict]) -> dict:
    """Mean, its standard error, and counts."""
    n, mean = len(records), sum(r["correct"] for r in records) / len(records)
    counts = {"n": n, "cut_off": sum(r["cut_off"] for r in records), "no_answer": sum(r["extracted"] is None for r in records)}
    return {"accuracy": mean, "accuracy_se": math.sqrt(mean * (1 - mean) / n)} | counts


# ----------------------------------------------------------------------------------------------- likelihood


def text_nll(engine: Engine, tok, corpus: Corpus, numbers, s: Settings, picked=NOTHING) -> np.ndarray:
    """-log p(chunk | up to s.before chunks before it, with the thoughts in `picked`), in nats, for each chunk in `numbers` as plain text."""
    limits = Limits(s.before, 0, engine.config.seq_len)
    written = [write_chunk(tok, corpus, i, context_of(corpus, i, limits, picked), None, RAW, picked) for i in numbers]
    scores = engine.score([ids[: part.chunk[0]] for ids, part in written], [[ids[part.chunk[0] :]] for ids, part in written])
    return -np.array([row[0].sum() for row in scores])


def likelihood(engine: Engine, tok, corpus: Corpus, s: Settings, truth, on_tokens) -> dict:
    """nll, or nll_bound with what the inferred thoughts tell: ess, cut_off, pick_right (null without `truth`)."""
    n_docs = min(s.bound_docs or corpus.n_docs, corpus.n_docs)
    numbers = np.arange(corpus.docs[n_docs])
    n_bytes = sum(tok.n_bytes(corpus.chunk(i)) for i in numbers)
    counts = {"bound_docs": n_docs, "bytes": n_bytes}
    if s.mode == "raw":
        return {"nll": float(text_nll(engine, tok, corpus, numbers, s).sum() / n_bytes)} | counts
    latent, asked = numbers[~corpus.questions[numbers]], numbers[corpus.questions[numbers]]
    limits = Limits(s.before, s.max_new, engine.config.seq_len)

    def inferred(K: int):
        """(samples, nats of the questions), the latter in the context of the former's picks."""
        picked = {}
        got = infer(engine, tok, corpus, latent, K, limits, s.seed, context=s.context, purpose=TEST_DRAW, on_tokens=on_tokens, picked=picked)
        return got, text_nll(engine, tok, corpus, asked, s, picked).sum()

    # With thoughts in the context, the sum over a document's chunks is a bound only if all of its picks came from the same K.
    alike = s.context == "bare" or not rank_in_group(corpus.doc_of(latent)).any()  # no chunk with a thought stands before another
    K = max(s.samples, *BOUNDS) if alike else s.samples
    got, given = inferred(K)
    runs = {k: (got, given) if alike or k == K else inferred(k) for k in BOUNDS}
    bounds = {k: bound(of.log_w, k) for k, (of, _) in runs.items()}
    counts["unbounded"] = int((~np.isfinite(bounds[1])).sum())  # chunks with all thoughts cut off: left out of the bounds
    nll_bound = {str(k): float((runs[k][1] - v[np.isfinite(v)].sum()) / n_bytes) for k, v in bounds.items()}
    groups = got.log_w[:, : K // s.samples * s.samples].reshape(-1, s.samples)  # each group of K samples is one E-step
    picks = got.pick if K == s.samples else pick(groups, hash_uniform(PICK, s.seed, np.arange(len(groups))))
    right = None
    if truth:
        group_chunk, group_first = np.divmod(np.arange(len(groups)), len(groups) // len(latent))
        picked = [got.thoughts[c][f * s.samples + j] if j >= 0 else None for c, f, j in zip(group_chunk, group_first, picks)]
        gold = [truth.span(latent[c]) for c in group_chunk]
        right = float(np.mean([z is not None and np.array_equal(z, g) for z, g in zip(picked, gold)]))
    share = float((~got.finished).mean())
    return {"nll_bound": nll_bound, "ess": float(ess(groups).mean()), "pick_right": right, "cut_off_share": share} | counts


def thoughts_before(engine: Engine, tok, corpus: Corpus, s: Settings) -> dict:
    """{chunk: (thought, form)} that stand in the contexts: inferred and picked as in the E-step; none with --context=bare."""
    picked, sizes = {}, np.diff(corpus.chunks)
    if s.context == "thoughts" and s.mode == "latent":
        limits = Limits(s.before, s.max_new, engine.config.seq_len)
        numbers = np.flatnonzero(~corpus.questions & (sizes > 0) & (sizes + 6 + s.max_new <= limits.seq_len))
        numbers = numbers[np.append(np.diff(corpus.doc_of(numbers)) == 0, False)]  # a document's last one stands before none
        infer(engine, tok, corpus, numbers, s.samples, limits, s.seed, context=s.context, purpose=TEST_DRAW, picked=picked)
    return picked


def main(s: Settings) -> None:
    device = pick_device(s.device)
    model, tok = load_model(s.model, "cpu" if device == "mps" and not s.device else device)
    engine = Engine(model, s.rows)
    corpus = open_corpus(s.corpus, tok)
    truth = open_thoughts(s.thoughts, corpus) if s.thoughts else None
    numbers = problems_of(corpus)
    if not len(numbers):
        raise UserError(f"{s.corpus}: has no questions to answer (questions.npy)")
    out_dir = claim(s.out_dir, s)
    if (out_dir / "results.json").exists():
        print(f"{out_dir}: complete")
        return
    begin, sampled, progress = time.time(), 0, Progress("eval", 3, "parts")

    def on_tokens(n):
        nonlocal sampled
        sampled += n
        progress.update(2, sampled=f"{sampled / (time.time() - bound_begin):,.0f} tok/s")

    picked = thoughts_before(engine, tok, corpus, s)
    greedy = answer(engine, tok, corpus, numbers, s, greedy=True, picked=picked)
    progress.update(1)
    random = answer(engine, tok, corpus, numbers, s, greedy=False, picked=picked)
    progress.update(2)
    bound_begin = time.time()
    figures = likelihood(engine, tok, corpus, s, truth, on_tokens)
    results = accuracy(greedy) | {"sampled": accuracy(random)} | figures
    progress.update(3)
    with replacing(out_dir / "responses.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as f:
        for a, b in zip(greedy, random):
            f.write(json.dumps(a | {"sampled": {k: b[k] for k in ("thought", "response", "correct")}}, ensure_ascii=False) + "\n")
    tokens, seconds = sum(r["tokens"] for r in greedy + random), bound_begin - begin
    write_json(out_dir / "results.json", results | {"seconds": time.time() - begin, "tokens_per_s": tokens / seconds})
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in results.items()))


if __name__ == "__main__":
    run(main, Settings)
