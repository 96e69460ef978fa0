"""The losses: each value and gradient against a second implementation or a number worked out."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from helpers import plain_jsd
from hypothesis import given, settings
from hypothesis import strategies as st

import ptdpo
from ptdpo import entropy, group_advantages, kl_to_ref, policy_loss, token_stats, topk_jsd

D = torch.float64
few = settings(max_examples=40, deadline=None, derandomize=True)


def logits(seed, *shape, scale=3.0, dtype=D):
    """Random logits."""
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=noise, dtype=D)).to(dtype)


def grad_of(function, *tensors, wrt=0):
    """Gradient of the sum of function(*tensors) in one of them."""
    tensors = [t.detach().clone().requires_grad_(i == wrt) for i, t in enumerate(tensors)]
    return torch.autograd.grad(function(*tensors).sum(), tensors[wrt])[0]


# ------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0], [2.4749] + [-0.3536] * 7),
        ([1, 1, 0, 0], [0.8660, 0.8660, -0.8660, -0.8660]),
        ([0.1, 0.9], [-0.7071, 0.7071]),
        ([3, 1, 2], [1, -1, 0]),
    ],
)
def test_advantages_by_hand(rewards, expected):
    """(r - mean) / sample std; the first row is the usual case of a hard prompt."""
    adv = group_advantages(torch.tensor(rewards, dtype=torch.float), len(rewards))
    assert adv.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.9, 1.0, -2.7, 1e6])
def test_flat_group_is_exactly_zero(reward):
    """Rounding of the mean would otherwise turn eight rewards of 0.9 into advantages of 0.056."""
    assert (group_advantages(torch.full((8,), reward), 8) == 0).all()


def test_groups_do_not_see_each_other():
    """Several groups at once, against the standard library, one flat group among them."""
    groups = [[0.1, 0.9, 0.9, 0.0], [0.9] * 4, [1.0, 0.0, 0.0, 0.0], [5.0, -5.0, 2.0, 0.0]]
    plain = []
    for g in groups:
        mean, std = statistics.mean(g), statistics.stdev(g)
        plain += [(r - mean) / (std + 1e-6) if len(set(g)) > 1 else 0.0 for r in g]
    adv = group_advantages(torch.tensor(groups, dtype=D).flatten(), 4)
    assert adv.shape == (16,)
    assert adv.tolist() == pytest.approx(plain, abs=1e-12)


@few
@given(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=8, max_size=8))
def test_advantages_are_centred_and_keep_the_order_of_rewards(rewards):
    """Whatever the rewards: sum 0 within each group, better answers never get less."""
    r = torch.tensor(rewards, dtype=D)
    adv = group_advantages(r, 4).view(2, 4)
    assert adv.sum(1).abs().max() < 1e-9
    assert ((adv[:, :, None] - adv[:, None]) * (r.view(2, 4, 1) - r.view(2, 1, 4)) >= 0).all()


# ------------------------------------------------------------------------------------ policy loss
def plain_policy_loss(logp, old, adv, mask, algorithm):
    """The clipped loss, token by token."""
    low, high = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}[algorithm]
    rows = []
    for i in range(len(logp)):
        logs = [float(logp[i, t] - old[i, t]) for t in range(logp.shape[1])]
        real = [v for v, m in zip(logs, mask[i].tolist()) if m]
        if algorithm == "gspo":
            logs = [sum(real) / len(real)] * len(logs)
        rows.append([])
        for v in logs:
            rho, a = math.exp(v), float(adv[i])
            rows[-1].append(-min(rho * a, max(1 - low, min(1 + high, rho)) * a))
    return torch.tensor(rows, dtype=D)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_policy_loss_against_plain_loops(algorithm):
    """Both signs of the advantage, ratios inside, below and above the clip range."""
    old = logits(1, 6, 5, scale=1.0)
    width = 1e-3 if algorithm == "gspo" else 0.4
    logp = old + logits(2, 6, 5, scale=width)
    adv = torch.tensor([1.5, -0.5, 2.0, -2.0, 0.0, 1.0], dtype=D)
    mask = torch.arange(5) < torch.tensor([5, 5, 3, 3, 2, 1])[:, None]
    loss = policy_loss(logp, old, adv, mask, algorithm)
    plain = plain_policy_loss(logp, old, adv, mask, algorithm)
    assert (loss - plain)[mask].abs().max() < 1e-12
    clipped = (loss + (logp - old).exp() * adv[:, None]).abs() > 1e-9
    assert clipped[mask & (adv > 0)[:, None]].any() and clipped[mask & (adv < 0)[:, None]].any()


@pytest.mark.parametrize(
    ("algorithm", "rho", "adv", "loss", "slope"),  # slope: d loss / d log p
    [
        ("grpo", 1.0, 2.0, -2.0, -2.0),
        ("grpo", 1.5, 2.0, -2.4, 0.0),
        ("grpo", 1.5, -2.0, 3.0, 3.0),
        ("grpo", 0.5, 2.0, -1.0, -1.0),
        ("grpo", 0.5, -2.0, 1.6, 0.0),
        ("grpo", 1.25, 1.0, -1.2, 0.0),
        ("dapo", 1.25, 1.0, -1.25, -1.25),
        ("dapo", 1.5, 1.0, -1.28, 0.0),
        ("dapo", 0.5, -1.0, 0.8, 0.0),
        ("gspo", 1.1, 1.0, -1.0004, 0.0),
        ("gspo", 0.9, -1.0, 0.9997, 0.0),
        ("gspo", 1.0001, 1.0, -1.0001, -1.0001),
    ],
)
def test_clipping_by_hand(algorithm, rho, adv, loss, slope):
    """Value and slope on both sides of both bounds: a clipped token does not move the policy."""
    old, mask = torch.full((1, 1), -1.0, dtype=D), torch.ones(1, 1, dtype=torch.bool)
    logp, adv = old + math.log(rho), torch.tensor([adv], dtype=D)
    args = (logp, old, adv, mask, algorithm)
    assert policy_loss(*args).item() == pytest.approx(loss, abs=1e-12)
    got = grad_of(lambda x: policy_loss(x, *args[1:]), logp).item()
    assert got == pytest.approx(slope, abs=1e-12)


def test_gspo_by_hand():
    """One ratio an answer, the geometric mean over its own tokens; padding has no say in it."""
    old = torch.tensor([[-1.0, -2.0, -3.0]], dtype=D)
    logp = old + torch.tensor([[1e-4, 3e-4, 9.0]], dtype=D)
    mask, adv = torch.tensor([[True, True, False]]), torch.tensor([2.0], dtype=D)
    loss = policy_loss(logp, old, adv, mask, "gspo")
    assert loss[0, :2].tolist() == pytest.approx([-2 * math.exp(2e-4)] * 2, abs=1e-15)
    slope = grad_of(lambda x: policy_loss(x, old, adv, mask, "gspo")[mask].mean(), logp)
    assert slope[0].tolist() == pytest.approx([-math.exp(2e-4)] * 2 + [0.0], abs=1e-12)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_first_update_is_the_plain_policy_gradient(algorithm):
    """Ratio 1: the loss is -A, its slope in log p is -A, whatever the form of clipping."""
    logp, adv = logits(3, 4, 6), torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=D)
    mask = torch.arange(6) < torch.tensor([[6], [4], [2], [1]])
    weights = mask / mask.sum(1, keepdim=True)
    loss = policy_loss(logp, logp, adv, mask, algorithm)
    assert torch.equal(loss, -adv[:, None].expand(4, 6))
    slope = grad_of(lambda x: policy_loss(x, logp, adv, mask, algorithm) * weights, logp)
    assert (slope + adv[:, None] * weights).abs().max() < 1e-12


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_policy_loss_and_kl_survive_huge_log_ratios(gap):
    """The log-ratio is clamped before exp: no infinity, no NaN, in value or slope."""
    old, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    adv = torch.tensor([1.0, -1.0])
    for function in (
        lambda x: policy_loss(x, old, adv, mask, "grpo"),
        lambda x: policy_loss(x, old, adv, mask, "gspo"),
        lambda x: kl_to_ref(x, old, old),
    ):
        assert function(old + gap).isfinite().all()
        assert grad_of(function, old + gap).isfinite().all()


# --------------------------------------------------------------------------------------------- KL
def test_kl_value_by_hand():
    """k3 at ratio 1: pi = 0.5 and ref = 0.25 give 0.5 - log 0.5 - 1; equal ones 0."""
    logp = torch.tensor([math.log(0.5)], dtype=D)
    value = kl_to_ref(logp, logp, logp - math.log(2))
    assert value.item() == pytest.approx(0.5 + math.log(2) - 1, abs=1e-15)
    assert kl_to_ref(logp, logp, logp).item() == 0
    twice = kl_to_ref(logp, logp - math.log(2), logp - math.log(2))
    assert twice.item() == pytest.approx(2 * value.item(), abs=1e-15)


@pytest.mark.parametrize("stale", [0.0, 0.7])
def test_kl_gradient_is_that_of_the_reverse_kl(stale):
    """Enumerated over 30 words, on and off policy: value KL(pi || ref), and its exact gradient."""
    z, r = logits(4, 30, scale=1.0), logits(5, 30, scale=1.0).log_softmax(-1)
    old = (z + stale * logits(6, 30, scale=1.0)).log_softmax(-1)

    def expected(z):
        logp = z.log_softmax(-1)
        return (old.exp() * kl_to_ref(logp, old, r)).sum()

    def exact(z):
        logp = z.log_softmax(-1)
        return (logp.exp() * (logp - r)).sum()

    assert expected(z).item() == pytest.approx(exact(z).item(), abs=1e-12)
    assert (grad_of(expected, z) - grad_of(exact, z)).abs().max() < 1e-12


def test_k3_alone_has_the_gradient_of_the_other_kl():
    """Why kl_to_ref carries a ratio: without it, the mean gradient is that of KL(ref || pi)."""
    z, r = logits(4, 30, scale=1.0), logits(5, 30, scale=1.0).log_softmax(-1)
    p = z.softmax(-1)

    def k3(z):
        d = r - z.log_softmax(-1)
        return p * (d.exp() - d - 1)

    def forward_kl(z):
        return r.exp() * (r - z.log_softmax(-1))

    def reverse_kl(z):
        logp = z.log_softmax(-1)
        return logp.exp() * (logp - r)

    assert (grad_of(k3, z) - grad_of(forward_kl, z)).abs().max() < 1e-12
    assert torch.cosine_similarity(grad_of(k3, z), grad_of(reverse_kl, z), 0) < 0.95


# -------------------------------------------------------------------------------------------- JSD
@few
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 45), st.floats(0.1, 30))
def test_jsd_equals_a_plain_implementation(seed, V, k, scale):
    """To 1e-12 in float64, from flat to very peaked, K from 1 to beyond V."""
    s, t = logits(seed, 3, V, scale=scale), logits(seed + 1, 3, V, scale=scale)
    value = topk_jsd(s, t, k)
    assert value.shape == (3,)
    assert value.tolist() == pytest.approx([plain_jsd(a, b, k) for a, b in zip(s, t)], abs=1e-12)


def test_jsd_takes_any_leading_shape():
    """[..., V] -> [...], row by row."""
    s, t = logits(1, 2, 3, 4, 20), logits(2, 2, 3, 4, 20)
    value = topk_jsd(s, t, 5)
    assert value.shape == (2, 3, 4)
    assert value[1, 2, 3] == topk_jsd(s[1, 2, 3], t[1, 2, 3], 5)
    assert topk_jsd(s[:0], t[:0], 5).shape == (0, 3, 4)


@few
@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(0.01, 3))
def test_jsd_grows_with_k_up_to_the_exact_one(seed, scale, eps):
    """A coarser view never sees more (data-processing inequality), and K >= V sees all."""
    s = logits(seed, 30, scale=scale)
    t = s + eps * logits(seed + 1, 30, scale=1.0)
    values = [topk_jsd(s, t, k).item() for k in (1, 2, 5, 10, 20, 29, 30, 31, 1000)]
    m = (s.softmax(-1) + t.softmax(-1)).log() - math.log(2)
    exact = sum(torch.nn.functional.kl_div(m, z.softmax(-1), reduction="sum") for z in (s, t)) / 2
    assert all(a <= b + 1e-14 for a, b in pairwise(values))
    assert values[-3:] == pytest.approx([exact.item()] * 3, abs=1e-13)
    assert max(values) <= exact + 1e-13


@few
@given(st.integers(0, 10**6), st.floats(0.1, 60), st.integers(1, 25), st.floats(-300, 300))
def test_jsd_is_symmetric_bounded_and_blind_to_a_shift(seed, scale, k, shift):
    """0 <= JSD <= ln 2, the same with the sides swapped, and logits matter up to a constant."""
    s, t = logits(seed, 20, scale=scale), logits(seed + 1, 20, scale=scale)
    value = topk_jsd(s, t, k).item()
    assert 0 <= value <= math.log(2) + 1e-15
    assert topk_jsd(t, s, k).item() == pytest.approx(value, abs=1e-15)
    assert topk_jsd(s + shift, t - shift, k).item() == pytest.approx(value, abs=1e-12)
    assert topk_jsd(s, s + shift, k).item() < 1e-15
    assert topk_jsd(s, s, k) == 0


@pytest.mark.parametrize("k", [1, 5, 20, 50])
def test_jsd_gradient_by_finite_differences(k):
    """The slope is attached by hand, so it is checked against the value itself."""
    s, t = logits(7, 3, 20), logits(8, 3, 20)
    assert torch.autograd.gradcheck(lambda z: topk_jsd(z, t, k), s.requires_grad_())


@few
@given(st.integers(0, 10**6), st.integers(1, 25), st.floats(0.1, 8))
def test_jsd_gradient_in_closed_form(seed, k, scale):
    """dD/dz = p / 2 (log(p / m) - KL(p || m)), with each word's bucket; it sums to 0."""
    s, t = logits(seed, 20, scale=scale), logits(seed + 1, 20, scale=scale)
    p, q = s.softmax(-1), t.softmax(-1)
    support = set(p.topk(min(k, 20)).indices.tolist()) | set(q.topk(min(k, 20)).indices.tolist())
    rest = [i for i in range(20) if i not in support]
    ratio = torch.zeros(20, dtype=D)
    for bucket in [[i] for i in support] + ([rest] if rest else []):
        ratio[bucket] = (p[bucket].sum() / (p[bucket].sum() + q[bucket].sum()) * 2).log()
    plain = p / 2 * (ratio - (p * ratio).sum())
    got = grad_of(lambda z: topk_jsd(z, t, k), s)
    assert (got - plain).abs().max() < 1e-12
    assert got.sum().abs() < 1e-15


def test_jsd_gradient_is_there_and_leads_to_the_teacher():
    """What detaching p but not m would lose: with that loss, nothing is learned from a hint."""
    s, t = logits(9, 50), logits(9, 50) + logits(10, 50, scale=0.5)
    hinted = s.argsort()[25].item()  # the hint makes a word likely that the student ranks low
    t[hinted] = s.max() + 2

    def authors(z):
        p, q = z.softmax(-1), t.softmax(-1)
        log_m = ((p + q) / 2).log()
        return (p.detach() * (p.log() - log_m) + q * (q.log() - log_m)) / 2

    assert grad_of(authors, s).abs().max() < 1e-15  # the pitfall: value right, gradient 0
    g = grad_of(lambda z: topk_jsd(z, t, 5), s)
    assert g.norm() > 1e-3
    assert g[hinted] == g.min() < 0 and g @ (t.softmax(-1) - s.softmax(-1)) < 0
    z, values = s.clone(), []
    for _ in range(2000):
        values.append(topk_jsd(z, t, 5).item())
        z -= 5 * grad_of(lambda z: topk_jsd(z, t, 5), z)
    assert values == sorted(values, reverse=True) and values[-1] < 0.02 * values[0]
    assert z.softmax(-1)[hinted].item() == pytest.approx(t.softmax(-1)[hinted].item(), abs=0.05)


def test_jsd_gradient_goes_to_the_student_alone():
    """Value is symmetric, so a swap of the sides shows only here."""
    s, t = logits(11, 20).requires_grad_(), logits(12, 20).requires_grad_()
    topk_jsd(s, t, 5).backward()
    assert t.grad is None and s.grad.norm() > 0
    swapped = grad_of(lambda z: topk_jsd(z, s, 5), t)
    assert (swapped - s.grad).abs().max() > 1e-3


def test_support_is_the_union():
    """A word that only the teacher ranks high is seen one by one; the student's Top-1 hides it."""
    s = torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0, 0.0], dtype=D)
    t = torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0, 9.0], dtype=D)
    g = grad_of(lambda z: topk_jsd(z, t, 1), s)
    assert g[5] < 0 < g[3] and g[3] == pytest.approx(g[4].item(), abs=1e-15)


@pytest.mark.parametrize(("gap", "norm"), [(5, 3.9e-2), (10, 1.5e-2), (20, 7.3e-7), (40, 1.1e-15)])
def test_jsd_saturates_on_disjoint_sides(gap, norm):
    """Two spikes, 1,000 words: a hint that is too surprising gives no signal (NUMERICS 4.3)."""
    s, t = torch.zeros(2, 1000, dtype=D)
    s[0], t[1] = gap, gap
    assert grad_of(lambda z: topk_jsd(z, t, 1000), s).norm().item() == pytest.approx(norm, rel=0.05)
    if gap >= 20:
        assert topk_jsd(s, t, 10).item() == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("eps", "relative"), [(0.1, 1e-4), (1e-2, 1e-4), (1e-3, 1e-3), (1e-4, 1e-2)]
)
def test_jsd_near_equality_in_float32(eps, relative):
    """Where sum p log p/m cancels, ours keeps its digits and never turns negative."""
    s = logits(13, 50, 1000, scale=3.0, dtype=torch.float32)
    t = s + eps * logits(14, 50, 1000, scale=1.0, dtype=torch.float32)
    exact, got = topk_jsd(s.double(), t.double(), 1000), topk_jsd(s, t, 1000)
    assert (got >= 0).all()
    assert ((got - exact).abs() / exact).median() < relative


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.019, 0.021, 0.1])
def test_js_buckets_joins_its_two_formulas(eps):
    """Series and closed form of a bucket agree around the switch, against float arithmetic."""
    for p in (0.3, 1e-9):
        q = p * (1 + eps)
        m = (p + q) / 2
        value, slope = ptdpo.js_buckets(torch.tensor(p, dtype=D), torch.tensor(q, dtype=D))
        series = m * sum((eps / (2 + eps)) ** n / (n * (n - 1)) for n in range(2, 40, 2))
        assert value.item() == pytest.approx(series, rel=1e-11)
        assert slope.item() == pytest.approx(math.log(p / m) / 2, rel=1e-9)


def test_no_nan_where_a_tail_rounds_to_zero():
    """NUMERICS 4.6: 1 - sum(p) is 0 in float32 here, and a plain tail gives NaN."""
    s, t = torch.tensor([30.0, 0.0, -1.0, -2.0]), torch.tensor([30.0, 1.0, -1.0, -2.0])
    for k in (1, 2, 3, 4):
        exact = topk_jsd(s.double(), t.double(), k).item()
        assert topk_jsd(s, t, k).item() == pytest.approx(exact, rel=1e-2, abs=1e-20)
        assert plain_jsd(s, t, k) == pytest.approx(exact, abs=1e-16)
        g, g64 = (grad_of(lambda z, t=t, k=k: topk_jsd(z, t.to(z), k), z) for z in (s, s.double()))
        assert g.isfinite().all() and (g - g64).abs().max() < 1e-15


def test_peaked_logits_stay_finite_in_float32():
    """200 peaked pairs over 2,000 words: value in range, gradient finite."""
    s, t = (logits(n, 200, 2000, scale=12.0, dtype=torch.float32) for n in (15, 16))
    value, g = topk_jsd(s, t, 2), grad_of(lambda z: topk_jsd(z, t, 2), s)
    assert ((value >= 0) & (value <= math.log(2) + 1e-6)).all() and g.isfinite().all()
    assert (value - topk_jsd(s.double(), t.double(), 2)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [([4], [4]), ([4, 5], []), ([], [0, 1]), ([0, 1, 2, 3, 4], []), ([0, 1, 2], [3, 4, 5])],
)
def test_masked_words(student, teacher, k, dtype):
    """-inf on one side or both: the plain value (0 log 0 = 0), and a finite gradient."""
    s, t = logits(17, 6, dtype=dtype), logits(18, 6, dtype=dtype)
    s[student], t[teacher] = -math.inf, -math.inf
    assert topk_jsd(s, t, k).item() == pytest.approx(plain_jsd(s, t, k), abs=1e-6)
    g = grad_of(lambda z: topk_jsd(z, t, k), s)
    assert g.isfinite().all() and (g[student] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype):
    """Softmax of 16-bit logits runs in float32: no noise floor, no negative values."""
    s = logits(19, 40, 500, dtype=dtype)
    t = (s.float() + 0.05 * logits(20, 40, 500, scale=1.0, dtype=torch.float32)).to(dtype)
    value = topk_jsd(s, t, 500)
    assert value.dtype == torch.float32
    assert torch.equal(value, topk_jsd(s.float(), t.float(), 500)) and (value >= 0).all()
    assert (topk_jsd(s, s, 10) == 0).all()
    assert (topk_jsd(s.float(), t, 500) == value).all()
    exact = topk_jsd(s.double(), t.double(), 500)
    assert ((value - exact).abs() / exact).max() < 1e-3


# ---------------------------------------------------------------------------- entropy, token_stats
def test_entropy_against_torch_distributions():
    """Value, uniform and one-hot ends, words that are masked out."""
    z = logits(21, 4, 5, 30)
    assert entropy(z).shape == (4, 5)
    assert (entropy(z) - torch.distributions.Categorical(logits=z).entropy()).abs().max() < 1e-12
    assert entropy(torch.zeros(8)).item() == pytest.approx(math.log(8), abs=1e-6)
    assert entropy(torch.tensor([0.0, -math.inf, -math.inf])).item() == 0
    assert entropy(torch.tensor([0.0, 0.0, -math.inf])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("taught", [0, 4, 9])
def test_token_stats_are_its_parts(temperature, taught):
    """Log-prob, entropy and JSD of each token, from logits made one by one."""
    hidden, weight, own = logits(22, 9, 8), logits(23, 30, 8), logits(24, 30, 8)
    teacher, targets = logits(25, 9, 8)[:taught], torch.arange(9) * 3
    logp, ent, jsd = token_stats(hidden, weight, targets, teacher, own, 5, temperature)
    for i in range(9):
        z = weight @ hidden[i] / temperature
        assert logp[i].item() == pytest.approx(math.log(z.softmax(-1)[targets[i]]), abs=1e-10)
        assert ent[i].item() == pytest.approx(entropy(z).item(), abs=1e-12)
        plain = plain_jsd(z, own @ teacher[i] / temperature, 5) if i < taught else 0
        assert jsd[i].item() == pytest.approx(plain, abs=1e-12)
    assert torch.equal(token_stats(hidden, weight, targets, temperature=temperature)[0], logp)
    assert (token_stats(hidden, weight, targets)[2] == 0).all()


def test_token_stats_send_gradient_to_the_student_alone():
    """hidden and head learn; the teacher's hidden states and head do not; entropy is a monitor."""
    hidden, weight, teacher, head = (
        logits(n, *shape).requires_grad_()
        for n, shape in ((26, (6, 8)), (27, (30, 8)), (28, (3, 8)), (29, (30, 8)))
    )
    logp, ent, jsd = token_stats(hidden, weight, torch.arange(6), teacher, head, 5)
    assert not ent.requires_grad
    (logp.sum() + jsd.sum()).backward()
    assert hidden.grad.norm() > 0 and weight.grad.norm() > 0
    assert teacher.grad is None and head.grad is None
