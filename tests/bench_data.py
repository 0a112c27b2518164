"""Speed, memory and the promises of data/text.py, measured.

    python tests/bench_data.py --tokenizer=../shared/data/llama2 --out_dir=/tmp/bench --mb=200
    python tests/bench_data.py --tokenizer=../shared/data/llama2 --out_dir=/tmp/bench --mb=1000 --what=memory
    python tests/bench_data.py --tokenizer=../shared/data/llama2 --out_dir=/tmp/bench --what=chunks
    python tests/bench_data.py --tokenizer=../shared/data/llama2 --out_dir=/tmp/bench --what=benchmarks

The text is the calculus book and GSM8K over and over, one page or ten problems a document,
half and half by bytes, each time with other numbers and some words exchanged.

It is compared with tiktoken alone: encode_ordinary_batch() with as many threads as text.py has
workers, on the same documents in memory, with our encoding and, for byte fallback tokenizers,
with the plain one, whose words end at spaces alone (data/lib/tokenizer.py parts them finer).
A harder comparison is with as many processes as workers, each of which calls
encode_to_numpy() for its share of the documents. CPU time is printed beside wall time, because
other load on the machine changes it less.

Memory is the largest sum of what all processes hold (Pss in /proc, where shared pages count
once), looked at every 50 ms, or every 250 ms with --what=speed.
"""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.lib.chunking import chunk, sentence_ends, text_digest
from data.lib.cli import opt, run
from data.lib.decontaminate import Finder
from data.lib.tokenizer import SPACED_WORDS, load_tokenizer, tiktoken_of


@dataclass(kw_only=True)
class Settings:
    tokenizer: str = opt(help="folder with a tokenizer.json")
    out_dir: str = opt(help="where text and corpora go")
    data: str = opt(str(ROOT.parent / "shared/data"), "folder with gsm8k/ and calculus/")
    what: Literal["speed", "memory", "chunks", "benchmarks"] = opt("speed", "memory: without the comparisons")
    mb: int = opt(200, "megabytes of text", low=1)
    workers: int = opt(2, "processes of text.py, threads of tiktoken", low=1)
    repeats: int = opt(3, "alternating runs", low=1)
    flags: str = opt("", "more flags for text.py, separated by spaces")


def read(path: Path, *fields: str) -> list[str]:
    return ["\n".join(json.loads(line)[f] for f in fields) for line in open(path, encoding="utf-8")]


def perturbed(text: str, rng: random.Random) -> str:
    """Other numbers, and a twentieth of the longer words spelt backwards."""
    text = re.sub(r"[1-9]", lambda m: rng.choice("123456789"), text)
    return re.sub(r"\b[a-z]{5,}\b", lambda m: m[0][::-1] if rng.random() < 0.05 else m[0], text)


def make_text(data: Path, path: Path, n_bytes: int) -> None:
    if path.exists():
        return
    pages, problems = (
        read(data / "calculus/calculus_made_easy.jsonl", "text"),
        read(data / "gsm8k/train.jsonl", "question", "answer"),
    )
    tens = ["\n\n".join(problems[i : i + 10]) for i in range(0, len(problems) - 10, 10)]
    rng, written = random.Random(0), [0, 0]
    with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as f:
        while sum(written) < n_bytes:
            kind = written[1] < written[0]
            text = perturbed(rng.choice(tens if kind else pages), rng)
            written[kind] += len(text.encode())
            f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def children(pid: int) -> list[int]:
    try:
        found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [q for p in found for q in children(p)]


def held(pid: int) -> int:
    """Bytes that a process and its children hold."""
    total = 0
    for p in [pid, *children(pid)]:
        try:
            total += 1024 * int(
                re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{p}/smaps_rollup").read_text(), re.MULTILINE)[1]
            )
        except (OSError, TypeError):
            pass
    return total


def cpu(who: int = resource.RUSAGE_SELF) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def run_text(s: Settings, text: Path, out: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, bytes at the peak) of data/text.py."""
    shutil.rmtree(out, ignore_errors=True)
    peak, begin, before = 0, time.perf_counter(), cpu(resource.RUSAGE_CHILDREN)
    flags = [f"--tokenizer={s.tokenizer}", f"--out_dir={out}", f"--workers={s.workers}", *s.flags.split()]
    process = subprocess.Popen([sys.executable, str(ROOT / "data/text.py"), str(text), *flags])
    while process.poll() is None:
        peak = max(peak, held(process.pid))
        time.sleep(0.05 if s.what == "memory" else 0.25)
    seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit("data/text.py failed")
    return seconds, cpu(resource.RUSAGE_CHILDREN) - before, peak


def encode_share(barrier, spent, folder: str, path: Path, number: int, of: int) -> None:
    tok = load_tokenizer(folder)
    texts = [tok.prepare(text) for text in documents(path)[number::of]]
    barrier.wait()
    begin = cpu()
    for text in texts:
        tok.encoding.encode_to_numpy(text)
    spent[number] = cpu() - begin
    barrier.wait()


def documents(path: Path) -> list[str]:
    return read(path, "text")


def tiktoken_processes(s: Settings, text: Path) -> tuple[float, float]:
    barrier, spent = multiprocessing.Barrier(s.workers + 1), multiprocessing.Array("d", s.workers)
    processes = [
        multiprocessing.Process(target=encode_share, args=(barrier, spent, s.tokenizer, text, i, s.workers))
        for i in range(s.workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    begin = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - begin
    for process in processes:
        process.join()
    return seconds, sum(spent)


def tiktoken_spaces(s: Settings, text: Path) -> tuple[float, float]:
    """The plain way for a byte fallback tokenizer: words end at spaces alone."""
    return tiktoken_threads(
        s, text, tiktoken_of(SPACED_WORDS, load_tokenizer(s.tokenizer).encoding._mergeable_ranks)
    )


def tiktoken_threads(s: Settings, text: Path, encoding=None) -> tuple[float, float]:
    """In pieces of 4,096 documents, so that its lists of ids need not fit in memory all together."""
    tok, seconds, spent, texts = load_tokenizer(s.tokenizer), 0.0, 0.0, documents(text)
    encoding = encoding or tok.encoding
    for i in range(0, len(texts), 4096):
        prepared = [tok.prepare(t) for t in texts[i : i + 4096]]
        begin, before = time.perf_counter(), cpu()
        encoding.encode_ordinary_batch(prepared, num_threads=s.workers)
        seconds, spent = seconds + time.perf_counter() - begin, spent + cpu() - before
    return seconds, spent


COMPARED = {"threads": tiktoken_threads, "processes": tiktoken_processes}


def speed(s: Settings) -> None:
    out = Path(s.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    text = out / f"text{s.mb}.jsonl"
    make_text(Path(s.data), text, s.mb * 10**6)
    n_bytes = sum(len(t.encode()) for t in documents(text)) if s.what == "speed" else s.mb * 10**6
    compared = (
        {"threads, words end at spaces": tiktoken_spaces} if load_tokenizer(s.tokenizer).spaced else {}
    ) | COMPARED
    for _ in range(s.repeats if s.what == "speed" else 1):
        seconds, spent, peak = run_text(s, text, out / "corpus")
        print(
            f"text.py {n_bytes / seconds / 1e6:.1f} MB/s ({seconds:.1f} s, CPU {spent:.1f} s), "
            f"{peak / 1e6:,.0f} MB at the peak",
            flush=True,
        )
        for name, measure in compared.items() if s.what == "speed" else ():
            theirs, their_cpu = measure(s, text)
            print(
                f"  tiktoken, {s.workers} {name}: {n_bytes / theirs / 1e6:.1f} MB/s "
                f"({theirs:.1f} s, CPU {their_cpu:.1f} s): "
                f"{theirs / seconds:.0%} of its speed, {their_cpu / spent:.0%} by CPU time",
                flush=True,
            )


# -------------------------------------------------------------------- the promises

FORMULA = re.compile(
    r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\\[.*?\\\]|\\\(.*?\\\)|\$\$.+?\$\$|\$(?:(?!\n\s*\n)[^$])+\$",
    re.DOTALL,
)
NUMBER = re.compile(r"\d+(?:[.,]\s?\d+)*")
LINK = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+\.\w+")


def torn(text: str, ends: list[int]) -> dict[str, int]:
    """How many of the ends lie inside a formula, a number, a link."""
    return {
        name: sum(
            m.start() < end < m.end() for m in pattern.finditer(text) for end in ends if end < len(text)
        )
        for name, pattern in (("formulas", FORMULA), ("numbers", NUMBER), ("links", LINK))
    }


def punkt_ends(text: str) -> list[int]:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return [start for start, _ in PunktSentenceTokenizer().span_tokenize(text)][1:] + [len(text)]


def total(counts) -> dict[str, int]:
    counts = list(counts)
    return {name: sum(c[name] for c in counts) for name in counts[0]}


def chunks(s: Settings) -> None:
    pages = read(Path(s.data) / "calculus/calculus_made_easy.jsonl", "text")
    ours = list(map(sentence_ends, pages))
    print(f"calculus: {sum(map(len, ours)):,} sentences; torn: {total(map(torn, pages, ours))}")
    try:
        theirs = [punkt_ends(page) for page in pages]
        print(
            f"punkt, untrained: {sum(map(len, theirs)):,} sentences; torn: {total(map(torn, pages, theirs))}"
        )
    except ImportError:
        print("punkt: nltk is not installed")
    counts = [
        n
        for seed in range(20)
        for page, ends in zip(pages, ours)
        for n in sentences_a_chunk(page, ends, seed)
    ]
    print(
        f"calculus page by page, 20 seeds: {sum(counts) / len(counts):.2f} sentences a chunk, "
        f"{max(counts)} at most"
    )
    long, n = "\n\n".join(pages), 40
    counts = [n for seed in range(n) for n in sentences_a_chunk(long, sentence_ends(long), seed)]
    print(
        f"the whole book as one text, {n} seeds: {sum(counts) / len(counts):.2f} sentences a chunk, "
        f"{max(counts)} at most"
    )


def sentences_a_chunk(text: str, ends: list[int], seed: int) -> list[int]:
    index, counts, at, done = {end: i + 1 for i, end in enumerate(ends)}, [], 0, 0
    for piece in chunk([text], [text_digest(text.encode(), seed)])[0]:
        at += len(piece)
        counts.append(index[at] - done)
        done = index[at]
    return counts


# ----------------------------------------------------------------- decontamination


def planted(question: str, rng: random.Random) -> str:
    """A question with other case, spacing and punctuation."""
    text = rng.choice((str.upper, str.lower, str.title, str.swapcase))(question)
    text = re.sub(r"[,.;:!?'’-]", lambda m: rng.choice(("", " ", m[0], "...")), text)
    return re.sub(r"\s+", lambda m: rng.choice((" ", "  ", "\n", "\t", "\u00a0", " \n\n ")), text)


def benchmarks(s: Settings) -> None:
    """100 test questions hidden in 20,000 documents of GSM8K's training set and the calculus book."""
    data, rng = Path(s.data), random.Random(1)
    questions, problems = (
        read(data / "gsm8k/test.jsonl", "question"),
        read(data / "gsm8k/train.jsonl", "question", "answer"),
    )
    paragraphs = [
        p
        for page in read(data / "calculus/calculus_made_easy.jsonl", "text")
        for p in page.split("\n\n")
        if len(p) > 60
    ]
    texts = problems + [
        rng.choice(paragraphs) + "\n\n" + perturbed(rng.choice(problems), rng)
        for _ in range(20_000 - len(problems))
    ]
    holders = rng.sample(range(len(texts)), 100)
    for i, question in zip(holders, rng.sample(questions, 100)):
        texts[i] = (
            rng.choice((texts[i] + "\n", "")) + planted(question, rng) + rng.choice(("\n" + texts[i], ""))
        )
    begin = time.perf_counter()
    finder = Finder(questions)
    built = time.perf_counter()
    found = {}
    for i in range(0, len(texts), 2000):
        found |= {i + j: match for j, match in finder.find(texts[i : i + 2000]).items()}
    spent, size = time.perf_counter() - built, sum(len(t.encode()) for t in texts)
    others = set(found) - set(holders)
    print(
        f"{len(set(found) & set(holders))} of 100 planted found; {len(others)} of {len(texts) - 100} "
        f"others flagged ({len(others) / (len(texts) - 100):.3%}); "
        f"index {built - begin:.2f} s, {size / spent / 1e6:.0f} MB/s"
    )
    for i in sorted(others)[:20]:
        print(f"  also: {found[i][1]}")


def main(s: Settings) -> None:
    {"speed": speed, "memory": speed, "chunks": chunks, "benchmarks": benchmarks}[s.what](s)


if __name__ == "__main__":
    run(main, Settings)
