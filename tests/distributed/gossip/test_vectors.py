"""Vectors of a model: what they hold, where it lies, and the way to a checkpoint and back."""

import pytest
import torch
from torch import nn

from hardy.config import UserError
from hardy.distributed.gossip.vectors import BUFFERS, Vectors, all_finite


def make():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False))
    model[0].bias.requires_grad_(False)
    return model


def test_trainable_parameters_come_by_unit_then_floating_buffers():
    model = make()
    vectors = Vectors(model, ["2"], with_buffers=True)
    assert vectors.names == ["0", "1", BUFFERS] and vectors.sizes == (6 + 6, 3, 6)
    assert vectors.num_parameters == 21 and vectors.parameter_sets == 2 and len(vectors) == 3
    assert torch.equal(vectors.read(2), torch.tensor([0.0] * 3 + [1.0] * 3))
    assert len(Vectors(model, ["2"])) == 2


def test_what_is_written_is_read_and_nothing_else_changes():
    model = make()
    vectors, bias = Vectors(model, ["2"], with_buffers=True), model[0].bias.clone()
    for index, size in enumerate(vectors.sizes):
        vectors.write(index, torch.arange(float(size)))
    assert [v.tolist() for v in vectors.read_all()] == [list(range(size)) for size in vectors.sizes]
    assert model[0].weight.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert model[1].running_var.tolist() == [3.0, 4.0, 5.0] and int(model[1].num_batches_tracked) == 0
    assert torch.equal(model[0].bias, bias)


def test_gradients_are_read_and_replaced_and_missing_ones_are_zero():
    model = make()
    vectors = Vectors(model, [], with_buffers=True)
    model[2].weight.grad = torch.ones(1, 3)
    (grads,) = vectors.read_gradients()
    assert grads.tolist() == [0.0] * 12 + [1.0] * 3
    vectors.write_gradients([torch.arange(15.0)])
    assert model[0].weight.grad.flatten().tolist() == list(range(6)) and model[0].bias.grad is None
    assert model[2].weight.grad.tolist() == [[12.0, 13.0, 14.0]]


def test_places_count_over_the_whole_model():
    vectors = Vectors(make(), ["2"], with_buffers=True)
    located = vectors.located(vectors.read_all(), with_buffers=True)
    assert [(start, len(x)) for start, x in located] == [(0, 6), (6, 3), (9, 3), (12, 3), (15, 3), (18, 3)]
    assert len(vectors.located(vectors.read_all(), with_buffers=False)) == 4


def test_vectors_go_to_a_checkpoint_by_parameter_and_come_back():
    vectors = Vectors(make(), ["2"], with_buffers=True, dtype=torch.float64)
    values = [torch.randn(n, dtype=torch.float64) for n in vectors.sizes]
    packed = vectors.pack("x", values)
    assert set(packed) == {"x/0.weight", "x/1.weight", "x/1.bias", "x/2.weight", "x/buffers"}
    assert packed["x/0.weight"].shape == (3, 2)
    back = vectors.unpack("x", packed, vectors.zeros())
    assert all(torch.equal(a, b) for a, b in zip(values, back, strict=True))
    del packed["x/2.weight"]
    with pytest.raises(UserError, match="the checkpoint has no x/2.weight; resume with the model"):
        vectors.unpack("x", packed, vectors.zeros())


def test_a_vector_may_be_divided_as_it_is_written():
    model = nn.Linear(2, 1)
    vectors = Vectors(model, [])
    vectors.write(0, torch.tensor([1.0, 2.0, 3.0]), over=4.0)
    assert model.weight.tolist() == [[0.25, 0.5]] and model.bias.item() == 0.75 and model.weight.requires_grad


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_seen(fault):
    parts = [torch.ones(1000, dtype=torch.bfloat16), torch.zeros(0), torch.full((5,), -3e38)]
    assert bool(all_finite(parts)) and bool(all_finite([])) and bool(all_finite([torch.zeros(0)]))
    parts[0][777] = fault
    assert not bool(all_finite(parts))
