"""Whether the bridge is counted, and what is said of it."""

import argparse
import re

import pytest

from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.cost_presets import cost_preset
from hardy.balance.plan import Scheme
from hardy.cli.balance_bridge import bridge_of


def asked(cost, bandwidth=10.0, ranks=8):
    return argparse.Namespace(cost=cost, bridge_bandwidth=bandwidth, ranks=ranks)


def test_a_rank_with_the_whole_model_gets_all_but_its_part_and_gives_as_much_back():
    cost = cost_preset("hydraulis-7b")
    found = bridge_of(asked("hydraulis-7b"), cost)
    strategy = (Scheme(),) * 8
    parameters = 32 * (12 * 4096**2 + 2 * 4096) + 2 * 30592 * 4096 + 4096
    sent = 2 * parameters * 7 / 8  # bytes of an eighth, to seven others
    assert found.time(strategy) == pytest.approx(2 * sent / 10e9 * 1e3)
    assert bridge_of(asked("hydraulis-7b", 5.0), cost).time(strategy) == pytest.approx(
        2 * found.time(strategy)
    )
    assert (
        found.of(strategy, "ms")
        == f" (bridge {found.time(strategy):,.1f} ms, {2 * sent / 1e9:,.2f} GB a rank)"
    )
    assert "counted: weights to replicas and gradients back in bf16, at 10 GB/s" in found.said


@pytest.mark.parametrize(
    ("name", "bandwidth", "said"),
    [
        ("hydraulis-7b", 0.0, "not counted .--bridge-bandwidth 0."),
        ("own.json", 10.0, "--cost own.json does not say the sizes of its model"),
        ("context.json", 10.0, "no bridge: groups by context move no weights"),
    ],
)
def test_what_is_not_counted_is_said(name, bandwidth, said):
    scheme = Scheme(context=2) if name == "context.json" else Scheme(tensor=2)
    cost = LengthCostModel(schemes=(SchemeCost(scheme=scheme, a=1.0, b=0.0, c=0.0, cap_tokens=9),))
    found = bridge_of(asked(name, bandwidth), cost)
    assert re.search(said, found.said)
    assert found.time((scheme,)) == 0 and found.of((scheme,), "ms") == ""
