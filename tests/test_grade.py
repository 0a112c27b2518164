"""The grader: what is right, what is wrong, what an answer is in a response.

The second half holds that nothing in a response can do harm: no code is run,
and neither time nor memory runs away.
"""

import json
import math
import os
import random
import time
from pathlib import Path

import mpmath
import pytest
import sympy
from conftest import SHARED

from data.lib import mathvalues
from data.lib.equality import equal
from data.lib.grader import Worker, alike, extract_answer, grade, judge, readings
from data.lib.mathvalues import Unreadable


def read_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


CASES = read_lines(Path(__file__).with_name("grades.jsonl"))


def test_the_table_is_large_and_has_both_kinds():
    assert len(CASES) >= 400
    assert 0.3 < sum(c["right"] for c in CASES) / len(CASES) < 0.7


def test_the_table_of_cases():
    """Our own cases of every kind that the grader knows: each is graded as a person would."""
    wrong = [c for c in CASES if grade(c["response"], c["gold"]) != c["right"]]
    assert not wrong, f"{len(wrong)} of {len(CASES)}: {wrong[:5]}"


def test_the_cases_of_the_field():
    """Answers in the spirit of public bug reports on other graders, which are kept beside the checkout."""
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/field")
    cases = read_lines(SHARED / "data/field/grader.jsonl")
    wrong = [c for c in cases if grade(c["response"], c["gold"]) != c["expected"]]
    assert len(wrong) <= 0.01 * len(cases), wrong[:5]
    assert all(c["expected"] for c in wrong), "a wrong answer passes"


SAME = [
    (r"\frac12", "0.5"),
    ("3 1/2", "3.5"),
    (r"-3\frac12", "-3.5"),
    (r"0.1\overline{6}", "1/6"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\log_2 8", "3"),
    (r"\sin 30^\circ", "1/2"),
    (r"\tan^{-1} 1", r"\pi/4"),
    (r"e^{i\pi}", "-1"),
    (r"\binom52", "10"),
    ("5!", "120"),
    (r"\lfloor -3.7 \rfloor", "-4"),
    ("|x|", r"\sqrt{x^2}"),
    ("10^{20}", "100000000000000000000"),
    ("2,1", r"\{1,2\}"),
    ("-3, 3", r"\pm 3"),
    (r"(-\infty,1)\cup(2,3)", r"(2,3)\cup(-\infty,1)"),
    (r"\mathbb{R}\setminus\{2\}", r"(-\infty,2)\cup(2,\infty)"),
    ("x>3", r"(3,\infty)"),
    ("3 < x < 5", "5 > x > 3"),
    ("x<1 or x>3", r"(-\infty,1)\cup(3,\infty)"),
    ("x = 5", "5"),
    ("y=2x+3", "2x-y+3=0"),
    ("011_2", "11_{2}"),
    ("5 cm", "5"),
    ("60 mph", "60 miles per hour"),
    ("50%", "1/2"),
    (r"\$1,234.50", "1234.5"),
    ("(b)", r"\text{B}"),
    ("Yes", r"\text{yes}"),
    ("no solution", r"\emptyset"),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
    ),
    ("(-1)^{n+2}", "(-1)^n"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    ("1/0", "1/0"),
    ("The last digit is 9.", " The last digit is 9."),
]  # fmt: skip
DIFFERENT = [
    ("1 1/2", "11/2"),
    ("0.333", "1/3"),
    ("1.41421356", r"\sqrt2"),
    ("|x-3|", "3-x"),
    ("x", "|x|"),
    ("100000000000000000001", "10^{20}"),
    ("(x+y+z)^{20}-xyz", "(x+y+z)^{20}"),
    ("x+0.0000001", "x"),
    ("(1,2]", "(1,2)"),
    ("(2,1)", "(1,2)"),
    ("(1,2)", r"\{1,2\}"),
    ("1,2,3", "1,2"),
    ("3", r"\pm 3"),
    (r"x\ge3", r"(3,\infty)"),
    ("y = 5", "x = 5"),
    ("x=1 or 2", "1"),
    ("x=1, y=2", "x=2, y=1"),
    ("100_5", "100_6"),
    ("5 cm", r"5\text{ m}"),
    ("3 hours 20 minutes", "20 hours 3 minutes"),
    ("3:30 am", "3:30 p.m."),
    ("2:3", "3:2"),
    ("B", r"\text{(C)}"),
    ("not even", "even"),
    (r"x\equiv 3 \pmod 7", r"x\equiv 3\pmod 5"),
    (
        r"\begin{pmatrix}1&3\\2&4\end{pmatrix}",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    ),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("6-5i", "6+5i"),
    ("", "9"),
    ("9", ""),
    ("The last digit is 8.", " The last digit is 9."),
]  # fmt: skip


# Kinds of faults that users of other graders reported: each was graded wrong here, too.
REPORTED_RIGHT = [
    # signs as people type them
    ("x <= 2", r"x \le 2"),
    ("x != 3", r"x \ne 3"),
    ("x >= 3 and x <= 5", "[3,5]"),
    ("x**2", "x^2"),
    ("5.819 x 10^-5", r"5.819 \times 10^{-5}"),
    ("5.819 × 10⁻⁵", r"5.819 \times 10^{-5}"),
    ("¥500", "500"),
    (r"\boxed{x^{}2}", "x^2"),
    (r"\boxed{(1,2) \text{ union } (3,4)}", r"(1,2)\cup(3,4)"),
    # numbers in words
    ("The answer is forty-two.", "42"),
    ("The answer is two thousand five hundred.", "2500"),
    ("The answer is three quarters.", "0.75"),
    ("12", r"\text{twelve}"),
    # words before and behind the answer
    ("The interval is (1, 5).", "(1,5)"),
    ("So the polynomial is x^2+5x+6.", "x^2+5x+6"),
    ("The solutions are 2 and 3.", "2,3"),
    (r"\boxed{\text{Area} = 7 \text{ cm}^2}", "7"),
    (r"Dividing both sides gives \frac{2}{3}", "2/3"),
    ("The answer is 42 miles in 2 hours.", "42"),
    ("The answer is 42 for 6 rows of 7", "42"),
    ("The answer is 42: there are 6 rows of 7.", "42"),
    ("#### Total: 42", "42"),
    ("I choose B.", "B"),
    # an exact value and its rounding
    (r"The answer is $\sqrt{17}$ (approximately 4.12).", r"\sqrt{17}"),
    (r"\boxed{\approx 3.14}", "3.14"),
    # which place counts
    (r"My final answer goes within \boxed{}. Adding, \boxed{18}", "18"),
    (r"$\boxed{2} \quad \text{and} \quad \boxed{3}$", "2,3"),
    (r"The solutions are \(\boxed{2}\) and \(\boxed{3}\).", "2,3"),
    ("<think>Try \\boxed{5}.</think>\nThe answer is 72.", "72"),
    ("The answer is 18.<|return|>", "18"),
    # times of day
    ("3:00 p.m.", "15:00"),
    ("3 p.m.", "3:00 PM"),
    ("12:30 am", "0:30"),
]  # fmt: skip
REPORTED_WRONG = [
    ("3:00 p.m.", "9:00 p.m."),
    ("15", "3:00 p.m."),
    (r"\boxed{y>3}", "x>3"),
    (r"\boxed{y \in (1,2)}", r"x\in(1,2)"),
    (r"\boxed{y=1,2}", "x=1,2"),
    (r"\boxed{y=\pm2}", r"x=\pm 2"),
    ("The answer is 10 chickens and 9 rabbits.", "9 chickens and 10 rabbits"),
    ("The answer is 3 for x and 4 for y", "3"),
    ("The distance is √(17).", "17"),
    ("The interval is (1, 5).", "5"),
    ("The solutions are 2 and 3.", "3"),
    ("It is 10^3.", "3"),
    (r"$\boxed{2} \quad \text{and} \quad \boxed{3}$", "3"),
    (r"<think>Try \boxed{5}.</think> The answer is 72.", "5"),
    (r"<think>Try \boxed{5}. And then", "5"),
]  # fmt: skip


@pytest.mark.parametrize("response,gold", REPORTED_RIGHT)
def test_reported_answers_that_are_right(response, gold):
    assert grade(response, gold)


@pytest.mark.parametrize("response,gold", REPORTED_WRONG)
def test_reported_answers_that_are_wrong(response, gold):
    assert not grade(response, gold)


@pytest.mark.parametrize("response,gold", SAME)
def test_answers_that_mean_the_reference(response, gold):
    assert grade(response, gold)


@pytest.mark.parametrize("response,gold", DIFFERENT)
def test_answers_that_mean_something_else(response, gold):
    assert not grade(response, gold)


EXTRACTED = [
    (
        "The final answer is $5$. I hope it is correct.\n\n"
        "Problem:\nWhat is 2+2? The final answer is $4$.",
        "$5$",
    ),
    (r"We get \boxed{3}. The final answer is 4.", "4"),
    (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{1} or \boxed{2}", "1, 2"),
    ("48/2 = 24\n#### 72", "72"),
    ("#### 72\n\nQuestion: next?\nAnswer: 9", "72"),
    (
        "<|im_start|>assistant\nIt is 7.<|im_end|>\n<|im_start|>user\nAnd 8?",
        "7",
    ),
    ("Q: restated 3?\nA: The answer is 8.", "8"),
    ("The answer is 72.\nmore 5", "72"),
    ("The answer is 5, because 2 + 3 = 5", "5"),
    ("**Answer:** $x = 2$", "$x = 2$"),
    ("So $x = 5$ and we are done.", "x = 5"),
    ("7, so 9", "9"),
    ("none", "none"),
    ("Answer:\n\n```\n256\n```", "256"),
    (r"\begin{align*} N &= 3 \\ &= \sqrt[3]{7}. \end{align*}", r"\sqrt[3]{7}"),
    ("She has 3 apples and 4 pears.", "4"),
    ("", None),
    ("I do not know at all.", None),
    ("B. 12 apples", "B. 12 apples"),
    ("The value is **73**!", "73"),
]  # fmt: skip


@pytest.mark.parametrize("response,answer", EXTRACTED)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_gsm8k_golds_are_right_and_one_more_is_wrong():
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/gsm8k")
    rows = read_lines(SHARED / "data/gsm8k/test.jsonl")
    for row in rows:
        gold = row["answer"].split("####")[1].strip()
        one_more = str(int(gold.replace(",", "")) + 1)
        assert grade(row["answer"], gold), row
        assert not grade(row["answer"], one_more), row
    assert len(rows) == 1319


def test_math_solutions_are_right_for_their_own_problem_only():
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/math")
    rows = read_lines(SHARED / "data/math/sample50.jsonl")
    for row in rows:
        answer = row["answer"]
        assert readings(answer)
        for other in rows:
            # A base that is left out is like a unit that is left out.
            right = answer.removesuffix("_9") == other["answer"].removesuffix("_9")
            assert grade(row["solution"], other["answer"]) == right, (answer, other)


# ------------------------------------------------------------------ exactness


def random_expression(rng, depth: int):
    """(LaTeX, sympy) of a random expression in x."""
    leaves = ["number", "x"]
    inner = ["+", "*", "frac", "power", "sqrt", "x", "number"]
    kind = rng.choice(leaves if depth == 0 else inner)
    if kind == "number":
        n = rng.randint(1, 9)
        return str(n), sympy.Integer(n)
    if kind == "x":
        return "x", sympy.Symbol("x")
    a, left = random_expression(rng, depth - 1)
    b, right = random_expression(rng, depth - 1)
    if kind == "+":
        return f"({a} + {b})", left + right
    if kind == "*":
        return f"{a} \\cdot {b}", left * right
    if kind == "frac":
        return f"\\frac{{{a}}}{{{b}}}", left / right
    if kind == "power":
        n = rng.randint(2, 3)
        return f"({a})^{{{n}}}", left**n
    return f"\\sqrt{{{a}}}", sympy.sqrt(left)


def test_the_parser_reads_what_sympy_means():
    """Random LaTeX is read as the expression that it was written from.

    Both are compared at a point. The text is not the same as itself plus a trifle.
    """
    rng = random.Random(0)
    for _ in range(200):
        text, expression = random_expression(rng, 3)
        [(value, *_), *_] = readings(text)
        at = {sympy.Symbol("x"): sympy.Rational(rng.randint(1, 99), 7)}
        difference = abs(sympy.N((value - expression).subs(at), 30))
        size = abs(sympy.N(expression.subs(at), 30))
        assert difference < 1e-15 * (1 + size), text
        assert grade(f"${text}$", text), text
        assert not grade(f"${text} + \\frac{{1}}{{10^9}}$", text), text


@pytest.mark.parametrize("digits", [1, 5, 17, 40, 100, 400])
def test_large_integers_differ_by_one(digits):
    n = 10**digits + 7
    power = f"2^{{{digits}}}"
    assert grade(str(n), str(n))
    assert not grade(str(n + 1), str(n))
    assert grade(f"{n}.0", str(n))
    assert not grade(f"{power}+1", power)


def test_the_precision_of_others_is_left_alone():
    before = mpmath.mp.dps
    grade(r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}")
    assert mpmath.mp.dps == before


def test_equal_is_bounded_and_exact():
    x = sympy.Symbol("x")
    square = (x + 1) ** 2
    assert equal(square, x**2 + 2 * x + 1)
    assert not equal(square, x**2 + 2 * x + sympy.Rational(10**30 + 1, 10**30))
    assert equal(sympy.sqrt(12), 2 * sympy.sqrt(3))
    assert not equal(sympy.sqrt(12), sympy.Rational(34641016151, 10**10))
    with pytest.raises(Unreadable):
        mathvalues.power(sympy.Integer(10), sympy.Integer(10**9))


# ------------------------------------------------------------------ hostility

HOSTILE = [
    "__import__('os').system('touch {flag}')",
    "\\boxed{__import__('os').system('touch {flag}')}",
    "eval(\"open('{flag}','w')\")", "(lambda: open('{flag}','w'))()",
    "\\input{/etc/passwd}", "\\write18{touch {flag}}", "{{7*7}}", "9^9^9^9",
    "9^{9^{9^{9}}}", "10^{10^{10}}", "9!!!!!!", "(10^9)!",
    "2^{10^9} \\cdot 2", "\\binom{10^9}{5 \\cdot 10^8}", "(x+1)^{100000}",
    "(12345x)^{10^{11}}", "e^{e^{e^{e^{10}}}}", "\\sin(10^{10^5})",
    "\\frac" * 5000, "\\sqrt{" * 5000, "(" * 100000,
    "{" * 100000 + "1" + "}" * 100000, "\\left(" * 9000, "9" * 1000000,
    "1/" * 5000 + "1", "-" * 100000 + "1", "1," * 100000, "\\pm 1" * 60,
    "(0,1)\\cup" * 5000 + "(0,1)", "x^" * 3000 + "x", "\\boxed{" * 20000,
    "$" * 100000, "*" * 100000 + "x", "#" * 100000,
    "The final answer is " * 20000, "answer is" + " " * 100000,
    "\n" * 200000 + "5", "0.\\overline{" + "9" * 10000 + "}",
    "10_{999999999999}", "\\begin{pmatrix}" + "1&" * 5000,
    "\\begin{pmatrix} 1 \\end{bmatrix}", "\\frac{}{}", "\\sqrt[0]{2}",
    "\\log 0", "\\log_1 2", "0^0", "0^{-1}", "\\tan 90^\\circ",
    "\\infty - \\infty", "\ud800", "\x00", "５", "٣", "\u202e5", "🙂" * 1000,
    "NaN", "inf", "True", "None", "[]", "{}", "\\", "^", "_", "&", "\\\\",
    "\\begin{", "a_{b_{c_{d" * 500, "\\text{" * 5000, "1" + ",000" * 50000,
    "1 1/2" * 3000, "\\overline{" * 300 + "1" + "}" * 300, "||||||||||",
    "\\lfloor" * 100, "mod" * 3000, "\\pmod{" * 300, "'" * 3000, "!" * 3000,
    "5" + "!" * 3000, "\\angle" * 3000,
    "\\boxed{1}" + " " * 3000 + "x\\boxed{2}", "The answer is " + " " * 3900 + "(",
    "Final answer:" + "\n " * 90000 + "5", "- 1\n" * 40000, "x=1\n" * 40000,
    "(see " * 40000, "1 or " * 900, "1 hour " * 700, "9.9" * 1200, "between " * 500,
    "\\begin{cases}" * 300, "\\gcd(" + "9" * 3000 + ",2)", "(2," * 3000, "[[1,2]," * 300,
    "1\\quad" * 500, "= 1" * 900, "all numbers " * 300, "\n \t\n" * 50000,
    "\\begin{cases}1&x>1" + "\\\\1&x>1" * 100 + "\\end{cases}",
    "\\begin{vmatrix}" + "\\\\".join(["&".join(["9" * 300] * 5)] * 5) + "\\end{vmatrix}",
    "twenty " * 500, "The answer is 4 " + " a" * 1900 + "(", "<think>" * 30000,
    ", not 1" * 20000, "they are " + "1, " * 1500 + "2", "1" * 99999 + " is not", "\\boxed{1" * 9000,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_input_is_only_data(number, tmp_path):
    """As response and as reference: a verdict within 2 seconds of work, no exception, no file."""
    flag = tmp_path / "flag"
    text = HOSTILE[number].replace("{flag}", str(flag))
    final = f"The final answer is {text}."
    pairs = ((text, "42"), (final, r"\frac{1}{2}"), ("42", text), (text, text + "1"))
    for response, gold in pairs:
        begin = time.process_time()
        assert grade(response, gold) in (True, False)
        assert time.process_time() - begin < 2, text[:50]
    assert not grade(text, "\\frac{123}{457}")
    assert not flag.exists()
    assert not os.listdir(tmp_path)


PIECES = [
    "\\frac", "{", "}", "(", ")", "[", "]", "1", "23", "x", "\\sqrt", "^",
    "_", "|", ",", "=", "<", "\\cup", "\\text{", "and", "\\pm", "!", "%",
    "$", " ", "\\\\", "&", "\\begin{pmatrix}", "\\end{pmatrix}", ".",
    "\\in", "\\{", "\\}", "\\pi", "\\infty", "e", "i", "\\sin", "\\log",
    "-", "/", "cm", "\\circ", ":", "\\mathbb{R}", "\\setminus", "\\binom",
    "\\lfloor", "\\rfloor", "or", "mod 7", "\\overline",
]  # fmt: skip


def test_random_garbage_never_raises():
    rng = random.Random(1)
    for _ in range(2000):
        response = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 25)))
        gold = "".join(rng.choice(PIECES) for _ in range(5))
        assert grade(response, gold) in (True, False)


# ------------------------------------------------------------------ worker


def test_judge():
    got = judge("So 6. The final answer is $\\frac12$. I hope it is correct.", "0.5")
    assert got == {
        "extracted": "$\\frac12$",
        "correct": True,
        "strict": True,
        "graded": True,
    }
    got = judge("It is 0.5", "1/2")
    assert got == {
        "extracted": "0.5",
        "correct": True,
        "strict": False,
        "graded": True,
    }


def test_alike():
    assert alike(["1/2", "3", "0.5", None, "3.0", None]) == [0, 1, 0, 3, 1, 3]


def test_a_worker_that_dies_is_replaced():
    grader = Worker(seconds=5)
    assert grader.ask("judge", "5", "5")["correct"]
    assert grader.ask("no such job") is None  # the worker ends with an error
    assert grader.killed == 1
    # Another one has taken over.
    assert grader.ask("judge", "5", "6")["correct"] is False
    os.kill(grader.process.pid, 9)
    assert grader.ask("judge", "5", "5") is None
    assert grader.killed == 2
    assert grader.ask("judge", "5", "5")["correct"]
    grader.stop()


def test_a_worker_over_its_time_is_stopped():
    grader = Worker(seconds=1)
    assert grader.ask("judge", "5", "5")["correct"]
    os.kill(grader.process.pid, 19)  # SIGSTOP: as if it never came back
    begin = time.time()
    assert grader.ask("judge", "5", "5") is None
    assert time.time() - begin < 5
    assert grader.killed == 1
    assert grader.ask("judge", "5", "5")["correct"]
    grader.stop()


def test_a_worker_has_a_memory_limit():
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists() or not hasattr(resource, "prlimit"):
        pytest.skip("no /proc, or no prlimit")
    grader = Worker(megabytes=300)
    assert grader.ask("judge", "5", "5")["correct"]
    soft, _ = resource.prlimit(grader.process.pid, resource.RLIMIT_AS)
    assert 0 < soft < math.inf
    assert soft != resource.RLIM_INFINITY
    grader.stop()
