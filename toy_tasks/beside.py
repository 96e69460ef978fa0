"""A second task: what stands to the right of the red cross? `r2c3 r2c4 is blue squares`.

It shows what a task has to bring and that the trainer knows none: `--toy --task beside`.
Drawing is Counting's; questions, answers, grades, hints and words are its own. The base
glances here too: alone it points at any object of the colour or shape asked for and guesses its
neighbour; with a hint it looks for the right one among the listed cells and reads its neighbour.
"""

import random

import torch

from tiny_vlm import TinyVLM
from toy_tasks import Grade
from toy_tasks.counting import CELLS, COLOURS, SHAPES, SIDE, Counting, Scene, draw

STEPS = "steps find colour and shape then look right"
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
WORDS = ["<eos>", *"what is beside ? describe answer none".split(), *STEPS.split(), *COLOURS,
         *SHAPES, *CELLS]  # fmt: skip


class Beside(Counting):
    """The task; difficulty as in Counting."""

    max_tokens = 6
    base = "toy_tasks/beside.safetensors"

    def new_policy(self, seed):
        """An untrained model that knows this task's words."""
        torch.manual_seed(seed)
        return TinyVLM(WORDS, CELLS, SIDE)

    def problem(self, split, seed, index):
        """A function of (split, seed, index) alone."""
        return self.scene(random.Random(f"beside/{split}/{seed}/{index}"))

    def scene(self, rng):
        """One object of the kind asked for, with something to its right; the others differ."""
        asked = rng.choice(KINDS)
        others = [k for k in KINDS if k != asked]
        near = [k for k in others if (k[0] == asked[0]) != (k[1] == asked[1])]
        cell = rng.randrange(SIDE) * SIDE + rng.randrange(SIDE - 1)
        rest = [c for c in range(SIDE * SIDE) if c not in (cell, cell + 1)]
        cells = rng.sample(rest, max(0, rng.randint(*self.others) - 2))
        objects = {
            c: rng.choice(near if rng.random() < 0.5 else others) for c in [cell + 1, *cells]
        }
        picture, boxes = draw({cell: asked} | objects, self.noise, rng)
        question, answer = f"what is beside {' '.join(asked)} ?", " ".join(objects[cell + 1])
        objects = {cell: asked} | objects
        return Scene([picture], question, answer, STEPS, [cell, cell + 1], objects, boxes)

    def grade(self, problem, text, finished):
        """Solved if it ended, and in the right colour and shape; the cells are measured only."""
        words = text.split()
        solved = finished and " ".join(words[-3:]) == f"is {problem.answer}"
        return Grade(float(solved), solved, [CELLS.index(w) for w in words if w in CELLS])
