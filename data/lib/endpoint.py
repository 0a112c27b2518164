"""Ask a server of OpenAI's chat completions, and keep its answers.

The `openai` package builds and sends the requests, without its retries: attempts can
be paid for, so they are counted here.

What a server sends is bounded in size and time, parsed as JSON and cleared of the key.
The key goes into one header of requests to --base_url. No redirection is followed, and
no proxy of the environment used.
"""

import asyncio
import collections
import contextlib
import json
import os
import random
import re
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.lib.cli import UserError, append_jsonl
from data.lib.sources import optional

MAX_BODY = 4 << 20  # bytes read of a response; a long answer has a few hundred kB
MAX_WAIT = 600.0  # seconds that a server may ask us to wait
MAX_PAUSE = 60.0  # seconds between two attempts, if the server does not ask for more
MAX_FAILED_IN_A_ROW = 20  # requests without an answer that end the run
DROPPED = "no answer in time, or the connection dropped"


@dataclass(eq=False)
class Trouble(Exception):
    """Why a request has no answer."""

    why: str
    detail: str = ""
    paid: bool = False  # it may have been paid for
    again: bool = True  # another attempt can help
    fatal: bool = False  # the run must end
    wait: float = 0.0  # seconds for which the server asked us to send nothing

    def __str__(self) -> str:
        return f"{self.why}: {self.detail}" if self.detail else self.why


def most_tokens(text: str) -> int:
    """More tokens than a text is likely to have: most tokenizers need one for four bytes."""
    return len(text.encode(errors="replace")) // 3 + 16


def price(s, tokens) -> float:
    """Dollars for a pair of token counts, in and out."""
    return float(tokens[0] * s.usd_in + tokens[1] * s.usd_out) / 1e6


# -------------------- what a server sends


def read_answer(body) -> dict:
    """{"text", "finish", "in", "out"} of a chat completion's JSON, which may hold anything.

    in, out: the tokens that it says it took, or None. finish: stop, length or refusal.
    """
    try:
        [choice] = body["choices"]
        message = choice["message"]
        text = message.get("content") or ""
        refused = message.get("refusal")
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = [read_count(usage.get(f"{kind}_tokens")) for kind in ("prompt", "completion")]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Trouble("an answer that is not one message", paid=True) from None
    if not isinstance(text, str):
        raise Trouble("an answer that is not one message", paid=True)
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    if refused or choice.get("finish_reason") == "content_filter":
        finish = "refusal"
    return {"text": text, "finish": finish, "in": counts[0], "out": counts[1]}


def read_count(n) -> int | None:
    """A number of tokens that can be true: no request takes none."""
    return n if type(n) is int and 0 < n < 1 << 40 else None


def read_error(status: int, after: str | None, said: str) -> Trouble:
    """The trouble that an HTTP status means. after: the Retry-After header."""
    again = status in (408, 409, 425, 429) or status >= 500
    only_this_request = status in (400, 403, 413, 422)
    fatal = not again and not only_this_request
    seconds = re.fullmatch(r"\d+(\.\d*)?", (after or "").strip(), re.ASCII)  # it can be a date, too
    wait = min(float(seconds[0]), MAX_WAIT) if again and seconds else 0.0
    paid = status == 504  # a gateway did not wait for the model, which may have answered
    return Trouble(f"HTTP {status}", said, paid, again, fatal, wait)


def read_host(base_url: str) -> str:
    """The host of an address. No error repeats the address, since a key may stand in it."""
    host = r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::[1-9]\d{0,4})?"
    found = re.fullmatch(rf"https?://({host})(?:/[\w./~%+-]*)?", base_url, re.ASCII)
    if not found:
        need = "expected an address such as https://HOST/v1, without a user, ? and #"
        raise UserError(f"--base_url: {need}; a key goes into --key_env's variable")
    return found[1]


def read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{variable}: holds characters that no key has; set it again")
    return key


# -------------------- what is kept


class Answers:
    """answers.jsonl: a line for each answer, and for each lost request that may have been paid for.

    Memory holds only where the answer to each job lies in the file, at about 200 bytes an answer.
    """

    def __init__(self, path: Path):
        self.path = path
        self.offsets: dict[str, int] = {}  # by Job.id
        self.spent = np.zeros(2, dtype=int)  # tokens in, out
        offset = damaged = 0
        path.touch()
        with open(path, "rb") as f:
            for line in f:
                try:
                    self.note(json.loads(line), offset)
                except (ValueError, KeyError, TypeError, RecursionError):  # a kill cut it short
                    damaged += 1
                offset += len(line)
        if damaged:
            print(f"note: {path}: {damaged} damaged lines are passed over, and asked again")

    def note(self, record: dict, offset: int) -> None:
        """Count a record's tokens, and remember where its answer lies."""
        spent = self.spent + (record["in"], record["out"])
        if "text" in record:
            self.offsets[f"{record['chunk']}-{record['key']}"] = offset
        self.spent = spent

    def add(self, record: dict) -> None:
        try:
            offset = append_jsonl(self.path, record)
        except OSError as e:
            raise OSError(e.errno, f"cannot keep an answer: {e.strerror}", str(self.path)) from None
        self.note(record, offset)

    def has(self, job) -> bool:
        return job.id in self.offsets

    def get(self, job) -> dict | None:
        if not self.has(job):
            return None
        with open(self.path, "rb") as f:
            f.seek(self.offsets[job.id])
            return json.loads(f.readline())


class Meter:
    """What is in flight, and when the next request may go. Token counts are arrays: in, out."""

    def __init__(self, s, answers: Answers):
        self.s = s
        self.answers = answers
        self.in_flight = np.zeros(2, dtype=int)
        self.next_start = 0.0  # by --rpm and by the server's wish
        self.why = ""
        self.halted = asyncio.Event()

    def over_budget(self, tokens) -> bool:
        s = self.s
        too_many = s.budget_tokens and sum(tokens) >= s.budget_tokens
        too_dear = s.budget_usd and price(s, tokens) >= s.budget_usd
        return bool(too_many or too_dear)

    def halt(self, why: str) -> None:
        self.why = self.why or why
        self.halted.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond a halt."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.halted.wait(), seconds)

    async def begin(self, size) -> bool:
        """Wait until a request may go, and set aside the most that it can take.

        False: none may go any more. What is in flight counts as spent, so that the last
        request before the budget's end goes alone, and it alone can pass it.
        """
        while not self.halted.is_set():
            spent = self.answers.spent
            if self.over_budget(spent):
                self.halt("the budget is spent")
                break
            now = time.monotonic()
            wait = self.next_start - now
            if wait <= 0 and not self.over_budget(spent + self.in_flight):
                self.in_flight = self.in_flight + size
                self.next_start = now + (60 / self.s.rpm if self.s.rpm else 0.0)
                return True
            await self.sleep(min(wait, 0.5) if wait > 0 else 0.02)
        return False

    def end(self, size, wait: float = 0.0) -> None:
        """A request has ended. wait: seconds of rest that the server asks of all requests."""
        self.in_flight = self.in_flight - size
        self.next_start = max(self.next_start, time.monotonic() + wait)


# -------------------- asking


class Endpoint:
    """The server of --base_url. `answers` keeps what it says."""

    def __init__(self, s, answers: Answers):
        self.openai = optional("openai", "--base_url")  # batch files and --given do without
        self.s = s
        self.host = read_host(s.base_url)
        self.key = read_key(s.key_env)
        self.answers = answers
        self.meter = Meter(s, answers)
        self.client = self.make_client()
        self.reached = False
        self.n_answered = 0
        self.failed = collections.Counter()  # by reason
        self.failed_in_a_row = 0

    def make_client(self):
        """The package's client, without its retries, redirections and proxies."""
        http_client = self.openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            trust_env=False,
            verify=ssl.create_default_context(),
            event_hooks={"response": [self.read_response]},
        )
        headers = {
            "Accept-Encoding": "identity",  # else a small body could unpack to a huge one
            "Connection": "close",
        }
        return self.openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=self.s.base_url,
            max_retries=0,
            # ask_once() limits the whole request. A connection that is never made is told apart.
            timeout=self.openai.Timeout(None, connect=0.9 * self.s.timeout),
            default_headers=headers,
            http_client=http_client,
        )

    async def read_response(self, response) -> None:
        """The client's hook: read a response before the client reads it, who knows no limit."""
        self.reached = True
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > MAX_BODY:
                break
        if response.status_code != 200:
            after = response.headers.get("retry-after")
            raise read_error(response.status_code, after, self.said(bytes(body)))
        if len(body) > MAX_BODY:
            raise Trouble(f"an answer of more than {MAX_BODY >> 20} MB", paid=True)
        response.extensions["body"] = bytes(body)

    def clean(self, text: str) -> str:
        """The text without the key, which a server can send back.

        A short key ("none", "EMPTY") is no secret, and can be a word.
        """
        return text.replace(self.key, "[key]") if len(self.key) >= 12 else text

    def said(self, raw: bytes) -> str:
        """What the server says of an error, fit for a terminal."""
        text = raw.decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            text = str(json.loads(raw)["error"]["message"])
        return "".join(c if c.isprintable() else " " for c in self.clean(text)[:200]).strip()

    async def ask_once(self, request: dict) -> dict:
        """The answer to one request; Trouble when there is none."""
        omit = self.openai.Omit()  # the package sends these of its own accord
        headers = {"OpenAI-Organization": omit, "OpenAI-Project": omit}
        headers |= {} if self.key else {"Authorization": omit}
        create = self.client.chat.completions.with_streaming_response.create
        asked = create(**request, extra_headers=headers)
        try:
            async with asyncio.timeout(self.s.timeout), asked as response:
                raw = response.http_response.extensions["body"]
            answer = read_answer(json.loads(raw))
            return answer | {"text": self.clean(answer["text"])}
        except (ValueError, RecursionError):
            raise Trouble("an answer that is not JSON", paid=True) from None
        except TimeoutError:
            raise Trouble(DROPPED, paid=True) from None
        except self.openai.APIConnectionError as e:
            cause = e.__cause__
        if isinstance(cause, Trouble):  # of read_response()
            raise cause
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
            detail = f"cannot connect to {self.host} ({cause})"
            raise Trouble("no connection", detail, fatal=not self.reached)
        raise Trouble(DROPPED, paid=True)

    async def attempt(self, job, size) -> Trouble | None:
        """Ask once, and keep what comes; the trouble if that is no answer."""
        trouble = None
        try:
            record = await self.ask_once(job.request)
            told = record["out"] or most_tokens(record["text"])
            record |= {"in": record["in"] or size[0], "out": told}
            self.n_answered += 1
        except Trouble as t:
            trouble = t
            record = {"lost": t.why, "in": size[0], "out": size[1]}
        if trouble is None or trouble.paid:
            self.answers.add(job.record(record))
        self.meter.end(size, trouble.wait if trouble else 0.0)
        return trouble

    async def ask(self, job) -> Trouble | None:
        """Ask until there is an answer. None: it is kept, or the run ends."""
        size = job.size()
        for attempt in range(self.s.retries + 1):
            if not await self.meter.begin(size):
                return None
            trouble = await self.attempt(job, size)
            if trouble is None:
                return None
            if trouble.fatal:
                self.meter.halt(str(trouble))
                return None
            if not trouble.again or attempt == self.s.retries:
                return trouble
            pause = min(self.s.backoff * 2 ** min(attempt, 20), MAX_PAUSE)
            await self.meter.sleep(pause * random.uniform(0.5, 1))

    async def work(self, jobs) -> None:
        """Ask for one job after the other, beside the other workers."""
        for job in jobs:
            trouble = await self.ask(job)
            self.failed_in_a_row = self.failed_in_a_row + 1 if trouble else 0
            if trouble and trouble.why not in self.failed:
                print(f"\ngiven up: {trouble}", flush=True)
            if trouble:
                self.failed[trouble.why] += 1
            if self.failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                n = self.failed_in_a_row
                self.meter.halt(f"{n} requests in a row without an answer, the last: {trouble}")
            if self.meter.halted.is_set():
                return

    async def ask_all(self, jobs, tick) -> None:
        """Ask for all jobs (an iterator), --concurrency at once; tick() is called now and then.

        self.failed counts the jobs without an answer; self.meter.why says what ended the
        run early.
        """
        workers = []
        for _ in range(self.s.concurrency):
            workers.append(asyncio.create_task(self.work(jobs)))
        pending = set(workers)
        async with self.client:
            try:
                while pending:
                    done, pending = await asyncio.wait(pending, timeout=0.05)
                    if any(worker.exception() for worker in done):  # a full disk, a damaged corpus
                        self.meter.halt("")
                    tick()
            except asyncio.CancelledError:  # Ctrl-C
                self.meter.halt("interrupted")
                patience = f"up to {self.s.timeout:.0f} s; Ctrl-C again to leave them"
                print(f"\nwaiting for the requests in flight, {patience}", flush=True)
                await asyncio.wait(workers)
                raise
        for worker in workers:
            worker.result()
