"""Our own decoder with int8 weights: it trains, resumes, compiles, recomputes, and releases its gradients."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.model.decoder import Decoder, compile_blocks
from hardy.model.init import initialise
from hardy.model.presets import PRESETS
from hardy.ops.attention import packed_attention
from hardy.ops.packed import DocumentLayout
from hardy.optim.int8 import quantize_model
from hardy.optim.int8_linear import Int8Linear, VirtualWeight
from hardy.optim.optimizers import QAPOLLO
from hardy.train.state import load_state, state_of


def tiny_decoder(*, recompute="nothing", num_layers=2):
    shape = replace(
        PRESETS["1m"],
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_size=6,
        context_tokens=64,
        tied=False,
    )
    model = Decoder(shape, attention=partial(packed_attention, backend="auto"), recompute=recompute)
    initialise(model, seed=0)
    return model


def decoder_groups(model):
    named = list(model.named_parameters())
    int8 = [(name, p) for name, p in named if isinstance(p, VirtualWeight)]
    rest = [(name, p) for name, p in named if not isinstance(p, VirtualWeight)]
    return [{"params": int8}, {"params": rest, "kind": "adamw", "lr": 3e-3}]


def decoder_step(model, optimizer, step):
    tokens = torch.randint(0, 50, (48,), generator=torch.Generator().manual_seed(step % 4))
    layout = DocumentLayout.from_lengths([16, 32])
    loss = model(tokens, layout, tokens.roll(-1)) / 48
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def int8_decoder(**shape):
    model = tiny_decoder(**shape)
    quantize_model(model, group=16)
    return model, QAPOLLO(decoder_groups(model), lr=0.02, rank=4)


def test_our_decoder_trains_in_int8():
    model, optimizer = int8_decoder()
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 2 * 7
    losses = [decoder_step(model, optimizer, step) for step in range(40)]
    assert losses[0] == pytest.approx(3.91, abs=0.1)  # log 50
    assert sum(losses[-4:]) / 4 < 0.8 * losses[0]


def test_a_decoder_built_by_its_config_trains_in_int8():
    model = build_model(ModelConfig(name="1m"), vocab_size=50, device="cpu")
    initialise(model, seed=0)
    names = quantize_model(model)
    assert names[0] == "blocks.0.attention.query" and not any("head" in name for name in names)
    optimizer = QAPOLLO(decoder_groups(model), lr=0.01, rank=1, scale_type="tensor")
    losses = [decoder_step(model, optimizer, step) for step in range(8)]
    assert losses[-1] < losses[0] - 0.1


def test_released_and_recomputed_blocks_give_the_same_bits():
    runs = []
    for recompute, releases in (("nothing", False), ("nothing", True), ("blocks", True)):
        model, optimizer = int8_decoder(recompute=recompute)
        if releases:
            optimizer.enable_release(model)
        losses = [decoder_step(model, optimizer, step) for step in range(4)]
        runs.append((losses, list(model.state_dict().values())))
    for losses, values in runs[1:]:
        assert losses == runs[0][0] and all(map(torch.equal, values, runs[0][1]))


def test_a_module_used_twice_is_updated_once_when_both_uses_are_through():
    def run(*, releases):
        model = nn.ModuleDict({"twice": nn.Linear(16, 16, bias=False)})
        with torch.no_grad():
            model["twice"].weight.copy_(0.2 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
        quantize_model(model, group=16)
        optimizer = QAPOLLO(model.named_parameters(), lr=0.01, rank=1, scale_type="tensor")
        if releases:
            optimizer.enable_release(model)
        for step in range(3):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model["twice"](torch.tanh(model["twice"](x))).square().mean().backward()
            optimizer.step()
        return model["twice"].q

    assert torch.equal(run(releases=True), run(releases=False))


# torch.compile itself makes an object of the class while it traces, and asks activations for `.grad`.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_compiled_blocks_train_alike():
    """Attention breaks the graph of a block, so this takes several compilations."""
    runs = []
    for compiles in (False, True):
        model, optimizer = int8_decoder(num_layers=1)
        if compiles:
            compile_blocks(model, backend="aot_eager")
        runs.append([decoder_step(model, optimizer, step) for step in range(3)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_run_saved_and_loaded_as_checkpoints_are_goes_on_bit_for_bit():
    model, optimizer = int8_decoder()
    for step in range(3):
        decoder_step(model, optimizer, step)
    saved = state_of(model, optimizer)
    tensors = {key: value.clone() for key, value in saved.tensors.items()}
    assert (
        "model/blocks.0.attention.query.q" in tensors
        and "model/blocks.0.attention.query.weight" not in tensors
    )
    other, its_optimizer = int8_decoder()

    def fill(targets):
        for key, target in targets.items():
            target.copy_(tensors[key])

    load_state(other, its_optimizer, saved=tensors.keys(), plain=saved.plain, fill=fill)
    assert [decoder_step(model, optimizer, s) for s in range(3, 6)] == [
        decoder_step(other, its_optimizer, s) for s in range(3, 6)
    ]
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_copied_model_is_trained_by_its_own_optimizer_only():
    model, optimizer = int8_decoder()
    other, its_optimizer = copy.deepcopy((model, optimizer))
    assert decoder_step(other, its_optimizer, 0) == decoder_step(model, optimizer, 0)
    assert torch.equal(other.blocks[0].attention.key.q, model.blocks[0].attention.key.q)
    lonely = copy.deepcopy(optimizer)
    for group in lonely.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="has lost its module, which was copied"):
        lonely.step()
