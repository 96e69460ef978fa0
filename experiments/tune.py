"""Choose each arm's learning rate, and lambda for each divergence, on validation pictures.

    python -m experiments.tune --out runs/tune

Seeds are 0 to 4, or fewer by --seeds. The first stage tries learning rates, the second lambdas at
the rate that was best for PTD-PO. The best has the highest mean accuracy at the last step, or of
equal ones the largest area. DIR/tune.json holds every value; reproduce.py takes what was chosen
from experiments/results/tune.json, if it is there.
"""

import sys
import time

import ptdpo
from experiments import summaries
from experiments.reproduce import describe_call, make_parser, settings_of, shared, train_all

RATES = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3)
LAMBDAS = (0.1, 0.3, 1.0, 3.0, 10.0)


def try_values(arms, name, values, chosen, seeds, given):
    """Train arms with each value of a setting -> rows of arm, settings, mean accuracy and area."""
    rows = []
    jobs = []
    for arm in arms:
        for value in values:
            changes = chosen["ptdpo"] | {name: value}
            label = "-".join([arm, *(f"{key}-{changes[key]:g}" for key in sorted(changes))])
            rows.append({"arm": arm, "settings": changes, "folder": given.out / "runs" / label})
            for seed in seeds:
                settings = settings_of(arm, {}) | changes | {"seed": seed}
                jobs.append((settings | shared(settings, given), rows[-1]["folder"] / str(seed)))
    train_all(jobs, given.jobs)
    for row in rows:
        folder = row.pop("folder")
        scores = [summaries.score(*summaries.read_run(folder / str(seed))) for seed in seeds]
        row |= {n: summaries.mean([found[n] for found in scores]) for n in ("accuracy", "area")}
    return rows


def choose(rows):
    """The best settings of each arm."""
    rows = sorted(rows, key=lambda row: (row["accuracy"], row["area"]))
    return {row["arm"]: row["settings"] for row in rows}


def tune(given):
    """Both stages; tune.json is written after each."""
    began = time.time()
    seeds = list(range(min(given.seeds, 5)))
    usual = {"ptdpo": {"distill_weight": 1.0}}
    rates = try_values(("grpo", "ptdpo", "distil_only"), "lr", RATES, usual, seeds, given)
    chosen = choose(rates)
    found = {"chosen": chosen, "rates": rates, "lambdas": [], "seeds": seeds}
    ptdpo.write_json(given.out / "tune.json", found | describe_call("tune", began))
    divergences = ("ptdpo", "forward_kl", "reverse_kl")
    lambdas = try_values(divergences, "distill_weight", LAMBDAS, chosen, seeds, given)
    chosen |= choose(lambdas)
    found |= {"chosen": chosen, "lambdas": lambdas}
    ptdpo.write_json(given.out / "tune.json", found | describe_call("tune", began))
    for row in rates + lambdas:
        mark = "chosen" if chosen[row["arm"]] == row["settings"] else ""
        print(f"{row['arm']:12} {row['settings']} {row['accuracy']:.3f} {row['area']:.3f} {mark}")
    print(f"{given.out}/tune.json; copy it to experiments/results/tune.json to use it")


def main(argv=None):
    """Entry point -> exit code."""
    parser = make_parser("tune", "runs/tune")
    return ptdpo.guard(lambda: tune(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
