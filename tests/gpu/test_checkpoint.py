"""Checkpoints of a model on CUDA: through pinned memory, written in the background, back on the device."""

import pytest
import torch
from torch import nn

from hardy.distributed.comm import Alone
from hardy.train.checkpoint import CheckpointStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def make(**settings):
    model = nn.Linear(512, 512, device="cuda")
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, **settings)


def step(model, optimizer):
    model(torch.ones(1, 512, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"capturable": True}])
def test_a_background_save_holds_the_moment_of_the_call(tmp_path, settings):
    model, optimizer = make(**settings)
    store = CheckpointStore(tmp_path, Alone(), keep_last=1, keep_best=0, asynchronous=True)
    for turn in (1, 2):  # the second one meets reused buffers
        step(model, optimizer)
        store.save(turn, model, optimizer, {})
        saved = model.weight.detach().clone()
        step(model, optimizer)
    store.wait()
    other, fresh = make(**settings)
    store.load(store.newest_good(), other, fresh)
    assert torch.equal(other.weight, saved)
    step(other, fresh)
    assert torch.equal(other.weight, model.weight)
    mine, theirs = fresh.state[other.weight]["step"], optimizer.state[model.weight]["step"]
    assert mine.device == theirs.device and mine.item() == theirs.item()
