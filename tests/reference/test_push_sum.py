"""Laws of the push-sum twin by hand; more of them, and the library beside it, are in tests/limits."""

import math

import pytest
import torch

from hardy.reference.push_sum import Gate, average, distances, hear, moreau, push, saddopt, start, uniform


def ring(n):
    A = torch.eye(n)
    for i in range(n):
        A[(i + 1) % n, i] = 1
    return A


def test_a_step_of_sgp_by_hand():
    """Two nodes that send to each other: half of each half step, masses stay 1."""
    nodes = start(torch.tensor([[1.0], [5.0]]))
    W = push(nodes, lambda z, t: z, torch.ones(2, 2), eta=0.1)
    assert W.tolist() == [[0.5, 0.5], [0.5, 0.5]] and nodes.a.tolist() == [1.0, 1.0]
    torch.testing.assert_close(nodes.x.flatten(), torch.tensor([2.7, 2.7], dtype=torch.float64))


def test_masses_and_de_biased_weights_by_hand():
    """Node 0 sends to node 1, which sends to nobody: gradients are taken at x / a, steps are not times a."""
    A = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    nodes = start(torch.tensor([[4.0], [0.0]]))
    seen = []
    for _ in range(2):
        push(nodes, lambda z, t: seen.append(z.clone()) or torch.ones_like(z), A, eta=1.0)
    assert nodes.a.tolist() == [0.25, 1.75]
    assert seen[1].flatten().tolist() == pytest.approx([1.5 / 0.5, (1.5 - 1.0) / 1.5])
    assert nodes.x.flatten().tolist() == pytest.approx([0.25, 0.25 - 0.5])


def test_momentum_by_hand():
    nodes = start(torch.zeros(1, 1))
    for _ in range(3):
        push(nodes, lambda z, t: torch.ones_like(z), torch.ones(1, 1), eta=1.0, mu=0.5)
    assert nodes.x.item() == -(1 + 1.5 + 1.75)


def test_the_gate_by_hand():
    A, D = torch.ones(2, 2), torch.tensor([[0.0, 2.0], [math.inf, 0.0]], dtype=torch.float64)
    W = moreau(A, D, v=0.1, k=0.5)
    given = 0.9 / 1.1 * (1.1 - math.exp(-1.0)) / 2
    assert W[1, 0].item() == pytest.approx(given) and W[0, 1].item() == pytest.approx(0.45)
    assert W[0, 0].item() == pytest.approx(1 - given) and W[1, 1].item() == pytest.approx(0.55)


def test_distances_are_known_of_those_heard_from_only():
    nodes, half = start(torch.zeros(3, 2)), torch.tensor([[0.0, 0], [3, 4], [6, 8]], dtype=torch.float64)
    hear(nodes, half, ring(3), backwards=False)
    assert distances(nodes).tolist() == [[0, 0, 100], [25, 0, 0], [0, 25, 0]]
    assert distances(nodes, scale="per_parameter")[0, 2].item() == 50
    assert distances(nodes, scale="relative")[2, 1].item() == 0.25
    hear(nodes, half, ring(3), backwards=True)
    assert distances(nodes).tolist() == [[0, 25, 100], [25, 0, 25], [100, 25, 0]]


def test_distances_are_of_half_steps_and_one_step_late():
    nodes, gate = start(torch.tensor([[0.0], [2.0]])), Gate(1.0)
    first = push(nodes, lambda z, t: torch.ones_like(z), torch.ones(2, 2), eta=1.0, gate=gate)
    assert first[1, 0].item() == pytest.approx(0.09 / 1.1 / 2)  # nothing is known yet
    assert nodes.b[:, :, 0].tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    second = push(nodes, lambda z, t: 0 * z, torch.ones(2, 2), eta=1.0, gate=gate)
    assert second[1, 0].item() == pytest.approx(0.9 / 1.1 * (1.1 - math.exp(-4.0)) / 2)


def test_gradient_tracking_by_hand():
    """Mix first, then subtract eta y; y is the mixed y and what the gradient changed by."""
    W, nodes = uniform(torch.ones(2, 2)), start(torch.tensor([[0.0], [4.0]]))
    gradients = iter([[1.0, 3.0], [2.0, 2.0]])

    def grad(z, t):
        return torch.tensor(next(gradients), dtype=torch.float64)[:, None]

    saddopt(nodes, grad, W, eta=0.5)
    assert nodes.y.flatten().tolist() == [1.0, 3.0] and nodes.x.flatten().tolist() == [1.5, 0.5]
    saddopt(nodes, grad, W, eta=0.5)
    assert nodes.y.flatten().tolist() == [3.0, 1.0] and nodes.x.flatten().tolist() == [-0.5, 0.5]


def test_what_losses_do_to_one_message():
    x, W = torch.tensor([[1.0], [3.0]]), uniform(torch.ones(2, 2))
    gone = [torch.tensor([[False, True], [False, False]])]  # node 1's message to node 0
    ends = {
        rule: average(x, [W], gone, rule=rule) for rule in ("both", "numerator", "reabsorb", "running_sum")
    }
    assert {rule: a.tolist() for rule, (_, a) in ends.items()} == {
        "both": [0.5, 1.0],
        "numerator": [1.0, 1.0],
        "reabsorb": [0.5, 1.5],
        "running_sum": [0.5, 1.0],
    }
    assert ends["numerator"][0].flatten().tolist() == [0.5, 2.0]
    assert ends["reabsorb"][0].flatten().tolist() == pytest.approx([1.0, 3.5 / 1.5])
    _, a = average(x, [W, W], [*gone, torch.zeros(2, 2, dtype=torch.bool)], rule="running_sum")
    assert a.sum().item() == 2.0
