"""Cost models by name, from published coefficients: Hydraulis' schemes, FlexSP's sequence-parallel groups.

Papers: Hydraulis (arXiv 2412.07894), FlexSP (arXiv 2412.01523). Letters: (od, ot, op) data, tensor and
pipeline degree of the homogeneous layout that holds the optimizer's state, alpha its share of all model
state.
"""

import math
from typing import NamedTuple

from hardy.balance.cost import DecoderSizes, LengthCostModel, SchemeCost
from hardy.balance.cost_tables import (
    FLEXSP,
    FLEXSP_BANDWIDTH,
    HYDRAULIS,
    STRATEGIES_32B_64,
    Machine,
    MemoryRow,
)
from hardy.balance.plan import Scheme
from hardy.config import UserError, unknown_name

MIB = 2**20
ALPHA = 0.75
"""Optimizer state among all model state: 12 of 16 bytes."""
CAP_MULTIPLE = 128
HEAD_SIZE = 128
FLEXSP_GPUS = 64
FLEXSP_GPU_MIB = 30 * 1024


class OptimizerLayout(NamedTuple):
    """The one layout in which the optimizer's state lies for ever."""

    data: int
    tensor: int
    pipeline: int


LAYOUTS: dict[str, OptimizerLayout] = {
    "hydraulis-7b": OptimizerLayout(8, 4, 1),
    "hydraulis-13b": OptimizerLayout(8, 4, 1),
    "hydraulis-32b": OptimizerLayout(4, 16, 1),
    "hydraulis-7b-a100": OptimizerLayout(8, 4, 1),
}
"""Published: 64 GPUs for 32B, 32 for the others."""

Strategy = tuple[Scheme, ...]
"""The schemes of all replicas, large ones first."""


def cost_preset(name: str) -> LengthCostModel:
    """Return a published cost model.

    Raises:
        UserError: no such preset.

    Example:
        >>> cost = cost_preset("hydraulis-32b").of(Scheme(tensor=16))
        >>> round((cost.a * 32768 + cost.b) * 32768, 2), cost.cap_tokens
        (4836.0, 43520)
    """
    if name in HYDRAULIS:
        return hydraulis_cost(HYDRAULIS[name], layout=LAYOUTS[name], source=name)
    if name in FLEXSP:
        return flexsp_cost(name)
    raise UserError(unknown_name(name, "cost preset", [*HYDRAULIS, *FLEXSP]))


def preset_sizes(name: str) -> DecoderSizes:
    """Return the sizes of a Hydraulis preset's model, as far as they are published.

    Layers, hidden size and vocabulary are; a layer is taken to have the usual 12 H^2 weights, heads of 128.
    """
    machine = HYDRAULIS[name]
    heads = machine.hidden_size // HEAD_SIZE
    return DecoderSizes(
        num_layers=machine.num_layers,
        hidden_size=machine.hidden_size,
        intermediate_size=4 * machine.hidden_size,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=HEAD_SIZE,
        vocab_size=machine.vocab_size,
        ffn_matrices=2,
    )


def hydraulis_cost(machine: Machine, *, layout: OptimizerLayout, source: str) -> LengthCostModel:
    """Return the schemes that fit into memory and whose fit is sound (a above 0)."""
    memory = {row.tensor: row for row in machine.memory}
    schemes: list[SchemeCost] = []
    for row in machine.times:
        scheme = Scheme(tensor=row.tensor, pipeline=row.pipeline)
        if row.a == 0 or row.tensor not in memory:
            continue
        cap_tokens = token_cap(machine, memory[row.tensor], scheme, layout)
        if cap_tokens >= CAP_MULTIPLE:
            util = memory[row.tensor].util_tokens
            schemes.append(
                SchemeCost(scheme=scheme, a=row.a, b=row.b, c=row.c, cap_tokens=cap_tokens, util_tokens=util)
            )
    return LengthCostModel(schemes=tuple(schemes), unit="ms", facts=(("source", source),))


def token_cap(machine: Machine, row: MemoryRow, scheme: Scheme, layout: OptimizerLayout) -> int:
    """Return most tokens of a micro-batch under `scheme` (S_max); negative where model state does not fit.

    Activations count all layers although a stage holds some: as many micro-batches as stages are in flight.
    """
    L, H, V, B = machine.num_layers, machine.hidden_size, machine.vocab_size, machine.state_bytes
    tp, pp = scheme.tensor, scheme.pipeline
    od, ot, op = layout

    def of_vocabulary(stages: int) -> int:
        return 32 if stages == 1 else 16

    states = (L / op) * (H**2 / ot) * B * ALPHA / od + (L / pp) * (H**2 / tp) * B * (1 - ALPHA)
    states += (H * V / ot) * of_vocabulary(op) * ALPHA / od + (H * V / tp) * of_vocabulary(pp) * (1 - ALPHA)
    free = (machine.gpu_mib - machine.safe_mib - machine.gap_mib) * MIB - states
    return CAP_MULTIPLE * math.floor(free / (L * (H / tp) * row.activation_bytes) / CAP_MULTIPLE)


def flexsp_cost(name: str) -> LengthCostModel:
    """Return FlexSP's groups of 2 to 64 GPUs, as context parallelism; its solver leaves single GPUs out."""
    row = FLEXSP[name]
    states = row.params_gi * 16 * 1024 / FLEXSP_GPUS
    cap = math.floor((FLEXSP_GPU_MIB - states) / row.activation_mib)

    def one(degree: int) -> SchemeCost:
        exchanged = 16 * row.num_layers * row.hidden_size / MIB / degree / FLEXSP_BANDWIDTH[degree]
        return SchemeCost(
            scheme=Scheme(context=degree),
            a=row.a / degree,
            b=row.b / degree + exchanged,
            c=row.beta,
            cap_tokens=cap * degree,
        )

    return LengthCostModel(schemes=tuple(map(one, FLEXSP_BANDWIDTH)), unit="ms", facts=(("source", name),))


def published_strategies() -> tuple[Strategy, ...]:
    """Return the seven strategies published for 32B on 64 GPUs, the optimizer's own first."""
    return tuple(
        tuple(
            Scheme(tensor=tensor, pipeline=pipeline)
            for count, tensor, pipeline in parts
            for _ in range(count)
        )
        for parts in STRATEGIES_32B_64
    )
