"""How long micro-batches take on this machine, alone and shared by groups: what costs are fitted to.

Paper: Hydraulis (arXiv 2412.07894), whose planner predicts by a profile of the model.
"""

import statistics
from collections.abc import Sequence

import torch
from torch import nn

from hardy.balance.fit import Measurement
from hardy.balance.plan import Scheme
from hardy.clock import Clock
from hardy.distributed.balance.layouts import shard_batch
from hardy.distributed.balance.pool import GroupPool
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.comm import Communicator
from hardy.ops.packed import DocumentLayout, PackedBatch

SHORTEST = 64
LENGTHS = 6
"""Lengths from the shortest to the longest, in equal ratios; each alone, and the row filled with each."""


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


def measure(
    model: nn.Module,
    comm: Communicator,
    rows: Sequence[tuple[int, ...]],
    *,
    sharer: Sharer,
    degree: int = 1,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> list[Measurement]:
    """Return the time of forward and backward pass of each micro-batch, in ms; all workers call it together.

    Groups of `degree` workers compute the same at the same time, as in training. The slowest worker counts,
    and of the repeats, all rows in turn, the median.

    Args:
        model: called as `model(tokens_T, layout, labels_T)`; its gradients are cleared.
        comm: all workers; `degree` divides their number.
        rows: lengths of the documents of each micro-batch.
        sharer: how a group shares them.
        degree: workers of a group.
        repeats: after one round that does not count.
        device: where the model lives.
        clock: what times are taken from; none takes that of `comm`.
    """
    clock = clock or comm.clock
    pool = GroupPool(comm)
    groups = [range(first, first + degree) for first in range(0, comm.size, degree)]
    pool.prepare(groups)
    group = pool.group(groups[comm.rank // degree])
    times: dict[tuple[int, ...], list[float]] = {row: [] for row in rows}
    for repeat in range(repeats + 1):
        for row in times:
            comm.barrier()
            took_ms = _step_ms(model, row, group, sharer, device=device, clock=clock)
            if repeat:
                times[row].append(took_ms)
    # Each round's slowest worker, as it is waited for.
    slowest = comm.all_gather(torch.tensor(list(times.values()), dtype=torch.float64)).amax(0).tolist()
    scheme = Scheme(context=degree)
    return [
        Measurement(scheme=scheme, lengths=row, time=statistics.median(found))
        for row, found in zip(times, slowest, strict=True)
    ]


def _step_ms(
    model: nn.Module,
    row: tuple[int, ...],
    group: Communicator,
    sharer: Sharer,
    *,
    device: torch.device | str,
    clock: Clock,
) -> float:
    """Return how long one micro-batch takes, its layout included."""
    layout = DocumentLayout.from_lengths(row)
    tokens_T = torch.arange(layout.num_tokens) % 256
    pack = PackedBatch(tokens_T=tokens_T, labels_T=tokens_T, layout=layout, num_targets=layout.num_tokens)
    _wait(device)
    began_s = clock.now()
    batch = pack if group.size == 1 else shard_batch(pack, sharer.layout(row, group))
    batch = batch.to(device)
    model(batch.tokens_T, batch.layout, batch.labels_T).backward()
    _wait(device)
    took_s = clock.now() - began_s
    model.zero_grad(set_to_none=True)
    return 1e3 * took_s


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
