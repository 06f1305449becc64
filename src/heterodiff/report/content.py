"""Typed content of a report, which the template ``report.html.j2`` turns into HTML."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A headline number."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; ``soft`` for small print."""

    text: str
    soft: bool = False


@dataclass(frozen=True)
class Notice:
    """A coloured box; ``tone``: good, bad, or empty for a warning."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font, in ``columns`` where it is long."""

    text: str
    columns: bool = False


@dataclass(frozen=True)
class Table:
    """Cells of plain text; lines of a cell after its first are set small.

    Attributes:
        numbers: columns that are set flush right.
        explained: whether the last column is prose, which goes below its row on a phone.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    explained: bool = False


@dataclass(frozen=True)
class Figure:
    """An embedded picture; ``data`` is None where there is none.

    Attributes:
        kind: png or svg+xml.
    """

    data: bytes | None
    alt: str
    caption: str = ""
    framed: bool = False
    kind: str = "png"

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data or b'').decode()}"


@dataclass(frozen=True)
class Strip:
    """Pictures side by side."""

    figures: Sequence[Figure]


Block = Text | Notice | Code | Table | Figure | Strip


@dataclass(frozen=True)
class Section:
    """A titled part of the report; blocks without content, and a section without any, are left out."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """All that a report shows, from top to bottom."""

    name: str
    subtitle: str
    problems: Sequence[str]
    cards: Sequence[Card]
    sections: Sequence[Section]
