"""Seconds and memory of a GRPO step on a tiny Qwen2-VL: this repository and TRL's GRPOTrainer.

    python tests/bench_step.py                          this repository; TRL too, where installed
    python tests/bench_step.py --trl-python PATH        TRL from another environment's Python

245 thousand parameters, 16 pictures of 84 x 84, 8 answers to each, 32 tokens an answer, float32,
one thread, no KL, one update a batch. Every measurement is a process of its own; rounds alternate.
A step is all from the prompts to the moved weights. Memory is the peak above that after imports.
`tutored` adds to a step of `ours` the reference, hints and the tutored teacher: the method's cost.
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

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
PROMPTS, GROUP, TOKENS, LR = 16, 8, 32, 1e-3
QUESTION = "Which of the small shapes in this picture is red, and how many are?"


def picture(seed):
    """84 x 84 pixels of noise."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (84, 84, 3), generator=g, dtype=torch.uint8)
    return Image.frombytes("RGB", (84, 84), bytes(pixels.flatten().tolist()))


def rss():
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parity(text):
    """A reward that about half of the random answers get."""
    return float(sum(text.encode()) % 2)


def ours(folder, steps, tutored=False):
    """Times of the steps, memory before and after."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: F401

    import ptdpo
    from toy_tasks import Grade, Problem
    from toy_tasks.jsonl import FreeText

    before, times = rss(), []
    config = ptdpo.Config(model=str(folder), prompts=PROMPTS, group=GROUP, lr=LR, hint_regions=3,
                          max_tokens=TOKENS, kl_weight=0.0, train_vision=True)  # fmt: skip
    policy, task = ptdpo.HFPolicy(config), FreeText(TOKENS)
    policy.suppress_ids += policy.stop_ids  # every answer has its 32 tokens, as in the other arm
    task.grade = lambda problem, text, finished: Grade(parity(text), parity(text) > 0, None)
    ref = policy.frozen_copy() if tutored else policy
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], LR)
    for step in range(steps):
        began, key = time.perf_counter(), (0, step)
        problems = [Problem([picture(step * PROMPTS + b)], QUESTION, "1") for b in range(PROMPTS)]
        rollout = ptdpo.answer(policy, task, problems, GROUP, 1.0, key)
        assert rollout.mask.all()
        rollout.adv = ptdpo.group_advantages(rollout.reward, GROUP)
        if tutored:
            ptdpo.read_reference(ref, rollout, config, [1])
            rollout.hints = ptdpo.build_hints(policy, task, rollout, config, key)
            ptdpo.tutor(ref, rollout, config)
        else:
            rollout.logp_ref = torch.zeros(rollout.mask.shape)  # no KL, so no reference
        ptdpo.update(policy, ref, optimizer, rollout, config, 1.0 * tutored)
        times.append(time.perf_counter() - began)
    return times, before, rss()


def trl(folder, steps):
    """Times of the steps, memory before and after, of GRPOTrainer."""
    from datasets import Dataset
    from transformers import (
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoTokenizer,
        Qwen2VLProcessor,
        TrainerCallback,
    )
    from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: F401
    from transformers.processing_utils import ProcessorMixin
    from trl import GRPOConfig, GRPOTrainer

    class ImageOnly(Qwen2VLProcessor):  # the whole one needs torchvision, for videos
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            ids = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
            self.image_token_id, self.video_token_id = ids
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    before, ends = rss(), []
    parts = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = ImageOnly(*parts, chat_template=parts[1].chat_template)
    prompt = [{"role": "user", "content": QUESTION}]
    rows = [{"prompt": prompt, "image": picture(i)} for i in range(PROMPTS * steps)]
    N = PROMPTS * GROUP
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, per_device_train_batch_size=N,
        gradient_accumulation_steps=1, num_generations=GROUP, max_completion_length=TOKENS,
        temperature=1.0, top_p=1.0, top_k=0, beta=0.0, max_steps=steps, learning_rate=LR,
        save_strategy="no", report_to="none", gradient_checkpointing=False, disable_tqdm=True,
        dataloader_pin_memory=False, generation_kwargs={"min_new_tokens": TOKENS},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [parity(c[0]["content"]) for c in completions],
        args=config, train_dataset=Dataset.from_list(rows), processing_class=processor,
        callbacks=[Clock()],
    )  # fmt: skip
    ends.append(time.perf_counter())
    trainer.train()
    return [b - a for a, b in pairwise(ends)], before, rss()


ARMS = {"trl": trl, "ours": ours, "tutored": lambda *a: ours(*a, tutored=True)}


def measure(arm, folder, steps, python):
    """Run an arm in a process of its own -> times, memory; None where it cannot run."""
    call = [python, __file__, "--arm", arm, "--folder", folder, "--steps", str(steps)]
    setting = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=setting)
    if done.returncode:
        print(f"{arm}: skipped, {done.stderr.strip().splitlines()[-1][:150]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    """All arms in turn, round by round; medians over all but the first step of each process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.arm:
        print(json.dumps(ARMS[a.arm](a.folder, a.steps)))
        return
    import tiny_qwen

    folder = tiny_qwen.save(Path(tempfile.mkdtemp()), "qwen2_vl", layers=4, gain=1.0)
    found = {arm: [] for arm in ARMS}
    for _ in range(a.rounds):
        for arm in list(found):
            python = a.trl_python if arm == "trl" else sys.executable
            row = measure(arm, folder, a.steps, python)
            if row is None:
                del found[arm]
            else:
                found[arm].append(row)
    seconds = {m: statistics.median(t for r in rows for t in r[0][1:]) for m, rows in found.items()}
    peak = {m: statistics.median(r[2] - r[1] for r in rows) for m, rows in found.items()}
    for arm in found:
        print(f"{arm:8} {seconds[arm]:.3f} s a step, {peak[arm]:.0f} MB above the imports")
    if "trl" in found:
        speed, memory = seconds["trl"] / seconds["ours"], peak["ours"] / peak["trl"]
        print(f"ours against TRL: {speed:.2f} times the steps a second, {memory:.2f} of the memory")
    print(f"cost of tutoring: {seconds['tutored'] / seconds['ours']:.2f} times the step")


if __name__ == "__main__":
    main()
