"""Saving, resuming bit for bit, damage of every kind, crashes at every moment, full disks, what is kept."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hardy.config import UserError
from hardy.distributed.comm import Alone
from hardy.rng import generator_for
from hardy.train import checkpoint as module
from hardy.train import durable, manifest
from hardy.train.checkpoint import CheckpointError, CheckpointStore
from hardy.train.manifest import newest_good, step_folder
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
    with pytest.raises(UserError, match=r"extra/anchor has shape \(4,\) and torch.float64 in the run but shape"):
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
                assert all(pieces.get_tensor(key) is not None for key in pieces.keys())  # noqa: SIM118


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


DAMAGES = {"truncate": truncate, "flip": flip, "delete": Path.unlink, "empty": lambda path: path.write_bytes(b"")}
FILES = ["manifest.json", "index.json", "plain.json", "rank-0000.safetensors"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, file, damage):
    model, optimizer = make()
    store = open_store(tmp_path, keep_last=3)
    for step in (1, 2):
        train(model, optimizer, range(step, step + 1))
        store.save(step, model, optimizer, {"step": step})
    DAMAGES[damage](tmp_path / step_folder(2) / file)
    with caplog.at_level(logging.WARNING):
        found = store.newest_good()
    assert found.step == 1
    assert step_folder(2) in caplog.text
    assert f"using the previous checkpoint {tmp_path / step_folder(1)} instead" in caplog.text
    assert store.load(found, *make()) == {"step": 1}
    store.save(3, model, optimizer, {})
    assert [c.step for c in store.all()] == [3, 1]  # the damaged one is gone and did not count
    assert not (tmp_path / step_folder(2)).exists()


def test_a_flipped_byte_at_any_place_is_found(tmp_path):
    model, optimizer = nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    open_store(tmp_path).save(1, model, optimizer, {})
    for path in (tmp_path / step_folder(1)).iterdir():
        good = path.read_bytes()
        for place in range(0, len(good), 7):
            path.write_bytes(good[:place] + bytes([good[place] ^ 0x80]) + good[place + 1 :])
            with pytest.raises(UserError, match="no checkpoint in"):
                newest_good(tmp_path)
        path.write_bytes(good)
    assert newest_good(tmp_path)[0].step == 1


def test_garbage_and_leftovers(tmp_path, caplog):
    model, optimizer = make()
    store = open_store(tmp_path)
    assert store.newest_good() is None
    store.save(1, model, optimizer, {})
    (tmp_path / step_folder(2)).mkdir()  # empty
    (tmp_path / step_folder(3)).mkdir()
    (tmp_path / step_folder(3) / "manifest.json").write_text('{"checksum": 3, "body": []}')
    (tmp_path / step_folder(4)).mkdir()
    (tmp_path / step_folder(4) / "manifest.json").write_text("[" * 100_000)
    shutil.copytree(tmp_path / step_folder(1), tmp_path / step_folder(5))  # tells another step
    shutil.copytree(tmp_path / step_folder(1), tmp_path / ".tmp-step-00000009")
    (tmp_path / "notes.txt").write_text("not ours")
    assert store.newest_good().step == 1
    assert all(step_folder(step) in caplog.text for step in (2, 3, 4, 5))
    store.save(6, model, optimizer, {})
    assert {path.name for path in tmp_path.iterdir()} == {step_folder(1), step_folder(6), "notes.txt"}


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    model, optimizer = make()
    store = open_store(tmp_path)
    for step in (1, 2):
        store.save(step, model, optimizer, {})
    for step in (1, 2):
        truncate(tmp_path / step_folder(step) / "plain.json")
    with pytest.raises(UserError, match=r"2 are damaged: .*00000002.*00000001.*backup, or delete them"):
        store.newest_good()


def test_the_only_good_one_survives_damaged_newer_ones(tmp_path):
    model, optimizer = make()
    store = open_store(tmp_path, keep_last=5)
    for step in (1, 2, 3):
        store.save(step, model, optimizer, {})
    for step in (2, 3):
        flip(tmp_path / step_folder(step) / "rank-0000.safetensors")
    store = open_store(tmp_path, keep_last=2)
    assert store.newest_good().step == 1
    store.save(2, model, optimizer, {"again": True})
    assert store.newest_good().step == 2
    assert [c.step for c in store.all()] == [2, 1]


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


class Killed(BaseException):
    """The process ends here: no handler of the library runs."""


@pytest.mark.parametrize("same_step", [False, True])
def test_a_crash_at_any_call_leaves_a_good_checkpoint(tmp_path, monkeypatch, same_step):
    calls, limit = 0, 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == limit:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in [(os, "replace"), (os, "fsync"), (os, "rename"), (shutil, "rmtree"), (Path, "mkdir")]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(durable.hashlib, "blake2b", counted(durable.hashlib.blake2b))
    model, optimizer = make()
    new = 1 if same_step else 2
    seen = set()
    for limit in range(1, 200):  # noqa: B007  read by `counted`
        folder = tmp_path / str(limit)
        calls, stop, limit = 0, limit, 0
        open_store(folder).save(1, model, optimizer, {"turn": 1})
        calls, limit = 0, stop
        try:
            open_store(folder, keep_last=1).save(new, model, optimizer, {"turn": 2})
        except Killed:
            pass
        else:
            break
        limit = 0
        store = open_store(folder)
        found = store.newest_good()
        seen.add(store.load(found, *make())["turn"])
        store.save(3, model, optimizer, {"turn": 3})  # and the run goes on
        assert store.newest_good().step == 3
        assert all(path.name.startswith("step-") for path in folder.iterdir())
    assert seen == {1, 2}
    assert stop > 12


def save_forever(folder):
    """Save in a loop tensors that all hold the step's number."""
    torch.set_num_threads(1)
    model = nn.ParameterList([nn.Parameter(torch.zeros(20_000)) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    store = CheckpointStore(Path(folder), Alone(), keep_last=2, keep_best=0, asynchronous=True)
    found = store.newest_good()
    step = store.load(found, model, optimizer)["step"] if found else 0
    while True:
        step += 1
        for param in model:
            param.data.fill_(step)
        store.save(step, model, optimizer, {"step": step})


def test_kill_minus_nine_at_any_moment(tmp_path):
    chance = generator_for(0, "moment of death")
    fork = multiprocessing.get_context("fork")
    last = 0
    for _ in range(20):
        child = fork.Process(target=save_forever, args=(tmp_path,), daemon=True)
        child.start()
        time.sleep(0.05 + 0.15 * torch.rand((), generator=chance).item())
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found, damaged = newest_good(tmp_path)
        assert not damaged
        if found is not None:
            assert found.step >= last
            last = found.step
            assert manifest.read_document(found)["plain"] == {"step": last}
            for value in load_model_tensors(found).values():
                assert torch.equal(value, torch.full_like(value, last))
    assert last > 20


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("place", ["write_tensors", "write_json", "sync_folder"])
def test_a_full_disk_costs_one_checkpoint(tmp_path, monkeypatch, caplog, asynchronous, place):
    model, optimizer = make()
    store = open_store(tmp_path, asynchronous=asynchronous)
    store.save(1, model, optimizer, {})
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(module, place, full_disk)
        store.save(2, model, optimizer, {})
        with pytest.raises(CheckpointError, match=r"step 2 .*No space left.* needs [\d,]+ bytes, [\d,]+ bytes are"):
            store.wait()
        assert store.last_error is not None and "step 2" in caplog.text
        assert store.newest_good().step == 1
        assert [path.name for path in tmp_path.iterdir()] == [step_folder(1)]
    store.save(3, model, optimizer, {})
    store.wait()
    assert store.last_error is None
    assert [c.step for c in store.all()] == [3, 1]


def test_too_little_space_is_told_before_writing(tmp_path, monkeypatch):
    model, optimizer = make()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1234, 1234))
    monkeypatch.setattr(module, "write_tensors", pytest.fail)
    store = open_store(tmp_path)
    store.save(1, model, optimizer, {})
    with pytest.raises(CheckpointError, match=r"too little space left.*1,234 bytes are free.*checkpoint.keep_last"):
        store.wait()
    assert not list(tmp_path.iterdir())


def test_a_fault_of_ours_in_the_background_is_raised(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("bug")

    model, optimizer = make()
    monkeypatch.setattr(module, "write_json", broken)
    store = open_store(tmp_path, asynchronous=True)
    store.save(1, model, optimizer, {})
    with pytest.raises(RuntimeError, match="bug"):
        store.wait()
    store.wait()  # told once


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
