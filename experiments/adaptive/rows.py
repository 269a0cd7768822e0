"""The rows of the comparison: an optimizer, its schedule, what is done to gradients; and the grids of rates.

The recipe is AdaptiveAdamW, PerfExpDecay and GradGuard at their defaults: hardy's reading of arXiv
2412.04718, every constant is ours. Baselines are torch's optimizers at their defaults.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from optimizers import APOLLO, MINI, SMMF, TABLE

from hardy.optim.config import GuardConfig, PerfDecayConfig, ScheduleConfig
from hardy.optim.optimizers import AdaptiveAdamW
from hardy.optim.routing import route_params

WARMUP_SHARE, WEIGHT_DECAY = 0.05, 0.01


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How a GradGuard is set."""

    max_norm: float | None = 1.0
    history: str = "global"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """All of a row but its learning rate."""

    make: Callable[[torch.nn.Module, float], torch.optim.Optimizer]
    schedule: str = "constant"
    """Shape after the warm-up, as `optim.schedule.name`."""
    warmup_share: float = 0.0
    decay: PerfDecayConfig = PerfDecayConfig()
    """Settings of the schedule `performance`."""
    guard: Guard | None = None
    clip_norm: float | None = None
    """Largest norm, by torch's clipping; beside a guard it has no meaning."""
    grid: str = "adam"
    """Which grid of learning rates it takes."""

    def schedule_config(self, total_steps: int) -> ScheduleConfig:
        """Return the schedule of a run."""
        warmup_steps = round(self.warmup_share * total_steps)
        return ScheduleConfig(name=self.schedule, warmup_steps=warmup_steps, performance=self.decay)


def _decayed(model):
    """Return groups in which matrices decay, and embeddings, head, norms and biases do not."""
    return route_params(model, kind="adamw", weight_decay=WEIGHT_DECAY)


def _adaptive_adamw(model, lr):
    return AdaptiveAdamW(_decayed(model), lr=lr)


def _torch_adamw(model, lr):
    groups = _decayed(model)
    return torch.optim.AdamW(
        [{"params": [p for _, p in g["params"]], "weight_decay": g["weight_decay"]} for g in groups], lr=lr
    )


BASELINES = {
    name: Contender(make=TABLE[key], grid=name)
    for name, key in {
        "sgd": "plain sgd",
        "momentum": "sgd",
        "adagrad": "adagrad",
        "rmsprop": "rmsprop",
        "adam": "adam",
    }.items()
}
"""At a constant learning rate and with no clipping, as such comparisons are usually made."""

RECIPE = Contender(
    make=_adaptive_adamw, schedule="performance", warmup_share=WARMUP_SHARE, guard=Guard(), grid="adam, led"
)
CONTROL, RECIPE_NAME, LED = "adamw + cosine + clip", "recipe", "{}, led"


def _led(contender: Contender, **changes: object) -> Contender:
    """Return a contender under the recipe's schedule and guard."""
    return replace(RECIPE, make=contender.make, grid=LED.format(contender.grid), **changes)


ROWS: dict[str, Contender] = {
    **BASELINES,
    **{LED.format(name): _led(contender) for name, contender in BASELINES.items()},
    CONTROL: Contender(
        make=_torch_adamw, schedule="cosine", warmup_share=WARMUP_SHARE, clip_norm=1.0, grid="adam, led"
    ),
    RECIPE_NAME: RECIPE,
    "recipe, no decay": replace(RECIPE, schedule="constant", grid="adam"),
    "recipe, slow decay by time": replace(RECIPE, decay=PerfDecayConfig(mode="time")),
    "recipe, fast decay by time": replace(
        RECIPE, decay=PerfDecayConfig(mode="time", final_slow=PerfDecayConfig().final_fast)
    ),
    "recipe, no clip": replace(RECIPE, guard=Guard(max_norm=None, history="off")),
    "recipe, no history": replace(RECIPE, guard=Guard(history="off")),
    "recipe, history alone": replace(RECIPE, guard=Guard(max_norm=None)),
    "apollo, led": replace(RECIPE, make=APOLLO, grid="apollo"),
    "apollo-mini, led": replace(RECIPE, make=MINI, grid="apollo-mini"),
    "smmf, led": replace(RECIPE, make=SMMF, grid="smmf"),
}
"""By name. `led`: under the recipe's schedule and guard. The five after `recipe` lack one part each."""


def guard_config(guard: Guard) -> GuardConfig:
    """Return the guard's settings."""
    return GuardConfig(history=guard.history)


LOWEST: dict[str, dict[str, int]] = {
    "sgd": {"teacher": -4, "markov": -1, "domains": -3, "span": -2},
    "momentum": {"teacher": -5, "markov": -2, "domains": -5, "span": -4},
    "adagrad": {"teacher": -4, "markov": -4, "domains": -5, "span": -5},
    "rmsprop": {"teacher": -6, "markov": -6, "domains": -7, "span": -7},
    "adam": {"teacher": -6, "markov": -6, "domains": -7, "span": -6},
    "sgd, led": {"teacher": -2, "markov": -1, "domains": -2, "span": -1},
    "momentum, led": {"teacher": -4, "markov": -2, "domains": -4, "span": -3},
    "adagrad, led": {"teacher": -4, "markov": -4, "domains": -4, "span": -4},
    "rmsprop, led": {"teacher": -5, "markov": -5, "domains": -6, "span": -6},
    "adam, led": {"teacher": -5, "markov": -5, "domains": -6, "span": -6},
    "apollo": {"teacher": -4, "markov": -4, "domains": -4, "span": -4},
    "apollo-mini": {"teacher": -5, "markov": -5, "domains": -5, "span": -5},
    "smmf": {"teacher": -4, "markov": -4, "domains": -5, "span": -5},
}
"""Lowest learning rate of each grid in half-decades: -6 is 0.001, -5 is 0.003."""


def grid_of(row: str, task: str) -> tuple[float, ...]:
    """Return the four learning rates of a row on a task, half a decade apart."""
    start = LOWEST[ROWS[row].grid][task]
    return tuple(half_decades(start + i) for i in range(4))


def half_decades(count: int) -> float:
    """Return 10^(count / 2), with 3 for its root."""
    return float(f"{3 if count % 2 else 1}e{count // 2}")
