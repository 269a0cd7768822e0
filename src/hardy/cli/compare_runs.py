"""Run folders as they are read for a comparison: curves, totals, what went wrong. Free of torch.

Read as plain JSON, not as `TrainConfig`, so that runs of other versions can be compared too.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hardy.cli.compare_events import Event, events_of
from hardy.config import UserError
from hardy.train.folder import RunFolder

STEP, TOKENS, TIME = "step", "tokens", "time (s)"
AXES = (STEP, TOKENS, TIME)
"""What losses may stand against."""
OPTIMIZER_KEYS = "optim/"
"""What the keys of an optimizer's tensors in a checkpoint begin with (`train/state.py` says so too)."""
LAST_SHARE = 0.05
"""Share of a run's steps whose mean is its last training loss."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Values along a run, and where they stand on each axis."""

    x: Mapping[str, Sequence[float]]
    y: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, or one strategy of a simulation."""

    name: str
    config: Mapping[str, Any]
    """Settings by dotted key, and by run.* what is known of where it ran."""
    seed: int | None
    training: Line
    validation: Line
    totals: Mapping[str, float]
    """By name in `compare_table.MEASURES`; what was not measured is missing."""
    events: Sequence[Event] = ()
    notes: Sequence[str] = field(default=())
    """What a reader must know of it."""


def read_run(folder: Path, *, name: str) -> Run:
    """Return the run in `folder`.

    Raises:
        UserError: it is no run, or its files cannot be read; the text says what is missing.
    """
    files = RunFolder(folder)
    config = _json_of(files.config_file, missing=f"{folder} is no run folder: config.json is missing")
    if not isinstance(config, dict):
        raise UserError(f"{files.config_file} holds no settings; it is not what `hardy train` wrote")
    records, notes = read_records(files.metrics_file)
    starts = _starts(files.run_file)
    settings = dict(flattened(config)) | dict(flattened(_whereabouts(starts), path="run"))
    if not records:
        notes.append("no step is recorded")
    validation = _line(records, "validation_loss", only_present=True)
    if records and not validation.y:
        notes.append("never evaluated; no validation loss")
    steps = config.get("train", {}).get("steps")
    done = records[-1]["step"] if records else 0
    if records and isinstance(steps, int) and done < steps:
        notes.append(f"unfinished: {done:,} of {steps:,} steps")
    resumed = [start["from_step"] for start in starts if start.get("from_step")]
    return Run(
        name=name,
        config=settings,
        seed=config.get("train", {}).get("seed"),
        training=_line(records, "loss"),
        validation=validation,
        totals=_totals(records, validation) | _optimizer_state(files.checkpoints),
        events=events_of(records, resumed=resumed),
        notes=notes,
    )


def read_records(path: Path) -> tuple[list[Record], list[str]]:
    """Return the records of a metrics file, and what was wrong with its end.

    A run that was killed leaves half a line; that one is left out and told.

    Raises:
        UserError: the file is missing, or a line before the last cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        raise UserError(f"{path.parent} has no metrics.jsonl; was it ever started?") from None
    records: list[Record] = []
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines[: last + 1]):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no step")
        except ValueError:
            if number == last:
                return records, [f"line {number + 1} of metrics.jsonl is cut off (killed?) and left out"]
            raise UserError(
                f"{path}, line {number + 1} is no record of a step; repair or delete that line"
            ) from None
        records.append(record)
    return records, []


def flattened(settings: Mapping[str, Any], *, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by dotted key.

    Example:
        >>> dict(flattened({"optim": {"lr": 0.1}, "log": {"trackers": []}}))
        {'optim.lr': 0.1, 'log.trackers': []}
    """
    for key, value in settings.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from flattened(value, path=here)
        else:
            yield here, value


def number_of(record: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a record, or None."""
    value = record.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def counted(records: Sequence[Record], key: str) -> float | None:
    """Return how far a counter came that may have begun again at a resume; None where there is none.

    Example:
        >>> counted([{"bytes_sent": 5}, {"bytes_sent": 9}, {}, {"bytes_sent": 2}], "bytes_sent")
        11
    """
    values = [value for record in records if (value := number_of(record, key)) is not None]
    if not values:
        return None
    pairs = zip([0, *values], values, strict=False)
    return sum(now - before if now >= before else now for before, now in pairs)


def _json_of(path: Path, *, missing: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(missing) from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _starts(path: Path) -> list[dict[str, Any]]:
    """Return the starts and resumes of a run; a run made by an importer has none."""
    if not path.exists():
        return []
    facts = _json_of(path, missing=f"{path} cannot be read")
    starts = facts.get("starts", []) if isinstance(facts, dict) else []
    return [start for start in starts if isinstance(start, dict)]


def _whereabouts(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is worth comparing of the last start."""
    last = starts[-1] if starts else {}
    torch = last.get("versions", {}).get("torch")
    known = {key: last.get(key) for key in ("num_workers", "commit", "platform")} | {"torch": torch}
    return {key: value for key, value in known.items() if value is not None}


def _seconds(records: Sequence[Record]) -> list[float]:
    """Return how long the run had trained and evaluated by the end of each record."""
    total, seconds = 0.0, []
    for record in records:
        total += number_of(record, "step_time_s") or 0.0
        total += number_of(record, "validation_time_s") or 0.0
        seconds.append(total)
    return seconds


def _line(records: Sequence[Record], key: str, *, only_present: bool = False) -> Line:
    seconds = _seconds(records)
    kept = [place for place, record in enumerate(records) if not only_present or key in record]
    tokens = [number_of(records[place], TOKENS) for place in kept]
    x: dict[str, Sequence[float]] = {STEP: [records[place]["step"] for place in kept]}
    if all(count is not None for count in tokens):
        x[TOKENS] = [count for count in tokens if count is not None]
    x[TIME] = [seconds[place] for place in kept]
    return Line(x=x, y=[number_of(records[place], key) for place in kept])


def _totals(records: Sequence[Record], validation: Line) -> dict[str, float]:
    """Return what a run came to."""
    if not records:
        return {}
    evaluated = [loss for loss in validation.y if loss is not None]
    losses = [loss for record in records if (loss := number_of(record, "loss")) is not None]
    stepping_s = sum(number_of(record, "step_time_s") or 0.0 for record in records)
    tokens = number_of(records[-1], "tokens")
    memory = [size for record in records if (size := number_of(record, "peak_memory_mb")) is not None]
    last = losses[-max(1, round(len(losses) * LAST_SHARE)) :]
    found: dict[str, float | None] = {
        "validation_loss": validation.y[-1] if validation.y else None,
        "best_validation_loss": min(evaluated, default=None),
        "training_loss": sum(last) / len(last) if last else None,
        "steps": records[-1]["step"],
        "tokens": tokens,
        "wall_s": _seconds(records)[-1],
        "tokens_per_s": tokens / stepping_s if tokens and stepping_s > 0 else None,
        "peak_memory": max(memory) * 1e6 if memory else None,
        "bytes_sent": counted(records, "bytes_sent"),
        "wait_s": counted(records, "round_wait_s"),
        "skipped_steps": counted(records, "skipped"),
        "rejected_rounds": _rounds(records, "flagged_replicas"),
        "rollbacks": counted(records, "rollbacks"),
        "removed_steps": _rounds(records, "removed_workers"),
        "lost": counted(records, "lost"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _rounds(records: Sequence[Record], key: str) -> int | None:
    """Return in how many records a list of workers is not empty; None where no record has one."""
    lists = [record[key] for record in records if isinstance(record.get(key), list)]
    return sum(map(bool, lists)) if lists else None


def _optimizer_state(checkpoints: Path) -> dict[str, float]:
    """Return the size of the optimizer's tensors in the newest checkpoint, shards together."""
    for index in sorted(checkpoints.glob("step-*/index.json"), key=_step_of, reverse=True):
        try:
            tensors = json.loads(index.read_text(encoding="utf-8"))["tensors"]
            sizes = [
                math.prod(about["shape"]) * element_bytes(about["dtype"])
                for key, about in tensors.items()
                if key.startswith(OPTIMIZER_KEYS)
            ]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged checkpoint; an older one says the same
        return {"optimizer_state": sum(sizes)}
    return {}


def _step_of(index: Path) -> int:
    """Return the step in the name of a checkpoint's folder; -1 where there is none."""
    number = index.parent.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def element_bytes(dtype: str) -> int:
    """Return the size of one element by the name that safetensors gives its type.

    Example:
        >>> [element_bytes(dtype) for dtype in ("F32", "BF16", "I64", "BOOL", "F8_E4M3")]
        [4, 2, 8, 1, 1]
    """
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
