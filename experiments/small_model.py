"""An experiment on optimizers of a small model: which to tune and train, and what to hold against what."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from claims import Measured, Study
from optimizers import grid_of
from training import Make, Row, as_table, compare
from trial_cache import Trials

SEEDS, STEPS = (0, 1, 2), 300
SMOKE_STEPS, SMOKE_CHANGES = 3, {"optim.schedule.warmup_steps": 2, "train.evaluate_packs": 2}


@dataclass(frozen=True, kw_only=True)
class OptimizerStudy:
    """Optimizers on one small model."""

    table: Mapping[str, Make]
    """Makers by name."""
    names: Sequence[str]
    """Whom to tune and train, "adamw" among them."""
    claims: Mapping[str, tuple[str, str]]
    """For each claim, the row and the row it is held against, in percent of loss."""
    at_rate_of: Mapping[str, str] = field(default_factory=dict)
    """Further rows, each at the learning rate that was found for another."""

    def measure(self, trials: Trials, is_smoke: bool) -> Measured:
        """Return the rows."""
        seeds, steps = (SEEDS[:1], SMOKE_STEPS) if is_smoke else (SEEDS, STEPS)
        changes = SMOKE_CHANGES if is_smoke else {}
        grids = {name: grid_of(name)[:1] if is_smoke else grid_of(name) for name in self.names}
        rows = compare(trials, self.table, grids, seeds=seeds, steps=steps, **changes)
        rates = {row.optimizer: row.lr for row in rows}
        given = {name: (rates[other],) for name, other in self.at_rate_of.items()}
        rows += compare(trials, self.table, given, seeds=seeds, steps=steps, **changes)
        return {"rows": [asdict(row) for row in rows], "steps": steps}

    def numbers(self, measured: Measured) -> dict[str, float]:
        """Return the number of each claim: by how many percent one loss is above another."""
        mean = {row.optimizer: row.mean for row in rows_of(measured)}
        return {claim: 100 * (mean[name] / mean[other] - 1) for claim, (name, other) in self.claims.items()}

    def study(self, folder: Path, about: str) -> Study:
        """Return the experiment in the common form."""
        return Study(
            folder=folder,
            about=about,
            measure=self.measure,
            numbers=self.numbers,
            tables=lambda measured: as_table(rows_of(measured), baseline="adamw"),
            seeds=SEEDS,
            of_seed=of_seed,
        )


def rows_of(measured: Measured) -> list[Row]:
    """Return the rows of a result file."""
    return [Row(**(row | {"losses": tuple(row["losses"])})) for row in measured["rows"]]


def of_seed(measured: Measured, place: int) -> Measured:
    """Return what one seed gave."""
    return measured | {
        "rows": [row | {"losses": row["losses"][place : place + 1]} for row in measured["rows"]]
    }
