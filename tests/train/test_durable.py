"""Files of tensors in the safetensors format, with the right size and checksum."""

import pytest
import torch
from safetensors.torch import load_file

from hardy.config import UserError
from hardy.train.durable import DTYPES, checksum, record_of, write_json, write_parts, write_tensors

SHAPES = [(), (0,), (3,), (2, 0, 3), (5, 3)]


def test_every_dtype_and_shape_is_read_by_the_safetensors_library(tmp_path):
    tensors = {
        f"{name} {shape}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in SHAPES
    }
    tensors["a column"] = torch.arange(12.0).reshape(3, 4)[:, 1]
    tensors["a transpose"] = torch.arange(12.0).reshape(3, 4).T
    record = write_tensors(tmp_path / "x.safetensors", tensors)
    assert record == record_of(tmp_path / "x.safetensors")
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape
        assert (
            back[key]
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(tensor.contiguous().reshape(-1).view(torch.uint8))
        )


def test_a_file_without_tensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}


def test_a_dtype_the_format_does_not_know_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="tensor 'phase' cannot be saved: its dtype is torch.complex64"):
        write_tensors(tmp_path / "x.safetensors", {"phase": torch.zeros(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


def test_size_and_checksum_are_those_of_the_file(tmp_path):
    big = bytes(range(256)) * 40_000  # several pieces
    record = write_parts(tmp_path / "x", [b"head", memoryview(big)])
    data = (tmp_path / "x").read_bytes()
    assert data == b"head" + big
    assert (record.num_bytes, record.blake2b) == (len(data), checksum(data))


def test_a_file_is_never_overwritten_and_nan_is_no_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "x.json", {"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", float("nan"))
