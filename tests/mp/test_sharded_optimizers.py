"""Sharded optimizers on real processes: whatever the mesh, the weights are those of the whole run.

Parameters are sharded directly (FSDP2 only decides when gradients arrive), so that every way of cutting is
tried: even, uneven and empty shards, replicas of shards (HSDP), rows and columns (tensor parallelism), both
at once.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini

pytestmark = pytest.mark.mp

SHAPES = {
    "tall": (24, 8),
    "wide": (8, 40),
    "uneven": (7, 16),  # on four workers 2, 2, 2, 1
    "few": (3, 16),  # on four workers one is empty
    "experts": (4, 8, 10),
    "vector": (9,),
}
STEPS = 6


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradient(name, step):
    """Zero for "few" in the first step, so that what must not count is among the things that are sharded."""
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(SHAPES[name], generator=generator) * (0.0 if (name, step) == ("few", 0) else 1.0)


def apollo(params, **settings):
    return APOLLO(low_rank_groups(params), lr=0.01, rank=3, weight_decay=0.1, update_proj_gap=4, **settings)


def mini(params):
    return APOLLOMini(low_rank_groups(params), lr=0.01, scale=2.0)


def smmf(params):
    return SMMF(list(params.items()), lr=0.01, weight_decay=0.1, pack=False)


def low_rank_groups(params):
    """Matrices by the low-rank rule, the vector by AdamW, one matrix by SMMF: three rules in one step."""
    kinds = {"vector": "adamw", "uneven": "smmf"}
    return [
        {"params": [(name, p)], "kind": kinds.get(name, "apollo")}
        | ({"pack": False} if name == "uneven" else {})
        for name, p in params.items()
    ]


MAKERS = {
    "apollo": apollo,
    "apollo, replicated state": lambda params: apollo(params, wide_state="replicate"),
    "apollo, signs": lambda params: apollo(params, proj="rademacher", limiter="corrected"),
    "apollo, singular": lambda params: apollo(params, proj="svd"),
    "mini": mini,
    "smmf": smmf,
    "adamw": lambda params: AdaptiveAdamW(list(params.items()), lr=0.01),
}
LAYOUTS = {
    "rows": ((4,), lambda shape: (Shard(0),)),
    "columns": ((4,), lambda shape: (Shard(len(shape) - 1 if len(shape) < 3 else 1),)),
    "hsdp": ((2, 2), lambda shape: (Replicate(), Shard(0))),
    "rows and columns": ((2, 2), lambda shape: (Shard(0), Shard(1) if len(shape) > 1 else Replicate())),
}


def train(optimizer, params, steps, shard=lambda name, x: x):
    for step in steps:
        for name, param in params.items():
            param.grad = shard(name, gradient(name, step))
        optimizer.step()


def whole_run(make, steps=STEPS):
    params = {name: nn.Parameter(x) for name, x in make_parameters().items()}
    train(make(params), params, range(steps))
    return {name: p.detach() for name, p in params.items()}


def sharded_parameters(mesh, placements_of):
    def shard(name, x):
        return distribute_tensor(x, mesh, placements_of(SHAPES[name]), src_data_rank=None)

    return {name: nn.Parameter(shard(name, x)) for name, x in make_parameters().items()}, shard


def worst(params, expected):
    return {
        name: (p.detach().full_tensor() - expected[name]).abs().max().item() for name, p in params.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cut_gives_the_weights_of_the_whole_run(run_workers, layout):
    expected = {name: whole_run(make) for name, make in MAKERS.items()}

    def body(comm):
        sizes, placements_of = LAYOUTS[layout]
        mesh = init_device_mesh("cpu", sizes)
        far = {}
        for name, make in MAKERS.items():
            params, shard = sharded_parameters(mesh, placements_of)
            train(make(params), params, range(STEPS), shard)
            far[name] = worst(params, expected[name])
        return far

    for far in run_workers(body, size=4):
        assert {name: d for name, d in far.items() if max(d.values()) > 1e-6} == {}


def test_a_step_takes_at_most_three_collectives(run_workers):
    def body(comm):
        mesh = init_device_mesh("cpu", (2,))
        params, shard = sharded_parameters(mesh, lambda shape: (Shard(0),))
        optimizer = apollo(params)
        train(optimizer, params, range(1), shard)
        calls = []
        new = hasattr(dist, "reduce_scatter_single")
        scatter, gather = (
            ("reduce_scatter_single", "all_gather_single")
            if new
            else ("reduce_scatter_tensor", "all_gather_into_tensor")
        )
        names = ("all_reduce", scatter, gather, "broadcast")
        for name in names:
            original = getattr(dist, name)

            def counted(*args, _name=name, _original=original, **kwargs):
                calls.append(_name)
                return _original(*args, **kwargs)

            setattr(dist, name, counted)
        train(optimizer, params, range(1, 2), shard)
        return [{scatter: "reduce_scatter", gather: "all_gather"}.get(name, name) for name in calls]

    for calls in run_workers(body):
        assert calls == ["reduce_scatter", "all_reduce", "all_gather"]


def test_a_gradient_that_one_worker_lacks_hangs_nobody(run_workers):
    def body(comm):
        mesh = init_device_mesh("cpu", (2,))
        finite = {}
        for name in ("apollo", "mini", "smmf", "adamw"):
            params, shard = sharded_parameters(mesh, lambda shape: (Shard(0),))
            optimizer = MAKERS[name](params)
            for step in range(3):
                for key, param in params.items():
                    lacking = key in ("tall", "wide") and step == 1 and comm.rank == 0
                    param.grad = None if lacking else shard(key, gradient(key, step))
                optimizer.step()
            finite[name] = all(p.to_local().isfinite().all() for p in params.values())
        return finite

    for finite in run_workers(body):
        assert all(finite.values())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 14, bias=False)
        self.down = nn.Linear(14, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def make_model():
    model = nn.Sequential(Layer(), Layer())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return model


def model_groups(model):
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.ndim == 2], "kind": "apollo"},
        {"params": [(n, p) for n, p in named if p.ndim == 1], "kind": "smmf"},
    ]


def fit(model, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_under_fsdp2_it_is_the_run_of_one_worker(run_workers):
    alone = make_model()
    fit(alone, APOLLO(model_groups(alone), lr=0.01, rank=2), range(5))

    def body(comm):
        mesh = init_device_mesh("cpu", (comm.size,))
        model = make_model()
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = APOLLO(model_groups(model), lr=0.01, rank=2)
        fit(model, optimizer, range(5))
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        return max((p.full_tensor() - q).abs().max().item() for p, q in pairs)

    assert max(run_workers(body, size=3)) < 1e-6
