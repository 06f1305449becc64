"""Slices that another program made: folders ``patient_*`` with a file ``slice_*.npz`` for each slice, as of AnoFPDM."""

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from heterodiff.config import DataConfig
from heterodiff.data.collection import Collection
from heterodiff.data.decoding import array_names, read_member
from heterodiff.data.decoding.layout import plain_numbers
from heterodiff.data.decoding.nifti import label_problem
from heterodiff.data.decoding.resize import Size
from heterodiff.data.findings import BadImage, DataFinding
from heterodiff.data.sources.slices import CLASSES, foreground_top, resize_slices, stretch_slice
from heterodiff.errors import DataError, reason

PATTERNS = ("patient_*/slice_*.npz", "*/patient_*/slice_*.npz")
"""Files below the data folder; between may be a folder for each part of the data, such as ``train``."""
IMAGE, MASK = "x", "y"
"""Arrays of a file: (C, H, W) of the image and, to learn from, (H, W) or (1, H, W) of its mask."""


@dataclass(frozen=True)
class SlicePatient:
    """Files of a patient's slices in the order of their numbers, ``index``; ``name`` is that of the folder."""

    name: str
    files: tuple[Path, ...]
    index: tuple[int, ...]

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def holds_slices(path: Path) -> bool:
    """Return whether ``path`` is a folder with such files."""
    return path.is_dir() and any(next(path.glob(pattern), None) is not None for pattern in PATTERNS)


def find_slice_patients(root: Path) -> list[SlicePatient]:
    """List the patients below ``root``.

    Raises:
        DataError: a file without a number, one number twice, or two folders of one name.
    """
    folders: dict[Path, dict[int, Path]] = {}
    for path in sorted(path for pattern in PATTERNS for path in root.glob(pattern)):
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise DataError(f"{path}: expected a name with the number of the slice, such as slice_12.npz")
        of_patient, number = folders.setdefault(path.parent, {}), int(numbers[-1])
        if number in of_patient:
            raise DataError(f"{path}: {of_patient[number].name} is the same slice of this patient; remove one of them")
        of_patient[number] = path
    names: dict[str, Path] = {}
    for folder in folders:
        if folder.name in names:
            raise DataError(
                f"{folder}: patient {folder.name} is there twice, also as {names[folder.name]}; rename or remove one, "
                "so that no patient is both trained on and tested with"
            )
        names[folder.name] = folder
    return [
        SlicePatient(folder.name, tuple(slices[k] for k in sorted(slices)), tuple(sorted(slices)))
        for folder, slices in sorted(folders.items(), key=lambda item: item[0].name)
    ]


def read_array(path: Path, key: str) -> np.ndarray | None:
    """Read an array of a file; None if it has none of that name. Raises BadImage."""
    try:
        with zipfile.ZipFile(path) as archive:
            if key not in (there := array_names(archive)):
                if key == MASK:
                    return None
                raise BadImage(f"no array '{key}'; expected {IMAGE} (C, H, W) and {MASK} (mask), found {there[:5]}")
            return read_member(archive, key, None)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything on damaged files
        raise BadImage(f"not readable as npz: {reason(error)}") from None


def read_picture(path: Path) -> np.ndarray:
    """Read the image (C, H, W) of a file, float32 and finite. Raises BadImage."""
    image = read_array(path, IMAGE)
    assert image is not None
    if image.ndim != 3:
        raise BadImage(f"'{IMAGE}' has the shape {image.shape}, expected (C, H, W)")
    return plain_numbers(image).astype(np.float32)


def read_mask(path: Path) -> np.ndarray | None:
    """Read the mask (H, W) of a file, bool; None if it has none. Raises BadImage."""
    labels = read_array(path, MASK)
    if labels is None:
        return None
    labels = plain_numbers(labels)
    flat = labels[0] if labels.ndim == 3 and len(labels) == 1 else labels
    if flat.ndim != 2:
        raise BadImage(f"'{MASK}' has the shape {labels.shape}, expected a mask (H, W) or (1, H, W)")
    if problem := label_problem(flat):
        raise BadImage(f"'{MASK}': {problem}")
    return flat > 0


@lru_cache(maxsize=4096)
def _tops(files: tuple[Path, ...]) -> np.ndarray:
    """99th percentile of the values above 0 of each channel of a patient, (C, 1, 1)."""
    pictures = [read_picture(path) for path in files]
    if len({picture.shape[0] for picture in pictures}) > 1:
        raise BadImage("slices of this patient have different numbers of channels")
    channels = ([picture[channel].ravel() for picture in pictures] for channel in range(len(pictures[0])))
    tops = [foreground_top(np.concatenate(channel)) for channel in channels]
    return np.array(tops, np.float32)[:, None, None]


def scaled_picture(patient: SlicePatient, path: Path, normalization: str, size: Size) -> np.ndarray:
    """Return the image of a file at ``size``, (C, h, w) in [0, 1]. Raises BadImage."""
    picture = read_picture(path)
    if normalization == "slice":
        return stretch_slice(resize_slices(picture[None], size, "bilinear")[0])
    if picture.min() < 0:
        raise BadImage("values below 0, so no background at 0; set data.volumes.normalization=slice")
    return resize_slices(np.clip(picture / _tops(patient.files), 0, 1)[None], size, "bilinear")[0]


@dataclass(frozen=True)
class SliceFiles:
    """Row ``i`` is the file ``rows[i][1]`` of patient ``rows[i][0]``, read at each access."""

    rows: tuple[tuple[SlicePatient, Path], ...]
    normalization: str
    size: Size

    def __call__(self, row: int) -> np.ndarray:
        patient, path = self.rows[row]
        return scaled_picture(patient, path, self.normalization, self.size)

    def mask(self, row: int) -> np.ndarray:
        path = self.rows[row][1]
        try:
            mask = read_mask(path)
        except BadImage as problem:  # no image is bad here, and callers expect none
            raise DataError(f"{path}: {problem}") from None
        assert mask is not None
        return resize_slices(mask[None, None].astype(np.float32), self.size, "nearest-exact")[0, 0] > 0.5


def open_slice_files(root: Path, config: DataConfig, size: Size) -> Collection:
    """Return the slices below ``root``, with patients, and masks where the files have any.

    Raises:
        DataError: as :func:`find_slice_patients`; or some files have a mask and others none.
    """
    rows: list[tuple[SlicePatient, Path]] = []
    names: list[str] = []
    unhealthy: list[bool | None] = []
    bad: list[DataFinding] = []
    for patient in find_slice_patients(root):
        for number, path in zip(patient.index, patient.files, strict=True):
            try:
                mask = read_mask(path)
            except BadImage as problem:
                bad.append(DataFinding(path.relative_to(root).as_posix(), str(problem)))
                continue
            rows.append((patient, path))
            names.append(f"{patient.name}/{number:04d}")
            unhealthy.append(None if mask is None else bool(mask.any()))
    refuse_some_without(root, rows, unhealthy)
    with_mask = bool(unhealthy) and unhealthy[0] is not None
    labelled = config.labels != "none" and with_mask
    reader = SliceFiles(tuple(rows), config.volumes.normalization, size)
    return Collection(
        where=str(root),
        names=tuple(names),
        class_of=tuple(CLASSES[bool(ill)] if labelled else None for ill in unhealthy),
        read=reader,
        value_range=(0.0, 1.0),
        unreadable=tuple(bad),
        groups=tuple(patient.name for patient, _ in rows),
        mask=reader.mask if with_mask else None,
    )


def refuse_some_without(
    root: Path, rows: Sequence[tuple[SlicePatient, Path]], unhealthy: Sequence[bool | None]
) -> None:
    """Raise DataError if some files have a mask and others none."""
    without = [row for row, ill in enumerate(unhealthy) if ill is None]
    if 0 < len(without) < len(rows):
        path = rows[without[0]][1]
        raise DataError(
            f"{root}: {len(rows) - len(without):,} of {len(rows):,} slices have a mask '{MASK}', "
            f"{path.relative_to(root).as_posix()} has none; add an empty one for healthy slices"
        )
