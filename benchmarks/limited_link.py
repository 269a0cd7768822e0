"""Real processes joined by gloo, over links that the kernel limits: one network namespace for each of them.

Linux only, as root, with `ip` and `tc` (iproute2). Nothing is changed outside namespaces of our own, which
are gone at the end: each process has one with an interface to a switch, which has its own; a token bucket
limits what each sends. Without a bandwidth the processes talk over the loopback of the machine.
"""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hardy.distributed.comm import Communicator, join_world, leave_world

BURST_BYTES, BURST_S = 128_000, 0.004
"""Of the bucket, whichever is more: it must hold the largest packet that the kernel hands down at once, and
what the link sends until the kernel looks again."""
WIRE = "wire"
"""Name of the interface in each namespace."""
_CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Return why links cannot be limited here; None where they can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2"
    return None if os.geteuid() == 0 else "network namespaces need root"


@contextmanager
def links(count: int, *, bytes_per_s: float) -> Iterator[list[str]]:
    """Make namespaces whose interfaces send at most so many bytes per second; yield their names."""
    names = [f"hardy-{os.getpid()}-{number}" for number in range(count)]
    switch = f"hardy-{os.getpid()}-switch"
    made: list[str] = []
    try:
        for name in (switch, *names):
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for number, name in enumerate(names):
            port = f"port{number}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", WIRE, "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "switch", "up")
            _ip("-n", name, "address", "add", f"10.66.0.{number + 1}/24", "dev", WIRE)
            for interface in ("lo", WIRE):
                _ip("-n", name, "link", "set", interface, "up")
            burst = max(BURST_BYTES, round(BURST_S * bytes_per_s))
            rate = ["rate", f"{round(8 * bytes_per_s)}bit", "burst", str(burst), "latency", "100ms"]
            _run("tc", "-n", name, "qdisc", "add", "dev", WIRE, "root", "tbf", *rate)
        yield names
    finally:
        for name in made:
            _ip("netns", "delete", name)


def run_processes(
    body: Callable[[Communicator], Any], count: int, *, bytes_per_s: float | None, timeout_s: float
) -> list[Any]:
    """Run `body(comm)` in forked processes and return what each returned, in rank order.

    Raises:
        RuntimeError: a process failed or took too long; with its traceback.
    """
    if bytes_per_s is None:
        return _run_in(body, [None] * count, timeout_s=timeout_s)
    with links(count, bytes_per_s=bytes_per_s) as names:
        return _run_in(body, list(names), timeout_s=timeout_s)


def _run_in(
    body: Callable[[Communicator], Any], namespaces: list[str | None], *, timeout_s: float
) -> list[Any]:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        processes = [
            context.Process(
                target=_work, args=(body, rank, namespaces, folder), kwargs={"timeout_s": timeout_s}
            )
            for rank in range(len(namespaces))
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        if any(codes) or None in codes:
            told = "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))
            raise RuntimeError(f"processes ended with {codes} (None: not within {timeout_s:g} s)\n{told}")
        return [torch.load(folder / f"{rank}.pt") for rank in range(len(namespaces))]


def _work(
    body: Callable[[Communicator], Any],
    rank: int,
    namespaces: list[str | None],
    folder: Path,
    *,
    timeout_s: float,
) -> None:
    """Be one process."""
    torch.set_num_threads(1)
    try:
        namespace = namespaces[rank]
        if namespace is not None:
            _enter(namespace)
            os.environ["GLOO_SOCKET_IFNAME"] = WIRE
        comm = join_world(
            rank=rank,
            size=len(namespaces),
            init_method=f"file://{folder}/store",
            device_type="cpu",
            timeout_s=timeout_s,
        )
        torch.save(body(comm), folder / f"{rank}.pt")
        leave_world()
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"--- process {rank}\n{traceback.format_exc()}")
        os._exit(1)


def _enter(namespace: str) -> None:
    """Move this process into a network namespace."""
    library = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if library.setns(handle, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    finally:
        os.close(handle)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
