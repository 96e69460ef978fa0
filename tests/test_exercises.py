"""The exercises of docs/exercises.md: each test turns green when its exercise is solved.

EXERCISES=1 python -m pytest tests/test_exercises.py -k exercise_3
"""

import importlib
import os
import random

import helpers
import pytest
import torch

import ptdpo
from experiments import warm_start
from toy_tasks import Grade
from toy_tasks.counting import Counting

pytestmark = pytest.mark.skipif("EXERCISES" not in os.environ, reason="exercises, for the reader")


def metrics(number, method):
    """The metrics of the run that an exercise asks for."""
    return helpers.rows(helpers.ROOT / f"runs/exercise-{number}/{method}/metrics.jsonl")


def test_exercise_1_lambda_is_zero():
    """Without the JSD in the loss PTD-PO is GRPO. The JSD is measured all the same."""
    for grpo, ptdpo_row in zip(metrics(1, "grpo"), metrics(1, "ptdpo"), strict=True):
        assert grpo["reward"] == ptdpo_row["reward"]
        assert grpo["accuracy"] == ptdpo_row["accuracy"]
        assert grpo["grad_norm"] == pytest.approx(ptdpo_row["grad_norm"], rel=1e-3)
    assert metrics(1, "ptdpo")[0]["jsd"] > 0.01


def test_exercise_2_a_teacher_without_a_hint():
    """Teacher and student are one model at first, and drift apart."""
    rows = metrics(2, "ptdpo")
    assert len(rows) >= 10
    assert rows[0]["jsd"] < 1e-6 < rows[-1]["jsd"]


def test_exercise_3_an_advantage_without_the_deviation(policy, ref):
    """`--advantage centred`: A = r - mean r; by default nothing changes. It reaches the step."""
    r = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75])
    assert torch.equal(ptdpo.group_advantages(r, 4, "centred"), expected)
    assert ptdpo.group_advantages(r, 4).max() > 1
    assert ptdpo.parse(["--toy", "--advantage", "centred"])["advantage"] == "centred"
    assert ptdpo.make_config({}).advantage == "std"
    norms = {}
    for kind in ("std", "centred"):
        changes = {"method": "grpo", "prompts": 2, "group": 4, "kl_weight": 0.0}
        config = ptdpo.make_config(changes | {"advantage": kind})
        row, _ = ptdpo.train_step(policy, ref, Wordy(), still(policy), config, [], 1)
        norms[kind] = row["grad_norm"]
    assert norms["centred"] < norms["std"]


def test_exercise_4_another_divergence():
    """`--divergence hellinger`: the sum of (sqrt p - sqrt q)^2 / 2 over the buckets."""
    stream = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 3, 6, dtype=torch.double, generator=stream).softmax(-1)
    expected = ((p.sqrt() - q.sqrt()) ** 2).sum(-1) / 2
    assert torch.allclose(ptdpo.DIVERGENCES["hellinger"](p.log(), q.log()), expected)
    assert ptdpo.make_config({"divergence": "hellinger"})


def test_exercise_4_has_a_gradient_where_a_bucket_is_empty():
    """Where p is 0 the slope of sqrt p is infinite, and infinity times 0 is no number."""
    stream = torch.Generator().manual_seed(0)
    z, teacher = torch.randn(2, 5, dtype=torch.double, generator=stream)
    z.requires_grad_()
    ptdpo.topk_jsd(z, teacher, 5, "hellinger").backward()  # K = V: the rest is empty
    assert z.grad.isfinite().all()
    assert z.grad.abs().max() > 1e-3


def test_exercise_5_another_source_of_hints(task, policy, tmp_path, signals):
    """`--hint neighbour`: the regions of the next group; the last group takes the first's."""
    config = ptdpo.make_config({"hint": "neighbour", "prompts": 3, "group": 2})
    problems = [task.problem("train", 0, i) for i in range(3)]
    rollout = ptdpo.sample_and_grade(policy, task, problems, 2, ("test", 0))
    relevance = list(torch.rand(3, 1, 25, generator=torch.Generator().manual_seed(0)))
    hints = ptdpo.build_hints(policy, task, rollout, relevance, config, ("test", 0))
    for b, hint in enumerate(hints):
        scores = relevance[(b + 1) % 3][0]
        assert hint.regions == sorted(scores.topk(10).indices.tolist())
    # A run knows which layer to read.
    assert ptdpo.main(helpers.start(tmp_path, "--hint", "neighbour", steps=1)) == 0
    assert len(ptdpo.read_run(tmp_path / "ptdpo")["layers"]) == 1


def test_exercise_6_another_metric(policy, ref):
    """`advantage_size`: mean |A| over the answers of a step."""
    config = ptdpo.Config(method="grpo", prompts=3, group=4)
    task = Wordy()
    problems = [task.problem("train", 0, i) for i in range(3, 6)]
    rollout = ptdpo.sample_and_grade(policy, task, problems, 4, (0, 1))
    expected = ptdpo.group_advantages(rollout.rewards, 4).abs().mean().item()
    row, _ = ptdpo.train_step(policy, ref, task, still(policy), config, [], 1)
    assert row["advantage_size"] == pytest.approx(expected)
    assert expected > 0
    assert "advantage_size" in ptdpo.METRICS


def test_exercise_7_a_schedule(tmp_path, signals, monkeypatch):
    """`--lr-decay`: the rate falls linearly to lr / steps; a resumed run has the same rates."""
    flags = ["--lr", "0.004", "--lr-decay"]
    whole = tmp_path / "whole"
    assert ptdpo.main(helpers.start(whole, *flags, method="grpo")) == 0
    seen = [row["lr"] for row in helpers.rows(whole / "grpo/metrics.jsonl")]
    assert seen == pytest.approx([0.004, 0.003, 0.002, 0.001])

    report = ptdpo.report

    def stop_after_two(config, rows, sample):
        report(config, rows, sample)
        if len(rows) == 2:
            ptdpo.STOP.append(2)

    monkeypatch.setattr(ptdpo, "report", stop_after_two)
    stopped = tmp_path / "stopped"
    with pytest.raises(SystemExit):
        ptdpo.main(helpers.start(stopped, *flags, method="grpo"))
    monkeypatch.setattr(ptdpo, "report", report)
    assert ptdpo.main(["--resume", str(stopped)]) == 0
    assert helpers.contents(stopped / "grpo") == helpers.contents(whole / "grpo")


def test_exercise_8_a_task():
    """toy_tasks/mine.py: a class Mine that asks something else than Counting."""
    mine = importlib.import_module("toy_tasks.mine")
    task = mine.Mine()
    problem = task.problem("train", 0, 0)
    assert problem.question != Counting().problem("train", 0, 0).question
    assert problem.images[0].tobytes() == task.problem("train", 0, 0).images[0].tobytes()
    assert problem.images[0].tobytes() != task.problem("train", 0, 1).images[0].tobytes()
    assert not task.grade(problem, "r0c0 total nothing", True).solved
    # lesson(task, kind, rng): right when tutored, often wrong alone, and no hint that spoils.
    solved = {"tutored": 0, "alone": 0}
    for kind in solved:
        for i in range(40):
            problem, hint, answer = mine.lesson(task, kind, random.Random(i))
            solved[kind] += task.grade(problem, answer, True).solved
            assert not task.grade(problem, answer, False).solved
            assert not ptdpo.spoils(hint, problem.answer)
            assert bool(hint) == (kind == "tutored")
    assert solved["tutored"] == 40
    assert solved["alone"] < 30


def test_exercise_8_a_base_and_a_run(tmp_path, signals):
    """A base learns from the lessons, and the trainer takes it as it takes that of Counting."""
    mine = importlib.import_module("toy_tasks.mine")
    task = mine.Mine()
    policy = task.new_policy(0)
    examples = [mine.lesson(task, "tutored", random.Random(i)) for i in range(32)]
    before = warm_start.answer_loss(policy, examples).item()
    warm_start.teach(policy, mine.lesson, task, ("tutored", "alone"), 0, 30, batch=16)
    assert warm_start.answer_loss(policy, examples).item() < before - 0.5
    base = tmp_path / "base.safetensors"
    ptdpo.save_checkpoint(base, 0, policy)
    small = {"steps": 2, "prompts": 2, "group": 2, "eval_problems": 4}
    config = ptdpo.make_config(small | {"base": str(base)})
    ptdpo.create_run(config, tmp_path / "ptdpo")
    ptdpo.run(tmp_path / "ptdpo", task)
    assert len(helpers.rows(tmp_path / "ptdpo/metrics.jsonl")) == 2


class Wordy(Counting):
    """Rewards each answer by its length, so that every group has advantages."""

    def grade(self, problem, text, finished):
        """From 0 to 0.1; nothing is solved."""
        return Grade(len(text) / 1000, False)


def still(policy):
    """An optimizer that moves nothing."""
    return torch.optim.SGD(policy.parameters(), lr=0.0)
