"""Random matrices by the Triton kernel, in its interpreter, against `hardy.ops.philox`."""

import math

import pytest
import torch

from hardy.ops import philox
from hardy.ops.updates import FillTask

KEY = 0x8D744EE0202F6924
"""Of seed 0 and layers.0.attn.q_proj.weight: above 2**63, so its sign matters."""


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(
    ("start", "count"), [(0, 16), (3, 1), (3, 1030), (8, 1030), ((1 << 34) + 5, 1), ((1 << 34) + 5, 16)]
)
def test_signs_are_the_same_bits(start, count):
    from hardy.ops.updates_triton import fill

    wanted = philox.signs(KEY, start=start, count=count, third=7, fourth=2)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((count + 2,), 9.0, dtype=dtype)
        fill([FillTask(out=out[1:-1], distribution="rademacher", key=KEY, start=start, epoch=7, slice=2)])
        assert torch.equal(out[1:-1].float(), wanted)
        assert out[0] == out[-1] == 9


def plain_normals(start, count, dtype):
    """Box-Muller as the specification writes it, all in one dtype."""
    first = start // 8 * 8
    words = philox.words(KEY, start=first, count=-(-(start + count - first) // 8) * 8, third=7, fourth=2)
    uniform = (2 * (words >> 9) + 1).to(dtype).view(-1, 2) * 2.0**-24
    length, angle = (-2 * uniform[:, 0].log()).sqrt(), 2 * math.pi * uniform[:, 1]
    pairs = torch.stack((length * angle.cos(), length * angle.sin()), dim=1)
    return pairs.flatten()[start - first : start - first + count]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("start", "count"), [(0, 16), (6, 1), (5, 1040), ((1 << 34) + 5, 900)])
def test_normals_are_within_the_last_places(start, count, within_budget):
    from hardy.ops.updates_triton import fill

    out = torch.full((count + 2,), 9.0)
    fill([FillTask(out=out[1:-1], distribution="normal", key=KEY, start=start, epoch=7, slice=2)])
    naive, exact = (plain_normals(start, count, dtype) for dtype in (torch.float32, torch.float64))
    within_budget(out[1:-1], naive, exact, factor=1.0)
    assert (out[1:-1] - philox.normals(KEY, start=start, count=count, third=7, fourth=2)).abs().max() < 5e-7
    assert out[0] == out[-1] == 9
    half = torch.empty(count, dtype=torch.bfloat16)
    fill([FillTask(out=half, distribution="normal", key=KEY, start=start, epoch=7, slice=2)])
    assert torch.equal(half, out[1:-1].bfloat16())


@pytest.mark.usefixtures("triton_interpreter")
def test_normals_of_the_specification():
    from hardy.ops.updates_triton import fill

    out = torch.empty(2, 4)
    fill([FillTask(out=out, distribution="normal", key=KEY, start=0, epoch=0, slice=0)])
    wanted = [-1.800323974, -1.508014957, -0.241374750, 0.718324816, -0.325353203, -0.393200133, 0.124405446]
    assert (out.flatten() - torch.tensor([*wanted, 0.445541697])).abs().max() < 1e-6


@pytest.mark.usefixtures("triton_interpreter")
def test_what_cannot_be_filled():
    from hardy.ops.updates_triton import fill

    fill([FillTask(out=torch.empty(0), distribution="rademacher", key=KEY, start=0, epoch=0, slice=0)])
    with pytest.raises(ValueError, match=r"contiguous tensors, got strides \(4,\); fill a copy"):
        fill(
            [FillTask(out=torch.empty(3, 4)[:, 0], distribution="normal", key=KEY, start=0, epoch=0, slice=0)]
        )
    with pytest.raises(
        ValueError, match="backend='triton' takes tensors of .*got torch.int8; use backend='foreach'"
    ):
        fill(
            [
                FillTask(
                    out=torch.empty(3, dtype=torch.int8),
                    distribution="rademacher",
                    key=KEY,
                    start=0,
                    epoch=0,
                    slice=0,
                )
            ]
        )
