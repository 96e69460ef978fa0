"""One training step: who is sampled, who is taught, what each token weighs, what is reported."""

import json
import math
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import close, config, gradient, make_rollout

import ptdpo
from ptdpo import Hint, Monitor, Rollout
from toy_tasks import Grade, Problem

MIXED = [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]  # four groups of four, of every kind
FAILED, SOLVED = [0] * 16, [1] * 16


def reorder(rollout, groups):
    """The same groups in another order."""
    G = len(rollout.mask) // len(rollout.problems)
    rows = [g * G + i for g in groups for i in range(G)]

    def pick(v):
        at = groups if len(v) == len(groups) else rows
        return v[at] if isinstance(v, torch.Tensor) else [v[i] for i in at]

    return Rollout(**{k: v if v is None else pick(v) for k, v in vars(rollout).items()})


# ---------------------------------------------------------------------------------------- rollout
def test_generator_depends_on_its_key_alone():
    """The same key gives the same stream, any other key another, whatever was drawn before."""
    first = torch.rand(4, generator=ptdpo.generator(0, 1, 2))
    torch.manual_seed(5), torch.rand(3)
    assert torch.equal(torch.rand(4, generator=ptdpo.generator(0, 1, 2)), first)
    keys = [(0, 1, 3), (0, 12), (1, 0, 2), (0, 1, 2, 0), ("0", 1, 2), ((0, 1), 2), (-1, 1, 2), ()]
    streams = {tuple(torch.rand(4, generator=ptdpo.generator(*k)).tolist()) for k in keys}
    assert len(streams) == len(keys) and tuple(first.tolist()) not in streams


def test_noise_of_a_token_is_a_function_of_key_prompt_answer_and_time(policy, task):
    """More prompts, more answers or a longer limit in the call: the same answers come out."""
    problems = [task.problem("train", 0, i) for i in range(3)]
    few = ptdpo.answer(policy, task, problems[:2], 2, 1.0, ("k", 1))
    many = ptdpo.answer(policy, task, problems, 4, 1.0, ("k", 1))
    again = ptdpo.answer(policy, task, problems[:2], 2, 1.0, ("k", 1))
    other = ptdpo.answer(policy, task, problems[:2], 2, 1.0, ("k", 2))
    rows = torch.tensor([0, 1, 4, 5])  # answers 0 and 1 to prompts 0 and 1
    assert torch.equal(many.mask[rows], few.mask)
    assert torch.equal(many.completion[rows][few.mask], few.completion[few.mask])
    assert [many.texts[i] for i in rows] == few.texts == again.texts != other.texts
    assert len(set(many.texts)) > 6
    brief = SimpleNamespace(max_tokens=5, grade=task.grade)
    short = ptdpo.answer(policy, brief, problems[:2], 2, 1.0, ("k", 1))
    assert torch.equal(short.completion[short.mask], few.completion[:, :5][short.mask])


def test_answer_masks_by_the_first_stop_token_and_grades_what_stands_before():
    """Canned ids, two stop tokens; an id after the end, or one equal to the pad, says nothing."""
    ids = torch.tensor([[5, 0, 7, 0], [1, 2, 3, 4], [0, 0, 0, 0], [5, 9, 5, 5], [0, 5, 9, 5]])
    canned = SimpleNamespace(
        stop_ids=[0, 9],
        encode=lambda problem, hint: (problem, hint),
        sample=lambda prompts, uniforms, temperature: ids[: len(uniforms)],
        text=lambda ids: " ".join(map(str, ids)),
    )
    asked = []

    def grade(problem, text, finished):
        asked.append((problem, text, finished))
        return Grade(0.5, finished)

    task = SimpleNamespace(max_tokens=4, grade=grade)
    rollout = ptdpo.answer(canned, task, list("abcde"), 1, 1.0, (), ["h1", "h2", "", "", ""])
    lengths = [2, 4, 1, 2, 1]
    assert torch.equal(rollout.mask, torch.arange(4) < torch.tensor(lengths)[:, None])
    assert rollout.texts == ["5", "1 2 3 4", "", "5", ""]
    ended = [True, False, True, True, True]
    assert asked == list(zip("abcde", rollout.texts, ended))
    assert rollout.prompts == list(zip("abcde", ["h1", "h2", "", "", ""]))
    assert rollout.solved.tolist() == ended and rollout.reward.tolist() == [0.5] * 5
    pairs = ptdpo.answer(canned, task, list("ab"), 2, 1.0, ())
    assert [a[0] for a in asked[5:]] == list("aabb")
    assert pairs.prompts == [("a", ""), ("b", "")] and pairs.solved_share.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 9])
def test_parts_hold_whole_groups_and_all_of_them(policy, ref, task, size):
    """Every field is cut, in order, into its own rows; None stays None."""
    c = config()
    rollout = make_rollout(policy, ref, task, c, MIXED)
    ptdpo.weigh_tokens(rollout, c, 1.0)
    parts = list(rollout.parts(size))
    assert [len(p.problems) for p in parts[:-1]] == [size or 4] * (len(parts) - 1)
    for f in fields(Rollout):
        whole, cut = getattr(rollout, f.name), [getattr(p, f.name) for p in parts]
        if whole is None:
            assert f.name in ("logp_old", "skipped") and cut == [None] * len(parts)
        elif isinstance(whole, torch.Tensor):
            assert torch.equal(torch.cat(cut), whole)
        else:
            assert [v for rows in cut for v in rows] == whole
    assert all(len(p.mask) == c.group * len(p.problems) for p in parts)


# --------------------------------------------------------------------------------- invariance
@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_micro_batches_change_nothing(policy, ref, task, algorithm):
    """Gradient and logged numbers are the same for 4, 1, 2 and 3 groups a pass.

    One question is shorter than the others, so that the amount of left padding changes as well.
    """
    problems = [task.problem("train", 0, i) for i in range(4)]
    problems[1].question = "describe colour"
    base, seen = config(algorithm=algorithm), []
    for size in (0, 1, 2, 3):
        c = replace(base, micro_batch=size)
        rollout = make_rollout(policy, ref, task, c, MIXED, problems)
        grad, tokens, norm = gradient(policy, ref, rollout, c)
        seen.append((grad, ptdpo.step_metrics(rollout, tokens, norm), rollout))
    first, row, whole = seen[0]
    assert first.norm() > 1e-3
    for grad, other, rollout in seen[1:]:
        assert close(grad, first)
        assert other == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in row.items()}
        assert rollout.hints == whole.hints
        assert torch.allclose(rollout.relevance, whole.relevance, atol=1e-5)


def test_order_of_groups_changes_nothing(policy, ref, task):
    """Groups in another order, also across micro-batches: same gradient, same numbers."""
    c = config(micro_batch=3)
    rollout = make_rollout(policy, ref, task, c, MIXED)
    shuffled = reorder(rollout, [2, 0, 3, 1])
    first, tokens, norm = gradient(policy, ref, rollout, c)
    second, other, norm2 = gradient(policy, ref, shuffled, c)
    assert close(second, first)
    row, other = (
        ptdpo.step_metrics(rollout, tokens, norm), ptdpo.step_metrics(shuffled, other, norm2)
    )  # fmt: skip
    assert other == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in row.items()}


def test_what_stands_in_the_padding_changes_nothing(policy, ref, task):
    """Other ids after the end, or three more columns of them: same gradient, same numbers."""
    c = config()
    rollout = make_rollout(policy, ref, task, c, MIXED)
    assert (~rollout.mask).sum() > 10
    first, tokens, norm = gradient(policy, ref, rollout, c)
    longer = ptdpo.answer(policy, task, rollout.problems, c.group, 1.0, ("test", 0))
    junk = torch.randint(1, 60, (16, 3))
    longer.completion = torch.cat([torch.where(longer.mask, longer.completion, 7), junk], 1)
    longer.mask = torch.cat([longer.mask, torch.zeros(16, 3).bool()], 1)
    longer.grades, longer.adv = rollout.grades, rollout.adv
    ptdpo.read_reference(ref, longer, c, [0])
    assert torch.allclose(longer.relevance, rollout.relevance, atol=1e-6)
    longer.hints = rollout.hints
    ptdpo.tutor(ref, longer, c)
    second, other, norm2 = gradient(policy, ref, longer, c)
    assert close(second, first)
    row, other = (
        ptdpo.step_metrics(rollout, tokens, norm), ptdpo.step_metrics(longer, other, norm2)
    )  # fmt: skip
    assert other == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in row.items()}


def test_nan_in_padded_places_does_not_leak(policy, ref, task, monkeypatch):
    """Both models return NaN behind the end of an answer; loss and gradient do not notice."""
    c = config()
    clean = make_rollout(policy, ref, task, c, MIXED)
    expected, _, _ = gradient(policy, ref, clean, c)

    def poisoned(model):
        plain = model.forward

        def forward(prompts, completion, mask=None, layers=()):
            hidden, looks = plain(prompts, completion, mask, layers)
            ended = (completion == 0).cumsum(1) - (completion == 0).long() > 0
            return hidden.masked_fill(ended[..., None], math.nan), looks

        monkeypatch.setattr(model, "forward", forward)

    poisoned(policy), poisoned(ref)
    rollout = make_rollout(policy, ref, task, c, MIXED)
    assert rollout.teacher.isnan().any()
    grad, tokens, norm = gradient(policy, ref, rollout, c)
    assert close(grad, expected, 1e-6)
    assert all(v.isfinite().all() for v in tokens.values()) and math.isfinite(norm)
    assert rollout.logp_ref.isfinite().all()
    rollout.policy_weights = rollout.kl_weights = rollout.jsd_weights = None
    ptdpo.weigh_tokens(rollout, c, 1.0)
    assert ptdpo.total_loss(policy, ref, rollout, c)[0].isfinite()


# ---------------------------------------------------------------------------- weights, coefficients
@pytest.mark.parametrize("name", ["policy_weight", "kl_weight", "distill_weight"])
def test_each_coefficient_moves_the_gradient_in_proportion(policy, ref, task, name):
    """g(w) = g(0) + w g', with g' not zero, and g(0) of all three is exactly zero."""
    still = {"policy_weight": 0.0, "kl_weight": 0.0, "distill_weight": 0.0}
    rollout = make_rollout(policy, ref, task, config(), MIXED)
    zero, one, two = (
        gradient(policy, ref, rollout, config(**(still | {name: w})))[0] for w in (0.0, 1.0, 2.0)
    )
    assert (zero == 0).all()
    assert one.norm() > 1e-4 and close(two, 2 * one)
    rest = config(**{name: 0.0})
    part, both = (
        gradient(policy, ref, rollout, c)[0] for c in (rest, replace(rest, **{name: 0.7}))
    )
    assert close(both - part, 0.7 * one, 1e-3)


def test_monitoring_does_not_move_the_gradient(policy, ref, task):
    """Entropy hangs on no graph; the values that do are those that are weighed."""
    c = config()
    rollout = make_rollout(policy, ref, task, c, MIXED)
    ptdpo.weigh_tokens(rollout, c, 1.0)
    loss, tokens = ptdpo.total_loss(policy, ref, rollout, c)
    graphs = {name: v.requires_grad for name, v in tokens.items()}
    assert graphs == {"logp": True, "entropy": False, "jsd": True, "kl": True}
    w, gain = rollout, -rollout.adv[:, None]  # ratio 1
    parts = w.policy_weights * gain + w.kl_weights * tokens["kl"] + w.jsd_weights * tokens["jsd"]
    assert loss.item() == pytest.approx(parts.sum().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("grpo", [[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]),
        ("gspo", [[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]),
        ("dapo", [[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]]),
    ],
)
def test_weights_by_hand(algorithm, expected):
    """grpo: mean of answers of the mean of tokens; dapo: of tokens. JSD: of failed tokens."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    rollout = Rollout([0], [0], mask.long(), mask, [""] * 2, [Grade(1, True), Grade(0, False)])
    c = config(algorithm=algorithm, policy_weight=3.0, kl_weight=0.5, prompts=1, group=2)
    for distill, jsd in (
        ([False, True], [[0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]),
        ([True, True], [[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]]),
        ([False, False], [[0, 0, 0], [0, 0, 0]]),
        (None, [[0, 0, 0], [0, 0, 0]]),
    ):
        rollout.distill = None if distill is None else torch.tensor(distill)
        ptdpo.weigh_tokens(rollout, c, 2.0)
        assert torch.allclose(rollout.policy_weights, 3 * torch.tensor(expected))
        assert torch.allclose(rollout.kl_weights, torch.tensor(expected) / 2)
        assert torch.allclose(rollout.jsd_weights, 2 * torch.tensor(jsd, dtype=torch.float))


def test_kl_on_untutored_spares_tutored_groups(policy, ref, task):
    """The authors' code skips the KL on groups that are tutored; ours does so on request."""
    c = config(kl_on="untutored")
    rollout = make_rollout(policy, ref, task, c, MIXED)
    ptdpo.weigh_tokens(rollout, c, 1.0)
    assert (rollout.kl_weights.view(4, -1) > 0).any(1).tolist() == [False, False, False, True]
    ptdpo.weigh_tokens(rollout, config(kl_on="all"), 1.0)
    assert ((rollout.kl_weights > 0) == rollout.mask).all()
    grpo = make_rollout(policy, ref, task, replace(c, method="grpo"), MIXED)
    ptdpo.weigh_tokens(grpo, replace(c, tau=0.5), 1.0)  # for GRPO: those that would be tutored
    assert (grpo.kl_weights.view(4, -1) > 0).any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("tau", "on", "groups"),  # solved shares 1/4, 1/2, 0, 1
    [
        (1.0, "failed", [3, 2, 4, 0]),
        (0.5, "failed", [3, 0, 4, 0]),
        (0.25, "failed", [0, 0, 4, 0]),
        (0.0, "failed", [0, 0, 0, 0]),
        (1.0, "all", [4, 4, 4, 4]),
    ],
)
def test_tau_and_distill_on_choose_who_is_tutored(policy, ref, task, tau, on, groups):
    """Failed answers of groups whose solved share is below tau; only they have a teacher."""
    rollout = make_rollout(policy, ref, task, config(tau=tau, distill_on=on), MIXED)
    assert rollout.distill.view(4, 4).sum(1).tolist() == groups
    if on == "failed":
        assert not (rollout.distill & rollout.solved).any()
    taught = (rollout.teacher != 0).any(-1).any(1).view(4, 4).all(1)
    assert taught.tolist() == [n > 0 for n in groups]


def test_failed_means_not_solved_whatever_the_reward(policy, ref, task):
    """A wrong answer with a reward for its form is still tutored; a solved one with 0 is not."""
    c = config(prompts=1)
    problems = [task.problem("train", 0, 0)]
    rollout = ptdpo.answer(policy, task, problems, 4, 1.0, ("r",))
    rollout.grades = [Grade(0.1, False), Grade(0.0, True), Grade(1.0, True), Grade(0.9, False)]
    ptdpo.read_reference(ref, rollout, c, [0])
    rollout.hints = ptdpo.build_hints(policy, task, rollout, c, ("r",))
    ptdpo.tutor(ref, rollout, c)
    assert rollout.distill.tolist() == [True, False, False, True]


# ---------------------------------------------------------------------------------------- update
def test_two_updates_a_batch(policy, ref, task):
    """logp_old is of the policy that sampled; the second update meets a policy that has moved."""
    c = config(updates_per_batch=2, micro_batch=1)
    rollout = make_rollout(policy, ref, task, c, MIXED)
    with torch.no_grad():
        hidden, _ = policy.forward(rollout.prompts, rollout.completion)
        logits = hidden @ policy.head_weight.T
        before = logits.log_softmax(-1).gather(-1, rollout.completion[..., None])[..., 0]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    taken = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    tokens, _ = ptdpo.update(policy, ref, optimizer, rollout, c, 1.0)
    mask = rollout.mask
    assert len(taken) == 2 and rollout.logp_old.shape == mask.shape == tokens["logp"].shape
    assert torch.allclose(rollout.logp_old[mask], before[mask], atol=1e-5)
    moved = ((tokens["logp"] - rollout.logp_old).abs() * mask).amax(1)
    assert (moved[:8] < 1e-5).all() and (moved[8:] > 1e-4).any()


@pytest.mark.parametrize(("prompts", "updates"), [(4, 1), (4, 2), (4, 4), (4, 3), (3, 2), (2, 4)])
def test_every_group_is_used_once_and_updates_are_counted(policy, ref, task, prompts, updates):
    """A batch gives as many updates as promised, or as many as it has groups."""
    c = config(prompts=prompts, updates_per_batch=updates)
    rollout = make_rollout(policy, ref, task, c, MIXED[: 4 * prompts])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    taken = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    tokens, _ = ptdpo.update(policy, ref, optimizer, rollout, c, 1.0)
    assert len(taken) == min(prompts, updates)
    assert tokens["jsd"].shape == rollout.mask.shape


def test_with_one_update_the_ratio_is_one(policy, ref, task):
    """No second forward pass is paid for: logp_old is the detached logp, and the loss is -A."""
    c = config(kl_weight=0.0, distill_weight=0.0)
    rollout = make_rollout(policy, ref, task, c, MIXED)
    grad, _, norm = gradient(policy, ref, rollout, c)
    assert rollout.logp_old is None
    hidden, _ = policy.forward(rollout.prompts, rollout.completion)
    logp = (hidden @ policy.head_weight.T).log_softmax(-1)
    logp = logp.gather(-1, rollout.completion[..., None])[..., 0]
    mask = rollout.mask.float()
    loss = -(logp * rollout.adv[:, None] * mask / mask.sum(1, keepdim=True)).sum() / 16
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    assert close(grad, plain, 1e-4)
    assert norm == pytest.approx(plain.norm().item(), rel=1e-4)


def test_clip_norm_scales_the_gradient_and_reports_the_norm_before(policy, ref, task):
    """AdamW sees at most clip_norm; the log sees what it was."""
    c = config()
    rollout = make_rollout(policy, ref, task, c, MIXED)
    free, _, norm = gradient(policy, ref, rollout, c)
    assert norm == pytest.approx(free.norm().item(), rel=1e-4)
    cut, _, same = gradient(policy, ref, rollout, replace(c, clip_norm=norm / 3))
    assert same == pytest.approx(norm, rel=1e-5) and close(cut, free / 3, 1e-4)


@pytest.mark.parametrize(
    ("method", "solved", "zero"),
    [("grpo", FAILED, True), ("grpo", SOLVED, True), ("ptdpo", SOLVED, True),
     ("ptdpo", FAILED, False), ("grpo", MIXED, False)],
)  # fmt: skip
def test_flat_batches(policy, ref, task, method, solved, zero):
    """All failed or all solved, without KL: gradient exactly 0, unless the tutor speaks."""
    c = config(method=method, kl_weight=0.0)
    rollout = make_rollout(policy, ref, task, c, solved)
    grad, tokens, norm = gradient(policy, ref, rollout, c)
    row = ptdpo.step_metrics(rollout, tokens, norm)
    assert (grad == 0).all() if zero else grad.norm() > 1e-4
    assert all(v is None or math.isfinite(v) for v in row.values())
    taught = method == "ptdpo" and solved is FAILED
    assert row["distilled"] == taught and (row["jsd"] is not None) == taught


@pytest.mark.parametrize("solved", [FAILED, SOLVED])
def test_flat_batches_with_kl_stay_finite(policy, ref, task, solved):
    """The KL still pulls, and nothing is divided by nothing."""
    for kl_on in ("all", "untutored"):
        c = config(kl_on=kl_on)
        grad, _, _ = gradient(policy, ref, make_rollout(policy, ref, task, c, solved), c)
        assert grad.isfinite().all() and grad.norm() > 0


# ------------------------------------------------------------------------- reference and teacher
def test_reference_scores_the_answers(policy, ref, task):
    """logp_ref: a plain forward of the reference; relevance: mean over the answers of a group."""
    c = config(temperature=0.7)
    rollout = make_rollout(policy, ref, task, c, MIXED)
    by_layer = ptdpo.read_reference(ref, rollout, c, [0, 2])
    hidden, looks = ref.forward(rollout.prompts, rollout.completion, rollout.mask, [0, 2])
    logp = (hidden @ ref.head_weight.T / 0.7).log_softmax(-1)
    logp = logp.gather(-1, rollout.completion[..., None])[..., 0]
    assert torch.allclose(rollout.logp_ref[rollout.mask], logp[rollout.mask], atol=1e-5)
    assert (rollout.logp_ref[~rollout.mask] == 0).all()
    assert by_layer.shape == (2, 4, 25)
    assert torch.allclose(by_layer, looks.view(2, 4, 4, 25).mean(2), atol=1e-6)
    assert torch.allclose(rollout.relevance, by_layer.mean(0))
    before = rollout.logp_ref.clone()
    assert ptdpo.read_reference(ref, rollout, c, []) is None
    assert torch.allclose(rollout.logp_ref, before, atol=1e-5)


def test_teacher_sees_the_same_picture_and_ids_and_the_hint(policy, ref, task, monkeypatch):
    """What the reference is given, call by call, and what it returns: a plain hinted forward."""
    c = config(micro_batch=2)
    rollout = make_rollout(policy, ref, task, c, MIXED)
    plain, calls = ref.forward, []
    monkeypatch.setattr(ref, "forward", lambda *a: calls.append(a) or plain(*a))
    ptdpo.tutor(ref, rollout, c)
    asked = [(prompt, ids) for prompts, answers in calls for prompt, ids in
             zip(prompts, answers.view(len(prompts), 4, -1))]  # fmt: skip
    assert len(asked) == 3 and [len(a[0]) for a in calls] == [2, 1]
    for b, (prompt, ids) in enumerate(asked):
        question, hint = rollout.problems[b].question, rollout.hints[b].text
        assert prompt.pixels is rollout.prompts[b].pixels
        assert policy.text(prompt.ids) == f"{question} {hint}" and len(hint.split()) == 19
        assert torch.equal(ids, rollout.completion[4 * b : 4 * b + 4])
        hinted = ref.encode(rollout.problems[b], hint)
        hidden, _ = plain([hinted], rollout.completion[4 * b : 4 * b + 4])
        assert torch.allclose(rollout.teacher[4 * b : 4 * b + 4], hidden, atol=1e-5)
        bare, _ = plain([rollout.prompts[b]], rollout.completion[4 * b : 4 * b + 4])
        assert (hidden - bare).abs().max() > 1e-2
    assert (rollout.teacher[12:] == 0).all()


def test_jsd_of_a_step_is_that_of_student_and_tutored_teacher(policy, ref, task):
    """Token by token from two plain forward passes; 0 where nothing is distilled."""
    c = config(temperature=0.8, top_k=4)
    rollout = make_rollout(policy, ref, task, c, MIXED)
    _, tokens, _ = gradient(policy, ref, rollout, c)
    with torch.no_grad():
        hidden, _ = policy.forward(rollout.prompts, rollout.completion)
        tutored = [ref.encode(p, h.text) for p, h in zip(rollout.problems, rollout.hints)]
        read, _ = ref.forward(tutored, rollout.completion)
        s, t = hidden @ policy.head_weight.T / 0.8, read @ ref.head_weight.T / 0.8
        plain, ent = ptdpo.topk_jsd(s, t, 4), ptdpo.entropy(s)
        logp = s.log_softmax(-1).gather(-1, rollout.completion[..., None])[..., 0]
    distilled = rollout.mask & rollout.distill[:, None]
    assert torch.allclose(tokens["jsd"][distilled], plain[distilled], atol=1e-5)
    assert (tokens["jsd"][~distilled] == 0).all() and plain[distilled].min() > 0
    kl = (rollout.logp_ref - logp).exp() - (rollout.logp_ref - logp) - 1
    for name, expected in (("entropy", ent), ("logp", logp), ("kl", kl)):
        assert torch.allclose(tokens[name][rollout.mask], expected[rollout.mask], atol=1e-4)


def test_teacher_and_reference_get_no_gradient(policy, ref, task):
    """Even a reference that could learn does not: its passes and its head are cut off."""
    ref.requires_grad_(True)
    c = config()
    rollout = make_rollout(policy, ref, task, c, MIXED)
    before = [p.detach().clone() for p in ref.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    ptdpo.update(policy, ref, optimizer, rollout, c, 1.0)
    assert not rollout.teacher.requires_grad and not rollout.logp_ref.requires_grad
    assert all(p.grad is None for p in ref.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, ref.parameters()))


# --------------------------------------------------------------------------------------- metrics
def test_step_metrics_by_hand():
    """Three groups of two answers of up to three tokens: every number worked out."""
    lengths = torch.tensor([1, 3, 2, 2, 1, 1])
    mask = torch.arange(3) < lengths[:, None]
    problems = [Problem([], "", "1", targets=t) for t in ([1, 2], [3], [4, 5, 6, 7])]
    solved, reward = [1, 0, 0, 0, 1, 1], [1.0, 0.1, 0.0, 0.1, 0.9, 0.9]
    grades = [Grade(r, bool(s)) for r, s in zip(reward, solved)]
    hints = [Hint([1, 9], "", False), Hint([8, 9], "", True), Hint([4, 5], "", False)]
    rollout = Rollout(problems, [], mask.long(), mask, [""] * 6, grades, hints=hints)
    rollout.distill = torch.tensor([False, True, True, True, False, False])
    at = torch.arange(18.0).view(6, 3)
    tokens = {"jsd": at / 100, "kl": at / 10, "entropy": at, "logp": -at}
    row = ptdpo.step_metrics(rollout, tokens, 2.5)
    assert row == {
        "reward": pytest.approx(0.5),
        "solved": pytest.approx(0.5),
        "groups_all_failed": pytest.approx(1 / 3),
        "groups_mixed": pytest.approx(1 / 3),
        "groups_all_solved": pytest.approx(1 / 3),
        "distilled": pytest.approx(0.7),
        "jsd": pytest.approx((3 + 4 + 5 + 6 + 7 + 9 + 10) / 700),
        "kl": pytest.approx((0 + 3 + 4 + 5 + 6 + 7 + 9 + 10 + 12 + 15) / 100),
        "entropy": pytest.approx((0 + 3 + 4 + 5 + 6 + 7 + 9 + 10 + 12 + 15) / 10),
        "entropy_failed": pytest.approx((3 + 4 + 5 + 6 + 7 + 9 + 10) / 7),
        "entropy_solved": pytest.approx((0 + 12 + 15) / 3),
        "grad_norm": 2.5,
        "skipped": 0,
        "completion_length": pytest.approx(10 / 6),
        "hint_recall": pytest.approx((1 / 2 + 0 + 1 / 2) / 3),
        "hints_rejected": pytest.approx(1 / 3),
    }
    rollout.hints = rollout.distill = None
    grpo = ptdpo.step_metrics(rollout, tokens, 2.5)
    absent = {"jsd", "hint_recall", "hints_rejected"}
    assert {k for k, v in grpo.items() if v is None} == absent and grpo["distilled"] == 0
    rollout.hints, rollout.distill = hints, torch.zeros(6).bool()
    rollout.grades = [Grade(1.0, True)] * 6
    problems[1].targets = None
    row = ptdpo.step_metrics(rollout, tokens, 0.0)
    absent = {"jsd", "hint_recall", "entropy_failed"}
    assert {k for k, v in row.items() if v is None} == absent and row["groups_all_solved"] == 1
    assert set(row) | {"step", "entropy_slope", "seconds", "accuracy", "point_f1",
                       "right_reason"} == set(ptdpo.METRICS)  # fmt: skip


@pytest.mark.parametrize(
    ("regions", "targets", "expected"),
    [([1, 2, 3], [2, 3], 1.0), ([1, 2], [2, 3], 0.5), ([1], [2], 0.0), ([1], [], None),
     ([1], None, None), ([], [2], None)],
)  # fmt: skip
def test_recall_by_hand(regions, targets, expected):
    """Share of the targets found; None where no region is named, or no target known."""
    problem = Problem([], "", "", targets=targets)
    assert ptdpo.recall([regions], [problem]) == expected
    if expected:  # a mean; one unknown, and it is unknown
        assert ptdpo.recall([regions, [0]], [problem] * 2) == expected / 2
        assert ptdpo.recall([regions, []], [problem] * 2) is None


def test_judge_by_hand():
    """Solved; F1 of the points; solved with exactly the targets. Named twice counts once."""
    problems = [Problem([], "", "2", targets=[1, 2]) for _ in range(4)]
    grades = [
        Grade(1, True, [1, 2]), Grade(1, True, [1, 3]), Grade(0, False, [2, 1, 1]), Grade(0, False)
    ]  # fmt: skip
    scores = ptdpo.judge(problems, grades)
    assert scores == {"accuracy": 0.5, "point_f1": (1 + 0.5 + 1 + 0) / 4, "right_reason": 0.25}
    problems = [replace(p, targets=None) for p in problems]
    scores = ptdpo.judge(problems, grades)
    assert scores == {"accuracy": 0.5, "point_f1": None, "right_reason": None}


# --------------------------------------------------------------------------------------- monitor
HEALTHY = {"entropy": 1.0, "solved": 0.3, "groups_mixed": 0.5, "groups_all_solved": 0.0,
           "jsd": 0.1, "hint_recall": 0.9, "skipped": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"groups_mixed": 0.0}, "no mixed group"),
        ({"groups_all_solved": 1.0}, "all is solved"),
        ({"jsd": 1e-5}, "JSD near 0"),
        ({"hint_recall": 0.42}, "no better than random"),
        ({"entropy": 0.1}, "entropy collapsed"),
        ({}, None),
        ({"jsd": None, "hint_recall": None}, None),
        ({"entropy": 0.1, "solved": 0.9}, None),
        ({"hint_recall": 0.5}, None),
        ({"groups_all_solved": 0.9}, None),
    ],
)
def test_monitor_names_a_dead_signal_once(change, word):
    """After ten such steps in a row, not earlier, and never again."""
    monitor, said = Monitor(), []
    rows = [{}] + [change] * 9 + [{}] + [change] * 25
    for row in rows:
        said.append(monitor.watch(HEALTHY | row, chance=0.4))
    if word is None:
        assert not any(said)
    else:
        assert [i for i, s in enumerate(said) if s] == [20]
        assert len(said[20]) == 1 and word in said[20][0] and ":" in said[20][0]


def test_monitor_slope_and_memory():
    """Least squares over the last ten steps; a monitor restored from JSON goes on as before."""
    monitor, rows = Monitor(), []
    entropies = [5.0] * 5 + [2 - 0.1 * i for i in range(12)]
    for i, value in enumerate(entropies):
        row = HEALTHY | {"entropy": value, "groups_mixed": 0.0}
        said = monitor.watch(row, 0.4)
        rows.append((row["entropy_slope"], said))
        monitor = Monitor(**json.loads(json.dumps(asdict(monitor))))
        assert (i == 9) == bool(said)
    assert rows[0][0] is None and rows[4][0] == pytest.approx(0, abs=1e-6)
    assert rows[-1][0] == pytest.approx(-0.1, abs=1e-6)
    x, y = torch.arange(10.0), torch.tensor(entropies[4:14])
    plain = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert rows[13][0] == pytest.approx(plain.item(), abs=1e-5)
    assert monitor.start_entropy == 5.0
