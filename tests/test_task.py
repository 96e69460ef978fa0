"""The counting task; and a trainer that knows neither this task nor this model."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import rows, shaken, table
from PIL import Image

import ptdpo
from tiny_vlm import TinyVLM
from toy_tasks import Grade, Problem, UserError
from toy_tasks.counting import CELLS, COLOURS, SHAPES, STEPS, Counting, draw

INK = (28, 28, 32)  # of the background


def scenes(task, n=60, split="train", seed=0):
    """Some problems of a split."""
    return [task.problem(split, seed, i) for i in range(n)]


def colours_in(picture):
    """The colours that occur."""
    return {colour for _, colour in picture.getcolors(picture.width * picture.height)}


# ----------------------------------------------------------------------------------------- scenes
def test_splits_share_no_scene(task):
    """Layout and pixels of every scene of every split and seed occur once; pixels are RGB."""
    splits = ("train", "validation", "test", "calibration")
    everything = [p for s in splits for seed in (0, 1, 200) for p in scenes(task, 40, s, seed)]
    assert len({p.images[0].tobytes() for p in everything}) == len(everything)
    assert {(p.images[0].mode, p.images[0].size) for p in everything} == {("RGB", (40, 40))}
    assert len({(p.question, tuple(p.objects.items())) for p in everything}) == len(everything)
    again = Counting().problem("train", 1, 5)  # a function of split, seed and index alone
    assert again.images[0].tobytes() == everything[45].images[0].tobytes()
    assert replace(again, images=[]) == replace(everything[45], images=[])


@pytest.mark.parametrize("cell", [8, 24])
def test_boxes_hold_the_objects_and_nothing_stands_outside(cell):
    """On a clean picture: ink in every box, in the object's colour; background elsewhere."""
    rng = random.Random(0)
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    for _ in range(10):
        objects = dict(zip(rng.sample(range(25), 12), rng.sample(pairs, 12)))
        picture, boxes = draw(objects, 0.0, rng, cell)
        assert set(boxes) == set(objects)
        outside = picture.copy()
        for at, (left, top, right, bottom) in boxes.items():
            assert at % 5 * cell <= left < right < (at % 5 + 1) * cell
            assert at // 5 * cell <= top < bottom < (at // 5 + 1) * cell
            box = tuple(map(int, (left, top, right + 1, bottom + 1)))
            (ink,) = colours_in(picture.crop(box)) - {INK}  # one flat colour, a shade of its name
            full = COLOURS[objects[at][0]]
            assert all(0.79 * f - 1 <= v <= f for v, f in zip(ink, full))
            outside.paste(INK, box)
        assert colours_in(outside) == {INK}


def test_answer_is_the_number_of_matches(task):
    """Counted again from what was drawn and what is asked; two of three others are near misses."""
    kinds = Counter()
    for problem in scenes(task, 200):
        how, many, colour, shape, mark = problem.question.split()
        assert (how, many, mark) == ("how", "many", "?")
        matches = [cell for cell, o in problem.objects.items() if o == (colour, shape)]
        assert problem.targets == sorted(matches)
        assert problem.answer == str(len(matches))
        kinds.update((c == colour) + (s == shape) for c, s in problem.objects.values())
    assert kinds[1] / (kinds[0] + kinds[1]) == pytest.approx(2 / 3, abs=0.04)


def test_difficulty_is_a_dial(task):
    """0: few objects on a clean picture; then more objects, more answers, more noise."""
    calm, half, full = (scenes(Counting(d)) for d in (0.0, 0.5, 1.0))
    for problem in calm:
        assert len(problem.objects) == 3 == int(problem.answer)
        assert len(colours_in(problem.images[0])) <= 4  # background and three inks
    objects = [sum(len(p.objects) for p in some) for some in (calm, half, full)]
    assert objects[0] < objects[1] < objects[2]
    assert {p.answer for p in half} < {p.answer for p in scenes(task, 200)} == set("345678")
    for difficulty in (0.3, 1.5, 2.2, 10.0):
        objects = [len(problem.objects) for problem in scenes(Counting(difficulty), 20)]
        assert 3 <= min(objects) <= max(objects) <= 25


# ---------------------------------------------------------------------------------------- grading
@pytest.mark.parametrize(("text", "solved", "points", "marks"), table("answers"))
def test_grade_and_mistakes_by_hand(task, text, solved, points, marks):
    """Solved: it ended, in `total` and the right number. Points are measured, never rewarded.

    A mistake, given the words before: a wrong or repeated cell, an early total, a wrong count.
    """
    problem = Problem([], "", "3", targets=[1, 2, 24])
    assert task.grade(problem, text, True) == Grade(float(solved), solved, points)
    assert task.grade(problem, text, False) == Grade(0.0, False, points)  # ran into the limit
    assert "".join(str(int(mark)) for mark in task.mistakes(problem, text.split())) == marks


def test_perfect_answers_fit_are_solved_and_have_no_mistake(task, policy):
    """Every way round, from any match, with its end fits into max_tokens; there are n of them."""
    for problem in scenes(task, 20):
        ways = set()
        for first in range(len(problem.targets)):
            order = problem.targets[first:] + problem.targets[:first]
            text = " ".join(CELLS[cell] for cell in order) + f" total {problem.answer}"
            assert task.grade(problem, text, True) == Grade(1.0, True, order)
            assert not any(task.mistakes(problem, text.split()))
            assert len(policy.tokens(text)) + 1 <= task.max_tokens
            ways.add(text)
        assert task.ways(problem) == len(ways) == int(problem.answer)


def test_words_of_hints(task, policy):
    """Cells, steps, or the solution; every word is known, and no hint but the spoiler says more."""
    assert task.hint_text(["r0c1", "r2c3"], STEPS) == f"look r0c1 r2c3 {STEPS}"
    assert (task.hint_text([], STEPS), task.hint_text([], "")) == (STEPS, "")
    assert task.hint_text([], "", "7") == "answer 7"
    longest = policy.tokens(f"how many red circles ? {task.hint_text(CELLS, STEPS)}")
    assert len(longest) + task.max_tokens <= len(policy.position)
    assert not any(ptdpo.spoils(STEPS, str(n)) for n in range(13))


# ------------------------------------------------------------------------- tasks of another kind
class ColourTask:
    """Stub: which colour has the only square? Own words, own pictures, a reward for the form."""

    max_tokens = 3
    held_out = 9
    colours = ("red", "green", "blue")
    places = ("north-west", "north-east", "south-west", "south-east")

    def new_policy(self, seed):
        """A small TinyVLM with these words, always the same."""
        torch.manual_seed(0)
        words = ["<eos>", "colour", "?", "see", "square", "says", *self.colours, *self.places]
        return shaken(TinyVLM(words, self.places, side=2, width=32, layers=2), 0)

    def problem(self, split, seed, index):
        """A square of one colour in one corner."""
        rng = random.Random(f"{split} {seed} {index}")
        colour = rng.choice(self.colours)
        at = rng.randrange(4)
        picture = Image.new("RGB", (16, 16))
        picture.paste(colour, (at % 2 * 8, at // 2 * 8, at % 2 * 8 + 8, at // 2 * 8 + 8))
        return Problem([picture], "colour ?", colour, "see square", [at])

    def grade(self, problem, text, finished):
        """A tenth of the reward for an end, the rest for the colour."""
        solved = text == problem.answer and finished
        return Grade(0.1 * finished + 0.9 * solved, solved)

    def hint_text(self, regions, steps, solution=""):
        """Places and steps, or the colour."""
        return f"says {solution}" if solution else f"{' '.join(regions)} {steps}"


class WordsTask(ColourTask):
    """The same, answered in words: nothing tells where to look, and answers name no region."""

    def problem(self, split, seed, index):
        """A problem without targets."""
        return replace(super().problem(split, seed, index), targets=None)

    def grade(self, problem, text, finished):
        """A grade without points."""
        return replace(super().grade(problem, text, finished), points=None)


RUNS = [(ColourTask, s) for s in ("attention", "votes", "oracle", "random", "answer", "none")]


@pytest.mark.parametrize(("kind", "source"), [*RUNS, (WordsTask, "random"), (WordsTask, "none")])
def test_the_trainer_knows_no_task(kind, source, tmp_path, signals):
    """A whole run, calibrated where possible, with the stub's own words in its hints."""
    task = kind()
    settings = {"steps": 2, "prompts": 4, "group": 4, "hint": source, "hint_regions": 2}
    c = ptdpo.Config(**settings, top_k=3, eval_problems=4, base="")
    ptdpo.create_run(c, tmp_path)
    ptdpo.run(tmp_path, task)
    shown = rows(tmp_path / "samples.jsonl")[0]
    where = [task.places[r] for r in shown["hint"]["regions"]]
    assert len(where) == (0 if source in ("answer", "none") else 2)
    told = {"none": "", "answer": f"says {shown['answer']}"}
    assert shown["hint"]["text"] == told.get(source, f"{' '.join(where)} see square")
    for row in rows(tmp_path / "metrics.jsonl"):
        assert row.keys() == ptdpo.METRICS.keys()
        assert row["grad_norm"] > 0 == row["skipped"]
        assert row["jsd"] > 1e-3 or source == "none"
        assert row["credit"] is row["ways"] is None
        assert (row["hint_recall"] is not None) == (len(where) > 0 and kind is ColourTask)
    assert (row["point_f1"] is not None) == (kind is ColourTask)
    policy = task.new_policy(0)
    with pytest.raises(UserError, match=f"the task {kind.__name__}, not Counting"):
        ptdpo.measure_base(policy, Counting(), c, tmp_path)
    before = policy.head_weight.detach().clone()
    assert ptdpo.load_checkpoint(tmp_path / "checkpoint.safetensors", policy) == 2
    assert not torch.equal(before, policy.head_weight)
