"""What a run needs whose steps go on with the first k replicas: the launcher's host, a member's way in.

Each replica is a world of its own, of one worker or of several that share its model; nothing but the host of
the elections ties it to the others.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from hardy.config import UserError
from hardy.distributed.comm import Alone, Communicator
from hardy.distributed.robust.config import CombinedConfig
from hardy.distributed.robust.control import ElectionHost, RunKey, StoreWire
from hardy.distributed.robust.election import rules_of
from hardy.distributed.robust.election_log import ElectionLog, read_log
from hardy.distributed.robust.fastest import FastestGroup
from hardy.distributed.robust.fastest_config import FastestConfig
from hardy.train.config import TrainConfig
from hardy.train.membership import check_alike, fingerprint
from hardy.train.plan import World

LOG = "elections.jsonl"
"""In the run folder: who was elected at each step."""


def fastest_of(config: TrainConfig) -> FastestConfig | None:
    """Return the settings of the elections; None where all workers make each step."""
    return config.strategy.fastest if isinstance(config.strategy, CombinedConfig) else None


def election_host(config: TrainConfig, run_dir: Path, *, replicas: int) -> ElectionHost:
    """Return the host of a run's elections, which the launcher holds until all replicas have ended.

    Raises:
        UserError: a file of a secret, or a log to be replayed, cannot be read.
    """
    fastest = fastest_of(config)
    assert fastest is not None and isinstance(config.strategy, CombinedConfig), "asked for where it is set"
    return ElectionHost(
        rules_of(fastest, num_faulty=config.strategy.f),
        _key(config, fastest, run_dir),
        replicas=replicas,
        record_line=ElectionLog(run_dir / LOG).write,
        replay=None if fastest.replay is None else read_log(Path(fastest.replay)),
    )


def way_in(
    config: TrainConfig, world: World, run_dir: Path, held: ExitStack, *, inner: Communicator | None = None
) -> Callable[[int], FastestGroup] | None:
    """Return what brings this replica to the others, given the steps its weights have done.

    Args:
        config: the run; without elections there is nothing to enter.
        world: who this process is.
        run_dir: its folder.
        held: closes the group.
        inner: the workers of this replica; none means this one alone.

    Raises:
        UserError: nobody holds elections.
    """
    fastest = fastest_of(config)
    if fastest is None:
        return None
    if world.store is None:
        raise UserError(
            f"strategy.fastest.k={fastest.k} needs replicas that `hardy train --workers N` starts, which "
            f"holds the elections; start it so, or leave out strategy.fastest"
        )
    address, key, inner = world.store, _key(config, fastest, run_dir), inner or Alone()

    def enter(step: int) -> FastestGroup:
        check_alike(config, inner)  # the coordinator hears of the first worker only
        wire = StoreWire(
            address,
            world.replica,
            key,
            shard=inner.rank,
            silence_s=fastest.silence_s,
            timeout_s=fastest.timeout_s,
        )
        group = FastestGroup(wire, replicas=world.replicas, step=step, inner=inner)
        return held.enter_context(closing(group))

    return enter


def _key(config: TrainConfig, fastest: FastestConfig, run_dir: Path) -> RunKey:
    secret = b""
    if fastest.secret_file is not None:
        try:
            secret = Path(fastest.secret_file).expanduser().read_bytes().strip()
        except OSError as error:
            raise UserError(
                f"strategy.fastest.secret_file={fastest.secret_file} cannot be read: {error.strerror}"
            ) from error
        if not secret:
            raise UserError(
                f"strategy.fastest.secret_file={fastest.secret_file} is empty; put a secret there"
            )
    return RunKey(run_id=str(run_dir.resolve()), fingerprint=fingerprint(config), secret=secret)
