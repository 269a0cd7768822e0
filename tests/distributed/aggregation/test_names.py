import subprocess
import sys

import pytest

from hardy.config import ConfigError
from hardy.distributed.aggregation import PRE_AGGREGATORS, RULES, names
from hardy.distributed.aggregation.aggregator import Aggregator


def test_names_agree_with_the_tables():
    assert sorted(names.RULE_NAMES) == sorted(RULES)
    assert sorted(names.PRE_AGGREGATOR_NAMES) == sorted(PRE_AGGREGATORS)
    both = {**RULES, **PRE_AGGREGATORS}
    assert {name for name, part in both.items() if part.needs_gram} == names.NEEDS_GRAM
    assert {name for name, rule in RULES.items() if rule.name != name} == set()
    assert {name for name, rule in RULES.items() if rule.needs_reference} == names.NEEDS_REFERENCE
    alone = {name for name, rule in RULES.items() if Aggregator(rule(), num_faulty=1).is_self_reported}
    assert alone == names.SELF_REPORTED


def test_names_can_be_read_without_torch():
    code = "import sys, hardy.distributed.aggregation.names; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nmn", "there is no pre-aggregator 'nmn'; did you mean 'nnm'?"),
        ("nnm:2", "nnm takes no number; write 'nnm'"),
        ("bucketing", "needs a whole number of rows, at least 1, such as 'bucketing:2'"),
        ("clip:", "needs a number above 0 and finite, such as 'clip:1.5'"),
        ("clip:nan", "needs a number"),
        ("clip:two", "needs a number"),
        ("bucketing:0.5", "'bucketing:0.5' needs a whole number of rows, at least 1"),
        ("clip:0", "'clip:0' needs a number above 0"),
        ("clip:inf", "needs a number above 0 and finite"),
    ],
)
def test_what_cannot_be_read_is_refused(text, says):
    with pytest.raises(ConfigError) as caught:
        names.split_pre_aggregator(text)
    assert says in str(caught.value)


def test_numbers_are_read():
    assert names.split_pre_aggregator("clip:1.5") == ("clip", 1.5)
    assert names.split_pre_aggregator("arc") == ("arc", None)
