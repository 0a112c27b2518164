"""Thoughts for a corpus from a teacher: a language model that is told what to write, or a file. Or whole documents rewritten, for the paper's baselines.

    an endpoint       --base_url=https://HOST/v1 --model=gpt-4o-mini              any server of OpenAI's chat completions (vLLM, llama.cpp ...)
    its batch files   --model=NAME --batch_out=FILE, later --batch_in=FILE        requests to hand in, and the answers that came back
    a model folder    --model=FOLDER                                              our own engine; the prompt is text that it continues
    given thoughts    --given=FILE    jsonl of {"chunk": 7, "thought": "..."} or {"doc": 2, "index": 1, "thought": "..."} (index: chunk in the document)

    export OPENAI_API_KEY=...         # sent to the endpoint, written nowhere; --key_env names another variable
    python data/teacher.py --corpus=C/warm --out_dir=T --base_url=https://HOST/v1 --model=gpt-4o-mini \\
        --usd_in=0.15 --usd_out=0.6 --budget_usd=20 --rpm=500 --tpm=200000
    python data/show.py C/warm T

Writes a thoughts folder (data/lib/corpus.py); with --style=wrap or wrap-cot, a folder with texts.jsonl ({"text", "doc", "style"}). Every answer is appended
to OUT_DIR.answers/answers.jsonl as it comes, under its chunk's number and a hash of the request, and never asked for again: the same command goes on
where a run was killed, stopped or out of budget. The output folder appears when every chunk has an answer; --partial writes it with what is there.

An answer that is empty, a refusal, cut off at --max_tokens or longer than --longest is counted and left out: the chunk has no thought. A request without
an answer (server errors, dropped connections, unreadable answers) is tried again, --retries times. The budget counts all runs on one --out_dir; near its end
requests go one at a time, so that one request at most passes it. One that broke off and may have been paid for is counted at the most it can cost.
"""

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

from data.lib.cli import Progress, UserError, claim, hold, new_folder, opt, read_json, replacing, run, write_json
from data.lib.corpus import Corpus, open_corpus, write_thoughts
from data.lib.endpoint import Answers, Endpoint, Trouble, price, read_answer, read_key, read_url, tokens_about

PROMPT = """Below is a passage of a document, and the text that comes before it. Write out the thinking from which the passage follows: the knowledge that it \
takes for granted, and the reasoning that leads, step by step, to each thing it says. Carry out every calculation and derivation that it leaves out.

Be concise: plain statements, each one adding something. Say what the passage leaves unsaid; do not repeat or sum up the passage or the text before it. \
Do not mention the passage, its author, this task or yourself. No headings and no markup. Write nothing but the thinking.

Text before:
{before}

Passage:
{passage}

Thinking:
"""

NOTHING_BEFORE = "(none: the passage opens the document)"

ONLY_TEXT = "Give only the new text, with no remark about it.\n\nText:\n{passage}\n\nNew text:\n"
STYLES = {  # WRAP's four (Maini et al. 2024), in our words
    "easy": "Rewrite the text below for a small child: very short sentences and the simplest everyday words. " + ONLY_TEXT,
    "scholarly": "Rewrite the text below for scholars: dense, exact sentences and the learned vocabulary of an expert. " + ONLY_TEXT,
    "encyclopedia": "Rewrite the text below as a good encyclopedia would put it: clear, neutral, well-formed prose. " + ONLY_TEXT,
    "questions": 'Turn the text below into a conversation of questions and answers, each on a line that begins with "Question:" or "Answer:". ' + ONLY_TEXT,
}
WRAP_COT = ("Rewrite the text below in other words. Keep all the information that it holds, and add the reasoning behind it in detail: work out each step, "
            "calculation and argument that it leaves out. " + ONLY_TEXT)  # fmt: skip

BATCH_REQUESTS, BATCH_BYTES = 50_000, 190_000_000  # what OpenAI takes in one file
REFUSAL = re.compile(r"\W*(?:i['\u2019]?m sorry|i am sorry|sorry, |as an ai\b|(?:unfortunately, )?i (?:can['\u2019]?t|cannot|can not|won['\u2019]?t|am unable to|'m unable to)"
                     r" (?:help|assist|comply|provide|fulfil|continue|answer|do that|write))", re.IGNORECASE)  # fmt: skip


@dataclass(kw_only=True)
class Settings:
    corpus: str = opt(help="corpus folder")
    out_dir: str = opt(help="thoughts folder to write (with a --style: a folder with texts.jsonl)")
    model: str = opt("", "the endpoint's name of the model; without --base_url and batch files: a model folder")
    base_url: str = opt("", "the endpoint, up to and with its version: https://HOST/v1, http://localhost:8000/v1")
    key_env: str = opt("OPENAI_API_KEY", "environment variable that holds the endpoint's key; unset: none is sent")
    given: str = opt("", "a jsonl of thoughts instead of a model")
    batch_out: str = opt("", "write the requests still to be answered as batch files NAME-000.jsonl ... and end")
    batch_in: str = opt("", "answers to batch files, separated by commas")
    style: Literal["thoughts", "wrap", "wrap-cot"] = opt("thoughts", "thoughts of chunks; or documents rewritten in one of four styles (by a hash of the document), "
        "or paraphrased with reasoning added")  # fmt: skip
    prompt_file: str = opt("", "a text with {passage} and, if wanted, {before}, instead of the built-in prompt")
    before: int = opt(1, "chunks before the chunk that are shown", low=0)
    temperature: float = opt(0.7, "of the sampling; 0: the likeliest tokens", low=0)
    max_tokens: int = opt(2048, "longest answer, in the model's tokens", low=1)
    extra: str = opt("", 'JSON object merged into each request; null removes a field: {"max_tokens": null, "max_completion_tokens": 4000}')
    longest: int = opt(0, "longer answers are left out, in the corpus's tokens; 0: 1000 more than five times the passage", low=0)
    partial: bool = opt(False, "write the output though some chunks have no answer")
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
    seed: int = opt(0, "sampling noise of a model folder; which of the four styles a document gets", low=0)
    device: str = opt("", "of a model folder: cpu, cuda; none: the best there is")


# What may change between two runs on one out_dir: what decides an answer is part of its key.
FREE = ("base_url", "key_env", "batch_out", "batch_in", "longest", "partial", "concurrency", "retries", "backoff", "timeout", "rpm", "tpm",
        "budget_tokens", "budget_usd", "usd_in", "usd_out", "device")  # fmt: skip

# ------------------------------------------------------------------------------------------------ requests


class Job(NamedTuple):
    number: int  # of the chunk, or with a style of the document
    key: str  # hash of the request
    request: dict

    @property
    def name(self) -> dict:
        return {"chunk": self.number, "key": self.key}

    @property
    def prompt(self) -> str:
        return self.request["messages"][0]["content"]

    def size(self) -> tuple[int, int]:
        """At most about this many tokens, in and out: what is set aside until the true numbers come."""
        limits = [self.request.get(name) for name in ("max_tokens", "max_completion_tokens")]
        return tokens_about(self.prompt), max((n for n in limits if type(n) is int and n > 0), default=4096)


def fill(template: str, before: str, passage: str) -> str:
    """The template with its two places filled in one pass, so that a text that spells out a place is left as it is."""
    return re.sub(r"\{before\}|\{passage\}", lambda m: before if m[0] == "{before}" else passage, template)


def text_of(corpus: Corpus, chunks) -> str:
    return "".join(corpus.tokenizer.decode(corpus.chunk(i)) for i in chunks)


class Task:
    """What is asked for: the numbers of the chunks (or documents), and the request of each."""

    def __init__(self, s: Settings, corpus: Corpus):
        self.s, self.corpus, self.template, self.fixed = s, corpus, read_prompt(s), read_extra(s)
        has_text = np.diff(corpus.chunks) > 0
        self.numbers = np.flatnonzero(has_text & ~corpus.questions) if s.style == "thoughts" else np.arange(corpus.n_docs)
        self.unit, self.size = ("chunks", corpus.n_chunks) if s.style == "thoughts" else ("documents", corpus.n_docs)
        self.wanted = np.isin(np.arange(self.size), self.numbers)

    def wants(self, n: int) -> bool:
        return n < self.size and bool(self.wanted[n])

    def passage(self, n: int) -> str:
        return text_of(self.corpus, [n] if self.s.style == "thoughts" else range(self.corpus.docs[n], self.corpus.docs[n + 1]))

    def style(self, passage: str) -> str:
        if self.s.style != "wrap" or self.template:
            return self.s.style
        return list(STYLES)[hashlib.sha256(f"{self.s.seed} {passage}".encode()).digest()[0] % len(STYLES)]

    def job(self, n: int) -> Job:
        n = int(n)
        passage = self.passage(n)
        before = text_of(self.corpus, self.corpus.before(n, self.s.before)) if self.s.style == "thoughts" else ""
        template = self.template or {"thoughts": PROMPT, "wrap-cot": WRAP_COT, **STYLES}[self.style(passage)]
        content = fill(template, before or NOTHING_BEFORE, passage)
        request = {"model": self.s.model, "messages": [{"role": "user", "content": content}], "temperature": self.s.temperature, "max_tokens": self.s.max_tokens}
        request = {k: v for k, v in (request | self.fixed).items() if v is not None}
        return Job(n, hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16], request)

    def jobs(self, answers: Answers):
        """The jobs without an answer, in order."""
        return (job for job in map(self.job, self.numbers) if not answers.has(job))


def read_prompt(s: Settings) -> str:
    if not s.prompt_file:
        return ""
    try:
        text = Path(s.prompt_file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--prompt_file={s.prompt_file}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file={s.prompt_file}: not UTF-8 text") from None
    if "{passage}" not in text:
        raise UserError(f"--prompt_file={s.prompt_file}: lacks {{passage}}, the place where the passage goes")
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
    """(its text, "") for an answer that can be used, else ("", why not). Special tokens that it spells out are removed: it shall not teach them as text."""
    text = re.sub("|".join(map(re.escape, tok.special)), " ", record["text"].encode(errors="replace").decode())
    text = text if s.given else text.strip()
    if record["finish"] == "refusal" or (REFUSAL.match(text) and not s.given):
        return "", "refused"
    if record["finish"] == "length":
        return "", "cut off"
    if not text.strip():
        return "", "empty"
    longest = s.longest or 1000 + 5 * len(tok.encode_array(passage))
    return ("", "too long") if len(tok.encode_array(text)) > longest else (text, "")


# ---------------------------------------------------------------------------------------- where they come from


def ask_endpoint(s: Settings, task: Task, answers: Answers) -> tuple[collections.Counter, str]:
    """Ask an endpoint for all answers that are missing; (why chunks have none, why the run ended before its end)."""
    endpoint, progress = Endpoint(s, answers.spent), Progress("ask", len(task.numbers), task.unit, done=answers.n)

    def tick(failed: int) -> None:
        spent, usd = endpoint.meter.spent, price(s, endpoint.meter.spent)
        figures = {"in": f"{spent[0]:,}", "out": f"{spent[1]:,} tokens"} | ({"failed": failed} if failed else {}) | ({"cost": f"${usd:.4f}"} if usd else {})
        progress.update(min(answers.n, progress.total - 1), **figures)

    failed = endpoint.ask_all(task.jobs(answers), lambda job, record: answers.add(job.name | record), tick)
    if progress.live:
        print()
    return failed, endpoint.meter.why


def ask_model(s: Settings, task: Task, answers: Answers) -> tuple[collections.Counter, str]:
    """Let a model folder continue the prompts: to its end token, or to a blank line, for a base model goes on and on."""
    from data.lib.engine import Engine
    from data.lib.ranks import pick_device
    from infer_thoughts import fingerprint  # here, for all else needs no torch
    from train import load_model

    device = pick_device(s.device)
    device = "cpu" if device == "mps" else device
    model, tok = load_model(s.model, device, "bfloat16" if device.startswith("cuda") else "float32")
    task.fixed = {"weights": fingerprint(s.model)}  # part of the keys: the folder may hold another model tomorrow
    engine, failed, room = Engine(model), collections.Counter(), model.config.seq_len - s.max_tokens
    progress, jobs = Progress("ask", len(task.numbers), task.unit, done=answers.n), task.jobs(answers)
    while batch := list(itertools.islice(jobs, 256)):
        prompts = [[tok.bos, *tok.encode(job.prompt.rstrip())] for job in batch]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        failed[f"prompt too long for the model beside --max_tokens={s.max_tokens}"] += len(batch) - len(fits)
        drawn = engine.generate([prompts[i] for i in fits], [batch[i].number for i in fits], 1, s.max_tokens, {tok.eos, tok.sol, tok.eol}, s.seed,
                                temperature=s.temperature)  # fmt: skip
        for i, [(ids, ended, _)] in zip(fits, drawn):
            text, blank, _ = tok.decode(ids[:-1] if ended else ids).strip().partition("\n\n")
            record = {"text": text, "finish": "stop" if ended or blank else "length", "in": len(prompts[i]), "out": len(ids)}
            answers.add(batch[i].name | record)
        progress.update(answers.n)
    return +failed, ""


def write_batch(s: Settings, task: Task, answers: Answers) -> None:
    """The requests that are still to be answered, in files of the size that OpenAI takes."""
    name, number, lines, size, total = s.batch_out.removesuffix(".jsonl"), 0, [], 0, [0, 0, 0]

    def path(number: int) -> Path:
        return Path(f"{name}-{number:03d}.jsonl")

    def flush() -> None:
        nonlocal number, lines, size
        with replacing(path(number)) as temporary:
            temporary.write_bytes(b"".join(lines))
        number, lines, size = number + 1, [], 0

    for job in task.jobs(answers):
        request = {"custom_id": f"{job.number}-{job.key}", "method": "POST", "url": "/v1/chat/completions", "body": job.request}
        line = json.dumps(request).encode() + b"\n"
        if lines and (len(lines) == BATCH_REQUESTS or size + len(line) > BATCH_BYTES):
            flush()
        lines.append(line)
        size += len(line)
        total = [total[0] + 1, total[1] + job.size()[0], total[2] + job.size()[1]]
    if lines:
        flush()
    for old in itertools.takewhile(Path.exists, map(path, itertools.count(number))):
        old.unlink()  # left by an earlier run: handed in again, its requests would be paid for twice
    usd = price(s, total[1:])
    print(f"{total[0]} requests in {number} files {name}-000.jsonl ...: at most about {total[1]:,} tokens in, {total[2]:,} out" + (f", ${usd:.2f}" if usd else ""))


def read_batch(s: Settings, task: Task, answers: Answers) -> collections.Counter:
    """Store the answers of batch files; how many lines brought none, and why."""
    failed = collections.Counter()
    for path in s.batch_in.split(","):
        for _, line in read_lines(path, "--batch_in"):
            name = re.fullmatch(r"([0-9]{1,12})-([0-9a-f]{16})", str(line.get("custom_id")))
            job = task.job(int(name[1])) if name and task.wants(int(name[1])) else None
            if not job or job.key != name[2]:
                failed["answer to another request than this command's"] += 1
            elif not answers.has(job):
                response = line["response"] if isinstance(line.get("response"), dict) else {}
                try:
                    if response.get("status_code") != 200:
                        raise Trouble("an error in the place of an answer")
                    answer = read_answer(response.get("body"))
                except Trouble as t:
                    failed[t.why] += 1
                    continue
                guess = {"in": tokens_about(job.prompt), "out": tokens_about(answer["text"])}
                answers.add(job.name | answer | {k: v for k, v in guess.items() if answer[k] is None})
    return failed


def read_lines(path: str, flag: str):
    """(line number, JSON object) of a jsonl file."""
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


def read_given(s: Settings, task: Task) -> dict[int, dict]:
    """The thoughts of --given by chunk."""
    given, docs, corpus = {}, task.corpus.docs, task.corpus
    for number, line in read_lines(s.given, "--given"):
        i, d, index, where = line.get("chunk"), line.get("doc"), line.get("index"), f"{s.given}:{number}"
        if i is None and type(d) is int and type(index) is int and 0 <= d < corpus.n_docs and 0 <= index < docs[d + 1] - docs[d]:
            i = int(docs[d]) + index
        if type(i) is not int or not 0 <= i < corpus.n_chunks or not isinstance(line.get("thought"), str):
            raise UserError(f'{where}: expected {{"chunk": 0 to {corpus.n_chunks - 1}, "thought": text}}, or "doc" and "index" for the chunk')
        if not task.wants(i):
            raise UserError(f"{where}: chunk {i} is a question or empty, and takes no thought; leave it out")
        if i in given:
            raise UserError(f"{where}: chunk {i} has a thought already; leave one out")
        given[i] = {"text": line["thought"], "finish": "stop"}
    return given


# -------------------------------------------------------------------------------------------------- the output


def write_output(s: Settings, task: Task, find, spent, work: Path, made: dict) -> dict:
    """The output folder from the records that find(number) gives (None: no answer); its meta.json, which holds `made`."""
    corpus, tok, counts = task.corpus, task.corpus.tokenizer, collections.Counter()

    def texts():
        for n in task.numbers.tolist():
            record = find(n)
            text, bad = judge(record, task.passage(n), tok, s) if record else ("", "unanswered")
            counts[bad or "used"] += 1
            yield n, text

    meta = {"maker": "data/teacher.py", "model": s.given or s.model, "style": s.style, "before": s.before, "temperature": task.fixed.get("temperature", s.temperature),
            "counts": counts,  # filled while writing
            "tokens_in": spent[0], "tokens_out": spent[1], "usd": price(s, spent)} | made  # fmt: skip
    if s.style == "thoughts":
        found = texts()
        spans = (tok.encode_array(text) if task.wants(i) and (text := next(found)[1]) else [] for i in range(corpus.n_chunks))
        write_thoughts(s.out_dir, corpus, spans, meta, files=[work / "settings.json"])
        return read_json(Path(s.out_dir) / "meta.json")
    with new_folder(s.out_dir) as folder:
        with open(folder / "texts.jsonl", "w", encoding="utf-8") as f:
            for n, text in texts():
                if text:
                    f.write(json.dumps({"text": text, "doc": n, "style": task.style(task.passage(n))}, ensure_ascii=False) + "\n")
        shutil.copy(work / "settings.json", folder)
        write_json(folder / "meta.json", {"kind": "texts", "corpus": corpus.meta["sha256"]} | meta)
    return read_json(Path(s.out_dir) / "meta.json")


def report(out: Path, meta: dict) -> str:
    counts = dict(meta["counts"])
    used, total = counts.pop("used", 0), sum(meta["counts"].values())
    left = ", ".join(f"{n} {why}" for why, n in sorted(counts.items())) or "none"
    cost = f" | {meta['tokens_in']:,} tokens in, {meta['tokens_out']:,} out" + (f", ${meta['usd']:.4f}" if meta["usd"] else "") if meta["tokens_in"] else ""
    return f"{out}: {used} of {total} {'chunks have thoughts' if meta['style'] == 'thoughts' else 'documents rewritten'} | left out: {left}{cost}"


def check_settings(s: Settings) -> None:
    if not (s.given or s.model):
        raise UserError("--base_url=... and --model=NAME, --model=FOLDER or --given=FILE is required: where the thoughts come from")
    sources = [f"--{name}" for name in ("given", "base_url", "batch_out", "batch_in") if getattr(s, name)]
    if len(sources) > 1:
        raise UserError(f"{', '.join(sources)}: give one at a time")
    if s.given and (s.model or s.style != "thoughts"):
        raise UserError(f"--given={s.given}: goes with no model and no --style")
    if s.extra and not (s.base_url or s.batch_out or s.batch_in):
        raise UserError("--extra: only for an endpoint and its batch files")
    if (s.budget_usd or s.budget_tokens) and not s.base_url:
        raise UserError("--budget_usd, --budget_tokens: only for --base_url; batch files print what they can cost, a model folder costs nothing")
    if s.budget_usd and not (s.usd_in and s.usd_out):
        raise UserError(f"--budget_usd={s.budget_usd}: needs prices, --usd_in and --usd_out, in dollars a million tokens")
    if s.timeout > 86400:
        raise UserError(f"--timeout={s.timeout}: expected at most 86400 seconds, a day")
    if s.base_url:
        read_url(s.base_url), read_key(s.key_env)


def obtain(s: Settings, task: Task, answers: Answers) -> None:
    """Get the answers that are missing, or UserError when some still are (unless --partial)."""
    if s.batch_in:
        failed, why = read_batch(s, task, answers), ""
    else:
        failed, why = (ask_endpoint if s.base_url else ask_model)(s, task, answers)
    missing = sum(1 for _ in task.jobs(answers))
    reasons = "; ".join([why] * bool(why) + [f"{n} x {reason}" for reason, n in failed.most_common()])
    if not missing:
        return
    said = f"{missing} of {len(task.numbers)} have no answer ({reasons or 'not in the files'})"
    if not s.partial or missing == len(task.numbers):
        advice = "raise the budget to go on" if "budget" in why else "the same command goes on"
        raise UserError(f"{s.out_dir}: not written, {said}; {advice}" + ", --partial writes what is there" * (missing < len(task.numbers)))
    print(said)


def main(s: Settings) -> None:
    check_settings(s)
    out, work = Path(s.out_dir), Path(s.out_dir.rstrip("/") + ".answers")
    if out.exists() and not (out / "settings.json").exists():
        raise UserError(f"{out}: exists, and was not made by this script; give another --out_dir")
    task = Task(s, open_corpus(s.corpus))
    if not len(task.numbers):
        raise UserError(f"{s.corpus}: holds no chunk that takes a thought: all are questions or empty")
    given = read_given(s, task) if s.given else None
    words = json.dumps(given or task.template or [PROMPT, NOTHING_BEFORE, STYLES, WRAP_COT])
    made = {"longest": s.longest, "words": hashlib.sha256(words.encode()).hexdigest()[:16]}  # what settings.json does not tell
    if out.exists():
        claim(out, s, FREE)
        meta = read_json(out / "meta.json")
        if "counts" in meta and (s.given or "unanswered" not in meta["counts"]):
            if any(meta.get(k, v) != v for k, v in made.items()):
                raise UserError(f"{out}: made with another --longest, prompt or file of thoughts; remove it, and the same command makes it anew")
            return print(f"complete: {report(out, meta)}")
    work.mkdir(parents=True, exist_ok=True)
    with hold(work / "lock", wait=False) as held:
        if not held:
            raise UserError(f"{work}: another run is at work here; wait for it")
        answers = Answers(work / "answers.jsonl", task.size)
        if not sum(answers.spent):  # nothing was asked yet: a mistyped setting need not stay
            (work / "settings.json").unlink(missing_ok=True)
        claim(work, s, FREE)
        if s.batch_out:
            return write_batch(s, task, answers)
        if given is None:
            obtain(s, task, answers)
        find = given.get if given is not None else lambda n: answers.get(task.job(n))
        meta = write_output(s, task, find, answers.spent, work, made)
        if given is not None:
            shutil.rmtree(work)  # while it is ours
    print(report(out, meta))


if __name__ == "__main__":
    run(main, Settings)
