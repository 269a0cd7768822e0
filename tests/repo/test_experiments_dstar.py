"""The experiment on dSTAR: its data, weights and splits, and how it compares with expected values."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.usefixtures("no_modules_of_experiments")


@pytest.fixture
def dstar():
    """Import a module of the experiment on dSTAR."""
    sys.path[:0] = [str(EXPERIMENTS / "dstar"), str(EXPERIMENTS)]
    return importlib.import_module


def test_the_task_is_that_of_the_expected_values(dstar):
    problem = dstar("problem")
    data = problem.gaussian(3)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 64, generator=generator)
    assert torch.equal(data.labels, torch.randint(10, (12_000,), generator=generator))  # whatever the seed
    # seed 0 starts from the centres of the data; no other seed does
    layers = [problem.weights_of(problem.initial_weights(seed)) for seed in (0, 1)]
    assert torch.equal(layers[0][0][:10], 0.1 * centres)
    assert torch.nn.functional.cosine_similarity(layers[1][0][:10], centres).abs().max() < 0.5
    assert all(not bias.any() for _, b1, _, b2 in layers for bias in (b1, b2))

    owners = problem.split_half_by_label(data, 0)
    assert owners.shape == (20, 490)
    slices = data.labels[:9_800].sort(stable=True).values.view(20, 490)
    assert torch.equal(data.labels[owners[:, :245]], slices[:, :245])
    spread = data.labels[owners[:, 245:]].flatten().bincount() / 4_900
    assert spread.min() > 0.08
    assert spread.max() < 0.12


def test_one_label_each_takes_no_label_away_with_those_that_attack(dstar):
    problem = dstar("problem")
    data = problem.gaussian(0)
    owners = problem.split_by_label(data, 0)
    assert owners.flatten().sort().values.equal(torch.arange(9_800))
    labels = data.labels[owners]
    commonest = labels.mode(dim=1)
    assert commonest.values.tolist() == [*range(10), *range(10)]
    assert (labels == commonest.values[:, None]).double().mean() > 0.9


def test_cells_have_the_seeds_that_their_comparison_asks_for(dstar):
    grid = dstar("grid")
    seeds = grid.Grid(smoke=False).seeds_of
    few, all_seeds = (0, 1), (0, 1, 2, 3, 4)
    assert seeds("iid", "none", "mean") == few
    assert seeds("iid", "sign flip", "mean") == all_seeds  # expected .90 .82
    assert seeds("non-iid", "cosine 0.1", grid.DEFAULT) == all_seeds
    assert seeds("trusted", "none", grid.TRUSTED_ALONE) == all_seeds
    assert seeds("non-iid", "cosine 0.1", "mean") == few  # nothing expected
    assert seeds("others", "zero", "mean") == (1,)  # not the one with a head start
    assert grid.agree((0.92, 0.90))
    assert not grid.agree((0.94, 0.91))
    assert grid.outside((0.8, 0.6), [0.71, 0.9]) == pytest.approx(0.01)
    assert grid.outside((0.8, 0.6), [0.1, 0.65]) == pytest.approx(0.05)
    assert grid.outside((0.8, 0.6), [0.1, 0.9]) == 0
    assert math.isnan(grid.outside((0.8, 0.6), [0.7]))


def test_broken_cells_are_trained_many_times_and_compared_seed_by_seed(dstar):
    grid = dstar("grid")
    rows = grid.Grid(smoke=False).tables()["broken"]
    cells = [cell for columns in rows.values() for cell in columns.get("multi-Krum", [])]
    assert [cell.split for cell in cells[:: 2 * grid.DRAWS]] == ["iid", "non-iid", "non-iid"]
    assert [cell.momentum for cell in cells[:: 2 * grid.DRAWS]] == [0, 0, 0.9]
    assert cells[0] in grid.Grid(smoke=False).tables()["iid"]["edge"]["multi-Krum"]  # draw 0 is the table's
    assert len({(cell.seed, cell.draw) for cell in cells[: 2 * grid.DRAWS]}) == 2 * grid.DRAWS
    found = [{"accuracy": 0.2 + 0.01 * draw + 0.5 * cell} for cell in (0, 1) for draw in range(grid.DRAWS)]
    told = list(grid.broken({"broken": {"non-iid, edge": {"multi-Krum": found}}}))
    assert [(row, rule, had, len(got), min(got)) for row, rule, had, got in told] == [
        ("non-iid, edge", "multi-Krum", 0.24, grid.DRAWS, 0.2),
        ("non-iid, edge", "multi-Krum", 0.23, grid.DRAWS, 0.7),
    ]
    assert [grid.outside((had,), got) for _, _, had, got in told] == pytest.approx([0, 0.47])


def test_another_draw_changes_split_and_batches_alone(dstar):
    cells = dstar("cells")
    first, other = (cells.Training(cells.Cell(rule="mean", draw=draw)) for draw in (0, 1))
    assert (first.theta == other.theta).all() and first.data is other.data
    assert not torch.equal(first.owners, other.owners)
    assert not torch.equal(first._gradients()[0], other._gradients()[0])
