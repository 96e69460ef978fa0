"""Kill a run with signal 9 wherever it touches its files, and at random moments; resume; compare.

    python tests/kill_loop.py [--random 10] [--methods grpo ptdpo]

A scripted run of three steps, the second of them without a checkpoint, is killed before, amid and
after each write, and before and after each sync, rename, truncation and removal: one moment a run,
each time in a process of its own (forked, so that torch is imported once). It is then resumed, or
started again where nothing had begun, and must end with weights, AdamW state, rows and samples
bit-equal to those of the run that nobody killed. At random moments a run is killed three times on
its way. Nothing is drawn at the end. Takes a few minutes a method on one core.
"""

import argparse
import contextlib
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from helpers import ROOT, contents, start, timeless
from moments import trace

import ptdpo
from toy_tasks import reproduce


class Patch:
    """monkeypatch for a process that will die anyway."""

    def setattr(self, owner, name, value, raising=True):
        setattr(owner, name, value)


def in_a_process(argv, at=None, seen=None):
    """Run the command line in a process that kills itself at moment number `at`.

    -> its id; with `seen`, a file that gets the label of each moment.
    """
    if child := os.fork():
        return child
    code = 70
    try:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            count = 0

            def moment(label):
                nonlocal count
                count += 1
                if seen:
                    with open(seen, "a") as f:
                        f.write(label + "\n")
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            trace(Patch(), moment)
            code = ptdpo.main(argv)
    finally:
        os._exit(code)


def ends(child):
    """How a process ended: an exit code, or minus the number of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def script(out, method):
    """The command line of the run."""
    return start(out, "--eval-every", "3", "--eval-problems", "2", steps=3, method=method)


def go_on(out, method):
    """The command that a user would give next."""
    begun = (out / method / "run.json").exists()
    return ["--resume", str(out)] if begun else script(out, method)


def equal(out, whole, method):
    """Bit-equal in all but seconds."""
    a, b = out / method, whole / method
    return timeless(a) == timeless(b) and contents(a) == contents(b)


def kill_everywhere(method, folder, noise, rng):
    """Kill at each moment and at random ones -> moments, failures, seconds of the whole run."""
    whole, labels, failures = folder / f"{method}-whole", folder / f"{method}-moments", []
    began = time.perf_counter()
    assert ends(in_a_process(script(whole, method), seen=labels)) == 0
    seconds, labels = time.perf_counter() - began, labels.read_text().splitlines()
    for at, label in enumerate(labels, 1):
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        killed = ends(in_a_process(script(out, method), at))
        resumed = ends(in_a_process(go_on(out, method)))
        if (killed, resumed) != (-9, 0) or not equal(out, whole, method):
            failures.append(f"{method}, moment {at}, {label}: ended {killed}, then {resumed}")
    deaths = 0
    for n in range(noise):
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        child = in_a_process(script(out, method))
        for _ in range(3):
            time.sleep(rng.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            deaths += ends(child) == -9
            child = in_a_process(go_on(out, method))
        if ends(child) != 0 or not equal(out, whole, method):
            failures.append(f"{method}, random run {n}")
    return labels, deaths, failures


def main():
    """Print what was killed where, and what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--random", type=int, default=10, help="runs killed at random moments")
    parser.add_argument("--methods", nargs="+", default=["grpo", "ptdpo"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    reproduce.finish = lambda *_: None
    commit = os.popen(f"git -C {ROOT} rev-parse HEAD").read().strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [v.split(":")[1].strip() for v in lines if v.startswith("model name")]
    model = next(iter(names), platform.processor())
    print("command: python", " ".join(["tests/kill_loop.py", *sys.argv[1:]]))
    print(
        f"commit {commit[:12]}, torch {torch.__version__}, {os.cpu_count()} cores, {model}",
        flush=True,
    )
    bad, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            ptdpo.main(script(Path(folder) / "warm", "grpo"))  # imports what is imported late
        for method in given.methods:
            found = kill_everywhere(method, Path(folder), given.random, random.Random(method))
            labels, deaths, failures = found
            bad += failures
            print(f"{method}: killed at each of {len(labels)} moments, then resumed;", end=" ")
            print(f"{given.random} runs killed {deaths} times at random moments, then resumed:")
            kinds = [" ".join(label.replace(",", "").split()[:2]) for label in labels]
            counts = {kind: kinds.count(kind) for kind in kinds}
            print("  " + ", ".join(f"{kind} {n}" for kind, n in counts.items()))
            print(f"  not bit-equal to the run that nobody killed: {len(failures)}", flush=True)
    print(*bad, sep="\n", end="\n" * bool(bad))
    print(f"{'FAILED' if bad else 'all bit-equal'} after {time.perf_counter() - began:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
