"""Grades responses: extract_answer(response) finds an answer, grade(response, gold) compares it with the reference."""

import contextlib
import functools
import multiprocessing
import re
import signal
from pathlib import Path

import sympy
from sympy import Rational, Symbol, pi

from data.lib.latex import KNOWN, TEXT, Parser, braces, clean, tokens_of
from data.lib.mathvalues import MAX_ANSWER, MAX_ITEMS, MAX_RESPONSE, Unreadable, Value, bare, divide, equal, label, multiply, proportional, region_of

# -------------------------------------------------------------------------------------------- from a response to an answer

# Where a base model goes on with a problem of its own making, or a chat model with another turn.
NEXT_PROBLEM = re.compile(
    r"(?:^|\n|(?<=[.!?$}\]*]))[#*>\- \t]{0,20}(?:(?:next|new|another)\s+)?(?:problem|question|exercise|user|human|instruction|input)\b[ \t]*#?\d*[ \t]*\**[:.]"
    r"|\n[#* \t]{0,20}Q[ \t]*\d*[ \t]*[:.]|\n[ \t]{0,9}#+[ \t]*(?:problem|question|exercise|instruction|example)\b|\n[ \t]*(?:problem|exercise|example)[ \t]+\d+\b"
    r"|<\|?(?:im_start|im_end|user|endoftext|eot_id|end_of_turn|start_of_turn|start_header_id|end)\b[^>\n]{0,20}>|</s>|\[/?INST\]",
    re.IGNORECASE,
)
HOPE = re.compile(r"I hope (?:it|this) is correct", re.IGNORECASE)

# (pattern, priority): the lowest number that is found wins, of equals the right-most. The answer is what follows.
SIGNS = (
    (re.compile(r"final\s+answer\b[*_}.]*\s*(?:is|are|:|=)*", re.IGNORECASE), 0),
    (re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])"), 1),
    (re.compile(r"(?:^|\n|\s)####(?!#)[ \t]*(?=\S)"), 1),
    (re.compile(r"<answer>", re.IGNORECASE), 1),
    (re.compile(r"\b(?:answers?|ans|choice|option)\b[*_\"']*\s*(?:is|are|would be|must be|:|=)+", re.IGNORECASE), 2),
    (re.compile(r"(?:^|\n)#+[ \t]*answer[ \t]*\n|\\text(?:bf|it)\{answers?[.:]?\}|\*\*answer[.:]?\*\*", re.IGNORECASE), 2),
    (re.compile(r"\b(?:option|choice|answer)\s+(?=\(?[A-J]\b)"), 3),
)
# What stands around an answer in its sentence.
BECAUSE = re.compile(r",?\s+(?:because|since|as (?:we|it|the)|which|where|so that|when we|for which|and (?:the|so|we|this|it))\b", re.IGNORECASE)
BEFORE = re.compile(r"^(?:[\s,:]|(?:therefore|thus|hence|indeed|simply|then|just|clearly|of course|also|exactly)\b|not\b.{1,80}?\bbut\b)+", re.IGNORECASE)
REMARK = re.compile(r"\s*\((?:see|as|from|since|because|by|using|note|check)\b[^()]{0,200}\)$", re.IGNORECASE)
QED = re.compile(r"[\s$.]*\\(?:blacksquare|square|qed|Box)[\s$.]*$")
TAG = re.compile(r"</?(?:p|b|strong|div|br|span|em|i|u|code|center|li|ul)\b[^<>]{0,40}>", re.IGNORECASE)
DOUBLED = re.compile(r"\\\\(?=(?:boxed|d?frac|sqrt|text|pi|left|cdot|times)\b)")
FORMULA = re.compile(r"\$\$(.{1,2000}?)\$\$|(?<!\\)\$([^$]{1,2000}?)(?<!\\)\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-−]?\s?(?:\\?\$)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)(?::\d+)*(?:\s?/\s?\d+)?(?:\s?[¼-¾⅐-⅞])?(?:\s?\\?%)?|[-−]?[¼-¾⅐-⅞]")


STRICT = re.compile(r"[Tt]he final answer is:?\s+(.+?)\.(?=\s|$)")


def first_problem(text: str) -> str:
    """The response, without markup, up to the next made-up problem or turn, unless nothing before it could be an answer."""
    text = TAG.sub(" ", text.replace("\ufeff", "").replace("\u200b", ""))
    text = text if "\\begin" in text else DOUBLED.sub(r"\\", text)  # not the end of a matrix' row
    for n, m in enumerate(NEXT_PROBLEM.finditer(text)):
        before = text[: m.start()]
        if re.search(r"\d|\\boxed|answer", before) or (before.strip() and len(before) < 80 and not before.rstrip().endswith(":")):
            text = before
            break
        if n > 20:
            break
    hope = HOPE.search(text)
    return text[: hope.start()] if hope and text[: hope.start()].strip() else text


def sentence(text: str, start: int) -> str:
    """The text from `start` to the end of its sentence: a full stop, or a line's end, outside of formulas and braces."""
    begin, start = start, re.compile(r"[\s:*_>`}]*").match(text, start).end()
    depth, math_mode, end = 0, False, min(len(text), start + MAX_ANSWER)
    for m in re.compile(r"\\[()\[\]]|\\begin|\\end|\\.|\$\$?|[{}\n]|\.(?=\s|$|[A-Z\"*])|<", re.DOTALL).finditer(text, start, end):
        c = m[0]
        if c in ("\\(", "\\[", "\\begin", "{"):
            depth += 1
        elif c in ("\\)", "\\]", "\\end", "}"):
            depth -= 1
            if depth < 0:
                end = m.start()
                break
        elif c in ("$", "$$"):
            math_mode = not math_mode
        elif (c == "\n" and not depth and not math_mode) or (c == "." and not depth and not math_mode and not re.search(r"\b(?:[ap]\.m|vs|approx)$", text[max(0, m.start() - 8) : m.start()])) or (c == "<" and text.startswith("</", m.start())):
            end = m.start()
            break
    if "**" in text[begin:start]:
        end = start + len(text[start:end].split("**")[0])
    answer = text[start:end].lstrip(" \t\n,;:*_`").rstrip(" \t\n.,;:*_`")
    return answer[1:].split('"')[0] if answer[:1] == '"' else answer  # {"answer": "5"}


def boxed(text: str, start: int) -> str | None:
    """What the \\boxed at `start` holds; those that follow after "and", "or" or a comma belong to it."""
    brace = re.compile(r"\\(?:boxed|fbox)\s*").match(text, start)
    if not brace:
        return None
    if text[brace.end() : brace.end() + 1] != "{":
        bare = re.compile(r"[^\s$.,]{1,100}").match(text, brace.end())
        return bare[0] if bare else None
    return braces(text, brace.end())


def last_boxed(text: str, starts: list[int]) -> str | None:
    """The last box. Boxes before it that only "and", "or" or a comma parts from it are answers, too."""
    found, after = None, 0
    for start in reversed(starts[-MAX_ITEMS:]):
        here = boxed(text, start)
        if here is None:
            if found is None:
                continue
            break
        end = text.find("{", start) + len(here) + 2
        if found is None:
            found = here
        elif end > after:  # a box around the other
            continue
        elif here == found.split(", ")[0]:
            break  # said again
        elif re.fullmatch(r"[\s$]*(?:,|;)?[\s$]*(?:\\text\{)?\s*(?:and|or|,)?\s*\}?[\s$]*(?:[a-z]\s*=\s*)?", text[end:after]):
            found = here + ", " + found
        else:
            break
        after = start
    return found


def extract_answer(response: str) -> str | None:
    """The answer that a response gives to its problem, as it stands there; None if there is none.

    The table SIGNS says what announces an answer. Without any: a response that is nothing but an answer, then the last formula or number.
    What follows a made-up next problem does not count.
    """
    text = first_problem(response[:MAX_RESPONSE])
    found = {}
    for pattern, priority in SIGNS:
        for m in pattern.finditer(text):
            found.setdefault(priority, []).append(m)
    for priority in sorted(found):
        for m in sorted(found[priority], key=lambda m: -m.start())[:50]:
            if "box" in m[0]:
                answer = last_boxed(text, [other.start() for other in found[priority] if "box" in other[0] and other.start() <= m.start()])
            else:
                answer = sentence(text, m.end())
                inner = [b.start() for b in re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])", answer)]
                answer = (last_boxed(answer, inner) if inner else None) or answer
                answer = REMARK.sub("", BEFORE.sub("", BECAUSE.split(BEFORE.sub("", answer))[0])).rstrip(" \t\n.,;:*_")
            answer = re.sub(r"^\$?[^$]{0,99}\b(?:answer|value)\s*(?:is|:)[\s}:]*", "", answer or "").strip()
            if answer:
                return narrowed(answer)
    return weak_answer(text)


def prose(text: str) -> bool:
    """Whether a text is a sentence rather than an answer: words that are neither names of functions nor units stand before the rest."""
    return len([w for w in re.findall(r"(?<![\\a-zA-Z])[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", text)) if w.lower() not in KNOWN]) > 3


def narrowed(answer: str) -> str:
    """The last formula or number of an answer that is a sentence and cannot be read otherwise."""
    if len(answer) <= MAX_ANSWER and (readable(answer) or not prose(answer)):
        return answer
    return weak_answer(answer, whole=False) or answer


def weak_answer(text: str, whole: bool = True) -> str | None:
    """The answer of a text that does not announce it."""
    text = (text[:-40] + QED.sub("", text[-40:])).strip()
    if not text:
        return None
    if whole and len(text) <= 300 and "\n" not in text and (readable(text.rstrip(".")) or (len(text.split()) <= 3 and not re.search(r"[.!?,] |\b(?:is|are)\b", text))):
        return text.rstrip(".") if not re.search(r"[ap]\.m\.$", text) else text
    if whole and len(text) <= 80 and "\n" not in text and re.match(r"\$.*\$\.?$", text) and not prose(text):
        return text
    if whole and re.match(r"\(?[A-J][).:]\)?\s+\S", text) and "\n" not in text:
        return text
    tail = re.sub(r"\s*\\end\{(?:align|aligned|equation|gather|gathered|eqnarray|split)\*?\}[\s$\]\\]*$", "", text[-5000:])
    candidates = []  # (end, -start, answer)
    for m in FORMULA.finditer(tail):
        candidates.append((m.end(), -m.start(), next(g for g in m.groups() if g is not None)))
    for m in re.finditer(r"\*\*([^*\n]{1,200})\*\*", tail):
        candidates.append((m.end(), -m.start(), m[1]))
    lines = tail.splitlines()
    equals = tail.rfind("=")
    if equals >= 0 and lines and equals >= len(tail) - len(lines[-1]) - 1:
        right = sentence(tail, equals + 1)
        if not re.search(r"\$(?!\d)", right) and readable(right):
            candidates.append((tail.find(right, equals) + len(right), -equals, right))
    for m in NUMBER.finditer(tail):
        candidates.append((m.end(), -m.start(), m[0]))
    if not candidates:
        said = re.search(r"\b(?:is|are|be)\s+([A-Za-z][\w' ]{0,40})[.!]?\s*$", tail)
        return said[1] if said else None
    return max(candidates)[2].strip()  # the one that ends last; of several, the longest: a number in a formula is part of it


# ------------------------------------------------------------------------------------------------ numbers, to many digits



def matched(a: tuple, b: tuple) -> bool:
    """Whether two collections are the same in some order."""
    if len(a) != len(b):
        return False
    rest = list(b)
    for x in a:
        hit = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if hit is None:
            return False
        del rest[hit]
    return True


def unique(items: tuple) -> tuple:
    out = []
    for x in items:
        if not any(same(x, y) for y in out):
            out.append(x)
    return tuple(out)


def same_equation(a: Value, b: Value) -> bool:
    """Two equations or inequalities, each link up to a factor and moved terms."""
    if len(a.how) == 1 and len(b.how) == 1 and all(isinstance(x, sympy.Expr) for v in (a, b) for x in v.items):
        sides = []
        for v in (a, b):
            left, right = v.items
            sides.append((right - left if ">" in v.how[0] else left - right, v.how[0].replace(">", "<")))
        if sides[0][1] == sides[1][1] and sides[0][1] != "in":
            return proportional(sides[0][0], sides[1][0], "<" in sides[0][1])
    flipped = [Value("rel", tuple(s.translate(str.maketrans("<>", "><")) for s in reversed(v.how)), v.items[::-1]) if ">" in "".join(v.how) else v for v in (a, b)]
    return flipped[0].how == flipped[1].how and len(a.items) == len(b.items) and all(map(same, flipped[0].items, flipped[1].items))


def same(a, b) -> bool:
    """Whether an answer a means the reference b."""
    if not isinstance(a, Value) and not isinstance(b, Value):
        return equal(a, b)
    kinds = [v.kind if isinstance(v, Value) else "number" for v in (a, b)]
    if "rel" in kinds:
        return same_rel(a, b, kinds)
    if kinds == ["words", "words"]:
        return a.how == b.how and len(a.items) == len(b.items) and all(map(same, a.items, b.items))
    if kinds == ["seq", "seq"] and a.how == b.how:
        return len(a.items) == len(b.items) and all(map(same, a.items, b.items))
    if kinds[0] == "list" and kinds[1] != "list" and len(one := unique(a.items)) == 1:  # "3/8, or 0.375"
        return same(one[0], b)
    if kinds[0] == kinds[1] and kinds[0] in ("list", "set"):
        if named(a) and named(b):
            return matched(a.items, b.items)
        a, b = (tuple(bare(x, False) for x in v.items) for v in (a, b))
        return matched(unique(a), unique(b)) if kinds[0] == "set" else matched(a, b)
    if set(kinds) == {"list", "set"}:
        items = [tuple(bare(x, False) for x in v.items) for v in (a, b)]
        return "and" not in (a if kinds[0] == "list" else b).how[:-1] and matched(*items)
    if "set" in kinds and "number" in kinds:
        one, number = (a, b) if kinds[0] == "set" else (b, a)
        return len(one.items) == 1 and same(one.items[0], number)
    if "seq" in kinds and ("number" in kinds or "list" in kinds):
        tuple_, other = (a, b) if kinds[0] == "seq" else (b, a)
        if isinstance(other, sympy.MatrixBase):
            return tuple_.how in ("()", "<>") and other.shape == (len(tuple_.items), 1) and all(map(same, tuple_.items, other))
        if isinstance(other, Value) and named(other) and tuple_.how == "()":  # x = 3, y = 4 for (3, 4)
            names = [str(x.items[0]) for x in other.items]
            return names == sorted(names) and len(names) == len(tuple_.items) and all(same(x.items[-1], y) for x, y in zip(other.items, tuple_.items))
        return False
    if set(kinds) == {"seq"} and "<>" in (a.how, b.how) and "()" in (a.how, b.how):
        return len(a.items) == len(b.items) and all(map(same, a.items, b.items))
    if "region" in kinds:
        a, b = region_of(a), region_of(b)
        return len(a.items) == len(b.items) and all(x[1] == y[1] and x[3] == y[3] and same(x[0], y[0]) and same(x[2], y[2]) for x, y in zip(a.items, b.items))
    return False


def named(value: Value) -> bool:
    """x = 1, y = 2: values of several names."""
    names = [x.items[0] for x in value.items if isinstance(x, Value) and x.kind == "rel" and x.how == ("=",) and isinstance(x.items[0], Symbol)]
    return value.kind == "list" and len(names) == len(value.items) and len(set(names)) == len(names) > 1


def same_rel(a, b, kinds) -> bool:
    """same() where one side, at least, is an equation, an inequality, "x in", or a ratio."""
    ratio = [isinstance(v, Value) and v.kind == "rel" and set(v.how) == {":"} for v in (a, b)]
    if all(ratio):
        if len(a.items) != len(b.items):
            return False
        return all(equal(multiply(x, b.items[0]), multiply(y, a.items[0])) for x, y in zip(a.items, b.items)) if all_scalars(a, b) else all(map(same, a.items, b.items))
    if any(ratio):
        colon, other = (a, b) if ratio[0] else (b, a)
        return len(colon.items) == 2 and not isinstance(other, Value) and all_scalars(colon) and equal(divide(*colon.items), other)
    if kinds == ["rel", "rel"]:
        if same_equation(a, b):
            return True
        if set(a.how) == set(b.how) == {"="} and same(a.items[0], b.items[0]) and label(b.items[0]):
            return same(a.items[-1], b.items[-1])
        if set(a.how) == set(b.how) == {"="} and {str(v.items[0]) for v in (a, b)} in ({"y", "f*x"}, {"y", "g*x"}):
            return same(a.items[-1], b.items[-1])
        short = bare(a, True)  # x = 2 + 3 = 5
        if len(a.how) > 1 and set(a.how) == {"="} and label(a.items[0]):
            return same(Value("rel", ("=",), (a.items[0], short)), b)
    x, y = bare(a, True), bare(b, False)
    if (x is not a or kinds[0] != "rel") and (y is not b or kinds[1] != "rel") and kinds != ["rel", "rel"]:
        if same(x, y):
            return True
    if "rel" in kinds and not any(isinstance(v, Value) and v.kind == "rel" and set(v.how) == {"="} for v in (a, b)):
        return same(region_of(a), region_of(b))
    return False


def all_scalars(*values) -> bool:
    return all(isinstance(x, sympy.Expr) for v in values for x in v.items)


PHRASES = {
    "no solution": "emptyset", "no solutions": "emptyset", "no real solution": "emptyset", "no real solutions": "emptyset", "empty set": "emptyset", "none": "emptyset",
    "the empty set": "emptyset", "dne": "undefined", "does not exist": "undefined", "undefined": "undefined", "not defined": "undefined",
    "all real numbers": "\\mathbb{R}", "all reals": "\\mathbb{R}", "infinitely many": "infinitely many", "infinitely many solutions": "infinitely many",
}  # fmt: skip


WRAPPED = re.compile(rf"\\(?:{'|'.join(sorted(TEXT, key=len, reverse=True))})\s*\{{([^{{}}]*)\}}")


def squash(text: str) -> str:
    """A text without what never matters: spacing, sizes, dollar signs, wrappers of text, a last full stop."""
    text = re.sub(r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle|quad|qquad|!|,|;|:| )(?![a-zA-Z])|\$|~|\*\*", " ", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = WRAPPED.sub(r"\1", text).strip().rstrip(".")
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)


def words_of(text: str) -> str:
    """The words of an answer in small letters, without brackets, points and articles."""
    text = WRAPPED.sub(r" \1 ", text)
    text = re.sub(r"\\(?:left|right|quad|qquad)(?![a-zA-Z])|\\[,;:! ()\[\]]|\$|~", " ", text)
    if re.search(r"[\\^_&=<>+*/\[\]{}|]", text):
        return ""
    words = re.sub(r"[^\w\s:'-]", " ", text).lower().split()
    return " ".join(w for w in words if w not in ("the", "a", "an"))


@functools.lru_cache(maxsize=512)
def readings(text: str) -> tuple:
    """What an answer can mean: (value, units, trailing words, letters read as a product) for each way to read it; empty if it cannot be read."""
    if len(text) > MAX_ANSWER:
        return ()
    text, found = clean(text), []
    phrase = PHRASES.get(words_of(text))
    text = "\\" + phrase if phrase == "emptyset" else phrase or text
    ways = [(thousands, split) for thousands in ((True, False) if re.search(r"\d,\d{3}", text) else (True,))
            for split in ((False, True) if re.search(r"(?<![a-zA-Z\\])[a-zA-Z]{2,4}(?![a-zA-Z])", text) else (False,))]  # fmt: skip
    for thousands, split in ways:
        try:
            tokens = tokens_of(text, thousands, split)
            if not tokens:
                continue
            values, signs = [], (1, -1) if any(t.kind == "cmd" and t.value in ("pm", "mp") for t in tokens) else (1,)
            for sign in signs:
                parser = Parser(list(tokens), sign)
                values.append(parser.answer())
            value = values[0]
            if len(values) == 2:
                flat = [x for v in values for x in (v.items if isinstance(v, Value) and v.kind in ("list", "set") else (bare(v, False),))]
                value = Value("list", (",",) * (len(flat) - 1), unique(tuple(bare(x, False) for x in flat)))
            found.append((value, tuple(sorted(set(parser.units))), tuple(parser.words), split))
        except (Unreadable, RecursionError, ValueError, ArithmeticError, TypeError, AttributeError):
            continue
    return tuple(found)


def readable(text: str) -> bool:
    """Whether a text is nothing but an answer: not a sentence around one."""
    return any(not wordy(value) and not split and len(words) < 4 for value, _, words, split in readings(text)[:1])


def wordy(value) -> bool:
    return isinstance(value, Value) and (value.kind == "words" and (len(value.items) > 0 or len(value.how) > 3) or any(map(wordy, value.items)))


COMPOUND = {("mph", 1): (("mile", 1), ("hour", -1)), ("kph", 1): (("kilometer", 1), ("hour", -1))}


def units_clash(a: tuple, b: tuple) -> bool:
    """Whether both have units, and not the same."""
    a, b = ({part for u in x for part in COMPOUND.get(u, (u,))} for x in (a, b))
    mods = [{u for u in x if u[0].startswith("mod")} for x in (a, b)]
    rest = [{u for u in x if not u[0].startswith("mod")} for x in (a, b)]
    return any(all(pair) and pair[0] ^ pair[1] not in (set(), {("dollar", 1)}) for pair in (mods, rest))


def answers_agree(answer: str, gold: str) -> bool:
    """Whether two answers, as they stand in a text, mean the same."""
    if not gold or len(gold) > MAX_ANSWER or len(answer) > MAX_ANSWER:
        return bool(gold) and answer == gold
    if squash(answer) == squash(gold) and squash(gold):
        return True
    letter = re.fullmatch(r"\W{0,9}(?:\\(?:text|textbf|mathrm|mathbf)\{)?\W{0,3}([A-J])\W{0,9}", gold)
    if letter:  # a choice: (B), B. 12 apples
        said = re.match(r"\W{0,9}(?:(?:option|choice|answer)\s*)?(?:\\(?:text|textbf|mathrm|mathbf)\{)?\W{0,3}([A-Ja-j])(?![\w^=+*/\\-])(?:\W{0,9}$|[).:}]|\s+\w{3,})", answer, re.IGNORECASE)
        if said:
            return said[1].upper() == letter[1]
    answer = re.sub(r"^(?:A|Result)\s*:\s*(?=\S)", "", answer)
    words = words_of(gold)
    if re.search(r"[a-z]{3}|^(?:no|am|pm)$", words) and words == words_of(answer):
        return True
    for value, units, *_ in readings(answer):
        for reference, gold_units, *_ in readings(gold):
            try:
                if not units_clash(units, gold_units) and same(value, reference):
                    return True
                if converted(value, units, reference, gold_units) or converted(reference, gold_units, value, units):
                    return True
            except (Unreadable, RecursionError, ValueError, ArithmeticError, TypeError, AttributeError, NotImplementedError):
                continue
    return False


def converted(a, units: tuple, b, other: tuple) -> bool:
    """50% for 1/2, 30 degrees for pi/6."""
    if other or len(units) != 1 or not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return False
    factor = {"percent": Rational(1, 100), "degree": pi / 180}.get(units[0][0])
    return factor is not None and equal(a * factor, b)


def reference_of(gold: str) -> str:
    """The answer in a reference: a bare one as it is, or that of a sentence or a worked solution."""
    announced = len(gold) <= MAX_RESPONSE and any(pattern.search(gold) for pattern, _ in SIGNS)
    return (extract_answer(gold) if announced or re.match(r"\s*[A-Z][a-z]", gold) and prose(gold[:MAX_ANSWER]) else None) or gold.strip()


def grade(response: str, gold: str) -> bool:
    """Whether the answer in a response means the reference answer (bare, or in a worked solution)."""
    answer, reference = extract_answer(response), reference_of(gold)
    return answer is not None and (answers_agree(answer, reference) or response.strip() == reference)


# ------------------------------------------------------------------------------------------- grading in a process apart


def judge(response: str, gold: str) -> dict:
    """A response's verdicts: extracted; correct, by extract_answer; strict, by "The final answer is X." alone."""
    answer, strict = extract_answer(response), STRICT.search(first_problem(response[:MAX_RESPONSE]))
    reference = reference_of(gold)
    return {"extracted": answer, "correct": answer is not None and answers_agree(answer, reference),
            "strict": strict is not None and answers_agree(strict[1][:MAX_ANSWER], reference), "graded": True}  # fmt: skip


def alike(answers: list[str | None]) -> list[int]:
    """For each answer the index of the first that means the same."""
    first = []
    for i, answer in enumerate(answers):
        first.append(next((j for j in sorted(set(first)) if answer == answers[j] or (answer and answers[j] and answers_agree(answer, answers[j]))), i))
    return first


def serve(pipe, megabytes: int) -> None:
    """The worker's loop. Its memory is limited where the system can do that; it ends when its parent does."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), resource.RLIM_INFINITY))
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({"judge": judge, "alike": alike}[name](*args))
        except MemoryError:
            pipe.send(None)


class Worker:
    """Grades in another process, which is killed when it takes too long or too much memory, and started again. None: not graded."""

    def __init__(self, seconds: float = 10.0, megabytes: int = 1000):
        self.seconds, self.megabytes, self.killed, self.process = seconds, megabytes, 0, None
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share locks of torch's threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.megabytes), daemon=True)
        with contextlib.suppress(ValueError):  # not the main thread
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child inherits that: Ctrl-C is ours alone, also while it imports
        self.process.start()
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        theirs.close()
        self.fresh = True

    def ask(self, name: str, *args):
        """The result of judge or alike, or None where the worker had to be stopped."""
        if self.process is None:
            self.start()
        with contextlib.suppress(EOFError, OSError):
            self.pipe.send((name, args))
            if self.pipe.poll(self.seconds + 60 * self.fresh):  # at first it imports this file
                self.fresh = False
                return self.pipe.recv()
        self.killed += 1
        self.stop()
        return None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None
