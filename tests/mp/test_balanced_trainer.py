"""The Trainer of transformers on several ranks, by plans: parameters are those of documents one by one."""

import os
from dataclasses import replace

import pytest
import torch

from hardy.config import UserError
from hardy.integrations.balanced import BalancedTrainerMixin, TrainerBalance, trainer_sampler

pytestmark = pytest.mark.mp
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
accelerate = pytest.importorskip("accelerate", reason="the Trainer needs accelerate (extra dev)")

RATE, STEPS = 0.5, 3
GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = [*torch.randint(2, 40, (23,), generator=GENERATOR).tolist(), 120]
DOCUMENTS = [torch.randint(40, (length,), generator=GENERATOR) for length in LENGTHS]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,  # so that attention looks at some tokens more than at others
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ALONE = TrainerBalance(batch_sequences=8, cap_tokens=120)
SHARED = TrainerBalance(batch_sequences=8, cap_tokens=70, mode="dynamic_cp", split_tokens=2)


class BalancedTrainer(BalancedTrainerMixin, transformers.Trainer):
    pass


def make_model():
    torch.random.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def make_trainer(folder, *, balance, **changes):
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        optim="sgd",  # Adam makes large steps of gradients that are nothing but rounding
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **changes,
    )
    dataset = [{"input_ids": tokens.tolist()} for tokens in DOCUMENTS]
    return BalancedTrainer(make_model(), args, train_dataset=dataset, balance=balance)


def be_launched(comm):
    """Say what torchrun says; and forget what accelerate learnt in the process that was forked."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    values = (comm.rank, comm.rank, comm.size, comm.size, 1)
    os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def one_by_one(batches):
    """Train in one process, one document at a time, on global batches given by indices."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for batch in batches:
        targets = sum(len(DOCUMENTS[index]) - 1 for index in batch)
        losses.append(0.0)
        for index in batch:
            row = DOCUMENTS[index][None]
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum") / targets
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}, losses


def run_trainer(comm, folder, balance, **changes):
    """Train; return what the test compares."""
    be_launched(comm)
    trainer = make_trainer(folder / str(comm.rank), balance=balance, **changes)
    sampler = trainer_sampler(trainer, balance)
    trainer.train()
    plans = [sampler.plan(0, step) for step in range(STEPS)]
    return {
        "batches": [sampler.documents(0, step) for step in range(STEPS)],
        "groups": sorted({group.scheme.ranks for plan in plans for group in plan.groups}),
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "parameters": {name: value.detach() for name, value in trainer.model.named_parameters()},
    }


def check(results):
    expected, losses = one_by_one(results[0]["batches"])
    for result in results:
        assert result["batches"] == results[0]["batches"]
        far = max((value - expected[name]).abs().max().item() for name, value in result["parameters"].items())
        assert far <= 1e-6
    assert results[0]["losses"] == pytest.approx(losses, abs=1e-5)


def refuse_other_documents(comm, folder):
    """Start ranks that believe in other lengths."""
    be_launched(comm)
    balance = replace(ALONE, lengths=[*LENGTHS[:-1], LENGTHS[-1] - comm.rank])
    with pytest.raises(UserError, match="have another plan for this step than the other"):
        make_trainer(folder / str(comm.rank), balance=balance).train()


@pytest.mark.slow
def test_two_ranks_alone_and_as_a_group_with_recomputation(run_workers, tmp_path):
    def body(comm):
        refuse_other_documents(comm, tmp_path)
        alone = run_trainer(comm, tmp_path, ALONE)
        return alone, run_trainer(comm, tmp_path, SHARED, activation_checkpointing=True)

    alone, shared = zip(*run_workers(body, size=2), strict=True)
    assert (alone[0]["groups"], shared[0]["groups"]) == ([1], [1, 2])
    check(alone)
    check(shared)


@pytest.mark.slow
def test_four_ranks_in_groups(run_workers, tmp_path):
    results = run_workers(lambda comm: run_trainer(comm, tmp_path, SHARED), size=4)
    assert results[0]["groups"] == [1, 4]
    check(results)
