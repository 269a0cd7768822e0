"""Train a tiny language model on the Python sources installed here, and let it write.

The same as `hardy train tiny --run-dir runs/example`, as a library.
"""

import sys
from pathlib import Path

from hardy.config import from_dict, override, to_dict
from hardy.recipes.table import recipe
from hardy.train.config import TrainConfig
from hardy.train.run import Surroundings, start


def main(folder: Path, steps: int = 60) -> None:
    changes = {"train.steps": steps, "data.limit_mb": 2.0, "optim.schedule.warmup_steps": steps // 10}
    config = from_dict(TrainConfig, override(to_dict(recipe("tiny")), changes))
    summary = start(config, folder / "run", Surroundings(cache_dir=folder / "cache"))
    print(
        f"loss {summary.first_loss:.3f} -> {summary.last_loss:.3f}, validation {summary.validation_loss:.3f}"
    )
    print(f"a model without context would have {summary.unigram_entropy:.3f}")
    print(f"{summary.tokens_per_s:,.0f} tokens/s, {summary.peak_memory_mb:,.0f} MB, {summary.run_dir}")
    print(summary.sample)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))
