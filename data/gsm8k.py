"""GSM8K as a corpus: the question is given, the worked solution is the thought, the text is the final answer.

    question (given)   Natalia sold clips to 48 of her friends ...
    thought (latent)   Natalia sold 48/2 = 24 clips in May. ...          (calculator marks <<48/2=24>> removed)
    answer             The answer is 72.

From the published jsonl files (train.jsonl, test.jsonl: {"question", "answer"}, the answer ending in "#### 72"), written to --out_dir:

    warm/  warm_thoughts/   the first --warm training documents of a seeded shuffle, with their solutions as thoughts
    raw/                    the others, without: their solutions are written nowhere
    heldout/                the test file

With --questions_and_solutions instead, raw/ and heldout/ hold plain text with the solution in it (question, solution, answer), and there
is no warm start: the corpus for ordinary training. A line that cannot be used is counted and, unless --skip_bad, refused.

    python data/gsm8k.py --train=gsm8k/train.jsonl --test=gsm8k/test.jsonl --out_dir=out/gsm8k
    python em.py --corpus=out/gsm8k
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


@dataclass(kw_only=True)
class Settings:
    train: str = opt(help="GSM8K's train.jsonl")
    test: str = opt(help="GSM8K's test.jsonl")
    out_dir: str = opt(help="where the folders go")
    warm: int = opt(500, "training documents that keep their solution as a thought", low=1)
    raw: int = opt(0, "how many of the others to use; 0: all", low=0)
    heldout: int = opt(0, "how many test documents to use; 0: all", low=0)
    questions_and_solutions: bool = opt(False, "plain text with the solutions, no thoughts")
    skip_bad: bool = opt(False, "leave out lines that cannot be used, and count them")
    tokenizer: str = opt("", "a tokenizer.json; none: learn one from the questions and the warm documents")
    n_vocab: int = opt(1024, "text tokens of the learned tokenizer; 256: plain bytes", low=256)
    seed: int = opt(0, "which documents are warm")


def read_problem(line: str) -> tuple[str, str, str]:
    """(question, solution, answer) of a jsonl line; ValueError says what is wrong with it."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    for field in ("question", "answer"):
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise ValueError(f'field "{field}" is missing or empty')
    solution, mark, answer = record["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError('field "answer" does not end in "#### number"')
    return record["question"].strip(), re.sub(r"<<[^<>]*>>", "", solution).strip(), answer.strip()


def read_problems(path: str, skip_bad: bool) -> list[tuple[str, str, str]]:
    """All problems of a jsonl file. UserError for the first bad line, or, with skip_bad, a printed count."""
    problems = read_jsonl(path, read_problem, skip_bad, hint="; `python data/benchmarks.py gsm8k` fetches train.jsonl and test.jsonl")
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return problems


def main(s: Settings) -> None:
    train, test = read_problems(s.train, s.skip_bad), read_problems(s.test, s.skip_bad)
    random.Random(s.seed).shuffle(train)
    n_warm = 0 if s.questions_and_solutions else s.warm
    tested = {question for question, _, _ in test}
    kept = [problem for problem in train if problem[0] not in tested]
    if len(kept) < len(train):
        print(f"{len(train) - len(kept)} training problems are also test problems: left out")
    if n_warm >= len(kept):
        raise UserError(f"--warm={s.warm}: {s.train} has {len(kept)} problems that are not tested; leave some for raw")
    raw = kept[n_warm : n_warm + s.raw if s.raw else None]
    parts = {"warm": kept[:n_warm], "raw": raw, "heldout": test[: s.heldout or None]}
    if s.questions_and_solutions:
        documents = {part: [[(q, "", f"\n{solution}\nThe answer is {a}.")] for q, solution, a in parts[part]] for part in ("raw", "heldout")}
    else:
        documents = {part: [[(q, f"\n{solution}", f"\nThe answer is {a}.")] for q, solution, a in problems] for part, problems in parts.items()}
    seen = [text for d in documents.get("warm", ()) for problem in d for text in problem]
    seen += [text for d in documents["raw"] for q, _, answer in d for text in (q, answer)]  # never a raw document's thought
    tok = load_tokenizer(s.tokenizer) if s.tokenizer else make_tokenizer(seen, s.n_vocab)
    source = {"maker": "data/gsm8k.py", "seed": s.seed, "questions_and_solutions": s.questions_and_solutions}
    write_parts(documents, tok, claim(s.out_dir, s), source, {} if s.questions_and_solutions else {"warm": "warm_thoughts"})


if __name__ == "__main__":
    run(main, Settings)
