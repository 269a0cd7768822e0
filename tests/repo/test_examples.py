"""The example scripts run, in this process, at a small size, and stay short."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def call(name, *arguments, **named):
    runpy.run_path(str(EXAMPLES / name))["main"](*arguments, **named)


def test_every_example_is_short_and_run_here():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(RUNS)
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60


def own_text(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text("The house by the sea is old and red. " * (10 + i))
    call("03_own_text.py", str(tmp_path / "*.txt"), tmp_path / "out", steps=10)


RUNS = {
    "01_train_tiny.py": (lambda tmp_path: call("01_train_tiny.py", tmp_path, steps=3), "validation"),
    "02_simulated_workers.py": (
        lambda tmp_path: call("02_simulated_workers.py", tmp_path, steps=2, num_workers=2),
        "idle",
    ),
    "03_own_text.py": (own_text, "The house "),
    "04_own_loop.py": (lambda tmp_path: call("04_own_loop.py", tmp_path, steps=2), "step 2: loss"),
}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_it_runs(name, tmp_path, capsys):
    run, expected = RUNS[name]
    run(tmp_path)
    assert expected in capsys.readouterr().out
