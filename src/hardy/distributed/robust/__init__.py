"""Training with workers that are slow, fail or lie."""
