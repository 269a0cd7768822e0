"""Rules against attacks: dSTAR, its relatives and its rivals on one small task; see README.md.

hardy reproduce dstar            # minutes on two cores
hardy reproduce dstar --smoke    # seconds, proves nothing but that it runs
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from cells import play  # noqa: E402  the path is set above
from claims import Study, main  # noqa: E402
from grid import SEEDS, Grid, accuracies, cells_of, numbers  # noqa: E402
from plot import draw_grid, draw_waiting  # noqa: E402
from tables import tables  # noqa: E402


def measure(trials, is_smoke):
    """Play every cell of every table."""
    grid = Grid(smoke=is_smoke).tables()
    return {"tables": accuracies(grid, trials.run(play, cells_of(grid), label=lambda cell: cell.label))}


def of_seed(measured, place):
    """Return the tables of one seed; what has one seed only stays, and so do the many draws."""

    def one(name, results):
        return results if name == "broken" else results[place : place + 1] or results[-1:]

    return {
        "tables": {
            name: {
                row: {rule: one(name, results) for rule, results in columns.items()}
                for row, columns in rows.items()
            }
            for name, rows in measured["tables"].items()
        }
    }


def draw(measured, folder):
    """Write both pictures."""
    draw_grid(measured["tables"], folder / "grid.png")
    draw_waiting(measured["tables"], folder / "waiting.png")


STUDY = Study(
    folder=FOLDER,
    about=__doc__,
    measure=measure,
    numbers=lambda measured: numbers(measured["tables"]),
    tables=tables,
    seeds=SEEDS,
    of_seed=of_seed,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
