"""Settings of optimizers and learning-rate schedules. Free of torch."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from hardy.config import (
    Config,
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Range,
    UnitFloat,
)

Beta = Annotated[float, Range(least=0, below=1)]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """How the learning rate moves: linear warm-up, then a decay to `final_fraction` of the peak."""

    section: ClassVar[str] = "optim.schedule"
    name: Literal["constant", "linear", "cosine", "exponential", "wsd"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and falls linearly over the last `decay_fraction`."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear rise; the first step runs at peak / (warmup_steps + 1)."""
    final_fraction: UnitFloat = 0.1
    """Learning rate at the last step as a share of the peak; the constant schedule has no use for it."""
    decay_fraction: UnitFloat = 0.2
    """Share of the run that wsd spends falling."""

    def __post_init__(self) -> None:
        """Refuse an exponential decay to zero, which no exponential reaches."""
        super().__post_init__()
        if self.name == "exponential" and self.final_fraction == 0:
            raise ConfigError(
                "optim.schedule.final_fraction must be above 0 when optim.schedule.name is exponential, got 0"
            )


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(Config):
    """AdamW with decoupled weight decay on matrices only (torch's implementation)."""

    section: ClassVar[str] = "optim"
    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices per unit of learning rate; vectors (norms, biases) have none."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; none leaves gradients alone."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves."""


@dataclass(frozen=True, kw_only=True)
class SGDConfig(Config):
    """Stochastic gradient descent with momentum (torch's implementation)."""

    section: ClassVar[str] = "optim"
    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    lr: PositiveFloat = 0.1
    """Peak learning rate."""
    momentum: Beta = 0.9
    """Share of the old direction that is kept."""
    nesterov: bool = False
    """Whether the gradient is taken at the looked-ahead point; needs momentum above 0."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty on matrices."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; none leaves gradients alone."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves."""

    def __post_init__(self) -> None:
        """Refuse Nesterov without momentum."""
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optim.momentum must be above 0 when optim.nesterov is true, got 0")


OptimizerConfig = AdamWConfig | SGDConfig
