"""Which way to write the sweeps for CPUs: eager torch, torch.compile, numba or C++, against fused AdamW.

    python benchmarks/bench_cpu_route.py --size 4096 --threads 2 --rounds 11
    python benchmarks/bench_cpu_route.py --threads 1 --clock cpu

SMMF's sweep and APOLLO-Mini's two sweeps over one fp32 matrix. All contenders run in one process, in turns,
each on tensors of its own, so that none finds them in cache; a ratio is the median of the rounds' ratios to
torch's fused AdamW, in brackets their range. `copy` copies as many bytes as the sweep has to move (SMMF 12.25
per element, Mini 16). The first use of a contender is timed apart: it may compile (C++ in an empty cache).

After a parallel operation torch's OpenMP threads spin for some milliseconds before they sleep, and threads
that are not theirs share the cores with them. `--rest-ms` is the pause before each measurement: with 0, C++
on threads of its own pays for that, as in a step right behind a backward pass. On a busy machine a wall clock
says little; `--clock cpu` takes the time that the process was running, on one thread.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from circumstances import circumstances

from hardy.ops import native_build, updates_eager, updates_native
from hardy.ops.updates import Place, Rounding, ScaleTask, SketchTask, SweepTask

numba = import_module("numba") if find_spec("numba") else None
RESULTS = Path(__file__).parent / "results" / "bench_cpu_route.jsonl"
BYTES = {"smmf": 12.25, "mini": 16.0}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Tensors:
    """One matrix with SMMF's and Mini's state, in the middle of training."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731  # one line, five uses
        self.size, self.param, self.grad = size, draw(size, size), 1e-3 * draw(size, size)
        self.factors = [1e-3 * draw(size).abs() for _ in range(4)]
        self.sign = torch.randint(0, 256, (size, size // 8), generator=generator, dtype=torch.uint8)
        self.numbers = torch.tensor([1, 0.9, 0.99, 1e-3, 1, 0, 1e-8, 1, float("inf")])
        self.sums = torch.zeros(4 * size + 1)
        self.projection, self.sketch, self.squares = draw(size, 1), torch.zeros(size, 1), torch.zeros(size)
        self.factor, self.keep = torch.full((1,), 1e-3), torch.ones(1)


class Sweeps:
    """A back end of `hardy.ops.updates`."""

    def __init__(self, backend, size):
        t, self.backend = Tensors(size), backend
        place = Place(base=0, stride=size)
        rounding = Rounding(mode="nearest", key=0, step=torch.tensor(1.0), place=place)
        self.sweep = SweepTask(
            param=t.param,
            grad=t.grad,
            **dict(zip(("row_m", "col_m", "row_v", "col_v"), t.factors, strict=True)),
            sign=t.sign,
            packed=True,
            coefficients=t.numbers,
            skip_zeros=True,
            place=place,
            sums=t.sums,
            rounding=rounding,
        )
        self.sketch = SketchTask(
            grad=t.grad, projection_KR=t.projection, contracts="cols", sketch=t.sketch, squares=t.squares
        )
        self.scale = ScaleTask(
            param=t.param, grad=t.grad, factor=t.factor, along="all", keep=t.keep, rounding=rounding
        )

    def smmf(self):
        self.backend.sweep([self.sweep])

    def mini(self):
        self.backend.sketch([self.sketch])
        self.backend.scale([self.scale])


class OnTorchsThreads(Sweeps):
    """The C++ back end on the threads of torch's OpenMP library."""

    def smmf(self):
        native_build.use_openmp_threads(wanted=True)
        super().smmf()
        native_build.use_openmp_threads(wanted=False)

    def mini(self):
        native_build.use_openmp_threads(wanted=True)
        super().mini()
        native_build.use_openmp_threads(wanted=False)


def smmf_formula(param, grad, factors, sign, numbers, sums):
    """SMMF on a whole square matrix, as one would write it for a compiler."""
    row_m, col_m, row_v, col_v = factors
    _, beta1, beta2, lr, keep, l2, eps, inverse_scale, most = numbers.unbind()
    # In int32, for inductor has no vectors of bytes.
    bits = (sign.int().unsqueeze(-1) >> torch.arange(8, dtype=torch.int32)) & 1
    s = bits.view(param.shape).to(param.dtype) * 2 - 1
    g = grad * inverse_scale + l2 * param
    m = beta1 * s * row_m[:, None] * col_m + (1 - beta1) * g
    v = beta2 * row_v[:, None] * col_v + (1 - beta2) * g * g
    u = torch.minimum(torch.maximum(m / (v.sqrt() + eps), -most), most)
    param.copy_(keep * param - lr * torch.where(grad == 0, 0.0, u))
    positive = (m > 0).int().view(len(sign), -1, 8).unbind(-1)
    sign.copy_(functools.reduce(torch.bitwise_or, (x << b for b, x in enumerate(positive))).to(torch.uint8))
    m = m.abs()
    sums.copy_(torch.cat([m.sum(1), m.sum(0), v.sum(1), v.sum(0), (g * g).sum().view(1)]))


def sketch_formula(grad, projection, sketch, squares):
    """Mini's first sweep."""
    sketch.copy_((grad * projection.view(-1)).sum(1, keepdim=True))
    squares.copy_((grad * grad).sum(1))


def scale_formula(param, grad, factor, keep):
    """Mini's second sweep."""
    param.copy_(keep * param - torch.where(factor == 0, 0.0, factor * grad))


class Compiled:
    """torch.compile of the formulas."""

    def __init__(self, size):
        self.tensors = Tensors(size)
        self.smmf_compiled, self.sketch_compiled, self.scale_compiled = (
            torch.compile(formula, fullgraph=True, dynamic=False)
            for formula in (smmf_formula, sketch_formula, scale_formula)
        )

    def smmf(self):
        t = self.tensors
        self.smmf_compiled(t.param, t.grad, t.factors, t.sign, t.numbers, t.sums)

    def mini(self):
        t = self.tensors
        self.sketch_compiled(t.grad, t.projection, t.sketch, t.squares)
        self.scale_compiled(t.param, t.grad, t.factor, t.keep)


def smmf_loops(param, grad, factors, sign, numbers, sums, columns):
    """SMMF as loops for numba; `columns` [threads, 2, cols] holds sums of columns."""
    rows, cols = param.shape
    beta1, beta2, lr, keep, eps, most = numbers[1], numbers[2], numbers[3], numbers[4], numbers[6], numbers[8]
    row_m, col_m, row_v, col_v = factors[0], factors[1], factors[2], factors[3]
    rest1, rest2, zero, bands = np.float32(1) - beta1, np.float32(1) - beta2, np.float32(0), len(columns)
    columns[:] = 0
    squares = np.zeros(bands)
    for band in numba.prange(bands):
        positive = np.empty(cols, dtype=np.uint8)
        for i in range(rows * band // bands, rows * (band + 1) // bands):
            total_m, total_v, square = zero, zero, zero
            for j in range(cols):
                g = grad[i, j]
                expected = beta1 * row_m[i] * col_m[j]
                m = (expected if (sign[i, j >> 3] >> (j & 7)) & 1 else -expected) + rest1 * g
                v = beta2 * row_v[i] * col_v[j] + rest2 * (g * g)
                u = min(max(m / (np.sqrt(v) + eps), -most), most)
                param[i, j] = keep * param[i, j] - lr * (u if g != 0 else zero)
                positive[j] = m > 0
                total_m += abs(m)
                total_v += v
                square += g * g
                columns[band, 0, j] += abs(m)
                columns[band, 1, j] += v
            for q in range(cols // 8):
                byte = 0
                for b in range(8):
                    byte |= positive[8 * q + b] << b
                sign[i, q] = byte
            sums[i], sums[rows + cols + i] = total_m, total_v
            squares[band] += square
    sums[rows : rows + cols] = columns[:, 0].sum(0)
    sums[2 * rows + cols : -1] = columns[:, 1].sum(0)
    sums[-1] = squares.sum()


def sketch_loops(grad, projection, sketch, squares):
    """Mini's first sweep as loops for numba."""
    for i in numba.prange(grad.shape[0]):
        total, square = np.float32(0), np.float32(0)
        for j in range(grad.shape[1]):
            total += grad[i, j] * projection[j]
            square += grad[i, j] * grad[i, j]
        sketch[i], squares[i] = total, square


def scale_loops(param, grad, factor, keep):
    """Mini's second sweep as loops for numba."""
    for i in numba.prange(param.shape[0]):
        for j in range(param.shape[1]):
            param[i, j] = keep[0] * param[i, j] - factor[0] * grad[i, j]


class Numba:
    """The loops, compiled by numba on their first call."""

    def __init__(self, size):
        numba.set_num_threads(torch.get_num_threads())
        compiled = numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
        self.smmf_loops, self.sketch_loops, self.scale_loops = map(
            compiled, (smmf_loops, sketch_loops, scale_loops)
        )
        t, columns = Tensors(size), torch.zeros(torch.get_num_threads(), 2, size)
        smmf = [t.param, t.grad, torch.stack(t.factors), t.sign, t.numbers, t.sums, columns]
        sketch = [t.grad, t.projection.view(-1), t.sketch.view(-1), t.squares]
        scale = [t.param, t.grad, t.factor, t.keep]
        self.arguments = [[x.numpy() for x in group] for group in (smmf, sketch, scale)]

    def smmf(self):
        self.smmf_loops(*self.arguments[0])

    def mini(self):
        self.sketch_loops(*self.arguments[1])
        self.scale_loops(*self.arguments[2])


class FusedAdamW:
    """torch.optim.AdamW(fused=True)."""

    def __init__(self, size):
        param = torch.nn.Parameter(torch.randn(size, size))
        param.grad = 1e-3 * torch.randn(size, size)
        self.smmf = self.mini = torch.optim.AdamW([param], fused=True).step


class Copy:
    """A copy that reads and writes as many bytes as the sweeps have to move, together."""

    def __init__(self, size):
        self.pairs = {
            name: [torch.ones(int(num_bytes * size * size / 8)) for _ in range(2)]
            for name, num_bytes in BYTES.items()
        }

    def smmf(self):
        self.pairs["smmf"][0].copy_(self.pairs["smmf"][1])

    def mini(self):
        self.pairs["mini"][0].copy_(self.pairs["mini"][1])


MAKERS = {
    "fused AdamW": FusedAdamW,
    "copy": Copy,
    "eager": lambda size: Sweeps(updates_eager, size),
    "compile": Compiled,
    "numba": Numba,
    "C++": lambda size: Sweeps(updates_native, size),
    "C++, torch's threads": lambda size: OnTorchsThreads(updates_native, size),
}


def seconds(call, clock=time.perf_counter):
    """Return how long a call takes."""
    begin = clock()
    call()
    return clock() - begin


def make_contenders(options):
    """Return the contenders and what their first use of each method cost, in seconds."""
    contenders, first_use_s = {}, {}
    for name, make in MAKERS.items():
        if name in options.skip:
            continue
        if name == "numba" and numba is None:
            print("numba is not installed and is left out")
            continue
        contenders[name] = made = make(options.size)
        first_use_s[name] = {method: seconds(getattr(made, method)) for method in BYTES}
    return contenders, first_use_s


def measure(contenders, method, *, rounds, rest_s, clock):
    """Return the times of each contender, in seconds, round by round."""
    times, threads = {name: [] for name in contenders}, torch.get_num_threads()
    for _ in range(rounds):
        for name, contender in contenders.items():
            torch.set_num_threads(threads)  # numba sets OpenMP's number
            time.sleep(rest_s)
            times[name].append(seconds(getattr(contender, method), clock))
    return times


def report(times, first_use_s, method, options, *, rest_ms):
    """Print one table; return its rows."""
    rows = []
    what = f"{method}, {options.size} x {options.size} fp32, {options.threads} threads"
    print(f"\n{what}, {options.clock} clock, rest {rest_ms} ms")
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["fused AdamW"], strict=True)]
        row = {
            "method": method,
            "rest_ms": rest_ms,
            "contender": name,
            "median_ms": 1e3 * statistics.median(own),
        }
        row |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
        row |= {"first_use_s": first_use_s[name][method]}
        rows.append(row)
        moved = 28.0 if name == "fused AdamW" else BYTES[method]
        speed = moved * options.size**2 / statistics.median(own) / 1e9
        print(
            f"{name:22s} {row['ratio']:5.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "
            f"{row['median_ms']:7.2f} ms {speed:5.1f} GB/s  first use {row['first_use_s']:6.2f} s"
        )
    return rows


def main():
    """Measure, print, and with --write append to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="rows and columns, a multiple of 8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--rest-ms", type=float, nargs="+", default=[25.0, 0.0], help="pauses, a table for each"
    )
    parser.add_argument("--skip", nargs="*", default=[], choices=list(MAKERS), help="contenders to leave out")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: with --threads 1")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu adds the time of all threads up; use it with --threads 1")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as cache:
        native_build.use_cache_dir(Path(cache))
        contenders, first_use_s = make_contenders(options)
    torch.set_num_threads(options.threads)
    rows = []
    for rest_ms in options.rest_ms:
        for method in BYTES:
            times = measure(
                contenders, method, rounds=options.rounds, rest_s=rest_ms / 1e3, clock=CLOCKS[options.clock]
            )
            rows += report(times, first_use_s, method, options, rest_ms=rest_ms)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            settings = {"size": options.size, "rounds": options.rounds, "clock": options.clock, "rows": rows}
            file.write(json.dumps(circumstances() | settings) + "\n")


if __name__ == "__main__":
    main()
