"""Every graph: who hears from whom, that both ends know it, and what does not fit."""

import json
import math

import pytest

from hardy.config import ConfigError
from hardy.distributed.gossip.config import TopologyConfig
from hardy.distributed.gossip.topology import GRAPHS, Topology


def make(name, n, **settings):
    return Topology(TopologyConfig(name=name, **settings), num_nodes=n)


def receivers(topology, t=0):
    return [topology.at(t).receivers(node) for node in range(topology.num_nodes)]


@pytest.mark.parametrize("name", [*GRAPHS, "random_edges", "random_matching", "base_k"])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_both_ends_of_an_edge_know_it_and_shares_leave_something(name, n):
    topology, other = make(name, n), make(name, n)
    for t in range(7):
        one = topology.at(t)
        assert one == other.at(t) and len(one.shares) == n
        for node in range(n):
            assert node not in one.receivers(node)
            assert all(node in one.senders(receiver) for receiver in one.receivers(node))
            assert all(node in one.receivers(sender) for sender in one.senders(node))
            assert all(share > 0 for share in one.shares[node].values())
            assert math.fsum(one.shares[node].values()) < 1 or n == 1
            if name != "base_k":
                assert set(one.shares[node].values()) <= {1 / (1 + len(one.receivers(node)))}


def test_what_each_small_graph_looks_like():
    assert receivers(make("ring", 4)) == [(1,), (2,), (3,), (0,)]
    assert receivers(make("symmetric_ring", 4)) == [(1, 3), (0, 2), (1, 3), (0, 2)]
    assert receivers(make("symmetric_ring", 2)) == [(1,), (0,)]
    assert receivers(make("star", 4)) == [(1, 2, 3), (0,), (0,), (0,)]
    assert receivers(make("full", 3)) == [(1, 2), (0, 2), (0, 1)]
    assert receivers(make("torus", 6)) == [(1, 2, 3), (0, 2, 4), (0, 1, 5), (0, 4, 5), (1, 3, 5), (2, 3, 4)]
    assert receivers(make("torus", 9))[4] == (1, 3, 5, 7)
    assert receivers(make("hypercube", 8))[5] == (1, 4, 7)
    clique = [(1, 2, 3), (0, 2), (0, 1), (0, 4, 5), (3, 5), (3, 4)]
    assert receivers(make("double_clique", 6)) == clique


def test_exponential_graphs_hear_from_powers_of_two_ahead():
    six = make("one_peer_exponential", 6)
    assert six.period == 3
    assert [six.at(t).senders(0) for t in range(4)] == [(1,), (2,), (4,), (1,)]
    assert six.at(0).receivers(0) == (5,)
    assert make("exponential", 6).at(5).senders(0) == (1, 2, 4)
    assert make("one_peer_exponential", 5).period == 3 and make("one_peer_exponential", 4).period == 2


def test_random_graphs_depend_on_seed_and_round_alone():
    first, same, other = (make("random_edges", 8, seed=seed) for seed in (0, 0, 1))
    assert [receivers(first, t) for t in range(5)] == [receivers(same, t) for t in (0, 1, 2, 3, 4)]
    assert receivers(first, 0) != receivers(first, 1) and receivers(first) != receivers(other)
    assert first.period is None


def test_random_edges_come_as_often_as_they_should():
    topology = make("random_edges", 6, probability=0.5, across=0.2)
    inside = across = 0
    for t in range(400):
        for node in range(6):
            for receiver in topology.at(t).receivers(node):
                inside, across = inside + (node // 3 == receiver // 3), across + (node // 3 != receiver // 3)
    assert inside / (400 * 12) == pytest.approx(0.5, abs=0.03)
    assert across / (400 * 18) == pytest.approx(0.2, abs=0.02)


def test_all_possible_edges_come_at_once_when_asked():
    topology = make("random_edges", 6, probability=0.1, across=0.0, full_every=3)
    assert (
        receivers(topology, 2) == [(1, 2), (0, 2), (0, 1), (4, 5), (3, 5), (3, 4)] == receivers(topology, 5)
    )
    assert receivers(topology, 1) != receivers(topology, 2)


def test_random_matchings_are_pairs():
    for n in (6, 7):
        for t in range(5):
            at = make("random_matching", n).at(t)
            assert sum(map(len, at.shares)) == 2 * (n // 2)
            assert all(at.receivers(at.receivers(i)[0]) == (i,) for i in range(n) if at.receivers(i))


@pytest.mark.parametrize(
    ("name", "n", "text"),
    [
        ("hypercube", 6, "'hypercube' needs a power of two replicas, but there are 6; run 4 or 8"),
        ("torus", 7, "'torus' needs a number of replicas that is a product, and 7 is prime; run 8"),
        ("double_clique", 5, "'double_clique' needs an even number of replicas, but there are 5; run 4 or 6"),
    ],
)
def test_graphs_that_do_not_fit_say_what_would(name, n, text):
    with pytest.raises(ConfigError, match=text):
        make(name, n)


def from_file(tmp_path, data, n=3):
    path = tmp_path / "graph.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return make("file", n, file=str(path))


def test_a_file_gives_rounds_with_and_without_shares(tmp_path):
    topology = from_file(tmp_path, [[[0, 1], [0, 2]], [[2, 0, 0.25], [2, 1, 0.5]]])
    assert topology.period == 2
    assert topology.at(0).shares[0] == {1: 1 / 3, 2: 1 / 3} and topology.at(3).shares[2] == {0: 0.25, 1: 0.5}
    assert from_file(tmp_path, [[]]).at(0).receivers(0) == ()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("{", "cannot be read"),
        ([], "holds no list of rounds"),
        ([[[0]]], "round 0: each round is a list of"),
        ([[[0, 3]]], "edges join two different replicas from 0 to 2"),
        ([[[0, 0]]], "edges join two different"),
        ([[[0, True]]], "edges join two different"),
        ([[[0, 1], [0, 1]]], "each pair once per round"),
        ([[[0, 1], [1, 0, 0.5]]], "all edges of a round have a share, or none"),
        ([[[0, 1, 0.6], [0, 2, 0.6]]], "those of one sender at most 1 together; replica 0 gives"),
        ([[[0, 1, 0.0]]], "shares are above 0"),
        ([[[0, 1, "x"]]], "shares are above 0"),
    ],
)
def test_files_that_make_no_graph_are_refused(tmp_path, data, text):
    with pytest.raises(ConfigError, match=text):
        from_file(tmp_path, data)
