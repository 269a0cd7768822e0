import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import RULES, aggregate, build_aggregator, names
from hardy.distributed.aggregation.history import History
from hardy.distributed.aggregation.rule import WeightRule
from hardy.reference import aggregation as twin

DECAY = 0.9


def steps(count, *, num_rows=7):
    """Return stacks of rows that are mostly noise around one direction."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(num_rows, 30, generator=draw, dtype=torch.float64) + 0.3 for _ in range(count)]


def looking_back(rule="mda", *, num_faulty=2, **settings):
    return build_aggregator(rule, num_faulty=num_faulty, history=DECAY, **settings)


def test_it_equals_its_twin_in_blocks():
    Xs, aggregator = steps(6), looking_back(pre=["arc"])
    for X, want in zip(Xs, twin.by_history(Xs, 2, DECAY, twin.arc, twin.mda_kept), strict=True):
        got = torch.cat(aggregator([X[:, :13], X[:, 13:]]).vectors)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rule", sorted(names.BY_DISTANCE))
def test_the_first_step_is_judged_by_itself(rule):
    (X,) = steps(1)
    want = aggregate(X, rule, num_faulty=2, pre=["arc"])
    torch.testing.assert_close(looking_back(rule, pre=["arc"])([X]).vectors[0], want)


@pytest.mark.parametrize("attack", ["sign flip", "short", "shifted"])
def test_attacks_that_hide_in_the_noise_of_one_step_are_found_over_many(attack):
    """Each attacker's row of one step is as likely as an honest one, or nearer to all of them."""
    plain, aggregator = build_aggregator("mda", num_faulty=2), looking_back()
    kept, kept_plain = torch.zeros(7), torch.zeros(7)
    for X in steps(80):
        honest = X[2:]
        X[:2] = {
            "sign flip": -X[:2],
            "short": -0.5 * honest.mean(0),
            "shifted": honest.mean(0) - 1.2 * honest.std(0),
        }[attack]
        kept += aggregator([X]).weights > 0
        kept_plain += plain([X]).weights > 0
    assert kept[:2].max() < 20 and kept[2:].min() > 60
    assert kept_plain[:2].max() > 30


def test_what_is_added_up_is_of_the_step_alone():
    aggregator = looking_back(num_faulty=0)
    for X in steps(3):
        torch.testing.assert_close(aggregator([X]).vectors[0], X.mean(0))


def test_a_row_that_was_removed_leaves_its_average_alone():
    Xs, aggregator, other = steps(3), looking_back(), looking_back()
    spoiled = Xs[1].clone()
    spoiled[3] = torch.nan
    for X in (Xs[0], spoiled):
        aggregator([X])
    other([Xs[0]])
    now, before = aggregator.state_dict(), other.state_dict()
    assert now["age/3"] == 1 and now["age/2"] == 2
    assert torch.equal(now["row/3/0"], before["row/3/0"])
    assert aggregator([Xs[2]]).vectors[0].isfinite().all()


def test_it_goes_on_bit_for_bit_and_a_call_that_fails_changes_nothing():
    Xs, aggregator, other = steps(5), looking_back(), looking_back()
    for X in Xs[:3]:
        aggregator([X.float()])
    saved = aggregator.state_dict()

    def lost(numbers):
        raise RuntimeError("a worker is gone")

    with pytest.raises(RuntimeError, match="a worker is gone"):
        aggregator([Xs[3].float()], total=lost)
    other.load_state_dict(saved)
    for X in Xs[3:]:
        assert torch.equal(aggregator([X.float()]).vectors[0], other([X.float()]).vectors[0])


def test_averages_of_bfloat16_are_of_float32():
    history = History.start([torch.zeros(2, 3, dtype=torch.bfloat16)], DECAY)
    history = history.with_rows([torch.ones(2, 3, dtype=torch.bfloat16)], [1], torch.tensor([0.5]))
    assert history.blocks[0].dtype == torch.float32 and history.ages == (0, 1)
    torch.testing.assert_close(history.blocks[0], torch.tensor([[0.0] * 3, [0.05] * 3]))
    assert history.corrections([1]).item() == pytest.approx(10)


def test_other_workers_or_shapes_are_refused():
    aggregator = looking_back()
    aggregator([steps(1)[0]])
    with pytest.raises(ValueError, match=r"must keep their shapes \[\[7, 30\]\], got \[\[7, 29\]\]"):
        aggregator([steps(1)[0][:, 1:]])
    with pytest.raises(ValueError, match="history=0.9 needs all workers in order"):
        aggregator([steps(1)[0]], workers=[1, 0, 2, 3, 4, 5, 6])


def test_what_cannot_look_back_is_refused():
    with pytest.raises(ConfigError, match="needs a rule that judges by distances alone .*'median' does not"):
        looking_back("median")
    with pytest.raises(ConfigError, match="history=0.9 must know whose a row is; leave out 'nnm'"):
        looking_back(pre=["arc", "nnm"])
    with pytest.raises(ConfigError, match=r"history must be a number at least 0 and below 1, got 1.0"):
        build_aggregator("mda", num_faulty=1, history=1.0)


def test_rules_of_distances_need_nothing_else():
    others = {"centered_clip", "dnc", "monna"}  # its last vector, the columns, its own row
    by_gram = {name for name, rule in RULES.items() if issubclass(rule, WeightRule) and rule.needs_gram}
    assert by_gram - others == names.BY_DISTANCE
