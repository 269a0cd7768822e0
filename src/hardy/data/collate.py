"""Examples of any data set, laid end to end in one row: a `PackedBatch`, or what Hugging Face models take.

Paper: Hydraulis (arXiv 2412.07894), whose micro-batches hold whole documents of mixed length. An *example*
is a mapping with `input_ids` and perhaps `labels`, one for each token as Hugging Face has it: the model
shifts them.

Shape suffixes: T packed tokens, 1 the batch that Hugging Face models want.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hardy.config import UserError, unknown_name
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch

PADDING_TOKEN = 0
OUTPUTS = ("flattened", "packed")
LONG = ("error", "split", "truncate")

Document = tuple[Tensor, Tensor]
"""Tokens, and the label of each: the token after it."""


class PackingCollator:
    """Packs the examples of one micro-batch, without a mask and without padding between them.

    No examples make one token without a label: a micro-batch of zero weight, for ranks that must have one.

    Args:
        output: packed returns a `PackedBatch`; flattened what models of transformers take, see `flattened`.
        document_tokens: longest document; none allows any.
        long_documents: what becomes of longer ones: an error; split into documents of their own, which do not
            see each other; truncate, the rest is lost.
        pad_to_multiple: the row is filled up to a multiple of so many tokens, by a document without labels.

    Raises:
        UserError: a setting that does not exist. When called: an example without tokens or with other labels
            than tokens, or one that is too long.

    Example:
        >>> collate = PackingCollator(output="packed")
        >>> batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
        >>> batch.labels_T.tolist(), batch.layout.positions_T.tolist()
        ([6, 7, -100, 9, -100], [0, 1, 2, 0, 1])
    """

    def __init__(
        self,
        *,
        output: Literal["flattened", "packed"] = "flattened",
        document_tokens: int | None = None,
        long_documents: Literal["error", "split", "truncate"] = "error",
        pad_to_multiple: int = 1,
    ) -> None:
        if output not in OUTPUTS:
            raise UserError(f"output: {unknown_name(output, 'output', OUTPUTS)}")
        if long_documents not in LONG:
            raise UserError(f"long_documents: {unknown_name(long_documents, 'way', LONG)}")
        if document_tokens is not None and document_tokens < 1:
            raise UserError(f"document_tokens must be at least 1, got {document_tokens}")
        if pad_to_multiple < 1:
            raise UserError(f"pad_to_multiple must be at least 1, got {pad_to_multiple}; 1 pads nothing")
        self.output, self.document_tokens = output, document_tokens
        self.long_documents, self.pad_to_multiple = long_documents, pad_to_multiple

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """Return the examples as one row."""
        batch = self.pack(examples)
        return batch if self.output == "packed" else flattened(batch)

    def pack(self, examples: Sequence[Mapping[str, Any]]) -> PackedBatch:
        """Return the examples as a `PackedBatch`, whatever `output` says."""
        documents = [part for at, example in enumerate(examples) for part in self._parts(at, example)]
        if not documents:
            documents = [_filling(1)]
        missing = -sum(len(tokens_T) for tokens_T, _ in documents) % self.pad_to_multiple
        if missing:
            documents.append(_filling(missing))
        labels_T = torch.cat([labels for _, labels in documents])
        return PackedBatch(
            tokens_T=torch.cat([tokens for tokens, _ in documents]),
            labels_T=labels_T,
            layout=DocumentLayout.from_lengths([len(tokens) for tokens, _ in documents]),
            num_targets=int((labels_T != IGNORED_LABEL).sum()),
        )

    def _parts(self, at: int, example: Mapping[str, Any]) -> list[Document]:
        """Return the documents that one example becomes."""
        tokens_T = torch.as_tensor(example["input_ids"], dtype=torch.int64)
        given = example.get("labels")
        labels_T = tokens_T if given is None else torch.as_tensor(given, dtype=torch.int64)
        if tokens_T.ndim != 1 or not len(tokens_T) or labels_T.shape != tokens_T.shape:
            raise UserError(
                f"example {at} of a micro-batch has input_ids of shape {list(tokens_T.shape)} and labels of "
                f"{list(labels_T.shape)}; both need one row of equally many tokens, one or more: leave empty "
                f"documents out of the data set"
            )
        most = self.document_tokens or len(tokens_T)
        if len(tokens_T) > most:
            if self.long_documents == "error":
                raise UserError(
                    f"example {at} of a micro-batch has {len(tokens_T):,} tokens, more than document_tokens="
                    f"{most:,}; raise it, or set long_documents to split or truncate"
                )
            if self.long_documents == "truncate":
                tokens_T, labels_T = tokens_T[:most], labels_T[:most]
        ends_T = labels_T.new_full((1,), IGNORED_LABEL)
        pairs = zip(tokens_T.split(most), labels_T.split(most), strict=True)
        return [(tokens, torch.cat((labels[1:], ends_T))) for tokens, labels in pairs]


def flattened(batch: PackedBatch) -> dict[str, Any]:
    """Return what models of transformers take, as their `DataCollatorWithFlattening` makes it.

    Returns:
        `input_ids`, `labels` and `position_ids` (1, T), labels at their own token, `IGNORED_LABEL` at the
        first of each document, positions from 0 in each; `cu_seq_lens_q` and `cu_seq_lens_k`, int32, where
        documents begin and the last ends; `max_length_q` and `max_length_k`, the longest. No mask: with one,
        or with a cache, attention of transformers 5.23 crosses documents.

    Example:
        >>> batch = PackingCollator(output="packed")([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
        >>> flattened(batch)["labels"].tolist(), flattened(batch)["cu_seq_lens_q"].tolist()
        ([[-100, 6, 7, -100, 9]], [0, 3, 5])
    """
    layout = batch.layout
    first_T = batch.labels_T.new_full((1,), IGNORED_LABEL)
    return {
        "input_ids": batch.tokens_T[None],
        "labels": torch.cat((first_T, batch.labels_T[:-1]))[None],
        "position_ids": layout.positions_T[None],
        "cu_seq_lens_q": layout.cumulative_S,
        "cu_seq_lens_k": layout.cumulative_S,
        "max_length_q": layout.longest,
        "max_length_k": layout.longest,
    }


def _filling(num_tokens: int) -> Document:
    """Return a document without labels."""
    return torch.full((num_tokens,), PADDING_TOKEN), torch.full((num_tokens,), IGNORED_LABEL)
