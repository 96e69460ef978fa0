"""What a user, a disk or another version can get wrong: one line, exit code 2, nothing changed.

Each case starts in a folder with a finished run in `good/ptdpo` and an empty folder `empty`.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import BASE, ROOT, files, forge, start
from safetensors.torch import save_file

import ptdpo

pytestmark = pytest.mark.usefixtures("signals")
RUN, CHECKPOINT = "good/ptdpo", "good/ptdpo/checkpoint.safetensors"
NEW = start("new")


def change(name, edit):
    """Break a file of the run: edit takes its bytes."""
    return lambda folder: (folder / RUN / name).write_bytes(
        edit((folder / RUN / name).read_bytes())
    )


def remove(name):
    """Lose a file of the run."""
    return lambda folder: (folder / RUN / name).unlink()


def flip(where):
    """Flip one bit of the checkpoint: where takes its bytes and the length of its header."""

    def edit(data):
        at = where(data, int.from_bytes(data[:8], "little"))
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return change("checkpoint.safetensors", edit)


def other(edit):
    """A checkpoint with a true checksum that is another program's: edit takes state, tensors."""
    return lambda folder: forge(folder / CHECKPOINT, edit)


def foreign(name, **tensors):
    """A safetensors file of someone else."""
    return lambda folder: save_file(tensors or {"w": torch.ones(3)}, folder / name)


def text(name, content=""):
    """A file with this text."""
    return lambda folder: (folder / name).write_text(content)


def cut(n):
    """The first n bytes, or all but the last -n."""
    return change("checkpoint.safetensors", lambda data: data[:n])


def another_base(folder):
    """The run says that it began with base.safetensors; there, now, is another."""
    shutil.copy(BASE, folder / "base.safetensors")
    forge(folder / CHECKPOINT, lambda s, t: s["config"].update(base="base.safetensors"))
    forge(folder / "base.safetensors", lambda s, t: t["policy.embed.weight"].mul_(1.5))


def wrong_flags():
    """Flags of --toy that no run can have."""
    values = {
        "steps": "0 -3 nan 1.5 two 99999999999", "seed": "-1 99999999999999999999 x",
        "top-k": "0 -1", "group": "1 0 -8", "prompts": "0 two", "lr": "nan inf -inf -1 1e999 big",
        "temperature": "0 -1 nan", "tau": "nan -1", "difficulty": "-1 inf", "method": "sft",
        "hint": "psychic", "hint-parts": "all", "hint-regions": "0", "hint-layers": "0",
        "algorithm": "ppo", "divergence": "mse", "kl-on": "none", "distill-on": "none",
        "distill-weight": "nan", "eval-split": "train", "eval-every": "0", "eval-problems": "0",
        "threads": "0", "micro-batch": "-1", "updates-per-batch": "0", "max-skipped": "0",
        "clip-norm": "nan", "kl-weight": "-0.1", "weight-decay": "inf",
    }  # fmt: skip
    for flag, wrong in values.items():
        for value in wrong.split():
            yield None, [*NEW, f"--{flag}={value}"], f"--{flag}"


def twice(folder):
    """A second run beside the first."""
    shutil.copytree(folder / "good/ptdpo", folder / "good/grpo")


GO_ON, LOOK = ["--resume", "good"], ["--eval", CHECKPOINT]
CASES = [  # what is broken beforehand, the command, and a word of the line that it must print
    *wrong_flags(),
    # the command line itself
    (None, [], "say what to do"),
    (None, ["--method", "ptdpo"], "say what to do"),
    (None, [*NEW, "--no-such-flag"], "--no-such-flag"),
    (None, [*NEW, "stray"], "stray"),
    (None, ["--toy", "--steps"], "--steps"),
    (None, [*NEW, "--distill-decay=yes"], "--distill-decay"),
    (None, ["--toy", *GO_ON], "--resume"),
    (None, ["--toy", "--plot", "good"], "--plot"),
    (None, [*LOOK, "--warm-start"], "--warm-start"),
    (None, ["--plot"], "--plot"),
    (None, [*GO_ON, "--lr", "0.1"], "--lr"),
    (None, [*GO_ON, "--out", "new"], "--out"),
    (None, [*GO_ON, "--overwrite"], "--overwrite"),
    (None, [*GO_ON, "--threads", "2"], "--threads"),
    (None, ["--plot", "good", "--out", "new"], "--out"),
    (None, [*LOOK, "--seed", "1"], "--seed"),
    (None, [*LOOK, "--eval-problems", "0"], "--eval-problems"),
    # --base
    (None, [*NEW, "--base", "nowhere.safetensors"], "nowhere.safetensors"),
    (None, [*NEW, "--base", "empty"], "empty"),
    (None, [*NEW, "--base", "."], "no checkpoint"),
    (None, [*NEW, "--base", "good/ptdpo/metrics.jsonl"], "metrics.jsonl"),
    (text("b.safetensors"), [*NEW, "--base", "b.safetensors"], "b.safetensors"),
    (text("b.safetensors", "weights"), [*NEW, "--base", "b.safetensors"], "b.safetensors"),
    (foreign("b.safetensors"), [*NEW, "--base", "b.safetensors"], "b.safetensors"),
    (None, [*NEW, "--seeds", "3"], "--seeds"),
    # --out
    (None, start("good"), "--overwrite"),
    (text("file"), start("file"), "file"),
    (text("file"), start("file/new"), "file"),
    (None, start("/proc/new"), "/proc/new"),
    (None, start("/dev/null/new"), "/dev/null"),
    (None, start("x" * 300), "name too long"),
    (text("file"), ["--warm-start", "--out", "file"], "file"),
    # --resume: the folder
    (None, ["--resume", "nowhere"], "nowhere"),
    (None, ["--resume", "empty"], "empty"),
    (None, ["--resume", CHECKPOINT], "no run"),
    (remove("checkpoint.safetensors"), GO_ON, "checkpoint.safetensors"),
    (remove("metrics.jsonl"), GO_ON, "metrics.jsonl"),
    (change("metrics.jsonl", lambda b: b[:-9]), GO_ON, "shorter"),
    (change("samples.jsonl", lambda b: b""), GO_ON, "shorter"),
    (None, [*GO_ON, "--steps", "3"], "--steps 3"),
    (None, [*GO_ON, "--steps", "0"], "--steps 0"),
    (None, [*GO_ON, "--steps", "nan"], "--steps"),
    (another_base, [*GO_ON, "--steps", "5"], "base"),
    # --resume: run.json
    (change("run.json", lambda b: b[:100]), GO_ON, "run.json"),
    (change("run.json", lambda b: b""), GO_ON, "run.json"),
    (change("run.json", lambda b: b"\0" * len(b)), GO_ON, "run.json"),
    (change("run.json", lambda b: b"\xff\xfe"), GO_ON, "run.json"),
    (change("run.json", lambda b: b"[1, 2]"), GO_ON, "run.json"),
    (change("run.json", lambda b: b"{}"), GO_ON, "run.json"),
    (change("run.json", lambda b: b"null"), GO_ON, "run.json"),
    # --resume: a damaged checkpoint
    (cut(0), GO_ON, "checkpoint.safetensors"),
    (cut(7), GO_ON, "checkpoint.safetensors"),
    (cut(1000), GO_ON, "checkpoint.safetensors"),
    (cut(-1), GO_ON, "checkpoint.safetensors"),
    (cut(3_000_000), GO_ON, "checkpoint.safetensors"),
    (change("checkpoint.safetensors", lambda b: b + b"\0"), GO_ON, "checkpoint.safetensors"),
    (flip(lambda data, n: 0), GO_ON, "checkpoint.safetensors"),
    (flip(lambda data, n: 6), GO_ON, "checkpoint.safetensors"),
    (flip(lambda data, n: 8), GO_ON, "checkpoint.safetensors"),
    (flip(lambda data, n: data.index(b'"state"') + 2), GO_ON, "checkpoint.safetensors"),
    (flip(lambda data, n: data.index(b'\\"step\\": 4') + 10), GO_ON, "checksum"),
    (flip(lambda data, n: data.index(b'"checksum":"') + 20), GO_ON, "checksum"),
    (flip(lambda data, n: 8 + n), GO_ON, "checksum"),
    (flip(lambda data, n: len(data) // 2), GO_ON, "checksum"),
    (flip(lambda data, n: len(data) - 1), GO_ON, "checksum"),
    # --resume: a whole checkpoint that is not this run's or not this version's
    (foreign(CHECKPOINT), GO_ON, "no checkpoint of this program"),
    (lambda folder: shutil.copy(BASE, folder / CHECKPOINT), GO_ON, "weights alone"),
    (other(lambda s, t: s["config"].update(warp=9)), GO_ON, "warp"),
    (other(lambda s, t: s["config"].pop("tau")), GO_ON, "tau"),
    (other(lambda s, t: s["config"].update(hint="dreams")), GO_ON, "--hint dreams"),
    (other(lambda s, t: s["config"].update(group=1)), GO_ON, "--group 1"),
    (other(lambda s, t: t.pop("policy.position")), GO_ON, "policy.position"),
    (other(lambda s, t: t.pop("exp_avg.position")), GO_ON, "exp_avg.position"),
    (other(lambda s, t: t.pop("step.position")), GO_ON, "step.position"),
    (other(lambda s, t: t.update({"policy.x": torch.ones(3)})), GO_ON, "policy.x"),
    (other(lambda s, t: t.update({"policy.position": torch.ones(3)})), GO_ON, "policy.position"),
    (other(lambda s, t: t.update({"policy.position": t["policy.position"].half()})), GO_ON,
     "policy.position"),
    (other(lambda s, t: t.update({"exp_avg.position": t["exp_avg.position"].T.contiguous()})),
     GO_ON, "exp_avg.position"),
    # --eval
    (None, ["--eval", "nowhere"], "nowhere"),
    (None, ["--eval", "empty"], "empty"),
    (twice, ["--eval", "good"], "name one"),
    (None, ["--explain", "good", "--hint", "random"], "--hint"),
    (None, ["--help-metrics", "--lr", "1"], "--lr"),
    (None, ["--reproduce", "main", "--hint", "random"], "--hint"),
    (None, ["--toy", "--lora", "4", "--out", "new"], "--lora"),
    (None, ["--toy", "--reward", "a:b", "--out", "new"], "--reward"),
    (None, ["--toy", "--clip-norm", "0", "--out", "new"], "--clip-norm"),
    (None, ["--eval", "good/ptdpo/run.json"], "run.json"),
    (cut(5000), LOOK, "checkpoint.safetensors"),
    (flip(lambda data, n: 8 + n + 5), LOOK, "checksum"),
    (foreign(CHECKPOINT), LOOK, "no checkpoint of this program"),
    (other(lambda s, t: t.update({"policy.position": torch.ones(3)})), LOOK, "policy.position"),
    (other(lambda s, t: s["config"].pop("tau")), LOOK, "tau"),
    # --plot
    (None, ["--plot", "empty"], "empty"),
    (None, ["--plot", "nowhere"], "nowhere"),
    (None, ["--plot", "good", "empty"], "empty"),
    (None, ["--plot", CHECKPOINT], "no run"),
    (change("metrics.jsonl", lambda b: b[:-9]), ["--plot", "good"], "metrics.jsonl"),
    (change("metrics.jsonl", lambda b: b"7\n"), ["--plot", "good"], "metrics.jsonl"),
    (remove("metrics.jsonl"), ["--plot", "good"], "metrics.jsonl"),
    (change("run.json", lambda b: b[:-3]), ["--plot", "good"], "run.json"),
]  # fmt: skip


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of a finished run to break, as the current folder."""
    shutil.copytree(finished["ptdpo"], tmp_path / RUN)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


def check(code, error, word, before, folder):
    """The bar for every case."""
    assert code == 2 and files(folder) == before
    assert error.count("\n") == 1 and error.endswith("\n") and error.startswith("ptdpo.py: ")
    assert word.casefold() in error.casefold() and "Traceback" not in error
    assert re.search(r"; |: give |: add |--help|leave out|invalid|expected|not allowed", error)


@pytest.mark.parametrize(("broken", "argv", "word"), CASES)
def test_bad_input(folder, capsys, broken, argv, word):
    """One line on stderr that says what, where and how to mend; exit code 2; no file changed."""
    if broken:
        broken(folder)
    before = files(folder)
    capsys.readouterr()
    code = ptdpo.main(argv)
    check(code, capsys.readouterr().err, word, before, folder)


SHELL = [
    (None, [*NEW, "--steps", "0"], "--steps"),
    (None, ["--toy", "--colour", "red"], "--colour"),
    (None, ["--resume", "nowhere"], "nowhere"),
    (flip(lambda data, n: len(data) // 3), GO_ON, "checksum"),
    (None, ["--toy", "--out", "/proc/new"], "/proc/new"),
]


@pytest.mark.parametrize(("broken", "argv", "word"), SHELL)
def test_bad_input_through_the_shell(folder, broken, argv, word):
    """The same bar for the program as it is started by hand; --method both, too."""
    if broken:
        broken(folder)
    before = files(folder)
    argv = [sys.executable, ROOT / "ptdpo.py", *argv]
    done = subprocess.run(argv, capture_output=True, text=True)
    check(done.returncode, done.stderr, word, before, folder)
    assert done.stdout == ""


def test_there_are_at_least_sixty():
    """The bar, with five of them through the shell."""
    assert len(CASES) >= 60 and len(SHELL) == 5


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(folder, capsys, monkeypatch):
    """No room at the second checkpoint: exit code 2, the first is whole, and the run goes on."""
    real, room = ptdpo.os.fsync, [12]

    def fsync(number):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(ptdpo.os, "fsync", fsync)
    capsys.readouterr()
    assert ptdpo.main(start("full")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error
    monkeypatch.setattr(ptdpo.os, "fsync", real)
    assert ptdpo.open_checkpoint(folder / "full/ptdpo/checkpoint.safetensors")[0]["step"] in (1, 2)
    assert ptdpo.main(["--resume", "full"]) == 0


def test_a_checkpoint_cannot_name_files_to_cut(folder):
    """A forged state that lists other logs does not reach them."""
    (folder / "precious").write_text("x" * 100)
    forge(folder / CHECKPOINT, lambda s, t: s["sizes"].update({"../../precious": 0}))
    assert ptdpo.main(GO_ON) == 0
    assert (folder / "precious").read_text() == "x" * 100


def test_state_is_json(finished):
    """Strict JSON: no NaN, no Infinity, in any file of a run."""

    def never(word):
        raise AssertionError(word)

    run = finished["ptdpo"]
    texts = [(run / "run.json").read_text()]
    for name in ptdpo.LOGS:
        texts += (run / name).read_text().splitlines()
    texts.append(json.dumps(ptdpo.open_checkpoint(run / "checkpoint.safetensors")[0]))
    for line in texts:
        json.loads(line, parse_constant=never)
