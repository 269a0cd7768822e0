"""The trusted packs: the last of the validation text, in turn, and the gradient of their mean loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hardy.config import ConfigError, from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.comm import Alone
from hardy.distributed.robust.config import TrustedConfig
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.setup import assemble
from hardy.train.step import AutocastSetting
from hardy.train.trusted import packs_to_trust, trusted_draw


class Stream:
    """Packs whose content is their number."""

    num_packs = 10

    def batch(self, indices):
        numbers = torch.tensor([float(i) for i in indices])
        batch = SimpleNamespace(tokens_T=numbers, layout=None, labels_T=None, num_targets=len(indices))
        batch.to = lambda device: batch
        return batch


class Model(nn.Module):
    """Its gradient is the sum of the packs' numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, tokens_T, layout, labels_T):
        return self.weight * tokens_T.sum()


def test_the_last_packs_are_drawn_in_turn():
    model = Model()
    config = TrustedConfig(packs=2, pool_packs=3)
    draw = trusted_draw(model, Stream(), config, device=torch.device("cpu"), autocast=AutocastSetting())
    found = []
    for number in range(4):
        model.weight.grad = None
        draw(number)
        found.append(model.weight.grad.item())
    assert found == [(7 + 8) / 2, (9 + 7) / 2, (8 + 9) / 2, (7 + 8) / 2]


@pytest.mark.parametrize("stream", [None, Stream()])
def test_validation_text_that_is_too_short_is_refused(stream):
    with pytest.raises(ConfigError, match="strategy.trusted.pool_packs=10 .*lower it, raise data.validation"):
        packs_to_trust(TrustedConfig(pool_packs=10), stream)


def test_a_run_leaves_the_trusted_packs_out_of_validation(tmp_path):
    changes = {
        "model.shape": {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1},
        "data.source": "synthetic:constant,documents=60,mean=40",
        "data.pack_tokens": 32,
        "data.validation_fraction": 0.2,
        "train.batch_packs": 4,
        "train.evaluate_packs": 1000,
        "train.device": "cpu",
        "strategy.name": "dstar",
        "strategy.f": 0,
        "strategy.trusted.pool_packs": 5,
    }
    config = from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))
    corpus = prepare(config.data, cache_dir=tmp_path)
    assembly = assemble(config, Alone(), corpus=corpus, hardware=choose_hardware("cpu", "fp32"))
    assert assembly.plan.validation_packs == assembly.plan.validation.num_packs - 5
    assembly.worker.strategy.before_forward()
    parameters = list(assembly.worker.model.parameters())
    batch = assembly.plan.batches.at(0, assembly.worker)[0]
    assembly.worker.model(batch.tokens_T, batch.layout, batch.labels_T).backward()
    assembly.worker.strategy.reduce_gradients()
    assert all(param.grad.isfinite().all() for param in parameters)
