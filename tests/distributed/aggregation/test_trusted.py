import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import aggregate, build_aggregator
from hardy.distributed.aggregation.names import NEEDS_REFERENCE

G = torch.tensor([1.0, 0.0])
TRUSTED = sorted(NEEDS_REFERENCE)


def run(rule, rows, reference=G, num_faulty=0, **arguments):
    aggregator = build_aggregator(rule, num_faulty=num_faulty, arguments=arguments)
    return aggregator([torch.tensor(rows)], references=[torch.as_tensor(reference)])


def test_fltrust_weighs_by_the_cosine_and_brings_rows_to_the_trusted_norm():
    outcome = run("fltrust", [[3.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [3.0, 4.0]])
    assert outcome.weights.tolist() == pytest.approx([1 / 3 / 1.6, 0, 0, 0.6 / 5 / 1.6])
    assert outcome.metrics["accepted"] == [0, 3]


def test_zeno_accepts_what_gains():
    rows = [[2.0, 0.0], [0.0, 2.0], [-1.0, 1.0], [1.0, 1.0]]
    assert run("zeno_plus_plus", rows).metrics["accepted"] == [0, 1, 3]
    assert run("zeno_plus_plus", rows, rho=0.5).metrics["accepted"] == [0, 3]
    assert run("zeno_plus_plus", rows, epsilon=0.8).metrics["accepted"] == [0, 1, 2, 3]
    assert run("zeno_plus_plus", rows).weights.tolist() == pytest.approx([1 / 6, 1 / 6, 0, 1 / 3 / 2**0.5])


def test_diversefl_accepts_what_points_the_same_way_and_is_about_as_long():
    rows = [[1.0, 0.0], [0.5, 0.0], [0.6, 0.0], [2.0, 0.0], [1.9, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    assert run("diversefl", rows).metrics["accepted"] == [0, 2, 4]
    assert run("diversefl", rows, shortest=0.4, longest=1.5).metrics["accepted"] == [0, 1, 2]


def test_samples_count_where_rows_are_averaged():
    rows, samples = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([3.0, 1.0])
    for rule, shares in (("fltrust", [3.0, 0.5**0.5]), ("diversefl", [1.0, 1.0])):
        aggregator = build_aggregator(rule, num_faulty=0)
        outcome = aggregator([rows], references=[G], sample_weights=samples)
        factor = [1.0, 0.5**0.5 if rule == "fltrust" else 1.0]
        want = [s * c / sum(shares) for s, c in zip(shares, factor, strict=True)]
        assert outcome.weights.tolist() == pytest.approx(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", TRUSTED)
def test_nothing_accepted_gives_the_trusted_gradient_or_nothing(rule, dtype):
    rows = torch.tensor([[-1.0, 0.0], [-2.0, 0.0], [-3.0, 0.0]])
    trusted = G.clone()
    aggregator = build_aggregator(rule, num_faulty=1)
    outcome = aggregator([rows.to(dtype)], references=[trusted])
    assert (outcome.taken, outcome.weights) == ("reference", None)
    assert outcome.metrics["empty"] == 1.0 and outcome.metrics["accepted"] == []
    assert outcome.vectors[0].dtype == dtype and outcome.vectors[0].tolist() == [1, 0]
    outcome.vectors[0].zero_()
    assert torch.equal(trusted, G)
    skipped = run(rule, rows.tolist(), num_faulty=1, on_empty="skip")
    assert (skipped.taken, skipped.vectors) == ("nothing", None)


@pytest.mark.parametrize("reference", [[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]])
@pytest.mark.parametrize("rule", TRUSTED)
def test_a_bad_trusted_gradient_is_not_used(rule, reference):
    rows = [[1.0, 0.5], [1.2, 0.4], [0.9, 0.6], [1.1, 0.5], [-90.0, 70.0]]
    outcome = run(rule, rows, reference, num_faulty=1)
    want = aggregate(torch.tensor(rows), "trimmed_mean", num_faulty=1, pre=["nnm"])
    torch.testing.assert_close(outcome.vectors[0], want)
    assert outcome.metrics["bad_validation"] == outcome.metrics["fallback"] == 1.0
    assert outcome.removed == ()
    skipped = run(rule, rows, reference, num_faulty=1, on_bad_validation="skip")
    assert skipped.taken == "nothing"


def test_without_a_majority_there_is_no_fallback():
    rows = [[1.0, 0.5], [1.2, 0.4], [0.9, 0.6]]
    outcome = run("fltrust", rows, [0.0, 0.0], num_faulty=2)
    assert outcome.taken == "nothing" and "fallback" not in outcome.metrics


def test_norms_are_clipped_and_screened():
    rows = torch.diag(torch.tensor([1.0, 2.0, 3.0, 40.0, 0.0]))
    clipped = build_aggregator("norm_clip", num_faulty=1)([rows])
    assert clipped.vectors[0].mul(5).tolist() == pytest.approx([1, 2, 2, 2, 0])
    assert clipped.metrics["clip_norm"] == 2.0
    clipped = build_aggregator("norm_clip", num_faulty=1, arguments={"norm": 2.5})([rows])
    assert clipped.vectors[0].mul(5).tolist() == pytest.approx([1, 2, 2.5, 2.5, 0])
    screened = build_aggregator("norm_screen", num_faulty=1, arguments={"factor": 1.5})([rows])
    assert screened.metrics["accepted"] == [0, 1, 2, 4]
    assert screened.vectors[0].mul(4).tolist() == pytest.approx([1, 2, 3, 0, 0])


@pytest.mark.parametrize(
    ("rule", "arguments", "says"),
    [
        ("fltrust", {"on_empty": "mean"}, "on_empty must be one of validation, skip, got 'mean'"),
        (
            "fltrust",
            {"on_bad_validation": "mean"},
            "on_bad_validation must be one of fallback, skip, got 'mean'",
        ),
        ("zeno_plus_plus", {"rho": -1.0}, "zeno_plus_plus.rho must be a number at least 0, got -1.0"),
        ("zeno_plus_plus", {"epsilon": -1.0}, "epsilon must be a number at least 0, got -1.0"),
        ("diversefl", {"shortest": -1.0}, "shortest must be a number at least 0, got -1.0"),
        ("diversefl", {"longest": 0.5}, "diversefl.longest=0.5 must be above diversefl.shortest=0.5"),
        ("norm_clip", {"norm": 0.0}, "norm_clip.norm must be a number above 0 or none, got 0.0"),
        ("norm_screen", {"factor": 0.5}, "norm_screen.factor must be a number at least 1, got 0.5"),
    ],
)
def test_wrong_settings_are_refused(rule, arguments, says):
    with pytest.raises(ConfigError, match=says):
        build_aggregator(rule, num_faulty=1, arguments=arguments)


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [("fltrust", {}), ("zeno_plus_plus", {}), ("dstar", {"scale": "unit", "threshold": "none"})],
)
def test_a_row_too_short_to_be_lengthened_counts_as_zeros(rule, arguments):
    rows = torch.ones(4, 3)
    rows[0] = 1e-44  # brought to the trusted norm it would overflow
    aggregator = build_aggregator(rule, num_faulty=1, arguments=arguments)
    vector = aggregator([rows], references=[torch.ones(3)]).vectors[0]
    assert bool(vector.isfinite().all())
    assert vector.norm() <= torch.ones(3).norm() * 1.001
