"""Kill runs with signal 9 wherever they touch their files, and at random moments; resume; compare.

    python -m experiments.kill_loop                          all of it, on the toy
    python -m experiments.kill_loop --model assets/small-qwen
    python -m experiments.kill_loop --every 10 --random 1    a tenth of the moments

A run of three steps is killed before, amid and after each write, and before and after each sync,
rename and removal: one moment a run. It is then resumed, or started again where nothing had begun.
It must end with weights, AdamW moments, rows and samples bit-equal to those of the run that nobody
killed. At random moments a run is killed three times on its way. Each run is a forked process, so
torch is imported once. The program itself has no hook for this.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import ptdpo
from experiments import figures

TINY = "--prompts 2 --group 2 --eval-problems 8 --eval-every 2 --save-every 2 --steps 3".split()
SMALL_QWEN = "--max-pixels 20000 --max-tokens 16 --hint-regions 6 --lr 1e-3".split()


class Watched:
    """A file opened for appending. What is written to it is written in two halves: a torn write."""

    def __init__(self, file, name, moment):
        self.file = file
        self.name = name
        self.moment = moment

    def write(self, text):
        self.moment(f"before append {self.name}")
        half = len(text) // 2
        self.file.write(text[:half])
        self.file.flush()
        self.moment(f"amid append {self.name}")
        self.file.write(text[half:])
        self.moment(f"after append {self.name}, not flushed")

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def watch(moment):
    """From now on moment(label) is called whenever this process touches a file of a run."""

    def around(owner, name, label, amid=False):
        plain = getattr(owner, name)

        def watched(*args, **settings):
            paths = [Path(arg) for arg in args if isinstance(arg, str | Path)]
            what = f"{label} {paths[0].name}" if paths else label
            moment(f"before {what}")
            result = plain(*args, **settings)
            if amid:
                whole = paths[0].read_bytes()
                paths[0].write_bytes(whole[: len(whole) // 2])
                moment(f"amid {what}")
                paths[0].write_bytes(whole)
            moment(f"after {what}")
            return result

        setattr(owner, name, watched)

    def watched_open(path, mode="r"):
        return Watched(open(path, mode), Path(path).name, moment)

    ptdpo.open = watched_open  # it opens files to append to them, and to lock them
    around(Path, "write_text", "write", amid=True)
    around(ptdpo, "save_file", "write", amid=True)
    around(Path, "unlink", "remove")
    around(os, "fsync", "sync")
    around(os, "replace", "rename")


def fork(argv, at=None, labels=None):
    """Run the command line in a process that kills itself at moment `at`, counted from 1.

    Returns its id. `labels`, a file, gets the name of each moment.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    count = 0

    def moment(label):
        nonlocal count
        count += 1
        if labels:
            os.write(labels, f"{label}\n".encode())
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), sys.stdout.fileno())
            watch(moment)
            code = ptdpo.main(argv)
    finally:
        os._exit(code)


def end(child):
    """Wait for a process -> its exit code, or minus the number of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def next_command(start, out):
    """What a user would type next: resume what has begun, or start again."""
    return ["--resume", str(out)] if list(out.glob("*/run.json")) else [*start, "--out", str(out)]


def result(out):
    """All that must be equal: rows but for their seconds, samples, weights and moments as bytes."""
    (run,) = out.iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"seconds": None} for row in rows]
    whole = [(run / name).read_bytes() for name in ("samples.jsonl", "checkpoint.safetensors")]
    return rows, whole, json.loads((run / "run.json").read_text())


def kill_everywhere(start, folder, every):
    """Kill at every so many moments, resume, compare -> the moments, failures, seconds of a run."""
    began = time.perf_counter()
    labels = os.open(folder / "labels", os.O_CREAT | os.O_RDWR)
    assert end(fork([*start, "--out", str(folder / "whole")], labels=labels)) == 0
    seconds = time.perf_counter() - began
    expected = result(folder / "whole")
    names = (folder / "labels").read_text().splitlines()
    failures = []
    out = folder / "killed"
    for at in range(1, len(names) + 1, every):
        shutil.rmtree(out, ignore_errors=True)
        killed = end(fork([*start, "--out", str(out)], at))
        resumed = end(fork(next_command(start, out)))
        if (killed, resumed) != (-9, 0) or result(out) != expected:
            failures.append(f"moment {at}, {names[at - 1]}: ended {killed}, then {resumed}")
    return names[::every], failures, seconds


def kill_at_random(start, folder, count, seconds, rng):
    """Kill each of `count` runs three times on its way -> number of deaths, failures."""
    expected = result(folder / "whole")
    out = folder / "killed"
    deaths = 0
    failures = []
    for n in range(count):
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(3):
            child = fork(next_command(start, out))
            time.sleep(rng.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            deaths += end(child) == -9
        if end(fork(next_command(start, out))) != 0 or result(out) != expected:
            failures.append(f"random run {n}")
    return deaths, failures


def kill_loop(args):
    """Kill runs of all methods. Prints what was killed where, and what came of it."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns in forked processes
    figures.finish = lambda folders: None
    print("command: python -m experiments.kill_loop", *sys.argv[1:])
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}", flush=True)
    task = ["--model", args.model, *SMALL_QWEN] if args.model else ["--toy"]
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        # Import here what a run imports late, so that the forked processes need not.
        start = [*task, *TINY, "--method", "ptdpo", "--out", f"{folder}/warm"]
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            assert ptdpo.main(start) == 0
        for method in args.methods:
            start = [*task, *TINY, "--method", method]
            place = Path(folder) / method
            place.mkdir()
            names, wrong, seconds = kill_everywhere(start, place, args.every)
            rng = random.Random(method)
            deaths, wrong_too = kill_at_random(start, place, args.random, seconds, rng)
            print(f"{method}: killed at each of {len(names)} moments, then resumed:")
            kinds = [" ".join(name.replace(",", "").split()[:2]) for name in names]
            print("  " + ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds)))
            print(f"  {args.random} runs killed {deaths} times at random moments, then resumed")
            print(f"  not bit-equal: {len(wrong) + len(wrong_too)}", flush=True)
            failures += [f"{method}, {failure}" for failure in wrong + wrong_too]
    if failures:
        raise ptdpo.UserError(f"not bit-equal: {'; '.join(failures)}")
    print("all bit-equal")


def main(argv=None):
    """Entry point -> exit code."""
    parser = argparse.ArgumentParser("experiments.kill_loop")
    parser.add_argument("--model", help="a small Qwen model in place of the toy")
    parser.add_argument("--methods", nargs="+", default=["grpo", "ptdpo"])
    parser.add_argument("--every", type=int, default=1, help="try every so many moments")
    parser.add_argument("--random", type=int, default=10, help="runs killed at random moments")
    return ptdpo.guard(kill_loop, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
