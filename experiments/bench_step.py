"""Seconds and memory of a GRPO step on a tiny Qwen2-VL: this repository beside TRL's GRPOTrainer.

    python -m experiments.bench_step                       TRL too, where it is installed
    python -m experiments.bench_step --trl-python PATH     TRL of another environment's Python

240 thousand parameters, 16 pictures of 84 x 84, 8 answers to each, 32 tokens an answer, float32 on
one CPU thread or bfloat16 on a GPU, no KL, one update a batch. A step is all from the prompts to
the moved weights. Each measurement is a process of its own, and rounds alternate. Memory is the
peak above that after the imports. `tutored` adds to a step of `ours` the reference, hints and the
tutored teacher.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

import ptdpo
from toy_tasks import Grade, Problem
from toy_tasks.free_text import FreeText

PROMPTS = 16
GROUP = 8
TOKENS = 32
LR = 1e-3
QUESTION = "Which of the small shapes in this picture is red, and how many are?"


class Noise(FreeText):
    """Pictures of noise. About half of the random answers get the reward."""

    def problem(self, split, seed, index):
        return Problem([picture(index)], QUESTION, "1")

    def grade(self, problem, text, finished):
        return Grade(parity(text), parity(text) > 0, None)


def picture(seed):
    """84 x 84 pixels of noise."""
    noise = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (84, 84, 3), generator=noise, dtype=torch.uint8)
    return Image.frombytes("RGB", (84, 84), pixels.numpy().tobytes())


def parity(text):
    """The reward."""
    return float(sum(text.encode()) % 2)


def peak():
    """Peak memory in MB: of tensors on a GPU, or else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(folder, steps, tutored=False):
    """Times of the steps, memory before and after."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: F401

    before = peak()
    config = ptdpo.Config(
        model=str(folder),
        prompts=PROMPTS,
        group=GROUP,
        max_tokens=TOKENS,
        lr=LR,
        hint_regions=3,
        kl_weight=0.0,
        train_vision=True,
    )
    task = Noise(TOKENS)
    policy = ptdpo.HFPolicy(config)
    # Every answer has all its tokens, as in the other arm.
    policy.suppress_ids = [*policy.suppress_ids, *policy.stop_ids]
    ref = policy.frozen_copy() if tutored else policy
    learned = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, LR)
    times = []
    for step in range(steps):
        began = time.perf_counter()
        if tutored:
            ptdpo.train_step(policy, ref, task, optimizer, config, [1], step)
        else:
            grpo_step(policy, task, optimizer, config, step)
        times.append(time.perf_counter() - began)
    return times, before, peak()


def grpo_step(policy, task, optimizer, config, step):
    """ptdpo.train_step without a KL and a teacher, so no reference is read."""
    problems = ptdpo.pose(task, "train", 0, step * PROMPTS, PROMPTS)
    rollout = ptdpo.sample_and_grade(policy, task, problems, GROUP, (0, step))
    assert rollout.mask.all()
    advantages = ptdpo.group_advantages(rollout.rewards, GROUP)
    nothing = torch.zeros_like(rollout.solved)
    answers = (rollout.prompts, rollout.completion, rollout.mask)
    logp_ref = torch.zeros(rollout.mask.shape)
    teacher = [None] * PROMPTS
    batch = ptdpo.Batch(*answers, advantages, logp_ref, nothing, nothing, teacher)
    ptdpo.update(policy, policy, optimizer, batch, config, step)


def trl(folder, steps):
    """Times of the steps, memory before and after, of GRPOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: F401
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    before = peak()
    ends = []
    prompt = [{"role": "user", "content": QUESTION}]
    rows = [{"prompt": prompt, "image": picture(i)} for i in range(PROMPTS * steps)]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=PROMPTS * GROUP,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        max_completion_length=TOKENS,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        max_steps=steps,
        learning_rate=LR,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        generation_kwargs={"min_new_tokens": TOKENS},
    )
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [parity(c[0]["content"]) for c in completions],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=picture_processor(folder),
        callbacks=[Clock()],
    )
    ends.append(time.perf_counter())
    trainer.train()
    return [end - start for start, end in pairwise(ends)], before, peak()


def picture_processor(folder):
    """The processor without its part for videos, which wants torchvision."""
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLProcessor
    from transformers.processing_utils import ProcessorMixin

    class ImageOnly(Qwen2VLProcessor):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            self.image_token = "<|image_pad|>"
            self.video_token = "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = AutoImageProcessor.from_pretrained(folder)
    return ImageOnly(pictures, tokenizer, chat_template=tokenizer.chat_template)


def tutored(folder, steps):
    """The same as ours, with a teacher."""
    return ours(folder, steps, tutored=True)


ARMS = {"trl": trl, "ours": ours, "tutored": tutored}


def in_a_process(arm, folder, steps, python):
    """Run an arm in a process of its own -> times, memory; None where it cannot run."""
    call = [python, "-m", "experiments.bench_step", "--arm", arm]
    call += ["--folder", folder, "--steps", str(steps)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=settings, cwd=ptdpo.HERE)
    if done.returncode:
        print(f"{arm}: left out, {done.stderr.strip().splitlines()[-1][:150]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(args):
    """All arms in turn, round by round; medians over all but the first step of each process."""
    sys.path.insert(0, str(ptdpo.HERE / "tests"))
    import tiny_qwen

    folder = tiny_qwen.save(tempfile.mkdtemp(), "qwen2_vl", layers=4, gain=1.0)
    found = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in list(found):
            python = args.trl_python if arm == "trl" else sys.executable
            row = in_a_process(arm, folder, args.steps, python)
            if row is None:
                del found[arm]
            else:
                found[arm].append(row)
    seconds = {}
    memory = {}
    for arm, rows in found.items():
        seconds[arm] = statistics.median(time for times, _, _ in rows for time in times[1:])
        memory[arm] = statistics.median(after - before for _, before, after in rows)
        print(f"{arm:8} {seconds[arm]:.3f} s a step, {memory[arm]:.0f} MB above the imports")
    if "trl" in found:
        speed = seconds["trl"] / seconds["ours"]
        share = memory["ours"] / memory["trl"]
        print(f"ours against TRL: {speed:.2f} times the steps a second, {share:.2f} of the memory")
    print(f"cost of tutoring: {seconds['tutored'] / seconds['ours']:.2f} times the step")


def run(args):
    """Compare all arms, or be one of them."""
    torch.set_num_threads(1)
    if args.arm:
        print(json.dumps(ARMS[args.arm](args.folder, args.steps)))
    else:
        compare(args)


def main(argv=None):
    """Entry point -> exit code."""
    parser = argparse.ArgumentParser("experiments.bench_step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return ptdpo.guard(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
