"""The Trainer of transformers with our optimizers, on a model of a few thousand weights."""

from types import SimpleNamespace

import pytest
import torch

from hardy.config import ConfigError, UserError
from hardy.integrations.hf import Factory, decayed_names, trainer_optimizer
from hardy.optim.make import make_optimizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate (extra dev)")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENS = torch.randint(40, (16, 8), generator=torch.Generator().manual_seed(0))


def make_model():
    torch.random.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def make_trainer(folder, *, optimizer=None, steps=4, **changes):
    """Return a Trainer; `optimizer` makes what `optimizer_cls_and_kwargs` gets from its arguments."""
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **changes,
    )
    return transformers.Trainer(
        model=make_model(),
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        optimizer_cls_and_kwargs=optimizer(args) if optimizer else None,
    )


def value_of(trainer, key):
    """Return a setting of the Trainer's optimizer by parameter."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    return {names[p]: group.get(key) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("preset", ["apollo-mini", "smmf", "muon", "sgd", "torch.optim.RMSprop"])
def test_rates_and_decay_are_those_of_the_trainers_own_adamw(preset, tmp_path):
    own = make_trainer(tmp_path)
    ours = make_trainer(tmp_path, optimizer=lambda args: trainer_optimizer(preset, args))
    for key in ("lr", "weight_decay"):
        assert value_of(ours, key) == value_of(own, key)
    decays = value_of(ours, "weight_decay")
    assert (decays["model.embed_tokens.weight"], decays["model.norm.weight"]) == (0.1, 0.0)


def test_betas_and_eps_are_the_trainers_for_all_groups(tmp_path):
    trainer = make_trainer(
        tmp_path, optimizer=lambda args: trainer_optimizer("apollo", args, embed_kind="smmf", rank=4)
    )
    betas, eps, beta1 = (value_of(trainer, key) for key in ("betas", "eps", "beta1"))
    kinds = value_of(trainer, "kind")
    assert {kind: betas[name] for name, kind in kinds.items()} == {
        "apollo": (0.9, 0.95),
        "adamw": (0.9, 0.95),
        "smmf": None,
    }
    assert set(eps.values()) == {1e-7}
    assert {beta1[name] for name, kind in kinds.items() if kind == "smmf"} == {0.9}


def test_what_is_said_beside_comes_first(tmp_path):
    trainer = make_trainer(
        tmp_path,
        optimizer=lambda args: trainer_optimizer("apollo", args, lr=0.5, betas=(0.5, 0.5), decayed=()),
    )
    assert set(value_of(trainer, "lr").values()) == {0.5}
    assert set(value_of(trainer, "betas").values()) == {(0.5, 0.5)}
    assert set(value_of(trainer, "weight_decay").values()) == {0.0}


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("preset", ["apollo", "muon"])
def test_the_trainer_trains_as_a_loop_of_ones_own(preset, tmp_path):
    trainer = make_trainer(tmp_path, optimizer=lambda args: trainer_optimizer(preset, args))
    batches = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, named: batches.append(named.copy()), with_kwargs=True
    )
    trainer.train()
    assert len(batches) == 4
    model = make_model()
    settings = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-7}
    optimizer = make_optimizer(model, preset, decayed=decayed_names(model), **settings)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 1, 4)
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("preset", ["apollo", "smmf", "muon"])
def test_a_resumed_run_is_the_same_run(preset, tmp_path):
    def build(folder):
        return make_trainer(folder, optimizer=lambda args: trainer_optimizer(preset, args))

    whole = build(tmp_path)
    whole.train()
    again = build(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_factory_without_the_trainers_arguments_is_refused():
    with pytest.raises(
        ConfigError, match=r"does not know the Trainer's learning rate.*trainer_optimizer\(preset, args"
    ):
        Factory()(make_model(), preset="apollo")


def test_an_older_trainer_is_told_the_way_out():
    with pytest.raises(UserError, match=r"before 5.2; install a later one, or write Trainer\(optimizers="):
        Factory([{"params": []}], preset="apollo")


def test_axolotl_hands_the_arguments_over_itself():
    args = SimpleNamespace(
        learning_rate=0.2, weight_decay=0.0, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6
    )
    optimizer = Factory()(make_model(), args, preset="adamw")
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(0.2, (0.8, 0.9), 1e-6)}
