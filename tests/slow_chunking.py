"""The reference for data/lib/chunking.py: one text at a time, with plain regular expressions."""

import re

from data.lib.chunking import (
    AFTER_MATH,
    ITEM,
    LONG,
    MATH,
    STOP,
    STOP_IN_MATH,
    WIDE_STOP,
    borders_of,
    code_spans,
    cuts,
    is_stop,
    join_spans,
    masked,
    outside,
)

BLANK_LINES = r"\n(?:[ \t\r]*\n)+"
SIGN = re.compile(rf"{STOP.pattern}|{BLANK_LINES}|\n(?={ITEM})|{WIDE_STOP.pattern}")


def formulas(text: str) -> list[tuple[int, int]]:
    return [m.span() for m in MATH.finditer(text) if m[0] not in (r"\\", r"\$")]


def candidates(text: str, math: list[tuple[int, int]]) -> list[int]:
    """Where sentences may end; none lies in a formula."""
    ends = []
    for m in SIGN.finditer(text):
        after = m[1]  # None for all but stops
        if after and (after.islower() or text[m.start()] == "." and not is_stop(text, m.start(), after)):
            continue
        ends.append(m.end())
    for _, end in math:
        stop = STOP_IN_MATH.search(text, max(end - 24, 0), end)
        after = AFTER_MATH.match(text, end)
        if stop and after and not after[1].islower():
            ends.append(after.end())
    return outside(sorted(ends), borders_of(math))


def slow_sentence_ends(text: str) -> list[int]:
    """What sentence_ends([text])[0] has to be."""
    code = code_spans(text)
    ends = []
    before = 0
    text = masked(text, code)
    math = formulas(text)
    whole = borders_of(join_spans(code + math))
    for end in [*candidates(text, math), len(text)]:
        sentence = text[before:end]
        if sentence.isspace():  # goes to the sentence before, if there is one
            if ends:
                ends[-1] = before = end
            elif end == len(text):
                ends.append(end)
        elif sentence:
            if end - before > LONG:
                ends += cuts(text, before, end, whole)
            ends.append(end)
            before = end
    return ends
