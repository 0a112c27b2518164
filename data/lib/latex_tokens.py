"""Cuts the LaTeX of an answer into tokens: clean(text), then tokens_of(text).

The tables say which words are units, functions, relations or fillers, and how
the many ways to write the same thing are brought to one.
"""

import re
import unicodedata
from typing import NamedTuple

import sympy

from data.lib.mathvalues import MAX_ANSWER, MAX_TOKENS, Unreadable

# ------------------------------------------------------------------ tables

UNIT_SPELLINGS = """
    meter meters metre metres m | centimeter centimeters centimetre centimetres cm cms
    millimeter millimeters mm | kilometer kilometers kilometre kilometres km kms
    inch inches in | foot feet ft | yard yards yd yds | mile miles mi
    second seconds sec secs s | minute minutes min mins | hour hours hr hrs h
    day days | week weeks | month months | year years yr yrs
    gram grams g | kilogram kilograms kg kgs | milligram milligrams mg
    pound pounds lb lbs | ounce ounces oz | ton tons
    liter liters litre litres L | milliliter milliliters ml mL
    gallon gallons gal | quart quarts | pint pints | cup cups
    dollar dollars usd USD | cent cents | euro euros
    degree degrees deg | radian radians rad | percent percentage
    unit units | mph | kph | am AM a.m. a.m | pm PM p.m. p.m
    newton newtons N | joule joules J | watt watts W | volt volts V | hertz Hz
    Celsius | Fahrenheit
"""
UNITS = {  # spelling -> name
    spelling: group.split()[0].lower()
    for group in re.split(r"[|\n]", UNIT_SPELLINGS.strip())
    for spelling in group.split()
}
# These mean a unit only inside \text{...} or behind a number.
AMBIGUOUS_UNITS = set("m in s h g L N J W V am min rad deg sec".split())

TRIGONOMETRIC = "sin cos tan cot sec csc".split()
HYPERBOLIC = "sinh cosh tanh coth sech csch".split()
FUNCTIONS = {name: getattr(sympy, name) for name in TRIGONOMETRIC + HYPERBOLIC + ["exp"]}
FUNCTIONS |= {"arc" + name: getattr(sympy, "a" + name) for name in TRIGONOMETRIC}
FUNCTIONS |= {"arsinh": sympy.asinh, "arcosh": sympy.acosh, "artanh": sympy.atanh, "abs": sympy.Abs}
FUNCTIONS |= dict.fromkeys(("ln", "log", "lg"), sympy.log)
INVERSE = {name: getattr(sympy, "a" + name) for name in TRIGONOMETRIC + HYPERBOLIC[:3]}

SIGNS = {
    "=": "= equiv iff to rightarrow Rightarrow sim cong",
    "<": "< lt",
    ">": "> gt",
    "<=": "le leq leqslant",
    ">=": "ge geq geqslant",
    "!=": "ne neq",
    "in": "in",
    ":": ": colon",
    "~": "approx",
}
RELATIONS = {name: sign for sign, names in SIGNS.items() for name in names.split()}

# Words that are tokens of another kind.
SPOKEN = {"and": ("sep", "and"), "or": ("sep", "or"), "to": ("rel", ":"), "per": ("op", "/")}
SPOKEN |= dict.fromkeys(("is", "are", "equals", "equal", "gives"), ("rel", "="))
SPOKEN |= {"union": ("cmd", "cup"), "square": ("power", "2"), "sq": ("power", "2"), "cubic": ("power", "3")}
FILLERS = set(
    """th st nd rd about around approximately exactly the an only roughly
    we find get obtain""".split()
)
SHORT_WORDS = set("no so he we it if of by at on do be my us up go or an as".split())
WORD_COMMANDS = set("pi infinity infty theta alpha beta emptyset".split())
KNOWN_WORDS = set(UNITS) | set(FUNCTIONS)
KNOWN_WORDS |= set("pi infty infinity inf sqrt floor ceil max min gcd lcm and or".split())

TEXT_COMMANDS = set(
    """text textbf textrm textit texttt textsf textnormal mbox hbox mathrm operatorname rm emph
    mathsf mathit mathbf boldsymbol bf bm mathcal underline""".split()
)
IGNORED_COMMANDS = set(
    """left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits
    therefore implies noindent quad qquad hspace vspace thinspace middle""".split()
)

# Characters, and the commands or the plain text that they stand for.
COMMANDS = """
    × times   · cdot   ⋅ cdot   ∙ cdot   ± pm   ∓ mp   √ sqrt   π pi   ∞ infty
    ≤ le   ≥ ge   ≠ ne   ≈ approx   ∈ in   ∪ cup   ∩ cap   ∖ setminus   ∅ emptyset   ø emptyset
    α alpha   β beta   γ gamma   θ theta   λ lambda   φ phi   ω omega
    ⟨ langle   ⟩ rangle   ⌊ lfloor   ⌋ rfloor   ⌈ lceil   ⌉ rceil
""".split()
PLAIN = {"−–—": "-", "÷∕⁄": "/", "\u00a0\u2009\u202f": " ", "“”": '"', "’": "'", "∣": "|", "£¥₹∠△": ""}
SYMBOLS = {sign: f"\\{name} " for sign, name in zip(COMMANDS[::2], COMMANDS[1::2])}
SYMBOLS |= {sign: plain for signs, plain in PLAIN.items() for sign in signs}
SYMBOLS |= {"ℝ": "\\mathbb{R}", "°": "^\\circ ", "€": "\\text{ euros}", "¢": "\\text{ cents}"}
FRACTIONS = "½12 ⅓13 ⅔23 ¼14 ¾34 ⅕15 ⅖25 ⅗35 ⅘45 ⅙16 ⅚56 ⅛18 ⅜38 ⅝58 ⅞78".split()
SYMBOLS |= {sign: r"\frac{%s}{%s}" % (top, bottom) for sign, top, bottom in FRACTIONS}
SYMBOLS |= {sign: "_{%s}" % plain for sign, plain in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789")}
SYMBOLS = str.maketrans(SYMBOLS)

# ------------------------------------------------------------------ one way of writing

SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:begin|end)\s*\{(?:aligned|align|split|gathered|equation)\*?\}", ""),
        (r"&\s*=", "="),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"(?<=\s)!=", r"\\ne "),
        (r"(?<!\^)\{\}|\{\}(?=\w)", ""),
        (r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times "),
        (r"\\\\\s*$", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
        (r"\^\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)\b\s*\}{0,2}", ""),
        (r"\b(sq|cu|in|ft|hr|min|sec|oz|lb)\.(?=\s|$)", r"\1"),
        (r"(?:\\[,;:! ]|\s)+$", ""),
        (r"(?<=\d)\s*(?:\\text\s*\{)?\s*thousand\b\s*\}?", r"\\cdot 10^{3}"),
        (r"(?<=\d)\s*(?:\\text\s*\{)?\s*million\b\s*\}?", r"\\cdot 10^{6}"),
        (r"(?<=\d)\s*(?:\\text\s*\{)?\s*billion\b\s*\}?", r"\\cdot 10^{9}"),
        (r"(?<=\d)\s*(?:,\s?\\!|\{,\}\\!|\{,\}|\\,|,\\,|\\ |,\\;)\s*(?=\d{3}(?!\d))", ","),
        (r"(?<![\d.,/}])\d{1,3}(?: \d{3})+(?![\d,./]| ?/)", lambda m: m[0].replace(" ", "")),
        (r"(\d)[eE]([+-]?\d{1,6})(?![\d.a-zA-Z])", r"\1\\cdot 10^{\2}"),
    )
]
# Numbers in words: twelve, forty-two, two thousand five hundred, three quarters.
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}
WORD_NUMBERS = {word: n for n, word in enumerate(ONES)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
PARTS = {"half": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fifth": 5, "fifths": 5}
BELOW_100 = rf"(?:(?:{'|'.join(TENS)})(?:[ -](?:{'|'.join(ONES[1:10])}))?|(?:{'|'.join(reversed(ONES))}))"
NUMBER_IN_WORDS = re.compile(
    rf"""(?<![a-zA-Z\\]) ( {BELOW_100} (?: [ -](?:{"|".join(SCALES)}) (?: (?:[ ]and)?[ -]{BELOW_100} )? )* )
    (?: [ -]({"|".join(sorted(PARTS, reverse=True))}) )? (?![a-zA-Z])""".replace("[ -]", "[\\ -]"),
    re.IGNORECASE | re.VERBOSE,
)
SUPERSCRIPT = re.compile("⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+")
POWER_OF_PYTHON = re.compile(r"(?<=[a-zA-Z)])\*\*(?=[\d(])")
REPEATING = re.compile(
    r"(\d{0,50}) \. (\d{0,50}) \\(?:overline|bar|dot) \s* (?: \{(\d{1,50})\} | (\d) )",
    re.ASCII | re.VERBOSE,
)
MODULO = re.compile(
    r"""\(? \s{0,9}
    (?: \\(?:text|mathrm|operatorname)\{\s*mod\s*\} | \\[bp]?mod | \bmod )
    [\s{]{0,9} (\d{1,9}) \s{0,9} \}? \s{0,9} \)?""",
    re.VERBOSE,
)
SET_BUILDER = re.compile(
    r"""\\(?:\{|lbrace) \s* ([a-zA-Z]) \s*
    (?: \\in\s*\\mathbb\s*\{?\s*R\s*\}? | \\in\s*\\R )? \s*
    (?: \| | : | \\mid | \\vert ) (.*) \\(?:\}|rbrace)""",
    re.DOTALL | re.VERBOSE,
)
LONGEST_FIRST = sorted(TEXT_COMMANDS, key=len, reverse=True)
WRAPPED = re.compile(rf"\\(?:{'|'.join(LONGEST_FIRST)})\s*\{{([^{{}}]*)\}}")


def fraction_of(repeating: re.Match) -> str:
    r"""A repeating decimal as a fraction: 0.1\overline{6} is \frac{15}{90}."""
    whole = repeating[1] or "0"
    once = repeating[2]
    again = repeating[3] or repeating[4]
    top = int(whole + once + again) - int(whole + once)
    bottom = 10 ** len(once) * (10 ** len(again) - 1)
    return r"{\frac{%d}{%d}}" % (top, bottom)


def in_digits(words: re.Match) -> str:
    """A number in words as digits, or as a fraction."""
    total = 0
    part = 0
    for word in re.findall("[a-z]+", words[1].lower()):
        if word == "hundred":
            part = 100 * part
        elif word in SCALES:
            total += SCALES[word] * part
            part = 0
        else:
            part += WORD_NUMBERS.get(word, 0)
    if words[2]:
        return r"\frac{%d}{%d}" % (total + part, PARTS[words[2].lower()])
    return str(total + part)


def clean(text: str) -> str:
    """One way of writing for what LaTeX and people write in several."""
    text = re.sub(r"\s{9,}", " ", text)  # long runs make some of the patterns slow
    text = SUPERSCRIPT.sub(r"^{\g<0>}", text).translate(SYMBOLS)
    text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)
    text = text.replace("\\$", "\\dollar ").replace("$", " ")
    text = POWER_OF_PYTHON.sub("^", text).replace("**", " ").replace("{:}", ":")
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    text = NUMBER_IN_WORDS.sub(in_digits, text)
    text = REPEATING.sub(fraction_of, text)
    text = MODULO.sub(r"\\pmod{\1}", text)
    builder = SET_BUILDER.search(text)
    if not builder:
        return text.strip().rstrip(".,;:")
    name, condition = builder.groups()
    return f"{name} \\in {condition}" if "\\in" in condition else condition


def words_of(text: str) -> str:
    """The words of an answer in small letters, without articles and punctuation; "" for a formula."""
    text = WRAPPED.sub(r" \1 ", text)
    text = re.sub(r"\\(?:left|right|quad|qquad)(?![a-zA-Z])|\\[,;:! ()\[\]]|\$|~", " ", text)
    if re.search(r"[\\^_&=<>+*/\[\]{}|]", text):
        return ""
    words = re.sub(r"[^\w\s:'-]", " ", text).lower().split()
    return " ".join(word for word in words if word not in ("the", "a", "an"))


def braces(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and its partner; None if it has none."""
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + MAX_ANSWER):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return text[start + 1 : m.start()]
    return None


# ------------------------------------------------------------------ tokens

NUMBER = r"\d+\.\d+ | \d+\.(?!\d) | \.\d+ | \d+"
THOUSANDS = r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?"
TOKEN = r"""
      (?P<space> \s+ | ~ )
    | (?P<num> %s )
    | \\(?P<cmd> [a-zA-Z]+\*? )
    | \\(?P<esc> . )
    | (?P<word> [A-Za-z]+ (?: \.[a-z]\.?(?![a-zA-Z]) )? )
    | (?P<op> . )"""
FLAGS = re.VERBOSE | re.DOTALL | re.ASCII
TOKEN_PLAIN = re.compile(TOKEN % NUMBER, FLAGS)
TOKEN_THOUSANDS = re.compile(TOKEN % f"{THOUSANDS} | {NUMBER}", FLAGS)


class Token(NamedTuple):
    """kind: num, name, func, unit, power, word, sep, rel, op, cmd, end; spaced: whether a space precedes."""

    kind: str
    value: str
    spaced: bool = False


def tokens_of(text: str, thousands: bool = True, split: bool = False) -> list[Token]:
    """The tokens of a cleaned text. Raises Unreadable beyond MAX_ANSWER and MAX_TOKENS.

    thousands: 1,234 is one number, not two. split: an unknown run of letters is
    a product of variables, not a word.
    """
    return Tokenizer(text, thousands, split).run()


class Tokenizer:
    r"""Goes through a text once. depth: how many \text{...} are around it."""

    def __init__(self, text: str, thousands: bool, split: bool, depth: int = 0):
        if depth > 8 or len(text) > MAX_ANSWER:
            raise Unreadable("too long")
        self.text = text
        self.thousands = thousands
        self.split = split
        self.depth = depth
        self.position = 0
        self.spaced = False
        self.tokens = []

    def run(self) -> list[Token]:
        pattern = TOKEN_THOUSANDS if self.thousands else TOKEN_PLAIN
        while self.position < len(self.text):
            m = pattern.match(self.text, self.position)
            self.position = m.end()
            if m.lastgroup == "space":
                self.spaced = True
            elif not self.wrapped_text(m):
                new = self.read(m.lastgroup, m[m.lastgroup], m.start())
                self.tokens += [Token(kind, value, self.spaced) for kind, value in new]
                self.spaced = False
            if len(self.tokens) > MAX_TOKENS:
                raise Unreadable("too many tokens")
        return self.tokens

    def wrapped_text(self, m: re.Match) -> bool:
        r"""Take the tokens inside of \text{...}, if that is what was found."""
        if m["cmd"] not in TEXT_COMMANDS:
            return False
        brace = re.compile(r"\s*\{").match(self.text, self.position)
        inside = braces(self.text, brace.end() - 1) if brace else None
        if inside is None:
            return False
        inner = Tokenizer(inside, self.thousands, self.split, self.depth + 1).run()
        self.tokens += [token._replace(spaced=True) for token in inner[:1]] + inner[1:]
        self.position = brace.end() + len(inside) + 1
        self.spaced = True
        return True

    def read(self, group: str, value: str, start: int) -> list[tuple[str, str]]:
        """The (kind, value) of the tokens in a match of TOKEN that begins at `start`."""
        if group == "num":
            return [("num", value.replace(",", ""))]
        if group == "word":
            return self.word(value, start)
        if group == "cmd":
            return command_token(value)
        return escaped_token(value) if group == "esc" else sign_token(value)

    def word(self, run: str, start: int) -> list[tuple[str, str]]:
        """What a run of letters is: a word, a unit, a function, or variables."""
        low = run.lower()
        before = self.tokens[-1].kind if self.tokens else ""
        in_text = self.depth > 0
        if low in SPOKEN:
            return [SPOKEN[low]]
        if low == "in" and before == "name":
            return [("rel", "in")]
        if low in ("a", "an") and before == "unit":  # 5 dollars an hour
            return [("op", "/")]
        if low in FILLERS or (run == "a" and in_text):
            return []
        unit = UNITS.get(run) or (len(run) > 3 and UNITS.get(low))
        if unit and (in_text or not self.split or len(run) > 3 or before == "num"):
            return [self.unit(run, unit, before)]
        if run in FUNCTIONS or low in ("ln", "log", "sqrt"):
            return [("func", run if run in FUNCTIONS else low)]
        if low in WORD_COMMANDS:
            return [("cmd", "infty" if low == "infinity" else low)]
        if len(run) == 1:
            return [("name", run)]
        apart = low in SHORT_WORDS and self.stands_apart(start)
        if in_text or apart or len(run) > 4 or (len(run) > 2 and not self.split):
            return [("word", low)]
        return [("name", letter) for letter in run]

    def unit(self, run: str, unit: str, before: str) -> tuple[str, str]:
        """A run of letters that can be a unit, as one, or else as a variable or a word."""
        right = self.text[self.position : self.position + 40]
        behind_number = before in ("num", "unit") and self.spaced and not re.match(r"\s*[\w^]", right)
        clear = len(run) > 1 and run not in AMBIGUOUS_UNITS
        if self.depth or clear or behind_number:
            return ("unit", unit)
        return ("name", run) if len(run) == 1 else ("word", run.lower())

    def stands_apart(self, start: int) -> bool:
        """Whether the run of letters from `start` to the position is a word of its own."""
        left = self.text[max(0, start - 1) : start].strip()
        right = self.text[self.position : self.position + 1]
        return not left and (not right or right in ".,;" or right.isspace())


def command_token(name: str) -> list[tuple[str, str]]:
    if name == "dollar":
        return [("unit", "dollar")]
    if name in RELATIONS:
        return [("rel", RELATIONS[name])]
    if name in FUNCTIONS or name == "sqrt":
        return [("func", name)]
    return [] if name in IGNORED_COMMANDS or name in TEXT_COMMANDS else [("cmd", name)]


def escaped_token(sign: str) -> list[tuple[str, str]]:
    """A character behind a backslash."""
    if sign == "%":
        return [("unit", "percent")]
    if sign in "{}\\":
        return [("op", "\\" + sign)]
    return [("op", sign)] if sign in "|&" else []


def sign_token(sign: str) -> list[tuple[str, str]]:
    """A single character that is no letter, digit or space."""
    if sign == "%":
        return [("unit", "percent")]
    if sign in RELATIONS:
        return [("rel", RELATIONS[sign])]
    if sign in ",;":
        return [("sep", sign)]
    return [] if sign in '"`?' else [("op", sign)]
