"""PTD-PO: Privileged Tutoring Distillation Policy Optimization (arXiv 2606.07000), in one file.

    python ptdpo.py --toy                                 GRPO and PTD-PO side by side, on a CPU
    python ptdpo.py --toy --method ptdpo --hint random --out runs/random    one arm, one change
    python ptdpo.py --eval runs/toy/ptdpo                 measure a run on held-out pictures
    python ptdpo.py --model Qwen/Qwen2-VL-2B-Instruct     the same algorithm on a real model
    python ptdpo.py --help                                every flag; --help-metrics: every number

The file goes through one training step, from top to bottom:

    config > policy > rollout > advantage > reference > hint > tutored teacher
           > losses > update > metrics, monitor > evaluation > training loop > checkpoint
           > vision-language models > start of a run

Symbols: prompt x (picture and question), hint h, answer y sampled by the student;
student p_t = pi_theta(. | x, y_<t); tutored teacher q_t = pi_ref(. | x, h, y_<t), the frozen base
model that has read the hint and scores the *student's* answer.

    loss = policy loss + beta * KL(pi_theta || pi_ref) + lambda * mean of JSD_K(p_t || q_t)
                                                        over the tokens of failed answers

Shapes: B prompts, G answers to each (a group), N = B*G, T answer tokens, V words, K top-k,
H hidden width, R regions of a picture, L layers. Row b*G + g of [N, ...] is answer g to prompt b.

Departures from the paper, reasons in README: 1 the model's own attention writes the spatial hint,
2 the support is the union of both Top-K with exact values, 3 the distillation mean is over all
failed tokens of the update, 4 the JSD has its true gradient, 5 the KL has an importance ratio and
acts on all groups, 6 sampling without top-p.
"""

import copy
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from toy_tasks import Problem, UserError
from toy_tasks.beside import Beside
from toy_tasks.counting import Counting
from toy_tasks.jsonl import PLACES, spoils, text_task
from toy_tasks.ranks import RANK, RANKS, by_rank_0, gather, over_ranks, own  # alone: no-ops

TASKS = {"counting": Counting, "beside": Beside}
HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------- config
def knob(default, text, *choices, least=None):
    """A field of Config: its default, its help, and what it may be."""
    return field(default=default, metadata={"help": text, "choices": choices, "least": least})


@dataclass
class Config:
    """All that shapes a run. Every field is a flag (`--top-k 10`) and is saved with the run."""

    method: str = knob("ptdpo", "grpo: reward alone; ptdpo: reward and tutoring", "grpo", "ptdpo")
    seed: int = knob(0, "seeds prompts and sampling noise", least=0)
    steps: int = knob(60, "training steps", least=1)
    task: str = knob("counting", "the toy task", *TASKS)
    base: str = knob("", "warm-started policy, also the reference; default: the task's own")
    difficulty: float = knob(1.0, "clutter and noise of the pictures, 0 is calm", least=0)
    # rollout
    prompts: int = knob(16, "prompts a step (B)", least=1)
    group: int = knob(8, "answers to each prompt (G)", least=2)
    temperature: float = knob(1.0, "sampling temperature", least=0.01)
    # update
    algorithm: str = knob("grpo", "form of the policy loss", "grpo", "dapo", "gspo")
    lr: float = knob(3e-4, "learning rate of AdamW, constant", least=0)
    weight_decay: float = knob(0.01, "weight decay of AdamW", least=0)
    clip_norm: float = knob(1.0, "gradients are scaled down to this norm", least=1e-6)
    max_skipped: int = knob(3, "stop after so many steps in a row that skipped an update", least=1)
    updates_per_batch: int = knob(1, "updates a batch is split into; at 1 nothing clips", least=1)
    micro_batch: int = knob(0, "groups a pass, 0 = all; saves memory, changes nothing", least=0)
    policy_weight: float = knob(1.0, "weight of the policy loss, 0 = self-distillation", least=0)
    kl_weight: float = knob(0.01, "beta, weight of the KL to the reference", least=0)
    kl_on: str = knob("all", "groups under the KL (authors' code: untutored)", "all", "untutored")
    # tutoring
    distill_weight: float = knob(1.0, "lambda, weight of the distillation loss", least=0)
    distill_decay: bool = knob(False, "let lambda fall linearly to 0 over the run")
    distill_on: str = knob("failed", "answers to distil on; all: whatever tau", "failed", "all")
    tau: float = knob(1.0, "tutor groups whose solved share is below this", least=0)
    divergence: str = knob("jsd", "distance to the teacher", "jsd", "forward_kl", "reverse_kl")
    top_k: int = knob(10, "K, words of each side that the JSD sees one by one", least=1)
    hint: str = knob("attention", "what picks the regions (answer: spoils, on purpose)",
                     "attention", "votes", "oracle", "random", "answer", "none")  # fmt: skip
    hint_parts: str = knob("both", "where to look, which steps to take", "where", "steps", "both")
    hint_regions: int = knob(10, "M, regions in every hint, whatever the answer", least=1)
    hint_layers: int = knob(1, "decoder layers to read, the best by calibration", least=1)
    # measuring
    eval_every: int = knob(5, "steps between evaluations", least=1)
    eval_split: str = knob("validation", "held-out pictures", "validation", "test")
    eval_problems: int = knob(256, "how many held-out pictures", least=1)
    threads: int = knob(1, "CPU threads; another number rounds differently", least=1)
    # vision-language models
    model: str = knob("", "Qwen2-VL, Qwen2.5-VL or Qwen3-VL: a folder or a hub name")
    data: str = knob("", "problems to train on, JSON lines (none: the toy, drawn large)")
    eval_data: str = knob("", "held-out problems, JSON lines")
    columns: str = knob("", "names in the lines: images=NAME,problem=NAME,answer=NAME,hint=NAME")
    allow_outside: bool = knob(False, "let paths of pictures leave the folder of --data")
    reward: str = knob("", "module:function of (problem, text) in place of the task's reward")
    max_tokens: int = knob(512, "longest answer", least=1)
    sample_batch: int = knob(128, "answers sampled at once: their cache has to fit", least=1)
    max_pixels: int = knob(512 * 28 * 28, "larger pictures are shrunk, 0 = never", least=0)
    lora: int = knob(0, "rank of adapters that learn in place of the weights", least=0)
    train_vision: bool = knob(False, "let the vision tower learn")
    checkpointing: bool = knob(False, "compute activations twice to save memory")
    dtype: str = knob("auto", "precision: bfloat16 on a GPU", "auto", "bfloat16", "float32")


# What --model changes in the defaults; with --lora the learning rate is 1e-5.
MODEL_DEFAULTS = dict(lr=1e-6, steps=200, micro_batch=1, distill_weight=0.05, top_k=100,
                      hint_regions=3, eval_every=10, eval_problems=128)  # fmt: skip


# ----------------------------------------------------------------------------------------- policy
class Policy(Protocol):
    """All that the algorithm asks of a model. Pixels, padding, positions, caches stay behind it.

    `forward` ends at hidden states: [N, T, V] logits of a large model would be gigabytes. The
    losses multiply by the head themselves, in chunks (token_stats).
    """

    stop_ids: list[int]  # tokens that end an answer
    suppress_ids: list[int]  # tokens that no answer may hold, such as those for pictures
    num_layers: int
    head_weight: torch.Tensor  # [V, H]

    def encode(self, problem: Problem, hint: str = "", like=None):
        """One prompt: pictures, question and, for the teacher, a hint; `like` lends its pixels."""

    def sample(self, prompts: list, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
        """G answers to each prompt, ids [N, T], picked by uniforms [N, T]; at 0 greedy."""

    def forward(self, prompts: list, completion: torch.Tensor, mask=None, layers=()):
        """Teacher-forced pass -> hidden [N, T, H], whose place t predicts token t, and what those
        places attend to [len(layers), N, R], mean over heads and over the tokens in mask."""

    def region_names(self, prompt) -> list[str]:
        """The R places that a hint may name: a closed vocabulary."""

    def text(self, ids: list[int]) -> str:
        """Ids as text."""

    def frozen_copy(self) -> "Policy":
        """The reference: the same weights, which never learn."""


# ---------------------------------------------------------------------------------------- rollout
@dataclass
class Rollout:
    """The groups of one step, filled from top to bottom as the step goes on."""

    problems: list  # [B]
    prompts: list  # [B], encoded
    completion: torch.Tensor  # ids [N, T]
    mask: torch.Tensor  # bool [N, T], true up to and including the first stop token
    texts: list  # [N]
    grades: list  # [N]
    adv: torch.Tensor = None  # [N]
    logp_old: torch.Tensor = None  # [N, T], under the policy that sampled
    logp_ref: torch.Tensor = None  # [N, T], under the frozen reference
    relevance: torch.Tensor = None  # [B, R], where the answers looked
    hints: list = None  # [B]
    distill: torch.Tensor = None  # bool [N], answers that the teacher re-reads
    teacher: torch.Tensor = None  # [N, T, H], hidden states of the tutored teacher
    policy_weights: torch.Tensor = None  # [N, T], what each token weighs in each of the losses
    kl_weights: torch.Tensor = None  # [N, T]
    jsd_weights: torch.Tensor = None  # [N, T]
    skipped: str = None  # what was not finite, if an update was skipped

    @property
    def reward(self):
        """Rewards [N]."""
        return torch.tensor([g.reward for g in self.grades], device=self.mask.device)

    @property
    def solved(self):
        """Solved answers, bool [N]."""
        return torch.tensor([g.solved for g in self.grades], device=self.mask.device)

    @property
    def solved_share(self):
        """Share of solved answers in each group [B]."""
        return self.solved.view(len(self.problems), -1).float().mean(1)

    def parts(self, size=0, count=1):
        """Cut into whole groups: `size` groups a part or, at size 0, `count` parts of even size.

        A field has B rows, one a prompt, or N = B*G, one an answer; it is cut accordingly. Tensors
        of a part are views: what is written into them stands in the whole.
        """
        B, N, count = len(self.problems), len(self.mask), min(count, len(self.problems))
        cuts = [*range(0, B, size), B] if size else [i * B // count for i in range(count + 1)]
        for a, b in pairwise(cuts):
            rows = {n: slice(a * n // B, b * n // B) for n in (B, N)}
            yield Rollout(**{k: v if v is None else v[rows[len(v)]] for k, v in vars(self).items()})

    def mine(self):
        """The groups of this process."""
        return list(self.parts(count=RANKS))[RANK]


def generator(*key):
    """A random stream that depends on its key alone, not on what was drawn before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def answer(policy, task, problems, group, temperature, key, hints=None):
    """Sample and grade `group` answers to each problem, with hints or without -> Rollout.

    The noise of token t of answer g to prompt b depends on (key, b, g, t) alone, so that both
    methods, any micro-batch and a resumed run meet the same. Text is made for grading alone.
    """
    B, hints = len(problems), hints or [""] * len(problems)
    prompts = [policy.encode(p, h) for p, h in zip(problems, hints)]
    streams = [generator(*key, b, g) for b in range(B)[own(B)] for g in range(group)]
    noise = [torch.rand(task.max_tokens, generator=s, dtype=torch.double) for s in streams]
    completion = gather(policy.sample(prompts[own(B)], torch.stack(noise), temperature), B)
    stop = torch.isin(completion, torch.tensor(policy.stop_ids, device=completion.device))
    mask = stop.cumsum(1) - stop.long() == 0  # by the first stop token, never by a pad's value
    texts = [policy.text(ids[said].tolist()) for ids, said in zip(completion, mask & ~stop)]
    asked = [p for p in problems for _ in range(group)]
    grades = [task.grade(*row) for row in zip(asked, texts, stop.any(1).tolist())]
    return Rollout(problems, prompts, completion, mask, texts, grades)


# -------------------------------------------------------------------------------------- advantage
def group_advantages(rewards, group_size):
    """Reward relative to the group: A_i = (r_i - mean) / (std + 1e-6), sample std (paper, GRPO).

    rewards [N] -> [N]. A flat group, of equal rewards, gets exactly 0, which rounding would not
    give: GRPO learns nothing from it. Where all failed alike, tutoring is the only signal.
    """
    r = rewards.view(-1, group_size)
    adv = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    flat = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return torch.where(flat, 0.0, adv).flatten()


# -------------------------------------------------------------------------------------- reference
@torch.no_grad()
def read_reference(ref, rollout, config, layers):
    """One pass of the frozen reference: log-probs for the KL and, on the way, attention.

    Fills logp_ref [N, T] and relevance [B, R]: attention to region r of the rows that *predict*
    answer tokens, mean over layers, heads, tokens and the G answers of a group. Choosing among
    them by reward would bring in the true answer. Returns it by layer [L, B, R].
    """
    B, R = len(rollout.prompts), max(len(ref.region_names(p)) for p in rollout.prompts)
    rollout.logp_ref = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
    rollout.relevance = rollout.logp_ref.new_zeros(B, len(layers), R)  # mean below
    for part in rollout.mine().parts(config.micro_batch):  # its tensors are views of the rollout's
        hidden, attention = ref.forward(part.prompts, part.completion, part.mask, layers)
        tokens = (hidden[part.mask], ref.head_weight, part.completion[part.mask])
        over = {"temperature": config.temperature, "suppress_ids": ref.suppress_ids}
        part.logp_ref[part.mask] = token_stats(*tokens, **over)[0]  # in losses, below
        if layers:  # a part may have fewer regions than the whole: fewer pictures
            looks = attention.unflatten(1, (len(part.problems), -1)).mean(2).transpose(0, 1)
            part.relevance[..., : looks.shape[-1]] = looks
    over_ranks(rollout.logp_ref)
    by_layer = over_ranks(rollout.relevance).transpose(0, 1) if layers else None
    rollout.relevance = by_layer.mean(0) if layers else None
    return by_layer


def recall(regions, problems):
    """Mean share of the true targets among the regions named for each problem [B][M].

    None where a list is empty, or where nobody knows the targets.
    """
    pairs = [(set(r), set(p.targets or ())) for r, p in zip(regions, problems)]
    if not pairs or not all(r and true for r, true in pairs):
        return None
    return sum(len(r & true) / len(true) for r, true in pairs) / len(pairs)


def calibrate(ref, task, config, scenes=32):
    """Recall of the M regions that each layer attends to most [L], on scenes with known targets.

    Which layer looks where it should differs from model to model: it is found, not assumed.
    """
    problems = [task.problem("calibration", config.seed, i) for i in range(scenes)]
    key = ("calibration", config.seed)
    rollout = answer(ref, task, problems, config.group, config.temperature, key)
    by_layer = read_reference(ref, rollout, config, range(ref.num_layers))
    best = by_layer.topk(min(config.hint_regions, by_layer.shape[-1])).indices.tolist()  # [L][B][M]
    return [recall(regions, problems) for regions in best]


# ------------------------------------------------------------------------------------------- hint
@dataclass
class Hint:
    """What the teacher may read and the student may not."""

    regions: list  # M indices, in reading order; none if the text names no region
    text: str
    rejected: bool  # its steps failed the spoiler filter and were left out


def build_hints(policy, task, rollout, config, key):
    """One hint a group: where to look (the M regions of highest score) and which steps to take.

    Zero-spoiler rule: M is fixed and the regions' names are a closed vocabulary, so that the list
    cannot state a count; the steps are the task's text and pass a filter. Only `answer`, the
    answer-conditioned baseline, is exempt.
    """
    G, hints = config.group, []
    for b, (problem, prompt) in enumerate(zip(rollout.problems, rollout.prompts)):
        names = policy.region_names(prompt)
        score = torch.rand(len(names), generator=generator(*key, b, "ties")).double() * 1e-9
        if config.hint == "attention":  # random: the noise alone
            score += rollout.relevance[b, : len(names)].cpu()
        elif config.hint == "votes":  # regions the answers named: is attention more than an echo?
            for g in rollout.grades[b * G : b * G + G]:
                score[list(set(g.points))] += 1
        elif config.hint == "oracle":
            score[problem.targets] += 1
        regions = sorted(score.topk(min(config.hint_regions, len(names))).indices.tolist())
        rejected = spoils(problem.steps, problem.answer)
        where = [names[r] for r in regions] if config.hint_parts != "steps" else []
        steps = problem.steps if config.hint_parts != "where" and not rejected else ""
        others = {"none": "", "answer": task.hint_text([], "", problem.answer)}
        text = others.get(config.hint, task.hint_text(where, steps))
        shown = regions if where and config.hint not in others else []
        hints.append(Hint(shown, text, rejected))
    return hints


# -------------------------------------------------------------------------------- tutored teacher
@torch.no_grad()
def tutor(ref, rollout, config):
    """The frozen reference re-reads failed answers: same picture, same ids, the hint in context.

    q_t = pi_ref(. | x, h, y_<t) for all t of y_i, where i failed and the solved share of its group
    is below tau; the rest of a group comes along unused. Fills distill [N], those i, and teacher
    [N, T, H], hidden states, V/H times smaller than logits. Nobody generates with the hint.
    """
    G, size = config.group, config.micro_batch or config.prompts
    failed = ~rollout.solved & (rollout.solved_share < config.tau).repeat_interleave(G)
    rollout.distill = torch.ones_like(failed) if config.distill_on == "all" else failed
    rollout.teacher = ref.head_weight.new_zeros(*rollout.mask.shape, ref.head_weight.shape[1])
    groups = rollout.distill.view(-1, G).any(1).nonzero()[:, 0].tolist()
    groups = groups[own(len(groups))]
    asked = list(zip(rollout.problems, [hint.text for hint in rollout.hints], rollout.prompts))
    for some in (groups[i : i + size] for i in range(0, len(groups), size)):
        tutored = [ref.encode(*asked[b]) for b in some]
        assert all(t.pixels is asked[b][2].pixels for t, b in zip(tutored, some))
        rows = torch.cat([torch.arange(b * G, b * G + G) for b in some])
        rollout.teacher[rows] = ref.forward(tutored, rollout.completion[rows])[0]
    over_ranks(rollout.teacher)


# ----------------------------------------------------------------------------------------- losses
CLIP = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # low, high


def policy_loss(logp, logp_old, adv, mask, algorithm="grpo"):
    """Clipped loss of each token: -min(rho A, clip(rho, 1 - low, 1 + high) A) (paper, GRPO).

    rho = pi_theta / pi_old; logp, logp_old [N, T], adv [N], mask bool [N, T] -> [N, T]. dapo clips
    higher (2503.14476), *without* dynamic sampling, which drops the very groups that need a tutor.
    gspo has one rho an answer, the geometric mean over its tokens (2507.18071). At the first update
    on a batch rho is 1, and nothing is clipped.
    """
    low, high = CLIP[algorithm]
    log_rho = (logp - logp_old).clamp(-20, 20)
    if algorithm == "gspo":
        log_rho = (log_rho * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    rho, adv = log_rho.exp().expand_as(logp), adv[:, None]
    return -torch.minimum(rho * adv, rho.clamp(1 - low, 1 + high) * adv)


def kl_to_ref(logp, logp_old, logp_ref):
    """KL(pi_theta || pi_ref) of each token: rho (e^d - d - 1), d = log pi_ref - log pi_theta.

    All [N, T]. The k3 estimator alone has the gradient of the *other* KL; the differentiable
    ratio rho = pi_theta / pi_old, 1 in value at the first update, makes it the right one.
    """
    d = (logp_ref - logp).clamp(-20, 20)
    return (logp - logp_old).clamp(-20, 20).exp() * (d.exp() - d - 1)


# A divergence on buckets takes their masses p (student) and q (teacher) and gives its summand in
# each, never negative, and its slope, the derivative of the sum by the bucket's p.
TINY = 1e-30  # far below any mass that counts


def js_buckets(p, q):
    """Jensen-Shannon: (p log(p/m) + q log(q/m)) / 2 with m = (p + q) / 2; slope log(p/m) / 2.

    With x = (p - q) / (p + q), p is m (1 + x) and q is m (1 - x): nothing cancels where p is near
    q. Detaching p but not m, as the authors' code does, makes the gradient exactly 0.
    """
    x = (p - q) / (p + q).clamp_min(TINY)
    near = x**2 / 2 + x**4 / 12 + x**6 / 30
    far = (torch.special.xlog1py(1 + x, x) + torch.special.xlog1py(1 - x, -x)) / 2
    value = (p + q) / 2 * torch.where(x.abs() < 0.01, near, far)
    return value, torch.log1p(x.clamp_min(torch.finfo(x.dtype).eps - 1)) / 2


def forward_kl_buckets(p, q):
    """KL(q || p), teacher to student; p - q is added, which sums to 0 and keeps each term >= 0."""
    ratio = q.clamp_min(TINY) / p.clamp_min(TINY)
    return q * ratio.log() - q + p, 1 - ratio


def reverse_kl_buckets(p, q):
    """KL(p || q), student to teacher."""
    log_ratio = (p.clamp_min(TINY) / q.clamp_min(TINY)).log()
    return p * log_ratio - p + q, log_ratio


DIVERGENCES = dict(jsd=js_buckets, forward_kl=forward_kl_buckets, reverse_kl=reverse_kl_buckets)


def topk_jsd(student_logits, teacher_logits, k, divergence="jsd"):
    """JSD of two next-word distributions: the Top-K of both one by one, the rest in one bucket.

    JSD(p || q) = KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2 (paper, Top-K JSD). Logits
    [..., V] -> [...] in nats, 0 to ln 2, never above the exact JSD, exact at k >= V. The teacher's
    Top-K belongs to the support: a word that the hint makes likely may be one that the student
    ranks low. The gradient goes to the student alone. This is the definition, for reading and for
    tests; training calls token_stats.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    p, q = student_logits.to(wide).softmax(-1), teacher_logits.detach().to(wide).softmax(-1)
    k = min(k, p.shape[-1])
    seen = torch.zeros_like(p, dtype=torch.bool)
    seen = seen.scatter(-1, p.topk(k).indices, True).scatter(-1, q.topk(k).indices, True)
    p, q = (torch.cat([x * seen, (x * ~seen).sum(-1, keepdim=True)], -1) for x in (p, q))
    value, slope = DIVERGENCES[divergence](p.detach(), q)
    return (value + slope * (p - p.detach())).sum(-1)  # adds 0 to the value: the gradient is slope


def entropy(logits):
    """Entropy -sum p log p in nats; logits [..., V] -> [...]. For monitoring, never a bonus."""
    p = logits.softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1)


def token_stats(hidden, weight, targets, teacher_hidden=None, teacher_weight=None, k=10,
                temperature=1.0, chunk=256, suppress_ids=(), divergence="jsd"):  # fmt: skip
    """Log-prob of targets, entropy, Top-K divergence of softmax(hidden @ weight.T / temperature).

    hidden [N, H], weight [V, H], targets [N] -> three [N], float32 or wider. teacher_hidden [F, H]
    is of the first F tokens; the others get 0, and cost no work of the teacher's. suppress_ids
    have mass 0 on both sides. Gradients of log-prob and divergence reach hidden and weight.

    The same as topk_jsd and entropy, without [N, V]: two buffers [chunk, V], and five products of
    [N, H] and [H, V]. The gradient
        d/dz_v = p_v (g_jsd (slope_c - sum_b p_b slope_b) - g_logp) + [v = target] g_logp
    with c the bucket of v is softmax times one scalar a token, but for the ids in the union.
    """
    suppress = torch.tensor(list(suppress_ids), dtype=torch.long, device=hidden.device)
    options = k, temperature, chunk, suppress, DIVERGENCES[divergence]
    return TokenStats.apply(hidden, weight, targets, teacher_hidden, teacher_weight, *options)


class TokenStats(torch.autograd.Function):
    """token_stats for autograd, in chunks. Here N counts tokens, and T is the temperature."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher, head, k, T, chunk, suppress, buckets):
        """Values, and what backward needs of them: log-sum-exp, union and slopes of each token.

        A chunk's logits z [c, V] are used up by masses_. So what is asked of single ids is taken
        out beforehand; `once` keeps an id that both Top-K hold from being counted twice.
        """
        N, V, taught = len(hidden), len(weight), 0 if teacher is None else len(teacher)
        k = min(k, V) if taught else 0
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy, jsd, lse = (hidden.new_zeros(N, dtype=wide) for _ in range(4))
        union = targets.new_zeros(N, 2 * k, dtype=torch.int32)  # sorted, with repeats
        slopes = hidden.new_zeros(N, 2 * k + 1, dtype=wide)  # of each bucket, less their mean
        buffers = hidden.new_empty(2, min(chunk, N), V, dtype=wide)
        cuts = [*range(0, taught, chunk), *range(taught, N, chunk), N]  # no chunk has both kinds
        for a, b in pairwise(cuts):
            z, t = buffers[:, : b - a]
            logits_(z, hidden[a:b], weight, T, suppress)
            if a < taught:
                logits_(t, teacher[a:b], head, T, suppress)
                union[a:b] = torch.cat([z.topk(k)[1], t.topk(k)[1]], 1).sort(1)[0]
            ids = union[a:b].long()
            once = torch.ones_like(slopes[a:b], dtype=torch.bool)  # [c, 2K + 1], last: the rest
            once[:, 1:-1] = ids[:, 1:] != ids[:, :-1]
            target = z.gather(1, targets[a:b, None])[:, 0].double()
            q = masses_(t, ids, once, out=t)[0] if a < taught else None
            p, norm, entropy[a:b] = masses_(z, ids, once, out=t)
            logp[a:b], lse[a:b] = target - norm, norm
            if a < taught:
                value, slope = buckets(p, q)
                jsd[a:b] = (value * once).sum(1)
                slopes[a:b] = slope - (p * slope * once).sum(1, keepdim=True)
        ctx.save_for_backward(hidden, weight, targets, lse, union, slopes)
        ctx.constants = T, min(chunk, N), suppress, cuts
        ctx.mark_non_differentiable(entropy)
        return logp, entropy, jsd

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, _, g_jsd):
        """The gradient by logits z, as in token_stats, then dh = grad W / T and dW = grad' h / T.

        With s_c = slope_c - sum_b p_b slope_b, saved for each id of the union and for the rest,
            grad_v = p_v (g_jsd s_c - g_logp) + [v = target] g_logp
        is one factor for a whole row, that of the rest; ids of the union are overwritten.
        """
        hidden, weight, targets, lse, union, slopes = ctx.saved_tensors
        T, chunk, suppress, cuts = ctx.constants
        dh = torch.empty_like(hidden, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        buffer = lse.new_empty(chunk, len(weight))
        for a, b in pairwise(cuts):
            z = logits_(buffer[: b - a], hidden[a:b], weight, T, suppress)
            p, ids = z.sub_(lse[a:b, None]).exp_(), union[a:b].long()
            scale = g_jsd[a:b, None] * slopes[a:b] - g_logp[a:b, None]  # [c, 2K + 1]
            listed = p.gather(1, ids) * scale[:, :-1]
            grad = p.mul_(scale[:, -1:]).scatter_(1, ids, listed)  # adding to it would round
            grad.scatter_add_(1, targets[a:b, None], g_logp[a:b, None]).index_fill_(1, suppress, 0)
            if dh is not None:
                matmul_(dh[a:b], grad, weight, beta=0, alpha=1 / T)
            if dw is not None:
                matmul_(dw, grad.T, hidden[a:b], beta=1, alpha=1 / T)
        return dh, dw, *[None] * 8


def matmul_(out, a, b, **scale):
    """out = beta out + alpha a @ b in out's precision: logits rounded to bf16 shift the JSD."""
    if out.is_cuda and b.dtype != out.dtype:
        return torch.addmm(out, a.to(b.dtype), b, out_dtype=out.dtype, out=out, **scale)
    return out.addmm_(a.to(out.dtype), b.to(out.dtype), **scale)


def logits_(out, hidden, weight, T, suppress):
    """Logits into out; those of suppressed ids so low that exp gives 0, as for -inf, and no NaN."""
    matmul_(out, hidden, weight.T, beta=0, alpha=1 / T)
    return out.index_fill_(1, suppress, -1e30)


def masses_(z, ids, once, out):
    """Masses of ids and of the rest, log-sum-exp, entropy of logits z [c, V], which are used up.

    The rest is a sum of its own, as 1 - sum(listed) has no right digit below 1e-7, and of blocks in
    float64, as the 6e-8 that a float32 sum is off by would show in a JSD of 1e-8.
    """
    top, cut = z.amax(1, keepdim=True), z.shape[1] // 1024 * 1024
    listed = (z.gather(1, ids).double() - top).exp()
    e = torch.exp(z.sub_(top), out=out)
    mean = 0 if out is z else z.mul_(e).sum(1, keepdim=True)  # of the teacher: not asked for
    blocks = e.scatter_(1, ids, 0)[:, :cut].reshape(len(e), cut // 1024, 1024).sum(2).double()
    rest = blocks.sum(1, keepdim=True) + e[:, cut:].sum(1, keepdim=True)
    total = rest + (listed * once[:, :-1]).sum(1, keepdim=True)
    norm, entropy = top + total.log(), total.log() - mean / total
    return torch.cat([listed, rest], 1) / total, norm[:, 0], entropy[:, 0]


def weigh_tokens(rollout, config, distill_weight):
    """What each token of an update weighs in each loss, fixed before the first backward pass.

    A mean is a sum of w[i, t] * value[i, t], all [N, T]. The denominators in w are those of the
    whole update, so that cutting it into micro-batches, or over processes, changes nothing:
        policy and KL   1 / (N |y_i|), the mean of the answers' means; dapo: 1 / sum_i |y_i|
        JSD             1 / |F|, F the tokens of all answers to distil, in the whole update
    With few failures left, |F| is small and each of their tokens carries much of lambda.
    """
    mask = rollout.mask.float()
    mean = mask / mask.sum(1, keepdim=True) / len(mask)
    if config.algorithm == "dapo":
        mean = mask / mask.sum()
    distill = torch.zeros_like(mask) if rollout.distill is None else mask * rollout.distill[:, None]
    kl_on = 1
    if config.kl_on == "untutored":  # for GRPO too: the groups that tutoring would take
        kl_on = (rollout.solved_share >= config.tau).repeat_interleave(config.group)[:, None]
    rollout.policy_weights = config.policy_weight * mean
    rollout.kl_weights = config.kl_weight * mean * kl_on
    rollout.jsd_weights = distill_weight * distill / distill.sum().clamp_min(1)


def total_loss(policy, ref, part, config):
    """policy loss + beta * KL + lambda * L_PTD over the groups of `part` (paper, objective).

    Returns the loss, a sum of weight * value, and values of each token [N, T] by name.
    """
    hidden, _ = policy.forward(part.prompts, part.completion)
    # token_stats wants the taught tokens first and no padding; `order` is the way there and back.
    taught = part.mask & (False if part.teacher is None else part.distill[:, None])
    order = torch.cat([m.flatten().nonzero()[:, 0] for m in (taught, part.mask & ~taught)])
    teacher = None if part.teacher is None else part.teacher[taught]
    student = (hidden.flatten(0, 1)[order], policy.head_weight, part.completion.flatten()[order])
    over = {"temperature": config.temperature, "suppress_ids": policy.suppress_ids}
    over |= {"k": config.top_k, "divergence": config.divergence}
    stats = token_stats(*student, teacher, ref.head_weight, **over)
    empty = torch.zeros(part.mask.numel(), device=hidden.device)
    logp, ent, jsd = (empty.index_copy(0, order, s).view_as(part.mask) for s in stats)
    logp_old = logp.detach() if part.logp_old is None else part.logp_old
    gain = policy_loss(logp, logp_old, part.adv, part.mask, config.algorithm)
    kl = kl_to_ref(logp, logp_old, part.logp_ref)
    loss = (part.policy_weights * gain + part.kl_weights * kl + part.jsd_weights * jsd).sum()
    return loss, {"logp": logp, "entropy": ent, "jsd": jsd, "kl": kl}


# ----------------------------------------------------------------------------------------- update
def update(policy, ref, optimizer, rollout, config, distill_weight):
    """Move the weights: `updates_per_batch` steps of AdamW, each on its share of the groups.

    Returns values of each token [N, T] by name, and the mean norm of the gradients. An update with
    a loss or a gradient that is not finite is skipped, and the rollout told so.
    """
    whole, norms, skipped = [], [], []
    learned = [p for p in policy.parameters() if p.requires_grad]
    if config.updates_per_batch > 1:  # the later updates see a policy that has moved
        weigh_tokens(rollout, config, distill_weight)  # total_loss asks for them
        with torch.no_grad():
            parts = rollout.mine().parts(config.micro_batch)
            old = [total_loss(policy, ref, part, config)[1]["logp"] for part in parts]
        rollout.logp_old = gather(torch.cat(old), len(rollout.problems))
    for share in rollout.parts(count=config.updates_per_batch):
        weigh_tokens(share, config, distill_weight)
        optimizer.zero_grad()
        values, loss = [], 0
        for part in share.mine().parts(config.micro_batch):
            summand, tokens = total_loss(policy, ref, part, config)
            summand.backward()
            loss += summand.detach()
            values.append(torch.stack([v.detach() for v in tokens.values()], 1))  # [n, 4, T]
        whole.append(gather(torch.cat(values), len(share.problems)))
        for p in learned:
            over_ranks(p.grad)
        norms.append(torch.nn.utils.clip_grad_norm_(learned, config.clip_norm))
        checked = dict(zip(tokens, whole[-1].unbind(1)), loss=over_ranks(loss), gradient=norms[-1])
        broken = [name for name, v in checked.items() if not v.isfinite().all()]
        skipped += broken
        if not broken:
            optimizer.step()
    rollout.skipped = next(iter(skipped), None)
    return dict(zip(tokens, torch.cat(whole).unbind(1))), sum(n.item() for n in norms) / len(norms)


# ---------------------------------------------------------------------------- metrics and monitor
def mean_where(values, mask):
    """Mean of values where mask is true, None where it never is."""
    return values[mask].mean().item() if mask.any() else None


def step_metrics(rollout, tokens, grad_norm):
    """The whole step in numbers; with those of other functions, all that metrics.jsonl holds:

    step: training steps so far; all other numbers of a row are over the whole step
    reward: mean reward of the sampled answers
    solved: share of sampled answers that are solved
    groups_all_failed: share of groups without a solved answer: on 0/1 rewards GRPO learns nothing
    groups_mixed: share of groups with solved and failed answers: on 0/1 rewards all that GRPO sees
    groups_all_solved: share of groups with solved answers only: nothing is left to learn
    distilled: share of answer tokens that are distilled; if small, each carries much of lambda
    jsd: mean Top-K JSD (or --divergence) of the distilled tokens in nats; null if none is
    kl: mean estimate of the KL to the reference over answer tokens, in nats; grows slowly
    entropy: mean exact entropy of the policy over answer tokens, in nats
    entropy_failed: entropy over failed answers alone; null if there are none
    entropy_solved: entropy over solved answers alone; null if there are none
    entropy_slope: change of entropy a step, least squares over the last 10 steps
    grad_norm: norm of the gradient before clipping, mean over the updates of the step
    skipped: 0, or the quantity that was not finite, so that an update was left out
    completion_length: mean tokens of an answer, its end included
    hint_recall: share of the true targets among the hinted regions (M of R; by chance M/R), or null
    hints_rejected: share of hints whose steps failed the spoiler filter; should be 0
    accuracy: held-out pictures, greedy: share solved; null between evaluations
    point_f1: held-out pictures, greedy: F1 of the named regions against the targets
    right_reason: held-out pictures, greedy: share solved with exactly the targets named
    seconds: wall time of the step, evaluation included
    """
    mask, solved, share = rollout.mask, rollout.solved[:, None], rollout.solved_share
    hints = rollout.hints or []
    distilled = mask & rollout.distill[:, None] if hints else mask & False
    return {
        "reward": rollout.reward.mean().item(),
        "solved": share.mean().item(),
        "groups_all_failed": (share == 0).float().mean().item(),
        "groups_mixed": ((share > 0) & (share < 1)).float().mean().item(),
        "groups_all_solved": (share == 1).float().mean().item(),
        "distilled": (distilled.sum() / mask.sum()).item(),
        "jsd": mean_where(tokens["jsd"], distilled),
        "kl": mean_where(tokens["kl"], mask),
        "entropy": mean_where(tokens["entropy"], mask),
        "entropy_failed": mean_where(tokens["entropy"], mask & ~solved),
        "entropy_solved": mean_where(tokens["entropy"], mask & solved),
        "grad_norm": grad_norm,
        "skipped": rollout.skipped or 0,
        "completion_length": mask.sum(1).float().mean().item(),
        "hint_recall": recall([h.regions for h in hints], rollout.problems),
        "hints_rejected": sum(h.rejected for h in hints) / len(hints) if hints else None,
    }


METRICS = dict(re.findall(r"^    (\w+): (.+)$", step_metrics.__doc__, re.MULTILINE))


@dataclass
class Monitor:
    """Watches the last 10 steps for signals that have died; says each cause once, with a remedy."""

    start_entropy: float | None = None
    recent: list = field(default_factory=list)  # rows
    said: list = field(default_factory=list)
    skipped: int = 0  # steps in a row

    def watch(self, row, chance):
        """Add entropy_slope to the row -> new warnings. chance: recall of random regions, M/R."""
        self.skipped = self.skipped + 1 if row["skipped"] else 0
        if self.skipped:  # the other numbers say nothing
            row["entropy_slope"] = None
            return [f"{row['skipped']} is not finite, update skipped: lower --lr"]
        self.start_entropy = self.start_entropy or row["entropy"]
        self.recent = [*self.recent, row][-10:]
        x = torch.arange(len(self.recent)) - (len(self.recent) - 1) / 2
        y = torch.tensor([r["entropy"] for r in self.recent])
        row["entropy_slope"] = ((x * y).sum() / (x * x).sum()).item() if len(y) > 1 else None
        low = self.start_entropy / 5 if row["solved"] < 0.5 else -1
        signs = [  # dead is what stays between two bounds
            ("groups_mixed", 0, 0, "no mixed group, reward teaches next to nothing: raise --group"),
            ("groups_all_solved", 1, 1, "all is solved, nothing to tutor: raise --difficulty"),
            ("jsd", -1, 1e-4, "JSD near 0, the hint changes nothing: can the base read hints?"),
            ("hint_recall", 0, 1.1 * chance, "hints no better than random: try --hint-layers 2"),
            ("entropy", -1, low, "entropy collapsed, answers fail: lower --lr"),
        ]
        new = []
        for name, least, most, text in signs:
            values = [r[name] for r in self.recent]
            dead = None not in values and all(least <= v <= most for v in values)
            if dead and len(values) == 10 and name not in self.said:
                new.append(f"for 10 steps {text}")
                self.said.append(name)
        return new


# ------------------------------------------------------------------------------------- evaluation
def judge(problems, grades):
    """Held-out scores of one answer a problem; the last two None where targets are unknown."""
    rows = []
    for problem, g in zip(problems, grades):
        named, true = set(g.points or []), set(problem.targets or [])
        f1 = 2 * len(named & true) / max(1, len(named) + len(true))
        rows.append((float(g.solved), f1, float(g.solved and named == true)))
    accuracy, *pointing = (sum(column) / len(rows) for column in zip(*rows))
    known = problems[0].targets is not None and grades[0].points is not None
    f1, right = pointing if known else (None, None)
    return {"accuracy": accuracy, "point_f1": f1, "right_reason": right}


def evaluate(policy, task, problems, hints=None):
    """Scores of greedy answers, with hints or alone."""
    return judge(problems, answer(policy, task, problems, 1, 0.0, ("greedy",), hints).grades)


# --------------------------------------------------------------------------------------- training
LOGS = ("metrics.jsonl", "samples.jsonl")
STOP = []  # signals received: the step in progress is finished and saved first


def collect(policy, ref, task, config, layers, step):
    """All of a step that comes before its update -> Rollout: the sections above, one by one.

    Prompts and noise depend on the seed and the number of the step alone, so both methods see the
    same, and so does a run that is resumed.
    """
    key, first = (config.seed, step), step * config.prompts
    problems = [task.problem("train", config.seed, first + b) for b in range(config.prompts)]
    rollout = answer(policy, task, problems, config.group, config.temperature, key)
    rollout.adv = group_advantages(rollout.reward, config.group)
    read_reference(ref, rollout, config, layers)
    if config.method == "ptdpo":
        rollout.hints = build_hints(policy, task, rollout, config, key)
        tutor(ref, rollout, config)
    return rollout


def train(policy, task, config, folder, resume=False):
    """The training loop: collect, update, measure, log, save.

    All that a run leaves is in `folder`; README lists it. Raises UserError after `max_skipped`
    steps without an update, SystemExit after a signal.
    """
    ref = policy.frozen_copy()
    learned = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, config.lr, weight_decay=config.weight_decay)
    count = min(config.eval_problems, task.held_out)
    if min(config.prompts // config.updates_per_batch, count) < RANKS:
        raise UserError(f"{RANKS} processes: each needs a prompt an update, and a held-out problem")
    held_out = [task.problem(config.eval_split, 0, i) for i in range(count)]
    begin = load_run if resume else start_run
    state = begin(folder, policy, optimizer, task, config, held_out)
    monitor, layers = Monitor(**state["monitor"]), state["layers"] * (config.method == "ptdpo")
    quiet, steps = RANK > 0 or None, range(state["step"] + 1, config.steps + 1)
    for step in tqdm(steps, config.method, disable=quiet):
        began = time.perf_counter()
        rollout = collect(policy, ref, task, config, layers, step)
        decay = 1 - (step - 1) / config.steps if config.distill_decay else 1
        distill_weight = config.distill_weight * decay
        tokens, norm = update(policy, ref, optimizer, rollout, config, distill_weight)
        row = {"step": step, **step_metrics(rollout, tokens, norm)}
        chance = config.hint_regions / len(policy.region_names(rollout.prompts[0]))
        warnings = monitor.watch(row, chance)
        stop = over_ranks(torch.tensor(max(STOP, default=0)), "MAX").item()  # all, or none
        due = step % config.eval_every == 0 or step in (1, config.steps)
        row |= evaluate(policy, task, held_out) if due else dict.fromkeys(state["base"])  # or null
        log(folder / "metrics.jsonl", row | {"seconds": time.perf_counter() - began})
        if due:
            log(folder / "samples.jsonl", sample_row(policy, rollout, tokens, step))
        if due or stop:
            sizes = {name: (folder / name).stat().st_size for name in LOGS}
            state |= {"step": step, "monitor": asdict(monitor), "sizes": sizes}
            write_checkpoint(folder / "checkpoint.safetensors", state, policy, optimizer)
        report(config.method, row, warnings)
        if monitor.skipped >= config.max_skipped:
            raise UserError(f"{folder}: {warnings[0]}; {monitor.skipped} steps in a row, stopped")
        if stop:
            tqdm.write(f"stopped after step {step}: python ptdpo.py --resume {folder}\n", end="")
            raise SystemExit(128 + stop)


def provenance():
    """Which code ran: versions and commit, None without git or outside of a checkout."""
    ask = {"shell": True, "cwd": HERE, "capture_output": True, "text": True}
    commit = subprocess.run("git rev-parse HEAD", **ask).stdout.strip() or None
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    return {"commit": commit, "versions": versions}


def start_run(folder, policy, optimizer, task, config, held_out):
    """Begin a run: choose layers to read, measure the base -> state of step 0.

    run.json is written last: where it is, there is a checkpoint to resume from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_layer = calibrate(policy, task, config)
    best = sorted(range(len(by_layer)), key=lambda i: -by_layer[i])
    state = {"step": 0, "config": asdict(config), "monitor": asdict(Monitor()), **provenance()}
    state |= {"layers": best[: config.hint_layers], "layer_recall": by_layer}
    state |= {"base": evaluate(policy, task, held_out), "sizes": dict.fromkeys(LOGS, 0)}
    state |= {"reference": checksum(dict(policy.named_parameters()))}
    by_rank_0(Path.unlink)(folder / "run.json", True)
    cut_logs(folder, state["sizes"])
    write_checkpoint(folder / "checkpoint.safetensors", state, policy, optimizer)
    write_whole(folder / "run.json", json.dumps(state, indent=1).encode())
    return state


def load_run(folder, policy, optimizer, task, config, _held_out):
    """Go on with a run from its checkpoint; rows that were logged after it are cut off.

    So a step that is done again is logged once. UserError if base or logs are not the run's own.
    """
    reference = checksum(dict(policy.named_parameters()))
    state = read_checkpoint(folder / "checkpoint.safetensors", policy, optimizer)
    if state["reference"] != reference:
        base = config.model or config.base or task.base
        raise UserError(f"{base}: not the base that {folder} began with; put that one back")
    if any((folder / name).stat().st_size < state["sizes"][name] for name in LOGS):
        raise UserError(f"{folder}: logs shorter than at the checkpoint; use another copy")
    cut_logs(folder, state["sizes"])
    return state | {"config": asdict(config)}  # --steps may have changed


@by_rank_0
def cut_logs(folder, sizes):
    """Make the logs as long as they were at a checkpoint; new ones are begun."""
    for name in LOGS:
        (folder / name).touch()
        os.truncate(folder / name, sizes[name])


@by_rank_0
def log(path, row):
    """Append a row to a JSONL file, null for what is not finite, and see it on the disk."""
    row = json.loads(json.dumps(row), parse_constant=lambda _: None)
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def sample_row(policy, rollout, tokens, step):
    """The first group in full: problem, answers, where they looked, the hint, JSD of each token."""
    G, problem = len(rollout.mask) // len(rollout.problems), rollout.problems[0]
    lengths = rollout.mask[:G].sum(1).tolist()
    ids = [one[:n] for one, n in zip(rollout.completion.tolist(), lengths)]
    row = {"step": step, "index": step * len(rollout.problems), "question": problem.question}
    row |= {"answer": problem.answer, "texts": rollout.texts[:G]}
    row |= {"tokens": [[policy.text([i]) for i in one] for one in ids]}
    row |= {"rewards": rollout.reward[:G].tolist(), "solved": rollout.solved[:G].tolist()}
    row |= {"jsd": [v[:n].tolist() for v, n in zip(tokens["jsd"], lengths)], "hint": None}
    if rollout.hints:
        looks = rollout.relevance[0, : len(policy.region_names(rollout.prompts[0]))]
        row |= {"hint": asdict(rollout.hints[0]), "relevance": looks.tolist()}
    return row


@by_rank_0
def report(method, row, warnings):
    """Rows with an evaluation, and warnings, for the terminal.

    A line and its end are written at once: both methods may share the terminal.
    """
    lines = [f"warning: {text}" for text in warnings]
    if row["accuracy"] is not None:
        names = ("reward", "accuracy", "point_f1", "entropy", "groups_all_failed", "jsd")
        lines = ["  ".join(f"{n} {row[n]:.3f}" for n in names if row[n] is not None), *lines]
    for line in lines:
        tqdm.write(f"{method:6} step {row['step']:4}  {line}\n", end="")


# ------------------------------------------------------------------------------------- checkpoint
# One safetensors file holds all that a run goes on from: names and shapes say which model it fits,
# the checksum that it is whole. It is loaded in place, into tensors that policy and AdamW own.
def checksum(tensors, text=""):
    """SHA-256 of a state and its tensors, names and shapes included."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@by_rank_0
def write_whole(path, data):
    """Written aside, synced, renamed: whenever the process dies, one whole file is in place."""
    aside = path.with_suffix(".tmp")
    with open(aside, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def live_tensors(policy, optimizer):
    """All tensors of a checkpoint by name, not copies: what learns and, if given, AdamW's moments.

    AdamW makes its state at its first step; here it is begun at 0, to have a place to load into.
    """
    learned = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    live = {f"policy.{name}": p.detach() for name, p in learned.items()}
    for name, p in learned.items() if optimizer else ():
        moments = {kind: torch.zeros_like(p) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = optimizer.state[p] or {"step": torch.zeros(()), **moments}
        live |= {f"{kind}.{name}": v for kind, v in optimizer.state[p].items()}
    return live


@by_rank_0
def write_checkpoint(path, state, policy, optimizer=None):
    """One file: weights, state of AdamW, `state` as JSON, a checksum. Nothing is pickled."""
    tensors, text = live_tensors(policy, optimizer), json.dumps(state)
    if not all(t.isfinite().all() for t in tensors.values()):
        raise UserError(f"{path}: left as it is, weights are no longer finite; lower --lr")
    write_whole(path, save(tensors, {"state": text, "checksum": checksum(tensors, text)}))


def open_checkpoint(path):
    """What write_checkpoint wrote -> state, tensors. UserError if missing, foreign or damaged."""
    try:
        with safe_open(path, "pt") as f:
            text, expected = ((f.metadata() or {})[name] for name in ("state", "checksum"))
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError, KeyError) as error:
        why = f"no checkpoint of this program ({error})"
        raise UserError(f"{path}: {why}; give another, or start a run with --toy") from None
    if checksum(tensors, text) != expected:
        raise UserError(f"{path}: damaged, its checksum differs; use another copy")
    return json.loads(text), tensors


def read_checkpoint(path, policy, optimizer=None):
    """Load a checkpoint -> state. UserError if it does not fit; nothing is loaded by half."""
    state, tensors = open_checkpoint(path)
    live, nothing = live_tensors(policy, optimizer), torch.empty(0)
    for name in live.keys() | {n for n in tensors if n.startswith("policy.")}:
        new, old = live.get(name, nothing), tensors.get(name, nothing)
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            raise UserError(f"{path}: {name} does not fit this model; is it another version's?")
    for name, tensor in live.items():
        tensor.copy_(tensors[name])
    return state


# ------------------------------------------------------------------------- vision-language models
@dataclass
class HFPrompt:
    """One encoded prompt. With and without a hint, it shares the tensors of its pictures."""

    ids: list
    pixels: torch.Tensor | None  # [patches of all pictures, values of a patch]
    grid: torch.Tensor | None  # [pictures, 3]: frames, rows, columns of patches


class HFPolicy(torch.nn.Module):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL behind the `Policy` protocol.

    Without adapters the weights are float32 and computed with in `dtype` (autocast): steps of 1e-6
    would be lost in bfloat16 weights. With adapters only those are float32; the base is frozen.
    """

    def __init__(self, config):
        """Load --model."""
        from toy_tasks.hub import load_model

        super().__init__()
        self.processor, self.model, self.dtype = load_model(config)
        self.lora, self.frozen = config.lora > 0, False
        self.checkpointing, self.sample_batch = config.checkpointing, config.sample_batch
        settings = self.base.config
        self.num_layers = settings.text_config.num_hidden_layers
        self.merge = settings.vision_config.spatial_merge_size
        self.image_id, video_id = settings.image_token_id, settings.video_token_id
        self.suppress_ids = [self.image_id, video_id]
        # An answer may end with the end of a turn or of a text; the first fills up what follows.
        ends = self.base.generation_config.eos_token_id or []
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = list(dict.fromkeys([self.processor.tokenizer.eos_token_id, *ends]))
        # Logits are float32 in sampling and in the losses: a bfloat16 head would give log-probs of
        # two digits. Frozen under adapters, it is held in float32 as well.
        self.head = self.base.lm_head.weight.detach().float() if self.lora else None

    @property
    def base(self):
        """The model of transformers, with the adapters inside its layers, if any."""
        return self.model.get_base_model() if self.lora else self.model

    @property
    def head_weight(self):
        """The language head [V, H] in float32."""
        return self.head if self.lora else self.model.lm_head.weight

    def text(self, ids):
        """Ids as text, without special tokens."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def frozen_copy(self):
        """The reference. With adapters: this very model with them off, no second set of weights."""
        ref = copy.copy(self)  # shares tokenizer and settings
        ref._modules, ref.frozen = dict(self._modules), True
        if not self.lora:
            ref.model = copy.deepcopy(self.model).requires_grad_(False)
            for module in ref.model.model.modules():
                if isinstance(module, torch.nn.Linear):  # autocast would round it at every call
                    module.to(self.dtype)
        return ref

    @contextmanager
    def running(self):
        """Around a pass: precision, adapters off in the reference, checkpointing for gradients."""
        with ExitStack() as stack:
            if self.frozen and self.lora:
                stack.enter_context(self.model.disable_adapter())
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.base.device.type, self.dtype))
            if self.checkpointing:  # in training mode it drops the cache, which sampling needs
                self.model.train(torch.is_grad_enabled())
            yield

    def encode(self, problem, hint="", like=None):
        """Pictures, question, hint -> HFPrompt by the chat template. `like` lends its pixels."""
        content = [{"type": "image"} for _ in problem.images]
        content.append({"type": "text", "text": f"{problem.question}\n\n{hint}".strip()})
        message = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(message, add_generation_prompt=True)
        pixels, grid = (like.pixels, like.grid) if like else (None, None)
        if not like and problem.images:
            seen = self.processor.image_processor(images=problem.images, return_tensors="pt")
            pixels, grid = seen["pixel_values"], seen["image_grid_thw"]
        # The template marks each picture by one token; the model wants one for each of its tokens.
        sizes = [] if grid is None else (grid.prod(1) // self.merge**2).tolist()
        mark = self.processor.tokenizer.convert_ids_to_tokens(self.image_id)
        first, *rest = text.split(mark)
        if len(rest) != len(sizes):
            raise UserError(f"a problem contains {mark}, which stands for a picture; remove it")
        text = first + "".join(mark * n + after for n, after in zip(sizes, rest))
        return HFPrompt(self.processor.tokenizer(text)["input_ids"], pixels, grid)

    def pack(self, prompts):
        """Prompts, padded on the left, and all their pictures as inputs of the model; which tokens
        are no padding, bool [B, P]; and the position of the first answer token [B].

        A token has three positions, [3, B, P]: time, row and column. They differ in pictures alone.
        """
        P, device = max(len(p.ids) for p in prompts), self.base.device
        ids = torch.tensor([[self.stop_ids[0]] * (P - len(p.ids)) + p.ids for p in prompts])
        real = torch.tensor([[0] * (P - len(p.ids)) + [1] * len(p.ids) for p in prompts])
        pictured = [p for p in prompts if p.grid is not None]
        grid = torch.cat([p.grid for p in pictured]) if pictured else None
        # A picture takes as many positions as its longer side has tokens: fewer than columns.
        kinds = (ids == self.image_id).long()
        positions, shift = self.base.model.get_rope_index(ids, kinds, grid, attention_mask=real)
        start, real = real.sum(1) + shift[:, 0], real.bool()
        eye = torch.eye(P, dtype=torch.bool)  # padding sees itself: a row that sees nothing is NaN
        seen = (torch.ones_like(eye).tril() & real[:, None] | eye)[:, None]
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": seen}
        if pictured:
            pixels = torch.cat([p.pixels for p in pictured])
            inputs |= {"pixel_values": pixels, "image_grid_thw": grid}
        inputs = {name: x.to(device) for name, x in inputs.items()}
        return inputs, real.to(device), start.to(device)

    @torch.no_grad()
    def sample(self, prompts, uniforms, temperature):
        """Answers [N, T] by uniforms [N, T], stop_ids[0] after the end; temperature 0 is greedy.

        Pictures and prompts are read once, then the cache is repeated for the group.
        """
        G, half = len(uniforms) // len(prompts), len(prompts) // 2
        if half and len(uniforms) > self.sample_batch:
            one = self.sample(prompts[:half], uniforms[: half * G], temperature)
            return torch.cat([one, self.sample(prompts[half:], uniforms[half * G :], temperature)])
        with self.running():
            inputs, real, start = self.pack(prompts)
            out = self.base.model(**inputs, use_cache=True)  # B rows, for all N answers
            cache, hidden = out.past_key_values, out.last_hidden_state[:, -1]
            cache.batch_repeat_interleave(G)
            hidden, real, start = (x.repeat_interleave(G, 0) for x in (hidden, real, start))
            uniforms, (N, P), T = uniforms.to(real.device), real.shape, uniforms.shape[1]
            seen = torch.cat([real, real.new_ones(N, T)], 1)[:, None, None]
            stop = torch.tensor(self.stop_ids, device=real.device)
            said, done = stop[0].repeat(N, T), torch.zeros_like(real[:, 0])
            for t in range(T):
                with torch.autocast(real.device.type, enabled=False):
                    logits = hidden.float() @ self.head_weight.T
                logits[:, self.suppress_ids] = -math.inf  # they would be taken for pictures
                token = logits.argmax(-1)
                if temperature > 0:  # `<=`, lest u = 0 take a token of probability 0
                    total = (logits.double() / temperature).softmax(-1).cumsum(-1)
                    token = (total <= uniforms[:, t, None] * total[:, -1:]).sum(-1)
                said[:, t] = torch.where(done, said[:, t], token)
                done |= torch.isin(token, stop)
                if done.all() or t == T - 1:
                    return said
                step = {"input_ids": said[:, t, None], "attention_mask": seen[..., : P + t + 1]}
                step["position_ids"] = (start + t)[None, :, None].expand(3, -1, -1)
                out = self.base.model(**step, past_key_values=cache, use_cache=True)
                hidden = out.last_hidden_state[:, 0]

    def forward(self, prompts, completion, mask=None, layers=()):
        """Teacher-forced: hidden float32 [N, T, H] after the last norm, and attention on regions.

        One packed row a prompt, attended to in toy_tasks/hub.py (packed_attention):
            prompt but its last token (P) | answer 1: T columns | ... | answer G: T columns
        Each answer begins with a copy of the last prompt token, the one that predicts its first.
        Columns behind the longest answer are 0 and cost nothing.
        """
        used = int((completion != self.stop_ids[0]).sum(1).max()) + 1  # columns, the end included
        full, completion = completion.shape[1], completion[:, :used]
        with self.running():
            inputs, real, start = self.pack(prompts)
            ids, positions = inputs["input_ids"], inputs["position_ids"]
            (N, T), B, P = completion.shape, len(ids), ids.shape[1] - 1
            G, device = N // B, ids.device
            answers = torch.cat([ids[:, P:].repeat_interleave(G, 0), completion[:, :-1]], 1)
            places = start[:, None] - 1 + torch.arange(T, device=device).repeat(G)
            # What an answer sees: the prompt but for padding, and its own tokens up to this one;
            # bool [N, 1, T, P + T]. The prompt sees itself alone, hence inputs' mask [B, 1, P, P].
            past = torch.ones(T, T, dtype=torch.bool, device=device).tril().expand(N, -1, -1)
            before = real[:, None, :P].expand(-1, T, -1).repeat_interleave(G, 0)
            own = torch.cat([before, past], 2)[:, None]
            # The positions are explicit: every answer goes on where the prompt ends. `looks` is
            # filled on the way, by layer.
            inputs["input_ids"] = torch.cat([ids[:, :P], answers.view(B, -1)], 1)
            inputs["position_ids"] = torch.cat([positions[..., :P], places.expand(3, -1, -1)], 2)
            inputs["attention_mask"] = inputs["attention_mask"][..., :P, :P]
            tokens, looks = mask[:, :T] if layers else None, dict.fromkeys(layers)
            inputs |= {"own": own, "tokens": tokens, "looks": looks, "use_cache": False}
            hidden = self.base.model(**inputs).last_hidden_state[:, P:].reshape(N, T, -1).float()
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, full - T))
        if not layers:
            return hidden, None
        looks = torch.stack([*looks.values()]).unflatten(1, (B, G))
        regions = self.regions(prompts, P).to(device)
        return hidden, torch.einsum("lbgp,bpr->lbgr", looks, regions).flatten(1, 2)

    def region_names(self, prompt):
        """Nine places a picture, with the number of the picture if there are several."""
        n = 0 if prompt.grid is None else len(prompt.grid)
        return [f"picture {k + 1}: {p}" if n > 1 else p for k in range(n) for p in PLACES]

    def regions(self, prompts, P):
        """Weights [B, P, R] of prompt columns in regions, R for the most pictures of a prompt.

        A region gets the *mean* of its tokens: thirds differ in size when a side is no multiple of
        three, and a sum would favour the larger. A third that holds no token's centre gets 0.
        """
        table = torch.zeros(len(prompts), P, max(len(self.region_names(p)) for p in prompts))
        for b, p in enumerate(prompts):
            at = P + 1 - len(p.ids) + (torch.tensor(p.ids) == self.image_id).nonzero()[:, 0]
            for n, (_, *sides) in enumerate([] if p.grid is None else p.grid // self.merge):
                # the third that holds the centre (i + 1/2) / side of token i
                row, column = ((6 * torch.arange(side) + 3) // (2 * side) for side in sides)
                place = (9 * n + 3 * row[:, None] + column).flatten()
                table[b, at[: len(place)], place], at = 1, at[len(place) :]
        return table / table.sum(1, keepdim=True).clamp_min(1)


# ---------------------------------------------------------------------------------- start of a run
def make_config(given):
    """Config from flags by name, each checked."""
    if given.get("model"):
        given = MODEL_DEFAULTS | ({"lr": 1e-5} if given.get("lora") else {}) | given
    config = Config(**{f.name: given[f.name] for f in fields(Config) if f.name in given})
    for f in fields(Config):
        value, least = getattr(config, f.name), f.metadata["least"]
        choices = f.metadata["choices"] or (value,)
        if value not in choices or (least is not None and not least <= value < 2**31):
            known = " or ".join(map(str, choices)) if value not in choices else f"at least {least}"
            raise UserError(f"--{f.name.replace('_', '-')} {value}: give {known}")
    names = list(vars(config))
    unread = ["task", "base"] if config.model else names[names.index("model") + 1 :]
    unread += ["train_vision"] * (config.lora > 0)  # adapters sit in the decoder alone
    if config.model:
        unread += ["eval_split"] if config.data else ["columns", "allow_outside"]
    for name in unread:  # it would be stored with the run, and be a lie
        if getattr(config, name) != getattr(Config, name):
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} has no effect here (see --model, --lora, --data); leave it out"
            )
    return config


def toy(config, trained=True):
    """Policy and task of the toy; trained: with the weights of the warm-started base."""
    torch.set_num_threads(config.threads)
    torch.set_deterministic_debug_mode("error")  # their usual switch imports a compiler first
    task = TASKS[config.task](config.difficulty)
    policy = task.new_policy(config.seed)
    if trained:
        path = config.base or task.base
        read_checkpoint(HERE / path if (HERE / path).exists() else Path(path), policy)
    return policy, task


def setup(config, task=None):
    """Policy and task of a run. Bad data are found before a model is loaded."""
    if config.model:
        torch.set_num_threads(config.threads)
        task = task or text_task(config)
    return (HFPolicy(config), task) if config.model else toy(config)


def run(config, folder, resume, task=None):
    """Train one run; a signal lets it finish its step and save."""
    STOP.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: STOP.append(n))
    train(*setup(config, task), config, folder, resume)


def main(argv=None):
    """Entry point -> exit code. The flags are the fields of Config and toy_tasks/commands.py."""
    from toy_tasks import commands

    return commands.guard(commands.command, sys.argv[1:] if argv is None else argv)


sys.modules["ptdpo"] = sys.modules[__name__]  # `import ptdpo` is this very module, also as a script
if __name__ == "__main__":
    sys.exit(main())
