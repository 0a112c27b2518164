r"""A document as sentences, and runs of sentences as chunks. Nothing is lost: the pieces joined are the text.

    sentence_ends(text)    where sentences end, as positions; the last one is len(text)
    chunk(text, digest)    chunks of 1 + Poisson(7) sentences, at most 20 (8 in the mean), as in the paper

A sentence ends at . ! ? and what closes it, when white space and no lower-case letter follow; at a blank line; before a list item or
a heading. White space goes to the front of the next sentence, a blank line to the back of the one before. No end lies inside

    $...$  $$...$$  \(...\)  \[...\]  \begin{x}...\end{x}     ``` fences, `code`, indented code     tables, <pre>, <table>
    1. (a list marker)   e.g.  Fig. 3  Dr.  et al.  J. (an initial)   3.14   https://...   me@example.org

unless it is longer than LIMIT characters. A sentence longer than LONG is cut at white space outside of all these.
The lengths are drawn from a generator seeded by the document's own hash, so the chunks of a text are the same on any machine, in
any order and any number of processes.
"""

import hashlib
import math
import re
from bisect import bisect_right
from functools import lru_cache

LONG, LIMIT = 1000, 4000  # characters: where a sentence without an end is cut if it can be, and where it is in any case
MEAN, MOST = 8, 20  # sentences a chunk

# ------------------------------------------------------------------------------------------------ what stays whole

# $ starts a formula that ends at the next $ in the same paragraph. Two backslashes are a line break in LaTeX: \\[2pt] opens nothing.
# Patterns begin with a set of characters, which re looks for quickly; what may follow each of these comes behind a (?<=...).
# "$5. He bought 3 for $10": prices; the second $ closes nothing. Two plain words in a row are no formula, and a digit does not follow one.
PRICE = r"\d(?:[^$]*\$\d|[\d,.]*(?:[ -][^$]*?)?(?<![\\\w])[A-Za-z][a-z]+[,.]? [A-Za-z][a-z]*\b[^$]*\$)"
IN_MATH = (  # what follows $ and what follows a backslash
    rf"(?<=\$)(?:\$(?!\$).{{1,{LIMIT}}}?\$\$|(?!{PRICE})[^$\\\n]*(?:(?:\\.|\n(?!\s*\n))[^$\\\n]*)*(?<!\$)\$)"
    rf"|(?<=\\)(?:[\\$]|\[.{{0,{LIMIT}}}?\\\]|\(.{{0,{LIMIT}}}?\\\)|begin\{{(?P<name>\w+\*?)\}}.{{0,{LIMIT}}}?\\end\{{(?P=name)\}})"
)
MATH = re.compile(rf"[$\\](?:{IN_MATH})", re.DOTALL)
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


def whole_spans(text: str) -> list[tuple[int, int]]:
    """Ranges of characters inside which no sentence ends, in order, none within another."""
    code = code_spans(text)
    return join_spans(code + [m.span() for m in MATH.finditer(masked(text, code))])


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
AFTER = rf"{CLOSERS}*(?=\s+([^\sa-z,;:)\]}}]))"  # what a sentence ends with, and how the next one may begin
STOP = rf"(?<=[.!?…])[.!?…]*{AFTER}|(?<=\n)(?:(?:[ \t\r]*\n)+|(?={ITEM}))|(?<=[。！？])[」』”’）]*"
# Formulas are matched as well, so that nothing inside them is.
END = re.compile(rf"[.!?…\n。！？$\\](?:{STOP}|{IN_MATH})", re.DOTALL)
AFTER_MATH = re.compile(AFTER)
STOP_IN_MATH = re.compile(r"[.!?…](?:\s*\\\\)?\s*(?:\$\$?|\\[\])]|\\end\{\w+\*?\})\Z")
NEVER = {  # no sentence ends behind these, whatever follows
    *"dr mr mrs ms prof st rev hon gen col capt lt sgt gov sen rep pres messrs mme mlle fr".split(),
    *"fig figs eq eqs eqn eqns thm prop cor def lem al cf viz vs resp approx ca esp incl ibid op ed eds trans".split(),
}
NUMBERED = set("no nos p pp vol vols sec secs sect ch chap art ex exs ref refs ver v pt par app tab vers nr jan feb mar apr jun jul aug sep sept oct nov dec".split())
TAILS = {word[-4:] for word in NEVER | NUMBERED if len(word) >= 4}  # most stops follow four letters that are none of these
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


def candidate_ends(text: str) -> list[int]:
    """Where sentences may end; none lies in a formula."""
    ends = []
    for m in END.finditer(text):
        at = m.start()
        if after := m[1]:
            tail = text[at - 4 : at]
            if (not tail.isalpha() or tail.lower() in TAILS) and text[at] == "." and not is_stop(text, at, after):
                continue
            if after > "z" and after.islower():
                continue
            ends.append(m.end())
            continue
        end, kind = m.end(), text[at]
        if kind not in "$\\":
            ends.append(end)
        elif kind == "$" and text[end - 2] not in ".!?…$ ":  # most formulas
            continue
        elif STOP_IN_MATH.search(text, end - 24, end) and (m := AFTER_MATH.match(text, end)) and not m[1].islower():
            ends.append(m.end())  # "$y = 3.$ Then": the stop is in the formula
    return ends


def sentence_ends(text: str) -> list[int]:
    """Positions at which sentences end, rising; the last is len(text) (none for an empty text)."""
    code, ends, before = code_spans(text), [], 0
    for end in [*candidate_ends(masked(text, code)), len(text)] if text else ():
        if end == before:  # the text ends where a sentence does
            continue
        if text[end - 1].isspace() and text[before:end].isspace():  # goes to the sentence before, if there is one
            if ends:
                ends[-1] = before = end
            elif end == len(text):
                ends.append(end)
            continue
        if end - before > LONG:
            ends += cuts(text, before, end)
        ends.append(end)
        before = end
    return ends


def masked(text: str, code: list[tuple[int, int]]) -> str:
    """The text without its code: a $ there opens no formula."""
    pieces, at = [], 0
    for start, end in code:
        pieces += [text[at:start], "x" * (end - start)]
        at = end
    return "".join([*pieces, text[at:]]) if code else text


@lru_cache(maxsize=1)
def borders_of(text: str) -> list[int]:
    """start + 1, end of each range that is not to be cut. Cuts are rare, so it is not looked for before; one text can need very many, so it is kept."""
    return [border for start, end in whole_spans(text) if end - start <= LIMIT for border in (start + 1, end)]


def outside(ends: list[int], borders: list[int]) -> list[int]:
    """The ends that lie in none of the ranges; on the border of one is outside."""
    return [end for end in ends if not bisect_right(borders, end) % 2] if borders else ends


def cuts(text: str, start: int, end: int) -> list[int]:
    """Where to cut text[start:end], which is longer than LONG: at white space outside formulas and between no two digits, if possible."""
    found, borders = [], borders_of(text)
    while end - start > LONG:
        spaces = [m.start() for m in SPACE.finditer(text, start + 1, min(start + LIMIT, end))]
        good = outside([at for at in spaces if not (text[at - 1].isdigit() and text[at : at + 9].lstrip()[:1].isdigit())], borders)
        near = good[: bisect_right(good, start + LONG)]
        if not good and end - start <= LIMIT:
            break
        start = near[-1] if near else good[0] if good else spaces[-1] if spaces else no_word(text, start + LIMIT)
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


def chunk(text: str, digest: bytes) -> list[str]:
    """The document's chunks. `digest` is text_digest of it, so they depend on the text and the seed alone."""
    ends, state = sentence_ends(text), int.from_bytes(digest[8:], "big")
    pieces, start, i = [], 0, -1
    while i < len(ends) - 1:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX: its upper bits are good enough for lengths
        i = min(i + 1 + bisect_right(POISSON, (state >> 11) * 2.0**-53), len(ends) - 1)
        pieces.append(text[start : ends[i]])
        start = ends[i]
    return pieces
