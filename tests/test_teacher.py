"""data/teacher.py against a server on 127.0.0.1 that does all that a server can do wrong."""

import asyncio
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, inside

import data.show
from data import teacher
from data.lib import endpoint
from data.lib.cli import UserError, read_json
from data.lib.corpus import open_corpus, open_thoughts, write_corpus
from data.lib.tokenizer import make_tokenizer

KEY = "sk-secret-0123456789abcdef"
FAULTS = (
    *("slow", "429", "500", "cut", "drop", "none", "two"),
    *("huge", "html", "deep", "no usage", "null", "list"),
)
# These cost the whole --timeout, so each eighth passage meets one first, and no other one.
ENDLESS = ("hang", "drip")
MOST = 400  # no request of these tests takes more tokens: prompts have under 1,000 bytes, --max_tokens is 50


class Server(ThreadingHTTPServer):
    """Answers chat completions; each passage meets `n_faults` faults first, in an order of its own.

    What it would bill is counted in `billed`.
    """

    daemon_threads = True

    def __init__(self, n_faults: int = 0, special=None, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.n_faults, self.special, self.delay = n_faults, special or {}, delay
        self.attempts, self.whole, self.met = Counter(), Counter(), Counter()
        self.billed, self.times, self.lock = [0, 0], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address) -> None:
        pass  # clients hang up


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words) -> None:
        pass

    def do_POST(self) -> None:
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        n = int(re.findall(r"passage (\d+)", prompt)[-1])
        with server.lock:
            attempt = server.attempts[n]
            server.attempts[n] += 1
            server.times.append(time.monotonic())
        time.sleep(server.delay)
        if n in server.special:
            return server.special[n](self, attempt, prompt)
        order = [ENDLESS[n // 8 % 2]] * (n % 8 == 3) + random.Random(n).sample(FAULTS, len(FAULTS))
        fault = order[attempt] if attempt < server.n_faults else ""
        with server.lock:
            server.met[fault] += 1
        self.answer(n, prompt, fault)

    def answer(
        self, n: int, prompt: str, fault: str = "", text: str | None = None, finish: str = "stop"
    ) -> None:
        text = f"thought {n} of {KEY}" if text is None else text
        if fault == "429":
            return self.send(
                429, json.dumps({"error": {"message": f"slow down, {KEY}"}}), {"Retry-After": "0"}
            )
        if fault == "500":
            return self.send(500, f"broken, {self.headers['Authorization']}")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        body = {
            "choices": [choice] * {"none": 0, "two": 2}.get(fault, 1),
            "usage": {"prompt_tokens": len(prompt) // 4, "completion_tokens": 40},
        }
        self.server.billed[0] += len(prompt) // 4
        self.server.billed[1] += 40
        if fault in ("slow", "hang"):
            time.sleep(0.3 if fault == "slow" else 5)
        if fault == "drop":
            return self.connection.close()
        if fault == "no usage":
            body["usage"] = {"prompt_tokens": -5, "completion_tokens": "many"}
        bodies = {
            "html": "<html>welcome</html>",
            "deep": "[" * 1_000_000,
            "null": "null",
            "list": "[1]",
            "huge": json.dumps(body) + " " * (5 << 20),
        }
        raw = bodies.get(fault, json.dumps(body))
        if fault == "drip":
            return self.drip(raw)
        if fault in ("", "slow", "no usage"):
            with self.server.lock:
                self.server.whole[n] += 1
        self.send(200, raw[: len(raw) // 2] if fault == "cut" else raw, length=len(raw))

    def drip(self, raw: str) -> None:
        with contextlib.suppress(OSError):
            for c in "HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + raw:
                self.wfile.write(c.encode())
                self.wfile.flush()
                time.sleep(0.2)

    def send(self, status: int, body: str, headers: dict | None = None, length: int | None = None) -> None:
        raw = body.encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextlib.contextmanager
def serving(**how):
    server = Server(**how)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """20 documents of 3 chunks, numbered as their chunks are.

    In each third document the second chunk is a question.
    """
    folder, documents, n = tmp_path_factory.mktemp("teacher") / "corpus", [], 0
    for d in range(20):
        document = []
        for k in range(3):
            document.append((f"This is passage {n}. ", d % 3 == 0 and k == 1))
            n += 1
        documents.append(document)
    write_corpus(folder, documents, make_tokenizer(n_vocab=256), {})
    return folder


def flags(corpus: Path, out: Path, server: Server, *more: str) -> list[str]:
    patience = 3 if getattr(server, "n_faults", 0) else 30  # a busy machine answers late
    fixed = ("--model=m", "--backoff=0.01", f"--timeout={patience}", "--max_tokens=50", "--retries=8")
    return [f"--corpus={corpus}", f"--out_dir={out}", f"--base_url={server.url}", *fixed, *more]


def run_teacher(*more: str, code: int = 0, key: str = KEY):
    """In this process; the tests of kills and interrupts start their own."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("OPENAI_API_KEY", key)
        return inside(teacher, *more, code=code)


def teach(*args, code: int = 0):
    return run_teacher(*flags(*args), code=code)


def start_teacher(*args, **how) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "data/teacher.py"), *flags(*args)]
    return subprocess.Popen(command, env=os.environ | {"OPENAI_API_KEY": KEY}, **how)


def texts(corpus: Path, out: Path) -> list[str]:
    c = open_corpus(corpus)
    thoughts = open_thoughts(out, c)
    return [c.tokenizer.decode(thoughts.span(i)) for i in range(c.n_chunks)]


def assert_no_key(folder: Path, *outputs: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert not any(KEY in output for output in outputs)


def all_thoughts(corpus: Path) -> list[str]:
    return ["" if asked else f"thought {i} of [key]" for i, asked in enumerate(open_corpus(corpus).questions)]


def records(out: Path) -> list[dict]:
    """The whole lines of answers.jsonl."""
    found, path = [], Path(f"{out}.answers/answers.jsonl")
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


# --------------------------------------------------------------------------------------------- the endpoint


def test_whatever_the_server_does_every_chunk_is_answered_once(corpus, tmp_path):
    with serving(n_faults=4) as server:
        done = teach(corpus, tmp_path / "T", server, "--concurrency=16")
    assert set(server.met) == {*FAULTS, *ENDLESS, ""}, "every fault was met"
    assert texts(corpus, tmp_path / "T") == all_thoughts(corpus)
    stored = [r["chunk"] for r in records(tmp_path / "T") if "text" in r]
    assert len(stored) == len(set(stored)) == 53, "60 chunks, 7 of them questions"
    assert sum(server.whole.values()) == 53 and max(server.whole.values()) == 1, (
        "no answer was asked for twice"
    )
    assert "53 of 53 chunks have thoughts" in done.stdout
    assert_no_key(tmp_path, done.stdout, done.stderr)
    spent = read_json(tmp_path / "T" / "meta.json")
    assert spent["tokens_in"] + spent["tokens_out"] >= sum(server.billed), (
        "what was billed, also for what broke off, is counted"
    )


def test_faults_without_end_are_counted_and_nothing_is_lost(corpus, tmp_path):
    def broken(handler, attempt, prompt):
        handler.answer(7, prompt, "two")

    def rejected(handler, attempt, prompt):
        handler.send(400, json.dumps({"error": {"message": f"too long \033[31m {KEY}"}}))

    with serving(special={7: broken, 11: rejected}) as server:
        done = teach(corpus, tmp_path / "T", server, "--retries=2", code=1)
        assert server.attempts[7] == 3 and server.attempts[11] == 1
        assert (
            "2 of 53 have no answer" in done.stderr
            and "1 x an answer that is not one message" in done.stderr
            and "1 x HTTP 400" in done.stderr
        )
        assert done.stderr.count("\n") == 1 and not (tmp_path / "T").exists()
        assert "given up: HTTP 400: too long  [31m [key]\n" in done.stdout, (
            "what the server said, once for each kind of trouble"
        )
        done = teach(corpus, tmp_path / "T", server, "--temperature=1", code=1)
        assert "--temperature=0.7 became 1.0" in done.stderr, "not asked for anew by mistake"
        done = teach(corpus, tmp_path / "T", server, "--retries=0", "--partial")
        assert (
            "51 of 53" in done.stdout
            and "2 unanswered" in done.stdout
            and texts(corpus, tmp_path / "T")[7] == ""
        )
        server.special = {}
        done = teach(corpus, tmp_path / "T", server)
        assert texts(corpus, tmp_path / "T") == all_thoughts(corpus) and max(server.whole.values()) == 1
        n = sum(server.attempts.values())
        assert (
            "complete" in teach(corpus, tmp_path / "T", server).stdout and sum(server.attempts.values()) == n
        )
        assert "--before=1 became 0" in teach(corpus, tmp_path / "T", server, "--before=0", code=1).stderr


@pytest.mark.parametrize(
    "budget, n_faults",
    [
        (300, 0),
        (1500, 0),
        (4000, 0),
        (300, 3),
        pytest.param(1500, 3, marks=pytest.mark.slow),
        pytest.param(4000, 3, marks=pytest.mark.slow),
    ],
)
def test_the_budget_is_passed_by_one_request_at_most(corpus, tmp_path, budget, n_faults):
    with serving(n_faults=n_faults, delay=0.01) as server:
        done = teach(corpus, tmp_path / "T", server, f"--budget_tokens={budget}", code=1)
        assert (
            sum(server.billed) <= budget + MOST
            and "the budget is spent" in done.stderr
            and done.stderr.count("\n") == 1
        )
        first = sum(server.billed)
        teach(corpus, tmp_path / "T", server, f"--budget_tokens={budget}", code=1)
        assert sum(server.billed) == first, "the budget counts all runs"
        if not n_faults:
            assert first > budget - 50
            teach(corpus, tmp_path / "T", server, "--usd_in=100", "--usd_out=300", "--budget_usd=0.6", code=1)
            usd = (server.billed[0] * 100 + server.billed[1] * 300) / 1e6
            assert 0.55 < usd <= 0.6 + 0.1
        done = teach(corpus, tmp_path / "T", server, "--usd_in=100", "--usd_out=300")
        assert texts(corpus, tmp_path / "T") == all_thoughts(corpus) and max(server.whole.values()) == 1
        assert f"${read_json(tmp_path / 'T' / 'meta.json')['usd']:.4f}" in done.stdout


@pytest.mark.parametrize("n_kills", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_kill_9_and_resume(corpus, tmp_path, n_kills):
    path = Path(f"{tmp_path / 'T'}.answers/answers.jsonl")
    with serving(n_faults=1, delay=0.02) as server:
        kills = 0
        while kills < n_kills:
            before = len(records(tmp_path / "T"))
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            child = start_teacher(corpus, tmp_path / "T", server, "--concurrency=3", **quiet)
            while child.poll() is None and len(records(tmp_path / "T")) < before + 4:
                time.sleep(0.005)
            child.kill()
            assert child.wait() == -9, "it was still at work"
            kills += 1
            with open(path, "ab") as f:
                f.write(b'{"chunk": 3, "key": "0123')  # a line that the kill cut short
        done = teach(corpus, tmp_path / "T", server)
    stored = [r["chunk"] for r in records(tmp_path / "T") if "text" in r]
    assert len(stored) == len(set(stored)) == 53 and texts(corpus, tmp_path / "T") == all_thoughts(corpus)
    assert sum(server.whole.values()) <= 53 + 3 * kills, "a kill costs what was in flight"
    assert_no_key(tmp_path, done.stdout)


def test_ctrl_c_waits_for_what_is_in_flight(corpus, tmp_path):
    with serving(delay=0.5) as server:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        child = start_teacher(corpus, tmp_path / "T", server, "--concurrency=4", **pipes)
        while len(server.times) < 4:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        assert (
            "waiting for the requests in flight" in out
            and err.strip() == "teacher.py: interrupted; the same command goes on from here"
        )
        assert len(records(tmp_path / "T")) == sum(server.whole.values()) == 4


def test_two_runs_on_one_folder_do_not_both_pay(corpus, tmp_path):
    with serving(delay=0.3) as server:
        quiet = {"stdout": subprocess.DEVNULL}
        child = start_teacher(corpus, tmp_path / "T", server, "--concurrency=16", **quiet)
        while not server.times:
            time.sleep(0.01)
        assert "another run is at work" in teach(corpus, tmp_path / "T", server, code=1).stderr
        assert child.wait() == 0 and max(server.whole.values()) == 1


def test_retry_after_is_meant_for_all(corpus, tmp_path):
    def limited(handler, attempt, prompt):
        if attempt:
            return handler.answer(0, prompt)
        handler.send(429, "{}", {"Retry-After": "0.8"})

    with serving(special={0: limited}, delay=0.01) as server:
        teach(corpus, tmp_path / "T", server, "--concurrency=4")
    pauses = [b - a for a, b in zip(server.times, server.times[1:])]
    assert max(pauses) > 0.7, "nobody asks meanwhile"


def test_retry_after_header():
    for said, seconds in (("3", 3), (" 0.25", 0.25), ("9" * 400, endpoint.MAX_WAIT)):
        assert endpoint.read_error(429, said, "").wait == seconds
    for bad in (None, "", "nan", "-5", "inf", "soon", "1e9", "Wed, 21 Oct 2015 07:28:00 GMT", "\u0663"):
        assert endpoint.read_error(429, bad, "").wait == 0


def test_an_answer_does_not_shorten_the_rest_that_a_server_asked_for(tmp_path):
    async def rest() -> float:
        start = time.monotonic()
        s = teacher.Settings(corpus="", out_dir="", rpm=1e6)
        meter = endpoint.Meter(s, endpoint.Answers(tmp_path / "answers.jsonl"))
        assert await meter.begin((0, 10))
        assert await meter.begin((0, 10_000))
        meter.end((0, 10), wait=0.5)
        meter.end((0, 10_000))
        assert await meter.begin((0, 10))
        return time.monotonic() - start

    assert asyncio.run(rest()) > 0.5


def asker(s: teacher.Settings, folder: Path) -> endpoint.Endpoint:
    return endpoint.Endpoint(s, endpoint.Answers(folder / "answers.jsonl"))


ENDLESS_BODIES = {
    # Some HTTP libraries take a chunk of -1 bytes for all that comes.
    "200 OK|-1": "the connection dropped",
    "200 OK|fffffffff": "more than 4 MB",
    "500 Broken|fffffffff": "HTTP 500",
}


@pytest.mark.parametrize("kind", ENDLESS_BODIES)
def test_a_chunked_body_without_end_is_not_read_to_its_end(kind, tmp_path):
    status, chunk = kind.split("|")
    sent = []

    def flood(handler, attempt, prompt):
        head = f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}\r\n"
        handler.wfile.write(head.encode())
        with contextlib.suppress(OSError):
            for _ in range(60):
                sent.append(handler.wfile.write(b"x" * (1 << 20)))

    with serving(special={0: flood}) as server:
        s = teacher.Settings(corpus="", out_dir="", base_url=server.url)
        request = {"model": "m", "messages": [{"content": "passage 0"}]}
        with pytest.raises(endpoint.Trouble, match=ENDLESS_BODIES[kind]):
            asyncio.run(asker(s, tmp_path).ask_once(request))
    assert sum(sent) < 50 << 20


def test_the_request_is_what_the_key_was_made_of_and_the_environment_adds_nothing(tmp_path, monkeypatch):
    seen = []

    class Listener(Handler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, self.headers, json.loads(body)))
            self.answer(0, "", "", "yes")

    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    request = {
        "model": "m",
        "messages": [{"role": "user", "content": "é"}],
        "max_tokens": 5,
        "top_p": 0.5,
        "logit_bias": {},
    }
    with serving() as server:
        server.RequestHandlerClass = Listener
        for key in (KEY, ""):
            monkeypatch.setenv("OPENAI_API_KEY", key)
            s = teacher.Settings(corpus="", out_dir="", base_url=server.url)
            assert asyncio.run(asker(s, tmp_path).ask_once(request))["text"] == "yes"
    for path, headers, body in seen:
        assert path == "/v1/chat/completions"
        assert body == request
        assert "127.0.0.1:9" not in "".join(headers.values())
    assert [headers["Authorization"] for _, headers, _ in seen] == [f"Bearer {KEY}", None]


def test_without_the_openai_package(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    done = teach(corpus, tmp_path / "T", SimpleNamespace(url="http://127.0.0.1:9/v1"), code=1)
    assert "--base_url: needs openai; pip install openai" in done.stderr
    assert done.stderr.count("\n") == 1


def test_rate_limit(corpus, tmp_path):
    with serving() as server:
        teach(corpus, tmp_path / "T", server, "--rpm=3000")
    spent, least = server.times[-1] - server.times[0], 52 * 0.02
    assert 0.9 * least < spent < 3 * least + 10
    assert all(b - a > 0.02 * 20 * 0.8 for a, b in zip(server.times, server.times[20:])), (
        "in no second more than the limit"
    )


@pytest.mark.parametrize("status", [401, 402, 404, 302])
def test_what_no_retry_mends_ends_the_run_at_once(corpus, tmp_path, status):
    def refuse(handler, attempt, prompt):
        body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY} \033[2J"}})
        handler.send(status, body, {"Location": f"{other.url}/chat/completions"})

    with serving(special=dict.fromkeys(range(60), refuse)) as server, serving() as other:
        done = teach(corpus, tmp_path / "T", server, "--concurrency=2", code=1)
        assert 1 <= sum(server.attempts.values()) <= 2 and not other.times, (
            "a redirection is not followed: the key would go with it"
        )
    assert (
        f"HTTP {status}: Incorrect API key provided: [key]" in done.stderr
        and done.stderr.count("\n") == 1
        and "\033" not in done.stderr
    )
    assert KEY not in done.stdout + done.stderr
    for path in Path(f"{tmp_path / 'T'}.answers").iterdir():
        assert KEY not in path.read_text()


def test_a_server_that_always_fails_ends_the_run(corpus, tmp_path):
    def fail(handler, attempt, prompt):
        handler.send(500, "")

    with serving(special=dict.fromkeys(range(60), fail)) as server:
        done = teach(corpus, tmp_path / "T", server, "--retries=1", code=1)
        assert (
            "20 requests in a row without an answer, the last: HTTP 500" in done.stderr
            and sum(server.attempts.values()) < 60
        )
        done = teach(corpus, tmp_path / "T", server, "--retries=0", "--partial", code=1)
        assert "53 of 53 have no answer" in done.stderr and not (tmp_path / "T").exists(), (
            "no folder without a thought"
        )
    done = teach(corpus, tmp_path / "T2", SimpleNamespace(url="http://127.0.0.1:9/v1"), code=1)
    assert "cannot connect to 127.0.0.1:9" in done.stderr and done.stderr.count("\n") == 1


def test_a_full_disk_cuts_no_line_into_the_next(tmp_path):
    path = tmp_path / "answers.jsonl"
    record = {"chunk": 1, "key": "0" * 16, "text": "dear", "in": 5, "out": 6}
    answers = endpoint.Answers(path)
    answers.add(record)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))  # room for ten bytes
    try:
        with pytest.raises(OSError, match="cannot keep an answer: File too large.*answers.jsonl"):
            answers.add(record | {"chunk": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.read_bytes().endswith(b"\n")
    answers.add(record | {"chunk": 2})  # another request's answer, which finds room again
    for found in (answers, endpoint.Answers(path)):
        jobs = [SimpleNamespace(id=f"{n}-{record['key']}") for n in range(3)]
        assert [found.has(job) for job in jobs] == [False, True, True]
        assert found.get(jobs[2]) == record | {"chunk": 2}
        assert found.spent.tolist() == [10, 12]


def test_damaged_lines_of_the_answers_are_passed_over(tmp_path):
    bad = [
        {"chunk": 0, "key": "f" * 99, "text": "", "in": 0, "out": 0},
        {"chunk": 3, "key": "0", "text": "", "in": 0, "out": 0},
        [],
        3,
        {"in": None},
        {},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_bytes(
        b"".join(json.dumps(line).encode() + b"\n" for line in bad) + b"\0\xff\n" + b"[" * 100_000 + b"\n"
    )
    answers = endpoint.Answers(path)
    assert not any(answers.has(SimpleNamespace(id=f"{n}-0")) for n in range(3))
    assert answers.spent.tolist() == [0, 0]


def test_back_off_without_end(tmp_path, monkeypatch):
    """Thousands of attempts: 2 ** attempt is no float any more."""
    s = teacher.Settings(corpus="", out_dir="", base_url="http://127.0.0.1:9", retries=1100, backoff=0.0)
    server = asker(s, tmp_path)

    async def gateway_timeout(request):
        raise endpoint.read_error(504, None, "")

    monkeypatch.setattr(server, "ask_once", gateway_timeout)
    job = teacher.Job(0, "0" * 16, {"messages": [{"content": ""}], "max_tokens": 20})
    assert asyncio.run(server.ask(job)).why == "HTTP 504"
    assert server.answers.spent.tolist() == [1101 * 16, 1101 * 20], (
        "a gateway that gave up: the model behind it may have answered"
    )


def test_bad_flags(corpus, tmp_path):
    def fails(*more, key=KEY):
        done = run_teacher(f"--corpus={corpus}", f"--out_dir={tmp_path / 'T'}", *more, key=key, code=1)
        assert (
            done.stderr.count("\n") == 1
            and KEY not in done.stderr
            and not (tmp_path / "T" / "meta.json").exists()
        )
        return done.stderr

    assert "--base_url" in fails()
    for url in ("ftp://x", KEY, "http://a\1b/v1", "http://x/\0", "http://x:0", "http://x y", "http://"):
        assert "such as https://HOST/v1" in fails("--model=m", f"--base_url={url}")
    for url in (f"ftp://{KEY}@x", f"https://{KEY}@x:99999/v1", f"https://u:{KEY}@[x/v1"):
        assert "without a user" in fails("--model=m", f"--base_url={url}")
    file = f"--given={tmp_path / 'x.jsonl'}"
    for two in (
        ["--base_url=http://x", "--batch_out=b"],
        ["--base_url=http://x", "--batch_in=b"],
        ["--batch_out=b", "--batch_in=b"],
        [file, "--batch_out=b"],
    ):
        assert "give one of" in fails("--model=m", *two)
    assert "without a user" in fails(
        "--model=m", f"--base_url=https://{KEY}@x/v1"
    ) and "without a user" in fails("--model=m", f"--base_url=https://x/v1?key={KEY}")
    assert "--usd_in" in fails("--model=m", "--base_url=http://127.0.0.1:9", "--budget_usd=3")
    assert "--usd_out" in fails(
        "--model=m", "--base_url=http://127.0.0.1:9", "--budget_usd=3", "--usd_in=1"
    ), "else answers cost nothing"
    assert "characters" in fails("--model=m", "--base_url=http://127.0.0.1:9", key=f"{KEY}\nX-Evil: 1")
    there = ["--model=m", "--base_url=http://127.0.0.1:9"]
    assert "missing.txt: No such file" in fails(*there, "--prompt_file=missing.txt")
    assert "--base_url" in fails("--model=missing") and "needs --model" in fails("--batch_out=b")
    assert "goes with no --model" in fails(file, "--model=m")
    assert "did you mean --budget_usd" in fails("--budget_us=3")
    (tmp_path / "prompt.txt").write_text("no place")
    assert "lacks {passage}" in fails(*there, f"--prompt_file={tmp_path / 'prompt.txt'}")
    (tmp_path / "T").mkdir(exist_ok=True)
    (tmp_path / "T" / "mine.txt").write_text("dear")
    assert (
        "was not made by this script" in fails("--given=x.jsonl") and (tmp_path / "T" / "mine.txt").exists()
    )


# ------------------------------------------------------------------------------------- prompts and judgements


def test_prompts(corpus, tmp_path):
    assert (
        teacher.fill("{before}|{passage}", "{passage} {0}", "{before} {x.__class__} \\1")
        == "{passage} {0}|{before} {x.__class__} \\1"
    )
    s = teacher.Settings(corpus=str(corpus), out_dir="x", model="m", before=2)
    task = teacher.Task(s, open_corpus(corpus))
    first, third = task.job(3).prompt, task.job(5).prompt
    assert teacher.NOTHING_BEFORE in first and "This is passage 3. \n" in first
    assert "This is passage 3. This is passage 4. \n\nPassage:\nThis is passage 5." in third, (
        "the two chunks before it, in order"
    )
    other = teacher.Settings(corpus=str(corpus), out_dir="x", model="m", before=2, max_tokens=9)
    job = teacher.Task(other, open_corpus(corpus)).job(3)
    assert job.size()[1] == 9 and job.key != task.job(3).key


def test_answers_that_cannot_be_used_are_counted(corpus, tmp_path):
    def says(text, finish="stop"):
        return lambda handler, attempt, prompt: handler.answer(0, prompt, "", text, finish)

    special = {
        0: says(""),
        2: says(None, "content_filter"),
        3: says("I'm sorry, but I can't help with that."),
        4: says("half of a", "length"),
        5: says("long " * 2000),
        6: says(f" <|END_OF_LATENT|> a<|EOS|>b {KEY[:9]}\ud800{KEY[9:]} é "),
        8: says("  \n"),
        9: says("<|START_OF_LATENT|>"),
    }
    with serving(special=special) as server:
        done = teach(corpus, tmp_path / "T", server)
    counts = read_json(tmp_path / "T" / "meta.json")["counts"]
    assert (
        counts == {"used": 46, "empty": 3, "refused": 2, "cut off": 1, "too long": 1}
        and "1 cut off, 3 empty" in done.stdout
    )
    got = texts(corpus, tmp_path / "T")
    assert got[6] == f"a b {KEY[:9]}?{KEY[9:]} é" and all(got[n] == "" for n in special if n != 6)
    done = inside(data.show, corpus, tmp_path / "T", "--check")
    assert "sound" in done.stdout


def test_answers_to_an_earlier_prompt_are_kept(corpus, tmp_path):
    with serving() as server:
        for n, words in enumerate(("{passage}", "Explain: {passage}", "{passage}")):
            (tmp_path / "prompt.txt").write_text(words)
            shutil.rmtree(tmp_path / "T", ignore_errors=True)
            teach(corpus, tmp_path / "T", server, f"--prompt_file={tmp_path / 'prompt.txt'}")
            assert sum(server.attempts.values()) == (53, 106, 106)[n]


def test_a_damaged_log_is_said_and_utf8_errors_name_the_file(corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"chunk": 3, "key": "01')
    with contextlib.redirect_stdout(io.StringIO()) as said:
        endpoint.Answers(tmp_path / "a.jsonl")
    assert "1 damaged lines are passed over" in said.getvalue()
    (tmp_path / "g.jsonl").write_bytes(b'{"chunk": 3, "thought": "x"}\n{"chunk": 5, "thought": "\xff"}\n')
    given = [f"--corpus={corpus}", f"--out_dir={tmp_path / 'T'}", f"--given={tmp_path / 'g.jsonl'}"]
    assert "g.jsonl: not UTF-8" in run_teacher(*given, code=1).stderr


def test_batch_files_keep_the_name_that_was_given(corpus, tmp_path):
    for name in ("b-4.1", "b-4.2"):
        run_teacher(
            f"--corpus={corpus}", f"--out_dir={tmp_path / 'T'}", "--model=m", f"--batch_out={tmp_path / name}"
        )
    assert sorted(path.name for path in tmp_path.glob("b-*")) == ["b-4.1-000.jsonl", "b-4.2-000.jsonl"]


def test_wrap_styles(corpus, tmp_path):
    with serving() as server:
        done = teach(corpus, tmp_path / "W", server, "--style=wrap")
        lines = [json.loads(line) for line in open(tmp_path / "W" / "texts.jsonl", encoding="utf-8")]
        assert (
            len(lines) == 20
            and [line["doc"] for line in lines] == list(range(20))
            and all(line["text"].startswith("thought") for line in lines)
        )
        assert {line["style"] for line in lines} == set(
            teacher.STYLES
        ) and "20 of 20 documents" in done.stdout
        assert max(server.whole.values()) == 1
        teach(corpus, tmp_path / "W2", server, "--style=wrap", "--seed=1")
        others = [
            json.loads(line)["style"] for line in open(tmp_path / "W2" / "texts.jsonl", encoding="utf-8")
        ]
        assert others != [line["style"] for line in lines]
        teach(corpus, tmp_path / "C", server, "--style=wrap-cot")
        assert {
            json.loads(line)["style"] for line in open(tmp_path / "C" / "texts.jsonl", encoding="utf-8")
        } == {"wrap-cot"}


# ----------------------------------------------------------------------- batch files, files, models


def test_batch_files(corpus, tmp_path):
    common = [f"--corpus={corpus}", f"--out_dir={tmp_path / 'T'}", "--model=m"]
    done = run_teacher(*common, f"--batch_out={tmp_path / 'b.jsonl'}")
    assert "53 requests in 1 files" in done.stdout
    requests = [json.loads(line) for line in open(tmp_path / "b-000.jsonl", encoding="utf-8")]
    assert {r["url"] for r in requests} == {"/v1/chat/completions"} and len(
        {r["custom_id"] for r in requests}
    ) == 53
    random.Random(0).shuffle(requests)

    def answer(r, text="because", status=200):
        body = {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2},
        }
        return {
            "id": "x",
            "custom_id": r["custom_id"],
            "response": {"status_code": status, "body": body},
            "error": None,
        }

    foreign = [
        answer({"custom_id": c}) for c in ("x", None, "1-" + "0" * 16, "99999-" + "0" * 16, "-1-" + "a" * 16)
    ]
    lines = (
        [answer(r) for r in requests[:50]]
        + [answer(requests[0], "again")]
        + [answer(requests[51], status=500), {"custom_id": requests[52]["custom_id"]}]
    )
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + foreign))
    done = run_teacher(*common, f"--batch_in={tmp_path / 'in.jsonl'}", code=1)
    assert (
        "3 of 53 have no answer" in done.stderr
        and "5 x answer to another request" in done.stderr
        and "2 x an error" in done.stderr
    )
    assert "3 requests" in run_teacher(*common, f"--batch_out={tmp_path / 'c.jsonl'}").stdout
    rest = [answer(json.loads(line)) for line in open(tmp_path / "c-000.jsonl", encoding="utf-8")]
    (tmp_path / "in2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rest))
    done = run_teacher(
        *common, f"--batch_in={tmp_path / 'in.jsonl'},{tmp_path / 'in2.jsonl'}", "--usd_in=1", "--usd_out=1"
    )
    assert (
        set(texts(corpus, tmp_path / "T")) == {"", "because"}
        and "53 of 53" in done.stdout
        and "265 tokens in, 106 out, $0.0004" in done.stdout
    )
    (tmp_path / "bad.jsonl").write_text('{"custom_id": ')
    assert (
        "bad.jsonl:1"
        in run_teacher(
            *common[:1],
            f"--out_dir={tmp_path / 'N'}",
            "--model=m",
            f"--batch_in={tmp_path / 'bad.jsonl'}",
            code=1,
        ).stderr
    )


def test_large_batches_are_split(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher, "BATCH_REQUESTS", 20)
    s = teacher.Settings(
        corpus=str(corpus), out_dir=str(tmp_path / "T"), model="m", batch_out=str(tmp_path / "b")
    )
    teacher.main(s)
    assert [len(open(path).readlines()) for path in sorted(tmp_path.glob("b-*.jsonl"))] == [
        20,
        20,
        13,
    ] and "in 3 files" in capsys.readouterr().out
    monkeypatch.setattr(teacher, "BATCH_REQUESTS", 30)
    teacher.main(s)
    assert [len(open(path).readlines()) for path in sorted(tmp_path.glob("b-*.jsonl"))] == [30, 23], (
        "what an earlier run left over would be paid for twice"
    )


def test_given_thoughts(corpus, tmp_path):
    def give(lines: str, code: int = 0):
        (tmp_path / "given.jsonl").write_text(lines)
        return run_teacher(
            f"--corpus={corpus}",
            f"--out_dir={tmp_path / 'T'}",
            f"--given={tmp_path / 'given.jsonl'}",
            code=code,
        )

    for bad in (
        '{"chunk": 60, "thought": "x"}',
        '{"chunk": true, "thought": "x"}',
        '{"chunk": 2}',
        "[]",
        "{",
        "{}",
        '{"chunk": 1, "thought": "x"}',
        '{"chunk": 5, "thought": "x"}\n{"chunk": 5, "thought": "y"}',
        '{"chunk": -1, "thought": "x"}',
    ):
        assert f"given.jsonl:{bad.count(chr(10)) + 1}: " in give(bad, code=1).stderr
    give('{"chunk": 3, "thought": "\\nthree"}\n\n{"chunk": 5, "thought": "five"}\n')
    got = texts(corpus, tmp_path / "T")
    assert got[3] == "\nthree" and got[5] == "five" and sum(map(bool, got)) == 2
    again = '{"chunk": 3, "thought": "\\nthree"}\n{"chunk": 5, "thought": "five"}'
    assert "complete: " in give(again).stdout
    assert "remove it" in give(again.replace("five", "six"), code=1).stderr


def test_a_complete_folder_of_another_prompt_is_refused(corpus, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Think: {passage}")
    with serving() as server:
        teach(corpus, tmp_path / "T", server, f"--prompt_file={prompt}")
        first = sum(server.attempts.values())
        shutil.rmtree(tmp_path / "T")
        done = teach(corpus, tmp_path / "T", server, f"--prompt_file={prompt}")
        assert "53 of 53" in done.stdout and sum(server.attempts.values()) == first == 53, (
            "made from the answers that are there"
        )
        prompt.write_text("Say: {passage}")
        done = teach(corpus, tmp_path / "T", server, f"--prompt_file={prompt}", code=1)
        assert "made with another prompt" in done.stderr
        assert sum(server.attempts.values()) == 53


def test_questions_for_a_local_model(corpus, tmp_path):
    """The files that go to eval_math.py, and what comes from it."""
    common = [f"--corpus={corpus}", f"--out_dir={tmp_path / 'T'}", "--model=m"]
    run_teacher(*common, f"--batch_out={tmp_path / 'q'}", "--batch_form=questions")
    questions = [json.loads(line) for line in open(tmp_path / "q-000.jsonl", encoding="utf-8")]
    assert len(questions) == 53 and "This is passage 0. " in questions[0]["question"]

    def result(n: int, *responses) -> str:
        return json.dumps({"problem": n, "gold": questions[n]["answer"], "responses": responses}) + "\n"

    def says(text, cut_off: bool = False) -> dict:
        return {"response": text, "cut_off": cut_off}

    odd = [
        result(0, says("greedy"), says(" sampled \n\nProblem: next", True)),
        result(1, says("half of", True)),
        result(2, says("whole\n")),
    ]
    bad = [
        result(3),
        result(4, 7),
        result(5, says(None)),
        json.dumps({"gold": questions[6]["answer"]}) + "\n",
    ]
    rest = [result(n, says(f"thought {n}")) for n in range(7, 53)]
    (tmp_path / "responses.jsonl").write_text("".join(odd + bad + rest))
    done = run_teacher(*common, f"--batch_in={tmp_path / 'responses.jsonl'}", "--partial")
    assert "4 x a line without a response" in done.stdout and "1 cut off, 4 unanswered" in done.stdout
    got = [
        text for text, asked in zip(texts(corpus, tmp_path / "T"), open_corpus(corpus).questions) if not asked
    ]
    assert got[:8] == ["sampled", "", "whole", "", "", "", "", "thought 7"]


def test_a_local_model_as_the_teacher(digits, toy_folder, tmp_path):
    """The three commands of the docstring, with a model that has learned next to nothing."""
    import eval_math

    common = [
        f"--corpus={digits / 'heldout'}",
        f"--out_dir={tmp_path / 'T'}",
        "--model=m",
        f"--prompt_file={tmp_path / 'prompt.txt'}",
    ]
    (tmp_path / "prompt.txt").write_text("{passage}")
    run_teacher(*common, f"--batch_out={tmp_path / 'q'}", "--batch_form=questions")
    asked = [
        f"--benchmark={tmp_path / 'q-000.jsonl'}",
        f"--model={toy_folder}",
        "--mode=raw",
        "--max_new=20",
        "--device=cpu",
    ]
    inside(eval_math, *asked, "--k=1", f"--out_dir={tmp_path / 'A'}")
    done = run_teacher(*common, f"--batch_in={tmp_path / 'A/responses.jsonl'}", "--max_tokens=2048")
    assert "of 30 chunks have thoughts" in done.stdout and len(records(tmp_path / "T")) == 30


@pytest.fixture(scope="module")
def toy_folder(digits, tmp_path_factory) -> Path:
    """A small model folder."""
    import train

    folder = tmp_path_factory.mktemp("local") / "M"
    data = [f"--corpus={digits / 'warm'}", f"--thoughts={digits / 'warm_thoughts'}", f"--out_dir={folder}"]
    inside(train, *data, "--max_steps=5", "--seq_len=256")
    return folder


def test_read_answer_takes_anything():
    for body in (
        None,
        3,
        [],
        {},
        {"choices": {}},
        {"choices": [3]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"message": "x"}]},
    ):
        with pytest.raises(endpoint.Trouble):
            endpoint.read_answer(body)
    for unsaid in (0, -1, 1.5, "5", None):  # no request takes nothing
        assert (
            endpoint.read_answer(
                {
                    "choices": [{"message": {"content": "x"}}],
                    "usage": {"prompt_tokens": unsaid, "completion_tokens": unsaid},
                }
            )["in"]
            is None
        )
    good = {
        "choices": [{"message": {"content": "x", "refusal": ""}, "finish_reason": ["stop"]}],
        "usage": {"prompt_tokens": True, "completion_tokens": 10**30},
    }
    assert endpoint.read_answer(good) == {"text": "x", "finish": "stop", "in": None, "out": None}
    for odd in ([1], "x", 3):  # the text is paid for, and kept
        assert endpoint.read_answer(good | {"usage": odd})["text"] == "x"
    with pytest.raises(UserError):
        endpoint.read_host("http://[bad/v1")
