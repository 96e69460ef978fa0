"""HFPolicy against transformers itself: tiny random models of the three families, offline."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_qwen
import torch
from helpers import close, gradient, make_batch
from PIL import Image, ImageDraw
from test_step import textbook
from torch.overrides import TorchFunctionMode

import ptdpo
from toy_tasks import Problem, UserError
from toy_tasks.free_text import PLACES

T = 9  # tokens of an answer
G = 3  # answers to a prompt
V = 264  # words


def picture(width, height, seed):
    stream = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=stream, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PROBLEMS = [
    Problem([picture(112, 84, 1)], "How many dots?", "3"),
    Problem([picture(200, 90, 2), picture(84, 150, 3)], "Is <image> larger than <image>?", "no"),
    Problem([picture(64, 64, 4)], "?", "1"),
    Problem([], "Say yes.", "yes"),
]
PICTURE = "<|vision_start|>{}<|vision_end|>"
QUESTIONS = [  # as the model reads them: a picture that is not marked comes first
    f"{PICTURE}How many dots?",
    f"Is {PICTURE} larger than {PICTURE}?",
    f"{PICTURE}?",
    "Say yes.",
]


def load(folder, **changes):
    return ptdpo.HFPolicy(ptdpo.Config(model=str(folder), **changes))


def uniforms(n, seed=0, length=T):
    return torch.rand(n, length, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=tiny_qwen.FAMILIES)
def folder(request, tmp_path_factory):
    return tiny_qwen.save(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def policy(folder):
    return load(folder, train_vision=True)  # tests leave it as it was


@pytest.fixture(scope="module")
def plain(folder):
    """The oracle: transformers as its users run it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.encode(problem) for problem in PROBLEMS]


@pytest.fixture(scope="module")
def answers(policy, prompts):
    return policy.sample(prompts, uniforms(4 * G), False)


def forward(policy, prompts, answers):
    """Hidden states of all columns."""
    return policy.forward(prompts, answers, torch.ones_like(answers))[0]


def mask_of(policy, answers):
    """Tokens up to the first that ends an answer, which is included."""
    stop = torch.isin(answers, torch.tensor(policy.stop_ids))
    return stop.cumsum(1) - stop.long() == 0


def each_alone(plain, policy, prompts, answers, **more):
    """One prompt and one answer in a row of its own, without padding: what transformers says."""
    for n, answer in enumerate(answers.tolist()):
        prompt = prompts[n * len(prompts) // len(answers)]
        ids = torch.tensor([[*prompt.ids, *answer[:-1]]])
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == policy.image_id).long()}
        plain.model.rope_deltas = None  # transformers remembers those of the last picture
        yield prompt, plain(**inputs, **prompt.pictures, output_hidden_states=True, **more)


def expected_hidden(plain, policy, prompts, answers):
    """Hidden states that predict the answers [N, T, H]."""
    rows = each_alone(plain, policy, prompts, answers)
    return torch.stack([out.hidden_states[-1][0, len(prompt.ids) - 1 :] for prompt, out in rows])


def allowed_logits(policy, hidden):
    """Logits in which no word is likely that may not be said."""
    logits = hidden @ policy.head_weight.T
    logits[..., policy.suppress_ids] = -torch.inf
    return logits


# --------------------------------------------------------------------------------------- encoding
def test_prompts(folder, policy, prompts):
    """Ids, pixels and grids, of the files of the hub alone; nothing needs torchvision."""
    from transformers import AutoImageProcessor, AutoTokenizer

    pixels = AutoImageProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for problem, question, prompt in zip(PROBLEMS, QUESTIONS, prompts):
        counts = []
        if problem.images:
            expected = pixels(images=problem.images, return_tensors="pt")
            assert prompt.pictures.keys() == expected.keys()
            assert all(torch.equal(prompt.pictures[name], expected[name]) for name in expected)
            # Two patches by two are a token.
            counts = (expected["image_grid_thw"].prod(1) // 4).tolist()
        text = question.format(*("<|image_pad|>" * count for count in counts))
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert prompt.ids.tolist() == tokenizer(chat)["input_ids"]
    assert not prompt.pictures
    assert policy.region_names(prompts[0]) == PLACES and policy.region_names(prompt) == []
    assert "torchvision" not in sys.modules
    for question in ("<image> and <image>?", "<|image_pad|>?"):
        with pytest.raises(UserError, match="1 pictures, 2 places"):
            policy.encode(Problem(PROBLEMS[0].images, question, "1"))


def test_the_teacher_sees_the_pixels_of_the_student(policy, prompts, monkeypatch):
    """A hinted prompt shares the tensors, and differs by the hint alone."""
    monkeypatch.setattr(policy.processor, "image_processor", None)  # would fail if asked again
    hint = "\n\nLook closely at: centre."
    for problem, student in zip(PROBLEMS, prompts):
        teacher = policy.encode(problem, hint.strip(), student)
        assert teacher.pictures.keys() == student.pictures.keys()
        assert all(teacher.pictures[name] is student.pictures[name] for name in student.pictures)
        text = policy.processor.tokenizer.decode(teacher.ids)
        assert text.count(hint) == 1
        assert text.replace(hint, "") == policy.processor.tokenizer.decode(student.ids)


def test_max_pixels(folder, policy):
    """It is obeyed, also below the processor's own minimum; 0 stands for never shrink."""
    large = Problem([picture(1400, 1300, 0)], "?", "1")
    small = Problem([picture(40, 40, 0)], "?", "1")

    def pixels(problem, limit):
        grid = load(folder, max_pixels=limit).encode(problem).pictures["image_grid_thw"]
        patches = grid.prod()
        return int(patches) * policy.processor.image_processor.patch_size**2

    assert 1000 < pixels(large, 56 * 56 - 1) < 56 * 56
    assert 30_000 < pixels(large, 40_000) <= 40_000
    assert pixels(small, 2_000) <= 2_000
    assert pixels(large, 0) == pytest.approx(1400 * 1300, rel=0.05)


@pytest.mark.parametrize("size", [(252, 252), (336, 252), (150, 340)])
def test_painted_places(policy, size):
    """Paint one ninth of a picture: attention to the tokens that change is in that region."""
    blank = Image.new("RGB", size)
    clean = policy.encode(Problem([blank, blank], "?", "1"))
    names = policy.region_names(clean)
    assert names == [f"picture {i}: {place}" for i in (1, 2) for place in PLACES]
    columns = clean.ids[:-1] == policy.image_id
    assert torch.allclose(policy.by_region(clean, [columns.float()[None]]), torch.ones(18))
    for region in range(18):
        pictures = [blank.copy(), blank.copy()]
        x = (region % 3 + 0.5) / 3 * size[0]
        y = (region % 9 // 3 + 0.5) / 3 * size[1]
        pen = ImageDraw.Draw(pictures[region // 9])
        pen.rectangle([x - 8, y - 8, x + 8, y + 8], fill="white")
        painted = policy.encode(Problem(pictures, "?", "1"))
        change = painted.pictures["pixel_values"] - clean.pictures["pixel_values"]
        # The patches of a token follow each other.
        weights = change.abs().sum(1).view(-1, policy.merge**2).sum(1)
        attention = torch.zeros(len(columns)).masked_scatter(columns, weights)
        found = policy.by_region(clean, [attention[None]]).flatten()
        assert found.argmax() == region and found.max() > 0.8 * found.sum(), names[region]


# --------------------------------------------------------------------------------------- sampling
def test_answers_follow_the_distribution(policy, plain, prompts, answers):
    """Greedy: the likeliest word. Sampled: the first whose cumulative probability exceeds u."""
    u = uniforms(4 * G)
    greedy = policy.sample(prompts, u, True)
    assert torch.equal(greedy[::G].repeat_interleave(G, 0), greedy)
    for ids in (greedy, answers):
        mask = mask_of(policy, ids)
        assert mask.sum() > len(ids) * T / 2
        with torch.no_grad():
            hidden = expected_hidden(plain, policy, prompts, ids)
        p = allowed_logits(policy, hidden).double().softmax(-1)
        chosen = p.gather(-1, ids[..., None])[..., 0]
        upper = p.cumsum(-1).gather(-1, ids[..., None])[..., 0]
        if ids is greedy:
            assert (chosen > p.amax(-1) - 1e-6)[mask].all()
        else:
            assert ((u < upper + 1e-5) & (u > upper - chosen - 1e-5))[mask].all()


def test_ends_and_words_that_may_not_be_said(policy, prompts, monkeypatch):
    """Padding follows an end; pictures are never said, not even where u is 0, and at random."""
    assert policy.stop_ids == [258, 256] and policy.suppress_ids == [262, 263]
    many = policy.sample(prompts, uniforms(4 * 300, 4), False)
    assert not torch.isin(many, torch.tensor(policy.suppress_ids)).any()
    assert len(many.unique()) == V - 2
    monkeypatch.setattr(policy, "suppress_ids", [262, 263, 0, 1])
    assert policy.sample(prompts[:1], torch.zeros(1, 1, dtype=torch.double), False).item() == 2
    monkeypatch.setattr(policy, "stop_ids", list(range(100, V)))
    ids = policy.sample(prompts, uniforms(32, 3), False)
    behind = (ids >= 100).cumsum(1) - (ids >= 100).long() > 0
    assert behind.any() and (ids[behind] == 100).all()


def test_parts_and_the_order_of_prompts_change_nothing(policy, prompts, answers, monkeypatch):
    """Batches of one prompt, and prompts from the last to the first."""
    u = uniforms(4 * G)
    turned = policy.sample(prompts[::-1], u.view(4, G, T).flip(0).view(-1, T), False)
    assert torch.equal(turned.view(4, G, T).flip(0).view(-1, T), answers)
    monkeypatch.setattr(policy, "config", replace(policy.config, sample_batch=G))
    assert torch.equal(policy.sample(prompts, u, False), answers)


# ----------------------------------------------------------------------------------- forward pass
def test_packed_row_equals_one_row_an_answer(policy, plain, prompts, answers):
    """Hidden states, log-probs and the gradients of all parameters."""
    hidden, attention = policy.forward(prompts, answers, torch.ones_like(answers))
    expected = expected_hidden(plain, policy, prompts, answers)
    assert attention == [] and hidden.dtype == torch.float32
    assert (hidden - expected).abs().max() < 1e-5
    mask = mask_of(policy, answers)
    groups = SimpleNamespace(completion=answers, mask=mask)
    logp = ptdpo.completion_logp(policy, hidden.detach(), groups)
    log_p = allowed_logits(policy, expected.detach()).log_softmax(-1)
    assert (logp - log_p.gather(-1, answers[..., None])[..., 0])[mask].abs().max() < 1e-5
    assert (logp[~mask] == 0).all()
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    theirs = dict(plain.named_parameters())
    for model, states in ((policy.model, hidden), (plain, expected)):
        model.zero_grad()
        (states * probe).mean().backward()
    for name, p in policy.model.named_parameters():
        if theirs[name].grad is None:  # a head of its own
            assert p.grad is None and "lm_head" in name
        else:
            gap = (p.grad - theirs[name].grad).abs().max()
            assert gap < 1e-5 * max(1, theirs[name].grad.abs().max()), name
    policy.zero_grad()


def test_columns_behind_the_longest_answer_cost_nothing(policy, prompts, answers):
    """The states before them stay, their own are 0, and the row is no longer."""
    mask = torch.ones_like(answers)
    padding = torch.full((4 * G, 5), policy.stop_ids[0])
    rows = []
    zeros = 0 * padding
    hook = policy.base.model.register_forward_hook(lambda m, i, out: rows.append(out[0].shape[1]))
    with torch.no_grad():
        first = forward(policy, prompts, answers[:, :1])
        short, looks = policy.forward(prompts, answers, mask, [1])
        wide = torch.cat([answers, padding], 1)
        long, same = policy.forward(prompts, wide, torch.cat([mask, zeros], 1), [1])
    hook.remove()
    assert (long[:, :T] - short).abs().max() < 1e-5 and (long[:, T:] == 0).all()
    assert torch.allclose(torch.cat(looks[:3], 2), torch.cat(same[:3], 2), atol=1e-6)
    assert torch.allclose(first, short[:, :1], atol=1e-5)
    assert rows[1] == rows[2]


def test_recorded_attention_equals_eager_attention(policy, plain, prompts, answers):
    """By layer, a mean over heads, over the tokens in mask and over the tokens of a region."""
    mask = torch.rand(answers.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 0] = True
    with torch.no_grad():
        before, _ = policy.forward(prompts, answers, mask)
        hidden, attention = policy.forward(prompts, answers, mask, [2, 0])
        plain.set_attn_implementation({"text_config": "eager"})
        rows = each_alone(plain, policy, prompts[:3], answers[: 3 * G], output_attentions=True)
        for n, (prompt, output) in enumerate(rows):
            for k, layer in enumerate((2, 0)):
                maps = output.attentions[layer][0].mean(0)[len(prompt.ids) - 1 :]
                to_prompt = maps[mask[n]].mean(0)[: len(prompt.ids) - 1]
                expected = policy.by_region(prompt, [to_prompt[None]]).flatten()
                assert (attention[n // G][k, n % G] - expected).abs().max() < 1e-6
        plain.set_attn_implementation({"text_config": "sdpa"})
    assert torch.equal(before, hidden)  # to look changes nothing
    assert min(looks.amax(-1).min() for looks in attention[:3]) > 1e-4
    assert attention[3].shape == (2, G, 0)  # no picture, no region


# ------------------------------------------------------------------------ what learns, what stays
def test_the_reference_is_a_frozen_copy(policy, prompts, answers):
    """It does not move with the policy, and does not learn."""
    ref = policy.frozen_copy()
    assert not any(p.requires_grad for p in ref.parameters())
    weight = policy.base.model.language_model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        before = forward(ref, prompts, answers)
        weight.mul_(0.5)
        moved = forward(policy, prompts, answers)
        after = forward(ref, prompts, answers)
        weight.mul_(2)
        assert torch.equal(before, forward(policy, prompts, answers))
    assert torch.equal(before, after) and not torch.allclose(before, moved)


def test_with_adapters_the_reference_is_the_model_without_them(folder, prompts, answers):
    """Alone they learn, in every layer; the reference may run between a pass and its gradient."""
    plain = load(folder)
    lora = load(folder, lora=4)
    ref = lora.frozen_copy()
    learned = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and "language_model" in name for name in learned)
    assert len(learned) == 2 * 7 * lora.num_layers and ref.model is lora.model
    with torch.no_grad():
        start = forward(plain, prompts, answers)
        assert torch.equal(start, forward(lora, prompts, answers))
        for p in learned.values():
            p.add_(0.05)
    hidden = forward(lora, prompts, answers)
    with torch.no_grad():
        assert torch.equal(start, forward(ref, prompts, answers))
    assert not torch.allclose(start, hidden)
    hidden.mean().backward()
    assert all(p.grad is not None for p in learned.values())
    first, second, third = (x.sample(prompts, uniforms(12), False) for x in (plain, ref, lora))
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointing_changes_nothing(folder, prompts, answers, rank):
    """Layers run again for the gradient, which is the same; sampling has its cache as before."""
    gradients = []
    for on in (False, True):
        policy = load(folder, checkpointing=on, lora=rank, train_vision=rank == 0)
        calls = []
        layer = policy.base.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        assert torch.equal(policy.sample(prompts, uniforms(12), False), answers)
        calls.clear()
        forward(policy, prompts, answers).square().mean().backward()
        assert len(calls) == 1 + on  # one row of all prompts
        gradients.append({n: p.grad for n, p in policy.named_parameters()})
    for name, first in gradients[0].items():
        assert (first is None) == (gradients[1][name] is None), name
        assert first is None or (first - gradients[1][name]).abs().max() < 1e-6, name


class Watch(TorchFunctionMode):
    """Notes what functions of torch are called: names, tensors that go in, and what comes out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if torch.is_tensor(x)]
        self.calls.append((function.__name__, [(tuple(x.shape), x.dtype) for x in tensors]))
        return result


@pytest.mark.parametrize("micro", [0, 1])
def test_update_of_a_mixed_batch_equals_autograd(folder, monkeypatch, micro):
    """Text-only and pictures; the tied head has the gradients of both its uses; no [N, V]."""
    sizes = {"prompts": 4, "group": G, "micro_batch": micro}
    config = ptdpo.Config(model=str(folder), kl_weight=0.5, train_vision=True, **sizes)
    policy = ptdpo.HFPolicy(config)
    ref = policy.frozen_copy()
    with torch.no_grad():
        policy.head_weight.mul_(3)  # the KL and the JSD are well above 0
    rollout, hints, batch = make_batch(policy, ref, tiny_qwen.Parity(T, PROBLEMS), config)
    assert batch.distill.any() and not batch.distill.all() and batch.advantages.any()
    loss, _ = textbook(policy, ref, rollout, hints, batch, config)
    expected = torch.autograd.grad(loss, policy.parameters())
    monkeypatch.setattr(ptdpo.head_backward, "__defaults__", (4,))
    with Watch() as watch:
        found, _, _ = gradient(policy, ref, batch, config)
    assert close(found, torch.cat([grad.flatten() for grad in expected]), 2e-5)
    tied = policy.head_weight is policy.base.model.get_input_embeddings().weight
    assert tied == (folder.name != "qwen2_5_vl")
    assert all(p.grad is None for p in policy.parameters())  # the rollout needs the memory
    shapes = [shape for _, tensors in watch.calls for shape, _ in tensors if V in shape]
    largest = max(math.prod(shape) for shape in shapes)
    assert largest == 64 * V < batch.mask.sum() * V  # the head itself, and no [N, V]


# ---------------------------------------------------------------------- what a GPU will ask for
class OnCPU(torch.autocast):
    """Autocast as on a GPU, which works on a CPU as well."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


@pytest.mark.parametrize("rank", [0, 4])
def test_precisions(folder, prompts, answers, monkeypatch, rank):
    """What learns is float32, products are bfloat16: queries, keys, values, also in the cache.

    Logits and gradients are float32; the reference is the policy, bit for bit.
    """
    narrow = torch.bfloat16
    plain_load = ptdpo.load_model
    monkeypatch.setattr(ptdpo, "load_model", lambda config, _: plain_load(config, narrow))
    monkeypatch.setattr(torch, "autocast", OnCPU)
    policy = load(folder, lora=rank)
    policy.dtype = narrow
    ref = policy.frozen_copy()
    for name, p in policy.named_parameters():
        assert p.dtype == (torch.float32 if rank == 0 or p.requires_grad else narrow), name
    cache = ptdpo.narrow_cache()
    monkeypatch.setattr(ptdpo, "narrow_cache", lambda: cache)
    mask = torch.ones_like(answers)
    with Watch() as watch:
        policy.sample(prompts, uniforms(4, length=5), False)
        hidden, looks = policy.forward(prompts, answers, mask, [0])
    hidden.square().mean().backward()
    with torch.no_grad():
        again, looks_again = ref.forward(prompts, answers, mask, [0])
    attended = set()
    logits = set()
    for name, tensors in watch.calls:
        if name == "scaled_dot_product_attention" and tensors[0][0][1] == 4:  # heads of the decoder
            attended |= {dtype for _, dtype in tensors[:3]}
        if name == "double":  # to be summed up
            logits.add(tensors[0])
    assert attended == {narrow} and logits == {((4, V), torch.float32)}
    assert {(x.keys.dtype, x.values.dtype) for x in cache.layers} == {(narrow, narrow)}
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert {x.dtype for x in (hidden, *looks, *gradients)} == {torch.float32}
    assert torch.equal(hidden, again)  # the KL begins at 0
    assert torch.equal(looks[0], looks_again[0])


def test_decoding_seldom_waits_for_the_gpu(policy, prompts, monkeypatch):
    """64 tokens more: at most 4 questions to the device, and nothing that is sent to it."""
    names = "tensor as_tensor from_numpy __bool__ __int__ item tolist nonzero cpu numpy".split()
    monkeypatch.setattr(policy, "stop_ids", [258])
    waits = []
    for length in (4, 68):
        with Watch() as watch:
            ids = policy.sample(prompts, uniforms(8, length=length), False)
        assert (ids[:, -1] != 258).any()  # not all answers have ended
        waits.append(sum(name in names for name, _ in watch.calls))
    assert sum(name == "embedding" for name, _ in watch.calls) >= 68  # the mode sees what is called
    assert waits[1] - waits[0] <= 64 / 16
