import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import aggregate, build_aggregator
from hardy.distributed.aggregation.preaggregation import Bucketing, Clip, build_pre_aggregator
from hardy.reference import aggregation as twin
from hardy.rng import generator_for

X = torch.randn(11, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


def order(num_rows, *, seed=0, step=0):
    return torch.randperm(num_rows, generator=generator_for(seed, "bucketing", step)).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 11])
def test_buckets_are_means_of_rows_drawn_each_step(size):
    aggregator = build_aggregator("median", num_faulty=0, pre=[f"bucketing:{size}"], seed=5)
    for step in (0, 7):
        want = twin.median(twin.bucketing(X, size, order(11, seed=5, step=step)))
        torch.testing.assert_close(aggregator([X], step=step).vectors[0], want)


def test_f_stays_what_it_was_after_bucketing():
    got = aggregate(X, "trimmed_mean", num_faulty=2, pre=["bucketing:2"])
    torch.testing.assert_close(got, twin.trimmed_mean(twin.bucketing(X, 2, order(11)), 2))
    with pytest.raises(ConfigError, match="'trimmed_mean' after 'bucketing'.*at most 2, or let at least 13"):
        build_aggregator("trimmed_mean", num_faulty=3, pre=["bucketing:2"]).check(11)


def test_clipping_and_mixing_in_order():
    for pre, rows in (
        (["clip:1.5", "nnm"], twin.nnm(twin.clip(X, 1.5), 2)),
        (["nnm", "clip:1.5"], twin.clip(twin.nnm(X, 2), 1.5)),
        (["arc"], twin.arc(X, 2)),
        (["nnm", "arc"], twin.arc(twin.nnm(X, 2), 2)),
    ):
        for rule, plain in (("trimmed_mean", twin.trimmed_mean), ("cge", twin.cge), ("krum", twin.krum)):
            if not (
                rule == "cge" and "arc" in pre
            ):  # its twin does not know which of the clipped were shorter
                torch.testing.assert_close(aggregate(X, rule, num_faulty=2, pre=pre), plain(rows, 2))


def test_arc_clips_to_the_longest_row_that_it_leaves():
    rows = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))  # floor(2 * 1 * 4 / 5) = 1 is clipped
    assert aggregate(rows, "mean", num_faulty=1, pre=["arc"]).mul(5).tolist() == pytest.approx(
        [1, 2, 3, 4, 4]
    )
    assert aggregate(rows, "mean", num_faulty=0, pre=["arc"]).mul(5).tolist() == pytest.approx(
        [1, 2, 3, 4, 5]
    )


def test_rules_that_must_know_whose_a_row_is_refuse_buckets():
    for rule in ("monna", "kardam"):
        with pytest.raises(
            ConfigError, match=f"rule '{rule}' must know whose a row is; leave out 'bucketing'"
        ):
            build_aggregator(rule, num_faulty=1, pre=["nnm", "bucketing:2"])


def test_what_can_be_self_reported_stays_so_after_clipping():
    assert build_aggregator("dstar", num_faulty=1, pre=["clip:1", "arc"]).is_self_reported
    assert not build_aggregator("dstar", num_faulty=1, pre=["nnm"]).is_self_reported
    assert not build_aggregator("krum", num_faulty=1).is_self_reported


@pytest.mark.parametrize("text", ["bucketing:0", "bucketing:1.5", "bucketing:-2", "clip:0", "clip:-1"])
def test_wrong_numbers_are_refused(text):
    with pytest.raises(ConfigError, match=f"pre-aggregator '{text}' needs a"):
        build_pre_aggregator(text)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Bucketing(0.5), "bucketing.size must be a whole number at least 1, got 0.5"),
        (lambda: Bucketing(True), "bucketing.size must be a whole number at least 1, got True"),
        (lambda: Clip("abc"), "clip.norm must be a number above 0, got 'abc'"),
        (lambda: Clip(float("nan")), "clip.norm must be a number above 0, got nan"),
    ],
)
def test_wrong_settings_are_refused(build, says):
    with pytest.raises(ConfigError, match=says):
        build()


@pytest.mark.parametrize("pre", ["clip:1e-3", "clip:0.7", "arc"])
def test_rows_clipped_to_one_norm_tie_to_the_last_bit(pre):
    for seed in range(20):
        rows = (
            torch.randn(9, 40, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, 10)[:, None]
        )
        rows = rows[torch.randperm(9, generator=torch.Generator().manual_seed(seed))]
        shortest = rows.norm(dim=1).argsort()[:6].sort().values
        outcome = build_aggregator("cge", num_faulty=3, pre=[pre])([rows])
        assert sorted(outcome.metrics["accepted"]) == shortest.tolist()  # whatever they were clipped to
        if pre != "arc":
            screen = build_aggregator("norm_screen", num_faulty=3, pre=[pre], arguments={"factor": 1.0})
            assert screen([rows]).metrics["accepted"] == list(range(9))
