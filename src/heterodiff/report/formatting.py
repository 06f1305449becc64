"""Numbers of ``evaluation.json``, which may hold anything, as text."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

MISSING = "–"


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def part_of(content: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Follow ``keys`` through nested dictionaries; an empty one where the way ends."""
    for key in keys:
        found = content.get(key)
        if not isinstance(found, dict):
            return {}
        content = found
    return dict(content)


def rows_of(value: Any) -> list[dict[str, Any]]:
    """The dictionaries in a list; none where it is no list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def texts(value: Any) -> list[str]:
    """A list's items as text; none where it is no list."""
    return [str(item) for item in value] if isinstance(value, list) else []


def number(value: Any, pattern: str = "") -> str:
    """Write a number by ``pattern``, by default in about three digits: 0.0123, 12.3, 12,345, 1.23e+09."""
    if not is_number(value):
        return MISSING
    whole = 999.5 <= abs(value) < 99_999.5
    return (pattern or ("{:,.0f}" if whole else "{:.3g}")).format(value).replace("-", "−").replace("%", " %")


def count(value: Any) -> str:
    return number(value, "{:,}")


def percent(value: Any) -> str:
    return number(value, "{:.1%}")
