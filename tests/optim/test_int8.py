"""Which weights become int8, what is kept, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hardy.config import ConfigError
from hardy.ops.philox import key_for
from hardy.ops.quantize import quantize, whole
from hardy.ops.updates import Rounding
from hardy.optim.int8 import dequantize_model, quantize_model
from hardy.optim.routing import route_params


class Block(nn.Module):
    def __init__(self, *, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(50, 40)
        self.up = nn.Linear(40, 24)
        self.down = nn.Linear(24, 40, bias=False)
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


class Square(nn.Linear):
    """Not nn.Linear itself."""


def seeded(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    return model


# ---- What is replaced --------------------------------------------------------------------------------------


def test_matrices_of_linear_modules_are_replaced_and_head_and_embedding_are_not():
    model = seeded(Block())
    bias = model.up.bias
    assert quantize_model(model) == ["up", "down"]
    assert type(model.head) is nn.Linear and type(model.embedding) is nn.Embedding
    assert model.up.bias is bias and model.down.bias is None
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in Block().named_parameters()]


def test_the_head_is_replaced_on_demand():
    assert quantize_model(seeded(Block()), quantize_embed=True) == ["up", "down", "head"]
    assert quantize_model(seeded(Block()), vocab_size=24) == ["down", "head"], "a head is known by its rows"


def test_tied_shared_and_frozen_weights_routers_and_other_classes_are_left_alone():
    assert quantize_model(seeded(Block(tied=True)), quantize_embed=True) == ["up", "down"]
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "b", "frozen", "router", "last")})
    model["again"] = model["a"]
    model["same weight"] = nn.Linear(8, 8)
    model["same weight"].weight = model["b"].weight
    model["frozen"].weight.requires_grad_(False)
    model["other class"] = Square(8, 8)
    assert quantize_model(model) == ["last"]


def test_values_are_those_of_the_dense_model_within_half_a_step():
    dense, model = seeded(Block()), seeded(Block())
    quantize_model(model, group=16)
    for name in ("up", "down"):
        layer, weight = getattr(model, name), getattr(dense, name).weight
        assert layer.group == 16 and layer.scale.shape == (weight.shape[0], -(-weight.shape[1] // 16))
        steps = (
            layer.q.float() - layer.zero_point.float().repeat_interleave(16, 1)[:, : weight.shape[1]]
        ).abs()
        assert steps.max() <= 254
    quantize_model(dense, group=16)
    assert torch.equal(dense.up.q, model.up.q)
    dequantize_model(model)
    scale = dense.up.scale.repeat_interleave(16, 1)[:, :40]
    assert ((model.up.weight - seeded(Block()).up.weight).abs() / scale).max() < 0.5 + 1e-4


def test_stochastic_conversion_follows_seed_and_name():
    def codes(*, wrapped=False, **settings):
        model = seeded(Block())
        outer = nn.ModuleDict({"_orig_mod": model}) if wrapped else model
        quantize_model(outer, rounding="stochastic", **settings)
        return model.up.q

    nearest = seeded(Block())
    quantize_model(nearest)
    assert torch.equal(codes(), codes()) and torch.equal(codes(), codes(wrapped=True))
    assert not torch.equal(codes(), codes(seed=1)) and not torch.equal(codes(), nearest.up.q)
    key = key_for(0, "up.weight", purpose="hardy.q8.v1")
    how = Rounding(mode="stochastic", key=key, step=torch.tensor(0), place=whole((24, 40)))
    assert torch.equal(codes(), quantize(seeded(Block()).up.weight.detach(), group=128, rounding=how).q)


def test_a_model_on_meta_takes_a_checkpoint_after_conversion():
    model = seeded(Block())
    quantize_model(model)
    with torch.device("meta"):
        empty = Block()
    quantize_model(empty)
    assert empty.up.q.is_meta
    empty.to_empty(device="cpu")
    assert empty.load_state_dict(model.state_dict()) == ([], [])
    tokens = torch.arange(50)
    assert torch.equal(empty(tokens), model(tokens))


def test_back_and_forth_keeps_the_model_and_its_mode():
    model = seeded(Block()).bfloat16().eval()
    quantize_model(model)
    tokens, keys = torch.arange(50), list(Block().state_dict())
    wanted = model(tokens)
    assert not model.up.training
    assert dequantize_model(model) == ["up", "down"]
    assert type(model.up) is nn.Linear and model.up.weight.dtype == torch.bfloat16 and not model.up.training
    assert list(model.state_dict()) == keys and torch.equal(model(tokens), wanted)
    quantize_model(model)
    dequantize_model(model, torch.float32)
    assert model.down.weight.dtype == torch.float32


def test_routing_knows_int8_weights_as_matrices():
    model = seeded(Block())
    quantize_model(model)
    groups = {group["role"]: [name for name, _ in group["params"]] for group in route_params(model)}
    assert groups["matrix"] == ["up.weight", "down.weight"]


# ---- What is refused ---------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4).requires_grad_(False))]
)
def test_a_model_with_nothing_to_replace_is_refused(model):
    with pytest.raises(
        ConfigError, match="no nn.Linear whose weight could be int8.*train it by APOLLO as it is"
    ):
        quantize_model(model)


def test_a_sharded_model_is_refused(alone):
    model = seeded(Block())
    fully_shard(model)
    with pytest.raises(
        ConfigError, match=r"up.weight is sharded \(DTensor\).*leave out quantize_model or fully_shard"
    ):
        quantize_model(model)


def test_torch_refuses_to_shard_an_int8_model(alone):
    model = seeded(Block())
    quantize_model(model)
    with pytest.raises(NotImplementedError, match="FSDP does not support non-contiguous parameters"):
        fully_shard(model)


def test_a_model_in_ddp_is_refused(alone):
    with pytest.raises(
        ConfigError, match="in DistributedDataParallel already; call quantize_model before wrapping"
    ):
        quantize_model(DistributedDataParallel(seeded(Block())))
