"""How much memory training takes, before it starts. Free of torch.

Parameters by formula (`parameter_memory.py`), a step of hardy's decoder by its walk (`step_walk.py`). On a
CPU predictions were compared with all live storages of real steps, on CUDA with what the allocator saw at
most (`tests/gpu/test_memory.py`); fragmentation is left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hardy.model.presets import DecoderShape
from hardy.train.parameter_memory import Choice, Held, decoder_weights, held_for
from hardy.train.step_memory import Kind, StepPlan
from hardy.train.step_walk import walk_step

MOST_PACKS = 1 << 16
"""Where the search for the largest micro-batch ends."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run holds on one worker."""

    held: Held
    peak_bytes: int
    peak_at: str
    """What goes on at the fullest moment."""
    at_peak: Mapping[Kind, int]
    """What is held then; adds up to the peak."""


def predict(
    shape: DecoderShape,
    choice: Choice,
    *,
    tokens: int,
    micro_batches: int = 1,
    recompute: Literal["nothing", "blocks"] = "nothing",
    equal_documents: bool = False,
) -> Prediction:
    """Return what training a decoder holds on one worker.

    Args:
        shape: the model.
        choice: optimizer, precision and layout.
        tokens: of one micro-batch: packs run at once times their tokens.
        micro_batches: in one optimizer step.
        recompute: as `model.recompute`.
        equal_documents: whether all documents are of one length, which spares the reference attention a copy.

    Example:
        >>> from hardy.model.presets import PRESETS
        >>> small = predict(PRESETS["1m"], Choice(optimizer="adamw"), tokens=256)
        >>> small.peak_at, sum(small.at_peak.values()) == small.peak_bytes
        ('loss', True)
    """
    held = held_for(decoder_weights(shape), choice)
    ledger = walk_step(
        StepPlan(
            shape=shape,
            tokens=tokens,
            micro_batches=micro_batches,
            precision=choice.weights_in,
            recompute=recompute == "blocks",
            release=choice.releases,
            int8=choice.int8,
            shards=choice.shards,
            buckets=choice.buckets,
            device=choice.device,
            equal_documents=equal_documents,
            weight_bytes=held.weights,
            state_bytes=held.state + held.beside,
            optimizer_bytes=held.temporaries,
        )
    )
    return Prediction(held=held, peak_bytes=ledger.peak_bytes, peak_at=ledger.peak_at, at_peak=ledger.peak)


def largest_fitting(fits: Callable[[int], bool], *, most: int = MOST_PACKS) -> int:
    """Return the largest number from 1 to `most` that fits, given that all below one that fits do; or 0.

    Example:
        >>> largest_fitting(lambda packs: packs <= 37), largest_fitting(lambda packs: False)
        (37, 0)
    """
    least, beyond = 0, 1
    while beyond <= most and fits(beyond):
        least, beyond = beyond, 2 * beyond
    beyond = min(beyond, most + 1)
    while beyond - least > 1:
        middle = (least + beyond) // 2
        least, beyond = (middle, beyond) if fits(middle) else (least, middle)
    return least
