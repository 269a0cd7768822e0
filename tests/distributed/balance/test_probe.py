"""The probe passes what keeps documents apart and catches what does not."""

from functools import partial

import pytest
import torch

from hardy.distributed.balance.attention import context_parallel_attention
from hardy.distributed.balance.layouts import gather_layout, shard_batch, ulysses_layout
from hardy.distributed.balance.probe import LeakError, check_isolation
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.model.decoder import Decoder
from hardy.model.init import initialise
from hardy.model.presets import DecoderShape
from hardy.ops.attention import packed_attention
from hardy.ops.packed import DocumentLayout

SHAPE = DecoderShape(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    context_tokens=128,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=True,
)


def decoder(attention, *, dtype=torch.float32):
    model = Decoder(SHAPE, attention=attention).to(dtype)
    initialise(model, seed=1)
    return model


def one_document(query, key, value, queries, *, keys=None):
    """Attend over the whole row, as a mask of ones would."""
    return packed_attention(query, key, value, DocumentLayout.from_lengths([queries.num_tokens]))


def shifted(query, key, value, queries, *, keys=None):
    """Attend with borders shifted by one token."""
    if len(queries.lengths) == 1:
        return packed_attention(query, key, value, queries)
    first, *others, last = queries.lengths
    return packed_attention(query, key, value, DocumentLayout.from_lengths([first - 1, *others, last + 1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packed_attention_is_isolated(dtype):
    check_isolation(decoder(packed_attention, dtype=dtype), Alone(), vocab_size=23)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("make", [partial(gather_layout, split_tokens=1), ulysses_layout])
def test_context_parallel_attention_is_isolated(make, size):
    def body(comm):
        check_isolation(
            decoder(context_parallel_attention, dtype=torch.float64),
            comm,
            vocab_size=23,
            shard=lambda pack: shard_batch(pack, make(pack.layout.lengths, comm)),
        )

    SimWorld(size).run(body)


def test_a_mask_of_ones_is_caught():
    with pytest.raises(
        LeakError, match=r"others see \[0, 1\], and \[1, 2\] come .* with one_document would mix documents"
    ):
        check_isolation(decoder(one_document), Alone(), vocab_size=23)


def test_shifted_borders_are_caught():
    with pytest.raises(LeakError, match=r"come out otherwise than alone"):
        check_isolation(decoder(shifted), Alone(), vocab_size=23)


def test_a_leak_on_one_worker_fails_on_all():
    def body(comm):
        attention = one_document if comm.rank == 1 else packed_attention
        with pytest.raises(LeakError, match=r"others see \[0, 1\]"):
            check_isolation(decoder(attention), comm, vocab_size=23)

    SimWorld(2).run(body)


def test_nan_is_no_isolation():
    def broken(query, key, value, queries, *, keys=None):
        return packed_attention(query, key, value, queries) * float("nan")

    with pytest.raises(LeakError):
        check_isolation(decoder(broken), Alone(), vocab_size=23)


def test_the_back_end_that_was_chosen_is_named():
    model = decoder(partial(one_document_by, backend="dense"))
    with pytest.raises(
        LeakError, match="Training with one_document_by and model.attention='dense' would mix"
    ):
        check_isolation(model, Alone(), vocab_size=23)


def one_document_by(query, key, value, queries, *, keys=None, backend):
    return packed_attention(
        query, key, value, DocumentLayout.from_lengths([queries.num_tokens]), backend=backend
    )
