"""From text to packed batches, each step a function of (seed, step)."""
