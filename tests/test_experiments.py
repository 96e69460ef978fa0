"""Experiments: claims and scores by hand; controls; runs taken up again; bases; small Qwen2-VL."""

import json
import random
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import ROOT, contents, rows, table

import ptdpo
from experiments import measure, reproduce, small_qwen, summaries, warm_start
from experiments.summaries import interval, judge_claim
from toy_tasks.counting import CELLS, Counting
from toy_tasks.free_text import FreeText

SUMMARIES = sorted((ROOT / "experiments/results").rglob("summary.json"))
BASES = {
    "base": ROOT / "toy_tasks/base.safetensors",
    "base-1": ROOT / "experiments/bases/base-1.safetensors",
    "base-2": ROOT / "experiments/bases/base-2.safetensors",
}
MEASURED = json.loads((ROOT / "experiments/bases/measured.json").read_text())


# -------------------------------------------------------------------------------------- summaries
def test_interval_by_hand():
    """Of 1, 2, 3: standard error 1 / sqrt(3), and 4.303 of them at two degrees of freedom."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert interval([5.0]) == (5.0, float("inf"))


@pytest.mark.parametrize(("a", "b", "sign", "verdict"), table("verdicts"))
def test_verdicts(a, b, sign, verdict):
    """Only where the paired 95 % interval excludes 0, and only in the direction of the claim."""
    found = {"x": [{"m": value} for value in a], "y": [{"m": value} for value in b]}
    assert judge_claim(["", "m", "x", sign, "y"], found)["verdict"] == verdict


def test_a_claim_about_the_teacher_by_hand():
    """The teacher is the one of the same run, and a bar is reached or missed by the mean."""
    found = {"x": [{"m": 0.9, "teacher": {"m": 0.5}}, {"m": 0.7, "teacher": {"m": 0.5}}]}
    judged = judge_claim(["", "m", "x", ">", "teacher", 0.25], found)
    assert judged["difference"] == pytest.approx(0.3) and judged["other_mean"] == 0.5
    assert judged["reached"] is True
    assert judge_claim(["", "m", "x", ">", "teacher", 0.35], found)["reached"] is False
    grpo = {"x": [{"m": 0.9, "teacher": None}] * 2}
    assert judge_claim(["", "m", "x", ">", "teacher"], grpo)["verdict"] == "no value"


def test_score_of_a_run_by_hand():
    """Area over evaluations alone, without the base; recall and credit over all steps."""
    run = {"base": {"accuracy": 0.1}, "teacher": {"accuracy": 0.5}}
    rows = [
        {"step": 0, "accuracy": 0.1},
        {"step": 1, "accuracy": 0.2, "hint_recall": 0.5, "credit": None, "seconds": 1},
        {"step": 2, "accuracy": None, "hint_recall": 1.0, "credit": 0.7, "seconds": 1},
        {"step": 3, "accuracy": 0.6, "hint_recall": 0.9, "credit": 0.9, "seconds": 2},
    ]
    found = summaries.score(run, rows)
    assert found["area"] == pytest.approx(0.4) and found["accuracy"] == 0.6
    assert found["hint_recall"] == pytest.approx(0.8) and found["credit"] == pytest.approx(0.8)
    assert found["seconds"] == 4 and found["ways"] is None


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.parent.name)
def test_committed_figures_are_drawn_again(path, tmp_path):
    """From the summary alone; and its claims follow from the scores of its seeds."""
    summary = json.loads(path.read_text())
    shutil.copy(path, tmp_path / "summary.json")
    summaries.draw_summary(tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    for claim in summary["claims"]:
        parts = [claim[name] for name in ("text", "measure", "arm", "sign", "other")]
        again = judge_claim(parts, summary["by_seed"])
        assert again["verdict"] == claim["verdict"]
        assert again.get("difference") == pytest.approx(claim.get("difference"))


# ------------------------------------------------------------------------------------ experiments
def test_every_experiment_names_known_arms_and_settings():
    """Arms exist and are valid settings; claims are about arms that are trained, or measured."""
    for arm in reproduce.ARMS:
        reproduce.config_of(reproduce.settings_of(arm, {}))
    for name, experiment in reproduce.EXPERIMENTS.items():
        arms = experiment["arms"].split()
        assert set(arms) <= set(reproduce.ARMS) and (arms or name in measure.MEASUREMENTS)
        for _, _, arm, sign, other, *_ in experiment["claims"]:
            assert sign in "<>"
            assert not arms or {arm, other} <= {*arms, "teacher", "base"}


def test_what_was_chosen_reaches_the_arms():
    """By method, unless the arm sets it itself, or has a choice of its own."""
    chosen = {"grpo": {"lr": 1.0}, "ptdpo": {"lr": 2.0}, "forward_kl": {"distill_weight": 3.0}}
    assert reproduce.settings_of("grpo_hard", chosen)["lr"] == 1.0
    assert reproduce.settings_of("random", chosen)["lr"] == 2.0
    assert reproduce.settings_of("forward_kl", chosen)["distill_weight"] == 3.0
    assert reproduce.settings_of("qwen_grpo_60", chosen)["lr"] == 3e-4


def log_probs(V=40, seed=0):
    """Log-probs of a student, which learns, and of a teacher [6, V]."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(6, V, generator=g).double().requires_grad_()
    teacher = torch.randn(6, V, generator=g).double()
    return student, teacher


def test_zero_gradient_control_has_the_value_and_no_gradient(monkeypatch):
    """What the released default does: a loss that is logged and teaches nothing."""
    monkeypatch.setitem(ptdpo.DIVERGENCES, "zero_gradient", reproduce.zero_gradient)
    student, teacher = log_probs()
    values = [ptdpo.topk_jsd(student, teacher, 5, name) for name in ("jsd", "zero_gradient")]
    assert torch.allclose(*values, atol=1e-12) and values[0].sum() > 0.1
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in values]
    assert gradients[0].abs().max() > 1e-3 and gradients[1].abs().max() < 1e-12


def test_student_support_control(monkeypatch):
    """The same where both sides prefer the same words. Elsewhere it misses what the hint says."""
    monkeypatch.setitem(ptdpo.DIVERGENCES, "student_support", reproduce.student_support)
    student, teacher = log_probs()
    same = student.detach() * 1.5
    ours, theirs = (ptdpo.topk_jsd(student, same, 5, n) for n in ("jsd", "student_support"))
    assert torch.allclose(ours, theirs, atol=1e-9)
    ours, theirs = (ptdpo.topk_jsd(student, -teacher, 2, n) for n in ("jsd", "student_support"))
    assert (theirs < ours).all()


def test_an_experiment_is_taken_up_again(tmp_path, monkeypatch, capfd, signals):
    """The second call trains nothing, other settings are refused, a copy goes on by GRPO."""
    arms = "ptdpo early early_then_grpo"
    claims = [["", "accuracy", "ptdpo", ">", "early_then_grpo"]]
    tiny = {"arms": arms, "claims": claims, "panels": "accuracy pass_8", "seeds": 1, "hero": True}
    monkeypatch.setitem(reproduce.EXPERIMENTS, "tiny", tiny)
    monkeypatch.setattr(summaries, "HERO", {"ptdpo": "PTD-PO"})
    command = ["tiny", "--steps", "3", "--eval-problems", "8", "--out", str(tmp_path)]
    assert reproduce.main(command) == 0
    summary = json.loads((tmp_path / "tiny/summary.json").read_text())
    about = json.loads((tmp_path / "tiny/about.json").read_text())
    assert summary["seeds"] == [200] and set(summary["by_seed"]) == set(arms.split())
    assert {"command", "commit", "versions", "cores"} <= set(about)
    for name in ("figure.png", "hero.png"):
        assert (tmp_path / "tiny" / name).stat().st_size > 5_000
    runs = {arm: ptdpo.read_run(tmp_path / f"runs/{arm}/200") for arm in arms.split()}
    config = runs["early_then_grpo"]["config"]
    assert config["method"] == "grpo" and config["eval_split"] == "test" and config["steps"] == 3
    assert runs["early"]["config"]["steps"] == 1
    assert runs["early"]["reference"] == runs["early_then_grpo"]["reference"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/*")}
    assert reproduce.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/*")} == before
    assert reproduce.main([*command, "--steps", "2"]) == 2
    assert "give another --out" in capfd.readouterr().err


def test_a_run_that_fails_stops_the_others(tmp_path, capfd, signals):
    """At once, not when they are finished; what they have done is saved."""
    tiny = {"prompts": 2, "group": 2, "eval_problems": 4, "eval_every": 9999, "save_every": 9999}
    long = tiny | {"steps": 99999}
    jobs = [(long, tmp_path / "long"), (tiny | {"base": "nowhere"}, tmp_path / "bad")]
    with pytest.raises(SystemExit, match="2"):
        reproduce.train_all([*jobs, (long, tmp_path / "never")], 2)
    assert "nowhere" in capfd.readouterr().err
    run = tmp_path / "long"
    logged = rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    saved = contents(run)[0] if (run / "checkpoint.safetensors").exists() else 0
    assert len(logged) == saved < 99999
    assert not (tmp_path / "never" / "metrics.jsonl").exists()


def test_a_claim_without_a_value_is_drawn(tmp_path):
    """As with one seed."""
    claims = [judge_claim(["", "m", "x", ">", "y"], {"x": [{"m": 1.0}], "y": [{"m": 0.0}]})]
    summary = {"name": "one", "seeds": [200], "claims": claims, "curves": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    summaries.draw_summary(tmp_path)
    assert summaries.list_claims(claims).endswith("|  | m | x, y | - | no value |")


def test_a_leak_would_be_found():
    """The classifier of the leak experiment reads a count off hints that hold it, not off noise."""
    rng = random.Random(0)
    counts = [rng.randrange(3, 9) for _ in range(1000)]
    assert measure.guess_counts([f"look {n}" for n in counts], counts) > 0.95
    noise = [f"look {rng.choice('ab')}" for _ in counts]
    assert measure.guess_counts(noise, counts) < 0.3


# ------------------------------------------------------------------------------------------ bases
def load(name):
    """A committed base, and its task."""
    config = ptdpo.Config(base=str(BASES[name]))
    task = Counting()
    return ptdpo.load_policy(config, task), task, config


@pytest.mark.parametrize("name", BASES)
def test_bases_obey_the_rule(name):
    """As they were measured; and the file is small and holds weights alone."""
    found = MEASURED[name]
    assert found["seed"] == list(BASES).index(name)
    assert found["rule"] == warm_start.check_rule(found)
    assert all(found["rule"].values()) and len(found["rule"]) == 6
    assert BASES[name].stat().st_size < 3e6
    load(name)


@pytest.mark.parametrize("name", BASES)
def test_bases_score_as_they_were_measured(name):
    """On the same 512 validation pictures. Another machine may round an answer or two apart."""
    policy, task, _ = load(name)
    problems = ptdpo.pose(task, "validation", 0, 0, 512)
    for measured, score in measure.greedy_scores(policy, task, problems).items():
        assert score == pytest.approx(MEASURED[name]["alone"][measured], abs=0.01)


def test_credit_on_a_few_pictures(monkeypatch):
    """The JSD of the tutored teacher is higher on mistakes; that of no hint is noise, cut to 0."""
    monkeypatch.setattr(measure, "PICTURES", 16)
    policy, task, config = load("base")
    found = measure.credit(policy, task, config, [policy.num_layers - 1], 0)
    assert found["policy gradient"]["auroc"] == found["none"]["auroc"] == 0.5
    assert found["none"]["share"] is None
    assert found["attention"]["auroc"] > 0.6
    assert found["attention"]["share"] > found["policy gradient"]["share"]
    found = measure.recover(policy, task, config, [policy.num_layers - 1], 0)
    assert found["attention"]["recovered"] > found["random"]["recovered"]


@pytest.mark.parametrize("kind", dict.fromkeys(warm_start.LESSON_KINDS))
def test_lessons_teach_what_they_are_said_to_teach(kind):
    """Cells go round from anywhere; the tutored tally is right up to five; told, all is named."""
    task = Counting()
    starts = set()
    for seed in range(200):
        scene, hint, answer = warm_start.lesson(task, kind, random.Random(seed))
        words = answer.split()
        if kind == "describe":
            assert len(words) == 2 * len(scene.objects) and not hint
            continue
        *cells, total, number = words
        cells = [CELLS.index(cell) for cell in cells]
        assert total == "total" and len(set(cells)) == len(cells)
        assert sum(a > b for a, b in pairwise(cells)) <= 1
        if cells == sorted(cells):
            starts.add("first")
        else:
            starts.add("other")
        if kind == "calm" or hint.startswith("answer"):
            assert sorted(cells) == scene.targets and number == scene.answer
        elif kind == "alone":
            assert 1 <= int(number) <= 8
        else:
            assert {CELLS[cell] for cell in cells} <= set(hint.split())
            assert int(number) == len(cells) or (len(cells) > 5 and 5 <= int(number) <= 8)
    assert kind == "describe" or starts == {"first", "other"}


# ---------------------------------------------------------------------------- the small Qwen2-VL
@pytest.fixture(scope="module")
def small():
    """The committed model, as --model has it."""
    settings = small_qwen.RUN | {"model": str(small_qwen.MODEL)}
    return ptdpo.HFPolicy(ptdpo.make_config(settings))


@pytest.mark.parametrize("kind", sorted(set(small_qwen.LESSON_KINDS)))
def test_every_word_of_a_lesson_is_a_token(small, kind):
    """Nothing is unknown, answers come back as they were, and a cell is an image token."""
    tokenizer = small.processor.tokenizer
    for i in range(30):
        problem, hint, answer = small_qwen.lesson(FreeText(16), kind, random.Random(i))
        prompt = small.encode(problem, hint)
        assert tokenizer.unk_token_id not in prompt.ids and len(prompt.ids) < 80
        assert (prompt.ids == small.image_id).sum() == 25
        ids = tokenizer(answer)["input_ids"]
        assert tokenizer.unk_token_id not in ids and small.text(ids) == answer


def test_it_is_weak_alone_and_can_be_tutored(small):
    """As measured.json says: a gap to close, and attention that finds the places."""
    measured = json.loads((small_qwen.MODEL / "measured.json").read_text())
    assert measured["parameters"] == sum(p.numel() for p in small.parameters()) < 1e6
    config = replace(small.config, eval_problems=64, micro_batch=16)
    task = FreeText(16)
    alone = ptdpo.evaluate(small, task, config)
    layers = [measured["layer_recall"].index(max(measured["layer_recall"]))]
    tutored = ptdpo.evaluate(small, task, config, layers)
    assert alone["accuracy"] == pytest.approx(measured["alone"]["accuracy"], abs=0.15)
    assert tutored["accuracy"] > alone["accuracy"] + 0.3
