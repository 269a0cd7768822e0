"""Small packs and plans, shared by the tests of balanced training."""

import pytest
import torch

from hardy.balance.plan import Group, MicroBatch, Plan, Scheme
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch
from hardy.rng import generator_for

VOCABULARY = 23


@pytest.fixture(scope="session")
def document():
    """Return the tokens of document `index`, `length` of them, always the same."""

    def make(index, length):
        return torch.randint(VOCABULARY, (length,), generator=generator_for(3, "document", index))

    return make


@pytest.fixture(scope="session")
def pack_of(document):
    """Return what packs documents by index, given the lengths of all."""

    def of(lengths):
        def pack(indices):
            tokens = [document(index, lengths[index]) for index in indices]
            ends = torch.tensor([IGNORED_LABEL])
            labels_T = torch.cat([torch.cat((tokens_T[1:], ends)) for tokens_T in tokens])
            return PackedBatch(
                tokens_T=torch.cat(tokens),
                labels_T=labels_T,
                layout=DocumentLayout.from_lengths([lengths[index] for index in indices]),
                num_targets=int((labels_T != IGNORED_LABEL).sum()),
            )

        return pack

    return of


@pytest.fixture(scope="session")
def make_plan():
    """Return a plan from slots of (ranks of each group, sequences of its micro-batch)."""

    def make(slots, lengths, *, world_size, objective="lock_step", share="context"):
        def batch(degree, first, sequences):
            group = Group(first_rank=first, scheme=Scheme(**{share: degree}))
            tokens = sum(lengths[index] for index in sequences)
            return MicroBatch(group=group, sequences=tuple(sequences), tokens=tokens, cost=float(tokens))

        built = []
        for slot in slots:
            firsts = [sum(degree for degree, _ in slot[:place]) for place in range(len(slot))]
            built.append(
                tuple(
                    batch(degree, first, taken) for first, (degree, taken) in zip(firsts, slot, strict=True)
                )
            )
        return Plan(slots=tuple(built), world_size=world_size, objective=objective, cost=1.0, lower_bound=1.0)

    return make
