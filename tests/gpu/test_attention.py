import pytest
import torch

from hardy.ops.attention import choose_backend, packed_attention
from hardy.ops.attention_backends import AttentionRule
from hardy.ops.loss import linear_cross_entropy_sum
from hardy.ops.packed import DocumentLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RULES = [AttentionRule(), AttentionRule(window=5), AttentionRule(causal=False, scale=0.2)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's
@pytest.mark.parametrize("backend", ["varlen", "flex"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_kernels_equal_the_reference(backend, rule, kv_heads):
    lengths = ((3, 130, 1, 64), (9, 130, 40, 64))
    queries, keys = (DocumentLayout.from_lengths(x, device="cuda") for x in lengths)
    generator = torch.Generator().manual_seed(0)
    sizes = [(sum(lengths[0]), 4, 32), (sum(lengths[1]), kv_heads, 32), (sum(lengths[1]), kv_heads, 32)]
    inputs = [torch.randn(x, generator=generator).to("cuda", torch.bfloat16).requires_grad_() for x in sizes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got_THK = packed_attention(*inputs, queries, keys=keys, rule=rule, backend=backend)
    right_THK = packed_attention(*exact, queries, keys=keys, rule=rule, backend="reference")
    assert (got_THK.double() - right_THK).abs().max() <= 2e-2 * right_THK.abs().max()
    slope = torch.randn(got_THK.shape, generator=generator).cuda()
    got_THK.backward(slope.bfloat16())
    right_THK.backward(slope.double())
    for mine, right in zip(inputs, exact, strict=True):
        assert (mine.grad.double() - right.grad).abs().max() <= 3e-2 * right.grad.abs().max()


def test_auto_takes_varlen_for_bf16_and_the_reference_for_fp32():
    assert choose_backend("cuda", dtype=torch.bfloat16, head_size=64) == "varlen"
    assert choose_backend("cuda", dtype=torch.float32, head_size=64) == "reference"


def test_the_loss_under_autocast_stays_within_what_the_plain_one_loses():
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(300, 64, generator=generator).cuda().requires_grad_()
    weight_VD = torch.randn(500, 64, generator=generator).cuda().requires_grad_()
    labels_T = torch.randint(500, (300,), generator=generator).cuda()
    exact = torch.nn.functional.cross_entropy(
        hidden_TD.double() @ weight_VD.double().T, labels_T, reduction="sum"
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        total = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T, chunk_tokens=64)
        naive = torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.T, labels_T, reduction="sum")
    ours, theirs = (torch.autograd.grad(x, (hidden_TD, weight_VD)) for x in (total, naive))
    right = torch.autograd.grad(exact, (hidden_TD, weight_VD))
    for mine, plain, best in zip(ours, theirs, right, strict=True):
        assert (mine - best).abs().max() <= 3 * (plain - best).abs().max() + 1e-6
