"""Attacks of a worker's own gradient, by hand."""

import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.attacks_blind import (
    BitFlip,
    Drift,
    Gaussian,
    Huge,
    Inf,
    Nan,
    OneNan,
    Replay,
    SignFlip,
    Stale,
    Zero,
)

OWN = torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0]])


def played(attack, rows=OWN, *, attackers=(1,), **named):
    rows = rows.clone()
    attack([rows], attackers=attackers, **named)
    return rows


@pytest.mark.parametrize(
    ("attack", "row"),
    [
        (Zero(), [0.0, 0.0]),
        (Inf(), [torch.inf, torch.inf]),
        (Huge(), [pytest.approx(1e20)] * 2),
        (Huge(value=-3.0), [-3.0, -3.0]),
        (SignFlip(), [-3.0, 4.0]),
    ],
    ids=repr,
)
def test_the_row_by_hand(attack, row):
    assert played(attack)[1].tolist() == row


def test_not_a_number_everywhere_or_in_one_place():
    assert played(Nan())[1].isnan().tolist() == [True, True]
    one = played(OneNan(), attackers=(0, 1))
    assert one.isnan().tolist() == [[True, False], [True, False], [False, False]]
    assert one[1, 1] == -4
    later = played(OneNan(), first_columns=[2])
    assert torch.equal(later, OWN), "another worker holds column 0"


def test_each_flips_its_own():
    assert played(SignFlip(), attackers=(0, 2)).tolist() == [[-1, -2], [3, -4], [-5, -6]]


def test_noise_has_the_deviation_that_is_asked_for():
    rows = played(Gaussian(sd=3.0), torch.zeros(3, 20_000), attackers=(0, 1))
    assert rows.std(1).tolist() == [pytest.approx(3, rel=0.03), pytest.approx(3, rel=0.03), 0]
    assert rows[:2].mean(1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 8), (torch.bfloat16, 8), (torch.float16, 5), (torch.float64, 11)]
)
def test_a_share_of_the_numbers_loses_one_bit_of_the_exponent(dtype, bits):
    own = torch.full((2, 20_000), -1.5, dtype=dtype)
    rows = played(BitFlip(share=0.1), own)
    hit = rows[1] != own[1]
    assert hit.double().mean().item() == pytest.approx(0.1, abs=0.01)
    # One exponent bit turned over multiplies by a power of two, or makes infinity or NaN of the highest.
    fraction, _ = torch.frexp(rows[1][hit].double())
    ratios = rows[1][hit].double() / -1.5
    kept = fraction.isfinite()
    assert (fraction[kept] == -0.75).all()
    bias = 2 ** (bits - 1) - 1
    down = {2.0 ** -(2**place) for place in range(bits) if bias >> place & 1}
    allowed = down | {torch.tensor(2.0, dtype=torch.float64).pow(bias + 1).item()}
    assert {abs(ratio) for ratio in ratios[kept].tolist()} <= allowed
    assert len(set(ratios[kept].tolist())) >= bits - 1
    assert torch.equal(rows[0], own[0])


def test_bits_of_an_unknown_dtype_are_refused():
    with pytest.raises(
        ConfigError, match="bit_flip knows .*torch.float32.*, but the gradient is torch.float8"
    ):
        played(BitFlip(), OWN.to(torch.float8_e5m2))


def test_the_bias_of_drift_grows_with_the_steps_and_points_one_way():
    rows = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 10.0], [9.0, 9.0, 9.0, 9.0]])
    bias = [played(Drift(growth=0.02), rows, attackers=(0, 1), step=step) - rows for step in range(3)]
    for step, found in enumerate(bias):
        # growth x steps x length / sqrt(D), in every column
        assert found[0].abs().tolist() == pytest.approx([0.02 * (step + 1) * 5 / 2] * 4)
        assert found[1].abs().tolist() == pytest.approx([0.02 * (step + 1) * 10 / 2] * 4, rel=1e-5)
        assert found[2].tolist() == [0] * 4
        assert torch.equal(found[0].sign(), bias[0][1].sign())
    wide = played(Drift(), torch.ones(1, 1000), attackers=(0,)) - 1
    assert 0.4 < (wide > 0).double().mean() < 0.6


def test_stale_sends_what_was_k_steps_ago_and_replay_the_first():
    stale, replay = Stale(steps=2), Replay()
    sent, repeated = [], []
    for step in range(6):
        rows = torch.tensor([[0.0], [10.0 + step], [20.0 + step]])
        sent.append(played(stale, rows, attackers=(1, 2)).flatten().tolist())
        repeated.append(played(replay, rows, attackers=(2,)).flatten().tolist())
    assert [row[1] for row in sent] == [10, 10, 10, 11, 12, 13]
    assert [row[2] for row in sent] == [20, 20, 20, 21, 22, 23]
    assert repeated == [[0, 10 + step, 20] for step in range(6)]


def test_stale_knows_each_worker_by_its_row():
    stale = Stale(steps=1)
    for step in range(3):
        played(stale, torch.tensor([[float(step)], [10.0 + step]]), attackers=(0,))
    rows = played(stale, torch.tensor([[3.0], [13.0]]), attackers=(0, 1))
    assert rows.flatten().tolist() == [2, 13]


def test_stale_keeps_no_more_than_it_needs_and_restores_rows_above_nine():
    stale, again = Stale(steps=3), Stale(steps=3)
    for step in range(20):
        rows = torch.full((12, 2), float(step))
        stale([rows[:, :1], rows[:, 1:]], attackers=[2, 10])
    state = stale.state_dict()
    assert sorted(state) == sorted(f"{row}/{age}/{b}" for row in (2, 10) for age in range(3) for b in (0, 1))
    again.load_state_dict(state)
    rows = torch.full((12, 2), 20.0)
    again([rows[:, :1], rows[:, 1:]], attackers=[2, 10])
    assert rows[[2, 10]].tolist() == [[17.0] * 2] * 2
