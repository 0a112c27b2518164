"""What data/lib/chunking.py does with many texts at once, one text at a time and with plain regular expressions: the reference for its tests."""

import re

from data.lib.chunking import AFTER, ITEM, LONG, MATH, STOP_IN_MATH, borders_of, code_spans, cuts, is_stop, join_spans, masked, outside

SIGN = re.compile(rf"(?<![.!?…])[.!?…]+{AFTER}|\n(?:(?:[ \t\r]*\n)+|(?={ITEM}))|[。！？][」』”’）]*")


def formulas(text: str) -> list[tuple[int, int]]:
    return [m.span() for m in MATH.finditer(text) if m[0] not in (r"\\", r"\$")]


def candidates(text: str, math: list[tuple[int, int]]) -> list[int]:
    """Where sentences may end; none lies in a formula."""
    ends = [m.end() for m in SIGN.finditer(text) if not m[1] or not m[1].islower() and (text[m.start()] != "." or is_stop(text, m.start(), m[1]))]
    for _, end in math:
        stop, after = STOP_IN_MATH.search(text, max(end - 24, 0), end), re.compile(AFTER).match(text, end)
        if stop and after and not after[1].islower():
            ends.append(after.end())
    return outside(sorted(ends), borders_of(math))


def slow_sentence_ends(text: str) -> list[int]:
    code, ends, before = code_spans(text), [], 0
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
            ends += [*(cuts(text, before, end, whole) if end - before > LONG else []), end]
            before = end
    return ends


