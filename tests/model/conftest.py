from dataclasses import replace
from functools import partial

import pytest
import torch

from hardy.model.decoder import Decoder
from hardy.model.init import initialise
from hardy.model.presets import PRESETS
from hardy.ops.attention import packed_attention

TINY = replace(
    PRESETS["1m"],
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    context_tokens=64,
)


@pytest.fixture
def tiny_shape():
    return TINY


@pytest.fixture
def make_decoder():
    """Build a tiny decoder with seeded weights, larger than the usual ones so that differences show."""

    def make(*, recompute="nothing", attention=None, **changes):
        shape = replace(TINY, **changes)
        model = Decoder(
            shape, attention=attention or partial(packed_attention, backend="auto"), recompute=recompute
        )
        initialise(model, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 if parameter.ndim == 1 else 8.0)
        return model

    return make
