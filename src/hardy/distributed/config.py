"""Settings of how workers train together. Free of torch."""

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
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.mesh_config import MeshConfig
from hardy.distributed.robust.config import DStarConfig, RobustConfig


@dataclass(frozen=True, kw_only=True)
class SynchronousConfig(Config):
    """Every worker contributes to every step; gradients are averaged."""

    section: ClassVar[str] = "strategy"
    replicas_step_alone: ClassVar[bool] = False
    name: Literal["synchronous"] = "synchronous"
    """The strategy."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the workers are laid out."""


@dataclass(frozen=True, kw_only=True)
class OuterSGDConfig(Config):
    """The outer optimizer moves the anchor by momentum: B = m B + S; A -= lr (S + m B), or lr B."""

    section: ClassVar[str] = "strategy.outer"
    name: Literal["sgd"] = "sgd"
    """The outer optimizer."""
    lr: PositiveFloat = 1.0
    """Outer learning rate."""
    momentum: Annotated[float, Range(least=0, below=1)] = 0.0
    """Outer momentum."""
    nesterov: bool = False
    """Whether the momentum looks ahead."""


@dataclass(frozen=True, kw_only=True)
class OuterTorchConfig(Config):
    """The outer optimizer is a class of torch, by its dotted name."""

    section: ClassVar[str] = "strategy.outer"
    any_name_like: ClassVar[str] = "torch.optim.CLASS"
    name: str = "torch.optim.SGD"
    """The class, such as torch.optim.Adam."""
    lr: PositiveFloat = 1.0
    """Outer learning rate."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the constructor, such as momentum=0.9,nesterov=True."""


@dataclass(frozen=True, kw_only=True)
class CompressionConfig(Config):
    """In how many bytes replicas exchange pseudo-gradients."""

    section: ClassVar[str] = "strategy.compression"
    name: Literal["none", "bf16", "int8", "topk"] = "none"
    """none sends fp32; int8 adds up in fp32; topk keeps what it leaves out for the next round."""
    block: PositiveInt = 256
    """Of int8: values that share a scale."""
    density: Annotated[float, Range(above=0, most=1)] = 0.01
    """Of topk: the share of values that is sent."""
    decay: UnitFloat = 0.95
    """Of topk: how much of what was left out is kept from round to round."""


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig(Config):
    """Which replicas are left out of a round."""

    section: ClassVar[str] = "strategy.anomaly"
    name: Literal["finite", "ztest"] = "finite"
    """finite leaves out what is NaN or infinite; ztest besides what is far above its own running norm."""
    delta: PositiveFloat = 3.0
    """Of ztest: standard deviations above the mean that are still accepted."""
    alpha: Annotated[float, Range(above=0, most=1)] = 0.02
    """Of ztest: rate at which mean and variance follow, once 1 / alpha rounds were seen."""
    warmup_rounds: PositiveInt = 20
    """Of ztest: accepted rounds before it judges."""
    relative_floor: NonNegativeFloat = 0.05
    """Of ztest: least standard deviation, as a share of the mean."""
    relative_to_rate: bool = False
    """Of ztest: whether norms are judged as multiples of the learning rates summed since the last round."""


@dataclass(frozen=True, kw_only=True)
class LocalUpdateConfig(Config):
    """Replicas train alone for many steps and then exchange how far they came (one engine, many names)."""

    section: ClassVar[str] = "strategy"
    replicas_step_alone: ClassVar[bool] = True
    """Whether gradients are averaged within a replica only."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the workers are laid out; replicas exchange, the shards of one step together."""
    copies: PositiveInt = 1
    """Workers in each replica that hold a whole copy and average gradients at every step (DDP)."""
    every_steps: PositiveInt | None = 128
    """Steps between two rounds; none goes by every_s."""
    every_s: PositiveFloat | None = None
    """Seconds between two rounds, whatever number of steps each replica does meanwhile."""
    min_steps: PositiveInt = 100
    """With every_s: a round in which all replicas together did fewer steps is put off."""
    warmup_steps: NonNegativeInt = 0
    """Synchronous steps at the beginning."""
    aggregate: Literal["mean", "softmax_norm", "anchored"] = "mean"
    """How replicas are weighted; softmax_norm trusts small pseudo-gradients, anchored pulls to the start."""
    temperature: PositiveFloat = 1.0
    """Of softmax_norm: larger is closer to the mean."""
    relative_temperature: bool = False
    """Of softmax_norm: whether the temperature counts in mean norms of the round."""
    step_share: UnitFloat = 0.0
    """How much of a replica's weight goes by the steps it did."""
    anchors: Literal["zeros", "initial"] = "initial"
    """Of anchored: what the average is pulled to."""
    outer: OuterSGDConfig | OuterTorchConfig = field(default_factory=OuterSGDConfig)
    """Moves the anchor."""
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    """Which replicas are left out."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of a unit's aggregated pseudo-gradient."""
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    """In how many bytes replicas exchange."""
    inner_state: Literal["keep", "average", "reset"] = "keep"
    """What happens to the inner optimizer's state at a round."""
    fragments: PositiveInt = 1
    """Parts of the model that are exchanged in turn, each once in every_steps."""
    delay_steps: NonNegativeInt = 0
    """Steps after a round's start at which its result is applied."""
    delay_rounds: NonNegativeInt = 0
    """Rounds after which a pseudo-gradient moves the anchor."""
    mix: UnitFloat = 0.0
    """Share of its own weights that a replica keeps at a round."""
    layerwise: bool = False
    """Whether a round runs unit by unit within the next forward pass; otherwise after the step."""
    offload: bool = False
    """Whether anchor and outer momentum stay in the memory of the host."""
    elastic: bool = False
    """Whether replicas may die and come back while the others go on."""
    timeout_s: PositiveFloat = 60.0
    """Of elastic: how long a silent replica is waited for."""
    max_restarts: NonNegativeInt = 3
    """Of elastic: how often `hardy train --workers` starts a replica again that was lost."""

    def __post_init__(self) -> None:
        """Check what the settings say together."""
        super().__post_init__()
        self._check_trigger()
        self._check_fragments()
        if self.copies > 1 and self.mesh.shards > 1:
            raise ConfigError(
                f"strategy.copies={self.copies} with strategy.mesh.shards={self.mesh.shards} is not "
                f"supported: a replica is either sharded or copied; set one of them to 1"
            )
        if self.elastic:
            self._check_elastic()
        anchored = self.aggregate == "anchored"
        if anchored and (self.fragments > 1 or not _only_averages(self.outer)):
            raise ConfigError(
                "strategy.aggregate='anchored' is a rule for averages of the whole model: set "
                "strategy.fragments to 1, strategy.outer.name to sgd with lr 1 and momentum 0"
            )
        if self.delay_rounds > 1:
            raise ConfigError(f"strategy.delay_rounds={self.delay_rounds} is not supported; it is 0 or 1")
        if self.layerwise and (self.fragments > 1 or self.delay_steps or self.delay_rounds):
            raise ConfigError(
                "strategy.layerwise=true exchanges all units at once and applies them at once; set "
                "strategy.fragments to 1 and the delays to 0, or layerwise to false"
            )

    def check_units(self, num_units: int) -> None:
        """Refuse more fragments than the model has units."""
        if self.fragments > num_units:
            raise ConfigError(
                f"strategy.fragments={self.fragments} is more than the {num_units} units of the model (its "
                f"blocks, and all the rest as one); set it to at most {num_units}"
            )

    def _check_elastic(self) -> None:
        if self.layerwise:
            raise ConfigError(
                "strategy.elastic=true needs strategy.layerwise=false: a round inside the forward pass is "
                "applied unit by unit, so a replica that dies in it would leave the others apart"
            )
        if self.copies > 1:
            raise ConfigError(
                f"strategy.elastic=true needs replicas of one worker or sharded ones in this version, but "
                f"strategy.copies={self.copies}; set it to 1, or share each replica among its workers by "
                f"strategy.mesh.shards, or set strategy.elastic to false: a lost worker then ends the run, "
                f"and `hardy resume` goes on from the last checkpoint"
            )
        if self.inner_state == "average":
            raise ConfigError(
                "strategy.elastic=true needs strategy.inner_state='keep' or 'reset': 'average' exchanges "
                "state after a round was agreed, so a replica that dies in it would leave the others apart"
            )
        needs = {"warmup_steps": 0, "fragments": 1, "delay_steps": 0, "delay_rounds": 0}
        others = [
            f"{key}={getattr(self, key)}" for key, value in needs.items() if getattr(self, key) != value
        ]
        if others:
            raise ConfigError(
                f"strategy.elastic=true needs whole rounds without delay from the first step on, but "
                f"{', '.join(others)}; set strategy.warmup_steps and the delays to 0, fragments to 1"
            )

    def _check_trigger(self) -> None:
        if (self.every_steps is None) == (self.every_s is None):
            raise ConfigError(
                f"strategy.every_steps={self.every_steps} and strategy.every_s={self.every_s}: set exactly "
                f"one; none as the other"
            )
        if self.every_s is not None and (self.fragments > 1 or self.delay_steps):
            raise ConfigError(
                "strategy.fragments and strategy.delay_steps count steps and need strategy.every_steps"
            )

    def _check_fragments(self) -> None:
        if self.every_steps is None:
            return
        if self.every_steps % self.fragments:
            raise ConfigError(
                f"strategy.every_steps={self.every_steps} must be a multiple of strategy.fragments="
                f"{self.fragments}; set it to {-(-self.every_steps // self.fragments) * self.fragments}"
            )
        if self.delay_steps >= self.every_steps // self.fragments:
            raise ConfigError(
                f"strategy.delay_steps={self.delay_steps} must be below every_steps / fragments = "
                f"{self.every_steps // self.fragments}, so that one exchange is under way at a time"
            )


def _only_averages(outer: OuterSGDConfig | OuterTorchConfig) -> bool:
    return isinstance(outer, OuterSGDConfig) and outer.lr == 1 and outer.momentum == 0


@dataclass(frozen=True, kw_only=True)
class PenalizedConfig(LocalUpdateConfig):
    """What EDiT and A-EDiT share: weights by norm, a test for anomalies, a clip, an outer Nesterov step."""

    warmup_steps: NonNegativeInt = 1000
    """Synchronous steps at the beginning; at most a twentieth of the run is a good measure."""
    aggregate: Literal["mean", "softmax_norm", "anchored"] = "softmax_norm"
    """How replicas are weighted; softmax_norm trusts small pseudo-gradients, anchored pulls to the start."""
    outer: OuterSGDConfig | OuterTorchConfig = OuterSGDConfig(lr=0.8, momentum=0.85, nesterov=True)
    """Moves the anchor."""
    anomaly: AnomalyConfig = AnomalyConfig(name="ztest")
    """Which replicas are left out."""
    clip_norm: PositiveFloat | None = 10.0
    """Largest norm of a unit's aggregated pseudo-gradient."""


@dataclass(frozen=True, kw_only=True)
class EDiTConfig(PenalizedConfig):
    """EDiT (arXiv 2412.07210): rounds by steps."""

    name: Literal["edit"] = "edit"
    """The strategy."""


@dataclass(frozen=True, kw_only=True)
class AEDiTConfig(PenalizedConfig):
    """A-EDiT (arXiv 2412.07210): EDiT whose rounds come by time, so that fast replicas do more steps."""

    name: Literal["a_edit"] = "a_edit"
    """The strategy."""
    every_steps: PositiveInt | None = None
    """Steps between two rounds; none goes by every_s."""
    every_s: PositiveFloat | None = 600.0
    """Seconds between two rounds, whatever number of steps each replica does meanwhile."""


@dataclass(frozen=True, kw_only=True)
class LocalSGDConfig(LocalUpdateConfig):
    """Local SGD (S. U. Stich, ICLR 2019): weights are averaged."""

    name: Literal["local_sgd"] = "local_sgd"
    """The strategy."""


@dataclass(frozen=True, kw_only=True)
class PostLocalSGDConfig(LocalUpdateConfig):
    """Post-local SGD (T. Lin et al., ICLR 2020): synchronous first, then local SGD."""

    name: Literal["post_local_sgd"] = "post_local_sgd"
    """The strategy."""
    warmup_steps: NonNegativeInt = 1000
    """Synchronous steps at the beginning."""


@dataclass(frozen=True, kw_only=True)
class DiLoCoConfig(LocalUpdateConfig):
    """DiLoCo (arXiv 2311.08105): the mean pseudo-gradient, an outer Nesterov step."""

    name: Literal["diloco"] = "diloco"
    """The strategy."""
    every_steps: PositiveInt | None = 500
    """Steps between two rounds; none goes by every_s."""
    outer: OuterSGDConfig | OuterTorchConfig = OuterSGDConfig(lr=0.7, momentum=0.9, nesterov=True)
    """Moves the anchor."""


@dataclass(frozen=True, kw_only=True)
class StreamingDiLoCoConfig(LocalUpdateConfig):
    """Streaming DiLoCo (arXiv 2501.18512): parts of the model in turn, applied some steps later."""

    name: Literal["streaming_diloco"] = "streaming_diloco"
    """The strategy."""
    every_steps: PositiveInt | None = 100
    """Steps between two rounds; none goes by every_s."""
    outer: OuterSGDConfig | OuterTorchConfig = OuterSGDConfig(lr=0.7, momentum=0.9, nesterov=True)
    """Moves the anchor."""
    fragments: PositiveInt = 4
    """Parts of the model that are exchanged in turn, each once in every_steps."""
    delay_steps: NonNegativeInt = 5
    """Steps after a round's start at which its result is applied."""
    mix: UnitFloat = 0.5
    """Share of its own weights that a replica keeps at a round."""


@dataclass(frozen=True, kw_only=True)
class DelayedConfig(LocalUpdateConfig):
    """Exchange of one round during the next (after W. Sun et al., "CO2", ICLR 2024; not their penalty)."""

    name: Literal["delayed"] = "delayed"
    """The strategy."""
    outer: OuterSGDConfig | OuterTorchConfig = OuterSGDConfig(lr=0.7, momentum=0.5)
    """Moves the anchor; a delayed one needs small steps."""
    clip_norm: PositiveFloat | None = 10.0
    """Largest norm of a unit's aggregated pseudo-gradient."""
    delay_rounds: NonNegativeInt = 1
    """Rounds after which a pseudo-gradient moves the anchor."""


StrategyConfig = (
    SynchronousConfig
    | EDiTConfig
    | AEDiTConfig
    | LocalSGDConfig
    | PostLocalSGDConfig
    | DiLoCoConfig
    | StreamingDiLoCoConfig
    | DelayedConfig
    | RobustConfig
    | DStarConfig
    | PushSumConfig
)
"""Chosen by `strategy.name`."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Config):
    """The machines and the network that `SimWorld` plays. The default costs no time at all."""

    section: ClassVar[str] = "cluster"
    bandwidth_bytes_per_s: PositiveFloat | None = None
    """Bytes a worker's link sends per second; none means infinitely many."""
    latency_s: NonNegativeFloat = 0.0
    """Seconds before a message arrives, whatever its size."""
    slow_factors: tuple[PositiveFloat, ...] = ()
    """Worker r takes slow_factors[r] times as long for its work as an ordinary worker; not listed is 1."""
    variation_sigma: NonNegativeFloat = 0.0
    """Spread of the natural logarithm of the time that equal work takes (lognormal around the same mean)."""
