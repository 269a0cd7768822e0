"""One experiment on optimizers of a small model, from names and claims to table, verdict and result file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from claims import command_line, generated, verdict, write_results
from optimizers import grid_of
from training import Make, Row, Trials, as_table, compare


def page(folder: Path, text: str) -> str:
    """Return README.md with its tables made anew from the results."""
    return generated(
        folder, text, lambda held: as_table([Row(**row) for row in held["rows"]], baseline="adamw")
    )


def main(
    folder: Path,
    description: str,
    *,
    table: Mapping[str, Make],
    names: Sequence[str],
    claims: Mapping[str, tuple[str, str]],
    at_rate_of: Mapping[str, str] | None = None,
) -> int:
    """Run an experiment as its command line says; return the exit code.

    Args:
        folder: of the experiment.
        description: its first line is shown by --help.
        table: makers by name.
        names: whom to tune and train, "adamw" among them.
        claims: for each of `expected.toml`, the row and the row it is held against, in percent of loss.
        at_rate_of: further rows, each at the learning rate that was found for another.
    """
    options = command_line(folder, description, lambda text: page(folder, text))
    if options is None:
        return 0
    readme = folder / "README.md"
    seeds, steps = ((0,), 6) if options.smoke else ((0, 1, 2), 300)
    num_processes = 1 if options.smoke else options.processes
    trials = Trials(dict(table), folder=Path("runs") / "experiments", num_processes=num_processes)
    changes = {"optim.schedule.warmup_steps": 2, "train.evaluate_packs": 2} if options.smoke else {}
    grids = {name: grid_of(name)[:1] if options.smoke else grid_of(name) for name in names}
    rows = compare(trials, grids, seeds=seeds, steps=steps, **changes)
    rates = {row.optimizer: row.lr for row in rows}
    given = {name: (rates[other],) for name, other in (at_rate_of or {}).items()}
    rows += compare(trials, given, seeds=seeds, steps=steps, **changes)
    print(as_table(rows, baseline="adamw"))
    mean = {row.optimizer: row.mean for row in rows}
    got = {claim: 100 * (mean[name] / mean[other] - 1) for claim, (name, other) in claims.items()}
    holds = verdict(folder, got, smoke=options.smoke)
    if not options.smoke:
        write_results(
            folder, "comparison", {"rows": [asdict(row) for row in rows], "steps": steps, "got": got}
        )
        readme.write_text(page(folder, readme.read_text()))
    return 0 if holds or options.smoke else 1
