"""Compiling the C++ of this room with the machine's own compiler, once for each machine, and loading it.

The library lies in a cache folder under a name that depends on all it was made from: sources, flags, the
compiler's version and the processor, whose instructions it uses. It is written elsewhere and renamed, so a
half-written one is never seen, and processes that compile at once do not disturb each other.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = tuple(
    Path(__file__).parent / name
    for name in (
        "native.cpp",
        "native_apollo.hpp",
        "native_rows.hpp",
        "native_smmf.hpp",
        "native_smmf_run.hpp",
        "native_smmf_step.hpp",
        "native_smmf_wide.hpp",
        "native_threads.hpp",
        "native_tiled_sketch.hpp",
        "native_tiles.hpp",
        "native_values.hpp",
    )
)
"""The file that is compiled, then those it includes."""
COMPILERS = ("g++", "clang++")
"""Commands that are tried, the first that exists is used."""
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-w"),
    # Only what does not change a result: nobody reads errno or floating-point traps.
    *("-fno-math-errno", "-fno-trapping-math"),
    # `omp simd` marks the loops whose sums may be reordered; this needs no OpenMP library.
    "-fopenmp-simd",
)
MACHINE_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""Sets of flags for the machine at hand, tried in order until one compiles."""
COMPILE_S = 300
"""A compiler that takes longer is given up."""


class BuildError(RuntimeError):
    """There is no compiler, or it refused; the text holds its message."""


class _Settings:
    """What may be said before the first use."""

    cache_dir: Path | None = None


def use_cache_dir(folder: Path) -> None:
    """Keep the compiled library in `folder` rather than ~/.cache/hardy; to be said before the first use."""
    _Settings.cache_dir = folder
    loaded_library.cache_clear()


@functools.cache
def loaded_library() -> ctypes.CDLL | None:
    """Return the library of native.cpp; None, after a warning, where it cannot be had.

    The first call on a machine compiles, which takes a core about 5 seconds.
    """
    try:
        return load_library(SOURCES, cache_dir=_Settings.cache_dir or _user_cache())
    except BuildError as error:
        logger.warning("work on the CPU is left to torch operations, which are slower: %s", error)
        return None


def _user_cache() -> Path | None:
    """Return ~/.cache/hardy; None for a user without a home."""
    try:
        return Path("~/.cache/hardy").expanduser()
    except RuntimeError:
        return None


def use_openmp_threads(*, wanted: bool) -> bool:
    """Run on the threads that torch's OpenMP library keeps, or again on threads of our own.

    After each parallel operation of torch these threads wait for the next one for some milliseconds without
    sleeping, so that threads of our own must share the cores with them: right behind such an operation SMMF's
    sweep of 4096 x 4096 took 9.3 ms on two idle cores, and 7.5 ms on torch's threads (a first version of it).
    On cores that others use too, threads of our own are faster. A process forked from one that computed in
    parallel must not ask for torch's threads: it hangs, as it does in torch's own parallel operations.

    Returns:
        Whether torch's threads are used: not where there is no such library.
    """
    loaded = loaded_library()
    return loaded is not None and bool(loaded.native_use_openmp(int(wanted)))


def load_library(
    sources: Sequence[Path],
    *,
    cache_dir: Path | None,
    compilers: Sequence[str] = COMPILERS,
    machine_flags: Sequence[Sequence[str]] = MACHINE_FLAGS,
) -> ctypes.CDLL:
    """Return the library made of `sources`, compiled unless it was before.

    Args:
        sources: The first is compiled; the others are the headers it includes.
        cache_dir: The library lies in its folder `native`. Where there is none or it cannot be used, the
            library is compiled for this process alone.
        compilers: Commands, the first that exists is used.
        machine_flags: Sets of flags, tried in order until one compiles.

    Raises:
        BuildError: there is no compiler, it refused the source with every set of flags, a source is missing,
            or what was compiled cannot be loaded.
    """
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler was found ({' or '.join(compilers)}); install one, such as g++")
    name = f"hardy-{_key(sources, compiler, machine_flags)}.so"

    def build(folder: Path) -> Path:
        _compile(sources[0], folder / name, compiler, machine_flags)
        return folder / name

    if cache_dir is not None:
        try:
            return _cached(cache_dir / "native" / name, build)
        except OSError as error:
            logger.info("the compiled library cannot be kept in %s and is made anew: %s", cache_dir, error)
    try:
        with tempfile.TemporaryDirectory() as work:
            return ctypes.CDLL(str(build(Path(work))))  # stays loaded when its file is gone
    except OSError as error:
        raise BuildError(
            f"the compiled library cannot be loaded from {tempfile.gettempdir()}: {error}"
        ) from error


def _cached(ready: Path, build: Callable[[Path], Path]) -> ctypes.CDLL:
    """Return the library at `ready`, put there first where it is missing or damaged."""
    if ready.exists():
        try:
            return ctypes.CDLL(str(ready))
        except OSError as error:
            logger.info("the cached library %s cannot be loaded and is compiled again: %s", ready, error)
    logger.info("compiling %s, once for this machine", ready.name)
    ready.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=ready.parent) as work:
        os.replace(build(Path(work)), ready)
    return ctypes.CDLL(str(ready))


def _key(sources: Sequence[Path], compiler: str, machine_flags: Sequence[Sequence[str]]) -> str:
    """Return a digest of everything that decides what the library is."""
    parts = [
        repr((COMMON_FLAGS, [tuple(flags) for flags in machine_flags])),
        _version_of(compiler),
        _processor(),
    ]
    try:
        parts += [source.read_text(encoding="utf-8") for source in sources]
    except OSError as error:
        raise BuildError(
            f"{error.filename} cannot be read ({error.strerror}); install hardy again"
        ) from error
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _version_of(compiler: str) -> str:
    done = _run([compiler, "--version"])
    if done.returncode:
        raise BuildError(
            f"{compiler} --version failed: {_first_lines(done.stderr)}; repair or remove the compiler"
        )
    return done.stdout


def _processor() -> str:
    """Return what `-march=native` depends on: the processor's model and instruction sets."""
    lines = {platform.machine(), platform.processor()}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: machine and processor must do
        text = ""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines |= {line for line in text.splitlines() if line.startswith(wanted)}
    return "\n".join(sorted(lines))


def _compile(source: Path, target: Path, compiler: str, machine_flags: Sequence[Sequence[str]]) -> None:
    """Compile `source` to the shared library `target` with the first flags that work."""
    message = ""
    for flags in machine_flags:
        done = _run([compiler, *COMMON_FLAGS, *flags, str(source), "-o", str(target)])
        if done.returncode == 0 and target.exists():
            return
        message = done.stderr or f"exit status {done.returncode}"
    raise BuildError(f"{compiler} could not compile {source.name}: {_first_lines(message)}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMPILE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}; repair or remove the compiler") from error


def _first_lines(message: str) -> str:
    return " | ".join(message.strip().splitlines()[:5])
