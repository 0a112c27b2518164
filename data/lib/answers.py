"""Finds the answer in a response: extract_answer(response).

The table ANNOUNCEMENTS says what announces an answer, such as "final answer"
or \\boxed. Without any, it is a response that is nothing but an answer, or else
the last formula or number. What follows a made-up next problem does not count.
"""

import bisect
import re

from data.lib.equality import is_relation
from data.lib.latex import readings
from data.lib.latex_tokens import KNOWN_WORDS, braces
from data.lib.mathvalues import MAX_ANSWER, MAX_ITEMS, MAX_RESPONSE, Value

# Where a base model goes on with a problem of its own making, or a chat model with another turn.
NEXT_PROBLEM = re.compile(
    r"""
      (?: ^ | \n | (?<=[.!?$}\]*]) ) [#*>\- \t]{0,20} (?: (?:next|new|another) \s+ )?
      (?: problem | question | exercise | user | human | instruction | input ) \b
      [ \t]* \#? \d* [ \t]* \** [:.]
    | \n [#* \t]{0,20} Q [ \t]* \d* [ \t]* [:.]
    | \n [ \t]{0,9} \#+ [ \t]* (?: problem | question | exercise | instruction | example ) \b
    | \n [ \t]* (?: problem | exercise | example ) [ \t]+ \d+ \b
    | <\|? (?: im_start | im_end | user | endoftext | eot_id | end_of_turn | start_of_turn
             | start_header_id | end ) \b [^>\n]{0,20} >
    | </s> | <｜ | <\|return\|> | \[\|(?:endofturn|user)\|\]
    | \[/?INST\]
    """,
    re.IGNORECASE | re.VERBOSE,
)
HOPE = re.compile(r"I hope (?:it|this) is correct", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")

# (priority, pattern): the answer follows the pattern. The lowest priority that is
# found wins, and of several such places the last one.
ANNOUNCEMENTS = [
    (priority, re.compile(pattern))
    for priority, pattern in (
        (0, r"(?i)final\s+answer\b[*_}.]*\s*(?:(?:is|are|:|=)+|\n)"),
        (1, BOX.pattern),
        (1, r"(?:^|\n|\s)####(?!#)[ \t]*(?=\S)"),
        (1, r"(?i)<answer>"),
        (2, r"(?i)(?:^|\n)#+[ \t]*answer[ \t]*\n"),
        (2, r"(?i)\\text(?:bf|it)\{answers?[.:]?\}"),
        (2, r"(?i)\*\*answer[.:]?\*\*"),
        (2, r"(?i)final\s+answer\b[*_}.]*"),
        (2, r"""(?ix) \b (?: answers? | ans | choice | option ) \b [*_"']* \s*
            (?: is | are | would\ be | must\ be | : | = )+"""),
        (3, r"\b(?:option|choice|answer)\s+(?=\(?[A-J]\b)"),
    )
]  # fmt: skip

# What stands around an answer in its sentence.
BEFORE = re.compile(
    r"""^(?: [\s,:]
    | (?: so | therefore | thus | hence | indeed | simply | then | just | clearly | of\ course
        | also | exactly ) \b
    | (?: equal\ to | given\ by ) \b
    | not \b .{1,80}? \b but \b )+""",
    re.IGNORECASE | re.VERBOSE,
)
BECAUSE = re.compile(
    r""",? \s+ (?: because | since | as\ (?:we|it|the) | which | where | i\.e | so\ that | when\ we
    | for\ which | and\ (?:the|so|we|this|it) ) \b""",
    re.IGNORECASE | re.VERBOSE,
)
ROUNDED = re.compile(
    r""",? \s* (?: \( | \b or \b | \b i\.e\.?,? ) \s*
    (?: about | approximately | approx | roughly | ≈ | \\approx ) .*""",
    re.IGNORECASE | re.VERBOSE,
)
# What goes on behind a number that is the answer: 42 for 6 rows of 7, 42 miles in 2 hours.
GOES_ON = re.compile(
    r"""( (?: \ [a-zA-Z]+ ){0,2}? ) \s*
    (?: \( | [;–—] | :\s
      | (?: ,\s(?:in|so|not|or) | \s(?:for|with|when|if|in|as|after|is) ) \b
        (?! .* \band\b .* \d )  # "3 for x and 4 for y" is not just 3
    )""",
    re.VERBOSE,
)
REMARK = re.compile(
    r"\s* \( (?: see | as | from | since | because | by | using | note | check ) \b [^()]{0,200} \) $",
    re.IGNORECASE | re.VERBOSE,
)
SUBJECT = re.compile(r"^\$?[^$]{0,99}\b(?:answer|value)\s*(?:is|:)[\s}:]*")
TOLD = re.compile(r"^[A-Za-z ]*[A-Za-z]{2,} (?:is|are|equals?|gives) +")
QED = re.compile(r"[\s$.]*\\(?:blacksquare|square|qed|Box)[\s$.]*$")
ENDED_FORMULA = re.compile(
    r"\s*\\end\{(?:align|aligned|equation|gather|gathered|eqnarray|split)\*?\}[\s$\]\\]*$"
)
HTML = re.compile(r"</?(?:p|b|strong|div|br|span|em|i|u|code|center|li|ul)\b[^<>]{0,40}>", re.IGNORECASE)
DOUBLED = re.compile(r"\\\\(?=(?:boxed|d?frac|sqrt|text|pi|left|cdot|times)\b)")
PUNCTUATION = re.compile(
    r"""\\[()\[\]] | \\begin | \\end | \\. | \$\$? | [{}\n] | \.(?= \s | $ | [A-Z"*] ) | <""",
    re.DOTALL | re.VERBOSE,
)
ABBREVIATION = re.compile(r"\b(?:[ap]\.m|vs|approx|i\.e)$")
GAP = r"(?: [\s$] | \\q?quad\b | \\[\ ,;()\[\]] )*"
BETWEEN_BOXES = re.compile(
    rf"""{GAP} [,;]? {GAP} (?:\\text\{{)? \s* (?:and|or|,)? \s* \}}? {GAP}
    (?: [a-z]\s*=\s* )?""",
    re.VERBOSE,
)
FORMULA = re.compile(
    r"""\$\$ (.{1,2000}?) \$\$
    | (?<!\\)\$ ([^$]{1,2000}?) (?<!\\)\$
    | \\\( (.{1,2000}?) \\\)
    | \\\[ (.{1,2000}?) \\\]""",
    re.DOTALL | re.VERBOSE,
)
BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
NUMBER = re.compile(
    r"""(?<![\w.]) [-−]? \s? (?: \\?\$ )?
      (?: \d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)? | \d*\.?\d+ ) (?: :\d+ )*
      (?: \s?/\s?\d+ )? (?: \s?[¼-¾⅐-⅞] )? (?: \s?\\?% )?
    | [-−]?[¼-¾⅐-⅞]""",
    re.VERBOSE,
)


def first_problem(text: str) -> str:
    """The response without markup, up to the next made-up problem or turn.

    That does not cut where nothing before it could be an answer.
    """
    text = re.sub(r"[ \t]{9,}", " ", text)  # long runs make some of the patterns below slow
    text = HTML.sub(" ", without_thought(text.replace("\ufeff", "").replace("\u200b", "")))
    if "\\begin" not in text:  # there, \\ ends a row
        text = DOUBLED.sub(r"\\", text)
    for n, m in enumerate(NEXT_PROBLEM.finditer(text)):
        before = text[: m.start()]
        short = len(before) < 80 and before.strip() and not before.rstrip().endswith(":")
        if short or re.search(r"\d|\\boxed|answer", before):
            text = before
            break
        if n > 20:
            break
    hope = HOPE.search(text)
    return text[: hope.start()] if hope and text[: hope.start()].strip() else text


def without_thought(text: str) -> str:
    """The text behind the last </think>, if there is any; nothing of a thought that does not end."""
    _, _, behind = text.rpartition("</think>")
    return (behind if behind.strip() else text).partition("<think>")[0]


def sentence_end(text: str, start: int) -> int:
    """Where the sentence that holds `start` ends, in braces and formulas only where these end."""
    depth = 0
    in_formula = False
    limit = min(len(text), start + MAX_ANSWER)
    for m in PUNCTUATION.finditer(text, start, limit):
        mark = m[0]
        if mark in ("\\(", "\\[", "\\begin", "{"):
            depth += 1
        elif mark in ("\\)", "\\]", "\\end", "}"):
            depth -= 1
            if depth < 0:
                return m.start()
        elif mark in ("$", "$$"):
            in_formula = not in_formula
        elif mark == "<":
            if text.startswith("</", m.start()):
                return m.start()
        elif mark in ("\n", ".") and not depth and not in_formula:
            if mark == "\n" or not ABBREVIATION.search(text[max(0, m.start() - 8) : m.start()]):
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
    brace = re.compile(r"\\(?:boxed|fbox)\s*").match(text, start)
    if not brace:
        return None
    if text[brace.end() : brace.end() + 1] == "{":
        return braces(text, brace.end())
    word = re.compile(r"[^\s$.,]{1,100}").match(text, brace.end())
    return word[0] if word else None


def last_boxed(text: str, starts: list[int]) -> str | None:
    """The answer in the last of the boxes that begin at `starts`.

    Boxes before it that only "and", "or" or a comma parts from it belong to it.
    """
    found = None
    after = 0
    for start in reversed(starts[-MAX_ITEMS:]):
        here = boxed(text, start)
        if here is None:
            if found is None:
                continue
            break
        end = text.find("{", start) + len(here) + 2
        between = text[end:after]
        if found is None:
            found = here
        elif end > after:  # a box around the other
            continue
        elif here == found.split(", ")[0]:  # said again
            break
        elif len(between) < 80 and BETWEEN_BOXES.fullmatch(between):
            found = f"{here}, {found}"
        else:
            break
        after = start
    return found


def shortened(answer: str) -> str:
    """The number that an answer begins with, if it cannot be read with what follows."""
    number = NUMBER.match(answer)
    more = GOES_ON.match(answer, number.end()) if number else None
    return answer[: more.end(1)] if more and not readable(answer) else answer


def announced(text: str, m: re.Match, boxes: list[int]) -> str:
    """The answer behind an announcement m; boxes: where those begin that may count."""
    if BOX.match(m[0]):
        answer = last_boxed(text, boxes[: bisect.bisect_right(boxes, m.start())]) or ""
    else:
        answer = sentence(text, m.end())
        answer = last_boxed(answer, [b.start() for b in BOX.finditer(answer)]) or answer
        answer = BECAUSE.split(BEFORE.sub("", answer))[0]
        answer = ROUNDED.sub("", REMARK.sub("", BEFORE.sub("", answer))).rstrip(" \t\n.,;:*_")
    told = SUBJECT.sub("", shortened(answer)).strip()
    return told.rstrip("}") if told != answer and "{" not in told else told


def extract_answer(response: str) -> str | None:
    """The answer that a response gives to its problem, as it stands there; None if there is none."""
    text = first_problem(response[:MAX_RESPONSE])
    boxes = [m.start() for m in BOX.finditer(text)]
    places = [(p, -m.start(), m) for p, pattern in ANNOUNCEMENTS for m in pattern.finditer(text)]
    for priority in sorted({place[0] for place in places}):
        here = sorted((place for place in places if place[0] == priority), key=lambda place: place[1])
        for *_, m in here[:50]:
            answer = announced(text, m, boxes)
            if answer:
                return narrowed(answer)
    return weak_answer(text)


def prose(text: str) -> bool:
    """Whether a text is a sentence: more than three words that are no functions or units."""
    words = re.findall(r"(?<![\\a-zA-Z])[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", text))
    return sum(word.lower() not in KNOWN_WORDS for word in words) > 3


def readable(text: str) -> bool:
    """Whether a text is nothing but an answer, not a sentence around one."""
    for value, _, words, split in readings(text)[:1]:
        return not wordy(value) and not split and len(words) < 4
    return False


def is_words(value) -> bool:
    return isinstance(value, Value) and value.kind == "words"


def wordy(value) -> bool:
    """Whether there are words around a value, or many instead of one."""
    if not isinstance(value, Value):
        return False
    if value.kind == "words":
        return len(value.items) > 0 or len(value.marks) > 3
    labelled = [x for x in value.items if is_relation(x, "=") and is_words(x.items[0])]
    mixed = value.kind == "list" and len(set(map(is_words, value.items))) > 1
    return mixed or len(labelled) > 1 or any(map(wordy, value.items))


def narrowed(answer: str) -> str:
    """The last formula or number of an answer that is a sentence and cannot be read otherwise."""
    if len(answer) <= MAX_ANSWER and (readable(answer) or not prose(answer)):
        return answer
    return last_candidate(without_qed(answer)) or answer


def weak_answer(text: str) -> str | None:
    """The answer of a text that does not announce it."""
    text = BEFORE.sub("", without_qed(text))
    line = "\n" not in text
    if line and text and len(text) <= 300:
        short = len(text.split()) <= 3 and not re.search(r"[.!?,] |\b(?:is|are)\b", text)
        exclaimed = re.search(r"\bis\b.*!$", text)  # not a factorial
        if readable(text.rstrip(".")) and not exclaimed or short:
            told = TOLD.sub("", text)
            return told if re.search(r"[ap]\.m\.$", told) else told.rstrip(".")
    if line and len(text) <= 80 and re.match(r"\$.*\$\.?$", text) and not prose(text):
        return text
    if line and re.match(r"\(?[A-J][).:]\)?\s+\S", text):  # B. 12 apples
        return text
    return last_candidate(text)


def without_qed(text: str) -> str:
    return (text[:-40] + QED.sub("", text[-40:])).strip()


def last_candidate(text: str) -> str | None:
    """The formula, bold text, right side or number that ends last; of several, the longest."""
    tail = ENDED_FORMULA.sub("", text[-5000:])
    found = [(m.end(), -m.start(), m[m.lastindex]) for m in FORMULA.finditer(tail)]
    found += [(m.end(), -m.start(), m[1]) for m in BOLD.finditer(tail)]
    found += [(m.end(), -m.start(), m[0]) for m in NUMBER.finditer(tail)]
    equals = tail.rfind("=")
    last_line = tail.splitlines()[-1:]
    if equals >= 0 and last_line and equals >= len(tail) - len(last_line[0]) - 1:
        right = sentence(tail, equals + 1)
        if not re.search(r"\$(?!\d)", right) and readable(right):
            found.append((tail.find(right, equals) + len(right), -equals, right))
    if found:
        return max(found)[2].strip()
    said = re.search(r"\b(?:is|are|be)\s+([A-Za-z][\w' ]{0,40})[.!]?\s*$", tail)
    return said[1] if said else None
