"""Rules that make one vector of many, row by row and coordinate by coordinate.

Letters: X [n, d] rows x_i, f of them may be anything, D2 squared distances, y sorted values of a coordinate,
w weights, v last vector, tau radius, c trust left or factor, s bucket size.
Formulas: P. Blanchard et al. 2017 (Krum); D. Yin et al. 2018 (median, trimmed mean); C. Xie et al. 2018 (mean
around the median, Phocas); E. M. El Mhamdi et al. 2018 (Bulyan, MDA); K. Pillutla et al. 2019 (Weiszfeld);
S. P. Karimireddy et al. 2021 (centred clipping); Z. Allen-Zhu et al. 2021 (judging by what was sent before).

Differs from the papers: the geometric median starts from the half of the rows nearest to the most
central one.
"""

import itertools

import torch
from torch import Tensor


def mean(X: Tensor) -> Tensor:
    return X.sum(0) / len(X)


def distances(X: Tensor) -> Tensor:
    return torch.stack([torch.stack([((x - z) ** 2).sum() for z in X]) for x in X])


def nearest(x: Tensor, X: Tensor, count: int) -> list[int]:
    """Return the places of the rows nearest to `x`; of equals the first."""
    return sorted(range(len(X)), key=lambda i: ((X[i] - x) ** 2).sum().item())[:count]


def krum_scores(X: Tensor, f: int, m: int | None = None) -> list[float]:
    m = max(len(X) - f - 2, 1) if m is None else m
    D2 = distances(X)
    return [sum(sorted(D2[i, j].item() for j in range(len(X)) if j != i)[:m]) for i in range(len(X))]


def krum(X: Tensor, f: int) -> Tensor:
    return multi_krum(X, f, keep=1)


def multi_krum(X: Tensor, f: int, keep: int | None = None) -> Tensor:
    scores = krum_scores(X, f)
    return mean(X[sorted(range(len(X)), key=scores.__getitem__)[: keep or len(X) - f]])


def by_coordinate(X: Tensor, rule) -> Tensor:
    return torch.tensor([rule(sorted(column.tolist())) for column in X.T], dtype=torch.float64)


def middle(y: list[float]) -> float:
    return (y[(len(y) - 1) // 2] + y[len(y) // 2]) / 2


def around(y: list[float], centre: float, count: int) -> float:
    """Return the mean of the values nearest to `centre`; of two equally near the smaller."""
    return sum(sorted(y, key=lambda value: (abs(value - centre), value))[:count]) / count


def median(X: Tensor) -> Tensor:
    return by_coordinate(X, middle)


def trimmed_mean(X: Tensor, f: int) -> Tensor:
    return by_coordinate(X, lambda y: sum(y[f : len(y) - f]) / (len(y) - 2 * f))


def meamed(X: Tensor, f: int) -> Tensor:
    return by_coordinate(X, lambda y: around(y, middle(y), len(y) - f))


def phocas(X: Tensor, f: int) -> Tensor:
    return by_coordinate(X, lambda y: around(y, sum(y[f : len(y) - f]) / (len(y) - 2 * f), len(y) - f))


def sign_majority(X: Tensor) -> Tensor:
    return torch.sign(torch.sign(X).sum(0))


def bulyan(X: Tensor, f: int) -> Tensor:
    left, picked = list(range(len(X))), []
    while len(picked) < len(X) - 2 * f:
        scores = krum_scores(X[left], f, m=max(len(left) - f - 2, 1)) if len(left) > 1 else [0.0]
        picked.append(left.pop(scores.index(min(scores))))
    return by_coordinate(X[picked], lambda y: around(y, middle(y), len(y) - 2 * f))


def geometric_median(X: Tensor, rounds: int = 100, tolerance: float = 1e-6) -> Tensor:
    reach = distances(X).sqrt()
    central = min(range(len(X)), key=lambda i: reach[i].sum().item())
    core = nearest(X[central], X, (len(X) + 1) // 2)
    w = torch.tensor([(i in core) / len(core) for i in range(len(X))], dtype=torch.float64)
    nu = 1e-6 * (X - w @ X).norm(dim=1).median().clamp(min=1e-300)
    for _ in range(rounds):
        before = w
        w = 1 / torch.maximum((X - w @ X).norm(dim=1), nu)
        w = w / w.sum()
        if (w - before).abs().sum() < tolerance:
            break
    return w @ X


def centered_clip(X: Tensor, v: Tensor, rounds: int = 3, tau: float | None = None) -> Tensor:
    for _ in range(rounds):
        reach = [(x - v).norm().item() for x in X]
        radius = sorted(reach)[(len(X) - 1) // 2] if tau is None else tau
        v = v + mean(
            torch.stack([(x - v) * min(1.0, radius / max(r, 1e-300)) for x, r in zip(X, reach, strict=True)])
        )
    return v


def mda(X: Tensor, f: int) -> Tensor:
    return mean(X[mda_kept(X, f)])


def mda_kept(X: Tensor, f: int) -> list[int]:
    D2 = distances(X)
    subsets = itertools.combinations(range(len(X)), len(X) - f)
    return list(min(subsets, key=lambda s: max(D2[i, j].item() for i in s for j in s)))


def by_history(Xs: list[Tensor], f: int, beta: float, before, kept) -> list[Tensor]:
    """Return the mean, step by step, of the rows whose averages so far are `kept`; `before` shortens rows."""
    a, us = torch.zeros_like(Xs[0]), []
    for t, X in enumerate(Xs, start=1):
        a = beta * a + (1 - beta) * before(X, f)
        us.append(mean(before(X, f)[kept(a / (1 - beta**t), f)]))
    return us


def smea(X: Tensor, f: int) -> Tensor:
    def top(subset: tuple[int, ...]) -> float:
        return torch.linalg.matrix_norm(X[list(subset)] - mean(X[list(subset)]), 2).item()

    return mean(X[list(min(itertools.combinations(range(len(X)), len(X) - f), key=top))])


def monna(X: Tensor, f: int, own: int) -> Tensor:
    return mean(X[[own, *(i for i in nearest(X[own], X, len(X)) if i != own)][: len(X) - f]])


def caf(X: Tensor, f: int) -> Tensor:
    c, best, smallest = torch.ones(len(X), dtype=torch.float64), mean(X), torch.inf
    while c.sum() > len(X) - 2 * f:
        mu = c @ X / c.sum()
        covariance = sum(c_i * torch.outer(x - mu, x - mu) for c_i, x in zip(c, X, strict=True)) / c.sum()
        values, vectors = torch.linalg.eigh(covariance)
        if values[-1] < smallest:
            best, smallest = mu, values[-1]
        scores = ((X - mu) @ vectors[:, -1]) ** 2
        if values[-1] <= 1e-12 * c @ (X**2).sum(1) / c.sum():
            break
        c = c * (1 - scores / max(s for s, c_i in zip(scores, c, strict=True) if c_i > 0)).clamp(min=0)
    return best


def dnc_kept(X: Tensor, f: int, c: float = 1.0) -> list[int]:
    centred = X - mean(X)
    scores = (centred @ torch.linalg.svd(centred).Vh[0]) ** 2
    return sorted(range(len(X)), key=lambda i: scores[i].item())[: len(X) - int(c * f)]


def dnc(X: Tensor, f: int, c: float = 1.0) -> Tensor:
    return mean(X[dnc_kept(X, f, c)])


def dnc_subsampled(X: Tensor, f: int, draws: list[list[int]], c: float = 1.0) -> Tensor:
    """Return the mean of the rows kept most often, each time by the columns of one draw."""
    kept = [i for columns in draws for i in dnc_kept(X[:, columns], f, c)]
    most = max(kept.count(i) for i in range(len(X)))
    return mean(X[[i for i in range(len(X)) if kept.count(i) == most]])


def cge(X: Tensor, f: int) -> Tensor:
    return mean(X[nearest(0 * X[0], X, len(X) - f)])


def aksel(X: Tensor) -> Tensor:
    return mean(X[nearest(median(X), X, (len(X) + 1) // 2)])


def norm_clip(X: Tensor, tau: float | None = None) -> Tensor:
    tau = sorted(x.norm().item() for x in X)[(len(X) - 1) // 2] if tau is None else tau
    return mean(torch.stack([x * min(1.0, tau / max(x.norm().item(), 1e-300)) for x in X]))


def norm_screen(X: Tensor, c: float = 2.0) -> Tensor:
    bound = c * sorted(x.norm().item() for x in X)[(len(X) - 1) // 2]
    return mean(torch.stack([x for x in X if x.norm() <= bound]))


def nnm(X: Tensor, f: int) -> Tensor:
    return torch.stack([monna(X, f, own) for own in range(len(X))])


def bucketing(X: Tensor, s: int, order: list[int]) -> Tensor:
    return torch.stack([mean(X[order[k : k + s]]) for k in range(0, len(X), s)])


def clip(X: Tensor, c: float) -> Tensor:
    return torch.stack([x * min(1.0, c / max(x.norm().item(), 1e-300)) for x in X])


def arc(X: Tensor, f: int) -> Tensor:
    n = len(X)
    return clip(X, sorted(x.norm().item() for x in X)[n - int(2 * f * (n - f) / n) - 1])
