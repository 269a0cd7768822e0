"""Which strategies `hardy simulate` plays, and with which settings. Free of torch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from hardy.config import (
    Config,
    ConfigError,
    from_dict,
    override,
    parse_dotted,
    read_toml,
    to_dict,
    unknown_name,
)
from hardy.distributed.config import AnomalyConfig, LocalUpdateConfig, StrategyConfig
from hardy.distributed.gossip.config import PushSumConfig
from hardy.train.simulate_config import SimulationConfig, read_config

STRATEGIES: dict[str, Any] = {cls.name: cls for cls in get_args(StrategyConfig)}
"""Classes of settings by `strategy.name`."""
DEFAULT_STRATEGIES = ("synchronous", "local_sgd", "diloco", "edit", "a_edit")
"""What is simulated where neither the file nor the command line names any."""
_ROUNDS = 10
"""Rounds of a run whose strategy leaves the interval open."""
_WARMUP_SHARE = 20
"""A warm-up that is left open takes at most one step in so many."""
_WARMUP_ROUNDS = 5
"""Rounds before a z-test that is left open judges."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One strategy of a simulation."""

    label: str
    config: StrategyConfig


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """All that is to be simulated."""

    config: SimulationConfig
    entries: tuple[Entry, ...]


def read_simulation(
    path: Path, *, names: Sequence[str] | None = None, settings: Sequence[str] = ()
) -> Simulation:
    """Read a cluster file, with `--cluster.X`, `--task.X` and `--strategy.X` pairs laid over it.

    Args:
        path: of the TOML file.
        names: strategies to simulate, by label in the file or by name; None takes all of the file.
        settings: pairs as typed. Those of a strategy go to every one that has the setting.

    Raises:
        ConfigError: a name is unknown, a value refused, or a strategy cannot be simulated.
    """
    changes = parse_dotted(settings)
    for section in changes:
        if section not in ("cluster", "task", "strategy"):
            raise ConfigError(unknown_name(section, "section", ["cluster", "task", "strategy"]))
    try:
        data = read_toml(path)
        tables = _tables(data.pop("strategies", []))
        data = override(data, {**changes.get("cluster", {}), "task": {**changes.get("task", {})}})
        config = read_config(data)
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if names is not None:
        tables = [_chosen(name.strip(), tables) for name in names if name.strip()]
    tables = tables or [{"name": name} for name in DEFAULT_STRATEGIES]
    return Simulation(config=config, entries=entries_of(tables, config, changes.get("strategy", {})))


def _tables(given: Any) -> list[dict[str, Any]]:
    """Return the strategies of a file as tables; a name alone stands for its defaults."""
    if not isinstance(given, list):
        raise ConfigError(
            f"strategies must be a list of names or tables, [[strategies]] in TOML, got {given!r}"
        )
    return [{"name": table} if isinstance(table, str) else dict(table) for table in given]


def _chosen(name: str, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the file's table of this label or name, or the defaults of the strategy."""
    for key in ("label", "name"):
        for table in tables:
            if table.get(key) == name:
                return table
    if name.replace("-", "_") not in STRATEGIES:
        labels = [str(table["label"]) for table in tables if "label" in table]
        raise ConfigError("--strategies: " + unknown_name(name, "strategy", [*STRATEGIES, *labels]))
    return {"name": name.replace("-", "_")}


def entries_of(
    tables: Sequence[Mapping[str, Any]], config: SimulationConfig, changes: Mapping[str, Any]
) -> tuple[Entry, ...]:
    """Return the strategies with `changes` laid over those that have such a setting.

    What a table leaves open is fitted to a short run: about ten rounds, a warm-up of at most a twentieth of
    the steps, five rounds before a z-test judges.

    Raises:
        ConfigError: a strategy is unknown or cannot be simulated, or no strategy has a setting of `changes`.
    """
    taken: set[str] = set()
    entries: list[Entry] = []
    for index, table in enumerate(tables):
        path = f"strategies[{index}]"
        name, rest = table.get("name"), {key: value for key, value in table.items() if key != "label"}
        if name not in STRATEGIES:
            raise ConfigError(f"{path}.name: {unknown_name(str(name), 'strategy', STRATEGIES)}")
        mine = {key: value for key, value in changes.items() if _concerns(key, STRATEGIES[name], rest)}
        taken |= mine.keys()
        rest = override(rest, mine)
        label = str(table.get("label", name))
        try:
            built = from_dict(
                STRATEGIES[name], override(_fitted(STRATEGIES[name], rest, config), rest), path="strategy"
            )
            _check_strategy(built, config)
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
        entries.append(Entry(label=label, config=built))
    for key in changes:
        if key not in taken:
            known = {f"strategy.{name}" for cls in STRATEGIES.values() for name in _names(cls)}
            there = f"strategy.{key}" in known - {"strategy.name"}
            raise ConfigError(
                f"none of the strategies takes strategy.{key}: {', '.join(entry.label for entry in entries)}"
                if there
                else unknown_name(f"strategy.{key}", "setting", known - {"strategy.name"})
            )
    return _told_apart(entries)


def _told_apart(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Number labels that come more than once."""
    counts, seen = Counter(entry.label for entry in entries), Counter[str]()
    result: list[Entry] = []
    for entry in entries:
        seen[entry.label] += 1
        number = f" {seen[entry.label]}" if counts[entry.label] > 1 else ""
        result.append(Entry(label=entry.label + number, config=entry.config))
    return tuple(result)


def _names(cls: type[Config]) -> set[str]:
    return {entry.name for entry in fields(cls)}


def _concerns(key: str, cls: type[Config], table: Mapping[str, Any]) -> bool:
    """Whether a setting of the command line is for this strategy: intervals only where it goes by them."""
    if key not in _names(cls) or key == "name" or (key == "elastic" and cls is PushSumConfig):
        return False
    if key in ("every_steps", "every_s", "min_steps"):
        return (key == "every_steps") == (_interval(cls, table) == "every_steps")
    return True


def _interval(cls: Any, table: Mapping[str, Any]) -> str:
    """Return which of the two intervals a strategy goes by."""
    every_s = table.get("every_s", cls.every_s)
    return "every_steps" if every_s is None or str(every_s).lower() == "none" else "every_s"


def _fitted(cls: Any, given: Mapping[str, Any], config: SimulationConfig) -> dict[str, Any]:
    """Return what `given` leaves open, for a short run."""
    if not issubclass(cls, LocalUpdateConfig):
        return {}
    steps, num_units = config.task.steps, config.task.shape().num_layers + 1
    fragments = _number(given, "fragments", min(cls.fragments, num_units))
    is_elastic = str(given.get("elastic", False)).lower() == "true"
    result: dict[str, Any] = {
        "fragments": fragments,
        "warmup_steps": 0 if is_elastic else min(cls.warmup_steps, steps // _WARMUP_SHARE),
    }
    if _interval(cls, given) == "every_s":
        result["every_s"] = min(cls.every_s or math.inf, steps * config.step_s / _ROUNDS)
        result["min_steps"] = min(cls.min_steps, max(1, config.workers * steps // (2 * _ROUNDS)))
    elif cls.every_steps is not None:
        every = min(cls.every_steps, max(1, steps // _ROUNDS))
        result["every_steps"] = every = max(fragments, every - every % fragments)
        every = _number(given, "every_steps", every)
        result["delay_steps"] = max(0, min(cls.delay_steps, every // fragments - 1))
    default = next(entry for entry in fields(cls) if entry.name == "anomaly")
    anomaly = default.default if isinstance(default.default, AnomalyConfig) else AnomalyConfig()
    result["anomaly"] = to_dict(anomaly) | {"warmup_rounds": min(anomaly.warmup_rounds, _WARMUP_ROUNDS)}
    return result


def _number(given: Mapping[str, Any], key: str, default: int) -> int:
    """Return a whole number that was given, as typed or as a number; what is none is refused elsewhere."""
    try:
        return max(1, int(given.get(key, default)))
    except (TypeError, ValueError):
        return default


def _check_strategy(strategy: StrategyConfig, config: SimulationConfig) -> None:
    """Refuse what the simulation does not play."""
    if strategy.mesh.shards > 1:
        raise ConfigError(
            f"strategy.mesh.shards={strategy.mesh.shards} cannot be simulated: each simulated worker holds a "
            f"whole replica; set it to 1, and step_s to what a sharded replica's step takes"
        )
    strategy.mesh.sizes(config.workers)
    if isinstance(strategy, PushSumConfig) and strategy.elastic:
        raise ConfigError(
            "strategy.elastic=true of push_sum cannot be simulated: simulated neighbours of one that dies go "
            "on without it, and form no new graph; set it to false"
        )
    if not isinstance(strategy, LocalUpdateConfig):
        return
    if strategy.copies > 1:
        raise ConfigError(
            f"strategy.copies={strategy.copies} cannot be simulated: each simulated worker is a replica; set "
            f"it to 1, and step_s to what a replica's step takes"
        )
    if strategy.layerwise:
        raise ConfigError(
            "strategy.layerwise=true cannot be simulated: on the virtual clock nothing overlaps a forward "
            "pass; set it to false, the weights are the same bit for bit"
        )
    num_units = config.task.shape().num_layers + 1
    if strategy.fragments > num_units:
        raise ConfigError(
            f"strategy.fragments={strategy.fragments} is more than the {num_units} units of task.model="
            f"{config.task.model}; lower it or take a deeper model"
        )
    whole_s = config.task.steps * config.step_s
    if strategy.every_s is not None and strategy.every_s > whole_s:
        raise ConfigError(
            f"strategy.every_s={strategy.every_s:g} is longer than the whole run of task.steps="
            f"{config.task.steps} x step_s={config.step_s:g} = {whole_s:g} s; lower it or raise task.steps"
        )
