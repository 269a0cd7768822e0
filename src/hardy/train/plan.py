"""What a run will do, from its settings alone: every check that needs no tensors. Free of torch."""

from dataclasses import dataclass

from hardy.config import ConfigError
from hardy.distributed.config import LocalUpdateConfig
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.gossip.topology import Topology
from hardy.model.presets import HF_PREFIX, DecoderShape, check_context, count_parameters, resolve_shape
from hardy.optim.config import QAPOLLOConfig
from hardy.optim.schedules import check_warmup
from hardy.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the workers of a run."""

    rank: int = 0
    """This worker, from 0."""
    size: int = 1
    """Number of workers."""
    local_rank: int = 0
    """This worker among those of its machine; chooses the GPU."""
    address: str | None = None
    """Where the workers meet ("env://" or a "file://" path), or those of one replica that comes and goes;
    None for a worker alone."""
    store: str | None = None
    """Of replicas that come and go, "host:port" of the launcher's store."""
    restarts: int = 0
    """How often the launcher has started this replica again."""
    replica_size: int = 1
    """Of replicas that come and go, the workers of each, neighbours in rank."""

    @property
    def replica(self) -> int:
        """Number of this worker's replica among those that come and go, from 0."""
        return self.rank // self.replica_size

    @property
    def replicas(self) -> int:
        """How many replicas come and go.

        Example:
            >>> me = World(rank=5, size=6, replica_size=2)
            >>> me.replica, me.replicas, me.rank_in_replica
            (2, 3, 1)
        """
        return self.size // self.replica_size

    @property
    def rank_in_replica(self) -> int:
        """This worker among those of its replica, from 0."""
        return self.rank % self.replica_size


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """How one worker cuts its share of a batch."""

    packs: int
    """Packs run forward and backward at once."""
    count: int
    """Micro-batches in one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The size of a run."""

    num_workers: int
    replicas: int
    shards: int
    micro: MicroBatches
    steps: int
    tokens_per_step: int
    total_tokens: int
    num_parameters: int | None
    """None where only loading the model would tell."""


def plan_run(config: TrainConfig, *, num_workers: int) -> RunPlan:
    """Check what the settings say together, and return the size of the run.

    Example:
        >>> plan_run(TrainConfig(), num_workers=2).micro
        MicroBatches(packs=8, count=1)

    Raises:
        UserError: two settings, or a setting and the number of workers, do not fit.
    """
    copies = config.strategy.copies if isinstance(config.strategy, LocalUpdateConfig) else 1
    if num_workers % copies:
        raise ConfigError(
            f"strategy.copies={copies} does not divide the {num_workers} workers; start a multiple of it"
        )
    replicas, shards = config.strategy.mesh.sizes(num_workers // copies)
    micro = micro_batches(config.train.batch_packs, num_workers, config.train.micro_packs)
    check_warmup(config.optim.schedule.warmup_steps, total_steps=config.train.steps)
    _check_lengths(config)
    _check_balance(config)
    _check_optimizer(
        config, copies=copies if config.strategy.replicas_step_alone else replicas, shards=shards
    )
    shape = _shape(config)
    _check_strategy(config, replicas=replicas, shape=shape)
    tokens_per_step = config.train.batch_packs * config.data.pack_tokens
    return RunPlan(
        num_workers=num_workers,
        replicas=replicas,
        shards=shards,
        micro=micro,
        steps=config.train.steps,
        tokens_per_step=tokens_per_step,
        total_tokens=tokens_per_step * config.train.steps,
        num_parameters=None if shape is None else count_parameters(shape),
    )


def micro_batches(batch_packs: int, num_workers: int, micro_packs: int | None) -> MicroBatches:
    """Return how each worker cuts its share of a batch of `batch_packs` packs.

    Args:
        batch_packs: packs of one optimizer step, over all workers.
        num_workers: workers, who share the batch equally.
        micro_packs: packs that a worker runs at once; None means its whole share.

    Example:
        >>> micro_batches(16, 2, 4)
        MicroBatches(packs=4, count=2)

    Raises:
        ConfigError: the batch does not divide; the text names the nearest sizes that do.
    """
    unit = num_workers * (micro_packs or 1)
    if batch_packs % unit == 0:
        share = batch_packs // num_workers
        packs = micro_packs or share
        return MicroBatches(packs=packs, count=share // packs)
    below, above = batch_packs // unit * unit, (batch_packs // unit + 1) * unit
    nearest = f"{below} or {above}" if below else f"{above}"
    micro = f" x train.micro_packs={micro_packs}" if micro_packs else ""
    text = (
        f"train.batch_packs={batch_packs} must be a multiple of workers={num_workers}{micro}; "
        f"set train.batch_packs to {nearest}"
    )
    if micro_packs and batch_packs % num_workers == 0:
        share = batch_packs // num_workers
        fitting = min(
            (d for d in range(1, share + 1) if share % d == 0), key=lambda d: (abs(d - micro_packs), d)
        )
        text += f", or train.micro_packs to {fitting}"
    raise ConfigError(text)


def _check_lengths(config: TrainConfig) -> None:
    """Refuse pieces longer than a pack."""
    pack_tokens, document_tokens = config.data.pack_tokens, config.data.document_tokens
    if document_tokens is not None and document_tokens > pack_tokens:
        raise ConfigError(
            f"data.document_tokens={document_tokens} must be at most data.pack_tokens={pack_tokens}, which "
            f"holds whole pieces; lower data.document_tokens or raise data.pack_tokens"
        )


def _check_balance(config: TrainConfig) -> None:
    """Refuse what no plan of a balanced batch can be carried out with."""
    if config.balance.mode == "none":
        return
    if config.strategy.name != "synchronous":
        raise ConfigError(
            f"balance.mode={config.balance.mode!r} spreads the batch over all workers, and strategy.name="
            f"{config.strategy.name!r} lets each have its own; set strategy.name to synchronous, or "
            f"balance.mode to none"
        )
    if config.model.name.startswith(HF_PREFIX):
        raise ConfigError(
            f"balance.mode={config.balance.mode!r} needs a model whose attention can be shared, and model."
            f"name={config.model.name!r} brings its own; set balance.mode to none"
        )
    if getattr(config.optim, "release", False):
        raise ConfigError(
            f"balance.mode={config.balance.mode!r} gives steps different numbers of micro-batches, which "
            f"optim.release=true must know; set one of them to its default"
        )


def _check_optimizer(config: TrainConfig, *, copies: int, shards: int) -> None:
    """Refuse what cannot be done with a model that lies on several workers.

    Args:
        config: of the run.
        copies: workers, or groups of those who share one copy, that average gradients at every step.
        shards: workers over which a copy is split.
    """
    if isinstance(config.optim, QAPOLLOConfig) and shards > 1:
        raise ConfigError(
            f"optim.name=qapollo keeps int8 weights, which cannot be sharded yet, and strategy.mesh.shards "
            f"is {shards}; set it to 1, or use apollo_mini"
        )
    if getattr(config.optim, "release", False) and copies > 1 and shards == 1:
        raise ConfigError(
            f"optim.release=true works on one worker or with shards, and {copies} workers hold a whole model "
            f"each; set strategy.mesh.shards to {copies}"
        )


def _check_strategy(config: TrainConfig, *, replicas: int, shape: DecoderShape | None) -> None:
    """Refuse a graph that so few replicas cannot have, and more parts than the model has."""
    strategy = config.strategy
    if isinstance(strategy, PushSumConfig):
        Topology(strategy.topology, num_nodes=replicas)
    if isinstance(strategy, LocalUpdateConfig) and shape is not None:
        strategy.check_units(shape.num_layers + 1)


def _shape(config: TrainConfig) -> DecoderShape | None:
    """Check the model's sizes and return them; None for a model that is not ours."""
    if config.model.name.startswith(HF_PREFIX):
        return None
    from hardy.data.tokenizer import bpe_size, open_tokenizer  # imports numpy, too slow for `--help`

    tokenizer = config.data.tokenizer
    shape = resolve_shape(
        config.model, vocab_size=bpe_size(tokenizer) or open_tokenizer(tokenizer).vocab_size
    )
    check_context(
        shape.context_tokens, document_tokens=config.data.document_tokens or config.data.pack_tokens
    )
    return shape
