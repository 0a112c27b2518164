"""Thoughts for a corpus from a teacher: a model that is told what to write, or a file.

    export OPENAI_API_KEY=...  # sent to the endpoint, written nowhere
    python data/teacher.py --corpus=C/warm --out_dir=T --base_url=https://HOST/v1 \\
        --model=gpt-4o-mini --usd_in=0.15 --usd_out=0.6 --budget_usd=20 --rpm=500
    python data/show.py C/warm T

Where the thoughts can come from:

    --base_url=URL           any server of OpenAI's chat completions; one of your own
                             (vLLM, llama.cpp): --base_url=http://localhost:8000/v1
    --batch_out=NAME         batch files to hand in; later --batch_in=FILE,FILE
    --given=FILE             lines of {"chunk": 7, "thought": "..."}

A model folder answers questions in files, between "Problem:" and "Solution:": show a base
model how in --prompt_file. Its last response counts, to a blank line at most.

    python data/teacher.py --corpus=C --out_dir=T --model=M --batch_out=q \\
        --batch_form=questions
    python eval_math.py --benchmark=q-000.jsonl --model=M --mode=raw --k=1 --out_dir=A
    python data/teacher.py --corpus=C --out_dir=T --model=M --batch_in=A/responses.jsonl

Writes a thoughts folder (data/lib/corpus.py). For the paper's baselines, --style=wrap
and wrap-cot have whole documents rewritten, into a folder with texts.jsonl ({"text",
"doc", "style"}): wrap in one of four styles, by a hash of the document; wrap-cot in
other words, with reasoning added.

Every answer is appended to OUT_DIR.answers/answers.jsonl as it comes and never asked
for again: the same command goes on where a run was killed, stopped or out of budget.
The output folder appears when every chunk has an answer, or with --partial.
An answer that is empty, a refusal, cut off at --max_tokens or far too long is counted
and left out: the chunk has no thought. The budget counts all runs on one --out_dir, and
a request that broke off at its most. It is passed by one request at most.
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

from data.lib.cli import Progress, UserError, claim, hold, new_folder, opt, read_json, run, write_json
from data.lib.corpus import Corpus, open_corpus, write_thoughts
from data.lib.endpoint import Answers, Endpoint, Trouble, most_tokens, price, read_answer, read_host, read_key
from data.lib.sources import read_jsonl

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

BATCH_REQUESTS = 10_000  # in a file, far below the 50,000 and the 200 MB that OpenAI takes

REFUSAL = re.compile(
    r"""\W*(?:
        (?:i['\u2019]?m|i[ ]am)[ ]sorry | sorry,[ ] | as[ ]an[ ]ai\b
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
    prompt_file: str = opt("", "a text with {passage} and perhaps {before}: your prompt")
    before: int = opt(1, "chunks before the chunk that are shown", low=0)
    seed: int = opt(0, "decides which of the four styles a document gets", low=0)
    # who answers
    model: str = opt("", "the endpoint's name of the model")
    base_url: str = opt("", "the endpoint: https://HOST/v1, http://localhost:8000/v1")
    key_env: str = opt("OPENAI_API_KEY", "environment variable with the key; unset: none")
    given: str = opt("", "a jsonl of thoughts instead of a model")
    batch_out: str = opt("", "write the requests still to be answered into NAME-000.jsonl ... and end")
    batch_form: Literal["openai", "questions"] = opt("openai", "questions: for eval_math.py --benchmark")
    batch_in: str = opt("", "answers to batch files, separated by commas")
    # how it answers
    temperature: float = opt(0.7, "of the sampling; 0: the likeliest tokens", low=0)
    max_tokens: int = opt(2048, "longest answer in tokens", low=1)
    partial: bool = opt(False, "write the output though some chunks have no answer")
    # how fast, and at what price
    concurrency: int = opt(8, "requests in flight", low=1)
    retries: int = opt(6, "further attempts at a request", low=0)
    backoff: float = opt(1.0, "seconds before the second attempt; doubled for each further one", low=0)
    timeout: float = opt(180.0, "seconds that a request may take", low=0.01)
    rpm: float = opt(0.0, "requests a minute, at most; 0: no limit", low=0)
    budget_tokens: int = opt(0, "tokens, in and out, after which no request is sent; 0: no limit", low=0)
    budget_usd: float = opt(0.0, "money after which no request is sent; 0: no limit", low=0)
    usd_in: float = opt(0.0, "price of a million tokens of prompts", low=0)
    usd_out: float = opt(0.0, "price of a million tokens of answers", low=0)


# What may change between two runs on one out_dir.
FREE = (
    *("base_url", "key_env", "batch_out", "batch_form", "batch_in", "partial"),
    *("concurrency", "retries", "backoff", "timeout", "rpm"),
    *("budget_tokens", "budget_usd", "usd_in", "usd_out"),
)


def check_settings(s: Settings) -> None:
    ways = ("given", "base_url", "batch_out", "batch_in")
    given = [f"--{name}" for name in ways if getattr(s, name)]
    if len(given) != 1:
        raise UserError(f"{', '.join(given) or 'nobody writes'}: give one of --base_url, --batch_out, "
                        "--batch_in and --given")
    if s.given and (s.model or s.style != "thoughts"):
        raise UserError(f"--given={s.given}: goes with no --model and --style")
    if not s.given and not s.model:
        raise UserError(f"{given[0]}: needs --model=NAME, the model that answers")
    if (s.budget_usd or s.budget_tokens) and not s.base_url:
        raise UserError("--budget_usd, --budget_tokens: only for --base_url; --batch_out prints a price")
    if s.budget_usd and not (s.usd_in and s.usd_out):
        needed = "--usd_in and --usd_out, in dollars a million tokens"
        raise UserError(f"--budget_usd={s.budget_usd}: needs {needed}")
    if s.base_url:
        read_host(s.base_url)
        read_key(s.key_env)


# -------------------- requests


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
        return most_tokens(self.prompt), self.request["max_tokens"]


def fill(template: str, before: str, passage: str) -> str:
    """Fill the template's two places in one pass, so that a text that spells out a place is left alone."""
    texts = {"{before}": before, "{passage}": passage}
    return re.sub(r"\{before\}|\{passage\}", lambda place: texts[place[0]], template)


class Task:
    """What is asked for: the numbers of the chunks (or documents), and the request of each."""

    def __init__(self, s: Settings, corpus: Corpus):
        self.s = s
        self.corpus = corpus
        self.template = read_prompt(s)
        if s.style == "thoughts":
            self.unit = "chunks"
            wanted = (np.diff(corpus.chunks) > 0) & ~corpus.questions
            self.numbers = np.flatnonzero(wanted).tolist()
        else:
            self.unit = "documents"
            self.numbers = list(range(corpus.n_docs))

    def text(self, chunks) -> str:
        return "".join(self.corpus.text(i) for i in chunks)

    def passage(self, n: int) -> str:
        if self.s.style == "thoughts":
            return self.text([n])
        return self.text(range(self.corpus.docs[n], self.corpus.docs[n + 1]))

    def style(self, passage: str) -> str:
        if self.s.style != "wrap" or self.template:
            return self.s.style
        digest = hashlib.sha256(f"{self.s.seed} {passage}".encode()).digest()
        return list(STYLES)[digest[0] % len(STYLES)]

    def job(self, n: int) -> Job:
        passage = self.passage(n)
        before = ""
        if self.s.style == "thoughts":
            before = self.text(self.corpus.before(n, self.s.before))
        built_in = {"thoughts": PROMPT, "wrap-cot": WRAP_COT} | STYLES
        template = self.template or built_in[self.style(passage)]
        prompt = fill(template, before or NOTHING_BEFORE, passage)
        # Arguments of the openai package's chat.completions.create(); add others here.
        request = {
            "model": self.s.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.s.temperature,
            "max_tokens": self.s.max_tokens,
        }
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
        return Job(n, digest.hexdigest()[:16], request)

    def missing(self, answers: Answers) -> list[int]:
        """The numbers without an answer."""
        return [n for n in self.numbers if not answers.has(self.job(n))]


def read_prompt(s: Settings) -> str:
    if not s.prompt_file:
        return ""
    try:
        text = Path(s.prompt_file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{s.prompt_file}: not UTF-8 text") from None
    if "{passage}" not in text:
        raise UserError(f"{s.prompt_file}: lacks {{passage}}, the place where the passage goes")
    return text


def judge(record: dict, passage: str, tok, given: bool) -> tuple[str, str]:
    """(its text, "") for an answer that can be used, else ("", why not).

    Special tokens that it spells out are removed, so that they are not learned as text.
    """
    spelled_out = "|".join(map(re.escape, tok.special))
    text = re.sub(spelled_out, " ", record["text"].encode(errors="replace").decode())
    text = text if given else text.strip()
    if record["finish"] == "refusal" or (REFUSAL.match(text) and not given):
        return "", "refused"
    if record["finish"] == "length":
        return "", "cut off"
    if not text.strip():
        return "", "empty"
    if len(tok.encode_thought(text)) > 1000 + 5 * len(tok.encode_array(passage)):
        return "", "too long"
    return text, ""


# -------------------- where answers come from


def ask_endpoint(s: Settings, task: Task, answers: Answers) -> tuple[collections.Counter, str]:
    """Ask an endpoint for the missing answers.

    Returns how many jobs have none, by reason, and what ended the run before its end.
    """
    # A long search for them, with requests in flight, would make these run out of time.
    missing = task.missing(answers)
    if not missing:
        return collections.Counter(), ""
    endpoint = Endpoint(s, answers)
    done = len(task.numbers) - len(missing)
    progress = Progress("ask", len(task.numbers), task.unit, done=done)

    def tick() -> None:
        tokens_in, tokens_out = answers.spent
        figures = {"in": f"{tokens_in:,}", "out": f"{tokens_out:,} tokens"}
        if endpoint.failed:
            figures["failed"] = endpoint.failed.total()
        if usd := price(s, answers.spent):
            figures["cost"] = f"${usd:.4f}"
        progress.update(min(done + endpoint.n_answered, progress.total - 1), **figures)

    asyncio.run(endpoint.ask_all(map(task.job, missing), tick))
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


def write_batch(s: Settings, task: Task, answers: Answers) -> None:
    """The requests that are still to be answered, in files of BATCH_REQUESTS."""
    name = s.batch_out.removesuffix(".jsonl")
    paths = (Path(f"{name}-{number:03d}.jsonl") for number in itertools.count())
    missing = task.missing(answers)
    tokens = np.zeros(2, dtype=int)
    for first in range(0, len(missing), BATCH_REQUESTS):
        with open(next(paths), "wb") as f:
            for job in map(task.job, missing[first : first + BATCH_REQUESTS]):
                f.write(batch_line(s, job))
                tokens += job.size()
    # Files of an earlier run: if they were handed in again, their requests would be paid for twice.
    for old in itertools.takewhile(Path.exists, paths):
        old.unlink()
    cost = f", ${price(s, tokens):.2f}" if price(s, tokens) else ""
    most = f"at most about {tokens[0]:,} tokens in, {tokens[1]:,} out{cost}"
    n_files = -(-len(missing) // BATCH_REQUESTS)
    print(f"{len(missing)} requests in {n_files} files {name}-000.jsonl ...: {most}")


def read_result(line: dict) -> dict:
    """The answer in a line of OpenAI's batch files, or of eval_math.py's responses.jsonl.

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
    try:
        last = line["responses"][-1]
        text, blank_line, _ = last["response"].strip().partition("\n\n")
    except (AttributeError, IndexError, KeyError, TypeError):
        raise Trouble("a line without a response") from None
    finish = "length" if last.get("cut_off") and not blank_line else "stop"
    return {"text": text, "finish": finish, "in": None, "out": None}


def read_object(line: str) -> dict | None:
    """A line of a jsonl file, None for a blank one; ValueError when it is no JSON object."""
    value = json.loads(line) if line.strip() else None
    if not isinstance(value, dict | None):
        raise ValueError("expected a JSON object")
    return value


def read_batch(s: Settings, task: Task, answers: Answers) -> collections.Counter:
    """Keep the answers of batch files; how many lines brought none, and why."""
    failed = collections.Counter()
    numbers = {task.job(n).id: n for n in task.numbers}
    for path in s.batch_in.split(","):
        for line in filter(None, read_jsonl(path, read_object, None)):
            name = str(line.get("custom_id", line.get("gold")))
            if name not in numbers:
                failed["answer to another request than this command's"] += 1
                continue
            job = task.job(numbers[name])
            if answers.has(job):
                continue
            try:
                answer = read_result(line)
            except Trouble as t:
                failed[t.why] += 1
                continue
            likely = {"in": most_tokens(job.prompt), "out": most_tokens(answer["text"])}
            told = {key: value for key, value in answer.items() if value is not None}
            answers.add(job.record(likely | told))
    return failed


def read_given(s: Settings, task: Task) -> dict[int, dict]:
    """The thoughts of --given by chunk."""
    given, wanted = {}, set(task.numbers)

    def read(text: str) -> None:
        line = read_object(text)
        if line is None:
            return
        i, thought = line.get("chunk"), line.get("thought")
        if type(i) is not int or not isinstance(thought, str):
            raise ValueError('expected {"chunk": number, "thought": text}')
        if i not in wanted:
            raise ValueError(f"chunk {i} takes no thought: a question, empty, or not in the corpus")
        if i in given:
            raise ValueError(f"chunk {i} has a thought already")
        given[i] = {"text": thought, "finish": "stop"}

    read_jsonl(s.given, read, None)
    return given


def obtain(s: Settings, task: Task, answers: Answers) -> None:
    """Get the answers that are missing, or UserError when some still are (unless --partial)."""
    if s.batch_in:
        failed, why = read_batch(s, task, answers), ""
    else:
        failed, why = ask_endpoint(s, task, answers)
    missing, total = len(task.missing(answers)), len(task.numbers)
    if not missing:
        return
    reasons = [why] if why else []
    reasons += [f"{n} x {reason}" for reason, n in failed.most_common()]
    why_not = "; ".join(reasons) or "not in the files"
    said = f"{missing} of {total} have no answer ({why_not})"
    if s.partial and missing < total:
        print(said)
        return
    advice = "raise the budget to go on" if "budget" in why else "the same command goes on"
    if missing < total:
        advice += ", --partial writes what is there"
    raise UserError(f"{s.out_dir}: not written, {said}; {advice}")


# -------------------- the output


def usable(s: Settings, task: Task, find, counts: collections.Counter):
    """(number, text) of each answer that can be used; counts: how many, and why others cannot.

    find(number): the record of the answer, or None.
    """
    for n in task.numbers:
        text, bad = "", "unanswered"
        if record := find(n):
            text, bad = judge(record, task.passage(n), task.corpus.tokenizer, bool(s.given))
        counts[bad or "used"] += 1
        if text:
            yield n, text


def spans(texts, corpus: Corpus):
    """The thought of each chunk of the corpus as ids."""
    done = 0
    for n, text in texts:
        yield from [[]] * (n - done)
        yield corpus.tokenizer.encode_thought(text)
        done = n + 1
    yield from [[]] * (corpus.n_chunks - done)


def write_texts(out_dir: str, task: Task, texts, settings: Path, meta: dict) -> None:
    with new_folder(out_dir) as folder:
        with open(folder / "texts.jsonl", "w", encoding="utf-8") as f:
            for n, text in texts:
                line = {"text": text, "doc": n, "style": task.style(task.passage(n))}
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
        shutil.copy(settings, folder)
        corpus = {"kind": "texts", "corpus": task.corpus.meta["sha256"]}
        write_json(folder / "meta.json", corpus | meta)


def report(out: Path) -> str:
    meta = read_json(out / "meta.json")
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


def fill_folder(s: Settings, task: Task, given: dict | None, work: Path, words: str) -> None:
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
    counts = collections.Counter()  # filled while the texts are written
    meta = {
        "maker": "data/teacher.py",
        "model": s.given or s.model,
        "style": s.style,
        "before": s.before,
        "temperature": s.temperature,
        "tokens_in": int(answers.spent[0]),
        "tokens_out": int(answers.spent[1]),
        "usd": price(s, answers.spent),
        "words": words,
        "counts": counts,
    }
    find = (lambda n: answers.get(task.job(n))) if given is None else given.get
    texts = usable(s, task, find, counts)
    settings = work / "settings.json"
    if s.style == "thoughts":
        write_thoughts(s.out_dir, task.corpus, spans(texts, task.corpus), meta, files=[settings])
    else:
        write_texts(s.out_dir, task, texts, settings, meta)
    if given is not None:
        shutil.rmtree(work)
    print(report(Path(s.out_dir)))


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
    words = hashlib.sha256(words.encode()).hexdigest()[:16]
    if out.exists():
        claim(out, s, FREE)
        meta = read_json(out / "meta.json")
        if given or "unanswered" not in meta["counts"]:
            if meta["words"] != words:
                raise UserError(f"{out}: made with another prompt or file of thoughts; remove it")
            print(f"complete: {report(out)}")
            return
    work.mkdir(parents=True, exist_ok=True)
    with hold(work / "lock", wait=False) as held:
        if not held:
            raise UserError(f"{work}: another run is at work here; wait for it")
        fill_folder(s, task, given, work, words)


if __name__ == "__main__":
    run(main, Settings)
