"""Which folders count as checkpoints, what a manifest may say, and which ones are kept."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from hardy.train import manifest
from hardy.train.durable import checksum, write_json
from hardy.train.manifest import Checkpoint, DamagedError, step_folder


def make(root, step=1, *, score=None):
    """Write a checkpoint without tensors."""
    folder = root / step_folder(step)
    folder.mkdir(parents=True)
    files = {name: write_json(folder / name, {"of": name}) for name in (manifest.INDEX, manifest.PLAIN)}
    found = Checkpoint(
        folder=folder, step=step, score=score, world_size=2, mesh={"shard": 2}, versions={}, files=files
    )
    manifest.write_manifest(found)
    return found


def rewrite(found, **changes):
    """Change the manifest as someone would who knows how to make its checksum."""
    path = found.folder / manifest.MANIFEST
    body = json.loads(path.read_text())["body"] | changes
    path.write_text(
        json.dumps({"checksum": checksum(json.dumps(body, sort_keys=True).encode()), "body": body})
    )


def test_a_manifest_comes_back(tmp_path):
    found = make(tmp_path, 12, score=1.25)
    assert manifest.read_manifest(found.folder) == manifest.verify(found.folder) == found


@pytest.mark.parametrize("name", ["../plain.json", "/etc/passwd", "a/b", ".hidden", "", "..", "a\\b"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    found = make(tmp_path)
    record = {"num_bytes": 1, "blake2b": "00"}
    files = {name: vars(record) for name, record in found.files.items()}
    rewrite(found, files=files)
    assert manifest.read_manifest(found.folder) == found
    rewrite(found, files=files | {name: record})
    with pytest.raises(DamagedError, match="refused file names"):
        manifest.read_manifest(found.folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 2}, "format 2 is not 1, the one this version reads"),
        ({"files": {}}, "index.json or plain.json is not listed"),
        ({"step": 2}, "belongs to step 2"),
        ({"step": "1"}, "step or score is no number"),
        ({"files": [1]}, "cannot be read"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, changes, text):
    found = make(tmp_path)
    rewrite(found, **changes)
    with pytest.raises(DamagedError, match=text):
        manifest.read_manifest(found.folder)


def test_the_manifest_has_a_checksum_of_its_own(tmp_path):
    found = make(tmp_path, score=2.5)
    path = found.folder / manifest.MANIFEST
    path.write_text(path.read_text().replace("2.5", "1.5"))
    with pytest.raises(DamagedError, match="the checksum of manifest.json is wrong"):
        manifest.read_manifest(found.folder)


def test_one_that_stepped_aside_counts_until_its_place_is_taken(tmp_path):
    found = make(tmp_path, 3)
    aside = tmp_path / f".old-{found.folder.name}"
    os.replace(found.folder, aside)
    assert manifest.newest_good(tmp_path)[0].folder == aside
    manifest.tidy(tmp_path)
    assert manifest.newest_good(tmp_path)[0] == found
    os.replace(found.folder, aside)
    make(tmp_path, 3)
    assert manifest.folders(tmp_path) == [found.folder]
    manifest.tidy(tmp_path)
    assert not aside.exists()


def test_deleting_that_fails_is_only_logged(tmp_path, caplog):
    manifest.remove(tmp_path / step_folder(1))
    assert "could not be deleted" in caplog.text


def test_a_step_beyond_eight_digits_sorts_as_a_number(tmp_path):
    steps = [99_999_999, 100_000_000, 5]
    for step in steps:
        make(tmp_path, step)
    assert [found.step for found in manifest.sound(tmp_path)] == sorted(steps, reverse=True)


def test_later_steps_neither_count_nor_go(tmp_path):
    found = {step: make(tmp_path, step) for step in (1, 2, 3, 9)}
    manifest.retire(tmp_path, saved=found[3], keep_last=2, keep_best=0, damaged=[])
    assert [each.step for each in manifest.sound(tmp_path)] == [9, 3, 2]


@given(
    some.dictionaries(some.integers(0, 30), some.none() | some.floats(0, 9), min_size=1),
    some.integers(1, 4),
    some.integers(0, 3),
)
def test_what_is_kept(scores, keep_last, keep_best):
    checkpoints = {
        step: Checkpoint(
            folder=Path(str(step)), step=step, score=score, world_size=1, mesh=None, versions={}, files={}
        )
        for step, score in scores.items()
    }
    saved = checkpoints[max(scores)]
    gone = manifest.too_many(checkpoints.values(), saved=saved, keep_last=keep_last, keep_best=keep_best)
    kept = [step for step in scores if Path(str(step)) not in gone]
    newest = sorted(scores)[-keep_last:]
    assert set(newest) <= set(kept)
    assert len(kept) <= keep_last + keep_best
    scored = sorted(score for score in scores.values() if score is not None)
    best = sorted(scores[step] for step in kept if scores[step] is not None)
    assert best[:keep_best] == scored[:keep_best]
