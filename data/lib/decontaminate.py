"""Which documents hold a benchmark's question: 13 words in a row, or all of a short one.

    finder = Finder(questions)
    finder.find(texts)     {number of a text: (number of a question, shared words)}

Case, punctuation, accents and spacing do not count: a text is compared as the
stream of its letters and digits. The common run must begin and end where words
do on both sides, and have at least LETTERS letters and digits, so that "x = 1,
y = 2, z = 3 ..." is no match. A question too short for that must occur as a
whole; one of fewer than 15 letters must be the whole document.

Every place of every question's stream is entered in an index by the hash of the
24 bytes that follow (8 for short questions). Texts are looked up at every eighth
place only, which any common run of 31 letters must hit. Where the hashes agree,
the run is extended to both sides.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

WORDS = 13
STEP = 8  # texts are looked up at every place that is a multiple of it
LONG = 24  # bytes that are hashed
SHORT = 8  # of short questions
LETTERS = LONG + STEP - 1
# What is left of a text; a 0 stands between two texts.
KEEP = bytes(b for b in range(256) if b >= 128 or chr(b).isalnum() or b == 0)
DROP = bytes(set(range(256)) - set(KEEP))
LOWER = bytes(range(256)).lower()
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


# -------------------- streams


@lru_cache(maxsize=1 << 14)
def plain(run: str) -> str:
    """Characters beyond ASCII as letters and digits without case and accents."""
    folded = unicodedata.normalize("NFKD", run).casefold()
    folded = unicodedata.normalize("NFKD", folded)
    base = [c for c in folded if not unicodedata.combining(c)]
    return "".join(c if c.isalnum() else " " for c in base)


def fold(text: str) -> str:
    """The text with characters beyond ASCII made plain, and without zeros."""
    text = text.replace("\0", " ")
    return text if text.isascii() else NOT_ASCII.sub(lambda m: plain(m[0]), text)


def letters(folded: str) -> bytes:
    """The stream that is compared."""
    return folded.encode("utf-8", "replace").translate(LOWER, DROP)


def word_ends(folded: str) -> list[int]:
    """[0, end of the first word, ...] as places in letters(folded)."""
    ends = [0]
    for word in re.findall(r"[^\W_]+", folded):
        ends.append(ends[-1] + len(word.encode()))
    return ends


def hashes(stream: bytes, width: int, step: int) -> np.ndarray:
    """[places] uint64: hashes of `width` bytes at every step-th place. The upper bits are the good
    ones."""
    if len(stream) < width:
        return np.zeros(0, np.uint64)
    n = (len(stream) - width) // step + 1
    total = np.zeros(n, np.uint64)
    for i in range(width // 8):
        words = np.ndarray((n,), "<u8", buffer=stream, offset=8 * i, strides=(step,))
        total += words * FACTORS[i]
    return (total ^ (total >> np.uint64(29))) * FACTORS[0]


class Hit(NamedTuple):
    """A place in a stream of texts where the hash is that of a place in a question."""

    at: int  # in the stream of texts
    question: int
    place: int  # in the question's stream


class Index:
    """Where each hash occurs in the questions' streams."""

    def __init__(self, streams: dict[int, bytes], width: int):
        self.width = width
        found = [hashes(stream, width, 1) for stream in streams.values()]
        counts = np.array([len(h) for h in found], np.int64)
        keys = np.concatenate([np.zeros(0, np.uint64), *found])
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self.question = np.repeat(np.array(list(streams), np.int64), counts)[order]
        places = [np.arange(count) for count in counts]
        self.place = np.concatenate([np.zeros(0, np.int64), *places])[order]
        # A table of the upper bits that occur settles most places of most texts.
        n_bits = max(16, len(keys).bit_length() + 3)
        self.shift = np.uint64(64 - n_bits)
        self.maybe = np.zeros(1 << n_bits, dtype=bool)
        self.maybe[self.keys >> self.shift] = True

    def look_up(self, stream: bytes) -> Iterator[Hit]:
        """Wherever the hashes agree."""
        if not len(self.keys):
            return
        keys = hashes(stream, self.width, STEP)
        at = np.flatnonzero(self.maybe[keys >> self.shift])
        first = np.searchsorted(self.keys, keys[at], "left")
        last = np.searchsorted(self.keys, keys[at], "right")
        for i in np.flatnonzero(last > first).tolist():
            for j in range(int(first[i]), int(last[i])):
                yield Hit(int(at[i]) * STEP, int(self.question[j]), int(self.place[j]))


# -------------------- search


class Finder:
    """The questions, ready to be looked for."""

    def __init__(self, questions: list[str]):
        folded = [fold(question) for question in questions]
        self.streams = [letters(f) for f in folded]
        self.ends = [word_ends(f) for f in folded]
        runs = {}  # {number: stream} of those of which a run is enough
        wholes = {}  # of those that must occur as a whole
        self.exact = {}  # {stream: number} of those that must be the document
        for i, (stream, ends) in enumerate(zip(self.streams, self.ends)):
            if len(ends) > WORDS and len(stream) >= LETTERS:
                runs[i] = stream
            elif len(stream) >= SHORT + STEP - 1:
                wholes[i] = stream
            elif stream:
                self.exact.setdefault(stream, i)
        self.runs = Index(runs, LONG)
        self.wholes = Index(wholes, SHORT)

    def find(self, texts: list[str]) -> dict[int, tuple[int, str]]:
        """{number of a text: (number of a question, the words they share)}"""
        folded = [fold(text) for text in texts]
        stream = letters("\0".join(folded))
        zeros = np.flatnonzero(np.frombuffer(stream, np.uint8) == 0)
        starts = [0, *(zeros + 1).tolist()]
        found: dict[int, tuple[int, str]] = {}
        for index, search in ((self.runs, self.common_run), (self.wholes, self.whole)):
            tried = set()
            for hit in index.look_up(stream):
                number = bisect_right(starts, hit.at) - 1
                shift = hit.at - hit.place  # places of one run have the same
                if number in found or (hit.question, shift) in tried:
                    continue
                tried.add((hit.question, shift))
                run = search(stream, hit)
                if not run:
                    continue
                shift -= starts[number]
                words = self.confirm(hit.question, *run, shift, folded[number])
                if words:
                    found[number] = (hit.question, words)
        self.find_exact(stream, found)
        return found

    def find_exact(self, stream: bytes, found: dict[int, tuple[int, str]]) -> None:
        """Add the texts that are nothing but a short question."""
        if self.exact:
            for number, alone in enumerate(stream.split(b"\0")):
                if alone in self.exact:
                    found.setdefault(number, (self.exact[alone], alone.decode()))

    def common_run(self, stream: bytes, hit: Hit) -> tuple[int, int] | None:
        """The longest run around a hit, if it has enough words. (start, end) in the stream of the
        question."""
        other = self.streams[hit.question]
        shift = hit.at - hit.place
        low = high = hit.place
        while low and shift + low and stream[shift + low - 1] == other[low - 1]:
            low -= 1
        limit = min(len(other), len(stream) - shift)
        while high < limit and stream[shift + high] == other[high]:
            high += 1
        ends = self.ends[hit.question]
        n_ends = bisect_right(ends, high) - bisect_left(ends, low)
        return (low, high) if n_ends > WORDS and high - low >= LETTERS else None

    def whole(self, stream: bytes, hit: Hit) -> tuple[int, int] | None:
        """The same for a question that must occur as a whole."""
        other = self.streams[hit.question]
        start = hit.at - hit.place
        occurs = start >= 0 and stream.startswith(other, start)
        return (0, len(other)) if occurs else None

    def confirm(self, question: int, low: int, high: int, shift: int, folded: str) -> str:
        """The words of a run that end where words do on both sides; "" for too few. shift: from a place
        in the question to the place in the text's own stream."""
        theirs = set(word_ends(folded))
        stream = self.streams[question]
        ends = self.ends[question]
        inside = range(bisect_left(ends, low), bisect_right(ends, high))
        common = [i for i in inside if ends[i] + shift in theirs]
        if not common:
            return ""
        first = common[0]
        last = common[-1]
        n_letters = ends[last] - ends[first]
        if n_letters < len(stream) and (last - first < WORDS or n_letters < LETTERS):
            return ""
        spans = zip(ends[first:last], ends[first + 1 : last + 1])
        return " ".join(stream[a:b].decode() for a, b in spans)
