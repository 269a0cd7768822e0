"""A rule at work: attacks before it, the report after it, losses in the middle."""

import math

import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import build_aggregator
from hardy.distributed.attacks import build_attack
from hardy.distributed.robust.combine import Combiner, Played, middle_loss


def identity(numbers):
    return numbers


def combiner(rule="trimmed_mean", *, f=1, num_workers=5, **further):
    aggregator = build_aggregator(rule, num_faulty=f)
    return Combiner(aggregator, num_workers=num_workers, **further)


def test_the_report_says_who_was_believed_and_for_how_long():
    combine, rows = combiner("multi_krum"), torch.randn(5, 7) * 0.1 + 1
    rows[3] = torch.nan
    rows[0] = -50.0
    assert combine([rows], step=0, total=identity) is not None
    report = combine.take_report()
    assert report["removed_workers"] == [3] and 3 not in report["believed_workers"]
    assert report["believed_rate"][3] == pytest.approx(0.98) and report["believed_rate"][1] == 1.0
    assert combine.take_report() == {}


def test_nothing_is_left_where_no_row_is_finite():
    assert combiner()([torch.full((5, 3), torch.inf)], step=0, total=identity) is None


def test_an_attack_is_played_by_those_named_from_its_step_on():
    played = Played(attack=build_attack("zero", arguments={}, seed=0), workers=(2,), from_step=2)
    combine = combiner("mean", f=0, played=played)
    results = [combine([torch.ones(5, 4)], step=step, total=identity)[0][0].item() for step in range(4)]
    assert results == pytest.approx([1.0, 1.0, 0.8, 0.8])


def test_trying_the_rule_out_leaves_its_state_alone():
    combine, generator = combiner("centered_clip"), torch.Generator().manual_seed(0)
    combine([torch.randn(5, 6, generator=generator) + 1], step=0, total=identity)
    before = combine.aggregator.state_dict()
    tried = combine._tried([torch.full((5, 6), 9.0)], references=None, step=1, total=identity)
    after = combine.aggregator.state_dict()
    assert tried is not None and tried[0].mean() > 1.0
    assert before.keys() == after.keys() and torch.equal(before["vector/0"], after["vector/0"])


def test_an_attacker_that_does_not_exist_is_named():
    played = Played(attack=build_attack("zero"), workers=(1, 5))
    with pytest.raises(ConfigError, match=r"strategy.attack.workers names \[5\], but there are 5 workers"):
        combiner(played=played)


def test_too_few_workers_are_refused_by_name():
    with pytest.raises(ConfigError, match="krum.*among 4 rows"):
        combiner("krum", f=1, num_workers=4)


@pytest.mark.parametrize(
    ("losses", "f", "expected"),
    [
        ([1.0, 2.0, 6.0], 0, 3.0),
        ([1.0, 2.0, 9.0], 1, 2.0),
        ([math.nan, 2.0, 1e30, 3.0, -5.0], 1, 2.5),
        ([math.inf, 4.0], 2, 4.0),
    ],
)
def test_the_loss_is_that_of_those_in_the_middle(losses, f, expected):
    assert middle_loss(torch.tensor(losses), num_faulty=f).item() == pytest.approx(expected)


def test_no_finite_loss_is_no_loss():
    assert middle_loss(torch.tensor([math.nan, math.inf]), num_faulty=1).isnan()
