"""Reads the LaTeX of an answer: readings(text) gives every value that it can mean.

A value is a sympy expression, a sympy matrix, or a Value: built by constructors only."""

import contextlib
import functools
import math
import re
from collections import namedtuple

import sympy
from sympy import E, I, Integer, Rational, Symbol, oo, pi

from data.lib import mathvalues as bounded
from data.lib.equality import unique
from data.lib.latex_tokens import FUNCTIONS, INVERSE, Token, Tokenizer, clean, words_of
from data.lib.mathvalues import EMPTY, FAILURES, MAX_ANSWER, MAX_DEPTH, MAX_ITEMS, REALS, Unreadable, Value

GREEK = set(
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    rho sigma tau upsilon phi varphi chi psi omega
    Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar""".split()
)
ACCENTS = set("overline bar vec hat widehat tilde overrightarrow dot".split())
MATRICES = set("pmatrix bmatrix matrix vmatrix Bmatrix Vmatrix smallmatrix array".split())
CLOSING = (")", "]", "}", "\\}")
# Opening sign -> closing sign, function.
PAIRS = {"|": ("|", sympy.Abs), "lvert": ("rvert", sympy.Abs), "vert": ("vert", sympy.Abs)}
PAIRS |= {"lfloor": ("rfloor", sympy.floor), "lceil": ("rceil", sympy.ceiling)}
# Commands that do not begin a factor.
STOPS = set(
    """cup cap setminus backslash bigcup pm mp cdot times ast div rfloor rceil rvert vert rangle
    rbrace end circ choose over pmod bmod dots ldots cdots""".split()
)
# Unit -> (which others it can be turned into, its size beside these).
MEASURES = """second 1 minute 60 hour 3600 day 86400 week 604800
    millimeter 1 centimeter 10 meter 1000 kilometer 1000000 | inch 1 foot 12 yard 36 mile 63360
    milligram 1 gram 1000 kilogram 1000000 | milliliter 1 liter 1000 | ounce 1 pound 16 | cent 1 dollar 100"""
MEASURES = {
    name: (group, int(size))
    for group in re.split(r"\||\n", MEASURES)
    for name, size in re.findall(r"(\w+) (\d+)", group)
}
CONDITIONAL = set("if for when where otherwise else elsewhere ,".split())
END = Token("end", "")


class Parser:
    r"""Recursive descent over tokens: answer() gives their value, or raises Unreadable. sign is what \pm
    stands for; units, as (name, power), and the words behind values are noted as they are met."""

    def __init__(self, tokens: list[Token], sign: int = 1):
        self.tokens = list(tokens)
        self.sign = sign
        self.at = self.depth = 0
        self.bars = 0  # how many | are open
        self.units, self.words = [], []

    def next(self, ahead: int = 0) -> Token:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else END

    def found(self, kind: str, *values: str) -> bool:
        """Whether the next token is of that kind, and has one of the values if there are any."""
        token = self.next()
        return token.kind == kind and (not values or token.value in values)

    def accept(self, kind: str, *values: str) -> str:
        """Take the next token if it is found. Returns its value, or ""."""
        return self.take() if self.found(kind, *values) else ""

    def take(self, *values: str) -> str:
        token = self.next()
        if token.kind == "end" or values and token.value not in values:
            raise Unreadable(f"expected {values}, found {token.value}")
        self.at += 1
        return token.value

    def deeper(self, parse, *args, bars: int = 0):
        """parse(*args) one level down, where `bars` of the sign | are open."""
        if self.depth >= MAX_DEPTH:
            raise Unreadable("nested too deep")
        before, self.bars = self.bars, bars
        self.depth += 1
        value = parse(*args)
        self.bars = before
        self.depth -= 1
        return value

    def answer(self):
        items, separators = self.items()
        if not self.found("end"):
            raise Unreadable(f"{self.next().value} is not expected here")
        return items[0] if len(items) == 1 else Value("list", tuple(separators), tuple(items))

    def items(self) -> tuple[list, list]:
        """Statements, and the commas, "and", "or" between them."""
        items, separators = [self.statement()], []
        while self.found("sep"):
            while self.found("sep"):  # ", and"
                separator = self.take()
            if self.found("end") or self.found("op", *CLOSING):
                break
            separators.append(separator)
            items.append(self.statement())
            if len(items) > MAX_ITEMS:
                raise Unreadable("too many items")
        return items, separators

    def spoken(self) -> tuple:
        words = []
        while self.found("word"):
            words.append(self.take())
        return tuple(words)

    def statement(self):
        """Words, an expression, and what it is equal to, less than, a member of ..."""
        lead = self.spoken()
        if lead and (self.next().kind in ("end", "sep") or self.found("op", *CLOSING)):
            return Value("words", lead, ())
        if lead and self.accept("rel", "=", ":"):  # Area = 7
            return Value("rel", ("=",), (Value("words", lead, ()), self.union()))
        self.accept("rel", "~")
        value = self.relation()
        self.words += self.spoken()
        return Value("words", lead, (value,)) if lead else value

    def relation(self):
        sides, signs = [self.union()], []
        while self.found("rel"):
            while self.found("rel"):  # "is = 5"
                sign = self.take()
            right = self.union()
            if sign == "~":
                if len(sides) > 1 or not isinstance(sides[0], Symbol):
                    continue  # \sqrt2 \approx 1.41: the exact value is the answer
                sign = "="
            signs.append(sign)
            sides.append(right)
        if {"=", ":"} <= set(signs):  # V_1 : V_2 = 2 : 3
            last = len(signs) - signs[::-1].index("=")
            signs, sides = signs[last:], sides[last:]
        return Value("rel", tuple(signs), tuple(sides)) if signs else sides[0]

    def union(self):
        """Sets joined by union, intersection and difference, or a sum."""
        left = self.expression()
        while self.set_sign(left):
            a = bounded.region_of(self.in_set(left))
            sign = self.take()
            b = bounded.region_of(self.in_set(self.expression()))
            if sign in ("cup", "U", "bigcup"):
                left = bounded.joined(a, b)
            else:
                left = bounded.common(a, b if sign == "cap" else bounded.complement(b))
        return left

    def in_set(self, value):
        """An operand of a union, where {3} is a set."""
        single = isinstance(value, sympy.Expr) and self.tokens[self.at - 1].value == "}"
        return Value("set", "", (value,)) if single else value

    def set_sign(self, left) -> bool:
        if self.found("cmd", "cup", "cap", "setminus", "backslash", "bigcup"):
            return True
        return isinstance(left, Value) and (self.found("op", "-") or self.found("name", "U"))

    def signed(self) -> bool:
        return self.found("op", "+", "-") or self.found("cmd", "pm", "mp")

    def signs(self) -> Integer:
        """Take any number of signs. Returns 1 or -1."""
        values, sign = {"+": 1, "-": -1, "pm": self.sign, "mp": -self.sign}, 1
        while self.signed():
            sign *= values[self.take()]
        return Integer(sign)

    def expression(self):
        left = self.term()
        while not isinstance(left, Value) and self.signed():
            sign = self.signs()
            left = bounded.add(left, bounded.multiply(self.term(), sign))
        return left

    def term(self):
        """A product, with and without signs between its factors, and with units among them."""
        sign = self.signs()
        left = self.factor()
        while True:
            unit_next = self.next(1).kind in ("unit", "power")
            if self.accept("op", "*") or self.accept("cmd", "cdot", "times", "ast"):
                left = bounded.multiply(bounded.multiply(left, self.signs()), self.factor())
            elif unit_next and self.accept("op", "/"):
                self.unit(-1)
            elif self.accept("op", "/") or self.accept("cmd", "div"):
                left = bounded.divide(bounded.multiply(left, self.signs()), self.factor())
            elif self.next().kind in ("unit", "power"):
                self.unit()
                left = self.measure(left)
            elif self.unit_fraction():
                self.take()
                for power in (1, -1):
                    self.take("{")
                    self.unit(power)
                    self.take("}")
            elif self.starts_factor() and not isinstance(left, Value):
                if self.next().kind == self.tokens[self.at - 1].kind == "num":
                    raise Unreadable("two numbers side by side")
                right = self.factor()
                point = isinstance(left, Symbol) and getattr(right, "kind", "") == "seq"  # P(1, 2)
                left = right if point else bounded.multiply(left, right)
            else:
                return left if sign == 1 else bounded.multiply(left, sign)

    def starts_factor(self) -> bool:
        token = self.next()
        if token.kind == "name":  # U between intervals is their union
            return token.value != "U" or not token.spaced or self.tokens[self.at - 1].value not in ")]"
        if token.kind == "op":
            return token.value in ("(", "[", "{", "\\{") or (token.value == "|" and not self.bars)
        if token.kind == "cmd":
            return token.value not in STOPS
        return token.kind in ("num", "func")

    def unit_fraction(self) -> bool:
        r"""Whether \frac{miles}{hour} comes next."""
        group = self.found("cmd", "frac") and self.next(1).value == "{"
        return group and self.next(2).kind in ("unit", "power")

    def unit(self, sign: int = 1) -> None:
        """Take a unit with its power. It is noted, not multiplied."""
        exponent = int(self.accept("power") or 1)
        name = self.accept("unit")
        if name and self.accept("op", "^"):
            exponent = int(self.argument())
        if name not in ("", "unit"):
            self.units.append((name, sign * exponent))

    def measure(self, left):
        """The value before a unit; of 3 hours (and) 20 minutes the whole, in the last unit."""
        ahead = int(self.found("sep", "and", ","))
        group, size = MEASURES.get(self.units[-1][0] if self.units else "", ("", 1))
        other, scale = MEASURES.get(self.next(ahead + 1).value, ("", 1))
        if group != other or size <= scale or self.next(ahead).kind != "num":
            if not self.found("num"):
                return left
            raise Unreadable("a number behind a unit")
        self.at += ahead
        name = self.units.pop()[0]
        whole = bounded.add(bounded.multiply(left, Rational(size, scale)), self.term())
        if name != "dollar":
            return whole
        self.units[-1:] = [("dollar", 1)]
        return bounded.divide(whole, Integer(100))

    def degree(self) -> bool:
        r"""Take \circ, {\circ} or a prime, if one is next: no powers."""
        group = int(self.found("op", "{"))
        mark = self.next(group).value
        if mark in ("circ", "prime", "degree"):
            self.at += 1 + 2 * group
            self.units.append(("prime" if mark == "prime" else "degree", 1))
            self.accept("name", "C", "F")
        return mark in ("circ", "prime", "degree")

    def factor(self):
        """A primary with all that stands behind it: powers, factorials, bases, primes."""
        while self.next().kind in ("unit", "power"):  # a dollar sign in front
            self.unit()
        value = self.primary()
        while True:
            if self.accept("op", "^"):
                value = value if self.degree() else bounded.power(value, self.argument())
            elif self.accept("op", "!"):
                value = bounded.factorial(value, bool(self.accept("op", "!")))
            elif isinstance(value, (Integer, Symbol)) and self.found("op", "_"):  # (1011)_2, {g}_{k}
                value = (self.in_base if isinstance(value, Integer) else self.symbol)(str(value))
            elif self.accept("op", "'"):
                if isinstance(value, Symbol):
                    value = Symbol(f"{value}'")
                else:
                    self.units.append(("prime", 1))  # minutes of an angle, or feet
            elif self.found("cmd", "circ"):
                self.degree()
            elif self.accept("cmd", "pmod", "bmod"):
                self.units.append((f"mod {self.factor()}", 1))
            else:
                return value

    def argument(self):
        r"""What ^, \frac and \sqrt apply to: {...} or one token."""
        if self.found("op", "{"):
            return self.group()
        if self.accept("op", "-"):
            return bounded.multiply(self.deeper(self.argument), Integer(-1))
        value = self.primary()
        return bounded.power(value, self.deeper(self.argument)) if self.accept("op", "^") else value

    def digit(self):
        r"""An argument of \frac: {...}, or one token, of a number one digit (\frac12)."""
        token = self.next()
        if token.kind != "num" or len(token.value) == 1 or not token.value.isdigit():
            return bounded.scalar(self.argument())
        self.tokens[self.at] = token._replace(value=token.value[1:], spaced=False)
        return Integer(int(token.value[0]))

    def group(self):
        self.take("{")
        value = self.deeper(self.union)
        if self.accept("sep"):  # {2, 3}
            rest, _ = self.deeper(self.items)
            self.take("}")
            return Value("set", "", (value, *rest))
        if self.accept("cmd", "choose"):
            value = bounded.choose(value, self.deeper(self.union))
        elif self.accept("cmd", "over"):
            value = bounded.divide(value, self.deeper(self.union))
        self.words += self.spoken()
        self.take("}")
        return value

    def primary(self):
        kind, sign, _ = self.next()
        if sign == "{":
            return self.group()
        self.take()
        if kind == "num":
            return self.numeral(sign)
        if kind == "name":
            return self.symbol(sign)
        if kind == "func":
            return self.deeper(self.function, sign, bars=self.bars)
        if sign in ("(", "["):
            return self.deeper(self.sequence, sign)
        if sign in ("\\{", "lbrace"):
            return self.deeper(self.set)
        if sign in PAIRS:
            return self.between(*PAIRS[sign])
        if kind == "cmd":
            return self.command(sign)
        raise Unreadable(f"{sign} is not expected here")

    def numeral(self, digits: str):
        """A number. Its base (1011_2, 1A_{16}) is noted like a unit."""
        ahead = 0
        while not self.next(ahead).spaced and re.fullmatch(r"[A-F]|\d+", self.next(ahead).value):
            ahead += 1
        if self.next(ahead).value == "_" and "." not in digits:
            return self.in_base(digits + "".join(self.take() for _ in range(ahead)))
        return bounded.number(digits) + self.mixed(digits)

    def mixed(self, digits: str):
        """Take the fraction of a mixed number behind its digits. Returns 0 if there is none."""
        at, tokens = self.at, list(self.tokens)  # digit() shortens tokens
        part = 0
        if self.found("cmd", "frac") and not self.unit_fraction() and "." not in digits:
            self.take()
            part = self.command("frac")
            plain = all(t.kind == "num" or t.value in "{}" for t in tokens[at + 1 : self.at])
            degrees = "circ" in (self.next(1).value, self.next(2).value)
            part = part if plain and (degrees or not self.found("op", "^")) else 0
        elif self.found("num") and self.next(1).value == "/" and self.next(2).kind == "num":
            part = bounded.divide(bounded.number(self.next().value), bounded.number(self.next(2).value))
            self.at += 3
        if not (isinstance(part, Rational) and 0 < part < 1):
            self.at, self.tokens, part = at, tokens, 0
        return part

    def in_base(self, digits: str):
        self.take("_")
        base = self.argument()
        self.units.append((f"base {base}", 1))
        return bounded.number(digits) if digits.isdigit() else Symbol(digits)

    def symbol(self, name: str):
        """A variable with its subscript, or one of the constants e and i."""
        if not self.accept("op", "_"):
            return {"e": E, "i": I}.get(name) or Symbol(name)
        if not self.found("op", "{") or self.next(1).kind != "word":
            return Symbol(f"{name}_{self.argument()}")
        self.take()
        subscript = " ".join(self.spoken())  # v_{max}
        self.take("}")
        return Symbol(f"{name}_{subscript}")

    def between(self, closing: str, function):
        value = self.deeper(self.expression, bars=int(closing == "|"))
        self.take(closing)
        if not isinstance(value, sympy.Expr):
            raise Unreadable("the size of a matrix, or of no number")
        exact = value.is_Rational and function is sympy.Abs
        return abs(value) if exact else bounded.worked_out(function(value, evaluate=False))

    def sequence(self, opening: str):
        """A tuple, an interval, or an expression in brackets."""
        items, _ = self.items()
        brackets = opening + self.take(")", "]")
        rows = [x.items if isinstance(x, Value) and x.marks == "[]" else () for x in items]
        if brackets == "[]" and len({len(row) for row in rows}) == 1 and rows[0]:  # [[1, 2], [3, 4]]
            return sympy.ImmutableDenseMatrix([list(map(bounded.scalar, row)) for row in rows])
        return items[0] if len(items) == 1 else Value("seq", brackets, tuple(items))

    def set(self):
        if self.accept("op", "\\}"):
            return EMPTY
        value = Value("set", "", tuple(self.items()[0]))
        self.take("\\}", "rbrace")
        return value

    def command(self, name: str):
        constants = {"pi": pi, "infty": oo, "emptyset": EMPTY, "varnothing": EMPTY}
        if name in constants:
            return constants[name]
        if name == "frac":
            return bounded.divide(self.digit(), self.digit())
        if name in ("binom", "dbinom", "tbinom"):
            return bounded.choose(self.digit(), self.digit())
        if name in ("mathbb", "R"):
            return self.number_set(name)
        if name == "langle":
            items, _ = self.deeper(self.items)
            self.take("rangle")
            return Value("seq", "<>", tuple(items))
        if name in ("begin", "angle", "triangle", "measuredangle"):
            return self.deeper(self.matrix if name == "begin" else self.primary)
        if name in ACCENTS:
            return self.accented(name)
        if name not in GREEK:
            raise Unreadable(f"\\{name}")
        return self.symbol(name)

    def number_set(self, name: str):
        r"""\mathbb{R} or \mathbb{R}^+ as a region, any other such letter as a word."""
        letter = name if name == "R" else self.take()
        if letter == "R" and self.accept("op", "^", "_"):
            return bounded.half_line(">" if self.take("+", "-") == "+" else "<", Integer(0))
        return REALS if letter == "R" else Value("words", (letter,), ())

    def accented(self, name: str):
        start = self.at
        value = self.argument()
        if isinstance(value, sympy.Mul) and all(x.is_Symbol for x in value.args):
            return value  # \overline{AB}: a segment's name
        if name in ("overline", "bar") and isinstance(value, sympy.Expr) and value.has(I):
            return sympy.conjugate(value) if not value.free_symbols else Symbol(f"{name}{value}")
        written = [token.value for token in self.tokens[start : self.at]]
        return Symbol(name + "".join(x for x in written if x not in "{}"))

    def matrix(self):
        name = self.environment()
        if name == "cases":
            return self.cases()
        if name not in MATRICES:
            raise Unreadable(name)
        rows = [[]]
        while not self.found("cmd", "end"):
            rows[-1].append(bounded.scalar(self.expression()))
            if self.accept("sep", "\\\\"):
                rows.append([])
            elif not self.found("cmd", "end"):
                self.take("&")
        self.take("end")
        rows = list(filter(None, rows))
        cells = [x for row in rows for x in row]
        if self.environment() != name or len({len(row) for row in rows}) != 1:
            raise Unreadable("not a matrix")
        if len(cells) > MAX_ITEMS or any(map(bounded.is_matrix, cells)):
            raise Unreadable("not a matrix of numbers, or a large one")
        matrix = sympy.ImmutableDenseMatrix(rows)
        if len(cells) == 1:
            return cells[0]
        if name == "vmatrix" and all(x.is_Rational for x in cells):
            return bounded.bounded(matrix.det())
        return matrix

    def cases(self):
        """The rows of a cases environment: a system as a list, or pairs of a value and its condition."""
        rows = []
        while not self.found("cmd", "end"):
            rows.append(self.relation())
            self.accept("sep", ",")
            if self.accept("op", "&") or self.found("word"):
                start = self.at
                while not self.found("cmd", "end") and not self.found("sep", "\\\\"):
                    self.take()
                rows[-1] = (rows[-1], condition(self.tokens[start : self.at]))
            self.accept("sep", "\\\\")
        self.take("end")
        n_pairs = sum(type(row) is tuple for row in rows)
        if self.environment() != "cases" or n_pairs not in (0, len(rows)) or len(rows) > MAX_ITEMS:
            raise Unreadable("not cases")
        return Value(*(("cases", "") if n_pairs else ("list", ("and",) * len(rows[1:]))), tuple(rows))

    def environment(self) -> str:
        self.take("{")
        name = ""
        while not self.accept("op", "}"):
            name += self.take()
        return name.rstrip("*")

    def function(self, name: str):
        r"""\sqrt, \log, \sin ...: an index or a base, a power, then the argument."""
        if name == "sqrt":
            index = self.sequence("[") if self.accept("op", "[") else Integer(2)
            return bounded.power(self.argument(), bounded.divide(Integer(1), index))
        base = self.digit() if self.accept("op", "_") else Integer(10)
        exponent = self.argument() if self.accept("op", "^") else Integer(1)
        if name in ("gcd", "lcm"):
            return Integer(getattr(math, name)(*map(int, self.primary().items)))
        argument = self.angle()
        if isinstance(argument, Value):
            argument, base = map(bounded.scalar, argument.items)  # log(8, 2)
        if name in ("exp", "cis"):
            turned = argument if name == "exp" else bounded.multiply(argument, I)
            return bounded.power(bounded.power(E, turned), exponent)
        if exponent == -1 and name in INVERSE:
            return bounded.worked_out(INVERSE[name](argument, evaluate=False))
        value = bounded.worked_out(FUNCTIONS[name](argument, evaluate=False))
        if name in ("log", "lg"):
            value = bounded.divide(value, bounded.worked_out(sympy.log(base, evaluate=False)))
        return value if exponent == 1 else bounded.power(value, exponent)

    def angle(self):
        """A function's argument; degrees become radians."""
        n_units = len(self.units)
        argument = self.function_argument()
        if ("degree", 1) in self.units[n_units:]:
            argument = bounded.multiply(argument, pi / 180)
            del self.units[n_units:]
        if bounded.is_matrix(argument):
            raise Unreadable("function of a matrix")
        return argument

    def function_argument(self):
        """(...) or {...}, or the product that follows, up to the next function or bracket."""
        if self.found("op", "(", "{", "|", "["):
            return self.primary()
        sign = self.signs()
        value = self.factor()
        while True:
            if self.found("unit", "degree"):
                self.unit()
            elif self.starts_factor() and not self.found("func") and not self.found("op", "(", "["):
                value = bounded.multiply(value, self.factor())
            else:
                break
        if self.next(1).kind in ("num", "name") and self.accept("op", "/"):  # sin pi/6
            value = bounded.divide(value, self.factor())
        return bounded.multiply(value, sign)


def condition(tokens: list[Token]) -> Value:
    """When a row of cases holds, as a region or as words; "otherwise" is words without any."""
    tokens = [token for token in tokens if token.value not in CONDITIONAL]
    with contextlib.suppress(*FAILURES):
        return bounded.region_of(Parser(tokens).answer())
    return Value("words", tuple(token.value for token in tokens if token.value != "="), ())


PHRASES = {
    "no solution|no solutions|no real solution|no real solutions|empty set|none|no reals": "\\emptyset",
    "dne|does not exist|undefined|not defined": "undefined",
    "reals|real": "\\mathbb R", "integers": "\\mathbb Z", "positive reals": "(0, \\infty)",
    "negative reals": "(-\\infty, 0)", "nonnegative reals": "[0, \\infty)",
    "half": "1/2", "quarter": "1/4", "dozen": "12", "infinitely many solutions": "infinitely many",
}  # fmt: skip
EVERY = re.compile(r"^(?:[a-z] can be )?(?:(?:set of )?(?:all|any|every) )?")
PHRASES = {phrase: meaning for phrases, meaning in PHRASES.items() for phrase in phrases.split("|")}


# One way to read an answer. split: runs of letters were taken as products.
Reading = namedtuple("Reading", "value units words split")


@functools.lru_cache(maxsize=512)
def readings(text: str) -> tuple[Reading, ...]:
    """What an answer can mean, the likeliest first; empty if it cannot be read."""
    if len(text) > MAX_ANSWER:
        return ()
    text = clean(text)
    words = EVERY.sub("", words_of(text)).replace("real number", "real")
    text = PHRASES.get(words.replace("non-", "non"), text)
    commas = re.search(r"\d,\d{3}", text)
    letters = re.search(r"(?<![a-zA-Z\\])[a-zA-Z]{2,4}(?![a-zA-Z])", text)
    found = []
    for thousands in (True, False) if commas else (True,):
        for split in (False, True) if letters else (False,):
            with contextlib.suppress(*FAILURES):  # where the text makes no sense in this way
                found.append(read(Tokenizer(text, thousands, split).run(), split))
    return tuple(found)


def read(tokens: list[Token], split: bool) -> Reading:
    r"""The reading of tokens, in which \pm stands for two values. Raises one of FAILURES."""
    parser = Parser(tokens)
    try:
        value = parser.answer()
    except FAILURES:
        sides = [n for n, token in enumerate(tokens) if token == ("rel", "=", token.spaced)]
        if len(sides) != 1 or not sides[0] or tokens[0].kind == "num":
            raise
        parser = Parser(tokens[sides[0] + 1 :])  # what a name stands for that cannot be read
        name = tuple(token.value for token in tokens[: sides[0]])
        value = Value("rel", ("=",), (Value("words", name, ()), parser.answer()))
    if any(token.kind == "cmd" and token.value in ("pm", "mp") for token in tokens):
        other = Parser(tokens, -1)
        both = (value, other.answer())
        lists = [x.items if isinstance(x, Value) and x.kind in ("list", "set") else (x,) for x in both]
        items = unique(lists[0] + lists[1])
        value = Value("list", (",",) * (len(items) - 1), items)
    return Reading(value, tuple(sorted(set(parser.units))), tuple(parser.words), split)
