"""Run folders as they are read for a comparison."""

import json
import math

import pytest

from hardy.cli.compare_runs import STEP, TIME, TOKENS, counted, element_bytes, read_records, read_run
from hardy.config import UserError


def test_a_real_run_is_read_as_it_tells_of_itself(finished_run):
    run = read_run(finished_run, name="real")
    summary = json.loads((finished_run / "summary.json").read_text())
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert run.totals["validation_loss"] == summary["validation_loss"] == run.validation.y[-1]
    assert run.totals["best_validation_loss"] == min(
        line["validation_loss"] for line in lines if "validation_loss" in line
    )
    assert (run.totals["steps"], run.totals["tokens"]) == (4, summary["tokens"])
    assert run.totals["peak_memory"] == max(line["peak_memory_mb"] for line in lines) * 1e6
    assert run.training.y == [line["loss"] for line in lines]
    assert list(run.validation.x[STEP]) == [2, 4]
    assert run.config["optim.name"] == "adamw"
    assert run.config["run.num_workers"] == 1
    assert (run.seed, run.notes, run.events) == (0, [], [])


def test_the_optimizer_state_of_adamw_is_two_numbers_for_each_parameter(finished_run):
    newest = finished_run / "checkpoints" / "step-00000004" / "index.json"
    shapes = {
        key: about["shape"]
        for key, about in json.loads(newest.read_text())["tensors"].items()
        if key.startswith("model/")
    }
    parameters = sum(math.prod(shape) for shape in shapes.values())
    counts = 4 * len(shapes)  # one fp32 step count for each tensor
    found = read_run(finished_run, name="real").totals["optimizer_state"]
    assert found == 2 * 4 * parameters + counts


def test_the_newest_checkpoint_that_can_be_read_tells_the_state(make_run):
    folder = make_run("a")
    for step, dtype in ((2, "F32"), (10, "BF16")):
        place = folder / "checkpoints" / f"step-{step:08d}"
        place.mkdir(parents=True)
        tensors = {"optim/w/m": {"dtype": dtype, "shape": [3, 4]}, "model/w": {"dtype": "F32", "shape": [99]}}
        (place / "index.json").write_text(json.dumps({"tensors": tensors}))
    assert read_run(folder, name="a").totals["optimizer_state"] == 24
    (folder / "checkpoints" / "step-00000010" / "index.json").write_text("{")
    assert read_run(folder, name="a").totals["optimizer_state"] == 48


@pytest.mark.parametrize("facts", ["[]", '{"starts": [3]}', "{}"])
def test_a_note_of_starts_that_says_nothing_is_no_obstacle(make_run, facts):
    folder = make_run("a")
    (folder / "run.json").write_text(facts)
    assert read_run(folder, name="a").name == "a"


def test_places_on_every_axis(make_run):
    run = read_run(make_run("a"), name="a")
    assert run.training.x == {STEP: [1, 2, 3, 4], TOKENS: [100, 200, 300, 400], TIME: [0.5, 1.25, 1.75, 2.5]}
    assert run.validation.x == {STEP: [2, 4], TOKENS: [200, 400], TIME: [1.25, 2.5]}
    assert run.totals["wall_s"] == 2.5
    assert run.totals["tokens_per_s"] == 400 / 2.0  # without the evaluations
    assert run.totals["training_loss"] == 1.0


def test_the_last_training_loss_is_a_mean_of_the_last_twentieth(make_run):
    lines = [{"step": step, "loss": float(step), "step_time_s": 0.1} for step in range(1, 41)]
    run = read_run(make_run("a", lines=lines), name="a")
    assert run.totals["training_loss"] == 39.5
    assert "tokens" not in run.totals
    assert TOKENS not in run.training.x


def test_counters_may_begin_again_at_a_resume(make_run):
    sent = [100, 300, 50, 60]
    lines = [{"step": i + 1, "loss": 1.0, "bytes_sent": size} for i, size in enumerate(sent)]
    assert read_run(make_run("a", lines=lines), name="a").totals["bytes_sent"] == 360
    assert counted([{}], "bytes_sent") is None


def test_rounds_and_steps_with_workers_left_out_are_counted(make_run):
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0, "flagged_replicas": [], "removed_workers": [0]},
        {"step": 3, "loss": None, "flagged_replicas": [1, 2], "removed_workers": [0], "rollbacks": 1},
    ]
    totals = read_run(make_run("a", lines=lines), name="a").totals
    assert (totals["rejected_rounds"], totals["removed_steps"], totals["rollbacks"]) == (1, 2, 1)
    assert "lost" not in totals
    assert "validation_loss" not in totals


@pytest.mark.parametrize("end", ['{"step": 5, "lo', '{"step": 5, "loss": 1}x\n', "\0\0\0\n", "[1]\n"])
def test_a_line_cut_off_at_the_end_is_left_out_and_told(make_run, end):
    folder = make_run("a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(end)
    run = read_run(folder, name="a")
    assert run.totals["steps"] == 4
    assert run.notes == ["line 5 of metrics.jsonl is cut off (killed?) and left out"]


def test_a_broken_line_before_the_end_is_refused(make_run):
    file = make_run("a") / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is no record of a step; repair or delete"):
        read_records(file)


def test_what_is_no_run_is_refused_by_name(tmp_path, make_run):
    with pytest.raises(UserError, match=f"{tmp_path} is no run folder: config.json is missing"):
        read_run(tmp_path, name="a")
    folder = make_run("a")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="a has no metrics.jsonl; was it ever started"):
        read_run(folder, name="a")
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no settings"):
        read_run(folder, name="a")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        read_run(folder, name="a")


def test_what_a_reader_must_know_is_noted(make_run):
    assert read_run(make_run("none", lines=[]), name="none").notes == ["no step is recorded"]
    short = read_run(make_run("short", lines=[{"step": 1, "loss": 1.0}]), name="short")
    assert short.notes == ["never evaluated; no validation loss", "unfinished: 1 of 4 steps"]


def test_a_resume_is_an_event(make_run):
    starts = [{"from_step": 0, "num_workers": 2}, {"from_step": 2, "num_workers": 3, "commit": "abc"}]
    run = read_run(make_run("a", starts=starts), name="a")
    assert [(event.step, event.text) for event in run.events] == [(2, "resumed from a checkpoint")]
    assert (run.config["run.num_workers"], run.config["run.commit"]) == (3, "abc")


def test_sizes_of_elements():
    assert [element_bytes(name) for name in ("F64", "U16", "U8", "F8_E5M2", "BOOL")] == [8, 2, 1, 1, 1]
