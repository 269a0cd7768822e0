"""Checkpoints of real processes: any layout reads any other's, bit for bit; all hear of any failure."""

import errno

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hardy.distributed.comm import Alone
from hardy.rng import generator_for
from hardy.train import checkpoint as module
from hardy.train.checkpoint import CheckpointError, CheckpointStore
from hardy.train.manifest import newest_good
from hardy.train.state import state_of
from hardy.train.storage import load_model_tensors

pytestmark = pytest.mark.mp


class Net(nn.Module):
    """Rows that do not divide by four: 6, 3 (an empty shard), 1 (three empty shards); and buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.empty(1))
        for name, param in self.named_parameters():
            param.data.copy_(torch.randn(param.shape, generator=generator_for(0, name)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x):
        self.seen += 1
        return self.second(self.first(x).tanh()) * self.scale


def lay_out(model, layout):
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    if layout == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))
    return model


def train(model, optimizer, steps):
    for step in steps:  # every worker the same data, so that the mean gradient has the bits of one worker's
        x = torch.randn(4, 5, generator=generator_for(0, "x", step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def whole(model, optimizer):
    tensors = state_of(model, optimizer).tensors.items()
    return {key: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for key, v in tensors}


def go_on(folder, layout, steps):
    """Return a worker's body: load the newest, train, save, train on; return the states loaded and saved."""

    def body(comm):
        model = lay_out(Net(), layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        store = CheckpointStore(folder, comm, keep_last=5, keep_best=0, asynchronous=True)
        loaded = None
        found = store.newest_good()
        if found:
            store.load(found, model, optimizer)
            loaded = whole(model, optimizer)
        train(model, optimizer, steps)
        saved = whole(model, optimizer)
        store.save(steps[-1] + 1, model, optimizer, {"layout": layout})
        train(model, optimizer, range(100, 102))  # collectives beside those of the background
        store.wait()
        return loaded, saved

    return body


def assert_equal_bits(a, b):
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("layouts", [["one", "ddp", "hsdp", "one"], ["fsdp", "ddp", "fsdp", "one"]])
def test_every_layout_reads_every_other(run_workers, tmp_path, layouts):
    sizes = {"one": 1, "ddp": 2, "hsdp": 4, "fsdp": 4}
    folder = tmp_path / "checkpoints"
    before = None
    for turn, layout in enumerate(layouts):
        body = go_on(folder, layout, range(2 * turn, 2 * turn + 2))
        results = [body(Alone())] if layout == "one" else run_workers(body, size=sizes[layout], timeout_s=30)
        (tmp_path / "store").unlink(missing_ok=True)
        for loaded, saved in results:
            if turn:
                assert_equal_bits(before, loaded)
            assert_equal_bits(results[0][1], saved)
        before = results[0][1]
    reference = Net()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    train(reference, optimizer, range(2 * len(layouts)))
    assert_equal_bits(before, whole(reference, optimizer))  # never stopped, never split
    found, damaged = newest_good(folder)
    assert not damaged and found.step == 2 * len(layouts)
    assert_equal_bits(dict(reference.state_dict()), load_model_tensors(found))


def test_replicas_share_the_writing_and_the_mesh_is_noted(run_workers, tmp_path):
    folder = tmp_path / "checkpoints"
    run_workers(go_on(folder, "hsdp", range(1)), size=4, timeout_s=30)
    found, _ = newest_good(folder)
    assert (found.world_size, found.mesh) == (4, {"replica": 2, "shard": 2})
    pieces = [found.files[f"rank-{rank:04d}.safetensors"].num_bytes for rank in range(4)]
    assert max(pieces) < 2 * min(pieces)


def test_a_full_disk_at_one_worker_is_told_to_all(run_workers, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"

    def body(comm):
        model = lay_out(Net(), "ddp")
        optimizer = torch.optim.AdamW(model.parameters())
        store = CheckpointStore(folder, comm, keep_last=5, keep_best=0, asynchronous=True)
        store.save(1, model, optimizer, {})
        store.wait()
        write = module.write_tensors
        if comm.rank == 1:
            module.write_tensors = full
        store.save(2, model, optimizer, {})
        with pytest.raises(CheckpointError, match="step 2 .*No space left"):
            store.wait()
        module.write_tensors = write
        assert store.newest_good().step == 1
        store.save(3, model, optimizer, {})
        store.wait()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    run_workers(body, timeout_s=30)
    assert {path.name for path in folder.iterdir()} == {"step-00000001", "step-00000003"}


def test_a_fault_of_ours_at_one_worker_is_raised_at_all(run_workers, tmp_path):
    def body(comm):
        model = lay_out(Net(), "ddp")
        store = CheckpointStore(tmp_path / "c", comm, keep_last=5, keep_best=0, asynchronous=False)
        module.write_tensors = broken if comm.rank == 1 else module.write_tensors
        with pytest.raises(RuntimeError, match="KeyError: 'bug'"):
            store.save(1, model, torch.optim.SGD(model.parameters(), lr=0.1), {})

    def broken(*args):
        raise KeyError("bug")

    run_workers(body, timeout_s=30)
