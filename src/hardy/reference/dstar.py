"""dSTAR-style filter and its relatives: rows against the gradient of a small trusted batch, one at a time.

Paper: J. Yan, P. Chaudhari, L. Kleinrock, "dSTAR: Straggler Tolerant and Byzantine Resilient Distributed
SGD", 2024 (arXiv 2412.07151). Letters: g_i rows, g_v trusted gradient, c factor, delta normalised distance,
m median of delta, H its history, T_w warm-up, W window, A accepted rows, u result.

Differs from the paper: a reconstruction; normalisation, history and all numbers are ours.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The letters that stay the same."""

    scale: Literal["clip", "unit", "none"] = "clip"
    threshold: Literal["history", "current", "min"] = "history"
    W: int = 20
    T_w: int = 10
    slack: float = 0.1
    empty_limit: int = 5


@dataclass(frozen=True, kw_only=True)
class State:
    """What is carried from step to step, and the last step's A and u for whoever compares."""

    t: int = 0
    H: tuple[float, ...] = ()
    empties: int = 0
    A: tuple[int, ...] = ()
    u: Tensor | None = None


def lower_median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def step(x: State, G: Tensor, g_v: Tensor, s: Settings) -> State:
    scaled = [factor(g, g_v, s) * g for g in G]
    delta = [((g - g_v).norm() / g_v.norm()).item() for g in scaled]
    m = lower_median(delta)
    H = (*x.H, m)[-s.W :]
    bound = m
    if x.empties < s.empty_limit and x.t >= s.T_w and s.threshold != "current":
        bound = lower_median(list(H))
        if s.threshold == "min":
            bound = min(m, (1 + s.slack) * bound)
    A = tuple(i for i in range(len(G)) if delta[i] <= bound and G[i] @ g_v > 0)
    u = average([scaled[i] for i in A]) if A else g_v
    empties = 0 if A or x.empties >= s.empty_limit else x.empties + 1
    return replace(x, t=x.t + 1, H=H, empties=empties, A=A, u=u)


def factor(g: Tensor, g_v: Tensor, s: Settings) -> float:
    if s.scale == "none" or g.norm() == 0:
        return 1.0
    ratio = (g_v.norm() / g.norm()).item()
    return min(1.0, ratio) if s.scale == "clip" else ratio


def dstar(Gs: list[Tensor], g_vs: list[Tensor], s: Settings) -> list[State]:
    """Return the states after each step."""
    x, states = State(), []
    for G, g_v in zip(Gs, g_vs, strict=True):
        x = step(x, G.double(), g_v.double(), s)
        states.append(x)
    return states


def average(rows: list[Tensor]) -> Tensor:
    total = 0 * rows[0]
    for row in rows:
        total = total + row
    return total / len(rows)


def fltrust(G: Tensor, g_v: Tensor) -> Tensor:
    cosines = [max((g @ g_v / (g.norm() * g_v.norm())).item(), 0.0) for g in G]
    if not sum(cosines):
        return g_v
    total = 0 * g_v
    for s, g in zip(cosines, G, strict=True):
        total = total + s * g * g_v.norm() / g.norm()
    return total / sum(cosines)


def zeno_plus_plus(G: Tensor, g_v: Tensor, rho: float = 0.0, eps: float = 0.0) -> Tensor:
    scaled = [g * g_v.norm() / g.norm() for g in G]
    kept = [g for g in scaled if g_v @ g - rho * g @ g >= -eps]
    return average(kept) if kept else g_v


def diversefl(G: Tensor, g_v: Tensor, e2: float = 0.5, e3: float = 2.0) -> Tensor:
    kept = [g for g in G if g @ g_v > 0 and e2 < g.norm() / g_v.norm() < e3]
    return average(kept) if kept else g_v


def kardam(Gs: list[Tensor], f: int, first: Tensor) -> list[Tensor]:
    """Return the vectors of the steps, all workers taking part in each; `first` is that of the first step."""
    n, us = len(Gs[0]), [first]
    for before, G in zip(Gs[:-1], Gs[1:], strict=True):
        K = [((g - old).norm() / us[-1].norm()).item() for g, old in zip(G, before, strict=True)]
        bound = sorted(K)[n - f - 1]
        kept = [g for g, K_i in zip(G, K, strict=True) if K_i <= bound]
        us.append(average(kept))
    return us
