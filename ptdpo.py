"""PTD-PO (Privileged Tutoring Distillation Policy Optimization, arXiv 2606.07000) in one file.

    python ptdpo.py --toy                               train GRPO and PTD-PO side by side on a CPU
    python ptdpo.py --model Qwen/Qwen2-VL-2B-Instruct   train a vision-language model
    python ptdpo.py --resume runs/toy --steps 200       go on with a run
    python ptdpo.py --eval runs/toy/ptdpo               measure a run on held-out problems
    python ptdpo.py --help                              all flags; --help-metrics: all metrics

A model answers a question about a picture G times. GRPO favours the answers whose reward is above
the mean of their group, so it learns nothing from a group whose rewards are all equal. PTD-PO adds
a teacher for failed answers. A frozen copy of the model reads them, and the regions of the picture
that it attends to become a hint that does not contain the solution. With this hint in its prompt,
the copy reads the failed answers again and predicts the next token at each of their positions. The
model is trained towards these predictions. The model itself never sees the hint.

    student     the model that learns           answer     what the student wrote
    reference   a frozen copy of it             solution   the true answer (problem.answer)
    teacher     the reference with the hint     to read    one pass over a given text (teacher
                in its prompt                              forcing); nothing is generated

    loss = policy loss + beta KL(pi_theta || pi_ref) + lambda JSD(p_t, q_t)

    x     prompt: pictures and a question              h     hint
    y_i   answer i, of |y_i| tokens, sampled           r_i   its reward
    p_t   student pi_theta(. | x, y_<t)                A_i   its advantage
    q_t   teacher pi_ref(. | x, h, y_<t)               JSD   Jensen-Shannon divergence, in nats
    rho   pi_theta / pi_old of a token; pi_old is the student as it was when it sampled

    equation                                           function
    A_i = (r_i - mean r) / (std r + eps)               group_advantages
    -min(rho A, clip(rho, 1 - low, 1 + high) A)        policy_loss (low and high: CLIP)
    rho (e^d - d - 1), d = log pi_ref - log pi_theta   kl_to_reference
    JSD of two distributions, by their Top-K words     topk_jsd
    the loss: sum of weight times value of each token  token_weights, token_losses

Shapes: B prompts, G answers to each (a group), N = B*G answers, T tokens of an answer, V words of
the vocabulary (a word is one of its tokens), K top-k, H hidden width, R regions of the pictures,
M of them in a hint, L layers, n tokens of a chunk.
Row b*G + g of a tensor [N, ...] is answer g to prompt b. A list [B] has one entry per prompt.

Departures from the paper (docs/results.md gives the reasons):
  1. The reference's attention writes the spatial part of the hint, not a larger model.
  2. The JSD sees the Top-K words of both sides, each with its exact probability.
  3. The JSD is a mean over all distilled tokens of an update, not of a micro-batch.
  4. The JSD has its true gradient. The gradient of the released default is zero.
  5. The KL has the gradient of KL(pi_theta || pi_ref), and acts on all groups.
  6. Answers are sampled from the whole distribution, without top-p.

train_step comes first, then its functions in the order of the step (in step 6 the losses, then the
update), then evaluation, settings, the loop around the step, the Qwen models, torchrun and the
command line.
"""

import argparse
import base64
import copy
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tiny_vlm import pick
from toy_tasks import Problem, UserError
from toy_tasks.counting import Counting
from toy_tasks.free_text import PLACES, FreeText, JsonlTask, spoils

HERE = Path(__file__).resolve().parent
CHUNK = 256  # tokens whose logits [n, V] exist at a time
# RANK, RANKS, together(), over_ranks(), gather() and sum_gradients() belong to torchrun and stand
# near the end. In one process RANK is 0 and RANKS is 1, and the functions do nothing: over_ranks(x)
# and gather(x) are x.


# --------------------------------------------------------------------------------------- the step
def train_step(policy, ref, task, optimizer, config, layers, step):
    """One step of PTD-PO or, with `--method grpo`, of GRPO: the whole algorithm.

    policy is the student, which learns. ref is the frozen base model. It is the reference of the
    KL and, with a hint in its prompt, the teacher. layers: a list with the index of the layer whose
    attention best finds the known targets of calibration problems (measure_base), empty unless
    PTD-PO has `--hint attention`. Returns the metrics of the step and, for samples.jsonl, one group
    in full.
    """
    # Problems and sampling noise depend on the seed, the step and the number of prompts alone
    # (common random numbers): both methods, and a run that was resumed, meet the same ones.
    key = (config.seed, step)
    problems = pose(task, "train", config.seed, step * config.prompts, config.prompts)
    # 1. The student answers each problem G times, and the task grades the answers.
    rollout = sample_and_grade(policy, task, problems, config.group, key)
    # 2. Each reward is compared with the mean of its group.
    advantages = group_advantages(rollout.rewards, config.group)
    # 3. The frozen reference reads the answers: log-probs for the KL, and where it looked.
    logp_ref, relevance = read_answers(ref, rollout, layers, config)
    hints = []
    distill = torch.zeros_like(rollout.solved)
    teacher = [None] * len(problems)  # its hidden states by group; None: nothing to distil
    if config.method == "ptdpo":
        # 4. The regions that were looked at most become a hint.
        hints = build_hints(ref, task, rollout, relevance, config, key)
        # 5. The reference, with the hint in its context, reads the failed answers again.
        distill = answers_to_distill(rollout, config)
        teacher = read_teacher(ref, rollout, hints, distill, config)
    # 6. The student learns from its rewards and from the teacher.
    batch = Batch(
        prompts=rollout.prompts,
        completion=rollout.completion,
        mask=rollout.mask,
        advantages=advantages,
        logp_ref=logp_ref,
        kl_on=answers_under_kl(rollout, config),
        distill=distill,
        teacher=teacher,
    )
    values, grad_norm, skipped = update(policy, ref, optimizer, batch, config, step)
    metrics = step_metrics(policy, task, rollout, hints, distill, values)
    metrics |= {"grad_norm": grad_norm, "skipped": skipped}
    return metrics, sample_row(policy, rollout, hints, relevance, values, config)


# --------------------------------------------------------------------------------------- protocol
# Task, Problem and Grade are defined in toy_tasks/__init__.py. A Problem has images, a question,
# the answer, steps (the textual part of a hint) and, where it is known which regions matter,
# targets. A Grade has the reward, solved and, if the answer names regions, points.
class Policy(Protocol):
    """What the algorithm asks of a model: HFPolicy below, or TinyVLM in tiny_vlm.py.

    Pixels, padding, positions and caches are hidden behind it. It is a torch.nn.Module.
    """

    stop_ids: Sequence[int]  # tokens that end an answer
    suppress_ids: Sequence[int]  # tokens that no answer may hold, such as those for pictures
    num_layers: int
    head_weight: torch.Tensor  # [V, H], the parameter that turns hidden states into logits

    def head(self) -> torch.Tensor:
        """head_weight in the precision of matrix products: cast once, used for many chunks."""

    def encode(self, problem: Problem, hint: str = "", like=None):
        """One prompt from pictures, question and hint. `like` is a prompt to take pixels from."""

    def sample(self, prompts: list, uniforms: torch.Tensor, greedy: bool) -> torch.Tensor:
        """G answers to each prompt, ids [N, T].

        Token t is the first whose cumulative probability exceeds uniforms[:, t].
        """

    def forward(self, prompts: list, completion: torch.Tensor, mask: torch.Tensor, layers=()):
        """Read given answers (teacher forcing) -> hidden [N, T, H], attention [B] of [L, G, R].

        hidden is float32. hidden[:, t] predicts token t; in padding, where mask is false, it may be
        anything finite. attention is that of the predicting positions to the regions of the
        pictures, by layer of `layers`, a mean over heads and over the tokens in mask. Without
        layers the list is empty.
        """

    def region_names(self, prompt) -> list[str]:
        """The R regions that a hint may name."""

    def text(self, ids: list[int]) -> str:
        """Ids as text."""

    def frozen_copy(self) -> "Policy":
        """The reference: the same weights, which never learn."""


class Groups:
    """Whole groups. A field is a list, one entry per prompt [B], or a tensor, a row per answer."""

    def take(self, start, stop):
        """The groups from start up to, and without, stop."""
        group = len(self.mask) // len(self.prompts)
        part = {}
        # A field that is None, since it is not known yet, keeps its default.
        for name, value in vars(self).items():
            if isinstance(value, list):
                part[name] = value[start:stop]
            elif value is not None:
                part[name] = value[start * group : stop * group]
        return type(self)(**part)

    def split(self, size):
        """Micro-batches of `size` groups; 0 stands for all groups."""
        count = len(self.prompts)
        return [self.take(i, i + (size or count)) for i in range(0, count, size or count)]


@dataclass(frozen=True)
class Rollout(Groups):
    """Sampled and graded answers."""

    problems: list  # [B]
    prompts: list  # [B], as the model reads them
    completion: torch.Tensor  # ids [N, T]
    mask: torch.Tensor  # bool [N, T], true up to the first stop token, which is included
    texts: list  # [B][G]
    grades: list  # [B][G]
    rewards: torch.Tensor  # [N]
    solved: torch.Tensor  # bool [N]

    def solved_share(self):
        """Share of solved answers in each group [B]."""
        return self.solved.view(len(self.prompts), -1).float().mean(1)


@dataclass(frozen=True)
class Batch(Groups):
    """What the update needs to know of the groups of a step."""

    prompts: list  # [B]
    completion: torch.Tensor  # ids [N, T]
    mask: torch.Tensor  # bool [N, T]
    advantages: torch.Tensor  # [N]
    logp_ref: torch.Tensor  # [N, T]
    kl_on: torch.Tensor  # bool [N], answers under the KL
    distill: torch.Tensor  # bool [N], answers that the teacher read
    teacher: list  # [B], its hidden states at the tokens of these answers [tokens, H], or None
    logp_old: torch.Tensor | None = None  # [N, T]; None: the policy has not moved yet
    weights: torch.Tensor | None = None  # [N, T, 3], of policy loss, KL and JSD


# ------------------------------------------------------------------------------- sample and grade
# Step 1. The noise of sampling, and that which breaks ties in hints, comes from generator() and
# depends on a key alone. So both methods, any number of processes and a resumed run draw the same.
def generator(*key):
    """A random stream that depends on its key alone."""
    # Python's own hash() would differ from process to process.
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def pose(task, split, seed, first, count):
    """Those of the problems first to first + count - 1 of a split that belong to this process."""
    with together():
        return [task.problem(split, seed, i) for i in range(first + RANK, first + count, RANKS)]


def sample_and_grade(policy, task, problems, group, key, greedy=False, hints=None):
    """Sample `group` answers to each problem, alone or with hints [B], and grade them -> Rollout.

    The noise of an answer depends on key, the index of its problem in this call and its own index
    in the group. UserError if a grade cannot be given.
    """
    prompts = []
    uniforms = []
    for b, problem in enumerate(problems):
        prompts.append(policy.encode(problem, hints[b] if hints else ""))
        # Each answer has its own stream, keyed by the index of its problem over all processes:
        # other answers and the number of processes change nothing.
        for g in range(group):
            stream = generator(*key, RANK + b * RANKS, g)
            uniforms.append(torch.rand(task.max_tokens, generator=stream, dtype=torch.double))
    completion = policy.sample(prompts, torch.stack(uniforms), greedy)
    # The answer is every token with no stop token before it. The rest is padding, whatever it is.
    device = completion.device
    stop = torch.isin(completion, torch.tensor(policy.stop_ids, device=device))
    mask = (stop.cumsum(1) - stop.long()) == 0
    finished = stop.any(1).tolist()
    lengths = (mask & ~stop).sum(1).tolist()
    texts = [policy.text(ids[:n]) for ids, n in zip(completion.tolist(), lengths)]
    with together():
        asked = [problem for problem in problems for _ in range(group)]
        grades = list(map(task.grade, asked, texts, finished))
    rewards = torch.tensor([float(grade.reward) for grade in grades], device=device)
    solved = torch.tensor([bool(grade.solved) for grade in grades], device=device)
    starts = range(0, len(texts), group)
    texts = [texts[n : n + group] for n in starts]
    grades = [grades[n : n + group] for n in starts]
    return Rollout(problems, prompts, completion, mask, texts, grades, rewards, solved)


# -------------------------------------------------------------------------------------- advantage
# Step 2. An answer is compared with the others to the same question, not with those to easier ones.
def group_advantages(rewards, group_size):
    """Reward relative to the group: A_i = (r_i - mean) / (std + 1e-6), with the sample std.

    rewards [N] -> [N]. If all rewards of a group are equal, its advantages are 0: GRPO learns
    nothing from it. Source: the paper's GRPO objective.
    """
    r = rewards.view(-1, group_size)
    advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    # In a flat group, rounding can leave a std of 1e-8 to 1e-7. Beside 1e-6 that would give
    # advantages of up to 0.1.
    flat = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return advantages.masked_fill(flat, 0.0).flatten()


# ------------------------------------------------------------------------ reference and attention
# Step 3. The answers are known, so one pass over them gives their log-probs and shows where a model
# looks while it reads them. It often looks at the right place even where the answer is wrong.
@torch.no_grad()
def read_answers(model, groups, layers, config):
    """A model, usually the reference, reads answers -> logp [N, T], relevance [B] of [L, R].

    The relevance of a region is the attention of the positions that predict answer tokens, a mean
    over heads, tokens and the G answers. All answers count: if only the solved ones did, the hint
    would tell which answers were right. Empty without layers.
    """
    logp = []
    relevance = []
    for part in groups.split(config.micro_batch):
        # One pass gives both: the answers are known, so all of their tokens are read at once.
        hidden, attention = model.forward(part.prompts, part.completion, part.mask, layers)
        logp.append(completion_logp(model, hidden, part))
        relevance += [by_answer.mean(1).cpu() for by_answer in attention]
    return torch.cat(logp), relevance


@torch.no_grad()
def completion_logp(model, hidden, groups):
    """log pi(y_t | x, y_<t) [N, T] of the answers of `groups`, from hidden [N, T, H]; 0 if padded.

    Chunk by chunk, so that logits [N, T, V] never exist.
    """
    head = model.head()
    targets = groups.completion[groups.mask]
    logp = []
    for h, target in zip(hidden[groups.mask].split(CHUNK), targets.split(CHUNK)):
        log_p = chunk_logits(h, head, model.suppress_ids).log_softmax(-1)
        logp.append(log_p.gather(-1, target[:, None])[:, 0])
    whole = hidden.new_zeros(groups.mask.shape)
    return whole.masked_scatter(groups.mask, torch.cat(logp))


# ------------------------------------------------------------------------------------------- hint
# Step 4. What the teacher will know and the student does not. It may say where to look and how to
# proceed, but never what comes out: a teacher that knows the solution need not look at the picture.
HINTS = ("attention", "votes", "oracle", "random", "answer", "none")


@dataclass(frozen=True)
class Hint:
    """What the teacher may read and the student may not."""

    regions: list  # indices of the named regions, in reading order
    text: str
    rejected: bool  # the steps might give the solution away, so they are not in the text


def build_hints(ref, task, rollout, relevance, config, key):
    """One Hint a group: where to look (the M regions of highest score), and which steps to take.

    A hint must not contain the solution. A list of regions has M of them, however many matter, so
    it cannot state a count. The steps are the task's advice in words, left out if `spoils` finds
    the solution in them.

        attention   regions that the reference looked at most while it read the answers
        votes       regions that most answers name      none     no hint at all
        oracle      the true targets, filled up to M with random regions
        random      any M regions
        answer      the solution itself: a baseline that cheats on purpose
    """
    hints = []
    for b, problem in enumerate(rollout.problems):
        names = ref.region_names(rollout.prompts[b])
        known = {"oracle": problem.targets, "votes": rollout.grades[b][0].points}
        if config.hint in known and known[config.hint] is None:
            raise UserError(f"--hint {config.hint}: this task knows no regions; choose another")
        # The M highest scores win. Tiny noise breaks ties; `--hint random` adds nothing to it.
        noise = torch.rand(len(names), generator=generator(*key, RANK + b * RANKS, "ties"))
        score = noise.double() * 1e-9
        if config.hint == "attention":
            score += relevance[b].mean(0)  # over the layers that are read: one
        elif config.hint == "votes":
            # How many answers name the region: is attention more than an echo of the answers?
            for grade in rollout.grades[b]:
                score[list(set(grade.points))] += 1
        elif config.hint == "oracle":
            score[problem.targets] += 1
        regions = sorted(score.topk(min(config.hint_regions, len(names))).indices.tolist())
        rejected = spoils(problem.steps, problem.answer)
        where = [] if config.hint_parts == "steps" else regions
        steps = "" if config.hint_parts == "where" or rejected else problem.steps
        if config.hint == "none":
            where = []
            text = ""
        elif config.hint == "answer":
            where = []
            text = task.hint_text([], "", problem.answer)
        else:
            text = task.hint_text([names[r] for r in where], steps)
        hints.append(Hint(where, text, rejected))
    return hints


# -------------------------------------------------------------------------------- tutored teacher
# Step 5. The teacher corrects the student's own answers word by word. It writes none of its own, so
# the student learns what to do in the situations that it brings about itself.
def answers_to_distill(rollout, config):
    """The answers to distil, bool [N]: the failed ones of groups whose solved share is below tau.

    With tau 1 these are all failed answers; with `--distill-on all` it is every answer.
    """
    if config.distill_on == "all":
        return torch.ones_like(rollout.solved)
    below = rollout.solved_share() < config.tau
    return ~rollout.solved & below.repeat_interleave(config.group)


def answers_under_kl(rollout, config):
    """The answers under the KL, bool [N]: all or, as released, those of groups at or above tau."""
    if config.kl_on == "all":
        return torch.ones_like(rollout.solved)
    return (rollout.solved_share() >= config.tau).repeat_interleave(config.group)


@torch.no_grad()
def read_teacher(ref, rollout, hints, distill, config):
    """The frozen reference reads answers again: same pictures, same ids, the hint in its context.

    q_t = pi_ref(. | x, h, y_<t). Returns, by group, its hidden states at the tokens of the answers
    in distill [tokens, H], or None. They are kept in place of logits, which are V/H times larger.
    Nothing is generated: the teacher predicts the next token after the student's own words.
    """
    G = config.group
    teacher = [None] * len(hints)
    tutored = distill.view(-1, G).any(1).nonzero()[:, 0]
    if len(tutored) == 0:
        return teacher
    for groups in tutored.split(config.micro_batch or len(hints)):
        prompts = []
        rows = []
        for b in groups.tolist():
            like = rollout.prompts[b]
            prompts.append(ref.encode(rollout.problems[b], hints[b].text, like))
            rows += range(b * G, b * G + G)
        mask = rollout.mask[rows]
        hidden, _ = ref.forward(prompts, rollout.completion[rows], mask)
        wanted = mask & distill[rows, None]
        # forward takes whole groups. What it read of other answers is dropped.
        for b, states, own in zip(groups.tolist(), hidden.split(G), wanted.split(G)):
            teacher[b] = states[own]
    return teacher


# ----------------------------------------------------------------------------------------- losses
# Step 6, first half: from logits to the loss of a chunk of tokens. policy_loss, kl_to_reference and
# topk_jsd are the three terms. token_weights says how much each token counts in each of them, and
# token_losses adds them up.
CLIP = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # low, high
FLOOR = -1e30  # stands for log 0: unlike -inf, it gives no NaN when it is multiplied by 0


def policy_loss(log_ratio, advantages, algorithm="grpo"):
    """Clipped loss of each token: -min(rho A, clip(rho, 1 - low, 1 + high) A) (paper, GRPO).

    log_ratio = log pi_theta - log pi_old and advantages, of one shape -> the same shape. DAPO
    (2503.14476) clips higher; its dynamic sampling, which would drop the groups that need a tutor,
    is left out. GSPO (2507.18071) has one ratio an answer: see token_losses. At the first update
    on a batch rho is 1, and nothing is clipped.
    """
    low, high = CLIP[algorithm]
    rho = log_ratio.clamp(-20, 20).exp()
    clipped = rho.clamp(1 - low, 1 + high)
    return -torch.minimum(rho * advantages, clipped * advantages)


def kl_to_reference(logp, logp_old, logp_ref):
    """Estimate of KL(pi_theta || pi_ref) at each token: rho (e^d - d - 1), d = logp_ref - logp.

    All of one shape. e^d - d - 1 is known as the k3 estimator. Alone, its expected gradient is that
    of KL(pi_ref || pi_theta). Multiplied by rho, it is that of KL(pi_theta || pi_ref), since with f
    for e^d - d - 1, and E over the tokens that pi_theta would draw,
        gradient of E[f] = E[gradient of f] + E[f * gradient of log pi_theta],
    and rho gives the second term. At the first update rho is 1 in value, but it has this gradient.
    """
    d = (logp_ref - logp).clamp(-20, 20)
    rho = (logp - logp_old).clamp(-20, 20).exp()
    return rho * (d.exp() - d - 1)


def jsd(log_p, log_q):
    """Jensen-Shannon: KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; [..., C] -> [...].

    d JSD / d p = log(p / m) / 2, all of it from the factor log_p.exp(): the other terms cancel. The
    released code detaches that factor, so its gradient is exactly zero.
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    p_part = log_p.exp() * (log_p - log_m)
    q_part = log_q.exp() * (log_q - log_m)
    return (p_part + q_part).sum(-1) / 2


def forward_kl(log_p, log_q):
    """KL(q || p), from the teacher q to the student p; log-probabilities [..., C] -> [...]."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def reverse_kl(log_p, log_q):
    """KL(p || q), from the student p to the teacher q; log-probabilities [..., C] -> [...]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


DIVERGENCES = {"jsd": jsd, "forward_kl": forward_kl, "reverse_kl": reverse_kl}


def topk_jsd(student_logits, teacher_logits, k, divergence="jsd"):
    """JSD of two next-word distributions: the Top-K words of both, and all others as one bucket.

    Logits [..., V] -> [...] in nats, from 0 to ln 2. Never above the exact JSD, and equal to it at
    k >= V. The gradient goes to the student alone. float32 is good to about 2e-6 nats: below that
    the value is noise, and may be negative. Source: the paper's Top-K JSD, and departure 2. With
    another divergence it is that one over the same buckets; the KLs have no upper bound.
    """
    teacher_logits = teacher_logits.detach()
    k = min(k, student_logits.shape[-1])
    # A hint may make a word likely that the student ranks low. So the teacher's Top-K count too.
    student_ids = student_logits.detach().topk(k).indices
    ids = torch.cat([student_ids, teacher_logits.topk(k).indices], -1).sort(-1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)  # words in both Top-K count once
    repeated[..., 1:] = ids[..., 1:] == ids[..., :-1]
    log_p = bucket_log_probs(student_logits, ids, repeated)
    log_q = bucket_log_probs(teacher_logits, ids, repeated)
    return DIVERGENCES[divergence](log_p, log_q)


def bucket_log_probs(logits, ids, repeated):
    """Log-probabilities of the words in ids [..., 2K] and of all others together [..., 2K + 1].

    Without the last bucket the two sides would not be distributions, and mass that moves in or out
    of the list would not be seen. The bucket is the logsumexp of all words that are not listed: so
    log_softmax over the buckets has the denominator of the whole softmax. 1 - sum(listed) would be
    pure rounding error where the rest is below 1e-7.
    """
    listed = logits.gather(-1, ids).masked_fill(repeated, FLOOR)
    rest = logits.scatter(-1, ids, FLOOR).logsumexp(-1, keepdim=True)
    # A model's own logits may be -inf.
    return torch.cat([listed, rest], -1).log_softmax(-1).clamp_min(FLOOR)


def entropy(logits):
    """Entropy -sum p log p in nats; logits [..., V] -> [...]. Logged, and not in the loss."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def token_weights(batch, config, distill_weight):
    """What each token weighs in the policy loss, the KL and the JSD [N, T, 3].

    Each term of the loss is a mean, which is a sum of weight times value. The denominators are
    those of the whole update, so micro-batches and processes change nothing:
        policy loss and KL   1 / (N |y_i|), the mean over answers of the mean over tokens;
                             with dapo 1 / (sum of |y_i|)
        JSD                  1 / (number of tokens of all distilled answers)
    When few answers fail, each of their tokens gets a large share of lambda.
    """
    mask = batch.mask.float()
    distilled = mask * batch.distill[:, None]
    # Every answer has a first token, so mask[:, 0] counts answers.
    totals = torch.stack([mask[:, 0].sum(), mask.sum(), distilled.sum()])
    answers, tokens, distilled_tokens = over_ranks(totals)
    if config.algorithm == "dapo":
        mean = mask / tokens
    else:
        mean = mask / mask.sum(1, keepdim=True) / answers
    policy = config.policy_weight * mean
    kl = config.kl_weight * mean * batch.kl_on[:, None]
    distance = distill_weight * distilled / distilled_tokens.clamp_min(1)
    return torch.stack([policy, kl, distance], -1)


def token_columns(policy, hidden, part, config):
    """What token_losses needs to know of each token, without padding, by name [tokens, ...]."""
    mask = part.mask
    columns = {
        "targets": part.completion[mask],
        "advantages": part.advantages[:, None].expand_as(mask)[mask],
        "logp_ref": part.logp_ref[mask],
        "weights": part.weights[mask],
    }
    if part.logp_old is not None:
        columns["logp_old"] = part.logp_old[mask]
        if config.algorithm == "gspo":
            # A chunk may hold a piece of an answer, so the ratio of the whole is found beforehand.
            log_ratio = (completion_logp(policy, hidden, part) - part.logp_old) * mask
            mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            columns["answer_log_ratio"] = mean.expand_as(mask)[mask]
    return columns


def token_losses(logits, teacher_logits, columns, config):
    """The loss of a chunk, a sum over its tokens, and the values of each token [n, 4].

    logits [n, V]; teacher_logits [n, V], or None where nothing is distilled. columns, made by
    token_columns, each [n]: targets, advantages, logp_ref and weights [n, 3], and after the first
    update logp_old, with GSPO answer_log_ratio. The values are log-prob, entropy, KL and JSD.
    """
    logp = logits.log_softmax(-1).gather(-1, columns["targets"][:, None])[:, 0]
    # At the first update the policy is still the one that sampled: the ratio is 1 in value, but it
    # has a gradient, and this is the policy gradient.
    logp_old = columns.get("logp_old", logp.detach())
    log_ratio = logp - logp_old
    if config.algorithm == "gspo" and "answer_log_ratio" in columns:
        # GSPO: the value is the mean over the answer, the gradient goes through each token.
        log_ratio = columns["answer_log_ratio"] + logp - logp.detach()
    policy = policy_loss(log_ratio, columns["advantages"], config.algorithm)
    kl = kl_to_reference(logp, logp_old, columns["logp_ref"])
    # The JSD pulls the student towards the teacher at the student's own words.
    distance = torch.zeros_like(logp)
    if teacher_logits is not None:
        distance = topk_jsd(logits, teacher_logits, config.top_k, config.divergence)
    loss = (columns["weights"] * torch.stack([policy, kl, distance], -1)).sum()
    values = torch.stack([logp, entropy(logits.detach()), kl, distance], -1)
    return loss, values.detach()


# ----------------------------------------------------------------------------------------- update
# Step 6, second half: from the loss of a token to weights that have moved. update walks through the
# groups, backward goes through the model, head_backward through the language head, and there
# token_losses is called.
CLIP_NORM = 1.0  # gradients are scaled down to this norm


def update(policy, ref, optimizer, batch, config, step):
    """Move the weights: `updates_per_batch` steps of AdamW, each on its share of the groups.

    Returns log-prob, entropy, KL and JSD of each token by name [N, T]; the mean norm of the
    gradients before clipping, None if one was not finite; and how many updates that left out.
    """
    distill_weight = config.distill_weight
    if config.distill_decay:
        distill_weight *= 1 - (step - 1) / config.steps
    if config.updates_per_batch > 1:
        # After the first update the policy is no longer the one that sampled.
        logp_old, _ = read_answers(policy, batch, (), config)
        batch = replace(batch, logp_old=logp_old)
    learned = [p for p in policy.parameters() if p.requires_grad]
    values = []
    norms = []
    skipped = 0
    for start, stop in even_cuts(len(batch.prompts), config.updates_per_batch):
        share = batch.take(start, stop)
        # Micro-batches add up their gradients, so the weights are those of the whole share.
        share = replace(share, weights=token_weights(share, config, distill_weight))
        for part in share.split(config.micro_batch):
            values.append(backward(policy, ref, part, config))
        sum_gradients(learned)
        norm = torch.nn.utils.clip_grad_norm_(learned, CLIP_NORM)
        if norm.isfinite():
            optimizer.step()
        else:  # one such step would make every weight NaN
            skipped += 1
        optimizer.zero_grad()  # the next rollout needs the memory
        norms.append(norm.item())
    # The last axis of the values that token_losses returns.
    names = ("logp", "entropy", "kl", "jsd")
    by_name = dict(zip(names, torch.cat(values).unbind(-1)))
    return by_name, mean_of_all(norms), skipped


def backward(policy, ref, part, config):
    """Add the gradient of the loss of some groups to .grad -> values of each token [N, T, 4]."""
    hidden, _ = policy.forward(part.prompts, part.completion, part.mask)
    columns = token_columns(policy, hidden, part, config)
    distilled = part.distill[:, None].expand_as(part.mask)[part.mask]
    teacher = None
    if distilled.any():
        teacher = torch.cat([states for states in part.teacher if states is not None])
    hidden = hidden[part.mask]  # [tokens, H], without padding
    # This is loss.backward() without logits of all tokens. head_backward goes back from the loss to
    # hidden, and adds to the gradient of the head; hidden.backward goes on from there. Row i of
    # teacher is the i-th distilled token: both are in the order of group, answer and token.
    values, grad = head_backward(policy, ref, hidden.detach(), distilled, teacher, columns, config)
    hidden.backward(grad)
    whole = values.new_zeros(*part.mask.shape, values.shape[-1])
    return whole.masked_scatter(part.mask[..., None], values)


def head_backward(policy, ref, hidden, distilled, teacher, columns, config, chunk=CHUNK):
    """The loss and its gradient, chunk by chunk -> values [tokens, 4], d loss / d hidden.

    Logits of all tokens at once would fill a GPU. So a chunk gets its logits z [n, V], its loss,
    and by autograd dz = d loss / dz. The head is linear, z = h W.T, so dh = dz W, and dW = dz.T h
    is added to the gradient of the head. hidden [tokens, H]; distilled bool [tokens]; teacher
    [distilled tokens, H], or None; columns: from token_columns.
    """
    head = policy.head().detach()
    teacher_head = ref.head().detach()
    weight = policy.head_weight
    if weight.requires_grad and weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    # A chunk is all distilled tokens, or all others: only the former need the teacher's logits.
    other_rows = (~distilled).nonzero()[:, 0]
    chunks = [(rows, None) for rows in other_rows.split(chunk)]
    if teacher is not None:
        distilled_rows = distilled.nonzero()[:, 0]
        chunks += zip(distilled_rows.split(chunk), teacher.split(chunk))
    values = hidden.new_empty(len(hidden), 4)
    grad = torch.empty_like(hidden)
    for rows, states in chunks:
        # z is a leaf: autograd goes from the loss back to z, and no further.
        z = chunk_logits(hidden[rows], head, policy.suppress_ids).requires_grad_()
        teacher_z = None
        if states is not None:
            teacher_z = chunk_logits(states, teacher_head, policy.suppress_ids)
        own = {name: column[rows] for name, column in columns.items()}
        loss, values[rows] = token_losses(z, teacher_z, own, config)
        del teacher_z  # before the gradient needs room
        loss.backward()
        if weight.requires_grad:
            add_product(weight.grad, z.grad.T, hidden[rows].to(head.dtype))
        grad[rows] = product(z.grad, head)
        del z, loss  # before the next chunk needs room
    return values, grad


def chunk_logits(hidden, head, suppress_ids):
    """Logits [n, V] from hidden [n, H] and head [V, H]; words that may not be said get FLOOR."""
    logits = product(hidden, head.T)
    for i in suppress_ids:
        logits[:, i] = FLOOR
    return logits


def product(a, b):
    """a @ b with a result in float32 or wider: logits rounded to bfloat16 would shift the JSD."""
    if b.is_cuda and b.dtype == torch.bfloat16:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def add_product(total, a, b):
    """total += a @ b; on a CPU without a temporary matrix of the size of total."""
    if total.is_cuda:
        total += product(a, b)
    else:
        total.addmm_(a, b)


def even_cuts(count, parts):
    """(start, stop) of `parts` consecutive ranges of about the same size."""
    bounds = [i * count // parts for i in range(parts + 1)]
    return list(pairwise(bounds))


# ---------------------------------------------------------------------------- metrics and monitor
# A metric is computed over all tokens, answers or groups of a step and over all processes, not as a
# mean of means. What has no entry here is not logged.
METRICS = {
    "step": "number of the training step",
    "reward": "mean reward of the sampled answers",
    "solved": "share of sampled answers that are solved",
    "groups_all_failed": "share of groups without a solved answer; with equal rewards GRPO is idle",
    "groups_mixed": "share of groups with both solved and failed answers",
    "groups_all_solved": "share of groups with solved answers only; nothing is left to learn",
    "distilled": "share of answer tokens that are distilled; if small, each carries much of lambda",
    "jsd": "mean Top-K JSD (or --divergence) of the distilled tokens, in nats; null if none is",
    "kl": "mean estimate of the KL to the reference over answer tokens, in nats",
    "entropy": "mean entropy of the policy over answer tokens, in nats",
    "entropy_failed": "the same over failed answers; null if there are none",
    "entropy_solved": "the same over solved answers; null if there are none",
    "answer_entropy": "entropy summed over the tokens of an answer, mean over answers, in nats",
    "entropy_slope": "change of entropy per step, least squares over the last 10 steps",
    "grad_norm": "mean norm of the gradient before clipping; null if one was not finite",
    "skipped": "updates that were left out because their gradient was not finite",
    "completion_length": "mean tokens of an answer, its end included",
    "hint_recall": "share of the true targets among the hinted regions, by chance M/R; or null",
    "hints_rejected": "share of problems whose steps could give the answer away: left out of hints",
    "credit": "probability that a mistake has a higher JSD than a right token of failed answers",
    "accuracy": "held-out problems, greedy: share solved; null between evaluations",
    "point_f1": "held-out problems, greedy: F1 of the named regions against the targets",
    "right_reason": "held-out problems, greedy: share solved with exactly the targets named",
    "pass_1": "held-out problems, sampled: share of answers that are solved",
    "pass_8": "held-out problems, sampled: share of problems solved at least once in 8 answers",
    "ways": "how often two right answers to a problem differ, over how often two random ones would",
    "seconds": "wall time of the step, evaluation included",
}


def step_metrics(policy, task, rollout, hints, distill, values):
    """Metrics of a step over all processes. values: of each token, by name [N, T]."""
    mask = rollout.mask
    failed = mask & ~rollout.solved[:, None]
    distilled = mask & distill[:, None]
    entropy = values["entropy"]
    share = rollout.solved_share()
    columns = {
        "reward": rollout.rewards,
        "solved": share,
        "groups_all_failed": share == 0,
        "groups_mixed": (share > 0) & (share < 1),
        "groups_all_solved": share == 1,
        "distilled": distilled[mask],
        "jsd": values["jsd"][distilled],
        "kl": values["kl"][mask],
        "entropy": entropy[mask],
        "entropy_failed": entropy[failed],
        "entropy_solved": entropy[mask & ~failed],
        "answer_entropy": (entropy * mask).sum(1),
        "completion_length": mask.sum(1),
    }
    if hints:
        problems = rollout.problems
        columns["hint_recall"] = [recall(h.regions, p.targets) for h, p in zip(hints, problems)]
        columns["hints_rejected"] = [hint.rejected for hint in hints]
    metrics = {name: mean_of_all(column) for name, column in columns.items()}
    if hints and hasattr(task, "mistakes"):
        counted = failed & distilled
        mistakes = gather(find_mistakes(policy, task, rollout)[counted].float())
        metrics["credit"] = auroc(gather(values["jsd"][counted]), mistakes > 0)
    return metrics


def mean_of_all(values):
    """Mean of numbers over all processes; None if there are none, or one of them is unknown."""
    if not torch.is_tensor(values):
        values = torch.tensor([math.nan if value is None else value for value in values])
    total = over_ranks(values.double().sum()).item()
    count = over_ranks(torch.tensor(values.numel())).item()
    if count == 0 or not math.isfinite(total):
        return None
    return total / count


def find_mistakes(policy, task, rollout):
    """The tokens that the task marks as mistakes, bool [N, T]."""
    mistakes = torch.zeros_like(rollout.mask)
    group = len(rollout.texts[0])
    for n, length in enumerate(rollout.mask.sum(1).tolist()):
        words = [policy.text([i]) for i in rollout.completion[n, :length].tolist()]
        marks = task.mistakes(rollout.problems[n // group], words)
        mistakes[n, :length] = torch.tensor(marks)
    return mistakes


def auroc(scores, positive):
    """Probability that a positive scores above a negative, ties half; None if a side is empty."""
    if positive.all() or not positive.any():
        return None
    # Of all pairs of a positive and a negative.
    gap = scores[positive][:, None] - scores[~positive]
    return ((gap > 0).float() + (gap == 0).float() / 2).mean().item()


def entropy_slope(rows):
    """Least-squares slope of the entropy per step over rows of metrics; None if it is unknown."""
    y = [row["entropy"] for row in rows]
    if len(y) < 2 or None in y:
        return None
    x = torch.arange(len(y)) - (len(y) - 1) / 2
    return ((x * torch.tensor(y)).sum() / (x * x).sum()).item()


def monitor(rows, first, chance):
    """Metrics that stayed uninformative over all of these rows -> lines with a remedy.

    first: the row of the first step; chance: recall of random regions, M/R.
    """
    signals = [  # name; uninformative from ... to ...; remedy
        ("solved", 0, 0, "no answer is solved: see what was answered and expected"),
        ("groups_mixed", 0, 0, "no group is mixed, reward teaches next to nothing: raise --group"),
        ("groups_all_solved", 1, 1, "all is solved, nothing to tutor: raise --difficulty"),
        ("jsd", -1, 1e-4, "JSD near 0, the hint changes nothing: can the base read hints?"),
        ("hint_recall", 0, 1.1 * chance, "hints no better than random: try another --hint"),
    ]
    if rows[-1]["solved"] <= 0.5:  # low entropy is no collapse where answers are right
        lowest = (first["entropy"] or 0) / 5
        signals.append(("entropy", 0, lowest, "entropy collapsed while answers fail: lower --lr"))
    lines = []
    for name, least, most, remedy in signals:
        values = [row.get(name) for row in rows]
        if None not in values and least <= min(values) and max(values) <= most:
            lines.append(f"for {len(rows)} steps {remedy}")
    return lines


# ------------------------------------------------------------------------------------- evaluation
# Held-out problems, and the noise of the answers to them, are the same at every evaluation and for
# every seed. So what changes in a curve is the model.
CALIBRATION = 32  # problems with known targets, by which layers are ranked
EVAL_BATCH = 64  # held-out problems come in batches of this size, or up to twice as large
SAMPLES = 8  # answers to a problem for pass_1, pass_8 and ways


def recall(regions, targets):
    """Share of the true targets that are among the regions; None if either is unknown or empty."""
    if not regions or not targets:
        return None
    return len(set(regions) & set(targets)) / len(set(targets))


def calibrate(ref, task, config):
    """Hint recall by layer [L] on problems whose targets are known: which layer looks there?

    The best layer differs from model to model. UserError if the task knows no targets.
    """
    problems = pose(task, "calibration", config.seed, 0, CALIBRATION)
    rollout = sample_and_grade(ref, task, problems, config.group, ("calibration", config.seed))
    _, relevance = read_answers(ref, rollout, range(ref.num_layers), config)
    rows = []
    for problem, by_layer in zip(problems, relevance):
        # As build_hints would choose, but without noise that breaks ties.
        best = by_layer.topk(min(config.hint_regions, by_layer.shape[-1])).indices.tolist()
        rows.append([recall(regions, problem.targets) for regions in best])
    found = [mean_of_all(column) for column in zip(*rows)]
    if not found or None in found:
        raise UserError("layers are ranked by calibration problems: they need pictures and targets")
    return found


def held_out(task, config, count):
    """Held-out problems of this process, in batches: index of the first, and problems."""
    # At least one problem for each process: an eighth of eval_problems may be less than that.
    count = max(RANKS, min(count, task.held_out))
    for start, stop in even_cuts(count, max(1, count // EVAL_BATCH)):
        yield start, pose(task, config.eval_split, 0, start, stop - start)


def evaluate(policy, task, config, layers=()):
    """Scores of greedy answers to held-out problems; with layers, hinted by its own attention."""
    rows = []
    for start, problems in held_out(task, config, config.eval_problems):
        hints = None
        if layers:  # sampled answers, whose attention gives the hint of the greedy one below
            key = ("tutored", start)
            rollout = sample_and_grade(policy, task, problems, config.group, key)
            _, relevance = read_answers(policy, rollout, layers, config)
            built = build_hints(policy, task, rollout, relevance, config, key)
            hints = [hint.text for hint in built]
        rollout = sample_and_grade(policy, task, problems, 1, ("greedy",), greedy=True, hints=hints)
        for problem, grades in zip(problems, rollout.grades):
            rows.append(judge(problem, grades[0]))
    names = ("accuracy", "point_f1", "right_reason")
    return {name: mean_of_all(column) for name, column in zip(names, zip(*rows))}


def judge(problem, grade):
    """Solved, F1 of the named points, solved with exactly the targets named; unknown is None."""
    if grade.points is None or problem.targets is None:
        return grade.solved, None, None
    named = set(grade.points)
    targets = set(problem.targets)
    f1 = 2 * len(named & targets) / max(1, len(named) + len(targets))
    return grade.solved, f1, grade.solved and named == targets


def evaluate_samples(policy, task, config):
    """pass_1, pass_8 and ways, from 8 sampled answers to each of an eighth of the problems."""
    solved = []
    differ = []
    by_chance = []
    for start, problems in held_out(task, config, config.eval_problems // SAMPLES):
        rollout = sample_and_grade(policy, task, problems, SAMPLES, ("sampled", start))
        for problem, texts, grades in zip(problems, rollout.texts, rollout.grades):
            solved.append([grade.solved for grade in grades])
            # Answers that are right by luck, for other regions than the targets, are left out.
            right = []
            for text, grade in zip(texts, grades):
                _, _, right_reason = judge(problem, grade)
                if right_reason:
                    right.append(text)
            pairs = list(combinations(right, 2))
            # Of n right ways, two that are chosen at random differ with probability 1 - 1/n.
            if pairs and hasattr(task, "ways"):
                differ.append(sum(a != b for a, b in pairs))
                by_chance.append(len(pairs) * (1 - 1 / task.ways(problem)))
    scores = {"pass_1": mean_of_all(torch.tensor(solved).float())}
    scores["pass_8"] = mean_of_all([any(row) for row in solved])
    expected = mean_of_all(by_chance)
    scores["ways"] = mean_of_all(differ) / expected if expected else None
    return scores


# --------------------------------------------------------------------------------------- settings
def knob(default, text, *choices, least=None):
    """A field of Config: its default, its help, and what it may be."""
    return field(default=default, metadata={"help": text, "choices": choices, "least": least})


@dataclass
class Config:
    """Everything that shapes a run. Every field is a flag and is stored in run.json."""

    # the run
    method: str = knob("ptdpo", "reward alone, or tutoring too; --toy: both", "grpo", "ptdpo")
    seed: int = knob(0, "seeds problems and sampling noise", least=0)
    steps: int = knob(100, "training steps", least=1)
    base: str = knob("toy_tasks/base.safetensors", "the toy's base; '' for an untrained model")
    difficulty: float = knob(1.0, "clutter and noise of the counting scenes, 0 is calm", least=0)
    prompts: int = knob(16, "prompts a step (B)", least=1)
    group: int = knob(8, "answers to each prompt (G)", least=2)
    # the update
    algorithm: str = knob("grpo", "form of the policy loss", "grpo", "dapo", "gspo")
    lr: float = knob(3e-4, "learning rate of AdamW, constant", least=0)
    updates_per_batch: int = knob(1, "updates that a batch is split into", least=1)
    micro_batch: int = knob(0, "groups whose activations are held at once, 0: all", least=0)
    policy_weight: float = knob(1.0, "weight of the policy loss; 0: distillation alone", least=0)
    kl_weight: float = knob(0.01, "beta, weight of the KL to the reference", least=0)
    kl_on: str = knob("all", "groups under the KL (released: untutored)", "all", "untutored")
    # tutoring
    distill_weight: float = knob(1.0, "lambda, weight of the JSD", least=0)
    distill_decay: bool = knob(False, "let lambda fall linearly to 0 over the run")
    distill_on: str = knob("failed", "answers to distil; all ignores tau", "failed", "all")
    tau: float = knob(1.0, "tutor groups whose share of solved answers is below this", least=0)
    divergence: str = knob("jsd", "distance to the teacher", *DIVERGENCES)
    top_k: int = knob(10, "K, words of each side that the JSD sees one by one", least=1)
    hint: str = knob("attention", "what picks the regions; answer: tells the answer", *HINTS)
    hint_parts: str = knob("both", "where to look, which steps to take", "where", "steps", "both")
    hint_regions: int = knob(10, "M, regions in every hint", least=1)
    # what is measured and saved
    eval_every: int = knob(5, "steps between evaluations", least=1)
    eval_split: str = knob("validation", "held-out problems", "validation", "test")
    eval_problems: int = knob(256, "how many held-out problems", least=1)
    save_every: int = knob(5, "steps between checkpoints", least=1)
    threads: int = knob(1, "CPU threads; another number rounds differently", least=1)
    # Qwen models
    model: str = knob("", "Qwen2-VL, Qwen2.5-VL or Qwen3-VL: a folder or a hub name")
    data: str = knob("", "problems to train on, JSON lines; none: large counting scenes")
    eval_data: str = knob("", "held-out problems, JSON lines")
    reward: str = knob("", "module:function of (problem, text) in place of the task's reward")
    max_tokens: int = knob(512, "longest answer", least=1)
    sample_batch: int = knob(128, "answers sampled at once: their cache has to fit", least=1)
    max_pixels: int = knob(512 * 28 * 28, "larger pictures are shrunk; 0: never", least=0)
    lora: int = knob(0, "rank of adapters that learn in place of the weights", least=0)
    train_vision: bool = knob(False, "let the vision tower learn")
    checkpointing: bool = knob(False, "compute activations twice to save memory")


# What --model changes in the defaults; with --lora the learning rate is 1e-5.
QWEN_DEFAULTS = dict(lr=1e-6, steps=200, micro_batch=1, distill_weight=0.05, top_k=100)
QWEN_DEFAULTS |= dict(hint_regions=3, eval_every=10, eval_problems=128, save_every=50)


def make_config(given):
    """Config from flags by name. UserError for a wrong value, or two that do not go together."""
    settings = dict(given)
    if given.get("model"):
        settings = QWEN_DEFAULTS | given
        if given.get("lora") and "lr" not in given:
            settings["lr"] = 1e-5
    config = Config(**settings)
    for f in fields(Config):
        value = getattr(config, f.name)
        flag = "--" + f.name.replace("_", "-")
        least = f.metadata["least"]
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{flag} {value}: give {' or '.join(choices)}")
        # Put this way, it refuses nan and infinity as well.
        if least is not None and not least <= value < 2**31:
            raise UserError(f"{flag} {value}: give at least {least}")
    fewest = RANKS * config.updates_per_batch
    checks = [
        (config.lora and config.train_vision, "--lora and --train-vision: choose one"),
        (bool(config.data) != bool(config.eval_data), "--data and --eval-data: give both"),
        (config.model and config.hint == "votes", "--hint votes: free text names no regions"),
        (config.data and config.hint == "oracle", "--hint oracle: a file does not know regions"),
        (config.model and config.sample_batch < config.group, "--sample-batch: at least --group"),
        (config.prompts < fewest, "--prompts: each process needs one per update"),
        (min(config.eval_problems, CALIBRATION) < RANKS, "--eval-problems: each process needs one"),
    ]
    for wrong, text in checks:
        if wrong:
            raise UserError(f"{text}; see python ptdpo.py --help")
    return config


# ------------------------------------------------------------------------------ the loop, and runs
# A run can be killed at any moment and goes on as if nothing had been: each file is replaced as a
# whole, logs are written before the checkpoint, and rows beyond the checkpoint are dropped.
STOP = []  # signals received: the step in progress is finished and saved first


def train(policy, task, config, folder):
    """Train a run from where it is: step, measure, log, save.

    A run is a folder with run.json, metrics.jsonl, samples.jsonl and checkpoint.safetensors.
    UserError after three steps in a row that left out an update, SystemExit after a signal.
    """
    # The reference is the policy as it was at the start, also for a run that is resumed.
    ref = policy.frozen_copy()
    learned = [p for p in policy.parameters() if p.requires_grad]
    fused = True if learned[0].is_cuda else None  # without it, AdamW copies all weights for a step
    optimizer = torch.optim.AdamW(learned, config.lr, weight_decay=0.01, fused=fused)
    stored = measure_base(policy, task, config, folder)
    checkpoint = folder / "checkpoint.safetensors"
    done = load_checkpoint(checkpoint, policy, optimizer) if checkpoint.exists() else 0
    if config.steps < done:
        raise UserError(f"--steps {config.steps}: {folder} is at step {done}; give more")
    write_json(folder / "run.json", stored | {"config": asdict(config)})
    if done == 0:
        scores = {"the base": stored["base"], "the base, tutored": stored["teacher"]}
        known = [f"{name} {score['accuracy']:.3f}" for name, score in scores.items() if score]
        say(f"{config.method:6} step    0  accuracy of {', '.join(known)}")
    rows = cut_log(folder / "metrics.jsonl", done)
    cut_log(folder / "samples.jsonl", done)
    for step in tqdm(range(done + 1, config.steps + 1), config.method, disable=RANK > 0 or None):
        began = time.perf_counter()
        row, sample = train_step(policy, ref, task, optimizer, config, stored["layers"], step)
        row["step"] = step
        row["entropy_slope"] = entropy_slope([*rows[-9:], row])
        if step % config.eval_every == 0 or step in (1, config.steps):
            row |= evaluate(policy, task, config) | evaluate_samples(policy, task, config)
            log(folder / "samples.jsonl", {"step": step, **sample})
        row["seconds"] = time.perf_counter() - began
        rows.append({name: row.get(name) for name in METRICS})
        # Logs first, then the checkpoint: after a crash there may be rows too many, never too few.
        log(folder / "metrics.jsonl", rows[-1])
        report(config, rows, sample)
        # A signal may have reached one process alone: all stop after the same step, or none.
        stop = int(over_ranks(torch.tensor(max(STOP, default=0)), "MAX"))
        # A gradient that is not finite may come from weights that are broken already. Then the last
        # sound checkpoint stays; a resumed run takes the steps after it again.
        if (step % config.save_every == 0 or step == config.steps or stop) and not row["skipped"]:
            save_checkpoint(checkpoint, step, policy, optimizer)
        if len(rows) > 2 and all(r["skipped"] for r in rows[-3:]):
            raise UserError(f"{folder}: three steps without an update, stopped; lower --lr")
        if stop:
            say(f"stopped after step {step}: python ptdpo.py --resume {folder}")
            raise SystemExit(128 + stop)


def measure_base(policy, task, config, folder):
    """run.json of a run. On the first start the scores of the base are measured and added, those
    with hints only for `--hint attention`. UserError if base or task are not those of that start.
    """
    run = read_run(folder)
    reference = fingerprint(policy)
    if run.get("reference", reference) != reference:
        base = config.model or config.base
        raise UserError(f"{base}: not the base that {folder} began with; put that one back")
    name = type(task).__name__
    if run.get("task", name) != name:
        raise UserError(f"{folder} has the task {run['task']}, not {name}; give it to ptdpo.run")
    if "base" not in run:
        run |= {"reference": reference, "task": name, "layers": [], "teacher": None}
        run["base"] = evaluate(policy, task, config) | evaluate_samples(policy, task, config)
        if config.method == "ptdpo" and config.hint == "attention":
            run["layer_recall"] = calibrate(policy, task, config)
            run["layers"] = [run["layer_recall"].index(max(run["layer_recall"]))]
            run["teacher"] = evaluate(policy, task, config, run["layers"])
    return run


def fingerprint(policy):
    """SHA-256 of at most 131,071 values of each weight, evenly spread."""
    digest = hashlib.sha256()
    # A part will do: two bases differ everywhere, and all weights of 8B would take minutes.
    for name, p in policy.named_parameters():
        values = p.detach().flatten()[:: max(1, p.numel() // 65536)].float()
        digest.update(name.encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()


def sync(path):
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_whole(path, write):
    """Write aside, sync, rename: whenever the process dies, one whole file is in place."""
    if RANK == 0:
        aside = path.with_suffix(".tmp")
        write(aside)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)


def write_json(path, value):
    """The same for JSON."""
    write_whole(path, lambda aside: aside.write_text(json.dumps(value, indent=1)))


def log(path, row):
    """Append a row to a JSONL file."""
    if RANK == 0:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        sync(path)


def cut_log(path, done):
    """Rows up to step `done`. Later ones, which will be made again, and a torn line are dropped."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a whole line has an end
    try:
        rows = [row for row in map(json.loads, lines) if row["step"] <= done]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the log of a run; use another copy, or start again") from None
    write_whole(path, lambda aside: aside.write_text("".join(json.dumps(r) + "\n" for r in rows)))
    return rows


def live_tensors(policy, optimizer):
    """The tensors of a checkpoint by name, not copies: what learns and the moments of AdamW.

    AdamW makes its moments at its first step. Here they begin at 0, to be loaded into.
    """
    tensors = {}
    for name, p in policy.named_parameters():
        if p.requires_grad:
            tensors[f"policy.{name}"] = p.detach()
        if p.requires_grad and optimizer:
            if not optimizer.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
            tensors |= {f"{kind}.{name}": value for kind, value in optimizer.state[p].items()}
    return tensors


def save_checkpoint(path, step, policy, optimizer=None):
    """One safetensors file of weights, moments and the step. Nothing is pickled."""
    tensors = live_tensors(policy, optimizer)
    write_whole(path, lambda aside: save_file(tensors, aside, {"step": str(step)}))


def load_checkpoint(path, policy, optimizer=None):
    """Load a checkpoint -> its step. UserError if it is missing, foreign or of another model."""
    live = live_tensors(policy, optimizer)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            # Everything is compared before anything is loaded.
            for name in live.keys() | {name for name in shapes if name.startswith("policy.")}:
                if name not in live or shapes.get(name) != list(live[name].shape):
                    raise UserError(f"{path}: {name} does not fit this model; give its own file")
            for name, tensor in live.items():
                tensor.copy_(file.get_tensor(name))
            return int((file.metadata() or {}).get("step", 0))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no checkpoint ({error}); give another, or start anew") from None


def sample_row(policy, rollout, hints, relevance, values, config):
    """One group in full: problem, answers, hint, where the reference looked, JSD of each token."""
    problem = rollout.problems[0]
    group = len(rollout.texts[0])
    lengths = rollout.mask[:group].sum(1).tolist()
    ids = [row[:length] for row, length in zip(rollout.completion.tolist(), lengths)]
    # The first group is as good as any: problems come in random order.
    row = {"question": problem.question, "answer": problem.answer, "texts": rollout.texts[0]}
    row["tokens"] = [[policy.text([i]) for i in answer] for answer in ids]
    row["jsd"] = [jsd[:length].tolist() for jsd, length in zip(values["jsd"], lengths)]
    row["rewards"] = [grade.reward for grade in rollout.grades[0]]
    row["solved"] = [grade.solved for grade in rollout.grades[0]]
    row["hint"] = asdict(hints[0]) if hints else None
    regions = len(policy.region_names(rollout.prompts[0]))
    row["relevance"] = relevance[0].mean(0).tolist() if relevance else None
    row["chance"] = config.hint_regions / max(1, regions)
    row["pictures"] = [thumbnail(picture) for picture in problem.images[:1]]
    return row


def thumbnail(picture):
    """A small copy of a picture, as PNG in base64."""
    # Samples are to be looked at. With pictures in full the file would grow by megabytes a row.
    small = picture.copy()
    small.thumbnail((336, 336))
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def report(config, rows, sample):
    """Print the last row if it was evaluated, an update that was left out, and every ten steps
    warnings.
    """
    row = rows[-1]
    lines = []
    if row["accuracy"] is not None:
        names = ("reward", "accuracy", "point_f1", "entropy", "groups_all_failed", "jsd")
        lines.append("  ".join(f"{n} {row[n]:.3f}" for n in names if row[n] is not None))
    if row["skipped"]:
        lines.append("warning: gradient is not finite, update left out: lower --lr")
    elif len(rows) % 10 == 0:
        lines += [f"warning: {line}" for line in monitor(rows[-10:], rows[0], sample["chance"])]
    if row["solved"] == 0 and len(rows) % 10 == 0:
        lines.append(f"answered {sample['texts'][0][-200:]!r}, expected {sample['answer']!r}")
    for line in lines:
        say(f"{config.method:6} step {row['step']:4}  {line}")


def say(line):
    """Print a line together with its end, since two runs may share the terminal; rank 0 alone."""
    if RANK == 0:
        tqdm.write(f"{line}\n", end="")


@contextmanager
def locked(folder):
    """Hold a run for this process, until it ends. UserError if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            # The system drops the lock with its process, however that ends: none is left behind.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process trains it; wait, or change --out") from None
        yield


def create_run(config, folder):
    """Make the folder of a run: its settings, and nothing trained yet. A run in it is replaced."""
    with locked(folder):
        for name in ("checkpoint.safetensors", "metrics.jsonl", "samples.jsonl"):
            (folder / name).unlink(missing_ok=True)
        # Whoever reads the run later can find the code that made it.
        git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        run = {"config": asdict(config), "commit": commit, "versions": versions}
        write_json(folder / "run.json", run)


def runs_in(folder):
    """The run in a folder, or the runs one level below it."""
    found = sorted([*folder.glob("run.json"), *folder.glob("*/run.json")])
    if not found:
        raise UserError(f"{folder}: no run in it; start one with --toy --out {folder}")
    return [path.parent for path in found]


def read_run(folder):
    """run.json of a run. UserError if it is missing, torn, or of another version."""
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text())
        odd = run["config"].keys() ^ vars(Config()).keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: missing or torn; use another copy, or start again") from None
    if odd:
        raise UserError(f"{path}: of another version, {min(odd)}; use commit {run.get('commit')}")
    return run


def make_task_of(config):
    """The task of a run. UserError if its data are bad."""
    if not config.model:
        return Counting(config.difficulty)
    settings = (config.max_tokens, config.reward, config.difficulty)
    if config.data:
        return JsonlTask(config.data, config.eval_data, *settings)
    return FreeText(*settings)


def load_policy(config, task):
    """The policy of a run at its start: a Qwen model, or the base of the toy."""
    torch.set_num_threads(config.threads)
    if config.model:
        return HFPolicy(config)
    policy = task.new_policy(config.seed)
    base = Path(config.base)
    if config.base:
        load_checkpoint(base if base.exists() else HERE / base, policy)
    return policy


def run(folder, task=None, steps=None):
    """Train a run, made by create_run, from where it is. A signal lets it finish its step and save.

    task: None for the task that the settings name. A task of your own must be given each time.
    """
    STOP.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: STOP.append(n))
    with ExitStack() as stack:
        with together():
            if RANK == 0:
                stack.enter_context(locked(folder))
            config = Config(**read_run(folder)["config"])
            config.steps = config.steps if steps is None else steps
            task = task or make_task_of(config)
            policy = load_policy(config, task)
        train(policy, task, config, folder)


# -------------------------------------------------------------------------------- the Qwen models
# All that a large model needs and the toy does not: chat template, pixels, positions of three axes,
# a cache, two precisions, adapters. Sampling is a loop of our own, because each answer has its own
# noise. Training reads a row in which the prompt of a group stands once.
@dataclass
class HFPrompt:
    """One encoded prompt of P tokens. With and without a hint, it shares its pictures."""

    ids: torch.Tensor  # [P]
    positions: torch.Tensor  # [P, 3]: time, row and column, which differ in pictures only
    pictures: dict  # on the CPU: pixel_values; image_grid_thw [pictures, 3], frames, rows, columns


class HFPolicy(torch.nn.Module):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL behind the Policy protocol.

    Without adapters the weights are float32 and matrix products run in `dtype` (autocast): steps
    of 1e-6 would be lost in bfloat16 weights. With adapters only these are float32.
    """

    def __init__(self, config):
        """Load --model. UserError if that fails."""
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.processor, self.model = load_model(config, self.dtype)
        self.model.to(device).eval()
        self.base = self.model.get_base_model() if config.lora else self.model
        self.frozen = False
        self.config = config
        settings = self.base.config
        self.num_layers = settings.text_config.num_hidden_layers
        self.merge = settings.vision_config.spatial_merge_size  # patches along an image token
        self.image_id = settings.image_token_id
        self.suppress_ids = [self.image_id, settings.video_token_id]
        # An answer ends with the end of a turn or of a text. The first of them is the padding, too.
        ends = self.base.generation_config.eos_token_id or []
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = list(dict.fromkeys([self.processor.tokenizer.eos_token_id, *ends]))

    @property
    def head_weight(self):
        """The language head [V, H]."""
        return self.base.lm_head.weight

    def head(self):
        """The head in the precision of matrix products."""
        return self.head_weight.to(self.dtype)

    def text(self, ids):
        """Ids as text, without special tokens."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def frozen_copy(self):
        """The reference. With adapters it is this very model with the adapters off."""
        ref = copy.copy(self)
        ref._modules = dict(self._modules)  # or ref.model = ... would replace self.model as well
        ref.frozen = True
        if not self.config.lora:
            ref.base = ref.model = copy.deepcopy(self.model).requires_grad_(False)
            for module in ref.base.model.modules():
                if isinstance(module, torch.nn.Linear):  # or autocast would round it at every call
                    module.to(self.dtype)
        return ref

    @contextmanager
    def running(self):
        """Around a pass: precision; adapters off in the reference; checkpointing for gradients."""
        with ExitStack() as stack:
            if self.frozen and self.config.lora:
                stack.enter_context(self.model.disable_adapter())
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast("cuda", self.dtype))
            if self.config.checkpointing:
                # It works in training mode, in which there is no cache to sample with.
                self.model.train(torch.is_grad_enabled())
            yield

    def encode(self, problem, hint="", like=None):
        """Pictures, question and hint -> HFPrompt, by the chat template.

        Pictures stand where the question says <image>, or else come first.
        """
        question = f"{problem.question}\n\n{hint}".strip()
        if "<image>" not in question:
            question = "<image>" * len(problem.images) + question
        question = question.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        message = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        text = self.processor.apply_chat_template(message, add_generation_prompt=True)
        pictures = like.pictures if like else {}
        if problem.images and not like:
            pictures = self.processor.image_processor(problem.images, return_tensors="pt")
        grid = pictures.get("image_grid_thw")
        # The text marks a picture by one token. The model wants as many as the picture takes.
        counts = [] if grid is None else (grid.prod(1) // self.merge**2).tolist()
        pieces = text.split("<|image_pad|>")
        if len(pieces) != len(counts) + 1:
            raise UserError(f"{len(counts)} pictures, {len(pieces) - 1} places for them: {text!r}")
        for i, count in enumerate(counts):
            pieces[i] += "<|image_pad|>" * count
        ids = torch.tensor([self.processor.tokenizer("".join(pieces))["input_ids"]])
        # A picture takes as many positions as its longer side has tokens: fewer than its tokens.
        kinds = (ids == self.image_id).long()
        positions, _ = self.base.model.get_rope_index(ids, kinds, grid)  # [3, 1, P]
        device = self.base.device
        return HFPrompt(ids[0].to(device), positions[:, 0].T.to(device), pictures)

    @torch.no_grad()
    def sample(self, prompts, uniforms, greedy=False):
        """G answers to each prompt, ids [N, T], by uniform numbers [N, T]; then padding."""
        group = len(uniforms) // len(prompts)
        size = self.config.sample_batch // group or 1
        noise = uniforms.to(self.base.device).split(size * group)
        answers = []
        with self.running():
            for start, some in zip(range(0, len(prompts), size), noise):
                answers.append(self.decode(prompts[start : start + size], some, greedy))
        return torch.cat(answers)

    def decode(self, prompts, uniforms, greedy):
        """The same for prompts whose cache fits. They are read once, then shared by their group."""
        N, T = uniforms.shape
        G = N // len(prompts)
        left = {"batch_first": True, "padding_side": "left"}
        # On the left, so that the last tokens of all prompts stand in one column.
        ids = pad_sequence([prompt.ids for prompt in prompts], **left)  # [B, P]
        real = pad_sequence([torch.ones_like(prompt.ids) for prompt in prompts], **left)
        positions = pad_sequence([prompt.positions for prompt in prompts], **left)  # [B, P, 3]
        place = positions[:, -1].T.repeat_interleave(G, 1)[..., None]  # of the last token [3, N, 1]
        visible = F.pad(real.bool(), (0, T), value=True)
        visible = visible.repeat_interleave(G, 0)[:, None, None]  # [N, 1, 1, P + T]
        stop = torch.tensor(self.stop_ids, device=ids.device)
        answers = stop[0].repeat(N, T)
        done = torch.zeros(N, dtype=torch.bool, device=ids.device)
        head = self.head()
        cache = narrow_cache()
        inputs = {"input_ids": ids, "position_ids": positions.permute(2, 0, 1)}
        inputs |= {"attention_mask": real, **join_pictures(prompts, ids.device)}
        for t in range(T):
            # `cache` is the newer name of past_key_values.
            hidden = self.base.model(**inputs, cache=cache).last_hidden_state[:, -1]
            if t == 0:  # so far a row for each prompt, from now on one for each answer
                cache.batch_repeat_interleave(G)
                hidden = hidden.repeat_interleave(G, 0)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = chunk_logits(hidden, head, self.suppress_ids)
            answers[:, t] = torch.where(done, stop[0], pick(logits, uniforms[:, t], greedy))
            done = done | torch.isin(answers[:, t], stop)
            # Asking a GPU whether all are done means waiting for it, so it is asked seldom.
            if t % 16 == 15 and done.all():
                break
            inputs = {"input_ids": answers[:, t, None], "position_ids": place + 1 + t}
            # A mask of four dimensions is taken as it is. The first one, of two, became causal.
            inputs["attention_mask"] = visible[..., : ids.shape[1] + t + 1]
        return answers

    def forward(self, prompts, completion, mask, layers=()):
        """Read given answers -> hidden float32 [N, T, H], attention to regions [B] of [L, G, R].

        All groups stand in one row. Each has its prompt once, so the prompt is computed once:
            prompt 1 without its last token (P) | answer 1: T tokens | ... | answer G | prompt 2 ...
        Each answer begins with the last prompt token, which predicts its first token. Which tokens
        see which is defined in packed_attention.
        """
        G = len(completion) // len(prompts)
        rows = []
        places = []
        groups = []  # of each, who sees whom, and which tokens are answers
        for prompt, answers, tokens in zip(prompts, completion.split(G), mask.split(G)):
            T = int(tokens.any(0).nonzero().max()) + 1  # behind the longest answer nothing is read
            P = len(prompt.ids) - 1
            answers = torch.cat([prompt.ids[P:].expand(G, 1), answers[:, : T - 1]], 1)
            rows.append(torch.cat([prompt.ids[:P], answers.flatten()]))
            steps = torch.arange(T, device=answers.device)[:, None]
            places += [prompt.positions[:P], (prompt.positions[P:] + steps).repeat(G, 1)]  # [.., 3]
            causal = torch.ones(T, P + T, dtype=torch.bool, device=answers.device).tril(P)
            groups.append((causal, tokens[:, :T]))
        # Layers cannot return attention, so they append it to these lists. Keyword arguments that
        # a model does not know, such as this one, reach the attention function.
        recorded = {layer: [] for layer in layers}
        sizes = [len(row) for row in rows]
        with self.running():
            output = self.base.model(
                input_ids=torch.cat(rows)[None],
                position_ids=torch.cat(places).T[:, None],
                sizes=sizes,
                groups=groups,
                recorded=recorded,
                use_cache=False,
                **join_pictures(prompts, mask.device),
            )
        hidden = []
        for states, (_, tokens) in zip(output.last_hidden_state[0].split(sizes), groups):
            answers = states[-tokens.numel() :].unflatten(0, tokens.shape).float()
            hidden.append(F.pad(answers, (0, 0, 0, mask.shape[1] - tokens.shape[1])))
        looks = zip(*recorded.values())  # of each prompt, by layer; none without layers
        return torch.cat(hidden), list(map(self.by_region, prompts, looks))

    def region_names(self, prompt):
        """Nine places a picture, with the number of the picture if there are several."""
        count = len(prompt.pictures.get("image_grid_thw", ()))
        if count < 2:
            return PLACES * count
        return [f"picture {i + 1}: {place}" for i in range(count) for place in PLACES]

    def by_region(self, prompt, looks):
        """Attention to prompt tokens, L of [G, P] -> mean attention in each region [L, G, R]."""
        attention = torch.stack(looks)
        if not prompt.pictures:
            return attention[..., :0]
        regions = []  # of each image token
        nine = torch.arange(9.0).view(1, 1, 3, 3)
        grid = prompt.pictures["image_grid_thw"] // self.merge
        for i, (_, *sides) in enumerate(grid.tolist()):
            # A token belongs to the ninth of the picture that holds its centre.
            ninths = F.interpolate(nine, sides, mode="nearest-exact")
            regions.append(9 * i + ninths.flatten().long())
        weights = F.one_hot(torch.cat(regions), 9 * len(regions)).to(attention)
        weights /= weights.sum(0).clamp_min(1)
        # The last token of the prompt is not there: it stands in the rows of the answers.
        return attention[..., prompt.ids[:-1] == self.image_id] @ weights


def narrow_cache():
    """A cache whose keys have the precision of its values: rotary embedding made them float32."""
    from transformers import DynamicCache

    class Cache(DynamicCache):
        def update(self, key, value, *args, **kwargs):
            return super().update(key.to(value.dtype), value, *args, **kwargs)

    return Cache()


def join_pictures(prompts, device):
    """The pictures of several prompts as the model takes them; empty if there are none."""
    pictured = [prompt.pictures for prompt in prompts if prompt.pictures]
    names = pictured[0] if pictured else ()
    return {name: torch.cat([some[name] for some in pictured]).to(device) for name in names}


def packed_attention(
    module, query, key, value, mask, scaling=None, sizes=None, groups=None, recorded=None, **_
):
    """Attention in a packed row: prompt (P) | T tokens of answer 1 | ... | T of answer G | ...

    A prompt sees itself. An answer sees its prompt and its own past, and no other answer, as told
    by its group's mask [T, P + T]. These are two calls a group, not one with a block mask: there is
    no mask over the whole row, and no work on pairs that do not see each other.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = partial(ALL_ATTENTION_FUNCTIONS["sdpa"], module, scaling=scaling)
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    if sizes is None:  # sampling: one answer a row
        return attend(query, key, value, mask)
    mixed = []
    parts = [x.split(sizes, 2) for x in (query, key, value)]  # each [1, heads, P + G * T, D]
    for q, k, v, (causal, tokens) in zip(*parts, groups):
        T = len(causal)
        P = causal.shape[1] - T
        prompt, _ = attend(q[:, :, :P], k[:, :, :P], v[:, :, :P], None)  # causal
        # Every answer becomes a row of its own, with the keys of its prompt before its own.
        q, k_own, v_own = (x[0, :, P:].unflatten(1, (-1, T)).transpose(0, 1) for x in (q, k, v))
        k = torch.cat([k[:, :, :P].expand(len(q), -1, -1, -1), k_own], 2)  # [G, heads, P + T, D]
        v = torch.cat([v[:, :, :P].expand(len(q), -1, -1, -1), v_own], 2)
        answers, _ = attend(q, k, v, causal[None, None])  # [G, T, heads, D]
        mixed += [prompt, answers.flatten(0, 1)[None]]
        if module.layer_idx in recorded:
            recorded[module.layer_idx].append(read_attention(q, k, causal, tokens, scaling))
    return torch.cat(mixed, 1), None


@torch.no_grad()
def read_attention(query, key, causal, tokens, scaling):
    """Attention to the prompt, a mean over heads and over the tokens in a mask, float32 [G, P].

    Fast attention never shows its weights, so softmax(q k' scaling) is computed once more, one
    answer at a time to save memory.
    """
    rows = []
    with torch.autocast(query.device.type, enabled=False):
        for q, k, own in zip(query, key, tokens.float()):
            heads = q.float().unflatten(0, (len(k), -1))  # grouped by the keys they share
            scores = torch.einsum("khtd,ksd->khts", heads, k.float()) * scaling
            weights = scores.masked_fill(~causal, -math.inf).softmax(-1).mean((0, 1))
            rows.append(own @ weights / own.sum().clamp_min(1))
    return torch.stack(rows)[:, : -len(causal)]


def load_model(config, dtype):
    """Processor and model of --model. UserError says what is missing, and the remedy."""
    name = config.model
    if not Path(name).exists() and name.startswith("assets/"):
        name = str(HERE / name)
    try:
        return open_model(config, name, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken folder can fail in a dozen ways
        mend = "give a folder or a hub name"
        if isinstance(error, ImportError):
            mend = f"pip install {error.name}" if error.name else "mend the installation"
        raise UserError(f"--model {name}: {error!s:.300}; {mend}") from error


def open_model(config, name, dtype):
    """Processor (of pictures alone) and model; what learns is float32, all else `dtype`."""
    import transformers as hf

    class PictureProcessor(hf.ProcessorMixin):  # AutoProcessor wants torchvision, for videos
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    if tuple(map(int, hf.__version__.split(".")[:2])) < (5, 24):
        raise ImportError(f"transformers {hf.__version__} is too old, pip install -U transformers")
    hf.logging.disable_progress_bar()
    settings = hf.AutoConfig.from_pretrained(name)
    if settings.model_type not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        raise ValueError(f"{settings.model_type} is not Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    processor = PictureProcessor.from_pretrained(name)
    if not processor.chat_template:
        raise ValueError("no chat template, take an instruction-tuned model")
    if processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") != settings.image_token_id:
        raise ValueError("the tokenizer lacks the picture token, take the model's own")
    size = processor.image_processor.size
    size["longest_edge"] = config.max_pixels or 2**40
    if size["longest_edge"] < size["shortest_edge"]:  # or small pictures would grow to that
        size["shortest_edge"] = size["longest_edge"] // 4
    # cuDNN makes a plan for every new number of keys, and decoding has a new one each token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Weights under adapters never change, so they need no digits for small steps.
    weights = dtype if config.lora else torch.float32
    model = hf.AutoModelForImageTextToText.from_pretrained(name, dtype=weights)
    from transformers.masking_utils import sdpa_mask

    hf.AttentionInterface.register("packed", packed_attention)
    hf.AttentionMaskInterface.register("packed", sdpa_mask)
    # The decoder alone: pictures are read by the attention of the vision tower.
    model.set_attn_implementation({"text_config": "packed"})
    model.model.visual.requires_grad_(config.train_vision)
    base = model
    if config.lora:
        import peft

        # Every linear layer of the decoder; vision tower and head stay as they are.
        layers = r".*language_model\.layers\..*_proj"
        adapters = peft.LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules=layers)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name
            torch.manual_seed(0)  # the same adapters in every run and process
            model = peft.get_peft_model(model, adapters)  # freezes everything else
    if config.checkpointing:
        base.activation_checkpointing_enable()
        base.disable_input_require_grads()  # or the frozen vision tower would get a backward pass
    return processor, model


# --------------------------------------------------------------------------------------- torchrun
# Each process takes every RANKS-th group of a step and keeps it. Only sums are exchanged: of the
# gradients, of the denominators of the loss, and of metrics. Alone, a process exchanges nothing.
RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def connect():
    """Prepare the GPU's memory, and join the other processes of torchrun, if there are any."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the old name
        # Caches that grow token by token would fragment it. This must be set before CUDA starts.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if RANKS > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()


def over_ranks(tensor, kind="SUM"):
    """The sum (MAX, MIN) of a tensor over all processes, in place where it can be."""
    if RANKS == 1:
        return tensor
    # NCCL wants tensors of the GPU, gloo those of the CPU.
    total = tensor.cuda() if torch.distributed.get_backend() == "nccl" else tensor.cpu()
    torch.distributed.all_reduce(total, getattr(torch.distributed.ReduceOp, kind))
    return total.to(tensor.device)


def gather(values):
    """The values [n] of all processes, one after the other."""
    sizes = torch.zeros(RANKS, dtype=torch.long)
    sizes[RANK] = len(values)
    sizes = over_ranks(sizes).tolist()
    # Each process fills in its own part, and the sum puts the parts together.
    whole = values.new_zeros(sum(sizes))
    start = sum(sizes[:RANK])
    whole[start : start + len(values)] = values
    return over_ranks(whole)


def sum_gradients(parameters):
    """Sum the gradients over all processes. None counts as 0, and stays None if all have None."""
    # All processes must take part in the same exchanges, so first it is asked who has a gradient.
    present = over_ranks(torch.tensor([float(p.grad is not None) for p in parameters]))
    for p, count in zip(parameters, present.tolist()):
        if count:
            p.grad = over_ranks(torch.zeros_like(p) if p.grad is None else p.grad)


@contextmanager
def together():
    """If the body fails in any process, all end: the first that failed raises, the others exit."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    first = int(over_ranks(torch.tensor(RANK if error else RANKS), "MIN"))
    if first == RANK:
        error.alone = True  # guard prints it, whatever the rank; the other processes stay silent
        raise error
    if first < RANKS:
        raise SystemExit(2)


# ------------------------------------------------------------------------------- the command line
# Flags are checked before anything is loaded or written. A mistake of the user raises UserError
# wherever it is found, and guard turns it into one line and exit code 2.
def parse(argv):
    """Command line -> the given flags by name; defaults are not filled in."""

    def mistake(message):
        raise UserError(f"{message}; see python ptdpo.py --help")

    parser = argparse.ArgumentParser("ptdpo.py", argument_default=argparse.SUPPRESS)
    parser.error = mistake
    add = parser.add_argument
    add("--toy", action="store_true", help="train on the toy, both methods side by side")
    add("--resume", type=Path, metavar="DIR", help="go on with a run, or with all runs in DIR")
    add("--eval", type=Path, metavar="RUN", help="measure a run on held-out problems")
    add("--help-metrics", action="store_true", help="what each metric means")
    add("--out", type=Path, metavar="DIR", help="folder of the runs (default runs/NAME)")
    add("--overwrite", action="store_true", help="replace a run that stands there")
    # A new field of Config is a flag at once, with its type, its choices and its help.
    for f in fields(Config):
        kind = {"type": f.type, "choices": f.metadata["choices"] or None}
        if f.name == "method":
            kind["choices"] = ("both", "grpo", "ptdpo")
        if f.type is bool:
            kind = {"action": "store_true"}
        default = "none" if f.default == "" else f.default
        text = f"{f.metadata['help']} (default {default}"
        if f.name in QWEN_DEFAULTS:
            text += f"; with --model {QWEN_DEFAULTS[f.name]}"
        add("--" + f.name.replace("_", "-"), help=text + ")", **kind)
    return vars(parser.parse_args(argv))


def create_runs(given):
    """Create the runs that the flags ask for -> their folders, and their task."""
    settings = {f.name: given[f.name] for f in fields(Config) if f.name in given}
    # A run may be resumed from another folder, so it keeps whole paths.
    for name in ("model", "base", "data", "eval_data"):
        if settings.get(name) and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    method = given.get("method", "ptdpo" if "model" in given else "both")
    methods = ["grpo", "ptdpo"] if method == "both" else [method]
    configs = [make_config(settings | {"method": name}) for name in methods]
    # Bad data, or a missing base, are found before anything is written.
    task = make_task_of(configs[0])
    if "toy" in given:
        load_policy(configs[0], task)
    out = given.get("out", Path("runs") / Path(given.get("model", "toy")).name)
    folders = [out / name for name in methods]
    if RANK == 0:
        for folder in folders:
            if (folder / "run.json").exists() and "overwrite" not in given:
                raise UserError(f"{folder}: a run; --resume or --overwrite it, or change --out")
        for config, folder in zip(configs, folders):
            create_run(config, folder)
    return folders, task


def side_by_side(folders, steps):
    """All runs at once, a process each. Signals are passed on. SystemExit if a run failed."""
    context = multiprocessing.get_context("spawn")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child inherits this until it can handle it
    children = []
    for folder in folders:
        # run(folder, None, steps); guard makes one line of an error, leave ends with its exit code.
        children.append(context.Process(target=leave, args=(guard, run, folder, None, steps)))
        children[-1].start()

    def pass_on(number, _):
        STOP.append(number)
        for child in children:
            child.terminate()

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    for child in children:
        child.join()
    codes = [128 + number for number in STOP]
    for child in children:
        codes.append(child.exitcode if child.exitcode >= 0 else 128 - child.exitcode)
    if any(codes):
        raise SystemExit(next(code for code in codes if code))


def train_command(given):
    """--toy, --model, --resume: train one run or two, then draw them, also after a signal."""
    # This draws from the files of runs, and imports nothing of ours.
    from experiments import figures

    task = None
    with together():
        if "resume" in given:
            folders = runs_in(given["resume"])
        else:
            folders, task = create_runs(given)
    with together():  # now the first process has written run.json
        large = read_run(folders[0])["config"]["model"]
    stopped = None
    try:
        # Two large models need not fit side by side, so these are trained one after the other.
        if len(folders) > 1 and RANKS == 1 and not large:
            side_by_side(folders, given.get("steps"))
        else:
            for folder in folders:
                run(folder, task, given.get("steps"))
    except SystemExit as error:
        if error.code < 128:  # no signal
            raise
        stopped = error
    if RANK == 0:
        figures.finish(folders)
    if stopped:
        raise stopped


def evaluate_run(folder, changes):
    """--eval: print held-out scores of a run, and those of its base."""
    folders = runs_in(folder)
    if len(folders) > 1:
        raise UserError(f"{folder} holds {len(folders)} runs; name one, such as {folders[-1]}")
    stored = read_run(folders[0])
    config = replace(Config(**stored["config"]), **changes)
    task = make_task_of(config)
    policy = load_policy(config, task)
    # The base first: load_checkpoint overwrites it.
    table = {"base": evaluate(policy, task, config)}
    if stored.get("layers"):
        table["base, tutored"] = evaluate(policy, task, config, stored["layers"])
    load_checkpoint(folders[0] / "checkpoint.safetensors", policy)
    table["this run"] = evaluate(policy, task, config) | evaluate_samples(policy, task, config)
    for name, scores in table.items() if RANK == 0 else ():
        print(f"{name:14}", *(f"{k} {v:.3f}" for k, v in scores.items() if v is not None))


def command(argv):
    """Do what the command line says."""
    connect()
    with together():
        given = parse(argv)
        actions = given.keys() & {"toy", "model", "resume", "eval", "help_metrics"}
        if len(actions) != 1:
            raise UserError("give one of --toy, --model, --resume and --eval; see --help")
        (action,) = actions
        # Flags that may stand beside an action which goes by what is stored. With --toy and --model
        # every flag may.
        changes = {"eval_split", "eval_problems"}
        allowed = {"resume": {"steps"}, "eval": changes, "help_metrics": set()}
        odd = given.keys() - actions - allowed.get(action, given.keys())
        if odd:
            flag = min(odd).replace("_", "-")
            raise UserError(f"--{action} goes by what is stored: leave out --{flag}")
        if action in allowed:
            # Raises if a value is out of range.
            make_config({name: given[name] for name in allowed[action] & given.keys()})
    if action == "help_metrics":
        print("\n".join(f"{name:18} {text}" for name, text in METRICS.items()))
    elif action == "eval":
        evaluate_run(given.pop("eval"), given)
    else:
        train_command(given)


def guard(action, *args):
    """Do it -> exit code. An error that the user can mend prints one line and gives code 2."""
    tell = True
    try:
        action(*args)
        return 0
    except UserError as error:
        text = str(error)
        # If all processes fail alike, the first prints the line.
        tell = RANK == 0 or getattr(error, "alone", False)
    except torch.OutOfMemoryError:
        text = """the GPU is full: `python -m experiments.fits MODEL` names flags that would fit;
            --checkpointing, --lora 16, a lower --sample-batch or --max-tokens need less"""
    except BrokenPipeError:  # whoever read the output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        text = f"{error.filename or 'disk'}: {error.strerror}; give a path that works, with room"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if tell:
        print("ptdpo.py:", *text.split(), file=sys.stderr)
    return 2


def main(argv=None):
    """Entry point -> exit code."""
    return guard(command, sys.argv[1:] if argv is None else argv)


def leave(action, *args):
    """Do it and end the process with its code."""
    try:
        code = action(*args)
    except SystemExit as error:
        code = error.code
    if RANKS > 1:
        # A normal exit of Python can abort here, because threads of gloo may still be running.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


if __name__ == "__main__":
    leave(main)
