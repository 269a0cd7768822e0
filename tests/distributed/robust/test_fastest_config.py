"""Settings of the fastest k."""

import pytest

from hardy.config import ConfigError
from hardy.distributed.robust.fastest_config import FastestConfig


def test_a_k_that_the_faulty_may_fill_is_refused_with_the_least():
    FastestConfig(k=7).check(replicas=8, num_faulty=3)
    text = r"k=6 of N=8 replicas with strategy.f=3 faulty: k must be at least 2f \+ 1 = 7"
    with pytest.raises(ConfigError, match=text):
        FastestConfig(k=6).check(replicas=8, num_faulty=3)
    text = r"k=9 of N=8 replicas with strategy.f=3 faulty: k is at most 8, and at least 2f \+ 1 = 7"
    with pytest.raises(ConfigError, match=text):
        FastestConfig(k=9).check(replicas=8, num_faulty=3)
    with pytest.raises(ConfigError, match=r"at least 2f \+ 1 = 9, but only 8.*lower strategy.f to at most 3"):
        FastestConfig(k=8).check(replicas=8, num_faulty=4)


def test_what_acts_after_the_patience_needs_one():
    for settings in ({"on_shortfall": "shrink"}, {"on_shortfall": "error"}):
        with pytest.raises(
            ConfigError, match=r"acts after strategy.fastest.patience_s, which is none; set it"
        ):
            FastestConfig(k=3, **settings)
        FastestConfig(k=3, patience_s=1.0, **settings)
    with pytest.raises(ConfigError, match="include_starved=true.*set strategy.fastest.patience_s"):
        FastestConfig(k=3, include_starved=True)


@pytest.mark.parametrize(
    "settings", [{"k": 0}, {"k": 3, "deadline": "max"}, {"k": 3, "patience_s": 0.0}, {"k": 3, "late": "keep"}]
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=r"strategy\.fastest\."):
        FastestConfig(**settings)
