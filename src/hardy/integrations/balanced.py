"""The Trainer of transformers, and those made from it, on global batches that a plan spreads over the ranks.

    class BalancedTrainer(BalancedTrainerMixin, Trainer): ...
    balance = TrainerBalance(batch_sequences=64, cap_tokens=8192)
    BalancedTrainer(model, args, train_dataset=dataset, balance=balance).train()

Paper: Hydraulis (arXiv 2412.07894). Documents are packed whole, without padding; the Trainer divides by the
labels of all micro-batches of all ranks, so the gradient is that of the same documents one by one, whatever
the plan. Tried with transformers 5.23 and accelerate 1.15. Imports no transformers: it works on the Trainer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hardy.balance.batching import Batching
from hardy.balance.cost import DecoderSizes, LengthCostModel, analytic_cost
from hardy.balance.lengths import fit_lengths
from hardy.balance.planner import Mode
from hardy.balance.sampler import BalancedBatchSampler, Planning
from hardy.config import UserError
from hardy.data.collate import PackingCollator, flattened
from hardy.distributed.balance.agreement import check_same_plan
from hardy.distributed.balance.probe import LeakError, check_isolation
from hardy.distributed.comm import Alone, Communicator, TorchComm
from hardy.integrations.balanced_sharing import KeyedDocuments, SharedRows, only_one, use_shared_attention
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch


@dataclass(frozen=True, kw_only=True)
class TrainerBalance:
    """How a Trainer's global batches are made and spread.

    What the Trainer has a setting for is taken from it: `gradient_accumulation_steps` micro-batches a step,
    `data_seed` or `seed`, `dataloader_drop_last`.
    """

    batch_sequences: int
    """Documents of a global batch, over all ranks; `per_device_train_batch_size` has no part in it."""
    cap_tokens: int
    """Most tokens of a micro-batch on one rank."""
    mode: Mode = "dispatch"
    """pack: as tokens fit; dispatch: by cost; dynamic_cp: besides, groups of ranks share long documents."""
    cost: LengthCostModel | None = None
    """What documents cost (`hardy balance profile`); none counts operations from the model's config."""
    lengths: Sequence[int] | None = None
    """Tokens of each document; none reads every example once."""
    long_documents: Literal["error", "truncate"] = "error"
    """What becomes of a document longer than fits on a rank, or for dynamic_cp on all ranks together."""
    split_tokens: int = 128
    """Of dynamic_cp: documents shorter than 2 G times this stay whole in a group of G."""
    delay_steps: int = 0
    """Most steps by which a document may come later or sooner than drawn, so that steps take about as long. 0
    leaves batches as drawn; more changes which documents meet in a batch, and drops none."""
    ahead: int = 2
    """Steps planned ahead in the background."""
    probe: bool = True
    """Whether to try on the model, before training, that documents of one row do not see each other."""


class BalancedTrainerMixin:
    """Put before a Trainer class: `class BalancedTrainer(BalancedTrainerMixin, Trainer)`.

    Args:
        balance: how batches are made and spread.
        arguments: the Trainer's.

    Raises:
        UserError: when training starts: a setting under which the gradient would not be exact, documents that
            do not fit, ranks with other plans, or a model whose documents see each other (`LeakError`).
    """

    def __init__(self, *arguments: Any, balance: TrainerBalance, **settings: Any) -> None:
        self.balance = balance
        self.shared_rows: SharedRows | None = None
        super().__init__(*arguments, **settings)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank's micro-batches; `accelerator.prepare` would deal them out again."""
        trainer: Any = self
        balance, args, dataset = self.balance, trainer.args, trainer.train_dataset
        check_trainer(trainer)
        comm: Communicator = _OnDevice(args.device) if args.world_size > 1 else Alone()
        sampler = trainer_sampler(trainer, balance)
        check_same_plan(comm, sampler.hash())
        pack = PackingCollator(document_tokens=_most_tokens(trainer, balance), long_documents="truncate")
        collate: Callable[[Any], Any] = pack
        if balance.mode == "dynamic_cp":
            use_shared_attention(trainer.model)
            self.shared_rows = SharedRows(comm, trainer.model.config, split_tokens=balance.split_tokens)
            dataset, collate = KeyedDocuments(dataset, pack), only_one
        if balance.probe:
            _probe(trainer.model, comm, self.shared_rows, device=args.device)
        return EpochLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Return a step's micro-batches and their labels over all ranks, as the Trainer does."""
        if self.shared_rows is not None:
            epoch_iterator = self.shared_rows.of_step(epoch_iterator, num_batches, device=device)
        trainer: Any = super()
        return trainer.get_batch_samples(epoch_iterator, num_batches, device)


class EpochLoader(DataLoader[Any]):
    """A loader that tells its sampler the epoch, as the Trainer asks of loaders."""

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


def trainer_sampler(trainer: Any, balance: TrainerBalance) -> BalancedBatchSampler:
    """Return the sampler of a Trainer's rank.

    Raises:
        UserError: a document fits nowhere, or the model's config does not say its sizes.
    """
    args, most = trainer.args, _most_tokens(trainer, balance)
    lengths = balance.lengths
    if lengths is None:
        lengths = [len(trainer.train_dataset[i]["input_ids"]) for i in range(len(trainer.train_dataset))]
    if len(lengths) != len(trainer.train_dataset):
        raise UserError(
            f"balance.lengths has {len(lengths)} lengths for {len(trainer.train_dataset)} documents of the "
            f"data set; give one for each, or none at all"
        )
    cost = balance.cost or analytic_cost(
        sizes_of(trainer.model.config), cap_tokens=balance.cap_tokens, recompute=_recomputes(args)
    )
    return BalancedBatchSampler(
        fit_lengths(lengths, most_tokens=most, overlong=balance.long_documents).lengths,
        batching=Batching(
            sequences=balance.batch_sequences,
            last="drop" if args.dataloader_drop_last else "keep",
            seed=args.seed if args.data_seed is None else args.data_seed,
            delay_steps=balance.delay_steps,
        ),
        planning=Planning(
            cost=cost.with_cap(balance.cap_tokens),
            mode=balance.mode,
            objective="lock_step" if _meets_in_every_micro_batch(trainer) else "free_running",
            micro_batches=args.gradient_accumulation_steps,
            ahead=balance.ahead,
        ),
        world_size=args.world_size,
        rank=args.process_index,
    )


def sizes_of(config: Any) -> DecoderSizes:
    """Return the sizes of a model of transformers, of which costs are counted.

    Raises:
        UserError: its config does not name them as Llama's does.
    """
    try:
        heads = config.num_attention_heads
        return DecoderSizes(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
        )
    except AttributeError as error:
        raise UserError(
            f"the costs of {type(config).__name__} cannot be counted ({error}); give balance.cost, "
            f"measured by `hardy balance profile` or made by hardy.balance.cost.analytic_cost"
        ) from None


def check_trainer(trainer: Any) -> None:
    """Refuse settings of the Trainer under which plans would change the gradient.

    Raises:
        UserError: names the setting and the way out.
    """
    args = trainer.args
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise UserError(
            "average_tokens_across_devices=False divides each rank's loss by its own labels, and ranks have "
            "different numbers of them; leave it at True"
        )
    if not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        raise UserError(
            f"{type(trainer.model).__name__} takes no num_items_in_batch, so its loss would be a mean of "
            f"means; give the Trainer a compute_loss_func that divides by it"
        )
    if args.label_smoothing_factor:
        raise UserError(
            f"label_smoothing_factor={args.label_smoothing_factor} is not tried with plans; set it to 0, or "
            f"smooth in a compute_loss_func that divides by num_items_in_batch"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"one process drives {args.n_gpu} GPUs, and plans are for one rank each; start the script by "
            f"torchrun or accelerate launch"
        )
    for axis in ("tp", "cp", "sp"):
        size = getattr(trainer, f"get_{axis}_size", lambda: 1)()
        if size > 1:
            raise UserError(
                f"accelerate's {axis}_size is {size}, and plans deal documents to every rank; leave it at 1 "
                f"(balance.mode=dynamic_cp shares long documents)"
            )
    if not (hasattr(trainer.train_dataset, "__len__") and hasattr(trainer.train_dataset, "__getitem__")):
        raise UserError(
            f"{type(trainer.train_dataset).__name__} has no length or no index, and a plan asks for any "
            f"document; give a data set with both"
        )
    columns = set(getattr(trainer.train_dataset, "column_names", ()))
    masks = sorted(columns & {"completion_mask", "assistant_masks"})
    if masks and "labels" not in columns:
        raise UserError(
            f"the data set has {', '.join(masks)} and no labels, and only labels are looked at; add a column "
            f"labels with -100 where nothing is to be predicted"
        )


def _most_tokens(trainer: Any, balance: TrainerBalance) -> int:
    """Return the longest document that fits."""
    ranks = 1
    if balance.mode == "dynamic_cp":  # groups of powers of two
        while 2 * ranks <= trainer.args.world_size:
            ranks *= 2
    return balance.cap_tokens * ranks


def _recomputes(args: Any) -> bool:
    """Return whether blocks are computed again; transformers 5 renamed the setting."""
    return any(getattr(args, f"{word}_checkpointing", False) for word in ("activation", "gradient"))


def _meets_in_every_micro_batch(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


class _OnDevice(TorchComm):
    """All ranks; tensors of the host go by way of the device, as NCCL alone moves no others."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the ranks."""
        return super().sum(x.to(self._device)).to(x.device)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order."""
        return super().all_gather(x.to(self._device)).to(x.device)


class _Logits(nn.Module):
    """A model of transformers as the probe calls models."""

    def __init__(self, model: Any, shared_rows: SharedRows | None) -> None:
        super().__init__()
        self.model, self.shared_rows = model, shared_rows

    def forward(self, tokens_T: Tensor, layout: DocumentLayout) -> Tensor:
        """Return the logits (T, V) of a row as training gives it."""
        labels_T = torch.full_like(tokens_T, IGNORED_LABEL)
        batch = PackedBatch(tokens_T=tokens_T, labels_T=labels_T, layout=layout, num_targets=0)
        row = flattened(batch) if self.shared_rows is None else self.shared_rows.row(batch)
        labels = ("labels", "shift_labels")
        return self.model(**{name: value for name, value in row.items() if name not in labels}).logits[0]


def _probe(model: Any, comm: Communicator, shared_rows: SharedRows | None, *, device: torch.device) -> None:
    """Refuse a model whose documents see each other."""
    was_training = model.training
    model.eval()
    try:
        check_isolation(
            _Logits(model, shared_rows),
            comm,
            vocab_size=int(model.get_input_embeddings().weight.shape[0]),
            shard=(lambda pack: pack) if shared_rows is None else shared_rows.shard_over_all,
            device=device,
        )
    except LeakError as error:
        used = getattr(model.config, "_attn_implementation", None)  # no public name for it
        raise LeakError(
            f"{type(model).__name__} with attn_implementation={used!r} and use_cache="
            f"{getattr(model.config, 'use_cache', None)}: {error}. In transformers sdpa and flash attention "
            f"keep documents of a row apart where use_cache=False; balance.probe=False trains without asking"
        ) from None
    finally:
        model.train(was_training)
