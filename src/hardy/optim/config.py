"""Settings of optimizers and learning-rate schedules. Free of torch."""

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from hardy.config import (
    Config,
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    UnitFloat,
)

Beta = Annotated[float, Range(least=0, below=1)]


@dataclass(frozen=True, kw_only=True)
class PerfDecayConfig(Config):
    """The schedule `performance`: an exponential decay that is faster while the loss stalls.

    hardy's reading of the recipe of arXiv 2412.04718; every constant is ours.
    """

    section: ClassVar[str] = "optim.schedule.performance"
    mode: Literal["perf", "time", "plateau"] = "perf"
    """perf blends the slow and the fast decay by progress, time is the slow one, plateau falls in steps."""
    metric: Literal["training", "validation"] = "training"
    """Which loss is watched: the mean training loss of an interval, or each evaluation."""
    final_slow: Annotated[float, Range(above=0, most=1)] = 0.3
    """Share of the peak at the last step if every interval reached `target`."""
    final_fast: Annotated[float, Range(above=0, most=1)] = 0.01
    """Share of the peak at the last step if no interval did; the rate never falls below it."""
    interval_steps: PositiveInt | None = None
    """Steps whose mean loss is one observation; none means 2 % of train.steps."""
    target: PositiveFloat = 0.005
    """Relative improvement from one observation to the next that counts as full progress (perf)."""
    smoothing: Beta = 0.5
    """Weight of the earlier improvements in their average (perf)."""
    factor: Annotated[float, Range(above=0, below=1)] = 0.5
    """What the rate is multiplied by at a plateau (plateau)."""
    patience: PositiveInt = 3
    """Observations in a row without a new best that make a plateau (plateau)."""
    threshold: NonNegativeFloat = 1e-3
    """Relative improvement of the best that counts as a new best (plateau)."""
    cooldown: NonNegativeInt = 1
    """Observations that are not looked at after a plateau (plateau)."""

    def __post_init__(self) -> None:
        """Refuse a fast decay that is slower than the slow one."""
        super().__post_init__()
        if self.final_fast > self.final_slow:
            raise ConfigError(
                f"{self.section}.final_fast={self.final_fast:g} must be at most "
                f"{self.section}.final_slow={self.final_slow:g}; lower the first or raise the second"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """How the learning rate moves: linear warm-up, then a decay to `final_fraction` of the peak."""

    section: ClassVar[str] = "optim.schedule"
    name: Literal["constant", "linear", "cosine", "exponential", "wsd", "performance"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and falls linearly over the last `decay_fraction`,
    performance follows the loss."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear rise; the first runs at peak / (warmup_steps + 1), of performance at
    peak / warmup_steps."""
    final_fraction: UnitFloat = 0.1
    """Learning rate at the last step as a share of the peak; not used by constant and performance."""
    decay_fraction: UnitFloat = 0.2
    """Share of the run that wsd spends falling."""
    performance: PerfDecayConfig = field(default_factory=PerfDecayConfig)
    """Settings of performance; the other shapes have no use for them."""

    def __post_init__(self) -> None:
        """Refuse an exponential decay to zero, which no exponential reaches."""
        super().__post_init__()
        if self.name == "exponential" and self.final_fraction == 0:
            raise ConfigError(
                "optim.schedule.final_fraction must be above 0 when optim.schedule.name is exponential, got 0"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Config):
    """Clipping by the gradient's own history, beside `optim.clip_norm`, and skipping of spikes.

    hardy's reading of the recipe of arXiv 2412.04718; `tensor` follows AdaGC (arXiv 2502.11034), `zscore`
    ZClip (arXiv 2504.02507). Every constant is ours or remembered.
    """

    section: ClassVar[str] = "optim.guard"
    history: Literal["off", "global", "tensor", "zscore"] = "off"
    """What the norm is held against: nothing, its average, each tensor's average, its average and spread."""
    history_factor: Annotated[float, Range(least=1, below=math.inf)] | None = None
    """Largest norm, in averages; for zscore spreads above the average. none means global 2, tensor 1.05,
    zscore 2.5."""
    history_beta: Beta | None = None
    """Decay of the averages; none means global 0.98, tensor 0.98, zscore 0.97."""
    history_warmup_steps: NonNegativeInt | None = None
    """Good steps before history counts; none means global 50, tensor 100, zscore 50."""
    spike_skip: Annotated[float, Range(above=1, below=math.inf)] | None = None
    """Leave out a step whose norm is this many times the average; none clips such steps only."""

    def __post_init__(self) -> None:
        """Refuse to look for spikes without a history."""
        super().__post_init__()
        if self.spike_skip is not None and self.history == "off":
            raise ConfigError(
                f"optim.guard.spike_skip={self.spike_skip:g} needs a history to compare with; set "
                f"optim.guard.history to global, tensor or zscore, or spike_skip to none"
            )


@dataclass(frozen=True, kw_only=True)
class SharedConfig(Config):
    """What every optimizer has."""

    section: ClassVar[str] = "optim"
    weight_decay: NonNegativeFloat = 0.0
    """Decay of matrices per unit of learning rate; vectors (norms, biases) have none."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; none leaves gradients alone."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Clipping by history and skipping of spikes; off unless `optim.guard.history` is set."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(SharedConfig):
    """AdamW with decoupled weight decay on matrices only (torch's implementation)."""

    name: Literal["adamw"] = "adamw"
    """The optimizer; torch.optim.CLASS stands for any class of torch, such as torch.optim.RMSprop."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices per unit of learning rate; vectors (norms, biases) have none."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class SGDConfig(SharedConfig):
    """Stochastic gradient descent with momentum (torch's implementation); weight decay is an L2 penalty."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    lr: PositiveFloat = 0.1
    """Peak learning rate."""
    momentum: Beta = 0.9
    """Share of the old direction that is kept."""
    nesterov: bool = False
    """Whether the gradient is taken at the looked-ahead point; needs momentum above 0."""

    def __post_init__(self) -> None:
        """Refuse Nesterov without momentum."""
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optim.momentum must be above 0 when optim.nesterov is true, got 0")


@dataclass(frozen=True, kw_only=True)
class RuleConfig(SharedConfig):
    """What hardy's own optimizers share."""

    embed_kind: Literal["adamw", "smmf", "apollo"] | None = None
    """How embeddings and output head are updated; none takes the optimizer's default."""
    bf16_update: Literal["stochastic", "kahan", "nearest"] = "stochastic"
    """How bf16 weights are written; kahan keeps what rounding loses, in 2 more bytes per weight."""
    backend: Literal["auto", "foreach", "native", "triton"] = "auto"
    """Who does the sweeps; auto is the fastest that can run on the device."""
    release: bool = False
    """Whether each parameter is updated inside the backward pass and its gradient dropped there; then there
    is no global norm, so clip_norm must be none. One worker, or shards."""

    def __post_init__(self) -> None:
        """Refuse to release gradients that something still wants to see together."""
        super().__post_init__()
        if self.release and (self.clip_norm is not None or self.guard.history != "off"):
            raise ConfigError(
                "optim.release=true drops each gradient before all are known; set optim.clip_norm to none "
                "and optim.guard.history to off"
            )


@dataclass(frozen=True, kw_only=True)
class AdaptiveAdamWConfig(RuleConfig):
    """hardy's AdamW: fp32 state for weights of any dtype, clipping and skipping without waiting."""

    name: Literal["adaptive_adamw"] = "adaptive_adamw"
    """The optimizer."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices per unit of learning rate; vectors (norms, biases) have none."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.999
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(RuleConfig):
    """What APOLLO and its smaller forms share."""

    lr: PositiveFloat = 1e-2
    """Peak learning rate; about AdamW's times sqrt(d / rank) / scale, d the shorter side of a matrix."""
    scale: PositiveFloat | Literal["auto"] | None = None
    """The paper's alpha; auto is sqrt(d / rank), which gives lr AdamW's meaning; none is the method's own."""
    beta1: Beta = 0.9
    """Decay of the sketch's first moment."""
    beta2: Beta = 0.999
    """Decay of the sketch's second moment."""
    eps: PositiveFloat = 1e-12
    """Added to the root of the second moment."""
    update_proj_gap: PositiveInt = 200
    """Steps for which a projection is used."""
    proj: Literal["normal", "rademacher", "svd"] = "normal"
    """What gradients are projected on; svd keeps its directions in the state."""
    limiter: Literal["reference", "corrected", "off"] = "reference"
    """What keeps a step from growing by more than 1 % over the last one."""


@dataclass(frozen=True, kw_only=True)
class APOLLOConfig(LowRankConfig):
    """APOLLO (arXiv 2412.05270): AdamW's step length per channel from a sketch of the gradient."""

    name: Literal["apollo"] = "apollo"
    """The optimizer."""
    rank: PositiveInt = 256
    """Rows of the sketch; at most the shorter side of a matrix is used. State is 8 rank bytes per channel."""


@dataclass(frozen=True, kw_only=True)
class APOLLOMiniConfig(LowRankConfig):
    """APOLLO-Mini: rank 1, one step length per matrix; state of 8 bytes per channel."""

    name: Literal["apollo_mini"] = "apollo_mini"
    """The optimizer."""


@dataclass(frozen=True, kw_only=True)
class QAPOLLOConfig(LowRankConfig):
    """Q-APOLLO: APOLLO-Mini, or APOLLO of any rank, on int8 weights; one device or DDP."""

    name: Literal["qapollo"] = "qapollo"
    """The optimizer."""
    rank: PositiveInt = 1
    """Rows of the sketch; 1 has one step length per matrix, more have one per channel."""
    group_columns: PositiveInt = 128
    """Weights of a row that share one scale and one zero point."""


@dataclass(frozen=True, kw_only=True)
class SMMFConfig(RuleConfig):
    """SMMF (arXiv 2412.08894): both moments in four vectors and one sign bit per weight."""

    name: Literal["smmf"] = "smmf"
    """The optimizer."""
    lr: PositiveFloat = 1e-2
    """Peak learning rate; tune upward from AdamW's."""
    beta1: UnitFloat | None = 0.9
    """Momentum at the first step; none keeps no momentum and no signs."""
    growth_rate: UnitFloat = 0.999
    """What beta1 is multiplied with each step; 1 keeps momentum for ever."""
    decay_rate: Annotated[float, Range(least=-1, most=0)] = -0.8
    """Exponent of the second moment's schedule; -0.8 for Transformers, -0.5 for CNNs."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_update: PositiveFloat | None = None
    """Largest change of a weight in units of the learning rate; none leaves it free."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig(SharedConfig):
    """Muon for matrices, AdamW for embeddings, output head and vectors (torch's implementations)."""

    name: Literal["muon"] = "muon"
    """The optimizer."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate of both; Muon's steps are scaled to AdamW's size."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices per unit of learning rate; vectors (norms, biases) have none."""
    momentum: Beta = 0.95
    """Share of the old direction that is kept."""


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig(SharedConfig):
    """Adafactor (torch's implementation); unsharded parameters only."""

    name: Literal["adafactor"] = "adafactor"
    """The optimizer."""
    lr: PositiveFloat = 1e-2
    """Peak learning rate, relative to the size of a weight."""
    beta2_decay: Annotated[float, Range(least=-1, most=0)] = -0.8
    """Exponent of the second moment's schedule."""


@dataclass(frozen=True, kw_only=True)
class TorchConfig(SharedConfig):
    """Any optimizer of torch, by its dotted name."""

    any_name_like: ClassVar[str] = "torch.optim.CLASS"
    name: str = "torch.optim.RMSprop"
    """The class, such as torch.optim.RMSprop."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the constructor, such as alpha=0.9,momentum=0.5."""


OptimizerConfig = (
    AdamWConfig
    | SGDConfig
    | AdaptiveAdamWConfig
    | APOLLOConfig
    | APOLLOMiniConfig
    | QAPOLLOConfig
    | SMMFConfig
    | MuonConfig
    | AdafactorConfig
    | TorchConfig
)
"""Chosen by `optim.name`."""
