"""The shell: groups and names, what it refuses, state that comes and goes, batches of parameters."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hardy.optim import _shell
from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini


def weights(*shapes, dtype=torch.float32):
    """Return named parameters."""
    generator = torch.Generator().manual_seed(0)
    return [
        (f"layers.{i}.weight", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        for i, shape in enumerate(shapes)
    ]


def train(optimizer, named, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for _, param in named:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return [param.detach().clone() for _, param in named]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_group_of_another_kind_has_that_kinds_defaults_and_the_shared_settings():
    named = weights((4, 4), (4,))
    groups = [{"params": named[:1]}, {"params": named[1:], "kind": "adamw", "lr": 0.5}]
    optimizer = APOLLO(groups, lr=0.25, rank=2, seed=7, betas=(0.5, 0.6))
    ours, other = optimizer.param_groups
    assert (ours["kind"], ours["rank"], ours["betas"], ours["lr"]) == ("apollo", 2, (0.5, 0.6), 0.25)
    assert (other["kind"], other["eps"], other["betas"], other["lr"]) == ("adamw", 1e-8, (0.9, 0.999), 0.5)
    assert other["seed"] == 7 and "rank" not in other
    assert groups[0].keys() == {"params"}  # the caller's groups stay as they were
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["layers.0.weight"],
        ["layers.1.weight"],
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: APOLLO(p, rnak=4), r"no setting of APOLLO 'rnak'; did you mean 'rank'"),
        (
            lambda p: APOLLO([{"params": p, "kind": "smff"}]),
            "no kind of parameter group 'smff'; did you mean 'smmf'",
        ),
        (lambda p: APOLLO([{"params": p, "beta1": 0.5}]), "no setting of a 'apollo' group 'beta1'"),
        (lambda p: SMMF(p, lr=-1.0), "lr of a 'smmf' group must be at least 0, got -1.0"),
        (lambda p: SMMF(p, lr="1e-3"), "lr of a 'smmf' group must be a number or a 0-d tensor, got '1e-3'"),
        (lambda p: SMMF(p, pack="x"), "pack of a 'smmf' group must be True or False, got 'x'"),
        (lambda p: SMMF(p, growth_rate=None), "growth_rate of a 'smmf' group must be a number, got None"),
        (lambda p: APOLLO(p, seed=1.5), "seed of a 'apollo' group must be a whole number, got 1.5"),
        (lambda p: APOLLO(p, update_proj_gap=1.5), "update_proj_gap .* must be a whole number, got 1.5"),
        (lambda p: APOLLO(p, rank=True), "rank of a 'apollo' group must be a whole number, got True"),
        (
            lambda p: APOLLO(p, scale="atuo"),
            "scale of a 'apollo' group must be a number, or 'auto', got 'atuo'",
        ),
        (lambda p: AdaptiveAdamW(p, betas=0.9), "betas of a 'adamw' group must be two numbers, got 0.9"),
        (lambda p: SMMF(p, lr=torch.ones(2)), "lr of a 'smmf' group must be a number or a 0-d tensor"),
        (lambda p: AdaptiveAdamW(p, weight_decay=-0.1), "weight_decay of a 'adamw' group must be at least 0"),
        (
            lambda p: AdaptiveAdamW(p, bf16_update="up"),
            "bf16_update .* 'stochastic', 'kahan' or 'nearest', got 'up'",
        ),
        (lambda p: AdaptiveAdamW(p, nonfinite="stop"), "nonfinite .* 'propagate' or 'skip', got 'stop'"),
        (lambda p: APOLLO([]), "empty parameter list"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make(weights((4, 4)))


def flattened(param):
    return type("FlatParameter", (nn.Parameter,), {})(param.detach())


def partitioned(param):
    param.ds_id = 3
    return param


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda p: nn.Parameter(p.detach().cfloat()),
            "parameter layers.0.weight is complex; view it as real",
        ),
        (lambda p: p.detach().int(), "parameter layers.0.weight is torch.int32; only floating-point"),
        (flattened, "parameter layers.0.weight was flattened by FSDP1.*use fully_shard"),
        (partitioned, "parameter layers.0.weight is partitioned by DeepSpeed ZeRO-3; use fully_shard"),
        (lambda p: 3.0, "parameter layers.0.weight is a float, not a tensor"),
        (lambda p: p * 1, "non-leaf"),
    ],
)
def test_parameters_that_no_rule_can_update_are_refused(change, words):
    [(name, param)] = weights((4, 4))
    with pytest.raises((ValueError, TypeError), match=words):
        SMMF([(name, change(param))])


def test_parameters_are_given_once():
    named = weights((4, 4), (4, 4))
    twice = "parameter tied.weight is given twice, or its name is"
    with pytest.raises(ValueError, match=twice):
        SMMF([*named, ("tied.weight", named[0][1])])
    with pytest.raises(ValueError, match=twice):
        SMMF([{"params": named}, {"params": [("tied.weight", named[1][1])]}])
    with pytest.raises(ValueError, match=r"under its name in the whole model"):
        SMMF([{"params": named}, {"params": weights((3, 3))}])
    with pytest.raises(TypeError, match="came as a set, whose order changes from run to run; pass a list"):
        SMMF([{"params": {param for _, param in named}}])


def test_a_sparse_gradient_is_refused_by_name():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SMMF(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        ValueError, match="gradient of weight is sparse; build the embedding with sparse=False"
    ):
        optimizer.step()


def test_names_come_from_the_model_the_group_or_the_order(caplog):
    (_, first), (_, second) = named = weights((4, 4), (4, 4))
    assert APOLLO(named, rank=4).param_groups[0]["param_names"] == ["layers.0.weight", "layers.1.weight"]
    given = APOLLO([{"params": [first, second], "param_names": ["a", "b"]}], rank=4)
    assert given.param_groups[0]["param_names"] == ["a", "b"]
    assert not [record for record in caplog.records if "without names" in record.message]
    with caplog.at_level(logging.WARNING):
        ordered = APOLLO([{"params": first}, {"params": [second]}], rank=4)
    assert [group["param_names"] for group in ordered.param_groups] == [["param.0"], ["param.1"]]
    assert "random projections follow their order" in caplog.text


def test_wrappers_in_a_name_change_no_bit():
    bare, wrapped = weights((6, 4)), weights((6, 4))
    wrapped = [("module._orig_mod.layers.0.weight", wrapped[0][1])]
    runs = [train(APOLLO(n, rank=2, bf16_update="nearest"), n, range(3)) for n in (bare, wrapped)]
    assert equal(*runs)
    renamed = [("other", weights((6, 4))[0][1])]
    assert not equal(train(APOLLO(renamed, rank=2), renamed, range(3)), runs[0])


def test_a_saved_key_outlives_a_new_name_and_a_new_seed():
    whole = train(APOLLO(whole_named := weights((6, 4)), rank=2), whole_named, range(6))
    named = weights((6, 4))
    optimizer = APOLLO(named, rank=2)
    train(optimizer, named, range(3))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["param_names"]
    resumed = APOLLO([("renamed", named[0][1])], rank=2, seed=5)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["param_names"] == ["renamed"]
    assert equal(train(resumed, named, range(3, 6)), whole)
    # A copy, which has no key in hand, finds it in the state.
    named, optimizer = copy.deepcopy((named, resumed))
    assert optimizer.state[named[0][1]]["proj_key"] == saved["state"][0]["proj_key"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_key_of_64_bits_is_loaded_whatever_the_weights_are(dtype):
    """Torch would cast it to the dtype of the weight, in which it is infinite or another number."""
    named = weights((6, 4), dtype=dtype)
    optimizer = APOLLO(named, rank=2)
    train(optimizer, named, range(1))
    key = optimizer.state[named[0][1]]["proj_key"].clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(optimizer.state[named[0][1]]["proj_key"], key)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 3}, r"state 'exp_avg' of layers.0.weight was saved with shape \(6, 2\) and is \(6, 3\)"),
        ({"proj": "svd"}, "saved state of layers.0.weight lacks 'basis'; it was saved with other settings"),
    ],
)
def test_state_of_other_settings_is_refused_and_nothing_changes(settings, words):
    named = weights((6, 4))
    optimizer = APOLLO(named, rank=2)
    train(optimizer, named, range(2))
    other = APOLLO(named, **{"rank": 2, **settings})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(optimizer.state_dict())
    assert other.state_dict() == before


def test_state_with_more_or_of_another_kind_is_refused():
    named = weights((6, 4))
    optimizer = SMMF(named)
    train(optimizer, named, range(1))
    saved = optimizer.state_dict()
    with pytest.raises(
        ValueError, match="has 'row_m', which a 'smmf' group with these settings does not keep"
    ):
        SMMF(named, beta1=None).load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"groups of .* \[\('smmf', 1\)\], the optimizer has \[\('adamw', 1\)\]"
    ):
        AdaptiveAdamW(named).load_state_dict(saved)
    with pytest.raises(ValueError, match="build it as for the saved run"):
        SMMF([*named, *weights((2, 2), (3, 3))[1:]]).load_state_dict(saved)
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match="lacks 'step'"):
        SMMF(named).load_state_dict(saved)


def test_a_group_added_after_the_last_step_starts_anew_after_a_load():
    named = weights((6, 4), (4, 6))
    optimizer = SMMF(named[:1])
    train(optimizer, named[:1], range(2))
    optimizer.add_param_group({"params": named[1:]})
    saved = copy.deepcopy(optimizer.state_dict())
    other = SMMF(weights((6, 4)))
    other.add_param_group({"params": weights((4, 6), (4, 6))[1:]})
    other.load_state_dict(saved)
    assert [int(state["step"]) for state in other.state.values()] == [2, 0]


def test_state_is_made_on_demand_and_once():
    named = weights((4, 4), (5, 3))
    optimizer = SMMF(named)
    assert not optimizer.state
    assert optimizer.materialize_state()
    assert not optimizer.materialize_state()
    assert len(optimizer.state) == 2
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(3)))]})
    assert optimizer.materialize_state()
    assert len(optimizer.state) == 3


def test_a_group_added_later_joins_in():
    named = weights((6, 4), (4, 6))
    optimizer = APOLLO(named[:1], rank=2)
    train(optimizer, named[:1], range(2))
    optimizer.add_param_group({"params": named[1:]})
    before = named[1][1].detach().clone()
    train(optimizer, named, range(2, 4))
    assert [group["calls"] for group in optimizer.param_groups] == [4, 2]
    assert not torch.equal(named[1][1], before)


@pytest.mark.parametrize("limit_bytes", [1, 150])
@pytest.mark.parametrize("cls", [APOLLO, SMMF, APOLLOMini])
def test_parameters_beyond_the_temporary_memory_wait_for_the_next_batch(monkeypatch, cls, limit_bytes):
    shapes = [(6, 4), (6, 4), (4, 6), (6, 4), (2, 6, 4)]
    whole = train(cls(named := weights(*shapes)), named, range(4))
    monkeypatch.setattr(_shell, "TEMPORARY_BYTES", limit_bytes)
    batches = []
    monkeypatch.setattr(
        cls,
        "_run",
        lambda self, bundles, **kw: (
            batches.append(len(bundles)),
            _shell.RuleOptimizer._run(self, bundles, **kw),
        ),
    )
    assert equal(train(cls(named := weights(*shapes)), named, range(4)), whole)
    assert len(batches) >= (5 * 4 if limit_bytes == 1 else 2 * 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda named: AdaptiveAdamW(named),
        lambda named: SMMF(named),
        lambda named: SMMF(named, vector_reshape=False),
        lambda named: APOLLO([{"params": named[:1]}, {"params": named[1:], "kind": "adamw"}], rank=2),
    ],
    ids=["adamw", "smmf", "smmf, dense", "apollo"],
)
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
def test_a_sharded_parameter_without_gradient_is_left_alone(mesh_of_one, make, lr):
    """It is bundled all the same, so that no worker waits for another; counters must not move."""
    named = [
        (name, nn.Parameter(distribute_tensor(param.detach(), mesh_of_one, [Shard(0)])))
        for name, param in weights((6, 4), (5,))
    ]
    optimizer = make(named)
    for group in optimizer.param_groups:
        group["lr"] = lr

    def take_step(present):
        for i, (_, param) in enumerate(named):
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(i))
            param.grad = distribute_tensor(grad, mesh_of_one, [Shard(0)]) if present else None
        optimizer.step()
        return [
            (name, key, getattr(value, "full_tensor", value.clone)().clone())
            for name, param in named
            for key, value in {**optimizer.state[param], "weight": param.detach()}.items()
        ]

    before, after = take_step(True), take_step(False)
    for (name, key, old), (_, _, new) in zip(before, after, strict=True):
        assert torch.equal(old, new), (name, key)
    assert not torch.equal(take_step(True)[-1][2], after[-1][2])


def test_a_plain_checkpoint_goes_into_sharded_parameters(mesh_of_one):
    named = weights((6, 4), (4, 6))
    optimizer = APOLLO(named, rank=2)
    train(optimizer, named, range(3))
    cut = [(n, nn.Parameter(distribute_tensor(p.detach(), mesh_of_one, [Shard(0)]))) for n, p in named]
    resumed = APOLLO(cut, rank=2)
    resumed.load_state_dict(optimizer.state_dict())
    for (_, old), (_, new) in zip(named, cut, strict=True):
        for key, value in optimizer.state[old].items():
            ours = resumed.state[new][key]
            assert isinstance(ours, DTensor) == key.startswith("exp_avg")
            assert torch.equal(getattr(ours, "full_tensor", lambda x=ours: x)(), value)


def test_a_released_optimizer_refuses_what_comes_too_late():
    model = nn.Linear(4, 4, bias=False)
    optimizer = SMMF(model.named_parameters())
    optimizer.enable_release(model)
    for late in ({"grad_scale": torch.tensor(2.0)}, {"found_inf": torch.tensor(0.0)}):
        with pytest.raises(ValueError, match="gradients are gone before step.*disable_release"):
            optimizer.step(**late)
    singular = APOLLO(model.named_parameters(), rank=2, proj="svd")
    with pytest.raises(
        ValueError, match="proj='svd' needs more memory than release saves; use proj='normal'"
    ):
        singular.enable_release(model)
