"""Importing does nothing and brings nothing heavy."""

import subprocess
import sys

import pytest

OPTIONAL = (
    "wandb",
    "trackio",
    "tensorboard",
    "transformers",
    "datasets",
    "pyarrow",
    "accelerate",
    "pytorch_lightning",
)
HEAVY = ("torch", "numpy", "matplotlib", "rich", *OPTIONAL)
LIGHT_MODULES = [
    "hardy",
    "hardy.config",
    "hardy.rng",
    "hardy.clock",
    "hardy.balance.config",
    "hardy.data.config",
    "hardy.distributed.config",
    "hardy.model.config",
    "hardy.model.presets",
    "hardy.optim.config",
    "hardy.train.config",
    "hardy.train.plan",
    "hardy.recipes.table",
    "hardy.cli.main",
    "hardy.cli.train",
]


def in_a_fresh_interpreter(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_import_is_quiet_and_light(module):
    code = f"import sys, {module}; print(*({set(HEAVY)!r} & set(sys.modules)), end='')"
    assert in_a_fresh_interpreter(code) == (0, "", "")


def test_import_reads_no_environment_and_makes_no_logger_set_up():
    code = (
        "import logging, os\n"
        "class Watched(dict):\n"
        "    def __getitem__(self, key): raise AssertionError(key)\n"
        "    get = __getitem__\n"
        "os.environ = Watched()\n"
        "import hardy.cli.main, hardy.cli.train, hardy.recipes.table\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('hardy').handlers"
    )
    assert in_a_fresh_interpreter(code) == (0, "", "")


def test_every_module_imports_without_a_word():
    code = (
        "import importlib, pkgutil, hardy\n"
        "names = [m.name for m in pkgutil.walk_packages(hardy.__path__, 'hardy.')]\n"
        "skipped = {'hardy.__main__'}\n"
        "assert len(names) > 20\n"
        "for name in names:\n"
        # Kernels are written in Triton's own language; their modules wait until the back end is chosen.
        "    if name not in skipped and 'triton' not in name: importlib.import_module(name)\n"
        "import sys\n"
        f"print(*({set(OPTIONAL)!r} & set(sys.modules)), end='')"
    )
    assert in_a_fresh_interpreter(code) == (0, "", "")
