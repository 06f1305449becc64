"""Labels from ``metadata.csv`` or ``metadata.jsonl`` beside the images; reading such files."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from heterodiff.data.findings import DataFinding, show
from heterodiff.data.sources.scan import METADATA_NAMES
from heterodiff.errors import DataError

LONGEST_FIELD = 131_072


@dataclass(frozen=True)
class Metadata:
    """Usable rows (file name, class name or ``None``) in file order, and the rows that are wrong."""

    path: Path
    rows: tuple[tuple[str, str | None], ...]
    problems: tuple[DataFinding, ...]


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
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from None


def csv_rows(
    path: Path, text: str, columns: list[str], *, way_out: str = "", longest_field: int = LONGEST_FIELD
) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the fields by column name of each row; fields beyond the header are under ``None``.

    Args:
        path: named in messages.
        text: content of the file.
        columns: columns that must be there.
        way_out: from a missing column, besides adding it.
        longest_field: characters; a longer one is taken for a missing quotation mark.

    Raises:
        DataError: missing columns, or not CSV.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(longest_field)  # of the whole process
    try:
        found = reader.fieldnames or []
        missing = [column for column in columns if column not in found]
        if missing:
            raise DataError(
                f"{path}: no column {' and '.join(missing)}; found {[show(name) for name in found]}. Add it{way_out}"
            )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path} line {reader.reader.line_num}: not readable as CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the content, of whatever type, of each line that is not blank.

    Raises:
        DataError: a line is not JSON.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise DataError(f"{path} line {number}: not readable as JSON: {reason}; one object per line") from None


def name_problem(root: Path, name: Any, column: str = "file_name") -> str | None:
    """What is wrong with ``name`` as that of a file below ``root``, which may not exist."""
    if not isinstance(name, str) or not name.strip():
        return f"{column} is empty or not text"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or ".." in name.split("/"):
        return f"{column} {show(name)} leaves the folder; expected a path below {root}"
    return None


def file_problem(root: Path, name: Any, column: str = "file_name") -> str | None:
    """As `name_problem`; or there is no such file."""
    if problem := name_problem(root, name, column):
        return problem
    try:
        exists = (root / name).is_file()
    except (OSError, ValueError):
        exists = False
    return None if exists else f"file {show(name)} does not exist in {root}; correct or remove the row"


def _label(value: Any) -> str | None:
    """Return the class name, ``None`` for an empty label; ``ValueError`` for anything but text and integers."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"label {value!r:.60} is neither text nor an integer")
    return str(value).strip() or None


def read_metadata(path: Path, with_labels: bool) -> Metadata:
    """Read columns ``file_name`` and, if ``with_labels``, ``label`` (text or integer; empty = unlabelled).

    Raises:
        DataError: unreadable as a whole: not UTF-8, not CSV or JSON lines, missing columns, no rows. Wrong single
            rows are returned as problems.
    """
    text = read_text(path)
    columns = ["file_name", "label"] if with_labels else ["file_name"]
    if path.suffix == ".csv":
        way_out = "; data.labels=none needs no column label" if with_labels else ""
        lines = csv_rows(path, text, columns, way_out=way_out)
    else:
        lines = jsonl_rows(path, text)
    labels: dict[str, str | None] = {}
    problems: list[DataFinding] = []
    for number, row in lines:
        where = f"{path.name} line {number}"
        missing = columns if not isinstance(row, dict) else [name for name in columns if name not in row]
        if missing:
            problems.append(DataFinding(where, f"no {' and no '.join(missing)}"))
            continue
        problem = file_problem(path.parent, row["file_name"])
        try:
            label = _label(row["label"]) if with_labels else None
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
    return Metadata(path, tuple(labels.items()), tuple(problems))
