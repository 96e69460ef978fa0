"""A data file with every kind of picture and mark trains on each family of models."""

import json

import pytest
import tiny_qwen
from helpers import rows, save_pictures

import ptdpo

SMALL = """--steps 2 --prompts 7 --group 2 --max-tokens 5 --eval-problems 4 --eval-every 1 --top-k 5
    --max-pixels 12000 --micro-batch 3 --train-vision""".split()


@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_every_kind_of_line_trains(family, tmp_path, signals):
    """Thirteen lines: nine kinds of pictures, two pictures, marks in the text, and none at all."""
    pytest.importorskip("math_verify")
    names = save_pictures(tmp_path)
    lines = [{"images": name, "problem": "How many?", "answer": "3"} for name in names]
    two = ["rgb.png", "exif.jpg"]
    lines += [
        {"images": two, "problem": "Do both show the same?", "answer": "no"},
        {"images": two, "problem": "Is <image> left of <image> ?", "answer": "(B)"},
        {"images": ["rgb.png"], "problem": "Look at <image> closely.", "answer": "$\\frac{1}{2}$"},
        {"images": [], "problem": "What is 2 + 2?", "answer": "4", "hint": "Count on."},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    tiny_qwen.save(tmp_path / "model", family)
    flags = ["--model", str(tmp_path / "model"), "--data", str(data), "--eval-data", str(data)]
    assert ptdpo.main([*flags, *SMALL, "--out", str(tmp_path / "out")]) == 0
    logged = rows(tmp_path / "out" / "ptdpo" / "metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2]
    assert all(row["skipped"] == 0 and row["jsd"] > 0 for row in logged)
