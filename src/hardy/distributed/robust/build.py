"""From settings to a rule at work: the part of a robust strategy that needs no model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hardy.config import ConfigError, Text, read_arguments
from hardy.distributed.aggregation import Aggregator
from hardy.distributed.aggregation.build import build_rule
from hardy.distributed.aggregation.preaggregation import build_pre_aggregator
from hardy.distributed.attacks import build_attack
from hardy.distributed.robust.combine import Combiner, Played
from hardy.distributed.robust.config import CombinedConfig


def build_combiner(config: CombinedConfig, *, num_workers: int, seed: int = 0) -> Combiner:
    """Return the rule that `config` describes, with the attack that is to be played.

    Args:
        config: the settings.
        num_workers: whose gradients are combined: replicas, or ranks where `strategy.worker` says so.
        seed: of what is drawn.

    Raises:
        ConfigError: an argument that is refused, more faulty workers than the rule bears, an attacker who is
            none of them, or a k of `strategy.fastest` that does not fit.

    Example:
        >>> from hardy.distributed.robust.config import RobustConfig
        >>> build_combiner(RobustConfig(f=1), num_workers=2)
        Traceback (most recent call last):
        ...
        hardy.config.ConfigError: 'trimmed_mean' after 'nnm' cannot bear strategy.f=1 among 2 workers; lower \
it to at most 0, or let at least 3 workers take part
    """
    arguments = _read(config.arguments, setting="strategy.arguments")
    with _named("strategy.arguments"):
        rule = build_rule(config.rule, arguments)
    aggregator = Aggregator(
        rule,
        num_faulty=config.f,
        pre=[build_pre_aggregator(text) for text in config.pre],
        on_excess=config.on_excess,
        seed=seed,
        rows_are="workers",
        history=config.history,
    )
    played = None
    if config.attack.name != "none":
        further = _read(config.attack.arguments, setting="strategy.attack.arguments")
        with _named("strategy.attack.arguments"):
            attack = build_attack(config.attack.name, arguments=further, seed=seed)
        if attack.remembers_columns:
            _check_whole_rows(config)
        played = Played(attack=attack, workers=config.attack.workers, from_step=config.attack.from_step)
    if config.fastest is not None:
        config.fastest.check(replicas=num_workers, num_faulty=config.f)
        aggregator.check(config.fastest.k)
    return Combiner(aggregator, num_workers=num_workers, played=played)


def _check_whole_rows(config: CombinedConfig) -> None:
    """Refuse an attack that keeps gradients where each call brings other rows or columns."""
    setting = "strategy.fastest" if config.fastest is not None else "strategy.worker='rank'"
    if config.fastest is not None or config.worker == "rank":
        raise ConfigError(
            f"strategy.attack.name={config.attack.name!r} with strategy.attack.arguments="
            f"{list(config.attack.arguments)} keeps gradients from step to step, and with {setting} each "
            f"worker combines other parts of them every time; choose another attack, such as drift, or leave "
            f"out {setting}"
        )


def _read(pairs: Sequence[str], *, setting: str) -> dict[str, Any]:
    """Return arguments as they were typed, for the setting that each lands in to read."""
    given = read_arguments(pairs, setting=setting)
    return {name: Text(value) if isinstance(value, str) else value for name, value in given.items()}


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Say in a refusal where the value was given."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from None
