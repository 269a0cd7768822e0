"""What is written where, and reading it back through torch.distributed.checkpoint."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hardy.config import UserError
from hardy.distributed.comm import Alone
from hardy.train import manifest
from hardy.train.durable import write_json, write_tensors
from hardy.train.manifest import INDEX, PLAIN, Checkpoint, DamagedError
from hardy.train.peers import Peers
from hardy.train.storage import (
    SafetensorsReader,
    copy_to_memory,
    fill,
    load_model_tensors,
    mesh_of,
    plan_write,
    read_index,
)

TENSORS = {
    "model/a": torch.arange(12.0).reshape(3, 4),
    "model/scalar": torch.tensor(7),
    "model/empty": torch.zeros(0, 4),
    "optim/a/half": torch.ones(2, dtype=torch.bfloat16),
}


def write(folder, tensors):
    """Write a checkpoint of one worker."""
    plan = plan_write(tensors, Peers(Alone()))
    files = {
        plan.file: write_tensors(folder / plan.file, plan.pieces),
        INDEX: write_json(folder / INDEX, plan.index),
        PLAIN: write_json(folder / PLAIN, {}),
    }
    found = Checkpoint(folder=folder, step=1, score=None, world_size=1, mesh=None, versions={}, files=files)
    manifest.write_manifest(found)
    return found


def zeros():
    return {key: torch.zeros_like(value) for key, value in TENSORS.items()}


def test_the_plan_counts_bytes_and_keeps_the_live_tensors():
    plan = plan_write(TENSORS, Peers(Alone()))
    assert plan.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert plan.pieces["model/a"].data_ptr() == TENSORS["model/a"].data_ptr()
    assert mesh_of(TENSORS) is None


def test_copies_reuse_the_buffers_that_fit():
    first = copy_to_memory({"a": torch.ones(2), "b": torch.ones(3)}, buffers={})
    places = {name: copy.data_ptr() for name, copy in first.items()}
    second = copy_to_memory({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.int64)}, buffers=first)
    assert second["a"].data_ptr() == places["a"] and not second["a"].any()
    assert second["b"].dtype == torch.int64 and second["b"].data_ptr() != places["b"]


def test_tensors_come_back(tmp_path):
    found, targets = write(tmp_path, TENSORS), zeros()
    fill(targets, found)
    assert all(torch.equal(targets[key], value) for key, value in TENSORS.items())
    assert load_model_tensors(found).keys() == {"a", "scalar", "empty"}


def test_any_program_can_read_by_dcp(tmp_path):
    found, targets = write(tmp_path, TENSORS), zeros()
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(targets, storage_reader=SafetensorsReader(found))
    assert all(torch.equal(targets[key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.zeros(3, 5), r"has shape \(3, 5\) and torch.float32 in the run but shape \(3, 4\)"),
        (torch.zeros(3, 4, dtype=torch.float64), "torch.float64 in the run but .*torch.float32 in"),
    ],
)
def test_another_shape_or_dtype_is_refused_before_anything_is_read(tmp_path, target, text):
    found, targets = write(tmp_path, TENSORS), zeros()
    with pytest.raises(UserError, match=text):
        fill(targets | {"model/a": target}, found)
    assert not targets["model/scalar"]


def test_a_dtype_that_cannot_be_saved_is_refused():
    with pytest.raises(UserError, match="tensor 'model/z' cannot be saved"):
        plan_write({"model/z": torch.zeros(1, dtype=torch.complex64)}, Peers(Alone()))


def cut(index):
    index["tensors"]["model/a"]["chunks"] = []


def lead_out(index):
    index["tensors"]["model/a"]["chunks"][0]["file"] = "../secret.safetensors"


def invent(index):
    index["tensors"]["model/a"]["dtype"] = "F7"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (cut, "covers 0 elements"),
        (lead_out, "names .*secret"),
        (invent, "cannot be read"),
        (list.clear, "read"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, change, text):
    found = write(tmp_path, TENSORS)
    index = json.loads((tmp_path / INDEX).read_text()) if change is not list.clear else [1]
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(DamagedError, match=text):
        read_index(found)


def test_what_fails_while_reading_is_an_ordinary_error(tmp_path):
    found = write(tmp_path, TENSORS)
    (tmp_path / "rank-0000.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError, match="could not be loaded"):
        fill(zeros(), found)
