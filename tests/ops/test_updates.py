"""Which back end does the sweeps, and that all of them offer the same."""

import inspect
from importlib.util import find_spec

import pytest
import torch

from hardy.config import UserError
from hardy.ops import updates, updates_eager
from hardy.ops.updates import BACKENDS, Backend, choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_choice():
    updates._backend.cache_clear()
    yield
    updates._backend.cache_clear()


class Module:
    """A stand-in for a back end's module."""

    def __init__(self, name, *, available=True):
        self.name = name
        self.available = lambda: available


@pytest.fixture
def modules(monkeypatch):
    """Put stand-ins in place of the modules; set what is there by the names."""
    there = {"triton": True, "native": True}
    names = {path: name for name, path in BACKENDS.items()}
    monkeypatch.setattr(
        updates, "import_module", lambda path: Module(names[path], available=there.get(names[path], True))
    )
    monkeypatch.setattr(updates, "find_spec", lambda name: object() if there[name] else None)
    return there


@pytest.mark.parametrize(
    ("device", "absent", "chosen"),
    [
        (CPU, [], "native"),
        (CPU, ["native"], "foreach"),
        (CUDA, [], "triton"),
        (CUDA, ["triton"], "foreach"),
        (torch.device("mps"), [], "foreach"),
    ],
    ids=str,
)
def test_auto_is_the_fastest_that_can_run_there(modules, device, absent, chosen):
    modules.update(dict.fromkeys(absent, False))
    assert choose_backend("auto", device).name == chosen
    assert choose_backend("foreach", device).name == "foreach"


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("triton", CPU, "backend='triton' runs on cuda, the parameters are on cpu; use 'auto'"),
        ("native", CUDA, "backend='native' runs on cpu, the parameters are on cuda; use 'auto'"),
        ("trition", CPU, "no back end of optimizers 'trition'; did you mean 'triton'"),
        ("native", CPU, r"backend='native' needs a C\+\+ compiler .* use 'auto'"),
    ],
)
def test_a_back_end_that_cannot_run_is_refused(modules, name, device, words):
    modules["native"] = False
    with pytest.raises(UserError, match=words):
        choose_backend(name, device)


def test_triton_without_triton_is_refused(modules):
    modules["triton"] = False
    with pytest.raises(
        ValueError, match="backend='triton' needs the triton package; use 'auto', or 'foreach'"
    ):
        choose_backend("triton", CUDA)


def test_the_eager_back_end_is_always_there():
    assert choose_backend("foreach", CPU) is updates_eager


def sweeps():
    return [name for name in vars(Backend) if not name.startswith("_")]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_back_end_has_every_sweep_with_the_same_arguments(name):
    if name == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    module = updates.import_module(BACKENDS[name])
    assert len(sweeps()) == 6
    for sweep in sweeps():
        wanted = list(inspect.signature(getattr(Backend, sweep)).parameters)[1:]
        assert list(inspect.signature(getattr(module, sweep)).parameters) == wanted, sweep
