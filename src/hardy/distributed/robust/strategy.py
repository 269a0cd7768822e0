"""Every step's gradients are combined by a rule that the worst of them cannot bend far.

Papers: J. Yan et al., "dSTAR", 2024 (arXiv 2412.07151) and those of the rules (`aggregation`). A worker here
is a replica: one process, or those that share one copy of the model by FSDP2. Letters: N workers, m momentum
of a worker, beta its rate, g its gradient, g_v the trusted gradient, f workers that may send anything.

Differs from the papers: no server. Each worker combines one slice of all gradients, and decides by numbers
that were added up over all slices, so all decide alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hardy.distributed.comm import Communicator
from hardy.distributed.robust.combine import NOTHING_LEFT, Combiner, middle_loss
from hardy.distributed.robust.exchange import Exchange, Form
from hardy.distributed.robust.sender import Sender
from hardy.distributed.robust.trusted import TrustedGradient
from hardy.distributed.sharded import local_part
from hardy.distributed.strategy import SAVED_DTYPES, Strategy


class Robust(Strategy):
    """Combine the workers' gradients by a rule, after the backward pass.

    The gradient of a worker whose parameters had none counts as zeros. All workers get the same bits.

    Args:
        model: as it is trained; gradients are averaged within this replica only.
        inner: the workers of this replica.
        outer: the replicas.
        combine: the rule at work, for as many workers as there are replicas.
        exchange: see `Exchange`.
        momentum: beta of the workers' momentum; 0 keeps none.
        trusted: gives g_v where the rule needs it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner: Communicator,
        outer: Communicator,
        combine: Combiner,
        exchange: Form = "slices",
        momentum: float = 0.0,
        trusted: TrustedGradient | None = None,
    ) -> None:
        self._outer = outer
        self._sender = Sender(model, inner=inner, momentum=momentum, trusted=trusted)
        self._combine = combine
        like = self._sender.like
        self._exchange = Exchange(self._combine, like=like, inner=inner, outer=outer, form=exchange)
        self._step = 0
        self._refusal = ""
        self._room: dict[str, Any] | None = None
        if combine.aggregator.needs_reference and trusted is None:
            raise ValueError("this rule needs a trusted gradient, and nobody gives one")

    @property
    def refusal(self) -> str:
        """Why this step must not be applied; empty where it may."""
        return self._refusal

    def reduce_gradients(self) -> None:
        """Replace this worker's gradient by what the rule makes of all."""
        grads, sent, trusted = self._sender.prepare(self._step)
        is_found = self._exchange(sent, trusted, into=grads, step=self._step)
        self._refusal = "" if is_found else NOTHING_LEFT
        self._step += 1

    def joint_totals(self, totals: Tensor, comm: Communicator) -> Tensor:
        """Return [loss, votes to stop] of the whole step: of the losses those in the middle, so that neither
        a NaN nor a lie stops a step."""
        rows_N2 = self._outer.all_gather(comm.sum(totals))
        loss = middle_loss(rows_N2[:, 0], num_faulty=self._combine.aggregator.num_faulty)
        return torch.stack([loss, rows_N2[:, 1].sum()])

    def take_report(self) -> dict[str, Any]:
        """Return who was believed at this step."""
        return self._combine.take_report() | {
            "combined_steps": self._step,
            "bytes_sent": self._outer.bytes_sent,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the steps done, the workers' momentum, and what the rule and an attack remember; all call
        it together."""
        if self._room is not None:
            return self._room
        plain: dict[str, Any] = {}
        small: dict[str, Tensor] = {}
        sliced: dict[str, list[Tensor]] = {}
        for key, value in self._combine.state_dict().items():
            if key.startswith(("vector/", "row/", "attack/")) and isinstance(value, Tensor):
                sliced.setdefault(key.rpartition("/")[0], []).append(value)
            elif isinstance(value, Tensor):
                small[key] = value
            else:
                plain[key] = value
        about = {
            "step": self._step,
            "believed_rate": self._combine.believed_rate.tolist(),
            "plain": plain,
            "small": {key: [str(value.dtype), list(value.shape)] for key, value in small.items()},
            "sliced": sorted(sliced),
        }
        whole = {name: self._whole(sliced[name]) for name in sorted(sliced)}
        return {
            "about": about,
            **{f"rule/{key}": value for key, value in small.items()},
            **{
                key: x for name in whole for key, x in self._sender.named(f"rule/{name}", whole[name]).items()
            },
            **self._sender.state(),
        }

    def expect(self, saved: Mapping[str, Any]) -> None:
        """Make room for what the rule of a checkpoint remembers."""
        if not saved:
            return
        small = {
            f"rule/{key}": torch.zeros(shape, dtype=SAVED_DTYPES[dtype])
            for key, (dtype, shape) in saved["about"]["small"].items()
        }
        room = self.state_dict() | small
        for name in saved["about"]["sliced"]:
            room |= self._sender.named(f"rule/{name}", self._sender.empty())
        self._room = room | {"about": saved["about"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back. With another number of workers, what was kept of each of them begins anew."""
        self._room = None
        about = state_dict["about"]
        self._step = about["step"]
        if len(about["believed_rate"]) == self._outer.size:
            self._combine.believed_rate = torch.tensor(about["believed_rate"], dtype=torch.float64)
        state = {**about["plain"], **{key: state_dict[f"rule/{key}"] for key in about["small"]}}
        for part in about["sliced"]:
            saved = [local_part(state_dict[f"rule/{part}/{name}"]) for name in self._sender.names]
            own = self._exchange.slices.own(saved)
            state |= {f"{part}/{i}": vector for i, vector in enumerate(own)}
        self._combine.load_state_dict(state, num_workers=len(about["believed_rate"]))
        self._sender.load(state_dict)

    def _whole(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Return everyone's slices of a vector, laid out as the parameters."""
        found = self._sender.empty()
        self._exchange.slices.put_together(slices, into=[local_part(tensor) for tensor in found])
        return found
