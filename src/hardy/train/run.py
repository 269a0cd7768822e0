"""Start and resume a run: prepare the data, build, load the newest good checkpoint, train, sum up."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hardy.config import UserError, to_dict
from hardy.data.corpus import Corpus, prepare
from hardy.distributed.comm import Alone, Communicator, join_world, leave_world, lost_workers_named
from hardy.distributed.sharded import bare
from hardy.model.generate import NotFiniteError, generate
from hardy.optim.build import hyperparameters, set_hyperparameters
from hardy.train.checkpoint import CheckpointStore
from hardy.train.config import TrainConfig
from hardy.train.device import Hardware, choose_hardware, denormals_flushed
from hardy.train.elections import way_in
from hardy.train.folder import RunFolder, replace_json
from hardy.train.hooks import Hook, RunFacts, Summary
from hardy.train.identity import check_identity
from hardy.train.loop import Progress, run_loop
from hardy.train.manifest import Checkpoint
from hardy.train.membership import (
    Membership,
    check_alike,
    has_come_late,
    join_replica,
    leads,
    membership_of,
    newest_of_any,
    one_at_a_time,
)
from hardy.train.metrics import MetricsFile, read_metrics
from hardy.train.peers import Peers
from hardy.train.plan import World
from hardy.train.setup import Assembly, Stateful, assemble

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 32
SAMPLE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a run needs from outside: handed in by the command line or a test."""

    cache_dir: Path
    world: World = World()
    command: Sequence[str] = ()
    hooks: Sequence[Hook] = ()
    stop_signal: Callable[[], int | None] = lambda: None
    """The signal that asked this process to stop, if any."""


def start(config: TrainConfig, run_dir: Path, around: Surroundings) -> Summary:
    """Train a new run in `run_dir`.

    Raises:
        UserError: something in the config, the data or the folder cannot work; before the first step it
            leaves nothing.
        RunFailedError: training cannot go on.
    """
    folder, is_new = RunFolder(run_dir), not run_dir.exists()
    with ExitStack() as held:
        if around.world.rank == 0:
            held.enter_context(folder.locked())
            if not (around.world.restarts and folder.config_file.exists()):
                folder.check_new(config)
                held.enter_context(folder.taken_back(is_new=is_new))
                folder.create(config, command=around.command, num_workers=around.world.size)
        return _run(config, folder, around)


def resume(run_dir: Path, around: Surroundings, *, config: TrainConfig | None = None) -> Summary:
    """Go on with the run in `run_dir` from its newest good checkpoint, or from the start when it has none.

    Args:
        run_dir: the run folder.
        around: what the run needs from outside.
        config: the configuration from here on, such as one with more steps; None goes on as before.

    Raises:
        UserError: there is no run, all checkpoints are damaged, or the run is not the one that was saved.
        RunFailedError: training cannot go on.
    """
    folder = RunFolder(run_dir)
    config = config or folder.read_config()
    folder.check_parts()
    with ExitStack() as held:
        if around.world.rank == 0:
            held.enter_context(folder.locked())
        return _run(config, folder, around, is_resumed=True)


def _run(
    config: TrainConfig, folder: RunFolder, around: Surroundings, *, is_resumed: bool = False
) -> Summary:
    """Train, in whatever world this process is part of."""
    world = around.world
    hardware = choose_hardware(config.train.device, config.train.precision, local_rank=world.local_rank)
    if hardware.device.type == "cuda":
        torch.cuda.set_device(hardware.device)
    device_type = "cuda" if hardware.device.type == "cuda" else "cpu"
    with denormals_flushed(), ExitStack() as held:
        inner = join_replica(config, world, held, device_type=device_type)
        membership = membership_of(config, world, held, inner=inner)
        elect = way_in(config, world, folder.path, held, inner=inner)
        if elect is not None:
            membership = Membership(replica=world.replica, replicas=world.replicas, elect=elect)
        if world.size == 1 or membership:
            train = partial(_train, config, folder, around, inner, hardware=hardware)
            return train(is_resumed=is_resumed, membership=membership)
        comm = join_world(
            rank=world.rank,
            size=world.size,
            init_method=world.address or "env://",
            device_type=device_type,
        )
        try:
            check_alike(config, comm)
            return _train(config, folder, around, comm, hardware=hardware, is_resumed=is_resumed)
        finally:
            leave_world()


def _train(
    config: TrainConfig,
    folder: RunFolder,
    around: Surroundings,
    comm: Communicator,
    *,
    hardware: Hardware,
    is_resumed: bool,
    membership: Membership | None = None,
) -> Summary:
    """Build, load, train and sum up."""
    is_first = around.world.rank == 0
    hooks = list(around.hooks) if is_first else []
    # Of replicas that come and go each worker for itself: none waits in a collective while another prepares.
    with one_at_a_time(around.cache_dir) if membership else nullcontext():
        corpus = prepare_once(config, around.cache_dir, Alone() if membership else comm, hooks)
    assembly = assemble(config, comm, corpus=corpus, hardware=hardware, membership=membership)
    store = _store(config, folder, assembly, replica=assembly.grid.replica)
    has_joined = membership is not None and has_come_late(assembly.worker.strategy)
    if has_joined:
        progress = _progress_of_others(config, folder, assembly)
    else:
        progress = _progress_saved(config, folder, assembly, store, membership)
    if is_first:
        corpus.tokenizer.save(folder.tokenizer)
        if is_resumed and not has_joined:
            folder.note_start(
                config, command=around.command, from_step=progress.step, num_workers=around.world.size
            )
            replace_json(folder.config_file, to_dict(config))
    for hook in hooks:
        facts = _facts(config, folder, assembly, progress, corpus, hardware=hardware)
        hook.on_start(replace(facts, num_workers=around.world.size))
    started_s, started_tokens = comm.clock.now(), progress.tokens
    with lost_workers_named(comm):
        _loop(assembly, progress, store, folder, around, hardware=hardware)
        elapsed_s = max(comm.clock.now() - started_s, 1e-9)
        text = sample(assembly, corpus)
    stopped_by = around.stop_signal() if progress.step < config.train.steps else None
    summary = Summary(
        run_dir=str(folder.path),
        steps=progress.step,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        validation_loss=progress.validation_loss,
        unigram_entropy=corpus.unigram_entropy,
        tokens=progress.tokens,
        tokens_per_s=(progress.tokens - started_tokens) / elapsed_s,
        peak_memory_mb=hardware.peak_memory_mb(),
        skipped_steps=progress.skipped,
        sample=text,
        stopped_by=signal.Signals(stopped_by).name if stopped_by else None,
        note=assembly.plan.batches.closing_note(),
    )
    is_left = assembly.outer is not None and leads(assembly.outer, assembly.grid.replica)
    if is_first or (is_left and comm.rank == 0):
        replace_json(folder.summary_file, asdict(summary))
    for hook in hooks:
        hook.on_end(summary)
    return summary


def _facts(
    config: TrainConfig,
    folder: RunFolder,
    assembly: Assembly,
    progress: Progress,
    corpus: Corpus,
    *,
    hardware: Hardware,
) -> RunFacts:
    """Return what listeners are told before the first step."""
    return RunFacts(
        run_dir=str(folder.path),
        num_parameters=assembly.num_parameters,
        total_steps=config.train.steps,
        first_step=progress.step,
        tokens_per_step=config.train.batch_packs * config.data.pack_tokens,
        num_workers=assembly.worker.world.size,
        device=hardware.name,
        unigram_entropy=corpus.unigram_entropy,
        config=to_dict(config),
    )


def _loop(
    assembly: Assembly,
    progress: Progress,
    store: CheckpointStore,
    folder: RunFolder,
    around: Surroundings,
    *,
    hardware: Hardware,
) -> None:
    """Run the loop with its records and checkpoints; what is being saved is finished whatever happens."""
    worker = assembly.worker
    metrics = None
    if around.world.rank == 0:
        metrics = MetricsFile(folder.metrics_file, after_step=progress.step)

    def record(line: dict[str, Any]) -> None:
        line["peak_memory_mb"] = hardware.peak_memory_mb()
        if metrics:
            metrics.write(line)
            for hook in around.hooks:
                hook.on_step(line)

    def save(now: Progress) -> None:
        tensors, plain = state_of_parts(assembly.parts())
        store.save(
            now.step,
            worker.model,
            worker.optimizer,
            {"progress": now.state_dict(), "identity": assembly.identity, **plain},
            score=now.validation_loss,
            extra=tensors,
        )

    def stop() -> bool:
        return around.stop_signal() is not None

    try:
        run_loop(worker, assembly.plan, progress, save=save, record=record, stop=stop)
    finally:
        if metrics:
            metrics.close()
        store.wait()


def prepare_once(config: TrainConfig, cache_dir: Path, comm: Communicator, hooks: Sequence[Hook]) -> Corpus:
    """Tokenise on worker 0, then open the cached result everywhere."""

    def report(phase: str, fraction: float) -> None:
        for hook in hooks:
            hook.on_phase(phase, fraction)

    if comm.rank != 0:
        comm.barrier()
    corpus = prepare(config.data, cache_dir=cache_dir, on_progress=report)
    if comm.rank == 0:
        comm.barrier()
    return corpus


def _store(config: TrainConfig, folder: RunFolder, assembly: Assembly, *, replica: int) -> CheckpointStore:
    """Return the checkpoints of a replica; where all step together there is one."""
    return CheckpointStore(
        folder.checkpoints_of(replica),
        assembly.worker.comm,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        asynchronous=config.checkpoint.asynchronous,
    )


def _newest(
    store: CheckpointStore, assembly: Assembly, first: Callable[[], CheckpointStore]
) -> tuple[CheckpointStore, Checkpoint | None]:
    """Return the newest good checkpoint that all replicas have, or else the first replica's newest."""
    mine = store.newest_good()
    if assembly.grid.replicas == 1:
        return store, mine
    world = assembly.worker.world
    steps = world.all_gather(torch.tensor(mine.step if mine else -1)).tolist()
    if len(set(steps)) == 1:
        return store, mine
    held = {checkpoint.step: checkpoint for checkpoint in store.all()}
    listed = (sorted(held)[-_COMPARED:] + [-1] * _COMPARED)[:_COMPARED]
    rows = world.all_gather(torch.tensor(listed)).tolist()
    common = set.intersection(*({step for step in row if step >= 0} for row in rows))
    if common:
        return store, held[max(common)]
    other = first()
    return other, other.newest_good()


_COMPARED = 64
"""Checkpoints that replicas compare."""


def load_newest(
    store: CheckpointStore, assembly: Assembly, folder: RunFolder, *, first: Callable[[], CheckpointStore]
) -> Progress:
    """Load the newest good checkpoint into the assembled run and return where it stands.

    Args:
        store: of this worker's replica.
        assembly: the run.
        folder: where it lies.
        first: opens the first replica's, from which a run goes on with more replicas.
    """
    store, checkpoint = _newest(store, assembly, first)
    if checkpoint is not None:
        return _load(store, checkpoint, assembly, folder)
    if assembly.worker.world.rank == 0 and folder.metrics_file.exists():
        logger.warning(
            "there is no checkpoint in %s: the run begins anew, and metrics.jsonl with it", store.folder
        )
    return Progress()


def _load(store: CheckpointStore, checkpoint: Checkpoint, assembly: Assembly, folder: RunFolder) -> Progress:
    """Load a checkpoint into the assembled run and return where it stands."""
    progress = Progress()
    plain = store.read_plain(checkpoint)
    check_identity(plain["identity"], assembly.identity, run_dir=str(folder.path))
    worker, parts = assembly.worker, assembly.parts()
    worker.strategy.expect(plain["strategy"])
    progress.load_state_dict(plain["progress"])
    if not plain.get("schedule"):  # one without state, so not the one at hand if that has any
        assembly.plan.schedule.reset(at_step=progress.step)
        del parts["schedule"]
    if worker.guard is not None and plain.get("guard") != {"history": worker.guard.history}:
        logger.info("optim.guard.history=%s begins: the checkpoint has none", worker.guard.history)
        del parts["guard"]
    tensors, _ = state_of_parts(parts)
    settings = hyperparameters(worker.optimizer)
    store.load(checkpoint, worker.model, worker.optimizer, extra=tensors)
    set_hyperparameters(worker.optimizer, settings)  # the config at hand decides, not the one that was saved
    for name, part in parts.items():
        filled = {key: tensors[f"{name}/{key}"] for key in part.state_dict() if f"{name}/{key}" in tensors}
        part.load_state_dict(plain[name] | filled)
    if progress.step > assembly.plan.loop.steps and assembly.outer is None:  # those end with a round
        raise UserError(
            f"train.steps={assembly.plan.loop.steps} is below the {progress.step} steps that {folder.path} "
            f"has done; raise train.steps, or leave it out"
        )
    logger.info("resumed %s at step %d", folder.path, progress.step)
    return progress


def _progress_saved(
    config: TrainConfig,
    folder: RunFolder,
    assembly: Assembly,
    store: CheckpointStore,
    membership: Membership | None,
) -> Progress:
    """Load what the run goes on from, if anything was saved, and return where it stands."""
    if membership is None:
        first = partial(_store, config, folder, assembly, replica=0)
        return load_newest(store, assembly, folder, first=first)
    # The first worker of the replica looks for all of it.
    found = Peers(assembly.worker.comm).agree(
        lambda: None, lambda workers: [newest_of_any(folder, membership)] * len(workers)
    )
    if found is None:
        return Progress()
    source, checkpoint = found
    return _load(_store(config, folder, assembly, replica=source), checkpoint, assembly, folder)


def _progress_of_others(config: TrainConfig, folder: RunFolder, assembly: Assembly) -> Progress:
    """Return the progress of a replica that has joined others: their step, as if every pack had been full."""
    step = assembly.worker.strategy.standing(0)
    assembly.plan.schedule.reset(at_step=step)
    tokens = step * config.train.batch_packs * config.data.pack_tokens
    progress = Progress(step=step, tokens=tokens, evaluated_at=step, saved_at=step)
    if folder.metrics_file.exists():
        losses = [line["loss"] for line in read_metrics(folder.metrics_file) if line["loss"] is not None]
        if losses:
            progress.first_loss, progress.last_loss = losses[0], losses[-1]
    logger.info("replica %d joined %s at step %d", assembly.grid.replica, folder.path, step)
    return progress


def state_of_parts(parts: Mapping[str, Stateful]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of all parts, named part/key, and each part's plain values."""
    states = {name: part.state_dict() for name, part in parts.items()}
    flat = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    plain = {
        name: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        for name, state in states.items()
    }
    return tensors, plain


def sample(assembly: Assembly, corpus: Corpus) -> str:
    """Return the beginning of a held-out document and what the model adds, or nothing without documents.

    Every worker takes part, since a sharded model is gathered in each forward pass; the number of tokens is
    fixed and the draw is seeded, so all stay in step.
    """
    store = corpus.validation if corpus.validation.num_documents else corpus.train
    prompt = store.document(0)[:PROMPT_TOKENS].tolist()
    model = bare(assembly.worker.model)
    try:
        added = generate(model, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=0)
    except NotFiniteError:  # of a sharded model all workers see it at the same token
        logger.warning("the model's outputs are NaN or infinite: training diverged; take a lower optim.lr")
        added = []
    return f"{corpus.tokenizer.decode(prompt)}⟶{corpus.tokenizer.decode(added)}"
