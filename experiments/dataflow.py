"""Draw the data flow of one training step into assets/dataflow.png.

python -m experiments.dataflow
"""

from pathlib import Path

from matplotlib.figure import Figure

GREY = "#dddddd"
BLUE = "#cfe2f3"
ORANGE = "#fce5cd"
BOXES = {  # name: (text, column, row, colour)
    "prompt": ("picture\nand question", 0, 1, GREY),
    "answers": ("1  student samples\nG answers, task grades them", 1, 1, BLUE),
    "grades": ("2  rewards become\nadvantages", 2, 2, GREY),
    "reference": ("3  frozen reference\nreads the answers", 2, 1, ORANGE),
    "hint": ("4  where it looked\nbecomes a hint", 3, 1, ORANGE),
    "teacher": ("5  frozen reference + hint\nreads the failed answers", 3, 0, ORANGE),
    "losses": ("6  policy loss + beta KL\n+ lambda JSD a token", 4, 1, BLUE),
}
ARROWS = {  # (from, to): label
    ("prompt", "answers"): "",
    ("answers", "grades"): "rewards",
    ("answers", "reference"): "",
    ("reference", "hint"): "",
    ("hint", "teacher"): "",
    ("answers", "teacher"): "failed answers",
    ("grades", "losses"): "advantages",
    ("teacher", "losses"): "its next words",
}


def draw(path):
    """Boxes on a grid, and arrows between them."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.4, 4.5), ylim=(-0.5, 2.5))
    axis.axis("off")
    places = {}
    boxes = {}
    for name, (text, column, row, colour) in BOXES.items():
        places[name] = (column, row)
        style = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "grey"}
        label = axis.text(column, row, text, ha="center", va="center", fontsize=11, bbox=style)
        boxes[name] = label.get_bbox_patch()
    for (start, end), label in ARROWS.items():
        style = {"arrowstyle": "-|>", "color": "grey", "shrinkA": 2, "shrinkB": 2}
        style |= {"patchA": boxes[start], "patchB": boxes[end]}
        axis.annotate("", places[end], places[start], arrowprops=style)
        x = (places[start][0] + places[end][0]) / 2
        y = (places[start][1] + places[end][1]) / 2
        axis.text(x, y + 0.14, label, ha="center", fontsize=9, color="#555555")
    note = "blue: learns    orange: frozen    the student never sees the hint"
    axis.text(0, -0.4, note, fontsize=9, color="#555555")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    draw(Path(__file__).resolve().parents[1] / "assets" / "dataflow.png")
