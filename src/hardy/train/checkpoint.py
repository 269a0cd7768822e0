"""Checkpoints that can be trusted: whole or not there, and checked before use.

A checkpoint is written beside (`.tmp-...`), each file reaches the disk, the manifest with sizes and checksums
comes last, and a rename puts it in place. `kill -9` at any moment leaves the old ones as they were.
"""

import logging
import math
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hardy.config import UserError
from hardy.distributed.comm import Communicator, TorchComm
from hardy.train import manifest
from hardy.train.durable import FileRecord, sync_folder, write_json, write_tensors
from hardy.train.folder import versions
from hardy.train.manifest import INDEX, PLAIN, Checkpoint, read_document
from hardy.train.peers import Peers
from hardy.train.plain import encode
from hardy.train.state import load_state, state_of
from hardy.train.storage import WritePlan, copy_to_memory, fill, mesh_of, plan_write, read_index

logger = logging.getLogger(__name__)

EXTRA = "extra/"
_SLACK_BYTES = 2**20  # headers, index, manifest and what the file system adds


class CheckpointError(UserError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A checkpoint on its way to the disk."""

    step: int
    score: float | None
    plan: WritePlan
    mesh: dict[str, int] | None
    plain: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run. All workers make the same calls in the same order.

    Among simulated workers, which are equal replicas in one process, only worker 0 writes.

    Args:
        folder: where they lie; made when needed.
        comm: the workers.
        keep_last: newest ones that are kept.
        keep_best: ones with the lowest score that are kept besides.
        asynchronous: whether `save` returns once tensors are copied to memory and writes in the background.

    Example:
        >>> import tempfile, torch
        >>> from hardy.distributed.comm import Alone
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CheckpointStore(Path(folder), Alone(), keep_last=2, keep_best=1, asynchronous=True)
        ...     store.save(100, model, optimizer, {"tokens": 4096}, score=2.5)
        ...     store.wait()
        ...     store.load(store.newest_good(), model, optimizer)
        {'tokens': 4096}
    """

    def __init__(
        self, folder: Path, comm: Communicator, *, keep_last: int, keep_best: int, asynchronous: bool
    ) -> None:
        self.folder = folder
        self.last_error: CheckpointError | None = None
        """Why the latest checkpoint could not be written; None when it was, or is being written."""
        self._keep_last, self._keep_best, self._asynchronous = keep_last, keep_best, asynchronous
        self._peers = Peers(comm)
        self._looks_on = comm.rank != 0 and not isinstance(comm, TorchComm)
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        self._buffers: dict[str, Tensor] = {}
        self._damaged: list[Path] = []

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        plain: dict[str, Any],
        *,
        score: float | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save; a full or broken disk is logged and kept in `last_error`, so that training can go on.

        Waits for the save before. What the caller changes afterwards does not get into the checkpoint.

        Args:
            step: optimizer steps done.
            model: what is trained.
            optimizer: its optimizer.
            plain: JSON-like values, taken from worker 0.
            score: validation loss; none, NaN and infinite ones cannot be among the best.
            extra: further tensors by name: DTensors, or equal on all workers, or with the rank in the name.

        Raises:
            UserError: model, optimizer or `plain` hold what a checkpoint cannot.
        """
        self._join()
        self.last_error = None
        if self._looks_on:
            return
        state = state_of(model, optimizer)
        document = {"plain": encode(plain), "optimizer": encode(state.plain, path="optimizer")}
        tensors = state.tensors | {f"{EXTRA}{name}": value for name, value in (extra or {}).items()}
        plan = plan_write(tensors, self._peers)
        try:
            self._peers.agree(partial(self._make_room, step, plan), lambda done: done)
        except OSError as error:
            self._fail(step, plan, error)
            return
        if self._asynchronous:
            self._buffers = copy_to_memory(plan.pieces, buffers=self._buffers)
            plan = replace(plan, pieces=self._buffers)
        if score is not None and not math.isfinite(score):
            score = None
        job = _Job(step=step, score=score, plan=plan, mesh=mesh_of(tensors), plain=document)
        if not self._asynchronous:
            self._write(job)
            return
        self._thread = threading.Thread(target=self._write_behind, args=(job,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: the latest `save` could not be written.
        """
        self._join()
        if self.last_error is not None:
            raise self.last_error

    def newest_good(self) -> Checkpoint | None:
        """Return the newest checkpoint after reading every byte of it; None when there is no checkpoint.

        Damaged ones are named in a warning and passed over; the next good save deletes them.

        Raises:
            UserError: there are checkpoints and all are damaged.
        """
        self._join()

        def search(_: list[None]) -> list[Checkpoint | None]:
            found, self._damaged = manifest.newest_good(self.folder)
            return [found] * self._peers.size

        return self._peers.agree(lambda: None, search)

    def all(self) -> list[Checkpoint]:
        """Return the checkpoints with right manifest and file sizes, newest first; reads no tensors."""
        self._join()
        return manifest.sound(self.folder)

    def read_plain(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the plain values that were given to `save`."""
        return read_document(checkpoint)["plain"]

    def load(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        extra: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Load into a model and optimizer laid out in any way, and return the plain values.

        Args:
            checkpoint: from `newest_good`.
            model: of the saved architecture; changed in place.
            optimizer: of the saved class, fresh or used; None loads the model alone.
            extra: tensors to fill with the saved ones of the same names.

        Raises:
            UserError: names, shapes or dtypes are not those of the checkpoint.
        """
        self._join()
        document = read_document(checkpoint)
        wanted = {f"{EXTRA}{name}": value for name, value in (extra or {}).items()}
        load_state(
            model,
            optimizer,
            saved=read_index(checkpoint),
            plain=document["optimizer"],
            fill=lambda targets: fill(targets | wanted, checkpoint, self._peers.group),
        )
        return document["plain"]

    def _make_room(self, step: int, plan: WritePlan) -> None:
        """Clear away what a crash left and make the temporary folder; worker 0 does it for all."""
        if self._peers.rank != 0:
            return
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        manifest.tidy(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < plan.num_bytes + _SLACK_BYTES:
            raise OSError("the disk has too little space left")
        self._temporary(step).mkdir()

    def _write_behind(self, job: _Job) -> None:
        """Write in the background; what is no fault of the disk is raised by the next call."""
        try:
            self._write(job)
        except Exception as error:
            self._fault = error

    def _write(self, job: _Job) -> None:
        """Write this worker's file; worker 0 then completes the checkpoint once all are done."""
        path = self._temporary(job.step) / job.plan.file
        try:
            self._peers.agree(
                lambda: (job.plan.file, write_tensors(path, job.plan.pieces)),
                lambda records: self._complete(job, dict(records)),
            )
        except OSError as error:
            if self._peers.rank == 0:
                shutil.rmtree(self._temporary(job.step), ignore_errors=True)
            self._fail(job.step, job.plan, error)

    def _complete(self, job: _Job, files: dict[str, FileRecord]) -> list[None]:
        """Write what worker 0 alone writes, put the folder in place and delete what is no longer kept."""
        temporary, place = self._temporary(job.step), self.folder / manifest.step_folder(job.step)
        files |= {
            INDEX: write_json(temporary / INDEX, job.plan.index),
            PLAIN: write_json(temporary / PLAIN, job.plain),
        }
        checkpoint = Checkpoint(
            folder=temporary,
            step=job.step,
            score=job.score,
            world_size=self._peers.size,
            mesh=job.mesh,
            versions=versions(),
            files=files,
        )
        manifest.write_manifest(checkpoint)
        sync_folder(temporary)
        aside = self.folder / f".old-{place.name}"
        if place.exists():
            os.replace(place, aside)
        os.replace(temporary, place)
        sync_folder(self.folder)
        if aside.exists():
            manifest.remove(aside)
        manifest.retire(
            self.folder,
            saved=checkpoint,
            keep_last=self._keep_last,
            keep_best=self._keep_best,
            damaged=self._damaged,
        )
        self._damaged = []
        return [None] * self._peers.size

    def _fail(self, step: int, plan: WritePlan, error: OSError) -> None:
        """Keep and log why a checkpoint could not be written."""
        try:
            free = f"{shutil.disk_usage(self.folder).free:,} bytes are free"
        except OSError:
            free = "how much is free is unknown"
        self.last_error = CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: "
            f"{error.strerror or error}; it needs {plan.num_bytes + _SLACK_BYTES:,} bytes, {free}. Earlier "
            f"ones are untouched; free some space or lower checkpoint.keep_last and checkpoint.keep_best"
        )
        self.last_error.__cause__ = error
        logger.warning("%s", self.last_error)

    def _join(self) -> None:
        """Wait for the background thread and raise what went wrong there that is no fault of the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _temporary(self, step: int) -> Path:
        return self.folder / f".tmp-{manifest.step_folder(step)}"
