"""A small language model of eight workers, two of whom attack: rule by rule, attack by attack; see README.md.

hardy reproduce robust            # about twenty minutes on two cores
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
}
RECOMMENDED = "nnm + trimmed_mean of momenta"
LR, MOMENTA = 3e-3, {"lr": 1e-3, "beta1": 0.0}
"""AdamW keeps no first moment of its own for momenta; its second one lacks the noise, so steps are longer."""
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
    rule, attack, seed = cell
    task = TaskConfig(
        model="tiny", steps=steps, tokens=128, lr=LR, seed=seed, source=source, evaluate_every_steps=10**6
    )
    if RULES[rule].worker_momentum:
        task = replace(task, **MOMENTA)
    config = SimulationConfig(workers=WORKERS, step_s=1.0, task=task)
    entry = Entry(label=rule, config=replace(RULES[rule], attack=ATTACKS[attack]))
    loss = train_strategy(config, entry, prepared(config)).validation_loss
    return DIVERGED if loss is None or not loss < DIVERGED else loss


def measure(trials, is_smoke):
    """Train every rule under every attack, or two under one."""
    cells = [(rule, attack, seed) for rule in RULES for attack in ATTACKS for seed in SEEDS]
    steps, source = STEPS, SOURCE
    if is_smoke:
        steps, source = SMOKE_STEPS, SMOKE_SOURCE
        cells = [(rule, attack, 0) for rule in ("mean", RECOMMENDED) for attack in ("none", "ipm 10")]
    found = trials.run(partial(measured, steps=steps, source=source), cells, label=name_of)
    return {"losses": {name_of(cell): loss for cell, loss in found.items()}, "steps": steps}


def name_of(cell):
    """Return rule, attack and seed as text."""
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
    losses = results["losses"]
    lines = ["| rule | " + " | ".join(ATTACKS) + " |", "|---" * (len(ATTACKS) + 1) + "|"]
    for rule in RULES:
        cells = [
            "{:.3f} ± {:.3f}".format(*means(losses, rule, attack))
            if any(name.startswith(f"{rule} | {attack} | ") for name in losses)
            else "–"
            for attack in ATTACKS
        ]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
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
