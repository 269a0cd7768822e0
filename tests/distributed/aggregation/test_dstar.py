import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import build_aggregator
from hardy.distributed.aggregation.dstar import DStar

G = torch.tensor([1.0, 0.0], dtype=torch.float64)


def at(*deltas):
    """Return rows at these distances from the trusted gradient, no longer than it is."""
    cosines = [1 - delta**2 / 2 for delta in deltas]
    return torch.tensor([[c, (1 - c**2) ** 0.5] for c in cosines], dtype=torch.float64)


def build(num_faulty=0, **arguments):
    return build_aggregator("dstar", num_faulty=num_faulty, arguments=arguments)


def run(aggregator, rows, reference=G, **others):
    return aggregator([rows], references=[reference], **others)


def test_the_threshold_is_the_lower_median_and_ties_are_included():
    outcome = run(build(), at(0.2, 0.4, 0.4, 0.9))
    assert outcome.metrics["delta"] == pytest.approx([0.2, 0.4, 0.4, 0.9])
    assert outcome.metrics["threshold"] == outcome.metrics["delta"][1]
    assert outcome.metrics["accepted"] == [0, 1, 2]
    assert run(build(), at(0.2, 0.4, 0.5, 0.9)).metrics["accepted"] == [0, 1]


def test_scales():
    rows = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 0.0]], dtype=torch.float64)
    expected = {"clip": [0, 0.5, 1], "unit": [0, 0, 1], "none": [1, 0.5, 1]}
    for scale, deltas in expected.items():
        got = run(build(scale=scale), rows).metrics["delta"]
        assert got == pytest.approx(deltas, abs=1e-12)
    outcome = run(build(scale="unit"), rows)
    assert outcome.weights.tolist() == pytest.approx([0.25, 1.0, 0])


def test_a_dot_of_0_is_not_enough():
    rows = torch.tensor([[0.0, 0.1], [0.0, 0.2], [1e-9, 0.3]], dtype=torch.float64)
    assert run(build(threshold="none"), rows).metrics["accepted"] == [2]
    assert run(build(threshold="none", dot_test="none"), rows).metrics["accepted"] == [0, 1, 2]


def test_after_the_warm_up_history_counts_with_this_step_in_it():
    aggregator = build(warm_up_steps=2, window=3)
    thresholds = []
    for delta in (0.9, 0.1, 0.5, 0.7, 0.8, 0.3):
        thresholds.append(run(aggregator, at(delta, delta, delta)).metrics["threshold"])
    # Warm-up: 0.9, 0.1. Then the lower medians of (.9 .1 .5), (.1 .5 .7), (.5 .7 .8), (.7 .8 .3).
    assert thresholds == pytest.approx([0.9, 0.1, 0.5, 0.5, 0.7, 0.7])
    assert aggregator.state_dict()["history"].tolist() == pytest.approx([0.7, 0.8, 0.3])


def test_of_an_even_history_the_lower_median():
    aggregator = build(warm_up_steps=0, window=4)
    got = [run(aggregator, at(delta)).metrics["threshold"] for delta in (0.5, 0.9, 0.7, 0.3)]
    assert got == pytest.approx([0.5, 0.5, 0.7, 0.5])


def test_other_thresholds():
    for threshold, want in (("current", 0.9), ("min", 0.1 * 1.2), ("none", torch.inf)):
        aggregator = build(warm_up_steps=0, threshold=threshold, slack=0.2)
        for delta in (0.1, 0.1):
            run(aggregator, at(delta))
        assert run(aggregator, at(0.9)).metrics["threshold"] == pytest.approx(want)
    aggregator = build(warm_up_steps=0, threshold="min")
    run(aggregator, at(0.9))
    assert run(aggregator, at(0.1)).metrics["threshold"] == pytest.approx(0.1)


def test_after_some_empty_steps_the_median_of_the_step_counts_once():
    aggregator = build(warm_up_steps=1, window=50, empty_limit=2)
    for _ in range(10):
        run(aggregator, at(0.1))
    taken = [run(aggregator, at(0.9)) for _ in range(7)]
    assert [outcome.taken for outcome in taken] == ["reference", "reference", "rows"] * 2 + ["reference"]
    assert [outcome.metrics["threshold_reset"] for outcome in taken] == [0, 0, 1, 0, 0, 1, 0]
    assert aggregator.state_dict()["empties"] == 5


def test_an_empty_step_at_the_median_begins_the_count_again():
    aggregator = build(empty_limit=2)
    resets = [run(aggregator, -at(0.5)).metrics["threshold_reset"] for _ in range(7)]
    assert resets == [0, 0, 1, 0, 0, 1, 0]


def test_steps_that_accept_something_begin_the_count_of_empty_ones_again():
    aggregator = build(warm_up_steps=1, window=50, empty_limit=2)
    for _ in range(10):
        run(aggregator, at(0.1))
    for _ in range(3):
        run(aggregator, at(0.9))
        run(aggregator, at(0.1))
    assert aggregator.state_dict()["empties_in_a_row"] == 0 and aggregator.state_dict()["empties"] == 3


def test_a_bad_trusted_gradient_changes_no_state():
    aggregator = build()
    run(aggregator, at(0.5))
    before = aggregator.state_dict()
    run(aggregator, at(0.7), reference=0 * G)
    after = aggregator.state_dict()
    assert before["steps"] == after["steps"] == 1 and torch.equal(before["history"], after["history"])


def test_small_distances_are_formed_directly():
    g = 1 + torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(1))
    rows = g + torch.tensor([1e-4, 1e-3, 1e-2])[:, None] * noise
    got = run(build(scale="none"), rows, reference=g).metrics["delta"]
    want = (rows.double() - g.double()).norm(dim=1) / g.double().norm()
    assert got == pytest.approx(want.tolist(), rel=1e-5)


def test_of_reported_numbers_small_distances_are_what_they_are():
    aggregator = build()
    assert aggregator.is_self_reported
    squares = torch.tensor([1.0, 1.0, 4.0])
    dots = torch.tensor([0.9999, 0.5, -1.0], dtype=torch.float64)
    outcome = aggregator.weigh(squares, dots, 1.0)
    assert outcome.metrics["delta"] == pytest.approx([2e-4**0.5, 1.0, 3**0.5])
    assert outcome.vectors is None and outcome.taken == "rows" and outcome.weights.tolist() == [0.5, 0.5, 0]


def test_samples_enter_the_average():
    outcome = run(build(), at(0.2, 0.4, 0.9), sample_weights=torch.tensor([1.0, 3.0, 100.0]))
    assert outcome.weights.tolist() == pytest.approx([0.25, 0.75, 0])


def test_no_more_faulty_rows_than_half():
    build(num_faulty=3).check(7)
    with pytest.raises(
        ConfigError, match="num_faulty=3 among 6 rows; lower it to at most 2, or let at least 7"
    ):
        build(num_faulty=3).check(6)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scale", "half"),
        ("threshold", "mean"),
        ("window", 0),
        ("warm_up_steps", -1),
        ("slack", -0.1),
        ("dot_test", "any"),
        ("empty_limit", 0),
        ("on_empty", "mean"),
    ],
)
def test_wrong_settings_are_refused(setting, value):
    with pytest.raises(ConfigError, match=f"dstar.{setting} must be .*, got {value!r}"):
        DStar(**{setting: value})
