"""Each step goes on with the first k replicas that are ready; who is late takes the weights that came of it.

Paper: J. Yan et al., "dSTAR", 2024 (arXiv 2412.07151): the first k of N gradients, robustly combined.
Differs from the paper: no server. The elected exchange among themselves (`fastest`); what a rule remembers
travels with the weights to one that is late.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from hardy.distributed.comm import Communicator
from hardy.distributed.robust.combine import NOTHING_LEFT, Combiner, middle_loss
from hardy.distributed.robust.exchange import Exchange, Form, dot
from hardy.distributed.robust.fastest import Decision, FastestGroup
from hardy.distributed.robust.sender import Prepared, Sender
from hardy.distributed.sharded import local_part
from hardy.distributed.strategy import SAVED_DTYPES, Strategy

_ABOUT_BYTES = 16384
"""Room for what a rule remembers, as text: some numbers, and those of its window besides."""
_NUMBER_BYTES = 32
"""Room for one number as text."""


class _Late(NamedTuple):
    """A gradient that came too late for its step."""

    sent: list[Tensor]
    loss: float
    made_at: int


class FastestRobust(Strategy):
    """Combine the gradients of those who came first; the others skip the step.

    Args:
        optimizer: its state travels to one that is late.
        sender: this worker's side before anything is exchanged.
        inner: the workers of this replica.
        enter: comes to the others, given the steps that the weights have done; called at the first step.
        combine: the rule at work on rows of the elected.
        form: see `Exchange`.
        keeps_late: whether a gradient that came too late is announced for the next step, where it counts
            1 / (1 + steps it is late) in rules that weigh rows; no other is computed then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        sender: Sender,
        inner: Communicator,
        enter: Callable[[int], FastestGroup],
        combine: Combiner,
        form: Form = "slices",
        keeps_late: bool = False,
    ) -> None:
        self._optimizer, self._sender = optimizer, sender
        self._inner, self._enter, self._combine = inner, enter, combine
        self._form: Form = form
        self._keeps_late = keeps_late
        window = getattr(combine.aggregator.rule, "window", 0)
        self._about_bytes = _ABOUT_BYTES + _NUMBER_BYTES * window
        self._group: FastestGroup | None = None
        self._step = 0
        self._loss = math.nan
        self._joint_loss: Tensor | None = None
        self._refusal = ""
        self._overtaken = False
        self._late: _Late | None = None
        self._report: dict[str, Any] = {}

    @property
    def refusal(self) -> str:
        """Why this step must not be applied; empty where it may."""
        return self._refusal

    @property
    def is_overtaken(self) -> bool:
        """Whether this replica has taken the weights of a later step instead of making this one."""
        return self._overtaken

    def standing(self, step: int) -> int:
        """Return where the run stands: ahead of this replica's own count once it was overtaken."""
        return self._step

    def own_steps(self, step: int) -> int:
        """Return the step whose batch is to be read."""
        return self._step

    def before_forward(self) -> None:
        """Come to the others, at the first step; take their weights, where they are ahead."""
        self._overtaken, self._refusal, self._joint_loss = False, "", None
        if self._group is None:
            self._group = self._enter(self._step)
            if self._group.is_behind:
                self._catch_up(self._group)

    @property
    def skips_forward(self) -> bool:
        """Whether a late gradient is announced at this step instead of a new one."""
        return self._late is not None

    def note_loss(self, loss: Tensor) -> None:
        """Keep this worker's summed loss for the announcement."""
        self._loss = float(self._inner.sum(loss.detach()))

    def reduce_gradients(self) -> None:
        """Announce, and exchange if elected; else take the weights of one who was."""
        group = self._entered()
        prepared, made_at = self._sender.prepare(self._step), self._step
        if self._late is not None:
            prepared, self._loss = prepared._replace(sent=self._late.sent), self._late.loss
            made_at, self._late = self._late.made_at, None
        numbers = [dot(prepared.sent, prepared.sent)]
        if prepared.trusted is not None:
            numbers.append(dot(prepared.sent, prepared.trusted.parts))
        square, *dots = self._inner.sum(torch.stack(numbers)).tolist()
        made = group.take_part(
            self._step,
            lambda decision: self._work(decision, prepared),
            state=self._state,
            finite=math.isfinite(square),
            loss=self._loss,
            square=square,
            dot=dots[0] if dots else math.nan,
            made_at=made_at,
        )
        if made is None:
            if self._keeps_late:
                sent = [part.clone() for part in prepared.sent]
                self._late = _Late(sent, loss=self._loss, made_at=made_at)
            self._catch_up(group)
            return
        is_found, found, losses, remembered = made
        for grad, part in zip(prepared.grads, found, strict=True):
            grad.copy_(part)
        self._combine.aggregator.load_state_dict(remembered)
        self._joint_loss = middle_loss(losses, num_faulty=self._combine.aggregator.num_faulty)
        self._refusal = "" if is_found else NOTHING_LEFT
        self._step += 1

    def _work(
        self, decision: Decision, prepared: Prepared
    ) -> tuple[bool, list[Tensor], Tensor, Mapping[str, Any]]:
        """Return the gradient that the elected make, their losses, and what the rule remembers of it.

        Changes nothing: where one of them dies meanwhile, it is done again with others.
        """
        assert decision.comm is not None, "those who are elected are connected"
        aggregator = self._combine.aggregator
        before = aggregator.state_dict()
        exchange = Exchange(
            self._combine,
            like=self._sender.like,
            inner=decision.inner,
            outer=decision.comm,
            form=self._form,
            workers=decision.elected,
            sample_weights=torch.tensor(
                [1.0 / (1 + decision.step - decision.records[rank].made_at) for rank in decision.elected]
            ),
        )
        found = [torch.zeros_like(part) for part in prepared.grads]
        try:
            is_found = exchange(prepared.sent, prepared.trusted, into=found, step=decision.step)
            remembered = aggregator.state_dict()
        finally:
            aggregator.load_state_dict(before)
        losses = torch.tensor([decision.records[rank].loss for rank in decision.elected], dtype=torch.float64)
        return is_found, found, losses, remembered

    def joint_totals(self, totals: Tensor, comm: Communicator) -> Tensor:
        """Return [loss, votes to stop]: of the elected those in the middle, and this replica's vote."""
        own = comm.sum(totals)
        loss = own[0] if self._joint_loss is None else self._joint_loss.to(own.device)
        return torch.stack([loss, own[1]])

    def after_step(self) -> None:
        """Hand the weights to those who were late."""
        self._entered().serve(self._state())

    def finish(self) -> None:
        """Wait until all have the weights of the last step."""
        if self._group is not None:
            self._group.finish(self._state())

    def take_report(self) -> dict[str, Any]:
        """Return who was elected and who was believed."""
        report = {"overtaken": self._overtaken, "combined_steps": self._step}
        if self._overtaken:
            return report
        return report | self._combine.take_report() | self._entered().take_report()

    def _entered(self) -> FastestGroup:
        assert self._group is not None, "a step begins with before_forward"
        return self._group

    def _catch_up(self, group: FastestGroup) -> None:
        """Take weights, optimizer state and what the rule remembers from one that is ahead."""
        fill_state(self._optimizer)
        like = self._state()
        self._step, came = group.late_state(like)
        with torch.no_grad():
            for tensor, new in zip(like[:-1], came[:-1], strict=True):
                tensor.copy_(new)
        self._combine.aggregator.load_state_dict(_read(came[-1]))
        self._overtaken = True

    def _state(self) -> list[Tensor]:
        """Return this worker's part of what a replica that is late needs: tensors, and a page of text."""
        tensors = [local_part(param.detach()) for param in self._sender.parameters]
        for param in self._sender.parameters:
            state = self._optimizer.state.get(param, {})
            tensors += [local_part(state[key]) for key in sorted(state) if isinstance(state[key], Tensor)]
        return [*tensors, _written(self._combine.aggregator.state_dict(), room=self._about_bytes)]

    def state_dict(self) -> dict[str, Any]:
        """Return the steps done, the worker's momentum, and what the rule remembers."""
        about = {
            "step": self._step,
            "rule": _plain(self._combine.aggregator.state_dict()),
            "believed_rate": self._combine.believed_rate.tolist(),
        }
        return {"about": about, **self._sender.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        about = state_dict["about"]
        self._step = about["step"]
        self._combine.aggregator.load_state_dict(_tensors(about["rule"]))
        if len(about["believed_rate"]) == len(self._combine.believed_rate):
            self._combine.believed_rate = torch.tensor(about["believed_rate"], dtype=torch.float64)
        self._sender.load(state_dict)


def fill_state(optimizer: Optimizer) -> None:
    """Let an optimizer that has made no step make its state, to be filled: one step of zeros at rate 0."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if all(optimizer.state.get(param) for param in params if param.requires_grad):
        return
    held = [param.grad for param in params]
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for param in params:
            param.grad = torch.zeros_like(param) if param.requires_grad else None
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for param, grad in zip(params, held, strict=True):
            param.grad = grad


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {"dtype": str(value.dtype), "values": value.tolist()} if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: torch.tensor(value["values"], dtype=SAVED_DTYPES[value["dtype"]])
        if isinstance(value, dict)
        else value
        for key, value in state.items()
    }


def _written(state: Mapping[str, Any], *, room: int) -> Tensor:
    """Return small values as a page of JSON, always of one size; floats come back with all their bits."""
    text = json.dumps(_plain(state)).encode()
    assert len(text) <= room, f"what the rule remembers takes {len(text)} bytes, more than {room}"
    return torch.frombuffer(bytearray(text.ljust(room)), dtype=torch.uint8)


def _read(page: Tensor) -> dict[str, Any]:
    return _tensors(json.loads(bytes(page.tolist()).decode()))
