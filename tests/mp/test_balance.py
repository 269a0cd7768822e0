"""Balanced steps on real processes: groups change from step to step, FSDP2 or DDP is the bridge."""

import pytest
import torch

from hardy.balance.plan import Group, MicroBatch, Plan, Scheme
from hardy.distributed.balance.agreement import PlanMismatchError
from hardy.distributed.balance.attention import context_parallel_attention
from hardy.distributed.balance.layouts import gather_layout, shard_batch
from hardy.distributed.balance.probe import check_isolation
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.balance.step import PlannedBatches, balanced_step
from hardy.distributed.sharded import gather_full, parallelize
from hardy.model.decoder import Decoder, unit_names
from hardy.model.init import initialise
from hardy.model.presets import DecoderShape
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch
from hardy.rng import generator_for

pytestmark = pytest.mark.mp

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
# Each slot: (workers of a group, its documents), in rank order.
ON_FOUR = {
    "{4}": [[(4, (5, 0, 1, 2))], [(4, (3, 4, 6, 7, 8))]],
    "{2,2}": [[(2, (5, 1)), (2, (0, 3, 2))], [(2, (6, 4)), (2, (7, 8))]],
    "{2,1,1}": [[(2, (5, 6)), (1, (0, 1)), (1, (3, 7, 4))], [(2, ()), (1, (2, 8)), (1, ())]],
    "{1,1,1,1}": [[(1, (5,)), (1, (0,)), (1, (3, 7)), (1, (6, 1, 2, 4, 8))]],
    "slots": [[(4, (5,))], [(2, (0, 6)), (1, (3,)), (1, (7, 1))], [(2, (2,)), (2, (4, 8))]],
}
ON_EIGHT = {
    "{4,2,1,1}": [[(4, (5, 1)), (2, (0, 2)), (1, (3, 4)), (1, (6, 7, 8))]],
    "{8}": [[(8, tuple(range(9)))]],
}
FREE = [
    [(2, (5, 0)), (1, (1, 2)), (1, ())],
    [(2, (6, 7)), (1, (3,)), (1, ())],
    [(2, ()), (1, (4, 8)), (1, ())],
]


def make_plan(slots, *, world_size, objective="lock_step"):
    built = []
    for slot in slots:
        first, batches = 0, []
        for degree, sequences in slot:
            group = Group(first_rank=first, scheme=Scheme(context=degree))
            tokens = sum(LENGTHS[index] for index in sequences)
            batches.append(MicroBatch(group=group, sequences=sequences, tokens=tokens, cost=0.0))
            first += degree
        built.append(tuple(batches))
    return Plan(slots=tuple(built), world_size=world_size, objective=objective, cost=1.0, lower_bound=1.0)


def pack_of(indices):
    tokens = [torch.randint(23, (LENGTHS[i],), generator=generator_for(3, "document", i)) for i in indices]
    labels_T = torch.cat([torch.cat((t[1:], torch.tensor([IGNORED_LABEL]))) for t in tokens])
    return PackedBatch(
        tokens_T=torch.cat(tokens),
        labels_T=labels_T,
        layout=DocumentLayout.from_lengths([LENGTHS[i] for i in indices]),
        num_targets=int((labels_T != IGNORED_LABEL).sum()),
    )


def decoder(*, recompute="nothing"):
    model = Decoder(SHAPE, attention=context_parallel_attention, recompute=recompute)
    initialise(model, seed=1)
    return model


def wrapped(comm, kind, **options):
    model = decoder(**options)
    replicas, shards = (comm.size, 1) if kind == "ddp" else (1, comm.size)
    return parallelize(
        model,
        comm,
        replicas=replicas,
        shards=shards,
        unit_names=unit_names(model),
        device_type="cpu",
        precision="fp32",
    )


def gradient(model):
    named = {name.removeprefix("module."): param for name, param in model.named_parameters()}
    return torch.cat([gather_full(named[name].grad).flatten() for name in sorted(named)])


def steps(comm, model, plans, *, scheme):
    """Make a step by each plan, without updates; return losses and gradients."""
    planned = PlannedBatches(comm, Sharer(num_heads=8, num_kv_heads=2, scheme=scheme, split_tokens=1))
    answers = []
    for plan in plans:
        batches = planned.of(plan, pack_of)
        totals = balanced_step(model, batches, comm, objective=plan.objective)
        answers.append((totals.loss, gradient(model)))
        model.zero_grad(set_to_none=True)
    return answers


@pytest.fixture(scope="module")
def per_document():
    """Return loss and gradient of one process that takes one document at a time."""
    model = decoder()
    packs = [pack_of([index]) for index in range(len(LENGTHS))]
    num_targets = sum(pack.num_targets for pack in packs)
    losses = [model(pack.tokens_T, pack.layout, pack.labels_T) / num_targets for pack in packs]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses), gradient(model)


def assert_exact(answers, want):
    for loss, got in answers:
        assert loss == pytest.approx(want[0], rel=1e-6)
        torch.testing.assert_close(got, want[1], rtol=0, atol=1e-6)
        assert want[1].abs().max() > 1e-2  # so that the tolerance means something


@pytest.mark.parametrize(
    ("size", "slots", "recompute"),
    [(4, ON_FOUR, "nothing"), (4, ON_FOUR, "blocks"), (8, ON_EIGHT, "nothing")],
    ids=["4", "4-recomputed", "8"],
)
@pytest.mark.parametrize("scheme", ["gather", "ulysses"])
def test_groups_change_from_step_to_step_and_the_gradient_is_that_of_one_process(
    run_workers, per_document, scheme, size, slots, recompute
):
    plans = [make_plan(slots[name], world_size=size) for name in slots]

    def body(comm):
        return steps(comm, wrapped(comm, "fsdp", recompute=recompute), plans, scheme=scheme)

    for answers in run_workers(body, size=size):
        assert len(answers) == len(plans)
        assert_exact(answers, per_document)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_workers_that_run_freely_may_have_different_numbers_of_micro_batches(run_workers, per_document, kind):
    plans = [make_plan(FREE, world_size=4, objective="free_running")] * 2

    def body(comm):
        return steps(comm, wrapped(comm, kind), plans, scheme="auto")

    for answers in run_workers(body, size=4, timeout_s=20.0):
        assert_exact(answers, per_document)


def test_workers_with_different_plans_are_told_instead_of_waiting(run_workers):
    names = ["{4}", "{4}", "{2,2}", "{4}"]

    def body(comm):
        plan = make_plan(ON_FOUR[names[comm.rank]], world_size=4)
        with pytest.raises(PlanMismatchError, match=r"workers \[2\] have another plan"):
            steps(comm, wrapped(comm, "fsdp"), [plan], scheme="gather")

    run_workers(body, size=4, timeout_s=20.0)


def test_documents_stay_apart_in_a_sharded_model_over_a_group(run_workers):
    def body(comm):
        def shard(pack):
            return shard_batch(pack, gather_layout(pack.layout.lengths, comm, split_tokens=1))

        check_isolation(wrapped(comm, "fsdp"), comm, vocab_size=23, shard=shard)

    run_workers(body)
