"""Oracles of the vocabulary part of the loss: each quantity a second time, plainly, in float64."""

import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptdpo import DIVERGENCES, js_buckets, token_stats, topk_jsd

V = 2000
QWEN = 151_936  # the vocabulary that matters


def plain_divergence(p, q, name):
    """Textbook formulas on masses > 0."""
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum()
    return {"jsd": (kl(p, m) + kl(q, m)) / 2, "forward_kl": kl(q, p), "reverse_kl": kl(p, q)}[name]


def plain_stats(
    hidden, weight, targets, teacher, teacher_weight, k, temperature=1.0, suppress=(), name="jsd"
):
    """What token_stats must return, row by row: suppressed columns cut out, all by autograd."""
    keep = torch.tensor([v for v in range(len(weight)) if v not in suppress])
    logp = (hidden @ weight[keep].T / temperature).log_softmax(1)
    column = {v: i for i, v in enumerate(keep.tolist())}
    target = torch.tensor([column[v] for v in targets.tolist()])
    rows = []
    for i in range(len(teacher)):
        q = (teacher[i] @ teacher_weight[keep].T / temperature).softmax(0).detach()
        p, k_i = logp[i].exp(), min(k, len(keep))
        union = sorted({*p.topk(k_i).indices.tolist(), *q.topk(k_i).indices.tolist()})
        rest = sorted(set(range(len(keep))) - set(union))
        both = [torch.cat([x[union], x[rest].sum()[None]] if rest else [x[union]]) for x in (p, q)]
        rows.append(plain_divergence(*both, name))
    jsd = torch.stack(rows + [torch.zeros(()).double()] * (len(hidden) - len(teacher)))
    return logp[torch.arange(len(target)), target], -(logp.exp() * logp).sum(1), jsd


def case(N=11, F=7, V=V, H=16, dtype=torch.double, gap=1.0, scale=0.6):
    """Random student; a teacher off by `gap` in its hidden states and a little in its head."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.double)
    hidden, weight = draw(N, H), draw(V, H) * scale
    teacher, head = hidden[:F] + gap * draw(F, H), weight + 0.1 * gap * draw(V, H)
    targets = torch.randint(0, V, (N,), generator=g).clamp(11)  # tests suppress ids under 11
    tensors = [x.to(dtype) for x in (hidden, weight, teacher, head)]
    return *(x.requires_grad_() for x in tensors[:2]), targets, *tensors[2:]


def backward(stats, hidden, weight):
    """Gradients of an arbitrary weighting of logp and jsd, each token with weights of its own."""
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, len(hidden), generator=g, dtype=torch.double)
    loss = (a * stats[0]).sum() + (b * stats[2]).sum()
    return torch.autograd.grad(loss, [x for x in (hidden, weight) if x.requires_grad])


def logits_case(z, t):
    """token_stats inputs whose logits are exactly z and t: one-hot states, logits as the head."""
    eye = torch.eye(len(z), dtype=z.dtype)
    return eye, z.T.contiguous(), torch.zeros(len(z), dtype=torch.long), eye, t.T.contiguous()


def close(ours, theirs, tolerance):
    assert all(x.isfinite().all() for x in ours)
    worst = max((x - y).abs().max().item() for x, y in zip(ours, theirs))
    assert worst < tolerance, worst


# ----------------------------- token_stats against the definition


@pytest.mark.parametrize("suppress", [(), (0, 3, 10)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("k", [1, 5, 100, V])
def test_equals_the_plain_definition(k, temperature, suppress):
    """Values and gradients to 1e-10; 7 of 11 rows taught, neither divisible by the chunk of 4."""
    x = case()
    ours = token_stats(*x, k, temperature, chunk=4, suppress_ids=suppress)
    theirs = plain_stats(*x, k, temperature, suppress)
    close(ours, theirs, 1e-10)
    close(backward(ours, *x[:2]), backward(theirs, *x[:2]), 1e-10)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("k", [1, 5, 100, V])
def test_other_divergences_on_the_same_buckets(k, name):
    """forward_kl is KL(teacher || student), reverse_kl KL(student || teacher); topk_jsd too."""
    x = case()
    ours = token_stats(*x, k, chunk=4, divergence=name)
    theirs = plain_stats(*x, k, name=name)
    close(ours, theirs, 1e-10)
    close(backward(ours, *x[:2]), backward(theirs, *x[:2]), 1e-9)
    logits = x[0][:7] @ x[1].T, x[3] @ x[4].T
    close([topk_jsd(*logits, k, divergence=name)], [theirs[2][:7]], 1e-10)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 8.0])
def test_overlapping_and_disjoint_unions(gap):
    """Every id twice in the two Top-K lists (gap 0), some twice, none: repeated ids count once."""
    x = case(gap=gap)
    ours, theirs = token_stats(*x, 20, chunk=4), plain_stats(*x, 20)
    close(ours, theirs, 1e-10)
    close(backward(ours, *x[:2]), backward(theirs, *x[:2]), 1e-10)


def test_chunk_size_does_not_matter():
    """One token a chunk, uneven chunks, all at once: to 1e-12."""
    x = case()
    results = []
    for chunk in (256, 1, 3, 7):
        stats = token_stats(*x, 20, chunk=chunk)
        results.append([*stats, *backward(stats, *x[:2])])
        close(results[-1], results[0], 1e-12)


def test_rows_without_a_teacher():
    """Their jsd is exactly 0 and gives no gradient; no teacher at all is the case F = 0."""
    hidden, weight, targets, teacher, head = x = case()
    logp, entropy, jsd = token_stats(*x, 20, chunk=4)
    alone = token_stats(hidden, weight, targets, chunk=4)
    close((logp, entropy), alone, 1e-12)
    assert (jsd[7:] == 0).all() and (jsd[:7] > 0).all() and (alone[2] == 0).all()
    assert (torch.autograd.grad(jsd[7:].sum(), hidden)[0] == 0).all()
    empty = token_stats(hidden, weight, targets, teacher[:0], head, 20, chunk=4)
    close(empty, alone, 1e-12)


class Meter(TorchDispatchMode):
    """Counts the multiplications of matrix products and the size of the largest tensor made."""

    work = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.addmm_, torch.ops.aten.mm, torch.ops.aten.bmm):
            self.work += args[-2].numel() * args[-1].shape[-1]
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("F, products", [(0, 4), (6, 4.5), (12, 5)])
def test_work_and_memory(F, products):
    """Four products a row, a fifth if it is taught; nothing made exceeds two chunks of logits."""
    x = case(N=12, F=F, H=4)
    with Meter() as meter:
        backward(token_stats(*x, 5, chunk=3), *x[:2])
    assert meter.work == products * 12 * 4 * V
    assert meter.largest == 2 * 3 * V  # half of [N, V]; the weight's gradient has 4 V


def test_only_asked_gradients_are_made():
    """A frozen head (or frozen body) gets none, and the other's gradient is unchanged."""
    hidden, weight, *rest = case()
    full = backward(token_stats(hidden, weight, *rest, 5), hidden, weight)
    for frozen in (0, 1):
        pair = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, weight))]
        close(backward(token_stats(*pair, *rest, 5), *pair), [full[1 - frozen]], 1e-12)
    entropy = token_stats(hidden, weight, *rest, 5)[1]
    assert not entropy.requires_grad


def test_suppressed_ids_get_no_gradient():
    """Not even as the target, not even if their logit was the largest or K takes in all ids."""
    hidden, weight, targets, teacher, head = case()
    weight, targets = weight.detach(), targets.clone()
    weight[3] = 50 * hidden[0].detach()
    targets[1] = 3
    for k in (5, V):
        x = hidden, weight.requires_grad_(), targets, teacher, head
        stats = token_stats(*x, k, suppress_ids=[3])
        grads = backward(stats, hidden, weight)
        assert (grads[1][3] == 0).all() and all(x.isfinite().all() for x in (*stats, *grads))
        assert stats[0][1] < -1e29


def test_no_tokens():
    """An empty batch gives empty results with the graph attached."""
    hidden, weight, targets, teacher, head = case(N=0, F=0)
    stats = token_stats(hidden, weight, targets, teacher, head, 5)
    dh, dw = torch.autograd.grad(sum(x.sum() for x in (stats[0], stats[2])), (hidden, weight))
    assert all(len(x) == 0 for x in stats) and dh.shape == (0, 16) and (dw == 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name):
    """Against finite differences, with a temperature and a suppressed id."""
    hidden, weight, targets, teacher, head = case(N=3, F=2, V=30, H=4)
    stats = lambda h, w: token_stats(h, w, targets, teacher, head, 4, 0.7, 2, (1,), name)[::2]
    assert torch.autograd.gradcheck(stats, (hidden, weight))


def test_a_slope_that_dwarfs_the_others():
    """Forward KL of a student sure of one token: rest's slope is -1e26, yet the head's is right."""
    z, t = torch.zeros(2, 3, 50, dtype=torch.double)
    z[:, 7] = 60
    z.requires_grad_()
    x = torch.eye(3).double(), z.T, torch.zeros(3, dtype=torch.long), torch.eye(3).double(), t.T
    grads = [
        torch.autograd.grad(jsd.sum(), z)[0]
        for jsd in (token_stats(*x, 1, divergence="forward_kl")[2], topk_jsd(z, t, 1, "forward_kl"))
    ]
    close(grads[:1], grads[1:], 1e-12)
    assert grads[0][:, 7].min() > 0.9


def test_ties():
    """Which of the equal ids is kept is open; the value is finite and never above the exact JSD."""
    z = torch.randint(0, 3, (6, 300), generator=torch.Generator().manual_seed(0)).double()
    x = logits_case(z, z.roll(1, 1))
    exact = topk_jsd(z, z.roll(1, 1), 300)
    for k in (1, 7, 100, 300):
        jsd = token_stats(*x, k, chunk=4)[2]
        assert jsd.isfinite().all() and (jsd >= 0).all() and (jsd <= exact + 1e-14).all()


# ----------------------------- precision


def shapes(N=6):
    """Flat, middle and sharp tokens at the full vocabulary, and Zipf's law; float32 logits."""
    g = torch.Generator().manual_seed(0)
    yield from ((f"normal {s}", s * torch.randn(N, QWEN, generator=g)) for s in (3, 5, 8))
    rank = torch.stack([torch.randperm(QWEN, generator=g) for _ in range(N)])
    yield "zipf 1.3", 7 - 1.3 * (1 + rank).float().log()


@pytest.mark.parametrize("kind", ["noise", "tilt"])
def test_float32_at_full_vocabulary(kind):
    """Against float64 of the same float32 logits: JSD to 1e-4 down to 1e-8, and never negative."""
    g, worst, smallest = torch.Generator().manual_seed(1), 0, 1
    for _, z in shapes():
        for eps in (0.3, 3e-3, 5e-4, 1e-4):
            t = z + eps * torch.randn(z.shape, generator=g) if kind == "noise" else z * (1 + eps)
            logp, entropy, jsd = token_stats(*logits_case(z, t), 100)
            exact, full = topk_jsd(z.double(), t.double(), 100), z.double().log_softmax(1)
            assert (jsd >= 0).all() and (logp - full[:, 0]).abs().max() < 1e-5
            assert (entropy + (full.exp() * full).sum(1)).abs().max() < 1e-5
            visible = exact > 1e-8
            error = ((jsd - exact).abs() / exact)[visible]
            worst = max(worst, error.max().item() if visible.any() else 0)
            smallest = min(smallest, exact[visible].min().item() if visible.any() else 1)
    print(f"{kind}: worst relative error {worst:.1e} down to a JSD of {smallest:.1e}")
    assert worst < 1e-4 and smallest < 5e-8


@pytest.mark.parametrize("dtype, grad_bar", [(torch.float, 1e-5), (torch.bfloat16, 5e-3)])
def test_end_to_end_error(dtype, grad_bar):
    """Against float64 from the same hidden states: in bf16 only returned gradients are rounded."""
    x = case(N=4, F=4, V=QWEN, H=32, dtype=dtype, gap=0.1, scale=0.7)
    exact = [a.detach().double() if a.is_floating_point() else a for a in x]
    exact[:2] = [a.requires_grad_() for a in exact[:2]]
    ours, theirs = token_stats(*x, 100), token_stats(*exact, 100)
    assert all(a.dtype == torch.float for a in ours)
    grads, truth = backward(ours, *x[:2]), backward(theirs, *exact[:2])
    value = ((ours[2] - theirs[2]).abs() / theirs[2]).max().item()
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, truth))
    print(f"{dtype}: relative error of JSD {value:.1e}, of gradients {error:.1e}")
    assert value < 1e-4 and error < grad_bar and all(a.dtype == dtype for a in grads)


# ----------------------------- topk_jsd, the definition


def logits(N=50, V=300, scale=3.0, gap=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, noise = scale * torch.randn(2, N, V, generator=g, dtype=torch.double)
    return z, z + gap * noise


@pytest.mark.parametrize("k", [1, 5, 50, 300, 999])
def test_topk_jsd_equals_the_plain_definition(k):
    """Value and gradient to 1e-12."""
    z, t = logits(N=8)
    z.requires_grad_()
    eye = torch.eye(300).double()
    exact = plain_stats(z, eye, torch.zeros(8, dtype=torch.long), t, eye, k)[2]
    ours = topk_jsd(z, t, k)
    close([ours], [exact], 1e-12)
    close(torch.autograd.grad(ours.sum(), z), torch.autograd.grad(exact.sum(), z), 1e-12)
    assert topk_jsd(z.view(2, 4, 300), t.view(2, 4, 300), k).equal(ours.view(2, 4))


def test_topk_jsd_is_a_bound_that_tightens():
    """Non-decreasing in K, exact at K >= V, in [0, log 2], deaf to shifts, symmetric."""
    for scale in (1.0, 3.0, 12.0):
        z, t = logits(scale=scale)
        values = torch.stack([topk_jsd(z, t, k) for k in (1, 2, 5, 20, 100, 300, 301)])
        assert (values.diff(dim=0) >= -1e-14).all() and values[-1].equal(values[-2])
        assert (values >= 0).all() and (values <= math.log(2)).all()
        assert (topk_jsd(z, t, 5) - topk_jsd(t, z, 5)).abs().max() < 1e-15
        assert (topk_jsd(z, t, 5) - topk_jsd(z + 7, t - 3, 5)).abs().max() < 1e-13
        assert topk_jsd(z, z + 7, 5).max() < 1e-25


def test_gradient_is_true_and_leads_to_the_teacher():
    """p/2 (log p/m - KL(p||m)), rows sum to 0, not 0 itself; a step along it lowers the JSD."""
    z, t = logits()
    z.requires_grad_()
    (grad,) = torch.autograd.grad(topk_jsd(z, t, 300).sum(), z)
    p, q = z.softmax(1).detach(), t.softmax(1)
    log_ratio = (2 * p / (p + q)).log()
    close([grad], [p / 2 * (log_ratio - (p * log_ratio).sum(1, keepdim=True))], 1e-15)
    for k in (1, 10, 300):
        value = topk_jsd(z, t, k)
        (grad,) = torch.autograd.grad(value.sum(), z)
        assert (grad.abs().amax(1) > 1e-5).all() and grad.sum(1).abs().max() < 1e-15
        assert (topk_jsd(z - 0.1 * grad, t, k) < value).all()


def test_a_swap_of_student_and_teacher_shows_in_the_gradient():
    """The value is symmetric and cannot tell; the gradient goes to the first, and differs."""
    z, t = (x.requires_grad_() for x in logits())
    value = topk_jsd(z, t, 10)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(value.sum(), t, retain_graph=True)
    (there,) = torch.autograd.grad(value.sum(), z)
    (back,) = torch.autograd.grad(topk_jsd(t, z, 10).sum(), t)
    assert (there - back).abs().max() > 1e-2


def test_a_hinted_token_outside_the_students_top_k_counts():
    """The teacher puts half its mass on one unlikely token: nearly all of the exact JSD is seen."""
    z, _ = logits(V=5000, scale=3.0)
    t = z.scatter(1, z.topk(1000).indices[:, -1:], z.logsumexp(1, keepdim=True))
    assert (topk_jsd(z, t, 10) / topk_jsd(z, t, 5000)).min() > 0.95


@pytest.mark.parametrize(
    "gap, jsd_grad, kl_grad",
    [(5, 0.039, 0.182), (10, 0.015, 1.35), (20, 7.3e-7, 1.414), (40, 1.1e-15, 1.414)],
)
def test_saturation(gap, jsd_grad, kl_grad):
    """Two spikes: a hint that surprises too much gives no JSD gradient; forward KL still pulls."""
    z, t = torch.zeros(2, 1, 1000, dtype=torch.double)
    z[0, 0] = t[0, 1] = gap
    z.requires_grad_()
    for name, size in (("jsd", jsd_grad), ("forward_kl", kl_grad)):
        (grad,) = torch.autograd.grad(topk_jsd(z, t, 1000, name).sum(), z)
        assert grad.norm().item() == pytest.approx(size, rel=0.05)


def test_infinite_and_peaked_logits_stay_finite():
    """-inf logits, tails that underflow, disjoint spikes: value and gradient, in any dtype."""
    inf = float("inf")
    cases = [
        ([30.0, 0, -1, -2], [30.0, 1, -1, -2]),
        ([0.0, 1, -inf, 2], [1.0, -inf, -inf, 0]),
        ([0.0, -inf, -inf, -inf], [-inf, 0.0, -inf, -inf]),
        ([0.0, -500, -9, 1], [-500.0, 0, 2, -9]),
    ]
    dtypes = torch.float, torch.double, torch.bfloat16
    for (z, t), dtype, k, name in product(cases, dtypes, (1, 2, 3, 4), DIVERGENCES):
        a, b = torch.tensor([z], dtype=dtype).requires_grad_(), torch.tensor([t], dtype=dtype)
        value = topk_jsd(a, b, k, name)
        (grad,) = torch.autograd.grad(value.sum(), a)
        assert value.isfinite() and value >= 0 and grad.isfinite().all(), (z, t, k, name)
    z, t = logits(N=200, V=V, scale=12.0)
    z, t = z.float().requires_grad_(), t.float()
    for stats in (topk_jsd(z, t, 2), token_stats(*logits_case(z, t), 2)[2]):
        (grad,) = torch.autograd.grad(stats.sum(), z)
        assert stats.isfinite().all() and (stats >= 0).all() and grad.isfinite().all()


def test_js_buckets_corners():
    """Empty buckets and one-sided buckets: value 0 and p log 2 / 2, both slopes finite."""
    p, q = torch.tensor([[0.0, 0.5, 0.0, 1e-40], [0.0, 0.0, 0.5, 0.0]])
    value, slope = js_buckets(p, q)
    half = 0.5 * math.log(2) / 2
    assert torch.allclose(value, torch.tensor([0, half, half, 0])) and slope.isfinite().all()
