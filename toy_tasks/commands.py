"""The command line: flags, what they start, and how mistakes and signals end.

No step of training is here; each run is one call of ptdpo.run, two of them in a process each.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path

import torch

import ptdpo
from ptdpo import MODEL_DEFAULTS, UserError
from toy_tasks.ranks import RANK, RANKS, connect


def parse(argv):
    """Command line -> the given flags by name; nothing is filled in."""

    def mistake(message):
        """Let a wrong flag end like every other mistake of the user."""
        raise UserError(f"{message}; see python ptdpo.py --help")

    parser = argparse.ArgumentParser("ptdpo.py", argument_default=argparse.SUPPRESS)
    parser.error = mistake
    todo = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    todo.add_argument("--toy", action="store_true", help="train on counting pictures, on a CPU")
    todo.add_argument("--resume", metavar="DIR", type=Path, help="go on with the run in DIR")
    todo.add_argument("--eval", metavar="CHECKPOINT", type=Path, help="measure it, on --eval-split")
    todo.add_argument("--warm-start", action="store_true", help="make and measure a base")
    todo.add_argument("--explain", metavar="DIR", type=Path, nargs="?", help="tell one step")
    todo.add_argument("--reproduce", metavar="NAME", help="an experiment of the paper, or: all")
    todo.add_argument("--plot", metavar="DIR", type=Path, nargs="+", help="redraw DIR/curves.png")
    todo.add_argument("--calibrate", action="store_true", help="rank the layers of --model")
    todo.add_argument("--save-hf", metavar=("RUN", "DIR"), type=Path, nargs=2,
                      help="write the model of a run as a folder of transformers")  # fmt: skip
    todo.add_argument("--help-metrics", action="store_true", help="what each number means")
    parser.add_argument("--out", metavar="DIR", type=Path, help="a new run (default runs/NAME)")
    parser.add_argument("--seeds", type=int, help="seeds of --reproduce, from 200 on (default 10)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    for f in fields(ptdpo.Config):
        flag, shown = f"--{f.name.replace('_', '-')}", "none" if f.default == "" else f.default
        large = f", --model: {MODEL_DEFAULTS[f.name]}" if f.name in MODEL_DEFAULTS else ""
        text = f"{f.metadata['help']} (default {shown}{large})"
        kind = {"type": f.type, "choices": f.metadata["choices"] or None}
        if f.name == "method":
            kind, text = kind | {"choices": ("both", "grpo", "ptdpo")}, f"{text}; --toy: both"
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag, help=text, **kind)
    return vars(parser.parse_args(argv))


def guard(action, *args):
    """Do it -> exit code. What the user can mend is one line and 2, never a traceback."""
    try:
        action(*args)
        return 0
    except UserError as error:
        text = str(error)
    except torch.OutOfMemoryError:
        text = """the GPU is full: add --checkpointing or --lora 16, or lower --sample-batch,
            --max-tokens, --max-pixels or --micro-batch"""
    except BrokenPipeError:  # whoever read the output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # a run may have ended early
    except OSError as error:
        text = f"{error.filename or 'disk'}: {error.strerror}; give a path that works, with room"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print("ptdpo.py:", *text.split(), file=sys.stderr)
    return 2


def runs_in(folder):
    """The run in a folder, or the runs one level below it."""
    found = [p.parent for p in (*folder.glob("run.json"), *sorted(folder.glob("*/run.json")))]
    if not found:
        raise UserError(f"{folder}: no run in it; start one with --toy --out {folder}")
    for run in found:
        try:
            json.loads((run / "run.json").read_text())["base"]["accuracy"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{run}/run.json: torn; use another copy, or start again") from None
    return found


def stored_config(path, **changes):
    """Config of a run's checkpoint, with changes. UserError if it is none, or another version's."""
    state = ptdpo.open_checkpoint(path)[0]
    if "config" not in state:
        raise UserError(f"{path}: weights alone, no run; start one with --toy --base {path}")
    if odd := state["config"].keys() ^ vars(ptdpo.Config()):
        hint = f"use commit {state['commit']}"
        raise UserError(f"{path}: another version's, which differs in {min(odd)}; {hint}")
    if changes.get("steps", math.inf) < state["step"]:
        raise UserError(f"--steps {changes['steps']}: the run is at {state['step']}; give more")
    return ptdpo.make_config(state["config"] | changes)


def child(*args):
    """A run in a process of its own."""
    sys.exit(guard(ptdpo.run, *args))


def side_by_side(runs):
    """All runs at once, one process each; a signal is passed on to them, and they save.

    Exits with the worst of their codes, unless all is well.
    """
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=child, args=r) for r in runs]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: [os.kill(c.pid, n) for c in children if c.is_alive()])
    for c in children:
        c.start()
    for c in children:
        c.join()
    if worst := max(c.exitcode if c.exitcode >= 0 else 128 - c.exitcode for c in children):
        sys.exit(worst)


def train_command(given):
    """--toy, --model and --resume: one run or two -> folder of the runs, task."""
    if "resume" in given:
        changes = {"steps": given["steps"]} if "steps" in given else {}
        found = [(f, f / "checkpoint.safetensors") for f in runs_in(given["resume"])]
        runs = [(stored_config(path, **changes), f, True) for f, path in found]
    else:
        method = given.get("method", "ptdpo" if "model" in given else "both")
        methods = ["grpo", "ptdpo"] if method == "both" else [method]
        out = given.get("out", Path("runs") / Path(given.get("model", "toy")).name)
        runs = [(ptdpo.make_config(given | {"method": m}), out / m, False) for m in methods]
    config = runs[0][0]  # a missing base or bad data are found before anything is written
    task = ptdpo.text_task(config) if config.model else ptdpo.toy(config)[1]
    for _, folder, resume in runs:
        if (folder / "run.json").exists() and not resume and "overwrite" not in given:
            raise UserError(f"{folder} holds a run: add --overwrite, or give another --out")
    for _, folder, _ in runs:
        folder.mkdir(parents=True, exist_ok=True)
    if len(runs) > 1 and not config.model and RANKS == 1:
        side_by_side(runs)
    else:
        for one in runs:
            ptdpo.run(*one, task)
    return runs[0][1].parent, task


# What may be given beside an action that goes by what is stored, or by nothing.
HEEDED = {"resume": {"steps"}, "eval": {"eval_split", "eval_problems", "task"}, "plot": set(),
          "save_hf": set(), "explain": set(), "help_metrics": set()}  # fmt: skip


def command(argv):
    """Do what the command line says."""
    from toy_tasks import hub, reproduce

    given = parse(argv)
    for action, others in HEEDED.items():
        if action in given and (odd := given.keys() - others - {action}):
            flag = min(odd).replace("_", "-")
            name = action.replace("_", "-")
            raise UserError(f"--{name} goes by what is stored: leave out --{flag}")
    settings = {f.name: given[f.name] for f in fields(ptdpo.Config) if f.name in given}
    out, seeds = lambda name: given.get("out", Path("runs") / name), given.get("seeds", 10)
    actions = {  # each gets what its flag was given
        "help_metrics": lambda _: print("\n".join(f"{k:18} {v}" for k, v in ptdpo.METRICS.items())),
        "plot": reproduce.plot,
        "explain": reproduce.explain,
        "reproduce": lambda name: reproduce.reproduce(name, seeds, out("reproduce"), settings),
        "eval": lambda path: reproduce.evaluate_checkpoint(path, **settings),
        "warm_start": lambda _: reproduce.make_base(ptdpo.make_config(given), out("base")),
        "save_hf": lambda paths: hub.save_run(*paths),
        "calibrate": lambda _: hub.calibrate_layers(ptdpo.make_config(given), out("calibration")),
    }
    connect()
    for action in actions.keys() & given.keys():
        return actions[action](given[action])
    if "seeds" in given:
        raise UserError("--seeds is for --reproduce; one run has one --seed")
    if "toy" in given and "model" in given:
        raise UserError("--toy and --model: choose one")
    if not given.keys() & {"toy", "model", "resume"}:
        raise UserError("say what to do, for example --toy; see python ptdpo.py --help")
    folder, task = train_command(given)
    if RANK == 0:
        reproduce.finish(folder, task)
