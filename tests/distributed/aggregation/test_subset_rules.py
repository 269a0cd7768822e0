import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import aggregate, build_aggregator, subset_rules
from hardy.distributed.aggregation.columns import drawn_columns
from hardy.reference import aggregation as twin


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("at_once", [1, 2, 4096])
def test_subsets_of_equal_worth_are_taken_in_order(at_once, monkeypatch):
    monkeypatch.setattr(subset_rules, "SUBSETS_AT_ONCE", at_once)
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    for rule in ("mda", "smea"):
        assert aggregate(rows, rule, num_faulty=1).item() == 1.0


def test_many_subsets_are_tried_in_batches():
    rows = draw(15, 3)
    rows[[3, 7, 8, 9, 12]] += 3
    for rule, plain in (("mda", twin.mda), ("smea", twin.smea)):
        torch.testing.assert_close(aggregate(rows, rule, num_faulty=5), plain(rows, 5))


def test_too_many_subsets_are_refused():
    aggregator = build_aggregator("smea", num_faulty=10)
    aggregator.check(22)
    with pytest.raises(ConfigError) as caught:
        aggregator.check(40)
    assert "subsets are too many to be tried; lower it to at most 5" in str(caught.value)
    assert "let at least" not in str(caught.value)


def test_dnc_drops_more_rows_by_its_factor():
    rows = draw(12, 5)
    rows[:3] += 20
    for factor in (1.0, 1.5, 2.0):
        got = aggregate(rows, "dnc", num_faulty=3, factor=factor)
        torch.testing.assert_close(got, twin.dnc(rows, 3, factor))
    with pytest.raises(ConfigError, match="dnc.factor must be a number above 0"):
        build_aggregator("dnc", num_faulty=1, arguments={"factor": 0.0})


def test_dnc_draws_columns_anew_by_seed_and_step_and_keeps_what_all_rounds_keep():
    rows = draw(9, 60)
    arguments = {"columns": 6, "rounds": 3}

    def kept(seed, step):
        aggregator = build_aggregator("dnc", num_faulty=2, arguments=arguments, seed=seed)
        return aggregator([rows], step=step).vectors[0]

    def plain(seed, step):
        draws = [drawn_columns(60, 6, seed=seed, purpose=["dnc", k, step]).tolist() for k in range(3)]
        return twin.dnc_subsampled(rows, 2, draws)

    found = {(seed, step): kept(seed, step) for seed in range(2) for step in range(3)}
    for (seed, step), vector in found.items():
        torch.testing.assert_close(vector, plain(seed, step))
        assert torch.equal(vector, kept(seed, step))
    assert len({tuple(vector.tolist()) for vector in found.values()}) == 6


def test_dnc_of_more_columns_than_there_are_is_dnc_of_all():
    rows = draw(9, 60)
    rows[:2] += 3
    got = aggregate(rows, "dnc", num_faulty=2, columns=60)
    torch.testing.assert_close(got, twin.dnc(rows, 2))
    torch.testing.assert_close(aggregate(rows, "dnc", num_faulty=2), got)


def test_dnc_that_keeps_no_row_in_every_round_takes_those_kept_most_often():
    """Of three rows each round drops two; three rounds that leave different ones leave all."""
    rows = draw(3, 400)
    for columns, rounds in ((1, 1), (1, 7), (2, 7)):
        draws = [drawn_columns(400, columns, seed=0, purpose=["dnc", k, 0]).tolist() for k in range(rounds)]
        got = aggregate(rows, "dnc", num_faulty=1, factor=2.0, columns=columns, rounds=rounds)
        torch.testing.assert_close(got, twin.dnc_subsampled(rows, 1, draws, 2.0))
        assert got.isfinite().all()


def test_dnc_of_few_columns_forms_no_whole_gram_matrix_and_refuses_what_cannot_be():
    few = build_aggregator("dnc", num_faulty=1, arguments={"columns": 5})
    assert not few.needs_gram and build_aggregator("dnc", num_faulty=1).needs_gram
    for name, value in (("columns", 0), ("rounds", 0)):
        with pytest.raises(ConfigError, match=f"dnc.{name} must be a whole number at least 1"):
            build_aggregator("dnc", num_faulty=1, arguments={name: value})
    with pytest.raises(ValueError, match=r"first_columns=\[0, 2\] must be one number for each of 1 blocks"):
        few([draw(5, 3)], first_columns=[0, 2])


def test_aksel_keeps_half_or_all_honest_rows():
    rows = draw(9, 5)
    rows[:2] += 5
    median = twin.median(rows)
    for keep, count in (("mid", 5), ("honest", 7)):
        want = rows[twin.nearest(median, rows, count)].mean(0)
        torch.testing.assert_close(aggregate(rows, "aksel", num_faulty=2, keep=keep), want)
    with pytest.raises(ConfigError, match="aksel.keep must be one of mid, honest, got 'all'"):
        build_aggregator("aksel", num_faulty=1, arguments={"keep": "all"})


def test_caf_takes_all_trust_from_what_sticks_out():
    rows = draw(12, 5)
    rows[:3] += 30
    weights = build_aggregator("caf", num_faulty=3)([rows]).weights
    assert weights[:3].max() < 1e-6 and weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("rule", ["caf", "dnc", "mda", "smea"])
def test_equal_rows_but_one(rule):
    rows = torch.ones(7, 3)
    rows[4] = 1e6
    torch.testing.assert_close(aggregate(rows, rule, num_faulty=1), torch.ones(3))
