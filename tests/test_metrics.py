"""Every metric, on rollouts made by hand: what each number means, and when it is unknown."""

import base64
import io
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import config, table
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ptdpo
from ptdpo import Hint, Rollout
from toy_tasks import Grade, Problem

WORDS = SimpleNamespace(text=lambda ids: " ".join(map(str, ids)))  # a policy that can only spell


# -------------------------------------------------------------------------------------- the step
MARKED = SimpleNamespace(mistakes=lambda problem, words: [w in ("11", "21", "30") for w in words])


@pytest.fixture
def step():
    """Three groups of two answers of up to three tokens: all failed but one, failed, solved."""
    problems = [Problem([], "", "1", targets=t) for t in ([1, 2], [3], [4, 5, 6, 7])]
    rewards = [1.0, 0.1, 0.0, 0.1, 0.9, 0.9]
    grades = [Grade(r, r > 0.5) for r in rewards]
    rollout = Rollout(
        problems=problems,
        prompts=[0, 1, 2],
        completion=10 * torch.arange(6)[:, None] + torch.arange(3),  # token t of answer n: 10 n + t
        mask=torch.arange(3) < torch.tensor([1, 3, 2, 2, 1, 1])[:, None],
        texts=[["one", "two"]] * 3,
        grades=[grades[:2], grades[2:4], grades[4:]],
        rewards=torch.tensor(rewards),
        solved=torch.tensor(rewards) > 0.5,
    )
    at = torch.arange(18.0).view(6, 3)  # tokens in the mask: 0 | 3 4 5 | 6 7 | 9 10 | 12 | 15
    tokens = {"jsd": at / 100, "kl": at / 10, "entropy": at, "logp": -at}
    hints = [Hint([1, 9], "", False), Hint([8, 9], "", True), Hint([4, 5], "", False)]
    return rollout, hints, ~rollout.solved, tokens


def test_step_metrics_by_hand(step):
    """Each number worked out. credit: mistakes have JSD .04, .07, .09, the others .03 .05 .06 .10.

    Of 12 pairs the mistake is above in 1 + 3 + 3.
    """
    row = ptdpo.step_metrics(WORDS, MARKED, *step)
    expected = {
        "reward": 3.0 / 6,
        "solved": (1 / 2 + 0 + 1) / 3,
        "groups_all_failed": 1 / 3,
        "groups_mixed": 1 / 3,
        "groups_all_solved": 1 / 3,
        "distilled": 7 / 10,
        "jsd": (3 + 4 + 5 + 6 + 7 + 9 + 10) / 700,
        "kl": (0 + 3 + 4 + 5 + 6 + 7 + 9 + 10 + 12 + 15) / 100,
        "entropy": (0 + 3 + 4 + 5 + 6 + 7 + 9 + 10 + 12 + 15) / 10,
        "entropy_failed": (3 + 4 + 5 + 6 + 7 + 9 + 10) / 7,
        "entropy_solved": (0 + 12 + 15) / 3,
        "answer_entropy": (0 + 12 + 13 + 19 + 12 + 15) / 6,
        "completion_length": 10 / 6,
        "hint_recall": (1 / 2 + 0 + 1 / 2) / 3,
        "hints_rejected": 1 / 3,
        "credit": 7 / 12,
    }
    assert row == {name: pytest.approx(value) for name, value in expected.items()}
    rollout, hints, _, tokens = step  # solved answers are distilled, too, but hold no mistakes
    row = ptdpo.step_metrics(WORDS, MARKED, rollout, hints, torch.ones(6).bool(), tokens)
    assert row["credit"] == pytest.approx(7 / 12)
    others = "step entropy_slope grad_norm skipped accuracy point_f1 right_reason".split()
    others += ["pass_1", "pass_8", "ways", "seconds"]
    assert row.keys() | set(others) == ptdpo.METRICS.keys()


def test_what_cannot_be_known_is_null(step):
    """No hints, nothing distilled, no failure, a problem without targets, a task without marks."""
    rollout, hints, distill, tokens = step
    row = ptdpo.step_metrics(WORDS, MARKED, rollout, [], torch.zeros(6).bool(), tokens)
    assert {name for name, value in row.items() if value is None} == {"jsd"}
    assert not row.keys() & {"hint_recall", "hints_rejected", "credit"}
    assert "credit" not in ptdpo.step_metrics(WORDS, object(), *step)
    rollout.problems[1].targets = None
    solved = replace(rollout, solved=torch.ones(6).bool())
    row = ptdpo.step_metrics(WORDS, MARKED, solved, hints, torch.zeros(6).bool(), tokens)
    unknown = {"jsd", "hint_recall", "entropy_failed", "credit"}
    assert {name for name, value in row.items() if value is None} == unknown
    failed = replace(rollout, solved=torch.zeros(6).bool())
    row = ptdpo.step_metrics(WORDS, MARKED, failed, hints, distill, tokens)
    assert row["entropy_solved"] is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2, 5.0]), st.booleans()), min_size=1))
def test_auroc_against_all_pairs(pairs):
    """Share of pairs in which the positive scores higher, ties half; null with one side empty."""
    scores = torch.tensor([score for score, _ in pairs])
    positive = torch.tensor([mark for _, mark in pairs])
    ups = [score for score, mark in pairs if mark]
    downs = [score for score, mark in pairs if not mark]
    if not ups or not downs:
        assert ptdpo.auroc(scores, positive) is None
        return
    wins = sum((a > b) + (a == b) / 2 for a, b in product(ups, downs))
    assert ptdpo.auroc(scores, positive) == pytest.approx(wins / len(ups) / len(downs), abs=1e-6)


def test_entropy_slope_by_hand():
    """Least squares: a line has its own slope; 1, 3, 2 rises by 1/2; one row has none."""
    slope = lambda *values: ptdpo.entropy_slope([{"entropy": value} for value in values])
    assert slope(*[2 - 0.1 * i for i in range(10)]) == pytest.approx(-0.1, abs=1e-6)
    assert slope(1.0, 3.0, 2.0) == pytest.approx(0.5)
    assert slope(1.0) is slope(1.0, None) is None


def test_judge_by_hand():
    """Solved; F1 of the points; solved with exactly the targets. Named twice counts once."""
    judge = lambda solved, points, targets: ptdpo.judge(
        Problem([], "", "", targets=targets), Grade(1.0, solved, points)
    )
    assert judge(True, [2, 1, 1], [1, 2]) == (True, 1.0, True)
    assert judge(False, [2, 1, 1], [1, 2]) == (False, 1.0, False)
    assert judge(True, [1], [1, 2, 3]) == (True, 0.5, False)
    assert judge(True, None, [1, 2]) == judge(True, [1, 2], None) == (True, None, None)


# ------------------------------------------------------------------------------------- held out
SPELLED = {  # by problem: the greedy answer, and eight sampled ones; the last letter is the number
    0: ("ab2", "ab2 ab2 ba2 ac2 ab1 ab1 ab1 ab1"),  # two right ways; ac2 is right by luck
    1: ("abc3", "abc3 abc3 abc2 a1 a1 a1 a1 a1"),  # three ways, but always the same one
    2: ("a2", "a1 a1 a1 a1 a1 a1 a1 a1"),
    3: ("bc1", "b1 a2 a2 a2 a2 a2 a2 a2"),  # one right answer: no pair
}
TARGETS = {0: "ab", 1: "abc", 2: "abcd", 3: "b"}


class Spelling:
    """A task and a policy in one, which says what SPELLED has in store."""

    max_tokens = 1
    held_out = math.inf
    stop_ids = (-1,)

    def problem(self, split, seed, index):
        assert (split, seed) == ("validation", 0)
        targets = TARGETS[index % 4]
        return Problem([], str(index % 4), str(len(targets)), targets=list(targets))

    def encode(self, problem, hint=""):
        return int(problem.question)

    def sample(self, prompts, uniforms, greedy):
        G = len(uniforms) // len(prompts)
        assert (G, greedy) in ((1, True), (8, False))
        return torch.tensor([[100 * p + 10 * greedy + g] for p in prompts for g in range(G)])

    def text(self, ids):
        greedy, sampled = SPELLED[ids[0] // 100]
        return greedy if ids[0] % 100 == 10 else sampled.split()[ids[0] % 10]

    def grade(self, problem, text, finished):
        solved = text[-1] == problem.answer
        return Grade(float(solved), solved, list(text[:-1]))


def test_scores_of_greedy_answers_by_hand():
    """accuracy, point_f1, right_reason over four problems; unknown for one is unknown for all."""
    task = Spelling()
    scores = ptdpo.evaluate(task, task, config(eval_problems=4))
    f1 = (1 + 1 + 2 / 5 + 2 / 3) / 4
    assert scores == pytest.approx({"accuracy": 3 / 4, "point_f1": f1, "right_reason": 2 / 4})
    task.grade = lambda *a: Grade(1.0, True, None)
    scores = ptdpo.evaluate(task, task, config(eval_problems=4))
    assert scores == {"accuracy": 1, "point_f1": None, "right_reason": None}


def test_scores_of_sampled_answers_by_hand():
    """pass_1 and pass_8 over 4 problems, and ways.

    Of right answers, problem 0 has ab, ab, ba: 2 of 3 pairs differ, of 2 ways by chance 3/2 would.
    Problem 1 has abc, abc: 0 of 1 pairs differ, of 3 ways by chance 2/3 would.
    """
    c = config(eval_problems=39)  # an eighth of it: 4
    task = Spelling()
    assert ptdpo.evaluate_samples(task, task, c)["ways"] is None
    task.ways = lambda problem: len(problem.targets)
    scores = ptdpo.evaluate_samples(task, task, c)
    expected = {"pass_1": (4 + 2 + 0 + 1) / 32, "pass_8": 3 / 4, "ways": 2 / (3 / 2 + 2 / 3)}
    assert scores == pytest.approx(expected)
    task.ways = lambda problem: 1  # uniform choice among one way never differs
    assert ptdpo.evaluate_samples(task, task, c)["ways"] is None


@pytest.mark.parametrize(("count", "limit"), [(1, 99), (64, 99), (150, math.inf), (150, 70)])
def test_held_out_problems_come_once_each(count, limit):
    """In batches of about 64; a task may have fewer than are asked for."""
    task = SimpleNamespace(held_out=limit, problem=lambda *key: key)
    starts, batches = zip(*ptdpo.held_out(task, config(eval_split="test"), count))
    assert list(starts) == [batch[0][2] for batch in batches]
    keys = [key for batch in batches for key in batch]
    assert keys == [("test", 0, i) for i in range(min(count, limit))]
    assert max(map(len, batches)) < 2 * 64


# ------------------------------------------------------------------------------ monitor and sample
HEALTHY = {"step": 10, "entropy": 1.0, "solved": 0.3, "groups_mixed": 0.5, "skipped": 0}
HEALTHY |= {"groups_all_solved": 0.0, "jsd": 0.1, "hint_recall": 0.9, "accuracy": None}
SHOWN = {"chance": 0.4, "texts": ["some words"], "answer": "7"}


@pytest.mark.parametrize(("change", "words"), table("warnings"))
def test_warnings_come_after_ten_such_steps(change, words, capsys):
    """Each names the signal and a remedy; one sound step among the ten, and nothing is said."""
    sick = HEALTHY | change
    lines = ptdpo.monitor([sick] * 10, HEALTHY, 0.4)
    assert len(lines) == len(words)
    assert all(word in line and ": " in line for word, line in zip(words, lines))
    assert ptdpo.monitor([HEALTHY] + [sick] * 9, HEALTHY, 0.4) == []
    for steps in (9, 10, 15, 20):
        ptdpo.report(config(), [HEALTHY] + [sick] * (steps - 1), SHOWN)
        said = "".join(capsys.readouterr()).count("warning: ")
        assert said == (len(words) if steps == 20 else 0)
    ptdpo.report(config(), [HEALTHY | {"solved": 0.0}] * 10, SHOWN)
    assert "answered 'some words', expected '7'" in "".join(capsys.readouterr())
    ptdpo.report(config(), [HEALTHY | {"skipped": 1}], SHOWN)
    assert "gradient is not finite, update left out: lower --lr" in "".join(capsys.readouterr())


def test_sample_row_is_the_first_group_in_full(step):
    """Question, answers by token with the JSD of each, the hint, where the reference looked."""
    rollout, hints, _, tokens = step
    problem = Problem([Image.new("RGB", (400, 200), "red")] * 2, "how many ?", "1")
    rollout = replace(rollout, problems=[problem, *rollout.problems[1:]])
    policy = SimpleNamespace(text=WORDS.text, region_names=lambda prompt: list("abcd"))
    relevance = [torch.tensor([[0.1, 0.2], [0.3, 0.6]])] * 3
    c = config(hint_regions=3)
    row = ptdpo.sample_row(policy, rollout, hints, relevance, tokens, c)
    (png,) = row.pop("pictures")
    assert Image.open(io.BytesIO(base64.b64decode(png))).size == (336, 168)
    assert row == {
        "question": "how many ?",
        "answer": "1",
        "texts": ["one", "two"],
        "tokens": [["0"], ["10", "11", "12"]],
        "jsd": [[0.0], pytest.approx([0.03, 0.04, 0.05])],
        "rewards": [1.0, 0.1],
        "solved": [True, False],
        "hint": {"regions": [1, 9], "text": "", "rejected": False},
        "relevance": pytest.approx([0.2, 0.4]),
        "chance": 0.75,
    }
    row = ptdpo.sample_row(policy, rollout, [], [], tokens, c)
    assert row["hint"] is row["relevance"] is None
