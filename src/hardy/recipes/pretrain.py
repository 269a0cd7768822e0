"""Pre-training of Llama shapes on C4 with settings customary for their size; needs GPUs and the extra `hf`.

Steps make about 20 tokens per parameter for the three smaller models and 2.5 for the largest; only so much of
C4 is read as those tokens need (5 bytes a token). Peak learning rates, cosine decay to a tenth, beta2 = 0.95
and 0.13 to 2 million tokens per step follow common practice at these sizes; none was tuned by us.
"""

from hardy.data.config import DataConfig
from hardy.distributed.config import SynchronousConfig
from hardy.distributed.mesh_config import MeshConfig
from hardy.model.config import ModelConfig
from hardy.optim.config import AdamWConfig, ScheduleConfig
from hardy.train.config import CheckpointConfig, LoopConfig, TrainConfig

SOURCE = "hf:allenai/c4@en"
TOKENIZER = "bpe:32000"
PACK_TOKENS = 1024


def pretrain_60m() -> TrainConfig:
    """60 M parameters, 1.3 B tokens of C4; one GPU."""
    return _pretrain("60m", lr=2e-3, steps=10_000, batch_packs=128, micro_packs=16, warmup_steps=500)


def pretrain_350m() -> TrainConfig:
    """350 M parameters, 7.3 B tokens of C4; one to eight GPUs."""
    return _pretrain("350m", lr=1e-3, steps=14_000, batch_packs=512, micro_packs=8, warmup_steps=1000)


def pretrain_1b() -> TrainConfig:
    """1.3 B parameters, 26 B tokens of C4; eight GPUs, sharded."""
    return _pretrain(
        "1b", lr=6e-4, steps=25_000, batch_packs=1024, micro_packs=8, warmup_steps=2000, shards=8
    )


def pretrain_7b() -> TrainConfig:
    """7 B parameters, 17 B tokens of C4; eight large GPUs, sharded, blocks recomputed."""
    return _pretrain("7b", lr=3e-4, steps=8_000, batch_packs=2048, micro_packs=8, warmup_steps=1000, shards=8)


def _pretrain(
    size: str,
    *,
    lr: float,
    steps: int,
    batch_packs: int,
    micro_packs: int,
    warmup_steps: int,
    shards: int = 1,
) -> TrainConfig:
    """Return what the runs have in common, for one size."""
    return TrainConfig(
        model=ModelConfig(name=size, recompute="blocks" if shards > 1 else "nothing"),
        data=DataConfig(
            source=SOURCE,
            tokenizer=TOKENIZER,
            pack_tokens=PACK_TOKENS,
            validation_fraction=0.001,
            limit_mb=steps * batch_packs * PACK_TOKENS * 5 / 1e6,
        ),
        optim=AdamWConfig(lr=lr, schedule=ScheduleConfig(warmup_steps=warmup_steps)),
        strategy=SynchronousConfig(mesh=MeshConfig(shards=shards)),
        train=LoopConfig(
            steps=steps,
            batch_packs=batch_packs,
            micro_packs=micro_packs,
            device="cuda",
            evaluate_every_steps=500,
            evaluate_packs=256,
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
    )
