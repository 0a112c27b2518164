"""Values of answers: arithmetic within bounds, numbers to many digits, sets of real numbers.

What a model wrote is data: cut into tokens (latex_tokens.py), parsed (latex.py), and built into sympy
objects below, within bounds. No string ever reaches sympy, whose own readers would run it as Python.
"""

import functools
import math
import operator
from collections import namedtuple
from typing import NamedTuple

import mpmath
import sympy
from sympy import E, I, Integer, Rational, Symbol, oo, pi, zoo

MAX_RESPONSE = 200_000  # characters of a response that are looked at
MAX_ANSWER = 4_000  # characters of an answer that are read
MAX_TOKENS = 600  # of an answer
MAX_DEPTH = 40  # levels of nesting in an answer
MAX_ITEMS = 32  # in a list, a set or a matrix
MAX_DIGITS = 4_000  # of a number as it is written
MAX_BITS = 30_000  # of a number that is worked out exactly
MAX_EXPONENT = 20_000  # binary exponent of a number that is worked out to many digits


class Unreadable(Exception):
    """The text is not an answer that we can read, or it is beyond our limits."""


class Undefined(Unreadable):
    """The expression has no value there, or one that is out of bounds."""


# What reading or comparing hostile text can raise: callers take it as "cannot be read".
FAILURES = (Unreadable, RuntimeError, ValueError, ArithmeticError, TypeError, AttributeError)


def is_matrix(value) -> bool:
    return isinstance(value, sympy.MatrixBase)


def scalar(value):
    """The value, if it is a sympy expression or matrix. Raises Unreadable otherwise."""
    if not isinstance(value, (sympy.Expr, sympy.MatrixBase)):
        raise Unreadable("not a number")
    return value


def size_of(value) -> int:
    """Bits of the largest number in an expression."""
    sizes = (max(abs(x.p).bit_length(), x.q.bit_length()) for x in value.atoms(sympy.Rational))
    return max(sizes, default=1)


def bounded(value):
    """The value. Raises Unreadable if it is undefined or too large to go on with."""
    if value in (sympy.nan, zoo):
        raise Unreadable("no number")
    if isinstance(value, sympy.Rational) and size_of(value) > MAX_BITS:
        raise Unreadable("number too large")
    return value


def worked_out(value):
    """The value, built with evaluate=False: sympy expands it only once it is known to be small enough."""
    if not value.free_symbols:
        numeric(value, {})
    return value


def add(a, b):
    a, b = scalar(a), scalar(b)
    if getattr(a, "shape", 0) != getattr(b, "shape", 0):
        raise Unreadable("a sum of matrices of different shapes, or of a matrix and a number")
    return bounded(a + b)


def multiply(a, b):
    a, b = scalar(a), scalar(b)
    if is_matrix(a) and is_matrix(b):
        raise Unreadable("a product of matrices")
    return bounded(a * b)


def divide(a, b):
    return multiply(a, power(b, Integer(-1)))


def power(base, exponent):
    base, exponent = scalar(base), scalar(exponent)
    if is_matrix(base) or is_matrix(exponent):
        raise Unreadable("power of a matrix")
    if base == 0 and not (exponent.is_Rational and exponent > 0):
        raise Unreadable("0^0 or 1/0")
    if not exponent.is_Rational:
        return worked_out(sympy.Pow(base, exponent, evaluate=False))
    if base not in (0, 1, -1) and size_of(base) * abs(exponent) > MAX_BITS:
        raise Unreadable("power too large")
    if base.is_Rational and base < 0 and exponent.q % 2 and exponent.q > 1:
        root = power(-base, exponent)  # the real root, as people mean it
        return -root if exponent.p % 2 else root
    if exponent.q == 1 or size_of(base) < 130:
        return bounded(sympy.Pow(base, exponent))
    return worked_out(sympy.Pow(base, exponent, evaluate=False))


def factorial(n, double: bool = False):
    """n!, or with double n!! = n (n-2) (n-4) ..."""
    n = scalar(n)
    if isinstance(n, Integer) and 0 <= n <= 1500:
        return Integer(math.prod(range(int(n), 0, -2 if double else -1)))
    return worked_out((sympy.factorial2 if double else sympy.factorial)(n, evaluate=False))


def choose(n, k):
    """The binomial coefficient."""
    n, k = scalar(n), scalar(k)
    if isinstance(n, Integer) and isinstance(k, Integer) and 0 <= n <= 3000 and k >= 0:
        return Integer(math.comb(int(n), int(k)))
    return worked_out(sympy.binomial(n, k, evaluate=False))


def number(text: str):
    """The exact value of digits with at most one decimal point."""
    if len(text) > MAX_DIGITS:
        raise Unreadable("number too long")
    whole, _, decimals = text.partition(".")
    return Rational(int(whole + decimals or "0"), 10 ** len(decimals))


mp = mpmath.mp.clone()  # a context of our own, so that nobody else's precision changes
MP_NAMES = {"Abs": "fabs", "ceiling": "ceil", "factorial2": "fac2", "log": "ln"}  # where sympy's differ


def numeric(expression, point: dict):
    """The value of an expression at a point, as mpmath has it; or Undefined."""
    if expression.is_Rational:
        return mp.mpf(expression.p) / expression.q
    if expression.is_Symbol:
        return point[expression]
    if expression is I:
        return mp.j
    if expression in (pi, E):
        return +(mp.pi if expression == pi else mp.e)
    if not expression.args:
        raise Undefined  # infinity
    arguments = [numeric(x, point) for x in expression.args]
    try:
        value = applied(expression, arguments)
    except (AttributeError, ValueError, ArithmeticError, TypeError, mp.NoConvergence):
        raise Undefined from None
    if not mp.isfinite(value) or (value and abs(mp.mag(value)) > MAX_EXPONENT):
        raise Undefined
    return value


def applied(expression, arguments: list):
    """The outermost operation of an expression on the values of its arguments."""
    if expression.is_Add:
        return functools.reduce(operator.add, arguments)
    if expression.is_Mul:
        return functools.reduce(operator.mul, arguments)
    if expression.is_Pow:
        base, exponent = arguments
        if not base and mp.re(exponent) <= 0:
            raise Undefined
        if base and abs(mp.re(exponent)) * max(abs(mp.mag(base)), 1) > MAX_EXPONENT:
            raise Undefined
        return mp.power(base, exponent)
    if any(mp.mag(x) > 60 for x in arguments if x):
        raise Undefined
    name = expression.func.__name__
    return getattr(mp, MP_NAMES.get(name, name))(*arguments)


class Value(NamedTuple):
    """What is more than a number (a sympy expression) or a matrix (a sympy matrix).

    kind    items                  marks
    list    its members            the separators between them: "," "and" "or"
    seq     its members, in order  the brackets: "()" "[]" "[)" "(]" "<>"
    set     its members            ""
    region  intervals              ""
    rel     the sides              the signs between them: "=" "<" ">=" "in" ":" ...
    words   what they stand before the words
    cases   (value, condition)     ""
    """

    kind: str
    marks: tuple | str
    items: tuple


Interval = namedtuple("Interval", "low low_closed high high_closed")
EMPTY = Value("region", "", ())
REALS = Value("region", "", (Interval(-oo, False, oo, False),))
MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def interval(low, low_closed: bool, high, high_closed: bool) -> Value:
    """A region of one interval."""
    return Value("region", "", (Interval(low, low_closed, high, high_closed),))


def region_of(value) -> Value:
    """The region that a set, an interval, an inequality or "x in ..." describes, or Unreadable."""
    kind = value.kind if isinstance(value, Value) else "number"
    if kind == "region":
        return value
    if kind == "set":
        return joined(*(interval(x, True, x, True) for x in value.items))
    if kind == "seq" and len(value.items) == 2 and value.marks != "<>":
        low, high = value.items
        return interval(low, value.marks[0] == "[", high, value.marks[1] == "]")
    if kind == "rel":
        return region_of(value.items[1]) if value.marks == ("in",) else solved(value)
    if kind == "list" and all(isinstance(x, Value) for x in value.items):
        parts = [region_of(x) for x in value.items]
        conditions = all(x.kind == "rel" for x in value.items)
        return common(*parts) if conditions and "or" not in value.marks else joined(*parts)
    raise Unreadable("not a set of numbers")


def solved(value: Value) -> Value:
    """The region of x > 3, 1 < x <= 2 or x != 5, where x is alone on its side."""
    first, signs = value.items[0], value.marks
    if isinstance(first, sympy.Abs) and len(signs) == 1 and "<" in signs[0] + MIRRORED.get(signs[0], ""):
        return around(*first.args, *signs, value.items[1])
    places = [n for n, x in enumerate(value.items) if isinstance(x, Symbol)]
    known = len(places) == 1 and len(signs) < 3 and set(signs) <= set(MIRRORED)
    if not known or any(isinstance(x, Value) for x in value.items) or len(signs) == 2 and places != [1]:
        raise Unreadable("not solved")
    at = places[0]
    parts = [half_line(sign, end) for sign, end in zip(signs[at:], value.items[at + 1 :])]
    parts += [half_line(MIRRORED[sign], end) for sign, end in zip(signs[:at], value.items)]
    return parts[0] if len(parts) == 1 else common(*parts)


def around(middle, sign: str, radius) -> Value:
    """All x for which |x - a| `sign` radius holds."""
    center = next(iter(middle.free_symbols), 0) - middle
    closed = sign in ("<=", ">")
    inside = interval(center - radius, closed, center + radius, closed)
    return inside if "<" in sign else complement(inside)


def half_line(sign: str, end) -> Value:
    """All x for which `x sign end` holds."""
    if sign == "=":
        return interval(end, True, end, True)
    if sign == "!=":
        return complement(interval(end, True, end, True))
    if "<" in sign:
        return interval(-oo, False, end, "=" in sign)
    return interval(end, "=" in sign, oo, False)


def place(end):
    """Where an interval's end lies, as an mpmath number. Raises Unreadable unless it is real."""
    if end in (oo, -oo):
        return mp.inf if end == oo else -mp.inf
    if not isinstance(end, sympy.Expr) or end.free_symbols:
        raise Unreadable("an end that is no number")
    value = numeric(end, {})
    if mp.im(value):
        raise Unreadable("an end that is not real")
    return mp.re(value)


def joined(*regions: Value) -> Value:
    """The union of regions, as intervals in order that do not touch."""
    parts = [  # where each begins and ends, as (place, whether behind that number)
        ((place(x.low), not x.low_closed), (place(x.high), x.high_closed), x)
        for region in regions
        for x in region.items
    ]
    if len(parts) > MAX_ITEMS:
        raise Unreadable("too many intervals")
    out, last = [], None
    for begin, end, part in sorted(parts, key=lambda p: p[:2]):
        if begin >= end:
            continue  # nothing lies in it
        if not out or begin > last:
            out.append(part)
            last = end
        elif end > last:
            out[-1] = out[-1]._replace(high=part.high, high_closed=part.high_closed)
            last = end
    return Value("region", "", tuple(out))


def complement(region: Value) -> Value:
    low, closed, gaps = -oo, False, []
    for part in joined(region).items:
        gaps.append(Interval(low, closed, part.low, not part.low_closed))
        low, closed = part.high, not part.high_closed
    return joined(Value("region", "", (*gaps, Interval(low, closed, oo, False))))


def common(*regions: Value) -> Value:
    """The intersection of regions."""
    return complement(joined(*map(complement, regions)))
