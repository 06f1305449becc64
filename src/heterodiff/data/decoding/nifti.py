"""Patients as NIfTI volumes: finding the files of each, and reading them in one orientation."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from heterodiff.errors import DataError, reason

MAX_VOXELS = 300_000_000
DEFLATE_RATIO = 1032
"""The most that a byte of gzip can hold, in bytes."""
SUFFIXES = (".nii", ".nii.gz")
AFFINE_TOLERANCE = 1e-3
"""Millimetres by which affines of a patient's volumes may differ: headers store them in single precision."""
MOST_NEGATIVE = 0.1
"""Share of a volume's intensity that may lie below 0: interpolation leaves little there, z-scoring half."""


@dataclass(frozen=True)
class Layout:
    """File names of a patient's volumes, patterns as in a shell, without the suffix .nii or .nii.gz.

    Attributes:
        modalities: pattern of each modality by its name, in the order of the channels.
        mask: pattern of the mask, which need not be there.
    """

    modalities: Mapping[str, str]
    mask: str


LAYOUTS = {
    "brats": Layout({"flair": "*[_-]flair", "t1": "*[_-]t1", "t1ce": "*[_-]t1ce", "t2": "*[_-]t2"}, "*[_-]seg"),
    "atlas": Layout({"t1": "*_T1w"}, "*_mask"),
}


@dataclass(frozen=True)
class PatientFiles:
    """Files of a patient's volumes, or of one of its scans.

    Attributes:
        name: unique name of the scan: its folder below the data folder, or from ``sub-*`` on, without ``anat`` (BIDS).
        volumes: file of each modality, in the order of the channels.
        mask: file of the mask, where there is one.
    """

    name: str
    volumes: tuple[Path, ...]
    mask: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        return self.volumes if self.mask is None else (*self.volumes, self.mask)

    @property
    def patient(self) -> str:
        """Name of the patient: ``sub-*`` where that of the scan starts so, else the whole name."""
        return self.name.split("/")[0] if self.name.startswith("sub-") else self.name


@dataclass(frozen=True)
class Patient:
    """A patient's volumes in canonical orientation: axes to the right, to the front and up (RAS), as near as may be.

    Attributes:
        image: (C, X, Y, Z) float32.
        mask: (X, Y, Z) bool, where there is one.
    """

    image: np.ndarray
    mask: np.ndarray | None


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def find_patients(root: Path, layout: Layout) -> list[PatientFiles]:
    """List the scans of patients below ``root``: every folder that holds volumes. Links are followed.

    Raises:
        DataError: no volumes, a modality missing or there twice, two masks, or two patients of one name.
    """
    folders: dict[Path, list[Path]] = {}
    for path in sorted(files_below(root)):
        if is_nifti(path) and not path.name.startswith("."):
            folders.setdefault(path.parent, []).append(path)
    if not folders:
        wanted = ", ".join(f"{pattern}.nii[.gz] ({name})" for name, pattern in layout.modalities.items())
        raise DataError(f"{root}: no .nii or .nii.gz files; expected one folder per patient with {wanted}")
    patients = [_patient_of(root, folder, files, layout) for folder, files in folders.items()]
    seen: dict[str, str] = {}
    for patient in patients:
        short = patient.name if patient.name.startswith("sub-") else Path(patient.name).name
        place = patient.volumes[0].parent.relative_to(root).as_posix()
        if short.casefold() in seen:
            raise DataError(
                f"{root}: patient {short} is there twice, as {seen[short.casefold()]} and {place}; "
                "rename or remove one, so that no patient is both trained on and tested with"
            )
        seen[short.casefold()] = place
    return patients


def files_below(root: Path) -> Iterator[Path]:
    """Yield all files below ``root``, also through links, which may lead back: each folder is entered once."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (Path(folder, name) for name in names)


def _scan_name(root: Path, folder: Path) -> str:
    parts = folder.relative_to(root).parts
    first = next((number for number, part in enumerate(parts) if part.startswith("sub-")), None)
    if first is None:
        return "/".join(parts) or root.name
    return "/".join(part for part in parts[first:] if part != "anat")


def _patient_of(root: Path, folder: Path, files: list[Path], layout: Layout) -> PatientFiles:
    def matching(pattern: str) -> list[Path]:
        names = tuple(f"{pattern.casefold()}{suffix}" for suffix in SUFFIXES)
        return [path for path in files if any(fnmatch(path.name.casefold(), name) for name in names)]

    volumes = []
    for name, pattern in layout.modalities.items():
        found = matching(pattern)
        if len(found) != 1:
            there = ", ".join(path.name for path in (found or files)[:6])
            problem = f"{len(found)} files of modality {name}" if found else f"modality {name} is missing"
            raise DataError(
                f"{folder}: {problem}: expected one {pattern}.nii[.gz], found {there}; correct the files, or the "
                "names in data.volumes.modalities"
            )
        volumes.append(found[0])
    masks = matching(layout.mask)
    if len(masks) > 1:
        there = ", ".join(path.name for path in masks)
        raise DataError(f"{folder}: expected one mask {layout.mask}.nii[.gz], found {there}; see data.volumes.mask")
    return PatientFiles(_scan_name(root, folder), tuple(volumes), masks[0] if masks else None)


def load_nifti(path: Path) -> Any:
    """Open a NIfTI file with nibabel.

    Raises:
        DataError: nibabel is not installed, or the file cannot be read.
    """
    try:
        import nibabel
    except ImportError:
        raise DataError(f"{path}: reading NIfTI files needs nibabel: pip install 'heterodiff[mri]'") from None
    try:
        return nibabel.load(path)
    except Exception as error:  # nibabel raises what its readers raise
        raise DataError(f"{path}: not a NIfTI file that can be read ({reason(error)})") from None


def read_voxels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels (X, Y, Z) float32 and the affine (4, 4) of a volume, in canonical orientation.

    Raises:
        DataError: unreadable or truncated, not three axes, no voxels, an affine that cannot be used, or values that are
            not finite.
    """
    file = load_nifti(path)
    shape = tuple(file.shape)
    if len(shape) == 4 and shape[3] == 1:
        file = file.slicer[..., 0]
    elif len(shape) != 3:
        raise DataError(
            f"{path}: expected a volume of 3 axes, found {len(shape)} ({'x'.join(map(str, shape))}); give each "
            "modality a file of its own"
        )
    if 0 in shape:
        raise DataError(f"{path}: a volume without voxels ({'x'.join(map(str, shape))})")
    _refuse_impossible_size(path, shape, file.dataobj.dtype.itemsize)
    if not np.isfinite(file.affine).all() or np.linalg.matrix_rank(file.affine[:3, :3]) < 3:
        raise DataError(
            f"{path}: its affine cannot be used: expected finite numbers that span three axes, found "
            f"{file.affine[:3].tolist()}; correct sform or qform in its header"
        )
    import nibabel

    try:
        canonical = nibabel.as_closest_canonical(file)
        voxels = np.asarray(canonical.dataobj, dtype=np.float32)
    except Exception as error:
        raise DataError(f"{path}: cannot be read to its end ({reason(error)}); copy it again") from None
    bad = voxels.size - int(np.isfinite(voxels).sum())
    if bad:
        raise DataError(f"{path}: {bad:,} voxels are NaN or infinite; repair the file")
    return voxels, canonical.affine


def _refuse_impossible_size(path: Path, shape: tuple[int, ...], itemsize: int) -> None:
    """Refuse by the header, before memory is asked for, what a file cannot hold, or no scanner makes."""
    voxels, size, sides = math.prod(shape), path.stat().st_size, "x".join(map(str, shape))
    most = size * (DEFLATE_RATIO if path.name.lower().endswith(".gz") else 1)
    if voxels * itemsize > most:
        raise DataError(
            f"{path}: its header declares {sides} voxels, which its {size:,} bytes cannot hold; copy it again"
        )
    if voxels > MAX_VOXELS:
        raise DataError(f"{path}: {sides} voxels, at most {MAX_VOXELS:,} are read; resample or crop the volume")


def read_patient(files: PatientFiles) -> Patient:
    """Read all volumes of a patient.

    Raises:
        DataError: as :func:`read_voxels`; volumes that differ in shape or affine, an empty volume, one with
            much below 0, or a mask whose values are not whole numbers from 0 up.
    """
    volumes: list[np.ndarray] = []
    first_affine: np.ndarray | None = None
    for path in files.files:
        voxels, affine = read_voxels(path)
        if first_affine is None:
            first_affine = affine
        elif voxels.shape != volumes[0].shape:
            found, expected = ("x".join(map(str, v.shape)) for v in (voxels, volumes[0]))
            raise DataError(
                f"{path}: {found} voxels, but {files.volumes[0].name} has {expected}; register the volumes to "
                "each other"
            )
        elif not np.allclose(affine, first_affine, atol=AFFINE_TOLERANCE):
            difference = float(np.abs(affine - first_affine).max())
            raise DataError(
                f"{path}: its affine differs from that of {files.volumes[0].name} by {difference:.3g} mm; register the "
                "volumes to each other"
            )
        if path != files.mask and voxels.min() == voxels.max():
            raise DataError(f"{path}: an empty volume, every voxel is {voxels.flat[0]:g}")
        if path != files.mask:
            _refuse_negative(path, voxels)
        volumes.append(voxels)
    mask = None
    if files.mask:
        labels = volumes.pop()
        if problem := label_problem(labels):
            raise DataError(f"{files.mask}: {problem}")
        mask = labels > 0
    return Patient(np.stack(volumes), mask)


def _refuse_negative(path: Path, voxels: np.ndarray) -> None:
    """Foreground is above 0: half of the tissue of a z-scored volume would be lost silently."""
    below = voxels < 0
    share = -voxels[below].sum(dtype=np.float64) / np.abs(voxels).sum(dtype=np.float64)
    if share > MOST_NEGATIVE and not below.all():  # where all are, no slice shows any brain, which is reported later
        raise DataError(
            f"{path}: {below.mean():.0%} of its voxels are below 0, as after z-scoring, and would count as background; "
            "expected background at 0 and tissue above it; use the volumes from before z-scoring"
        )


def label_problem(labels: np.ndarray) -> str | None:
    """Return the reason why ``labels`` are no mask, or ``None``."""
    wrong = labels[~((labels >= 0) & (labels == np.round(labels)))]
    if not wrong.size:
        return None
    return (
        f"a mask has whole numbers from 0 up, found {wrong[0]:g}; give healthy voxels the label 0, and resample masks "
        "by nearest neighbours"
    )
