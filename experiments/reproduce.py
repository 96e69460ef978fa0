"""The paper's claims, tried on the toy.

    python -m experiments.reproduce NAME|all    train, measure and judge an experiment

An experiment is an entry of experiments.toml. Its arms are trained on the same seeds, from 200 on,
so that differences are paired, and are scored on test pictures. Learning rates and lambdas were
chosen by tune.py on validation pictures. DIR/NAME gets summary.json, about.json and figure.png; the
runs stand in DIR/runs/ARM/SEED. A call may be interrupted at any time and given again: it keeps
what is finished, and resumes the rest.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path

import torch
from tqdm import tqdm

import ptdpo
from experiments import figures, summaries
from experiments.measure import MEASUREMENTS

HERE = Path(__file__).parent
DATA = tomllib.loads((HERE / "experiments.toml").read_text())
ARMS = DATA["arms"]
EXPERIMENTS = DATA["experiments"]
USUAL_STEPS = ptdpo.Config.steps


# --------------------------------------------------------------------------------------- controls
def zero_gradient(log_p, log_q):
    """The JSD as released: p is detached, the mixture is not, so the gradient is 0."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    log_p = log_p.detach()
    p_part = log_p.exp() * (log_p - log_m)
    q_part = log_q.exp() * (log_q - log_m)
    return (p_part + q_part).sum(-1) / 2


def student_support(log_p, log_q):
    """The JSD over the student's Top-K words alone. All other words are rest."""
    words = log_p[..., :-1].topk(log_p.shape[-1] // 2).indices
    sides = []
    for side in (log_p, log_q):
        listed = side.gather(-1, words)
        rest = (1 - listed.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
        sides.append(torch.cat([listed, rest], -1))
    return ptdpo.jsd(*sides)


CONTROLS = {"zero_gradient": zero_gradient, "student_support": student_support}


# --------------------------------------------------------------------------------------- training
def settings_of(arm, chosen):
    """Settings of an arm: those chosen for its method, then its own, then those chosen for it."""
    own = dict(ARMS[arm])
    own = ARMS.get(own.pop("like", ""), {}) | own
    method = own.get("method", "ptdpo")
    return chosen.get(method, {}) | own | chosen.get(arm, {})


def config_of(settings):
    """The config of a run, whose divergence may be a control."""
    known = {name: value for name, value in settings.items() if name not in ("control", "start")}
    config = ptdpo.make_config(known)
    config.divergence = settings.get("control", config.divergence)
    return config


def is_finished(settings, folder):
    """Whether nothing is left to train. UserError if a run with other settings stands there."""
    if not (folder / "run.json").exists():
        return False
    config = config_of(settings)
    if ptdpo.read_run(folder)["config"] != asdict(config):
        raise ptdpo.UserError(f"{folder}: a run with other settings; give another --out")
    return len(figures.read_rows(folder / "metrics.jsonl")) >= config.steps


def train_run(settings, folder):
    """Train a run from where it is, silent but for mistakes of the user."""
    ptdpo.DIVERGENCES |= CONTROLS
    if not (folder / "run.json").exists():
        config = config_of(settings)
        if "start" in settings:
            continue_run(folder.parents[1] / settings["start"] / folder.name, folder, config)
        else:
            ptdpo.create_run(config, folder)
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        ptdpo.run(folder)


def continue_run(start, folder, config):
    """Copy a run; the copy goes on with another config, and keeps the reference."""
    aside = folder.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(start, aside)
    ptdpo.write_json(aside / "run.json", ptdpo.read_run(start) | {"config": asdict(config)})
    aside.rename(folder)


def train_all(jobs, processes):
    """Train runs that are not finished, (settings, folder) each, some at a time.

    If one fails, or this process is told to stop, the others finish their step and save.
    """
    jobs = [job for job in jobs if not is_finished(*job)]
    jobs = sorted(jobs, key=lambda job: "start" in job[0])
    context = multiprocessing.get_context("spawn")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    running = []
    try:
        for job in tqdm(jobs, "runs"):
            # A run that goes on from another waits until all of these are finished.
            while len(running) >= (1 if "start" in job[0] else processes):
                running = wait_for_one(running)
            child = context.Process(target=ptdpo.leave, args=(ptdpo.guard, train_run, *job))
            child.start()
            running.append(child)
        while running:
            running = wait_for_one(running)
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.join()


def wait_for_one(running):
    """Wait until a process ends -> those that go on. SystemExit if it failed or was killed."""
    wait([child.sentinel for child in running])
    for child in running:
        child.join(0)
        if child.exitcode:
            raise SystemExit(child.exitcode if child.exitcode > 0 else 128 - child.exitcode)
    return [child for child in running if child.is_alive()]


# ---------------------------------------------------------------------------------------- summary
def train_arms(experiment, seeds, given):
    """Train all arms of an experiment -> what a summary says of their runs."""
    arms = experiment["arms"].split()
    path = HERE / "results" / "tune.json"
    chosen = json.loads(path.read_text())["chosen"] if path.exists() else {}
    jobs = []
    for seed in seeds:
        for arm in arms:
            settings = settings_of(arm, chosen) | {"seed": seed, "eval_split": "test"}
            jobs.append((settings | shared(settings, given), given.out / f"runs/{arm}/{seed}"))
    train_all(jobs, given.jobs)
    runs = {}
    for arm in arms:
        runs[arm] = [summaries.read_run(given.out / f"runs/{arm}/{seed}") for seed in seeds]
    summary = summaries.summarise_runs(runs, experiment)
    if experiment.get("hero"):
        samples = given.out / f"runs/ptdpo/{seeds[0]}/samples.jsonl"
        summary["example"] = figures.find_failure(figures.read_rows(samples))
    return summary


def shared(settings, given):
    """What the command line changes in all arms; arms of fewer or more steps stay in proportion."""
    steps = settings.get("steps", USUAL_STEPS) * given.steps / USUAL_STEPS
    return {"steps": max(1, round(steps)), "eval_problems": given.eval_problems}


def take_measurements(name, experiment, seeds):
    """Make the measurement of this name on the base -> what a summary says of it."""
    config = ptdpo.Config()
    task = ptdpo.make_task_of(config)
    policy = ptdpo.load_policy(config, task)
    by_layer = ptdpo.calibrate(policy, task, config)
    layers = [by_layer.index(max(by_layer))]
    by_seed = []
    for seed in tqdm(seeds, name):
        by_seed.append(MEASUREMENTS[name](policy, task, config, layers, seed))
    found = {label: [values[label] for values in by_seed] for label in by_seed[0]}
    return summaries.summarise_values(found, experiment)


def run_experiment(name, given):
    """Run one experiment, and write what it found."""
    began = time.time()
    experiment = EXPERIMENTS[name]
    seeds = list(range(200, 200 + min(given.seeds, experiment["seeds"])))
    if experiment["arms"]:
        summary = train_arms(experiment, seeds, given)
    else:
        summary = take_measurements(name, experiment, seeds)
    folder = given.out / name
    folder.mkdir(parents=True, exist_ok=True)
    ptdpo.write_json(folder / "summary.json", {"name": name, "seeds": seeds} | summary)
    ptdpo.write_json(folder / "about.json", describe_call("reproduce", began) | {"seeds": seeds})
    summaries.draw_summary(folder)
    print(f"{folder}: summary.json, about.json, figure.png")
    print(summaries.list_claims(summary["claims"]))


def describe_call(name, began):
    """Under which circumstances something was measured."""
    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    return {
        "command": " ".join([f"python -m experiments.{name}", *sys.argv[1:]]),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "cores": os.cpu_count(),
        "minutes_of_this_call": (time.time() - began) / 60,
    }


def make_parser(name, out):
    """Flags of reproduce.py and tune.py."""
    parser = argparse.ArgumentParser(f"experiments.{name}")
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), metavar="DIR", help=f"folder (default {out})")
    add("--seeds", type=int, choices=range(1, 11), default=10, help="at most so many seeds")
    add("--jobs", type=int, choices=range(1, 17), default=2, help="processes at a time")
    add("--steps", type=int, default=USUAL_STEPS, help=f"of a usual run (default {USUAL_STEPS})")
    add("--eval-problems", type=int, default=256, help="held-out pictures (default 256)")
    return parser


def main(argv=None):
    """Entry point -> exit code."""
    parser = make_parser("reproduce", "runs/reproduce")
    parser.add_argument("name", choices=["all", *EXPERIMENTS])
    given = parser.parse_args(argv)
    names = list(EXPERIMENTS) if given.name == "all" else [given.name]
    return ptdpo.guard(lambda: [run_experiment(name, given) for name in names])


if __name__ == "__main__":
    sys.exit(main())
