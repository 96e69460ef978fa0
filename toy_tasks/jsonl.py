"""Free text: the zero-spoiler filter, rewards, counting scenes in words, problems from files.

`--data FILE.jsonl` trains on one's own pictures: one JSON object a line with `images` (a path or a
list, relative to the file), `problem`, `answer` and, if there is one, `hint`. Without it the
pictures are those of the toy, drawn large and asked for in words.
"""

import importlib
import json
import math
import random
import re
import sys
import unicodedata
import warnings
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from toy_tasks import Grade, Problem, UserError
from toy_tasks.counting import SIDE, Counting

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


# ----------------------------------------------------------------------------------- the reward
def extract(text):
    r"""What is in the last \boxed{}, else what follows the last "answer:", else None."""
    inner = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # braces in braces, as in \frac{\sqrt{2}}{2}
    found = re.findall(rf"\\boxed *\{{({inner})\}}", text)
    found = found or re.findall(r"(?i)\banswer(?: is)? ?: *(.+)", text)
    return found[-1] if found else None


def quantity(text):
    """(value, unit) of a plain text that is one number, perhaps with a name before it, or None."""
    mixed = re.search(r"(?<![\w.,/])(\d{1,9}) (\d{1,9})/([1-9]\d{0,8})\b", text)  # 2 1/2
    if mixed and int(mixed[2]) < int(mixed[3]):
        whole, a, b = map(int, mixed.groups())
        text = text.replace(mixed[0], f"{whole * b + a}/{b}")
    name, unit = r"[a-z]\w{0,9} ?= ?", r"%|°|[mglsh]\^?[23]?|[a-z]{2}[a-z /]*\^?[23]?"
    number = r"(-?) ?(\d{1,3}(?:,\d{3}){1,9}|\d{0,30})(\.\d{1,30})?(?: ?/ ?(0*[1-9]\d{0,30}))?"
    m = re.fullmatch(rf"(?:{name})?{number} ?({unit})?", text)
    if not m or not (m[2] or m[3]):
        return None
    value = Fraction(m[1] + (m[2] or "0").replace(",", "") + (m[3] or ""))
    return value / int(m[4] or 1), (m[5] or "").replace("^", "")


def matches(found, answer, tolerance=Fraction(2, 1000)):
    """Is it right? Integers exactly, other numbers within a relative tolerance, and with the same
    unit if both have one; option letters; else the same text but for case, spaces and article."""
    found, answer = plain(found), plain(answer)
    if (a := quantity(found)) and (b := quantity(answer)):
        (x, unit), (y, other) = a, b
        equal = abs(x - y) <= (tolerance * abs(y) if y.denominator > 1 else 0)
        percent = x == 100 * y if unit == "%" else other == "%" and y == 100 * x
        return (equal or percent) and (unit == other or not unit or not other)
    if letter := re.fullmatch(r"\(?([a-j])\)?", answer):
        start = rf"(?:(?:option|choice|answer) )?\(?{letter[1]}(?:[).:]|$)"
        return bool(re.match(start, found))
    found, answer = (re.sub(r"^(?:the|an?) |(?<!\w) | (?!\w)", "", t) for t in (found, answer))
    return found == answer


# ------------------------------------------------------------------------------- counting in words
ASK = "Think step by step, then give the final answer in \\boxed{}."  # the reward looks for it
PLACES = ["upper left", "upper centre", "upper right", "centre left", "centre",
          "centre right", "lower left", "lower centre", "lower right"]  # fmt: skip
CELL = 67  # pixels along a cell of a counting scene: 335 along the picture


class FreeText:
    """A task whose answers are free text. Poses counting scenes, with known places of the matches.

    Reward: 0.1 for an answer in \\boxed{} or after "answer:", 0.9 if it is right (`solved`).
    An answer that ran into the length limit gets 0.
    """

    held_out = math.inf

    def __init__(self, max_tokens=512, reward=None, difficulty=1.0):
        """reward: one's own, as `module:function`."""
        self.max_tokens = max_tokens
        self.reward = load_reward(reward) if reward else None
        self.scenes = Counting(difficulty, CELL)

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
        boxes = [scene.boxes[cell] for cell in scene.targets]
        targets = sorted({place(box, CELL * SIDE) for box in boxes})
        return Problem(scene.images, question, scene.answer, steps, targets)

    def grade(self, problem, text, finished):
        """Reward and verdict; a float from one's own reward function counts as solved from 0.5."""
        if not finished:  # what it ends with is an accident, not an answer
            return Grade(0.0, False, None)
        if self.reward is None:
            found = extract(text)
            solved = found is not None and matches(found, problem.answer)
            return Grade(0.1 * (found is not None) + 0.9 * solved, solved, None)
        result = self.reward(problem, text)
        reward, solved = result if isinstance(result, tuple) else (result, result >= 0.5)
        if not math.isfinite(reward):
            raise UserError(f"--reward gave {reward} for {text!r}; it must be a finite number")
        return Grade(float(reward), bool(solved), None)

    def hint_text(self, regions, steps, solution=""):
        """Where to look, what to ignore, which steps; the answer in the baseline that gives it."""
        where = f"Look closely at: {'; '.join(regions)}. Ignore the rest." if regions else ""
        spoiler = f"The answer is {solution}." if solution else ""
        return " ".join(part for part in (where, steps, spoiler) if part)


def place(box, edge):
    """Which of the nine places of a square picture holds the centre of a box."""
    left, top, right, bottom = box
    column, row = (int(3 * (a + b) / 2 / edge) for a, b in ((left, right), (top, bottom)))
    return 3 * row + column


def load_reward(name):
    """`module:function` -> function(problem, text), which returns a reward or (reward, solved)."""
    sys.path.append(".")  # the module may lie where the command is given
    try:
        module, function = name.split(":")
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--reward {name}: {error}; give it as module:function") from error


# ---------------------------------------------------------------------------------- data from files
STEPS = "Name what is asked for, read it off the picture part by part, and check each part again."


def open_picture(path, check=False):
    """RGB on white, turned as its EXIF data says; ValueError says why a file cannot be used."""
    try:
        with warnings.catch_warnings():  # a small file may unpack to gigabytes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path)
            if max(picture.size) > 200 * min(picture.size):
                raise ValueError("one side is more than 200 times the other")
            if check:
                return picture.verify()  # quick; what it misses shows when the picture is used
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except Exception as error:  # PIL raises a dozen kinds on broken files
        empty = path.is_file() and not path.stat().st_size
        reason = "the file is empty" if empty else error
        raise ValueError(f"picture {path.name}: {reason}; mend it or drop the line") from error
    # Many diagrams are black lines on nothing, and nothing would turn black.
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


@lru_cache(2)
def epoch_order(n, seed, epoch):
    """In which order an epoch takes n problems."""
    order = list(range(n))
    random.Random(f"epoch/{seed}/{epoch}").shuffle(order)
    return order


class JsonlTask(FreeText):
    """Problems from JSON lines. All lines are checked before a model is loaded."""

    def __init__(self, path, eval_path, columns=(), allow_outside=False, **how):
        """columns: what is named otherwise, as {"problem": "question"}."""
        super().__init__(**how)
        self.columns = {c: c for c in ("images", "problem", "answer", "hint")} | dict(columns)
        self.allow_outside = allow_outside
        # Rows are kept, pictures are not: they are read again when their turn comes.
        self.rows, self.eval_rows = self.read(Path(path)), self.read(Path(eval_path))
        self.held_out = len(self.eval_rows)

    def read(self, path):
        """Every line of a file as a checked row; the first bad one ends it with file and line."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; --data and --eval-data take JSON lines")
        rows = []
        # Bytes are split, not text: a string in JSON may hold other line ends, and other encodings.
        for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                if line.strip():
                    row = self.check(json.loads(line.decode("utf-8-sig")), path.parent)
                    rows.append(row | {"line": f"{path}:{n}"})
            except (ValueError, OSError, RecursionError) as error:
                raise UserError(f"{path}:{n}: {error}") from error
        if not rows:
            raise UserError(f"{path}:1: the file is empty; write one JSON object a line")
        return rows

    def check(self, row, folder):
        """A row under our names, with whole paths. ValueError: what is wrong, how to mend it."""
        if not isinstance(row, dict):
            raise ValueError('not an object; write {"images": ..., "problem": ..., "answer": ...}')
        for name, column in self.columns.items():
            if column not in row and name != "hint":
                raise ValueError(f"no {column!r} among {', '.join(row)}; name the {name} column")
        row = {name: row.get(column) for name, column in self.columns.items()}  # others are ignored
        images = [row["images"]] if isinstance(row["images"], str) else row["images"]
        if not isinstance(images, list) or not {str}.issuperset(map(type, images)) or not images:
            raise ValueError("images is no path and no list of paths; give at least one")
        # Pictures come before the question in every prompt, so marks of their places go.
        for name in ("problem", "answer", "hint"):
            if not isinstance(row[name], str | int | float | None):
                raise ValueError(f"{name} is neither text nor number; write it as a string")
            row[name] = "" if row[name] is None else str(row[name]).replace("<image>", "").strip()
            if not row[name] and name != "hint":
                raise ValueError(f"{name} is empty; fill it in or drop the line")
        # Links are followed first: data from elsewhere shall not make this program read any file.
        row["images"] = [(folder / image).resolve() for image in images]
        for image in row["images"]:
            if not self.allow_outside and not image.is_relative_to(folder.resolve()):
                raise ValueError(f"{image} is outside {folder}; move it or use --allow-outside")
            open_picture(image, check=True)
        return row | {"answer": extract(row["answer"]) or row["answer"]}

    def problem(self, split, seed, index):
        """Training walks epochs, each in an order from (seed, epoch); the rest is in file order.

        Layers are calibrated on counting scenes: only there it is known where to look.
        """
        if split == "calibration":
            return super().problem(split, seed, index)
        rows = self.rows if split == "train" else self.eval_rows
        epoch, at = divmod(index, len(rows))
        row = rows[epoch_order(len(rows), seed, epoch)[at] if split == "train" else at]
        try:
            pictures = [open_picture(image) for image in row["images"]]
        except ValueError as error:
            raise UserError(f"{row['line']}: {error}") from error
        return Problem(pictures, f"{row['problem']}\n{ASK}", row["answer"], row["hint"] or STEPS)


def text_task(config):
    """The task of a run with --model."""
    how = {"max_tokens": config.max_tokens, "reward": config.reward}
    how["difficulty"] = config.difficulty
    if config.hint == "votes":
        raise UserError("--hint votes: answers in free text name no regions; take attention")
    if bool(config.data) != bool(config.eval_data):
        raise UserError("--data and --eval-data belong together: give both, or neither")
    if not config.data:
        return FreeText(**how)
    if config.hint == "oracle":
        raise UserError("--hint oracle: files do not say where to look; take attention or random")
    pairs = [pair.split("=") for pair in config.columns.split(",") if pair]
    if any(len(p) != 2 or p[0] not in ("images", "problem", "answer", "hint") for p in pairs):
        raise UserError(f"--columns {config.columns}: write images=NAME,problem=NAME,answer=NAME")
    return JsonlTask(config.data, config.eval_data, pairs, config.allow_outside, **how)
