"""One optimizer step: exact under any split, silent about nothing, harmless on NaN."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.distributed.strategy import Strategy, Synchronous
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch
from hardy.optim.config import GuardConfig
from hardy.optim.guard import GradGuard
from hardy.train.step import Worker, train_step


class Toy(nn.Module):
    """A float64 bigram model with hardy's calling convention."""

    def __init__(self, vocab_size=7):
        super().__init__()
        self.table = nn.Parameter(
            torch.randn(
                vocab_size, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
            )
        )

    def forward(self, tokens_T, layout, labels_T):
        logits_TV = self.table[tokens_T]
        return nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum", ignore_index=IGNORED_LABEL)


def batch_of(tokens, *, num_ignored=0):
    tokens_T = torch.tensor(tokens)
    labels_T = tokens_T.roll(-1)
    labels_T[:num_ignored] = IGNORED_LABEL
    return PackedBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        layout=DocumentLayout.from_lengths([len(tokens)]),
        num_targets=len(tokens) - num_ignored,
    )


def worker_of(model, *, strategy=None, clip_norm=None, optimizer=None, guard=None, comm=None):
    comm = comm or Alone()
    return Worker(
        model=model,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=1.0),
        strategy=strategy or Synchronous(model, comm),
        comm=comm,
        device=torch.device("cpu"),
        clip_norm=clip_norm,
        guard=guard,
    )


def guard_of(history, *, max_norm=None, num_tensors=1, warmup_steps=1, **settings):
    config = GuardConfig(history=history, history_warmup_steps=warmup_steps, **settings)
    return GradGuard(config, max_norm=max_norm, num_tensors=num_tensors)


def step(worker, batches, *, lr=0.5, wants_stop=False):
    num_targets = sum(batch.num_targets for batch in batches)
    return train_step(worker, batches, num_targets=num_targets, lr=lr, wants_stop=wants_stop)


UNEVEN = [[1, 2, 3], [4, 5, 6, 0, 1, 2], [3]]


def test_any_split_equals_the_full_batch_and_a_mean_of_means_does_not():
    whole, parts = Toy(), Toy()
    merged = PackedBatch(
        tokens_T=torch.cat([batch_of(t, num_ignored=1 % len(t)).tokens_T for t in UNEVEN]),
        labels_T=torch.cat([batch_of(t, num_ignored=1 % len(t)).labels_T for t in UNEVEN]),
        layout=DocumentLayout.from_lengths([len(t) for t in UNEVEN]),
        num_targets=sum(len(t) - 1 % len(t) for t in UNEVEN),
    )
    split = [batch_of(t, num_ignored=1 % len(t)) for t in UNEVEN]
    a, b = step(worker_of(whole), [merged]), step(worker_of(parts), split)
    assert torch.allclose(whole.table, parts.table, rtol=0, atol=1e-14)
    assert a.loss == pytest.approx(b.loss, rel=1e-14)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-14)

    mean_of_means = Toy()
    losses = [mean_of_means(p.tokens_T, p.layout, p.labels_T) / p.num_targets for p in split]
    torch.stack(losses).mean().backward()
    moved_by_means = 0.5 * mean_of_means.table.grad
    assert (moved_by_means - (Toy().table - parts.table)).abs().max() > 1e-3


def test_the_loss_is_the_mean_over_targets():
    model = Toy()
    batch = batch_of([1, 2, 3, 4])
    expected = nn.functional.cross_entropy(model.table[batch.tokens_T], batch.labels_T).item()
    assert step(worker_of(model), [batch]).loss == pytest.approx(expected, rel=1e-14)


def test_clipping_scales_the_whole_gradient_and_reports_the_norm_before():
    free, clipped = Toy(), Toy()
    start = free.table.detach().clone()
    norm = step(worker_of(free), [batch_of([1, 2, 3])]).grad_norm
    result = step(worker_of(clipped, clip_norm=norm / 4), [batch_of([1, 2, 3])])
    assert result.grad_norm == pytest.approx(norm, rel=1e-14)
    assert torch.allclose(4 * (clipped.table - start), free.table - start, rtol=1e-5)
    same = Toy()
    step(worker_of(same, clip_norm=norm * 4), [batch_of([1, 2, 3])])
    assert torch.equal(same.table, free.table)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_neither_weights_nor_optimizer(poison):
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters())
    worker = worker_of(model, optimizer=optimizer, clip_norm=1.0)
    step(worker, [batch_of([1, 2, 3])])
    saved, state = model.table.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    with torch.no_grad():
        model.table[0, 0] = poison
    poisoned = model.table.detach().clone()
    result = step(worker, [batch_of([0, 0, 1])])
    assert not result.applied and not result.clipped
    assert result.left_out_for == "NaN or Inf in the gradient of table"
    assert torch.equal(model.table.nan_to_num(7.0), poisoned.nan_to_num(7.0))
    assert all(torch.equal(state[0][k], optimizer.state_dict()["state"][0][k]) for k in state[0])
    assert model.table.grad is None
    with torch.no_grad():
        model.table.copy_(saved)
    assert step(worker, [batch_of([1, 2])]).applied


def test_the_strategy_acts_at_its_moments_in_order():
    calls = []

    class Notes(Strategy):
        def before_forward(self):
            calls.append("before_forward")

        def reduce_gradients(self):
            calls.append("reduce_gradients" if model.table.grad is not None else "too early")

        def after_step(self):
            calls.append("after_step" if not torch.equal(model.table, before) else "too early")

    model = Toy()
    before = model.table.detach().clone()
    step(worker_of(model, strategy=Notes()), [batch_of([1, 2]), batch_of([3])])
    assert calls == ["before_forward", "reduce_gradients", "after_step"]


def test_the_learning_rate_and_the_wish_to_stop_get_through():
    model = Toy()
    before = model.table.detach().clone()
    result = step(worker_of(model), [batch_of([1, 2])], lr=0.0, wants_stop=True)
    assert torch.equal(model.table, before)
    assert result.stop_votes == 1
    assert result.busy_s > 0


class Steep(nn.Module):
    """A model whose loss is 1000 times as large."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return 1000 * self.model(*batch)


class Scaling(torch.optim.SGD):
    """An optimizer that divides the gradients itself."""

    told = None

    def step(self, closure=None, *, grad_scale=None, found_inf=None):
        self.told = grad_scale
        for group in self.param_groups:
            for parameter in group["params"]:
                with torch.no_grad():
                    parameter -= group["lr"] * parameter.grad / (1 if grad_scale is None else grad_scale)


@pytest.mark.parametrize("history", ["global", "zscore", "tensor"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, Scaling])
def test_a_guard_clips_by_its_history_whoever_scales(history, optimizer):
    """Two steps of one batch, the second 1000 times as large: it moves the weights by what history allows."""
    model = Toy()
    guard = guard_of(history, history_factor=2.0, history_beta=0.9)
    worker = worker_of(model, optimizer=optimizer(model.parameters(), lr=1.0), guard=guard)
    first = step(worker, [batch_of([1, 2, 3])])
    assert not first.clipped
    before = model.table.detach().clone()
    worker.model = Steep(model)
    second = step(worker, [batch_of([1, 2, 3])], lr=1.0)
    assert second.clipped and second.applied and second.grad_norm > 900 * first.grad_norm
    allowed = (2.0 * first.grad_norm, first.grad_norm + 4 * (0.05 * first.grad_norm) ** 2 / second.grad_norm)
    moved = (model.table - before).norm().item()
    assert moved == pytest.approx(allowed[1] if history == "zscore" else allowed[0], rel=1e-3)


def test_an_optimizer_that_scales_is_told_and_its_gradients_are_left_alone():
    model = Toy()
    optimizer = Scaling(model.parameters(), lr=1.0)
    step(worker_of(model, optimizer=optimizer, guard=guard_of("global")), [batch_of([1, 2])])
    assert optimizer.told is None  # nothing to clip, nothing to tell
    other = Toy()
    telling = Scaling(other.parameters(), lr=1.0)
    before = other.table.detach().clone()
    result = step(
        worker_of(other, optimizer=telling, guard=guard_of("global", max_norm=1e-3)), [batch_of([1])]
    )
    assert result.clipped and telling.told.shape == () and telling.told.dtype == torch.float32
    assert telling.told.item() == pytest.approx(result.grad_norm / 1e-3, rel=1e-6)
    assert ((other.table - before).norm() / 0.5).item() == pytest.approx(1e-3, rel=1e-6)


def test_a_guard_with_a_limit_alone_is_the_limit_of_before():
    """Up to the 1e-6 that torch's clipping adds to the norm."""
    plain, guarded = Toy(), Toy()
    for worker in (
        worker_of(plain, clip_norm=0.05),
        worker_of(guarded, guard=guard_of("off", max_norm=0.05)),
    ):
        assert step(worker, [batch_of([1, 2, 3])]).clipped
    moved = (plain.table - Toy().table).norm().item()
    assert torch.allclose(plain.table, guarded.table, rtol=0, atol=2e-6 * moved / 0.05)


@pytest.mark.parametrize("history", ["global", "tensor"])
def test_a_step_that_the_guard_leaves_out_changes_nothing_but_its_counters(history):
    model = Toy()
    guard = guard_of(history, spike_skip=3.0)
    worker = worker_of(model, optimizer=torch.optim.AdamW(model.parameters()), guard=guard)
    small = step(worker, [batch_of([1, 2, 3])])
    weights, state = model.table.detach().clone(), copy.deepcopy(worker.optimizer.state_dict()["state"])
    averages = [value.clone() for key, value in guard.state_dict().items() if key.startswith("average")]
    worker.model = Steep(model)
    result = step(worker, [batch_of([1, 2, 3])])
    assert result.grad_norm > 100 * small.grad_norm and not result.applied
    assert re.search(r"a gradient norm of .*, a spike by optim.guard.spike_skip=3", result.left_out_for)
    assert torch.equal(model.table, weights)
    assert all(torch.equal(state[0][k], worker.optimizer.state_dict()["state"][0][k]) for k in state[0])
    now = [value for key, value in guard.state_dict().items() if key.startswith("average")]
    assert all(torch.equal(a, b) for a, b in zip(averages, now, strict=True))
    assert guard.check().n_skipped == 1
    worker.model = model
    assert step(worker, [batch_of([1, 2, 3])]).applied


def test_with_a_guard_a_bad_loss_with_good_gradients_is_a_step():
    class Reported(nn.Module):
        """The loss reads NaN; its gradient is right."""

        def forward(self, *batch):
            loss = model(*batch)
            return loss + (math.nan - loss).detach()

    model = Toy()
    worker = worker_of(model, guard=guard_of("global"))
    worker.model = Reported()
    before = model.table.detach().clone()
    result = step(worker, [batch_of([1, 2])])
    assert result.applied and math.isnan(result.loss)
    assert not torch.equal(model.table, before)
    worker.guard = None
    assert step(worker, [batch_of([1, 2])]).left_out_for.startswith(
        "a loss of nan with a gradient norm of 0."
    )


def test_nan_on_one_worker_leaves_the_step_out_on_all_and_is_named():
    def body(comm):
        model = Toy()
        guard = guard_of("global", max_norm=1.0)
        worker = worker_of(model, guard=guard, comm=comm)
        before = model.table.detach().clone()
        if comm.rank == 1:
            with torch.no_grad():
                model.table[1, 0] = math.nan
        result = step(worker, [batch_of([1, 2])])
        return result.applied, result.left_out_for, torch.equal(model.table[2:], before[2:])

    assert SimWorld(3).run(body) == [(False, "NaN or Inf in the gradient of table", True)] * 3


@pytest.mark.parametrize("history", [None, "global", "tensor"])
def test_a_step_waits_for_the_device_once(history, monkeypatch):
    worker = worker_of(Toy(), clip_norm=0.1, guard=history and guard_of(history, max_norm=0.1))
    batches, waits = [batch_of([1, 2]), batch_of([3])], []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda x, *a, name=name, real=real, **k: waits.append(name) or real(x, *a, **k),
        )
    assert step(worker, batches).clipped
    assert waits == ["tolist"]


class Says(Strategy):
    """A strategy that answers what it was made with."""

    def __init__(self, *, refusal="", is_overtaken=False, skips_forward=False):
        self._answers = (refusal, is_overtaken, skips_forward)

    @property
    def refusal(self):
        return self._answers[0]

    @property
    def is_overtaken(self):
        return self._answers[1]

    @property
    def skips_forward(self):
        return self._answers[2]


@pytest.mark.parametrize(
    ("answers", "applied", "reason"),
    [
        ({"refusal": "nobody is believed"}, False, "nobody is believed"),
        ({"is_overtaken": True}, True, ""),
        ({"skips_forward": True}, True, ""),
    ],
)
def test_a_step_that_is_refused_overtaken_or_not_computed_moves_nothing(answers, applied, reason):
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    result = step(worker_of(model, strategy=Says(**answers)), [batch_of([1, 2, 3])])
    assert (result.applied, result.left_out_for) == (applied, reason)
    assert torch.equal(model.table, before["table"])
