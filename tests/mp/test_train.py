"""The same run alone, on DDP, FSDP2 and HSDP: one loss curve, checkpoints that all of them read."""

import pytest

from hardy.config import from_dict, override, to_dict
from hardy.distributed.comm import leave_world
from hardy.train.config import TrainConfig
from hardy.train.metrics import read_metrics
from hardy.train.plan import World
from hardy.train.run import Surroundings, resume, start

pytestmark = pytest.mark.mp

STEPS = 20


@pytest.fixture
def config(few_words):
    changes = {"train.steps": STEPS, "train.evaluate_every_steps": 10, "checkpoint.every_steps": 10}
    return from_dict(TrainConfig, override(to_dict(few_words), changes))


def curve(run_dir):
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl")]


def as_workers(run_workers, tmp_path, name, *, size, work):
    """Run `work(around)` in `size` processes, each of which joins the others for itself."""

    def body(comm):
        leave_world()
        world = World(rank=comm.rank, size=size, address=f"file://{tmp_path}/meeting-{name}")
        return work(Surroundings(cache_dir=tmp_path / "cache", world=world)).validation_loss

    return run_workers(body, size=size)


@pytest.mark.parametrize(("size", "shards"), [(2, 1), (2, 2), (4, 2)], ids=["ddp", "fsdp", "hsdp"])
def test_the_loss_curve_does_not_depend_on_the_layout(run_workers, config, tmp_path, size, shards):
    alone = start(config, tmp_path / "alone", Surroundings(cache_dir=tmp_path / "cache"))
    laid_out = from_dict(TrainConfig, override(to_dict(config), {"strategy.mesh.shards": shards}))
    validation = as_workers(
        run_workers,
        tmp_path,
        "run",
        size=size,
        work=lambda around: start(laid_out, tmp_path / "together", around),
    )
    assert curve(tmp_path / "together") == pytest.approx(curve(tmp_path / "alone"), abs=1e-5)
    assert len(curve(tmp_path / "alone")) == STEPS
    assert validation == pytest.approx([alone.validation_loss] * size, abs=1e-5)


def test_a_run_moves_between_world_sizes(run_workers, config, tmp_path):
    """1 -> 2 (DDP) -> 4 (HSDP) -> 1, five steps each, against the uninterrupted run."""
    start(config, tmp_path / "alone", Surroundings(cache_dir=tmp_path / "cache"))

    def laid_out(shards):
        return from_dict(TrainConfig, override(to_dict(config), {"strategy.mesh.shards": shards}))

    class Stop:
        """Asks to stop so that the run saves after a given number of steps."""

        def __init__(self, after):
            self.left = after

        def __call__(self):
            self.left -= 1
            return 15 if self.left <= 0 else None

    def around(world=None, stop=None):
        return Surroundings(
            cache_dir=tmp_path / "cache", world=world or World(), stop_signal=stop or (lambda: None)
        )

    run_dir = tmp_path / "moving"
    start(config, run_dir, around(stop=Stop(5)))
    for name, size, shards in (("two", 2, 1), ("four", 4, 2)):

        def body(comm, name=name, size=size, shards=shards):
            leave_world()
            world = World(rank=comm.rank, size=size, address=f"file://{tmp_path}/meeting-{name}")
            return resume(run_dir, around(world, Stop(5)), config=laid_out(shards)).steps

        run_workers(body, size=size)
    assert 10 < len(curve(run_dir)) < STEPS
    assert resume(run_dir, around(), config=laid_out(1)).steps == STEPS
    assert curve(run_dir) == pytest.approx(curve(tmp_path / "alone"), abs=1e-5)
