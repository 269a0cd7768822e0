"""Settings of the linear solvers. Free of torch.

Paper: A. Tyurin, arXiv 2412.08424.   Letters: gamma = gamma, n = rows, R = length of the longest row.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hardy.config import Config, ConfigError, PositiveFloat, PositiveInt

Method = Literal[
    "normalized_logistic", "logistic", "batch_perceptron", "normalized_batch_perceptron", "perceptron"
]
STEPPED: tuple[Method, ...] = ("normalized_logistic", "logistic")
"""Methods with a step size; the perceptrons' weights only scale with theirs, so it is 1."""


@dataclass(frozen=True, kw_only=True)
class SolverConfig(Config):
    """How separating weights are looked for."""

    section: ClassVar[str] = "linear"
    method: Method = "normalized_logistic"
    """normalized_logistic: along the mean of all rows, weighted by a softmax of their losses. logistic: plain
    gradient descent. batch_perceptron: along the sum of the misclassified rows over n. normalized_batch_
    perceptron: along their mean. perceptron: along the first of them."""
    problems: Literal["separate", "joint"] = "separate"
    """separate: each column of signs is a problem of its own. joint: the columns are classes, one of them
    right for each row, and the right one's score must be the largest, as with a softmax."""
    gamma: PositiveFloat | None = None
    """Step size of the first two; none takes 2 log(2n - 1) / R^2, n the sum of the rows' weights; of joint
    problems log(2n - 1) / R^2."""
    max_iter: PositiveInt = 10_000
    """Steps after which to give up."""
    stop: Literal["separated", "margin"] = "separated"
    """separated ends once every margin is positive; margin goes on while the least one grows, which tends to
    the largest margin with normalized_logistic."""
    tol: PositiveFloat = 1e-3
    """Of margin: growth, relative, that counts."""
    patience: PositiveInt = 50
    """Of margin: steps without such growth after which to end."""
    look_every: PositiveInt | None = None
    """Steps between two looks at whether all is done, which a device waits for; none takes 1 on a CPU, 10
    elsewhere. The result is the same."""
    chunk_bytes: PositiveInt = 64_000_000
    """Rows that are computed at once, as bytes of their features."""

    def __post_init__(self) -> None:
        """Refuse settings that nothing looks at."""
        super().__post_init__()
        if self.method not in STEPPED and self.gamma is not None:
            raise ConfigError(
                f"linear.gamma={self.gamma:g} changes nothing with linear.method={self.method!r}, whose "
                f"steps have one size; leave it out"
            )
        if self.method not in STEPPED and self.stop == "margin":
            raise ConfigError(
                f"linear.stop='margin' needs steps after separation, which linear.method={self.method!r} "
                f"does not take; choose one of {', '.join(STEPPED)}"
            )
