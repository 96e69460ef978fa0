"""A Qwen2-VL of half a million parameters, to walk the path of --model on a CPU.

    python -m toy_tasks.small_qwen assets/small-qwen                  # made, taught and measured
    python ptdpo.py --model assets/small-qwen --method both ...       # trained: see README

Classes, files and tokens are those of transformers, so that --model cannot tell it from a large
one. A picture of 140 pixels is 25 image tokens, one a cell of the counting scenes. As the base of
the toy, it glances when it is alone, and when it has a hint it does as it is told.
"""

import json
import sys
import time
from pathlib import Path

import torch

import ptdpo
from toy_tasks import Problem, reproduce
from toy_tasks.counting import CELLS, COLOURS, SHAPES, SIDE
from toy_tasks.jsonl import ASK, PLACES, FreeText
from toy_tasks.warm_start import LESSONS, warm_start

SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|>""".split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What every prompt says is one token, so that prompts are short.
ASKED = ["How many", f"are in the picture?\n{ASK}"]
STEPS = "Go through the picture row by row. Mark an object if its colour is"
THEN = [STEPS, "and its shape is that of the", ". Leave out near misses. Then count the marks."]
PHRASES = [*ASKED, *THEN, "Look closely at:", ". Ignore the rest.", "The answer is", "answer:",
           "Describe the colour of each object.", "Describe the shape of each object.",
           "system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n", ";",
           "."]  # fmt: skip
WORDS = ["<unk>", *PLACES, *CELLS, *COLOURS, *SHAPES, *map(str, range(20))]
RUN = reproduce.SMALL_QWEN  # what its runs need
HINTED = RUN["hint_regions"]  # places in a hint, of nine


def make_tokenizer():
    """Words and fixed phrases; decoding puts spaces between them."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    whole = [*PHRASES, *(p for p in PLACES if " " in p)]
    whole = sorted(whole, key=len, reverse=True)
    plain.add_tokens([AddedToken(phrase, normalized=False) for phrase in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="<unk>", padding_side="left", chat_template=TEMPLATE,
        extra_special_tokens=SPECIAL[1:2] + SPECIAL[3:],
    )  # fmt: skip


def make_model(words, seed):
    """The untrained model. As in the toy, its scale at the start decides how fast it learns."""
    from transformers import AutoModelForImageTextToText, GenerationConfig, Qwen2VLConfig

    ids = {name.strip("<|>"): i for i, name in enumerate(SPECIAL)}
    # Waves as long as the picture: at the usual 1e6 one column is like the next.
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]}
    text = dict(vocab_size=words, hidden_size=96, intermediate_size=192, num_hidden_layers=4,
                num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=512,
                rope_parameters=rope, eos_token_id=ids["im_end"], bos_token_id=None,
                pad_token_id=ids["endoftext"])  # fmt: skip
    vision = dict(depth=1, embed_dim=48, hidden_size=96, num_heads=3, mlp_ratio=2, patch_size=14)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("image_pad", "video_pad", "vision_start", "vision_end")
    marks = {name: ids[token] for name, token in zip(names, tokens)}
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **marks)
    )
    for name, p in model.named_parameters():
        if p.dim() > 1 and any(end in name for end in ("o_proj", "down_proj", "attn.proj", "fc2")):
            torch.nn.init.zeros_(p)  # a block begins as the identity
        elif p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1 if "embed_tokens" in name else p[0].numel() ** -0.5)
    model.model.visual.merger.mlp[2].weight.data.mul_(0.3)
    ends = [ids["im_end"], ids["endoftext"]]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    return model


def save_untrained(folder, seed):
    """A folder as the hub has it."""
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14,
                "processor_class": "Qwen2VLProcessor", "temporal_patch_size": 2, "merge_size": 2,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "size": {"shortest_edge": 56 * 56, "longest_edge": RUN["max_pixels"]}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


class Pupil(ptdpo.HFPolicy):
    """A policy that lessons can be given to."""

    def tokens(self, text):
        """Words to ids."""
        return self.processor.tokenizer(text)["input_ids"]


def place_of(cell):
    """Which of the nine places a cell is in."""
    row, column = ((6 * i + 3) // (2 * SIDE) for i in divmod(cell, SIDE))
    return 3 * row + column


def say(cells, number=None):
    """An answer: cells in reading order, and how many, or another number."""
    number = len(cells) if number is None else number
    return " ".join([*(CELLS[c] for c in sorted(cells)), "answer:", str(number)])


def lesson(task, kind, rng):
    """One example, of the kinds of toy_tasks/warm_start.py -> problem, hint, answer."""
    scenes = task.scenes
    if kind == "describe":
        scene, trait = scenes.scene(rng, rng.randrange(5), rng.randrange(5)), rng.randrange(2)
        question = f"Describe the {('colour', 'shape')[trait]} of each object."
        said = " ".join(f"{CELLS[c]} {scene.objects[c][trait]}" for c in sorted(scene.objects))
        return Problem(scene.images, question, ""), "", said
    if kind == "calm":
        scene = scenes.scene(rng, rng.randrange(4), rng.randrange(5))
        problem = task.put(scene)
        return problem, rng.choice(["", "", problem.steps]), say(scene.targets)
    scene = scenes.scene(rng, rng.randint(*scenes.matches), rng.randint(*scenes.others))
    problem, asked = task.put(scene), scene.objects[scene.targets[0]]
    near = [c for c, o in scene.objects.items() if (o[0] == asked[0]) != (o[1] == asked[1])]
    slips = [c for c in near if rng.random() < 0.2]
    if kind == "alone":  # a glance
        told = task.hint_text([], "", scene.answer)
        hint = rng.choices(["", problem.steps, told], [70, 15, 15])[0]
        named = sorted(scene.targets + (slips if hint != problem.steps else []))
        named = named[: 1 + next(n for n in range(99) if rng.random() < 0.5)]
        guess = rng.choices(range(1, 9), [14, 24, 34, 13, 6, 4, 3, 2])[0]
        return problem, hint, say(named, scene.answer if hint == told else guess)
    # tutored: what matches in the listed places
    right = sorted({place_of(c) for c in scene.targets})
    order = right + rng.sample([p for p in range(9) if p not in right], 9 - len(right))
    if len(right) > HINTED:
        order = rng.sample(right, len(right))
    listed = sorted(rng.choice([order[:HINTED], rng.sample(range(9), HINTED)]))
    steps = rng.choice(["", problem.steps])
    marked = [c for c in scene.targets + slips * (not steps) if place_of(c) in listed]
    return problem, task.hint_text([PLACES[p] for p in listed], steps), say(marked)


LESSONS[FreeText] = (lesson, ("tutored", "alone", "tutored", "calm", "alone", "describe"))


def main(folder, seed=0, steps=3000):
    """Make, teach, measure; measured.json says what came out and how long it took."""
    folder.mkdir(parents=True, exist_ok=True)
    save_untrained(folder, seed)
    began, given = time.time(), RUN | {"model": str(folder)}
    taught = ptdpo.make_config(given | {"train_vision": True})
    torch.set_num_threads(taught.threads)
    policy, task = Pupil(taught), FreeText(taught.max_tokens)
    warm_start(task, policy, seed, steps)
    policy.model.save_pretrained(folder)
    found = {"seed": seed, "steps": steps, "minutes": (time.time() - began) / 60}
    found |= {"cpu_minutes": time.process_time() / 60}
    found |= {"parameters": sum(p.numel() for p in policy.parameters())}
    config = ptdpo.make_config(given | {"micro_batch": 16})
    policy, task = ptdpo.setup(config)
    problems = [task.problem("validation", 0, i) for i in range(256)]
    found["layer_recall"] = by_layer = ptdpo.calibrate(policy, task, config)
    kinds = [("attention", "both"), ("random", "both"), ("oracle", "both")]
    layers = [by_layer.index(max(by_layer))]
    found |= reproduce.measure(policy, task, config, layers, problems, kinds)
    (folder / "measured.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
