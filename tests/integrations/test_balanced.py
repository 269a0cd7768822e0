"""The Trainer of transformers on planned batches trains as one process does, one document at a time."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.plan import Scheme
from hardy.config import UserError
from hardy.distributed.balance.probe import LeakError
from hardy.integrations.balanced import (
    BalancedTrainerMixin,
    TrainerBalance,
    check_trainer,
    sizes_of,
    trainer_sampler,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate (extra dev)")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,  # so that attention looks at some tokens more than at others
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = torch.randint(2, 40, (26,), generator=GENERATOR).tolist()
DOCUMENTS = [torch.randint(40, (length,), generator=GENERATOR) for length in LENGTHS]
DATASET = [{"input_ids": tokens.tolist(), "name": "a column that no model takes"} for tokens in DOCUMENTS]
RATE = 0.5
BALANCE = TrainerBalance(batch_sequences=8, cap_tokens=90)


class BalancedTrainer(BalancedTrainerMixin, transformers.Trainer):
    pass


def make_model(**changes):
    torch.random.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))


def make_trainer(folder, *, balance=BALANCE, dataset=DATASET, model=None, **changes):
    settings = {
        "max_steps": 4,
        "gradient_accumulation_steps": 3,
        "optim": "sgd",  # Adam makes large steps of gradients that are nothing but rounding
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **settings | changes)
    return BalancedTrainer(model or make_model(), args, train_dataset=dataset, balance=balance)


def one_by_one(batches, *, model=None):
    """Train in one process, one document at a time, on global batches given by indices."""
    model = model or make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch in batches:
        targets = sum(len(DOCUMENTS[index]) - 1 for index in batch)
        for index in batch:
            row = DOCUMENTS[index][None]
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
            (torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum") / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def global_batches(sampler, count):
    steps = [(epoch, step) for epoch in range(count) for step in range(sampler.num_steps(epoch))]
    return [sampler.documents(epoch, step) for epoch, step in steps[:count]]


def furthest(model, expected):
    return max((value - expected[name]).abs().max().item() for name, value in model.named_parameters())


def test_parameters_are_those_of_documents_one_by_one(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6)  # four steps an epoch, the last of two documents
    sampler = trainer_sampler(trainer, BALANCE)
    trainer.train()
    batches = global_batches(sampler, 6)
    assert [len(batch) for batch in batches] == [8, 8, 8, 2, 8, 8]
    assert any(not batch.sequences for batch in sampler.micro_batches(0, 3))  # an empty micro-batch ran
    expected = one_by_one(batches)
    assert furthest(trainer.model, expected) <= 1e-6
    assert furthest(trainer.model, one_by_one([*batches[:5], batches[0]])) > 1e-4


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(("steps_done", "delay_steps"), [(2, 2), (4, 0)])
def test_a_resumed_run_is_the_same_run(tmp_path, steps_done, delay_steps):
    balance = replace(BALANCE, delay_steps=delay_steps)
    whole = make_trainer(tmp_path, balance=balance, max_steps=6)
    whole.train()
    again = make_trainer(tmp_path, balance=balance, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps_done}"))
    assert losses(again)[steps_done:] == losses(whole)[steps_done:]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_long_documents_are_refused_or_truncated(tmp_path):
    with pytest.raises(UserError, match=r"longer than 20 tokens, the first is .* choose overlong truncate"):
        make_trainer(tmp_path, balance=replace(BALANCE, cap_tokens=20)).train()
    short = replace(BALANCE, cap_tokens=20, batch_sequences=4, long_documents="truncate")
    trainer = make_trainer(tmp_path, balance=short, max_steps=1)
    rows = [row for _, row in zip(range(3), trainer.get_train_dataloader(), strict=False)]
    assert max(row["input_ids"].numel() for row in rows) <= 20
    first = trainer_sampler(trainer, short).documents(0, 0)
    assert sum(row["labels"].ne(-100).sum() for row in rows) == sum(min(LENGTHS[i], 20) - 1 for i in first)


def test_settings_of_the_trainer_are_taken(tmp_path):
    def sampler(**changes):
        return trainer_sampler(make_trainer(tmp_path, **changes), BALANCE)

    plain = sampler()
    assert plain.planning.micro_batches == 3 and plain.planning.objective == "free_running"
    assert plain.num_steps(0) == 4 and sampler(dataloader_drop_last=True).num_steps(0) == 3
    assert plain.documents(0, 0) == sampler(seed=42).documents(0, 0) == sampler(data_seed=42).documents(0, 0)
    assert plain.documents(0, 0) != sampler(seed=7).documents(0, 0) == sampler(data_seed=7).documents(0, 0)
    own = LengthCostModel(schemes=(SchemeCost(scheme=Scheme(), a=1, b=0, c=0, cap_tokens=999),))
    with_own = trainer_sampler(make_trainer(tmp_path), replace(BALANCE, cost=own))
    assert with_own.planning.cost == own.with_cap(90)
    with_lengths = trainer_sampler(make_trainer(tmp_path), replace(BALANCE, lengths=LENGTHS))
    assert with_lengths.plan_hash(0, 0) == plain.plan_hash(0, 0)


def test_levelled_steps_take_about_as_long_on_any_number_of_ranks(tmp_path):
    def works(delay_steps, *, world_size=1):
        trainer = make_trainer(tmp_path)
        trainer.args = SimpleNamespace(
            **{name: getattr(trainer.args, name) for name in ("seed", "data_seed", "dataloader_drop_last")},
            **{"gradient_accumulation_steps": 3, "world_size": world_size, "process_index": 0},
        )
        sampler = trainer_sampler(trainer, replace(BALANCE, delay_steps=delay_steps))
        times = sampler.planning.cost.times(LENGTHS)
        batches = [sampler.documents(1, step) for step in range(4)]
        return batches, torch.tensor([times[batch].sum() for batch in batches[:3]]).std()

    drawn, levelled = works(0), works(2)
    assert sorted(sum(drawn[0], [])) == sorted(sum(levelled[0], [])) == list(range(26))
    assert drawn[0][3] == levelled[0][3] and levelled[1] < 0.2 * drawn[1]
    assert works(2, world_size=3)[0] == levelled[0]


def test_costs_are_counted_with_recomputation(tmp_path):
    costs = [
        trainer_sampler(make_trainer(tmp_path, activation_checkpointing=again), BALANCE).planning.cost
        for again in (False, True)
    ]
    assert costs[0].of(Scheme()).a < costs[1].of(Scheme()).a


def test_worker_processes_load_the_same_batches(tmp_path):
    loaders = [
        make_trainer(
            tmp_path, balance=replace(BALANCE, delay_steps=2), dataloader_num_workers=count
        ).get_train_dataloader()
        for count in (0, 1)
    ]
    rows = [[row["input_ids"].tolist() for row in loader] for loader in loaders]
    assert rows[0] == rows[1] and len(rows[0]) == len(loaders[0]) == 12


@pytest.mark.filterwarnings("ignore:.*use_cache:UserWarning")
def test_a_model_whose_documents_leak_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.config.use_cache = True  # then sdpa takes the row for one document
    with pytest.raises(
        LeakError, match="LlamaForCausalLM with attn_implementation='sdpa' and use_cache=True"
    ):
        trainer.train()
    assert trainer.model.training or not trainer.state.global_step
    trainer.balance = replace(BALANCE, probe=False)
    trainer.get_train_dataloader()


def test_the_probe_leaves_the_model_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(attention_dropout=0.5))
    for mode in (True, False):
        trainer.model.train(mode)
        trainer.get_train_dataloader()  # with dropout a document would not come out alike twice
        assert trainer.model.training == mode


def masked(*columns):
    class Columns(list):
        column_names = columns

    return Columns()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"average_tokens_across_devices": False, "world_size": 2},
            "average_tokens_across_devices=False .*True",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not tried"),
        ({"n_gpu": 2}, "drives 2 GPUs.*start the script by torchrun"),
        ({"dataset": iter([])}, "no length or no index"),
        ({"dataset": masked("input_ids", "completion_mask")}, "completion_mask and no labels.*with -100"),
        ({"takes": False}, "takes no num_items_in_batch.*compute_loss_func"),
        ({"cp": 2}, "accelerate's cp_size is 2.*leave it at 1"),
    ],
)
def test_settings_that_would_change_the_gradient_are_refused(changes, text):
    def stand_in(
        *,
        average_tokens_across_devices=True,
        world_size=1,
        label_smoothing_factor=0.0,
        n_gpu=1,
        dataset=(),
        takes=True,
        cp=1,
    ):
        args = SimpleNamespace(
            average_tokens_across_devices=average_tokens_across_devices,
            world_size=world_size,
            label_smoothing_factor=label_smoothing_factor,
            n_gpu=n_gpu,
        )
        return SimpleNamespace(
            args=args,
            model=None,
            model_accepts_loss_kwargs=takes,
            compute_loss_func=None,
            train_dataset=dataset,
            get_cp_size=lambda: cp,
        )

    check_trainer(stand_in(dataset=masked("input_ids", "completion_mask", "labels")))
    with pytest.raises(UserError, match=text):
        check_trainer(stand_in(**changes))


def test_other_mistakes_are_refused(tmp_path):
    with pytest.raises(UserError, match="balance.lengths has 2 lengths for 26 documents"):
        make_trainer(tmp_path, balance=replace(BALANCE, lengths=[1, 2])).get_train_dataloader()
    with pytest.raises(UserError, match="costs of GPT2Config cannot be counted .*give balance.cost"):
        sizes_of(transformers.GPT2Config())


def test_sizes_are_those_of_the_config():
    sizes = sizes_of(make_model().config)
    assert sizes == (2, 16, 24, 2, 1, 8, 40, 3)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # their default
def test_the_example_of_the_page_trains(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "howto" / "balance.md").read_text(encoding="utf-8")
    example = page.split("```py\n")[1].split("```")[0]
    assert len(example.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names = {"__name__": "page", "model": model, "dataset": DATASET}
    with monkeypatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        exec(compile(example, "balance.md", "exec"), names)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
