"""Condition images in files or masks, read beside each image of a source."""

from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.collection import Collection
from heterodiff.data.decoding import decode_file
from heterodiff.data.findings import BadImage, show
from heterodiff.data.sources.scan import scan_folder
from heterodiff.errors import DataError

FULL_SCALE = {"uint8": 255.0, "bool": 1.0, "uint16": 65535.0}
IN_THE_IMAGE = ("downscale", "channels", "edges")
"""Conditions that need nothing but the image."""


def with_condition(collection: Collection, config: DataConfig) -> Collection:
    """Return ``collection`` with the stored condition images that ``config`` asks for.

    Raises:
        DataError: no mask, folder or column of this name; a condition image that is missing.
    """
    asked = config.condition
    if asked is None or asked.kind in IN_THE_IMAGE:
        return collection
    if asked.mask:
        if collection.mask is None:
            raise DataError(f"data.condition.mask: {collection.where} has no masks; use a source with masks")
        return replace(collection, condition=partial(_read_mask, collection))
    if asked.folder is not None:
        root, files = asked.folder, _same_names(asked.folder, collection)
    else:
        root, files = Path(collection.where), list(collection.columns[asked.value])
    missing = [name for name, file in zip(collection.names, files, strict=True) if not _is_file(root, file)]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise DataError(
            f"data.condition.{asked.kind}={asked.value}: no condition image for {show(missing[0])}{more} in {root}; "
            "add the files, or leave these images out"
        )
    return replace(collection, condition=partial(_read_condition, root, tuple(map(str, files)), config.background))


def _is_file(root: Path, name: object) -> bool:
    return isinstance(name, str) and ".." not in name.split("/") and (root / name).is_file()


def _same_names(folder: Path, collection: Collection) -> list[str | None]:
    """Return the file in ``folder`` of each image: of the same name, or the same but for the suffix."""
    if not folder.is_dir():
        raise DataError(f"data.condition.folder={folder}: no such folder")
    there = scan_folder(folder).files
    exact, stems = set(there), {str(PurePosixPath(name).with_suffix("")): name for name in there}
    return [n if n in exact else stems.get(str(PurePosixPath(n).with_suffix(""))) for n in collection.names]


def _read_condition(root: Path, files: tuple[str, ...], background: str, row: int) -> np.ndarray:
    try:
        return decode_file(root / files[row], None, background)
    except BadImage as reason:
        raise BadImage(f"its condition image {show(files[row])}: {reason}") from None


def _read_mask(collection: Collection, row: int) -> np.ndarray:
    """Mask (1, H, W) with the stored values that mean 0 and 1."""
    assert collection.mask is not None
    dtype = collection.read(row).dtype
    low, high = collection.value_range or (0.0, FULL_SCALE.get(dtype.name, 1.0))
    return np.where(collection.mask(row), high, low).astype(dtype)[None]
