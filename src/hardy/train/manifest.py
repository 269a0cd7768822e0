"""What makes a folder a checkpoint: a manifest, written last, with the size and checksum of every file.

checkpoints/step-00000100/    manifest.json  index.json  plain.json  rank-0000.safetensors ...
checkpoints/.tmp-*            being written or being deleted; does not count, removed by the next save
checkpoints/.old-step-*       stepped aside for a new one of the same step; counts while that is missing
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hardy.config import UserError, reason_of
from hardy.train.durable import FileRecord, checksum, record_of, write_json
from hardy.train.plain import decode

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the layout; a reader refuses others."""
MANIFEST, INDEX, PLAIN = "manifest.json", "index.json", "plain.json"
_STEP_FOLDER = re.compile(r"(?:\.old-)?step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class DamagedError(UserError):
    """A checkpoint is not what was written; the text names its folder and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint on disk, as its manifest describes it."""

    folder: Path
    step: int
    """Optimizer steps done when it was taken."""
    score: float | None
    """Validation loss at that step in nats, the lower the better; None when not measured or not finite."""
    world_size: int
    """Workers that wrote it."""
    mesh: dict[str, int] | None
    """Axes of the device mesh with their sizes; None without one."""
    versions: dict[str, str]
    """Of hardy and torch."""
    files: dict[str, FileRecord]
    """The files by name."""


def step_folder(step: int) -> str:
    """Return the name of the folder for a step.

    Example:
        >>> step_folder(100)
        'step-00000100'
    """
    return f"step-{step:08d}"


def write_manifest(checkpoint: Checkpoint) -> None:
    """Write the manifest into the checkpoint's folder."""
    body = {"format": FORMAT, **asdict(replace(checkpoint, folder=Path()))}
    del body["folder"]
    write_json(checkpoint.folder / MANIFEST, {"checksum": _body_checksum(body), "body": body})


def read_manifest(folder: Path) -> Checkpoint:
    """Return what the manifest says after checking the manifest itself, and that every file has its size.

    Raises:
        DamagedError: it is missing or wrong, or a file is missing or has another size.
    """
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
        body = document["body"]
        if document["checksum"] != _body_checksum(body):
            raise DamagedError(f"{folder}: the checksum of {MANIFEST} is wrong")
        if body["format"] != FORMAT:
            raise DamagedError(
                f"{folder}: format {body['format']} is not {FORMAT}, the one this version reads"
            )
        found = Checkpoint(folder=folder, **_fields(body))
    except FileNotFoundError:
        raise DamagedError(f"{folder}: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(
            f"{folder}: {MANIFEST} cannot be read ({type(error).__name__}: {reason_of(error)})"
        ) from error
    match = _STEP_FOLDER.fullmatch(folder.name)
    if match and int(match[1]) != found.step:
        raise DamagedError(f"{folder}: {MANIFEST} belongs to step {found.step}")
    _check_sizes(found)
    return found


def verify(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder` after reading every byte of it.

    Raises:
        DamagedError: anything differs from what was written.
    """
    found = read_manifest(folder)

    def check(name: str) -> None:
        try:
            now = record_of(folder / name)
        except OSError as error:
            raise DamagedError(f"{folder}: {name} cannot be read ({error.strerror})") from error
        if now != found.files[name]:
            raise DamagedError(f"{folder}: the checksum of {name} is wrong")

    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing and reading run outside Python's lock
        list(pool.map(check, found.files))
    return found


def read_document(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's plain values: the run's under "plain", the optimizer's under "optimizer".

    Raises:
        DamagedError: they cannot be read.
    """
    try:
        document = decode(json.loads((checkpoint.folder / PLAIN).read_bytes()))
        return {"plain": document["plain"], "optimizer": document["optimizer"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{checkpoint.folder}: {PLAIN} cannot be read ({reason_of(error)})") from error


def folders(root: Path) -> list[Path]:
    """Return the folders that claim to be checkpoints, newest step first."""
    claims = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        aside = path.name.startswith(".old-")
        if match and not (aside and (root / path.name.removeprefix(".old-")).exists()):
            claims.append((int(match[1]), path))
    return [path for _, path in sorted(claims, reverse=True)]


def sound(root: Path) -> list[Checkpoint]:
    """Return the checkpoints whose manifest and file sizes are right, newest first; reads no tensor file."""
    found = []
    for folder in folders(root):
        try:
            found.append(read_manifest(folder))
        except DamagedError:
            logger.debug("left out %s", folder, exc_info=True)
    return found


def newest_good(root: Path) -> tuple[Checkpoint | None, list[Path]]:
    """Return the newest checkpoint of which every byte is right, and the damaged folders met on the way.

    Each damaged one is named in a warning. None when there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    damaged: list[DamagedError] = []
    candidates = folders(root)
    for folder in candidates:
        try:
            found = verify(folder)
        except DamagedError as error:
            logger.warning("damaged checkpoint left out: %s", error)
            damaged.append(error)
            continue
        if damaged:
            logger.warning("using the previous checkpoint %s instead", found.folder)
        return found, candidates[: len(damaged)]
    if damaged:
        listed = "; ".join(map(str, damaged))
        raise UserError(
            f"no checkpoint in {root} is good, {len(damaged)} are damaged: {listed}. Restore one from a "
            f"backup, or delete them to start from step 0"
        )
    return None, []


def too_many(
    checkpoints: Iterable[Checkpoint], *, saved: Checkpoint, keep_last: int, keep_best: int
) -> list[Path]:
    """Return the folders to delete after `saved` was written; never that one, never a later step.

    Checkpoints of later steps come from a run that was taken back; they neither count nor go here.
    """
    past = sorted((c for c in checkpoints if c.step < saved.step), key=lambda c: c.step, reverse=True)
    scored = sorted((c for c in [*past, saved] if c.score is not None), key=lambda c: (c.score, -c.step))
    kept = {c.step for c in past[: keep_last - 1]} | {c.step for c in scored[:keep_best]}
    return [c.folder for c in past if c.step not in kept]


def retire(
    root: Path, *, saved: Checkpoint, keep_last: int, keep_best: int, damaged: Collection[Path]
) -> None:
    """Delete what is no longer kept after `saved` was written, and what is damaged.

    Args:
        root: the folder of the checkpoints.
        saved: the one just written, which is good and stays.
        keep_last: newest ones that are kept, `saved` included.
        keep_best: ones with the lowest score that are kept besides.
        damaged: folders known to be damaged, however sound they look.
    """
    place = root / step_folder(saved.step)
    whole = [found for found in sound(root) if found.folder not in damaged or found.folder == place]
    kept = {found.folder for found in whole}
    broken = [folder for folder in folders(root) if folder not in kept]
    for folder in [*too_many(whole, saved=saved, keep_last=keep_last, keep_best=keep_best), *broken]:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint: out of sight at once, then its files. A failure costs only space and is logged."""
    try:
        hidden = folder.with_name(f".tmp-gone-{folder.name.lstrip('.')}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("old checkpoint %s could not be deleted: %s", folder, error)


def tidy(root: Path) -> None:
    """Remove what a killed run left half written or half deleted, and bring back what had stepped aside."""
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for aside in root.glob(".old-step-*"):
        place = root / aside.name.removeprefix(".old-")
        if place.exists():
            remove(aside)
        else:
            os.replace(aside, place)


def _fields(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest with their types checked."""
    files = {str(name): FileRecord(**record) for name, record in body["files"].items()}
    bad = [name for name in files if not _FILE_NAME.fullmatch(name)]
    if bad or not {INDEX, PLAIN} <= files.keys():
        raise ValueError(f"refused file names {bad}" if bad else f"{INDEX} or {PLAIN} is not listed")
    fields = {key: body[key] for key in ("step", "score", "world_size", "mesh", "versions")}
    if not isinstance(fields["step"], int) or not isinstance(fields["score"], float | int | None):
        raise ValueError("step or score is no number")
    return fields | {"files": files}


def _check_sizes(found: Checkpoint) -> None:
    """Raise DamagedError unless every listed file is there with its size."""
    for name, record in found.files.items():
        path = found.folder / name
        if not path.is_file():
            raise DamagedError(f"{found.folder}: {name} is missing")
        num_bytes = path.stat().st_size
        if num_bytes != record.num_bytes:
            raise DamagedError(f"{found.folder}: {name} has {num_bytes} bytes instead of {record.num_bytes}")


def _body_checksum(body: Any) -> str:
    return checksum(json.dumps(body, sort_keys=True).encode())
