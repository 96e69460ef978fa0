"""All that waits for a GPU, in one call; it needs 60 GB of disk for models with random weights.

    python -m experiments.bench_gpu --out runs/gpu                everything, on a card of 80 GB
    python -m experiments.bench_gpu --out runs/gpu --only loss    models, loss, step or small
    python -m experiments.bench_gpu --out runs/gpu --tiny         tiny sizes, also on a CPU

    models   three steps each of Qwen2-VL-2B, full with checkpointing and by LoRA, and of
             Qwen3-VL-8B by LoRA: 16 x 8 answers of 256 tokens. Seconds of each part of a step, and
             the peak of memory beside what experiments.fits predicts
    loss     the loss beside naive, TRL and Liger at 8,192 tokens
    step     a step of the tiny Qwen2-VL beside TRL's
    small    the small Qwen2-VL, trained on the GPU and on the CPU: their curves in one picture

Nothing is downloaded. What is printed also stands in DIR/results.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path

import torch

import ptdpo
from experiments import figures, fits, train_2b
from experiments.small_qwen import RUN

FULL = {"checkpointing": True}
LORA = {"lora": 16, "checkpointing": True}
CASES = {
    "2B full": ("Qwen2-VL-2B", FULL),
    "2B LoRA": ("Qwen2-VL-2B", LORA),
    "8B LoRA": ("Qwen3-VL-8B", LORA),
}
PARTS = ("sample_and_grade", "read_answers", "read_teacher", "update")
STEPS = 3


def seconds_of(name, seconds):
    """From now on, the seconds that a function of ptdpo.py takes are added to a list."""
    plain = getattr(ptdpo, name)

    @wraps(plain)
    def timed(*args, **settings):
        began = time.perf_counter()
        result = plain(*args, **settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return result

    setattr(ptdpo, name, timed)


def peak_gb():
    """Peak of memory in GB: of tensors on a GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return train_2b.peak()


def train_case(case, out, tiny):
    """Three steps of a model -> a row of results."""
    name, flags = CASES[case]
    folder = out / ("tiny" if tiny else "models") / name
    train_2b.make_model(folder, name, tiny)
    sizes = {"max_tokens": 256, "max_pixels": 160_000}
    if tiny:
        sizes = {"prompts": 2, "group": 2, "max_tokens": 8, "max_pixels": 3136}
    config = ptdpo.make_config(flags | sizes | {"model": str(folder)})
    task = ptdpo.make_task_of(config)
    policy = ptdpo.load_policy(config, task)
    # Random weights rarely end an answer. None may, so that every run does the same work.
    policy.suppress_ids = [*policy.suppress_ids, *policy.stop_ids]
    ref = policy.frozen_copy()
    learned = [p for p in policy.parameters() if p.requires_grad]
    fused = True if torch.cuda.is_available() else None
    optimizer = torch.optim.AdamW(learned, config.lr, fused=fused)
    seconds = {part: [] for part in PARTS}
    for part in PARTS:
        seconds_of(part, seconds[part])
    layers = [policy.num_layers // 2]
    for step in range(1, STEPS + 1):
        row, _ = ptdpo.train_step(policy, ref, task, optimizer, config, layers, step)
    prompt = policy.encode(task.problem("train", 0, 0))
    e = 2 if torch.cuda.is_available() else 4
    predicted = fits.predict(fits.read_shape(str(folder)), config, len(prompt.ids), e)
    found = {"case": case, "prompt_tokens": len(prompt.ids), "kl": row["kl"]}
    # The first step also chooses kernels. The last one is shown.
    found |= {f"seconds_{part}": values[-1] for part, values in seconds.items()}
    return found | {"peak_gb": peak_gb(), "predicted_gb": fits.total(predicted) / 1e9}


def models(args):
    """Each case in a process of its own, so that its peak is its own."""
    for case in CASES:
        call(args, ["-m", "experiments.bench_gpu", "--out", str(args.out), "--case", case])


def loss(args):
    """The loss at the size of a real vocabulary."""
    sizes = ["--n", "64", "--h", "64", "--v", "5000"] if args.tiny else ["--n", "8192"]
    call(args, ["-m", "experiments.bench_loss", "--json", *sizes])


def step(args):
    """A step beside TRL's."""
    rounds = ["--rounds", "1", "--steps", "2"] if args.tiny else []
    call(args, ["-m", "experiments.bench_step", *rounds])


def small(args):
    """The small Qwen2-VL on both devices, one picture."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
    flags += ["--model", "assets/small-qwen", "--lr", "3e-4", "--distill-weight", "1"]
    flags += ["--steps", "1", "--prompts", "2", "--eval-problems", "8"] if args.tiny else []
    folders = []
    for device, visible in (("gpu", os.environ.get("CUDA_VISIBLE_DEVICES")), ("cpu", "")):
        folders.append(str(args.out / device))
        env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        call(args, ["ptdpo.py", *flags, "--out", folders[-1], "--overwrite"], env)
    figures.main(folders)


def call(args, command, env=None):
    """Run Python, pass on its lines, and keep those that are JSON."""
    command += ["--tiny"] if args.tiny and "experiments.bench_gpu" in command else []
    settings = os.environ | (env or {})
    done = subprocess.run(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=settings, cwd=ptdpo.HERE
    )
    print(done.stdout, end="", flush=True)
    for line in done.stdout.splitlines():
        with open(args.out / "results.jsonl", "a") as file:
            file.write(json.dumps({"command": command, "line": line}) + "\n")
    if done.returncode:
        print(f"failed with code {done.returncode}: {' '.join(command)}")


ACTIONS = {"models": models, "loss": loss, "step": step, "small": small}


def bench(args):
    """Do all that was asked for. A part that fails does not stop the others."""
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.case:
        print(json.dumps(train_case(args.case, args.out, args.tiny)))
        return
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{card}, torch {torch.__version__}, python {sys.version.split()[0]}", flush=True)
    for name, action in ACTIONS.items():
        if args.only in (None, name):
            action(args)


def main(argv=None):
    """Entry point -> exit code."""
    parser = argparse.ArgumentParser("experiments.bench_gpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=ACTIONS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    return ptdpo.guard(bench, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
