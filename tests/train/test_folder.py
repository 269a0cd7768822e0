"""The run folder refuses what belongs to another run and says what differs."""

import json
import os

import pytest

from hardy.config import UserError, from_dict, override, to_dict
from hardy.train.config import TrainConfig
from hardy.train.folder import RunFolder, code_commit, differing


def changed(**dotted):
    changes = {key.replace("__", "."): value for key, value in dotted.items()}
    return from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))


def test_a_new_folder_holds_config_and_circumstances(tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = changed(optim__lr=0.5, log__trackers=("wandb",))
    folder.create(config, command=["hardy", "train", "tiny"])
    assert folder.read_config() == config
    (start,) = json.loads(folder.run_file.read_text())["starts"]
    assert start["command"] == ["hardy", "train", "tiny"]
    assert start["seed"] == 0
    assert {"python", "torch", "hardy"} <= set(start["versions"])


def test_the_same_run_twice_points_to_resume(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(TrainConfig(), command=[])
    with pytest.raises(UserError, match=r"already holds this run; go on with `hardy resume"):
        folder.create(TrainConfig(), command=[])


def test_a_folder_of_another_config_says_what_differs(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(TrainConfig(), command=[])
    with pytest.raises(UserError, match=r"belongs to another config: optim.lr is 0.003 there and 0.001 here"):
        folder.create(changed(optim__lr=0.001), command=[])
    assert folder.read_config() == TrainConfig()


def test_a_folder_with_strange_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("my work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder(tmp_path).create(TrainConfig(), command=[])
    assert (tmp_path / "thesis.tex").read_text() == "my work"


@pytest.mark.parametrize("left", ["run.json.tmp", "config.json.tmp"])
def test_a_start_that_was_cut_off_may_be_tried_again(tmp_path, left):
    (tmp_path / left).write_text("")
    RunFolder(tmp_path).create(TrainConfig(), command=[])
    assert RunFolder(tmp_path).read_config() == TrainConfig()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_run_refused_before_its_first_step_leaves_nothing(tmp_path, is_new):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="no"), folder.locked(), folder.taken_back(is_new=is_new):
        folder.create(TrainConfig(), command=[])
        (folder.path / "log.txt").write_text("prepare ...")
        folder.tokenizer.mkdir()
        (folder.tokenizer / "tokenizer.json").write_text("{}")
        raise UserError("no")
    assert list(tmp_path.glob("**/*")) == ([] if is_new else [folder.path])


def test_a_run_refused_later_or_with_strange_files_beside_it_loses_none(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="no"), folder.locked(), folder.taken_back(is_new=True):
        folder.create(TrainConfig(), command=[])
        (folder.path / "thesis.tex").write_text("my work")
        raise UserError("no")
    assert [path.name for path in folder.path.iterdir()] == ["thesis.tex"]
    (folder.path / "thesis.tex").unlink()
    with pytest.raises(UserError, match="no"), folder.locked(), folder.taken_back(is_new=True):
        folder.create(TrainConfig(), command=[])
        folder.metrics_file.touch()
        raise UserError("no")
    assert folder.read_config() == TrainConfig()
    folder.metrics_file.unlink()
    folder.checkpoints_of(1).mkdir()  # of a step that was not yet told of
    with pytest.raises(UserError, match="no"), folder.taken_back(is_new=False):
        raise UserError("no")
    assert folder.read_config() == TrainConfig()


@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, below):
    (tmp_path / "file").write_text("my work")
    with (
        pytest.raises(UserError, match="file.* cannot be written: .*; choose another --run-dir"),
        RunFolder(tmp_path / "file" / below).locked(),
    ):
        pass
    assert (tmp_path / "file").read_text() == "my work"


def test_no_run_and_broken_config_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no run in .*hardy train"):
        RunFolder(tmp_path).read_config()
    for broken in (b"{", b"\xff"):
        (tmp_path / "config.json").write_bytes(broken)
        with pytest.raises(UserError, match=r"config.json cannot be used"):
            RunFolder(tmp_path).read_config()


def test_a_damaged_note_of_starts_is_named_and_may_be_deleted(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(TrainConfig(), command=["a"])
    folder.run_file.write_text("{")
    with pytest.raises(UserError, match=r"run.json cannot be used: .*put it back, or delete it"):
        folder.note_start(TrainConfig(), command=["b"], from_step=3, num_workers=1)
    folder.run_file.unlink()
    folder.note_start(TrainConfig(), command=["b"], from_step=3, num_workers=1)
    assert [start["from_step"] for start in json.loads(folder.run_file.read_text())["starts"]] == [3]


def test_every_start_is_noted(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(TrainConfig(), command=["a"])
    folder.note_start(TrainConfig(), command=["b"], from_step=7, num_workers=4)
    starts = json.loads(folder.run_file.read_text())["starts"]
    assert [(s["command"], s["from_step"], s["num_workers"]) for s in starts] == [
        (["a"], 0, 1),
        (["b"], 7, 4),
    ]


def test_differences_are_found_at_any_depth_and_for_added_keys():
    old, new = {"a": {"b": 1, "c": (1, 2)}, "d": 0}, {"a": {"b": 2, "c": [1, 2]}, "e": 5}
    assert list(differing(old, new)) == [
        "a.b is 1 there and 2 here",
        "d is 0 there and None here",
        "e is None there and 5 here",
    ]


def test_the_commit_is_a_hash_or_none():
    commit = code_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40


def test_a_config_that_no_longer_fits_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"train": {"stepz": 3}}')
    with pytest.raises(UserError, match="config.json cannot be used: there is no setting 'train.stepz'"):
        RunFolder(tmp_path).read_config()


def test_what_a_start_that_was_cut_off_leaves_is_no_obstacle(tmp_path):
    for name in (".lock", "run.json", "code.diff"):
        (tmp_path / name).write_text("")
    RunFolder(tmp_path).check_new(TrainConfig())


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run is a file; choose another --run-dir"):
        RunFolder(tmp_path / "run").check_new(TrainConfig())
    with pytest.raises(UserError, match="cannot be written: .*/run takes no new files; choose another"):
        RunFolder(tmp_path / "run" / "a" / "b").check_new(TrainConfig())


def test_a_place_that_takes_no_files_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(UserError, match=f"a/b cannot be written: {tmp_path} takes no new files"):
        RunFolder(tmp_path / "a" / "b").check_new(TrainConfig())


@pytest.mark.parametrize(
    ("facts", "num_workers"),
    [
        ('{"starts": [{"num_workers": 2}, {"num_workers": 4}]}', 4),
        ('{"starts": [{}]}', 1),
        ('{"starts": [{"num_workers": null}]}', 1),
        ('{"starts": [{"num_workers": 0}]}', 1),
        ('{"starts": "x"}', 1),
        ("[]", 1),
    ],
)
def test_the_last_number_of_workers_is_remembered(tmp_path, facts, num_workers):
    assert RunFolder(tmp_path).last_num_workers() == 1
    (tmp_path / "run.json").write_text(facts)
    assert RunFolder(tmp_path).last_num_workers() == num_workers
