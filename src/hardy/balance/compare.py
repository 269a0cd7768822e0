"""Ways of planning side by side on the same batches: predicted time, idle ranks, balance, padding."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hardy.balance.baselines import RULES, baseline, best_equal_groups, equal_groups
from hardy.balance.bounds import Bound
from hardy.balance.buckets import bucketed_groups
from hardy.balance.cost import Integers, LengthCostModel
from hardy.balance.plan import Objective, Plan, Scheme, Slot
from hardy.balance.planner import finished, plan, sort_lengths
from hardy.balance.strategies import Bridge, Strategy, no_bridge, plan_strategies, strategy_text
from hardy.clock import Clock
from hardy.config import UserError
from hardy.rng import numpy_generator_for

Method = Callable[[Integers], tuple[Plan, str]]
"""From the lengths of a batch to its plan, and a word for the layout it chose."""
ALIGNMENT = 128
"""Tokens that a pack is padded to a multiple of, where kernels ask for it."""
BUCKET_EDGES = (4096, 16384, 32768)
"""Lengths at which `bucketed` cuts a batch."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a way of planning came to, means over batches."""

    method: str
    time: float
    """Predicted time of a step, in the cost model's unit."""
    speedup: float
    """Of the first method's time over this one's."""
    idle_share: float
    """Share of the ranks' time in which they wait for others."""
    attention_imbalance: float
    """Attention balance ratio: mean over ranks of (most - own) / most; 0 is even."""
    gap: float
    """Mean share over the lower bound of what this method may do."""
    padding: float
    """Share of tokens that only fill packs up to the alignment."""
    cap_use: float
    """Tokens of a micro-batch over its cap, mean."""
    time_variation: float
    """Standard deviation over mean of the step's time across batches."""
    planner_ms: float
    layouts: Mapping[str, int]
    """How often which groups were chosen."""


def compare(
    batches: Sequence[Integers], methods: Mapping[str, Method], *, cost: LengthCostModel, clock: Clock
) -> list[Row]:
    """Return one row for each method, over the same batches; the first is what others are measured by.

    Args:
        batches: lengths of each global batch.
        methods: by name.
        cost: by which time is predicted.
        clock: what the planner's own time is taken from.
    """
    if not batches:
        raise UserError("there is no batch to compare on; give more lengths or a smaller budget of tokens")
    rows: list[Row] = []
    for name, method in methods.items():
        began = clock.now()
        planned = [method(batch) for batch in batches]
        took_ms = (clock.now() - began) * 1e3 / len(batches)
        plans = [made for made, _ in planned]
        times = np.array([made.cost for made in plans])
        uses = [_uses(made, cost) for made in plans]
        rows.append(
            Row(
                method=name,
                time=float(times.mean()),
                speedup=rows[0].time / float(times.mean()) if rows else 1.0,
                idle_share=float(np.mean([made.idle_share for made in plans])),
                attention_imbalance=float(
                    np.mean(
                        [
                            attention_imbalance(made, batch, cost)
                            for made, batch in zip(plans, batches, strict=True)
                        ]
                    )
                ),
                gap=float(np.mean([made.gap for made in plans])),
                padding=float(np.mean([padding(made) for made in plans])),
                cap_use=float(np.mean(uses)),
                time_variation=float(times.std() / times.mean()),
                planner_ms=took_ms,
                layouts=Counter(layout for _, layout in planned),
            )
        )
    return rows


def attention_imbalance(made: Plan, lengths: Integers, cost: LengthCostModel) -> float:
    """Return mean over ranks of (most - own) / most of the quadratic part; 0 where there is none."""
    own = np.zeros(made.world_size)
    for group, batches in made.micro_batches.items():
        taken = [index for batch in batches for index in batch.sequences]
        if taken:
            own[list(group.ranks)] += cost.of(group.scheme).attention(lengths[taken]).sum()
    return float((own.max() - own).mean() / own.max()) if own.max() > 0 else 0.0


def padding(made: Plan, *, alignment: int = ALIGNMENT) -> float:
    """Return the share of tokens that only fill packs up to a multiple of `alignment`."""
    tokens = [batch.tokens for slot in made.slots for batch in slot]
    padded = sum(-(-size // alignment) * alignment for size in tokens)
    return 1 - sum(tokens) / padded


def _uses(made: Plan, cost: LengthCostModel) -> float:
    caps = {group: cost.of(group.scheme).cap_tokens for group in made.groups}
    uses = [batch.tokens / caps[batch.group] for slot in made.slots for batch in slot if batch.sequences]
    return float(np.mean(uses))


def layout_text(made: Plan) -> str:
    """Return the groups of every slot, such as `1x cp4 + 4x cp1; 8x cp1`."""
    return "; ".join(strategy_text(tuple(batch.group.scheme for batch in slot)) for slot in made.slots)


RANK_METHODS: tuple[str, ...] = (
    *RULES,
    "static_cp",
    "batch_cp",
    "bucketed_cp",
    "dispatch",
    "dynamic_cp",
)
"""What is compared where groups are context parallel."""


def rank_methods(
    names: Sequence[str],
    *,
    world_size: int,
    cost: LengthCostModel,
    objective: Objective,
    degree: int = 1,
    seed: int = 0,
) -> dict[str, Method]:
    """Return methods of context-parallel groups by name.

    Args:
        names: of `RANK_METHODS`.
        world_size: ranks.
        cost: of the groups.
        objective: when ranks meet; static_cp and batch_cp are of systems in lock-step.
        degree: ranks of each group where all are equal.
        seed: of the rules that draw.
    """

    def method(name: str) -> Method:
        if name in RULES:
            generator = numpy_generator_for(seed, "balance", name)
            scheme = Scheme(context=degree)
            return lambda batch: _told(
                baseline(
                    name,
                    batch,
                    world_size=world_size,
                    cost=cost,
                    generator=generator,
                    objective=objective,
                    scheme=scheme,
                )
            )
        if name == "static_cp":
            most = max(own.scheme.context for own in cost.context_schemes(world_size))
            return lambda batch: _told(equal_groups(batch, world_size=world_size, cost=cost, degree=most))
        if name == "batch_cp":
            return lambda batch: _told(best_equal_groups(batch, world_size=world_size, cost=cost))
        if name == "bucketed_cp":
            return lambda batch: _told(
                bucketed_groups(batch, world_size=world_size, cost=cost, objective=objective)
            )
        if name == "dispatch":
            return lambda batch: _told(
                plan(
                    batch,
                    world_size=world_size,
                    cost=cost,
                    mode="dispatch",
                    objective=objective,
                    degree=degree,
                )
            )
        if name == "dynamic_cp":
            return lambda batch: _told(plan(batch, world_size=world_size, cost=cost, objective=objective))
        raise UserError(f"there is no method {name!r}; there are {', '.join(RANK_METHODS)}")

    return {name: method(name) for name in names}


def _told(made: Plan) -> tuple[Plan, str]:
    return made, layout_text(made)


STRATEGY_METHODS = ("fixed", "balanced", "dynamic", "bucketed")
"""What is compared where replicas have schemes of their own."""


def strategy_methods(
    names: Sequence[str],
    *,
    world_size: int,
    cost: LengthCostModel,
    strategies: Sequence[Strategy],
    context_tokens: int | None = None,
    switch_cost: float = 0.0,
    bridge: Bridge = no_bridge,
    seed: int = 0,
) -> dict[str, Method]:
    """Return methods of free-running replicas by name; the first strategy is the homogeneous one.

    Args:
        names: of `STRATEGY_METHODS`.
        world_size: ranks.
        cost: of all schemes.
        strategies: candidates; `fixed` and `balanced` keep to the first.
        context_tokens: longest sequence; packs of `fixed` are no longer, or none.
        switch_cost: time to change the strategy.
        bridge: time that moving weights and gradients takes in each step, as in `plan_strategies`.
        seed: of the rule that draws.
    """
    generator = numpy_generator_for(seed, "balance", "fixed")
    capped = cost if context_tokens is None else _capped(cost, context_tokens)

    def fixed(batch: Integers) -> tuple[Plan, str]:
        scheme = strategies[0][0]
        made = baseline(
            "token_ffd_shuffled",
            batch,
            world_size=world_size,
            cost=capped,
            generator=generator,
            objective="free_running",
            scheme=scheme,
        )
        moved = bridge(strategies[0])
        made = replace(made, cost=made.cost + moved, lower_bound=made.lower_bound + moved)
        return made, strategy_text(strategies[0])

    def balanced(batch: Integers) -> tuple[Plan, str]:
        choice = plan_strategies(
            batch, world_size=world_size, cost=cost, strategies=strategies[:1], bridge=bridge
        )
        return choice.plan, strategy_text(strategies[0])

    before: list[int | None] = [None]

    def dynamic(batch: Integers) -> tuple[Plan, str]:
        choice = plan_strategies(
            batch,
            world_size=world_size,
            cost=cost,
            strategies=strategies,
            previous=before[0],
            switch_cost=switch_cost,
            bridge=bridge,
        )
        before[0] = choice.index
        return choice.plan, strategy_text(strategies[choice.index])

    def bucketed(batch: Integers) -> tuple[Plan, str]:
        equal = [strategy for strategy in strategies if len(set(strategy)) == 1]
        return _bucketed(batch, world_size=world_size, cost=cost, strategies=equal, bridge=bridge)

    known: dict[str, Method] = {
        "fixed": fixed,
        "balanced": balanced,
        "dynamic": dynamic,
        "bucketed": bucketed,
    }
    for name in names:
        if name not in known:
            raise UserError(f"there is no method {name!r}; there are {', '.join(STRATEGY_METHODS)}")
    return {name: known[name] for name in names}


def _capped(cost: LengthCostModel, tokens: int) -> LengthCostModel:
    return replace(
        cost,
        schemes=tuple(replace(own, cap_tokens=min(own.cap_tokens, tokens)) for own in cost.schemes),
    )


def _bucketed(
    batch: Integers,
    *,
    world_size: int,
    cost: LengthCostModel,
    strategies: Sequence[Strategy],
    bridge: Bridge,
) -> tuple[Plan, str]:
    """Return the parts of a batch by length one after the other, each with its best equal replicas."""
    tokens, order = sort_lengths(batch)
    places = np.searchsorted(np.array(BUCKET_EDGES), batch, side="left")
    slots: list[Slot] = []
    time = 0.0
    chosen: list[str] = []
    for place in sorted(set(places.tolist()), reverse=True):
        members = np.flatnonzero(places == place)
        choice = plan_strategies(
            batch[members], world_size=world_size, cost=cost, strategies=strategies, bridge=bridge
        )
        time += choice.plan.cost
        chosen.append(strategy_text(strategies[choice.index]))
        slots += [_renamed(slot, members) for slot in choice.plan.slots]
    whole = plan_strategies(
        tokens, world_size=world_size, cost=cost, strategies=strategies, bridge=bridge
    ).plan
    bound = Bound(min(whole.lower_bound, time), None)
    made = finished(slots, bound, order, world_size=world_size, objective="free_running", cost=time)
    return made, "; ".join(chosen)


def _renamed(slot: Slot, members: Integers) -> Slot:
    return tuple(replace(b, sequences=tuple(int(members[i]) for i in b.sequences)) for b in slot)
