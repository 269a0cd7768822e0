"""The stack by columns; draws that know only their place; small numbers; refusals."""

import pytest
import torch

from hardy.distributed.attacks import build_attack
from hardy.distributed.attacks_blind import Gaussian, Zero
from hardy.distributed.attacks_informed import Ipm
from hardy.distributed.attacks_stage import (
    CHUNK_COLUMNS,
    Chunk,
    Stage,
    deviation_of,
    exact,
    lower_median,
    normal_from,
    safe_ratio,
    uniform_at,
)


def stage_of(blocks, attackers=(0,), **named):
    widths = [block.shape[1] for block in blocks]
    settings = {"num_faulty": 1, "references": None, "step": 0, "total": lambda x: x, "rule": None}
    firsts = tuple(sum(widths[:number]) for number in range(len(widths)))
    return Stage(blocks=blocks, attackers=attackers, **settings | {"first_columns": firsts} | named)


def chunk_of(columns, *, first=0):
    return Chunk(torch.zeros(1, columns), None, 0, 0, first)


def test_chunks_cover_every_column_once():
    blocks = [torch.zeros(2, CHUNK_COLUMNS + 3), torch.zeros(2, 0), torch.zeros(2, 5)]
    stage = stage_of(blocks, references=[torch.arange(block.shape[1]) for block in blocks])
    found = [(c.block, c.start, c.first, c.rows.shape[1]) for c in stage.chunks()]
    last = CHUNK_COLUMNS + 3
    assert found == [(0, 0, 0, CHUNK_COLUMNS), (0, CHUNK_COLUMNS, CHUNK_COLUMNS, 3), (2, 0, last, 5)]
    for chunk in stage.chunks():
        assert torch.equal(
            chunk.reference, torch.arange(chunk.start, chunk.start + chunk.rows.shape[1]).float()
        )
        chunk.rows.add_(1)
    assert all((block == 1).all() for block in blocks)


def test_sums_are_added_up_over_columns_and_then_by_the_total():
    block = torch.ones(3, CHUNK_COLUMNS + 7)
    asked = []

    def total(numbers):
        asked.append(numbers)
        return 10 * numbers

    stage = stage_of([block], total=total)
    assert stage.num_columns().tolist() == [10.0 * (CHUNK_COLUMNS + 7)]
    assert stage.sum(lambda chunk: chunk.rows.sum(1)).tolist() == [10.0 * (CHUNK_COLUMNS + 7)] * 3
    assert [numbers.dtype for numbers in asked] == [torch.float64] * 2


def test_a_worker_without_columns_takes_part_in_the_total():
    stage = stage_of([torch.zeros(3, 0)])
    assert stage.sum(lambda chunk: stage.honest_rows(chunk).square().sum(1)).tolist() == [0.0, 0.0]


def test_honest_rows_are_the_others_in_order():
    stage = stage_of([torch.arange(4.0)[:, None].bfloat16()], attackers=(2, 0))
    assert stage.honest == (1, 3)
    (chunk,) = stage.chunks()
    assert torch.equal(stage.honest_rows(chunk), torch.tensor([[1.0], [3.0]]))
    assert stage.own_rows(chunk).dtype == torch.bfloat16


def test_rows_that_are_written_go_to_their_attackers():
    block = torch.zeros(4, 3)
    stage = stage_of([block], attackers=(1, 3))
    stage.write(lambda chunk: torch.tensor([[1.0], [2.0]]).expand(2, 3))
    assert block.tolist() == [[0] * 3, [1] * 3, [0] * 3, [2] * 3]
    stage.write(lambda chunk: torch.full((3,), 5.0))
    assert block[:, 0].tolist() == [0, 5, 0, 5]


def test_draws_depend_on_the_column_and_the_key_alone():
    whole = uniform_at(chunk_of(1000), 5)
    assert torch.equal(whole[300:], uniform_at(chunk_of(700, first=300), 5))
    assert not torch.equal(whole, uniform_at(chunk_of(1000), 6))
    # A step of one in the key is no step of one in the column.
    assert len(set(torch.cat([whole, uniform_at(chunk_of(1000), 6)]).tolist())) == 2000


def test_draws_are_those_of_splitmix64():
    found = (uniform_at(chunk_of(4), 0) * 2**52).long().tolist()
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]  # of seed 0
    assert found == [number >> 12 for number in first]


def test_draws_are_uniform_and_independent():
    count = 200_000
    x, y = (uniform_at(chunk_of(count), key) for key in (1, 2**63 - 1))
    assert 0 < x.min() and x.max() < 1
    shares = torch.histc(x, bins=20, min=0, max=1) / count
    assert (shares - 0.05).abs().max() < 5 * (0.05 * 0.95 / count) ** 0.5
    for a, b in ((x, y), (x[1:], x[:-1]), (x[64:], x[:-64])):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 5 / count**0.5
    normal = normal_from(x, y)
    assert normal.mean().abs() < 5 / count**0.5
    assert normal.std().item() == pytest.approx(1, abs=0.01)
    assert (normal.abs() < 1.96).double().mean().item() == pytest.approx(0.95, abs=0.003)


def test_rows_columns_blocks_and_steps_draw_their_own_noise():
    attack = Gaussian(sd=1.0)
    first, second = torch.zeros(3, 1000), torch.zeros(3, 1000)
    attack([first, second], attackers=[0, 1, 2], step=4)
    later = torch.zeros(3, 1000)
    attack([later], attackers=[0, 1, 2], step=5)
    drawn = torch.cat([first, second, later])
    correlation = torch.corrcoef(drawn) - torch.eye(9)
    assert correlation.abs().max() < 0.2


def test_small_numbers_by_hand():
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])
    assert deviation_of(rows).tolist() == [2.0, pytest.approx(3**0.5)]
    assert deviation_of(rows[:1]).tolist() == [0.0, 0.0]
    assert deviation_of(rows[:, :0]).shape == (0,)
    assert lower_median(torch.tensor([4.0, 1.0, 3.0, 2.0])) == 2
    assert lower_median(torch.tensor([4.0, 1.0, 3.0])) == 3
    assert safe_ratio(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).tolist() == [0.0, 0.5]
    kept = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert all(exact(torch.ones(1, dtype=dtype)).dtype == wide for dtype, wide in kept.items())


def test_attackers_are_counted_once_and_the_default_f_is_their_number():
    seen = []

    class Spy(Zero):
        def play(self, stage):
            seen.append((stage.attackers, stage.num_faulty))

    for named in ({}, {"num_faulty": 1}):
        Spy()([torch.zeros(5, 2)], attackers=[3, 1, 3], **named)
    assert seen == [((1, 3), 2), ((1, 3), 1)]


def test_what_is_no_stack_is_refused():
    with pytest.raises(ValueError, match=r"needs blocks \[N, d\] of one stack, got shapes \[\]"):
        Zero()([], attackers=[0])
    with pytest.raises(ValueError, match=r"got shapes \[\(3, 2\), \(2, 2\)\]"):
        Zero()([torch.zeros(3, 2), torch.zeros(2, 2)], attackers=[0])
    with pytest.raises(ValueError, match=r"got shapes \[\(3,\)\]"):
        Zero()([torch.zeros(3)], attackers=[0])
    with pytest.raises(ValueError, match=r"attackers \[-1, 3\] are no rows of a stack of 3"):
        Zero()([torch.zeros(3, 2)], attackers=[3, -1])
    with pytest.raises(ValueError, match=r"references must be one \[d\] per block"):
        Zero()([torch.zeros(3, 2)], attackers=[1], references=[torch.zeros(3)])
    with pytest.raises(ValueError, match=r"first_columns=\[0, 2\] must be one number for each of 1 blocks"):
        Zero()([torch.zeros(3, 2)], attackers=[1], first_columns=[0, 2])


def test_no_history_is_kept_of_what_needs_gradients():
    rows = torch.ones(3, 2).requires_grad_()
    stack = rows * 1
    Ipm()([stack.detach()], attackers=[0])
    assert stack[0].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("huge", {}),
        ("huge", {"value": -1e300}),
        ("ipm", {"strength": 1e6}),
        ("alie", {"z": 1e6}),
        ("gaussian", {"sd": 1e6}),
        ("drift", {"growth": 1e6}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_finite_stays_finite_in_narrow_dtypes(name, arguments, dtype):
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    build_attack(name, arguments=arguments)([rows], attackers=[5, 6])
    assert rows.isfinite().all()
    if name == "huge" and dtype == torch.float16:
        assert rows[5:].abs().eq(torch.finfo(dtype).max).all()
