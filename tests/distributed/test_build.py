"""From settings to a strategy and its parts."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from hardy.config import ConfigError, from_dict
from hardy.distributed.build import STRATEGIES, Trained, build_strategy, local_parts
from hardy.distributed.comm import Alone
from hardy.distributed.config import AEDiTConfig, DiLoCoConfig, EDiTConfig, LocalSGDConfig, OuterTorchConfig
from hardy.distributed.gossip.push_sum import PushSum
from hardy.distributed.groups import split
from hardy.distributed.local.anomaly import Finite, ZTest
from hardy.distributed.local.averaging import Anchored, Mean, SoftmaxNorm, StepWeighted
from hardy.distributed.local.compression import BF16, Full, Int8, TopK
from hardy.distributed.local.outer import OuterSGD, TorchOuter
from hardy.distributed.local.triggers import EverySeconds, EverySteps
from hardy.distributed.local.updates import LocalUpdates
from hardy.distributed.robust.fastest_strategy import FastestRobust
from hardy.distributed.robust.strategy import Robust
from hardy.distributed.strategy import Synchronous
from hardy.train.config import TrainConfig


def configured(**settings):
    return from_dict(TrainConfig, {"strategy": settings}).strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_name_in_the_table_is_a_setting_and_builds(name):
    needed = {"robust": {"f": 0}, "dstar": {"f": 0}, "streaming_diloco": {"fragments": 2}}
    config = configured(name=name, **needed.get(name, {}))
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grid = split(Alone(), replicas=1, shards=1)
    trained = Trained(
        model=model,
        optimizer=optimizer,
        unit_names=["0"],
        comm=Alone(),
        grid=grid,
        draw_trusted=lambda _number: None,
    )
    kinds = {"synchronous": Synchronous, "push_sum": PushSum, "robust": Robust, "dstar": Robust}
    assert type(build_strategy(config, trained)) is kinds.get(name, LocalUpdates)


def test_the_fastest_are_another_strategy_and_k_is_checked():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grid = replace(split(Alone(), replicas=1, shards=1), replicas=5)
    trained = Trained(
        model=model,
        optimizer=optimizer,
        unit_names=[],
        comm=Alone(),
        grid=grid,
        elect=lambda _step: pytest.fail("nobody makes a step"),
    )
    config = configured(name="robust", f=1, fastest={"k": 3})
    assert type(build_strategy(config, trained)) is FastestRobust
    with pytest.raises(ConfigError, match="with strategy.f=2 faulty: k must be at least 2f . 1 = 5"):
        build_strategy(configured(name="robust", f=2, fastest={"k": 4}), trained)
    with pytest.raises(ConfigError, match="cannot bear strategy.f=1 among 3 workers; lower it to at most 0"):
        build_strategy(configured(name="robust", rule="krum", f=1, fastest={"k": 3}), trained)


def test_parts_follow_the_settings():
    edit = local_parts(EDiTConfig())
    assert isinstance(edit.trigger, EverySteps) and isinstance(edit.aggregation, SoftmaxNorm)
    assert isinstance(edit.anomaly(3), ZTest) and isinstance(edit.compression, Full)
    outer = edit.outer_optimizer
    assert isinstance(outer, OuterSGD) and (outer.lr, outer.momentum, outer.nesterov) == (0.8, 0.85, True)
    assert isinstance(local_parts(AEDiTConfig()).trigger, EverySeconds)
    local = local_parts(LocalSGDConfig())
    assert isinstance(local.aggregation, Mean) and isinstance(local.anomaly(2), Finite)
    assert isinstance(local_parts(LocalSGDConfig(step_share=0.5)).aggregation, StepWeighted)
    assert isinstance(local_parts(LocalSGDConfig(aggregate="anchored")).aggregation, Anchored)
    for name, kind in {"bf16": BF16, "int8": Int8, "topk": TopK}.items():
        assert isinstance(
            local_parts(configured(name="diloco", compression={"name": name})).compression, kind
        )


def test_any_optimizer_of_torch_may_move_the_anchor():
    config = OuterTorchConfig(name="torch.optim.Adam", lr=0.1, arguments=("betas=(0.5, 0.9)",))
    outer = local_parts(DiLoCoConfig(outer=config)).outer_optimizer
    assert isinstance(outer, TorchOuter)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("torch.optim.Adam", ("betas",), "^strategy.outer.arguments must be name=value pairs, got 'betas'"),
        (
            "torch.optim.Adam",
            ("foo=1", "eps=0.1"),
            r"^strategy.outer.name, strategy.outer.arguments: the outer optimizer torch.optim.Adam\(lr=1.0, "
            r"foo=1, eps=0.1\) cannot be used: .* unexpected keyword argument 'foo'",
        ),
        ("torch.optim.Adam", ("lr=2",), "^strategy.outer.arguments has lr=2; set strategy.outer.lr to it"),
        ("torch.optim.Adan", (), "^strategy.outer.name: .*did you mean 'torch.optim.Adam'"),
        ("torch.optim.LBFGS", (), "^strategy.outer.name: .*LBFGS evaluates the loss"),
    ],
)
def test_an_outer_optimizer_that_cannot_be_is_refused_by_its_settings(name, arguments, text):
    with pytest.raises(ConfigError, match=text):
        local_parts(DiLoCoConfig(outer=OuterTorchConfig(name=name, arguments=arguments)))


def one_unit_alone():
    model = nn.Sequential(nn.Linear(2, 2))
    return Trained(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        unit_names=["0"],
        comm=Alone(),
        grid=split(Alone(), replicas=1, shards=1),
    )


def test_one_replica_is_told_that_it_exchanges_with_nobody(caplog):
    trained = one_unit_alone()
    with caplog.at_level(logging.WARNING):
        build_strategy(DiLoCoConfig(), trained)
    assert "strategy.name=diloco with one replica exchanges with nobody" in caplog.text


def test_more_fragments_than_units_are_refused():
    trained = one_unit_alone()
    build_strategy(DiLoCoConfig(fragments=2), trained)
    with pytest.raises(ConfigError, match=r"strategy.fragments=4 is more than the 2 units .* to at most 2"):
        build_strategy(DiLoCoConfig(fragments=4), trained)


def test_a_setting_within_a_preset_leaves_the_rest_of_the_preset():
    config = configured(name="edit", anomaly={"warmup_rounds": 5}, outer={"lr": 0.5})
    assert (config.anomaly.name, config.anomaly.warmup_rounds, config.anomaly.delta) == ("ztest", 5, 3.0)
    assert (config.outer.lr, config.outer.momentum, config.outer.nesterov) == (0.5, 0.85, True)
    other = configured(name="edit", anomaly={"name": "finite"}, outer={"name": "torch.optim.Adam", "lr": 0.1})
    assert other.anomaly.name == "finite" and not hasattr(other.outer, "momentum")
    assert from_dict(TrainConfig, {"strategy": {"mesh": {"shards": 2}}}).strategy.mesh.shards == 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "dstar", "f": 0}, "rule='dstar' needs the gradient of a trusted batch; give Trained a"),
        ({"name": "robust", "f": 0, "fastest": {"k": 1}}, "strategy.fastest needs a coordinator"),
    ],
)
def test_what_a_loop_of_ones_own_must_give_is_named(settings, text):
    model, comm = nn.Linear(2, 2), Alone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grid = split(comm, replicas=1, shards=1)
    trained = Trained(model=model, optimizer=optimizer, unit_names=[], comm=comm, grid=grid)
    with pytest.raises(ConfigError, match=text):
        build_strategy(configured(**settings), trained)
