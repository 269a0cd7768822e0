"""What the tests of the sweeps share: tiny tiles, the error budget, a watch on temporary memory."""

import sys

import pytest


@pytest.fixture(params=["usual tiles", "tiny tiles"])
def any_tiles(request, monkeypatch):
    """Run a test as usual, and again with tensors cut into many tiles."""
    from hardy.ops import tiles

    if request.param == "tiny tiles":
        monkeypatch.setitem(tiles._BUFFER_BYTES, "cpu", 1 << 11)


@pytest.fixture
def within_budget():
    """Return the check that a fast result loses at most `factor` times what the naive one loses."""

    def check(ours, naive, exact, *, factor=2.0):
        lost_by_ours = (ours.double() - exact).abs().max()
        lost_by_naive = (naive.double() - exact).abs().max()
        assert lost_by_ours <= factor * lost_by_naive + 1e-12

    return check


@pytest.fixture
def peak_bytes():
    """Return a function that calls another and returns the most bytes that storages it made held at once."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live, self.peak = [], 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.live = [(storage, size) for storage, size in self.live if not storage.expired()]
            known = {StorageWeakRef(x.untyped_storage()).cdata for x in args if torch.is_tensor(x)}
            known |= {storage.cdata for storage, _ in self.live}
            if torch.is_tensor(out) and "out" not in (kwargs or {}):
                storage = StorageWeakRef(out.untyped_storage())
                if storage.cdata not in known:
                    self.live.append((storage, out.untyped_storage().nbytes()))
            self.peak = max(self.peak, sum(size for _, size in self.live))
            return out

    def measure(call):
        with Watch() as watch:
            call()
        return watch.peak

    return measure


@pytest.fixture
def nearly():
    """Return the check for tiny inputs, on which the naive result may be exact by luck: a unit is free."""

    def check(ours, naive, exact, *, factor=2.0):
        lost_by_ours = (ours.double() - exact).abs().max()
        lost_by_naive = (naive.double() - exact).abs().max()
        assert lost_by_ours <= factor * lost_by_naive + 2.0**-23 * exact.abs().max()

    return check


def _of_triton(name):
    """Whether a module is Triton's or ours on top of it; not its C extension, which loads once a process."""
    ours = name.startswith(("hardy.ops.triton_", "hardy.ops.updates_triton"))
    return ours or name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C"))


def _exchange(wanted):
    """Put other modules in the place of Triton's and ours; return those that were there."""
    import hardy.ops

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_triton(name)}
    for name in [name for name in vars(hardy.ops) if _of_triton(f"hardy.ops.{name}")]:
        delattr(hardy.ops, name)
    sys.modules.update(wanted)
    for name, module in wanted.items():
        if name.startswith("hardy.ops."):
            setattr(hardy.ops, name.removeprefix("hardy.ops."), module)
    return before


@pytest.fixture(scope="session")
def interpreted_modules():
    """The modules that the interpreter's tests imported so far."""
    return {}


@pytest.fixture
def triton_interpreter(interpreted_modules, monkeypatch):
    """Run a test with Triton's interpreter: kernels on the CPU, one program after the other, in numpy.

    Triton decides when it is imported, by the environment, whether kernels are compiled or interpreted. So
    the test has a second copy of Triton and of our modules on top of it; other tests keep the first. A test
    that uses this fixture imports them in its body.
    """
    pytest.importorskip("triton", minversion="3.7")  # the interpreter of 3.6 fails with numpy 2.4
    import numpy

    before = _exchange(interpreted_modules)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with numpy.errstate(all="ignore"):  # lanes that a mask cuts off compute too
        yield
    interpreted_modules.update(_exchange(before))
