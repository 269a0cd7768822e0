"""From settings to torch's optimizers."""

import copy
import typing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hardy.config import ConfigError, from_dict
from hardy.optim.build import OPTIMIZERS, build_optimizer, hyperparameters, set_learning_rate
from hardy.optim.config import (
    AdafactorConfig,
    AdamWConfig,
    AdaptiveAdamWConfig,
    APOLLOConfig,
    APOLLOMiniConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
    SMMFConfig,
    TorchConfig,
)
from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini
from hardy.train.config import TrainConfig

CONFIGS = [
    pytest.param(AdamWConfig(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3), id="adamw"),
    pytest.param(SGDConfig(lr=0.02, momentum=0.7, nesterov=True, weight_decay=0.3), id="sgd"),
]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1)).double()


def train(model, optimizer, *, num_steps):
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_the_table_has_every_optimizer_of_the_config():
    variants = typing.get_args(OptimizerConfig)
    assert list(OPTIMIZERS) == [variant().name for variant in variants if not variant.any_name_like]


def test_adamw_hands_on_every_setting_and_is_fused():
    optimizer = build_optimizer(CONFIGS[0].values[0], small_model())
    assert type(optimizer) is torch.optim.AdamW
    matrices, vectors = optimizer.param_groups
    assert matrices["param_names"] == ["0.weight", "2.weight"]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    for group in (matrices, vectors):
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.02, (0.8, 0.9), 1e-6, True)


def test_adamw_on_a_device_without_fused_kernels_is_multi_tensor():
    group = build_optimizer(AdamWConfig(), small_model().to("meta")).param_groups[0]
    assert (group["fused"], group["foreach"]) == (None, True)


def test_sgd_hands_on_every_setting():
    optimizer = build_optimizer(CONFIGS[1].values[0], small_model())
    assert type(optimizer) is torch.optim.SGD
    matrices, vectors = optimizer.param_groups
    assert (matrices["lr"], matrices["momentum"], matrices["nesterov"]) == (0.02, 0.7, True)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)


def test_the_fused_adamw_equals_the_plain_loop():
    ours, plain = small_model(), small_model()
    config = AdamWConfig(lr=0.02, weight_decay=0.3)
    train(ours, build_optimizer(config, ours), num_steps=5)
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    matrices = [p for p in plain.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    train(plain, torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), foreach=False), num_steps=5)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_sharded_by_fsdp2_takes_the_same_steps(config, tmp_path):
    whole = small_model()
    sharded = copy.deepcopy(whole)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(sharded)
        train(sharded, build_optimizer(config, sharded), num_steps=3)
        train(whole, build_optimizer(config, whole), num_steps=3)
        for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b, rtol=1e-12, atol=1e-14)
    finally:
        dist.destroy_process_group()


def test_the_learning_rate_reaches_every_group_also_as_a_tensor():
    optimizer = build_optimizer(SGDConfig(), small_model())
    optimizer.param_groups[1]["lr"] = torch.tensor(0.5)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert torch.is_tensor(optimizer.param_groups[1]["lr"])
    assert optimizer.param_groups[1]["lr"].item() == 0.25


OWN = {
    AdaptiveAdamW: (AdaptiveAdamWConfig(lr=0.02, eps=1e-7, beta2=0.98), {"eps": 1e-7, "betas": (0.9, 0.98)}),
    APOLLO: (APOLLOConfig(lr=0.02, rank=2, limiter="off"), {"rank": 2, "limiter": "off", "eps": 1e-12}),
    APOLLOMini: (APOLLOMiniConfig(lr=0.02, scale=3.0), {"rank": 1, "scale": 3.0, "scale_type": "tensor"}),
    SMMF: (SMMFConfig(lr=0.02, beta1=0.5, max_update=4.0), {"beta1": 0.5, "max_update": 4.0}),
}


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
def test_our_own_get_the_settings_and_leave_those_of_other_kinds_alone(cls):
    config, expected = OWN[cls]
    optimizer = build_optimizer(config, small_model())
    assert type(optimizer) is cls
    matrices = next(g for g in optimizer.param_groups if "0.weight" in g["param_names"])
    assert {key: matrices[key] for key in expected} == expected
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    vectors = next(g for g in optimizer.param_groups if "0.bias" in g["param_names"])
    if cls is not AdaptiveAdamW:
        assert (vectors["kind"], vectors["eps"], vectors["betas"]) == ("adamw", 1e-8, (0.9, 0.999))


def test_any_optimizer_of_torch_by_its_dotted_name():
    settings = {
        "optim": {"name": "torch.optim.RMSprop", "lr": 0.1, "arguments": ["alpha=0.5", "momentum=0.25"]}
    }
    config = from_dict(TrainConfig, settings).optim
    optimizer = build_optimizer(config, small_model())
    assert type(optimizer) is torch.optim.RMSprop
    assert {(g["alpha"], g["momentum"], g["lr"]) for g in optimizer.param_groups} == {(0.5, 0.25, 0.1)}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (TorchConfig(name="torch.optim.RMSprob"), "torch.optim.RMSprop"),
        (TorchConfig(name="torch.optim.LBFGS"), "LBFGS cannot train here: it computes the loss again"),
        (TorchConfig(name="torch.optim.SparseAdam"), "SparseAdam cannot train here: it takes sparse .*; cho"),
        (TorchConfig(arguments=("alpha",)), "name=value pairs, got 'alpha'"),
        (TorchConfig(arguments=("alpah=0.5",)), "did you mean 'alpha'"),
    ],
)
def test_what_a_named_class_does_not_know_is_refused(config, text):
    with pytest.raises(ConfigError, match=text):
        build_optimizer(config, small_model())


@pytest.mark.parametrize("config", [MuonConfig(), AdafactorConfig()], ids=lambda config: config.name)
def test_rules_that_need_whole_matrices_refuse_shards(config, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Linear(4, 4, bias=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ConfigError, match=rf"optim.name={config.name} needs whole matrices"):
            build_optimizer(config, model)
    finally:
        dist.destroy_process_group()


def test_settings_of_groups_are_told_from_what_they_hold_and_did():
    optimizer = build_optimizer(APOLLOConfig(lr=0.02, rank=2), small_model())
    for settings in hyperparameters(optimizer):
        assert not settings.keys() & {"params", "param_names", "calls", "kind", "role", "initial_lr"}
        assert settings["lr"] == 0.02
