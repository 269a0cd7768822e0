"""Assembling a run: refusals, and the same weights whatever the layout."""

import pytest
import torch

from hardy.config import UserError, from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.train.device import choose_hardware
from hardy.train.setup import assemble, check_identity

HARDWARE = choose_hardware("cpu", "fp32")


def test_every_worker_starts_with_the_weights_of_one(make_config, corpus):
    config = make_config()

    def weights(comm):
        worker = assemble(config, comm, corpus=corpus, hardware=HARDWARE).worker
        return torch.cat([p.detach().flatten() for p in worker.model.parameters()])

    alone = weights(Alone())
    assert all(torch.equal(alone, other) for other in SimWorld(2).run(weights))
    other_seed = assemble(make_config(train__seed=1), Alone(), corpus=corpus, hardware=HARDWARE)
    assert not torch.equal(
        alone, torch.cat([p.detach().flatten() for p in other_seed.worker.model.parameters()])
    )


def test_a_corpus_shorter_than_a_batch_is_refused(make_config, corpus):
    config = make_config(train__batch_packs=4096)
    with pytest.raises(
        UserError, match=r"data.source gives \d+ tokens.*train.batch_packs x data.pack_tokens"
    ):
        assemble(config, Alone(), corpus=corpus, hardware=HARDWARE)


def test_pieces_longer_than_the_model_attends_over_are_refused(make_config, corpus):
    with pytest.raises(UserError, match=r"model.context_tokens"):
        assemble(make_config(model__context_tokens=16), Alone(), corpus=corpus, hardware=HARDWARE)


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(make_config, corpus):
    with pytest.raises(UserError, match=r"model.vocab_size.*tokenizer"):
        assemble(make_config(model__vocab_size=100), Alone(), corpus=corpus, hardware=HARDWARE)


def test_a_batch_that_workers_cannot_share_is_refused(make_config, corpus):
    with pytest.raises(UserError, match=r"train.batch_packs=4 must be a multiple of workers=3"):
        SimWorld(3).run(lambda comm: assemble(make_config(), comm, corpus=corpus, hardware=HARDWARE))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.shape.num_layers": 3}, r"the model changed.*model.num_layers is 2 there and 3 here"),
        ({"train.seed": 5}, r"the order of the data changed.*train.seed is 0 there and 5 here"),
        ({"data.validation_fraction": 0.4}, r"the data changed"),
        ({"data.tokenizer": "bpe:300"}, r"the (model|vocabulary) changed"),
    ],
)
def test_resuming_another_run_is_refused(make_config, corpus, cache_dir, change, text):
    before = assemble(make_config(), Alone(), corpus=corpus, hardware=HARDWARE).identity
    config = from_dict(type(make_config()), override(to_dict(make_config()), change))
    now = assemble(
        config, Alone(), corpus=prepare(config.data, cache_dir=cache_dir), hardware=HARDWARE
    ).identity
    with pytest.raises(UserError, match=r"cannot resume some/run: " + text):
        check_identity(before, now, run_dir="some/run")
    check_identity(before, before, run_dir="some/run")
