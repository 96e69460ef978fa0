"""Judge claims on finished runs, and draw what was found.

Everything is read from files: nothing is trained, and nothing of the program is imported.
"""

import json
import math
from statistics import fmean, stdev

from matplotlib.figure import Figure

from experiments.figures import read_rows, show_answer

LAST = """accuracy point_f1 right_reason entropy answer_entropy pass_1 pass_8 ways completion_length
    groups_all_failed groups_mixed groups_all_solved""".split()
MEANS = ("hint_recall", "credit")  # over all steps: a late step has few failed answers
# 97.5 % quantile of the t-distribution with 1 to 9 degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
HERO = {"ptdpo": "PTD-PO", "distil_only": "distillation alone", "grpo": "GRPO"}


# ---------------------------------------------------------------------------------------- numbers
def read_run(folder):
    """run.json of a run, and its metrics; the row of step 0 is the base."""
    run = json.loads((folder / "run.json").read_text())
    rows = [{"step": 0, **run["base"]}, *read_rows(folder / "metrics.jsonl")]
    return run, rows


def score(run, rows):
    """Numbers of one finished run: its last metrics, the area under its curve, base and teacher."""
    found = {name: rows[-1].get(name) for name in LAST}
    for name in MEANS:
        found[name] = mean([row.get(name) for row in rows[1:]])
    found["area"] = mean([row.get("accuracy") for row in rows[1:]])
    found["seconds"] = sum(row["seconds"] for row in rows[1:])
    return found | {"base": run["base"], "teacher": run["teacher"]}


def mean(values):
    """Mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def interval(values):
    """Mean and half-width of its 95 % t-interval, of at most ten values."""
    n = len(values)
    if n == 1:
        return values[0], math.inf
    return fmean(values), T95[n - 2] * stdev(values) / math.sqrt(n)


def judge_claim(claim, found):
    """The paired difference over seeds, and a verdict where its 95 % interval excludes 0.

    claim: text, measure, arm, > or <, another arm, and perhaps the difference to be reached. The
    other arm may be "teacher" or "base": what these of the same run scored. found: by arm, the
    numbers of each seed. A seed in which one of the two is unknown is left out.
    """
    text, measure, arm, sign, other, *bar = claim
    ours = []
    theirs = []
    for i, row in enumerate(found[arm]):
        rival = row[other] if other in ("teacher", "base") else found[other][i]
        if rival and None not in (row.get(measure), rival.get(measure)):
            ours.append(row[measure])
            theirs.append(rival[measure])
    judged = {"text": text, "measure": measure, "arm": arm, "sign": sign, "other": other}
    judged |= {"seeds": len(ours), "verdict": "no value"}
    if len(ours) < 2:
        return judged
    difference, half = interval([a - b for a, b in zip(ours, theirs)])
    judged |= {"difference": difference, "half_width": half, "verdict": "not resolved"}
    judged |= {"arm_mean": fmean(ours), "other_mean": fmean(theirs)}
    if abs(difference) > half:
        judged["verdict"] = "agrees" if (difference > 0) == (sign == ">") else "differs"
    if bar:
        judged |= {"bar": bar[0], "reached": difference >= bar[0]}
    return judged


def summarise(found, experiment):
    """What was found, by arm a list over seeds, with the verdict on each claim."""
    claims = [judge_claim(claim, found) for claim in experiment["claims"]]
    return {"by_seed": found, "claims": claims}


def summarise_runs(runs, experiment):
    """Runs by arm, a list over seeds -> scores, claims and curves."""
    found = {arm: [score(*run) for run in runs[arm]] for arm in runs}
    curves = {}
    for panel in experiment["panels"].split():
        curves[panel] = {arm: make_curve(runs[arm], panel) for arm in runs}
    every = [run for arm in runs for run, _ in runs[arm]]
    summary = {
        "commits_of_runs": sorted({run["commit"] for run in every}),
        "minutes_of_runs": sum(row["seconds"] for arm in found for row in found[arm]) / 60,
        "settings": {arm: runs[arm][0][0]["config"] for arm in runs},
    }
    return summary | summarise(found, experiment) | {"curves": curves}


def make_curve(runs, name):
    """(step, mean, half-width) of a metric at each step at which all runs know it."""
    points = []
    for rows in zip(*(rows for _, rows in runs)):
        values = [row.get(name) for row in rows]
        if None not in values:
            points.append((rows[0]["step"], *interval(values)))
    return points


def summarise_values(found, experiment):
    """Values by label, a list over seeds -> claims, and means with intervals."""
    bars = {}
    for panel in experiment["panels"].split():
        columns = {label: [row.get(panel) for row in rows] for label, rows in found.items()}
        known = {label: column for label, column in columns.items() if None not in column}
        bars[panel] = {label: interval(column) for label, column in known.items()}
    return summarise(found, experiment) | {"bars": bars}


# --------------------------------------------------------------------------------------- pictures
def draw_summary(folder):
    """Draw DIR/figure.png, and hero.png where there is an example, from DIR/summary.json."""
    summary = json.loads((folder / "summary.json").read_text())
    panels = summary.get("curves") or summary.get("bars")
    if not panels:
        known = [c for c in summary["claims"] if c["verdict"] != "no value"]
        panels = {"difference": {c["text"]: (c["difference"], c["half_width"]) for c in known}}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (name, arms) in zip(axes, panels.items()):
        axis.set_title(name)
        if summary.get("curves"):
            draw_bands(axis, arms)
        else:
            draw_bars(axis, arms)
    seeds = len(summary["seeds"])
    figure.suptitle(f"{summary['name']}: mean and 95 % interval over {seeds} seeds")
    figure.savefig(folder / "figure.png", dpi=80)
    if summary.get("example"):
        draw_hero(summary, folder / "hero.png")


def draw_bands(axis, arms):
    """Curves of (step, mean, half-width), each in a band of its interval."""
    for i, (arm, points) in enumerate(arms.items()):  # an arm has one colour in all panels
        if points:
            step, middle, half = zip(*points)
            low = [m - h for m, h in zip(middle, half)]
            high = [m + h for m, h in zip(middle, half)]
            axis.plot(step, middle, color=f"C{i}", label=arm)
            axis.fill_between(step, low, high, color=f"C{i}", alpha=0.15)
    axis.set_xlabel("step")
    axis.legend(fontsize=7)


def draw_bars(axis, arms):
    """One bar an arm, with its interval; arms: (mean, half-width) by name."""
    middle = [m for m, _ in arms.values()]
    half = [h for _, h in arms.values()]
    axis.barh(range(len(arms)), middle, xerr=half)
    axis.set_yticks(range(len(arms)), arms, fontsize=7)
    axis.invert_yaxis()


def draw_hero(summary, path):
    """README's picture: a failed answer, where it looked, its JSD, and the curves."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    *answer, last = figure.subplots(1, 4, width_ratios=(1, 1, 0.8, 1.9))
    show_answer(answer, *summary["example"])
    curves = summary["curves"]["accuracy"]
    draw_bands(last, {label: curves[arm] for arm, label in HERO.items()})
    teacher = mean([seed["teacher"]["accuracy"] for seed in summary["by_seed"]["ptdpo"]])
    last.axhline(teacher, color="black", linestyle="--", label="tutored teacher")
    last.set(title="held-out accuracy, 95 % interval", ylim=(0, 1))
    last.legend(fontsize=8)
    figure.savefig(path, dpi=80)


# ------------------------------------------------------------------------------------------ texts
def list_claims(claims):
    """Claims as a table in Markdown."""
    lines = ["| claim | measured | arms | difference | verdict |", "|---|---|---|---|---|"]
    for c in claims:
        arms = f"{c['arm']}, {c['other']}"
        difference = "-"
        verdict = c["verdict"]
        if verdict != "no value":
            arms = f"{c['arm']} {c['arm_mean']:.3f}, {c['other']} {c['other_mean']:.3f}"
            difference = f"{c['difference']:+.3f} ± {c['half_width']:.3f}"
        if "bar" in c:
            verdict += f"; {c['bar']:+.2f} {'reached' if c['reached'] else 'missed'}"
        lines.append(f"| {c['text']} | {c['measure']} | {arms} | {difference} | {verdict} |")
    return "\n".join(lines)
