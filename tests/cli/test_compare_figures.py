"""Pictures of a comparison."""

import pytest

from hardy.cli.compare_figures import COLOURS, SUFFIXES, draw_figures
from hardy.cli.compare_groups import grouped
from hardy.cli.compare_runs import read_run
from hardy.config import UserError


def test_a_picture_for_each_axis_and_amount(make_run, tmp_path):
    sent = [{"step": s, "loss": 1.0 / s, "step_time_s": 1.0, "bytes_sent": 1000 * s} for s in (1, 2)]
    folders = [make_run("a-0"), make_run("a-1", seed=1), make_run("b", lines=sent, config={"optim.lr": 1})]
    groups = grouped([read_run(folder, name=folder.name) for folder in folders])
    written = draw_figures(groups, tmp_path / "new" / "folder")
    names = [
        f"{kind}_loss_by_{axis}" for kind in ("validation", "training") for axis in ("step", "tokens", "time")
    ]
    assert [path.name for path in written] == [
        name + suffix for name in [*names, "bytes_sent"] for suffix in SUFFIXES
    ]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    band, line = (COLOURS[place] for place in (0, 1))
    drawn = (tmp_path / "new" / "folder" / "training_loss_by_step.svg").read_text()
    assert f"fill: {band}" in drawn  # the interval of a-0 and a-1
    assert f"stroke: {line}" in drawn
    assert f"fill: {line}" in (tmp_path / "new" / "folder" / "bytes_sent.svg").read_text()


def test_a_folder_that_cannot_be_made_is_named(make_run, tmp_path):
    groups = grouped([read_run(make_run("a"), name="a")])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the figures could not be written into"):
        draw_figures(groups, tmp_path / "file")
