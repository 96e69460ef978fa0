"""Free text: grading, the spoiler rule, pictures, problems from files, counting in words.

The tables of cases are in grading_cases.json.
"""

import io
import json
import re
import signal
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from helpers import save_pictures
from PIL import Image

import ptdpo
from toy_tasks import Problem, UserError, free_text
from toy_tasks.counting import Counting
from toy_tasks.free_text import ASK, STEPS, FreeText, JsonlTask, extract, matches, open_picture

ROOT = Path(__file__).resolve().parents[1]
CASES = json.loads((ROOT / "tests" / "grading_cases.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------- grading
@pytest.mark.parametrize("kind", CASES["matches"])
def test_matches(kind):
    """A row is an answer, a gold answer, and whether the answer is right."""
    pytest.importorskip("math_verify")
    for answer, gold, right in CASES["matches"][kind]:
        assert matches(answer, gold) is right, (answer, gold)


def test_blind_cases():
    """Cases by someone who had not seen the grader. All 40 were right at the first run."""
    pytest.importorskip("math_verify")
    for case in json.loads((ROOT / "tests" / "blind_cases.json").read_text(encoding="utf-8")):
        assert matches(case["answer"], case["gold"]) is case["right"], case


def test_known_to_be_graded_wrongly():
    """What docs/data.md lists; a row that comes right is to go."""
    pytest.importorskip("math_verify")
    for answer, gold, right in CASES["known to be graded wrongly"]:
        assert matches(answer, gold) is not right, (answer, gold)


@pytest.mark.parametrize("length", [60, 399, 10000])
def test_hostile_answers(length):
    """They cost little, are wrong, and leave no alarm behind."""
    before = signal.getsignal(signal.SIGALRM)
    for start in r"9 ^9 } ( \sqrt{ \boxed{ \frac \ ! x^9+ 1/ {".split():
        answer = (start * length)[: length - 1] + "5"
        assert not matches(answer, "5") and not matches(answer, "\\sqrt{2}x"), start
        assert extract("\\boxed{" + answer) in (None, ""), start
    assert signal.getsignal(signal.SIGALRM) is before and signal.alarm(0) == 0


def test_any_thread():
    """math-verify's own clock works in the main thread alone; elsewhere it is not set."""
    pytest.importorskip("math_verify")
    verdicts = []
    work = lambda: verdicts.extend([matches("\\sqrt{12}", "2\\sqrt{3}"), matches("x+1", "x+2")])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert verdicts == [True, False]


def test_extract():
    for text, found in CASES["extract"]:
        assert extract(text) == found, text
    assert extract("\\boxed{" * 4000) is None and extract("answer " * 4000) is None


def test_grades():
    """0.1 for an answer that is found, 0.9 if it is right; nothing for one that was cut off."""
    task = FreeText()
    problem = Problem([], "?", "12")
    for text, reward in CASES["grades, gold 12"]:
        grade = task.grade(problem, text, True)
        assert (grade.reward, grade.solved, grade.points) == (reward, reward == 1, None), text
    assert task.grade(problem, r"\boxed{12}", False) == task.grade(problem, "", True)


def test_counting_needs_no_library(monkeypatch):
    """Numbers are compared without math-verify; an expression is then wrong."""
    monkeypatch.setattr(free_text, "find_spec", lambda name: None)
    assert matches("5", "5.0") and not matches("4", "5") and not matches(r"\sqrt{36}", "6")
    with pytest.raises(UserError, match="pip install math-verify"):
        JsonlTask("none", "none")


OWN = """
def half(problem, text): return 0.25
def pair(problem, text): return 2, text == problem.answer
def truth(problem, text): return True
def nan(problem, text): return float('nan')
def word(problem, text): return 'good'
def nothing(problem, text): return None
def three(problem, text): return 1, 2, 3
def fails(problem, text): return {}[text]
"""


def test_own_reward(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = Problem([], "", "3")
    for name, reward, solved in [("half", 0.25, False), ("pair", 2.0, True), ("truth", 1.0, True)]:
        grade = FreeText(reward=f"own_reward:{name}").grade(problem, "3", True)
        assert (grade.reward, grade.solved) == (reward, solved)
    errors = {"nan": "ValueError", "word": "TypeError", "nothing": "TypeError"}
    for name, kind in (errors | {"three": "ValueError", "fails": "KeyError('3')"}).items():
        with pytest.raises(UserError, match=re.escape(kind)) as error:
            FreeText(reward=f"own_reward:{name}").grade(problem, "3", True)
        assert f"own_reward:{name}" in str(error.value) and "\n" not in str(error.value)
    for name in ("nothing", "no_such_module:f", "own_reward:none", "a:b:c"):
        with pytest.raises(UserError, match=f"--reward {name}: .*module:function"):
            FreeText(reward=name)


# ------------------------------------------------------------------------------- the spoiler rule
@pytest.mark.parametrize("kind", ["spoiled", "harmless", "missed"])
def test_spoiler_rule(kind):
    """What is caught, what may stay, and what the rule is known to miss."""
    for hint, answer in CASES[kind]:
        assert free_text.spoils(hint, answer) is (kind == "spoiled"), (hint, answer)
    assert not any(free_text.spoils(STEPS, answer) for answer in "1 A 0 one B circle".split())


def test_good_hints_pass():
    """At most 5 % of 200 hints, in words as people write them, are turned away."""
    pairs = [line.split("\t") for line in (ROOT / "tests/good_hints.txt").read_text().splitlines()]
    assert len({hint for hint, _ in pairs}) == 200
    assert sum(free_text.spoils(hint, answer) for hint, answer in pairs) <= 10


# --------------------------------------------------------------------------------------- pictures
def test_deep_pictures_keep_their_range(tmp_path):
    """A ramp in 12, 16 and 32 bits and in floats becomes the ramp from 0 to 255."""
    ramp = np.arange(64).reshape(8, 8)
    deep = {
        "bits12.png": (ramp * 65).astype(np.uint16),
        "bits16.png": (ramp * 1040).astype(np.uint16),
        "int32.tif": (ramp * 9999 - 5000).astype(np.int32),
        "float.tif": (ramp / 63).astype(np.float32),
    }
    for name, values in deep.items():
        Image.fromarray(values).save(tmp_path / name)
        grey = np.asarray(open_picture(tmp_path / name))[..., 0].astype(int)
        assert np.abs(grey - ramp * 255 / 63).max() <= 1, name
    Image.fromarray(np.full((4, 4), 7, np.uint16)).save(tmp_path / "flat.png")
    assert open_picture(tmp_path / "flat.png").getextrema()[0] == (0, 0)
    Image.fromarray(np.array([[1, np.inf]], np.float32)).save(tmp_path / "inf.tif")
    with pytest.raises(ValueError, match=r"inf.tif: .*undefined"):
        open_picture(tmp_path / "inf.tif")


def test_kinds_of_pictures(tmp_path):
    opened = {name: open_picture(tmp_path / name) for name in save_pictures(tmp_path)}
    assert {picture.mode for picture in opened.values()} == {"RGB"}
    assert opened["exif.jpg"].size == (60, 80)  # turned as the camera was held
    assert opened["clear.png"].getpixel((5, 5)) == (255, 255, 255)  # black lines stay visible
    red, green, _ = opened["cmyk.jpg"].getpixel((5, 5))
    assert red > 200 > 60 > green
    assert opened["grey.png"].getpixel((5, 5)) == (0, 0, 0)


# ---------------------------------------------------------------------------- problems from files
@lru_cache
def bomb():
    """A small file that unpacks to 91 million pixels."""
    out = io.BytesIO()
    Image.new("1", (10000, 9100)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def data(tmp_path):
    """A folder with good and bad pictures."""
    pytest.importorskip("math_verify")
    (tmp_path / "sub").mkdir()
    Image.effect_noise((60, 40), 50).convert("RGB").save(tmp_path / "a.png")
    Image.effect_noise((30, 90), 50).save(tmp_path / "sub" / "b.jpg")
    good = (tmp_path / "a.png").read_bytes()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "half.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "bomb.png").write_bytes(bomb())
    Image.new("RGB", (1000, 2)).save(tmp_path / "thin.png")
    return tmp_path


def row(**changes):
    return {"images": ["a.png"], "problem": "How many?", "answer": "3"} | changes


def write(folder, *lines, name="train.jsonl"):
    """Write lines, each of them bytes, text, or an object to be dumped."""
    dumped = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    texts = [line if isinstance(line, bytes) else line.encode() for line in dumped]
    (folder / name).write_bytes(b"\n".join(texts) + b"\n")
    return folder / name


def test_good_lines(data):
    path = write(
        data,
        row(images="sub/b.jpg", answer=4),
        "",
        row(images=["a.png", "sub/b.jpg"], answer=r"$\boxed{1/2}$", hint="Compare them."),
        row(problem="Is <image> as <image>?", images=["a.png"] * 2, answer="so 1 + 6\n#### 7"),
        b"\xef\xbb\xbf" + json.dumps(row(problem="Où? \u2028 x", answer=" five ")).encode(),
        row(images=[], answer="<answer> 8 </answer>", hint="Add."),
        row(images=None, answer=0.10),
        '{"images": "a.png", "problem": "?", "answer": "B", "hint": NaN}',
    )
    task = JsonlTask(path, write(data, row(), row(answer="9"), name="e.jsonl"), max_tokens=77)
    assert [task.problem("validation", 5, i).answer for i in range(4)] == ["3", "9", "3", "9"]
    assert task.max_tokens == 77 and task.held_out == 2
    problems = {p.answer: p for p in (task.problem("train", 0, i) for i in range(7))}
    assert set(problems) == {"4", "1/2", "7", "five", "8", "0.1", "B"}
    assert [p.size for p in problems["1/2"].images] == [(60, 40), (30, 90)]
    assert problems["1/2"].steps == "Compare them." and problems["B"].steps == STEPS
    assert problems["7"].question == f"Is <image> as <image>?\n{ASK}"
    assert problems["five"].question == f"Où? \u2028 x\n{ASK}"
    assert (problems["8"].images, problems["8"].steps) == ([], "Add.")
    assert problems["0.1"].images == [] and problems["4"].images[0].mode == "RGB"


def test_order_depends_on_seed_and_epoch_alone(data):
    path = write(data, *[row(answer=i) for i in range(20)])
    task = JsonlTask(path, path)
    order = lambda seed, start: [task.problem("train", seed, start + i).answer for i in range(20)]
    first, second, other = order(0, 0), order(0, 20), order(1, 0)
    assert set(first) == set(second) == {str(i) for i in range(20)}
    assert len({tuple(first), tuple(second), tuple(other)}) == 3 and order(0, 0) == first
    assert first[:5] == ["7", "16", "6", "9", "12"]  # as in every version: runs can be resumed


BAD = CASES["bad lines"] + [
    (b'{"problem": "\xff"}', "utf-8"),
    ("[" * 100000, "recursion"),
    ({"answer": "x" * 500}, "graded"),
    ({"images": "iVBORw0KGgo" * 500}, "too long"),  # a picture in base64 in place of a path
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines(data, line, message):
    """One line with file and number, whichever of the two files it is in."""
    line = row(**line) if isinstance(line, dict) else line
    path, good = write(data, row(), line), write(data, row(), name="ok.jsonl")
    for pair in ((path, good), (good, path)):
        with pytest.raises(UserError) as error:
            JsonlTask(*pair)
        said = str(error.value)
        assert said.startswith(f"{path}:2: ") and message in said
        assert "\n" not in said and len(said) < 500 and said.encode()


def test_bad_files(data):
    good = write(data, row(), name="ok.jsonl")
    for bad in (data / "none.jsonl", data, write(data, "", name="e.jsonl")):
        with pytest.raises(UserError, match=re.escape(f"{bad}:1: ")):
            JsonlTask(good, bad)


def test_own_reward_needs_no_gold(data):
    """The answer may be anything, or be missing, where one's own function grades."""
    path = write(data, row(answer="A. B. C. D."), row(answer=None))
    assert JsonlTask(path, path, reward="json:dumps").held_out == 2


def test_a_picture_that_breaks_late(data):
    """Its header is whole when the file is read; file and line are named when it is used."""
    Image.effect_noise((300, 300), 50).save(data / "late.jpg")
    (data / "late.jpg").write_bytes((data / "late.jpg").read_bytes()[:9000])
    path = write(data, row(images="late.jpg"))
    task = JsonlTask(path, path)
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"train.jsonl:1: picture .*late.jpg: .*truncated"):
            task.problem(split, 0, 0)


def test_calibration_of_files_is_on_scenes(data):
    """Only there it is known where to look."""
    path = write(data, row())
    task = JsonlTask(path, path)
    assert task.problem("train", 0, 0).targets is None
    assert task.problem("calibration", 0, 1) == FreeText().problem("calibration", 0, 1)


# ----------------------------------------------------------------- the converters of docs/data.md
RED = Image.new("RGB", (30, 20), "red")
VISION = {"question": "Which fits <image1>?", "options": ["12 cm", "red"], "decoded_image": RED}
LAYOUTS = {  # a row of each data set: how many pictures, problem and answer come of it
    "geometry3k": [
        {"images": [RED], "problem": "<image>Find x.", "answer": "2 \\sqrt { 3 }"},
        (1, "<image>Find x.", "2 \\sqrt { 3 }"),
    ],
    "virl39k": [
        {"question": "<image>\nWhich?", "answer": "\\boxed{B}", "image": ["a.png"], "qid": "1"},
        (1, "<image>\nWhich?", "B"),
    ],
    "mathvision": [
        VISION | {"id": "7", "answer": "B", "image": "images/7.jpg"},
        (1, "Which fits <image>?\n(A) 12 cm\n(B) red", "B"),
    ],
    "clevr_cogen": [
        {"image": RED, "problem": "How many items?", "solution": "<answer> 3 </answer>"},
        (1, "How many items?", "3"),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converters(data, layout):
    """The code in docs/data.md, of at most 15 lines, makes lines that are read without an error."""
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL):
        assert len(block.splitlines()) <= 15
        if "load_dataset" not in block:
            exec(block, names)
    source, wanted = LAYOUTS[layout]
    names["write"]([source], names[layout], data, "out.jsonl")
    problem = JsonlTask(data / "out.jsonl", data / "out.jsonl").problem("test", 0, 0)
    question = problem.question.removesuffix("\n" + ASK)
    assert (len(problem.images), question, problem.answer) == wanted


# ------------------------------------------------------------------------------ counting in words
def test_counting_in_words():
    """The toy's scenes, drawn large; targets are the places that hold the matches' centres."""
    task = FreeText(difficulty=1.0)
    for index in range(20):
        scene = Counting(1.0, 67).problem("train", 3, index)
        problem = task.problem("train", 3, index)
        _, _, colour, shape, _ = scene.question.split()
        assert problem.question == f"How many {colour} {shape} are in the picture?\n{ASK}"
        assert problem.answer == scene.answer and problem.images[0].size == (335, 335)
        places = set()
        for cell in scene.targets:
            left, top, right, bottom = scene.boxes[cell]
            at = (int(1.5 * (top + bottom) / 335), int(1.5 * (left + right) / 335))
            places.add(3 * at[0] + at[1])
        assert problem.targets == sorted(places) and task.put(scene) == problem
    assert len(free_text.PLACES) == 9
    assert free_text.PLACES[3:6] == ["centre left", "centre", "centre right"]


def test_hint_text():
    hint = FreeText().hint_text
    where = "Look closely at: upper left; centre. Ignore the rest."
    assert hint(["upper left", "centre"], "Count.") == f"{where} Count."
    assert hint([], "Count.") == "Count." and hint([], "") == ""
    assert hint([], "", "7") == "The answer is 7."


def test_settings_reach_the_task(data):
    """Those of the command line; one data file of the two is an error."""
    path = str(write(data, row()))
    given = {"model": "m", "max_tokens": 7, "difficulty": 0.0, "reward": "json:dumps"}
    task = ptdpo.make_task_of(ptdpo.make_config(given))
    assert (type(task), task.function) == (FreeText, json.dumps)
    task = ptdpo.make_task_of(ptdpo.make_config(given | {"data": path, "eval_data": path}))
    assert (type(task), task.max_tokens, task.scenes.noise) == (JsonlTask, 7, 0)
    assert task.reward == "json:dumps"
    with pytest.raises(UserError, match="--eval-data: give both"):
        ptdpo.make_config(given | {"data": path})
