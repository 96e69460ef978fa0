"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL folders in the layout of the hub, offline."""

import json

import torch

from toy_tasks.small_qwen import SPECIAL, TEMPLATE

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PROCESSORS = dict(zip(FAMILIES, ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")))


def tokenizer():
    """Byte-level, no merges: 256 bytes and the specials, so any text is a prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tk = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    tk.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tk,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=SPECIAL[1:2] + SPECIAL[3:],
        chat_template=TEMPLATE,
    )


def vision(family, hidden):
    """Settings of a vision tower: two layers, 32 wide."""
    if family == "qwen2_vl":
        own = dict(embed_dim=32, hidden_size=hidden, mlp_ratio=2, patch_size=14)
    elif family == "qwen2_5_vl":
        own = dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
    else:
        own = dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    if family != "qwen2_vl":
        own |= dict(hidden_size=32, out_hidden_size=hidden, intermediate_size=64)
    return dict(depth=2, num_heads=2, **own)


def config(family, hidden=64, layers=3):
    """Settings of a model, as its config.json has them."""
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

    f = {s: 256 + i for i, s in enumerate(SPECIAL)}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {name: f[mark] for name, mark in zip(names, marks)}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = dict(vocab_size=264, hidden_size=hidden, intermediate_size=2 * hidden,
                num_hidden_layers=layers, num_attention_heads=hidden // 16,
                num_key_value_heads=hidden // 32, max_position_embeddings=4096,
                rope_parameters=rope, eos_token_id=f["<|im_end|>"],
                pad_token_id=f["<|endoftext|>"])  # fmt: skip
    if family == "qwen3_vl":
        text |= {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}}
    kinds = dict(zip(FAMILIES, (Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig)))
    tied = family != "qwen2_5_vl"
    return kinds[family](
        text_config=text, vision_config=vision(family, hidden), tie_word_embeddings=tied, **ids
    )


def save(folder, family, dtype=torch.float32, seed=0, gain=4.0, **sizes):
    """A folder as `--model` takes it. `gain` scales weights up: heads and pictures do matter."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config(family, **sizes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "language_model.layers" in name:
                p.mul_(gain)
            if p.dim() == 1:  # norms at 1 and biases at 0 would hide a forgotten one
                p.add_(0.1 * torch.randn_like(p))
    model.generation_config = GenerationConfig(eos_token_id=[258, 256], pad_token_id=256)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    qwen3 = family == "qwen3_vl"
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessorFast" if qwen3 else "Qwen2VLImageProcessor",
        "processor_class": PROCESSORS[family],
        "patch_size": 16 if qwen3 else 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3 if qwen3 else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5] * 3 if qwen3 else [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}, indent=2))
    return folder
