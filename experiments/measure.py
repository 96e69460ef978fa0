"""What is measured without training: what a base solves, and what its hints and its tutor know.

measure() is for any policy. credit, recover and leak are experiments of reproduce.py: each takes
the base and a seed of test pictures, and returns values by label.
"""

from dataclasses import replace

import torch

import ptdpo
from toy_tasks.counting import CELLS, NUMBERS

KINDS = [("attention", "both"), ("attention", "where"), ("attention", "steps")]
KINDS += [(source, "both") for source in ("votes", "random", "oracle", "answer")]
PICTURES = 128  # of a seed


def sample_and_look(policy, task, config, layers, problems, key):
    """Answers of a policy to problems, and what it says of source and parts of a hint.

    Returns a Rollout, and a function (source, parts) -> a Hint a group.
    """
    rollout = ptdpo.sample_and_grade(policy, task, problems, config.group, key)
    _, relevance = ptdpo.read_answers(policy, rollout, layers, config)

    def hints(source, parts="both"):
        changed = replace(config, hint=source, hint_parts=parts)
        return ptdpo.build_hints(policy, task, rollout, relevance, changed, key)

    return rollout, hints


def measure(policy, task, config, layers, problems, kinds=KINDS):
    """What a policy solves alone and with each kind of hint, and the recall of these hints."""
    rollout, hints_of = sample_and_look(policy, task, config, layers, problems, ("measure", 0))
    found = {"alone": greedy_scores(policy, task, problems)}
    found["groups_all_failed"] = ptdpo.mean_of_all(rollout.solved_share() == 0)
    for source, parts in kinds:
        hints = hints_of(source, parts)
        scores = greedy_scores(policy, task, problems, [hint.text for hint in hints])
        recalls = [ptdpo.recall(hint.regions, p.targets) for hint, p in zip(hints, problems)]
        found[f"{source} {parts}"] = scores | {"recall": ptdpo.mean_of_all(recalls)}
    return found


def greedy_scores(policy, task, problems, hints=None):
    """Means of what ptdpo.judge says of greedy answers to problems."""
    rollout = ptdpo.sample_and_grade(policy, task, problems, 1, ("greedy",), True, hints)
    rows = [ptdpo.judge(problem, grades[0]) for problem, grades in zip(problems, rollout.grades)]
    names = ("accuracy", "point_f1", "right_reason")
    return {name: ptdpo.mean_of_all(column) for name, column in zip(names, zip(*rows))}


# ----------------------------------------------------------------------------------------- credit
@torch.no_grad()
def credit(policy, task, config, layers, seed):
    """Does the JSD point at the mistakes of failed answers? By source of the hint.

    auroc: probability that a mistake has a higher JSD than another token, as in the metric credit.
    words: the same without the ends of answers, which are neither right nor wrong; also by kind of
    mistake. share: share of the JSD that falls on mistakes. The policy gradient gives all tokens of
    an answer one weight: its AUROC is 0.5, and its share is that of mistakes among the tokens.
    """
    problems = ptdpo.pose(task, "test", seed, 0, PICTURES)
    rollout, hints_of = sample_and_look(policy, task, config, layers, problems, ("credit", seed))
    failed = rollout.mask & ~rollout.solved[:, None]
    mistakes = ptdpo.find_mistakes(policy, task, rollout)[failed]
    words = [policy.text([i]) for i in rollout.completion[failed].tolist()]
    judged = torch.tensor([word != policy.words[0] for word in words])
    every = torch.ones_like(judged)
    kinds = {"auroc": every, "words": judged}
    for name, group in (("cell", CELLS), ("total", ["total"]), ("number", NUMBERS)):
        kinds[f"wrong_{name}"] = torch.tensor([word in group for word in words])
    weights = {"policy gradient": torch.ones(len(words))}
    for source in ("attention", "votes", "oracle", "random", "answer", "none"):
        weights[source] = jsd_of_failed(policy, rollout, hints_of(source), config)
    found = {}
    for source, weight in weights.items():
        total = weight[judged].sum().item()
        found[source] = {"share": weight[mistakes].sum().item() / total if total else None}
        for name, kind in kinds.items():
            right = ~mistakes if name == "auroc" else judged & ~mistakes
            rows = right | (kind & mistakes)  # all right tokens, and mistakes of this kind
            found[source][name] = ptdpo.auroc(weight[rows], mistakes[rows])
    return found


def jsd_of_failed(policy, rollout, hints, config):
    """JSD of the tokens of failed answers [tokens]. It is rounded: below 1e-6 there is noise."""
    failed = ~rollout.solved
    teacher = ptdpo.read_teacher(policy, rollout, hints, failed, config)
    teacher = torch.cat([states for states in teacher if states is not None])
    hidden, _ = policy.forward(rollout.prompts, rollout.completion, rollout.mask)
    hidden = hidden[rollout.mask & failed[:, None]]
    head = policy.head().T
    return ptdpo.topk_jsd(hidden @ head, teacher @ head, config.top_k).round(decimals=6)


# ---------------------------------------------------------------------------------------- recover
@torch.no_grad()
def recover(policy, task, config, layers, seed):
    """Share of all-failed pictures that the tutored base solves at least once in G answers."""
    problems = ptdpo.pose(task, "test", seed, 0, PICTURES)
    rollout, hints_of = sample_and_look(policy, task, config, layers, problems, ("recover", seed))
    failed = (rollout.solved_share() == 0).nonzero()[:, 0].tolist()
    problems = [problems[b] for b in failed]
    key = ("recover again", seed)
    found = {}
    for source, parts in [("none", "both"), *KINDS]:
        hints = hints_of(source, parts)
        texts = [hints[b].text for b in failed]
        again = ptdpo.sample_and_grade(policy, task, problems, config.group, key, False, texts)
        share = ptdpo.mean_of_all(again.solved_share() > 0)
        found[source if parts == "both" else f"{parts} alone"] = {"recovered": share}
    return found


# ------------------------------------------------------------------------------------------- leak
@torch.no_grad()
def leak(policy, task, config, layers, seed, batches=80):
    """Do hints give the count away? Accuracy of a classifier that reads the hint alone."""
    sources = ("attention", "votes", "oracle", "random", "answer")
    texts = {source: [] for source in sources}
    counts = []
    for batch in range(batches):
        problems = ptdpo.pose(task, "leak", seed, batch * 50, 50)
        key = ("leak", seed, batch)
        _, hints_of = sample_and_look(policy, task, config, layers, problems, key)
        counts += [int(problem.answer) for problem in problems]
        for source in sources:
            texts[source] += [hint.text for hint in hints_of(source)]
    found = {source: {"guessed": guess_counts(texts[source], counts)} for source in sources}
    found["most frequent count"] = {"guessed": guess_counts([""] * len(counts), counts)}
    return found


def guess_counts(texts, counts):
    """Accuracy on the last fifth of the texts, of a linear classifier of the words of the rest."""
    vocabulary = sorted({word for text in texts for word in text.split()})
    rows = [[1.0] + [float(word in text.split()) for word in vocabulary] for text in texts]
    x = torch.tensor(rows)
    y = torch.tensor(counts)
    cut = len(texts) * 4 // 5
    wanted = torch.nn.functional.one_hot(y).float()
    weights = torch.linalg.lstsq(x[:cut], wanted[:cut], driver="gelsd").solution
    return ((x[cut:] @ weights).argmax(-1) == y[cut:]).float().mean().item()


MEASUREMENTS = {"credit": credit, "recover": recover, "leak": leak}
