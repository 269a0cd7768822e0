"""A small corpus and a finished run, made once."""

import contextlib
import io

import pytest

from hardy.cli.main import main


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Words that make a run of `tiny` last a second: little text, a narrow model, few steps."""
    folder = tmp_path_factory.mktemp("small")
    for number in range(40):
        (folder / f"{number}.txt").write_text(
            f"Document {number} counts: " + " ".join(map(str, range(number, 90)))
        )
    return [
        *("--data.source", f"files:{folder}/*.txt", "--data.cache_dir", str(folder / "cache")),
        *("--data.pack_tokens", "64", "--data.validation_fraction", "0.2", "--model.shape.hidden_size", "16"),
        *(
            "--model.shape.num_layers",
            "1",
            "--model.shape.num_heads",
            "2",
            "--model.shape.intermediate_size",
            "32",
        ),
        *("--train.steps", "4", "--train.batch_packs", "4", "--optim.schedule.warmup_steps", "1"),
        *(
            "--train.evaluate_every_steps",
            "2",
            "--train.evaluate_packs",
            "2",
            "--checkpoint.every_steps",
            "2",
        ),
        *("--log.progress", "none", "--train.device", "cpu"),
    ]


@pytest.fixture(scope="session")
def finished_run(small, tmp_path_factory):
    """The folder of a run of four steps with checkpoints of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "tiny", "--run-dir", str(run_dir), *small]) == 0
    return run_dir
