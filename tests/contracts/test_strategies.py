"""What every strategy promises; a new one is one line in ENTRIES."""

import json

import pytest
import torch
from torch import nn

from hardy.distributed.build import STRATEGIES, Trained, build_strategy
from hardy.distributed.comm import Alone
from hardy.distributed.config import (
    AEDiTConfig,
    DelayedConfig,
    DiLoCoConfig,
    EDiTConfig,
    LocalSGDConfig,
    PostLocalSGDConfig,
    StreamingDiLoCoConfig,
    SynchronousConfig,
)
from hardy.distributed.gossip.config import PushSumConfig, TopologyConfig, WeightsConfig
from hardy.distributed.groups import split
from hardy.distributed.robust.config import DStarConfig, RobustConfig, TrustedConfig
from hardy.distributed.simulation import SimWorld

ENTRIES = {
    "synchronous": SynchronousConfig(),
    "local_sgd": LocalSGDConfig(every_steps=3),
    "post_local_sgd": PostLocalSGDConfig(every_steps=2, warmup_steps=1),
    "diloco": DiLoCoConfig(every_steps=3),
    "streaming_diloco": StreamingDiLoCoConfig(every_steps=2, fragments=2, delay_steps=0),
    "delayed": DelayedConfig(every_steps=2),
    "edit": EDiTConfig(every_steps=2, warmup_steps=1),
    "a_edit": AEDiTConfig(every_s=1e-9, min_steps=1, warmup_steps=0),
    "robust": RobustConfig(rule="centered_clip", f=0, pre=(), worker_momentum=0.5),
    "dstar": DStarConfig(f=0, trusted=TrustedConfig(every_steps=3)),
    "push_sum": PushSumConfig(
        topology=TopologyConfig(name="star"), weights=WeightsConfig(name="adaptive"), overlap=True
    ),
}
ONLY_AVERAGES = ("synchronous", "local_sgd", "post_local_sgd")
"""What a worker alone does not notice, but for the rounding of fp32 anchors."""
STEPS = 4


@pytest.fixture(params=ENTRIES)
def config(request):
    return ENTRIES[request.param]


def make_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(config, comm, *, steps=range(STEPS), model=None, state=None):
    """Train as the loop does: every moment, in order; each worker has data of its own."""
    model = model or make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grid = split(comm, replicas=comm.size, shards=1)

    def draw_trusted(number):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(10**6 + number))
        model(x).square().mean().backward()

    trained = Trained(
        model=model,
        optimizer=optimizer,
        unit_names=["0", "2"],
        comm=comm,
        grid=grid,
        draw_trusted=draw_trusted,
    )
    strategy = build_strategy(config, trained)
    if state is not None:
        strategy.load_state_dict(state)
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + comm.rank)
        x = torch.randn(5, 3, generator=generator)
        strategy.before_forward()
        model(x).square().mean().backward()
        strategy.reduce_gradients()
        optimizer.step()
        strategy.after_step()
        optimizer.zero_grad()
    return model, strategy


def test_every_strategy_is_in_the_table():
    assert set(ENTRIES) == set(STRATEGIES)


@pytest.mark.parametrize("name", ONLY_AVERAGES)
def test_a_worker_alone_trains_as_without_a_strategy(name):
    model, plain = run(ENTRIES[name], Alone())[0], make_model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(STEPS):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1000 * step))
        plain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (weights_of(model) - weights_of(plain)).abs().max() <= (0 if name == "synchronous" else 1e-6)


def test_the_same_run_twice_gives_the_same_bits(config):
    first, second = (SimWorld(3).run(lambda comm: weights_of(run(config, comm)[0])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_evaluation_shows_equal_weights_and_puts_the_training_weights_back(config):
    def body(comm):
        model, strategy = run(config, comm)
        before = weights_of(model)
        # Gossip has no equal weights but the average, which costs an all-reduce.
        shows = strategy.averaged if config.name == "push_sum" else strategy.evaluation_parameters
        with shows():
            shown = weights_of(model)
        assert torch.equal(weights_of(model), before)
        return shown

    shown = SimWorld(3).run(body)
    assert all(torch.equal(shown[0], other) for other in shown)


def test_state_is_tensors_and_plain_values_and_a_resume_changes_no_bit(config):
    def whole(comm):
        return weights_of(run(config, comm)[0])

    def in_two_parts(comm):
        model, strategy = run(config, comm, steps=range(2))
        state = strategy.state_dict()
        json.dumps({key: value for key, value in state.items() if not isinstance(value, torch.Tensor)})
        return weights_of(run(config, comm, steps=range(2, STEPS), model=model, state=state)[0])

    a, b = SimWorld(2).run(whole), SimWorld(2).run(in_two_parts)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
