"""Base-(k+1) graphs: exact, symmetric, sparse and short, for all numbers of nodes up to 100."""

import math

import pytest
import torch

from hardy.distributed.gossip.base_graph import base_graph


def matrices(n, degree):
    for links in base_graph(n, degree=degree):
        W = torch.zeros(n, n, dtype=torch.float64)
        for (sender, receiver), share in links.items():
            W[receiver, sender] = share
        yield W


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_every_number_of_nodes_reaches_the_mean_exactly_in_few_rounds(degree):
    for n in range(1, 101):
        rounds, product = 0, torch.eye(n, dtype=torch.float64)
        for W in matrices(n, degree):
            assert torch.equal(W, W.T) and int((W > 0).sum(0).max()) <= degree
            own = 1 - W.sum(0)
            assert (W >= 0).all() and (own >= -1e-15).all()
            product, rounds = (W + torch.diag(own)) @ product, rounds + 1
        assert (product - 1 / n).abs().max() < 1e-14, (n, degree)
        assert rounds <= 2 * math.log(n, degree + 1) + 2 + 1e-9


def test_rounds_of_some_sizes_are_those_that_were_counted():
    counted = {3: 3, 5: 5, 6: 4, 7: 5, 12: 5, 16: 4, 25: 9}
    assert {n: len(base_graph(n, degree=1)) for n in counted} == counted
