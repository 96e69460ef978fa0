"""What the trainer knows of a task: problems to pose, answers to grade, hints to phrase.

A task owns its pictures, questions and rewards. Everything from the sampled answer to the update
of the weights is the trainer's. Any object with the methods of `Task` will do.
"""

from dataclasses import dataclass, field
from typing import Protocol


class UserError(Exception):
    """A mistake that the user can mend. It is printed as one line, and the exit code is 2."""


@dataclass
class Problem:
    """A question about pictures, with what only grading and measuring may see."""

    images: list  # PIL pictures, RGB; may be empty
    question: str  # <image> marks the place of a picture; without marks pictures come first
    answer: str
    steps: str = ""  # the textual part of a hint: what to compare, what to ignore
    targets: list | None = None  # regions that matter, where they are known: they measure hints


@dataclass
class Grade:
    """The verdict on an answer: `solved` decides what failed, `reward` is what GRPO sees."""

    reward: float
    solved: bool
    points: list | None = field(default_factory=list)  # regions named; None: answers name none


class Task(Protocol):
    """What a task must offer.

    More methods are optional. `new_policy(seed)` makes the model of a run without --model.
    `mistakes(problem, words)` marks the wrong tokens of an answer, for the metric credit.
    `ways(problem)` counts the right answers, for the metric ways.
    """

    max_tokens: int  # longest answer
    held_out: float  # how many problems a split other than train has, perhaps math.inf

    def problem(self, split: str, seed: int, index: int) -> Problem:
        """A problem, which depends on the three alone.

        No problem of train or calibration is in another split. Calibration problems have targets:
        layers are ranked by them.
        """

    def grade(self, problem: Problem, text: str, finished: bool) -> Grade:
        """Grade an answer; finished is False if it ran into max_tokens."""

    def hint_text(self, regions: list[str], steps: str, solution: str = "") -> str:
        """Phrase a hint from names of regions and steps, or one that tells the solution."""
