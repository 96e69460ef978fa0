"""Two processes of torchrun take the steps of one, and end together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_qwen
import torch
from helpers import ROOT, batch_of, rows, timeless

import ptdpo
from experiments import figures
from toy_tasks import Problem
from toy_tasks.free_text import FreeText

TOY = "--toy --method ptdpo --steps 3 --prompts 4 --group 4 --eval-problems 17 --eval-every 1"
QWEN = """--model assets/small-qwen --method ptdpo --steps 2 --prompts 2 --group 4 --max-tokens 16
    --max-pixels 20000 --eval-problems 2"""
STEPS = (  # settings of a step, and whether every other problem has no picture
    ({}, False),
    ({"updates_per_batch": 2, "micro_batch": 1, "algorithm": "gspo"}, False),
    ({"train_vision": True}, True),  # the second process has no picture at all
)
REWARDS = """
import os

def coin(problem, text):  # not a function of its arguments: no two processes would agree
    return os.urandom(1)[0] % 2

calls = 0

def judge(problem, text):  # fails on one call, in one process
    global calls
    calls += os.environ["RANK"] == "1"
    if calls == 30:
        raise TimeoutError("the judge does not answer")
    return 0.0
"""


def one_step(folder, changes, mixed):
    """Answers, hints, metrics and the gradients of the updates of a step on four problems."""
    config = ptdpo.Config(model=str(folder), prompts=4, group=3, kl_weight=1.0, **changes)
    policy = ptdpo.HFPolicy(config)
    ref = policy.frozen_copy()
    with torch.no_grad():
        policy.head_weight.mul_(1.1)  # the KL has a gradient
    text_only = Problem([], "Say yes.", "yes", "Name it.") if mixed else None
    task = tiny_qwen.Parity(7, [None, text_only])
    problems = ptdpo.pose(task, "train", 0, 0, 4)
    rollout = ptdpo.sample_and_grade(policy, task, problems, config.group, ("ranks", 1))
    hints, batch = batch_of(ref, task, rollout, config)
    learned = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(learned.values(), lr=1e-3)
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad for name, p in learned.items()})
    )
    tokens, norm, skipped = ptdpo.update(policy, ref, optimizer, batch, config, 1)
    metrics = ptdpo.step_metrics(policy, task, rollout, hints, batch.distill, tokens)
    metrics |= {"grad_norm": norm, "skipped": skipped}
    return rollout.texts, [hint.text for hint in hints], metrics, gradients


def main(argv, label, out):
    """ptdpo.main, and how it ended for this process."""
    try:
        code = ptdpo.main(argv.split())
    except SystemExit as end:
        code = end.code
    (out / f"{label}{ptdpo.RANK}").write_text(str(code))


def worker(out):
    """What each of the two processes does."""
    figures.finish = lambda folders: None
    ptdpo.CALIBRATION = 4
    ptdpo.connect()
    torch.save([one_step(out / "model", *step) for step in STEPS], out / f"steps{ptdpo.RANK}.pt")
    make_task_of = ptdpo.make_task_of

    def late(config):  # the second process reads its data when the first has begun the run
        if ptdpo.RANK == 1:
            any((out / "two/ptdpo/run.json").exists() for _ in range(100_000))
        return make_task_of(config)

    ptdpo.make_task_of = late
    main(f"{TOY} --out {out}/two", "two", out)
    report = ptdpo.report

    def stop_here(*args):
        report(*args)
        if ptdpo.RANK == 1:  # a signal that one process alone has seen
            ptdpo.STOP.append(15)

    ptdpo.report = stop_here
    main(f"{TOY} --out {out}/stopped", "stopped", out)
    ptdpo.report = report
    sys.path.append(str(out))
    grade = FreeText.grade
    graded = []
    FreeText.grade = lambda *args: graded.append(1) or grade(*args)
    main(f"{QWEN} --reward rewards:coin --out {out}/coin", "coin", out)
    (out / f"graded{ptdpo.RANK}").write_text(str(len(graded)))
    main(f"{QWEN} --reward rewards:judge --out {out}/judge", "judge", out)
    for label, flags in (("few", "--prompts 1"), ("bad", "--lr nan")):
        main(f"--toy {flags} --out {out}/{label}", label, out)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Folder of what two processes wrote and printed, and of their model."""
    out = tmp_path_factory.mktemp("out")
    tiny_qwen.save(out / "model", "qwen2_vl")
    (out / "rewards.py").write_text(REWARDS)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, *launch, __file__, out]
    done = subprocess.run(argv, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "printed").write_text(done.stderr)
    return out


def codes(out, label):
    return [(out / f"{label}{rank}").read_text() for rank in (0, 1)]


def near(row, share):
    return {k: pytest.approx(v, share, 1e-5) if type(v) is float else v for k, v in row.items()}


@pytest.mark.parametrize("which", range(len(STEPS)))
def test_gradients_of_two_processes_are_those_of_one(out, which):
    """Answers, hints, metrics, and the gradient of every parameter in every update."""
    texts, hints, metrics, gradients = one_step(out / "model", *STEPS[which])
    assert 0 < metrics["solved"] < 1 and metrics["jsd"] > 0 and metrics["kl"] > 0
    for rank in (0, 1):
        two = torch.load(out / f"steps{rank}.pt", weights_only=False)[which]
        assert two[0] == texts[rank::2] and two[1] == hints[rank::2]
        assert two[2] == near(metrics, 1e-4)
        assert len(two[3]) == len(gradients) == STEPS[which][0].get("updates_per_batch", 1)
        for ours, theirs in zip(two[3], gradients):
            assert ours.keys() == theirs.keys()
            for name, grad in theirs.items():
                assert (ours[name] - grad).abs().max() < 1e-6 * max(1, grad.abs().max()), name
    assert any("visual" in name for name in gradients[0]) == (which == 2)


def test_runs_of_two_processes_are_those_of_one(out, tmp_path, signals, monkeypatch):
    """The toy by the command line: metrics of every step, and one set of files."""
    monkeypatch.setattr(figures, "finish", lambda folders: None)
    monkeypatch.setattr(ptdpo, "CALIBRATION", 4)
    assert ptdpo.main([*TOY.split(), "--out", str(tmp_path)]) == 0
    one = timeless(tmp_path / "ptdpo")[0]
    two = timeless(out / "two" / "ptdpo")[0]
    assert codes(out, "two") == ["0", "0"] and len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert b == near(a, 1e-3)
    assert not list((out / "two" / "ptdpo").glob("*.tmp"))


def test_a_signal_to_one_process_stops_both(out):
    """After the same step, with the same exit code."""
    assert codes(out, "stopped") == ["143", "143"]
    assert len(rows(out / "stopped/ptdpo/metrics.jsonl")) == 1


def test_a_reward_that_is_no_function(out):
    """Each answer is graded once, by the process that sampled it, so nobody can disagree."""
    assert codes(out, "coin") == ["0", "0"]
    tutored = 2 * 4 + 2
    step = 2 * 4 + 2 + 2 * ptdpo.SAMPLES
    base = 2 + 2 * ptdpo.SAMPLES
    answers = base + 4 * 4 + tutored + 2 * step
    assert codes(out, "graded") == [str(answers // 2)] * 2
    for row in rows(out / "coin/ptdpo/metrics.jsonl"):
        assert (row["jsd"] is None) == (row["distilled"] == 0) and row["skipped"] == 0


def test_mistakes_end_both(out):
    """With one line, printed once, though the other process may wait for the one that failed."""
    printed = (out / "printed").read_text()
    assert "the judge does not answer" in printed and "Traceback" not in printed
    for label, says in (("judge", "--reward"), ("few", "--prompts"), ("bad", "--lr nan")):
        told = [line for line in printed.splitlines() if line.startswith(f"ptdpo.py: {says}")]
        assert codes(out, label) == ["2", "2"] and len(told) == 1, printed
    assert not (out / "few").exists() and not (out / "bad").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    ptdpo.leave(worker, Path(sys.argv[1]))
