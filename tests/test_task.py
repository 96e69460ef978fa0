"""The counting task, the hints, the spoiler filter; and a trainer that knows nothing of a task."""

import io
import math
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, make_rollout, shaken
from PIL import Image

import ptdpo
from ptdpo import spoils
from tiny_vlm import TinyVLM
from toy_tasks import Grade, Problem
from toy_tasks.counting import CELLS, COLOURS, SHAPES, STEPS, WORDS, Counting, draw
from toy_tasks.warm_start import counting_lesson, warm_start

SPLITS = ("train", "validation", "test", "calibration")
LESSONS = ("tutored", "alone", "calm", "describe")


def scenes(task, n=60, split="train", seed=0):
    """Some problems of a split."""
    return [task.problem(split, seed, i) for i in range(n)]


def colours_in(picture):
    """The colours that occur."""
    return {colour for _, colour in picture.getcolors(picture.width * picture.height)}


# ----------------------------------------------------------------------------------------- scenes
def test_a_problem_is_a_function_of_split_seed_and_index():
    """The same three give the same pixels, whatever was asked before; another of them, others."""
    a, b = Counting(), Counting()
    random.seed(1)
    for i in (5, 3, 0):
        one, two = a.problem("train", 7, i), b.problem("train", 7, i)
        assert one.images[0].tobytes() == two.images[0].tobytes()
        assert replace(one, images=[]) == replace(two, images=[])
    assert a.problem("train", 7, 0) != a.problem("train", 8, 0)


def test_splits_share_no_scene(task):
    """Layout and pixels of every scene of every split and seed occur once."""
    everything = [p for s in SPLITS for seed in (0, 1, 200) for p in scenes(task, 40, s, seed)]
    assert len({p.images[0].tobytes() for p in everything}) == len(everything)
    assert len({(p.question, tuple(p.objects.items())) for p in everything}) == len(everything)


def test_pictures_are_rgb_bytes_that_survive_png(task):
    """Real pictures: 40 x 40, 8 bit, saved and read back without loss."""
    for problem in scenes(task, 5):
        (picture,) = problem.images
        assert picture.mode == "RGB" and picture.size == (40, 40)
        file = io.BytesIO()
        picture.save(file, "PNG")
        assert Image.open(file).convert("RGB").tobytes() == picture.tobytes()
        assert max(picture.tobytes()) <= 255 and len(set(picture.tobytes())) > 50


@pytest.mark.parametrize("cell", [8, 24])
def test_boxes_hold_the_objects_and_nothing_stands_outside(cell):
    """On a clean picture: ink in every box, in the object's colour; background elsewhere."""
    rng = random.Random(0)
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    for _ in range(10):
        objects = dict(zip(rng.sample(range(25), 12), rng.sample(pairs, 12)))
        picture, boxes = draw(objects, 0.0, rng, cell)
        assert picture.size == (5 * cell, 5 * cell) and set(boxes) == set(objects)
        outside = picture.copy()
        for at, (left, top, right, bottom) in boxes.items():
            assert at % 5 * cell <= left < right < (at % 5 + 1) * cell
            assert at // 5 * cell <= top < bottom < (at // 5 + 1) * cell
            box = tuple(map(int, (left, top, right + 1, bottom + 1)))
            ink = colours_in(picture.crop(box)) - {(28, 28, 32)}
            ((r, g, b),) = ink  # one flat colour, a shade of its name
            full = COLOURS[objects[at][0]]
            assert all(0.79 * f - 1 <= v <= f for v, f in zip((r, g, b), full))
            outside.paste((28, 28, 32), box)
        assert colours_in(outside) == {(28, 28, 32)}


def test_shapes_differ_in_their_pixels():
    """Disc: middle and quarter are filled; outline: the corner; cross: the middle alone."""
    seen = {}
    for shape in SHAPES:
        picture, boxes = draw({12: ("red", shape)}, 0.0, random.Random(0), 24)
        left, top, right, bottom = map(int, boxes[12])
        places = {"corner": (left, top), "middle": ((left + right) // 2, (top + bottom) // 2),
                  "quarter": (left + (right - left) // 4, top + (bottom - top) // 4)}  # fmt: skip
        seen[shape] = {n for n, at in places.items() if picture.getpixel(at) != (28, 28, 32)}
    assert seen == {"circles": {"middle", "quarter"}, "squares": {"corner"}, "crosses": {"middle"}}


def test_answer_is_the_number_of_matches(task):
    """Counted again from what was drawn and what is asked."""
    for problem in scenes(task):
        how, many, colour, shape, mark = problem.question.split()
        assert (how, many, mark) == ("how", "many", "?")
        matches = [c for c, o in problem.objects.items() if o == (colour, shape)]
        assert problem.targets == sorted(matches) and problem.answer == str(len(matches))
        assert set(problem.objects) == set(problem.boxes) and problem.steps == STEPS


def test_most_others_are_near_misses(task):
    """Two of three share the colour or the shape asked for: comparing both is the task."""
    kinds = Counter()
    for problem in scenes(task, 200):
        colour, shape = problem.question.split()[2:4]
        kinds.update((c == colour) + (s == shape) for c, s in problem.objects.values())
    assert kinds[1] / (kinds[0] + kinds[1]) == pytest.approx(2 / 3, abs=0.04)


@pytest.mark.parametrize("difficulty", [0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 2.2, 3.0, 10.0])
def test_any_difficulty_gives_scenes(difficulty):
    """The dial only turns up clutter and noise, and never asks for more than 25 cells."""
    task = Counting(difficulty)
    for problem in scenes(task, 20):
        assert 3 <= int(problem.answer) <= 8 and len(problem.objects) <= 25


def test_difficulty_is_a_dial(task):
    """0: few objects on a clean picture; then more objects, more answers, more noise."""
    calm, half, full = (scenes(Counting(d)) for d in (0.0, 0.5, 1.0))
    for problem in calm:
        assert len(problem.objects) == 3 == int(problem.answer)
        assert len(colours_in(problem.images[0])) <= 4  # background and three inks
    objects = [sum(len(p.objects) for p in ps) for ps in (calm, half, full)]
    assert objects == sorted(objects) and objects[0] < objects[1] < objects[2]
    assert {p.answer for p in half} < {p.answer for p in scenes(task, 200)} == set("345678")


# ---------------------------------------------------------------------------------------- grading
@pytest.mark.parametrize(
    ("text", "finished", "solved", "points"),
    [
        ("r0c1 r0c2 r4c4 total 3", True, True, [1, 2, 24]),
        ("r0c3 r1c0 r1c1 total 3", True, True, [3, 5, 6]),  # right number, wrong points
        ("r0c1 r0c2 r4c4 total 2", True, False, [1, 2, 24]),  # right points, wrong number
        ("total 3", True, True, []),
        ("r0c1 r0c2 r4c4 total 3", False, False, [1, 2, 24]),  # ran into the limit
        ("r0c1 r0c2 r4c4 total 3 r0c0", True, False, None),  # goes on after the number
        ("r0c1 total 3 total 4", True, False, [1]),
        ("r0c1 total 4 total 3", True, True, [1]),  # only the final number is read
        ("r0c1 r0c1 r0c1 total 3", True, True, [1, 1, 1]),
        ("total total 3", True, True, []),
        ("3", True, False, []),
        ("", True, False, []),
        ("", False, False, []),
        ("r0c1 r0c2 r4c4 3", True, False, None),
        ("total 3 3", True, False, []),
        ("total three", True, False, []),
        ("total 03", True, False, []),
        ("total", True, False, []),
        ("red circles total 3", True, True, []),
        ("r0c1 look answer total 3", True, True, [1]),
        ("how many red circles ?", True, False, []),
    ],
)
def test_grade(task, text, finished, solved, points):
    """Solved: it ended, in `total` and the right number. Points are measured, never rewarded."""
    problem = Problem([], "", "3", targets=[1, 2, 24])
    grade = task.grade(problem, text, finished)
    assert (grade.solved, grade.reward) == (solved, float(solved))
    assert points is None or grade.points == points


@pytest.mark.parametrize("cells", [1, 2, 5, 14])
def test_an_answer_that_only_points_keeps_its_points(task, cells):
    """An over-long answer without a number is unsolved, but every cell it named was named."""
    grade = task.grade(Problem([], "", "3"), " ".join(CELLS[:cells]), False)
    assert not grade.solved and grade.points == list(range(cells))


def test_perfect_answers_fit_and_are_solved(task, policy):
    """The longest right answer and its end fit into max_tokens."""
    for problem in scenes(task):
        text = " ".join(CELLS[c] for c in problem.targets) + f" total {problem.answer}"
        assert task.grade(problem, text, True).solved
        assert len(policy.tokens(text)) + 1 <= task.max_tokens


# ---------------------------------------------------------------------------------------- lessons
@pytest.mark.parametrize("kind", LESSONS)
def test_lessons_use_known_words_and_tell_no_lies(task, policy, kind):
    """Every word is in the vocabulary; what each lesson teaches is what its name says."""
    rng, hints = random.Random(0), set()
    for _ in range(300):
        problem, hint, text = counting_lesson(task, kind, rng)
        policy.tokens(f"{problem.question} {hint} {text}")  # KeyError if a word is unknown
        words, told = text.split(), hint.split()
        assert len(told) + 5 + len(words) <= len(policy.position)
        hints.add(re.sub(r"r\dc\d|\d+", "*", hint))
        if kind == "describe":
            trait = ("colour", "shape").index(problem.question.split()[1])
            pairs = {CELLS.index(a): b for a, b in zip(words[::2], words[1::2])}
            assert pairs == {c: o[trait] for c, o in problem.objects.items()} and not hint
            continue
        *points, total, number = words
        assert total == "total" and points == sorted(points) and len(set(points)) == len(points)
        named = {CELLS.index(c) for c in points}
        if kind == "calm":
            assert named == set(problem.targets) and number == str(len(named))
        elif kind == "tutored":  # marks among the listed cells, all that match, counted
            listed = {CELLS.index(c) for c in told if c in CELLS}
            assert len(listed) == 10 and told[1:11] == sorted(told[1:11])
            assert named <= listed and number == str(len(named))
            assert set(problem.targets) & listed <= named
            assert STEPS not in hint or named <= set(problem.targets)
        elif "answer" in hint:
            assert told == ["answer", problem.answer] and number == problem.answer
    blank = "look " + "* " * 10
    kinds = {"tutored": {blank, blank + STEPS}, "alone": {"", STEPS, "answer *"}}
    assert hints == {"calm": {"", STEPS}, "describe": {""}, **kinds}[kind]


def test_every_number_occurs_in_plain_context(task):
    """A word that the base never says alone has probability 0, and JSD could not teach it."""
    rng, numbers = random.Random(0), set()
    for _ in range(1500):
        for kind in ("alone", "calm"):
            _, hint, text = counting_lesson(task, kind, rng)
            numbers |= {text.split()[-1]} if not hint else set()
    assert numbers >= {p.answer for p in scenes(task, 300)}


def test_base_reads_every_kind_of_hint_in_its_lessons(task):
    """Each source and part of a hint has a lesson of the same shape, so all are compared fairly."""
    rng, shapes = random.Random(0), set()
    for kind in ("tutored", "alone"):
        for _ in range(300):
            shapes.add(re.sub(r"r\dc\d|\d+", "*", counting_lesson(task, kind, rng)[1]).strip())
    for regions, steps, solution in (
        (CELLS[:10], STEPS, ""), (CELLS[:10], "", ""), ([], STEPS, ""), ([], "", "7"), ([], "", "")
    ):  # fmt: skip
        text = task.hint_text(regions, steps, solution)
        assert re.sub(r"r\dc\d|\d+", "*", text).strip() in shapes


def test_warm_start_is_a_function_of_its_seed(task):
    """Two short warm starts agree bit for bit, move every weight, and end at learning rate 0."""
    first, second, other = (task.new_policy(0) for _ in range(3))
    fresh = [p.detach().clone() for p in first.parameters()]
    for policy, seed in ((first, 3), (second, 3), (other, 4)):
        torch.manual_seed(seed)  # the lessons must not depend on the global stream
        warm_start(task, policy, seed, steps=6, batch=4)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters())]
    assert all(same) and not torch.equal(first.embed.weight, other.embed.weight)
    assert all(not torch.equal(a, b) for a, b in zip(fresh, first.parameters()))


# ------------------------------------------------------------------------------------------ hints
def hinted(task, policy, problems, **changes):
    """Hints for problems, with a made-up relevance that points to cells 24, 23, 22, ..."""
    c = ptdpo.Config(prompts=len(problems), group=2, **changes)
    prompts = [policy.encode(p) for p in problems]
    grades = [Grade(0.0, False, [7, 7, 3]), Grade(0.0, False, [7])] * len(problems)
    blank = torch.zeros(2 * len(problems), 1)
    rollout = ptdpo.Rollout(problems, prompts, blank.long(), blank.bool(), [], grades)
    rollout.relevance = torch.arange(25.0).expand(len(problems), 25) / 300
    return ptdpo.build_hints(policy, task, rollout, c, (0, 1))


def test_sources_of_regions(task, policy):
    """attention: the M highest; votes: cells by answers that named them; oracle: all targets."""
    problems = scenes(task, 6)
    got = {s: hinted(task, policy, problems, hint=s) for s in ("attention", "votes", "oracle")}
    assert all(h.regions == list(range(15, 25)) for h in got["attention"])
    assert all({3, 7} <= set(h.regions) for h in got["votes"])
    assert all(set(p.targets) <= set(h.regions) for h, p in zip(got["oracle"], problems))
    top = [h.regions for h in hinted(task, policy, problems, hint="votes", hint_regions=1)]
    assert top == [[7]] * 6  # named by two answers, though three times: one vote an answer
    rest = [tuple(h.regions) for h in got["votes"]]
    assert len(set(rest)) > 1  # ties are broken at random, but in the same way every time
    assert rest == [tuple(h.regions) for h in hinted(task, policy, problems, hint="votes")]


def test_random_regions_are_uniform_and_blind(task, policy):
    """The control: every cell as often, no matter where targets, votes or attention are."""
    problems = scenes(task, 300)
    hints = hinted(task, policy, problems, hint="random")
    counts = Counter(r for h in hints for r in h.regions)
    assert set(counts) == set(range(25)) and sum(counts.values()) == 3000
    assert all(abs(n - 120) < 4.5 * math.sqrt(300 * 0.4 * 0.6) for n in counts.values())
    assert ptdpo.recall([h.regions for h in hints], problems) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("source", ["attention", "votes", "oracle", "random"])
def test_a_hint_cannot_give_the_count_away(task, policy, source):
    """Zero-spoiler by construction: M distinct cells in reading order, fixed words, no number."""
    problems = scenes(task, 120)
    hints = hinted(task, policy, problems, hint=source)
    for hint in hints:
        assert hint.regions == sorted(set(hint.regions)) and len(hint.regions) == 10
        words = hint.text.split()
        assert words == ["look", *(CELLS[r] for r in hint.regions), *STEPS.split()]
        assert len(policy.tokens(hint.text)) == 1 + 10 + 8 and not hint.rejected
    # All that is not a name of a cell is the same for every count: nobody beats the majority class.
    features = Counter((re.sub(r"r\dc\d", "*", h.text), p.answer) for h, p in zip(hints, problems))
    best = Counter()
    for (feature, _), n in features.items():
        best[feature] = max(best[feature], n)
    assert sum(best.values()) == Counter(p.answer for p in problems).most_common(1)[0][1]
    # Nor does the solution itself reach the hint.
    other = [replace(p, answer=str(11 - int(p.answer))) for p in problems]
    assert hinted(task, policy, other, hint=source) == hints


def test_parts_of_a_hint(task, policy):
    """where: cells alone; steps: text alone; both. Regions are those that the text names."""
    problems = scenes(task, 3)
    cells = "look " + " ".join(CELLS[15:])
    for parts, text in (("where", cells), ("steps", STEPS), ("both", f"{cells} {STEPS}")):
        hints = hinted(task, policy, problems, hint_parts=parts)
        assert [h.text.strip() for h in hints] == [text] * 3
        named = [] if parts == "steps" else list(range(15, 25))
        assert all(h.regions == named for h in hints)


@pytest.mark.parametrize("parts", ["where", "steps", "both"])
def test_answer_is_the_named_exemption_and_none_says_nothing(task, policy, parts):
    """Only `answer`, the answer-conditioned baseline, carries the solution."""
    problems = scenes(task, 3)
    spoilt = hinted(task, policy, problems, hint="answer", hint_parts=parts)
    assert [h.text for h in spoilt] == [f"answer {p.answer}" for p in problems]
    assert all(spoils(h.text, p.answer) for h, p in zip(spoilt, problems))
    silent = hinted(task, policy, problems, hint="none", hint_parts=parts)
    assert [h.text for h in silent] == [""] * 3


@pytest.mark.parametrize("regions", [1, 25, 40])
def test_number_of_regions(task, policy, regions):
    """M regions, or all there are."""
    for hint in hinted(task, policy, scenes(task, 2), hint_regions=regions):
        assert len(hint.regions) == min(regions, 25)


def test_calibration_finds_a_layer_whatever_m_is(policy, task):
    """One recall a layer, 0 to 1; with every cell hinted it is 1; a function of the seed."""
    c = ptdpo.Config(group=2)
    found = ptdpo.calibrate(policy, task, c, 4)
    assert len(found) == 3 and all(0 <= r <= 1 for r in found)
    assert ptdpo.calibrate(policy, task, c, 4) == found
    assert ptdpo.calibrate(policy, task, replace(c, hint_regions=25), 4) == pytest.approx([1] * 3)
    assert ptdpo.calibrate(policy, task, replace(c, hint_regions=40), 4) == pytest.approx([1] * 3)


# ----------------------------------------------------------------------------------------- filter
@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("3", "there are 3 of them"), ("3", "3"), ("3", "(3)"), ("3", "it's 3, I think"),
        ("3", "the total is 3."), ("3", "count=3"), ("3", "**3**"), ("3", "$3$"),
        ("3", r"\boxed{3}"), ("3", "1, 2, 3"), ("3", "look\n3\n"), ("3", "3!"), ("3", "3-4"),
        ("3", "Three circles"), ("3", "THREE"), ("3", "three-fold"), ("0", "zero of them"),
        ("12", "twelve"), ("3", "3.0"), ("3", "_3_"),
        ("3", "３ circles"), ("3", "total: 03"),
        ("7", "the answer is left to you"), ("7", "The Answer Is hidden"), ("7", "ANSWER : see"),
        ("7", "answer: see below"), ("7", "a = 4"), ("7", "a =-4"), ("7", "so x=12"),
        ("B", "option B"), ("b", "(B)"), ("red", "it is RED."), (" Red ", "red"),
        ("1/2", "about 1/2 of it"), ("0.5", "0.5"), ("-2", "at -2"), ("New York", "in new york"),
        ("x+1", "expand to x+1"), ("a.b", "a.b"), ("c++", "in c++ of course"),
    ],
)  # fmt: skip
def test_spoiler_filter_stops_leaks(solution, text):
    """The solution in digits, words, any case or dress; an announced answer; a result."""
    assert spoils(text, solution)


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        *((str(n), STEPS) for n in range(13)),
        ("3", ""), ("3", "look at 13 regions"), ("3", "30 pixels"), ("3", "version 3.5"),
        ("3", "0.3 of it"), ("1", "someone alone"), ("10", "often"),
        ("9", "nineteen"), ("B", "both sides"), ("red", "reddish, scattered"),
        ("a.b", "axb"), ("7", "answers differ"), ("7", "compare = contrast"), ("7", "answer it"),
    ],
)  # fmt: skip
def test_spoiler_filter_lets_harmless_texts_pass(solution, text):
    """A filter that rejects everything would silently take the steps out of every hint."""
    assert not spoils(text, solution)


def test_steps_that_spoil_are_left_out_and_counted(task, policy):
    """The rest of the hint stays; the share of rejected steps is logged."""
    problems = scenes(task, 4)
    problems[1].steps = f"there are {problems[1].answer}"
    hints = hinted(task, policy, problems)
    assert [h.rejected for h in hints] == [False, True, False, False]
    assert hints[1].text.split() == ["look", *CELLS[15:]] and STEPS in hints[0].text


# --------------------------------------------------------------------------- a task of another kind
class ColourTask:
    """Stub: which colour has the only square? Own words, own pictures, a reward for the form."""

    max_tokens, held_out = 3, 99
    colours = ("red", "green", "blue")
    places = ("north-west", "north-east", "south-west", "south-east")

    def new_policy(self):
        words = ["<eos>", "colour", "?", "see", "square", "says", *self.colours, *self.places]
        return TinyVLM(words, self.places, side=2, width=32, decoder=2)

    def problem(self, split, seed, index):
        rng = random.Random(f"{split} {seed} {index}")
        colour, at = rng.choice(self.colours), rng.randrange(4)
        picture = Image.new("RGB", (16, 16))
        picture.paste(colour, (at % 2 * 8, at // 2 * 8, at % 2 * 8 + 8, at // 2 * 8 + 8))
        return Problem([picture], "colour ?", colour, "see square", [at])

    def grade(self, problem, text, finished):
        solved = text == problem.answer and finished
        return Grade(0.1 * finished + 0.9 * solved, solved)

    def hint_text(self, regions, steps, solution=""):
        return " ".join([*regions, steps, *(["says", solution] if solution else [])])


@pytest.mark.parametrize("source", ["attention", "votes", "oracle", "random", "answer", "none"])
def test_trainer_knows_nothing_of_the_task(source):
    """Every function of the step runs on the stub, with the stub's own words in its hints."""
    task = ColourTask()
    policy = shaken(task.new_policy(), 0)
    ref = shaken(task.new_policy(), 1).frozen_copy()
    c = ptdpo.Config(prompts=6, group=8, hint=source, hint_regions=2, top_k=3)
    rollout = make_rollout(policy, ref, task, c)
    assert {g.reward for g in rollout.grades} <= {0.0, 0.1, 1.0} and rollout.distill.any()
    for n, grade in enumerate(rollout.grades):
        assert grade.solved <= (rollout.texts[n] == rollout.problems[n // 8].answer)
    for hint, problem in zip(rollout.hints, rollout.problems):
        where = [task.places[r] for r in hint.regions]
        says = {"answer": f" says {problem.answer}", "none": ""}
        assert hint.text.split() == says.get(source, f"{' '.join(where)} see square").split()
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    tokens, norm = ptdpo.update(policy, ref, optimizer, rollout, c, 1.0)
    row = ptdpo.step_metrics(rollout, tokens, norm)
    assert row["jsd"] > 0 and row["grad_norm"] > 0
    found = row["hint_recall"]  # nothing to find where no region is named
    assert found is None if source in ("answer", "none") else 0 <= found <= 1
    assert source != "oracle" or row["hint_recall"] == 1
    held_out = [task.problem("test", 0, i) for i in range(8)]
    scores = ptdpo.evaluate(policy, task, held_out)
    assert set(scores) == {"accuracy", "point_f1", "right_reason"}


def test_training_loop_runs_on_the_stub(tmp_path):
    """train() from a fresh policy: rows are logged, weights move, the run can be read back."""
    task = ColourTask()
    policy = task.new_policy()
    before = policy.head_weight.detach().clone()
    c = ptdpo.Config(steps=2, prompts=2, group=4, hint_regions=2, top_k=3, eval_problems=4)
    ptdpo.train(policy, task, c, tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert not torch.equal(before, policy.head_weight)
    again = task.new_policy()
    state = ptdpo.read_checkpoint(tmp_path / "checkpoint.safetensors", again)
    assert state["step"] == 2 and torch.equal(again.head_weight, policy.head_weight)


def test_the_trainer_names_no_task():
    """Between its flags and the start of a run, ptdpo.py says neither cells nor counting."""
    source = (ROOT / "ptdpo.py").read_text()
    algorithm = source[source.index("- policy\n") : source.index("- start of a run\n")]
    assert len(algorithm.splitlines()) > 400
    assert not re.search(r"Counting|CELLS|WORDS|SIDE|TinyVLM|counting", algorithm)
    assert len(WORDS) == len(set(WORDS))
