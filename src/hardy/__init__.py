"""Efficient and robust training of language models in PyTorch."""
