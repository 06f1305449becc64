"""Patients to segment: NIfTI volumes cut into slices and put together again, or slices in npz files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterodiff.config import DataConfig
from heterodiff.data.decoding.nifti import PatientFiles, load_nifti, read_patient
from heterodiff.data.findings import BadImage
from heterodiff.data.sources.slice_files import SlicePatient, read_picture, scaled_picture
from heterodiff.data.sources.slices import from_pictures, restore_slices, slice_patient
from heterodiff.data.sources.volumes import DEFAULT_SIZE, finish_slice
from heterodiff.errors import DataError
from heterodiff.files import fresh, replacing
from heterodiff.pipelines.anomalies.segment import Segmentation

AnyPatient = PatientFiles | SlicePatient


@dataclass(frozen=True)
class OpenedPatient:
    """A patient's slices as the network sees them, and the way back.

    Attributes:
        images: (S, C, h, w) in [0, 1].
        index: (S,) number of each slice.
        voxel_ml: volume of a voxel in millilitres, where it is known.
        restored: found in the slices -> mask (bool) and anomaly map (float32) of the patient.
        save: (file, array as of ``restored``) writes the array.
    """

    images: Tensor
    index: np.ndarray
    voxel_ml: float | None
    restored: Callable[[Segmentation], tuple[np.ndarray, np.ndarray]]
    save: Callable[[Path, np.ndarray], None]


def result_files(patient: AnyPatient) -> tuple[str, str]:
    """Return the names of the files with a patient's mask and anomaly map."""
    suffix = "npy" if isinstance(patient, SlicePatient) else "nii.gz"
    return f"mask.{suffix}", f"anomaly.{suffix}"


def input_files(patient: AnyPatient) -> tuple[Path, ...]:
    """Return the files that a patient's images are read from."""
    return patient.files if isinstance(patient, SlicePatient) else patient.volumes


def open_patient(patient: AnyPatient, config: DataConfig) -> OpenedPatient:
    """Read a patient as ``config`` says. Raises DataError for files that cannot be used."""
    return _open_slices(patient, config) if isinstance(patient, SlicePatient) else _open_volumes(patient, config)


def _open_volumes(patient: PatientFiles, config: DataConfig) -> OpenedPatient:
    read = read_patient(PatientFiles(patient.name, patient.volumes, None))
    slices = slice_patient(read, config.image_size or DEFAULT_SIZE, config.volumes.least_brain)
    if not len(slices.index):
        raise DataError(f"{patient.volumes[0].parent}: no slice shows enough of the brain to be judged")
    finish = finish_slice(config.volumes)
    reference = load_nifti(patient.volumes[0])
    return OpenedPatient(
        torch.from_numpy(np.stack([finish(image) for image in slices.image])),
        slices.index,
        float(abs(np.linalg.det(reference.affine[:3, :3])) / 1000),
        lambda found: to_volumes(found, slices.index, read.image.shape[1:]),
        lambda path, array: save_like(path, array, reference),
    )


def _open_slices(patient: SlicePatient, config: DataConfig) -> OpenedPatient:
    size, images, shapes = config.image_size or DEFAULT_SIZE, [], set()
    for path in patient.files:
        try:
            shapes.add(read_picture(path).shape)
            images.append(scaled_picture(patient, path, config.volumes.normalization, size))
        except BadImage as problem:
            raise DataError(f"{path}: {problem}") from None
    if len(shapes) > 1:
        raise DataError(f"{patient.folder}: slices of different shapes: {', '.join(map(str, sorted(shapes)))}")
    height, width = shapes.pop()[1:]

    def restored(found: Segmentation) -> tuple[np.ndarray, np.ndarray]:
        masks = restore_slices(found.mixed_masks[:, None].astype(np.float32), (height, width), "nearest-exact")
        maps = restore_slices(found.maps[:, None].astype(np.float32), (height, width), "bilinear")
        return masks[:, 0] > 0.5, maps[:, 0]

    return OpenedPatient(torch.from_numpy(np.stack(images)), np.array(patient.index), None, restored, _save_array)


def _save_array(path: Path, array: np.ndarray) -> None:
    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


def to_volumes(found: Segmentation, index: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Put masks and maps of slices back into volumes (X, Y, Z) of canonical orientation.

    Args:
        index: (S,) of each slice along the last axis.

    Returns:
        mask, bool, empty in slices judged healthy; anomaly map, float32, 0 in slices that show no brain.
    """
    across, along, depth = shape
    mask, anomaly = np.zeros((depth, 1, along, across), np.float32), np.zeros((depth, 1, along, across), np.float32)
    mask[index] = restore_slices(found.mixed_masks[:, None].astype(np.float32), (along, across), "nearest-exact")
    anomaly[index] = restore_slices(found.maps[:, None].astype(np.float32), (along, across), "bilinear")
    return from_pictures(mask)[0] > 0.5, from_pictures(anomaly)[0]


def save_like(path: Path, canonical: np.ndarray, reference: Any) -> None:
    """Write a canonical volume atomically as NIfTI, with shape, affine and orientation of ``reference``."""
    import nibabel

    own = nibabel.io_orientation(reference.affine)
    back = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), own)
    voxels = nibabel.orientations.apply_orientation(canonical, back)
    header = reference.header.copy()
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # viewers would show a mask in the window of the volume: black
    image = nibabel.Nifti1Image(np.ascontiguousarray(voxels), reference.affine, header)
    temporary = path.with_name(f".unfinished.{path.name}")  # nibabel goes by the suffix, and hidden it is no volume
    nibabel.save(image, fresh(temporary))
    temporary.replace(path)
