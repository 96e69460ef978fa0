"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL folders in the layout of the hub, offline."""

import json
from pathlib import Path

import torch

from experiments.small_qwen import SPECIAL, TEMPLATE
from toy_tasks import Grade
from toy_tasks.free_text import FreeText

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOKEN = {mark: 256 + i for i, mark in enumerate(SPECIAL)}


def tokenizer():
    """Byte-level without merges: 256 bytes and the special tokens, so any text is a prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(mark, special=True) for mark in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=SPECIAL[1:2] + SPECIAL[3:],
        chat_template=TEMPLATE,
    )


def vision_settings(family, hidden):
    """A vision tower of two layers, 32 wide."""
    settings = {"depth": 2, "num_heads": 2}
    if family == "qwen2_vl":
        return settings | {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2, "patch_size": 14}
    settings |= {"hidden_size": 32, "out_hidden_size": hidden, "intermediate_size": 64}
    if family == "qwen2_5_vl":
        return settings | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    settings |= {"patch_size": 16, "num_position_embeddings": 64}
    return settings | {"deepstack_visual_indexes": [0, 1]}


def config(family, hidden=64, layers=3):
    """Settings of a model, as its config.json has them."""
    from transformers import AutoConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": 264,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": hidden // 32,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": TOKEN["<|im_end|>"],
        "pad_token_id": TOKEN["<|endoftext|>"],
    }
    if family == "qwen3_vl":
        text |= {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}}
    return AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision_settings(family, hidden),
        tie_word_embeddings=family != "qwen2_5_vl",
        image_token_id=TOKEN["<|image_pad|>"],
        video_token_id=TOKEN["<|video_pad|>"],
        vision_start_token_id=TOKEN["<|vision_start|>"],
        vision_end_token_id=TOKEN["<|vision_end|>"],
    )


def save(folder, family, dtype=torch.float32, seed=0, gain=4.0, **sizes):
    """A folder as `--model` takes it. `gain` makes weights large: heads and pictures matter."""
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
        "patch_size": 16 if qwen3 else 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3 if qwen3 else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5] * 3 if qwen3 else [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    }
    folder = Path(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}, indent=2))
    return folder


class Parity(FreeText):
    """Problems in turn, None for a counting scene. The sum of its bytes decides on an answer."""

    def __init__(self, max_tokens, problems):
        super().__init__(max_tokens)
        self.problems = problems

    def problem(self, split, seed, index):
        return self.problems[index % len(self.problems)] or super().problem(split, seed, index)

    def grade(self, problem, text, finished):
        solved = sum(text.encode()) % 3 == 0
        return Grade(float(solved), solved, None)
