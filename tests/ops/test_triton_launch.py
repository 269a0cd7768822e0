"""Plans of the Triton back end: kept while nothing moved, made anew when a gradient did; their tables."""

from dataclasses import dataclass

import pytest
import torch

from hardy.ops.updates import AdamTask, Place, Rounding

CPU = torch.device("cpu")


def adam_task(rows=4, cols=8, dtype=torch.float32):
    place = Place(base=0, stride=cols)
    return AdamTask(
        param=torch.ones(rows, cols, dtype=dtype),
        grad=torch.ones(rows, cols, dtype=dtype),
        exp_avg=torch.zeros(rows, cols),
        exp_avg_sq=torch.zeros(rows, cols),
        coefficients=torch.tensor([1, 0.9, 0.99, 0.1, 1.0, 1e-8, 1.0, 0.0, 1.0]),
        rounding=Rounding(mode="nearest", key=0, step=torch.tensor(1.0), place=place),
    )


@pytest.fixture
def watched(triton_interpreter, monkeypatch):
    """Count plans that are made and kernels that are launched."""
    from hardy.ops import triton_launch

    counts = {"plans": 0, "launches": 0}
    make_plan, run = triton_launch.make_plan, triton_launch.Launch.run

    def made(*args):
        counts["plans"] += 1
        return make_plan(*args)

    def launched(self, *args):
        counts["launches"] += 1
        run(self, *args)

    monkeypatch.setattr(triton_launch, "make_plan", made)
    monkeypatch.setattr(triton_launch.Launch, "run", launched)
    triton_launch.kept_plan.cache_clear()
    return counts


def test_a_plan_is_kept_until_an_address_changes(watched):
    from hardy.ops.updates_triton import adam

    tasks = [adam_task(), adam_task()]
    for _ in range(3):
        adam(tasks)
    assert watched == {"plans": 1, "launches": 3}
    old, tasks[1].grad = tasks[1].grad, torch.full((4, 8), -5.0)
    before = tasks[1].exp_avg.clone()
    adam(tasks)
    assert watched["plans"] == 2
    assert torch.allclose(tasks[1].exp_avg, 0.9 * before - 0.5)  # the new gradient was read
    tasks[1].grad = old
    adam(tasks)
    assert watched["plans"] == 2


def test_a_plan_is_not_kept_for_other_shapes_at_the_same_addresses(watched):
    from hardy.ops.updates_triton import adam

    task = adam_task()
    adam([task])
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        setattr(task, name, getattr(task, name)[:2])
    before = task.param.clone()
    adam([task])
    assert watched["plans"] == 2 and not torch.equal(task.param, before)
    task.rounding.place = Place(base=8, stride=8)
    adam([task])
    assert watched["plans"] == 3


def test_a_plan_is_kept_for_the_stream_that_wrote_its_table(watched, monkeypatch):
    from hardy.ops import triton_launch
    from hardy.ops.updates_triton import adam

    task = adam_task()
    for stream in (0, 17, 0, 17):
        monkeypatch.setattr(triton_launch, "stream_of", lambda device, stream=stream: stream)
        adam([task])
    assert watched == {"plans": 2, "launches": 4}


def test_a_plan_made_while_a_graph_is_captured_is_not_kept(watched, monkeypatch):
    from hardy.ops import triton_launch
    from hardy.ops.updates_triton import adam

    monkeypatch.setattr(triton_launch, "capturing", lambda device: True)
    task = adam_task()
    adam([task])
    adam([task])
    assert watched["plans"] == 2
    monkeypatch.setattr(triton_launch, "capturing", lambda device: False)
    adam([task])
    assert watched["plans"] == 3


def test_like_tasks_share_a_launch(watched):
    from hardy.ops.updates_triton import adam

    adam([adam_task(), adam_task(6, 5), adam_task(), adam_task(dtype=torch.bfloat16), adam_task()])
    assert watched == {"plans": 1, "launches": 3}
    adam([])
    assert watched["launches"] == 3


@pytest.mark.usefixtures("triton_interpreter")
def test_tasks_beyond_the_limits_go_in_several_launches():
    from hardy.ops.triton_launch import MOST_TASKS, WORKSPACE_FLOATS, batches

    rows = [(index,) for index in range(MOST_TASKS + 1)]
    parts = list(batches(rows, 0))
    assert [len(part) for part in parts] == [MOST_TASKS, 1] and parts[1] == rows[-1:]
    assert [len(part) for part in batches(rows[:5], WORKSPACE_FLOATS // 3)] == [3, 2]
    assert [len(part) for part in batches(rows[:2], 2 * WORKSPACE_FLOATS)] == [1, 1]
    assert WORKSPACE_FLOATS * 4 <= 64 << 20


@pytest.mark.usefixtures("triton_interpreter")
def test_each_launch_has_its_own_part_of_the_table_at_16_bytes():
    from hardy.ops.triton_launch import Launch, Plan

    rows = [[(1, 2), (3, 4)], [(5, 6, 7, 8)], [(9, 10)]]
    launches = [
        Launch(kernel=None, config=None, programs=1, rows=part, block="fold", floats=index)
        for index, part in enumerate(rows)
    ]
    plan = Plan(launches, CPU)
    heads = [table[: sum(map(len, part))].tolist() for table, part in zip(plan.tables, rows, strict=True)]
    assert heads == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert all((table.data_ptr() - plan.tables[0].data_ptr()) % 16 == 0 for table in plan.tables)


@dataclass
class _Tensor:
    """As much of a tensor as alignment asks for."""

    at: int
    row: int
    size: int

    def data_ptr(self):
        return self.at

    def stride(self, dim):
        return self.row

    def element_size(self):
        return self.size


@pytest.mark.usefixtures("triton_interpreter")
def test_alignment_is_of_every_row_of_every_tensor():
    from hardy.ops.triton_launch import aligned

    good = _Tensor(32, 8, 2)
    assert aligned((good, None, _Tensor(16, 4, 4)), rows=3)
    assert not aligned((good, _Tensor(24, 8, 2)), rows=3)
    assert not aligned((_Tensor(32, 4, 2),), rows=3)
    assert aligned((_Tensor(32, 4, 2),), rows=1)


@pytest.mark.usefixtures("triton_interpreter")
def test_the_layouts_of_tables_are_even():
    from hardy.ops import triton_elementwise, triton_fold, triton_lowrank, triton_smmf

    layouts = [
        triton_elementwise.Elementwise,
        triton_fold.Fold,
        triton_lowrank.Sketch,
        triton_lowrank.Moment,
        triton_smmf.Sweep,
    ]
    assert all(layout.FIELDS % 2 == 0 for layout in layouts)  # so each launch's rows begin at 16 bytes
