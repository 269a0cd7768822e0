"""The tables of the page, in Markdown."""

from cells import TRUSTED_ALONE
from grid import COLUMNS, DEFAULT, DRAWS, FEW, broken, expected_values, mean, waiting_law, without_effect

TITLES = {
    "iid": "IID, f = 8, k = 20 (expected in brackets)",
    "non-iid": "non-IID, f = 8, k = 20 (expected in brackets)",
    "momentum iid": "IID, momentum 0.9 at the workers",
    "momentum non-iid": "non-IID, momentum 0.9 at the workers",
    "digits": "handwritten digits, IID",
    "others": "other attacks, IID, seed 1",
    "others non-iid": "other attacks, non-IID, seed 1",
    "others by label": "other attacks, one label each, seed 1",
    "near half": "near the limit, IID",
}


def text_of(results):
    """Return the accuracies of the first seeds, and the mean of all where there are more."""
    text = " ".join(short(result["accuracy"]) for result in results[:FEW])
    return f"{text} / {short(mean(results))}" if len(results) > FEW else text


def short(accuracy):
    """Return an accuracy with two digits, without the 0."""
    return f"{accuracy:.2f}".removeprefix("0")


def accuracy_table(name, table):
    """Return attacks x rules."""
    expected = {(t, a, r): pair for t, a, r, pair in expected_values()}
    rules = list(max(table.values(), key=len))
    lines = [f"| {TITLES[name]} | " + " | ".join(rules) + " |", "|---" * (len(rules) + 1) + "|"]
    for attack, columns in table.items():
        cells = []
        for rule in rules:
            pair = expected.get((name, attack, rule))
            said = "" if pair is None else " (" + " ".join(map(short, pair)) + ")"
            cells.append(f"{text_of(columns[rule])}{said}" if rule in columns else "–")
        lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(results, key):
    """Return the mean of a share in percent."""
    known = [result[key] for result in results if key in result]
    return f"{100 * sum(known) / len(known):.0f} %" if known else "–"


def accepted_table(table):
    """Return what the dSTAR rules accept."""
    rules = [rule for rule in COLUMNS if rule.startswith("dSTAR")]
    lines = ["| IID: honest rows accepted, bad ones, empty steps | " + " | ".join(rules) + " |"]
    lines.append("|---" * (len(rules) + 1) + "|")
    for attack, columns in table.items():
        cells = [
            ", ".join(share(columns[rule], key) for key in ("accepted_honest", "accepted_bad", "empty"))
            for rule in rules
        ]
        lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def broken_table(found):
    """Return how much a broken cell depends on which batches come."""
    lines = [
        f"| broken cells, {DRAWS} draws of split and batches | seed | expected | mean | least | most |",
        "|---|---|---|---|---|---|",
    ]
    for count, (row, rule, had, got) in enumerate(broken(found)):
        cells = [short(value) for value in (had, sum(got) / len(got), min(got), max(got))]
        lines.append(f"| {row}: {rule} | {count % FEW} | {' | '.join(cells)} |")
    return "\n".join(lines)


def waiting_table(table):
    """Return how long steps take, and what is reached."""
    lines = [
        "| k of 20 | time of a step | H_20 - H_(20-k) | mean: accuracy | dSTAR: accuracy |",
        "|---|---|---|---|---|",
    ]
    for row, columns in table.items():
        k = int(row.removeprefix("k="))
        times = [result["step_time"] for results in columns.values() for result in results]
        cells = [f"{sum(times) / len(times):.3f}", f"{waiting_law(k):.3f}"]
        cells += [text_of(columns[rule]) for rule in ("mean", DEFAULT)]
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(results):
    """Return all tables."""
    found = results["tables"]
    alone = {data: columns[TRUSTED_ALONE] for data, columns in found["trusted"].items()}
    parts = [
        "Cells show seeds 0 and 1, and after a stroke the mean of seeds 0 to 4 where all were run.",
        f"**Training on the trusted gradient alone**, the bar for every table: {text_of(alone['gaussian'])} "
        f"(expected .91 .87); digits {text_of(alone['digits'])}.",
    ]
    parts += [accuracy_table(name, found[name]) for name in TITLES]
    parts += [broken_table(found), accepted_table(found["iid"]), waiting_table(found["stragglers"])]
    harmless = without_effect(found)
    parts.append(f"Attacks without effect: {', '.join(harmless) or 'none'}.")
    return "\n\n".join(parts)
