"""What gossip refuses to begin with, and what it warns of."""

import pytest
import torch
from torch import nn

from hardy.config import ConfigError, UserError
from hardy.distributed.comm import Alone
from hardy.distributed.gossip.build import build_push_sum
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.groups import FixedGroup
from hardy.distributed.simulation import SimWorld


def build(model, outer, config=None):
    return build_push_sum(config or PushSumConfig(), model, unit_names=[], inner=Alone(), outer=outer)


def test_one_replica_and_narrow_messages_are_warned_of(caplog):
    build(nn.Linear(2, 2), Alone())
    assert "push_sum with one replica sends to nobody" in caplog.text
    SimWorld(2).run(lambda comm: build(nn.Linear(2, 2), comm, PushSumConfig(comm_dtype="bf16")) and None)
    assert "kept only up to the rounding of bf16" in caplog.text


class WithoutMail:
    """A communicator that only meets."""

    rank, size, bytes_sent = 0, 1, 0


def test_a_group_without_mail_is_refused_and_one_with_is_taken_as_it_is():
    with pytest.raises(TypeError, match="WithoutMail has no mail; give Alone, TorchComm"):
        build(nn.Linear(2, 2), WithoutMail())
    group = FixedGroup(Alone())
    assert build(nn.Linear(2, 2), group).group is group


def test_narrow_parameters_are_refused_and_wide_ones_computed_with():
    with pytest.raises(
        ConfigError, match="parameters in torch.bfloat16 would lose .* train.precision to bf16"
    ):
        build(nn.Linear(2, 2, dtype=torch.bfloat16), Alone())
    assert build(nn.Linear(2, 2, dtype=torch.float64), Alone()).vectors.dtype == torch.float64
    assert build(nn.Linear(2, 2), Alone()).vectors.dtype == torch.float32


def test_frozen_parameters_must_be_equal_everywhere():
    def body(comm, *, equal):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        for param in model.parameters():
            nn.init.constant_(param, 0.5)
        model[1].weight.requires_grad_(False)
        if not equal and comm.rank == 1:  # the same numbers in another order
            model[1].weight[0, 0] += 1
            model[1].weight[1, 1] -= 1
        build(model, comm)

    SimWorld(2).run(lambda comm: body(comm, equal=True))
    with pytest.raises(UserError, match="frozen parameter 1.weight differs between replicas"):
        SimWorld(2).run(lambda comm: body(comm, equal=False))
