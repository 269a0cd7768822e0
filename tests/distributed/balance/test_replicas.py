"""Training by replicas of different degree is training by one process with one document at a time."""

from dataclasses import replace

import pytest
import torch

from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.plan import Group, MicroBatch, Plan, Scheme
from hardy.balance.strategies import plan_strategies
from hardy.config import UserError
from hardy.distributed.balance.agreement import PlanMismatchError
from hardy.distributed.balance.replicas import ReplicaTrainer, replicas_of
from hardy.distributed.balance.tensor_parallel import decoder_splits, tensor_parallel_bytes
from hardy.distributed.comm import Alone, WorkerLostError
from hardy.distributed.simulation import SimWorld
from hardy.model.decoder import Decoder
from hardy.model.init import initialise
from hardy.model.presets import DecoderShape
from hardy.ops.attention import packed_attention
from hardy.ops.packed import IGNORED_LABEL

LENGTHS = (37, 5, 1, 18, 2, 64, 9, 11, 3)
SHAPE = DecoderShape(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=4,
    context_tokens=128,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=True,
)
# Each slot: (ranks of a replica, its documents). Numbers of micro-batches differ, one replica has no data.
PLANS = {
    "2+1+1": [
        [(2, (5, 0)), (1, (1, 2)), (1, ())],
        [(2, (6, 7)), (1, (3,)), (1, ())],
        [(2, ()), (1, (4, 8)), (1, ())],
    ],
    "1+2+1": [[(1, (5,)), (2, (0, 3, 1)), (1, (2, 4, 6))], [(1, ()), (2, ()), (1, (7, 8))]],
    "2+2": [[(2, (5, 1)), (2, (0, 3, 2))], [(2, (6, 4)), (2, (7, 8))]],
    "4": [[(4, (5, 0, 1, 2))], [(4, (3, 4, 6, 7, 8))]],
    "1+1+1+1": [[(1, (5,)), (1, (0,)), (1, (3, 7)), (1, (6, 1, 2, 4, 8))]],
    "2, two idle": [[(2, tuple(range(9)))]],
}
RUNS = [[name] * 3 for name in PLANS] + [["2+1+1", "4", "1+1+1+1"], ["2, two idle", "2+1+1", "2, two idle"]]
LR = {torch.float32: 1e-3, torch.float64: 1e-2}


def model_of(dtype, **options):
    model = Decoder(SHAPE, attention=packed_attention, **options)
    initialise(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8 if parameter.ndim == 2 else 1  # so that attention has gradients to speak of
    return model.to(dtype)


@pytest.fixture(scope="module")
def plans(make_plan):
    def plan(slots):
        return make_plan(slots, LENGTHS, world_size=4, objective="free_running", share="tensor")

    return {name: plan(slots) for name, slots in PLANS.items()}


@pytest.fixture(scope="module")
def per_document(pack_of):
    """Return losses, weights and gradients of one process, one document at a time, by dtype."""

    def train(dtype):
        model = model_of(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR[dtype])
        packs = [pack_of(LENGTHS)([index]) for index in range(len(LENGTHS))]
        num_targets, losses = sum(pack.num_targets for pack in packs), []
        for _ in range(3):
            optimizer.zero_grad()
            parts = [model(pack.tokens_T, pack.layout, pack.labels_T) / num_targets for pack in packs]
            for part in parts:
                part.backward()
            losses.append(sum(part.item() for part in parts))
            optimizer.step()
        named = dict(model.named_parameters())
        return losses, named, {name: parameter.grad for name, parameter in named.items()}

    return {dtype: train(dtype) for dtype in LR}


def trainer_of(comm, dtype=torch.float64, *, options=None, **named):
    trainer = ReplicaTrainer(model_of(dtype, **(options or {})), comm, decoder_splits(SHAPE), **named)
    return trainer, torch.optim.AdamW(trainer.masters.parameters(), lr=LR[dtype])


def train(comm, names, plans, packs, dtype=torch.float64, **options):
    """Make one step by each plan; return losses, the whole weights and the whole last gradient."""
    trainer, optimizer = trainer_of(comm, dtype, options=options)
    losses = []
    for name in names:
        losses.append(trainer.step(plans[name], packs).loss)
        optimizer.step()
    return losses, *whole(trainer)


def whole(trainer):
    """Return copies of all weights, and of all gradients put together in the same way."""
    trainer.gather_whole()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with torch.no_grad():
        for master in trainer.masters.parameters():
            master.copy_(master.grad)
    trainer.gather_whole()
    return weights, {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize(
    ("names", "recompute"),
    [*((names, "nothing") for names in RUNS), (["2+1+1", "4", "2+2"], "blocks")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_three_steps_are_those_of_one_process(names, dtype, atol, recompute, plans, pack_of, per_document):
    want_losses, want_weights, want_grads = per_document[dtype]
    for losses, weights, grads in SimWorld(4).run(
        lambda comm: train(comm, names, plans, pack_of(LENGTHS), dtype, recompute=recompute)
    ):
        assert losses == pytest.approx(want_losses, rel=atol)
        assert losses[0] - losses[-1] > 1e-3 and weights.keys() == want_weights.keys()
        for name, want in want_weights.items():
            torch.testing.assert_close(weights[name], want.detach(), rtol=0, atol=atol)
            torch.testing.assert_close(grads[name], want_grads[name], rtol=0, atol=atol)
            assert want_grads[name].abs().max() > 2e-3  # so that the tolerance means something


def test_eight_workers_of_which_one_is_idle(pack_of, make_plan, per_document):
    slots = [[(4, (5, 0)), (2, (3, 1)), (1, (2, 6))], [(4, ()), (2, (7,)), (1, (4, 8))]]
    plan = make_plan(slots, LENGTHS, world_size=8, objective="free_running", share="tensor")
    names, all_plans = ["8", "8", "8"], {"8": plan}
    want_losses, want_weights, _ = per_document[torch.float64]
    for losses, weights, _ in SimWorld(8).run(lambda comm: train(comm, names, all_plans, pack_of(LENGTHS))):
        assert losses == pytest.approx(want_losses, rel=1e-12)
        for name, want in want_weights.items():
            torch.testing.assert_close(weights[name], want.detach(), rtol=0, atol=1e-12)


def test_all_ranks_hear_the_same_totals_and_only_theirs_are_packed(plans, pack_of):
    def body(comm):
        packed = []

        def packs(indices):
            packed.append(indices)
            return pack_of(LENGTHS)(indices)

        return trainer_of(comm)[0].step(plans["2+1+1"], packs), packed

    answers = SimWorld(4).run(body)
    assert len({totals for totals, _ in answers}) == 1
    assert answers[0][0].num_targets == sum(LENGTHS) - len(LENGTHS)
    assert [packed for _, packed in answers] == [[(5, 0), (6, 7)]] * 2 + [[(1, 2), (3,), (4, 8)], []]


def test_replicas_follow_from_the_lengths_of_each_batch(pack_of):
    """By both stages of the planner: a long document asks for ranks together, short ones for replicas."""
    schemes = tuple(
        SchemeCost(scheme=Scheme(tensor=d), a=1e-3 / d, b=1.0 / d**0.5, c=1.0, cap_tokens=40 * d)
        for d in (1, 2, 4)
    )
    cost = LengthCostModel(schemes=schemes)
    one, two, four = (Scheme(tensor=d) for d in (1, 2, 4))
    strategies = [(two, one, one), (four,), (one,) * 4]
    batches = [(64, 12, 11, 9, 8, 3), (150, 2), (20, 19, 18, 17, 9, 8, 7, 6)]

    def run(comm, size):
        model = model_of(torch.float64)
        chosen, losses = [], []
        if size > 1:
            trainer = ReplicaTrainer(model, comm, decoder_splits(SHAPE))
            optimizer = torch.optim.AdamW(trainer.masters.parameters(), lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for lengths in batches:
            choice = plan_strategies(lengths, world_size=4, cost=cost, strategies=strategies)
            chosen.append(choice.index)
            if size > 1:
                losses.append(trainer.step(choice.plan, pack_of(lengths)).loss)
            else:
                optimizer.zero_grad()
                pack = pack_of(lengths)(range(len(lengths)))
                loss = model(pack.tokens_T, pack.layout, pack.labels_T) / pack.num_targets
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
        return chosen, losses

    want = run(None, 1)
    assert want[0] == [0, 1, 2]
    for chosen, losses in SimWorld(4).run(lambda comm: run(comm, 4)):
        assert chosen == want[0] and losses == pytest.approx(want[1], rel=1e-12)


def test_a_checkpoint_under_some_replicas_goes_on_under_others(plans, pack_of, tmp_path):
    packs = pack_of(LENGTHS)

    def first(comm):
        trainer, optimizer = trainer_of(comm)
        for _ in range(2):
            trainer.step(plans["2+1+1"], packs)
            optimizer.step()
        state = {"masters": trainer.masters.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / f"{comm.rank}.pt")
        trainer.step(plans["4"], packs)
        optimizer.step()
        return whole(trainer)

    def second(comm):
        trainer, optimizer = trainer_of(comm)
        with torch.no_grad():
            for master in trainer.masters.parameters():
                master.zero_()
        state = torch.load(tmp_path / f"{comm.rank}.pt", weights_only=True)
        trainer.masters.load_state_dict(state["masters"])
        optimizer.load_state_dict(state["optimizer"])
        trainer.step(plans["4"], packs)
        optimizer.step()
        return whole(trainer)

    for went_on, resumed in zip(SimWorld(4).run(first), SimWorld(4).run(second), strict=True):
        for want, got in zip(went_on, resumed, strict=True):
            assert all(torch.equal(want[name], got[name]) for name in want)


def test_what_is_kept_does_not_depend_on_the_replicas(plans, pack_of):
    def body(comm, name):
        trainer, optimizer = trainer_of(comm)
        trainer.step(plans[name], pack_of(LENGTHS))
        optimizer.step()
        kept = {key: (value.shape, value.dtype) for key, value in trainer.masters.named.items()}
        states = [{key: value.shape for key, value in state.items()} for state in optimizer.state.values()]
        return kept, states

    assert SimWorld(4).run(lambda comm: body(comm, "2+1+1")) == SimWorld(4).run(lambda c: body(c, "4"))


@pytest.mark.parametrize("name", ["2+1+1", "4", "1+1+1+1"])
def test_the_bytes_of_a_whole_step_are_those_predicted(name, plans, pack_of):
    plan, checks = plans[name], 8 * 3 + 2 * 2 * 6  # the hash's all-gather, two sums of 8 bytes

    def body(comm):
        trainer, _ = trainer_of(comm)
        trainer.step(plan, pack_of(LENGTHS))
        bridge = trainer.masters.bytes_of(replicas_of(plan, num_workers=4))
        tensor = sum(
            tensor_parallel_bytes(
                num_regions=2 * SHAPE.num_layers,
                stream_bytes=part.tokens * SHAPE.hidden_size * 8,
                degree=part.group.scheme.tensor,
            )
            for part in plan.of_rank(comm.rank)
        )
        return bridge.weights[comm.rank] + bridge.gradients[comm.rank] + tensor + checks

    world = SimWorld(4)
    predicted = world.run(body)
    assert [report.bytes_sent for report in world.report()] == predicted


def test_steps_by_the_same_plans_give_the_same_bits(plans, pack_of):
    names = ["2+1+1", "4", "1+2+1"]
    first, second = (SimWorld(4).run(lambda c: train(c, names, plans, pack_of(LENGTHS))) for _ in range(2))
    for (losses, weights, _), (losses_again, weights_again, _) in zip(first, second, strict=True):
        assert losses == losses_again
        assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_after_a_step_every_rank_can_evaluate_the_whole_model(plans, pack_of, per_document):
    packs = pack_of(LENGTHS)

    def body(comm):
        trainer, optimizer = trainer_of(comm)
        for _ in range(3):
            trainer.step(plans["2+1+1"], packs)
            optimizer.step()
        trainer.gather_whole()
        before = comm.bytes_sent
        pack = packs((comm.rank,))  # other documents on every rank, and nobody waits for anybody
        with torch.no_grad():
            nll = trainer.model(pack.tokens_T, pack.layout, pack.labels_T)
        assert comm.bytes_sent == before
        return nll

    model = model_of(torch.float64)
    model.load_state_dict(per_document[torch.float64][1])
    for rank, nll in enumerate(SimWorld(4).run(body)):
        pack = packs((rank,))
        torch.testing.assert_close(nll, model(pack.tokens_T, pack.layout, pack.labels_T).detach())


def test_low_precision_in_the_model_leaves_the_masters_exact(plans, pack_of, per_document):
    def body(comm, name):
        trainer, optimizer = trainer_of(comm, torch.float32, compute_dtype=torch.bfloat16)
        losses = []
        for _ in range(3):
            losses.append(trainer.step(plans[name], pack_of(LENGTHS)).loss)
            optimizer.step()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in trainer.masters.parameters()} == {torch.float32}
        trainer.gather_whole()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        return losses

    want = per_document[torch.float32][0]
    for name in ("2+1+1", "4"):
        for losses in SimWorld(4).run(lambda comm, name=name: body(comm, name)):
            assert losses == pytest.approx(want, rel=1e-2) and losses != want


def test_one_worker_alone_is_a_replica(pack_of, make_plan, per_document):
    plan = make_plan(
        [[(1, tuple(range(9)))]], LENGTHS, world_size=1, objective="free_running", share="tensor"
    )
    losses, weights, _ = train(Alone(), ["all"] * 3, {"all": plan}, pack_of(LENGTHS))
    assert losses == pytest.approx(per_document[torch.float64][0], rel=1e-12)
    for name, want in per_document[torch.float64][1].items():
        torch.testing.assert_close(weights[name], want.detach(), rtol=0, atol=1e-12)


def test_workers_with_different_replicas_stop_before_they_wait_for_each_other(plans, pack_of):
    def body(comm):
        plan = plans["2+2" if comm.rank == 2 else "2+1+1"]
        with pytest.raises(PlanMismatchError, match=r"workers \[2\] have another plan"):
            trainer_of(comm)[0].step(plan, pack_of(LENGTHS))

    SimWorld(4).run(body)


def test_a_worker_that_dies_is_told_to_the_others(plans, pack_of):
    def body(comm):
        def packs(indices):
            return comm.die() if comm.rank == 2 else pack_of(LENGTHS)(indices)

        with pytest.raises(WorkerLostError):
            trainer_of(comm)[0].step(plans["2+1+1"], packs)

    SimWorld(4).run(body)


def test_the_check_of_plans_can_be_left_out(plans, pack_of):
    def body(comm, check):
        trainer_of(comm, check_plans=check)[0].step(plans["4"], pack_of(LENGTHS))
        return comm.bytes_sent

    with_check = SimWorld(4).run(lambda comm: body(comm, True))
    without = SimWorld(4).run(lambda comm: body(comm, False))
    assert [a - b for a, b in zip(with_check, without, strict=True)] == [24] * 4


def plan_of(*schemes, firsts=None, world_size=4, objective="free_running", slots=1):
    firsts = firsts or [sum(scheme.ranks for scheme in schemes[:place]) for place in range(len(schemes))]
    groups = [Group(first_rank=first, scheme=s) for first, s in zip(firsts, schemes, strict=True)]
    slot = tuple(MicroBatch(group=group, sequences=(0,), tokens=37, cost=1.0) for group in groups)
    return Plan(slots=(slot,) * slots, world_size=world_size, objective=objective, cost=1.0, lower_bound=1.0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(Scheme(), world_size=8), "for 8 workers and 4 run; plan for world_size=4"),
        (plan_of(Scheme(tensor=2, pipeline=2)), r"is tp2 pp2: .* pipelines \(pp\) are planned and simulated"),
        (plan_of(Scheme(context=2)), r"is cp2: .* context-parallel groups \(cp\) are run by PlannedBatches"),
        (plan_of(Scheme(tensor=2), Scheme(), firsts=[0, 1]), "rank 1 is in two groups of the plan, but repl"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(plan, message):
    with pytest.raises(UserError, match=message):
        replicas_of(plan, num_workers=4)


def test_replicas_come_by_first_rank_whatever_their_size():
    plan = plan_of(Scheme(tensor=2), Scheme(), Scheme(), slots=2)
    assert [(g.first_rank, g.scheme.tensor) for g in replicas_of(plan, num_workers=4)] == [
        (0, 2),
        (2, 1),
        (3, 1),
    ]


def test_heads_that_do_not_divide_stop_all_ranks_before_anything_is_sent(plans, pack_of):
    shape = replace(SHAPE, num_kv_heads=2)

    def body(comm):
        model = Decoder(shape, attention=packed_attention)
        trainer = ReplicaTrainer(model, comm, decoder_splits(shape))
        with pytest.raises(UserError, match="degree 4 .* 2 key and value heads .* takes degrees 1, 2"):
            trainer.step(plans["4"], pack_of(LENGTHS))
        trainer.step(plans["2+1+1"], pack_of(LENGTHS))

    SimWorld(4).run(body)


def test_a_batch_without_labels_and_a_wrong_pack_are_refused(plans, pack_of):
    def unlabelled(indices):
        pack = pack_of(LENGTHS)(indices)
        pack.labels_T.fill_(IGNORED_LABEL)
        return replace(pack, num_targets=0)

    with pytest.raises(UserError, match="no token of this step's batch has a label"):
        SimWorld(4).run(lambda comm: trainer_of(comm)[0].step(plans["4"], unlabelled))
    with pytest.raises(ValueError, match="4 sequences of 107 tokens here, their pack 3 documents of 106"):
        SimWorld(4).run(lambda comm: trainer_of(comm)[0].step(plans["4"], lambda i: pack_of(LENGTHS)(i[:3])))
