"""A small language model of eight workers, two of whom attack: rule by rule, attack by attack; see README.md.

python experiments/robust/run.py            # about fifteen minutes on two cores
python experiments/robust/run.py --smoke    # seconds, proves nothing but that it runs
python experiments/robust/run.py --report   # writes the tables of README.md from results/comparison.json
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import torch  # noqa: E402  the path is set above
from claims import command_line, generated, verdict, write_results  # noqa: E402

from hardy.distributed.robust.config import AttackConfig, DStarConfig, RobustConfig  # noqa: E402
from hardy.train.simulate import prepare_task, train_strategy  # noqa: E402
from hardy.train.simulate_config import SimulationConfig, TaskConfig  # noqa: E402
from hardy.train.simulate_strategies import Entry  # noqa: E402

WORKERS, F, SEEDS, STEPS = 8, 2, (0, 1, 2), 200
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
}
RECOMMENDED = "nnm + trimmed_mean"
ATTACKS = {
    "none": AttackConfig(),
    "sign_flip": AttackConfig(name="sign_flip", workers=(0, 1)),
    "ipm 0.5": AttackConfig(name="ipm", workers=(0, 1), arguments=("strength=0.5",)),
    "ipm 10": AttackConfig(name="ipm", workers=(0, 1), arguments=("strength=10",)),
    "alie 1.5": AttackConfig(name="alie", workers=(0, 1), arguments=("z=1.5",)),
}


def measured(cell, steps, source):
    """Return the validation loss of one run."""
    rule, attack, seed = cell
    task = TaskConfig(
        model="tiny", steps=steps, tokens=128, lr=3e-3, seed=seed, source=source, evaluate_every_steps=10**6
    )
    config = SimulationConfig(workers=WORKERS, step_s=1.0, task=task)
    entry = Entry(label=rule, config=replace(RULES[rule], attack=ATTACKS[attack]))
    loss = train_strategy(config, entry, prepare_task(config, cache_dir=CACHE)).validation_loss
    return DIVERGED if loss is None or not loss < DIVERGED else loss


def run_all(cells, steps, num_processes, source=SOURCE):
    """Return the losses of all cells by name."""
    work = partial(measured, steps=steps, source=source)
    names = [" | ".join(map(str, cell)) for cell in cells]
    if num_processes == 1:
        return dict(zip(names, map(work, cells), strict=True))
    with multiprocessing.get_context("fork").Pool(num_processes, initializer=one_thread) as pool:
        return dict(zip(names, pool.imap(work, cells, chunksize=1), strict=True))


def one_thread():
    """A forked process must not wake the threads of its parent."""
    torch.set_num_threads(1)


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
    """Return losses by rule and attack."""
    losses = results["losses"]
    lines = ["| rule | " + " | ".join(ATTACKS) + " |", "|---" * (len(ATTACKS) + 1) + "|"]
    for rule in RULES:
        cells = ["{:.3f} ± {:.3f}".format(*means(losses, rule, attack)) for attack in ATTACKS]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


page = partial(generated, FOLDER, table_of=table)


def main():
    options = command_line(FOLDER, __doc__, page)
    if options is None:
        return 0
    began, steps = time.perf_counter(), STEPS
    cells = [(rule, attack, seed) for rule in RULES for attack in ATTACKS for seed in SEEDS]
    if options.smoke:
        steps, cells = (
            3,
            [(rule, attack, 0) for rule in ("mean", RECOMMENDED) for attack in ("none", "ipm 10")],
        )
    source, processes = (SMOKE_SOURCE, 1) if options.smoke else (SOURCE, options.processes)
    losses = run_all(cells, steps, processes, source)
    got = numbers(losses)
    print(json.dumps(losses, indent=1))
    holds = verdict(FOLDER, got, smoke=options.smoke)
    wall_s = time.perf_counter() - began
    print(f"{wall_s:.1f} s")
    if not options.smoke:
        results = {"losses": losses, "got": got, "steps": steps, "wall_s": wall_s, "cores": os.cpu_count()}
        write_results(FOLDER, "comparison", results)
        readme = FOLDER / "README.md"
        readme.write_text(page(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0 if holds or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
