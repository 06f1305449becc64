"""Reading files of captions, in the formats of public data sets, to rows of one kind."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from heterodiff.config import DataConfig
from heterodiff.data.findings import DataFinding, show
from heterodiff.data.sources.metadata import read_text, table_rows
from heterodiff.errors import DataError, reason

SUFFIXES = (".json", ".jsonl", ".csv", ".txt")
FLICKR_COLUMNS = ["image_name", "comment_number", "comment"]
TEXT_COLUMNS = ("image", "caption")
FLICKR_FOLDERS = ("flickr30k_images", "flickr30k-images", "images", "Images", ".")
_NUMBER_AND_COMMENT = re.compile(r"\s*\d+\s+(\S.*)")


class CaptionRow(NamedTuple):
    """One row, unchecked: its place in the file, the name of an image (should be a text) and its captions (too)."""

    where: str
    file: Any
    texts: list[Any]


Rows = Iterator[CaptionRow | DataFinding]


@dataclass(frozen=True)
class CaptionFile:
    """The rows of one file of captions.

    Attributes:
        file_column: the column with the names of the images.
        rows: in order; findings for rows that cannot be parsed.
        folders: where the images may be, relative to the data folder.
    """

    path: Path
    file_column: str
    rows: tuple[CaptionRow | DataFinding, ...]
    folders: tuple[str, ...]


def read_caption_file(path: Path, root: Path, config: DataConfig) -> CaptionFile:
    """Read a file of captions by its suffix: COCO .json, .jsonl, .csv (or Flickr30k, with ``|``), captions .txt.

    Raises:
        DataError: of another suffix, or unreadable as a whole: not UTF-8, not of its format, missing columns.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}; correct data.captions_file")
    text = read_text(path)
    if suffix == ".json":
        name = path.stem.removeprefix("captions_")
        return CaptionFile(path, "file_name", tuple(_coco(path, text)), (name, f"images/{name}", "images", "."))
    header = text.split("\n", 1)[0].strip()
    if suffix == ".csv" and "|" in header:
        return CaptionFile(path, FLICKR_COLUMNS[0], tuple(_flickr(path, text)), FLICKR_FOLDERS)
    columns, folders = (config.file_column, config.text_column), ["."]
    if suffix == ".txt":
        folders = list(FLICKR_FOLDERS)
        columns = columns if set(columns) <= set(header.split(",")) else TEXT_COLUMNS
    elif path.is_relative_to(root) and ".." not in path.relative_to(root).parts:
        folders.append(path.parent.relative_to(root).as_posix())
    return CaptionFile(path, columns[0], tuple(_table(path, text, *columns)), tuple(folders))


def _table(path: Path, text: str, file_column: str, text_column: str) -> Rows:
    hint = "; or name the column with data.file_column or data.text_column"
    for where, row in table_rows(path, text, [file_column, text_column], hint, longest_field=max(len(text), 1)):
        if isinstance(row, str):
            yield DataFinding(where, row)
        elif None in row:
            yield DataFinding(
                where, f"{len(row[None])} fields more than the header has; put texts with commas in double quotes"
            )
        else:
            texts = row[text_column]
            yield CaptionRow(where, row[file_column], texts if isinstance(texts, list) else [texts])


def _flickr(path: Path, text: str) -> Rows:
    """Not CSV: fields end at ``|``, stray blanks are around them, and quotation marks mean nothing."""
    header, *lines = text.split("\n")
    if [name.strip().lower() for name in header.split("|")] != FLICKR_COLUMNS:
        raise DataError(f"{path}: expected the header {'| '.join(FLICKR_COLUMNS)}; found {show(header.strip())}")
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        where, fields = f"{path.name} line {number}", line.split("|", 2)
        found = _NUMBER_AND_COMMENT.fullmatch(fields[1]) if len(fields) == 2 else None
        if found:  # the published file lacks one | of image 2199089797.jpg
            fields = [fields[0], "", found.group(1)]
        if len(fields) < 3:
            yield DataFinding(where, f"expected three fields separated by |, found {len(fields)}")
        else:
            yield CaptionRow(where, fields[0].strip(), [fields[2]])


def _coco(path: Path, text: str) -> Rows:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {reason(error)}") from None
    keys = list(content) if isinstance(content, dict) else []
    if not all(key in keys and isinstance(content[key], list) for key in ("images", "annotations")):
        found = f"keys {', '.join(map(show, keys[:10]))}" if isinstance(content, dict) else "none"
        raise DataError(f"{path}: expected an object with the lists 'images' and 'annotations', found {found}")
    files: dict[int | str, Any] = {}
    for position, image in enumerate(content["images"]):
        where = f"{path.name} images[{position}]"
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)) or "file_name" not in image:
            yield DataFinding(where, f"expected an object with id and file_name, found {image!r:.60}")
        elif files.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            yield DataFinding(where, f"id {image['id']!r:.60} is also that of another image")
    for position, row in enumerate(content["annotations"]):
        where = f"{path.name} annotations[{position}]"
        if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
            yield DataFinding(where, f"expected an object with image_id and caption, found {row!r:.60}")
        elif not isinstance(row["image_id"], (int, str)) or row["image_id"] not in files:
            yield DataFinding(where, f"image_id {row['image_id']!r:.60} is not among the images")
        else:
            yield CaptionRow(where, files[row["image_id"]], [row["caption"]])
