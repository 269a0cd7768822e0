"""One small Llama-like decoder."""
