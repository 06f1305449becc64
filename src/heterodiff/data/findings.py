"""Problems of single images and rows, and names as they are printed in messages."""

from collections.abc import Sequence
from typing import NamedTuple

MAX_SHOWN = 10
MAX_NAME_LENGTH = 120


class DataFinding(NamedTuple):
    """One image, folder or metadata row that cannot be used."""

    name: str
    problem: str


class BadImage(Exception):
    """One image that cannot be used; the text is the reason. Never reaches the user: callers add the name."""


def printable(name: str) -> str:
    """Return ``name`` on one line that can be printed: newlines and undecodable bytes escaped."""
    return name if name.isprintable() else repr(name)


def show(name: str) -> str:
    """Return ``name`` for a one-line message: newlines and undecodable bytes escaped, long names shortened."""
    short = name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 3] + "..."
    return printable(short)


def listing(findings: Sequence[DataFinding]) -> str:
    """Return the first findings, one indented line each, and how many more there are."""
    lines = [f"  {show(item.name)}: {item.problem}" for item in findings[:MAX_SHOWN]]
    if len(findings) > MAX_SHOWN:
        lines.append(f"  ... and {len(findings) - MAX_SHOWN:,} more")
    return "\n".join(lines)
