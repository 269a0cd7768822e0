"""How workers train together: the five moments at which a strategy may act, and the plainest strategy.

Paper: none; the base of all strategies here. `Synchronous` is ordinary data parallelism.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import averages_in_backward

SAVED_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.int64, torch.bool)}
"""Dtypes of the small tensors of a strategy's state, by the name that a checkpoint has them under."""
BUCKET_BYTES = 25_000_000
"""Gradients travel in buckets of about this size: large enough that latency does not count."""


class Strategy:
    """How workers train together: six moments, each empty until a method needs it."""

    def before_forward(self) -> None:
        """Open a round, once a step; only `train/step.py` calls this. Push-sum de-biases here."""

    def before_module_forward(self, name: str) -> None:
        """Act before unit `name` is gathered and run, in an evaluation too. EDiT ends the unit's meeting."""

    def after_forward(self) -> None:
        """Act after a forward pass, an evaluation's too. EDiT settles units that did not run."""

    @property
    def skips_forward(self) -> bool:
        """Whether this step needs no gradient of this worker."""
        return False

    def note_loss(self, loss: Tensor) -> None:
        """Take this worker's summed loss, after the last micro-batch; whoever announces it needs it here."""

    def reduce_gradients(self) -> None:
        """Act after the last micro-batch, before the update. Data parallel, dSTAR."""

    def after_step(self) -> None:
        """Act after the inner optimizer. Local SGD, DiLoCo, the clock of A-EDiT."""

    def finish(self) -> None:
        """Settle what is under way; after the last step, before the last evaluation and checkpoint."""

    def own_steps(self, step: int) -> int:
        """Return how many steps this worker has done itself, where the run as a whole stands at `step`."""
        return step

    def standing(self, step: int) -> int:
        """Return where the run as a whole stands after this worker's step that would make it `step`."""
        return step

    @property
    def is_together(self) -> bool:
        """Whether all workers are at the same step now, so that they may evaluate, save and end together."""
        return True

    def agreed_stop(self, votes: int) -> bool:
        """Return whether all workers know that the run is to stop, given the votes of this one's replica."""
        return votes > 0

    def joint_totals(self, totals: Tensor, comm: Communicator) -> Tensor:
        """Return what the step is judged by, the same on all workers that must act alike.

        Args:
            totals: this worker's summed loss and its vote to stop, fp64.
            comm: the workers that step together.
        """
        return comm.sum(totals)

    @property
    def refusal(self) -> str:
        """Why this step must not be applied, the same on all workers; empty where it may."""
        return ""

    @property
    def is_overtaken(self) -> bool:
        """Whether this worker has taken the weights of a later step instead of making this one."""
        return False

    def take_report(self) -> dict[str, Any]:
        """Return what the method has to say of this step, for the metrics, once."""
        return {}

    def evaluation_parameters(self) -> AbstractContextManager[None]:
        """Show the weights to evaluate, then put the training weights back."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resume needs: tensors and plain values."""
        return {}

    def expect(self, saved: Mapping[str, Any]) -> None:
        """Make room for what a checkpoint holds, so that `state_dict` has the tensors to be filled.

        Args:
            saved: the plain values of the state that was saved.
        """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""


def watch_units(model: nn.Module, names: Iterable[str], strategy: Strategy) -> list[RemovableHandle]:
    """Call `strategy.before_module_forward` before each unit runs, and `after_forward` after the model.

    Attach after `fully_shard`. Prepended, so that the strategy acts before FSDP2 gathers the unit; appended,
    the unit would compute with old weights.

    Every run of a unit counts, and the strategy's own round says which matter: modes of torch cannot. The
    first pass of re-entrant recomputation has gradients off, as an evaluation has; one may train in eval
    mode; and units run again in the backward pass.
    """

    def before(name: str, _module: nn.Module, _args: object) -> None:
        strategy.before_module_forward(name)

    def after(_module: nn.Module, _args: object, _output: object) -> None:
        strategy.after_forward()

    units = [(name, model.get_submodule(name)) for name in names]
    handles = [unit.register_forward_pre_hook(partial(before, name), prepend=True) for name, unit in units]
    return [*handles, model.register_forward_hook(after)]


class Synchronous(Strategy):
    """Every worker contributes to every step: gradients are averaged before the optimizer sees them.

    A model wrapped by `parallelize` has averaged them in its backward pass, so nothing is left to do. A plain
    model (simulated workers, or processes without a wrapper) is averaged here, in buckets. A parameter
    without gradient on this worker contributes zeros, so all workers send the same; it has a gradient
    afterwards, which is zero when no worker had one.

    Args:
        model: the model as it is trained, wrapped or plain.
        comm: all workers.

    Reference: S. Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020.
    """

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        reduces_here = comm.size > 1 and not averages_in_backward(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad] if reduces_here else []
        self._comm = comm

    def reduce_gradients(self) -> None:
        """Average the gradients of a plain model over the workers, in place."""
        for bucket in buckets(self._parameters, bucket_bytes=BUCKET_BYTES):
            for param in bucket:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
            grads = [param.grad for param in bucket if param.grad is not None]
            mean = self._comm.mean(torch.cat([grad.reshape(-1) for grad in grads]))
            for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))


def buckets(parameters: Iterable[Tensor], *, bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Group parameters of one dtype and device, in order, until a group holds `bucket_bytes`."""
    open_buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in parameters:
        bucket = open_buckets.setdefault((param.dtype, param.device), [])
        bucket.append(param)
        if sum(member.nbytes for member in bucket) >= bucket_bytes:
            yield open_buckets.pop((param.dtype, param.device))
    yield from open_buckets.values()
