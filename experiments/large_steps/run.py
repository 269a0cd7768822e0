"""Large steps: from logistic regression to the perceptron; see README.md.

hardy reproduce large_steps            # a few minutes on two cores
hardy reproduce large_steps --smoke    # seconds, proves nothing but that it runs
"""

import sys
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import problems  # noqa: E402  the path is set above
import torch  # noqa: E402
from claims import Study, main  # noqa: E402
from tables import PUBLISHED, TABLE, numbers, tables  # noqa: E402

from hardy.linear import SolverConfig, solve  # noqa: E402
from hardy.reference import local_gd  # noqa: E402
from hardy.reference import perceptron as twin  # noqa: E402

GAMMAS = (0.1, 1.0, 10.0, 100.0)
NLR, LR, BP = "normalized_logistic", "logistic", "batch_perceptron"
COUNTS = [
    *((data, method, gamma) for data in problems.DATA for method in (NLR, LR) for gamma in GAMMAS),
    *((data, LR, 1e5) for data in problems.DATA),
    *((data, method, None) for data in problems.DATA for method in (NLR, BP, "normalized_batch_perceptron")),
]
"""Data, method and step size; none is the default of the library, or no step size at all."""
MARGINS = [(method, gamma) for method in (LR, NLR) for gamma in (0.1, 1.0, 100.0)]
TIMES = (100, 1000, 10_000)
SEEDS = range(5)


def count(cell, *, is_smoke):
    """Return the steps until all margins are positive; None where they do not suffice."""
    data, method, gamma = cell
    Z = problems.DATA[data]()
    config = SolverConfig(method=method, gamma=gamma, max_iter=200 if is_smoke else 100_000)
    found = solve(Z, torch.ones(len(Z), 1), config)
    return found.num_iter.item() if found.converged.all() else None


def overlay():
    """Return the largest distance of gradient descent over gamma to the batch perceptron, 12 steps."""
    Z = problems.balanced()
    limit = [theta for _, theta in zip(range(13), twin.path(twin.bp, Z), strict=False)]
    gaps = {}
    for gamma in (1e1, 1e2, 1e3, 1e4, 1e6):
        path = twin.path(twin.lr, Z, gamma)
        gaps[f"{gamma:g}"] = max((next(path) / gamma - theta).abs().max().item() for theta in limit)
    return gaps


def two_points(gamma):
    """Return loss, length of its gradient and misclassified rows, step by step."""
    Z = twin.two_points()
    trace = solve(Z, torch.ones(2, 1), SolverConfig(method=LR, gamma=gamma), trace=True).trace
    return {name: getattr(trace, name)[:, 0].tolist() for name in ("loss", "gradient_norm", "misclassified")}


def after_separation(cell, *, is_smoke):
    """Return 1 - cos of the angle to the max-margin direction after 100, 1,000 and 10,000 steps."""
    method, gamma = cell
    Z = problems.margin_points()
    best = best_direction(Z)
    times = TIMES[:1] if is_smoke else TIMES
    path, gaps = twin.path(twin.METHODS[method], Z, gamma), []
    for t in range(times[-1] + 1):
        theta = next(path)
        if t in times:
            gaps.append(1 - torch.nn.functional.cosine_similarity(theta, best, dim=0).item())
    return gaps


def best_direction(Z):
    """Return the direction of largest margin: the shortest w with all margins at least 1."""
    w = local_gd.project(torch.zeros(Z.shape[1], dtype=torch.float64), local_gd.nodes([Z]), sweeps=3000)[0]
    return w / w.norm()


def digit(seed):
    return problems.digit_accuracies(seed)


def layers(seed, *, is_smoke):
    return problems.layer_accuracies(seed, is_smoke=is_smoke)


def measure(trials, is_smoke):
    """Run everything."""
    seeds = SEEDS[:1] if is_smoke else SEEDS
    name = " ".join
    counts = trials.run(
        partial(count, is_smoke=is_smoke), COUNTS, label=lambda cell: name(map(str, ("steps", *cell)))
    )
    gaps = trials.run(
        partial(after_separation, is_smoke=is_smoke),
        MARGINS,
        label=lambda cell: name(map(str, ("margin", *cell))),
    )
    points = problems.margin_points()
    return {
        "counts": [[*cell, found] for cell, found in counts.items()],
        "overlay": overlay(),
        "two_points": {f"{gamma:g}": two_points(gamma) for gamma in (10.0, 100.0)},
        "after": [[*cell, found] for cell, found in gaps.items()],
        "after_points": [len(points), (points @ best_direction(points)).min().item()],
        "digits": list(trials.run(digit, seeds, label=lambda seed: f"digits, seed {seed}").values()),
        "layers": list(
            trials.run(
                partial(layers, is_smoke=is_smoke), seeds[:3], label=lambda seed: f"layers, seed {seed}"
            ).values()
        ),
    }


def draw(measured, folder):
    """Draw the loss that misleads, and the counts of the worst case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    for gamma, found in measured["two_points"].items():
        left.plot(found["loss"], "o-", label=f"loss, step size {gamma}")
    left.plot(measured["two_points"]["100"]["misclassified"], "k:", label="misclassified rows")
    left.set(xlabel="step", title="two points: the loss misleads")
    left.legend(fontsize=8)
    sizes = sorted(TABLE)
    held = {(data, method, gamma): found for data, method, gamma, found in measured["counts"]}
    for method, text in ((NLR, "normalised"), (LR, "plain")):
        for gamma in (1.0, 100.0):
            steps = [held[f"worst case, n = {n}", method, gamma] or float("nan") for n in sizes]
            right.loglog(sizes, steps, "o-", label=f"{text}, step size {gamma:g}")
    right.set(xlabel="rows", title="worst case: steps")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "steps.png", dpi=120)
    pyplot.close(figure)


STUDY = Study(folder=FOLDER, about=__doc__, measure=measure, numbers=numbers, tables=tables, draw=draw)
assert set(PUBLISHED) <= set(COUNTS)

if __name__ == "__main__":
    sys.exit(main(STUDY))
