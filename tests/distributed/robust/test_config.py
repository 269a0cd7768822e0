"""Settings of robust training, and the texts that refuse them."""

import pytest

from hardy.config import ConfigError, from_dict, to_dict
from hardy.distributed.config import StrategyConfig
from hardy.distributed.robust.config import AttackConfig, DStarConfig, RobustConfig, TrustedConfig
from hardy.distributed.robust.fastest_config import FastestConfig


def test_settings_survive_a_dict():
    config = RobustConfig(
        rule="multi_krum", f=2, arguments=("keep=3",), attack=AttackConfig(name="nan", workers=(1, 2))
    )
    assert from_dict(RobustConfig, to_dict(config), path="strategy") == config


def test_dstar_goes_by_what_workers_report():
    config = DStarConfig(f=2)
    assert config.exchange == "scalars" and config.needs_trusted and config.replicas_step_alone
    assert not RobustConfig(worker="rank").replicas_step_alone and not RobustConfig().needs_trusted


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rule": "trimed_mean"}, "did you mean 'trimmed_mean'"),
        ({"pre": ("nmn",)}, "strategy.pre: .*did you mean 'nnm'"),
        ({"pre": ("bucketing",)}, "strategy.pre: .*bucketing:2"),
        ({"pre": ("bucketing:0.5",)}, "strategy.pre: .*'bucketing:0.5' needs a whole number of rows"),
        ({"pre": ("clip:abc",)}, "strategy.pre: .*'clip:abc' needs a number above 0"),
        ({"arguments": ("keep",)}, "strategy.arguments must be name=value"),
        ({"rule": "monna"}, "strategy.rule='monna' leans on each worker's own gradient"),
        ({"exchange": "scalars"}, "strategy.exchange='scalars' needs a rule that goes by each worker's own"),
        ({"rule": "dstar", "pre": (), "worker": "rank"}, "no trusted gradient.*'replica'"),
        ({"worker": "rank", "worker_momentum": 0.9}, "worker_momentum=0.9 cannot act before"),
        ({"rule": "cge", "pre": (), "exchange": "scalars", "worker": "rank"}, "'scalars' needs .*'replica'"),
        ({"rule": "kardam", "fastest": FastestConfig(k=3)}, "'kardam' remembers gradients"),
        (
            {"worker": "rank", "fastest": FastestConfig(k=3)},
            "strategy.fastest needs strategy.worker='replica'",
        ),
        ({"worker_momentum": 1.0}, "strategy.worker_momentum must be .*below 1"),
        ({"history": 0.9}, "strategy.history=0.9 needs a strategy.rule .*'trimmed_mean' does not"),
        ({"history": 0.9, "rule": "mda"}, "strategy.pre=\\['nnm'\\] mixes them; set strategy.pre to arc"),
        (
            {"history": 0.9, "rule": "mda", "pre": (), "fastest": FastestConfig(k=3)},
            "strategy.history=0.9 remembers gradients",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        RobustConfig(**settings)


def test_the_fastest_need_a_trusted_gradient_of_each_step():
    with pytest.raises(ConfigError, match="strategy.trusted.every_steps=2 keeps a gradient"):
        DStarConfig(fastest=FastestConfig(k=3), trusted=TrustedConfig(every_steps=2))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "sign_flp", "workers": (1,)}, "did you mean 'sign_flip'"),
        ({"name": "nan"}, "set both to play an attack"),
        ({"workers": (1,)}, "set both to play an attack"),
        ({"name": "ipm", "workers": (1,), "arguments": ("eps",)}, "strategy.attack.arguments must be"),
    ],
)
def test_an_attack_needs_a_name_and_players(settings, text):
    with pytest.raises(ConfigError, match=text):
        AttackConfig(**settings)


def test_reports_are_believed_only_where_nobody_attacks():
    with pytest.raises(ConfigError, match="plays no attacks"):
        DStarConfig(attack=AttackConfig(name="nan", workers=(1,)))


def test_trusted_text_is_at_least_a_pack():
    with pytest.raises(ConfigError, match=r"strategy.trusted.packs must be"):
        TrustedConfig(packs=0)


def test_both_are_strategies():
    assert {RobustConfig, DStarConfig} <= set(StrategyConfig.__args__)
