"""Train on files of your own with a tokenizer of your own, then continue a prompt.

On the command line:
    hardy train tiny --run-dir runs/mine --data.source 'files:my/texts/**/*.md' --data.tokenizer bpe:2048
    hardy generate runs/mine --prompt 'Once upon a time'
"""

import sys
from pathlib import Path

from hardy.config import from_dict, override, to_dict
from hardy.data.tokenizer import load_tokenizer
from hardy.model.build import build_model
from hardy.model.generate import generate
from hardy.recipes.table import recipe
from hardy.train.config import TrainConfig
from hardy.train.manifest import newest_good
from hardy.train.run import Surroundings, start
from hardy.train.storage import load_model_tensors


def main(texts: str, folder: Path, steps: int = 60) -> None:
    changes = {
        "data.source": f"files:{texts}",
        "data.tokenizer": "bpe:512",
        "data.pack_tokens": 64,
        "train.steps": steps,
        "train.batch_packs": 4,
        "optim.schedule.warmup_steps": steps // 10,
    }
    config = from_dict(TrainConfig, override(to_dict(recipe("tiny")), changes))
    start(config, folder / "run", Surroundings(cache_dir=folder / "cache"))

    tokenizer = load_tokenizer(folder / "run" / "tokenizer")
    model = build_model(config.model, vocab_size=tokenizer.vocab_size, device="cpu")
    checkpoint, _ = newest_good(folder / "run" / "checkpoints")
    model.load_state_dict(load_model_tensors(checkpoint))
    (prompt,) = tokenizer.encode(["The house "])
    added = generate(
        model, prompt, max_new_tokens=32, temperature=0.8, top_p=0.95, stop_ids=[tokenizer.end_id]
    )
    print("The house " + tokenizer.decode(added))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/mine"))
