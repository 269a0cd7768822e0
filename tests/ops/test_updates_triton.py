"""The Triton back end as a whole: mixed calls, what goes to the eager one, and that all kernels compile.

The parts have tests of their own. Compiling needs no GPU: Triton brings the assembler for one.
"""

import copy
import re
import subprocess
import sys

import pytest
import torch

from hardy.ops import updates_eager
from hardy.ops.updates import AdamTask, MomentTask, Place, Rounding, ScaleTask, SketchTask, SweepTask

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
H100 = ("cuda", 90, 32)


def tensor(*shape, dtype=FP32, device="cpu"):
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).abs().add(0.1).to(dtype)


def how(mode, stride, device="cpu"):
    step = tensor(device=device)
    return Rounding(mode=mode, key=1 << 63, step=step, place=Place(base=0, stride=stride))


def adam_task(rows, cols, param=FP32, grad=FP32, device="cpu"):
    wide = FP64 if param == FP64 else FP32
    mode = "stochastic" if param == BF16 else "nearest"
    numbers = torch.tensor([1, 0.9, 0.99, 0.02, 1.3, 1e-8, 0.98, 0.1, 0.5], dtype=wide)
    return AdamTask(
        param=tensor(rows, cols, dtype=param, device=device),
        grad=tensor(rows, cols, dtype=grad, device=device),
        exp_avg=tensor(rows, cols, dtype=wide, device=device),
        exp_avg_sq=tensor(rows, cols, dtype=wide, device=device),
        coefficients=numbers,
        rounding=how(mode, cols, device),
    )


def scale_task(rows, cols, along, param=FP32, grad=FP32, device="cpu"):
    mode = "stochastic" if param == BF16 else "nearest"
    return ScaleTask(
        param=tensor(rows, cols, dtype=param, device=device),
        grad=tensor(rows, cols, dtype=grad, device=device),
        factor=tensor({"rows": rows, "cols": cols, "all": 1}[along], device=device),
        along=along,
        keep=tensor(1, device=device),
        rounding=how(mode, cols, device),
    )


def sketch_task(rows, cols, rank, contracts, grad=FP32, projection=FP32, device="cpu"):
    tall = contracts == "cols"
    return SketchTask(
        grad=tensor(rows, cols, dtype=grad, device=device),
        projection_KR=tensor(cols if tall else rows, rank, device=device).bfloat16().to(projection),
        contracts=contracts,
        sketch=tensor(*((rows, rank) if tall else (rank, cols)), device=device),
        squares=tensor(rows if tall else cols, device=device),
    )


def moment_task(channels, rank, along, device="cpu"):
    shape = (channels, rank) if along == "rows" else (rank, channels)
    names = ("sketch", "exp_avg", "exp_avg_sq")
    return MomentTask(
        **{name: tensor(*shape, device=device) for name in names},
        channels=along,
        coefficients=torch.tensor([1, 0.9, 0.99, 1e-8, 0.5]),
        before=tensor(channels, device=device),
        after=tensor(channels, device=device),
    )


def sweep_task(rows, cols, param=FP32, grad=FP32, signs="packed", matrix=None, device="cpu"):
    mode, momentum = "stochastic" if param == BF16 else "nearest", signs != "none"
    height, wide = matrix or (rows, cols)
    sizes = {"row_m": height, "col_m": wide, "row_v": height, "col_v": wide}
    factors = {name: tensor(size, device=device) for name, size in sizes.items()}
    if not momentum:
        factors |= {"row_m": None, "col_m": None}
    width = -(-cols // 8) if signs == "packed" else cols
    sign = torch.zeros(rows, width, dtype=torch.uint8, device=device)
    return SweepTask(
        param=tensor(rows, cols, dtype=param, device=device),
        grad=tensor(rows, cols, dtype=grad, device=device),
        **factors,
        sign=sign if momentum else None,
        packed=signs == "packed",
        coefficients=torch.tensor([1, 0.9, 0.99, 0.02, 0.98, 0.0, 1e-8, 0.5, 10.0]),
        skip_zeros=True,
        place=Place(base=0, stride=cols),
        sums=tensor((1 + momentum) * (height + wide) + 1, device=device),
        rounding=how(mode, cols, device),
    )


MIXED = {
    "adam": [
        adam_task(4, 8),
        adam_task(3, 5, BF16, BF16),
        adam_task(2, 2, FP64, FP64),
        adam_task(4, 8, grad=BF16),
    ],
    "scale": [scale_task(4, 8, "rows"), scale_task(4, 8, "cols", BF16, BF16), scale_task(3, 5, "all", BF16)],
    "sketch": [
        sketch_task(6, 4, 1, "cols"),
        sketch_task(4, 6, 2, "rows", BF16),
        sketch_task(6, 4, 1, "cols", BF16),
    ],
    "moments": [moment_task(6, 1, "rows"), moment_task(6, 3, "cols"), moment_task(6, 1, "rows")],
    "sweep": [sweep_task(8, 8), sweep_task(6, 5, BF16), sweep_task(8, 8, signs="none"), sweep_task(8, 8)],
}
WRITTEN = ("param", "exp_avg", "exp_avg_sq", "sketch", "squares", "before", "after", "sign", "sums")


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("sweep", MIXED)
def test_tasks_of_any_shapes_and_dtypes_in_one_call(sweep):
    from hardy.ops import updates_triton

    tasks = copy.deepcopy(MIXED[sweep])
    naive = copy.deepcopy(tasks)
    getattr(updates_triton, sweep)(tasks)
    getattr(updates_eager, sweep)(naive)
    for task, other, old in zip(tasks, naive, MIXED[sweep], strict=True):
        for name in WRITTEN:
            got, wanted = getattr(task, name, None), getattr(other, name, None)
            if got is not None:
                assert torch.allclose(got.double(), wanted.double(), rtol=1e-6, atol=1e-7), name
        assert not hasattr(task, "grad") or torch.equal(task.grad, old.grad)


@pytest.mark.usefixtures("triton_interpreter")
def test_the_back_end_has_every_sweep():
    from hardy.ops import updates_triton
    from hardy.ops.updates import Backend

    wanted = [name for name in vars(Backend) if not name.startswith("_")]
    assert [name for name in wanted if not callable(getattr(updates_triton, name, None))] == []


@pytest.mark.usefixtures("triton_interpreter")
def test_a_run_comes_out_the_same_bit_for_bit():
    from hardy.ops import updates_triton

    for name in ("sketch", "sweep"):
        runs = [copy.deepcopy(MIXED[name]) for _ in range(2)]
        for tasks in runs:
            getattr(updates_triton, name)(tasks)
        for task, other in zip(*runs, strict=True):
            assert all(
                torch.equal(getattr(task, x), getattr(other, x))
                for x in WRITTEN
                if getattr(task, x, None) is not None
            )


@pytest.mark.slow
def test_the_library_does_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hardy.ops.updates, hardy.ops.updates_eager, hardy.optim.build\n"
        "hardy.ops.updates.choose_backend('foreach', torch.device('cpu'))\n"
        "assert not [name for name in sys.modules if name.startswith('hardy.ops.triton_')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Compiled, not run -------------------------------------------------------------------------------------

META = {"device": "meta"}
COMPILED = {
    "adam bf16": ("ADAM", [adam_task(512, 512, BF16, BF16, **META)], 4),
    "adam fp32": ("ADAM", [adam_task(512, 512, **META)], 4),
    "scale rows bf16": ("SCALE", [scale_task(512, 512, "rows", BF16, BF16, **META)], 2),
    "scale cols fp32": ("SCALE", [scale_task(512, 512, "cols", **META)], 2),
    "sketch of rank 1 bf16": ("SKETCH", [sketch_task(512, 512, 1, "cols", BF16, **META)], 1),
    "sketch of rank 1 along rows": ("SKETCH", [sketch_task(64, 512, 1, "rows", **META)], 1),
    "sketch bf16": ("SKETCH", [sketch_task(4096, 4096, 256, "cols", BF16, **META)], 0),
    "sketch bf16 by bf16": ("SKETCH", [sketch_task(4096, 4096, 256, "cols", BF16, BF16, **META)], 0),
    "sketch along rows bf16": ("SKETCH", [sketch_task(4096, 11008, 256, "rows", BF16, **META)], 0),
    "sketch fp32": ("SKETCH", [sketch_task(4096, 4096, 256, "cols", **META)], 0),
    "moments cols": ("MOMENTS", [moment_task(512, 128, "cols", **META)], 3),
    "sweep bf16": ("SWEEP", [sweep_task(512, 512, BF16, BF16, **META)], 2),
    "sweep fp32": ("SWEEP", [sweep_task(512, 512, **META)], 2),
    "sweep without momentum": ("SWEEP", [sweep_task(512, 512, BF16, BF16, "none", **META)], 2),
    "sweep odd rows in eights": ("SWEEP", [sweep_task(512, 517, BF16, BF16, matrix=(517, 512), **META)], 2),
    "sweep odd": ("SWEEP", [sweep_task(505, 503, BF16, FP32, **META)], 0),
}
"""Kind, tasks, and how many of the loads must be 16 bytes wide in the first launch."""


def launches_of(name):
    from hardy.ops import triton_sketch, triton_sweep, updates_triton

    kind, tasks, loads = COMPILED[name]
    modules = (updates_triton, triton_sketch, triton_sweep)
    kind = next(getattr(module, kind) for module in modules if hasattr(module, kind))
    entries = [kind.describe(task) for task in tasks]
    group = entries[0][0]
    if hasattr(group, "device_type"):
        group = group._replace(device_type="cuda")  # the interpreter takes another dtype into the product
    return list(kind.launches(group, [row for _, row in entries])), loads


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Return a function that compiles a launch for an H100 and returns its assembly and machine code."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from hardy.ops.triton_launch import BLOCKS

    def build(launch):
        signature = {"table": "*i64", "workspace": "*fp32", "C": "constexpr"}
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(2)}
        source = ASTSource(launch.kernel, signature, constexprs={"C": launch.config}, attrs=aligned)
        block = BLOCKS[launch.block]
        options = {"num_warps": block["warps"], "num_stages": block["stages"]}
        options |= {"maxnreg": block["registers"]} if "registers" in block else {}
        return compile(source, target=GPUTarget(*H100), options=options)

    return build


@pytest.mark.parametrize("name", COMPILED)
def test_kernels_compile_with_wide_loads_and_little_shared_memory(name, compiled):
    launches, wide_loads = launches_of(name)
    for index, launch in enumerate(launches):
        kernel = compiled(launch)
        assert kernel.metadata.shared <= 227 * 1024
        assembly = kernel.asm["ptx"]
        assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", assembly, re.MULTILINE)
        if index == 0 and wide_loads:
            assert len(re.findall(r"ld\.global\.v4\.b32", assembly)) >= wide_loads, name
            assert re.search(r"st\.global\.v4\.b32", assembly) or "sketch" in name
        if name.startswith("sketch") and "rank 1" not in name and index == 0:
            assert "wgmma.mma_async" in assembly and "cp.async.cg.shared.global" in assembly
