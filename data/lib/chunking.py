r"""Documents as sentences, and runs of sentences as chunks. Nothing is lost: the pieces joined are the text.

    sentence_ends(texts)      for each text the positions at which its sentences end; the last one is its length
    chunk(texts, digests)     for each text its chunks of 1 + Poisson(7) sentences, at most 20 (8 in the mean), as in the paper

A sentence ends at . ! ? and what closes it, when white space and no lower-case letter follow; at a blank line; before a list item or
a heading. White space goes to the front of the next sentence, a blank line to the back of the one before. No end lies inside

    $...$  $$...$$  \(...\)  \[...\]  \begin{x}...\end{x}     ``` fences, `code`, indented code     tables, <pre>, <table>
    1. (a list marker)   e.g.  Fig. 3  Dr.  et al.  J. (an initial)   3.14   https://...   me@example.org

unless it is longer than LIMIT characters. A sentence longer than LONG is cut at white space outside of all these.
The lengths are drawn from a generator seeded by the document's own hash, so the chunks of a text are the same on any machine, in
any order and any number of processes.

How: many texts are joined and looked at as one array, a number a character. That settles nearly all stops and line ends; where it does not, a
regular expression looks. tests/slow_chunking.py says the same without the array, a text at a time.
"""

import hashlib
import math
import re
from bisect import bisect_left, bisect_right
from itertools import chain

import numpy as np

from data.lib.corpus import hash_uniform

LONG, LIMIT = 1000, 4000  # characters: where a sentence without an end is cut if it can be, and where it is in any case
MEAN, MOST = 8, 20  # sentences a chunk

# ------------------------------------------------------------------------------------------------ what stays whole

# $ starts a formula that ends at the next $ in the same paragraph. Two backslashes are a line break in LaTeX: \\[2pt] opens nothing.
# "$5. He bought 3 for $10": prices; the second $ closes nothing. Two plain words in a row are no formula, and a digit does not follow one.
PRICE = r"\d(?:[^$]*\$\d|(?>[\d,.]*(?:[ -][^$]*?)?(?<![\\\w])[A-Za-z][a-z]+[,.]? [A-Za-z][a-z]*\b)[^$]*\$)"
IN_DOLLARS = rf"\$(?!\$)(?:[^$]++|\$(?!\$)){{1,40}}+\$\$|(?!{PRICE})[^$\\\n]*+(?:(?:\\.|\n(?!\s*\n))[^$\\\n]*+)*+(?<!\$)\$"
IN_BACKSLASHES = rf"[\\$]|\[.{{0,{LIMIT}}}?\\\]|\(.{{0,{LIMIT}}}?\\\)|begin\{{(?P<name>\w+\*?)\}}.{{0,{LIMIT}}}?\\end\{{(?P=name)\}}"
MATH = re.compile(rf"[$\\](?:(?<=\$)(?:{IN_DOLLARS})|(?<=\\)(?:{IN_BACKSLASHES}))", re.DOTALL)
# The same in two halves: re finds a pattern's first character, if it is a given one, ten times as fast as one of a set.
DOLLARS = re.compile(rf"\$(?:{IN_DOLLARS})", re.DOTALL)
OPENER = re.compile(r"\\(?:[\\$\[(]|begin\{\w+\*?\})")
CLOSER = {r"\[": r"\]", r"\(": r"\)"}
CODE = re.compile(rf"^[ \t]*(```|~~~)[^\n]*\n.{{0,{LIMIT}}}?^[ \t]*\1[^\n]*$|(?<!`)`[^`\n]+`(?!`)|<(pre|table|code)\b.{{0,{LIMIT}}}?</\2>", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:\A|(?<=\n)[ \t\r]*\n)((?:(?: {4}|\t)[^\n]*(?:\n|\Z)|[ \t\r]*\n(?= {4}|\t))+)")
CODE_SIGN = re.compile(r"[={};<>_]|\w\(|^\s*(?:def|for|if|while|import|return|print|class|\$|>>>)\b", re.MULTILINE)
TABLE = re.compile(r"^[ \t]*\|[^\n]*(?:\n[ \t]*\|[^\n]*)*|^[^\n|]*\|[^\n]*\n[ \t:|-]*-[ \t:|-]*(?:\n[^\n|]*\|[^\n]*)*", re.MULTILINE)

TABLE_SIGN = re.compile(r"\|[ \t:]*-|-[ \t:]*\||(?:\A|\n)[ \t]*\|")


def code_spans(text: str) -> list[tuple[int, int]]:
    """Code and tables, in order."""
    spans = []
    if "`" in text or "~" in text and "~~~" in text or "<" in text and "</" in text:  # one character is found much faster than two
        spans += [m.span() for m in CODE.finditer(text)]
    if "\n    " in text or "\t" in text and "\n\t" in text or text.startswith(("    ", "\t")):
        spans += [(m.start(1), m.start(1) + len(m[1].rstrip())) for m in INDENTED.finditer(text) if CODE_SIGN.search(m[1])]
    if "|" in text and TABLE_SIGN.search(text):
        spans += [m.span() for m in TABLE.finditer(text)]
    return [span for span in join_spans(spans) if span[1] - span[0] <= LIMIT] if spans else spans


def math_spans(text: str, first: int, last: int, signs: str) -> list[tuple[int, int]]:
    """Formulas in text[first:last], in order: what MATH finds, without its pairs of characters. `signs`: of $ and \\ what occurs there."""
    dollars = [m.span() for m in DOLLARS.finditer(text, first, last)] if "$" in signs else []
    if "\\" not in signs:
        return dollars
    spans, done, at = [], 0, 0
    for m in OPENER.finditer(text, first, last):
        start, after = m.span()
        i = bisect_left(dollars, (start,))
        if start < at or m[0] == r"\\" or i and dollars[i - 1][1] > start:  # in another formula, or a line break
            continue
        closer = CLOSER.get(m[0]) or r"\end" + m[0][6:]
        end = start if m[0] == r"\$" else text.find(closer, after, min(after + LIMIT + len(closer), last))
        if end < 0:
            continue
        at = end + len(closer) if end > start else after
        j = bisect_left(dollars, (at,))
        if j > i and dollars[j - 1][1] > at:  # what $ opened there goes on: all after it is to be read anew
            return [m.span() for m in MATH.finditer(text, first, last)]
        if end > start:
            spans += [*dollars[done:i], (start, at)]
            done = j
    return spans + dollars[done:]


def borders_of(spans: list[tuple[int, int]]) -> list[int]:
    """start + 1, end of each range that is not to be cut."""
    return [border for start, end in spans if end - start <= LIMIT for border in (start + 1, end)]


def outside(ends: list[int], borders: list[int]) -> list[int]:
    """The ends that lie in none of the ranges; on the border of one is outside."""
    return [end for end in ends if not bisect_right(borders, end) % 2] if borders else ends


def join_spans(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            start, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((start, end))
    return joined


# ------------------------------------------------------------------------------------------------------ sentences

CLOSERS = r"""["'”’»)\]}*_$]"""
ITEM = r"[ \t]*(?:[-*+•] |\(?(?:\d{1,3}|[a-z])[.)] |#{1,6} )"
AFTER = rf"{CLOSERS}*(?=\s+([^\s\0a-z,;:)\]}}]))"  # what a sentence ends with, and how the next one may begin
STOP = re.compile(rf"(?<![.!?…])[.!?…]+{AFTER}")
STOP_BEYOND = re.compile("[。！？][」』”’）]*")
AFTER_MATH, LIST_ITEM = re.compile(AFTER), re.compile(ITEM)
STOP_IN_MATH = re.compile(r"[.!?…](?:\s*\\\\)?\s*(?:\$\$?|\\[\])]|\\end\{\w+\*?\})\Z")
NEVER = {  # no sentence ends behind these, whatever follows
    *"dr mr mrs ms prof st rev hon gen col capt lt sgt gov sen rep pres messrs mme mlle fr".split(),
    *"fig figs eq eqs eqn eqns thm prop cor def lem al cf viz vs resp approx ca esp incl ibid op ed eds trans".split(),
}
NUMBERED = set("no nos p pp vol vols sec secs sect ch chap art ex exs ref refs ver v pt par app tab vers nr jan feb mar apr jun jul aug sep sept oct nov dec".split())
# Most stops follow a word whose last four letters (or all) are none of these: they are no marker of a list, either.
SUSPECT = {word[-4:] for word in NEVER | NUMBERED} | {a + b + c for a in "ivx" for b in "ivx" for c in ("", *"ivx")}
DOTTED = re.compile(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}")  # e.g  i.e  U.S  Ph.D
MARKER = re.compile(r"[ \t>*#(]*(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5}|\d{1,2}(?:\.\d{1,2})+)")
SPACE = re.compile(r"\s+(?=\S)")
OPENERS = "([{\"'“‘«*_$"


def is_stop(text: str, at: int, after: str) -> bool:
    """Whether the "." at text[at] ends a sentence; `after` is the next character that is no white space."""
    last = text[at - 1] if at else " "
    if last.isdigit():
        return not after.isdigit() and not is_marker(text, at)
    if not last.isalpha():
        return True
    word = text[max(at - 16, 0) : at].split()[-1].lstrip(OPENERS)
    low = word.lower()
    if low in NEVER or DOTTED.fullmatch(word) or low in NUMBERED and (after.isdigit() or after in "$\\("):
        return False
    if len(word) == 1 and word.isupper() and word != "I":  # an initial
        return False
    return len(word) > 5 or not is_marker(text, at)


def is_marker(text: str, at: int) -> bool:
    """Whether the line begins with what stands before `at`, and that is the number of a list item."""
    start = text.rfind("\n", max(at - 24, 0), at) + 1
    return bool((start or at < 24) and MARKER.fullmatch(text, start, at))


def stop_at(text: str, at: int) -> int:
    """Where the sentence ends whose stop is at text[at]; 0: none does."""
    m = STOP.match(text, at)
    return 0 if not m or m[1].islower() or text[at] == "." and not is_stop(text, at, m[1]) else m.end()


# ------------------------------------------------------------------------------------------------ many texts at once

GAP = "\0\n"  # before and behind each text: what is beside it begins no sentence, and its first line is one
BEYOND = 255  # stands for all characters that are not Latin-1


def table(characters: str = "", test=None) -> np.ndarray:
    """[256] bool: which codes stand for one of the characters, or pass the test."""
    return np.array([chr(c) in characters or bool(test and test(chr(c))) for c in range(BEYOND)] + [False])


ODD = ~table(test=lambda c: c.isascii() and c != "\0")  # a regular expression has to look
SPACES, BLANKS, STOPS = table(test=str.isspace), table(" \t\r"), table(".!?")
LETTERS, SMALL, DIGITS = table(test=lambda c: c.isascii() and c.isalpha()), table(test=lambda c: c.isascii() and c.islower()), table("0123456789")
NO_WORD = ~(LETTERS | DIGITS | ODD)
NO_START = table(",;:)]}") | SMALL  # no sentence begins with these: AFTER
CLOSES = table(".!?\"')]}*_$") | ODD  # what may stand between a stop and white space: CLOSERS
IN_MARKER = table(" \t>*#(.0123456789") | ODD  # what may stand before the last digit of a list's marker, in its line: MARKER
BULLETS, ITEM_ENDS = table("-*+"), table(".)")  # how a list's item begins, and how its marker ends: ITEM
MAY_END = table(".!?$") | SPACES | ODD  # what may stand before a formula's last $: STOP_IN_MATH
LOWER = np.array([ord(chr(c).lower()) if c < 128 else c for c in range(256)], dtype=np.uint8)
SUSPECT_KEYS = np.sort(np.array([int.from_bytes(word.rjust(4, "\0").encode(), "little") for word in SUSPECT], dtype="<u4"))
ANY_SPACES, ANY_BLANKS = re.compile(r"\s*"), re.compile(r"[ \t\r]*")


def codes_of(text: str) -> np.ndarray:
    """[len(text)] uint8: Latin-1 codes."""
    try:
        return np.frombuffer(text.encode("latin-1"), np.uint8)
    except UnicodeEncodeError:
        return np.minimum(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4"), BEYOND).astype(np.uint8)


def skip(text: str, codes: np.ndarray, at: np.ndarray, what: np.ndarray, pattern: re.Pattern) -> np.ndarray:
    """For each place the first one from there on that is not `what`, which is a table, and a pattern for what the table cannot say."""
    at = at.copy()
    for _ in range(16):
        more = what[codes[at]]
        if not more.any():
            break
        at += more
    for i in np.flatnonzero(what[codes[at]] | (codes[at] == BEYOND)).tolist():
        at[i] = pattern.match(text, at[i]).end()
    return at


def usual_words(codes: np.ndarray, at: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[n] bool: which of the "." at `at` is_stop says yes to without a doubt; `after` is where the next sentence would begin."""
    before = LOWER[codes[at[:, None] + [-4, -3, -2, -1]]]  # [n, 4]
    letters, last, earlier = LETTERS[before], before[:, 3], before[:, :3]
    two, three = letters[:, 2:].all(1) & (before[:, 1] == ord(" ")), letters[:, 1:].all(1) & (before[:, 0] == ord(" "))
    number = DIGITS[last] & ~DIGITS[codes[after]] & ~IN_MARKER[earlier].all(1) & (earlier != ord("\n")).all(1)
    word = two | three | letters.all(1)  # of two letters, three, or at least four
    before[two, :2] = before[three, 0] = 0
    key = before.view("<u4")[:, 0]
    suspect = SUSPECT_KEYS[np.minimum(np.searchsorted(SUSPECT_KEYS, key), len(SUSPECT_KEYS) - 1)] == key
    return word & ~suspect | number | NO_WORD[last]


def stops(text: str, codes: np.ndarray) -> list[np.ndarray]:
    """Where sentences end by a stop."""
    at = np.flatnonzero((codes == ord(".")) | (codes == ord("!")) | (codes == ord("?")))
    beside = codes[at + 1]
    at = at[(SPACES[beside] | (beside == BEYOND) | CLOSES[beside] & (SPACES | CLOSES)[codes[at + 2]]) & ~STOPS[codes[at - 1]]]
    after = skip(text, codes, at + 1, SPACES, ANY_SPACES)
    clear = SPACES[codes[at + 1]] & ~ODD[codes[after]] & ~ODD[codes[at - 1]]
    sure = clear & ~NO_START[codes[after]] & ((codes[at] != ord(".")) | usual_words(codes, at, after))
    asked = at[~sure & ~(clear & NO_START[codes[after]])].tolist()
    if "…" in text:
        asked += [m.start() for m in re.finditer("…", text)]
    ends = [end for place in asked if (end := stop_at(text, place))]
    if "。" in text or "！" in text or "？" in text:
        ends += [m.end() for m in STOP_BEYOND.finditer(text)]
    return [at[sure] + 1, np.array(ends, dtype=np.int64)]


def line_ends(text: str, codes: np.ndarray) -> list[np.ndarray]:
    """Behind the last of several line ends, and before an item of a list or a heading."""
    at = np.flatnonzero(codes == ord("\n"))
    after = skip(text, codes, at + 1, BLANKS, ANY_BLANKS)
    first = codes[after]  # of the next line
    blank = first == ord("\n")
    below = np.zeros(len(at), dtype=bool)  # a blank line
    below[np.searchsorted(at, after[blank])] = True
    marked = ITEM_ENDS[codes[after[:, None] + [1, 2, 3, 4]]].any(1) & (DIGITS[first] | SMALL[first] | (first == ord("(")))
    asked = at[marked | BULLETS[first] & (codes[after + 1] == ord(" ")) | (first == ord("#")) | (first == BEYOND)] + 1
    return [at[below & ~blank] + 1, np.array([i for i in asked.tolist() if LIST_ITEM.match(text, i)], dtype=np.int64)]


def math_ends(text: str, codes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    r"""Which formulas a sentence ends with: in "\[ y = 3. \] Then" the stop is in the formula."""
    maybe = (codes[ends - 1] != ord("$")) | MAY_END[codes[ends - 2]]
    kept = []
    for end in ends[maybe].tolist():
        if STOP_IN_MATH.search(text, end - 24, end) and (m := AFTER_MATH.match(text, end)) and not m[1].islower():
            kept.append(m.end())
    return np.array(kept, dtype=np.int64)


def sentence_ends(texts: list[str]) -> list[list[int]]:
    """For each text the positions at which sentences end, rising; the last is its length (none for an empty text)."""
    ends, counts = all_ends(texts)
    borders, ends = np.cumsum(counts).tolist(), ends.tolist()
    return [ends[a:b] for a, b in zip([0, *borders], borders)]


def all_ends(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The positions at which sentences end, of all texts one after another, and how many each text has. Best with about 500 kB at a time."""
    if not any(texts):
        return np.zeros(0, np.int64), np.zeros(len(texts), np.int64)
    code = [code_spans(text) for text in texts]
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    firsts = np.cumsum(sizes + len(GAP)) - sizes
    lasts = firsts + sizes
    joined = GAP.join(["", *map(masked, texts, code), "\0" * 8])
    codes, spans = codes_of(joined), []
    for text, first, last in zip(texts, firsts.tolist(), lasts.tolist()):
        if signs := "$" * ("$" in text) + "\\" * ("\\" in text):
            spans += math_spans(joined, first, last, signs)
    formulas = np.fromiter(chain.from_iterable(spans), np.int64, 2 * len(spans)).reshape(-1, 2)
    ends = np.concatenate([*stops(joined, codes), *line_ends(joined, codes), math_ends(joined, codes, formulas[:, 1])])
    ends = np.sort(np.concatenate([outside_math(ends, formulas), lasts]))
    ends = ends[np.append(True, ends[1:] > ends[:-1])]
    begins = skip(joined, codes, firsts, SPACES, ANY_SPACES)
    of = np.searchsorted(firsts, ends) - 1  # which text
    ends = ends[(of >= 0) & (ends <= lasts[of]) & ((ends > begins[of]) | (ends == lasts[of]))]
    ends = ends[~space_follows(joined, codes, ends, firsts)]
    ends = with_cuts(joined, ends, firsts, code, spans)
    of = np.searchsorted(firsts, ends) - 1
    return ends - firsts[of], np.bincount(of, minlength=len(texts))


def outside_math(ends: np.ndarray, formulas: np.ndarray) -> np.ndarray:
    """The ends that lie in no formula; on its border is outside, and longer ones than LIMIT do not count."""
    formulas = formulas[formulas[:, 1] - formulas[:, 0] <= LIMIT]
    before = np.searchsorted(formulas[:, 0], ends)  # how many begin before
    return ends[ends >= np.concatenate([[0], formulas[:, 1]])[before]]


def space_follows(text: str, codes: np.ndarray, ends: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """[n] bool: behind which ends there is only white space up to the next one of the same text: it goes to the sentence before."""
    following = np.append(ends[1:], len(codes))
    same = np.searchsorted(firsts, ends) == np.searchsorted(firsts, following)
    return same & (skip(text, codes, ends, SPACES, ANY_SPACES) >= following)


def with_cuts(text: str, ends: np.ndarray, firsts: np.ndarray, code: list, formulas: list[tuple[int, int]]) -> np.ndarray:
    """The ends, and cuts in the sentences longer than LONG."""
    of = np.searchsorted(firsts, ends) - 1
    begins, found = np.maximum(np.append(0, ends[:-1]), firsts[of]), []
    for i in np.flatnonzero(ends - begins > LONG).tolist():
        begin, end, first = int(begins[i]), int(ends[i]), int(firsts[of[i]])
        whole = within(formulas, begin, end)
        if mine := code[of[i]]:
            whole = join_spans(whole + [(a + first, b + first) for a, b in within(mine, begin - first, end - first)])
        found += cuts(text, begin, end, borders_of(whole))
    return np.sort(np.append(ends, np.array(found, dtype=np.int64))) if found else ends


def within(spans: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """Those that begin in text[begin:end]."""
    return spans[bisect_left(spans, (begin,)) : bisect_left(spans, (end,))]


def masked(text: str, code: list[tuple[int, int]]) -> str:
    """The text without its code: a $ there opens no formula."""
    pieces, at = [], 0
    for start, end in code:
        pieces += [text[at:start], "`" * (end - start)]
        at = end
    return "".join([*pieces, text[at:]]) if code else text


def cuts(text: str, start: int, end: int, borders: list[int]) -> list[int]:
    """Where to cut text[start:end], which is longer than LONG: at white space outside formulas and between no two digits, if possible."""
    found = []
    while end - start > LONG:
        for limit in (LONG, LIMIT):
            spaces = [m.start() for m in SPACE.finditer(text, start + 1, min(start + limit, end))]
            good = outside([at for at in spaces if not (text[at - 1].isdigit() and text[at : at + 9].lstrip()[:1].isdigit())], borders)
            if good:
                break
        if not good and end - start <= LIMIT:
            break
        start = good[-1 if limit == LONG else 0] if good else spaces[-1] if spaces else no_word(text, start + LIMIT)
        found.append(start)
    return found


def no_word(text: str, at: int) -> int:
    """A place at or a little before `at` that is not within a word or number; `at` when there is none."""
    for place in range(at, at - 200, -1):
        if not (text[place - 1].isalnum() and text[place].isalnum()):
            return place
    return at


# --------------------------------------------------------------------------------------------------------- chunks

POISSON = [sum(math.exp(1 - MEAN) * (MEAN - 1) ** k / math.factorial(k) for k in range(n + 1)) for n in range(MOST - 1)]


def text_digest(raw: bytes, seed: int) -> bytes:
    """16 bytes that stand for a document and a seed: its place in the shuffle (first half) and its chunk lengths (second half)."""
    return hashlib.blake2b(raw, digest_size=16, salt=str(seed).encode()[-16:]).digest()


def chunk(texts: list[str], digests: list[bytes]) -> list[list[str]]:
    """Each document's chunks. The digests are their text_digest, so they depend on text and seed alone."""
    ends, counts = all_ends(texts)
    keys = np.frombuffer(b"".join(digests), dtype=">i8")[1::2]  # their second halves
    of, first = np.repeat(np.arange(len(texts)), counts), np.repeat(np.cumsum(counts) - counts, counts)
    lengths = 1 + np.searchsorted(POISSON, hash_uniform(keys[of], np.arange(len(ends)) - first), side="right")  # a draw a sentence: more than enough
    total = np.cumsum(lengths)
    last = total - (total - lengths)[first] - 1  # the sentence that would end each chunk, counted within its document
    some = last < counts[of]
    borders = np.unique(np.append((first + last)[some], np.cumsum(counts)[counts > 0] - 1))
    pieces, start, before = [[] for _ in texts], 0, -1
    for number, end in zip(of[borders].tolist(), ends[borders].tolist()):
        start = start if number == before else 0
        pieces[number].append(texts[number][start:end])
        start, before = end, number
    return pieces
