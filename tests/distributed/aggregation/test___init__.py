import pytest

from hardy.distributed import aggregation


def test_public_names_are_there():
    for name in aggregation.__all__:
        assert getattr(aggregation, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Agregator'"):
        aggregation.Agregator  # noqa: B018  # looked up on purpose
