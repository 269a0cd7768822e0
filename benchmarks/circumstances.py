"""Where a result comes from: commit, machine, versions."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def circumstances():
    """Return what must stand beside a measured number.

    A copy of the tree without its history names its commit in the variable BENCH_COMMIT.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "../src"], capture_output=True, text=True, check=False
    ).stdout
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("BENCH_COMMIT") or commit + ("+changes" if dirty else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    } | gpu
