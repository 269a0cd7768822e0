"""Laws of the dSTAR filter, and limits in which rules become one another."""

import pytest
import torch

from hardy.distributed.aggregation import aggregate, build_aggregator
from hardy.distributed.simulation import SimWorld
from hardy.rng import generator_for

NONE = {"scale": "none", "threshold": "none", "dot_test": "none"}


def draw(*shape, name="x"):
    return torch.randn(*shape, generator=generator_for(0, "aggregation law", name), dtype=torch.float64)


def dstar(num_faulty=0, **arguments):
    return build_aggregator("dstar", num_faulty=num_faulty, arguments=arguments)


def test_rotation_and_scale_leave_the_same_rows_and_turn_the_result():
    X, g = draw(9, 12) + 1, draw(12, name="g") + 1
    Q = torch.linalg.qr(draw(12, 12, name="Q"))[0]
    plain, turned, grown = (dstar(2) for _ in range(3))
    for step in range(15):
        X = X + 0.1 * draw(9, 12, name=step)
        want = plain([X], references=[g])
        for other, rows, trusted, undo in (
            (turned, X @ Q, g @ Q, lambda u: u @ Q.T),
            (grown, 7 * X, 7 * g, lambda u: u / 7),
        ):
            got = other([rows], references=[trusted])
            assert got.metrics["accepted"] == want.metrics["accepted"]
            torch.testing.assert_close(undo(got.vectors[0]), want.vectors[0])


def test_a_filter_that_filters_nothing_is_the_mean():
    X, g = draw(9, 12).float(), draw(12, name="g").float()
    got = build_aggregator("dstar", num_faulty=4, arguments=NONE)([X], references=[g]).vectors[0]
    assert torch.equal(got, aggregate(X, "mean", num_faulty=0))


def test_a_run_that_filters_nothing_is_synchronous_sgd():
    def train(arguments):
        theta, vectors = torch.zeros(6, dtype=torch.float64), []
        rule = "mean" if arguments is None else "dstar"
        aggregator = build_aggregator(rule, num_faulty=0, arguments=arguments)
        for step in range(20):
            gradients = theta - draw(5, 6, name=("data", step))
            references = None if arguments is None else [theta - 1]
            theta = theta - 0.1 * aggregator([gradients], references=references).vectors[0]
            vectors.append(theta)
        return torch.stack(vectors)

    assert torch.equal(train(NONE), train(None))
    assert not torch.equal(train({}), train(None))


@pytest.mark.parametrize("threshold", ["history", "current", "min"])
@pytest.mark.parametrize("scale", ["clip", "unit", "none"])
def test_what_is_accepted_agrees_with_the_trusted_gradient_and_is_bounded(scale, threshold):
    aggregator, num_accepting = dstar(3, scale=scale, threshold=threshold), 0
    for step in range(200):
        X, g = draw(9, 5, name=("law 3", step)) * 10 ** draw(9, 1, name=("sizes", step)), draw(5, name=step)
        X[5:] += 2 * g
        outcome = aggregator([X], references=[g])
        u, bound = outcome.vectors[0], outcome.metrics["threshold"]
        if outcome.taken == "rows":
            num_accepting += 1
            assert u @ g > 0
            if scale == "none":
                assert (u - g).norm() <= bound * g.norm() * (1 + 1e-9)
            else:
                assert u.norm() <= g.norm() * (1 + 1e-6)
    assert num_accepting > 50


LIES = [
    lambda X, g, f: torch.full_like(X[:f], torch.nan),
    lambda X, g, f: torch.full_like(X[:f], torch.inf),
    lambda X, g, f: torch.full_like(X[:f], 1e30),
    lambda X, g, f: torch.full_like(X[:f], -1e30),
    lambda X, g, f: g.expand(f, -1),
    lambda X, g, f: 0 * X[:f],
    lambda X, g, f: -100 * X[:f],
    lambda X, g, f: g + 1e-6 * X[:f],
    lambda X, g, f: 1e3 * draw(*X[:f].shape, name="noise"),
]


def test_the_median_distance_lies_between_honest_ones_whatever_the_others_send():
    for trial in range(1000):
        scale = ("clip", "unit", "none")[trial // len(LIES) % 3]
        f = 1 + trial % 5
        honest, g = draw(f + 1, 4, name=("honest", trial)), draw(4, name=("g", trial)) + 0.5
        bad = LIES[trial % len(LIES)](honest, g, f)
        got = dstar(f, scale=scale)([torch.cat([bad, honest])], references=[g]).metrics
        alone = dstar(0, scale=scale)([honest], references=[g]).metrics["delta"]
        assert min(alone) * (1 - 1e-9) <= got["delta_median"] <= max(alone) * (1 + 1e-9)


def test_with_half_of_the_rows_bad_the_median_can_be_a_liars():
    honest, g = draw(2, 4) - 5, draw(4, name="g") + 5
    rows = torch.cat([g.expand(2, -1), honest])
    outcome = dstar(0)([rows], references=[g])  # f = 2 of k = 4 would be refused
    assert outcome.metrics["delta_median"] < 1e-6 and outcome.metrics["accepted"] == [0, 1]


def test_rows_equal_to_the_trusted_gradient_are_all_accepted():
    g = draw(40).float()
    for scale in ("clip", "unit", "none"):
        outcome = dstar(scale=scale)([g.expand(6, -1)], references=[g])
        assert outcome.metrics["accepted"] == list(range(6))
        torch.testing.assert_close(outcome.vectors[0], g)


@pytest.mark.parametrize("part", [0.05, 0.1, 0.2, 0.21, 0.3, 1.0, 1e-2, 1e-4])
def test_three_numbers_of_a_row_give_its_distance(part):
    """Of two kinds of rows, by their three numbers or, where that loses digits, directly."""
    g = draw(300_000).float()
    X = (g + part * draw(4, 300_000, name="noise")).float()
    got = dstar(scale="none")([X], references=[g]).metrics["delta"]
    want = ((X.double() - g.double()).norm(dim=1) / g.double().norm()).tolist()
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("cuts", [[23], [10, 13], [1, 9, 0, 13]], ids=lambda cuts: str(len(cuts)))
def test_filters_of_shards_accept_the_same_rows_all_along(cuts):
    steps = [(draw(7, 23, name=("X", t)) + 0.7, draw(23, name=("g", t)) + 0.7) for t in range(30)]
    whole = dstar(2)
    want = [whole([X.bfloat16()], references=[g.float()]) for X, g in steps]

    def body(comm):
        aggregator, outcomes = dstar(2), []
        for X, g in steps:
            block, trusted = X.bfloat16().split(cuts, 1)[comm.rank], g.float().split(cuts)[comm.rank]
            outcomes.append(aggregator([block], references=[trusted], total=comm.sum))
        return outcomes

    for step, (parts, expected) in enumerate(
        zip(zip(*SimWorld(len(cuts)).run(body), strict=True), want, strict=True)
    ):
        assert {outcome.taken for outcome in parts} == {expected.taken}
        assert all(outcome.metrics["accepted"] == expected.metrics["accepted"] for outcome in parts), step
        got = torch.cat([outcome.vectors[0] for outcome in parts])
        torch.testing.assert_close(got, expected.vectors[0])


def attacks(mu, sigma, g_v, honest):
    """Return what liars may send who know everything."""
    u = mu - (mu @ g_v) / (g_v @ g_v) * g_v
    reach = (honest - g_v).norm(dim=1).sort().values[(len(honest) - 1) // 2]
    return {
        "sign flip": -mu,
        "inner product": -0.5 * mu,
        "crude": -10 * mu,
        "a little is enough": mu - 1.5 * sigma,
        "edge": 1e-3 * g_v - 0.95 * reach * u / u.norm(),
        "huge": -1e20 * mu,
        "nan": torch.nan * mu,
        "zero": 0 * mu,
    }


@pytest.mark.parametrize("attack", list(attacks(*[torch.ones(2)] * 3, torch.ones(1, 2))))
def test_the_mean_of_results_points_downhill_under_every_attack(attack):
    """(alpha, f)-resilience, sampled: sigma sqrt(d) <= ||g||, f < k / 2, the trusted gradient as noisy."""
    dim, k, f = 8, 9, 4
    g = torch.ones(dim, dtype=torch.float64) / dim**0.5
    sigma = 1 / dim**0.5
    aggregator, total, count = dstar(f), torch.zeros(dim, dtype=torch.float64), 500
    for trial in range(count):
        noise = sigma * draw(k - f + 1, dim, name=("resilience", trial))
        honest, g_v = g + noise[:-1], g + noise[-1] / 2
        bad = attacks(honest.mean(0), honest.std(0), g_v, honest)[attack]
        outcome = aggregator([torch.cat([bad.expand(f, -1), honest])], references=[g_v])
        assert outcome.vectors[0].norm() <= g_v.norm() * (1 + 1e-6)
        total += outcome.vectors[0] / count
    assert total @ g > 0.1 * g @ g


def test_a_strongly_convex_quadratic_converges_linearly():
    curvature = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    theta, distances = 10 * torch.ones(6, dtype=torch.float64), []
    aggregator = dstar(1)
    for _ in range(100):
        gradient = curvature * theta
        rows = torch.cat([gradient.expand(4, -1), -gradient[None]])
        theta = theta - 0.3 * aggregator([rows], references=[gradient]).vectors[0]
        distances.append(theta.norm().log().item())
    steps = torch.arange(100.0, dtype=torch.float64)
    fit = torch.corrcoef(torch.stack([steps, torch.tensor(distances, dtype=torch.float64)]))[0, 1].square()
    assert fit > 0.99 and distances[-1] < distances[0] - 10


def test_rules_that_become_one_another():
    X = draw(9, 15)
    same = [
        (("krum", {}), ("multi_krum", {"keep": 1})),
        (("norm_screen", {"factor": 1e9}), ("mean", {})),
        (("norm_clip", {"norm": 1e9}), ("mean", {})),
        (("centered_clip", {"tau": 1e9, "rounds": 1}), ("mean", {})),
    ]
    for (rule, arguments), (other, others) in same:
        got = aggregate(X, rule, num_faulty=1, **arguments)
        torch.testing.assert_close(got, aggregate(X, other, num_faulty=1, **others))
    torch.testing.assert_close(
        aggregate(X, "trimmed_mean", num_faulty=4), aggregate(X, "median", num_faulty=4)
    )
    halves = aggregate(X[:8], "trimmed_mean", num_faulty=3)
    torch.testing.assert_close(halves, aggregate(X[:8], "median", num_faulty=3))
    buckets = aggregate(X, "median", num_faulty=0, pre=["bucketing:9"])
    torch.testing.assert_close(buckets, X.mean(0))
    g = draw(15, name="g") + 0.3
    equal = X / X.norm(dim=1, keepdim=True) * g.norm()
    accept_all = aggregate(equal, "zeno_plus_plus", num_faulty=0, epsilon=1e9, reference=g)
    torch.testing.assert_close(accept_all, equal.mean(0))


def test_bad_rows_equal_to_honest_ones_change_nothing():
    """Copies of one honest worker's row: rules by distance may not be drawn far from the honest mean."""
    honest = draw(9, 15)
    rows = torch.cat([honest, honest[:1].expand(3, -1)])
    spread = (honest - honest.mean(0)).norm(dim=1).max()
    for rule in ("krum", "multi_krum", "geometric_median", "mda", "trimmed_mean", "median", "caf"):
        got = aggregate(rows, rule, num_faulty=3)
        assert (got - honest.mean(0)).norm() <= spread
