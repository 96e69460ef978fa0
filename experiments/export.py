"""Write the model of a run as a folder that transformers loads.

    python -m experiments.export RUN DIR

Adapters are merged into the weights, in float32. The weights are then stored in the dtype of the
model that the run began with, and the files of its tokenizer and processor are copied.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

import ptdpo

SOURCE_FILES = """preprocessor_config.json video_preprocessor_config.json processor_config.json
    chat_template.json chat_template.jinja tokenizer.json tokenizer_config.json vocab.json
    merges.txt special_tokens_map.json added_tokens.json generation_config.json""".split()


def export(run, folder):
    """Load a run, merge and write. UserError if it is a run of the toy, or DIR is not empty."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    runs = ptdpo.runs_in(run)
    if len(runs) > 1:
        raise ptdpo.UserError(f"{run} holds {len(runs)} runs; name one, such as {runs[-1]}")
    config = ptdpo.Config(**ptdpo.read_run(runs[0])["config"])
    if not config.model:
        raise ptdpo.UserError(f"{run}: a run of the toy; only runs with --model can be exported")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ptdpo.UserError(f"{folder}: not an empty folder; give another")
    policy = ptdpo.load_policy(config, ptdpo.make_task_of(config))
    ptdpo.load_checkpoint(runs[0] / "checkpoint.safetensors", policy)
    source = policy.base.name_or_path
    model = policy.model.to("cpu", torch.float32)
    if config.lora:
        model = model.merge_and_unload()
    model.to(AutoConfig.from_pretrained(source).dtype or torch.float32)
    model.save_pretrained(folder)
    for name in SOURCE_FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path:
            shutil.copy(path, folder)
    print(f"written: {folder}")


def main(argv=None):
    """Entry point -> exit code."""
    parser = argparse.ArgumentParser("experiments.export")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("folder", type=Path, help="an empty or new folder")
    args = parser.parse_args(argv)
    return ptdpo.guard(export, args.run, args.folder)


if __name__ == "__main__":
    sys.exit(main())
