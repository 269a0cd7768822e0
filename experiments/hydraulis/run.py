"""Hydraulis and FlexSP simulated from their published coefficients; see README.md.

hardy reproduce hydraulis            # a minute on two cores
hardy reproduce hydraulis --smoke    # seconds, proves nothing but that it runs
"""

import itertools
import statistics
import sys
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import numpy as np  # noqa: E402  the path is set above
from claims import Study, main  # noqa: E402

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
GROUPED = ("static_cp", "batch_cp", "bucketed_cp", "dynamic_cp")
"""Static groups as in DeepSpeed, BatchAda, FlexSP with the 16 buckets of its solver, and ours."""


def batches_of(source, context, *, seed, steps):
    """Return lengths of global batches of a token budget."""
    drawn = draw_lengths(source, 1000 * steps, np.random.default_rng(seed))
    lengths = fit_lengths(drawn, most_tokens=context, overlong="truncate").lengths
    return [lengths[place] for place in token_batches(lengths, budget_tokens=BUDGET)[:steps]]


def hydraulis(key, *, steps):
    """Return one row of one seed: seconds of each method, and how well the plans are."""
    source, context, seed = key
    cost = cost_preset("hydraulis-32b")
    methods = strategy_methods(
        METHODS,
        world_size=RANKS,
        cost=cost,
        strategies=published_strategies(),
        context_tokens=context,
        seed=seed,
    )
    batches = batches_of(source, context, seed=seed, steps=steps)
    found = compare(batches, methods, cost=cost, clock=WallClock())
    seconds = {name: row.time / 1e3 for name, row in zip(METHODS, found, strict=True)}
    best = found[2]
    return seconds | {"idle": best.idle_share, "gap": best.gap, "planner_ms": best.planner_ms}


def flexsp(key, *, batches):
    """Return one cell: seconds of static groups, BatchAda, FlexSP and our planner; seed None: in order."""
    model, context_k, seed = key
    cost = cost_preset(f"flexsp-{model}-{context_k}k")
    lengths = documents() if seed is None else drawn_documents((batches + 2) * SEQUENCES, seed)
    padded = -(-lengths // ALIGNED) * ALIGNED
    kept = padded[padded <= 1000 * context_k - ALIGNED]
    given = [kept[k * SEQUENCES : (k + 1) * SEQUENCES] for k in range(batches)]
    methods = rank_methods(GROUPED, world_size=RANKS, cost=cost, objective="lock_step")
    static, ada, flex, ours = compare(given, methods, cost=cost, clock=WallClock())
    return {
        "static": static.time / 1e3,
        "batch_ada": ada.time / 1e3,
        "flexsp": flex.time / 1e3,
        "ours": ours.time / 1e3,
        "gap": ours.gap,
        "planner_ms": ours.planner_ms,
    }


def documents():
    """Return the lengths of the first Wikipedia documents, in order."""
    text = (FOLDER / "wikipedia_documents.txt").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return np.array([int(word) for line in lines for word in line.split()])


def drawn_documents(count, seed):
    """Return lengths drawn from the histogram of a million of them."""
    return draw_lengths("wikipedia", count, np.random.default_rng(seed))


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


def averaged(group):
    """Return the rows or cells with means over the seeds in place of lists."""
    return [
        {name: statistics.fmean(value) if isinstance(value, list) else value for name, value in row.items()}
        for row in group
    ]


def rows_of(measured):
    """Return the rows with their ratios."""
    return [
        row
        | {
            "total": row["fixed"] / row["dynamic"],
            "balance": row["fixed"] / row["balanced"],
            "heterogeneity": row["balanced"] / row["dynamic"],
        }
        for row in averaged(measured["rows"])
    ]


def cells_of(cells):
    """Return cells with ratios over static groups in place of seconds."""
    return [
        cell | {name: cell["static"] / cell[name] for name in ("flexsp", "batch_ada", "ours")}
        for cell in averaged(cells)
    ]


def errors_of(cells):
    """Return how far each ratio of FlexSP and BatchAda is off the published one, as a share of it."""
    return [
        abs(cell[name] / published - 1)
        for cell in cells_of(cells)
        for name, published in zip(
            ("flexsp", "batch_ada"), PUBLISHED[cell["model"], cell["context_k"]], strict=True
        )
    ]


def claimed(measured):
    """Return the numbers that claims are about."""
    rows, proposal = rows_of(measured), measured["proposal"]
    first = [FIRST[row["source"], row["context"]] for row in rows]
    in_order, drawn = errors_of(measured["in_order"]), errors_of(measured["drawn"])
    cells = cells_of(measured["in_order"]) + cells_of(measured["drawn"])
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
        "flexsp_mean_error": float(np.mean(in_order)),
        "flexsp_worst_error": max(in_order),
        "flexsp_drawn_mean_error": float(np.mean(drawn)),
        "flexsp_drawn_worst_error": max(drawn),
        "flexsp_orderings": sum(1 < cell["batch_ada"] < cell["flexsp"] for cell in cells),
        "ours_over_flexsp": min(cell["ours"] / cell["flexsp"] for cell in cells),
        "strategies_over_published": proposal["proposed"] / proposal["published"],
    }


def table(results):
    """Return the tables of results as text."""
    lines = [
        "| lengths | fixed s | balanced s | dynamic s | total | balance x choice | idle | gap | plan ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_of(results):
        lines.append(
            f"| {row['source']}, {row['context']} | {row['fixed']:.2f} | {row['balanced']:.2f} "
            f"| {row['dynamic']:.2f} | {row['total']:.2f} "
            f"| {row['balance']:.2f} x {row['heterogeneity']:.2f} | {row['idle']:.1%} "
            f"| {row['gap']:.1%} | {row['planner_ms']:.0f} |"
        )
    lines += [
        "",
        "| Wikipedia | static s | FlexSP / published | BatchAda / published | ours | gap | planner ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for word, cells in (("in order", results["in_order"]), ("drawn", results["drawn"])):
        for cell in cells_of(cells):
            flex, ada = PUBLISHED[cell["model"], cell["context_k"]]
            lines.append(
                f"| {word}: {cell['model']}, {cell['context_k']}K | {cell['static']:.2f} "
                f"| {cell['flexsp']:.2f} / {flex} | {cell['batch_ada']:.2f} / {ada} | {cell['ours']:.2f} "
                f"| {cell['gap']:.1%} | {cell['planner_ms']:.0f} |"
            )
    found = results["proposal"]
    lines += ["", "| strategies, Wikipedia at 32K | seconds a step |", "|---|---|"]
    lines.append(f"| proposed: {'; '.join(found['strategies'])} | {found['proposed']:.2f} |")
    lines.append(f"| the 7 published | {found['published']:.2f} |")
    lines.append(f"| the dynamic program's alone | {found['program_alone']:.2f} |")
    return "\n".join(lines)


def by_seed(trials, work, keys, *, seeds, names):
    """Return for each key what `work` makes of it with each seed, numbers as lists."""
    told = trials.run(
        work,
        [(*key, seed) for key, seed in itertools.product(keys, seeds)],
        label=lambda key: ", ".join(map(str, key)),
    )
    rows = []
    for key in keys:
        found = [told[(*key, seed)] for seed in seeds]
        rows.append(
            dict(zip(names, key, strict=True)) | {name: [one[name] for one in found] for name in found[0]}
        )
    return rows


def measure(trials, is_smoke):
    """Simulate everything."""
    seeds, steps = (SEEDS[:1], 2) if is_smoke else (SEEDS, STEPS)
    flexsp_keys, batches = (list(PUBLISHED)[:1], 1) if is_smoke else (list(PUBLISHED), BATCHES)
    rows = by_seed(
        trials, partial(hydraulis, steps=steps), list(FIRST), seeds=seeds, names=("source", "context")
    )
    drawn, in_order = (
        by_seed(
            trials, partial(flexsp, batches=batches), flexsp_keys, seeds=some, names=("model", "context_k")
        )
        for some in (seeds, (None,))
    )
    proposal = {"strategies": [strategy_text(published_strategies()[0])]}
    if is_smoke:
        proposal |= {"proposed": 1.0, "published": 1.0, "program_alone": 1.0}
    else:
        name = "strategies proposed for Wikipedia"
        proposal = trials.run(lambda _: proposed(steps=STEPS), [name], label=str)[name]
    return {"rows": rows, "in_order": in_order, "drawn": drawn, "proposal": proposal}


def of_seed(measured, place):
    """Return what one seed gave; what is of one seed anyway stays."""

    def one(group):
        return [
            {
                name: value[place : place + 1] if isinstance(value, list) else value
                for name, value in row.items()
            }
            for row in group
        ]

    return measured | {"rows": one(measured["rows"]), "drawn": one(measured["drawn"])}


STUDY = Study(
    folder=FOLDER,
    about=__doc__,
    measure=measure,
    numbers=claimed,
    tables=table,
    seeds=SEEDS,
    of_seed=of_seed,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
