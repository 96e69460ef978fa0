"""Experiments: intervals, claims and measures by hand; controls; runs that are taken up again."""

import json
import shutil

import pytest
import torch
from helpers import ROOT

import ptdpo
from toy_tasks import reproduce
from toy_tasks.reproduce import Claim, interval, judge_claim, measure_run, steps_to

SUMMARIES = sorted((ROOT / "assets/results").glob("*/summary.json"))


def test_interval_by_hand():
    """Of 1, 2, 3: standard error 1 / sqrt(3), and 4.303 of them at two degrees of freedom."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert interval([5.0]) == (5.0, float("inf"))


def row(step, accuracy=None, **more):
    """A row of metrics.jsonl with what is measured on it."""
    names = (*reproduce.USUAL, "entropy_failed", *reproduce.GROUPS)
    return {"step": step, **dict.fromkeys(names), "accuracy": accuracy, **more}


def test_steps_to_needs_two_evaluations_in_a_row():
    """A single lucky evaluation does not count."""
    rows = [row(s, a) for s, a in ((1, 0.1), (5, 0.6), (10, 0.4), (15, 0.5), (20, 0.7))]
    assert steps_to(rows, 0.5) == 15
    assert steps_to(rows, 0.9) is None and steps_to(rows, None) is None


def test_measures_of_a_run_by_hand():
    """Area over evaluations alone, recall over all steps, entropy where GRPO's end is reached."""
    rival = [{"step": 0}, row(1, 0.1), row(2, 0.3)]
    rows = [
        {"step": 0},
        row(1, 0.1, entropy=0.9, hint_recall=0.5),
        row(2, None, entropy=0.8, hint_recall=1.0),
        row(3, 0.4, entropy=0.7, hint_recall=0.9),
        row(4, 0.7, entropy=0.2, hint_recall=0.8),
    ]
    found = measure_run(rows, rival)
    assert found["area"] == pytest.approx(0.4) and found["accuracy"] == 0.7
    assert found["hint_recall"] == found["hint_recall_early"] == pytest.approx(0.8)
    assert found["to_grpo"] == 3 and found["entropy_at_grpo"] == 0.7
    assert reproduce.rival_of("votes", ["grpo", "votes"]) == "grpo"
    assert reproduce.rival_of("dapo_twice_tutored", ["dapo_twice", "grpo"]) == "dapo_twice"
    assert reproduce.rival_of("ptdpo_long", ["grpo_long", "grpo"]) == "grpo_long"
    assert reproduce.rival_of("grpo", ["grpo"]) == "grpo"
    never = measure_run([{"step": 0}, row(1, 0.1), row(2, 0.2)], rival)
    assert never["to_grpo"] == 2 and never["entropy_at_grpo"] is None


@pytest.mark.parametrize(
    ("a", "b", "sign", "verdict"),
    [
        ([0.9, 0.8, 0.9], [0.1, 0.1, 0.2], 1, "agrees"),
        ([0.9, 0.8, 0.9], [0.1, 0.1, 0.2], -1, "differs"),
        ([0.1, 0.2, 0.1], [0.9, 0.8, 0.9], -1, "agrees"),
        ([0.9, 0.1, 0.5], [0.5, 0.5, 0.5], 1, "not resolved"),
        ([None, 0.1], [0.5, 0.5], 1, "no value"),
    ],
)
def test_verdicts(a, b, sign, verdict):
    """Only where the paired 95 % interval excludes 0, and only in the direction of the claim."""
    found = {"x": [{"m": v} for v in a], "y": [{"m": v} for v in b]}
    assert judge_claim(Claim("", "m", "x", "y", sign), found)["verdict"] == verdict


def test_every_experiment_names_known_arms_and_settings():
    """Arms exist, claims are about arms that are run, settings are fields of Config."""
    for experiment in reproduce.EXPERIMENTS.values():
        arms = experiment.arms.split()
        assert set(arms) <= set(reproduce.ARMS)
        assert all({c.arm, c.other} <= set(arms) for c in experiment.claims)
    for changes in reproduce.ARMS.values():
        settings = {k: v for k, v in changes.items() if k != "control"}
        ptdpo.make_config(settings)


def pair(V=40, N=12, F=9, seed=0):
    """Hidden states, head, targets, and a teacher for the first F."""
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(N, 16, generator=g), torch.randn(V, 16, generator=g)
    teacher = hidden[:F] + 0.5 * torch.randn(F, 16, generator=g)
    return hidden.double().requires_grad_(), head.double(), torch.arange(N), teacher.double()


def test_zero_gradient_control_has_the_value_and_no_gradient(monkeypatch):
    """What the released default does: a loss that is logged and teaches nothing."""
    monkeypatch.setitem(ptdpo.DIVERGENCES, "zero_gradient", reproduce.zero_gradient)
    hidden, head, targets, teacher = pair()
    values = [
        ptdpo.token_stats(hidden, head, targets, teacher, head, 5, divergence=name)[2]
        for name in ("jsd", "zero_gradient")
    ]
    assert torch.equal(*values) and values[0].sum() > 0.1
    grads = [torch.autograd.grad(v.sum(), hidden)[0] for v in values]
    assert grads[0].abs().max() > 1e-3 and grads[1].abs().max() == 0


def test_student_support_control():
    """Equals the union where both sides prefer the same words; elsewhere it misses the hint's."""
    hidden, head, targets, teacher = pair()
    same = hidden[:9].detach() * 1.01  # the same order of words, another sharpness
    ours = ptdpo.token_stats(hidden, head, targets, same, head, 5)
    theirs = reproduce.student_support(hidden, head, targets, same, head, 5)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-12)
    ours = ptdpo.token_stats(hidden, head, targets, -teacher, head, 2)[2]
    theirs = reproduce.student_support(hidden, head, targets, -teacher, head, 2)[2]
    assert (theirs[:9] < ours[:9]).all() and theirs[9:].abs().max() == 0


def test_a_leak_would_be_found():
    """The classifier of the leak experiment reads a count off hints that hold it, not off noise."""
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(3, 9, (2000,), generator=g).tolist()
    words = [str(n) for n in range(13)] + ["look", "a", "b"]
    leaking, majority = reproduce.guess_counts([f"look {n}" for n in counts], counts, words)
    assert leaking.mean() > 0.95 and majority.mean() < 0.3
    noise = torch.randint(0, 2, (2000,), generator=g).tolist()
    blind, majority = reproduce.guess_counts([f"look {'ab'[n]}" for n in noise], counts, words)
    assert abs(blind.mean() - majority.mean()) < 0.1


SMALL = "--seeds 1 --steps 2 --prompts 2 --group 2 --eval-problems 4".split()


def test_reproduce_is_taken_up_again(tmp_path, capsys):
    """Summary, figure and circumstances; the second call trains nothing."""
    command = ["--reproduce", "bases", *SMALL, "--out", str(tmp_path)]
    assert ptdpo.main(command) == 0
    folder = tmp_path / "bases"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == [200] and len(summary["arms"]) == 4
    assert (folder / "figure.png").stat().st_size > 10_000
    about = json.loads((folder / "about.json").read_text())
    assert {"command", "commit", "versions", "cores"} <= set(about)
    run = json.loads((tmp_path / "runs/ptdpo_base_1/200/run.json").read_text())
    assert run["config"]["eval_split"] == "test" and run["config"]["seed"] == 200
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/*/*")}
    assert ptdpo.main(command) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/*/*")} == before
    assert json.loads((folder / "summary.json").read_text()) == summary
    (folder / "figure.png").unlink()
    assert ptdpo.main(["--plot", str(folder)]) == 0 and (folder / "figure.png").exists()


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda p: p.parent.name)
def test_committed_figures_are_drawn_again_without_training(path, tmp_path):
    """From the summary alone; and its verdicts follow from its numbers."""
    shutil.copy(path, tmp_path / "summary.json")
    reproduce.draw_summary(tmp_path / "summary.json")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for claim in json.loads(path.read_text())["claims"]:
        if claim["verdict"] in ("agrees", "differs"):
            assert abs(claim["difference"]) > claim["half_width"]


def test_arms_are_what_they_are_called(tmp_path, capsys):
    """No flag may change what an arm's name means; no run is replaced by one of other settings."""
    for flag in (["--method", "grpo"], ["--hint", "random"], ["--lr", "1"], ["--task", "beside"]):
        given = ["--reproduce", "entropy", *SMALL, *flag, "--out", str(tmp_path / "a")]
        assert ptdpo.main(given) == 2 and flag[0] in capsys.readouterr().err
        assert not (tmp_path / "a").exists()
    folder = tmp_path / "ptdpo"
    common = {"steps": 2, "prompts": 2, "group": 2, "eval_problems": 2}
    reproduce.one_run("ptdpo", 200, folder, common)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ptdpo.UserError, match="give another --out"):
        reproduce.one_run("ptdpo", 200, folder, common | {"steps": 1})
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_shared_flags_reach_every_arm(tmp_path, monkeypatch):
    """From any folder; a long run stays three times as long."""
    seen = {}
    monkeypatch.setattr(
        ptdpo, "train", lambda _, task, config, folder, **__: seen.update({folder: config})
    )
    monkeypatch.chdir(tmp_path)
    common = {"steps": 4, "eval_every": 2, "eval_problems": 16}
    for arm in ("grpo", "ptdpo_long", "qwen_ptdpo", "qwen_grpo_long"):
        reproduce.one_run(arm, 200, tmp_path / arm, common)
        config = seen[tmp_path / arm]
        assert (config.eval_every, config.eval_problems, config.eval_split) == (2, 16, "test")
        assert config.steps == (12 if "long" in arm else 4) and config.seed == 200
        assert ("small-qwen" in config.model) == ("qwen" in arm) and config.lr == 3e-4


def test_explain_tells_a_step(capsys):
    """Question, answers, hint, and a table of the failed answer's tokens."""
    assert ptdpo.main(["--explain"]) == 0
    text = capsys.readouterr().out
    for part in (
        "1. The question: how many",
        "2. 8 answers",
        "   look r",
        "tutored teacher",
        "<eos>",
    ):
        assert part in text
