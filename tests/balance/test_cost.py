"""Costs of micro-batches: schemes, files, operations."""

import json

import numpy as np
import pytest

from hardy.balance.cost import (
    DecoderSizes,
    LengthCostModel,
    SchemeCost,
    analytic_cost,
    forward_flops,
    load_cost,
    shape_hash,
    training_flops,
)
from hardy.balance.plan import Scheme
from hardy.config import UserError

SIZES = DecoderSizes(32, 4096, 11008, 32, 8, 128, 32000)


def test_operations_by_hand():
    flops = forward_flops(DecoderSizes(1, 10, 30, 4, 2, 5, 7))
    s = 6
    linear = s * (4 * 10 * 4 * 5 + 4 * 10 * 2 * 5 + 2 * 3 * 10 * 30)
    assert flops.of(s) == pytest.approx(linear + 2 * 4 * 5 * s * (s + 1))
    plain = training_flops(DecoderSizes(2, 10, 30, 4, 2, 5, 7)).of(s)
    attention = 2 * 4 * 5 * s * (s + 1)
    assert plain == pytest.approx(2 * (3 * linear + 3.5 * attention) + 3 * 2 * 10 * 7 * s)
    again = training_flops(DecoderSizes(2, 10, 30, 4, 2, 5, 7), recompute=True).of(s)
    assert again - plain == pytest.approx(2 * (linear + attention))


def test_equal_tokens_are_not_equal_time():
    flops = forward_flops(DecoderSizes(32, 4096, 11008, 32, 32, 128, 32000))
    assert flops.of(32768) / (32 * flops.of(1024)) == pytest.approx(1.63, abs=0.01)


def test_degrees_divide_and_communication_adds():
    cost = analytic_cost(SIZES, cap_tokens=1000, degrees=(1, 4), communication=0.1, constant_tokens=50)
    one, four = cost.schemes
    assert four.times(np.array([77]))[0] == pytest.approx(one.times(np.array([77]))[0] / 4 * 1.1)
    assert (one.cap_tokens, four.cap_tokens) == (1000, 4000)
    assert one.c == four.c == pytest.approx(50 * training_flops(SIZES).linear * 1e-9)
    assert cost.with_cap(600).of(Scheme(context=4)).cap_tokens == 2400


def test_a_file_comes_back(tmp_path):
    cost = analytic_cost(SIZES, cap_tokens=1000)
    cost.save(tmp_path / "cost.json")
    assert load_cost(tmp_path / "cost.json") == cost
    assert load_cost(tmp_path / "cost.json", model_hash=shape_hash(SIZES)) == cost


def test_a_file_of_another_model_is_refused(tmp_path):
    analytic_cost(SIZES, cap_tokens=1000).save(tmp_path / "cost.json")
    other = shape_hash(SIZES._replace(num_layers=31))
    with pytest.raises(UserError, match="measured for another model.*hardy balance profile"):
        load_cost(tmp_path / "cost.json", model_hash=other)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 9, "schemes": []}'])
def test_what_is_no_cost_file_is_refused(tmp_path, text):
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(UserError, match=r"cost\.json"):
        load_cost(tmp_path / "cost.json")
    with pytest.raises(
        UserError, match=r"none\.json cannot be read as a cost file: No such file or directory$"
    ):
        load_cost(tmp_path / "none.json")


def test_a_file_with_a_bad_value_is_refused(tmp_path):
    told = analytic_cost(SIZES, cap_tokens=1000).plain()
    told["schemes"][0]["a"] = -1.0
    (tmp_path / "cost.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="at least 0"):
        load_cost(tmp_path / "cost.json")


def test_schemes_are_looked_up():
    cost = analytic_cost(SIZES, cap_tokens=1000)
    assert [own.scheme.context for own in cost.context_schemes(5)] == [1, 2, 4]
    with pytest.raises(UserError, match="no scheme tp2; it has cp1, cp2"):
        cost.of(Scheme(tensor=2))
    assert [own.scheme for own in cost.only([Scheme(context=2)]).schemes] == [Scheme(context=2)]


@pytest.mark.parametrize("bad", [{"a": -1.0}, {"a": 0.0, "b": 0.0}, {"c": float("nan")}, {"cap_tokens": 0}])
def test_costs_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError, match="cost of cp1"):
        SchemeCost(scheme=Scheme(), **({"a": 1.0, "b": 1.0, "c": 1.0, "cap_tokens": 9} | bad))
    with pytest.raises(UserError, match="each once"):
        LengthCostModel(schemes=())


def test_work_is_compared_by_the_smallest_group_whatever_its_place():
    alone, both = (
        SchemeCost(scheme=Scheme(context=d), a=1.0 / d, b=2.0, c=7.0, cap_tokens=9) for d in (1, 2)
    )
    for schemes in ((alone, both), (both, alone)):
        assert LengthCostModel(schemes=schemes).times([1, 3]).tolist() == [3.0, 15.0]


def test_costs_that_can_form_no_group_are_told_from_those_that_can():
    model = analytic_cost(DecoderSizes(2, 64, 128, 4, 2, 16, 256), cap_tokens=100, degrees=(1, 4))
    assert model.forms_groups(4) and not model.forms_groups(3)
    model.check_groups(4, source="it", way_out="go")
    model.check_groups(1, source="it", way_out="go")
    text = "^it has costs of context-parallel degree 1, 4 only, and 3 ranks .* --ranks 3 --out FILE.*, or go$"
    with pytest.raises(UserError, match=text):
        model.check_groups(3, source="it", way_out="go")
