"""Teaching a segmentation network the masks that a calibrated method finds in the training images of a run."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from heterodiff.data.dataset import ImageDataset
from heterodiff.pipelines.anomalies.mask_network import MaskNetwork, train_mask_network, unsure_pixels
from heterodiff.pipelines.anomalies.segment import Segmentation
from heterodiff.progress import StartTask

MOST_TAUGHT = 1000
"""Training images that are enough; of more, evenly spread ones are taken."""
IMAGES_AT_ONCE = 32


def teach(
    images: ImageDataset,
    unhealthy: np.ndarray,
    segment: Callable[[Tensor, int], Segmentation],
    *,
    steps: int,
    seed: int,
    device: torch.device,
    channels: Sequence[int] | None = None,
    start: StartTask,
) -> MaskNetwork | None:
    """Train a segmentation network on what ``segment`` finds in images; None where it finds nothing to learn from.

    Args:
        images: N training images.
        unhealthy: (N,) bool, their labels, some of each.
        segment: (images (B, C, H, W) in [0, 1], number of the first) -> anomalies.
        steps: of training.
        channels: of the images, those that the network sees; default: all.
        start: begins to show progress.
    """
    if len(images) > MOST_TAUGHT:
        chosen = np.linspace(0, len(images) - 1, MOST_TAUGHT).round().astype(int)
        images, unhealthy = images.take(chosen.tolist()), unhealthy[chosen]
    found = _all(segment, images, start("training images", len(images)))
    if unhealthy.all() or not (unhealthy & found.masks.any(axis=(1, 2))).any():
        return None
    return train_mask_network(
        images,
        found.masks,
        unsure_pixels(found.masks, found.smoothed),
        unhealthy,
        steps=steps,
        seed=seed,
        device=device,
        channels=channels,
        progress=start("segmentation network", steps),
    )


def _all(
    segment: Callable[[Tensor, int], Segmentation], images: ImageDataset, progress: Callable[[int], None]
) -> Segmentation:
    parts = []
    for first in range(0, len(images), IMAGES_AT_ONCE):
        rows = range(first, min(first + IMAGES_AT_ONCE, len(images)))
        parts.append(segment(images.batch(rows)[0], first))
        progress(rows.stop)
    return Segmentation.join(parts)
