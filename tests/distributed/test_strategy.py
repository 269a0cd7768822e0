"""The base strategy, where its hooks fire, and the averaging of plain gradients."""

import pytest
import torch
from torch import nn

from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.distributed.strategy import Strategy, Synchronous, buckets, watch_units


class Recorder(Strategy):
    def __init__(self):
        self.names = []

    def before_module_forward(self, name):
        self.names.append(name)

    def after_forward(self):
        self.names.append("end")


def with_gradients(comm, *, missing=()):
    """A model of two dtypes whose gradients tell the rank."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double(), nn.Linear(2, 1))
    for number, param in enumerate(model.parameters()):
        if number not in missing:
            param.grad = torch.full_like(param, float(comm.rank + number))
    return model


def test_units_are_told_before_they_run_in_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    recorder = Recorder()
    handles = watch_units(model, ["0", "1", "1.0"], recorder)
    model(torch.ones(2))
    with torch.no_grad():  # as the first pass of re-entrant recomputation
        model(torch.ones(2))
    model.eval()(torch.ones(2))
    for handle in handles:
        handle.remove()
    model(torch.ones(2))
    assert recorder.names == ["0", "1", "1.0", "end"] * 3


def test_gradients_are_averaged_in_place_over_dtypes():
    def body(comm):
        model = with_gradients(comm)
        grads = [param.grad for param in model.parameters()]
        Synchronous(model, comm).reduce_gradients()
        assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
        return [(grad.dtype, grad.unique().tolist()) for grad in grads], comm.bytes_sent

    dtypes = [torch.float32] * 2 + [torch.float64] * 2 + [torch.float32] * 2
    for averaged, bytes_sent in SimWorld(4).run(body):
        assert averaged == [(dtype, [1.5 + number]) for number, dtype in enumerate(dtypes)]
        assert bytes_sent == 2 * 3 / 4 * ((8 + 3) * 4 + 6 * 8)  # 11 fp32 and 6 fp64 numbers in two buckets


def test_a_parameter_without_gradient_contributes_zeros():
    def body(comm):
        model = with_gradients(comm, missing=(1,) if comm.rank == 0 else (5,))
        Synchronous(model, comm).reduce_gradients()
        return [param.grad.unique().tolist() for param in model.parameters()]

    assert SimWorld(2).run(body) == [[[0.5], [1.0], [2.5], [3.5], [4.5], [2.5]]] * 2


def test_frozen_parameters_are_left_alone():
    def body(comm):
        model = with_gradients(comm, missing=(0,))
        model[0].weight.requires_grad_(False)
        Synchronous(model, comm).reduce_gradients()
        return model[0].weight.grad

    assert SimWorld(2).run(body) == [None, None]


def test_alone_gradients_keep_their_bits_and_none_appears():
    model = with_gradients(Alone(), missing=(3,))
    before = [param.grad for param in model.parameters()]
    Synchronous(model, Alone()).reduce_gradients()
    assert [param.grad is grad for param, grad in zip(model.parameters(), before, strict=True)] == [True] * 6
    assert before[3] is None


@pytest.mark.parametrize(
    ("bucket_bytes", "sizes"), [(1, [[2], [3], [4]]), (17, [[2, 3], [4]]), (10**6, [[2, 3, 4]])]
)
def test_buckets_close_when_they_are_full(bucket_bytes, sizes):
    parameters = [torch.zeros(size) for size in (2, 3, 4)]
    assert [[p.numel() for p in bucket] for bucket in buckets(parameters, bucket_bytes=bucket_bytes)] == sizes


def test_the_base_strategy_shows_the_training_weights_and_has_no_state():
    strategy = Strategy()
    with strategy.evaluation_parameters():
        pass
    assert strategy.state_dict() == {}
