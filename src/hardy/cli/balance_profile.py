"""`hardy balance profile`: time micro-batches of a model on this machine, fit its cost, store it."""

import argparse
import dataclasses
import platform
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from hardy.balance.fit import Fit, Measurement, fit_cost, with_degrees
from hardy.balance.plan import Scheme
from hardy.cli.balance import model_sizes, powers
from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.clock import Clock, WallClock
from hardy.config import UserError
from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.model.init import initialise
from hardy.model.presets import PRESETS
from hardy.ops.packed import DocumentLayout

SHORTEST = 64
LENGTHS = 6
"""Lengths from the shortest to the longest, in equal ratios; each alone, and the row filled with each."""
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


def rows_to_measure(longest: int, *, shortest: int = SHORTEST) -> list[tuple[int, ...]]:
    """Return micro-batches: each length alone, and as many of each as the longest has tokens.

    Example:
        >>> [(len(row), row[0]) for row in rows_to_measure(512)][:4]
        [(1, 64), (8, 64), (1, 97), (5, 97)]
    """
    ratio = (longest / shortest) ** (1 / (LENGTHS - 1))
    lengths = sorted({round(shortest * ratio**k) for k in range(LENGTHS)})
    rows: dict[tuple[int, ...], None] = {}
    for length in lengths:
        rows.setdefault((length,))
        rows.setdefault((length,) * (longest // length))
    return list(rows)


def measure(name: str, *, longest: int, device: torch.device, clock: Clock) -> list[Measurement]:
    """Return the time of forward and backward of every micro-batch, in ms: medians over rounds."""
    config = ModelConfig(name=name, context_tokens=longest, vocab_size=PRESETS[name].vocab_size)
    model = build_model(config, vocab_size=PRESETS[name].vocab_size, device=device)
    initialise(model, seed=0)
    rows = rows_to_measure(longest)
    times: dict[tuple[int, ...], list[float]] = {row: [] for row in rows}
    for round_index in range(REPEATS + 1):
        for row in rows:
            took = _step_ms(model, row, device, clock)
            if round_index:  # the first is a warm-up
                times[row].append(took)
    scheme = Scheme()
    return [Measurement(scheme=scheme, lengths=row, time=statistics.median(times[row])) for row in rows]


def _step_ms(model: torch.nn.Module, row: tuple[int, ...], device: torch.device, clock: Clock) -> float:
    layout = DocumentLayout.from_lengths(row, device=device)
    tokens_T = torch.arange(layout.num_tokens, device=device) % 256
    _wait(device)
    began = clock.now()
    model(tokens_T, layout, tokens_T).backward()
    _wait(device)
    took = clock.now() - began
    for parameter in model.parameters():
        parameter.grad = None
    return took * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
