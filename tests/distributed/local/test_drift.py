"""Measures of drift against numpy and by hand, and the warning that names its remedies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.distributed.local.drift import Drift, Watch, cosine_to_mean, drift, effective_contributors
from hardy.reference import local_gd

NAN = float("nan")


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(measured):
    return [getattr(measured, name).item() for name in Drift.__dataclass_fields__]


@settings(max_examples=50)
@given(count=st.integers(2, 6), size=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_the_measures_are_numpys(count, size, seed):
    D_Nn, p_N = draw(count, size, seed=seed) + 0.5, draw(count, seed=seed + 1).abs() + 0.01
    p_N = p_N / p_N.sum()
    D, p = D_Nn.numpy(), p_N.numpy()
    avg = p @ D

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    norms = [np.linalg.norm(d) for d in D]
    wanted = [
        np.mean([cosine(d, avg) for d in D]),
        min(cosine(D[i], D[j]) for i in range(count) for j in range(i)),
        sum(p[i] * np.linalg.norm(D[i] - avg) ** 2 for i in range(count)) / np.linalg.norm(avg) ** 2,
        max(norms) / min(norms),
    ]
    assert numbers(drift(D_Nn, p_N)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("count", [2, 5])
def test_the_measures_are_the_twins(count):
    v_Nn, w_n = draw(count, 9, seed=2), draw(9, seed=3)
    p_N = torch.full((count,), 1 / count, dtype=torch.float64)
    twin = local_gd.drift(v_Nn, w_n, p_N)
    ours = drift(w_n - v_Nn, p_N)
    for name in Drift.__dataclass_fields__:
        assert getattr(ours, name).item() == pytest.approx(getattr(twin, name), rel=1e-9)


def test_the_device_is_waited_for_at_the_tenth_round_only():
    # Tensors without values raise where a value is asked for.
    w_NU = torch.empty(3, 2, device="meta")
    assert drift(w_NU.T, w_NU[:2, 0]).min_cosine.device.type == "meta"
    watch = Watch(num_units=2)
    for _ in range(9):
        watch.record(w_NU, w_NU > 0, w_NU[0] > 0)
    with pytest.raises(NotImplementedError, match="meta"):
        watch.record(w_NU, w_NU > 0, w_NU[0] > 0)


def test_equal_pseudo_gradients_do_not_drift():
    assert numbers(drift(torch.ones(3, 4), torch.full((3,), 1 / 3))) == pytest.approx([1, 1, 0, 1], abs=1e-12)


def test_opposite_ones_cancel():
    measured = drift(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.tensor([0.5, 0.5]))
    assert numbers(measured) == pytest.approx([0, -1, math.inf, 1])


def test_a_replica_of_weight_zero_is_not_looked_at():
    D_Nn, p_N = draw(3, 5, seed=0), torch.tensor([0.25, 0.75, 0.0])
    wanted = numbers(drift(D_Nn[:2], p_N[:2]))
    for bad in (NAN, math.inf, 1e9):
        D_Nn[2] = bad
        assert numbers(drift(D_Nn, p_N)) == pytest.approx(wanted, rel=1e-12)


def test_nothing_moved_or_one_alone_or_none_gives_numbers():
    assert numbers(drift(torch.zeros(2, 3), torch.tensor([0.5, 0.5]))) == [0, 0, 0, 1]
    assert numbers(drift(torch.tensor([[3.0, 4.0]]), torch.ones(1))) == pytest.approx([1, 1, 0, 1])
    assert numbers(drift(torch.full((2, 3), NAN), torch.zeros(2))) == [0, 1, 0, 1]
    one_still = drift(torch.tensor([[0.0], [1.0]]), torch.tensor([0.5, 0.5]))
    assert numbers(one_still) == pytest.approx([0.5, 0, 1, math.inf])


def test_inner_products_add_up_over_units_and_workers():
    D_Nn, p_N = draw(4, 30, seed=1), torch.full((4,), 0.25, dtype=torch.float64)
    avg_n = p_N @ D_Nn
    parts = [(D_Nn[:, a:b], avg_n[a:b]) for a, b in ((0, 7), (7, 8), (8, 30))]
    dot_N = sum(D @ avg for D, avg in parts)
    squares_N, square = sum(D.square().sum(1) for D, _ in parts), sum(avg.square().sum() for _, avg in parts)
    cosine_N = cosine_to_mean(dot_N, squares_N.sqrt(), square.sqrt())
    wanted_N = torch.nn.functional.cosine_similarity(D_Nn, avg_n.expand(4, 30), dim=1)
    torch.testing.assert_close(cosine_N, wanted_N, rtol=1e-12, atol=0)
    assert drift(D_Nn, p_N).mean_cosine.item() == pytest.approx(cosine_N.mean().item(), rel=1e-12)


def test_effective_contributors_fall_as_norms_spread_at_temperature_one():
    # The softmax of norms with these standard deviations, 8 replicas; the mean over many draws.
    for spread, wanted in ((0.1, 7.9), (0.5, 6.6), (1, 4.7), (2, 2.8), (5, 1.6)):
        w_NU = torch.softmax(-spread * draw(8, 4000, seed=0), 0)
        assert effective_contributors(w_NU).mean().item() == pytest.approx(wanted, abs=0.1)
    assert effective_contributors(torch.zeros(3, 1)).item() == 0


def record(watch, rows, *, ok=None, clipped=(False, False)):
    w_NU = torch.tensor(rows, dtype=torch.float64)
    ok_NU = torch.ones_like(w_NU, dtype=torch.bool) if ok is None else torch.tensor(ok)
    return watch.record(w_NU, ok_NU, torch.tensor(clipped))


EVEN, ONE = [[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.95], [0.5, 0.05]]


def test_a_watch_warns_after_ten_rounds_when_one_replica_counts_alone():
    watch = Watch(num_units=2)
    said = [record(watch, ONE) for _ in range(20)]
    assert [text is not None for text in said] == ([False] * 9 + [True]) * 2
    assert "the averages of 1 of 2 units rest on fewer than 1.5 replicas (unit 1: 1.10)" in said[9]
    assert "strategy.relative_temperature=true" in said[9] and "clip" not in said[9]


def test_a_watch_warns_when_most_rounds_are_clipped():
    watch = Watch(num_units=2)
    said = [record(watch, EVEN, clipped=(r < 6, r < 5)) for r in range(10)]
    assert said[:9] == [None] * 9
    assert said[9] == (
        "over the last 10 rounds, 1 of 2 units are clipped in more than 50% of the rounds (unit 0: 60%): "
        "raise strategy.clip_norm, or set it to none"
    )


def test_a_healthy_run_is_not_warned_of_and_windows_do_not_mix():
    watch = Watch(num_units=2)
    # Nine bad rounds of 2 x 10 in two windows: N_eff averages 1.55 and 2.
    said = [record(watch, ONE if r < 5 else EVEN, clipped=(5 <= r < 15, False)) for r in range(20)]
    assert said == [None] * 20
    said = [record(watch, EVEN, clipped=(r < 14, False)) for r in range(20)]
    assert "unit 0: 100%" in said[9] and said[19] is None


def test_rounds_in_which_only_one_replica_was_left_say_nothing_about_weights():
    alone = [[1.0, 1.0], [0.0, 0.0]]
    watch = Watch(num_units=2)
    assert [record(watch, alone, ok=[[True, True], [False, False]]) for _ in range(10)] == [None] * 10
    single = Watch(num_units=2)
    assert [record(single, [[1.0, 1.0]], clipped=(False, False)) for _ in range(10)] == [None] * 10
    nobody = Watch(num_units=2)
    said = [
        record(nobody, [[0.0, 0.0]] * 2, ok=[[False, False]] * 2, clipped=(True, True)) for _ in range(10)
    ]
    assert said == [None] * 10
    half = Watch(num_units=2)
    for r in range(10):
        text = record(half, EVEN, ok=[[r < 5] * 2] * 2, clipped=(r >= 5, r < 3))
    assert "1 of 2 units are clipped" in text and "unit 1: 60%" in text
    # But a weight that has vanished in the softmax counts as one that was there.
    vanished = Watch(num_units=2)
    assert [record(vanished, alone) for _ in range(10)][9].startswith(
        "over the last 10 rounds, the averages of 2"
    )


def test_a_watch_resumes_in_the_middle_of_its_window():
    watch, other = Watch(num_units=2), Watch(num_units=2)
    for _ in range(6):
        record(watch, ONE, clipped=(True, False))
    other.load_state_dict(watch.state_dict())
    said = [[record(w, EVEN) for _ in range(4)] for w in (watch, other)]
    assert said[0] == said[1] and said[0][:3] == [None] * 3
    assert "(unit 0: 60%)" in said[0][3] and "(unit 1: 1.46)" in said[0][3]


def test_a_watch_over_nothing_is_refused():
    with pytest.raises(ConfigError, match="rounds=0 sees nothing"):
        Watch(num_units=1, rounds=0)
