"""What the trainer knows of a task: problems to pose, answers to grade, hints to phrase.

A task owns its pictures, questions and rewards; all from the sampled answer to the update of the
weights is the trainer's. Any object with the methods of `Task` will do.
"""

from dataclasses import dataclass, field
from typing import Protocol


class UserError(Exception):
    """What the user can mend: printed as one line by toy_tasks/commands.py, exit code 2."""


@dataclass
class Problem:
    """A question about pictures, with what only grading and measuring may see."""

    images: list  # PIL pictures, RGB
    question: str
    answer: str
    steps: str = ""  # the textual part of a hint: what to compare, what to ignore
    targets: list | None = None  # regions that matter, where known: they measure hints


@dataclass
class Grade:
    """The verdict on an answer: `solved` decides what failed, `reward` is what GRPO sees."""

    reward: float
    solved: bool
    points: list | None = field(default_factory=list)  # regions named; None: answers name none


class Task(Protocol):
    """What a task must offer."""

    max_tokens: int  # longest answer
    held_out: float  # how many problems a split other than train has, perhaps math.inf

    def problem(self, split: str, seed: int, index: int) -> Problem:
        """A function of the three alone; splits (train, validation, test, calibration) share no
        problem, and those of calibration have targets: layers are ranked by them."""

    def grade(self, problem: Problem, text: str, finished: bool) -> Grade:
        """Grade an answer; finished is False when it ran into max_tokens."""

    def hint_text(self, regions: list[str], steps: str, solution: str = "") -> str:
        """Phrase a hint from names of regions and steps, or the spoiler from a solution."""
