"""How the bases of the toy were taught, and why they are weak.

    python -m experiments.warm_start --seed 0 --out DIR    make a base, or take that in DIR; measure

The weakness of a base has a known cause: its lessons, which are pictures with the answer to give.

    describe   names each object by its colour or its shape, so that the words get a meaning
    calm       up to three matches among few other objects: names them all, and counts them
    alone      a crowded picture and no hint: a glance. The answer names some matches, sometimes a
               near miss, stops early, and guesses a small number. But if the hint tells the answer,
               it names all matches and says the answer, so that this teacher is a fair rival
    tutored    a crowded picture, and a hint that lists cells: names the listed cells that match,
               and counts them. It counts up to five. Above that it guesses a number up to eight

So on crowded pictures the base fails alone, and reward has little to go by. With a hint it finds
the matches, but its count is limited: this teacher is right about half of the time. Distillation
alone cannot be expected to go far beyond it, reward can. With a perfect teacher, reward would have
nothing to add. Every lesson names its cells from a random one on, in reading order and round. So a
picture with n matches has n right ways to answer, and one can see whether a method keeps them.
"""

import argparse
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import ptdpo
from experiments.figures import read_rows
from experiments.measure import measure
from toy_tasks.counting import CELLS, SIDE, STEPS, Counting

STEPS_TAUGHT = 1200
RATE = 4e-3  # highest learning rate
HINTED = 10  # cells in a hint
TALLY = 5  # the teacher counts right up to here
SLIP = 0.2  # how often a near miss is taken for a match
LESSON_KINDS = ("tutored", "alone", "tutored", "calm", "alone", "describe")


def teach(policy, lesson, task, kinds, seed, steps, batch=64):
    """Teach a policy lessons of all kinds in turn.

    lesson(task, kind, rng) -> problem, hint, answer. Muon moves the matrices, AdamW all else. The
    learning rate rises over a tenth of the steps, and falls to 0.
    """
    matrices = []
    others = []
    for name, p in policy.named_parameters():
        is_matrix = p.ndim == 2 and "embed" not in name and name != "position"
        (matrices if is_matrix else others).append(p)
    optimizers = [
        torch.optim.Muon(matrices, RATE, 0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, RATE, (0.9, 0.95), weight_decay=0.01),
    ]
    for step in tqdm(range(steps), "warm start"):
        rng = random.Random(f"warm start/{seed}/{step}")
        lessons = [lesson(task, kinds[step % len(kinds)], rng) for _ in range(batch)]
        loss = answer_loss(policy, lessons)
        policy.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        rate = min(10 * (step + 1) / steps, (1 + math.cos(math.pi * step / steps)) / 2)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = RATE * rate
            optimizer.step()


def answer_loss(policy, lessons):
    """Mean negative log-likelihood of the tokens of all answers, each with its end."""
    end = policy.stop_ids[0]
    prompts = [policy.encode(problem, hint) for problem, hint, _ in lessons]
    answers = [policy.tokens(text) + [end] for _, _, text in lessons]
    longest = max(map(len, answers))
    ids = torch.tensor([answer + [end] * (longest - len(answer)) for answer in answers])  # [N, T]
    mask = torch.arange(longest) < torch.tensor([[len(answer)] for answer in answers])
    hidden, _ = policy(prompts, ids, mask)
    logp = (hidden @ policy.head_weight.T).log_softmax(-1)
    return -logp.gather(-1, ids[..., None])[..., 0][mask].mean()


def lesson(task, kind, rng):
    """One example -> problem, hint, answer."""
    if kind == "describe":
        return describe(task, rng)
    if kind == "calm":
        scene = task.scene(rng, rng.randrange(4), rng.randrange(5))
        hint = rng.choice(["", "", STEPS])
        return scene, hint, point_and_count(from_anywhere(scene.targets, rng))
    scene = task.scene(rng, rng.randint(*task.matches), rng.randint(*task.others))
    colour, shape = scene.objects[scene.targets[0]]
    near = [c for c, o in scene.objects.items() if (o[0] == colour) != (o[1] == shape)]
    slips = [c for c in near if rng.random() < SLIP]
    if kind == "alone":
        return alone(task, scene, slips, rng)
    return tutored(task, scene, near, slips, rng)


def describe(task, rng):
    """Name each object by one trait."""
    scene = task.scene(rng, rng.randrange(5), rng.randrange(5))
    trait = rng.randrange(2)
    scene.question = f"describe {('colour', 'shape')[trait]}"
    pairs = [f"{CELLS[cell]} {scene.objects[cell][trait]}" for cell in sorted(scene.objects)]
    return scene, "", " ".join(pairs)


def alone(task, scene, slips, rng):
    """A glance: some cells and a guess; or, told the answer, all matches and the answer."""
    told = task.hint_text([], "", scene.answer)
    hint = rng.choices(["", STEPS, told], [70, 15, 15])[0]
    if hint == STEPS:  # whoever is told to compare makes no slips
        slips = []
    named = from_anywhere(scene.targets + slips, rng)
    if hint == told:
        return scene, hint, point_and_count(from_anywhere(scene.targets, rng), scene.answer)
    count = 1
    while rng.random() >= 0.5:
        count += 1
    guess = rng.choices(range(1, 9), [14, 24, 34, 13, 6, 4, 3, 2])[0]
    return scene, hint, point_and_count(named[:count], guess)


def tutored(task, scene, near, slips, rng):
    """Name the matches among the cells of a hint, and count them, as far as the count goes."""
    rest = [cell for cell in range(SIDE * SIDE) if cell not in scene.targets]
    rng.shuffle(rest)
    good = scene.targets + sorted(rest, key=lambda cell: cell not in near)
    hinted = sorted(rng.choice([good[:HINTED], rng.sample(range(SIDE * SIDE), HINTED)]))
    steps = rng.choice(["", STEPS])
    matches = scene.targets if steps else scene.targets + slips
    marked = [cell for cell in hinted if cell in matches]
    number = len(marked)
    if number > TALLY:
        number = rng.randint(TALLY, 8)
    hint = task.hint_text([CELLS[cell] for cell in hinted], steps)
    return scene, hint, point_and_count(from_anywhere(marked, rng), number)


def from_anywhere(cells, rng):
    """Cells in reading order from a random one on, and round."""
    cells = sorted(cells)
    start = rng.randrange(len(cells)) if cells else 0
    return cells[start:] + cells[:start]


def point_and_count(cells, number=None):
    """The words of an answer: cells, then how many, or another number."""
    if number is None:
        number = len(cells)
    return " ".join([*(CELLS[cell] for cell in cells), "total", str(number)])


def check_rule(found):
    """Is a base of use? The rule was fixed before any base was made -> whether each part is met."""
    alone = found["alone"]["accuracy"]
    tutored = found["attention both"]["accuracy"]
    gain = found["grpo_20_steps"] - alone
    return {
        "alone at most 0.2": alone <= 0.2,
        "half of the groups fail as a whole": found["groups_all_failed"] >= 0.5,
        "tutored by its own attention 0.4 to 0.7": 0.4 <= tutored <= 0.7,
        "recall of its attention at least 0.85": found["attention both"]["recall"] >= 0.85,
        "20 steps of GRPO close no quarter of the gap": gain < (tutored - alone) / 4,
        "three right ways to answer in the mean": found["ways"] >= 3,
    }


def measure_base(path, seed):
    """Measure a base on 512 validation pictures, and judge it -> what measured.json holds."""
    config = ptdpo.Config(base=str(path.resolve()), seed=seed, eval_problems=512)
    task = Counting()
    policy = ptdpo.load_policy(config, task)
    problems = ptdpo.pose(task, "validation", 0, 0, config.eval_problems)
    by_layer = ptdpo.calibrate(policy, task, config)
    layers = [by_layer.index(max(by_layer))]
    found = {"seed": seed, "steps": STEPS_TAUGHT, "layer_recall": by_layer}
    found["ways"] = sum(task.ways(problem) for problem in problems) / len(problems)
    found |= measure(policy, task, config, layers, problems)
    run = path.parent / "grpo-20-steps"
    short = replace(config, method="grpo", steps=20, eval_every=20)
    ptdpo.create_run(short, run)
    ptdpo.run(run)
    found["grpo_20_steps"] = read_rows(run / "metrics.jsonl")[-1]["accuracy"]
    return found | {"rule": check_rule(found)}


def make_base(seed, out):
    """Make a base, or take the one in the folder; measure it, and tell what came out."""
    path = out / "base.safetensors"
    torch.set_num_threads(1)
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        task = Counting()
        policy = task.new_policy(seed)
        teach(policy, lesson, task, LESSON_KINDS, seed, STEPS_TAUGHT)
        ptdpo.save_checkpoint(path, 0, policy)
    found = measure_base(path, seed)
    ptdpo.write_json(out / "measured.json", found)
    print(json.dumps(found, indent=1))


def main(argv=None):
    """Entry point -> exit code."""
    parser = argparse.ArgumentParser("experiments.warm_start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(argv)
    return ptdpo.guard(make_base, given.seed, given.out)


if __name__ == "__main__":
    sys.exit(main())
