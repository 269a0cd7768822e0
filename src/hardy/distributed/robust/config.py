"""Settings of training with workers that are slow, fail or lie. Free of torch."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from hardy.config import Config, ConfigError, NonNegativeInt, PositiveInt, Range, read_arguments, unknown_name
from hardy.distributed.aggregation.names import (
    BY_DISTANCE,
    NEEDS_REFERENCE,
    ONLY_SHORTEN,
    RULE_NAMES,
    SELF_REPORTED,
    split_pre_aggregator,
)
from hardy.distributed.attack_names import ATTACK_NAMES
from hardy.distributed.mesh_config import MeshConfig
from hardy.distributed.robust.fastest_config import FastestConfig


@dataclass(frozen=True, kw_only=True)
class TrustedConfig(Config):
    """Text that is known to be good, on whose gradient dSTAR and its relatives lean."""

    section: ClassVar[str] = "strategy.trusted"
    packs: PositiveInt = 2
    """Packs of one trusted batch."""
    pool_packs: PositiveInt = 16
    """Packs to draw from, in turn: the last of the validation text, which validation then leaves out."""
    every_steps: PositiveInt = 1
    """Steps between two trusted gradients; in between the last one serves."""
    agree: Literal["median", "own"] = "median"
    """Whose trusted gradient counts: the median over the workers, or each worker's own."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Config):
    """An attack that some workers play, to see what a rule is worth."""

    section: ClassVar[str] = "strategy.attack"
    name: str = "none"
    """none, or an attack of `hardy.distributed.attacks`, such as sign_flip, ipm, alie, nan."""
    workers: tuple[NonNegativeInt, ...] = ()
    """Who attacks, by number."""
    arguments: tuple[str, ...] = ()
    """Arguments of the attack, such as strength=0.5."""
    from_step: NonNegativeInt = 0
    """First step at which it is played."""

    def __post_init__(self) -> None:
        """Refuse an attack that nobody knows or nobody plays."""
        super().__post_init__()
        if self.name != "none" and self.name not in ATTACK_NAMES:
            raise ConfigError(
                f"strategy.attack.name: {unknown_name(self.name, 'attack', ['none', *ATTACK_NAMES])}"
            )
        if (self.name == "none") != (not self.workers):
            raise ConfigError(
                f"strategy.attack.name={self.name!r} with strategy.attack.workers={list(self.workers)}: set "
                f"both to play an attack, or neither"
            )
        read_arguments(self.arguments, setting="strategy.attack.arguments")


@dataclass(frozen=True, kw_only=True)
class CombinedConfig(Config):
    """Every step's gradients are combined by a rule (one strategy, two names)."""

    section: ClassVar[str] = "strategy"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the workers are laid out: each replica is one worker of the rule."""
    rule: str = "trimmed_mean"
    """How many gradients become one: mean, median, trimmed_mean, multi_krum, geometric_median, dstar, ..."""
    f: NonNegativeInt = 1
    """How many of the gradients of a step may be anything."""
    arguments: tuple[str, ...] = ()
    """Arguments of the rule, such as keep=3."""
    pre: tuple[str, ...] = ("nnm",)
    """What is done before the rule, in this order: nnm, bucketing:2, clip:1.5, arc."""
    worker_momentum: Annotated[float, Range(least=0, below=1)] = 0.0
    """Rate at which each worker averages its own gradients before it sends them; 0.9 helps every rule. Under
    AdamW set optim.beta1 to 0 and optim.lr to about a third besides."""
    history: Annotated[float, Range(least=0, below=1)] = 0.0
    """Rate at which each worker's gradients are averaged before they are judged, while those of the step are
    added up; 0 judges each step by itself. 0.99 with rule=mda and pre=arc finds what hides in noise."""
    worker: Literal["replica", "rank"] = "replica"
    """What counts as one worker: a replica, or a rank that shares the model with the others (FSDP2, DDP)."""
    exchange: Literal["slices", "scalars"] = "slices"
    """slices: each worker combines a part of all gradients. scalars: each reports its own numbers, and they
    are believed; only for rules that need no more."""
    on_excess: Literal["warn", "error"] = "warn"
    """What to do when more gradients than f are not finite."""
    fastest: FastestConfig | None = None
    """Goes on with the first k replicas of each step; none waits for all."""
    trusted: TrustedConfig = field(default_factory=TrustedConfig)
    """Of rules that lean on a trusted gradient."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """An attack to be played."""

    def __post_init__(self) -> None:
        """Check what the settings say together."""
        super().__post_init__()
        if self.rule not in RULE_NAMES:
            raise ConfigError(f"strategy.rule: {unknown_name(self.rule, 'rule', RULE_NAMES)}")
        if self.rule == "monna":
            raise ConfigError(
                "strategy.rule='monna' leans on each worker's own gradient, so workers would go apart; it is "
                "for training without a common model. Choose another rule, such as trimmed_mean"
            )
        read_arguments(self.arguments, setting="strategy.arguments")
        for text in self.pre:
            try:
                split_pre_aggregator(text)
            except ConfigError as error:
                raise ConfigError(f"strategy.pre: {error}") from None
        if self.history:
            self._check_history()
        if self.exchange == "scalars":
            self._check_scalars()
        if self.worker == "rank":
            self._check_ranks()
        if self.fastest is not None:
            self._check_fastest()

    def _check_history(self) -> None:
        if self.rule not in BY_DISTANCE:
            raise ConfigError(
                f"strategy.history={self.history:g} needs a strategy.rule that judges by distances alone "
                f"({', '.join(sorted(BY_DISTANCE))}), and {self.rule!r} does not; choose one, such as mda"
            )
        mixing = [text for text in self.pre if split_pre_aggregator(text)[0] not in ONLY_SHORTEN]
        if mixing:
            raise ConfigError(
                f"strategy.history={self.history:g} must know whose a gradient is, and strategy.pre="
                f"{list(self.pre)} mixes them; set strategy.pre to arc, or to nothing"
            )

    def _check_scalars(self) -> None:
        if self.rule not in SELF_REPORTED or self.pre:
            raise ConfigError(
                f"strategy.exchange='scalars' needs a rule that goes by each worker's own numbers alone "
                f"({', '.join(sorted(SELF_REPORTED))}) and no strategy.pre, but strategy.rule="
                f"{self.rule!r} and strategy.pre={list(self.pre)}; set strategy.exchange to 'slices'"
            )
        if self.worker == "rank":
            raise ConfigError(
                "strategy.exchange='scalars' needs strategy.worker='replica': inside one replica gradients "
                "are cut into slices anyway; set strategy.exchange to 'slices'"
            )
        if self.attack.name != "none":
            raise ConfigError(
                "strategy.exchange='scalars' plays no attacks: they are played where slices are combined; "
                "set strategy.exchange to 'slices'"
            )

    def _check_fastest(self) -> None:
        if self.worker == "rank":
            raise ConfigError(
                "strategy.fastest needs strategy.worker='replica': ranks that share a model cannot go on "
                "without one of them"
            )
        if self.rule in ("centered_clip", "kardam") or self.history:
            setting = f"history={self.history:g}" if self.history else f"rule={self.rule!r}"
            raise ConfigError(
                f"strategy.{setting} remembers gradients, and with strategy.fastest other workers combine "
                f"them at each step; choose another, or leave out strategy.fastest"
            )
        if self.trusted.every_steps > 1 and self.needs_trusted:
            raise ConfigError(
                f"strategy.trusted.every_steps={self.trusted.every_steps} keeps a gradient that a replica "
                f"which was late does not have; set it to 1 with strategy.fastest"
            )

    def _check_ranks(self) -> None:
        if self.needs_trusted:
            raise ConfigError(
                f"strategy.worker='rank' has no trusted gradient of its own, which strategy.rule="
                f"{self.rule!r} needs; set strategy.worker to 'replica'"
            )
        if self.worker_momentum:
            raise ConfigError(
                f"strategy.worker='rank' combines gradients inside the backward pass, so strategy."
                f"worker_momentum={self.worker_momentum:g} cannot act before; set it to 0, or "
                f"strategy.worker to 'replica'"
            )

    @property
    def replicas_step_alone(self) -> bool:
        """Whether gradients are averaged within a replica only."""
        return self.worker == "replica"

    @property
    def needs_trusted(self) -> bool:
        """Whether the rule leans on a trusted gradient."""
        return self.rule in NEEDS_REFERENCE


@dataclass(frozen=True, kw_only=True)
class RobustConfig(CombinedConfig):
    """Every step's gradients are combined by a rule that bad ones cannot bend far."""

    name: Literal["robust"] = "robust"
    """The strategy."""


@dataclass(frozen=True, kw_only=True)
class DStarConfig(CombinedConfig):
    """dSTAR-style filtering (arXiv 2412.07151): a trusted gradient decides who is believed."""

    name: Literal["dstar"] = "dstar"
    """The strategy."""
    rule: str = "dstar"
    """How many gradients become one."""
    pre: tuple[str, ...] = ()
    """What is done before the rule, in this order: nnm, bucketing:2, clip:1.5, arc."""
    exchange: Literal["slices", "scalars"] = "scalars"
    """slices: each worker combines a part of all gradients. scalars: each reports its own numbers, and they
    are believed; only for rules that need no more."""
