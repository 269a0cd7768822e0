"""Large steps: logistic regression, normalised or not, and the perceptrons, on whole data sets.

Paper: A. Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large
Step Sizes", AAAI 2025 (arXiv 2412.08424). Letters: n samples a_i in R^d with labels y_i in {-1, +1}, Z rows
z_i = y_i a_i; theta weights, gamma step size, s_i = sigmoid(-z_i . theta), beta = 1 / mean(s),
S_t = {i : z_i . theta_t <= 0}; mu margin, R = max ||a_i||.

Differs from the paper: beta/n times s is written as a softmax, which is never 0/0; all start at theta_0 = 0;
the perceptron takes the sample of smallest index.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int, float], Tensor]
"""From Z, theta, t and gamma to theta_(t+1)."""


def lr(Z: Tensor, theta: Tensor, t: int, gamma: float) -> Tensor:
    s = torch.sigmoid(-(Z @ theta))
    return theta + gamma * (s @ Z) / len(Z)


def nlr(Z: Tensor, theta: Tensor, t: int, gamma: float) -> Tensor:
    q = torch.softmax(torch.nn.functional.logsigmoid(-(Z @ theta)), 0)
    return theta + gamma * (q @ Z)


def bp(Z: Tensor, theta: Tensor, t: int, gamma: float) -> Tensor:
    S = Z @ theta <= 0
    return theta + (0.5 if t == 0 else 1.0) * Z[S].sum(0) / len(Z)


def normalised_bp(Z: Tensor, theta: Tensor, t: int, gamma: float) -> Tensor:
    S = Z @ theta <= 0
    return theta + Z[S].mean(0)


def perceptron(Z: Tensor, theta: Tensor, t: int, gamma: float) -> Tensor:
    S = Z @ theta <= 0
    return theta + Z[S][0]


METHODS: dict[str, Step] = {
    "normalized_logistic": nlr,
    "logistic": lr,
    "batch_perceptron": bp,
    "normalized_batch_perceptron": normalised_bp,
    "perceptron": perceptron,
}


def path(step: Step, Z: Tensor, gamma: float = 1.0) -> Iterator[Tensor]:
    """Yield theta_0, theta_1, ... in float64; perceptrons end where all margins are positive."""
    Z = Z.double()
    theta, t = torch.zeros(Z.shape[1], dtype=torch.float64), 0
    while True:
        yield theta
        if step not in (lr, nlr) and (Z @ theta > 0).all():
            return
        theta, t = step(Z, theta, t, gamma), t + 1


def separate(step: Step, Z: Tensor, gamma: float = 1.0, limit: int = 100_000) -> tuple[Tensor, int | None]:
    """Return the first theta with all margins positive and its t; None where `limit` steps do not suffice."""
    theta = Z.new_zeros(Z.shape[1])
    for t, theta in enumerate(path(step, Z, gamma)):
        if (Z.double() @ theta > 0).all():
            return theta, t
        if t == limit:
            break
    return theta, None


def loss(Z: Tensor, theta: Tensor) -> float:
    """Return f(theta)."""
    return torch.nn.functional.softplus(-(Z.double() @ theta)).mean().item()


def gradient(Z: Tensor, theta: Tensor) -> Tensor:
    """Return the gradient of f at theta."""
    return -torch.sigmoid(-(Z.double() @ theta)) @ Z.double() / len(Z)


def most_steps(step: Step, n: int, R: float, mu: float, gamma: float = 1.0) -> float:
    """Return the bound on the number of steps (theorems 3.3, 5.2, 5.3, 6.1); none is known for `lr`."""
    if step is bp:
        return n * R**2 / mu**2
    if step is nlr:
        return R**2 / mu**2 + 2 * math.log(2 * n - 1) / (gamma * mu**2)
    if step is lr:
        return math.inf
    return R**2 / mu**2


def worst_case(n: int) -> Tensor:
    """Return the Z of theorem 5.1: one row (0.5, -1), all others (0.5, 1); mu = 0.5, R^2 = 1.25."""
    Z = torch.tensor([[0.5, 1.0]], dtype=torch.float64).repeat(n, 1)
    Z[0, 1] = -1.0
    return Z


def two_points() -> Tensor:
    """Return the Z of theorem 4.1, on which the loss explodes one step before all is solved."""
    return torch.tensor([[1.0, -1.0], [1.0, 4.0]], dtype=torch.float64)
