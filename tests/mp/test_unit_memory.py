"""What workers that share a model hold, against live storages: FSDP2's units, DDP's buckets, sharded state.

gloo lets its buffers go when it gets to it, so that a step's peak differs by half a unit from run to run.
"""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hardy.distributed.strategy import Synchronous
from hardy.model.decoder import Decoder
from hardy.model.presets import PRESETS
from hardy.ops.attention import packed_attention
from hardy.ops.packed import DocumentLayout, PackedBatch
from hardy.optim.make import make_optimizer
from hardy.train.memory import predict
from hardy.train.parameter_memory import Choice, decoder_weights, held_for
from hardy.train.step import Worker, train_step

pytestmark = pytest.mark.mp

SHAPE = replace(
    PRESETS["1m"],
    vocab_size=1001,
    hidden_size=256,
    intermediate_size=500,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    tied=False,
)


class LiveStorages(TorchDispatchMode):
    """Bytes of all storages seen so far; asked anew at each operation, as FSDP2 resizes them."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter((result, args, kwargs)):
            if type(value) in (torch.Tensor, torch.nn.Parameter):
                storage = value.untyped_storage()
                self.storages[id(storage)] = weakref.ref(storage)
        alive = {key: reference() for key, reference in self.storages.items()}
        self.storages = {key: self.storages[key] for key, storage in alive.items() if storage is not None}
        self.now = sum(storage.nbytes() for storage in alive.values() if storage is not None)
        self.most = max(self.most, self.now)
        return result


def shared(model, *, layout, precision):
    """Return the model as `parallelize` lays it out, which on a CPU has no bf16."""
    if layout == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in model.unit_names():
        fully_shard(model.get_submodule(name), mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def most_bytes(comm, *, layout, precision, tokens, micro_batches):
    """Return the most that a step holds on this worker."""
    live = LiveStorages()
    with live:
        attention = partial(packed_attention, backend="auto")
        model = shared(Decoder(SHAPE, attention=attention), layout=layout, precision=precision)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)
        strategy = Synchronous(model, comm)
        worker = Worker(
            model=model, optimizer=optimizer, strategy=strategy, comm=comm, device=torch.device("cpu")
        )
        tokens_T = torch.arange(tokens) % SHAPE.vocab_size
        packs = [
            PackedBatch(
                tokens_T=tokens_T.clone(),
                labels_T=tokens_T.clone(),
                layout=DocumentLayout.from_lengths([tokens]),
                num_targets=tokens,
            )
            for _ in range(micro_batches)
        ]
        for _ in range(2):
            live.most = 0
            train_step(worker, packs, num_targets=2 * tokens * micro_batches, lr=0.0, wants_stop=False)
    return live.most


CASES = [
    ("fsdp2", "fp32", 16, 1),
    ("fsdp2", "fp32", 300, 2),
    ("fsdp2", "bf16", 100, 3),
    ("ddp", "fp32", 16, 1),
    ("ddp", "fp32", 200, 2),
]


@pytest.mark.slow
def test_the_fullest_moment_of_a_shared_step(run_workers):
    def body(comm):
        return [
            most_bytes(comm, layout=layout, precision=precision, tokens=tokens, micro_batches=count)
            for layout, precision, tokens, count in CASES
        ]

    for (layout, precision, tokens, count), most in zip(CASES, run_workers(body)[0], strict=True):
        mesh = {"replicas": 2} if layout == "ddp" else {"shards": 2}
        choice = Choice(
            optimizer="sgd", settings={"momentum": 0.0}, precision=precision, device="cpu", **mesh
        )
        predicted = predict(SHAPE, choice, tokens=tokens, micro_batches=count, equal_documents=True)
        what = (layout, precision, tokens, count, predicted.peak_at)
        assert predicted.peak_bytes == pytest.approx(most, rel=0.1), what


def test_sharded_state_is_what_the_formula_says_for_the_fullest_worker(run_workers):
    names = ("adamw", "apollo", "apollo_mini", "smmf")

    def body(comm):
        sizes = []
        for name in names:
            model = shared(Decoder(SHAPE, attention=packed_attention), layout="fsdp2", precision="fp32")
            optimizer = make_optimizer(model, name, lr=0.0)
            optimizer.materialize_state()
            values = [value for state in optimizer.state.values() for value in state.values()]
            local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
            sizes.append(sum(value.numel() * value.element_size() for value in local))
        return sizes

    got = run_workers(body, size=3)
    wanted = [held_for(decoder_weights(SHAPE), Choice(optimizer=name, shards=3)).state for name in names]
    assert got[0] == wanted
    assert all(mine <= most for worker in got for mine, most in zip(worker, wanted, strict=True))
