"""Checks of plain values, each with one sentence for what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from rfsr_ext.importing import did_you_mean

__all__ = ["interval", "known", "merged", "plain", "probabilities", "probability", "set_field", "whole_number"]


def set_field(settings: object, name: str, value: Any) -> None:
    """Of a frozen dataclass, while it is made."""
    object.__setattr__(settings, name, value)


def known(prefix: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, if all their keys are fields of this dataclass."""
    names = [field.name for field in fields(kind)]
    for key in map(str, values):
        if key not in names:
            hint = did_you_mean(key, names) or f"valid are {', '.join(names)}"
            raise ValueError(f"unknown key '{prefix}{key}'; {hint}")
    return dict(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """It, if it is one within the bounds."""
    if not _is_number(value) or not low <= value <= high or value != int(value):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


def probability(name: str, value: Any) -> float:
    """It, if it is one."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value!r}")
    return float(value)


def probabilities(name: str, values: Any, count: int) -> tuple[float, ...]:
    """Them, if they add up to 1."""
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    good = len(numbers) == count and all(_is_number(n) and 0 <= n <= 1 for n in numbers)
    if not good or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(f"{name} must be {count} probabilities that add up to 1, got {values!r}")
    return tuple(float(number) for number in numbers)


def interval(
    name: str, values: Any, low: float, high: float, whole: bool = False, around: float | None = None
) -> tuple:
    """Two numbers in order within the bounds, with ``around`` between them."""
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    good = len(numbers) == 2 and all(_is_number(n) for n in numbers) and low <= numbers[0] <= numbers[1] <= high
    if not good or (whole and any(n != int(n) for n in numbers)):
        kind = "whole numbers" if whole else "numbers"
        raise ValueError(f"{name} must be [low, high], {kind} from {low:g} to {high:g} in order, got {values!r}")
    if around is not None and not numbers[0] <= around <= numbers[1]:
        raise ValueError(f"{name} must be [low, high] with {around:g} between them, got {values!r}")
    return tuple(int(n) if whole else float(n) for n in numbers)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes``, which in a mapping replace single keys."""
    both = dict(values)
    for key, change in changes.items():
        inner = both.get(key)
        both[key] = merged(inner, change) if isinstance(inner, Mapping) and isinstance(change, Mapping) else change
    return both


def plain(value: Any) -> Any:
    """Tuples as lists, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
