"""Large steps for heads: normalised logistic regression where the theorem holds, capped elsewhere."""

import pytest
import torch

from hardy.config import UserError
from hardy.distributed.simulation import SimWorld
from hardy.optim.large_step import LargeStep
from hardy.reference import perceptron as twin
from hardy.rng import generator_for


def rows(n=30, d=4):
    x = torch.randn(n, d, generator=generator_for(0, "head"), dtype=torch.float64)
    return x, (x @ torch.ones(d, dtype=torch.float64) > 0).long()


def one_step(head, x, y, step, *, gamma, parts=1):
    head.zero_grad()
    for part_x, part_y in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        step.loss(head(part_x), part_y).backward()
    beta = step.scale(head.parameters())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter -= gamma * parameter.grad
    return beta


def zero_head(d=4, classes=2):
    head = torch.nn.Linear(d, classes, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    return head


@pytest.mark.parametrize("parts", [1, 4])
def test_a_head_of_two_classes_is_normalised_logistic_regression_with_twice_the_step(parts):
    x, y = rows()
    head, step = zero_head(), LargeStep(most=1e9)
    Z = x * (1 - 2 * y)[:, None]
    for _, theta in zip(range(12), twin.path(twin.nlr, Z, 2 * 0.7), strict=False):
        torch.testing.assert_close(head.weight[0] - head.weight[1], theta, rtol=1e-10, atol=1e-12)
        one_step(head, x, y, step, gamma=0.7, parts=parts)


def test_beta_is_capped_and_begins_at_two():
    x, y = rows()
    head, step = zero_head(), LargeStep(most=3.0)
    betas = [one_step(head, x, y, step, gamma=50.0) for _ in range(4)]
    assert betas[0] == pytest.approx(2) and max(betas) == 3.0


def test_rows_spread_unevenly_over_workers_change_nothing():
    x, y = rows()
    y[3] = -100
    whole, step = zero_head(), LargeStep()
    torch.nn.init.constant_(whole.weight[0], 0.5)
    beta = one_step(whole, x, y, step, gamma=1.0)
    parts = [slice(0, 5), slice(5, 6), slice(6, 30), slice(30, 30)]

    def body(comm):
        head, step = zero_head(), LargeStep()
        torch.nn.init.constant_(head.weight[0], 0.5)
        step.loss(head(x[parts[comm.rank]]), y[parts[comm.rank]]).backward()
        head.weight.grad = comm.sum(head.weight.grad)
        beta = step.scale(head.parameters(), sum_over_workers=comm.sum)
        return beta, (head.weight - head.weight.grad).detach()

    for other_beta, weight in SimWorld(4).run(body):
        assert other_beta == pytest.approx(beta, rel=1e-12)
        torch.testing.assert_close(weight, whole.weight.detach(), rtol=1e-12, atol=1e-12)


def test_ignored_labels_do_not_count():
    x, y = rows()
    with_ignored, without = zero_head(), zero_head()
    kept = torch.arange(30) % 3 > 0
    one_step(with_ignored, x, y.where(kept, -100), LargeStep(), gamma=1.0)
    one_step(without, x[kept], y[kept], LargeStep(), gamma=1.0)
    torch.testing.assert_close(with_ignored.weight, without.weight)


def test_half_precision_logits_are_counted_in_fp32():
    step = LargeStep()
    logits = torch.tensor([[30.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    assert step.loss(logits, torch.tensor([1])).dtype == torch.float32
    sure = torch.tensor([[12.0, 0.0]])
    other = LargeStep(most=1e6)
    other.loss(sure, torch.tensor([0]))
    assert other.scale([]) == pytest.approx(1 / torch.sigmoid(torch.tensor(-12.0)).item(), rel=1e-5)


def test_parameters_without_gradient_are_passed_over():
    x, y = rows()
    head, step = zero_head(), LargeStep()
    step.loss(head(x), y).backward()
    other = torch.nn.Parameter(torch.ones(1))
    step.scale([other, *head.parameters()])
    assert other.grad is None


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="large_step.most must be at least 1 and finite, got inf"):
        LargeStep(most=float("inf"))
    step = LargeStep()
    with pytest.raises(UserError, match="LargeStep.scale was called before LargeStep.loss"):
        step.scale([])
    step.loss(torch.zeros(1, 2), torch.tensor([-100]))
    with pytest.raises(UserError, match="no label of the batch counts"):
        step.scale([])
