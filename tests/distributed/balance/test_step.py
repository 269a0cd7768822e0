"""A step by a plan gives the gradient of single-process, per-document training, whatever the plan."""

import pytest
import torch

from hardy.balance.plan import Group, MicroBatch, Plan, Scheme
from hardy.config import UserError
from hardy.distributed.balance.agreement import PlanMismatchError
from hardy.distributed.balance.attention import context_parallel_attention
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.balance.step import PlannedBatches, balanced_step
from hardy.distributed.simulation import SimWorld
from hardy.distributed.strategy import Synchronous
from hardy.model.decoder import Decoder
from hardy.model.init import initialise
from hardy.model.presets import DecoderShape
from hardy.ops.packed import IGNORED_LABEL

LENGTHS = (37, 5, 1, 18, 2, 64, 9, 11, 3)
SHAPE = DecoderShape(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_size=4,
    context_tokens=128,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=True,
)
PLANS = {
    "{4}": [[(4, (5, 0, 1, 2))], [(4, (3, 4, 6, 7, 8))]],
    "{2,2}": [[(2, (5, 1)), (2, (0, 3, 2))], [(2, (6, 4)), (2, (7, 8))]],
    "{2,1,1}": [[(2, (5, 6)), (1, (0, 1)), (1, (3, 7, 4))], [(2, ()), (1, (2, 8)), (1, ())]],
    "{1,1,1,1}": [[(1, (5,)), (1, (0,)), (1, (3, 7)), (1, (6, 1, 2, 4, 8))]],
    "slot by slot": [
        [(4, (5,))],
        [(2, (0, 6)), (1, (3,)), (1, (7, 1))],
        [(2, (2,)), (2, ())],
        [(1, (4, 8))] + [(1, ())] * 3,
    ],
    "one document": [[(2, ()), (1, ()), (1, tuple(range(9)))]],
}


def model_of(*, dtype=torch.float64, recompute="nothing"):
    model = Decoder(SHAPE, attention=context_parallel_attention, recompute=recompute).to(dtype)
    initialise(model, seed=1)
    return model


def gradient(model):
    return torch.cat([param.grad.flatten() for _, param in sorted(model.named_parameters())])


@pytest.fixture(scope="module")
def per_document(pack_of):
    """Return loss and gradient of one process that takes one document at a time."""
    model = model_of()
    packs = [pack_of(LENGTHS)([index]) for index in range(len(LENGTHS))]
    num_targets = sum(pack.num_targets for pack in packs)
    total = 0.0
    for pack in packs:
        nll = model(pack.tokens_T, pack.layout, pack.labels_T) / num_targets
        nll.backward()
        total += nll.item()
    return total, gradient(model), num_targets


def planned_step(comm, plan, packs, *, scheme="gather", split_tokens=1, **options):
    model = model_of(**options)
    sharer = Sharer(num_heads=8, num_kv_heads=2, scheme=scheme, split_tokens=split_tokens)
    batches = PlannedBatches(comm, sharer).of(plan, packs)
    totals = balanced_step(model, batches, comm, objective=plan.objective)
    Synchronous(model, comm).reduce_gradients()
    return totals, gradient(model), len(batches)


@pytest.mark.parametrize("recompute", ["nothing", "blocks"])
@pytest.mark.parametrize("scheme", ["gather", "ulysses", "auto"])
@pytest.mark.parametrize("name", PLANS)
def test_any_plan_gives_the_gradient_of_one_document_at_a_time(
    name, scheme, recompute, per_document, pack_of, make_plan
):
    plan = make_plan(PLANS[name], LENGTHS, world_size=4)
    loss, want, num_targets = per_document
    for totals, got, count in SimWorld(4).run(
        lambda comm: planned_step(comm, plan, pack_of(LENGTHS), scheme=scheme, recompute=recompute)
    ):
        assert totals.num_targets == num_targets and totals.loss == pytest.approx(loss, rel=1e-12)
        assert count == len(plan.slots)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_free_workers_skip_what_is_empty_and_run_at_least_one(per_document, pack_of, make_plan):
    slots = [[(2, (5, 0)), (1, tuple(range(1, 5))), (1, ())], [(2, (6, 7, 8)), (1, ()), (1, ())]]
    plan = make_plan(slots, LENGTHS, world_size=4, objective="free_running")
    answers = SimWorld(4).run(lambda comm: planned_step(comm, plan, pack_of(LENGTHS)))
    assert [count for _, _, count in answers] == [2, 2, 1, 1]
    for totals, got, _ in answers:
        assert totals.loss == pytest.approx(per_document[0], rel=1e-12)
        torch.testing.assert_close(got, per_document[1], rtol=0, atol=1e-14)


def test_a_mean_of_means_is_another_gradient(per_document, pack_of):
    """What the paper's code does on unequal packs; it must differ, or the tests above prove little."""
    model, packs = model_of(), [(5, 0), (3, 6, 7), (1, 2, 4, 8)]
    for indices in packs:
        pack = pack_of(LENGTHS)(indices)
        (model(pack.tokens_T, pack.layout, pack.labels_T) / (pack.num_targets * len(packs))).backward()
    assert (gradient(model) - per_document[1]).norm() > 0.05 * per_document[1].norm()


def test_workers_with_different_plans_stop_before_they_wait_for_each_other(pack_of, make_plan):
    plans = [make_plan(PLANS[name], LENGTHS, world_size=4) for name in ("{4}", "{2,2}")]

    def body(comm):
        with pytest.raises(PlanMismatchError, match=r"workers \[2\] have another plan"):
            planned_step(comm, plans[comm.rank == 2], pack_of(LENGTHS))

    SimWorld(4).run(body)


def test_the_check_of_plans_costs_eight_bytes_and_can_be_left_out(pack_of, make_plan):
    plan = make_plan([[(1, (0,)), (1, (1,))]], LENGTHS, world_size=2)
    sharer = Sharer(num_heads=8, num_kv_heads=2)

    def body(comm, check):
        PlannedBatches(comm, sharer, check_plans=check).of(plan, pack_of(LENGTHS))
        return comm.bytes_sent

    assert SimWorld(2).run(lambda comm: body(comm, True)) == [8, 8]
    assert SimWorld(2).run(lambda comm: body(comm, False)) == [0, 0]


def test_groups_of_one_get_the_pack_as_it_is(pack_of, make_plan):
    plan = make_plan([[(1, (0, 3)), (1, ())]], LENGTHS, world_size=2)
    sharer = Sharer(num_heads=8, num_kv_heads=2)
    (pack,), (idle,) = SimWorld(2).run(lambda comm: PlannedBatches(comm, sharer).of(plan, pack_of(LENGTHS)))
    assert pack.layout.lengths == (37, 18) and idle.num_targets == 0


def test_a_plan_that_cannot_be_run_is_refused(pack_of, make_plan):
    def run(plan, packs=None, size=2):
        sharer = Sharer(num_heads=8, num_kv_heads=2)
        SimWorld(size).run(lambda comm: PlannedBatches(comm, sharer).of(plan, packs or pack_of(LENGTHS)))

    with pytest.raises(UserError, match="for 4 workers and 2 run; plan for world_size=2"):
        run(make_plan([[(4, (0,))]], LENGTHS, world_size=4))
    group = Group(first_rank=0, scheme=Scheme(tensor=2))
    batch = MicroBatch(group=group, sequences=(0,), tokens=37, cost=1.0)
    plan = Plan(slots=((batch,),), world_size=2, objective="lock_step", cost=1.0, lower_bound=1.0)
    with pytest.raises(UserError, match="group of the plan is tp2: only context parallel groups"):
        run(plan)
    plan = make_plan([[(2, (0, 1))]], LENGTHS, world_size=2)
    with pytest.raises(ValueError, match="2 sequences of 42 tokens here, their pack 1 documents of 37"):
        run(plan, lambda indices: pack_of(LENGTHS)(indices[:1]))


def test_a_batch_without_labels_is_refused(pack_of, make_plan):
    def unlabelled(indices):
        pack = pack_of(LENGTHS)(indices)
        pack.labels_T.fill_(IGNORED_LABEL)
        return pack

    plan = make_plan([[(2, (0, 1))]], LENGTHS, world_size=2)
    with pytest.raises(UserError, match="no token of this step's batch has a label"):
        SimWorld(2).run(lambda comm: planned_step(comm, plan, unlabelled))
