"""Plans of the Triton back end: sweeps that are prepared, launches that like tasks share, tables."""

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
def launches(triton_interpreter, monkeypatch):
    """Return the kernels launched so far, by the block they are tuned by."""
    from hardy.ops import triton_launch

    run, done = triton_launch.Launch.run, []

    def launched(self, *args):
        done.append(self.block)
        run(self, *args)

    monkeypatch.setattr(triton_launch.Launch, "run", launched)
    return done


def memory_of(tasks):
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "coefficients")
    return [getattr(task, name) for task in tasks for name in names]


def test_a_prepared_sweep_reads_and_writes_the_same_memory_again(launches):
    from hardy.ops.updates_triton import adam, prepare

    tasks, others = [adam_task(), adam_task()], [adam_task(), adam_task()]
    sweep = prepare("adam", tasks, memory_of(tasks))
    assert launches == []
    for count in range(3):
        tasks[1].grad.fill_(count - 5.0)
        others[1].grad.fill_(count - 5.0)
        sweep.run()
        adam(others)
    for task, other in zip(tasks, others, strict=True):
        assert torch.equal(task.param, other.param) and torch.equal(task.exp_avg, other.exp_avg)
    assert not torch.equal(tasks[0].param, tasks[1].param)


@pytest.mark.usefixtures("triton_interpreter")
def test_a_prepared_sweep_moves_with_its_memory_there_and_back():
    from hardy.ops.updates_triton import adam, prepare

    tasks, others = [adam_task(), adam_task(6, 5)], [adam_task(), adam_task(6, 5)]
    room = torch.zeros(1 << 12)
    sweep = prepare("adam", tasks, memory_of(tasks))
    first = tasks[1].grad
    for count, begin in enumerate((0, 64, 64, 1024, None)):
        tasks[1].grad = first if begin is None else room[begin : begin + 30].view(6, 5)
        for task in (tasks[1], others[1]):
            task.grad.fill_(count - 3.0)
        assert sweep.move([x.data_ptr() for x in memory_of(tasks)])
        sweep.run()
        adam(others)
        assert torch.equal(tasks[1].exp_avg, others[1].exp_avg)
        assert torch.equal(tasks[0].param, others[0].param)
    tasks[1].grad = room[65:95].view(6, 5)  # not aligned to 16 bytes, as it was
    assert not sweep.move([x.data_ptr() for x in memory_of(tasks)])


@pytest.mark.usefixtures("triton_interpreter")
def test_memory_that_was_not_named_is_found_out():
    from hardy.ops.updates_triton import prepare

    tasks = [adam_task(), adam_task()]
    for missing in range(10):
        memory = memory_of(tasks)
        del memory[missing]
        with pytest.raises(AssertionError, match="names memory that the sweep was not told of"):
            prepare("adam", tasks, memory)


@pytest.mark.usefixtures("triton_interpreter")
def test_tasks_in_fp64_cannot_be_prepared_and_none_at_all_do_nothing():
    from hardy.ops.updates_triton import prepare

    task = adam_task(dtype=torch.float64)
    task.coefficients = task.coefficients.double()
    assert prepare("adam", [task], memory_of([task])) is None
    sweep = prepare("adam", [], [torch.zeros(3)])
    assert sweep.move([0])
    sweep.run()


def test_like_tasks_share_a_launch(launches):
    from hardy.ops.updates_triton import adam

    adam([adam_task(), adam_task(6, 5), adam_task(), adam_task(dtype=torch.bfloat16), adam_task()])
    assert len(launches) == 3
    adam([])
    assert len(launches) == 3


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
