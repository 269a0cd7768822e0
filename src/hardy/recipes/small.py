"""Runs for a laptop: small vocabulary, text that is on the machine already, seconds to minutes on a CPU."""

from hardy.data.config import DataConfig
from hardy.model.config import ModelConfig
from hardy.optim.config import AdamWConfig, ScheduleConfig
from hardy.train.config import CheckpointConfig, LogConfig, LoopConfig, TrainConfig


def tiny() -> TrainConfig:
    """Byte model of a million parameters on Python's own sources: seconds on a CPU, no network."""
    return TrainConfig(
        model=ModelConfig(name="1m"),
        data=DataConfig(
            source="pydocs", tokenizer="bytes", pack_tokens=256, limit_mb=4.0, validation_fraction=0.05
        ),
        optim=AdamWConfig(lr=2e-3, schedule=ScheduleConfig(warmup_steps=10)),
        train=LoopConfig(steps=60, batch_packs=8, evaluate_every_steps=20),
        checkpoint=CheckpointConfig(every_steps=20),
        log=LogConfig(every_steps=5),
    )


def demo() -> TrainConfig:
    """Model of 2.4 million parameters with a tokenizer of its own: minutes on a CPU, no network."""
    return TrainConfig(
        model=ModelConfig(name="3m"),
        data=DataConfig(source="pydocs", tokenizer="bpe:1024", pack_tokens=256),
        optim=AdamWConfig(lr=3e-3, schedule=ScheduleConfig(warmup_steps=20)),
        train=LoopConfig(steps=450, batch_packs=8, evaluate_every_steps=50),
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(every_steps=10),
    )
