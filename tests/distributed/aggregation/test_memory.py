import pytest
import torch

from hardy.distributed.aggregation.columns import Rows
from hardy.distributed.aggregation.memory import Memory
from hardy.distributed.aggregation.stack import identity


def test_everything_comes_back():
    blocks = [torch.arange(6.0).view(3, 2), torch.ones(3, 1)]
    memory = Memory(state={"t": 3, "H": torch.ones(2)}, vector=[torch.zeros(2), torch.ones(1)])
    memory = memory.with_rows(blocks, [0, 2], [10, 11, 12])
    saved = memory.state_dict()
    names = {"t", "H", "vector/0", "vector/1", "row/10/0", "row/10/1", "row/12/0", "row/12/1"}
    assert saved.keys() == names
    back = Memory.of(saved)
    assert back.state["t"] == 3 and torch.equal(back.state["H"], torch.ones(2))
    assert [piece.tolist() for piece in back.vector] == [[0, 0], [1]]
    assert [piece.tolist() for piece in back.last_rows[12]] == [[4, 5], [1]]
    saved["H"].zero_()
    assert memory.state["H"].eq(1).all() and back.state["H"].eq(1).all()


def test_changes_since_the_last_time():
    blocks = [torch.arange(6.0).view(3, 2), torch.ones(3, 1)]
    memory = Memory(state={}).with_rows(blocks, [0, 2], [10, 11, 12])
    now = [blocks[0] + 2, blocks[1]]
    got = memory.changes(Rows(blocks=now, places=[0, 1, 2], total=identity), [12, 11, 10])
    assert got[0].item() == pytest.approx((2 - 4) ** 2 + (3 - 5) ** 2)
    assert got[1].isnan() and got[2].item() == pytest.approx((6 - 0) ** 2 + (7 - 1) ** 2)


def test_before_the_first_vector_it_is_zeros_as_wide_as_sums():
    got = Memory(state={}).vector_for([torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(3, 1).double()])
    assert [(v.tolist(), v.dtype) for v in got] == [([0, 0], torch.float32), ([0], torch.float64)]
