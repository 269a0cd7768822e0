import pytest
import torch

from hardy.model.decoder import Decoder
from hardy.model.init import DEVIATION, initialise
from hardy.ops.attention import packed_attention


def on_meta(shape):
    with torch.device("meta"):
        return Decoder(shape, attention=packed_attention)


def test_weights_depend_on_seed_and_name_alone(tiny_shape):
    one, two, other = (on_meta(tiny_shape).to_empty(device="cpu") for _ in range(3))
    torch.nn.init.normal_(two.embedding.weight)  # whatever was there or was drawn before
    for model, seed in ((one, 0), (two, 0), (other, 1)):
        initialise(model, seed=seed)
    for (name, first), second, third in zip(
        one.named_parameters(), two.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(first, second)
        assert torch.equal(first, third) == name.endswith("norm.weight")
    assert not torch.equal(one.blocks[0].attention.query.weight, one.blocks[1].attention.query.weight)


def test_deviations_follow_the_rule(tiny_shape):
    model = on_meta(tiny_shape).to_empty(device="cpu")
    initialise(model, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all()
            continue
        writes = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        expected = DEVIATION / (2 * tiny_shape.num_layers) ** 0.5 if writes else DEVIATION
        noise = 4 * expected / (2 * parameter.numel()) ** 0.5
        assert abs(parameter.std().item() - expected) < noise
        assert abs(parameter.mean().item()) < 4 * expected / parameter.numel() ** 0.5


def test_a_sharded_model_keeps_its_part_of_the_same_weights(tiny_shape):
    whole = on_meta(tiny_shape).to_empty(device="cpu")
    initialise(whole, seed=3)
    for rank in range(2):
        part = on_meta(tiny_shape).to_empty(device="cpu")
        kept = {}

        def keep(parameter, full, *, rank=rank, kept=kept):
            kept[parameter] = full.chunk(2)[rank]

        initialise(part, seed=3, place=keep)
        for mine, parameter in zip(part.parameters(), whole.parameters(), strict=True):
            assert torch.equal(kept[mine], parameter.chunk(2)[rank])


def test_a_parameter_without_memory_is_named(tiny_shape):
    with pytest.raises(ValueError, match="parameter embedding.weight is on the meta device; give it memory"):
        initialise(on_meta(tiny_shape), seed=0)


def test_a_model_that_is_not_ours_is_left_alone():
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    initialise(model, seed=0)
    assert torch.equal(model.weight, before)
