"""The rows of one worker of a group, as a layout that a model takes in place of that of the whole pack.

Such a layout says all that attention needs to know, so a block that is run again in the backward pass shares
its work out as it did the first time. All of it follows from lengths: workers agree without a message.

Shape suffixes: T rows of this worker, P tokens of the pack, N rows of keys that its queries look at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hardy.distributed.balance.sharding import Integers, begins_of, shard_documents, shared_runs
from hardy.distributed.comm import Communicator
from hardy.ops.packed import IGNORED_LABEL, Borders, DocumentLayout, PackedBatch, runs

PADDING_TOKEN = 0


@dataclass(kw_only=True)
class ShardedLayout(DocumentLayout):
    """Rows of one worker; what the base calls a document is here a piece of one."""

    group: Communicator
    """The workers that share the pack."""
    token_of_T: Tensor
    """Place in the pack of each row's token, int64; P of filling, which is a document of its own."""
    num_filling: int
    """Rows that are filling."""


@dataclass(kw_only=True)
class GatherLayout(ShardedLayout):
    """Rows whose queries look at keys and values gathered from the group."""

    keys: Borders
    """Borders of the keys that each piece looks at; the pieces stand at their ends."""
    shared_rows: int
    """How many of the first rows the whole group sees; equal on all its workers."""
    key_row_N: Tensor
    """Where those keys lie: among all workers' shared rows end to end, then this worker's other rows."""
    num_front_keys: int
    """No row occurs twice among so many first of `key_row_N`, nor among those behind them."""

    def to(self, device: torch.device | str) -> "GatherLayout":
        """Return the layout with its tensors on `device`."""
        plain = super().to(device)
        return GatherLayout(
            lengths=self.lengths,
            cumulative_S=plain.cumulative_S,
            positions_T=plain.positions_T,
            group=self.group,
            token_of_T=self.token_of_T.to(device, non_blocking=True),
            num_filling=self.num_filling,
            keys=self.keys.to(device),
            shared_rows=self.shared_rows,
            key_row_N=self.key_row_N.to(device, non_blocking=True),
            num_front_keys=self.num_front_keys,
        )


@dataclass(kw_only=True)
class UlyssesLayout(ShardedLayout):
    """A run of the pack; for attention, workers exchange runs of all heads for some heads of all runs."""

    whole: Borders
    """Borders of the documents of all runs; the filling comes last."""

    def to(self, device: torch.device | str) -> "UlyssesLayout":
        """Return the layout with its tensors on `device`."""
        plain = super().to(device)
        return UlyssesLayout(
            lengths=self.lengths,
            cumulative_S=plain.cumulative_S,
            positions_T=plain.positions_T,
            group=self.group,
            token_of_T=self.token_of_T.to(device, non_blocking=True),
            num_filling=self.num_filling,
            whole=self.whole.to(device),
        )


def gather_layout(lengths: tuple[int, ...], group: Communicator, *, split_tokens: int) -> GatherLayout:
    """Return this worker's rows of a pack whose long documents are cut from both ends.

    The rows are the fronts of cut documents, their backs, filling up to the fullest worker's, and whole
    documents. A worker without any gets one row of filling, as no collective may miss a worker.

    Args:
        lengths: tokens of each document of the pack.
        group: the workers that share it.
        split_tokens: least tokens of a piece of a document; shorter documents stay whole.

    Example:
        >>> from hardy.distributed.comm import Alone
        >>> gather_layout((2, 3), Alone(), split_tokens=0).token_of_T.tolist()
        [0, 1, 2, 3, 4]
    """
    sharding = shard_documents(lengths, num_workers=group.size, split_tokens=split_tokens)
    pieces, whole = sharding.pieces[group.rank], sharding.whole[group.rank]
    shared, begins, size = sharding.shared_rows, begins_of(lengths), np.asarray(lengths, dtype=np.int64)
    filling = shared - pieces.num_tokens if shared or whole.size else 1
    filled = [filling] if filling else []
    begin, sizes = begins[pieces.documents], pieces.stops - pieces.starts
    rows = np.concatenate((sizes, filled, size[whole])).astype(np.int64)
    token_of_T = _runs((begin + pieces.starts, [0] * len(filled), begins[whole]), rows)
    token_of_T[pieces.num_tokens : pieces.num_tokens + filling] = int(begins[-1])
    # A piece looks at all tokens of its document up to its end, which lie in runs on all the workers.
    looked_at, run_sizes = shared_runs(sharding).up_to(begin, begin + pieces.stops)
    own_first = [group.rank * shared + pieces.num_tokens, group.size * shared]  # filling; whole documents
    own_sizes = [shared - pieces.num_tokens, size[whole].sum() + (0 if shared else filling)]
    keys = np.concatenate((pieces.stops, filled, size[whole])).astype(np.int64)
    borders = Borders.of(rows.tolist())
    return GatherLayout(
        lengths=borders.lengths,
        cumulative_S=borders.cumulative_S,
        positions_T=_runs((pieces.starts, [0] * (len(filled) + whole.size)), rows),
        group=group,
        token_of_T=token_of_T,
        num_filling=filling,
        keys=Borders.of(keys.tolist()),
        shared_rows=shared,
        key_row_N=_runs((looked_at, own_first), np.concatenate((run_sizes, own_sizes))),
        num_front_keys=int(pieces.stops[: pieces.num_fronts].sum()),
    )


def ulysses_layout(lengths: tuple[int, ...], group: Communicator) -> UlyssesLayout:
    """Return this worker's run of a pack that is cut into equal runs, the last of them filled up.

    Args:
        lengths: tokens of each document of the pack.
        group: the workers that share it.

    Example:
        >>> from hardy.distributed.comm import Alone
        >>> ulysses_layout((2, 3), Alone()).positions_T.tolist()
        [0, 1, 0, 1, 2]
    """
    num_tokens = sum(lengths)
    run = -(-num_tokens // group.size)
    filling = run * group.size - num_tokens
    whole = Borders.of([*lengths, *([filling] if filling else [])])
    begin, end = group.rank * run, (group.rank + 1) * run
    borders = whole.cumulative_S.numpy().astype(np.int64)
    cuts = np.unique(np.clip(borders, begin, end))
    sizes, document = np.diff(cuts), np.searchsorted(borders, cuts[:-1], side="right") - 1
    rows = Borders.of(sizes.tolist())
    return UlyssesLayout(
        lengths=rows.lengths,
        cumulative_S=rows.cumulative_S,
        positions_T=_runs((cuts[:-1] - borders[document],), sizes),
        group=group,
        token_of_T=torch.arange(begin, end).clamp_(max=num_tokens),
        num_filling=min(max(end - num_tokens, 0), run),
        whole=whole,
    )


def shard_batch(batch: PackedBatch, layout: ShardedLayout) -> PackedBatch:
    """Return the rows of a whole pack that `layout` gives this worker; filling has no label.

    Labels belong to tokens, so they stay right wherever a document is cut. All on the host, before the
    batch goes to its device: no step waits for how many of them count.
    """
    tokens_P = torch.cat((batch.tokens_T, batch.tokens_T.new_full((1,), PADDING_TOKEN)))
    labels_P = torch.cat((batch.labels_T, batch.labels_T.new_full((1,), IGNORED_LABEL)))
    labels_T = labels_P[layout.token_of_T]
    return PackedBatch(
        tokens_T=tokens_P[layout.token_of_T],
        labels_T=labels_T,
        layout=layout,
        num_targets=int((labels_T != IGNORED_LABEL).sum()),
    )


def row_counts(batch: PackedBatch) -> tuple[int, int, int]:
    """Return this worker's rows, how many of them are tokens of documents, and rows that its group shares."""
    layout, rows = batch.layout, batch.layout.num_tokens
    if not isinstance(layout, ShardedLayout):
        return rows, rows if batch.num_targets else 0, 0
    tokens = rows - layout.num_filling
    if isinstance(layout, GatherLayout):
        return rows, tokens, max(layout.shared_rows - layout.num_filling, 0)
    return rows, tokens, tokens


def idle_batch() -> PackedBatch:
    """Return one token without a label: a forward and backward pass through all weights that adds nothing."""
    return PackedBatch(
        tokens_T=torch.full((1,), PADDING_TOKEN),
        labels_T=torch.full((1,), IGNORED_LABEL),
        layout=DocumentLayout.from_lengths([1]),
        num_targets=0,
    )


def _runs(starts: Sequence[Integers | list[int]], sizes: Integers) -> Tensor:
    """Return the numbers from each start, so many as its size, end to end; starts come in several parts."""
    first = np.concatenate(starts).astype(np.int64)
    return runs(torch.from_numpy(first), torch.from_numpy(sizes.astype(np.int64, copy=False)))
