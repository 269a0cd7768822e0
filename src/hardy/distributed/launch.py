"""The command that starts N workers on this machine. Free of torch."""

import sys
from collections.abc import Sequence


def torchrun_command(num_workers: int, arguments: Sequence[str]) -> list[str]:
    """Return the words that start `arguments` in `num_workers` processes by torch's launcher.

    The launcher gives each process RANK, WORLD_SIZE, LOCAL_RANK and an address for `init_method="env://"`,
    stops all when one fails, and picks a free port, so that runs side by side do not meet.

    Args:
        num_workers: processes on this machine.
        arguments: what each runs: `-m`, a module and its arguments, or a script and its arguments.

    Example:
        >>> torchrun_command(2, ["-m", "hardy.cli", "train"])[1:]
        ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '-m', 'hardy.cli', 'train']
    """
    if num_workers < 1:
        raise ValueError(f"at least one worker must run, got {num_workers}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={num_workers}", *arguments]
