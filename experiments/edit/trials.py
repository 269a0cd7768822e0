"""One training of four simulated replicas, by any strategy, one of them perhaps on corrupted data."""

import math
import statistics
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad, relu

from hardy.config import from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.data.stream import PackStream
from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.comm import Alone
from hardy.distributed.groups import Grid, split
from hardy.distributed.simulation import SimWorld
from hardy.optim.build import build_optimizer
from hardy.optim.schedules import build_schedule
from hardy.rng import generator_for
from hardy.train.config import TrainConfig
from hardy.train.device import denormals_flushed
from hardy.train.step import Worker, train_step

NUM_REPLICAS = 4
FAULTY = NUM_REPLICAS - 1
"""The replica that reads random bytes, where one does."""
CONTEXT, EMBEDDING, HIDDEN = 4, 12, 32
VOCABULARY, NUM_BYTES = 258, 256
SETTINGS = {
    "data.source": "pydocs",
    "data.limit_mb": 8,
    "optim.beta2": 0.999,
    "optim.schedule.final_fraction": 0.0,
}
VALIDATION_TOKENS = 65536


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training."""

    strategy: tuple[tuple[str, object], ...]
    """Its settings, in order."""
    lr: float
    """Of the inner optimizer, AdamW."""
    seed: int
    steps: int
    pack_tokens: int
    """Bytes that a replica reads in a step."""
    corrupted: bool = False
    """Whether one replica reads random bytes from a third of the run on."""
    validation_tokens: int = VALIDATION_TOKENS
    """Held-out bytes that the loss is taken on, at most."""
    replicas: int = NUM_REPLICAS
    """How many train; one alone reads what the first of four would."""

    @property
    def label(self) -> str:
        """What it is called where progress is shown."""
        named = dict(self.strategy)
        outer = f", outer lr {named['outer.lr']:g}" if "outer.lr" in named else ""
        others = f", {self.replicas} replicas, {self.steps} steps, seed {self.seed}"
        return f"{named['name']}, lr {self.lr:g}{outer}{others}{', corrupted' if self.corrupted else ''}"


class NextByte(nn.Module):
    """Guesses a byte from the four before it, by one hidden layer; called as `train_step` calls a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.hidden = nn.Linear(CONTEXT * EMBEDDING, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens_T, layout, labels_T):
        """Return the summed negative log-likelihood; the borders of documents are not looked at."""
        contexts_TC = pad(tokens_T, (CONTEXT - 1, 0)).unfold(0, CONTEXT, 1)
        features_TH = relu(self.hidden(self.embedding(contexts_TC).flatten(1)))
        return cross_entropy(self.head(features_TH), labels_T, reduction="sum")

    def initialise(self, seed):
        generator = generator_for(seed, "weights")
        for name, param in self.named_parameters():
            std = 1.0 if name.startswith("embedding") else param.shape[-1] ** -0.5
            nn.init.normal_(param, std=std if param.ndim == 2 else 0.0, generator=generator)


@cache
def corpus_of(config):
    """Return the corpus, prepared once in a process."""
    return prepare(config, cache_dir=Path(tempfile.gettempdir()) / "hardy-experiments")


class Replica:
    """One worker's side of a training."""

    def __init__(self, comm, trial):
        self.trial, self.rank = trial, comm.rank
        changes = SETTINGS | {f"strategy.{key}": value for key, value in trial.strategy}
        changes |= {
            "data.pack_tokens": trial.pack_tokens,
            "train.steps": trial.steps,
            "train.seed": trial.seed,
            "optim.lr": trial.lr,
        }
        changes["optim.schedule.warmup_steps"] = trial.steps // 50
        config = from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))
        corpus = corpus_of(config.data)

        def stream(store, num_epochs):
            return PackStream(
                store,
                pack_tokens=config.data.pack_tokens,
                document_tokens=None,
                packing="stream",
                seed=trial.seed,
                end_id=corpus.tokenizer.end_id,
                num_epochs=num_epochs,
            )

        self.train_packs, self.held_out = stream(corpus.train, None), stream(corpus.validation, 1)
        self.model = NextByte()
        self.model.initialise(trial.seed)
        optimizer = build_optimizer(config.optim, self.model)
        self.schedule = build_schedule(config.optim.schedule, peak=trial.lr, total_steps=trial.steps)
        alone = Alone(clock=comm.clock)
        grid = Grid(inner=comm, outer=alone, replica=0, replicas=1, shard=comm.rank, shards=comm.size)
        if config.strategy.name != "synchronous":
            grid = split(comm, replicas=comm.size, shards=1)
        names = ["hidden", "head"]
        trained = Trained(model=self.model, optimizer=optimizer, unit_names=names, comm=comm, grid=grid)
        self.strategy = build_strategy(config.strategy, trained)
        self.worker = Worker(
            model=self.model,
            optimizer=optimizer,
            strategy=self.strategy,
            comm=grid.inner,
            everyone=comm,
            replicas=grid.replicas,
            device=torch.device("cpu"),
            clip_norm=config.optim.clip_norm,
        )

    def train(self):
        """Train to the end, and return what this replica's rounds said."""
        rounds = []
        for step in range(self.trial.steps):
            batch = self._batch(step)
            num_targets = batch.num_targets * self.trial.replicas
            rate = self.schedule.rate(step)
            train_step(self.worker, [batch], num_targets=num_targets, lr=rate, wants_stop=False)
            report = self.strategy.take_report()
            rounds += [report] if report else []
        self.strategy.finish()
        return rounds

    def loss(self):
        """Return the loss of the anchor on the same held-out packs for all, in nats per byte."""
        most = self.trial.validation_tokens // self.trial.pack_tokens
        batch = self.held_out.batch(range(min(most, self.held_out.num_packs)))
        with torch.no_grad(), self.strategy.evaluation_parameters():
            return self.model(batch.tokens_T, batch.layout, batch.labels_T).item() / batch.num_targets

    def _batch(self, step):
        """Return this replica's pack of a step, or as many random bytes."""
        batch = self.train_packs.batch([step * NUM_REPLICAS + self.rank])
        is_noise = self.trial.corrupted and self.rank == FAULTY and step >= self.trial.steps // 3
        if not is_noise:
            return batch
        generator = generator_for(self.trial.seed, "noise", step)
        noise_2T = torch.randint(NUM_BYTES, (2, batch.num_targets), generator=generator)
        return replace(batch, tokens_T=noise_2T[0], labels_T=noise_2T[1])


def train(trial):
    """Return what became of a training: the loss of the anchor, and its rounds in numbers."""
    torch.set_num_threads(1)

    def body(comm):
        replica = Replica(comm, trial)
        rounds = replica.train()
        return replica.loss(), rounds

    with denormals_flushed():
        results = SimWorld(trial.replicas, seed=trial.seed).run(body)
    losses = [loss for loss, _ in results]
    if len({str(loss) for loss in losses}) != 1:
        raise RuntimeError(f"the replicas do not agree on the loss of the anchor: {losses}")
    return {"loss": losses[0] if math.isfinite(losses[0]) else None} | told(results[0][1])


def told(rounds):
    """Return what the rounds of one run say."""
    if not rounds:
        return {}
    left_out = [replica for line in rounds for replica in line["flagged_replicas"]]
    return {
        "rounds": len(rounds),
        "left_out": [left_out.count(replica) for replica in range(NUM_REPLICAS)],
        "effective_replicas": statistics.fmean(line["effective_replicas"] for line in rounds),
        "clip_share": statistics.fmean(line["clip_share"] for line in rounds),
    }
