"""What a gossiping replica must remember, as named tensors and plain values, and back.

Vectors are saved parameter by parameter, laid out as the parameters are. What is under way between replicas
is taken before its time and saved by its receiver, so that nothing of the replicas' sum is lost.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hardy.config import UserError
from hardy.distributed.gossip.distances import Known
from hardy.distributed.gossip.exchange import Counters, Ledger, Letter, Receipt, Sent, Sums
from hardy.distributed.gossip.message import SIZE

if TYPE_CHECKING:
    from hardy.distributed.gossip.push_sum import PushSum

_COUNTERS = ("step", "round", "settled", "mass")


def remember(strategy: "PushSum") -> dict[str, Any]:
    """Return all that a resume needs."""
    _draw_in(strategy)
    about = _about(strategy)
    return {"about": about} | dict(_named(strategy, _groups(strategy), _small(strategy)))


def room_for(strategy: "PushSum", about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `remember` gave for a saved run, with zeros, to be filled."""
    return {"about": dict(about)} | dict(_named(strategy, *_zeros(strategy, about)))


def recall(strategy: "PushSum", packed: Mapping[str, Any]) -> None:
    """Take back what `remember` gave; among other replicas begin anew at the weights, with mass 1.

    So does one that reads another's checkpoint, having none of its own.

    Raises:
        UserError: a tensor is missing.
    """
    about = packed["about"]
    me = strategy.exchange.me
    if about["members"] != list(strategy.exchange.members) or about.get("replica", me) != me:
        strategy.step, strategy.round = about["step"], about["round"]
        strategy.settled = strategy.round
        if strategy.numerators is not None:
            strategy.numerators = strategy.vectors.read_all()
        return
    groups, small = _zeros(strategy, about)
    for name, values in groups.items():
        for part, vectors in _halves(strategy, name, values):
            strategy.vectors.unpack(part, packed, vectors)
    for name, value in small.items():
        if name not in packed:
            raise UserError(f"the checkpoint has no {name}; resume with the strategy it was saved with")
        value.copy_(packed[name])
    for key in _COUNTERS:
        setattr(strategy, key, about[key])
    exchange, distances = strategy.exchange, strategy.distances
    exchange.counters = Counters(**about["counters"])
    exchange.ledgers = {
        int(j): Ledger(last_round=last, awaited=set(awaited))
        for j, (last, awaited) in about["ledgers"].items()
    }
    exchange.sent_sums = _sums("sent_sum", about["sent_sums"], groups)
    exchange.received_sums = _sums("received_sum", about["received_sums"], groups)
    strategy.tracked = _taken("tracked", groups)
    strategy.gradients = _taken("gradient", groups)
    if about["numerators"]:
        strategy.numerators = groups["numerators"]
    if distances is not None:
        known = {key: Known(vectors=_known(key, groups, small)) for key in about["known"]}
        distances.own = known.pop("own", None)
        distances.of = {int(j): value for j, value in known.items()}
    strategy.sent = [
        Sent(
            round=entry["round"],
            shares={int(j): share for j, share in entry["shares"].items()},
            mass=entry["mass"],
            vectors=_taken(f"sent{entry['round']}", groups) if entry["whole"] else [],
        )
        for entry in about["sent"]
    ]
    exchange.drawn_letters = {
        int(j): [_letter(f"letter{j}.{i}", groups, small, whole) for i, whole in enumerate(letters)]
        for j, letters in about["letters"].items()
    }
    exchange.drawn_receipts = {
        int(j): Receipt(code=code, mass=mass, sketch_m=small.get(f"receipt{j}/sketch"))
        for j, (code, mass) in about["receipts"].items()
    }


def _draw_in(strategy: "PushSum") -> None:
    """With overlap: take the letters and receipts that the next round would take."""
    exchange = strategy.exchange
    if not strategy.config.overlap or strategy.outer.size == 1:
        return
    if strategy.round - 1 >= strategy.settled:
        for rank in strategy.peers(strategy.round - 1)[1]:
            sender = exchange.members[rank]
            if sender not in exchange.drawn_letters and sender not in exchange.gone:
                exchange.drawn_letters[sender] = exchange.fetch(sender)
    if strategy.round - 2 >= strategy.settled:
        for rank in strategy.peers(strategy.round - 2)[0]:
            receiver = exchange.members[rank]
            if receiver not in exchange.drawn_receipts and receiver not in exchange.gone:
                exchange.drawn_receipts[receiver] = exchange.fetch_receipt(receiver)


def _about(strategy: "PushSum") -> dict[str, Any]:
    """Return the plain values, and which tensors there are."""
    exchange, distances = strategy.exchange, strategy.distances
    known = distances.of if distances else {}
    own = ["own"] if distances and distances.own else []
    return {key: getattr(strategy, key) for key in _COUNTERS} | {
        "members": list(exchange.members),
        "replica": exchange.me,
        "counters": dict(vars(exchange.counters)),
        "ledgers": {
            str(j): [ledger.last_round, sorted(ledger.awaited)] for j, ledger in exchange.ledgers.items()
        },
        "sent_sums": {str(j): sums.mass for j, sums in exchange.sent_sums.items()},
        "received_sums": {str(j): sums.mass for j, sums in exchange.received_sums.items()},
        "numerators": strategy.numerators is not None,
        "known": [*own, *(str(j) for j in sorted(known))],
        "sent": [
            {
                "round": sent.round,
                "shares": {str(j): share for j, share in sent.shares.items()},
                "mass": sent.mass,
                "whole": bool(sent.vectors),
            }
            for sent in strategy.sent
        ],
        "letters": {
            str(j): [bool(letter.payload) for letter in letters]
            for j, letters in exchange.drawn_letters.items()
        },
        "receipts": {str(j): [r.code, r.mass] for j, r in exchange.drawn_receipts.items()},
    }


def _groups(strategy: "PushSum") -> dict[str, list[Tensor]]:
    """Return the vectors by name."""
    exchange, distances = strategy.exchange, strategy.distances
    groups = {"tracked": strategy.tracked, "gradient": strategy.gradients}
    groups = {name: values for name, values in groups.items() if values}
    if strategy.numerators is not None:
        groups["numerators"] = strategy.numerators
    groups |= {f"sent_sum{j}": sums.vectors for j, sums in exchange.sent_sums.items()}
    groups |= {f"received_sum{j}": sums.vectors for j, sums in exchange.received_sums.items()}
    groups |= {f"sent{sent.round}": sent.vectors for sent in strategy.sent if sent.vectors}
    for j, letters in exchange.drawn_letters.items():
        groups |= {f"letter{j}.{i}": letter.payload for i, letter in enumerate(letters) if letter.payload}
    if distances and not distances.uses_sketches:
        groups |= {f"known{j}": known.vectors for j, known in distances.of.items()}
        groups |= {"knownown": distances.own.vectors} if distances.own else {}
    return groups


def _small(strategy: "PushSum") -> dict[str, Tensor]:
    """Return the tensors that are equal on all workers of the replica."""
    exchange, distances = strategy.exchange, strategy.distances
    small: dict[str, Tensor] = {}
    for j, letters in exchange.drawn_letters.items():
        for i, letter in enumerate(letters):
            small[f"letter{j}.{i}/record"] = letter.record
            if letter.sketch_m is not None:
                small[f"letter{j}.{i}/sketch"] = letter.sketch_m
    for j, receipt in exchange.drawn_receipts.items():
        if receipt.sketch_m is not None:
            small[f"receipt{j}/sketch"] = receipt.sketch_m
    if distances and distances.uses_sketches:
        small |= {f"known{j}/sketch": known.vectors[0] for j, known in distances.of.items()}
        small |= {"knownown/sketch": distances.own.vectors[0]} if distances.own else {}
    return small


def _zeros(
    strategy: "PushSum", about: Mapping[str, Any]
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Return vectors and small tensors as `_groups` and `_small` do, with zeros."""
    exchange, vectors = strategy.exchange, strategy.vectors

    def message() -> list[Tensor]:
        return [torch.zeros_like(part) for part in exchange.like]

    groups: dict[str, list[Tensor]] = {}
    if strategy.tracks:
        groups |= {name: vectors.zeros(count=vectors.parameter_sets) for name in ("tracked", "gradient")}
    if about["numerators"]:
        groups["numerators"] = vectors.zeros()
    groups |= {f"{kind}{j}": message() for kind in ("sent_sum", "received_sum") for j in about[f"{kind}s"]}
    groups |= {f"sent{entry['round']}": vectors.zeros() for entry in about["sent"] if entry["whole"]}
    small: dict[str, Tensor] = {}
    for j, letters in about["letters"].items():
        groups |= {f"letter{j}.{i}": message() for i, whole in enumerate(letters) if whole}
        small |= {f"letter{j}.{i}/record": torch.zeros(SIZE, dtype=torch.uint8) for i in range(len(letters))}
    if exchange.sketch_size is not None:
        named = [f"letter{j}.{i}" for j, letters in about["letters"].items() for i in range(len(letters))]
        named += [f"receipt{j}" for j in about["receipts"]] + [f"known{j}" for j in about["known"]]
        small |= {
            f"{name}/sketch": torch.zeros(exchange.sketch_size, device=vectors.device) for name in named
        }
    else:
        groups |= {f"known{j}": vectors.zeros() for j in about["known"]}
    return groups, small


def _named(
    strategy: "PushSum", groups: Mapping[str, list[Tensor]], small: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, values in groups.items():
        for part, vectors in _halves(strategy, name, values):
            yield from strategy.vectors.pack(part, vectors).items()
    yield from small.items()


def _halves(strategy: "PushSum", name: str, values: list[Tensor]) -> list[tuple[str, list[Tensor]]]:
    """Tell the numerators in a message from the tracked gradients behind them."""
    count = len(strategy.vectors)
    return [(name, values[:count]), *([(f"{name}.y", values[count:])] if len(values) > count else [])]


def _sums(kind: str, masses: Mapping[str, float], groups: Mapping[str, list[Tensor]]) -> dict[int, Sums]:
    return {int(j): Sums(vectors=groups[f"{kind}{j}"], mass=mass) for j, mass in masses.items()}


def _taken(name: str, groups: Mapping[str, list[Tensor]]) -> list[Tensor]:
    return groups.get(name, [])


def _known(key: str, groups: Mapping[str, list[Tensor]], small: Mapping[str, Tensor]) -> list[Tensor]:
    return [small[f"known{key}/sketch"]] if f"known{key}/sketch" in small else groups[f"known{key}"]


def _letter(
    name: str, groups: Mapping[str, list[Tensor]], small: Mapping[str, Tensor], whole: bool
) -> Letter:
    return Letter(
        record=small[f"{name}/record"],
        sketch_m=small.get(f"{name}/sketch"),
        payload=groups[name] if whole else [],
    )
