"""Settings of the mesh and of the simulated cluster, and the texts that refuse them."""

import pytest

from hardy.config import ConfigError, from_dict, to_dict
from hardy.distributed.config import ClusterConfig, MeshConfig, SynchronousConfig


@pytest.mark.parametrize(
    ("replicas", "shards", "num_workers", "sizes"),
    [
        (None, 1, 1, (1, 1)),
        (None, 1, 4, (4, 1)),
        (None, 4, 4, (1, 4)),
        (2, 2, 4, (2, 2)),
        (None, 2, 6, (3, 2)),
    ],
)
def test_mesh_sizes(replicas, shards, num_workers, sizes):
    assert MeshConfig(replicas=replicas, shards=shards).sizes(num_workers) == sizes


@pytest.mark.parametrize(("replicas", "shards", "num_workers"), [(2, 2, 2), (None, 3, 4), (None, 4, 2)])
def test_a_mesh_that_does_not_fit_names_the_way_out(replicas, shards, num_workers):
    with pytest.raises(ConfigError, match=f"strategy.mesh.shards so that their product is {num_workers}"):
        MeshConfig(replicas=replicas, shards=shards).sizes(num_workers)


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
