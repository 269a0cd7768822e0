"""The outer optimizers against torch's and each other, their bounds and state, and a round of all parts."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.distributed.local.anomaly import ZTest
from hardy.distributed.local.averaging import SoftmaxNorm, StepWeighted
from hardy.distributed.local.outer import STEPS, OuterSGD, TorchOuter
from hardy.reference.edit import Settings, edit, start

ADAM = {"lr": 0.02, "betas": (0.8, 0.95)}
NAMES = [
    "Adam",
    "AdamW",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rounds(outer, A_n, seeds, *, unit=0):
    """Move a copy of the anchor once for each seed."""
    A_n = A_n.clone()
    for seed in seeds:
        outer.step(unit, A_n, draw(*A_n.shape, seed=seed, dtype=A_n.dtype))
    return A_n


@pytest.mark.parametrize("lr", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.0, True), (0.9, False), (0.9, True)])
def test_sgd_is_torchs_and_so_is_torchs_sgd_from_outside(lr, momentum, nesterov):
    A_n = draw(101, seed=0)
    ours = rounds(OuterSGD(lr, momentum=momentum, nesterov=nesterov), A_n, range(1, 31))
    looks_ahead = nesterov and momentum > 0
    named = TorchOuter.named("torch.optim.SGD", lr=lr, momentum=momentum, nesterov=looks_ahead)
    assert torch.equal(rounds(named, A_n, range(1, 31)), ours)
    param = torch.nn.Parameter(A_n.clone())
    sgd = torch.optim.SGD([param], lr=lr, momentum=momentum, nesterov=looks_ahead)
    for seed in range(1, 31):
        param.grad = draw(101, seed=seed)
        sgd.step()
    torch.testing.assert_close(ours, param.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_first_step_takes_the_pseudo_gradient_as_momentum(nesterov):
    outer, A_n, S_n = OuterSGD(0.5, momentum=0.8, nesterov=nesterov), torch.zeros(3), draw(3, seed=1)
    outer.step(7, A_n, S_n)
    assert torch.equal(outer.buffers(7)["momentum"], S_n)
    torch.testing.assert_close(A_n, -0.5 * (1.8 if nesterov else 1.0) * S_n)


def test_lr_one_without_momentum_is_the_mean_of_the_parameters_and_keeps_nothing():
    outer, A_n = OuterSGD(1.0, momentum=0.0), draw(5, seed=0)
    mean_n = draw(5, seed=1)
    outer.start_if_new(0, A_n)
    outer.step(0, A_n, A_n - mean_n)
    torch.testing.assert_close(A_n, mean_n)
    assert outer.buffers(0) == {} and outer.state_dict() == {}


@settings(max_examples=50)
@given(
    lr=st.floats(0.01, 2.0),
    momentum=st.floats(0.0, 0.95),
    nesterov=st.booleans(),
    phi=st.floats(0.01, 100.0),
    same=st.booleans(),
)
def test_the_move_of_a_round_is_bounded(lr, momentum, nesterov, phi, same):
    outer, A_n = OuterSGD(lr, momentum=momentum, nesterov=nesterov), torch.zeros(6, dtype=torch.float64)
    for seed in range(60):
        S_n = draw(6, seed=0 if same else seed, dtype=torch.float64)
        before_n = A_n.clone()
        outer.step(0, A_n, S_n * phi / S_n.norm())
        assert (A_n - before_n).norm() <= lr * phi / (1 - momentum) * (1 + 1e-12)
        if momentum:
            assert outer.buffers(0)["momentum"].norm() <= phi / (1 - momentum) * (1 + 1e-12)


@pytest.mark.parametrize("outer", [OuterSGD(0.5), TorchOuter.named("torch.optim.Adam")], ids=["sgd", "adam"])
def test_the_anchor_moves_in_its_own_memory_and_the_pseudo_gradient_is_only_read(outer):
    A_n, S_n = torch.zeros(4), draw(4, seed=0)
    memory, read = A_n.data_ptr(), S_n.clone()
    for _ in range(2):
        before_n = A_n.clone()
        outer.step(0, A_n, S_n)
        assert A_n.data_ptr() == memory and not A_n.requires_grad and A_n.grad is None
        assert torch.equal(S_n, read) and (A_n * S_n < before_n * S_n).all()
    elsewhere = A_n.clone()
    outer.step(0, elsewhere, S_n)
    assert (elsewhere != A_n).all()


def by_name(name):
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    return lambda: TorchOuter.named(f"torch.optim.{name}", lr=0.1, **momentum)


ALL = [
    pytest.param(lambda: OuterSGD(0.7), id="ours"),
    pytest.param(lambda: OuterSGD(0.7, momentum=0.0), id="plain"),
    *(pytest.param(by_name(name), id=name) for name in NAMES),
]


@pytest.mark.parametrize("make", ALL)
def test_a_resume_changes_no_bit(make):
    A_n = draw(9, seed=0)
    whole = make()
    wanted = [rounds(whole, A_n, range(1, 9), unit=unit) for unit in (0, 3)]
    halves = make()
    half = [rounds(halves, A_n, range(1, 5), unit=unit) for unit in (0, 3)]
    handed_out = halves.state_dict()
    state = copy.deepcopy(handed_out)
    for value in handed_out.values():
        value.zero_()  # a state must be a copy
    assert set(halves.state_dict()) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in halves.state_dict().items())
    assert all(value.dtype in (torch.float32, torch.float64, torch.int64) for value in state.values())
    assert all(value.shape in ((9,), ()) for value in state.values())
    other = make()
    other.load_state_dict(state)
    assert set(other.state_dict()) == set(state)
    got = [rounds(other, A, range(5, 9), unit=unit) for unit, A in zip((0, 3), half, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("num_rounds", [0, 4])
@pytest.mark.parametrize("make", ALL)
def test_who_copies_the_buffers_of_another_goes_on_as_that_one(make, num_rounds):
    source, joiner = make(), make()
    A_n = rounds(source, draw(9, seed=0), range(1, num_rounds + 1))
    for outer in (source, joiner):
        outer.start_if_new(0, A_n)
    theirs, own = source.buffers(0), joiner.buffers(0)
    assert [(name, x.shape, x.dtype) for name, x in own.items()] == [
        (name, x.shape, x.dtype) for name, x in theirs.items()
    ]
    for name, held in own.items():
        held.copy_(theirs[name])
    wanted = rounds(source, A_n, range(5, 9))
    assert torch.equal(rounds(joiner, A_n, range(5, 9)), wanted)
    assert not torch.equal(wanted, A_n)


@pytest.mark.parametrize("make", ALL)
def test_starting_early_changes_nothing_and_empty_units_pass(make):
    early, late, A_n = make(), make(), draw(9, seed=0)
    for _ in range(2):
        early.start_if_new(0, A_n)
    assert torch.equal(rounds(early, A_n, range(1, 5)), rounds(late, A_n, range(1, 5)))
    assert rounds(late, torch.zeros(0), [1, 2], unit=1).shape == (0,)
    other = make()
    other.load_state_dict(late.state_dict())
    assert rounds(other, torch.zeros(0), [3], unit=1).shape == (0,)


def test_adam_is_torchs():
    A_n = draw(20, seed=0)
    param = torch.nn.Parameter(A_n.clone())
    adam = torch.optim.Adam([param], **ADAM)
    for seed in range(1, 11):
        param.grad = draw(20, seed=seed)
        adam.step()
    assert torch.equal(
        rounds(TorchOuter.named("torch.optim.Adam", **ADAM), A_n, range(1, 11)), param.detach()
    )


class Counting(torch.optim.SGD):
    """Counts its steps in a plain number, where a checkpoint of ours would lose it."""

    def step(self, closure=None):
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            self.state[param]["count"] = self.state[param].get("count", 0) + 1


class Grouped(torch.optim.SGD):
    """Counts its steps in the parameter group."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


class Tall(torch.optim.SGD):
    """Keeps a matrix."""

    def step(self, closure=None):
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            self.state[param]["pairs"] = torch.zeros(len(param), 2)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            Counting,
            "Counting keeps count between steps, which a checkpoint of the outer optimizer cannot hold",
        ),
        (Grouped, r"Grouped keeps param_groups\[0\]\['k'\] between steps"),
        (Tall, "Tall keeps pairs between steps"),
    ],
)
def test_state_that_would_be_lost_is_refused(kind, text):
    with pytest.raises(ConfigError, match=text):
        TorchOuter(lambda params: kind(params, lr=0.1))


@pytest.mark.parametrize(
    ("path", "arguments", "text"),
    [
        ("torch.optim.Adan", {}, "no outer optimizer 'torch.optim.Adan'; did you mean 'torch.optim.Adam'"),
        (
            "torch.optum.Adam",
            {},
            "'torch.optum.Adam': the module torch.optum cannot be imported .*module.Class",
        ),
        ("Adam", {}, "'Adam': give module.Class"),
        ("torch.optim.LBFGS", {}, r"LBFGS evaluates the loss within a step \(it needs a closure\)"),
        (
            "torch.optim.SparseAdam",
            {},
            "SparseAdam cannot step a dense flat vector.*SparseAdam does not support",
        ),
        ("torch.optim.Muon", {}, r"torch.optim.Muon\(\) cannot be used: .*2D"),
        (
            "torch.optim.Adam",
            {"momentum": 0.9},
            r"torch.optim.Adam\(momentum=0.9\) cannot be used: .*momentum",
        ),
        ("torch.optim.Adam", {"lr": -1.0}, r"Adam\(lr=-1.0\) cannot be used: Invalid learning rate"),
    ],
)
def test_a_class_that_does_not_fit_is_refused_with_the_way_out(path, arguments, text):
    with pytest.raises(ConfigError, match=text):
        TorchOuter.named(path, **arguments)


@pytest.mark.parametrize(
    ("lr", "momentum", "text"),
    [
        (0.0, 0.9, "outer lr=0.0 must be above 0"),
        (float("nan"), 0.9, "outer lr=nan"),
        (1.0, 1.0, r"outer momentum=1.0 must be in \[0, 1\)"),
        (1.0, -0.1, "outer momentum=-0.1"),
    ],
)
def test_impossible_numbers_are_refused(lr, momentum, text):
    with pytest.raises(ConfigError, match=text):
        OuterSGD(lr, momentum=momentum)


def test_the_state_of_another_optimizer_is_refused():
    A_n = torch.ones(2)
    sgd, adam = OuterSGD(0.7), TorchOuter.named("torch.optim.Adam")
    rounds(sgd, A_n, [1])
    rounds(adam, A_n, [1])
    with pytest.raises(
        ConfigError, match=f"has exp_avg, exp_avg_sq, {STEPS}, step, which SGD with momentum=0.9"
    ):
        OuterSGD(0.7).load_state_dict(adam.state_dict())
    with pytest.raises(
        ConfigError, match=r"has momentum, which SGD with momentum=0.0 has no use for; go on with"
    ):
        OuterSGD(0.7, momentum=0.0).load_state_dict(sgd.state_dict())
    adam.load_state_dict(sgd.state_dict())
    with pytest.raises(ConfigError, match="has momentum, Adam has exp_avg, exp_avg_sq, step; go on with"):
        adam.step(0, A_n, A_n)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_all_parts_together_make_the_rounds_of_the_twin(relative, rho):
    # fp64, one worker a replica, so that every difference would be one of the rule.
    N, sizes, phi = 3, (5, 1, 40), 4.0
    letters = Settings(phi=phi, W_det=4, relative=relative, rho=rho, alpha=0.1)
    A = [draw(n, seed=n, dtype=torch.float64) for n in sizes]
    x, anchors = start(A, N=N), [a.clone() for a in A]
    outer, guards = (
        OuterSGD(0.8, momentum=0.85),
        [ZTest(num_units=3, warmup_rounds=4, alpha=0.1) for _ in range(N)],
    )
    rule = StepWeighted(rho, SoftmaxNorm(relative=relative))
    left_out = 0
    for r in range(25):
        D_NU = [[draw(n, seed=1000 * r + 10 * i + n, dtype=torch.float64) for n in sizes] for i in range(N)]
        if r in (8, 9, 15, 16, 17, 18):
            D_NU[1][2] *= 30  # two rounds: out; then, with another replica, three: a new level
            D_NU[0][2] *= 30 if r >= 15 else 1
        if r == 11:
            for i in range(N):
                D_NU[i][0][0] = float("nan")  # nobody is left
        if r == 20:
            D_NU[2][0][3] = float("inf")
        steps_N = torch.tensor([4.0, 9.0, 1.0 + r])
        x = edit(x, [[a - d for a, d in zip(x.A, row, strict=True)] for row in D_NU], letters, steps=steps_N)
        norms_NU = torch.stack([torch.stack([d.norm() for d in row]) for row in D_NU])
        flags_NU = torch.stack([guard.flags(row) for guard, row in zip(guards, norms_NU, strict=True)])
        w_NU = rule.weights(torch.where(flags_NU, torch.inf, norms_NU), steps_N.double())
        assert torch.equal(flags_NU, x.bad)
        torch.testing.assert_close(w_NU, x.w, rtol=0, atol=1e-9)
        left_out += int(flags_NU.sum())
        for u in range(len(sizes)):
            if not flags_NU[:, u].all():
                rows = [torch.where(w_NU[i, u] > 0, D_NU[i][u], 0.0) * w_NU[i, u] for i in range(N)]
                S_n = torch.stack(rows).sum(0)
                S_n = S_n * min(1.0, phi / (S_n.norm().item() + 1e-6))
                outer.step(u, anchors[u], S_n)
            torch.testing.assert_close(anchors[u], x.A[u], rtol=0, atol=1e-9)
            torch.testing.assert_close(outer.buffers(u)["momentum"], x.B[u], rtol=0, atol=1e-9)
        for guard, row in zip(guards, norms_NU, strict=True):
            guard.observe(row, flags_NU, norms_NU)
    assert left_out >= 2 + 3 + 6 + 1
    assert [guard.counters()["resets"].item() for guard in guards] == [1, 1, 1]
