"""Runs for a laptop: small vocabulary, text that is on the machine already, seconds to minutes on a CPU."""

from hardy.data.config import DataConfig
from hardy.model.config import ModelConfig
from hardy.optim.config import AdamWConfig, ScheduleConfig
from hardy.train.config import CheckpointConfig, LogConfig, LoopConfig, TrainConfig


def tiny() -> TrainConfig:
    """Byte model of 0.7 million parameters on Python's own sources: seconds on a CPU, no network."""
    return TrainConfig(
        model=ModelConfig(name="1m"),
        data=DataConfig(
            source="pydocs", tokenizer="bytes", pack_tokens=256, limit_mb=4.0, validation_fraction=0.05
        ),
        optim=AdamWConfig(lr=6e-3, schedule=ScheduleConfig(warmup_steps=10)),
        train=LoopConfig(steps=120, batch_packs=4, evaluate_every_steps=40, evaluate_packs=16),
        checkpoint=CheckpointConfig(every_steps=60),
        log=LogConfig(every_steps=5),
    )


def demo() -> TrainConfig:
    """Three million parameters and a trained tokenizer on Python's sources: minutes on a CPU, no network."""
    return TrainConfig(
        model=ModelConfig(name="3m"),
        data=DataConfig(source="pydocs", tokenizer="bpe:4096", pack_tokens=512, limit_mb=16.0),
        optim=AdamWConfig(lr=4e-3, schedule=ScheduleConfig(warmup_steps=20)),
        train=LoopConfig(steps=300, batch_packs=4, evaluate_every_steps=100, evaluate_packs=16),
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(every_steps=10),
    )
