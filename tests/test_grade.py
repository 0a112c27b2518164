"""The grader: what is right, what is wrong, what an answer is in a response, and that nothing in a response can do harm."""

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
from data.lib.grader import Worker, alike, extract_answer, grade, judge, readings
from data.lib.mathvalues import Unreadable, equal

CASES = [json.loads(line) for line in open(Path(__file__).with_name("grades.jsonl"), encoding="utf-8")]


def test_the_table_is_large_and_has_both_kinds():
    assert len(CASES) >= 400 and 0.3 < sum(c["right"] for c in CASES) / len(CASES) < 0.7


def test_the_table_of_cases():
    """Our own cases of every kind that the grader knows (grades.jsonl): each is graded as a person would."""
    wrong = [c for c in CASES if grade(c["response"], c["gold"]) != c["right"]]
    assert not wrong, f"{len(wrong)} of {len(CASES)}: {wrong[:5]}"


@pytest.mark.parametrize("response,gold,right", [
    (r"\frac12", "0.5", True), ("3 1/2", "3.5", True), ("1 1/2", "11/2", False), (r"-3\frac12", "-3.5", True), (r"0.1\overline{6}", "1/6", True), ("0.333", "1/3", False),
    ("1.41421356", r"\sqrt2", False), (r"\sqrt[3]{-8}", "-2", True), (r"\log_2 8", "3", True), (r"\sin 30^\circ", "1/2", True), (r"\tan^{-1} 1", r"\pi/4", True),
    (r"e^{i\pi}", "-1", True), (r"\binom52", "10", True), ("5!", "120", True), (r"\lfloor -3.7 \rfloor", "-4", True), ("|x-3|", "3-x", False), ("|x|", r"\sqrt{x^2}", True), ("x", "|x|", False),
    ("100000000000000000001", "10^{20}", False), ("10^{20}", "100000000000000000000", True), ("(x+y+z)^{20}-xyz", "(x+y+z)^{20}", False), ("x+0.0000001", "x", False),
    ("(1,2]", "(1,2)", False), ("(2,1)", "(1,2)", False), ("(1,2)", r"\{1,2\}", False), ("2,1", r"\{1,2\}", True), ("1,2,3", "1,2", False), ("3", r"\pm 3", False), ("-3, 3", r"\pm 3", True),
    (r"(-\infty,1)\cup(2,3)", r"(2,3)\cup(-\infty,1)", True), (r"\mathbb{R}\setminus\{2\}", r"(-\infty,2)\cup(2,\infty)", True), ("x>3", r"(3,\infty)", True), (r"x\ge3", r"(3,\infty)", False),
    ("3 < x < 5", "5 > x > 3", True), ("x<1 or x>3", r"(-\infty,1)\cup(3,\infty)", True), ("x = 5", "5", True), ("y = 5", "x = 5", False), ("x=1 or 2", "1", False), ("y=2x+3", "2x-y+3=0", True),
    ("x=1, y=2", "x=2, y=1", False), ("100_5", "100_6", False), ("011_2", "11_{2}", True), ("5 cm", "5", True), ("5 cm", r"5\text{ m}", False), ("60 mph", "60 miles per hour", True),
    ("3 hours 20 minutes", "20 hours 3 minutes", False), ("50%", "1/2", True), (r"\$1,234.50", "1234.5", True), ("3:30 am", "3:30 p.m.", False), ("2:3", "3:2", False), ("B", r"\text{(C)}", False),
    ("(b)", r"\text{B}", True), ("Yes", r"\text{yes}", True), ("not even", "even", False), ("no solution", r"\emptyset", True), (r"x\equiv 3 \pmod 7", r"x\equiv 3\pmod 5", False),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", True), (r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False), (r"(-1)^{n+2}", "(-1)^n", True), (r"\frac{x^2-1}{x-1}", "x+1", True), ("6-5i", "6+5i", False), ("1/0", "1/0", True),
    ("", "9", False), ("9", "", False), ("The last digit is 9.", " The last digit is 9.", True), ("The last digit is 8.", " The last digit is 9.", False),
])  # fmt: skip
def test_kinds_of_answers(response, gold, right):
    assert grade(response, gold) == right


@pytest.mark.parametrize("response,answer", [
    ("The final answer is $5$. I hope it is correct.\n\nProblem:\nWhat is 2+2? The final answer is $4$.", "$5$"),
    (r"We get \boxed{3}. The final answer is 4.", "4"), (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"), (r"\boxed{1} or \boxed{2}", "1, 2"), ("48/2 = 24\n#### 72", "72"),
    ("#### 72\n\nQuestion: next?\nAnswer: 9", "72"), ("<|im_start|>assistant\nIt is 7.<|im_end|>\n<|im_start|>user\nAnd 8?", "7"), ("Q: restated 3?\nA: The answer is 8.", "8"),
    ("The answer is 72.\nmore 5", "72"), ("The answer is 5, because 2 + 3 = 5", "5"), ("**Answer:** $x = 2$", "$x = 2$"), ("So $x = 5$ and we are done.", "x = 5"), ("7, so 9", "9"), ("none", "none"),
    ("Answer:\n\n```\n256\n```", "256"), (r"\begin{align*} N &= 3 \\ &= \sqrt[3]{7}. \end{align*}", r"\sqrt[3]{7}"), ("She has 3 apples and 4 pears.", "4"), ("", None), ("I do not know at all.", None),
    ("B. 12 apples", "B. 12 apples"), ("The value is **73**!", "73"),
])  # fmt: skip
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_gsm8k_golds_are_right_and_one_more_is_wrong():
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/gsm8k")
    rows = [json.loads(line) for line in open(SHARED / "data/gsm8k/test.jsonl")]
    for row in rows:
        gold = row["answer"].split("####")[1].strip()
        assert grade(row["answer"], gold) and not grade(row["answer"], str(int(gold.replace(",", "")) + 1)), row
    assert len(rows) == 1319


def test_math_solutions_are_right_for_their_own_problem_only():
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/math")
    rows = [json.loads(line) for line in open(SHARED / "data/math/sample50.jsonl")]
    for row in rows:
        assert readings(row["answer"])
        for other in rows:
            assert grade(row["solution"], other["answer"]) == (row["answer"] == other["answer"]), (row["answer"], other["answer"])


# ------------------------------------------------------------------------------------------------------- exactness


def random_expression(rng, depth: int):
    """(LaTeX, sympy) of a random expression in x."""
    kind = rng.choice(["number", "x"] if depth == 0 else ["+", "*", "frac", "power", "sqrt", "x", "number"])
    if kind == "number":
        n = rng.randint(1, 9)
        return str(n), sympy.Integer(n)
    if kind == "x":
        return "x", sympy.Symbol("x")
    (a, left), (b, right) = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
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
    """Random LaTeX is parsed into an expression that equals the one it was written from, at a point; and is not equal to it plus a trifle."""
    rng = random.Random(0)
    for _ in range(200):
        text, expression = random_expression(rng, 3)
        [(value, *_), *_] = readings(text)
        at = {sympy.Symbol("x"): sympy.Rational(rng.randint(1, 99), 7)}
        assert abs(sympy.N((value - expression).subs(at), 30)) < 1e-15 * (1 + abs(sympy.N(expression.subs(at), 30))), text
        assert grade(f"${text}$", text) and not grade(f"${text} + \\frac{{1}}{{10^9}}$", text), text


def test_large_integers_differ_by_one():
    for digits in (1, 5, 17, 40, 100, 400):
        n = 10**digits + 7
        assert grade(str(n), str(n)) and not grade(str(n + 1), str(n)) and grade(f"{n}.0", str(n)) and not grade(f"2^{{{digits}}}+1", f"2^{{{digits}}}")


def test_the_precision_of_others_is_left_alone():
    before = mpmath.mp.dps
    grade(r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}")
    assert mpmath.mp.dps == before


def test_equal_is_bounded_and_exact():
    x = sympy.Symbol("x")
    assert equal((x + 1) ** 2, x**2 + 2 * x + 1) and not equal((x + 1) ** 2, x**2 + 2 * x + sympy.Rational(10**30 + 1, 10**30))
    assert equal(sympy.sqrt(12), 2 * sympy.sqrt(3)) and not equal(sympy.sqrt(12), sympy.Rational(34641016151, 10**10))
    with pytest.raises(Unreadable):
        mathvalues.power(sympy.Integer(10), sympy.Integer(10**9))


# --------------------------------------------------------------------------------------------------------- hostility

HOSTILE = [
    "__import__('os').system('touch {flag}')", "\\boxed{__import__('os').system('touch {flag}')}", "eval(\"open('{flag}','w')\")", "(lambda: open('{flag}','w'))()",
    "\\input{/etc/passwd}", "\\write18{touch {flag}}", "{{7*7}}", "9^9^9^9", "9^{9^{9^{9}}}", "10^{10^{10}}", "9!!!!!!", "(10^9)!", "2^{10^9} \\cdot 2", "\\binom{10^9}{5 \\cdot 10^8}", "(x+1)^{100000}", "(12345x)^{10^{11}}",
    "e^{e^{e^{e^{10}}}}", "\\sin(10^{10^5})", "\\frac" * 5000, "\\sqrt{" * 5000, "(" * 100000, "{" * 100000 + "1" + "}" * 100000, "\\left(" * 9000, "9" * 1000000, "1/" * 5000 + "1", "-" * 100000 + "1",
    "1," * 100000, "\\pm 1" * 60, "(0,1)\\cup" * 5000 + "(0,1)", "x^" * 3000 + "x", "\\boxed{" * 20000, "$" * 100000, "*" * 100000 + "x", "#" * 100000, "The final answer is " * 20000, "answer is" + " " * 100000,
    "\n" * 200000 + "5", "0.\\overline{" + "9" * 10000 + "}", "10_{999999999999}", "\\begin{pmatrix}" + "1&" * 5000, "\\begin{pmatrix} 1 \\end{bmatrix}", "\\frac{}{}", "\\sqrt[0]{2}", "\\log 0", "\\log_1 2", "0^0",
    "0^{-1}", "\\tan 90^\\circ", "\\infty - \\infty", "\ud800", "\x00", "５", "٣", "\u202e5", "🙂" * 1000, "NaN", "inf", "True", "None", "[]", "{}", "\\", "^", "_", "&", "\\\\", "\\begin{", "a_{b_{c_{d" * 500,
    "\\text{" * 5000, "1" + ",000" * 50000, "1 1/2" * 3000, "\\overline{" * 300 + "1" + "}" * 300, "||||||||||", "\\lfloor" * 100, "mod" * 3000, "\\pmod{" * 300, "'" * 3000, "!" * 3000, "5" + "!" * 3000, "\\angle" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_input_is_only_data(number, tmp_path):
    """As response and as reference: a verdict within 2 seconds, no exception, no file."""
    flag = tmp_path / "flag"
    text = HOSTILE[number].replace("{flag}", str(flag))
    for response, gold in ((text, "42"), (f"The final answer is {text}.", r"\frac{1}{2}"), ("42", text), (text, text + "1")):
        begin = time.perf_counter()
        assert grade(response, gold) in (True, False)
        assert time.perf_counter() - begin < 2, text[:50]
    assert not grade(text, "\\frac{123}{457}") and not flag.exists() and not os.listdir(tmp_path)


def test_random_garbage_never_raises():
    rng = random.Random(1)
    pieces = ["\\frac", "{", "}", "(", ")", "[", "]", "1", "23", "x", "\\sqrt", "^", "_", "|", ",", "=", "<", "\\cup", "\\text{", "and", "\\pm", "!", "%", "$", " ", "\\\\", "&", "\\begin{pmatrix}", "\\end{pmatrix}", ".",
              "\\in", "\\{", "\\}", "\\pi", "\\infty", "e", "i", "\\sin", "\\log", "-", "/", "cm", "\\circ", ":", "\\mathbb{R}", "\\setminus", "\\binom", "\\lfloor", "\\rfloor", "or", "mod 7", "\\overline"]  # fmt: skip
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))
        assert grade(text, "".join(rng.choice(pieces) for _ in range(5))) in (True, False)


# ------------------------------------------------------------------------------------------------------------ worker


def test_judge_and_alike():
    got = judge("So 6. The final answer is $\\frac12$. I hope it is correct.", "0.5")
    assert got == {"extracted": "$\\frac12$", "correct": True, "strict": True, "graded": True}
    assert judge("It is 0.5", "1/2") == {"extracted": "0.5", "correct": True, "strict": False, "graded": True}
    assert alike(["1/2", "3", "0.5", None, "3.0", None]) == [0, 1, 0, 3, 1, 3]


def test_a_worker_that_dies_is_replaced():
    grader = Worker(seconds=5)
    assert grader.ask("judge", "5", "5")["correct"]
    assert grader.ask("no such job") is None and grader.killed == 1  # the worker ends with an error
    assert grader.ask("judge", "5", "6")["correct"] is False  # another one has taken over
    os.kill(grader.process.pid, 9)
    assert grader.ask("judge", "5", "5") is None and grader.killed == 2
    assert grader.ask("judge", "5", "5")["correct"]
    grader.stop()


def test_a_worker_over_its_time_is_stopped(tmp_path):
    grader = Worker(seconds=1)
    assert grader.ask("judge", "5", "5")["correct"]
    os.kill(grader.process.pid, 19)  # SIGSTOP: as if it never came back
    begin = time.time()
    assert grader.ask("judge", "5", "5") is None and time.time() - begin < 5 and grader.killed == 1
    assert grader.ask("judge", "5", "5")["correct"]
    grader.stop()


def test_a_worker_has_a_memory_limit():
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    grader = Worker(megabytes=300)
    assert grader.ask("judge", "5", "5")["correct"]
    soft, _ = resource.prlimit(grader.process.pid, resource.RLIMIT_AS) if hasattr(resource, "prlimit") else (1, 1)
    assert 0 < soft < math.inf and soft != resource.RLIM_INFINITY
    grader.stop()
