"""The exercises of assets/exercises.md: each test turns green when its exercise is solved.

EXERCISES=1 python -m pytest tests/test_exercises.py -k 3
"""

import importlib
import json
import os

import pytest
import torch
from helpers import ROOT, gradient, make_rollout

import ptdpo
from ptdpo import Rollout
from toy_tasks import Grade
from toy_tasks.commands import parse

pytestmark = pytest.mark.skipif("EXERCISES" not in os.environ, reason="exercises, for the reader")


def rows(number, method):
    """The metrics of the run that an exercise asks for."""
    path = ROOT / f"runs/exercise-{number}/{method}/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_exercise_1_lambda_is_zero():
    """Without the distillation loss PTD-PO is GRPO."""
    for a, b in zip(rows(1, "grpo"), rows(1, "ptdpo"), strict=True):
        assert a["reward"] == b["reward"] and a["accuracy"] == b["accuracy"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert rows(1, "ptdpo")[0]["jsd"] > 0.01  # measured all the same


def test_exercise_2_a_teacher_without_a_hint():
    """Its opinion is the student's own, to begin with."""
    first, *_, last = rows(2, "ptdpo")
    assert first["jsd"] < 1e-6 < last["jsd"] and len(rows(2, "ptdpo")) >= 10


def test_exercise_3_advantage_without_the_deviation():
    """`--advantage centred`: A = r - mean, as in Dr. GRPO; the default stays as it is."""
    r = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75])
    assert torch.equal(ptdpo.group_advantages(r, 4, "centred"), expected)
    assert ptdpo.group_advantages(r, 4).max() > 1
    assert ptdpo.make_config(parse(["--toy", "--advantage", "centred"])).advantage == "centred"


def test_exercise_4_another_divergence():
    """`--divergence hellinger`: sum of (sqrt p - sqrt q)^2 / 2 over the buckets."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 6, dtype=torch.double, generator=g).add(0.05)
    value, slope = ptdpo.DIVERGENCES["hellinger"](p, q)
    assert torch.allclose(value, (p.sqrt() - q.sqrt()) ** 2 / 2)
    up, down = (ptdpo.DIVERGENCES["hellinger"](p + e, q)[0] for e in (1e-6, -1e-6))
    assert torch.allclose(slope, (up - down) / 2e-6, atol=1e-8)
    assert ptdpo.make_config(parse(["--toy", "--divergence", "hellinger"]))


def test_exercise_5_another_source_of_hints(task, policy):
    """`--hint neighbour`: the regions of the next group's attention, the last takes the first's."""
    config = ptdpo.make_config(parse(["--toy", "--method", "ptdpo", "--hint", "neighbour"]))
    problems = [task.problem("train", 0, i) for i in range(3)]
    rollout = Rollout(problems, [policy.encode(p) for p in problems], *[None] * 3, [])
    rollout.relevance = torch.rand(3, 25, generator=torch.Generator().manual_seed(0))
    hints = ptdpo.build_hints(policy, task, rollout, config, (0,))
    for hint, scores in zip(hints, rollout.relevance.roll(-1, 0)):
        assert hint.regions == sorted(scores.topk(10).indices.tolist())


def test_exercise_6_another_metric():
    """`advantage_size`: mean |A| over the answers of the step, in the glossary as well."""
    mask = torch.ones(4, 2, dtype=torch.bool)
    grades = [Grade(r, bool(r)) for r in (1.0, 0.0, 0.0, 0.0)]
    rollout = Rollout([None] * 2, [None] * 2, mask.long(), mask, [""] * 4, grades)
    rollout.adv = torch.tensor([0.5, -0.7, 0.0, 0.0])
    tokens = {name: torch.zeros(4, 2) for name in ("jsd", "kl", "entropy")}
    assert ptdpo.step_metrics(rollout, tokens, 0.0)["advantage_size"] == pytest.approx(0.3)
    assert "advantage_size" in ptdpo.METRICS


def test_exercise_7_a_schedule(tmp_path):
    """`--lr-decay`: the rate falls linearly, to lr / steps at the last step; the row tells it."""
    small = "--prompts 2 --group 2 --eval-problems 2 --steps 4 --lr 0.004".split()
    given = ["--toy", "--method", "grpo", *small, "--out", str(tmp_path), "--lr-decay"]
    assert ptdpo.main(given) == 0
    text = (tmp_path / "grpo/metrics.jsonl").read_text()
    seen = [json.loads(line)["lr"] for line in text.splitlines()]
    assert seen == pytest.approx([0.004, 0.003, 0.002, 0.001])


def test_exercise_8_a_task_of_your_own(policy, ref):
    """toy_tasks/mine.py with a class Mine that the trainer takes as it takes Counting."""
    task = importlib.import_module("toy_tasks.mine").Mine()
    problem, other = (task.problem("train", 0, i) for i in (0, 1))
    assert problem.question != task.__class__.__mro__[1]().problem("train", 0, 0).question
    assert problem.images[0].tobytes() != other.images[0].tobytes()
    right = task.grade(problem, f"r0c0 total {problem.answer}", True)
    assert right.solved and not task.grade(problem, "r0c0 total nothing", True).solved
    assert not task.grade(problem, f"r0c0 total {problem.answer}", False).solved
    config = ptdpo.Config(prompts=2, group=2)
    rollout = make_rollout(policy, ref, task, config)
    vector, _, norm = gradient(policy, ref, rollout, config)
    assert vector.isfinite().all() and norm > 0
