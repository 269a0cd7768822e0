"""The plain filter on numbers that can be worked out by hand; the library's filter equals it step by step."""

import pytest
import torch

from hardy.distributed.aggregation import build_aggregator
from hardy.reference import dstar as twin

G = torch.tensor([1.0, 0.0], dtype=torch.float64)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_one_step():
    settings = twin.Settings()
    x = twin.step(twin.State(), rows([4.0, 0.0], [0.5, 0.0], [0.0, 0.25], [-1.0, 0.0]), G, settings)
    assert x.H == (0.5,) and x.A == (0, 1) and x.t == 1  # distances 0, 0.5, 1.03, 2
    assert x.u.tolist() == [0.75, 0.0]
    x = twin.step(x, rows([-1.0, 0.0]), G, settings)
    assert x.A == () and x.empties == 1 and torch.equal(x.u, G)


def test_factors():
    for scale, want in (("clip", [0.5, 1.0, 1.0]), ("unit", [0.5, 4.0, 1.0]), ("none", [1.0, 1.0, 1.0])):
        settings = twin.Settings(scale=scale)
        assert [twin.factor(g, G, settings) for g in rows([2.0, 0], [0.25, 0], [0.0, 0])] == want


def test_relatives():
    X = rows([3.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [3.0, 4.0])
    assert twin.fltrust(X, G).tolist() == pytest.approx([(1 + 0.36) / 1.6, 0.48 / 1.6])
    assert twin.zeno_plus_plus(X, G).tolist() == pytest.approx([1.6 / 3, 1.8 / 3])
    assert twin.zeno_plus_plus(X, G, rho=0.8).tolist() == pytest.approx([1, 0])
    assert twin.diversefl(rows([0.4, 0], [1.5, 0], [-1.0, 0], [1.0, 1.0]), G).tolist() == [1.25, 0.5]
    for rule in (twin.fltrust, twin.zeno_plus_plus, twin.diversefl):
        assert torch.equal(rule(rows([-1.0, 0.0]), G), G)


def test_kardam():
    Gs = [rows([1.0], [1.0], [1.0], [1.0]), rows([1.1], [1.2], [1.3], [9.0])]
    first = torch.ones(1, dtype=torch.float64)
    assert twin.kardam(Gs, 1, first)[1].item() == pytest.approx(1.2)


@pytest.mark.parametrize("threshold", ["history", "current", "min"])
@pytest.mark.parametrize("scale", ["clip", "unit", "none"])
def test_the_library_accepts_the_same_rows_step_by_step(scale, threshold):
    draw = torch.Generator().manual_seed(0)
    Gs, g_vs = [], []
    for t in range(40):
        g = torch.ones(30) * (4.0 if t == 25 else 1.0) + 0.3 * torch.randn(30, generator=draw)
        noise = torch.linspace(0.5, 2.5, 9)[:, None] * torch.randn(9, 30, generator=draw)
        Gs.append((g + noise) * (0.05 if 30 <= t < 38 else 1.0))
        g_vs.append(g)
    arguments = {"scale": scale, "threshold": threshold, "empty_limit": 3, "window": 12, "warm_up_steps": 4}
    settings = twin.Settings(scale=scale, threshold=threshold, empty_limit=3, W=12, T_w=4)
    aggregator, taken = build_aggregator("dstar", num_faulty=3, arguments=arguments), set()
    for G_t, g_v, want in zip(Gs, g_vs, twin.dstar(Gs, g_vs, settings), strict=True):
        got = aggregator([G_t], references=[g_v])
        taken.add(got.taken)
        assert tuple(got.metrics["accepted"]) == want.A
        torch.testing.assert_close(got.vectors[0].double(), want.u, rtol=1e-5, atol=1e-5)
        state = aggregator.state_dict()
        assert (state["steps"], state["empties_in_a_row"]) == (want.t, want.empties)
        assert state["history"].tolist() == pytest.approx(list(want.H), rel=1e-5)
    assert "rows" in taken
