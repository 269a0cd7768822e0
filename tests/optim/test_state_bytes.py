"""Bytes of state by formula: what the optimizers really hold, to the byte."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.model.presets import PRESETS, count_parameters
from hardy.optim.make import make_optimizer
from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW
from hardy.optim.state_bytes import local_elements, quantized_bytes, state_bytes

CLASSES = {"adamw": AdaptiveAdamW, "apollo": APOLLO, "smmf": SMMF}
TORCH = {
    "sgd": lambda params, **given: torch.optim.SGD(params, lr=0.1, **given),
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}


def held(optimizer):
    """Return the bytes of all tensors in an optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if torch.is_tensor(value))


def ours(kind, shape, *, dtype=torch.float32, **given):
    optimizer = CLASSES[kind]([("w", torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))], **given)
    optimizer.materialize_state()
    return held(optimizer)


@pytest.mark.parametrize(
    ("kind", "shape", "given"),
    [
        ("adamw", (), {}),
        ("adamw", (7,), {}),
        ("adamw", (6, 4), {"bf16_update": "kahan"}),
        ("apollo", (40, 24), {"rank": 4}),
        ("apollo", (24, 40), {"rank": 4, "proj": "svd"}),
        ("apollo", (24, 40), {"rank": 300}),
        ("apollo", (1, 40), {"rank": 1}),
        ("apollo", (5, 12, 8), {"rank": 3, "proj": "svd"}),
        ("apollo", (12, 5, 3), {"rank": 3, "stacked": False}),
        ("apollo", (12, 5, 3, 3), {"rank": 8, "bf16_update": "kahan"}),
        ("smmf", (40, 24), {}),
        ("smmf", (257, 257), {}),
        ("smmf", (65537,), {}),
        ("smmf", (65537,), {"shape_policy": "exact"}),
        ("smmf", (9, 7), {"pack": False}),
        ("smmf", (9, 7), {"beta1": None}),
        ("smmf", (9,), {"vector_reshape": False}),
        ("smmf", (4, 6, 10), {"per_slice": True}),
        ("smmf", (3, 5, 2, 2), {"bf16_update": "kahan"}),
        ("smmf", (), {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ours_hold_what_the_formula_says(kind, shape, given, dtype):
    wanted = ours(kind, shape, dtype=dtype, **given)
    assert state_bytes(kind, shape, settings=given, weight_bytes=dtype.itemsize) == wanted


@settings(max_examples=40)
@given(
    st.sampled_from(["adamw", "apollo", "smmf"]),
    st.lists(st.integers(1, 30), min_size=2, max_size=4).map(tuple),
    st.integers(1, 40),
)
def test_any_shape(kind, shape, rank):
    given = {"rank": rank} if kind == "apollo" else {}
    assert state_bytes(kind, shape, settings=given) == ours(kind, shape, **given)


@pytest.mark.parametrize(
    ("kind", "shape", "given"),
    [
        ("sgd", (6, 4), {}),
        ("sgd", (6, 4), {"momentum": 0.9}),
        ("adafactor", (6, 4), {}),
        ("adafactor", (5,), {}),
        ("adafactor", (), {}),
        ("adafactor", (3, 6, 4), {}),
        ("adafactor", (2, 3, 4, 4), {}),
        ("muon", (6, 4), {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_those_of_torch_hold_what_the_formula_says(kind, shape, given, dtype):
    param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = TORCH[kind]([param], **given)
    optimizer.step()
    assert state_bytes(kind, shape, settings=given, weight_bytes=dtype.itemsize) == held(optimizer)


def test_the_documented_formulas():
    assert state_bytes("adamw", (30, 20)) == 8 * 600 + 4
    assert state_bytes("apollo", (30, 20), settings={"rank": 5}) == 8 * 30 * 5 + 16
    assert (
        state_bytes("apollo", (20, 30), settings={"rank": 5, "proj": "svd"}) == 8 * 30 * 5 + 16 + 4 * 5 * 20
    )
    assert state_bytes("apollo", (7, 20, 30), settings={"rank": 5}) == 7 * (8 * 30 * 5 + 8) + 8
    assert state_bytes("smmf", (30, 20)) == 8 * (25 + 24) + 30 * 3 + 4
    assert state_bytes("smmf", (30, 20), settings={"beta1": None}) == 4 * (25 + 24) + 4


def test_the_specification_s_figures_at_7b():
    linears = 32 * (4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)])
    mini = sum(state_bytes("apollo", shape, settings={"rank": 1}) for shape in linears)
    rank_256 = sum(state_bytes("apollo", shape, settings={"rank": 256}) for shape in linears)
    assert mini / 1e6 == pytest.approx(12.7, abs=0.05) and rank_256 / 1e9 == pytest.approx(3.24, abs=0.01)
    tables = 2 * [(32000, 4096)]
    smmf = sum(state_bytes("smmf", shape) for shape in linears + tables)
    assert smmf / 1e9 == pytest.approx(0.86, abs=0.005)
    assert sum(math.prod(shape) for shape in linears + tables) + 65 * 4096 == count_parameters(PRESETS["7b"])


def test_shards_are_cut_by_rows_and_the_fullest_counts():
    assert local_elements((10, 3), shards=4) == 9 and local_elements((), shards=4) == 1
    assert state_bytes("adamw", (10, 3), shards=4) == 8 * 9 + 4
    assert state_bytes("apollo", (10, 3), settings={"rank": 2}, shards=4) == 8 * 3 * 2 + 16
    assert state_bytes("apollo", (3, 10), settings={"rank": 2}, shards=4) == 8 * 3 * 2 + 16
    whole = {"rank": 2, "wide_state": "replicate"}
    assert state_bytes("apollo", (3, 10), settings=whole, shards=4) == 8 * 10 * 2 + 16
    local = {"rank": 2, "side": "shard_local"}
    assert state_bytes("apollo", (3, 10), settings=local, shards=4) == 8 * 1 * 2 + 16
    assert state_bytes("smmf", (10, 6), shards=4) == 8 * (10 + 6) + 3 * 1 + 4


@given(st.integers(2, 200), st.integers(2, 200), st.integers(1, 9))
def test_a_shard_holds_less_and_all_shards_hold_enough(rows, columns, shards):
    for kind in ("adamw", "apollo", "smmf", "sgd", "adafactor", "muon"):
        given = {"rank": 4, "momentum": 0.9}
        one, all_ = (state_bytes(kind, (rows, columns), settings=given, shards=n) for n in (shards, 1))
        assert one <= all_ <= one * shards


def test_int8_weights():
    assert quantized_bytes((4, 256)) == 4 * 256 + 4 * 2 * 5
    assert quantized_bytes((4, 257)) == 4 * 257 + 4 * 3 * 5
    assert quantized_bytes((5, 128), shards=2) == 3 * (128 + 5)


def test_a_whole_model_made_by_make_optimizer():
    model = torch.nn.Sequential(torch.nn.Embedding(50, 12), torch.nn.Linear(12, 20), torch.nn.LayerNorm(20))
    optimizer = make_optimizer(model, "apollo-mini")
    optimizer.materialize_state()
    vectors = 3 * (8 * 20 + 4)
    assert held(optimizer) == (8 * 600 + 4) + (8 * 20 + 16) + vectors


@pytest.mark.parametrize(
    ("kind", "shape", "text"),
    [
        (
            "apollo",
            (5,),
            r"kind 'apollo' takes matrices, got a parameter of shape \(5,\); give it to kind 'adamw'",
        ),
        ("muon", (5, 2, 2), r"kind 'muon' takes matrices, got a parameter of shape \(5, 2, 2\)"),
        ("adam", (5, 2), "there is no kind of parameter group 'adam'; did you mean 'adamw'"),
    ],
)
def test_what_a_rule_cannot_take(kind, shape, text):
    with pytest.raises(ConfigError, match=text):
        state_bytes(kind, shape)
