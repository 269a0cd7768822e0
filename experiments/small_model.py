"""An experiment on optimizers of a small model: which to tune and train, and what to hold against what."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import markov
from claims import Measured, Study
from optimizers import grid_of
from training import Make, Row, as_table, compare
from trial_cache import Trials

SEEDS, STEPS = (0, 1, 2), {"text": 300, "markov": 250}
SMOKE_STEPS, SMOKE_CHANGES = 3, {"optim.schedule.warmup_steps": 2, "train.evaluate_packs": 2}


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Who is compared on one task."""

    names: Sequence[str]
    """Whom to tune and train, "adamw" among them."""
    claims: Mapping[str, tuple[str, str]]
    """For each claim, the row and the row it is held against, in percent of loss."""
    at_rate_of: Mapping[str, str] = field(default_factory=dict)
    """Further rows, each at the learning rate that was found for another."""

    def numbers(self, rows: Sequence[Row]) -> dict[str, float]:
        """Return the number of each claim: by how many percent one loss is above another."""
        mean = {row.optimizer: row.mean for row in rows}
        return {claim: 100 * (mean[name] / mean[other] - 1) for claim, (name, other) in self.claims.items()}


@dataclass(frozen=True, kw_only=True)
class OptimizerStudy:
    """Optimizers on one small model, which learns Python sources and perhaps a Markov chain."""

    table: Mapping[str, Make]
    """Makers by name."""
    text: Contest
    """On Python sources."""
    markov: Contest | None = None
    """On symbols that depend on the last two; see `markov.py`."""

    def measure(self, trials: Trials, is_smoke: bool) -> Measured:
        """Return the rows; those of the Markov task stand under its name."""
        found = self._measure(trials, self.text, task="text", is_smoke=is_smoke)
        if self.markov is None:
            return found
        chain = self._measure(trials, self.markov, task="markov", is_smoke=is_smoke)
        return found | {"markov": chain | {"floor": markov.floor()}}

    def numbers(self, measured: Measured) -> dict[str, float]:
        """Return the number of each claim."""
        found = self.text.numbers(rows_of(measured))
        return found if self.markov is None else found | self.markov.numbers(rows_of(measured["markov"]))

    def tables(self, measured: Measured) -> str:
        """Return a table for each task."""
        text = as_table(rows_of(measured), baseline="adamw")
        if self.markov is None:
            return text
        held = measured["markov"]
        return "\n\n".join(
            [
                "Python sources:",
                text,
                f"Markov chain (a model that knows its law has a loss of {held['floor']:.4f}):",
                as_table(rows_of(held), baseline="adamw"),
            ]
        )

    def study(self, folder: Path, about: str) -> Study:
        """Return the experiment in the common form."""
        return Study(
            folder=folder,
            about=about,
            measure=self.measure,
            numbers=self.numbers,
            tables=self.tables,
            seeds=SEEDS,
            of_seed=of_seed,
        )

    def _measure(self, trials: Trials, contest: Contest, *, task: str, is_smoke: bool) -> Measured:
        """Return what one task gave."""
        seeds, steps = (SEEDS[:1], SMOKE_STEPS) if is_smoke else (SEEDS, STEPS[task])
        changes = SMOKE_CHANGES if is_smoke else {}
        grids = {name: grid_of(name)[:1] if is_smoke else grid_of(name) for name in contest.names}
        rows = compare(trials, self.table, grids, seeds=seeds, steps=steps, task=task, **changes)
        rates = {row.optimizer: row.lr for row in rows}
        given = {name: (rates[other],) for name, other in contest.at_rate_of.items()}
        rows += compare(trials, self.table, given, seeds=seeds, steps=steps, task=task, **changes)
        return {"rows": [asdict(row) for row in rows], "steps": steps}


def rows_of(measured: Measured) -> list[Row]:
    """Return the rows of a result file, of one task."""
    return [Row(**(row | {"losses": tuple(row["losses"])})) for row in measured["rows"]]


def of_seed(measured: Measured, place: int) -> Measured:
    """Return what one seed gave, on each task."""
    rows = [row | {"losses": row["losses"][place : place + 1]} for row in measured["rows"]]
    alone = measured | {"rows": rows}
    return alone | {"markov": of_seed(measured["markov"], place)} if "markov" in measured else alone
