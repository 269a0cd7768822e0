"""How workers are laid out, and the text that refuses what does not fit."""

import pytest

from hardy.config import ConfigError
from hardy.distributed.mesh_config import MeshConfig


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
