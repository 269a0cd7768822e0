"""metrics.jsonl survives crashes, resumes and full disks."""

import json
import math

import pytest

from hardy.config import UserError
from hardy.train.metrics import MetricsFile, SmoothedLoss, read_metrics


def write_lines(path, steps, *, tail=""):
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0 / s}) + "\n" for s in steps) + tail)


def test_records_come_back_as_written(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    metrics.write({"step": 1, "loss": 0.1 + 0.2})
    metrics.close()
    assert list(read_metrics(tmp_path / "m.jsonl")) == [{"step": 1, "loss": 0.1 + 0.2}]


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    write_lines(path, range(1, 8))
    metrics = MetricsFile(path, after_step=5)
    metrics.write({"step": 6, "loss": 9.0})
    metrics.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert list(read_metrics(path))[-1]["loss"] == 9.0


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    write_lines(path, [1, 2], tail='{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    MetricsFile(path, after_step=9).close()
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("line", [b"\0\0\n", b"\xff\n", b"[1]\n", b"{}\n"])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "m.jsonl"
    write_lines(path, [1, 2])
    damaged = path.read_bytes() + line
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"line 3 of .*m.jsonl cannot be used: .* delete the line"):
        MetricsFile(path, after_step=9)
    assert path.read_bytes() == damaged


def test_non_finite_numbers_become_null(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_a_full_disk_names_the_file_and_the_way_out(tmp_path, monkeypatch):
    metrics = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    metrics.close()

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "_file", Full())
    with pytest.raises(UserError, match=r"m\.jsonl could not be written \(No space left.*hardy resume"):
        metrics.write({"step": 1})


def test_smoothed_loss_is_the_bias_corrected_average():
    smoothed = SmoothedLoss(decay=0.5)
    values = [smoothed.update(x) for x in (4.0, 2.0, 1.0)]
    assert values == pytest.approx([4.0, (2.0 * 0.5 + 4.0 * 0.25) / 0.75, (0.5 + 0.5 + 0.5) / 0.875])
    assert smoothed.best == min(values)


def test_smoothed_loss_leaves_out_what_is_not_finite_and_comes_back_from_json():
    smoothed = SmoothedLoss(decay=0.9)
    assert smoothed.update(math.nan) == math.inf
    smoothed.update(3.0)
    smoothed.update(math.inf)
    again = SmoothedLoss(decay=0.9)
    again.load_state_dict(json.loads(json.dumps(smoothed.state_dict())))
    assert again.value == smoothed.value == pytest.approx(3.0)
    empty = SmoothedLoss(decay=0.9)
    empty.load_state_dict(json.loads(json.dumps(SmoothedLoss(decay=0.9).state_dict())))
    assert empty.best == math.inf
