"""TinyVLM against a plain model: one answer at a time, no packing, no padding, no cache."""

import math

import pytest
import torch
from helpers import plain_forward, shaken

import ptdpo
from tiny_vlm import Block
from toy_tasks.counting import CELLS, WORDS

HINT = "look r0c1 r1c3 r4c4 steps compare colour and shape ignore near misses"


@pytest.fixture
def prompts(policy, task):
    """Three prompts of three lengths: a hinted one, a plain one, a short one."""
    problems = [task.problem("train", 0, i) for i in range(3)]
    problems[2].question = "describe colour"
    return [policy.encode(p, h) for p, h in zip(problems, (HINT, "", ""))]


def completions(policy, prompts, G, T=14, seed=0):
    """Answers of every length to each prompt, and their mask."""
    noise = torch.rand(len(prompts) * G, T, generator=ptdpo.generator(seed), dtype=torch.double)
    ids = policy.sample(prompts, noise, 1.0)
    mask = (ids == 0).cumsum(1) - (ids == 0).long() == 0
    return ids, mask, noise


def test_forward_equals_a_plain_model(policy, prompts):
    """Hidden states and attention of every answer, packed in groups, as if it stood alone."""
    ids, mask, _ = completions(policy, prompts, 4)
    assert len(set(mask.sum(1).tolist())) > 2
    hidden, looks = policy.forward(prompts, ids, mask, [0, 1, 2])
    assert hidden.shape == (12, 14, 96) and looks.shape == (3, 12, 25)
    for n in range(12):
        answer = ids[n][mask[n]].tolist()
        plain, attention = plain_forward(policy, prompts[n // 4], answer)
        assert torch.allclose(hidden[n, : len(answer)], plain, atol=2e-5)
        assert torch.allclose(looks[:, n], attention.mean(1), atol=1e-6)
    assert (looks.sum(-1) <= 1).all() and (looks > 0).all()
    assert torch.equal(policy.forward(prompts, ids)[0], hidden)
    assert torch.allclose(policy.forward(prompts, ids, mask, [1])[1][0], looks[1], atol=1e-7)


def test_left_padding_changes_nothing(policy, prompts):
    """A prompt beside a longer one: the same hidden states, attention and samples as alone."""
    ids, mask, noise = completions(policy, prompts, 4)
    hidden, looks = policy.forward(prompts, ids, mask, [0, 2])
    for b, prompt in enumerate(prompts):
        rows = slice(4 * b, 4 * b + 4)
        alone, look = policy.forward([prompt], ids[rows], mask[rows], [0, 2])
        assert torch.allclose(hidden[rows], alone, atol=2e-5)
        assert torch.allclose(looks[:, rows], look, atol=1e-6)
        drawn = policy.sample([prompt], noise[rows], 1.0)
        assert torch.equal(drawn[mask[rows]], ids[rows][mask[rows]])


def test_answers_of_a_group_do_not_see_each_other(policy, prompts):
    """Change one answer: the others' hidden states stay, its own change from there on."""
    ids, _, _ = completions(policy, prompts, 3)
    changed = ids.clone()
    changed[4, 5] = (changed[4, 5] + 1) % len(WORDS)
    before, after = policy.forward(prompts, ids)[0], policy.forward(prompts, changed)[0]
    difference = (before - after).abs().amax(-1)
    others = torch.arange(9) != 4
    assert difference[others].max() < 1e-5 and difference[4, :6].max() < 1e-5
    assert difference[4, 6:].min() > 1e-4


def test_greedy_sampling_is_the_argmax_of_the_forward_pass(policy, prompts):
    """Cache and packed pass agree on every token up to the end of the answer."""
    ids = policy.sample(prompts, torch.zeros(3, 14, dtype=torch.double), 0.0)
    mask = (ids == 0).cumsum(1) - (ids == 0).long() == 0
    best = (policy.forward(prompts, ids)[0] @ policy.head_weight.T).argmax(-1)
    assert torch.equal(best[mask], ids[mask])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampled_tokens_are_the_inverse_of_the_forward_cdf(policy, prompts, temperature):
    """The distribution that samples is the one that training scores."""
    noise = torch.rand(12, 14, generator=ptdpo.generator(3), dtype=torch.double)
    ids = policy.sample(prompts, noise, temperature)
    mask = (ids == 0).cumsum(1) - (ids == 0).long() == 0
    logits = (policy.forward(prompts, ids)[0] @ policy.head_weight.T).double() / temperature
    cdf = logits.softmax(-1).cumsum(-1)
    assert torch.equal((cdf < noise[..., None]).sum(-1)[mask], ids[mask])


def test_first_tokens_come_as_often_as_their_probability(policy, prompts):
    """200 evenly spaced uniforms give each word within one of 200 p."""
    noise = ((torch.arange(200, dtype=torch.double) + 0.5) / 200)[:, None]
    ids = policy.sample(prompts[:1], noise, 1.0)[:, 0]
    hidden, _ = policy.forward(prompts[:1], torch.zeros(1, 1, dtype=torch.long))
    p = (hidden[0, 0] @ policy.head_weight.T).softmax(-1)
    assert (torch.bincount(ids, minlength=len(WORDS)) - 200 * p).abs().max() <= 1


@pytest.mark.parametrize("u", [0.0, 1 - 1e-16])
def test_extreme_uniforms_stay_in_the_vocabulary(policy, prompts, u):
    """Rounding of the last cumulative probability must not point beyond the last word."""
    ids = policy.sample(prompts, torch.full((3, 4), u, dtype=torch.double), 1.0)
    assert ids.shape == (3, 4) and ids.min() >= 0 and ids.max() < len(WORDS)


def test_ended_answers_are_cut_short_but_keep_their_shape(task, policy, prompts):
    """When every answer has ended, sampling stops, and the rest is filled up to T."""
    with torch.no_grad():
        policy.norm.weight.zero_()
        policy.norm.bias.copy_(20 * policy.embed.weight[0])
    blocks, plain = [], policy.decoder[0].forward
    policy.decoder[0].forward = lambda *a: blocks.append(1) or plain(*a)
    ids = policy.sample(prompts, torch.full((6, 14), 0.5, dtype=torch.double), 1.0)
    assert ids.shape == (6, 14) and (ids == 0).all() and len(blocks) == 1


def test_picture_and_prompt_are_read_once_a_group(policy, prompts, monkeypatch):
    """A group of eight costs one prefix and one column a token and answer."""
    widths, plain = [], policy.decoder[0].forward
    monkeypatch.setattr(
        policy.decoder[0], "forward", lambda x, *a, **k: widths.append(x.shape[:2]) or plain(x, *a)
    )
    policy.sample(prompts[:1], torch.full((8, 3), 0.3, dtype=torch.double), 1.0)
    assert widths[0] == (1, 25 + len(prompts[0].ids)) and set(widths[1:]) <= {(1, 8)}


def test_a_picture_matters_and_a_hint_matters(policy, prompts, task):
    """No input is dropped on the way."""
    ids, _, _ = completions(policy, prompts[:1], 2)
    hidden, _ = policy.forward(prompts[:1], ids)
    other = policy.encode(task.problem("train", 0, 7), "")
    other.ids = prompts[0].ids
    assert (policy.forward([other], ids)[0] - hidden).abs().max() > 1e-2
    other.pixels, other.ids = prompts[0].pixels, prompts[1].ids
    assert (policy.forward([other], ids)[0] - hidden).abs().max() > 1e-2


def test_encode_keeps_the_pixels_and_the_words(policy, task):
    """Prompt = the picture as it is, question, hint; `like` lends its pixels, not a copy."""
    problem = task.problem("train", 0, 0)
    prompt = policy.encode(problem, HINT)
    picture = problem.images[0]
    assert prompt.pixels.dtype == torch.uint8 and prompt.pixels.shape == (40, 40, 3)
    for x, y in ((0, 0), (39, 0), (3, 17), (39, 39)):
        assert tuple(prompt.pixels[y, x].tolist()) == picture.getpixel((x, y))
    assert policy.text(prompt.ids) == f"{problem.question} {HINT}"
    assert policy.encode(problem, like=prompt).pixels is prompt.pixels
    assert policy.tokens(policy.text(range(len(WORDS)))) == list(range(len(WORDS)))
    assert policy.region_names(prompt) == CELLS and len(CELLS) == 25
    assert policy.stop_ids == (0,) and policy.head_weight.shape == (len(WORDS), 96)


def test_a_block_looks_at_a_planted_object():
    """Hand-set keys and queries: attention of a row peaks on the one column that is like it."""
    block = Block(16, 1)
    with torch.no_grad():
        block.qkv.weight.copy_(torch.cat([2 * torch.eye(16)] * 3))
    x = torch.nn.functional.one_hot(torch.arange(9)).float()
    x = torch.nn.functional.pad(x, (0, 7))
    x[8] = x[5]  # the last row asks for what stands in column 5
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    _, _, attention = block(x[None], seen, rows=torch.tensor([8, 4]))
    assert attention.shape == (1, 2, 9)
    assert attention[0, 0, [5, 8]].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert attention[0, 1].argmax() == 4 and (attention[0, 1, 5:] == 0).all()
    assert attention.sum(-1).tolist() == [pytest.approx([1, 1])]


def test_base_looks_at_the_objects_it_is_asked_for(base, task):
    """On the shipped base, the layer found by calibration has twice the recall of random cells."""
    policy, state = base
    layer = state["layer_recall"].index(max(state["layer_recall"]))
    config = ptdpo.Config()
    problems = [task.problem("validation", 3, i) for i in range(16)]
    rollout = ptdpo.answer(policy, task, problems, 8, 1.0, ("look",))
    ptdpo.read_reference(policy, rollout, config, [layer])
    hints = ptdpo.build_hints(policy, task, rollout, config, ("look",))
    assert ptdpo.recall([h.regions for h in hints], problems) >= 2 * config.hint_regions / 25


def test_size_is_that_of_a_toy(task):
    """0.4 to 0.75 million parameters, the tied head counted once."""
    count = sum(p.numel() for p in task.new_policy(0).parameters())
    assert 0.4e6 < count < 0.75e6


def test_new_policy_is_a_function_of_its_seed(task):
    """Same seed, same weights; another seed, others."""
    a, b, c = (task.new_policy(seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_frozen_copy_never_learns(policy, prompts):
    """Same weights at first, no gradient, and deaf to what happens to the original."""
    ref = policy.frozen_copy()
    assert not any(p.requires_grad for p in ref.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    ids, _, _ = completions(policy, prompts, 2)
    before = policy.forward(prompts, ids)[0].detach()
    assert torch.equal(ref.forward(prompts, ids)[0], before)
    shaken(policy, 9)
    assert torch.equal(ref.forward(prompts, ids)[0], before)
    assert math.isfinite(before.sum()) and ref.num_layers == policy.num_layers == 3
