"""From settings to a rule at work, before there is a model."""

import pytest
import torch

from hardy.config import ConfigError, from_dict
from hardy.distributed.robust.build import build_combiner
from hardy.distributed.robust.config import AttackConfig, RobustConfig
from hardy.distributed.robust.fastest_config import FastestConfig
from hardy.train.config import TrainConfig


def configured(**settings):
    return from_dict(TrainConfig, {"strategy": {"name": "robust", "pre": [], **settings}}).strategy


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"f": 3}, r"'trimmed_mean' cannot bear strategy.f=3 among 5 workers; lower it to at most 2"),
        ({"arguments": ["kep=3"]}, "strategy.arguments: .*setting of the rule 'trimmed_mean', 'kep'"),
        (
            {"rule": "centered_clip", "f": 1, "arguments": ["tau=abc"]},
            "strategy.arguments: centered_clip.tau must be a number above 0 or none, got 'abc'",
        ),
        (
            {"attack": {"name": "ipm", "workers": [0], "arguments": ["strength=abc"]}},
            "strategy.attack.arguments: ipm.strength must be a number.*, got 'abc'",
        ),
        (
            {"attack": {"name": "ipm", "workers": [0], "arguments": ["strngth=1"]}},
            "strategy.attack.arguments: .*argument of attack 'ipm' 'strngth'; did you mean 'strength'",
        ),
        ({"attack": {"name": "nan", "workers": [5]}}, r"strategy.attack.workers names \[5\]"),
        ({"f": 2, "fastest": {"k": 4}}, "strategy.fastest.k=4 of N=5 replicas with strategy.f=2"),
        ({"f": 1, "rule": "krum", "fastest": {"k": 4}}, "'krum' cannot bear strategy.f=1 among 4 workers"),
    ],
)
def test_what_cannot_work_is_refused_without_a_model(settings, text):
    with pytest.raises(ConfigError, match=text):
        build_combiner(configured(**settings), num_workers=5)


def test_rule_and_attack_are_those_of_the_settings():
    attack = {"name": "ipm", "workers": [0], "arguments": ["strength=4"], "from_step": 1}
    combine = build_combiner(configured(rule="mean", f=1, attack=attack), num_workers=5)
    assert combine.aggregator.num_faulty == 1
    means = [combine([torch.ones(5, 1)], step=step, total=lambda x: x)[0].item() for step in (0, 1)]
    assert means == pytest.approx([1, 0], abs=1e-6)


def test_draws_go_by_the_seed():
    config = configured(rule="mean", f=0, attack={"name": "gaussian", "workers": [0]})
    one, same, other = (
        build_combiner(config, num_workers=3, seed=seed)([torch.ones(3, 2)], step=0, total=lambda x: x)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_arguments_are_read_as_settings_are():
    combine = build_combiner(configured(rule="multi_krum", f=1, arguments=["keep=none"]), num_workers=5)
    assert combine.aggregator.rule.keep is None


@pytest.mark.parametrize("where", [{"fastest": FastestConfig(k=4)}, {"worker": "rank"}])
@pytest.mark.parametrize("attack", [("stale", ()), ("replay", ()), ("mimic", ("warmup_steps=3",))])
def test_an_attack_that_keeps_gradients_is_refused_where_rows_or_columns_change(where, attack):
    name, arguments = attack
    played = AttackConfig(name=name, workers=(1,), arguments=arguments)
    with pytest.raises(ConfigError, match=f"attack.name='{name}' .* keeps gradients .* leave out strategy"):
        build_combiner(RobustConfig(attack=played, **where), num_workers=5)
    build_combiner(RobustConfig(attack=played), num_workers=5)
    played = AttackConfig(name="mimic", workers=(1,))
    build_combiner(RobustConfig(attack=played, **where), num_workers=5)
