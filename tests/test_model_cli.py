"""--model on the command line: train, resume, export, calibrate, evaluate; and what is refused."""

import json

import pytest
import tiny_qwen
import torch
from PIL import Image

import ptdpo

SMALL = "--prompts 2 --group 2 --max-tokens 6 --eval-problems 2 --top-k 5 --eval-every 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Qwen2-VL as the hub has it."""
    return tiny_qwen.save(tmp_path_factory.mktemp("model"), "qwen2_vl", dtype=torch.bfloat16)


@pytest.fixture
def data(tmp_path):
    """Three lines with one, two and one pictures, of different sizes."""
    for i, size in enumerate([(60, 40), (90, 30), (50, 50)]):
        Image.new("RGB", size, (80 * i, 90, 30)).save(tmp_path / f"{i}.png")
    lines = [{"picture": names, "problem": "How many?", "answer": "2", "hint": "Compare the sides."}
             for names in ("0.png", ["0.png", "1.png"], "2.png")]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "d.jsonl").write_text(text)
    return tmp_path / "d.jsonl"


def rows(run):
    """The metrics of a run, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def call(*args):
    """main() on arguments of any kind."""
    return ptdpo.main([str(a) for a in args])


def same_checkpoints(*runs):
    """Weights and moments, bit for bit."""
    a, b = (ptdpo.open_checkpoint(run / "checkpoint.safetensors")[1] for run in runs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_train_resume_evaluate_export(folder, tmp_path, capsys, signals, monkeypatch):
    """Two steps, two more; the same as four at once; then transformers loads the export."""
    model = ["--model", folder, *SMALL, "--lr", "1e-2"]
    assert call(*model, "--steps", 4, "--out", tmp_path / "whole") == 0
    assert call(*model, "--steps", 2, "--out", tmp_path / "run") == 0
    assert call("--resume", tmp_path / "run", "--steps", 4) == 0
    run = tmp_path / "run" / "ptdpo"
    assert len(rows(run)) == 4 and rows(run)[2:] == rows(tmp_path / "whole" / "ptdpo")[2:]
    assert same_checkpoints(run, tmp_path / "whole" / "ptdpo")
    row = rows(run)[-1]
    assert row["jsd"] > 0 and row["kl"] > 0 and row["hint_recall"] is not None
    assert row["accuracy"] is not None and row["point_f1"] is None
    config = json.loads((run / "run.json").read_text())["config"]
    assert (config["lr"], config["hint_regions"], config["micro_batch"]) == (1e-2, 3, 1)
    assert (tmp_path / "run" / "tutoring.png").exists()
    capsys.readouterr()
    assert call("--eval", run) == 0 and "base tutored" in capsys.readouterr().out
    assert call("--save-hf", run, tmp_path / "out") == 0
    check_export(folder, run, tmp_path / "out", monkeypatch)


def check_export(folder, run, out, monkeypatch):
    """AutoProcessor (but for videos, which need torchvision) and the auto model class load it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLProcessor
    from transformers.processing_utils import ProcessorMixin

    def begin(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
    monkeypatch.setattr(Qwen2VLProcessor, "get_attributes", parts)
    monkeypatch.setattr(Qwen2VLProcessor, "__init__", begin)
    processor = AutoProcessor.from_pretrained(out)
    content = [{"type": "image", "image": Image.new("RGB", (84, 84))}]
    content.append({"type": "text", "text": "How many?"})
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True,
                                           return_dict=True, return_tensors="pt")  # fmt: skip
    logits = {}
    for name in (folder, out):
        model = AutoModelForImageTextToText.from_pretrained(name)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        logits[name] = model(**inputs).logits.float()
    assert (logits[out] - logits[folder]).abs().max() > 1e-2
    trained = ptdpo.open_checkpoint(run / "checkpoint.safetensors")[1]
    for name, p in model.named_parameters():
        if "visual" in name:
            assert f"policy.model.{name}" not in trained
        elif "lm_head" not in name:
            assert torch.equal(p, trained[f"policy.model.{name}"].bfloat16())


def test_adapters_on_data_with_one_and_two_pictures(folder, data, tmp_path, signals, monkeypatch):
    """LoRA, checkpointing, bfloat16, own reward; resumed; 9 and 18 regions in a batch."""
    (data.parent / "parity.py").write_text("def grade(problem, text): return len(text) % 2")
    monkeypatch.syspath_prepend(str(data.parent))
    args = ["--data", data, "--eval-data", data, "--columns", "images=picture", "--eval-problems"]
    args += (
        "9 --reward parity:grade --lora 2 --checkpointing --dtype bfloat16 --method both".split()
    )
    args += "--steps 2 --prompts 3 --group 2 --max-tokens 6 --lr 1e-2".split()
    assert call("--model", folder, *args, "--out", tmp_path / "run") == 0
    begin = [*args, "--method", "ptdpo", "--steps", 1]
    assert call("--model", folder, *begin, "--out", tmp_path / "part") == 0
    assert call("--resume", tmp_path / "part", "--steps", 2) == 0
    assert same_checkpoints(tmp_path / "part" / "ptdpo", tmp_path / "run" / "ptdpo")
    for method in ("grpo", "ptdpo"):
        assert len(rows(tmp_path / "run" / method)) == 2
        path = tmp_path / "run" / method / "checkpoint.safetensors"
        state, tensors = ptdpo.open_checkpoint(path)
        assert all(".lora_" in n and t.dtype == torch.float32 for n, t in tensors.items())
        assert state["base"]["point_f1"] is None
    samples = (tmp_path / "run" / "ptdpo" / "samples.jsonl").read_text().splitlines()
    assert {len(json.loads(s)["relevance"]) for s in samples} <= {9, 18}
    assert call("--eval", tmp_path / "run" / "ptdpo") == 0
    assert call("--save-hf", tmp_path / "run" / "ptdpo", tmp_path / "out") == 0


def test_calibrate(folder, tmp_path, capsys):
    """Layers by recall, with chance beside them, printed and stored."""
    args = ["--calibrate", "--model", folder, "--max-tokens", 4, "--group", 2]
    assert call(*args, "--out", tmp_path) == 0
    found = json.loads((tmp_path / "calibration.json").read_text())
    recalls = [found["layer_recall"][layer] for layer in found["best"]]
    assert recalls == sorted(recalls, reverse=True) and len(recalls) == 3
    assert found["chance"] == pytest.approx(1 / 3) and 0 <= recalls[-1] <= recalls[0] <= 1
    assert capsys.readouterr().out.startswith(f"layer  {found['best'][0]}  recall {recalls[0]:.3f}")


WRONG = [
    ("--data {d}", "belong together"),
    ("--data {d} --eval-data none.jsonl --columns images=picture", "none.jsonl"),
    ("--data {d} --eval-data {d}", "d.jsonl:1: no 'images' among picture"),
    ("--data {d} --eval-data {d} --columns pictures=picture", "--columns pictures=picture"),
    ("--data {d} --eval-data {d} --columns images", "--columns images"),
    ("--data {d} --eval-data {d} --columns images=picture --hint oracle", "--hint oracle"),
    ("--data {d} --eval-data {d} --columns images=picture --eval-split test", "--eval-split"),
    ("--columns images=picture", "--columns"),
    ("--allow-outside", "--allow-outside"),
    ("--hint votes", "--hint votes"),
    ("--reward nothing", "--reward nothing"),
    ("--reward no_such_module:grade", "--reward no_such_module:grade"),
    ("--max-tokens 0", "--max-tokens 0"),
    ("--dtype int8", "--dtype"),
    ("--toy", "choose one"),
]


@pytest.mark.parametrize("flags, message", WRONG, ids=[f for f, _ in WRONG])
def test_wrong_flags_end_in_one_line_before_a_model_is_loaded(
    data, tmp_path, capsys, monkeypatch, flags, message
):
    """Exit code 2, nothing written."""
    monkeypatch.setattr(ptdpo, "HFPolicy", lambda config: pytest.fail("a model was loaded"))
    args = flags.format(d=data).split()
    assert call("--model", tmp_path, *args, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_wrong_models_end_in_one_line(tmp_path, capsys, signals, folder):
    """No folder, a folder of another family, a damaged one."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in folder.iterdir():
        whole = file.read_bytes()
        (torn / file.name).write_bytes(whole[: len(whole) // (2 if "model" in file.name else 1)])
    for name in (tmp_path, tmp_path / "nothing", torn):
        assert call("--model", name, *SMALL, "--out", tmp_path / "run") == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"ptdpo.py: --model {name}: ") and said.endswith("hub name")


def test_calibrate_without_a_model_is_refused(capsys):
    """It says which flag is missing."""
    assert call("--calibrate") == 2 and "--model" in capsys.readouterr().err


def test_a_full_gpu_names_the_flags(folder, tmp_path, capsys, signals, monkeypatch):
    """torch.OutOfMemoryError, wherever it comes from, is one line."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(ptdpo, "answer", full)
    assert call("--model", folder, *SMALL, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(flag in said for flag in ("--micro-batch", "--max-pixels", "--lora"))


def test_export_of_a_toy_run_is_refused(tmp_path, capsys, signals):
    """A toy has no folder of transformers."""
    args = "--toy --method grpo --steps 1 --prompts 1 --group 2 --eval-problems 1 --out".split()
    assert call(*args, tmp_path / "toy") == 0
    assert call("--save-hf", tmp_path / "toy", tmp_path / "out") == 2
    assert "run of the toy" in capsys.readouterr().err


def test_the_toy_starts_without_transformers():
    """Its imports are those of torch and pillow alone."""
    import subprocess
    import sys

    text = "import ptdpo, sys; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    from helpers import ROOT

    assert subprocess.run([sys.executable, "-c", text], cwd=ROOT).returncode == 0
