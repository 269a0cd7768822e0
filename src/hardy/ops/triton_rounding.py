"""What the host side of the Triton back end must know of a task's rounding.

See `hardy.ops.updates.Rounding`; the kernels' side is `write_param` in `hardy.ops.triton_kernels`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hardy.ops.updates import Rounding


def rounded_how(param: Tensor, rounding: Rounding) -> tuple[str, torch.dtype]:
    """Return how a kernel rounds, and the dtype of the step it reads; "cast" where rounding has no say.

    Raises:
        ValueError: Kahan's rests or the step are not where the parameter is.
    """
    mode = rounding.mode if param.dtype == torch.bfloat16 else "cast"
    if mode in ("cast", "nearest"):
        return mode, torch.float32
    what, needed = ("step", rounding.step) if mode == "stochastic" else ("rest", rounding.rest)
    if needed is None or needed.device != param.device:
        where = "missing" if needed is None else f"on {needed.device}"
        raise ValueError(
            f"bf16_update={mode!r} reads its {what} on {param.device}, where the parameter is, but it is "
            f"{where}; make the optimizer's state on the parameter's device"
        )
    return mode, needed.dtype if mode == "stochastic" else torch.float32


def in_pairs(rounding: Rounding, rows: int) -> bool:
    """Whether every group of eight columns begins with a whole Philox counter."""
    return rounding.place.base % 4 == 0 and (rows == 1 or rounding.place.stride % 4 == 0)


def is_flat(tensors: Sequence[Tensor | None], rounding: Rounding) -> bool:
    """Whether 2-D tensors of one shape may be taken for one row each, in memory and in the whole tensor."""
    first = tensors[0]
    assert first is not None, "the parameter comes first"
    rows, cols = first.shape
    placed = rows == 1 or rounding.place.stride == cols or rounding.mode != "stochastic"
    return placed and all(tensor is None or tensor.is_contiguous() for tensor in tensors)
