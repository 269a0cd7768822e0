"""Eight workers in one process on a virtual clock: what does one slow worker cost?

Each simulated worker trains a real model; computing and sending take virtual time. Deterministic.
"""

import sys
import tempfile
from pathlib import Path

from hardy.config import from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.config import ClusterConfig
from hardy.distributed.simulation import SimWorld
from hardy.recipes.table import recipe
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, run_loop
from hardy.train.setup import assemble

STEP_WORK_S = 0.5  # what one step costs an ordinary worker


def main(folder: Path, steps: int = 4, num_workers: int = 8) -> None:
    changes = {"train.steps": steps, "train.batch_packs": 8, "data.pack_tokens": 64, "data.limit_mb": 1.0}
    changes |= {"optim.schedule.warmup_steps": 1, "data.source": "synthetic:lognormal,documents=300,mean=200"}
    config = from_dict(TrainConfig, override(to_dict(recipe("tiny")), changes))
    corpus = prepare(config.data, cache_dir=folder / "cache")
    hardware = choose_hardware("cpu", "fp32")

    def train(comm):
        assembly, losses = assemble(config, comm, corpus=corpus, hardware=hardware), []

        def record(line):
            losses.append(line["loss"])
            comm.spend(STEP_WORK_S)

        run_loop(
            assembly.worker, assembly.plan, Progress(), save=lambda _: None, record=record, stop=lambda: False
        )
        return losses

    for name, slow in (("equal workers", ()), ("one three times slower", (3.0,))):
        cluster = ClusterConfig(bandwidth_bytes_per_s=12.5e6, latency_s=0.01, slow_factors=slow)
        world = SimWorld(num_workers, cluster=cluster)
        losses = world.run(train)
        report = world.report()
        idle = sum(worker.idle_s for worker in report) / sum(worker.virtual_s for worker in report)
        print(
            f"{name}: loss {losses[0][0]:.3f} -> {losses[0][-1]:.3f}, {report[0].virtual_s:.1f} virtual s, ",
            end="",
        )
        print(f"{idle:.0%} idle, {report[0].bytes_sent / 1e6:.1f} MB sent by each worker")
        assert all(other == losses[0] for other in losses)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
