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

For speed, many texts are joined and examined as one array with a number for
each character. That settles nearly all stops and line ends; a regular
expression decides the others. tests/slow_chunking.py finds the same sentences
without the array, one text at a time.
"""

import hashlib
import math
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import chain

import numpy as np

from data.lib.corpus import hash_uniform

LONG = 1000  # characters: a longer sentence is cut where that does no harm
LIMIT = 4000  # characters: a longer sentence, formula or piece of code is cut in any case
MEAN = 8  # sentences in a chunk, on average
MOST = 20

Span = tuple[int, int]  # the first character, and the one after the last
Ints = np.ndarray  # of int64
Bools = np.ndarray
Codes = np.ndarray  # of uint8

# --------------------------------------------------------------- formulas and code

# What follows the "$" of a price. In "$5. He bought 3 for $10" the second "$"
# closes nothing. Two plain words in a row are no formula, either.
TWO_WORDS = r"[A-Za-z][a-z]+ [,.]? [ ] [A-Za-z][a-z]* \b"
PRICE = rf"""
    \d (?: [^$]* \$\d
         | (?> [\d,.]* (?: [ -] [^$]*? )? (?<![\\\w]) {TWO_WORDS} ) [^$]* \$ )
"""
# A formula in single dollars ends in the same paragraph.
DOLLARS = rf"""
    \$ (?: \$ (?!\$) (?: [^$]++ | \$(?!\$) ){{1,40}}+ \$\$
         | (?!{PRICE}) [^$\\\n]*+ (?: (?: \\. | \n(?!\s*\n) ) [^$\\\n]*+ )*+ (?<!\$)\$ )
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
KEYWORD = r"^\s*(?:def|for|if|while|import|return|print|class|\$|>>>)\b"
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


def math_spans(text: str, first: int, last: int) -> list[Span]:
    """Where the formulas of text[first:last] are, in order."""
    # A search for "$" alone is faster.
    if text.find("\\", first, last) < 0 and text.find("[/", first, last) < 0:
        return [m.span() for m in ONLY_DOLLARS.finditer(text, first, last)]
    spans = [m.span() for m in MATH.finditer(text, first, last)]
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


# --------------------------------------------------------------------------- stops

CLOSERS = r"""["'”’»)\]}*_$]"""
# How a list item or a heading begins.
ITEM = r"[ \t]*(?:[-*+•] |\(?(?:\d{1,3}|[a-z])[.)] |#{1,6} )"
# What closes a sentence, and how the next one may begin.
AFTER = rf"{CLOSERS}*(?=\s+([^\s\0a-z,;:)\]}}]))"
STOP = re.compile(rf"(?<![.!?…])[.!?…]+{AFTER}")
# Stops that need no white space behind them. In Indian verses and Armenian times
# a digit may follow those of the second kind, which then end nothing.
WIDE = "。！？｡", "।॥۔؟։．።፧။។"
AFTER_WIDE = rf"(?:{CLOSERS}+(?=[\s\0]|\Z))?(?!\d)"
WIDE_STOP = re.compile(f"[{WIDE[0]}]+[」』｣”’）]*|[{WIDE[1]}]++{AFTER_WIDE}")
AFTER_MATH = re.compile(AFTER)
LIST_ITEM = re.compile(ITEM)
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


def stop_at(text: str, at: int) -> int:
    """Where the sentence ends whose stop is at text[at]; 0 if none does."""
    m = STOP.match(text, at)
    if not m or m[1].islower():
        return 0
    if text[at] == "." and not is_stop(text, at, m[1]):
        return 0
    return m.end()


# -------------------------------------------------------------- many texts at once

# Stands around each text: its first line begins behind a line end, and what
# is in another text begins no sentence of this one.
GAP = "\0\n"
BEYOND = 255  # the code of the characters that are not Latin-1


def table(test) -> Bools:
    """[256] bool: for which codes the character passes; BEYOND does not."""
    return np.array([test(chr(code)) for code in range(BEYOND)] + [False])


def one_of(characters: str) -> Bools:
    """[256] bool: which codes stand for one of the characters."""
    return table(lambda c: c in characters)


SPACES = table(str.isspace)
BLANKS = one_of(" \t\r")
STOPS = one_of(".!?")
LETTERS = table(lambda c: c.isascii() and c.isalpha())
SMALL = table(lambda c: c.isascii() and c.islower())
DIGITS = one_of("0123456789")
# A regular expression has to look at these.
ODD = ~table(lambda c: c.isascii() and c != "\0")
NO_WORD = ~(LETTERS | DIGITS | ODD)
# These tables say what the regular expressions say that they name.
CLOSES = one_of(".!?\"')]}*_$") | ODD  # CLOSERS
NO_START = one_of(",;:)]}") | SMALL  # AFTER: no sentence begins with these
IN_MARKER = one_of(" \t>*#(.0123456789") | ODD  # MARKER
BULLETS = one_of("-*+")  # ITEM
ITEM_ENDS = one_of(".)")  # ITEM: the end of a number
MAY_END = one_of(".!?$") | SPACES | ODD  # STOP_IN_MATH: before the last "$"

LOWER = np.frombuffer(bytes(range(256)).lower(), np.uint8)
WIDE_SPACES = [c for c in range(256, 0x3001) if chr(c).isspace()]
# The last four letters of the words that is_stop() has to look at, among them
# roman numerals.
ROMAN = [a + b + c for a in "ivx" for b in "ivx" for c in ("", *"ivx")]
SUSPECTS = [w[-4:].rjust(4, "\0") for w in [*ABBREVIATIONS, *NUMBERED, *ROMAN]]
SUSPECT_KEYS = np.frombuffer("".join(SUSPECTS).encode(), "<u4")


@dataclass(frozen=True)
class Joined:
    """Many texts, one after another, with code masked and a GAP around each."""

    text: str
    codes: Codes  # [len(text)]
    firsts: Ints  # [texts]: where each text begins
    lasts: Ints  # [texts]: where each text ends
    code: list[Span]
    formulas: list[Span]

    def which(self, ends: Ints) -> Ints:
        """The number of the text in which each sentence ends, or -1."""
        return np.searchsorted(self.firsts, ends) - 1


def join_texts(texts: list[str]) -> Joined:
    code = [code_spans(text) for text in texts]
    lengths = np.array(list(map(len, texts)), dtype=np.int64)
    firsts = np.cumsum(lengths + len(GAP)) - lengths
    lasts = firsts + lengths
    # The zeros at the end are there for those who look ahead.
    joined = GAP.join(["", *map(masked, texts, code), "\0" * 8])
    all_code = []
    formulas = []
    for i, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist())):
        all_code += [(first + a, first + b) for a, b in code[i]]
        if any(sign in texts[i] for sign in ("$", "\\", "[/")):
            formulas += math_spans(joined, first, last)
    codes = codes_of(joined)
    return Joined(joined, codes, firsts, lasts, all_code, formulas)


def codes_of(text: str) -> Codes:
    """[len(text)]: Latin-1 codes; for the rest, a vertical tab if it is white space, else BEYOND."""
    try:
        return np.frombuffer(text.encode("latin-1"), np.uint8)
    except UnicodeEncodeError:
        raw = text.encode("utf-32-le", "surrogatepass")
    points = np.frombuffer(raw, "<u4")
    codes = np.minimum(points, BEYOND).astype(np.uint8)
    beyond = np.flatnonzero(codes == BEYOND)
    is_space = np.isin(points[beyond], WIDE_SPACES)
    codes[beyond[is_space]] = ord("\v")
    return codes


def skip(codes: Codes, at: Ints, what: Bools) -> Ints:
    """For each place the first one from there on that is not `what`: a table."""
    at = at.copy()
    active = np.flatnonzero(what[codes[at]])
    for _ in range(64):
        if not len(active):
            return at
        at[active] += 1
        active = active[what[codes[at[active]]]]
    # A step at a time would be slow in very long runs.
    others = np.flatnonzero(~what[codes])
    at[active] = others[np.searchsorted(others, at[active])]
    return at


def sentence_ends(texts: list[str]) -> list[list[int]]:
    """Where the sentences of each text end, the last one at its length; an empty text has none."""
    ends, counts = all_ends(texts)
    borders = np.cumsum(counts).tolist()
    return [ends[a:b].tolist() for a, b in zip([0, *borders], borders)]


def all_ends(texts: list[str]) -> tuple[Ints, Ints]:
    """[sentences], [texts]: all ends, and how many each text has. Fastest with about 500 kB at a time."""
    if not any(texts):
        return np.zeros(0, np.int64), np.zeros(len(texts), np.int64)
    joined = join_texts(texts)
    formulas = np.fromiter(chain.from_iterable(joined.formulas), np.int64).reshape(-1, 2)
    found = [*stops(joined), *line_ends(joined)]
    found.append(math_ends(joined, formulas[:, 1]))
    ends = outside_math(np.concatenate(found), formulas)
    ends = np.sort(np.append(ends, joined.lasts))
    ends = ends[np.append(True, ends[1:] > ends[:-1])]
    ends = ends[in_text(joined, ends)]
    ends = ends[~space_follows(joined, ends)]
    ends = with_cuts(joined, ends)
    which = joined.which(ends)
    return ends - joined.firsts[which], np.bincount(which, minlength=len(texts))


def stops(joined: Joined) -> list[Ints]:
    """Where sentences end by a stop."""
    text = joined.text
    codes = joined.codes
    is_stop = (codes == ord(".")) | (codes == ord("!")) | (codes == ord("?"))
    at = np.flatnonzero(is_stop)
    at = at[(SPACES | CLOSES)[codes[at + 1]] & ~STOPS[codes[at - 1]]]
    after = skip(codes, at + 1, SPACES)
    clear = SPACES[codes[at + 1]] & ~ODD[codes[after]] & ~ODD[codes[at - 1]]
    yes = clear & ~NO_START[codes[after]]
    no = clear & ~yes
    yes &= (codes[at] != ord(".")) | surely_stops(codes, at, after)
    asked = at[~yes & ~no].tolist()
    if "…" in text:
        asked += [m.start() for m in re.finditer("…", text)]
    ends = [end for place in asked if (end := stop_at(text, place))]
    if any(sign in text for sign in chain(*WIDE)):
        ends += [m.end() for m in WIDE_STOP.finditer(text)]
    return [at[yes] + 1, np.array(ends, dtype=np.int64)]


def surely_stops(codes: Codes, at: Ints, after: Ints) -> Bools:
    """[n]: to which "." is_stop() certainly says yes; `after`: where the next sentence would begin."""
    before = LOWER[codes[at[:, None] + [-4, -3, -2, -1]]]  # [n, 4]: the last four characters
    earlier = before[:, :3]
    last = before[:, 3]
    no_marker = ~IN_MARKER[earlier].all(1) & (earlier != ord("\n")).all(1)
    number = DIGITS[last] & ~DIGITS[codes[after]] & no_marker
    # A word of at least four letters, or a whole word of three or two
    letters = LETTERS[before]
    three = letters[:, 1:].all(1) & (before[:, 0] == ord(" "))
    two = letters[:, 2:].all(1) & (before[:, 1] == ord(" "))
    before[three, :1] = 0
    before[two, :2] = 0
    suspect = np.isin(before.view("<u4")[:, 0], SUSPECT_KEYS)
    word = (letters.all(1) | three | two) & ~suspect
    return word | number | NO_WORD[last]


def line_ends(joined: Joined) -> list[Ints]:
    """Behind the last of several line ends, and before a list item or a heading."""
    codes = joined.codes
    at = np.flatnonzero(codes == ord("\n"))
    after = skip(codes, at + 1, BLANKS)
    first = codes[after]  # of the next line
    blank = first == ord("\n")
    ends_blank = np.zeros(len(at), dtype=bool)  # whether the line that ends here is blank
    ends_blank[np.searchsorted(at, after[blank])] = True
    numbered = DIGITS[first] | SMALL[first] | (first == ord("("))
    numbered &= ITEM_ENDS[codes[after[:, None] + [1, 2, 3, 4]]].any(1)
    bullet = BULLETS[first] & (codes[after + 1] == ord(" "))
    asked = at[numbered | bullet | (first == ord("#")) | (first == BEYOND)] + 1
    items = [place for place in asked.tolist() if LIST_ITEM.match(joined.text, place)]
    return [at[ends_blank & ~blank] + 1, np.array(items, dtype=np.int64)]


def math_ends(joined: Joined, ends: Ints) -> Ints:
    r"""Where a sentence ends with a formula, as in "\[ y = 3. \] Then". `ends`: of all formulas."""
    text = joined.text
    codes = joined.codes
    maybe = (codes[ends - 1] != ord("$")) | MAY_END[codes[ends - 2]]
    kept = []
    for end in ends[maybe].tolist():
        if not STOP_IN_MATH.search(text, end - 24, end):
            continue
        after = AFTER_MATH.match(text, end)
        if after and not after[1].islower():
            kept.append(after.end())
    return np.array(kept, dtype=np.int64)


def outside_math(ends: Ints, formulas: Ints) -> Ints:
    """The ends that lie in no formula of at most LIMIT characters. formulas: [n, 2], in order."""
    formulas = formulas[formulas[:, 1] - formulas[:, 0] <= LIMIT]
    n_before = np.searchsorted(formulas[:, 0], ends)
    return ends[ends >= np.append(0, formulas[:, 1])[n_before]]


def in_text(joined: Joined, ends: Ints) -> Bools:
    """[n]: which ends are in no GAP, nor in white space that begins a text."""
    which = joined.which(ends)
    begins = skip(joined.codes, joined.firsts, SPACES)[which]
    last = joined.lasts[which]
    inside = (which >= 0) & (ends <= last)
    return inside & ((ends > begins) | (ends == last))


def space_follows(joined: Joined, ends: Ints) -> Bools:
    """[n]: between which ends and the next there is only white space: it goes to the sentence before."""
    following = np.append(ends[1:], len(joined.text))
    same_text = joined.which(ends) == joined.which(following)
    return same_text & (skip(joined.codes, ends, SPACES) >= following)


# ---------------------------------------------------------- cuts in long sentences

SPACE = re.compile(r"\s+")


def with_cuts(joined: Joined, ends: Ints) -> Ints:
    """The ends, and cuts in the sentences longer than LONG."""
    firsts = joined.firsts[joined.which(ends)]
    begins = np.maximum(np.append(0, ends[:-1]), firsts)
    long = ends - begins > LONG
    found = []
    for begin, end in zip(begins[long].tolist(), ends[long].tolist()):
        whole = within(joined.formulas, begin, end)
        whole += within(joined.code, begin, end)
        borders = borders_of(join_spans(whole))
        found += cuts(joined.text, begin, end, borders)
    return np.sort(np.append(ends, np.array(found, dtype=np.int64)))


def within(spans: list[Span], begin: int, end: int) -> list[Span]:
    """Those that begin in text[begin:end]."""
    return spans[bisect_left(spans, (begin,)) : bisect_left(spans, (end,))]


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


# -------------------------------------------------------------------------- chunks

# The chance that Poisson(MEAN - 1) is at most n, for n < MOST - 1.
CHANCES = [math.exp(1 - MEAN) * (MEAN - 1) ** k / math.factorial(k) for k in range(MOST - 1)]
POISSON = [sum(CHANCES[: n + 1]) for n in range(MOST - 1)]


def text_digest(raw: bytes, seed: int) -> bytes:
    """16 bytes: a document's place in the shuffle, and a key for the lengths of its chunks."""
    salt = str(seed).encode()[-16:]
    return hashlib.blake2b(raw, digest_size=16, salt=salt).digest()


def chunk(texts: list[str], digests: list[bytes]) -> list[list[str]]:
    """The chunks of each document. The digests are their text_digest()."""
    ends, counts = all_ends(texts)
    last = last_sentences(counts, digests)
    chunk_ends = ends[last]
    which = np.repeat(np.arange(len(texts)), counts)[last]
    chunks = [[] for _ in texts]
    start = 0
    for number, end in zip(which.tolist(), chunk_ends.tolist()):
        text = texts[number]
        chunks[number].append(text[start:end])
        start = end % len(text)  # 0 behind its last chunk
    return chunks


def last_sentences(counts: Ints, digests: list[bytes]) -> Ints:
    """[chunks]: the last sentence of each chunk, numbered through; counts: [documents], of sentences."""
    keys = np.frombuffer(b"".join(digests), dtype=">i8")[1::2]
    # [sentences]: the first sentence of the same document
    first = np.repeat(np.cumsum(counts) - counts, counts)
    place = np.arange(len(first)) - first
    # As many lengths are drawn as there are sentences, which is more than enough.
    draws = hash_uniform(np.repeat(keys, counts), place)
    lengths = 1 + np.searchsorted(POISSON, draws, side="right")
    total = np.cumsum(lengths)
    last = total - (total - lengths)[first] - 1  # counted within the document
    some = last < np.repeat(counts, counts)
    ends_of_documents = np.cumsum(counts)[counts > 0] - 1
    return np.unique(np.append((first + last)[some], ends_of_documents))
