"""Plain values as JSON that comes back equal: tuples as tuples, floats with every bit, NaN and infinities."""

import math
from typing import Any

from hardy.config import UserError

_FLOAT, _TUPLE = "__float__", "__tuple__"


def encode(value: Any, *, path: str = "plain") -> Any:
    """Return `value` as strict JSON can hold it; `path` names it in errors.

    Raises:
        UserError: something in it is not None, bool, int, float, str, list, tuple or dict with string keys.

    Example:
        >>> encode({"betas": (0.9, float("inf"))})
        {'betas': {'__tuple__': [0.9, {'__float__': 'inf'}]}}
        >>> decode(encode({"betas": (0.9, float("inf"))}))
        {'betas': (0.9, inf)}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, list):
        return [encode(item, path=f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item, path=f"{path}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key in (_FLOAT, _TUPLE):
                raise UserError(
                    f"{path} cannot be saved: its key {key!r} is not a free string; rename the key"
                )
        return {key: encode(item, path=f"{path}.{key}") for key, item in value.items()}
    raise UserError(
        f"{path} cannot be saved: it is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint "
        f"keeps numbers, text, None, lists, tuples and dicts of these, and tensors only as tensors"
    )


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        if value.keys() == {_TUPLE}:
            return tuple(decode(item) for item in value[_TUPLE])
        return {key: decode(item) for key, item in value.items()}
    return value
