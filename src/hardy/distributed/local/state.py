"""What local-update training must remember, as named tensors and plain values, and back.

Vectors of a unit (anchor, momentum, what compression left out, sums on their way) are saved parameter by
parameter, laid out as the parameters are, so that other numbers of shards read them. Each replica saves its
own; anchors and momentum are equal on all. A run goes on with another number of replicas from anchors and
momentum alone.
"""

import io
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hardy.config import UserError
from hardy.distributed.comm import Communicator
from hardy.distributed.local.round import Exchanged, Pending, Table
from hardy.distributed.local.units import Units
from hardy.distributed.sharded import local_part
from hardy.distributed.strategy import SAVED_DTYPES

if TYPE_CHECKING:
    from hardy.distributed.local.updates import LocalUpdates

Vectors = dict[str, Tensor]
"""`PART/UNIT/NAME` -> fp32 [n]."""

_COUNTERS = ("step", "round", "steps_since", "total_steps", "rollbacks", "repairs", "wait_s")


def pack(units: Units, vectors: Vectors, small: Mapping[str, Tensor], plain: Any) -> dict[str, Any]:
    """Return one flat dict: a tensor for each parameter of each vector, small tensors, and `about`.

    Args:
        units: say how a vector is laid out.
        vectors: see `Vectors`.
        small: tensors that are equal on all workers of the replica.
        plain: JSON-like values.
    """
    about = {
        "vectors": sorted(vectors),
        "small": {name: [str(value.dtype), list(value.shape)] for name, value in small.items()},
        "plain": plain,
    }
    packed: dict[str, Any] = {"about": about}
    for name, values_n in vectors.items():
        packed |= {f"{name}/{key}": part for key, part in units.named(_unit_of(name), values_n).items()}
    return packed | dict(small)


def room_for(units: Units, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `pack` gave for a saved run, with zeros, to be filled."""
    vectors = {name: torch.zeros(units.sizes[_unit_of(name)]) for name in about["vectors"]}
    small = {
        name: torch.zeros(shape, dtype=SAVED_DTYPES[dtype]) for name, (dtype, shape) in about["small"].items()
    }
    return pack(units, vectors, small, about["plain"])


def unpack(units: Units, packed: Mapping[str, Any]) -> tuple[Vectors, dict[str, Tensor], Any]:
    """Return (vectors, small, plain) of what `pack` gave.

    Raises:
        UserError: a unit or parameter is missing: the model has other units than the saved one.
    """
    about = packed["about"]
    vectors: Vectors = {}
    for name in about["vectors"]:
        unit = _unit_of(name)
        if unit >= len(units):
            raise UserError(
                f"the checkpoint has a unit {unit} to exchange, the model has {len(units)}; resume with the "
                f"model it was saved with"
            )
        values_n = torch.zeros(units.sizes[unit], device=units.device)
        for key, part in units.named(unit, values_n).items():
            if f"{name}/{key}" not in packed:
                raise UserError(
                    f"the checkpoint has no {name} of parameter {key}; resume with the model, units and "
                    f"strategy it was saved with"
                )
            local_part(part).copy_(local_part(packed[f"{name}/{key}"]))
        vectors[name] = values_n
    return vectors, {name: packed[name] for name in about["small"]}, about["plain"]


def share(outer: Communicator, state: Mapping[str, Any], *, source: int) -> dict[str, Any]:
    """Return member `source`'s state on all members; the others' is not looked at.

    Args:
        outer: the members.
        state: dicts and lists of tensors and plain values.
        source: whose.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    mine = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    size = int(outer.broadcast(torch.tensor(len(mine)), source=source))
    sent = outer.broadcast(mine if outer.rank == source else mine.new_zeros(size), source=source)
    return torch.load(io.BytesIO(sent.numpy().tobytes()), map_location="cpu", weights_only=True)


def below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def sort_out(part: str, state: Mapping[str, Any], sizes: tuple[int, ...]) -> Iterator[tuple[str, str, Any]]:
    """Yield (kind, name, value): "vector" `PART/UNIT/NAME`, "small" tensors, "plain" values."""
    for key, value in state.items():
        head = key.partition("/")[0]
        if not isinstance(value, Tensor):
            yield "plain", key, value
        elif head.isdigit() and value.shape == (sizes[int(head)],):
            yield "vector", f"{part}/{key}", value
        else:
            yield "small", f"{part}/{key}", value


def remember(strategy: "LocalUpdates") -> dict[str, Any]:
    """Return all that a resume needs."""
    parts = strategy.parts
    vectors: Vectors = {f"anchor/{unit}/A": anchor_n for unit, anchor_n in enumerate(strategy.anchors)}
    small: dict[str, Tensor] = {}
    plain: dict[str, Any] = {
        "replicas": strategy.outer.size,
        "counters": {key: getattr(strategy, key) for key in _COUNTERS},
        "rates": [float(rate) for rate in strategy.rates],
        "pending": [],
    }
    states = {
        "outer": parts.outer_optimizer.state_dict(),
        "aggregation": parts.aggregation.state_dict(),
        "compression": parts.compression.state_dict(),
        "trigger": parts.trigger.state_dict(),
        "report": strategy.report.state_dict(),
        **{f"anomaly{f}": guard.state_dict() for f, guard in enumerate(strategy.guards)},
    }
    for part, state in states.items():
        for kind, name, value in sort_out(part, state, strategy.units.sizes):
            if kind == "plain":
                plain.setdefault(part, {})[name] = value
            else:
                (vectors if kind == "vector" else small)[name] = value
    for index, pending in enumerate(strategy.pending):
        strategy.wait_for(pending)
        plain["pending"].append({"units": pending.table.units, "due_step": pending.due_step})
        small |= {f"pending{index}/{key}": value for key, value in pending.table.tensors().items()}
        for unit, future in zip(pending.table.units, pending.exchanged, strict=True):
            if future is not None:
                vectors[f"pending{index}/{unit}/S"] = strategy.lane.result(future)[0]
    return pack(strategy.units, vectors, small, plain)


def recall(strategy: "LocalUpdates", packed: Mapping[str, Any]) -> None:
    """Take back what `remember` gave; of other replicas what they had in common, at their anchor."""
    vectors, small, plain = unpack(strategy.units, packed)

    def state_of(part: str) -> dict[str, Any]:
        prefix = f"{part}/"
        return below(prefix, vectors) | below(prefix, small) | plain.get(part, {})

    common = {
        "anchors": [vectors[f"anchor/{unit}/A"] for unit in range(len(below("anchor/", vectors)))],
        "outer": state_of("outer"),
        "aggregation": state_of("aggregation"),
        "counters": plain["counters"],
    }
    if plain["replicas"] != strategy.outer.size:
        adopt(strategy, common)
        return
    _take_common(strategy, common)
    strategy.parts.compression.load_state_dict(state_of("compression"))
    strategy.parts.trigger.load_state_dict(state_of("trigger"))
    strategy.report.load_state_dict(state_of("report"))
    strategy.rates = plain["rates"]
    for fragment, guard in enumerate(strategy.guards):
        guard.load_state_dict(state_of(f"anomaly{fragment}"))
    strategy.pending = [
        _restored(strategy, entry, below(f"pending{index}/", small), below(f"pending{index}/", vectors))
        for index, entry in enumerate(plain["pending"])
    ]


def in_common(strategy: "LocalUpdates") -> dict[str, Any]:
    """Return what all replicas hold alike."""
    return {
        "anchors": strategy.anchors,
        "outer": strategy.parts.outer_optimizer.state_dict(),
        "aggregation": strategy.parts.aggregation.state_dict(),
        "counters": {key: getattr(strategy, key) for key in _COUNTERS},
    }


def adopt(strategy: "LocalUpdates", common: Mapping[str, Any]) -> None:
    """Begin where others are: their anchor, momentum and counters, the weights at the anchor."""
    _take_common(strategy, common)
    strategy.steps_since = 0
    strategy.rates = [0.0] * len(strategy.rates)
    strategy.pending = []
    for unit, anchor_n in enumerate(strategy.anchors):
        strategy.units.write(unit, anchor_n)


def _take_common(strategy: "LocalUpdates", common: Mapping[str, Any]) -> None:
    strategy.anchors = [strategy.kept(anchor_n) for anchor_n in common["anchors"]]
    strategy.parts.outer_optimizer.load_state_dict(common["outer"])
    strategy.parts.aggregation.load_state_dict(common["aggregation"])
    for key, value in common["counters"].items():
        setattr(strategy, key, value)


def _restored(
    strategy: "LocalUpdates",
    entry: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
) -> Pending:
    """Return a round that was under way: its sums are there, what they were made of is not known any more."""
    table = Table.of(entry["units"], tensors)
    exchanged = [
        strategy.lane.submit(partial(_alone, sums[f"{unit}/S"])) if f"{unit}/S" in sums else None
        for unit in table.units
    ]
    done = [False] * len(table.units)
    return Pending(table=table, due_step=entry["due_step"], exchanged=exchanged, done=done)


def _alone(sum_n: Tensor) -> Exchanged:
    square = torch.linalg.vecdot(sum_n.double(), sum_n.double())
    return sum_n, torch.stack([square, torch.zeros_like(square), torch.zeros_like(square)])


def _unit_of(name: str) -> int:
    return int(name.split("/")[1])
