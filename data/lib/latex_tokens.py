"""Cuts the LaTeX of an answer into tokens: clean(text), then Tokenizer(text, ...).run(). The tables say
which words are units, functions, relations, fillers, and how many ways of writing are brought to one."""

import re
import unicodedata
from collections import namedtuple

import sympy

from data.lib.mathvalues import MAX_ANSWER, MAX_TOKENS, Unreadable

UNIT_SPELLINGS = """
    meter metre m | centimeter centimetre cm | millimeter mm | kilometer kilometre km | inch inches in
    foot feet ft | yard yd | mile mi | second sec s | minute min | hour hr h | day | week | month | year yr
    gram g | kilogram kg | milligram mg | pound lb | ounce oz | ton | liter litre L | milliliter ml mL
    gallon gal | quart | pint | cup | dollar usd USD | cent | euro | degree deg | radian rad
    percent percentage | unit | mph | kph | am AM a.m. a.m | pm PM p.m. p.m | newton N | joule J | watt W
    volt V | hertz Hz | celsius | fahrenheit | mole mol
"""
UNITS = {}  # spelling -> name
for group in re.split(r"[|\n]", UNIT_SPELLINGS.strip()):
    name, *others = group.split()
    UNITS |= {spelling: name for x in (name, *others) for spelling in (x, x + "s" * (len(x) > 1))}
# These mean a unit only inside \text{...} or behind a number.
AMBIGUOUS_UNITS = set("m in s h g L N J W V am min rad deg sec".split())
TRIGONOMETRIC = "sin cos tan cot sec csc".split()
HYPERBOLIC = "sinh cosh tanh coth sech csch".split()
FUNCTIONS = {name: getattr(sympy, name) for name in TRIGONOMETRIC + HYPERBOLIC + ["exp"]}
FUNCTIONS |= {"arc" + name: getattr(sympy, "a" + name) for name in TRIGONOMETRIC}
FUNCTIONS |= dict.fromkeys(("ln", "log", "lg"), sympy.log) | dict.fromkeys(("cis", "gcd", "lcm"), None)
FUNCTIONS["abs"] = sympy.Abs
INVERSE = {name: getattr(sympy, "a" + name) for name in TRIGONOMETRIC + HYPERBOLIC[:3]}
SIGNS = {
    "=": "= equiv iff to rightarrow Rightarrow sim cong", "<": "< lt", ">": "> gt", "<=": "le leq leqslant",
    ">=": "ge geq geqslant", "!=": "ne neq", "in": "in", ":": ": colon", "~": "approx",
}  # fmt: skip
RELATIONS = {name: sign for sign, names in SIGNS.items() for name in names.split()}
# Words that are tokens of another kind.
SPOKEN = {"and": ("sep", "and"), "or": ("sep", "or"), "to": ("rel", ":"), "per": ("op", "/")}
SPOKEN |= dict.fromkeys(("is", "are", "equals", "equal", "gives"), ("rel", "="))
SPOKEN |= {"union": ("cmd", "cup"), "square": ("power", "2"), "sq": ("power", "2"), "cubic": ("power", "3")}
BETWEEN = {("in", "name"): ("rel", "in"), ("a", "unit"): ("op", "/"), ("an", "unit"): ("op", "/")}
FILLERS = set("th st nd rd about around approximately exactly the an only roughly we find get".split())
SHORT_WORDS = set("no so he we it if of by at on do be my us up go or an as".split())
WORD_COMMANDS = set("pi infinity infty inf oo theta alpha beta emptyset".split())
KNOWN_WORDS = {*UNITS, *FUNCTIONS, *"pi infty infinity inf sqrt floor ceil max min gcd lcm and or".split()}
TEXT_COMMANDS = set(
    """text textbf textrm textit texttt textsf textnormal mbox hbox mathrm operatorname rm emph
    mathsf num mathit mathbf boldsymbol bf bm mathcal underline""".split()
)
IGNORED = TEXT_COMMANDS | set(
    """left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits
    therefore implies noindent quad qquad hspace vspace thinspace middle large Large huge " ` ?""".split()
)
MARKS = {r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(", r"\rparen": ")", r"\{": r"\{", r"\}": r"\}"}
MARKS = {written: ("op", sign) for written, sign in MARKS.items()} | {"\\\\": ("sep", "\\\\")}
MARKS |= dict.fromkeys(("%", r"\%"), ("unit", "percent")) | {r"\dollar": ("unit", "dollar")}
MARKS |= {",": ("sep", ","), ";": ("sep", ";")}
# Characters, and the commands or the plain text that they stand for.
COMMANDS = """
    × times   · cdot   ⋅ cdot   ∙ cdot   ± pm   ∓ mp   √ sqrt   ∛ sqrt[3]   ∜ sqrt[4]   π pi   ∞ infty
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
# Numbers in words: twelve, forty-two, two thousand five hundred, three quarters.
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
WORD_NUMBERS = {word: n for n, word in enumerate(ONES)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
PARTS = {"half": 2, "halve": 2, "quarter": 4, "third": 3, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
PARTS |= {f"{part}s": n for part, n in PARTS.items()}
BELOW_100 = rf"(?:(?:{'|'.join(TENS)})(?:[ -](?:{'|'.join(ONES[1:10])}))?|(?:{'|'.join(reversed(ONES))}))"
NUMBER_IN_WORDS = re.compile(
    rf"(?i)(?<![a-zA-Z\\])({BELOW_100}(?:[ -](?:{'|'.join(SCALES)})(?:(?: and)?[ -]{BELOW_100})?)*)"
    rf"(?:[ -]({'|'.join(sorted(PARTS, reverse=True))}))?(?![a-zA-Z])"
)


def in_digits(words: re.Match) -> str:
    """A number in words as digits, or as a fraction."""
    total = part = 0
    for word in re.findall("[a-z]+", words[1].lower()):
        if word in SCALES:
            total, part = (total, 100 * part) if word == "hundred" else (total + SCALES[word] * part, 0)
        else:
            part += WORD_NUMBERS.get(word, 0)
    number = total + part
    return r"\frac{%d}{%d}" % (number, PARTS[words[2].lower()]) if words[2] else str(number)


SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:begin|end)\s*\{(?:aligned|align|split|gathered|equation)\*?\}", ""),
        (r"&\s*(=|\\[lg]eq?\b|<|>)", r"\1"),
        (r"<=|=<|\\not\s*(?:>|\\gt\b)|\\ngtr\b", r"\\le "),
        (r">=|\\not\s*(?:<|\\lt\b)|\\nless\b", r"\\ge "),
        (r"(?<=\s)!=|=/=|<>|\\not\s*=", r"\\ne "),
        (r"(?<![\\a-zA-Z])(?:cbrt|root\s*\((\d{1,3})\))(?=\s*\()", lambda m: rf"\sqrt[{m[1] or 3}]"),
        (r"(?<![\\a-zA-Z])(?=(?:frac|sqrt)[\d{])", r"\\"),
        (r"(\d)\s*o\s?'?\s?clock", r"\1:00"),
        (r"(?i)\b(?:12 )?noon\b", "12:00 pm"),
        (r"(?<=[\d}])\s*\\q?quad\s*(?=-?\d|\\(?:frac|sqrt)|[a-z]\s*=)", ", "),
        (r"(?<=[\d}])\s*(?:\\text\s*\{\s*)?\(([a-z]{3,}[a-z ]*)\)\s*\}?", r"\\text{ \1 }"),
        (r"(?<!\^)\{\}|\{\}(?=\w)", ""),
        (r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times "),
        (r"\\\\\s*$", ""),
        (r"(?:,|(?:\\text\s*\{\s*)?\b(?:for|where|with))\s*\}?\s*[a-z]\s*\\in\s*\\mathbb\s*\{?[ZN]\}?$", ""),
        (r"(?:\\text\s*\{\s*)?\b(?:for|where|with) (?:any|all|some)\b[^,]{0,40}$", ""),
        (r"\\(?:[dtcs]|nice)frac", r"\\frac"),
        (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
        (r"\^\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)\b\s*\}{0,2}", ""),
        (r"\b(sq|cu|in|ft|hr|min|sec|oz|lb)\.(?=\s|$)", r"\1"),
        (r"(?:\\(?:[,;:! ]|$)|\s)+$", ""),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:mathbb|Bbb)\s*\{\s*([A-Z])\s*\}", r"\\mathbb \1"),
        (r"\\begin\s*\{array\}\s*\{[^{}]*\}", r"\\begin{array}"),
        (r"\bMatrix\((?=\[)(.*)\)$", r"\1"),
        (r"(?:^|(?<=[\s,;]))(?:\\text\s*\{)?\(?(?:[a-h]|i{1,3})\)\s*\}?\s*(?=[-\d$])", ", "),
        (r"^[\s,]+", ""),
        (r"(?<=\*)\s*I\b", "i"),
        (r"^([\[\]])([^\[\]]*,[^\[\]]*)([\[\]])$", lambda m: "[("[m[1] == "]"] + m[2] + "])"[m[3] == "["]),
        (r"(?<=\d)\s*(?:\\cup|\bU\b)\s*(?=[a-z]\s*[<>\\])", " or "),
        (r"=\s*(-?\d+\.\d+)\s*(?:\\[lc]?dots|\.\.\.|…)", r"\\approx \1"),
        (r"(?<!\d)(\d{0,50}\.\d{0,50}?)(\d{1,20}?)\2\2+\s*(?:\\[lc]?dots|\.\.\.|…)", r"\1\\overline{\2}"),
        (r"[_^]\{?(\d+)\}?\s*C_\{?(\d+)\}?", r"\\binom{\1}{\2}"),
        (r"(?<!\w)C\((\d+), *(\d+)\)", r"\\binom{\1}{\2}"),
        (r"(\d)'\s*(\d+)(?:''|\")", r"\1 feet \2 inches"),
        (r"(?<=\w)\s+and\s+(?:a|one)[ -]half\b", " 1/2"),
        (r"\s+squared\b", "^2"),
        (r"(?<=\d) (?:over|divided by) (?=\d)", "/"),
        (r"(?i)\b(?:the )?square root of\s+", r"\\sqrt "),
        (NUMBER_IN_WORDS, in_digits),
        (r"\b(\d\w*)\s*\(?(?:in\s+)?base[ -]?(\d+)\)?", r"\1_{\2}"),
        (r"(?i)\b(?:minus|negative)\s+(?=\d)", "-"),
        (rf"(?<=\d)\s*(?:\\text\{{)?\s*({'|'.join(SCALES)})\b\}}?", lambda m: rf"\cdot {SCALES[m[1]]} "),
        (r"(?<=\d)\s*(?:,\s?\\!|\{,\}\\!|\{,\}|\\,|,\\,|\\ |,\\;)\s*(?=\d{3}(?!\d))", ","),
        (r"(?<![\d.,/}])\d{1,3}(?: \d{3})+(?![\d,./]| ?/)", lambda m: m[0].replace(" ", "")),
        (r"(\d)(?:\\(?:text|mathrm)\{)?[eE]\}?\{?([+-]?\d{1,6})\}?(?![\d.a-zA-Z])", r"\1\\cdot 10^{\2}"),
    )
]
COMPARED = [  # words, and the sign that they stand for
    (re.compile(rf"(?i)(?:\b(?:is|are|of|must be)\s+)?\b(?:strictly\s+)?(?:{words})\b(?! \w+ than)"), sign)
    for words, sign in (
        (r"(?:greater|larger) than or equal to|at least|(?:no|not) (?:less|smaller) than", r"\\ge "),
        (r"(?:less|smaller) than or equal to|at most|(?:no|not) (?:more|greater|larger) than", r"\\le "),
        (r"(?:greater|larger|more) than", ">"),
        (r"(?:less|smaller) than", "<"),
    )
]
ANY_OF = r"(?:the set of )?(?:(?:all|any|every) (?:real |possible )?(?:number|real|value)?s?(?: of)?|numbers)"
ALL_NUMBERS = re.compile(
    rf"(?i){ANY_OF} ?([a-z](?![a-z]))?,? ?(?:that are|which are|such that|with|for which|where)? ?(.*)"
)
ENDS = re.compile(
    rf"(?i)(?:{ANY_OF} ?(?:[a-z] )?(?:(?:that|which) are |lying )?"
    r"|[a-z] (?:is|lies) |the (?:closed )?interval )?(?P<strictly>strictly )?"
    r"(?:between|(?P<from>from)) (?P<low>\S+) (?:and|to) (?P<high>[^\s,]+)(?P<closed>,? \(?inclusive\)?)?"
)
SUPERSCRIPT = re.compile("⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+")
POWER_OF_PYTHON = re.compile(r"(?<=[\w)])\*\*(?=[\d(])")
REPEATING = re.compile(r"([0-9]{0,50})\.([0-9]{0,50})\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,50})\}|([0-9]))")
MODULO = re.compile(
    r"\(?\s{0,9}(?:\\(?:text|mathrm|operatorname)\{\s*mod\s*\}|\\[bp]?mod|\bmod)"
    r"[\s{]{0,9}(\d{1,9})\s{0,9}\}?\s{0,9}\)?"
)
SET_BUILDER = re.compile(
    r"(?s)\\(?:\{|lbrace)\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?|\\in\s*\\R)?\s*"
    r"(?:\||:|\\mid|\\vert)(.*)\\(?:\}|rbrace)"
)
WRAPPED = re.compile(rf"\\(?:{'|'.join(sorted(TEXT_COMMANDS, key=len, reverse=True))})\s*\{{([^{{}}]*)\}}")


def fraction_of(repeating: re.Match) -> str:
    r"""A repeating decimal as a fraction: 0.1\overline{6} is \frac{15}{90}."""
    once, again = "0" + repeating[1] + repeating[2], repeating[3] or repeating[4]
    bottom = 10 ** len(repeating[2]) * (10 ** len(again) - 1)
    return r"{\frac{%d}{%d}}" % (int(once + again) - int(once), bottom)


def region_in_words(text: str) -> str:
    """A set of numbers told in words, as an interval or an inequality: at least 3, between 1 and 4."""
    if not re.search(r"(?i)\b(?:all|any|every|between|interval|inclusive|than|least|most)\b", text):
        return text
    text = re.sub(r"\s+", " ", WRAPPED.sub(r" \1 ", text)).strip(" .")
    for words, sign in COMPARED:
        text = words.sub(sign, text)
    ends = ENDS.fullmatch(text)
    if ends:
        closed = (ends["from"] or ends["closed"]) and not ends["strictly"]
        return ("[%s,%s]" if closed else "(%s,%s)") % (ends["low"], ends["high"])
    told = ALL_NUMBERS.fullmatch(text)
    if not told:
        return text
    letter, rest = told.groups("")
    if rest.startswith("except"):
        return r"\mathbb R \setminus \{%s\}" % re.sub(r"\band\b", ",", rest[6:])
    if re.match(r"[<>]|\\[lg]e ", rest):
        return f"{letter or 'x'} {rest}"
    return (rest if letter in rest else f"{letter} {rest}") or text


def clean(text: str) -> str:
    """One way of writing for what LaTeX and people write in several."""
    if re.fullmatch(r"-?[0-9]*\.?[0-9]+\.?", text):
        return text.rstrip(".")
    text = re.sub(r"\s{9,}", " ", text)  # long runs make some of the patterns slow
    text = SUPERSCRIPT.sub(r"^{\g<0>}", text).translate(SYMBOLS)
    text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)
    text = re.sub(r"(?<=[^\s$\\])\$ ?([a-zA-Z]{1,3})(?=[. ]*$)", r" \\text{ \1 }", text)  # $4$ m
    text = text.replace("\\$", "\\dollar ").replace("$", " ")
    text = POWER_OF_PYTHON.sub("^", text).replace("**", " ").replace("{:}", ":")
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    text = REPEATING.sub(fraction_of, text)
    text = MODULO.sub(r"\\pmod{\1}", text)
    text = region_in_words(text)
    builder = SET_BUILDER.search(text)
    if not builder:
        return text.strip().rstrip(".,;:")
    return f"{builder[1]} \\in {builder[2]}" if "\\in" in builder[2] else builder[2]


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


NUMBER = r"\d+\.\d+|\d+\.(?!\d)|\.\d+|\d+"
TOKEN = r"(?P<space>\s+|~)|(?P<num>%s)|\\(?P<cmd>[a-zA-Z]+\*?)|\\(?P<esc>.)"
TOKEN += r"|(?P<word>[A-Za-z]+(?:\.[a-z]\.?(?![a-zA-Z]))?)|(?P<op>.)"
TOKEN_PLAIN = re.compile(TOKEN % NUMBER, re.DOTALL | re.ASCII)
THOUSANDS = r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|"
TOKEN_THOUSANDS = re.compile(TOKEN % (THOUSANDS + NUMBER), re.DOTALL | re.ASCII)


# kind: num, name, func, unit, power, word, sep, rel, op, cmd, end. spaced: whether a space precedes.
Token = namedtuple("Token", "kind value spaced", defaults=(False,))


class Tokenizer:
    r"""run() gives a cleaned text's tokens. thousands: 1,234 is one number, not two. split: an unknown
    run of letters is a product of variables, not a word. depth: how many \text{...} are around it."""

    def __init__(self, text: str, thousands: bool, split: bool, depth: int = 0):
        if depth > 8 or len(text) > MAX_ANSWER:
            raise Unreadable("too long")
        self.text, self.thousands, self.split, self.depth = text, thousands, split, depth
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
                new = self.word(m[0], m.start()) if m["word"] else token_of(m)
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

    def word(self, run: str, start: int) -> list[tuple[str, str]]:
        """What a run of letters is: a word, a unit, a function, or variables."""
        low = run.lower()
        before = self.tokens[-1].kind if self.tokens else ""
        in_text = self.depth > 0
        spoken = BETWEEN.get((low, before)) or SPOKEN.get(low)
        if spoken:
            return [spoken]
        if low in FILLERS or (run == "a" and in_text):
            return []
        unit = UNITS.get(run) or (len(run) > 3 and UNITS.get(low))
        if unit and (in_text or not self.split or len(run) > 3 or before == "num"):
            return [self.unit(run, unit, before)]
        if run in FUNCTIONS or low in ("ln", "log", "sqrt"):
            return [("func", run if run in FUNCTIONS else low)]
        if low in WORD_COMMANDS:
            return [("cmd", "infty" if low in ("infinity", "inf", "oo") else low)]
        if len(run) == 1:
            return [("name", run)]
        around = self.text[max(0, start - 1) : start] + self.text[self.position : self.position + 1]
        apart = low in SHORT_WORDS and re.fullmatch(r"\s?[\s.,;]?", around)
        if in_text or apart or len(run) > 4 or (len(run) > 2 and not self.split):
            return [("word", low)]
        return [("name", letter) for letter in run]

    def unit(self, run: str, unit: str, before: str) -> tuple[str, str]:
        """A run of letters that can be a unit, as one, or else as a variable or a word."""
        right = self.text[self.position : self.position + 40]
        refused = r"\s*\d" if run == "in" else r"\d|\s*[a-zA-Z_+=-]|\^(?!\{?[23]\}?\s*(?:[^\w\s+-]|$))"
        per = [token.kind for token in self.tokens[-2:]] == ["unit", "op"] and self.tokens[-1].value == "/"
        behind_number = (per or before in ("num", "unit") and self.spaced) and not re.match(refused, right)
        if self.depth or behind_number or len(run) > 1 and run not in AMBIGUOUS_UNITS:
            return ("unit", unit)
        return ("name", run) if len(run) == 1 else ("word", run.lower())


def token_of(m: re.Match) -> list[tuple[str, str]]:
    """The (kind, value) of the token in a match of TOKEN that is no word, if it stands for anything."""
    name = m["cmd"] or m["esc"] or m["op"] or ""
    if m["num"]:
        return [("num", m[0].replace(",", ""))]
    if m[0] in MARKS:
        return [MARKS[m[0]]]
    if name in RELATIONS and not m["esc"]:
        return [("rel", RELATIONS[name])]
    if m["cmd"] and (name in FUNCTIONS or name == "sqrt"):
        return [("func", name)]
    ignored = name not in "|&" if m["esc"] else name in IGNORED
    return [] if ignored else [("cmd" if m["cmd"] else "op", name)]
