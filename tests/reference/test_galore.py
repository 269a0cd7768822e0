import pytest
import torch

from hardy.reference.galore import Settings, basis, galore


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(10, 7), (7, 10), (7, 7)])
def test_the_update_has_rank_r_and_lies_in_the_basis(shape):
    W, G = draw(*shape, seed=0), draw(*shape, seed=1)
    change = galore(W, [G], Settings(r=3, eta=0.1))[0] - W
    P = basis(G, 3)
    assert torch.linalg.matrix_rank(change, rtol=1e-10) == 3
    inside = P @ (P.T @ change) if shape[0] <= shape[1] else change @ P @ P.T
    torch.testing.assert_close(inside, change, rtol=0, atol=1e-14)
    assert (change * G).sum() < 0
    # The first direction is 1 or -1 everywhere in the basis.
    wanted = 0.1 * 0.25 * (3 * max(shape)) ** 0.5
    assert change.norm().item() == pytest.approx(wanted, rel=1e-6)


def test_the_basis_changes_when_it_is_due_only():
    W, Gs = draw(8, 6, seed=0), [draw(8, 6, seed=t) for t in range(1, 6)]
    Ws = [W, *galore(W, Gs, Settings(r=2, eta=0.1, T=3))]
    for t, first in ((0, 0), (1, 0), (2, 0), (3, 3), (4, 3)):
        P, change = basis(Gs[first], 2), Ws[t + 1] - Ws[t]
        torch.testing.assert_close(change @ P @ P.T, change, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 20), (20, 1)])
def test_a_single_row_or_column_is_torchs_adamw(shape):
    W, Gs = draw(*shape, seed=0), [draw(*shape, seed=t) for t in range(1, 13)]
    param = torch.nn.Parameter(W.clone())
    adam = torch.optim.AdamW([param], lr=0.01, weight_decay=0.1)
    for G in Gs:
        param.grad = G
        adam.step()
    # The basis is 1 or -1; a new one in between could have the other sign, against the old moments.
    got = galore(W, Gs, Settings(r=1, eta=0.01, alpha=1.0, lam=0.1, T=100))[-1]
    torch.testing.assert_close(got, param.detach(), rtol=0, atol=1e-13)
