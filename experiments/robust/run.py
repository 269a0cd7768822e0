"""A small language model of eight workers, two of whom attack: rule by rule, attack by attack; see README.md.

hardy reproduce robust            # about twenty-five minutes on two cores
hardy reproduce robust --smoke    # seconds, proves nothing but that it runs
"""

import math
import statistics
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from claims import Study, main  # noqa: E402  the path is set above

from hardy.distributed.robust.config import AttackConfig, DStarConfig, RobustConfig  # noqa: E402
from hardy.train.simulate import prepare_task, train_strategy  # noqa: E402
from hardy.train.simulate_config import SimulationConfig, TaskConfig  # noqa: E402
from hardy.train.simulate_strategies import Entry  # noqa: E402

WORKERS, F, SEEDS, STEPS, SMOKE_STEPS = 8, 2, (0, 1, 2), 200, 3
SOURCE, SMOKE_SOURCE = "pydocs", "synthetic:constant,documents=200,mean=255"
CACHE = Path("~/.cache/hardy").expanduser()
DIVERGED = 10.0
"""Nats, in place of a loss that is larger or no number at all; guessing among 258 tokens costs 5.55."""

RULES = {
    "mean": RobustConfig(rule="mean", f=0, pre=()),
    "median": RobustConfig(rule="median", f=F, pre=()),
    "trimmed_mean": RobustConfig(rule="trimmed_mean", f=F, pre=()),
    "multi_krum": RobustConfig(rule="multi_krum", f=F, pre=()),
    "nnm + trimmed_mean": RobustConfig(f=F),
    "dstar": DStarConfig(f=F, exchange="slices"),
    "mean of momenta": RobustConfig(rule="mean", f=0, pre=(), worker_momentum=0.9),
    "nnm + trimmed_mean of momenta": RobustConfig(f=F, worker_momentum=0.9),
    "mda by history": RobustConfig(rule="mda", f=F, pre=("arc",), history=0.99),
}
RECOMMENDED = "mda by history"
LRS, SMOKE_LRS = (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3), (2e-3,)
"""The same for every rule, which trains, also under attack, at its best one without: mean of the seeds."""
ATTACKS = {
    "none": AttackConfig(),
    "sign_flip": AttackConfig(name="sign_flip", workers=(0, 1)),
    "ipm 0.5": AttackConfig(name="ipm", workers=(0, 1), arguments=("strength=0.5",)),
    "ipm 10": AttackConfig(name="ipm", workers=(0, 1), arguments=("strength=10",)),
    "alie 1.5": AttackConfig(name="alie", workers=(0, 1), arguments=("z=1.5",)),
}


@cache
def prepared(config):
    """Return initial weights and text, made once for each seed in a process."""
    return prepare_task(config, cache_dir=CACHE)


def measured(cell, steps, source):
    """Return the validation loss of one run."""
    rule, attack, seed, lr = cell
    task = TaskConfig(
        model="tiny",
        steps=steps,
        tokens=128,
        lr=lr,
        # AdamW keeps no first moment of its own for momenta.
        beta1=0.0 if RULES[rule].worker_momentum else 0.9,
        seed=seed,
        source=source,
        evaluate_every_steps=10**6,
        evaluate_packs=128,
    )
    config = SimulationConfig(workers=WORKERS, step_s=1.0, task=task)
    entry = Entry(label=rule, config=replace(RULES[rule], attack=ATTACKS[attack]))
    loss = train_strategy(config, entry, prepared(config)).validation_loss
    return DIVERGED if loss is None or not loss < DIVERGED else loss


def measure(trials, is_smoke):
    """Train every rule at every rate, then under every attack at its best one; or two under one."""
    rules, attacks, seeds, lrs, steps, source = RULES, ATTACKS, SEEDS, LRS, STEPS, SOURCE
    if is_smoke:
        rules, attacks, seeds, lrs = ("mean", RECOMMENDED), ("none", "ipm 10"), (0,), SMOKE_LRS
        steps, source = SMOKE_STEPS, SMOKE_SOURCE
    work = partial(measured, steps=steps, source=source)
    tuning = [(rule, "none", seed, lr) for rule in rules for lr in lrs for seed in seeds]
    tuned = trials.run(work, tuning, label=label_of)
    by_rate = {
        rule: {lr: statistics.fmean(tuned[rule, "none", seed, lr] for seed in seeds) for lr in lrs}
        for rule in rules
    }
    best = {rule: min(losses, key=losses.__getitem__) for rule, losses in by_rate.items()}
    cells = [(rule, attack, seed, best[rule]) for rule in rules for attack in attacks for seed in seeds]
    found = trials.run(work, cells, label=label_of)
    return {
        "losses": {" | ".join(map(str, cell[:3])): loss for cell, loss in found.items()},
        "by_rate": {rule: {str(lr): loss for lr, loss in losses.items()} for rule, losses in by_rate.items()},
        "best": best,
        "steps": steps,
    }


def label_of(cell):
    """Return rule, attack, seed and rate as text."""
    return " | ".join(map(str, cell))


def means(losses, rule, attack):
    """Return the mean over seeds of a cell and its spread."""
    values = [loss for name, loss in losses.items() if name.startswith(f"{rule} | {attack} | ")]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def numbers(losses):
    """Return what the claims are about: losses in percent above the mean without attack."""
    clean = means(losses, "mean", "none")[0]
    attacks = [attack for attack in ATTACKS if attack != "none" and any(f"| {attack} |" in n for n in losses)]
    above = {
        (rule, attack): 100 * (means(losses, rule, attack)[0] / clean - 1)
        for rule in ("mean", RECOMMENDED)
        for attack in attacks
    }
    return {
        "recommended_percent": max(above[RECOMMENDED, attack] for attack in attacks),
        "mean_percent": max(above["mean", attack] for attack in attacks),
    }


def table(results):
    """Return losses by rule and attack; a dash where nothing was run."""
    losses, best, by_rate = results["losses"], results["best"], results["by_rate"]
    lines = ["| rule | lr | " + " | ".join(ATTACKS) + " |", "|---" * (len(ATTACKS) + 2) + "|"]
    for rule in best:
        rates = sorted(map(float, by_rate[rule]))
        edge = " (edge of the grid)" if len(rates) > 1 and best[rule] in (rates[0], rates[-1]) else ""
        cells = [
            "{:.3f} ± {:.3f}".format(*means(losses, rule, attack))
            if any(name.startswith(f"{rule} | {attack} | ") for name in losses)
            else "–"
            for attack in ATTACKS
        ]
        lines.append(f"| {rule} | {best[rule]:g}{edge} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_seed(found, place):
    """Return what one seed gave."""
    losses = {name: loss for name, loss in found["losses"].items() if name.endswith(f" | {SEEDS[place]}")}
    return found | {"losses": losses}


STUDY = Study(
    folder=FOLDER,
    about=__doc__,
    measure=measure,
    numbers=lambda found: numbers(found["losses"]),
    tables=table,
    seeds=SEEDS,
    of_seed=of_seed,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
