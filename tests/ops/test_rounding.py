import math

import pytest
import torch

from hardy.ops import rounding as module
from hardy.ops.philox import words
from hardy.ops.rounding import round_into, store
from hardy.ops.tiles import loaded
from hardy.ops.updates import Place, Rounding

KEY = 0x1234567890ABCDEF
ULP = 2.0**-7
"""From 1 to the next bf16 number."""


def rounding(mode, *, step=1, base=0, stride=64, rest=None):
    place = Place(base=base, stride=stride)
    return Rounding(mode=mode, key=KEY, step=torch.tensor(float(step)), place=place, rest=rest)


def whole(x):
    return slice(0, x.shape[0]), slice(0, x.shape[1])


def climb(mode, *, steps=1000, update=1e-4, shape=(64, 64)):
    """Weights of 1 after `steps` updates."""
    weight = torch.ones(shape, dtype=torch.bfloat16)
    rest = torch.zeros_like(weight) if mode == "kahan" else None
    for step in range(steps):
        values = weight.float().add_(update)
        round_into(weight, values, rounding(mode, step=step, stride=shape[1], rest=rest), tile=whole(weight))
    return weight.float()


def test_nearest_loses_updates_below_half_a_unit():
    assert (climb("nearest") == 1.0).all()


def test_stochastic_keeps_the_mean_of_the_updates():
    weight = climb("stochastic")  # 4096 of them: the mean's error is 0.027 / 64
    assert weight.mean().item() == pytest.approx(1.1, abs=0.0015)
    assert weight.std().item() == pytest.approx(0.027, abs=0.003)


def test_kahan_keeps_what_was_cut():
    weight = climb("kahan")
    assert torch.unique(weight).tolist() == pytest.approx([1.1016], abs=1e-4)


def test_only_the_two_neighbours_occur_and_the_mean_stays():
    values = torch.full((1 << 10, 1 << 10), 1.003)
    weight = torch.empty_like(values, dtype=torch.bfloat16)
    round_into(weight, values, rounding("stochastic", stride=1 << 10), tile=whole(weight))
    assert torch.unique(weight).tolist() == [1.0, 1.0078125]
    deviation = ULP * math.sqrt(0.384 * 0.616) / (1 << 10)
    assert weight.double().mean().item() == pytest.approx(1.003, abs=4 * deviation)


@pytest.mark.parametrize("mode", ["stochastic", "nearest", "kahan"])
def test_what_bf16_holds_stays_as_it_is(mode):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, rest = weight.clone(), torch.zeros_like(weight)
    for step in range(20):
        round_into(out, weight.float(), rounding(mode, step=step, rest=rest), tile=whole(out))
        assert torch.equal(out, weight)


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
def test_infinities_and_nan_round_to_nearest(mode):
    low_payload = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), low_payload]).repeat(50).view(1, -1)
    out = torch.empty(1, 300, dtype=torch.bfloat16)
    round_into(out, values.clone(), rounding(mode), tile=whole(out))
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out[~values.isnan()].float(), values[~values.isnan()])


def test_kahan_leaves_what_does_not_change_with_its_rest():
    # Half a unit as rest: a second rounding of weight + rest would go to the even neighbour.
    weight = torch.tensor([[1.0 + ULP]], dtype=torch.bfloat16)
    rest = torch.tensor([[ULP / 2]], dtype=torch.bfloat16)
    round_into(weight, weight.float(), rounding("kahan", rest=rest), tile=whole(weight))
    assert (weight.item(), rest.item()) == (1.0 + ULP, ULP / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["stochastic", "nearest", "kahan"])
def test_other_dtypes_are_written_as_computed(mode, dtype):
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    out = torch.empty(3, 64, dtype=dtype)
    round_into(out, values.clone(), rounding(mode), tile=whole(out))
    assert torch.equal(out, values.to(dtype))


@pytest.mark.parametrize(("base", "stride"), [(0, 60), (5, 60), (3, 101), (4, 128)])
def test_parts_round_as_the_whole_does(base, stride, monkeypatch):
    values = torch.randn(40, 60, generator=torch.Generator().manual_seed(2))
    rule = rounding("stochastic", base=base, stride=stride)
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_into(out, values.clone(), rule, tile=whole(out))
    # By the definition: the word of the flat index in the whole tensor.
    flat = base + torch.arange(40).unsqueeze(1) * stride + torch.arange(60)
    random = words(KEY, start=0, count=int(flat.max()) + 1, third=1)[flat] >> 16
    bits = (values.view(torch.int32).long() + random) & ~0xFFFF
    assert torch.equal(out.float(), bits.to(torch.int32).view(torch.float32))
    monkeypatch.setitem(module._STOCHASTIC_ELEMENTS, "cpu", 100)
    parts = torch.empty_like(out)
    for tile in [(slice(0, 7), slice(0, 60)), (slice(7, 40), slice(0, 13)), (slice(7, 40), slice(13, 60))]:
        round_into(parts[tile], values[tile].contiguous(), rule, tile=tile)
    assert torch.equal(parts, out)


def test_stochastic_bits_differ_by_step_and_key():
    values = torch.full((4, 64), 1.003)
    outs = []
    for step, key in ((1, KEY), (2, KEY), (1, KEY + 1)):
        rule = rounding("stochastic", step=step)
        rule.key = key
        outs.append(torch.empty(4, 64, dtype=torch.bfloat16))
        round_into(outs[-1], values.clone(), rule, tile=whole(values))
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_store_does_nothing_for_values_computed_in_place():
    param = torch.ones(2, 4)
    tile = (slice(1, 2), slice(0, 4))
    values = loaded(param[tile], torch.empty(1, 4))
    values.add_(1)
    store(param, values, rounding("nearest"), tile=tile)
    assert param.tolist() == [[1.0] * 4, [2.0] * 4]


def test_store_takes_a_rest_in_the_parameters_own_shape():
    param, rest = torch.ones(6, 1, dtype=torch.bfloat16), torch.zeros(6, dtype=torch.bfloat16)
    tile = (slice(2, 4), slice(0, 1))
    store(param, torch.full((2, 1), 1.001), rounding("kahan", stride=1, rest=rest), tile=tile)
    assert (param == 1).all()
    assert (rest != 0).tolist() == [False, False, True, True, False, False]
