"""An unmodified Llama of transformers, its long documents shared by ranks: gradients equal to rounding."""

from types import SimpleNamespace

import pytest
import torch

from hardy.balance.batching import Batching
from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.plan import Scheme
from hardy.balance.sampler import BalancedBatchSampler, Planning
from hardy.config import UserError
from hardy.data.collate import PackingCollator
from hardy.distributed.balance.agreement import PlanMismatchError
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.integrations.balanced_sharing import KeyedDocuments, SharedRows, only_one, use_shared_attention

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = [150, 70, 3, 9, 30, 1, 12, 22, 40]
DOCUMENTS = [torch.randint(40, (length,), generator=GENERATOR) for length in LENGTHS]
DATASET = [{"input_ids": tokens} for tokens in DOCUMENTS]
TARGETS = sum(LENGTHS) - len(LENGTHS)
COST = LengthCostModel(
    schemes=tuple(
        SchemeCost(scheme=Scheme(context=g), a=dear / g, b=9 * dear / g, c=1, cap_tokens=80 * g)
        for g, dear in ((1, 1), (2, 2), (4, 3))  # so that small groups have a point
    )
)
ROUNDING = 1e-6
"""As a share of the largest: their norms, positions and loss compute in fp32 whatever the model's dtype."""


def make_model(*, shared=True, **changes):
    torch.random.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        initializer_range=0.3,  # so that attention looks at some tokens more than at others
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    model = transformers.LlamaForCausalLM(config).double()
    if shared:
        use_shared_attention(model)
    return model


def sampler_of(comm, objective="lock_step", cap_tokens=48):
    return BalancedBatchSampler(
        LENGTHS,
        batching=Batching(sequences=len(LENGTHS)),
        planning=Planning(
            cost=COST.with_cap(cap_tokens),
            mode="dynamic_cp",
            objective=objective,
            micro_batches=4,
            ahead=0,
        ),
        world_size=comm.size,
        rank=comm.rank,
    )


def gradients_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def one_by_one():
    model = make_model(shared=False)
    for tokens in DOCUMENTS:
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum") / TARGETS).backward()
    return gradients_of(model)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("objective", "cap_tokens", "expected_slots"),
    [("lock_step", 48, [[4], [2, 1, 1], [1] * 4, [1] * 4]), ("free_running", 80, [[2, 2]] * 4)],
)
def test_gradients_are_those_of_documents_one_by_one(objective, cap_tokens, expected_slots, recompute):
    def body(comm):
        model = make_model()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        rows = SharedRows(comm, model.config, split_tokens=1)
        documents, sampler = (
            KeyedDocuments(DATASET, PackingCollator()),
            sampler_of(comm, objective, cap_tokens),
        )
        loader = torch.utils.data.DataLoader(documents, batch_sampler=sampler, collate_fn=only_one)
        for row in rows.of_step(iter(loader), 4, device="cpu"):
            model(**row, use_cache=False, num_items_in_batch=TARGETS).loss.backward()
        slots = [[batch.group.scheme.ranks for batch in slot] for slot in sampler.plan(0, 0).slots]
        return comm.sum(gradients_of(model)), slots

    expected = one_by_one()
    for got, slots in SimWorld(4).run(body):
        assert slots == expected_slots  # with empty micro-batches among them
        assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_ranks_with_other_plans_stop_before_a_group_is_used():
    def body(comm):
        documents, sampler = KeyedDocuments(DATASET, PackingCollator()), sampler_of(comm)
        wholes = [documents[key] for (key,) in sampler]
        if comm.rank == 1:
            wholes = [(key._replace(plan_hash=5), pack) for key, pack in wholes]
        config = SimpleNamespace(num_attention_heads=4)
        with pytest.raises(PlanMismatchError, match=r"workers \[1\] have another plan"):
            SharedRows(comm, config, split_tokens=1).of_step(iter(wholes), 4, device="cpu")

    SimWorld(4).run(body)


def test_the_probe_cuts_every_document_over_all_ranks():
    def body(comm):
        rows = SharedRows(comm, SimpleNamespace(num_attention_heads=4), split_tokens=128)
        pack = PackingCollator(output="packed")([{"input_ids": [1] * 6}, {"input_ids": [2] * 12}])
        return rows.shard_over_all(pack).tokens_T.tolist()

    assert SimWorld(3).run(body) == [[1, 2, 2, 1, 2, 2]] * 3


def test_a_row_has_its_labels_shifted_before_it_is_cut():
    batch = PackingCollator(output="packed")([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    row = SharedRows(Alone(), SimpleNamespace(num_attention_heads=4), split_tokens=1).row(batch)
    assert row["labels"].tolist() == row["shift_labels"].tolist() == [[6, 7, -100, 9, -100]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]] and row["hardy_layout"].lengths == (3, 2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_are_evaluated_as_by_sdpa(side):
    tokens = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    ours, theirs = (
        model(input_ids=tokens, attention_mask=mask).logits
        for model in (make_model(), make_model(shared=False))
    )
    assert (ours - theirs)[mask.bool()].abs().max() <= 1e-14
    alone = make_model()(input_ids=tokens[1:, mask[1].bool()]).logits[0]
    assert (ours[1, mask[1].bool()] - alone).abs().max() <= ROUNDING * alone.abs().max()


def test_rows_with_borders_are_kept_apart_without_a_layout():
    model = make_model()
    row = PackingCollator()([{"input_ids": DOCUMENTS[2]}, {"input_ids": DOCUMENTS[3]}])
    del row["labels"]
    logits = model(**row, use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=DOCUMENTS[i][None]).logits[0] for i in (2, 3)])
    assert (logits - alone).abs().max() <= 1e-12


def test_generation_goes_on_as_before():
    prompt = DOCUMENTS[3][None]
    ours, theirs = (
        model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for model in (make_model(), make_model(shared=False))
    )
    assert torch.equal(ours, theirs) and ours.shape == (1, 14)


def test_dropout_in_attention_is_refused():
    model = make_model(attention_dropout=0.1).train()
    rows = SharedRows(Alone(), model.config, split_tokens=1)
    batch = PackingCollator(output="packed")([{"input_ids": [5, 6, 7]}])
    with pytest.raises(UserError, match="wants attention dropout 0.1"):
        model(**rows.row(batch), use_cache=False)


def test_a_model_that_keeps_its_own_attention_is_refused():
    class Own:
        config = SimpleNamespace(_attn_implementation="own")

        def set_attn_implementation(self, name):
            """Ignore it."""

    with pytest.raises(UserError, match=r"Own keeps its own attention \(own\).*balance.mode to dispatch"):
        use_shared_attention(Own())
