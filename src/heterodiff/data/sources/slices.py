"""Axial slices of a patient's volumes, and a volume from masks of slices."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from heterodiff.data.decoding.nifti import Patient
from heterodiff.data.decoding.resize import Size

CLASSES = ("healthy", "unhealthy")
VERSION = 1
"""Version of the preprocessing, part of its fingerprint."""
PERCENTILE = 99.0


@dataclass(frozen=True)
class Slices:
    """Slices of a patient that show the brain, seen from below with the front up, as viewers show them.

    Attributes:
        image: (S, C, h, w) float32 in [0, 1].
        mask: (S, h, w) bool, where the patient has one.
        unhealthy: (S,) bool, true if the mask has any voxel there; resizing may lose tiny ones.
        index: (S,) position of each slice along the volume's last axis.
    """

    image: np.ndarray
    mask: np.ndarray | None
    unhealthy: np.ndarray | None
    index: np.ndarray


def slice_patient(patient: Patient, size: Size, least_brain: float) -> Slices:
    """Scale each modality by the 99th percentile of its foreground, cut axial slices and bring them to ``size``.

    Foreground is above 0. Slices are filled up to a square before they are resized, so that nothing is
    stretched; images bilinear, masks by the nearest voxel.

    Args:
        least_brain: share of a slice's area that must be foreground for it to be kept.
    """
    image = patient.image
    foreground = (image > 0).any(axis=0)
    kept = np.flatnonzero(foreground.mean(axis=(0, 1)) >= least_brain)
    scaled = np.stack([scale_volume(modality) for modality in image])
    pictures = resize_slices(to_pictures(scaled[..., kept]), size, "bilinear")
    if patient.mask is None:
        return Slices(pictures, None, None, kept)
    masks = resize_slices(to_pictures(patient.mask[None][..., kept].astype(np.float32)), size, "nearest-exact")[:, 0]
    return Slices(pictures, masks > 0.5, np.asarray(patient.mask[..., kept].any(axis=(0, 1))), kept)


def scale_volume(modality: np.ndarray) -> np.ndarray:
    """Divide (X, Y, Z) by the 99th percentile of its values above 0, and clip to [0, 1]."""
    return np.clip(modality / foreground_top(modality), 0, 1).astype(np.float32)


def foreground_top(modality: np.ndarray) -> float:
    """Return the 99th percentile of the values above 0, at least 1e-12, or 1 if there are none."""
    inside = modality[modality > 0]
    return max(float(np.percentile(inside, PERCENTILE)), 1e-12) if inside.size else 1.0


def to_pictures(volume: np.ndarray) -> np.ndarray:
    """Volume (C, X, Y, Z) in canonical orientation -> axial slices (Z, C, H, W): front up, the patient's right left."""
    return np.ascontiguousarray(volume.transpose(3, 0, 2, 1)[:, :, ::-1, ::-1])


def from_pictures(pictures: np.ndarray) -> np.ndarray:
    """Undo :func:`to_pictures`: (Z, C, H, W) -> (C, X, Y, Z)."""
    return np.ascontiguousarray(pictures[:, :, ::-1, ::-1].transpose(1, 3, 2, 0))


def _margins(height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels to add at the left, right, top and bottom for a square."""
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return left, side - width - left, top, side - height - top


def resize_slices(pictures: np.ndarray, size: Size, mode: str) -> np.ndarray:
    """Fill (S, C, H, W) up to squares with zeros and bring them to ``size``."""
    squares = functional.pad(torch.from_numpy(pictures), _margins(*pictures.shape[2:]))
    if tuple(squares.shape[2:]) == size or not len(squares):
        return squares.new_zeros(0, squares.shape[1], *size).numpy() if not len(squares) else squares.numpy()
    smooth = {"antialias": True, "align_corners": False} if mode == "bilinear" else {}
    return functional.interpolate(squares, size=size, mode=mode, **smooth).numpy()


def restore_slices(pictures: np.ndarray, shape: tuple[int, int], mode: str) -> np.ndarray:
    """Undo :func:`resize_slices`: (S, C, h, w) -> (S, C, H, W) of the original ``shape``."""
    side = max(shape)
    squares = torch.from_numpy(np.ascontiguousarray(pictures))
    if tuple(squares.shape[2:]) != (side, side):
        smooth = {"align_corners": False} if mode == "bilinear" else {}
        squares = functional.interpolate(squares, size=(side, side), mode=mode, **smooth)
    left, _, top, _ = _margins(*shape)
    return squares[:, :, top : top + shape[0], left : left + shape[1]].numpy()


def stretch_slice(image: np.ndarray) -> np.ndarray:
    """Each channel of (C, H, W) from its least to its greatest value to [0, 1]; zeros where it holds one value."""
    low, high = (extreme(axis=(1, 2), keepdims=True).astype(np.float32) for extreme in (image.min, image.max))
    return np.where(high > low, (image - low) / np.where(high > low, high - low, 1), 0).astype(np.float32)
