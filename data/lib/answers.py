"""Finds the answer in a response: extract_answer(response).
The table ANNOUNCEMENTS says what announces an answer, such as "final answer" or \\boxed. Without any, it is a
response that is an answer, or the last formula or number, before any made-up next problem."""

import bisect
import re
from itertools import islice

from data.lib.equality import is_relation
from data.lib.latex import readings
from data.lib.latex_tokens import KNOWN_WORDS, NUMBER_IN_WORDS, braces
from data.lib.mathvalues import MAX_ANSWER, MAX_ITEMS, MAX_RESPONSE, Value

# Where a base model goes on with a problem of its own making, or a chat model with another turn.
NEXT_PROBLEM = re.compile(
    r"""(?:^|\n|(?<=[.!?$}\]*]))[#*>\- \t]{0,20}(?:(?:next|new|another)\s+)?
    (?:problem|question|exercise|user|human|instruction|input)\b[ \t]*\#?\d*[ \t]*\**[:.]
    |\n[#* \t]{0,20}Q[ \t]*\d*[ \t]*[:.]
    |\n[ \t]{0,9}\#+[ \t]*(?:problem|question|exercise|instruction|example)\b
    |\n[ \t]*(?:problem|exercise|example)[ \t]+\d+\b
    |<\|?(?:im_(?:start|end)|user|endoftext|eot_id|(?:end|start)_of_turn|start_header_id|end)\b[^>\n]{0,20}>
    |</s>|<｜|<\|return\|>|\[\|(?:endofturn|user)\|\]|\[/?INST\]""".replace("\n    ", ""),
    re.IGNORECASE,
)
THOUGHT = re.compile(r"(?i)<(?:think(?:ing)?|reasoning)>|\[THINK\]|◁think▷|<\|channel\|>analysis")
THOUGHT_END = re.compile(
    r"(?i)</(?:think(?:ing)?|reasoning)>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final"
)
HOPE = re.compile(r"I hope (?:it|this) is correct", re.IGNORECASE)
# A choice, and then talk; or the choices, and then one of them.
LETTER = re.compile(r"\s*(\(?[A-J][).]?)\.?[ \t]*\n|\s*\(?A[).](?s:.{1,999})\n\s*(\(?[A-J][).]?)\s*$")
BOX = re.compile(r"\\?\bboxed(?=\s*\{)|\\(?:boxed|f(?:rame)?box)(?![a-zA-Z])")
# A number that is said not to be the answer, or of which the answer is a part.
DENIED = re.compile(
    r"(?i)(?:,?\s{1,3}(?:rather than|instead of|(?:and |is |can)?not)|n't)(?: be)?"
    r" \$?-?\d[\d.,]*\b\$?(?! \w)(?!.{0,40}\bbut\b)"
    r"|(?<![\d.,])-?\d[\d.,]{0,20}\$? is (?:not (?:a|the|right|correct)\b|wrong|incorrect)"
    r"|(?<=\d) of the \d+\b|(?<=[a-z]) out of (?:the )?\d+\b"
)

# (priority, pattern): the answer follows the pattern. The lowest priority that is
# found wins, and of several such places the last one.
ANNOUNCEMENTS = [
    (priority, re.compile(pattern))
    for priority, pattern in (
        (0, r"(?i)final\s+answer\b[*_}.]*\s*(?:(?:is|are|:|=)+|\n)"),
        (1, BOX.pattern),
        (1, r"(?:^|\n|\s)####(?!#)[ \t]*(?=\S)"),
        (1, r"(?i)[<\[](?:final_)?answer[>\]]|(?:^|\n)[*_# ]{0,5}answer[*_]*\s*:|\bcorrect answer is\b"),
        (2, r"(?i)(?:^|\n)#+[ \t]*answer[ \t]*\n|\\text(?:bf|it)\{answers?[.:]?\}|\*\*answer[.:]?\*\*"),
        (2, r"(?i)(?:antwort|réponse|resp(?:ue|o)sta|ответ|答案|答え)\s*(?:[:：是为]|(?:ist|est?)\b)+\s*"),
        (2, r"选[:：择]?\s*(?=[A-J])"),
        (2, r"(?i)final\s+answer\b[*_}.]*(?!:|\s*[a-z]{2,}\s+[a-z])"),
        (2, r"""(?ix) \b (?: answers? | ans | choice | option ) \b [*_"']* \s*
            (?: is | are | would\ be | must\ be | : | = )+"""),
        (4, r"\b(?:option|choice|answer)\s+(?=\(?[A-J]\b)"),
        (4, r"(?i)\b(?:solution|root|value|zero)s?\s+(?:is|are)\s*:?\s*\n(?=\s*(?:[-*•1]|\$?[a-z]\s*=))"),
        (4, r"\b(?:[Cc]hoose|[Ss]elect|[Pp]ick|go with|[Oo]nly|so|[Ii]t's)\s+(\(?[A-J]\)?)(?=[\s.,*]|$)"),
        (4, r"(?<!\w)(\(?[A-J]\)?)\** (?:holds|works|(?:is|must be) (?:the )?(?:correct|right|answer))\b"),
    )
]  # fmt: skip

# What stands around an answer in its sentence.
BEFORE = re.compile(
    r"""(?i)^(?:[\s,:=⇒→∴]|[=-]?>|(?:so|therefore|thus|hence|indeed|simply|then|just|clearly|of course|also)\b
    |(?:exactly|equal to|given by)\b|not\b.{1,80}?\bbut\b)+""".replace("\n    ", "")
)
BECAUSE = re.compile(
    r"""(?i), as\b|,?\s+(?:because|since|as (?:we|it|the)|which|where|i\.e|so that|when we|for which
    |and (?:the|so|we|this|it))\b""".replace("\n    ", "")
)
ROUNDED = re.compile(
    r"(?i),?\s*(?:[(,]|\bor\b|\bi\.e\.?,?)\s*(?:about|approximately|approx|roughly|≈|\\approx).*"
)
# What goes on behind a number that is the answer: 42 for 6 rows of 7, 42 miles in 2 hours.
GOES_ON = re.compile(
    r"""((?: [a-zA-Z]+){0,2}?)\s*(?:[(\[;–—]|:\s|\s(?:and\s)?(?:not|rather than|instead of)\b
    |\sat (?:most|least)\b|(?:,\s(?:in|so|not|or)
    |\s(?:for|with|when|if|in|as|after|is|per|out of|on|at|from|by|over|using|every|each))\b
    (?!.*\band\b.*\d))""".replace("\n    ", "")  # "3 for x and 4 for y" is not just 3
)
ASIDE = r"(?i)\((?:see|as|from|since|because|by|using|note|check|where|with|not|compare)\b[^()]{0,200}\)"
ASIDE += r"|, (?:which|because|since) [^\n.]{0,200}"
REMARK, ASIDE = re.compile(ASIDE + r"\s*$"), re.compile(ASIDE)
SUBJECT = re.compile(r"^\$?[^$]{0,99}\b(?:answer|value)\s*(?:is|:)[\s}:]*")
TOLD = re.compile(r"^(?:[A-Za-z ]*[A-Za-z]{2,} (?:is|are|equals?(?! to)|gives)|[Tt]otal:) +")
CONCLUDED = re.compile(r"=|\b(?:so|thus|hence|therefore|then|totale?|gives|makes)\b")
TRAILING = re.compile(
    r"[\s$.]*\\(?:blacksquare|square|qed|Box)[\s$.]*$"
    r"|\s*\\end\{(?:align|equation|gather|eqnarray|split)(?:ed)?\*?\}[\s$\]\\]*$"
)
HTML = re.compile(r"</?(?:p|b|strong|div|br|span|em|i|u|code|center|li|ul)\b[^<>]{0,40}>", re.IGNORECASE)
DOUBLED = re.compile(r"\\\\(?=(?:boxed|d?frac|sqrt|text|pi|left|cdot|times)\b)")
PUNCTUATION = re.compile(r"(?s)\\(?:begin|end|.)|\$\$?|[{}\n。]|!(?=\s+[A-Z])|\.(?=\s|$|[A-Z\"*])|[<\[]/")
ABBREVIATION = re.compile(r"\b(?:[ap]\.m|vs|approx|i\.e)$")
NAMED = re.compile(r"(?<![\w}])([a-z])\s*=\s*$")
BULLET = r"(?:[-*•]|\(?(?:\d|[a-h]|i{1,3})[.)])"
LINES = re.compile(
    rf"\s{{0,9}}(?:\*\*\s{{1,9}})?((?:[ \t]*{BULLET}[ \t]+[^\n]{{1,120}}(?:\n+|$)){{2,{MAX_ITEMS}}})"
)
EQUATIONS = re.compile(r"\s{0,9}(?:\*\*\s{1,9})?((?:\$?([a-z])\s*=[^\n=]{1,60}(?:\n+|$)){2,8})")
GAP = r"(?:[\s$]|\\q?quad\b|\\[ ,;()\[\]])*"
BETWEEN_BOXES = re.compile(
    rf"{GAP}[.,;]?{GAP}(?:\\text\{{)?\s*(?:and|or|,|&)?\s*\}}?{GAP}"
    rf"\s*(?:[Pp]art\s\(?\w\)?:?|{BULLET}:?)?{GAP}(?:[a-z]\s*=\s*)?"
)
FORMULA = r"\$\$(.{1,2000}?)\$\$|(?<!\\)\$([^$]{1,2000}?)(?<!\\)\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]"
TWO_FORMULAS = re.compile(rf"\s*(?:{FORMULA})\s*(?:or|and)\s*(?:{FORMULA})", re.DOTALL)
FORMULA = re.compile(FORMULA, re.DOTALL)
ATOM = r"""(?: \d[\d,]*(?:\.\d+)? | \.\d+ | [√∛π∞()\[\]|!^_²³°{}] | \\[a-zA-Z]+
    | (?:arc)?(?:sin|cos|tan)(?![a-z]) | (?:log|ln|sqrt|exp)(?![a-z]) | (?<![a-zA-Z])[a-zA-Z](?![a-zA-Z]) )"""
EQUATION = re.compile(r"(?<![^\s(])\d*[a-z](?:\^\d+)?(?:\s?[-+]\s?\d*[a-z](?:\^\d+)?)*\s*$")
PLAIN = re.compile(rf"(?:[-−+±]\s?)? {ATOM} (?: (?:\s? [-−+*/·×] \s?)? {ATOM} )*", re.VERBOSE)
GROUP = r"[(\[{]\s*[^()\[\]{}\n]{1,60}[)\]}]"
TOGETHER = re.compile(  # an interval, a set, a point, or a measure in two units
    rf"(?=[^,\n]{{1,60}},){GROUP}(?:\s*(?:∪|\\cup|U)\s*{GROUP})*"
    r"|\d[\d.]* [a-z]+(?:,? (?:and )?\d[\d.]* [a-z]+)+"
    r"|(?<=are )-?[\d.]*\d(?:, -?[\d.]*\d)*,? (?:and|or) -?[\d.]*\d(?=[.\s]*$)"
)
LAST_ASIDE = re.compile(r"\n[ \t]{0,9}\([^()\n]*\)\s*$")
BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
NUMBER = re.compile(
    r"""(?<![\w.]) [-−]? \s? (?: \\?\$ )?
      (?: \d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)? | \d*\.?\d+ ) (?: :\d+ )*
      (?: \s (?:hundred|thousand|million|billion|dozen) \b )? (?: \ \(?(?:in\ )?base\ \w+\)? )?
      (?: \s?/\s?\d+ )? (?: \s?[¼-¾⅐-⅞] )? (?: \s?\\?% )?
    | [-−]?[¼-¾⅐-⅞]""",
    re.VERBOSE,
)


def first_problem(text: str) -> str:
    """The response without markup, up to the next made-up problem or turn that an answer precedes."""
    text = re.sub(r"[ \t]{9,}", " ", text)  # long runs make some of the patterns below slow
    text = re.sub(r"((?:\s|[*#$_-]{1,2}))\1{8,}", r"\1\1\1", text)
    *thought, behind = THOUGHT_END.split(text)
    told = behind.strip() or not thought
    text = THOUGHT.split(behind, maxsplit=1)[0] if told else THOUGHT.split(thought[-1])[-1]
    text = DENIED.sub("", text)
    text = HTML.sub(" ", re.sub(r"[\ufeff\u200b]|<<[^<>\n]*>>", "", text))
    if "\\begin" not in text:  # there, \\ ends a row
        text = DOUBLED.sub(r"\\", text)
    for m in islice(NEXT_PROBLEM.finditer(text), 22):
        before = text[: m.start()]
        short = len(before) < 80 and before.strip() and not before.rstrip().endswith(":")
        if short or re.search(r"\d|\\boxed|answer", before):
            text = before
            break
    before = HOPE.split(text, maxsplit=1)[0]
    return before if before.strip() else text


def sentence_end(text: str, start: int) -> int:
    """Where the sentence that holds `start` ends, in braces and formulas only where these end."""
    depth, in_formula = 0, False
    limit = min(len(text), start + MAX_ANSWER)
    for m in PUNCTUATION.finditer(text, start, limit):
        mark = m[0]
        if mark in ("\\(", "\\[", "\\begin", "{"):
            depth += 1
        elif mark in ("\\)", "\\]", "\\end", "}") and depth:
            depth -= 1
        elif mark in ("\\)", "\\]", "\\end", "}", "</", "[/"):
            return m.start()
        elif mark in ("$", "$$"):
            in_formula = not in_formula
        elif mark in "\n.。!" and not depth and not in_formula:
            if mark != "." or not ABBREVIATION.search(text[max(0, m.start() - 8) : m.start()]):
                return m.start()
    return limit


def sentence(text: str, start: int) -> str:
    """The text from `start` to the end of its sentence, without the punctuation around it."""
    begin = re.compile(r"[\s:*_>`}]*").match(text, start).end()
    answer = text[begin : sentence_end(text, begin)]
    if "**" in text[start:begin]:
        answer = answer.split("**")[0]
    answer = answer.lstrip(" \t\n,;:*_`").rstrip(" \t\n.,;:*_`")
    return answer[1:].split('"')[0] if answer[:1] == '"' else answer  # {"answer": "5"}


def boxed(text: str, start: int) -> str | None:
    """What the \\boxed at `start` holds."""
    brace = re.compile(r"\\?\w+\s*").match(text, start)
    if text[brace.end() : brace.end() + 1] == "{":
        line = text[brace.end() + 1 :].split("\n", 1)[0]  # of a box that is not closed
        inside = braces(text, brace.end())
        return line.rstrip(" $.") if inside is None else inside
    word = re.compile(r"[^\s$.,]{1,100}").match(text, brace.end())
    return word and word[0]


def last_boxed(text: str, starts: list[int]) -> str | None:
    """The answer in the last box of `starts`, with those that "and" or a comma join to it."""
    parts, names, after = [], [], 0
    for start in reversed(starts[-MAX_ITEMS:]):
        here = boxed(text, start)
        if here is None and not parts:
            continue
        end = text.find("{", start) + len(here or "") + 2
        between = text[end:after]
        if parts and end > after:  # a box around the other
            continue
        joined = not parts or len(between) < 80 and BETWEEN_BOXES.fullmatch(between)
        if here is None or not joined or here in parts[:1]:  # said again
            break
        parts.insert(0, here)
        names.insert(0, NAMED.search(text[max(0, start - 9) : start]))
        after = start
    if len(parts) > 1 and all(names) and len({name[1] for name in names}) == len(names):
        parts = [f"{name[1]} = {part}" for name, part in zip(names, parts)]
    return ", ".join(parts) or None


def listed(text: str, start: int) -> str | None:
    """The items that begin at `start`, one a line or formula, as a list."""
    lines = LINES.match(text, start) or EQUATIONS.match(text, start)
    formulas = None if lines else TWO_FORMULAS.match(text, start)
    items = lines[1].splitlines() if lines else formulas.groups("") if formulas else []
    items = [re.sub(rf"^\s*{BULLET}\s+", "", x).strip().rstrip(" .,;") for x in items if x.strip()]
    return ", ".join(items) if items and all(map(readable, items)) else None


def announced(text: str, m: re.Match, boxes: list[int]) -> str:
    """The answer behind an announcement m; boxes: where those begin that may count."""
    if m.lastindex:
        return m[1]
    if BOX.match(m[0]):
        answer = last_boxed(text, boxes[: bisect.bisect_right(boxes, m.start())]) or ""
    else:
        answer = listed(text, m.end()) or sentence(text, m.end())
        answer = answer.rsplit("=")[-1] if m[0].rstrip()[-1:] == "=" else answer
        answer = last_boxed(answer, [b.start() for b in BOX.finditer(answer)]) or answer
        answer = trimmed(answer)
    return narrowed(answer)


def trimmed(answer: str) -> str:
    """An answer without what stands around it in its sentence: so 3 because ..., 2/3 or about 0.67."""
    answer = BECAUSE.split(BEFORE.sub("", answer))[0]
    return ROUNDED.sub("", REMARK.sub("", BEFORE.sub("", answer))).rstrip(" \t\n.,;:*_")


def narrowed(answer: str) -> str:
    """An answer without subject and words behind its number: the value is 42 for 6 rows."""
    number = NUMBER.match(answer)
    more = GOES_ON.match(answer, number.end()) if number else None
    if more and not readable(answer):
        answer = answer[: more.end(1)]
    told = SUBJECT.sub("", answer).strip()
    return told.rstrip("}") if told != answer and "{" not in told else told


def extract_answer(response: str) -> str | None:
    """The answer that a response gives to its problem, as it stands there; None if there is none."""
    text = first_problem(response[:MAX_RESPONSE])
    letter = LETTER.match(text)
    if letter and "\\boxed" not in text:
        return letter[1] or letter[2]
    boxes = [m.start() for m in BOX.finditer(text)]
    asides = [m.span() for m in ASIDE.finditer(text)] if boxes else []
    boxes = [at for at in boxes if not any(a < at < b for a, b in asides)] or boxes
    places = [(p, -m.start(), m) for p, pattern in ANNOUNCEMENTS for m in pattern.finditer(text)]
    for priority in sorted({place[0] for place in places}):
        here = sorted((place for place in places if place[0] == priority), key=lambda place: place[1])
        for *_, m in here[:10]:
            answer = announced(text, m, boxes)
            vague = not re.search(r"\d|\\|\b[A-J]\b", answer)  # the final answer is positive
            if boxes and priority != 1 and (vague or boxes[-1] > m.end()):
                answer = last_boxed(text, boxes) or answer
            if answer and not re.match(r"not \S*\d", answer):
                whole = len(answer) <= MAX_ANSWER and (readable(answer) or not prose(answer))
                return answer if whole else last_candidate(answer) or answer
    return weak_answer(text)


def prose(text: str) -> bool:
    """Whether a text is a sentence: more than three words that are no functions or units."""
    words = re.findall(r"(?<![\\a-zA-Z])[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", text))
    return sum(word.lower() not in KNOWN_WORDS for word in words) > 3


def readable(text: str) -> bool:
    """Whether a text is nothing but an answer, not a sentence around one."""
    first = next(iter(readings(text)), None)
    return first is not None and not wordy(first.value) and not first.split and len(first.words) < 4


def wordy(value) -> bool:
    """Whether there are words around a value, or many instead of one."""
    if not isinstance(value, Value):
        return False
    if value.kind == "words":
        return len(value.items) > 0 or len(value.marks) > 3
    words = [isinstance(x, Value) and x.kind == "words" for x in value.items]
    labelled = [x for x in value.items if is_relation(x, "=") and getattr(x.items[0], "kind", "") == "words"]
    return value.kind == "list" and len(set(words)) > 1 or len(labelled) > 1 or any(map(wordy, value.items))


def weak_answer(text: str) -> str | None:
    """The answer of a text that does not announce it."""
    text = BEFORE.sub("", text[:-60] + TRAILING.sub("", text[-60:])).strip()
    line = "\n" not in text
    decided = re.match(r"(?i)(yes|no|true|false)\b[,.](?: because| since|\D*$)", text)
    if decided:
        return decided[1]
    lettered = LINES.fullmatch(text) and not re.search("[=:]", text)
    if not line and (lettered or EQUATIONS.fullmatch(text)) and listed(text, 0):
        return listed(text, 0)
    if line and text and len(text) <= 300:
        short = len(text.split()) <= 3 and not re.search(r"[.!?,] |\b(?:is|are)\b", text)
        exclaimed = re.search(r"\bis\b.*!$", text)  # not a factorial
        if readable(text.rstrip(".")) and not exclaimed or short:
            told = TOLD.sub("", text)
            return told if re.search(r"[ap]\.m\.$|\.\.$", told) else told.rstrip(".")
        told = TOLD.sub("", text)
        if (told != text or NUMBER.match(text)) and not exclaimed and not CONCLUDED.search(told):
            told = narrowed(trimmed(told))
            if readable(told):
                return told
    choice = line and re.match(r"\(?[A-J][).:]\)?\s+\S", text)  # B. 12 apples
    return text if choice else last_candidate(text)


def last_candidate(text: str) -> str | None:
    """The formula, bold text, right side or number that ends last; of several, the longest."""
    tail = LAST_ASIDE.sub("", TRAILING.sub("", text[-5000:])) or text
    found = [(m.end(), -m.start(), m[m.lastindex]) for m in FORMULA.finditer(tail)]
    found += [(m.end(), -m.start(), m[1]) for m in BOLD.finditer(tail)]
    for m in list(NUMBER.finditer(tail))[-1:]:  # or the formula around it: 3x+7
        start, end = m.span()
        plain = PLAIN.finditer(tail, max(0, start - 200), end + 200)
        wider = [x[0].strip(" ,") for x in plain if x.start() <= start and x.end() >= end]
        formula = next((x for x in wider if len(x) > end - start and readable(x)), m[0])
        found.append((end, -start, formula))
    for m in list(TOGETHER.finditer(tail))[-2:]:
        if readable(m[0]) and (m[0][-1] in ")]}0123456789" or not isinstance(readings(m[0])[0].value, Value)):
            found.append((m.end(), -m.start(), m[0]))
    equals = tail.rfind("=")
    last_line = tail.splitlines()[-1:]
    if equals >= 0 and last_line and equals >= len(tail) - len(last_line[0]) - 1:
        right = sentence(tail, equals + 1)
        left = EQUATION.search(tail, max(0, equals - 60), equals)
        if not re.search(r"\$(?!\d)", right) and readable(right):
            start, end = left.start() if left else equals + 1, tail.find(right, equals) + len(right)
            found.append((end, -start, tail[start:end]))
    if found:
        return max(found)[2].strip()
    words = [m[0] for m in NUMBER_IN_WORDS.finditer(tail) if m[0].lower() != "one"]
    said = re.search(r"(?s).*\b(?:is|are|be|on|in)\s+([A-Za-z][\w' ]{0,40})[.!]?\s*$", tail)
    return words[-1] if words else said[1] if said else None
