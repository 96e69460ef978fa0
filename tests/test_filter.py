"""The zero-spoiler filter for free text, under fuzz: no spelling of an answer gets through, but for
those in a list of known misses, and good hints do.

    python tests/test_filter.py 20000        so many cases, and what came of them

A case is an answer of some kind, one of the spellings of that kind, and a sentence around it.
"""

import re
import sys
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toy_tasks.jsonl import ONES, TENS, spoils

HINTS = Path(__file__).with_name("good_hints.txt")


def in_words(n):
    """0 to 199 in English."""
    if n >= 100:
        return "one hundred" + (f" and {in_words(n - 100)}" if n > 100 else "")
    tens, ones = divmod(n, 10)
    return ONES[n] if n < 20 else TENS[tens - 1] + (f"-{ONES[ones]}" if ones else "")


def digits(zero):
    """Digits of another script, from the code point of its zero."""
    return lambda a: "".join(chr(ord(zero) + int(c)) if c in "0123456789" else c for c in str(a))


def spaced(text):
    """Zero-width spaces between the letters."""
    return "\u200b".join(text)


def frac(a):
    """LaTeX."""
    return rf"\frac{{{a.numerator}}}{{{a.denominator}}}"


def by_unit(spell):
    """Spell a number and keep its unit."""
    return lambda a: f"{spell(int(a.split()[0]))} {a.split()[1]}"


COMMON = {
    "as it is": str,
    "bold": lambda a: f"**{a}**",
    "LaTeX": lambda a: f"${a}$",
    "boxed": lambda a: rf"\boxed{{{a}}}",
    "brackets": lambda a: f"({a})",
    "quotes": lambda a: f"“{a}”",
    "full width": lambda a: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in str(a)),
    "verdict": lambda a: f"the answer is {a}",
    "zero width": lambda a: spaced(str(a)),
}
SCRIPTS = {
    "Arabic": digits("٠"), "Persian": digits("۰"), "Devanagari": digits("०"), "Thai": digits("๐"),
    "Bengali": digits("০"), "mathematical bold": digits("𝟎"),
}  # fmt: skip
VULGAR = {
    "1/2": "½one half", "1/4": "¼a quarter", "3/4": "¾three quarters", "1/3": "⅓one third",
    "2/3": "⅔two thirds", "1/5": "⅕one fifth", "1/8": "⅛an eighth", "3/8": "⅜three eighths",
}  # fmt: skip
UNITS = ["cm", "kg", "km/h", "m²", "°C"]
KINDS = {  # answers, and how they may be spelled beside the common ways
    "whole": (
        st.integers(0, 199),
        SCRIPTS | {
            "words": in_words, "capitals": lambda a: in_words(a).upper(),
            "title": lambda a: in_words(a).title(), "decimal": lambda a: f"{a}.0",
            "zeros": lambda a: f"0{a}", "equation": lambda a: f"x={a}",
            "text": lambda a: rf"\text{{{in_words(a)}}}", "counted": lambda a: f"{a}x",
            "percent": lambda a: f"{100 * a}%",
        },
    ),
    "large": (
        st.integers(1000, 9_999_999),
        SCRIPTS | {
            "comma": lambda a: f"{a:,}", "point": lambda a: f"{a:,}".replace(",", "."),
            "space": lambda a: f"{a:,}".replace(",", " "),
            "thin space": lambda a: f"{a:,}".replace(",", "\u202f"),
            "decimals": lambda a: f"{a}.00",
        },
    ),
    "fraction": (
        st.builds(Fraction, st.integers(1, 20), st.sampled_from([2, 3, 4, 5, 7, 8, 12])).filter(
            lambda a: a.denominator > 1
        ),
        {
            "frac": frac, "dfrac": lambda a: frac(a).replace("frac", "dfrac"),
            "slash": lambda a: f"{a.numerator} / {a.denominator}",
            "fraction slash": lambda a: f"{a.numerator}⁄{a.denominator}",
            "doubled": lambda a: f"{2 * a.numerator}/{2 * a.denominator}",
            "mixed": lambda a: f"{a // 1} {a % 1}" if a > 1 else str(a),
        },
    ),
    "vulgar": (
        st.sampled_from(sorted(VULGAR)),
        {"one sign": lambda a: VULGAR[a][0], "words": lambda a: VULGAR[a][1:]},
    ),
    "decimal": (
        st.integers(1, 9999).filter(lambda n: n % 10).map(lambda n: f"{n / 100:.2f}"),
        SCRIPTS | {
            "comma": lambda a: a.replace(".", ","), "zero": lambda a: a + "0",
            "percent": lambda a: f"{float(a) * 100:.0f}%",
            "per cent": lambda a: f"{float(a) * 100:.0f} per cent",
        },
    ),
    "negative": (
        st.integers(-99, -1),
        {
            "minus": lambda a: f"−{-a}", "en dash": lambda a: f"–{-a}",
            "word": lambda a: f"minus {in_words(-a)}", "negative": lambda a: f"negative {-a}",
            "spaced": lambda a: f"- {-a}",
        },
    ),
    "letter": (
        st.sampled_from("BCDEFGH"),
        {
            "small": lambda a: f"({a.lower()})", "option": lambda a: f"option {a}",
            "bracket": lambda a: f"{a.lower()})", "point": lambda a: f"{a}.",
            "choice": lambda a: f"Choice {a.lower()}", "text": lambda a: rf"\textbf{{{a}}}",
        },
    ),
    "unit": (
        st.builds("{} {}".format, st.integers(2, 99), st.sampled_from(UNITS)),
        {
            "tight": lambda a: a.replace(" ", ""), "words": by_unit(in_words),
            "no unit": lambda a: a.split()[0], "decimal": by_unit(lambda n: f"{n}.0"),
            "text": lambda a: rf"{a.split()[0]}\,\text{{{a.split()[1]}}}",
        },
    ),
    "angle": (
        st.integers(1, 179).map(lambda n: f"{n}°"),
        {
            "degrees": lambda a: a.replace("°", " degrees"),
            "circ": lambda a: a.replace("°", r"^\circ"),
            "words": lambda a: f"{in_words(int(a[:-1]))} degrees",
        },
    ),
    "word": (
        st.sampled_from("red triangle Paris umbrella Thursday Müller красный 东京 بيت".split()),
        {
            "capitals": str.upper, "plural": lambda a: a + "s" if a.isascii() else a,
            "soft hyphen": lambda a: a[:2] + "\u00ad" + a[2:], "decomposed": lambda a:
            unicodedata.normalize("NFD", a),
        },
    ),
    "phrase": (
        st.sampled_from(["the red circle", "New York", "left atrium", "a blue car"]),
        {
            "no article": lambda a: a.removeprefix("the ").removeprefix("a "),
            "line break": lambda a: a.replace(" ", "\n"), "hyphen": lambda a: a.replace(" ", "-"),
        },
    ),
    "expression": (
        st.sampled_from(["x+1", "2x-3", "√15", "3:2", "(2, -1)", "16π", "x=4", "a^2"]),
        {
            "spaced": lambda a: " ".join(re.findall(r"\d+|\S", a)),
            "sqrt": lambda a: r"\sqrt{15}" if a == "√15" else a,
        },
    ),
}  # fmt: skip
AROUND = [
    "{}", "there are {} of them", "it must be {}, look again", "So {} it is.",
    "{} - see the corner",
    "count until {} and stop", "first compare colours; then {}", "look\n{}\nthere",
    "сколько? {} !", "数えると {} です", "it cannot be more than {}.", "not far from {}",
]  # fmt: skip
MISSES = [  # what the filter is known not to see: (answer, text); a row that it sees is to go
    ("3", "drei Kreise"), ("3", "hay tres"), ("3", "三つ"), ("3", "III of them"), ("3", "tthree"),
    ("3", "a trio of circles"), ("7", "s e v e n"),
    ("1000", "a thousand"), ("5 cm", "50 mm"), ("8", "2^3"),
    ("16π", "1 6 π"), ("3", "the rows have ● ● ●"), ("B", "the second letter"),
    ("red", "r e d"), ("red", "rеd, with a Cyrillic e"), ("red", "rouge"), ("red", "crimson"),
    ("red", "der"), ("yes", "indeed"), ("left", "not right"), ("Thursday", "Thu"),
    ("4:40", "twenty to five"), ("120", "6!/6 of them, as 10 dozen"),
]  # fmt: skip


@st.composite
def cases(draw):
    """An answer of some kind, a spelling of it, and a sentence around it -> label, text, answer."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    answers, own = KINDS[kind]
    answer = draw(answers)
    spellings = COMMON | own
    spelling = draw(st.sampled_from(sorted(spellings)))
    text = draw(st.sampled_from(AROUND)).format(spellings[spelling](answer))
    return f"{kind}, {spelling}", text, str(answer)


def fuzz(count, derandomize=True):
    """So many cases -> how many of each label, and those that got through."""
    seen, missed = Counter(), []
    relaxed = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=count, derandomize=derandomize, **relaxed)
    @given(cases())
    def run(case):
        label, text, answer = case
        seen[label] += 1
        if not spoils(text, answer):
            missed.append(case)

    run()
    return seen, missed


def rejected():
    """Of the good hints, with plausible answers, those that the filter turns away."""
    pairs = [line.split("\t") for line in HINTS.read_text().splitlines()]
    assert len(pairs) == len({hint for hint, _ in pairs}) == 200
    return [(hint, answer) for hint, answer in pairs if spoils(hint, answer)]


def test_no_spelling_gets_through():
    """1,500 cases of the same kind as the 20,000 of the command."""
    seen, missed = fuzz(1500)
    assert not missed, missed[:5]
    assert len({label.split(",")[0] for label in seen}) == len(KINDS)


@pytest.mark.parametrize(("answer", "text"), MISSES)
def test_known_misses(answer, text):
    """What free text may still give away: a filter by rules is not a proof."""
    assert not spoils(text, answer)


def test_good_hints_pass():
    """Under 5 % of 200 hints, in words as people write them, are turned away."""
    assert len(rejected()) < 10


if __name__ == "__main__":
    count = int(sys.argv[1]) if sys.argv[1:] else 20000
    seen, missed = fuzz(count)
    print(f"{sum(seen.values())} cases, {len(seen)} spellings, {len(missed)} got through")
    for case in missed[:20]:
        print("  ", *map(repr, case))
    print(
        f"{len(MISSES)} known misses are listed; of 200 good hints {len(rejected())} are rejected"
    )
    sys.exit(bool(missed))
