"""Which cells there are, and the numbers of the claims."""

import statistics
import tomllib
from functools import partial
from pathlib import Path

from cells import ATTACKS, LABEL_FLIP, NOT_SANITISED, RULES, TRUSTED_ALONE, Cell
from problem import NUM_WORKERS

FOLDER = Path(__file__).parent
SEEDS = (0, 1)
COLUMNS = tuple(RULES)[:9]
DEFAULT = "dSTAR clip+history"
MAIN = ("sign flip", "IPM 0.5", "IPM 10", "ALIE 1.5", "edge", "cosine 1.05", "cosine 0.1")
MOMENTUM_RULES = ("mean", "median", "multi-Krum", "dSTAR clip+current", DEFAULT)
MOMENTUM_ATTACKS = ("IPM 0.5", "ALIE 1.5", "edge", "cosine 1.05")
DIGITS_RULES = ("mean", "median", "multi-Krum", "NNM + trimmed mean", DEFAULT)
OTHERS = (*(name for name in ATTACKS if name not in MAIN), LABEL_FLIP)
MILD = ("mimic", "mimic, learned", "stale 100", "replay")
"""Attacks that are played on workers with unlike data too: with like data they say nothing new, or little."""
OTHER_RULES = (NOT_SANITISED, "mean", "median", "trimmed mean", "multi-Krum", "Krum", "Aksel", DEFAULT)
SEARCHED_RULES = ("median", "trimmed mean", "multi-Krum")
"""Rules that the attacks which try out the rule twenty times a step are played on."""
WAITED = (20, 17, 14, 10)
"""k of the straggler runs."""
SOUND, BROKEN, AGREED, EFFECT = 0.85, 0.5, 0.02, 0.05


class Grid:
    """All cells by table; `of` finds the accuracies of a row and column."""

    def __init__(self, *, smoke):
        self.smoke = smoke
        changes = {"steps": 1} if smoke else {}
        self.seeds = SEEDS[:1] if smoke else SEEDS
        self.cell = partial(Cell, **changes)

    def tables(self):
        """Return for each table its rows and columns: {table: {row: {column: [cell of each seed]}}}."""
        attacks, columns = ("none", *MAIN), COLUMNS
        if self.smoke:
            attacks = ("none", "edge", "IPM 0.5")
        tables = {
            "iid": self._table(attacks, columns),
            "non-iid": self._table(attacks, columns, split="non-iid"),
            "momentum iid": self._table(MOMENTUM_ATTACKS, MOMENTUM_RULES, momentum=0.9),
            "momentum non-iid": self._table(MOMENTUM_ATTACKS, MOMENTUM_RULES, momentum=0.9, split="non-iid"),
            "digits": self._table(attacks, DIGITS_RULES, data="digits"),
            "others": self._table(("none", *OTHERS), OTHER_RULES, seeds=SEEDS[:1]),
            "others non-iid": self._table(("none", *MILD), OTHER_RULES, split="non-iid", seeds=SEEDS[:1]),
            "near half": {},
            "trusted": {},
            "stragglers": {},
        }
        for f, k in ((9, 19), (8, 17)):
            rows = self._table(MAIN, (DEFAULT,), num_faulty=f, num_received=k, seeds=SEEDS[:1])
            tables["near half"] |= {f"{attack}, f={f}, k={k}": row for attack, row in rows.items()}
        for data in ("gaussian", "digits"):
            tables["trusted"] |= {data: self._table(("none",), (TRUSTED_ALONE,), data=data)["none"]}
        for k in WAITED:
            rows = self._table(("none",), ("mean", DEFAULT), num_received=k, exponential=True)
            tables["stragglers"] |= {f"k={k}": rows["none"]}
        return tables

    def _table(self, attacks, rules, *, seeds=None, **changes):
        return {
            attack: {
                rule: [
                    self.cell(rule=rule, attack=attack, seed=seed, **changes) for seed in seeds or self.seeds
                ]
                for rule in rules
                if not attack.startswith("optimal") or rule in SEARCHED_RULES
            }
            for attack in attacks
        }


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


def numbers(found):
    """Return what the claims of expected.toml are about."""
    compared = [
        (rule, pair, found[table][attack][rule])
        for table, attack, rule, pair in expected_values()
        if attack in found[table]
    ]
    off = [
        (min(pair), abs(mean(got) - statistics.fmean(pair)))
        for _, pair, got in compared
        if max(pair) - min(pair) <= AGREED + 1e-9
    ]
    broken = [
        result["accuracy"]
        for rule, pair, got in compared
        if rule in ("mean", "median", "multi-Krum") and max(pair) <= BROKEN
        for result in got
    ]
    trusted = mean(found["trusted"]["gaussian"][TRUSTED_ALONE])
    default = {table: least(found[table]) for table in ("iid", "non-iid", "digits", "near half")}
    return {
        "default_least": min(default["iid"], default["non-iid"]),
        "over_trusted_iid": default["iid"] - trusted,
        "over_trusted_non_iid": default["non-iid"] - trusted,
        "sound_off": max((gap for lowest, gap in off if lowest >= SOUND), default=0.0),
        "all_off": max((gap for _, gap in off), default=0.0),
        "broken_most": max(broken, default=1.0),
        "informed_current": mean(found["iid"]["edge"]["dSTAR none+current"]),
        "attacks_without_effect": float(len(without_effect(found))),
        "momentum_median": mean(found["momentum iid"]["edge"]["median"]),
        "near_half_least": default["near half"],
        "digits_least": default["digits"],
        "wait_off": max(
            abs(result["step_time"] / waiting_law(int(row.removeprefix("k="))) - 1)
            for row, columns in found["stragglers"].items()
            for results in columns.values()
            for result in results
        ),
    }


def least(table):
    """Return the least mean accuracy of the default rule over the rows."""
    return min(mean(columns[DEFAULT]) for columns in table.values())


def without_effect(found):
    """Return the attacks that take no rule much below what it reaches without."""
    drops = {}
    for table, rules in (("iid", COLUMNS), ("others", OTHER_RULES), ("others non-iid", OTHER_RULES)):
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
