"""Bytes of a step in int8, counted and by formula: all that lives, with Mini and gradient release."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hardy.ops import quantize as quantize_module
from hardy.ops import tiles
from hardy.ops.quantize import quantize, requantize_step, whole
from hardy.ops.updates import Rounding
from hardy.optim.int8 import quantize_model
from hardy.optim.optimizers import QAPOLLO
from hardy.optim.state_bytes import quantized_bytes, state_bytes

LAYERS, WIDTH, TOKENS, BF16 = 6, 512, 32, 2
MATRIX = BF16 * WIDTH * WIDTH
ROW = BF16 * TOKENS * WIDTH
"""Bytes of one activation."""
TILE_ELEMENTS, SWEEP_BYTES = 1 << 12, 1 << 16
TEMPORARIES = 28 * TILE_ELEMENTS + SWEEP_BYTES
"""Of a tile of the int8 step or of dequantizing, and of APOLLO's sweeps."""
MINI = {"rank": 1, "scale_type": "tensor", "backend": "foreach"}


class LiveBytes(TorchDispatchMode):
    """Storages made inside that are still alive: their bytes, and how many are as large as a dense matrix."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.large = self.most_large = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [x.untyped_storage() for x in args if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage not in self.known and not any(storage is x for x in given):
                self.known.add(storage)
                self._change(storage.nbytes(), 1)
                weakref.finalize(storage, self._change, storage.nbytes(), -1)
        return result

    def _change(self, num_bytes, sign):
        self.now += sign * num_bytes
        self.large += sign * (num_bytes >= MATRIX)
        self.peak, self.most_large = max(self.peak, self.now), max(self.most_large, self.large)


@pytest.fixture
def small_tiles(monkeypatch):
    """Temporaries of fixed size made small, so that they do not hide what grows with the model."""
    monkeypatch.setitem(quantize_module._TILE_ELEMENTS, "cpu", TILE_ELEMENTS)
    monkeypatch.setitem(tiles._BUFFER_BYTES, "cpu", SWEEP_BYTES)


def int8_model():
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh()))).bfloat16()
    quantize_model(model)
    return model


def held_bytes(tensors):
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def step(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def measured(model, optimizer):
    """Return what was counted in a second step; the first makes what stays."""
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    step(model, optimizer, x)
    with LiveBytes() as live:
        step(model, optimizer, x)
    return live


def test_weights_and_state_are_as_large_as_the_formulas_say():
    model = int8_model()
    optimizer = QAPOLLO(model.named_parameters(), lr=0.01, **MINI)
    optimizer.materialize_state()
    stored = held_bytes([*model.parameters(), *model.buffers()])
    # A virtual weight is one bf16 element.
    assert stored == LAYERS * (quantized_bytes((WIDTH, WIDTH)) + BF16)
    state = held_bytes([value for entry in optimizer.state.values() for value in entry.values()])
    assert state == LAYERS * state_bytes("apollo", (WIDTH, WIDTH), settings=MINI)
    assert stored + state < 1.06 * LAYERS * WIDTH * WIDTH, "close to a byte per weight"


def test_a_released_step_holds_one_dense_matrix_at_a_time(small_tiles):
    model = int8_model()
    optimizer = QAPOLLO(model.named_parameters(), lr=0.01, **MINI)
    optimizer.enable_release(model)
    live = measured(model, optimizer)
    assert live.most_large == 1, "the dense weight, then its gradient; the virtual weight is never made"
    # Outputs that the backward pass needs, four gradients of them on their way, one matrix, one tile.
    formula = LAYERS * ROW + 4 * ROW + MATRIX + TEMPORARIES
    assert LAYERS * ROW + MATRIX < live.peak <= formula
    assert formula < 1.6 * (LAYERS * ROW + MATRIX), "or the bounds would say nothing"


def test_without_release_all_gradients_are_held_together(small_tiles):
    model = int8_model()
    live = measured(model, QAPOLLO(model.named_parameters(), lr=0.01, **MINI))
    assert live.most_large == LAYERS
    assert LAYERS * MATRIX < live.peak <= LAYERS * (ROW + MATRIX) + 4 * ROW + TEMPORARIES


def test_after_a_step_nothing_is_left_over(small_tiles):
    model = int8_model()
    optimizer = QAPOLLO(model.named_parameters(), lr=0.01, **MINI)
    optimizer.enable_release(model)
    assert measured(model, optimizer).now == 0


@pytest.mark.parametrize(("shape", "group"), [((2048, 1408), 128), ((3, 1 << 20), 128), ((1 << 20, 3), 128)])
def test_temporaries_of_a_step_stay_under_16_mib_on_every_device(shape, group):
    """Tensors on "meta" take the tiles of a device that is no CPU, and no memory."""
    matrix = quantize(torch.empty(shape, device="meta"), group=group)
    one, grad = torch.ones(1, device="meta"), torch.empty(shape, dtype=torch.bfloat16, device="meta")
    how = Rounding(mode="stochastic", key=1, step=torch.ones((), device="meta"), place=whole(shape))
    with LiveBytes() as live:
        requantize_step(matrix, grad, factor=one, along="all", keep=one, rounding=how)
    assert 12 << 20 < live.peak <= 16 << 20
