"""Damage of every kind, crashes at every moment, full disks: each costs the steps since the last good one."""

import errno
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
from torch import nn

from hardy.config import UserError
from hardy.distributed.comm import Alone
from hardy.rng import generator_for
from hardy.train import checkpoint as module
from hardy.train import durable, manifest
from hardy.train.checkpoint import CheckpointError, CheckpointStore
from hardy.train.manifest import newest_good, step_folder
from hardy.train.storage import load_model_tensors


def make():
    """Return a model and its optimizer after one step, so that there is state."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def open_store(folder, *, keep_last=10, asynchronous=False):
    return CheckpointStore(Path(folder), Alone(), keep_last=keep_last, keep_best=0, asynchronous=asynchronous)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


DAMAGES = {
    "truncate": truncate,
    "flip": flip,
    "delete": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
}
FILES = ["manifest.json", "index.json", "plain.json", "rank-0000.safetensors"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, file, damage):
    model, optimizer = make()
    store = open_store(tmp_path, keep_last=3)
    for step in (1, 2):
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
    model = nn.Linear(2, 2)
    open_store(tmp_path).save(1, model, torch.optim.SGD(model.parameters(), lr=0.1), {})
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


class Killed(BaseException):
    """The process ends here: no handler of the library runs."""


@pytest.mark.parametrize("same_step", [False, True])
def test_a_crash_at_any_call_leaves_a_good_checkpoint(tmp_path, monkeypatch, same_step):
    calls, limit, stop = 0, 0, 0

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
    for stop in range(1, 200):
        folder = tmp_path / str(stop)
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
    assert last > 5  # on a busy machine, too, some were saved


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
        with pytest.raises(
            CheckpointError, match=r"step 2 .*No space left.* needs [\d,]+ bytes, [\d,]+ bytes are"
        ):
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
    with pytest.raises(
        CheckpointError, match=r"too little space left.*1,234 bytes are free.*checkpoint.keep_last"
    ):
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
