"""The adaptive recipe's parts: AdamW, a clip that knows the gradient's history, a decay driven by progress.

Paper: Chen et al., "Adaptive Optimization for Enhanced Efficiency in LLM Training", 2024 (arXiv 2412.04718).
Its full text could not be obtained: the abstract names Adam, clipping and a decay "based on performance
metrics", no formula and no constant. The formulas here are a precise reading of it, every constant is ours.

Letters: t step from 1, T planned steps, w warm-up steps, eta learning rate, lam weight decay, g gradient, m
and v its moments, n global norm, c clip coefficient, gam history of clipped norms, C decay clock, s stall
score, a mean improvement, v mean metric of an interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


def adamw(
    W: Tensor, gs: Sequence[Tensor], *, eta: float, b1: float, b2: float, eps: float, lam: float
) -> list[Tensor]:
    """Return the weights after each gradient of `gs`."""
    W = W.double()
    m = v = torch.zeros_like(W)
    Ws: list[Tensor] = []
    for t, g in enumerate((g.double() for g in gs), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        W = (1 - eta * lam) * W - eta * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        Ws.append(W)
    return Ws


@dataclass(frozen=True, kw_only=True)
class Guard:
    """GradGuard with a global history: its settings, and what it remembers."""

    max_norm: float | None = 1.0
    factor: float | None = 2.0
    """Times the history is the limit; None: no history."""
    beta: float = 0.98
    warmup: int = 50
    gam: float = 0.0
    count: int = 0
    clipped: int = 0
    skipped: int = 0
    run: int = 0
    """Skipped steps in a row."""

    def see(self, gs: Sequence[Tensor]) -> tuple["Guard", float, bool]:
        """Return the guard after this step's gradients, c, and whether the step must be skipped."""
        S2 = sum((g.double() ** 2).sum().item() for g in gs)
        if not math.isfinite(S2):
            return replace(self, skipped=self.skipped + 1, run=self.run + 1), 1.0, True
        n = math.sqrt(S2)
        lim = math.inf if self.max_norm is None else self.max_norm
        if self.factor is not None and self.count >= self.warmup and self.gam > 0:
            lim = min(lim, self.factor * self.gam)
        c = lim / n if n > lim else 1.0
        gam, count = self.gam, self.count
        if n > 0:
            b = min(self.beta, count / (count + 1))
            gam, count = b * gam + (1 - b) * n * c, count + 1
        return replace(self, gam=gam, count=count, clipped=self.clipped + (c < 1), run=0), c, False


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Settings of PerfExpDecay."""

    eta_0: float
    T: int
    w: int
    final_slow: float = 0.3
    final_fast: float = 0.01
    interval: int = 1
    target: float = 0.005
    beta: float = 0.5
    delay: int = 0
    """Steps from the end of an interval until its mean counts."""
    mode: Literal["perf", "time", "plateau"] = "perf"
    better: Literal["min", "max"] = "min"
    shrink: float = 0.5
    patience: int = 3
    threshold: float = 1e-3
    cooldown: int = 1


def perf_exp_decay(metrics: Sequence[float], d: Decay) -> list[float]:
    """Return the learning rate of each step whose metric is given.

    Intervals begin after the warm-up. The rate of step t is set before its metric is seen; the mean of an
    interval that ends with step t counts from step t + delay + 1 on.
    """
    k_slow, k_fast = (-math.log(final) / (d.T - d.w) for final in (d.final_slow, d.final_fast))
    progress = Plateau(d) if d.mode == "plateau" else Progress(d)
    C, etas, waiting = 0.0, list[float](), dict[int, float]()
    for t in range(1, len(metrics) + 1):
        if t > d.w and d.mode != "plateau":
            C += k_slow + progress.s * (k_fast - k_slow)
        etas.append(d.eta_0 * min(1.0, t / max(d.w, 1)) * max(math.exp(-C), d.final_fast))
        if t > d.w and (t - d.w) % d.interval == 0:
            waiting[t + d.delay] = sum(metrics[t - d.interval : t]) / d.interval
        if t in waiting and math.isfinite(waiting[t]) and d.mode != "time":
            C += progress.observe(waiting[t])
    return etas


class Progress:
    """The stall score s: 0 while the metric improves by the target, 1 when it stands still."""

    def __init__(self, d: Decay):
        self.d, self.s = d, 0.0
        self.a: float | None = None
        self.prev: float | None = None

    def observe(self, v: float) -> float:
        """Take the mean of an interval; return by how much the decay clock jumps, which is never."""
        if self.prev is not None:
            imp = (self.prev - v) / max(abs(self.prev), 1e-12) * (1 if self.d.better == "min" else -1)
            self.a = imp if self.a is None else self.d.beta * self.a + (1 - self.d.beta) * imp
            self.s = min(max(1 - self.a / self.d.target, 0.0), 1.0)
        self.prev = v
        return 0.0


class Plateau:
    """Mode 'plateau': instead of decaying, the rate shrinks when nothing improves the best for a while."""

    s = 0.0

    def __init__(self, d: Decay):
        self.d, self.best, self.bad, self.cool = d, math.inf, 0, 0

    def observe(self, v: float) -> float:
        """Take the mean of an interval; return by how much the decay clock jumps."""
        if self.cool:
            self.cool -= 1
            return 0.0
        v = v if self.d.better == "min" else -v
        if self.best == math.inf or v < self.best - self.d.threshold * abs(self.best):
            self.best, self.bad = v, 0
            return 0.0
        self.bad += 1
        if self.bad < self.d.patience:
            return 0.0
        self.bad, self.cool = 0, self.d.cooldown
        return math.log(1 / self.d.shrink)
