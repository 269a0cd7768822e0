import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from hardy.ops.loss import linear_correct_sum, linear_cross_entropy_sum
from hardy.ops.packed import IGNORED_LABEL


def problem(dtype=torch.float64, *, tokens=13, hidden=6, vocab=11):
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator).to(dtype)
    weight_VD = torch.randn(vocab, hidden, dtype=torch.float64, generator=generator).to(dtype)
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    labels_T[::4] = IGNORED_LABEL
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), labels_T


def plain(hidden_TD, weight_VD, labels_T, *, label_smoothing=0.0, z_loss=0.0):
    logits_TV = linear(hidden_TD, weight_VD)
    settings = {"ignore_index": IGNORED_LABEL, "reduction": "sum", "label_smoothing": label_smoothing}
    drift_T = logits_TV.logsumexp(1).square()[labels_T != IGNORED_LABEL]
    return cross_entropy(logits_TV, labels_T, **settings) + z_loss * drift_T.sum()


TERMS = [
    pytest.param({"label_smoothing": 0.1}, id="smoothing"),
    pytest.param({"z_loss": 1e-2}, id="z"),
    pytest.param({"label_smoothing": 0.3, "z_loss": 0.5}, id="both"),
]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 100, None])
def test_equals_the_plain_loss_and_its_gradients(chunk_tokens):
    hidden_TD, weight_VD, labels_T = problem()
    expected = plain(hidden_TD, weight_VD, labels_T)
    got = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=chunk_tokens)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(3 * got, (hidden_TD, weight_VD)),
        torch.autograd.grad(3 * expected, (hidden_TD, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_gradcheck():
    hidden_TD, weight_VD, labels_T = problem(tokens=5, hidden=3, vocab=4)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_sum(h, w, labels_T, chunk_tokens=2), (hidden_TD, weight_VD)
    )


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_further_terms_equal_the_plain_formula_and_its_gradients(terms, chunk_tokens):
    hidden_TD, weight_VD, labels_T = problem()
    expected = plain(hidden_TD, weight_VD, labels_T, **terms)
    got = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=chunk_tokens, **terms)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden_TD, weight_VD)),
        torch.autograd.grad(expected, (hidden_TD, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    with torch.no_grad():
        without = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=chunk_tokens, **terms)
    torch.testing.assert_close(without, got.detach(), rtol=1e-15, atol=0)


def test_terms_of_zero_are_the_plain_loss_bit_for_bit():
    results = []
    for terms in ({}, {"label_smoothing": 0.0, "z_loss": 0.0}):
        hidden_TD, weight_VD, labels_T = problem(torch.float32)
        total = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=4, **terms)
        total.backward()
        results.append((total.detach(), hidden_TD.grad, weight_VD.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradcheck_with_terms():
    hidden_TD, weight_VD, labels_T = problem(tokens=5, hidden=3, vocab=4)
    terms = {"label_smoothing": 0.2, "z_loss": 0.1}
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_sum(h, w, labels_T, chunk_tokens=2, **terms), (hidden_TD, weight_VD)
    )


@pytest.mark.parametrize("terms", TERMS)
def test_further_terms_lose_no_more_than_the_plain_formula_in_single_precision(terms):
    hidden_TD, weight_VD, labels_T = problem(torch.float32, tokens=400, hidden=32, vocab=50)
    exact = plain(hidden_TD.double(), weight_VD.double(), labels_T, **terms)
    naive = plain(hidden_TD, weight_VD, labels_T, **terms)
    got = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=64, **terms)
    lost, lost_by_naive = ((x.double() - exact).abs().item() for x in (got, naive))
    assert lost <= 2 * lost_by_naive + 1e-6 * exact.item()


@pytest.mark.parametrize("terms", TERMS)
def test_all_ignored_is_zero_with_terms_too(terms):
    hidden_TD, weight_VD, labels_T = problem()
    ignored_T = torch.full_like(labels_T, IGNORED_LABEL)
    total = linear_cross_entropy_sum(hidden_TD, weight_VD, ignored_T, **terms)
    total.backward()
    assert total.item() == 0
    assert not hidden_TD.grad.any() and not weight_VD.grad.any()


def test_single_precision_stays_within_what_the_plain_loss_loses():
    hidden_TD, weight_VD, labels_T = problem(torch.float32, tokens=400, hidden=32, vocab=50)
    exact = plain(hidden_TD.double(), weight_VD.double(), labels_T)
    naive = plain(hidden_TD, weight_VD, labels_T)
    got = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=64)
    assert got.dtype == torch.float32
    lost, lost_by_naive = ((x.double() - exact).abs().item() for x in (got, naive))
    assert lost <= 2 * lost_by_naive + 1e-6 * exact.item()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden_TD, weight_VD, labels_T = problem()
    expected = torch.autograd.grad(plain(hidden_TD, weight_VD, labels_T), (hidden_TD, weight_VD))
    hidden_TD.requires_grad_(frozen == "weight")
    weight_VD.requires_grad_(frozen == "hidden")
    total = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=4)
    assert total.requires_grad == (frozen != "both")
    if total.requires_grad:
        total.backward()
    for tensor, grad in zip((hidden_TD, weight_VD), expected, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, grad, rtol=0, atol=1e-13)
        else:
            assert tensor.grad is None


def test_all_ignored_is_zero_with_zero_gradients():
    hidden_TD, weight_VD, labels_T = problem()
    total = linear_cross_entropy_sum(hidden_TD, weight_VD, torch.full_like(labels_T, IGNORED_LABEL))
    total.backward()
    assert total.item() == 0
    assert not hidden_TD.grad.any()
    assert not weight_VD.grad.any()


def test_a_second_backward_pass_is_right_too():
    hidden_TD, weight_VD, labels_T = problem()
    total = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T)
    first = torch.autograd.grad(total * 2, hidden_TD, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(total * 2, hidden_TD)[0], first)


class LargestResult(TorchDispatchMode):
    """Counts the elements of the largest tensor any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func in (
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm_.default,
            torch.ops.aten.mm.out,
        )
        if isinstance(result, torch.Tensor) and result._base is None:
            self.elements = max(self.elements, result.numel())
        return result


def test_no_more_than_one_chunk_of_logits_exists():
    hidden_TD, weight_VD, labels_T = problem(torch.float32, tokens=96, hidden=4, vocab=200)
    with LargestResult() as largest:
        linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=16).backward()
    assert largest.elements == 16 * 200
    with LargestResult() as largest:
        plain(hidden_TD, weight_VD, labels_T).backward()
    assert largest.elements == 96 * 200  # that the count sees what it should


class LiveBytes(TorchDispatchMode):
    """Adds up the storages made inside that are still alive, and remembers the largest sum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage() not in self.known:
            storage = result.untyped_storage()
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._let_go, storage.nbytes())
        return result

    def _let_go(self, num_bytes):
        self.now -= num_bytes


@pytest.mark.parametrize(("dtype", "chunks"), [(torch.float32, 3.5), (torch.bfloat16, 4.5)])
def test_further_terms_take_no_memory_of_the_size_of_a_chunk(dtype, chunks):
    def peak(**terms):
        hidden_TD, weight_VD, labels_T = problem(torch.float32, tokens=96, hidden=4, vocab=2000)
        with LiveBytes() as live, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=32, **terms).backward()
        return live.peak

    chunk_bytes = 32 * 2000 * 4
    assert (chunks - 1) * chunk_bytes < peak() < chunks * chunk_bytes
    assert peak(label_smoothing=0.1, z_loss=1e-4) <= peak() + 32 * 8 * 4  # a few numbers per token


def test_without_gradients_only_the_logits_are_multiplied():
    hidden_TD, weight_VD, labels_T = problem(torch.float32)
    with LargestResult() as counted, torch.no_grad():
        total = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=5)
    assert counted.products == 3
    assert not total.requires_grad


def test_autocast_multiplies_low_and_sums_high():
    hidden_TD, weight_VD, labels_T = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=5)
        naive = plain(hidden_TD, weight_VD, labels_T)
    exact = plain(hidden_TD.double(), weight_VD.double(), labels_T)
    total.backward()
    assert total.dtype == hidden_TD.grad.dtype == weight_VD.grad.dtype == torch.float32
    assert (total - exact).abs() <= 2 * (naive - exact).abs() + 1e-2 * exact
    assert total != plain(hidden_TD, weight_VD, labels_T)  # the products did run in bf16


def test_wrong_arguments_are_named():
    hidden_TD, weight_VD, labels_T = problem()
    with pytest.raises(
        ValueError, match=r"\(T, D\), \(V, D\) and \(T,\), got \[\(13, 6\), \(11, 6\), \(12,\)\]"
    ):
        linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T[1:])
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=0)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 3, 100])
def test_right_guesses_are_counted_chunk_by_chunk(chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = torch.randn(20, 4, generator=generator), torch.randn(9, 4, generator=generator)
    labels_T = (hidden_TD @ weight_VD.T).argmax(-1)
    labels_T[3:7] = (labels_T[3:7] + 1) % 9
    labels_T[10:12] = -100
    count = linear_correct_sum(hidden_TD.requires_grad_(), weight_VD, labels_T, chunk_tokens=chunk_tokens)
    assert count.item() == 14 and not count.requires_grad
