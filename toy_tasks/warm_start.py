"""How the bases were taught their strength and their weakness (--warm-start): lessons, and a loop.

What a lesson is for stands at the top of the task's own file.
"""

import math
import random

import torch
from tqdm import tqdm

from toy_tasks import beside
from toy_tasks.beside import KINDS, Beside
from toy_tasks.counting import CELLS, SIDE, STEPS, Counting

HINTED = 10  # cells in a hint


def counting_lesson(task, kind, rng):
    """One example for the counting task -> problem, hint, answer."""
    if kind == "describe":  # each object by one trait: the words for what is seen
        scene, trait = task.scene(rng, rng.randrange(5), rng.randrange(5)), rng.randrange(2)
        scene.question = f"describe {('colour', 'shape')[trait]}"
        pairs = [f"{CELLS[c]} {scene.objects[c][trait]}" for c in sorted(scene.objects)]
        return scene, "", " ".join(pairs)
    if kind == "calm":  # up to three matches among few others: counted exactly
        scene = task.scene(rng, rng.randrange(4), rng.randrange(5))
        return scene, rng.choice(["", "", STEPS]), point_and_count(scene.targets)
    scene = task.scene(rng, rng.randint(*task.matches), rng.randint(*task.others))
    asked = scene.objects[scene.targets[0]]
    near = [c for c, o in scene.objects.items() if (o[0] == asked[0]) != (o[1] == asked[1])]
    slips = [c for c in near if rng.random() < 0.2]
    if kind == "alone":  # a glance: some matches, a few slips (unless told the steps), a guess
        hint = rng.choices(["", STEPS, task.hint_text([], "", scene.answer)], [70, 15, 15])[0]
        named = sorted(scene.targets + (slips if hint != STEPS else []))
        named = named[: 1 + next(n for n in range(99) if rng.random() < 0.5)]  # a coin a point
        guess = rng.choices(range(1, 9), [14, 24, 34, 13, 6, 4, 3, 2])[0]
        return scene, hint, point_and_count(named, scene.answer if "answer" in hint else guess)
    # tutored: mark the matches among the listed cells, and no others, then count the marks
    rest = [c for c in range(SIDE * SIDE) if c not in scene.targets]
    rng.shuffle(rest)
    good = scene.targets + sorted(rest, key=lambda c: c not in near)
    cells = sorted(rng.choice([good[:HINTED], rng.sample(range(SIDE * SIDE), HINTED)]))
    steps = rng.choice(["", STEPS])
    marked = [c for c in cells if c in scene.targets or (c in slips and not steps)]
    return scene, task.hint_text([CELLS[c] for c in cells], steps), point_and_count(marked)


def point_and_count(cells, number=None):
    """The words of an answer: cells in reading order, then how many, or another number."""
    number = len(cells) if number is None else number
    return " ".join([*(CELLS[c] for c in sorted(cells)), "total", str(number)])


def beside_lesson(task, kind, rng):
    """One example for the second task -> problem, hint, answer."""
    scene = task.scene(rng)
    asked, cell = tuple(scene.question.split()[3:5]), scene.targets[0]
    if kind == "describe":  # what stands in a cell, and the next few objects
        at = rng.choice(list(scene.objects))
        scene.question = f"describe {CELLS[at]}"
        few = sorted(c for c in scene.objects if c >= at)[:5]
        return scene, "", " ".join(f"{CELLS[c]} {' '.join(scene.objects[c])}" for c in few)
    like = [c for c, o in scene.objects.items() if o[0] == asked[0] or o[1] == asked[1]]
    if kind == "alone":  # something like it, not in the last column, and a guess
        hint = rng.choices(["", beside.STEPS, f"answer {scene.answer}"], [70, 15, 15])[0]
        guess = " ".join(rng.choice([asked, rng.choice(KINDS)]))
        said = scene.answer if "answer" in hint else guess
        at = rng.choice([c for c in like if c % SIDE < SIDE - 1])
        return scene, hint, f"{CELLS[at]} {CELLS[at + 1]} is {said}"
    # tutored: the right one if it is among the listed cells; else there is none
    rest = [c for c in range(SIDE * SIDE) if c not in like]
    good = [cell] + rng.sample([c for c in like if c != cell] + rest, HINTED - 1)
    listed = sorted(rng.choice([good, good, rng.sample(range(SIDE * SIDE), HINTED)]))
    hint = task.hint_text([CELLS[c] for c in listed], rng.choice(["", beside.STEPS]))
    found = f"{CELLS[cell]} {CELLS[cell + 1]} is {scene.answer}"
    return scene, hint, found if cell in listed else "none"


LESSONS = {  # by task: what makes an example, and the kinds in turn
    Counting: (counting_lesson, ("tutored", "alone", "tutored", "calm", "alone", "describe")),
    Beside: (beside_lesson, ("tutored", "alone", "tutored", "describe", "tutored", "describe")),
}


def warm_start(task, policy, seed, steps=1200, batch=64):
    """Teach an untrained policy all lessons of a task in turn; the learning rate ends at 0."""
    lesson, kinds = LESSONS[type(task)]
    named, end = policy.named_parameters(), policy.stop_ids[0]
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and n != "position"]
    others = [p for p in policy.parameters() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, 4e-3, 0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, 4e-3, (0.9, 0.95), weight_decay=0.01)]  # fmt: skip
    for step in tqdm(range(steps), "warm start"):
        rng = random.Random(f"warm start/{seed}/{step}")
        lessons = [lesson(task, kinds[step % len(kinds)], rng) for _ in range(batch)]
        prompts = [policy.encode(problem, hint) for problem, hint, _ in lessons]
        answers = [policy.tokens(text) + [end] for _, _, text in lessons]
        longest = max(map(len, answers))
        ids = torch.tensor([a + [end] * (longest - len(a)) for a in answers])
        mask = torch.arange(longest) < torch.tensor([[len(a)] for a in answers])
        logp = (policy(prompts, ids)[0] @ policy.head_weight.T).log_softmax(-1)
        loss = -logp.gather(-1, ids[..., None])[..., 0][mask].mean()
        policy.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            rate = min(10 * (step + 1) / steps, (1 + math.cos(math.pi * step / steps)) / 2)
            optimizer.param_groups[0]["lr"] = 4e-3 * rate
            optimizer.step()
