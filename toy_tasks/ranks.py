"""More than one process (torchrun): the groups of a step are shared out, and what is made of them
summed up again, so that weights of tokens and metrics are those of whole steps, as in one process.

In one process `gather` and `over_ranks` give back what they got, and `own` is everything.
"""

import atexit
import os
import sys

import torch

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def connect():
    """Join the other processes, if there are any; what is printed is the first one's."""
    if RANKS > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
        atexit.register(torch.distributed.destroy_process_group)  # or gloo may abort at the end
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def over_ranks(tensor, kind="SUM"):
    """Sum (or MAX) of a tensor over all processes, in place."""
    if RANKS > 1:
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, kind))
    return tensor


def by_rank_0(function):
    """Writes and prints are the business of the first process."""
    return function if RANK == 0 else lambda *_: None


def own(groups):
    """The share of this process in so many groups, as a slice."""
    return slice(RANK * groups // RANKS, (RANK + 1) * groups // RANKS)


def gather(rows, groups):
    """Rows [n, ...] of the groups of this process -> rows of all groups."""
    each = len(rows) // (own(groups).stop - own(groups).start)
    whole = rows.new_zeros(groups * each, *rows.shape[1:])
    whole[own(groups).start * each : own(groups).stop * each] = rows
    return over_ranks(whole)
