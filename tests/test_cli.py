"""The command line as README and --help promise it: what is written, printed and refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from helpers import BASE, ROOT, contents, files, rows, start, timeless
from PIL import Image

import ptdpo
from ptdpo import METRICS, main

pytestmark = pytest.mark.usefixtures("signals")
EVALUATED = {"accuracy", "point_f1", "right_reason"}
ALWAYS = set(
    "step reward solved entropy kl grad_norm groups_all_failed groups_mixed groups_all_solved"
    " completion_length seconds skipped distilled".split()
)
TUTORED = {"jsd", "hint_recall", "hints_rejected"}


# ------------------------------------------------------------------------------ what a run leaves
@pytest.mark.parametrize("method", ["grpo", "ptdpo"])
def test_files_of_a_run(finished, method):
    """These, no others, and no leftovers."""
    run = finished[method]
    names = ["checkpoint.safetensors", "metrics.jsonl", "run.json", "samples.jsonl"]
    assert sorted(os.listdir(run)) == names
    drawn = ["curves.png", "tutoring.png"] if method == "ptdpo" else ["curves.png"]
    assert sorted(os.listdir(run.parent)) == sorted([*drawn, method])
    for name in drawn:
        with Image.open(run.parent / name) as picture:
            picture.load()
            assert min(picture.size) > 300 and len(picture.getcolors(10**6)) > 10


@pytest.mark.parametrize("method", ["grpo", "ptdpo"])
def test_rows_of_metrics(finished, method):
    """One row a step, every key in every row, null where a value does not exist."""
    metrics = rows(finished[method] / "metrics.jsonl")
    assert [r["step"] for r in metrics] == [1, 2, 3, 4]
    for row in metrics:
        assert set(row) == set(METRICS)
        assert all(row[k] is not None for k in ALWAYS)
        assert all((row[k] is None) == (method == "grpo") for k in TUTORED - {"jsd"})
        assert (row["jsd"] is None) == (row["distilled"] == 0)
        assert (row["entropy_slope"] is None) == (row["step"] == 1)
        kinds = row["groups_all_failed"] + row["groups_mixed"] + row["groups_all_solved"]
        assert kinds == pytest.approx(1) and row["skipped"] == 0 and row["seconds"] > 0


def test_evaluations_at_the_first_the_last_and_every_fifth_step(tmp_path):
    """With the default of --eval-every, and the samples beside them."""
    argv = start(tmp_path, "--eval-every", "5", steps=7, method="grpo")
    assert main(argv) == 0
    for row in rows(tmp_path / "grpo" / "metrics.jsonl"):
        due = row["step"] in (1, 5, 7)
        assert all((row[k] is not None) == due for k in EVALUATED)
    assert [r["step"] for r in rows(tmp_path / "grpo" / "samples.jsonl")] == [1, 5, 7]
    assert ptdpo.Config().eval_every == 5


def test_run_json(finished):
    """Every setting, versions, commit, layers and the base's scores."""
    run = json.loads((finished["ptdpo"] / "run.json").read_text())
    assert set(run["config"]) == {f.name for f in fields(ptdpo.Config)}
    assert run["config"] | {"steps": 4, "group": 2, "method": "ptdpo"} == run["config"]
    assert run["versions"]["torch"] == torch.__version__ and "python" in run["versions"]
    assert set(run["base"]) == EVALUATED and len(run["layer_recall"]) == 3
    assert run["commit"] is None or len(run["commit"]) == 40


def test_samples(finished):
    """A group in full: as many answers as G, one JSD a token, the hint that the teacher read."""
    sample = rows(finished["ptdpo"] / "samples.jsonl")[0]
    assert len(sample["texts"]) == len(sample["rewards"]) == len(sample["solved"]) == 2
    assert [len(v) for v in sample["jsd"]] == [len(v) for v in sample["tokens"]]
    assert len(sample["hint"]["regions"]) == 10 and len(sample["relevance"]) == 25
    assert rows(finished["grpo"] / "samples.jsonl")[0]["hint"] is None


def test_checkpoint_holds_state_and_no_pickle(finished):
    """Weights and AdamW's state for each parameter; JSON for the rest."""
    path = finished["ptdpo"] / "checkpoint.safetensors"
    state, tensors = ptdpo.open_checkpoint(path)
    kinds = {"policy", "exp_avg", "exp_avg_sq", "step"}
    assert {n.split(".")[0] for n in tensors} == kinds and len(tensors) % 4 == 0
    assert all(t == 4 for n, t in tensors.items() if n.startswith("step."))
    assert state["step"] == 4 and state["config"]["threads"] == 1
    source = "".join((ROOT / p).read_text() for p in ("ptdpo.py", "tiny_vlm.py"))
    source += "".join(p.read_text() for p in (ROOT / "toy_tasks").glob("*.py"))
    assert "torch.load(" not in source and "import pickle" not in source


# ------------------------------------------------------------------------------------ same again
def test_same_seed_same_metrics(finished, tmp_path):
    """Twice the same command: the same rows but for seconds, the same weights, bit for bit."""
    assert main(start(tmp_path)) == 0
    assert timeless(tmp_path / "ptdpo") == timeless(finished["ptdpo"])
    assert contents(tmp_path / "ptdpo")[1] == contents(finished["ptdpo"])[1]


def test_another_seed_other_metrics(finished, tmp_path):
    """The seed reaches the pictures and the noise."""
    assert main(start(tmp_path, "--seed", "1", steps=1)) == 0
    assert timeless(tmp_path / "ptdpo")[0][0] != timeless(finished["ptdpo"])[0][0]


def test_another_micro_batch_same_result_to_rounding(finished, tmp_path):
    """One group a pass, or all at once."""
    assert main(start(tmp_path, "--micro-batch", "1")) == 0
    for a, b in zip(timeless(tmp_path / "ptdpo")[0], timeless(finished["ptdpo"])[0]):
        assert [k for k in a if a[k] is None] == [k for k in b if b[k] is None]
        for key in (k for k in a if a[k] is not None):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), key
    a, b = (ptdpo.open_checkpoint(r / "checkpoint.safetensors")[1]
            for r in (tmp_path / "ptdpo", finished["ptdpo"]))  # fmt: skip
    near = [((a[n] - b[n]).abs() < 1e-4).float().mean() for n in a if n.startswith("policy.")]
    assert min(near) > 0.99


# --------------------------------------------------------------------------------------- actions
def test_table_at_the_end(capsys, tmp_path):
    """Rows of the methods, columns that are explained, and where the pictures are."""
    assert main(start(tmp_path, steps=1, method="grpo")) == 0
    printed = capsys.readouterr()
    for word in ("area", "accuracy", "point_f1", "right_reason", "entropy", "to GRPO", "grpo",
                 "curves.png"):  # fmt: skip
        assert word in printed.out
    assert printed.err == ""


def test_help_metrics_lists_every_key(capsys):
    """Each key of a row with its meaning, and no others."""
    assert main(["--help-metrics"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(METRICS)


def test_help_lists_every_flag(capsys):
    """All fields of Config, with defaults."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    for f in fields(ptdpo.Config):
        assert f"--{f.name.replace('_', '-')}" in printed


@pytest.mark.parametrize("which", ["folder", "file", "base"])
def test_eval(finished, capsys, which):
    """A run, its checkpoint or a base: base alone, base tutored, and itself."""
    run = finished["ptdpo"]
    path = {"folder": run, "file": run / "checkpoint.safetensors", "base": BASE}[which]
    before = files(run)
    argv = ["--eval", str(path), "--eval-split", "test", "--eval-problems", "6"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(("base alone", "base tutored", "this checkpoint"), lines):
        assert line.startswith(name) and re.search(r"accuracy [01]\.", line)
    if which == "base":
        assert lines[0][16:] == lines[2][16:]
    assert files(run) == before


def test_plot_draws_runs_together(finished, tmp_path):
    """Into the first folder; the runs stay as they are."""
    for method, run in finished.items():
        shutil.copytree(run, tmp_path / "both" / method)
    before = files(tmp_path)
    argv = ["--plot", str(tmp_path / "both"), str(finished["grpo"])]
    assert main(argv) == 0
    after = files(tmp_path)
    assert after.pop(str(tmp_path / "both" / "curves.png")) and after == before


def test_refuses_to_overwrite_and_overwrites_when_told(finished, tmp_path, capsys):
    """The old run stays to the last byte; with --overwrite nothing of it stays."""
    shutil.copytree(finished["ptdpo"], tmp_path / "ptdpo")
    before = files(tmp_path)
    assert main(start(tmp_path, steps=1)) == 2
    assert "--overwrite" in capsys.readouterr().err and files(tmp_path) == before
    assert main(start(tmp_path, "--overwrite", "--seed", "3", steps=1)) == 0
    assert len(rows(tmp_path / "ptdpo" / "metrics.jsonl")) == 1
    assert json.loads((tmp_path / "ptdpo" / "run.json").read_text())["config"]["seed"] == 3
    assert ptdpo.open_checkpoint(tmp_path / "ptdpo" / "checkpoint.safetensors")[0]["step"] == 1


def test_both_methods_as_a_user_runs_them(finished, tmp_path):
    """One command, two processes, from another folder: rows equal to those of each run alone."""
    argv = [sys.executable, ROOT / "ptdpo.py", *start("here", method="both")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "grpo" in done.stdout and "how" not in done.stderr and "Traceback" not in done.stderr
    for method in ("grpo", "ptdpo"):
        run = tmp_path / "here" / method
        assert timeless(run) == timeless(finished[method])
        assert contents(run)[1] == contents(finished[method])[1]
    assert (tmp_path / "here" / "curves.png").exists()
    assert (tmp_path / "here" / "tutoring.png").exists()
    table = done.stdout[done.stdout.index("area") :]
    assert "\ngrpo " in table and "\nptdpo " in table
