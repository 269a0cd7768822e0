"""From settings to entries: every choice is in a table, every key has an entry, nothing unused is cited."""

import re
from pathlib import Path
from typing import get_args

import pytest

from hardy.balance.config import BalanceConfig
from hardy.cli import citations
from hardy.config import from_dict, override
from hardy.distributed.aggregation.names import PRE_AGGREGATOR_NAMES, RULE_NAMES
from hardy.distributed.attack_names import ATTACK_NAMES
from hardy.distributed.config import CompressionConfig, LocalUpdateConfig, StrategyConfig
from hardy.distributed.gossip.config import PushSumConfig, TopologyConfig
from hardy.optim.config import GuardConfig, OptimizerConfig, TorchConfig
from hardy.train.config import TrainConfig

ROOT = Path(__file__).parents[2]


def choices(config, name="name"):
    """Return the literals that a field of a config may be."""
    return set(get_args(config.__dataclass_fields__[name].type))


def configured(**changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return from_dict(TrainConfig, override({}, dotted))


def keys_of(config):
    return {key for use in citations.uses(config) for key in use.keys or ()}


@pytest.mark.parametrize(
    ("table", "known"),
    [
        ("STRATEGIES", {name for kind in get_args(StrategyConfig) for name in choices(kind)}),
        (
            "OPTIMIZERS",
            {name for kind in get_args(OptimizerConfig) if kind is not TorchConfig for name in choices(kind)},
        ),
        ("GUARDS", choices(GuardConfig, "history")),
        ("AGGREGATES", choices(LocalUpdateConfig, "aggregate")),
        ("COMPRESSIONS", choices(CompressionConfig)),
        ("RULES", set(RULE_NAMES)),
        ("PRE_AGGREGATORS", set(PRE_AGGREGATOR_NAMES)),
        ("ATTACKS", {"none", *ATTACK_NAMES}),
        ("TOPOLOGIES", choices(TopologyConfig)),
        ("GOSSIP", choices(PushSumConfig, "method")),
        ("BALANCE", choices(BalanceConfig, "mode")),
        ("SCHEMES", choices(BalanceConfig, "scheme")),
    ],
)
def test_the_tables_hold_every_choice(table, known):
    assert known
    assert set(getattr(citations, table)) == known


def test_every_key_has_an_entry_and_every_entry_a_use():
    names = {name for name in vars(citations) if name.isupper()} - {"PRESETS"}
    tables = [value for value in (getattr(citations, name) for name in names) if isinstance(value, dict)]
    assert len(tables) == 12
    used = {key for table in tables for keys in table.values() for key in keys or ()}
    assert used <= set(citations.entries())
    assert set(citations.entries()) - used - {citations.HARDY} <= {citations.LARGE_STEPS, *citations.HISTORY}


def test_entries_are_whole_and_differ():
    text = (Path(citations.__file__).parent / "citations.bib").read_text(encoding="utf-8")
    found = citations.entries()
    assert len(found) == text.count("\n@") == len(re.findall(r"^@\w+\{", text, re.MULTILINE))
    for key, entry in found.items():
        assert entry.count("{") == entry.count("}"), key
        for field in ("title", "author", "year"):
            assert re.search(rf"^  {field}\s+= \{{", entry, re.MULTILINE), (key, field)
    papers = re.findall(r"eprint\s*= \{([\d.]+)\}", text)
    assert len(papers) == len(set(papers))


def test_the_repositorys_file_is_hardy_and_the_nine_papers():
    held = (ROOT / "CITATION.bib").read_text(encoding="utf-8")
    nine = [key for key, entry in citations.entries().items() if re.search(r"= \{2412\.0[4-8]", entry)]
    assert len(nine) == 9
    own = "\n\n".join(citations.entries()[key] for key in [citations.HARDY, *nine])
    assert held.partition("\n\n")[2] == own + "\n"


def test_a_plain_run_cites_its_optimizer_alone():
    assert keys_of(configured()) == {citations.ADAMW}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"optim__name": "apollo_mini"}, {citations.APOLLO, citations.ADAMW}),
        ({"optim__name": "apollo", "optim__embed_kind": "smmf"}, {citations.APOLLO, citations.SMMF}),
        ({"optim__name": "sgd"}, set()),
        (
            {"optim__name": "sgd", "optim__guard__history": "tensor"},
            {citations.ADAPTIVE, "wang2025adagc"},
        ),
        ({"optim__name": "sgd", "optim__schedule__name": "performance"}, {citations.ADAPTIVE}),
        ({"optim__name": "sgd", "strategy__name": "edit"}, {citations.EDIT}),
        (
            {
                "optim__name": "sgd",
                "strategy__name": "local_sgd",
                "strategy__aggregate": "anchored",
                "strategy__compression__name": "int8",
            },
            {"stich2019local", citations.LOCAL_STEPS, "dettmers2022eightbit"},
        ),
        (
            {
                "optim__name": "sgd",
                "strategy__name": "robust",
                "strategy__rule": "median",
                "strategy__pre": ["bucketing:2"],
                "strategy__attack__name": "alie",
                "strategy__attack__workers": [0],
            },
            {citations.MEDIAN, citations.BUCKETING, "baruch2019little"},
        ),
        (
            {
                "optim__name": "sgd",
                "strategy__name": "robust",
                "strategy__rule": "multi_krum",
                "strategy__pre": ["clip:1"],
                "strategy__history": 0.99,
            },
            {citations.KRUM, *citations.HISTORY},
        ),
        (
            {
                "optim__name": "sgd",
                "strategy__name": "robust",
                "strategy__rule": "mean",
                "strategy__f": 0,
                "strategy__pre": [],
                "strategy__fastest__k": 3,
            },
            {citations.DSTAR},
        ),
        (
            {"optim__name": "sgd", "strategy__name": "push_sum", "strategy__topology__name": "base_k"},
            {citations.PUSH_SUM, "assran2019sgp", "takezawa2023base"},
        ),
        (
            {"optim__name": "sgd", "balance__mode": "dynamic_cp", "balance__scheme": "ulysses"},
            {citations.HYDRAULIS, "wang2024flexsp", "jacobs2023ulysses"},
        ),
        ({"optim__name": "sgd", "balance__scheme": "ulysses"}, set()),
    ],
)
def test_a_run_cites_what_it_used_and_nothing_else(changes, keys):
    assert keys_of(configured(**changes)) == keys


def test_what_has_no_entry_is_known_to_have_none():
    uses = {use.setting: use.keys for use in citations.uses(configured(optim__name="torch.optim.RMSprop"))}
    assert uses["optim.name"] is None
    assert uses["balance.mode"] == ()
