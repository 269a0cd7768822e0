"""Master weights in one layout over all ranks; a step's weights come from there and its gradients go there.

Paper: Hydraulis (arXiv 2412.07894), its separation of optimizer and compute. `bridge` says who passes whom
which rows; here they are passed, as mail between two ranks, so that exactly those bytes are sent.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hardy.config import UserError
from hardy.distributed.balance.bridge import (
    BridgeBytes,
    Cut,
    Letter,
    Replicas,
    Rows,
    bridge_bytes,
    gradient_letters,
    weight_letters,
)
from hardy.distributed.balance.tensor_parallel import TensorSplits
from hardy.distributed.comm import MailCommunicator


class MasterWeights:
    """This rank's part of every parameter, for the optimizer; the model computes with copies.

    The optimizer must treat each element by itself (AdamW, SGD, Lion), as it sees parts of matrices.

    Args:
        model: complete, with the same weights on every rank. `fill` exchanges its parameters.
        comm: all workers.
        splits: how ranks of a replica share the model.
        compute_dtype: of the weights in the model and of what is sent; none takes that of the masters.

    Raises:
        UserError: the model has one parameter in two places, or one without a dimension to cut, or does not
            fit the splits.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: MailCommunicator,
        splits: TensorSplits,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.comm, self.compute_dtype = model, comm, compute_dtype
        self._dims = _dims(model, splits)
        self._cuts = {
            name: Cut(size=parameter.shape[self._dims[name]], shared=name in splits.dims)
            for name, parameter in model.named_parameters()
        }
        self.named: dict[str, nn.Parameter] = {}
        """By the name of the whole parameter."""
        for name, parameter in model.named_parameters():
            own = self._view(name, parameter.detach(), self._owned(name))
            self.named[name] = nn.Parameter(own.clone(), requires_grad=parameter.requires_grad)

    def parameters(self) -> list[nn.Parameter]:
        """Return what to give to an optimizer."""
        return list(self.named.values())

    def fill(self, replicas: Replicas, *, precision: Literal["compute", "master"] = "compute") -> None:
        """Give the model the weights with which this rank computes in `replicas`; collective.

        A rank in no replica gets parameters without elements.

        Args:
            replicas: of the step, the same on all workers.
            precision: compute gives weights of `compute_dtype`, master those of the masters' own.
        """
        for tag, (name, master) in enumerate(self.named.items()):
            dtype = self.compute_dtype if precision == "compute" else None
            value = self._filled(name, master.detach().to(dtype or master.dtype), replicas, tag=tag)
            module, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(value, requires_grad=master.requires_grad)
            setattr(self.model.get_submodule(module), leaf, parameter)

    def give_back(self, replicas: Replicas) -> None:
        """Add the gradients of all replicas up in the masters' `grad`, in place of what is there; collective.

        Gradients that this rank's model has none of count as zeros. The model's own are dropped.
        """
        for tag, (name, master) in enumerate(self.named.items()):
            parameter = self.model.get_parameter(name)
            if master.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                master.grad = self._added_up(name, grad, replicas, tag=tag)
            parameter.grad = None

    def grad_norm(self) -> Tensor:
        """Return the norm of the whole gradient, float64; for `torch.nn.utils.clip_grads_with_norm_`."""
        grads = [master.grad for master in self.named.values() if master.grad is not None]
        own = torch.zeros((), dtype=torch.float64, device=self.device)
        for grad in grads:
            own += grad.double().square().sum()
        return self.comm.sum(own).sqrt()

    def bytes_of(self, replicas: Replicas) -> BridgeBytes:
        """Return what each rank sends through the bridge in a step, without what it sends while computing."""

        def parameters() -> Iterable[tuple[Cut, int]]:
            for name, master in self.named.items():
                dtype = self.compute_dtype or master.dtype
                others = [size for dim, size in enumerate(master.shape) if dim != self._dims[name]]
                yield self._cuts[name], torch.Size(others).numel() * dtype.itemsize

        return bridge_bytes(parameters(), replicas, self.comm.size)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's masters; they and the optimizer's state fit any later plan."""
        return {
            "rank": self.comm.rank,
            "world_size": self.comm.size,
            "masters": {name: master.detach() for name, master in self.named.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the masters back.

        Raises:
            UserError: they are of another rank, another number of ranks, or another model.
        """
        was, now = (state_dict["rank"], state_dict["world_size"]), (self.comm.rank, self.comm.size)
        if was != now:
            raise UserError(
                f"the state is that of rank {was[0]} of {was[1]}, and this is rank {now[0]} of {now[1]}: "
                f"each rank loads its own; to go on with another number of ranks, save the whole model and "
                f"begin from it"
            )
        saved: Mapping[str, Tensor] = state_dict["masters"]
        shapes = {name: master.shape for name, master in self.named.items()}
        if {name: tensor.shape for name, tensor in saved.items()} != shapes:
            raise UserError("the state is that of another model: its parameters have other names or shapes")
        with torch.no_grad():
            for name, tensor in saved.items():
                self.named[name].copy_(tensor)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return next(iter(self.named.values())).device

    def _owned(self, name: str) -> Rows:
        return self._cuts[name].owned(self.comm.rank, world_size=self.comm.size)

    def _view(self, name: str, x: Tensor, rows: Rows, *, first: int = 0) -> Tensor:
        """Return a view of some rows of `x`, whose own first row is the parameter's row `first`."""
        return x.narrow(self._dims[name], rows.start - first, len(rows))

    def _filled(self, name: str, source: Tensor, replicas: Replicas, *, tag: int) -> Tensor:
        """Return the rows that this rank holds; `source` are those it owns."""
        letters = weight_letters(self._cuts[name], replicas, self.comm.size, self.comm.rank)
        held = self._cuts[name].held_by(self.comm.rank, replicas)
        result = source.new_empty(self._shape(name, source, held))
        for rows, part in self._exchange(name, source, self._owned(name).start, letters, tag=tag):
            self._view(name, result, rows, first=held.start).copy_(part)
        return result

    def _added_up(self, name: str, grad: Tensor, replicas: Replicas, *, tag: int) -> Tensor:
        """Return the gradient of the rows that this rank owns; `grad` is of those it holds."""
        letters = gradient_letters(self._cuts[name], replicas, self.comm.size, self.comm.rank)
        held = self._cuts[name].held_by(self.comm.rank, replicas)
        result = torch.zeros_like(self.named[name])
        for rows, part in self._exchange(name, grad, held.start, letters, tag=tag):
            self._view(name, result, rows, first=self._owned(name).start).add_(part)
        return result

    def _exchange(
        self, name: str, x: Tensor, first: int, letters: Iterable[Letter], *, tag: int
    ) -> Iterator[tuple[Rows, Tensor]]:
        """Send what others get of `x`, whose first row is the parameter's row `first`; yield what arrives.

        What arrives comes in the order of the letters, whoever is early, so that sums have the same bits.
        """
        rank = self.comm.rank
        for sender, receiver, rows in letters:
            if sender == rank != receiver:
                self.comm.post(self._view(name, x, rows, first=first), to=receiver, tag=tag)
        for sender, receiver, rows in letters:
            if receiver == rank == sender:
                yield rows, self._view(name, x, rows, first=first)
            elif receiver == rank:
                like = x.new_empty(self._shape(name, x, rows))
                yield rows, self.comm.take(like, source=sender, tag=tag)
        self.comm.finish_posts(keep_last=self.comm.size)  # so that copies of one parameter at most wait

    def _shape(self, name: str, like: Tensor, rows: Rows) -> list[int]:
        return [len(rows) if dim == self._dims[name] else size for dim, size in enumerate(like.shape)]


def _dims(model: nn.Module, splits: TensorSplits) -> dict[str, int]:
    """Return the dimension in which each parameter is cut, on all ranks or within replicas."""
    named = dict(model.named_parameters())
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(named)
    if twice:
        raise UserError(
            f"parameter {min(twice)} is also another one of the model, and replicas would tear them apart; "
            f"let the model use one parameter by one name, as hardy's decoder does"
        )
    if not splits.dims.keys() <= named.keys():
        missing = min(splits.dims.keys() - named.keys())
        raise UserError(f"the model has no parameter {missing}; give the splits of this model")
    for name, parameter in named.items():
        region = next((region for region in splits.regions if name.startswith(f"{region}.")), None)
        if region is not None and name not in splits.dims:
            raise UserError(
                f"parameter {name} is in {region}, of which each rank computes a part, and the splits do not "
                f"say how ranks share it: whole on each, it would count once for every rank"
            )
        if parameter.ndim == 0:
            raise UserError(f"parameter {name} has no dimension to cut; give it one, of one element")
    return {name: splits.dims.get(name, 0) for name in named}
