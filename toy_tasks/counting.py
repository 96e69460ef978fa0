"""Count by pointing: "how many red circles ?" on a cluttered picture, `r0c1 r2c3 r4c0 total 3`.

An answer points, then counts. Only the number is rewarded. As the true cells are known, three
things can be measured that a benchmark cannot: whether the points are right, whether a number is
right for the right reason, and whether a hint looks at the right places.

experiments/warm_start.py tells how the base was taught, and why it fails alone.
"""

import math
import random
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw

from tiny_vlm import TinyVLM
from toy_tasks import Grade, Problem

COLOURS = {
    "red": (222, 60, 50),
    "green": (60, 180, 75),
    "blue": (60, 90, 220),
    "yellow": (235, 200, 50),
}
SHAPES = ("circles", "squares", "crosses")
SIDE = 5
CELLS = [f"r{row}c{column}" for row in range(SIDE) for column in range(SIDE)]
NUMBERS = [str(n) for n in range(13)]
STEPS = "steps compare colour and shape ignore near misses"
WORDS = ["<eos>", *"how many ? describe total look answer".split(), *STEPS.split()]
WORDS += [*NUMBERS, *COLOURS, *SHAPES, *CELLS]


@dataclass
class Scene(Problem):
    """A problem with what was drawn: cell -> (colour, shape), and cell -> box in pixels."""

    objects: dict = field(default_factory=dict)
    boxes: dict = field(default_factory=dict)


def draw(objects, noise, rng, cell=8):
    """Draw objects on a grid of `cell`-pixel cells, jittered, at varying brightness, under noise.

    Returns the RGB picture and the box of each object, (left, top, right, bottom) in pixels.
    """
    unit = cell / 8
    end = 7 * unit - 1
    middle = 3 * unit
    boxes = {}
    picture = Image.new("RGB", (SIDE * cell, SIDE * cell), (28, 28, 32))
    pen = ImageDraw.Draw(picture)
    for at, (colour, shape) in objects.items():
        # No two pictures of an object are alike, so pixels cannot be learned by heart.
        x = at % SIDE * cell + rng.randint(0, 1) * unit
        y = at // SIDE * cell + rng.randint(0, 1) * unit
        ink = tuple(int(value * rng.uniform(0.8, 1)) for value in COLOURS[colour])
        boxes[at] = (x, y, x + end, y + end)
        if shape == "circles":
            pen.ellipse(boxes[at], fill=ink)
        elif shape == "squares":
            pen.rectangle(boxes[at], outline=ink, width=max(1, round(unit)))
        else:
            width = 2 * max(1, round(unit))
            pen.line([x + middle, y, x + middle, y + end], fill=ink, width=width)
            pen.line([x, y + middle, x + end, y + middle], fill=ink, width=width)
    speckle = Image.frombytes("RGB", picture.size, rng.randbytes(3 * (SIDE * cell) ** 2))
    return Image.blend(picture, speckle, noise), boxes


class Counting:
    """The task. difficulty 0: few objects on a clean picture; 1: as in the README."""

    max_tokens = 14
    held_out = math.inf

    def __init__(self, difficulty=1.0, cell=8):
        self.cell = cell
        self.matches = (3, min(8, 3 + round(5 * difficulty)))
        self.others = (min(17, round(8 * difficulty)), min(17, round(12 * difficulty)))
        self.noise = min(0.6, 0.25 * difficulty)

    def new_policy(self, seed):
        """An untrained model that knows the words of this task."""
        torch.manual_seed(seed)
        return TinyVLM(WORDS, CELLS, SIDE)

    def problem(self, split, seed, index):
        """A scene that depends on the three alone, so no two splits share one by design."""
        rng = random.Random(f"{split}/{seed}/{index}")
        return self.scene(rng, rng.randint(*self.matches), rng.randint(*self.others))

    def scene(self, rng, matches, others):
        """A scene with so many matches of the question and so many others, 2 of 3 near misses."""
        colour = rng.choice(list(COLOURS))
        shape = rng.choice(SHAPES)
        # Matches and others share no cell, so a cell is right or wrong, nothing between.
        cells = rng.sample(range(SIDE * SIDE), matches + others)
        objects = dict.fromkeys(cells[:matches], (colour, shape))
        for cell in cells[matches:]:
            other_colour = rng.choice([c for c in COLOURS if c != colour])
            other_shape = rng.choice([s for s in SHAPES if s != shape])
            # A near miss has the colour or the shape: one glance at either is not enough.
            kinds = [(colour, other_shape), (other_colour, shape), (other_colour, other_shape)]
            objects[cell] = kinds[rng.randrange(3)]
        picture, boxes = draw(objects, self.noise, rng, self.cell)
        question = f"how many {colour} {shape} ?"
        targets = sorted(cells[:matches])
        return Scene([picture], question, str(matches), STEPS, targets, objects, boxes)

    def grade(self, problem, text, finished):
        """Solved if it ended, and in the right number. Points are measured, never rewarded."""
        words = text.split()
        named = [CELLS.index(word) for word in words if word in CELLS]
        solved = finished and words[-2:] == ["total", problem.answer]
        return Grade(float(solved), solved, named)

    def hint_text(self, regions, steps, solution=""):
        """`look r0c1 ... steps ...`, or the spoiler `answer 3`."""
        if solution:
            return f"answer {solution}"
        look = f"look {' '.join(regions)} " if regions else ""
        return look + steps

    def mistakes(self, problem, words):
        """Which words of an answer are wrong, given the words before them.

        A cell is wrong if it holds no match, or was named. `total` is wrong while matches remain.
        A number is wrong unless it is the number of cells named. Other words are not judged.
        """
        named = set()
        marks = []
        for word in words:
            wrong = False
            if word in CELLS:
                cell = CELLS.index(word)
                wrong = cell not in problem.targets or cell in named
                named.add(cell)
            elif word == "total":
                wrong = not named.issuperset(problem.targets)
            elif word in NUMBERS:
                wrong = word != str(len(named))
            marks.append(wrong)
        return marks

    def ways(self, problem):
        """Right answers that the lessons choose among: one for each cell to begin with."""
        return len(problem.targets)
