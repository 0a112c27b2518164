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
from bisect import bisect_left, bisect_right

LONG, LIMIT = 1000, 4000  # characters: where a sentence without an end is cut if it can be, and where it is in any case
MEAN, MOST = 8, 20  # sentences a chunk

# ------------------------------------------------------------------------------------------------ what stays whole

# $ starts a formula that ends at the next $ in the same paragraph. Two backslashes are a line break in LaTeX: \\[2pt] opens nothing.
# Patterns begin with a set of characters, which re looks for quickly; what may follow each of these comes behind a (?<=...).
# "$5 each and $3 ...": a price, and the next $ does not close it: two plain words in a row are no formula.
PRICE = r"\d[\d,.]*(?:[ -][^$]*)?(?<![\\\w])[a-z]{2,}[,.]? [A-Za-z][a-z]*\b[^$]*\$"
MATH = re.compile(
    rf"[$\\](?:(?<=\\)(?:[\\$]|\[.{{0,{LIMIT}}}?\\\]|\(.{{0,{LIMIT}}}?\\\)|begin\{{(\w+\*?)\}}.{{0,{LIMIT}}}?\\end\{{\1\}})"
    rf"|(?<=\$)(?:\$(?!\$).{{1,{LIMIT}}}?\$\$|(?!{PRICE})[^$\\\n]*(?:(?:\\.|\n(?!\s*\n))[^$\\\n]*)*(?<!\$)\$))",
    re.DOTALL,
)
CODE = re.compile(rf"^[ \t]*(```|~~~)[^\n]*\n.{{0,{LIMIT}}}?^[ \t]*\1[^\n]*$|(?<!`)`[^`\n]+`(?!`)|<(pre|table|code)\b.{{0,{LIMIT}}}?</\2>", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:\A|(?<=\n)[ \t\r]*\n)((?:(?: {4}|\t)[^\n]*(?:\n|\Z)|[ \t\r]*\n(?= {4}|\t))+)")
CODE_SIGN = re.compile(r"[={};<>_]|\w\(|^\s*(?:def|for|if|while|import|return|print|class|\$|>>>)\b", re.MULTILINE)
TABLE = re.compile(r"^[ \t]*\|[^\n]*(?:\n[ \t]*\|[^\n]*)*|^[^\n|]*\|[^\n]*\n[ \t:|-]*-[ \t:|-]*(?:\n[^\n|]*\|[^\n]*)*", re.MULTILINE)

TABLE_SIGN = re.compile(r"\|[ \t:]*-|-[ \t:]*\||(?:\A|\n)[ \t]*\|")


def code_spans(text: str) -> list[tuple[int, int]]:
    spans = []
    if "`" in text or "~~~" in text or "</" in text:
        spans += [m.span() for m in CODE.finditer(text)]
    if "\n    " in text or "\n\t" in text or text.startswith(("    ", "\t")):
        spans += [m.span(1) for m in INDENTED.finditer(text) if CODE_SIGN.search(m[1])]
    if "|" in text and TABLE_SIGN.search(text):
        spans += [m.span() for m in TABLE.finditer(text)]
    return spans


def whole_spans(text: str) -> list[tuple[int, int]]:
    """Ranges of characters inside which no sentence ends, in order, none within another or longer than LIMIT."""
    code = [span for span in code_spans(text) if span[1] - span[0] <= LIMIT]
    for start, end in code:  # a $ in code opens no formula
        text = text[:start] + "x" * (end - start) + text[end:]
    spans = [m.span() for m in MATH.finditer(text)] if "$" in text or "\\" in text else []
    return [span for span in (join_spans(code + spans) if code else spans) if span[1] - span[0] <= LIMIT]


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
END = re.compile(
    rf"[.!?…\n。！？](?:(?<=[.!?…])[.!?…]*(?:\s*(?:\\\\)?\s*(?:\\[\])]|\\end\{{\w+\*?\}}|\$\$))?{CLOSERS}*(?=\s+([^\sa-z,;:)\]}}]))"  # formulas close after it
    rf"|(?<=\n)(?:(?:[ \t\r]*\n)+|(?={ITEM}))|(?<=[。！？])[」』”’）]*)"
)
NEVER = {  # no sentence ends behind these, whatever follows
    *"dr mr mrs ms prof st rev hon gen col capt lt sgt gov sen rep pres messrs mme mlle fr".split(),
    *"fig figs eq eqs eqn eqns thm prop cor def lem al cf viz vs resp approx ca esp incl ibid op ed eds trans".split(),
}
NUMBERED = set("no nos p pp vol vols sec secs sect ch chap art ex exs ref refs ver v pt par app tab vers nr jan feb mar apr jun jul aug sep sept oct nov dec".split())
DOTTED = re.compile(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}")  # e.g  i.e  U.S  Ph.D
MARKER = re.compile(r"(?:\A|\n)[ \t>*#(]*(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5}|\d{1,2}(?:\.\d{1,2})+)\Z")
SPACE = re.compile(r"\s+(?=\S)")
OPENERS = "([{\"'“‘«*_$"


def is_stop(text: str, at: int, after: str) -> bool:
    """Whether the "." at text[at] ends a sentence; `after` is the next character that is no white space."""
    words = text[max(at - 16, 0) : at].split()
    if not words or text[at - 1].isspace():
        return True
    word = words[-1].lstrip(OPENERS)
    low = word.lower()
    if low in NEVER or DOTTED.fullmatch(word):
        return False
    if low in NUMBERED and (after.isdigit() or after in "$\\("):
        return False
    if len(word) == 1 and word.isupper() and word != "I":  # an initial
        return False
    if word[-1:].isdigit() and after.isdigit():
        return False
    return len(word) > 8 or not MARKER.search(text, max(at - 24, 0), at) or not starts_line(text, at)


def starts_line(text: str, at: int) -> bool:
    """Whether what MARKER found before `at` truly begins a line: its window may begin in the middle of one."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return len(line) < 20 and bool(MARKER.search(line))


def candidate_ends(text: str) -> list[int]:
    ends = []
    for m in END.finditer(text):
        after, at = m[1], m.start()
        # Most stops follow a word of seven letters and more, or a formula; only what is shorter can be an abbreviation or a number.
        if after and (after.islower() or text[at] == "." and not text[at - 7 : at].isalpha() and not is_stop(text, at, after)):
            continue
        ends.append(m.end())
    return ends


def sentence_ends(text: str) -> list[int]:
    """Positions at which sentences end, rising; the last is len(text) (none for an empty text)."""
    ends, before = [], 0
    for end in outside([*candidate_ends(text), len(text)], whole_spans(text)) if text else ():
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


def outside(ends: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """The ends that lie in none of the spans; on the border of one is outside."""
    if not spans:
        return ends
    starts = [start for start, _ in spans]
    return [end for end in ends if not (i := bisect_left(starts, end)) or spans[i - 1][1] <= end]


def cuts(text: str, start: int, end: int) -> list[int]:
    """Where to cut text[start:end], which is longer than LONG: at white space outside formulas and between no two digits, if possible."""
    found, spans = [], whole_spans(text)  # rare, so they are looked for again
    while end - start > LONG:
        spaces = [m.start() for m in SPACE.finditer(text, start + 1, min(start + LIMIT, end))]
        good = outside([at for at in spaces if not (text[at - 1].isdigit() and text[at : at + 9].lstrip()[:1].isdigit())], spans)
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
