"""The source ``hf-dataset``: data sets of the package datasets on this disk, with classes or captions.

A folder that ``save_to_disk`` wrote is read where it lies. Parquet files are converted by datasets, once, into its
cache (``HF_DATASETS_CACHE``), from which rows can be read in any order. Nothing is fetched.
"""

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.captions import clean_caption
from heterodiff.data.collection import Collection
from heterodiff.data.decoding import decode_file, decode_stream, suffix_of
from heterodiff.data.decoding.layout import channels_first, check_array_header, plain_numbers
from heterodiff.data.findings import BadImage, DataFinding, show
from heterodiff.data.sources.metadata import class_name
from heterodiff.errors import DataError, HeterodiffError, reason

TRAIN, HELD_OUT = "train", ("validation", "valid", "val", "dev")
"""Names of splits: to train on, and to hold out for validation."""


def open_hf_dataset(config: DataConfig) -> Collection:
    """List the rows of the data set at ``config.path``: a folder of ``save_to_disk``, parquet files, or one of them.

    Raises:
        DataError: datasets is not installed, or nothing there that it reads, or no column of images.
    """
    assert config.path is not None
    path = config.path.expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; correct data.path")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: data sets of this kind need datasets: pip install 'heterodiff[datasets]'") from None
    try:
        parts = _splits(path, datasets)
        features = next(iter(parts.values())).features
        column = _image_column(path, features, datasets)
        return _collected(path, parts, column, config, datasets)
    except HeterodiffError:
        raise
    except Exception as error:  # datasets and pyarrow raise nearly anything on damaged files
        raise DataError(f"{path}: not readable as a data set: {reason(error)}; save or copy it again") from None


def _splits(path: Path, datasets: Any) -> dict[str, Any]:
    """Return the rows to train on, and those that the data set itself holds out."""
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        found = datasets.load_from_disk(str(path))
    else:
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if not files or any(file.suffix != ".parquet" for file in files):
            raise DataError(f"{path}: expected a folder that save_to_disk wrote, a .parquet file or a folder of them")
        files_of: dict[str, list[str]] = {}
        for file in files:
            split = file.name.removesuffix(".parquet").partition("-")[0]
            files_of.setdefault(split if split in (TRAIN, "test", *HELD_OUT) else TRAIN, []).append(str(file))
        found = datasets.load_dataset("parquet", data_files=files_of)
    if not isinstance(found, dict):
        return {TRAIN: found}
    chosen = {name: found[name] for name in (TRAIN, *HELD_OUT) if name in found and len(found[name])}
    if TRAIN not in chosen:
        raise DataError(f"{path}: no split named {TRAIN}; it has {', '.join(map(show, found)) or 'none'}")
    return chosen


def _image_column(path: Path, features: Any, datasets: Any) -> str:
    """Return the name of the column of images, pictures or arrays."""
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D)
    found = [name for name, feature in features.items() if isinstance(feature, kinds)]
    if "image" in found or len(found) == 1:
        return "image" if "image" in found else found[0]
    listed = ", ".join(f"{show(name)} ({type(feature).__name__})" for name, feature in features.items())
    raise DataError(f"{path}: expected one column of images, or one named image, found the columns {listed}")


def _collected(path: Path, parts: dict[str, Any], column: str, config: DataConfig, datasets: Any) -> Collection:
    rows = [(name, row) for name, part in parts.items() for row in range(len(part))]
    classes: list[str | None] = [None] * len(rows)
    texts: list[list[str]] = [[] for _ in rows]
    problems: list[DataFinding] = []
    warnings: tuple[str, ...] = ()
    start = 0
    for name, part in parts.items():
        labels = _label_column(part.features, datasets) if config.labels != "none" else None
        text_column = next((key for key in (config.text_column, "caption") if key in part.features), None)
        wanted = labels or text_column
        for row, values in enumerate(part.select_columns([wanted]) if wanted else ()):
            found = values[wanted]
            try:
                if labels is not None:
                    classes[start + row] = _class_of(part.features[labels], found, datasets)
                else:
                    texts[start + row] = [clean_caption(one) for one in (found if isinstance(found, list) else [found])]
            except ValueError as error:
                problems.append(DataFinding(f"{name}/{row}", str(error)))
        start += len(part)
        if labels is not None and text_column is not None:
            warnings = ("classes are used, and captions are not; data.labels=none takes captions in their place",)
    pictures = isinstance(next(iter(parts.values())).features[column], datasets.Image)
    read = {
        name: part.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        if pictures
        else part.select_columns([column]).with_format("numpy")
        for name, part in parts.items()
    }
    held_out = tuple(name != TRAIN for name, _ in rows)
    names = tuple(f"{name}/{row}" for name, row in rows)
    wrong = {problem.name for problem in problems}
    sound = [place for place, name in enumerate(names) if name not in wrong]
    captioned = bool(sound) and all(texts[place] for place in sound)
    columns = {
        name: tuple(value for part in parts.values() for value in part[name])
        for name in config.columns
        if name in next(iter(parts.values())).features
    }
    collection = Collection(
        where=str(path),
        names=names,
        class_of=tuple(classes),
        read=partial(read_row, read, tuple(rows), column, config.channels, config.background),
        problems=tuple(problems),
        warnings=warnings,
        captions=tuple(tuple(dict.fromkeys(captions)) for captions in texts) if captioned else None,
        held_out=held_out if any(held_out) else None,
        columns=columns,
    )
    return collection.take(sound) if wrong else collection


def _label_column(features: Any, datasets: Any) -> str | None:
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return "label" if "label" in features else named[0] if len(named) == 1 else None


def _class_of(feature: Any, value: Any, datasets: Any) -> str | None:
    """Return the name of a class; None for no class. Raises ValueError if there is no such class."""
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        return None if value < 0 else str(feature.int2str(value))
    return class_name(value)


def read_row(
    parts: dict[str, Any],
    rows: tuple[tuple[str, int], ...],
    column: str,
    channels: int | None,
    background: str,
    row: int,
) -> np.ndarray:
    """Decode the image of ``row``, which is (split, row in it)."""
    name, place = rows[row]
    try:
        value = parts[name][place][column]
    except Exception as error:  # pyarrow raises nearly anything on damaged files
        raise BadImage(f"cannot be read: {reason(error)}") from None
    if value is None:
        raise BadImage("no image")
    if isinstance(value, np.ndarray):
        check_array_header(value.shape, value.dtype)
        return plain_numbers(channels_first(value, channels))
    content = value["bytes"]
    if content is None:
        return decode_file(Path(value["path"]), channels, background)
    suffix = suffix_of(content[:16], Path(value["path"] or "").suffix)
    return decode_stream(io.BytesIO(content), suffix, len(content), channels, background)
