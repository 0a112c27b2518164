"""Ask a server of OpenAI's chat completions, and keep its answers.

The `openai` package builds and sends the requests. Attempts are counted here,
since each of them can be paid for: the package's own retries are switched off.

What a server sends is not trusted: it is bounded in size and time, parsed as
JSON and nothing else, and cleared of the key before anyone sees it. The key
goes into one header of requests to --base_url. Redirections are not followed,
and proxies named in the environment are not used.
"""

import asyncio
import collections
import contextlib
import email.utils
import errno
import functools
import json
import os
import random
import re
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import numpy as np

from data.lib.cli import UserError

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


def tokens_about(text: str) -> int:
    """More tokens than a text is likely to have: most tokenizers need one for four bytes."""
    return len(text.encode(errors="replace")) // 3 + 16


def price(s, tokens) -> float:
    """Dollars for a pair of token counts, in and out."""
    return float(tokens[0] * s.usd_in + tokens[1] * s.usd_out) / 1e6


# ----------------------------------------------------------------------- what a server sends


def read_answer(body) -> dict:
    """{"text", "finish", "in", "out"} of a chat completion's JSON, which may hold anything.

    in, out: the tokens that it says it took, or None. finish: stop, length or refusal.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1:
        raise Trouble("an answer with not one choice", paid=True)
    choice = choices[0] if isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        raise Trouble("an answer without a message", paid=True)
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        finish = "refusal"
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    return {
        "text": message.get("content") or "",
        "finish": finish,
        "in": read_count(usage.get("prompt_tokens")),
        "out": read_count(usage.get("completion_tokens")),
    }


def read_count(n) -> int | None:
    """A number of tokens that can be true: no request takes none."""
    return n if type(n) is int and 0 < n < 1 << 40 else None


def read_error(status: int, after: str | None, said: str) -> Trouble:
    """The trouble that an HTTP status means. after: the Retry-After header."""
    again = status in (408, 409, 425, 429) or status >= 500
    only_this_request = status in (400, 403, 413, 422)
    fatal = not again and not only_this_request
    wait = retry_after(after) if again else 0.0
    paid = status == 504  # a gateway did not wait for the model, which may have answered
    return Trouble(f"HTTP {status}", said, paid, again, fatal, wait)


def retry_after(value: str | None) -> float:
    """Seconds in a Retry-After header, which holds a number or a date."""
    value = (value or "").strip()
    if re.fullmatch(r"\d+(\.\d*)?", value, re.ASCII):
        return min(float(value), MAX_WAIT)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return min(max(seconds, 0.0), MAX_WAIT)
    return 0.0


def read_url(base_url: str) -> SplitResult:
    """The address in its parts. No error repeats it, since a key may stand in it."""
    if set("@?#") & set(base_url):
        raise UserError("--base_url: give it without a user, ? and #; a key goes into --key_env's variable")
    try:
        url = urlsplit(base_url)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        good = False
    if not good or not re.fullmatch("[!-~]+", base_url):
        raise UserError("--base_url: expected an address such as https://HOST/v1")
    return url


def read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{variable}: holds characters that no key has; set it again")
    return key


# --------------------------------------------------------------------------- what is kept


class Answers:
    """answers.jsonl: a line for each answer, and for each lost request that may have been paid for.

    Memory holds only where the answer to each job lies in the file, at about 200 bytes an answer.
    """

    def __init__(self, path: Path):
        self.offsets: dict[str, int] = {}  # by Job.id
        self.spent = [0, 0]
        self.file = open(path, "ab", buffering=0)
        self.reader = open(path, "rb")
        line, offset, damaged = b"\n", 0, 0
        for line in self.reader:
            try:
                self.note(json.loads(line), offset)
            except (ValueError, KeyError, TypeError, RecursionError):  # a kill cut it short
                damaged += 1
            offset += len(line)
        if damaged:
            print(f"note: {path}: {damaged} damaged lines are passed over; what they answered is asked again")
        if not line.endswith(b"\n"):
            self.file.write(b"\n")

    def note(self, record: dict, offset: int) -> None:
        """Count a record's tokens, and remember where its answer lies."""
        total = [self.spent[0] + record["in"], self.spent[1] + record["out"]]
        if "text" in record:
            self.offsets[f"{record['chunk']}-{record['key']}"] = offset
        self.spent[:] = total

    def add(self, record: dict) -> None:
        """Append a record: whole, or not at all (OSError), since half a line would swallow the next one."""
        raw = json.dumps(record).encode() + b"\n"
        offset = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(raw) != len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            self.file.truncate(offset)
            raise OSError(e.errno, f"cannot keep an answer: {e.strerror}", self.file.name) from None
        self.note(record, offset)

    def has(self, job) -> bool:
        return job.id in self.offsets

    def get(self, job) -> dict | None:
        if not self.has(job):
            return None
        self.reader.seek(self.offsets[job.id])
        return json.loads(self.reader.readline())


class Meter:
    """What is spent and in flight, and when the next request may go. Token counts are arrays: in, out."""

    def __init__(self, s, spent):
        self.s = s
        self.spent = np.array(spent)
        self.in_flight = np.zeros(2, dtype=int)
        self.next_start = 0.0  # by --rpm and --tpm
        self.rest_until = 0.0  # by the server's wish
        self.why = ""
        self.halted = asyncio.Event()

    def over_budget(self, tokens) -> bool:
        s = self.s
        too_many = s.budget_tokens and sum(tokens) >= s.budget_tokens
        too_dear = s.budget_usd and price(s, tokens) >= s.budget_usd
        return bool(too_many or too_dear)

    def seconds(self, tokens: int) -> float:
        """How long so many tokens take under --tpm."""
        return 60 * tokens / self.s.tpm if self.s.tpm else 0.0

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
            if self.over_budget(self.spent):
                self.halt("the budget is spent")
                break
            now = time.monotonic()
            wait = max(self.next_start, self.rest_until) - now
            if wait <= 0 and not self.over_budget(self.spent + self.in_flight):
                self.in_flight = self.in_flight + size
                gap = 60 / self.s.rpm if self.s.rpm else 0.0
                self.next_start = max(now, self.next_start) + max(gap, self.seconds(sum(size)))
                return True
            await self.sleep(min(wait, 0.5) if wait > 0 else 0.02)
        return False

    def end(self, size, used, wait: float = 0.0) -> None:
        """A request has ended. wait: seconds of rest that the server asks of all requests."""
        self.in_flight = self.in_flight - size
        self.spent = self.spent + used
        # begin() took it to need `size`; what it really used sets that right.
        self.next_start += min(self.seconds(sum(used) - sum(size)), MAX_PAUSE)
        self.rest_until = max(self.rest_until, time.monotonic() + wait)


# ------------------------------------------------------------------------------ asking


class Endpoint:
    """The server of --base_url."""

    def __init__(self, s, spent):
        try:
            import openai  # only here: batch files and --given do without
        except ImportError:
            raise UserError("--base_url: needs the openai package; pip install openai") from None
        self.openai = openai
        self.s = s
        self.url = read_url(s.base_url)
        self.key = read_key(s.key_env)
        self.meter = Meter(s, spent)
        self.client = self.make_client()
        self.reached = False
        self.failed = collections.Counter()  # by reason
        self.failed_in_a_row = 0
        is_local = self.url.hostname in ("localhost", "127.0.0.1", "::1")
        if self.key and self.url.scheme == "http" and not is_local:
            print(f"note: --base_url={s.base_url} is not https: the key in {s.key_env} travels unencrypted")

    def make_client(self):
        """The package's client, without its retries, redirections and proxies."""
        http_client = self.openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            trust_env=False,
            verify=ssl.create_default_context(),
            event_hooks={"response": [self.read_response]},
        )
        return self.openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=self.s.base_url,
            max_retries=0,
            # post() limits the whole request. A connection that is never made is told apart.
            timeout=self.openai.Timeout(None, connect=0.9 * self.s.timeout),
            http_client=http_client,
        )

    def headers(self) -> dict:
        """Headers of a request, beside the key, which the package knows to hide in its logs."""
        left_out = self.openai.Omit()
        headers = {
            "Accept-Encoding": "identity",  # else a small body could unpack to a huge one
            "Connection": "close",
            # The package would take these from the environment.
            "OpenAI-Organization": left_out,
            "OpenAI-Project": left_out,
        }
        return headers if self.key else headers | {"Authorization": left_out}

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

    async def post(self, request: dict) -> bytes:
        """The body of the answer to a request; Trouble when there is none."""
        asked = self.client.chat.completions.with_streaming_response.create(
            model=request["model"],
            messages=request["messages"],
            extra_body=request,
            extra_headers=self.headers(),
        )
        try:
            async with asyncio.timeout(self.s.timeout), asked as response:
                return response.http_response.extensions["body"]
        except TimeoutError:
            raise Trouble(DROPPED, paid=True) from None
        except self.openai.APIConnectionError as e:
            cause = e.__cause__
        if isinstance(cause, Trouble):  # of read_response()
            raise cause
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
            detail = f"cannot connect to {self.url.netloc} ({cause})"
            raise Trouble("no connection", detail, fatal=not self.reached)
        raise Trouble(DROPPED, paid=True)

    async def ask_once(self, request: dict) -> dict:
        """The answer to one request; Trouble when there is none."""
        raw = await self.post(request)
        try:
            answer = read_answer(json.loads(raw))
        except (ValueError, RecursionError):
            raise Trouble("an answer that is not JSON", paid=True) from None
        return answer | {"text": self.clean(answer["text"])}

    async def attempt(self, request: dict, size, store) -> Trouble | None:
        """Ask once, and count and store what comes; the trouble if that is no answer."""
        trouble = None
        try:
            record = await self.ask_once(request)
            used = (record["in"] or size[0], record["out"] or tokens_about(record["text"]))
        except Trouble as t:
            trouble = t
            record = {"lost": t.why}
            used = size if t.paid else (0, 0)
        if trouble is None or trouble.paid:
            store(record | {"in": used[0], "out": used[1]})
        self.meter.end(size, used, trouble.wait if trouble else 0.0)
        return trouble

    async def ask(self, request: dict, size, store) -> Trouble | None:
        """Ask until there is an answer. None: it is stored, or the run ends.

        size: the most tokens that it can take, in and out. store() gets the answer, or
        {"lost", "in", "out"} for a request that broke off and may have been paid for.
        """
        for attempt in range(self.s.retries + 1):
            if not await self.meter.begin(size):
                return None
            trouble = await self.attempt(request, size, store)
            if trouble is None:
                return None
            if trouble.fatal:
                self.meter.halt(str(trouble))
                return None
            if not trouble.again or attempt == self.s.retries:
                return trouble
            pause = min(self.s.backoff * 2 ** min(attempt, 20), MAX_PAUSE)
            await self.meter.sleep(pause * random.uniform(0.5, 1))

    async def work(self, jobs, store) -> None:
        """Ask for one job after the other, beside the other workers."""
        for job in jobs:
            keep = functools.partial(store, job)
            trouble = await self.ask(job.request, job.size(), keep)
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

    async def ask_all(self, jobs, store, tick) -> None:
        """Ask for all jobs (an iterator; each has request and size()), --concurrency at once.

        store(job, record) keeps what comes; tick() is called now and then. self.failed
        counts the jobs without an answer; self.meter.why says what ended the run early.
        """
        workers = []
        for _ in range(self.s.concurrency):
            workers.append(asyncio.create_task(self.work(jobs, store)))
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
