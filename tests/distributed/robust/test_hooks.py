"""Ranks as workers: what is refused before any step. On real ranks: tests/mp/test_robust.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hardy.config import ConfigError
from hardy.distributed.aggregation import build_aggregator
from hardy.distributed.comm import Alone
from hardy.distributed.robust.combine import Combiner
from hardy.distributed.robust.hooks import RobustRanks, _check_views, _DDPBuckets
from hardy.distributed.simulation import SimWorld


def test_a_model_that_nobody_shares_is_refused():
    combine = Combiner(build_aggregator("mean", num_faulty=0), num_workers=1)
    with pytest.raises(ConfigError, match="strategy.worker='rank' needs real workers.*'replica'"):
        RobustRanks(nn.Linear(2, 2), Alone(), combine)


def test_gradients_that_are_copies_are_named():
    model = nn.Linear(3, 2)
    output = torch.zeros(8)
    model.weight.grad, model.bias.grad = output[:6].view(2, 3), output[6:]
    _check_views(model, [output])
    model.bias.grad = output[6:].clone()
    with pytest.raises(ConfigError, match="the gradient of bias is a copy .*strategy.worker='replica'"):
        _check_views(model, [output])


def test_a_new_order_of_parameters_lets_the_rule_forget_what_it_knows_by_columns():
    """DDP puts parameters into the order in which they got gradients, after its first step."""
    aggregator = build_aggregator("mda", num_faulty=0, history=0.5)
    ranks = SimpleNamespace(
        size=2,
        is_coordinate=False,
        trade=lambda flat: torch.stack([flat, 2 * flat]),
        gather=lambda slice_d: slice_d,
        combine=lambda blocks: aggregator(blocks).vectors,
        forget_columns=aggregator.forget_columns,
    )
    buckets, (a, b) = _DDPBuckets(ranks), (torch.ones(4), torch.ones(2))
    ages = []
    for order in ([a, b], [a, b], [b, a], [b, a], [b, a]):
        for param in order:
            answer = buckets.take(
                SimpleNamespace(
                    buffer=lambda param=param: param.clone(),
                    parameters=lambda param=param: [param],
                    is_last=lambda param=param, order=order: param is order[-1],
                )
            )
        assert answer.wait().eq(1.5).all()
        ages.append(aggregator.state_dict()["age/0"])
    assert ages == [1, 2, 1, 2, 3]


def test_ranks_that_draw_columns_draw_from_those_of_all():
    """Two buckets, cut into a slice for each of three ranks, decided on as the whole stack is."""
    X = torch.randn(3, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    buckets = X.split([24, 36], dim=1)

    def aggregator():
        return build_aggregator("dnc", num_faulty=1, arguments={"columns": 4, "rounds": 1})

    def body(comm):
        combine = Combiner(aggregator(), num_workers=3)
        ranks = SimpleNamespace(_comm=comm, _combine=combine, _step=step, _is_found=True)
        return RobustRanks.combine(ranks, [bucket.chunk(3, dim=1)[comm.rank] for bucket in buckets])

    seen = set()
    for step in range(6):
        slices = SimWorld(3).run(body)
        got = torch.cat([torch.cat([part[i] for part in slices]) for i in range(2)])
        torch.testing.assert_close(got, aggregator()([X], step=step).vectors[0])
        seen.add(tuple(got.tolist()))
    assert len(seen) > 1


def test_what_is_not_saved_is_told_of_when_a_run_goes_on(caplog):
    for rule, forgets in (("centered_clip", True), ("kardam", True), ("trimmed_mean", False)):
        combine = Combiner(build_aggregator(rule, num_faulty=1), num_workers=5)
        combine([torch.randn(5, 4)], step=0, total=lambda numbers: numbers)
        ranks = SimpleNamespace(_combine=combine, _step=3)
        state = RobustRanks.state_dict(ranks)
        assert state["about"] == {"step": 3, "rule": {}, "forgets": forgets}
        caplog.clear()
        RobustRanks.load_state_dict(ranks, state)
        assert (f"strategy.rule='{rule}' begins anew" in caplog.text) == forgets
        assert ("take strategy.worker='replica'" in caplog.text) == forgets
