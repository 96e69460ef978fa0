"""Two processes of torchrun take the same steps as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_qwen
import torch
from helpers import ROOT

TOY = "--toy --method ptdpo --steps 3 --prompts 5 --group 4 --eval-problems 7 --eval-every 1"


def one_step(folder, **changes):
    """Gradient, completion, hints and metrics of a step of a tiny Qwen2-VL on five problems."""
    import ptdpo
    from toy_tasks import Grade
    from toy_tasks.jsonl import FreeText

    config = ptdpo.Config(model=str(folder), method="ptdpo", prompts=5, group=3, train_vision=True,
                          hint_regions=3, clip_norm=1e9, **changes)  # fmt: skip
    policy, task, key = ptdpo.HFPolicy(config), FreeText(max_tokens=7, difficulty=0), ("ranks", 1)
    parity = lambda text: sum(text.encode()) % 3 == 0
    task.grade = lambda problem, text, finished: Grade(1.0 * parity(text), parity(text), None)
    ref = policy.frozen_copy()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.1)  # the KL has a gradient
    problems = [task.problem("train", 0, i) for i in range(config.prompts)]
    rollout = ptdpo.answer(policy, task, problems, config.group, 1.0, key)
    rollout.adv = ptdpo.group_advantages(rollout.reward, config.group)
    ptdpo.read_reference(ref, rollout, config, [0, 1])
    rollout.hints = ptdpo.build_hints(policy, task, rollout, config, key)
    ptdpo.tutor(ref, rollout, config)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    tokens, norm = ptdpo.update(policy, ref, optimizer, rollout, config, 1.0)
    grad = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    hints = [h.text for h in rollout.hints]
    return grad, rollout.completion, hints, ptdpo.step_metrics(rollout, tokens, norm)


def near(row, share):
    """A row of metrics, to rounding."""
    return {k: v if v is None else pytest.approx(v, rel=share, abs=1e-5) for k, v in row.items()}


def worker(folder, out):
    """What each of the two processes does."""
    import ptdpo
    from toy_tasks.ranks import connect

    connect()
    steps = [one_step(folder), one_step(folder, updates_per_batch=2, micro_batch=1)]
    assert ptdpo.main([*TOY.split(), "--out", str(out / "two")]) == 0
    report = ptdpo.report

    def stop_here(*args):
        report(*args)
        if ptdpo.RANK == 1:  # a signal that one process alone has seen
            ptdpo.STOP.append(15)

    ptdpo.report = stop_here
    try:
        ptdpo.main([*TOY.split(), "--out", str(out / "stopped")])
    except SystemExit as end:
        (out / f"exit{ptdpo.RANK}").write_text(str(end.code))
    if ptdpo.RANK == 0:
        torch.save(steps, out / "steps.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder of the model, folder of what two processes wrote."""
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    tiny_qwen.save(folder, "qwen2_vl")
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    setting = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, *launch, __file__, folder, out]
    done = subprocess.run(call, cwd=ROOT, env=setting, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, out


def test_gradients_of_two_processes_are_those_of_one(ran):
    """Same answers and hints, and the same gradient, for uneven shares and for two updates."""
    folder, out = ran
    for changes, two in zip(({}, {"updates_per_batch": 2, "micro_batch": 1}),
                            torch.load(out / "steps.pt", weights_only=False)):  # fmt: skip
        grad, completion, hints, row = one_step(folder, **changes)
        assert torch.equal(two[1], completion) and two[2] == hints
        assert grad.norm() > 1e-3 and 0 < row["solved"] < 1 and row["jsd"] > 0
        print("largest difference", (two[0] - grad).abs().max(), "of", grad.abs().max())
        assert (two[0] - grad).abs().max() < 1e-6
        assert two[3] == near(row, 1e-4)


def test_runs_of_two_processes_are_those_of_one(ran, tmp_path, signals):
    """The toy by the command line: metrics of every step, and one set of files."""
    import ptdpo

    _, out = ran
    assert ptdpo.main([*TOY.split(), "--out", str(tmp_path)]) == 0
    one, two = (
        [json.loads(line) for line in (f / "ptdpo" / "metrics.jsonl").read_text().splitlines()]
        for f in (tmp_path, out / "two")
    )
    for a, b in zip(one, two, strict=True):
        del a["seconds"], b["seconds"]
        assert b == near(a, 1e-3)


def test_a_signal_to_one_process_stops_both(ran):
    """After the same step, with the same exit code, and with a checkpoint of it."""
    _, out = ran
    assert [(out / f"exit{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert len((out / "stopped" / "ptdpo" / "metrics.jsonl").read_text().splitlines()) == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(*map(Path, sys.argv[1:]))
