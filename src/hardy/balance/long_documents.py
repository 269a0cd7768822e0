"""Pieces of documents that no group of workers holds: refused, split or cut off, and counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hardy.balance.packing import Piece
from hardy.config import UserError

LongDocuments = Literal["error", "split", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The pieces of one global batch, none of them too long."""

    pieces: tuple[Piece, ...]
    lengths: tuple[int, ...]
    """Tokens of each."""
    num_long: int = 0
    """Pieces that were split or truncated."""
    num_left_out: int = 0
    """Tokens that were cut off."""


def fit_pieces(pieces: Sequence[Piece], *, most_tokens: int, how: LongDocuments) -> Batch:
    """Return pieces of at most `most_tokens`.

    Args:
        pieces: of one global batch.
        most_tokens: what the largest group of workers holds.
        how: see `BalanceConfig.long_documents`.

    Raises:
        UserError: one is longer, and `how` is error.

    Example:
        >>> fit_pieces([Piece(7, 10, 15)], most_tokens=3, how="split").pieces
        (Piece(document=7, start=10, stop=13), Piece(document=7, start=13, stop=15))
    """
    found: list[Piece] = []
    num_long = num_left_out = 0
    for piece in pieces:
        stop, tokens = piece.stop, piece.stop - piece.start
        if tokens > most_tokens:
            if how == "error":
                raise too_long(tokens, most_tokens=most_tokens, document=piece.document)
            num_long += 1
            if how == "truncate":
                stop = piece.start + most_tokens
                num_left_out += piece.stop - stop
        starts = range(piece.start, stop, most_tokens)
        found += [Piece(piece.document, start, min(start + most_tokens, stop)) for start in starts]
    lengths = tuple(piece.stop - piece.start for piece in found)
    return Batch(pieces=tuple(found), lengths=lengths, num_long=num_long, num_left_out=num_left_out)


def too_long(tokens: int, *, most_tokens: int, document: int) -> UserError:
    """Return the error of a document that no group holds, and the ways out."""
    return UserError(
        f"document {document} of the training text has {tokens:,} tokens to attend over, and the largest "
        f"group of workers holds {most_tokens:,}; raise balance.cap_tokens (for each worker), lower "
        f"data.document_tokens, take balance.mode=dynamic_cp on more workers, or set balance.long_documents "
        f"to split or truncate"
    )
