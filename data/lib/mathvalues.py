"""Values of answers: arithmetic within bounds, numbers to many digits, sets of real numbers."""

import contextlib
import functools
import math
import random
from typing import NamedTuple

import mpmath
import sympy
from sympy import E, I, Integer, Rational, Symbol, oo, pi, zoo

# grade(response, gold) = the answers that extract_answer finds in both mean the same. Pure functions of strings. What a model wrote is data: it
# is cut into tokens and read by the parser below, which builds sympy objects by calling their constructors; no string ever reaches sympy.

MAX_RESPONSE, MAX_ANSWER = 200_000, 4_000  # characters that are looked at; of an answer that is read
MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 600, 40, 32  # of an answer; of its nesting; in a list, set or matrix
MAX_DIGITS, MAX_BITS = 4_000, 30_000  # of a number as written; of one that is worked out


class Unreadable(Exception):
    """Not an answer that the parser knows, or one beyond its limits."""


# ------------------------------------------------------------------------------------------------ arithmetic within bounds


def bounded(value):
    """The value, unless it is a number that is too large to go on with, or none."""
    if value in (sympy.nan, zoo):
        raise Unreadable("no number")
    if isinstance(value, sympy.Rational) and max(abs(value.p).bit_length(), value.q.bit_length()) > MAX_BITS:
        raise Unreadable("number too large")
    return value


def scalar(value):
    if not isinstance(value, (sympy.Expr, sympy.MatrixBase)):
        raise Unreadable("not a number")
    return value


def add(a, b):
    a, b = scalar(a), scalar(b)
    if isinstance(a, sympy.MatrixBase) != isinstance(b, sympy.MatrixBase) or getattr(a, "shape", 0) != getattr(b, "shape", 0):
        raise Unreadable("a matrix and a number")
    return bounded(a + b)


def multiply(a, b):
    a, b = scalar(a), scalar(b)
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        raise Unreadable("a product of matrices")
    return bounded(a * b)


def size_of(value) -> int:
    """Bits of the largest number in an expression."""
    return max((max(abs(n.p).bit_length(), n.q.bit_length()) for n in value.atoms(sympy.Rational)), default=1)


def worked_out(value):
    """The value, unless it is a constant whose size is out of bounds: nothing larger ever exists here, so nothing can expand it."""
    if not value.free_symbols:
        try:
            numeric(value, {})
        except Undefined:
            raise Unreadable("too large, or undefined") from None
    return value


def power(base, exponent):
    base, exponent = scalar(base), scalar(exponent)
    if isinstance(base, sympy.MatrixBase) or isinstance(exponent, sympy.MatrixBase):
        raise Unreadable("power of a matrix")
    if base == 0 and not (exponent.is_Rational and exponent > 0):
        raise Unreadable("0^0 or 1/0")
    if exponent.is_Rational:
        if base not in (0, 1, -1) and size_of(base) * abs(exponent) > MAX_BITS:
            raise Unreadable("power too large")
        if base.is_Rational and base < 0 and exponent.q % 2 and exponent.q > 1:  # the real root, as people mean it
            root = power(-base, exponent)
            return -root if exponent.p % 2 else root
        if exponent.q == 1 or size_of(base) < 130:
            return bounded(sympy.Pow(base, exponent))
    return worked_out(sympy.Pow(base, exponent, evaluate=False))


def divide(a, b):
    b = scalar(b)
    return multiply(a, power(b, Integer(-1)))


def factorial(n, double: bool = False):
    n = scalar(n)
    if isinstance(n, Integer) and 0 <= n <= 1500:
        return Integer(math.prod(range(int(n), 0, -2)) if double else math.factorial(int(n)))
    return worked_out((sympy.factorial2 if double else sympy.factorial)(n, evaluate=False))


def choose(n, k):
    n, k = scalar(n), scalar(k)
    if isinstance(n, Integer) and isinstance(k, Integer) and 0 <= n <= 3000 and k >= 0:
        return Integer(math.comb(int(n), int(k)))
    return worked_out(sympy.binomial(n, k, evaluate=False))


def number(text: str):
    if len(text) > MAX_DIGITS:
        raise Unreadable("number too long")
    whole, _, decimals = text.partition(".")
    return Rational(int(whole + decimals or "0"), 10 ** len(decimals))


# ------------------------------------------------------------------------------------------------ the parser


class Value(NamedTuple):
    """What is more than a number (a sympy expression) or a matrix (a sympy matrix).

    kind, how it is held together: list, separators; seq, its brackets; set; region of intervals (low, closed, high, closed); rel, its signs; words, they themselves.
    """

    kind: str
    how: tuple | str
    items: tuple



EMPTY = Value("region", "", ())
MAGNITUDE = 20_000  # binary exponent beyond which a number is not worked out
mp = mpmath.mp.clone()  # a context of our own: its precision is nobody else's
SPECIAL = {
    sympy.Abs: mp.fabs, sympy.floor: mp.floor, sympy.ceiling: mp.ceil, sympy.factorial: mp.factorial, sympy.factorial2: mp.fac2, sympy.binomial: mp.binomial,
    sympy.log: mp.ln, sympy.exp: mp.exp,
} | {getattr(sympy, name): getattr(mp, name) for name in "sin cos tan cot sec csc sinh cosh tanh coth sech csch asin acos atan acot asec acsc asinh acosh atanh".split()}  # fmt: skip


class Undefined(Exception):
    """The expression has no value there."""


def numeric(e, point: dict):
    """The value of a sympy expression with its symbols at `point`, as an mpmath number; Undefined where there is none or it is out of bounds."""
    if e.is_Rational:
        return mp.mpf(e.p) / e.q
    if e.is_Symbol:
        return point[e]
    if e is I:
        return mp.j
    if e.is_NumberSymbol:
        return {pi: mp.pi, E: mp.e}.get(e, mp.nan) + 0
    if not e.args:
        raise Undefined  # infinity
    x = [numeric(a, point) for a in e.args]
    try:
        if e.is_Add or e.is_Mul:
            value = functools.reduce((lambda a, b: a + b) if e.is_Add else (lambda a, b: a * b), x)
        elif e.is_Pow:
            if abs(mp.re(x[1])) * max(abs(mp.mag(x[0])), 1) > MAGNITUDE if x[0] else mp.re(x[1]) <= 0:
                raise Undefined
            value = mp.power(*x)
        else:
            if any(mp.mag(v) > 60 for v in x if v):
                raise Undefined
            value = SPECIAL[e.func](*x)
    except (KeyError, ValueError, ArithmeticError, TypeError, mp.NoConvergence):
        raise Undefined from None
    if not mp.isfinite(value) or (value and abs(mp.mag(value)) > MAGNITUDE):
        raise Undefined
    return value


def close(a, b, digits: int) -> bool:
    return abs(a - b) <= mp.mpf(10) ** -digits * max(abs(a), abs(b), mp.mpf(10) ** -digits)


def points(symbols: list):
    """Seeded random places on three scales (so that neither high nor low powers drown the rest), three with all symbols positive, three with signs."""
    rng = random.Random(0)
    for n in range(6):
        scale = 10.0 ** (n % 3 - 1)
        yield {x: mp.mpf(scale * rng.randrange(10**6, 4 * 10**6)) / 10**6 * (rng.choice((1, -1)) if n > 2 else 1) for x in symbols}


def agree(a, b, same) -> bool:
    """Whether same(value of a, value of b) holds wherever both are defined, at two random points or more (numbers: at the one)."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    digits = min(100, 30 + int(0.302 * max(size_of(a), size_of(b))))
    with mp.workdps(2 * digits + 30):
        pairs = []
        for point in points(symbols) if symbols else [{}]:
            with contextlib.suppress(Undefined):
                pairs.append((numeric(a, point), numeric(b, point)))
        if symbols and not (a.has(I) or b.has(I)):  # roots of negative numbers: people take variables as positive
            pairs = [p for p in pairs if not mp.im(p[0]) and not mp.im(p[1])] or pairs
        if not symbols and any(v and mp.mag(v) > 3 * digits for p in pairs for v in p):
            return False  # an integer's last digit would not be seen
        return len(pairs) >= (2 if symbols else 1) and all(same(x, y, digits) for x, y in pairs)


def equal(a, b) -> bool:
    """Whether two sympy expressions are the same: as they are, as exact fractions, then by their values to 30 digits and more."""
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return getattr(a, "shape", 0) == getattr(b, "shape", 1) and all(map(equal, a, b))
    if a == b:
        return True
    if a.is_Rational and b.is_Rational or oo in (a, b) or -oo in (a, b):
        return False
    return agree(a, b, close)


def proportional(a, b, positive: bool) -> bool:
    """Whether a is b times a constant (a positive one)."""
    ratios = []

    def same(x, y, digits):
        if not x or not y:
            return not x and not y
        ratios.append(x / y)
        return close(ratios[0], ratios[-1], digits) and not mp.im(ratios[0]) and (not positive or ratios[0] > 0)

    return a == b or agree(a, b, same)


# ------------------------------------------------------------------------------------------------ sets of real numbers


def place(end):
    """Where an interval's end lies; Unreadable unless it is a real number."""
    if end in (oo, -oo):
        return mp.inf if end == oo else -mp.inf
    if not isinstance(end, sympy.Expr) or end.free_symbols:
        raise Unreadable("an end that is no number")
    try:
        value = numeric(end, {})
    except Undefined:
        raise Unreadable("an end that has no value") from None
    if mp.im(value):
        raise Unreadable("an end that is not real")
    return mp.re(value)


def region_of(value) -> tuple:
    """Intervals (low, closed, high, closed) of a set, an interval, an inequality or x in ...; Unreadable for anything else."""
    if isinstance(value, Value):
        if value.kind == "region":
            return value
        if value.kind == "set":
            return joined(*(Value("region", "", ((x, True, x, True),)) for x in value.items)) if value.items else Value("region", "", ())
        if value.kind == "seq" and len(value.items) == 2 and value.how != "<>":
            (low, high), how = value.items, value.how
            return Value("region", "", ((low, how[0] == "[", high, how[1] == "]"),))
        if value.kind == "rel" and value.how == ("in",):
            return region_of(value.items[1])
        if value.kind == "rel":
            return solved(value)
        if value.kind == "list" and all(isinstance(x, Value) for x in value.items):
            parts = [region_of(x) for x in value.items]
            if "or" in value.how or not all(x.kind == "rel" for x in value.items):
                return joined(*parts)
            return complement(joined(*map(complement, parts)))
    raise Unreadable("not a set of numbers")


def solved(value: Value) -> Value:
    """x > 3, 1 < x <= 2, x != 5 as a region."""
    names = [x for x in value.items if isinstance(x, Symbol)]
    if len(names) != 1 or not set(value.how) <= {"<", ">", "<=", ">=", "!=", "="} or any(isinstance(x, Value) for x in value.items):
        raise Unreadable("not solved")
    at = value.items.index(names[0])
    parts = []
    for n, (left, sign, right) in enumerate(zip(value.items, value.how, value.items[1:])):
        if n not in (at - 1, at):
            raise Unreadable("not solved")
        end, flip = (right, False) if n == at else (left, True)
        if sign in ("!=", "="):
            point = Value("region", "", ((end, True, end, True),))
            parts.append(point if sign == "=" else complement(point))
        elif ("<" in sign) != flip:
            parts.append(Value("region", "", ((-oo, False, end, "=" in sign),)))
        else:
            parts.append(Value("region", "", ((end, "=" in sign, oo, False),)))
    return parts[0] if len(parts) == 1 else complement(joined(*map(complement, parts)))


def joined(*regions: Value) -> Value:
    """The union, as intervals in order that do not touch."""
    ends = sorted(((place(low), not lc, place(high), hc, low, high) for region in regions for low, lc, high, hc in region.items), key=lambda e: e[:4])
    if len(ends) > MAX_ITEMS:
        raise Unreadable("too many intervals")
    out = []
    for low_at, low_open, high_at, high_closed, low, high in ends:
        if low_at > high_at or (low_at == high_at and (low_open or not high_closed)):
            continue
        if out and (low_at < out[-1][2] or (low_at == out[-1][2] and (out[-1][3] or not low_open))):
            if (high_at, high_closed) > (out[-1][2], out[-1][3]):
                out[-1][2:4], out[-1][5] = [high_at, high_closed], high
        else:
            out.append([low_at, low_open, high_at, high_closed, low, high])
    return Value("region", "", tuple((low, not low_open, high, high_closed) for _, low_open, _, high_closed, low, high in out))


def complement(region: Value) -> Value:
    out, low, closed = [], -oo, False
    for a, a_closed, b, b_closed in joined(region).items:
        if a != -oo:
            out.append((low, closed, a, not a_closed))
        low, closed = b, not b_closed
    if low != oo:
        out.append((low, closed, oo, False))
    return joined(Value("region", "", tuple(out)))


# ------------------------------------------------------------------------------------------------ whether two answers are the same


def label(value) -> bool:
    """Whether an equation's left side is only a name for its right side: x, x_1, f(x), V."""
    if isinstance(value, Value):
        return value.kind == "words" or value.kind == "seq" and all(isinstance(x, Symbol) for x in value.items)
    if not isinstance(value, sympy.Expr):
        return False
    if value.is_Mul:  # f(x), f^{-1}(x), f(3), P(X)
        letters = {str(a.base) if a.is_Pow else str(a) for a in value.args if a.is_Symbol or a.is_Pow and a.exp == -1}
        rest = [a for a in value.args if not a.is_Symbol and not (a.is_Pow and a.exp == -1)]
        return bool(letters & set("fgh")) and all(a.is_Integer for a in rest) or (not rest and bool(letters & set("pqPQT")))
    return value.is_Symbol or value in (E, I)


def bare(value, always: bool):
    """The right side of "x = 5" and "x in {5}"; of any equation with always."""
    if isinstance(value, Value) and value.kind == "rel" and set(value.how) <= {"=", "in"}:
        first, last = value.items[0], value.items[-1]
        if always or label(first) or value.how[-1] == "in":
            if isinstance(last, Symbol) and len(value.items) == 2 and not isinstance(first, Symbol) and isinstance(first, sympy.Expr):
                return first  # 5 = x
            return last
    return value
