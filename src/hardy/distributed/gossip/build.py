"""From settings to a gossiping replica, after a look whether this model and these replicas can."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from hardy.config import ConfigError, UserError
from hardy.distributed.comm import Communicator
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.gossip.exchange import Faults
from hardy.distributed.gossip.push_sum import PushSum
from hardy.distributed.gossip.vectors import Vectors
from hardy.distributed.groups import FixedGroup, OuterGroup
from hardy.distributed.sharded import local_part

logger = logging.getLogger(__name__)


def build_push_sum(
    config: PushSumConfig,
    model: nn.Module,
    *,
    unit_names: Sequence[str],
    inner: Communicator,
    outer: Communicator,
    faults: Faults | None = None,
) -> PushSum:
    """Return the strategy of one replica; all replicas call it alike.

    Args:
        config: the settings.
        model: as it is trained; parameters in fp32 or fp64.
        unit_names: submodules that are sent as a message of their own.
        inner: the workers of this replica.
        outer: the replicas; where they may come and go, an elastic group of them.
        faults: failures to try out.

    Raises:
        ConfigError: the graph does not fit the number of replicas, or the parameters are too coarse.
        UserError: frozen parameters differ between replicas.
    """
    group = outer if isinstance(outer, OuterGroup) else FixedGroup(outer)
    if outer.size == 1 and not group.is_elastic:
        logger.warning("strategy.name=push_sum with one replica sends to nobody")
    elif config.comm_dtype == "bf16":
        logger.warning(
            "strategy.comm_dtype='bf16': the sum of all replicas is kept only up to the rounding of bf16"
        )
    vectors = Vectors(model, unit_names, with_buffers=config.buffers == "mix", dtype=_dtype_of(model))
    if not group.is_elastic:  # one that comes late would ask alone; their settings are compared instead
        _check_frozen(model, inner, outer)
    return PushSum(config, vectors, inner=inner, group=group, faults=faults)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Return what to compute in: fp64 where all parameters are, else fp32."""
    dtypes = {param.dtype for param in model.parameters() if param.requires_grad}
    coarse = dtypes - {torch.float32, torch.float64}
    if coarse:
        raise ConfigError(
            f"strategy.name=push_sum mixes in fp32, and parameters in {', '.join(sorted(map(str, coarse)))} "
            f"would lose what each round adds; keep parameters in fp32 and set train.precision to bf16"
        )
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def _check_frozen(model: nn.Module, inner: Communicator, outer: Communicator) -> None:
    """Refuse frozen parameters that differ: they are not mixed, so the replicas would never agree."""
    frozen = [(name, param) for name, param in model.named_parameters() if not param.requires_grad]
    if outer.size == 1 or not frozen:
        return
    ramp = [
        torch.arange(1, local_part(p).numel() + 1, dtype=torch.float64, device=p.device) for _, p in frozen
    ]
    prints = torch.stack(
        [local_part(p).detach().reshape(-1).double() @ r for (_, p), r in zip(frozen, ramp, strict=True)]
    )
    rows = outer.all_gather(prints)
    for place, (name, _) in enumerate(frozen):
        if not bool((rows[:, place] == rows[0, place]).all()):
            raise UserError(
                f"frozen parameter {name} differs between replicas, and push-sum mixes trained ones only; "
                f"give all replicas the same weights, or let it train"
            )
