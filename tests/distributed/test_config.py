"""Settings of the mesh and of the simulated cluster, and the texts that refuse them."""

import pytest

from hardy.config import ConfigError, from_dict, to_dict
from hardy.distributed.config import ClusterConfig, SynchronousConfig
from hardy.distributed.mesh_config import MeshConfig


def test_strategy_settings_survive_a_dict():
    config = SynchronousConfig(mesh=MeshConfig(shards=2))
    assert from_dict(SynchronousConfig, to_dict(config), path="strategy") == config


def test_the_cluster_takes_no_time_unless_told():
    config = ClusterConfig()
    assert (config.bandwidth_bytes_per_s, config.latency_s, config.slow_factors) == (None, 0.0, ())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bandwidth_bytes_per_s", 0.0),
        ("latency_s", -1.0),
        ("slow_factors", (1.0, 0.0)),
        ("variation_sigma", float("nan")),
    ],
)
def test_a_cluster_refuses_impossible_numbers(setting, value):
    with pytest.raises(ConfigError, match=f"cluster.{setting} must be .* got"):
        ClusterConfig(**{setting: value})
