"""Which strategies are simulated, and what they are given."""

import pytest

from hardy.config import ConfigError
from hardy.distributed.config import LocalUpdateConfig
from hardy.train.simulate_config import read_config
from hardy.train.simulate_strategies import DEFAULT_STRATEGIES, STRATEGIES, entries_of, read_simulation


def cluster(tmp_path, text=""):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return path


def entries(tables, changes=None, **cluster):
    return entries_of(tables, read_config({"workers": 4, **cluster}), changes or {})


def test_without_a_word_the_usual_ones_are_compared(tmp_path):
    simulation = read_simulation(cluster(tmp_path, "workers = 3"))
    assert tuple(entry.label for entry in simulation.entries) == DEFAULT_STRATEGIES
    assert simulation.config.workers == 3


@pytest.mark.parametrize("steps", [1, 10, 24, 200, 100_000])
def test_every_strategy_has_defaults_that_fit_any_run(steps):
    made = entries([{"name": name} for name in STRATEGIES], task={"steps": steps, "model": "tiny"})
    for entry in made:
        if not isinstance(entry.config, LocalUpdateConfig):
            continue
        assert entry.config.warmup_steps <= max(steps // 20, 0)
        assert (entry.config.every_s or 0) <= steps * 0.5 / 10


def test_long_runs_have_the_defaults_of_training():
    (entry,) = entries([{"name": "edit"}], task={"steps": 10**6})
    assert (entry.config.every_steps, entry.config.warmup_steps) == (128, 1000)
    (timed,) = entries([{"name": "a_edit"}], task={"steps": 10**6})
    assert (timed.config.every_s, timed.config.min_steps) == (600.0, 100)


def test_what_is_given_is_not_fitted():
    given = {"name": "edit", "every_steps": 100, "warmup_steps": 150, "anomaly": {"warmup_rounds": 7}}
    (entry,) = entries([given])
    config = entry.config
    assert (config.every_steps, config.warmup_steps, config.anomaly.warmup_rounds) == (100, 150, 7)
    assert config.anomaly.name == "ztest"


def test_a_setting_goes_to_all_that_have_it_and_go_by_it():
    tables = [{"name": name} for name in ("synchronous", "edit", "a_edit")]
    synchronous, edit, timed = entries(tables, {"every_steps": 16, "temperature": 2.0})
    assert (edit.config.every_steps, timed.config.every_steps, timed.config.every_s) == (16, None, 10.0)
    assert edit.config.temperature == timed.config.temperature == 2.0
    assert synchronous.config.name == "synchronous"
    *_, timed = entries(tables, {"every_s": 4.0})
    assert timed.config.every_s == 4.0


def test_elastic_has_no_warm_up():
    assert entries([{"name": "edit"}], {"elastic": True})[0].config.warmup_steps == 0


def test_elastic_gossip_is_not_simulated():
    edit, gossip = entries([{"name": "edit"}, {"name": "push_sum"}], {"elastic": True})
    assert edit.config.elastic and not gossip.config.elastic
    with pytest.raises(ConfigError, match="strategy.elastic=true of push_sum cannot be simulated"):
        entries([{"name": "push_sum", "elastic": True}], {})


def test_names_choose_from_the_file_by_label_or_name_and_else_defaults(tmp_path):
    path = cluster(
        tmp_path,
        '[[strategies]]\nname = "edit"\nlabel = "often"\nevery_steps = 2\n[[strategies]]\nname="diloco"',
    )
    chosen = read_simulation(path, names=["often", "diloco", "a-edit"]).entries
    assert [entry.label for entry in chosen] == ["often", "diloco", "a_edit"]
    assert chosen[0].config.every_steps == 2


def test_labels_that_come_twice_are_numbered():
    made = entries([{"name": "edit", "every_steps": n} for n in (2, 4)])
    assert [entry.label for entry in made] == ["edit 1", "edit 2"]


def test_settings_of_the_command_line_win(tmp_path):
    path = cluster(tmp_path, "workers = 3\nstrategies = ['edit']\n[task]\nsteps = 40")
    settings = ["--cluster.workers", "5", "--task.steps=80", "--strategy.every_steps", "4"]
    simulation = read_simulation(path, settings=settings)
    assert (simulation.config.workers, simulation.config.task.steps) == (5, 80)
    assert simulation.entries[0].config.every_steps == 4


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"name": "edti"}, "strategies[0].name: there is no strategy 'edti'; did you mean 'edit'"),
        ({"name": "edit", "evry_s": 1}, "edit: there is no setting 'strategy.evry_s'; did you mean"),
        (
            {"name": "synchronous", "mesh": {"shards": 2}},
            "synchronous: strategy.mesh.shards=2 cannot be simulated: each simulated worker holds a whole",
        ),
        ({"name": "edit", "copies": 2}, "edit: strategy.copies=2 cannot be simulated"),
        ({"name": "edit", "layerwise": True}, "edit: strategy.layerwise=true cannot be simulated"),
        (
            {"name": "streaming_diloco", "fragments": 4, "every_steps": 16, "delay_steps": 1},
            "strategy.fragments=4 is more than the 2 units of task.model=1m_wide",
        ),
        (
            {"name": "a_edit", "every_s": 600.0},
            "a_edit: strategy.every_s=600 is longer than the whole run of task.steps=200 x step_s=0.5 = 100",
        ),
        ({"name": "edit", "mesh": {"replicas": 3}}, "strategy.mesh of 3 replicas x 1 shards needs 3 workers"),
    ],
)
def test_what_cannot_be_simulated(table, text):
    with pytest.raises(ConfigError) as refused:
        entries([table])
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("names", "settings", "text"),
    [
        (["edti"], [], "--strategies: there is no strategy 'edti'; did you mean 'edit'"),
        (None, ["--optim.lr", "1"], "there is no section 'optim'. Known: cluster, strategy, task"),
        (None, ["--cluster.workrs", "1"], "there is no setting 'workrs'; did you mean 'workers'"),
        (
            ["edit"],
            ["--strategy.evry_steps", "1"],
            "there is no setting 'strategy.evry_steps'; did you mean 'strategy.every_steps'",
        ),
        (
            ["synchronous"],
            ["--strategy.every_steps", "1"],
            "none of the strategies takes strategy.every_steps",
        ),
        (["edit"], ["--strategy.every_s", "1"], "none of the strategies takes strategy.every_s: edit"),
        (["edit"], ["--strategy.name", "diloco"], "there is no setting 'strategy.name'"),
    ],
)
def test_wrong_words(names, settings, text, tmp_path):
    with pytest.raises(ConfigError) as refused:
        read_simulation(cluster(tmp_path), names=names, settings=settings)
    assert text in str(refused.value)


def test_a_fault_in_the_file_names_the_file(tmp_path):
    path = cluster(tmp_path, "workers = 0")
    with pytest.raises(ConfigError, match="cluster.toml: workers must be a whole number at least 1"):
        read_simulation(path)
    with pytest.raises(ConfigError, match="cluster.toml: strategies must be a list of names or tables"):
        read_simulation(cluster(tmp_path, "strategies = 3"))
    with pytest.raises(ConfigError, match="there is no config file"):
        read_simulation(tmp_path / "none.toml")
