"""`hardy balance profile`: time micro-batches of a model on this machine, fit its cost, store it.

With `--workers N` groups of 2, 4, ... N processes are timed too; what is not measured is derived, and said.
"""

import argparse
import dataclasses
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hardy.balance.fit import Fit, Measurement, fit_cost, with_degrees
from hardy.cli.balance import model_sizes, powers
from hardy.cli.environment import who_works
from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.workers import run_workers
from hardy.clock import WallClock
from hardy.config import UserError
from hardy.distributed.balance.attention import context_parallel_attention
from hardy.distributed.balance.profile import SHORTEST, rows_to_measure
from hardy.distributed.balance.profile import measure as time_micro_batches
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.comm import Alone, Communicator, join_world, leave_world
from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.model.init import initialise
from hardy.model.presets import PRESETS
from hardy.train.device import choose_hardware, denormals_flushed
from hardy.train.plan import World

REPEATS = 5
COMMUNICATION = 0.05
"""Share by which context parallelism is taken to cost more where it is not measured."""


def profile_action(arguments: argparse.Namespace) -> int:
    """Run `hardy balance profile`."""
    from hardy.balance.cost import shape_hash

    name = arguments.cost
    if name not in PRESETS:
        raise UserError(f"profile measures a model: --cost must be one of {', '.join(PRESETS)}, got {name!r}")
    longest = arguments.context or min(PRESETS[name].context_tokens, arguments.cap_tokens)
    if longest < 8 * SHORTEST:
        raise UserError(f"--context {longest} is too short to see attention; give at least {8 * SHORTEST}")
    me, num_workers = who_works(arguments.workers, os.environ)
    if num_workers & (num_workers - 1):
        raise UserError(f"groups have 2, 4, 8, ... workers; give such a --workers, got {num_workers}")
    if arguments.out is not None and not os.access(arguments.out.parent, os.W_OK):  # before it takes minutes
        raise UserError(f"--out {arguments.out} cannot be written: {arguments.out.parent} takes no files")
    if num_workers > me.size:
        return run_workers(num_workers, _words(arguments))
    device = choose_hardware("auto", "fp32", local_rank=me.local_rank).device
    with _joined(me, device) as comm:
        measured = measure(name, comm, longest=longest, device=device)
    if me.rank:
        return SUCCESS
    facts = (
        ("source", f"profile of {name}"),
        ("model_hash", shape_hash(model_sizes(name))),
        ("device", torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()),
        ("torch", torch.__version__),
        ("dtype", "fp32"),
        ("recompute", "False"),
    )
    cost, fits = fit_cost(measured, cap_tokens=arguments.cap_tokens, facts=facts)
    num_measured = len(cost.schemes)
    cost = with_degrees(cost, powers(arguments.ranks), communication=COMMUNICATION)
    if arguments.out is not None:
        try:
            cost.save(arguments.out)
        except OSError as error:
            raise UserError(f"--out {arguments.out} cannot be written: {error.strerror}") from None
    files = [] if arguments.out is None else [arguments.out]
    if arguments.json:
        told = [dataclasses.asdict(fit) for fit in fits]
        print_json({"fits": told, "cost": cost.plain(), "measured": _plain(measured), "files": files})
    else:
        print("\n".join(_lines(fits, dict(facts), len(cost.schemes) - num_measured)))
        print("".join(f"wrote {path}\n" for path in files), end="")
    return SUCCESS


def measure(name: str, comm: Communicator, *, longest: int, device: torch.device) -> list[Measurement]:
    """Return the time of forward and backward of every micro-batch, in ms, alone and by groups of `comm`."""
    shape = PRESETS[name]
    config = ModelConfig(name=name, context_tokens=longest, vocab_size=shape.vocab_size)
    model = build_model(
        config, vocab_size=shape.vocab_size, device=device, attention=context_parallel_attention
    )
    initialise(model, seed=0)
    sharer = Sharer(num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads)
    rows, found = rows_to_measure(longest), list[Measurement]()
    with denormals_flushed():
        for degree in powers(comm.size):
            found += time_micro_batches(
                model, comm, rows, sharer=sharer, degree=degree, repeats=REPEATS, device=device
            )
    return found


def _words(arguments: argparse.Namespace) -> list[str]:
    """Return what a worker is started with."""
    words = ["balance", "profile", "--cost", arguments.cost, "--ranks", str(arguments.ranks)]
    words += ["--cap-tokens", str(arguments.cap_tokens)]
    words += [] if arguments.context is None else ["--context", str(arguments.context)]
    words += [] if arguments.out is None else ["--out", str(arguments.out)]
    return [*words, *(["--json"] if arguments.json else [])]


@contextmanager
def _joined(me: World, device: torch.device) -> Iterator[Communicator]:
    """Meet the other workers while entered."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if me.size == 1:
        yield Alone(clock=WallClock())
        return
    yield join_world(
        rank=me.rank,
        size=me.size,
        init_method=me.address or "env://",
        device_type="cuda" if device.type == "cuda" else "cpu",
    )
    leave_world()


def _plain(measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    return [
        {
            "workers": m.scheme.context,
            "sequences": len(m.lengths),
            "length": m.lengths[0],
            "ms": m.time,
        }
        for m in measured
    ]


def _lines(fits: Sequence[Fit], facts: dict[str, str], num_derived: int) -> Iterator[str]:
    where = f"{facts['device']}, torch {facts['torch']}, {facts['dtype']}"
    yield f"{facts['source']} on {where}, forward and backward"
    for fit in fits:
        by = "one worker" if fit.scheme.context == 1 else f"a group of {fit.scheme.context}"
        yield f"{by}: {fit.c:.3g} ms a micro-batch + sum of ({fit.b:.3g} ms x s + {fit.a:.3g} ms x s^2)"
        yield (
            f"  fit of {fit.measurements} micro-batches: error {fit.error:.1%} (held out "
            f"{fit.held_out_error:.1%}), worst {fit.worst:.1%}"
        )
    if num_derived:
        yield (
            f"larger groups are not measured (--workers): divided, and {COMMUNICATION:.0%} added for "
            f"communication"
        )
