"""What the environment says: where caches live, and which worker this process is."""

from collections.abc import Mapping
from pathlib import Path

from hardy.config import UserError
from hardy.train.plan import World

MEETING = "HARDY_MEETING"
"""Set by `hardy train --workers N`: the address of the file by which its workers meet."""
STORE = "HARDY_STORE"
"""Set instead for replicas that come and go: host:port of the store that their launcher holds."""
RESTARTS = "HARDY_RESTARTS"
"""Set beside `STORE`: how often this replica was started again."""
REPLICA_SIZE = "HARDY_REPLICA_SIZE"
"""Set beside `STORE` where a replica has several workers, which meet at `MEETING`: how many."""


def cache_dir(option: str | None, environment: Mapping[str, str]) -> Path:
    """Return the cache folder: the option, else HARDY_CACHE, else XDG_CACHE_HOME/hardy, else ~/.cache/hardy.

    Example:
        >>> cache_dir(None, {"XDG_CACHE_HOME": "/var/cache"}).as_posix()
        '/var/cache/hardy'
    """
    if option or environment.get("HARDY_CACHE"):
        return Path(option or environment["HARDY_CACHE"]).expanduser()
    parent = environment.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path("~/.cache").expanduser()) / "hardy"


def world(environment: Mapping[str, str]) -> World:
    """Return which worker this process is; alone unless a launcher set RANK and WORLD_SIZE.

    `hardy train --workers N` sets `MEETING`, or `STORE` and `RESTARTS`, or all of them and `REPLICA_SIZE`;
    torchrun sets MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: a variable is missing or no number, or the numbers do not fit.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return World()
    numbers: dict[str, int] = {}
    unsaid = {"LOCAL_RANK": "0", RESTARTS: "0", REPLICA_SIZE: "1"}
    for name in ("RANK", "WORLD_SIZE", *unsaid):
        text = environment.get(name, unsaid.get(name, ""))
        if not text.isdecimal():
            raise UserError(
                f"the launcher set {name}={text!r}, which is no number; start workers by `hardy train "
                f"--workers N` or torchrun, which set RANK, WORLD_SIZE and LOCAL_RANK"
            )
        numbers[name] = int(text)
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UserError(f"RANK={numbers['RANK']} must be below WORLD_SIZE={numbers['WORLD_SIZE']}")
    address, store = environment.get(MEETING), environment.get(STORE)
    if address is None and store is None and numbers["WORLD_SIZE"] > 1:
        if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
            raise UserError("WORLD_SIZE is set, but not MASTER_ADDR and MASTER_PORT, where the workers meet")
        address = "env://"
    replica_size = numbers[REPLICA_SIZE]
    if replica_size < 1 or numbers["WORLD_SIZE"] % replica_size or (replica_size > 1 and not address):
        raise UserError(
            f"the launcher set {REPLICA_SIZE}={replica_size}, which must divide WORLD_SIZE="
            f"{numbers['WORLD_SIZE']} and, above 1, come with {MEETING}; start workers by `hardy train "
            f"--workers N`"
        )
    return World(
        rank=numbers["RANK"],
        size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        address=address,
        store=store,
        restarts=numbers[RESTARTS],
        replica_size=replica_size,
    )


def who_works(asked: int | None, environment: Mapping[str, str], *, default: int = 1) -> tuple[World, int]:
    """Return who this process is and how many workers there are; a launcher decides before `--workers`.

    Args:
        asked: `--workers`.
        environment: ours.
        default: workers where nobody says.

    Raises:
        UserError: fewer than one, or another number than a launcher started.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--workers must be at least 1, got {asked}")
    me = world(environment)
    if me.size > 1 and asked not in (None, 1, me.size):
        raise UserError(
            f"--workers {asked} was given, but a launcher started {me.size} workers; leave --workers out"
        )
    return me, me.size if me.size > 1 else asked or default
