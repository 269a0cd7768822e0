"""SMMF against AdamW and Adafactor on a small model, and its settings one by one; see README.md.

python experiments/smmf/run.py            # minutes on two cores
python experiments/smmf/run.py --smoke    # seconds, proves nothing but that it runs
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from claims import generated, verdict, write_results  # noqa: E402  the path is set above
from optimizers import SMMF, TABLE, grid_of  # noqa: E402
from training import Row, Trials, as_table, compare  # noqa: E402

VARIANTS = {
    "smmf, whole model": partial(SMMF, embed_kind="smmf"),
    "smmf, momentum kept": partial(SMMF, embed_kind="smmf", growth_rate=1.0),
    "smmf, no momentum": partial(SMMF, embed_kind="smmf", beta1=None),
    "smmf, decay rate -0.5": partial(SMMF, embed_kind="smmf", decay_rate=-0.5),
    "smmf, updates clamped at 10": partial(SMMF, embed_kind="smmf", max_update=10.0),
}
NAMES = ["adamw", "adafactor", "smmf, embeddings by adamw", *VARIANTS]


def page(text):
    """Return README.md with its tables made anew from the results."""
    return generated(
        FOLDER, text, lambda held: as_table([Row(**row) for row in held["rows"]], baseline="adamw")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only write README.md from the results")
    options = parser.parse_args()
    readme = FOLDER / "README.md"
    if options.report:
        readme.write_text(page(readme.read_text()))
        return 0
    seeds, steps = ((0,), 6) if options.smoke else ((0, 1, 2), 300)
    trials = Trials(
        TABLE | VARIANTS,
        folder=Path("runs") / "experiments",
        num_processes=1 if options.smoke else options.processes,
    )
    changes = {"optim.schedule.warmup_steps": 2, "train.evaluate_packs": 2} if options.smoke else {}
    grids = {name: grid_of(name)[:1] if options.smoke else grid_of(name) for name in NAMES}
    rows = compare(trials, grids, seeds=seeds, steps=steps, **changes)
    print(as_table(rows, baseline="adamw"))
    mean = {row.optimizer: row.mean for row in rows}

    def over(name, other):
        return 100 * (mean[name] / mean[other] - 1)

    got = {
        "smmf_over_adamw_percent": over("smmf, whole model", "adamw"),
        "smmf_over_adafactor_percent": over("smmf, whole model", "adafactor"),
        "smmf_embeddings_percent": over("smmf, whole model", "smmf, embeddings by adamw"),
    }
    holds = verdict(FOLDER, got, smoke=options.smoke)
    if not options.smoke:
        write_results(
            FOLDER, "comparison", {"rows": [asdict(row) for row in rows], "steps": steps, "got": got}
        )
    return 0 if holds or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
