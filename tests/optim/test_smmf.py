"""SMMF's rule: settings, state, signs, and the laws of its step."""

import math

import pytest
import torch
from torch import nn

from hardy.optim._rule import Member
from hardy.optim._sharded import Shard, Split
from hardy.optim.optimizers import SMMF
from hardy.optim.smmf import SMMFRule


def gradients(shape, count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def run(grads, *, start=0.0, **settings):
    """Return the weights after each gradient, and the state."""
    param = nn.Parameter(torch.full_like(grads[0], start))
    optimizer = SMMF([("weight", param)], **{"lr": 0.1, **settings})
    weights = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        weights.append(param.detach().clone())
    return weights, optimizer.state[param]


def specs(shape, *, splits=(), local=None, **settings):
    group = {**SMMFRule.defaults, "kind": "smmf", **settings}
    shard = Shard(shape, (0,) * len(shape), local or shape, splits)
    return SMMFRule().specs(shard, torch.float32, group, "layers.0.w")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta1": 1.5}, r"beta1 of a 'smmf' group must be in \[0, 1\], or None for no momentum, got 1.5"),
        ({"eps": -1.0}, "eps .* at least 0"),
        ({"decay_rate": 0.8}, r"decay_rate .* in \[-1, 0\], got 0.8"),
        ({"growth_rate": 1.1}, r"growth_rate .* in \[0, 1\], got 1.1"),
        ({"beta1_floor": -0.1}, r"beta1_floor .* in \[0, 1\]"),
        ({"max_update": 0.0}, "max_update .* above 0, or None, got 0.0"),
        ({"weight_decay_mode": "adam"}, "weight_decay_mode .* 'adamw' or 'l2', got 'adam'"),
        ({"shape_policy": "square"}, "shape_policy .* 'exact' or 'virtual' or 'auto', got 'square'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SMMF([("w", nn.Parameter(torch.ones(2)))], **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta1": None}, "layers.0.w: beta1=None needs vector_reshape=True, or a group of kind 'adamw'"),
        ({"max_update": 3.0}, "layers.0.w: max_update=3.0 needs vector_reshape=True, or max_update=None"),
    ],
)
def test_dense_vectors_refuse_what_they_cannot_do(settings, words):
    assert "row_v" in specs((4, 5), vector_reshape=False, **settings)
    with pytest.raises(ValueError, match=words):
        specs((1, 5), vector_reshape=False, **settings)


@pytest.mark.parametrize(
    ("shape", "settings", "sizes"),
    [
        ((12, 10), {}, {"row": (12,), "col": (10,), "sign": (12, 2)}),
        ((50, 3), {}, {"row": (15,), "col": (10,), "sign": (50, 1)}),
        ((50, 9), {"pack": False}, {"row": (25,), "col": (18,), "sign": (50, 9)}),
        ((4, 3, 2, 2), {}, {"row": (8,), "col": (6,), "sign": (4, 2)}),
        ((3, 4, 6), {"per_slice": True}, {"row": (3, 6), "col": (3, 4), "sign": (3, 3)}),
        ((7,), {}, {"row": (7,), "col": (1,), "sign": (7, 1)}),
        ((7,), {"shape_policy": "virtual"}, {"row": (3,), "col": (3,), "sign": (7, 1)}),
        ((), {}, {"row": (1,), "col": (1,), "sign": (1, 1)}),
    ],
)
def test_state_is_four_vectors_and_a_bit_per_weight(shape, settings, sizes):
    made = specs(shape, **settings)
    assert {made["row_m"].shape, made["row_v"].shape} == {sizes["row"]}
    assert {made["col_m"].shape, made["col_v"].shape} == {sizes["col"]}
    assert made["sign"].shape == sizes["sign"] and made["sign"].dtype == torch.uint8
    assert specs(shape, beta1=None, **settings).keys() == {"step", "row_v", "col_v"}


def test_factors_are_whole_on_all_workers_but_those_of_slices_and_signs():
    made = specs((12, 10))
    assert made["row_m"].dims == made["col_v"].dims == {} and made["sign"].dims == {0: 0, 1: 1}
    assert specs((3, 4, 6), per_slice=True)["row_m"].dims == {0: 0}


class Axis:
    """A mesh of which only the size is asked."""

    def size(self, axis):
        return 2


@pytest.mark.parametrize("pack", [True, False])
def test_cut_columns_must_fill_the_bytes_of_their_signs(pack):
    columns = (Split(1, Axis(), 0),)
    assert specs((4, 32), splits=columns, local=(4, 16))["sign"].shape == (4, 4)
    assert specs((4, 32), splits=columns, local=(4, 16), pack=pack)
    if pack:
        with pytest.raises(ValueError, match=r"pieces of 10 columns.*set pack=False for this group"):
            specs((4, 20), splits=columns, local=(4, 10))
    else:
        assert specs((4, 20), splits=columns, local=(4, 10), pack=False)["sign"].shape == (4, 20)
    with pytest.raises(
        ValueError, match="cut along dimension 2; SMMF takes parameters cut along dimensions 0"
    ):
        specs((4, 4, 4), splits=(Split(2, Axis(), 0),), local=(4, 4, 2), pack=pack)


def test_a_tensor_without_elements_is_refused():
    with pytest.raises(ValueError, match=r"layers.0.w of shape \(0, 4\) has no elements; leave it out"):
        specs((0, 4))


def test_temporaries_are_counted():
    shard = Shard((12, 10), (0, 0), (12, 10))
    member = Member("w", None, {}, None, shard, 0, 0, specs((12, 10)), ())
    assert SMMFRule().temporary_bytes(member) == 2 * 4 * 2 * (12 + 10)


def test_the_first_step_is_a_tenth_of_the_rate():
    (grad,) = gradients((6, 5), 1)
    weights, state = run([grad], eps=1e-8)
    torch.testing.assert_close(weights[0], -0.1 * 0.1 * grad / (grad.abs() + 1e-8))
    assert state["step"] == 1


def test_factors_have_the_sums_of_the_moments():
    grads = gradients((12, 10), 3)
    _, state = run(grads[:1])
    moment = 0.1 * grads[0].abs()
    torch.testing.assert_close(state["row_m"], moment.sum(1))
    torch.testing.assert_close(state["col_m"], moment.sum(0) / moment.sum())
    square = grads[0].square()
    rebuilt = torch.outer(state["row_v"], state["col_v"])
    torch.testing.assert_close(rebuilt.sum(1), square.sum(1))
    torch.testing.assert_close(rebuilt.sum(0), square.sum(0))


@pytest.mark.parametrize("backend", ["foreach", "auto"])
@pytest.mark.parametrize("columns", [1, 3, 7, 8, 9, 16, 21])
def test_a_bit_per_sign_does_what_a_byte_does(columns, backend):
    grads = gradients((5, columns), 4)
    packed, bits = run(grads, backend=backend)
    loose, signs = run(grads, pack=False, backend=backend)
    # The C++ back end goes through bytes another way, and may round otherwise.
    rounding = {"rtol": 0, "atol": 0} if backend == "foreach" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(torch.stack(packed), torch.stack(loose), **rounding)
    weights = 2 ** torch.arange(8)
    filled = torch.nn.functional.pad(signs["sign"].long(), (0, -columns % 8))
    assert torch.equal((filled.view(5, -1, 8) * weights).sum(-1), bits["sign"].long())


def test_weights_that_never_have_a_gradient_do_not_drift():
    """Vocabulary that never occurs; the published method pushes it upward every step."""
    grads = gradients((12, 6), 40)  # rows of the matrix, 9 x 8, are not rows of the tensor
    for grad in grads:
        grad[::2] = 0.0
    still, _ = run(grads)
    assert not still[-1][::2].any() and still[-1][1::2].all()
    drifting, _ = run(grads, mask_zero_grad=False)
    assert drifting[-1][::2].min() > 0.1


def test_decay_still_acts_where_the_gradient_is_zero():
    grads = gradients((4, 4), 1)
    grads[0][0] = 0.0
    weights, _ = run(grads, start=1.0, weight_decay=0.5)
    torch.testing.assert_close(weights[0][0], torch.full((4,), 0.95))


def test_max_update_bounds_a_spike():
    grads = [grad * 1e-3 for grad in gradients((6, 6), 40)]
    grads[-1][2, 3] = 100.0
    for limit in (None, 1.5):
        weights, _ = run(grads, beta1=None, max_update=limit)
        moved = (weights[-1] - weights[-2]).abs().max() / 0.1
        assert moved == pytest.approx(1.5, rel=1e-4) if limit else moved > 2.0


def test_no_momentum_is_momentum_of_zero():
    grads = gradients((6, 5), 6)
    without, state = run(grads, beta1=None)
    zero, _ = run(grads, beta1=0.0)
    torch.testing.assert_close(without[-1], zero[-1], rtol=1e-5, atol=1e-7)
    assert "sign" not in state and "row_m" not in state


def test_momentum_fades_down_to_its_floor():
    grads = gradients((6, 5), 30)
    faded, _ = run(grads, growth_rate=0.0)
    floor, _ = run(grads, growth_rate=0.0, beta1_floor=0.9)
    kept, _ = run(grads, growth_rate=1.0)
    assert torch.equal(floor[-1], kept[-1]) and not torch.equal(faded[-1], kept[-1])


def test_only_the_flat_order_matters():
    grads = gradients((60,), 5)
    flat, _ = run(grads)
    folded, _ = run([grad.view(3, 4, 5) for grad in grads])
    torch.testing.assert_close(folded[-1].flatten(), flat[-1])


def test_l2_is_a_gradient():
    grads = gradients((6, 5), 4)
    pulled, _ = run(
        [torch.zeros(6, 5)], start=1.0, weight_decay=0.5, weight_decay_mode="l2", mask_zero_grad=False
    )
    assert (pulled[0] < 1).all()
    by_hand, _ = run([torch.full((6, 5), 0.5)], start=1.0)
    torch.testing.assert_close(pulled[0], by_hand[0])
    apart, _ = run(grads, start=1.0, weight_decay=0.5, weight_decay_mode="l2")
    decoupled, _ = run(grads, start=1.0, weight_decay=0.5)
    assert not torch.equal(apart[-1], decoupled[-1])


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_nan_spoils_or_is_left_out(nonfinite):
    grads = gradients((6, 5), 3)
    usual, _ = run([grads[0], grads[2]], nonfinite=nonfinite)
    grads[1][2, 2] = math.nan
    weights, state = run(grads, nonfinite=nonfinite)
    if nonfinite == "skip":
        assert torch.equal(weights[-1], usual[-1]) and state["step"] == 2
    else:
        assert not weights[-1].isfinite().all() and not state["row_v"].isfinite().all()
