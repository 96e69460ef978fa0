"""Rank the layers of a Qwen model: which layer looks where the answer is?

    python -m experiments.calibrate MODEL [--out DIR] [flags of ptdpo.py]

A run does this at its start. Here it is done alone, in minutes. --out writes calibration.json.
"""

import sys
from dataclasses import fields

import ptdpo


def rank_layers(argv):
    """Print the hint recall of each layer, best first, and what random regions would reach."""
    if not argv or argv[0].startswith("-"):
        raise ptdpo.UserError("experiments.calibrate: give a MODEL first: a folder or a hub name")
    given = ptdpo.parse(["--model", *argv])
    config = ptdpo.make_config(
        {f.name: given[f.name] for f in fields(ptdpo.Config) if f.name in given}
    )
    task = ptdpo.make_task_of(config)
    policy = ptdpo.load_policy(config, task)
    by_layer = ptdpo.calibrate(policy, task, config)
    best = sorted(range(len(by_layer)), key=by_layer.__getitem__, reverse=True)
    for layer in best:
        print(f"layer {layer:2}  recall {by_layer[layer]:.3f}")
    chance = config.hint_regions / len(ptdpo.PLACES)
    print(f"random regions: {chance:.3f}")
    if "out" in given:
        given["out"].mkdir(parents=True, exist_ok=True)
        found = {"model": config.model, "seed": config.seed, "hint_regions": config.hint_regions}
        found |= {"chance": chance, "layer_recall": by_layer, "best": best}
        ptdpo.write_json(given["out"] / "calibration.json", found)
        print(f"written: {given['out']}/calibration.json")


def main(argv=None):
    """Entry point -> exit code."""
    return ptdpo.guard(rank_layers, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
