"""From results to what is said about them: numbers for the claims, tables for the page, the reading."""

import math
import statistics

from rows import BASELINES, CONTROL, RECIPE_NAME

COMPARED = ("teacher", "markov", "domains")
"""Tasks whose loss has a floor above zero, so that percents mean something; `span` is held against its F1."""
SENTENCES = (
    "Almost all of the gain over constant-rate baselines is the decay; a tuned cosine is as good or slightly "
    "better; what the recipe adds is robustness (spikes, NaN) and no schedule shape to choose."
)
"""What hardy's specification of the recipe says of it."""
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a two-sided 95 % interval, by the number of values."""
SCORES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "exact_match": "exact match",
    "token_f1": "token F1",
}


def mean(values):
    """Return the mean; infinite where a run was lost."""
    return math.inf if None in values else statistics.fmean(values)


def half_width(values):
    """Return half of the 95 % interval of the mean; infinite where a run was lost or there is one run."""
    if None in values or len(values) not in STUDENT_95:
        return math.inf
    return STUDENT_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def losses_by_row(results, task):
    """Return the mean test loss of each row."""
    return {row["row"]: mean(row["loss"]) for row in results["tasks"][task]["rows"]}


def stressed(results, stress, name):
    """Return the results of one row under one stress."""
    return next(row for row in results["stress"] if (row["stress"], row["row"]) == (stress, name))


def percent_over(value, other):
    """Return by how many percent the first is larger; infinite where either run was lost."""
    return 100 * (value / other - 1) if math.isfinite(value) and math.isfinite(other) else math.inf


def change_by(results, stress, name):
    """Return the change of a row's loss under a stress, in percent."""
    clean = losses_by_row(results, "teacher")[name]
    return percent_over(mean(stressed(results, stress, name)["loss"]), clean)


def numbers(results):
    """Return what the claims of expected.toml are about."""
    losses = {task: losses_by_row(results, task) for task in results["tasks"]}
    below_all = [
        task
        for task in COMPARED
        if all(losses[task][RECIPE_NAME] < losses[task][baseline] for baseline in BASELINES)
    ]
    f1 = {row["row"]: mean(row["token_f1"]) for row in results["tasks"]["span"]["rows"]}
    under_nan = stressed(results, "nan", RECIPE_NAME)
    survived = [
        loss is not None and skips == results["nan_steps"]
        for loss, skips in zip(under_nan["loss"], under_nan["skips"], strict=True)
    ]
    return {
        "tasks_below_every_constant_baseline": len(below_all),
        **{
            f"{task}_over_control_percent": percent_over(losses[task][RECIPE_NAME], losses[task][CONTROL])
            for task in COMPARED
        },
        "span_f1_points_under_control": 100 * (f1[CONTROL] - f1[RECIPE_NAME]),
        "spikes_change_percent": abs(change_by(results, "spikes", RECIPE_NAME)),
        "nan_survived_share": sum(survived) / len(survived),
    }


def shares_of_decay(results):
    """Return by task the share of the gain over constant-rate Adam that is lost without the decay."""
    shares = {}
    for task in COMPARED:
        losses = losses_by_row(results, task)
        gain = losses["adam"] - losses[RECIPE_NAME]
        without = losses["recipe, no decay"] - losses[RECIPE_NAME]
        shares[task] = without / gain if gain > 0 and math.isfinite(without) else math.nan
    return shares


def reading(results):
    """Return which of the specification's three sentences the numbers bear out, in Markdown."""
    got, shares = numbers(results), shares_of_decay(results)
    behind = {task: got[f"{task}_over_control_percent"] for task in COMPARED}
    under_nan = [row for row in results["stress"] if row["stress"] == "nan"]
    lost = [row["row"] for row in under_nan if None in row["loss"]]
    is_decay = all(share >= 0.8 for share in shares.values())
    cosine_is_as_good = all(-0.5 <= over <= 1.5 for over in behind.values())
    is_robust = got["spikes_change_percent"] < 1 and got["nan_survived_share"] == 1 and CONTROL in lost
    holds = is_decay and cosine_is_as_good and is_robust
    decayed = ", ".join(f"{task} {_share(share)}" for task, share in shares.items())
    distances = ", ".join(f"{task} {_percent(over)}" for task, over in behind.items())
    lines = [
        f"**Reading.** {SENTENCES} The numbers {'bear' if holds else 'do **not** bear'} all of it out:",
        "",
        f"- Of the gain over Adam at a constant rate this is lost when the decay is left out: {decayed}. "
        f"At least 80 %: {_holds(is_decay)}.",
        f"- The recipe's loss over that of AdamW with cosine and clip: {distances}. "
        f"From -0.5 to 1.5 %: {_holds(cosine_is_as_good)}.",
        f"- Spikes change the recipe's loss by {_percent(change_by(results, 'spikes', RECIPE_NAME))}, "
        f"that of AdamW with cosine and clip by {_percent(change_by(results, 'spikes', CONTROL))}; NaN "
        f"gradients lose runs of {len(lost)} of {len(under_nan)} rows, and the recipe survives them in "
        f"{got['nan_survived_share']:.0%} of its runs. Survives what the control does not: "
        f"{_holds(is_robust)}.",
    ]
    return "\n".join(lines)


def task_table(task):
    """Return one task's rows."""
    scores = {key: title for key, title in SCORES.items() if key in task["rows"][0]}
    titles = ["row", "lr", "test loss", *scores.values(), "steps to Adam's loss", "lr width"]
    titles += ["state bytes", "clips", "skips", "final lr", "s"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in task["rows"]:
        cells = [
            row["row"],
            f"{row['lr']:g}" + (" (edge)" if row["at_edge"] else ""),
            _with_interval(row["loss"]),
            *(_number(mean(row[key]), ".3f") for key in scores),
            _steps(row["steps_to_target"]),
            f"{row['width_decades']:g}",
            f"{row['state_bytes']:,}",
            f"{statistics.fmean(row['clips']):.0f}",
            f"{statistics.fmean(row['skips']):.0f}",
            f"{statistics.fmean(row['final_lr_ratio']):.3f}",
            f"{statistics.fmean(row['wall_s']):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stress_table(results):
    """Return each row's test loss on `teacher` without and under each stress, and its clips and skips."""
    clean = {row["row"]: row for row in results["tasks"]["teacher"]["rows"]}
    kinds = list(dict.fromkeys(row["stress"] for row in results["stress"]))
    titles = ["row", "none", *kinds, "clips under spikes", "skips under nan"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, row in clean.items():
        cells = [name, _with_interval(row["loss"])]
        cells += [_with_interval(stressed(results, kind, name)["loss"]) for kind in kinds]
        cells.append(f"{statistics.fmean(stressed(results, 'spikes', name)['clips']):.0f}")
        cells.append(f"{statistics.fmean(stressed(results, 'nan', name)['skips']):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(results):
    """Return the reading and all tables."""
    seeds = ", ".join(map(str, results["seeds"]))
    parts = [
        f"Rates chosen on seed {results['tuning_seed']}; means over seeds {seeds}, 95 % intervals.",
        reading(results),
    ]
    for name, task in results["tasks"].items():
        floor = f", loss of a model that knows the law {task['floor']:.3f}" if task["floor"] else ""
        parts += [f"### {name}: {task['steps']} steps{floor}", task_table(task)]
    parts += ["### Stress, on teacher: test loss", stress_table(results)]
    return "\n\n".join(parts)


def of_seed(results, place):
    """Return what one seed gave."""
    tasks = {
        name: task | {"rows": [_one_seed(row, place) for row in task["rows"]]}
        for name, task in results["tasks"].items()
    }
    return results | {"tasks": tasks, "stress": [_one_seed(row, place) for row in results["stress"]]}


def _one_seed(row, place):
    return {key: value[place : place + 1] if isinstance(value, list) else value for key, value in row.items()}


def _number(value, form):
    return format(value, form) if math.isfinite(value) else "lost"


def _with_interval(values):
    lost = values.count(None)
    if lost:
        return f"lost in {lost} of {len(values)}"
    width = half_width(values)
    return f"{mean(values):.4f}" + (f" ± {width:.4f}" if math.isfinite(width) else "")


def _steps(values):
    reached = [value for value in values if value is not None]
    if not reached:
        return "never"
    some = "" if len(reached) == len(values) else f" ({len(reached)} of {len(values)})"
    return f"{statistics.fmean(reached):.0f}{some}"


def _share(value):
    return f"{value:.0%}" if math.isfinite(value) else "no gain"


def _percent(value):
    return f"{value:+.2f} %" if math.isfinite(value) else "lost"


def _holds(condition):
    return "holds" if condition else "does **not** hold"
