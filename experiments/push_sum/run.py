"""Gossip on four graphs: SGP, SGAP, with momentum, and SADDOPT; see README.md.

python experiments/push_sum/run.py            # 2 1/2 minutes on one core
python experiments/push_sum/run.py --smoke    # seconds, proves nothing but that it runs
python experiments/push_sum/run.py --report   # writes the tables of README.md from results/comparison.json
"""

import itertools
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import problem  # noqa: E402  the path is set above
import torch  # noqa: E402
from claims import command_line, generated, verdict, write_results  # noqa: E402

from hardy.distributed.gossip.config import TopologyConfig  # noqa: E402
from hardy.distributed.gossip.topology import Topology  # noqa: E402
from hardy.reference import push_sum as twin  # noqa: E402
from hardy.rng import generator_for  # noqa: E402

ETA, STEPS, SEEDS = 0.05, 500, (0, 1, 2)
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


def means(rows):
    """Return (data, method, graph) -> mean over seeds of every number."""
    found = {}
    for (data, method, graph, _), numbers in rows:
        found.setdefault((data, method, graph), []).append(numbers)
    return {
        key: {name: sum(row[name] for row in values) / len(values) for name in values[0]}
        for key, values in found.items()
    }


def claimed(found):
    """Return the numbers that claims are about."""

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
    found = {tuple(row["cell"]): row for row in results["rows"]}
    for data, method in dict.fromkeys((data, method) for data, method, _ in found):
        cells = []
        for graph in GRAPHS:
            row = found.get((data, method, graph))
            cells.append(f"{row['average']:.3f} / {row['node']:.3f} / {row['distance']:.1e}" if row else "–")
        lines.append(f"| {data}, {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


page = partial(generated, FOLDER, table_of=table)
"""From the text of README.md to the text with tables made anew."""


def main():
    """Run all cells and say what holds."""
    options = command_line(FOLDER, __doc__, page)
    if options is None:
        return 0
    cells = [cell for cell in CELLS if cell[3] == 0] if options.smoke else CELLS
    work, began = partial(measured, steps=3 if options.smoke else STEPS), time.perf_counter()
    if options.smoke or options.processes == 1:
        rows = [(cell, work(cell)) for cell in cells]
    else:
        with multiprocessing.get_context("fork").Pool(options.processes) as pool:
            rows = list(zip(cells, pool.imap(work, cells, chunksize=1), strict=True))
    found = means(rows)
    got = claimed(found)
    results = {"rows": [{"cell": list(key)} | numbers for key, numbers in found.items()], "got": got}
    print(f"{table(results)}\n")
    holds = verdict(FOLDER, got, smoke=options.smoke)
    wall_s = time.perf_counter() - began
    print(f"{wall_s:.1f} s")
    if not options.smoke:
        write_results(FOLDER, "comparison", results | {"wall_s": wall_s, "seeds": list(SEEDS)})
        readme = FOLDER / "README.md"
        readme.write_text(page(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0 if holds or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
