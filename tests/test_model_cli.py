"""--model on the command line: train, stop, resume, evaluate; and what is refused, and why."""

import json
import os
import signal
import sys
from unittest.mock import Mock

import pytest
import tiny_qwen
import torch
from helpers import ROOT, contents, rows, save_pictures, timeless

import ptdpo
from ptdpo import main

pytestmark = pytest.mark.usefixtures("signals", "undrawn")
SMALL = """--steps 3 --prompts 2 --group 4 --max-tokens 12 --max-pixels 20000 --eval-problems 2
    --eval-every 2 --save-every 2 --top-k 5 --lr 1e-3"""
DATA = """--steps 2 --prompts 7 --group 2 --max-tokens 5 --eval-problems 4 --eval-every 1 --top-k 5
    --max-pixels 12000 --micro-batch 3 --train-vision"""


def write_data(path):
    """Lines with one, two and no pictures."""
    save_pictures(path.parent)
    line = {"problem": "How many?", "answer": "2", "hint": "Compare."}
    lines = [line | {"images": names} for names in (["rgb.png"], ["rgb.png", "deep.png"], [])]
    path.write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_both_methods_stopped_in_the_first_and_resumed(kind, tmp_path, monkeypatch, capfd):
    """From another folder, which does not have the data: bit-equal to a run that went through.

    Nothing is printed on stderr, such as a warning that an argument will go.
    """
    flags = ["--model", "assets/small-qwen", "--method", "both", *SMALL.split()]
    if kind == "adapters":
        flags[1] = str(tiny_qwen.save(tmp_path / "tiny", "qwen2_vl", dtype=torch.bfloat16))
        flags += "--lora 2 --checkpointing --data d.jsonl --eval-data d.jsonl".split()
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "d.jsonl")
    capfd.readouterr()
    monkeypatch.setattr(ptdpo, "CALIBRATION", 4)
    assert main([*flags, "--out", "whole"]) == 0
    backward = ptdpo.backward

    def stopping(*args):
        if len(rows(tmp_path / "parts/grpo/metrics.jsonl")) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(ptdpo, "backward", stopping)
        main([*flags, "--out", "parts"])
    assert contents(tmp_path / "parts/grpo")[0] == 2
    assert not (tmp_path / "parts/ptdpo/checkpoint.safetensors").exists()
    monkeypatch.chdir(tmp_path / "whole")
    assert main(["--resume", str(tmp_path / "parts")]) == 0
    for method in ("grpo", "ptdpo"):
        whole = tmp_path / "whole" / method
        assert timeless(tmp_path / "parts" / method) == timeless(whole)
        assert contents(tmp_path / "parts" / method) == contents(whole)
        assert [row["skipped"] for row in rows(whole / "metrics.jsonl")] == [0, 0, 0]
    adapters = {".lora_" in name for name in contents(whole)[1]}
    assert adapters == {kind == "adapters"}
    assert main(["--eval", str(whole)]) == 0
    printed = capfd.readouterr()
    assert "base, tutored" in printed.out and printed.err == ""
    last = rows(whole / "metrics.jsonl")[-1]
    assert last["jsd"] > 0 and last["kl"] > 0 and last["accuracy"] is not None
    assert (last["hint_recall"] is None) == (kind == "adapters")  # a file has no targets


def test_defaults_of_a_large_model(tmp_path, monkeypatch):
    """Adapters learn ten times as fast; what is given stays."""
    monkeypatch.setattr(ptdpo, "run", lambda *_: None)
    out = ["--out", str(tmp_path), "--overwrite"]
    for flags, lr, steps in (("", 1e-6, 200), ("--lora 4", 1e-5, 200), ("--lr 1 --steps 2", 1, 2)):
        assert main(["--model", "assets/small-qwen", *flags.split(), *out]) == 0
        config = json.loads((tmp_path / "ptdpo/run.json").read_text())["config"]
        assert (config["lr"], config["steps"], config["save_every"]) == (lr, steps, 50)


@pytest.mark.parametrize(
    ("name", "made", "opened"),
    [
        ("assets/small-qwen", [], ROOT / "assets/small-qwen"),
        ("assets/small-qwen", ["assets/small-qwen"], "assets/small-qwen"),
        ("toy_tasks", ["toy_tasks"], "toy_tasks"),
        ("toy_tasks", [], None),  # the checkout has such a folder, but the hub is meant
    ],
)
def test_which_model_a_name_means(name, made, opened, tmp_path, monkeypatch):
    """The working folder first, then the hub; the checkout has a say for assets/ alone."""
    open_model = Mock(side_effect=ValueError("enough"))
    monkeypatch.setattr(ptdpo, "open_model", open_model)
    monkeypatch.chdir(tmp_path)
    for folder in made:
        (tmp_path / folder).mkdir(parents=True)
    assert main(["--model", name, "--out", "out"]) == 2
    expected = name if opened is None else str(tmp_path / opened)
    assert open_model.call_args.args[1] == expected


def run_and_read(flags, tmp_path, capsys):
    """The one line that a command ends with."""
    argv = ["--model", "assets/small-qwen", *flags.split(), "--out", str(tmp_path), "--overwrite"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("ptdpo.py: "), error
    return error


@pytest.mark.parametrize(("module", "flags"), [("peft", "--lora 2"), ("transformers", "")])
def test_a_library_that_is_missing_is_named(module, flags, tmp_path, capsys, monkeypatch):
    """And no other: installing peft mends nothing where transformers is missing."""
    monkeypatch.setitem(sys.modules, module, None)
    error = run_and_read(flags, tmp_path, capsys)
    assert module in error and "install" in error
    assert ("peft" in error) == (module == "peft")


def test_errors_have_their_own_reason(tmp_path, capsys, monkeypatch):
    """An old library, a broken import, a full GPU."""
    with monkeypatch.context() as patch:
        patch.setattr("transformers.__version__", "4.49.0")
        patch.setitem(sys.modules, "transformers.masking_utils", None)  # which came later
        error = run_and_read("", tmp_path, capsys)
        assert "4.49.0 is too old" in error and "peft" not in error and "a folder" not in error
    for reason, words in (
        (ImportError("libcudart.so.99: cannot open"), "libcudart.so.99"),
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision::nms"),
        (torch.OutOfMemoryError("CUDA out of memory"), "experiments.fits"),
    ):
        monkeypatch.setattr(ptdpo, "open_model", Mock(side_effect=reason))
        error = run_and_read("", tmp_path, capsys)
        assert words in error and "peft" not in error
        assert ("a folder" in error) == (type(reason) is RuntimeError)


@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_every_kind_of_line_trains(family, tmp_path):
    """Thirteen lines: nine kinds of pictures, two pictures, marks in the text, and none at all."""
    pytest.importorskip("math_verify")
    names = save_pictures(tmp_path)
    lines = [{"images": name, "problem": "How many?", "answer": "3"} for name in names]
    two = ["rgb.png", "exif.jpg"]
    lines += [
        {"images": two, "problem": "Do both show the same?", "answer": "no"},
        {"images": two, "problem": "Is <image> left of <image> ?", "answer": "(B)"},
        {"images": ["rgb.png"], "problem": "Look at <image> closely.", "answer": "$\\frac{1}{2}$"},
        {"images": [], "problem": "What is 2 + 2?", "answer": "4", "hint": "Count on."},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    tiny_qwen.save(tmp_path / "model", family)
    flags = ["--model", str(tmp_path / "model"), "--data", str(data), "--eval-data", str(data)]
    assert main([*flags, *DATA.split(), "--out", str(tmp_path / "out")]) == 0
    logged = rows(tmp_path / "out" / "ptdpo" / "metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2]
    assert all(row["skipped"] == 0 and row["jsd"] > 0 for row in logged)
