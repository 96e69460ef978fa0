"""The Hugging Face back end against transformers itself: tiny random models, offline."""

import json
import sys

import pytest
import tiny_qwen
import torch
from PIL import Image, ImageDraw

from ptdpo import Config, HFPolicy, UserError
from toy_tasks import Problem
from toy_tasks.hub import SOURCE_FILES, read_attention, save_hf
from toy_tasks.jsonl import PLACES

T, G = 9, 3


def load(folder, **changes):
    """A policy from a folder."""
    return HFPolicy(Config(model=str(folder), **changes))


def noise_picture(width, height, seed):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray(
        torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8).numpy()
    )


PROBLEMS = [  # one picture, two of different size, a short question, no picture
    Problem([noise_picture(112, 84, 1)], "How many dots?", "3"),
    Problem(
        [noise_picture(200, 90, 2), noise_picture(84, 150, 3)],
        "Which is larger, and by how much?",
        "1",
    ),
    Problem([noise_picture(64, 64, 4)], "?", "1"),
    Problem([], "Say yes.", "yes"),
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}
    for family in tiny_qwen.FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        made[family] = tiny_qwen.save(folder, family)
    return made


@pytest.fixture(scope="session", params=tiny_qwen.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def folder(family, folders):
    return folders[family]


@pytest.fixture(scope="session")
def policy(folder):
    return load(folder, train_vision=True)


@pytest.fixture(scope="session")
def plain_model(folder):
    """The oracle: transformers as its users run it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def prompts(policy):
    return [policy.encode(p) for p in PROBLEMS]


@pytest.fixture(scope="session")
def answers(policy, prompts):
    return policy.sample(prompts, uniforms(len(prompts) * G), 1.0)


def uniforms(n, seed=0, length=T):
    return torch.rand(n, length, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def log_probs(policy, hidden, ids):
    logits = hidden @ policy.head_weight.T
    logits[..., policy.suppress_ids] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def plain_inputs(policy, prompt, answer=()):
    """One prompt and one answer, as a row of its own without padding, for the plain model."""
    ids = torch.tensor([prompt.ids + list(answer)])
    kinds = (torch.arange(len(ids[0]))[None] < len(prompt.ids)) & (ids == policy.image_id)
    inputs = {"input_ids": ids, "mm_token_type_ids": kinds.long()}
    if prompt.grid is not None:
        inputs |= {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grid}
    return inputs


def plain_hidden(model, policy, prompt, answer):
    if prompt.grid is None:
        model.model.rope_deltas = None  # transformers remembers those of the last picture
    out = model.model(**plain_inputs(policy, prompt, answer.tolist()[:-1])).last_hidden_state
    return out[0, len(prompt.ids) - 1 :]


# ---------------------------------------------------------------- encoding


def test_no_torchvision():
    assert "torchvision" not in sys.modules


def test_encode_equals_the_real_processor(policy, folder, family):
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
    from transformers.models.qwen2_5_vl import processing_qwen2_5_vl
    from transformers.models.qwen2_vl import processing_qwen2_vl
    from transformers.models.qwen3_vl import processing_qwen3_vl

    base = {
        "qwen2_vl": processing_qwen2_vl.Qwen2VLProcessor,
        "qwen3_vl": processing_qwen3_vl.Qwen3VLProcessor,
        "qwen2_5_vl": processing_qwen2_5_vl.Qwen2_5_VLProcessor,
    }[family]

    class NoVideo(base):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, tokenizer, chat_template):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
            ids = tokenizer.convert_tokens_to_ids
            self.image_token_id, self.video_token_id = ids(self.image_token), ids(self.video_token)
            self.vision_start_token_id, self.vision_end_token_id = (
                ids("<|vision_start|>"),
                ids("<|vision_end|>"),
            )
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    real = NoVideo(
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        tiny_qwen.TEMPLATE,
    )
    for problem in PROBLEMS[:3]:
        content = [{"type": "image", "image": p} for p in problem.images] + [
            {"type": "text", "text": problem.question}
        ]
        expected = real.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        got = policy.encode(problem)
        assert got.ids == expected["input_ids"][0].tolist()
        assert torch.equal(got.pixels, expected["pixel_values"]) and torch.equal(
            got.grid, expected["image_grid_thw"]
        )


def test_teacher_sees_the_pixels_of_the_student(policy, prompts, monkeypatch):
    monkeypatch.setattr(
        policy.processor, "image_processor", None
    )  # would fail if it were asked again
    for problem, student in zip(PROBLEMS, prompts):
        teacher = policy.encode(problem, "Look closely at: centre.", like=student)
        assert teacher.pixels is student.pixels and teacher.grid is student.grid
        told = policy.processor.tokenizer.decode(teacher.ids)
        assert (
            "Look closely at: centre." in told
            and "Look" not in policy.processor.tokenizer.decode(student.ids)
        )
        assert told.replace(
            "\n\nLook closely at: centre.", ""
        ) == policy.processor.tokenizer.decode(student.ids)


def test_image_token_in_a_question_is_refused(policy):
    with pytest.raises(UserError, match="stands for a picture"):
        policy.encode(Problem([noise_picture(56, 56, 0)], "What is <|image_pad|>?", "1"))


def test_max_pixels(folder):
    small = load(folder, max_pixels=64 * 64)
    assert (
        small.encode(PROBLEMS[1]).grid.prod(1).max()
        < load(folder).encode(PROBLEMS[1]).grid.prod(1).max()
    )


# ---------------------------------------------------------------- sampling


def test_sampled_log_probs_equal_teacher_forced(policy, prompts):
    seen = []
    hook = policy.base.model.register_forward_hook(
        lambda m, i, out: seen.append(out.last_hidden_state[:, -1])
    )
    ids = policy.sample(prompts, uniforms(len(prompts) * G, 1), 1.0)
    hook.remove()
    sampled = torch.stack([seen[0].repeat_interleave(G, 0), *seen[1:]], 1)
    n = sampled.shape[1]
    with torch.no_grad():
        forced = policy.forward(prompts, ids)[0]
    assert n > T // 2
    difference = log_probs(policy, sampled, ids[:, :n]) - log_probs(
        policy, forced[:, :n], ids[:, :n]
    )
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    "which", [[0, 1, 2], [3]]
)  # generate cannot mix prompts with and without pictures
def test_sampling_equals_generate(policy, plain_model, prompts, which):
    inputs = [plain_inputs(policy, prompts[b]) for b in which]
    P = max(len(prompts[b].ids) for b in which)
    pad = lambda x: torch.cat([x.new_zeros(1, P - x.shape[1]), x], 1)
    batch = {k: torch.cat([pad(i[k]) for i in inputs]) for k in ("input_ids", "mm_token_type_ids")}
    batch["attention_mask"] = torch.cat([pad(torch.ones_like(i["input_ids"])) for i in inputs])
    if "pixel_values" in inputs[0]:
        batch |= {k: torch.cat([i[k] for i in inputs]) for k in ("pixel_values", "image_grid_thw")}
    out = plain_model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=T,
        suppress_tokens=policy.suppress_ids,
        return_dict_in_generate=True,
        output_scores=True,
    )
    some = [prompts[b] for b in which]
    ours = policy.sample(some, uniforms(len(which) * G), 0.0).view(len(which), G, T)
    assert (ours == ours[:, :1]).all()  # greedy: no difference within a group
    theirs = out.sequences[:, P:]
    n = theirs.shape[1]
    stop = torch.isin(ours[:, 0, :n], torch.tensor(policy.stop_ids))
    mask = stop.cumsum(1) - stop.long() == 0
    assert n == T and torch.equal(ours[:, 0, :n][mask], theirs[mask])
    with torch.no_grad():
        hidden = policy.forward(some, ours[:, 0])[0][:, :n]
    expected = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, theirs[..., None])[..., 0]
    assert (log_probs(policy, hidden, ours[:, 0, :n]) - expected)[mask].abs().max() < 1e-5


def test_inverse_cumulative_sampling(policy, prompts, answers):
    """Each token is the one whose slice of the cumulative distribution holds the uniform."""
    with torch.no_grad():
        logits = policy.forward(prompts, answers)[0] @ policy.head_weight.T
    logits[..., policy.suppress_ids] = -torch.inf
    upper = logits.double().softmax(-1).cumsum(-1)
    stop = torch.isin(answers, torch.tensor(policy.stop_ids))
    mask, u = stop.cumsum(1) - stop.long() == 0, uniforms(len(answers))
    high = upper.gather(-1, answers[..., None])[..., 0]
    low = (upper - logits.double().softmax(-1)).gather(-1, answers[..., None])[..., 0]
    assert mask.sum() > len(answers) * T / 2
    assert ((u < high + 1e-5) & (u > low - 1e-5))[mask].all()
    # u = 0 takes the first token that has a probability, never a suppressed one
    policy.suppress_ids, kept = [*policy.suppress_ids, 0, 1], policy.suppress_ids
    first = policy.sample(prompts[:1], torch.zeros(1, 1, dtype=torch.double), 1.0)
    policy.suppress_ids = kept
    assert first.item() == 2


def test_stop_tokens_and_no_image_tokens(policy, prompts):
    kept = policy.stop_ids
    policy.stop_ids = list(range(100, 264))
    ids = policy.sample(prompts, uniforms(len(prompts) * 8, 3), 1.0)
    policy.stop_ids = kept
    ended = ids >= 100
    assert ended.any() and not ended.all()
    for row, end in zip(ids, ended.int().argmax(1)):
        if (row >= 100).any():
            assert (row[end + 1 :] == 100).all() and (row[:end] < 100).all()
    wild = policy.sample(
        prompts, uniforms(len(prompts) * 64, 4), 1e4
    )  # nearly uniform over the vocabulary
    assert (
        not torch.isin(wild, torch.tensor(policy.suppress_ids)).any() and len(wild.unique()) > 240
    )
    assert kept == [258, 256]


def test_sampling_in_parts_and_order_of_prompts(policy, prompts, answers):
    u = uniforms(len(prompts) * G)
    policy.sample_batch, kept = G, policy.sample_batch
    parts = policy.sample(prompts, u, 1.0)
    policy.sample_batch = kept
    turned = policy.sample(prompts[::-1], u.view(-1, G, T).flip(0).view(-1, T), 1.0)
    assert torch.equal(parts, answers) and torch.equal(
        turned.view(-1, G, T).flip(0).view(-1, T), answers
    )


# ---------------------------------------------------------------- teacher-forced pass


def test_packed_row_equals_one_row_per_sample(policy, plain_model, prompts, answers):
    """Hidden states, gradients of every parameter: the plain model, answer by answer."""
    probe = torch.randn(len(answers), T, 64, generator=torch.Generator().manual_seed(1))
    hidden, looks = policy.forward(prompts, answers)
    expected = torch.stack(
        [plain_hidden(plain_model, policy, prompts[n // G], a) for n, a in enumerate(answers)]
    )
    assert looks is None and hidden.dtype == torch.float32
    assert (hidden - expected).abs().max() < 1e-5
    for model, h in ((policy, hidden), (plain_model, expected)):
        model.zero_grad()
        (h * probe).mean().backward()
    pairs = list(zip(policy.model.named_parameters(), plain_model.named_parameters()))
    for (name, ours), (other, theirs) in pairs:
        assert name == other
        if theirs.grad is None:  # a head of its own
            assert ours.grad is None and "lm_head" in name
        else:
            assert (ours.grad - theirs.grad).abs().max() < 1e-5 * max(1, theirs.grad.abs().max()), (
                name
            )
    assert sum(p.grad is not None and p.grad.abs().sum() > 0 for (_, p), _ in pairs) > 50


def test_left_padding_changes_nothing(policy, prompts, answers):
    with torch.no_grad():
        mask = torch.ones_like(answers)
        together, looks = policy.forward(prompts, answers, mask, [1])
        for b, prompt in enumerate(prompts[:3]):
            rows = slice(b * G, b * G + G)
            alone, look = policy.forward([prompt], answers[rows], mask[rows], [1])
            assert (together[rows] - alone).abs().max() < 1e-5
            R = len(policy.region_names(prompt))
            assert (looks[:, rows, :R] - look).abs().max() < 1e-6 and (
                looks[:, rows, R:] == 0
            ).all()


def test_answers_of_one_token(policy, plain_model, prompts, answers):
    with torch.no_grad():
        hidden, looks = policy.forward(prompts, answers[:, :1], torch.ones(len(answers), 1), [0])
        expected = plain_hidden(plain_model, policy, prompts[1], answers[G, :1])
    assert hidden.shape == (len(answers), 1, 64) and looks.shape == (1, len(answers), 18)
    assert (hidden[G] - expected).abs().max() < 1e-5


def test_columns_behind_the_longest_answer_cost_nothing(policy, prompts, answers):
    """Five columns more: hidden states are 0 there, the same before, in a row no longer."""
    rows, stop = [], torch.full((len(answers), 5), policy.stop_ids[0])
    hook = policy.base.model.register_forward_hook(lambda m, i, out: rows.append(out[0].shape[1]))
    with torch.no_grad():
        mask = torch.ones_like(answers)
        short, looks = policy.forward(prompts, answers, mask, [0])
        wide = torch.cat([answers, stop], 1)
        long, same = policy.forward(prompts, wide, torch.cat([mask, 0 * stop], 1), [0])
    hook.remove()
    assert rows[1] - rows[0] <= G  # at most the column of an end that did not fit before
    assert (long[:, :T] - short).abs().max() < 1e-5 and (long[:, T + 1 :] == 0).all()
    assert torch.allclose(looks, same, atol=1e-6)


def test_samples_of_a_group_do_not_see_each_other(policy, prompts, answers):
    other = answers.clone()
    other[1] = (other[1] + 1) % 250
    with torch.no_grad():
        a, b = policy.forward(prompts, answers)[0], policy.forward(prompts, other)[0]
    assert (a[0] - b[0]).abs().max() < 1e-6 and (a[2:] - b[2:]).abs().max() < 1e-6
    assert (a[1, 1:] - b[1, 1:]).abs().max() > 1e-2 and (a[1, 0] - b[1, 0]).abs().max() < 1e-6


def test_probe_equals_eager_attention(policy, plain_model, prompts, answers):
    mask = torch.rand(answers.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 0] = True
    layers = [2, 0]
    with torch.no_grad():
        before = policy.forward(prompts, answers)[0]
        hidden, looks = policy.forward(prompts, answers, mask, layers)
        assert torch.equal(before, hidden)  # looking changes nothing
        plain_model.set_attn_implementation({"text_config": "eager"})
        for n, answer in enumerate(answers[: 3 * G]):
            prompt = prompts[n // G]
            inputs = plain_inputs(policy, prompt, answer.tolist()[:-1])
            maps = plain_model.model(**inputs, output_attentions=True).attentions
            assert len(maps) == policy.num_layers
            for k, layer in enumerate(layers):
                rows = maps[layer][0].mean(0)[
                    len(prompt.ids) - 1 :
                ]  # the rows that predict the answer
                mean = rows[mask[n]].mean(0)[: len(prompt.ids)]
                expected = average_by_hand(
                    mean[torch.tensor(prompt.ids) == policy.image_id], prompt.grid // 2
                )
                assert (looks[k, n, : len(expected)] - expected).abs().max() < 1e-6
        plain_model.set_attn_implementation({"text_config": "sdpa"})
    assert looks[:, : 3 * G].amax(-1).min() > 1e-4 and (looks[:, 3 * G :] == 0).all()


def average_by_hand(values, grid):
    """Mean over the tokens whose centre lies in each ninth of each picture."""
    out = []
    for _, h, w in grid.tolist():
        cells, values = values[: h * w].view(h, w), values[h * w :]
        for r in range(3):
            for c in range(3):
                inside = [
                    cells[i, j]
                    for i in range(h)
                    for j in range(w)
                    if r / 3 <= (i + 0.5) / h < (r + 1) / 3 and c / 3 <= (j + 0.5) / w < (c + 1) / 3
                ]
                out.append(torch.stack(inside).mean() if inside else torch.zeros(()))
    return torch.stack(out)


def test_one_hot_attention_by_hand():
    """Two keys of the prompt, one of the answer; a huge score takes all attention."""
    q = torch.tensor([[[[100.0, 0.0]], [[0.0, 100.0]]]])  # two heads share the keys
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]])
    looks = read_attention(q, k, torch.ones(1, 1, 1, 3, dtype=torch.bool), torch.ones(1, 1), 1.0)
    assert torch.allclose(looks, torch.tensor([[0.5, 0.5]]))


# ---------------------------------------------------------------- regions


@pytest.mark.parametrize("size", [(252, 252), (336, 252), (150, 340)])
def test_painted_patch_has_the_right_word(policy, size):
    """Paint one ninth: the image tokens that change are in the region of that name."""
    blank = Image.new("RGB", size, "black")
    for which in (0, 1):
        clean = policy.encode(Problem([blank, blank], "?", "1"))
        names = policy.region_names(clean)
        table = policy.regions([clean], len(clean.ids) - 1)[0]
        assert torch.allclose(table.sum(0), torch.ones(18))
        for i, place in enumerate(PLACES):
            painted = blank.copy()
            x, y = (i % 3 + 0.5) / 3 * size[0], (i // 3 + 0.5) / 3 * size[1]
            ImageDraw.Draw(painted).rectangle([x - 8, y - 8, x + 8, y + 8], fill="white")
            pictures = [painted, blank] if which == 0 else [blank, painted]
            changed = (
                (policy.encode(Problem(pictures, "?", "1")).pixels - clean.pixels).abs().sum(1)
            )
            tokens = changed.view(-1, policy.merge**2).sum(
                1
            )  # patches of a token follow each other
            columns = (torch.tensor(clean.ids[:-1]) == policy.image_id).nonzero()[:, 0]
            score = (table * torch.zeros(len(table)).index_put((columns,), tokens)[:, None]).sum(0)
            assert names[score.argmax()] == f"picture {which + 1}: {place}"
            assert score.max() > 0.9 * score.sum()


def test_names_of_one_picture_and_of_none(policy, prompts):
    assert policy.region_names(prompts[0]) == PLACES and policy.region_names(prompts[3]) == []
    assert len(set(policy.region_names(prompts[1]))) == 18


# ---------------------------------------------------------------- reference, adapters, precision


def test_reference_without_adapters(policy, prompts, answers):
    ref = policy.frozen_copy()
    assert not any(p.requires_grad for p in ref.parameters()) and any(
        p.requires_grad for p in policy.parameters()
    )
    with torch.no_grad():
        before = ref.forward(prompts, answers)[0]
        weight = policy.base.model.language_model.layers[0].mlp.up_proj.weight
        kept = weight.clone()
        weight.mul_(0.5)
        after, moved = ref.forward(prompts, answers)[0], policy.forward(prompts, answers)[0]
        weight.copy_(kept)
        assert torch.equal(before, after) and not torch.allclose(before, moved)
        assert torch.equal(before, policy.forward(prompts, answers)[0])


def test_lora_reference_is_the_base(folder, prompts, answers):
    plain, lora = load(folder), load(folder, lora=4)
    trained = [n for n, p in lora.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in n and "language_model" in n for n in trained)
    assert len(trained) == 2 * 7 * lora.num_layers
    ref = lora.frozen_copy()
    assert ref.model is lora.model
    with torch.no_grad():
        base = plain.forward(prompts, answers)[0]
        assert torch.equal(base, lora.forward(prompts, answers)[0])  # B starts at 0
        for p in lora.parameters():
            if p.requires_grad:
                p.add_(0.05)
        assert not torch.allclose(base, lora.forward(prompts, answers)[0])
        assert torch.equal(base, ref.forward(prompts, answers)[0])
        assert torch.equal(
            plain.sample(prompts, uniforms(12), 1.0), ref.sample(prompts, uniforms(12), 1.0)
        )
        assert not torch.equal(
            plain.sample(prompts, uniforms(12), 1.0), lora.sample(prompts, uniforms(12), 1.0)
        )
    hidden = lora.forward(prompts, answers)[
        0
    ]  # the reference may run between the pass and its gradient
    with torch.no_grad():
        ref.forward(prompts, answers)
    hidden.mean().backward()
    assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)
    assert lora.base.model.visual.dtype == torch.float32 and not lora.head_weight.requires_grad


def test_lora_keeps_adapters_in_float32_on_a_bfloat16_base(folder, prompts, answers):
    lora = load(folder, lora=4, dtype="bfloat16")
    kinds = {(".lora_" in n, p.dtype) for n, p in lora.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert lora.head_weight.dtype == torch.float32
    hidden = lora.forward(prompts, answers)[0]
    hidden.square().mean().backward()
    before = {n: p.detach().clone() for n, p in lora.named_parameters() if p.requires_grad}
    torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-6).step()
    moved = [(p != before[n]).float().mean() for n, p in lora.named_parameters() if "lora_B" in n]
    assert min(moved) > 0.9 and hidden.dtype == torch.float32


def test_bfloat16_computing_keeps_float32_weights(folder, prompts, answers):
    exact, policy = (
        load(folder, train_vision=True),
        load(folder, dtype="bfloat16", train_vision=True),
    )
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    ref = policy.frozen_copy()
    assert ref.base.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    mask = torch.ones_like(answers)
    hidden, looks = policy.forward(prompts, answers, mask, [0])
    with torch.no_grad():
        true, looks_true = exact.forward(prompts, answers, mask, [0])
        again, looks_again = ref.forward(prompts, answers, mask, [0])
        assert torch.equal(hidden, again) and torch.equal(
            looks, looks_again
        )  # KL is exactly 0 at step 0
        rough = (log_probs(policy, hidden, answers) - log_probs(exact, true, answers)).abs()
        assert 1e-5 < rough.mean() < 0.1 and (looks - looks_true).abs().max() < 0.02
        assert torch.equal(
            policy.sample(prompts, uniforms(12), 1.0), ref.sample(prompts, uniforms(12), 1.0)
        )
    hidden.mean().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in policy.parameters())


@pytest.mark.parametrize("rank", [0, 4])
def test_logits_of_sampling_are_float32(folder, prompts, rank):
    from torch.overrides import TorchFunctionMode

    kinds = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor)
                and out.dim() == 2
                and out.shape[-1] == 264
                and "matmul" in function.__name__
            ):
                kinds.append(out.dtype)
            return out

    policy = load(folder, lora=rank, dtype="bfloat16")
    with Watch():
        policy.sample(prompts, uniforms(len(prompts), length=2), 1.0)
    assert kinds == [torch.float32] * 2


def test_checkpointing_gives_the_same_gradients(folder, prompts, answers):
    grads = []
    for on in (False, True):
        policy = load(folder, checkpointing=on, train_vision=True)
        ids = policy.sample(prompts, uniforms(12), 1.0)
        calls = []
        layer = policy.base.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        hidden, _ = policy.forward(prompts, ids)
        hidden.square().mean().backward()
        assert len(calls) == 1 + on  # the layer was run again for the gradient
        assert torch.equal(policy.sample(prompts, uniforms(12), 1.0), ids)
        grads.append([p.grad for p in policy.parameters()])
    assert torch.equal(ids, answers)
    for a, b in zip(*grads):
        assert (a is None and b is None) or (a - b).abs().max() < 1e-6


def test_frozen_vision(folder, prompts, answers):
    policy = load(folder)
    policy.forward(prompts, answers)[0].mean().backward()
    got = {
        n.split(".")[2]: p.grad is not None
        for n, p in policy.named_parameters()
        if "lm_head" not in n
    }
    assert got == {"visual": False, "language_model": True}


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("rank", [0, 4])
def test_save_and_load(family, rank, tmp_path, prompts, answers):
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    source = tmp_path / "source"
    source.mkdir()
    tiny_qwen.save(source, family, dtype=torch.bfloat16)
    policy = load(source, lora=rank)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape)) if p.requires_grad else None
    out = tmp_path / "out"
    save_hf(policy, out)
    again = load(out)
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    assert {p.dtype for p in AutoModelForImageTextToText.from_pretrained(out).parameters()} == {
        torch.bfloat16
    }
    tied = again.base.config.tie_word_embeddings
    assert (again.head_weight is again.base.model.language_model.embed_tokens.weight) == tied
    for file in SOURCE_FILES:
        assert (source / file).exists() == (out / file).exists()
        assert (
            not (source / file).exists()
            or (source / file).read_bytes() == (out / file).read_bytes()
        )
    assert (
        AutoTokenizer.from_pretrained(out)("hi")["input_ids"]
        == policy.processor.tokenizer("hi")["input_ids"]
    )
    pixels = AutoImageProcessor.from_pretrained(out)(PROBLEMS[0].images, return_tensors="pt")[
        "pixel_values"
    ]
    assert torch.equal(pixels, prompts[0].pixels)
    with torch.no_grad():
        a, b = policy.forward(prompts, answers)[0], again.forward(prompts, answers)[0]
        start = load(source).forward(prompts, answers)[0]
    assert (
        (a - b).abs().mean() < 0.03 < 0.1 < (a - start).abs().mean()
    )  # bfloat16 rounding, and no more


def test_merging_is_exact_in_float32(folder, tmp_path, prompts, answers):
    policy = load(folder, lora=4)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape)) if p.requires_grad else None
        before = policy.forward(prompts, answers)[0]
        save_hf(policy, tmp_path)
        assert torch.equal(
            before, policy.forward(prompts, answers)[0]
        )  # saving leaves the policy alone
        assert (before - load(tmp_path).forward(prompts, answers)[0]).abs().max() < 1e-5


def test_what_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, reason in ((tmp_path, "not Qwen2-VL"), (tmp_path / "nothing", "give a folder")):
        with pytest.raises(UserError, match=reason) as error:
            load(name)
        assert "\n" not in str(error.value)
