"""Replicas of different tensor-parallel degree on real processes."""

import pytest
import torch

from hardy.balance.plan import Group, MicroBatch, Plan, Scheme
from hardy.distributed.balance.replicas import ReplicaTrainer
from hardy.distributed.balance.tensor_parallel import decoder_splits
from hardy.model.decoder import Decoder
from hardy.model.init import initialise
from hardy.model.presets import DecoderShape
from hardy.ops.attention import packed_attention
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch
from hardy.rng import generator_for

pytestmark = pytest.mark.mp

LENGTHS = (37, 5, 18, 64, 9, 11)
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
# Each slot: (ranks of a replica, its documents).
PLANS = [
    [[(2, (3, 0)), (1, (1, 2)), (1, ())], [(2, ()), (1, (4, 5)), (1, ())]],
    [[(2, (3,)), (1, (0,)), (1, (1, 2, 4, 5))]],
    [[(4, (0, 1, 2, 3, 4, 5))]],
    [[(1, (3,)), (1, (0, 1)), (1, (2,)), (1, (4, 5))]],
]


def make_plan(slots):
    built = []
    for slot in slots:
        firsts = [sum(degree for degree, _ in slot[:place]) for place in range(len(slot))]
        groups = [
            Group(first_rank=first, scheme=Scheme(tensor=degree))
            for first, (degree, _) in zip(firsts, slot, strict=True)
        ]
        built.append(
            tuple(
                MicroBatch(group=group, sequences=taken, tokens=sum(LENGTHS[i] for i in taken), cost=0.0)
                for group, (_, taken) in zip(groups, slot, strict=True)
            )
        )
    return Plan(slots=tuple(built), world_size=4, objective="free_running", cost=1.0, lower_bound=1.0)


def pack_of(indices):
    tokens = [torch.randint(23, (LENGTHS[i],), generator=generator_for(3, "document", i)) for i in indices]
    labels_T = torch.cat([torch.cat((t[1:], torch.tensor([IGNORED_LABEL]))) for t in tokens])
    return PackedBatch(
        tokens_T=torch.cat(tokens),
        labels_T=labels_T,
        layout=DocumentLayout.from_lengths([LENGTHS[i] for i in indices]),
        num_targets=int((labels_T != IGNORED_LABEL).sum()),
    )


def decoder():
    model = Decoder(SHAPE, attention=packed_attention)
    initialise(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8 if parameter.ndim == 2 else 1  # so that attention has gradients to speak of
    return model


def one_process():
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in PLANS:
        optimizer.zero_grad()
        packs = [pack_of([index]) for index in range(len(LENGTHS))]
        num_targets, loss = sum(pack.num_targets for pack in packs), 0.0
        for pack in packs:
            part = model(pack.tokens_T, pack.layout, pack.labels_T) / num_targets
            part.backward()
            loss += part.item()
        losses.append(loss)
        optimizer.step()
    return losses, model.state_dict()


def test_replicas_of_2_1_and_1_ranks_then_others_train_like_one_process(run_workers):
    def body(comm):
        trainer = ReplicaTrainer(decoder(), comm, decoder_splits(SHAPE))
        optimizer = torch.optim.AdamW(trainer.masters.parameters(), lr=1e-3)
        losses = []
        for slots in PLANS:
            losses.append(trainer.step(make_plan(slots), pack_of).loss)
            optimizer.step()
        trainer.gather_whole()
        return losses, trainer.model.state_dict()

    want_losses, want = one_process()
    for losses, weights in run_workers(body, size=4):
        assert losses == pytest.approx(want_losses, rel=1e-6) and losses[0] - losses[-1] > 1e-3
        for name in want:
            torch.testing.assert_close(weights[name], want[name], rtol=0, atol=1e-6)
