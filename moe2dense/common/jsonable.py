"""Turn numbers and paths into values that JSON can hold."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ArrayLike(Protocol):
    """A number or an array of numpy or torch."""

    def tolist(self) -> Any:
        """Return plain numbers, in nested lists."""
        ...


def clean(value: Any) -> Any:
    """Return JSON values only: tuples become lists, numpy and torch numbers plain ones, NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, ArrayLike):
        return clean(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)
