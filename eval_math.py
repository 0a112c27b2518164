"""Evaluate models: the paper's benchmarks with few-shot chains of thought, or the questions of a corpus, and the likelihood of its text.

    raw       BOS  Problem .. Solution: s s s The final answer is a.   ...   Problem .. Solution: ->
    latent    BOS  Problem .. Solution: SOL PRI s s s EOL The final answer is a.   ...   Problem .. Solution: SOL PRI -> z z z EOL x x x

In latent mode the solution is the thought, laid out as in training (data/lib/corpus.py), and only what follows EOL is graded. The prompts of a
corpus are the chunks before the answer (questions.npy), as in infer_thoughts.py, without examples. Where
the corpus writes its answers on one line, and what follows them on the next, a response ends with its first
line (see answers_end_with_line). A corpus without questions, as data/text.py makes them, has nothing to
answer: its results.json is the likelihood alone, without "accuracy".

    python eval_math.py --benchmark=gsm8k --model=M --out_dir=out/gsm8k                 # greedy; data/benchmarks/gsm8k/test.jsonl, 8 shots
    python eval_math.py --benchmark=math500 --model=M --mode=latent --k=16 --out_dir=out/math     # 16 samples more: maj@k and pass@k
    python eval_math.py --benchmark=mine.jsonl --shots=few.jsonl --model=A,B --out_dir=out/mine   # lines of {"question", "answer"}; two models
    python eval_math.py --compare=out/a,out/b --out_dir=out/compared    # tables, picture, paired tests
    python eval_math.py --benchmark=gsm8k --model=M --finetune --seeds=5 --out_dir=out/sft        # train.py on the training problems first
    python eval_math.py --corpus=out/digits/heldout --model=out/M1 --out_dir=out/M1/eval          # a corpus: accuracy and likelihood

Benchmarks are files as published (jsonl or parquet), named by --file or put into data/benchmarks/NAME as test.jsonl and train.jsonl:
gsm8k from openai/grade-school-math, math from hendrycks/math, math500 from HuggingFaceH4/MATH-500, mmlu_stem from the STEM subjects
of cais/mmlu. Worked examples are our own (data/shots), or --shots=train draws them from the training problems, or a file has them.
--max_thought=N closes a thought at N tokens and lets the model answer. --finetune trains by train.py --loss=completion (questions
are given, thoughts take the prior form), then draws --k samples a problem; mean and spread are over --seeds.

A prompt that does not fit the model's context is refused, or, with --drop_shots, loses examples, which is counted. Written into --out_dir: responses.jsonl
(a line a problem; a run that was cut off goes on behind the last block there), results.json (names of
scores as lm-evaluation-harness has them), timing.json, and for a corpus likelihood.npz.

Likelihood of a corpus: raw and latent models on the same chunks, the same tokens, the same givens. A chunk
x is scored if the E-step would infer thoughts for it: it is no question, not empty, and fits into the
model's context beside --max_new (so give raw models the same --max_new). Of the first --bound_docs
documents. Given are the chunks c before it, up to --before of them, and nothing else: that the question is
over, or that a thought follows, is not told. BOS, EOS and markers are no text. In nats:

    raw       nll              -log p(x | c)
    latent    nll_alone        -log p(x | c), of a chunk written without a thought
              nll_thoughtless  -log( p(x | c) + p(SOL | c) p(x | c, SOL EOL) ): the same, not thinking
              nll_bound        -log( p(x | c) + p(SOL | c) ((1 - e) mean w + e p(x | c, SOL EOL)) )
                               with the mean over k = 1 (ELBO), 4 or 16 (IWAE) thoughts and e = NO_THOUGHT;
                               averaged over the groups of k in the K = max(--samples, 16) thoughts that
                               the model infers as in the E-step

A text shows no markers. So its probability is a sum over the ways to write it; training leaves only e open:

    p_text(x | c)  =  p(x | c)  +  p(SOL | c) ( (1 - e) p(x | c, SOL PRI)  +  e p(x | c, SOL EOL) )

w = p(z, x | c, SOL PRI) / q(z | c, x), and 0 where z was cut off. Its mean is unbiased for p(x, |z| <
max_new | c, SOL PRI), what x gets behind thoughts that end in time, which is at most p(x | c, SOL PRI). By
Jensen each nll_bound is in expectation at least -log p_text. It is finite however many thoughts are cut
off, and in the same context no cut-off improves it. So nothing is left out of a sum: where all are cut off
the rest of the mixture is what counts.

The c of a raw model is text. That of a latent one is text (--context=bare), or text with the thoughts that
were picked for it among all K (--context=thoughts): the same c for every k, for nll_alone, nll_thoughtless
and the questions. A pick depends on its chunk, on earlier ones and on chance, never on what follows. So for
every k the sum over a document's chunks is, in expectation, at least the -log of a probability of
documents: that of telling each chunk from those before it. But for k < K it is not what a run with K = k
would find: the contexts have picks among K.

Each figure is given a byte, a token (_token) and a document (_document) of the scored chunks;
nll_questions, in nats a byte of the same documents' questions, is apart. ess, pick_right, no_pick_share and
cut_off_share tell of E-steps with --samples thoughts. likelihood.npz has the nats of each document:
--compare shows paired differences.

Part one runs all that; part two is the grader: extract_answer(response), grade(response, gold).
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.benchmarks import read_rows
from data.lib.cli import Progress, UserError, claim, opt, read_json, replacing, run, write_json
from data.lib.corpus import PICK, PRIOR, RAW, TEST_DRAW, Corpus, hash_uniform, layout, open_corpus, open_thoughts, write_corpus, write_thoughts
from data.lib.engine import Engine
from data.lib.grader import Worker
from data.lib.problems import Item, choose_shots, find_file, read_items
from data.lib.ranks import pick_device
from data.lib.tokenizer import load_tokenizer
from infer_thoughts import (
    NOTHING,
    Limits,
    bound,
    can_think,
    context_of,
    ess,
    fits,
    infer,
    thoughtless,
    write_chunk,
)
from infer_thoughts import choose as choose_picks
from train import load_model

HERE = Path(__file__).resolve().parent
BOUNDS = (1, 4, 16)


@dataclass(kw_only=True)
class Settings:
    # what is asked
    benchmark: str = opt("", "gsm8k, math, math500, mmlu_stem, or a .jsonl or .parquet file of {question, answer}")
    corpus: str = opt("", "instead: a corpus folder with questions, held out")
    compare: str = opt("", "instead: out_dirs of earlier runs, with commas between")
    file: str = opt("", "the benchmark's problems; none: data/benchmarks/NAME/test.jsonl or .parquet")
    train_file: str = opt("", "its training problems, for --shots=train and --finetune; none: data/benchmarks/NAME/train.jsonl or .parquet")
    limit: int = opt(0, "only the first so many problems; 0: all", low=0)
    shots: str = opt("", "worked examples: a file like the benchmark's, with solutions; train: drawn from the training problems by --seed; none: our own")
    n_shots: int = opt(-1, "how many of them; -1: 8 for gsm8k, 4 for the others, 0 for a file without --shots", low=-1)
    drop_shots: bool = opt(False, "leave out examples where a prompt does not fit, and count them")
    show: int = opt(0, "print this many prompts", low=0)
    # who answers, and how
    model: str = opt("", "model folder; several with commas between are compared")
    out_dir: str = opt(help="where the results go")
    mode: Literal["latent", "raw"] = opt("latent", "think first, or answer at once")
    max_new: int = opt(0, "longest thought in tokens, its EOL included; raw mode: the longest solution, or "
        "of a corpus the room for a thought; 0: 512 for a benchmark, 128 for a corpus", low=0)  # fmt: skip
    max_answer: int = opt(32, "longest answer in tokens (latent mode, corpora)", low=1)
    max_thought: int = opt(0, "latent mode: close a thought after so many tokens, and let the model answer; 0: one that is not ended is wrong", low=0)
    k: int = opt(0, "responses sampled for each problem, beside the greedy one", low=0)
    temperature: float = opt(0.6, "of the k samples", low=0)
    top_p: float = opt(0.9, "of the k samples: only the likeliest tokens that have this mass; 1: all", low=0)
    # fine-tuning before the evaluation
    finetune: bool = opt(False, "train on the training problems, loss on the answer, then evaluate without examples; --k=0 becomes 16")
    seeds: int = opt(3, "so many fine-tuned models", low=1)
    epochs: float = opt(5.0, "passes over the training problems", low=0)
    train: str = opt("", 'more flags for train.py, as in --train="--lr=1e-5"')
    # likelihood of a corpus
    thoughts: str = opt("", "the true thoughts of the corpus, if known: to report how often the picked thought is right")
    samples: int = opt(4, "thoughts a chunk (K) for the effective sample size and the share of right picks", low=1)
    min_gain: float = opt(0.0, "a pick is dropped if log p(x|c,z) - log p(x|c, no thought) is below this, in "
        "nats; -inf: never", low=-math.inf)  # fmt: skip
    context: Literal["bare", "thoughts"] = opt("thoughts", "earlier chunks as plain text, or (latent mode) with thoughts that the model infers for them")
    before: int = opt(3, "chunks before a chunk that are given", low=0)
    bound_docs: int = opt(250, "documents for the likelihood, the first ones; 0: all", low=0)
    # how it is computed
    block: int = opt(0, "problems that are answered together and then written: what a kill can cost; 0: 64 on a CPU (a corpus: 1024), 1024 on a GPU", low=0)
    rows: int = opt(0, "sequences generated side by side, at most; 0: 1024, fewer where memory is short", low=0)
    seed: int = opt(0, "sampling noise, order of documents in training, choice of examples", low=0)
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")
UNTIL = ("Problem:", "Question:", "a line's end after \"The final answer is\"")
END = re.compile(r"Problem:|Question:|[Tt]he final answer is[^\n]*\n")


# ------------------------------------------------------------------------------------------------------------ prompts


@dataclass
class Problem:
    """What is asked. key seeds the noise of its samples; about is copied into its record."""

    key: int
    prompt: np.ndarray  # ids
    gold: str
    about: dict = field(default_factory=dict)


def few_shot_prompt(tok, shots: list[Item], item: Item, mode: str) -> np.ndarray:
    """Ids of the examples and the question. Raw text is encoded as one string; latent prompts are laid out chunk by chunk, as documents are."""
    if mode == "raw":
        solved = "".join(f"{x.question_text}{x.solution}{x.answer_text}\n\n" for x in shots)
        return np.array([tok.bos, *tok.encode(solved + item.question_text)], dtype=np.int64)
    chunks, thoughts = [], []
    for x in shots:
        chunks += [tok.encode(x.question_text), tok.encode(x.answer_text + "\n\n")]
        thoughts += [[], tok.encode(x.solution)]
    chunks, thoughts = [*chunks, tok.encode(item.question_text), []], [*thoughts, [], None]
    return layout(tok, chunks, thoughts, [RAW, PRIOR] * (len(shots) + 1), end=False)[0]


def benchmark_problems(s: Settings, tok, seq_len: int) -> tuple[list[Problem], dict]:
    """The problems with their prompts, and counts for results.json. UserError for a prompt that does not fit, unless --drop_shots."""
    items = read_items(find_file(s, "test"))
    items = items[: s.limit or None]
    shots = choose_shots(s, items)
    room = seq_len - s.max_new - (s.max_answer if s.mode == "latent" else 0)
    problems, dropped, too_long = [], 0, 0
    for key, item in enumerate(items):
        kept = list(shots)
        prompt = few_shot_prompt(tok, kept, item, s.mode)
        while len(prompt) > room and kept and s.drop_shots:
            kept.pop(0)
            prompt = few_shot_prompt(tok, kept, item, s.mode)
        if len(prompt) > room and not s.drop_shots:
            raise UserError(f"problem {key}: {len(shots)} examples and the question are {len(prompt)} tokens, and --max_new={s.max_new} more do not fit into the "
                            f"model's {seq_len}: lower --n_shots or --max_new, or give --drop_shots")  # fmt: skip
        dropped, too_long = dropped + len(shots) - len(kept), too_long + (len(prompt) > room)
        known = hashlib.sha256(json.dumps([item.question, item.answer]).encode()).hexdigest()[:16]
        about = {"question": known, "n_shots": len(kept), **item.about}
        problems.append(Problem(key, prompt if len(prompt) <= room else prompt[:0], item.answer, about))
    return problems, {"n_shots": len(shots), "dropped_shots": dropped, "too_long": too_long, "until": list(UNTIL)}


def asked_chunks(corpus: Corpus) -> np.ndarray:
    """The numbers of the chunks right behind a question of their document: the answers."""
    after_question = np.flatnonzero(corpus.questions[:-1]) + 1
    same_doc = corpus.doc_of(after_question) == corpus.doc_of(after_question - 1)
    return after_question[same_doc & ~corpus.questions[after_question]]


def answers_end_with_line(tok, corpus: Corpus) -> bool:
    """Whether a response to this corpus's questions ends where its first line ends.

    A document is chunks end to end: nothing but the next chunk's beginning says that an answer is over, and
    a model goes on with it. So the corpus must show where that is: some answers are followed by another chunk
    of their document, each such chunk begins on a new line, and no answer has a line end inside. Elsewhere,
    as in documents of one problem, a response ends at EOS.
    """
    answers = asked_chunks(corpus)
    behind = answers[answers + 1 < corpus.n_chunks] + 1
    behind = behind[corpus.doc_of(behind) == corpus.doc_of(behind - 1)]
    if not all(tok.decode(corpus.chunk(i)[:8]).startswith("\n") for i in behind):
        return False
    return len(behind) > 0 and not any("\n" in tok.decode(corpus.chunk(i)).strip() for i in answers)


def corpus_problems(
    s: Settings, tok, corpus: Corpus, seq_len: int, picked=NOTHING
) -> tuple[list[Problem], dict]:
    """The chunks that follow a question, with up to --before chunks as context, and counts for results.json.

    None in a corpus without questions. An answer that cannot carry a thought is left out and counted.
    """
    numbers, fitting = asked_chunks(corpus), can_think(corpus, s.max_new, seq_len)
    limits, problems, too_long = Limits(s.before, s.max_new + s.max_answer, seq_len), [], 0
    for i in numbers:
        context = context_of(corpus, i, limits, picked)
        if not fitting[i] or (s.before and i - 1 not in context):  # the question itself does not fit beside a response
            too_long += 1
            continue
        # The layout of a chunk whose thought is still unknown ends in SOL PRI.
        prompt = write_chunk(tok, corpus, i, context, None, PRIOR, picked)[0]
        gold = tok.decode(corpus.chunk(i))
        known = hashlib.sha256(corpus.chunk(i - 1).tobytes() + corpus.chunk(i).tobytes()).hexdigest()[:16]
        problems.append(
            Problem(int(i), prompt if s.mode == "latent" else prompt[:-2], gold, {"question": known})
        )
    return problems[: s.limit or None], {"answers_too_long": too_long}


# ---------------------------------------------------------------------------------------------------------- responses


def first_line(text: str) -> str:
    """A text to the end of its first line that says something: "\\n It is 9.\\nTom has" -> "\\n It is 9."."""
    begin = len(text) - len(text.lstrip())
    return text[: begin + len(text[begin:].partition("\n")[0])]


def respond(engine: Engine, tok, problems: list[Problem], s: Settings, samples: int, temperature: float,
            top_p: float, on_tokens=None, one_line: bool = False) -> list[list[dict]]:  # fmt: skip
    """`samples` responses to each problem, ungraded: thought (latent), response, tokens, cut_off, forced.

    one_line: a response ends with its first line (answers_end_with_line). Generation stops there or a few
    tokens later, and what came behind the line is cut; tokens counts all that was sampled.
    """
    latent = s.mode == "latent"
    stop = {tok.eos, tok.sol} if latent else {tok.eos, tok.sol, tok.eol}
    thought_limit = s.max_thought or s.max_new
    longest = thought_limit + s.max_answer if latent else s.max_answer if s.corpus else s.max_new
    asked = [p for p in problems if len(p.prompt)]

    def answer_ends(ids: list[int]) -> bool:
        text = tok.decode(ids if one_line else ids[-48:])
        return first_line(text) != text if one_line else bool(END.search(text))

    def ends(ids) -> bool:
        ids = ids.tolist()
        if not latent:
            return answer_ends(ids)
        return tok.eol in ids and answer_ends(ids[ids.index(tok.eol) + 1 :])

    def generate(prompts, keys, n, length, ends):
        how = {"purpose": TEST_DRAW, "temperature": temperature, "top_p": top_p, "on_tokens": on_tokens}
        how |= {"ends": ends if one_line or not s.corpus else None}
        drawn = engine.generate(prompts, keys, n, length, stop, s.seed, **how)
        return [[(list(ids[:-1] if len(ids) and ids[-1] in stop else ids), done) for ids, done, _ in row] for row in drawn]

    def read(answer: list[int], done: bool) -> tuple[str, bool]:
        """(response, whether it ended): alike for raw and latent models, and behind closed thoughts."""
        text = tok.decode(answer)
        kept = first_line(text) if one_line else text
        return kept, done or kept != text

    drawn = iter(generate([p.prompt for p in asked], [p.key for p in asked], samples, longest, ends))
    out, late = [], []
    for p in problems:
        if not len(p.prompt):  # too long for the model even without examples
            out.append([{"response": "", "tokens": 0, "cut_off": True, "forced": False} for _ in range(samples)])
            continue
        out.append([])
        for ids, done in next(drawn):
            response, done = ("", done) if latent else read(ids, done)
            record = {"thought": "", "response": response, "tokens": len(ids)}
            record |= {"cut_off": not done, "forced": False}
            if latent:
                ended = tok.eol in ids[:thought_limit]
                end = ids.index(tok.eol) if ended else min(len(ids), thought_limit)
                answer = ids[end + 1 :] if ended else []
                record |= {"thought": tok.decode(ids[:end]), "response": read(answer, done)[0]}
                record["cut_off"] = not ended
                if not ended and s.max_thought:
                    late.append((p, len(out[-1]), record, ids[:end]))
            out[-1].append(record)
    if late:  # budget forcing: their thoughts are closed, and they answer
        prompts = [np.append(p.prompt, [*ids, tok.eol]) for p, _, _, ids in late]
        keys = [(p.key << 20) + j + 1 for p, j, _, _ in late]
        answered = generate(prompts, keys, 1, s.max_answer, lambda ids: answer_ends(ids.tolist()))
        for (_, _, record, ids), [(answer, done)] in zip(late, answered):
            response, done = read(answer, done)
            record |= {"response": response, "tokens": len(ids) + 1 + len(answer)}
            record |= {"cut_off": not done, "forced": True}
    for record in (r for row in out for r in row):
        if not latent:
            record.pop("thought", None)
    return out


def answer_block(engine: Engine, tok, problems: list[Problem], s: Settings, grader, on_tokens=None,
                 one_line: bool = False) -> list[dict]:  # fmt: skip
    """The records of some problems: the greedy response first, then the sampled ones, all graded.

    one_line: as for respond().
    """
    rows = respond(engine, tok, problems, s, 1, 0.0, 1.0, on_tokens, one_line)
    if s.k:
        sampled = respond(engine, tok, problems, s, s.k, s.temperature, s.top_p, on_tokens, one_line)
        rows = [a + b for a, b in zip(rows, sampled)]
    records = []
    for p, row in zip(problems, rows):
        for r in row:
            r |= grader.ask("judge", r["response"], p.gold) or {"extracted": None, "correct": False, "strict": False, "graded": False}
        prompt = hashlib.sha256(p.prompt.tobytes()).hexdigest()[:16]
        records.append({"problem": p.key, **p.about, "prompt": prompt, "prompt_tokens": len(p.prompt), "gold": p.gold, "responses": row})
        if s.k > 1:
            records[-1]["alike"] = grader.ask("alike", [r["extracted"] for r in row[1:]]) or list(range(s.k))
    return records


def read_done(path: Path, problems: list[Problem], block: int) -> list[dict]:
    """The records of an earlier run that was cut off: its whole blocks."""
    records = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    known = next((n for n, (r, p) in enumerate(zip(records, problems)) if r.get("problem") != p.key), min(len(records), len(problems)))
    return records[: known if known == len(problems) else known // block * block]


def answer_all(engine: Engine, tok, problems: list[Problem], s: Settings, grader, out_dir: Path, timing: dict,
               one_line: bool) -> list[dict]:  # fmt: skip
    """All records, block by block; each block is written when it is done. one_line: as for respond()."""
    partial, whole = out_dir / "responses.partial.jsonl", out_dir / "responses.jsonl"
    block = s.block or (64 if engine.device.type == "cpu" and not s.corpus else 1024)
    records = read_done(whole if whole.exists() else partial, problems, block)
    if len(records) == len(problems) and whole.exists():
        return records
    with replacing(partial) as temporary:
        temporary.write_bytes(b"".join(line_of(r) for r in records))
    progress, tokens, begin = Progress("answer", len(problems), "problems", done=len(records)), 0, time.time()

    def on_tokens(n):
        nonlocal tokens
        tokens += n
        right = sum(r["responses"][0]["correct"] for r in records)
        progress.update(min(len(records), len(problems) - 1), right=f"{right}/{len(records)}", sampled=f"{tokens / (time.time() - begin):,.0f} tok/s")

    while len(records) < len(problems):
        some = problems[len(records) : len(records) + block]
        done = answer_block(engine, tok, some, s, grader, on_tokens, one_line)
        records += done
        with open(partial, "ab") as f:
            f.write(b"".join(map(line_of, done)))
    progress.update(len(problems), right=f"{sum(r['responses'][0]['correct'] for r in records)}/{len(records)}")
    os.replace(partial, whole)
    timing |= {"answer_seconds": time.time() - begin, "tokens_per_s": tokens / max(time.time() - begin, 1e-9)}
    return records


def line_of(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


# -------------------------------------------------------------------------------------------------------------- scores


def mean_and_error(values) -> tuple[float, float]:
    """Mean and its standard error (with n - 1, as lm-evaluation-harness)."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def pass_at(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k responses is right, from n of which `right` are (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(record: dict, k: int) -> bool:
    """Whether the commonest answer of the first k samples is right; of several, the one that came first."""
    sampled, groups = record["responses"][1 : k + 1], record["alike"][:k]
    votes = [g for g, r in zip(groups, sampled) if r["extracted"] is not None]
    return bool(votes) and sampled[max(votes, key=lambda g: (votes.count(g), -g))]["correct"]


def scores(records: list[dict], k: int) -> dict:
    """Accuracies of the greedy response (flexible: what extract_answer finds; strict: only "The final answer is X.") and of the samples, and counts."""
    greedy = [r["responses"][0] for r in records]
    (flexible, flexible_se), (strict, strict_se) = (mean_and_error([r[key] for r in greedy]) for key in ("correct", "strict"))
    out = {"n": len(records), "accuracy": flexible, "accuracy_se": flexible_se,
           "exact_match,flexible-extract": flexible, "exact_match_stderr,flexible-extract": flexible_se,
           "exact_match,strict-match": strict, "exact_match_stderr,strict-match": strict_se,
           "cut_off": sum(r["cut_off"] for r in greedy), "no_answer": sum(r["extracted"] is None for r in greedy),
           "forced": sum(r["forced"] for r in greedy), "not_graded": sum(not x["graded"] for r in records for x in r["responses"])}  # fmt: skip
    if k:
        right = [sum(x["correct"] for x in r["responses"][1:]) for r in records]
        mean, error = mean_and_error([c / k for c in right])
        sampled = {"k": k, "accuracy": mean, "accuracy_se": error, "cut_off": sum(x["cut_off"] for r in records for x in r["responses"][1:])}
        for j in [2**b for b in range(k.bit_length()) if 2**b < k] + [k]:
            sampled[f"pass@{j}"] = float(np.mean([pass_at(k, c, j) for c in right]))
            if j > 1:
                sampled[f"maj@{j}"] = float(np.mean([majority(r, j) for r in records]))
        out["sampled"] = sampled
    for part in ("level", "subject"):
        groups = sorted({r[part] for r in records if part in r})
        if groups:
            by = {g: [r["responses"][0]["correct"] for r in records if r.get(part) == g] for g in groups}
            out[f"by_{part}"] = {g: {"n": len(v), "accuracy": float(np.mean(v))} for g, v in by.items()}
    return out


# ----------------------------------------------------------------------------------------------------- likelihood


def text_nll(engine: Engine, tok, corpus: Corpus, numbers, s: Settings, picked=NOTHING) -> np.ndarray:
    """-log p(chunk | up to s.before chunks before it, with the thoughts in `picked`), in nats, for each chunk in `numbers` as plain text."""
    limits = Limits(
        s.before, s.max_new, engine.config.seq_len
    )  # room for a thought: the givens of a latent model
    written = [write_chunk(tok, corpus, i, context_of(corpus, i, limits, picked), None, RAW, picked) for i in numbers]
    scores = engine.score([ids[: part.chunk[0]] for ids, part in written], [[ids[part.chunk[0] :]] for ids, part in written])
    return -np.array([row[0].sum() for row in scores])


class Scored(NamedTuple):
    """What likelihood() scores: chunks that can carry a thought, and their documents' questions.

    counts: of what is left out.
    """

    numbers: np.ndarray
    asked: np.ndarray
    docs: np.ndarray  # of the documents of `numbers`, rising
    counts: dict


def choose_scored(s: Settings, corpus: Corpus, seq_len: int) -> Scored:
    """The chunks of the first --bound_docs documents; UserError when none can be scored."""
    n_docs = min(s.bound_docs or corpus.n_docs, corpus.n_docs)
    there = np.arange(corpus.docs[n_docs])
    questions, fitting = corpus.questions[there], fits(corpus, s.max_new, seq_len)[there]
    thinking = can_think(corpus, s.max_new, seq_len)[there]
    numbers = there[thinking]
    if not len(numbers):
        room = f"the model's {seq_len} tokens less --max_new={s.max_new} and 6"
        raise UserError(f"{corpus.folder}: no chunk of the first {n_docs} documents can be scored: each is a "
                        f"question, empty, or longer than {room}")  # fmt: skip
    docs = np.unique(corpus.doc_of(numbers))
    asked = there[questions & fitting]
    asked = asked[np.isin(corpus.doc_of(asked), docs)]
    left_out = {"too_long": ~questions & ~fitting, "questions_too_long": questions & ~fitting,
                "empty": ~questions & fitting & ~thinking}  # fmt: skip
    counts = {key: int(which.sum()) for key, which in left_out.items()}
    counts["docs_left_out"] = n_docs - len(docs)
    return Scored(numbers, asked, docs, counts)


def likelihood(engine: Engine, tok, corpus: Corpus, s: Settings, truth, on_tokens) -> tuple[dict, dict]:
    """(figures for results.json, arrays for likelihood.npz), see the module's docstring.

    truth: the corpus's true thoughts, or None.
    """
    scored, picked, about = choose_scored(s, corpus, engine.config.seq_len), {}, {}
    if s.mode == "raw":
        nats = {"nll": text_nll(engine, tok, corpus, scored.numbers, s)}
    else:
        limits, K = Limits(s.before, s.max_new, engine.config.seq_len), max(s.samples, *BOUNDS)
        how = {"context": s.context, "min_gain": s.min_gain, "purpose": TEST_DRAW, "on_tokens": on_tokens}
        got = infer(engine, tok, corpus, scored.numbers, K, limits, s.seed, picked=picked, **how)
        nats = {"thoughtless": -thoughtless(got), "alone": -got.log_alone}
        nats |= {f"bound_{k}": -bound(got, k) for k in BOUNDS}
        about = of_samples(got, s, scored.numbers, truth)
    short = shortened(corpus, scored.numbers, s, engine.config.seq_len, picked)
    questions = text_nll(engine, tok, corpus, scored.asked, s, picked)
    arrays = by_document(tok, corpus, scored, nats, questions)
    figures = in_units(tok, corpus, scored, arrays) | about | scored.counts | {"short_context": short}
    return figures, arrays


def by_document(tok, corpus: Corpus, scored: Scored, nats: dict, questions) -> dict:
    """The arrays of likelihood.npz, [n_docs] each: doc (numbers), bytes and tokens of scored chunks, nats.

    nats {name: [len(scored.numbers)]} and questions [len(scored.asked)] are summed for each document.
    """

    def total(numbers, values):
        place = np.searchsorted(scored.docs, corpus.doc_of(numbers))
        return np.bincount(place, weights=np.asarray(values, dtype=np.float64), minlength=len(scored.docs))

    n_bytes = [tok.n_bytes(corpus.chunk(i)) for i in scored.numbers]
    arrays = {"doc": scored.docs, "bytes": total(scored.numbers, n_bytes).astype(np.int64)}
    arrays["tokens"] = total(scored.numbers, np.diff(corpus.chunks)[scored.numbers]).astype(np.int64)
    arrays |= {key: total(scored.numbers, values) for key, values in nats.items()}
    return arrays | {"questions": total(scored.asked, questions)}


def in_units(tok, corpus: Corpus, scored: Scored, arrays: dict) -> dict:
    """Nats a byte, a token and a document of all: nll, or nll_bound {k: ...}, nll_thoughtless and nll_alone.

    And nll_questions, nats a byte of the questions (None where there are none); and what was counted.
    """
    n_asked = sum(tok.n_bytes(corpus.chunk(i)) for i in scored.asked)
    counts = {"bound_docs": len(scored.docs), "bound_chunks": len(scored.numbers)}
    counts |= {key: int(arrays[key].sum()) for key in ("bytes", "tokens")} | {"question_bytes": n_asked}
    figures = {}
    for unit, n in (("", counts["bytes"]), ("_token", counts["tokens"]), ("_document", counts["bound_docs"])):
        mean = {key: float(values.sum() / n) for key, values in arrays.items()}
        if "nll" in mean:
            figures["nll" + unit] = mean["nll"]
            continue
        figures["nll_bound" + unit] = {str(k): mean[f"bound_{k}"] for k in BOUNDS}
        figures |= {f"nll_{key}{unit}": mean[key] for key in ("thoughtless", "alone")}
    figures["nll_questions"] = float(arrays["questions"].sum() / n_asked) if n_asked else None
    return figures | counts


def shortened(corpus: Corpus, numbers, s: Settings, seq_len: int, picked) -> int:
    """How many of these chunks are given fewer than the --before chunks that there are, for want of room."""
    limits = Limits(s.before, s.max_new, seq_len)
    return sum(len(context_of(corpus, i, limits, picked)) < len(corpus.before(i, s.before)) for i in numbers)


def of_samples(got, s: Settings, numbers, truth) -> dict:
    """What E-steps with --samples thoughts find: each group of as many samples is one.

    ess; shares of picks: pick_right (None without `truth`), no_pick_share; of thoughts: cut_off_share.
    """
    n, K = got.log_w.shape
    n_groups = K // s.samples

    def grouped(x):
        return x[:, : n_groups * s.samples].reshape(n * n_groups, s.samples)

    weights, gain = grouped(got.log_w), grouped(got.log_x - got.log_none[:, None])
    picks = got.pick
    if n_groups > 1 or K > s.samples:
        uniform = hash_uniform(PICK, s.seed, np.arange(len(weights)))
        picks = choose_picks("resample", weights, gain, s.min_gain, uniform)
    shares = {"no_pick_share": (picks < 0).mean(), "cut_off_share": (~got.finished).mean()}
    figures = {"ess": ess(weights).mean()} | shares
    if truth:
        rows, groups = np.divmod(np.arange(len(picks)), n_groups)
        right = [
            j >= 0 and np.array_equal(got.thoughts[r][g * s.samples + j], truth.span(numbers[r]))
            for r, g, j in zip(rows, groups, picks)
        ]
        figures["pick_right"] = np.mean(right)
    return {key: float(x) for key, x in figures.items()} | ({} if truth else {"pick_right": None})


def thoughts_before(engine: Engine, tok, corpus: Corpus, s: Settings) -> dict:
    """{chunk: (thought, form)} that stand in the contexts: inferred and picked as in the E-step; none with --context=bare."""
    picked = {}
    if s.context == "thoughts" and s.mode == "latent":
        limits = Limits(s.before, s.max_new, engine.config.seq_len)
        numbers = np.flatnonzero(can_think(corpus, s.max_new, limits.seq_len))
        numbers = numbers[:-1][np.diff(corpus.doc_of(numbers)) == 0]  # a document's last stands before none
        how = {"context": s.context, "min_gain": s.min_gain, "purpose": TEST_DRAW}
        infer(engine, tok, corpus, numbers, s.samples, limits, s.seed, picked=picked, **how)
    return picked


# ---------------------------------------------------------------------------------------------- comparing several runs


def sign_test(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test: problems that only one of two runs solves, under a fair coin."""
    n, least = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


def paired(a: dict, b: dict) -> dict:
    """{question: right} of two runs on the same problems -> difference b - a with its paired standard error, counts and p-value."""
    mean, error = mean_and_error([float(b[q]) - float(a[q]) for q in a])
    only_a, only_b = sum(a[q] and not b[q] for q in a), sum(b[q] and not a[q] for q in a)
    return {"difference": mean, "difference_se": error, "only_first": only_a, "only_second": only_b, "p": sign_test(only_a, only_b)}


def paired_difference(a, b) -> tuple[float, float]:
    """(mean, standard error) of b - a over documents, in nats.

    a, b [n_docs]: arrays of likelihood.npz, of two models or measures on the same documents.
    """
    return mean_and_error(np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64))


def compare(folders: list[str], out_dir: Path) -> None:
    """compare.json, compare.png, tables: runs on the same problems, likelihood of the same documents."""
    names = [str(folder) for folder in folders]
    shared = os.path.commonprefix(names) if len(names) > 1 else ""
    names = [name[shared.rfind("/") + 1 :] for name in names]
    results = [read_json(Path(folder) / "results.json") for folder in folders]
    nats, why = compare_likelihood(folders, names)
    graded = ["exact_match,flexible-extract" in r for r in results]
    if not all(graded) and (any(graded) or not nats):
        folder, more = folders[graded.index(False)], f"; {why}" if why else ""
        raise UserError(f"{folder}: no results of a benchmark (results.json and responses.jsonl){more}")
    pairs = compare_accuracy(folders, names, results) if graded[0] else []
    if nats:
        print_likelihood(nats)
    elif why:
        print(f"likelihood: not compared; {why}")
    out_dir.mkdir(parents=True, exist_ok=True)
    runs = [{"folder": str(f)} | r for f, r in zip(folders, results)]
    write_json(out_dir / "compare.json", {"runs": runs, "pairs": pairs, "likelihood": nats})
    drawn = graded[0] and draw_comparison(names, results, out_dir / "compare.png")
    why = "matplotlib is not installed" if graded[0] else "it would show accuracies, and there are none"
    no_picture = f"; no picture: {why}"
    print(f"{out_dir}/compare.json" + (f", {out_dir}/compare.png" if drawn else no_picture))


def compare_accuracy(folders: list[str], names: list[str], results: list[dict]) -> list[dict]:
    """Print a table of runs with responses.jsonl; the paired tests. UserError if their problems differ."""
    runs = []
    for folder in folders:
        path = Path(folder) / "responses.jsonl"
        if not path.exists():
            raise UserError(f"{folder}: no results of a benchmark (results.json and responses.jsonl)")
        right = {r["question"] + f"-{r['problem']}": r["responses"][0]["correct"] for r in read_rows(path)}
        if runs and right.keys() != runs[0].keys():
            both = len(right.keys() & runs[0].keys())
            counts = f"{len(right)} and {len(runs[0])}, {both} in common"
            raise UserError(f"{folder}: asked other problems than {folders[0]}: {counts}")
        runs.append(right)
    pairs = [
        {"first": names[i], "second": names[j]} | paired(runs[i], runs[j])
        for j in range(len(runs))
        for i in range(j)
    ]
    heads = "mode, n, shots, flexible, strict, mean of k, maj@k, pass@k, cut off, no answer"
    rows = [["", *heads.split(", ")]]
    for name, r in zip(names, results):
        sampled = r.get("sampled", {})
        k = sampled.get("k", 0)
        keys = ("accuracy", f"maj@{k}", f"pass@{k}")
        more = [f"{sampled[key]:.3f}" if key in sampled else "-" for key in keys]
        flexible = f"{r['accuracy']:.3f} ± {r['accuracy_se']:.3f}"
        strict = f"{r['exact_match,strict-match']:.3f}"
        how = (r["mode"], r["n"], r.get("n_shots", "-"))
        rows.append([name, *how, flexible, strict, *more, r["cut_off"], r["no_answer"]])
    print_table(rows)
    for p in pairs:
        difference = f"{p['difference']:+.3f} ± {p['difference_se']:.3f}"
        only = f"{p['only_second']} against {p['only_first']} problems that only one solves"
        print(f"{p['second']} - {p['first']}: {difference}, {only}, p = {p['p']:.2g}")
    return pairs


def print_table(rows: list[list]) -> None:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    print("\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]))


# Of likelihood.npz, as they are shown.
MEASURES = {"nll": "NLL", "thoughtless": "thoughtless NLL", f"bound_{BOUNDS[-1]}": f"IWAE-{BOUNDS[-1]}"}


def compare_likelihood(folders: list[str], names: list[str]) -> tuple[dict, str]:
    """({documents, rows, pairs}, "") of all folders' likelihood.npz, or ({}, why not). In nats a document.

    Rows are means over documents, pairs the paired differences second - first, each with its standard error.
    """
    paths = [Path(folder) / "likelihood.npz" for folder in folders]
    missing = [path for path in paths if not path.exists()]
    if missing:
        return {}, f"{missing[0]}: no such file" if len(missing) < len(paths) else ""
    tables, rows, pairs = [read_table(path) for path in paths], [], []
    for folder, name, table in zip(folders, names, tables):
        if str(table["corpus"]) != str(tables[0]["corpus"]):
            return {}, f"{folder}: measured on another corpus than {folders[0]}"
        if any(not np.array_equal(table[key], tables[0][key]) for key in ("doc", "bytes", "tokens")):
            need = "give both the same --bound_docs and --max_new"
            return {}, f"{folder}: measured on other documents or chunks than {folders[0]}; {need}"
        rows += [(f"{name} {label}", table[key]) for key, label in MEASURES.items() if key in table]
    for j, (second, b) in enumerate(rows):
        for first, a in rows[:j]:
            mean, error = paired_difference(a, b)
            pairs.append({"first": first, "second": second, "difference": mean, "difference_se": error})
    means = [{"name": name} | dict(zip(("nats", "nats_se"), mean_and_error(values))) for name, values in rows]
    return {"documents": len(tables[0]["doc"]), "rows": means, "pairs": pairs}, ""


def read_table(path: Path) -> dict:
    """The arrays of a likelihood.npz; UserError when it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as f:
            table = dict(f)
    except (ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: damaged ({e}); remove its folder and run again") from None
    if not {"corpus", "doc", "bytes", "tokens"} <= table.keys():
        raise UserError(f"{path}: not a likelihood.npz of eval_math.py")
    return table


def print_likelihood(nats: dict) -> None:
    """The rows and pairs of compare_likelihood() as text."""
    rows = [[r["name"], f"{r['nats']:.4f} ± {r['nats_se']:.4f}"] for r in nats["rows"]]
    print_table([["", f"nats a document, of {nats['documents']}"], *rows])
    for p in nats["pairs"]:
        difference = f"{p['difference']:+.4f} ± {p['difference_se']:.4f}"
        print(f"{p['second']} - {p['first']}: {difference} nats a document")


def draw_comparison(names: list[str], results: list[dict], path: Path) -> bool:
    """Bars of the scores, with standard errors. False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(2 + 1.6 * len(names), 4), layout="constrained")
    place = np.arange(len(names))
    bars = [("flexible", [r["accuracy"] for r in results], [r["accuracy_se"] for r in results]),
            ("strict", [r["exact_match,strict-match"] for r in results], [r["exact_match_stderr,strict-match"] for r in results])]  # fmt: skip
    if all("sampled" in r for r in results):
        bars.append(("mean of k samples", [r["sampled"]["accuracy"] for r in results], [r["sampled"]["accuracy_se"] for r in results]))
        bars.append(("maj@k", [r["sampled"].get(f"maj@{r['sampled']['k']}", math.nan) for r in results], None))
        bars.append(("pass@k", [r["sampled"][f"pass@{r['sampled']['k']}"] for r in results], None))
    for i, (name, values, errors) in enumerate(bars):
        axis.bar(place + (i - (len(bars) - 1) / 2) * 0.8 / len(bars), values, 0.8 / len(bars), yerr=errors, capsize=2, label=name)
    axis.set_xticks(place, names)
    axis.set(ylabel="share of problems", ylim=(0, 1))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    return True


# -------------------------------------------------------------------------------------------------------- fine-tuning


def finetune(s: Settings) -> None:
    """Train --seeds models on the training problems (loss on the answer, and on the thought before it), evaluate each without examples, sum up."""
    out_dir = claim(s.out_dir, s, ("device", "rows"))
    tok = load_tokenizer(Path(s.model))
    items = [item for item in read_items(find_file(s, "train")) if item.solution]
    tested = {item.question for item in read_items(find_file(s, "test"))}
    kept = [item for item in items if item.question not in tested]
    print(f"{len(kept)} training problems, {len(items) - len(kept)} that are also tested left out")
    if not kept:
        raise UserError(f"{find_file(s, 'train')}: no training problem with a solution")
    latent, data = s.mode == "latent", out_dir / "data"
    if not (data / "thoughts" / "meta.json").exists():
        answers = [x.answer_text if latent else x.solution + x.answer_text for x in kept]
        write_corpus(data / "corpus", ([(x.question_text, True), (a, False)] for x, a in zip(kept, answers)), tok, {"maker": "eval_math.py", "mode": s.mode})
        spans = (span for x in kept for span in ([], tok.encode(x.solution) if latent else []))
        write_thoughts(data / "thoughts", open_corpus(data / "corpus", tok), spans, {"source": {"maker": "eval_math.py"}})
    corpus, thoughts = open_corpus(data / "corpus"), open_thoughts(data / "thoughts", open_corpus(data / "corpus"))
    longest = int((np.diff(corpus.chunks[corpus.docs]) + np.diff(thoughts.chunks[corpus.docs])).max()) + 8
    longest = min(longest, read_json(Path(s.model) / "config.json").get("max_position_embeddings", longest))
    batch, rows = min(64, len(kept)), []
    steps = max(1, round(s.epochs * len(kept) / batch))
    flags = {"corpus": data / "corpus", "thoughts": data / "thoughts", "init_from": s.model, "loss": "completion", "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0,
             "batch_size": batch, "max_steps": steps, "warmup": max(1, steps // 20), "seq_len": longest, "device": s.device}  # fmt: skip
    for seed in range(s.seed, s.seed + s.seeds):
        folder = out_dir / f"seed{seed}"
        run_train(folder / "model", flags | {"seed": seed}, s.train)
        evaluate(replace(s, finetune=False, n_shots=0, shots="", k=s.k or 16, model=str(folder / "model"), out_dir=str(folder / "eval"), seed=seed))
        rows.append(read_json(folder / "eval" / "results.json"))
    figures = {}
    for name, get in (("greedy", lambda r: r["accuracy"]), ("mean of k samples", lambda r: r["sampled"]["accuracy"])):
        values = [get(r) for r in rows]
        figures[name] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None, "seeds": values}
        print(f"{name}: {np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f} (standard deviation of {len(values)} seeds)" if len(values) > 1 else ""))
    write_json(out_dir / "results.json", figures | {"k": s.k or 16, "temperature": s.temperature, "top_p": s.top_p, "n": rows[0]["n"], "steps": steps})


def run_train(folder: Path, flags: dict, more: str) -> None:
    """Run train.py, which finds a folder complete, goes on, or begins."""
    flags = {k: v for k, v in flags.items() if v != ""} | dict(word.removeprefix("--").split("=", 1) for word in shlex.split(more))
    command = ["train.py", *(f"--{k}={v}" for k, v in (flags | {"out_dir": folder}).items())]
    print(f"$ python {shlex.join(command)}", flush=True)
    child = subprocess.Popen([sys.executable, str(HERE / command[0]), *command[1:]], stdin=subprocess.PIPE, env=os.environ | {"EM_CHILD": "1"})
    if child.wait():
        raise UserError(f"{folder}: train.py ended with exit code {child.returncode} (see above); the same command goes on from there")


# ---------------------------------------------------------------------------------------------------------------- main


def evaluate(s: Settings) -> None:
    """One model on one benchmark or corpus."""
    s = replace(s, max_new=s.max_new or (128 if s.corpus else 512))
    out_dir = claim(s.out_dir, s, ("device", "rows", "show"))
    if (out_dir / "results.json").exists():
        print(f"{out_dir}: complete")
        return
    grader, begin = Worker(), time.time()
    device = pick_device(s.device)
    model, tok = load_model(s.model, "cpu" if device == "mps" and not s.device else device)
    engine, timing = Engine(model, s.rows), {}
    if s.corpus:
        corpus = open_corpus(s.corpus, tok)
        truth = open_thoughts(s.thoughts, corpus) if s.thoughts else None
        choose_scored(s, corpus, engine.config.seq_len)  # refuses before anything is computed
        asked = len(asked_chunks(corpus)) > 0
        picked = thoughts_before(engine, tok, corpus, s) if asked else {}
        problems, counts = corpus_problems(s, tok, corpus, engine.config.seq_len, picked)
        one_line = answers_end_with_line(tok, corpus)
        counts["until"] = ["its first line's end"] if one_line else []
        if not problems:
            too_long = counts["answers_too_long"]
            print(f"{s.corpus}: no question with an answer that fits (too long {too_long}); likelihood only")
    else:
        problems, counts = benchmark_problems(s, tok, engine.config.seq_len)
        lengths, one_line = [len(p.prompt) for p in problems], False
        print(f"{len(problems)} problems, {counts['n_shots']} examples, prompts of {min(lengths)} to {max(lengths)} tokens; examples dropped {counts['dropped_shots']}, "
              f"questions too long {counts['too_long']}")  # fmt: skip
    for p in problems[: s.show]:
        print(f"\nproblem {p.key}, {len(p.prompt)} tokens, {p.about.get('n_shots', 0)} examples; gold: {p.gold!r}\n{tok.decode(p.prompt)}")
    results = {}
    if problems:
        records = answer_all(engine, tok, problems, s, grader, out_dir, timing, one_line)
        prompts = hashlib.sha256("".join(r["prompt"] for r in records).encode()).hexdigest()[:16]
        results = scores(records, s.k) | counts | {"prompt_hash": prompts, "graded_by": "eval_math.py"}
    if s.corpus:
        results |= measure_likelihood(engine, tok, corpus, s, truth, out_dir)
    how = {key: getattr(s, key) for key in ("mode", "benchmark", "file", "shots", "limit", "corpus", "model", "max_new", "max_answer", "max_thought", "temperature", "top_p", "seed")}
    write_json(out_dir / "timing.json", timing | {"seconds": time.time() - begin, "killed": grader.killed})
    write_json(out_dir / "results.json", results | how)
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in results.items() if not isinstance(v, dict) and "," not in k))
    grader.stop()


def measure_likelihood(engine: Engine, tok, corpus: Corpus, s: Settings, truth, out_dir: Path) -> dict:
    """likelihood() with its progress line; writes likelihood.npz, returns the figures."""
    begin, sampled, progress = time.time(), 0, Progress("bounds", 1, "corpora")

    def on_tokens(n):
        nonlocal sampled
        sampled += n
        progress.update(0, sampled=f"{sampled / (time.time() - begin):,.0f} tok/s")

    figures, arrays = likelihood(engine, tok, corpus, s, truth, on_tokens)
    with replacing(out_dir / "likelihood.npz") as temporary, open(temporary, "wb") as f:
        np.savez(f, corpus=np.array(corpus.meta["sha256"]), **arrays)
    progress.update(1)
    if "nll" in figures:
        said = f"NLL {figures['nll']:.4f}"
    else:
        bounds = ", ".join(f"K={k} {v:.4f}" for k, v in figures["nll_bound"].items())
        said = f"without a thought {figures['nll_thoughtless']:.4f}, bounds {bounds}"
    print(f"nats a byte of {figures['bound_chunks']} chunks: {said}")
    return figures


def main(s: Settings) -> None:
    s = replace(s, min_gain=max(s.min_gain, -1e9))  # JSON has no infinity
    if sum(map(bool, (s.benchmark, s.corpus, s.compare))) != 1:
        raise UserError("give one of --benchmark=NAME, --corpus=FOLDER and --compare=FOLDER,FOLDER")
    if s.compare:
        return compare(s.compare.split(","), Path(s.out_dir))
    if not s.model:
        raise UserError("--model=... is required: a model folder")
    if s.max_thought and (s.mode == "raw" or s.max_new and s.max_thought > s.max_new):
        raise UserError(f"--max_thought={s.max_thought}: needs --mode=latent, and at most --max_new")
    if s.benchmark:
        find_file(s, "test")  # before anything is loaded
    if s.finetune and s.corpus:
        raise UserError("--finetune: needs --benchmark")
    models = s.model.split(",")
    if len(models) == 1:
        return finetune(s) if s.finetune else evaluate(s)
    names = [Path(m).name for m in models]
    if len(set(names)) < len(names) or s.finetune:
        raise UserError(f"--model={s.model}: several models need names that differ, and no --finetune")
    for name, model in zip(names, models):
        print(f"\n{name}")
        evaluate(replace(s, model=model, out_dir=str(Path(s.out_dir) / name)))
    compare([str(Path(s.out_dir) / name) for name in names], Path(s.out_dir))


if __name__ == "__main__":
    run(main, Settings)
