"""What our optimizers promise in trainers that need no adapter: to train as in a plain loop, and to resume.

The Trainer of transformers is in tests/integrations/test_hf.py; accelerate under FSDP2 in tests/mp.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hardy.optim.make import make_optimizer

STEPS, MICRO_BATCHES, CLIP = 6, 2, 0.5
PRESETS = ("apollo-mini", "smmf", "muon", "torch.optim.AdamW")
TOKENS = torch.randint(30, (STEPS * MICRO_BATCHES * 10,), generator=torch.Generator().manual_seed(0))


def make_model():
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 30))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def make(model, preset):
    optimizer = make_optimizer(model, preset, lr=0.01, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens), tokens)


def batches():
    return DataLoader(TensorDataset(TOKENS), batch_size=10)


def clip(optimizer):
    """Clip as Lightning does, which adds the norms up in the order of the groups."""
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)


def plain(preset):
    """Train by hand."""
    model = make_model()
    optimizer, scheduler = make(model, preset)
    for index, (tokens,) in enumerate(batches()):
        (loss_of(model, tokens) / MICRO_BATCHES).backward()
        if index % MICRO_BATCHES == MICRO_BATCHES - 1:
            clip(optimizer)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return list(model.parameters())


def by_accelerate(preset, folder):
    """Train by accelerate, with a stop after four steps."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (extra dev)")
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO_BATCHES, step_scheduler_with_optimizer=False
    )

    def build():
        model = make_model()
        return accelerator.prepare(model, *make(model, preset))

    def train(model, optimizer, scheduler, which):
        for tokens in which:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, tokens))
                if accelerator.sync_gradients:
                    clip(optimizer)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()

    data = [tokens for (tokens,) in batches()]
    first = build()
    train(*first, data[: 4 * MICRO_BATCHES])
    accelerator.save_state(folder)
    accelerator.free_memory()
    model, optimizer, scheduler = build()
    accelerator.load_state(folder)
    train(model, optimizer, scheduler, data[4 * MICRO_BATCHES :])
    accelerator.free_memory()
    return list(model.parameters())


def by_lightning(preset, folder):
    """Train by Lightning, with a stop after four steps."""
    lightning = pytest.importorskip(
        "pytorch_lightning", reason="pytorch-lightning is not installed (extra dev)"
    )

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_model()

        def training_step(self, batch, index):
            # A loader begins anew after a resume in the middle of an epoch, so the step says which tokens.
            at = self.trainer.global_step * MICRO_BATCHES + index % MICRO_BATCHES
            return loss_of(self.net, TOKENS.view(-1, 10)[at])

        def configure_optimizers(self):
            optimizer, scheduler = make(self.net, preset)  # projections follow the names of parameters
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def fit(steps, **more):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            accumulate_grad_batches=MICRO_BATCHES,
            gradient_clip_val=CLIP,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, batches(), weights_only=True, **more)
        return module, trainer

    path = f"{folder}/four.ckpt"
    fit(4)[1].save_checkpoint(path)
    module, _ = fit(STEPS, ckpt_path=path)
    return list(module.net.parameters())


TRAINERS = {"accelerate": by_accelerate, "lightning": by_lightning}


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # Lightning asks torch in a way that torch 2.13 is leaving
    "ignore:.*does not have many workers",
    "ignore:.*You're resuming from a checkpoint that ended",
)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_trains_stops_and_resumes_as_a_loop_of_ones_own(trainer, preset, tmp_path):
    for ours, expected in zip(TRAINERS[trainer](preset, str(tmp_path)), plain(preset), strict=True):
        assert torch.equal(ours, expected)
