"""The examples of docs/howto/adapters.md run, each with the package that it needs.

test_docs.py runs blocks marked ```python; those of that page are marked ```py, since they need a model, data
and other people's packages.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hardy.optim.make import make_optimizer

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "adapters.md"
EXAMPLE = re.compile(
    r"^## (?P<heading>[^\n]+)\n(?:(?!^## ).)*?^```(?:py|yaml)\n(?P<body>.*?)^```$", re.M | re.S
)
EXAMPLES = {found["heading"]: found["body"] for found in EXAMPLE.finditer(PAGE.read_text(encoding="utf-8"))}
NEEDED = {
    "Plain loop": "transformers",
    "Trainer of transformers": "accelerate",
    "accelerate": "accelerate",
    "accelerate with FSDP2": "accelerate",
    "Lightning": "pytorch_lightning",
    "torchtitan": "torchtitan",
    "axolotl": "yaml",
}
"""The package beyond transformers, whose model all of them train."""


@pytest.fixture
def surroundings(request, tmp_path, monkeypatch):
    """What the examples take for granted: a model, its data, and a machine without an accelerator."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
    monkeypatch.chdir(tmp_path)
    # Accelerate's plugins and the Trainer say things by the environment; they must not reach other tests.
    monkeypatch.setattr(os, "environ", {**os.environ, "ACCELERATE_USE_CPU": "true"})
    torch.random.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    tokens = torch.randint(40, (8, 6), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    return {"__name__": "page", "model": model, "dataset": dataset, "loader": loader}


def test_every_example_is_short_and_run_here():
    assert EXAMPLES.keys() == NEEDED.keys()
    for heading, body in EXAMPLES.items():
        assert len(body.splitlines()) <= 15, heading


def run(heading, surroundings):
    """Run the example under a heading and return the names that it leaves."""
    pytest.importorskip(NEEDED[heading], reason=f"{NEEDED[heading]} is not installed")
    model = surroundings["model"]
    surroundings["before"] = [parameter.detach().clone() for parameter in model.parameters()]
    exec(compile(EXAMPLES[heading], f"{PAGE.name}: {heading}", "exec"), surroundings)
    return SimpleNamespace(**surroundings)


def moved(names):
    return [not torch.equal(a, b) for a, b in zip(names.before, names.model.parameters(), strict=True)]


def test_plain_loop(surroundings, capsys):
    names = run("Plain loop", surroundings)
    assert all(moved(names))
    assert re.search(r"^embedding +smmf +1 ", capsys.readouterr().out, re.M)


@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning"
)  # the Trainer's default
def test_trainer_of_transformers(surroundings):
    names = run("Trainer of transformers", surroundings)
    # The first of two steps is at the full rate, and every parameter moved.
    assert all(moved(names))


def test_accelerate(surroundings):
    names = run("accelerate", surroundings)
    assert all(moved(names))
    assert type(names.optimizer.optimizer).__name__ == "SMMF"


def test_accelerate_with_fsdp2(surroundings):
    """In one process, where accelerate shards nothing; tests/mp/test_accelerate.py runs it in two."""
    names = run("accelerate with FSDP2", surroundings)
    for batch in names.loader:
        names.accelerator.backward(names.model(**batch).loss)
        names.optimizer.step()
    assert all(moved(names))


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # Lightning asks torch in a way that torch 2.13 is leaving
    "ignore:.*does not have many workers",
    "ignore:.*The number of training batches .* is smaller than the logging interval",
)
def test_lightning(surroundings):
    names = run("Lightning", surroundings)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = names.lightning.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(names.Module(), names.loader)
    assert all(moved(names))


def test_torchtitan(surroundings):
    """Not run where torchtitan is missing; tests/integrations/test_torchtitan.py then uses a stand-in."""
    names = run("torchtitan", surroundings)
    container = names.llama3_apollo().optimizer.build(model_parts=[names.model])
    for batch in names.loader:
        names.model(**batch).loss.backward()
        container.step()
    assert all(moved(names))


def test_axolotl(surroundings):
    """The table is one that the optimizer understands; the plugin is tried in tests/integrations."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    said = yaml.safe_load(EXAMPLES["axolotl"])
    home, _, name = said["plugins"][0].rpartition(".")
    assert find_spec(home) and name == "Plugin"
    settings = {"lr": said["learning_rate"], "weight_decay": said["weight_decay"], **said["hardy"]}
    assert type(make_optimizer(surroundings["model"], **settings)).__name__ == "APOLLOMini"


def test_all_names_of_the_page_are_optimizers(surroundings):
    text = PAGE.read_text(encoding="utf-8")
    listed = text[text.index("takes a model and a name:") : text.index("Matrices follow the method")]
    names = re.findall(r"`([\w.-]+)`", listed)
    assert len(names) == 10
    for name in names:
        make_optimizer(surroundings["model"], name)
