"""What went wrong in a run, and when: read off the lines of metrics.jsonl."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

GAP_SHARE = 0.01
"""Events of one text that are at most this share of the run apart are told as one."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, once or again and again."""

    text: str
    step: int | None
    """When first; None where that is not known."""
    last_step: int | None
    times: int = 1

    def when(self) -> str:
        """Return the step or steps in words.

        Example:
            >>> Event(text="", step=1000, last_step=2000).when()
            '1,000 to 2,000'
        """
        if self.step is None or self.last_step is None:
            return "not known"
        return f"{self.step:,}" if self.step == self.last_step else f"{self.step:,} to {self.last_step:,}"


def events_of(records: Sequence[Mapping[str, Any]], *, resumed: Sequence[int] = ()) -> list[Event]:
    """Return the events of a run in order; the same again within a hundredth of the run is one event.

    Args:
        records: the lines of metrics.jsonl.
        resumed: steps after which the run was taken up again.

    Example:
        >>> lines = [{"step": 1, "skipped": 0}, {"step": 2, "skipped": 1}, {"step": 3, "skipped": 2}]
        >>> [(event.text, event.when(), event.times) for event in events_of(lines)]
        [('step left out', '2 to 3', 2)]
    """
    found = [Event(text="resumed from a checkpoint", step=step, last_step=step) for step in resumed]
    before: dict[str, float] = {}
    members: list[Any] | None = None
    for record in records:
        texts = [text for key, say in SIGNS.items() if (text := say(record.get(key)))]
        for key, text in COUNTERS.items():
            now = record.get(key)
            if isinstance(now, int | float) and math.isfinite(now):
                texts += [text] if now > before.get(key, 0) else []
                before[key] = now  # a smaller number: the counter began again
        if isinstance(record.get("members"), list):
            texts += _membership(members, record["members"])
            members = record["members"]
        step = record["step"]
        found += [Event(text=text, step=step, last_step=step) for text in texts]
    last_step = records[-1]["step"] if records else 0
    return _joined(found, gap=max(1, round(last_step * GAP_SHARE)))


def _numbers(what: str, done: str) -> Callable[[Any], str]:
    """Return what says "worker 1 DONE" of a list of numbers, and nothing of anything else."""

    def say(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return ""
        return f"{what}{'s' if value[1:] else ''} {', '.join(map(str, value))} {done}"

    return say


def _warning(value: Any) -> str:
    return f"warning: {value}" if isinstance(value, str) and value else ""


SIGNS: dict[str, Callable[[Any], str]] = {
    "flagged_replicas": _numbers("replica", "left out of a round"),
    "removed_workers": _numbers("worker", "removed by the rule"),
    "nonfinite_units": lambda units: "a replica brought values that are not finite" if units else "",
    "overtaken": lambda was: "was overtaken and took over the others' state" if was else "",
    "warning": _warning,
}
"""What a value of a single line says."""
COUNTERS = {
    "skipped": "step left out",
    "rollbacks": "round taken back: all replicas were left out",
    "repairs": "optimizer state repaired",
    "lost": "message or worker lost",
    "starved": "step without enough workers",
    "reelections": "workers elected again",
    "redone": "round begun again",
}
"""What it says when a counter has grown."""


def _membership(before: Sequence[Any] | None, now: Sequence[Any]) -> list[str]:
    if before is None:
        return []
    gone, come = ([i for i in a if i not in b] for a, b in ((before, now), (now, before)))
    return [text for text in (_numbers("replica", "gone")(gone), _numbers("replica", "joined")(come)) if text]


def _joined(events: Sequence[Event], *, gap: int) -> list[Event]:
    """Return the events with repetitions told once, by their first step."""
    told: list[Event] = []
    open_at: dict[str, int] = {}
    for event in events:
        place = open_at.get(event.text)
        last = told[place].last_step if place is not None else None
        if place is not None and last is not None and event.step is not None and event.step - last <= gap:
            told[place] = replace(told[place], last_step=event.last_step, times=told[place].times + 1)
        else:
            open_at[event.text] = len(told)
            told.append(event)
    return sorted(told, key=lambda event: -1 if event.step is None else event.step)
