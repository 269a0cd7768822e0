"""The C++ functions of `native.cpp` as torch operators: `torch.ops.hardy.native_sweep` and so on.

An operator takes the tensors of many tasks in lists and says in its schema which it writes, so that whatever
watches operators (a counter of bytes, a compiler) sees the reads and writes of full tensors. It makes a table
of addresses and sizes and calls C++ once, without Python's lock. Weights and gradients are fp32 or bf16, the
rest is fp32 and contiguous; `updates_native` sees to that.
"""

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library
from torch.autograd.graph import increment_version

from hardy.ops import native_build

WORDS = {"sketch": 12, "tiled_sketch": 12, "moments": 9, "scale": 18, "sweep": 27, "adam": 19}
"""64-bit words of a row of each table; the compiled library must agree."""
ONE_PASS_RANK = 8
"""Below this rank a sketch is made in one pass of fp32 instructions; from here on by matrix products, in one
pass of tile instructions where the processor has them."""
COPY_BYTES = 16 << 20
"""Of a bf16 gradient as fp32: what is converted and multiplied at a time."""
LIBRARY: Any = torch_library.Library("hardy", "FRAGMENT")
"""Keeps the operators alive."""
_WRITTEN = "Tensor(a!)[] params, Tensor[] grads"
_ROUNDED = "Tensor[] steps, Tensor(z!)[] rests, int[] numbers"
_SCHEMAS = {
    "sketch": "Tensor[] grads, Tensor[] projections, Tensor(a!)[] sketches, Tensor(b!)[] squares, "
    "int[] by_columns",
    "moments": "Tensor[] sketches, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, Tensor(c!)[] before, "
    "Tensor(d!)[] after, Tensor[] coefficients, int[] by_columns",
    "scale": f"{_WRITTEN}, Tensor[] factors, Tensor[] keeps, {_ROUNDED}",
    "sweep": f"{_WRITTEN}, Tensor[] factors, Tensor(b!)[] signs, Tensor(c!)[] sums, {_ROUNDED}",
    "adam": f"{_WRITTEN}, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] coefficients, {_ROUNDED}",
    "fill": "Tensor(a!) out, int key, int start, int third, int fourth, bool normal",
}


@functools.cache
def functions() -> dict[str, Callable[..., int]] | None:
    """Return the C++ functions by name: those of WORDS and fill; None where they cannot be compiled."""
    library = native_build.loaded_library()
    if library is None:
        return None
    sizes = (ctypes.c_int64 * len(WORDS))()
    library.native_row_bytes(sizes)
    assert [8 * words for words in WORDS.values()] == list(sizes), "rows are as native.cpp reads them"
    word = ctypes.c_int64
    found: dict[str, Callable[..., int]] = {}
    for name in [*WORDS, "fill"]:
        function = getattr(library, f"native_{name}")
        function.argtypes = [ctypes.c_void_p, word, word, *([word] * 5 if name == "fill" else ())]
        found[name] = function
    return found


@functools.cache
def has_tiles() -> bool:
    """Return whether sketches are made by tile instructions (AMX): where processor and system have them."""
    library = native_build.loaded_library()
    return library is not None and bool(library.native_has_tiles())


@functools.cache
def operators() -> dict[str, Callable[..., None]]:
    """Register the operators and return them by name: those of WORDS and fill."""
    kernels: dict[str, Callable[..., None]] = {"sketch": _sketch, "moments": _moments, "scale": _scale}
    kernels |= {"sweep": _sweep, "adam": _adam, "fill": _fill}
    return {name: register(name, _SCHEMAS[name], kernel) for name, kernel in kernels.items()}


def register(name: str, schema: str, kernel: Callable[..., None]) -> Callable[..., None]:
    """Make an operator `hardy::native_NAME` of a CPU kernel, so that whatever watches operators sees it.

    Args:
        name: of the operator, once in a process.
        schema: its arguments; those it writes are marked. It returns nothing.
        kernel: what it calls.
    """
    library: Any = torch_library  # its functions have no types
    LIBRARY.define(f"native_{name}({schema}) -> ()")
    LIBRARY.impl(f"native_{name}", kernel, "CPU")
    library.register_fake(f"hardy::native_{name}", _nothing, lib=LIBRARY)
    return getattr(torch.ops.hardy, f"native_{name}").default


def _nothing(*_args: Any) -> None:
    """Stand for an operator where tensors have no values; no operator returns anything."""


def _call(name: str, table: Sequence[int]) -> None:
    """Call the C++ function of that name with the rows of a table."""
    found = functions()
    assert found is not None and len(table) % WORDS[name] == 0
    words = array("q", table)
    if found[name](words.buffer_info()[0], len(words) // WORDS[name], torch.get_num_threads()):
        raise MemoryError(
            f"no memory is left for the sums of the optimizer's {name}; some parameters have moved"
        )


def _half(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _flat(tensors: Sequence[Tensor], stride: int) -> int:
    """Return the number of elements where rows follow each other, in memory and in the whole; else 0."""
    rows, cols = tensors[0].shape
    if rows > 1 and (stride != cols or any(tensor.stride(0) != cols for tensor in tensors)):
        return 0
    return rows * cols


def _matrices(param: Tensor, grad: Tensor, rounding: Sequence[int], flat: int) -> list[int]:
    """Return the structs Weights and Grads, rows and columns.

    Args:
        param: Weights.
        grad: Their gradient.
        rounding: Mode, key, base, stride, address of the step, address and row length of the rest.
        flat: All is one row of so many elements, unless this is 0.
    """
    assert param.shape == grad.shape
    mode, key, base, stride, step, rest, rest_stride = rounding
    rows, cols = (1, flat) if flat else param.shape
    return [
        *(param.data_ptr(), flat or param.stride(0), _half(param), mode, key, step),
        *(base, flat or stride, rest, flat or rest_stride),
        *(grad.data_ptr(), flat or grad.stride(0), _half(grad), rows, cols),
    ]


def _rounding(
    numbers: Sequence[int], steps: Sequence[Tensor], rests: Sequence[Tensor], index: int
) -> list[int]:
    """Return what `_matrices` wants to know; `numbers` are mode, key, base and stride."""
    step = steps[index].data_ptr() if steps else 0
    rest = (rests[index].data_ptr(), rests[index].stride(0)) if rests else (0, 0)
    return [*numbers, step, *rest]


def _sketch_row(tensors: Sequence[Tensor | None], by_columns: int, *, add: int = 0) -> list[int]:
    """Return the struct SketchTask of gradient, squares and, where wanted, projection, sketch, fp32 copy."""
    grad, squares, projection, sketch, _ = tensors
    assert grad is not None and squares is not None and squares.numel() == grad.shape[by_columns]
    rank = 0 if projection is None else projection.shape[1]
    assert projection is None or projection.shape[0] == grad.shape[1 - by_columns]
    assert sketch is None or sketch.numel() == rank * squares.numel()
    to_squares, *others = (0 if x is None else x.data_ptr() for x in tensors[1:])
    return [
        *(grad.data_ptr(), grad.stride(0), _half(grad), *grad.shape, others[0], rank, by_columns),
        *(others[1], to_squares, add, others[2]),
    ]


def _sketch(
    grads: Sequence[Tensor],
    projections: Sequence[Tensor],
    sketches: Sequence[Tensor],
    squares: Sequence[Tensor],
    by_columns: Sequence[int],
) -> None:
    rows: dict[str, list[int]] = {"sketch": [], "tiled_sketch": []}
    for task in zip(grads, projections, sketches, squares, by_columns, strict=True):
        grad, projection, sketch, own_squares, axis = task
        by_products = projection.shape[1] >= ONE_PASS_RANK
        if by_products and not (has_tiles() and grad.numel()):
            _sketch_by_products(*task)
        else:
            name = "tiled_sketch" if by_products else "sketch"
            rows[name] += _sketch_row([grad, own_squares, projection, sketch, None], axis)
    for name, table in rows.items():
        _call(name, table)


def _sketch_by_products(
    grad: Tensor, projection: Tensor, sketch: Tensor, squares: Tensor, by_columns: int
) -> None:
    """Square in one pass and multiply in another: torch's product is fastest on the whole matrix.

    Cut into bands that stay in cache it takes three to nine times as long: each band packs the projection
    again, and waits for threads that our own have pushed aside. bf16 is multiplied as fp32, which is much
    faster here, in bands as large as the copy may be.
    """
    rows, cols = grad.shape
    half = _half(grad)
    height = max(1, COPY_BYTES // (4 * max(cols, 1))) if half else max(rows, 1)
    converted = grad.new_empty(min(height, rows), cols, dtype=torch.float32) if half else None
    if by_columns and not 0 < rows <= height:
        sketch.zero_()
        squares.zero_()
    for begin in range(0, rows, height):
        band = grad[begin : begin + height]
        copy = None if converted is None else converted[: len(band)]
        own_squares = squares if by_columns else squares[begin : begin + height]
        add = int(bool(by_columns) and rows > height)
        _call("sketch", _sketch_row([band, own_squares, None, None, copy], by_columns, add=add))
        values = band if copy is None else copy
        if not by_columns:
            torch.mm(values, projection[:cols], out=sketch[begin : begin + height])
        elif rows > height:
            sketch.addmm_(projection[begin : begin + height].T, values)
        else:
            torch.mm(projection.T, values, out=sketch)


def _moments(
    sketches: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    by_columns: Sequence[int],
) -> None:
    table: list[int] = []
    tasks = zip(sketches, exp_avgs, exp_avg_sqs, coefficients, before, after, by_columns, strict=True)
    for sketch, exp_avg, exp_avg_sq, numbers, *sums, axis in tasks:
        assert sketch.shape == exp_avg.shape == exp_avg_sq.shape and numbers.numel() == 5
        assert sums[0].numel() == sums[1].numel() == sketch.shape[axis]
        table += [*(x.data_ptr() for x in (sketch, exp_avg, exp_avg_sq)), *sketch.shape, axis]
        table += [x.data_ptr() for x in (numbers, *sums)]
    _call("moments", table)


def _scale(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    keeps: Sequence[Tensor],
    steps: Sequence[Tensor],
    rests: Sequence[Tensor],
    numbers: Sequence[int],
) -> None:
    table: list[int] = []
    for index, (param, grad, factor, keep) in enumerate(zip(params, grads, factors, keeps, strict=True)):
        *place, along = numbers[5 * index : 5 * index + 5]
        assert factor.numel() == (1, *param.shape)[along] and keep.numel() == 1
        flat = 0 if along else _flat([param, grad, *rests[index : index + 1]], place[3])
        table += _matrices(param, grad, _rounding(place, steps, rests, index), flat)
        table += [factor.data_ptr(), along, keep.data_ptr()]
    _call("scale", table)
    increment_version(params)


def _sweep(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    signs: Sequence[Tensor],
    sums: Sequence[Tensor],
    steps: Sequence[Tensor],
    rests: Sequence[Tensor],
    numbers: Sequence[int],
) -> None:
    table: list[int] = []
    count = 5 if signs else 3
    for index, (param, grad, out) in enumerate(zip(params, grads, sums, strict=True)):
        *place, packed, skips = numbers[6 * index : 6 * index + 6]
        *vectors, coefficients = factors[count * index : count * (index + 1)]
        height, width = vectors[-2].numel(), vectors[-1].numel()
        assert coefficients.numel() == 9 and out.numel() == (count // 2) * (height + width) + 1
        assert [x.numel() for x in vectors] == [height, width] * (count // 2)
        rows, cols = param.shape
        assert place[2] + (rows - 1) * place[3] + cols <= height * width or not param.numel()
        sign, packed = _sign_words(signs[index], packed, param) if signs else ([0, 0], 0)
        # Whether rows are one row must not depend on how signs are kept, or sums would differ in their last
        # bits.
        bytes_meet = cols % 8 == 0 or cols == 1 or rows == 1
        gaps = signs and rows > 1 and sign[1] != cols // (8 if packed else 1)
        flat = _flat([param, grad, *rests[index : index + 1]], place[3]) if bytes_meet and not gaps else 0
        table += _matrices(param, grad, _rounding(place, steps, rests, index), flat)
        table += [*([0, 0] if not signs else ()), *(x.data_ptr() for x in vectors), *sign, packed]
        table += [coefficients.data_ptr(), skips, height, width, out.data_ptr()]
    _call("sweep", table)
    increment_version(params)


def _sign_words(sign: Tensor, packed: int, param: Tensor) -> tuple[list[int], int]:
    """Return address and row length of the signs, and whether bytes hold several; one lies as unpacked."""
    rows, cols = param.shape
    assert sign.dtype == torch.uint8 and sign.shape == (rows, -(-cols // 8) if packed else cols)
    return [sign.data_ptr(), sign.stride(0)], int(packed and cols > 1)


def _adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    steps: Sequence[Tensor],
    rests: Sequence[Tensor],
    numbers: Sequence[int],
) -> None:
    table: list[int] = []
    tasks = zip(params, grads, exp_avgs, exp_avg_sqs, coefficients, strict=True)
    for index, (param, grad, exp_avg, exp_avg_sq, own) in enumerate(tasks):
        place = numbers[4 * index : 4 * index + 4]
        assert param.shape == exp_avg.shape == exp_avg_sq.shape and own.numel() == 9
        flat = _flat([param, grad, exp_avg, *rests[index : index + 1]], place[3])
        table += _matrices(param, grad, _rounding(place, steps, rests, index), flat)
        table += [exp_avg.data_ptr(), exp_avg_sq.data_ptr(), flat or exp_avg.stride(0), own.data_ptr()]
    _call("adam", table)
    increment_version(params)


def _fill(out: Tensor, key: int, start: int, third: int, fourth: int, normal: bool) -> None:
    found = functions()
    assert found is not None and out.dtype == torch.float32 and out.is_contiguous()
    words = [start, third, fourth, key, int(normal), torch.get_num_threads()]
    if found["fill"](out.data_ptr(), out.numel(), *words):
        raise MemoryError("no memory is left to draw random numbers")
