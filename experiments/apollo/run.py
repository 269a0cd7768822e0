"""APOLLO and APOLLO-Mini against AdamW, SGD, Adafactor and GaLore on a small model; see README.md.

python experiments/apollo/run.py            # minutes on two cores
python experiments/apollo/run.py --smoke    # seconds, proves nothing but that it runs
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from claims import generated, verdict, write_results  # noqa: E402  the path is set above
from optimizers import APOLLO, MINI, TABLE, grid_of  # noqa: E402
from training import Row, Trials, as_table, compare  # noqa: E402

NAMES = [
    "adamw",
    "sgd",
    "adafactor",
    "galore",
    *(
        f"{name}, embeddings by {kind}"
        for name in ("apollo", "apollo-mini")
        for kind in ("adamw", "smmf", "apollo")
    ),
]
OUTPUTS = ("attention.output.weight", "feed_forward.down.weight")


def zero_outputs(make):
    """Return a maker that first sets the projections into the residual stream to zero."""

    def build(model, lr):
        outputs = [p for name, p in model.named_parameters() if name.endswith(OUTPUTS)]
        if not outputs:
            raise RuntimeError(f"the model has no parameter named {OUTPUTS}")
        for param in outputs:
            param.data.zero_()
        return make(model, lr)

    return build


ZEROED = {
    "adamw, zero outputs": zero_outputs(TABLE["adamw"]),
    "apollo, zero outputs": zero_outputs(APOLLO),
    "apollo-mini, zero outputs": zero_outputs(MINI),
}


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
        TABLE | ZEROED,
        folder=Path("runs") / "experiments",
        num_processes=1 if options.smoke else options.processes,
    )
    changes = {"optim.schedule.warmup_steps": 2, "train.evaluate_packs": 2} if options.smoke else {}
    grids = {name: grid_of(name)[:1] if options.smoke else grid_of(name) for name in NAMES}
    rows = compare(trials, grids, seeds=seeds, steps=steps, **changes)
    tuned = {row.optimizer.split(",")[0]: (row.lr,) for row in reversed(rows)}
    zeroed = {name: tuned[name.split(",")[0]] for name in ZEROED}
    rows += compare(trials, zeroed, seeds=seeds, steps=steps, **changes)
    print(as_table(rows, baseline="adamw"))
    mean = {row.optimizer: row.mean for row in rows}

    def over(name, other):
        return 100 * (mean[name] / mean[other] - 1)

    got = {
        "apollo_over_adamw_percent": over("apollo, embeddings by adamw", "adamw"),
        "mini_over_adamw_percent": over("apollo-mini, embeddings by adamw", "adamw"),
        "apollo_over_galore_percent": over("apollo, embeddings by adamw", "galore"),
        "apollo_zero_outputs_percent": over("apollo, zero outputs", "apollo, embeddings by adamw"),
        "mini_zero_outputs_percent": over("apollo-mini, zero outputs", "apollo-mini, embeddings by adamw"),
        "apollo_smmf_embeddings_percent": over("apollo, embeddings by smmf", "apollo, embeddings by adamw"),
        "mini_smmf_embeddings_percent": over(
            "apollo-mini, embeddings by smmf", "apollo-mini, embeddings by adamw"
        ),
    }
    holds = verdict(FOLDER, got, smoke=options.smoke)
    if not options.smoke:
        write_results(
            FOLDER, "comparison", {"rows": [asdict(row) for row in rows], "steps": steps, "got": got}
        )
    return 0 if holds or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
