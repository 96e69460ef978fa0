"""Second, plain implementations, and short ways to make policies, rollouts and gradients."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save

import ptdpo
from ptdpo import LOGS
from toy_tasks import Grade

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "toy_tasks" / "base.safetensors"


def shaken(policy, seed, size=0.15):
    """Add noise to every weight, so that no layer is idle and answers end now and then."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(size * torch.randn(p.shape, generator=noise))
        policy.norm.bias += 0.8 * policy.embed.weight[0]  # the end of an answer becomes likelier
    return policy


def config(**changes):
    """A config for four groups of four, with gradients left as they are."""
    return ptdpo.Config(**{"prompts": 4, "group": 4, "clip_norm": 1e9, **changes})


def make_rollout(policy, ref, task, config, solved=None, problems=None, key=("test", 0)):
    """All of a step that comes before its update; solved [N] replaces the task's verdicts."""
    problems = problems or [task.problem("train", 0, i) for i in range(config.prompts)]
    rollout = ptdpo.answer(policy, task, problems, config.group, config.temperature, key)
    if solved is not None:
        pairs = zip(solved, rollout.grades)
        rollout.grades = [Grade(float(s), bool(s), g.points) for s, g in pairs]
    rollout.adv = ptdpo.group_advantages(rollout.reward, config.group)
    ptdpo.read_reference(ref, rollout, config, [0])
    if config.method == "ptdpo":
        rollout.hints = ptdpo.build_hints(policy, task, rollout, config, key)
        ptdpo.tutor(ref, rollout, config)
    return rollout


def gradient(policy, ref, rollout, config, distill_weight=None):
    """All gradients of one update as one vector, and the values that the update returned."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    weight = config.distill_weight if distill_weight is None else distill_weight
    tokens, norm = ptdpo.update(policy, ref, optimizer, rollout, config, weight)
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), tokens, norm


def close(a, b, relative=1e-5):
    """Whether two vectors agree to a share of the largest entry."""
    return (a - b).abs().max() <= relative * b.abs().max()


def plain_jsd(student, teacher, k):
    """Top-K JSD of one token in plain Python: the definition, in float64."""

    def softmax(z):
        top = max(z)
        e = [math.exp(v - top) for v in z]
        return [v / math.fsum(e) for v in e]

    def kl(a, b):
        return math.fsum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)

    p, q = softmax([float(v) for v in student]), softmax([float(v) for v in teacher])
    support = set()
    for d in (p, q):
        support |= set(sorted(range(len(d)), key=lambda i: -d[i])[:k])
    rest = [i for i in range(len(p)) if i not in support]
    p, q = ([d[i] for i in sorted(support)] + [math.fsum(d[i] for i in rest)] for d in (p, q))
    m = [(a + b) / 2 for a, b in zip(p, q)]
    return (kl(p, m) + kl(q, m)) / 2


def plain_forward(policy, prompt, answer):
    """One prompt and one answer, unpacked, unpadded, uncached, with attention written out.

    Returns hidden [T, H] and, by layer, what the T places attend to, mean of heads [L, T, R].
    """
    side, edge = policy.side, policy.side * 8
    pixels = prompt.pixels.view(edge, edge, 3).float() / 127.5 - 1
    patches = torch.stack(
        [
            pixels[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].reshape(-1)
            for r in range(side)
            for c in range(side)
        ]
    )
    cells = policy.embed.weight[policy.cell_ids]
    x = policy.patches(patches) + cells
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
    width, mixed, total = q.shape[-1] // block.heads, [], 0
    for h in range(block.heads):
        part = slice(h * width, h * width + width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        mixed.append(weights @ v[:, part])
        total = total + weights / block.heads
    x = x + block.out(torch.cat(mixed, -1))
    return x + block.mlp(block.norm2(x)), total


# ------------------------------------------------------------------------------ whole runs
TINY = "--prompts 2 --group 2 --eval-problems 4 --eval-every 2".split()


def start(out, *flags, steps=4, method="ptdpo"):
    """The command line of a tiny run."""
    return ["--toy", "--method", method, "--steps", str(steps), *TINY, "--out", str(out), *flags]


def rows(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(run):
    """What a run logged, but for how long it took."""
    metrics = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run / LOGS[0])]
    return metrics, (run / LOGS[1]).read_text()


def contents(run):
    """State and tensors of a run's checkpoint, in a form that == compares bit by bit."""
    state, tensors = ptdpo.open_checkpoint(run / "checkpoint.safetensors")
    del state["sizes"], state["commit"]  # seconds have more digits or fewer
    for row in state["monitor"]["recent"]:
        row.pop("seconds", None)
    return state, {name: (t.shape, t.dtype, t.numpy().tobytes()) for name, t in tensors.items()}


def forge(path, change):
    """Rewrite a checkpoint with a true checksum after change(state, tensors)."""
    state, tensors = ptdpo.open_checkpoint(path)
    change(state, tensors)
    text = json.dumps(state)
    data = save(tensors, {"state": text, "checksum": ptdpo.checksum(tensors, text)})
    path.write_bytes(data)


def files(folder):
    """All files below a folder, with a digest of each."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
