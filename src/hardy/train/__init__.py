"""The loop: step, hooks, checkpoints, metrics."""
