"""Rules against attacks: dSTAR, its relatives and its rivals on one small task; see README.md.

python experiments/dstar/run.py            # about five minutes on two idle cores; goes on where it stopped
python experiments/dstar/run.py --smoke    # seconds, proves nothing but that it runs
python experiments/dstar/run.py --report   # writes the tables of README.md from results/comparison.json
"""

import os
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from cells import Cells  # noqa: E402  the path is set above
from claims import command_line, verdict, write_results  # noqa: E402
from grid import Grid, accuracies, cells_of, numbers  # noqa: E402
from plot import draw_grid, draw_waiting  # noqa: E402
from tables import page, tables  # noqa: E402


def main():
    options = command_line(FOLDER, __doc__, page)
    if options is None:
        return 0
    readme = FOLDER / "README.md"
    num_processes, began = (1 if options.smoke else options.processes), time.perf_counter()
    grid = Grid(smoke=options.smoke).tables()
    found = accuracies(
        grid, Cells(Path("runs") / "experiments", num_processes=num_processes).results(cells_of(grid))
    )
    wall_s = time.perf_counter() - began
    results = {"tables": found, "got": numbers(found), "wall_s": wall_s}
    results |= {"processes": num_processes, "cores": os.cpu_count()}
    print(f"{tables(results)}\n")
    holds = verdict(FOLDER, results["got"], smoke=options.smoke)
    print(f"{wall_s:.1f} s, {len(cells_of(grid))} cells")
    if not options.smoke:
        write_results(FOLDER, "comparison", results)
        draw_grid(found, FOLDER / "results" / "grid.png")
        draw_waiting(found, FOLDER / "results" / "waiting.png")
        readme.write_text(page(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0 if holds or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
