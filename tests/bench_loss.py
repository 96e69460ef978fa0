"""Time and memory of the distillation loss at the size of a real vocabulary, next to its peers.

    python tests/bench_loss.py                     # N = 256 and 1,024, 2 CPU threads, 25 minutes
    python tests/bench_loss.py --rows 256 --repeats 1 --only naive --json bench.json
    python tests/bench_loss.py --memory assets/memory.png   # the figure: memory against V
    python tests/bench_loss.py --device cuda --dtype bf16 --rows 8192 --width 2048 --chunk 1024

One measurement is one forward and backward, from hidden states to the gradients of hidden and
weight, in a process of its own. A round runs all contenders in turn; ratios are taken inside a
round, since a shared machine drifts, and the table shows their median. Memory is the peak above the
inputs (hidden states and both heads): resident on a CPU, allocated on a GPU; dW: weight's gradient.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ptdpo import token_stats

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# ----------------------------- contenders: (x, args) -> loss for backward, and jsd to be shown


def ours(x, args):
    """This repository."""
    logp, _, jsd = token_stats(*x, args.k, chunk=args.chunk)
    return jsd.mean() - logp.mean(), jsd


def naive(x, args):
    """Both distributions in full, by autograd."""
    hidden, weight, targets, teacher, head = x
    logp = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        logq = (teacher @ head.T).float().log_softmax(-1)
    logm = torch.logaddexp(logp, logq) - math.log(2)
    jsd = (logp.exp() * (logp - logm) + logq.exp() * (logq - logm)).sum(-1) / 2
    return jsd.mean() - logp.gather(1, targets[:, None]).mean(), jsd


def student_support(x, args):
    """As in the paper's released code, in our words, but with the true gradient."""
    hidden, weight, targets, teacher, head = x
    logp = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        stored, stored_ids = (teacher @ head.T).float().softmax(-1).topk(args.k)
    top = logp.topk(args.k)
    found = top.indices[:, :, None] == stored_ids[:, None]  # [N, K, K]
    fill = (1 - stored.sum(1, keepdim=True)) / 150_000
    p, q = top.values.exp(), torch.where(found.any(2), (found * stored[:, None]).sum(2), fill)
    p, q = (torch.cat([m, (1 - m.sum(1, keepdim=True)).clamp_min(1e-8)], 1) for m in (p, q))
    jsd = (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum(1) / 2
    return jsd.mean() - logp.gather(1, targets[:, None]).mean(), jsd


def trl(x, args):
    """TRL's chunked divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    jsd, _ = ChunkedDivergenceFunction.apply(*x[:2], None, *x[3:], None, 0.5)
    return jsd.mean(), jsd


def liger(x, args):
    """Liger's chunked JSD."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False, chunk_size=args.chunk)
    return [loss(*x[:2], *x[3:], x[2])] * 2


def liger_triton(x, args):
    """Liger's Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return [LigerFusedLinearJSD(jsd_beta=0.5)(*x[:2], *x[3:], x[2])] * 2


def five_products(x, args):
    """Not a loss: the teacher's logits, the student's twice, both gradients; in chunks as ours."""
    hidden, weight, _, teacher, head = (a.detach() for a in x)
    if not hidden.is_cuda:  # there our products run in float32, whatever comes in
        hidden, weight, teacher, head = (a.float() for a in (hidden, weight, teacher, head))
    wide = {"out_dtype": torch.float32} if hidden.dtype == torch.bfloat16 else {}
    make = lambda *shape: torch.empty(*shape, device=hidden.device)
    buffer, dh, dw = make(args.chunk, len(weight)), make(*hidden.shape), make(*weight.shape).zero_()
    for a in range(0, len(hidden), args.chunk):
        h, t = hidden[a : a + args.chunk], teacher[a : a + args.chunk]
        z = buffer[: len(h)]
        for states, matrix in ((t, head), (h, weight), (h, weight)):
            torch.mm(states, matrix.T, out=z, **wide)
        torch.mm(z.to(weight.dtype), weight, out=dh[a : a + len(h)], **wide)
        torch.addmm(dw, z.to(weight.dtype).T, h, out=dw, **wide)
    return None, torch.zeros(())


CONTENDERS = {  # name: (function, package it needs, what it computes)
    "ours": (ours, None, "Top-K JSD (lower bound), log-prob, entropy"),
    "five products": (five_products, None, "the matrix products alone"),
    "naive": (naive, None, "exact JSD, log-prob"),
    "student support": (student_support, None, "student's Top-K, filled tail (no bound), log-prob"),
    "TRL": (trl, "trl", "exact JSD, entropy; in tiles"),
    "Liger": (liger, "liger_kernel", "exact JSD, mean alone; in chunks as ours"),
    "Liger Triton": (liger_triton, "liger_kernel", "exact JSD, mean alone; needs a GPU"),
}

# ----------------------------- one measurement, in its own process


def inputs(args, rows, vocab):
    """Hidden states, head, targets; teacher's hidden states and head."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    cast = lambda x: x.to(args.device, DTYPES[args.dtype])
    hidden, weight = draw(rows, args.width), draw(vocab, args.width).mul_(3 / args.width**0.5)
    teacher = hidden + 0.5 * draw(rows, args.width)
    targets = torch.randint(0, vocab, (rows,), generator=g).to(args.device)
    hidden, teacher, head, weight = cast(hidden), cast(teacher), cast(weight.clone()), cast(weight)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, teacher, head


def memory(args, field):
    """MiB now (VmRSS) or at the peak (VmHWM), of this process or of tensors on the GPU."""
    if args.device == "cuda":
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return (now if field == "VmRSS" else peak) / 2**20
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024


def measure(args, name, rows):
    """Time and memory of one forward and backward in this process."""
    torch.set_num_threads(args.threads)
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def once(x):
        loss, jsd = CONTENDERS[name][0](x, args)
        if loss is not None:
            loss.backward()
        synchronize()
        return jsd.detach().float().mean().item()

    once(inputs(args, 8, 2048))  # loads kernels and libraries
    x = inputs(args, rows, args.vocab)
    if args.device == "cuda":
        once(x)  # compiles Triton kernels for these shapes
        x[0].grad = x[1].grad = None
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, wall, cpu = memory(args, "VmRSS"), time.perf_counter(), time.process_time()
    jsd = once(x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "extra": memory(args, "VmHWM") - before, "jsd": jsd}


# ----------------------------- rounds and table


def run(name, rows):
    """One measurement in a fresh process, or a line and None if the contender cannot run here."""
    package = CONTENDERS[name][1]
    if package and importlib.util.find_spec(package) is None:
        return print(f"{name}: left out, {package} is not installed")
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return print(f"{name}: left out, {done.stderr.strip().splitlines()[-1]}")
    print(f"N {rows} {name}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(args, rows, runs):
    """runs: name -> list of measurements, one a round."""
    median = lambda name, key: statistics.median(m[key] for m in runs[name])
    ratio = lambda a, b: statistics.median(m["wall"] / n["wall"] for m, n in zip(runs[a], runs[b]))
    dw = args.vocab * args.width * 4 / 2**20  # accumulated in float32, also for a bf16 head
    print(
        f"\nN = {rows}, H = {args.width}, V = {args.vocab:,}, K = {args.k}, chunk {args.chunk}, "
        f"{args.dtype}, {args.device}, {args.threads} threads, median of {args.repeats}\n"
        "| contender | s | time / ours | five products' time / its | extra MiB | beyond dW "
        "| beyond dW / ours | JSD | computes |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in runs:
        beyond, least = (max(median(n, "extra") - dw, 1) for n in (name, "ours"))
        print(
            f"| {name} | {median(name, 'wall'):.2f} | {ratio(name, 'ours'):.2f} "
            f"| {ratio('five products', name):.2f} | {median(name, 'extra'):.0f} | {beyond:.0f} "
            f"| {beyond / least:.1f} | {median(name, 'jsd'):.4f} | {CONTENDERS[name][2]} |"
        )


def draw_memory(args):
    """Peak memory above the inputs against V, dW included, at N = 512: the figure of README."""
    from matplotlib.figure import Figure

    sizes, args.rows = (9_496, 18_992, 37_984, 75_968, 151_936), "512"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name in ("naive", "student support", "ours"):
        extra = []
        for vocab in sizes:
            sys.argv[1:] = ["--width", "256", "--vocab", str(vocab), "--threads", str(args.threads)]
            extra.append(run(name, 512)["extra"])
        axis.plot(sizes, extra, marker="o", label=name)
    axis.plot(sizes, [v * 256 * 4 / 2**20 for v in sizes], "k:", label="gradient of the head")
    axis.set(xlabel="V, words", ylabel="MiB above the inputs", ylim=(0, None))
    axis.set_title("forward and backward, N = 512, H = 256, K = 100, fp32", fontsize=10)
    axis.legend()
    figure.savefig(args.memory, dpi=80)


def main():
    """Rounds over all contenders, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="256,1024", help="N, tokens; several by comma")
    sizes = dict(width=1024, vocab=151_936, k=100, chunk=256, threads=2, repeats=3)
    for name, default in sizes.items():
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--only", help="contenders beside ours and the five products, by comma")
    parser.add_argument("--memory", help="draw memory against V into this file, nothing else")
    parser.add_argument("--json", help="file for all measurements")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a process of its own, see run
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measure(args, args.one, int(args.rows))))
    if args.memory:
        return draw_memory(args)
    wanted = {"ours", "five products", *(args.only or ",".join(CONTENDERS)).split(",")}
    results = {}
    for rows in map(int, args.rows.split(",")):
        runs = results[rows] = {name: [] for name in CONTENDERS if name in wanted}
        for _ in range(args.repeats):
            for name in list(runs):
                measured = run(name, rows)
                runs[name].append(measured) if measured else runs.pop(name)
        table(args, rows, runs)
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "runs": results}, indent=1))


if __name__ == "__main__":
    main()
