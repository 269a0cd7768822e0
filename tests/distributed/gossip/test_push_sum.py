"""The strategy: bytes, overlap, buffers, replicas that die, come, break or ask to stop; laws: `limits`."""

import pytest
import torch
from torch import nn

from hardy.config import from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.gossip.build import build_push_sum
from hardy.distributed.gossip.config import PushSumConfig, TopologyConfig, WeightsConfig
from hardy.distributed.gossip.push_sum import MassError
from hardy.distributed.sharded import grad_norm
from hardy.distributed.simulation import SimWorld
from hardy.rng import generator_for
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, run_loop
from hardy.train.setup import assemble

STAR = TopologyConfig(name="star")
RING = TopologyConfig(name="ring")


class Replica:
    """A replica of a small model with data of its own."""

    def __init__(self, comm, config, *, model=None, make=torch.optim.SGD, number=None, **options):
        self.comm, self.number = comm, comm.rank if number is None else number
        self.model = model or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        with torch.no_grad():
            for place, param in enumerate(self.model.parameters()):
                draw = torch.randn(param.shape, generator=generator_for(0, self.number, place))
                param.copy_(draw)
        inner = comm.divide([[rank] for rank in range(comm.size)])
        self.strategy = build_push_sum(
            config, self.model, unit_names=["0", "2"], inner=inner, outer=comm, **options
        )
        self.optimizer = make(self.model.parameters(), lr=0.05)

    def z(self):
        return torch.cat([param.detach().flatten().clone() for param in self.model.parameters()])

    def step(self, t, *, learn=True):
        """Make a step and return the change that the optimizer made."""
        self.strategy.before_forward()
        if learn:
            dtype = next(self.model.parameters()).dtype
            x = torch.randn(6, 4, generator=generator_for(1, self.number, t)).to(dtype)
            self.model(x).square().sum().backward()
        self.strategy.reduce_gradients()
        before = self.z()
        self.optimizer.step()
        delta = self.z() - before
        self.strategy.after_step()
        self.optimizer.zero_grad()
        return delta


@pytest.mark.parametrize(
    ("config", "out_degree", "bytes_each"),
    [
        (PushSumConfig(), 1, 4),
        (PushSumConfig(topology=TopologyConfig(name="full")), 3, 4),
        (PushSumConfig(comm_dtype="bf16"), 1, 2),
        (PushSumConfig(method="gradient_tracking"), 1, 8),
        (PushSumConfig(on_send_failure="running_sum"), 1, 8),
        (PushSumConfig(weights=WeightsConfig(name="adaptive", sketch_size=64)), 1, 4),
    ],
    ids=["one peer", "full", "bf16", "tracking", "sums", "adaptive"],
)
def test_bytes_are_out_degree_times_parameters(config, out_degree, bytes_each):
    def body(comm):
        replica = Replica(
            comm, config, model=nn.Sequential(nn.Linear(4, 5000), nn.Identity(), nn.Linear(5000, 2))
        )
        for t in range(4):
            replica.step(t, learn=False)
        return comm.bytes_sent / 4, sum(param.numel() for param in replica.model.parameters())

    for sent, num_parameters in SimWorld(4).run(body):
        assert sent == pytest.approx(out_degree * bytes_each * num_parameters, rel=0.01)


@pytest.mark.parametrize("topology", [STAR, RING, TopologyConfig(name="random_edges")])
@pytest.mark.parametrize("failure", ["reabsorb", "running_sum"])
def test_overlap_keeps_the_sums_once_all_has_come(topology, failure):
    config = PushSumConfig(overlap=True, topology=topology, on_send_failure=failure)
    n = 5

    def faults(t, sender, receiver):
        return "lost" if (t + sender) % 4 == 0 and t < 8 else ""

    def body(comm):
        replica = Replica(comm, config, faults=faults)
        start = replica.z()
        for t in range(12):
            replica.step(t, learn=False)
        on_the_way = replica.strategy.mass
        replica.strategy.finish()
        return start, on_the_way, replica.strategy.mass, replica.z()

    start, on_the_way, mass, z = zip(*SimWorld(n).run(body), strict=True)
    if topology is STAR or failure == "reabsorb":
        assert sum(mass) == pytest.approx(n, rel=1e-13)
        total = sum(a * row for a, row in zip(mass, z, strict=True))
        torch.testing.assert_close(total, sum(start), rtol=1e-12, atol=1e-12)
    assert sum(on_the_way) < n - 0.1


def test_overlap_is_one_round_behind():
    """On a ring of two each round is: keep half, take the other's half of the round before."""
    config = PushSumConfig(overlap=True, topology=RING)

    def body(comm):
        replica = Replica(comm, config)
        start, history = replica.z(), []
        for t in range(3):
            replica.step(t, learn=False)
            history.append((replica.strategy.mass, replica.z() * replica.strategy.mass))
        return start, history

    (a, seen), (b, _) = SimWorld(2).run(body)
    masses = [mass for mass, _ in seen]
    assert masses == [0.5, 0.75, 0.625]
    x1, x2 = a / 2, a / 4 + b / 2
    for got, want in zip([x for _, x in seen], [x1, x2], strict=False):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_overlap_hides_the_network():
    from hardy.distributed.config import ClusterConfig

    spent = {}
    for overlap in (False, True):
        world = SimWorld(4, cluster=ClusterConfig(latency_s=0.4))

        def body(comm, overlap=overlap):
            replica = Replica(comm, PushSumConfig(overlap=overlap))
            for t in range(10):
                comm.spend(1.0)
                replica.step(t)
            return comm.clock.now()

        spent[overlap] = max(world.run(body))
    assert spent[False] == pytest.approx(18.0, abs=0.5) and spent[True] == pytest.approx(10.0, abs=0.5)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("store", ["debiased", "numerator"])
def test_any_optimizers_change_moves_the_sum_by_itself(make, store):
    def body(comm):
        replica = Replica(comm, PushSumConfig(topology=STAR, store=store), make=make)
        rows = []
        for t in range(6):
            before = replica.strategy.mass * replica.z()
            delta = replica.step(t)
            rows.append((before, delta, replica.strategy.mass * replica.z(), replica.strategy.mass))
        return rows

    for rows in zip(*SimWorld(4).run(body), strict=True):
        before, delta, after, masses = (sum(column) for column in zip(*rows, strict=True))
        torch.testing.assert_close(after, before + delta, rtol=1e-11, atol=1e-11)
        assert masses == pytest.approx(4, rel=1e-14)


def with_buffers():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("buffers", ["local", "mix"])
def test_floating_buffers_are_mixed_only_when_asked(buffers):
    config = PushSumConfig(buffers=buffers, topology=TopologyConfig(name="full"))

    def body(comm):
        replica = Replica(comm, config, model=with_buffers())
        replica.model[1].running_mean.fill_(float(comm.rank))
        replica.model[1].num_batches_tracked.fill_(comm.rank)
        replica.model.eval()
        replica.step(0, learn=False)
        return replica.model[1].running_mean[0].item(), int(replica.model[1].num_batches_tracked)

    means, counts = zip(*SimWorld(3).run(body), strict=True)
    assert means == pytest.approx((0.0, 1.0, 2.0) if buffers == "local" else (1.0, 1.0, 1.0))
    assert counts == (0, 1, 2)


def test_a_replica_that_dies_leaves_the_others_an_average_of_theirs_and_a_new_one_takes_its_place():
    config = PushSumConfig(topology=TopologyConfig(name="full"), weights=WeightsConfig(name="adaptive"))

    def body(comm):
        here = comm.among([0, 1, 2, 3], name="first") if comm.rank < 4 else None
        mine = Replica(here, config) if here else None
        if mine:
            start = mine.z()
            for t in range(4):
                if comm.rank == 2 and t == 2:
                    comm.die()
                mine.step(t, learn=False)
            here = comm.among([0, 1, 3], name="second")
            before = mine.z()
            mine.strategy.renew(here, [0, 1, 3], generation=1)
            assert torch.equal(mine.z(), before)
            masses = here.sum(torch.tensor(mine.strategy.mass, dtype=torch.float64)).item()
            for t in range(4, 8):
                mine.step(t, learn=False)
        here = comm.among([0, 1, 3, 4], name="third")
        if comm.rank == 4:
            mine, start, masses = Replica(here, config), None, 3.0
        mine.strategy.renew(here, [0, 1, 3, 4], generation=2, is_new=comm.rank == 4)
        if here.rank in (0, 3):
            mine.strategy.adopt(source=0 if here.rank == 3 else None, newcomer=3)
        taken = mine.z()
        for t in range(8, 40):
            mine.step(t, learn=False)
        total = here.sum(torch.tensor(mine.strategy.mass, dtype=torch.float64)).item()
        return start, masses, taken, mine.z(), total, mine.strategy.step

    answers = SimWorld(5, detect_s=0.1).run(body)
    alive = [answers[rank] for rank in (0, 1, 3, 4)]
    assert [row[1] for row in alive] == pytest.approx([3.0] * 4) and torch.equal(alive[0][2], alive[3][2])
    assert [row[4] for row in alive] == pytest.approx([4.0] * 4) and {row[5] for row in alive} == {40}
    starts = torch.stack([first_weights(rank) for rank in range(4)])
    for row in alive:
        assert ((row[3] >= starts.min(0).values - 1e-9) & (row[3] <= starts.max(0).values + 1e-9)).all()
    spread = max((row[3] - alive[0][3]).abs().max() for row in alive)
    assert spread < 0.5 * (starts - starts.mean(0)).abs().max()


def first_weights(rank):
    """The weights that a replica of this number begins with."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    draws = [
        torch.randn(p.shape, generator=generator_for(0, rank, i)) for i, p in enumerate(model.parameters())
    ]
    return torch.cat([draw.flatten().double() for draw in draws])


def test_a_mass_that_runs_out_ends_the_run_with_what_to_do(tmp_path):
    """Replica 0 gives half away at each round and hears from nobody."""
    path = tmp_path / "drain.json"
    path.write_text("[[[0, 1]]]")
    config = PushSumConfig(topology=TopologyConfig(name="file", file=str(path)))

    def body(comm):
        replica = Replica(comm, config)
        for t in range(25):
            replica.step(t, learn=False)

    with pytest.raises(
        MassError, match=r"replica 0 has mass 9.5\d*e-07 at round 19 .*topology=file .*lost=0"
    ):
        SimWorld(2).run(body)


def test_a_replica_whose_weights_are_not_finite_keeps_them_to_itself():
    def body(comm):
        replica = Replica(comm, PushSumConfig(topology=TopologyConfig(name="full")))
        for t in range(4):
            if comm.rank == 1 and t == 1:
                with torch.no_grad():
                    replica.model[0].weight[0, 0] = torch.nan
            replica.step(t, learn=False)
        return bool(replica.z().isfinite().all()), replica.strategy.exchange.counters.lost

    assert [finite for finite, _ in SimWorld(3).run(body)] == [True, False, True]
    assert SimWorld(3).run(body)[0][1] == 3


def test_a_wish_to_stop_is_agreed_where_all_look():
    def body(comm):
        replica, seen = Replica(comm, PushSumConfig(agree_every_steps=3)), []
        for t in range(6):
            replica.step(t)
            seen.append(replica.strategy.agreed_stop(int(comm.rank == 1 and t == 3)))
        return seen

    assert SimWorld(2).run(body) == [[False] * 5 + [True]] * 2
    assert SimWorld(1).run(lambda comm: Replica(comm, PushSumConfig()).strategy.agreed_stop(1)) == [True]


def test_a_step_reports_its_round_once():
    config = PushSumConfig(topology=STAR, weights=WeightsConfig(name="adaptive", k=5.0), mix_every_steps=2)

    def body(comm):
        replica, reports = Replica(comm, config), []
        for t in range(4):
            replica.step(t)
            reports.append(replica.strategy.take_report())
            assert replica.strategy.take_report() == {}
        return reports, replica.strategy.mass

    (reports, mass), _, _ = SimWorld(3).run(body)
    assert [bool(report) for report in reports] == [False, True, False, True]
    last = reports[3]
    assert last["mass"] == mass and last["mass_least"] < 1 <= last["mass_most"]
    assert set(last["shares"]) == set(last["distances"]) == {"1", "2"} and last["mixed"] == 1
    assert last["distances"]["1"] > 0 and reports[1]["distances"]["1"] == 0
    assert last["neighbourhood_distance"] > 0 and last["bytes_sent"] > 0 and last["lost"] == 0


def distances_to_mean(config, n, *, steps=24, lag=0):
    """Return what n replicas estimated before each round, and the truth then: [rounds, n] each."""

    def body(comm):
        replica, rows = Replica(comm, config), []
        for t in range(steps):
            mass, before = replica.strategy.mass, replica.z()
            half = before + replica.step(t) / mass
            rows.append((half, replica.strategy.take_report().get("distance_to_mean")))
        return rows

    answers = SimWorld(n).run(body)
    half = torch.stack([torch.stack([z for z, _ in rows]) for rows in answers], 1)
    told = torch.tensor([[row[1] for row in rows[lag:]] for rows in answers], dtype=torch.float64).T
    return told[6:], (half - half.mean(1, keepdim=True)).norm(dim=2)[: steps - lag][6:]


@pytest.mark.parametrize("name", ["full", "one_peer_exponential", "ring"])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_distance_to_the_mean_is_estimated(name, overlap):
    """Exact over all replicas where all hear from all; too low where neighbours are alike."""
    config = PushSumConfig(topology=TopologyConfig(name=name), overlap=overlap)
    told, true = distances_to_mean(config, 8, lag=int(overlap))
    ratio = (told.square().mean().sqrt() / true.square().mean().sqrt()).item()
    if name == "full":
        torch.testing.assert_close(told.square().mean(1), true.square().mean(1), rtol=1e-9, atol=0)
    assert ratio < 0.7 if name == "ring" else ratio == pytest.approx(1.0, abs=0.08)


def test_buffers_that_are_mixed_are_no_part_of_the_distance_to_the_mean():
    def body(comm):
        replica = Replica(comm, PushSumConfig(buffers="mix", topology=RING), model=with_buffers())
        for param in replica.model.parameters():
            param.data.fill_(0.5)
        replica.model[1].running_mean.fill_(float(comm.rank))
        replica.step(0, learn=False)
        return replica.strategy.take_report()["distance_to_mean"]

    assert SimWorld(3).run(body) == [0.0] * 3


def test_the_distance_to_the_mean_is_of_debiased_parameters():
    """Masses of a star differ by far; replicas that agree are at distance 0 all the same."""
    config = PushSumConfig(topology=STAR)

    def body(comm):
        replica, told = Replica(comm, config), []
        for param in replica.model.parameters():
            param.data.fill_(0.5)
        for t in range(3):
            replica.step(t, learn=False)
            told.append(replica.strategy.take_report()["distance_to_mean"])
        return told, replica.strategy.mass

    for told, mass in SimWorld(4).run(body):
        assert told == pytest.approx([0.0] * 3, abs=1e-12) and abs(mass - 1) > 0.1


@pytest.mark.parametrize(
    "config",
    [{}, {"on_send_failure": "running_sum"}, {"method": "gradient_tracking"}, {"comm_dtype": "bf16"}],
)
def test_the_distance_to_the_mean_does_not_depend_on_what_travels(config):
    """Two replicas with nothing learnt yet: each is half their distance away."""

    def body(comm):
        replica = Replica(comm, PushSumConfig(topology=RING, **config))
        replica.step(0, learn=False)
        return replica.strategy.take_report()["distance_to_mean"]

    want = (first_weights(0) - first_weights(1)).norm().item() / 2
    assert SimWorld(2).run(body) == pytest.approx([want] * 2, rel=0.01)


def test_a_replica_that_heard_from_nobody_estimates_nothing():
    def body(comm):
        faults = {"faults": lambda t, sender, receiver: "lost" if t == 1 else ""}
        replica, told = Replica(comm, PushSumConfig(topology=RING), **faults), []
        for t in range(3):
            replica.step(t)
            told.append("distance_to_mean" in replica.strategy.take_report())
        return told

    assert SimWorld(3).run(body) == [[True, False, True]] * 3


@pytest.mark.parametrize("method", ["push", "gradient_tracking"])
def test_clipping_acts_on_each_replicas_own_step(method, tmp_path):
    """`optim.clip_norm` between the norms of two replicas: one is clipped, the other is not."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    changes = {
        "model.shape": shape,
        "data.source": "synthetic:lognormal,documents=60,mean=40",
        "data.pack_tokens": 32,
        "strategy": {"name": "push_sum", "method": method},
        "optim.schedule.warmup_steps": 0,
        "train.steps": 1,
        "train.batch_packs": 4,
        "train.device": "cpu",
    }
    config = from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))
    corpus = prepare(config.data, cache_dir=tmp_path)

    def norms(clip_norm):
        """Return for each replica the norm of what it steps along, before and after clipping."""
        made = from_dict(TrainConfig, override(to_dict(config), {"optim.clip_norm": clip_norm}))

        def body(comm):
            assembly = assemble(made, comm, corpus=corpus, hardware=choose_hardware("cpu", "fp32"))
            worker, seen = assembly.worker, []

            def note(*_):
                seen.append(grad_norm(worker.model.parameters()).item())

            reduce = worker.strategy.reduce_gradients
            worker.strategy.reduce_gradients = lambda: (reduce(), note())
            worker.optimizer.register_step_pre_hook(note)
            run = {"save": note, "record": lambda _: None, "stop": lambda: False}
            run_loop(worker, assembly.plan, Progress(), **run)
            return seen[:2]

        return SimWorld(2).run(body)

    (first, _), (second, _) = norms(None)
    clip_norm = (first + second) / 2
    assert abs(first - second) > 1e-3 * clip_norm
    for (before, after), unclipped in zip(norms(clip_norm), (first, second), strict=True):
        assert before == unclipped and after == pytest.approx(min(before, clip_norm), rel=1e-5)


def test_the_average_of_all_can_be_looked_at():
    def body(comm):
        replica = Replica(comm, PushSumConfig(topology=STAR))
        replica.step(0, learn=False)
        own = replica.z()
        with replica.strategy.averaged():
            shown = replica.z()
        assert torch.equal(replica.z(), own)
        return shown

    want = torch.stack([first_weights(rank) for rank in range(3)]).mean(0)
    for shown in SimWorld(3).run(body):
        torch.testing.assert_close(shown, want, rtol=1e-12, atol=1e-12)


def test_narrow_messages_keep_the_mass_and_nearly_the_sum():
    def body(comm):
        replica = Replica(comm, PushSumConfig(topology=RING, comm_dtype="bf16"))
        for t in range(10):
            replica.step(t, learn=False)
        return replica.strategy.mass, replica.z() * replica.strategy.mass

    masses, x = zip(*SimWorld(3).run(body), strict=True)
    want = sum(first_weights(rank) for rank in range(3))
    assert sum(masses) == pytest.approx(3, rel=1e-14)
    assert 0 < (sum(x) - want).abs().max() < 0.05


def test_a_gradient_that_is_not_finite_does_not_stop_the_others_or_spoil_what_is_tracked():
    def body(comm):
        replica = Replica(comm, PushSumConfig(method="gradient_tracking", topology=RING))
        for t in range(4):
            if comm.rank == 1 and t == 2:
                replica.model[0].weight.register_hook(lambda grad: grad * torch.nan)
            replica.step(t)
        assert all(part.isfinite().all() for part in replica.strategy.tracked)
        return replica.z().isfinite().all().item(), sum(y.sum() for y in replica.strategy.tracked).item()

    answers = SimWorld(3).run(body)
    assert all(finite for finite, _ in answers)


def test_nobody_posts_forever_without_knowing_that_it_was_taken():
    """What is kept for posts under way does not grow with the number of rounds."""
    for config in (PushSumConfig(), PushSumConfig(overlap=True)):
        kept = []

        def body(comm, config=config, kept=kept):
            replica, asked = Replica(comm, config), []
            finish = comm.finish_posts
            comm.finish_posts = lambda keep_last=0: asked.append(keep_last) or finish(keep_last=keep_last)
            for t in range(6):
                replica.step(t)
            kept.append(asked)

        SimWorld(4).run(body)
        assert all(len(asked) == 6 and max(asked) <= 2 * (1 + 3 + 2) for asked in kept)
