"""The adaptive recipe: AdamW, a rate led by the loss, clipping by the gradient's own history.

Paper: "Adaptive Optimization for Enhanced Efficiency in LLM Training" (arXiv 2412.04718), of which only the
abstract could be had. This is hardy's reading of it, a recipe and no new method; every number is ours, none
is the paper's.
"""

from hardy.data.config import DataConfig
from hardy.model.config import ModelConfig
from hardy.optim.config import AdamWConfig, GuardConfig, PerfDecayConfig, ScheduleConfig
from hardy.train.config import CheckpointConfig, LogConfig, LoopConfig, TrainConfig


def adaptive() -> TrainConfig:
    """Byte model of a million parameters by the adaptive recipe: a minute on a CPU, no network."""
    steps = 200
    return TrainConfig(
        model=ModelConfig(name="1m"),
        data=DataConfig(
            source="pydocs", tokenizer="bytes", pack_tokens=256, limit_mb=4.0, validation_fraction=0.05
        ),
        optim=pretrain(lr=2e-3, steps=steps),
        train=LoopConfig(steps=steps, batch_packs=8, evaluate_every_steps=50),
        checkpoint=CheckpointConfig(every_steps=50),
        log=LogConfig(every_steps=10),
    )


def pretrain(*, lr: float, steps: int) -> AdamWConfig:
    """Return the optimizer of the task "pretrain": training from scratch for `steps` steps.

    The recipe takes rates from 1e-3 to 1e-2 for small models, 6e-4 below 1 billion parameters, 3e-4 above.
    An observation is the mean of 2 % of the steps, but of 10 at least: that of 4 is mostly noise, which the
    schedule takes for a stall (docs/howto/adaptive.md has the numbers).
    """
    interval_steps = max(10, round(0.02 * steps))
    return AdamWConfig(
        lr=lr,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        schedule=ScheduleConfig(
            name="performance",
            warmup_steps=round(0.05 * steps),
            performance=PerfDecayConfig(interval_steps=interval_steps),
        ),
        guard=GuardConfig(history="global"),
    )
