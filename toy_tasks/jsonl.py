"""Answers in free text: the zero-spoiler filter."""

import re
import unicodedata
from fractions import Fraction

# ---------------------------------------------------------------------------------- the filter
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
NTHS = """zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
    thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth""".split()
TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety hundred".split()
WORDS = {
    "none": 0,
    "half": 0.5,
    "halve": 0.5,
    "quarter": 0.25,
    "once": 1,
    "single": 1,
    "pair": 2,
    "couple": 2,
    "twice": 2,
    "both": 2,
    "double": 2,
    "triple": 3,
    "dozen": 12,
    "hundredth": 100,
}
WORDS |= {word: value for names in (ONES, NTHS) for value, word in enumerate(names)}
WORDS |= {word: 10 * i for i, ten in enumerate(TENS, 1) for word in (ten, ten[:-1] + "ieth")}
WORD = "|".join(sorted(WORDS, key=len, reverse=True))  # longest first: "sixteen" before "six"
PLAIN = [
    # LaTeX: roots, fractions, degrees; then what only formats
    (r"\\sqrt *\{([^{}]*)\}", r"√\1"),
    (r"\\[dt]?frac *\{([^{}]*)\} *\{([^{}]*)\}", r" \1/\2 "),
    (r"\\[dt]?frac *(\d) *(\d)", r" \1/\2 "),
    (r"\^?\{?\\circ\}?|\bdegrees?\b", "°"),
    (r"\\(?:text|math)(?:bf|rm)?|\\(?:boxed|left|right|[,;:! ()\[\]])|[$*{}\\]", ""),
    # typography: dashes, the slash of ½, hyphens within words, white space
    ("[\u2010-\u2015\u2212]", "-"),
    ("\u2044", "/"),
    (r"(?<=[a-z])-(?=[a-z])", " "),
    (r"\s+", " "),
]
LEAKS = re.compile(
    # a verdict: "the answer is", "correct option:"
    r"\b(?:answer|solution|result|option|choice)s? ?(?:(?:is|are|was|should|must|will)\b|[=:])"
    # the result of an equation, in signs or in words: "= 7", "add up to seven", "gives (7"
    r"|(?:[=≈]|\b(?:equals?|equal to|gives?|makes?|yields?|totals?|(?:sum|add|come)s?(?: up)? to))"
    rf"(?: of)?[ (√-]*(?:\d|(?:{WORD})s?\b)"
)


def plain(text):
    r"""Lower case, common Unicode, no LaTeX: \frac{1}{2}, ½ and full-width digits become 1/2."""
    fractions = [unicodedata.decomposition(c).startswith("<fraction>") for c in text]
    text = "".join(" " * f + c for f, c in zip(fractions, text, strict=True))  # 1½ is not 11/2
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # those that do not show
    for pattern, by in PLAIN:
        text = re.sub(pattern, by, text)
    return text.strip(" .,:;")


def numbers(text):
    """All values that a plain text may name, without signs, as Fractions; too many rather than
    too few: 1,200 may be 1200, or 1.2, or 1 and 200."""
    found = set()
    text += " ; " + re.sub(r"(?<=\d) (?=\d{3}\b)", "", text)  # 1 200, too
    runs = re.findall(r"(\.?\d(?:[\d.,]*\d)?(?:e-?\d{1,2}\b)?)( ?%| ?per ?cent)?", text)
    for run, percent in runs:
        whole, decimal = run.replace(",", ""), run.replace(",", ".")
        if re.fullmatch(r"\d{1,3}(\.\d{3})+(,\d+)?", run):  # as in 1.200,5
            decimal = run.replace(".", "").replace(",", ".")
        for digits in [whole, decimal, *run.split(",")]:
            if re.fullmatch(r"\d{0,30}\.?\d{1,30}(e-?\d+)?", digits):
                found |= {Fraction(digits), Fraction(digits) / (100 if percent else 1)}
    # 3/4 and 1 3/4
    for whole, a, b in re.findall(r"(?:(\d{1,9}) )?(\d{1,9}) ?/ ?(0*[1-9]\d{0,8})", text):
        found |= {Fraction(int(a), int(b)), int(whole or 0) + Fraction(int(a), int(b))}
    # forty two, two dozen, two thirds
    for a, b in re.findall(rf"\b({WORD})s?\b(?=(?: ({WORD})s?\b)?)", text):
        x, y = Fraction(WORDS[a]), Fraction(WORDS[b or a])
        found |= {x, x + y, x * y, x / (y or 1)} if b else {x}
    # one hundred and forty two
    for run in re.findall(rf"\b(?:{WORD})(?:(?: and)? (?:{WORD}))+\b", text):
        total = Fraction(0)
        for value in map(WORDS.get, re.findall(WORD, run)):
            total = (total or 1) * 100 if value == 100 else total + Fraction(value)
        found.add(total)
    return found


def spoils(text, answer):
    """The zero-spoiler filter: may the text give the answer away? In doubt, yes.

    Caught: "the answer is", results of equations, and the answer as a word, an expression, an
    option letter or a number in any spelling. Other numbers may stay.
    """
    said = plain(text)
    secret = re.sub(r"^(?:the|an?|option|choice|answer) ", "", plain(answer).strip("() "))
    if not said:
        return False
    if r"\boxed" in text or LEAKS.search(said) or numbers(said) & numbers(secret):
        return True
    if secret in ("a", "i"):  # words as well: a letter if marked, or a capital and no article
        marked = rf"(?:option|choice|letter|answer|point|case|figure) {secret}\b|\b{secret}[).:]"
        alone = rf"\b{secret.upper()}\b(?! [a-z]| ?')|\b{secret.upper()} (?:is|fits|and|or)\b"
        return bool(re.search(marked, said) or re.search(alone, text))
    squeezed = secret.replace(" ", "")  # an expression, however it is spaced
    if re.search(r"[^\w.,%]", squeezed) and squeezed in said.replace(" ", ""):
        return True
    word = rf"(?<!\w){re.escape(secret)}(?:e?s)?(?!\w)"  # and its plural
    return not re.fullmatch(r"[\d.,]+", secret) and bool(re.search(word, said))
