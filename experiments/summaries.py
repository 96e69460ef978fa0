"""Judge claims on finished runs, and draw what was found.

    python -m experiments.summaries DIR...    draw again from DIR/summary.json, and print the claims

Everything is read from files: nothing is trained, and nothing of the program is imported.
"""

import base64
import io
import json
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from experiments.figures import read_rows, show_attention

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
    found["base"] = run["base"]
    found["teacher"] = run["teacher"]
    found["seconds"] = sum(row["seconds"] for row in rows[1:])
    return found


def mean(values):
    """Mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def interval(values):
    """Mean and half-width of its 95 % t-interval."""
    n = len(values)
    centre = sum(values) / n
    if n == 1:
        return centre, math.inf
    variance = sum((value - centre) ** 2 for value in values) / (n - 1)
    quantile = T95[n - 2] if n <= 10 else 1.96
    return centre, quantile * math.sqrt(variance / n)


def judge_claim(claim, found):
    """The paired difference over seeds, and a verdict where its 95 % interval excludes 0.

    claim: text, measure, arm, > or <, another arm, and perhaps the difference to be reached. The
    other arm may be "teacher" or "base": what these of the same run scored. found: by arm, the
    numbers of each seed. A seed in which one of the two is unknown is left out.
    """
    text, measure, arm, sign, other = claim[:5]
    pairs = []
    for i, row in enumerate(found[arm]):
        rival = row[other] if other in ("teacher", "base") else found[other][i]
        pairs.append((row.get(measure), (rival or {}).get(measure)))
    pairs = [pair for pair in pairs if None not in pair]
    judged = {"text": text, "measure": measure, "arm": arm, "sign": sign, "other": other}
    judged |= {"seeds": len(pairs), "verdict": "no value"}
    if len(pairs) < 2:
        return judged
    difference, half = interval([a - b for a, b in pairs])
    judged |= {"difference": difference, "half_width": half, "verdict": "not resolved"}
    judged["arm_mean"] = mean([a for a, _ in pairs])
    judged["other_mean"] = mean([b for _, b in pairs])
    if abs(difference) > half:
        judged["verdict"] = "agrees" if (difference > 0) == (sign == ">") else "differs"
    if len(claim) > 5:
        judged["bar"] = claim[5]
        judged["reached"] = difference >= claim[5]
    return judged


def summarise_runs(runs, experiment):
    """Runs by arm, a list over seeds -> scores, claims and curves."""
    found = {arm: [score(*run) for run in runs[arm]] for arm in runs}
    rows = {arm: [rows for _, rows in runs[arm]] for arm in runs}
    curves = {}
    for panel in experiment["panels"].split():
        curves[panel] = {arm: make_curve(rows[arm], panel) for arm in runs}
    seconds = [row["seconds"] for arm in runs for row in found[arm]]
    claims = [judge_claim(claim, found) for claim in experiment["claims"]]
    return {
        "commits_of_runs": sorted({run["commit"] for arm in runs for run, _ in runs[arm]}),
        "minutes_of_runs": sum(seconds) / 60,
        "settings": {arm: runs[arm][0][0]["config"] for arm in runs},
        "by_seed": found,
        "claims": claims,
        "curves": curves,
    }


def summarise_values(found, experiment):
    """Values by label, a list over seeds -> means with intervals, and claims."""
    bars = {}
    for panel in experiment["panels"].split():
        columns = {label: [row.get(panel) for row in rows] for label, rows in found.items()}
        known = {label: column for label, column in columns.items() if None not in column}
        bars[panel] = {label: interval(column) for label, column in known.items()}
    claims = [judge_claim(claim, found) for claim in experiment["claims"]]
    return {"by_seed": found, "claims": claims, "bars": bars}


def make_curve(runs, name):
    """(step, mean, half-width) of a metric at each step at which all runs know it."""
    points = []
    for rows in zip(*runs):
        values = [row.get(name) for row in rows]
        if None not in values:
            points.append((rows[0]["step"], *interval(values)))
    return points


# --------------------------------------------------------------------------------------- pictures
def draw_summary(folder):
    """Draw DIR/figure.png, and hero.png where there is an example, from DIR/summary.json."""
    summary = json.loads((folder / "summary.json").read_text())
    panels = summary.get("curves") or summary.get("bars")
    draw = draw_bands if summary.get("curves") else draw_bars
    if not panels:
        known = [c for c in summary["claims"] if c["verdict"] != "no value"]
        gains = {c["text"]: (c["difference"], c["half_width"]) for c in known}
        panels = {"difference": gains}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, arms) in zip(axes, panels.items()):
        axis.set_title(name)
        draw(axis, arms)
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
    places = range(len(arms))
    axis.barh(places, [m for m, _ in arms.values()], xerr=[h for _, h in arms.values()])
    axis.set_yticks(places, arms, fontsize=7)
    axis.invert_yaxis()


def draw_hero(summary, path):
    """README's picture: a failed answer, where it looked, its JSD, and the curves."""
    row, answer = summary["example"]
    jsd = row["jsd"][answer]
    picture = Image.open(io.BytesIO(base64.b64decode(row["pictures"][0])))
    figure = Figure(figsize=(14, 4), layout="constrained")
    first, second, third, fourth = figure.subplots(1, 4, width_ratios=(1, 1, 0.8, 1.9))
    first.imshow(picture)
    title = f"{row['question']} {row['answer']}\nfailed: {row['texts'][answer]}"
    first.set_title(title, fontsize=9)
    first.axis("off")
    show_attention(second, picture, row["relevance"], row["hint"]["regions"])
    third.barh(range(len(jsd)), jsd, color="C1")
    third.set_yticks(range(len(jsd)), row["tokens"][answer], fontsize=8)
    third.invert_yaxis()
    third.set_title("JSD of each token\nto the tutored teacher", fontsize=9)
    curves = summary["curves"]["accuracy"]
    draw_bands(fourth, {label: curves[arm] for arm, label in HERO.items()})
    teacher = mean([seed["teacher"]["accuracy"] for seed in summary["by_seed"]["ptdpo"]])
    fourth.axhline(teacher, color="black", linestyle="--", label="tutored teacher")
    fourth.set(title="held-out accuracy, 95 % interval", ylim=(0, 1))
    fourth.legend(fontsize=8)
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


def main(argv=None):
    """Entry point -> exit code."""
    for folder in map(Path, sys.argv[1:] if argv is None else argv):
        if not (folder / "summary.json").exists():
            print(f"{folder}: no summary.json in it; make one by reproduce", file=sys.stderr)
            return 2
        draw_summary(folder)
        print(list_claims(json.loads((folder / "summary.json").read_text())["claims"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
