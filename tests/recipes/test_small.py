"""Runs for a laptop."""

from hardy.recipes.small import demo, tiny
from hardy.train.plan import plan_run


def test_small_runs_need_nothing_but_this_machine():
    for config in (tiny(), demo()):
        assert config.data.source == "pydocs"
        assert (config.train.device, config.log.trackers) == ("auto", ())


def test_small_runs_are_small_and_may_be_shared_by_two_workers():
    sizes = [plan_run(build(), num_workers=2) for build in (tiny, demo)]
    assert 900_000 < sizes[0].num_parameters < 1_100_000 < sizes[1].num_parameters < 5_000_000
    assert sizes[0].total_tokens < 1_000_000


def test_a_small_run_evaluates_and_saves_before_its_end():
    for config in (tiny(), demo()):
        assert config.train.evaluate_every_steps < config.train.steps
        assert config.checkpoint.every_steps < config.train.steps
