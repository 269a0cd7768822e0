"""What `hardy balance` says: analyze, plan, simulate, propose. Imported when one of them is asked for."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hardy.balance.compare import (
    STRATEGY_METHODS,
    Method,
    Row,
    compare,
    layout_text,
    rank_methods,
    strategy_methods,
)
from hardy.balance.plan import Plan, Scheme
from hardy.balance.planner import plan
from hardy.balance.proposal import candidate_strategies, propose, trace_strategies
from hardy.balance.strategies import plan_strategies, strategy_text
from hardy.balance.timeline import timeline
from hardy.cli.balance import Case
from hardy.cli.balance_bridge import bridge_of
from hardy.clock import WallClock
from hardy.optim.table_text import aligned

SAMPLED = 12
"""Batches on which strategies are selected."""
GROUPED = ("static_cp", "batch_cp", "bucketed_cp", "dynamic_cp")
"""Methods whose groups have several ranks."""
Said = tuple[dict[str, Any], list[str]]
"""The same for machines and for readers."""


def _analyze(arguments: argparse.Namespace, case: Case) -> Said:
    lengths = np.concatenate(case.batches)
    squares = lengths.astype(np.float64) ** 2
    ranked = np.sort(lengths)[::-1]
    told: dict[str, Any] = {
        "sequences": int(lengths.size),
        "tokens": int(lengths.sum()),
        "mean": float(lengths.mean()),
        "percentiles": {str(p): int(np.percentile(lengths, p)) for p in (5, 25, 50, 75, 95, 99)},
        "longest": int(ranked[0]),
        "changed": case.changed,
        "tokens_of_longest_percent": float(ranked[: -(-ranked.size // 100)].sum() / lengths.sum()),
        "attention_of_longest_percent": float(
            np.sort(squares)[::-1][: -(-ranked.size // 100)].sum() / squares.sum()
        ),
    }
    rows = _rows(arguments, case)
    best = min(rows, key=lambda row: row.time)
    worth = next(row for row in rows if row.time <= best.time * 1.05)
    told |= {"methods": _plain(rows), "advice": worth.method}
    lines = [
        f"{lengths.size:,} sequences, {told['tokens']:,} tokens, mean {told['mean']:,.0f}, "
        f"longest {told['longest']:,}; {case.changed} were too long ({arguments.overlong})",
        "percentiles " + ", ".join(f"{p}%: {n:,}" for p, n in told["percentiles"].items()),
        f"the longest hundredth has {told['tokens_of_longest_percent']:.0%} of the tokens and "
        f"{told['attention_of_longest_percent']:.0%} of the squares",
        *_told_before(arguments, case),
        "",
        *_table(rows, case.cost.unit),
        "",
        f"worth using: {worth.method}, the first within 5% of the best ({best.method}); simulated",
    ]
    return told, lines


def _plan(arguments: argparse.Namespace, case: Case) -> Said:
    lengths = case.batches[0]
    bridge, chosen = bridge_of(arguments, case.cost), None
    if case.strategies:
        choice = plan_strategies(
            lengths,
            world_size=arguments.ranks,
            cost=case.cost,
            strategies=case.strategies,
            bridge=bridge.time,
        )
        chosen = case.strategies[choice.index]
        made, layout = choice.plan, strategy_text(chosen)
    else:
        mode = arguments.mode or "dynamic_cp"
        if mode == "dynamic_cp":
            case.cost.check_groups(
                arguments.ranks, source=f"--cost {arguments.cost}", way_out="take --mode dispatch"
            )
        made = plan(
            lengths,
            world_size=arguments.ranks,
            cost=case.cost,
            mode=mode,
            objective=arguments.objective,
            degree=arguments.degree,
        )
        layout = layout_text(made)
    files = _draw(made, arguments.png)
    told = {
        "groups": layout,
        "time": made.cost,
        "unit": case.cost.unit,
        "lower_bound": made.lower_bound,
        "gap": made.gap,
        "idle_share": made.idle_share,
        "bound_by": made.bound_by,
        "bridge": bridge.said,
        "hash": made.hash(),
        "slots": [[dataclasses.asdict(batch) for batch in slot] for slot in made.slots],
        "files": files,
    }
    warned = made.warning()
    lines = [
        f"{len(lengths)} sequences, {int(lengths.sum()):,} tokens on {arguments.ranks} ranks: {layout}",
        f"predicted {made.cost:,.1f} {case.cost.unit}, lower bound {made.lower_bound:,.1f}, "
        f"gap {made.gap:.2%}, idle {made.idle_share:.1%}, hash {made.hash():016x}",
        *([f"note: {warned}"] if warned else []),
        *([bridge.said + bridge.of(chosen, case.cost.unit)] if chosen else []),
        *timeline(made),
        *(f"wrote {path}" for path in files),
    ]
    return told, lines


def _draw(made: Plan, path: Path | None) -> list[Path]:
    if path is None:
        return []
    from hardy.cli.balance_plot import draw_timeline

    return [draw_timeline(made, path)]


def _simulate(arguments: argparse.Namespace, case: Case) -> Said:
    rows = _rows(arguments, case)
    lines = [
        f"{len(case.batches)} batches, {sum(map(len, case.batches)):,} sequences, {case.changed} were too "
        f"long ({arguments.overlong}); predicted, nothing is trained",
        *_told_before(arguments, case),
        "",
        *_table(rows, case.cost.unit),
    ]
    for row in rows:
        often = sorted(row.layouts.items(), key=lambda item: -item[1])[:3]
        lines.append(f"{row.method}: " + ", ".join(f"{n}x [{layout}]" for layout, n in often))
    told = {"methods": _plain(rows), "unit": case.cost.unit, "changed": case.changed}
    return told | {"notes": _told_before(arguments, case)}, lines


def _told_before(arguments: argparse.Namespace, case: Case) -> list[str]:
    """Return what is said before a table of methods: of the bridge, or of groups that have no costs."""
    if case.strategies:
        return [bridge_of(arguments, case.cost).said]
    if case.cost.forms_groups(arguments.ranks) or arguments.ranks == 1:
        return []
    return [f"--cost {arguments.cost} has no costs of groups: ways of planning that form groups are left out"]


def _propose(arguments: argparse.Namespace, case: Case) -> Said:
    if all(own.scheme.ranks == 1 for own in case.cost.schemes):
        way_out = "take a cost of several schemes"
        case.cost.check_groups(arguments.ranks, source=f"--cost {arguments.cost}", way_out=way_out)
    bridge, unit = bridge_of(arguments, case.cost), case.cost.unit
    longest = max(int(batch.max()) for batch in case.batches)
    traces = trace_strategies(
        np.concatenate(case.batches),
        world_size=arguments.ranks,
        cost=case.cost,
        length_step=max(128, -(-longest // 32)),
    )
    candidates = candidate_strategies(case.cost, world_size=arguments.ranks, longest=longest)
    found = propose(
        case.batches[:SAMPLED],
        world_size=arguments.ranks,
        cost=case.cost,
        candidates=[*candidates, *traces],
        bridge=bridge.time,
    )
    texts = [strategy_text(strategy) for strategy in found.strategies]
    told = {
        "strategies": texts,
        "times": found.times,
        "bridge_times": [bridge.time(strategy) for strategy in found.strategies],
        "bridge": bridge.said,
        "candidates": found.num_candidates,
    }
    lines = [f"from {found.num_candidates} candidates on {min(SAMPLED, len(case.batches))} batches:"]
    lines += [
        f"  {time:>10,.1f} {unit} with {'' if k == 0 else 'also '}{texts[k]}"
        f"{bridge.of(found.strategies[k], unit)}"
        for k, time in enumerate(found.times)
    ]
    lines.append(bridge.said)
    lines.append(f"--strategies '{' | '.join(texts)}'")
    return told, lines


def _rows(arguments: argparse.Namespace, case: Case) -> list[Row]:
    return compare(case.batches, _methods(arguments, case), cost=case.cost, clock=WallClock())


def _methods(arguments: argparse.Namespace, case: Case) -> Mapping[str, Method]:
    chosen = arguments.methods.split(",") if arguments.methods else None
    if case.strategies:
        return strategy_methods(
            chosen or STRATEGY_METHODS[:3],
            world_size=arguments.ranks,
            cost=case.cost,
            strategies=case.strategies,
            context_tokens=arguments.context,
            switch_cost=arguments.switch_cost,
            bridge=bridge_of(arguments, case.cost).time,
            seed=arguments.seed,
        )
    if chosen and not set(GROUPED).isdisjoint(chosen):
        way_out = "take --methods without them"
        case.cost.check_groups(arguments.ranks, source=f"--cost {arguments.cost}", way_out=way_out)
    return rank_methods(
        chosen or _possible(arguments, case),
        world_size=arguments.ranks,
        cost=case.cost,
        objective=arguments.objective,
        degree=arguments.degree,
        seed=arguments.seed,
    )


def _possible(arguments: argparse.Namespace, case: Case) -> list[str]:
    """Return the methods that hold the longest sequence: equal groups of `degree` may be too small."""
    longest = max(int(batch.max()) for batch in case.batches)
    equal = ["token_ffd", "random", "best_fit", "karmarkar_karp", "longest_first", "dispatch"]
    schemes = {own.scheme: own for own in case.cost.schemes}
    own = schemes.get(Scheme(context=arguments.degree))
    fits = own is not None and own.cap_tokens >= longest and arguments.ranks % arguments.degree == 0
    if fits and arguments.ranks > 1 and not case.cost.forms_groups(arguments.ranks):
        return equal
    return [*(equal if fits else []), *GROUPED]


def _table(rows: Sequence[Row], unit: str) -> Iterator[str]:
    heading = (
        "method",
        unit,
        "speed-up",
        "idle",
        "attention",
        "gap",
        "padding",
        "cap use",
        "varies",
        "plan ms",
    )
    cells = [
        (
            row.method,
            f"{row.time:,.1f}",
            f"{row.speedup:.2f}x",
            f"{row.idle_share:.1%}",
            f"{row.attention_imbalance:.1%}",
            f"{row.gap:.1%}",
            f"{row.padding:.1%}",
            f"{row.cap_use:.0%}",
            f"{row.time_variation:.1%}",
            f"{row.planner_ms:.1f}",
        )
        for row in rows
    ]
    yield aligned([heading, *cells], words=1)


def _plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(dataclasses.replace(row, layouts=dict(row.layouts))) for row in rows]


RUN: dict[str, Callable[[argparse.Namespace, Case], Said]] = {
    "analyze": _analyze,
    "plan": _plan,
    "simulate": _simulate,
    "propose": _propose,
}
