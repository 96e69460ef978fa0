"""A long run in one process: does memory grow, does it slow down?

    python -m experiments.soak                              2,000 steps of PTD-PO on the toy
    python -m experiments.soak --steps 300 --method grpo    any flags of ptdpo.py
    python -m experiments.soak --model assets/small-qwen --max-pixels 20000 --max-tokens 16

Notes the resident memory every 100 steps, or 20 times in a short run. Prints its slope after the
first quarter, which is warm-up, and the seconds a step of the first and of the last quarter,
evaluations left out.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

import ptdpo
from experiments import figures


def resident():
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(points):
    """Least squares of y on x over points (x, y)."""
    x, y = torch.tensor(points, dtype=torch.double).T
    x = x - x.mean()
    return (x @ (y - y.mean()) / (x @ x)).item()


def soak(flags):
    """Run, and watch its log, which is written once a step."""
    given = ptdpo.parse(flags)
    steps = given.get("steps", 2000)
    every = max(1, min(100, steps // 20))
    points = []
    rows = []
    plain_log = ptdpo.log

    def watched_log(path, row):
        plain_log(path, row)
        if path.name != "metrics.jsonl":
            return
        rows.append({"seconds": row["seconds"], "evaluated": row["accuracy"] is not None})
        if row["step"] % every == 0:
            points.append((row["step"], resident()))
            print(f"step {row['step']:5}  {points[-1][1]:8.1f} MB", flush=True)

    ptdpo.log = watched_log
    task = [] if "model" in given else ["--toy"]
    method = [] if "method" in given else ["--method", "ptdpo"]
    with tempfile.TemporaryDirectory() as out:
        defaults = [*task, *method, "--steps", str(steps), "--out", out]
        code = ptdpo.main([*defaults, *flags])
    if code:
        raise SystemExit(code)
    print("command: python -m experiments.soak", *flags)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {steps} steps")
    warm = [point for point in points if point[0] >= steps / 4]
    print(f"memory: {100 * slope(warm):+.3f} MB per 100 steps after step {warm[0][0]}")
    seconds = [row["seconds"] for row in rows if not row["evaluated"]]
    quarter = max(1, len(seconds) // 4)
    first = sum(seconds[:quarter]) / quarter
    last = sum(seconds[-quarter:]) / quarter
    print(f"seconds a step: {first:.3f} in the first quarter, {last:.3f} in the last")


def main(argv=None):
    """Entry point -> exit code."""
    figures.finish = lambda folders: None
    return ptdpo.guard(soak, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
