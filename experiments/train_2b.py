"""Train a Qwen2-VL of the true 2B shape for two steps on a CPU, with random weights.

    python -m experiments.train_2b FOLDER           needs 4.5 GB of disk and 15 GB of memory
    python -m experiments.train_2b FOLDER --tiny    the same path with a tiny model

Nothing is downloaded. Weights are random and stored in bfloat16; the tokenizer is that of the small
Qwen2-VL in assets/. Trains adapters of rank 8, and prints the KL to the reference at step 1, which
has to be 0 but for rounding, and the peaks of memory: that of loading, when the file is mapped
beside the float32 weights that are made of it, and that of training, which experiments.fits
predicts.
"""

import argparse
import copy
import json
import shutil
import sys
import time
from pathlib import Path

import torch

import ptdpo
from experiments import figures, fits
from experiments.small_qwen import MODEL

TINY = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TINY_VISION = {"depth": 2, "num_heads": 2}
FLAGS = """--lora 8 --steps 2 --prompts 2 --group 2 --max-tokens 16 --max-pixels 20000 --lr 1e-3
    --hint-regions 3 --eval-problems 1 --eval-every 2 --threads 2 --overwrite""".split()
PROMPT = 70  # tokens of a prompt with its picture and hint
FILES = """tokenizer.json tokenizer_config.json chat_template.jinja chat_template.json
    preprocessor_config.json generation_config.json""".split()


def make_model(folder, name="Qwen2-VL-2B", tiny=False):
    """Write a model of a known shape with random weights, unless the folder has one."""
    import transformers as hf

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shape = copy.deepcopy(fits.KNOWN[name])
    vision = shape["vision_config"]
    if tiny:
        shape["text_config"] |= TINY
        vision |= TINY_VISION
        is_qwen2 = shape["model_type"] == "qwen2_vl"
        vision["embed_dim" if is_qwen2 else "hidden_size"] = 64
        vision["hidden_size" if is_qwen2 else "out_hidden_size"] = TINY["hidden_size"]
        if "deepstack_visual_indexes" in vision:
            vision["deepstack_visual_indexes"] = [0, 1]
    small = json.loads((MODEL / "config.json").read_text())
    ids = {key: value for key, value in small.items() if key.endswith("token_id")}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        shape["text_config"][key] = small["text_config"][key]
    config = hf.AutoConfig.for_model(**shape, **ids)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    print(f"made {sum(p.numel() for p in model.parameters()) / 1e9:.3f} billion parameters")
    model.save_pretrained(folder)
    for file in FILES:
        shutil.copy(MODEL / file, folder)
    path = folder / "preprocessor_config.json"
    pictures = json.loads(path.read_text()) | {"patch_size": config.vision_config.patch_size}
    path.write_text(json.dumps(pictures))


def peak():
    """Peak of the resident memory of this process in GB, since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def reset_peak():
    """Let the peak begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def train(folder, tiny):
    """Make the model, train it, and print what was measured."""
    make_model(folder, tiny=tiny)
    reset_peak()
    program = peak()
    loading = []
    plain_load = ptdpo.load_policy

    def load(*args):
        policy = plain_load(*args)
        loading.append(peak())
        reset_peak()
        return policy

    ptdpo.load_policy = load
    figures.finish = lambda folders: None
    began = time.time()
    code = ptdpo.main(["--model", str(folder), "--out", f"{folder}/runs", *FLAGS])
    if code:
        raise SystemExit(code)
    run = folder / "runs" / "ptdpo"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    config = ptdpo.Config(**ptdpo.read_run(run)["config"])
    print("command: python", *sys.argv)
    print(f"torch {torch.__version__}, {time.time() - began:.0f} s for loading and two steps")
    shape = fits.read_shape(str(folder))
    predicted = program + fits.total(fits.predict(shape, config, PROMPT, 4)) / 1e9
    print(f"peak of memory: {loading[0]:.2f} GB in loading, {peak():.2f} GB in training")
    print(f"predicted for training {predicted:.2f} GB, of them {program:.2f} GB the program itself")
    print(f"KL at step 1: {first['kl']:.1e}")


def main(argv=None):
    """Entry point -> exit code."""
    parser = argparse.ArgumentParser("experiments.train_2b")
    parser.add_argument("folder", type=Path, help="where the model is made, or was made")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the path")
    args = parser.parse_args(argv)
    return ptdpo.guard(train, args.folder, args.tiny)


if __name__ == "__main__":
    sys.exit(main())
