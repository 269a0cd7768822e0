"""What the low-memory optimizers ask of a machine: five sweeps over plain local tensors, and who does them.

A sweep takes a list of tasks, one per tensor (or per expert of a stack), and writes in place; no sweep talks
to other workers, waits for a device, or keeps anything. Three back ends do the same work: `updates_eager`
(torch operations in chunks, the reference, runs everywhere), `updates_native` (C++ for CPUs, compiled on
first use) and `updates_triton` (CUDA). `optim` decides what is swept and what the numbers in between mean.

Letters: tensors of a task are 2-D views of what this worker holds, `[rows, cols]`, the last axis contiguous.
K contracted length, C channels, R rank. All numbers a sweep needs stand in small tensors on the device of the
parameter, in the compute dtype: fp64 for fp64 parameters, else fp32.
"""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from hardy.config import UserError, unknown_name

Axis = Literal["rows", "cols"]


@dataclass(slots=True, kw_only=True)
class Place:
    """Where a local `[rows, cols]` view lies in the whole tensor, in row-major order.

    Element (i, j) of the view is element `base + i * stride + j` of the whole.
    """

    base: int
    stride: int


@dataclass(slots=True, kw_only=True)
class Rounding:
    """How an updated fp32 value becomes a bf16 weight; other dtypes are written as computed.

    `stochastic` adds 16 random bits below the bf16 mantissa and cuts: bits 16...31 of the Philox word of
    (key, counter = flat index in the whole tensor // 4, step, 0), lane flat index % 4, so replicas agree.
    Infinities and NaNs round to nearest. `kahan` adds the bf16 rest of earlier roundings in `rest`.
    """

    mode: Literal["stochastic", "kahan", "nearest"]
    key: int
    """64-bit Philox key."""
    step: Tensor
    """0-d, the count of steps, whole number in any dtype; third word of the counter."""
    place: Place
    rest: Tensor | None = None
    """bf16, shaped as the parameter; only for kahan; updated in place."""


@dataclass(slots=True, kw_only=True)
class SketchTask:
    """APOLLO's first sweep: project a gradient and take its channels' squared norms. Reads the gradient once.

    contracts="cols": sketch `[rows, R] = grad @ projection`, squares `[rows]`.
    contracts="rows": sketch `[R, cols] = projection.T @ grad`, squares `[cols]`.
    """

    grad: Tensor
    projection_KR: Tensor
    """Compute dtype, contiguous. For a bf16 gradient its values are representable in bf16, and it may be."""
    contracts: Axis
    sketch: Tensor
    """Written; compute dtype, contiguous."""
    squares: Tensor
    """Written; compute dtype, sums over the contracted axis of grad * grad."""


@dataclass(slots=True, kw_only=True)
class MomentTask:
    """APOLLO's work on a sketch: Adam's moments of it, and how long each channel was before and after.

    With X = sketch * inverse_scale: M = beta1 M + (1 - beta1) X, V = beta2 V + (1 - beta2) X X,
    N = M / (sqrt(V) + eps); after[c] = sum of N*N over the channel, before[c] = sum of X*X over the channel.
    Where `active` is 0 nothing is read from the sketch (it may hold NaN), M and V stay, both sums are 0.
    """

    sketch: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    channels: Axis
    """"rows": the sketch is [C, R]; "cols": it is [R, C]."""
    coefficients: Tensor
    """[5]: active (0 or 1), beta1, beta2, eps, inverse_scale."""
    before: Tensor
    """Written, [C]."""
    after: Tensor
    """Written, [C]."""


@dataclass(slots=True, kw_only=True)
class ScaleTask:
    """APOLLO's second sweep: param = keep * param - factor * grad.

    `factor` is [rows], [cols] or [1], as `along` says. Where the factor is 0 the gradient is not looked at,
    so a NaN there does no harm.
    """

    param: Tensor
    grad: Tensor
    factor: Tensor
    along: Literal["rows", "cols", "all"]
    keep: Tensor
    """[1]."""
    rounding: Rounding


@dataclass(slots=True, kw_only=True)
class SweepTask:
    """SMMF's only sweep, paper 2412.08894 (specification 3.2). Element k of the whole tensor, i = k // width,
    j = k % width, with `width` the columns of the square-ish matrix:

        g = grad * inverse_scale (+ l2 * param)
        m = beta1 s row_m[i] col_m[j] + (1 - beta1) g, where s is +1 or -1 by the sign bit
        v = beta2 row_v[i] col_v[j] + (1 - beta2) g g
        u = m / (sqrt(v) + eps), clamped to +-max_update
        param = keep * param - lr * u;  sign = m > 0;  sums of |m| and v by i and by j, and of g g, are taken

    With `skip_zeros`, an element whose `grad` is exactly 0 has u = 0 (its sign and sums as above). Without
    momentum (`row_m` None) m is g and there are no signs. Where `active` is 0 nothing is written but zeros to
    `sums`. `sums` is written, not added to: [rows of the matrix + width] twice (m, then v; only v without
    momentum), then sum g g, in this order: row_m, col_m, row_v, col_v, square.
    """

    param: Tensor
    grad: Tensor
    row_m: Tensor | None
    col_m: Tensor | None
    row_v: Tensor
    col_v: Tensor
    sign: Tensor | None
    """uint8: packed [rows, ceil(cols / 8)], bit b of byte q = column 8 q + b; or [rows, cols], 0 or 1."""
    packed: bool
    coefficients: Tensor
    """[9]: active, beta1, beta2, lr, keep, l2, eps, inverse_scale, max_update (inf for none)."""
    skip_zeros: bool
    place: Place
    sums: Tensor
    rounding: Rounding


@dataclass(slots=True, kw_only=True)
class AdamTask:
    """AdamW's sweep: g = grad * inverse_scale (+ l2 * param), moments, then
    param = keep * param - step_size * m / (sqrt(v) * root_scale + eps).

    step_size = lr / (1 - beta1^t), root_scale = 1 / sqrt(1 - beta2^t). Where `active` is 0 nothing is
    written.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    coefficients: Tensor
    """[9]: active, beta1, beta2, step_size, root_scale, eps, keep, l2, inverse_scale."""
    rounding: Rounding


@dataclass(slots=True, kw_only=True)
class FillTask:
    """Random numbers of APOLLO's projections: those of flat indices from `start` on, as `ops/philox.py` says.

    The counter of an index is (index // 4 or its pair, `epoch`, `slice`), under `key`.
    """

    out: Tensor
    """Written; contiguous. Numbers are made in fp32 and rounded to nearest."""
    distribution: Literal["normal", "rademacher"]
    key: int
    """64-bit Philox key."""
    start: int
    epoch: int
    slice: int


class Backend(Protocol):
    """The sweeps of one back end; tasks of one call are on one device and share no memory they write."""

    def sketch(self, tasks: Sequence[SketchTask]) -> None:
        """Do APOLLO's first sweep."""
        ...

    def moments(self, tasks: Sequence[MomentTask]) -> None:
        """Update the moments of sketches."""
        ...

    def scale(self, tasks: Sequence[ScaleTask]) -> None:
        """Do APOLLO's second sweep."""
        ...

    def sweep(self, tasks: Sequence[SweepTask]) -> None:
        """Do SMMF's sweep."""
        ...

    def adam(self, tasks: Sequence[AdamTask]) -> None:
        """Do AdamW's sweep."""
        ...

    def fill(self, tasks: Sequence[FillTask]) -> None:
        """Draw random matrices."""
        ...


class Prepared(Protocol):
    """A sweep over certain tasks, described once."""

    def move(self, addresses: Sequence[int]) -> bool:
        """Take in where the memory it was prepared for lies now; False if it cannot be done there."""
        ...

    def run(self) -> None:
        """Do the sweep."""
        ...


@runtime_checkable
class PreparingBackend(Backend, Protocol):
    """A back end whose tasks cost the host so much that those of a step serve the next as well."""

    def prepare(self, sweep: str, tasks: Sequence[Any], memory: Sequence[Tensor]) -> Prepared | None:
        """Return the sweep of that name over tasks, not yet done; None where it can only be called.

        Args:
            sweep: name of the function.
            tasks: what it would be called with.
            memory: contiguous tensors that hold all tensors of the tasks; `move` takes their addresses.
        """
        ...

    def whereabouts(self, device: torch.device) -> Hashable:
        """Return what a prepared sweep is bound to besides addresses; None if none may be kept now."""
        ...


@functools.cache
def preparing(backend: Backend) -> PreparingBackend | None:
    """Return the back end if it prepares sweeps."""
    return backend if isinstance(backend, PreparingBackend) else None


BACKENDS: dict[str, str] = {
    "foreach": "hardy.ops.updates_eager",
    "native": "hardy.ops.updates_native",
    "triton": "hardy.ops.updates_triton",
}
"""Modules by name of the back end; imported when chosen."""


def choose_backend(name: str, device: torch.device) -> Backend:
    """Return the back end for tensors on `device`; "auto" is the fastest that can run there.

    Raises:
        UserError: there is no such back end, or it cannot run here.
    """
    return _backend(name, device.type)


@functools.cache
def _backend(name: str, device_type: str) -> Backend:
    if name == "auto":
        name = "foreach"
        if device_type == "cuda" and find_spec("triton") is not None:
            name = "triton"
        elif device_type == "cpu" and import_module(BACKENDS["native"]).available():
            name = "native"
    if name not in BACKENDS:
        raise UserError(unknown_name(name, "back end of optimizers", [*BACKENDS, "auto"]))
    wanted = {"native": "cpu", "triton": "cuda"}.get(name, device_type)
    if wanted != device_type:
        raise UserError(f"backend={name!r} runs on {wanted}, the parameters are on {device_type}; use 'auto'")
    if name == "triton" and find_spec("triton") is None:
        raise UserError("backend='triton' needs the triton package; use 'auto', or 'foreach'")
    module = import_module(BACKENDS[name])
    if name == "native" and not module.available():
        raise UserError("backend='native' needs a C++ compiler (g++ or clang++) on this machine; use 'auto'")
    return cast(Backend, module)
