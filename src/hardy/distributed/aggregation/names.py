"""Names of the aggregation rules, for settings; imports no torch. A test compares them with the tables."""

import math

from hardy.config import ConfigError, unknown_name

RULE_NAMES = (
    "aksel",
    "bulyan",
    "caf",
    "centered_clip",
    "cge",
    "diversefl",
    "dnc",
    "dstar",
    "fltrust",
    "geometric_median",
    "kardam",
    "krum",
    "mda",
    "mean",
    "meamed",
    "median",
    "monna",
    "multi_krum",
    "norm_clip",
    "norm_screen",
    "phocas",
    "sign_majority",
    "smea",
    "trimmed_mean",
    "zeno_plus_plus",
)
"""Every rule."""

NEEDS_REFERENCE = frozenset({"diversefl", "dstar", "fltrust", "zeno_plus_plus"})
"""Rules that compare with the gradient of a trusted batch."""

SELF_REPORTED = frozenset({"cge", "mean", "norm_clip", "norm_screen"}) | NEEDS_REFERENCE
"""Rules that need no more of a row than its squared norm and its dot with the trusted gradient."""

NEEDS_GRAM = frozenset(
    {
        "bulyan",
        "caf",
        "centered_clip",
        "dnc",
        "geometric_median",
        "krum",
        "mda",
        "monna",
        "multi_krum",
        "smea",
    }
) | {"bucketing", "nnm"}
"""Rules, and what comes before them, that need inner products of rows."""

BY_DISTANCE = frozenset({"caf", "geometric_median", "krum", "mda", "multi_krum", "smea"})
"""Rules that need no more of the rows than how far they lie apart, so that averages can be judged instead."""

PRE_AGGREGATOR_NAMES = ("arc", "bucketing", "clip", "nnm")
"""What may be done to the rows before the rule."""

ONLY_SHORTEN = frozenset({"arc", "clip"})
"""Pre-aggregators that give each row a factor and mix none."""

WITH_NUMBER = {
    "bucketing": (int, "a whole number of rows, at least 1", "bucketing:2"),
    "clip": (float, "a number above 0 and finite", "clip:1.5"),
}
"""Pre-aggregators that take a number after a colon: how to read it, what it may be, and an example."""


def split_pre_aggregator(text: str) -> tuple[str, float | None]:
    """Return the name and the number of "name" or "name:number".

    Raises:
        ConfigError: an unknown name, a number that is missing, refused, or given where none belongs.

    Example:
        >>> split_pre_aggregator("bucketing:2"), split_pre_aggregator("nnm")
        (('bucketing', 2), ('nnm', None))
    """
    name, colon, number = text.partition(":")
    if name not in PRE_AGGREGATOR_NAMES:
        raise ConfigError(unknown_name(name, "pre-aggregator", PRE_AGGREGATOR_NAMES))
    if name not in WITH_NUMBER:
        if colon:
            raise ConfigError(f"pre-aggregator {text!r}: {name} takes no number; write {name!r}")
        return name, None
    read, allowed, example = WITH_NUMBER[name]
    try:
        value = read(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"pre-aggregator {text!r} needs {allowed}, such as {example!r}")
    return name, value
