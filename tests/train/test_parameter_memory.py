"""What a worker holds for parameters: names and shapes of the model, and totals to the byte."""

import math
from dataclasses import replace

import pytest
import torch

from hardy.config import ConfigError, from_dict
from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.model.presets import PRESETS, count_parameters
from hardy.optim.presets import PRESETS as OPTIMIZERS
from hardy.optim.routing import route_params
from hardy.train.parameter_memory import (
    TEMPORARY_BYTES,
    Choice,
    Weight,
    decoder_weights,
    held_for,
    routed_weights,
)

SMALL = decoder_weights(replace(PRESETS["1m"], num_layers=2, tied=False))
COUNT = sum(math.prod(weight.shape) for weight in SMALL)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_list_is_that_of_the_model_and_its_roles_are_those_of_routing(name, tied):
    config = from_dict(ModelConfig, {"name": name, "shape": {"tied": tied, "num_kv_heads": 1}})
    model = build_model(config, vocab_size=32000)
    listed = decoder_weights(model.shape)
    named = [(key, tuple(parameter.shape)) for key, parameter in model.named_parameters()]
    assert [(weight.name, weight.shape) for weight in listed] == named
    routed = {weight.name: weight for weight in routed_weights(route_params(model))}
    assert {weight.name: weight for weight in listed} == routed


def test_what_each_precision_holds():
    sizes = {
        precision: held_for(SMALL, Choice(optimizer="adamw", precision=precision))
        for precision in ("fp32", "bf16", "bf16_pure")
    }
    state = 8 * COUNT + 4 * len(SMALL)
    assert {key: (held.weights, held.gradients, held.state) for key, held in sizes.items()} == {
        "fp32": (4 * COUNT, 4 * COUNT, state),
        "bf16": (4 * COUNT, 4 * COUNT, state),
        "bf16_pure": (2 * COUNT, 2 * COUNT, state),
    }


def test_torch_s_optimizers_keep_state_in_the_dtype_of_the_weights():
    wide, narrow = (
        held_for(SMALL, Choice(optimizer="sgd", precision=precision)).state
        for precision in ("fp32", "bf16_pure")
    )
    assert (wide, narrow) == (4 * COUNT, 2 * COUNT)


def test_uneven_shards_are_rounded_up_by_rows():
    weights = [Weight(name="w", shape=(10, 6), role="matrix"), Weight(name="v", shape=(5,), role="vector")]
    held = held_for(weights, Choice(optimizer="adamw", shards=4))
    assert (held.weights, held.gradients) == (4 * (3 * 6 + 2), 4 * (3 * 6 + 2))
    assert held.state == 8 * (3 * 6 + 2) + 2 * 4


def test_released_gradients_are_one_parameter():
    held = held_for(SMALL, Choice(optimizer="adamw", release=True))
    assert held.gradients == 4 * max(math.prod(weight.shape) for weight in SMALL)


def test_int8_matrices():
    held = held_for(SMALL, Choice(optimizer="qapollo"))
    matrices = [weight.shape for weight in SMALL if weight.role == "matrix"]
    others = COUNT - sum(math.prod(shape) for shape in matrices)
    int8 = sum(rows * (columns + 5 * math.ceil(columns / 128)) for rows, columns in matrices)
    assert held.weights == int8 + 2 * others
    assert held.gradients == 2 * max(math.prod(weight.shape) for weight in SMALL)


def test_embeddings_go_where_they_are_sent():
    by_preset, by_choice = (
        held_for(SMALL, Choice(optimizer="apollo_mini", embed_kind=kind)).state for kind in (None, "smmf")
    )
    assert by_preset - by_choice > 7 * 2 * 512 * 128


def test_settings_lie_over_the_preset_s():
    ranks = [
        held_for(SMALL, Choice(optimizer="apollo", settings=s)).state for s in ({}, {"rank": 8}, {"rank": 1})
    ]
    assert ranks[0] > ranks[1] > ranks[2]
    assert ranks[2] == held_for(SMALL, Choice(optimizer="apollo_mini")).state
    for precision, more in (("bf16_pure", 2 * COUNT), ("bf16", 0)):
        kahan = Choice(optimizer="apollo_mini", settings={"bf16_update": "kahan"}, precision=precision)
        assert held_for(SMALL, kahan).state == ranks[2] + more


def test_projections_stay_on_a_cpu_and_pass_on_a_gpu():
    cpu, cuda = (held_for(SMALL, Choice(optimizer="apollo", device=device)) for device in ("cpu", "cuda"))
    assert cuda.beside == 0
    assert cpu.beside == 4 * sum(min(w.shape) ** 2 for w in SMALL if w.role == "matrix")
    assert held_for(SMALL, Choice(optimizer="apollo_svd", device="cpu")).beside == 0


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if OPTIMIZERS[name].kind in ("apollo", "smmf", "adamw")]
)
def test_our_own_optimizers_hold_at_most_64_mib_during_a_step(name):
    held = held_for(decoder_weights(PRESETS["7b"]), Choice(optimizer=name, precision="bf16_pure"))
    if name == "apollo_svd":  # looks for directions in a whole matrix at a time
        assert held.temporaries <= TEMPORARY_BYTES + 8 * 4096 * (11008 + 4096)
    else:
        assert held.temporaries <= TEMPORARY_BYTES


def test_the_specification_s_figures_at_7b():
    weights = decoder_weights(PRESETS["7b"])
    state = {
        name: held_for(weights, Choice(optimizer=name, embed_kind=kind)).state / 1e9
        for name, kind in (("adamw", None), ("apollo", None), ("apollo_mini", None), ("smmf", "smmf"))
    }
    wanted = {"adamw": 53.9, "apollo": 3.24 + 2.10, "apollo_mini": 0.0127 + 2.10, "smmf": 0.86}
    assert state == pytest.approx(wanted, rel=0.005)
    assert count_parameters(PRESETS["7b"]) == sum(math.prod(weight.shape) for weight in weights)


def test_int8_matrices_cannot_be_sharded():
    with pytest.raises(
        ConfigError, match=r"qapollo keeps matrices in int8, which FSDP2 cannot share .*shards=2\); set"
    ):
        Choice(optimizer="qapollo", shards=2)


def test_a_wrong_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="there is no optimizer 'smff'; did you mean 'smmf'"):
        Choice(optimizer="smff")


@pytest.mark.parametrize(
    ("given", "buckets", "releases"),
    [
        ({}, False, True),
        ({"replicas": 2}, True, False),
        ({"release": False}, False, False),
        ({"optimizer": "adamw"}, False, False),
        ({"optimizer": "adamw", "release": True, "shards": 2, "replicas": 2}, False, True),
    ],
)
def test_ddp_holds_gradients_and_cannot_release_them(given, buckets, releases):
    choice = Choice(**{"optimizer": "qapollo", **given})
    assert (choice.buckets, choice.releases) == (buckets, releases)


def test_a_model_of_another_kind_by_its_groups():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4))
    held = held_for(routed_weights(route_params(model, kind="smmf")), Choice(optimizer="smmf"))
    assert held.weights == 4 * sum(parameter.numel() for parameter in model.parameters())
