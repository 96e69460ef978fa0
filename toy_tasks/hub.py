"""Around --model: loading, attention in packed rows, --calibrate, and export (--save-hf)."""

import json
import math
import shutil

import torch
from safetensors import SafetensorError

import ptdpo
from toy_tasks.commands import runs_in
from toy_tasks.jsonl import PLACES


def load_model(config):
    """Processor, model on its device, and dtype of its passes; UserError if that fails."""
    gpu = torch.cuda.is_available()
    kind = {"auto": "bfloat16" if gpu else "float32"}.get(config.dtype, config.dtype)
    dtype = getattr(torch, kind)
    try:
        processor, model = open_model(config, dtype)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        mend = "pip install peft" if isinstance(error, ImportError) else "give a folder or hub name"
        reason = str(error).strip().splitlines()[0]
        raise ptdpo.UserError(f"--model {config.model}: {reason}; {mend}") from error
    return processor, model.to("cuda" if gpu else "cpu").eval(), dtype


def open_model(config, dtype):
    """Processor (without videos) and model; what learns is float32, all else `dtype`."""
    import transformers as hf

    class PictureProcessor(hf.ProcessorMixin):  # AutoProcessor needs torchvision, for videos
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    ours = ptdpo.HERE / config.model  # as with the toy's bases: wherever the command is given
    name = str(ours) if ours.exists() else config.model
    family = hf.AutoConfig.from_pretrained(name).model_type
    if family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        raise ValueError(f"{family} is not Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    processor = PictureProcessor.from_pretrained(name)
    if config.max_pixels:
        processor.image_processor.size["longest_edge"] = config.max_pixels
    dtype = dtype if config.lora else torch.float32
    model = hf.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    hf.AttentionInterface.register("packed", packed_attention)
    model.set_attn_implementation({"text_config": "packed"})
    if config.checkpointing:
        model.gradient_checkpointing_enable()
    model.model.visual.requires_grad_(config.train_vision)
    if config.lora:  # freezes all but the adapters
        model = with_adapters(model, config.lora)
    return processor, model


def packed_attention(
    module, query, key, value, seen, own=None, tokens=None, looks=(), scaling=None, **kw
):
    """Attention in a packed row: prompt (P) | T tokens of answer 1 | ... | T tokens of answer G.

    seen [B, 1, P, P]: prompt on itself; own [N, 1, T, P + T]: answers on the prompt and their past.
    Two calls, not one with a block mask: no [S, S] table, no work on pairs blind to each other.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend, P = ALL_ATTENTION_FUNCTIONS["sdpa"], seen.shape[-1]
    if own is None:  # sampling, where the cache is repeated instead
        return attend(module, query, key, value, seen, scaling=scaling, **kw)
    # Every answer becomes a row of its own, with the keys of its prompt put before its own.
    G, qkv = len(own) // len(query), (query, key, value)
    shared = [x[:, :, :P] for x in qkv]
    mine = [x[:, :, P:].unflatten(2, (G, -1)).transpose(1, 2).flatten(0, 1) for x in qkv]
    pairs = zip(shared[1:], mine[1:])
    k, v = (torch.cat([x.repeat_interleave(G, 0), y], 2) for x, y in pairs)  # [N, heads, P + T, D]
    if module.layer_idx in looks:
        looks[module.layer_idx] = read_attention(mine[0], k, own, tokens, scaling)
    prompt = attend(module, *shared, seen, scaling=scaling, **kw)[0]
    answer = attend(module, mine[0], k, v, own, scaling=scaling, **kw)[0]  # [N, T, heads, D]
    return torch.cat([prompt, answer.unflatten(0, (-1, G)).flatten(1, 2)], 1), None


@torch.no_grad()
def read_attention(q, k, own, mask, scale):
    """Attention of q on the prompt, mean of heads and of the places in mask: float32 [N, P]."""
    looks = []
    with torch.autocast(q.device.type, enabled=False):
        for q_n, k_n, seen, m in zip(q, k, own, mask.float()):  # one by one, to save memory
            heads = q_n.float().unflatten(0, (len(k_n), -1))  # those that share keys, together
            score = torch.einsum("khtd,ksd->khts", heads, k_n.float()) * scale
            weight = score.masked_fill(~seen, -math.inf).softmax(-1).mean((0, 1))
            looks.append(m @ weight / m.sum().clamp_min(1))
    return torch.stack(looks)[:, : -mask.shape[1]]


def with_adapters(model, rank):
    """Adapters in the layers of the language model; nothing else learns."""
    from peft import LoraConfig, get_peft_model

    layers = r".*language_model\.layers\..*_proj"
    with torch.random.fork_rng():  # the same adapters in every run and process
        torch.manual_seed(0)
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
        return get_peft_model(model, adapters)


# What --save-hf takes over unchanged: AutoProcessor and the tokenizer must find what they know.
SOURCE_FILES = """preprocessor_config.json video_preprocessor_config.json processor_config.json
    chat_template.json chat_template.jinja tokenizer.json tokenizer_config.json vocab.json
    merges.txt special_tokens_map.json added_tokens.json generation_config.json""".split()


def calibrate_layers(config, folder):
    """Rank the layers of a model by the recall of the regions that they attend to most."""
    if not config.model:
        raise ptdpo.UserError(
            "--calibrate: say of which --model; the toy's runs do it by themselves"
        )
    policy, task = ptdpo.setup(config)
    by_layer = ptdpo.calibrate(policy, task, config)
    chance = config.hint_regions / len(PLACES)
    best = sorted(range(len(by_layer)), key=lambda i: -by_layer[i])
    folder.mkdir(parents=True, exist_ok=True)
    found = {"model": config.model, "seed": config.seed, "hint_regions": config.hint_regions}
    found |= {"chance": chance, "layer_recall": by_layer, "best": best}
    ptdpo.write_whole(folder / "calibration.json", json.dumps(found, indent=1).encode())
    for layer in best:
        print(f"layer {layer:2}  recall {by_layer[layer]:.3f}")
    print(f"random regions: {chance:.3f}. Written: {folder}/calibration.json")


def save_run(run, folder):
    """--save-hf: the model of a run as a folder that transformers loads."""
    if len(runs := runs_in(run)) > 1:
        raise ptdpo.UserError(f"{run} holds {len(runs)} runs; name one, such as {runs[-1]}")
    path = runs[0] / "checkpoint.safetensors"
    config = ptdpo.make_config(ptdpo.open_checkpoint(path)[0]["config"])
    if not config.model:
        raise ptdpo.UserError(f"{run}: a run of the toy; only runs with --model can be exported")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ptdpo.UserError(f"{folder}: not an empty folder; give another")
    policy = ptdpo.HFPolicy(config)
    ptdpo.read_checkpoint(path, policy)
    save_hf(policy, folder)
    print(f"written: {folder}")


def save_hf(policy, folder):
    """Write a model, adapters merged, in its source's dtype, and the source's processor files."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import cached_file

    name, merged = policy.base.name_or_path, {}
    dtype = AutoConfig.from_pretrained(name).dtype or torch.float32
    # Merged on the way out, in float32: in place and back again, rounding would stay behind.
    for key, value in policy.base.state_dict().items():
        if key.endswith(".base_layer.weight"):
            layer = policy.base.get_submodule(key.removesuffix(".base_layer.weight"))
            value = value.float() + layer.get_delta_weight("default")
        if ".lora_" not in key:
            merged[key.replace(".base_layer", "")] = value.to("cpu", dtype)
    with torch.device("meta"):  # a model without adapters, to hang the weights on
        clean = AutoModelForImageTextToText.from_config(policy.base.config)
    clean.load_state_dict(merged, assign=True)
    clean.save_pretrained(folder)
    for file in SOURCE_FILES:
        if source := cached_file(name, file, _raise_exceptions_for_missing_entries=False):
            shutil.copy(source, folder)
