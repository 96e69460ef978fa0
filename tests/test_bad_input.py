"""What a user, a disk or another version can get wrong: one line, exit code 2, nothing changed.

The table is bad_input.json: a command, a word of the line that it must print, and what is broken
beforehand. The current folder holds a finished run in good/ptdpo, a Qwen2-VL in model, an empty
folder, a picture p.png and a data file d.jsonl.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BASE, ROOT, files
from PIL import Image
from safetensors.torch import load_file, save_file

import ptdpo

pytestmark = pytest.mark.usefixtures("signals")
TABLE = json.loads(Path(__file__).with_name("bad_input.json").read_text())
RUN = Path("good/ptdpo")
CHECKPOINT = RUN / "checkpoint.safetensors"
LINE = {"images": "p.png", "problem": "How many?", "answer": "2"}
CASES = list(TABLE["commands"])
for flag, values in TABLE["flags"].items():
    for value in values.split():
        CASES.append([f"--toy --out new --prompts 2 --{flag}={value}", flag])


def break_it(kind, path="", *args):
    """What is wrong before the command is given."""
    if kind == "write":
        Path(path).write_bytes(args[0].encode(errors="surrogatepass"))
    elif kind == "remove":
        for name in (path, *args):
            Path(name).unlink()
    elif kind == "cut":
        Path(path).write_bytes(Path(path).read_bytes()[: args[0]])
    elif kind == "edit":
        old, new = args
        assert old in Path(path).read_text()
        Path(path).write_text(Path(path).read_text().replace(old, new))
    elif kind == "tensors":
        save_file({name: torch.ones(shape) for name, shape in args[0].items()}, path)
    elif kind == "checkpoint":  # without a tensor, or with one of another shape
        tensors = load_file(CHECKPOINT)
        tensors.pop(path, None)
        tensors |= {path: torch.ones(*args)} if args else {}
        save_file(tensors, CHECKPOINT, {"step": "4"})
    elif kind == "second run":
        shutil.copytree(RUN, "good/grpo")
    elif kind == "other base":
        tensors = load_file(BASE)
        tensors["policy.embed.weight"] *= 1.5
        save_file(tensors, "base.safetensors")
        break_it("edit", RUN / "run.json", "toy_tasks/base.safetensors", "base.safetensors")


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of a finished run to break, in the current folder."""
    shutil.copytree(finished["ptdpo"], tmp_path / RUN)
    shutil.copytree(ROOT / "assets/small-qwen", tmp_path / "model")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    (tmp_path / "d.jsonl").write_text(json.dumps(LINE))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


def check(code, error, says, before, folder):
    """The bar for every case. A model that cannot be loaded leaves the settings of its run."""
    after = {name: digest for name, digest in files(folder).items() if "/runs/" not in name}
    assert code == 2 and after == before
    assert error.count("\n") == 1 and error.startswith("ptdpo.py: ") and len(error) < 700, error
    assert says in error and "Traceback" not in error, error
    assert re.search("; |give|leave out|change", error), "no remedy: " + error


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[2:]}")
def test_bad_input(folder, capsys, monkeypatch, case):
    """One line on stderr that says what, where and how to mend; exit code 2; no file changed."""
    argv, says, *broken = case
    if "--model M" in argv:  # such mistakes are found before a model is loaded
        monkeypatch.setattr(ptdpo, "HFPolicy", None)
    for how in broken:
        break_it(*how)
    before = files(folder)
    capsys.readouterr()
    code = ptdpo.main(argv.split())
    printed = capsys.readouterr()
    check(code, printed.err, says, before, folder)
    assert printed.out == ""


@pytest.mark.parametrize("line", TABLE["lines"].values(), ids=list(TABLE["lines"]))
def test_bad_lines_of_data(folder, capsys, monkeypatch, line):
    """File and line, before a model is loaded; in held-out problems as well."""
    monkeypatch.setattr(ptdpo, "HFPolicy", None)
    (folder / "bad.jsonl").write_text(f"{json.dumps(LINE)}\n\n{line}\n")
    before = files(folder)
    for data, eval_data in (("bad.jsonl", "d.jsonl"), ("d.jsonl", "bad.jsonl")):
        argv = ["--model", "M", "--data", data, "--eval-data", eval_data]
        capsys.readouterr()
        code = ptdpo.main([*argv, "--out", "new"])
        check(code, capsys.readouterr().err, "bad.jsonl:3: ", before, folder)


def test_bad_input_through_the_shell(folder):
    """The same for the program as it is started by hand."""
    before = files(folder)
    started = []
    for argv, says in [case for case in CASES if case[0] in TABLE["shell"]]:
        argv = [sys.executable, ROOT / "ptdpo.py", *argv.split()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append((subprocess.Popen(argv, **pipes), says))
    for process, says in started:
        out, error = process.communicate()
        check(process.returncode, error, says, before, folder)
        assert out == ""
    assert len(started) == 5 and len(CASES) >= 60
