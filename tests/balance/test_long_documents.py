"""Pieces that no group holds: refused with the settings to change, split, or cut off and counted."""

import pytest

from hardy.balance.long_documents import fit_pieces
from hardy.balance.packing import Piece
from hardy.config import UserError

PIECES = [Piece(3, 0, 4), Piece(5, 10, 21), Piece(3, 4, 8)]


def test_what_fits_stays():
    batch = fit_pieces(PIECES, most_tokens=11, how="error")
    assert batch.pieces == tuple(PIECES)
    assert (batch.lengths, batch.num_long, batch.num_left_out) == ((4, 11, 4), 0, 0)


def test_a_long_document_is_refused_with_the_settings_to_change():
    text = (
        "document 5 .* 11 tokens .* holds 4; raise balance.cap_tokens .* data.document_tokens, .*"
        "balance.mode=dynamic_cp .* balance.long_documents to split or truncate"
    )
    with pytest.raises(UserError, match=text):
        fit_pieces(PIECES, most_tokens=4, how="error")


def test_split_keeps_every_token_once():
    batch = fit_pieces(PIECES, most_tokens=4, how="split")
    assert batch.pieces[1:4] == (Piece(5, 10, 14), Piece(5, 14, 18), Piece(5, 18, 21))
    assert (batch.lengths, batch.num_long, batch.num_left_out) == ((4, 4, 4, 3, 4), 1, 0)


def test_truncate_keeps_the_beginning_and_counts_the_rest():
    batch = fit_pieces(PIECES, most_tokens=4, how="truncate")
    assert batch.pieces == (Piece(3, 0, 4), Piece(5, 10, 14), Piece(3, 4, 8))
    assert (batch.num_long, batch.num_left_out) == (1, 7)
