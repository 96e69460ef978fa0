"""One training step: who is sampled, who is tutored, what each token weighs, what moves."""

import copy
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import batch_of, close, config, gradient, make_batch, plain_forward, table

import ptdpo
from toy_tasks import Grade
from toy_tasks.counting import CELLS, STEPS

MIXED = [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]  # four groups of four, of every kind
LOOK = "look " + " ".join(CELLS[15:])  # where `hinted` says the model looked


def plain_read(model, rollout, n, prompt=None):
    """Answer n read by itself -> its ids, hidden [T, H], attention [L, T, R]."""
    prompt = prompt or rollout.prompts[n * len(rollout.prompts) // len(rollout.mask)]
    answer = rollout.completion[n][rollout.mask[n]].tolist()
    return answer, *plain_forward(model, prompt, answer)


def plain_logp(model, rollout):
    """Log-probs of all answer tokens [N, T], by an answer at a time; 0 in padding."""
    logp = model.head_weight.new_zeros(rollout.mask.shape)
    for n in range(len(logp)):
        answer, hidden, _ = plain_read(model, rollout, n)
        z = (hidden @ model.head_weight.T).detach()
        z[:, list(model.suppress_ids)] = -math.inf
        logp[n, : len(answer)] = z.log_softmax(-1)[range(len(answer)), answer]
    return logp


# ------------------------------------------------------------------------------- sample and grade
def test_noise_is_a_function_of_key_problem_answer_and_time(policy, task):
    """More problems, more answers or a longer limit in the call: the same answers come out."""
    problems = [task.problem("train", 0, i) for i in range(3)]
    few = ptdpo.sample_and_grade(policy, task, problems[:2], 2, ("k", 1))
    many = ptdpo.sample_and_grade(policy, task, problems, 4, ("k", 1))
    other = ptdpo.sample_and_grade(policy, task, problems[:2], 2, ("k1",))
    assert [row[:2] for row in many.texts[:2]] == few.texts != other.texts
    assert torch.equal(many.completion[[0, 1, 4, 5]], few.completion)
    assert len({text for row in many.texts for text in row}) > 6
    brief = SimpleNamespace(max_tokens=5, grade=task.grade)
    short = ptdpo.sample_and_grade(policy, brief, problems[:2], 2, ("k", 1))
    assert torch.equal(short.completion, few.completion[:, :5])


def test_answers_end_with_their_first_stop_token_and_are_graded_up_to_it():
    """Canned ids, two stop tokens; an id after the end, or one equal to the pad, says nothing."""
    ids = torch.tensor([[5, 0, 7, 0], [1, 2, 3, 4], [0, 0, 0, 0], [5, 6, 5, 9]])
    canned = SimpleNamespace(
        stop_ids=[0, 9],
        encode=lambda problem, hint: (problem, hint),
        sample=lambda prompts, uniforms, greedy: ids,
        text=lambda ids: " ".join(map(str, ids)),
    )
    graded = []

    def grade(*args):
        graded.append(args)
        return Grade(0.5, args[2])

    task = SimpleNamespace(max_tokens=4, grade=grade)
    rollout = ptdpo.sample_and_grade(canned, task, ["a", "b"], 2, (), hints=["h", ""])
    assert torch.equal(rollout.mask, torch.arange(4) < torch.tensor([2, 4, 1, 4])[:, None])
    assert rollout.texts == [["5", "1 2 3 4"], ["", "5 6 5"]]
    ended = [True, False, True, True]
    assert graded == list(zip("aabb", ["5", "1 2 3 4", "", "5 6 5"], ended))
    assert rollout.prompts == [("a", "h"), ("b", "")]
    assert (rollout.solved.tolist(), rollout.rewards.tolist()) == (ended, [0.5] * 4)
    assert rollout.solved_share().tolist() == [0.5, 1.0]


# ------------------------------------------------------------------------ reference and attention
@pytest.mark.parametrize(("micro", "chunk"), [(0, 256), (3, 5)])
def test_reference_scores_the_answers_and_shows_where_it_looked(
    policy, ref, task, monkeypatch, micro, chunk
):
    """logp_ref and the mean attention of each group, against one plain pass an answer."""
    monkeypatch.setattr(ptdpo, "CHUNK", chunk)
    c = config(micro_batch=micro)
    rollout, _, _ = make_batch(policy, ref, task, c)
    ref.suppress_ids = [w for w in range(40) if w not in rollout.completion][:2]
    logp_ref, relevance = ptdpo.read_answers(ref, rollout, [0, 2], c)
    assert torch.allclose(logp_ref, plain_logp(ref, rollout), atol=1e-4)
    for b, by_layer in enumerate(relevance):
        looks = [plain_read(ref, rollout, n)[2].mean(1) for n in range(4 * b, 4 * b + 4)]
        assert torch.allclose(by_layer, sum(looks)[[0, 2]] / 4, atol=1e-6)
    assert ptdpo.read_answers(ref, rollout, [], c)[1] == []


def test_calibration_by_hand(policy, task, monkeypatch):
    """Recall of the M most attended cells by layer, a mean over calibration problems."""
    monkeypatch.setattr(ptdpo, "CALIBRATION", 3)
    c = config(group=2)
    problems = [task.problem("calibration", 0, i) for i in range(3)]
    rollout = ptdpo.sample_and_grade(policy, task, problems, 2, ("calibration", 0))
    _, relevance = ptdpo.read_answers(policy, rollout, [0, 1, 2], c)
    expected = [0, 0, 0]
    for problem, looks in zip(problems, relevance):
        for layer, look in enumerate(looks.tolist()):
            best = sorted(range(25), key=lambda r: -look[r])[:10]
            expected[layer] += len(set(best) & set(problem.targets)) / len(problem.targets) / 3
    assert ptdpo.calibrate(policy, task, c) == pytest.approx(expected)
    assert ptdpo.calibrate(policy, task, config(hint_regions=40)) == [1, 1, 1]
    blind = SimpleNamespace(max_tokens=3, grade=task.grade)
    blind.problem = lambda *key: replace(task.problem(*key), targets=None)
    with pytest.raises(ptdpo.UserError, match="targets"):
        ptdpo.calibrate(policy, blind, c)
    assert ptdpo.recall([1, 2], [2, 3, 3]) == 0.5
    assert [ptdpo.recall(*pair) for pair in (([1], []), ([1], None), ([], [2]))] == [None] * 3


# ------------------------------------------------------------------------------------------- hint
def hinted(task, policy, problems, **changes):
    """Hints for problems whose mean attention over two layers points to cells 24, 23, 22, ..."""
    c = config(prompts=len(problems), group=2, **changes)
    rollout = SimpleNamespace(
        problems=problems,
        prompts=[policy.encode(p) for p in problems],
        grades=[[Grade(0.0, False, [7, 7, 3]), Grade(0.0, False, [7])] for _ in problems],
    )
    layers = torch.stack([24 - torch.arange(25.0), 2 * torch.arange(25.0)]) / 300
    relevance = [layers] * len(problems)
    return ptdpo.build_hints(policy, task, rollout, relevance, c, (0, 1))


@pytest.fixture
def scenes(task):
    """Some training problems."""
    return [task.problem("train", 0, i) for i in range(60)]


def test_sources_of_regions(task, policy, scenes):
    """attention: the M highest; votes: cells by answers that named them; oracle: all targets."""
    sources = ("attention", "votes", "oracle", "random")
    got = {s: [h.regions for h in hinted(task, policy, scenes, hint=s)] for s in sources}
    assert all(regions == list(range(15, 25)) for regions in got["attention"])
    assert all({3, 7} <= set(regions) for regions in got["votes"])
    assert all(set(p.targets) <= set(regions) for p, regions in zip(scenes, got["oracle"]))
    (top,) = hinted(task, policy, scenes[:1], hint="votes", hint_regions=1)
    assert top.regions == [7]  # three mentions, but one vote an answer
    counts = Counter(r for regions in got["random"] for r in regions)  # binomial: 24 +- 3.8
    assert all(24 - 4.5 * 3.8 < counts[r] < 24 + 4.5 * 3.8 for r in range(25))
    assert len({tuple(regions) for regions in got["votes"]}) > 1  # ties are broken at random


@pytest.mark.parametrize("source", ["attention", "votes", "oracle", "random"])
def test_no_hint_depends_on_the_answer(task, policy, scenes, source):
    """M distinct cells in reading order, fixed words, no number; another answer, the same hint."""
    hints = hinted(task, policy, scenes, hint=source)
    for hint in hints:
        assert hint.regions == sorted(set(hint.regions))
        assert len(hint.regions) == 10
        assert hint.text.split() == ["look", *(CELLS[r] for r in hint.regions), *STEPS.split()]
    other = [replace(p, answer=str(11 - int(p.answer))) for p in scenes]
    assert hinted(task, policy, other, hint=source) == hints
    (hint,) = hinted(task, policy, scenes[:1], hint=source, hint_regions=40)
    assert hint.regions == list(range(25))


@pytest.mark.parametrize(
    ("changes", "text", "regions"),
    [
        ({"hint_parts": "where"}, LOOK, 10),
        ({"hint_parts": "steps"}, STEPS, 0),
        ({"hint_parts": "both"}, f"{LOOK} {STEPS}", 10),
        ({"hint": "answer", "hint_parts": "where"}, "answer {}", 0),  # the baseline tells it
        ({"hint": "none"}, "", 0),
    ],
)
def test_parts_of_a_hint(task, policy, scenes, changes, text, regions):
    """Where to look, steps, both, or nothing; steps that spoil are left out, and that is told."""
    (hint,) = hinted(task, policy, scenes[:1], **changes)
    assert hint.text.strip() == text.format(scenes[0].answer)
    assert hint.regions == list(range(25 - regions, 25))
    assert not hint.rejected
    scenes[0].steps = f"there are {scenes[0].answer}"
    (hint,) = hinted(task, policy, scenes[:1], **changes)
    assert hint.text.strip() == text.format(scenes[0].answer).removesuffix(STEPS).strip()
    assert hint.rejected


# -------------------------------------------------------------------------------- tutored teacher
# solved shares 1/4, 1/2, 0, 1
@pytest.mark.parametrize(("tau", "on", "groups", "under_kl"), table("tau, distill_on and kl_on"))
def test_tau_distill_on_and_kl_on(policy, ref, task, tau, on, groups, under_kl):
    """Failed answers of groups below tau are distilled; as released, the others have the KL."""
    rollout, _, _ = make_batch(policy, ref, task, config(method="grpo"), MIXED)
    c = config(tau=tau, distill_on=on, kl_on="untutored")
    distill = ptdpo.answers_to_distill(rollout, c)
    assert distill.view(4, 4).sum(1).tolist() == groups
    assert on == "all" or not (distill & rollout.solved).any()
    kl_on = ptdpo.answers_under_kl(rollout, c).view(4, 4)
    assert kl_on.all(1).tolist() == kl_on.any(1).tolist() == [bool(v) for v in under_kl]
    assert ptdpo.answers_under_kl(rollout, config(tau=tau)).all()


@pytest.mark.parametrize("micro", [0, 1])
def test_teacher_reads_the_same_picture_and_ids_with_the_hint(
    policy, ref, task, monkeypatch, micro
):
    """Hidden states at the tokens of distilled answers, from one plain hinted pass an answer."""
    c = config(micro_batch=micro)
    rollout, hints, batch = make_batch(policy, ref, task, c, MIXED)
    calls = []
    plain = ref.forward

    def forward(prompts, completion, mask):
        calls.append((prompts, completion))
        return plain(prompts, completion, mask)

    monkeypatch.setattr(ref, "forward", forward)
    teacher = ptdpo.read_teacher(ref, rollout, hints, batch.distill, c)
    read = [prompt for prompts, _ in calls for prompt in prompts]
    assert torch.equal(torch.cat([ids for _, ids in calls]), rollout.completion[:12])
    for b, prompt in enumerate(read):
        assert prompt.pixels is rollout.prompts[b].pixels
        assert policy.text(prompt.ids) == f"{rollout.problems[b].question} {hints[b].text}"
        own = [n for n in range(4 * b, 4 * b + 4) if batch.distill[n]]
        expected = torch.cat([plain_read(ref, rollout, n, prompt)[1] for n in own])
        assert torch.allclose(teacher[b], expected, atol=2e-5)
    assert len(read) == 3
    nobody = torch.zeros_like(batch.distill)
    assert [teacher[3], *ptdpo.read_teacher(ref, rollout, hints, nobody, c)] == [None] * 5


# ----------------------------------------------------------------------------------------- update
def textbook(policy, ref, rollout, hints, batch, config):
    """The loss of a batch as it stands in the papers, in one graph -> loss, JSD [N, T]."""
    hidden, _ = policy.forward(batch.prompts, batch.completion, batch.mask)
    lacking = torch.isin(torch.arange(len(policy.head_weight)), torch.tensor(policy.suppress_ids))
    z = (hidden @ policy.head_weight.T).masked_fill(lacking, ptdpo.FLOOR)
    logp = z.log_softmax(-1).gather(-1, batch.completion[..., None])[..., 0]
    old = logp.detach() if batch.logp_old is None else batch.logp_old
    mask = batch.mask.float()
    lengths = mask.sum(1, keepdim=True)
    share = mask / lengths / len(mask)  # of a token in the mean of answers of the mean of tokens
    if config.algorithm == "dapo":
        share = mask / mask.sum()
    low, high = ptdpo.CLIP[config.algorithm]
    A = batch.advantages[:, None]
    rho = (logp - old).exp()
    ratio = rho
    if config.algorithm == "gspo":  # one ratio an answer
        ratio = (((logp - old) * mask).sum(1, keepdim=True) / lengths).exp()
    policy_term = -torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    d = batch.logp_ref - logp
    kl = rho * (d.exp() - d - 1) * batch.kl_on[:, None]
    prompts = [ref.encode(p, h.text) for p, h in zip(rollout.problems, hints)]
    teacher, _ = ref.forward(prompts, batch.completion, batch.mask)
    distilled = mask * batch.distill[:, None]
    q = (teacher @ ref.head_weight.T).masked_fill(lacking, ptdpo.FLOOR)
    jsd = ptdpo.topk_jsd(z, q, config.top_k, config.divergence) * distilled
    loss = (share * (config.policy_weight * policy_term + config.kl_weight * kl)).sum()
    return loss + config.distill_weight * jsd.sum() / distilled.sum(), jsd


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize(
    ("stale", "changes"),
    [
        (0.0, {}),
        (0.3, {"kl_on": "untutored", "policy_weight": 0.5, "top_k": 1}),
        (0.3, {"algorithm": "dapo", "divergence": "forward_kl"}),
        (3e-3, {"algorithm": "gspo", "divergence": "reverse_kl"}),
        (0.3, {"distill_on": "all"}),
    ],
)
def test_a_batch_has_the_gradient_of_the_textbook_loss(
    policy, ref, task, monkeypatch, stale, changes, chunk
):
    """In float64: all parameters, the tied embedding too; chunks cut answers, GSPO's as well."""
    policy.double()
    ref.double()
    monkeypatch.setattr(ptdpo, "CHUNK", chunk)
    monkeypatch.setattr(ptdpo, "head_backward", partial(ptdpo.head_backward, chunk=chunk))
    c = config(kl_weight=0.3, micro_batch=3, **changes)
    rollout, hints, _ = make_batch(policy, ref, task, c, MIXED)
    unsaid = [w for w in range(61) if w not in rollout.completion][:2]
    policy.suppress_ids = ref.suppress_ids = unsaid
    hints, batch = batch_of(ref, task, rollout, c)
    if stale:
        noise = stale * torch.randn(batch.mask.shape, generator=ptdpo.generator("stale"))
        batch = replace(batch, logp_old=(plain_logp(policy, rollout) + noise) * batch.mask)
    weighed = replace(batch, weights=ptdpo.token_weights(batch, c, c.distill_weight))
    values = [ptdpo.backward(policy, ref, part, c) for part in weighed.split(3)]
    got = torch.cat([p.grad.flatten() for p in policy.parameters()])
    loss, jsd = textbook(policy, ref, rollout, hints, batch, c)
    grads = torch.autograd.grad(loss, list(policy.parameters()))
    assert close(got, torch.cat([g.flatten() for g in grads]), 1e-6)
    logp, _, _, distance = torch.cat(values).unbind(-1)
    assert torch.allclose(logp, plain_logp(policy, rollout), atol=1e-9)
    assert torch.allclose(distance, jsd, atol=1e-9)
    assert (distance[~batch.distill] == 0).all()


@pytest.mark.parametrize("updates", [2, 3, 4])
def test_several_updates_a_batch(policy, ref, task, updates):
    """Every group is used once. logp_old is of the policy that sampled; later ones have moved."""
    c = config(updates_per_batch=updates)
    rollout, _, batch = make_batch(policy, ref, task, c, MIXED)
    whole, _, _ = gradient(policy, ref, batch, c)
    alone = replace(c, updates_per_batch=1)
    cuts = ptdpo.even_cuts(4, updates)
    parts = [gradient(policy, ref, batch.take(*cut), alone)[0] for cut in cuts]
    assert close(whole, sum(parts), 1e-4)
    before = plain_logp(policy, rollout)
    _, tokens, _ = gradient(policy, ref, batch, c, lr=0.1)
    moved = ((tokens["logp"] - before).abs() * rollout.mask).amax(1)
    first = 4 * cuts[0][1]
    assert moved[:first].max() < 1e-4
    assert moved[first:].max() > 1e-3
    d = batch.logp_ref - tokens["logp"]
    kl = (tokens["logp"] - before).exp() * (d.exp() - d - 1)
    assert torch.allclose(tokens["kl"][rollout.mask], kl[rollout.mask], atol=1e-3)


def test_lambda_falls_to_zero(policy, ref, task):
    """With distill_decay lambda is whole at step 1, and half of it after half of the steps."""
    c = config(steps=10, distill_decay=True, policy_weight=0.0, kl_weight=0.0)
    _, _, batch = make_batch(policy, ref, task, c, [0] * 16)
    first, sixth, last = (gradient(policy, ref, batch, c, step)[0] for step in (1, 6, 10))
    assert close(first, gradient(policy, ref, batch, replace(c, distill_decay=False), 6)[0])
    assert close(sixth, first / 2)
    assert close(last, first / 10)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_micro_batches_change_nothing(policy, ref, task, algorithm):
    """Gradient, metrics and hints for 4, 1 and 3 groups a pass, and so with other left padding."""
    problems = [task.problem("train", 0, i) for i in range(4)]
    problems[1].question = "describe colour"
    seen = []
    for size in (0, 1, 3):
        c = config(algorithm=algorithm, micro_batch=size)
        rollout, hints, batch = make_batch(policy, ref, task, c, MIXED, problems)
        grad, tokens, _ = gradient(policy, ref, batch, c)
        row = ptdpo.step_metrics(policy, task, rollout, hints, batch.distill, tokens)
        seen.append((grad, row, hints))
    first, row, hints = seen[0]
    assert first.norm() > 1e-3
    for grad, other, same in seen[1:]:
        assert close(grad, first)
        assert other == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in row.items()}
        assert same == hints


def test_padding_changes_nothing(policy, ref, task, monkeypatch):
    """Other ids behind the end, more columns, and NaN in hidden states of padding do not leak."""
    c = config(updates_per_batch=2, algorithm="gspo")
    rollout, _, batch = make_batch(policy, ref, task, c, MIXED)
    expected, _, _ = gradient(policy, ref, batch, c)
    junk = torch.where(rollout.mask, rollout.completion, 7)
    assert (junk != rollout.completion).sum() > 10
    longer = replace(
        rollout,
        completion=torch.cat([junk, torch.randint(1, 60, (16, 3))], 1),
        mask=torch.cat([rollout.mask, torch.zeros(16, 3).bool()], 1),
    )
    masks = {id(p.pixels): mask for p, mask in zip(rollout.prompts, longer.mask.split(4))}

    def poisoned(model, plain, prompts, completion, mask=None, layers=()):
        hidden, looks = plain(prompts, completion, mask, layers)
        real = torch.cat([masks[id(prompt.pixels)] for prompt in prompts])
        return hidden.masked_fill(~real[..., None], math.nan), looks

    for model in (policy, ref):
        monkeypatch.setattr(model, "forward", partial(poisoned, model, model.forward))
    _, batch = batch_of(ref, task, longer, c)
    grad, tokens, _ = gradient(policy, ref, batch, c)
    assert close(grad, expected, 1e-4)
    assert all(value.isfinite().all() for value in tokens.values())


@pytest.mark.parametrize("method", ["grpo", "ptdpo"])
@pytest.mark.parametrize("solved", [0, 1])
def test_flat_groups_teach_by_the_tutor_alone(policy, ref, task, method, solved):
    """All failed or all solved, without KL: gradient exactly 0, unless the tutor speaks."""
    c = config(method=method, kl_weight=0.0)
    rollout, hints, batch = make_batch(policy, ref, task, c, [solved] * 16)
    grad, tokens, _ = gradient(policy, ref, batch, c)
    tutored = (method, solved) == ("ptdpo", 0)
    assert (grad.norm() > 1e-4) if tutored else (grad == 0).all()
    cut, _, norm = gradient(policy, ref, batch, c, clip=0.01)
    assert norm == pytest.approx(grad.norm().item(), rel=1e-4)  # before it was clipped
    assert cut.norm() <= 0.0101
    row = ptdpo.step_metrics(policy, task, rollout, hints, batch.distill, tokens)
    assert row["distilled"] == tutored
    with_kl, _, _ = gradient(policy, ref, batch, replace(c, kl_weight=1.0))
    assert 0 < with_kl.norm() < math.inf


@pytest.mark.parametrize("frozen_head", [False, True])
def test_gradients_go_to_what_learns_and_are_gone_afterwards(policy, ref, task, frozen_head):
    """No gradient is left after an update; reference, teacher and a frozen head never get one."""
    ref.requires_grad_(True)  # even a reference that could learn does not
    policy.head_weight.requires_grad_(not frozen_head)
    c = config()
    _, _, batch = make_batch(policy, ref, task, c, MIXED)
    models = {"policy": policy, "ref": ref}
    before = {name: copy.deepcopy(model) for name, model in models.items()}
    learned = [p for p in policy.parameters() if p.requires_grad]
    ptdpo.update(policy, ref, torch.optim.AdamW(learned, 1e-3), batch, c, 1)
    assert all(p.grad is None for model in models.values() for p in model.parameters())
    for name, model in models.items():
        for (which, new), old in zip(model.named_parameters(), before[name].parameters()):
            still = name == "ref" or (frozen_head and which == "embed.weight")
            assert torch.equal(new, old) == still


def test_what_is_not_finite_moves_nothing(policy, ref, task):
    """One update of two is broken: it is left out and named, and the other one moves weights."""
    c = config(updates_per_batch=2)
    _, _, batch = make_batch(policy, ref, task, c, MIXED)
    batch.logp_ref[0, 0] = math.nan
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    _, _, skipped = ptdpo.update(policy, ref, optimizer, batch, c, 1)
    assert (skipped, len(steps)) == (1, 1)
    assert all(p.isfinite().all() for p in policy.parameters())


# --------------------------------------------------------------------------------------- the step
def test_a_step_is_its_parts_and_both_methods_meet_the_same_noise(policy, ref, task, monkeypatch):
    """train_step against its parts in a row; step 1 of GRPO has the same problems and answers."""
    problems = [task.problem("train", 7, i) for i in range(4, 8)]
    plain = ptdpo.sample_and_grade
    rollouts = []

    def sample(*args, **kwargs):
        rollouts.append(helpers.with_verdicts(plain(*args, **kwargs), MIXED))
        return rollouts[-1]

    monkeypatch.setattr(ptdpo, "sample_and_grade", sample)
    for method in ("grpo", "ptdpo"):
        c = config(seed=7, method=method)
        student = copy.deepcopy(policy)
        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        row, shown = ptdpo.train_step(student, ref, task, optimizer, c, [0], 1)
        by_hand = copy.deepcopy(policy)
        rollout, hints, batch = make_batch(by_hand, ref, task, c, None, problems, (7, 1))
        _, tokens, norm = gradient(by_hand, ref, batch, c, lr=0.1, clip=1.0)
        expected = ptdpo.step_metrics(by_hand, task, rollout, hints, batch.distill, tokens)
        assert row == expected | {"grad_norm": pytest.approx(norm), "skipped": 0}
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), by_hand.parameters()))
        assert shown["texts"] == rollout.texts[0]
    assert all(torch.equal(rollouts[0].completion, r.completion) for r in rollouts)
    assert all(r.problems == problems for r in rollouts)
