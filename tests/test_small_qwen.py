"""The small Qwen2-VL: its tokens, its lessons, and what the committed one can do."""

import json
import random
from dataclasses import replace

import pytest

import ptdpo
from experiments import small_qwen
from toy_tasks.free_text import FreeText


@pytest.fixture(scope="module")
def policy():
    """The committed model, as --model has it."""
    settings = small_qwen.RUN | {"model": str(small_qwen.MODEL)}
    return ptdpo.HFPolicy(ptdpo.make_config(settings))


@pytest.mark.parametrize("kind", sorted(set(small_qwen.LESSON_KINDS)))
def test_every_word_of_a_lesson_is_a_token(policy, kind):
    """Nothing is unknown, answers come back as they were, and a cell is an image token."""
    tokenizer = policy.processor.tokenizer
    for i in range(30):
        problem, hint, answer = small_qwen.lesson(FreeText(16), kind, random.Random(i))
        prompt = policy.encode(problem, hint)
        assert tokenizer.unk_token_id not in prompt.ids and len(prompt.ids) < 80
        assert (prompt.ids == policy.image_id).sum() == 25
        ids = tokenizer(answer)["input_ids"]
        assert tokenizer.unk_token_id not in ids and policy.text(ids) == answer


def test_it_is_weak_alone_and_can_be_tutored(policy):
    """As measured.json says: a gap to close, and attention that finds the places."""
    measured = json.loads((small_qwen.MODEL / "measured.json").read_text())
    assert measured["parameters"] == sum(p.numel() for p in policy.parameters()) < 1e6
    config = replace(policy.config, eval_problems=64, micro_batch=16)
    task = FreeText(16)
    alone = ptdpo.evaluate(policy, task, config)
    layers = [measured["layer_recall"].index(max(measured["layer_recall"]))]
    tutored = ptdpo.evaluate(policy, task, config, layers)
    assert alone["accuracy"] == pytest.approx(measured["alone"]["accuracy"], abs=0.15)
    assert tutored["accuracy"] > alone["accuracy"] + 0.3
