"""What a language model's layers hold of a text: one vector per text and layer, to train probes on.

The model is any that takes packed documents and a layout and knows the names of its units, such as hardy's
decoder and `HFCausalLM`. It runs no further than its last unit: no head, no loss.

Shape suffixes: T packed tokens, D hidden size, N texts, L layers and the embedding before them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hardy.ops.packed import DocumentLayout

Pool = Literal["mean", "last"]


@torch.no_grad()
def hidden_vectors(
    model: nn.Module,
    unit_names: Sequence[str],
    documents: Sequence[Sequence[int]],
    *,
    begin_id: int,
    pool: Pool = "mean",
    budget_tokens: int = 4096,
) -> Tensor:
    """Return what the embedding and each unit leave behind, [N, L, D] in fp32 on the CPU.

    Args:
        model: called as `model(tokens_T, layout)`; its training mode is put back afterwards.
        unit_names: its layers, in order.
        documents: token ids of each text, at least one.
        begin_id: put before every text; its own state is left out of the mean.
        pool: mean over the tokens, or the last one.
        budget_tokens: of texts that are computed at once; a longer one goes alone.
    """
    device = next(model.parameters()).device
    seen: list[Tensor] = []
    units = [model.get_submodule(name) for name in unit_names]
    handles = [units[0].register_forward_pre_hook(lambda _module, inputs: seen.append(_tokens(inputs[0])))]
    handles += [
        unit.register_forward_hook(lambda _module, _inputs, output: seen.append(_tokens(output)))
        for unit in units
    ]
    handles.append(units[-1].register_forward_hook(_stop))
    was_training = model.training
    model.eval()
    pooled: list[Tensor] = []
    try:
        for group in _groups(documents, budget_tokens=budget_tokens):
            rows = [[begin_id, *document] for document in group]
            layout = DocumentLayout.from_lengths([len(row) for row in rows], device=device)
            seen.clear()
            try:
                model(torch.tensor([token for row in rows for token in row], device=device), layout)
            except _LastUnitError:
                pooled.append(torch.stack([_pooled(hidden_TD, layout, pool) for hidden_TD in seen], 1).cpu())
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return torch.cat(pooled)


class _LastUnitError(Exception):
    """Ends a forward pass whose rest nobody looks at."""


def _stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
    raise _LastUnitError


def _tokens(value: Any) -> Tensor:
    """Return the tokens [T, D] of a unit's input or output, which may be a tuple or have a batch of one."""
    hidden = value[0] if isinstance(value, tuple) else value
    return hidden.reshape(-1, hidden.shape[-1])


def _pooled(hidden_TD: Tensor, layout: DocumentLayout, pool: Pool) -> Tensor:
    """Return one vector per document [N, D] in fp32."""
    ends_N = layout.cumulative_S[1:].long()
    if pool == "last":
        return hidden_TD[ends_N - 1].float()
    lengths_N = torch.tensor(layout.lengths, device=hidden_TD.device)
    texts_T = torch.arange(len(layout.lengths), device=hidden_TD.device).repeat_interleave(lengths_N)
    counts_T1 = (layout.positions_T > 0)[:, None]
    sums_ND = hidden_TD.new_zeros(len(layout.lengths), hidden_TD.shape[1], dtype=torch.float32)
    sums_ND.index_add_(0, texts_T, hidden_TD.float() * counts_T1)
    return sums_ND / (lengths_N - 1)[:, None]


def _groups(documents: Sequence[Sequence[int]], *, budget_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Yield documents in their order, as many at a time as the budget holds with their begin tokens."""
    group: list[Sequence[int]] = []
    num_tokens = 0
    for document in documents:
        if group and num_tokens + len(document) + 1 > budget_tokens:
            yield group
            group, num_tokens = [], 0
        group.append(document)
        num_tokens += len(document) + 1
    if group:
        yield group
