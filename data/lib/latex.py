"""Reads the LaTeX of an answer: readings(text) gives every value that it can mean.

A value is a sympy expression, a sympy matrix, or a Value. The parser goes down
from lists to single tokens by recursive descent, and builds values by calling
constructors only.
"""

import functools
import re
from typing import NamedTuple

import sympy
from sympy import E, I, Integer, Rational, Symbol, oo, pi

from data.lib import mathvalues as bounded
from data.lib.equality import unique
from data.lib.latex_tokens import FUNCTIONS, INVERSE, Token, clean, tokens_of, words_of
from data.lib.mathvalues import EMPTY, FAILURES, MAX_ANSWER, MAX_DEPTH, MAX_ITEMS, REALS, Unreadable, Value

GREEK = set(
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    rho sigma tau upsilon phi varphi chi psi omega
    Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar""".split()
)
ACCENTS = set("overline bar vec hat widehat tilde overrightarrow dot".split())
MATRICES = set("pmatrix bmatrix matrix vmatrix Bmatrix Vmatrix smallmatrix array".split())
CLOSING = (")", "]", "}", "\\}")
PAIRS = {  # opening -> closing, function
    "|": ("|", sympy.Abs),
    "lvert": ("rvert", sympy.Abs),
    "vert": ("vert", sympy.Abs),
    "lfloor": ("rfloor", sympy.floor),
    "lceil": ("rceil", sympy.ceiling),
}
# Commands that do not begin a factor.
STOPS = set(
    """cup cap setminus backslash bigcup pm mp cdot times ast div rfloor rceil rvert vert rangle
    rbrace end circ choose over pmod bmod dots ldots cdots""".split()
)
END = Token("end", "")


class Parser:
    """Recursive descent over tokens; answer() gives the value of them all.

    Args:
        tokens: what tokens_of() gives
        sign: 1 or -1, what \\pm stands for in this reading

    units is the list of (name, power) behind numbers, words that of the words
    behind values; both grow as they are met. Every method raises Unreadable
    where the tokens are not an answer.
    """

    def __init__(self, tokens: list[Token], sign: int = 1):
        self.tokens = list(tokens)
        self.sign = sign
        self.at = 0
        self.depth = 0
        self.bars = 0  # how many | are open
        self.units = []
        self.words = []

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
        before = self.bars
        self.bars = bars
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
        items = [self.statement()]
        separators = []
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
        if lead and self.accept("rel", "="):  # Area = 7
            return Value("rel", ("=",), (Value("words", lead, ()), self.union()))
        self.accept("rel", "~")
        value = self.relation()
        self.words += self.spoken()
        return Value("words", lead, (value,)) if lead else value

    def relation(self):
        sides = [self.union()]
        signs = []
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
        return Value("rel", tuple(signs), tuple(sides)) if signs else sides[0]

    def union(self):
        """Sets joined by union, intersection and difference, or a sum."""
        left = self.expression()
        while self.set_sign(left):
            sign = self.take()
            a = bounded.region_of(left)
            b = bounded.region_of(self.expression())
            if sign in ("cup", "U", "bigcup"):
                left = bounded.joined(a, b)
            else:
                left = bounded.common(a, b if sign == "cap" else bounded.complement(b))
        return left

    def set_sign(self, left) -> bool:
        if self.found("cmd", "cup", "cap", "setminus", "backslash", "bigcup"):
            return True
        return isinstance(left, Value) and (self.found("op", "-") or self.found("name", "U"))

    def signed(self) -> bool:
        return self.found("op", "+", "-") or self.found("cmd", "pm", "mp")

    def signs(self) -> Integer:
        """Take any number of signs. Returns 1 or -1."""
        values = {"+": 1, "-": -1, "pm": self.sign, "mp": -self.sign}
        sign = 1
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
                left = bounded.multiply(left, self.signed_factor())
            elif unit_next and self.accept("op", "/"):
                self.unit(-1)
            elif self.accept("op", "/") or self.accept("cmd", "div"):
                left = bounded.divide(left, self.signed_factor())
            elif self.next().kind in ("unit", "power"):
                self.unit()
                left = self.measure(left)
            elif self.unit_fraction():
                self.take()
                self.unit_in_braces(1)
                self.unit_in_braces(-1)
            elif self.starts_factor() and not isinstance(left, Value):
                left = self.side_by_side(left)
            else:
                return left if sign == 1 else bounded.multiply(left, sign)

    def signed_factor(self):
        sign = self.signs()
        return bounded.multiply(self.factor(), sign)

    def side_by_side(self, left):
        """A product without a sign."""
        if self.next().kind == "num" and self.tokens[self.at - 1].kind == "num":
            raise Unreadable("two numbers side by side")
        right = self.factor()
        if isinstance(left, Symbol) and isinstance(right, Value):  # P(X = 2)
            return Symbol(f"{left}{right}")
        return bounded.multiply(left, right)

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
        if not self.found("cmd", "frac") or self.next(1).value != "{":
            return False
        return self.next(2).kind in ("unit", "power")

    def unit_in_braces(self, sign: int) -> None:
        self.take("{")
        self.unit(sign)
        self.take("}")

    def unit(self, sign: int = 1) -> None:
        """Take a unit with its power. It is noted, not multiplied."""
        exponent = int(self.accept("power") or 1)
        name = self.accept("unit")
        if name and self.accept("op", "^"):
            written = self.argument()
            if isinstance(written, Integer) and abs(written) < 10:
                exponent = int(written)
        if name not in ("", "unit"):
            self.units.append((name, sign * exponent))

    def measure(self, left):
        """The value before a unit; of 3 hours (and) 20 minutes the sum, with the units as symbols."""
        ahead = int(self.found("sep", "and", ","))
        following = self.next(ahead + 1)
        goes_on = self.next(ahead).kind == "num" and following.kind == "unit"
        if not self.units or not goes_on or following.value == self.units[-1][0]:
            if self.found("num"):
                raise Unreadable("a number behind a unit")
            return left
        self.at += ahead
        left = bounded.multiply(left, Symbol(self.units.pop()[0]))
        right = self.term()
        if self.units:
            right = bounded.multiply(right, Symbol(self.units.pop()[0]))
        return bounded.add(left, right)

    def degree(self) -> bool:
        r"""Take \circ, {\circ}, a prime or {} (all that is left of 5^{th}) if one is next: no powers."""
        group = int(self.found("op", "{"))
        mark = self.next(group).value
        if group and mark == "}":
            self.at += 2
            return True
        if mark not in ("circ", "prime", "degree"):
            return False
        self.at += 1 + 2 * group
        if mark != "prime":
            self.units.append(("degree", 1))
            self.accept("name", "C", "F")
        return True

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
            elif isinstance(value, Integer) and self.found("op", "_"):  # (1011)_2
                value = self.in_base(str(value))
            elif self.accept("op", "'"):
                value = Symbol(f"{value}'") if isinstance(value, Symbol) else value
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
        """A number. With a base (1011_2, 1A_{16}) it is a symbol of that name."""
        ahead = 0
        while self.more_digits(self.next(ahead)):
            ahead += 1
        if self.next(ahead).value == "_" and "." not in digits:
            return self.in_base(digits + "".join(self.take() for _ in range(ahead)))
        return bounded.number(digits) + self.mixed(digits)

    def more_digits(self, token: Token) -> bool:
        if token.kind not in ("name", "num") or token.spaced:
            return False
        return re.fullmatch(r"[A-F]|\d+", token.value) is not None

    def mixed(self, digits: str):
        """Take the fraction of a mixed number behind its digits. Returns 0 if there is none."""
        at = self.at
        tokens = list(self.tokens)  # digit() shortens tokens
        part = 0
        if self.found("cmd", "frac") and not self.unit_fraction() and "." not in digits:
            self.take()
            part = self.command("frac")
            plain = all(t.kind == "num" or t.value in "{}" for t in tokens[at + 1 : self.at])
            degrees = "circ" in (self.next(1).value, self.next(2).value)
            if not plain or not isinstance(part, Rational) or (self.found("op", "^") and not degrees):
                part = 0
        elif self.found("num") and self.next(1).value == "/" and self.next(2).kind == "num":
            part = bounded.divide(bounded.number(self.next().value), bounded.number(self.next(2).value))
            self.at += 3
        if 0 < part < 1:
            return part
        self.at = at
        self.tokens = tokens
        return 0

    def in_base(self, digits: str):
        self.take("_")
        base = self.argument()
        return bounded.number(digits) if base == 10 else Symbol(f"{digits.lstrip('0') or '0'}_{base}")

    def symbol(self, name: str):
        """A variable with its subscript, or one of the constants e and i."""
        if not self.accept("op", "_"):
            return {"e": E, "i": I}.get(name) or Symbol(name)
        if self.found("op", "{") and self.next(1).kind == "word":  # v_{max}
            self.take()
            subscript = " ".join(self.spoken())
            self.take("}")
            return Symbol(f"{name}_{subscript}")
        return Symbol(f"{name}_{self.argument()}")

    def between(self, closing: str, function):
        value = bounded.scalar(self.deeper(self.expression, bars=int(closing == "|")))
        self.take(closing)
        if bounded.is_matrix(value):
            raise Unreadable("the size of a matrix")
        if value.is_Rational and function is sympy.Abs:
            return abs(value)
        return bounded.worked_out(function(value, evaluate=False))

    def sequence(self, opening: str):
        """A tuple, an interval, or an expression in brackets."""
        items, _ = self.items()
        brackets = opening + self.take(")", "]")
        if len(items) > 1:
            return Value("seq", brackets, tuple(items))
        if brackets not in ("()", "[]"):
            raise Unreadable("brackets do not match")
        return items[0]

    def set(self):
        if self.accept("op", "\\}"):
            return EMPTY
        items, _ = self.items()
        self.take("\\}", "rbrace")
        return Value("set", "", tuple(items))

    def command(self, name: str):
        constants = {"pi": pi, "infty": oo, "emptyset": EMPTY, "varnothing": EMPTY}
        if name in constants:
            return constants[name]
        if name == "frac":
            return bounded.divide(self.digit(), self.digit())
        if name in ("binom", "dbinom", "tbinom"):
            return bounded.choose(self.digit(), self.digit())
        if name in ("mathbb", "R", "Bbb"):
            return self.number_set(name)
        if name == "langle":
            items, _ = self.deeper(self.items)
            self.take("rangle")
            return Value("seq", "<>", tuple(items))
        if name in ("begin", "angle", "triangle", "measuredangle"):
            return self.deeper(self.matrix if name == "begin" else self.primary)
        if name in ACCENTS:
            return self.accented(name)
        if name in GREEK:
            return self.symbol(name)
        raise Unreadable(f"\\{name}")

    def number_set(self, name: str):
        r"""\mathbb{R} as a region, any other such letter as a word."""
        if name == "R":
            return REALS
        group = self.accept("op", "{")
        letter = self.take()
        if group:
            self.take("}")
        return REALS if letter == "R" else Value("words", (letter,), ())

    def accented(self, name: str):
        start = self.at
        value = self.argument()
        if isinstance(value, sympy.Mul) and all(x.is_Symbol for x in value.args):
            return value  # \overline{AB}: a segment's name
        written = [token.value for token in self.tokens[start : self.at]]
        return Symbol(name + "".join(x for x in written if x not in "{}"))

    def matrix(self):
        name = self.environment()
        if name == "array" and self.accept("op", "{"):
            while self.take() != "}":  # the columns' alignment
                pass
        rows = [[]]
        while not self.found("cmd", "end"):
            rows[-1].append(bounded.scalar(self.expression()))
            if self.accept("op", "\\\\"):
                rows.append([])
            elif not self.found("cmd", "end"):
                self.take("&")
        if not rows[-1]:
            rows.pop()
        self.take("end")
        cells = [x for row in rows for x in row]
        if self.environment() != name or len({len(row) for row in rows}) != 1:
            raise Unreadable("not a matrix")
        if len(cells) > MAX_ITEMS or any(map(bounded.is_matrix, cells)):
            raise Unreadable("not a matrix of numbers, or a large one")
        return sympy.ImmutableDenseMatrix(rows)

    def environment(self) -> str:
        self.take("{")
        name = ""
        while not self.accept("op", "}"):
            name += self.take()
        if name.rstrip("*") not in MATRICES:
            raise Unreadable(name)
        return name

    def function(self, name: str):
        r"""\sqrt, \log, \sin ...: an index or a base, a power, then the argument."""
        if name == "sqrt":
            return self.root()
        base = self.digit() if self.accept("op", "_") else Integer(10)
        exponent = self.argument() if self.accept("op", "^") else Integer(1)
        argument = self.angle()
        if name == "exp":
            return bounded.power(bounded.power(E, argument), exponent)
        if exponent == -1 and name in INVERSE:
            return bounded.worked_out(INVERSE[name](argument, evaluate=False))
        value = bounded.worked_out(FUNCTIONS[name](argument, evaluate=False))
        if name in ("log", "lg"):
            value = bounded.divide(value, bounded.worked_out(sympy.log(base, evaluate=False)))
        return value if exponent == 1 else bounded.power(value, exponent)

    def root(self):
        index = Integer(2)
        if self.accept("op", "["):
            index = self.expression()
            self.take("]")
        return bounded.power(self.argument(), bounded.divide(Integer(1), index))

    def angle(self):
        """A function's argument; degrees become radians."""
        n_units = len(self.units)
        argument = self.function_argument()
        if ("degree", 1) in self.units[n_units:]:
            argument = bounded.multiply(argument, pi / 180)
            del self.units[n_units:]
        if bounded.is_matrix(bounded.scalar(argument)):
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


# ------------------------------------------------------------------ what an answer can mean

PHRASES = {
    "no solution|no solutions|no real solution|no real solutions|empty set|none": "\\emptyset",
    "dne|does not exist|undefined|not defined": "undefined",
    "all real numbers|all reals": "\\mathbb{R}",
    "infinitely many|infinitely many solutions": "infinitely many",
}
PHRASES = {phrase: meaning for phrases, meaning in PHRASES.items() for phrase in phrases.split("|")}


class Reading(NamedTuple):
    """One way to read an answer. split: runs of letters were taken as products."""

    value: object
    units: tuple
    words: tuple
    split: bool


@functools.lru_cache(maxsize=512)
def readings(text: str) -> tuple[Reading, ...]:
    """What an answer can mean, the likeliest first; empty if it cannot be read."""
    if len(text) > MAX_ANSWER:
        return ()
    text = clean(text)
    text = PHRASES.get(words_of(text), text)
    commas = re.search(r"\d,\d{3}", text)
    letters = re.search(r"(?<![a-zA-Z\\])[a-zA-Z]{2,4}(?![a-zA-Z])", text)
    found = []
    for thousands in (True, False) if commas else (True,):
        for split in (False, True) if letters else (False,):
            try:
                tokens = tokens_of(text, thousands, split)
                if tokens:
                    found.append(read(tokens, split))
            except FAILURES:
                continue  # the text makes no sense in this way
    return tuple(found)


def read(tokens: list[Token], split: bool) -> Reading:
    r"""The reading of tokens, in which \pm stands for two values. Raises one of FAILURES."""
    parser = Parser(tokens)
    value = parser.answer()
    if any(token.kind == "cmd" and token.value in ("pm", "mp") for token in tokens):
        other = Parser(tokens, -1)
        items = unique(items_of(value) + items_of(other.answer()))
        value = Value("list", (",",) * (len(items) - 1), items)
    return Reading(value, tuple(sorted(set(parser.units))), tuple(parser.words), split)


def items_of(value) -> tuple:
    """The members of a list or a set, or the value alone."""
    if isinstance(value, Value) and value.kind in ("list", "set"):
        return value.items
    return (value,)
