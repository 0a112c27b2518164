"""Evaluate models: the paper's benchmarks with few-shot chains of thought, or the questions of a corpus, and the likelihood of its text.

    raw       BOS  Problem .. Solution: s s s The final answer is a.   ...   Problem .. Solution: ->
    latent    BOS  Problem .. Solution: SOL PRI s s s EOL The final answer is a.   ...   Problem .. Solution: SOL PRI -> z z z EOL x x x

In latent mode the solution is the thought, laid out as in training (data/corpus.py), and only what follows EOL is graded. The prompts of a
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
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import mpmath
import numpy as np
import sympy
from sympy import E, I, Integer, Rational, Symbol, oo, pi, zoo

from data.benchmarks import fault, read_rows
from data.cli import Progress, UserError, claim, opt, read_json, replacing, run, write_json
from data.corpus import PICK, PRIOR, RAW, TEST_DRAW, Corpus, hash_uniform, layout, open_corpus, open_thoughts, write_corpus, write_thoughts
from data.tokenizer import load_tokenizer
from infer_thoughts import (
    NOTHING,
    Engine,
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
from train import load_model, pick_device

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


# ============================================================================================== PART ONE: THE EVALUATION
# ---------------------------------------------------------------------------------------------- problems and examples

N_SHOTS = {"gsm8k": 8, "math": 4, "math500": 4, "mmlu_stem": 4}
UNTIL = ("Problem:", "Question:", "a line's end after \"The final answer is\"")
END = re.compile(r"Problem:|Question:|[Tt]he final answer is[^\n]*\n")
STRICT = re.compile(r"[Tt]he final answer is:?\s+(.+?)\.(?=\s|$)")


class Item(NamedTuple):
    """A problem of a benchmark. `about`: level and subject, where the file has them."""

    question: str
    solution: str
    answer: str
    about: dict

    question_text = property(lambda self: f"Problem:\n{self.question}\n\nSolution:\n")

    @property
    def answer_text(self) -> str:
        """The sentence that a response must end with; in dollar signs where the problem writes its formulas so."""
        return f"\nThe final answer is ${self.answer}$." if "$" in self.question + self.solution else f"\nThe final answer is {self.answer}."


def read_item(row: dict, where: str) -> Item:
    """A row of GSM8K, MATH, MATH-500, MMLU or any {question, answer}, told apart by its fields."""
    if why := fault(row):
        raise UserError(f"{where}: {why} (expected are rows of GSM8K, MATH, MMLU, or question and answer)")
    question, answer, solution, choices = row.get("question", row.get("problem")), row.get("answer"), row.get("solution") or "", row.get("choices")
    if isinstance(choices, list) and 0 < len(choices) <= 10:
        letters = "ABCDEFGHIJ"[: len(choices)]
        answer = letters[answer] if isinstance(answer, int) else answer
        question = "\n".join([question.strip(), *(f"({a}) {c}" for a, c in zip(letters, choices))])
    elif isinstance(answer, str) and "####" in answer:
        solution, _, answer = answer.rpartition("####")
        solution = re.sub(r"<<[^<>]*>>", "", solution)
    elif answer is None:
        answer = extract_answer(solution)
    if not answer and answer != 0:
        raise UserError(f"{where}: its solution says no answer")
    about = {"level": str(row["level"]).removeprefix("Level ")} if row.get("level") is not None else {}
    about |= {"subject": str(row.get("subject") or row.get("type"))} if row.get("subject") or row.get("type") else {}
    return Item(question.strip(), " ".join(solution.split("\n\n")).strip(), str(answer).strip(), about)


def find_file(s: Settings, split: str) -> Path:
    """The file of a split: named by a flag, or in data/benchmarks."""
    named = s.train_file if split == "train" else s.file or (s.benchmark if s.benchmark not in N_SHOTS else "")
    folder = HERE / "data" / "benchmarks" / s.benchmark
    places = [Path(named)] if named else [folder / f"{split}.jsonl", folder / f"{split}.parquet"]
    found = next((path for path in places if path.is_file()), None)
    if found is None and s.benchmark not in N_SHOTS and split != "train":
        raise UserError(f"{places[0]}: no such file; --benchmark is one of {', '.join(N_SHOTS)}, or a .jsonl or .parquet file")
    if found is None:
        known = s.benchmark in N_SHOTS and (s.benchmark, split) != ("math500", "train")  # MATH-500 has no training problems
        source = f"; get it by `python data/benchmarks.py {s.benchmark}`" if known else ""
        raise UserError(f"{places[0]}: no such file{source}, or name it by --{'train_file' if split == 'train' else 'file'}=FILE")
    return found


def read_items(path: Path) -> list[Item]:
    items = [read_item(row, f"{path}:{number}") for number, row in enumerate(read_rows(path), 1)]
    if not items:
        raise UserError(f"{path}: holds no problem")
    return items


def choose_shots(s: Settings, tested: list[Item]) -> list[Item]:
    """The worked examples, in their order; none of them is also tested."""
    n = s.n_shots if s.n_shots >= 0 else N_SHOTS.get(s.benchmark, 4 if s.shots else 0)
    if not n:
        return []
    if not s.shots and s.benchmark not in N_SHOTS:
        raise UserError(f"--n_shots={n}: {s.benchmark} has no examples of ours; give --shots=FILE")
    own = HERE / "data" / "shots" / ("math" if s.benchmark == "math500" else s.benchmark)
    path = find_file(s, "train") if s.shots == "train" else Path(s.shots or f"{own}.jsonl")
    if not path.is_file():
        raise UserError(f"{path}: no such file; --shots is a file of worked examples, or train")
    questions = {item.question for item in tested}
    items = [item for item in read_items(path) if item.solution and item.question not in questions]
    if s.shots == "train":
        random.Random(s.seed).shuffle(items)
    if len(items) < n:
        raise UserError(f"{path}: {len(items)} examples with a solution that are not tested, but --n_shots={n}")
    return items[:n]


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


# ============================================================================================== PART TWO: THE GRADER
#
# grade(response, gold) = the answers that extract_answer finds in both mean the same. Pure functions of strings. What a model wrote is data: it
# is cut into tokens and read by the parser below, which builds sympy objects by calling their constructors; no string ever reaches sympy.

MAX_RESPONSE, MAX_ANSWER = 200_000, 4_000  # characters that are looked at; of an answer that is read
MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 600, 40, 32  # of an answer; of its nesting; in a list, set or matrix
MAX_DIGITS, MAX_BITS = 4_000, 30_000  # of a number as written; of one that is worked out


class Unreadable(Exception):
    """Not an answer that the parser knows, or one beyond its limits."""


# -------------------------------------------------------------------------------------------- from a response to an answer

# Where a base model goes on with a problem of its own making, or a chat model with another turn.
NEXT_PROBLEM = re.compile(
    r"(?:^|\n|(?<=[.!?$}\]*]))[#*>\- \t]{0,20}(?:(?:next|new|another)\s+)?(?:problem|question|exercise|user|human|instruction|input)\b[ \t]*#?\d*[ \t]*\**[:.]"
    r"|\n[#* \t]{0,20}Q[ \t]*\d*[ \t]*[:.]|\n[ \t]{0,9}#+[ \t]*(?:problem|question|exercise|instruction|example)\b|\n[ \t]*(?:problem|exercise|example)[ \t]+\d+\b"
    r"|<\|?(?:im_start|im_end|user|endoftext|eot_id|end_of_turn|start_of_turn|start_header_id|end)\b[^>\n]{0,20}>|</s>|\[/?INST\]",
    re.IGNORECASE,
)
HOPE = re.compile(r"I hope (?:it|this) is correct", re.IGNORECASE)

# (pattern, priority): the lowest number that is found wins, of equals the right-most. The answer is what follows.
SIGNS = (
    (re.compile(r"final\s+answer\b[*_}.]*\s*(?:is|are|:|=)*", re.IGNORECASE), 0),
    (re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])"), 1),
    (re.compile(r"(?:^|\n|\s)####(?!#)[ \t]*(?=\S)"), 1),
    (re.compile(r"<answer>", re.IGNORECASE), 1),
    (re.compile(r"\b(?:answers?|ans|choice|option)\b[*_\"']*\s*(?:is|are|would be|must be|:|=)+", re.IGNORECASE), 2),
    (re.compile(r"(?:^|\n)#+[ \t]*answer[ \t]*\n|\\text(?:bf|it)\{answers?[.:]?\}|\*\*answer[.:]?\*\*", re.IGNORECASE), 2),
    (re.compile(r"\b(?:option|choice|answer)\s+(?=\(?[A-J]\b)"), 3),
)
# What stands around an answer in its sentence.
BECAUSE = re.compile(r",?\s+(?:because|since|as (?:we|it|the)|which|where|so that|when we|for which|and (?:the|so|we|this|it))\b", re.IGNORECASE)
BEFORE = re.compile(r"^(?:[\s,:]|(?:therefore|thus|hence|indeed|simply|then|just|clearly|of course|also|exactly)\b|not\b.{1,80}?\bbut\b)+", re.IGNORECASE)
REMARK = re.compile(r"\s*\((?:see|as|from|since|because|by|using|note|check)\b[^()]{0,200}\)$", re.IGNORECASE)
QED = re.compile(r"[\s$.]*\\(?:blacksquare|square|qed|Box)[\s$.]*$")
TAG = re.compile(r"</?(?:p|b|strong|div|br|span|em|i|u|code|center|li|ul)\b[^<>]{0,40}>", re.IGNORECASE)
DOUBLED = re.compile(r"\\\\(?=(?:boxed|d?frac|sqrt|text|pi|left|cdot|times)\b)")
FORMULA = re.compile(r"\$\$(.{1,2000}?)\$\$|(?<!\\)\$([^$]{1,2000}?)(?<!\\)\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-−]?\s?(?:\\?\$)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)(?::\d+)*(?:\s?/\s?\d+)?(?:\s?[¼-¾⅐-⅞])?(?:\s?\\?%)?|[-−]?[¼-¾⅐-⅞]")


def braces(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and its partner; None without one."""
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + MAX_ANSWER):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return text[start + 1 : m.start()]
    return None


def first_problem(text: str) -> str:
    """The response, without markup, up to the next made-up problem or turn, unless nothing before it could be an answer."""
    text = TAG.sub(" ", text.replace("\ufeff", "").replace("\u200b", ""))
    text = text if "\\begin" in text else DOUBLED.sub(r"\\", text)  # not the end of a matrix' row
    for n, m in enumerate(NEXT_PROBLEM.finditer(text)):
        before = text[: m.start()]
        if re.search(r"\d|\\boxed|answer", before) or (before.strip() and len(before) < 80 and not before.rstrip().endswith(":")):
            text = before
            break
        if n > 20:
            break
    hope = HOPE.search(text)
    return text[: hope.start()] if hope and text[: hope.start()].strip() else text


def sentence(text: str, start: int) -> str:
    """The text from `start` to the end of its sentence: a full stop, or a line's end, outside of formulas and braces."""
    begin, start = start, re.compile(r"[\s:*_>`}]*").match(text, start).end()
    depth, math_mode, end = 0, False, min(len(text), start + MAX_ANSWER)
    for m in re.compile(r"\\[()\[\]]|\\begin|\\end|\\.|\$\$?|[{}\n]|\.(?=\s|$|[A-Z\"*])|<", re.DOTALL).finditer(text, start, end):
        c = m[0]
        if c in ("\\(", "\\[", "\\begin", "{"):
            depth += 1
        elif c in ("\\)", "\\]", "\\end", "}"):
            depth -= 1
            if depth < 0:
                end = m.start()
                break
        elif c in ("$", "$$"):
            math_mode = not math_mode
        elif (c == "\n" and not depth and not math_mode) or (c == "." and not depth and not math_mode and not re.search(r"\b(?:[ap]\.m|vs|approx)$", text[max(0, m.start() - 8) : m.start()])) or (c == "<" and text.startswith("</", m.start())):
            end = m.start()
            break
    if "**" in text[begin:start]:
        end = start + len(text[start:end].split("**")[0])
    answer = text[start:end].lstrip(" \t\n,;:*_`").rstrip(" \t\n.,;:*_`")
    return answer[1:].split('"')[0] if answer[:1] == '"' else answer  # {"answer": "5"}


def boxed(text: str, start: int) -> str | None:
    """What the \\boxed at `start` holds; those that follow after "and", "or" or a comma belong to it."""
    brace = re.compile(r"\\(?:boxed|fbox)\s*").match(text, start)
    if not brace:
        return None
    if text[brace.end() : brace.end() + 1] != "{":
        bare = re.compile(r"[^\s$.,]{1,100}").match(text, brace.end())
        return bare[0] if bare else None
    return braces(text, brace.end())


def last_boxed(text: str, starts: list[int]) -> str | None:
    """The last box. Boxes before it that only "and", "or" or a comma parts from it are answers, too."""
    found, after = None, 0
    for start in reversed(starts[-MAX_ITEMS:]):
        here = boxed(text, start)
        if here is None:
            if found is None:
                continue
            break
        end = text.find("{", start) + len(here) + 2
        if found is None:
            found = here
        elif end > after:  # a box around the other
            continue
        elif here == found.split(", ")[0]:
            break  # said again
        elif re.fullmatch(r"[\s$]*(?:,|;)?[\s$]*(?:\\text\{)?\s*(?:and|or|,)?\s*\}?[\s$]*(?:[a-z]\s*=\s*)?", text[end:after]):
            found = here + ", " + found
        else:
            break
        after = start
    return found


def extract_answer(response: str) -> str | None:
    """The answer that a response gives to its problem, as it stands there; None if there is none.

    The table SIGNS says what announces an answer. Without any: a response that is nothing but an answer, then the last formula or number.
    What follows a made-up next problem does not count.
    """
    text = first_problem(response[:MAX_RESPONSE])
    found = {}
    for pattern, priority in SIGNS:
        for m in pattern.finditer(text):
            found.setdefault(priority, []).append(m)
    for priority in sorted(found):
        for m in sorted(found[priority], key=lambda m: -m.start())[:50]:
            if "box" in m[0]:
                answer = last_boxed(text, [other.start() for other in found[priority] if "box" in other[0] and other.start() <= m.start()])
            else:
                answer = sentence(text, m.end())
                inner = [b.start() for b in re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])", answer)]
                answer = (last_boxed(answer, inner) if inner else None) or answer
                answer = REMARK.sub("", BEFORE.sub("", BECAUSE.split(BEFORE.sub("", answer))[0])).rstrip(" \t\n.,;:*_")
            answer = re.sub(r"^\$?[^$]{0,99}\b(?:answer|value)\s*(?:is|:)[\s}:]*", "", answer or "").strip()
            if answer:
                return narrowed(answer)
    return weak_answer(text)


def prose(text: str) -> bool:
    """Whether a text is a sentence rather than an answer: words that are neither names of functions nor units stand before the rest."""
    return len([w for w in re.findall(r"(?<![\\a-zA-Z])[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", text)) if w.lower() not in KNOWN]) > 3


def narrowed(answer: str) -> str:
    """The last formula or number of an answer that is a sentence and cannot be read otherwise."""
    if len(answer) <= MAX_ANSWER and (readable(answer) or not prose(answer)):
        return answer
    return weak_answer(answer, whole=False) or answer


def weak_answer(text: str, whole: bool = True) -> str | None:
    """The answer of a text that does not announce it."""
    text = (text[:-40] + QED.sub("", text[-40:])).strip()
    if not text:
        return None
    if whole and len(text) <= 300 and "\n" not in text and (readable(text.rstrip(".")) or (len(text.split()) <= 3 and not re.search(r"[.!?,] |\b(?:is|are)\b", text))):
        return text.rstrip(".") if not re.search(r"[ap]\.m\.$", text) else text
    if whole and len(text) <= 80 and "\n" not in text and re.match(r"\$.*\$\.?$", text) and not prose(text):
        return text
    if whole and re.match(r"\(?[A-J][).:]\)?\s+\S", text) and "\n" not in text:
        return text
    tail = re.sub(r"\s*\\end\{(?:align|aligned|equation|gather|gathered|eqnarray|split)\*?\}[\s$\]\\]*$", "", text[-5000:])
    candidates = []  # (end, -start, answer)
    for m in FORMULA.finditer(tail):
        candidates.append((m.end(), -m.start(), next(g for g in m.groups() if g is not None)))
    for m in re.finditer(r"\*\*([^*\n]{1,200})\*\*", tail):
        candidates.append((m.end(), -m.start(), m[1]))
    lines = tail.splitlines()
    equals = tail.rfind("=")
    if equals >= 0 and lines and equals >= len(tail) - len(lines[-1]) - 1:
        right = sentence(tail, equals + 1)
        if not re.search(r"\$(?!\d)", right) and readable(right):
            candidates.append((tail.find(right, equals) + len(right), -equals, right))
    for m in NUMBER.finditer(tail):
        candidates.append((m.end(), -m.start(), m[0]))
    if not candidates:
        said = re.search(r"\b(?:is|are|be)\s+([A-Za-z][\w' ]{0,40})[.!]?\s*$", tail)
        return said[1] if said else None
    return max(candidates)[2].strip()  # the one that ends last; of several, the longest: a number in a formula is part of it


# ------------------------------------------------------------------------------------------------ tokens of an answer

UNITS = {}  # name as written -> (name, power)
for _line in (
    "meter meters metre metres m", "centimeter centimeters centimetre centimetres cm cms", "millimeter millimeters mm", "kilometer kilometers kilometre kilometres km kms",
    "inch inches in", "foot feet ft", "yard yards yd yds", "mile miles mi", "second seconds sec secs s", "minute minutes min mins", "hour hours hr hrs h",
    "day days", "week weeks", "month months", "year years yr yrs", "gram grams g", "kilogram kilograms kg kgs", "milligram milligrams mg", "pound pounds lb lbs",
    "ounce ounces oz", "ton tons", "liter liters litre litres L", "milliliter milliliters ml mL", "gallon gallons gal", "quart quarts", "pint pints", "cup cups",
    "dollar dollars usd USD", "cent cents", "euro euros", "degree degrees deg", "radian radians rad", "percent percentage", "unit units", "mph", "kph",
    "am AM a.m. a.m", "pm PM p.m. p.m", "newton newtons N", "joule joules J", "watt watts W", "volt volts V", "hertz Hz", "Celsius", "Fahrenheit",
):  # fmt: skip
    for _name in _line.split():
        UNITS[_name] = _line.split()[0].lower()
TEXT_ONLY = {"m", "in", "s", "h", "g", "L", "N", "J", "W", "V", "am", "min", "rad", "deg", "sec"}  # units only inside \text{...} or behind a number

FUNCTIONS = {name: getattr(sympy, name) for name in "sin cos tan cot sec csc sinh cosh tanh coth sech csch".split()}
FUNCTIONS |= {"arc" + name: getattr(sympy, "a" + name) for name in "sin cos tan cot sec csc".split()}
FUNCTIONS |= {"arsinh": sympy.asinh, "arcosh": sympy.acosh, "artanh": sympy.atanh, "exp": sympy.exp, "abs": sympy.Abs} | dict.fromkeys(("ln", "log", "lg"), sympy.log)
INVERSE = {name: getattr(sympy, "a" + name) for name in "sin cos tan cot sec csc sinh cosh tanh".split()}
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega "
            "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split())  # fmt: skip
FILLERS = set("th st nd rd about approximately exactly the an only roughly".split())
TWO_LETTERS = set("no so he we it if of by at on do be my us up go or an as".split())
RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=",
             "neq": "!=", "in": "in", "approx": "~", "equiv": "=", "iff": "=", "to": "=", "rightarrow": "=", "Rightarrow": "=", "sim": "=", "cong": "=", ":": ":", "colon": ":"}  # fmt: skip
KNOWN = set(UNITS) | set(FUNCTIONS) | set("pi infty infinity inf sqrt floor ceil max min gcd lcm and or".split())
IGNORED = set("left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits therefore implies noindent quad qquad hspace vspace thinspace , ! ; : middle".split()) | {" "}
TEXT = set("text|textbf|textrm|textit|texttt|textsf|textnormal|mbox|hbox|mathrm|operatorname|rm|emph|mathsf|mathit|mathbf|boldsymbol|bf|bm|mathcal|underline".split("|"))
UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "±": "\\pm ", "∓": "\\mp ", "°": "^\\circ ", "∅": "\\emptyset ", "ø": "\\emptyset ",
    "ℝ": "\\mathbb{R}", "≈": "\\approx ", "∖": "\\setminus ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ", "ω": "\\omega ",
    "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅖": "\\frac{2}{5}", "⅗": "\\frac{3}{5}",
    "⅘": "\\frac{4}{5}", "⅙": "\\frac{1}{6}", "⅚": "\\frac{5}{6}", "⅛": "\\frac{1}{8}", "⅜": "\\frac{3}{8}", "⅝": "\\frac{5}{8}", "⅞": "\\frac{7}{8}",
    "€": "\\text{ euros}", "£": "", "¢": "\\text{ cents}", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u2009": " ", "\u202f": " ", "⟨": "\\langle ", "⟩": "\\rangle ", "∣": "|",
    "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "∠": "", "△": "",
}  # fmt: skip
UNICODE |= {sup: "^{%s}" % plain for sup, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ", "0123456789n")} | {sub: "_{%s}" % plain for sub, plain in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789")}
UNICODE = str.maketrans(UNICODE)
WORD_NUMBERS = {w: n for n, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split())}

TOKEN = re.compile(r"""
      (?P<space>\s+|~)
    | (?P<num>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.\d+|\d+\.(?!\d)|\.\d+|\d+)
    | \\(?P<cmd>[a-zA-Z]+\*?)
    | \\(?P<esc>.)
    | (?P<word>[A-Za-z]+(?:\.[a-z]\.?(?![a-zA-Z]))?)
    | (?P<op>.)""", re.VERBOSE | re.DOTALL | re.ASCII)  # fmt: skip
TOKEN_PLAIN = re.compile(TOKEN.pattern.replace(r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|", ""), TOKEN.flags)
REPEATING = re.compile(r"(\d{0,50})\.(\d{0,50})\\(?:overline|bar|dot)\s*(?:\{(\d{1,50})\}|(\d))", re.ASCII)
MODULO = re.compile(r"\(?\s{0,9}(?:\\(?:text|mathrm|operatorname)\{\s*mod\s*\}|\\[bp]?mod|\bmod)[\s{]{0,9}(\d{1,9})\s{0,9}\}?\s{0,9}\)?")
SET_BUILDER = re.compile(r"\\(?:\{|lbrace)\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?|\\in\s*\\R)?\s*(?:\||:|\\mid|\\vert)(.*)\\(?:\}|rbrace)", re.DOTALL)


SPELLINGS = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\\(?:begin|end)\s*\{(?:aligned|align|split|gathered|equation)\*?\}", ""), (r"&\s*=", "="), (r"\\\\\s*$", ""), (r"\\[dtc]frac", r"\\frac"), (r"\\(?:text)?color\s*\{[^{}]*\}", ""), (r"\^\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)\b\s*\}{0,2}", ""),
    (r"\b(sq|cu|in|ft|hr|min|sec|oz|lb)\.(?=\s|$)", r"\1"), (r"(?:\\[,;:! ]|\s)+$", ""),
    (r"(?<=\d)\s*(?:\\text\s*\{)?\s*thousand\b\s*\}?", r"\\cdot 10^{3}"), (r"(?<=\d)\s*(?:\\text\s*\{)?\s*million\b\s*\}?", r"\\cdot 10^{6}"),
    (r"(?<=\d)\s*(?:\\text\s*\{)?\s*billion\b\s*\}?", r"\\cdot 10^{9}"),
)]  # fmt: skip


def fraction_of(m: re.Match) -> str:
    """0.1\\overline{6} as \\frac{15}{90}: a repeating decimal is a fraction."""
    whole, once, again = m[1] or "0", m[2], m[3] or m[4]
    return r"{\frac{%d}{%d}}" % (int(whole + once + again) - int(whole + once), 10 ** len(once) * (10 ** len(again) - 1))


def clean(text: str) -> str:
    """One way of writing what LaTeX and people write in several."""
    text = unicodedata.normalize("NFKC", text.translate(UNICODE)).translate(UNICODE)
    text = text.replace("\\$", "\\dollar ").replace("$", " ").replace("**", " ").replace("{:}", ":")
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    text = re.sub(r"(?<=\d)\s*(?:,\s?\\!|\{,\}\\!|\{,\}|\\,|,\\,|\\ |,\\;)\s*(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<![\d.,/}])\d{1,3}(?: \d{3})+(?![\d,./]| ?/)", lambda m: m[0].replace(" ", ""), text)
    text = re.sub(r"(\d)[eE]([+-]?\d{1,6})(?![\d.a-zA-Z])", r"\1\\cdot 10^{\2}", text)
    text = REPEATING.sub(fraction_of, text)
    text = MODULO.sub(r"\\pmod{\1}", text)
    builder = SET_BUILDER.search(text)
    return builder[1] + " \\in " + builder[2] if builder and "\\in" in builder[2] else builder[2] if builder else text.strip().rstrip(".,;:")


class Token(NamedTuple):
    kind: str  # num name func unit word sep rel op cmd
    value: str
    spaced: bool = False


def word_tokens(run: str, before: str, spaced: bool, around: tuple[str, str], split: bool, in_text: bool) -> list[tuple[str, str]]:
    """What a run of letters is, as (kind, value): a word of the language, a unit, a function, a variable or several. before: the kind of the token
    before it; around: the character before the run, and the text behind it."""
    low, (left, right) = run.lower(), around
    if low in ("and", "or"):
        return [("sep", low)]
    if low in ("is", "equals", "equal"):
        return [("rel", "=")]
    if low == "to":
        return [("rel", ":")]
    if low == "in" and before == "name":
        return [("rel", "in")]
    if low == "per" or (low in ("a", "an") and before == "unit"):
        return [("op", "/")]
    if low in ("square", "sq", "cubic"):
        return [("power", "3" if low == "cubic" else "2")]
    if low in FILLERS or run == "a" and in_text:
        return []
    if (run in UNITS or low in UNITS and len(run) > 3) and not (split and not in_text and len(run) < 4 and before != "num"):
        lone = before in ("num", "unit") and spaced and not re.match(r"\s*[\w^]", right)
        if in_text or (len(run) > 1 and run not in TEXT_ONLY) or lone:
            return [("unit", UNITS.get(run) or UNITS[low])]
        return [("name", run) if len(run) == 1 else ("word", low)]
    if run in FUNCTIONS or low in ("ln", "log", "sqrt"):
        return [("func", run if run in FUNCTIONS else low)]
    if low in ("pi", "infinity", "infty", "theta", "alpha", "beta", "emptyset"):
        return [("cmd", "infty" if low == "infinity" else low)]
    if len(run) == 1:
        return [("name", run)]
    apart = not left.strip() and (not right or right[0] in ".,;" or right[0].isspace())
    if in_text or (low in TWO_LETTERS and apart) or len(run) > 4 or (len(run) > 2 and not split):
        return [("word", low)]
    return [("name", letter) for letter in run]


def command_token(name: str) -> list[tuple[str, str]]:
    if name == "dollar":
        return [("unit", "dollar")]
    if name in RELATIONS:
        return [("rel", RELATIONS[name])]
    if name in FUNCTIONS or name == "sqrt":
        return [("func", name)]
    return [] if name in IGNORED or name in TEXT else [("cmd", name)]


def sign_token(sign: str, escaped: bool) -> list[tuple[str, str]]:
    """A single character, or one behind a backslash."""
    if sign == "%":
        return [("unit", "percent")]
    if escaped:
        return [("op", {"{": "\\{", "}": "\\}", "\\": "\\\\"}.get(sign, sign))] if sign in "{}|\\&" else []
    if sign in RELATIONS:
        return [("rel", RELATIONS[sign])]
    return [("sep", sign)] if sign in ",;" else [] if sign in "\"`?" else [("op", sign)]


def tokens_of(text: str, thousands: bool = True, split: bool = False, in_text: bool = False, depth: int = 0) -> list[Token]:
    """Cut a cleaned text into tokens. thousands: 1,234 is a number, not two; split: a run of letters is a product, not a word."""
    if depth > 8 or len(text) > MAX_ANSWER:
        raise Unreadable("too long")
    out, position, spaced = [], 0, False
    while position < len(text):
        m = (TOKEN if thousands else TOKEN_PLAIN).match(text, position)
        start, position, kind, value = position, m.end(), m.lastgroup, m[m.lastgroup]
        brace = re.compile(r"\s*\{").match(text, position) if kind == "cmd" and value in TEXT else None
        inside = braces(text, brace.end() - 1) if brace else None
        if kind == "space":
            spaced = True
            continue
        if inside is not None:  # \text{...}
            inner = tokens_of(inside, thousands, split, True, depth + 1)
            out += [t._replace(spaced=True) for t in inner[:1]] + inner[1:]
            position, spaced = brace.end() + len(inside) + 1, True
            continue
        if kind == "num":
            new = [("num", value.replace(",", ""))]
        elif kind == "word":
            new = word_tokens(value, out[-1].kind if out else "", spaced, (text[max(0, start - 1) : start], text[position : position + 40]), split, in_text)
        else:
            new = command_token(value) if kind == "cmd" else sign_token(value, kind == "esc")
        out += [Token(k, v, spaced) for k, v in new]
        spaced = False
        if len(out) > MAX_TOKENS:
            raise Unreadable("too many tokens")
    return out


# ------------------------------------------------------------------------------------------------ arithmetic within bounds


def bounded(value):
    """The value, unless it is a number that is too large to go on with, or none."""
    if value in (sympy.nan, zoo):
        raise Unreadable("no number")
    if isinstance(value, sympy.Rational) and max(abs(value.p).bit_length(), value.q.bit_length()) > MAX_BITS:
        raise Unreadable("number too large")
    return value


def scalar(value):
    if not isinstance(value, (sympy.Expr, sympy.MatrixBase)):
        raise Unreadable("not a number")
    return value


def add(a, b):
    a, b = scalar(a), scalar(b)
    if isinstance(a, sympy.MatrixBase) != isinstance(b, sympy.MatrixBase) or getattr(a, "shape", 0) != getattr(b, "shape", 0):
        raise Unreadable("a matrix and a number")
    return bounded(a + b)


def multiply(a, b):
    a, b = scalar(a), scalar(b)
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        raise Unreadable("a product of matrices")
    return bounded(a * b)


def size_of(value) -> int:
    """Bits of the largest number in an expression."""
    return max((max(abs(n.p).bit_length(), n.q.bit_length()) for n in value.atoms(sympy.Rational)), default=1)


def worked_out(value):
    """The value, unless it is a constant whose size is out of bounds: nothing larger ever exists here, so nothing can expand it."""
    if not value.free_symbols:
        try:
            numeric(value, {})
        except Undefined:
            raise Unreadable("too large, or undefined") from None
    return value


def power(base, exponent):
    base, exponent = scalar(base), scalar(exponent)
    if isinstance(base, sympy.MatrixBase) or isinstance(exponent, sympy.MatrixBase):
        raise Unreadable("power of a matrix")
    if base == 0 and not (exponent.is_Rational and exponent > 0):
        raise Unreadable("0^0 or 1/0")
    if exponent.is_Rational:
        if base not in (0, 1, -1) and size_of(base) * abs(exponent) > MAX_BITS:
            raise Unreadable("power too large")
        if base.is_Rational and base < 0 and exponent.q % 2 and exponent.q > 1:  # the real root, as people mean it
            root = power(-base, exponent)
            return -root if exponent.p % 2 else root
        if exponent.q == 1 or size_of(base) < 130:
            return bounded(sympy.Pow(base, exponent))
    return worked_out(sympy.Pow(base, exponent, evaluate=False))


def divide(a, b):
    b = scalar(b)
    return multiply(a, power(b, Integer(-1)))


def factorial(n, double: bool = False):
    n = scalar(n)
    if isinstance(n, Integer) and 0 <= n <= 1500:
        return Integer(math.prod(range(int(n), 0, -2)) if double else math.factorial(int(n)))
    return worked_out((sympy.factorial2 if double else sympy.factorial)(n, evaluate=False))


def choose(n, k):
    n, k = scalar(n), scalar(k)
    if isinstance(n, Integer) and isinstance(k, Integer) and 0 <= n <= 3000 and k >= 0:
        return Integer(math.comb(int(n), int(k)))
    return worked_out(sympy.binomial(n, k, evaluate=False))


def number(text: str):
    if len(text) > MAX_DIGITS:
        raise Unreadable("number too long")
    whole, _, decimals = text.partition(".")
    return Rational(int(whole + decimals or "0"), 10 ** len(decimals))


# ------------------------------------------------------------------------------------------------ the parser


class Value(NamedTuple):
    """What is more than a number (a sympy expression) or a matrix (a sympy matrix).

    kind, how it is held together: list, separators; seq, its brackets; set; region of intervals (low, closed, high, closed); rel, its signs; words, they themselves.
    """

    kind: str
    how: tuple | str
    items: tuple


class Parser:
    """Recursive descent over tokens. sign: what \\pm stands for in this reading. units and words: those behind the numbers, as they are met."""

    def __init__(self, tokens: list[Token], sign: int = 1):
        self.tokens, self.at, self.sign, self.depth, self.bars, self.units, self.words = tokens, 0, sign, 0, 0, [], []

    def next(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else Token("end", "")

    def found(self, kind: str, *values: str) -> bool:
        """Whether the next token is of that kind (and has one of the values)."""
        return self.next().kind == kind and (not values or self.next().value in values)

    def accept(self, kind: str, *values: str) -> str:
        """Take the next token if it is found; its value, else ""."""
        return self.take() if self.found(kind, *values) else ""

    def take(self, *values: str) -> str:
        token = self.next()
        if token.kind == "end" or values and token.value not in values:
            raise Unreadable(f"expected {values}, found {token.value}")
        self.at += 1
        return token.value

    def deeper(self, parse, *args, bars: int = 0):
        """parse(*args) one level down; bars: how many | are open there."""
        if self.depth >= MAX_DEPTH:
            raise Unreadable("nested too deep")
        before, self.bars, self.depth = self.bars, bars, self.depth + 1
        value = parse(*args)
        self.bars, self.depth = before, self.depth - 1
        return value

    # ---- from lists down to products

    def answer(self):
        items, separators = self.items()
        if not self.found("end"):
            raise Unreadable(f"{self.next().value} is not expected here")
        return items[0] if len(items) == 1 else Value("list", tuple(separators), tuple(items))

    def items(self) -> tuple[list, list]:
        """Statements with commas, "and", "or" between them."""
        items, separators = [self.statement()], []
        while self.found("sep"):
            while self.found("sep"):  # ", and"
                separator = self.take()
            if self.found("end") or self.found("op", *CLOSING):
                break
            separators.append(separator)
            items.append(self.statement())
            if len(items) > MAX_ITEMS:
                raise Unreadable("too many items")
        return items, separators

    def spoken(self) -> tuple:
        words = []
        while self.found("word"):
            words.append(self.take())
        return tuple(words)

    def statement(self):
        """Words, an expression, and what it is equal to, less than, in ..."""
        lead = self.spoken()
        if lead and (self.next().kind in ("end", "sep") or self.found("op", *CLOSING)):
            return Value("words", lead, ())
        exprs, signs = [self.union()], []
        while self.found("rel"):
            while self.found("rel"):  # "is = 5"
                sign = self.take()
            right = self.union()
            if sign != "~" or not exprs[:-1] and isinstance(exprs[-1], Symbol):  # \sqrt2 \approx 1.41: the exact one is the answer
                signs.append(sign.replace("~", "="))
                exprs.append(right)
        self.words += self.spoken()
        value = Value("rel", tuple(signs), tuple(exprs)) if signs else exprs[0]
        return Value("words", lead, (value,)) if lead else value

    def union(self):
        left = self.expression()
        while self.found("cmd", "cup", "cap", "setminus", "backslash", "bigcup") or isinstance(left, Value) and (self.found("op", "-") or self.found("name", "U")):
            sign = self.take()
            a, b = region_of(left), region_of(self.expression())
            left = joined(a, b) if sign in ("cup", "U", "bigcup") else complement(joined(complement(a), complement(b) if sign == "cap" else b))
        return left

    def expression(self):
        left = self.term()
        while not isinstance(left, Value) and (self.found("op", "+", "-") or self.found("cmd", "pm", "mp")):
            sign = self.signs()
            left = add(left, multiply(self.term(), sign))
        return left

    def signs(self) -> Integer:
        sign = 1
        while self.found("op", "+", "-") or self.found("cmd", "pm", "mp"):
            sign *= {"+": 1, "-": -1, "pm": self.sign, "mp": -self.sign}[self.take()]
        return Integer(sign)

    def signed_factor(self):
        sign = self.signs()
        return multiply(self.factor(), sign)

    def term(self):
        sign, left = self.signs(), self.factor()
        while True:
            token, unit_next = self.next(), self.next(1).kind in ("unit", "power")
            if self.accept("op", "*") or self.accept("cmd", "cdot", "times", "ast"):
                left = multiply(left, self.signed_factor())
            elif unit_next and self.accept("op", "/"):
                self.unit(-1)
            elif self.accept("op", "/") or self.accept("cmd", "div"):
                left = divide(left, self.signed_factor())
            elif token.kind in ("unit", "power"):
                self.unit()
                left = self.measure(left)
            elif self.unit_fraction():
                self.take()
                for side in (1, -1):
                    self.take("{"), self.unit(side), self.take("}")
            elif self.starts_factor() and not isinstance(left, Value):
                if token.kind == "num" and self.tokens[self.at - 1].kind == "num":
                    raise Unreadable("two numbers side by side")
                right = self.factor()
                left = Symbol(f"{left}{right}") if isinstance(left, Symbol) and isinstance(right, Value) else multiply(left, right)  # P(X = 2)
            else:
                return left if sign == 1 else multiply(left, sign)

    def starts_factor(self) -> bool:
        token = self.next()
        if token.kind == "name":
            return not (token.value == "U" and token.spaced and self.tokens[self.at - 1].value in ")]")
        if token.kind == "op":
            return token.value in ("(", "[", "{", "\\{") or (token.value == "|" and not self.bars)
        return token.kind in ("num", "func") or token.kind == "cmd" and token.value not in STOPS

    # ---- units

    def unit_fraction(self) -> bool:  # \frac{miles}{hour}
        return self.found("cmd", "frac") and self.next(1).value == "{" and self.next(2).kind in ("unit", "power")

    def unit(self, sign: int = 1) -> None:
        """A unit, with its power: it is noted, not multiplied."""
        exponent = int(self.accept("power") or 1)
        name = self.accept("unit")
        if name and self.accept("op", "^"):
            written = self.argument()
            exponent = int(written) if isinstance(written, Integer) and abs(written) < 10 else exponent
        if name not in ("", "unit"):
            self.units.append((name, sign * exponent))

    def measure(self, left):
        """3 hours (and) 20 minutes: a sum, in which the units stand as symbols."""
        ahead = int(self.found("sep", "and", ","))
        if not self.units or self.next(ahead).kind != "num" or self.next(ahead + 1).kind != "unit" or self.next(ahead + 1).value == self.units[-1][0]:
            if self.found("num"):
                raise Unreadable("a number behind a unit")
            return left
        self.at += ahead
        left = multiply(left, Symbol(self.units.pop()[0]))
        right = self.term()
        return add(left, multiply(right, Symbol(self.units.pop()[0])) if self.units else right)

    def degree(self) -> bool:
        """Take \\circ, {\\circ}, a prime, or an ordinal's ending (5^{th}), as what it is: not a power."""
        group = int(self.found("op", "{"))
        mark = self.next(group).value
        if mark not in ("circ", "prime", "degree") and not (group and mark == "}"):
            return False
        self.at += 1 + group if mark == "}" else 1 + 2 * group
        if mark in ("circ", "degree"):
            self.units.append(("degree", 1))
            self.accept("name", "C", "F")
        return True

    # ---- factors

    def factor(self):
        while self.next().kind in ("unit", "power"):  # a dollar sign in front
            self.unit()
        value = self.primary()
        while True:
            if self.accept("op", "^"):
                value = value if self.degree() else power(value, self.argument())
            elif self.accept("op", "!"):
                value = factorial(value, bool(self.accept("op", "!")))
            elif isinstance(value, Integer) and self.found("op", "_"):  # (1011)_2
                value = self.in_base(str(value))
            elif self.accept("op", "'"):
                value = Symbol(f"{value}'") if isinstance(value, Symbol) else value
            elif self.found("cmd", "circ"):
                self.degree()
            elif self.accept("cmd", "pmod", "bmod"):
                self.units.append((f"mod {self.factor()}", 1))
            else:
                return value

    def argument(self):
        """What ^, \\frac and \\sqrt apply to: {...} or one token."""
        if self.found("op", "{"):
            return self.group()
        if self.accept("op", "-"):
            return multiply(self.deeper(self.argument), Integer(-1))
        value = self.primary()
        return power(value, self.deeper(self.argument)) if self.accept("op", "^") else value

    def digit(self):
        """An argument of \\frac: {...}, or one token, of a number one digit (\\frac12)."""
        token = self.next()
        if token.kind == "num" and len(token.value) > 1 and token.value.isdigit():
            self.tokens[self.at] = token._replace(value=token.value[1:], spaced=False)
            return Integer(int(token.value[0]))
        return scalar(self.argument())

    def group(self):
        self.take("{")
        value = self.deeper(self.union)
        if self.found("sep"):  # {2, 3}
            self.take()
            rest, _ = self.deeper(self.items)
            self.take("}")
            return Value("set", "", (value, *rest))
        if self.found("cmd", "choose", "over"):
            value = (choose if self.take() == "choose" else divide)(value, self.deeper(self.union))
        self.words += self.spoken()
        self.take("}")
        return value

    def primary(self):
        token = self.next()
        if token.value == "{":
            return self.group()
        self.take()
        if token.kind == "num":
            return self.numeral(token.value)
        if token.kind == "name":
            return self.symbol(token.value)
        if token.kind == "func":
            return self.deeper(self.function, token.value, bars=self.bars)
        if token.value in ("(", "["):
            return self.deeper(self.sequence, token.value)
        if token.value in ("\\{", "lbrace"):
            return self.deeper(self.set)
        if token.value == "|" or token.value in PAIRS:
            return self.between(*PAIRS.get(token.value, ("|", sympy.Abs)))
        if token.kind == "cmd":
            return self.command(token.value)
        raise Unreadable(f"{token.value} is not expected here")

    def numeral(self, digits: str):
        """A number; with a base (1011_2, 1A_{16}), a symbol of that name; a mixed number with the fraction behind it."""
        ahead = 0
        while self.next(ahead).kind in ("name", "num") and not self.next(ahead).spaced and re.fullmatch(r"[A-F]|\d+", self.next(ahead).value):
            ahead += 1
        if self.next(ahead).value == "_" and "." not in digits:
            return self.in_base(digits + "".join(self.take() for _ in range(ahead)))
        value, at, tokens, part = number(digits), self.at, list(self.tokens), 0
        if self.found("cmd", "frac") and not self.unit_fraction() and "." not in digits:
            self.take()
            part = self.command("frac")
            plain = all(t.kind == "num" or t.value in "{}" for t in tokens[at + 1 : self.at])
            power_next = self.found("op", "^") and "circ" not in (self.next(1).value, self.next(2).value)
            part = part if plain and not power_next and isinstance(part, Rational) else 0
        elif self.found("num") and self.next(1).value == "/" and self.next(2).kind == "num":
            part = divide(number(self.next().value), number(self.next(2).value))
            self.at += 3
        if 0 < part < 1:
            return value + part
        self.at, self.tokens = at, tokens
        return value

    def in_base(self, digits: str):
        self.take("_")
        group = int(self.found("op", "{"))
        base = WORD_NUMBERS.get(self.next(group).value)
        if base is None:
            base = self.argument()
        else:
            self.at += 1 + 2 * group
        return number(digits) if base == 10 else Symbol(f"{digits.lstrip('0') or '0'}_{base}")

    def symbol(self, name: str):
        if not self.accept("op", "_"):
            return {"e": E, "i": I}.get(name) or Symbol(name)
        if self.found("op", "{") and self.next(1).kind == "word":  # v_{max}
            self.take()
            label = " ".join(self.spoken())
            self.take("}")
            return Symbol(f"{name}_{label}")
        return Symbol(f"{name}_{self.argument()}")

    def between(self, closing: str, function):
        value = scalar(self.deeper(self.expression, bars=int(closing == "|")))
        self.take(closing)
        if isinstance(value, sympy.MatrixBase):
            raise Unreadable("the size of a matrix")
        return abs(value) if value.is_Rational and function is sympy.Abs else worked_out(function(value, evaluate=False))

    def sequence(self, opening: str):
        items, _ = self.items()
        closing = self.take(")", "]")
        if len(items) > 1:
            return Value("seq", opening + closing, tuple(items))
        if opening + closing not in ("()", "[]"):
            raise Unreadable("brackets do not match")
        return items[0]

    def set(self):
        if self.accept("op", "\\}"):
            return EMPTY
        items, _ = self.items()
        self.take("\\}", "rbrace")
        return Value("set", "", tuple(items))

    def command(self, name: str):
        if name in ("frac", "binom", "dbinom", "tbinom"):
            top = self.digit()
            return (divide if name == "frac" else choose)(top, self.digit())
        if name in ("pi", "infty"):
            return pi if name == "pi" else oo
        if name in ("emptyset", "varnothing"):
            return EMPTY
        if name in ("mathbb", "R", "Bbb"):
            letter = name if name == "R" else (self.take("{"), self.take(), self.take("}"))[1] if self.found("op", "{") else self.take()
            return Value("region", "", ((-oo, False, oo, False),)) if letter == "R" else Value("words", (letter,), ())
        if name == "langle":
            items, _ = self.deeper(self.items)
            self.take("rangle")
            return Value("seq", "<>", tuple(items))
        if name == "begin":
            return self.deeper(self.matrix)
        if name in ("angle", "triangle", "measuredangle"):
            return self.deeper(self.primary)
        if name in ("overline", "bar", "vec", "hat", "widehat", "tilde", "overrightarrow", "dot"):
            start, value = self.at, self.argument()
            if isinstance(value, sympy.Mul) and all(x.is_Symbol for x in value.args):
                return value  # \overline{AB}: a segment's name
            return Symbol(name + "".join(t.value for t in self.tokens[start : self.at] if t.value not in "{}"))
        if name in GREEK:
            return self.symbol(name)
        raise Unreadable(f"\\{name}")

    def matrix(self):
        name = self.environment()
        if name == "array" and self.accept("op", "{"):
            while self.take() != "}":
                pass
        rows = [[]]
        while not self.found("cmd", "end"):
            rows[-1].append(scalar(self.expression()))
            if self.accept("op", "\\\\"):
                rows.append([])
            elif not self.found("cmd", "end"):
                self.take("&")
        rows = rows if rows[-1] else rows[:-1]
        cells = [x for row in rows for x in row]
        self.take("end")
        if self.environment() != name or len({len(row) for row in rows}) != 1 or len(cells) > MAX_ITEMS or any(isinstance(x, sympy.MatrixBase) for x in cells):
            raise Unreadable("not a matrix")
        return sympy.ImmutableDenseMatrix(rows)

    def environment(self) -> str:
        self.take("{")
        name = ""
        while not self.accept("op", "}"):
            name += self.take()
        if name.rstrip("*") not in ("pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "Vmatrix", "smallmatrix", "array"):
            raise Unreadable(name)
        return name

    def function(self, name: str):
        """\\sqrt, \\log, \\sin ...: index or base, a power, then the argument: (...), {...} or the product that follows."""
        if name == "sqrt":
            index = Integer(2)
            if self.accept("op", "["):
                index = self.expression()
                self.take("]")
            return power(self.argument(), divide(Integer(1), index))
        base = self.digit() if self.accept("op", "_") else Integer(10)
        exponent = self.argument() if self.accept("op", "^") else Integer(1)
        n_units = len(self.units)
        argument = self.applied()
        if ("degree", 1) in self.units[n_units:]:
            argument = multiply(argument, pi / 180)
            del self.units[n_units:]
        if isinstance(scalar(argument), sympy.MatrixBase):
            raise Unreadable("function of a matrix")
        if name == "exp":
            return power(power(E, argument), exponent)
        if exponent == -1 and name in INVERSE:
            return worked_out(INVERSE[name](argument, evaluate=False))
        value = worked_out(FUNCTIONS[name](argument, evaluate=False))
        if name in ("log", "lg"):
            value = divide(value, worked_out(sympy.log(base, evaluate=False)))
        return value if exponent == 1 else power(value, exponent)

    def applied(self):
        if self.found("op", "(", "{", "|", "["):
            return self.primary()
        sign, value = self.signs(), self.factor()
        while (self.starts_factor() and not self.found("func") and not self.found("op", "(", "[")) or self.found("unit", "degree"):
            value = value if self.found("unit") and not self.unit() else multiply(value, self.factor())
        if self.next(1).kind in ("num", "name") and self.accept("op", "/"):  # sin pi/6
            value = divide(value, self.factor())
        return multiply(value, sign)


EMPTY = Value("region", "", ())
CLOSING = (")", "]", "}", "\\}")
PAIRS = {"lfloor": ("rfloor", sympy.floor), "lceil": ("rceil", sympy.ceiling), "lvert": ("rvert", sympy.Abs), "vert": ("vert", sympy.Abs)}
STOPS = set("cup cap setminus backslash bigcup pm mp cdot times ast div rfloor rceil rvert vert rangle rbrace end circ choose over pmod bmod dots ldots cdots".split())

# ------------------------------------------------------------------------------------------------ numbers, to many digits

mp = mpmath.mp.clone()  # a context of our own: its precision is nobody else's
MAGNITUDE = 20_000  # binary exponent beyond which a number is not worked out
SPECIAL = {
    sympy.Abs: mp.fabs, sympy.floor: mp.floor, sympy.ceiling: mp.ceil, sympy.factorial: mp.factorial, sympy.factorial2: mp.fac2, sympy.binomial: mp.binomial,
    sympy.log: mp.ln, sympy.exp: mp.exp,
} | {getattr(sympy, name): getattr(mp, name) for name in "sin cos tan cot sec csc sinh cosh tanh coth sech csch asin acos atan acot asec acsc asinh acosh atanh".split()}  # fmt: skip


class Undefined(Exception):
    """The expression has no value there."""


def numeric(e, point: dict):
    """The value of a sympy expression with its symbols at `point`, as an mpmath number; Undefined where there is none or it is out of bounds."""
    if e.is_Rational:
        return mp.mpf(e.p) / e.q
    if e.is_Symbol:
        return point[e]
    if e is I:
        return mp.j
    if e.is_NumberSymbol:
        return {pi: mp.pi, E: mp.e}.get(e, mp.nan) + 0
    if not e.args:
        raise Undefined  # infinity
    x = [numeric(a, point) for a in e.args]
    try:
        if e.is_Add or e.is_Mul:
            value = functools.reduce((lambda a, b: a + b) if e.is_Add else (lambda a, b: a * b), x)
        elif e.is_Pow:
            if abs(mp.re(x[1])) * max(abs(mp.mag(x[0])), 1) > MAGNITUDE if x[0] else mp.re(x[1]) <= 0:
                raise Undefined
            value = mp.power(*x)
        else:
            if any(mp.mag(v) > 60 for v in x if v):
                raise Undefined
            value = SPECIAL[e.func](*x)
    except (KeyError, ValueError, ArithmeticError, TypeError, mp.NoConvergence):
        raise Undefined from None
    if not mp.isfinite(value) or (value and abs(mp.mag(value)) > MAGNITUDE):
        raise Undefined
    return value


def close(a, b, digits: int) -> bool:
    return abs(a - b) <= mp.mpf(10) ** -digits * max(abs(a), abs(b), mp.mpf(10) ** -digits)


def points(symbols: list):
    """Seeded random places on three scales (so that neither high nor low powers drown the rest), three with all symbols positive, three with signs."""
    rng = random.Random(0)
    for n in range(6):
        scale = 10.0 ** (n % 3 - 1)
        yield {x: mp.mpf(scale * rng.randrange(10**6, 4 * 10**6)) / 10**6 * (rng.choice((1, -1)) if n > 2 else 1) for x in symbols}


def agree(a, b, same) -> bool:
    """Whether same(value of a, value of b) holds wherever both are defined, at two random points or more (numbers: at the one)."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    digits = min(100, 30 + int(0.302 * max(size_of(a), size_of(b))))
    with mp.workdps(2 * digits + 30):
        pairs = []
        for point in points(symbols) if symbols else [{}]:
            with contextlib.suppress(Undefined):
                pairs.append((numeric(a, point), numeric(b, point)))
        if symbols and not (a.has(I) or b.has(I)):  # roots of negative numbers: people take variables as positive
            pairs = [p for p in pairs if not mp.im(p[0]) and not mp.im(p[1])] or pairs
        if not symbols and any(v and mp.mag(v) > 3 * digits for p in pairs for v in p):
            return False  # an integer's last digit would not be seen
        return len(pairs) >= (2 if symbols else 1) and all(same(x, y, digits) for x, y in pairs)


def equal(a, b) -> bool:
    """Whether two sympy expressions are the same: as they are, as exact fractions, then by their values to 30 digits and more."""
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return getattr(a, "shape", 0) == getattr(b, "shape", 1) and all(map(equal, a, b))
    if a == b:
        return True
    if a.is_Rational and b.is_Rational or oo in (a, b) or -oo in (a, b):
        return False
    return agree(a, b, close)


def proportional(a, b, positive: bool) -> bool:
    """Whether a is b times a constant (a positive one)."""
    ratios = []

    def same(x, y, digits):
        if not x or not y:
            return not x and not y
        ratios.append(x / y)
        return close(ratios[0], ratios[-1], digits) and not mp.im(ratios[0]) and (not positive or ratios[0] > 0)

    return a == b or agree(a, b, same)


# ------------------------------------------------------------------------------------------------ sets of real numbers


def place(end):
    """Where an interval's end lies; Unreadable unless it is a real number."""
    if end in (oo, -oo):
        return mp.inf if end == oo else -mp.inf
    if not isinstance(end, sympy.Expr) or end.free_symbols:
        raise Unreadable("an end that is no number")
    try:
        value = numeric(end, {})
    except Undefined:
        raise Unreadable("an end that has no value") from None
    if mp.im(value):
        raise Unreadable("an end that is not real")
    return mp.re(value)


def region_of(value) -> tuple:
    """Intervals (low, closed, high, closed) of a set, an interval, an inequality or x in ...; Unreadable for anything else."""
    if isinstance(value, Value):
        if value.kind == "region":
            return value
        if value.kind == "set":
            return joined(*(Value("region", "", ((x, True, x, True),)) for x in value.items)) if value.items else Value("region", "", ())
        if value.kind == "seq" and len(value.items) == 2 and value.how != "<>":
            (low, high), how = value.items, value.how
            return Value("region", "", ((low, how[0] == "[", high, how[1] == "]"),))
        if value.kind == "rel" and value.how == ("in",):
            return region_of(value.items[1])
        if value.kind == "rel":
            return solved(value)
        if value.kind == "list" and all(isinstance(x, Value) for x in value.items):
            parts = [region_of(x) for x in value.items]
            if "or" in value.how or not all(x.kind == "rel" for x in value.items):
                return joined(*parts)
            return complement(joined(*map(complement, parts)))
    raise Unreadable("not a set of numbers")


def solved(value: Value) -> Value:
    """x > 3, 1 < x <= 2, x != 5 as a region."""
    names = [x for x in value.items if isinstance(x, Symbol)]
    if len(names) != 1 or not set(value.how) <= {"<", ">", "<=", ">=", "!=", "="} or any(isinstance(x, Value) for x in value.items):
        raise Unreadable("not solved")
    at = value.items.index(names[0])
    parts = []
    for n, (left, sign, right) in enumerate(zip(value.items, value.how, value.items[1:])):
        if n not in (at - 1, at):
            raise Unreadable("not solved")
        end, flip = (right, False) if n == at else (left, True)
        if sign in ("!=", "="):
            point = Value("region", "", ((end, True, end, True),))
            parts.append(point if sign == "=" else complement(point))
        elif ("<" in sign) != flip:
            parts.append(Value("region", "", ((-oo, False, end, "=" in sign),)))
        else:
            parts.append(Value("region", "", ((end, "=" in sign, oo, False),)))
    return parts[0] if len(parts) == 1 else complement(joined(*map(complement, parts)))


def joined(*regions: Value) -> Value:
    """The union, as intervals in order that do not touch."""
    ends = sorted(((place(low), not lc, place(high), hc, low, high) for region in regions for low, lc, high, hc in region.items), key=lambda e: e[:4])
    if len(ends) > MAX_ITEMS:
        raise Unreadable("too many intervals")
    out = []
    for low_at, low_open, high_at, high_closed, low, high in ends:
        if low_at > high_at or (low_at == high_at and (low_open or not high_closed)):
            continue
        if out and (low_at < out[-1][2] or (low_at == out[-1][2] and (out[-1][3] or not low_open))):
            if (high_at, high_closed) > (out[-1][2], out[-1][3]):
                out[-1][2:4], out[-1][5] = [high_at, high_closed], high
        else:
            out.append([low_at, low_open, high_at, high_closed, low, high])
    return Value("region", "", tuple((low, not low_open, high, high_closed) for _, low_open, _, high_closed, low, high in out))


def complement(region: Value) -> Value:
    out, low, closed = [], -oo, False
    for a, a_closed, b, b_closed in joined(region).items:
        if a != -oo:
            out.append((low, closed, a, not a_closed))
        low, closed = b, not b_closed
    if low != oo:
        out.append((low, closed, oo, False))
    return joined(Value("region", "", tuple(out)))


# ------------------------------------------------------------------------------------------------ whether two answers are the same


def label(value) -> bool:
    """Whether an equation's left side is only a name for its right side: x, x_1, f(x), V."""
    if isinstance(value, Value):
        return value.kind == "words" or value.kind == "seq" and all(isinstance(x, Symbol) for x in value.items)
    if not isinstance(value, sympy.Expr):
        return False
    if value.is_Mul:  # f(x), f^{-1}(x), f(3), P(X)
        letters = {str(a.base) if a.is_Pow else str(a) for a in value.args if a.is_Symbol or a.is_Pow and a.exp == -1}
        rest = [a for a in value.args if not a.is_Symbol and not (a.is_Pow and a.exp == -1)]
        return bool(letters & set("fgh")) and all(a.is_Integer for a in rest) or (not rest and bool(letters & set("pqPQT")))
    return value.is_Symbol or value in (E, I)


def bare(value, always: bool):
    """The right side of "x = 5" and "x in {5}"; of any equation with always."""
    if isinstance(value, Value) and value.kind == "rel" and set(value.how) <= {"=", "in"}:
        first, last = value.items[0], value.items[-1]
        if always or label(first) or value.how[-1] == "in":
            if isinstance(last, Symbol) and len(value.items) == 2 and not isinstance(first, Symbol) and isinstance(first, sympy.Expr):
                return first  # 5 = x
            return last
    return value


def matched(a: tuple, b: tuple) -> bool:
    """Whether two collections are the same in some order."""
    if len(a) != len(b):
        return False
    rest = list(b)
    for x in a:
        hit = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if hit is None:
            return False
        del rest[hit]
    return True


def unique(items: tuple) -> tuple:
    out = []
    for x in items:
        if not any(same(x, y) for y in out):
            out.append(x)
    return tuple(out)


def same_equation(a: Value, b: Value) -> bool:
    """Two equations or inequalities, each link up to a factor and moved terms."""
    if len(a.how) == 1 and len(b.how) == 1 and all(isinstance(x, sympy.Expr) for v in (a, b) for x in v.items):
        sides = []
        for v in (a, b):
            left, right = v.items
            sides.append((right - left if ">" in v.how[0] else left - right, v.how[0].replace(">", "<")))
        if sides[0][1] == sides[1][1] and sides[0][1] != "in":
            return proportional(sides[0][0], sides[1][0], "<" in sides[0][1])
    flipped = [Value("rel", tuple(s.translate(str.maketrans("<>", "><")) for s in reversed(v.how)), v.items[::-1]) if ">" in "".join(v.how) else v for v in (a, b)]
    return flipped[0].how == flipped[1].how and len(a.items) == len(b.items) and all(map(same, flipped[0].items, flipped[1].items))


def same(a, b) -> bool:
    """Whether an answer a means the reference b."""
    if not isinstance(a, Value) and not isinstance(b, Value):
        return equal(a, b)
    kinds = [v.kind if isinstance(v, Value) else "number" for v in (a, b)]
    if "rel" in kinds:
        return same_rel(a, b, kinds)
    if kinds == ["words", "words"]:
        return a.how == b.how and len(a.items) == len(b.items) and all(map(same, a.items, b.items))
    if kinds == ["seq", "seq"] and a.how == b.how:
        return len(a.items) == len(b.items) and all(map(same, a.items, b.items))
    if kinds[0] == "list" and kinds[1] != "list" and len(one := unique(a.items)) == 1:  # "3/8, or 0.375"
        return same(one[0], b)
    if kinds[0] == kinds[1] and kinds[0] in ("list", "set"):
        if named(a) and named(b):
            return matched(a.items, b.items)
        a, b = (tuple(bare(x, False) for x in v.items) for v in (a, b))
        return matched(unique(a), unique(b)) if kinds[0] == "set" else matched(a, b)
    if set(kinds) == {"list", "set"}:
        items = [tuple(bare(x, False) for x in v.items) for v in (a, b)]
        return "and" not in (a if kinds[0] == "list" else b).how[:-1] and matched(*items)
    if "set" in kinds and "number" in kinds:
        one, number = (a, b) if kinds[0] == "set" else (b, a)
        return len(one.items) == 1 and same(one.items[0], number)
    if "seq" in kinds and ("number" in kinds or "list" in kinds):
        tuple_, other = (a, b) if kinds[0] == "seq" else (b, a)
        if isinstance(other, sympy.MatrixBase):
            return tuple_.how in ("()", "<>") and other.shape == (len(tuple_.items), 1) and all(map(same, tuple_.items, other))
        if isinstance(other, Value) and named(other) and tuple_.how == "()":  # x = 3, y = 4 for (3, 4)
            names = [str(x.items[0]) for x in other.items]
            return names == sorted(names) and len(names) == len(tuple_.items) and all(same(x.items[-1], y) for x, y in zip(other.items, tuple_.items))
        return False
    if set(kinds) == {"seq"} and "<>" in (a.how, b.how) and "()" in (a.how, b.how):
        return len(a.items) == len(b.items) and all(map(same, a.items, b.items))
    if "region" in kinds:
        a, b = region_of(a), region_of(b)
        return len(a.items) == len(b.items) and all(x[1] == y[1] and x[3] == y[3] and same(x[0], y[0]) and same(x[2], y[2]) for x, y in zip(a.items, b.items))
    return False


def named(value: Value) -> bool:
    """x = 1, y = 2: values of several names."""
    names = [x.items[0] for x in value.items if isinstance(x, Value) and x.kind == "rel" and x.how == ("=",) and isinstance(x.items[0], Symbol)]
    return value.kind == "list" and len(names) == len(value.items) and len(set(names)) == len(names) > 1


def same_rel(a, b, kinds) -> bool:
    """same() where one side, at least, is an equation, an inequality, "x in", or a ratio."""
    ratio = [isinstance(v, Value) and v.kind == "rel" and set(v.how) == {":"} for v in (a, b)]
    if all(ratio):
        if len(a.items) != len(b.items):
            return False
        return all(equal(multiply(x, b.items[0]), multiply(y, a.items[0])) for x, y in zip(a.items, b.items)) if all_scalars(a, b) else all(map(same, a.items, b.items))
    if any(ratio):
        colon, other = (a, b) if ratio[0] else (b, a)
        return len(colon.items) == 2 and not isinstance(other, Value) and all_scalars(colon) and equal(divide(*colon.items), other)
    if kinds == ["rel", "rel"]:
        if same_equation(a, b):
            return True
        if set(a.how) == set(b.how) == {"="} and same(a.items[0], b.items[0]) and label(b.items[0]):
            return same(a.items[-1], b.items[-1])
        if set(a.how) == set(b.how) == {"="} and {str(v.items[0]) for v in (a, b)} in ({"y", "f*x"}, {"y", "g*x"}):
            return same(a.items[-1], b.items[-1])
        short = bare(a, True)  # x = 2 + 3 = 5
        if len(a.how) > 1 and set(a.how) == {"="} and label(a.items[0]):
            return same(Value("rel", ("=",), (a.items[0], short)), b)
    x, y = bare(a, True), bare(b, False)
    if (x is not a or kinds[0] != "rel") and (y is not b or kinds[1] != "rel") and kinds != ["rel", "rel"]:
        if same(x, y):
            return True
    if "rel" in kinds and not any(isinstance(v, Value) and v.kind == "rel" and set(v.how) == {"="} for v in (a, b)):
        return same(region_of(a), region_of(b))
    return False


def all_scalars(*values) -> bool:
    return all(isinstance(x, sympy.Expr) for v in values for x in v.items)


PHRASES = {
    "no solution": "emptyset", "no solutions": "emptyset", "no real solution": "emptyset", "no real solutions": "emptyset", "empty set": "emptyset", "none": "emptyset",
    "the empty set": "emptyset", "dne": "undefined", "does not exist": "undefined", "undefined": "undefined", "not defined": "undefined",
    "all real numbers": "\\mathbb{R}", "all reals": "\\mathbb{R}", "infinitely many": "infinitely many", "infinitely many solutions": "infinitely many",
}  # fmt: skip


WRAPPED = re.compile(rf"\\(?:{'|'.join(sorted(TEXT, key=len, reverse=True))})\s*\{{([^{{}}]*)\}}")


def squash(text: str) -> str:
    """A text without what never matters: spacing, sizes, dollar signs, wrappers of text, a last full stop."""
    text = re.sub(r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle|quad|qquad|!|,|;|:| )(?![a-zA-Z])|\$|~|\*\*", " ", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = WRAPPED.sub(r"\1", text).strip().rstrip(".")
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)


def words_of(text: str) -> str:
    """The words of an answer in small letters, without brackets, points and articles."""
    text = WRAPPED.sub(r" \1 ", text)
    text = re.sub(r"\\(?:left|right|quad|qquad)(?![a-zA-Z])|\\[,;:! ()\[\]]|\$|~", " ", text)
    if re.search(r"[\\^_&=<>+*/\[\]{}|]", text):
        return ""
    words = re.sub(r"[^\w\s:'-]", " ", text).lower().split()
    return " ".join(w for w in words if w not in ("the", "a", "an"))


@functools.lru_cache(maxsize=512)
def readings(text: str) -> tuple:
    """What an answer can mean: (value, units, trailing words, letters read as a product) for each way to read it; empty if it cannot be read."""
    if len(text) > MAX_ANSWER:
        return ()
    text, found = clean(text), []
    phrase = PHRASES.get(words_of(text))
    text = "\\" + phrase if phrase == "emptyset" else phrase or text
    ways = [(thousands, split) for thousands in ((True, False) if re.search(r"\d,\d{3}", text) else (True,))
            for split in ((False, True) if re.search(r"(?<![a-zA-Z\\])[a-zA-Z]{2,4}(?![a-zA-Z])", text) else (False,))]  # fmt: skip
    for thousands, split in ways:
        try:
            tokens = tokens_of(text, thousands, split)
            if not tokens:
                continue
            values, signs = [], (1, -1) if any(t.kind == "cmd" and t.value in ("pm", "mp") for t in tokens) else (1,)
            for sign in signs:
                parser = Parser(list(tokens), sign)
                values.append(parser.answer())
            value = values[0]
            if len(values) == 2:
                flat = [x for v in values for x in (v.items if isinstance(v, Value) and v.kind in ("list", "set") else (bare(v, False),))]
                value = Value("list", (",",) * (len(flat) - 1), unique(tuple(bare(x, False) for x in flat)))
            found.append((value, tuple(sorted(set(parser.units))), tuple(parser.words), split))
        except (Unreadable, RecursionError, ValueError, ArithmeticError, TypeError, AttributeError):
            continue
    return tuple(found)


def readable(text: str) -> bool:
    """Whether a text is nothing but an answer: not a sentence around one."""
    return any(not wordy(value) and not split and len(words) < 4 for value, _, words, split in readings(text)[:1])


def wordy(value) -> bool:
    return isinstance(value, Value) and (value.kind == "words" and (len(value.items) > 0 or len(value.how) > 3) or any(map(wordy, value.items)))


COMPOUND = {("mph", 1): (("mile", 1), ("hour", -1)), ("kph", 1): (("kilometer", 1), ("hour", -1))}


def units_clash(a: tuple, b: tuple) -> bool:
    """Whether both have units, and not the same."""
    a, b = ({part for u in x for part in COMPOUND.get(u, (u,))} for x in (a, b))
    mods = [{u for u in x if u[0].startswith("mod")} for x in (a, b)]
    rest = [{u for u in x if not u[0].startswith("mod")} for x in (a, b)]
    return any(all(pair) and pair[0] ^ pair[1] not in (set(), {("dollar", 1)}) for pair in (mods, rest))


def answers_agree(answer: str, gold: str) -> bool:
    """Whether two answers, as they stand in a text, mean the same."""
    if not gold or len(gold) > MAX_ANSWER or len(answer) > MAX_ANSWER:
        return bool(gold) and answer == gold
    if squash(answer) == squash(gold) and squash(gold):
        return True
    letter = re.fullmatch(r"\W{0,9}(?:\\(?:text|textbf|mathrm|mathbf)\{)?\W{0,3}([A-J])\W{0,9}", gold)
    if letter:  # a choice: (B), B. 12 apples
        said = re.match(r"\W{0,9}(?:(?:option|choice|answer)\s*)?(?:\\(?:text|textbf|mathrm|mathbf)\{)?\W{0,3}([A-Ja-j])(?![\w^=+*/\\-])(?:\W{0,9}$|[).:}]|\s+\w{3,})", answer, re.IGNORECASE)
        if said:
            return said[1].upper() == letter[1]
    answer = re.sub(r"^(?:A|Result)\s*:\s*(?=\S)", "", answer)
    words = words_of(gold)
    if re.search(r"[a-z]{3}|^(?:no|am|pm)$", words) and words == words_of(answer):
        return True
    for value, units, *_ in readings(answer):
        for reference, gold_units, *_ in readings(gold):
            try:
                if not units_clash(units, gold_units) and same(value, reference):
                    return True
                if converted(value, units, reference, gold_units) or converted(reference, gold_units, value, units):
                    return True
            except (Unreadable, RecursionError, ValueError, ArithmeticError, TypeError, AttributeError, NotImplementedError):
                continue
    return False


def converted(a, units: tuple, b, other: tuple) -> bool:
    """50% for 1/2, 30 degrees for pi/6."""
    if other or len(units) != 1 or not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return False
    factor = {"percent": Rational(1, 100), "degree": pi / 180}.get(units[0][0])
    return factor is not None and equal(a * factor, b)


def reference_of(gold: str) -> str:
    """The answer in a reference: a bare one as it is, or that of a sentence or a worked solution."""
    announced = len(gold) <= MAX_RESPONSE and any(pattern.search(gold) for pattern, _ in SIGNS)
    return (extract_answer(gold) if announced or re.match(r"\s*[A-Z][a-z]", gold) and prose(gold[:MAX_ANSWER]) else None) or gold.strip()


def grade(response: str, gold: str) -> bool:
    """Whether the answer in a response means the reference answer (bare, or in a worked solution)."""
    answer, reference = extract_answer(response), reference_of(gold)
    return answer is not None and (answers_agree(answer, reference) or response.strip() == reference)


# ------------------------------------------------------------------------------------------- grading in a process apart


def judge(response: str, gold: str) -> dict:
    """A response's verdicts: extracted; correct, by extract_answer; strict, by "The final answer is X." alone."""
    answer, strict = extract_answer(response), STRICT.search(first_problem(response[:MAX_RESPONSE]))
    reference = reference_of(gold)
    return {"extracted": answer, "correct": answer is not None and answers_agree(answer, reference),
            "strict": strict is not None and answers_agree(strict[1][:MAX_ANSWER], reference), "graded": True}  # fmt: skip


def alike(answers: list[str | None]) -> list[int]:
    """For each answer the index of the first that means the same."""
    first = []
    for i, answer in enumerate(answers):
        first.append(next((j for j in sorted(set(first)) if answer == answers[j] or (answer and answers[j] and answers_agree(answer, answers[j]))), i))
    return first


def serve(pipe, megabytes: int) -> None:
    """The worker's loop. Its memory is limited where the system can do that; it ends when its parent does."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), resource.RLIM_INFINITY))
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({"judge": judge, "alike": alike}[name](*args))
        except MemoryError:
            pipe.send(None)


class Worker:
    """Grades in another process, which is killed when it takes too long or too much memory, and started again. None: not graded."""

    def __init__(self, seconds: float = 10.0, megabytes: int = 1000):
        self.seconds, self.megabytes, self.killed, self.process = seconds, megabytes, 0, None
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share locks of torch's threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.megabytes), daemon=True)
        with contextlib.suppress(ValueError):  # not the main thread
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child inherits that: Ctrl-C is ours alone, also while it imports
        self.process.start()
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        theirs.close()
        self.fresh = True

    def ask(self, name: str, *args):
        """The result of judge or alike, or None where the worker had to be stopped."""
        if self.process is None:
            self.start()
        with contextlib.suppress(EOFError, OSError):
            self.pipe.send((name, args))
            if self.pipe.poll(self.seconds + 60 * self.fresh):  # at first it imports this file
                self.fresh = False
                return self.pipe.recv()
        self.killed += 1
        self.stop()
        return None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None


if __name__ == "__main__":
    run(main, Settings)
