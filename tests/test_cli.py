"""The command line as README and --help promise it: what is read, written, printed and refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from unittest.mock import Mock

import pytest
import torch
from helpers import ROOT, contents, files, rows, start, timeless
from PIL import Image

import ptdpo
from experiments import figures
from ptdpo import METRICS, main

pytestmark = pytest.mark.usefixtures("signals")
FLAGS = """toy model resume eval help help-metrics method steps seed out overwrite prompts group
    max-tokens eval-problems eval-every top-k lr kl-weight policy-weight distill-weight algorithm
    updates-per-batch micro-batch hint hint-parts hint-regions tau divergence distill-decay base
    difficulty lora checkpointing train-vision max-pixels data eval-data reward"""
SCORES = {"accuracy", "point_f1", "right_reason", "pass_1", "pass_8"}
ALWAYS = """step reward solved entropy answer_entropy kl grad_norm groups_all_failed groups_mixed
    groups_all_solved completion_length seconds skipped distilled""".split()


@pytest.mark.parametrize("method", ["grpo", "ptdpo"])
def test_files_of_a_run(finished, method):
    """These and no others; the pictures can be opened; nothing is pickled."""
    run = finished[method]
    names = ["checkpoint.safetensors", "lock", "metrics.jsonl", "run.json", "samples.jsonl"]
    assert sorted(os.listdir(run)) == names
    drawn = {"grpo": ["curves.png"], "ptdpo": ["curves.png", "tutoring.png"]}[method]
    assert sorted(os.listdir(run.parent)) == sorted([*drawn, method])
    for name in drawn:
        with Image.open(run.parent / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(10**6)) > 10
    step, tensors = contents(run)
    kinds = {"policy", "exp_avg", "exp_avg_sq", "step"}
    assert step == 4 and {name.split(".")[0] for name in tensors} == kinds
    assert len(tensors) == 4 * sum(name.startswith("policy.") for name in tensors)


@pytest.mark.parametrize("method", ["grpo", "ptdpo"])
def test_rows_of_metrics(finished, method):
    """One row a step, every key in every row, null where a value does not exist."""
    metrics = rows(finished[method] / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    for row in metrics:
        assert set(row) == set(METRICS)
        known = {name for name, value in row.items() if value is not None}
        assert set(ALWAYS) <= known and row["skipped"] == 0
        hinted = {"hint_recall", "hints_rejected"} & known
        assert len(hinted) == 2 * (method == "ptdpo")
        assert ("jsd" in known) == (row["distilled"] > 0)
        assert ("entropy_slope" in known) == (row["step"] > 1)
        assert SCORES & known == (SCORES if row["step"] in (1, 2, 4) else set())
        kinds = row["groups_all_failed"] + row["groups_mixed"] + row["groups_all_solved"]
        assert kinds == pytest.approx(1) and row["seconds"] > 0


def test_run_json_and_samples(finished):
    """Settings, versions, what was measured on the base; a group in full at each evaluation."""
    run = json.loads((finished["ptdpo"] / "run.json").read_text())
    assert set(run["config"]) == {field.name for field in fields(ptdpo.Config)}
    assert run["config"] | {"steps": 4, "group": 2, "method": "ptdpo"} == run["config"]
    assert run["versions"]["torch"] == torch.__version__ and len(run["reference"]) == 64
    best = max(run["layer_recall"])
    assert len(run["layer_recall"]) == 3 and run["layers"] == [run["layer_recall"].index(best)]
    assert set(run["teacher"]) == {"accuracy", "point_f1", "right_reason"}
    assert set(run["base"]) == set(run["teacher"]) | {"pass_1", "pass_8", "ways"}
    samples = rows(finished["ptdpo"] / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 2, 4]
    for row in samples:
        assert len(row["texts"]) == len(row["rewards"]) == len(row["solved"]) == 2
        assert [len(jsd) for jsd in row["jsd"]] == [len(tokens) for tokens in row["tokens"]]
        assert len(row["hint"]["regions"]) == 10 and len(row["relevance"]) == 25
    assert rows(finished["grpo"] / "samples.jsonl")[0]["hint"] is None


@pytest.mark.parametrize("flags", ["--method grpo", "--hint oracle", "--hint random", ""])
def test_layers_are_ranked_only_where_they_are_used(flags, tmp_path, monkeypatch):
    """On a large model that takes minutes."""
    monkeypatch.setattr(figures, "finish", lambda folders: None)
    monkeypatch.setattr(ptdpo, "calibrate", Mock(return_value=[0.1, 0.3, 0.2]))
    assert main([*start(tmp_path, steps=1), *flags.split()]) == 0
    assert ptdpo.calibrate.call_count == (flags == "")


def test_both_methods_as_a_user_runs_them(finished, tmp_path):
    """From another folder: two processes, each as if it were alone, a table, two pictures."""
    argv = [sys.executable, ROOT / "ptdpo.py", *start("here", method="both")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    for method in ("grpo", "ptdpo"):
        assert timeless(tmp_path / "here" / method) == timeless(finished[method])
        assert contents(tmp_path / "here" / method) == contents(finished[method])
    assert sorted(os.listdir(tmp_path / "here")) == "curves.png grpo ptdpo tutoring.png".split()
    table = done.stdout[done.stdout.index("area") :]
    assert "\ngrpo " in table and "\nptdpo " in table


def test_help_lists_every_flag(capsys):
    """Those of the contract, and every setting; and every metric with its meaning."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    settings = [field.name.replace("_", "-") for field in fields(ptdpo.Config)]
    assert {f"--{flag}" for flag in [*FLAGS.split(), *settings]} <= listed
    assert main(["--help-metrics"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METRICS)
    assert all(len(line.split()) > 3 for line in lines)


def test_evaluating_a_run_writes_nothing(finished, capsys):
    """Three rows of scores: the base, the base with hints, the run with samples as well."""
    before = files(finished["ptdpo"])
    argv = ["--eval", str(finished["ptdpo"].parent), "--eval-split", "test", "--eval-problems", "8"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(("base ", "base, tutored", "this run"), lines, strict=True):
        assert line.startswith(name) and re.search(r"accuracy [01]\.\d\d\d ", line)
    assert "pass_8" in lines[2] and files(finished["ptdpo"]) == before


def test_a_reader_that_has_gone_is_no_success():
    """`| head -0`: no traceback, and the exit code of a broken pipe."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, ROOT / "ptdpo.py", "--help-metrics"]
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr


def test_the_toy_needs_no_large_library():
    """Importing the program loads none, and switches nothing on; no test sees a GPU."""
    text = """
import sys, ptdpo, torch
assert not {"transformers", "peft", "torchvision", "matplotlib"} & set(sys.modules)
assert not torch.are_deterministic_algorithms_enabled()
"""
    assert subprocess.run([sys.executable, "-c", text], cwd=ROOT).returncode == 0
    assert not torch.cuda.is_available()
