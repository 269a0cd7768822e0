"""Weights of replicas: they sum to one, limits of the temperature, symmetry, selection; the anchored rule."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.distributed.local.averaging import Aggregation, Anchored, Mean, SoftmaxNorm, StepWeighted

INF, NAN = float("inf"), float("nan")
NORM = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1e-300, 1e300, INF, NAN]))
TABLES = st.tuples(st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda NU: st.lists(st.lists(NORM, min_size=NU[1], max_size=NU[1]), min_size=NU[0], max_size=NU[0])
)
RULES = [
    Mean(),
    SoftmaxNorm(),
    SoftmaxNorm(1e-12),
    SoftmaxNorm(INF),
    SoftmaxNorm(0.3, relative=True),
    StepWeighted(),
    StepWeighted(1.0, SoftmaxNorm()),
    StepWeighted(0.2, SoftmaxNorm(relative=True)),
    Anchored("zeros", SoftmaxNorm()),
]


def table(rows):
    return torch.tensor(rows, dtype=torch.float64)


def steps_of(count):
    """Uneven, with a replica that did nothing."""
    return torch.arange(count, dtype=torch.float64) * 7


class Median(Aggregation):
    needs_all = True

    def combine(self, D_Nn, ok_N):
        return D_Nn[ok_N].median(0).values


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@settings(max_examples=25)
@given(rows=TABLES)
def test_weights_sum_to_one_over_those_that_are_left_and_are_zero_elsewhere(rule, rows):
    norms_NU = table(rows)
    ok_NU = norms_NU.isfinite()
    w_NU = rule.weights(norms_NU, steps_of(len(norms_NU)))
    assert w_NU.dtype == torch.float64
    assert (w_NU >= 0).all() and (w_NU[~ok_NU] == 0).all()
    torch.testing.assert_close(w_NU.sum(0), ok_NU.any(0).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@settings(max_examples=25)
@given(rows=TABLES, seed=st.integers(0, 99))
def test_permuting_replicas_permutes_the_weights(rule, rows, seed):
    norms_NU = table(rows)
    steps_N = steps_of(len(norms_NU))
    order_N = torch.randperm(len(norms_NU), generator=torch.Generator().manual_seed(seed))
    w_NU = rule.weights(norms_NU, steps_N)
    permuted_NU = rule.weights(norms_NU[order_N], steps_N[order_N])
    torch.testing.assert_close(permuted_NU, w_NU[order_N], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@settings(max_examples=25)
@given(rows=TABLES)
def test_a_replica_that_is_left_out_changes_nothing_for_the_others(rule, rows):
    norms_NU, count = table(rows), len(rows)
    out_1U = torch.full((1, norms_NU.shape[1]), INF, dtype=torch.float64)
    w_NU = rule.weights(torch.cat([norms_NU, out_1U]), torch.cat([steps_of(count), torch.tensor([999.0])]))
    torch.testing.assert_close(w_NU[:count], rule.weights(norms_NU, steps_of(count)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_nothing_waits_for_the_device(rule):
    # Tensors without values raise where a value is asked for.
    norms_NU = torch.empty(3, 2, dtype=torch.float64, device="meta")
    assert rule.weights(norms_NU, norms_NU[:, 0]).device.type == "meta"


def test_the_softmax_is_torchs_where_all_are_well():
    norms_NU = table([[3.0, 80.0], [4.5, 81.0], [2.0, 80.0]])
    for temperature in (0.5, 1.0, 20.0):
        w_NU = SoftmaxNorm(temperature).weights(norms_NU, torch.ones(3))
        torch.testing.assert_close(w_NU, torch.softmax(-norms_NU / temperature, 0), rtol=1e-12, atol=0)


@given(rows=TABLES)
def test_a_hot_softmax_is_the_mean_and_a_cold_one_the_smallest_norm(rows):
    norms_NU = table(rows)
    steps_N = torch.ones(len(norms_NU))
    mean_NU = Mean().weights(norms_NU, steps_N)
    torch.testing.assert_close(SoftmaxNorm(INF).weights(norms_NU, steps_N), mean_NU, rtol=0, atol=1e-15)
    relative_NU = SoftmaxNorm(1e12, relative=True).weights(norms_NU, steps_N)
    torch.testing.assert_close(relative_NU, mean_NU, rtol=0, atol=1e-11)
    cold_NU = SoftmaxNorm(1e-300).weights(norms_NU, steps_N)
    filled_NU = torch.where(norms_NU.isfinite(), norms_NU, INF)
    smallest_NU = norms_NU.isfinite() & (filled_NU == filled_NU.amin(0))
    distinct_U = (smallest_NU.sum(0) == 1) & (filled_NU.sort(0).values[:2].diff(dim=0) > 1e-200).all(0)
    assert (cold_NU.argmax(0)[distinct_U] == smallest_NU.int().argmax(0)[distinct_U]).all()
    assert (cold_NU.amax(0)[distinct_U] == 1).all()


@given(
    norms=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6),
    scale=st.floats(1e-6, 1e6),
    temperature=st.floats(0.01, 10),
)
def test_scaling_all_changes_nothing_with_a_relative_temperature_and_something_without(
    norms, scale, temperature
):
    norms_NU, steps_N = table([[norm, INF] for norm in norms]), torch.ones(len(norms))
    relative = SoftmaxNorm(temperature, relative=True)
    w_NU = relative.weights(norms_NU, steps_N)
    torch.testing.assert_close(relative.weights(scale * norms_NU, steps_N), w_NU, rtol=1e-9, atol=1e-12)
    absolute = SoftmaxNorm(temperature * table([norms]).mean().item())
    torch.testing.assert_close(absolute.weights(norms_NU, steps_N), w_NU, rtol=1e-9, atol=1e-12)


def test_an_absolute_temperature_feels_the_scale():
    norms_NU = table([[1.0], [2.0]])
    small, large = (SoftmaxNorm().weights(c * norms_NU, torch.ones(2))[0, 0].item() for c in (1, 30))
    assert small == pytest.approx(0.731, abs=1e-3) and large > 0.999


def test_of_two_one_left_out_gives_the_other_all():
    for rule in RULES:
        assert rule.weights(table([[INF], [3.0]]), torch.ones(2)).flatten().tolist() == [0.0, 1.0]
        assert rule.weights(table([[INF], [NAN]]), torch.ones(2)).flatten().tolist() == [0.0, 0.0]


def test_steps_shift_weights_among_those_left():
    steps_N = torch.tensor([10.0, 30.0, 1000.0])
    norms_NU = table([[1.0, 1.0], [1.0, INF], [INF, 1.0]])
    w_NU = StepWeighted(0.5).weights(norms_NU, steps_N)
    assert w_NU[:, 0].tolist() == pytest.approx([0.375, 0.625, 0.0])
    assert w_NU[:, 1].tolist() == pytest.approx([0.25 + 5 / 1010, 0.0, 0.25 + 500 / 1010])
    base_NU = SoftmaxNorm().weights(norms_NU, steps_N)
    assert torch.equal(StepWeighted(0.0, SoftmaxNorm()).weights(norms_NU, steps_N), base_NU)
    no_steps_NU = StepWeighted(0.5, SoftmaxNorm()).weights(norms_NU, torch.zeros(3))
    assert torch.equal(no_steps_NU, base_NU)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_impossible_temperatures_are_refused(temperature):
    with pytest.raises(ConfigError, match=f"temperature={temperature} must be above 0; towards 0"):
        SoftmaxNorm(temperature)


@pytest.mark.parametrize("share", [-0.1, 1.1, NAN])
def test_impossible_shares_are_refused(share):
    with pytest.raises(
        ConfigError, match=f"share={share} of the steps in the weights must be between 0 and 1"
    ):
        StepWeighted(share)


def test_a_rule_that_needs_all_combines_and_the_others_say_that_they_do_not():
    D_Nn, ok_N = torch.tensor([[1.0], [5.0], [NAN]]), torch.tensor([True, True, False])
    assert not Mean().needs_all and not Anchored("zeros").needs_all
    assert Anchored("zeros", Median()).needs_all
    assert Anchored("zeros", Median()).combine(D_Nn, ok_N).tolist() == [1.0]
    with pytest.raises(NotImplementedError, match="SoftmaxNorm gives weights and does not combine"):
        SoftmaxNorm().combine(D_Nn, ok_N)
    with pytest.raises(NotImplementedError, match="Median has no weights; it combines all pseudo-gradients"):
        Median().weights(D_Nn, torch.ones(3))
    with pytest.raises(
        ConfigError, match="Median combines pseudo-gradients without weights.*without StepWeigh"
    ):
        StepWeighted(base=Median())


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def move(rule, A_n, D_n, *, unit=0):
    """One round of plain outer steps."""
    A_n = A_n - rule.finish(unit, D_n, A_n)
    rule.commit()
    return A_n


@pytest.mark.parametrize("anchors", ["zeros", "initial"])
def test_anchored_moves_as_halpern_does(anchors):
    rule, A_n = Anchored(anchors), draw(5, seed=0)
    fixed_n = torch.zeros(5, dtype=torch.float64) if anchors == "zeros" else A_n
    for k in range(1, 8):
        D_n, a = draw(5, seed=k), 1 / (k + 1)
        assert rule.pull == a
        wanted_n = fixed_n + (1 - a) * (A_n - D_n - fixed_n)
        A_n = move(rule, A_n, D_n)
        torch.testing.assert_close(A_n, wanted_n, rtol=0, atol=1e-14)


def test_only_rounds_that_took_effect_weaken_the_pull():
    rule, A_n, D_n = Anchored("initial"), torch.ones(2), torch.ones(2)
    again = [rule.finish(0, D_n, A_n) for _ in range(3)]
    assert all(torch.equal(S_n, again[0]) for S_n in again)
    rule.commit()
    # The first A is kept although it has changed in place meanwhile.
    moved_n = A_n.sub_(again[0])
    torch.testing.assert_close(rule.finish(0, D_n, moved_n), -0.5 / 3 * D_n + 2 / 3 * D_n)


@pytest.mark.parametrize("anchors", ["zeros", "initial"])
def test_anchored_finds_the_solution_nearest_to_its_fixed_point(anchors):
    # Two nodes solve x >= 1 on one coordinate each, exactly; any point beyond both solves it for good.
    rule, A_n = Anchored(anchors), torch.tensor([3.0, 5.0], dtype=torch.float64)
    nearest_n = torch.tensor([1.0, 1.0] if anchors == "zeros" else [3.0, 5.0], dtype=torch.float64)
    plain_n = A_n.clone()
    for _ in range(2000):
        for_node = [torch.stack([x[0].clamp(min=1), x[1]]) for x in (A_n, plain_n)]
        for_other = [torch.stack([x[0], x[1].clamp(min=1)]) for x in (A_n, plain_n)]
        mean_n, plain_n = ((a + b) / 2 for a, b in zip(for_node, for_other, strict=True))
        A_n = move(rule, A_n, A_n - mean_n)
    assert plain_n.tolist() == [3.0, 5.0]
    torch.testing.assert_close(A_n, nearest_n, rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    "rule", [Anchored("initial", StepWeighted(0.3)), StepWeighted(0.3, Anchored("initial"))]
)
def test_the_anchored_state_comes_back(rule):
    A = {unit: draw(3, seed=unit).float() for unit in (0, 4)}
    for k in range(3):
        for unit in A:
            A[unit] = A[unit] - rule.finish(unit, draw(3, seed=10 + k).float(), A[unit])
        rule.commit()
    state = copy.deepcopy(rule.state_dict())
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    assert set(tensors) == {"0/fixed", "4/fixed"} and state["rounds"] == 3
    for tensor in rule.state_dict().values():
        if torch.is_tensor(tensor):
            tensor.zero_()  # a state must be a copy
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    anchored = Anchored("initial")
    other = (
        StepWeighted(0.3, anchored) if isinstance(rule, StepWeighted) else Anchored("initial", StepWeighted())
    )
    other.load_state_dict(state)
    for unit in A:
        D_n = draw(3, seed=99).float()
        assert torch.equal(other.finish(unit, D_n, A[unit]), rule.finish(unit, D_n, A[unit]))


def test_the_state_of_a_base_comes_back_through_the_anchored_rule():
    inner, A_n = Anchored("initial"), torch.ones(2)
    rule = Anchored("zeros", inner)
    move(rule, A_n, A_n, unit=3)
    assert set(rule.state_dict()) == {"anchors", "rounds", "base.anchors", "base.rounds", "3/base.fixed"}
    other = Anchored("zeros", Anchored("initial"))
    other.load_state_dict(rule.state_dict())
    assert torch.equal(other.finish(3, A_n, 2 * A_n), rule.finish(3, A_n, 2 * A_n))


def test_other_anchors_are_refused():
    with pytest.raises(ConfigError, match="anchors='first' must be 'zeros'"):
        Anchored("first")
    with pytest.raises(
        ConfigError, match="pulled towards anchors='zeros', this one towards 'initial'; set it to"
    ):
        Anchored("initial").load_state_dict(Anchored("zeros").state_dict())
