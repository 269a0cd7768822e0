"""Planning on integers: no tensors, no processes."""
