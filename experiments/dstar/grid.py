"""Which cells there are, and the numbers of the claims."""

import math
import statistics
import tomllib
from functools import partial
from pathlib import Path

from cells import ATTACKS, LABEL_FLIP, NOT_SANITISED, RULES, TRUSTED_ALONE, Cell
from problem import NUM_WORKERS

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2, 3, 4)
FEW = 2
"""Seeds of a cell, from the first, unless `seeds_of` says otherwise: as many as the other program had."""
COLUMNS = tuple(RULES)[:9]
DEFAULT = "dSTAR clip+history"
MAIN = ("sign flip", "IPM 0.5", "IPM 10", "ALIE 1.5", "edge", "cosine 1.05", "cosine 0.1")
MOMENTUM_RULES = ("mean", "median", "multi-Krum", "dSTAR clip+current", DEFAULT)
MOMENTUM_ATTACKS = ("IPM 0.5", "ALIE 1.5", "edge", "cosine 1.05", "cosine 0.1")
DIGITS_RULES = ("mean", "median", "multi-Krum", "NNM + trimmed mean", DEFAULT)
OTHERS = (*(name for name in ATTACKS if name not in MAIN), LABEL_FLIP)
MILD = ("mimic", "mimic, learned", "stale 100", "replay")
"""Attacks that are played on workers with unlike data too: with like data they say nothing new, or little."""
COPIES = ("mimic", "mimic, learned")
"""Attacks that are played on workers with one label each too: who copies harms only where others differ."""
OTHER_RULES = (NOT_SANITISED, "mean", "median", "trimmed mean", "multi-Krum", "Krum", "Aksel", DEFAULT)
SEARCHED_RULES = ("median", "trimmed mean", "multi-Krum")
"""Rules that the attacks which try out the rule twenty times a step are played on."""
WAITED = (20, 17, 14, 10)
"""k of the straggler runs."""
FLOORS = ("iid", "non-iid", "momentum iid", "momentum non-iid", "near half")
"""Tables in which dSTAR's default is run with all seeds."""
MUST_FAIL = ("mean", "median", "multi-Krum")
"""Rules that must fall where the other program's fell."""
BROKEN, AGREED, EFFECT = 0.5, 0.02, 0.05
DRAWS = 20
"""Trainings of a broken cell for each of the first seeds: which examples come moves such cells most."""


class Grid:
    """All cells by table; `of` finds the accuracies of a row and column."""

    def __init__(self, *, smoke):
        self.smoke = smoke
        changes = {"steps": 1} if smoke else {}
        self.expected = {(table, attack, rule): pair for table, attack, rule, pair in expected_values()}
        self.cell = partial(Cell, **changes)

    def tables(self):
        """Return for each table its rows and columns: {table: {row: {column: [cell of each seed]}}}."""
        attacks, columns = ("none", *MAIN), COLUMNS
        if self.smoke:
            attacks = ("none", "edge", "IPM 0.5")
        tables = {
            "iid": self._table("iid", attacks, columns),
            "non-iid": self._table("non-iid", attacks, columns, split="non-iid"),
            "momentum iid": self._table("momentum iid", MOMENTUM_ATTACKS, MOMENTUM_RULES, momentum=0.9),
            "momentum non-iid": self._table(
                "momentum non-iid", MOMENTUM_ATTACKS, MOMENTUM_RULES, momentum=0.9, split="non-iid"
            ),
            "digits": self._table("digits", attacks, DIGITS_RULES, data="digits"),
            "others": self._table("others", ("none", *OTHERS), OTHER_RULES),
            "others non-iid": self._table("others", ("none", *MILD), OTHER_RULES, split="non-iid"),
            "others by label": self._table("others", ("none", *COPIES), OTHER_RULES, split="by label"),
            "broken": self._broken(),
            "near half": {},
            "trusted": {},
            "stragglers": {},
        }
        for f, k in ((9, 19), (8, 17)):
            rows = self._table("near half", MAIN, (DEFAULT,), num_faulty=f, num_received=k)
            tables["near half"] |= {f"{attack}, f={f}, k={k}": row for attack, row in rows.items()}
        for data in ("gaussian", "digits"):
            tables["trusted"] |= {
                data: self._table("trusted", ("none",), (TRUSTED_ALONE,), data=data)["none"]
            }
        for k in WAITED:
            rows = self._table("stragglers", ("none",), ("mean", DEFAULT), num_received=k, exponential=True)
            tables["stragglers"] |= {f"k={k}": rows["none"]}
        return tables

    def _broken(self):
        """Return the cells that the other program found broken, its two seeds alike, with many draws each."""
        rows = {}
        for (table, attack, rule), pair in self.expected.items():
            if not agree(pair) or max(pair) > BROKEN or self.smoke:
                continue
            split, momentum = table.removeprefix("momentum "), 0.9 * table.startswith("momentum ")
            rows.setdefault(f"{table}, {attack}", {})[rule] = [
                self.cell(rule=rule, attack=attack, seed=seed, draw=draw, split=split, momentum=momentum)
                for seed in SEEDS[:FEW]
                for draw in range(DRAWS)
            ]
        return rows

    def _table(self, name, attacks, rules, **changes):
        return {
            attack: {
                rule: [
                    self.cell(rule=rule, attack=attack, seed=seed, **changes)
                    for seed in self.seeds_of(name, attack, rule)
                ]
                for rule in rules
                if not attack.startswith("optimal") or rule in SEARCHED_RULES
            }
            for attack in attacks
        }

    def seeds_of(self, table, attack, rule):
        """Return the seeds: all for dSTAR's default and its bar, and where the expected two differ."""
        if self.smoke:
            return SEEDS[:1]
        if table == "others":
            return SEEDS[1:2]  # the first has a head start
        pair = self.expected.get((table, attack, rule))
        if (rule == DEFAULT and table in FLOORS) or table == "trusted":
            return SEEDS
        return SEEDS[:FEW] if pair is None or agree(pair) else SEEDS


def accuracies(tables, results):
    """Return the tables with what became of each cell in its place."""
    return {
        name: {
            row: {rule: [results[cell] for cell in cells] for rule, cells in columns.items()}
            for row, columns in rows.items()
        }
        for name, rows in tables.items()
    }


def mean(found):
    """Return the mean accuracy over the seeds."""
    return statistics.fmean(result["accuracy"] for result in found)


def expected_values():
    """Yield table, attack, rule and the two accuracies of every value of values.toml."""
    values = tomllib.loads((FOLDER / "values.toml").read_text(encoding="utf-8"))
    for table, attacks in values.items():
        for attack, rules in attacks.items():
            for rule, pair in rules.items():
                yield table, attack, rule, pair


def agree(pair):
    """Whether two accuracies of another program are so near each other that ours are compared with them."""
    return max(pair) - min(pair) <= AGREED + 1e-9


def numbers(found):
    """Return what the claims of expected.toml are about."""
    compared = [
        (rule, pair, [result["accuracy"] for result in found[table][attack][rule]])
        for table, attack, rule, pair in expected_values()
        if attack in found.get(table, {})
    ]
    off = [
        abs(statistics.fmean(got[:FEW]) - statistics.fmean(pair))
        for _, pair, got in compared
        if agree(pair) and max(pair) > BROKEN
    ]
    fallen = [
        statistics.fmean(got) for rule, pair, got in compared if rule in MUST_FAIL and max(pair) <= BROKEN
    ]
    trusted = mean(found["trusted"]["gaussian"][TRUSTED_ALONE])
    default = {table: least(found[table]) for table in ("iid", "non-iid", "digits", "near half")}
    other_programs = {(table, attack) for table, attack, rule, _ in expected_values() if rule == DEFAULT}
    grid = {(t, attack): mean(row[DEFAULT]) for t in ("iid", "non-iid") for attack, row in found[t].items()}
    return {
        "default_least": min(got for cell, got in grid.items() if cell in other_programs),
        "default_least_added": min(
            (got for cell, got in grid.items() if cell not in other_programs), default=1.0
        ),
        "over_trusted_iid": default["iid"] - trusted,
        "over_trusted_non_iid": default["non-iid"] - trusted,
        "sound_off": max(off, default=0.0),
        "broken_off": max((outside((had,), got) for _, _, had, got in broken(found)), default=0.0),
        "differing_off": max(
            (outside(pair, got) for _, pair, got in compared if not agree(pair)), default=0.0
        ),
        "broken_most": max(fallen, default=1.0),
        "informed_current": mean(found["iid"]["edge"]["dSTAR none+current"]),
        "attacks_without_effect": float(len(without_effect(found))),
        "momentum_median": mean(found["momentum iid"]["edge"]["median"]),
        "momentum_least": min(least(found["momentum iid"]), least(found["momentum non-iid"])),
        "near_half_least": default["near half"],
        "digits_least": default["digits"],
        "wait_off": max(
            abs(result["step_time"] / waiting_law(int(row.removeprefix("k="))) - 1)
            for row, columns in found["stragglers"].items()
            for results in columns.values()
            for result in results
        ),
    }


def broken(found):
    """Yield row, rule, the other program's accuracy and ours of each draw, for each seed of a broken cell."""
    expected = {(f"{table}, {attack}", rule): pair for table, attack, rule, pair in expected_values()}
    for row, columns in found["broken"].items():
        for rule, results in columns.items():
            got = [result["accuracy"] for result in results]
            for place, had in enumerate(expected[row, rule]):
                yield row, rule, had, got[place * DRAWS : (place + 1) * DRAWS]


def outside(pair, got):
    """Return how far the mean of two accuracies lies outside the range of ours; one of ours has no range.

    Example:
        >>> outside((0.8, 0.6), [0.71, 0.9]), outside((0.8, 0.6), [0.1, 0.65])
        (0.010000000000000009, 0.04999999999999993)
    """
    middle = statistics.fmean(pair)
    return max(min(got) - middle, middle - max(got), 0.0) if len(got) > 1 else math.nan


def least(table):
    """Return the least mean accuracy of the default rule over the rows."""
    return min(mean(columns[DEFAULT]) for columns in table.values())


def without_effect(found):
    """Return the attacks that take no rule much below what it reaches without."""
    drops = {}
    others = ("others", "others non-iid", "others by label")
    for table, rules in (("iid", COLUMNS), *((other, OTHER_RULES) for other in others)):
        clean = found[table]["none"]
        for attack, columns in found[table].items():
            gaps = [mean(clean[rule]) - mean(columns[rule]) for rule in rules if rule in columns]
            drops[attack] = max(*gaps, drops.get(attack, 0.0))
    return [attack for attack, drop in drops.items() if drop < EFFECT and attack != "none"]


def waiting_law(num_received):
    """Return H_N - H_(N-k), the mean time until the k-th of N exponential workers is done.

    Example:
        >>> round(waiting_law(14), 3), round(waiting_law(20), 3)
        (1.148, 3.598)
    """
    return sum(1 / i for i in range(NUM_WORKERS - num_received + 1, NUM_WORKERS + 1))


def cells_of(tables):
    """Return all cells, each once."""
    rows = (row for table in tables.values() for row in table.values())
    return list(dict.fromkeys(cell for row in rows for cells in row.values() for cell in cells))
