"""What every low-memory optimizer promises about cost: no waiting, few bytes moved, small temporaries."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini

HOST_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "unique_dim", "masked_select"}
CACHE_BYTES = 2**22
"""What a core's caches hold between two operations."""
LARGE_BYTES = 2**20
"""Beyond the buffers of a sweep, which stay in cache."""


class NoHostReads(TorchDispatchMode):
    """Refuses operations whose result the host waits for, wherever they are called from."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert name not in HOST_READS, f"the step waits for the device in {func}"
        return func(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations move between memory and a cache of `CACHE_BYTES`.

    What was touched last is in the cache; what is written goes to memory when it falls out. Views and empty
    tensors cost nothing, the target of a copy is not read first, an expanded dimension counts once.
    """

    def __init__(self):
        super().__init__()
        self.num_bytes = self.num_calls = 0
        self.cached = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        name = schema.name.split("::")[1]
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return result
        self.num_calls += 1
        given = dict(zip([a.name for a in schema.arguments], args, strict=False)) | (kwargs or {})
        writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for argument, value in given.items():
            written = argument in writes
            read = not written or name not in ("copy_", "fill_", "zero_", "_foreach_copy_")
            self._touch(value, read=read, written=written)
        if not writes and not name.startswith(("empty", "new_empty")):
            self._touch(result, read=False, written=True)
        return result

    def _touch(self, value, *, read, written):
        for x in tree_leaves(value):
            if not isinstance(x, torch.Tensor) or x.untyped_storage().nbytes() < LARGE_BYTES:
                continue
            size = x.element_size()
            for length, stride in zip(x.shape, x.stride(), strict=True):
                size *= length if stride else 1
            key = (x.data_ptr(), size)
            known, dirty = key in self.cached, self.cached.pop(key, False)
            self.num_bytes += size * (read and not known)
            self.cached[key] = dirty or written
            self.spill(CACHE_BYTES)

    def spill(self, capacity):
        """Write to memory what was touched longest ago, until the rest fits."""
        while sum(size for _, size in self.cached) > capacity:
            oldest = next(iter(self.cached))
            self.num_bytes += oldest[1] * self.cached.pop(oldest)


class Peak(TorchDispatchMode):
    """Follows the memory of tensors that operations make while the mode is on."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {self._storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and self._storage(x) not in before | self.known.keys():
                storage = x.untyped_storage()
                size, address = storage.nbytes(), storage.data_ptr()
                self.known[address] = size
                self.held += size
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self._freed, address)
        return result

    def _freed(self, address):
        self.held -= self.known.pop(address)

    @staticmethod
    def _storage(x):
        return x.untyped_storage().data_ptr()


def matrix(cls, side, *, dtype=torch.float32, **settings):
    """Return a large parameter with a gradient and its optimizer, whose state exists."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(side, side, generator=generator).to(dtype))
    param.grad = torch.randn(side, side, generator=generator).to(dtype)
    optimizer = cls([("weight", param)], **settings)
    optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["number", "tensor"])
def test_a_step_never_waits_for_the_device(low_memory, number, monkeypatch):
    """Checked beneath Python, where a tensor that becomes a number is one operation, and above it."""
    net = low_memory.net()
    optimizer = low_memory.make(net, lr=number(0.02))
    low_memory.train(net, optimizer, range(2))

    def refuse(*args, **kwargs):
        raise AssertionError("the step reads a tensor on the host")

    for step in range(2, 5):
        low_memory.backward(net, step)
        with monkeypatch.context() as patch, NoHostReads():
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
                patch.setattr(torch.Tensor, name, refuse)
            optimizer.step(grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0))


def test_the_watch_for_waits_can_see_one():
    with pytest.raises(AssertionError, match="waits for the device"), NoHostReads():
        bool(torch.ones(()) > 0)


STEPS = {
    "adamw": (AdaptiveAdamW, {}, 28.0, 30.0),  # w, m, v read and written, g read
    "apollo mini": (APOLLOMini, {}, 16.0, 22.0),  # g read twice, w read and written
    "apollo, rank 256": (APOLLO, {"rank": 256}, 16.0 + 24 * 256 / 2048, 33.0),
    "smmf": (SMMF, {}, 12.25, 13.0),  # w read and written, g read, a bit per sign read and written
}
"""Class, settings, the formula's bytes per element of 2048 x 2048 in fp32, and the eager back end's limit."""


@pytest.mark.parametrize("backend", ["foreach", "native"])
@pytest.mark.parametrize("entry", STEPS)
def test_memory_traffic_is_that_of_the_formula(entry, backend):
    cls, settings, formula, most_eager = STEPS[entry]
    try:
        param, optimizer = matrix(cls, 2048, backend=backend, **settings)
    except ValueError as error:
        pytest.skip(str(error))
    with Traffic() as traffic:
        optimizer.step()
    traffic.spill(0)
    per_element = traffic.num_bytes / param.numel()
    print(
        f"{entry}, {backend}: {per_element:.2f} B/element, formula {formula:.2f}, {traffic.num_calls} calls"
    )
    assert 0.9 * formula < per_element < (most_eager if backend == "foreach" else 1.1 * formula)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("entry", STEPS)
def test_temporaries_stay_within_64_mib(entry, dtype):
    """For 16 M elements: a temporary of the tensor's size would be 64 MiB in fp32 by itself."""
    cls, settings, *_ = STEPS[entry]
    param, optimizer = matrix(cls, 4096, dtype=dtype, backend="foreach", bf16_update="nearest", **settings)
    with Peak() as peak:
        optimizer.step()
    print(f"{entry}: {peak.most / 2**20:.1f} MiB of temporaries")
    assert 0 < peak.most <= 1.01 * 2**26
