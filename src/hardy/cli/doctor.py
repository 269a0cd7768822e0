"""The verbs `doctor` and `version`: what this machine can do, what is missing, and how to get it."""

import argparse
import dataclasses
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from hardy.cli.environment import cache_dir
from hardy.cli.failure import FAILURE, SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser

NEEDED = ("numpy", "safetensors", "tokenizers", "rich", "matplotlib", "psutil")
EXTRAS = {
    "hf": ("transformers", "datasets"),
    "parquet": ("pyarrow",),
    "track": ("tensorboard", "trackio", "wandb"),
}
LEAST_PYTHON, LEAST_TORCH = (3, 11), (2, 11)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    state: Literal["ok", "missing", "broken"]
    """missing is something hardy can do without; broken is not."""
    value: str
    advice: str = ""
    """How to mend it."""


def add_doctor(parser: Parser) -> None:
    """Add the options of `hardy doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def add_version(parser: Parser) -> None:
    """Add the options of `hardy version`."""
    parser.add_argument("--json", action="store_true", help="print the versions as JSON")


def doctor_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy doctor`; the exit code is 1 when something needed is broken."""
    findings = list(examine(cache_dir(None, os.environ)))
    is_well = all(finding.state != "broken" for finding in findings)
    if arguments.json:
        print_json({"ok": is_well, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            advice = f"  -> {finding.advice}" if finding.advice else ""
            print(f"{finding.state:<7}  {finding.name:<{width}}  {finding.value}{advice}")
        print("ready to train" if is_well else "not ready: mend what is broken above")
    return SUCCESS if is_well else FAILURE


def version_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy version`."""
    versions = {"hardy": _version("hardy"), "torch": _version("torch"), "python": platform.python_version()}
    if arguments.json:
        print_json(versions)
    else:
        print(f"hardy {versions['hardy']} (torch {versions['torch']}, Python {versions['python']})")
    return SUCCESS


def examine(cache: Path) -> Iterator[Finding]:
    """Yield what is found on this machine, the needed things first."""
    python = ".".join(map(str, LEAST_PYTHON))
    yield _check(
        "python",
        platform.python_version(),
        sys.version_info >= LEAST_PYTHON,
        advice=f"install Python {python}+",
    )
    yield from _packages(NEEDED)
    yield from _guarded("torch", _torch)
    yield from _guarded("attention", _attention)
    yield from _machine(cache)
    yield from _extras()


def _packages(names: Iterable[str]) -> Iterator[Finding]:
    for name in names:
        found = importlib.util.find_spec(name) is not None
        version = _version(name) if found else "not installed"
        yield _check(name, version, found, advice=f"pip install {name}")


def _torch() -> Iterator[Finding]:
    """Look at torch, the devices it finds and the ways its processes can talk."""
    import torch
    import torch.distributed as dist

    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    least = ".".join(map(str, LEAST_TORCH))
    yield _check("torch", torch.__version__, numbers >= LEAST_TORCH, advice=f"pip install 'torch>={least}'")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            memory = f"{about.total_memory / 1e9:.0f} GB"
            yield Finding(name=f"cuda:{index}", state="ok", value=f"{about.name}, {memory}, {bf16}")
    else:
        built = torch.version.cuda
        advice = "check the driver (nvidia-smi)" if built else "for GPUs install a torch built with CUDA"
        yield Finding(
            name="cuda", state="missing", value="no device, training runs on the CPU", advice=advice
        )
    gloo = dist.is_available() and dist.is_gloo_available()
    yield _check(
        "gloo", "workers on CPUs" if gloo else "not in this torch", gloo, advice="install another torch"
    )
    if torch.cuda.is_available():
        nccl = dist.is_nccl_available()
        yield _check(
            "nccl", "workers on GPUs" if nccl else "not in this torch", nccl, advice="install another torch"
        )


def _attention() -> Iterator[Finding]:
    """Say which back end `model.attention=auto` takes."""
    import torch

    from hardy.ops.attention import choose_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    backend = choose_backend(device, dtype=dtype, head_size=64)
    yield Finding(name="attention", state="ok", value=f"auto takes {backend} on {device}")


def _machine(cache: Path) -> Iterator[Finding]:
    """Look at cores, memory and disk."""
    import psutil

    memory = psutil.virtual_memory()
    yield Finding(name="cores", state="ok", value=f"{os.cpu_count()}")
    value = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    yield Finding(name="memory", state="ok", value=value)
    yield Finding(name="disk here", state="ok", value=f"{shutil.disk_usage('.').free / 1e9:.1f} GB free")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            free = shutil.disk_usage(cache).free
        yield Finding(name="cache", state="ok", value=f"{cache}, {free / 1e9:.1f} GB free")
    except OSError as error:
        value = f"{cache} cannot be written ({error.strerror})"
        yield Finding(
            name="cache", state="broken", value=value, advice="set HARDY_CACHE to a folder of yours"
        )


def _extras() -> Iterator[Finding]:
    for extra, names in EXTRAS.items():
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        found = ", ".join(f"{name} {_version(name)}" for name in names if name not in missing)
        parts = [found] if found else []
        parts += [f"without {', '.join(missing)}"] if missing else []
        yield Finding(
            name=f"extra {extra}",
            state="missing" if missing else "ok",
            value="; ".join(parts),
            advice=f"pip install 'hardy[{extra}]'" if missing else "",
        )


def _check(name: str, value: str, is_well: bool, *, advice: str) -> Finding:
    return Finding(
        name=name, state="ok" if is_well else "broken", value=value, advice="" if is_well else advice
    )


def _guarded(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what `look` finds; a failure on the way is a finding too."""
    try:
        yield from look()
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
        yield Finding(name=name, state="broken", value=value, advice="pip install --force-reinstall torch")


def _version(name: str) -> Any:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "without version"
