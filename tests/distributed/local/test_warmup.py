"""Before replicas train alone."""

import pytest
import torch

from hardy.distributed.local.warmup import average_gradients, check_alike
from hardy.distributed.simulation import SimWorld


def test_gradients_are_averaged_also_where_a_replica_has_none():
    def body(comm):
        params = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
        params[0].grad = torch.full((2, 3), float(comm.rank + 1))
        if comm.rank == 1:
            params[1].grad = torch.arange(4.0)
        grads = [param.grad for param in params]
        average_gradients(params, comm)
        assert params[0].grad is grads[0]
        return [param.grad for param in params]

    for first, second in SimWorld(2).run(body):
        assert torch.equal(first, torch.full((2, 3), 1.5)) and torch.equal(second, torch.arange(4.0) / 2)


def test_weights_that_differ_are_named_by_unit():
    def body(comm, *, apart):
        vectors = [torch.ones(3), torch.tensor([1.0, -1.0]), torch.ones(2)]
        if comm.rank == 1:
            for unit in apart:
                vectors[unit] = -vectors[unit]
        check_alike(vectors, comm, names=["", "block", "head"])

    SimWorld(2).run(lambda comm: body(comm, apart=[]))
    with pytest.raises(RuntimeError, match="weights differ in the root, head before they train alone"):
        SimWorld(2).run(lambda comm: body(comm, apart=[0, 2]))
    # The sum of (1, -1) is that of (-1, 1): only weights whose sums differ are found.
    SimWorld(2).run(lambda comm: body(comm, apart=[1]))
