"""The small Qwen2-VL: its tokens, its lessons, and what the committed one can do."""

import json
import random
from dataclasses import replace

import pytest
from helpers import ROOT

import ptdpo
from toy_tasks import small_qwen
from toy_tasks.counting import CELLS
from toy_tasks.jsonl import PLACES, FreeText
from toy_tasks.warm_start import LESSONS

MODEL = ROOT / "assets/small-qwen"
KINDS = dict.fromkeys(LESSONS[FreeText][1])


@pytest.fixture(scope="module")
def policy():
    """The committed model, as --model has it."""
    return ptdpo.HFPolicy(ptdpo.make_config(small_qwen.RUN | {"model": str(MODEL)}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_a_lesson_is_a_token(policy, kind):
    """Nothing is unknown, answers come back as they were, and a cell is an image token."""
    task, tokenizer = FreeText(16), policy.processor.tokenizer
    for i in range(30):
        problem, hint, said = small_qwen.lesson(task, kind, random.Random(i))
        prompt = policy.encode(problem, hint)
        assert tokenizer.unk_token_id not in prompt.ids and len(prompt.ids) < 80
        assert prompt.ids.count(policy.image_id) == 25
        ids = tokenizer(said)["input_ids"]
        assert tokenizer.unk_token_id not in ids and policy.text(ids) == said


def test_lessons_by_hand():
    """Tutored: the matches in the listed places, counted; alone: nothing beyond a glance."""
    task, short = FreeText(16), 0
    for i in range(200):
        _, hint, said = small_qwen.lesson(task, "tutored", random.Random(i))
        listed = hint.split("Look closely at: ")[1].split(". Ignore")[0].split("; ")
        assert len(listed) == small_qwen.HINTED
        *cells, word, number = said.split()
        assert word == "answer:" and int(number) == len(cells) == len(set(cells))
        assert {PLACES[small_qwen.place_of(CELLS.index(c))] for c in cells} <= set(listed)
        *cells, _, _ = small_qwen.lesson(task, "alone", random.Random(i))[2].split()
        short += len(cells) <= 2
    assert short > 120  # a coin a point: three quarters


def test_places_are_those_of_the_task():
    """A cell is in the place that its box on the picture is in."""
    task = FreeText(16)
    for i in range(50):
        scene = task.scenes.problem("validation", 0, i)
        cells = {small_qwen.place_of(c) for c in scene.targets}
        assert sorted(cells) == task.problem("validation", 0, i).targets


def test_it_is_weak_alone_and_can_be_tutored(policy):
    """As measured.json says: a gap to close, and attention above chance."""
    measured = json.loads((MODEL / "measured.json").read_text())
    assert measured["parameters"] < 1e6 and measured["minutes"] <= 40
    config = ptdpo.make_config(small_qwen.RUN | {"model": str(MODEL), "micro_batch": 16})
    task = FreeText(16)
    problems = [task.problem("validation", 0, i) for i in range(64)]
    rollout = ptdpo.answer(policy, task, problems, 8, 1.0, ("look",))
    best = measured["layer_recall"].index(max(measured["layer_recall"]))
    ptdpo.read_reference(policy, rollout, config, [best])
    scores = {}
    for hint in ("none", "attention"):
        changed = replace(config, hint=hint)
        hints = ptdpo.build_hints(policy, task, rollout, changed, ("look",))
        told = [h.text for h in hints]
        scores[hint] = ptdpo.evaluate(policy, task, problems, told)["accuracy"]
    recall = ptdpo.recall([h.regions for h in hints], problems)
    assert recall > 1.1 * small_qwen.HINTED / len(PLACES)
    assert scores["none"] == pytest.approx(measured["alone"]["accuracy"], abs=0.15)
    assert scores["attention"] > scores["none"] + 0.1
