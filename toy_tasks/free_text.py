"""Free text: grading, the spoiler rule, counting scenes asked for in words, problems from files.

docs/data.md describes the format of the files, what is checked, and the rules of grading.
"""

import json
import logging
import math
import pkgutil
import random
import re
import sys
import unicodedata
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import current_thread, main_thread

from PIL import Image, ImageOps

from toy_tasks import Grade, Problem, UserError
from toy_tasks.counting import SIDE, Counting

ASK = "Think step by step, then give the final answer in \\boxed{}."
STEPS = "Name what is asked for, go through what is given part by part, and check each part again."
PLACES = [f"{a} {b}" for a in ("upper", "centre", "lower") for b in ("left", "centre", "right")]
PLACES[4] = "centre"
# What brings answers to a common spelling: signs, then patterns and what replaces them, in turn.
SIGNS = str.maketrans({"−": "-", "–": "-", "⁄": "/", "≈": "=", "π": "\\pi ", "∞": "\\infty "})
SPELLINGS = [
    (r"(?<!\\)\\[,;:! ()\[\]$]|[`~\"“”$€£¥\u00ad\u200b-\u200f]|\*\*(?!\d)|\B\*\*", ""),
    (r"(?<=\d)(?:\{,}|[, ])(?=\d{3}(?!\d)[^)\]}]*$)", ""),  # 1,200, but not (1,200)
    (r"(?<=[\d}])\s*(?:\^\s*{?\s*\\circ\s*}?|\\degree|\bdeg(?:ree)?s?\b|°)", ""),
    (r"^(?:\\approx|about|approximately|(?:the|an?)(?= (?!and)[a-z]{3})) ", ""),
    (r"\\(?:text|math|mbox)(?:bf|rm|it)?\s*{((?:[^{}]|{[^{}]*})*)}", r" \1 "),
    (r"(?:√|\\?sqrt) ?(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}"),
    (r"(?<![\\a-z])pi(?![a-z])", r"\\pi "),
    (r"(\d+) (\d+)/(\d+)", r"(\1+\2/\3)"),
    (r" ?(?:\\times|\\cdot|[×*]) ?10 ?\^ ?{?(-?\d{1,3})}?(?! ?[-+*/(\\])", r"e\1"),
    (r" ?(?:\\%|per ?cent(?:age)?|\bpct\b)", "%"),
    (r"(?<=\d )(?:square|sq) (\w+)", r"\1^2"),
]
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
SPELLINGS += [(rf"\b{word}\b", str(value)) for value, word in enumerate(WORDS)]
# Units that an answer may leave out or add. Commas separate units, spaces the names of a unit.
UNITS = """mm millimeter, cm centimeter centimetre 厘米, m meter metre 米, km kilometer, mi mile,
g gram, kg kilogram 千克, mg, lb pound, in inch inches, ft foot feet, yd yard, h hr hour, day, week,
month, year, min minute 分钟, s sec second 秒, mL, L liter litre 升, C celsius, F, K, 度, rad, m/s,
km/h, mph, N newton, J joule, kJ, W watt, kW, V volt, A, Ω ohm, Hz, Pa, mol, dollar, 元, unit"""
UNIT_OF = {name: unit.split()[0] for unit in UNITS.split(",") for name in unit.split()}
UNIT = rf"(.*?)(?:(?<=[\d)}}i]) ?({'|'.join(UNIT_OF)})s?(?: ?\^{{?([23])}}?)?)?"
# "B", "(B)", "B. 12 cm" and what follows it; no letter in "(A) or (B)", "A. B.", "(A) is wrong".
OPTION = r"(?:(?:option )?\(?([A-J])(?:[).:]+(?! *(?:or|is|not|[,/])|.*\b[A-J][).:]) *|$))?(.*)"
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?"
# Text: three letters in a row, letters alone, a script without spaces, two times or ratios.
TEXT = r"(?m)[^\W\d_]{3}|^[a-zA-Z]+$|[\u0400-\u1fff\u3040-\uffff]|:.*\n.*:"
# What math-verify takes too long for: powers of powers and of sums, large, long and deep terms.
POWERS = r"\^[^()]*\)\^|}}\^|\^\(|\^{(?!-?\\frac{\d}{\d}})[^}]*[\^*({\\]|[)}]\^\D?\d\d"
TERMS = r"\^\D{,2}\d{3}|.{200}|!|(?<!_)\d \d|([({[][^])}]*){6}|\\(sum|prod|int|lim|binom|cup.*cup)"
BOX = r"(?:[^{}]|{(?:[^{}]|{(?:[^{}]|{(?:[^{}]|{(?:[^{}]|{[^{}]*})*})*})*})*})*"  # five deep
SAID = r"(?is)^.*(?:<answer>|(?:\banswer|答案)[*_\s]*(?:is\b|是|[:：]))[*_\s:：]*(\S.*?)(?:</|\n|$)"
# What tells an answer in a hint: the word, or the result of an equation.
VERDICT = r"\\boxed|\b(?:answer|solution|result|option|choice)s? ?(?:(?:is|are)\b|[=:])|答案|答え"
RESULT = r"(?:=|\b(?:equals?|equal to|gives?|makes?|yields?|up to|comes to)) *\(?-?(?:\\\w+{)?\d"


def plain(text):
    """An answer in the common spelling, without what only formats it."""
    # Before NFKC, which would turn x² into x2 and 2½ into 21/2.
    text = re.sub("(?=[¼-¾⅐-⅞])", " ", re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", text))
    text = " ".join(unicodedata.normalize("NFKC", text).translate(SIGNS).split())
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
    return " ".join(text.split()).strip(" ,;:。*_").rstrip("\\.")


def parts(answer):
    """The option letter, the value and the unit of an answer; "" for what it does not have."""
    letter, value = re.fullmatch(OPTION, plain(answer), re.IGNORECASE).groups("")
    value, unit, power = re.fullmatch(UNIT, value).groups("")
    return letter.upper(), value, UNIT_OF.get(unit, "") + power


@lru_cache(10_000)
def matches(answer, gold):
    """Whether an answer is right, by the rules of docs/data.md; never if over 400 characters."""
    if max(len(answer), len(gold)) > 400:
        return False
    # Another letter or unit is wrong whatever the value. What only one side has does not matter.
    letter, answer, unit = parts(answer)
    gold_letter, gold, gold_unit = parts(gold)
    if (letter and gold_letter not in ("", letter)) or (unit and gold_unit not in ("", unit)):
        return False
    if not answer or not gold:
        return letter == gold_letter != ""
    if (answer + gold).count("=") == 1:  # "x = 5" for 5
        answer = re.sub(r"^\D*= *", "", answer)
        gold = re.sub(r"^\D*= *", "", gold)
    if re.fullmatch(NUMBER, answer) and re.fullmatch(NUMBER, gold):
        return float(answer) == float(gold)
    # Words are compared as words: to the library, letters are variables that may change places.
    both = f"{answer}\n{gold}"
    if re.search(TEXT, re.sub(r"\\[a-zA-Z]+|\band\b", "", both)):
        return answer.casefold().replace(" ", "") == gold.casefold().replace(" ", "")
    if re.search(f"{POWERS}|{TERMS}", both) or not find_spec("math_verify"):
        return False
    import math_verify as library

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Units are ours: the library takes the t of 5t for one. Its clock needs the main thread.
    rules = library.parser.NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    how = [library.LatexExtractionConfig(normalization_config=rules)]
    answer = library.parse(f"${answer}$", how, "no_fallback", parsing_timeout=None)
    gold = library.parse(f"${gold}$", how, "no_fallback", parsing_timeout=None)
    seconds = 2 if current_thread() is main_thread() else None
    return library.verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=seconds)


def extract(text):
    r"""The answer in the last \boxed{}, else in <answer>, or after "answer is" or "answer:".

    Different boxes on the last line are a hedge and come as "3 or 5"; None if there is no answer.
    """
    last_line = text[text.rfind("\n", 0, text.rfind("\\boxed") + 1) + 1 :]
    found = re.findall(rf"\\boxed\s*{{({BOX})}}", last_line) or re.findall(SAID, text)
    return " or ".join(dict.fromkeys(found)) if found else None


def spoils(text, answer):
    """Whether a hint may give an answer away; in doubt it does.

    Caught, in any case: a box; "the answer is", "correct option:", 答案; the result of an equation,
    as "= 7", "gives 7", "add up to seven"; and the answer itself. A number is found in digits, as
    1,200 or 12.0, and as a word up to twelve; a letter as a lone capital, (b), b) or "option b"; a
    word or phrase with its plural; an expression, or a word in a script without spaces, anywhere.
    Missed: synonyms, other languages, other forms of a value (75% or 3/4 for 0.75), number words
    above twelve, ordinals and dozens, values to be worked out ("90 - 60" for 30), and elimination
    ("A, C and D cannot be right").
    """
    hint = plain(text)
    low = hint.casefold()
    letter, value, _ = parts(answer)
    marked = rf"(?i:\({letter}\)|(?<!\w){letter}[).:]|(?:option|choice) {letter}\b)"
    alone = rf"(?<![A-Za-z]){letter}(?![A-Za-z'])(?! [a-z])|{letter} (?:is|fits)\b"
    if re.search(f"{VERDICT}|{RESULT}", low) or (letter and re.search(f"{marked}|{alone}", hint)):
        return True
    if re.fullmatch(NUMBER, value):
        return abs(float(value)) in map(float, re.findall(r"\d+(?:\.\d+)?", low))
    value = value.casefold()
    if re.search(r"[^\w ]|[^\x00-\x7f]", value):
        return value.replace(" ", "") in low.replace(" ", "")
    return bool(value and re.search(rf"(?<!\w){value}(?:e?s)?(?!\w)", low.replace("-", " ")))


def open_picture(path, check=False):
    """A picture in RGB, on white, turned as its EXIF data says; check decodes no pixels.

    Raises ValueError with the reason if the file cannot be used.
    """
    try:
        with warnings.catch_warnings():
            # PIL only warns of gigabytes in a small file.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path)
        if max(picture.size) > 200 * min(picture.size):
            raise ValueError("one side is more than 200 times the other")
        if check:
            return picture.verify()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":  # 16 bits and more, which PIL would clip to white or black
            low, high = picture.convert("F").getextrema()
            if not math.isfinite(high - low):
                raise ValueError("it holds infinite or undefined values")
            scale = 255.5 / (high - low or 1)
            picture = picture.convert("F").point(lambda value: (value - low) * scale).convert("L")
        # Many diagrams are black lines on nothing, and nothing would turn black.
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    except Exception as error:  # PIL raises a dozen kinds on broken files
        raise ValueError(f"picture {str(path)[-60:]}: {error!s:.150}; mend or drop it") from error


class FreeText:
    """A task answered in free text; it poses counting scenes, with the places of their matches.

    The reward is 0.1 for an answer that is found and 0.9 more if it is right, or that of one's own
    function of (problem, text), named as `module:function`. An unfinished answer gets 0.
    """

    def __init__(self, max_tokens=512, reward=None, difficulty=1.0):
        self.max_tokens = max_tokens
        self.held_out = math.inf
        self.reward = reward
        self.scenes = Counting(difficulty, 67)  # pixels along a cell: 335 along the picture
        sys.path.append(".")  # the module may lie where the command is given
        try:
            self.function = pkgutil.resolve_name(reward) if reward else None
        except Exception as error:
            raise UserError(f"--reward {reward}: {error}; give it as module:function") from error

    def problem(self, split, seed, index):
        """The scene that the toy poses for (split, seed, index), drawn large."""
        return self.put(self.scenes.problem(split, seed, index))

    def put(self, scene):
        """A scene of the toy as a problem in words, with the places of its matches."""
        colour, shape = scene.question.split()[2:4]
        question = f"How many {colour} {shape} are in the picture?\n{ASK}"
        steps = (
            f"Go through the picture row by row. Mark an object if its colour is {colour} and its "
            f"shape is that of the {shape}. Leave out near misses. Then count the marks."
        )
        third = [0, 0, 1, 2, 2]  # of the picture, that holds the centre of a row or column
        places = {3 * third[cell // SIDE] + third[cell % SIDE] for cell in scene.targets}
        return Problem(scene.images, question, scene.answer, steps, sorted(places))

    def grade(self, problem, text, finished):
        """Grade an answer; UserError if one's own reward function fails."""
        if not finished:  # what it ends with is an accident, not an answer
            return Grade(0.0, False, None)
        if self.function is None:
            found = extract(text)
            solved = found is not None and matches(found, problem.answer)
            return Grade(0.1 * (found is not None) + 0.9 * solved, solved, None)
        try:
            result = self.function(problem, text)
            reward, solved = result if isinstance(result, tuple) else (result, result)
            if not math.isfinite(reward):
                raise ValueError(f"{reward} is not a finite number")
            return Grade(float(reward), bool(solved >= 0.5), None)
        except Exception as error:
            raise UserError(f"--reward {self.reward} failed: {error!r:.200}") from error

    def hint_text(self, regions, steps, solution=""):
        """Where to look, what to ignore, which steps; the answer in the baseline that gives it."""
        where = f"Look closely at: {'; '.join(regions)}. Ignore the rest." if regions else ""
        spoiler = f"The answer is {solution}." if solution else ""
        return " ".join(part for part in (where, steps, spoiler) if part)


@lru_cache(2)  # to shuffle a long file anew for each problem would cost more than a step
def order(count, seed, epoch):
    """In which order an epoch of training takes the lines of a file."""
    lines = list(range(count))
    random.Random(f"epoch/{seed}/{epoch}").shuffle(lines)
    return lines


class JsonlTask(FreeText):
    """Problems from JSON lines. All lines are checked when the files are read."""

    def __init__(self, path, eval_path, max_tokens=512, reward=None, difficulty=1.0):
        super().__init__(max_tokens, reward, difficulty)
        if not reward and not find_spec("math_verify"):
            raise UserError("--data needs math-verify: pip install math-verify, or give --reward")
        self.rows = self.read(Path(path))
        self.eval_rows = self.read(Path(eval_path))
        self.held_out = len(self.eval_rows)

    def read(self, path):
        """The checked rows of a file; UserError names the first bad line."""
        rows = []
        n = 1
        try:
            # Bytes are split, not text: a string in JSON may hold other line ends.
            for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
                if line.strip() or not rows:  # an empty file has no good first line
                    row = self.check(line.decode("utf-8-sig"), path.parent)
                    rows.append(row | {"line": f"{path}:{n}"})
        except Exception as error:
            raise UserError(f"{path}:{n}: {error!s:.250}; see docs/data.md") from error
        return rows

    def check(self, line, folder):
        """A row with whole paths; an exception says what is wrong."""
        # Numbers stay as they are written; the NaN of pandas counts as missing.
        row = json.loads(line, parse_int=str, parse_float=str, parse_constant=lambda name: None)
        problem, answer, hint = (row.get(name) or "" for name in ("problem", "answer", "hint"))
        images = row.get("images") or []
        images = [images] if isinstance(images, str) else images
        for text in [problem, answer, hint, *images]:
            if not isinstance(text, str) or re.search(r"<\|.*?\|>|[\ud800-\udfff]", text):
                raise ValueError(f"{text!r:.60} is no text, or has model tokens or half characters")
        marks = problem.count("<image>")
        if not problem.strip() or marks not in (0, len(images)) or "<image>" in answer + hint:
            raise ValueError("problem is missing, or <image> marks are not as many as pictures")
        # Without its wrapping. If even the true answer were graded wrong, as a very long one is,
        # no answer could ever be solved: better to hear of it now than after hours.
        answer = (extract(answer) or answer.rpartition("####")[2]).strip()
        if not self.reward and not matches(extract(f"\\boxed{{{answer}}}") or "", answer):
            raise ValueError(f"answer {answer!r:.60} could never be graded right; mend or drop it")
        for image in images:
            open_picture(folder / image, check=True)
        paths = [folder / image for image in images]
        return {"problem": problem, "answer": answer, "hint": hint, "images": paths}

    def problem(self, split, seed, index):
        """Training walks epochs, each in an order from (seed, epoch); the rest is in file order.

        Layers are calibrated on counting scenes: only there it is known where to look.
        """
        if split == "calibration":
            return super().problem(split, seed, index)
        rows = self.rows if split == "train" else self.eval_rows
        epoch, at = divmod(index, len(rows))
        if split == "train":
            at = order(len(rows), seed, epoch)[at]
        row = rows[at]
        # Opened when it is used: the pictures of a whole file would not fit into memory.
        try:
            pictures = [open_picture(image) for image in row["images"]]
        except ValueError as error:
            raise UserError(f"{row['line']}: {error}") from error
        return Problem(pictures, f"{row['problem']}\n{ASK}", row["answer"], row["hint"] or STEPS)
