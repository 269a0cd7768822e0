"""A model as flat units and back."""

import pytest
import torch
from torch import nn

from hardy.config import ConfigError
from hardy.distributed.local.units import Units


def tied():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3), "c": nn.Linear(3, 1)})
    model["b"].weight = model["a"].weight
    model["c"].bias.requires_grad_(False)
    return model


def test_each_trainable_parameter_is_in_the_innermost_unit_once():
    units = Units(tied(), ["a", "c"])
    assert units.names == ("", "a", "c") and units.sizes == (3, 9, 3)  # b's weight is a's
    assert [len(units.parameters(unit)) for unit in range(3)] == [1, 2, 1]


def test_names_of_wrappers_do_not_hide_a_unit():
    model = nn.Module()
    model.module = tied()
    assert Units(model, ["a", "c"]).sizes == (3, 9, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back_in_the_parameters_precision(dtype):
    model = tied().to(dtype)
    units = Units(model, ["a", "c"])
    values = torch.linspace(-1, 1, 9)
    units.write(1, values)
    assert units.read(1).dtype == torch.float32
    assert torch.equal(units.read(1), values.to(dtype).float())
    assert torch.equal(model["a"].bias, values[6:].to(dtype))


def test_a_share_of_the_own_values_may_be_kept():
    units = Units(tied(), ["a"])
    before = units.read(1)
    units.write(1, torch.zeros(9), mix=0.25)
    assert torch.allclose(units.read(1), 0.25 * before)


def test_a_vector_is_laid_out_by_name_without_a_copy():
    units = Units(tied(), ["a", "c"])
    values = torch.zeros(9)
    named = units.named(1, values)
    assert {name: tuple(part.shape) for name, part in named.items()} == {"a.weight": (3, 2), "a.bias": (3,)}
    named["a.bias"].fill_(2.0)
    assert values.tolist() == [0.0] * 6 + [2.0] * 3


def test_whole_numbers_are_refused():
    model = nn.Module()
    model.count = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="parameter count is torch.complex64; only floating parameters"):
        Units(model, [])


def test_units_that_are_none_and_models_that_do_not_train_are_refused():
    model = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ConfigError, match="no submodule to be a unit, 'blocks.0'. Known: 0"):
        Units(model, ["blocks.0"])
    with pytest.raises(ConfigError, match="no parameter that trains"):
        Units(model.requires_grad_(False), ["0"])
