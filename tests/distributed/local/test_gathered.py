"""What is not sharded is left alone, and how a stale part is told; with FSDP2: `tests/mp`."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hardy.config import UserError
from hardy.distributed.comm import Alone
from hardy.distributed.local import gathered
from hardy.distributed.local.gathered import keep_fresh


def test_plain_units_get_no_hook():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert keep_fresh(model, ["0", "1"], inner=Alone(), meets=lambda: True) == []


@pytest.fixture
def one_shard(tmp_path):
    """A model that FSDP2 has spread over one process, this one."""
    where = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    mesh = init_device_mesh("cpu", (1,))
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh)
    yield model
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("meets", "training", "grad", "moved"),
    [
        (True, True, True, True),
        (True, True, True, False),
        (False, True, True, True),
        (True, False, True, True),
        (True, True, False, True),
    ],
)
def test_a_unit_is_gathered_again_in_a_round_and_when_its_shards_have_moved(
    one_shard, meets, training, grad, moved
):
    model, asked = one_shard.train(training), []
    keep_fresh(model, ["1"], inner=Alone(), meets=lambda: asked.append(0) or meets)
    unit, x = model[1], torch.ones(1, 2)
    with torch.set_grad_enabled(grad):
        hidden = model[0](x).detach()
        shard = unit.weight.detach().to_local()
        unit.unshard()
        before = unit(hidden)
        unit.unshard()  # gathered too early
        if moved:
            shard.add_(1.0)
        after = unit(hidden)
    wanted = before + hidden.sum() if moved and meets else before
    torch.testing.assert_close(after, wanted)
    assert asked


def test_what_stays_stale_is_refused(one_shard, monkeypatch):
    keep_fresh(one_shard, ["1"], inner=Alone(), meets=lambda: True)
    monkeypatch.setattr(gathered, "gather_again", lambda unit, **_: None)
    unit = one_shard[1]
    shard = unit.weight.detach().to_local()
    unit.unshard()
    shard.add_(1.0)
    with pytest.raises(UserError, match="gathered a unit before its round .* strategy.layerwise=false"):
        unit(torch.ones(1, 3))
