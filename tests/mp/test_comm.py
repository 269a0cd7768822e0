"""Real processes that die or fall silent."""

import os

import pytest
import torch

from hardy.distributed.comm import TorchComm, WorkerLostError

pytestmark = pytest.mark.mp


def test_the_death_of_a_worker_is_told_to_the_others(run_workers):
    def body(comm: TorchComm):
        comm.barrier()
        if comm.rank == 1:
            os._exit(1)
        with pytest.raises(WorkerLostError) as loss:
            for _ in range(100):
                comm.sum(torch.ones(1000))
        return str(loss.value)

    (text,) = run_workers(body, may_die=(1,))
    assert text.startswith("worker 0 of 2 could not finish 'sum' with the others: one of them died")


def test_a_silent_worker_runs_into_the_time_out(run_workers):
    def body(comm: TorchComm):
        if comm.rank == 1:
            comm.clock.sleep(60)
        with pytest.raises(WorkerLostError, match="came later than the time-out"):
            comm.all_gather(torch.ones(2))
        return "told"

    assert run_workers(body, timeout_s=1.5, may_die=(1,)) == ["told"]
