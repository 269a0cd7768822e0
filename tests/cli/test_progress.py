"""What a run shows: readable lines, a display that moves, a summary with every promised figure."""

import errno
import io
from dataclasses import replace

import pytest
from rich.console import Console

from hardy.cli.progress import LiveDisplay, PlainLines, Speed, describe, progress_hooks, summary_table
from hardy.train.hooks import RunFacts, Summary

FACTS = RunFacts(
    run_dir="runs/x",
    num_parameters=697_472,
    total_steps=20,
    first_step=0,
    tokens_per_step=2048,
    num_workers=1,
    device="cpu, fp32",
    unigram_entropy=3.0,
)
SUMMARY = Summary(
    run_dir="runs/x",
    steps=20,
    first_loss=5.5,
    last_loss=2.25,
    validation_loss=2.4,
    unigram_entropy=3.0,
    tokens=40_960,
    tokens_per_s=9000.0,
    peak_memory_mb=470.0,
    skipped_steps=0,
    sample="def main⟶(): pass",
    stopped_by=None,
)


def record(step, **more):
    return {
        "step": step,
        "loss": 3.25,
        "lr": 1e-3,
        "tokens": 2048 * step,
        "step_time_s": 0.5,
        "peak_memory_mb": 470.0,
    } | more


def test_plain_lines_come_at_their_cadence_and_at_every_validation():
    lines = []
    hook = PlainLines(lines.append, every_steps=5)
    hook.on_phase("reading", 0.0)
    hook.on_phase("reading", 0.5)
    hook.on_start(FACTS)
    for step in range(1, 21):
        hook.on_step(record(step, **({"validation_loss": 2.5} if step == 7 else {})))
    assert lines[:2] == ["reading ...", describe(FACTS)]
    assert [line.split()[1] for line in lines[2:]] == ["5/20", "7/20", "10/20", "15/20", "20/20"]
    assert "validation 2.5000" in lines[3]
    assert lines[2] == (
        "step 5/20  loss 3.2500  lr 1.00e-03  4,096 tokens/s  10.2k tokens  470 MB  0:07 left"
    )


def test_describe_names_size_place_and_what_is_resumed():
    assert describe(FACTS) == (
        "697k parameters on 1 worker (cpu, fp32), 20 steps of 2,048 tokens; run folder runs/x"
    )
    resumed = RunFacts(**(vars(FACTS) | {"first_step": 7, "num_workers": 4}))
    assert "4 workers" in describe(resumed)
    assert "going on after step 7" in describe(resumed)


def test_the_live_display_shows_loss_speed_tokens_and_memory():
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=140))
    display.on_phase("reading", 0.5)
    display.on_start(FACTS)
    for step in range(1, 21):
        display.on_step(record(step, **({"validation_loss": 2.5} if step == 10 else {})))
    display.on_end(SUMMARY)
    display.close()
    text = stream.getvalue()
    for word in ("reading", "training", "loss 3.250", "val 2.500", "tok/s", "41k tokens", "470 MB", "100%"):
        assert word in text


def test_the_summary_holds_every_promised_figure():
    console = Console(file=io.StringIO(), width=120)
    console.print(summary_table(SUMMARY, plot="runs/x/loss.png"))
    text = console.file.getvalue()
    for word in (
        "5.500 first, 2.250 last",
        "2.400 (80% of the unigram entropy 3.000)",
        "9,000 a second",
        "470 MB",
        "runs/x/loss.png",
        "def main⟶(): pass",
    ):
        assert word in text
    stopped = Summary(**(vars(SUMMARY) | {"stopped_by": "SIGTERM", "validation_loss": None}))
    console.print(summary_table(stopped, plot=None))
    assert "stopped by SIGTERM" in console.file.getvalue()
    assert "no held-out pack" in console.file.getvalue()
    assert "note" not in console.file.getvalue()
    console.print(summary_table(replace(SUMMARY, note="no group was worth it"), plot=None))
    assert "no group was worth it" in console.file.getvalue()


def test_what_a_model_writes_does_not_steer_the_terminal():
    console = Console(file=io.StringIO(), width=120)
    console.print(summary_table(replace(SUMMARY, sample="a\x1b[2Jb\x07c\nd"), plot=None))
    text = console.file.getvalue()
    assert "a�[2Jb�c" in text and "\x1b" not in text and "\x07" not in text


@pytest.mark.parametrize(("kind", "kinds"), [("none", 1), ("plain", 2), ("live", 2), ("auto", 2)])
def test_a_log_file_is_always_written(tmp_path, kind, kinds):
    stream = io.StringIO()
    hooks = progress_hooks(kind, tmp_path / "run", every_steps=5, stream=stream)
    assert len(hooks) == kinds
    hooks[0].on_start(FACTS)
    hooks[0].on_step(record(5))
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2
    if kind == "auto":  # no terminal: plain
        hooks[1].on_start(FACTS)
        assert stream.getvalue() == describe(FACTS) + "\n"


class Closed(io.StringIO):
    """A stream that fails from some line on."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("kind", ["plain", "live"])
@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "gone"), OSError(errno.EIO, "hung up")])
def test_a_display_that_nobody_reads_ends_and_says_so_and_the_log_goes_on(tmp_path, kind, error):
    gone = []
    stream = Closed(error)
    hooks = progress_hooks(
        kind, tmp_path / "run", every_steps=5, stream=stream, reader_gone=lambda: gone.append(1)
    )
    for hook in hooks:
        hook.on_phase("reading", 0.5)
        hook.on_start(FACTS)
        hook.on_step(record(5))
        hook.on_end(SUMMARY)
        hook.close()
    assert gone == [1]
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 3


def test_another_fault_of_a_display_is_not_taken_for_that(tmp_path):
    stream = Closed(OSError(errno.ENOSPC, "full"))
    shown = progress_hooks("plain", tmp_path / "run", every_steps=5, stream=stream)[1]
    with pytest.raises(OSError, match="full"):
        shown.on_start(FACTS)


def test_speed_does_not_count_the_first_step_of_a_resumed_run_as_all_tokens():
    speed = Speed()
    speed.update(record(100))
    assert speed.tokens_per_s == 0
    speed.update(record(101))
    assert speed.tokens_per_s == pytest.approx(4096)
