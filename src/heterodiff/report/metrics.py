"""Measured quantities as rows, from which the report's tables and cards and the terminal's lines are made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from heterodiff.report.content import Card, Table
from heterodiff.report.formatting import MISSING, is_number, number, percent

KEYS = ("share", "mean", "value")
"""Names of a value beside its interval in ``evaluation.json``."""


@dataclass(frozen=True)
class Value:
    """A measured number as text.

    Attributes:
        interval: of 95 % confidence, or a spread.
        n: number of images, prompts, ... that it was measured on.
    """

    text: str = MISSING
    interval: str = ""
    n: int | None = None

    @property
    def cell(self) -> str:
        """The value, with interval and number on a second line."""
        details = [self.interval] if self.interval else []
        if self.n is not None:
            details.append(f"n = {self.n:,}")
        return f"{self.text}\n{', '.join(details)}" if details else self.text

    def phrase(self, unit: str) -> str:
        """The value, with interval and number, in a sentence; ``unit``: images, prompts, ..."""
        interval = f" [{self.interval}]" if self.interval else ""
        return f"{self.text}{interval}" + ("" if self.n is None else f" of {self.n:,} {unit}")


@dataclass(frozen=True)
class Metric:
    """A quantity with its values, one for each column of its table.

    Attributes:
        explanation: what it means; in the report alone.
        note: what belongs to these values.
        tag: first word of its line on the terminal, of at most eight letters; empty: it has none.
    """

    label: str
    values: Sequence[Value]
    explanation: str = ""
    note: str = ""
    tag: str = ""

    @property
    def more(self) -> str:
        """Explanation and note together."""
        return f"{self.explanation} {self.note}." if self.explanation and self.note else self.explanation or self.note

    def card(self, note: str | None = None, label: str = "") -> Card:
        """Return the first value as a headline number."""
        return Card(label or self.label, self.values[0].text, self.note if note is None else note)


@dataclass(frozen=True)
class MetricTable:
    """Quantities that share their columns.

    Attributes:
        title: header of the labels.
        columns: what was measured (generated images, real ones, ...); a second line is set small.
        unit: what the number of a value counts.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Metric]
    unit: str = "images"

    def table(self) -> Table:
        """Return the quantities as a table of the report."""
        explained = any(row.explanation for row in self.rows)
        more = [row.more for row in self.rows]
        header = [self.title, *self.columns]
        rows = [[row.label, *(value.cell for value in row.values)] for row in self.rows]
        if any(more):
            header.append("What it means" if explained else "")
            rows = [[*row, text] for row, text in zip(rows, more, strict=True)]
        return Table(header, rows, range(1, 1 + len(self.columns)), explained)

    def lines(self) -> Iterator[str]:
        """Yield a line of the terminal for each quantity that has a tag and a value."""
        for row in self.rows:
            values = [
                f"{_inline(column)} {value.phrase(self.unit)}".strip()
                for column, value in zip(self.columns, row.values, strict=True)
                if value.text != MISSING
            ]
            if row.tag and values:
                label = _lowered(row.label.removesuffix(f" ({row.tag})").removeprefix(row.tag).strip())
                note = f" ({_lowered(row.note)})" if row.note else ""
                yield f"{row.tag:8} {label}{': ' if label else ''}{', '.join(values)}{note}"


def _inline(column: str) -> str:
    first, _, rest = _lowered(column).partition("\n")
    return f"{first} ({rest})" if rest else first


def _lowered(text: str) -> str:
    """``text`` within a sentence: its first letter is small unless it begins an abbreviation."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def value_of(found: Any, pattern: str = "", n: Any = None) -> Value:
    """Read a number, a mean with its ``std``, or a share or mean with its interval ``low`` to ``high`` and its ``n``.

    Args:
        found: anything that JSON can hold; what is not understood is a missing value.
        pattern: see :func:`heterodiff.report.formatting.number`; for a number alone.
        n: number of images, prompts, ..., where it is stored elsewhere.
    """
    if not isinstance(found, dict):
        return Value(number(found, pattern), n=int(n) if is_number(n) else None)
    value, low, high = (found.get(key) for key in (next((key for key in KEYS if key in found), ""), "low", "high"))
    if "std" in found:
        return Value(number(value), f"± {number(found['std'])}")
    if not (is_number(value) and is_number(low) and is_number(high)):
        return Value()
    n = found.get("n")
    return Value(percent(value), f"{100 * low:.1f}–{percent(high)}", int(n) if is_number(n) and n >= 1 else None)
