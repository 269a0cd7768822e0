"""What `hardy train --dry-run` shows: the complete settings, and what they come to."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from hardy.cli.output import print_json
from hardy.cli.settings import Resolved
from hardy.config import to_dict
from hardy.train.plan import RunPlan


def show_plan(resolved: Resolved, plan: RunPlan, *, as_json: bool) -> None:
    """Print the run that would start."""
    config = to_dict(resolved.config)
    if as_json:
        print_json({"name": resolved.name, "config": config, "plan": dataclasses.asdict(plan)})
        return
    print("\n".join(as_toml(config)))
    print("\n".join(f"# {line}" for line in plan_lines(plan)))


def as_toml(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a TOML file; a setting that is none, which TOML cannot say, becomes a comment.

    Example:
        >>> list(as_toml({"train": {"steps": 3, "micro_packs": None}}))
        ['[train]', 'steps = 3', '# micro_packs = none', '']
    """
    return _tables(config, path="")


def plan_lines(plan: RunPlan) -> list[str]:
    """Return in words what the settings come to."""
    parameters = "as many parameters as its files say"
    if plan.num_parameters is not None:
        parameters = f"{plan.num_parameters:,} parameters"
    micro = (
        f"{plan.micro.count} micro-batch{'es' if plan.micro.count > 1 else ''} of {plan.micro.packs} packs"
    )
    return [
        f"model: {parameters}",
        f"workers: {plan.num_workers} as {plan.replicas} replicas x {plan.shards} shards",
        f"step: {plan.tokens_per_step:,} tokens; each worker runs {micro}",
        f"run: {plan.steps:,} steps, {plan.total_tokens:,} tokens",
    ]


def _tables(table: Mapping[str, Any], *, path: str) -> Iterator[str]:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if plain:
        if path:
            yield f"[{path}]"
        for key, value in plain.items():
            yield f"# {key} = none" if value is None else f"{key} = {_value(value)}"
        yield ""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _tables(value, path=f"{path}.{key}" if path else key)


def _value(value: Any) -> str:
    """Return one TOML value; TOML's strings, lists, numbers and booleans are written as JSON's."""
    return json.dumps(value, ensure_ascii=False)
