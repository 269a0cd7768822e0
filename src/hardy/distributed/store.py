"""The store that launcher and workers share: opened at one interface, reached with patience.

Paper: none. torch's own store listens at all interfaces, and (torch 2.13) one connection in about fifty hangs
although the store lives.
"""

import socket
from datetime import timedelta

# Documented, but torch does not mark it as exported.
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from hardy.clock import WallClock
from hardy.config import UserError

_TRY_S = 2.0
"""Until a connection is tried anew."""
_QUEUE = 256
"""Connections that may wait to be accepted."""


def open_store(host: str, *, port: int = 0) -> TCPStore:
    """Return a store that listens at this interface alone.

    Args:
        host: name or address of the interface.
        port: 0 takes a free one.

    Raises:
        UserError: the interface is not this machine's, or the port is taken.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind(where)
            listener.listen(_QUEUE)
            store = TCPStore(
                host,
                listener.getsockname()[1],
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.fileno(),
            )
            listener.detach()  # it is the store's now
            return store
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot listen at {host!r}, port {port or 'any'}; give a name or address of this machine and a "
            f"port that is free: {error}"
        ) from error


def connect_store(address: str, *, timeout_s: float) -> TCPStore:
    """Return a connection to the store at "host:port", for one thread.

    Args:
        address: of `open_store`'s machine.
        timeout_s: until it must answer, here and whenever it is asked.

    Raises:
        UserError: the address is not of this form.
        RuntimeError: nobody answers.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"the address of the store is host:port, got {address!r}")
    clock = WallClock()
    until_s = clock.now() + timeout_s
    while True:
        left_s = max(until_s - clock.now(), 0.1)
        try:
            store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=min(left_s, _TRY_S)))
        except RuntimeError:
            if clock.now() >= until_s:
                raise
            continue
        store.set_timeout(timedelta(seconds=timeout_s))
        return store
