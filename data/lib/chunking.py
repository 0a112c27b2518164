r"""Documents as sentences, and runs of sentences as chunks.

    sentence_ends(texts)      where the sentences of each text end
    chunk(texts, digests)     its chunks of 1 + Poisson(7) sentences, at most 20, as in the paper

Nothing is lost: the chunks of a text joined are the text.

A sentence ends at . ! ? and what closes it, when white space and no
lower-case letter follow, and at the stops of other scripts (WIDE); it also
ends at a blank line, and before a list item or a heading. White space goes to
the front of the next sentence, a blank line to the back of the one before. No
sentence ends inside

    $...$  $$...$$  \(...\)  \[...\]  \begin{x}...\end{x}  [tex]...[/tex]
    ``` fences, `code`, indented code, tables, <pre>, <table>, <math>
    1. (a list marker)   e.g.  Fig. 3  Dr.  et al.  J. (an initial)
    3.14   https://...   me@example.org

unless that is longer than LIMIT characters. A sentence longer than LONG is
cut at white space outside of all these. The lengths of chunks are drawn from
a generator seeded by the document's own hash, so the chunks of a text are the
same on any machine, in any order and with any number of processes.
"""

import hashlib
import math
import re
from bisect import bisect_right
from itertools import accumulate, pairwise

import numpy as np

from data.lib.corpus import hash_uniform

LONG = 1000  # characters: a longer sentence is cut where that does no harm
LIMIT = 4000  # characters: a longer sentence, formula or piece of code is cut in any case
MEAN = 8  # sentences in a chunk, on average
MOST = 20

Span = tuple[int, int]  # the first character, and the one after the last

# -------------------- formulas and code

# What follows the "$" of a price. In "$5. He bought 3 for $10" the second "$"
# closes nothing. Two plain words in a row are no formula, either.
TWO_WORDS = r"[A-Za-z][a-z]+ [,.]? [ ] [A-Za-z][a-z]* \b"
PRICE = rf"""
    \d (?: [^$]* \$\d
         | (?> [\d,.]* (?: [ -] [^$]*? )? (?<![\\\w]) {TWO_WORDS} ) [^$]* \$ )
"""
# A formula in single dollars ends in the same paragraph.
DOLLARS = rf"""
    \$ (?: \$ (?!\$) (?: [^$]++ | \$(?!\$) ){{1,40}} \$\$
         | (?!{PRICE}) [^$\\\n]*+ (?: (?: \\. | \n(?!\s*\n) ) [^$\\\n]*+ )* (?<!\$)\$ )
"""
# Two backslashes are a line break in LaTeX: "\\[2pt]" opens no formula.
BACKSLASHES = rf"""
    \\ (?: [\\$]
         | \[ .{{0,{LIMIT}}}? \\\]
         | \( .{{0,{LIMIT}}}? \\\)
         | begin\{{ (?P<name>\w+\*?) \}} .{{0,{LIMIT}}}? \\end\{{ (?P=name) \}} )
"""
# As forums write them: [itex]x[/itex]
TAGS = rf"\[ (?P<tag>(?i:i?tex|math|latex)) \] .{{0,{LIMIT}}}? \[/ (?P=tag) \]"
ONLY_DOLLARS = re.compile(DOLLARS, re.DOTALL | re.VERBOSE)
MATH = re.compile(f"{DOLLARS} | {BACKSLASHES} | {TAGS}", re.DOTALL | re.VERBOSE)
CODE = re.compile(
    rf"""
    ^[ \t]* (```|~~~) [^\n]*\n .{{0,{LIMIT}}}? ^[ \t]* \1 [^\n]*$
  | (?<!`) ` [^`\n]+ ` (?!`)
  | <(pre|table|code|math)\b .{{0,{LIMIT}}}? </\2>
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
# Indented lines behind a blank one, with the blank lines between them
INDENT = r"(?:[ ]{4}|\t)"
LINES = rf"(?:{INDENT}[^\n]*(?:\n|\Z)|[ \t\r]*\n(?={INDENT}))+"
INDENTED = re.compile(rf"(?:\A|(?<=\n)[ \t\r]*\n)({LINES})")
KEYWORD = r"^[ \t\r]*(?:def|for|if|while|import|return|print|class|\$|>>>)\b"
CODE_SIGN = re.compile(rf"[={{}};<>_]|\w\(|{KEYWORD}", re.MULTILINE)
# Lines that begin with "|", and lines with "|" over and under a rule of dashes
TABLE = re.compile(
    r"""
    ^[ \t]* \| [^\n]* (?: \n[ \t]* \| [^\n]* )*
  | ^[^\n|]* \| [^\n]* \n[ \t:|-]* - [ \t:|-]* (?: \n[^\n|]* \| [^\n]* )*
    """,
    re.MULTILINE | re.VERBOSE,
)
TABLE_SIGN = re.compile(r"\|[ \t:]*-|-[ \t:]*\||(?:\A|\n)[ \t]*\|")


def code_spans(text: str) -> list[Span]:
    """Where code and tables are, in order."""
    spans = []
    # Python finds one character much faster than two.
    fence = "`" in text or "~" in text and "~~~" in text
    if fence or "<" in text and "</" in text:
        spans += [m.span() for m in CODE.finditer(text)]
    tab = "\t" in text and "\n\t" in text
    if tab or "\n    " in text or text.startswith(("    ", "\t")):
        for m in INDENTED.finditer(text):
            if CODE_SIGN.search(m[1]):  # other indented text is prose
                start = m.start(1)
                spans.append((start, start + len(m[1].rstrip())))
    if "|" in text and TABLE_SIGN.search(text):
        spans += [m.span() for m in TABLE.finditer(text)]
    return [span for span in join_spans(spans) if span[1] - span[0] <= LIMIT]


def masked(text: str, code: list[Span]) -> str:
    """The text with backticks in place of its code, where a "$" opens no formula."""
    pieces = []
    at = 0
    for start, end in code:
        pieces += [text[at:start], "`" * (end - start)]
        at = end
    return "".join([*pieces, text[at:]])


def math_spans(text: str) -> list[Span]:
    """Where the formulas of a text are, in order."""
    # A search for "$" alone is faster.
    pattern = MATH if "\\" in text or "[/" in text else ONLY_DOLLARS
    spans = [m.span() for m in pattern.finditer(text)]
    # Spans of two characters are line breaks and "\\$".
    return [span for span in spans if span[1] - span[0] > 2]


def join_spans(spans: list[Span]) -> list[Span]:
    """Sorted, and those that overlap made one."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            start, before = joined.pop()
            end = max(end, before)
        joined.append((start, end))
    return joined


def borders_of(spans: list[Span]) -> list[int]:
    """[start + 1, end, ...] of the spans that may not be cut, for outside()."""
    short = [(start, end) for start, end in spans if end - start <= LIMIT]
    return [border for start, end in short for border in (start + 1, end)]


def outside(places: list[int], borders: list[int]) -> list[int]:
    """The places that lie in none of the spans; on the border of one is outside."""
    return [at for at in places if bisect_right(borders, at) % 2 == 0]


# -------------------- stops

CLOSERS = r"""["'”’»)\]}*_$]"""
# How a list item or a heading begins.
ITEM = r"[ \t]*(?:[-*+•] |\(?(?:\d{1,3}|[a-z])[.)] |#{1,6} )"
# What closes a sentence, and how the next one may begin.
AFTER = rf"{CLOSERS}*(?=\s+([^\s\0a-z,;:)\]}}]))"
# Stops that need no white space behind them. In Indian verses and Armenian times
# a digit may follow those of the second kind, which then end nothing.
WIDE = "。！？｡", "।॥۔؟։．።፧။។"
AFTER_WIDE = rf"(?:{CLOSERS}+(?=[\s\0]|\Z))?(?!\d)"
# A character that may end a sentence, and what has to follow then. A search for one of a
# few characters is fast.
BEGINS = rf"[\n.!?…{WIDE[0]}{WIDE[1]}]"
ENDS = (
    rf"(?<=\n)(?:(?:[ \t\r]*\n)+|(?={ITEM}))",
    # Behind the first of a run of stops only: from each of them would take quadratic time.
    rf"(?<=[.!?…])(?<![.!?…][.!?…])[.!?…]*+{AFTER}",
    rf"(?<=[{WIDE[0]}])[{WIDE[0]}]*[」』｣”’）]*",
    rf"(?<=[{WIDE[1]}])(?<![{WIDE[1]}][{WIDE[1]}])[{WIDE[1]}]*+{AFTER_WIDE}",
)
SIGN = re.compile(f"{BEGINS}(?:{'|'.join(ENDS)})")
AFTER_MATH = re.compile(AFTER)
STOP_IN_MATH = re.compile(r"[.!?…](?:\s*\\\\)?\s*(?:\$\$?|\\[\])]|\\end\{\w+\*?\}|\[/\w+\])\Z")
# No sentence ends behind these.
ABBREVIATIONS = {
    *"dr mr mrs ms prof st rev hon gen col capt lt sgt gov sen rep pres messrs mme mlle fr".split(),
    *"fig figs eq eqs eqn eqns thm prop cor def lem al cf viz vs resp approx ca esp incl".split(),
    *"ibid op ed eds trans".split(),
}
# None ends behind these, either, when a number or a formula follows.
NUMBERED = {
    *"no nos p pp vol vols sec secs sect ch chap art ex exs ref refs ver v pt par app tab".split(),
    *"vers nr jan feb mar apr jun jul aug sep sept oct nov dec".split(),
}
DOTTED = re.compile(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}")  # e.g  U.S
MARKER = re.compile(r"[ \t>*#(]*(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5}|\d{1,2}(?:\.\d{1,2})+)")
OPENERS = "([{\"'“‘«*_$"


def is_stop(text: str, at: int, after: str) -> bool:
    """Whether the "." at text[at] ends a sentence; `after`: the next character but for white space."""
    if at > 6 and text[at - 7 : at].isalpha():
        return True  # no abbreviation is as long
    last = text[at - 1] if at else " "
    if last.isdigit():
        return not after.isdigit() and not is_marker(text, at)
    if not last.isalpha():
        return True
    word = text[max(at - 16, 0) : at].split()[-1].lstrip(OPENERS)
    if is_abbreviation(word, after):
        return False
    return len(word) > 5 or not is_marker(text, at)


def is_abbreviation(word: str, after: str) -> bool:
    if word.lower() in ABBREVIATIONS or DOTTED.fullmatch(word):
        return True
    if word.lower() in NUMBERED:
        return after.isdigit() or after in "$\\("
    return len(word) == 1 and word.isupper() and word != "I"  # an initial


def is_marker(text: str, at: int) -> bool:
    """Whether a line has only the marker of a list item before text[at]."""
    start = text.rfind("\n", max(at - 24, 0), at) + 1
    return bool((start or at < 24) and MARKER.fullmatch(text, start, at))


# -------------------- sentences


def sentence_ends(text: str) -> list[int]:
    """Where the sentences of a text end, the last one at its length; an empty text has none."""
    code = code_spans(text)
    text = masked(text, code)
    math = math_spans(text)
    ends: list[int] = []
    before = 0
    for end in [*candidates(text, math), len(text)]:
        sentence = text[before:end]
        if sentence.isspace() and ends:  # it goes to the sentence before
            ends[-1] = before = end
        elif end == len(text) > before or sentence and not sentence.isspace():
            ends.append(end)
            before = end
    long = [(a, b) for a, b in pairwise([0, *ends]) if b - a > LONG]
    if long:
        whole = borders_of(join_spans(code + math))
        ends += [cut for a, b in long for cut in cuts(text, a, b, whole)]
    return sorted(ends)


def candidates(text: str, math: list[Span]) -> list[int]:
    """Where sentences may end, in order; none lies in a formula."""
    ends = []
    for m in SIGN.finditer(text):
        after = m[1]  # None for all but stops
        if after:
            at = m.start()
            if after.islower() or text[at] == "." and not is_stop(text, at, after):
                continue
        ends.append(m.end())
    if not math:
        return ends
    for _, end in math:
        after = STOP_IN_MATH.search(text, max(end - 24, 0), end) and AFTER_MATH.match(text, end)
        if after and not after[1].islower():
            ends.append(after.end())
    return outside(sorted(ends), borders_of(math))


# -------------------- cuts in long sentences

SPACE = re.compile(r"\s+")


def cuts(text: str, start: int, end: int, borders: list[int]) -> list[int]:
    """Where to cut the sentence text[start:end], which is longer than LONG."""
    found = []
    while end - start > LONG:
        start = next_cut(text, start, end, borders)
        if not start:
            break
        found.append(start)
    return found


def next_cut(text: str, start: int, end: int, borders: list[int]) -> int:
    """The last good place within LONG characters, or the first within LIMIT. Without any, a sentence
    longer than LIMIT is cut at the last white space or between words; 0 if it is shorter."""
    good = cut_places(text, start, min(start + LONG, end), borders)
    if good:
        return good[-1]
    good = cut_places(text, start, min(start + LIMIT, end), borders)
    if good:
        return good[0]
    if end - start <= LIMIT:
        return 0
    spaces = space_in(text, start, start + LIMIT)
    return spaces[-1] if spaces else between_words(text, start + LIMIT)


def cut_places(text: str, start: int, end: int, borders: list[int]) -> list[int]:
    """White space outside of formulas and code that does not part two digits."""
    places = []
    for at in space_in(text, start, end):
        following = text[at : at + 9].lstrip()[:1]
        if not (text[at - 1].isdigit() and following.isdigit()):
            places.append(at)
    return outside(places, borders)


def space_in(text: str, start: int, end: int) -> list[int]:
    """Where white space begins in text[start:end] that ends there as well."""
    found = SPACE.finditer(text, start + 1, end)
    return [m.start() for m in found if m.end() < end]


def between_words(text: str, at: int) -> int:
    """A place up to 200 characters before `at` within no word, or `at`."""
    for place in range(at, at - 200, -1):
        if not (text[place - 1].isalnum() and text[place].isalnum()):
            return place
    return at


# -------------------- chunks

# The chance that Poisson(MEAN - 1) is at most n, for n < MOST - 1.
CHANCES = [math.exp(1 - MEAN) * (MEAN - 1) ** k / math.factorial(k) for k in range(MOST - 1)]
POISSON = [sum(CHANCES[: n + 1]) for n in range(MOST - 1)]


def text_digest(raw: bytes, seed: int) -> bytes:
    """16 bytes: a document's place in the shuffle, and a key for the lengths of its chunks."""
    salt = str(seed).encode()[-16:]
    return hashlib.blake2b(raw, digest_size=16, salt=salt).digest()


def chunk(texts: list[str], digests: list[bytes]) -> list[list[str]]:
    """The chunks of each document. The digests are their text_digest()."""
    all_ends = [sentence_ends(text) for text in texts]
    # As many lengths are drawn as there are sentences, which is more than enough.
    counts = list(map(len, all_ends))
    keys = np.frombuffer(b"".join(digests), dtype=">i8")[1::2]
    places = np.concatenate([np.arange(0), *map(np.arange, counts)])
    draws = hash_uniform(np.repeat(keys, counts), places)
    lengths = (1 + np.searchsorted(POISSON, draws, side="right")).tolist()
    chunks = []
    first = 0  # sentence of the document, counted through
    for text, ends in zip(texts, all_ends):
        last = accumulate(lengths[first : first + len(ends)])
        borders = [ends[n - 1] for n in last if n < len(ends)]
        chunks.append([text[a:b] for a, b in pairwise([0, *borders, len(text)]) if text])
        first += len(ends)
    return chunks
