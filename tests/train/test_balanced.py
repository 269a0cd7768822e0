"""Planned batches: the run's losses do not depend on who computes what; what cannot be planned is refused."""

import json
import logging
import math

import pytest
import torch

from hardy.balance.cost import DecoderSizes, analytic_cost
from hardy.balance.refit import rescaled
from hardy.config import ConfigError, UserError, from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.balance.probe import LeakError
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.ops.attention import packed_attention
from hardy.ops.packed import DocumentLayout
from hardy.train import balance_report
from hardy.train.balanced import cost_of, of_first
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, run_loop
from hardy.train.setup import assemble

HARDWARE = choose_hardware("cpu", "fp32")


def make_config(**dotted):
    changes = {
        "model.shape": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        "data.source": "synthetic:lognormal,documents=150,mean=40",
        "data.pack_tokens": 64,
        "optim.lr": 0.01,
        "optim.schedule.warmup_steps": 2,
        "train.steps": 5,
        "train.batch_packs": 8,
        "train.device": "cpu",
        "train.evaluate_packs": 2,
    } | {key.replace("__", "."): value for key, value in dotted.items()}
    return from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(make_config().data, cache_dir=tmp_path_factory.mktemp("cache"))


def losses(config, corpus, comm):
    assembly, lines = assemble(config, comm, corpus=corpus, hardware=HARDWARE), []
    assembly.worker.model.double()
    run_loop(
        assembly.worker,
        assembly.plan,
        Progress(),
        save=lambda _: None,
        record=lines.append,
        stop=lambda: False,
    )
    return lines


def test_every_mode_gives_the_losses_of_one_worker(corpus):
    alone = [line["loss"] for line in losses(make_config(), corpus, Alone())]
    for mode in ("pack", "dispatch", "dynamic_cp"):
        config = make_config(balance__mode=mode, balance__split_tokens=0)
        for lines in SimWorld(4).run(lambda comm, config=config: losses(config, corpus, comm)):
            assert [line["loss"] for line in lines] == pytest.approx(alone, abs=1e-9)
            assert all(line["plan_gap"] >= 0 and line["plan_unit"] == "GFLOP" for line in lines)
            assert all(0 < line["plan_cap_use"] <= line["plan_cap_use_most"] <= 1 for line in lines)
            assert all(line["plan_long_documents"] == line["plan_tokens_left_out"] == 0 for line in lines)
            assert json.loads(json.dumps(lines)) == lines


def test_groups_of_several_are_tried_where_one_document_is_the_batch(corpus):
    config = make_config(balance__mode="dynamic_cp", balance__cap_tokens=48, balance__split_tokens=0)
    lines = SimWorld(4).run(lambda comm: losses(config, corpus, comm))[0]
    grouped = [line for line in lines if max(line["plan_groups"]) > 1]
    assert grouped and all(line["plan_shared_share"] > 0 for line in grouped)
    alone = [line["loss"] for line in losses(make_config(), corpus, Alone())]
    assert [line["loss"] for line in lines] == pytest.approx(alone, abs=1e-9)


def test_levelled_batches_are_the_same_for_any_workers_and_take_about_as_long(corpus):
    """Levelling moves pieces by so many steps at most; who computes them has no say in it."""
    settings = {"balance__delay_steps": 3, "balance__split_tokens": 0, "train__steps": 4}
    alone = losses(make_config(**settings, balance__mode="pack"), corpus, Alone())
    config = make_config(**settings, balance__mode="dynamic_cp")
    lines = SimWorld(2).run(lambda comm: losses(config, corpus, comm))[0]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], abs=1e-9)
    delays = [line["plan_delay_steps"] for line in lines]
    assert delays == [line["plan_delay_steps"] for line in alone] and max(delays) == 3

    def variation(delay_steps):
        config = make_config(balance__mode="pack", balance__delay_steps=delay_steps)
        run = assemble(config, Alone(), corpus=corpus, hardware=HARDWARE)
        times = cost_of(config.balance, run.worker.model.shape, cap_tokens=64, recompute=False).times
        return torch.tensor([times(run.plan.batches.lengths(step)).sum() for step in range(8)]).std()

    assert variation(3) < 0.5 * variation(0)


CUT = {"balance__mode": "dispatch", "balance__cap_tokens": 24, "train__steps": 3}


def test_a_document_too_long_for_every_worker_is_refused_before_the_first_step(corpus):
    text = "tokens to attend over, .* holds 24; raise balance.cap_tokens .* balance.long_documents to split"
    with pytest.raises(UserError, match=text):
        assemble(make_config(**CUT), Alone(), corpus=corpus, hardware=HARDWARE)


def test_documents_may_be_split_or_truncated_and_are_counted(corpus):
    """Splitting trains on every token; what truncating leaves out is in no loss and in no count."""
    tokens = [line["tokens"] for line in losses(make_config(train__steps=3), corpus, Alone())]
    found = {}
    for how in ("split", "truncate"):
        config = make_config(**CUT, balance__long_documents=how)
        alone, lines = (
            losses(config, corpus, Alone()),
            SimWorld(2).run(lambda c, k=config: losses(k, corpus, c)),
        )
        assert [line["loss"] for line in lines[0]] == pytest.approx(
            [line["loss"] for line in alone], abs=1e-9
        )
        assert all(line["plan_long_documents"] > 0 for line in lines[0])
        found[how] = lines[0]
    assert [line["tokens"] for line in found["split"]] == tokens
    left_out = [line["plan_tokens_left_out"] for line in found["truncate"]]
    assert not any(line["plan_tokens_left_out"] for line in found["split"])
    assert found["truncate"][-1]["tokens"] == tokens[-1] - sum(left_out)


def test_metrics_hold_times_once_there_are_any(corpus):
    lines = losses(make_config(balance__mode="dispatch", train__steps=6), corpus, Alone())
    assert lines[0]["plan_predicted_s"] is None and lines[0]["plan_model_error"] is None
    assert math.isclose(lines[0]["plan_own_s"], lines[0]["plan_slowest_s"])
    assert all(0 < line["plan_own_s"] < line["busy_time_s"] for line in lines)
    assert lines[-1]["plan_predicted_s"] > 0 and lines[-1]["plan_model_error"] >= 0
    assert all(line["plan_measured_idle_share"] == 0 and line["plan_padding_share"] == 0 for line in lines)


def test_the_document_that_is_the_bound_is_named(corpus):
    config = make_config(balance__mode="dispatch", train__batch_packs=4)
    lines = SimWorld(4).run(lambda comm: losses(config, corpus, comm))[0]
    bound = [line for line in lines if line["plan_bound_tokens"] is not None]
    assert bound
    for line in bound:
        assert corpus.train.lengths[line["plan_bound_document"]] >= line["plan_bound_tokens"] > 32
    assert all(line["plan_bound_document"] is None for line in lines if line not in bound)


def test_workers_that_leak_do_not_begin(corpus, monkeypatch):
    def leaky(query, key, value, queries, *, keys=None, backend="auto"):
        whole = DocumentLayout.from_lengths([query.shape[0]])
        return packed_attention(query, key, value, whole, backend=backend)

    monkeypatch.setattr("hardy.train.setup.context_parallel_attention", leaky)
    config = make_config(balance__mode="dispatch")
    with pytest.raises(LeakError, match="leaky and model.attention='auto' would mix documents"):
        losses(config, corpus, Alone())
    assert losses(make_config(balance__mode="dispatch", balance__isolation="skip"), corpus, Alone())


def test_groups_are_made_before_the_first_step(corpus):
    def groups_at_first(comm):
        config = make_config(balance__mode="dynamic_cp", balance__split_tokens=0, train__batch_packs=12)
        assembly = assemble(config, comm, corpus=corpus, hardware=HARDWARE)
        batches = assembly.plan.batches
        batches.at(0, assembly.worker)
        return batches._planned.pool.num_made

    assert SimWorld(4).run(groups_at_first) == [3] * 4
    assert SimWorld(3).run(groups_at_first) == [1] * 3


def test_fitted_costs_are_those_of_the_first_worker(corpus, caplog, monkeypatch):
    """Workers time themselves differently, and must not plan differently for it."""
    monkeypatch.setattr(balance_report, "STEPS_LOOKED_AT", 2)
    monkeypatch.setattr(balance_report, "MOST_ERROR", -1.0)
    monkeypatch.setattr(balance_report.OwnTime, "seconds", lambda self: 0.5)
    config = make_config(balance__mode="dispatch", balance__model_error="refit", train__steps=8)

    def run(comm):
        assembly = assemble(config, comm, corpus=corpus, hardware=HARDWARE)
        batches, units = assembly.plan.batches, []
        for step in range(8):
            batches.at(step, assembly.worker)
            units.append(batches.take_report()["plan_unit"])
        assert batches.take_report() == {}
        return units, batches._check.cost

    with caplog.at_level(logging.WARNING):
        (units, cost), (_, other) = SimWorld(2).run(run)
    assert units[0] == "GFLOP" and units[-1] == "ms"
    assert cost == other
    assert "costs are fitted again" in caplog.text


def test_coefficients_come_from_the_first_worker():
    def body(comm):
        own = cost_at(1.0 + comm.rank)
        return of_first(own, comm) == cost_at(1.0)

    assert SimWorld(3).run(body) == [True] * 3


def cost_at(factor):
    sizes = DecoderSizes(1, 8, 16, 2, 2, 4, 32)
    return rescaled(analytic_cost(sizes, cap_tokens=64), factor)


def test_a_planner_that_is_off_takes_no_settings():
    with pytest.raises(
        ConfigError,
        match="only planners look at balance.cap_tokens=64; set balance.mode to pack, dispatch or",
    ):
        make_config(balance__cap_tokens=64)
    with pytest.raises(ConfigError, match="balance.long_documents=split and balance.model_error=refit; set"):
        make_config(balance__long_documents="split", balance__model_error="refit")


def test_costs_of_another_model_are_refused(corpus, tmp_path):
    sizes = DecoderSizes(1, 8, 16, 2, 2, 4, 32)
    path = tmp_path / "cost.json"
    analytic_cost(sizes, cap_tokens=64).save(path)
    config = make_config(balance__mode="dispatch", balance__cost=str(path))
    with pytest.raises(UserError, match="cost"):
        assemble(config, Alone(), corpus=corpus, hardware=HARDWARE)


def test_measured_costs_keep_their_cap_unless_told(corpus, tmp_path):
    config = make_config(balance__mode="dispatch")
    shape = assemble(config, Alone(), corpus=corpus, hardware=HARDWARE).worker.model.shape
    sizes = DecoderSizes(*(getattr(shape, name) for name in DecoderSizes._fields[:-1]))
    path = tmp_path / "cost.json"
    analytic_cost(sizes, cap_tokens=100).save(path)
    with_file = make_config(balance__mode="dispatch", balance__cost=str(path)).balance
    found = cost_of(with_file, shape, cap_tokens=64, recompute=False)
    assert found.schemes[0].cap_tokens == 100
    told = make_config(balance__mode="dispatch", balance__cost=str(path), balance__cap_tokens=72).balance
    assert cost_of(told, shape, cap_tokens=72, recompute=False).schemes[0].cap_tokens == 72


@pytest.fixture
def costs_of_one(corpus, tmp_path):
    """Return a file with costs of the tests' model, of one worker alone."""
    shape = assemble(make_config(), Alone(), corpus=corpus, hardware=HARDWARE).worker.model.shape
    sizes = DecoderSizes(*(getattr(shape, name) for name in DecoderSizes._fields[:-1]))
    path = tmp_path / "alone.json"
    analytic_cost(sizes, cap_tokens=100, degrees=(1,)).save(path)
    return path


def test_groups_without_costs_are_refused_before_the_first_step(corpus, costs_of_one):
    settings = {"balance__cost": str(costs_of_one)}
    config = make_config(balance__mode="dynamic_cp", **settings)

    def body(comm, config=config):
        return assemble(config, comm, corpus=corpus, hardware=HARDWARE).plan.batches.closing_note()

    text = r"balance.cost=\S+alone.json has costs of context-parallel degree 1 only, and 2 ranks .*"
    with pytest.raises(UserError, match=text + "profile --ranks 2 --out FILE.* balance.mode to dispatch"):
        SimWorld(2).run(body)
    assert body(Alone()) is None, "one worker alone forms no group anyway"
    dispatch = make_config(balance__mode="dispatch", **settings)
    assert SimWorld(2).run(lambda comm: body(comm, dispatch)) == [None, None]


@pytest.mark.parametrize("cap_tokens", [48, 64])
def test_a_run_that_formed_no_group_says_so_at_its_end(corpus, cap_tokens):
    settings = {"balance__mode": "dynamic_cp", "balance__cap_tokens": cap_tokens}
    config = make_config(**settings, balance__split_tokens=0, train__steps=3)

    def body(comm):
        assembly = assemble(config, comm, corpus=corpus, hardware=HARDWARE)
        batches, groups = assembly.plan.batches, []
        for step in range(3):
            batches.at(step, assembly.worker)
            groups += batches.take_report()["plan_groups"]
        return max(groups), batches.closing_note()

    for largest, note in SimWorld(2).run(body):
        assert (largest > 1) == (cap_tokens == 48) == (note is None)
        assert note is None or "in 3 steps: by the costs 2 workers that share the longest document" in note
