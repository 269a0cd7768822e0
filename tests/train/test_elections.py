"""The host of the elections and the way in: secrets, logs to be replayed, who may not enter."""

from contextlib import ExitStack

import pytest

from hardy.config import UserError, from_dict, override, to_dict
from hardy.distributed.simulation import SimWorld
from hardy.train.config import TrainConfig
from hardy.train.elections import LOG, election_host, fastest_of, way_in
from hardy.train.plan import World


def config_with(**fastest):
    settings = {"strategy.name": "robust", "strategy.f": 0, "strategy.fastest": {"k": 1, **fastest}}
    return from_dict(TrainConfig, override(to_dict(TrainConfig()), settings))


def test_a_run_without_elections_has_no_way_in(tmp_path):
    assert fastest_of(TrainConfig()) is None
    assert way_in(TrainConfig(), World(), tmp_path, ExitStack()) is None


def test_who_was_not_started_by_the_launcher_is_told_how(tmp_path):
    with pytest.raises(UserError, match="strategy.fastest.k=1 needs replicas that `hardy train --workers N`"):
        way_in(config_with(), World(), tmp_path, ExitStack())


def test_a_replica_enters_and_elections_are_logged(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("only ours\n")
    config = config_with(secret_file=str(secret))
    host = election_host(config, tmp_path, replicas=1)
    try:
        with ExitStack() as held:
            enter = way_in(config, World(store=host.address), tmp_path, held)
            group = enter(0)
            decision = group.announce_and_elect(0, loss=1.0)
            assert decision.elected == (0,) and group.commit()
    finally:
        host.close()
    assert '"elected": [0]' in (tmp_path / LOG).read_text()


def test_the_workers_of_a_replica_must_have_the_same_settings(tmp_path):
    def body(comm):
        config = config_with(starve_limit=50 + comm.rank)
        world = World(rank=comm.rank, size=2, store="unused:1", replica_size=2)
        with ExitStack() as held, pytest.raises(UserError, match="workers 1 of 2 have other settings"):
            way_in(config, world, tmp_path, held, inner=comm)(0)

    SimWorld(2).run(body)


def test_another_secret_is_refused(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name).write_text(name)
    host = election_host(config_with(secret_file=str(tmp_path / "ours")), tmp_path, replicas=1)
    try:
        other = config_with(secret_file=str(tmp_path / "theirs"))
        with ExitStack() as held, pytest.raises(UserError, match="another secret"):
            way_in(other, World(store=host.address), tmp_path, held)(0)
    finally:
        host.close()


@pytest.mark.parametrize(
    ("fastest", "text"),
    [
        ({"secret_file": "nowhere"}, "strategy.fastest.secret_file=.*cannot be read"),
        ({"secret_file": "empty"}, "is empty"),
        ({"replay": "nowhere"}, "cannot read the log of elections"),
    ],
)
def test_files_that_are_missing_are_named(fastest, text, tmp_path):
    (tmp_path / "empty").touch()
    named = {key: str(tmp_path / name) for key, name in fastest.items()}
    with pytest.raises(UserError, match=text):
        election_host(config_with(**named), tmp_path, replicas=1)
