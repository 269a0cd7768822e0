"""What tests of the experiments share."""

import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def no_modules_of_experiments():
    """Take out what a script put on sys.path and imported: `tasks` of one folder is not that of the next."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{EXPERIMENTS}/"):
            del sys.modules[name]
