"""The launcher's words."""

import subprocess
import sys

import pytest

from hardy.distributed.launch import torchrun_command


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="at least one worker must run, got 0"):
        torchrun_command(0, ["script.py"])


@pytest.mark.mp
def test_the_command_starts_that_many_workers_with_their_arguments(tmp_path):
    script = tmp_path / "say.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])\n"
    )
    command = torchrun_command(2, [str(script), str(tmp_path)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert command[0] == sys.executable
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["2", "2"]
