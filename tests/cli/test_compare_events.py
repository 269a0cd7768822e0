"""What went wrong in a run, and when."""

from hardy.cli.compare_events import Event, events_of


def told(records, **more):
    return [(event.text, event.step, event.last_step, event.times) for event in events_of(records, **more)]


def test_a_quiet_run_has_no_events():
    quiet = {"skipped": 0, "rollbacks": 0, "flagged_replicas": [], "removed_workers": [], "lost": 0}
    assert told([{"step": step, "overtaken": False, "warning": "", **quiet} for step in (1, 2)]) == []
    assert told([]) == []


def test_every_kind_of_event_has_its_words():
    records = [
        {"step": 1, "members": [0, 1], "skipped": 0},
        {"step": 10, "flagged_replicas": [1, 2], "nonfinite_units": 3, "members": [0, 2]},
        {"step": 20, "removed_workers": [0], "skipped": 1, "rollbacks": 1, "members": [0, 1, 2]},
        {"step": 30, "overtaken": True, "lost": 2, "warning": "one replica weighs nearly all"},
    ]
    assert told(records, resumed=[5]) == [
        ("resumed from a checkpoint", 5, 5, 1),
        ("replicas 1, 2 left out of a round", 10, 10, 1),
        ("a replica brought values that are not finite", 10, 10, 1),
        ("replica 1 gone", 10, 10, 1),
        ("replica 2 joined", 10, 10, 1),
        ("worker 0 removed by the rule", 20, 20, 1),
        ("step left out", 20, 20, 1),
        ("round taken back: all replicas were left out", 20, 20, 1),
        ("replica 1 joined", 20, 20, 1),
        ("was overtaken and took over the others' state", 30, 30, 1),
        ("warning: one replica weighs nearly all", 30, 30, 1),
        ("message or worker lost", 30, 30, 1),
    ]


def test_a_counter_that_stays_or_begins_again_is_no_event():
    records = [{"step": step, "skipped": count} for step, count in enumerate([1, 1, 0, 1, 1], start=1)]
    assert told(records) == [("step left out", 1, 1, 1), ("step left out", 4, 4, 1)]


def test_the_same_within_a_hundredth_of_the_run_is_told_once():
    removed = {10, 12, 20, 23}  # of 200 steps: two apart are one event, three are two
    records = [{"step": step, "removed_workers": [1] if step in removed else []} for step in range(1, 201)]
    assert told(records) == [
        ("worker 1 removed by the rule", 10, 12, 2),
        ("worker 1 removed by the rule", 20, 20, 1),
        ("worker 1 removed by the rule", 23, 23, 1),
    ]


def test_an_event_without_a_step_says_so():
    assert Event(text="a", step=None, last_step=None).when() == "not known"
    assert Event(text="a", step=1200, last_step=1200).when() == "1,200"
