"""One optimizer step: exact under any split, silent about nothing, harmless on NaN."""

import copy

import pytest
import torch
from torch import nn

from hardy.distributed.comm import Alone
from hardy.distributed.strategy import Strategy, Synchronous
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch
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


def worker_of(model, *, strategy=None, clip_norm=None, optimizer=None):
    comm = Alone()
    return Worker(
        model=model,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=1.0),
        strategy=strategy or Synchronous(model, comm),
        comm=comm,
        device=torch.device("cpu"),
        clip_norm=clip_norm,
    )


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
    assert not result.applied
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
