"""Pictures."""

import json

import pytest

from hardy.cli.plots import plot_lengths, plot_losses
from hardy.config import UserError
from hardy.data.inspect import SplitSummary


def write_metrics(run_dir, records):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_losses_are_drawn_also_where_some_are_missing(tmp_path):
    write_metrics(
        tmp_path,
        [
            {"step": 1, "loss": 5.0},
            {"step": 2, "loss": None},
            {"step": 3, "loss": 4.0, "validation_loss": 4.5},
        ],
    )
    (tmp_path / "summary.json").write_text(json.dumps({"unigram_entropy": 3.0}))
    assert plot_losses(tmp_path) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_summary_is_drawn(tmp_path):
    write_metrics(tmp_path, [{"step": 1, "loss": 5.0}])
    assert plot_losses(tmp_path).exists()


def test_a_run_without_a_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no step to draw yet"):
        plot_losses(tmp_path)
    write_metrics(tmp_path, [])
    with pytest.raises(UserError, match="has no step to draw yet"):
        plot_losses(tmp_path)


def empty():
    return SplitSummary(
        num_documents=0, num_bytes=0, num_tokens=0, bytes_per_token=0.0, lengths=None, histogram=None
    )


def test_lengths_of_an_empty_split_are_refused(tmp_path):
    with pytest.raises(UserError, match="the split is empty"):
        plot_lengths(empty(), tmp_path / "a.png", title="none")


def test_a_picture_that_cannot_be_written_is_refused(tmp_path):
    run_dir = tmp_path
    write_metrics(run_dir, [{"step": 1, "loss": 5.0}])
    (run_dir / "loss.png").mkdir()
    with pytest.raises(UserError, match="loss.png could not be written: Is a directory$"):
        plot_losses(run_dir)
