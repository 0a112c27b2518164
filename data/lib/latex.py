"""Reads the LaTeX of an answer: text -> tokens -> sympy objects, by calling their constructors. No string reaches sympy."""

import re
import unicodedata
from typing import NamedTuple

import sympy
from sympy import E, I, Integer, Rational, Symbol, oo, pi

from data.lib.mathvalues import (
    EMPTY,
    MAX_ANSWER,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_TOKENS,
    Unreadable,
    Value,
    add,
    choose,
    complement,
    divide,
    factorial,
    joined,
    multiply,
    number,
    power,
    region_of,
    scalar,
    worked_out,
)

# ------------------------------------------------------------------------------------------------ tokens of an answer

UNITS = {}  # name as written -> (name, power)
for _line in (
    "meter meters metre metres m", "centimeter centimeters centimetre centimetres cm cms", "millimeter millimeters mm", "kilometer kilometers kilometre kilometres km kms",
    "inch inches in", "foot feet ft", "yard yards yd yds", "mile miles mi", "second seconds sec secs s", "minute minutes min mins", "hour hours hr hrs h",
    "day days", "week weeks", "month months", "year years yr yrs", "gram grams g", "kilogram kilograms kg kgs", "milligram milligrams mg", "pound pounds lb lbs",
    "ounce ounces oz", "ton tons", "liter liters litre litres L", "milliliter milliliters ml mL", "gallon gallons gal", "quart quarts", "pint pints", "cup cups",
    "dollar dollars usd USD", "cent cents", "euro euros", "degree degrees deg", "radian radians rad", "percent percentage", "unit units", "mph", "kph",
    "am AM a.m. a.m", "pm PM p.m. p.m", "newton newtons N", "joule joules J", "watt watts W", "volt volts V", "hertz Hz", "Celsius", "Fahrenheit",
):  # fmt: skip
    for _name in _line.split():
        UNITS[_name] = _line.split()[0].lower()
TEXT_ONLY = {"m", "in", "s", "h", "g", "L", "N", "J", "W", "V", "am", "min", "rad", "deg", "sec"}  # units only inside \text{...} or behind a number

FUNCTIONS = {name: getattr(sympy, name) for name in "sin cos tan cot sec csc sinh cosh tanh coth sech csch".split()}
FUNCTIONS |= {"arc" + name: getattr(sympy, "a" + name) for name in "sin cos tan cot sec csc".split()}
FUNCTIONS |= {"arsinh": sympy.asinh, "arcosh": sympy.acosh, "artanh": sympy.atanh, "exp": sympy.exp, "abs": sympy.Abs} | dict.fromkeys(("ln", "log", "lg"), sympy.log)
INVERSE = {name: getattr(sympy, "a" + name) for name in "sin cos tan cot sec csc sinh cosh tanh".split()}
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega "
            "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split())  # fmt: skip
FILLERS = set("th st nd rd about approximately exactly the an only roughly".split())
TWO_LETTERS = set("no so he we it if of by at on do be my us up go or an as".split())
RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=",
             "neq": "!=", "in": "in", "approx": "~", "equiv": "=", "iff": "=", "to": "=", "rightarrow": "=", "Rightarrow": "=", "sim": "=", "cong": "=", ":": ":", "colon": ":"}  # fmt: skip
KNOWN = set(UNITS) | set(FUNCTIONS) | set("pi infty infinity inf sqrt floor ceil max min gcd lcm and or".split())
IGNORED = set("left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits therefore implies noindent quad qquad hspace vspace thinspace , ! ; : middle".split()) | {" "}
TEXT = set("text|textbf|textrm|textit|texttt|textsf|textnormal|mbox|hbox|mathrm|operatorname|rm|emph|mathsf|mathit|mathbf|boldsymbol|bf|bm|mathcal|underline".split("|"))
UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "±": "\\pm ", "∓": "\\mp ", "°": "^\\circ ", "∅": "\\emptyset ", "ø": "\\emptyset ",
    "ℝ": "\\mathbb{R}", "≈": "\\approx ", "∖": "\\setminus ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ", "ω": "\\omega ",
    "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅖": "\\frac{2}{5}", "⅗": "\\frac{3}{5}",
    "⅘": "\\frac{4}{5}", "⅙": "\\frac{1}{6}", "⅚": "\\frac{5}{6}", "⅛": "\\frac{1}{8}", "⅜": "\\frac{3}{8}", "⅝": "\\frac{5}{8}", "⅞": "\\frac{7}{8}",
    "€": "\\text{ euros}", "£": "", "¢": "\\text{ cents}", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u2009": " ", "\u202f": " ", "⟨": "\\langle ", "⟩": "\\rangle ", "∣": "|",
    "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "∠": "", "△": "",
}  # fmt: skip
UNICODE |= {sup: "^{%s}" % plain for sup, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ", "0123456789n")} | {sub: "_{%s}" % plain for sub, plain in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789")}
UNICODE = str.maketrans(UNICODE)
WORD_NUMBERS = {w: n for n, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split())}

TOKEN = re.compile(r"""
      (?P<space>\s+|~)
    | (?P<num>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.\d+|\d+\.(?!\d)|\.\d+|\d+)
    | \\(?P<cmd>[a-zA-Z]+\*?)
    | \\(?P<esc>.)
    | (?P<word>[A-Za-z]+(?:\.[a-z]\.?(?![a-zA-Z]))?)
    | (?P<op>.)""", re.VERBOSE | re.DOTALL | re.ASCII)  # fmt: skip
TOKEN_PLAIN = re.compile(TOKEN.pattern.replace(r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|", ""), TOKEN.flags)
REPEATING = re.compile(r"(\d{0,50})\.(\d{0,50})\\(?:overline|bar|dot)\s*(?:\{(\d{1,50})\}|(\d))", re.ASCII)
MODULO = re.compile(r"\(?\s{0,9}(?:\\(?:text|mathrm|operatorname)\{\s*mod\s*\}|\\[bp]?mod|\bmod)[\s{]{0,9}(\d{1,9})\s{0,9}\}?\s{0,9}\)?")
SET_BUILDER = re.compile(r"\\(?:\{|lbrace)\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?|\\in\s*\\R)?\s*(?:\||:|\\mid|\\vert)(.*)\\(?:\}|rbrace)", re.DOTALL)


SPELLINGS = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\\(?:begin|end)\s*\{(?:aligned|align|split|gathered|equation)\*?\}", ""), (r"&\s*=", "="), (r"\\\\\s*$", ""), (r"\\[dtc]frac", r"\\frac"), (r"\\(?:text)?color\s*\{[^{}]*\}", ""), (r"\^\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)\b\s*\}{0,2}", ""),
    (r"\b(sq|cu|in|ft|hr|min|sec|oz|lb)\.(?=\s|$)", r"\1"), (r"(?:\\[,;:! ]|\s)+$", ""),
    (r"(?<=\d)\s*(?:\\text\s*\{)?\s*thousand\b\s*\}?", r"\\cdot 10^{3}"), (r"(?<=\d)\s*(?:\\text\s*\{)?\s*million\b\s*\}?", r"\\cdot 10^{6}"),
    (r"(?<=\d)\s*(?:\\text\s*\{)?\s*billion\b\s*\}?", r"\\cdot 10^{9}"),
)]  # fmt: skip


def fraction_of(m: re.Match) -> str:
    """0.1\\overline{6} as \\frac{15}{90}: a repeating decimal is a fraction."""
    whole, once, again = m[1] or "0", m[2], m[3] or m[4]
    return r"{\frac{%d}{%d}}" % (int(whole + once + again) - int(whole + once), 10 ** len(once) * (10 ** len(again) - 1))


def clean(text: str) -> str:
    """One way of writing what LaTeX and people write in several."""
    text = unicodedata.normalize("NFKC", text.translate(UNICODE)).translate(UNICODE)
    text = text.replace("\\$", "\\dollar ").replace("$", " ").replace("**", " ").replace("{:}", ":")
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    text = re.sub(r"(?<=\d)\s*(?:,\s?\\!|\{,\}\\!|\{,\}|\\,|,\\,|\\ |,\\;)\s*(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<![\d.,/}])\d{1,3}(?: \d{3})+(?![\d,./]| ?/)", lambda m: m[0].replace(" ", ""), text)
    text = re.sub(r"(\d)[eE]([+-]?\d{1,6})(?![\d.a-zA-Z])", r"\1\\cdot 10^{\2}", text)
    text = REPEATING.sub(fraction_of, text)
    text = MODULO.sub(r"\\pmod{\1}", text)
    builder = SET_BUILDER.search(text)
    return builder[1] + " \\in " + builder[2] if builder and "\\in" in builder[2] else builder[2] if builder else text.strip().rstrip(".,;:")


class Token(NamedTuple):
    kind: str  # num name func unit word sep rel op cmd
    value: str
    spaced: bool = False


def braces(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and its partner; None without one."""
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + MAX_ANSWER):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return text[start + 1 : m.start()]
    return None


def word_tokens(run: str, before: str, spaced: bool, around: tuple[str, str], split: bool, in_text: bool) -> list[tuple[str, str]]:
    """What a run of letters is, as (kind, value): a word of the language, a unit, a function, a variable or several. before: the kind of the token
    before it; around: the character before the run, and the text behind it."""
    low, (left, right) = run.lower(), around
    if low in ("and", "or"):
        return [("sep", low)]
    if low in ("is", "equals", "equal"):
        return [("rel", "=")]
    if low == "to":
        return [("rel", ":")]
    if low == "in" and before == "name":
        return [("rel", "in")]
    if low == "per" or (low in ("a", "an") and before == "unit"):
        return [("op", "/")]
    if low in ("square", "sq", "cubic"):
        return [("power", "3" if low == "cubic" else "2")]
    if low in FILLERS or run == "a" and in_text:
        return []
    if (run in UNITS or low in UNITS and len(run) > 3) and not (split and not in_text and len(run) < 4 and before != "num"):
        lone = before in ("num", "unit") and spaced and not re.match(r"\s*[\w^]", right)
        if in_text or (len(run) > 1 and run not in TEXT_ONLY) or lone:
            return [("unit", UNITS.get(run) or UNITS[low])]
        return [("name", run) if len(run) == 1 else ("word", low)]
    if run in FUNCTIONS or low in ("ln", "log", "sqrt"):
        return [("func", run if run in FUNCTIONS else low)]
    if low in ("pi", "infinity", "infty", "theta", "alpha", "beta", "emptyset"):
        return [("cmd", "infty" if low == "infinity" else low)]
    if len(run) == 1:
        return [("name", run)]
    apart = not left.strip() and (not right or right[0] in ".,;" or right[0].isspace())
    if in_text or (low in TWO_LETTERS and apart) or len(run) > 4 or (len(run) > 2 and not split):
        return [("word", low)]
    return [("name", letter) for letter in run]


def command_token(name: str) -> list[tuple[str, str]]:
    if name == "dollar":
        return [("unit", "dollar")]
    if name in RELATIONS:
        return [("rel", RELATIONS[name])]
    if name in FUNCTIONS or name == "sqrt":
        return [("func", name)]
    return [] if name in IGNORED or name in TEXT else [("cmd", name)]


def sign_token(sign: str, escaped: bool) -> list[tuple[str, str]]:
    """A single character, or one behind a backslash."""
    if sign == "%":
        return [("unit", "percent")]
    if escaped:
        return [("op", {"{": "\\{", "}": "\\}", "\\": "\\\\"}.get(sign, sign))] if sign in "{}|\\&" else []
    if sign in RELATIONS:
        return [("rel", RELATIONS[sign])]
    return [("sep", sign)] if sign in ",;" else [] if sign in "\"`?" else [("op", sign)]


def tokens_of(text: str, thousands: bool = True, split: bool = False, in_text: bool = False, depth: int = 0) -> list[Token]:
    """Cut a cleaned text into tokens. thousands: 1,234 is a number, not two; split: a run of letters is a product, not a word."""
    if depth > 8 or len(text) > MAX_ANSWER:
        raise Unreadable("too long")
    out, position, spaced = [], 0, False
    while position < len(text):
        m = (TOKEN if thousands else TOKEN_PLAIN).match(text, position)
        start, position, kind, value = position, m.end(), m.lastgroup, m[m.lastgroup]
        brace = re.compile(r"\s*\{").match(text, position) if kind == "cmd" and value in TEXT else None
        inside = braces(text, brace.end() - 1) if brace else None
        if kind == "space":
            spaced = True
            continue
        if inside is not None:  # \text{...}
            inner = tokens_of(inside, thousands, split, True, depth + 1)
            out += [t._replace(spaced=True) for t in inner[:1]] + inner[1:]
            position, spaced = brace.end() + len(inside) + 1, True
            continue
        if kind == "num":
            new = [("num", value.replace(",", ""))]
        elif kind == "word":
            new = word_tokens(value, out[-1].kind if out else "", spaced, (text[max(0, start - 1) : start], text[position : position + 40]), split, in_text)
        else:
            new = command_token(value) if kind == "cmd" else sign_token(value, kind == "esc")
        out += [Token(k, v, spaced) for k, v in new]
        spaced = False
        if len(out) > MAX_TOKENS:
            raise Unreadable("too many tokens")
    return out


class Parser:
    """Recursive descent over tokens. sign: what \\pm stands for in this reading. units and words: those behind the numbers, as they are met."""

    def __init__(self, tokens: list[Token], sign: int = 1):
        self.tokens, self.at, self.sign, self.depth, self.bars, self.units, self.words = tokens, 0, sign, 0, 0, [], []

    def next(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else Token("end", "")

    def found(self, kind: str, *values: str) -> bool:
        """Whether the next token is of that kind (and has one of the values)."""
        return self.next().kind == kind and (not values or self.next().value in values)

    def accept(self, kind: str, *values: str) -> str:
        """Take the next token if it is found; its value, else ""."""
        return self.take() if self.found(kind, *values) else ""

    def take(self, *values: str) -> str:
        token = self.next()
        if token.kind == "end" or values and token.value not in values:
            raise Unreadable(f"expected {values}, found {token.value}")
        self.at += 1
        return token.value

    def deeper(self, parse, *args, bars: int = 0):
        """parse(*args) one level down; bars: how many | are open there."""
        if self.depth >= MAX_DEPTH:
            raise Unreadable("nested too deep")
        before, self.bars, self.depth = self.bars, bars, self.depth + 1
        value = parse(*args)
        self.bars, self.depth = before, self.depth - 1
        return value

    # ---- from lists down to products

    def answer(self):
        items, separators = self.items()
        if not self.found("end"):
            raise Unreadable(f"{self.next().value} is not expected here")
        return items[0] if len(items) == 1 else Value("list", tuple(separators), tuple(items))

    def items(self) -> tuple[list, list]:
        """Statements with commas, "and", "or" between them."""
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
        """Words, an expression, and what it is equal to, less than, in ..."""
        lead = self.spoken()
        if lead and (self.next().kind in ("end", "sep") or self.found("op", *CLOSING)):
            return Value("words", lead, ())
        exprs, signs = [self.union()], []
        while self.found("rel"):
            while self.found("rel"):  # "is = 5"
                sign = self.take()
            right = self.union()
            if sign != "~" or not exprs[:-1] and isinstance(exprs[-1], Symbol):  # \sqrt2 \approx 1.41: the exact one is the answer
                signs.append(sign.replace("~", "="))
                exprs.append(right)
        self.words += self.spoken()
        value = Value("rel", tuple(signs), tuple(exprs)) if signs else exprs[0]
        return Value("words", lead, (value,)) if lead else value

    def union(self):
        left = self.expression()
        while self.found("cmd", "cup", "cap", "setminus", "backslash", "bigcup") or isinstance(left, Value) and (self.found("op", "-") or self.found("name", "U")):
            sign = self.take()
            a, b = region_of(left), region_of(self.expression())
            left = joined(a, b) if sign in ("cup", "U", "bigcup") else complement(joined(complement(a), complement(b) if sign == "cap" else b))
        return left

    def expression(self):
        left = self.term()
        while not isinstance(left, Value) and (self.found("op", "+", "-") or self.found("cmd", "pm", "mp")):
            sign = self.signs()
            left = add(left, multiply(self.term(), sign))
        return left

    def signs(self) -> Integer:
        sign = 1
        while self.found("op", "+", "-") or self.found("cmd", "pm", "mp"):
            sign *= {"+": 1, "-": -1, "pm": self.sign, "mp": -self.sign}[self.take()]
        return Integer(sign)

    def signed_factor(self):
        sign = self.signs()
        return multiply(self.factor(), sign)

    def term(self):
        sign, left = self.signs(), self.factor()
        while True:
            token, unit_next = self.next(), self.next(1).kind in ("unit", "power")
            if self.accept("op", "*") or self.accept("cmd", "cdot", "times", "ast"):
                left = multiply(left, self.signed_factor())
            elif unit_next and self.accept("op", "/"):
                self.unit(-1)
            elif self.accept("op", "/") or self.accept("cmd", "div"):
                left = divide(left, self.signed_factor())
            elif token.kind in ("unit", "power"):
                self.unit()
                left = self.measure(left)
            elif self.unit_fraction():
                self.take()
                for side in (1, -1):
                    self.take("{"), self.unit(side), self.take("}")
            elif self.starts_factor() and not isinstance(left, Value):
                if token.kind == "num" and self.tokens[self.at - 1].kind == "num":
                    raise Unreadable("two numbers side by side")
                right = self.factor()
                left = Symbol(f"{left}{right}") if isinstance(left, Symbol) and isinstance(right, Value) else multiply(left, right)  # P(X = 2)
            else:
                return left if sign == 1 else multiply(left, sign)

    def starts_factor(self) -> bool:
        token = self.next()
        if token.kind == "name":
            return not (token.value == "U" and token.spaced and self.tokens[self.at - 1].value in ")]")
        if token.kind == "op":
            return token.value in ("(", "[", "{", "\\{") or (token.value == "|" and not self.bars)
        return token.kind in ("num", "func") or token.kind == "cmd" and token.value not in STOPS

    # ---- units

    def unit_fraction(self) -> bool:  # \frac{miles}{hour}
        return self.found("cmd", "frac") and self.next(1).value == "{" and self.next(2).kind in ("unit", "power")

    def unit(self, sign: int = 1) -> None:
        """A unit, with its power: it is noted, not multiplied."""
        exponent = int(self.accept("power") or 1)
        name = self.accept("unit")
        if name and self.accept("op", "^"):
            written = self.argument()
            exponent = int(written) if isinstance(written, Integer) and abs(written) < 10 else exponent
        if name not in ("", "unit"):
            self.units.append((name, sign * exponent))

    def measure(self, left):
        """3 hours (and) 20 minutes: a sum, in which the units stand as symbols."""
        ahead = int(self.found("sep", "and", ","))
        if not self.units or self.next(ahead).kind != "num" or self.next(ahead + 1).kind != "unit" or self.next(ahead + 1).value == self.units[-1][0]:
            if self.found("num"):
                raise Unreadable("a number behind a unit")
            return left
        self.at += ahead
        left = multiply(left, Symbol(self.units.pop()[0]))
        right = self.term()
        return add(left, multiply(right, Symbol(self.units.pop()[0])) if self.units else right)

    def degree(self) -> bool:
        """Take \\circ, {\\circ}, a prime, or an ordinal's ending (5^{th}), as what it is: not a power."""
        group = int(self.found("op", "{"))
        mark = self.next(group).value
        if mark not in ("circ", "prime", "degree") and not (group and mark == "}"):
            return False
        self.at += 1 + group if mark == "}" else 1 + 2 * group
        if mark in ("circ", "degree"):
            self.units.append(("degree", 1))
            self.accept("name", "C", "F")
        return True

    # ---- factors

    def factor(self):
        while self.next().kind in ("unit", "power"):  # a dollar sign in front
            self.unit()
        value = self.primary()
        while True:
            if self.accept("op", "^"):
                value = value if self.degree() else power(value, self.argument())
            elif self.accept("op", "!"):
                value = factorial(value, bool(self.accept("op", "!")))
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
        """What ^, \\frac and \\sqrt apply to: {...} or one token."""
        if self.found("op", "{"):
            return self.group()
        if self.accept("op", "-"):
            return multiply(self.deeper(self.argument), Integer(-1))
        value = self.primary()
        return power(value, self.deeper(self.argument)) if self.accept("op", "^") else value

    def digit(self):
        """An argument of \\frac: {...}, or one token, of a number one digit (\\frac12)."""
        token = self.next()
        if token.kind == "num" and len(token.value) > 1 and token.value.isdigit():
            self.tokens[self.at] = token._replace(value=token.value[1:], spaced=False)
            return Integer(int(token.value[0]))
        return scalar(self.argument())

    def group(self):
        self.take("{")
        value = self.deeper(self.union)
        if self.found("sep"):  # {2, 3}
            self.take()
            rest, _ = self.deeper(self.items)
            self.take("}")
            return Value("set", "", (value, *rest))
        if self.found("cmd", "choose", "over"):
            value = (choose if self.take() == "choose" else divide)(value, self.deeper(self.union))
        self.words += self.spoken()
        self.take("}")
        return value

    def primary(self):
        token = self.next()
        if token.value == "{":
            return self.group()
        self.take()
        if token.kind == "num":
            return self.numeral(token.value)
        if token.kind == "name":
            return self.symbol(token.value)
        if token.kind == "func":
            return self.deeper(self.function, token.value, bars=self.bars)
        if token.value in ("(", "["):
            return self.deeper(self.sequence, token.value)
        if token.value in ("\\{", "lbrace"):
            return self.deeper(self.set)
        if token.value == "|" or token.value in PAIRS:
            return self.between(*PAIRS.get(token.value, ("|", sympy.Abs)))
        if token.kind == "cmd":
            return self.command(token.value)
        raise Unreadable(f"{token.value} is not expected here")

    def numeral(self, digits: str):
        """A number; with a base (1011_2, 1A_{16}), a symbol of that name; a mixed number with the fraction behind it."""
        ahead = 0
        while self.next(ahead).kind in ("name", "num") and not self.next(ahead).spaced and re.fullmatch(r"[A-F]|\d+", self.next(ahead).value):
            ahead += 1
        if self.next(ahead).value == "_" and "." not in digits:
            return self.in_base(digits + "".join(self.take() for _ in range(ahead)))
        value, at, tokens, part = number(digits), self.at, list(self.tokens), 0
        if self.found("cmd", "frac") and not self.unit_fraction() and "." not in digits:
            self.take()
            part = self.command("frac")
            plain = all(t.kind == "num" or t.value in "{}" for t in tokens[at + 1 : self.at])
            power_next = self.found("op", "^") and "circ" not in (self.next(1).value, self.next(2).value)
            part = part if plain and not power_next and isinstance(part, Rational) else 0
        elif self.found("num") and self.next(1).value == "/" and self.next(2).kind == "num":
            part = divide(number(self.next().value), number(self.next(2).value))
            self.at += 3
        if 0 < part < 1:
            return value + part
        self.at, self.tokens = at, tokens
        return value

    def in_base(self, digits: str):
        self.take("_")
        group = int(self.found("op", "{"))
        base = WORD_NUMBERS.get(self.next(group).value)
        if base is None:
            base = self.argument()
        else:
            self.at += 1 + 2 * group
        return number(digits) if base == 10 else Symbol(f"{digits.lstrip('0') or '0'}_{base}")

    def symbol(self, name: str):
        if not self.accept("op", "_"):
            return {"e": E, "i": I}.get(name) or Symbol(name)
        if self.found("op", "{") and self.next(1).kind == "word":  # v_{max}
            self.take()
            label = " ".join(self.spoken())
            self.take("}")
            return Symbol(f"{name}_{label}")
        return Symbol(f"{name}_{self.argument()}")

    def between(self, closing: str, function):
        value = scalar(self.deeper(self.expression, bars=int(closing == "|")))
        self.take(closing)
        if isinstance(value, sympy.MatrixBase):
            raise Unreadable("the size of a matrix")
        return abs(value) if value.is_Rational and function is sympy.Abs else worked_out(function(value, evaluate=False))

    def sequence(self, opening: str):
        items, _ = self.items()
        closing = self.take(")", "]")
        if len(items) > 1:
            return Value("seq", opening + closing, tuple(items))
        if opening + closing not in ("()", "[]"):
            raise Unreadable("brackets do not match")
        return items[0]

    def set(self):
        if self.accept("op", "\\}"):
            return EMPTY
        items, _ = self.items()
        self.take("\\}", "rbrace")
        return Value("set", "", tuple(items))

    def command(self, name: str):
        if name in ("frac", "binom", "dbinom", "tbinom"):
            top = self.digit()
            return (divide if name == "frac" else choose)(top, self.digit())
        if name in ("pi", "infty"):
            return pi if name == "pi" else oo
        if name in ("emptyset", "varnothing"):
            return EMPTY
        if name in ("mathbb", "R", "Bbb"):
            letter = name if name == "R" else (self.take("{"), self.take(), self.take("}"))[1] if self.found("op", "{") else self.take()
            return Value("region", "", ((-oo, False, oo, False),)) if letter == "R" else Value("words", (letter,), ())
        if name == "langle":
            items, _ = self.deeper(self.items)
            self.take("rangle")
            return Value("seq", "<>", tuple(items))
        if name == "begin":
            return self.deeper(self.matrix)
        if name in ("angle", "triangle", "measuredangle"):
            return self.deeper(self.primary)
        if name in ("overline", "bar", "vec", "hat", "widehat", "tilde", "overrightarrow", "dot"):
            start, value = self.at, self.argument()
            if isinstance(value, sympy.Mul) and all(x.is_Symbol for x in value.args):
                return value  # \overline{AB}: a segment's name
            return Symbol(name + "".join(t.value for t in self.tokens[start : self.at] if t.value not in "{}"))
        if name in GREEK:
            return self.symbol(name)
        raise Unreadable(f"\\{name}")

    def matrix(self):
        name = self.environment()
        if name == "array" and self.accept("op", "{"):
            while self.take() != "}":
                pass
        rows = [[]]
        while not self.found("cmd", "end"):
            rows[-1].append(scalar(self.expression()))
            if self.accept("op", "\\\\"):
                rows.append([])
            elif not self.found("cmd", "end"):
                self.take("&")
        rows = rows if rows[-1] else rows[:-1]
        cells = [x for row in rows for x in row]
        self.take("end")
        if self.environment() != name or len({len(row) for row in rows}) != 1 or len(cells) > MAX_ITEMS or any(isinstance(x, sympy.MatrixBase) for x in cells):
            raise Unreadable("not a matrix")
        return sympy.ImmutableDenseMatrix(rows)

    def environment(self) -> str:
        self.take("{")
        name = ""
        while not self.accept("op", "}"):
            name += self.take()
        if name.rstrip("*") not in ("pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "Vmatrix", "smallmatrix", "array"):
            raise Unreadable(name)
        return name

    def function(self, name: str):
        """\\sqrt, \\log, \\sin ...: index or base, a power, then the argument: (...), {...} or the product that follows."""
        if name == "sqrt":
            index = Integer(2)
            if self.accept("op", "["):
                index = self.expression()
                self.take("]")
            return power(self.argument(), divide(Integer(1), index))
        base = self.digit() if self.accept("op", "_") else Integer(10)
        exponent = self.argument() if self.accept("op", "^") else Integer(1)
        n_units = len(self.units)
        argument = self.applied()
        if ("degree", 1) in self.units[n_units:]:
            argument = multiply(argument, pi / 180)
            del self.units[n_units:]
        if isinstance(scalar(argument), sympy.MatrixBase):
            raise Unreadable("function of a matrix")
        if name == "exp":
            return power(power(E, argument), exponent)
        if exponent == -1 and name in INVERSE:
            return worked_out(INVERSE[name](argument, evaluate=False))
        value = worked_out(FUNCTIONS[name](argument, evaluate=False))
        if name in ("log", "lg"):
            value = divide(value, worked_out(sympy.log(base, evaluate=False)))
        return value if exponent == 1 else power(value, exponent)

    def applied(self):
        if self.found("op", "(", "{", "|", "["):
            return self.primary()
        sign, value = self.signs(), self.factor()
        while (self.starts_factor() and not self.found("func") and not self.found("op", "(", "[")) or self.found("unit", "degree"):
            value = value if self.found("unit") and not self.unit() else multiply(value, self.factor())
        if self.next(1).kind in ("num", "name") and self.accept("op", "/"):  # sin pi/6
            value = divide(value, self.factor())
        return multiply(value, sign)


CLOSING = (")", "]", "}", "\\}")
PAIRS = {"lfloor": ("rfloor", sympy.floor), "lceil": ("rceil", sympy.ceiling), "lvert": ("rvert", sympy.Abs), "vert": ("vert", sympy.Abs)}
STOPS = set("cup cap setminus backslash bigcup pm mp cdot times ast div rfloor rceil rvert vert rangle rbrace end circ choose over pmod bmod dots ldots cdots".split())
