"""Batches by index: a packed batch is a function of (corpus, seed, pack indices) and of nothing else."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from hardy.balance.packing import PACKERS, Packer, Piece
from hardy.config import UserError
from hardy.data.store import TokenStore
from hardy.ops.packed import DocumentLayout, PackedBatch


class PackStream:
    """The packs of a store, in an order that a seed shuffles anew every epoch.

    Step s of a run with batches of B packs reads packs s*B ... s*B + B - 1; worker r of W takes every W-th
    of them. Nothing moves on when a batch is read, so resuming needs no state and the number of workers
    changes no batch. An evaluation takes one epoch, so that no pack comes twice.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        pack_tokens: int,
        document_tokens: int | None,
        packing: Literal["stream", "whole"],
        seed: int,
        end_id: int,
        num_epochs: int | None = None,
    ) -> None:
        """Plan the packs.

        Args:
            store: the documents.
            pack_tokens: token budget of a pack.
            document_tokens: longest piece that attends as one; none means `pack_tokens`.
            packing: see `BalanceConfig.packing`.
            seed: of the order of documents or packs.
            end_id: label of the last token of a document.
            num_epochs: passes after which the packs end, the last perhaps short; none means never.

        Raises:
            UserError: the store is empty, or a piece may be longer than a pack.
        """
        if not store.num_documents:
            raise UserError("this split holds no document; raise data.validation_fraction or give more text")
        if document_tokens is not None and document_tokens > pack_tokens:
            limit = f"data.pack_tokens={pack_tokens}"
            raise UserError(f"data.document_tokens must be at most {limit}, got {document_tokens}")
        self._store = store
        self._pack_tokens = pack_tokens
        self._document_tokens = document_tokens or pack_tokens
        self._end_id = end_id
        self._packer: Packer = PACKERS[packing](
            store.lengths,
            pack_tokens=pack_tokens,
            document_tokens=self._document_tokens,
            seed=seed,
            num_epochs=num_epochs,
        )

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass, each of which is once an input and has one target."""
        return self._store.num_tokens

    @property
    def longest_document(self) -> tuple[int, int]:
        """The document of the longest piece, and how many of its tokens attend as one at most."""
        document = int(self._store.lengths.argmax())
        return document, min(int(self._store.lengths[document]), self._document_tokens)

    @property
    def packs_per_epoch(self) -> int:
        """Packs in one pass."""
        return self._packer.packs_per_epoch

    @property
    def num_packs(self) -> int | None:
        """Packs there are; none means they never end."""
        return self._packer.num_packs

    def epoch_of(self, pack_index: int) -> int:
        """Return the epoch of the first token of a pack."""
        return self._packer.epoch_of(pack_index)

    def check_size(self, batch_packs: int) -> None:
        """Refuse a corpus that does not fill one batch.

        Raises:
            UserError: one pass has fewer than `batch_packs` packs.
        """
        if self.packs_per_epoch < batch_packs:
            raise UserError(
                f"data.source gives {self.tokens_per_epoch} tokens to train on ({self.packs_per_epoch} "
                "packs), and one step needs train.batch_packs x data.pack_tokens = "
                f"{batch_packs} x {self._pack_tokens} = {batch_packs * self._pack_tokens}; "
                "give more text or lower one of the two"
            )

    def num_targets(self, indices: Sequence[int]) -> int:
        """Return the labels that the packs at `indices` hold, without reading them."""
        return sum(piece.stop - piece.start for index in indices for piece in self._packer.pieces(index))

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        """Return the packs at `indices`, laid end to end in one row.

        Raises:
            IndexError: there is no such pack.
        """
        return self.pack(self.pieces(indices))

    def pieces(self, indices: Sequence[int]) -> list[Piece]:
        """Return the pieces of documents that the packs at `indices` hold, without reading them."""
        return [piece for index in indices for piece in self._packer.pieces(index)]

    def pack(self, pieces: Sequence[Piece]) -> PackedBatch:
        """Return pieces of documents, laid end to end in one row.

        The label of a token is the next token of its document, even where a pack or piece ends between
        them; the label of a document's last token is `end_id`.
        """
        documents, starts, stops = np.array(pieces, dtype=np.int64).reshape(-1, len(Piece._fields)).T
        offsets, tokens = self._store.offsets, self._store.tokens
        lengths = stops - starts
        # Where each token of the row lies in the store: the piece's first place, then one after the other.
        row_starts = np.cumsum(lengths) - lengths
        places = np.repeat(offsets[documents] + starts - row_starts, lengths) + np.arange(lengths.sum())
        labels = tokens[np.minimum(places + 1, tokens.size - 1)].astype(np.int64)
        at_end = offsets[documents] + stops == offsets[documents + 1]
        labels[(row_starts + lengths - 1)[at_end]] = self._end_id
        return PackedBatch(
            tokens_T=torch.from_numpy(tokens[places].astype(np.int64)),
            labels_T=torch.from_numpy(labels),
            layout=DocumentLayout.from_lengths(lengths.tolist()),
            num_targets=int(labels.size),
        )
