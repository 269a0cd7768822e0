"""What the environment says."""

from pathlib import Path

import pytest

from hardy.cli.environment import cache_dir, who_works, world
from hardy.config import UserError
from hardy.train.plan import World


def test_the_cache_folder_by_option_then_variable_then_custom(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    everything = {"HARDY_CACHE": "/b", "XDG_CACHE_HOME": "/c"}
    assert cache_dir("/a", everything) == Path("/a")
    assert cache_dir(None, everything) == Path("/b")
    assert cache_dir(None, {"XDG_CACHE_HOME": "/c"}) == Path("/c/hardy")
    assert cache_dir(None, {"HARDY_CACHE": "", "XDG_CACHE_HOME": ""}) == Path("/home/someone/.cache/hardy")
    assert cache_dir("~/x", {}) == Path("/home/someone/x")


def test_without_a_launcher_a_worker_is_alone():
    assert world({}) == World()


def test_our_launcher_gives_a_file_to_meet_at():
    said = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "HARDY_MEETING": "file:///tmp/x"}
    assert world(said) == World(rank=1, size=2, local_rank=1, address="file:///tmp/x")


def test_replicas_that_come_and_go_are_told_of_a_store_and_how_often_they_were_lost():
    said = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "HARDY_STORE": "localhost:5"}
    assert world(said) == World(rank=1, size=2, local_rank=1, store="localhost:5")
    assert world(said | {"HARDY_RESTARTS": "3"}).restarts == 3
    with pytest.raises(UserError, match="HARDY_RESTARTS='x', which is no number"):
        world(said | {"HARDY_RESTARTS": "x"})


def test_the_workers_of_a_replica_that_comes_and_goes_are_told_where_they_meet_and_how_many_they_are():
    said = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "5", "HARDY_STORE": "localhost:5"}
    meeting = {"HARDY_MEETING": "file:///tmp/x", "HARDY_REPLICA_SIZE": "2"}
    me = world(said | meeting)
    assert (me.replica, me.replicas, me.rank_in_replica, me.address) == (2, 3, 1, "file:///tmp/x")
    with pytest.raises(UserError, match="HARDY_REPLICA_SIZE=4, which must divide WORLD_SIZE=6"):
        world(said | meeting | {"HARDY_REPLICA_SIZE": "4"})
    with pytest.raises(UserError, match="HARDY_REPLICA_SIZE=0, which must divide"):
        world(said | meeting | {"HARDY_REPLICA_SIZE": "0"})
    with pytest.raises(UserError, match="HARDY_REPLICA_SIZE=2.* come with HARDY_MEETING; start workers by"):
        world(said | {"HARDY_REPLICA_SIZE": "2"})


def test_torchrun_gives_an_address():
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    assert world(said) == World(rank=3, size=4, local_rank=1, address="env://")


def test_a_launcher_of_one_needs_no_address():
    assert world({"RANK": "0", "WORLD_SIZE": "1"}) == World()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"RANK": "0"}, "WORLD_SIZE='', which is no number"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x', which is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_launcher_that_says_too_little_is_refused(said, text):
    with pytest.raises(UserError, match=text):
        world(said)


def test_who_works():
    launched = {"RANK": "1", "WORLD_SIZE": "2", "HARDY_MEETING": "file:///x"}
    assert who_works(None, {}) == (World(), 1) and who_works(None, {}, default=3)[1] == 3
    assert who_works(2, {}) == (World(), 2)
    me, number = who_works(None, launched)
    assert (me.rank, number) == (1, 2) and who_works(2, launched)[1] == 2
    with pytest.raises(UserError, match="--workers must be at least 1, got 0"):
        who_works(0, {})
    with pytest.raises(UserError, match="--workers 4 was given, but a launcher started 2 workers; leave"):
        who_works(4, launched)
