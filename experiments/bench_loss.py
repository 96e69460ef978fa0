"""Time and memory of the loss at the size of a real vocabulary, beside other implementations.

    python -m experiments.bench_loss                        N = 1,024 tokens, two CPU threads
    python -m experiments.bench_loss --json --n 256         one JSON line a contender
    python -m experiments.bench_loss --only ours,naive --rounds 3

One measurement is one forward and backward, from hidden states to the gradients of the hidden
states and of the head, in a process of its own. extra_mb is the peak of memory above the inputs,
the gradient of the head included. With several rounds, contenders take turns and the line shows
medians. On a GPU the head is bfloat16, and memory is that of tensors.

    ours     ptdpo.head_backward: Top-K JSD, KL, policy loss, log-prob and entropy, by chunks
    naive    the exact JSD and the log-prob of whole logits, by autograd
    trl      TRL's chunked divergence, where trl is installed: the exact JSD
    liger    Liger's chunked JSD, where liger-kernel is installed: the exact JSD
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
from types import SimpleNamespace

import torch

import ptdpo


def make_inputs(args, n, v):
    """Student and teacher: hidden states [n, H], heads [v, H], target words [n]."""
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, args.h, generator=noise)
    teacher = hidden + 0.5 * torch.randn(n, args.h, generator=noise)
    head = torch.randn(v, args.h, generator=noise).mul_(3 / args.h**0.5)
    targets = torch.randint(0, v, (n,), generator=noise)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    return SimpleNamespace(
        hidden=hidden.to(args.device, dtype).requires_grad_(),
        teacher=teacher.to(args.device, dtype),
        # The reference of a run has a head of its own.
        teacher_head=head.clone().to(args.device, dtype),
        head=head.to(args.device, dtype).requires_grad_(),
        targets=targets.to(args.device),
    )


def ours(x, args):
    """The loss of this repository, all tokens distilled."""
    policy = SimpleNamespace(head=lambda: x.head, head_weight=x.head, suppress_ids=[])
    ref = SimpleNamespace(head=lambda: x.teacher_head)
    n = len(x.targets)
    ones = torch.ones(n, device=x.hidden.device)
    tokens = {
        "targets": x.targets,
        "advantages": ones,
        "logp_ref": -3 * ones,
        "weights": torch.full((n, 3), 1 / n, device=ones.device),
    }
    config = ptdpo.Config(top_k=args.k)
    hidden = x.hidden.detach()
    values, grad = ptdpo.head_backward(policy, ref, hidden, ones.bool(), x.teacher, tokens, config)
    x.hidden.backward(grad.to(hidden.dtype))
    return values[:, 3].mean()


def naive(x, args):
    """Both distributions in full, by autograd."""
    log_p = (x.hidden @ x.head.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (x.teacher @ x.teacher_head.T).float().log_softmax(-1)
    jsd = ptdpo.jsd(log_p, log_q).mean()
    logp = log_p.gather(1, x.targets[:, None]).mean()
    (jsd - logp).backward()
    return jsd


def trl(x, args):
    """TRL's chunked divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    jsd, _ = ChunkedDivergenceFunction.apply(
        x.hidden, x.head, None, x.teacher, x.teacher_head, None, 0.5
    )
    jsd.mean().backward()
    return jsd.mean()


def liger(x, args):
    """Liger's chunked JSD."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False, chunk_size=ptdpo.CHUNK)
    jsd = loss(x.hidden, x.head, x.teacher, x.teacher_head, x.targets)
    jsd.backward()
    return jsd


CONTENDERS = {"ours": ours, "naive": naive, "trl": trl, "liger": liger}
PACKAGES = {"trl": "trl", "liger": "liger_kernel"}


def memory(args, field):
    """Memory in MB: of tensors on a GPU, or of this process now (VmRSS) and at its peak (VmHWM)."""
    if args.device == "cuda" and field == "VmRSS":
        return torch.cuda.memory_allocated() / 1e6
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024 / 1e6


def measure(args, name):
    """Seconds and memory of one forward and backward in this process."""
    torch.set_num_threads(args.threads)
    contender = CONTENDERS[name]
    contender(make_inputs(args, 8, 2048), args)  # loads libraries
    x = make_inputs(args, args.n, args.v)
    if args.device == "cuda":
        contender(x, args)  # compiles what is compiled for a shape
        x.hidden.grad = None
        x.head.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory(args, "VmRSS")
    began = time.perf_counter()
    jsd = contender(x, args).item()  # waits for a GPU
    seconds = time.perf_counter() - began
    extra = memory(args, "VmHWM") - before
    assert math.isfinite(jsd) and x.hidden.grad.any() and x.head.grad.any()
    return {"name": name, "seconds": seconds, "extra_mb": extra, "jsd": jsd}


def in_a_process(argv, name):
    """One measurement in a fresh process; None, and a line, if the contender cannot run here."""
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        print(f"{name}: left out, {PACKAGES[name]} is not installed", file=sys.stderr)
        return None
    command = [sys.executable, "-m", "experiments.bench_loss", *argv, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ptdpo.HERE)
    if done.returncode:
        print(f"{name}: left out, {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(argv):
    """Measure all contenders in turn, and print a line each."""
    parser = argparse.ArgumentParser("experiments.bench_loss")
    for flag, value in {"n": 1024, "h": 1024, "v": 151_936, "k": 100, "threads": 2}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by comma")
    parser.add_argument("--json", action="store_true", help="a JSON line a contender")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    names = args.only.split(",")
    if set(names) - CONTENDERS.keys():
        raise ptdpo.UserError(f"--only {args.only}: give some of {', '.join(CONTENDERS)}")
    found = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            row = in_a_process(argv, name)
            if row:
                found[name].append(row)
    for name, rows in found.items():
        if rows:
            line = {"name": name}
            for key in ("seconds", "extra_mb", "jsd"):
                line[key] = statistics.median(row[key] for row in rows)
            text = "{name:6} {seconds:8.2f} s {extra_mb:8.0f} MB   JSD {jsd:.4f}".format(**line)
            print(json.dumps(line) if args.json else text, flush=True)


def main(argv=None):
    """Entry point -> exit code."""
    return ptdpo.guard(compare, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
