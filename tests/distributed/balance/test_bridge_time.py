"""The bridge in the choice of replicas: its bytes are those that are sent."""

from dataclasses import replace

import pytest
import torch

from hardy.balance.cost import DecoderSizes
from hardy.balance.plan import Group, Scheme
from hardy.config import UserError
from hardy.distributed.balance.bridge import Cut, bridge_bytes
from hardy.distributed.balance.bridge_time import BridgeTime, bridged_decoder
from hardy.distributed.balance.masters import MasterWeights
from hardy.distributed.balance.tensor_parallel import decoder_splits
from hardy.distributed.simulation import SimWorld
from hardy.model.decoder import Decoder
from hardy.model.presets import DecoderShape
from hardy.ops.attention import packed_attention

SIZES = DecoderSizes(3, 16, 24, 4, 2, 4, 50)
SHAPE = DecoderShape(
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    vocab_size=50,
    context_tokens=64,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied=False,
)
ONE, TWO = Scheme(), Scheme(tensor=2)
STRATEGIES = [(TWO, ONE, ONE), (TWO, TWO), (ONE,) * 4, (TWO, ONE)]


def time_of(world_size, **settings):
    return BridgeTime(model=bridged_decoder(SIZES, **settings), world_size=world_size, bytes_per_unit=100.0)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, "own"), (torch.bfloat16, "tied")])
def test_the_bytes_are_those_that_the_bridge_sends(strategy, dtype, head):
    """Weights out and gradients back through real messages of the simulated world."""
    bridge = time_of(4, element_bytes=dtype.itemsize, head=head)
    made = replicas_of_strategy(strategy)

    def body(comm):
        model = Decoder(replace(SHAPE, tied=head == "tied"), attention=packed_attention)
        masters = MasterWeights(model, comm, decoder_splits(SHAPE), compute_dtype=dtype)
        masters.fill(made)
        masters.give_back(made)
        return masters.bytes_of(made)

    world = SimWorld(4)
    counted = world.run(body)[0]
    sent = bridge.bytes_of(strategy)
    assert (sent.weights, sent.gradients) == (counted.weights, counted.gradients)
    both = [a + b for a, b in zip(sent.weights, sent.gradients, strict=True)]
    assert [report.bytes_sent for report in world.report()] == both and max(both) > 0
    assert bridge(strategy) == (max(sent.weights) + max(sent.gradients)) / 100.0


def replicas_of_strategy(strategy):
    first, groups = 0, []
    for scheme in strategy:
        groups.append(Group(first_rank=first, scheme=scheme))
        first += scheme.ranks
    return tuple(groups)


def test_one_replica_of_all_ranks_moves_only_what_it_does_not_share():
    shared, whole = (time_of(4, vocabulary=how).bytes_of((Scheme(tensor=4),)) for how in ("shared", "whole"))
    norms = 7 * 16 * 2 * 3 // 4  # of 7 norms in bf16 each rank owns a quarter, and sends it to three
    assert shared.weights == (norms,) * 4 and shared.gradients == (0,) * 4
    rows = [13, 12, 13, 12]
    assert sorted(whole.weights) == sorted(norms + 2 * row * 16 * 2 * 3 for row in rows)


def test_ranks_of_a_stage_hold_its_layers_only():
    """3 layers on 2 stages: one and two; the embedding before, norm and head after."""
    model = bridged_decoder(SIZES)
    whole, first, last = model.stage(0, stages=1), model.stage(0, stages=2), model.stage(1, stages=2)
    count = [sum(cut.size * row for cut, row in held) for held in (whole, first, last)]
    assert count[0] == count[1] + count[2]
    a_layer = sum(cut.size * row for cut, row in model.layer)
    assert count[1] == a_layer + 50 * 32 and count[2] == 2 * a_layer + (16 * 2 + 50 * 32)
    stages = time_of(4).bytes_of((Scheme(tensor=2, pipeline=2),))
    pair = replicas_of_strategy((TWO,))
    other = tuple(replace(group, first_rank=2) for group in pair)
    parts = [bridge_bytes(held, ranks, 4) for held, ranks in ((first, pair), (last, other))]
    assert stages.weights == tuple(map(sum, zip(*(part.weights for part in parts), strict=True)))
    assert stages.gradients == tuple(map(sum, zip(*(part.gradients for part in parts), strict=True)))


def test_ranks_that_share_by_context_hold_the_same():
    assert time_of(4).bytes_of((Scheme(context=4),)) == time_of(4).bytes_of((ONE,) * 4)
    assert time_of(4).bytes_of((Scheme(tensor=2, context=2),)) == time_of(4).bytes_of((TWO, TWO))


def test_more_and_smaller_replicas_move_more():
    times = [time_of(8)((Scheme(tensor=8 // count),) * count) for count in (1, 2, 4, 8)]
    assert times == sorted(times) and times[0] < times[-1]


def test_more_ranks_than_there_are():
    with pytest.raises(UserError, match="strategy 3x tp2 has 6 ranks, more than the 4 there are"):
        time_of(4)((TWO,) * 3)


def test_equal_cuts_are_one():
    held = dict(bridged_decoder(SIZES).stage(0, stages=1))
    assert held[Cut(size=16, shared=False)] == 7 * 2  # two norms a layer, and the last
    assert held[Cut(size=16, shared=True)] == 3 * 2 * 16 * 2  # queries and outputs
