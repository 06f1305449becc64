"""Columns of metadata as conditions: classes as their numbers, numbers standardised, NaN where a value is missing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.collection import Collection
from heterodiff.data.findings import show
from heterodiff.data.heights import SLICED, patients_and_heights
from heterodiff.data.labels import sort_classes
from heterodiff.errors import ConfigError, DataError, nearest_name
from heterodiff.image_spec import AttributeSpec

HEIGHT = "height"
"""Column that every source of slices has: the height of a slice in the head, 0 to 1."""


def with_columns(collection: Collection, config: DataConfig) -> Collection:
    """Return ``collection`` with the columns that ``config`` asks for.

    Raises:
        DataError: a column that the source does not have.
    """
    if not config.columns:
        return collection
    columns = dict(collection.columns)
    if config.source in SLICED:
        heights = patients_and_heights(collection.names, config.source)[1]
        assert heights is not None
        columns.setdefault(HEIGHT, tuple(heights.tolist()))
    if missing := [name for name in config.columns if name not in columns]:
        key = "data.conditions" if missing[0] in (config.conditions or ()) else "data.condition.column"
        known = ", ".join(map(show, sorted(columns)[:20])) or "none"
        raise DataError(
            f"{key}: {collection.where} has no column {show(missing[0])}{nearest_name(missing[0], columns)}; it has "
            f"{known}"
        )
    return replace(collection, columns={name: columns[name] for name in config.columns})


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() == "" or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and math.isnan(value))


def to_number(value: Any) -> float:
    """Read a finite number from a number or text; raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | np.number):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def describe_attributes(
    kinds: Mapping[str, str], columns: Mapping[str, Sequence[Any]], where: str
) -> tuple[AttributeSpec, ...]:
    """Describe the attributes ``kinds`` (column -> "class" or "number") by their values of the training images.

    Raises:
        DataError: a column without two different values, or of numbers that holds something else.
    """
    found = []
    for name, kind in kinds.items():
        values = [value for value in columns[name] if not _is_missing(value)]
        if len(different := {str(value).strip() for value in values}) < 2:
            what = f"the single value {show(different.pop())}" if different else "no values"
            raise DataError(f"data.conditions.{name}: {where} has {what} there; a condition needs at least two")
        if kind == "class":
            found.append(AttributeSpec(name, sort_classes(different)))
            continue
        try:
            numbers = np.array([to_number(value) for value in values])
        except ValueError:
            wrong = next(value for value in values if not _is_number(value))
            raise DataError(
                f"data.conditions.{name}: {where} holds {show(str(wrong))}, which is not a finite number; correct it, "
                f"leave the cell empty, or set data.conditions.{name}=class"
            ) from None
        low, high = float(numbers.min()), float(numbers.max())
        found.append(AttributeSpec(name, (), float(numbers.mean()), float(numbers.std()), low, high))
    return tuple(found)


def _is_number(value: Any) -> bool:
    try:
        to_number(value)
    except ValueError:
        return False
    return True


def encode_attribute(spec: AttributeSpec, value: Any) -> float:
    """Return the number that networks see: of a class its index, else the standardised value; NaN where missing.

    Raises:
        ConfigError: a class that training did not know, or not a number.
    """
    if _is_missing(value):
        return math.nan
    if not spec.classes:
        try:
            return (to_number(value) - spec.mean) / spec.std
        except ValueError:
            raise ConfigError(f"{spec.name}: expected a finite number, found {show(str(value))}") from None
    text = str(value).strip()
    if text not in spec.classes:
        known = ", ".join(map(show, spec.classes[:20])) + (", ..." if len(spec.classes) > 20 else "")
        raise ConfigError(f"{spec.name}: no class {show(text)}{nearest_name(text, spec.classes)}; it has {known}")
    return float(spec.classes.index(text))


def encode_attributes(
    specs: Sequence[AttributeSpec], columns: Mapping[str, Sequence[Any]], names: Sequence[str], where: str
) -> np.ndarray | None:
    """Return the attributes (N, A) float32 of images ``names``; None for a run without.

    Raises:
        DataError: a value that does not fit, with the image's name.
    """
    if not specs:
        return None
    encoded = np.empty((len(names), len(specs)), np.float32)
    for place, spec in enumerate(specs):
        for row, value in enumerate(columns[spec.name]):
            try:
                encoded[row, place] = encode_attribute(spec, value)
            except ConfigError as error:
                raise DataError(f"{where}: {show(names[row])}: data.conditions.{error}; correct it") from None
    return encoded


def outside(spec: AttributeSpec, value: Any) -> str | None:
    """Return a warning about a number beyond those of the training images; None for any other value."""
    if spec.classes or _is_missing(value) or spec.low <= to_number(value) <= spec.high:
        return None
    return (
        f"{spec.name}={to_number(value):g} is outside the training images' {spec.low:g} to {spec.high:g}; expect "
        "images of the nearest that the network knows"
    )
