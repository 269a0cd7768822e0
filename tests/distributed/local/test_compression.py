"""What each way of adding up pseudo-gradients promises, and what it loses."""

import math

import pytest
import torch

from hardy.distributed.comm import Alone
from hardy.distributed.local.compression import (
    BF16,
    Full,
    Int8,
    TopK,
    dequantize_int8,
    quantize_int8,
)
from hardy.distributed.simulation import SimWorld
from hardy.rng import generator_for

MAKERS = {
    "none": Full,
    "bf16": BF16,
    "int8": Int8,
    "int8-odd": lambda: Int8(block=7),
    "topk": TopK,
    "topk-all": lambda: TopK(density=1.0),
}
SIZES = [0, 1, 2, 7, 1000, 1023]


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def gauss(*purpose, n=1000):
    return torch.randn(n, generator=generator_for(0, *purpose))


def even(comm):
    return torch.tensor(1.0 / comm.size, dtype=torch.float64)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_all_replicas_get_the_same_fp32_bits_at_any_size(make, num_workers):
    def body(comm):
        part, sums = make(), []
        for unit, n in enumerate(SIZES):
            x_n = gauss("x", comm.rank, n=n)
            kept = x_n.clone()
            sums.append(part.weighted_sum(comm, x_n, even(comm), unit))
            assert torch.equal(x_n, kept) and sums[-1].dtype == torch.float32 and sums[-1].shape == (n,)
        return sums

    answers = SimWorld(num_workers).run(body)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (Full, 1e-6),
        (BF16, 0.0017 * 2**0.5),  # once on the way in, once on the way out
        (Int8, 0.0070 * 2**0.5),
        (lambda: TopK(density=1.0), 1e-6),
    ],
    ids=["none", "bf16", "int8", "topk-all"],
)
def test_the_weighted_sum_is_right_within_what_the_format_loses(make, error):
    weights = [0.1, 0.6, 0.3]

    def body(comm):
        weight = torch.tensor(weights[comm.rank], dtype=torch.float64)
        return make().weighted_sum(comm, gauss("x", comm.rank, n=100_000), weight, 0)

    want = sum(w * gauss("x", rank, n=100_000).double() for rank, w in enumerate(weights))
    lost = relative(SimWorld(3).run(body)[0], want)
    assert lost <= 1.05 * error
    assert lost >= 0.5 * error or error == 1e-6  # the bound is what it costs, not a distant one


def test_the_formats_alone_lose_what_is_documented():
    x = gauss("format", n=1_000_000)
    assert relative(x.bfloat16().float(), x) == pytest.approx(0.0017, rel=0.03)
    assert relative(dequantize_int8(*quantize_int8(x, block=256), block=256), x) == pytest.approx(
        0.0070, rel=0.02
    )


def test_a_block_keeps_its_largest_and_errs_by_half_a_step_of_its_own():
    x = gauss("blocks") * torch.logspace(-20, 20, 1000)
    values, scales = quantize_int8(x, block=100)
    got = dequantize_int8(values, scales, block=100)
    assert scales.shape == (10,) and int(values.abs().max()) == 127
    step = scales.repeat_interleave(100)
    assert bool(((got - x).abs() <= 0.5001 * step).all())
    largest = x.view(10, 100).abs().argmax(dim=1) + torch.arange(0, 1000, 100)
    torch.testing.assert_close(got[largest], x[largest], rtol=1e-6, atol=0)


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_value_that_is_not_finite_comes_back_as_nan_and_the_others_as_they_were(spoiled):
    x = torch.ones(8)
    x[2] = spoiled
    got = dequantize_int8(*quantize_int8(x, block=4), block=4)
    assert bool(got[:4].isnan().all()) and got[4:].tolist() == [1.0] * 4


def test_zeros_and_the_smallest_numbers_do_not_become_nan():
    x = torch.tensor([0.0, 0.0, 1e-45, -1e-45])
    assert bool(dequantize_int8(*quantize_int8(x, block=2), block=2).isfinite().all())


@pytest.mark.parametrize("value", [100.0, -127.0, 101.0])
def test_int8_sums_do_not_overflow_and_are_fp32(value):
    x = torch.full((9,), value)
    sums = SimWorld(5).run(lambda comm: Int8().weighted_sum(comm, x, torch.tensor(1.0), 0))
    torch.testing.assert_close(sums[0], 5 * x, rtol=1e-6, atol=0)  # 505 would not fit bf16


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_what_has_weight_zero_is_not_looked_at(make, spoiled, num_workers):
    def body(comm, value):
        left_out = comm.rank == comm.size - 1
        x = torch.full((10,), value) if left_out else gauss("x", comm.rank, n=10)
        weight = torch.tensor(0.0 if left_out else 0.5, dtype=torch.float64)
        part = make()
        first = part.weighted_sum(comm, x, weight, 0)
        part.commit()
        # What it kept for later is clean as well.
        return first, part.weighted_sum(comm, gauss("next", comm.rank, n=10), even(comm), 0)

    answers = SimWorld(num_workers).run(lambda comm: body(comm, spoiled))
    clean = SimWorld(num_workers).run(lambda comm: body(comm, 0.0))
    for got, want in zip(answers, clean, strict=True):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and bool(got[1].isfinite().all())


def test_nobody_with_weight_gives_zeros(make):
    sums = SimWorld(3).run(
        lambda comm: make().weighted_sum(comm, torch.full((5,), math.nan), torch.tensor(0.0), 0)
    )
    assert all(torch.equal(total, torch.zeros(5)) for total in sums)


@pytest.mark.parametrize("world", [lambda body: body(Alone()), lambda body: SimWorld(1).run(body)[0]])
def test_one_replica_alone_loses_nothing(make, world):
    x, part = gauss("alone"), make()
    total = world(lambda comm: part.weighted_sum(comm, x, torch.tensor(0.5), 0))
    part.commit()
    assert torch.equal(total, 0.5 * x)
    assert all(not bool(error.any()) for error in part.state_dict().values())


def test_a_replica_that_is_left_alone_applies_what_it_had_left_out():
    part = TopK(density=0.01, decay=1.0)
    x = gauss("x", n=100)

    def with_another(comm):
        mine = part if comm.rank == 0 else TopK(density=0.01)
        total = mine.weighted_sum(comm, x, torch.tensor(float(comm.rank == 0)), 0)
        mine.commit()
        return total

    first = SimWorld(2).run(with_another)[0]
    second = part.weighted_sum(Alone(), torch.zeros(100), torch.tensor(1.0), 0)
    assert int((first != 0).sum()) == 1 and torch.equal(first + second, x)


def test_narrow_inputs_are_added_up_in_fp32(make):
    x = gauss("narrow", n=64).bfloat16()
    total = SimWorld(2).run(lambda comm: make().weighted_sum(comm, x, torch.tensor(1.0), 0))[0]
    assert total.dtype == torch.float32


def test_the_formats_send_the_bytes_they_say():
    n, num_workers = 1 << 20, 4

    def sent(make):
        def body(comm):
            make().weighted_sum(comm, torch.ones(n), even(comm), 0)
            return comm.bytes_sent

        (count,) = set(SimWorld(num_workers).run(body))
        return count

    full = sent(Full)
    assert full == 2 * (num_workers - 1) * n * 4 // num_workers
    assert full / sent(BF16) == 2.0
    assert full / sent(Int8) == 4 / (1 + 4 / 256)
    assert sent(lambda: TopK(density=1 / 128)) == (num_workers - 1) * 8 * n // 128


# ---- Error feedback ----------------------------------------------------------------------------------------


def rounds_of_top_k(comm, part, *, rounds, n=200):
    total_n = torch.zeros(n)
    for index in range(rounds):
        total_n += part.weighted_sum(comm, gauss("x", comm.rank, index, n=n), torch.tensor(1.0), 3)
        part.commit()
    return total_n, part.state_dict()["3/error"]


def test_what_was_applied_and_what_was_left_out_are_what_came_in():
    answers = SimWorld(3).run(lambda comm: rounds_of_top_k(comm, TopK(density=0.05, decay=1.0), rounds=20))
    came_in = sum(gauss("x", rank, index, n=200).double() for rank in range(3) for index in range(20))
    left_out = sum(error for _, error in answers)
    torch.testing.assert_close(answers[0][0].double() + left_out, came_in, rtol=0, atol=1e-4)
    assert float(left_out.norm()) > 1.0  # else the law says nothing


def test_the_largest_are_sent_and_the_rest_decays():
    def body(comm):
        part = TopK(density=0.5, decay=0.5)
        first = part.weighted_sum(comm, torch.tensor([4.0, -3.0, 2.0, -1.0]), torch.tensor(0.5), 0)
        part.commit()
        second = part.weighted_sum(comm, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor(0.5), 0)
        part.commit()
        return first, second, part.state_dict()["0/error"]

    first, second, error = SimWorld(2).run(body)[0]
    assert first.tolist() == [4.0, -3.0, 0.0, 0.0]
    torch.testing.assert_close(second, torch.tensor([0.0, 0.2, 1.3, 0.0]))  # u = [0.1, 0.2, 1.3, -0.1]
    torch.testing.assert_close(error, torch.tensor([0.1, 0.0, 0.0, -0.1]))


@pytest.mark.parametrize(("n", "density", "kept"), [(1000, 0.01, 10), (1001, 0.01, 11), (5, 0.01, 1)])
def test_the_number_kept_is_rounded_up(n, density, kept):
    total = SimWorld(2).run(
        lambda c: TopK(density=density).weighted_sum(c, torch.ones(n), torch.tensor(0.5), 0)
    )[0]
    assert int((total != 0).sum()) <= 2 * kept and total.sum().item() == pytest.approx(kept)


def test_a_round_that_does_not_count_leaves_no_trace():
    def body(comm, fails):
        part = TopK(density=0.1)
        rounds_of_top_k(comm, part, rounds=2)
        if fails:
            for weight in (1.0, 0.0):  # also one that would clear what was left out
                part.weighted_sum(comm, gauss("lost", comm.rank, n=200), torch.tensor(weight), 3)
                part.rollback()
        return part.weighted_sum(comm, gauss("x", comm.rank, 9, n=200), torch.tensor(1.0), 3)

    with_failure = SimWorld(2).run(lambda comm: body(comm, True))
    assert torch.equal(with_failure[0], SimWorld(2).run(lambda comm: body(comm, False))[0])


def test_a_round_that_was_forgotten_is_not_committed_by_the_next():
    part, comm = TopK(density=0.1), Alone()
    part.weighted_sum(comm, torch.ones(4), torch.tensor(1.0), 0)
    part.rollback()
    part.commit()
    assert part.state_dict() == {}


def test_units_that_do_not_count_keep_what_they_had_left_out():
    def body(comm):
        part = TopK(density=0.1)
        for unit in (0, 1):
            part.weighted_sum(comm, gauss("x", comm.rank, unit, n=50), torch.tensor(1.0), unit)
        part.commit()
        before = part.state_dict()
        part.weighted_sum(comm, gauss("next", n=50), torch.tensor(1.0), 0)
        part.weighted_sum(comm, torch.full((50,), math.nan), torch.tensor(0.0), 1)  # as on every replica
        part.commit(units=[0])
        after = part.state_dict()
        part.commit()  # nothing is left over
        assert torch.equal(part.state_dict()["1/error"], after["1/error"])
        return [torch.equal(before[name], after[name]) for name in ("0/error", "1/error")]

    assert SimWorld(2).run(body) == [[False, True]] * 2


def test_a_round_done_again_before_the_commit_counts_once():
    def body(comm):
        part = TopK(density=0.1, decay=1.0)
        x = gauss("x", comm.rank, n=200)
        for _ in range(3):
            part.rollback()
            total = part.weighted_sum(comm, x, torch.tensor(1.0), 0)
        part.commit()
        return total, part.state_dict()["0/error"], x

    answers = SimWorld(2).run(body)
    torch.testing.assert_close(answers[0][0] + answers[0][1] + answers[1][1], answers[0][2] + answers[1][2])


def test_state_comes_back_bit_for_bit():
    def whole(comm):
        return rounds_of_top_k(comm, TopK(density=0.1), rounds=4)[1]

    def in_two_parts(comm):
        part = TopK(density=0.1)
        rounds_of_top_k(comm, part, rounds=2)
        state, part = part.state_dict(), TopK(density=0.1)
        part.load_state_dict(state)
        for index in (2, 3):
            part.weighted_sum(comm, gauss("x", comm.rank, index, n=200), torch.tensor(1.0), 3)
            part.commit()
        return part.state_dict()["3/error"]

    for a, b in zip(SimWorld(2).run(whole), SimWorld(2).run(in_two_parts), strict=True):
        assert torch.equal(a, b)


def test_those_without_state_say_so():
    for make in (Full, BF16, Int8):
        part = make()
        part.weighted_sum(Alone(), torch.ones(3), torch.tensor(1.0), 0)
        part.commit()
        part.rollback()
        assert part.state_dict() == {}
        part.load_state_dict({})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Int8(block=0), "strategy.compression.block must be at least 1, got 0"),
        (lambda: TopK(density=0.0), "strategy.compression.density must be above 0 and at most 1, got 0.0"),
        (lambda: TopK(density=1.5), "strategy.compression.density must be above 0 and at most 1, got 1.5"),
        (lambda: TopK(decay=-0.1), "strategy.compression.decay must be from 0 to 1, got -0.1"),
    ],
)
def test_impossible_settings_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
