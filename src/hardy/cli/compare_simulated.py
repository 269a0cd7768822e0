"""Results of `hardy simulate` as runs: each strategy is one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardy.cli.compare_events import Event
from hardy.cli.compare_runs import STEP, TIME, TOKENS, Line, Run, flattened
from hardy.config import UserError

RESULTS = "results.json"
"""What `hardy simulate --out FOLDER` writes."""
NOTE = "simulated: time is virtual, steps and tokens are of all workers together"


def read_simulation(file: Path, *, name: str) -> list[Run]:
    """Return the strategies of a simulation's results.

    Raises:
        UserError: the file is no result of `hardy simulate`.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        cluster, strategies = told["cluster"], told["strategies"]
        return [_run(strategy, cluster, name=name) for strategy in strategies]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is not what `hardy simulate --out` wrote") from None


def _run(told: Mapping[str, Any], cluster: Mapping[str, Any], *, name: str) -> Run:
    about = {key: value for key, value in cluster.items() if key != "task"}
    task = {key: value for key, value in cluster["task"].items() if key != "seed"}
    settings = {"cluster": about, "task": task, "strategy": told["settings"]}
    curve = told["curve"]
    x = {STEP: "steps", TOKENS: "tokens", TIME: "virtual_s"}
    places = {axis: [point[key] for point in curve] for axis, key in x.items()}
    found = {
        "validation_loss": told["validation_loss"],
        "best_validation_loss": min((point["validation_loss"] for point in curve), default=None),
        "training_loss": told["train_loss"],
        "steps": told["steps"],
        "tokens": told["tokens"],
        "virtual_s": told["virtual_s"],
        "bytes_sent": told["bytes_sent"],
        "rejected_rounds": told["flagged"],
        "rollbacks": told["rollbacks"],
    }
    events = [
        Event(text=f"worker {worker} left out of rounds", step=None, last_step=None, times=times)
        for worker, times in told["flagged_workers"].items()
    ]
    if told["stopped"]:
        events.append(Event(text=f"stopped: {told['stopped']}", step=told["steps"], last_step=told["steps"]))
    return Run(
        name=f"{name}/{told['label']}",
        config=dict(flattened(settings)),
        seed=cluster["task"]["seed"],
        training=Line(x=places, y=[point["train_loss"] for point in curve]),
        validation=Line(x=places, y=[point["validation_loss"] for point in curve]),
        totals={key: value for key, value in found.items() if value is not None},
        events=events,
        notes=[NOTE],
    )
