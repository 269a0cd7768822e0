"""Which norms are left out: against numpy and the twin, the lock-in guard, what a resume keeps."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.distributed.local.anomaly import COUNTERS, Finite, ZTest
from hardy.reference.edit import Settings, Stats, anomalous, learn

INF, NAN = float("inf"), float("nan")


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fp64(values):
    return torch.tensor(values, dtype=torch.float64)


def hold_round(guards, norms_NU):
    """One committed round of as many replicas as there are guards; returns what they flagged."""
    flags_NU = torch.stack([guard.flags(row) for guard, row in zip(guards, norms_NU, strict=True)])
    for guard, row in zip(guards, norms_NU, strict=True):
        guard.observe(row, flags_NU, norms_NU)
    return flags_NU


def settled(num_replicas, *, rounds=30, num_units=1, **numbers):
    """Guards that have seen norms of about 1."""
    guards = [ZTest(num_units=num_units, **numbers) for _ in range(num_replicas)]
    for step in range(rounds):
        assert not hold_round(guards, 1 + 0.01 * draw(num_replicas, num_units, seed=step)).any()
    return guards


def counts(guard):
    return [guard.counters()[name].item() for name in COUNTERS]


@given(norms=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_until_one_over_alpha_the_statistics_are_numpys(norms):
    guard = ZTest(num_units=1, alpha=0.02, delta=INF)
    for norm in norms:
        hold_round([guard], fp64([[norm]]))
    state, scale = guard.state_dict(), max(norms)
    assert state["mean"].item() == pytest.approx(np.mean(norms), rel=1e-12)
    assert state["variance"].item() == pytest.approx(np.var(norms), rel=1e-9, abs=1e-12 * scale**2)
    assert state["accepted"].item() == len(norms)


def test_after_one_over_alpha_the_average_is_exponential():
    guard, norms = ZTest(num_units=1, alpha=0.25, delta=INF), 1 + draw(40, seed=3).abs()
    for norm in norms:
        hold_round([guard], norm.view(1, 1))
    weight = np.array([0.25 * 0.75**age for age in range(36)][::-1])
    # The first four count as their mean.
    mean = 0.75**36 * norms[:4].mean().item() + weight @ norms[4:].numpy()
    assert guard.state_dict()["mean"].item() == pytest.approx(mean, rel=1e-12)


NORMS = st.one_of(st.floats(0.5, 2.0), st.floats(0, 1e4), st.sampled_from([NAN, INF, 0.0]))


@given(
    norms=st.lists(st.tuples(NORMS, NORMS), max_size=40), delta=st.floats(0.5, 5), warmup=st.integers(1, 8)
)
def test_flags_and_statistics_are_the_twins(norms, delta, warmup):
    # Of three replicas only this one flags, so the lock-in guard stays out of it.
    guard = ZTest(num_units=2, delta=delta, alpha=0.1, warmup_rounds=warmup)
    letters = Settings(delta=delta, alpha=0.1, W_det=warmup)
    stats = [Stats(), Stats()]
    for pair in norms:
        norms_U = fp64(pair)
        bad = [anomalous(G, s, letters) for G, s in zip(pair, stats, strict=True)]
        assert guard.flags(norms_U).tolist() == bad
        others_2U = torch.ones(2, 2, dtype=torch.float64)
        flags_NU = torch.cat([guard.flags(norms_U).unsqueeze(0), torch.zeros(2, 2, dtype=torch.bool)])
        guard.observe(norms_U, flags_NU, torch.cat([norms_U.unsqueeze(0), others_2U]))
        stats = [s if b else learn(G, s, letters) for G, s, b in zip(pair, stats, bad, strict=True)]
    state = guard.state_dict()
    assert state["mean"].tolist() == pytest.approx([s.mu for s in stats], rel=1e-12)
    assert state["variance"].tolist() == pytest.approx([s.v for s in stats], rel=1e-9, abs=1e-15)
    assert state["accepted"].tolist() == [s.c for s in stats]


def test_a_small_norm_is_never_an_anomaly_and_nothing_is_before_the_warm_up():
    (guard,) = settled(1, rounds=5, warmup_rounds=6)
    assert guard.flags(fp64([1e9])).tolist() == [False]
    hold_round([guard], fp64([[1.0]]))
    assert guard.flags(fp64([1e9])).tolist() == [True]
    assert guard.flags(fp64([0.0])).tolist() == [False]
    assert guard.flags(fp64([NAN])).tolist() == [True]


def test_norms_that_never_varied_may_vary_by_the_floor():
    guard = ZTest(num_units=1, warmup_rounds=3, delta=3.0, relative_floor=0.05)
    for _ in range(10):
        hold_round([guard], fp64([[2.0]]))
    assert [guard.flags(fp64([norm])).item() for norm in (2.0, 2.29, 2.31)] == [False, False, True]


def test_a_bad_replica_is_left_out_in_that_round_and_back_in_the_next():
    for bad in (NAN, INF, 30.0):
        guards = settled(2)
        assert hold_round(guards, fp64([[1.0], [bad]])).flatten().tolist() == [False, True]
        assert hold_round(guards, fp64([[1.0], [1.0]])).flatten().tolist() == [False, False]
        assert counts(guards[1]) == [1, int(bad != 30.0), 0]
        assert counts(guards[0]) == [0, 0, 0]


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4, 5, 8])
def test_a_lasting_jump_is_accepted_after_exactly_three_rounds(num_replicas):
    guards = settled(num_replicas, num_units=2)
    flagged = [
        hold_round(guards, fp64([[8.0 + 0.01 * i, 1.0] for i in range(num_replicas)])).tolist()
        for _ in range(30)
    ]
    assert flagged == [[[True, False]] * num_replicas] * 3 + [[[False, False]] * num_replicas] * 27
    assert all(counts(guard) == [3, 0, 1] for guard in guards)
    for i, guard in enumerate(guards):
        state = guard.state_dict()
        # The third norm of the new level was the first to count.
        assert state["accepted"].tolist() == [28, 60]
        assert state["mean"][0].item() == pytest.approx(8.0 + 0.01 * i, abs=1e-9)
        assert guard.flags(fp64([16.0, 1.0])).tolist() == [True, False]


@pytest.mark.parametrize("num_replicas", [2, 3, 4, 8])
@pytest.mark.parametrize("bad", [8.0, NAN, INF])
def test_a_single_bad_replica_stays_out_for_ever(num_replicas, bad):
    guards = settled(num_replicas)
    for _ in range(20):
        flags_NU = hold_round(guards, fp64([[bad]] + [[1.0]] * (num_replicas - 1)))
        assert flags_NU.flatten().tolist() == [True] + [False] * (num_replicas - 1)
    assert counts(guards[0]) == [20, 0 if bad == 8.0 else 20, 0]


def test_half_of_the_replicas_move_the_level_for_all_and_fewer_do_not():
    guards = settled(6)
    for _ in range(5):
        assert hold_round(guards, fp64([[8.0]] * 2 + [[1.0]] * 4)).sum() == 2
    for wanted in (3, 3, 3, 0, 0):
        assert hold_round(guards, fp64([[8.0]] * 3 + [[1.0]] * 3)).sum() == wanted
    # Those that had not jumped began anew as well.
    assert [guard.state_dict()["accepted"].item() for guard in guards] == [3] * 6


def test_rounds_must_follow_each_other_and_norms_that_are_not_finite_do_not_count():
    guards = settled(2)
    for jumps in (1, 1, 0, 1, 1, 0):
        assert hold_round(guards, fp64([[1 + 7.0 * jumps]] * 2)).sum() == 2 * jumps
    for _ in range(9):
        assert hold_round(guards, fp64([[NAN], [INF]])).all()
    assert all(counts(guard) == [13, 9, 0] for guard in guards)


def test_after_a_new_start_the_next_jump_takes_three_rounds_again():
    guards = settled(3, warmup_rounds=1)
    flagged = [hold_round(guards, fp64([[norm]] * 3)).all().item() for norm in [8.0] * 3 + [80.0] * 4]
    assert flagged == [True] * 6 + [False]


def test_asking_changes_nothing():
    (guard,) = settled(1)
    before = guard.state_dict()
    for norm in (1.0, 9.0, NAN):
        guard.flags(fp64([norm]))
    assert all(torch.equal(value, before[key]) for key, value in guard.state_dict().items())


@pytest.mark.parametrize(
    "make", [Finite, lambda: ZTest(num_units=2, warmup_rounds=3)], ids=["finite", "ztest"]
)
def test_a_resume_changes_no_bit(make):
    norms = [1 + 0.3 * draw(2, 2, seed=step) for step in range(30)]
    norms[9] = norms[9] * fp64([[1.0, 9.0], [NAN, 1.0]])
    norms[14:17] = [row * 40 for row in norms[14:17]]
    whole = [make(), make()]
    wanted = [hold_round(whole, row) for row in norms]
    halves = [make(), make()]
    got = [hold_round(halves, row) for row in norms[:16]]
    handed_out = [guard.state_dict() for guard in halves]
    states = copy.deepcopy(handed_out)
    for value in (value for state in handed_out for value in state.values()):
        value.zero_()  # a state must be a copy
    for guard, state in zip(halves, states, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in guard.state_dict().items())
    halves = [make(), make()]
    for guard, state in zip(halves, states, strict=True):
        assert all(value.dtype in (torch.float64, torch.int64) for value in state.values())
        guard.load_state_dict(state)
    got += [hold_round(halves, row) for row in norms[16:]]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert [counts(guard) for guard in halves] == [counts(guard) for guard in whole]
    assert any(counts(guard)[0] > 0 for guard in whole)


@pytest.mark.parametrize("make", [Finite, lambda: ZTest(num_units=2)], ids=["finite", "ztest"])
def test_nothing_waits_for_the_device(make):
    # Tensors without values raise where a value is asked for.
    guard, norms_U = make(), torch.empty(2, dtype=torch.float64, device="meta")
    flags_U = guard.flags(norms_U)
    guard.observe(norms_U, flags_U.expand(3, 2), norms_U.expand(3, 2))
    assert flags_U.device.type == guard.counters()["flagged"].device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        bool(flags_U.any())


def test_finite_leaves_out_what_is_not():
    guard = Finite()
    assert hold_round([guard], fp64([[0.0, 1e300, NAN, INF]])).tolist() == [[False, False, True, True]]
    assert counts(guard) == [2, 2, 0]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"delta": 0.0}, "delta=0.0 spreads must be above 0"),
        ({"alpha": 0.0}, r"alpha=0.0, .*must be in \(0, 1\]"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"warmup_rounds": 0}, "warmup_rounds=0 must be at least 1"),
        ({"relative_floor": -0.1}, "relative_floor=-0.1 of the mean norm"),
    ],
)
def test_impossible_numbers_are_refused(numbers, text):
    with pytest.raises(ConfigError, match=text):
        ZTest(num_units=1, **numbers)


def test_statistics_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="of 2 units, the model has 3; go on with the same units"):
        ZTest(num_units=3).load_state_dict(ZTest(num_units=2).state_dict())


def test_norms_of_other_units_are_refused():
    with pytest.raises(
        ValueError, match=r"norms of shape \[4\] for statistics of 1 units; each set of units"
    ):
        ZTest(num_units=1).flags(torch.ones(4))
