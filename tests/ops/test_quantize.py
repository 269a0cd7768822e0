"""Matrices in int8: no value is off by a whole step, the mean is kept, and what must not move does not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.ops import quantize as module
from hardy.ops.philox import key_for
from hardy.ops.quantize import Int8Matrix, dequantize, quantize, requantize_step, whole
from hardy.ops.updates import Place, Rounding

FP32 = torch.float32
KEY = key_for(0, "layers.0.proj.weight", purpose="hardy.q8.v1")
EPS = torch.finfo(FP32).eps
ONE = torch.ones(1)


def rounding(mode, shape, *, step=1, key=KEY, base=0):
    return Rounding(
        mode=mode, key=key, step=torch.tensor(float(step)), place=Place(base=base, stride=shape[1])
    )


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_weight(x, matrix):
    """Return a value of each group for each of its weights."""
    return x.repeat_interleave(matrix.group, dim=1)[:, : matrix.q.shape[1]]


def off_by(values, matrix):
    """Return by how many steps each weight is off."""
    return (dequantize(matrix, dtype=torch.float64) - values.double()) / per_weight(
        matrix.scale, matrix
    ).double()


def steps_from_zero(matrix):
    """Return codes without their zero points, which may move by one and take the codes along."""
    return matrix.q.int() - per_weight(matrix.zero_point, matrix).int()


def same(a, b):
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("q", "scale", "zero_point"))


def copy(matrix):
    fields = {key: getattr(matrix, key).clone() for key in ("q", "scale", "zero_point")}
    return Int8Matrix(**fields, group=matrix.group)


def move(matrix, grad, *, factor=1.0, keep=1.0, mode="stochastic", step=1):
    """Take a step with one factor for all."""
    factor, keep = torch.tensor([factor]), torch.tensor([keep])
    how = rounding(mode, matrix.q.shape, step=step)
    requantize_step(matrix, grad, factor=factor, along="all", keep=keep, rounding=how)


# ---- Values and codes --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 70),
    group=st.sampled_from([1, 7, 16, 128]),
    power=st.integers(-30, 37),
    shift=st.sampled_from([-3.0, 0.0, 0.5, 20.0]),
    seed=st.integers(0, 9),
)
def test_no_value_is_off_by_a_whole_step(rows, cols, group, power, shift, seed):
    values = (draw(rows, cols, seed=seed) + shift) * 10.0**power
    values[0, cols // 2] = 0.0
    for mode, most in (("nearest", 0.5), ("stochastic", 1.0)):
        matrix = quantize(values, group=group, rounding=rounding(mode, (rows, cols)))
        # A code is found in fp32, where w / s is at most 255 and so off by up to 255 eps.
        assert off_by(values, matrix).abs().max() < most + 255 * EPS
        assert dequantize(matrix, dtype=FP32)[0, cols // 2] == 0
        assert matrix.scale.shape == matrix.zero_point.shape == (rows, math.ceil(cols / group))


def test_groups_end_with_their_row_and_the_last_may_be_short():
    values = draw(3, 300) * torch.tensor([1.0] * 256 + [100.0] * 44)
    matrix = quantize(values, group=128)
    for first in (0, 128, 256):
        alone = quantize(values[:, first : first + 128], group=128)
        assert torch.equal(alone.q, matrix.q[:, first : first + 128])
        assert torch.equal(alone.scale[:, 0], matrix.scale[:, first // 128])
    assert (matrix.scale[:, 2] > 20 * matrix.scale[:, :2].amax(1)).all()


def test_a_group_of_zeros_stays_zero():
    matrix = quantize(torch.zeros(2, 128), group=128)
    assert (matrix.scale == 1).all() and not matrix.q.any() and not matrix.zero_point.any()
    before = copy(matrix)
    for step in range(3):
        move(matrix, torch.zeros(2, 128), keep=0.9, step=step)
    assert same(matrix, before)


@pytest.mark.parametrize(("sign", "zero_point"), [(1, 0), (-1, 254)])
def test_a_one_sided_group_comes_back_where_it_was(sign, zero_point):
    # A range that does not hold 0 and a zero point clamped to a byte bring these back near 0.1.
    values = sign * torch.linspace(0.9, 1.0, 128).view(1, 128)
    matrix = quantize(values, group=128)
    assert dequantize(matrix, dtype=FP32).mean().item() == pytest.approx(sign * 0.95, abs=5e-4)
    assert matrix.zero_point.item() == zero_point


def test_a_range_beyond_the_largest_number_has_a_finite_scale():
    values = torch.tensor([[1.0, -1.0, 0.3]]) * (0.9 * torch.finfo(FP32).max)
    matrix = quantize(values, group=3)
    assert matrix.scale.isfinite().all() and off_by(values, matrix).abs().max() < 0.5 + 255 * EPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_computed_in_fp32_and_rounded_once(dtype):
    matrix = quantize(draw(5, 40), group=16)
    assert torch.equal(dequantize(matrix, dtype=dtype), dequantize(matrix, dtype=FP32).to(dtype))
    assert same(quantize(draw(5, 40).to(dtype), group=16), quantize(draw(5, 40).to(dtype).float(), group=16))


def test_what_is_quantized_is_not_touched():
    values = draw(4, 20)
    quantize(values, group=16)
    assert torch.equal(values, draw(4, 20))


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_tiles_change_no_bit(mode, monkeypatch):
    shape = (9, 100)
    values, grad = draw(*shape), draw(*shape, seed=1)

    def run():
        matrix = quantize(values, group=16, rounding=rounding(mode, shape))
        for along, size in (("rows", 9), ("cols", 100), ("all", 1)):
            factor, how = 0.1 * draw(size, seed=2), rounding(mode, shape, step=2)
            requantize_step(matrix, grad, factor=factor, along=along, keep=0.9 * ONE, rounding=how)
        return matrix, dequantize(matrix, dtype=FP32)

    usual, dense = run()
    for most in (8, 40, 200):
        monkeypatch.setitem(module._TILE_ELEMENTS, "cpu", most)
        again, dense_again = run()
        assert same(usual, again) and torch.equal(dense, dense_again)


# ---- Rounding ----------------------------------------------------------------------------------------------


def test_the_mean_over_draws_is_the_value_also_at_the_ends_of_a_group():
    draws = 6000
    values = draw(1, 128).expand(draws, 128)  # a row is a draw: its random bits are its own
    matrix = quantize(values, group=128, rounding=rounding("stochastic", (draws, 128)))
    mean = off_by(values, matrix).mean(0)
    # A fraction f goes up with probability f: deviation at most 1/2. 128 means, each within 4.5 deviations.
    assert mean.abs().max() < 4.5 * 0.5 / math.sqrt(draws)
    assert off_by(values, quantize(values, group=128)).mean(0).abs().max() > 0.3  # to nearest they are not


def test_stochastic_bits_follow_key_step_and_place():
    values = draw(6, 40)

    def codes(rows=slice(0, 6), **how):
        base = how.pop("base", 0)
        return quantize(values[rows], group=16, rounding=rounding("stochastic", (6, 40), base=base, **how)).q

    assert torch.equal(codes(), codes())
    assert not torch.equal(codes(), codes(step=2)) and not torch.equal(codes(), codes(key=KEY + 1))
    assert torch.equal(codes()[2:5], codes(slice(2, 5), base=80)), (
        "a part of the rows has the bits of the whole"
    )
    assert not torch.equal(codes()[2:5], codes(slice(2, 5)))


def usual_form(values, uniform):
    """Return values after the form that divides by 255, rounds the zero point and clamps codes."""
    high, low = values.amax(1, keepdim=True).clamp(min=0), values.amin(1, keepdim=True).clamp(max=0)
    scale = (high - low) / 255
    zero_point = (-low / scale).round()
    return ((values / scale + zero_point + uniform).floor().clamp(0, 255) - zero_point) * scale


def test_a_thousand_small_steps_add_up_and_groups_do_not_shrink():
    """Each update is 2 % of a step: all are lost to nearest, and kept in the mean when rounded at random."""
    start = quantize(0.02 * draw(96, 128), group=128)
    update = 0.02 * start.scale.expand(-1, 128)
    stochastic, lost = copy(start), copy(start)
    usual, generator = dequantize(start, dtype=FP32), torch.Generator().manual_seed(1)
    for step in range(1, 1001):
        move(stochastic, update, step=step)
        move(lost, update, mode="nearest", step=step)
        usual = usual_form(usual - update, torch.rand(usual.shape, generator=generator))
    first = dequantize(start, dtype=torch.float64)
    walked = (dequantize(stochastic, dtype=torch.float64) - first) / start.scale
    assert torch.equal(steps_from_zero(lost), steps_from_zero(start)), "to nearest"
    torch.testing.assert_close(lost.scale, start.scale, rtol=1000 * EPS, atol=0)
    # 20 steps down. A weight's own walk has a deviation near 5, so the mean of 12,288 one of 0.05.
    assert walked.mean().item() == pytest.approx(-20, abs=0.25)
    far = first.abs().argmax(1, keepdim=True)
    inward = -walked.gather(1, far) * first.gather(1, far).sign() - 20 * first.gather(1, far).sign()
    assert abs(inward.mean().item()) < 2.5, "the farthest weight of a group: mean of 96, deviation 0.5"
    ranges = [
        (x.amax(1) - x.amin(1)).mean().item() for x in (first, dequantize(stochastic, dtype=FP32), usual)
    ]
    assert ranges[1] / ranges[0] == pytest.approx(1, abs=0.03)
    assert ranges[2] / ranges[0] < 0.92, "what the module says of the usual form"


# ---- The step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
@pytest.mark.parametrize("grad_dtype", [FP32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("along", ["rows", "cols", "all"])
def test_a_step_is_dequantize_move_quantize(along, grad_dtype, mode):
    shape = (7, 300)
    matrix, grad = quantize(draw(*shape), group=128), draw(*shape, seed=1).to(grad_dtype)
    factor = 0.1 * draw({"rows": 7, "cols": 300, "all": 1}[along], seed=2)
    spread = {"rows": factor.view(-1, 1), "cols": factor.view(1, -1), "all": factor}[along]
    how = rounding(mode, shape, step=5)
    wanted = quantize(dequantize(matrix, dtype=FP32) * 0.75 - grad.float() * spread, group=128, rounding=how)
    requantize_step(matrix, grad, factor=factor, along=along, keep=0.75 * ONE, rounding=how)
    assert same(matrix, wanted)
    assert torch.equal(grad, draw(*shape, seed=1).to(grad_dtype)), "gradients are only read"


def test_where_nothing_moves_no_bit_changes():
    matrix = quantize(draw(4, 300), group=128, rounding=rounding("stochastic", (4, 300)))
    before = copy(matrix)
    move(matrix, torch.full((4, 300), math.nan), factor=0.0)
    assert same(matrix, before), "a factor of 0 looks at no gradient"
    move(matrix, torch.zeros(4, 300), factor=1.0)
    assert same(matrix, before)
    grad, factor = torch.full((4, 300), math.nan), torch.tensor([0.0, 0.0, 0.5, 0.0])
    grad[2] = 0.0
    grad[2, 128:256] = draw(128, seed=1)  # the second group of its row
    how = rounding("stochastic", (4, 300), step=2)
    requantize_step(matrix, grad, factor=factor, along="rows", keep=ONE, rounding=how)
    changed = (matrix.scale != before.scale) | (matrix.zero_point != before.zero_point)
    assert changed.nonzero().tolist() == [[2, 1]]
    untouched = torch.ones(4, 300, dtype=torch.bool)
    untouched[2, 128:256] = False
    assert torch.equal(matrix.q[untouched], before.q[untouched])


def test_a_weight_that_is_no_longer_finite_shows():
    matrix = quantize(draw(1, 8), group=8)
    move(matrix, torch.full((1, 8), 3e38), factor=10.0)
    assert not dequantize(matrix, dtype=FP32).isfinite().any()


def test_no_value_is_read():
    # Tensors on "meta" have no values, so reading one raises.
    matrix = quantize(torch.empty(64, 300, device="meta"), group=128)
    factor = keep = torch.empty(1, device="meta")
    how = Rounding(
        mode="stochastic", key=KEY, step=torch.empty((), device="meta"), place=whole(matrix.q.shape)
    )
    grad = torch.empty(64, 300, device="meta")
    requantize_step(matrix, grad, factor=factor, along="all", keep=keep, rounding=how)
    assert dequantize(matrix, dtype=torch.bfloat16).shape == (64, 300)


@pytest.mark.parametrize(
    ("values", "group", "text"),
    [
        (torch.zeros(3), 128, r"only matrices are quantized, got shape \(3,\); view it as a matrix"),
        (torch.zeros(3, 2), 0, "group must be at least 1 column, got 0; 128 is usual"),
    ],
)
def test_errors_say_what_to_do(values, group, text):
    with pytest.raises(ValueError, match=text):
        quantize(values, group=group)
