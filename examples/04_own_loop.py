"""hardy's parts in a loop of your own: packed data, a model that keeps documents apart, one exact step."""

import sys
import tempfile
from pathlib import Path

import torch

from hardy.data.config import DataConfig
from hardy.data.corpus import prepare
from hardy.data.stream import PackStream
from hardy.distributed.comm import Alone
from hardy.distributed.strategy import Synchronous
from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.model.init import initialise
from hardy.train.step import Worker, train_step


def main(folder: Path, steps: int = 5) -> None:
    data = DataConfig(source="synthetic:lognormal,documents=200,mean=150", pack_tokens=128)
    corpus = prepare(data, cache_dir=folder)
    end_id = corpus.tokenizer.end_id
    stream = PackStream(
        corpus.train, pack_tokens=128, document_tokens=None, packing="stream", seed=0, end_id=end_id
    )
    model = build_model(ModelConfig(name="1m"), vocab_size=corpus.tokenizer.vocab_size, device="cpu")
    initialise(model, seed=0)
    comm = Alone()
    worker = Worker(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),  # any torch optimizer
        strategy=Synchronous(model, comm),
        comm=comm,
        device=torch.device("cpu"),
        clip_norm=1.0,
    )
    for step in range(steps):
        batches = [stream.batch([4 * step, 4 * step + 1]), stream.batch([4 * step + 2, 4 * step + 3])]
        num_targets = sum(batch.num_targets for batch in batches)
        result = train_step(worker, batches, num_targets=num_targets, lr=3e-3, wants_stop=False)
        print(f"step {step + 1}: loss {result.loss:.3f}, gradient norm {result.grad_norm:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
