"""Fixtures: one thread, the repository on the import path, and policies to test on."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helpers

import ptdpo
from toy_tasks.counting import Counting

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def task():
    """The toy as in the README."""
    return Counting()


@pytest.fixture
def policy(task):
    """A small model with random weights everywhere: no block is the identity."""
    return helpers.shaken(task.new_policy(0), 0)


@pytest.fixture
def ref(task):
    """A frozen reference that differs from `policy`."""
    return helpers.shaken(task.new_policy(0), 1).frozen_copy()


@pytest.fixture(scope="session")
def base():
    """The shipped base, and the state that is stored with it."""
    policy = Counting().new_policy(0)
    state = ptdpo.read_checkpoint(helpers.BASE, policy)
    return policy.frozen_copy(), state


@pytest.fixture
def signals():
    """Runs in this process install signal handlers: put the old ones back."""
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)
    ptdpo.STOP.clear()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Finished tiny runs of four steps, by method: to be read, or copied and then broken."""
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    out = tmp_path_factory.mktemp("finished")
    for method in ("grpo", "ptdpo"):
        assert ptdpo.main(helpers.start(out / method, method=method)) == 0
    for number, handler in old.items():
        signal.signal(number, handler)
    return {method: out / method / method for method in ("grpo", "ptdpo")}
