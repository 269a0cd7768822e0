"""Settings of gossip by push-sum. Free of torch."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from hardy.config import Config, ConfigError, NonNegativeInt, PositiveFloat, PositiveInt, Range, UnitFloat
from hardy.distributed.mesh_config import MeshConfig

RELATIVE_RATE = 1e3
"""k where distances are relative: the gate is 63 % open at a relative squared distance of 1e-3."""


ONLY_SOME_SIZES = ("torus", "hypercube", "double_clique", "file")
"""Graphs that one replica less may not have."""


@dataclass(frozen=True, kw_only=True)
class TopologyConfig(Config):
    """Who sends to whom, at each round."""

    section: ClassVar[str] = "strategy.topology"
    name: Literal[
        "full",
        "ring",
        "symmetric_ring",
        "star",
        "torus",
        "hypercube",
        "double_clique",
        "exponential",
        "one_peer_exponential",
        "random_edges",
        "random_matching",
        "base_k",
        "file",
    ] = "one_peer_exponential"
    """The graph; base_k reaches the exact average of any number of replicas after one period."""
    seed: NonNegativeInt = 0
    """Of random_edges and random_matching."""
    degree: PositiveInt = 1
    """Of base_k: most neighbours at one round."""
    probability: UnitFloat = 0.5
    """Of random_edges: of an edge within the first or the second half of the replicas."""
    across: UnitFloat = 0.25
    """Of random_edges: of an edge between the halves."""
    full_every: PositiveInt | None = None
    """Of random_edges: rounds after which all possible edges come at once; none means never."""
    file: str | None = None
    """Of file: a JSON list of rounds, each a list of [sender, receiver] or [sender, receiver, share]."""

    def __post_init__(self) -> None:
        """Refuse a file without its kind, and the reverse, and a graph without any edge."""
        super().__post_init__()
        if self.name == "random_edges" and self.probability == self.across == 0:
            raise ConfigError(
                "strategy.topology.name='random_edges' with strategy.topology.probability=0 and "
                "strategy.topology.across=0 has no edge at any round, so nobody would exchange anything; set "
                "one of them above 0"
            )
        if (self.name == "file") != (self.file is not None):
            raise ConfigError(
                f"strategy.topology.name={self.name!r} and strategy.topology.file={self.file!r}: name the "
                f"file with name 'file', and with no other"
            )


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Config):
    """What share of its parameters a replica gives to each neighbour."""

    section: ClassVar[str] = "strategy.weights"
    name: Literal["uniform", "adaptive"] = "uniform"
    """uniform: equal shares (SGP). adaptive: more to neighbours that are far away (SGAP), hardly any near
    agreement; that is partial mixing, not better consensus."""
    v: Annotated[float, Range(above=0, below=1)] = 0.1
    """Of adaptive: how little is given near agreement."""
    k: PositiveFloat | None = None
    """Of adaptive: how fast shares grow with the distance; none means 1000 where distances are relative."""
    scale: Literal["relative", "raw", "per_parameter"] = "relative"
    """Of adaptive: what squared distances are divided by: own squared norm, 1, number of parameters."""
    distance_of: Literal["numerator", "debiased"] = "numerator"
    """Of adaptive: between what; numerators differ where masses do, even in perfect agreement."""
    distance_mode: Literal["sketch", "exact"] = "sketch"
    """Of adaptive: sketch estimates from 16 KiB that neighbours send each other both ways; exact keeps whole
    copies, and knows nothing of a neighbour that sends nothing back."""
    sketch_size: PositiveInt = 4096
    """Of sketch: numbers; the estimate is off by sqrt(2 / size)."""

    def __post_init__(self) -> None:
        """Refuse a rate that nobody gave and nobody can guess."""
        super().__post_init__()
        if self.name == "adaptive" and self.scale != "relative" and self.k is None:
            raise ConfigError(
                f"strategy.weights.k is needed with strategy.weights.scale={self.scale!r}: no value "
                f"fits models of all sizes; set it, or strategy.weights.scale to 'relative'"
            )

    @property
    def rate(self) -> float:
        """The k that counts."""
        return RELATIVE_RATE if self.k is None else self.k


@dataclass(frozen=True, kw_only=True)
class PushSumConfig(Config):
    """Replicas send shares of their weights to a few neighbours (arXiv 2412.07252): no all-reduce."""

    section: ClassVar[str] = "strategy"
    replicas_step_alone: ClassVar[bool] = True
    """Gradients are averaged within a replica only."""
    name: Literal["push_sum"] = "push_sum"
    """The strategy."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the workers are laid out; replicas exchange, the shards of one step together."""
    method: Literal["push", "gradient_tracking"] = "push"
    """push: parameters travel (SGP, SGAP). gradient_tracking: gradients too (SADDOPT), twice the bytes."""
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    """Who sends to whom."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How much."""
    mix_every_steps: PositiveInt = 1
    """Steps between two exchanges."""
    overlap: bool = False
    """Whether a message is taken one round after it was sent, so that nobody waits for it."""
    store: Literal["debiased", "numerator"] = "debiased"
    """Between steps: nothing but the model's own weights, or the numerators too."""
    comm_dtype: Literal["fp32", "bf16"] = "fp32"
    """What travels; bf16 keeps the sum of all replicas only up to its rounding."""
    buffers: Literal["local", "mix"] = "local"
    """Whether floating buffers, such as batch-norm statistics, are mixed like parameters."""
    on_send_failure: Literal["reabsorb", "running_sum"] = "reabsorb"
    """reabsorb: a sender takes back what was refused. running_sum: each message holds all that was ever sent
    (fp64), so the next one makes good for a lost one; two more copies of the weights per neighbour."""
    agree_every_steps: PositiveInt = 16
    """Steps between two looks whether someone asks to stop, or to join: two numbers over all replicas."""
    elastic: bool = False
    """Whether replicas may die and come back while the others go on."""
    timeout_s: PositiveFloat = 60.0
    """Of elastic: how long a silent replica is waited for."""
    max_restarts: NonNegativeInt = 3
    """Of elastic: how often `hardy train --workers` starts a replica again that was lost."""

    def __post_init__(self) -> None:
        """Check what the settings say together."""
        super().__post_init__()
        if self.elastic:
            self._check_elastic()
        if self.on_send_failure == "running_sum" and self.comm_dtype != "fp32":
            raise ConfigError(
                "strategy.on_send_failure='running_sum' sends sums in fp64, which strategy.comm_dtype="
                f"{self.comm_dtype!r} would round; set it to 'fp32'"
            )
        is_exact = self.weights.name == "adaptive" and self.weights.distance_mode == "exact"
        if self.on_send_failure == "running_sum" and is_exact:
            raise ConfigError(
                "strategy.weights.distance_mode='exact' needs the weights of single rounds, which strategy."
                "on_send_failure='running_sum' adds up; set it to 'reabsorb', or distances to 'sketch'"
            )
        if self.method == "gradient_tracking" and self.overlap:
            raise ConfigError(
                "strategy.overlap=true needs strategy.method='push': tracked gradients must belong to the "
                "step they correct; set it to false"
            )
        if self.method == "gradient_tracking" and self.mix_every_steps > 1:
            raise ConfigError(
                f"strategy.method='gradient_tracking' exchanges at every step, but strategy.mix_every_steps="
                f"{self.mix_every_steps}; set it to 1"
            )

    def _check_elastic(self) -> None:
        if self.mesh.shards > 1:
            raise ConfigError(
                f"strategy.elastic=true needs replicas of one worker in this version, but strategy.mesh."
                f"shards={self.mesh.shards}; set it to 1"
            )
        if self.topology.name in ONLY_SOME_SIZES:
            raise ConfigError(
                f"strategy.elastic=true needs a graph of any number of replicas, and strategy.topology.name="
                f"{self.topology.name!r} has only some; take 'one_peer_exponential', 'base_k' or "
                f"'symmetric_ring'"
            )
        needs = {"overlap": False, "method": "push", "on_send_failure": "reabsorb"}
        others = [
            f"strategy.{key}={getattr(self, key)!r}"
            for key, value in needs.items()
            if getattr(self, key) != value
        ]
        if others:
            raise ConfigError(
                f"strategy.elastic=true needs rounds that end with a receipt for each message, so that "
                f"survivors know what the lost one took, but {', '.join(others)}; set strategy.overlap to "
                f"false, strategy.method to 'push', strategy.on_send_failure to 'reabsorb'"
            )
