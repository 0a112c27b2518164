"""Which documents hold a benchmark's question: 13 words of it in a row, or all of a shorter one.

Case, punctuation, accents and the spacing inside do not count: a text is compared as the stream of its letters and digits. The run must
begin and end where words do on both sides, and have LETTERS letters and digits at least, so that "x = 1, y = 2, z = 3 ..." is no
match. Of a question that is too short for that, the whole must occur; one of fewer than 15 letters must be the whole document.

    finder = Finder(questions)
    finder.find(texts)     {number of a text: (number of a question, the words they share)}

How: every place of every question's stream is entered by the hash of the 24 bytes that follow (8 for short ones); texts are looked up at every
eighth place only, which any common run of 31 letters must hit, and where the hashes agree the run is extended to both sides.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from functools import lru_cache

import numpy as np

WORDS, STEP = 13, 8
LETTERS = 24 + STEP - 1
KEEP = bytes(b for b in range(256) if b >= 128 or chr(b).isalnum() or b == 0)  # what is left of a text; 0 parts two texts
LOWER = bytes(b + 32 if 65 <= b <= 90 else b for b in range(256))
DROP = bytes(set(range(256)) - set(KEEP))
FACTORS = [np.uint64(f) for f in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


@lru_cache(maxsize=1 << 14)
def plain(run: str) -> str:
    """Characters beyond ASCII, lower case, without accents; a space for what is no letter or digit."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", run).casefold())
    return "".join(c if c.isalnum() else " " for c in folded if not unicodedata.combining(c))


def fold(text: str) -> str:
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
    """A hash of the `width` bytes at each `step`-th place. One multiplication for every 8 bytes; the upper bits are the good ones."""
    n = (len(stream) - width) // step + 1 if len(stream) >= width else 0
    total = np.zeros(n, dtype=np.uint64)
    for i in range(width // 8):
        total += np.ndarray((n,), dtype="<u8", buffer=stream, offset=8 * i, strides=(step,)) * FACTORS[i] if n else 0
    return (total ^ (total >> np.uint64(29))) * FACTORS[0]


class Index:
    """Where each hash occurs in the questions' streams."""

    def __init__(self, streams: dict[int, bytes], width: int):
        self.width = width
        found = [(i, hashes(stream, width, 1)) for i, stream in streams.items()]
        keys = np.concatenate([h for _, h in found]) if found else np.zeros(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self.question = np.repeat([i for i, _ in found], [len(h) for _, h in found]).astype(np.int64)[order]
        self.place = (np.concatenate([np.arange(len(h)) for _, h in found]) if found else keys.astype(np.int64))[order]
        self.shift = np.uint64(64 - max(16, len(keys).bit_length() + 3))
        self.maybe = np.zeros(1 << (64 - int(self.shift)), dtype=bool)  # most places of most texts are done with this table
        self.maybe[self.keys >> self.shift] = True

    def look_up(self, stream: bytes):
        """(place in the stream, question, place in the question) wherever the hashes agree."""
        if not len(self.keys):
            return
        keys = hashes(stream, self.width, STEP)
        at = np.flatnonzero(self.maybe[keys >> self.shift])
        first, last = (np.searchsorted(self.keys, keys[at], side) for side in ("left", "right"))
        for i in np.flatnonzero(last > first).tolist():
            for j in range(int(first[i]), int(last[i])):
                yield int(at[i]) * STEP, int(self.question[j]), int(self.place[j])


class Finder:
    """The questions, ready to be looked for."""

    def __init__(self, questions: list[str]):
        folded = [fold(q.replace("\0", " ")) for q in questions]
        self.streams, self.ends = [letters(q) for q in folded], [word_ends(q) for q in folded]
        whole = [len(e) <= WORDS or len(s) < LETTERS for s, e in zip(self.streams, self.ends)]
        self.exact = {s: i for i, s in reversed(list(enumerate(self.streams))) if 0 < len(s) < 8 + STEP - 1}
        self.runs = Index({i: s for i, s in enumerate(self.streams) if not whole[i]}, 24)
        self.wholes = Index({i: s for i, s in enumerate(self.streams) if whole[i] and len(s) >= 8 + STEP - 1}, 8)

    def find(self, texts: list[str]) -> dict[int, tuple[int, str]]:
        folded = [fold(text if "\0" not in text else text.replace("\0", " ")) for text in texts]
        stream = letters("\0".join(folded))
        starts = [0, *(np.flatnonzero(np.frombuffer(stream, np.uint8) == 0) + 1).tolist()]
        found: dict[int, tuple[int, str]] = {}
        for index, search in ((self.runs, self.common_run), (self.wholes, self.whole)):
            tried = set()
            for at, question, place in index.look_up(stream):
                number = bisect_right(starts, at) - 1
                if number in found or (question, at - place) in tried:
                    continue
                tried.add((question, at - place))
                if run := search(stream, at, question, place):
                    self.confirm(found, number, folded[number], stream, starts[number], question, *run)
        if self.exact:
            for number, start in enumerate(starts):
                alone = stream[start : starts[number + 1] - 1 if number + 1 < len(starts) else None]
                if alone in self.exact:
                    found.setdefault(number, (self.exact[alone], alone.decode()))
        return found

    def common_run(self, stream: bytes, at: int, question: int, place: int) -> tuple[int, int, int] | None:
        """The longest run around two places that agree, as (start in the stream, start, end in the question), if it has enough words."""
        other, shift = self.streams[question], at - place
        low, high = place, place
        while low and shift + low and stream[shift + low - 1] == other[low - 1]:
            low -= 1
        limit = min(len(other), len(stream) - shift)
        while high < limit and stream[shift + high] == other[high]:
            high += 1
        ends = self.ends[question]
        enough = bisect_right(ends, high) - bisect_left(ends, low) > WORDS and high - low >= LETTERS
        return (shift + low, low, high) if enough else None

    def whole(self, stream: bytes, at: int, question: int, place: int) -> tuple[int, int, int] | None:
        start, other = at - place, self.streams[question]
        return (start, 0, len(other)) if start >= 0 and stream[start : start + len(other)] == other else None

    def confirm(self, found: dict, number: int, folded: str, stream: bytes, start: int, question: int, at: int, low: int, high: int) -> None:
        """Keep a run if what is left of it between words of both sides is enough."""
        theirs, ends = set(word_ends(folded)), self.ends[question]
        common = [i for i in range(bisect_left(ends, low), bisect_right(ends, high)) if ends[i] - low + at - start in theirs]
        if not common:
            return
        first, last = common[0], common[-1]
        n_letters = ends[last] - ends[first]
        if last - first >= WORDS and n_letters >= LETTERS or n_letters == len(self.streams[question]):
            other = self.streams[question]
            words = [other[a:b].decode() for a, b in zip(ends[first:last], ends[first + 1 : last + 1])]
            found[number] = (question, " ".join(words))
