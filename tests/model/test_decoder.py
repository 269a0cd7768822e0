from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, embedding, linear, scaled_dot_product_attention, silu

from hardy.model.decoder import KeyValueCache, compile_blocks, unit_names
from hardy.ops.attention import packed_attention
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout

LENGTHS = (7, 1, 12, 7)
# torch.compile itself asks activations for `.grad` after a graph break.
TORCH_LOOKS_AT_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def pack(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(50, (sum(LENGTHS),), generator=generator)
    labels_T = torch.randint(50, (sum(LENGTHS),), generator=generator)
    labels_T[3] = IGNORED_LABEL
    return tokens_T, DocumentLayout.from_lengths(LENGTHS), labels_T


def textbook(model, tokens_T):
    """The logits of one document, from the state dict alone, with a batch dimension and complex rotation."""
    shape, weights = model.shape, model.state_dict()

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + shape.norm_eps).rsqrt() * weights[name]

    def heads(x, name):
        return linear(x, weights[name]).view(1, len(tokens_T), -1, shape.head_size).transpose(1, 2)

    half = shape.head_size // 2
    speeds = shape.rope_theta ** (-torch.arange(half, dtype=x_dtype(weights)) / half)
    angles = torch.arange(len(tokens_T))[:, None] * speeds
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(x):
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    x = embedding(tokens_T, weights["embedding.weight"]).unsqueeze(0)
    for layer in range(shape.num_layers):
        at = f"blocks.{layer}."
        h = norm(x, at + "attention_norm.weight")
        query, key = (rotated(heads(h, f"{at}attention.{kind}.weight")) for kind in ("query", "key"))
        value = heads(h, at + "attention.value.weight")
        group = shape.num_heads // shape.num_kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(out, weights[at + "attention.output.weight"])
        h = norm(x, at + "feed_forward_norm.weight")
        gate, up, down = (weights[f"{at}feed_forward.{kind}.weight"] for kind in ("gate", "up", "down"))
        x = x + linear(silu(linear(h, gate)) * linear(h, up), down)
    head = weights["embedding.weight" if shape.tied else "head.weight"]
    return linear(norm(x, "norm.weight"), head)[0]


def x_dtype(weights):
    return weights["norm.weight"].dtype


def grads(model, *batch):
    model.zero_grad()
    total = model(*batch)
    total.backward()
    return total.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_packed_logits_are_the_textbooks_for_each_document(make_decoder, tied, num_kv_heads):
    model = make_decoder(tied=tied, num_kv_heads=num_kv_heads).double()
    tokens_T, layout, _ = pack()
    logits_TV = model(tokens_T, layout)
    assert logits_TV.shape == (sum(LENGTHS), 50)
    for ours, document in zip(logits_TV.split(LENGTHS), tokens_T.split(LENGTHS), strict=True):
        torch.testing.assert_close(ours, textbook(model, document), rtol=1e-6, atol=1e-6)  # angles are fp32


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_sum_over_labels(make_decoder, tied):
    model = make_decoder(tied=tied)
    tokens_T, layout, labels_T = pack()
    total = model(tokens_T, layout, labels_T)
    assert (total.dtype, total.shape) == (torch.float32, ())
    expected = cross_entropy(model(tokens_T, layout), labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
    torch.testing.assert_close(total, expected)
    ours = torch.autograd.grad(total, list(model.parameters()))
    for mine, right in zip(ours, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_a_token_changes_nothing_outside_its_document(make_decoder):
    model = make_decoder()
    tokens_T, layout, _ = pack()
    changed_T = tokens_T.clone()
    changed_T[10] = (changed_T[10] + 1) % 50  # third document, place 2
    before, after = model(tokens_T, layout), model(changed_T, layout)
    same_T = (before == after).all(dim=1)
    assert same_T.tolist() == [not 10 <= place < 20 for place in range(sum(LENGTHS))]


def test_recomputing_blocks_changes_no_bit(make_decoder):
    keep, again = make_decoder(), make_decoder(recompute="blocks")
    calls = []
    again.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    total, kept = grads(keep, *pack())
    same_total, recomputed = grads(again, *pack())
    assert len(calls) == 2
    assert torch.equal(total, same_total)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@TORCH_LOOKS_AT_GRAD
def test_compiled_blocks_equal_the_eager_ones(make_decoder):
    eager, compiled = make_decoder(), make_decoder()
    torch.compiler.reset()
    compile_blocks(compiled, backend="aot_eager")
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    total, plain = grads(eager, *pack())
    same_total, traced = grads(compiled, *pack())
    torch.testing.assert_close(same_total, total, rtol=1e-6, atol=0)
    for name in plain:
        torch.testing.assert_close(traced[name], plain[name], rtol=1e-4, atol=1e-5)


@TORCH_LOOKS_AT_GRAD
def test_other_packs_do_not_compile_the_blocks_again(make_decoder):
    model = make_decoder()
    torch.compiler.reset()  # what other tests compiled has their sizes
    compile_blocks(model, backend="eager", dynamic=True)
    tokens_T = torch.zeros(27, dtype=torch.int64)  # 24, the hidden size too, would be taken for it
    with torch.no_grad():
        model(tokens_T, DocumentLayout.from_lengths([20, 7]))
        with torch.compiler.set_stance("fail_on_recompile"):
            out = model(tokens_T, DocumentLayout.from_lengths([3, 9, 15]))
            longer = model(torch.zeros(30, dtype=torch.int64), DocumentLayout.from_lengths([30]))
    assert out.isfinite().all() and longer.isfinite().all()


@pytest.mark.parametrize("steps", [(5, 1, 1, 4), (1,) * 11], ids=str)
def test_a_cache_gives_the_logits_of_one_pass(make_decoder, steps):
    model = make_decoder()
    tokens_T = pack()[0][: sum(steps)]
    whole_TV = model(tokens_T, DocumentLayout.from_lengths([sum(steps)]))
    cache = KeyValueCache(num_layers=2, capacity_tokens=11)
    parts = []
    with torch.no_grad():
        for part_T in tokens_T.split(steps):
            parts.append(model(part_T, DocumentLayout.from_lengths([len(part_T)]), cache=cache))
    assert cache.num_tokens == sum(steps)
    torch.testing.assert_close(torch.cat(parts), whole_TV, rtol=1e-4, atol=1e-5)


def test_a_cache_refuses_what_it_cannot_hold(make_decoder):
    model, cache = make_decoder(), KeyValueCache(num_layers=2, capacity_tokens=3)
    with pytest.raises(ValueError, match="the cache holds 3 tokens, got 4"):
        model(torch.zeros(4, dtype=torch.int64), DocumentLayout.from_lengths([4]), cache=cache)
    with pytest.raises(ValueError, match="a cache continues one document, the layout has 2"):
        model(torch.zeros(2, dtype=torch.int64), DocumentLayout.from_lengths([1, 1]), cache=cache)


def test_autocast_keeps_the_loss_and_the_stream_in_single_precision(make_decoder):
    model = make_decoder()
    tokens_T, layout, labels_T = pack()
    seen = {}
    model.blocks[0].register_forward_hook(lambda _m, _a, out: seen.update(stream=out.dtype))
    model.blocks[0].attention.query.register_forward_hook(lambda _m, _a, out: seen.update(query=out.dtype))
    exact, kept = grads(model, tokens_T, layout, labels_T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, cast = grads(model, tokens_T, layout, labels_T)
    assert seen == {"stream": torch.float32, "query": torch.bfloat16}
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=5e-2, atol=0)
    for name, grad in cast.items():
        assert grad.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(grad.flatten(), kept[name].flatten(), dim=0) > 0.98


def test_a_model_from_the_meta_device_is_whole(make_decoder):
    model = make_decoder()
    with torch.device("meta"):
        copy = type(model)(model.shape, attention=partial(packed_attention, backend="reference"))
    assert list(copy.buffers()) == []
    copy.to_empty(device="cpu").load_state_dict(model.state_dict())
    tokens_T, layout, _ = pack()
    assert torch.equal(copy(tokens_T, layout), model(tokens_T, layout))


def test_units_are_the_blocks_in_order(make_decoder):
    model = make_decoder(num_layers=3)
    assert unit_names(model) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [model.get_submodule(name) for name in unit_names(model)] == list(model.blocks)
    with pytest.raises(TypeError, match="a Linear does not say what its units are"):
        unit_names(torch.nn.Linear(1, 1))


def test_attention_is_whatever_was_given(make_decoder):
    seen = []

    def attention(query_THK, key_THK, value_THK, queries, *, keys=None):
        seen.append((query_THK.shape, key_THK.shape, queries.lengths, keys))
        return torch.zeros_like(query_THK)

    model = make_decoder(attention=attention)
    tokens_T, layout, _ = pack()
    model(tokens_T, layout)
    assert seen == [((27, 4, 6), (27, 2, 6), LENGTHS, None)] * 2
