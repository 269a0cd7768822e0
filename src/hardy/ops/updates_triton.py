"""The sweeps of `hardy.ops.updates` as Triton kernels: the back end for CUDA.

Tasks that are alike (shape, dtypes, alignment) share launches: adam, scale and moments take one, sketch one
or two, SMMF's sweep two or three. More are needed only where the partial sums of a group would take more than
60 MiB. Nothing waits for the device, sums are added in a fixed order without atomics, and how a task is cut
does not depend on its neighbours: a run comes out the same bit for bit, and so does a task alone.

How tasks become launches is in `hardy.ops.triton_launch`, which also says how addresses are kept, and why
CUDA graphs can be captured once a call outside has compiled the kernels. Tasks that compute in fp64 go to
`hardy.ops.updates_eager`.

Bytes moved for a weight, with w and g bytes of weight and gradient, R the rank and d the contracted length:
adam 2 w + g + 16; sketch g, and for its result 4 R / d; moments 20 R / d; scale 2 w + g; SMMF's sweep 2 w + g
+ 0.25, about 0.4 for partial sums, and 0.25 where columns are no multiple of eight.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardy.ops import updates_eager
from hardy.ops.triton_elementwise import Elementwise, adam_kernel, scale_kernel
from hardy.ops.triton_fill import Fill, fill_kernel
from hardy.ops.triton_launch import (
    BLOCKS,
    Entry,
    Kind,
    Launch,
    Plan,
    Row,
    aligned,
    batches,
    pointer,
    prepared,
    stream_of,
    tile_shape,
    type_of,
)
from hardy.ops.triton_rounding import in_pairs, is_flat, rounded_how
from hardy.ops.triton_sketch import MOMENTS, SKETCH
from hardy.ops.triton_sweep import SWEEP
from hardy.ops.updates import AdamTask, FillTask, MomentTask, ScaleTask, SketchTask, SweepTask


def sketch(tasks: Sequence[SketchTask]) -> None:
    """Do APOLLO's first sweep."""
    _do("sketch", tasks)


def moments(tasks: Sequence[MomentTask]) -> None:
    """Update the moments of sketches."""
    _do("moments", tasks)


def scale(tasks: Sequence[ScaleTask]) -> None:
    """Do APOLLO's second sweep."""
    _do("scale", tasks)


def sweep(tasks: Sequence[SweepTask]) -> None:
    """Do SMMF's sweep."""
    _do("sweep", tasks)


def adam(tasks: Sequence[AdamTask]) -> None:
    """Do AdamW's sweep."""
    _do("adam", tasks)


def fill(tasks: Sequence[FillTask]) -> None:
    """Draw random matrices.

    Raises:
        ValueError: a tensor is not contiguous, or of a dtype that the kernels do not write.
    """
    _do("fill", tasks)


def prepare(sweep: str, tasks: Sequence[Any], memory: Sequence[Tensor]) -> Plan | None:
    """Return the sweep of that name over tasks in `memory`, not yet done; None for those that compute in
    fp64.
    """
    kind, _, computed = _SWEEPS[sweep]
    if any(computed(task).dtype == torch.float64 for task in tasks):
        return None
    device = computed(tasks[0]).device if tasks else torch.device("cpu")
    return prepared(kind, tasks, device, memory=memory)


def whereabouts(device: torch.device) -> int | None:
    """Return the stream that a prepared sweep is bound to; None while a CUDA graph is captured."""
    return stream_of(device)


def _do(sweep: str, tasks: Sequence[Any]) -> None:
    """Give tasks whose numbers are fp64 to the eager back end, all others to the kernels."""
    kind, eager, computed = _SWEEPS[sweep]
    wide = [task for task in tasks if computed(task).dtype == torch.float64]
    if wide:
        eager(wide)
        tasks = [task for task in tasks if computed(task).dtype != torch.float64]
    if tasks:
        prepared(kind, tasks, computed(tasks[0]).device).run()


def _describe_fill(task: FillTask) -> Entry:
    out, count = task.out, task.out.numel()
    if not out.is_contiguous():
        raise ValueError(
            f"random numbers go into contiguous tensors, got strides {out.stride()}; fill a copy"
        )
    vector = task.start % 8 == 0 and count % 8 == 0 and out.data_ptr() % 16 == 0
    programs = -(-(task.start % 8 + count) // (8 * BLOCKS["fill"]["groups"])) if count else 0
    key, low = task.key, 0xFFFFFFFF
    counters = (key & low, (key >> 32) & low, task.epoch & low, task.slice & low, task.start, count)
    return (out.dtype, task.distribution, vector, programs), (*counters, pointer(out), 0)


def _fill_launches(like: tuple[torch.dtype, str, bool, int], rows: list[Row]) -> list[Launch]:
    dtype, distribution, vector, programs = like
    config = Fill(
        out=type_of(dtype), distribution=distribution, vector=vector, groups=BLOCKS["fill"]["groups"]
    )
    if not programs:
        return []
    return [
        Launch(kernel=fill_kernel, config=config, programs=programs, rows=part, block="fill")
        for part in batches(rows, 0)
    ]


class _Like(NamedTuple):
    """What tasks of one group of `adam` or `scale` share."""

    shape: tuple[int, int]
    param: torch.dtype
    grad: torch.dtype
    rounding: str
    step: torch.dtype
    pairs: bool
    vector: bool
    along: str = ""
    span: int = 0
    """Columns of the tensor, if its rows are joined to one and have a factor each, or the columns have."""


def _describe(task: AdamTask | ScaleTask, others: Sequence[Tensor | None], along: str) -> Entry:
    param, grad, rounding = task.param, task.grad, task.rounding
    mode, step = rounded_how(param, rounding)
    rest = rounding.rest if mode == "kahan" else None
    tensors = (param, grad, rest, *others)
    rows, cols = param.shape
    span, alike = 0, along in ("", "all")
    # With factors of their own, rows in eights are best left as they are; others are best taken for one.
    if rows > 1 and (alike or cols % 8) and is_flat(tensors, rounding):
        span = 0 if alike else cols
        rows, cols = 1, param.numel()
    vector, pairs = aligned(tensors, rows=rows), in_pairs(rounding, rows)
    like = _Like((rows, cols), param.dtype, grad.dtype, mode, step, pairs, vector, along, span)
    key, place = rounding.key, rounding.place
    head = (rows, cols, key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF, place.base, place.stride)
    step_at = pointer(rounding.step) if mode == "stochastic" else 0
    if isinstance(task, AdamTask):
        small = (step_at, pointer(task.coefficients), 0, 0)
    else:
        small = (step_at, span, pointer(task.factor), pointer(task.keep))
    large = [number for tensor in (param, grad, rest, *others) for number in _strided(tensor)]
    return like, (*head, *small, *large)


def _strided(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _describe_adam(task: AdamTask) -> Entry:
    return _describe(task, (task.exp_avg, task.exp_avg_sq), "")


def _describe_scale(task: ScaleTask) -> Entry:
    return _describe(task, (None, None), task.along)


def _elementwise(kernel: Any) -> Callable[[_Like, list[Row]], list[Launch]]:
    def launches(like: _Like, rows: list[Row]) -> list[Launch]:
        groups = BLOCKS["elementwise"]["groups"]
        tile_rows, groups = tile_shape(like.shape, groups=groups, strip=groups)
        config = Elementwise(
            param=type_of(like.param),
            grad=type_of(like.grad),
            step=type_of(like.step),
            rounding=like.rounding,
            pairs=like.pairs,
            flat=like.shape[0] == 1,
            whole=like.shape[1] % 8 == 0,
            vector=like.vector,
            tile_rows=tile_rows,
            groups=groups,
            along=like.along,
            joined=like.span > 0,
            narrow=0 < like.span < 8 * groups,
        )
        programs = -(-like.shape[0] // tile_rows) * -(-like.shape[1] // (8 * groups))
        if not programs:
            return []
        return [
            Launch(kernel=kernel, config=config, programs=programs, rows=part, block="elementwise")
            for part in batches(rows, 0)
        ]

    return launches


ADAM = Kind(name="adam", describe=_describe_adam, launches=_elementwise(adam_kernel))
SCALE = Kind(name="scale", describe=_describe_scale, launches=_elementwise(scale_kernel))
FILL = Kind(name="fill", describe=_describe_fill, launches=_fill_launches)

_SWEEPS: dict[str, tuple[Kind, Callable[[Sequence[Any]], None], Callable[[Any], Tensor]]] = {
    "sketch": (SKETCH, updates_eager.sketch, lambda task: task.sketch),
    "moments": (MOMENTS, updates_eager.moments, lambda task: task.sketch),
    "scale": (SCALE, updates_eager.scale, lambda task: task.factor),
    "sweep": (SWEEP, updates_eager.sweep, lambda task: task.coefficients),
    "adam": (ADAM, updates_eager.adam, lambda task: task.coefficients),
    "fill": (FILL, updates_eager.fill, lambda task: task.out),
}
"""By name: how tasks become launches, who does those in fp64, and which tensor of a task says so."""
