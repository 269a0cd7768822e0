import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import build_aggregator
from hardy.distributed.aggregation.aggregator import Aggregator, TooManyFaultyRowsError
from hardy.distributed.aggregation.coordinate import Median
from hardy.distributed.aggregation.names import SELF_REPORTED

X = torch.randn(9, 30, generator=torch.Generator().manual_seed(0)) + 1
G = torch.ones(30)


@pytest.mark.parametrize(
    ("rows_are", "f", "on_excess"),
    [("rows", "num_faulty", "on_excess"), ("workers", "strategy.f", "strategy.on_excess")],
)
def test_excess_may_be_an_error(rows_are, f, on_excess):
    rows = X.clone()
    rows[[2, 5]] = torch.nan
    aggregator = build_aggregator("median", num_faulty=1, on_excess="error", rows_are=rows_are)
    with pytest.raises(TooManyFaultyRowsError) as caught:
        aggregator([rows])
    assert str(caught.value) == (
        f"{rows_are} [2, 5] hold NaN or infinity, 2 where {f}=1 was expected; raise it, or set "
        f"{on_excess}='warn' to go on with the others"
    )
    assert build_aggregator("median", num_faulty=2, on_excess="error")([rows]).removed == (2, 5)


PAIRS = [(rule, pre) for rule in sorted(SELF_REPORTED) for pre in ("", "clip:3", "arc")]


@pytest.mark.parametrize(("rule", "pre"), PAIRS)
def test_numbers_that_workers_report_give_the_same_weights(rule, pre):
    steps = [pre] if pre else []
    whole, reported = (build_aggregator(rule, num_faulty=2, pre=steps) for _ in range(2))
    for step in range(3):
        rows = X + step
        rows[4, 3] = torch.nan
        want = whole([rows], references=[G], sample_weights=torch.arange(1.0, 10))
        squares, dots = rows.square().sum(1), rows @ G
        got = reported.weigh(squares, dots, G.square().sum(), sample_weights=torch.arange(1.0, 10))
        assert got.removed == want.removed == (4,) and got.vectors is None and got.taken == want.taken
        torch.testing.assert_close(got.weights, want.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lie", [torch.nan, torch.inf, -1.0])
def test_reported_numbers_that_cannot_be_are_refused(lie):
    squares, dots = X.square().sum(1), X @ G
    squares[3] = lie
    assert build_aggregator("dstar", num_faulty=2).weigh(squares, dots, 30.0).removed == (3,)
    if lie != -1.0:
        squares[3], dots[3] = 1.0, lie
        assert build_aggregator("dstar", num_faulty=2).weigh(squares, dots, 30.0).removed == (3,)


def test_reported_numbers_with_a_bad_trusted_gradient_leave_the_step_out():
    outcome = build_aggregator("dstar", num_faulty=2).weigh(X.square().sum(1), X @ G, torch.nan)
    assert (outcome.taken, outcome.weights, outcome.metrics["bad_validation"]) == ("nothing", None, 1.0)
    assert outcome.removed == ()


def test_rules_that_need_rows_refuse_numbers():
    with pytest.raises(ConfigError, match="rule 'krum' after .* needs the rows themselves"):
        build_aggregator("krum", num_faulty=1).weigh(torch.ones(9))
    with pytest.raises(ValueError, match="'dstar' needs dots_N and reference_square"):
        build_aggregator("dstar", num_faulty=1).weigh(torch.ones(9))


def test_a_call_that_fails_changes_no_state():
    def lost(numbers):
        raise RuntimeError("a worker is gone")

    for rule in ("dstar", "centered_clip", "kardam"):
        aggregator = build_aggregator(rule, num_faulty=2)
        references = [G] if aggregator.needs_reference else None
        aggregator([X], references=references)
        before = aggregator.state_dict()
        for calls in range(6):
            left = [calls]

            def total(numbers, left=left):
                left[0] -= 1
                return numbers if left[0] >= 0 else lost(numbers)

            try:
                aggregator([X + 1], references=references, total=total)
            except RuntimeError:
                after = aggregator.state_dict()
                assert before.keys() == after.keys()
                assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(after[k])) for k in before)


def test_what_all_decide_on_is_added_up_over_all():
    """A worker without the bad column removes the row as well."""
    rows = X.clone()
    rows[4, 29] = torch.nan
    others = torch.cat([rows[:, 20:].double().square().sum(1), torch.zeros(1)])

    def total(numbers):
        there = others if numbers.shape[1] == 10 else others[[4, 9]]  # all rows; row 4 once more
        return numbers + torch.stack([there, torch.zeros_like(there)])

    assert build_aggregator("median", num_faulty=1)([rows[:, :20]], total=total).removed == (4,)


@pytest.mark.parametrize(("rows_are", "f"), [("rows", "num_faulty"), ("workers", "strategy.f")])
def test_pre_aggregators_and_limits_in_errors(rows_are, f):
    aggregator = build_aggregator("krum", num_faulty=2, pre=["nnm", "bucketing:2"], rows_are=rows_are)
    aggregator.check(13)
    with pytest.raises(ConfigError) as caught:
        aggregator.check(10)
    assert str(caught.value) == (
        f"'krum' after 'bucketing' after 'nnm' cannot bear {f}=2 among 10 {rows_are}; lower it "
        f"to at most 1, or let at least 13 {rows_are} take part"
    )


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="num_faulty must be a whole number at least 0, got -1"):
        Aggregator(Median(), num_faulty=-1)
    with pytest.raises(ConfigError, match="on_excess must be one of warn, error, got 'raise'"):
        Aggregator(Median(), num_faulty=1, on_excess="raise")


def test_a_row_that_fails_at_every_step_is_told_of_once(caplog):
    rows = torch.ones(4, 3)
    rows[2] = torch.nan
    aggregator = build_aggregator("mean", num_faulty=0)
    for step in range(3):
        aggregator([rows], step=step)
    assert caplog.text.count("rows [2] hold NaN") == 1
    rows[1] = torch.inf
    aggregator([rows])
    assert "rows [1, 2] hold NaN" in caplog.text
