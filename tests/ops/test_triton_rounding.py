"""What the Triton back end's host side makes of a task's rounding."""

import pytest
import torch

from hardy.ops.updates import Place, Rounding

pytest.importorskip("triton")
BF16 = torch.bfloat16


def rule(mode, *, base=0, stride=8, step=None, rest=None):
    step = torch.tensor(1.0) if step is None else step
    return Rounding(mode=mode, key=0, step=step, place=Place(base=base, stride=stride), rest=rest)


def test_rounding_has_a_say_for_bf16_only():
    from hardy.ops.triton_rounding import rounded_how

    step = torch.tensor(1)
    assert rounded_how(torch.empty(2, 8), rule("kahan")) == ("cast", torch.float32)
    assert rounded_how(torch.empty(2, 8, dtype=BF16), rule("nearest")) == ("nearest", torch.float32)
    assert rounded_how(torch.empty(2, 8, dtype=BF16), rule("stochastic", step=step)) == (
        "stochastic",
        torch.int64,
    )


def test_what_is_not_on_the_device_is_refused():
    from hardy.ops.triton_rounding import rounded_how

    param = torch.empty(2, 8, dtype=BF16)
    with pytest.raises(
        ValueError, match="bf16_update='kahan' reads its rest on cpu, .* it is missing; make the"
    ):
        rounded_how(param, rule("kahan"))
    with pytest.raises(
        ValueError, match="bf16_update='stochastic' reads its step on meta, .* it is on cpu; make"
    ):
        rounded_how(param.to("meta"), rule("stochastic"))


def test_places_in_whole_counters():
    from hardy.ops.triton_rounding import in_pairs

    assert in_pairs(rule("stochastic", base=12, stride=20), 3)
    assert in_pairs(rule("stochastic", base=4, stride=3), 1)
    assert not in_pairs(rule("stochastic", base=6, stride=20), 3)
    assert not in_pairs(rule("stochastic", base=4, stride=6), 3)


def test_flat_tensors():
    from hardy.ops.triton_rounding import is_flat

    whole, part = torch.empty(4, 8), torch.empty(4, 16)[:, :8]
    assert is_flat((whole, whole, None), rule("stochastic"))
    assert not is_flat((whole, part), rule("stochastic"))
    assert not is_flat((whole, whole), rule("stochastic", stride=16))
    assert is_flat((whole, whole), rule("nearest", stride=16))  # no random words, so places do not matter
    assert is_flat((whole[:1], part[:1]), rule("stochastic", stride=16))
