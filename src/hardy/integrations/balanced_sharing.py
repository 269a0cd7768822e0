"""Groups of ranks that share long documents, in an unmodified model of transformers.

Paper: Hydraulis (arXiv 2412.07894); the exchange is `hardy.distributed.balance`. transformers asks a registry
for the function named in the model's config: `hardy_cp` is ours, and the layout of a rank's rows reaches it
as the keyword `hardy_layout`, in recomputed blocks too. Labels are shifted before a row is cut, never after.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hardy.balance.sampler import SharedBatch
from hardy.config import UserError
from hardy.data.collate import PackingCollator
from hardy.distributed.balance.agreement import check_same_plan
from hardy.distributed.balance.attention import context_parallel_attention
from hardy.distributed.balance.layouts import shard_batch
from hardy.distributed.balance.pool import GroupPool
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.comm import Communicator
from hardy.model.hf import attend
from hardy.ops.packed import DocumentLayout, PackedBatch

ATTENTION_NAME = "hardy_cp"

Whole = tuple[SharedBatch, PackedBatch]
"""A micro-batch before it is cut."""


class SharedRows:
    """Turns micro-batches into what this rank computes of them; all ranks make one together.

    Args:
        comm: all ranks.
        config: the model's.
        split_tokens: see `Sharer`.
    """

    def __init__(self, comm: Communicator, config: Any, *, split_tokens: int) -> None:
        heads = config.num_attention_heads
        self._sharer = Sharer(
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            split_tokens=split_tokens,
        )
        self._comm, self._pool = comm, GroupPool(comm)
        self._pool.warm_up()

    def of_step(self, batches: Iterator[Whole], count: int, *, device: Any) -> Iterator[dict[str, Any]]:
        """Return this rank's rows of a step of `count` micro-batches; all ranks call it together.

        Raises:
            PlanMismatchError: ranks have other plans; before any group is used.
        """
        taken = list(islice(batches, count))
        if taken:
            check_same_plan(self._comm, taken[0][0].plan_hash)
        return iter([self.row(self._shard(*whole).to(device)) for whole in taken])

    def row(self, batch: PackedBatch) -> dict[str, Any]:
        """Return a batch as the model takes it; labels stand at the token that predicts them."""
        return {
            "input_ids": batch.tokens_T[None],
            "position_ids": batch.layout.positions_T[None],
            "labels": batch.labels_T[None],
            "shift_labels": batch.labels_T[None],
            "hardy_layout": batch.layout,
        }

    def shard_over_all(self, pack: PackedBatch) -> PackedBatch:
        """Return this rank's rows of a pack that all ranks share, every document cut."""
        everyone = range(self._comm.size)
        self._pool.prepare([everyone])
        sharer = replace(self._sharer, scheme="gather", split_tokens=0)
        return shard_batch(pack, sharer.layout(pack.layout.lengths, self._pool.group(everyone)))

    def _shard(self, key: SharedBatch, pack: PackedBatch) -> PackedBatch:
        ranks = key.micro_batch.group.ranks
        if len(ranks) == 1 or not key.micro_batch.sequences:
            return pack
        return shard_batch(pack, self._sharer.layout(pack.layout.lengths, self._pool.group(ranks)))


class KeyedDocuments(Dataset[Whole]):
    """A data set of micro-batches: a key of the sampler gives its documents, packed.

    Args:
        dataset: the documents.
        collate: packs them.
    """

    def __init__(self, dataset: Any, collate: PackingCollator) -> None:
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._dataset)

    def __getitem__(self, key: SharedBatch) -> Whole:
        """Return a micro-batch with its key."""
        return key, self._collate.pack([self._dataset[index] for index in key.micro_batch.sequences])


def only_one(items: Sequence[Whole]) -> Whole:
    """Return the only item: a loader's batch is one micro-batch."""
    (item,) = items
    return item


def use_shared_attention(model: Any) -> None:
    """Give a model of transformers our attention, by its registry.

    Rows with a layout are shared; in those with `cu_seq_lens_q` documents are kept apart; others go through
    sdpa with their mask, as evaluation and generation need, and packed by position ids alone they are taken
    for one document.

    Raises:
        UserError: transformers is missing, or the model does not take attention from the registry.
    """
    _register()
    model.set_attn_implementation(ATTENTION_NAME)
    used = getattr(model.config, "_attn_implementation", None)  # no public name for it
    if used != ATTENTION_NAME:
        raise UserError(
            f"{type(model).__name__} keeps its own attention ({used}), which cannot be shared; set "
            f"balance.mode to dispatch"
        )


@cache
def _register() -> None:
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise UserError(
            f"balance.mode=dynamic_cp needs transformers ({error}); install it by pip install 'hardy[hf]'"
        ) from None
    AttentionInterface.register(ATTENTION_NAME, partial(_attend, AttentionInterface()["sdpa"]))
    AttentionMaskInterface.register(ATTENTION_NAME, partial(_mask, sdpa_mask))


def _attend(
    plain: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query_1HTK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    attention_mask: Tensor | None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend as the row says; see `use_shared_attention`."""
    qkv = (query_1HTK, key_1HTK, value_1HTK)
    borders = more.get("cu_seq_lens_q")
    if more.get("hardy_layout") is None and borders is not None:
        lengths = torch.diff(borders).tolist()
        more["hardy_layout"] = DocumentLayout.from_lengths(lengths, device=query_1HTK.device)
    if more.get("hardy_layout") is None:
        return plain(module, *qkv, attention_mask, **more)
    return attend(module, *qkv, attention_mask, attention=context_parallel_attention, **more)


def _mask(plain: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Return no mask where none was given: then the layout says who sees whom, or causality alone."""
    return None if settings.get("attention_mask") is None else plain(*arguments, **settings)
