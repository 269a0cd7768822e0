"""What every low-memory optimizer promises about its state: exact, complete, plain, back from anywhere."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hardy.optim.state_bytes import state_bytes
from hardy.train.state import load_state, state_of

DTYPES = {"step": torch.float32, "proj_key": torch.int64, "sign": torch.uint8, "rest": torch.bfloat16}
"""Of state that is not in the compute dtype."""


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stopped(low_memory, taken):
    """Return a model after some steps, and its optimizer."""
    net = low_memory.net()
    optimizer = low_memory.make(net)
    low_memory.train(net, optimizer, range(taken))
    return net, optimizer


@pytest.mark.parametrize("taken", [2, 3], ids=["within an epoch", "at a new projection"])
def test_stop_save_load_go_on_gives_the_same_bits(low_memory, taken):
    net, optimizer = stopped(low_memory, taken)
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    again = low_memory.net()
    resumed = low_memory.make(again)
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert equal(low_memory.train(again, resumed, range(taken, 8)), low_memory.trained(range(8)))


def test_loading_replaces_what_was_there(low_memory):
    net, optimizer = stopped(low_memory, 3)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    low_memory.train(net, optimizer, range(3, 5))
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert equal(low_memory.train(net, optimizer, range(3, 8)), low_memory.trained(range(8)))


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("taken", [0, 3], ids=["before the first step", "later"])
def test_torchs_distributed_checkpoint(low_memory, flatten, taken):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, optimizer = stopped(low_memory, taken)
    net.zero_grad()
    saved = through_a_file(get_optimizer_state_dict(net, optimizer, options=options))
    # Saving before the first step must not have changed the run that goes on.
    assert equal(low_memory.train(net, optimizer, range(taken, 6)), low_memory.trained(range(6)))
    again, _ = stopped(low_memory, taken)
    resumed = low_memory.make(again)
    again.zero_grad()
    set_optimizer_state_dict(again, resumed, saved, options=options)
    assert equal(low_memory.train(again, resumed, range(taken, 6)), low_memory.trained(range(6)))


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_torchs_distributed_checkpoint_with_frozen_and_tied_parameters(low_memory, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    ends = []
    for stops in (False, True):
        net = low_memory.net()
        net.tied = net.wide
        net.experts.requires_grad_(False)
        optimizer = low_memory.make(net)
        low_memory.train(net, optimizer, range(2))
        if stops:
            net.zero_grad()
            saved = through_a_file(get_optimizer_state_dict(net, optimizer, options=options))
            optimizer = low_memory.make(net)
            set_optimizer_state_dict(net, optimizer, saved, options=options)
        ends.append(low_memory.train(net, optimizer, range(2, 4)))
    assert equal(*ends)


def test_hardys_own_checkpoint(low_memory):
    net, optimizer = stopped(low_memory, 3)
    state = state_of(net, optimizer)
    tensors = {key: value.detach().clone() for key, value in state.tensors.items()}
    again = low_memory.net()
    resumed = low_memory.make(again)

    def fill(targets):
        for key, target in targets.items():
            assert target.dtype == tensors[key].dtype
            target.detach().copy_(tensors[key])

    load_state(again, resumed, saved=tensors, plain=copy.deepcopy(state.plain), fill=fill)
    assert equal(low_memory.train(again, resumed, range(3, 6)), low_memory.trained(range(6)))


def test_state_keeps_its_dtype_and_is_tensors_alone(low_memory):
    net, optimizer = stopped(low_memory, 2)
    resumed = low_memory.make(net)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    wide = torch.float64 if low_memory.dtype == torch.float64 else torch.float32
    assert len(resumed.state) == len(list(net.parameters()))
    for param, entries in resumed.state.items():
        assert all(
            isinstance(value, torch.Tensor) and value.device == param.device for value in entries.values()
        )
        assert {key: value.dtype for key, value in entries.items()} == {
            key: DTYPES.get(key, wide) for key in entries
        }


def test_loaded_state_shares_no_memory_with_what_it_came_from(low_memory):
    net, optimizer = stopped(low_memory, 2)
    saved = optimizer.state_dict()
    resumed = low_memory.make(net)
    resumed.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    low_memory.train(net, resumed, range(2, 4))
    assert all(
        torch.equal(saved["state"][number][key], value)
        for number, entries in before.items()
        for key, value in entries.items()
    )


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_a_copy_goes_on_alone(low_memory, way):
    both = stopped(low_memory, 3)
    net, optimizer = copy.deepcopy(both) if way == "copy" else pickle.loads(pickle.dumps(both))
    assert equal(low_memory.train(net, optimizer, range(3, 6)), low_memory.trained(range(6)))
    assert equal(low_memory.train(*both, range(3, 6)), low_memory.trained(range(6)))


def test_class_and_state_can_be_pickled(low_memory):
    _, optimizer = stopped(low_memory, 1)
    assert pickle.loads(pickle.dumps(type(optimizer))) is low_memory.cls
    saved = optimizer.state_dict()
    back = pickle.loads(pickle.dumps(saved))
    assert back["param_groups"] == saved["param_groups"]


def test_state_takes_the_bytes_of_the_formula(low_memory):
    _, optimizer = stopped(low_memory, 1)
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            held = sum(value.nbytes for value in optimizer.state[param].values())
            settings = dict(group)
            if param.dtype != torch.bfloat16:
                settings["bf16_update"] = "nearest"
            formula = state_bytes(
                group["kind"], tuple(param.shape), settings=settings, weight_bytes=param.element_size()
            )
            assert held == formula, (name, {key: tuple(v.shape) for key, v in optimizer.state[param].items()})
