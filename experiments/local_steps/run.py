"""Many local steps, then an average: which solution, how fast, and against what; see README.md.

hardy reproduce local_steps            # under a minute on two cores
hardy reproduce local_steps --smoke    # seconds, proves nothing but that it runs
"""

import sys
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import problems  # noqa: E402  the path is set above
from claims import Study, main  # noqa: E402
from plot import draw  # noqa: E402
from runs import RUNS, measured  # noqa: E402
from tables import numbers, tables, with_rounds  # noqa: E402

from hardy.reference import local_gd as gd  # noqa: E402

SMOKE_ROUNDS = 30


def measure(trials, is_smoke):
    """Run everything, and find the margin of the data."""
    work = partial(measured, most_rounds=SMOKE_ROUNDS if is_smoke else None)
    margin = 1 / gd.svm(problems.separable()).norm().item()
    return {"runs": trials.run(work, RUNS, label=str), "margin": margin}


STUDY = Study(
    folder=FOLDER,
    about=__doc__,
    measure=measure,
    numbers=lambda found: numbers(with_rounds(found["runs"]), margin=found["margin"]),
    tables=lambda found: tables(with_rounds(found["runs"])),
    draw=lambda found, folder: draw(with_rounds(found["runs"]), folder / "curves.png"),
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
