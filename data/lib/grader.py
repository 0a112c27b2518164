"""Grades responses: grade(response, gold) says whether the answer in a response means the reference.

    extract_answer(response)  answers.py: the answer as it stands in the response
    readings(answer)          latex.py, latex_tokens.py: the values that it can mean
    same(value, reference)    equality.py, mathvalues.py: whether two values are the same

All are pure functions of strings. Worker runs them in another process, with
limits of time and memory.
"""

import contextlib
import multiprocessing
import re
import signal
from pathlib import Path

import sympy
from sympy import Rational, pi

from data.lib.answers import ANNOUNCEMENTS, extract_answer, first_problem, prose
from data.lib.equality import equal, is_relation, same
from data.lib.latex import Reading, readings
from data.lib.latex_tokens import WRAPPED, words_of
from data.lib.mathvalues import FAILURES, MAX_ANSWER, MAX_RESPONSE, Value

STRICT = re.compile(r"[Tt]he final answer is:?\s+(.+?)\.(?=\s|$)")
SPACING = re.compile(
    r"""(?<!\\) \\ (?: left | right | [bB]igg?[lr]? | displaystyle | quad | qquad | ! | , | ; | : | [ ] )
      (?![a-zA-Z])
    | \$ | ~ | \*\*""",
    re.VERBOSE,
)
TEXT_STYLE = r"(?: \\(?:text|textbf|mathrm|mathbf)\{ )?"
CHOICE = re.compile(rf"\W{{0,9}} {TEXT_STYLE} \W{{0,3}} ([A-J]) \W{{0,9}}", re.VERBOSE)
CHOSEN = re.compile(  # B, (b), option B, B. 12 apples
    rf"""\W{{0,9}} (?: (?:option|choice|answer|i\ choose)\s* )? {TEXT_STYLE} \W{{0,3}}
    ([A-J]) (?![\w^=+*/\\-]) (?: \W{{0,9}}$ | [).:}}] | \s+\w{{3,}} )""",
    re.IGNORECASE | re.VERBOSE,
)
COMPOUND_UNITS = {
    ("mph", 1): (("mile", 1), ("hour", -1)),
    ("kph", 1): (("kilometer", 1), ("hour", -1)),
}
HALVES = {("am", 1), ("pm", 1)}  # of a day
FACTORS = {"percent": Rational(1, 100), "degree": pi / 180}


def squash(text: str) -> str:
    """A text without what never matters: spacing, dollar signs, wrappers of text, a last full stop."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = WRAPPED.sub(r"\1", SPACING.sub(" ", text)).strip().rstrip(".")
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)


def units_clash(a: tuple, b: tuple) -> bool:
    """Whether both answers have units, and not the same. A modulus is compared apart; dollars may lack."""
    a, b = ({part for unit in units for part in COMPOUND_UNITS.get(unit, (unit,))} for units in (a, b))
    for modulus in (True, False):
        xs, ys = ({unit for unit in units if unit[0].startswith("mod") == modulus} for units in (a, b))
        if xs and ys and xs ^ ys not in (set(), {("dollar", 1)}):
            return True
    return False


def converted(a: Reading, b: Reading) -> bool:
    """Whether a is b in another unit: 50% for 1/2, 30 degrees for pi/6."""
    if b.units or len(a.units) != 1 or a.units[0][0] not in FACTORS:
        return False
    if not isinstance(a.value, sympy.Expr) or not isinstance(b.value, sympy.Expr):
        return False
    return equal(a.value * FACTORS[a.units[0][0]], b.value)


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
    if not isinstance(value, Value) or value.kind != "list":
        return {}
    return dict(zip(names, value.items)) if len(set(names)) == len(names) == len(value.items) else {}


def readings_agree(a: Reading, b: Reading) -> bool:
    try:
        if HALVES & {*a.units, *b.units} and clock(a) and clock(a) == clock(b):
            return True
        things, others = counted(a), counted(b)
        if things and things.keys() == others.keys():
            return all(same(things[name], others[name]) for name in things)
        if not units_clash(a.units, b.units) and same(a.value, b.value):
            return True
        return converted(a, b) or converted(b, a)
    except FAILURES:
        return False  # they cannot be compared in this way


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
    answer = re.sub(r"^(?:A|Answer|Result|Total)\s*:\s*(?=\S)", "", answer)
    words = words_of(gold)
    if re.search(r"[a-z]{3}|^(?:no|am|pm)$", words) and words == words_of(answer):
        return True
    return any(readings_agree(a, b) for a in readings(answer) for b in readings(gold))


def reference_of(gold: str) -> str:
    """The answer in a reference: a bare one as it is, or that of a sentence or a worked solution."""
    announced = len(gold) <= MAX_RESPONSE and any(p.search(gold) for _, p in ANNOUNCEMENTS)
    told = re.match(r"\s*[A-Z][a-z]", gold) and prose(gold[:MAX_ANSWER])
    return (extract_answer(gold) if announced or told else None) or gold.strip()


def grade(response: str, gold: str) -> bool:
    """Whether the answer in a response means the reference answer (bare, or in a worked solution)."""
    answer = extract_answer(response)
    reference = reference_of(gold)
    return answer is not None and (answers_agree(answer, reference) or response.strip() == reference)


# ------------------------------------------------------------------ grading in a process apart


def judge(response: str, gold: str) -> dict:
    """A response's verdicts.

    Returns {"extracted": the answer or None, "correct": whether it is the
    reference, "strict": the same where only "The final answer is X." counts,
    "graded": True}.
    """
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
        for j in sorted(set(first)):
            other = answers[j]
            if answer == other or answer and other and answers_agree(answer, other):
                first.append(j)
                break
        else:
            first.append(i)
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
    """Grades in another process, which is killed and replaced when it exceeds its time or memory.

    Args:
        seconds: for one call of ask()
        megabytes: what the process may use beyond what it has when it begins

    killed counts the calls that ended so.
    """

    def __init__(self, seconds: float = 10.0, megabytes: int = 1000):
        self.seconds = seconds
        self.megabytes = megabytes
        self.killed = 0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share locks of torch's threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.megabytes), daemon=True)
        # Ctrl-C is for this process alone. The child inherits that it is ignored, also while it imports.
        before = None
        with contextlib.suppress(ValueError):  # not the main thread
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        theirs.close()
        self.fresh = True

    def ask(self, name: str, *args):
        """The result of judge(*args) or alike(*args), or None where the worker had to be stopped."""
        if self.process is None:
            self.start()
        with contextlib.suppress(EOFError, OSError):
            self.pipe.send((name, args))
            if self.pipe.poll(self.seconds + 60 * self.fresh):  # a new one has to import this file first
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
