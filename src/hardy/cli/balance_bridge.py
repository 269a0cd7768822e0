"""Whether `hardy balance` counts what moving weights to replicas and gradients back takes; what it says."""

import argparse
from dataclasses import dataclass

from hardy.balance.cost import LengthCostModel
from hardy.balance.cost_presets import preset_sizes
from hardy.balance.cost_tables import HYDRAULIS
from hardy.balance.refit import SECONDS_PER_UNIT
from hardy.balance.strategies import Bridge, Strategy, no_bridge
from hardy.distributed.balance.bridge_time import BridgeTime, bridged_decoder


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The bridge as plans count it."""

    time: Bridge
    """Of a strategy's step, in the unit of the costs."""
    said: str
    """Whether it is counted and how, or why not."""
    counts: BridgeTime | None = None
    """What counts, if anything does."""

    def of(self, strategy: Strategy, unit: str) -> str:
        """Return what is said of a strategy; nothing where nothing is counted."""
        if self.counts is None:
            return ""
        sent = self.counts.bytes_of(strategy)
        most = (max(sent.weights) + max(sent.gradients)) / 1e9
        return f" (bridge {self.time(strategy):,.1f} {unit}, {most:,.2f} GB a rank)"


def bridge_of(arguments: argparse.Namespace, cost: LengthCostModel) -> Counted:
    """Return the bridge of the replicas that a cost is of."""
    if all(own.scheme.ranks == own.scheme.context for own in cost.schemes):
        return Counted(time=no_bridge, said="no bridge: groups by context move no weights")
    if arguments.bridge_bandwidth == 0:
        return Counted(time=no_bridge, said="bridge not counted (--bridge-bandwidth 0)")
    if arguments.cost not in HYDRAULIS:
        return Counted(
            time=no_bridge,
            said=f"bridge not counted: --cost {arguments.cost} does not say the sizes of its model",
        )
    # The published memory formula divides the vocabulary by the tensor degree too.
    model = bridged_decoder(preset_sizes(arguments.cost), vocabulary="shared")
    per_unit = arguments.bridge_bandwidth * 1e9 * SECONDS_PER_UNIT[cost.unit]
    counts = BridgeTime(model=model, world_size=arguments.ranks, bytes_per_unit=per_unit)
    return Counted(
        time=counts,
        counts=counts,
        said=f"bridge counted: weights to replicas and gradients back in bf16, at "
        f"{arguments.bridge_bandwidth:g} GB/s a rank (--bridge-bandwidth), not hidden behind computing",
    )
