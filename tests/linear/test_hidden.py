"""Vectors of texts, layer by layer, against the model run by hand."""

import pytest
import torch
from torch import nn

from hardy.linear.hidden import _groups, hidden_vectors
from hardy.model.decoder import Decoder, unit_names
from hardy.model.init import initialise
from hardy.model.presets import PRESETS
from hardy.ops.attention import packed_attention
from hardy.ops.packed import DocumentLayout

DOCUMENTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]
BEGIN = 0


@pytest.fixture(scope="module")
def model():
    built = Decoder(PRESETS["1m"], attention=packed_attention)
    initialise(built, seed=0)
    return built


def by_hand(model, document):
    """Return embedding and blocks' outputs of one text alone, [L, T, D]."""
    seen = []
    handles = [
        module.register_forward_hook(lambda _m, _i, output: seen.append(output))
        for module in (model.embedding, *model.blocks)
    ]
    with torch.no_grad():
        model(torch.tensor([BEGIN, *document]), DocumentLayout.from_lengths([len(document) + 1]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("budget_tokens", [3, 7, 100])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_vectors_are_those_of_each_text_alone(model, pool, budget_tokens):
    vectors = hidden_vectors(
        model, unit_names(model), DOCUMENTS, begin_id=BEGIN, pool=pool, budget_tokens=budget_tokens
    )
    assert vectors.shape == (3, 6, 128) and vectors.dtype == torch.float32
    for place, document in enumerate(DOCUMENTS):
        hidden = by_hand(model, document)
        wanted = hidden[:, 1:].mean(1) if pool == "mean" else hidden[:, -1]
        torch.testing.assert_close(vectors[place], wanted, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was_and_runs_no_head(model):
    model.train()

    def refuse(*_):
        raise AssertionError("the norm after the last unit ran")

    handle = model.norm.register_forward_pre_hook(refuse)
    hidden_vectors(model, unit_names(model), DOCUMENTS, begin_id=BEGIN)
    handle.remove()
    assert model.training
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


class Batched(nn.Module):
    """Units that want a batch of one and return a tuple, as some of transformers do."""

    class Unit(nn.Module):
        def forward(self, hidden_1TD):
            return hidden_1TD + 1, None

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([self.Unit(), self.Unit()])

    def forward(self, tokens_T, layout):
        hidden = self.embedding(tokens_T)[None]
        for layer in self.layers:
            hidden, _ = layer(hidden)
        raise AssertionError("ran beyond the last unit")


def test_units_with_batches_and_tuples_are_understood():
    built = Batched()
    vectors = hidden_vectors(built, ["layers.0", "layers.1"], DOCUMENTS, begin_id=BEGIN, pool="last")
    ends = built.embedding.weight[torch.tensor([7, 9, 6])]
    torch.testing.assert_close(vectors, torch.stack([ends, ends + 1, ends + 2], 1).detach())


@pytest.mark.parametrize(("budget", "sizes"), [(3, [1, 1, 1]), (6, [2, 1]), (12, [2, 1]), (13, [3])])
def test_texts_go_together_as_far_as_their_tokens_fit(budget, sizes):
    groups = list(_groups(DOCUMENTS, budget_tokens=budget))
    assert [len(group) for group in groups] == sizes
    assert [document for group in groups for document in group] == DOCUMENTS
