"""What the figures of docs/papers show, read from the result files of `experiments` and `benchmarks`.

A function returns the panels of one picture, or a table in Markdown; no measured number is written here.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures_panels import Panel, bars, curves, spread

from hardy.cli.reproduce_results import Experiment, load_experiment

ROOT = Path(__file__).parents[1]


def experiment(name: str) -> Experiment:
    """Return an experiment."""
    return load_experiment(ROOT / "experiments" / name)


def has_result(name: str) -> bool:
    """Return whether an experiment was run and its result kept."""
    return (ROOT / "experiments" / name).is_dir() and experiment(name).result is not None


def measured(name: str) -> Any:
    """Return what an experiment measured."""
    result = experiment(name).result
    assert result is not None, "pages without results are not drawn"
    return result.measured


def benchmark(name: str, *, key: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the newest line of a benchmark's result file for each value of its keys."""
    lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {tuple(row[each] for each in key): row for row in rows}


def machines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return on which machines, versions and commits lines of a benchmark were measured."""
    said = [
        f"{row['machine']}, {row.get('gpu', 'cpu')}, torch {row['torch']}, commit {row['commit'][:7]}"
        + (" with changes" if row["commit"].endswith("+changes") else "")
        for row in rows
    ]
    return f"Speeds were measured on {'; '.join(dict.fromkeys(said))}."


def _percents(losses: Sequence[float | None], base: Sequence[float | None]) -> dict[str, Any]:
    """Return by how many percent the mean loss is above another, and each seed's above that seed's."""
    if None in (*losses, *base):
        return spread(None)
    mean = 100 * (statistics.fmean(losses) / statistics.fmean(base) - 1)
    return spread(mean, [100 * (a / b - 1) for a, b in zip(losses, base, strict=True)])


def _over_first(rows: Iterable[dict[str, Any]], *, name: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Return each row's validation loss against that of the first row."""
    first, *others = rows
    return {name(row): _percents(row["losses"], first["losses"]) for row in others}


def optimizers(name: str) -> list[Panel]:
    """Losses of an experiment that compares optimizers with AdamW."""
    rows = _over_first(measured(name)["rows"], name=lambda row: row["optimizer"])
    return [bars("validation loss, percent above tuned AdamW's", {"": rows}, reference=0)]


def optimizer_costs(*names: str) -> Callable[[], str]:
    """Return what writes a table of state and time of optimizers."""

    def table() -> str:
        found = benchmark("bench_optim", key=("optimizer", "largest", "tensors", "device"))
        lines = [
            "| optimizer | state, bytes a weight | step over torch's fused AdamW: CPU, 4096 x 4096 fp32 "
            "| H100, 168 matrices of 5461 x 2048, bf16 |",
            "|---|---|---|---|",
        ]
        for name in names:
            cpu, gpu = found[name, "4096x4096", 1, "cpu"], found[name, "5461x2048", 168, "cuda"]
            states = {f"{row['state_bytes_per_element']:.2g}" for row in (cpu, gpu)}
            times = " | ".join(f"{row['over_fused_adamw']:.2f}" for row in (cpu, gpu))
            lines.append(f"| {name} | {' to '.join(sorted(states))} | {times} |")
        return "\n".join([*lines, "", machines(found.values())])

    return table


def adaptive() -> list[Panel]:
    """The recipe against AdamW with a cosine, and under stress."""
    found, control = measured("adaptive"), "adamw + cosine + clip"
    tasks = {name: {row["row"]: row["loss"] for row in task["rows"]} for name, task in found["tasks"].items()}
    names = ("sgd", "momentum", "adagrad", "rmsprop", "adam", "recipe", "recipe, no decay")
    clean = {
        task: {name: _percents(tasks[task][name], tasks[task][control]) for name in names}
        for task in ("teacher", "markov", "domains")
    }
    shown = ("adam", control, "recipe", "recipe, no clip", "recipe, no history", "recipe, history alone")
    stress = {"none": {name: tasks["teacher"][name] for name in shown}}
    for kind in ("spikes", "nan"):
        rows = [row for row in found["stress"] if row["stress"] == kind and row["row"] in shown]
        stress[kind] = {row["row"]: row["loss"] for row in rows}
    losses = {
        kind: {name: spread(None if None in x else statistics.fmean(x), x) for name, x in rows.items()}
        for kind, rows in stress.items()
    }
    return [
        bars("test loss, percent above AdamW + cosine + clip", clean, reference=0),
        bars("test loss on teacher under stress", losses, scale="log"),
    ]


def dstar() -> list[Panel]:
    """Least accuracies of rules over attacks; losses of a language model."""
    tables = measured("dstar")["tables"]
    (alone,) = tables["trusted"]["gaussian"].values()
    least = {
        title: {rule: _least(tables[split], rule) for rule in tables[split]["none"]}
        for split, title in (("iid", "like data on all workers"), ("non-iid", "unlike data"))
    }
    return [
        bars(
            "classifier, worst of 7 attacks by 8 of 20 workers: test accuracy",
            least,
            reference=statistics.fmean(result["accuracy"] for result in alone),
        ),
        bars(
            "language model, worst of 4 attacks by 2 of 8: loss, percent above the mean's without attack",
            _robust(),
            scale="log",
        ),
    ]


def _least(table: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return the accuracy under the attack that is worst on average."""
    found = [[r["accuracy"] for r in rules[rule]] for attack, rules in table.items() if attack != "none"]
    worst = min(found, key=statistics.fmean)
    return spread(statistics.fmean(worst), worst)


def _robust() -> dict[str, dict[str, Any]]:
    losses: dict[str, dict[str, list[float]]] = {}
    for key, loss in measured("robust")["losses"].items():
        rule, attack, _ = key.split(" | ")
        losses.setdefault(rule, {}).setdefault(attack, []).append(loss)
    base = losses["mean"]["none"]
    worst = {
        rule: max((x for name, x in rows.items() if name != "none"), key=statistics.fmean)
        for rule, rows in losses.items()
    }
    return {"": {rule: _percents(found, base) for rule, found in worst.items()}}


def aggregation_costs() -> str:
    """Return a table of the time that aggregation rules take."""
    lines = ["| rule, 16 rows of 10 M numbers on a CPU | time over that of the mean |", "|---|---|"]
    found = benchmark("bench_aggregation", key=("rule",))
    for (rule,), row in found.items():
        lines.append(f"| {rule} | {row['over_mean']:.1f} |")
    return "\n".join([*lines, "", machines(found.values())])


def speeds_measured_on() -> str:
    """Return where the speeds of local updates were measured."""
    return machines(benchmark("bench_local", key=("case",)).values())


def edit() -> list[Panel]:
    """Losses at equal tokens, and speeds of real processes."""

    def name(row: dict[str, Any]) -> str:
        said = "one alone, on a quarter" if row["name"] == "alone" else row["name"].replace("_", " ")
        return f"{said}, one corrupted" if row["corrupted"] else said

    losses = _over_first(measured("edit")["rows"], name=name)
    speeds: dict[str, dict[str, Any]] = {"measured": {}, "simulated": {}}
    for (case,), row in benchmark("bench_local", key=("case",)).items():
        for ratio in row["ratios"]:
            label = f"{case}: {ratio['ratio']}"
            speeds["measured"][label] = spread(ratio["measured"], ratio["range"])
            speeds["simulated"][label] = spread(ratio["predicted"])
    return [
        bars("validation loss at equal tokens, percent above synchronous", {"": losses}, reference=0),
        bars("steps per second, ratio; four processes", speeds, reference=1, scale="log"),
    ]


def of_seeds(values: list[float]) -> dict[str, Any]:
    """Return the mean of what the seeds gave, and each of them."""
    return spread(statistics.fmean(values), values)


def push_sum() -> list[Panel]:
    """Accuracy and disagreement by method and graph."""
    shown = ("SGP", "SGAP, k 1", "SADDOPT", "MSGP", "MSGAP, k 1")
    graphs = ("double_clique", "one_peer_exponential")
    accuracy: dict[str, dict[str, Any]] = {}
    distance: dict[str, dict[str, Any]] = {}
    for row in measured("push_sum")["rows"]:
        data, method, graph = row["cell"]
        if method in shown and graph in graphs:
            series, label = graph.replace("_", " "), f"{data}, {method}"
            accuracy.setdefault(series, {})[label] = of_seeds(row["average"])
            distance.setdefault(series, {})[label] = of_seeds(row["distance"])
    return [
        bars("accuracy of the average of all replicas", accuracy),
        bars("mean squared distance of a replica to the average", distance, scale="log"),
    ]


def hydraulis() -> list[Panel]:
    """Simulated step times, and simulated ratios beside published ones."""
    found = measured("hydraulis")
    names = {"fixed": "fixed packs", "balanced": "balanced", "dynamic": "balanced, groups change"}
    times = {
        title: {f"{row['source']}, {row['context'] // 1024}K": of_seeds(row[key]) for row in found["rows"]}
        for key, title in names.items()
    }
    return [bars("simulated seconds a step, 32B on 64 GPUs", times)]


def plan_times() -> str:
    """Return a table of the time that plans take, and how good they are."""
    lines = ["| lengths | a plan takes | above the lower bound | idle |", "|---|---|---|---|"]
    for row in measured("hydraulis")["rows"]:
        took_ms, gap, idle = (statistics.fmean(row[key]) for key in ("planner_ms", "gap", "idle"))
        cells = [f"{took_ms:.0f} ms", f"{gap:.1%}", f"{idle:.1%}"]
        lines.append(f"| {row['source']}, {row['context'] // 1024}K | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def local_steps() -> list[Panel]:
    """How fast rules come to the direction of largest margin."""
    runs = measured("local_steps")["runs"]
    shown = {
        "local GD, eta 0.02, L = 1": "1 local step",
        "local GD, eta 0.02, L = 500": "500 local steps",
        "anchored local GD, eta 0.02, L = 500": "500 local steps, anchored",
        "exact solves, mean": "exact local solves, averaged",
        "exact solves, anchored": "exact local solves, anchored",
        "normalised logistic regression": "normalised logistic regression",
    }
    series = {
        title: [(int(k), gap) for k, gap in _gaps(runs[name]).items() if gap > 0]
        for name, title in shown.items()
    }
    return [curves("1 - cos of the angle to the max-margin direction", series, x="rounds")]


def _gaps(run: dict[str, Any]) -> dict[str, float]:
    """Return the gap by round; the median over starts where a rounding decides between them."""
    return run.get("median cosgap", run["cosgap"])


SHOWN_STEP_SIZES = (1, 100)


def large_steps() -> list[Panel]:
    """Steps to separation by the number of rows, and how near the largest margin is long after."""
    found, methods = measured("large_steps"), {"normalized_logistic": "normalised", "logistic": "plain"}
    steps: dict[str, list[tuple[float, float]]] = {}
    for data, method, gamma, count in found["counts"]:
        if data.startswith("worst case") and method in methods and gamma in SHOWN_STEP_SIZES and count:
            name = f"{methods[method]}, step size {gamma:g}"
            steps.setdefault(name, []).append((int(data.split()[-1]), count))
    gaps = {
        f"{methods[method]}, step size {gamma:g}": spread(row[-1]) for method, gamma, row in found["after"]
    }
    return [
        curves("worst case: steps until every row is right", steps, x="rows"),
        bars(
            "another set, after 10,000 steps: 1 - cos of the angle to the max-margin direction",
            {"": gaps},
            scale="log",
        ),
    ]
