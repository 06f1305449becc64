"""Numbers of ``evaluation.json``, which may hold anything, as texts for the report's tables."""

from collections.abc import Mapping
from typing import Any

from heterodiff.report.curves import is_number

MISSING = "–"


def part_of(content: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Follow ``keys`` through nested dictionaries; an empty one where the way ends."""
    for key in keys:
        found = content.get(key)
        if not isinstance(found, dict):
            return {}
        content = found
    return dict(content)


def texts(value: Any) -> list[str]:
    """A list's items as texts; none where it is no list."""
    return [str(item) for item in value] if isinstance(value, list) else []


def number(value: Any, pattern: str = "") -> str:
    """Write a number by ``pattern``, by default in about three digits: 0.0123, 12.3, 12,345, 1.23e+09."""
    if not is_number(value):
        return MISSING
    whole = 999.5 <= abs(value) < 99_999.5
    return (pattern or ("{:,.0f}" if whole else "{:.3g}")).format(value).replace("-", "−")


def percent(value: Any) -> str:
    return number(100 * value if is_number(value) else None, "{:.1f} %")


def share_of(proportion: Mapping[str, Any]) -> str:
    """A proportion with its interval and count on a second line."""
    count, low, high = (proportion.get(key) for key in ("n", "low", "high"))
    if not (is_number(count) and is_number(low) and is_number(high)) or count < 1:
        return MISSING
    return f"{percent(proportion.get('share'))}\n{100 * low:.0f}–{100 * high:.0f} %, n = {count:,}"


def distance(value: Any) -> str:
    return number(value, "{:.3f}")
