"""The run folder: everything one run reads and leaves.

config.json      the complete configuration, defaults included
run.json         versions, commit, command line, one entry per start or resume
code.diff        what the working tree held beside the commit
tokenizer/       the tokenizer, so that the folder alone can generate
metrics.jsonl    one object per optimizer step
checkpoints/     step-00000100/ ...
summary.json     how the run ended
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hardy.config import ConfigError, UserError, from_dict, reason_of, to_dict
from hardy.train.config import TrainConfig

_OF_A_START = ("config.json", "run.json", "code.diff", ".lock")
"""What a start leaves before anything is prepared."""


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.run_file = path / "run.json"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"
        self.lock_file = path / ".lock"

    def checkpoints_of(self, replica: int) -> Path:
        """Return where a replica that trains alone saves; the first one where any run does."""
        return self.path / f"checkpoints-replica-{replica}" if replica else self.checkpoints

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the lock goes with the process, however that ends.

        Raises:
            UserError: another process trains in it, or it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock_file.open("w")
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be written: {error.strerror}; choose another --run-dir"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is training in {self.path}; stop it first, or choose another --run-dir"
                ) from None
            yield

    def check_new(self, config: TrainConfig) -> None:
        """Refuse a folder in which no new run of `config` can begin.

        Raises:
            UserError: it holds a run already, or files that are none of ours, or cannot be made.
        """
        if self.config_file.exists():
            differences = list(
                differing(to_dict(self.read_config()), json.loads(json.dumps(to_dict(config))))
            )
            if not differences:
                raise UserError(
                    f"run folder {self.path} already holds this run; go on with `hardy resume {self.path}` "
                    f"or choose another --run-dir"
                )
            shown = "; ".join(differences[:3]) + (
                f" and {len(differences) - 3} more" if differences[3:] else ""
            )
            raise UserError(
                f"run folder {self.path} belongs to another config: {shown}; choose another --run-dir, or go "
                f"on with that run by `hardy resume {self.path}`"
            )
        # What a start that was cut off leaves.
        ours = {*_OF_A_START, *(f"{name}.tmp" for name in _OF_A_START)}
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --run-dir")
        if self.path.exists() and {child.name for child in self.path.iterdir()} - ours:
            raise UserError(f"{self.path} is not empty and holds no run; choose another --run-dir")
        parent = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(
                f"run folder {self.path} cannot be written: {parent} takes no new files; choose another "
                f"--run-dir"
            )

    def check_parts(self) -> None:
        """Refuse a run in which a file stands where a folder should, or the reverse.

        Raises:
            UserError: metrics.jsonl is no file, or checkpoints no folder.
        """
        for path, is_right, kind in (
            (self.metrics_file, self.metrics_file.is_file(), "file"),
            (self.checkpoints, self.checkpoints.is_dir(), "folder"),
        ):
            if path.exists() and not is_right:
                raise UserError(
                    f"{path} is no {kind}, so the run cannot go on; put the {kind} back, or move away what "
                    f"stands there, and `hardy resume {self.path}`"
                )

    def create(self, config: TrainConfig, *, command: Sequence[str], num_workers: int = 1) -> None:
        """Make the folder of a new run; refuses as `check_new` does."""
        self.check_new(config)
        self.path.mkdir(parents=True, exist_ok=True)
        diff = code_diff()
        if diff:
            (self.path / "code.diff").write_text(diff, encoding="utf-8")
        replace_json(self.run_file, {"starts": []})
        self.note_start(config, command=command, from_step=0, num_workers=num_workers)
        replace_json(self.config_file, to_dict(config))  # last: a folder with a config is a run

    @contextmanager
    def taken_back(self, *, is_new: bool) -> Iterator[None]:
        """Remove what `create` and the preparation made when a run ends by an error before its first step.

        Else the next try with other settings would be told that the folder belongs to another run.

        Args:
            is_new: whether the folder itself was not there before.
        """
        try:
            yield
        except (UserError, OSError):
            if not self.metrics_file.exists() and not any(self.path.glob("checkpoints*")):
                for name in (*_OF_A_START, "log.txt"):
                    (self.path / name).unlink(missing_ok=True)
                shutil.rmtree(self.tokenizer, ignore_errors=True)
                with suppress(OSError):  # someone put a file there
                    if is_new:
                        self.path.rmdir()
            raise

    def note_start(
        self, config: TrainConfig, *, command: Sequence[str], from_step: int, num_workers: int
    ) -> None:
        """Add one start or resume to run.json: when, how, with which versions.

        Raises:
            UserError: run.json does not parse.
        """
        try:
            facts = self._read_facts()
        except FileNotFoundError:
            facts = {"starts": []}
        except ValueError as error:
            raise UserError(
                f"{self.run_file} cannot be used: {error}; it only says when the run was started: put it "
                f"back, or delete it"
            ) from None
        facts["starts"].append(
            {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": list(command),
                "from_step": from_step,
                "num_workers": num_workers,
                "seed": config.train.seed,
                "commit": code_commit(),
                "versions": versions(),
                "platform": platform.platform(),
            }
        )
        replace_json(self.run_file, facts)

    def _read_facts(self) -> dict[str, Any]:
        """Return what run.json holds."""
        facts = json.loads(self.run_file.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or not isinstance(facts.get("starts"), list):
            raise ValueError("it holds no list of starts")
        return facts

    def read_config(self) -> TrainConfig:
        """Return the run's configuration.

        Raises:
            UserError: there is no run here, or its config cannot be read.
        """
        try:
            return from_dict(TrainConfig, json.loads(self.config_file.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"there is no run in {self.path} (no config.json); start one with `hardy train`"
            ) from None
        except (OSError, ValueError, ConfigError) as error:
            raise UserError(f"{self.config_file} cannot be used: {reason_of(error)}") from None

    def last_num_workers(self) -> int:
        """Return with how many workers the run was started last; 1 where that is not known."""
        try:
            return max(int(self._read_facts()["starts"][-1]["num_workers"]), 1)
        except (OSError, ValueError, LookupError, TypeError):
            return 1


def differing(old: Mapping[str, Any], new: Mapping[str, Any], *, path: str = "") -> Iterator[str]:
    """Yield "optim.lr is 0.003 there and 0.001 here" for each setting that two configs do not share."""
    for key in [*old, *(key for key in new if key not in old)]:
        here = f"{path}.{key}" if path else key
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differing(before, after, path=here)
        elif _plain(before) != _plain(after):
            yield f"{here} is {before!r} there and {after!r} here"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def replace_json(path: Path, value: Any) -> None:
    """Write JSON beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from error


def versions() -> dict[str, str]:
    """Return the versions of Python, hardy and the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("hardy", "torch", "numpy", "safetensors", "tokenizers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_commit() -> str | None:
    """Return the commit of hardy's source, with "+changes" if there are any; None when not a checkout."""
    here = Path(__file__)
    if _git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    return commit and commit.strip() + ("+changes" if code_diff() else "")


def code_diff() -> str:
    """Return what hardy's source changes against its commit; empty when not a checkout."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return ""
    return _git("diff", "HEAD") or ""


def _git(*arguments: str) -> str | None:
    """Return git's answer in the folder of this file, or None when git is missing or says no."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
