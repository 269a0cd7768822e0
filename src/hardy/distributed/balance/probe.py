"""Does a document see another one? Asked of the real model, with its attention, before it is trained.

Wrong borders raise no error and still train; this finds them: one token of one document is changed, and what
the model says of every other document must stay; a document packed with others must give what it gives alone.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from hardy.config import UserError
from hardy.distributed.balance.layouts import ShardedLayout
from hardy.distributed.comm import Communicator
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch
from hardy.rng import generator_for

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""As a share of the largest logit; narrower dtypes get `COARSE`."""
COARSE = 5e-2


class LeakError(UserError):
    """Documents of one pack see each other, or not all of themselves."""


def check_isolation(
    model: nn.Module,
    comm: Communicator,
    *,
    vocab_size: int,
    shard: Callable[[PackedBatch], PackedBatch] = lambda pack: pack,
    lengths: tuple[int, ...] = (13, 40, 7),
    device: torch.device | str = "cpu",
) -> None:
    """Refuse a model in which a document sees another; a few forward passes, on all workers together.

    Args:
        model: called as `model(tokens_T, layout)`, returns the logits.
        comm: all workers; all fail if one does.
        vocab_size: ids are drawn below it.
        shard: returns this worker's rows of a pack, as in training; by default the whole pack.
        lengths: tokens of the documents of the pack that is tried.
        device: where the model lives.

    Raises:
        LeakError: names the documents that saw others, and those that differ from the same document alone.
    """
    tokens_T = torch.randint(vocab_size, (sum(lengths),), generator=generator_for(0, "isolation probe"))
    begins = [0, *accumulate(lengths)]
    row_T, packed_TV = _logits(model, tokens_T, lengths, shard=shard, device=device)
    limit = TOLERANCES.get(packed_TV.dtype, COARSE) * packed_TV.abs().max().item()
    faults = torch.zeros(2, len(lengths), dtype=torch.int64)
    for document, (begin, end) in enumerate(zip(begins, begins[1:], strict=False)):
        inside_T = (row_T >= begin) & (row_T < end)
        changed_T = tokens_T.clone()
        changed_T[begin] = (changed_T[begin] + 1) % vocab_size
        _, changed_TV = _logits(model, changed_T, lengths, shard=shard, device=device)
        others_T = ~inside_T & (row_T < begins[-1])
        faults[0, document] = _differs(changed_TV[others_T], packed_TV[others_T], limit)
        layout = DocumentLayout.from_lengths([end - begin], device=device)
        with torch.no_grad():
            alone_TV: Tensor = model(tokens_T[begin:end].to(device), layout)
        own = packed_TV[inside_T]
        faults[1, document] = _differs(own, alone_TV.cpu()[row_T[inside_T] - begin], limit)
    seen, other = (flags.nonzero().flatten().tolist() for flags in comm.sum(faults))
    if seen or other:
        raise LeakError(
            f"attention is not kept within documents: of documents {list(range(len(lengths)))} of one pack, "
            f"others see {seen}, and {other} come out otherwise than alone. Training with "
            f"{_attention_of(model)} would mix documents; give the model `packed_attention` or "
            f"`context_parallel_attention`, and no mask or cache of its own"
        )


def _logits(
    model: nn.Module,
    tokens_T: Tensor,
    lengths: tuple[int, ...],
    *,
    shard: Callable[[PackedBatch], PackedBatch],
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Return which token of the pack each of this worker's rows is, and its logits, both on the host."""
    pack = PackedBatch(
        tokens_T=tokens_T,
        labels_T=torch.full_like(tokens_T, IGNORED_LABEL),
        layout=DocumentLayout.from_lengths(lengths),
        num_targets=0,
    )
    batch = shard(pack)
    layout = batch.layout
    row_T = layout.token_of_T if isinstance(layout, ShardedLayout) else torch.arange(tokens_T.numel())
    on_device = batch.to(device)
    with torch.no_grad():
        logits_TV: Tensor = model(on_device.tokens_T, on_device.layout)
    return row_T, logits_TV.cpu()


def _attention_of(model: nn.Module) -> str:
    """Return the name of the attention that the model was given and its back end, or of the model."""
    given = (getattr(module, "attention", None) for module in model.modules())
    found = next((x for x in given if callable(x) and not isinstance(x, nn.Module)), type(model))
    backend = found.keywords.get("backend") if isinstance(found, partial) else None
    name = getattr(found.func if isinstance(found, partial) else found, "__qualname__", repr(found))
    return name if backend is None else f"{name} and model.attention={backend!r}"


def _differs(a: Tensor, b: Tensor, limit: float) -> bool:
    """Return whether two tensors are further apart than `limit` or not numbers."""
    return bool(a.numel()) and not bool((a - b).abs().max() <= limit)
