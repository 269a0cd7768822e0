"""Base-(k+1) graphs: rounds of pairwise averages after which any number of nodes holds the exact mean.

Paper: Y. Takezawa et al., "Beyond exponential graph", 2023, whose idea this is; the construction is our own.
Letters: n nodes, at most k neighbours at one round; f_l the prime-bounded factors of n.

Every round is symmetric and doubly stochastic; there are at most 2 log_{k+1}(n) + 2 of them.
"""

from collections.abc import Sequence

Round = dict[tuple[int, int], float]
"""(sender, receiver) -> share, for all ordered pairs of neighbours of one round."""


def base_graph(num_nodes: int, *, degree: int) -> list[Round]:
    """Return the rounds of one period.

    Example:
        >>> len(base_graph(5, degree=1))
        5
    """
    n, base = num_nodes, degree + 1
    nodes = list(range(n))
    p = n // _without_small_factors(n, base)
    q = n // p
    candidates = [_simple(nodes, base)]
    if p > 1 and q > 1:
        blocks = [_simple(nodes[i * q : (i + 1) * q], base) for i in range(p)]
        across = [_hyper([i * q + j for i in range(p)], base) for j in range(q)]
        candidates.append(_side_by_side(blocks) + _side_by_side(across))
    return min(candidates, key=len)


def _without_small_factors(n: int, base: int) -> int:
    for factor in range(2, base + 1):
        while n % factor == 0:
            n //= factor
    return n


def _factors(n: int, base: int) -> list[int]:
    """Cut n into factors of at most `base`, the largest first."""
    found: list[int] = []
    for factor in range(base, 1, -1):
        while n % factor == 0:
            found.append(factor)
            n //= factor
    return found


def _side_by_side(parts: Sequence[list[Round]]) -> list[Round]:
    """Run equally long sequences of disjoint nodes at once."""
    return [{pair: w for part in parts for pair, w in part[t].items()} for t in range(len(parts[0]))]


def _hyper(nodes: Sequence[int], base: int) -> list[Round]:
    """Average groups that agree in all mixed-radix digits but one, digit after digit."""
    rounds: list[Round] = []
    stride = 1
    for factor in _factors(len(nodes), base):
        links: Round = {}
        for place, node in enumerate(nodes):
            digit = place // stride % factor
            for other in range(factor):
                if other != digit:
                    links[node, nodes[place + (other - digit) * stride]] = 1 / factor
        rounds.append(links)
        stride *= factor
    return rounds


def _simple(nodes: Sequence[int], base: int) -> list[Round]:
    """Return rounds for any number of nodes: average groups of powers of `base`, then even them out."""
    n = len(nodes)
    if _without_small_factors(n, base) == 1:
        return _hyper(nodes, base)
    groups = _groups(nodes, base)
    within = [_hyper(sum(parts, []), base) for parts in groups]
    rounds: list[Round] = []
    for t in range(len(within[0])):
        rounds.append({pair: w for hyper in within if hyper for pair, w in hyper[t % len(hyper)].items()})
    sizes = [sum(map(len, parts)) for parts in groups]
    inside = [[_hyper(part, base) for part in parts] for parts in groups]
    for t in range(1 + len(inside[0][0])):
        links: Round = {}
        if t < len(groups) - 1:
            links |= _hand_over(
                groups[t], [u for parts in groups[t + 1 :] for part in parts for u in part], sizes[t:]
            )
        for received in range(min(t, len(groups) - 1)):
            for hyper in inside[received]:
                if t - received - 1 < len(hyper):
                    links |= hyper[t - received - 1]
        rounds.append(links)
    return rounds


def _groups(nodes: Sequence[int], base: int) -> list[list[list[int]]]:
    """Cut nodes by the digits of their number, the largest first: groups of `digit` parts of base^p nodes."""
    power = 1
    while power * base <= len(nodes):
        power *= base
    groups: list[list[list[int]]] = []
    start = 0
    while power:
        digit = (len(nodes) - start) // power
        if digit:
            groups.append([list(nodes[start + i * power : start + (i + 1) * power]) for i in range(digit)])
            start += digit * power
        power //= base
    return groups


def _hand_over(parts: Sequence[list[int]], later: Sequence[int], sizes: Sequence[int]) -> Round:
    """Link every later node to one unused node of each part, whose mean thus becomes that of all."""
    share = sizes[0] / sum(sizes) / len(parts)
    links: Round = {}
    for part in parts:
        for node, other in zip(later, part, strict=False):
            links[node, other] = links[other, node] = share
    return links
