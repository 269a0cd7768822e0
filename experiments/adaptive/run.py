"""The adaptive recipe against its baselines on four small tasks, and under stress; see README.md.

hardy reproduce adaptive            # about 18 minutes on two cores
hardy reproduce adaptive --smoke    # seconds, proves nothing but that it runs
"""

import contextlib
import logging
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from claims import Study, main  # noqa: E402  the path is set above
from comparison import SEEDS, Comparison  # noqa: E402
from report import numbers, of_seed, tables  # noqa: E402
from trials import NAN_STEPS  # noqa: E402


@contextlib.contextmanager
def quiet(name):
    """Let a logger report errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def measure(trials, is_smoke):
    """Tune every row on every task, and train it, on one of them under stress too."""
    with quiet("hardy.optim"):  # embeddings under AdamW are said to be large at every start
        return Comparison(trials, smoke=is_smoke).run() | {"nan_steps": NAN_STEPS}


STUDY = Study(
    folder=FOLDER,
    about=__doc__,
    measure=measure,
    numbers=numbers,
    tables=tables,
    seeds=SEEDS,
    of_seed=of_seed,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
