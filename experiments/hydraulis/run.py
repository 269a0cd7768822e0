"""Hydraulis and FlexSP simulated from their published coefficients; see README.md.

python experiments/hydraulis/run.py            # a minute on one core
python experiments/hydraulis/run.py --smoke    # seconds, proves nothing but that it runs
python experiments/hydraulis/run.py --report   # writes the tables of README.md from results/comparison.json
"""

import sys
import time
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import numpy as np  # noqa: E402  the path is set above
from claims import command_line, generated, verdict, write_results  # noqa: E402

from hardy.balance.compare import compare, rank_methods, strategy_methods  # noqa: E402
from hardy.balance.cost_presets import cost_preset, published_strategies  # noqa: E402
from hardy.balance.lengths import draw_lengths, fit_lengths, token_batches  # noqa: E402
from hardy.balance.proposal import candidate_strategies, propose, trace_strategies  # noqa: E402
from hardy.balance.strategies import plan_strategies, strategy_text  # noqa: E402
from hardy.clock import WallClock  # noqa: E402

SEEDS, STEPS, BUDGET, RANKS = (0, 1, 2, 3), 40, 200_000, 64
FIRST = {
    ("web-32k", 32768): (7.63, 5.67, 3.97, 1.92),
    ("wikipedia", 32768): (7.92, 5.86, 4.52, 1.75),
    ("wikipedia", 16384): (7.29, 5.73, 4.08, 1.79),
    ("commoncrawl-like", 32768): (8.85, 6.41, 6.14, 1.44),
}
"""Seconds of fixed, balanced, dynamic and the speed-up, simulated by us before this code was written."""
PUBLISHED = {
    ("6.7b", 192): (1.72, 1.34),
    ("6.7b", 384): (1.46, 1.32),
    ("13b", 192): (1.59, 1.31),
    ("13b", 384): (1.43, 1.21),
    ("30b", 192): (1.64, 1.23),
    ("30b", 384): (1.53, 1.18),
}
"""FlexSP and BatchAda over DeepSpeed on Wikipedia, labels of FlexSP's main figure (arXiv 2412.01523)."""
ALIGNED, SEQUENCES, BATCHES = 128, 512, 20
METHODS = ("fixed", "balanced", "dynamic")


def batches_of(source, context, *, seed, steps):
    """Return lengths of global batches of a token budget."""
    drawn = draw_lengths(source, 1000 * steps, np.random.default_rng(seed))
    lengths = fit_lengths(drawn, most_tokens=context, overlong="truncate").lengths
    return [lengths[place] for place in token_batches(lengths, budget_tokens=BUDGET)[:steps]]


def hydraulis(source, context, *, seeds, steps):
    """Return one row: means over seeds."""
    cost, found = cost_preset("hydraulis-32b"), []
    for seed in seeds:
        batches = batches_of(source, context, seed=seed, steps=steps)
        methods = strategy_methods(
            METHODS,
            world_size=RANKS,
            cost=cost,
            strategies=published_strategies(),
            context_tokens=context,
            seed=seed,
        )
        found.append(compare(batches, methods, cost=cost, clock=WallClock()))
    mean = {m: float(np.mean([rows[k].time for rows in found])) / 1e3 for k, m in enumerate(METHODS)}
    return {
        "source": source,
        "context": context,
        **mean,
        "total": mean["fixed"] / mean["dynamic"],
        "balance": mean["fixed"] / mean["balanced"],
        "heterogeneity": mean["balanced"] / mean["dynamic"],
        "idle": float(np.mean([rows[2].idle_share for rows in found])),
        "gap": float(np.mean([rows[2].gap for rows in found])),
        "planner_ms": float(np.mean([rows[2].planner_ms for rows in found])),
    }


def flexsp(model, context_k, *, seeds, batches):
    """Return one cell: ratios over static groups, means over seeds."""
    cost, found = cost_preset(f"flexsp-{model}-{context_k}k"), []
    for seed in seeds:
        drawn = draw_lengths("wikipedia", (batches + 2) * SEQUENCES, np.random.default_rng(seed))
        padded = -(-drawn // ALIGNED) * ALIGNED
        kept = padded[padded <= 1000 * context_k - ALIGNED]
        given = [kept[k * SEQUENCES : (k + 1) * SEQUENCES] for k in range(batches)]
        methods = rank_methods(
            ["static_cp", "batch_cp", "dynamic_cp"], world_size=RANKS, cost=cost, objective="lock_step"
        )
        found.append(compare(given, methods, cost=cost, clock=WallClock()))
    static, ada, flex = (float(np.mean([rows[k].time for rows in found])) / 1e3 for k in range(3))
    return {
        "model": model,
        "context_k": context_k,
        "static": static,
        "flexsp": static / flex,
        "batch_ada": static / ada,
        "gap": float(np.mean([rows[2].gap for rows in found])),
        "planner_ms": float(np.mean([rows[2].planner_ms for rows in found])),
    }


def proposed(*, steps):
    """Return what strategies selected by simulation give on batches that were not used to select."""
    cost, published = cost_preset("hydraulis-32b"), published_strategies()
    batches = batches_of("wikipedia", 32768, seed=5, steps=12 + steps)
    traces = trace_strategies(np.concatenate(batches[:12]), world_size=RANKS, cost=cost, length_step=1024)
    candidates = candidate_strategies(cost, world_size=RANKS, longest=32768)
    found = propose(
        batches[:12], world_size=RANKS, cost=cost, candidates=[*candidates, *traces], first=published[0]
    )

    def seconds(strategies):
        plans = [
            plan_strategies(batch, world_size=RANKS, cost=cost, strategies=strategies).plan
            for batch in batches[12:]
        ]
        return float(np.mean([made.cost for made in plans])) / 1e3

    return {
        "strategies": [strategy_text(strategy) for strategy in found.strategies],
        "proposed": seconds(found.strategies),
        "published": seconds(published),
        "program_alone": seconds([published[0], *traces]),
    }


def claimed(rows, cells, proposal):
    """Return the numbers that claims are about."""
    first = [FIRST[row["source"], row["context"]] for row in rows]
    errors = [
        abs(cell[name] / published - 1)
        for cell in cells
        for name, published in zip(
            ("flexsp", "batch_ada"), PUBLISHED[cell["model"], cell["context_k"]], strict=True
        )
    ]
    return {
        "least_speedup": min(row["total"] for row in rows),
        "most_speedup": max(row["total"] for row in rows),
        "speedup_error": max(abs(row["total"] - old[3]) for row, old in zip(rows, first, strict=True)),
        "seconds_error": max(
            abs(row[name] / old[k] - 1)
            for row, old in zip(rows, first, strict=True)
            for k, name in enumerate(METHODS[:2])
        ),
        "least_share_of_balance": min(row["balance"] for row in rows),
        "flexsp_mean_error": float(np.mean(errors)),
        "flexsp_worst_error": max(errors),
        "flexsp_orderings": sum(1 < cell["batch_ada"] < cell["flexsp"] for cell in cells),
        "strategies_over_published": proposal["proposed"] / proposal["published"],
    }


def table(results):
    """Return the tables of results as text."""
    lines = [
        "| lengths | fixed s | balanced s | dynamic s | total | balance x choice | idle | gap | plan ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['source']}, {row['context']} | {row['fixed']:.2f} | {row['balanced']:.2f} "
            f"| {row['dynamic']:.2f} | {row['total']:.2f} "
            f"| {row['balance']:.2f} x {row['heterogeneity']:.2f} | {row['idle']:.1%} "
            f"| {row['gap']:.1%} | {row['planner_ms']:.0f} |"
        )
    lines += [
        "",
        "| FlexSP on Wikipedia | static s | FlexSP / published | BatchAda / published | gap | planner ms |",
        "|---|---|---|---|---|---|",
    ]
    for cell in results["cells"]:
        flex, ada = PUBLISHED[cell["model"], cell["context_k"]]
        lines.append(
            f"| {cell['model']}, {cell['context_k']}K | {cell['static']:.2f} | {cell['flexsp']:.2f} / {flex} "
            f"| {cell['batch_ada']:.2f} / {ada} | {cell['gap']:.1%} | {cell['planner_ms']:.0f} |"
        )
    found = results["proposal"]
    lines += ["", "| strategies, Wikipedia at 32K | seconds a step |", "|---|---|"]
    lines.append(f"| proposed: {'; '.join(found['strategies'])} | {found['proposed']:.2f} |")
    lines.append(f"| the 7 published | {found['published']:.2f} |")
    lines.append(f"| the dynamic program's alone | {found['program_alone']:.2f} |")
    return "\n".join(lines)


page = partial(generated, FOLDER, table_of=table)
"""From the text of README.md to the text with tables made anew."""


def main():
    """Simulate all and say what holds."""
    options = command_line(FOLDER, __doc__, page)
    if options is None:
        return 0
    began, smoke = time.perf_counter(), options.smoke
    seeds, steps = (SEEDS[:1], 2) if smoke else (SEEDS, STEPS)
    rows = [hydraulis(*key, seeds=seeds, steps=steps) for key in FIRST]
    keys = list(PUBLISHED)[:1] if smoke else list(PUBLISHED)
    cells = [flexsp(*key, seeds=seeds, batches=1 if smoke else BATCHES) for key in keys]
    if smoke:
        strategies = [strategy_text(published_strategies()[0])]
        proposal = {"strategies": strategies, "proposed": 1.0, "published": 1.0, "program_alone": 1.0}
    else:
        proposal = proposed(steps=STEPS)
    got = claimed(rows, cells, proposal)
    results = {"rows": rows, "cells": cells, "proposal": proposal, "got": got}
    print(f"{table(results)}\n")
    holds = verdict(FOLDER, got, smoke=smoke)
    wall_s = time.perf_counter() - began
    print(f"{wall_s:.1f} s")
    if not smoke:
        write_results(FOLDER, "comparison", results | {"wall_s": wall_s, "seeds": list(SEEDS)})
        readme = FOLDER / "README.md"
        readme.write_text(page(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0 if holds or smoke else 1


if __name__ == "__main__":
    sys.exit(main())
