"""`hardy balance profile`: time micro-batches of a model on this machine, fit its cost, store it."""

import argparse
import dataclasses
import platform
from collections.abc import Iterator
from typing import Any

import torch

from hardy.balance.fit import Fit, Measurement, fit_cost, with_degrees
from hardy.cli.balance import model_sizes, powers
from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.clock import Clock, WallClock
from hardy.config import UserError
from hardy.distributed.balance.profile import SHORTEST, rows_to_measure
from hardy.distributed.balance.profile import measure as time_micro_batches
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.comm import Alone
from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.model.init import initialise
from hardy.model.presets import PRESETS

REPEATS = 5
COMMUNICATION = 0.05
"""Share by which context parallelism is taken to cost more; it is not measured by one process."""


def profile_action(arguments: argparse.Namespace) -> int:
    """Run `hardy balance profile`."""
    from hardy.balance.cost import shape_hash

    name = arguments.cost
    if name not in PRESETS:
        raise UserError(f"profile measures a model: --cost must be one of {', '.join(PRESETS)}, got {name!r}")
    longest = arguments.context or min(PRESETS[name].context_tokens, arguments.cap_tokens)
    if longest < 8 * SHORTEST:
        raise UserError(f"--context {longest} is too short to see attention; give at least {8 * SHORTEST}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = measure(name, longest=longest, device=device, clock=WallClock())
    facts = (
        ("source", f"profile of {name}"),
        ("model_hash", shape_hash(model_sizes(name))),
        ("device", torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()),
        ("torch", torch.__version__),
        ("dtype", "fp32"),
        ("recompute", "False"),
    )
    cost, fits = fit_cost(measured, cap_tokens=arguments.cap_tokens, facts=facts)
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
        print("\n".join(_lines(fits[0], dict(facts), len(cost.schemes))))
        print("".join(f"wrote {path}\n" for path in files), end="")
    return SUCCESS


def measure(name: str, *, longest: int, device: torch.device, clock: Clock) -> list[Measurement]:
    """Return the time of forward and backward of every micro-batch, in ms: medians over rounds."""
    config = ModelConfig(name=name, context_tokens=longest, vocab_size=PRESETS[name].vocab_size)
    model = build_model(config, vocab_size=PRESETS[name].vocab_size, device=device)
    initialise(model, seed=0)
    shape = PRESETS[name]
    sharer = Sharer(num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads)
    rows, alone = rows_to_measure(longest), Alone(clock=clock)
    return time_micro_batches(model, alone, rows, sharer=sharer, repeats=REPEATS, device=device)


def _plain(measured: list[Measurement]) -> list[dict[str, Any]]:
    return [{"sequences": len(m.lengths), "length": m.lengths[0], "ms": m.time} for m in measured]


def _lines(fit: Fit, facts: dict[str, str], schemes: int) -> Iterator[str]:
    where = f"{facts['device']}, torch {facts['torch']}, {facts['dtype']}"
    yield f"{facts['source']} on {where}, forward and backward"
    yield f"time of a micro-batch = {fit.c:.3g} ms + sum of ({fit.b:.3g} ms x s + {fit.a:.3g} ms x s^2)"
    yield (
        f"fit of {fit.measurements} micro-batches: error {fit.error:.1%} (held out "
        f"{fit.held_out_error:.1%}), worst {fit.worst:.1%}"
    )
    if schemes > 1:
        yield f"degrees above 1 are not measured: divided, and {COMMUNICATION:.0%} added for communication"
