"""The second stage of sums, in Triton's interpreter."""

import pytest
import torch

CPU = torch.device("cpu")


def folded(workspace, rows, *, add=False, gated=False, longest=None):
    from hardy.ops.triton_fold import Fold, fold_kernel
    from hardy.ops.triton_launch import Launch, Plan

    config = Fold(add=add, gated=gated, entries=16, parts=4)
    launch = Launch(kernel=fold_kernel, config=config, programs=-(-longest // 16), rows=rows, block="fold")
    launch.run(Plan([launch], CPU).tables[0], workspace)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("parts", [0, 1, 4, 9])
def test_parts_are_added_where_they_belong_and_all_else_is_zero(parts):
    workspace = torch.randn(3 + parts * 20, generator=torch.Generator().manual_seed(0))
    outs = [torch.full((length,), 7.0) for length in (40, 12)]
    rows = [
        (outs[0].data_ptr(), 40, 3, 20, parts, 5, 25, 0),
        (outs[1].data_ptr(), 12, 3 + 8, 20, parts, 0, 12, 0),
    ]
    folded(workspace, rows, longest=40)
    total = workspace[3:].view(parts, 20).double().sum(0)
    assert torch.equal(outs[0][5:25], total.float()) and torch.equal(outs[1], total[8:].float())
    assert not outs[0][:5].any() and not outs[0][25:].any()


@pytest.mark.usefixtures("triton_interpreter")
def test_sums_are_taken_in_fp64():
    workspace = torch.tensor([1.0, *[2.0**-24] * 64])
    out = torch.empty(1)
    folded(workspace, [(out.data_ptr(), 1, 0, 1, 65, 0, 1, 0)], longest=1)
    assert out.item() == 1 + 2.0**-18


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("add", [False, True])
def test_what_is_not_active_adds_nothing_not_even_nan(add):
    workspace = torch.tensor([3.0, float("nan")])
    outs, actives = torch.tensor([10.0, 20.0]), torch.tensor([1.0, 0.0])
    rows = [(outs[index:].data_ptr(), 1, index, 1, 1, 0, 1, actives[index:].data_ptr()) for index in range(2)]
    folded(workspace, rows, add=add, gated=True, longest=1)
    assert outs.tolist() == ([13.0, 20.0] if add else [3.0, 0.0])
