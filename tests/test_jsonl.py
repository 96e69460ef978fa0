"""Problems from files, rewards of free text, the zero-spoiler filter, counting in words."""

import io
import json
from functools import lru_cache

import pytest
import torch
from PIL import Image

from ptdpo import Config, UserError, judge
from toy_tasks import Problem
from toy_tasks.counting import Counting
from toy_tasks.jsonl import (
    ASK,
    PLACES,
    FreeText,
    JsonlTask,
    extract,
    matches,
    open_picture,
    place,
    spoils,
    text_task,
)


def noise_picture(width, height, seed):
    """An RGB picture of noise."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# ---------------------------------------------------------------- data


@pytest.fixture
def data(tmp_path):
    noise_picture(60, 40, 1).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    noise_picture(30, 90, 2).save(tmp_path / "sub" / "b.jpg")
    return tmp_path


def write(folder, *lines, name="train.jsonl"):
    text = [
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    (folder / name).write_bytes(b"\n".join(text) + b"\n")
    return folder / name


def row(**changes):
    return {"images": ["a.png"], "problem": "How many?", "answer": "3"} | changes


def test_good_lines(data):
    lines = [
        row(),
        "",
        row(images="sub/b.jpg", answer=4),
        row(images=["a.png", "sub/b.jpg"], answer=r"$\boxed{1/2}$", hint="Compare them."),
        b"\xef\xbb\xbf"
        + json.dumps(
            row(problem="<image>Où? \u2028 x", answer=" five "), ensure_ascii=False
        ).encode(),
    ]
    task = JsonlTask(
        write(data, *lines), write(data, row(), row(answer="9"), name="e.jsonl"), max_tokens=77
    )
    held_out = [task.problem("validation", 5, i).answer for i in range(4)]
    assert held_out == ["3", "9", "3", "9"] and task.max_tokens == 77
    epoch = [task.problem("train", 0, i) for i in range(4)]
    assert sorted(p.answer for p in epoch) == ["1/2", "3", "4", "five"]
    two = next(p for p in epoch if len(p.images) == 2)
    assert (
        two.steps == "Compare them."
        and two.images[1].size == (30, 90)
        and two.images[0].mode == "RGB"
    )
    assert next(p for p in epoch if p.answer == "five").question.startswith(
        "Où? \u2028 x\nThink step by step"
    )
    assert not any(
        spoils(p.steps, a) for p in epoch for a in ("1", "A", "0", "2", "one", "B", "circle")
    )


def test_columns_by_name(data):
    line = {"picture": "a.png", "question": "How many?", "label": 2}
    task = JsonlTask(
        *[write(data, line)] * 2,
        columns={"images": "picture", "problem": "question", "answer": "label"},
    )
    assert task.problem("test", 0, 0).answer == "2"


def test_order_of_an_epoch_depends_on_seed_and_epoch_alone(data):
    task = JsonlTask(*[write(data, *[row(answer=i) for i in range(20)])] * 2)
    order = lambda seed, start: [task.problem("train", seed, start + i).answer for i in range(20)]
    first, second, other = order(0, 0), order(0, 20), order(1, 0)
    assert set(first) == set(second) == {str(i) for i in range(20)}
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    assert order(0, 0) == first and task.problem("train", 0, 27).answer == second[7]


@lru_cache
def bomb():
    out = io.BytesIO()
    Image.new("1", (10000, 9100)).save(out, "PNG")
    return out.getvalue()


def bad_pictures(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    good = (folder / "a.png").read_bytes()
    (folder / "half.png").write_bytes(good[: len(good) // 2])
    Image.new("RGB", (1000, 2)).save(folder / "thin.png")
    (folder / "bomb.png").write_bytes(bomb())
    (folder.parent / "secret.png").write_bytes(good)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")


BAD = [  # line, what the message must say
    ("{broken", "Expecting property name"),
    ("[1, 2]", "not an object"),
    ("3", "not an object"),
    (b'{"problem": "\xff"}', "utf-8"),
    ('{"images": "a.png"}', "no 'problem' among images"),
    (
        {"images": ["a.png"], "question": "?", "answer": "1"},
        "no 'problem' among images, question, answer",
    ),
    (row(answer=""), "answer is empty"),
    (row(answer="  "), "answer is empty"),
    (row(answer=None), "answer is empty"),
    (row(answer=["1"]), "answer is neither"),
    (row(problem=""), "problem is empty"),
    (row(problem="<image>"), "problem is empty"),
    (row(images=[]), "no path"),
    (row(images=None), "no path"),
    (row(images=[3]), "no path"),
    (row(images={"bytes": ""}), "no path"),
    (row(images="missing.png"), "missing.png"),
    (row(images="sub"), "sub"),
    (row(images="empty.png"), "the file is empty"),
    (row(images="text.png"), "cannot identify"),
    (row(images="half.png"), "half.png"),
    (row(images="thin.png"), "200 times"),
    (row(images="bomb.png"), "decompression bomb"),
    (row(images="../secret.png"), "outside"),
    (row(images="link.png"), "outside"),
    (row(images="/etc/hostname"), "outside"),
    (row(images="a\0.png"), "null"),
    (row(hint=[1]), "hint is neither"),
    ("[" * 100000, "recursion"),
]


@pytest.mark.parametrize("line, message", BAD, ids=[message for _, message in BAD])
def test_bad_lines(data, line, message):
    bad_pictures(data)
    path = write(data, row(), line)
    for pair in (
        (path, write(data, row(), name="ok.jsonl")),
        (write(data, row(), name="ok.jsonl"), path),
    ):
        with pytest.raises(UserError) as error:
            JsonlTask(*pair)
        said = str(error.value)
        assert said.startswith(f"{path}:2: ") and message in said and "\n" not in said


def test_bad_files(data):
    good = write(data, row(), name="ok.jsonl")
    for pair in (
        (data / "none.jsonl", good),
        (good, data / "none.jsonl"),
        (good, data),
        (good, write(data, "", name="e.jsonl")),
    ):
        with pytest.raises(UserError, match=r"no such file|file is empty"):
            JsonlTask(*pair)


def test_outside_only_if_allowed(data):
    bad_pictures(data)
    task = JsonlTask(
        *[write(data, row(images=["../secret.png", "link.png"]))] * 2, allow_outside=True
    )
    assert len(task.problem("train", 0, 0).images) == 2


def test_a_picture_that_breaks_late(data):
    picture = noise_picture(300, 300, 3)
    picture.save(data / "late.jpg")
    (data / "late.jpg").write_bytes((data / "late.jpg").read_bytes()[:9000])  # the header is whole
    path = write(data, row(images="late.jpg"))
    task = JsonlTask(path, path)
    with pytest.raises(UserError, match=r"train.jsonl:1: picture late.jpg: .*truncated"):
        task.problem("train", 0, 0)


def test_kinds_of_pictures(tmp_path):
    turned = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "exif.jpg", exif=exif)
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("P", (20, 20)).save(tmp_path / "palette.gif")
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("LA", (20, 20), (0, 255)).save(tmp_path / "grey.png")
    opened = {p.stem: open_picture(p) for p in tmp_path.iterdir()}
    assert {p.mode for p in opened.values()} == {"RGB"} and opened["exif"].size == (20, 40)
    assert opened["clear"].getpixel((5, 5)) == (
        255,
        255,
        255,
    )  # black lines on nothing stay visible
    assert opened["cmyk"].getpixel((5, 5))[0] > 200 > 60 > opened["cmyk"].getpixel((5, 5))[1]
    assert opened["grey"].getpixel((5, 5)) == (0, 0, 0)


def test_grades(data):
    path = write(data, row(answer="12"))
    task = JsonlTask(path, path)
    problem = task.problem("train", 0, 0)
    verdicts = {
        r"so \boxed{12}": (1.0, True),
        r"\boxed{13}": (0.1, False),
        "12": (0.0, False),
        "Answer: 12.": (1.0, True),
        r"\boxed{3} no, \boxed{12}": (1.0, True),
        r"\boxed{12} no, \boxed{3}": (0.1, False),
        r"\boxed{12": (0.0, False),
        "": (0.0, False),
        "The answer is: **12**": (1.0, True),
        r"\boxed{}": (0.1, False),
        r"\boxed{" + "9" * 5000 + "}": (0.1, False),
    }
    for text, (reward, solved) in verdicts.items():
        grade = task.grade(problem, text, True)
        assert (round(grade.reward, 9), grade.solved) == (reward, solved), text[:50]
    cut = task.grade(problem, r"\boxed{12}", False)
    assert (cut.reward, cut.solved) == (0.0, False)


def test_extraction():
    assert extract(r"\boxed{\frac{\sqrt{2}}{2}} is it") == r"\frac{\sqrt{2}}{2}"
    assert extract("answer: 3\nANSWER: B\n") == "B" and extract("I answer nothing") is None
    assert extract(r"Answer: \boxed{4}") == "4" and extract("\\boxed{" * 4000) is None


@pytest.mark.parametrize(
    "found, answer, right",
    [
        ("12", "12", 1),
        ("12.0", "12", 1),
        ("12.01", "12", 0),
        ("1,200", "1200", 1),
        ("1200", "1,200", 1),
        ("12346", "12345", 0),
        (r"\frac{3}{4}", "0.75", 1),
        ("3/4", r"\frac{3}{4}", 1),
        ("-5", "5", 0),
        ("-5", "−5", 1),
        ("3.14159", "3.14", 1),
        ("3.2", "3.14", 0),
        ("0.333", "1/3", 1),
        ("500", "5%", 0),
        ("0.05", "5%", 1),
        ("50%", "0.5", 1),
        ("50", "50%", 1),
        ("50%", "5", 0),
        ("12 cm", "12", 1),
        ("12cm", "12 cm", 1),
        ("12 m", "12 cm", 0),
        ("12\\text{ cm}", "12 cm", 1),
        ("30^\\circ", "30°", 1),
        ("x = 7", "7", 1),
        ("$7$", "7", 1),
        ("3x", "3", 0),
        ("B", "B", 1),
        ("(b)", "B", 1),
        ("B. 12 cm", "B", 1),
        ("B) red", "(B)", 1),
        ("option B", "B", 1),
        ("C", "B", 0),
        ("Both", "B", 0),
        ("A cat", "A", 0),
        ("isosceles  Triangle", "Isosceles triangle.", 1),
        ("the square", "square", 1),
        ("2\\sqrt{3}", "2 \\sqrt{3}", 1),
        ("2", "2\\sqrt{3}", 0),
        ("(3, 4)", "(3,4)", 1),
        ("3/0", "3", 0),
        ("", "3", 0),
        (".", "3", 0),
        ("1e9", "1", 0),
        ("12 34", "1234", 0),
        ("\\(12\\)", "12", 1),
        ("no", "yes", 0),
        ("½", "0.5", 1),
        ("2\\frac{1}{2}", "2.5", 1),
        ("2½ cm", "5/2", 1),
        ("-1 1/4", "-1.25", 1),
        ("2 1/2", "10.5", 0),
        ("3 4/3", "13/3", 0),
        ("1,200 1/2", "700.5", 0),
        ("2.5 1/2", "1.055", 0),
    ],
)
def test_matches(found, answer, right):
    assert bool(matches(found, answer)) == bool(right)


def test_own_reward(data, monkeypatch):
    (data / "own_reward.py").write_text(
        "def half(problem, text): return 0.25\n"
        "def pair(problem, text): return 2, text == problem.answer\n"
        "def bad(problem, text): return float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(data))
    path = write(data, row())
    grade = lambda name, text: JsonlTask(path, path, reward=name).grade(
        Problem([], "", "3"), text, True
    )
    assert grade("own_reward:half", "3").reward == 0.25 and not grade("own_reward:half", "3").solved
    assert grade("own_reward:pair", "3").solved and grade("own_reward:pair", "4").reward == 2.0
    with pytest.raises(UserError, match="finite"):
        grade("own_reward:bad", "3")
    for name in ("nothing", "no_such_module:f", "own_reward:none", "a:b:c"):
        with pytest.raises(UserError, match="module:function"):
            JsonlTask(path, path, reward=name)


def test_hint_text(data):
    task = JsonlTask(*[write(data, row())] * 2)
    assert (
        task.hint_text(["upper left", "centre"], "Count.")
        == "Look closely at: upper left; centre. Ignore the rest. Count."
    )
    assert task.hint_text([], "Count.") == "Count." and task.hint_text([], "") == ""
    assert task.hint_text(["centre"], "") == "Look closely at: centre. Ignore the rest."
    assert spoils(task.hint_text([], "", "7"), "7")


# ---------------------------------------------------------------- zero-spoiler filter

LEAKS = [
    ("It is 12.", "12"),
    ("It is 12.0 long.", "12"),
    ("You get 12", "12.00"),
    ("about 1,200 people", "1200"),
    ("1200 people", "1,200"),
    ("1 200 people", "1200"),
    ("1.200,5 euros", "1200.5"),
    ("a twelve-sided shape", "12"),
    ("look at the twelfth mark", "12"),
    ("the 12th mark", "12"),
    ("twenty-one dots", "21"),
    ("Twenty one dots", "21"),
    ("ninety ninth", "99"),
    ("one hundred dots", "100"),
    ("a dozen eggs", "12"),
    ("two dozen eggs", "24"),
    ("half of it", "0.5"),
    ("three quarters", "0.75"),
    ("two thirds of it", "2/3"),
    ("a pair of them", "2"),
    (r"\frac{3}{4} of it", "0.75"),
    ("3/4 of it", r"\frac{3}{4}"),
    (r"it is \frac34", "0.75"),
    ("½ of it", "0.5"),
    ("1½ cups", "1.5"),
    ("75% of it", "0.75"),
    ("75 percent", "75%"),
    ("0.5", "50%"),
    ("12cm long", "12 cm"),
    ("12 cm", "12cm"),
    ("１２ of them", "12"),
    ("1\u200b2 of them", "12"),
    ("a side of −5", "5"),
    ("sides 3,4", "4"),
    ("option B fits", "B"),
    ("pick (b)", "B"),
    ("B. is right", "(B)"),
    ("It must be B", "b"),
    ("choose A", "A"),
    ("option a", "A"),
    ("(A)", "A"),
    ("A is right", "A"),
    ("A: look", "A"),
    ("The answer is clear.", "9"),
    ("Answer: see below", "9"),
    ("the correct option is near", "9"),
    (r"\boxed{x}", "9"),
    ("3 + 4 = 7", "9"),
    ("the sum equals seven", "9"),
    ("that gives 14", "9"),
    ("they add up to 5", "9"),
    ("a total of 6", "9"),
    ("x=-3", "9"),
    (r"h = \frac{1}{2}", "9"),
    ("h ≈ 2.5", "9"),
    ("an Isosceles  triangle", "isosceles triangle"),
    ("red squares", "the red square"),
    ("count the cats", "cat"),
    ("Say YES", "yes"),
    ("side 2√3", r"2\sqrt{3}"),
    ("use y = m x + b", "y=mx+b"),
    ("a ratio of 3 : 4", "3:4"),
    ("five dots", "five"),
    ("5 dots", "five"),
    ("$ 12 $", "12"),
    ("**12**", "12"),
    ("first, look left", "1"),
    ("the single dot", "1"),
    ("none of them", "0"),
    ("upper-left corner", "upper left"),
    ("the cafe\u0301", "café"),
    ("the value 1.2e3", "1200"),
]
HARMLESS = [
    ("", "12"),
    ("Compare the two bars.", "12"),
    ("Use the scale of 1:50.", "12"),
    ("Each tick stands for 5 units.", "12"),
    ("The radius is 3 cm.", "12"),
    ("Look at a triangle.", "A"),
    ("A triangle has sides.", "A"),
    ("Look at the top. A line leads there.", "A"),
    ("Read the label 112.", "12"),
    ("Read the label 12.5.", "12"),
    ("It shows 120 items.", "12"),
    ("Twenty of them are small.", "2"),
    ("Sixty dots.", "6"),
    ("Add the lengths of the sides.", "12"),
    ("Find x by Pythagoras: a² + b².", "5"),
    ("Ignore the shaded part.", "12"),
    ("3.14 is used for pi.", "3"),
    ("Multiply 3 by 4.", "12"),
    ("Is it greater than 10 %?", "0.5"),
    ("The category of the shape matters.", "cat"),
    ("Look for reddish shapes.", "red"),
    ("Notice the legend.", "no"),
    ("The eyes of the man.", "yes"),
    ("Check both axes of the graph.", "7"),
    ("Do not count the crosses.", "circle"),
    ("Eliminate options that do not fit.", "B"),
    ("Both lines are parallel.", "B"),
    ("Use the formula y = mx + c.", "12"),
    ("Count row by row.", "10"),
    ("The answer depends on the height.", "12"),
    (
        "Name what is asked for, read it off the picture part by part, and check each part again.",
        "4",
    ),
    ("Start with the tallest bar, then move right.", "25"),
    ("Every third tick has a label.", "12"),
    ("I would look left.", "I"),
    ("Read 45 off the y axis and 20 off the x axis.", "25"),
    ("Half of the disc is shaded.", "12"),
    ("Use 1/2 of the base.", "12"),
    ("Is the angle at the corner acute?", "obtuse"),
    ("Compare picture 2 with picture 3.", "12"),
    ("Mind the unit: m² and not cm.", "9"),
]


@pytest.mark.parametrize("text, answer", LEAKS)
def test_filter_rejects(text, answer):
    assert spoils(text, answer)


@pytest.mark.parametrize("text, answer", HARMLESS)
def test_filter_accepts(text, answer):
    assert not spoils(text, answer)


def test_filter_knows_every_number_word():
    ones = "zero one two three four five six seven eight nine ten".split()
    for value, word in enumerate(ones):
        assert spoils(f"It shows {word} dots.", str(value))
        assert not spoils(f"It shows {word} dots.", str(value + 200))
    for text, value in (
        ("forty second", 42),
        ("eighty-eighth", 88),
        ("thirteenth", 13),
        ("fiftieth", 50),
        ("hundredth", 100),
        ("ninety", 90),
    ):
        assert spoils(f"the {text} mark", str(value)) and not spoils(
            f"the {text} mark", str(value + 7)
        )


def test_filter_bears_anything():
    for text in (
        "9" * 10000,
        "1/" * 5000,
        "\\frac" * 3000,
        "{" * 3000,
        "," * 5000,
        "1e99 1e-99",
        "½" * 3000,
        "\0",
    ):
        (
            spoils(text, "12"),
            spoils("twelve", text),
            matches(text, "12"),
            matches("12", text),
            extract(text),
        )


# ------------------------------------------------------------------------------ counting in words
def test_scenes_are_those_of_the_toy_drawn_large():
    """Same answer; targets are the places of the matches, found here by cell and by pixel."""
    toy, task = Counting(), FreeText(max_tokens=9)
    assert task.max_tokens == 9 and task.held_out > 1e9
    for i in range(20):
        small, large = toy.problem("test", 3, i), task.problem("test", 3, i)
        _, _, colour, shape, _ = small.question.split()
        assert large.question == f"How many {colour} {shape} are in the picture?\n{ASK}"
        assert large.answer == small.answer and large.images[0].size == (335, 335)
        assert not spoils(large.steps, large.answer)
        third = lambda v: min(2, int((v + 0.5) / 5 * 3))
        near = {(third(c // 5), third(c % 5)) for c in small.targets}
        assert len(near) <= len(large.targets) + 2  # a jittered object may lie in the next place
        for t in large.targets:
            assert coloured_share(large.images[0], t) > 0


def coloured_share(picture, at):
    """How much of a place is far from the grey of the ground."""
    box = [round(335 / 3 * v) for v in (at % 3, at // 3, at % 3 + 1, at // 3 + 1)]
    pixels = torch.frombuffer(bytearray(picture.crop(box).tobytes()), dtype=torch.uint8)
    pixels = pixels.view(-1, 3).float()
    return ((pixels.amax(1) - pixels.amin(1)) > 100).float().mean()


@pytest.mark.parametrize("box, name", [
    ((0, 0, 20, 20), "upper left"), ((140, 10, 190, 60), "upper centre"),
    ((280, 0, 330, 50), "upper right"), ((0, 150, 60, 200), "centre left"),
    ((100, 100, 230, 240), "centre"), ((240, 280, 300, 334), "lower right"),
    ((100, 240, 125, 300), "lower centre"),
])  # fmt: skip
def test_place_of_a_box(box, name):
    """The place that holds the box's centre, of 336 pixels by hand."""
    assert PLACES[place(box, 336)] == name


def test_calibration_of_files_is_on_scenes(data):
    """Only there it is known where to look."""
    path = write(data, row())
    task = JsonlTask(path, path)
    assert task.problem("train", 0, 0).targets is None and task.held_out == 1
    scene = FreeText().problem("calibration", 0, 1)
    assert task.problem("calibration", 0, 1).targets == scene.targets


def test_task_of_a_config(data):
    """Every field of the config reaches the task."""
    line = {"images": "a.png", "question": "How many?", "answer": 2}
    path = str(write(data, line))
    config = Config(data=path, eval_data=path, columns="problem=question", max_tokens=7)
    task = text_task(config)
    assert (task.max_tokens, task.problem("test", 0, 0).answer, task.reward) == (7, "2", None)
    calm = text_task(Config(difficulty=0.0, reward="json:dumps"))
    assert calm.reward is json.dumps and calm.scenes.noise == 0 and type(calm) is FreeText


def test_pointing_is_not_measured_in_free_text():
    """Grades say that answers name no regions, so that scores of pointing are null."""
    task = FreeText()
    problem = task.problem("test", 0, 0)
    grades = [task.grade(problem, f"\\boxed{{{problem.answer}}}", end) for end in (True, False)]
    assert [g.solved for g in grades] == [True, False]
    scores = judge([problem, problem], grades)
    assert scores == {"accuracy": 0.5, "point_f1": None, "right_reason": None}
