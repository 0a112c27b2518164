"""Responses of eval_math.py: which chunks of a corpus they answer, where they end, their file."""

import json
import os
import time
from pathlib import Path

import numpy as np

from data.lib.cli import Progress, naming, replacing
from data.lib.corpus import Corpus


def first_line(text: str) -> str:
    """A text to the end of its first line that says something.

    "\\n It is 9.\\nTom has" -> "\\n It is 9."
    """
    begin = len(text) - len(text.lstrip())
    return text[:begin] + text[begin:].partition("\n")[0]


def asked_chunks(corpus: Corpus) -> np.ndarray:
    """The numbers of the chunks right behind a question of their document: the answers."""
    behind = np.flatnonzero(corpus.questions[:-1]) + 1
    same_doc = corpus.doc_of(behind) == corpus.doc_of(behind - 1)
    return behind[same_doc & ~corpus.questions[behind]]


def answers_end_with_line(corpus: Corpus) -> bool:
    """Whether a response to this corpus's questions ends where its first line ends.

    A document is chunks end to end: nothing but the beginning of the next chunk says that
    an answer is over, and a model goes on with that chunk. So the corpus must show where
    an answer ends: some answers are followed by another chunk of their document, each
    such chunk begins on a new line, and no answer has a line end inside. Elsewhere, as in
    documents of one problem, a response ends at EOS.
    """
    answers = asked_chunks(corpus)
    behind = answers[answers + 1 < corpus.n_chunks] + 1
    behind = behind[corpus.doc_of(behind) == corpus.doc_of(behind - 1)]
    if not len(behind):
        return False
    if not all(corpus.text(i).startswith("\n") for i in behind):
        return False
    return not any("\n" in corpus.text(i).strip() for i in answers)


class Records:
    """A jsonl file that grows by blocks of records, a record a problem.

    It has a temporary name until it is whole, so that a run that was cut off goes on
    behind its last whole block. Blocks begin at multiples of `block` in either run:
    the problems of a block are answered together.
    """

    def __init__(self, path: Path, keys: list[int], block: int):
        """keys: what "problem" must be in each record."""
        self.path = path
        self.partial = path.with_suffix(".partial.jsonl")
        self.n = len(keys)
        self.records = self.read(path if path.exists() else self.partial, keys, block)
        self.whole = path.exists() and len(self.records) == self.n
        if not self.whole:
            with replacing(self.partial) as temporary:
                temporary.write_bytes(self.lines(self.records))
            self.add([])  # a kill may have come right behind the last block

    @staticmethod
    def read(path: Path, keys: list[int], block: int) -> list[dict]:
        records = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a kill cut this line short, or it is the end of the file
            if len(records) == len(keys) or record.get("problem") != keys[len(records)]:
                break
            records.append(record)
        if len(records) < len(keys):
            del records[len(records) // block * block :]
        return records

    @staticmethod
    def lines(records: list[dict]) -> bytes:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        return "".join(lines).encode("utf-8", "replace")

    def add(self, records: list[dict]) -> None:
        with naming(self.partial), open(self.partial, "ab") as f:
            f.write(self.lines(records))
        self.records += records
        if len(self.records) == self.n:
            os.replace(self.partial, self.path)
            self.whole = True


class Meter(Progress):
    """A progress line that shows how fast tokens are sampled."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        super().__init__(label, total, unit, done)
        self.done = done
        self.tokens = 0
        self.figures = {}

    def at(self, done: int, **figures) -> None:
        """Where the work stands, to be shown from now on."""
        self.done = done
        self.figures = figures

    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(time.time() - self.start, 1e-9)

    def on_tokens(self, n: int) -> None:
        self.tokens += n
        self.update(self.done, **self.figures, sampled=f"{self.rate():,.0f} tok/s")
