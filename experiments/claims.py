"""From measured numbers to a verdict: claim, expected, got; and the result file with its circumstances."""

import json
import platform
import subprocess
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import torch


def circumstances() -> dict[str, object]:
    """Return commit, machine and versions, which stand beside every number."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "../src"], capture_output=True, text=True, check=False
    )
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout else ""),
        "machine": f"{platform.machine()}, cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def verdict(folder: Path, got: dict[str, float], *, smoke: bool) -> bool:
    """Print each claim of `expected.toml` with its limit and what was measured; whether all hold.

    A claim names a number of `got` and the `most` or `least` it may be. A smoke run is too short to hold any.
    """
    expected = tomllib.loads((folder / "expected.toml").read_text())
    all_hold = True
    for name, claim in expected.items():
        limit = f"at most {claim['most']:g}" if "most" in claim else f"at least {claim['least']:g}"
        value = got[name]
        holds = value <= claim["most"] if "most" in claim else value >= claim["least"]
        all_hold &= holds
        word = "smoke" if smoke else "holds" if holds else "FAILS"
        print(f"{word:6} {claim['claim']}\n       expected {limit}, got {value:.4g}")
    return all_hold


def write_results(folder: Path, name: str, results: dict[str, object]) -> None:
    """Write `results/NAME.json` with the circumstances."""
    (folder / "results").mkdir(exist_ok=True)
    text = json.dumps(results | {"circumstances": circumstances()}, indent=1)
    (folder / "results" / f"{name}.json").write_text(text + "\n")
