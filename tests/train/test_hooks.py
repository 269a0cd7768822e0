"""A hook that overrides nothing may listen to everything."""

from hardy.train.hooks import Hook, Summary


def test_every_moment_is_empty_by_default():
    hook = Hook()
    hook.on_phase("reading", 0.5)
    hook.on_start(None)
    hook.on_step({"step": 1})
    hook.on_end(None)
    hook.close()


def test_a_summary_is_plain_values():
    fields = Summary.__dataclass_fields__
    assert {"first_loss", "last_loss", "validation_loss", "unigram_entropy", "tokens_per_s"} <= set(fields)
    assert {"peak_memory_mb", "run_dir", "sample", "stopped_by"} <= set(fields)
