"""One plain file per paper: float64, the paper's letters, torch only."""
