"""Second, plain implementations, and short ways to make policies, batches and gradients."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

import ptdpo
from toy_tasks import Grade

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "toy_tasks" / "base.safetensors"
TABLES = json.loads((ROOT / "tests" / "tables.json").read_text())


def table(name):
    """Cases of a parametrized test, whose columns are named there."""
    return [tuple(row) for row in TABLES[name]]


# ------------------------------------------------------------------------------- steps in parts
def shaken(policy, seed, size=0.15):
    """Add noise to every weight, so that no layer is idle and answers end now and then."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(size * torch.randn(p.shape, generator=noise))
        policy.norm.bias += 0.8 * policy.embed.weight[0]  # the end of an answer becomes likelier
    return policy


def config(**changes):
    """A config for four groups of four."""
    return ptdpo.Config(**{"prompts": 4, "group": 4, **changes})


def with_verdicts(rollout, solved):
    """The same rollout, but its answers are solved as told [N]."""
    grades = []
    for b, row in enumerate(rollout.grades):
        verdicts = solved[b * len(row) : (b + 1) * len(row)]
        grades.append([Grade(float(s), bool(s), g.points) for s, g in zip(verdicts, row)])
    solved = torch.tensor(solved, dtype=torch.bool)
    return replace(rollout, grades=grades, solved=solved, rewards=solved.float())


def make_batch(policy, ref, task, config, solved=None, problems=None, key=("test", 0)):
    """All of train_step that comes before its update -> rollout, hints, Batch.

    solved [N] replaces the verdicts of the task.
    """
    problems = problems or [task.problem("train", 0, i) for i in range(config.prompts)]
    rollout = ptdpo.sample_and_grade(policy, task, problems, config.group, key)
    if solved is not None:
        rollout = with_verdicts(rollout, solved)
    return rollout, *batch_of(ref, task, rollout, config, key)


def batch_of(ref, task, rollout, config, key=("test", 0)):
    """Hints and Batch of a rollout."""
    logp_ref, relevance = ptdpo.read_answers(ref, rollout, [0], config)
    hints = []
    distill = torch.zeros_like(rollout.solved)
    teacher = [None] * len(rollout.prompts)
    if config.method == "ptdpo":
        hints = ptdpo.build_hints(ref, task, rollout, relevance, config, key)
        distill = ptdpo.answers_to_distill(rollout, config)
        teacher = ptdpo.read_teacher(ref, rollout, hints, distill, config)
    batch = ptdpo.Batch(
        prompts=rollout.prompts,
        completion=rollout.completion,
        mask=rollout.mask,
        advantages=ptdpo.group_advantages(rollout.rewards, config.group),
        logp_ref=logp_ref,
        kl_on=ptdpo.answers_under_kl(rollout, config),
        distill=distill,
        teacher=teacher,
    )
    return hints, batch


def gradient(policy, ref, batch, config, step=1, clip=1e9, lr=0.0):
    """The gradient of a step as one vector, a sum over its updates, and what `update` returned."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    grads = []

    def record(*_):
        each = [p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.parameters()]
        grads.append(torch.cat([grad.flatten() for grad in each]))

    optimizer.register_step_pre_hook(record)
    with mock.patch.object(ptdpo, "CLIP_NORM", clip):
        tokens, norm, _ = ptdpo.update(policy, ref, optimizer, batch, config, step)
    return sum(grads), tokens, norm


def close(a, b, relative=1e-5):
    """Whether two vectors agree to a share of the largest entry."""
    return (a - b).abs().max() <= relative * b.abs().max()


# ------------------------------------------------------------------------ second implementations
def plain_divergence(s, t, k, name="jsd"):
    """Top-K divergence of one token, as it is defined: in probabilities, word by word."""
    p = s.softmax(-1)
    q = t.softmax(-1)
    V = len(p)
    listed = {*p.topk(min(k, V)).indices.tolist(), *q.topk(min(k, V)).indices.tolist()}
    rest = [i for i in range(V) if i not in listed]
    p = torch.cat([p[sorted(listed)], p[rest].sum()[None]])
    q = torch.cat([q[sorted(listed)], q[rest].sum()[None]])

    def kl(a, b):
        seen = a > 0
        return (a[seen] * (a[seen] / b[seen]).log()).sum()

    if name == "forward_kl":
        return kl(q, p)
    if name == "reverse_kl":
        return kl(p, q)
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def plain_forward(policy, prompt, answer):
    """One prompt and one answer, unpacked, unpadded, uncached, with attention written out.

    Returns hidden [T, H] and, by layer, what the T places attend to, mean of heads [L, T, R].
    """
    side = policy.side
    pixels = prompt.pixels.view(8 * side, 8 * side, 3).to(policy.position) / 127.5 - 1
    patches = []
    for r in range(side):
        for c in range(side):
            patches.append(pixels[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].reshape(-1))
    cells = policy.embed.weight[[policy.word_id[cell] for cell in policy.cells]]
    x = policy.patches(torch.stack(patches)) + cells
    for block in policy.encoder:
        x, _ = plain_block(block, x, torch.ones(len(x), len(x), dtype=torch.bool))
    image = policy.projector(x) + cells
    ids = torch.tensor(prompt.ids + answer[:-1])
    x = torch.cat([image, policy.embed.weight[ids] + policy.position[: len(ids)]])
    S = len(image) + len(prompt.ids)
    seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    seen[:S, :S] = True
    looks = []
    for block in policy.decoder:
        x, attention = plain_block(block, x, seen)
        looks.append(attention[S - 1 :, : len(image)])
    return policy.norm(x[S - 1 :]), torch.stack(looks)


def plain_block(block, x, seen):
    """A pre-norm block, head by head -> x, mean attention of the heads."""
    q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
    width = q.shape[-1] // block.heads
    mixed = []
    total = 0
    for h in range(block.heads):
        part = slice(h * width, h * width + width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        mixed.append(weights @ v[:, part])
        total = total + weights / block.heads
    x = x + block.out(torch.cat(mixed, -1))
    return x + block.mlp(block.norm2(x)), total


# ------------------------------------------------------------------------------------ whole runs
TINY = "--prompts 2 --group 2 --eval-problems 4 --eval-every 2".split()


def start(out, *flags, steps=4, method="ptdpo"):
    """The command line of a tiny run."""
    return ["--toy", "--method", method, "--steps", str(steps), *TINY, "--out", str(out), *flags]


def rows(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(run):
    """What a run logged, but for how long it took: rows of metrics, and the text of samples."""
    metrics = rows(run / "metrics.jsonl")
    for row in metrics:
        row.pop("seconds")
    return metrics, (run / "samples.jsonl").read_text()


def contents(run):
    """Step and tensors of a run's checkpoint, in a form that == compares bit by bit."""
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        step = int(file.metadata()["step"])
    return step, {name: (t.shape, t.dtype, t.numpy().tobytes()) for name, t in tensors.items()}


def files(folder):
    """All files below a folder, with a digest of each."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def save_pictures(folder):
    """A picture of every kind, of 80 x 60 pixels -> the names of their files."""
    grey = np.arange(60 * 80).reshape(60, 80)
    plain = Image.fromarray((grey % 256).astype("uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (80, 60), "red").save(folder / "exif.jpg", exif=exif)
    plain.convert("RGB").save(folder / "rgb.png")
    plain.convert("P").save(folder / "palette.png")
    Image.new("RGBA", (80, 60), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("LA", (80, 60), (0, 255)).save(folder / "grey.png")
    Image.new("CMYK", (80, 60), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    Image.fromarray((grey * 13).astype("uint16")).save(folder / "deep.png")
    Image.fromarray(grey.astype("int32")).save(folder / "int32.tiff")
    Image.fromarray((grey / 7).astype("float32")).save(folder / "float.tiff")
    kinds = (".png", ".jpg", ".tiff")
    return sorted(path.name for path in folder.iterdir() if path.suffix in kinds)
