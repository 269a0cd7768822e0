import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import aggregate, build_aggregator
from hardy.distributed.aggregation.gram_rules import krum_least_rows
from hardy.reference import aggregation as twin


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(rule, rows, num_faulty=1, **others):
    arguments = others.pop("arguments", {})
    return build_aggregator(rule, num_faulty=num_faulty, arguments=arguments)([rows], **others).weights


def test_krum_takes_the_first_of_equals():
    rows = torch.tensor([[9.0], [1.0], [1.0], [1.0], [-9.0]])
    assert weights("krum", rows).tolist() == [0, 1, 0, 0, 0]
    # n = f + 3: the two nearest to each other always tie.
    assert weights("krum", torch.tensor([[5.0], [2.0], [1.0]]), num_faulty=0).tolist() == [0, 1, 0]


def test_krum_counts_its_nearest_neighbours_only():
    """With all distances the middle row would win; with the n - f - 2 = 1 nearest one of the close pair."""
    rows = torch.tensor([[0.0], [0.1], [4.0], [8.0], [8.3]])
    scores = twin.krum_scores(rows.double(), 1)
    assert weights("krum", rows).argmax() == min(range(5), key=scores.__getitem__)


def test_least_rows_of_krum():
    assert [krum_least_rows(f, "original") for f in (0, 1, 4)] == [1, 5, 11]
    assert [krum_least_rows(f, "byzfl") for f in (0, 1, 4)] == [1, 3, 9]


def test_mean_counts_rows_by_their_samples():
    rows, samples = draw(3, 5), torch.tensor([1.0, 2.0, 5.0])
    outcome = build_aggregator("mean", num_faulty=0)([rows], sample_weights=samples)
    torch.testing.assert_close(outcome.vectors[0], (samples.double() @ rows) / 8)
    rows[2] = torch.nan
    outcome = build_aggregator("mean", num_faulty=1)([rows], sample_weights=samples)
    torch.testing.assert_close(outcome.vectors[0], (rows[0] + 2 * rows[1]) / 3)


@pytest.mark.parametrize("rule", ["krum", "cge", "geometric_median", "norm_screen"])
def test_samples_decide_nothing_where_rows_are_chosen(rule):
    rows = draw(9, 5)
    samples = torch.tensor([1000.0, *([1.0] * 8)])
    assert torch.equal(weights(rule, rows, sample_weights=samples), weights(rule, rows))


def test_geometric_median_minimises_the_sum_of_distances():
    rows = draw(9, 4)
    got = aggregate(rows, "geometric_median", num_faulty=1)
    reach = (rows - got).norm(dim=1).sum()
    for trial in range(50):
        assert (rows - got - 1e-2 * draw(4, seed=trial)).norm(dim=1).sum() >= reach - 1e-9


def test_geometric_median_as_others_do_it():
    """RFA: three rounds from the mean. ByzFL: from 0 with a smoothing of 0.1."""
    rows = draw(9, 4) + 1

    def rounds(point, count, nu):
        for _ in range(count):
            w = 1 / (rows - point).norm(dim=1).clamp(min=nu)
            point = w @ rows / w.sum()
        return point

    got = aggregate(rows, "geometric_median", num_faulty=1, rounds=3, start_at="mean")
    torch.testing.assert_close(got, rounds(rows.mean(0), 3, 1e-9))
    got = aggregate(rows, "geometric_median", num_faulty=1, rounds=3, start_at="zero", smoothing=0.1)
    torch.testing.assert_close(got, rounds(0 * rows[0], 3, 0.1))


def test_from_the_mean_a_huge_row_leaves_the_median_far_out():
    rows = draw(10, 4)
    rows[:2] = 1e20
    assert aggregate(rows, "geometric_median", num_faulty=2, start_at="mean").norm() > 1e6
    assert aggregate(rows, "geometric_median", num_faulty=2).norm() < 10


def test_centred_clipping_goes_on_from_its_last_vector():
    steps = [draw(7, 6, seed=seed) + 2 for seed in range(4)]
    aggregator = build_aggregator("centered_clip", num_faulty=1, arguments={"tau": 0.7, "rounds": 1})
    v = torch.zeros(6, dtype=torch.float64)
    for rows in steps:
        v = twin.centered_clip(rows, v, rounds=1, tau=0.7)
        got = aggregator([rows[:, :2], rows[:, 2:]]).vectors
        torch.testing.assert_close(torch.cat(got), v)
    assert {key: value.shape[0] for key, value in aggregator.state_dict().items()} == {
        "vector/0": 2,
        "vector/1": 4,
    }


def test_centred_clipping_remembers_what_bf16_rounds_away():
    aggregator = build_aggregator("centered_clip", num_faulty=0, arguments={"tau": 1e-3, "rounds": 1})
    rows = torch.full((5, 1), 4.0, dtype=torch.bfloat16)
    rows[0] = 4.1
    for _ in range(600):
        vector = aggregator([rows]).vectors[0]
    assert vector.dtype == torch.bfloat16 and vector.item() == pytest.approx(0.6, rel=0.01)


def test_monna_needs_its_own_row_and_keeps_it():
    rows = torch.tensor([[0.0], [0.1], [0.2], [50.0], [0.3]])
    assert weights("monna", rows, own_row=3)[3] == 0.25
    assert weights("monna", rows, own_row=0)[3] == 0
    assert weights("monna", torch.ones(5, 2), num_faulty=2, own_row=4)[4] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="own_row must be a row from 0 to 4, got None"):
        weights("monna", rows)
    with pytest.raises(ValueError, match="own_row must be a row from 0 to 4, got 5"):
        weights("monna", rows, own_row=5)


def test_monna_leaves_the_step_out_when_its_own_row_is_bad():
    rows = draw(5, 3)
    rows[2] = torch.nan
    outcome = build_aggregator("monna", num_faulty=1)([rows], own_row=2)
    assert outcome.taken == "nothing" and outcome.metrics["own_row_removed"] == 1.0


@pytest.mark.parametrize(
    ("rule", "arguments", "says"),
    [
        ("krum", {"neighbours": "all"}, "krum.neighbours must be one of original, byzfl, got 'all'"),
        ("multi_krum", {"keep": 0}, "multi_krum.keep must be a whole number at least 1 or none, got 0"),
        ("geometric_median", {"rounds": 0}, "geometric_median.rounds must be .*at least 1, got 0"),
        ("geometric_median", {"start_at": "end"}, "start_at must be one of core, mean, zero, got 'end'"),
        ("geometric_median", {"smoothing": 0.0}, "smoothing must be a number above 0 or none, got 0.0"),
        ("centered_clip", {"tau": -1.0}, "tau must be a number above 0 or none, got -1.0"),
        ("centered_clip", {"rounds": 0}, "centered_clip.rounds must be a whole number at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(rule, arguments, says):
    with pytest.raises(ConfigError, match=says):
        build_aggregator(rule, num_faulty=1, arguments=arguments)
