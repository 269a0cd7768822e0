"""How many steps to take alone between two exchanges: a heuristic from measured seconds. Free of torch.

It knows what an exchange costs and not what it is good for. What many local steps do to the solution: Zhu,
Vardhan, Mazumdar, "Effectiveness of Distributed Gradient Descent with Local Steps for Overparameterized
Models" (arXiv 2412.07971), and `experiments/local_steps`. The rule is ours.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from hardy.config import ConfigError

FACTORS = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))
"""Which other numbers of steps a plan shows, in multiples of the least."""
WARNING = """\
A heuristic: it weighs seconds, not learning. More local steps save rounds only while the inner learning
rate stays the same and the replicas drift little apart; with a learning rate that falls like 1/L, a round
of more steps gets no further. So take the least number that meets the overhead, and watch the drift: the
cosine of the replicas' deltas to their mean, their dispersion, the ratio of their norms. Where no weights
fit all data, many steps on one's own data end at a biased point."""


@dataclass(frozen=True, kw_only=True)
class LocalStepsRow:
    """What one number of local steps costs."""

    local_steps: int
    """Optimizer steps between two exchanges, L."""
    overhead: float
    """Share of the time that goes into exchanges: exchange / (L * step + exchange)."""
    bytes_per_step: float
    """Bytes sent per optimizer step, where an exchange after each step has 1: 1 / L."""


@dataclass(frozen=True, kw_only=True)
class LocalStepsPlan:
    """The least number of local steps that meets the allowed overhead, and its neighbours."""

    step_s: float
    """Seconds of one optimizer step."""
    exchange_s: float
    """Seconds of one exchange."""
    overhead: float
    """Allowed share of the time for exchanges."""
    local_steps: int
    """The least L that meets it; to be recommended, see `WARNING`."""
    rows: tuple[LocalStepsRow, ...]
    """L = 1, and multiples of the least L, rising."""

    def text(self) -> str:
        """Return the plan as lines: the recommendation, the table, the warning."""
        cells = [
            ("local steps", "overhead", "bytes of L=1"),
            *(
                (f"{row.local_steps:,}", f"{row.overhead:.2%}", f"{row.bytes_per_step:.3g}")
                for row in self.rows
            ),
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
        ]
        chosen = next(i for i, row in enumerate(self.rows, start=1) if row.local_steps == self.local_steps)
        lines[chosen] += "  <- the least that meets it"
        head = (
            f"{self.local_steps:,} local steps keep exchanges of {self.exchange_s:g} s at or below "
            f"{self.overhead:.3g} of the time, with steps of {self.step_s:g} s"
        )
        return "\n".join([head, "", *lines, "", WARNING])


def plan_local_steps(*, step_s: float, exchange_s: float, overhead: float = 0.05) -> LocalStepsPlan:
    """Return how many steps to take alone so that exchanges take at most a share of the time.

    L = ceil(exchange (1 - q) / (q step)), at least 1, computed exactly from the numbers as they print.

    Args:
        step_s: seconds of one optimizer step without an exchange, measured.
        exchange_s: seconds of one exchange of all parameters, measured; not overlapped with steps.
        overhead: q, allowed share of the time for exchanges.

    Raises:
        ConfigError: seconds that are not above 0 and finite, or an overhead outside (0, 1).

    Example:
        >>> plan = plan_local_steps(step_s=0.5, exchange_s=2.0, overhead=0.05)
        >>> plan.local_steps
        76
        >>> print(plan.text().splitlines()[6].strip())
        76     5.00%        0.0132  <- the least that meets it
    """
    step = _seconds("step_s", step_s, "one optimizer step")
    exchange = _seconds("exchange_s", exchange_s, "one exchange of all parameters")
    if not 0 < overhead < 1:
        raise ConfigError(
            f"overhead={overhead} must lie above 0 and below 1: it is the share of the time for exchanges, "
            f"such as 0.05"
        )
    q = _exact(overhead)
    least = math.ceil(exchange * (1 - q) / (q * step))  # at least 1, as all of it is above 0
    shown = sorted({1, *(math.ceil(factor * least) for factor in FACTORS)})
    rows = [
        LocalStepsRow(
            local_steps=L,
            overhead=float(exchange / (L * step + exchange)),
            bytes_per_step=float(Fraction(1, L)),
        )
        for L in shown
    ]
    return LocalStepsPlan(
        step_s=step_s, exchange_s=exchange_s, overhead=overhead, local_steps=least, rows=tuple(rows)
    )


def _seconds(name: str, value: float, of: str) -> Fraction:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}={value} must be above 0 and finite; measure the seconds of {of}")
    return _exact(value)


def _exact(value: float) -> Fraction:
    """Return the decimal number that prints so: 0.05 is 1/20. With binary fractions 76 could become 77."""
    return Fraction(str(float(value)))
