"""Ranks as workers: what is refused before any step. On real ranks: tests/mp/test_robust.py."""

import pytest
import torch
from torch import nn

from hardy.config import ConfigError
from hardy.distributed.aggregation import build_aggregator
from hardy.distributed.comm import Alone
from hardy.distributed.robust.combine import Combiner
from hardy.distributed.robust.hooks import RobustRanks, _check_views


def test_a_model_that_nobody_shares_is_refused():
    combine = Combiner(build_aggregator("mean", num_faulty=0), num_workers=1)
    with pytest.raises(ConfigError, match="strategy.worker='rank' needs real workers.*'replica'"):
        RobustRanks(nn.Linear(2, 2), Alone(), combine)


def test_gradients_that_are_copies_are_named():
    model = nn.Linear(3, 2)
    output = torch.zeros(8)
    model.weight.grad, model.bias.grad = output[:6].view(2, 3), output[6:]
    _check_views(model, [output])
    model.bias.grad = output[6:].clone()
    with pytest.raises(ConfigError, match="the gradient of bias is a copy .*strategy.worker='replica'"):
        _check_views(model, [output])
