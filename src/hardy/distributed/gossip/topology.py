"""Who sends to whom at each round: pure functions of kind, number of nodes, seed and round.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252).   Letters: N nodes, t round, O_i the nodes that i
sends to, itself included.

Every node works out the whole round by itself; no word is exchanged.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hardy.config import ConfigError, reason_of
from hardy.distributed.gossip.base_graph import base_graph
from hardy.distributed.gossip.config import TopologyConfig
from hardy.rng import numpy_generator_for


@dataclass(frozen=True)
class Round:
    """One round of a topology."""

    shares: tuple[Mapping[int, float], ...]
    """For each sender its receivers, itself left out, and the share of its parameters that each gets."""

    def receivers(self, node: int) -> tuple[int, ...]:
        """Return whom a node sends to, itself left out, in order."""
        return tuple(sorted(self.shares[node]))

    def senders(self, node: int) -> tuple[int, ...]:
        """Return whom a node hears from, itself left out, in order."""
        return tuple(sender for sender, shares in enumerate(self.shares) if node in shares)


class Topology:
    """The rounds of `num_nodes` nodes.

    Args:
        config: the kind of graph and its arguments.
        num_nodes: N.

    Raises:
        ConfigError: there is no such graph of so many nodes.

    Example:
        >>> topology = Topology(TopologyConfig(name="one_peer_exponential"), num_nodes=4)
        >>> [topology.at(t).receivers(0) for t in range(3)]
        [(3,), (2,), (3,)]
    """

    def __init__(self, config: TopologyConfig, *, num_nodes: int) -> None:
        self.config, self.num_nodes = config, num_nodes
        self.is_random = config.name in ("random_edges", "random_matching")
        self._rounds = [] if self.is_random or num_nodes == 1 else _period(config, num_nodes)

    @property
    def period(self) -> int | None:
        """Rounds after which the graph repeats; None where it does not."""
        return None if self.is_random else max(len(self._rounds), 1)

    def at(self, t: int) -> Round:
        """Return round `t`, from 0."""
        if self.num_nodes == 1:
            return Round(({},))
        if self.is_random:
            return _random_round(self.config, self.num_nodes, t)
        return self._rounds[t % len(self._rounds)]


def _period(config: TopologyConfig, n: int) -> list[Round]:
    if config.name == "base_k":
        rounds = base_graph(n, degree=config.degree)
        return [_with_shares(n, [(i, j, share) for (i, j), share in links.items()]) for links in rounds]
    if config.name == "file":
        assert config.file is not None, "the config has it"
        return _from_file(Path(config.file), n)
    return [_even(n, pairs) for pairs in GRAPHS[config.name](n)]


def _full(n: int) -> list[set[tuple[int, int]]]:
    return [{(i, j) for i in range(n) for j in range(n) if i != j}]


def _ring(n: int) -> list[set[tuple[int, int]]]:
    return [{(i, (i + 1) % n) for i in range(n)}]


def _symmetric_ring(n: int) -> list[set[tuple[int, int]]]:
    return [_both_ways((i, (i + 1) % n) for i in range(n))]


def _star(n: int) -> list[set[tuple[int, int]]]:
    return [_both_ways((0, i) for i in range(1, n))]


def _torus(n: int) -> list[set[tuple[int, int]]]:
    """A grid as square as N allows, whose rows and columns are rings."""
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    if rows == 1 and n > 3:
        raise ConfigError(
            f"strategy.topology.name='torus' needs a number of replicas that is a product, and {n} is prime; "
            f"run {n + 1} replicas, or take 'symmetric_ring'"
        )
    cols = n // rows
    place = [(i // cols, i % cols) for i in range(n)]
    down = (((r + 1) % rows) * cols + c for r, c in place)
    right = (r * cols + (c + 1) % cols for r, c in place)
    return [_both_ways([*zip(range(n), down, strict=True), *zip(range(n), right, strict=True)])]


def _hypercube(n: int) -> list[set[tuple[int, int]]]:
    if n & (n - 1):
        raise ConfigError(
            f"strategy.topology.name='hypercube' needs a power of two replicas, but there are {n}; run "
            f"{1 << n.bit_length() - 1} or {1 << n.bit_length()}, or take 'base_k'"
        )
    return [{(i, i ^ (1 << bit)) for i in range(n) for bit in range(n.bit_length() - 1)}]


def _double_clique(n: int) -> list[set[tuple[int, int]]]:
    """Two complete halves, whose first nodes are joined."""
    if n % 2:
        raise ConfigError(
            f"strategy.topology.name='double_clique' needs an even number of replicas, but there are {n}; "
            f"run {n - 1} or {n + 1}"
        )
    half = n // 2
    cliques = {(i, j) for i in range(n) for j in range(n) if i != j and i // half == j // half}
    return [cliques | _both_ways([(0, half)])]


def _exponential(n: int) -> list[set[tuple[int, int]]]:
    return [{pair for pairs in _one_peer_exponential(n) for pair in pairs}]


def _one_peer_exponential(n: int) -> list[set[tuple[int, int]]]:
    """At round t node i hears from i + 2^(t mod B) mod N."""
    rounds = (n - 1).bit_length()
    return [{((i + (1 << t)) % n, i) for i in range(n)} for t in range(rounds)]


GRAPHS: dict[str, Callable[[int], list[set[tuple[int, int]]]]] = {
    "full": _full,
    "ring": _ring,
    "symmetric_ring": _symmetric_ring,
    "star": _star,
    "torus": _torus,
    "hypercube": _hypercube,
    "double_clique": _double_clique,
    "exponential": _exponential,
    "one_peer_exponential": _one_peer_exponential,
}
"""Graphs with even shares: one period of rounds, each a set of (sender, receiver)."""


def _both_ways(pairs: Any) -> set[tuple[int, int]]:
    return {pair for i, j in pairs if i != j for pair in ((i, j), (j, i))}


def _even(n: int, pairs: set[tuple[int, int]]) -> Round:
    """Give each receiver 1 / |O_i|."""
    receivers: list[list[int]] = [[] for _ in range(n)]
    for sender, receiver in sorted(pairs):
        if sender != receiver:
            receivers[sender].append(receiver)
    return Round(tuple({j: 1 / (len(mine) + 1) for j in mine} for mine in receivers))


def _with_shares(n: int, triples: Sequence[tuple[int, int, float]]) -> Round:
    shares: list[dict[int, float]] = [{} for _ in range(n)]
    for sender, receiver, share in triples:
        shares[sender][receiver] = share
    return Round(tuple(shares))


@lru_cache(maxsize=16)
def _random_round(config: TopologyConfig, n: int, t: int) -> Round:
    """Draw a round from (seed, t) alone."""
    generator = numpy_generator_for(config.seed, "topology", config.name, t)
    if config.name == "random_matching":
        order = generator.permutation(n).tolist()
        return _even(n, _both_ways(zip(order[::2], order[1::2], strict=False)))
    half = (n + 1) // 2
    drawn = generator.random((n, n))
    all_come = config.full_every is not None and t % config.full_every == config.full_every - 1
    pairs: set[tuple[int, int]] = set()
    for i in range(n):
        for j in range(n):
            probability = config.probability if (i < half) == (j < half) else config.across
            if i != j and (drawn[i, j] < probability or (all_come and probability > 0)):
                pairs.add((i, j))
    return _even(n, pairs)


def _from_file(path: Path, n: int) -> list[Round]:
    """Read rounds, each a list of [sender, receiver] or [sender, receiver, share]."""
    try:
        rounds = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        said = f"strategy.topology.file={str(path)!r} cannot be read: {reason_of(error)}"
        raise ConfigError(said) from error
    if not isinstance(rounds, list) or not rounds:
        raise ConfigError(f"strategy.topology.file={str(path)!r} holds no list of rounds")
    return [_checked_round(edges, n, where=f"{path}, round {t}") for t, edges in enumerate(rounds)]


def _checked_round(edges: Any, n: int, *, where: str) -> Round:
    if not isinstance(edges, list) or any(
        not isinstance(edge, list) or len(edge) not in (2, 3) for edge in edges
    ):
        raise ConfigError(f"{where}: each round is a list of [sender, receiver] or [sender, receiver, share]")
    ends = [tuple(edge[:2]) for edge in edges]
    strangers = [end for end in ends if end[0] == end[1] or not all(_is_node(node, n) for node in end)]
    if strangers or len(set(ends)) < len(ends):
        raise ConfigError(
            f"{where}: edges join two different replicas from 0 to {n - 1}, each pair once per round; got "
            f"{[list(end) for end in strangers or ends]}"
        )
    if len({len(edge) for edge in edges}) > 1:
        raise ConfigError(f"{where}: all edges of a round have a share, or none")
    if not edges or len(edges[0]) == 2:
        return _even(n, {(sender, receiver) for sender, receiver in ends})
    made = _with_shares(n, [tuple(edge) for edge in edges])
    for sender, shares in enumerate(made.shares):
        numbers = list(shares.values())
        if any(not isinstance(w, int | float) or not w > 0 for w in numbers) or sum(numbers) > 1:
            raise ConfigError(
                f"{where}: shares are above 0, and those of one sender at most 1 together; replica {sender} "
                f"gives {numbers}"
            )
    return made


def _is_node(node: Any, n: int) -> bool:
    return isinstance(node, int) and not isinstance(node, bool) and 0 <= node < n
