"""TinyVLM against a plain model: one answer at a time, no packing, no padding, no cache."""

import pytest
import torch
from helpers import plain_forward, shaken

import ptdpo
from toy_tasks.counting import CELLS, WORDS

HINT = "look r0c1 r1c3 r4c4 steps compare colour and shape ignore near misses"


@pytest.fixture
def prompts(policy, task):
    """Three prompts of three lengths: a hinted one, a plain one, a short one."""
    problems = [task.problem("train", 0, i) for i in range(3)]
    problems[2].question = "describe colour"
    return [policy.encode(p, h) for p, h in zip(problems, (HINT, "", ""))]


def until_end(ids):
    """bool [N, T], true up to the first end."""
    return (ids == 0).cumsum(1) - (ids == 0).long() == 0


def answers(policy, prompts, G, seed=0):
    """Answers of every length to each prompt, their mask, and the noise that drew them."""
    noise = torch.rand(len(prompts) * G, 14, generator=ptdpo.generator(seed), dtype=torch.double)
    ids = policy.sample(prompts, noise)
    return ids, until_end(ids), noise


def test_forward_equals_a_plain_model(policy, prompts):
    """Hidden states and attention of every answer, in packed groups, beside longer prompts."""
    ids, mask, _ = answers(policy, prompts, 4)
    assert len(set(mask.sum(1).tolist())) > 2
    hidden, looks = policy.forward(prompts, ids, mask, [0, 1, 2])
    for n in range(12):
        answer = ids[n][mask[n]].tolist()
        plain, attention = plain_forward(policy, prompts[n // 4], answer)
        assert torch.allclose(hidden[n, : len(answer)], plain, atol=2e-5)
        assert torch.allclose(looks[n // 4][:, n % 4], attention.mean(1), atol=1e-6)
    assert policy.forward(prompts, ids, mask)[1] == []
    _, alone = policy.forward(prompts, ids, mask, [1])
    assert torch.allclose(torch.cat(alone), torch.stack([look[1] for look in looks]), atol=1e-7)
    first, _ = policy.forward(prompts, ids[:, :1], mask[:, :1], [0])  # answers of one token
    assert torch.allclose(first, hidden[:, :1], atol=2e-5)


def test_sampling_and_training_have_one_distribution(policy, prompts):
    """Greedy: the argmax of the forward pass. Sampled: the inverse of its cumulative sum."""
    ids, mask, noise = answers(policy, prompts, 4, seed=3)
    p = (policy.forward(prompts, ids, mask)[0] @ policy.head_weight.T).double().softmax(-1)
    assert torch.equal((p.cumsum(-1) < noise[..., None]).sum(-1)[mask], ids[mask])
    ids = policy.sample(prompts, noise[:3], True)
    mask = until_end(ids)
    best = (policy.forward(prompts, ids, mask)[0] @ policy.head_weight.T).argmax(-1)
    assert torch.equal(best[mask], ids[mask])
    assert (ids[~mask] == 0).all()
    # Rounding of the last cumulative probability must not point beyond the last word.
    edge = policy.sample(prompts, torch.tensor([[0.0], [0.5], [1 + 1e-15]], dtype=torch.double))
    assert 0 == edge[0] < edge[1] < edge[2] == len(WORDS) - 1


def test_prefix_is_read_once_a_group_and_sampling_stops_early(policy, prompts, monkeypatch):
    """A group of eight costs one prefix and one column a token; after all ends, nothing more."""
    shapes = []
    plain = policy.decoder[0].forward

    def forward(x, *args, **kwargs):
        shapes.append(tuple(x.shape[:2]))
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(policy.decoder[0], "forward", forward)
    noise = torch.full((8, 14), 0.3, dtype=torch.double)
    noise[:, 3] = 0  # the first word, which is the end
    policy.sample(prompts[:1], noise)
    assert shapes == [(1, 25 + len(prompts[0].ids))] + [(8, 1)] * 3


def test_encode_keeps_the_pixels_and_the_words(policy, task):
    """Prompt = the picture as it is, question, hint; `like` lends its pixels, not a copy."""
    problem = task.problem("train", 0, 0)
    prompt = policy.encode(problem, HINT)
    picture = problem.images[0]
    for x, y in ((0, 0), (39, 0), (3, 17), (39, 39)):
        assert tuple(prompt.pixels[y, x].tolist()) == picture.getpixel((x, y))
    assert policy.text(prompt.ids) == f"{problem.question} {HINT}"
    assert policy.encode(problem, like=prompt).pixels is prompt.pixels
    assert policy.tokens(policy.text(range(len(WORDS)))) == list(range(len(WORDS)))
    assert policy.region_names(prompt) == CELLS


def test_frozen_copy_never_learns(policy, prompts):
    """Half a million weights, the same at first, deaf to what then happens to the original."""
    ref = policy.frozen_copy()
    assert not any(p.requires_grad for p in ref.parameters())
    assert 0.4e6 < sum(p.numel() for p in ref.parameters()) < 0.75e6
    ids, mask, _ = answers(policy, prompts, 2)
    before = policy.forward(prompts, ids, mask)[0].detach()
    assert torch.equal(ref.forward(prompts, ids, mask)[0], before)
    shaken(policy, 9)
    assert torch.equal(ref.forward(prompts, ids, mask)[0], before)
