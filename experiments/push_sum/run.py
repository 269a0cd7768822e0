"""Gossip on four graphs: SGP, SGAP, with momentum, and SADDOPT; see README.md.

hardy reproduce push_sum            # minutes on two cores
hardy reproduce push_sum --smoke    # seconds, proves nothing but that it runs
"""

import itertools
import statistics
import sys
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import problem  # noqa: E402  the path is set above
import torch  # noqa: E402
from claims import Study, main  # noqa: E402

from hardy.distributed.gossip.config import TopologyConfig  # noqa: E402
from hardy.distributed.gossip.topology import Topology  # noqa: E402
from hardy.reference import push_sum as twin  # noqa: E402
from hardy.rng import generator_for  # noqa: E402

ETA, STEPS, SMOKE_STEPS, SEEDS = 0.05, 500, 3, (0, 1, 2)
GRAPHS = ("full", "double_clique", "random_edges", "one_peer_exponential")
METHODS = {
    "SGP": {},
    "SGAP, k 1": {"gate": twin.Gate(1.0)},
    "SADDOPT": None,
    "MSGP": {"mu": 0.8},
    "MSGAP, k 1": {"mu": 0.8, "gate": twin.Gate(1.0)},
}
RATES = {f"SGAP, k {k:g}": {"gate": twin.Gate(k)} for k in (10.0, 0.1, 0.01)}
"""Further k, on the clouds and the double clique alone."""
CELLS = [
    *itertools.product(problem.DATA, METHODS, GRAPHS, SEEDS),
    *(("clouds", method, "double_clique", seed) for method in RATES for seed in SEEDS),
]


def sends(graph, t):
    """Return who sends to whom, [N, N], senders in columns, each also to itself."""
    A = torch.eye(problem.N)
    for sender, shares in enumerate(graph.at(t).shares):
        A[list(shares), sender] = 1
    return A


def measured(cell, *, steps):
    """Train one cell; return accuracy of the average of all z, mean accuracy of the nodes, mean distance."""
    data, method, graph_name, seed = cell
    torch.set_num_threads(1)
    options = (METHODS | RATES)[method]
    graph = Topology(TopologyConfig(name=graph_name, seed=seed), num_nodes=problem.N)
    (x, y), test = problem.DATA[data]()
    owned, draws = problem.halves(y), generator_for(seed, "batches")

    def grad(z, _t):
        picked = torch.randint(owned.shape[1], (problem.N, problem.B), generator=draws)
        examples = owned.gather(1, picked)
        return problem.gradients(z, x[examples], y[examples])

    nodes = twin.start(problem.weights(seed).expand(problem.N, -1))
    for t in range(steps):
        A = sends(graph, t)
        if options is None:
            twin.saddopt(nodes, grad, twin.uniform(A), eta=ETA)
        else:
            twin.push(nodes, grad, A, eta=ETA, **options)
    z = nodes.z
    mean = z.mean(0, keepdim=True)
    return {
        "average": problem.accuracies(mean, *test).item(),
        "node": problem.accuracies(z, *test).mean().item(),
        "distance": (z - mean).square().sum(1).mean().item(),
        "least_mass": nodes.a.min().item(),
    }


def means(measured):
    """Return (data, method, graph) -> mean over seeds of every number; some files hold means only."""
    return {
        tuple(row["cell"]): {
            name: statistics.fmean(value) if isinstance(value, list) else value
            for name, value in row.items()
            if name != "cell"
        }
        for row in measured["rows"]
    }


def claimed(measured):
    """Return the numbers that claims are about."""
    found = means(measured)

    def over_graphs(data, method, name):
        return [found[data, method, graph][name] for graph in GRAPHS]

    sgp, sgap = (found["clouds", method, "double_clique"] for method in ("SGP", "SGAP, k 10"))
    far = [
        b / a
        for data in problem.DATA
        for a, b in zip(
            over_graphs(data, "SGP", "distance")[1:],
            over_graphs(data, "SGAP, k 1", "distance")[1:],
            strict=True,
        )
    ]
    return {
        "sgp_double_clique": sgp["average"],
        "sgap_double_clique": sgap["average"],
        "sgap_distance_over_sgp": sgap["distance"] / sgp["distance"],
        "least_sgap_distance_over_sgp": min(far),
        "saddopt_distance_over_sgp": found["clouds", "SADDOPT", "double_clique"]["distance"]
        / sgp["distance"],
        "least_on_digits": min(min(over_graphs("digits", method, "average")) for method in METHODS),
    }


def table(results):
    """Return the table of results as text."""
    lines = ["| data, method | " + " | ".join(graph.replace("_", " ") for graph in GRAPHS) + " |"]
    lines.append("|---|" + "---|" * len(GRAPHS))
    found = means(results)
    for data, method in dict.fromkeys((data, method) for data, method, _ in found):
        cells = []
        for graph in GRAPHS:
            row = found.get((data, method, graph))
            cells.append(f"{row['average']:.3f} / {row['node']:.3f} / {row['distance']:.1e}" if row else "–")
        lines.append(f"| {data}, {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(trials, is_smoke):
    """Train every cell; what is kept of a cell are its numbers, seed by seed."""
    cells = [cell for cell in CELLS if cell[3] == SEEDS[0]] if is_smoke else CELLS
    work = partial(measured, steps=SMOKE_STEPS if is_smoke else STEPS)
    rows = {}
    for (*key, _), numbers in trials.run(work, cells, label=lambda c: ", ".join(map(str, c))).items():
        row = rows.setdefault(tuple(key), {"cell": key} | {name: [] for name in numbers})
        for name, value in numbers.items():
            row[name].append(value)
    return {"rows": list(rows.values())}


def of_seed(found, place):
    """Return what one seed gave."""
    rows = [
        {name: value if name == "cell" else value[place : place + 1] for name, value in row.items()}
        for row in found["rows"]
    ]
    return {"rows": rows}


STUDY = Study(
    folder=FOLDER,
    about=__doc__,
    measure=measure,
    numbers=claimed,
    tables=table,
    seeds=SEEDS,
    of_seed=of_seed,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
