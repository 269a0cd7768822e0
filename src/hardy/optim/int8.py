"""From a model to one whose linear weights are stored in int8, and back.

    quantize_model(model)
    optimizer = QAPOLLO(model.named_parameters(), lr=0.01)

For one device, and for DDP with `init_sync=False` (virtual weights cannot be sent, so all workers begin with
equal models) and `forward_sync_buffers=False` (before torch 2.13 `broadcast_buffers`; else the weights are
sent in each forward pass, to no purpose). Not for FSDP2.

Paper: H. Zhu et al., 2024 (arXiv 2412.05270), Q-APOLLO.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hardy.config import ConfigError
from hardy.ops.philox import canonical_name, key_for
from hardy.ops.quantize import dequantize, quantize, whole
from hardy.ops.updates import Rounding
from hardy.optim._sharded import shard_of
from hardy.optim.int8_linear import Int8Linear
from hardy.optim.presets import QUANTIZED_GROUP
from hardy.optim.roles import tenants_of


def quantize_model(
    model: nn.Module,
    *,
    group: int = QUANTIZED_GROUP,
    quantize_embed: bool = False,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[str]:
    """Replace linear modules by int8 ones, in place; return their names. Build the optimizer afterwards.

    Only modules of the very class nn.Linear are replaced, and of these not the output head (see
    `quantize_embed`), routers of experts, frozen weights, and weights that two modules share.

    Args:
        model: on any device, also meta; before DDP wraps it.
        group: columns of a row that share a scale and a zero point.
        quantize_embed: replace an output head that is an nn.Linear as well. The model must use its weight by
            calling the module (hardy's decoder does not); tables of nn.Embedding stay as they are.
        rounding: of this conversion; to nearest is closest to the weights. Steps round as the optimizer says.
        seed: of stochastic rounding, with the weight's name.
        vocab_size: rows of an output head; None means those of the largest nn.Embedding.

    Raises:
        ConfigError: the model is sharded, in DDP already, or has nothing to replace.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> quantize_model(model)
        ['0', '2']
        >>> sorted(model.state_dict())[:4]
        ['0.bias', '0.q', '0.scale', '0.zero_point']
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConfigError(
            "the model is in DistributedDataParallel already; call quantize_model before wrapping it"
        )
    names: list[str] = []
    for path, module in list(_replaceable(model, quantize_embed=quantize_embed, vocab_size=vocab_size)):
        name = canonical_name(f"{path}.weight")
        if shard_of(module.weight, name).mesh is not None:
            raise ConfigError(
                f"{name} is sharded (DTensor), and int8 weights are for one device and DDP; leave out "
                f"quantize_model or fully_shard"
            )
        values = module.weight.detach()
        matrix = quantize(values, group=group, rounding=_rounding(values, rounding, seed=seed, name=name))
        converted = Int8Linear(matrix, dtype=values.dtype, bias=module.bias)
        model.set_submodule(path, converted.train(module.training))
        names.append(path)
    if not names:
        raise ConfigError(
            "the model has no nn.Linear whose weight could be int8: it is itself one, or its linear weights "
            "are frozen, shared, heads or routers; train it by APOLLO as it is"
        )
    return names


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Replace int8 modules by nn.Linear, in place; return their names. Optimizers must be built anew.

    Args:
        model: on any device.
        dtype: of the dense weights; None means that of the virtual ones.
    """
    names: list[str] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            has_bias = module.bias is not None
            dense = nn.Linear(module.in_features, module.out_features, bias=has_bias, device="meta")
            values = dequantize(module.matrix(), dtype=dtype or module.weight.dtype)
            dense.weight = nn.Parameter(values, requires_grad=module.weight.requires_grad)
            dense.register_parameter("bias", module.bias)
            model.set_submodule(path, dense.train(module.training))
            names.append(path)
    return names


def _replaceable(
    model: nn.Module, *, quantize_embed: bool, vocab_size: int | None
) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the path of each module to replace, and the module."""
    wanted = {"matrix", "embedding"} if quantize_embed else {"matrix"}
    roles: dict[Tensor, str] = {
        tenant.parameter: tenant.role for tenant in tenants_of(model, vocab_size=vocab_size)
    }
    holders = Counter(
        parameter
        for module in (module for _, module in model.named_modules(remove_duplicate=False))
        for parameter in module.parameters(recurse=False)
    )
    for path, module in model.named_modules():
        if path and type(module) is nn.Linear and module.weight.numel():
            if roles.get(module.weight) in wanted and holders[module.weight] == 1:
                yield path, module


def _rounding(values: Tensor, mode: Literal["nearest", "stochastic"], *, seed: int, name: str) -> Rounding:
    """Return how a conversion rounds: at step 0, which no optimizer takes."""
    step = torch.zeros((), dtype=torch.int64, device=values.device)
    key = key_for(seed, name, purpose="hardy.q8.v1")
    return Rounding(mode=mode, key=key, step=step, place=whole(tuple(values.shape)))
