"""Runs that die, are stopped, or are started twice: nothing is lost, nothing is doubled."""

import json
import math
import os
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from helpers import ROOT, contents, rows, start, timeless
from safetensors.torch import load_file

import ptdpo
from ptdpo import main
from tiny_vlm import TinyVLM

pytestmark = pytest.mark.usefixtures("signals", "undrawn")


class Killed(BaseException):
    """Dies here."""


def same(run, other):
    """Weights, moments, step, metrics and samples, bit for bit, but for seconds."""
    assert timeless(run) == timeless(other)
    assert contents(run) == contents(other)
    assert not list(run.glob("*.tmp"))


def dying(action, left, seen):
    """The action, but it kills at call left[0]: before it is done, or behind it where that is even.

    seen collects what it was done to at that moment.
    """
    late = left[0] % 2 == 0

    def call(path, *args):
        left[0] -= 1
        if late or left[0]:
            action(path, *args)
        if left[0] == 0:
            seen.add((os.path.basename(path), late))
            raise Killed

    return call


def test_death_at_every_write(tmp_path, monkeypatch):
    """The k-th process dies at its k-th sync or rename; the last one ends as if it were alone."""
    monkeypatch.setattr(ptdpo, "CALIBRATION", 4)
    flags = ("--updates-per-batch", "2", "--distill-decay", "--save-every", "2")
    assert main(start(tmp_path / "whole", *flags, steps=3)) == 0
    run = tmp_path / "out/ptdpo"
    seen = set()
    lost = set()
    for k in range(1, 99):
        command = ["--resume", str(run.parent)]
        if not (run / "run.json").exists():
            command = start(run.parent, *flags, steps=3)
        with monkeypatch.context() as patch:
            left = [k]
            patch.setattr(ptdpo, "sync", dying(ptdpo.sync, left, seen))
            patch.setattr(ptdpo.os, "replace", dying(os.replace, left, seen))
            try:
                assert main(command) == 0
                break
            except Killed:
                saved = contents(run)[0] if (run / "checkpoint.safetensors").exists() else 0
                with open(run / "metrics.jsonl", "a+") as file:
                    file.seek(0)
                    lost.add(len(file.readlines()) - saved)
                    file.write('{"step": 3, "rew')  # a line that was torn
    same(run, tmp_path / "whole/ptdpo")
    assert k > 10 and {("run.tmp", False), ("checkpoint.tmp", True)} <= seen
    assert lost == {0, 1, 2}  # rows after the saved step were dropped, and made again


def test_more_steps(tmp_path):
    """--steps may be raised, and stays raised; the result is that of one long run."""
    assert main(start(tmp_path / "long", steps=4)) == 0
    assert main(start(tmp_path / "short", steps=2)) == 0
    resume = ["--resume", str(tmp_path / "short")]
    assert main([*resume, "--steps", "4"]) == 0
    assert main(resume) == 0
    same(tmp_path / "short" / "ptdpo", tmp_path / "long" / "ptdpo")
    run = json.loads((tmp_path / "short" / "ptdpo" / "run.json").read_text())
    assert run["config"]["steps"] == 4


@pytest.mark.parametrize(("every", "steps"), [("1", [1, 2, 3]), ("2", [2, 3]), ("50", [3])])
def test_checkpoints_come_as_often_as_told(every, steps, tmp_path, monkeypatch):
    """And at the end. What is saved are the live tensors: there is no copy in memory."""
    saved = {}

    def save_file(tensors, path, metadata):
        saved[int(metadata["step"])] = tensors
        path.write_bytes(b"")

    monkeypatch.setattr(ptdpo, "save_file", save_file)
    assert main(start(tmp_path, "--save-every", every, steps=3, method="grpo")) == 0
    assert list(saved) == steps
    for name, tensor in saved[steps[0]].items():
        assert torch.equal(tensor, saved[3][name]), name  # the first has moved on


@pytest.mark.parametrize(("method", "number"), [("grpo", 15), ("ptdpo", 2)])
def test_a_signal_ends_the_step(method, number, finished, tmp_path, monkeypatch, capsys):
    """Amid step 3, where no checkpoint is due; the run goes on as if nothing had been."""
    plain = ptdpo.backward

    def backward(*args):
        if len(rows(tmp_path / method / "metrics.jsonl")) == 2:
            os.kill(os.getpid(), number)
        return plain(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(ptdpo, "backward", backward)
        main(start(tmp_path, method=method))
    run = tmp_path / method
    assert end.value.code == 128 + number
    assert f"stopped after step 3: python ptdpo.py --resume {run}" in capsys.readouterr().out
    assert contents(run)[0] == len(rows(run / "metrics.jsonl")) == 3
    assert main(["--resume", str(tmp_path)]) == 0
    same(run, finished[method])


def test_two_processes_as_a_user_starts_them(tmp_path, capsys):
    """A run has one process: a second is refused, and harms nothing. A signal is passed on: both
    methods stop and can go on, the exit code is the signal's.
    """
    argv = [sys.executable, "-u", ROOT / "ptdpo.py", *start(tmp_path, method="both", steps=9999)]
    first = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waiting = {"grpo", "ptdpo"}
    while waiting:  # until each has evaluated once
        line = first.stdout.readline()
        assert line, first.stderr.read()
        waiting.discard(line.split()[0])
    before = [(tmp_path / method / "run.json").read_text() for method in ("grpo", "ptdpo")]
    again = start(tmp_path, "--overwrite", "--seed", "1", steps=2)
    for argv in (again, *(["--resume", str(tmp_path / method)] for method in ("ptdpo", "grpo"))):
        capsys.readouterr()
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "another process" in error
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    printed, error = first.communicate()
    assert first.returncode == 143 and "Traceback" not in error, error
    for method, config in zip(("grpo", "ptdpo"), before):
        run = tmp_path / method
        assert f"--resume {run}" in printed and (run / "run.json").read_text() == config
        steps = [row["step"] for row in rows(run / "metrics.jsonl")]
        assert steps == list(range(1, contents(run)[0] + 1))
    assert main(again) == 0  # nothing of the old run stays
    assert len(rows(run / "metrics.jsonl")) == contents(run)[0] == 2


def test_one_method_may_run_beside_the_other(tmp_path, capsys):
    """In one --out; and a lock ends with its process, or with an error."""
    with pytest.raises(Killed), ptdpo.locked(tmp_path / "ptdpo"):
        assert main(start(tmp_path, steps=1, method="grpo")) == 0
        assert main(start(tmp_path, steps=1)) == 2
        assert "another process" in capsys.readouterr().err
        raise Killed
    assert main(start(tmp_path, steps=1)) == 0


def test_three_steps_without_an_update_end_the_run(tmp_path, monkeypatch, capsys):
    """One line and code 2; what was logged is strict JSON; the last checkpoint is sound."""
    plain = TinyVLM.forward
    count = []

    def forward(self, *args, **more):
        hidden, attention = plain(self, *args, **more)
        count.extend([1] * torch.is_grad_enabled())
        bad = torch.is_grad_enabled() and len(count) in (2, 4, 5, 6)
        return hidden * (math.nan if bad else 1), attention

    with monkeypatch.context() as patch:
        patch.setattr(TinyVLM, "forward", forward)
        assert main(start(tmp_path, "--save-every", "1", steps=9, method="grpo")) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "lower --lr" in printed.err
    assert printed.out.count("gradient is not finite, update left out") == 4
    run = tmp_path / "grpo"
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
    skipped = [row["skipped"] for row in rows(run / "metrics.jsonl")]
    assert skipped == [0, 1, 0, 1, 1, 1]
    assert contents(run)[0] == 3
    assert all(x.isfinite().all() for x in load_file(run / "checkpoint.safetensors").values())
    assert main(["--resume", str(tmp_path)]) == 0  # the lock was released
    assert len(rows(run / "metrics.jsonl")) == 9


def test_a_full_disk_is_one_line(finished, tmp_path, capsys, monkeypatch):
    """The checkpoint before it stays, and the run goes on."""
    assert main(start(tmp_path, steps=2)) == 0
    capsys.readouterr()
    full = OSError(28, "No space left on device", "checkpoint.tmp")
    with monkeypatch.context() as patch:
        patch.setattr(ptdpo, "save_file", Mock(side_effect=full))
        assert main(["--resume", str(tmp_path), "--steps", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error
    assert contents(tmp_path / "ptdpo")[0] == 2
    assert main(["--resume", str(tmp_path)]) == 0
    same(tmp_path / "ptdpo", finished["ptdpo"])
