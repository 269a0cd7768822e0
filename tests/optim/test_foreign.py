import sys
import textwrap

import pytest
import torch

from hardy.config import ConfigError
from hardy.optim.foreign import refuse_unknown, registered_factory, settings_of


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package on the path that registers optimizers, as pip would leave it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def installed(lines, *, package="theirs", code=""):
        (tmp_path / f"{package}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[hardy.optimizers]\n" + "\n".join(lines) + "\n")

    yield installed
    for name in [name for name in sys.modules if name.startswith("theirs")]:
        del sys.modules[name]


CODE = """
    import torch
    def build(model, lr, **settings):
        return torch.optim.SGD(model.parameters(), lr=lr, **settings)
    def wrong(model, **settings):
        return "no optimizer"
"""


def test_a_registered_name_is_found_and_imported_only_when_asked(install):
    install(["their-sgd = theirs:build"], code=CODE)
    with pytest.raises(ConfigError):
        registered_factory("nothing", beside=["apollo"])
    assert "theirs" not in sys.modules
    optimizer = registered_factory("their_sgd", beside=[])(torch.nn.Linear(2, 2), lr=0.5, momentum=0.9)
    assert (type(optimizer), optimizer.defaults["momentum"]) == (torch.optim.SGD, 0.9)


def test_an_unknown_name_tells_the_nearest_of_all(install):
    install(["gorilla = theirs:build"], code=CODE)
    with pytest.raises(
        ConfigError, match=r"did you mean 'gorilla'\? Known: apollo, gorilla; any class by its"
    ):
        registered_factory("gorila", beside=["apollo"])


def test_a_factory_that_returns_no_optimizer_is_named(install):
    install(["odd = theirs:wrong"], code=CODE)
    with pytest.raises(
        ConfigError, match=r"'odd' \(theirs:wrong\) returned a str, not a torch.optim.Optimizer"
    ):
        registered_factory("odd", beside=[])(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("value", ["theirs:absent", "theirs_too:build"])
def test_a_factory_that_cannot_be_loaded_is_named(install, value):
    install([f"odd = {value}"], code=CODE)
    with pytest.raises(
        ConfigError, match=f"'odd' is registered as {value}, which cannot be loaded: .*; mend or"
    ):
        registered_factory("odd", beside=[])


def test_a_name_registered_twice_is_refused(install):
    install(["same = theirs:build"], code=CODE)
    install(["same = theirs_too:build"], package="theirs_too", code=CODE)
    with pytest.raises(
        ConfigError, match=r"more than once \(theirs:build, theirs_too:build\); uninstall all but"
    ):
        registered_factory("same", beside=[])


def test_the_settings_of_a_class_are_its_arguments():
    names, is_open = settings_of(torch.optim.SGD)
    assert {"lr", "momentum", "nesterov"} <= names and not {"params", "self"} & names and not is_open
    assert settings_of(lambda params, lr, **rest: None) == ({"lr"}, True)


def test_a_setting_that_is_not_known_is_refused_with_the_nearest():
    refuse_unknown(["lr"], "setting", ["lr", "rank"])
    with pytest.raises(ConfigError, match=r"there is no setting 'rnk'; did you mean 'rank'\?"):
        refuse_unknown(["lr", "rnk"], "setting", ["lr", "rank"])
