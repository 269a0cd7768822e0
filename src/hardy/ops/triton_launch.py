"""How the host hands tasks to Triton kernels: groups of like tasks, tables of addresses, plans.

A call of a sweep describes each task by (group, row): the group holds what tasks of one launch share (shapes,
dtypes, alignment), the row the numbers that differ (addresses, counters). A plan is the launches for all
groups, and their table in device memory. Making one costs the host some ten microseconds a task, and a small
kernel for each 128 numbers of its table; running it costs little. So who sweeps the same memory again and
again keeps the plan (`prepared`); where memory lies elsewhere than before, such as a gradient that was
allocated anew, the addresses in its table are moved. Nothing is read from the device.

Tables are written by a kernel that takes the numbers as arguments, not by a copy from host memory. So nothing
on the host has to stay alive or unchanged, and a CUDA graph can be captured with a plan that was not there
before: whatever a step allocates while it is captured lies at addresses of the graph's own, so the plans of
the warm-up never fit. A plan made during capture must not be kept, since its table is written only when the
graph runs; nor may one be run on another stream than wrote its table.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hardy.ops.triton_kernels import LIFTED, TYPES, as_arguments, move_addresses, write_table

BLOCKS: dict[str, dict[str, int]] = {
    "elementwise": {"groups": 256, "warps": 4, "stages": 1},
    "vector": {"groups": 128, "strip": 32, "warps": 4, "stages": 2, "programs": 256, "floats": 1 << 18},
    "matrix16": {"channels": 128, "contracted": 64, "ranks": 256, "warps": 8, "stages": 4},
    "matrix16by32": {"channels": 128, "contracted": 64, "ranks": 256, "warps": 8, "stages": 3},
    "matrix32": {"channels": 128, "contracted": 32, "ranks": 128, "warps": 8, "stages": 3},
    "moments": {"groups": 128, "strip": 32, "warps": 4, "stages": 1},
    "sweep": {
        "groups": 32,
        "strip": 32,
        "warps": 1,
        "stages": 1,
        "registers": 128,
        "programs": 4096,
        "band": 128,
    },
    "signs": {"groups": 1024, "warps": 4, "stages": 1},
    "fold": {"entries": 128, "parts": 16, "warps": 4, "stages": 1},
    "fill": {"groups": 128, "warps": 4, "stages": 1},
}
"""Sizes to tune, in one place. groups: groups of eight in a tile; strip: most of them side by side; programs:
a task is cut until it has as many, so one task alone fills the device; floats: of the workspace, the most for
it; band: least matrix rows of a program; registers: most for a thread; matrix16by32: where a projection in
fp32 leaves room for fewer stages. Sums depend on these sizes by rounding, so none may depend on what else is
in a call."""

WORKSPACE_FLOATS = 15 << 20
"""60 MiB: what partial sums may take; more tasks, or larger ones, go in several launches."""
MOST_TASKS = 65535
"""CUDA's limit on the second dimension of a grid."""
LEAST_ADDRESS = 1 << 40
"""Addresses are above it: of CUDA and of today's hosts. What else is in a table is below."""
FEW_MOVED, MOST_MOVED = 8, 62
"""Tensors whose addresses one kernel moves; the kernel comes in two sizes."""
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
    memory: Sequence[Tensor] = ()
    """Not kept: what `move` may be told of. Contiguous tensors, apart from each other."""
    tables: list[Tensor] = field(init=False)
    _addresses: tuple[int, ...] = ()
    """Of the tensors of `memory`, now."""
    _first: tuple[int, ...] = ()
    """The same, when the table was made."""
    _places: Tensor | None = None
    """[3 count], on the device: of all addresses in the table, see `move_addresses`."""
    _num_places: int = 0

    def __post_init__(self) -> None:
        numbers = [number for launch in self.launches for row in launch.rows for number in row]
        table = table_of(numbers, self.device)
        self.tables = []
        first = 0
        for launch in self.launches:
            self.tables.append(table[first:])
            first += sum(len(row) for row in launch.rows)
        self._first = self._addresses = tuple([tensor.data_ptr() for tensor in self.memory])
        if self.memory:
            at, owners = owners_of(numbers, self.memory)
            self._num_places = len(at)
            self._places = table_of([*at, *owners, *[numbers[index] for index in at]], self.device)
        self.memory = ()

    def move(self, addresses: Sequence[int]) -> bool:
        """Take in where the tensors of `memory` lie now, in their order.

        Returns False, and does nothing, where one is aligned otherwise than it was: then other kernels are
        wanted.
        """
        addresses = tuple(addresses)
        if addresses == self._addresses:
            return True
        both = enumerate(zip(addresses, self._addresses, strict=True))
        moved = [(index, now - self._first[index]) for index, (now, was) in both if now != was]
        if self._places is None or any([way % 16 for _, way in moved]):
            return False
        with on(self.device):
            for begin in range(0, len(moved), MOST_MOVED):
                self._move(moved[begin : begin + MOST_MOVED])
        self._addresses = addresses
        return True

    def _move(self, moved: Sequence[tuple[int, int]]) -> None:
        """Write the addresses of some tensors anew, by (number, bytes from where it first was)."""
        if not self._num_places:
            return
        pairs = FEW_MOVED if len(moved) <= FEW_MOVED else MOST_MOVED
        numbers = [self._num_places]
        for index, way in moved:
            numbers += [index, way + LIFTED.value]
        numbers += [len(self._first), 0] * (pairs - len(moved))  # no such tensor
        programs = -(-self._num_places // TABLE_PIECE)
        move_addresses[(programs,)](self.tables[0], self._places, as_arguments(numbers), pairs, TABLE_PIECE)

    def run(self) -> None:
        """Enqueue all launches; they share one workspace, which is free again when they are done."""
        floats = max((launch.floats for launch in self.launches), default=0)
        workspace = torch.empty(max(1, floats), dtype=torch.float32, device=self.device)
        with on(self.device):
            for launch, table in zip(self.launches, self.tables, strict=True):
                launch.run(table, workspace)


def owners_of(numbers: Sequence[int], memory: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Return where addresses stand in a table, and in which tensor each lies.

    What is too large for a size, a stride or a word of a key is an address.

    Example:
        >>> values = torch.zeros(4)
        >>> owners_of([7, values.data_ptr() + 4], [torch.zeros(2), values])
        ([1], [1])
    """
    spans = sorted([(x.data_ptr(), x.nbytes, index) for index, x in enumerate(memory) if x.nbytes])
    begins = [begin for begin, _, _ in spans]
    at: list[int] = []
    owners: list[int] = []
    for index, number in enumerate(numbers):
        if number < LEAST_ADDRESS:
            continue
        begin, size, owner = spans[bisect_right(begins, number) - 1]
        assert begin <= number < begin + size, "a task names memory that the sweep was not told of"
        at.append(index)
        owners.append(owner)
    return at, owners


def prepared(
    kind: Kind, tasks: Sequence[Any], device: torch.device, *, memory: Sequence[Tensor] = ()
) -> Plan:
    """Return the plan for tasks on one device: groups in the order of their first tasks.

    Args:
        kind: the sweep.
        tasks: what is to be done.
        device: where all tensors are.
        memory: what all tensors of the tasks lie in, if the plan is to be moved.
    """
    groups: dict[Hashable, list[Row]] = {}
    for task in tasks:
        group, row = kind.describe(task)
        groups.setdefault(group, []).append(row)
    launches = [launch for group, rows in groups.items() for launch in kind.launches(group, rows)]
    with on(device):
        return Plan(launches, device, memory)


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


def stream_of(device: torch.device) -> int | None:
    """Return the current stream's handle; None while a CUDA graph is captured."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


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
