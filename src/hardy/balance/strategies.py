"""Which replicas to form for this batch: the best of a few strategies, with what it costs to change.

Paper: Hydraulis (arXiv 2412.07894). A *strategy* is a multiset of schemes, one for each replica; replicas run
freely and meet once a step. What every step of a strategy moves (the *bridge*: weights to its replicas,
gradients back) and what it takes to go over to another one are part of what is minimised; among equals the
strategy of the step before stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hardy.balance.bounds import Bound, replicas_bound
from hardy.balance.cost import Integers, LengthCostModel, SchemeCost
from hardy.balance.plan import Plan, Scheme, Slot, step_time
from hardy.balance.planner import SequenceTooLongError, finished, lay_out, replicas_work, sort_lengths
from hardy.config import UserError

Strategy = tuple[Scheme, ...]
Bridge = Callable[[Strategy], float]
"""Time that a step takes to bring weights to a strategy's replicas and gradients back, in the costs' unit."""


def no_bridge(_: Strategy) -> float:
    """Return 0: where nothing moves, or it is not counted."""
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best strategy for a batch, and its plan."""

    index: int
    """Of the strategy, among those given."""
    plan: Plan
    considered: int
    """Strategies that were planned; others cannot hold the batch or have a bound above the best."""


@dataclass(frozen=True)
class _Option:
    index: int
    replicas: list[SchemeCost]
    bound: Bound
    extra: float
    """Time that is not computing: the bridge, and going over to this strategy."""


def strategy_text(strategy: Strategy) -> str:
    """Return such as `1x tp16 + 6x tp8`."""
    counts = {scheme: strategy.count(scheme) for scheme in dict.fromkeys(strategy)}
    return " + ".join(f"{count}x {scheme}" for scheme, count in counts.items())


def plan_strategies(
    lengths: Sequence[int] | Integers,
    *,
    world_size: int,
    cost: LengthCostModel,
    strategies: Sequence[Strategy],
    previous: int | None = None,
    switch_cost: float = 0.0,
    bridge: Bridge = no_bridge,
) -> Choice:
    """Return the strategy with the shortest step for these lengths, and its plan.

    Args:
        lengths: tokens of each sequence of the global batch, in any order.
        world_size: ranks; a strategy may leave some without a replica.
        cost: of every scheme.
        strategies: what to choose from.
        previous: index of the strategy of the step before; staying with it costs nothing.
        switch_cost: time that any other strategy takes to set up, in the cost model's unit.
        bridge: time that moving weights and gradients takes in each step, by strategy, such as the
            `BridgeTime` of hardy.distributed.balance.bridge_time.

    Raises:
        UserError: a strategy needs more ranks than there are, or none holds the longest sequence.
    """
    tokens, order = sort_lengths(lengths)
    if not strategies:
        raise UserError("there are no strategies to choose from; give at least one")
    options: list[_Option] = []
    largest = 0
    for index, strategy in enumerate(strategies):
        replicas = [cost.of(scheme) for scheme in strategy]
        used = sum(scheme.ranks for scheme in strategy)
        if not strategy or used > world_size:
            raise UserError(
                f"strategy {index} ({strategy_text(strategy)}) has {used} ranks, not 1 to {world_size}"
            )
        holds = max(replica.cap_tokens for replica in replicas)
        largest = max(largest, holds)
        if holds >= int(tokens[0]):
            switch = 0.0 if previous is None or index == previous else switch_cost
            options.append(
                _Option(index, replicas, replicas_bound(tokens, replicas), bridge(strategy) + switch)
            )
    if not options:
        raise SequenceTooLongError(int(order[0]), int(tokens[0]), largest)
    # The strategy of the step before first, so that a tie keeps it; then the most promising.
    options.sort(
        key=lambda option: (option.index != previous, option.bound.time + option.extra, option.index)
    )
    best: tuple[float, _Option, list[Slot]] | None = None
    considered = 0
    for option in options:
        if best is not None and option.bound.time + option.extra >= best[0]:
            continue
        for work in replicas_work(tokens, option.replicas):
            slots = lay_out(work, tokens, order)
            time = step_time(slots, "free_running") + option.extra
            if best is None or time < best[0] * (1 - 1e-12):
                best = (time, option, slots)
        considered += 1
    assert best is not None, "free-running replicas hold whatever one of them holds"
    time, chosen, slots = best
    least = min(options, key=lambda option: option.bound.time + option.extra)
    bound = Bound(least.bound.time + least.extra, least.bound.alone)
    made = finished(slots, bound, order, world_size=world_size, objective="free_running", cost=time)
    return Choice(index=chosen.index, plan=made, considered=considered)
