"""Will it fit? The memory of a run, from the config of a model and the flags alone.

    python -m experiments.fits Qwen2-VL-2B                           one of six known models
    python -m experiments.fits Qwen/Qwen2-VL-2B-Instruct --lora 16   a hub name, flags of ptdpo.py
    python -m experiments.fits FOLDER --gb 24 --prompt-tokens 600    a folder, a card of 24 GB

Prints the parts in GB (10^9 bytes) and the sum at the peak of a step. If the card has less, it
names flags that would make it fit. On a GPU a number in a matrix product has 2 bytes, with --cpu 4.
docs/real_model.md lists the large parts. The sum leaves out what CUDA itself takes, gaps between
blocks of memory, and the activations of --train-vision.
"""

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch

import ptdpo

# Configs of six models, as far as they shape the memory.
KNOWN = json.loads(Path(__file__).with_name("known_models.json").read_text())
REMEDIES = [  # from what costs least
    {"checkpointing": True},
    {"checkpointing": True, "sample_batch": 32},
    {"lora": 16},
    {"lora": 16, "checkpointing": True},
    {"lora": 16, "checkpointing": True, "sample_batch": 32},
    {"lora": 16, "checkpointing": True, "sample_batch": 8, "max_tokens": 256},
]


def read_shape(name):
    """Sizes and numbers of parameters of a model. UserError if there is no such model."""
    import transformers as hf

    short = Path(name).name.removesuffix("-Instruct")
    try:
        if short in KNOWN and not Path(name).exists():
            config = hf.AutoConfig.for_model(**KNOWN[short])
        else:
            config = hf.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = hf.AutoModelForImageTextToText.from_config(config)
        layers = model.model.language_model.layers
    except (OSError, ValueError, AttributeError) as error:
        known = ", ".join(KNOWN)
        raise ptdpo.UserError(
            f"{name}: no Qwen model; give a folder, a hub name or {known}"
        ) from error
    text = config.text_config
    D = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    decoder = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    return SimpleNamespace(
        width=text.hidden_size,
        layers=len(layers),
        heads=D * text.num_attention_heads,
        kv=D * text.num_key_value_heads,
        mlp=text.intermediate_size,
        words=text.vocab_size,
        norms_heads=config.model_type == "qwen3_vl",
        parameters=count(model.parameters()),
        vision=count(model.model.visual.parameters()),
        linear=count(m.weight for m in linear),
        decoder=count(m.weight for m in decoder),
        adapter=sum(m.in_features + m.out_features for m in decoder),  # of rank 1
    )


def count(parameters):
    """How many numbers these parameters have."""
    return sum(p.numel() for p in parameters)


def predict(s, config, prompt_tokens, e):
    """Bytes by part: what is always there, and what a rollout and an update need besides.

    s: what read_shape found. e: bytes of a number in a matrix product, 2 or 4. Letters: P tokens of
    a prompt, T of an answer, G answers to a prompt; B prompts and N answers at a time.
    """
    P = prompt_tokens
    T = config.max_tokens
    G = config.group
    learned = config.lora * s.adapter or s.parameters - s.vision * (not config.train_vision)
    if config.lora:  # the reference is the same model without its adapters
        always = {"weights": e * s.parameters + 4 * learned, "moments": 8 * learned}
    else:
        always = {"weights": 4 * s.parameters, "moments": 8 * learned}
        always["reference"] = e * s.linear + 4 * (s.parameters - s.linear)
    # Autocast makes copies of float32 weights, and both heads are cast for the loss.
    is_cast = e == 2 and not config.lora
    casts = 2 * s.decoder if is_cast else 0
    head = s.words * s.width
    N = min(config.sample_batch // G or 1, config.prompts) * G
    rollout = {
        "keys and values": (2 * s.layers + 1) * s.kv * N * (P + T) * e,
        "logits": 20 * N * s.words + 2 * head * is_cast,  # once in float32, twice in float64
        "cast weights": casts,
    }
    B = config.micro_batch or -(-config.prompts // config.updates_per_batch)
    N = B * G
    tokens = B * P + N * T
    layer = layer_bytes(s, config, B, N, P, T, e)
    slopes = 3 * tokens * s.mlp * e  # of one layer, in the backward pass
    # The loss holds seven matrices [tokens of a chunk, words] in float32.
    chunk = 7 * 4 * min(ptdpo.CHUNK, N * T) * s.words + 8 * head * is_cast
    update = {"gradients": 4 * learned, "teacher": 4 * config.prompts * G * T * s.width}
    if config.checkpointing:
        update["activations"] = s.layers * tokens * s.width * (e if config.lora else 4)
        update["loss or one layer"] = max(chunk, layer + slopes, casts)
    else:
        update["activations"] = s.layers * layer + 8 * tokens * s.width
        update["loss or one layer"] = max(chunk, slopes)
        update["cast weights"] = casts
    return always, rollout, update


def layer_bytes(s, config, B, N, P, T, e):
    """Bytes that one decoder layer keeps for the backward pass, of B prompts and N answers."""
    # Norms are float32. One that learns keeps its result beside its input.
    kept = 1 if config.lora else 2
    norms = 2 * kept * s.width
    if s.norms_heads:
        norms += kept * (s.heads + s.kv)
    # Queries, keys, values, gate and up each keep a copy of their input, where it has to be cast.
    copies = 2 if e == 4 else 5
    products = copies * s.width + 2 * s.heads + 4 * s.mlp + 7 * config.lora
    # Attention repeats keys and values for each answer and each head, and masks for each layer.
    answers = N * (2 * (P + T) * s.heads + T * s.heads + T * (P + T))
    prompts = B * (3 * P * s.heads + P * P)
    return (B * P + N * T) * (4 * norms + e * products) + e * (answers + prompts)


def total(parts):
    """Bytes at the peak: what is always there, and a rollout or an update, whichever is larger."""
    always, rollout, update = parts
    return sum(always.values()) + max(sum(rollout.values()), sum(update.values()))


def remedies(shape, config, prompt_tokens, e, limit):
    """Flags that would make it fit, from what costs least."""
    found = []
    for changes in REMEDIES:
        changes = {name: value for name, value in changes.items() if getattr(config, name) != value}
        changed = replace(config, **changes)
        if changes and total(predict(shape, changed, prompt_tokens, e)) <= limit:
            flags = [f"--{name.replace('_', '-')} {value}" for name, value in changes.items()]
            found.append(" ".join(flags).replace(" True", ""))
    return found


def fits(argv):
    """Print the parts, the sum, and what would help."""
    parser = argparse.ArgumentParser("experiments.fits", allow_abbrev=False)
    parser.add_argument("model", help="a known model, a folder or a hub name")
    parser.add_argument("--gb", type=float, help="memory of the card; found out where there is one")
    parser.add_argument("--prompt-tokens", type=int, default=210)
    parser.add_argument("--cpu", action="store_true", help="for a CPU: 4 bytes a number")
    args, flags = parser.parse_known_args(argv)
    given = ptdpo.parse(["--model", args.model, *flags])
    names = {f.name for f in fields(ptdpo.Config)}
    config = ptdpo.make_config({name: value for name, value in given.items() if name in names})
    shape = read_shape(args.model)
    e = 4 if args.cpu else 2
    parts = predict(shape, config, args.prompt_tokens, e)
    answers = f"{config.prompts} x {config.group} answers of {config.max_tokens} tokens"
    print(f"{args.model}: {shape.parameters / 1e9:.3f} billion parameters, {answers}")
    for title, part in zip(("always", "rollout", "update"), parts):
        print(f"{title:22}{sum(part.values()) / 1e9:6.1f} GB")
        for name, size in part.items():
            print(f"    {name:18}{size / 1e9:6.1f}")
    peak = total(parts) / 1e9
    print(f"peak                  {peak:6.1f} GB, and about 1 GB for CUDA itself")
    limit = args.gb
    if limit is None and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory / 1e9
    if limit is None:
        print("no card found: give its memory by --gb")
    elif peak + 1 <= limit:
        print(f"fits into {limit:.0f} GB")
    else:
        found = remedies(shape, config, args.prompt_tokens, e, (limit - 1) * 1e9)
        print(f"does not fit into {limit:.0f} GB; would fit: {', or '.join(found) or 'nothing'}")


def main(argv=None):
    """Entry point -> exit code."""
    return ptdpo.guard(fits, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
