"""The second task: scenes, grades, lessons; the trainer takes it as it takes the first."""

import random

import pytest
from helpers import ROOT, gradient, make_rollout

import ptdpo
from toy_tasks.beside import KINDS, WORDS, Beside
from toy_tasks.counting import CELLS, SIDE
from toy_tasks.warm_start import LESSONS, beside_lesson


@pytest.fixture(scope="module")
def beside():
    """The task as shipped."""
    return Beside()


def test_the_answer_stands_right_of_the_only_match(beside):
    """One object of the kind asked for, not in the last column, and something beside it."""
    for i in range(60):
        p = beside.problem("train", 0, i)
        asked = tuple(p.question.split()[3:5])
        (cell,) = [c for c, o in p.objects.items() if o == asked]
        assert cell % SIDE < SIDE - 1 and p.targets == [cell, cell + 1]
        assert " ".join(p.objects[cell + 1]) == p.answer and asked in KINDS
        assert set(f"{p.question} {p.answer} {p.steps}".split()) <= set(WORDS)
    assert p.images[0].tobytes() == beside.problem("train", 0, 59).images[0].tobytes()
    assert p.images[0].tobytes() != beside.problem("test", 0, 59).images[0].tobytes()


@pytest.mark.parametrize(
    ("text", "finished", "solved"),
    [
        ("r0c0 r0c1 is {}", True, True), ("is {}", True, True), ("{}", True, False),
        ("r0c0 r0c1 is {}", False, False), ("is {} r0c0", True, False), ("", True, False),
        ("none", True, False),
    ],
)  # fmt: skip
def test_grades(beside, text, finished, solved):
    """Only a finished answer that ends in the right colour and shape."""
    p = beside.problem("train", 0, 0)
    grade = beside.grade(p, text.format(p.answer), finished)
    assert grade.solved is solved and grade.reward == float(solved)
    assert grade.points == [CELLS.index(w) for w in text.split() if w in CELLS]


@pytest.mark.parametrize("kind", set(LESSONS[Beside][1]))
def test_lessons_fit_words_and_length(beside, kind):
    """Every word is known; what is tutored is true, and strict about the listed cells."""
    rng, policy = random.Random(0), beside.new_policy(0)
    for _ in range(50):
        scene, hint, text = beside_lesson(beside, kind, rng)
        assert policy.encode(scene, hint).ids and policy.tokens(text)
        if kind == "tutored":
            listed = hint.split()[1:11]
            assert (CELLS[scene.targets[0]] in listed) == (text != "none")
            assert text == "none" or beside.grade(scene, text, True).solved
        if kind == "alone":
            assert len(text.split()) + 1 <= beside.max_tokens


def test_one_update(beside):
    """With the committed base: finite, and tutoring has something to say."""
    config = ptdpo.Config(task="beside", prompts=3, group=4, clip_norm=1e9)
    policy, task = ptdpo.toy(config)
    rollout = make_rollout(policy, policy.frozen_copy(), task, config)
    vector, tokens, norm = gradient(policy, policy.frozen_copy(), rollout, config)
    assert vector.isfinite().all() and norm > 0 and tokens["jsd"].max() > 0.1


def test_its_base_obeys_the_rule(beside):
    """As the first task's bases do; its scores are measured again."""
    policy = beside.new_policy(0)
    path = ROOT / beside.base
    found = ptdpo.read_checkpoint(path, policy)["measured"]
    alone, tutored = found["alone"]["accuracy"], found["attention both"]["accuracy"]
    assert path.stat().st_size <= 3e6 and found["groups_all_failed"] >= 0.5
    assert tutored - alone >= 0.2 and found["grpo 20 steps"] - alone < (tutored - alone) / 4
    problems = [beside.problem("validation", 0, i) for i in range(512)]
    for measure, value in ptdpo.evaluate(policy, beside, problems).items():
        assert value == pytest.approx(found["alone"][measure], abs=0.01)
