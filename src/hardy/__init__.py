"""Efficient and robust training of language models in PyTorch.

Names are loaded on first use, so that `import hardy` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "APOLLO",
    "SMMF",
    "APOLLOMini",
    "AdaptiveAdamW",
    "Alone",
    "CheckpointStore",
    "Communicator",
    "Decoder",
    "PackStream",
    "PackedBatch",
    "SimWorld",
    "Strategy",
    "Synchronous",
    "TrainConfig",
    "UserError",
    "Worker",
    "generate",
    "make_optimizer",
    "prepare",
    "recipe",
    "train_step",
]

if TYPE_CHECKING:
    from hardy.config import UserError as UserError
    from hardy.data.corpus import prepare as prepare
    from hardy.data.stream import PackStream as PackStream
    from hardy.distributed.comm import Alone as Alone
    from hardy.distributed.comm import Communicator as Communicator
    from hardy.distributed.simulation import SimWorld as SimWorld
    from hardy.distributed.strategy import Strategy as Strategy
    from hardy.distributed.strategy import Synchronous as Synchronous
    from hardy.model.decoder import Decoder as Decoder
    from hardy.model.generate import generate as generate
    from hardy.ops.packed import PackedBatch as PackedBatch
    from hardy.optim.make import make_optimizer as make_optimizer
    from hardy.optim.optimizers import APOLLO as APOLLO
    from hardy.optim.optimizers import SMMF as SMMF
    from hardy.optim.optimizers import AdaptiveAdamW as AdaptiveAdamW
    from hardy.optim.optimizers import APOLLOMini as APOLLOMini
    from hardy.recipes.table import recipe as recipe
    from hardy.train.checkpoint import CheckpointStore as CheckpointStore
    from hardy.train.config import TrainConfig as TrainConfig
    from hardy.train.step import Worker as Worker
    from hardy.train.step import train_step as train_step
else:
    _HOME = {
        "APOLLO": "hardy.optim.optimizers",
        "APOLLOMini": "hardy.optim.optimizers",
        "AdaptiveAdamW": "hardy.optim.optimizers",
        "Alone": "hardy.distributed.comm",
        "CheckpointStore": "hardy.train.checkpoint",
        "Communicator": "hardy.distributed.comm",
        "Decoder": "hardy.model.decoder",
        "PackStream": "hardy.data.stream",
        "PackedBatch": "hardy.ops.packed",
        "SMMF": "hardy.optim.optimizers",
        "SimWorld": "hardy.distributed.simulation",
        "Strategy": "hardy.distributed.strategy",
        "Synchronous": "hardy.distributed.strategy",
        "TrainConfig": "hardy.train.config",
        "UserError": "hardy.config",
        "Worker": "hardy.train.step",
        "generate": "hardy.model.generate",
        "make_optimizer": "hardy.optim.make",
        "prepare": "hardy.data.corpus",
        "recipe": "hardy.recipes.table",
        "train_step": "hardy.train.step",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'hardy' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)
