"""Whether two values that were read from answers mean the same: same(answer, reference).

Numbers and formulas are compared by their values to 30 digits and more, at random points where they
have variables. Lists, sets, intervals, equations and inequalities are compared as what they are.
"""

import contextlib
import random
import re

import sympy
from sympy import E, I, Symbol, oo

from data.lib import mathvalues as bounded
from data.lib.mathvalues import MIRRORED, Undefined, Value, is_matrix, mp, numeric, region_of, size_of

KINKED = {"Abs", "floor", "ceiling"}
# Made of these alone even the smallest number is known to all its digits.
PRODUCTS = {"Mul", "Pow", "factorial", "factorial2", "binomial"}


def close(a, b, digits: int, floor: bool = True) -> bool:
    tolerance = mp.mpf(10) ** -digits
    return abs(a - b) <= tolerance * max(abs(a), abs(b), tolerance * floor)


def points(symbols: list, far: bool = False):
    """Six random places, always the same ones, as dicts from symbols to numbers: of three scales, so that
    no power drowns the rest, at first all positive; `far` adds four beyond the kinks that people write."""
    rng = random.Random(0)
    for n in range(10 if far else 6):
        scale = 10.0 ** (n % 3 - 1) if n < 6 else 10.0 ** (2 * (n // 2) - 3)
        point = {}
        for x in symbols:
            size = mp.mpf(scale * rng.randrange(10**6, 4 * 10**6)) / 10**6
            point[x] = size * rng.choice((1, -1)) if 3 <= n < 6 else size * (-1) ** (n // 6 * n)
        yield point


def moved(point: dict, part) -> dict:
    """The point, moved into an interval."""
    low, high = bounded.place(part.low), bounded.place(part.high)
    if mp.isinf(high):
        return point if mp.isinf(low) else {x: low + abs(v) for x, v in point.items()}
    return {x: high - (abs(v) if mp.isinf(low) else (high - low) / (1 + abs(v))) for x, v in point.items()}


def values_of_both(a, b, symbols: list, part=None) -> list[tuple]:
    """The values of a and b at every point where both are defined."""
    pairs = []
    parts = (x for y in (a, b) for x in sympy.preorder_traversal(y))
    far = any(x.func.__name__ in KINKED or x.is_Pow and not x.exp.is_Integer for x in parts)
    places = points(symbols, far) if symbols else [{}]
    for point in (moved(x, part) for x in places) if part else places:
        with contextlib.suppress(Undefined):
            pairs.append((numeric(a, point), numeric(b, point)))
    if symbols and not (a.has(I) or b.has(I)):
        # Where other points are left, variables are taken as positive.
        pairs = [p for p in pairs if not mp.im(p[0]) and not mp.im(p[1])] or pairs
    return pairs


def agree(a, b, same_value, part=None) -> bool:
    """Whether same_value(a's, b's, digits) holds wherever both have values; formulas: twice at least."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    digits = min(100, 30 + int(0.302 * max(size_of(a), size_of(b))))
    with mp.workdps(2 * digits + 30):
        pairs = values_of_both(a, b, symbols, part)
        if not symbols and any(x and mp.mag(x) > 3 * digits for pair in pairs for x in pair):
            return False  # the last digits of such an integer would not be seen
        return len(pairs) > bool(symbols) and all(same_value(x, y, digits) for x, y in pairs)


def equal(a, b) -> bool:
    """Whether two sympy expressions, or two matrices, are the same."""
    if is_matrix(a) or is_matrix(b):
        return getattr(a, "shape", 0) == getattr(b, "shape", 1) and all(map(equal, a, b))
    if a == b:
        return True
    if a.is_Rational and b.is_Rational or oo in (a, b) or -oo in (a, b):
        return False
    parts = (x for y in (a, b) for x in sympy.preorder_traversal(y))
    products = all(x.is_Atom or x.func.__name__ in PRODUCTS for x in parts)
    return agree(a, b, lambda x, y, digits: close(x, y, digits, not products))


def proportional(a, b, positive: bool) -> bool:
    """Whether a is b times a real constant, with positive: times a positive one."""
    ratios = []

    def same_ratio(x, y, digits):
        if not x or not y:
            return not x and not y
        ratios.append(x / y)
        first, last = ratios[0], ratios[-1]
        return close(first, last, digits) and not mp.im(first) and (first > 0 or not positive)

    return a == b or agree(a, b, same_ratio)


def label(value) -> bool:
    """Whether an equation's left side is only a name for its right side: x, x_1, f(x), (x, y), words."""
    if isinstance(value, Value):
        names = value.kind == "seq" and all(isinstance(x, Symbol) for x in value.items)
        return names or value.kind == "words"
    if not isinstance(value, sympy.Expr):
        return False
    name = str(value.args[0] if isinstance(value, sympy.Abs) else value)
    if re.fullmatch(r"([A-Z]\*?)+", name):
        return True  # AB, |AB|
    return function_call(value) if value.is_Mul else value.is_Symbol or value in (E, I)


def function_call(product) -> bool:
    """Whether a product of letters is a function's call: f(x), f^{-1}(x), f(3), P(X)."""
    factors = set(re.split("[*/]", str(product)))
    if factors & set("fgh"):
        return all(re.fullmatch(r"-?\w+", x) for x in factors)
    return bool(factors & set("pqPQT")) and all(map(str.isidentifier, factors))


def bare(value, always: bool = False):
    """The right side of "x = 5" and "x in {5}"; with always, that of any equation."""
    if not is_relation(value, "=", "in"):
        return value
    first, last = value.items[0], value.items[-1]
    if value.marks[-1] != "in" and not label(first) and not (always and stated(first, last)):
        return value
    turned = len(value.items) == 2 and isinstance(last, Symbol) and not isinstance(first, Symbol)
    return first if turned and isinstance(first, sympy.Expr) else last  # 5 = x


def stated(left, right) -> bool:
    """Whether an equation says what its left side is: m + n = 7, 3 + 4 = 7. Not one to be solved."""
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr) or right.free_symbols:
        return True
    letters = left.free_symbols
    if not letters:
        return abs(numeric(left - right, {})) <= abs(numeric(right, {})) / 100
    terms = sympy.Add.make_args(left)
    return len(letters) > 1 and all(x.free_symbols and x.as_coeff_Mul()[0] == 1 for x in terms)


def named(value) -> bool:
    """Whether a value lists one value each for several names: x = 1, y = 2."""
    items = value.items if getattr(value, "kind", "") == "list" else ()
    names = {x.items[0] for x in items if is_relation(x, "=") and len(x.items) == 2}
    plain = all(isinstance(x, Symbol) or getattr(x, "kind", "") == "words" for x in names)
    return plain and len(names) == len(items) > 1


def is_relation(value, *signs: str) -> bool:
    """Whether a value is a relation with no other signs than these."""
    return isinstance(value, Value) and value.kind == "rel" and set(value.marks) <= set(signs)


def all_scalars(*values: Value) -> bool:
    return all(isinstance(x, sympy.Expr) for value in values for x in value.items)


def pairwise(xs, ys) -> bool:
    """Whether two collections are the same in this order."""
    return len(xs) == len(ys) and all(map(same, xs, ys))


def matched(xs, ys) -> bool:
    """Whether two collections are the same in some order."""
    if len(xs) != len(ys):
        return False
    rest = list(ys)
    for x in xs:
        hit = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if hit is None:
            return False
        del rest[hit]
    return True


def unique(items) -> tuple:
    """The items without those that mean the same as an earlier one."""
    out = []
    for x in items:
        if not any(same(x, y) for y in out):
            out.append(x)
    return tuple(out)


def same(a, b) -> bool:
    """Whether answer a means the reference b. Raises a mathvalues.FAILURES if unsure."""
    kinds = tuple(x.kind if isinstance(x, Value) else "number" for x in (a, b))
    if kinds == ("number", "number"):
        return equal(a, b)
    if "rel" in kinds:
        return same_relation(a, b)
    if "cases" in kinds:
        return same_cases(a, b)
    if kinds == ("words", "words"):
        return a.marks == b.marks and pairwise(a.items, b.items)
    if kinds == ("seq", "seq"):
        return (a.marks == b.marks or {a.marks, b.marks} == {"()", "<>"}) and pairwise(a.items, b.items)
    if kinds.count("list") == 1:
        several, one = (a, b) if kinds[0] == "list" else (b, a)
        if len(unique(several.items)) == 1:  # "3/8, or 0.375"
            return same(several.items[0], one)
    if set(kinds) <= {"list", "set"}:
        return same_collection(a, b)
    if kinds.count("set") == 1 and set(kinds) <= {"set", "number", "seq"}:
        return matched(*(x.items if getattr(x, "kind", "") == "set" else (x,) for x in (a, b)))
    conditions = (a if kinds[0] == "list" else b) if set(kinds) == {"seq", "list"} else None
    told = conditions and all(is_relation(x, "<", ">", "<=", ">=", "!=") for x in conditions.items)
    if told or "region" in kinds:
        return same_region(region_of(a), region_of(b))
    if "seq" in kinds and "words" not in kinds:
        return same_tuple(a, b) if kinds[0] == "seq" else same_tuple(b, a)
    return False


def same_collection(a: Value, b: Value) -> bool:
    """same() of lists and sets. The order never matters; how often an item comes only in two lists."""
    if named(a) and named(b):
        return matched(a.items, b.items)
    if other_variable(a, b):
        return False
    xs, ys = tuple(map(bare, a.items)), tuple(map(bare, b.items))
    if a.kind == b.kind == "set":
        return matched(unique(xs), unique(ys))
    if a.kind != b.kind and "and" in (a if a.kind == "list" else b).marks[:-1]:
        return False
    return matched(xs, ys)


def same_tuple(point: Value, other) -> bool:
    """Whether (3, 4) is the same as a column of a matrix, or as x = 3, y = 4."""
    if is_matrix(other):
        column = other.shape == (len(point.items), 1)
        return column and point.marks in ("()", "<>") and all(map(same, point.items, other))
    if not named(other) or point.marks != "()":
        return False
    values = [x.items[-1] for x in sorted(other.items, key=lambda x: str(x.items[0]))]
    return pairwise(values, point.items)


def same_region(a: Value, b: Value) -> bool:
    return len(a.items) == len(b.items) and all(
        (x.low_closed, x.high_closed) == (y.low_closed, y.high_closed)
        and same(x.low, y.low)
        and same(x.high, y.high)
        for x, y in zip(a.items, b.items)
    )


def rows_of(value) -> list[tuple]:
    """(value, condition) of each row of cases, with what "otherwise" means; a formula is one row."""
    if not isinstance(value, Value):
        return [(value, bounded.REALS)]
    told = [when for _, when in value.items if when.kind == "region"]
    rest = bounded.complement(bounded.joined(*told)) if told else None
    otherwise = Value("words", (), ())
    return [(x, rest if rest and when == otherwise else when) for x, when in value.items]


def same_cases(a, b) -> bool:
    """same() of functions that are told by cases: for the same arguments, and wherever two cases meet."""
    rows, others = rows_of(a), rows_of(b)
    if any(when.kind == "words" for _, when in rows + others):
        return matched(*([Value("seq", "()", row) for row in table] for table in (rows, others)))
    domains = [bounded.joined(*(when for _, when in table)) for table in (rows, others)]
    return same_region(*domains) and all(
        agree(x, y, close, part)
        for x, when in rows
        for y, other in others
        for part in bounded.common(when, other).items
    )


def same_relation(a, b) -> bool:
    """same() where one side, at least, is an equation, an inequality, "x in" or a ratio."""
    if is_relation(a, ":") or is_relation(b, ":"):
        return same_ratio(a, b) if is_relation(a, ":") else same_ratio(b, a)
    both = isinstance(a, Value) and isinstance(b, Value) and a.kind == b.kind
    x, y = unpacked(a), unpacked(b)
    if x is not a and (both or getattr(b, "kind", "") == "list") or y is not b and named(a):
        return same(x, y)
    if both:
        if same_equation(a, b):
            return True
        names = {str(a.items[0]), str(b.items[0])}
        one_name = label(b.items[0]) and same(a.items[0], b.items[0]) or names in ({"y", "f*x"}, {"y", "g*x"})
        if is_relation(a, "=") and is_relation(b, "=") and one_name:
            return same(a.items[-1], b.items[-1])
        if is_relation(a, "=") and len(a.items) > 2 and label(a.items[0]):  # x = 2 + 3 = 5
            return same(Value("rel", ("=",), (a.items[0], a.items[-1])), b)
    else:
        x, y = bare(a, True), bare(b)
        if (x is not a or y is not b) and same(x, y):
            return True
    if is_relation(a, "=") or is_relation(b, "=") or other_variable(a, b):
        return False
    return same(region_of(a), region_of(b))


def unpacked(value):
    """The list x = 2, y = 3 for the equation (x, y) = (2, 3)."""
    left, right = (value.items[0], value.items[-1]) if is_relation(value, "=") else (None, None)
    if not all(isinstance(x, Value) and x.kind == "seq" for x in (left, right)) or not label(left):
        return value
    pairs = tuple(Value("rel", ("=",), pair) for pair in zip(left.items, right.items))
    return Value("list", (",",) * (len(pairs) - 1), pairs) if len(left.items) == len(right.items) else value


def other_variable(a, b) -> bool:
    """Whether both values are relations of variables, and not of the same: y > 3 for x > 3."""
    lists = (x.items if getattr(x, "kind", "") == "list" else (x,) for x in (a, b))
    relations = ([x for x in xs if getattr(x, "kind", "") == "rel"] for xs in lists)
    ours, theirs = ({x for y in xs for x in y.items if isinstance(x, Symbol)} for xs in relations)
    return bool(ours and theirs) and not ours & theirs


def same_ratio(ratio: Value, other) -> bool:
    """Whether a ratio is the same as another one, or as a quotient."""
    if not is_relation(other, ":"):
        quotient = not isinstance(other, Value) and len(ratio.items) == 2 and all_scalars(ratio)
        return quotient and equal(bounded.divide(*ratio.items), other)
    if not all_scalars(ratio, other) or 0 in ratio.items + other.items:  # 3:00 is a time
        return pairwise(ratio.items, other.items)
    first, second = ratio.items[0], other.items[0]
    pairs = zip(ratio.items, other.items)
    return len(ratio.items) == len(other.items) and all(
        equal(bounded.multiply(x, second), bounded.multiply(y, first)) for x, y in pairs
    )


def ascending(value: Value) -> Value:
    """A relation without > and >=: turned around where it has one."""
    signs = tuple(MIRRORED.get(sign, sign) for sign in reversed(value.marks))
    return Value("rel", signs, value.items[::-1]) if ">" in "".join(value.marks) else value


def same_equation(a: Value, b: Value) -> bool:
    """Two equations or inequalities. Those with one sign may differ by a factor and by moved terms."""
    a, b = ascending(a), ascending(b)
    if a.marks != b.marks or len(a.items) != len(b.items):
        return False
    if len(a.marks) == 1 and a.marks[0] != "in" and all_scalars(a, b):
        difference = a.items[0] - a.items[1]
        return proportional(difference, b.items[0] - b.items[1], "<" in a.marks[0])
    return pairwise(a.items, b.items)
