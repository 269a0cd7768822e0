"""Saving, resuming bit for bit, what is written, what is kept."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hardy.config import UserError
from hardy.distributed.comm import Alone
from hardy.rng import generator_for
from hardy.train import checkpoint as module
from hardy.train.checkpoint import CheckpointStore
from hardy.train.manifest import step_folder
from hardy.train.storage import load_model_tensors

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1),
}


class Net(nn.Module):
    """Parameters and buffers of many dtypes, one parameter that never gets a gradient, one that is frozen."""

    def __init__(self, seed=0):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 7)
        self.unused = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        for name, param in self.named_parameters():
            param.data.copy_(torch.randn(param.shape, generator=generator_for(seed, name)))
        for dtype in (torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64):
            self.register_buffer(f"buffer_{dtype}".replace("torch.", ""), torch.full((3,), seed, dtype=dtype))

    def forward(self, tokens):
        return self.out(self.norm(self.embedding(tokens)))


def make(name="adamw", *, seed=0):
    model = Net(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return model, OPTIMIZERS[name]([{"params": matrices}, {"params": rest, "weight_decay": 0.0}])


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        tokens = torch.randint(0, 7, (16,), generator=generator_for(0, "tokens", step))
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def open_store(folder, *, keep_last=10, keep_best=0, asynchronous=False):
    return CheckpointStore(
        Path(folder), Alone(), keep_last=keep_last, keep_best=keep_best, asynchronous=asynchronous
    )


def assert_equal_bits(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key


def state_bits(optimizer):
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(v) for i, entries in state.items() for key, v in entries.items()}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pending_gradient", [False, True])
def test_resume_gives_the_same_bits(tmp_path, name, asynchronous, pending_gradient):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    store = open_store(tmp_path, asynchronous=asynchronous)
    store.save(3, model, optimizer, {"tokens": 48})
    losses = train(model, optimizer, range(3, 6))
    store.wait()
    again, fresh = make(name, seed=1)
    if pending_gradient:
        again(torch.arange(7)).sum().backward()
    store = open_store(tmp_path)
    plain = store.load(store.newest_good(), again, fresh)
    assert plain == {"tokens": 48}
    assert train(again, fresh, range(3, 6)) == losses
    assert_equal_bits(model.state_dict(), again.state_dict())
    assert_equal_bits(state_bits(optimizer), state_bits(fresh))
    assert fresh.param_groups[1]["weight_decay"] == 0.0
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saving_before_the_first_step_changes_nothing_and_loads(tmp_path, name):
    model, optimizer = make(name)
    expected = train(*make(name), range(3))
    store = open_store(tmp_path)
    store.save(0, model, optimizer, {})
    assert not optimizer.state_dict()["state"]
    used, used_optimizer = make(name, seed=1)
    train(used, used_optimizer, range(2))
    store.load(store.newest_good(), used, used_optimizer)
    assert train(model, optimizer, range(3)) == expected
    assert train(used, used_optimizer, range(3)) == expected


def test_model_alone_and_extra_tensors(tmp_path):
    model, optimizer = make()
    anchor = torch.arange(5, dtype=torch.float64)
    store = open_store(tmp_path)
    store.save(1, model, optimizer, {}, extra={"anchor": anchor})
    other, back = Net(seed=4), torch.zeros(5, dtype=torch.float64)
    store.load(store.newest_good(), other, None, extra={"anchor": back})
    assert torch.equal(back, anchor)
    assert_equal_bits(model.state_dict(), other.state_dict())
    assert_equal_bits(dict(model.state_dict()), load_model_tensors(store.newest_good()))
    with pytest.raises(
        UserError, match=r"extra/anchor has shape \(4,\) and torch.float64 in the run but shape"
    ):
        store.load(store.newest_good(), other, None, extra={"anchor": torch.zeros(4, dtype=torch.float64)})


def test_later_changes_do_not_leak_into_a_background_save(tmp_path, monkeypatch):
    model, optimizer = make()
    train(model, optimizer, range(2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    write = module.write_tensors

    def slow(*args):
        time.sleep(0.2)
        return write(*args)

    monkeypatch.setattr(module, "write_tensors", slow)
    store = open_store(tmp_path, asynchronous=True)
    for step in (2, 3):  # the second one meets reused buffers
        store.save(step, model, optimizer, {})
        saved = {key: value.clone() for key, value in model.state_dict().items()}
        train(model, optimizer, range(step, step + 1))
    store.wait()
    assert_equal_bits(before, load_model_tensors(store.all()[1]))
    assert_equal_bits(saved, load_model_tensors(store.all()[0]))


def test_nothing_is_pickled(tmp_path):
    model, optimizer = make()
    train(model, optimizer, range(1))
    store = open_store(tmp_path)
    store.save(1, model, optimizer, {"nan": float("nan"), "pair": (1, 2)})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=pytest.fail)
        else:
            with safe_open(path, framework="pt") as pieces:
                assert all(pieces.get_tensor(key) is not None for key in pieces.keys())


def test_keep_last_and_best(tmp_path):
    model, optimizer = make()
    store = open_store(tmp_path, keep_last=2, keep_best=1)
    for step, score in enumerate([3.0, 1.0, 2.0, None, float("nan"), 4.0]):
        store.save(step, model, optimizer, {}, score=score)
    assert [(c.step, c.score) for c in store.all()] == [(5, 4.0), (4, None), (1, 1.0)]


def test_saving_a_step_again_replaces_it(tmp_path):
    model, optimizer = make()
    store = open_store(tmp_path, keep_last=1)
    for turn in (1, 2):
        store.save(7, model, optimizer, {"turn": turn})
    assert store.read_plain(store.newest_good()) == {"turn": 2}
    assert [path.name for path in tmp_path.iterdir()] == [step_folder(7)]


@pytest.mark.parametrize("value", [torch.zeros(1), object(), {1: 2}, {"a": [b"bytes"]}])
def test_only_plain_values(tmp_path, value):
    with pytest.raises(UserError, match=r"plain\.here.* cannot be saved"):
        open_store(tmp_path).save(1, *make(), {"here": value})
    assert not list(tmp_path.iterdir())


class Replica:
    """Worker 1 of two simulated ones."""

    rank, size = 1, 2


def test_among_simulated_workers_only_the_first_writes(tmp_path):
    model, optimizer = make()
    store = CheckpointStore(tmp_path, Replica(), keep_last=1, keep_best=0, asynchronous=True)
    store.save(1, model, optimizer, {})
    store.wait()
    assert store.newest_good() is None
    open_store(tmp_path).save(1, model, optimizer, {"a": 1})
    assert store.load(store.newest_good(), *make(seed=3)) == {"a": 1}
