"""Published coefficients: caps of tokens, times."""

import numpy as np
import pytest

from hardy.balance.cost_presets import cost_preset, preset_sizes, published_strategies
from hardy.balance.plan import Scheme
from hardy.config import UserError

CAPS_32B = {
    (16, 1): 43520, (8, 1): 21888, (8, 2): 25856, (8, 3): 27264, (8, 4): 27904, (4, 1): 7808, (4, 2): 12416,
    (4, 4): 14592, (4, 6): 15360, (2, 2): 3968, (2, 4): 6272, (2, 6): 7040, (1, 4): 1920,
}  # fmt: skip
CAPS_13B = {
    (1, 1): 1152, (1, 2): 4864, (1, 4): 6528, (2, 1): 9472, (2, 2): 12928, (4, 1): 25984, (4, 2): 29568,
    (8, 1): 48000,
}  # fmt: skip
CAPS_7B = {
    (1, 2): 11264,
    (1, 4): 12672,
    (2, 1): 21888,
    (2, 2): 24832,
    (4, 1): 46080,
    (8, 1): 85248,
    (16, 1): 137984,
}


@pytest.mark.parametrize(
    ("name", "caps"), [("hydraulis-32b", CAPS_32B), ("hydraulis-13b", CAPS_13B), ("hydraulis-7b", CAPS_7B)]
)
def test_caps_are_the_published_ones(name, caps):
    cost = cost_preset(name)
    for (tensor, pipeline), cap in caps.items():
        assert cost.of(Scheme(tensor=tensor, pipeline=pipeline)).cap_tokens == cap


def test_failed_fits_and_impossible_schemes_are_left_out():
    found = {(own.scheme.tensor, own.scheme.pipeline) for own in cost_preset("hydraulis-32b").schemes}
    assert found == set(CAPS_32B)
    assert all(own.a > 0 for own in cost_preset("hydraulis-7b-a100").schemes)


def test_a_time_of_the_publication():
    own = cost_preset("hydraulis-32b").of(Scheme(tensor=16))
    assert own.times(np.array([32768]))[0] == pytest.approx(4836.00, abs=0.005)
    assert (own.c, own.util_tokens) == (145.747611, 1280)


def test_flexsp_holds_6449_tokens_on_a_gpu():
    cost = cost_preset("flexsp-6.7b-192k")
    assert [own.cap_tokens for own in cost.schemes] == [6449 * d for d in (2, 4, 8, 16, 32, 64)]
    s, d, bandwidth = 1024, 16, 10.33
    expected = (5.128e-06 * s * s + 0.1839576 * s) / d + 16 * 32 * 4096 * s / 2**20 / d / bandwidth
    own = cost.of(Scheme(context=16))
    assert own.times(np.array([s]))[0] == pytest.approx(expected)
    assert own.c == 629.3563


def test_the_seven_strategies_use_all_gpus():
    found = published_strategies()
    assert len(found) == 7 and {sum(scheme.ranks for scheme in each) for each in found} == {64}
    assert found[0] == (Scheme(tensor=16),) * 4


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="hydraulis-32b"):
        cost_preset("hydraulis-33b")


def test_sizes_of_presets_have_about_as_many_parameters_as_their_names_say():
    for name, billions in (("hydraulis-7b", 7), ("hydraulis-13b", 13), ("hydraulis-32b", 32)):
        sizes = preset_sizes(name)
        layer = 4 * sizes.hidden_size * sizes.num_heads * sizes.head_size
        layer += sizes.ffn_matrices * sizes.hidden_size * sizes.intermediate_size
        assert sizes.num_layers * layer == pytest.approx(billions * 1e9, rel=0.1)
