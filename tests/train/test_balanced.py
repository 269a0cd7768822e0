"""Planned batches: the run's losses do not depend on who computes what; what cannot be planned is refused."""

import pytest

from hardy.balance.cost import DecoderSizes, analytic_cost
from hardy.config import ConfigError, UserError, from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.train.balanced import check_balance, cost_of
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


def test_groups_of_several_are_tried_where_one_document_is_the_batch(corpus):
    config = make_config(balance__mode="dynamic_cp", balance__cap_tokens=48, balance__split_tokens=0)
    lines = SimWorld(4).run(lambda comm: losses(config, corpus, comm))[0]
    assert any(max(line["plan_groups"]) > 1 for line in lines)
    alone = [line["loss"] for line in losses(make_config(), corpus, Alone())]
    assert [line["loss"] for line in lines] == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy.name": "diloco"}, "strategy.name='diloco' lets each have its own"),
        (
            {
                "optim.name": "apollo",
                "optim.release": True,
                "optim.clip_norm": None,
                "optim.guard.history": "off",
            },
            "optim.release=true must know",
        ),
        ({"model.name": "hf:somewhere"}, "model.name='hf:somewhere' brings its own"),
    ],
)
def test_what_no_plan_can_be_carried_out_with_is_refused(settings, text):
    changes = {"balance.mode": "dispatch", **settings}
    base = to_dict(TrainConfig())
    if any(key.startswith("model.") for key in settings):
        base["model"] = {"name": settings["model.name"]}
        changes.pop("model.name")
    config = from_dict(TrainConfig, override(base, changes))
    with pytest.raises(ConfigError, match=text):
        check_balance(config)


def test_a_planner_that_is_off_takes_no_settings():
    with pytest.raises(ConfigError, match="balance.cap_tokens=64 .* set balance.mode to pack, dispatch or"):
        make_config(balance__cap_tokens=64)


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
