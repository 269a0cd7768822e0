"""The shape of SMMF's matrix: the specification's examples, its definition, and that of the tensor code."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.ops import factorize
from hardy.ops.matrix_shape import matrix_shape

EXAMPLES = {
    50257 * 768: (6932, 5568),
    32000 * 4096: (12800, 10240),
    4096 * 11008: (8192, 5504),
    2048 * 5461: (4064, 2752),
    4096 * 4096: (4096, 4096),
    151936 * 2048: (18992, 16384),
    50257: (1733, 29),
    4096: (64, 64),
    7919: (7919, 1),
    1: (1, 1),
}


@pytest.mark.parametrize("numel", EXAMPLES)
def test_the_examples_of_the_specification(numel):
    assert matrix_shape(numel, policy="exact") == EXAMPLES[numel]


@given(st.integers(1, 200_000), st.sampled_from(["exact", "virtual", "auto"]))
def test_it_is_the_definition_and_what_the_tensor_code_uses(numel, policy):
    height, width = matrix_shape(numel, policy=policy)
    assert (height, width) == factorize.matrix_shape(numel, policy=policy)
    exact = max(divisor for divisor in range(1, math.isqrt(numel) + 1) if numel % divisor == 0)
    stretched = numel >= 65536 and numel // exact > 16 * exact
    if policy == "virtual" or (policy == "auto" and stretched):
        assert width == math.ceil(math.sqrt(numel)) and (height - 1) * width < numel <= height * width
    else:
        assert (height, width) == (numel // exact, exact)


def test_a_large_prime_goes_virtual_only_by_itself():
    assert matrix_shape(65537) == (256, 257) and matrix_shape(65537, policy="exact") == (65537, 1)
    assert matrix_shape(65521) == (65521, 1)


def test_no_elements_have_no_matrix():
    with pytest.raises(ConfigError, match="SMMF needs a tensor with elements, got one of 0; leave it out"):
        matrix_shape(0)
