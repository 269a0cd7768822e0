"""What gradients are projected on: by counter, by name, by place, or by the gradient itself."""

import math

import pytest
import torch
from torch import nn

from hardy.ops.philox import key_for, normals, signs
from hardy.optim._geometry import geometry_of
from hardy.optim._projections import bases_of
from hardy.optim._sharded import Shard
from hardy.optim.optimizers import APOLLO

KEY = key_for(0, "weight", purpose="hardy.proj.v1")


def projection(shape, *, calls=0, local=None, offset=None, grad=None, level=0, optimizer=None, **settings):
    """Return what the gradient of a parameter is projected on, [K, rank], seen as the given shard of it."""
    param = nn.Parameter(torch.ones(shape, dtype=settings.pop("dtype", torch.float32)))
    param.grad = torch.ones_like(param) if grad is None else grad
    optimizer = optimizer or APOLLO([("weight", param)], **{"rank": 3, "update_proj_gap": 5, **settings})
    optimizer.materialize_state()
    optimizer.param_groups[0]["calls"] = calls
    (bundle,) = optimizer._bundles(optimizer._all_members())
    optimizer._bring(bundle, None, None)
    (member,) = bundle.members
    if local is not None:
        member.shard = Shard(shape, offset, local)
    geometry = geometry_of(member.shard, optimizer.param_groups[0], "weight")
    return bases_of(bundle, geometry).of(0, level)


@pytest.mark.parametrize(("proj", "draw"), [("normal", normals), ("rademacher", signs)])
def test_numbers_are_those_of_the_documented_counters(proj, draw):
    for calls, epoch in ((0, 0), (4, 0), (5, 1), (14, 2)):
        drawn = draw(KEY, start=0, count=8 * 3, third=epoch).view(8, 3)
        assert torch.equal(projection((20, 8), proj=proj, calls=calls), drawn)


def test_a_shard_draws_its_part_of_the_whole():
    whole = projection((8, 20))
    assert torch.equal(projection((8, 20), local=(3, 20), offset=(4, 0)), whole[4:7])
    assert projection((8, 20), local=(0, 20), offset=(8, 0)).shape == (0, 3)


def test_experts_have_their_own_numbers_by_their_place_in_the_whole():
    levels = [projection((4, 20, 8), level=level) for level in range(4)]
    for level in range(1, 4):
        assert not torch.equal(levels[level], levels[0])
        drawn = normals(KEY, start=0, count=24, third=0, fourth=level).view(8, 3)
        assert torch.equal(levels[level], drawn)
    assert torch.equal(projection((4, 20, 8), local=(2, 20, 8), offset=(2, 0, 0), level=1), levels[3])


def test_seed_and_length_change_the_numbers_but_a_shared_projection_depends_on_length_alone():
    assert not torch.equal(projection((20, 8)), projection((20, 8), seed=1))
    shared = projection((20, 8), share_projection=True)
    assert torch.equal(projection((3, 20, 8), share_projection=True, level=2), shared)
    key = key_for(0, "contracted 8", purpose="hardy.proj.v1")
    assert torch.equal(shared, normals(key, start=0, count=24, third=0).view(8, 3))


def test_dtypes_follow_weights_and_gradients():
    assert projection((20, 8), dtype=torch.float64).dtype == torch.float64
    low = projection((20, 8), dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    assert torch.equal(low, projection((20, 8)).bfloat16().float())


def test_a_projection_is_kept_for_its_epoch_on_a_cpu():
    param = nn.Parameter(torch.ones(20, 8))
    param.grad = torch.ones_like(param)
    optimizer = APOLLO([("weight", param)], rank=3, update_proj_gap=5)
    first = projection((20, 8), optimizer=optimizer)
    again = [projection((20, 8), optimizer=optimizer, calls=calls) for calls in (4, 5)]
    assert again[0] is first and again[1] is not first


def singular(matrix, rank):
    """Return the leading right singular vectors [K, rank], up to sign."""
    return torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:rank].T


def svd_run(shape, grads, **settings):
    """Return the bases after each call, as an optimizer keeps them."""
    param = nn.Parameter(torch.ones(shape))
    optimizer = APOLLO([("weight", param)], rank=2, proj="svd", update_proj_gap=2, **settings)
    bases = []
    for grad in grads:
        param.grad, flags = grad if isinstance(grad, tuple) else (grad, {})
        optimizer.step(**flags)
        bases.append(optimizer.state[param]["basis"].clone())
    return bases


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize("shape", [(20, 8), (8, 20)], ids=["tall", "wide"])
def test_a_singular_basis_is_taken_anew_once_an_epoch(shape, method):
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    bases = svd_run(shape, grads, svd_method=method)
    assert torch.equal(bases[1], bases[0]) and torch.equal(bases[3], bases[2])
    for basis, grad in ((bases[0], grads[0]), (bases[2], grads[2])):
        wanted = singular(grad if shape[0] > shape[1] else grad.T, 2)
        torch.testing.assert_close(
            (basis.double() @ wanted).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    "spoiled",
    [
        torch.zeros(20, 8),
        torch.full((20, 8), math.nan),
        torch.ones(20, 8).index_fill(0, torch.tensor([3]), math.inf),
        (torch.eye(20, 8), {"found_inf": torch.tensor(1.0)}),
    ],
    ids=["zero", "nan", "inf", "forbidden"],
)
def test_without_a_usable_gradient_the_basis_stays_or_is_random(spoiled):
    good = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    bases = svd_run((20, 8), [good, good, spoiled])
    assert torch.equal(bases[2], bases[0])
    random, _, then = svd_run((20, 8), [spoiled, good, good])
    torch.testing.assert_close(random @ random.T, torch.eye(2))
    assert not torch.equal(random, bases[0]) and torch.equal(then, bases[0])


def test_an_expert_that_was_not_used_keeps_its_basis():
    first, second = torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0)).unbind()
    second[1] = 0.0
    second[2, 0, 0] = math.nan
    bases = svd_run((3, 20, 8), [first, first, second])
    kept = [torch.equal(new, old) for new, old in zip(bases[2], bases[0], strict=True)]
    assert kept == [False, True, True]
