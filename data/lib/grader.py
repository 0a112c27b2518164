"""Grades responses: grade(response, gold) says whether the answer in a response means the reference.

    extract_answer(response)  answers.py: the answer as it stands in the response
    readings(answer)          latex.py, latex_tokens.py: the values that it can mean
    same(value, reference)    equality.py, mathvalues.py: whether two values are the same

All are pure functions of strings. Worker runs them in another process, with limits.
"""

import contextlib
import multiprocessing
import re
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import sympy
from sympy import Rational, pi

from data.lib.answers import ANNOUNCEMENTS, extract_answer, first_problem, prose
from data.lib.cli import ROOT
from data.lib.equality import equal, is_relation, same
from data.lib.latex import MEASURES, Reading, readings
from data.lib.latex_tokens import WRAPPED, words_of
from data.lib.mathvalues import FAILURES, MAX_ANSWER, MAX_RESPONSE, Value

STRICT = re.compile(r"[Tt]he final answer is:?\s+(.+?)\.(?=\s|$)")
SPACING = re.compile(
    r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle|q?quad|[!,;: ])(?![a-zA-Z])|\$|~|\*\*"
)
TEXT_STYLE = r"(?: \\(?:text|textbf|mathrm|mathbf)\{ )?"
CHOICE = re.compile(rf"\W{{0,9}} {TEXT_STYLE} \W{{0,3}} ([A-J]) \W{{0,9}}", re.VERBOSE)
CHOSEN = re.compile(  # B, (b), option B, B. 12 apples
    rf"""\W{{0,9}} (?: (?:option|choice|answer|i\ choose)\s* )? {TEXT_STYLE} \W{{0,3}} (?:option\s+)?
    ([A-J]) (?![\w^=+*/\\-]) (?: \W{{0,9}}$ | [).:}}] | \s+[(–—-] | ,?\s+(?:an?\s+)?\w{{3,}} )""",
    re.IGNORECASE | re.VERBOSE,
)
SEVERAL = re.compile(r"\W*(?:[A-J]\W+(?:and\W+)?)+[A-J]\W*")  # the choices A, C
RESTATED = re.compile(  # 3/4 (75%), 0.75 or 75%
    r"(.{1,100}?)(?:(?:,? (?:or|i\.e\.,?)| =) (.{1,100})| \((?:or|i\.e\.|=)?([^()]{1,100})\))"
)
LETTERED = re.compile(rf"{TEXT_STYLE} \(?[A-J][).:] \s* \}}? (?: \s | \\[ ,;:] )* (?=\S)", re.VERBOSE)
MONTH = re.compile(r"\b(?:jan|febr)uary|march|april|may|june|july|august|(?:sept|nov|dec)ember|october\b")
# Letters that may be any other: of f(x) = x + 1, of 2k\pi, the constant of integration.
ANY_LETTER = re.compile(
    r"(?<=[fgh]\()[a-z](?=\)\s*=)|(?<![a-zA-Z\\])[klmn](?=\s*\\pi)|(?<=[+ ])[cCkK](?=\$?$)"
)
ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b|\bof\b")
COMPOUND_UNITS = {("mph", 1): (("mile", 1), ("hour", -1)), ("kph", 1): (("kilometer", 1), ("hour", -1))}
HALVES = {("am", 1), ("pm", 1)}  # of a day
FACTORS = {"percent": Rational(1, 100), "cent": Rational(1, 100), "degree": pi / 180}


def squash(text: str) -> str:
    """A text without what never matters: spacing, dollar signs, wrappers of text, a last full stop."""
    text = re.sub(r"\\[dt](?=frac|dots)|\\[lc](?=dots)", r"\\", text)
    text = re.sub(r"(?<!\.)\.$", "", WRAPPED.sub(r"\1", SPACING.sub(" ", text)).strip())
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)


def units_clash(a: tuple, b: tuple) -> bool:
    """Whether two answers have unlike units. A modulus is compared apart; dollars may lack."""
    if ("prime", 1) in {*a} ^ {*b}:
        return True  # minutes of an angle, or feet
    a, b = ({part for unit in units for part in COMPOUND_UNITS.get(unit, (unit,))} for units in (a, b))
    for modulus in (True, False):
        xs, ys = ({unit for unit in units if unit[0].startswith("mod") == modulus} for units in (a, b))
        if xs and ys and xs ^ ys not in (set(), {("dollar", 1)}):
            return True
    return False


def converted(a: Reading, b: Reading) -> bool:
    """Whether a is b in another unit: 50% for 1/2, 30 degrees for pi/6, 90 minutes for 1.5 hours."""
    if len(a.units) == len(b.units) == 1:
        (group, size), (other, scale) = (MEASURES.get(x.units[0][0], (x, 1)) for x in (a, b))
        powers = a.units[0][1] == b.units[0][1] == 1
        return group == other and powers and equal(a.value * size, b.value * scale)
    factor = FACTORS.get(a.units[0][0]) if len(a.units) == 1 and not b.units else None
    numbers = isinstance(a.value, sympy.Expr) and isinstance(b.value, sympy.Expr)
    return bool(factor) and numbers and equal(a.value * factor, b.value)


def clock(reading: Reading) -> tuple | None:
    """A time of day as (hour up to 24, minutes ...); None for anything else."""
    halves = HALVES & set(reading.units)
    colon = is_relation(reading.value, ":")
    hour, *rest = reading.value.items if colon else (reading.value, 0)
    if not isinstance(hour, sympy.Integer) or not (colon or halves):
        return None
    return hour % 12 + 12 * (("pm", 1) in halves) if halves else hour, *rest


def counted(reading: Reading) -> dict:
    """What a list counts, with its number: 10 chickens and 9 rabbits. Empty for anything else."""
    value, _, names, _ = reading
    listed = isinstance(value, Value) and value.kind == "list" and len(set(names)) == len(names)
    return dict(zip(names, value.items)) if listed and len(names) == len(value.items) else {}


def readings_agree(a: Reading, b: Reading) -> bool:
    try:
        if HALVES & {*a.units, *b.units} and clock(a) and clock(a) == clock(b):
            return True
        things, others = counted(a), counted(b)
        if things and things.keys() == others.keys():
            return all(same(things[name], others[name]) for name in things)
        if a.words and b.words and not set(a.words) & set(b.words):
            return False  # 3 apples, 3 pears
        if not units_clash(a.units, b.units) and same(a.value, b.value):
            return True
        return converted(a, b) or converted(b, a)
    except FAILURES:
        return False  # they cannot be compared in this way


def restated(answer: str) -> str:
    """The first of two ways to say an answer, 3/4 of "3/4 (75%)"; or the exact one."""
    m = RESTATED.fullmatch(WRAPPED.sub(r"\1", answer))
    if not m:
        return answer
    parts = m[1], restated(m[2] or m[3])
    a, b = (next(iter(readings(x.strip(" $()"))), None) for x in parts)
    if a and b and readings_agree(a, b):
        return parts[0]
    numbers = a and b and all(isinstance(x.value, sympy.Expr) and x.value.is_number for x in (a, b))
    rounded = numbers and abs(a.value - b.value) < abs(b.value) / 100
    return parts["." in parts[0] and "." not in parts[1]] if rounded else answer


def in_letters_of(gold: str, answer: str) -> str:
    """The answer with the reference's letters where any letter would do."""
    theirs = ANY_LETTER.search(gold)
    ours = ANY_LETTER.search(answer) if theirs else None
    return re.sub(rf"(?<![a-zA-Z\\]){ours[0]}(?![a-zA-Z])", theirs[0], answer) if ours else answer


def answers_agree(answer: str, gold: str) -> bool:
    """Whether two answers, as they stand in a text, mean the same."""
    if not gold or len(gold) > MAX_ANSWER or len(answer) > MAX_ANSWER:
        return bool(gold) and answer == gold
    if squash(gold) and squash(answer) == squash(gold):
        return True
    choice = CHOICE.fullmatch(gold)
    chosen = CHOSEN.match(answer) if choice else None
    if chosen:
        return chosen[1].upper() == choice[1]
    if SEVERAL.fullmatch(gold) and re.fullmatch(r"(?:\W|[A-J]|and\b|\\text)*", answer):
        return sorted(re.findall("[A-J]", gold)) == sorted(re.findall("[A-J]", answer))
    answer = re.sub(r"^(?:A|Answer|Result|Total)\s*:\s*(?=\S)", "", answer)
    words, others = words_of(gold), words_of(answer)
    if words in ("yes", "no", "true", "false"):
        others = re.sub(r"\s*[,.;:].*", "", answer.lower())
    if MONTH.search(words):
        words, others = (sorted(ORDINAL.sub("", x).split()) for x in (words, others))
        return words == others
    if re.search(r"[a-z]{3}|^(?:no|am|pm)$", words) and words == others:
        return True
    answer = in_letters_of(gold, LETTERED.sub("", restated(answer)))
    return any(readings_agree(a, b) for a in readings(answer) for b in readings(gold))


def reference_of(gold: str) -> str:
    """The answer in a reference: a bare one as it is, or that of a sentence or a worked solution."""
    told = re.match(r"\s*[A-Z][a-z]", gold) and prose(gold[:MAX_ANSWER])
    told = told or len(gold) <= MAX_RESPONSE and any(p.search(gold) for _, p in ANNOUNCEMENTS)
    return (extract_answer(gold) if told else None) or gold.strip()


def grade(response: str, gold: str) -> bool:
    """Whether the answer in a response means the reference answer (bare, or in a worked solution)."""
    answer = extract_answer(response)
    reference = reference_of(gold)
    return answer is not None and (answers_agree(answer, reference) or response.strip() == reference)


def judge(response: str, gold: str) -> dict:
    """A response's verdicts: "extracted" is the answer or None, "correct" whether it is the reference,
    "strict" the same where only "The final answer is X." counts, "graded" always True."""
    answer = extract_answer(response)
    strict = STRICT.search(first_problem(response[:MAX_RESPONSE]))
    reference = reference_of(gold)
    return {
        "extracted": answer,
        "correct": answer is not None and answers_agree(answer, reference),
        "strict": strict is not None and answers_agree(strict[1][:MAX_ANSWER], reference),
        "graded": True,
    }


def alike(answers: list[str | None]) -> list[int]:
    """For each answer the index of the first that means the same."""
    first = []
    for i, answer in enumerate(answers):
        others = ((j, answers[j]) for j in sorted(set(first)))
        hits = (j for j, x in others if answer == x or answer and x and answers_agree(answer, x))
        first.append(next(hits, i))
    return first


def serve(pipe, megabytes: int) -> None:
    """The worker's loop. Its memory is limited where the system can do that; it ends with its parent."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
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
    """Grades in another process, which is killed and replaced when it exceeds its limits: the seconds
    of one ask(), and the megabytes beyond what it begins with. killed counts these."""

    def __init__(self, seconds: float = 10.0, megabytes: int = 1000):
        self.seconds, self.megabytes, self.killed = seconds, megabytes, 0
        self.start()

    def start(self) -> None:
        # multiprocessing would import torch, too. Ctrl-C does not reach a new session.
        self.pipe, theirs = multiprocessing.Pipe()
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-m", "data.lib.grader", str(fd), str(self.megabytes)]
            self.process = subprocess.Popen(command, cwd=ROOT, pass_fds=[fd], start_new_session=True)
        self.fresh = True

    def ask(self, name: str, *args):
        """The result of judge(*args) or alike(*args), or None where the worker had to be stopped."""
        if self.process is None:
            self.start()
        with contextlib.suppress(EOFError, OSError):
            self.pipe.send((name, args))
            if self.pipe.poll(self.seconds + 60 * self.fresh):  # a new one must import first
                self.fresh = False
                return self.pipe.recv()
        self.killed += 1
        self.stop()
        return None

    def stop(self) -> None:
        if self.process is None:  # its last question was too much for it
            return
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.process = None


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
