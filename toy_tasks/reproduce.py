"""Around the algorithm: curves, pictures and tables, the making of a base, and the experiments.

Nothing here is needed to train. The command line calls it when a run has finished, and for --plot,
--eval, --explain, --warm-start and --reproduce.
"""

import contextlib
import json
import math
import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

import ptdpo
from toy_tasks.commands import runs_in, stored_config
from toy_tasks.warm_start import warm_start

PANELS = ("accuracy", "point_f1", "entropy", "groups_all_failed", "groups_mixed", "jsd")


def read_rows(path):
    """The rows of a JSONL file."""
    try:
        return [dict(json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError):
        raise ptdpo.UserError(f"{path}: not JSON, or torn; --resume cuts off what is") from None


def plot_curves(folders, path):
    """Draw the curves of runs into one picture; step 0 is the base."""
    figure, names = Figure(figsize=(13, 6.5), layout="constrained"), {f.name for f in folders}
    for axis, name in zip(figure.subplots(2, 3).flat, PANELS):
        for folder in folders:
            base = json.loads((folder / "run.json").read_text())["base"]
            rows = [{"step": 0, **base}, *read_rows(folder / "metrics.jsonl")]
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            label = folder.name if len(names) == len(folders) else "/".join(folder.parts[-2:])
            axis.plot(*zip(*points or [(0, 0)]), label=label)
        axis.set(title=name, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=80)


def plot(folders):
    """--plot: runs together in one picture, or the figure of a summary again."""
    if (folders[0] / "summary.json").exists():
        for folder in folders:
            draw_summary(folder / "summary.json")
        return print(claims_markdown(folders))
    runs = [run for folder in folders for run in runs_in(folder)]
    plot_curves(runs, folders[0] / "curves.png")
    print(f"drawn: {folders[0]}/curves.png")


def plot_tutoring(folder, task, path):
    """Draw a failed answer: picture, where its group looked, hinted regions, JSD of each token."""
    seed = json.loads((folder / "run.json").read_text())["config"]["seed"]
    rows = [r for r in read_rows(folder / "samples.jsonl") if r["hint"]]
    failed = [(r, g) for r in rows for g, solved in enumerate(r["solved"]) if not solved]
    if not failed:
        return
    row, g = failed[0]
    images, jsd = task.problem("train", seed, row["index"]).images, row["jsd"][g][:40]
    (picture, *_), R = images, len(row["relevance"]) // len(images)  # regions of the first picture
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.imshow(picture)
    asked, text = row["question"].split("\n")[0][:80], row["texts"][g][:80]
    left.set_title(f"{asked} {row['answer']}. Answered:\n{text}", fontsize=9, parse_math=False)
    left.axis("off")
    show_attention(middle, picture, row["relevance"][:R], row["hint"]["regions"])
    shades = [(1, 1 - min(1, v / math.log(2)), 0.3) for v in jsd]
    right.barh(range(len(jsd)), jsd, color=shades, edgecolor="grey")
    right.set_yticks(range(len(jsd)), row["tokens"][g][:40], parse_math=False)
    right.invert_yaxis()
    right.set_title("JSD of each token, student against tutored teacher", fontsize=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signs that the font lacks
        figure.savefig(path, dpi=80)


def show_attention(axis, picture, relevance, regions):
    """A picture under its relevance map [R], R a square grid, with the hinted regions framed."""
    side = math.isqrt(len(relevance))
    width, height = picture.width / side, picture.height / side
    axis.imshow(picture)
    heat = torch.as_tensor(relevance)[: side * side].view(side, side).numpy()
    axis.imshow(heat, extent=(0, picture.width, picture.height, 0), cmap="inferno", alpha=0.6)
    for r in (r for r in regions if r < side * side):
        corner = (r % side * width, r // side * height)
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white"))
    axis.set_title("where its own answers looked\nwhite: hinted to the teacher", fontsize=9)
    axis.axis("off")


@torch.no_grad()
def draw_hero(curves, path):
    """README's first picture: a failed answer, its hint, the teacher's opinion, the curves."""
    config, policy, ref, rollout, tokens, _ = one_step()
    n, G = rollout.distill.nonzero()[0].item(), config.group
    b = n // G
    problem = rollout.problems[b]
    figure = Figure(figsize=(15, 4), layout="constrained")
    first, second, third, fourth = figure.subplots(1, 4, width_ratios=(1, 1, 1.1, 1.5))
    first.imshow(problem.images[0])
    first.set_title(f"{problem.question} {problem.answer}\nfailed: {rollout.texts[n]}", fontsize=9)
    first.axis("off")
    show_attention(second, problem.images[0], rollout.relevance[b], rollout.hints[b].regions)
    apart = tokens["jsd"][n]
    t = (apart >= apart.max().clamp_max(0.1)).nonzero()[0].item()  # where they first part
    rows = slice(b * G, b * G + G)
    hidden, _ = policy.forward(rollout.prompts[b : b + 1], rollout.completion[rows])
    p = (hidden[n % G, t] @ policy.head_weight.T).softmax(-1)
    q = (rollout.teacher[n, t] @ ref.head_weight.T).softmax(-1)
    words = sorted({*p.topk(4).indices.tolist(), *q.topk(2).indices.tolist()}, key=lambda i: -p[i])
    places = torch.arange(len(words))
    third.barh(places - 0.2, p[words], 0.4, label="student")
    third.barh(places + 0.2, q[words], 0.4, label="tutored teacher")
    third.set_yticks(places, [policy.text([i]) for i in words])
    third.invert_yaxis()
    before = policy.text(rollout.completion[n, :t].tolist())
    third.set_title(f'next word after\n"{before}"', fontsize=9)
    third.legend(fontsize=8)
    names = {"ptdpo": "PTD-PO", "random": "PTD-PO, random hints", "grpo": "GRPO"}
    bands(fourth, {label: curves[arm] for arm, label in names.items()})
    fourth.set_title("held-out accuracy, 10 seeds, 95 % interval", fontsize=9)
    fourth.legend(fontsize=8)
    figure.savefig(path, dpi=80)


@torch.no_grad()
def one_step(folder=None):
    """The next step of a run (or the first from the base), up to its update -> all that it made."""
    config, state = ptdpo.Config(), {}
    if folder:
        path = runs_in(folder)[-1] / "checkpoint.safetensors"
        config = stored_config(path)
    if config.model:
        raise ptdpo.UserError("--explain tells runs of the toy; give the folder of one")
    policy, task = ptdpo.toy(config)
    ref = policy.frozen_copy()
    if folder:
        state = ptdpo.read_checkpoint(path, policy)
    step, layers = state.get("step", 0) + 1, state.get("layers")
    if layers is None:
        by_layer = ptdpo.calibrate(ref, task, config)
        layers = [by_layer.index(max(by_layer))]
    config = replace(config, method="ptdpo")  # a run of GRPO is told with the hints it would get
    rollout = ptdpo.collect(policy, ref, task, config, layers, step)
    ptdpo.weigh_tokens(rollout, config, config.distill_weight)
    tokens = ptdpo.total_loss(policy, ref, rollout, config)[1]
    return config, policy, ref, rollout, tokens, step


@torch.no_grad()
def explain(folder=None):
    """--explain: one training step told with its own numbers."""
    config, policy, ref, rollout, tokens, step = one_step(folder)
    G, mixed = config.group, rollout.solved_share > 0
    failed = rollout.distill & mixed.repeat_interleave(G)
    failed = failed if failed.any() else rollout.distill
    if not failed.any():
        return print(f"step {step}: nothing failed, nothing to tutor")
    n = failed.nonzero()[0].item()
    b = n // G
    problem, hint, share = rollout.problems[b], rollout.hints[b], rollout.solved_share
    print(
        f"Step {step}, group {b} of {len(share)}: {(share == 0).sum()} groups failed as a whole, "
        f"{((share > 0) & (share < 1)).sum()} are mixed.\n"
    )
    print(f"1. The question: {problem.question}   (true: {problem.answer})")
    if hasattr(problem, "objects"):
        side = policy.side
        cells = [" ".join(problem.objects.get(c, ("-",))) for c in range(side * side)]
        for row in range(side):
            print("   " + "".join(f"{c:16}" for c in cells[row * side : row * side + side]))
    print(f"\n2. {G} answers, their rewards, and advantages (reward - mean) / std of the group:")
    for g in range(b * G, b * G + G):
        mark = "  <- told below" if g == n else ""
        print(f"   {rollout.reward[g]:3.1f}  {rollout.adv[g]:+.2f}   {rollout.texts[g]}{mark}")
    found = ptdpo.recall([hint.regions], [problem])
    print("\n3. Where the frozen base looked while it re-read them, and so the hint:")
    print(f"   {hint.text}\n   recall of the true targets: {found}; the student never sees this")
    print("\n4. The failed answer, token by token, as student and tutored teacher see it:")
    print(f"   {'token':8}{'student':34}{'tutored teacher':34}{'JSD':>7}{'reward':>9}{'JSD':>8}")
    print(f"   {'':8}{'':34}{'':34}{'':7}{'weight':>9}{'weight':>8}")
    hidden, _ = policy.forward(rollout.prompts[b : b + 1], rollout.completion[b * G : b * G + G])
    for t in range(int(rollout.mask[n].sum())):
        p, q = favourites(policy, hidden[n % G, t]), favourites(ref, rollout.teacher[n, t])
        pull = rollout.policy_weights[n, t] * rollout.adv[n]
        token = policy.text([rollout.completion[n, t].item()])
        print(
            f"   {token:8}{p:34}{q:34}{tokens['jsd'][n, t]:7.3f}{pull:+9.4f}"
            f"{rollout.jsd_weights[n, t]:8.4f}"
        )
    print(HOW_TO_READ_A_STEP)


HOW_TO_READ_A_STEP = """
   reward weight: advantage times the token's share of the mean. Below 0 the token becomes less
   likely, whatever was wrong with it. JSD weight: lambda times its share. The teacher judges each
   next word after the student's own words: where an answer stopped pointing too soon, it corrects
   that, and then gives the number that follows from the points that are there."""


def favourites(policy, hidden, n=3):
    """The n most likely next words from a hidden state [H], as text."""
    top = (hidden @ policy.head_weight.T).softmax(-1).topk(n)
    return "  ".join(f"{policy.text([i])} {v:.2f}" for v, i in zip(*map(torch.Tensor.tolist, top)))


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
    "area: mean accuracy over all evaluations; the columns from accuracy to entropy: last step",
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
    folders = runs_in(folder)
    plot_curves(folders, folder / "curves.png")
    for run in folders:
        plot_tutoring(run, task, folder / "tutoring.png")
    print(summary(folders))
    print(f"drawn: {folder}/curves.png, and a tutored failure: {folder}/tutoring.png")


KINDS = [("attention", parts) for parts in ("both", "where", "steps")]
KINDS += [(source, "both") for source in ("votes", "random", "oracle", "answer")]


def measure(policy, task, config, layers, problems, kinds=KINDS):
    """What a policy solves alone and with each kind of hint, and the recall of those hints."""
    key = ("measure", 0)
    rollout = ptdpo.answer(policy, task, problems, config.group, config.temperature, key)
    ptdpo.read_reference(policy, rollout, config, layers)
    found = {"alone": ptdpo.evaluate(policy, task, problems)}
    found["groups_all_failed"] = (rollout.solved_share == 0).float().mean().item()
    for source, parts in kinds:
        changed = replace(config, hint=source, hint_parts=parts)
        hints = ptdpo.build_hints(policy, task, rollout, changed, key)
        scores = ptdpo.evaluate(policy, task, problems, [h.text for h in hints])
        recall = ptdpo.recall([h.regions for h in hints], problems)
        found[f"{source} {parts}"] = scores | {"recall": recall}
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
        warm_start(task, policy, config.seed)
        ptdpo.write_checkpoint(path, {"seed": config.seed}, policy)
    ptdpo.read_checkpoint(path, policy)
    problems = [task.problem("validation", 0, i) for i in range(512)]
    by_layer = ptdpo.calibrate(policy, task, config)
    found = measure(policy, task, config, [by_layer.index(max(by_layer))], problems)
    short = replace(config, method="grpo", steps=20, eval_every=20, eval_problems=512)
    ptdpo.train(policy, task, short, folder / "grpo-20-steps")
    found["grpo 20 steps"] = read_rows(folder / "grpo-20-steps" / "metrics.jsonl")[-1]["accuracy"]
    alone = found["alone"]["accuracy"]
    gap, gain = found["attention both"]["accuracy"] - alone, found["grpo 20 steps"] - alone
    found["usable"] = found["groups_all_failed"] >= 0.5 and gap >= 0.2 and gain < gap / 4
    ptdpo.read_checkpoint(path, policy)
    state = {"seed": config.seed, "layer_recall": by_layer, "measured": found}
    ptdpo.write_checkpoint(path, state, policy)
    print(json.dumps(found, indent=1))


def evaluate_checkpoint(path, **given):
    """Held-out scores of a checkpoint beside its base's, alone and tutored; and by true answer."""
    if path.is_dir() and len(runs := runs_in(path)) > 1:
        raise ptdpo.UserError(f"{path} holds {len(runs)} runs; name one, such as {runs[0]}")
    path = runs_in(path)[0] / "checkpoint.safetensors" if path.is_dir() else path
    state, _ = ptdpo.open_checkpoint(path)
    run = state.get("config", {})
    given = given if run.get("model") else {"eval_problems": 512} | given
    config = stored_config(path, **given) if run else ptdpo.make_config(given)
    policy, task = ptdpo.setup(config)
    base = policy.frozen_copy()
    ptdpo.read_checkpoint(path, policy)
    by_layer = state.get("layer_recall") or [0]  # of a base: the layer that it was measured with
    layers = state.get("layers", [by_layer.index(max(by_layer))])
    count = min(config.eval_problems, task.held_out)
    problems = [task.problem(config.eval_split, 0, i) for i in range(count)]
    by_base = measure(base, task, config, layers, problems, [("attention", "both")])
    grades = ptdpo.answer(policy, task, problems, 1, 0.0, ("greedy",)).grades
    table = {"base alone": by_base["alone"], "base tutored": by_base["attention both"]}
    table["this checkpoint"] = ptdpo.judge(problems, grades)
    for name, scores in table.items():
        known = {k: v for k, v in scores.items() if v is not None}
        print(f"{name:16}" + "".join(f"  {k} {v:.3f}" for k, v in known.items()))
    if config.data:  # every answer is another
        return
    for true in sorted({p.answer for p in problems}, key=lambda a: (len(a), a)):
        solved = [g.solved for g, p in zip(grades, problems) if p.answer == true]
        print(f"  true answer {true}: {sum(solved)} of {len(solved)} solved")


# ------------------------------------------------------------------------------------ experiments
# GRPO has the best of three learning rates at each length, chosen on seeds 0-4, validation scenes.
ARMS = {  # what a run changes in the defaults; a name stands for the same runs in every experiment
    "grpo": {"method": "grpo"},
    "ptdpo": {},
    "answer": {"hint": "answer"},
    "distil_only": {"policy_weight": 0.0},
    "random": {"hint": "random"},
    "votes": {"hint": "votes"},
    "grpo_kl_untutored": {"method": "grpo", "kl_on": "untutored"},
    "ptdpo_kl_untutored": {"kl_on": "untutored"},
    "grpo_long": {"method": "grpo", "steps": 180, "lr": 1e-4},
    "ptdpo_long": {"steps": 180},
    "grpo_long_3e-4": {"method": "grpo", "steps": 180},
    "where": {"hint_parts": "where"},
    "steps": {"hint_parts": "steps"},
    "oracle": {"hint": "oracle"},
    "none": {"hint": "none"},
    "tau_0.2": {"tau": 0.2},
    "tau_0.4": {"tau": 0.4},
    "on_all": {"distill_on": "all"},
    "exact_jsd": {"top_k": 64},
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "k_1": {"top_k": 1},
    "k_2": {"top_k": 2},
    "k_5": {"top_k": 5},
    "zero_gradient": {"control": "zero_gradient"},
    "student_support_k_2": {"control": "student_support", "top_k": 2},
}
for form in ("grpo", "dapo", "gspo"):
    twice = {"algorithm": form, "updates_per_batch": 2}
    ARMS |= {f"{form}_twice": twice | {"method": "grpo"}, f"{form}_twice_tutored": twice}
for base in (1, 2):
    place = {"base": f"toy_tasks/base-{base}.safetensors"}
    ARMS |= {f"grpo_base_{base}": place | {"method": "grpo"}, f"ptdpo_base_{base}": place}

# The path of --model, on a CPU: all that shapes learning is as in the toy.
SMALL_QWEN = {"max_tokens": 16, "max_pixels": 20_000, "hint_regions": 6}
qwen = {n: getattr(ptdpo.Config, n) for n in ptdpo.MODEL_DEFAULTS}
qwen |= SMALL_QWEN | {"model": "assets/small-qwen"}
for name, steps in (("", 60), ("_long", 180)):
    arm = qwen | {"steps": steps}
    ARMS |= {f"qwen_grpo{name}": arm | {"method": "grpo"}, f"qwen_ptdpo{name}": arm}

USUAL = ("accuracy", "point_f1", "right_reason", "entropy", "completion_length", "hint_recall")
GROUPS = ("groups_all_failed", "groups_mixed", "groups_all_solved")


@dataclass
class Claim:
    """What the paper saw, as a difference of two arms that should be above or below 0."""

    paper: str
    measure: str
    arm: str
    other: str
    sign: int = 1


@dataclass
class Experiment:
    """Arms to train, panels of the figure, claims to judge."""

    arms: str
    claims: list
    panels: tuple = USUAL
    seeds: int = 10


EXPERIMENTS = {
    "main": Experiment(
        "grpo ptdpo answer distil_only random votes grpo_kl_untutored ptdpo_kl_untutored",
        [
            Claim("PTD-PO over GRPO: 2B 50.6, 61.2; 4B 68.1, 71.2", "accuracy", "ptdpo", "grpo"),
            Claim("the same over the whole run", "area", "ptdpo", "grpo"),
            Claim("ours: steps to GRPO's last accuracy", "to_grpo", "ptdpo", "grpo", -1),
            Claim("ours: it points better", "point_f1", "ptdpo", "grpo"),
            Claim("ours: it is right for the right reason", "right_reason", "ptdpo", "grpo"),
            Claim("over answer-conditioned HDPO: 4B 71.2, 68.3", "accuracy", "ptdpo", "answer"),
            Claim("shortcut: conditioned on the answer, outputs get shorter", "completion_length",
                  "answer", "grpo", -1),
            Claim("the same against PTD-PO, whose answers grow", "completion_length", "answer",
                  "ptdpo", -1),
            Claim("tutoring and reward over self-distillation alone", "accuracy", "ptdpo",
                  "distil_only"),
            Claim("hints must be about the picture at hand", "area", "ptdpo", "random"),
            Claim("ours: random hints over GRPO", "accuracy", "random", "grpo"),
            Claim("ours: random hints teach pointing, too", "point_f1", "random", "grpo"),
            Claim("ours: attention is more than an echo of the answers", "area", "ptdpo", "votes"),
            Claim("ours: recall of attention over votes", "hint_recall", "ptdpo", "votes"),
            Claim("ours: the same in the first 5 steps", "hint_recall_early", "ptdpo", "votes"),
            Claim("ours: recall of attention over random", "hint_recall", "ptdpo", "random"),
            Claim("authors' code: no KL on tutored groups", "accuracy", "ptdpo_kl_untutored",
                  "ptdpo"),
            Claim("ours: GRPO with that very KL", "accuracy", "ptdpo_kl_untutored",
                  "grpo_kl_untutored"),
        ],
    ),
    "long": Experiment(
        "grpo_long ptdpo_long grpo_long_3e-4",
        [
            Claim("three times the steps", "accuracy", "ptdpo_long", "grpo_long"),
            Claim("the same over the whole run", "area", "ptdpo_long", "grpo_long"),
            Claim("ours: steps to GRPO's last accuracy", "to_grpo", "ptdpo_long", "grpo_long", -1),
            Claim("GRPO at 3e-4, three times the steps", "accuracy", "ptdpo_long",
                  "grpo_long_3e-4"),
            Claim("GRPO at 3e-4, over the whole run", "area", "ptdpo_long", "grpo_long_3e-4"),
            Claim("entropy stays higher", "entropy", "ptdpo_long", "grpo_long"),
            Claim("entropy where GRPO's last accuracy is reached", "entropy_at_grpo",
                  "ptdpo_long", "grpo_long"),
        ],
    ),
    "bases": Experiment(
        "grpo_base_1 ptdpo_base_1 grpo_base_2 ptdpo_base_2",
        [
            Claim(f"base {b}", measure, f"ptdpo_base_{b}", f"grpo_base_{b}")
            for b in (1, 2)
            for measure in ("accuracy", "area", "point_f1")
        ],
        seeds=5,
    ),
    "entropy": Experiment(
        "grpo ptdpo answer",
        [
            Claim("entropy of PTD-PO stays above GRPO's", "entropy", "ptdpo", "grpo"),
            Claim("conditioned on the answer, entropy collapses", "entropy", "answer", "ptdpo", -1),
            Claim("entropy of failed answers", "entropy_failed", "ptdpo", "grpo"),
            Claim("fewer groups fail as a whole", "groups_all_failed", "ptdpo", "grpo", -1),
        ],
        ("entropy", "entropy_failed", "entropy_solved", *GROUPS),
    ),
    "hints": Experiment(
        "ptdpo where steps random votes oracle none",
        [
            Claim("without structured hints the gain is lost: 8B +3.6 % to -0.9 %", "accuracy",
                  "ptdpo", "none"),
            Claim("steps alone", "accuracy", "ptdpo", "steps"),
            Claim("where to look alone", "accuracy", "ptdpo", "where"),
            Claim("ours: the true cells as the limit", "area", "oracle", "ptdpo"),
        ],
    ),
    "threshold": Experiment(
        "ptdpo tau_0.2 tau_0.4 on_all",
        [
            Claim("tau 1.0 over 0.2", "area", "ptdpo", "tau_0.2"),
            Claim("tau 1.0 over 0.4", "area", "ptdpo", "tau_0.4"),
            Claim("distilling on all answers gains less: 8B +1.3 %", "area", "ptdpo", "on_all"),
        ],
        (*USUAL[:4], *GROUPS[:2]),
    ),
    "divergence": Experiment(
        "grpo ptdpo exact_jsd forward_kl reverse_kl k_1 k_2 k_5 zero_gradient student_support_k_2",
        [
            Claim("released default: gradient 0, no better than GRPO", "area", "ptdpo",
                  "zero_gradient"),
            Claim("union support over the student's alone, K = 2", "area", "k_2",
                  "student_support_k_2"),
            Claim("K = 10 over K = 1", "area", "ptdpo", "k_1"),
            Claim("exact JSD over K = 10", "area", "exact_jsd", "ptdpo"),
            Claim("JSD over forward KL", "area", "ptdpo", "forward_kl"),
            Claim("JSD over reverse KL", "area", "ptdpo", "reverse_kl"),
        ],
    ),
    "optimisers": Experiment(
        "grpo_twice grpo_twice_tutored dapo_twice dapo_twice_tutored gspo_twice gspo_twice_tutored",
        [
            Claim(f"tutoring helps {form}: {gain}", "accuracy", f"{form}_twice_tutored",
                  f"{form}_twice")
            for form, gain in zip(("grpo", "dapo", "gspo"), ("+5.1 %", "+3.0 %", "+1.9 %"))
        ],
    ),
    "qwen": Experiment(
        "qwen_grpo qwen_ptdpo qwen_grpo_long qwen_ptdpo_long",
        [
            Claim(f"small Qwen2-VL, {steps} steps{more}", measure, f"qwen_ptdpo{name}",
                  f"qwen_grpo{name}")
            for name, steps in (("", 60), ("_long", 180))
            for measure, more in (("accuracy", ""), ("area", ""),
                                  ("entropy", ": entropy stays higher"))
        ],
        ("accuracy", "entropy", "completion_length", "hint_recall", *GROUPS[:2]),
        seeds=5,
    ),
}  # fmt: skip
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 1 to 9 degrees of freedom


def zero_gradient(p, q):
    """Control: the value of the JSD and, as in the released default, no gradient."""
    return ptdpo.js_buckets(p, q)[0], torch.zeros_like(p)


def student_support(hidden, weight, targets, teacher=None, head=None, k=10, temperature=1.0, **_):
    """Control: token_stats with the released support, re-expressed. Only the student's Top-K is
    seen; a teacher's mass outside of the teacher's own Top-K is spread evenly over the rest."""
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    jsd = logp.new_zeros(len(logp))
    if teacher is not None:
        p, q = logp[: len(teacher)].exp(), (teacher @ head.T / temperature).softmax(-1)
        kept = torch.zeros_like(q).scatter(-1, q.topk(k).indices, 1.0)
        rest = (q * (1 - kept)).sum(-1, keepdim=True) / (q.shape[-1] - k)
        q, ids = torch.where(kept > 0, q, rest), p.topk(k).indices
        p, q = (
            torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1)
            for x in (p.gather(1, ids), q.gather(1, ids))
        )
        value, slope = ptdpo.js_buckets(p.detach(), q)
        jsd = torch.cat([(value + slope * (p - p.detach())).sum(-1), jsd[len(teacher) :]])
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1).detach(), jsd


def interval(values):
    """Mean and half-width of its 95 % t-interval."""
    n, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return mean, spread * (T95[n - 2] if n <= 10 else 1.96) if n > 1 else math.inf


SHARED = {"steps", "prompts", "group", "eval_every", "eval_problems", "difficulty", "threads"}


def one_run(arm, seed, folder, common):
    """Train an arm on a seed, go on with it, or leave it if it is done."""
    changes = dict(ARMS[arm])
    control = changes.pop("control", None)
    if "steps" in common:  # a long run stays three times as long
        common = common | {"steps": changes.get("steps", 60) // 60 * common["steps"]}
    config = ptdpo.make_config({"eval_split": "test"} | changes | common | {"seed": seed})
    if control == "zero_gradient":
        config.divergence = control
    ptdpo.DIVERGENCES["zero_gradient"] = zero_gradient
    plain, path = ptdpo.token_stats, folder / "run.json"
    if path.exists() and json.loads(path.read_text())["config"] != asdict(config):
        raise ptdpo.UserError(f"{folder}: a run with other settings; give another --out")
    started = path.exists() and (folder / "checkpoint.safetensors").exists()
    if not started or len(read_rows(folder / "metrics.jsonl")) < config.steps:
        ptdpo.token_stats = student_support if control == "student_support" else plain
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            ptdpo.train(*ptdpo.setup(config), config, folder, resume=started)
        ptdpo.token_stats = plain


def train_arms(arms, seeds, out, common):
    """Every arm on every seed, two processes at a time; what is done is not done again."""
    jobs = [(a, s, out / "runs" / a / str(s), common) for s in seeds for a in arms]
    os.environ["TQDM_DISABLE"] = "1"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(one_run, *job) for job in jobs]
        for done in tqdm(as_completed(waiting), "runs", len(jobs), disable=False):
            done.result()
    read = {
        a: [read_rows(out / "runs" / a / str(s) / "metrics.jsonl") for s in seeds] for a in arms
    }
    return {a: [[{"step": 0}, *rows] for rows in runs] for a, runs in read.items()}


def measure_run(rows, rival):
    """Numbers of one run; rival: GRPO from the same seed, for what is relative to it."""
    scored = [r for r in rows if r.get("accuracy") is not None]
    found = {n: rows[-1][n] for n in (*USUAL[:-1], "entropy_failed", *GROUPS)}
    recalls = [r["hint_recall"] for r in rows[1:] if r["hint_recall"] is not None]
    for measure, some in (("hint_recall", recalls), ("hint_recall_early", recalls[:5])):
        found[measure] = sum(some) / len(some) if some else None
    found["area"] = sum(r["accuracy"] for r in scored) / len(scored)
    reached = steps_to(scored, rival[-1]["accuracy"])
    found["to_grpo"] = reached or rows[-1]["step"]
    there = [r["entropy"] for r in scored if r["step"] == reached]
    found["entropy_at_grpo"] = there[0] if there else rows[-1]["entropy"]
    return found


def rival_of(arm, arms):
    """The untutored arm that an arm is measured against; itself if there is none."""
    names = (arm.replace("_tutored", ""), arm.replace("ptdpo", "grpo"), "grpo")
    return next((n for n in names if n != arm and n in arms), arm)


def judge_claim(claim, found):
    """Paired difference over the seeds; a verdict only where the 95 % interval excludes 0."""
    pairs = zip(found[claim.arm], found[claim.other])
    both = [(a[claim.measure], b[claim.measure]) for a, b in pairs]
    both = [(a, b) for a, b in both if a is not None and b is not None]
    if len(both) < 2:
        return asdict(claim) | {"verdict": "no value", "seeds": len(both)}
    mean, half = interval([a - b for a, b in both])
    sure = abs(mean) > half
    verdict = "agrees" if sure and mean * claim.sign > 0 else "differs" if sure else "not resolved"
    means = {"arm_mean": sum(a for a, _ in both) / len(both)}
    means |= {"other_mean": sum(b for _, b in both) / len(both)}
    numbers = {"difference": mean, "half_width": half, "seeds": len(both), "verdict": verdict}
    return asdict(claim) | means | numbers


def curves_of(runs, name):
    """Mean and 95 % half-width over seeds of one metric, at the steps where all have it."""
    points = []
    for rows in zip(*runs):
        values = [r[name] for r in rows if r.get(name) is not None]
        if len(values) == len(rows):
            points.append((rows[0]["step"], *interval(values)))
    return points


def summarise(name, seeds, out, common):
    """Train what an experiment needs -> its summary."""
    experiment = EXPERIMENTS[name]
    seeds = list(seeds)[: experiment.seeds]
    runs = train_arms(experiment.arms.split(), seeds, out, common)
    found = {a: [measure_run(*p) for p in zip(runs[a], runs[rival_of(a, runs)])] for a in runs}
    folders = [p for arm in runs for p in out.glob(f"runs/{arm}/*/run.json")]
    commits = {json.loads(path.read_text())["commit"] for path in folders}
    return {
        "name": name,
        "seeds": seeds,
        "commits_of_runs": sorted(map(str, commits)),
        "arms": {a: {"settings": ARMS[a], "by_seed": found[a]} for a in runs},
        "claims": [judge_claim(c, found) for c in experiment.claims],
        "curves": {p: {a: curves_of(runs[a], p) for a in runs} for p in experiment.panels},
    }


def draw_summary(path):
    """Draw the figure of a summary.json beside it; nothing is trained."""
    summary = json.loads(path.read_text())
    if "bars" in summary:
        return draw_bars(summary, path.with_name("figure.png"))
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    for axis, (name, arms) in zip(figure.subplots(2, 3).flat, summary["curves"].items()):
        bands(axis, arms)
        axis.set(title=name, xlabel="step")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"{summary['name']}: mean and 95 % interval over {len(summary['seeds'])} seeds")
    figure.savefig(path.with_name("figure.png"), dpi=80)
    if summary["name"] == "main":
        draw_hero(summary["curves"]["accuracy"], path.with_name("hero.png"))


def bands(axis, arms):
    """Curves as lists of (step, mean, half-width), each in a band of its interval."""
    for i, (arm, points) in enumerate(arms.items()):  # one colour an arm in all panels
        if points:
            step, mean, half = (list(column) for column in zip(*points))
            axis.plot(step, mean, f"C{i}", label=arm)
            low, high = ([m + sign * h for m, h in zip(mean, half)] for sign in (-1, 1))
            axis.fill_between(step, low, high, color=f"C{i}", alpha=0.15)


def draw_bars(summary, path):
    """One bar a row of the summary, with its 95 % interval."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis, rows = figure.subplots(), summary["bars"]
    places = range(len(rows))
    axis.barh(places, [r["mean"] for r in rows], xerr=[r["half_width"] for r in rows])
    axis.set_yticks(places, [r["label"] for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(title=summary["title"], xlim=(0, None))
    figure.savefig(path, dpi=80)


def reproduce(name, seeds, out, common):
    """Run experiments by name, or all: DIR/NAME gets summary.json, figure.png and about.json."""
    known = [*EXPERIMENTS, *MEASUREMENTS]
    if name not in (*known, "all") or seeds < 1:
        raise ptdpo.UserError(f"--reproduce {name}: all or one of {', '.join(known)}; --seeds >= 1")
    if odd := common.keys() - SHARED:
        flag = min(odd).replace("_", "-")
        raise ptdpo.UserError(f"--reproduce sets --{flag} by arm: leave out --{flag}, or edit ARMS")
    names = known if name == "all" else [name]
    for name in names:
        began = time.time()
        if name in EXPERIMENTS:
            summary = summarise(name, range(200, 200 + seeds), out, common)
        else:
            summary = MEASUREMENTS[name](range(200, 200 + seeds), common)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        about = ptdpo.provenance() | {"command": " ".join(["python", *sys.argv])}
        about |= {"cores": os.cpu_count(), "minutes_of_this_call": (time.time() - began) / 60}
        (folder / "about.json").write_text(json.dumps(about, indent=1))
        draw_summary(folder / "summary.json")
        print(f"{name}: {folder}/summary.json, figure.png")
        print(claims_table(summary["claims"]))


def claims_table(claims):
    """Claims as lines of text."""
    lines = []
    for c in claims:
        if c["verdict"] != "no value":
            shown = f"{c['difference']:+.3f} +- {c['half_width']:.3f}"
            pair = f"{c['measure']:17} {c['arm']} - {c['other']}"
            lines.append(f"  {c['verdict']:12} {shown:18} {pair}: {c['paper']}")
    return "\n".join(lines)


def claims_markdown(folders):
    """README's table of all claims, from committed summaries."""
    lines = ["| what the paper, or this page, says | measured | arms | difference | verdict |"]
    lines += ["|---|---|---|---|---|"]
    for folder in folders:
        for c in json.loads((folder / "summary.json").read_text())["claims"]:
            if c["verdict"] != "no value":
                arms = f"{c['arm']} {c['arm_mean']:.3f}, {c['other']} {c['other_mean']:.3f}"
                gap = f"{c['difference']:+.3f} ± {c['half_width']:.3f}"
                lines.append(f"| {c['paper']} | {c['measure']} | {arms} | {gap} | {c['verdict']} |")
    return "\n".join(lines)


SHORT, LONG = ("main", "grpo", "ptdpo"), ("long", "grpo_long", "ptdpo_long")
FAST = ("long", "grpo_long_3e-4", "ptdpo_long")
RESULTS = {  # rows of README's first table: experiment, two arms, measure
    "accuracy after 60 steps": (*SHORT, "accuracy"),
    "area under its curve": (*SHORT, "area"),
    "point F1": (*SHORT, "point_f1"),
    "right for the right reason": (*SHORT, "right_reason"),
    "steps to GRPO's last accuracy (never: 60)": (*SHORT, "to_grpo"),
    "entropy at the end, nats": (*SHORT, "entropy"),
    "all-failed groups in the last step": (*SHORT, "groups_all_failed"),
    "accuracy after 180 steps, GRPO at 1e-4": (*LONG, "accuracy"),
    "accuracy after 180 steps, GRPO at 3e-4": (*FAST, "accuracy"),
    "area, 180 steps, GRPO at 1e-4": (*LONG, "area"),
    "area, 180 steps, GRPO at 3e-4": (*FAST, "area"),
    "steps to GRPO's last accuracy, GRPO at 1e-4 (never: 180)": (*LONG, "to_grpo"),
    "entropy after 180 steps, GRPO at 1e-4": (*LONG, "entropy"),
}


def results_markdown(folder):
    """README's first table: GRPO, PTD-PO and their paired difference, from committed summaries."""
    lines = ["| | GRPO | PTD-PO | paired difference |", "|---|---|---|---|"]
    for label, (name, *two, measure) in RESULTS.items():
        arms = json.loads((folder / name / "summary.json").read_text())["arms"]
        grpo, ptdpo = ([seed[measure] for seed in arms[arm]["by_seed"]] for arm in two)
        mean, half = interval([b - a for a, b in zip(grpo, ptdpo)])
        digits = 0 if measure == "to_grpo" else 3
        cells = [f"{sum(v) / len(v):.{digits}f}" for v in (grpo, ptdpo)]
        cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(lines)


# ------------------------------------------------------------- experiments that train no policy
def recover(seeds, common, scenes=128):
    """Share of all-failed pictures that the tutored base solves at least once in G samples."""
    config = ptdpo.make_config(common)
    policy, task = ptdpo.toy(config)
    by_layer = ptdpo.calibrate(policy, task, config)
    layers, shares = [by_layer.index(max(by_layer))], {}
    arms = {"no hint, sampled again": {"hint": "none"}, "own attention": {}}
    arms |= {f"own attention, {p} alone": {"hint_parts": p} for p in ("where", "steps")}
    arms |= {source: {"hint": source} for source in ("votes", "random", "oracle", "answer")}
    for seed in seeds:
        problems = [task.problem("test", seed, i) for i in range(scenes)]
        sampled = (config.group, config.temperature, ("recover", seed))
        rollout = ptdpo.answer(policy, task, problems, *sampled)
        ptdpo.read_reference(policy, rollout, config, layers)
        failed = (rollout.solved_share == 0).nonzero()[:, 0].tolist()
        for label, changes in arms.items():
            hints = ptdpo.build_hints(policy, task, rollout, replace(config, **changes), sampled[2])
            key = ("recover again", seed)
            again = ptdpo.answer(
                policy, task, [problems[b] for b in failed], config.group, config.temperature, key,
                [hints[b].text for b in failed],
            )  # fmt: skip
            share = (again.solved_share > 0).float().mean().item()
            shares.setdefault(label, []).append(share)
    return summarise_recover(shares, list(seeds))


RECOVER = {  # own attention against: what to expect, sign
    "no hint, sampled again": ("tutoring recovers all-failed prompts", 1),
    "random": ("ours: it is the right places that recover them", 1),
    "votes": ("ours: attention recovers more than votes", 1),
    "own attention, steps alone": ("ours: places matter", 1),
    "own attention, where alone": ("ours: steps matter", 1),
    "oracle": ("ours: the true cells as the limit", -1),
    "answer": ("ours: the spoiler as the limit", -1),
}


def summarise_recover(shares, seeds):
    """Shares recovered by hint, a list over seeds each -> summary."""
    found = {label: [{"recovered": v} for v in values] for label, values in shares.items()}
    claims = [
        Claim(text, "recovered", "own attention", other, sign)
        for other, (text, sign) in RECOVER.items()
    ]
    return {
        "name": "recover",
        "title": "share of all-failed pictures solved at least once in 8 samples",
        "seeds": seeds,
        "bars": bars(shares),
        "by_seed": shares,
        "claims": [judge_claim(c, found) for c in claims],
    }


def bars(values):
    """Label -> values, as rows with mean and 95 % half-width."""
    rows = ((label, *interval(v)) for label, v in values.items())
    return [{"label": label, "mean": mean, "half_width": half} for label, mean, half in rows]


def guess_counts(texts, counts, words):
    """Hits of a classifier that sees hints alone, and of the majority class, on the last fifth."""
    ids = {w: i for i, w in enumerate(words)}
    x = torch.zeros(len(texts), len(words))
    for row, text in zip(x, texts):
        row[[ids[w] for w in text.split()]] = 1
    y, cut = torch.tensor(counts), len(texts) * 4 // 5
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(len(words), 64), torch.nn.ReLU(), torch.nn.Linear(64, 13)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    for _ in range(6):
        for rows in torch.randperm(cut).split(128):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = (model(x[cut:]).argmax(-1) == y[cut:]).float()
    majority = (y[cut:] == y[:cut].mode().values).float()
    return right, majority


def leak(seeds, common, scenes=20_000):
    """(a) Can the count be guessed from a hint? (b) Does a tutored answer follow the picture?"""
    config = ptdpo.make_config(common)
    policy, task = ptdpo.toy(config)
    by_layer = ptdpo.calibrate(policy, task, config)
    layers, sources = (
        [by_layer.index(max(by_layer))],
        ("attention", "votes", "oracle", "random", "answer"),
    )
    texts, counts, rows, claims = {s: [] for s in sources}, [], [], []
    for first in tqdm(range(0, scenes, 50), "hints", disable=False):
        problems = [task.problem("leak", seeds[0], first + i) for i in range(50)]
        key = ("leak", first)
        rollout = ptdpo.answer(policy, task, problems, config.group, config.temperature, key)
        ptdpo.read_reference(policy, rollout, config, layers)
        counts += [int(p.answer) for p in problems]
        for source in sources:
            hints = ptdpo.build_hints(policy, task, rollout, replace(config, hint=source), key)
            texts[source] += [h.text for h in hints]
    for source in sources:
        right, majority = guess_counts(texts[source], counts, policy.words)
        gap = right - majority
        half = 1.96 * gap.std().item() / math.sqrt(len(gap))
        mean, free = gap.mean().item(), source != "answer"
        rows.append({"label": f"count guessed from hint: {source}", "mean": right.mean().item(),
                     "half_width": 1.96 * right.std().item() / math.sqrt(len(gap))})  # fmt: skip
        claims.append({
            "paper": "no leak" if free else "the spoiler leaks, on purpose", "measure": "accuracy",
            "arm": source, "other": "majority class", "difference": mean, "half_width": half,
            "arm_mean": right.mean().item(), "other_mean": majority.mean().item(),
            "seeds": len(gap), "verdict": leak_verdict(mean, half, free),
        })  # fmt: skip
    rows.append({"label": "majority class", "mean": majority.mean().item(), "half_width": 0})
    for source in ("attention", "answer"):
        rows += follow(policy, task, config, layers, source, seeds[0])
    title = "leak: (a) counts guessed from hints, (b) tutored on a swapped picture"
    return {"name": "leak", "title": title, "seeds": list(seeds), "bars": rows, "claims": claims}


def leak_verdict(mean, half, free):
    """A leak is found where the interval excludes 0; that it is not found is no proof."""
    return "no leak found" if mean <= half else "differs" if free else "agrees"


def follow(policy, task, config, layers, source, seed, scenes=512):
    """A real hint, another scene's picture: whose count is answered, where the two differ?"""
    problems = [task.problem("test", seed, i) for i in range(scenes)]
    key = ("follow", seed)
    rollout = ptdpo.answer(policy, task, problems, config.group, config.temperature, key)
    ptdpo.read_reference(policy, rollout, config, layers)
    hints = ptdpo.build_hints(policy, task, rollout, replace(config, hint=source), key)
    swapped, shown, told = [], [], []
    for p, other, hint in zip(problems, problems[1:] + problems[:1], hints):
        asked = tuple(p.question.split()[2:4])
        here = sum(other.objects.get(c) == asked for c in hint.regions)
        if str(here) != p.answer:
            swapped.append((replace(p, images=other.images), hint.text))
            shown.append(str(here))
            told.append(p.answer)
    texts = ptdpo.answer(
        policy, task, [p for p, _ in swapped], 1, 0.0, key, [t for _, t in swapped]
    ).texts
    said = [text.split()[-1:] for text in texts]
    rows = []
    for label, truth in (("in the picture shown", shown), ("of the hint's own scene", told)):
        hits = [float(s == [t]) for s, t in zip(said, truth)]
        mean = sum(hits) / len(hits)
        half = 1.96 * math.sqrt(mean * (1 - mean) / len(hits))
        rows.append({"label": f"{source}: counts {label}", "mean": mean, "half_width": half})
    return rows


MEASUREMENTS = {"recover": recover, "leak": leak}
