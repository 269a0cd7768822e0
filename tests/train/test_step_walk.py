"""The walk through a step against all live storages of real steps.

`LiveStorages` sees every tensor that an operation returns, counts the bytes of its storage once, and takes
them back when the storage dies. What a kernel allocates inside is not seen.
"""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hardy.distributed.comm import Alone
from hardy.distributed.strategy import Synchronous
from hardy.model.decoder import Decoder
from hardy.model.init import initialise
from hardy.model.presets import PRESETS, count_parameters
from hardy.ops import updates_native
from hardy.ops.attention import packed_attention
from hardy.ops.packed import DocumentLayout, PackedBatch
from hardy.optim.build import build_optimizer
from hardy.optim.config import AdamWConfig, SGDConfig
from hardy.optim.int8 import quantize_model
from hardy.optim.make import make_optimizer
from hardy.optim.optimizers import QAPOLLO
from hardy.optim.presets import preset
from hardy.optim.routing import route_params
from hardy.train import step_walk
from hardy.train.memory import predict
from hardy.train.parameter_memory import Choice
from hardy.train.step import AutocastSetting, Worker, train_step
from hardy.train.step_memory import CUDA_WORKSPACE, KINDS, Sizes, StepPlan

EXACT = 2e-3
"""What 0-d tensors, masks and the order of a few calls come to in models this small."""
SHAPE = replace(
    PRESETS["1m"],
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    tied=False,
)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the CPU back end, where there is a compiler, before the first test."""
    updates_native.available()


class LiveStorages(TorchDispatchMode):
    """Bytes of all storages that were made while entered and are still alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.watch(value.untyped_storage())
        return result

    def watch(self, storage):
        key, size = id(storage), storage.nbytes()
        if not size or key in self.storages:
            return

        def gone(_, key=key, size=size):
            self.now -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def packs_of(lengths, count, *, rows):
    tokens_T = torch.arange(sum(lengths)) % rows
    return [
        PackedBatch(
            tokens_T=tokens_T.clone(),
            labels_T=tokens_T.clone(),
            layout=DocumentLayout.from_lengths(lengths),
            num_targets=sum(lengths),
        )
        for _ in range(count)
    ]


def by_preset(model, choice):
    return make_optimizer(model, choice.optimizer, lr=1e-3, **choice.settings)


def measured(shape, lengths, choice, *, micro_batches=1, recompute="nothing", make=by_preset):
    """Return the most bytes alive in the second step, and the bytes of optimizer state."""
    live = LiveStorages()
    with live:
        attention = partial(packed_attention, backend="auto")
        model = Decoder(shape, attention=attention, recompute=recompute)
        initialise(model, seed=0)
        if choice.weights_in == "bf16_pure":
            model.to(torch.bfloat16)
        if choice.int8:
            quantize_model(model)
        optimizer = make(model, choice)
        if choice.releases:
            optimizer.enable_release(model)
        worker = Worker(
            model=model,
            optimizer=optimizer,
            strategy=Synchronous(model, Alone()),
            comm=Alone(),
            device=torch.device("cpu"),
            autocast=AutocastSetting(enabled=choice.precision == "bf16"),
            clip_norm=None if choice.releases else 1.0,
        )
        packs = packs_of(lengths, micro_batches, rows=shape.vocab_size)
        for _ in range(2):
            gc.collect()
            live.most = live.now
            train_step(worker, packs, num_targets=sum(lengths) * micro_batches, lr=1e-3, wants_stop=False)
    state = [x for values in optimizer.state.values() for x in values.values() if torch.is_tensor(x)]
    return live.most, sum(x.numel() * x.element_size() for x in state)


def compare(shape, lengths, choice, *, within=EXACT, make=by_preset, **more):
    most, state = measured(shape, lengths, choice, make=make, **more)
    predicted = predict(shape, choice, tokens=sum(lengths), equal_documents=len(set(lengths)) == 1, **more)
    assert predicted.held.state == state
    # Without a compiler the optimizers work in buffers of 1.5 MiB, much beside models this small.
    slack = 0 if updates_native.available() else 2 << 20
    assert abs(predicted.peak_bytes - most) <= within * most + slack, predicted.peak_at
    return predicted


CASES = {
    "wide": ({"hidden_size": 256, "intermediate_size": 512, "head_size": 64}, [48]),
    "many tokens": ({}, [768]),
    "grouped keys": ({"num_heads": 8, "num_kv_heads": 1}, [256]),
    "heads wider than the stream": ({"head_size": 48}, [256]),
    "large vocabulary in chunks": ({"vocab_size": 8192}, [512]),
    "large vocabulary, tied": ({"vocab_size": 8192, "tied": True}, [64]),
    "deep": ({"num_layers": 7}, [160]),
    "one block": ({"num_layers": 1}, [160]),
    "documents of one length": ({}, [96] * 4),
    "long runs of documents": ({}, [300, 200, 400]),
}
WAYS = [
    (precision, recompute)
    for precision in ("fp32", "bf16", "bf16_pure")
    for recompute in ("nothing", "blocks")
]
"""Each case is tried in three of the six."""


@pytest.mark.parametrize(
    ("name", "precision", "recompute"),
    [(name, *WAYS[i % 6]) for i, name in enumerate(CASES)],
)
def test_sizes(name, precision, recompute):
    changes, lengths = CASES[name]
    choice = Choice(optimizer="adamw", precision=precision, device="cpu")
    compare(replace(SHAPE, **changes), lengths, choice, recompute=recompute)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches(micro_batches, precision):
    choice = Choice(optimizer="sgd", precision=precision, device="cpu")
    compare(SHAPE, [128], choice, micro_batches=micro_batches)
    compare(SHAPE, [8], choice, micro_batches=micro_batches, recompute="blocks")


@pytest.mark.parametrize("config", [AdamWConfig(), SGDConfig(), SGDConfig(weight_decay=0.1)], ids=repr)
def test_the_optimizers_of_a_run(config):
    """`hardy train` takes torch's AdamW and SGD, whose state is the same."""
    given = {"momentum": 0.9, "weight_decay": config.weight_decay} if config.name == "sgd" else {}
    choice = Choice(optimizer=config.name, settings=given, device="cpu")
    compare(SHAPE, [16], choice, make=lambda model, _: build_optimizer(config, model), within=0.01)


@pytest.mark.parametrize("name", ["adamw", "apollo", "apollo_mini", "smmf", "sgd", "adafactor", "muon"])
def test_optimizers(name):
    """With few tokens the optimizer's own step is the fullest moment for some."""
    shape = replace(SHAPE, hidden_size=256, intermediate_size=512, head_size=64)
    compare(shape, [16], Choice(optimizer=name, device="cpu"), within=0.01)
    compare(shape, [16], Choice(optimizer=name, device="cpu", precision="bf16_pure"), within=0.02)
    compare(SHAPE, [256], Choice(optimizer=name, device="cpu"), within=0.01)


@pytest.mark.parametrize(
    "settings",
    [{"rank": 16, "proj": "svd", "update_proj_gap": 1}, {"bf16_update": "kahan"}],
    ids=["APOLLO-SVD looking for directions", "kahan"],
)
def test_settings(settings):
    shape = replace(SHAPE, hidden_size=256, intermediate_size=512, head_size=64)
    choice = Choice(optimizer="apollo", settings=settings, precision="bf16_pure", device="cpu")
    compare(shape, [16], choice, within=0.05)


@pytest.mark.parametrize("name", ["adamw", "apollo", "apollo_mini", "smmf"])
def test_released_gradients(name):
    shape = replace(SHAPE, hidden_size=256, intermediate_size=512, head_size=64)
    kept = predict(shape, Choice(optimizer=name, device="cpu"), tokens=16, equal_documents=True)
    released = compare(shape, [16], Choice(optimizer=name, device="cpu", release=True), within=0.01)
    assert released.peak_bytes < kept.peak_bytes
    compare(SHAPE, [256], Choice(optimizer=name, device="cpu", release=True), within=0.01)


@pytest.mark.parametrize("release", [True, False])
def test_int8_weights(release):
    def qapollo(model, choice):
        return QAPOLLO(route_params(model, kind="apollo"), **preset(choice.optimizer).settings)

    shape = replace(SHAPE, hidden_size=256, intermediate_size=512, head_size=64)
    choice = Choice(optimizer="qapollo", release=release, device="cpu")
    for recompute in ("nothing", "blocks"):
        compare(shape, [16], choice, make=qapollo, recompute=recompute, within=0.01)
        compare(SHAPE, [256], choice, make=qapollo, recompute=recompute, within=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_documents_of_all_lengths_within_five_percent(precision):
    """Their attention pads up to 31 rows a document, which depends on lengths that a plan does not know."""
    choice = Choice(optimizer="adamw", precision=precision, device="cpu")
    compare(SHAPE, [100, 30, 7, 200, 50, 3], choice, within=0.05)


def plan_of(**given):
    known = {"shape": SHAPE, "tokens": 64, "weight_bytes": 4 * count_parameters(SHAPE), "state_bytes": 0}
    return StepPlan(**{**known, **given})


PLANS = st.builds(
    plan_of,
    shape=st.builds(
        replace,
        st.just(SHAPE),
        num_layers=st.integers(1, 9),
        hidden_size=st.sampled_from([32, 64, 128]),
        num_kv_heads=st.sampled_from([1, 2, 4]),
        tied=st.booleans(),
    ),
    tokens=st.integers(1, 5000),
    micro_batches=st.integers(1, 4),
    precision=st.sampled_from(["fp32", "bf16", "bf16_pure"]),
    recompute=st.booleans(),
    release=st.booleans(),
    shards=st.sampled_from([1, 2, 8]),
    device=st.sampled_from(["cpu", "cuda"]),
)


@settings(max_examples=60)
@given(PLANS)
def test_a_step_ends_as_it_began_but_for_gradients(plan):
    ledger = step_walk.walk_step(plan)
    left = {kind: ledger.held[kind] for kind in KINDS if kind not in ("weights", "gradients")}
    rest = CUDA_WORKSPACE if plan.device == "cuda" else 0
    inputs = 24 * plan.tokens * plan.micro_batches
    assert left == {"copies": 0, "state": 0, "activations": inputs, "loss": 0, "temporaries": rest}
    sizes = Sizes(plan)
    value = sizes.weight_value if plan.shards > 1 else sizes.grad_value
    whole = 0 if plan.release else sizes.elements * value
    assert (
        whole // plan.shards
        <= ledger.held["gradients"]
        <= whole // plan.shards + 8 * plan.shape.num_layers + 8
    )
    assert sum(ledger.peak.values()) == ledger.peak_bytes


@settings(max_examples=40)
@given(PLANS)
def test_walking_all_blocks_changes_nothing(plan):
    short = step_walk.walk_step(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_walk, "ENDS", 100)
        long = step_walk.walk_step(plan)
    assert (short.peak_bytes, short.peak, short.held) == (long.peak_bytes, long.peak, long.held)


@settings(max_examples=40)
@given(PLANS)
def test_what_saves_memory_saves_memory(plan):
    most = step_walk.walk_step(plan).peak_bytes
    assert step_walk.walk_step(replace(plan, tokens=plan.tokens + 64)).peak_bytes > most
    assert step_walk.walk_step(replace(plan, release=True)).peak_bytes <= most
    if plan.shape.num_layers > 2:
        assert step_walk.walk_step(replace(plan, recompute=True)).peak_bytes <= most
