"""Evaluate models: few-shot benchmarks, the questions and the likelihood of a corpus.

    raw     BOS  Problem .. Solution: s s s The final answer is a.   ...
                 Problem .. Solution: ->
    latent  BOS  Problem .. Solution: SOL PRI s s s EOL The final answer is a.   ...
                 Problem .. Solution: SOL PRI -> z z z EOL x x x

In latent mode a solution is a thought, laid out as in training (data/lib/corpus.py),
and only what follows its EOL is graded.

    python eval_math.py --benchmark=gsm8k --model=M --out_dir=out/gsm8k
    python eval_math.py --benchmark=math500 --model=A,B --k=16 --out_dir=out/math
    python eval_math.py --benchmark=my.jsonl --shots=few.jsonl --model=M --out_dir=out/my
    python eval_math.py --benchmark=gsm8k --model=M --finetune --out_dir=out/sft
    python eval_math.py --corpus=out/digits/heldout --model=out/M1 --out_dir=out/eval
    python eval_math.py --compare=out/a,out/b --out_dir=out/compared

Benchmarks are files as published (jsonl, parquet), named by --file or lying in
data/benchmarks/NAME (data/benchmarks.py fetches them). Worked examples are our own (data/shots), drawn
from the training problems (--shots=train), or in a file. A prompt that does not fit
into the model's context is refused, or with --drop_shots loses examples, which is
counted. --k draws samples for maj@k and pass@k. --finetune trains on the training
problems first, once for each of --seeds.

The questions of a corpus (questions.npy) are asked without examples: a prompt is
the chunks before the answer. Where the corpus shows that its answers end with their
line, a response ends with its first line (answers_end_with_line). A corpus without
questions, as data/text.py makes them, has a likelihood only, and no "accuracy".

Written into --out_dir: responses.jsonl (a line a problem; a run that was cut off
goes on behind its last whole block), results.json (scores named as in
lm-evaluation-harness), timing.json, and likelihood.npz (nats of each document).

Likelihood is measured for raw and latent models on the same chunks, the same tokens
and the same givens. A chunk x is scored if the E-step would infer thoughts for it:
it is no question, not empty, and fits into the context beside --max_new (so give raw
models the same --max_new). Given are up to --before chunks c before it and nothing
else: no model is told that the question is over, or that a thought follows. BOS, EOS
and markers are no text. In nats, over the first --bound_docs documents:

    nll              -log p(x | c), of a raw model
    nll_alone        the same of a latent model: a chunk written without a thought
    nll_thoughtless  -log( p(x | c) + p(SOL | c) p(x | c, SOL EOL) )
    nll_bound        -log( p(x | c) + p(SOL | c) ((1-e) mean w + e p(x | c, SOL EOL)) )

The mean is over k = 1 (ELBO), 4 or 16 (IWAE) of the K = max(--samples, 16) thoughts
that the model infers as in the E-step, and nll_bound over the groups of k; weights w and
NO_THOUGHT e as in infer_thoughts.py. A thought that is cut off has w = 0.

The c of a latent model is text (--context=bare), or text with the thoughts that were
picked for it among all K, the same c for every figure. A pick depends on its chunk, on
earlier ones and on chance, never on what follows, so a document's sum is, in
expectation, at least the -log of a probability of whole documents.
Figures are nats per byte, per token (_token) and per document (_document) of the
scored chunks. ess, pick_right, no_pick_share and cut_off_share describe E-steps.
"""

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.lib.cli import LEAST, UserError, claim, opt, read_json, replacing, run, write_json
from data.lib.compare import compare, print_nats, print_results
from data.lib.corpus import (
    PICK,
    PRIOR,
    RAW,
    TEST_DRAW,
    Corpus,
    hash_uniform,
    layout,
    open_corpus,
    open_thoughts,
)
from data.lib.engine import Engine, Sampling
from data.lib.finetune import run_train, sum_up, training_flags, training_problems
from data.lib.grader import Worker
from data.lib.problems import Item, choose_shots, find_file, read_items
from data.lib.ranks import pick_device
from data.lib.responses import Meter, Records, answers_end_with_line, asked_chunks, first_line
from data.lib.scores import BOUNDS, Scored, by_document, in_units, scores
from data.lib.tokenizer import Tokenizer
from infer_thoughts import (
    NOTHING,
    EStep,
    Limits,
    bound,
    can_think,
    choose,
    context_of,
    ess,
    evidence,
    fits,
    infer,
    thoughtless,
    write_chunk,
)
from train import load_model


@dataclass(kw_only=True)
class Settings:
    # what is asked
    benchmark: str = opt("", "gsm8k, math, math500, mmlu_stem, or a file of {question, answer}")
    corpus: str = opt("", "instead: a corpus folder, held out")
    compare: str = opt("", "instead: out_dirs of earlier runs, with commas between")
    file: str = opt("", "the benchmark's problems; none: data/benchmarks/NAME/test.jsonl")
    train_file: str = opt("", "its training problems; none: data/benchmarks/NAME/train.jsonl")
    limit: int = opt(0, "only the first so many problems; 0: all", low=0)
    shots: str = opt("", "a file of worked examples; train: drawn by --seed; none: our own")
    n_shots: int = opt(-1, "-1: 8 for gsm8k, 0 for a file without --shots, else 4", low=-1)
    drop_shots: bool = opt(False, "where a prompt does not fit, leave out examples")
    show: int = opt(0, "print this many prompts", low=0)
    # who answers, and how
    model: str = opt("", "model folder; several with commas between are compared")
    out_dir: str = opt(help="where the results go")
    mode: Literal["latent", "raw"] = opt("latent", "think first, or answer at once")
    max_new: int = opt(0, "longest thought with its EOL, or raw solution; "
        "0: 512 for a benchmark, 128 for a corpus", low=0)
    max_answer: int = opt(32, "longest answer in tokens (latent mode, corpora)", low=1)
    max_thought: int = opt(0, "close a thought after so many tokens, "
        "and let the model answer; 0: one that does not end is wrong", low=0)
    k: int = opt(0, "responses sampled a problem, beside the greedy one", low=0)
    temperature: float = opt(0.6, "of the k samples", low=0)
    top_p: float = opt(0.9, "sample among the likeliest tokens of this mass; 1: all", low=0)
    # fine-tuning before the evaluation
    finetune: bool = opt(False, "train first, then evaluate without examples; --k=0: 16")
    seeds: int = opt(3, "so many fine-tuned models", low=1)
    epochs: float = opt(5.0, "passes over the training problems", low=0)
    train: str = opt("", 'more flags for train.py, as in --train="--lr=1e-5"')
    # likelihood of a corpus
    thoughts: str = opt("", "the true thoughts, to report how often a pick is right")
    samples: int = opt(4, "thoughts a chunk (K) for the figures of E-steps", low=1)
    min_gain: float = opt(0.0, "drop picks that gain fewer nats; -inf: none", low=-math.inf)
    gain_by: Literal["text", "evidence"] = opt("text", "the pick, or the mean weight of all")
    context: Literal["bare", "thoughts"] = opt("thoughts", "earlier chunks as text, "
        "or (latent mode) with thoughts that are inferred for them")
    before: int = opt(3, "chunks before a chunk that are given", low=0)
    bound_docs: int = opt(250, "documents for the likelihood; 0: all", low=0)
    # how it is computed
    block: int = opt(0, "problems written at a time: what a kill can cost; "
        "0: 64 for a benchmark on a CPU, else 1024", low=0)
    rows: int = opt(0, "sequences side by side; 0: 1024, or what memory allows", low=0)
    seed: int = opt(0, "of sampling, of training and of --shots=train", low=0)
    device: str = opt("", "cpu, cuda, cuda:1, mps; none: the best there is")


# -------------------- prompts

# Where a response to a problem ends, for results.json and as a pattern.
UNTIL = ('a line with "Problem:" or "Question:"', 'the end of what follows "The final answer is"')
SHOWN = r"(?:\$\$|\\\[|\\begin\{)[\s\S]*?(?:\$\$|\\\]|\\end\{\w+\*?\})[^\n]*"  # over several lines
ANSWER = rf"[Tt]he final answer is[\s:*]*+(?:{SHOWN}|(?!\$\$|\\\[|\\begin)[^\n]+)\n"
END = re.compile(rf"\n[ \t#*]*(?:Problem|Question):|{ANSWER}")


@dataclass
class Problem:
    """What is asked, and what its record says about it."""

    key: int  # seeds the noise of its samples
    prompt: np.ndarray  # ids; empty: it does not fit into the model's context
    gold: str
    about: dict = field(default_factory=dict)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def few_shot_prompt(tok, shots: list[Item], item: Item, mode: str) -> np.ndarray:
    """Ids of the examples and the question.

    Raw text is encoded as one string. Latent prompts are laid out chunk by chunk,
    as documents are in training, up to the thought that is asked for.
    """
    if mode == "raw":
        texts = [x.question_text + x.solution + x.answer_text for x in shots]
        text = "\n\n".join([*texts, item.question_text])
        return np.array([tok.bos, *tok.encode(text)], dtype=np.int64)
    pieces, thoughts = [], []
    for x in shots:
        pieces += [x.question_text, x.answer_text + "\n\n"]
        thoughts += [[], tok.encode_thought(x.solution)]
    pieces += [item.question_text, ""]
    thoughts += [[], None]
    ids, lengths, _ = tok.encode_documents([pieces])
    chunks = np.split(ids, np.cumsum(lengths)[:-1])
    forms = [RAW, PRIOR] * (len(shots) + 1)
    return layout(tok, chunks, thoughts, forms, end=False)[0]


def benchmark_problems(s: Settings, tok, seq_len: int) -> tuple[list[Problem], dict]:
    """The problems with their prompts, and counts for results.json.

    UserError for a prompt that does not fit into seq_len tokens, unless --drop_shots.
    """
    items = read_items(find_file(s, "test"))[: s.limit or None]
    shots = choose_shots(s, items)
    room = seq_len - s.max_new
    if s.mode == "latent":
        room -= s.max_answer
    problems, dropped, too_long = [], 0, 0
    for key, item in enumerate(items):
        kept = shots
        prompt = few_shot_prompt(tok, kept, item, s.mode)
        if len(prompt) > room and not s.drop_shots:
            raise UserError(
                f"problem {key}: {len(shots)} examples and the question are "
                f"{len(prompt)} tokens, and --max_new={s.max_new} more do not fit "
                f"into the model's {seq_len}: lower --n_shots or --max_new, "
                "or give --drop_shots"
            )
        while len(prompt) > room and kept:
            kept = kept[1:]
            prompt = few_shot_prompt(tok, kept, item, s.mode)
        dropped += len(shots) - len(kept)
        if len(prompt) > room:
            too_long += 1
            prompt = prompt[:0]
        question = digest(json.dumps([item.question, item.answer]).encode())
        about = {"question": question, "n_shots": len(kept), **item.about}
        problems.append(Problem(key, prompt, item.answer, about))
    counts = {"n_shots": len(shots), "dropped_shots": dropped}
    counts |= {"too_long": too_long, "until": list(UNTIL)}
    return problems, counts


def corpus_problems(s: Settings, corpus: Corpus, seq_len: int, picked=NOTHING) -> tuple:
    """(problems, counts for results.json) of the chunks that follow a question.

    A prompt is up to --before chunks, with the thoughts in `picked`. An answer that
    cannot carry a thought, or whose question does not fit beside a response, is left
    out and counted. A corpus without questions has no problems.
    """
    fitting = can_think(corpus, s.max_new, seq_len)
    limits = Limits(s.before, s.max_new + s.max_answer, seq_len)
    problems, too_long = [], 0
    for i in asked_chunks(corpus):
        context = context_of(corpus, i, limits, picked)
        if not fitting[i] or (s.before and i - 1 not in context):
            too_long += 1
            continue
        if s.mode == "latent":
            # A chunk whose thought is still unknown is written up to SOL PRI.
            prompt, _ = write_chunk(corpus, i, context, None, PRIOR, picked)
        else:
            ids, part = write_chunk(corpus, i, context, None, RAW, picked)
            prompt = ids[: part.chunk[0]]
        question, answer = corpus.chunk(i - 1), corpus.chunk(i)
        about = {"question": digest(question.tobytes() + answer.tobytes())}
        problems.append(Problem(int(i), prompt, corpus.text(i), about))
    return problems[: s.limit or None], {"answers_too_long": too_long}


# -------------------- responses


class Decoding(NamedTuple):
    """How many responses are drawn for a problem, and how."""

    samples: int
    temperature: float
    top_p: float


GREEDY = Decoding(1, 0.0, 1.0)


class Late(NamedTuple):
    """A thought that did not end in time."""

    problem: Problem
    sample: int
    thought: list[int]  # ids


@dataclass(frozen=True)
class Responder:
    """A model with its tokenizer that answers problems, and the grader of its answers.

    one_line: a response ends with its first line (answers_end_with_line). Generation
    stops there or a few tokens later, and what came behind the line is cut off.
    """

    engine: Engine
    tok: Tokenizer
    s: Settings
    grader: Worker
    one_line: bool = False

    @property
    def latent(self) -> bool:
        return self.s.mode == "latent"

    @property
    def thought_limit(self) -> int:
        return self.s.max_thought or self.s.max_new

    def respond(
        self, problems: list[Problem], how: Decoding, on_tokens=None
    ) -> list[list[dict]]:
        """how.samples responses to each problem, ungraded.

        A response has thought (in latent mode), response, cut_off, forced, and
        tokens, which counts all that was sampled.
        """
        asked = [p for p in problems if len(p.prompt)]
        prompts = [p.prompt for p in asked]
        keys = [p.key for p in asked]
        longest = self.s.max_answer if self.s.corpus else self.s.max_new
        if self.latent:
            longest = self.thought_limit + self.s.max_answer
        ends = self.response_ends
        drawn = self.generate(prompts, keys, how, longest, ends, on_tokens)
        rows, late = {}, []
        for p, samples in zip(asked, drawn):
            rows[p.key] = [self.read(ids, finished) for ids, finished in samples]
            for j, (ids, _) in enumerate(samples):
                if self.s.max_thought and rows[p.key][j]["cut_off"]:
                    late.append(Late(p, j, ids[: self.thought_limit]))
        for x, answer in zip(late, self.answer_late(late, how, on_tokens)):
            rows[x.problem.key][x.sample] |= answer
        # Problems that are too long for the model even without examples.
        nothing = {"response": "", "tokens": 0, "cut_off": True, "forced": False}
        for p in problems:
            if p.key not in rows:
                rows[p.key] = [dict(nothing) for _ in range(how.samples)]
        return [rows[p.key] for p in problems]

    def answer_late(self, late: list[Late], how: Decoding, on_tokens) -> list[dict]:
        """Budget forcing: the thoughts are closed, and the model answers."""
        eol = self.tok.eol
        prompts = [np.append(x.problem.prompt, [*x.thought, eol]) for x in late]
        keys = [(x.problem.key << 20) + x.sample + 1 for x in late]
        once = how._replace(samples=1)
        longest, ends = self.s.max_answer, self.answer_ends
        drawn = self.generate(prompts, keys, once, longest, ends, on_tokens)
        answers = []
        for x, [(ids, finished)] in zip(late, drawn):
            text, ended = self.read_answer(ids, finished)
            tokens = len(x.thought) + 1 + len(ids)
            answer = {"response": text, "tokens": tokens}
            answers.append(answer | {"cut_off": not ended, "forced": True})
        return answers

    def generate(self, prompts, keys, how, longest: int, ends, on_tokens) -> list:
        """For each prompt, a list of (ids without the stop token, finished).

        ends(ids): whether an unfinished sample is over, see Engine.generate.
        """
        tok = self.tok
        stop = {tok.eos, tok.sol}
        if not self.latent:
            stop.add(tok.eol)
        if self.s.corpus and not self.one_line:
            ends = None  # only EOS ends an answer
        rules = (self.s.seed, TEST_DRAW, how.temperature, how.top_p)
        sampling = Sampling(longest, frozenset(stop), *rules)
        n = how.samples
        drawn = self.engine.generate(prompts, keys, n, sampling, on_tokens, ends)

        def without_stop(ids) -> list[int]:
            return list(ids[:-1] if len(ids) and ids[-1] in stop else ids)

        return [[(without_stop(ids), done) for ids, done, _ in row] for row in drawn]

    def response_ends(self, ids: np.ndarray) -> bool:
        """Whether the answer is over; nothing in a thought ends a response."""
        if self.latent:
            ends = np.flatnonzero(ids == self.tok.eol)
            if not len(ends):
                return False
            ids = ids[ends[0] + 1 :]
        return self.answer_ends(ids)

    def answer_ends(self, ids: np.ndarray) -> bool:
        if self.one_line:
            text = self.tok.decode(ids.tolist(), first=False)
            return first_line(text) != text
        start = "\n" * (len(ids) <= 48)  # a response can begin with another problem
        return bool(END.search(start + self.tok.decode(ids[-48:].tolist())))

    def read_answer(self, ids: list[int], finished: bool) -> tuple[str, bool]:
        """(text, whether it ended), in both modes and behind closed thoughts."""
        text = self.tok.decode(ids, first=False)
        kept = first_line(text) if self.one_line else text
        return kept, finished or kept != text

    def read(self, ids: list[int], finished: bool) -> dict:
        """A sample as a response; a latent one is cut off if its thought is."""
        record = {}
        if self.latent:
            ended = self.tok.eol in ids[: self.thought_limit]
            end = ids.index(self.tok.eol) if ended else self.thought_limit
            record["thought"] = self.tok.decode(ids[:end], first=False)
            answer = ids[end + 1 :] if ended else []
            text, _ = self.read_answer(answer, finished)
        else:
            text, ended = self.read_answer(ids, finished)
        record |= {"response": text, "tokens": len(ids)}
        return record | {"cut_off": not ended, "forced": False}


NOT_GRADED = {"extracted": None, "correct": False, "strict": False, "graded": False}


def answer_block(
    responder: Responder, problems: list[Problem], on_tokens=None
) -> list[dict]:
    """Graded records: the greedy response of a problem, then the sampled ones."""
    s, grader = responder.s, responder.grader
    rows = responder.respond(problems, GREEDY, on_tokens)
    if s.k:
        how = Decoding(s.k, s.temperature, s.top_p)
        sampled = responder.respond(problems, how, on_tokens)
        rows = [greedy + samples for greedy, samples in zip(rows, sampled)]
    records = []
    for p, row in zip(problems, rows):
        for r in row:
            r |= grader.ask("judge", r["response"], p.gold) or NOT_GRADED
        record = {"problem": p.key, **p.about}
        record["prompt"] = digest(p.prompt.tobytes())
        record["prompt_tokens"] = len(p.prompt)
        record |= {"gold": p.gold, "responses": row}
        if s.k > 1:
            extracted = [r["extracted"] for r in row[1:]]
            alike = grader.ask("alike", extracted)
            record["alike"] = alike or list(range(s.k))
        records.append(record)
    return records


def answer_all(
    responder: Responder, problems: list[Problem], out_dir: Path
) -> tuple[list[dict], dict]:
    """(all records, their timing); each block is written when it is done."""
    s = responder.s
    on_cpu = responder.engine.device.type == "cpu"
    block = s.block or (64 if on_cpu and not s.corpus else 1024)
    keys = [p.key for p in problems]
    file = Records(out_dir / "responses.jsonl", keys, block)
    if file.whole:
        return file.records, {}
    done = len(file.records)
    meter = Meter("answer", len(problems), "problems", done)
    while not file.whole:
        some = problems[done : done + block]
        file.add(answer_block(responder, some, meter.on_tokens))
        right = sum(r["responses"][0]["correct"] for r in file.records)
        done = len(file.records)
        meter.at(done, right=f"{right}/{done}")
    meter.update(done, **meter.figures)
    timing = {"answer_seconds": time.time() - meter.start}
    timing["tokens_per_s"] = meter.rate()
    return file.records, timing


# -------------------- likelihood


def limits_of(s: Settings, engine: Engine) -> Limits:
    """Raw models leave room for a thought, too, so that the givens are equal."""
    return Limits(s.before, s.max_new, engine.config.seq_len)


def e_step_of(s: Settings, engine: Engine, samples: int) -> EStep:
    """Thoughts are inferred as by infer_thoughts.py, with noise of their own."""
    how = {"min_gain": s.min_gain, "gain_by": s.gain_by, "seed": s.seed, "purpose": TEST_DRAW}
    return EStep(limits_of(s, engine), samples, s.context, **how)


def text_nll(engine, corpus: Corpus, numbers, limits: Limits, picked=NOTHING) -> np.ndarray:
    """-log p(chunk | context) in nats of the chunks `numbers` as plain text, [n].

    The context is up to limits.before chunks, with the thoughts in `picked`.
    """
    prefixes, tails = [], []
    for i in numbers:
        context = context_of(corpus, i, limits, picked)
        ids, part = write_chunk(corpus, i, context, None, RAW, picked)
        prefixes.append(ids[: part.chunk[0]])
        tails.append([ids[part.chunk[0] :]])
    scored = engine.score(prefixes, tails)
    return -np.array([log_p.sum() for [log_p] in scored])


def choose_scored(s: Settings, corpus: Corpus, seq_len: int) -> Scored:
    """Those of the first --bound_docs documents; UserError for none."""
    n_docs = min(s.bound_docs or corpus.n_docs, corpus.n_docs)
    there = np.arange(corpus.docs[n_docs])
    questions = corpus.questions[there]
    fitting = fits(corpus, s.max_new, seq_len)[there]
    thinking = can_think(corpus, s.max_new, seq_len)[there]
    numbers = there[thinking]
    if not len(numbers):
        raise UserError(
            f"{corpus.folder}: no chunk of the first {n_docs} documents "
            "can be scored: each is a question, empty, or longer than "
            f"the model's {seq_len} tokens less --max_new={s.max_new} and markers"
        )
    docs = np.unique(corpus.doc_of(numbers))
    asked = there[questions & fitting]
    asked = asked[np.isin(corpus.doc_of(asked), docs)]
    counts = {
        "too_long": int((~questions & ~fitting).sum()),
        "questions_too_long": int((questions & ~fitting).sum()),
        "empty": int((~questions & fitting & ~thinking).sum()),
        "docs_left_out": n_docs - len(docs),
    }
    return Scored(numbers, asked, docs, counts)


def likelihood(engine, corpus: Corpus, s: Settings, truth=None, on_tokens=None) -> tuple:
    """(figures for results.json, arrays for likelihood.npz), see the docstring above.

    truth: the corpus's true thoughts, or None.
    """
    limits = limits_of(s, engine)
    scored = choose_scored(s, corpus, limits.seq_len)
    numbers = scored.numbers
    picked, about = {}, {}
    if s.mode == "raw":
        nats = {"nll": text_nll(engine, corpus, numbers, limits)}
    else:
        e_step = e_step_of(s, engine, max(s.samples, *BOUNDS))
        got = infer(engine, corpus, numbers, e_step, picked, on_tokens)
        nats = {"thoughtless": -thoughtless(got), "alone": -got.log_alone}
        nats |= {f"bound_{k}": -bound(got, k) for k in BOUNDS}
        about = e_step_figures(got, s, numbers, truth)
    questions = text_nll(engine, corpus, scored.asked, limits, picked)
    arrays = by_document(corpus, scored, nats, questions)
    figures = in_units(corpus, scored, arrays) | about | scored.counts
    figures["short_context"] = shortened(corpus, numbers, limits, picked)
    return figures, arrays


def shortened(corpus: Corpus, numbers, limits: Limits, picked) -> int:
    """How many chunks get fewer chunks as context than there are, for want of room."""
    n = 0
    for i in numbers:
        given = context_of(corpus, i, limits, picked)
        n += len(given) < len(corpus.before(i, limits.before))
    return n


def e_step_figures(got, s: Settings, numbers, truth) -> dict:
    """What E-steps with --samples thoughts find, for results.json.

    Each group of as many thoughts among the K of `got` (Samples) is one E-step.
    pick_right is None without `truth`, the true thoughts.
    """
    n, K = got.log_w.shape
    n_groups = K // s.samples

    def grouped(x):  # [n, K] -> [n * n_groups, samples]
        x = x[:, : n_groups * s.samples]
        return x.reshape(n * n_groups, s.samples)

    weights = grouped(got.log_w)
    picks = got.pick
    if K > s.samples:
        uniform = hash_uniform(PICK, s.seed, np.arange(len(weights)))
        gain = grouped(got.gain)
        if s.gain_by == "evidence":
            gain = evidence(weights, np.repeat(got.log_none, n_groups))
        picks = choose("resample", weights, gain, s.min_gain, uniform)
    figures = {
        "ess": float(ess(weights).mean()),
        "no_pick_share": float((picks < 0).mean()),
        "cut_off_share": float((~got.finished).mean()),
        "pick_right": None,
    }
    if truth:
        right = []
        for place, pick in enumerate(picks):
            row, group = divmod(place, n_groups)
            thought = got.thoughts[row][group * s.samples + pick]
            true = truth.span(numbers[row])
            right.append(pick >= 0 and np.array_equal(thought, true))
        figures["pick_right"] = float(np.mean(right))
    return figures


def thoughts_before(engine: Engine, corpus: Corpus, s: Settings) -> dict:
    """{chunk: (thought, form)} in the prompts, as the E-step picks them."""
    picked = {}
    if s.context == "thoughts" and s.mode == "latent":
        fitting = can_think(corpus, s.max_new, engine.config.seq_len)
        numbers = np.flatnonzero(fitting)
        # The last of a document's chunks is in no prompt.
        numbers = numbers[:-1][np.diff(corpus.doc_of(numbers)) == 0]
        e_step = e_step_of(s, engine, s.samples)
        infer(engine, corpus, numbers, e_step, picked)
    return picked


# -------------------- fine-tuning


def finetune(s: Settings) -> None:
    """Train --seeds models on the training problems, evaluate each, sum up.

    The loss is on the answer and on the thought before it (data/lib/finetune.py).
    """
    out_dir = claim(s.out_dir, s, ("device", "rows"))
    s = replace(s, finetune=False, n_shots=0, shots="", k=s.k or 16)
    flags = training_flags(s, training_problems(s), out_dir / "data")
    rows = []
    for seed in range(s.seed, s.seed + s.seeds):
        model = out_dir / f"seed{seed}" / "model"
        folder = out_dir / f"seed{seed}" / "eval"
        run_train(model, flags | {"seed": seed}, s.train)
        evaluate(replace(s, model=str(model), out_dir=str(folder), seed=seed))
        rows.append(read_json(folder / "results.json"))
    sampled = [r["sampled"]["accuracy"] for r in rows]
    figures = {
        "greedy": sum_up("greedy", [r["accuracy"] for r in rows]),
        "mean of k samples": sum_up("mean of k samples", sampled),
        **{name: getattr(s, name) for name in ("k", "temperature", "top_p")},
        "n": rows[0]["n"],
        "steps": flags["max_steps"],
    }
    write_json(out_dir / "results.json", figures)


# -------------------- main

# The settings that results.json repeats.
REPEATED = """mode benchmark file shots limit corpus model
    max_new max_answer max_thought temperature top_p seed"""


def evaluate(s: Settings) -> None:
    """One model on one benchmark or corpus."""
    s = replace(s, max_new=s.max_new or (128 if s.corpus else 512))
    out_dir = claim(s.out_dir, s, ("device", "rows", "show"))
    if (out_dir / "results.json").exists():
        print(f"{out_dir}: complete")
        return
    begin = time.time()
    grader = Worker()  # it imports sympy while the model is being read
    try:
        device = pick_device(s.device)
        if device == "mps" and not s.device:
            device = "cpu"  # mps lacks the float64 that the E-step's sums need
        model, tok = load_model(s.model, device)
        part = evaluate_corpus if s.corpus else evaluate_benchmark
        responder = Responder(Engine(model, s.rows), tok, s, grader)
        results, timing = part(responder, out_dir)
    finally:
        grader.stop()
    timing |= {"seconds": time.time() - begin, "killed": grader.killed}
    write_json(out_dir / "timing.json", timing)
    settings = {name: getattr(s, name) for name in REPEATED.split()}
    write_json(out_dir / "results.json", results | settings)
    print_results(results)


def evaluate_benchmark(responder: Responder, out_dir: Path) -> tuple[dict, dict]:
    """(results, timing)"""
    seq_len = responder.engine.config.seq_len
    problems, counts = benchmark_problems(responder.s, responder.tok, seq_len)
    lengths = [len(p.prompt) for p in problems]
    print(
        f"{len(problems)} problems, {counts['n_shots']} examples, "
        f"prompts of {min(lengths)} to {max(lengths)} tokens; "
        f"examples dropped {counts['dropped_shots']}, "
        f"questions too long {counts['too_long']}"
    )
    return answer_and_score(responder, problems, counts, out_dir)


def evaluate_corpus(responder: Responder, out_dir: Path) -> tuple[dict, dict]:
    """(results, timing) of the corpus's questions, if any, and of its likelihood."""
    s, engine = responder.s, responder.engine
    seq_len = engine.config.seq_len
    corpus = open_corpus(s.corpus, responder.tok)
    truth = open_thoughts(s.thoughts, corpus) if s.thoughts else None
    choose_scored(s, corpus, seq_len)  # refuses before anything is computed
    picked = {}
    if len(asked_chunks(corpus)):
        picked = thoughts_before(engine, corpus, s)
    problems, counts = corpus_problems(s, corpus, seq_len, picked)
    results, timing = {}, {}
    if problems:
        one_line = answers_end_with_line(corpus)
        counts["until"] = ["its first line's end"] if one_line else []
        responder = replace(responder, one_line=one_line)
        results, timing = answer_and_score(responder, problems, counts, out_dir)
    else:
        too_long = f"too long {counts['answers_too_long']}"
        why = f"no question with an answer that fits ({too_long})"
        print(f"{s.corpus}: {why}; likelihood only")
    return results | measure_likelihood(engine, corpus, s, truth, out_dir), timing


def answer_and_score(responder: Responder, problems, counts: dict, out_dir: Path) -> tuple:
    """(results, timing); prints the first --show prompts."""
    s, tok = responder.s, responder.tok
    for p in problems[: s.show]:
        size = f"{len(p.prompt)} tokens, {p.about.get('n_shots', 0)} examples"
        print(f"\nproblem {p.key}, {size}; gold: {p.gold!r}")
        print(tok.decode(p.prompt))
    records, timing = answer_all(responder, problems, out_dir)
    prompts = "".join(r["prompt"] for r in records)
    about = {"prompt_hash": digest(prompts.encode()), "graded_by": "eval_math.py"}
    return scores(records, s.k) | counts | about, timing


def measure_likelihood(engine, corpus: Corpus, s: Settings, truth, out_dir: Path) -> dict:
    """The figures of likelihood(); writes likelihood.npz."""
    meter = Meter("bounds", 1, "corpora")
    figures, arrays = likelihood(engine, corpus, s, truth, meter.on_tokens)
    path = out_dir / "likelihood.npz"
    with replacing(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, corpus=np.array(corpus.meta["sha256"]), **arrays)
    meter.update(1)
    print_nats(figures)
    return figures


def check_flags(s: Settings) -> None:
    """UserError for flags that do not go together, before anything is loaded."""
    if sum(map(bool, (s.benchmark, s.corpus, s.compare))) != 1:
        one = "--benchmark=NAME, --corpus=FOLDER and --compare=FOLDER,FOLDER"
        raise UserError(f"give one of {one}")
    if s.compare:
        return
    if not s.model:
        raise UserError("--model=... is required: a model folder")
    too_long = s.max_new and s.max_thought > s.max_new
    if s.max_thought and (s.mode == "raw" or too_long):
        need = "needs --mode=latent, and at most --max_new"
        raise UserError(f"--max_thought={s.max_thought}: {need}")
    if s.benchmark:
        find_file(s, "test")
    if s.finetune and s.corpus:
        raise UserError("--finetune: needs --benchmark")
    names = [Path(model).name for model in s.model.split(",")]
    if len(names) > 1 and (len(set(names)) < len(names) or s.finetune):
        need = "several models need names that differ, and no --finetune"
        raise UserError(f"--model={s.model}: {need}")


def main(s: Settings) -> None:
    s = replace(s, min_gain=max(s.min_gain, LEAST))
    check_flags(s)
    models = s.model.split(",")
    if s.compare:
        compare(s.compare.split(","), Path(s.out_dir))
    elif s.finetune:
        finetune(s)
    elif len(models) == 1:
        evaluate(s)
    else:
        folders = []
        for model in models:
            print(f"\n{Path(model).name}")
            folders.append(str(Path(s.out_dir) / Path(model).name))
            evaluate(replace(s, model=model, out_dir=folders[-1]))
        compare(folders, Path(s.out_dir))


if __name__ == "__main__":
    run(main, Settings)
