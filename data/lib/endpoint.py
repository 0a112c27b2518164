"""A careful client of OpenAI's chat completions, as many servers speak them, and the file of its answers. data/teacher.py asks through it.

What comes from a server is not trusted: bounded in size and time, parsed as JSON and nothing else, and cleared of the key before anyone sees it. The key
goes into one header of requests to --base_url, and nowhere else: redirections are not followed, and the proxies that the environment names are not used.
"""

import collections
import contextlib
import email.utils
import errno
import http.client
import json
import os
import random
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import numpy as np

from data.lib.cli import UserError

MAX_BODY = 4 << 20  # bytes read of a response; a long answer is a few hundred kB
MAX_WAIT = 600.0  # seconds that a server may ask us to wait
MAX_PAUSE = 60.0  # seconds between two attempts of our own accord
IN_A_ROW = 20  # requests given up, one after the other, that end the run


class Trouble(Exception):
    """A request without an answer: whether it may have been paid for, whether to try again, whether the run shall end, and how long to wait."""

    def __init__(self, why: str, detail: str = "", paid: bool = False, again: bool = True, fatal: bool = False, wait: float = 0.0):
        super().__init__(why + (f": {detail}" if detail else ""))
        self.why, self.paid, self.again, self.fatal, self.wait = why, paid, again, fatal, wait


def tokens_about(text: str) -> int:
    """More tokens than a text is likely to have: most tokenizers need one for four bytes."""
    return len(text.encode(errors="replace")) // 3 + 16


def price(s, tokens) -> float:
    """Dollars for a pair of tokens, in and out."""
    return (tokens[0] * s.usd_in + tokens[1] * s.usd_out) / 1e6


def read_answer(body) -> dict:
    """{"text", "finish", "in", "out"} of a chat completion's JSON, which may hold anything. in, out: the tokens it says it took, else None."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1:
        raise Trouble("an answer with not one choice", paid=True)
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    text = message.get("content") if isinstance(message, dict) else 0
    if not isinstance(text, str | None):
        raise Trouble("an answer without a message", paid=True)
    finish, usage = choices[0].get("finish_reason"), body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    finish = "refusal" if message.get("refusal") or finish == "content_filter" else "length" if finish == "length" else "stop"
    used = [n if type(n) is int and 0 < n < 1 << 40 else None for n in (usage.get("prompt_tokens"), usage.get("completion_tokens"))]
    return {"text": text or "", "finish": finish, "in": used[0], "out": used[1]}


class Answers:
    """answers.jsonl: a line for each answer, and for each request that was lost but may have been paid for. In memory is where each chunk's answer lies."""

    def __init__(self, path: Path, size: int):
        self.offset, self.digest, self.n = np.full(size, -1), np.zeros(size, dtype=np.uint64), 0
        self.older = {}  # (chunk, hash): where; of chunks that were asked in two ways
        self.spent, self.lock, offset, damaged, line = [0, 0], threading.Lock(), 0, 0, b"\n"
        self.file, self.reader = open(path, "ab", buffering=0), open(path, "rb")
        for line in self.reader:
            try:
                self.note(json.loads(line), offset)
            except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):  # a line cut short by a kill
                damaged += 1
            offset += len(line)
        if damaged:
            print(f"note: {path}: {damaged} damaged lines are passed over; what they answered is asked again")
        if not line.endswith(b"\n"):
            self.file.write(b"\n")

    def note(self, record: dict, offset: int) -> None:
        self.spent[0] += record["in"]
        self.spent[1] += record["out"]
        if "text" in record:
            n = record["chunk"]
            old, where = int(self.digest[n]), int(self.offset[n])
            self.digest[n] = int(record["key"], 16)
            if where >= 0:
                self.older[n, old] = where
            self.n += int(where < 0)
            self.offset[n] = offset

    def add(self, record: dict) -> None:
        raw = json.dumps(record).encode() + b"\n"
        with self.lock:
            offset = self.file.seek(0, os.SEEK_END)
            try:
                if self.file.write(raw) != len(raw):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as e:
                self.file.truncate(offset)  # half a line would swallow the next one
                raise OSError(e.errno, f"cannot keep an answer: {e.strerror}", self.file.name) from None
            self.note(record, offset)

    def where(self, job) -> int:
        """Where its answer lies; -1: there is none."""
        n, digest = job.number, int(job.key, 16)
        return int(self.offset[n]) if self.digest[n] == digest else self.older.get((n, digest), -1)

    def has(self, job) -> bool:
        return self.where(job) >= 0

    def get(self, job) -> dict | None:
        if not self.has(job):
            return None
        self.reader.seek(self.where(job))
        return json.loads(self.reader.readline())


class Meter:
    """What is spent and in flight, and when the next request may go; one for all threads. Tokens are pairs: in, out."""

    def __init__(self, s, spent):
        self.s, self.spent, self.flying, self.ready, self.rest, self.why = s, list(spent), [0, 0], 0.0, 0.0, ""
        self.changed, self.stop = threading.Condition(), threading.Event()

    def over(self, tokens) -> bool:
        s = self.s
        return bool(s.budget_tokens and sum(tokens) >= s.budget_tokens or s.budget_usd and price(s, tokens) >= s.budget_usd)

    def pace(self, tokens: int) -> float:
        """Seconds that so many tokens take under --tpm."""
        return 60 * tokens / self.s.tpm if self.s.tpm else 0.0

    def halt(self, why: str) -> None:
        self.why = self.why or why
        self.stop.set()

    def begin(self, size) -> bool:
        """Wait until a request may go, and set aside the most it can take. False: none may go any more.

        What is in flight counts as spent. So the last request before the budget's end goes alone, and it alone can pass it.
        """
        with self.changed:
            while not self.stop.is_set():
                if self.over(self.spent):
                    self.halt("the budget is spent")
                    break
                wait = max(self.ready, self.rest) - time.monotonic()
                if wait <= 0 and not self.over([a + b for a, b in zip(self.spent, self.flying)]):
                    self.flying = [a + b for a, b in zip(self.flying, size)]
                    self.ready = max(time.monotonic(), self.ready) + max(60 / self.s.rpm if self.s.rpm else 0, self.pace(sum(size)))
                    return True
                self.changed.wait(min(wait, 0.5) if wait > 0 else 0.5)
        return False

    def end(self, size, used, wait: float = 0.0) -> None:
        """A request has ended. wait: the server asks for a rest, which is meant for all threads."""
        with self.changed:
            self.flying = [a - b for a, b in zip(self.flying, size)]
            self.spent = [a + b for a, b in zip(self.spent, used)]
            self.ready += min(self.pace(sum(used) - sum(size)), MAX_PAUSE)  # set right what begin() took it to need
            self.rest = max(self.rest, time.monotonic() + wait)
            self.changed.notify_all()


class Endpoint:
    """The server of --base_url."""

    def __init__(self, s, spent):
        self.s, self.url, self.key, self.meter, self.reached = s, read_url(s.base_url), read_key(s.key_env), Meter(s, spent), False
        if self.key and self.url.scheme == "http" and self.url.hostname not in ("localhost", "127.0.0.1", "::1"):
            print(f"note: --base_url={s.base_url} is not https: the key in {s.key_env} travels unencrypted")

    def clean(self, text: str) -> str:
        """The text without the key, which a server can send back. Short ones ("none", "EMPTY") are no secrets, and are words."""
        return text.replace(self.key, "[key]") if len(self.key) >= 12 else text

    def said(self, raw: bytes) -> str:
        """What the server says of an error, fit for a terminal."""
        text = raw.decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            text = str(json.loads(raw)["error"]["message"])
        return "".join(c if c.isprintable() else " " for c in self.clean(text)[:200]).strip()

    def post(self, body: bytes) -> tuple[int, str | None, bytes]:
        """(status, Retry-After, the body; of one above MAX_BODY bytes, some more than those)."""
        connect = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        connection = connect(self.url.hostname, self.url.port, timeout=self.s.timeout)
        try:
            connection.connect()
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or e
            raise Trouble("no connection", f"cannot connect to {self.url.netloc} ({reason})", fatal=not self.reached) from None
        self.reached, sock = True, connection.sock

        def cut() -> None:  # a socket's timeout is for each read: a server that sends a byte now and then would hold us for ever
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        watchdog = threading.Timer(self.s.timeout, cut)
        watchdog.daemon = True
        watchdog.start()
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
            connection.request("POST", self.url.path.rstrip("/") + "/chat/completions", body, headers)
            response, raw = connection.getresponse(), bytearray()
            while len(raw) <= MAX_BODY and (piece := response.read1(1 << 16)):  # not read(n): of a chunk of "-1" bytes it reads all that comes
                raw += piece
            return response.status, response.getheader("Retry-After"), bytes(raw)
        except (OSError, ValueError, http.client.HTTPException):
            raise Trouble("no answer in time, or the connection dropped", paid=True) from None
        finally:
            watchdog.cancel()
            connection.close()

    def ask_once(self, request: dict) -> dict:
        """The answer to one request; Trouble when there is none."""
        status, after, raw = self.post(json.dumps(request).encode())
        if status != 200:
            again = status in (408, 409, 425, 429) or status >= 500
            fatal = not again and status not in (400, 403, 413, 422)  # these can be about the one request
            paid = status == 504  # a gateway did not wait for the model, which may have answered
            raise Trouble(f"HTTP {status}", self.said(raw), paid=paid, again=again, fatal=fatal, wait=retry_after(after) if again else 0.0)
        if len(raw) > MAX_BODY:
            raise Trouble(f"an answer of more than {MAX_BODY >> 20} MB", paid=True)
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise Trouble("an answer that is not JSON", paid=True) from None
        answer = read_answer(body)
        return answer | {"text": self.clean(answer["text"])}

    def ask(self, request: dict, size, store) -> Trouble | None:
        """Ask until there is an answer. store() gets it, or {"lost", "in", "out"} for a request that broke off and may have been paid for.

        Trouble: why there is no answer. None: it is stored, or the run ends.
        """
        for attempt in range(self.s.retries + 1):
            if not self.meter.begin(size):
                return None
            used = (0, 0)
            try:
                record, trouble = self.ask_once(request), None
            except Trouble as t:
                record, trouble = {"lost": t.why, "in": None, "out": None}, t
            if not trouble or trouble.paid:
                guess = (size[0], size[1] if trouble else tokens_about(record["text"]))
                used = tuple(guess[i] if record[k] is None else record[k] for i, k in enumerate(("in", "out")))
                store(record | {"in": used[0], "out": used[1]})
            self.meter.end(size, used, trouble.wait if trouble else 0.0)
            if not trouble or trouble.fatal:
                return trouble and self.meter.halt(str(trouble))
            if not trouble.again or attempt == self.s.retries:
                return trouble
            if self.meter.stop.wait(min(self.s.backoff * 2 ** min(attempt, 20), MAX_PAUSE) * random.uniform(0.5, 1)):
                return None

    def ask_all(self, jobs, store, tick) -> collections.Counter:
        """Ask for all jobs (an iterator; each has request and size()), --concurrency at once; store(job, record). How many have no answer, by reason."""
        turn, failed, broken, ended, row, started = threading.Lock(), collections.Counter(), [], [], 0, 0

        def work() -> None:
            nonlocal row
            while not self.meter.stop.is_set():
                with turn:
                    job = next(jobs, None)
                if job is None:
                    return
                trouble = self.ask(job.request, job.size(), lambda record: store(job, record))
                with turn:
                    row = row + 1 if trouble else 0
                    if trouble and trouble.why not in failed:
                        print(f"\ngiven up: {trouble}", flush=True)
                    failed.update([trouble.why] if trouble else [])
                if row >= IN_A_ROW:
                    self.meter.halt(f"{row} requests in a row without an answer, the last: {trouble}")

        def guarded() -> None:
            try:
                work()
            except BaseException as e:  # a full disk, a damaged corpus: for the main thread to say
                broken.append(e)
                self.meter.halt("")
            finally:
                ended.append(None)

        try:
            for _ in range(self.s.concurrency):
                threading.Thread(target=guarded, daemon=True).start()
                started += 1
            while len(ended) < started:  # not Thread.join(): Ctrl-C in the midst of it makes Python 3.11 take a running thread for ended
                time.sleep(0.05)
                tick(failed.total())
        except KeyboardInterrupt:
            self.meter.halt("interrupted")
            print(f"\nwaiting for the requests in flight, up to {self.s.timeout:.0f} s; Ctrl-C again to leave them", flush=True)
            while len(ended) < started:
                time.sleep(0.05)
            raise
        if broken:
            raise broken[0]
        return failed


def retry_after(value: str | None) -> float:
    """Seconds in a Retry-After header: a number, or a date."""
    value = (value or "").strip()
    if re.fullmatch(r"\d+(\.\d*)?", value, re.ASCII):
        return min(float(value), MAX_WAIT)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return min(max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0), MAX_WAIT)
    return 0.0


def read_url(base_url: str) -> SplitResult:
    """The address in its parts. No error repeats it: a key may have got in there."""
    if set("@?#") & set(base_url):
        raise UserError("--base_url: give it without a user, ? and #; the key belongs into the environment variable of --key_env")
    try:
        url = urlsplit(base_url)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0 and re.fullmatch("[!-~]+", base_url)
    except ValueError:
        good = False
    if not good:
        raise UserError("--base_url: expected an address such as https://HOST/v1")
    return url


def read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{variable}: holds characters that no key has; set it again")
    return key
