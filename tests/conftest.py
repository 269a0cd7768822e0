"""What all tests share: one thread, golden files, a small run's settings."""

import gc
import json
import math
import os
import sys
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tests that import torch later, and for subprocesses

hypothesis.settings.register_profile("hardy", deadline=None)  # machines are busy now and then
hypothesis.settings.load_profile("hardy")

GOLDEN = Path(__file__).parent / "golden"
PROCESSES = Path(__file__).parent / "mp"


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="rewrite tests/golden/*.json")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(PROCESSES):
            item.add_marker(pytest.mark.mp)


def pytest_collection_finish():
    gc.freeze()  # what the collector would walk through again and again: eleven thousand tests


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Compute on one thread, so that sums come out the same and test processes do not fight for cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture
def golden(request):
    """Compare values with tests/golden/NAME.json; numbers to 1e-9, everything else exactly."""

    def check(name, got):
        path = GOLDEN / f"{name}.json"
        if request.config.getoption("--write-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(got, indent=1) + "\n", encoding="utf-8")
        assert path.exists(), f"{path.name} is missing; write it by `make golden` and read it"
        wanted = json.loads(path.read_text(encoding="utf-8"))
        assert differences(json.loads(json.dumps(got)), wanted) == []

    return check


def differences(got, wanted, path=""):
    """Return a line for each place in which two JSON values differ."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(key for key in got if key not in wanted)]
        pairs = [(key, got.get(key, "nothing"), wanted.get(key, "nothing")) for key in keys]
    elif isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        pairs = [(index, *pair) for index, pair in enumerate(zip(got, wanted, strict=True))]
    else:
        numbers = {type(got), type(wanted)} <= {int, float}
        same = (
            math.isclose(got, wanted, rel_tol=1e-9) if numbers else (type(got), got) == (type(wanted), wanted)
        )
        return [] if same else [f"{path}: got {got!r}, golden {wanted!r}"]
    return [line for key, a, b in pairs for line in differences(a, b, f"{path}/{key}")]
