"""Text that is known to be good: the last packs of the validation text, on whose gradient some rules lean."""

from collections.abc import Callable

import torch
from torch import nn

from hardy.config import ConfigError
from hardy.data.stream import PackStream
from hardy.distributed.robust.config import TrustedConfig
from hardy.train.step import AutocastSetting


def packs_to_trust(config: TrustedConfig, validation: PackStream | None) -> range:
    """Return which packs of the validation text are trusted; validation leaves them out.

    Raises:
        ConfigError: there is no validation text, or nothing would be left of it.
    """
    there = (validation.num_packs or 0) if validation else 0
    if there <= config.pool_packs:
        raise ConfigError(
            f"strategy.trusted.pool_packs={config.pool_packs} are taken from the validation text, which has "
            f"{there} packs, and one at least must be left; lower it, raise data.validation_fraction, or "
            f"lower data.pack_tokens"
        )
    return range(there - config.pool_packs, there)


def trusted_draw(
    model: nn.Module,
    validation: PackStream,
    config: TrustedConfig,
    *,
    device: torch.device,
    autocast: AutocastSetting,
) -> Callable[[int], None]:
    """Return what adds the gradient of the mean loss on trusted batch number n to the model's `grad`.

    Batches go through the trusted packs in turn; all workers read the same ones.
    """
    pool = packs_to_trust(config, validation)

    def draw(number: int) -> None:
        first = number * config.packs
        indices = [pool[(first + i) % len(pool)] for i in range(config.packs)]
        batch = validation.batch(indices).to(device)
        with autocast.context():
            nll = model(batch.tokens_T, batch.layout, batch.labels_T)
        (nll / batch.num_targets).backward()

    return draw
