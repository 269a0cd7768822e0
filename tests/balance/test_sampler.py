"""The sampler hands every document out once, alike on all ranks, and goes on where it stopped."""

import json
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from hardy.balance.batching import Batching
from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.plan import Scheme
from hardy.balance.planner import plan
from hardy.balance.sampler import BalancedBatchSampler, Planning, SharedBatch
from hardy.clock import VirtualClock
from hardy.config import UserError
from hardy.rng import numpy_generator_for

LENGTHS = numpy_generator_for(1, "sampler lengths").integers(1, 120, size=101).tolist()
CAP = 300
COST = LengthCostModel(
    schemes=tuple(
        SchemeCost(
            scheme=Scheme(context=degree),
            a=1.0 / degree,
            b=10.0 / degree,
            c=5.0,
            cap_tokens=CAP * degree,
        )
        for degree in (1, 2, 4)
    )
)
PLANNING = Planning(cost=COST, micro_batches=3)
BATCHING = Batching(sequences=20)


def sampler_of(rank=0, world_size=4, *, lengths=LENGTHS, batching=BATCHING, clock=None, **changes):
    return BalancedBatchSampler(
        lengths,
        batching=batching,
        planning=replace(PLANNING, **changes),
        world_size=world_size,
        rank=rank,
        clock=clock,
    )


def all_ranks(world_size=4, **changes):
    return [sampler_of(rank, world_size, **changes) for rank in range(world_size)]


@pytest.mark.parametrize("mode", ["pack", "dispatch"])
@pytest.mark.parametrize("objective", ["lock_step", "free_running"])
@pytest.mark.parametrize("micro_batches", [3, None])
@pytest.mark.parametrize("batching", [BATCHING, Batching(tokens=1500, delay_steps=2)])
def test_every_document_once_an_epoch_and_steps_hold_their_global_batch(
    mode, objective, micro_batches, batching
):
    samplers = all_ranks(batching=batching, mode=mode, objective=objective, micro_batches=micro_batches)
    handed_out = Counter()
    for step in range(samplers[0].num_steps(0)):
        parts = [sampler.micro_batches(0, step) for sampler in samplers]
        found = [index for part in parts for batch in part for index in batch.sequences]
        assert sorted(found) == sorted(samplers[0].documents(0, step))
        counts = [len(part) for part in parts]
        assert min(counts) >= 1
        if micro_batches:
            assert counts == [micro_batches] * 4
        elif objective == "lock_step":
            assert len(set(counts)) == 1
        for batch in (batch for part in parts for batch in part):
            assert batch.tokens == sum(LENGTHS[index] for index in batch.sequences) <= CAP
    for sampler in samplers:
        handed_out.update(index for indices in sampler for index in indices)
    assert handed_out == Counter(range(101))


def test_freely_running_ranks_have_no_empty_micro_batch_but_an_only_one():
    lengths = [100, 100, 100, 100, 100, 3]
    settings = {"lengths": lengths, "batching": Batching(sequences=6), "micro_batches": None}
    counts = [[len(part) for part in sampler] for sampler in all_ranks(**settings)]
    assert all(min(own) > 0 for own in counts) and sum(map(sum, counts)) == 6
    alone = [list(sampler) for sampler in all_ranks(**settings | {"lengths": [5] * 2})]
    assert sorted(alone) == [[[]], [[]], [[0]], [[1]]]


def test_ranks_and_world_sizes_see_the_same_global_batches():
    samplers = [*all_ranks(4), *all_ranks(2), sampler_of(0, 1, mode="pack", micro_batches=None)]
    for epoch in (0, 2):
        for step in range(6):
            found = {tuple(sorted(sampler.documents(epoch, step))) for sampler in samplers}
            assert len(found) == 1
            assert len({sampler.plan_hash(epoch, step) for sampler in samplers[:4]}) == 1


def test_the_plan_hash_tells_other_documents_and_other_plans_apart():
    same = {sampler_of(rank).plan_hash(0, 0) for rank in range(4)}
    others = [
        sampler_of(batching=replace(BATCHING, seed=1)),
        sampler_of(world_size=2),
        sampler_of(mode="pack"),
        sampler_of(micro_batches=4),
        sampler_of(lengths=[*LENGTHS[:50], *[7] * 51]),
    ]
    hashes = same | {sampler.plan_hash(0, 0) for sampler in others} | {sampler_of().plan_hash(1, 0)}
    equal = sampler_of(batching=Batching(sequences=4), lengths=[5] * 8, micro_batches=1)
    hashes |= {equal.plan_hash(0, 0), equal.plan_hash(0, 1)}  # one plan, other documents
    assert len(hashes) == 9
    assert equal.plan(0, 0).hash() == equal.plan(0, 1).hash()


def test_the_hash_of_all_plans_is_alike_on_all_ranks_only():
    same = {sampler_of(rank, ahead=rank).hash() for rank in range(4)}
    changed = [*LENGTHS[:-1], LENGTHS[-1] + 1]
    assert sampler_of(lengths=changed).plan_hash(0, 0) == sampler_of().plan_hash(0, 0)
    others = [
        sampler_of(lengths=changed),
        sampler_of(world_size=2),
        sampler_of(mode="pack"),
        sampler_of(objective="lock_step"),
        sampler_of(cost=COST.with_cap(CAP - 1)),
    ]
    assert len(same) == 1 and len(same | {sampler.hash() for sampler in others}) == 6


def test_balanced_plans_are_cheaper_than_dealt_packs():
    costs = {
        mode: sum(sampler_of(mode=mode).plan(0, step).cost for step in range(5))
        for mode in ("pack", "dispatch")
    }
    assert costs["dispatch"] < 0.9 * costs["pack"]


def test_epochs_follow_each_other_and_can_be_set():
    sampler = sampler_of()
    first, second = list(sampler), list(sampler)
    assert sampler.epoch == 2 and first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert len(sampler) == len(first) == 6 * 3


@pytest.mark.parametrize("ahead", [0, 1, 7])
@pytest.mark.parametrize("taken", [0, 1, 3, 5, 16, 18])
def test_a_resumed_epoch_is_the_same(ahead, taken):
    whole = [*sampler_of(2, ahead=ahead), *islice(_second_epoch(sampler_of(2)), 4)]
    stopped = sampler_of(2, ahead=ahead)
    running = iter(stopped)
    assert list(islice(running, taken)) == whole[:taken]
    state = json.loads(json.dumps(stopped.state_dict()))
    running.close()
    resumed = sampler_of(2, ahead=ahead)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(resumed.epoch)  # as loops do; it keeps the place
    rest = list(resumed)
    if taken < 18:
        assert rest == whole[taken:18] and resumed.epoch == 1
    assert list(islice(resumed, 4)) == (whole[18:] if taken < 18 else list(islice(_third_epoch(), 4)))


def _second_epoch(sampler):
    sampler.set_epoch(1)
    return iter(sampler)


def _third_epoch():
    sampler = sampler_of(2)
    sampler.set_epoch(2)
    return iter(sampler)


def test_a_loop_that_was_left_begins_the_epoch_again():
    sampler = sampler_of()
    first = list(islice(sampler, 5))
    assert list(islice(sampler, 5)) == first
    sampler.load_state_dict(sampler.state_at(0, 2))
    assert list(islice(sampler, 2)) != first[:2]  # a loaded state holds once
    assert list(islice(sampler, 5)) == first


def test_state_between_steps_goes_to_any_world_size_and_plan():
    samplers = all_ranks(4)
    for sampler in samplers:
        list(islice(sampler, 2 * 3))
    states = [sampler.state_dict() for sampler in samplers]
    assert states == [samplers[0].state_at(0, 2)] * 4
    resumed = all_ranks(2, micro_batches=5, mode="pack")
    for sampler in resumed:
        sampler.load_state_dict(states[0])
    rest = sorted(index for sampler in resumed for indices in sampler for index in indices)
    assert rest == sorted(index for step in range(2, 6) for index in samplers[0].documents(0, step))


def test_state_within_a_step_needs_the_same_rank_and_plans():
    sampler = sampler_of(1)
    list(islice(sampler, 4))
    state = sampler.state_dict()
    assert (state["step"], state["micro_batch"]) == (1, 1)
    for other in (sampler_of(2), sampler_of(1, 2), sampler_of(1, mode="pack")):
        with pytest.raises(UserError, match="middle of a step, by rank 1 of 4, and rank . of . or its plan"):
            other.load_state_dict(state)


def test_state_of_other_batches_is_refused():
    state = sampler_of().state_at(0, 5)
    for other in (
        sampler_of(batching=Batching(sequences=21)),
        sampler_of(batching=Batching(sequences=20, seed=1)),
        sampler_of(batching=Batching(sequences=20, delay_steps=1)),
        sampler_of(lengths=[*LENGTHS[:-1], 1]),
        sampler_of(lengths=LENGTHS[:30]),
    ):
        with pytest.raises(UserError, match="other global batches: their documents, lengths, sequences, tok"):
            other.load_state_dict(state)


def test_shared_micro_batches_come_with_their_group():
    samplers = all_ranks(
        mode="dynamic_cp", lengths=[*LENGTHS, 900], batching=Batching(sequences=102), micro_batches=None
    )
    keys = [[key for (key,) in sampler] for sampler in samplers]
    assert all(isinstance(key, SharedBatch) for own in keys for key in own)
    assert {key.plan_hash for own in keys for key in own} == {samplers[0].plan_hash(0, 0)}
    holders = Counter(index for own in keys for key in own for index in key.micro_batch.sequences)
    for rank, own in enumerate(keys):
        for key in own:
            assert rank in key.micro_batch.group.ranks
            for index in key.micro_batch.sequences:
                assert holders[index] == key.micro_batch.group.scheme.ranks
    assert holders.keys() == set(range(102)) and holders[101] == 4


@pytest.mark.parametrize(("ahead", "waited_s"), [(0, 6.0), (2, 1.0)])
def test_plans_made_ahead_are_not_waited_for(monkeypatch, ahead, waited_s):
    clock, begin, done = VirtualClock(), threading.Semaphore(1), threading.Semaphore(0)

    def timed(*lengths, **settings):
        begin.acquire()
        clock.sleep(1.0)
        done.release()
        return plan(*lengths, **settings)

    monkeypatch.setattr("hardy.balance.sampler.plan", timed)
    sampler = sampler_of(clock=clock, ahead=ahead)
    running = iter(sampler)
    for step in range(6):
        if step:
            begin.release()
        if ahead and step:
            assert done.acquire(timeout=10)  # the last step had time for this plan
        list(islice(running, 3))
        if ahead and not step:
            assert done.acquire(timeout=10)
    assert sampler.waited_s == waited_s and clock.now() == 6.0


def test_a_batch_that_does_not_fit_says_which_and_what_to_do():
    sampler = sampler_of(micro_batches=1)
    with pytest.raises(
        UserError, match=r"step 2 of epoch 0, 20 documents of 1,306 .* planning.micro_batches=1 on 4"
    ):
        list(sampler)


def test_what_cannot_be_is_refused_at_once():
    with pytest.raises(UserError, match="rank must be from 0 to world_size - 1 = 3, got 4"):
        sampler_of(4)
    with pytest.raises(UserError, match="document 1 has 301 tokens, and planning.cost holds at most 300"):
        sampler_of(lengths=[1, 301], batching=Batching(sequences=1))
    sampler_of(lengths=[1, 1200], batching=Batching(sequences=1), mode="dynamic_cp")
    with pytest.raises(UserError, match="document 1 has 1,201 tokens, and planning.cost holds at most 1,200"):
        sampler_of(lengths=[1, 1201], batching=Batching(sequences=1), mode="dynamic_cp")
    with pytest.raises(UserError, match="planning.micro_batches must be at least 1, got 0"):
        sampler_of(micro_batches=0)
    with pytest.raises(UserError, match="planning.ahead must be at least 0, got -1"):
        sampler_of(ahead=-1)
    with pytest.raises(TypeError, match="known before planning only with micro_batches"):
        len(sampler_of(micro_batches=None))


def test_a_loader_of_torch_takes_it_with_and_without_processes():
    data = pytest.importorskip("torch.utils.data")
    dataset = [{"index": index} for index in range(101)]
    expected = [sorted(indices) for indices in sampler_of(1)]
    for num_workers in (0, 1):
        loader = data.DataLoader(
            dataset,
            batch_sampler=sampler_of(1),
            num_workers=num_workers,
            collate_fn=lambda own: sorted(example["index"] for example in own),
        )
        assert list(loader) == expected and len(loader) == 18


def test_groups_without_costs_are_refused():
    alone = COST.only([Scheme()])
    for mode, size in (("dispatch", 2), ("dynamic_cp", 1)):
        planning = Planning(cost=alone, mode=mode)
        BalancedBatchSampler(
            [4] * 8, batching=Batching(sequences=4), planning=planning, world_size=size, rank=0
        )
    planning = Planning(cost=alone, mode="dynamic_cp")
    with pytest.raises(
        UserError, match="planning.cost has costs of context-parallel degree 1 only, and 2 ranks"
    ):
        BalancedBatchSampler([4] * 8, batching=Batching(sequences=4), planning=planning, world_size=2, rank=0)
