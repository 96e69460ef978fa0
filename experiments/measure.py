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


def sample_and_look(policy, task, config, layers, problems, key):
    """Answers of a policy to problems, and what it says of source and parts of a hint.

    Returns a Rollout, and a function (source, parts) -> a Hint a group.
    """
    rollout = ptdpo.sample_and_grade(policy, task, problems, config.group, key)
    _, relevance = ptdpo.read_reference(policy, rollout, layers, config)

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

    auroc: probability that a mistake has a higher JSD than a right token; also by kind of mistake.
    share: share of the JSD that falls on mistakes. The end of an answer is neither right nor wrong
    and is left out; auroc_with_end takes it for right, as it is cheap to tell from a mistake. The
    policy gradient gives all tokens of an answer one weight, so its AUROC is 0.5, and its share is
    that of mistakes among the tokens.
    """
    problems = ptdpo.pose(task, "test", seed, 0, 128)
    rollout, hints_of = sample_and_look(policy, task, config, layers, problems, ("credit", seed))
    failed = rollout.mask & ~rollout.solved[:, None]
    mistakes = ptdpo.find_mistakes(policy, task, rollout)[failed]
    words = [policy.text([i]) for i in rollout.completion[failed].tolist()]
    groups = {"auroc": [*CELLS, "total", *NUMBERS], "auroc_with_end": policy.words}
    groups |= {"wrong_cell": CELLS, "early_total": ["total"], "wrong_number": NUMBERS}
    kinds = {name: torch.tensor([word in group for word in words]) for name, group in groups.items()}
    found = {"policy gradient": judge_credit(torch.ones(len(words)), mistakes, kinds)}
    for source in ("attention", "votes", "oracle", "random", "answer", "none"):
        jsd = jsd_of_failed(policy, rollout, hints_of(source), config)
        found[source] = judge_credit(jsd, mistakes, kinds)
    return found


def judge_credit(weights, mistakes, kinds):
    """AUROC of weights [tokens] for mistakes of each kind against right tokens, and their share."""
    found = {}
    right = kinds["auroc"] & ~mistakes
    for name, kind in kinds.items():
        judged = kind & mistakes | right
        if name == "auroc_with_end":
            judged = kind
        found[name] = ptdpo.auroc(weights[judged], mistakes[judged])
    total = weights[kinds["auroc"]].sum()
    found["share"] = (weights[mistakes].sum() / total).item() if total > 0 else None
    return found


def jsd_of_failed(policy, rollout, hints, config):
    """JSD of the tokens of failed answers [tokens]. It is rounded: below 1e-6 there is noise."""
    failed = ~rollout.solved
    teacher = ptdpo.tutor(policy, rollout, hints, failed, config)
    teacher = torch.cat([states for states in teacher if states is not None])
    hidden, _ = policy.forward(rollout.prompts, rollout.completion)
    hidden = hidden[rollout.mask & failed[:, None]]
    head = policy.head().T
    return ptdpo.topk_jsd(hidden @ head, teacher @ head, config.top_k).round(decimals=6)


# ---------------------------------------------------------------------------------------- recover
@torch.no_grad()
def recover(policy, task, config, layers, seed):
    """Share of all-failed pictures that the tutored base solves at least once in G answers."""
    problems = ptdpo.pose(task, "test", seed, 0, 128)
    rollout, hints_of = sample_and_look(policy, task, config, layers, problems, ("recover", seed))
    failed = (rollout.solved_share() == 0).nonzero()[:, 0].tolist()
    problems = [problems[b] for b in failed]
    kinds = {"no hint": ("none", "both")}
    kinds |= {"where alone": ("attention", "where"), "steps alone": ("attention", "steps")}
    kinds |= {s: (s, "both") for s in ("attention", "votes", "random", "oracle", "answer")}
    found = {}
    for label, kind in kinds.items():
        hints = hints_of(*kind)
        texts = [hints[b].text for b in failed]
        key = ("recover again", seed)
        again = ptdpo.sample_and_grade(policy, task, problems, config.group, key, False, texts)
        found[label] = {"recovered": ptdpo.mean_of_all(again.solved_share() > 0)}
    return found


# ------------------------------------------------------------------------------------------- leak
@torch.no_grad()
def leak(policy, task, config, layers, seed, pictures=4000):
    """Do hints give the count away?

    guessed: accuracy of a classifier that reads the hint alone. shown, told: how often the base,
    given another picture with a hint, answers the count of that picture, or of the hint's own one.
    """
    texts = {source: [] for source in ("attention", "votes", "oracle", "random", "answer")}
    counts = []
    for first in range(0, pictures, 50):
        problems = ptdpo.pose(task, "leak", seed, first, 50)
        key = ("leak", seed, first)
        _, hints_of = sample_and_look(policy, task, config, layers, problems, key)
        counts += [int(problem.answer) for problem in problems]
        for source in texts:
            texts[source] += [hint.text for hint in hints_of(source)]
    found = {}
    for source in texts:
        guessed, most_frequent = guess_counts(texts[source], counts, policy.words)
        found[source] = {"guessed": guessed}
        found["most frequent count"] = {"guessed": most_frequent}
    problems = ptdpo.pose(task, "test", seed, 0, 128)
    _, hints_of = sample_and_look(policy, task, config, layers, problems, ("leak", seed))
    for source in ("attention", "answer"):
        found[source] |= swap_pictures(policy, task, problems, hints_of(source))
    return found


@torch.enable_grad()
def guess_counts(texts, counts, words):
    """Accuracy of a classifier of hints, and of the most frequent count, on the last fifth."""
    x = torch.tensor([[float(word in text.split()) for word in words] for text in texts])
    y = torch.tensor(counts)
    cut = len(texts) * 4 // 5
    torch.manual_seed(0)
    layers = [torch.nn.Linear(len(words), 64), torch.nn.ReLU(), torch.nn.Linear(64, len(NUMBERS))]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    for _ in range(6):
        for rows in torch.randperm(cut).split(128):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    guessed = model(x[cut:]).argmax(-1) == y[cut:]
    most_frequent = y[:cut].mode().values == y[cut:]
    return guessed.float().mean().item(), most_frequent.float().mean().item()


def swap_pictures(policy, task, problems, hints):
    """Greedy answers with a true hint and the next picture: whose count, where the two differ?"""
    swapped = []
    texts = []
    shown = []
    for problem, other, hint in zip(problems, problems[1:], hints):
        colour, shape = problem.question.split()[2:4]
        regions = hint.regions or range(len(CELLS))
        here = sum(other.objects.get(cell) == (colour, shape) for cell in regions)
        if str(here) != problem.answer:
            swapped.append(replace(problem, images=other.images))
            texts.append(hint.text)
            shown.append(str(here))
    rollout = ptdpo.sample_and_grade(policy, task, swapped, 1, ("swapped",), True, texts)
    last = [answers[0].split()[-1:] for answers in rollout.texts]
    told = [problem.answer for problem in swapped]
    return {
        "shown": ptdpo.mean_of_all([word == [n] for word, n in zip(last, shown)]),
        "told": ptdpo.mean_of_all([word == [n] for word, n in zip(last, told)]),
    }


MEASUREMENTS = {"credit": credit, "recover": recover, "leak": leak}
