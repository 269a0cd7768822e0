"""From an updated fp32 value to a bf16 weight: stochastically, with a kept rest (Kahan), or to nearest.

A bf16 weight near 1 has steps of 0.0078: updates below half of that are lost when rounding to nearest. Adding
16 random bits below the mantissa before cutting them keeps the mean; Kahan's rest keeps what was cut. The
random bits depend on (key, step, place in the whole tensor), so replicas agree (`hardy.ops.philox`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from hardy.ops.philox import grid_words
from hardy.ops.tiles import Tile, tiles
from hardy.ops.updates import Rounding

_STOCHASTIC_ELEMENTS = {"cpu": 1 << 16}
"""Elements rounded stochastically at a time; their random words and temporaries take 28 bytes an element."""
_STOCHASTIC_ELEMENTS_ELSEWHERE = 1 << 19


def round_into(target: Tensor, values: Tensor, rounding: Rounding, *, tile: Tile) -> None:
    """Write `values` into `target`, rounding as `rounding` says where `target` is bf16.

    Args:
        target: Part of a parameter, 2-D; any floating dtype. For Kahan's rounding it holds the old weights;
            where `values` equals them, neither they nor the rest change.
        values: The new weights, fp32 (fp64 where `target` is not bf16), contiguous; overwritten.
        rounding: How; `place` and `rest` (2-D here) describe the whole local view.
        tile: Rows and columns of `target` in the local view.

    Example:
        >>> from hardy.ops.updates import Place
        >>> place = Place(base=0, stride=2)
        >>> rule = Rounding(mode="stochastic", key=7, step=torch.tensor(1), place=place)
        >>> weight = torch.empty(1, 2, dtype=torch.bfloat16)
        >>> round_into(weight, torch.tensor([[1.0, -2.5]]), rule, tile=(slice(0, 1), slice(0, 2)))
        >>> weight.tolist()
        [[1.0, -2.5]]
    """
    if target.dtype != torch.bfloat16 or rounding.mode == "nearest":
        target.copy_(values)
    elif rounding.mode == "kahan":
        assert rounding.rest is not None, "Kahan's rounding comes with its rest"
        _with_rest(target, values, rounding.rest[tile])
    else:
        _stochastically(target, values, rounding, tile)


def _with_rest(target: Tensor, values: Tensor, rest: Tensor) -> None:
    unchanged = values == target
    values.add_(rest)
    rounded = values.to(torch.bfloat16)
    target.copy_(torch.where(unchanged, target, rounded))
    rest.copy_(torch.where(unchanged, rest, values.sub_(rounded).to(torch.bfloat16)))


def _stochastically(target: Tensor, values: Tensor, rounding: Rounding, tile: Tile) -> None:
    place, (rows, cols) = rounding.place, values.shape
    most = _STOCHASTIC_ELEMENTS.get(values.device.type, _STOCHASTIC_ELEMENTS_ELSEWHERE)
    contiguous = place.stride == cols or rows == 1
    # Rows that begin within a counter take words of up to two counters more than they need.
    scale = 1.0 if contiguous else cols / (cols + 8)
    for part in tiles((rows, cols), most=max(8, int(most * scale))):
        exact = values[part]
        start = place.base + (tile[0].start + part[0].start) * place.stride + tile[1].start + part[1].start
        shape = (exact.shape[0], exact.shape[1])
        bits = grid_words(
            rounding.key,
            start=start,
            stride=place.stride,
            shape=shape,
            third=rounding.step,
            device=values.device,
        )
        rounded = bits.bitwise_right_shift_(16).to(torch.int32).add_(exact.view(torch.int32))
        rounded.bitwise_and_(-0x10000)
        # An infinity comes through as it is; a NaN may have turned into a number, so it rounds to nearest.
        target[part].copy_(torch.where(exact == exact, rounded.view(torch.float32), exact))


def store(param: Tensor, values: Tensor, rounding: Rounding, *, tile: Tile) -> None:
    """Write back what `hardy.ops.tiles.loaded(param[tile], buffer)` gave; computed in place, it is there."""
    if values.dtype == param.dtype:
        return
    if rounding.rest is not None:
        rounding = replace(rounding, rest=rounding.rest.view(param.shape))
    round_into(param[tile], values, rounding, tile=tile)
