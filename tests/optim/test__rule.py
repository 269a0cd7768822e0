"""What rules are built from: specs of state, bundles, tables of coefficients."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hardy.ops.updates import Place, choose_backend
from hardy.optim._rule import Bundle, Member, StateSpec, compute_dtype, local_shape, own_part, require, table
from hardy.optim._sharded import Shard, Split


def axis(*, size, rank):
    """Return a mesh of which only this worker's place is asked."""
    return SimpleNamespace(size=lambda _: size, get_local_rank=lambda _: rank)


def bundle(params, grads, **step):
    group = {"kind": "adamw", "bf16_update": "kahan"}
    members = [
        Member(
            name=f"p{i}",
            param=param,
            group=group,
            rule=None,
            shard=Shard(tuple(param.shape), (0,) * param.ndim, tuple(param.shape)),
            projection_key=1,
            rounding_key=i,
            specs={},
            alike=(),
        )
        for i, param in enumerate(params)
    ]
    return Bundle(
        group=group,
        members=members,
        params=params,
        grads=grads,
        backend=choose_backend("foreach", torch.device("cpu")),
        grad_scale=step.get("grad_scale"),
        found_inf=step.get("found_inf"),
        projections={},
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_fp64_is_computed_in_fp64(dtype):
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    param = nn.Parameter(torch.zeros(2, dtype=dtype))
    assert compute_dtype(param) == wanted
    made = bundle([param], [None])
    assert made.dtype == made.members[0].compute_dtype == made.allowed().dtype == wanted


@pytest.mark.parametrize(("rank", "own"), [(0, 3), (1, 3), (2, 1)])
def test_state_is_cut_in_chunks_where_a_spec_says_so(rank, own):
    shard = Shard((7, 5), (3 * rank, 0), (own, 5), (Split(0, axis(size=3, rank=rank), 0),))
    assert local_shape(StateSpec(shape=(7, 5), dtype=torch.float32, dims={0: 0, 1: 1}), shard) == (own, 5)
    assert local_shape(StateSpec(shape=(2, 7), dtype=torch.float32, dims={0: 1}), shard) == (2, own)
    assert local_shape(StateSpec(shape=(7, 5), dtype=torch.float32), shard) == (7, 5)


@pytest.mark.parametrize(("rank", "own"), [(0, slice(0, 3)), (1, slice(3, 6)), (2, slice(6, 7))])
def test_a_plain_whole_is_cut_for_its_worker(rank, own):
    shard = Shard((7, 5), (own.start, 0), (own.stop - own.start, 5), (Split(0, axis(size=3, rank=rank), 0),))
    wrapped = SimpleNamespace(splits=shard.splits, wrap=lambda local, shape, dims: local)
    whole = torch.arange(14).view(2, 7)
    spec = StateSpec(shape=(2, 7), dtype=torch.float32, dims={0: 1})
    assert torch.equal(own_part(whole, spec, wrapped), whole[:, own])
    shared = StateSpec(shape=(2, 7), dtype=torch.float32)
    assert torch.equal(own_part(whole, shared, wrapped), whole)


def test_a_table_has_numbers_and_tensors_side_by_side():
    like = torch.zeros(2, 3, dtype=torch.float64)
    column = torch.arange(6).view(2, 3)
    made = table([1.5, column, torch.tensor(2.0), torch.ones(3)], like=like)
    assert made.shape == (2, 3, 4) and made.dtype == torch.float64
    assert torch.equal(made[..., 0], torch.full_like(like, 1.5))
    assert torch.equal(made[..., 1], column.double())
    assert torch.equal(made[..., 2:], torch.tensor([2.0, 1.0]).double().expand(2, 3, 2))


def test_a_refusal_names_kind_setting_and_value():
    group = {"kind": "smmf", "eps": -2}
    require(True, group, "eps", "at least 0")
    with pytest.raises(ValueError, match="eps of a 'smmf' group must be at least 0, got -2"):
        require(False, group, "eps", "at least 0")


def test_a_step_may_be_forbidden_and_gradients_scaled():
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    free = bundle(params, [torch.ones(2), None])
    assert free.allowed() == 1 and free.inverse_scale() == 1.0
    assert torch.equal(free.present(), torch.tensor([1.0, 0.0]))
    held = bundle(params, [None, None], found_inf=torch.tensor([3.0]), grad_scale=torch.tensor([4.0]))
    assert held.allowed() == 0 and held.allowed().ndim == 0  # a scaler adds up flags of several devices
    assert held.inverse_scale() == 0.25 and held.inverse_scale().ndim == 0


def test_small_state_goes_to_a_stack_and_back():
    made = bundle([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))], [None, None])
    held = [torch.tensor(3.0), torch.tensor(4.0)]
    for member, value in zip(made.members, held, strict=True):
        member.local["step"] = value
    stack = made.stacked("step")
    stack += 1
    assert held == [3.0, 4.0]
    made.write_back("step", stack.double())
    assert held == [4.0, 5.0] and held[0].dtype == torch.float32


def test_the_rest_of_kahans_rounding_is_seen_as_the_weight_is():
    made = bundle([nn.Parameter(torch.ones(2, 3, 4, dtype=torch.bfloat16))], [None])
    place, step = Place(base=12, stride=4), torch.tensor(1.0)
    assert made.rounding(0, place, step, shape=(2, 3, 4)).rest is None
    rest = torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)
    made.members[0].local["rest"] = rest
    rounding = made.rounding(0, place, step, shape=(2, 3, 4), level=1)
    assert torch.equal(rounding.rest, rest[1])
    rounding.rest.zero_()
    assert not rest[1].any() and rest[0].any()
    assert made.rounding(0, place, step, shape=(1, 6, 4)).rest.shape == (6, 4)
    assert (rounding.mode, rounding.key, rounding.place) == ("kahan", 0, place)
