"""Labels from ``metadata.csv`` or ``metadata.jsonl`` beside the images; reading such tables."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from heterodiff.data.findings import DataFinding, show
from heterodiff.data.sources.scan import METADATA_NAMES
from heterodiff.errors import DataError, reason

LONGEST_FIELD = 131_072


def find_metadata(root: Path) -> Path | None:
    """Return the metadata file of folder ``root``, or ``None``.

    Raises:
        DataError: there are two.
    """
    found = [root / name for name in METADATA_NAMES if (root / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{root}: both metadata.csv and metadata.jsonl; keep one of them")
    return found[0] if found else None


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, with or without byte order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from None


def table_rows(
    path: Path, text: str, columns: list[str], hint: str, longest_field: int = LONGEST_FIELD
) -> Iterator[tuple[str, dict[Any, Any] | str]]:
    """Yield the place of each row of a table, and its fields by name or the reason why it cannot be used.

    Args:
        path: named in messages; a table that does not end in ``.jsonl`` is CSV.
        text: content of the file. Fields beyond the header of a CSV file are under ``None``.
        columns: fields that must be there.
        hint: end of the message about a missing column.
        longest_field: characters of a CSV field; a longer one is taken for a missing quotation mark.

    Raises:
        DataError: a CSV file without the columns, or a line that cannot be parsed.
    """
    is_json = path.suffix.lower() == ".jsonl"
    for number, row in _json_lines(path, text) if is_json else _csv_rows(path, text, columns, hint, longest_field):
        where = f"{path.name} line {number}"
        if not isinstance(row, dict):
            yield where, f"expected an object with {' and '.join(columns)}, found {row!r:.60}"
        elif missing := [column for column in columns if column not in row]:
            found = ", ".join(show(name) for name in list(row)[:10]) or "nothing"
            yield where, f"no {' and no '.join(missing)}; found {found}{hint}"
        else:
            yield where, row


def _csv_rows(path: Path, text: str, columns: list[str], hint: str, longest_field: int) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(longest_field)  # of the whole process
    try:
        found = reader.fieldnames or []
        if missing := [column for column in columns if column not in found]:
            raise DataError(
                f"{path}: no column {' and '.join(missing)}; found {[show(name) for name in found]}. Add it{hint}"
            )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path} line {reader.reader.line_num}: not readable as CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} line {number}: not readable as JSON: {reason(error)}; one object per line"
            ) from None


def name_problem(root: Path, name: Any, column: str = "file_name") -> str | None:
    """Return the reason why ``name`` cannot be that of a file below ``root``, or ``None``; asks no disk."""
    if not isinstance(name, str) or not name.strip():
        return f"{column} is empty or not text"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or ".." in name.split("/"):
        return f"{column} {show(name)} leaves the folder; expected a path below {root}"
    return None


def file_problem(root: Path, name: Any, column: str = "file_name") -> str | None:
    """Return the reason why ``name`` is no file below ``root``, or ``None``."""
    if problem := name_problem(root, name, column):
        return problem
    try:
        exists = (root / name).is_file()
    except (OSError, ValueError):
        exists = False
    return None if exists else f"file {show(name)} does not exist in {root}; correct or remove the row"


def class_name(value: Any) -> str | None:
    """Return the class name, ``None`` for an empty label; ``ValueError`` for anything but text and integers."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"label {value!r:.60} is neither text nor an integer")
    return str(value).strip() or None


def read_columns(path: Path, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read all columns but the names and labels of the files ``names``; None where a row lacks one."""
    rows = {
        PurePosixPath(row["file_name"]).as_posix(): row
        for _, row in table_rows(path, read_text(path), ["file_name"], "")
        if isinstance(row, dict) and isinstance(row["file_name"], str)
    }
    there = dict.fromkeys(str(key) for row in rows.values() for key in row if key not in (None, "file_name", "label"))
    return {name: tuple(rows[file].get(name) for file in names) for name in there}


def has_column(path: Path, column: str) -> bool:
    """Return whether the first row of a table has ``column``."""
    first = next(iter(table_rows(path, read_text(path), [], "")), None)
    return first is not None and isinstance(first[1], dict) and column in first[1]


def read_metadata(path: Path, with_labels: bool) -> tuple[dict[str, str | None], list[DataFinding]]:
    """Read columns ``file_name`` and, if ``with_labels``, ``label`` (text or integer; empty = unlabelled).

    Returns:
        Class name, or ``None``, of each file by its name; and the rows that cannot be used.

    Raises:
        DataError: unreadable as a whole: not UTF-8, not CSV or JSON lines, missing columns, no rows.
    """
    columns, hint = ["file_name"], ""
    if with_labels:
        columns, hint = ["file_name", "label"], "; data.labels=none needs no column label"
    labels: dict[str, str | None] = {}
    problems: list[DataFinding] = []
    for where, row in table_rows(path, read_text(path), columns, hint):
        if isinstance(row, str):
            problems.append(DataFinding(where, row))
            continue
        problem = file_problem(path.parent, row["file_name"])
        try:
            label = class_name(row["label"]) if with_labels else None
        except ValueError as error:
            problem = problem or str(error)
        name = PurePosixPath(row["file_name"]).as_posix() if problem is None else ""
        if problem is None and name in labels:
            problem = f"file {show(name)} is listed twice; keep one row"
        if problem is not None:
            problems.append(DataFinding(where, problem))
        else:
            labels[name] = label
    if not labels and not problems:
        raise DataError(f"{path}: no rows; list the images or remove the file")
    return labels, problems
