"""Thoughts for a corpus from a teacher: a model that is told what to write, or a file.

    export OPENAI_API_KEY=...  # sent to the endpoint, written nowhere
    python data/teacher.py --corpus=C/warm --out_dir=T --base_url=https://HOST/v1 \\
        --model=gpt-4o-mini --usd_in=0.15 --usd_out=0.6 --budget_usd=20 --rpm=500
    python data/show.py C/warm T

Where the thoughts can come from:

    --base_url=URL           any server of OpenAI's chat completions; one of your own
                             (vLLM, llama.cpp): --base_url=http://localhost:8000/v1
    --batch_out=FILE         batch files to hand in; later --batch_in=FILE,FILE
    --given=FILE             lines of {"chunk": 7, "thought": "..."}, or {"doc": 2,
                             "index": 1, "thought": ...}, the chunk of the document

A model folder, in plain PyTorch, answers questions that are written and read like
batch files. It continues the prompt, to a blank line at most. The last response to a
question counts: the sampled one of --k=1.

    python data/teacher.py --corpus=C --out_dir=T --model=M --batch_out=q \\
        --batch_form=questions
    python eval_math.py --benchmark=q-000.jsonl --model=M --mode=raw --k=1 --out_dir=A
    python data/teacher.py --corpus=C --out_dir=T --model=M --batch_in=A/responses.jsonl

Writes a thoughts folder (data/lib/corpus.py). For the paper's baselines, --style=wrap
and wrap-cot have whole documents rewritten, into a folder with texts.jsonl ({"text",
"doc", "style"}): wrap in one of four styles, by a hash of the document; wrap-cot in
other words, with reasoning added.

Every answer is appended to OUT_DIR.answers/answers.jsonl as it comes, under its
chunk's number and a hash of the request, and is never asked for again: the same
command goes on where a run was killed, stopped or out of budget. The output folder
appears when every chunk has an answer; --partial writes it with what is there.

An answer that is empty, a refusal, cut off at --max_tokens or longer than --longest
is counted and left out: the chunk has no thought. A request without an answer (server
errors, dropped connections, unreadable answers) is tried again, --retries times. The
budget counts all runs on one --out_dir. Near its end requests go one at a time, so
that it is passed by one request at most. A request that broke off and may have been
paid for is counted at the most that it can cost.
"""

import asyncio
import collections
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

if not __package__:  # run as `python data/teacher.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from data.lib.cli import (
    Progress,
    UserError,
    claim,
    hold,
    new_folder,
    opt,
    read_json,
    replacing,
    run,
    write_json,
)
from data.lib.corpus import Corpus, open_corpus, write_thoughts
from data.lib.endpoint import Answers, Endpoint, Trouble, price, read_answer, read_key, read_url, tokens_about

PROMPT = """\
Below is a passage of a document, and the text that comes before it. \
Write out the thinking from which the passage follows: the knowledge that it \
takes for granted, and the reasoning that leads, step by step, to each thing it says. \
Carry out every calculation and derivation that it leaves out.

Be concise: plain statements, each one adding something. \
Say what the passage leaves unsaid; do not repeat or sum up the passage or the text before it. \
Do not mention the passage, its author, this task or yourself. \
No headings and no markup. Write nothing but the thinking.

Text before:
{before}

Passage:
{passage}

Thinking:
"""

NOTHING_BEFORE = "(none: the passage opens the document)"

ONLY_TEXT = "Give only the new text, with no remark about it.\n\nText:\n{passage}\n\nNew text:\n"

# The four styles of WRAP (Maini et al. 2024), in our words.
STYLES = {
    "easy": "Rewrite the text below for a small child: "
    "very short sentences and the simplest everyday words. " + ONLY_TEXT,
    "scholarly": "Rewrite the text below for scholars: "
    "dense, exact sentences and the learned vocabulary of an expert. " + ONLY_TEXT,
    "encyclopedia": "Rewrite the text below as a good encyclopedia would put it: "
    "clear, neutral, well-formed prose. " + ONLY_TEXT,
    "questions": "Turn the text below into a conversation of questions and answers, "
    'each on a line that begins with "Question:" or "Answer:". ' + ONLY_TEXT,
}

WRAP_COT = (
    "Rewrite the text below in other words. "
    "Keep all the information that it holds, and add the reasoning behind it in detail: "
    "work out each step, calculation and argument that it leaves out. " + ONLY_TEXT
)

# What OpenAI takes in one batch file.
BATCH_REQUESTS = 50_000
BATCH_BYTES = 190_000_000

REFUSAL = re.compile(
    r"""\W*(?:
        i['\u2019]?m[ ]sorry
      | i[ ]am[ ]sorry
      | sorry,[ ]
      | as[ ]an[ ]ai\b
      | (?:unfortunately,[ ])?
        i[ ](?:can['\u2019]?t|cannot|can[ ]not|won['\u2019]?t|am[ ]unable[ ]to|'m[ ]unable[ ]to)
        [ ](?:help|assist|comply|provide|fulfil|continue|answer|do[ ]that|write)
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(kw_only=True)
class Settings:
    # what is asked
    corpus: str = opt(help="corpus folder")
    out_dir: str = opt(help="thoughts folder to write (with a --style: a folder with texts.jsonl)")
    style: Literal["thoughts", "wrap", "wrap-cot"] = opt("thoughts", "what is written: see above")
    prompt_file: str = opt("", "a text with {passage} and perhaps {before}, instead of the built-in prompt")
    before: int = opt(1, "chunks before the chunk that are shown", low=0)
    seed: int = opt(0, "decides which of the four styles a document gets", low=0)
    # who answers
    model: str = opt("", "the endpoint's name of the model")
    base_url: str = opt("", "the endpoint, with its version: https://HOST/v1, http://localhost:8000/v1")
    key_env: str = opt("OPENAI_API_KEY", "environment variable of the endpoint's key; unset: none is sent")
    given: str = opt("", "a jsonl of thoughts instead of a model")
    batch_out: str = opt("", "write the requests still to be answered into NAME-000.jsonl ... and end")
    batch_form: Literal["openai", "questions"] = opt("openai", "questions: for eval_math.py --benchmark")
    batch_in: str = opt("", "answers to batch files, separated by commas")
    # how it answers
    temperature: float = opt(0.7, "of the sampling; 0: the likeliest tokens", low=0)
    max_tokens: int = opt(2048, "longest answer, in the model's tokens", low=1)
    extra: str = opt("", 'JSON merged into each request, as {"top_p": 0.9}; null removes a field')
    longest: int = opt(0, "longest answer used, in the corpus's tokens; 0: 1000 + 5 x the passage's", low=0)
    partial: bool = opt(False, "write the output though some chunks have no answer")
    # how fast, and at what price
    concurrency: int = opt(8, "requests in flight", low=1)
    retries: int = opt(6, "further attempts at a request", low=0)
    backoff: float = opt(1.0, "seconds before the second attempt; doubled for each further one", low=0)
    timeout: float = opt(180.0, "seconds that a request may take", low=0.01)
    rpm: float = opt(0.0, "requests a minute, at most; 0: no limit", low=0)
    tpm: float = opt(0.0, "tokens a minute, in and out, at most; 0: no limit", low=0)
    budget_tokens: int = opt(0, "tokens, in and out, after which no request is sent; 0: no limit", low=0)
    budget_usd: float = opt(0.0, "money after which no request is sent; 0: no limit", low=0)
    usd_in: float = opt(0.0, "price of a million tokens of prompts", low=0)
    usd_out: float = opt(0.0, "price of a million tokens of answers", low=0)


# What may change between two runs on one out_dir. What decides an answer is part of its key.
FREE = (
    *("base_url", "key_env", "batch_out", "batch_form", "batch_in"),
    *("longest", "partial"),
    *("concurrency", "retries", "backoff", "timeout", "rpm", "tpm"),
    *("budget_tokens", "budget_usd", "usd_in", "usd_out"),
)


def check_settings(s: Settings) -> None:
    ways = ("given", "base_url", "batch_out", "batch_in")
    given = [f"--{name}" for name in ways if getattr(s, name)]
    if not given:
        raise UserError("--base_url, --batch_out, --batch_in or --given is required: who writes thoughts")
    if len(given) > 1:
        raise UserError(f"{', '.join(given)}: give one at a time")
    if s.given and (s.model or s.extra or s.style != "thoughts"):
        raise UserError(f"--given={s.given}: goes with no --model, --extra and --style")
    if not s.given and not s.model:
        raise UserError(f"{given[0]}: needs --model=NAME, the model that answers")
    has_budget = s.budget_usd or s.budget_tokens
    if has_budget and not s.base_url:
        raise UserError("--budget_usd, --budget_tokens: only for --base_url; --batch_out prints a price")
    if s.budget_usd and not (s.usd_in and s.usd_out):
        needed = "--usd_in and --usd_out, in dollars a million tokens"
        raise UserError(f"--budget_usd={s.budget_usd}: needs {needed}")
    if s.timeout > 86400:
        raise UserError(f"--timeout={s.timeout}: expected at most 86400 seconds, a day")
    if s.base_url:
        read_url(s.base_url)
        read_key(s.key_env)


# ------------------------------------------------------------------------------ requests


class Job(NamedTuple):
    """A request. number: of the chunk, or with a style of the document. key: a hash of the request."""

    number: int
    key: str
    request: dict

    @property
    def id(self) -> str:
        return f"{self.number}-{self.key}"

    @property
    def prompt(self) -> str:
        return self.request["messages"][0]["content"]

    def record(self, answer: dict) -> dict:
        """The answer as a line of answers.jsonl."""
        return {"chunk": self.number, "key": self.key} | answer

    def size(self) -> tuple[int, int]:
        """About the most tokens that it takes, in and out: set aside until the true numbers come."""
        limits = [self.request.get(name) for name in ("max_tokens", "max_completion_tokens")]
        longest = max((n for n in limits if type(n) is int and n > 0), default=4096)
        return tokens_about(self.prompt), longest


def fill(template: str, before: str, passage: str) -> str:
    """Fill the template's two places in one pass, so that a text that spells out a place is left alone."""
    texts = {"{before}": before, "{passage}": passage}
    return re.sub(r"\{before\}|\{passage\}", lambda place: texts[place[0]], template)


def text_of(corpus: Corpus, chunks) -> str:
    return "".join(corpus.tokenizer.decode(corpus.chunk(i)) for i in chunks)


class Task:
    """What is asked for: the numbers of the chunks (or documents), and the request of each."""

    def __init__(self, s: Settings, corpus: Corpus):
        self.s = s
        self.corpus = corpus
        self.template = read_prompt(s)
        self.extra = read_extra(s)
        if s.style == "thoughts":
            self.unit = "chunks"
            self.wanted = (np.diff(corpus.chunks) > 0) & ~corpus.questions
        else:
            self.unit = "documents"
            self.wanted = np.ones(corpus.n_docs, dtype=bool)
        self.numbers = np.flatnonzero(self.wanted).tolist()

    def wants(self, n: int) -> bool:
        return n < len(self.wanted) and bool(self.wanted[n])

    def passage(self, n: int) -> str:
        if self.s.style == "thoughts":
            return text_of(self.corpus, [n])
        return text_of(self.corpus, range(self.corpus.docs[n], self.corpus.docs[n + 1]))

    def style(self, passage: str) -> str:
        if self.s.style != "wrap" or self.template:
            return self.s.style
        digest = hashlib.sha256(f"{self.s.seed} {passage}".encode()).digest()
        return list(STYLES)[digest[0] % len(STYLES)]

    def job(self, n: int) -> Job:
        passage = self.passage(n)
        before = ""
        if self.s.style == "thoughts":
            before = text_of(self.corpus, self.corpus.before(n, self.s.before))
        built_in = {"thoughts": PROMPT, "wrap-cot": WRAP_COT} | STYLES
        template = self.template or built_in[self.style(passage)]
        prompt = fill(template, before or NOTHING_BEFORE, passage)
        request = {
            "model": self.s.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.s.temperature,
            "max_tokens": self.s.max_tokens,
        }
        request |= self.extra
        request = {name: value for name, value in request.items() if value is not None}
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
        return Job(n, digest.hexdigest()[:16], request)

    def job_of(self, name: str) -> Job | None:
        """The job of this id; None when it is of no request, or of another command's."""
        found = re.fullmatch(r"([0-9]{1,12})-[0-9a-f]{16}", name)
        if not found or not self.wants(int(found[1])):
            return None
        job = self.job(int(found[1]))
        return job if job.id == name else None

    def jobs(self, answers: Answers):
        """The jobs without an answer, in order."""
        return (job for job in map(self.job, self.numbers) if not answers.has(job))


def read_prompt(s: Settings) -> str:
    if not s.prompt_file:
        return ""
    flag = f"--prompt_file={s.prompt_file}"
    try:
        text = Path(s.prompt_file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{flag}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag}: not UTF-8 text") from None
    if "{passage}" not in text:
        raise UserError(f"{flag}: lacks {{passage}}, the place where the passage goes")
    return text


def read_extra(s: Settings) -> dict:
    try:
        extra = json.loads(s.extra or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict) or {"model", "messages", "n", "stream"} & set(extra):
        raise UserError("--extra: expected a JSON object without model, messages, n and stream")
    return extra


def judge(record: dict, passage: str, tok, s: Settings) -> tuple[str, str]:
    """(its text, "") for an answer that can be used, else ("", why not).

    Special tokens that it spells out are removed, so that they are not learned as text.
    """
    spelled_out = "|".join(map(re.escape, tok.special))
    text = re.sub(spelled_out, " ", record["text"].encode(errors="replace").decode())
    if not s.given:
        text = text.strip()
    if record["finish"] == "refusal" or (REFUSAL.match(text) and not s.given):
        return "", "refused"
    if record["finish"] == "length":
        return "", "cut off"
    if not text.strip():
        return "", "empty"
    longest = s.longest or 1000 + 5 * len(tok.encode_array(passage))
    if len(tok.encode_array(text)) > longest:
        return "", "too long"
    return text, ""


# ---------------------------------------------------------------------- where answers come from


def ask_endpoint(s: Settings, task: Task, answers: Answers) -> tuple[collections.Counter, str]:
    """Ask an endpoint for the missing answers.

    Returns how many jobs have none, by reason, and what ended the run before its end.
    """
    # A long search for them, with requests in flight, would make these run out of time.
    missing = [job.number for job in task.jobs(answers)]
    if not missing:
        return collections.Counter(), ""
    endpoint = Endpoint(s, answers.spent)
    done = len(task.numbers) - len(missing)
    progress = Progress("ask", len(task.numbers), task.unit, done=done)

    def store(job: Job, record: dict) -> None:
        nonlocal done
        answers.add(job.record(record))
        done += "text" in record

    def tick() -> None:
        tokens_in, tokens_out = answers.spent
        figures = {"in": f"{tokens_in:,}", "out": f"{tokens_out:,} tokens"}
        if endpoint.failed:
            figures["failed"] = endpoint.failed.total()
        if usd := price(s, answers.spent):
            figures["cost"] = f"${usd:.4f}"
        progress.update(min(done, progress.total - 1), **figures)

    asyncio.run(endpoint.ask_all(map(task.job, missing), store, tick))
    if progress.live:
        print()
    return endpoint.failed, endpoint.meter.why


def batch_line(s: Settings, job: Job) -> bytes:
    if s.batch_form == "questions":
        # eval_math.py repeats this "answer" beside what the model says.
        line = {"question": job.prompt, "answer": job.id}
    else:
        url = "/v1/chat/completions"
        line = {"custom_id": job.id, "method": "POST", "url": url, "body": job.request}
    return json.dumps(line).encode() + b"\n"


def batch_files(lines):
    """Lists of lines, each of a size that OpenAI takes in one file."""
    held, size = [], 0
    for line in lines:
        if held and (len(held) == BATCH_REQUESTS or size + len(line) > BATCH_BYTES):
            yield held
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield held


def write_batch(s: Settings, task: Task, answers: Answers) -> None:
    """The requests that are still to be answered, in files of the size that OpenAI takes."""
    name = s.batch_out.removesuffix(".jsonl")
    paths = (Path(f"{name}-{number:03d}.jsonl") for number in itertools.count())
    sizes = []

    def lines():
        for job in task.jobs(answers):
            sizes.append(job.size())
            yield batch_line(s, job)

    n_files = 0
    for held in batch_files(lines()):
        with replacing(next(paths)) as temporary:
            temporary.write_bytes(b"".join(held))
        n_files += 1
    # Files of an earlier run: if they were handed in again, their requests would be paid for twice.
    for old in itertools.takewhile(Path.exists, paths):
        old.unlink()
    tokens = np.array(sizes or [(0, 0)]).sum(axis=0)
    cost = f", ${price(s, tokens):.2f}" if price(s, tokens) else ""
    most = f"at most about {tokens[0]:,} tokens in, {tokens[1]:,} out{cost}"
    print(f"{len(sizes)} requests in {n_files} files {name}-000.jsonl ...: {most}")


def read_result(line: dict) -> dict:
    """The answer in a line of OpenAI's batch files, or of responses.jsonl.

    Trouble when the line has none.
    """
    if "gold" in line:
        return read_local_result(line)
    response = line["response"] if isinstance(line.get("response"), dict) else {}
    if response.get("status_code") != 200:
        raise Trouble("an error in the place of an answer")
    return read_answer(response.get("body"))


def read_local_result(line: dict) -> dict:
    """The last response, which is the sampled one where there is one.

    It ends at a blank line, since a base model goes on and on.
    """
    responses = line.get("responses")
    last = responses[-1] if isinstance(responses, list) and responses else None
    if not isinstance(last, dict) or not isinstance(last.get("response"), str):
        raise Trouble("a line without a response")
    text, blank_line, _ = last["response"].strip().partition("\n\n")
    finish = "length" if last.get("cut_off") and not blank_line else "stop"
    return {"text": text, "finish": finish, "in": None, "out": None}


def read_batch(s: Settings, task: Task, answers: Answers) -> collections.Counter:
    """Store the answers of batch files; how many lines brought none, and why."""
    failed = collections.Counter()
    for path in s.batch_in.split(","):
        for _, line in read_lines(path, "--batch_in"):
            name = str(line.get("custom_id", line.get("gold")))
            job = task.job_of(name)
            if job is None:
                failed["answer to another request than this command's"] += 1
                continue
            if answers.has(job):
                continue
            try:
                answer = read_result(line)
            except Trouble as t:
                failed[t.why] += 1
                continue
            likely = {"in": tokens_about(job.prompt), "out": tokens_about(answer["text"])}
            told = {key: value for key, value in answer.items() if value is not None}
            answers.add(job.record(likely | told))
    return failed


def read_lines(path: str, flag: str):
    """(line number, JSON object) of a jsonl file."""
    number = 0
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                value = json.loads(line) if line.strip() else None
                if not isinstance(value, dict | None):
                    raise ValueError("expected a JSON object")
                if value is not None:
                    yield number, value
    except FileNotFoundError:
        raise UserError(f"{flag}={path}: no such file") from None
    except (ValueError, RecursionError) as e:  # also UnicodeDecodeError
        raise UserError(f"{path}:{number}: {e}; mend it") from None


def chunk_number(line: dict, corpus: Corpus) -> int | None:
    """The chunk that a line of --given names; None if it names none."""
    number, doc, index = (line.get(name) for name in ("chunk", "doc", "index"))
    if number is not None:
        return number if type(number) is int and 0 <= number < corpus.n_chunks else None
    if type(doc) is not int or type(index) is not int or not 0 <= doc < corpus.n_docs:
        return None
    first, end = corpus.docs[doc], corpus.docs[doc + 1]
    return int(first) + index if 0 <= index < end - first else None


def read_given(s: Settings, task: Task) -> dict[int, dict]:
    """The thoughts of --given by chunk."""
    given = {}
    for number, line in read_lines(s.given, "--given"):
        where = f"{s.given}:{number}"
        i = chunk_number(line, task.corpus)
        if i is None or not isinstance(line.get("thought"), str):
            last = task.corpus.n_chunks - 1
            form = f'{{"chunk": 0 to {last}, "thought": text}}'
            raise UserError(f'{where}: expected {form}, or "doc" and "index" for the chunk')
        if not task.wants(i):
            why = f"chunk {i} is a question or empty, and takes no thought"
            raise UserError(f"{where}: {why}; leave it out")
        if i in given:
            raise UserError(f"{where}: chunk {i} has a thought already; leave one out")
        given[i] = {"text": line["thought"], "finish": "stop"}
    return given


def obtain(s: Settings, task: Task, answers: Answers) -> None:
    """Get the answers that are missing, or UserError when some still are (unless --partial)."""
    if s.batch_in:
        failed, why = read_batch(s, task, answers), ""
    else:
        failed, why = ask_endpoint(s, task, answers)
    missing = sum(1 for _ in task.jobs(answers))
    if not missing:
        return
    reasons = [why] if why else []
    reasons += [f"{n} x {reason}" for reason, n in failed.most_common()]
    why_not = "; ".join(reasons) or "not in the files"
    said = f"{missing} of {len(task.numbers)} have no answer ({why_not})"
    if s.partial and missing < len(task.numbers):
        print(said)
        return
    advice = "raise the budget to go on" if "budget" in why else "the same command goes on"
    if missing < len(task.numbers):
        advice += ", --partial writes what is there"
    raise UserError(f"{s.out_dir}: not written, {said}; {advice}")


# ------------------------------------------------------------------------------ the output


class Output:
    """Writes the output folder. find(number): the record of a chunk's answer, or None."""

    def __init__(self, s: Settings, task: Task, find):
        self.s = s
        self.task = task
        self.find = find
        self.counts = collections.Counter()

    def texts(self):
        """(number, text) of each chunk that takes a thought; "" for an answer that cannot be used."""
        for n in self.task.numbers:
            text, bad = "", "unanswered"
            if record := self.find(n):
                passage = self.task.passage(n)
                text, bad = judge(record, passage, self.task.corpus.tokenizer, self.s)
            self.counts[bad or "used"] += 1
            yield n, text

    def spans(self):
        """The thought of each chunk of the corpus as ids."""
        texts = self.texts()
        for i in range(self.task.corpus.n_chunks):
            text = next(texts)[1] if self.task.wants(i) else ""
            yield self.task.corpus.tokenizer.encode_array(text) if text else []

    def write(self, settings: Path, meta: dict) -> dict:
        """Write the folder, with a copy of settings.json; the contents of its meta.json."""
        meta = meta | {"counts": self.counts}  # filled while the texts are written
        out = Path(self.s.out_dir)
        if self.s.style == "thoughts":
            write_thoughts(out, self.task.corpus, self.spans(), meta, files=[settings])
        else:
            self.write_texts(settings, meta)
        return read_json(out / "meta.json")

    def write_texts(self, settings: Path, meta: dict) -> None:
        with new_folder(self.s.out_dir) as folder:
            with open(folder / "texts.jsonl", "w", encoding="utf-8") as f:
                for n, text in self.texts():
                    style = self.task.style(self.task.passage(n))
                    line = {"text": text, "doc": n, "style": style}
                    if text:
                        f.write(json.dumps(line, ensure_ascii=False) + "\n")
            shutil.copy(settings, folder)
            corpus = {"kind": "texts", "corpus": self.task.corpus.meta["sha256"]}
            write_json(folder / "meta.json", corpus | meta)


def report(out: Path, meta: dict) -> str:
    counts = dict(meta["counts"])
    total = sum(counts.values())
    used = counts.pop("used", 0)
    what = "chunks have thoughts" if meta["style"] == "thoughts" else "documents rewritten"
    left = ", ".join(f"{n} {why}" for why, n in sorted(counts.items())) or "none"
    line = f"{out}: {used} of {total} {what} | left out: {left}"
    if meta["tokens_in"]:
        line += f" | {meta['tokens_in']:,} tokens in, {meta['tokens_out']:,} out"
        line += f", ${meta['usd']:.4f}" if meta["usd"] else ""
    return line


def is_complete(s: Settings, meta: dict, made: dict) -> bool:
    """Whether the output folder holds all that can be had; UserError if it was made in another way."""
    if "counts" not in meta or (not s.given and "unanswered" in meta["counts"]):
        return False
    if any(meta.get(name, value) != value for name, value in made.items()):
        advice = "remove it, and the same command makes it anew"
        raise UserError(f"{s.out_dir}: made with another --longest, prompt or file of thoughts; {advice}")
    return True


def fill_folder(s: Settings, task: Task, given: dict | None, work: Path, made: dict) -> None:
    """Get the answers and write the output folder. work: the folder of answers, which is ours alone."""
    answers = Answers(work / "answers.jsonl")
    if not sum(answers.spent):  # nothing was asked yet: a mistyped setting need not stay
        (work / "settings.json").unlink(missing_ok=True)
    claim(work, s, FREE)
    if s.batch_out:
        write_batch(s, task, answers)
        return
    if given is None:
        obtain(s, task, answers)
    meta = {
        "maker": "data/teacher.py",
        "model": s.given or s.model,
        "style": s.style,
        "before": s.before,
        "temperature": task.extra.get("temperature", s.temperature),
        "tokens_in": answers.spent[0],
        "tokens_out": answers.spent[1],
        "usd": price(s, answers.spent),
    }
    find = (lambda n: answers.get(task.job(n))) if given is None else given.get
    meta = Output(s, task, find).write(work / "settings.json", meta | made)
    if given is not None:
        shutil.rmtree(work)
    print(report(Path(s.out_dir), meta))


def main(s: Settings) -> None:
    check_settings(s)
    out = Path(s.out_dir)
    work = Path(s.out_dir.rstrip("/") + ".answers")
    if out.exists() and not (out / "settings.json").exists():
        raise UserError(f"{out}: exists, and was not made by this script; give another --out_dir")
    task = Task(s, open_corpus(s.corpus))
    if not task.numbers:
        raise UserError(f"{s.corpus}: holds no chunk that takes a thought: all are questions or empty")
    given = read_given(s, task) if s.given else None
    # What settings.json does not tell of how the folder is made.
    words = json.dumps(given or task.template or [PROMPT, NOTHING_BEFORE, STYLES, WRAP_COT])
    made = {"longest": s.longest, "words": hashlib.sha256(words.encode()).hexdigest()[:16]}
    if out.exists():
        claim(out, s, FREE)
        meta = read_json(out / "meta.json")
        if is_complete(s, meta, made):
            print(f"complete: {report(out, meta)}")
            return
    work.mkdir(parents=True, exist_ok=True)
    with hold(work / "lock", wait=False) as held:
        if not held:
            raise UserError(f"{work}: another run is at work here; wait for it")
        fill_folder(s, task, given, work, made)


if __name__ == "__main__":
    run(main, Settings)
