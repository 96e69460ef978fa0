"""The losses: each value and gradient against a second implementation or a number worked out."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import config, plain_divergence, table
from hypothesis import given, settings
from hypothesis import strategies as st

import ptdpo
from ptdpo import FLOOR, entropy, group_advantages, kl_to_reference, policy_loss, topk_jsd

D = torch.float64
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")


def logits(seed, *shape, scale=3.0, dtype=D):
    """Random logits."""
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=noise, dtype=D)).to(dtype)


def grad_of(function, z):
    """Gradient of the sum of function(z)."""
    z = z.detach().clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


# ------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.9, -2.7, 1e6])
def test_advantages_by_hand(reward):
    """(r - mean) / sample std. A flat group has 0; rounding would make 0.056 of eight times 0.9."""
    rewards = torch.tensor([1.0] + [0.0] * 7 + [reward] * 8 + [0.1, 0.9] * 4)
    hard, flat, mixed = group_advantages(rewards, 8).split(8)
    assert hard.tolist() == pytest.approx([2.4749] + [-0.3536] * 7, abs=1e-4)
    assert (flat == 0).all()
    assert mixed.tolist() == pytest.approx([-0.9354, 0.9354] * 4, abs=1e-4)


# ------------------------------------------------------------------------------------ policy loss
# slope: d loss / d log p
@pytest.mark.parametrize(("algorithm", "rho", "advantage", "loss", "slope"), table("clipping"))
def test_clipping_by_hand(algorithm, rho, advantage, loss, slope):
    """Value and slope on both sides of both bounds: a clipped token does not move the policy."""
    log_ratio = torch.tensor([math.log(rho)], dtype=D)
    advantages = torch.tensor([advantage], dtype=D)
    function = lambda x: policy_loss(x, advantages, algorithm)
    assert function(log_ratio).item() == pytest.approx(loss, abs=1e-12)
    assert grad_of(function, log_ratio).item() == pytest.approx(slope, abs=1e-12)


def test_policy_loss_and_kl_survive_huge_log_ratios():
    """The log-ratio is clamped before exp: no infinity, no NaN, in value or slope."""
    log_ratio = torch.tensor([-1e4, -1e4, 1e4, 1e4])
    zero = torch.zeros(4)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for f in (lambda x: policy_loss(x, signs), lambda x: kl_to_reference(x, zero, zero)):
        assert f(log_ratio).isfinite().all()
        assert grad_of(f, log_ratio).isfinite().all()


# --------------------------------------------------------------------------------------------- KL
@pytest.mark.parametrize("stale", [0.0, 0.7])
def test_kl_gradient_is_that_of_the_reverse_kl(stale):
    """Enumerated over 30 words, on and off policy: value KL(pi || ref), and its exact gradient."""
    z = logits(4, 30, scale=1.0)
    log_q = logits(5, 30, scale=1.0).log_softmax(-1)
    old = (z + stale * logits(6, 30, scale=1.0)).log_softmax(-1)
    expected = lambda z: (old.exp() * kl_to_reference(z.log_softmax(-1), old, log_q)).sum()
    exact = lambda z: (z.softmax(-1) * (z.log_softmax(-1) - log_q)).sum()
    assert expected(z).item() == pytest.approx(exact(z).item(), abs=1e-12)
    assert (grad_of(expected, z) - grad_of(exact, z)).abs().max() < 1e-12


# -------------------------------------------------------------------------------------------- JSD
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("V", "ks"), [(50, (1, 5, 20, 50, 60)), (5000, (1, 10, 100, 5000))])
def test_topk_jsd_equals_the_definition(V, ks, name):
    """Value and gradient to 1e-9 in float64, the gradient also by finite differences."""
    for k in ks:
        for n, scale in enumerate((0.5, 3.0, 8.0)):
            s = logits(n, V, scale=scale)
            t = s + logits(n + 7, V, scale=scale / 3)
            ours = lambda z, t=t, k=k: topk_jsd(z, t, k, name)
            plain = lambda z, t=t, k=k: plain_divergence(z, t, k, name)
            assert ours(s).item() == pytest.approx(plain(s).item(), rel=1e-9, abs=1e-9)
            grad = grad_of(ours, s)
            assert (grad - grad_of(plain, s)).abs().max() < 1e-9
            assert grad.abs().max() > 1e-6
            assert V > 50 or torch.autograd.gradcheck(ours, s.requires_grad_())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(0.1, 40), st.floats(-300, 300))
def test_properties_of_the_jsd(seed, V, scale, shift):
    """Symmetric, at most ln 2, blind to a shift of logits, 0 for equal sides, rising with K.

    A coarser view never sees more (data-processing inequality), and K >= V sees all.
    """
    s = logits(seed, 2, 3, V, scale=scale)  # any leading shape
    t = logits(seed + 1, 2, 3, V, scale=scale)
    ks = (1, 2, 5, 10, V - 1, V, V + 1, 1000)
    values = torch.stack([topk_jsd(s, t, k) for k in sorted(ks)])
    assert values.shape == (8, 2, 3)
    assert values.diff(dim=0).min() > -1e-13
    assert -1e-13 < values.min() <= values.max() < math.log(2) + 1e-13
    exact = [plain_divergence(a, b, V) for a, b in zip(s.flatten(0, 1), t.flatten(0, 1))]
    assert (values[-1].flatten() - torch.stack(exact)).abs().max() < 1e-12
    assert (topk_jsd(t, s, 2) - topk_jsd(s, t, 2)).abs().max() < 1e-13
    assert (topk_jsd(s + shift, t - shift, 2) - topk_jsd(s, t, 2)).abs().max() < 1e-12
    assert topk_jsd(s, s, 2).abs().max() < 1e-13


def test_the_gradient_leads_the_student_to_the_teacher():
    """Most of all to a word that only the hint makes likely; the teacher gets none."""
    s = logits(9, 50)
    t = s + logits(10, 50, scale=0.5)
    hinted = s.argsort()[25].item()  # the hint makes a word likely that the student ranks low
    t[hinted] = s.max() + 2

    grad = grad_of(lambda z: topk_jsd(z, t, 5), s)
    assert grad.norm() > 1e-3
    assert grad[hinted] == grad.min() < 0
    assert topk_jsd(s - 5 * grad, t, 5) < topk_jsd(s, t, 5)
    # The value is symmetric: a swap of the sides shows in the gradient alone.
    t.requires_grad_()
    topk_jsd(s.requires_grad_(), t, 5).backward()
    assert t.grad is None
    assert (grad_of(lambda z: topk_jsd(z, s, 5), t) - grad).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("low", [FLOOR, -math.inf])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [([4], [4]), ([4, 5], []), ([], [0, 1]), ([0, 1, 2, 3, 4], []), ([0, 1, 2], [3, 4, 5])],
)
def test_suppressed_words(student, teacher, low, dtype):
    """Log 0 on one side or both: the plain value (0 log 0 = 0), and a finite gradient."""
    s = logits(17, 6, dtype=dtype)
    t = logits(18, 6, dtype=dtype)
    s[student] = low
    t[teacher] = low
    for k, name in product((1, 2, 3, 6), DIVERGENCES):
        grad = grad_of(lambda z, k=k, name=name: topk_jsd(z, t, k, name), s)
        assert grad.isfinite().all()
        if name == "jsd" or student == teacher:
            plain = plain_divergence(s, t, k, name).item()
            assert topk_jsd(s, t, k, name).item() == pytest.approx(plain, abs=1e-6)
            assert (grad[student] == 0).all()


def test_float32_noise_is_below_1e_6():
    """Where sides are equal or nearly so, the value is noise around 0, above -1e-6."""
    for scale in (0.5, 3.0, 12.0):
        s = logits(13, 16, 5000, scale=scale, dtype=torch.float32)
        for eps in (0.0, 1e-4, 1e-2, 1.0):
            t = s + eps * logits(14, 16, 5000, scale=1.0, dtype=torch.float32)
            value = topk_jsd(s, t, 10)
            assert (value - topk_jsd(s.double(), t.double(), 10)).abs().max() < 1e-6
            assert value.min() > -1e-6
    # 1 - sum(p) would be 0 in float32 here, and the rest a NaN; summed word by word it is not.
    s = torch.tensor([30.0, 0.0, -1.0, -2.0])
    t = torch.tensor([30.0, 1.0, -1.0, -2.0])
    for k in (1, 2, 3, 4):
        grad = grad_of(lambda z, k=k: topk_jsd(z, t, k), s)
        exact = grad_of(lambda z, k=k: topk_jsd(z, t.double(), k), s.double())
        assert (grad - exact).abs().max() < 1e-7


# ---------------------------------------------------------------------------------------- entropy
def test_entropy():
    """Against torch.distributions at V = 50 and 5,000; words that are left out."""
    for V in (50, 5000):
        z = logits(21, 4, 5, V)
        plain = torch.distributions.Categorical(logits=z).entropy()
        assert (entropy(z) - plain).abs().max() < 1e-9
    for low in (FLOOR, -math.inf):
        assert entropy(torch.tensor([0.0, low, low])).item() == 0
        assert entropy(torch.tensor([0.0, 0.0, low])).item() == pytest.approx(math.log(2))


# ---------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize(
    ("algorithm", "each"),
    [("grpo", [1 / 2, 1 / 6]), ("gspo", [1 / 2, 1 / 6]), ("dapo", [1 / 4] * 2)],
)
def test_weights_by_hand(algorithm, each):
    """Mean of answers of the mean of tokens, or with dapo of tokens; JSD: of distilled tokens."""
    c = config(algorithm=algorithm, policy_weight=3.0, kl_weight=0.5)
    batch = SimpleNamespace(
        mask=torch.tensor([[1, 0, 0], [1, 1, 1]]).bool(),
        distill=torch.tensor([False, True]),
        kl_on=torch.tensor([True, False]),
    )
    mean = batch.mask * torch.tensor(each)[:, None]
    kl = torch.stack([mean[0] / 2, torch.zeros(3)])
    jsd = torch.tensor([[0, 0, 0], [2 / 3, 2 / 3, 2 / 3]])
    weights = ptdpo.token_weights(batch, c, 2.0)
    assert torch.allclose(weights, torch.stack([3 * mean, kl, jsd], -1))
