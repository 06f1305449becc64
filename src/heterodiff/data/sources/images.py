"""The source ``images``: a folder of image files or one npz file."""

from functools import partial
from pathlib import Path

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.collection import Collection, read_array, read_file
from heterodiff.data.decoding import SUFFIXES, array_names, opened_npz, read_member
from heterodiff.data.decoding.layout import channel_axis
from heterodiff.data.findings import BadImage
from heterodiff.data.sources.metadata import find_metadata, has_column, read_columns, read_metadata
from heterodiff.data.sources.scan import FolderScan, scan_folder
from heterodiff.errors import DataError

MAX_LABELS_BYTES = 1_000_000_000


def open_images(config: DataConfig) -> Collection:
    """List the images of ``config.path`` and their labels; nothing is decoded yet (except an npz file).

    Raises:
        DataError: nothing there, nothing in it, or an unusable metadata or npz file.
    """
    assert config.path is not None
    path = config.path.expanduser()
    if path.is_file() and path.suffix.lower() == ".npz":
        return _open_npz(path, config)
    if not path.exists():
        raise DataError(f"{path}: no such folder; correct data.path")
    if not path.is_dir():
        raise DataError(f"{path}: a file; expected a folder of images or an .npz file in data.path")
    return _open_folder(path, config)


def _open_folder(root: Path, config: DataConfig) -> Collection:
    labelled = config.labels != "none"
    metadata = find_metadata(root)
    if metadata and config.columns and config.labels == "auto":  # the columns may be all that there is
        labelled = has_column(metadata, "label")
    class_of: dict[str, str | None]
    class_of, problems = read_metadata(metadata, labelled) if metadata else ({}, [])
    scan = scan_folder(root)
    warnings = list(scan.warnings)
    if metadata:
        if unlisted := len(set(scan.files) - class_of.keys()):
            warnings.append(f"{unlisted:,} images are not listed in {metadata.name} and were left out")
    elif not scan.files and not scan.unreadable:
        hint = f"; {scan.warnings[0]}" if scan.warnings else ""
        raise DataError(f"{root}: no images found; expected files of type {', '.join(SUFFIXES)}{hint}")
    else:
        class_of = {name: name.split("/")[0] if "/" in name and labelled else None for name in scan.files}
        warnings += _class_folder_warnings(scan, list(class_of.values()))
    names = tuple(sorted(class_of))
    return Collection(
        where=str(root),
        names=names,
        class_of=tuple(class_of[name] for name in names),
        read=partial(read_file, root, names, config.channels, config.background),
        unreadable=scan.unreadable,
        problems=tuple(problems),
        warnings=tuple(warnings),
        columns=read_columns(metadata, names) if metadata and config.columns else {},
    )


def _class_folder_warnings(scan: FolderScan, class_of: list[str | None]) -> list[str]:
    if not any(class_of):
        return []
    warnings = []
    if empty := [folder for folder in scan.first_level if folder not in class_of]:
        warnings.append(f"subfolders without images are not classes: {', '.join(empty[:10])}")
    if loose := class_of.count(None):
        warnings.append(f"{loose:,} images lie beside the class subfolders; they are used without a label")
    return warnings


def _open_npz(path: Path, config: DataConfig) -> Collection:
    with opened_npz(path) as archive:
        there = array_names(archive)
        key = next((key for key in ("image", "images") if key in there), None)
        if key is None:
            raise BadImage(f"arrays {there[:10]}; expected one named 'image' or 'images'")
        try:
            images = read_member(archive, key, int(config.memory_limit_gb * 1e9))
        except BadImage as reason:
            raise BadImage(f"{reason}: raise data.memory_limit_gb or save one npy file per image") from None
        label_key = next((key for key in ("label", "labels") if key in there), None)
        labels = read_member(archive, label_key, MAX_LABELS_BYTES) if label_key else None
        columns = {key: read_member(archive, key, MAX_LABELS_BYTES) for key in config.columns if key in there}
        if images.ndim not in (3, 4) or images.dtype.kind not in "buif" or 0 in images.shape:
            raise BadImage(
                f"'{key}' has shape {images.shape} and type {images.dtype}; expected numbers of shape (N, H, W), "
                "(N, H, W, C) or (N, C, H, W)"
            )
        if images.ndim == 3:
            images = images[:, None]
        else:
            images = np.moveaxis(images, 1 + channel_axis(images.shape[1:], config.channels), 1)
    names = tuple(str(index) for index in range(len(images)))
    class_of = _npz_classes(path, labels, len(images)) if config.labels != "none" else (None,) * len(images)
    for column, values in columns.items():
        if values.shape != (len(images),) or values.dtype.kind not in "buifU":
            raise DataError(
                f"{path}: '{column}' has shape {values.shape} and type {values.dtype}; expected ({len(images)},) "
                "numbers or texts, one for each image"
            )
    of_images = {key: tuple(values.tolist()) for key, values in columns.items()}
    return Collection(str(path), names, class_of, partial(read_array, images), columns=of_images)


def _npz_classes(path: Path, labels: np.ndarray | None, count: int) -> tuple[str | None, ...]:
    """Return class names of integers (-1 = unlabelled) or texts (empty = unlabelled)."""
    if labels is None:
        return (None,) * count
    if labels.shape != (count,) or labels.dtype.kind not in "uiU":
        raise DataError(
            f"{path}: labels of shape {labels.shape} and type {labels.dtype}; expected ({count},) integers or texts, "
            "one for each image; data.labels=none ignores them"
        )
    unlabelled = "" if labels.dtype.kind == "U" else "-1"
    return tuple(None if label == unlabelled else label for label in (str(value) for value in labels))
