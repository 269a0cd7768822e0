"""DDP, FSDP2 and HSDP on real processes: all are the full batch, whatever the mesh."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hardy.distributed.comm import Alone
from hardy.distributed.sharded import (
    accumulating,
    averages_in_backward,
    clip_gradients,
    gather_full,
    grad_norm,
    parallelize,
    place,
)
from hardy.distributed.simulation import SimWorld
from hardy.distributed.strategy import Strategy, Synchronous, watch_units
from hardy.ops.packed import DocumentLayout
from hardy.rng import generator_for

pytestmark = pytest.mark.mp

VOCABULARY, WIDTH, HIDDEN = 11, 5, 7  # nothing divisible by two: uneven shards, and empty ones of the scale
BATCH = 12  # every world below gets equally many rows
UNITS = ("blocks.0", "blocks.1")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x, layout):
        assert isinstance(layout, DocumentLayout)
        return x + self.down(torch.tanh(self.up(self.scale * x)))


class Toy(nn.Module):
    """A head tied to the embedding around two blocks; returns the summed loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.layout_seen = None

    def forward(self, tokens, layout, labels=None):
        self.layout_seen = layout
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, layout)
        logits = self.head(x)
        return logits if labels is None else nn.functional.cross_entropy(logits, labels, reduction="sum")


def measure_and_clip(parameters, clip_norm):
    """Return the norm of the gradients before they are clipped; None does not clip."""
    norm = grad_norm(parameters)
    if clip_norm is not None:
        clip_gradients(parameters, norm=norm, clip_norm=clip_norm)
    return norm.item()


def fill(model):
    """Give each parameter its own reproducible values, whatever part of it lives here."""
    for name, param in model.named_parameters():
        draw = generator_for(0, "weights", name.removeprefix("module."))
        place(param, torch.randn(param.shape, generator=draw, dtype=torch.float64) / 2)


def build(comm, *, replicas, shards, start="real"):
    """The toy, in float64, as `replicas` x `shards` workers hold it."""
    with torch.device("meta" if start == "meta" else "cpu"):
        model = Toy().double()
    if start == "real":
        fill(model)
    wrapped = parallelize(
        model,
        comm,
        replicas=replicas,
        shards=shards,
        unit_names=UNITS,
        device_type="cpu",
        precision="fp32",
    )
    if start == "meta":
        wrapped.to_empty(device="cpu")
        fill(wrapped)
    return wrapped


def rows(step):
    """One batch: BATCH rows of four tokens and their labels."""
    draw = generator_for(0, "tokens", step)
    return [torch.randint(VOCABULARY, (BATCH, 4), generator=draw) for _ in range(2)]


def train(comm, model, *, num_steps=10, micro_rows=BATCH, clip_norm=0.5):
    """Train on this worker's rows; return losses and gradient norms of the whole batch, and the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    strategy = Synchronous(model, comm)
    losses, norms = [], []
    for step in range(num_steps):
        tokens, labels = (part[comm.rank :: comm.size] for part in rows(step))
        total = torch.zeros((), dtype=torch.float64)
        starts = range(0, len(tokens), micro_rows)
        for start in starts:
            micro = slice(start, start + micro_rows)
            layout = DocumentLayout.from_lengths([4] * len(tokens[micro]))
            with accumulating(model, last=start == starts[-1]):
                loss = model(tokens[micro].flatten(), layout, labels[micro].flatten())
                (loss * (comm.size / (4 * BATCH))).backward()
            total += loss.detach()
        strategy.reduce_gradients()
        norms.append(measure_and_clip(list(model.parameters()), clip_norm))
        losses.append(comm.sum(total).item() / (4 * BATCH))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, weights(model)


def weights(model):
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return torch.cat([gather_full(named[name]).flatten() for name in sorted(named)])


@pytest.fixture(scope="module")
def full_batch():
    return train(Alone(), build(Alone(), replicas=1, shards=1))


def assert_same_run(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-10)
    assert got[1] == pytest.approx(want[1], rel=1e-10)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("micro_rows", [BATCH, 1], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("replicas", "shards"), [(2, 1), (1, 2), (1, 3), (2, 2)], ids=["ddp-2", "fsdp-2", "fsdp-3", "hsdp-2x2"]
)
def test_every_mesh_is_the_full_batch(run_workers, full_batch, replicas, shards, micro_rows):
    def body(comm):
        model = build(comm, replicas=replicas, shards=shards)
        assert averages_in_backward(model)
        return train(comm, model, micro_rows=micro_rows)

    for answer in run_workers(body, size=replicas * shards):
        assert_same_run(answer, full_batch)


@pytest.mark.parametrize("micro_rows", [BATCH, 1], ids=["whole", "accumulated"])
def test_plain_processes_with_a_strategy_are_the_full_batch(run_workers, full_batch, micro_rows):
    def body(comm):
        return train(comm, build(Alone(), replicas=1, shards=1), micro_rows=micro_rows)

    for answer in run_workers(body, size=2) + SimWorld(4).run(body):
        assert_same_run(answer, full_batch)


@pytest.mark.parametrize(("replicas", "shards"), [(1, 2), (2, 2)], ids=["fsdp-2", "hsdp-2x2"])
def test_a_model_from_the_meta_device_gets_the_same_values_and_keeps_its_tie(
    run_workers, full_batch, replicas, shards
):
    def body(comm):
        model = build(comm, replicas=replicas, shards=shards, start="meta")
        sharded = [isinstance(param, DTensor) for param in model.parameters()]
        tied = model.head.weight is model.embedding.weight
        return sharded, tied, train(comm, model, num_steps=10)

    for sharded, tied, answer in run_workers(body, size=replicas * shards):
        assert all(sharded) and len(sharded) == 9 and tied
        assert_same_run(answer, full_batch)


def test_shards_are_uneven_and_some_are_empty(run_workers):
    def body(comm):
        model = build(comm, replicas=1, shards=2)
        shapes = {name: list(param.to_local().shape) for name, param in model.named_parameters()}
        return shapes["embedding.weight"], shapes["blocks.0.scale"]

    assert run_workers(body) == [([6, WIDTH], [1]), ([5, WIDTH], [0])]


def test_placing_values_needs_nobody_else(run_workers):
    def body(comm):
        model = build(comm, replicas=1, shards=2)
        if comm.rank == 0:
            place(model.embedding.weight, torch.full((VOCABULARY, WIDTH), 7.0))
        return model.embedding.weight.to_local().unique().numel()

    mine, untouched = run_workers(body, timeout_s=5.0)
    assert mine == 1 and untouched > 1


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
@pytest.mark.parametrize(("replicas", "shards"), [(2, 1), (1, 2), (2, 2)], ids=["ddp", "fsdp", "hsdp"])
def test_the_norm_counts_each_shard_once(run_workers, replicas, shards, clip_norm):
    def body(comm, replicas=replicas, shards=shards):
        model = build(comm, replicas=replicas, shards=shards)
        tokens, labels = (part.flatten() for part in rows(0))
        model(tokens, DocumentLayout.from_lengths([len(tokens)]), labels).backward()
        before = measure_and_clip(list(model.parameters()), clip_norm)
        return before, grad_norm(model.parameters()).item()

    want = body(Alone(), replicas=1, shards=1)
    for got in run_workers(body, size=replicas * shards):
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("shards", [1, 2], ids=["ddp", "fsdp"])
def test_a_frozen_dataclass_passes_the_wrapper_unchanged(run_workers, shards):
    def body(comm):
        model = build(comm, replicas=2 // shards, shards=shards)
        layout = DocumentLayout.from_lengths([2, 1])
        model(torch.arange(3), layout)
        inner = model.module if shards == 1 else model
        return inner.layout_seen is layout

    assert run_workers(body) == [True, True]


@pytest.mark.parametrize(("replicas", "shards"), [(2, 1), (1, 2)], ids=["ddp", "fsdp"])
def test_nothing_is_sent_before_the_last_micro_batch(run_workers, replicas, shards):
    def body(comm):
        model = build(comm, replicas=replicas, shards=shards)
        weight = (model.module if shards == 1 else model).blocks[1].up.weight
        seen = []
        for last in (False, True):
            with accumulating(model, last=last):
                tokens = torch.arange(3) + comm.rank
                model(tokens, DocumentLayout.from_lengths([3]), tokens).backward()
            seen.append(None if weight.grad is None else gather_full(weight.grad).clone())
        return seen

    (early_0, late_0), (early_1, late_1) = run_workers(body)
    assert torch.equal(late_0, late_1) and late_0.abs().sum() > 0
    if shards == 1:
        assert not torch.equal(early_0, early_1)
        torch.testing.assert_close(
            late_0, early_0 + early_1
        )  # each ran its micro-batch twice: mean of doubles
    else:
        assert early_0 is None and early_1 is None


class Zeroer(Strategy):
    """Silences each unit just before it runs."""

    def __init__(self, model):
        self.shards = {
            name: [param.to_local() for param in model.get_submodule(name).parameters()] for name in UNITS
        }
        self.names = []

    def before_module_forward(self, name):
        self.names.append(name)
        with torch.no_grad():
            for shard in self.shards[name]:
                shard.zero_()


def test_a_strategy_acts_before_a_unit_is_gathered(run_workers):
    def body(comm):
        model = build(comm, replicas=1, shards=2)
        tokens, layout = torch.arange(VOCABULARY), DocumentLayout.from_lengths([VOCABULARY])
        with torch.no_grad():
            loud = model(tokens, layout)  # also gathers once, so that a stale copy could be met below
            table = model.embedding.weight.clone()
            strategy = Zeroer(model)
            watch_units(model, UNITS, strategy)
            with torch.enable_grad():  # strategies act in training only
                quiet = model(tokens, layout).detach()
        # Silent blocks pass their input on, so only the tied embedding and head are left.
        return strategy.names, torch.equal(quiet, table @ table.T), torch.equal(loud, quiet)

    assert run_workers(body) == [(list(UNITS), True, False)] * 2
