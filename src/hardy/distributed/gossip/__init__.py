"""Training without a meeting of all: each worker sends to a few neighbours."""
