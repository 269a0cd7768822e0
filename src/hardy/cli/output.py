"""Printing for machines: JSON that every parser takes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_json(value: Mapping[str, Any]) -> None:
    """Print `value` as one JSON object; a number that is not finite becomes null."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it.

    Example:
        >>> plain({"loss": float("nan"), "file": Path("a"), "steps": (1, 2)})
        {'loss': None, 'file': 'a', 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
