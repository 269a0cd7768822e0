"""The sweeps of `hardy.ops.updates` in C++ for CPUs (`native.cpp`), compiled on first use.

Weights and gradients are fp32 or bf16; tasks of other dtypes, or whose columns are not next to each other in
memory, go to `updates_eager` one by one. Sketches of rank 8 and more are matrix products: by tile
instructions where the processor has them (AMX; `native_tiles.hpp`: fp32 as three bf16 numbers, as exact as
fp32), else torch's. Results do not depend on the number of threads, bit for bit, but for torch's products.

Why C++: `benchmarks/bench_cpu_route.py`, 4096 x 4096 in fp32, time on one thread as a ratio to torch's fused
AdamW. SMMF: C++ 0.69, numba 0.80, eager 5.9, torch.compile 7.6, a copy of the same bytes 0.75. APOLLO-Mini:
C++ 0.75, numba 0.73, eager 1.8, torch.compile 0.80, a copy 0.95.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hardy.ops import native_ops, updates_eager
from hardy.ops.updates import AdamTask, FillTask, MomentTask, Rounding, ScaleTask, SketchTask, SweepTask

_ALONG = ("all", "rows", "cols")
_MODES = ("nearest", "stochastic", "kahan")
_WIDE = (torch.float32, torch.bfloat16)

Task = TypeVar("Task")


def available() -> bool:
    """Return whether this back end can run here; the first call may compile it, which takes some seconds.

    Where it cannot, the reason is logged as a warning, once.
    """
    return native_ops.functions() is not None


@torch.no_grad()
def sketch(tasks: Sequence[SketchTask]) -> None:
    """Do APOLLO's first sweep."""
    mine = _mine(tasks, updates_eager.sketch, of=_of_sketch)
    if mine:
        native_ops.operators()["sketch"](
            [task.grad for task in mine],
            [task.projection_KR for task in mine],
            [task.sketch for task in mine],
            [task.squares for task in mine],
            [int(task.contracts == "rows") for task in mine],
        )


@torch.no_grad()
def moments(tasks: Sequence[MomentTask]) -> None:
    """Update the moments of sketches."""
    mine = _mine(tasks, updates_eager.moments, of=_of_moments)
    if mine:
        native_ops.operators()["moments"](
            [task.sketch for task in mine],
            [task.exp_avg for task in mine],
            [task.exp_avg_sq for task in mine],
            [task.before for task in mine],
            [task.after for task in mine],
            [task.coefficients for task in mine],
            [int(task.channels == "cols") for task in mine],
        )


@torch.no_grad()
def scale(tasks: Sequence[ScaleTask]) -> None:
    """Do APOLLO's second sweep."""
    mine = _mine(tasks, updates_eager.scale, of=_of_scale)
    for same in _alike(mine, lambda task: _mode(task.param, task.rounding)):
        numbers = [[*_place(task.param, task.rounding), _ALONG.index(task.along)] for task in same]
        native_ops.operators()["scale"](
            [task.param for task in same],
            [task.grad for task in same],
            [task.factor for task in same],
            [task.keep for task in same],
            *_rounding(same, numbers),
        )


@torch.no_grad()
def sweep(tasks: Sequence[SweepTask]) -> None:
    """Do SMMF's sweep."""
    mine = _mine(tasks, updates_eager.sweep, of=_of_sweep)
    for same in _alike(mine, lambda task: (_mode(task.param, task.rounding), task.sign is None)):
        numbers = [
            [*_place(task.param, task.rounding), int(task.packed), int(task.skip_zeros)] for task in same
        ]
        native_ops.operators()["sweep"](
            [task.param for task in same],
            [task.grad for task in same],
            [vector for task in same for vector in _vectors(task)],
            [task.sign for task in same if task.sign is not None],
            [task.sums for task in same],
            *_rounding(same, numbers),
        )


@torch.no_grad()
def adam(tasks: Sequence[AdamTask]) -> None:
    """Do AdamW's sweep."""
    mine = _mine(tasks, updates_eager.adam, of=_of_adam)
    for same in _alike(mine, lambda task: _mode(task.param, task.rounding)):
        native_ops.operators()["adam"](
            [task.param for task in same],
            [task.grad for task in same],
            [task.exp_avg for task in same],
            [task.exp_avg_sq for task in same],
            [task.coefficients for task in same],
            *_rounding(same, [_place(task.param, task.rounding) for task in same]),
        )


@torch.no_grad()
def fill(tasks: Sequence[FillTask]) -> None:
    """Draw random matrices."""
    for task in _mine(tasks, updates_eager.fill, of=_of_fill):
        where = (_signed(task.key), task.start, task.epoch, task.slice)
        native_ops.operators()["fill"](task.out, *where, task.distribution == "normal")


# ---- Which tasks are ours ----------------------------------------------------------------------------------

Tensors = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Tensors of a task that may be bf16 and have gaps between rows, and those that must be contiguous fp32."""


def _of_sketch(task: SketchTask) -> Tensors:
    return [task.grad], [task.projection_KR, task.sketch, task.squares]


def _of_moments(task: MomentTask) -> Tensors:
    return [], [task.sketch, task.exp_avg, task.exp_avg_sq, task.coefficients, task.before, task.after]


def _of_scale(task: ScaleTask) -> Tensors:
    return [task.param, task.grad], [task.factor, task.keep]


def _of_sweep(task: SweepTask) -> Tensors:
    return [task.param, task.grad], [*_vectors(task), task.sums]


def _of_adam(task: AdamTask) -> Tensors:
    return [task.param, task.grad], [task.exp_avg, task.exp_avg_sq, task.coefficients]


def _of_fill(task: FillTask) -> Tensors:
    return [], [task.out]


def _vectors(task: SweepTask) -> list[Tensor]:
    """Return the factors, and the coefficients behind them."""
    if task.row_m is None or task.col_m is None:
        return [task.row_v, task.col_v, task.coefficients]
    return [task.row_m, task.col_m, task.row_v, task.col_v, task.coefficients]


def _usable(wide: Sequence[Tensor], narrow: Sequence[Tensor]) -> bool:
    """Return whether the C++ can work on tensors: see `Tensors`."""
    return all(x.dtype == torch.float32 and x.is_contiguous() and x.is_cpu for x in narrow) and all(
        x.dtype in _WIDE and x.is_cpu and (x.stride(1) == 1 or x.shape[1] < 2) for x in wide
    )


def _mine(
    tasks: Sequence[Task], otherwise: Callable[[list[Task]], None], *, of: Callable[[Task], Tensors]
) -> list[Task]:
    """Return the tasks for the C++, after `otherwise` has done the others."""
    mine: list[Task] = []
    for task in tasks:
        if _usable(*of(task)):
            mine.append(task)
        else:
            otherwise([task])
    return mine


def _alike(tasks: Iterable[Task], key: Callable[[Task], Hashable]) -> list[list[Task]]:
    """Return the tasks in groups of equal key."""
    groups: defaultdict[Hashable, list[Task]] = defaultdict(list)
    for task in tasks:
        groups[key(task)].append(task)
    return list(groups.values())


# ---- Rounding ----------------------------------------------------------------------------------------------


def _mode(param: Tensor, rounding: Rounding) -> int:
    """Return which of _MODES is at work; fp32 weights are written as computed."""
    return _MODES.index(rounding.mode) if param.dtype == torch.bfloat16 else 0


def _place(param: Tensor, rounding: Rounding) -> list[int]:
    """Return mode, key, base and stride of a task."""
    return [_mode(param, rounding), _signed(rounding.key), rounding.place.base, rounding.place.stride]


def _rounding(
    tasks: Sequence[ScaleTask] | Sequence[SweepTask] | Sequence[AdamTask], numbers: list[list[int]]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Return steps and rests as far as the tasks' mode needs them, and all numbers."""
    mode = _MODES[numbers[0][0]]
    steps = [task.rounding.step.to(torch.float32) for task in tasks] if mode == "stochastic" else []
    rests: list[Tensor] = []
    if mode == "kahan":
        for task in tasks:
            assert task.rounding.rest is not None, "Kahan's rounding comes with its rest"
            rests.append(task.rounding.rest.view(task.param.shape))
    return steps, rests, [number for row in numbers for number in row]


def _signed(key: int) -> int:
    """Return the same 64 bits as a number with sign, as torch's operators take it."""
    return (key + 2**63) % 2**64 - 2**63
