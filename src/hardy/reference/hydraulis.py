"""Hydraulis in plain float64: cost, both stages of the assignment, the choice of a strategy.

Paper: Hydraulis (arXiv 2412.07894), by the equations of its published code. Letters: a, b, c cost of a
scheme, S cap of tokens, g ranks, p pipeline stages, tau = a s^2 + b s, v packs, T time of a replica
T = sum of t(m) + (p - 1) max t(m), t(m) = c + sum of tau.

Differs from the paper: assignments are the best there are, by trying all, so only for a few sequences.
"""

from dataclasses import dataclass
from itertools import product

INF = float("inf")


@dataclass(frozen=True)
class Replica:
    """One replica's scheme."""

    a: float
    b: float
    c: float
    S: int
    g: int = 1
    p: int = 1

    def tau(self, s: int) -> float:
        """Time of one sequence."""
        return self.a * s * s + self.b * s


def replica_time(k: Replica, packs: list[list[int]]) -> float:
    t = [k.c + sum(k.tau(s) for s in pack) for pack in packs if pack]
    return sum(t) + (k.p - 1) * max(t, default=0.0)


def best_packing(k: Replica, sequences: list[int]) -> float:
    """Least time of one replica over all ways of packing under its cap."""
    best = INF if sequences else 0.0
    for places in product(range(len(sequences)), repeat=len(sequences)):
        packs: list[list[int]] = [[] for _ in sequences]
        for s, place in zip(sequences, places, strict=True):
            packs[place].append(s)
        if all(sum(pack) <= k.S for pack in packs):
            best = min(best, replica_time(k, packs))
    return best


def best_dispatch(replicas: list[Replica], sequences: list[int]) -> float:
    """Least time of the slowest replica over all ways of giving out and packing the sequences."""
    best = INF
    for places in product(range(len(replicas)), repeat=len(sequences)):
        own = [
            [s for s, place in zip(sequences, places, strict=True) if place == j]
            for j in range(len(replicas))
        ]
        best = min(best, max(best_packing(k, mine) for k, mine in zip(replicas, own, strict=True)))
    return best


def best_strategy(strategies: list[list[Replica]], sequences: list[int], bridge: float, before: int) -> float:
    """Least time over strategies; another one than `before` costs `bridge`."""
    return min(
        best_dispatch(replicas, sequences) + (0.0 if index == before else bridge)
        for index, replicas in enumerate(strategies)
    )


def proposal_time(lengths: list[int], schemes: list[Replica], N: int) -> float:
    """t[N][S] of the dynamic program over lengths, by its recursion: shorter ones beside them."""
    edges = [0, *sorted(set(lengths))]

    def cost(k: Replica, x: int, y: int) -> float:
        inside = [s for s in lengths if x < s <= y]
        bubble = (k.p - 1) * (k.tau(max(inside)) + k.c)
        return sum(k.tau(s) + k.c for s in inside) + bubble

    def t(n: int, s: int) -> float:
        if s == 0:
            return 0.0
        best = INF
        for k in schemes:
            if k.S < edges[s]:
                continue
            for r in range(1, n // k.g + 1):
                for s0 in range(s):
                    best = min(best, max(t(n - r * k.g, s0), cost(k, edges[s0], edges[s]) / r))
        return best

    return t(N, len(edges) - 1)
