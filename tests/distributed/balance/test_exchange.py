"""The two collectives inside attention are the transpose of themselves, and send what they say."""

import pytest
import torch

from hardy.distributed.balance.exchange import gather_rows, swap_heads
from hardy.distributed.balance.layouts import gather_layout
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.rng import generator_for

LENGTHS = (40, 3, 11)


def draw(shape, *purpose, dtype=torch.float64):
    return torch.randn(shape, generator=generator_for(0, *purpose), dtype=torch.float64).to(dtype)


def product_both_ways(comm, forward, x):
    """Return <forward(x), y> and <x, backward(y)>, added up over the workers."""
    x = x.requires_grad_()
    out = forward(x)
    y = draw(out.shape, "y", comm.rank)
    out.backward(y)
    return comm.sum(torch.stack([(out.detach() * y).sum(), (x.detach() * x.grad).sum()])).tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradient_of_gathering_is_its_transpose(size):
    def body(comm):
        layout = gather_layout(LENGTHS, comm, split_tokens=1)
        x = draw((layout.num_tokens, 2, 3), "x", comm.rank)
        return product_both_ways(comm, lambda x: gather_rows(x, layout), x)

    for there, back in SimWorld(size).run(body):
        assert there == pytest.approx(back, rel=1e-12) and there != 0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradient_of_swapping_is_its_transpose(size):
    def body(comm):
        return product_both_ways(comm, lambda x: swap_heads(x, comm), draw((size, 5, 2), "x", comm.rank))

    for there, back in SimWorld(size).run(body):
        assert there == pytest.approx(back, rel=1e-12) and there != 0


def test_alone_or_without_cut_documents_nothing_is_sent():
    class Silent(Alone):
        def all_gather(self, x):
            raise AssertionError("a group of one has nobody to gather from")

        all_to_all = all_gather

    layout = gather_layout(LENGTHS, Silent(), split_tokens=0)
    x = torch.ones(layout.num_tokens, 1).requires_grad_()
    gather_rows(x, layout).sum().backward()
    assert x.grad.sum() == sum(LENGTHS)

    def body(comm):
        layout = gather_layout(LENGTHS, comm, split_tokens=99)
        x = torch.ones(layout.num_tokens, 1).requires_grad_()
        gather_rows(x, layout).sum().backward()
        return comm.bytes_sent

    assert SimWorld(2).run(body) == [0, 0]


def test_bf16_gradients_are_added_up_in_fp32():
    """1 + 7 x 2^-9: bf16 drops each small part when it adds them one by one."""

    def body(comm):
        layout = gather_layout((2 * comm.size,), comm, split_tokens=1)
        x = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
        out = gather_rows(x, layout)
        grad = torch.zeros_like(out)
        grad[layout.keys.lengths[0]] = 1.0 if comm.rank == 0 else 2.0**-9  # of the document's first token
        out.backward(grad)
        return x.grad[0].item()

    assert SimWorld(8).run(body)[0] == torch.tensor(1 + 7 * 2.0**-9).to(torch.bfloat16).item() > 1
