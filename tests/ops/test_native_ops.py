"""The operators as torch sees them: bytes, versions, tensors without values, errors; and their threads."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import library as torch_library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hardy.ops import native_build, native_ops, updates_native
from hardy.ops.updates import (
    AdamTask,
    FillTask,
    MomentTask,
    Place,
    Rounding,
    ScaleTask,
    SketchTask,
    SweepTask,
)

pytestmark = pytest.mark.skipif(not updates_native.available(), reason="needs a C++ compiler")

SIZE = 96


def tasks(size=SIZE, mode="nearest"):
    """A task of each sweep, on fp32 tensors of size x size; bf16 weights where the mode is for them."""
    dtype = torch.float32 if mode == "nearest" else torch.bfloat16
    place = Place(base=0, stride=size)
    rest = torch.zeros(size, size, dtype=dtype) if mode == "kahan" else None
    rounding = Rounding(mode=mode, key=1, step=torch.tensor(1.0), place=place, rest=rest)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    weights = [draw(size, size).to(dtype) for _ in range(3)]
    grad, column, row = draw(size, size), draw(size, 1), draw(1, size)
    sums = torch.zeros(4 * size + 1)
    vectors = [draw(size).abs() for _ in range(4)]
    return {
        "sketch": SketchTask(
            grad=grad,
            projection_KR=column,
            contracts="cols",
            sketch=column.clone(),
            squares=torch.zeros(size),
        ),
        "moments": MomentTask(
            sketch=row,
            exp_avg=row.clone(),
            exp_avg_sq=row.square(),
            channels="cols",
            coefficients=torch.tensor([1, 0.9, 0.99, 1e-6, 1]),
            before=torch.zeros(size),
            after=torch.zeros(size),
        ),
        "scale": ScaleTask(
            param=weights[0],
            grad=grad,
            factor=torch.ones(1),
            along="all",
            keep=torch.ones(1),
            rounding=rounding,
        ),
        "sweep": SweepTask(
            param=weights[1],
            grad=grad,
            **dict(zip(("row_m", "col_m", "row_v", "col_v"), vectors, strict=True)),
            sign=torch.zeros(size, size // 8, dtype=torch.uint8),
            packed=True,
            coefficients=torch.tensor([1, 0.9, 0.99, 0.01, 1, 0, 1e-8, 1, 10]),
            skip_zeros=True,
            place=place,
            sums=sums,
            rounding=rounding,
        ),
        "adam": AdamTask(
            param=weights[2],
            grad=grad,
            exp_avg=draw(size, size),
            exp_avg_sq=draw(size, size).square(),
            coefficients=torch.tensor([1, 0.9, 0.99, 0.01, 1, 1e-8, 1, 0, 1]),
            rounding=rounding,
        ),
    }


class Watch(TorchDispatchMode):
    """What operators read and write, by their schemas."""

    def __init__(self):
        super().__init__()
        self.names, self.num_bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.view.default:
            return func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        for argument, value in zip(func._schema.arguments, args, strict=True):
            times = 2 if argument.alias_info is not None and argument.alias_info.is_write else 1
            tensors = [x for x in tree_leaves(value) if torch.is_tensor(x)]
            self.num_bytes += times * sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("sweep", "per_element"), [("sketch", 4), ("scale", 12), ("sweep", 12.25), ("adam", 28), ("moments", 0)]
)
def test_a_sweep_is_one_operator_whose_schema_gives_its_bytes(sweep, per_element):
    task = tasks()[sweep]
    with Watch() as watch:
        getattr(updates_native, sweep)([task, replace(task)])
    assert watch.names == [f"hardy::native_{sweep}"]
    vectors = 4 * 40 * SIZE  # factors, sums, projections: some rows
    assert 0 <= watch.num_bytes / 2 - per_element * SIZE * SIZE <= vectors


@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
@pytest.mark.parametrize("sweep", ["scale", "sweep", "adam"])
def test_rests_are_counted_where_there_are_some(sweep, mode):
    task = tasks(mode=mode)[sweep]
    with Watch() as watch:
        getattr(updates_native, sweep)([task])
    bytes_of_rests = 4 * SIZE * SIZE if mode == "kahan" else 0
    plain = {"scale": 2 * 2 + 4, "sweep": 2 * 2 + 4 + 0.25, "adam": 2 * 2 + 4 + 16}[sweep]
    assert 0 <= watch.num_bytes - plain * SIZE * SIZE - bytes_of_rests <= 4 * 40 * SIZE


@pytest.mark.parametrize("sweep", ["scale", "sweep", "adam"])
def test_weights_count_as_changed_in_place(sweep):
    task = tasks()[sweep]
    before, of_grad = task.param._version, task.grad._version
    getattr(updates_native, sweep)([task])
    assert task.param._version > before and task.grad._version == of_grad


@pytest.mark.parametrize("sweep", ["sketch", "moments", "scale", "sweep", "adam"])
def test_what_is_written_is_what_the_schema_says(sweep, monkeypatch):
    """torch's own check: no other argument changes, and the operator works on tensors without values."""
    operators = native_ops.operators()
    seen = []
    monkeypatch.setitem(operators, sweep, lambda *args: seen.append(args))
    getattr(updates_native, sweep)([tasks()[sweep]])
    monkeypatch.undo()
    result = torch_library.opcheck(
        operators[sweep], seen[0], test_utils=("test_schema", "test_faketensor"), raise_exception=True
    )
    assert set(result.values()) == {"SUCCESS"}


def test_a_compiled_function_may_hold_an_operator():
    scale = native_ops.operators()["scale"]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(param, grad, one):
        scale([param], [grad], [one], [one], [], [], [0, 1, 0, SIZE, 0])
        return param * 2

    task = tasks()["scale"]
    wanted = 2 * (task.param - task.grad)
    assert torch.equal(step(task.param, task.grad, torch.ones(1)), wanted)
    assert torch.equal(2 * task.param, wanted)


def test_when_memory_runs_out_the_error_says_that_weights_have_moved(monkeypatch):
    failing = {name: lambda *_: 1 for name in (*native_ops.WORDS, "fill")}
    monkeypatch.setattr(native_ops, "functions", lambda: failing)
    with pytest.raises(
        MemoryError, match="no memory is left for the sums of the optimizer's sweep; some parameters"
    ):
        updates_native.sweep([tasks()["sweep"]])
    with pytest.raises(MemoryError, match="no memory is left to draw random numbers"):
        updates_native.fill(
            [FillTask(out=torch.empty(3), distribution="rademacher", key=1, start=0, epoch=0, slice=0)]
        )


@pytest.mark.parametrize(
    ("sweep", "wrong"),
    [
        ("sketch", {"projection_KR": torch.ones(SIZE + 1, 1)}),
        ("sketch", {"squares": torch.ones(SIZE - 1)}),
        ("moments", {"after": torch.ones(SIZE - 1)}),
        ("scale", {"factor": torch.ones(2)}),
        ("sweep", {"sums": torch.ones(4 * SIZE)}),
        ("sweep", {"sign": torch.zeros(SIZE, SIZE // 8 - 1, dtype=torch.uint8)}),
        ("sweep", {"place": Place(base=1, stride=SIZE)}),
        ("adam", {"exp_avg": torch.ones(SIZE, SIZE - 1)}),
    ],
)
def test_tensors_that_do_not_fit_never_reach_memory(sweep, wrong):
    task = replace(tasks()[sweep], **wrong)
    if "place" in wrong:
        task = replace(task, rounding=replace(task.rounding, place=wrong["place"]))
    with pytest.raises(AssertionError):
        getattr(updates_native, sweep)([task])


@pytest.fixture
def torchs_threads():
    if not native_build.use_openmp_threads(wanted=True):
        pytest.skip("torch is built without GNU's OpenMP")
    yield
    native_build.use_openmp_threads(wanted=False)


def results(threads):
    torch.set_num_threads(threads)
    own = tasks(size=1024)
    for sweep, task in own.items():
        getattr(updates_native, sweep)([task, replace(task)] if sweep == "sketch" else [task])
    torch.set_num_threads(1)
    return [
        own["sketch"].sketch,
        own["sweep"].sums,
        *(own[sweep].param for sweep in ("scale", "sweep", "adam")),
    ]


def test_torchs_threads_give_the_same_bits(torchs_threads):
    borrowed = results(2)
    assert not native_build.use_openmp_threads(wanted=False)
    assert all(torch.equal(a, b) for a, b in zip(borrowed, results(2), strict=True))


@pytest.mark.parametrize("borrow", [True, False], ids=["torch's threads", "own threads"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_with_threads_of_its_own(borrow, request):
    """The child has none of the threads that its parent had; waiting for them would never end."""
    if borrow:
        request.getfixturevalue("torchs_threads")
    wanted = results(2)
    same = tasks(size=1024)["sweep"]
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends the child, should it hang
        try:
            torch.set_num_threads(2)
            updates_native.sweep([same])
        finally:
            os._exit(0 if torch.equal(same.sums, wanted[1]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
