"""How the host hands tasks to Triton kernels: groups of like tasks, tables of addresses, plans that are kept.

A call of a sweep describes each task by (group, row): the group holds what tasks of one launch share (shapes,
dtypes, alignment), the row the numbers that differ (addresses, counters). The descriptions of all tasks
together are the key of a plan: its launches, and their table in device memory. A gradient that was allocated
anew has a new address, so the key differs and a new plan is made; nothing else can go unnoticed, and nothing
is read from the device. Describing costs the host a few microseconds a task, a new plan some more and one
small kernel for each 128 numbers of its table.

Tables are written by a kernel that takes the numbers as arguments, not by a copy from host memory. So nothing
on the host has to stay alive or unchanged, and a CUDA graph can be captured with a plan that was not there
before: whatever a step allocates while it is captured lies at addresses of the graph's own, so the plans of
the warm-up never fit. A plan made during capture is not kept, since its table is written only when the graph
runs.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hardy.ops.triton_kernels import TYPES, as_arguments, write_table

BLOCKS: dict[str, dict[str, int]] = {
    "elementwise": {"groups": 256, "warps": 4, "stages": 1},
    "vector": {"groups": 256, "strip": 32, "warps": 8, "stages": 2, "programs": 256, "floats": 1 << 18},
    "matrix16": {"channels": 128, "contracted": 64, "ranks": 256, "warps": 8, "stages": 3},
    "matrix32": {"channels": 128, "contracted": 32, "ranks": 128, "warps": 8, "stages": 3},
    "moments": {"groups": 128, "strip": 32, "warps": 4, "stages": 1},
    "sweep": {
        "groups": 128,
        "strip": 32,
        "warps": 4,
        "stages": 1,
        "registers": 128,
        "programs": 512,
        "band": 64,
    },
    "fold": {"entries": 128, "parts": 16, "warps": 4, "stages": 1},
    "fill": {"groups": 128, "warps": 4, "stages": 1},
}
"""Sizes to tune, in one place. groups: groups of eight in a tile; strip: most of them side by side; programs:
a task is cut until it has as many, so one task alone fills the device; floats: of the workspace, the most for
it; band: least matrix rows of a program; registers: most for a thread. Sums depend on these sizes by
rounding, so none may depend on what else is in a call."""

WORKSPACE_FLOATS = 15 << 20
"""60 MiB: what partial sums may take; more tasks, or larger ones, go in several launches."""
MOST_TASKS = 65535
"""CUDA's limit on the second dimension of a grid."""
TABLE_PIECE = 128
"""Numbers that one kernel writes into a table."""

Row = tuple[int, ...]
Entry = tuple[Hashable, Row]
"""Group and table row of a task."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel over the tasks of a group."""

    kernel: Any
    config: Any
    """Compile-time constant `C`; a frozen dataclass."""
    programs: int
    """Along the first dimension of the grid, for each task."""
    rows: Sequence[Row]
    block: str
    """Entry of BLOCKS that holds warps and stages."""
    floats: int = 0
    """Of workspace, for all tasks."""

    def run(self, table: Tensor, workspace: Tensor) -> None:
        """Enqueue it on the current stream; `table` begins with this launch's rows."""
        block = BLOCKS[self.block]
        options = {"num_warps": block["warps"], "num_stages": block["stages"]}
        if "registers" in block:
            options["maxnreg"] = block["registers"]
        self.kernel[(self.programs, len(self.rows))](table, workspace, self.config, **options)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One sweep: how its tasks are described, and what is launched for a group of them."""

    name: str
    describe: Callable[[Any], Entry]
    launches: Callable[[Any, list[Row]], Iterable[Launch]]
    """From a group and its rows."""


@dataclass(slots=True)
class Plan:
    """The launches of a call, with their table on the device."""

    launches: list[Launch]
    device: torch.device
    tables: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        numbers = [number for launch in self.launches for row in launch.rows for number in row]
        table = table_of(numbers, self.device)
        self.tables = []
        first = 0
        for launch in self.launches:
            self.tables.append(table[first:])
            first += sum(len(row) for row in launch.rows)

    def run(self) -> None:
        """Enqueue all launches; they share one workspace, which is free again when they are done."""
        floats = max((launch.floats for launch in self.launches), default=0)
        workspace = torch.empty(max(1, floats), dtype=torch.float32, device=self.device)
        for launch, table in zip(self.launches, self.tables, strict=True):
            launch.run(table, workspace)


def run(kind: Kind, tasks: Sequence[Any], device: torch.device) -> None:
    """Do a sweep for tasks on one device: make its plan, or find it, and launch."""
    entries = tuple([kind.describe(task) for task in tasks])
    if not entries:
        return
    with on(device):
        if capturing(device):
            plan = make_plan(kind, entries, device)
        else:
            plan = kept_plan(kind.name, kind, entries, device, stream_of(device))
        plan.run()


def make_plan(kind: Kind, entries: Sequence[Entry], device: torch.device) -> Plan:
    """Return the plan for described tasks: groups in the order of their first tasks."""
    groups: dict[Hashable, list[Row]] = {}
    for group, row in entries:
        groups.setdefault(group, []).append(row)
    return Plan([launch for group, rows in groups.items() for launch in kind.launches(group, rows)], device)


@lru_cache(maxsize=32)
def kept_plan(name: str, kind: Kind, entries: tuple[Entry, ...], device: torch.device, stream: int) -> Plan:
    """Return the plan for described tasks, kept: the table is written once.

    One for each stream, since only work on the stream that wrote a table comes after it by itself.
    """
    return make_plan(kind, entries, device)


def table_of(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers from 0 to 2**60 as an int64 tensor, without a copy from the host."""
    padded = [*numbers, *[0] * (-len(numbers) % TABLE_PIECE)]
    table = torch.empty(len(padded), dtype=torch.int64, device=device)
    for first in range(0, len(padded), TABLE_PIECE):
        piece = padded[first : first + TABLE_PIECE]
        write_table[(1,)](table[first:], as_arguments(piece), TABLE_PIECE)
    return table


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` current, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """Return the current stream's handle."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def type_of(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype.

    Raises:
        ValueError: the kernels do not read this dtype.
    """
    if dtype not in TYPES:
        known = ", ".join(str(known) for known in TYPES)
        raise ValueError(f"backend='triton' takes tensors of {known}, got {dtype}; use backend='foreach'")
    return TYPES[dtype]


def batches(rows: list[Row], floats_each: int) -> Iterator[list[Row]]:
    """Yield rows in parts whose workspace fits the budget; at least one row each.

    Example:
        >>> [len(part) for part in batches([(0,)] * 5, WORKSPACE_FLOATS // 2)]
        [2, 2, 1]
    """
    most = min(MOST_TASKS, max(1, WORKSPACE_FLOATS // max(1, floats_each)))
    for first in range(0, len(rows), most):
        yield rows[first : first + most]


def power_of_two(number: int) -> int:
    """Return the least power of two not below `number`.

    Example:
        >>> [power_of_two(n) for n in (0, 1, 5, 8)]
        [1, 1, 8, 8]
    """
    return 1 << max(0, number - 1).bit_length()


def tile_shape(shape: tuple[int, int], *, groups: int, strip: int) -> tuple[int, int]:
    """Return (rows, groups) of a tile of at most `groups` groups of eight, at most `strip` of them side by
    side.

    Example:
        >>> tile_shape((4096, 4096), groups=256, strip=256), tile_shape((4096, 40), groups=256, strip=32)
        ((1, 256), (32, 8))
    """
    across = min(groups, strip, power_of_two(-(-shape[1] // 8)))
    return min(groups // across, power_of_two(shape[0])), across


def aligned(tensors: Iterable[Tensor | None], *, rows: int) -> bool:
    """Whether all rows of 2-D tensors begin at multiples of 16 bytes."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.data_ptr() % 16 or (rows > 1 and tensor.stride(0) * tensor.element_size() % 16):
            return False
    return True


def pointer(tensor: Tensor | None) -> int:
    """Return a tensor's address, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
