"""The committed bases: small, usable by the rule, and as good and as bad as their metadata say."""

import pytest
import torch
from helpers import ROOT

import ptdpo
from toy_tasks.counting import Counting

BASES = ["base", "base-1", "base-2"]


def load(name):
    """A base and the state stored with it."""
    policy = Counting().new_policy(0)
    path = ROOT / f"toy_tasks/{name}.safetensors"
    return policy, ptdpo.read_checkpoint(path, policy), path


@pytest.mark.parametrize("name", BASES)
def test_bases_obey_the_rule(name):
    """Half of the groups all failed, tutoring adds 20 points, 20 steps of GRPO close no quarter."""
    _, state, path = load(name)
    found = state["measured"]
    alone, tutored = found["alone"]["accuracy"], found["attention both"]["accuracy"]
    assert path.stat().st_size <= 3e6 and state["seed"] == BASES.index(name)
    assert found["groups_all_failed"] >= 0.5 and tutored - alone >= 0.2
    assert found["grpo 20 steps"] - alone < (tutored - alone) / 4 and found["usable"] is True


@pytest.mark.parametrize("name", BASES)
def test_scores_in_the_metadata_are_measured_again(name):
    """On the same 512 validation pictures; another machine may round an answer or two apart."""
    policy, state, _ = load(name)
    task, found = Counting(), state["measured"]
    problems = [task.problem("validation", 0, i) for i in range(512)]
    alone = ptdpo.evaluate(policy, task, problems)
    for measure, value in alone.items():
        assert value == pytest.approx(found["alone"][measure], abs=0.01)
    c = ptdpo.Config(hint="oracle")
    rollout = ptdpo.Rollout(problems, [policy.encode(p) for p in problems], *[None] * 3, [])
    hints = ptdpo.build_hints(policy, task, rollout, c, ("measure", 0))
    told = ptdpo.evaluate(policy, task, problems, [h.text for h in hints])
    for measure, value in told.items():
        assert value == pytest.approx(found["oracle both"][measure], abs=0.01)


def test_tutored_by_its_own_attention(base):
    """The number that matters most, on the first 128 pictures: far above alone, and as stored."""
    policy, state = base
    task, c = Counting(), ptdpo.Config()
    problems = [task.problem("validation", 0, i) for i in range(128)]
    rollout = ptdpo.answer(policy, task, problems, 8, 1.0, ("measure", 0))
    by_layer = torch.tensor(state["layer_recall"])
    ptdpo.read_reference(policy, rollout, c, [by_layer.argmax().item()])
    hints = ptdpo.build_hints(policy, task, rollout, c, ("measure", 0))
    found = ptdpo.recall([h.regions for h in hints], problems)
    measured = state["measured"]["attention both"]
    assert found == pytest.approx(measured["recall"], abs=0.04)
    score = ptdpo.evaluate(policy, task, problems, [h.text for h in hints])
    assert score["accuracy"] == pytest.approx(measured["accuracy"], abs=0.12)
    assert score["right_reason"] > state["measured"]["alone"]["right_reason"] + 0.2
