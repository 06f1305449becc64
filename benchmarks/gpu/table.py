"""Results as lines of text."""

from typing import Any


def head_of(name: str, row: dict[str, Any], older: bool = False) -> str:
    """The line that begins a row: state, seconds it took, name, and why there are no numbers."""
    note = " (of older code)" if older else ""
    return f"{row['state']:7} {row['seconds']:6.1f} s  {name}{note}{': ' * ('why' in row)}{row.get('why', '')}"


def lines_of(name: str, row: dict[str, Any], older: bool) -> list[str]:
    """A row as lines: its head, then single numbers together, then a line for each group of numbers."""
    found = row.get("found", {})
    single = {key: value for key, value in found.items() if not isinstance(value, dict)}
    groups = {key: value for key, value in found.items() if isinstance(value, dict)}
    lines = [head_of(name, row, older), *([f"{'':18}{_numbers(single)}"] if single else [])]
    return lines + [f"{'':18}{key:26} {_numbers(group)}" for key, group in groups.items()]


def _numbers(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items() if value is not None)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
