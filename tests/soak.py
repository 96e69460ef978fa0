"""A long toy run in one process: does memory grow, does it slow down?

    python tests/soak.py [--steps 2000] [any other flag of ptdpo.py]

Runs `--toy --method ptdpo` in a temporary folder and notes the resident memory every 100 steps (20
at most in a short run). Prints the least-squares slope after the first quarter, which is warm-up,
in MB per 100 steps, and the seconds per step of the first and of the last quarter, evaluations left
out.
"""

import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from helpers import ROOT, rows

import ptdpo


def resident():
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(points):
    """Least squares of y on x."""
    x, y = (torch.tensor(v, dtype=torch.double) for v in zip(*points))
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x @ x)).item()


def main(flags):
    """Run, watching the log: it is written once a step."""
    steps = int(flags[flags.index("--steps") + 1]) if "--steps" in flags else 2000
    every, points, plain = min(100, steps // 10), [], ptdpo.log

    def log(path, row):
        plain(path, row)
        if path.name == "metrics.jsonl" and row["step"] % every == 0:
            points.append((row["step"], resident()))
            print(f"step {row['step']:5}  {points[-1][1]:8.1f} MB", flush=True)

    ptdpo.log = log
    with tempfile.TemporaryDirectory() as out:
        argv = ["--toy", "--method", "ptdpo", "--out", out, "--steps", str(steps), *flags]
        if code := ptdpo.main(argv):
            return code
        metrics = rows(Path(out) / "ptdpo" / "metrics.jsonl")
    commit = os.popen(f"git -C {ROOT} rev-parse HEAD").read().strip()
    print("command: python", " ".join(["tests/soak.py", *flags]))
    print(f"commit {commit}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"python {platform.python_version()}, {steps} steps")
    warm = [p for p in points if p[0] >= steps / 4]
    print(f"memory: {100 * slope(warm):+.3f} MB per 100 steps after step {warm[0][0]}")
    plain_rows = [r["seconds"] for r in metrics if r["accuracy"] is None]
    quarter = len(plain_rows) // 4
    first, last = (sum(v) / quarter for v in (plain_rows[:quarter], plain_rows[-quarter:]))
    print(f"seconds per step: {first:.3f} in the first quarter, {last:.3f} in the last")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
