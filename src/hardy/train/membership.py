"""What a replica that may die and come back needs beside a run: number, group, a checkpoint to begin at.

It is a world of its own, of one worker or of several that share its model: nothing but
`hardy.distributed.elastic` ties it to the others.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hardy.config import UserError, to_dict
from hardy.distributed.comm import Alone, Communicator, TorchComm, join_world, leave_world
from hardy.distributed.config import LocalUpdateConfig
from hardy.distributed.elastic import Patience, StoreGroup
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.gossip.push_sum import PushSum
from hardy.distributed.groups import OuterGroup
from hardy.distributed.local.updates import LocalUpdates
from hardy.distributed.robust.fastest import FastestGroup
from hardy.distributed.strategy import Strategy
from hardy.train import manifest
from hardy.train.config import TrainConfig
from hardy.train.folder import RunFolder, versions
from hardy.train.manifest import Checkpoint
from hardy.train.plan import World

_ENDLESS_S = 365 * 86400.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """One replica among those that come and go."""

    replica: int
    """This one, from 0."""
    replicas: int
    """How many the run was started with; they share its batches, whoever lives."""
    enter: Callable[[], OuterGroup] | None = None
    """Comes to the others and returns the group; called once, when all else is built, for they wait then."""
    elect: Callable[[int], FastestGroup] | None = None
    """Instead of `enter`, where the first k make each step: comes to the others at the first step."""


def membership_of(
    config: TrainConfig, world: World, held: ExitStack, *, inner: Communicator | None = None
) -> Membership | None:
    """Return the membership of a replica that a launcher with a store has started; None for all others.

    Args:
        config: the configuration of the run.
        world: who this process is.
        held: closes the group.
        inner: the workers of this replica; none means this one alone.

    Raises:
        UserError: replicas should come and go, but nobody holds a store for them.
    """
    strategy = config.strategy
    if not isinstance(strategy, (LocalUpdateConfig, PushSumConfig)) or not strategy.elastic:
        return None
    if world.store is None:
        replicas, _ = strategy.mesh.sizes(world.size)
        if replicas > 1:
            raise UserError(
                "strategy.elastic=true needs replicas that `hardy train --workers N` starts, which starts "
                "them again; start it so, or set strategy.elastic to false"
            )
        return None
    store, patience = world.store, patience_of(strategy.timeout_s)

    def enter() -> OuterGroup:
        group = StoreGroup(
            store,
            world.replica,
            founders=world.replicas,
            fingerprint=fingerprint(config),
            inner=inner,
            patience=patience,
        )
        return held.enter_context(closing(group))

    return Membership(replica=world.replica, replicas=world.replicas, enter=enter)


def join_replica(
    config: TrainConfig, world: World, held: ExitStack, *, device_type: Literal["cpu", "cuda"]
) -> Communicator:
    """Meet the workers of this replica, where it comes and goes and has several; return them.

    They wait for each other twice as long as for other replicas: while one of them waits for a replica that
    has fallen silent in the middle of a round, the others wait for it, and must not give up before it does.
    With elections they wait without end, as their first worker does for the gradients of other replicas; one
    that has ended is noticed at once.

    Args:
        config: the configuration of the run.
        world: who this process is.
        held: leaves them.
        device_type: where the model lives.

    Raises:
        WorkerLostError: the others did not come in time.
    """
    strategy = config.strategy
    if world.replica_size == 1:
        return Alone()
    assert world.address is not None, "the launcher says where they meet"
    join_world(
        rank=world.rank_in_replica,
        size=world.replica_size,
        init_method=world.address,
        device_type=device_type,
        timeout_s=Patience.start_s,
    )
    held.callback(leave_world)
    timeout_s = 2 * strategy.timeout_s if isinstance(strategy, LocalUpdateConfig) else _ENDLESS_S
    return TorchComm(timeout_s=timeout_s).divide([range(world.replica_size)], link="inner")


def has_come_late(strategy: Strategy) -> bool:
    """Take over the place of replicas that train already; return whether there are any."""
    if isinstance(strategy, PushSum):
        return strategy.join()
    if not isinstance(strategy, LocalUpdates):
        return False  # its weights, from a checkpoint, are brought up to date at the first step
    strategy.join()
    return bool(strategy.anchors)


def leads(outer: OuterGroup, replica: int) -> bool:
    """Return whether this is the lowest replica of those that live: it does what is done once in a run."""
    return replica == min(outer.members)


def patience_of(timeout_s: float) -> Patience:
    """Return how replicas wait for each other, given how long a silent one is waited for.

    Example:
        >>> patience_of(5.0).limit_s, patience_of(60.0).limit_s
        (5.0, 10.0)
    """
    limit_s = min(timeout_s, Patience.limit_s)
    return Patience(heartbeat_s=limit_s / 5, limit_s=limit_s, timeout_s=timeout_s)


def fingerprint(config: TrainConfig) -> str:
    """Return what replicas must have in common: all settings but `log`, and the versions that compute.

    Example:
        >>> fingerprint(TrainConfig()) == fingerprint(TrainConfig())
        True
    """
    settings = {key: value for key, value in to_dict(config).items() if key != "log"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    found = versions()
    return f"settings {digest} with hardy {found['hardy']} and torch {found['torch']}"


def check_alike(config: TrainConfig, comm: Communicator) -> None:
    """Refuse workers that were started with other settings or versions than the first.

    Raises:
        UserError: on every worker, naming those that differ.
    """
    digest = hashlib.sha256(fingerprint(config).encode()).digest()
    rows = comm.all_gather(torch.tensor(list(digest), dtype=torch.uint8)).tolist()
    apart = [rank for rank, row in enumerate(rows) if row != rows[0]]
    if apart:
        raise UserError(
            f"workers {', '.join(map(str, apart))} of {comm.size} have other settings or versions than "
            f"worker 0; this one has {fingerprint(config)}: start all with the same config and installation"
        )


def newest_of_any(folder: RunFolder, membership: Membership) -> tuple[int, Checkpoint] | None:
    """Return the replica to read from and its checkpoint: the newest good one that any replica has.

    Replicas save right after a round, so all of one step agree in anchor and weights. A replica that has this
    step reads its own; one that was lost before it reads the first one's that has. None where nothing was
    saved. For a founder: no round can end without it, so nothing is saved or deleted meanwhile.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    others = [replica for replica in range(membership.replicas) if replica != membership.replica]
    found = [
        (-checkpoint.step, place, replica, checkpoint.folder)
        for place, replica in enumerate([membership.replica, *others])
        for checkpoint in manifest.sound(folder.checkpoints_of(replica))
    ]
    for _, _, replica, path in sorted(found):
        try:
            return replica, manifest.verify(path)
        except manifest.DamagedError as error:
            logger.warning("damaged checkpoint left out: %s", error)
    if any(manifest.folders(folder.checkpoints_of(replica)) for replica in range(membership.replicas)):
        raise UserError(
            f"no checkpoint of any replica in {folder.path} is good; restore one from a backup, or delete "
            f"them to start from step 0"
        )
    return None


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is here, so that of several that prepare a corpus one does the work."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".preparing").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
