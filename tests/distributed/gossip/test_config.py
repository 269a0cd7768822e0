"""Settings of gossip: defaults, and what does not go together."""

import pytest

from hardy.config import ConfigError, from_dict, to_dict
from hardy.distributed.gossip.config import ONLY_SOME_SIZES, PushSumConfig, TopologyConfig, WeightsConfig
from hardy.distributed.gossip.topology import GRAPHS, Topology
from hardy.distributed.mesh_config import MeshConfig


def test_defaults_are_the_plain_method_on_one_peer():
    config = PushSumConfig()
    assert (config.topology.name, config.weights.name, config.weights.v) == (
        "one_peer_exponential",
        "uniform",
        0.1,
    )
    assert from_dict(PushSumConfig, to_dict(config)) == config and config.replicas_step_alone


def test_a_rate_is_asked_for_unless_distances_are_relative():
    assert WeightsConfig(name="adaptive").rate == 1e3 and WeightsConfig(name="adaptive", k=2.0).rate == 2.0
    for scale in ("raw", "per_parameter"):
        assert WeightsConfig(scale=scale).name == "uniform"
        with pytest.raises(ConfigError, match=f"strategy.weights.k is needed with .*scale='{scale}'"):
            WeightsConfig(name="adaptive", scale=scale)


@pytest.mark.parametrize("v", [0.0, 1.0, -0.1, 1.5])
def test_v_outside_0_to_1_makes_no_edges_and_is_refused(v):
    with pytest.raises(ConfigError, match="strategy.weights.v"):
        WeightsConfig(v=v)


@pytest.mark.parametrize("settings", [{"name": "file"}, {"name": "ring", "file": "x.json"}])
def test_a_file_belongs_to_its_own_kind(settings):
    with pytest.raises(ConfigError, match="name the file with name 'file', and with no other"):
        TopologyConfig(**settings)


FILE = {"name": "file", "file": "x.json"}
EXACT = WeightsConfig(name="adaptive", distance_mode="exact")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"on_send_failure": "running_sum", "comm_dtype": "bf16"}, "strategy.comm_dtype='bf16' would round"),
        (
            {"on_send_failure": "running_sum", "weights": EXACT},
            "distance_mode='exact' needs the weights of single",
        ),
        ({"method": "gradient_tracking", "overlap": True}, "strategy.overlap=true needs"),
        (
            {"method": "gradient_tracking", "mix_every_steps": 2},
            "but strategy.mix_every_steps=2; set it to 1",
        ),
        ({"mix_every_steps": 0}, "strategy.mix_every_steps"),
        ({"timeout_s": 0.0}, "strategy.timeout_s"),
        ({"elastic": True, "mesh": MeshConfig(shards=2)}, "but strategy.mesh.shards=2; set it to 1"),
        ({"elastic": True, "overlap": True}, "but strategy.overlap=True; set strategy.overlap to false"),
        ({"elastic": True, "method": "gradient_tracking"}, "but strategy.method='gradient_tracking'; set"),
        (
            {"elastic": True, "on_send_failure": "running_sum"},
            "but strategy.on_send_failure='running_sum'; set",
        ),
        *(
            ({"elastic": True, "topology": TopologyConfig(**graph)}, f"name='{graph['name']}' has only some")
            for graph in ({"name": "torus"}, {"name": "hypercube"}, {"name": "double_clique"}, FILE)
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        PushSumConfig(**settings)


def test_graphs_that_replicas_may_leave_are_there_for_every_number_of_them():
    drawn = ["random_edges", "random_matching", "base_k"]
    for name in {*GRAPHS, *drawn} - {*ONLY_SOME_SIZES}:
        topology = TopologyConfig(name=name)
        assert PushSumConfig(topology=topology, elastic=True).elastic
        for num_nodes in range(1, 12):
            assert len(Topology(topology, num_nodes=num_nodes).at(3).shares) == num_nodes


def test_random_edges_without_any_edge_are_refused():
    with pytest.raises(ConfigError, match="topology.probability=0 and .*across=0 has no edge.* above 0"):
        TopologyConfig(name="random_edges", probability=0.0, across=0.0)
    TopologyConfig(name="random_edges", probability=0.0)
    TopologyConfig(name="ring", probability=0.0, across=0.0)
