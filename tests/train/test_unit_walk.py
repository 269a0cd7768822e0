"""Gradients and gathered weights in the ledger; tests/mp/test_unit_memory.py has what FSDP2 and DDP do."""

from dataclasses import replace

import pytest

from hardy.model.presets import PRESETS
from hardy.train.step_memory import Ledger, Sizes, StepPlan
from hardy.train.unit_walk import UnitWalk

SHAPE = replace(PRESETS["1m"], num_layers=2)


def units(**given):
    plan = StepPlan(**{"shape": SHAPE, "tokens": 8, "weight_bytes": 0, "state_bytes": 0, **given})
    return UnitWalk(plan, Sizes(plan), Ledger())


def held(walk):
    return {kind: size for kind, size in walk.ledger.held.items() if size}


def test_alone_a_gradient_is_kept_once_and_added_to():
    walk = units()
    walk.gradient(10)
    walk.is_first = False
    walk.gradient(10)
    assert held(walk) == {"gradients": 40}
    assert walk.ledger.peak_bytes == 80


def test_a_released_gradient_is_gone_after_the_last_micro_batch():
    walk = units(release=True, optimizer_bytes=7)
    walk.is_last = False
    walk.gradient(10)
    assert held(walk) == {"gradients": 40}
    walk.is_first, walk.is_last = False, True
    walk.gradient(10)
    assert held(walk) == {} and walk.ledger.peak_bytes == 40 + 40 + 7


def test_ddp_s_buckets_hold_gradients_already():
    walk = units(buckets=True)
    walk.gradient(10)
    assert held(walk) == {} and walk.ledger.peak["temporaries"] == 40
    walk.is_last = False
    walk.gradient(10)
    assert held(walk) == {"gradients": 40}
    walk.is_first, walk.is_last = False, True
    walk.gradient(10)
    assert held(walk) == {}


def test_autocast_keeps_casts_until_the_backward_pass_has_used_them():
    walk = units(precision="bf16")
    walk.use_linears()
    linears = walk.sizes.linear_elements
    assert held(walk) == {"copies": 2 * linears}
    walk.linear(linears, into=0)
    assert held(walk) == {"gradients": 4 * linears}


def test_int8_weights_are_made_for_one_product_at_a_time():
    walk = units(precision="bf16_pure", int8=True)
    walk.use_linears()
    assert held(walk) == {} and walk.ledger.peak["copies"] == 2 * 320 * 128


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_fsdp2_leaves_shards_of_gradients_and_nothing_else(precision):
    walk = units(precision=precision, shards=3)
    sizes = walk.sizes
    walk.gather_root()
    for is_first, is_last in ((True, False), (False, True)):
        walk.is_first, walk.is_last = is_first, is_last
        if is_first:
            walk.gather_in_forward()
            walk.release_block()
            walk.prefetch_last()
            walk.gather_in_backward(is_last=True)
        else:
            walk.ledger.take("copies", sizes.block_elements * sizes.value)
        walk.gradient(sizes.block_elements)
        walk.reduce_block()
        if is_first:
            assert held(walk)["gradients"] == 4 * sizes.block_elements, "whole, and in fp32, until the last"
    walk.ledger.take("gradients", 4 * sizes.root_elements)
    if sizes.grad_value < 4:
        walk.ledger.take("gradients", sizes.grad_value * sizes.root_elements)
    walk.reduce_root()
    shards = sum(-(-n // 3) for n in (sizes.block_elements, sizes.root_elements))
    assert held(walk) == {"gradients": shards * sizes.weight_value}
