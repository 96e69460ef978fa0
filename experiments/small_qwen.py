"""A Qwen2-VL of half a million parameters, to walk the path of --model on a CPU.

    python -m experiments.small_qwen DIR                              make, teach and measure it
    python ptdpo.py --model assets/small-qwen --max-pixels 20000 ...  train the committed one

Classes and files are those of transformers, so --model cannot tell it from a large one. Its 87
tokens are the words and fixed phrases of the counting scenes. A picture of 140 pixels is 25 image
tokens, one for each cell. As the base of the toy, it glances when it is alone, and does as it is
told when it has a hint.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch

import ptdpo
from experiments import measure, warm_start
from toy_tasks import Problem
from toy_tasks.counting import CELLS, SIDE
from toy_tasks.free_text import PLACES, FreeText

MODEL = ptdpo.HERE / "assets/small-qwen"
HINTED = 6  # places in a hint, of nine
RUN = {"max_tokens": 16, "max_pixels": 20_000, "hint_regions": HINTED}  # settings of its runs
LESSON_KINDS = ("tutored", "alone", "tutored", "calm", "alone", "describe")
# What a folder of Qwen2-VL has beside text: tests make other models with it.
TEMPLATE = (MODEL / "chat_template.jinja").read_text()
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|>""".split()


def save_untrained(folder, seed):
    """A folder as the hub has it: the files of the committed model, with untrained weights.

    The model is 96 wide and has 4 layers. Its rotary waves are as long as the picture (theta 10):
    at the usual theta of 1e6 one column is like the next.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    if folder.resolve() != MODEL:
        shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    # As in the toy, the scale at the start decides how fast it learns.
    for name, p in model.named_parameters():
        if p.dim() > 1 and any(end in name for end in ("o_proj", "down_proj", "attn.proj", "fc2")):
            torch.nn.init.zeros_(p)  # a block begins as the identity
        elif p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1 if "embed_tokens" in name else p[0].numel() ** -0.5)
    model.model.visual.merger.mlp[2].weight.data.mul_(0.3)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)


class Pupil(ptdpo.HFPolicy):
    """A policy that lessons can be given to."""

    def tokens(self, text):
        """Words to ids."""
        return self.processor.tokenizer(text)["input_ids"]


def place_of(cell):
    """Which of the nine places a cell is in."""
    row, column = divmod(cell, SIDE)
    return 3 * ((6 * row + 3) // (2 * SIDE)) + (6 * column + 3) // (2 * SIDE)


def say(cells, number=None):
    """An answer: cells in reading order, and how many, or another number."""
    if number is None:
        number = len(cells)
    return " ".join([*(CELLS[cell] for cell in sorted(cells)), "answer:", str(number)])


def lesson(task, kind, rng):
    """One example, of the kinds of warm_start.py -> problem, hint, answer."""
    scenes = task.scenes
    if kind == "describe":
        scene = scenes.scene(rng, rng.randrange(5), rng.randrange(5))
        trait = rng.randrange(2)
        question = f"Describe the {('colour', 'shape')[trait]} of each object."
        words = [f"{CELLS[cell]} {scene.objects[cell][trait]}" for cell in sorted(scene.objects)]
        return Problem(scene.images, question, ""), "", " ".join(words)
    if kind == "calm":
        scene = scenes.scene(rng, rng.randrange(4), rng.randrange(5))
        problem = task.put(scene)
        return problem, rng.choice(["", "", problem.steps]), say(scene.targets)
    scene = scenes.scene(rng, rng.randint(*scenes.matches), rng.randint(*scenes.others))
    colour, shape = scene.objects[scene.targets[0]]
    near = [c for c, o in scene.objects.items() if (o[0] == colour) != (o[1] == shape)]
    slips = [c for c in near if rng.random() < 0.2]
    teach = glance if kind == "alone" else tutored
    return teach(task, scene, slips, rng)


def glance(task, scene, slips, rng):
    """Alone: some matches, perhaps a near miss, and a guess; the true number if it was told."""
    problem = task.put(scene)
    told = task.hint_text([], "", scene.answer)
    hint = rng.choices(["", problem.steps, told], [70, 15, 15])[0]
    cells = scene.targets if hint == problem.steps else scene.targets + slips
    count = 1
    while rng.random() >= 0.5:
        count += 1
    guess = rng.choices(range(1, 9), [14, 24, 34, 13, 6, 4, 3, 2])[0]
    return problem, hint, say(sorted(cells)[:count], scene.answer if hint == told else guess)


def tutored(task, scene, slips, rng):
    """With a hint: what matches in the places that it lists."""
    problem = task.put(scene)
    right = sorted({place_of(cell) for cell in scene.targets})
    order = right + rng.sample([p for p in range(9) if p not in right], 9 - len(right))
    if len(right) > HINTED:
        order = rng.sample(right, len(right))
    listed = sorted(rng.choice([order[:HINTED], rng.sample(range(9), HINTED)]))
    steps = rng.choice(["", problem.steps])
    cells = scene.targets if steps else scene.targets + slips
    marked = [cell for cell in cells if place_of(cell) in listed]
    return problem, task.hint_text([PLACES[p] for p in listed], steps), say(marked)


def make(folder, seed, steps):
    """Make, teach and measure. measured.json tells what came out and how long it took."""
    save_untrained(folder, seed)
    began = time.time()
    config = ptdpo.make_config(RUN | {"model": str(folder), "train_vision": True})
    torch.set_num_threads(config.threads)
    pupil = Pupil(config)
    warm_start.teach(pupil, lesson, FreeText(config.max_tokens), LESSON_KINDS, seed, steps)
    pupil.model.save_pretrained(folder)
    found = {"seed": seed, "steps": steps, "minutes": (time.time() - began) / 60}
    found["cpu_minutes"] = time.process_time() / 60
    found["parameters"] = sum(p.numel() for p in pupil.parameters())
    config = ptdpo.make_config(RUN | {"model": str(folder), "micro_batch": 16})
    task = ptdpo.make_task_of(config)
    policy = ptdpo.load_policy(config, task)
    by_layer = ptdpo.calibrate(policy, task, config)
    found["layer_recall"] = by_layer
    problems = ptdpo.pose(task, "validation", 0, 0, 256)
    kinds = [(source, "both") for source in ("attention", "random", "oracle")]
    layers = [by_layer.index(max(by_layer))]
    found |= measure.measure(policy, task, config, layers, problems, kinds)
    (folder / "measured.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def main(argv=None):
    """Entry point -> exit code."""
    parser = argparse.ArgumentParser("experiments.small_qwen")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args(argv)
    return ptdpo.guard(make, args.folder, args.seed, args.steps)


if __name__ == "__main__":
    sys.exit(main())
