"""Words, rounding, tables of the Triton kernels, in its interpreter: equal bits with the eager back end."""

import pytest
import torch

from hardy.ops.rounding import round_into
from hardy.ops.updates import Place, Rounding, ScaleTask

KEY = 0x8D744EE0202F6924
EDGES = [
    1.0,
    -1.00390625,
    1.005859375,
    3.3895e38,
    float("inf"),
    -float("inf"),
    float("nan"),
    1e-40,
    0.0,
    -0.0,
]
"""Among them a tie of bf16, a number that rounds up to infinity, and a denormal one."""


def values_of(rows, cols):
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    edges = torch.tensor(
        [*EDGES, *[torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32).item()]]
    )
    values.view(-1)[: len(edges)] = edges[: values.numel()]
    return values


def rounded(values, *, mode, place, step, rest=None):
    """Write fp32 values to bf16 zeros by the kernel: 0 - (-1 * value) is the value, exactly."""
    from hardy.ops.updates_triton import scale

    weight = torch.zeros(values.shape, dtype=torch.bfloat16)
    rule = Rounding(mode=mode, key=KEY, step=step, place=place, rest=rest)
    factor, keep = torch.tensor([-1.0]), torch.tensor([1.0])
    scale([ScaleTask(param=weight, grad=values, factor=factor, along="all", keep=keep, rounding=rule)])
    return weight


def by_the_eager_back_end(values, **how):
    weight = torch.zeros(values.shape, dtype=torch.bfloat16)
    tile = (slice(0, values.shape[0]), slice(0, values.shape[1]))
    round_into(weight, values.clone(), Rounding(key=KEY, **how), tile=tile)
    return weight


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


PLACES = [
    pytest.param((3, 40), Place(base=0, stride=40), id="one contiguous range"),
    pytest.param((3, 40), Place(base=8, stride=64), id="rows apart, in whole counters"),
    pytest.param((3, 40), Place(base=6, stride=64), id="rows begin within a counter"),
    pytest.param((5, 7), Place(base=1, stride=13), id="odd everything"),
    pytest.param((2, 24), Place(base=(1 << 34) + 4, stride=24), id="beyond 2**32 elements"),
]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("shape", "place"), PLACES)
@pytest.mark.parametrize("step", [3.0, 1 << 33, 5])
def test_stochastic_rounding_takes_the_same_bits(shape, place, step):
    values, step = values_of(*shape), torch.tensor(step, dtype=torch.int32 if step == 5 else None)
    how = {"mode": "stochastic", "place": place, "step": step}
    assert same_bits(rounded(values, **how), by_the_eager_back_end(values, **how))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("mode", ["nearest", "kahan"])
def test_rounding_to_nearest_and_its_rest(mode):
    values = values_of(6, 24)
    how = {"mode": mode, "place": Place(base=0, stride=24), "step": torch.tensor(1.0)}
    rests = [torch.linspace(-1e-3, 1e-3, 144).view(6, 24).bfloat16() for _ in range(2)]
    got = rounded(values, **how, rest=rests[0])
    wanted = by_the_eager_back_end(values, **how, rest=rests[1])
    assert same_bits(got, wanted) and same_bits(*rests)
    assert mode == "nearest" or not torch.equal(got, values.bfloat16())


@pytest.mark.usefixtures("triton_interpreter")
def test_stochastic_rounding_keeps_the_mean():
    values = torch.full((64, 1024), 1.003)
    how = {"mode": "stochastic", "place": Place(base=0, stride=1024), "step": torch.tensor(9.0)}
    got = rounded(values, **how).float()
    assert got.unique().tolist() == [1.0, 1.0078125]
    assert abs(got.double().mean() - 1.003) < 4 * 0.0039 / 256  # four standard errors


@pytest.mark.usefixtures("triton_interpreter")
def test_a_table_holds_its_numbers():
    from hardy.ops.triton_launch import table_of

    numbers = [0, 1, 16, 1 << 31, (1 << 32) - 1, 1 << 47, 1 << 60, *range(300)]
    table = table_of(numbers, torch.device("cpu"))
    assert table.dtype == torch.int64 and table[: len(numbers)].tolist() == numbers


@pytest.mark.usefixtures("triton_interpreter")
def test_arguments_look_alike_to_the_compiler():
    from hardy.ops.triton_kernels import as_arguments

    arguments = as_arguments([0, 1, 8, 16, 1 << 31, 1 << 60])
    assert all(1 << 62 < number < 1 << 63 and number % 2 for number in arguments)


@pytest.mark.usefixtures("triton_interpreter")
def test_the_name_of_a_compiled_kernel_tells_the_order_of_the_table():
    from hardy.ops.triton_fold import Fold

    name = repr(Fold(add=False, gated=True, entries=8, parts=4))
    assert "'gated': True" in name and "'SOURCE': 2" in name
