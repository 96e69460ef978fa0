"""Around the algorithm: curves, pictures and tables, the making of a base, and the experiments.

Nothing here is needed to train. ptdpo.py calls it when a run has finished, and for --plot, --eval,
--warm-start and --reproduce.
"""

import contextlib
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

import ptdpo

PANELS = ("accuracy", "point_f1", "entropy", "groups_all_failed", "groups_mixed", "jsd")


def read_rows(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_curves(folders, path):
    """Draw the curves of runs into one picture; step 0 is the base."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3).flat, PANELS):
        for folder in folders:
            base = json.loads((folder / "run.json").read_text())["base"]
            rows = [{"step": 0, **base}, *read_rows(folder / "metrics.jsonl")]
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            axis.plot(*zip(*points or [(0, 0)]), label=folder.name)
        axis.set(title=name, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=80)


def plot_tutoring(folder, task, path):
    """Draw a failed answer: picture, where its group looked, hinted regions, JSD of each token."""
    seed = json.loads((folder / "run.json").read_text())["config"]["seed"]
    rows = [r for r in read_rows(folder / "samples.jsonl") if r["hint"]]
    failed = [(r, g) for r in rows for g, solved in enumerate(r["solved"]) if not solved]
    if not failed:
        return
    row, g = failed[0]
    picture, jsd = task.problem("train", seed, row["index"]).images[0], row["jsd"][g]
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.set_title(f"{row['question']} {row['answer']}. Answered:\n{row['texts'][g]}", fontsize=9)
    side, edge = math.isqrt(len(row["relevance"])), picture.width
    for axis in (left, middle):
        axis.imshow(picture)
        axis.axis("off")
    heat = torch.tensor(row["relevance"]).view(side, side)
    middle.imshow(heat, extent=(0, edge, edge, 0), cmap="inferno", alpha=0.6)
    for r in row["hint"]["regions"]:
        corner = (r % side * edge / side, r // side * edge / side)
        middle.add_patch(Rectangle(corner, edge / side, edge / side, fill=False, edgecolor="white"))
    middle.set_title("where the model's own answers looked; white: hinted", fontsize=9)
    shades = [(1, 1 - min(1, v / math.log(2)), 0.3) for v in jsd]
    right.barh(range(len(jsd)), jsd, color=shades, edgecolor="grey")
    right.set_yticks(range(len(jsd)), row["tokens"][g])
    right.invert_yaxis()
    right.set_title("JSD of each token, student against tutored teacher", fontsize=9)
    figure.savefig(path, dpi=80)


def summary(folders):
    """A table of runs, and how to read it."""
    runs = {f.name: read_rows(f / "metrics.jsonl") for f in folders}
    runs = {name: [r for r in rows if r["accuracy"] is not None] for name, rows in runs.items()}
    goal = runs["grpo"][-1]["accuracy"] if "grpo" in runs else None
    names = ("area", "accuracy", "point_f1", "right_reason", "entropy", "to GRPO")
    lines = [" " * 12 + "".join(f"{name:>13}" for name in names)]
    for name, rows in runs.items():
        cells = [sum(r["accuracy"] for r in rows) / len(rows), *(rows[-1][n] for n in names[1:5])]
        cells = ["-" if c is None else f"{c:.3f}" for c in cells] + [steps_to(rows, goal) or "-"]
        lines.append(f"{name:12}" + "".join(f"{c:>13}" for c in cells))
    return "\n".join(lines + HOW_TO_READ)


HOW_TO_READ = [
    "area: mean accuracy over all evaluations; accuracy to entropy: after the last step",
    "right_reason: solved with exactly the true cells named; the rest of accuracy is guessing",
    "to GRPO: steps to GRPO's last accuracy, the first of two evaluations in a row that reach it",
]


def steps_to(rows, goal):
    """The first of two evaluations in a row at or above the goal; None if there is none."""
    if goal is not None:
        for a, b in pairwise(rows):
            if min(a["accuracy"], b["accuracy"]) >= goal:
                return a["step"]


def finish(folder, task):
    """After a run: draw, and print the table."""
    folders = ptdpo.runs_in(folder)
    plot_curves(folders, folder / "curves.png")
    for run in folders:
        plot_tutoring(run, task, folder / "tutoring.png")
    print(summary(folders))
    print(f"drawn: {folder}/curves.png, and a tutored failure: {folder}/tutoring.png")


def measure(policy, task, config, layers, problems):
    """What a policy solves alone and with each kind of hint, and the recall of those hints."""
    key = ("measure", 0)
    rollout = ptdpo.answer(policy, task, problems, config.group, config.temperature, key)
    ptdpo.read_reference(policy, rollout, config, layers)
    found = {"alone": ptdpo.evaluate(policy, task, problems)}
    found["groups_all_failed"] = (rollout.solved_share == 0).float().mean().item()
    for source in ("attention", "votes", "random", "oracle", "answer"):
        for parts in ("both", "where", "steps") if source == "attention" else ("both",):
            changed = replace(config, hint=source, hint_parts=parts)
            hints = ptdpo.build_hints(policy, task, rollout, changed, key)
            recalls = [ptdpo.recall(h.regions, p.targets) for h, p in zip(hints, problems)]
            scores = ptdpo.evaluate(policy, task, problems, [h.text for h in hints])
            found[f"{source} {parts}"] = scores | {"recall": sum(recalls) / len(problems)}
    return found


def make_base(config, folder):
    """Warm-start a base (or take the one in folder), measure it, and judge it by a fixed rule.

    Usable, on validation scenes: at least half of its groups all failed; tutored by its own
    attention it solves at least 20 points more; 20 steps of GRPO close less than a quarter of that.
    """
    policy, task = ptdpo.toy(config, trained=False)
    path = folder / "base.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        task.warm_start(policy, config.seed)
        ptdpo.write_checkpoint(path, {"seed": config.seed}, policy)
    ptdpo.read_checkpoint(path, policy)
    problems = [task.problem("validation", 0, i) for i in range(512)]
    by_layer = ptdpo.calibrate(policy, task, config)
    found = measure(policy, task, config, [by_layer.index(max(by_layer))], problems)
    short = replace(config, method="grpo", steps=20, eval_every=20, eval_problems=512)
    ptdpo.train(policy, task, short, folder / "grpo")
    found["grpo 20 steps"] = read_rows(folder / "grpo" / "metrics.jsonl")[-1]["accuracy"]
    alone = found["alone"]["accuracy"]
    gap, gain = found["attention both"]["accuracy"] - alone, found["grpo 20 steps"] - alone
    found["usable"] = found["groups_all_failed"] >= 0.5 and gap >= 0.2 and gain < gap / 4
    ptdpo.read_checkpoint(path, policy)
    state = {"seed": config.seed, "layer_recall": by_layer, "measured": found}
    ptdpo.write_checkpoint(path, state, policy)
    print(json.dumps(found, indent=1))


def evaluate_checkpoint(path, split=None):
    """Held-out scores of a checkpoint beside its base's, alone and tutored; and by true answer."""
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    policy, _ = ptdpo.toy(ptdpo.Config(), trained=False)
    state = ptdpo.read_checkpoint(path, policy)
    config = ptdpo.make_config(state.get("config", {}))
    base, task = ptdpo.toy(config)
    problems = [task.problem(split or config.eval_split, 0, i) for i in range(512)]
    by_base = measure(base, task, config, state.get("layers", [0]), problems)
    grades = ptdpo.answer(policy, task, problems, 1, 0.0, ("greedy",)).grades
    table = {"base alone": by_base["alone"], "base tutored": by_base["attention both"]}
    table["this checkpoint"] = ptdpo.judge(problems, grades)
    for name, scores in table.items():
        print(f"{name:16}" + "".join(f"  {k} {v:.3f}" for k, v in scores.items()))
    for true in sorted({p.answer for p in problems}, key=int):
        solved = [g.solved for g, p in zip(grades, problems) if p.answer == true]
        print(f"  true answer {true}: {sum(solved)} of {len(solved)} solved")


# ------------------------------------------------------------------------------------ experiments
ARMS = {  # what an arm changes in the defaults
    "grpo": {"method": "grpo"},
    "ptdpo": {},
    "random": {"hint": "random"},
    "votes": {"hint": "votes"},
}
EXPERIMENTS = {"main": ("grpo", "ptdpo", "random", "votes")}
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 1 to 9 degrees of freedom


def interval(values):
    """Mean and half-width of its 95 % t-interval."""
    n, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return mean, spread * T95[n - 2] if n > 1 else math.inf


def one_run(arm, seed, folder, common):
    """Train an arm on a seed, unless that has been done."""
    config = ptdpo.make_config(common | ARMS[arm] | {"seed": seed})
    done = folder / "metrics.jsonl"
    if not done.exists() or len(read_rows(done)) < config.steps:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            ptdpo.train(*ptdpo.toy(config), config, folder)
    return arm


def reproduce(name, seeds, out, common):
    """Run an experiment: every arm on every seed, two processes at a time, resumable."""
    arms = EXPERIMENTS[name]
    jobs = [(a, s, out / "runs" / a / str(s), common) for s in seeds for a in arms]
    context = multiprocessing.get_context("spawn")
    os.environ["TQDM_DISABLE"] = "1"
    with ProcessPoolExecutor(2, context) as pool:
        waiting = [pool.submit(one_run, *job) for job in jobs]
        for _ in tqdm(as_completed(waiting), name, len(jobs), disable=False):
            pass
        [w.result() for w in waiting]
    return {
        a: [read_rows(out / "runs" / a / str(s) / "metrics.jsonl") for s in seeds] for a in arms
    }
