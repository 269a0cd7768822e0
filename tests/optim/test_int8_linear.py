"""A linear module in int8 is nn.Linear with the dequantized weight, whose parameter has a single element."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from hardy.ops.quantize import dequantize, quantize
from hardy.optim.int8_linear import Int8Linear, VirtualWeight, check_int8_group


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8_layer(*, dtype=torch.float32, bias=True, group=128):
    matrix = quantize(0.1 * draw(24, 300), group=group)
    return Int8Linear(matrix, dtype=dtype, bias=nn.Parameter(draw(24, seed=1, dtype=dtype)) if bias else None)


def dense_twin(layer):
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.weight = nn.Parameter(dequantize(layer.matrix(), dtype=layer.weight.dtype))
    if layer.bias is not None:
        twin.bias = nn.Parameter(layer.bias.detach().clone())
    return twin


def pass_through(layer, x, *, autocast=False):
    """Return output and all gradients."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.float().square().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    for p in layer.parameters():
        p.grad = None
    return [out.detach(), x.grad, *grads]


def all_equal(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 300), (2, 5, 300), (300,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_output_and_gradients_are_those_of_the_dense_layer_bit_for_bit(dtype, shape, bias):
    layer, x = int8_layer(dtype=dtype, bias=bias), draw(*shape, seed=2, dtype=dtype)
    assert all_equal(pass_through(layer, x), pass_through(dense_twin(layer), x))


def test_autocast_is_that_of_the_dense_layer():
    layer, x = int8_layer(), draw(7, 300, seed=2)
    ours = pass_through(layer, x, autocast=True)
    assert ours[0].dtype == torch.bfloat16 and ours[2].dtype == torch.float32
    assert all_equal(ours, pass_through(dense_twin(layer), x, autocast=True))


# torch.compile itself makes an object of the class while it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph_it_is_the_same():
    layer, x = int8_layer(group=64), draw(7, 300, seed=2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert all_equal(pass_through(compiled, x), pass_through(layer, x))


def test_recomputed_in_the_backward_pass_it_is_the_same():
    layer, x = int8_layer(), draw(7, 300, seed=2)
    recomputed = nn.Sequential(layer)
    recomputed.forward = lambda x: checkpoint(layer, x, use_reentrant=False)
    assert all_equal(pass_through(recomputed, x), pass_through(layer, x))


def test_it_keeps_no_dense_weight_for_the_backward_pass():
    layer, kept = int8_layer(), []
    x = draw(7, 300, seed=2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    stored = {layer.q.data_ptr(), layer.scale.data_ptr(), layer.zero_point.data_ptr(), x.data_ptr()}
    assert {t.data_ptr() for t in kept} == stored


def test_gradients_that_nobody_wants_are_not_made():
    layer, x = int8_layer(), draw(7, 300, seed=2).requires_grad_()
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


# ---- The virtual weight ------------------------------------------------------------------------------------


def is_one_element(weight):
    return isinstance(weight, VirtualWeight) and weight.untyped_storage().nbytes() == weight.element_size()


def test_the_parameter_has_the_shape_of_the_weight_over_one_element_that_is_no_number():
    layer = int8_layer()
    assert dict(layer.named_parameters())["weight"].shape == (24, 300) and layer.weight.numel() == 7200
    assert is_one_element(layer.weight) and layer.weight.isnan().all()
    assert linear(torch.ones(1, 300), layer.weight).isnan().all(), "reading it shows"
    with torch.no_grad(), pytest.raises(RuntimeError, match="more than one element"):
        layer.weight.mul_(2)


@pytest.mark.parametrize("move", ["bfloat16", "half", "double", "to", "share_memory"])
def test_moves_and_casts_keep_one_element_and_the_bits_that_are_stored(move):
    layer = int8_layer()
    weight, before = layer.weight, {k: v.clone() for k, v in layer.state_dict().items() if k != "bias"}
    layer.to("cpu", torch.bfloat16) if move == "to" else getattr(layer, move)()
    assert layer.weight is weight, "an optimizer that was built before goes on with the same parameter"
    assert is_one_element(weight) and weight.isnan().all() and weight.dtype == layer.bias.dtype
    after = {k: v for k, v in layer.state_dict().items() if k != "bias"}
    assert all_equal(before.values(), after.values())
    x = draw(2, 300, dtype=weight.dtype)
    assert torch.equal(layer(x), dense_twin(layer)(x))


def test_a_pending_gradient_is_cast_along():
    layer = int8_layer()
    layer(draw(2, 300)).sum().backward()
    wanted = layer.weight.grad.bfloat16()
    layer.bfloat16()
    assert torch.equal(layer.weight.grad, wanted)


def test_it_can_be_built_on_meta_and_filled_from_a_checkpoint():
    layer = int8_layer()
    empty = copy.deepcopy(layer).to("meta")
    assert empty.weight.is_meta and empty.weight.shape == (24, 300)
    assert empty(torch.empty(2, 300, device="meta")).shape == (2, 24)
    empty.to_empty(device="cpu")
    assert is_one_element(empty.weight) and empty.weight.isnan().all() and empty.scale.dtype == torch.float32
    assert empty.load_state_dict(layer.state_dict()) == ([], [])
    assert all_equal(pass_through(empty, draw(2, 300)), pass_through(layer, draw(2, 300)))


def test_the_state_dict_holds_what_is_stored_and_loads_strictly():
    model, other = nn.Sequential(int8_layer()), nn.Sequential(int8_layer(bias=True))
    state = model.state_dict()
    assert list(state) == ["0.bias", "0.q", "0.scale", "0.zero_point"]
    other[0].q.zero_()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file, weights_only=True)) == ([], [])
    assert torch.equal(other[0].q, model[0].q)
    del state["0.scale"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.scale"\.'):
        other.load_state_dict(state)


def test_a_dense_checkpoint_is_refused_with_the_way_out():
    model = nn.Sequential(int8_layer())
    dense = nn.Sequential(dense_twin(model[0])).state_dict()
    with pytest.raises(
        RuntimeError, match="0.weight is dense and its module int8; load it before quantize_model"
    ):
        model.load_state_dict(dense)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_its_own_weight(how):
    model = nn.Sequential(int8_layer())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        # The whole weight, dense, would be 28,800 bytes; in int8 it is 7,200 and 5 for each of 72 groups.
        assert file.tell() < 20_000
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert is_one_element(other[0].weight) and other[0].weight.requires_grad
    assert other[0].weight.matrix().q.data_ptr() == other[0].q.data_ptr() != model[0].q.data_ptr()
    assert all_equal(pass_through(other, draw(2, 300)), pass_through(model, draw(2, 300)))


def test_the_weight_follows_buffers_that_are_replaced():
    layer = int8_layer()
    layer.q = layer.q.clone()
    assert layer.weight.matrix().q.data_ptr() == layer.q.data_ptr()


def test_weight_and_module_do_not_keep_each_other_alive():
    layer = int8_layer()
    weight, gone = layer.weight, weakref.ref(layer)
    gc.disable()  # no collector: counting references must be enough
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(
        RuntimeError, match=r"int8 weight of shape \(24, 300\) has lost its module.*as it is now"
    ):
        weight.matrix()


def test_a_weight_that_its_module_gave_up_stands_for_nothing():
    layer = int8_layer()
    weight = layer.weight
    layer.to("meta").to_empty(device="cpu")  # torch makes new parameters
    assert layer.weight.matrix().q is layer.q
    with pytest.raises(RuntimeError, match="moved off the meta device; build the optimizer"):
        weight.matrix()


def test_a_copy_of_the_parameter_alone_stands_for_nothing():
    with pytest.raises(RuntimeError, match="has lost its module"):
        copy.deepcopy(int8_layer().weight).matrix()


# ---- Errors ------------------------------------------------------------------------------------------------


def test_an_input_of_another_dtype_is_refused():
    with pytest.raises(
        RuntimeError, match="input is torch.float64 and the int8 module computes in torch.float32"
    ):
        int8_layer()(draw(2, 300, dtype=torch.float64))


def test_a_weight_that_something_replaced_is_refused():
    layer = int8_layer()
    layer.weight = nn.Parameter(torch.zeros(24, 300))
    with pytest.raises(
        RuntimeError, match="replaced by a Parameter.*leave it alone, or call dequantize_model"
    ):
        layer(draw(2, 300))


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (
            {"kind": "smmf", "bf16_update": "nearest"},
            "w has an int8 weight, which a 'smmf' group cannot update",
        ),
        ({"kind": "apollo", "bf16_update": "kahan"}, "the int8 weight w has no use; set bf16_update to"),
    ],
)
def test_groups_that_cannot_update_it_are_refused(group, text):
    with pytest.raises(ValueError, match=text):
        check_int8_group("w", group)


def test_printing_says_what_it_is():
    assert str(int8_layer()) == "Int8Linear(in_features=300, out_features=24, bias=True, group=128)"
