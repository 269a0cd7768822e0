import math

import torch

from hardy.ops.rotary import Rotary, rotary_table, rotate


def test_positions_turn_halves_by_their_angle():
    rotary = rotary_table(torch.tensor([0, 3]), head_size=4, theta=100.0)
    x_THK = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(2, 1, 4)
    turned_THK = rotate(x_THK, rotary)
    assert torch.equal(turned_THK[0], x_THK[0])
    for k, angle in ((0, 3.0), (1, 3.0 / 100.0**0.5)):
        first, second = x_THK[1, 0, k].item(), x_THK[1, 0, k + 2].item()
        expected = first * math.cos(angle) - second * math.sin(angle)
        assert math.isclose(turned_THK[1, 0, k].item(), expected, rel_tol=1e-5)
        expected = second * math.cos(angle) + first * math.sin(angle)
        assert math.isclose(turned_THK[1, 0, k + 2].item(), expected, rel_tol=1e-5)


def test_products_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(query_place, key_place):
        table = rotary_table(torch.tensor([query_place, key_place]), head_size=8, theta=10000.0)
        turned = rotate(torch.stack([query, key]), table)
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(7, 3), product(104, 100), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(product(7, 3), product(8, 3))


def test_gradient_and_dtype():
    single = rotary_table(torch.arange(3), head_size=4, theta=10.0)
    table = Rotary(cos=single.cos.double(), sin=single.sin.double())
    x_THK = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), x_THK)
    assert rotate(x_THK.bfloat16(), table).dtype == torch.bfloat16
