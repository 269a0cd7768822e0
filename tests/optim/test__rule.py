"""What rules are built from: specs of state, bundles, tables of coefficients."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hardy.ops.updates import Place
from hardy.optim import _rule
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
        projections={},
        params=params,
        grads=grads,
        grad_scale=step.get("grad_scale"),
        found_inf=step.get("found_inf"),
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


class Preparing:
    """A back end that prepares sweeps and counts what it is asked for."""

    def __init__(self):
        self.bound_to, self.prepared, self.runs, self.calls = 0, 0, 0, 0
        self.memory, self.addresses, self.can_move = [], [], True

    def whereabouts(self, device):
        return self.bound_to

    def prepare(self, sweep, tasks, memory):
        self.prepared += 1
        self.memory = [x.data_ptr() for x in memory]
        return None if tasks == "cannot" else self

    def move(self, addresses):
        self.addresses = addresses
        return self.can_move

    def run(self):
        self.runs += 1

    def adam(self, tasks):
        self.calls += 1


def preparing_bundle(monkeypatch, params):
    backend = Preparing()
    monkeypatch.setattr(_rule, "choose_backend", lambda name, device: backend)
    monkeypatch.setattr(_rule, "preparing", lambda backend: backend)
    made = bundle(params, [None] * len(params))
    made.group |= {"backend": "auto", "betas": [0.9, 0.99]}
    for member in made.members:
        member.rule = SimpleNamespace(defaults={"betas": (0.9, 0.99)})
    return made, backend


def test_a_sweep_is_prepared_once_and_told_where_memory_lies(monkeypatch):
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    made, backend = preparing_bundle(monkeypatch, params)
    grads, buffer = [torch.zeros(2), torch.zeros(2)], torch.zeros(3)
    state = [torch.zeros(2), torch.zeros(2)]

    def sweep(*, epoch=0, tasks="tasks", buffer=buffer):
        for member, value in zip(made.members, state, strict=True):
            member.local = {"exp_avg": value}
        made.bring(params, list(grads), grad_scale=None, found_inf=None)
        made.sweep("adam", buffer, tasks=lambda: tasks, epoch=epoch)
        made.drop()
        return backend.prepared

    assert [sweep(), sweep()] == [1, 1] and backend.runs == 2 and backend.calls == 0
    assert backend.addresses == backend.memory
    for change in (lambda: grads.__setitem__(1, torch.ones(2)), lambda: state.__setitem__(0, torch.ones(2))):
        change()
        assert sweep() == 1 and backend.addresses != backend.memory
    assert sweep(buffer=torch.zeros(3)) == 1
    assert backend.addresses == [x.data_ptr() for x in (*params, *grads, *state)] + backend.addresses[-1:]
    backend.can_move = False
    assert sweep() == 2
    backend.can_move = True
    grads[1] = None
    assert [sweep(), sweep()] == [3, 3]
    assert [sweep(epoch=1), sweep(epoch=1)] == [4, 4]
    made.group["bf16_update"] = "nearest"
    assert sweep(epoch=1) == 5
    backend.bound_to = 1
    assert sweep(epoch=1) == 6
    assert backend.calls == 0 and backend.runs == 12


def test_a_sweep_that_cannot_be_prepared_is_called(monkeypatch):
    params = [nn.Parameter(torch.zeros(2))]
    made, backend = preparing_bundle(monkeypatch, params)
    made.bring(params, [torch.zeros(2)], grad_scale=None, found_inf=None)
    made.sweep("adam", tasks=lambda: "cannot")
    assert (backend.prepared, backend.calls) == (1, 1)
    backend.bound_to = None  # a CUDA graph is captured
    made.sweep("adam", tasks=lambda: "tasks")
    assert (backend.prepared, backend.calls, backend.runs) == (1, 2, 0)
