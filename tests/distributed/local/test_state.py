"""What local updates remember, by name, and back."""

import pytest
import torch
from torch import nn

from hardy.config import UserError
from hardy.distributed.local import state as local_state
from hardy.distributed.local.units import Units
from hardy.distributed.simulation import SimWorld


def units_of():
    return Units(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), ["0"])


VECTORS = {"anchor/0/A": torch.arange(4.0), "outer/1/momentum": torch.arange(9.0)}
SMALL = {"anomaly0/mean": torch.ones(2, dtype=torch.float64), "pending0/flags_NU": torch.ones(2, 2) > 0}


def test_vectors_are_saved_by_parameter_and_come_back():
    packed = local_state.pack(units_of(), VECTORS, SMALL, {"round": 3})
    assert packed["anchor/0/A/1.bias"].shape == (1,) and packed["outer/1/momentum/0.weight"].shape == (3, 2)
    vectors, small, plain = local_state.unpack(units_of(), packed)
    assert plain == {"round": 3} and small.keys() == SMALL.keys()
    assert all(torch.equal(vectors[name], value) for name, value in VECTORS.items())


def test_room_has_the_same_tensors_as_what_was_saved():
    packed = local_state.pack(units_of(), VECTORS, SMALL, {})
    room = local_state.room_for(units_of(), packed["about"])
    assert room.keys() == packed.keys()
    for key, value in packed.items():
        if torch.is_tensor(value):
            assert room[key].shape == value.shape and room[key].dtype == value.dtype and not room[key].any()


def test_another_model_is_refused():
    packed = local_state.pack(units_of(), {"outer/1/momentum": torch.zeros(9)}, {}, {})
    other = Units(nn.Sequential(nn.Linear(2, 3)), [])
    with pytest.raises(
        UserError, match="the checkpoint has a unit 1 to exchange, the model has 1; resume with"
    ):
        local_state.unpack(other, packed)
    packed = local_state.pack(units_of(), {"anchor/0/A": torch.zeros(4)}, {}, {})
    with pytest.raises(UserError, match=r"has no anchor/0/A of parameter 0.weight; resume with the model"):
        local_state.unpack(other, packed)


def test_state_of_a_part_is_told_apart():
    state = {"0/momentum": torch.zeros(4), "1/step": torch.tensor(2.0), "count": 3, "7": torch.zeros(2)}
    sorted_out = {(kind, name) for kind, name, _ in local_state.sort_out("outer", state, (4, 9) + (1,) * 6)}
    assert sorted_out == {
        ("vector", "outer/0/momentum"),
        ("small", "outer/1/step"),
        ("plain", "count"),
        ("small", "outer/7"),
    }


def test_a_state_is_shared_whatever_is_in_it():
    state = {"anchors": [torch.arange(3.0)], "counters": {"round": 2}, "text": "x" * 100}

    def body(comm):
        mine = state if comm.rank == 1 else {"anchors": []}
        return local_state.share(comm, mine, source=1)

    for got in SimWorld(3).run(body):
        assert torch.equal(got["anchors"][0], state["anchors"][0])
        assert got["counters"] == {"round": 2} and got["text"] == state["text"]
