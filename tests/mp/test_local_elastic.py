"""`hardy train --workers N --strategy.elastic true`: replicas that are killed, stopped and come back."""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from hardy.train.metrics import read_metrics

pytestmark = pytest.mark.mp

EVERY = 8
RUN = """
[model]
name = "1m"
shape = {{ hidden_size = 24, intermediate_size = 40, num_layers = 2, num_heads = 2, num_kv_heads = 1, \
head_size = 12 }}
[data]
source = "files:{text}"
pack_tokens = 32
validation_fraction = 0.2
[optim]
lr = 0.01
schedule = {{ name = "constant", warmup_steps = 3 }}
[train]
steps = {steps}
batch_packs = {batch_packs}
device = "cpu"
evaluate_every_steps = 80
evaluate_packs = 4
[checkpoint]
every_steps = 16
[log]
progress = "none"
[strategy]
name = "diloco"
elastic = true
every_steps = 8
timeout_s = 20.0
max_restarts = 10
"""


class Launch:
    """A real `hardy` command, its workers by rank, and what replica 0 wrote."""

    def __init__(self, folder, *, replicas, shards=1, steps=10**6):
        (folder / "text").mkdir()
        for i in range(30):
            words = [f"w{(i * 7 + j * (1 + i % 3)) % 23}" for j in range(80 + i)]
            (folder / "text" / f"{i:02d}.txt").write_text(" ".join(words))
        self.folder, self.run_dir, self.replicas = folder, folder / "run", replicas
        self.num_workers = replicas * shards
        self.toml, self.said = folder / "run.toml", folder / "said.txt"
        text = RUN.format(text=folder / "text", steps=steps, batch_packs=2 * self.num_workers)
        self.toml.write_text(text + (f"mesh = {{ shards = {shards} }}\n" if shards > 1 else ""))

    def train(self, *settings):
        words = ["train", str(self.toml), "--run-dir", str(self.run_dir)]
        return self.begin(*words, "--workers", str(self.num_workers), *settings)

    def begin(self, *words):
        environment = os.environ | {"HARDY_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        with self.said.open("a") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hardy", *words], env=environment, stdout=said, stderr=said
            )
        return self

    def running(self):
        """Return the processes that live, by rank: of replicas of one worker that is their number."""
        found = {}
        for process in psutil.Process(self.process.pid).children():
            try:
                found[int(process.environ()["RANK"])] = process
            except (psutil.Error, KeyError):  # it has ended, or is between fork and exec
                continue
        return found

    def signal(self, which, replica):
        process = self.running()[replica]
        process.send_signal(which)
        return process.pid

    def lines(self):
        path = self.run_dir / "metrics.jsonl"
        return list(read_metrics(path)) if path.exists() else []

    def reaches(self, condition, *, within_s=90.0):
        """Wait until a line of the metrics fulfils the condition, and return it."""
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s and self.process.poll() is None:
            for line in self.lines():
                if condition(line):
                    return line
            time.sleep(0.2)  # the replicas need the cores
        pytest.fail(f"not reached (exit code {self.process.poll()}):\n{self.said.read_text()[-3000:]}")

    def ends(self, *, within_s=60.0):
        return self.process.wait(within_s)

    def anchors(self):
        """Return what each replica that has the newest checkpoint saved as anchor, and its counters."""
        saved = {
            replica: max((self.run_dir / name).glob("step-*"))
            for replica in range(self.replicas)
            if (
                self.run_dir / (name := f"checkpoints-replica-{replica}" if replica else "checkpoints")
            ).exists()
        }
        newest = max(path.name for path in saved.values())
        result = {}
        for replica, path in saved.items():
            if path.name == newest:
                tensors = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
                plain = json.loads((path / "plain.json").read_text())
                result[replica] = ({k: v for k, v in tensors.items() if "/anchor/" in k}, plain)
        return int(newest.removeprefix("step-")), result


@pytest.fixture
def launch(tmp_path):
    made = []

    def begin(**settings):
        made.append(Launch(tmp_path, **settings))
        return made[-1]

    yield begin
    for one in made:
        if one.process.poll() is None:
            one.process.terminate()
            for process in psutil.Process(one.process.pid).children():
                process.kill()
            one.process.kill()
            one.process.wait()


def joined(replica):
    return lambda line: replica in line.get("joined", ())


def all_agree(run):
    """Check that the replicas ended with equal bits; return where, and who."""
    step, saved = run.anchors()
    (first, _), *others = saved.values()
    assert first and all(torch.equal(first[name], other[name]) for other, _ in others for name in first)
    assert all(value.isfinite().all() for value in first.values())
    return step, set(saved)


def all_took_part(line):
    """Check the steps of a round; who missed the end of the one before only gets the result of one redone."""
    assert set(line["replica_steps"]) <= {EVERY} | ({0} if line["redone"] else set())


def test_killed_replicas_come_back_a_stop_is_saved_and_the_run_goes_on(launch):
    run = launch(replicas=3).train()
    run.reaches(lambda line: line.get("round") == 3)
    killed = run.signal(signal.SIGKILL, 1)
    without = run.reaches(lambda line: line.get("members") == [0, 2])
    assert without["generation"] == 1 and len(without["replica_steps"]) == 2
    all_took_part(without)
    back = run.reaches(joined(1))
    assert back["members"] == [0, 1, 2] and len(back["replica_steps"]) == 3
    all_took_part(back)
    assert run.running()[1].pid != killed
    run.signal(signal.SIGKILL, 0)
    back = run.reaches(joined(0))
    assert back["members"] == [0, 1, 2] and len(back["replica_steps"]) == 3
    all_took_part(back)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 143
    step, who = all_agree(run)
    assert step % EVERY == 0 and who == {0, 1, 2}
    lines = run.lines()
    steps, last = [line["step"] for line in lines], lines[-1]["step"]
    assert steps == sorted(set(steps)) and last == step  # what replica 0 wrote before it was lost is there
    assert steps[0] == 1 and [line["round"] for line in lines if "round" in line][:4] == [1, 2, 3, 4]
    said = run.said.read_text()
    assert "replica 1 ended by SIGKILL; started again (1 of 10)" in said and "replica 0 ended" in said
    run.begin("resume", str(run.run_dir), "--train.steps", str(step + 2 * EVERY))
    assert run.ends() == 0
    lines = run.lines()
    assert [line["step"] for line in lines] == [*steps, *range(last + 1, last + 2 * EVERY + 1)]
    assert lines[-1]["round"] == step // EVERY + 2 and lines[-1]["members"] == [0, 1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines) and lines[-1]["loss"] < lines[0]["loss"] - 1
    assert all_agree(run) == (step + 2 * EVERY, {0, 1, 2})


def test_a_stopped_replica_is_left_out_after_the_time_out_and_comes_back_when_it_wakes(launch):
    run = launch(replicas=2).train("--strategy.timeout_s", "3")
    run.reaches(lambda line: line.get("round") == 3)
    stopped = run.signal(signal.SIGSTOP, 1)
    without = run.reaches(lambda line: line.get("members") == [0])
    assert without["redone"] >= 1 and run.running()[1].pid == stopped
    run.signal(signal.SIGCONT, 1)
    back = run.reaches(joined(1))
    assert back["members"] == [0, 1]
    # It may see that it was left out and be started again, or be taken in before it looks.
    was_told = "replica 1 was left out of generation" in run.said.read_text()
    assert was_told == (run.running()[1].pid != stopped)
    run.process.send_signal(signal.SIGINT)
    assert run.ends() == 130


def test_without_replica_0_which_comes_back_with_other_settings_the_other_goes_on_and_sums_up(launch):
    run = launch(replicas=2).train()
    run.reaches(lambda line: line.get("round") == 2)
    run.toml.write_text(run.toml.read_text().replace("lr = 0.01", "lr = 0.02"))
    run.signal(signal.SIGKILL, 0)
    deadline_s = time.monotonic() + 90.0

    def wait_until(condition):
        while not condition():
            assert time.monotonic() < deadline_s, run.said.read_text()
            time.sleep(0.05)

    def newest():
        saved = (run.run_dir / "checkpoints-replica-1").glob("step-*")
        return max((int(path.name.removeprefix("step-")) for path in saved), default=0)

    refused = "replica 0 runs with other settings or another version than the replicas"
    wait_until(lambda: 0 not in run.running() and refused in run.said.read_text())
    before = newest()
    wait_until(lambda: newest() > before)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 143
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["stopped_by"] == "SIGTERM" and summary["steps"] >= newest() > before
    assert math.isfinite(summary["last_loss"]) and summary["first_loss"] > summary["last_loss"]


@pytest.mark.slow
def test_a_sharded_replica_that_loses_a_worker_ends_and_begins_again_as_a_whole(launch):
    run = launch(replicas=2, shards=2).train()
    run.reaches(lambda line: line.get("round") == 3)
    before = {rank: process.pid for rank, process in run.running().items()}
    killed_s = time.monotonic()
    run.signal(signal.SIGKILL, 3)
    without = run.reaches(lambda line: line.get("members") == [0])
    assert without["generation"] == 1 and without["replica_steps"] == [EVERY]
    assert time.monotonic() - killed_s < 15.0  # of a time-out of 20, and 40 within a replica
    back = run.reaches(joined(1))
    assert back["members"] == [0, 1] and back["replica_steps"] == [EVERY] * 2
    after = {rank: process.pid for rank, process in run.running().items()}
    assert [before[rank] == after[rank] for rank in range(4)] == [True, True, False, False]
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 143
    step, who = all_agree(run)
    steps = [line["step"] for line in run.lines()]
    assert steps == sorted(set(steps)) and steps[-1] == step and who == {0, 1}
    said = run.said.read_text()
    assert "replica 1 ended by SIGKILL; started again (1 of 10)" in said and said.count("started again") == 1


NUM_KILLS, NUM_ROUNDS = 10, 200


def hold(processes, which):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has come to its end
            process.send_signal(which)


@pytest.mark.slow
def test_ten_kills_in_two_hundred_rounds_cost_nothing_but_the_killed_replicas_rounds(launch, tmp_path):
    began_s, draw = time.monotonic(), random.Random(0)
    run = launch(replicas=4, steps=NUM_ROUNDS * EVERY)
    run.train("--strategy.every_steps", str(EVERY), "--checkpoint.every_steps", str(4 * EVERY))
    due = sorted(draw.sample(range(5, NUM_ROUNDS - 20), NUM_KILLS))
    settled, kills, seen = {0, 1, 2, 3}, [], 0  # those of whom a line says that they are members

    def now():
        return max((int(p.name[5:]) for p in run.run_dir.glob("checkpoints*/step-*")), default=0) // EVERY

    def note_joined(seen):
        lines = run.lines()
        for line in lines[min(seen, len(lines)) :]:
            settled.update(line.get("joined", ()))
        return len(lines)

    while run.process.poll() is None:
        seen = note_joined(seen)
        running = run.running()
        victims = [replica for replica in sorted(running) if settled - {replica}]
        if len(kills) < NUM_KILLS and victims and now() >= due[len(kills)]:
            replica = draw.choice(victims)
            running[replica].kill()
            running[replica].wait(5)
            seen = note_joined(seen)
            settled.discard(replica)
            kills.append((now(), replica))
            del running[replica]
        away = set(range(4)) - settled
        # while one begins again the others go slowly: where steps are fast they would be done first
        held = [running[replica] for replica in settled if replica in running] if away else []
        hold(held, signal.SIGSTOP)
        time.sleep(0.1)  # the replicas need the cores
        hold(held, signal.SIGCONT)
        time.sleep(0.1)
    assert run.process.returncode == 0, run.said.read_text()
    took_s = time.monotonic() - began_s
    assert len(kills) == NUM_KILLS
    assert run.said.read_text().count("ended by SIGKILL; started again") == NUM_KILLS
    step, who = all_agree(run)
    _, saved = run.anchors()
    counters = saved[min(saved)][1]["plain"]["strategy"]["about"]["plain"]["counters"]
    rounds = [line for line in run.lines() if "round" in line]
    numbers = [line["round"] for line in rounds]
    assert step == NUM_ROUNDS * EVERY and counters["round"] == NUM_ROUNDS
    assert numbers == sorted(set(numbers)) and numbers[-1] == NUM_ROUNDS
    for line in rounds:
        all_took_part(line)
    assert math.isfinite(rounds[-1]["loss"]) and rounds[-1]["loss"] < 2.0
    report = {
        "seconds": round(took_s),
        "kills": kills,
        "rounds that replica 0 saw": len(rounds),
        "redone": sum(line["redone"] for line in rounds),
        "generations": rounds[-1]["generation"],
        "steps of all replicas": counters["total_steps"],
        "of": NUM_ROUNDS * EVERY * 4,
        "at the end": sorted(who),
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    print(json.dumps(report))
