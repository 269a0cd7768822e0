"""Expected numbers, those of the claims, and the tables of the page."""

import math

NLR, LR, BP = "normalized_logistic", "logistic", "batch_perceptron"
COLUMNS = [(NLR, g) for g in (0.1, 1.0, 10.0, 100.0)] + [(LR, g) for g in (0.1, 1.0, 10.0, 100.0, 1e5)]
TABLE = {
    100: (110, 11, 2, 2, 5615, 561, 55, 31, 31),
    500: (143, 15, 2, 2, 34016, 3402, 338, 154, 151),
    1000: (157, 16, 2, 2, 73133, 7313, 729, 308, 301),
    2000: (171, 18, 2, 2, None, 15649, 1563, 616, 601),
}
"""Steps on the worst case by rows, in the order of COLUMNS; another program of ours, but for PUBLISHED."""
WORST = "worst case, n = 1000"
PUBLISHED = {
    (WORST, NLR, 100.0): 2,
    (WORST, NLR, 10.0): 2,
    (WORST, NLR, 1.0): 16,
    (WORST, NLR, 0.1): 157,
    (WORST, LR, 100.0): 308,
}
"""The paper's own, of its table 1."""
TWO_POINTS = {"100": (0.693, 12.5, 0.0), "10": (0.693, 1.289, 0.0006)}
AFTER = {
    (LR, 0.1): (0.0139, 0.0151, 0.0109),
    (LR, 1.0): (0.0151, 0.0108, 0.0070),
    (LR, 100.0): (0.0234, 0.0220, 0.0205),
    (NLR, 0.1): (0.0135, 1.5e-3, 3.6e-5),
    (NLR, 1.0): (1.5e-3, 3.7e-5, 3.7e-7),
    (NLR, 100.0): (5.9e-4, 2.7e-5, 2.1e-7),
}
"""1 - cos to the direction of largest margin after 100, 1,000 and 10,000 steps; another program of ours."""


def bound(n, gamma):
    """Return the paper's bound on the normalised method's steps on the worst case (theorem 6.1)."""
    return (1.25 + 2 * math.log(2 * n - 1) / gamma) / 0.25


def numbers(measured):
    """Return the numbers of the claims."""
    held = {(data, method, gamma): found for data, method, gamma, found in measured["counts"]}
    off = [
        abs((found or math.inf) - held_at) for held_at, found in ((PUBLISHED[c], held[c]) for c in PUBLISHED)
    ]
    all_off = [
        abs((held[f"worst case, n = {n}", *column] or math.inf) - wanted)
        for n, row in TABLE.items()
        for column, wanted in zip(COLUMNS, row, strict=True)
        if wanted is not None
    ]
    over = [
        (held[f"worst case, n = {n}", NLR, gamma] or math.inf) / bound(n, gamma)
        for n in TABLE
        for gamma in (0.1, 1.0, 10.0, 100.0)
    ]
    losses = [
        abs(got - wanted)
        for gamma, row in TWO_POINTS.items()
        for got, wanted in zip(measured["two_points"][gamma]["loss"], row, strict=True)
    ]
    after = {(method, gamma): gaps for method, gamma, gaps in measured["after"]}
    return {
        "published_off": max(off),
        "worst_case_off": max(all_off),
        "default_steps": held[WORST, NLR, None] or math.inf,
        "plain_steps": held[WORST, LR, 1.0] or math.inf,
        "over_bound": max(over),
        "overlay_gap": measured["overlay"]["1e+06"],
        "loss_off": max(losses),
        "balanced_ratio": ratio(held, "balanced"),
        "imbalanced_ratio": ratio(held, "imbalanced"),
        "digits_gap_percent": 100 * gap(measured["digits"]),
        "layers_gap_percent": 100 * max(0.0, gap(measured["layers"])),
        "after_normalised": after[NLR, 1.0][-1],
        "after_plain": after[LR, 1.0][-1],
    }


def ratio(held, kind):
    """Return the normalised method's steps over the plain one's, each at its best step size."""
    best = {
        method: min(held[f"digits 3 and 8, {kind}", method, g] or math.inf for g in (0.1, 1.0, 10.0, 100.0))
        for method in (NLR, LR)
    }
    return best[NLR] / best[LR]


def mean(values):
    """Return the mean of numbers, or of lists of them."""
    flat = [x for value in values for x in (value if isinstance(value, list) else [value])]
    return sum(flat) / len(flat)


def gap(rows):
    """Return by how much scikit-learn's accuracy is above ours."""
    return mean([row["theirs"] for row in rows]) - mean([row["ours"] for row in rows])


def said(value):
    return "–" if value is None else f"{value:g}"


def counts_table(measured):
    """Return steps of all methods on all data; in brackets what was expected, published in bold."""
    held = {(data, method, gamma): found for data, method, gamma, found in measured["counts"]}
    columns = [*COLUMNS, (BP, None), ("normalized_batch_perceptron", None), (NLR, None)]
    short = {NLR: "NLR", LR: "LR", BP: "BP", "normalized_batch_perceptron": "normalised BP"}
    heads = [
        f"{short[m]} {'default' if m == NLR and g is None else said(g) if g else ''}" for m, g in columns
    ]
    lines = ["| steps | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    for data in dict.fromkeys(data for data, _, _ in held):
        cells = []
        for place, column in enumerate(columns):
            text = said(held[data, *column])
            wanted = PUBLISHED.get((data, *column))
            if wanted is not None:
                text += f" (**{wanted}**)"
            elif data.startswith("worst") and place < len(COLUMNS):
                text += f" ({said(TABLE[int(data.split()[-1])][place])})"
            cells.append(text)
        lines.append(f"| {data} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(measured):
    """Return all tables."""
    two = ["| two points, step size | loss | length of its gradient | misclassified |", "|---|---|---|---|"]
    for gamma, found in measured["two_points"].items():
        columns = [", ".join(f"{x:.4g}" for x in found[name]) for name in ("loss", "gradient_norm")]
        two.append(
            f"| {gamma} | {columns[0]} | {columns[1]} | {', '.join(map(said, found['misclassified']))} |"
        )
    overlay = ["| step size | largest distance to the batch perceptron, 12 steps |", "|---|---|"]
    overlay += [f"| {gamma} | {value:.2g} |" for gamma, value in measured["overlay"].items()]
    count, margin = measured["after_points"]
    after = [f"| {count} points, largest margin {margin:.3f} | after 100, 1,000, 10,000 steps | expected |"]
    after.append("|---|---|---|")
    for method, gamma, gaps in measured["after"]:
        wanted = ", ".join(f"{x:.2g}" for x in AFTER[method, gamma])
        got = ", ".join(f"{x:.2g}" for x in gaps)
        after.append(f"| {'NLR' if method == NLR else 'LR'} {gamma:g} | {got} | {wanted} |")
    accuracy = ["| test accuracy | NLR | scikit-learn |", "|---|---|---|"]
    accuracy += [
        f"| digits, seed {seed} | {row['ours']:.4f} ({row['iterations']} steps) | {row['theirs']:.4f} |"
        for seed, row in enumerate(measured["digits"])
    ]
    for seed, row in enumerate(measured["layers"]):
        for layer, ours, theirs in zip(row["layers"], row["ours"], row["theirs"], strict=True):
            accuracy.append(f"| docstring or code, seed {seed}, layer {layer} | {ours:.4f} | {theirs:.4f} |")
    return "\n\n".join([counts_table(measured), *map("\n".join, (two, overlay, after, accuracy))])
