"""Many local steps, then an average: which solution, how fast, and against what; see README.md.

python experiments/local_steps/run.py            # under a minute on two cores
python experiments/local_steps/run.py --smoke    # seconds, proves nothing but that it runs
python experiments/local_steps/run.py --report   # writes the tables of README.md from results/comparison.json
"""

import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import numpy  # noqa: E402  the path is set above
import problems  # noqa: E402
from claims import command_line, verdict, write_results  # noqa: E402
from plot import draw  # noqa: E402
from runs import RUNS, measured  # noqa: E402
from tables import numbers, page, rates_table, values_table  # noqa: E402

from hardy.reference import local_gd as gd  # noqa: E402

SMOKE_ROUNDS = 30


def run_all(num_processes, most_rounds):
    """Return what each run measured."""
    work = partial(measured, most_rounds=most_rounds)
    if num_processes == 1:
        return {name: work(name) for name in RUNS}
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        found = dict(zip(RUNS, pool.imap(work, RUNS, chunksize=1), strict=True))
    return found


def main():
    options = command_line(FOLDER, __doc__, page)
    if options is None:
        return 0
    readme = FOLDER / "README.md"
    num_processes, began = (1 if options.smoke else options.processes), time.perf_counter()
    runs = run_all(num_processes, SMOKE_ROUNDS if options.smoke else None)
    wall_s = time.perf_counter() - began
    got = numbers(runs, margin=1 / gd.svm(problems.separable()).norm().item())
    print(f"{values_table(runs)}\n\n{rates_table(runs)}\n")
    holds = verdict(FOLDER, got, smoke=options.smoke)
    print(f"{wall_s:.1f} s")
    if not options.smoke:
        results = {"runs": runs, "got": got, "wall_s": wall_s, "processes": num_processes}
        results |= {"cores": os.cpu_count(), "numpy": numpy.__version__}
        write_results(FOLDER, "comparison", results)
        draw(runs, FOLDER / "results" / "curves.png")
        readme.write_text(page(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0 if holds or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
