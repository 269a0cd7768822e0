"""State: a resume changes no bit in any mode, holds tensors and plain values, and fits other replicas."""

import json

import pytest
import torch
from torch import nn

from hardy.distributed.gossip.build import build_push_sum
from hardy.distributed.gossip.config import PushSumConfig, TopologyConfig, WeightsConfig
from hardy.distributed.simulation import SimWorld
from hardy.rng import generator_for

STAR = TopologyConfig(name="star")
ADAPTIVE = WeightsConfig(name="adaptive", sketch_size=64)
EXACT = WeightsConfig(name="adaptive", distance_mode="exact")
CONFIGS = {
    "plain": PushSumConfig(topology=STAR),
    "numerators": PushSumConfig(topology=STAR, store="numerator", mix_every_steps=3),
    "sketches": PushSumConfig(topology=STAR, weights=ADAPTIVE),
    "copies": PushSumConfig(topology=TopologyConfig(name="random_edges"), weights=EXACT),
    "tracking": PushSumConfig(method="gradient_tracking"),
    "tracked sums": PushSumConfig(method="gradient_tracking", on_send_failure="running_sum"),
    "overlap": PushSumConfig(overlap=True, topology=TopologyConfig(name="random_edges"), weights=ADAPTIVE),
    "overlapping sums": PushSumConfig(overlap=True, on_send_failure="running_sum", buffers="mix"),
    "overlapping bf16": PushSumConfig(overlap=True, comm_dtype="bf16", topology=STAR, weights=EXACT),
}


def begin(comm, config):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    with torch.no_grad():
        for place, param in enumerate(model.parameters()):
            param.copy_(torch.randn(param.shape, generator=generator_for(0, comm.rank, place)))
    inner = comm.divide([[rank] for rank in range(comm.size)])
    return model, build_push_sum(config, model, unit_names=["2"], inner=inner, outer=comm)


def steps(comm, model, strategy, which):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for t in which:
        x = torch.randn(6, 4, generator=generator_for(1, comm.rank, t))
        strategy.before_forward()
        model(x).square().mean().backward()
        strategy.reduce_gradients()
        optimizer.step()
        strategy.after_step()
        optimizer.zero_grad()


def outcome(model, strategy):
    strategy.finish()
    return torch.cat([x.flatten().double() for x in model.state_dict().values()]), strategy.mass


def stored(state):
    """Return a copy as a checkpoint would give it back."""
    plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    tensors = {key: value.detach().clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    return json.loads(json.dumps(plain)), tensors


def resumed(comm, config, saved, model_state):
    """Load as `train/run.py` does: make room, fill it, hand it back."""
    model, strategy = begin(comm, config)
    model.load_state_dict(model_state)
    plain, tensors = saved
    strategy.expect(plain)
    room = strategy.state_dict()
    assert {k for k, v in room.items() if isinstance(v, torch.Tensor)} == set(tensors)
    for key, value in tensors.items():
        assert room[key].dtype == value.dtype
        room[key].copy_(value)
    strategy.load_state_dict(plain | {key: room[key] for key in tensors})
    return model, strategy


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cut", [1, 4])
def test_a_resume_changes_no_bit(name, cut):
    config = CONFIGS[name]

    def whole(comm):
        model, strategy = begin(comm, config)
        steps(comm, model, strategy, range(cut))
        stored(strategy.state_dict())  # saving changes nothing
        steps(comm, model, strategy, range(cut, 8))
        return outcome(model, strategy)

    def first(comm):
        model, strategy = begin(comm, config)
        steps(comm, model, strategy, range(cut))
        return stored(strategy.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}

    saved = SimWorld(4).run(first)

    def second(comm):  # in a world of its own: nothing is under way there
        model, strategy = resumed(comm, config, *saved[comm.rank])
        steps(comm, model, strategy, range(cut, 8))
        return outcome(model, strategy)

    def untouched(comm):
        model, strategy = begin(comm, config)
        steps(comm, model, strategy, range(8))
        return outcome(model, strategy)

    want = SimWorld(4).run(untouched)
    for got in (SimWorld(4).run(whole), SimWorld(4).run(second)):
        for (z, mass), (z_want, mass_want) in zip(got, want, strict=True):
            assert torch.equal(z, z_want) and mass == mass_want


@pytest.mark.parametrize("name", ["numerators", "overlap"])
def test_after_the_end_a_run_may_go_on(name):
    config = CONFIGS[name]

    def body(comm, *, interrupted):
        model, strategy = begin(comm, config)
        steps(comm, model, strategy, range(6))
        strategy.finish()
        if interrupted:
            saved = stored(strategy.state_dict()), model.state_dict()
            model, strategy = resumed(comm, config, *saved)
        steps(comm, model, strategy, range(6, 9))
        return outcome(model, strategy)

    want = SimWorld(4).run(lambda comm: body(comm, interrupted=False))
    got = SimWorld(4).run(lambda comm: body(comm, interrupted=True))
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(got, want, strict=True))
    assert sum(mass for _, mass in got) == pytest.approx(4, rel=1e-13)


def test_a_replica_that_reads_anothers_checkpoint_begins_anew_at_its_weights():
    def body(comm):
        model, strategy = begin(comm, CONFIGS["plain"])
        steps(comm, model, strategy, range(3))
        plain, tensors = stored(strategy.state_dict())
        of_another = {"about": plain["about"] | {"replica": (comm.rank + 1) % comm.size}}
        loaded = [
            resumed(comm, CONFIGS["plain"], saved, model.state_dict())[1]
            for saved in ((plain, tensors), (of_another, tensors))
        ]
        return strategy.mass, [(again.mass, again.step, again.round) for again in loaded]

    for mass, [own, others] in SimWorld(3).run(body):
        assert own == (mass, 3, 3) and others == (1.0, 3, 3) and mass != 1.0


def test_among_other_replicas_each_begins_anew_at_its_weights():
    config = CONFIGS["numerators"]

    def first(comm):
        model, strategy = begin(comm, config)
        steps(comm, model, strategy, range(5))
        return stored(strategy.state_dict()), model.state_dict()

    saved = SimWorld(4).run(first)

    def second(comm):
        model, strategy = resumed(comm, config, *saved[0])
        assert (strategy.mass, strategy.step, strategy.round) == (1.0, 5, 1)
        assert torch.equal(strategy.numerators[0], strategy.vectors.read(0))
        steps(comm, model, strategy, range(5, 9))
        return outcome(model, strategy)[1]

    assert sum(SimWorld(3).run(second)) == pytest.approx(3, rel=1e-14)
