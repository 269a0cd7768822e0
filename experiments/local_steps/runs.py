"""Each run by its name: what it measures after which round."""

import math
import statistics
from functools import partial

import problems
import torch

from hardy.reference import local_gd as gd

ZERO = torch.zeros(problems.D, dtype=torch.float64)
SKEWED = (0.1, 0.2, 0.3, 0.4)
"""Weights of nodes that count unequally."""


def marks(rounds):
    """Return the rounds to measure after: about ten a decade, and those with an expected number."""
    steps = {round(10 ** (i / 10)) for i in range(41)}
    return sorted(k for k in steps | {30, 50, 200, 300, 500, 2000, 3000} if k <= rounds)


def classification(local, *, rounds, anchor=None, a=gd.halpern):
    """Return gap, loss and least margin of the weights after each marked round."""
    x = problems.separable()
    w_hat = gd.svm(x)
    ws = gd.run(ZERO, x, local, rounds=rounds, anchor=anchor, a=a)
    return {
        "cosgap": {k: gd.cosgap(ws[k - 1], w_hat) for k in marks(rounds)},
        "loss": {k: gd.loss(ws[k - 1], x) for k in marks(rounds)},
        "min margin": {k: (x.rows @ ws[k - 1]).min().item() for k in marks(rounds)},
    }


def normalised(*, rounds, starts=21, gamma=0.2):
    """Return the same for normalised logistic regression, and the median over starts a rounding apart."""
    x = problems.separable()
    Z, w_hat = x.rows, gd.svm(x)
    generator = torch.Generator().manual_seed(0)
    w = 1e-15 * torch.randn(starts, problems.D, dtype=torch.float64, generator=generator)
    w[0] = 0
    got = {"cosgap": {}, "loss": {}, "median cosgap": {}, "least cosgap": {}, "largest cosgap": {}}
    for k in range(1, rounds + 1):
        w = w + gamma * torch.softmax(torch.nn.functional.logsigmoid(-(w @ Z.T)), dim=1) @ Z
        if k in marks(rounds):
            gaps = [gd.cosgap(row, w_hat) for row in w]
            got["cosgap"][k], got["loss"][k] = gaps[0], gd.loss(w[0], x)
            got["median cosgap"][k] = statistics.median(gaps)
            got["least cosgap"][k], got["largest cosgap"][k] = min(gaps), max(gaps)
    return got


def regression(x, local, *, rounds, w_0=ZERO, rho=None):
    """Return the relative error after each marked round, at the end, and its rate with the predicted one."""
    goal = gd.interpolator(w_0, x)
    ws = gd.run(w_0, x, local, rounds=rounds)
    errors = [((w - goal).norm() / goal.norm()).item() for w in ws]
    got = {"error": {k: errors[k - 1] for k in marks(rounds)}, "last error": {rounds: errors[-1]}}
    if rho is not None:
        k = max((k for k, error in enumerate(errors) if error > 1e-10), default=0)
        measured = (errors[k] / errors[k - 100]) ** 0.01 if k >= 100 else math.nan
        got |= {"rate": {k: measured}, "predicted rate": {k: rho}}
    return got


def fitted(local, *, rounds):
    """Return what `regression` does from zero, on the rows without a shift."""
    return regression(problems.fitted(), local, rounds=rounds)


def rate(*, L, rounds, p=None):
    """Return what `regression` does from a random start, on the rows with a shift; L None: exact solves."""
    x = problems.shifted(p=p)
    eta = problems.largest_stable_step(x)
    w_0 = torch.randn(problems.D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    local = gd.fit if L is None else partial(gd.squares, eta=eta, L=L)
    return regression(x, local, rounds=rounds, w_0=w_0, rho=gd.rate(x, eta=eta, L=L))


def biased(*, L, rounds):
    """Return how far from least squares, and from where the formula says, nodes without a common fit stop."""
    x = problems.contradicting()
    eta, one = problems.largest_stable_step(x), torch.eye(5, dtype=torch.float64)
    last = gd.run(torch.zeros(5), x, partial(gd.squares, eta=eta, L=L), rounds=rounds)[-1]
    goal = torch.linalg.lstsq(x.rows, x.b.reshape(-1, 1)).solution[:, 0]
    Q = one - torch.linalg.matrix_power(one - eta * (x.Z.mT @ x.Z) / x.n.double()[:, None, None], L)
    own = gd.fit(torch.zeros(5, dtype=torch.float64), x)
    predicted = torch.linalg.solve(Q.mean(0), (Q @ own[:, :, None]).mean(0))[:, 0]
    return {
        "distance": {rounds: ((last - goal).norm() / goal.norm()).item()},
        "beside the formula": {rounds: ((last - predicted).norm() / goal.norm()).item()},
    }


def steps(eta, L):
    """Return L local steps of logistic regression."""
    return partial(gd.logistic, eta=eta, L=L)


# The long ones first, so that two processes end together.
RUNS = {
    "exact solves, anchored": (partial(classification, gd.project, anchor=ZERO), 2000),
    "exact solves, anchored, a = 1/sqrt(k+1)": (
        partial(classification, gd.project, anchor=ZERO, a=lambda k: (k + 1) ** -0.5),
        1000,
    ),
    "local GD, eta 0.2/L, L = 500": (partial(classification, steps(0.2 / 500, 500)), 3000),
    "local GD, eta 0.02, L = 500": (partial(classification, steps(0.02, 500)), 1000),
    "anchored local GD, eta 0.02, L = 500": (partial(classification, steps(0.02, 500), anchor=ZERO), 1000),
    "local GD, eta 0.2/L, L = 100": (partial(classification, steps(0.2 / 100, 100)), 3000),
    "exact solves, mean": (partial(classification, gd.project), 2000),
    "local GD, eta 0.02, L = 1": (partial(classification, steps(0.02, 1)), 3000),
    "local GD, eta 0.02, L = 10": (partial(classification, steps(0.02, 10)), 3000),
    "local GD, eta 0.02, L = 100": (partial(classification, steps(0.02, 100)), 1000),
    "central GD, step 0.2": (partial(classification, steps(0.2, 1)), 1000),
    "central GD, step 2": (partial(classification, steps(2.0, 1)), 1000),
    "normalised logistic regression": (normalised, 1000),
    "regression, exact, mean": (partial(fitted, gd.fit), 200),
    "shifted regression, L = 1": (partial(rate, L=1), 8000),
    "shifted regression, L = 1, unequal weights": (partial(rate, L=1, p=SKEWED), 12000),
    "shifted regression, L = 10": (partial(rate, L=10), 1500),
    "shifted regression, L = 100": (partial(rate, L=100), 1500),
    "shifted regression, exact": (partial(rate, L=None), 1500),
    "shifted regression, exact, unequal weights": (partial(rate, L=None, p=SKEWED), 1500),
    "contradicting regression, L = 1": (partial(biased, L=1), 4000),
    "contradicting regression, L = 10": (partial(biased, L=10), 1000),
    "contradicting regression, L = 100": (partial(biased, L=100), 500),
}
"""What `measured` can do, and for how many rounds. "local GD, eta 0.2/L, L = 10" is eta 0.02: one run."""


@torch.inference_mode()
def measured(name, most_rounds=None):
    """Return what one run measured, by quantity and round."""
    torch.set_num_threads(1)
    run, rounds = RUNS[name]
    got = run(rounds=min(rounds, most_rounds or rounds))
    return {name: {k: float(f"{value:.7g}") for k, value in curve.items()} for name, curve in got.items()}
