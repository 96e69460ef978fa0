"""Fixtures: one thread, no GPU, the repository on the import path, and policies to test on."""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: all tests run on a CPU

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helpers

import ptdpo
from experiments import figures
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


@contextmanager
def handlers_kept():
    """Runs in this process install signal handlers: put the old ones back."""
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)
    ptdpo.STOP.clear()


@pytest.fixture
def signals():
    """For tests that run training in this process."""
    with handlers_kept():
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take longer than these runs."""
    monkeypatch.setattr(figures, "finish", lambda folders: None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Finished tiny runs of four steps, by method: to be read, or copied and then broken."""
    out = tmp_path_factory.mktemp("finished")
    with handlers_kept():
        for method in ("grpo", "ptdpo"):
            assert ptdpo.main(helpers.start(out / method, method=method)) == 0
    return {method: out / method / method for method in ("grpo", "ptdpo")}
