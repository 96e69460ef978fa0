"""Draw runs: their curves, a failed answer with its tutoring, and a table.

    python -m experiments.figures DIR...    draw all runs in these folders into DIR/curves.png

ptdpo.py calls `finish` when a run ends. Everything is read from the files of the runs (run.json,
metrics.jsonl, samples.jsonl), and nothing of the program is imported.
"""

import base64
import io
import json
import math
import sys
import warnings
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

# The first six of these metrics that any of the runs knows get a panel.
PANELS = """accuracy point_f1 entropy groups_all_failed jsd credit groups_mixed completion_length
    reward""".split()
COLUMNS = ("area", "accuracy", "point_f1", "right_reason", "entropy", "to GRPO")
NOTES = {
    "area": "mean accuracy over all evaluations; the columns from accuracy to entropy: last step",
    "right_reason": "solved with exactly the true targets named; the rest of accuracy is guessing",
    "to GRPO": "steps to GRPO's last accuracy, the first of two evaluations in a row that reach it",
}
STUCK = "GRPO never beat its base, so there are no steps to count"
SHOWN = 40  # tokens of an answer in the picture of tutoring
PLACES = 9  # regions of each picture of a Qwen model


def read_rows(path):
    """The rows of a JSONL file, without a last line that is torn."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def read_runs(folder):
    """The run in a folder, or the runs one level below it -> a list of folder and run.json.

    A run without the scores of its base has not begun, and is left out.
    """
    paths = sorted([*folder.glob("run.json"), *folder.glob("*/run.json")])
    runs = [(path.parent, json.loads(path.read_text())) for path in paths]
    return [(folder, run) for folder, run in runs if "base" in run]


def draw_curves(runs, path):
    """Draw the metrics of runs into one picture. Step 0 is the base."""
    curves = [[run["base"] | {"step": 0}, *read_rows(f / "metrics.jsonl")] for f, run in runs]
    known = {name for rows in curves for row in rows for name in row if row[name] is not None}
    are_named_alike = len({folder.name for folder, _ in runs}) < len(runs)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = [name for name in PANELS if name in known]
    for axis, name in zip(figure.subplots(2, 3).flat, panels):
        for i, (folder, run) in enumerate(runs):
            label = "/".join(folder.parts[-2:]) if are_named_alike else folder.name
            points = [(row["step"], row[name]) for row in curves[i] if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points), color=f"C{i}", label=label)
            if run["teacher"] and name == "accuracy":
                height = run["teacher"]["accuracy"]
                axis.axhline(height, color=f"C{i}", linestyle="--", label=f"teacher of {label}")
        axis.set(title=name, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=80)


def find_failure(rows):
    """The first failed answer that was distilled, with its row of samples.jsonl; or None."""
    for row in rows:
        for g, solved in enumerate(row["solved"]):
            if row["hint"] and row["pictures"] and not solved and any(row["jsd"][g]):
                return row, g
    return None


def draw_tutoring(folder, run, path):
    """Draw a failed answer of a run; whether there was one. A run of GRPO has none."""
    found = find_failure(read_rows(folder / "samples.jsonl"))
    if found:
        figure = Figure(figsize=(13, 4.5), layout="constrained")
        # A Qwen model may have seen several pictures. The first is drawn.
        show_answer(figure.subplots(1, 3), *found, PLACES if run["config"]["model"] else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the font lacks some signs
            figure.savefig(path, dpi=80)
    return found is not None


def show_answer(axes, row, g, places=None):
    """Answer g of a row: the picture; where its group looked, hinted regions framed; its JSD.

    places: how many values of the relevance belong to the picture, None for all of them.
    """
    left, middle, right = axes
    picture = Image.open(io.BytesIO(base64.b64decode(row["pictures"][0])))
    question = row["question"].split("\n")[0][:80]
    title = f"{question} {row['answer']}. Answered:\n{row['texts'][g][:80]}"
    left.set_title(title, fontsize=9, parse_math=False)
    middle.set_title("where the reference looked\nwhite: hinted to the teacher", fontsize=9)
    for axis in (left, middle):
        axis.imshow(picture)
        axis.axis("off")
    relevance = (row["relevance"] or [])[:places]
    side = math.isqrt(len(relevance))
    if side:
        heat = [relevance[i : i + side] for i in range(0, len(relevance), side)]
        extent = (0, picture.width, picture.height, 0)
        middle.imshow(heat, extent=extent, cmap="inferno", alpha=0.6)
        size = (picture.width / side, picture.height / side)
        for region in row["hint"]["regions"]:
            corner = (region % side * size[0], region // side * size[1])
            if region < len(relevance):
                middle.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white"))
    jsd = row["jsd"][g][:SHOWN]
    shades = [(1, 1 - min(1, max(0, value) / math.log(2)), 0.3) for value in jsd]
    right.barh(range(len(jsd)), jsd, color=shades, edgecolor="grey")
    right.set_yticks(range(len(jsd)), row["tokens"][g][:SHOWN], parse_math=False)
    right.invert_yaxis()
    right.set_title("JSD of each token,\nstudent against teacher", fontsize=9)


def steps_to(rows, goal):
    """The first step of two evaluations in a row at or above the goal; None if there is none."""
    for one, two in pairwise(rows):
        if min(one["accuracy"], two["accuracy"]) >= goal:
            return one["step"]
    return None


def table(runs):
    """Scores of runs side by side, and how to read them. Columns that no run knows are left out."""
    notes = dict(NOTES)
    goal = math.inf
    scores = {}
    for folder, run in runs:  # in the order of their names: GRPO first
        rows = read_rows(folder / "metrics.jsonl")
        rows = [row for row in rows if row["accuracy"] is not None]
        if not rows:
            continue
        last = rows[-1]["accuracy"]
        if folder.name == "grpo" and last > run["base"]["accuracy"]:
            goal = last
        elif folder.name == "grpo":
            notes["to GRPO"] = STUCK
        scores[folder.name] = {column: rows[-1].get(column) for column in COLUMNS}
        scores[folder.name]["area"] = sum(row["accuracy"] for row in rows) / len(rows)
        scores[folder.name]["to GRPO"] = steps_to(rows, goal)
    if not scores:
        return "nothing has been evaluated yet"
    columns = [c for c in COLUMNS if any(cells[c] is not None for cells in scores.values())]
    lines = [" " * 12 + "".join(f"{column:>13}" for column in columns)]
    for name, cells in scores.items():
        lines.append(f"{name:12}" + "".join(f"{show(cells[column]):>13}" for column in columns))
    known = {*columns, "to GRPO" if "grpo" in scores else ""}
    return "\n".join(lines + [f"{name}: {text}" for name, text in notes.items() if name in known])


def show(value):
    """A cell of the table: steps are whole numbers."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def finish(folders):
    """After a run: draw all runs that stand beside these, and print the table."""
    home = folders[0].parent
    runs = read_runs(home)
    if not runs:
        return
    draw_curves(runs, home / "curves.png")
    drawn = f"drawn: {home}/curves.png"
    if any([draw_tutoring(*run, home / "tutoring.png") for run in runs]):
        drawn += f", and a tutored failure: {home}/tutoring.png"
    print(table(runs))
    print(drawn)


def main(argv=None):
    """Draw the runs in some folders together -> exit code."""
    folders = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    runs = [run for folder in folders for run in read_runs(folder)]
    if not runs:
        print("experiments.figures: no run found; give folders of runs", file=sys.stderr)
        return 2
    draw_curves(runs, folders[0] / "curves.png")
    print(f"drawn: {folders[0]}/curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
