"""GSM8K as a corpus: the solution is the thought, the final answer is the text.

    question (given)   Natalia sold clips to 48 of her friends ...
    thought (latent)   Natalia sold 48/2 = 24 clips in May. ...
    answer             The answer is 72.

Calculator marks such as <<48/2=24>> are removed. The published files are read,
train.jsonl and test.jsonl, with lines of {"question", "answer"} whose answer ends
in "#### 72". Written to --out_dir:

    warm/  warm_thoughts/   the first --warm training documents of a seeded
                            shuffle, with their solutions as thoughts
    raw/                    the others, without, and those of --raw_more
    heldout/                the test file
    raw_truth/  heldout_truth/    with --truth: their solutions, which no stage of
                            the loop reads; for the control `gold`, and to count
                            the picks that are what the author wrote

A line that cannot be used is refused.

    python data/gsm8k.py --train=train.jsonl --test=test.jsonl --out_dir=out/gsm8k
    python em.py --corpus=out/gsm8k --max_new=128 ...    # flags: data/README.md
"""

import json
import os
import random
import re
import sys
from dataclasses import dataclass

if not __package__:  # run as `python data/gsm8k.py`: the package is the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data.lib.cli import UserError, claim, opt, run
from data.lib.corpus import write_parts
from data.lib.sources import read_jsonl
from data.lib.tokenizer import load_tokenizer, make_tokenizer

Problem = tuple[str, str, str]  # question, solution, answer


@dataclass(kw_only=True)
class Settings:
    train: str = opt(help="GSM8K's train.jsonl")
    test: str = opt(help="GSM8K's test.jsonl")
    out_dir: str = opt(help="where the folders go")
    warm: int = opt(500, "training documents that keep their solution as a thought", low=1)
    raw: int = opt(0, "how many of the others in --train to use; 0: all", low=0)
    heldout: int = opt(0, "how many test documents to use; 0: all", low=0)
    raw_more: str = opt("", "another such file; its problems are raw, and need no solution")
    truth: bool = opt(False, "also write raw_truth and heldout_truth")
    tokenizer: str = opt("", "a tokenizer.json; none: learn one from what is trained on")
    n_vocab: int = opt(1024, "text tokens of the learned tokenizer; 256: plain bytes", low=256)
    seed: int = opt(0, "which documents are warm")


def read_problem(line: str) -> Problem:
    """The problem of a jsonl line; ValueError says what is wrong with it."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    for field in ("question", "answer"):
        text = record.get(field)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'field "{field}" is missing or empty')
        text.encode()  # refuses half a surrogate pair
    solution, mark, answer = record["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError('field "answer" does not end in "#### number"')
    solution = re.sub(r"<<[^<>]*>>", "", solution)
    return record["question"].strip(), solution.strip(), answer.strip()


def read_problems(path: str) -> list[Problem]:
    """All problems of a file; UserError for the first bad line."""
    hint = "; `python data/benchmarks.py gsm8k` fetches train.jsonl and test.jsonl"
    problems = read_jsonl(path, read_problem, hint=hint)
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return problems


def words_of(problem: Problem) -> tuple[str, ...]:
    """The question's words, numbers and operators; problems that share them are the same."""
    return tuple(re.findall(r"\w+|[+*/^=<>]|-(?=\s*\d)", problem[0].lower()))


def split_problems(s: Settings) -> dict[str, list[Problem]]:
    """The problems of warm, raw and heldout, without training problems that are tested."""
    train = read_problems(s.train)
    test = read_problems(s.test)
    random.Random(s.seed).shuffle(train)
    more = read_problems(s.raw_more) if s.raw_more else []
    known = {words_of(problem) for problem in test}
    kept = [problem for problem in train if words_of(problem) not in known]
    n_kept = len(kept)
    known |= set(map(words_of, train))
    for problem in more:
        if words_of(problem) not in known:
            kept.append(problem)
        known.add(words_of(problem))
    n_out = len(train) + len(more) - len(kept)
    if n_out:
        print(f"{n_out} problems are also test problems, or there twice: left out")
    if s.warm > n_kept or s.warm >= len(kept):
        there = f"{s.train} has {n_kept} problems that are not tested"
        raise UserError(f"--warm={s.warm}: {there}; leave some for raw")
    warm, raw, more = kept[: s.warm], kept[s.warm : n_kept], kept[n_kept:]
    n_bare = sum(not solution for _, solution, _ in warm)
    if n_bare:
        raise UserError(f"{s.train}: {n_bare} problems that would be warm have no solution")
    raw = raw[: s.raw or None] + more
    return {"warm": warm, "raw": raw, "heldout": test[: s.heldout or None]}


def write_document(problem: Problem) -> list[tuple[str, str, str]]:
    """A document of one problem: its question, thought and answer."""
    question, solution, answer = problem
    thought = f"\n{solution}" if solution else ""
    return [(question, thought, f"\nThe answer is {answer}.")]


def texts_to_learn_from(documents: dict[str, list]):
    """What a tokenizer may be learned from: all but the thoughts of raw documents."""
    for [(question, thought, answer)] in documents["warm"]:
        yield from (question, thought, answer)
    for [(question, _, answer)] in documents["raw"]:
        yield from (question, answer)


def main(s: Settings) -> None:
    thoughts = {"warm": "warm_thoughts"}
    if s.truth:
        thoughts |= {"raw": "raw_truth", "heldout": "heldout_truth"}
    documents = {}
    for part, problems in split_problems(s).items():
        documents[part] = list(map(write_document, problems))
    if s.tokenizer:
        tok = load_tokenizer(s.tokenizer)
    else:
        tok = make_tokenizer(texts_to_learn_from(documents), s.n_vocab)
    source = {"maker": "data/gsm8k.py", "seed": s.seed}
    write_parts(documents, tok, claim(s.out_dir, s), source, thoughts)


if __name__ == "__main__":
    run(main, Settings)
