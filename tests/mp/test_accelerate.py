"""Accelerate's FSDP2 path: it shards the model after the optimizer was built and swaps all its parameters.

Accelerate itself, on two workers; it offers FSDP2 on accelerators only, so its state is told that this is
FSDP all the same.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hardy.optim.make import make_optimizer

pytestmark = pytest.mark.mp
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (extra dev)")

PRESETS = {"apollo": {"rank": 2, "embed_kind": "smmf"}, "muon": {}}
STEPS, RATE = 4, 0.01


def make_model():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 30))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batches(step):
    """Return the tokens of both workers."""
    return torch.randint(30, (40,), generator=torch.Generator().manual_seed(step)).chunk(2)


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens), tokens)


def build(preset):
    model = make_model()
    settings = {"lr": RATE, "weight_decay": 0.1, "backend": "foreach", **PRESETS[preset]}
    return model, make_optimizer(model, preset, **settings)


def train(model, optimizer, accelerator, rank, steps):
    for step in steps:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batches(step)[rank]))
        optimizer.step()


def distances(model, expected):
    got = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    return max((got[name] - expected[name]).abs().max().item() for name in expected)


def whole_run(preset):
    """Train in one process on the batches of both workers."""
    model, optimizer = build(preset)
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(loss_of(model, tokens) / 2 for tokens in batches(step)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def as_fsdp2(make, plugin):
    """Return an accelerator that takes its FSDP2 path on a CPU."""
    accelerator = make(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, accelerate.PartialState()):
        state.distributed_type = accelerate.DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def be_launched(rank, size):
    """Say by the environment what `accelerate launch` says."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    os.environ |= {name: str(value) for name, value in zip(names, (rank, rank, size, size, 1), strict=True)}


def run_example():
    """Run what the documentation shows and train a step; whether each parameter of the groups is sharded."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
    page = (Path(__file__).parents[2] / "docs" / "howto" / "adapters.md").read_text(encoding="utf-8")
    example = page.split("## accelerate with FSDP2")[1].split("```py\n")[1].split("```")[0]
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.random.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    tokens = torch.arange(32).view(8, 4)
    loader = torch.utils.data.DataLoader([{"input_ids": x, "labels": x} for x in tokens], batch_size=4)
    names = {"model": model, "loader": loader}
    real = accelerate.Accelerator
    accelerate.Accelerator = lambda fsdp_plugin: as_fsdp2(real, fsdp_plugin)
    try:
        exec(compile(example, "adapters.md", "exec"), names)
    finally:
        accelerate.Accelerator = real
    before = [p.detach().full_tensor() for p in names["model"].parameters()]
    for batch in names["loader"]:
        names["accelerator"].backward(names["model"](**batch).loss)
        names["optimizer"].step()
    pairs = zip(before, names["model"].parameters(), strict=True)
    assert all(not torch.equal(old, new.detach().full_tensor()) for old, new in pairs)
    return [isinstance(p, DTensor) for group in names["optimizer"].param_groups for p in group["params"]]


def test_swapped_and_sharded_parameters_train_as_the_whole_model(run_workers, tmp_path):
    expected = {preset: whole_run(preset) for preset in PRESETS}

    def body(comm):
        be_launched(comm.rank, comm.size)
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear"],
        )
        accelerator = as_fsdp2(accelerate.Accelerator, plugin)
        far = {}
        for preset in PRESETS:
            model, optimizer = accelerator.prepare(*build(preset))
            assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
            train(model, optimizer, accelerator, comm.rank, range(STEPS // 2))
            accelerator.save_state(str(tmp_path / preset))
            train(model, optimizer, accelerator, comm.rank, range(STEPS // 2, STEPS))
            far[preset] = distances(model, expected[preset])
            accelerator.load_state(str(tmp_path / preset))
            train(model, optimizer, accelerator, comm.rank, range(STEPS // 2, STEPS))
            far[f"{preset} resumed"] = distances(model, expected[preset])
            accelerator.free_memory()
        return far, run_example()

    # Muon computes in bf16, and sharded products add up in another order: a rounding in each of its five
    # iterations a step.
    allowed = {"apollo": 1e-6, "muon": STEPS * 5 * 2**-8 * RATE}
    for far, is_sharded in run_workers(body, size=2):
        assert is_sharded == [True] * len(is_sharded) and len(is_sharded) > 5
        for preset in PRESETS:
            assert far[preset] <= allowed[preset]
            assert far[f"{preset} resumed"] == far[preset]
