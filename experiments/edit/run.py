"""EDiT, DiLoCo and local SGD against synchronous training at equal tokens; see README.md.

hardy reproduce edit            # some 12 minutes on two idle cores
hardy reproduce edit --smoke    # seconds, proves nothing but that it runs
"""

import math
import statistics
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from claims import Study, main  # noqa: E402  the path is set above
from trials import FAULTY, Trial, train  # noqa: E402

STEPS, EVERY_STEPS, PACK_TOKENS = 2240, 32, 512
SMOKE_STEPS, SMOKE_EVERY_STEPS, SMOKE_PACK_TOKENS, SMOKE_VALIDATION_TOKENS = 6, 2, 128, 2048
SEEDS = (0, 1, 2)
RATES = (0.016, 0.032, 0.048, 0.064)
"""Of the inner optimizer; every strategy is tried with each."""
STRATEGIES = ("synchronous", "local_sgd", "diloco", "edit")
CORRUPTED = ("local_sgd", "edit")
OUTER = {"outer.name": "sgd", "outer.lr": 1.0, "outer.momentum": 0.5, "outer.nesterov": True}
"""Of DiLoCo and EDiT; chosen on seed 0 before, see README.md."""
VARIANTS = {
    "norms as they are": {"anomaly.relative_to_rate": False},
    "norms as they are, temperature 0.1 of the mean norm": {
        "anomaly.relative_to_rate": False,
        "relative_temperature": True,
        "temperature": 0.1,
    },
    "outer lr 0.8, momentum 0.85": {"outer.lr": 0.8, "outer.momentum": 0.85},
}
"""What else EDiT could be set to, tried on the first seed, with and without corruption."""
LENGTHS = (560, 1120, STEPS, 2 * STEPS)
"""In steps, of the runs that show how the gap depends on the number of rounds."""


def settings(name, *, steps, every_steps):
    """Return the settings of a strategy, warm-up a twentieth of the run."""
    if name == "synchronous":
        return {"name": name}
    result = {"name": name, "every_steps": every_steps, "warmup_steps": steps // 20}
    if name != "local_sgd":
        result |= OUTER
    if name == "edit":
        result |= {"anomaly.name": "ztest", "anomaly.warmup_rounds": 5, "anomaly.relative_to_rate": True}
    return result


class Comparison:
    """All trainings of the experiment, and what follows from them."""

    def __init__(self, trials, *, smoke):
        self.trials, self.smoke = trials, smoke
        self.steps = SMOKE_STEPS if smoke else STEPS
        self.pack_tokens = SMOKE_PACK_TOKENS if smoke else PACK_TOKENS
        self.seeds = SEEDS[:1] if smoke else SEEDS

    def run(self):
        """Return rows, variants and the numbers that the claims are about."""
        grids = {
            name: [self._trial(name, lr) for lr in RATES[: 1 if self.smoke else None]] for name in STRATEGIES
        }
        grids["alone"] = [changed(trial, replicas=1) for trial in grids["synchronous"]]
        tuning = self._results([trial for grid in grids.values() for trial in grid])
        best = {name: min(grid, key=lambda trial: loss_of(tuning[trial])) for name, grid in grids.items()}
        rows = [self._row(name, trial, grids[name]) for name, trial in best.items()]
        rows += [self._row(name, changed(best[name], corrupted=True), []) for name in CORRUPTED]
        base = loss_of(tuning[best["synchronous"]])
        told = [self._variant(best["edit"], words, base=base) for words in ("as above", *VARIANTS)]
        gaps = [] if self.smoke else self._gaps(best)
        return {"rows": rows, "variants": told, "gaps": gaps, "steps": self.steps}

    def _results(self, trials):
        return self.trials.run(train, trials, label=lambda trial: trial.label)

    def _gaps(self, best):
        """Return how far EDiT is above synchronous training in longer and shorter runs, rates as above."""
        found = []
        for steps in LENGTHS:
            pair = [self._trial(name, best[name].lr, steps=steps) for name in ("synchronous", "edit")]
            losses = [loss_of(result) for result in self._results(pair).values()]
            found.append({"steps": steps, "losses": losses, "percent": 100 * (losses[1] / losses[0] - 1)})
        return found

    def _variant(self, trial, words, *, base):
        """Return EDiT with other settings on the first seed, in percent above synchronous training."""
        clean = changed(trial, strategy=with_settings(trial, VARIANTS.get(words, {})))
        spoilt = changed(clean, corrupted=True)
        found = self._results([clean, spoilt])
        return {
            "words": words,
            "percent": 100 * (loss_of(found[clean]) / base - 1),
            "corrupted_percent": 100 * (loss_of(found[spoilt]) / base - 1),
            "clean": found[clean],
            "corrupted": found[spoilt],
        }

    def _trial(self, name, lr, *, steps=None):
        """Return the training of a strategy on the first seed."""
        steps, every_steps = steps or self.steps, SMOKE_EVERY_STEPS if self.smoke else EVERY_STEPS
        chosen = tuple(settings(name, steps=steps, every_steps=every_steps).items())
        seed = self.seeds[0]
        trial = Trial(strategy=chosen, lr=lr, seed=seed, steps=steps, pack_tokens=self.pack_tokens)
        return changed(trial, validation_tokens=SMOKE_VALIDATION_TOKENS) if self.smoke else trial

    def _row(self, name, trial, grid):
        """Return a strategy at the rates that were chosen, on all seeds."""
        results = self._results([changed(trial, seed=seed) for seed in self.seeds])
        inner = [other.lr for other in grid]
        return {
            "name": name,
            "corrupted": trial.corrupted,
            "lr": trial.lr,
            "at_edge": len(set(inner)) > 1 and trial.lr in (inner[0], inner[-1]),
            "losses": [result["loss"] for result in results.values()],
            "rounds": [result.get("rounds", 0) for result in results.values()],
            "left_out": [result.get("left_out") for result in results.values()],
        }


NAMES = {"alone": "one replica alone, a quarter of the bytes"}
"""Of rows that are no strategy."""


def changed(trial, **changes):
    """Return a trial with other values."""
    return Trial(**(vars(trial) | changes))


def with_settings(trial, changes):
    """Return the settings of a trial's strategy with others laid over them."""
    return tuple((dict(trial.strategy) | changes).items())


def loss_of(result):
    """Return the loss; infinite where the run was lost."""
    return math.inf if result["loss"] is None else result["loss"]


def mean(row):
    """Return the mean loss over the seeds."""
    return statistics.fmean(math.inf if loss is None else loss for loss in row["losses"])


def numbers(rows):
    """Return the numbers of the claims."""
    losses = {(row["name"], row["corrupted"]): mean(row) for row in rows}
    base = losses["synchronous", False]
    return {
        "edit_over_synchronous_percent": 100 * (losses["edit", False] / base - 1),
        "diloco_over_synchronous_percent": 100 * (losses["diloco", False] / base - 1),
        "edit_corrupted_percent": 100 * (losses["edit", True] / base - 1),
        "mean_corrupted_over_edit_percent": 100 * (losses["local_sgd", True] / losses["edit", True] - 1),
    }


def tables(results):
    """Return the results in Markdown."""
    base = mean(results["rows"][0])
    lines = [
        "| strategy | inner lr | validation loss | against synchronous | rounds of all seeds "
        "| left out, by replica |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        loss, spread = mean(row), (max(row["losses"]) - min(row["losses"])) / 2
        left_out = [] if row["left_out"][0] is None else map(sum, zip(*row["left_out"], strict=True))
        cells = [
            NAMES.get(row["name"], row["name"])
            + (f", replica {FAULTY} corrupted" if row["corrupted"] else ""),
            f"{row['lr']:g}{' (edge)' if row['at_edge'] else ''}",
            f"{loss:.4f} ± {spread:.4f}",
            f"{100 * (loss / base - 1):+.2f} %",
            f"{sum(row['rounds'])}" if row["rounds"][0] else "–",
            ", ".join(map(str, left_out)) or "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| EDiT, seed 0 | against synchronous | with corruption | left out, by replica: without, with "
        "| contributors of 4 | clipped |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["variants"]:
        clean, spoilt = row["clean"], row["corrupted"]
        cells = [
            row["words"],
            f"{row['percent']:+.2f} %",
            f"{row['corrupted_percent']:+.2f} %",
            "; ".join(", ".join(map(str, result["left_out"])) for result in (clean, spoilt)),
            f"{clean['effective_replicas']:.2f}; {spoilt['effective_replicas']:.2f}",
            f"{clean['clip_share']:.1%}; {spoilt['clip_share']:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| steps, seed 0 | rounds | synchronous | EDiT | EDiT above synchronous |",
        "|---|---|---|---|---|",
    ]
    for row in results["gaps"]:
        synchronous, edit = row["losses"]
        rounds = -(-(row["steps"] - row["steps"] // 20) // EVERY_STEPS)
        cells = [f"{row['steps']}", f"{rounds}", f"{synchronous:.4f}", f"{edit:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{row['percent']:+.2f} %"]) + " |")
    return "\n".join(lines)


def of_seed(measured, place):
    """Return what one seed gave."""
    rows = [row | {"losses": row["losses"][place : place + 1]} for row in measured["rows"]]
    return measured | {"rows": rows}


STUDY = Study(
    folder=FOLDER,
    about=__doc__,
    measure=lambda trials, is_smoke: Comparison(trials, smoke=is_smoke).run(),
    numbers=lambda measured: numbers(measured["rows"]),
    tables=tables,
    seeds=SEEDS,
    of_seed=of_seed,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
