"""The adaptive recipe against its baselines on four small tasks, and under stress; see README.md.

python experiments/adaptive/run.py            # about 20 minutes on two cores
python experiments/adaptive/run.py --smoke    # seconds, proves nothing but that it runs
python experiments/adaptive/run.py --report   # writes the tables of README.md from results/comparison.json
"""

import contextlib
import logging
import math
import os
import sys
import time
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from claims import circumstances, command_line, verdict, write_results  # noqa: E402  the path is set above
from comparison import Comparison  # noqa: E402
from report import generated, numbers, page  # noqa: E402
from trials import NAN_STEPS, Trials  # noqa: E402


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


def main():
    options = command_line(FOLDER, __doc__, page)
    if options is None:
        return 0
    num_processes = 1 if options.smoke else options.processes
    trials = Trials(folder=Path("runs") / "experiments" / "adaptive", num_processes=num_processes)
    began = time.perf_counter()
    with quiet("hardy.optim"):  # embeddings under AdamW are said to be large at every start
        results = Comparison(trials, smoke=options.smoke).run()
    results |= {
        "nan_steps": NAN_STEPS,
        "processes": num_processes,
        "cores": os.cpu_count(),
        "threads_per_process": 1,
        "wall_minutes": (time.perf_counter() - began) / 60,
    }
    got = numbers(results)
    expected = tomllib.loads((FOLDER / "expected.toml").read_text(encoding="utf-8"))
    print(generated(results | {"circumstances": circumstances()}, expected), "\n")
    holds = verdict(FOLDER, got, smoke=options.smoke)
    if not options.smoke:
        results["got"] = {name: value if math.isfinite(value) else None for name, value in got.items()}
        write_results(FOLDER, "comparison", results)
    return 0 if holds or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
