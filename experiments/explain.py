"""Tell the next training step of a run with its own numbers.

    python -m experiments.explain           the first step from the toy's base
    python -m experiments.explain RUN       the next step of a run, such as runs/toy/ptdpo
    python -m experiments.explain --mixed   a group with solved and failed answers

It tells a group that the method exists for: all answers failed, so every advantage is 0, and only
the tutored teacher has something to say. Nothing is trained or saved.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

import ptdpo

TOLD = 40  # tokens of an answer that are told
HOW_TO_READ = """
   reward weight: advantage times the token's share of the mean. Below 0 the token becomes less
   likely, whatever was wrong with it. JSD weight: lambda times the token's share of the mean.
   The teacher judges each next word after the student's own words. Where an answer stopped
   pointing too soon, it points on. Then it gives the number of the points that are there."""


def load(folder):
    """A run as it stands, or the toy's base -> config, task, policy, reference, layers, step."""
    config = ptdpo.Config()
    if folder:
        folder = ptdpo.runs_in(folder)[-1]
        config = ptdpo.Config(**ptdpo.read_run(folder)["config"])
    task = ptdpo.make_task_of(config)
    policy = ptdpo.load_policy(config, task)
    ref = policy.frozen_copy()
    layers = []
    step = 1
    if folder:
        step += ptdpo.load_checkpoint(folder / "checkpoint.safetensors", policy)
        layers = ptdpo.read_run(folder)["layers"]
    if config.hint == "attention" and not layers:  # a run of GRPO is told with hints all the same
        by_layer = ptdpo.calibrate(ref, task, config)
        layers = [by_layer.index(max(by_layer))]
    return replace(config, method="ptdpo"), task, policy, ref, layers, step


@torch.no_grad()
def explain(folder, mixed):
    """Choose a group of the next step, and tell it."""
    config, task, policy, ref, layers, step = load(folder)
    # What follows is ptdpo.train_step up to its update.
    key = (config.seed, step)
    problems = ptdpo.pose(task, "train", config.seed, step * config.prompts, config.prompts)
    rollout = ptdpo.sample_and_grade(policy, task, problems, config.group, key)
    advantages = ptdpo.group_advantages(rollout.rewards, config.group)
    logp_ref, relevance = ptdpo.read_answers(ref, rollout, layers, config)
    hints = ptdpo.build_hints(ref, task, rollout, relevance, config, key)
    distill = ptdpo.answers_to_distill(rollout, config)
    answers = (rollout.prompts, rollout.completion, rollout.mask)
    kl_on = ptdpo.answers_under_kl(rollout, config)
    batch = ptdpo.Batch(*answers, advantages, logp_ref, kl_on, distill, [None] * len(problems))
    weights = ptdpo.token_weights(batch, config, config.distill_weight)
    share = rollout.solved_share()
    is_mixed = (share > 0) & (share < 1)
    wanted = is_mixed if mixed else share == 0
    wanted = wanted & distill.view(len(share), -1).any(1)
    counts = f"{(share == 0).sum()} groups failed as a whole, {is_mixed.sum()} are mixed"
    if not wanted.any():
        print(f"Step {step}: {counts}. None can be told; try another run, or --mixed")
        return
    b = wanted.nonzero()[0, 0].item()
    print(f"Step {step}, group {b} of {len(share)}. In this step {counts}.\n")
    rows = slice(b * config.group, (b + 1) * config.group)
    group = rollout.take(b, b + 1)
    tell_group(policy, group, advantages[rows], distill[rows], hints[b])
    teacher = ptdpo.read_teacher(ref, group, [hints[b]], distill[rows], config)[0]
    tell_answer(policy, ref, group, advantages[rows], distill[rows], teacher, weights[rows], config)


def tell_group(policy, group, advantages, distill, hint):
    """Question, answers with rewards and advantages, and the hint."""
    problem = group.problems[0]
    print(f"1. The question: {problem.question}   (true answer: {problem.answer})")
    for row in range(getattr(policy, "side", 0)):
        cells = range(row * policy.side, (row + 1) * policy.side)
        print("   " + "".join(f"{' '.join(problem.objects.get(c, '-')):16}" for c in cells))
    print("\n2. Its answers, with their rewards and advantages (reward - mean) / std:")
    told = distill.tolist().index(True)
    for g, text in enumerate(group.texts[0]):
        mark = "  <- told below" if g == told else ""
        print(f"   {group.rewards[g]:3.1f}  {advantages[g]:+.2f}   {text}{mark}")
    if not advantages.any():
        print("   All failed alike, so every advantage is 0: GRPO learns nothing from this group.")
    print("\n3. The frozen base reads the answers again. Where it looks becomes the hint:")
    print(f"   {hint.text}")
    found = ptdpo.recall(hint.regions, problem.targets)
    if found is not None:
        print(f"   It names {found:.0%} of the true targets.")
    print("   The student never sees it. The teacher is the frozen base that has read it.")


def tell_answer(policy, ref, group, advantages, distill, teacher, weights, config):
    """The first failed answer token by token: what student and teacher would say next."""
    g = distill.tolist().index(True)
    mask = group.mask[g]
    hidden = policy.forward(group.prompts, group.completion, group.mask)[0][g][mask]
    student = ptdpo.chunk_logits(hidden, policy.head(), policy.suppress_ids)
    # The teacher's states are those of all failed answers, one behind the other.
    tutored = ptdpo.chunk_logits(teacher[: len(hidden)], ref.head(), policy.suppress_ids)
    jsd = ptdpo.topk_jsd(student, tutored, config.top_k, config.divergence)
    print("\n4. The failed answer, token by token, and the three next words that are likeliest:")
    print(f"   {'':10}{'':36}{'':36}{'':8}{'reward':>9}{'JSD':>9}")
    heads = f"{'token':10}{'student':36}{'tutored teacher':36}"
    print(f"   {heads}{'JSD':>8}{'weight':>9}{'weight':>9}")
    for t, token in enumerate(group.completion[g][mask].tolist()[:TOLD]):
        line = f"{policy.text([token]):10}{likeliest(policy, student[t]):36}"
        line += f"{likeliest(policy, tutored[t]):36}{jsd[t]:8.3f}"
        reward_weight = weights[g, t, 0] * advantages[g]
        print(f"   {line}{reward_weight:+9.4f}{weights[g, t, 2]:9.4f}")
    print(HOW_TO_READ)


def likeliest(policy, logits, count=3):
    """The likeliest next words with their probabilities, as text."""
    top = logits.softmax(-1).topk(count)
    words = []
    for i, probability in zip(top.indices.tolist(), top.values.tolist()):
        words.append(f"{policy.text([i])} {probability:.2f}")
    return "  ".join(words)


def main(argv=None):
    """Entry point -> exit code."""
    parser = argparse.ArgumentParser("experiments.explain")
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run")
    parser.add_argument("--mixed", action="store_true", help="tell a mixed group")
    args = parser.parse_args(argv)
    return ptdpo.guard(explain, args.run, args.mixed)


if __name__ == "__main__":
    sys.exit(main())
