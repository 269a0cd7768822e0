"""The whole configuration of a run: one field per section, each owned by its room. Free of torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hardy.balance.config import BalanceConfig
from hardy.config import Config, NonNegativeInt, PositiveFloat, PositiveInt
from hardy.data.config import DataConfig
from hardy.distributed.config import StrategyConfig, SynchronousConfig
from hardy.model.config import ModelConfig
from hardy.optim.config import AdamWConfig, OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Config):
    """How long and how much per step."""

    section: ClassVar[str] = "train"
    seed: NonNegativeInt = 0
    """Seed of every random stream: initial weights, order of documents, sampling."""
    steps: PositiveInt = 200
    """Optimizer steps of the whole run."""
    batch_packs: PositiveInt = 16
    """Packs in one optimizer step, over all workers."""
    micro_packs: PositiveInt | None = None
    """Packs one worker runs forward and backward at once; none means its whole share of the batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto takes CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs matrix products under autocast; auto means bf16 on CUDA and fp32 on CPU."""
    evaluate_every_steps: PositiveInt = 50
    """Steps between two evaluations on held-out documents; there is always one at the end."""
    evaluate_packs: PositiveInt = 32
    """Held-out packs in one evaluation (fewer when the split is smaller)."""
    max_nonfinite_steps: NonNegativeInt = 10
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops."""
    max_loss_rise: PositiveFloat | None = 3.0
    """Stop as diverged when the smoothed loss (nats) stands this far above its best; none never stops."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """When the run is saved and what is kept."""

    section: ClassVar[str] = "checkpoint"
    every_steps: PositiveInt = 100
    """Steps between two checkpoints; there is always one at the end and on SIGTERM or Ctrl-C."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: NonNegativeInt = 1
    """Checkpoints with the lowest validation loss that are kept besides."""
    asynchronous: bool = True
    """Whether writing goes on beside training; tensors are copied to memory first."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Config):
    """What is shown and where metrics go besides metrics.jsonl."""

    section: ClassVar[str] = "log"
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """live is a moving display, plain a line now and then; auto takes live on a terminal."""
    every_steps: PositiveInt = 10
    """Steps between two plain lines."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Services that also receive the metrics; each needs the extra `track`."""
    project: str = "hardy"
    """Project name for the trackers."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimizerConfig = field(default_factory=AdamWConfig)
    strategy: StrategyConfig = field(default_factory=SynchronousConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
