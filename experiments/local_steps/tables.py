"""From what the runs measured to the numbers of the claims, and to the tables of the page."""

import itertools
import math
import tomllib
from decimal import Decimal
from pathlib import Path

FOLDER = Path(__file__).parent
SMALL = 1e-5
"""Gaps below are held to a factor, not to percent."""
SCALED = ("local GD, eta 0.02, L = 10", "local GD, eta 0.2/L, L = 100", "local GD, eta 0.2/L, L = 500")
RATES = tuple(f"shifted regression, {L}" for L in ("L = 1", "L = 10", "L = 100", "exact"))
UNEQUAL = tuple(f"shifted regression, {L}, unequal weights" for L in ("L = 1", "exact"))
BIASED = tuple(f"contradicting regression, L = {L}" for L in (1, 10, 100))


def expected_values():
    """Return run, quantity, round and expected text of every number of values.toml."""
    values = tomllib.loads((FOLDER / "values.toml").read_text(encoding="utf-8"))
    for run, quantities in values.items():
        for quantity, by_round in quantities.items():
            for k, text in by_round.items():
                yield run, quantity, int(k), text


def bounds(text):
    """Return the least and the largest number that rounds to the text, or into the range "A..B"."""
    first, _, last = text.partition("..")

    def half(number):
        return 0.5 * 10.0 ** Decimal(number).as_tuple().exponent

    return float(first) - half(first), float(last or first) + half(last or first)


def is_held_to_a_factor(quantity, text):
    """Whether the number is too small, or too unsteady, for percent."""
    return quantity == "median cosgap" or (quantity == "cosgap" and bounds(text)[1] < SMALL)


def off(quantity, text, got):
    """Return how far `got` lies from the expected: percent beyond its last digit, or a factor."""
    least, most = bounds(text)
    if is_held_to_a_factor(quantity, text):
        middle = (least + most) / 2
        return max(got / middle, middle / got)
    nearest = min(max(got, least), most)
    return 100 * abs(got - nearest) / abs(nearest)


def _worst(runs, names, *, factor=False):
    found = [
        off(quantity, text, runs[name][quantity][k])
        for name, quantity, k, text in expected_values()
        if name in names and is_held_to_a_factor(quantity, text) == factor and k in runs[name][quantity]
    ]
    return max(found, default=math.nan)


def numbers(runs, margin):
    """Return what the claims of expected.toml are about; NaN where a run was too short."""

    def at(name, quantity, k):
        return runs[name][quantity].get(k, math.nan)

    mean, anchored = "exact solves, mean", "exact solves, anchored"
    constant = [name for name in runs if name.startswith("local GD, eta 0.02")]
    angles = [math.acos(1 - at(anchored, "cosgap", k)) for k in (100, 2000)]
    settled = [0.2 * k * loss for name in SCALED for k, loss in runs[name]["loss"].items() if k >= 100]
    settled.append(2 * 1000 * at("local GD, eta 0.02, L = 100", "loss", 1000))
    last = {name: next(iter(runs[name]["last error"].values())) for name in (*RATES, *UNEQUAL)}
    rates = {name: [next(iter(runs[name][q].values())) for q in ("rate", "predicted rate")] for name in last}
    ends = {name: next(iter(runs[name]["distance"].values())) for name in BIASED}
    return {
        "margin_off": abs(margin - 2.06082),
        "exact_mean_percent": _worst(runs, [mean]),
        "mean_stall_least": at(mean, "cosgap", 2000),
        "mean_stall_most": at(mean, "cosgap", 2000),
        "mean_margin": at(mean, "min margin", 2000),
        "anchored_percent": _worst(runs, [anchored]),
        "anchored_factor": _worst(runs, [anchored], factor=True),
        "anchored_gap": at(anchored, "cosgap", 500),
        "anchored_slope": math.log(angles[1] / angles[0]) / math.log(20),
        "slow_pull_percent": _worst(runs, ["exact solves, anchored, a = 1/sqrt(k+1)"]),
        "scaled_percent": _worst(runs, SCALED),
        "driver_percent": max(_apart([runs[name]["cosgap"] for name in SCALED])),
        "constant_least": min(settled),
        "constant_most": max(settled),
        "constant_step_percent": _worst(runs, constant),
        "anchored_gradient_percent": _worst(runs, ["anchored local GD, eta 0.02, L = 500"]),
        "central_percent": _worst(runs, ["central GD, step 0.2", "central GD, step 2"]),
        "normalised_percent": _worst(runs, ["normalised logistic regression"]),
        "normalised_factor": _worst(runs, ["normalised logistic regression"], factor=True),
        "regression_percent": _worst(runs, ["regression, exact, mean"]),
        "fixed_point": max(last.values()),
        "rate_off": max(abs(measured - predicted) for measured, predicted in rates.values()),
        "rate_growth": max(b - a for a, b in itertools.pairwise(rates[name][1] for name in RATES)),
        "least_squares": ends[BIASED[0]],
        "biased": min(ends[name] for name in BIASED[1:]),
        "biased_formula": max(next(iter(runs[n]["beside the formula"].values())) for n in BIASED),
    }


def _apart(curves):
    """Yield by how many percent curves differ, for each round from the 10th on."""
    for k in curves[0]:
        if k >= 10:
            yield 100 * (max(curve[k] for curve in curves) / min(curve[k] for curve in curves) - 1)


def values_table(runs):
    """Return every number of values.toml beside what was measured; a run cut short says so."""
    lines = ["| run | quantity | round | expected | got | off |", "|---|---|---|---|---|---|"]
    for name, quantity, k, text in expected_values():
        got = runs[name][quantity].get(k)
        if got is None:
            lines.append(f"| {name} | {quantity} | {k} | {text} | not run | |")
            continue
        by = off(quantity, text, got)
        by = f"factor {by:.2f}" if is_held_to_a_factor(quantity, text) else f"{by:.1f} %"
        lines.append(f"| {name} | {quantity} | {k} | {text} | {got:.4g} | {by} |")
    return "\n".join(lines)


def rates_table(runs):
    """Return measured and predicted rates, where nodes without a common fit end, and what rounding does."""
    lines = ["| regression | rate measured | predicted | last relative error |", "|---|---|---|---|"]
    for name in (*RATES, *UNEQUAL):
        values = [next(iter(runs[name][q].values())) for q in ("rate", "predicted rate", "last error")]
        lines.append("| {} | {:.6f} | {:.6f} | {:.1e} |".format(name.partition(", ")[2], *values))
    lines += ["", "| no common fit | distance from least squares |", "|---|---|"]
    for name in BIASED:
        lines.append(f"| {name.partition(', ')[2]} | {next(iter(runs[name]['distance'].values())):.2g} |")
    lines += [
        "",
        "| normalised logistic regression, 21 starts | least gap | median | largest |",
        "|---|---|---|---|",
    ]
    unsteady = runs["normalised logistic regression"]
    for k in (k for k in (10, 100, 1000) if k in unsteady["cosgap"]):
        values = [unsteady[f"{which} cosgap"][k] for which in ("least", "median", "largest")]
        lines.append("| round {} | {:.5g} | {:.5g} | {:.5g} |".format(k, *values))
    return "\n".join(lines)


def tables(runs):
    """Return all tables of the page."""
    return f"### Every number\n\n{values_table(runs)}\n\n### Rates, bias, rounding\n\n{rates_table(runs)}"


def with_rounds(runs):
    """Return the runs of a result file with rounds as numbers again, and NaN where a run was too short."""
    return {
        name: {
            quantity: {int(k): math.nan if v is None else v for k, v in curve.items()}
            for quantity, curve in run.items()
        }
        for name, run in runs.items()
    }
