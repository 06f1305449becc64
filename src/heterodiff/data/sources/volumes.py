"""The source ``volumes``: slices of patients, from NIfTI volumes (made once and kept) or from one npz file."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from heterodiff.config import DataConfig, VolumesConfig
from heterodiff.data.collection import Collection
from heterodiff.data.decoding import array_names, opened_npz, read_member, steadily
from heterodiff.data.decoding.nifti import LAYOUTS, Layout, PatientFiles, find_patients, label_problem, read_patient
from heterodiff.data.decoding.resize import Size
from heterodiff.data.findings import BadImage
from heterodiff.data.heights import entangled, patients_and_heights
from heterodiff.data.sources.slice_files import holds_slices, open_slice_files
from heterodiff.data.sources.slices import (
    CLASSES,
    PERCENTILE,
    VERSION,
    foreground_top,
    resize_slices,
    slice_patient,
    stretch_slice,
)
from heterodiff.errors import CheckpointError, DataError
from heterodiff.files import read_json, replacing, write_text

DEFAULT_SIZE = (128, 128)


def layout_of(config: VolumesConfig) -> Layout:
    """Return the file name patterns: those of the layout, or the user's own."""
    known = LAYOUTS[config.layout]
    return Layout(config.modalities or known.modalities, config.mask or known.mask)


def channel_names(config: DataConfig, count: int) -> list[str]:
    """Return the names of the modalities, where they are known, else ``channel 0`` and so on."""
    names = list(layout_of(config.volumes).modalities) if known_fingerprint(config) else []
    return names if len(names) == count else [f"channel {channel}" for channel in range(count)]


def preprocessing(config: DataConfig) -> dict[str, Any]:
    """Return every setting that changes the slices of given volumes, ready for JSON."""
    kept = {
        "version": VERSION,
        "channels": list(layout_of(config.volumes).modalities),
        "image_size": list(config.image_size or DEFAULT_SIZE),
        "percentile": PERCENTILE,
        "least_brain": config.volumes.least_brain,
    }
    # Runs of before the key have no such entry.
    return kept if config.volumes.normalization == "slice" else kept | {"normalization": config.volumes.normalization}


def fingerprint(config: DataConfig) -> str:
    """Sixteen letters that change whenever :func:`preprocessing` does."""
    return hashlib.sha256(json.dumps(preprocessing(config), sort_keys=True).encode()).hexdigest()[:16]


def known_fingerprint(config: DataConfig) -> str | None:
    """Return the :func:`fingerprint` of the slices of ``config``; ``None`` if they were not made here (npz files)."""
    if config.source != "volumes" or config.path is None:
        return None
    if config.path.suffix.lower() == ".npz" or holds_slices(config.path.expanduser()):
        return None
    return fingerprint(config)


def finish_slice(config: VolumesConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Return what is done to a slice (C, H, W) whose patient has been scaled, when it is read."""
    return stretch_slice if config.normalization == "slice" else unchanged


def unchanged(image: np.ndarray) -> np.ndarray:
    """Return ``image``; a function with a name, which worker processes can be sent."""
    return image


def slices_folder(config: DataConfig) -> Path | None:
    """Folder in which the slices of ``config`` are kept; ``None`` for data that are not sliced here."""
    if known_fingerprint(config) is None or config.path is None:
        return None
    return _slices_folder(config.path.expanduser(), config)


def _slices_folder(path: Path, config: DataConfig) -> Path:
    return (config.volumes.cache or path.with_name(f"{path.name}_slices")) / fingerprint(config)


@lru_cache(maxsize=64)
def _mapped(path: Path) -> np.ndarray:
    return steadily(lambda: np.load(path, mmap_mode="r", allow_pickle=False))


@dataclass(frozen=True)
class KeptSlices:
    """Row ``i`` is slice ``rows[i][1]`` of the arrays in files ``rows[i][0]`` + ``.image.npy`` and ``.mask.npy``."""

    rows: tuple[tuple[Path, int], ...]
    finish: Callable[[np.ndarray], np.ndarray]

    def __call__(self, row: int) -> np.ndarray:
        return self.finish(self._read(row, "image").astype(np.float32))

    def mask(self, row: int) -> np.ndarray:
        try:
            return self._read(row, "mask").astype(bool)
        except BadImage as reason:  # no image is bad here, and callers expect none
            raise DataError(str(reason)) from None

    def _read(self, row: int, kind: str) -> np.ndarray:
        stem, index = self.rows[row]
        path = Path(f"{stem}.{kind}.npy")
        try:
            return np.array(_mapped(path)[index])
        except (OSError, ValueError, IndexError, EOFError) as error:
            raise BadImage(
                f"{path}: kept slices cannot be read ({error}); delete the folder to make them again"
            ) from None


def open_volumes(config: DataConfig) -> Collection:
    """Return the slices: float32 (N, C, H, W), each channel of a slice stretched to [0, 1], with patients and masks.

    Volumes below ``data.path`` are cut into slices once and kept in ``data.volumes.cache``; a start that was
    interrupted can be repeated. An npz file holds ``image`` (N, C, H, W), ``patient`` (N,) and, to learn from, ``mask``
    (N, H, W). A folder may also hold slices made elsewhere, see :mod:`heterodiff.data.sources.slice_files`. Slices
    whose mask is empty are "healthy", all others "unhealthy"; without masks they have no class.

    Raises:
        DataError: nothing usable there, or a patient's volumes that cannot be used.
    """
    assert config.path is not None
    path = config.path.expanduser()
    if path.suffix.lower() == ".npz":
        return _open_npz(path, config)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder of patients; correct data.path")
    if holds_slices(path):
        return _warned(open_slice_files(path, config, config.image_size or DEFAULT_SIZE))
    layout = layout_of(config.volumes)
    patients = find_patients(path, layout)
    with_mask = [patient for patient in patients if patient.mask]
    if with_mask and len(with_mask) < len(patients):
        without = next(patient for patient in patients if not patient.mask)
        raise DataError(
            f"{path}: {len(with_mask)} of {len(patients)} patients have a mask {layout.mask}.nii[.gz], {without.name} "
            "has none; add an empty one for healthy patients, or move such patients to a folder of their own"
        )
    folder = _slices_folder(path, config)
    rows: list[tuple[PatientFiles, int, bool]] = []
    places: list[tuple[Path, int]] = []
    for number, patient in enumerate(patients, start=1):
        progress = f"patient {number} of {len(patients)}" if len(patients) > 3 else ""
        stem, facts = _sliced(patient, folder, config, progress)
        unhealthy = facts["unhealthy"] or [False] * len(facts["index"])
        rows += [(patient, z, ill) for z, ill in zip(facts["index"], unhealthy, strict=True)]
        places += [(stem, k) for k in range(len(facts["index"]))]
    if not rows:
        raise DataError(f"{path}: no slice shows enough of the brain; lower data.volumes.least_brain")
    labelled = config.labels != "none" and bool(with_mask)
    reader = KeptSlices(tuple(places), finish_slice(config.volumes))
    names = tuple(f"{patient.name}/{z:04d}" for patient, z, _ in rows)
    return Collection(
        where=str(path),
        names=names,
        class_of=tuple(CLASSES[ill] if labelled else None for _, _, ill in rows),
        read=reader,
        value_range=(0.0, 1.0),
        groups=tuple(patient.patient for patient, _, _ in rows),
        mask=reader.mask if with_mask else None,
        warnings=_told_by_height(names, [ill for _, _, ill in rows]) if labelled else (),
    )


def _warned(collection: Collection) -> Collection:
    """Return a labelled ``collection`` with the warning on heights, if there is one."""
    if collection.class_of[:1] in ((), (None,)):
        return collection
    ill = [name == CLASSES[1] for name in collection.class_of]
    return replace(collection, warnings=_told_by_height(collection.names, ill))


def _told_by_height(names: Sequence[str], unhealthy: Sequence[bool]) -> tuple[str, ...]:
    """Warn where labels of slices are those of their heights."""
    patients, heights = patients_and_heights(names, "volumes")
    assert heights is not None  # names of slices tell them
    warning = entangled(heights, np.array(unhealthy), patients)
    return (warning,) if warning else ()


def _file_stem(name: str) -> str:
    """Return a file name without suffix for a patient; different patients get different ones."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}_{digest}"


def _sliced(patient: PatientFiles, folder: Path, config: DataConfig, progress: str) -> tuple[Path, dict[str, Any]]:
    """Return the path without suffix and the facts of a patient's kept slices, made anew if its files have changed."""
    stem = folder / _file_stem(patient.name)
    facts_file, image, mask = (Path(f"{stem}.{suffix}") for suffix in ("json", "image.npy", "mask.npy"))
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in patient.files]
    try:
        facts = read_json(facts_file)
        if facts["stamp"] == stamp and image.is_file() and (patient.mask is None or mask.is_file()):
            return stem, facts
    except (CheckpointError, KeyError):
        pass
    if progress:
        print(f"slicing  {progress}: {patient.name}", file=sys.stderr, flush=True)
    slices = slice_patient(read_patient(patient), config.image_size or DEFAULT_SIZE, config.volumes.least_brain)
    unhealthy = None if slices.unhealthy is None else slices.unhealthy.tolist()
    facts = {"stamp": stamp, "index": slices.index.tolist(), "unhealthy": unhealthy}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(image, slices.image.astype(np.float16))
        if slices.mask is not None:
            _write(mask, slices.mask)
        write_text(facts_file, json.dumps(facts))  # last: with it, the patient is done
    except OSError as error:
        raise DataError(
            f"{folder}: slices cannot be kept here ({error.strerror}); name another folder in data.volumes.cache"
        ) from None
    return stem, facts


def _write(path: Path, array: np.ndarray) -> None:
    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


# --- slices in one npz file ------------------------------------------------------------------------


@dataclass(frozen=True)
class ArraySlices:
    """Row ``i`` of ``image`` (N, C, H, W) at ``size``, divided by ``top`` (N, C) or stretched; ``mask`` likewise."""

    image: np.ndarray
    mask_array: np.ndarray | None
    size: Size
    top: np.ndarray | None = None

    def __call__(self, row: int) -> np.ndarray:
        picture = self.image[row : row + 1].astype(np.float32)
        if self.top is None:
            return stretch_slice(resize_slices(picture, self.size, "bilinear")[0])
        return resize_slices(np.clip(picture / self.top[row, :, None, None], 0, 1), self.size, "bilinear")[0]

    def mask(self, row: int) -> np.ndarray:
        assert self.mask_array is not None
        mask = self.mask_array[row : row + 1, None].astype(np.float32)
        return resize_slices(mask, self.size, "nearest-exact")[0, 0] > 0.5


def patient_tops(image: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Return the 99th percentile of the values above 0 of each channel of each slice's patient, (N, C)."""
    tops = np.ones(image.shape[:2], np.float32)
    _, of = np.unique(np.asarray(patients), return_inverse=True)
    for patient in range(of.max(initial=-1) + 1):
        rows = np.flatnonzero(of == patient)
        for channel in range(image.shape[1]):
            tops[rows, channel] = foreground_top(image[rows, channel])
    return tops


def _open_npz(path: Path, config: DataConfig) -> Collection:
    if not path.is_file():
        raise DataError(f"{path}: no such file of slices; correct data.path")
    with opened_npz(path) as archive:
        there = set(array_names(archive))
        if missing := {"image", "patient"} - there:
            raise BadImage(f"no array '{min(missing)}'; expected image, patient and mask, found {sorted(there)}")
        limit = int(config.memory_limit_gb * 1e9)
        arrays = {key: read_member(archive, key, limit) for key in ("image", "patient", "mask", "z") if key in there}
    image, patient, mask = arrays["image"], arrays["patient"], arrays.get("mask")
    count = len(image) if image.ndim else 0
    for name, found, expected in (
        ("image", image.shape, (count, *image.shape[1:4]) if image.ndim == 4 else "(N, C, H, W)"),
        ("patient", patient.shape, (count,)),
        ("mask", None if mask is None else mask.shape, None if mask is None else (count, *image.shape[2:])),
    ):
        if found != expected:
            raise DataError(f"{path}: '{name}' has the shape {found}, expected {expected}")
    if not np.isfinite(image).all():
        raise DataError(f"{path}: 'image' holds NaN or infinite values; repair it")
    if mask is not None and (problem := label_problem(mask)):
        raise DataError(f"{path}: 'mask': {problem}")
    groups = tuple(str(value) for value in patient)
    z = arrays.get("z", np.arange(count))
    names = tuple(f"{group}/{int(index):04d}" for group, index in zip(groups, z, strict=True))
    if len(set(names)) < count:
        raise DataError(f"{path}: slices of a patient share a number in 'z'; leave 'z' out or correct it")
    top = patient_tops(image, groups) if config.volumes.normalization == "patient" else None
    reader = ArraySlices(image, mask, config.image_size or DEFAULT_SIZE, top)
    labelled = config.labels != "none" and mask is not None
    unhealthy = [mask is not None and bool(mask[row].any()) for row in range(count)]
    return Collection(
        where=str(path),
        names=names,
        class_of=tuple(CLASSES[value] if labelled else None for value in unhealthy),
        read=reader,
        value_range=(0.0, 1.0),
        groups=groups,
        mask=None if mask is None else reader.mask,
        warnings=_told_by_height(names, unhealthy) if labelled else (),
    )
