"""Ranks that share a decoder give the loss and the gradient of the whole one, and send what is predicted."""

from dataclasses import replace

import pytest
import torch

from hardy.config import UserError
from hardy.distributed.balance.tensor_parallel import (
    TensorGroup,
    decoder_splits,
    enter_region,
    leave_region,
    tensor_parallel_bytes,
)
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.model.decoder import Decoder, compile_blocks
from hardy.model.init import initialise
from hardy.model.presets import DecoderShape
from hardy.ops.attention import packed_attention
from hardy.rng import generator_for

SHAPE = DecoderShape(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=4,
    context_tokens=128,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=False,
)
LENGTHS = (9, 4, 20)


def draw(shape, *purpose):
    return torch.randn(shape, generator=generator_for(0, *purpose), dtype=torch.float64)


def whole_model(shape, recompute="nothing"):
    model = Decoder(shape, attention=packed_attention, recompute=recompute)
    initialise(model, seed=1)
    return model.double()


def shared_model(comm, shape, recompute="nothing"):
    """Return the model with this rank's part of what is shared."""
    model, splits = whole_model(shape, recompute), decoder_splits(shape)
    TensorGroup(model, splits).group = comm
    for name, dim in splits.dims.items():
        own = model.get_parameter(name).detach().chunk(comm.size, dim)[comm.rank].clone()
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(own))
    return model


def loss_of(model, pack):
    return model(pack.tokens_T, pack.layout, pack.labels_T)


@pytest.mark.parametrize("recompute", ["nothing", "blocks"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_loss_and_gradient_are_those_of_the_whole_model(degree, tied, recompute, pack_of):
    shape, pack = replace(SHAPE, tied=tied), pack_of(LENGTHS)((0, 1, 2))
    whole, splits = whole_model(shape), decoder_splits(shape)
    want = loss_of(whole, pack)
    want.backward()

    def body(comm):
        model = shared_model(comm, shape, recompute)
        loss = loss_of(model, pack)
        loss.backward()
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
        for name, parameter in model.named_parameters():
            grad = whole.get_parameter(name).grad
            if name in splits.dims:
                grad = grad.chunk(degree, splits.dims[name])[comm.rank]
            assert grad.abs().max() > 1e-5  # so that the tolerance means something
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-12)

    SimWorld(degree).run(body)


def test_every_matrix_of_a_block_is_shared_and_nothing_else():
    splits = decoder_splits(SHAPE)
    matrices = [name for name, p in whole_model(SHAPE).named_parameters() if "blocks" in name and p.ndim == 2]
    assert sorted(splits.dims) == sorted(matrices)
    assert {name.split(".")[-2] for name, dim in splits.dims.items() if dim == 1} == {"output", "down"}


class Twin(Alone):
    """A group of two in which the other rank always has the same."""

    size = 2

    def sum(self, x):
        return 2 * x.detach()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch 2.13's compiler looks at it, and hides this
def test_compiled_blocks_are_shared_too(pack_of):
    pack, shape, losses, grads = pack_of(LENGTHS)((0, 1)), replace(SHAPE, num_layers=1), [], []
    for compiled in (False, True):
        model = shared_model(Twin(), shape)
        if compiled:
            compile_blocks(model, backend="eager")
        loss = loss_of(model, pack)
        loss.backward()
        losses.append(loss.item())
        grads.append(model.get_parameter("blocks.0.attention.query.weight").grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-12)


def test_entering_and_leaving_are_each_others_transpose():
    def body(comm):
        x, y = (draw((3, 2), name, comm.rank).requires_grad_() for name in "xy")
        same = draw((3, 2), "same")
        enter_region(x, comm).backward(y.detach())
        leave_region(y, comm).backward(same)
        torch.testing.assert_close(x.grad, comm.sum(y.detach()))
        assert torch.equal(y.grad, same)
        torch.testing.assert_close(leave_region(y, comm).detach(), comm.sum(y.detach()))
        assert torch.equal(enter_region(x, comm), x)

    SimWorld(3).run(body)


def test_a_rank_alone_sends_nothing_and_adds_no_step_to_the_graph():
    x = torch.ones(2, requires_grad=True)
    assert enter_region(x, Alone()) is x and leave_region(x, Alone()) is x


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_bytes_of_a_micro_batch_are_those_predicted(degree, pack_of):
    pack = pack_of(LENGTHS)((0, 1, 2))
    stream_bytes = pack.tokens_T.numel() * SHAPE.hidden_size * 8

    def body(comm):
        loss_of(shared_model(comm, SHAPE), pack).backward()
        return comm.bytes_sent

    want = tensor_parallel_bytes(num_regions=2 * SHAPE.num_layers, stream_bytes=stream_bytes, degree=degree)
    assert SimWorld(degree).run(body) == [want] * degree
    assert (want > 0) == (degree > 1)


@pytest.mark.parametrize(
    ("sizes", "degree", "message"),
    [
        ({"num_kv_heads": 2}, 4, r"degree 4 .* 2 key and value heads do not divide by 4; .* degrees 1, 2$"),
        ({"num_heads": 6, "num_kv_heads": 3}, 2, r"and 3 key and value heads do not .* takes degrees 1, 3$"),
        ({"intermediate_size": 25}, 2, r"and 25 feed-forward widths do not divide by 2; .* degrees 1$"),
        ({}, 3, r"8 query heads and 4 key and value heads do not divide by 3; .* degrees 1, 2, 4$"),
    ],
)
def test_a_degree_that_does_not_divide_is_refused(sizes, degree, message):
    with pytest.raises(UserError, match=message):
        decoder_splits(replace(SHAPE, **sizes)).check(degree)


def test_degrees_that_divide_are_taken():
    for degree in (1, 2, 4):
        decoder_splits(SHAPE).check(degree)
