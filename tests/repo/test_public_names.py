"""The names of `import hardy`: few, and each is there."""

import hardy

MOST_NAMES = 40


def test_few_public_names_and_each_resolves():
    names = hardy.__all__
    assert 0 < len(names) <= MOST_NAMES
    assert len(set(names)) == len(names)
    for name in names:
        assert not name.startswith("_")
        value = getattr(hardy, name)
        assert getattr(value, "__doc__", None), f"hardy.{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(hardy, "no_such_name")
