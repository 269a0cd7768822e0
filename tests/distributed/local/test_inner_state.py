"""The inner optimizer's state when replicas meet."""

import torch
from torch import nn

from hardy.distributed.comm import Alone
from hardy.distributed.local import inner_state
from hardy.distributed.simulation import SimWorld


def trained(rank=0, steps=2):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(params, lr=0.1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + rank)
        optimizer.step()
    return params, optimizer


def test_reset_forgets_the_state_of_some_parameters_only():
    params, optimizer = trained()
    inner_state.reset(optimizer, params[:1])
    assert params[0] not in optimizer.state and params[1] in optimizer.state
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1 and optimizer.state[params[1]]["step"] == 3


def test_averages_moments_and_leaves_counters():
    def body(comm):
        params, optimizer = trained(comm.rank, steps=1 + comm.rank)
        inner_state.average(optimizer, params[:1], comm)
        return [optimizer.state[p]["exp_avg"].clone() for p in params], optimizer.state[params[0]]["step"]

    (first, count), (second, other) = SimWorld(2).run(body)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    assert torch.allclose(first[0], torch.full((3,), (0.1 + 0.38) / 2)) and (count, other) == (1, 2)


def test_what_is_not_finite_is_begun_anew_and_nothing_else():
    params, optimizer = trained()
    assert not inner_state.repair(optimizer, params, Alone()) and len(optimizer.state) == 2
    optimizer.state[params[1]]["exp_avg_sq"][0] = torch.inf
    assert not inner_state.repair(optimizer, params[:1], Alone())
    assert inner_state.repair(optimizer, params, Alone()) and not optimizer.state


def test_a_replica_repairs_where_any_of_its_workers_must():
    def body(comm):
        params, optimizer = trained()
        if comm.rank == 1:
            optimizer.state[params[0]]["exp_avg"][1] = torch.nan
        return inner_state.repair(optimizer, params, comm)

    assert SimWorld(3).run(body) == [True] * 3


def test_the_setting_says_what_happens():
    for how, left in (("keep", 2), ("reset", 0), ("average", 2)):
        params, optimizer = trained()
        inner_state.settle(how, optimizer, params, Alone())
        assert len(optimizer.state) == left
