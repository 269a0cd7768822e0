"""Masters fill any replicas and take gradients back: exact, by transposed maps, at the predicted bytes."""

import pytest
import torch
from torch import nn

from hardy.balance.plan import Group, Scheme
from hardy.config import UserError
from hardy.distributed.balance.masters import MasterWeights
from hardy.distributed.balance.tensor_parallel import TensorSplits
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.rng import generator_for

SPLITS = TensorSplits(dims={"into.weight": 0, "out.weight": 1}, regions=(), counts={"widths": 12})
# Ranks of the world, first rank and degree of each replica.
LAYOUTS = {
    "2+1+1": (4, [(0, 2), (2, 1), (3, 1)]),
    "4": (4, [(0, 4)]),
    "1+1+1+1": (4, [(0, 1), (1, 1), (2, 1), (3, 1)]),
    "idle+2": (4, [(1, 2)]),
    "2+1 of 3": (3, [(0, 2), (2, 1)]),
    "3+1 of 5": (5, [(0, 3), (3, 1)]),
    "alone": (1, [(0, 1)]),
}


def layout(name):
    world_size, groups = LAYOUTS[name]
    groups = tuple(Group(first_rank=first, scheme=Scheme(tensor=degree)) for first, degree in groups)
    return world_size, groups


class Perceptron(nn.Module):
    """Two shared matrices, and others that every rank has: one of fewer rows than there are ranks."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(5, 12, bias=False), nn.Linear(12, 3, bias=False)
        self.scale = nn.Parameter(torch.empty(2))
        for name, parameter in self.named_parameters():
            parameter.data = draw(parameter.shape, name)


def draw(shape, *purpose):
    return torch.randn(shape, generator=generator_for(0, *purpose), dtype=torch.float64)


def place_in(groups, rank):
    """Return the replica of a rank and its place there."""
    group = next((group for group in groups if rank in group.ranks), None)
    return (None, 0) if group is None else (group, rank - group.first_rank)


def part_of(name, whole, groups, rank):
    """Return what a rank holds of a parameter, written down by itself."""
    group, place = place_in(groups, rank)
    dim = SPLITS.dims.get(name, 0)
    if group is None:
        return whole.narrow(dim, 0, 0)
    return whole.chunk(group.scheme.tensor, dim)[place] if name in SPLITS.dims else whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_computes_with_its_part_of_the_whole(name):
    world_size, groups = layout(name)

    def body(comm):
        model = Perceptron()
        masters = MasterWeights(model, comm, SPLITS)
        for master in masters.parameters():  # of its own memory, so that the complete model can go
            assert master.untyped_storage().nbytes() == master.nbytes
        masters.fill(groups)
        for parameter, value in Perceptron().named_parameters():
            assert torch.equal(model.get_parameter(parameter), part_of(parameter, value, groups, comm.rank))
        return sum(master.numel() for master in masters.parameters())

    kept = SimWorld(world_size).run(body)
    assert sum(kept) == sum(p.numel() for p in Perceptron().parameters()) and max(kept) - min(kept) <= 15


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_add_up_over_replicas_by_the_transposed_map(name):
    """<fill(x), y> = <x, give_back(y)>, where what all ranks of a replica hold alike counts once."""
    world_size, groups = layout(name)

    def body(comm):
        model = Perceptron()
        masters = MasterWeights(model, comm, SPLITS)
        masters.fill(groups)
        group, place = place_in(groups, comm.rank)
        there = torch.zeros((), dtype=torch.float64)
        for parameter_name, parameter in model.named_parameters():
            shared = parameter_name in SPLITS.dims
            tag = comm.rank if shared or group is None else group.first_rank
            parameter.grad = draw(parameter.shape, "y", parameter_name, tag)
            if shared or place == 0:
                there += (parameter.detach() * parameter.grad).sum()
        masters.give_back(groups)
        back = sum((master.detach() * master.grad).sum() for master in masters.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())
        return comm.sum(there).item(), comm.sum(back).item()

    for there, back in SimWorld(world_size).run(body):
        assert there == pytest.approx(back, rel=1e-12) and abs(there) > 1e-3


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_sent_is_what_was_predicted(name, compute_dtype):
    world_size, groups = layout(name)

    def body(comm):
        masters = MasterWeights(Perceptron(), comm, SPLITS, compute_dtype=compute_dtype)
        counts = [comm.bytes_sent]
        masters.fill(groups)
        counts.append(comm.bytes_sent)
        masters.give_back(groups)
        counts.append(comm.bytes_sent)
        want = masters.bytes_of(groups)
        assert counts[1] - counts[0] == want.weights[comm.rank]
        assert counts[2] - counts[1] == want.gradients[comm.rank]
        return sum(want.weights)

    total = SimWorld(world_size).run(body)[0]
    assert (total > 0) == (world_size > 1)


def test_gradients_add_to_nothing_and_missing_ones_are_zeros():
    _, groups = layout("2+1+1")

    def body(comm):
        model = Perceptron()
        masters = MasterWeights(model, comm, SPLITS)
        for _ in range(2):  # the second time nothing is left of the first
            masters.fill(groups)
            if comm.rank == 2:
                model.scale.grad = torch.ones(2, dtype=torch.float64)
            masters.give_back(groups)
        assert not masters.named["into.weight"].grad.any()
        return masters.named["scale"].grad.tolist()

    assert SimWorld(4).run(body) == [[], [1.0], [], [1.0]]


def test_frozen_parameters_are_filled_and_get_no_gradient():
    _, groups = layout("2+1+1")

    def body(comm):
        model = Perceptron()
        model.into.weight.requires_grad_(False)
        masters = MasterWeights(model, comm, SPLITS)
        masters.fill(groups)
        assert not model.into.weight.requires_grad and model.into.weight.abs().sum() > 0
        masters.give_back(groups)
        assert masters.named["into.weight"].grad is None and masters.named["out.weight"].grad is not None

    SimWorld(4).run(body)


def test_an_optimizer_takes_masters_without_rows():
    _, groups = layout("3+1 of 5")

    def body(comm):
        model = Perceptron()
        masters = MasterWeights(model, comm, SPLITS)
        assert (masters.named["scale"].numel() == 0) == (comm.rank not in (2, 4))
        optimizer = torch.optim.AdamW(masters.parameters(), lr=0.1, weight_decay=0.0)
        masters.fill(groups)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        masters.give_back(groups)
        optimizer.step()
        masters.fill(groups)
        return model.scale.tolist()

    before = Perceptron().scale
    for rank, after in enumerate(SimWorld(5).run(body)):
        assert after == pytest.approx([] if rank == 4 else (before - 0.1).tolist(), abs=1e-7)


@pytest.mark.parametrize("precision", ["compute", "master"])
def test_the_model_computes_in_its_dtype_and_masters_keep_theirs(precision):
    _, groups = layout("2+1+1")

    def body(comm):
        model = Perceptron()
        masters = MasterWeights(model, comm, SPLITS, compute_dtype=torch.bfloat16)
        masters.fill(groups, precision=precision)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        masters.give_back(groups)
        assert {master.grad.dtype for master in masters.parameters()} == {torch.float64}
        return {parameter.dtype for parameter in model.parameters()}

    want = torch.bfloat16 if precision == "compute" else torch.float64
    assert SimWorld(4).run(body) == [{want}] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_norm_of_the_gradient_is_that_of_the_whole(dtype):
    _, groups = layout("2+1+1")

    def body(comm):
        model = Perceptron().to(dtype)
        masters = MasterWeights(model, comm, SPLITS)
        assert masters.grad_norm() == 0
        masters.fill(groups)
        if comm.rank == 3:
            for name, parameter in model.named_parameters():
                parameter.grad = draw(parameter.shape, "gradient", name).to(dtype)
        masters.give_back(groups)
        norm = masters.grad_norm()
        torch.nn.utils.clip_grads_with_norm_(masters.parameters(), 0.5, norm)
        assert masters.grad_norm().item() == pytest.approx(0.5, rel=1e-5)
        return norm.item()

    rel = 1e-12 if dtype == torch.float64 else 1e-6
    parts = [draw(p.shape, "gradient", name).flatten() for name, p in Perceptron().named_parameters()]
    assert SimWorld(4).run(body) == [pytest.approx(torch.cat(parts).norm().item(), rel=rel)] * 4


def test_masters_come_back_and_only_where_they_belong(tmp_path):
    def save(comm):
        masters = MasterWeights(Perceptron(), comm, SPLITS)
        torch.save(masters.state_dict(), tmp_path / f"{comm.rank}.pt")

    def load(comm, source):
        model = Perceptron()
        masters = MasterWeights(model, comm, SPLITS)
        for master in masters.parameters():
            master.data.zero_()
        masters.load_state_dict(torch.load(tmp_path / f"{source}.pt", weights_only=True))
        masters.fill(layout("alone")[1] if comm.size == 1 else layout("2+1+1")[1])
        for name, value in Perceptron().named_parameters():
            groups = layout("2+1+1")[1]
            assert torch.equal(model.get_parameter(name), part_of(name, value, groups, comm.rank))

    SimWorld(4).run(save)
    SimWorld(4).run(lambda comm: load(comm, comm.rank))
    with pytest.raises(UserError, match="of rank 1 of 4, and this is rank 0 of 1: each rank loads its own"):
        load(Alone(), 1)
    with pytest.raises(UserError, match=r"of rank 3 of 4, and this is rank 0 of 4.*save the whole model"):
        SimWorld(4).run(lambda comm: load(comm, 3 - comm.rank))


def test_the_state_of_another_model_is_refused():
    masters = MasterWeights(Perceptron(), Alone(), SPLITS)
    state = masters.state_dict()
    state["masters"]["scale"] = torch.zeros(3)
    with pytest.raises(UserError, match="of another model: its parameters have other names or shapes"):
        masters.load_state_dict(state)


def test_models_that_cannot_be_cut_are_refused():
    none = TensorSplits(dims={}, regions=(), counts={})
    model = Perceptron()
    model.again = model.out
    with pytest.raises(UserError, match=r"parameter again.weight is also another one .* by one name"):
        MasterWeights(model, Alone(), none)
    model = Perceptron()
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="parameter scale has no dimension to cut; give it one"):
        MasterWeights(model, Alone(), none)
    strange = TensorSplits(dims={"blocks.0.attention.query.weight": 0}, regions=(), counts={})
    with pytest.raises(UserError, match=r"no parameter blocks.0.attention.query.weight; give the splits of"):
        MasterWeights(Perceptron(), Alone(), strange)
    halves = TensorSplits(dims={"into.weight": 0}, regions=("into", "out"), counts={})
    with pytest.raises(UserError, match="parameter out.weight is in out, .* would count once for every rank"):
        MasterWeights(Perceptron(), Alone(), halves)
