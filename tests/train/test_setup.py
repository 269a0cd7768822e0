"""Assembling a run: refusals, the same weights whatever the layout, released gradients, int8 weights."""

import pytest
import torch

from hardy.config import ConfigError, UserError
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.optim.int8_linear import Int8Linear
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, run_loop
from hardy.train.setup import assemble

HARDWARE = choose_hardware("cpu", "fp32")
LEAN = {"optim__clip_norm": None, "optim__lr": 0.01}
"""What releasing gradients asks for."""


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


def test_a_guard_takes_over_the_limit_and_knows_the_number_of_tensors(make_config, corpus):
    guarded = make_config(optim__guard__history="tensor", optim__clip_norm=0.7)
    worker = assemble(guarded, Alone(), corpus=corpus, hardware=HARDWARE).worker
    assert (worker.clip_norm, worker.guard.max_norm) == (None, 0.7)
    num_tensors = len(list(worker.model.parameters()))
    assert worker.guard.state_dict()["averages"].shape == (num_tensors,)
    plain = assemble(make_config(optim__clip_norm=0.7), Alone(), corpus=corpus, hardware=HARDWARE)
    assert (plain.worker.clip_norm, plain.worker.guard) == (0.7, None)
    assert plain.parts().keys() == {"strategy", "schedule"}


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


@pytest.mark.parametrize(("warmup_steps", "is_told"), [(6, True), (5, False)])
def test_a_warm_up_that_is_the_whole_run_is_told(make_config, corpus, caplog, warmup_steps, is_told):
    config = make_config(strategy__name="edit", strategy__warmup_steps=warmup_steps, train__steps=6)
    assemble(config, Alone(), corpus=corpus, hardware=HARDWARE)
    text = f"strategy.warmup_steps={warmup_steps} is not below train.steps=6: no replica ever trains alone"
    assert (text in caplog.text) == is_told


def losses_of(config, corpus):
    """Return the losses of a run and its worker."""
    assembly = assemble(config, Alone(), corpus=corpus, hardware=HARDWARE)
    lines = []
    run_loop(
        assembly.worker,
        assembly.plan,
        Progress(),
        save=lambda progress: None,
        record=lines.append,
        stop=lambda: False,
    )
    return [line["loss"] for line in lines], assembly.worker


@pytest.mark.parametrize("name", ["apollo_mini", "smmf", "adaptive_adamw"])
def test_releasing_gradients_changes_no_bit(make_config, corpus, caplog, name):
    settings = {"optim__name": name, "train__micro_packs": 2} | LEAN
    plain, one = losses_of(make_config(**settings), corpus)
    released, other = losses_of(make_config(**settings, optim__release=True), corpus)
    assert "released in the last of the 2 backward passes of a step only" in caplog.text
    assert released == plain
    assert all(
        torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )
    assert {group["calls"] for group in other.optimizer.param_groups} == {len(plain)}


def test_released_gradients_do_not_clip_or_guard(make_config):
    with pytest.raises(ConfigError, match=r"optim.release=true.*set optim.clip_norm to none"):
        make_config(optim__name="smmf", optim__release=True)
    with pytest.raises(ConfigError, match=r"optim.guard.history to off"):
        make_config(optim__name="smmf", optim__release=True, optim__guard__history="global", **LEAN)


def test_replicas_cannot_release(make_config, corpus):
    config = make_config(optim__name="smmf", optim__release=True, **LEAN)
    with pytest.raises(UserError, match=r"2 workers hold a whole model each; set strategy.mesh.shards to 2"):
        SimWorld(2).run(lambda comm: assemble(config, comm, corpus=corpus, hardware=HARDWARE))


def test_qapollo_keeps_linear_layers_in_int8_and_learns(make_config, corpus):
    losses, worker = losses_of(make_config(optim__name="qapollo", optim__release=True, **LEAN), corpus)
    linear = [module for module in worker.model.modules() if isinstance(module, Int8Linear)]
    assert linear and not any(type(module) is torch.nn.Linear for module in worker.model.blocks.modules())
    assert losses[-1] < losses[0]
    assert worker.model.state_dict()["blocks.0.attention.query.q"].dtype == torch.uint8


def test_qapollo_of_higher_rank_has_a_step_length_per_channel(make_config, corpus):
    config = make_config(optim__name="qapollo", optim__rank=4, optim__group_columns=16, **LEAN)
    worker = assemble(config, Alone(), corpus=corpus, hardware=HARDWARE).worker
    group = next(g for g in worker.optimizer.param_groups if g["kind"] == "apollo")
    assert (group["rank"], group["scale_type"], group["scale"]) == (4, "channel", 1.0)
    query = worker.model.blocks[0].attention.query
    assert query.scale.shape[1] == -(-query.q.shape[1] // 16)


def test_int8_weights_refuse_shards(make_config, corpus):
    class Pair(Alone):
        size = 2

    config = make_config(optim__name="qapollo", strategy__mesh__shards=2, **LEAN)
    with pytest.raises(
        UserError, match=r"qapollo.*strategy.mesh.shards is 2; set it to 1, or use apollo_mini"
    ):
        assemble(config, Pair(), corpus=corpus, hardware=HARDWARE)
