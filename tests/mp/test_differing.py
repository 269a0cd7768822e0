"""Real processes that hold different models or settings are told so, all of them, before any exchange."""

import pytest
import torch
from torch import nn

from hardy.config import UserError
from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.comm import WorkerLostError
from hardy.distributed.config import DiLoCoConfig
from hardy.distributed.groups import split

pytestmark = pytest.mark.mp


def test_workers_with_another_model_or_other_settings_are_named_on_all(run_workers):
    def body(comm):
        grid = split(comm, replicas=2, shards=1)

        def build(width, every_steps):
            model = nn.Linear(5, width)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            trained = Trained(model=model, optimizer=optimizer, unit_names=[], comm=comm, grid=grid)
            return build_strategy(DiLoCoConfig(every_steps=every_steps), trained)

        build(3, 4)
        with pytest.raises(UserError, match=r"workers \[1\] have other parameters .* than worker 0"):
            build(3 + comm.rank, 4)
        with pytest.raises(UserError, match=r"workers \[1\] have other strategy settings than worker 0"):
            build(3, 4 + comm.rank)

    run_workers(body, size=2)


def test_a_group_that_a_worker_does_not_help_to_make_is_not_waited_for_without_a_word(run_workers):
    def body(comm):
        if comm.rank == 0:
            with pytest.raises(WorkerLostError, match="worker 0 of 2 could not finish 'divide'"):
                split(comm, replicas=2, shards=1)

    run_workers(body, size=2, timeout_s=0.5)
