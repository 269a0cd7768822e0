"""Which papers a run should cite: from the settings of a run to entries of `citations.bib`.

Free of torch. The tables say for each method whose it is. An empty tuple: nothing needs to be cited, as for a
plain mean. None: somebody should be, but we are not sure enough of the data to print an entry.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from hardy.distributed.aggregation.names import split_pre_aggregator
from hardy.distributed.config import LocalUpdateConfig
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.robust.config import CombinedConfig
from hardy.optim.config import OptimizerConfig
from hardy.optim.presets import PRESETS
from hardy.train.config import TrainConfig

Keys = tuple[str, ...] | None
HARDY = "hardy"
"""Key of hardy's own entry."""
ADAPTIVE, APOLLO, SMMF = "chen2024adaptive", "zhu2024apollo", "park2025smmf"
ADAMW, DSTAR, EDIT = "loshchilov2019adamw", "yan2024dstar", "cheng2024edit"
PUSH_SUM, HYDRAULIS, LOCAL_STEPS = "zhou2025push", "li2024hydraulis", "zhu2024local"
LARGE_STEPS = "tyurin2024perceptron"
GENERALISED, MANIPULATING = "xie2018generalized", "shejwalkar2021manipulating"
BUCKETING, KRUM, MEDIAN = "karimireddy2022bucketing", "blanchard2017krum", "yin2018byzantine"

OPTIMIZERS: Mapping[str, Keys] = {
    "adamw": (ADAMW,),
    "sgd": (),
    "adaptive_adamw": (ADAPTIVE, ADAMW),
    "apollo": (APOLLO,),
    "apollo_mini": (APOLLO,),
    "qapollo": (APOLLO,),
    "smmf": (SMMF,),
    "muon": ("jordan2024muon",),
    "adafactor": ("shazeer2018adafactor",),
}
"""By `optim.name`; a class of torch has its citation in torch's documentation."""
GUARDS: Mapping[str, Keys] = {
    "off": (),
    "global": (ADAPTIVE,),
    "tensor": (ADAPTIVE, "wang2025adagc"),
    "zscore": (ADAPTIVE, "kumar2025zclip"),
}
"""By `optim.guard.history`."""
STRATEGIES: Mapping[str, Keys] = {
    "synchronous": (),
    "edit": (EDIT,),
    "a_edit": (EDIT,),
    "local_sgd": ("stich2019local",),
    "post_local_sgd": ("lin2020local",),
    "diloco": ("douillard2023diloco",),
    "streaming_diloco": ("douillard2025streaming", "douillard2023diloco"),
    "delayed": ("sun2024co2",),
    "robust": (),
    "dstar": (DSTAR,),
    "push_sum": (PUSH_SUM,),
}
"""By `strategy.name`."""
AGGREGATES: Mapping[str, Keys] = {"mean": (), "softmax_norm": (EDIT,), "anchored": (LOCAL_STEPS,)}
"""By `strategy.aggregate` of local updates."""
COMPRESSIONS: Mapping[str, Keys] = {
    "none": (),
    "bf16": (),
    "int8": ("dettmers2022eightbit",),
    "topk": ("stich2018sparsified",),
}
"""By `strategy.compression.name`."""
RULES: Mapping[str, Keys] = {
    "aksel": None,
    "bulyan": ("mhamdi2018hidden",),
    "caf": None,
    "centered_clip": ("karimireddy2021history",),
    "cge": None,
    "diversefl": None,
    "dnc": (MANIPULATING,),
    "dstar": (DSTAR,),
    "fltrust": ("cao2021fltrust",),
    "geometric_median": ("pillutla2022robust",),
    "kardam": ("damaskinos2018kardam",),
    "krum": (KRUM,),
    "mda": None,
    "mean": (),
    "meamed": (GENERALISED,),
    "median": (MEDIAN,),
    "monna": ("farhadkhani2023monna",),
    "multi_krum": (KRUM,),
    "norm_clip": None,
    "norm_screen": None,
    "phocas": ("xie2018phocas",),
    "sign_majority": ("bernstein2019sign",),
    "smea": ("allouah2023trilemma",),
    "trimmed_mean": (MEDIAN,),
    "zeno_plus_plus": ("xie2020zeno",),
}
"""By `strategy.rule`."""
PRE_AGGREGATORS: Mapping[str, Keys] = {
    "arc": None,
    "bucketing": (BUCKETING,),
    "clip": (),
    "nnm": ("allouah2023fixing",),
}
"""By the name in `strategy.pre`."""
ATTACKS: Mapping[str, Keys] = {
    "none": (),
    "alie": ("baruch2019little",),
    "bit_flip": (),
    "cosine": (),
    "drift": (),
    "edge": (),
    "fang": ("fang2020local",),
    "gaussian": (),
    "huge": (),
    "identical": (),
    "inf": (),
    "ipm": ("xie2019fall",),
    "mimic": (BUCKETING,),
    "min_max": (MANIPULATING,),
    "min_sum": (MANIPULATING,),
    "nan": (),
    "one_nan": (),
    "optimal": (),
    "replay": (),
    "sign_flip": (),
    "stale": (),
    "zero": (),
}
"""By `strategy.attack.name`; those without an entry are plain, or hardy's own."""
HISTORY: Keys = ("allenzhu2021nonconvex", "karimireddy2021history")
"""Of `strategy.history` above 0."""
TOPOLOGIES: Mapping[str, Keys] = {
    "full": (),
    "ring": (),
    "symmetric_ring": (),
    "star": (),
    "torus": (),
    "hypercube": (),
    "double_clique": (),
    "exponential": ("ying2021exponential",),
    "one_peer_exponential": ("ying2021exponential",),
    "random_edges": (),
    "random_matching": (),
    "base_k": ("takezawa2023base",),
    "file": (),
}
"""By `strategy.topology.name`."""
GOSSIP: Mapping[str, Keys] = {"push": ("assran2019sgp",), "gradient_tracking": ("qureshi2021saddopt",)}
"""By `strategy.method` of push-sum."""
BALANCE: Mapping[str, Keys] = {
    "none": (),
    "pack": (),
    "dispatch": (HYDRAULIS,),
    "dynamic_cp": (HYDRAULIS, "wang2024flexsp"),
}
"""By `balance.mode`."""
SCHEMES: Mapping[str, Keys] = {"auto": (), "gather": (), "ulysses": ("jacobs2023ulysses",)}
"""By `balance.scheme`."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One method that a run used."""

    setting: str
    """Dotted path of what chose it."""
    value: str
    """Its name."""
    keys: Keys
    """Entries; None where we have none."""


def uses(config: TrainConfig) -> Iterator[Use]:
    """Yield the methods of a run, in the order of its settings."""
    yield from _optimizer_uses(config.optim)
    strategy = config.strategy
    yield _use("strategy.name", strategy.name, STRATEGIES)
    if isinstance(strategy, LocalUpdateConfig):
        yield _use("strategy.aggregate", strategy.aggregate, AGGREGATES)
        yield _use("strategy.compression.name", strategy.compression.name, COMPRESSIONS)
    if isinstance(strategy, CombinedConfig):
        yield _use("strategy.rule", strategy.rule, RULES)
        for text in strategy.pre:
            yield _use("strategy.pre", split_pre_aggregator(text)[0], PRE_AGGREGATORS)
        if strategy.history:
            yield Use(setting="strategy.history", value=f"{strategy.history:g}", keys=HISTORY)
        yield _use("strategy.attack.name", strategy.attack.name, ATTACKS)
        if strategy.fastest is not None:
            yield Use(setting="strategy.fastest.k", value=str(strategy.fastest.k), keys=(DSTAR,))
    if isinstance(strategy, PushSumConfig):
        yield _use("strategy.method", strategy.method, GOSSIP)
        yield _use("strategy.topology.name", strategy.topology.name, TOPOLOGIES)
    yield _use("balance.mode", config.balance.mode, BALANCE)
    if config.balance.mode == "dynamic_cp":
        yield _use("balance.scheme", config.balance.scheme, SCHEMES)


def _optimizer_uses(optim: OptimizerConfig) -> Iterator[Use]:
    yield _use("optim.name", optim.name, OPTIMIZERS)
    if optim.name in PRESETS:
        embed_kind = getattr(optim, "embed_kind", None) or PRESETS[optim.name].embed_kind
        yield _use("optim.embed_kind", embed_kind, OPTIMIZERS)
    yield _use("optim.guard.history", optim.guard.history, GUARDS)
    if optim.schedule.name == "performance":
        yield Use(setting="optim.schedule.name", value="performance", keys=(ADAPTIVE,))


def _use(setting: str, value: str, table: Mapping[str, Keys]) -> Use:
    return Use(setting=setting, value=value, keys=table.get(value))


@cache
def entries() -> dict[str, str]:
    """Return every entry by key, as it stands in the file.

    Example:
        >>> entries()["hardy"].splitlines()[0]
        '@software{hardy,'
    """
    text = resources.files("hardy.cli").joinpath("citations.bib").read_text(encoding="utf-8")
    found = re.finditer(r"^@\w+\{(\w+),\n.*?^\}$", text, re.MULTILINE | re.DOTALL)
    return {entry[1]: entry[0] for entry in found}
