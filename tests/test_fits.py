"""The predicted memory of a run, against storage counted op by op, and against known sizes."""

import weakref

import pytest
import tiny_qwen
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ptdpo
from experiments import fits

BILLIONS = {  # parameters as published
    "Qwen2-VL-2B": 2.209,
    "Qwen2-VL-7B": 8.291,
    "Qwen2.5-VL-3B": 3.755,
    "Qwen2.5-VL-7B": 8.292,
    "Qwen3-VL-4B": 4.438,
    "Qwen3-VL-8B": 8.767,
}
KINDS = [{}, {"checkpointing": True}, {"lora": 4}, {"lora": 4, "checkpointing": True}]


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of all storage that tensor operations make, while it lives."""

    def __init__(self, models):
        super().__init__()
        self.own = {}
        self.now = 0
        self.peak = 0
        for model in models:
            for p in model.parameters():
                self.count(p.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage):
        """Add a storage that is new, until it dies."""
        address = storage._cdata
        if address not in self.own:
            self.own[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, address)

    def forget(self, address):
        """A storage has died."""
        self.now -= self.own.pop(address)


def measured_and_predicted(folder, settings):
    """Peak of a training step in bytes, as counted and as predicted."""
    sizes = {"max_tokens": 32, "group": 4, "prompts": 2, "max_pixels": 3136}
    config = ptdpo.make_config(settings | sizes | {"model": str(folder)})
    task = ptdpo.make_task_of(config)
    policy = ptdpo.load_policy(config, task)
    # Every answer has all its tokens.
    policy.suppress_ids = [*policy.suppress_ids, *policy.stop_ids]
    ref = policy.frozen_copy()
    learned = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, config.lr)
    with LiveStorage([policy, ref]) as live:
        ptdpo.live_tensors(policy, optimizer)  # makes the moments, as after a first step
        ptdpo.train_step(policy, ref, task, optimizer, config, [1], 1)
    prompt = policy.encode(task.problem("train", 0, 0))
    shape = fits.read_shape(str(folder))
    return live.peak, fits.total(fits.predict(shape, config, len(prompt.ids), 4))


@pytest.mark.parametrize(("family", "kinds"), [("qwen2_vl", KINDS), ("qwen3_vl", KINDS[::3])])
def test_prediction_is_within_15_percent(tmp_path, family, kinds):
    """Full and LoRA, with and without checkpointing."""
    tiny_qwen.save(tmp_path, family, hidden=192, layers=3)
    for settings in kinds:
        measured, predicted = measured_and_predicted(tmp_path, settings)
        assert predicted == pytest.approx(measured, rel=0.15), settings


@pytest.mark.parametrize("name", BILLIONS)
def test_known_models_have_their_published_size(name):
    """All six, counted without memory."""
    shape = fits.read_shape(f"Qwen/{name}-Instruct")
    assert shape.parameters / 1e9 == pytest.approx(BILLIONS[name], abs=5e-4)


def test_remedies_are_named(tmp_path, capsys):
    """What does not fit gets flags that would; what fits says so; no model is one line."""
    assert fits.main(["Qwen2-VL-2B", "--gb", "80"]) == 0
    assert "fits into 80 GB" in capsys.readouterr().out
    assert fits.main(["Qwen2-VL-2B", "--gb", "24"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("does not fit into 24 GB") and "--lora 16 --checkpointing" in line
    assert fits.main(["Qwen2-VL-2B", "--lora", "16", "--checkpointing", "--gb", "24"]) == 0
    assert "fits into 24 GB" in capsys.readouterr().out
    assert fits.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
