"""TensorBoard, trackio and W&B as listeners of a run; each comes with the extra `track`."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hardy.config import UserError
from hardy.train.hooks import Hook, RunFacts


def tracker_hooks(names: Sequence[str], run_dir: Path, *, project: str) -> list[Hook]:
    """Return a listener per service, or say which package is missing.

    Raises:
        UserError: a service's package is not installed.
    """
    return [TRACKERS[name](run_dir, project) for name in names]


class TensorBoard(Hook):
    """Scalars for TensorBoard under RUN/tensorboard."""

    def __init__(self, run_dir: Path, project: str) -> None:
        _need("tensorboard", "tensorboard")
        self._folder = run_dir / "tensorboard"
        self._writer: Any = None

    def on_start(self, facts: RunFacts) -> None:
        """Open the file; not before, since a new run wants its folder empty."""
        writer = import_module("torch.utils.tensorboard")
        self._writer = writer.SummaryWriter(str(self._folder))

    def on_step(self, record: dict[str, Any]) -> None:
        """Write every number of the record."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class RunService(Hook):
    """A service with the calls `init`, `log` and `finish`: trackio and W&B."""

    def __init__(self, package: str, run_dir: Path, project: str) -> None:
        self._service = _need(package, package)
        self._run_dir = run_dir
        self._project = project
        self._is_open = False

    def on_start(self, facts: RunFacts) -> None:
        """Open the run at the service."""
        self._service.init(project=self._project, name=self._run_dir.name, config=facts.config)
        self._is_open = True

    def on_step(self, record: dict[str, Any]) -> None:
        """Send every number of the record."""
        self._service.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Close the run."""
        if self._is_open:
            self._service.finish()


TRACKERS: dict[str, Callable[[Path, str], Hook]] = {
    "tensorboard": TensorBoard,
    "trackio": lambda run_dir, project: RunService("trackio", run_dir, project),
    "wandb": lambda run_dir, project: RunService("wandb", run_dir, project),
}


def _need(package: str, tracker: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise UserError(
            f"log.trackers names {tracker!r}, but its package is not installed; pip install 'hardy[track]'"
        ) from None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
