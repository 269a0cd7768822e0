"""Starting and resuming a run: files it leaves, the same losses after a stop, refusals."""

import json
import signal

import pytest
from safetensors.torch import load_file, save_file

from hardy.config import UserError, from_dict, override, to_dict
from hardy.train.hooks import Hook
from hardy.train.loop import Batches
from hardy.train.metrics import read_metrics
from hardy.train.run import Surroundings, resume, start


def losses(run_dir):
    return [(r["step"], r["loss"], r.get("validation_loss")) for r in read_metrics(run_dir / "metrics.jsonl")]


class StopAt(Hook):
    """Asks the run to stop once a step is recorded."""

    def __init__(self, step):
        self.step, self.number = step, None

    def on_step(self, record):
        if record["step"] == self.step:
            self.number = signal.SIGTERM


@pytest.fixture
def around(cache_dir):
    def around(*hooks, **more):
        return Surroundings(cache_dir=cache_dir, hooks=hooks, **more)

    return around


@pytest.fixture(scope="module")
def whole(make_config, cache_dir, tmp_path_factory):
    """The uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, start(
        make_config(), run_dir, Surroundings(cache_dir=cache_dir, command=["hardy", "train"])
    )


def test_a_run_leaves_everything_it_promises(whole):
    run_dir, summary = whole
    names = {path.name for path in run_dir.iterdir()}
    expected = {"config.json", "run.json", "metrics.jsonl", "summary.json", "checkpoints", "tokenizer"}
    assert expected <= names
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == summary.steps == 6
    assert summary.stopped_by is None
    assert summary.tokens == 6 * 4 * 32
    assert summary.validation_loss < summary.first_loss
    assert "⟶" in summary.sample
    (first,) = json.loads((run_dir / "run.json").read_text())["starts"]
    assert first["command"] == ["hardy", "train"]


def test_what_batches_say_at_the_end_is_in_the_summary(whole, make_config, around, tmp_path, monkeypatch):
    assert whole[1].note is None
    monkeypatch.setattr(Batches, "closing_note", lambda self: "no group was worth it")
    summary = start(make_config(), tmp_path / "run", around())
    assert summary.note == "no group was worth it"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["note"] == summary.note


def test_a_stopped_run_goes_on_with_the_same_losses(whole, make_config, around, tmp_path):
    stopper = StopAt(3)
    summary = start(make_config(), tmp_path / "run", around(stopper, stop_signal=lambda: stopper.number))
    assert summary.stopped_by == "SIGTERM"
    assert summary.steps == 4  # the wish is voted on in the step after the one that was recorded
    assert resume(tmp_path / "run", around()).steps == 6
    assert losses(tmp_path / "run") == losses(whole[0])
    assert [s["from_step"] for s in json.loads((tmp_path / "run" / "run.json").read_text())["starts"]] == [
        0,
        4,
    ]


ADAPTIVE = {
    "optim__guard": {"history": "tensor", "history_warmup_steps": 1, "history_factor": 1.0},
    "optim__schedule": {
        "name": "performance",
        "warmup_steps": 1,
        "performance": {"interval_steps": 1, "target": 1},
    },
    "train__steps": 10,
}


def test_a_run_that_diverged_is_summed_up_all_the_same(make_config, around, tmp_path, caplog):
    summary = start(make_config(optim__lr=1e300, train__steps=3), tmp_path / "run", around())
    assert summary.sample.endswith("⟶") and (tmp_path / "run" / "summary.json").exists()
    assert "outputs are NaN or infinite: training diverged; take a lower optim.lr" in caplog.text


def controlled(run_dir):
    """What the guard and the schedule decided at each step."""
    return [(r["step"], r["loss"], r["lr"], r["clipped"]) for r in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("history", ["global", "tensor", "zscore"])
def test_guard_and_schedule_go_on_as_they_were(make_config, around, tmp_path, history):
    config = make_config(**ADAPTIVE | {"optim__guard__history": history})
    start(config, tmp_path / "whole", around())
    stopper = StopAt(4)
    start(config, tmp_path / "run", around(stopper, stop_signal=lambda: stopper.number))
    assert len(controlled(tmp_path / "run")) == 5
    resume(tmp_path / "run", around())
    assert controlled(tmp_path / "run") == controlled(tmp_path / "whole")
    assert controlled(tmp_path / "run")[-1][3] > 0  # something was clipped, so history was there to be kept


def test_a_lengthened_run_spreads_its_decay_over_the_new_steps(make_config, around, tmp_path):
    timed = {"name": "performance", "warmup_steps": 1, "performance": {"mode": "time"}}
    start(make_config(optim__schedule=timed), tmp_path / "run", around())
    longer = make_config(optim__schedule=timed | {"performance": {"mode": "time", "final_slow": 0.2}})
    longer = from_dict(type(longer), override(to_dict(longer), {"train.steps": 9}))
    resume(tmp_path / "run", around(), config=longer)
    rates = [rate for _, _, rate, _ in controlled(tmp_path / "run")]
    assert rates[5] == pytest.approx(0.01 * 0.3)
    assert rates[8] == pytest.approx(0.01 * 0.2)


def test_a_guard_and_a_schedule_may_come_and_go_at_a_resume(make_config, around, tmp_path, caplog):
    start(make_config(), tmp_path / "run", around())
    caplog.set_level("INFO")
    resume(tmp_path / "run", around(), config=make_config(**ADAPTIVE))
    assert "optim.guard.history=tensor begins: the checkpoint has none" in caplog.text
    rates = [rate for _, _, rate, _ in controlled(tmp_path / "run")]
    assert rates[5] == pytest.approx(0.001) and rates[6] > 0.005  # the new schedule begins at its peak
    other = make_config(**ADAPTIVE | {"optim__guard__history": "global", "train__steps": 12})
    resume(tmp_path / "run", around(), config=other)
    assert "optim.guard.history=global begins" in caplog.text
    resume(tmp_path / "run", around(), config=make_config(train__steps=14))
    assert len(controlled(tmp_path / "run")) == 14


def test_a_run_without_checkpoint_starts_over_and_says_so(whole, make_config, around, tmp_path, caplog):
    class Crash(Hook):
        def on_step(self, record):
            if record["step"] == 1:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        start(make_config(), tmp_path / "run", around(Crash()))
    assert not caplog.text
    resume(tmp_path / "run", around())
    assert f"there is no checkpoint in {tmp_path / 'run' / 'checkpoints'}: the run begins anew" in caplog.text
    assert losses(tmp_path / "run") == losses(whole[0])


@pytest.mark.parametrize(("name", "kind"), [("metrics.jsonl", "file"), ("checkpoints", "folder")])
def test_what_stands_in_the_wrong_place_is_named_and_kept(make_config, around, tmp_path, name, kind):
    start(make_config(), tmp_path / "run", around())
    (tmp_path / "run" / name).rename(tmp_path / "aside")
    path = tmp_path / "run" / name
    path.mkdir() if kind == "file" else path.write_text("mine")
    with pytest.raises(UserError, match=f"{name} is no {kind}, .*put the {kind} back"):
        resume(tmp_path / "run", around(), config=make_config(train__steps=8))
    assert path.is_dir() if kind == "file" else path.read_text() == "mine"
    path.rmdir() if kind == "file" else path.unlink()
    (tmp_path / "aside").rename(path)
    assert resume(tmp_path / "run", around(), config=make_config(train__steps=8)).steps == 8


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    whole, make_config, around, tmp_path, caplog
):
    stopper = StopAt(4)
    start(make_config(), tmp_path / "run", around(stopper, stop_signal=lambda: stopper.number))
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    victim = next(newest.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    resume(tmp_path / "run", around())
    assert newest.name in caplog.text
    assert losses(tmp_path / "run") == losses(whole[0])


def test_a_finished_run_can_be_lengthened(whole, make_config, around, tmp_path):
    start(make_config(), tmp_path / "run", around())
    assert resume(tmp_path / "run", around(), config=make_config(train__steps=8)).steps == 8
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(1, 9))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 8


def test_fewer_steps_than_are_done_are_refused(make_config, around, tmp_path):
    start(make_config(), tmp_path / "run", around())
    before = losses(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"train.steps=4 is below the 6 steps that .* has done; raise train.steps"
    ):
        resume(tmp_path / "run", around(), config=make_config(train__steps=4))
    assert losses(tmp_path / "run") == before


def test_settings_changed_at_a_resume_are_used(make_config, around, tmp_path):
    """The learning rate, the decay and the betas of the new config, not those that lie in the checkpoint."""
    start(make_config(), tmp_path / "run", around())
    changed = make_config(train__steps=8, optim__weight_decay=0.5, optim__beta1=0.5, optim__lr=0.02)
    resume(tmp_path / "run", around(), config=changed)
    (newest, *_) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    groups = json.loads((newest / "plain.json").read_text())["optimizer"]["groups"]
    assert groups[0]["weight_decay"] == 0.5
    assert groups[0]["betas"] == {"__tuple__": [0.5, 0.95]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model__shape__num_layers": 1}, "cannot resume .*the model changed"),
        ({"train__batch_packs": 2}, "cannot resume .*the order of the data changed"),
        ({"data__validation_fraction": 0.3}, "cannot resume .*the data changed"),
    ],
)
def test_resuming_with_another_model_or_data_is_refused_and_loses_nothing(
    make_config, around, tmp_path, changes, text
):
    start(make_config(train__steps=2, optim__schedule__warmup_steps=1), tmp_path / "run", around())
    before = losses(tmp_path / "run")
    with pytest.raises(UserError, match=text):
        resume(tmp_path / "run", around(), config=make_config(**changes))
    assert losses(tmp_path / "run") == before


def test_two_processes_cannot_train_in_one_folder(make_config, around, tmp_path):
    class Intruder(Hook):
        def on_step(self, record):
            with pytest.raises(UserError, match="another process is training in"):
                resume(tmp_path / "run", around())

    start(make_config(train__steps=1, optim__schedule__warmup_steps=0), tmp_path / "run", around(Intruder()))


def test_all_checkpoints_damaged_is_an_error_that_lists_them(make_config, around, tmp_path):
    start(make_config(), tmp_path / "run", around())
    for file in (tmp_path / "run" / "checkpoints").glob("step-*/*.safetensors"):
        tensors = load_file(file)
        save_file({name: value + 1 for name, value in tensors.items()}, file)
    with pytest.raises(UserError, match=r"step-00000006"):
        resume(tmp_path / "run", around())


def test_hooks_hear_of_phases_start_steps_and_end(make_config, cache_dir, tmp_path, text_folder):
    heard = []

    class Listener(Hook):
        def on_phase(self, name, fraction):
            heard.append("phase")

        def on_start(self, facts):
            heard.append(("start", facts.total_steps, facts.num_workers, facts.tokens_per_step))

        def on_step(self, record):
            heard.append(record["step"])

        def on_end(self, summary):
            heard.append(("end", summary.steps))

    config = make_config(train__steps=2, optim__schedule__warmup_steps=1)
    start(config, tmp_path / "run", Surroundings(cache_dir=tmp_path / "new_cache", hooks=[Listener()]))
    assert heard[0] == "phase"
    assert [h for h in heard if h != "phase"] == [("start", 2, 1, 128), 1, 2, ("end", 2)]
