"""Predictions of memory against what CUDA's allocator saw."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from hardy.distributed.comm import Alone
from hardy.distributed.strategy import Synchronous
from hardy.model.decoder import Decoder
from hardy.model.init import initialise
from hardy.model.presets import PRESETS
from hardy.ops.attention import packed_attention
from hardy.ops.packed import DocumentLayout, PackedBatch
from hardy.optim.make import make_optimizer
from hardy.train.memory import predict
from hardy.train.parameter_memory import Choice
from hardy.train.step import AutocastSetting, Worker, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = replace(PRESETS["60m"], num_layers=6)
LENGTHS = [700, 300, 1024, 24]


@pytest.mark.parametrize("name", ["adamw", "apollo", "apollo_mini", "smmf", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
@pytest.mark.parametrize("recompute", ["nothing", "blocks"])
def test_the_peak_of_a_step(name, precision, recompute):
    choice = Choice(optimizer=name, precision=precision)
    tokens = sum(LENGTHS)
    with torch.device("cuda"):
        model = Decoder(SHAPE, attention=partial(packed_attention, backend="auto"), recompute=recompute)
    initialise(model, seed=0)
    if precision == "bf16_pure":
        model.to(torch.bfloat16)
    worker = Worker(
        model=model,
        optimizer=make_optimizer(model, name, lr=1e-4),
        strategy=Synchronous(model, Alone()),
        comm=Alone(),
        device=torch.device("cuda"),
        autocast=AutocastSetting(device_type="cuda", enabled=precision == "bf16"),
        clip_norm=1.0,
    )
    tokens_T = torch.arange(tokens) % SHAPE.vocab_size
    layout = DocumentLayout.from_lengths(LENGTHS)
    pack = PackedBatch(tokens_T=tokens_T, labels_T=tokens_T.clone(), layout=layout, num_targets=tokens).to(
        "cuda"
    )
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        train_step(worker, [pack], num_targets=tokens, lr=1e-4, wants_stop=False)
    most = torch.cuda.max_memory_allocated()
    predicted = predict(SHAPE, choice, tokens=tokens, recompute=recompute)
    share = predicted.peak_bytes / most
    print(f"{name} {precision} {recompute}: {most / 1e6:.0f} MB, predicted {share:.3f} of it")
    assert predicted.peak_bytes == pytest.approx(most, rel=0.05), predicted.peak_at
