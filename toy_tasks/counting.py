"""Count by pointing: "how many red circles ?" on a cluttered picture, `r0c1 r2c3 r4c0 total 3`.

An answer points, then counts; only the number is rewarded. As the true cells are known, three
things can be measured that a benchmark cannot: whether the points are right, whether a number is
right for the right reason, and whether a hint looks at the right places.

The base is warm-started (toy_tasks/warm_start.py) so that its weakness is real and has a cause
that can be told. On its own it *glances*: it names a few matches, slips in a near miss, and guesses
a small number. With a hint it does as it is told: it checks the listed cells, compares colour and
shape, and counts its marks. Alone it saw a number that follows from the points on calm pictures
only, never on crowded ones: reward leads from the one habit to the other slowly, a tutor quickly.
"""

import math
import random
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw

from tiny_vlm import TinyVLM
from toy_tasks import Grade, Problem

COLOURS = dict(red=(222, 60, 50), green=(60, 180, 75), blue=(60, 90, 220), yellow=(235, 200, 50))
SHAPES = ("circles", "squares", "crosses")
SIDE = 5
CELLS = [f"r{row}c{column}" for row in range(SIDE) for column in range(SIDE)]
NUMBERS = [str(n) for n in range(13)]
STEPS = "steps compare colour and shape ignore near misses"
WORDS = ["<eos>", *"how many ? describe total look answer".split(), *STEPS.split(), *NUMBERS,
         *COLOURS, *SHAPES, *CELLS]  # fmt: skip


@dataclass
class Scene(Problem):
    """A problem with what was drawn: cell -> (colour, shape), and cell -> box in pixels."""

    objects: dict = field(default_factory=dict)
    boxes: dict = field(default_factory=dict)


def draw(objects, noise, rng, cell=8):
    """Draw objects on a grid of `cell`-pixel cells, jittered, at varying brightness, under noise.

    Returns the RGB picture and the box of each object, (left, top, right, bottom) in pixels.
    """
    unit, boxes = cell / 8, {}
    picture = Image.new("RGB", (SIDE * cell, SIDE * cell), (28, 28, 32))
    pen = ImageDraw.Draw(picture)
    for at, (colour, shape) in objects.items():
        x = at % SIDE * cell + rng.randint(0, 1) * unit
        y = at // SIDE * cell + rng.randint(0, 1) * unit
        ink = tuple(int(v * rng.uniform(0.8, 1)) for v in COLOURS[colour])
        end, middle, thick = 7 * unit - 1, 3 * unit, max(1, round(unit))
        boxes[at] = (x, y, x + end, y + end)
        if shape == "circles":
            pen.ellipse(boxes[at], fill=ink)
        elif shape == "squares":
            pen.rectangle(boxes[at], outline=ink, width=thick)
        else:
            pen.line([x + middle, y, x + middle, y + end], fill=ink, width=2 * thick)
            pen.line([x, y + middle, x + end, y + middle], fill=ink, width=2 * thick)
    speckle = Image.frombytes("RGB", picture.size, rng.randbytes(3 * (SIDE * cell) ** 2))
    return Image.blend(picture, speckle, noise), boxes


class Counting:
    """The task. difficulty 0: few objects on a clean picture; 1: as in the README."""

    max_tokens, held_out = 14, math.inf
    base = "toy_tasks/base.safetensors"

    def __init__(self, difficulty=1.0, cell=8):
        self.cell = cell
        self.matches = (3, min(8, 3 + round(5 * difficulty)))
        self.others = tuple(min(17, round(n * difficulty)) for n in (8, 12))
        self.noise = min(0.6, 0.25 * difficulty)

    def new_policy(self, seed):
        """An untrained model that knows this task's words."""
        torch.manual_seed(seed)
        return TinyVLM(WORDS, CELLS, SIDE)

    def problem(self, split, seed, index):
        """A function of (split, seed, index) alone: the splits never share a scene by design."""
        rng = random.Random(f"{split}/{seed}/{index}")
        return self.scene(rng, rng.randint(*self.matches), rng.randint(*self.others))

    def scene(self, rng, matches, others):
        """A scene with so many matches of the question and so many others, 2 of 3 near misses."""
        asked = colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        cells = rng.sample(range(SIDE * SIDE), matches + others)
        objects = dict.fromkeys(cells[:matches], asked)
        for cell in cells[matches:]:
            unlike = [c for c in COLOURS if c != colour], [s for s in SHAPES if s != shape]
            other = [rng.choice(traits) for traits in unlike]
            near = rng.randrange(3)  # 0: same colour, 1: same shape, 2: neither
            if near < 2:
                other[near] = asked[near]
            objects[cell] = tuple(other)
        picture, boxes = draw(objects, self.noise, rng, self.cell)
        question, targets = f"how many {colour} {shape} ?", sorted(cells[:matches])
        return Scene([picture], question, str(matches), STEPS, targets, objects, boxes)

    def grade(self, problem, text, finished):
        """Solved if it ended, and in the right number; points are measured, never rewarded."""
        words = text.split()
        total, number = ["", "", *words][-2:]
        named = [CELLS.index(w) for w in words if w in CELLS]
        solved = finished and total == "total" and number == problem.answer
        return Grade(float(solved), solved, named)

    def hint_text(self, regions, steps, solution=""):
        """`look r0c1 ... steps ...`; or the spoiler `answer 3`."""
        look = f"look {' '.join(regions)} " if regions else ""
        return f"answer {solution}" if solution else look + steps
