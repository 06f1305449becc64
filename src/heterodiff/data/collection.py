"""Collections, which sources yield: names, class names and a way to read each image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heterodiff.data.decoding import decode_file
from heterodiff.data.decoding.layout import plain_numbers
from heterodiff.data.findings import DataFinding

Reader = Callable[[int], np.ndarray]
"""Row -> image; functions of modules and `functools.partial` of them, which workers can pickle."""


def read_file(root: Path, names: tuple[str, ...], channels: int | None, background: str, row: int) -> np.ndarray:
    """Decode row ``row`` from file ``root / names[row]``."""
    return decode_file(root / names[row], channels, background)


def read_array(images: np.ndarray, row: int) -> np.ndarray:
    """Return row ``row`` of ``images`` (N, C, H, W)."""
    return plain_numbers(images[row])


def _read_chosen(read: Reader, rows: tuple[int, ...], row: int) -> np.ndarray:
    return read(rows[row])


@dataclass(frozen=True)
class Collection:
    """All images of a source before any of them is looked at.

    Attributes:
        where: the folder, file or built-in name, for messages.
        names: one per image, unique, in the order of the data set.
        class_of: class name of each image, ``None`` = unlabelled.
        read: row -> (C, H, W) array; raises ``BadImage``.
        value_range: stored values that mean 0 and 1, where the source knows them.
        unreadable: folders that could not be listed; handled like bad images.
        problems: wrong metadata rows; an error, except with captions and ``data.on_bad=skip``.
        captions: texts that describe each image, at least one each; ``None`` where the source has none.
        groups: group of each image, such as its patient, that no split may part; ``None``: each image on its own.
        mask: row -> (H, W) bool, true where there is something to be found; ``None`` where the source has none.
        columns: values of the columns of metadata that the configuration asks for, one an image; None where missing.
        condition: row -> (C', H, W) image that is given beside the image; raises ``BadImage``.
        held_out: True for images that the source itself keeps for validation; ``None`` if it has no such split.
    """

    where: str
    names: tuple[str, ...]
    class_of: tuple[str | None, ...]
    read: Reader
    value_range: tuple[float, float] | None = None
    unreadable: tuple[DataFinding, ...] = ()
    problems: tuple[DataFinding, ...] = ()
    warnings: tuple[str, ...] = ()
    captions: tuple[tuple[str, ...], ...] | None = None
    groups: tuple[str, ...] | None = None
    mask: Reader | None = None
    held_out: tuple[bool, ...] | None = None
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    condition: Reader | None = None

    def take(self, rows: Sequence[int]) -> "Collection":
        """Return the images ``rows`` alone, in that order."""
        rows = tuple(rows)
        facts: dict[str, Any] = {}
        for key in ("names", "class_of", "captions", "groups", "held_out"):
            values = getattr(self, key)
            facts[key] = None if values is None else tuple(values[row] for row in rows)
        columns = {name: tuple(values[row] for row in rows) for name, values in self.columns.items()}
        mask, condition = (one and partial(_read_chosen, one, rows) for one in (self.mask, self.condition))
        read = partial(_read_chosen, self.read, rows)
        return replace(self, read=read, mask=mask, condition=condition, columns=columns, **facts)
