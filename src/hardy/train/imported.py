"""A run that starts from weights made elsewhere: a run folder whose checkpoint of step 0 holds them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hardy.distributed.comm import Alone
from hardy.train.checkpoint import CheckpointStore
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.folder import RunFolder
from hardy.train.loop import Progress
from hardy.train.run import Surroundings, prepare_once, state_of_parts
from hardy.train.setup import assemble


def start_from(
    weights: Mapping[str, Tensor], config: TrainConfig, run_dir: Path, around: Surroundings
) -> None:
    """Make `run_dir` a run that `resume` goes on with, from `weights` instead of drawn ones.

    Args:
        weights: every parameter by name.
        config: the run; its model has the sizes of `weights`.
        run_dir: folder to make.
        around: what a run needs from outside.

    Raises:
        UserError: something in the config, the data or the folder cannot work.
    """
    folder, comm = RunFolder(run_dir), Alone()
    with folder.locked():
        corpus = prepare_once(config, around.cache_dir, comm, around.hooks)
        assembly = assemble(config, comm, corpus=corpus, hardware=choose_hardware("cpu", "fp32"))
        worker = assembly.worker
        worker.model.load_state_dict(weights)
        folder.create(config, command=around.command)
        try:
            corpus.tokenizer.save(folder.tokenizer)
            store = CheckpointStore(folder.checkpoints, comm, keep_last=1, keep_best=0, asynchronous=False)
            tensors, plain = state_of_parts(assembly.parts())
            state = {"progress": Progress().state_dict(), "identity": assembly.identity, **plain}
            store.save(0, worker.model, worker.optimizer, state, extra=tensors)
            store.wait()
        except BaseException:
            folder.config_file.unlink()  # or a resume would begin with drawn weights
            raise
