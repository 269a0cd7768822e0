"""Workers with different plans are told, all of them, and by name."""

import pytest

from hardy.distributed.balance.agreement import PlanMismatchError, check_same_plan
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld

LARGEST = (1 << 63) - 1


def test_equal_plans_pass():
    check_same_plan(Alone(), LARGEST)
    SimWorld(3).run(lambda comm: check_same_plan(comm, LARGEST))


@pytest.mark.parametrize(
    ("digests", "strays", "most"),
    [
        ([5, 5, 6, 5], [2], 3),
        ([6, 5, 5, 7], [0, 3], 2),
        ([5, 6], [1], 1),
        ([LARGEST, LARGEST - 1, LARGEST], [1], 2),
    ],
)
def test_those_with_another_plan_are_named_on_every_worker(digests, strays, most):
    def body(comm):
        with pytest.raises(PlanMismatchError) as caught:
            check_same_plan(comm, digests[comm.rank])
        return str(caught.value)

    told = SimWorld(len(digests)).run(body)
    assert len(set(told)) == 1
    assert f"workers {strays} have another plan for this step than the other {most} of" in told[0]
