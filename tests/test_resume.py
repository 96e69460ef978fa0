"""Nothing lost, nothing doubled: interrupted runs that go on, and updates that are not finite."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, config, contents, forge, make_rollout, rows, start, timeless
from moments import trace

import ptdpo
from ptdpo import main
from tiny_vlm import TinyVLM

pytestmark = pytest.mark.usefixtures("signals")
METHODS = pytest.mark.parametrize("method", ["grpo", "ptdpo"])


def same(run, other):
    """Weights, AdamW, state and logs, bit for bit, but for seconds."""
    assert timeless(run) == timeless(other)
    assert contents(run) == contents(other)


def snapshot(folder):
    """What the disk holds at this moment."""
    return tuple(sorted((str(p.relative_to(folder)), p.read_bytes())
                        for p in folder.rglob("*") if p.is_file()))  # fmt: skip


def restore(folder, held):
    """Put a snapshot on the disk, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in held:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# ----------------------------------------------------------------------------------- crash points
def go_on(config, run):
    """Resume, or start again where nothing had begun, without drawing."""
    resume = (run / "run.json").exists()
    ptdpo.train(*ptdpo.toy(config), config, run, resume)


@METHODS
def test_death_at_any_moment(method, tmp_path, monkeypatch):
    """What is on the disk before, amid and after each write, sync, rename, truncation and removal
    is enough to end bit-equal; and so it is when the resumed run dies once more."""
    config = ptdpo.Config(method, steps=2, prompts=2, group=2, eval_problems=2, eval_every=2)
    run, moments, seen = tmp_path / "run", [], {}

    def moment(label):
        moments.append(label)
        seen.setdefault(snapshot(run), label)

    with monkeypatch.context() as patch:
        trace(patch, moment)
        go_on(config, run)
    shutil.copytree(run, tmp_path / "whole")
    torn = max((held for held in seen if "run.json" in dict(held)),
               key=lambda held: len(dict(held)["metrics.jsonl"]))  # fmt: skip
    restore(run, [(n, d + b'{"step": 9, "rew' * (n in ptdpo.LOGS)) for n, d in torn])
    with monkeypatch.context() as patch:
        trace(patch, moment)
        go_on(config, run)
    same(run, tmp_path / "whole")
    assert len(moments) > 80 and len(seen) > 25, (len(moments), len(seen))
    for word in ("before write", "amid write", "after write", "before sync", "after sync",
                 "before rename checkpoint", "after rename checkpoint", "before truncate",
                 "after truncate", "rename run.tmp", "remove run.json"):  # fmt: skip
        assert any(word in label for label in moments), word
    begun = [held for held in seen if "run.json" in dict(held)]
    fresh = [held for held in seen if "run.json" not in dict(held)]
    for held in [*begun, *fresh[-1:]]:  # where nothing had begun, all start alike
        restore(run, held)
        go_on(config, run)
        same(run, tmp_path / "whole")
        assert not list(run.glob("*.tmp")), seen[held]


# -------------------------------------------------------------------------------------- exactness
class Killed(BaseException):
    """Dies here."""


@METHODS
@pytest.mark.parametrize("updates", [1, 3])
def test_resumed_equals_uninterrupted(method, updates, tmp_path, monkeypatch):
    """Death after each checkpoint in turn, rows logged since then included, and --resume."""
    flags = "--updates-per-batch", str(updates), "--prompts", "4", "--distill-decay"
    assert main(start(tmp_path / "whole", *flags, method=method)) == 0
    plain, broken = ptdpo.update, start(tmp_path / "broken", *flags, method=method)
    for last in (2, 3):  # updates made before death: after the checkpoint of step 1, and of step 2

        def update(*args, last=last):
            if len(rows(tmp_path / "broken" / method / "metrics.jsonl")) >= last:
                raise Killed
            return plain(*args)

        monkeypatch.setattr(ptdpo, "update", update)
        with pytest.raises(Killed):
            main(broken)
        broken = ["--resume", str(tmp_path / "broken")]
    monkeypatch.setattr(ptdpo, "update", plain)
    metrics = tmp_path / "broken" / method / "metrics.jsonl"
    assert len(rows(metrics)) == 3  # one more than the checkpoint of step 2 knows of
    metrics.write_text(metrics.read_text()[:-7])  # and its last line is torn
    assert main(broken) == 0
    same(tmp_path / "broken" / method, tmp_path / "whole" / method)


def test_resume_restores_everything(finished, tmp_path, monkeypatch):
    """Weights, AdamW's moments and its own count, step and monitor are those of the checkpoint."""
    shutil.copytree(finished["ptdpo"], tmp_path / "run")
    path, taken = tmp_path / "run" / "checkpoint.safetensors", {}
    state, tensors = ptdpo.open_checkpoint(path)

    def update(policy, ref, optimizer, rollout, *rest):
        taken.update(ptdpo.live_tensors(policy, optimizer))
        raise Killed

    monkeypatch.setattr(ptdpo, "update", update)
    with pytest.raises(Killed):
        main(["--resume", str(tmp_path / "run"), "--steps", "9"])
    assert taken.keys() == tensors.keys()
    assert all(torch.equal(taken[n], tensors[n]) for n in tensors)
    monitor = ptdpo.Monitor(**state["monitor"])
    assert monitor.start_entropy and [r["step"] for r in monitor.recent] == [1, 2, 3, 4]
    assert state["step"] == 4 and all(t == 4 for n, t in tensors.items() if n[:5] == "step.")


def test_more_steps(finished, tmp_path):
    """--steps may be raised, and stays raised; the weights are those of one long run."""
    assert main(start(tmp_path / "long", steps=6)) == 0
    assert main(start(tmp_path / "short", steps=2)) == 0
    argv = ["--resume", str(tmp_path / "short")]
    assert main([*argv, "--steps", "6"]) == 0 and main(argv) == 0
    runs = [tmp_path / name / "ptdpo" for name in ("long", "short")]
    same(*runs)
    assert contents(runs[0])[0]["config"]["steps"] == 6


def test_threads_and_deterministic_algorithms_are_set_again(finished, tmp_path, monkeypatch):
    """The number is stored with the run, and --resume goes by it."""
    shutil.copytree(finished["ptdpo"], tmp_path / "run")
    path, found = tmp_path / "run" / "checkpoint.safetensors", []
    forge(path, lambda state, _: state["config"].update(threads=2))
    torch.set_deterministic_debug_mode("default")

    def train(policy, task, config, *_):
        found.extend((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        assert config.threads == 2
        raise Killed

    monkeypatch.setattr(ptdpo, "train", train)
    try:
        with pytest.raises(Killed):
            main(["--resume", str(tmp_path)])
        assert found == [2, True]
    finally:
        torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------- signals
@METHODS
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves(method, number, code, finished, tmp_path, monkeypatch,
                                          capsys):  # fmt: skip
    """Amid step 3, where no checkpoint is due; the run goes on as if nothing had been."""
    plain = ptdpo.total_loss

    def total_loss(policy, ref, part, config):
        if len(rows(tmp_path / method / "metrics.jsonl")) == 2:
            os.kill(os.getpid(), number)
        return plain(policy, ref, part, config)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(ptdpo, "total_loss", total_loss)
        main(start(tmp_path, method=method))
    folder = tmp_path / method
    assert end.value.code == code
    assert f"stopped after step 3: python ptdpo.py --resume {folder}" in capsys.readouterr().out
    state, _ = ptdpo.open_checkpoint(folder / "checkpoint.safetensors")
    assert state["step"] == len(rows(folder / "metrics.jsonl")) == 3
    assert main(["--resume", str(tmp_path)]) == 0
    same(folder, finished[method])


def test_a_signal_to_both_methods(tmp_path):
    """The parent passes it on: both stop, both can go on, the exit code is the signal's."""
    argv = [sys.executable, "-u", ROOT / "ptdpo.py", *start(tmp_path, method="both", steps=9999)]
    run = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
    waiting, said = {"grpo", "ptdpo"}, ""
    while waiting:  # until each has evaluated once
        line = run.stdout.readline()
        assert line, run.stderr.read()
        waiting.discard(line.split()[0])
    run.send_signal(signal.SIGTERM)
    said, error = run.communicate()
    assert run.returncode == 143 and "Traceback" not in error, error
    for method in ("grpo", "ptdpo"):
        assert f"--resume {tmp_path / method}" in said
        state, _ = ptdpo.open_checkpoint(tmp_path / method / "checkpoint.safetensors")
        assert state["step"] == len(rows(tmp_path / method / "metrics.jsonl"))


# -------------------------------------------------------------------------------- numerical guard
def broken_update(policy, ref, task, breakage, **changes):
    """An update in which something is not finite -> rollout, weights that moved, values."""
    c = config(**changes)
    rollout = make_rollout(policy, ref, task, c, [0, 1, 0, 0] * 4)
    breakage(policy, rollout)
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    tokens, norm = ptdpo.update(policy, ref, optimizer, rollout, c, 1.0)
    moved = any(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    assert all(p.isfinite().all() for p in policy.parameters())
    return rollout, moved, ptdpo.step_metrics(rollout, tokens, norm)


def nan_hidden(policy, rollout):
    """A policy that gives NaN."""
    plain = policy.forward

    def forward(*args, **more):
        hidden, looks = plain(*args, **more)
        return hidden * math.nan, looks

    policy.forward = forward


def fill(name, value):
    """Something that the rollout brings along."""
    return lambda policy, rollout: getattr(rollout, name)[1].fill_(value)


def nan_teacher(policy, rollout):
    """A teacher that gives NaN."""
    rollout.teacher[rollout.distill.nonzero()[0]] = math.nan


def inf_gradient(policy, rollout):
    """Finite values, and a gradient that overflows."""
    policy.position.register_hook(lambda g: g * math.inf)


@pytest.mark.parametrize(
    ("breakage", "name"),
    [(nan_hidden, "logp"), (nan_teacher, "jsd"), (fill("logp_ref", math.nan), "kl"),
     (fill("adv", math.inf), "loss"), (fill("adv", math.nan), "loss"), (inf_gradient, "gradient")],
)  # fmt: skip
@pytest.mark.parametrize("micro", [0, 1])
def test_what_is_not_finite_is_named_and_moves_no_weight(policy, ref, task, breakage, name, micro):
    """The whole update is left out, though other micro-batches of it were sound."""
    rollout, moved, row = broken_update(policy, ref, task, breakage, micro_batch=micro)
    assert not moved and rollout.skipped == row["skipped"] == name


def test_a_sound_update_is_not_skipped(policy, ref, task):
    """And says so."""
    rollout, moved, row = broken_update(policy, ref, task, lambda *_: None)
    assert moved and rollout.skipped is None and row["skipped"] == 0


def test_only_the_broken_update_of_a_batch_is_skipped(policy, ref, task):
    """Two updates a batch, NaN in the second group's advantage: the other update is made."""
    changes = {"updates_per_batch": 2}
    _, moved, row = broken_update(policy, ref, task, fill("adv", math.nan), **changes)
    assert moved and row["skipped"] == "loss"


def faulty(monkeypatch, steps):
    """From now on the policy gives NaN in its updates number `steps`."""
    plain, count = TinyVLM.forward, []

    def forward(self, *args, **more):
        hidden, looks = plain(self, *args, **more)
        count.append(1) if torch.is_grad_enabled() else None
        bad = torch.is_grad_enabled() and len(count) in steps
        return (hidden * math.nan if bad else hidden), looks

    monkeypatch.setattr(TinyVLM, "forward", forward)


def strict(path):
    """The rows of a file as strict JSON."""
    return [json.loads(line, parse_constant=lambda word: 1 / 0) for line in open(path)]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_stops_after_so_many_in_a_row(limit, tmp_path, monkeypatch, capsys):
    """One clear line and exit code 2; what was logged is strict JSON; the checkpoint is sound."""
    faulty(monkeypatch, range(3, 99))
    assert main(start(tmp_path, "--max-skipped", str(limit), steps=9, method="grpo")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "logp is not finite" in error and "--lr" in error
    metrics = strict(tmp_path / "grpo" / "metrics.jsonl")
    assert [r["skipped"] for r in metrics] == [0, 0, *["logp"] * limit]
    assert all(set(r) == set(ptdpo.METRICS) for r in metrics)
    assert metrics[2]["entropy"] is metrics[2]["grad_norm"] is None and metrics[2]["reward"] >= 0
    strict(tmp_path / "grpo" / "samples.jsonl")
    _, tensors = ptdpo.open_checkpoint(tmp_path / "grpo" / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert all(t == 2 for n, t in tensors.items() if n.startswith("step."))


def test_a_sound_step_between_resets_the_count(tmp_path, monkeypatch, capsys):
    """Two, one good, two: never three in a row. AdamW counts the updates that were made."""
    faulty(monkeypatch, (2, 3, 5, 6))
    assert main(start(tmp_path, steps=7)) == 0
    assert capsys.readouterr().out.count("warning: logp is not finite, update skipped") == 4
    path = tmp_path / "ptdpo" / "checkpoint.safetensors"
    state, tensors = ptdpo.open_checkpoint(path)
    assert all(t == 3 for n, t in tensors.items() if n.startswith("step."))
    assert [r["step"] for r in state["monitor"]["recent"]] == [1, 4, 7]
    assert state["monitor"]["skipped"] == 0


def test_weights_that_are_not_finite_never_replace_good_ones(policy, tmp_path, capsys):
    """write_checkpoint refuses; and a learning rate that blows up ends in one line."""
    path = tmp_path / "checkpoint.safetensors"
    ptdpo.write_checkpoint(path, {"step": 1}, policy)
    before = path.read_bytes()
    policy.position.data[3, 4] = math.nan
    with pytest.raises(ptdpo.UserError, match="no longer finite"):
        ptdpo.write_checkpoint(path, {"step": 2}, policy)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert main(start(tmp_path, "--lr", "1e9", "--weight-decay", "1e9", steps=30)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "finite" in error
    _, tensors = ptdpo.open_checkpoint(tmp_path / "ptdpo" / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())


def test_any_bit_flip_and_any_truncation_is_noticed(tmp_path):
    """A small checkpoint, one bit of each byte in turn: in header, state and tensors."""
    path, model = tmp_path / "c.safetensors", torch.nn.Linear(3, 2)
    ptdpo.write_checkpoint(path, {"step": 1}, model)
    data, other = path.read_bytes(), tmp_path / "d.safetensors"
    flips = [data[:i] + bytes([b ^ 1 << i % 8]) + data[i + 1 :] for i, b in enumerate(data)]
    for damaged in (*flips, *(data[:n] for n in range(len(data)))):
        other.write_bytes(damaged)
        with pytest.raises(ptdpo.UserError):
            ptdpo.open_checkpoint(other)
