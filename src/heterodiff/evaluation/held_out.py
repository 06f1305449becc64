"""Real images that a run was not trained on, to measure it against."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import load_data
from heterodiff.errors import DataError
from heterodiff.evaluation.runs import image_config

MAX_REAL_IMAGES = 10_000


@dataclass(frozen=True)
class HeldOut:
    """Real images that the run was not trained on.

    Attributes:
        images: (N, C, H, W) in [0, 1]; N may be 0.
        labels: (N,), in the run's class order; -1 where unlabelled.
        record: ready for JSON: ``path``, ``part`` ("validation split" or "all"), ``n``, ``notes``.
    """

    images: Tensor
    labels: Tensor
    record: dict[str, Any]


def held_out_images(run: Path, data: LoadedData, path: Path | None = None) -> HeldOut:
    """Load real images to measure the run in folder ``run`` against: those at ``path``, or its validation split.

    Images at ``path`` (a folder or npz file, as ``data.path``) are brought to the run's size, channels, value range
    and class order; classes are matched by name.

    Args:
        data: of the run, see :func:`run_data`.

    Raises:
        DataError: nothing usable at ``path``, images of other channels or number type than the run's, or classes
            that it does not know.
    """
    found, record = held_out_set(run, data, path)
    images, labels = images_of(found)
    record["n"] = len(images)
    if path is not None and (seen := count_seen(images, data.train)):
        record["notes"].append(
            f"{seen:,} of {len(images):,} images at {path} are training images too: they are not held out"
        )
    return HeldOut(images, labels, record)


def held_out_set(run: Path, data: LoadedData, path: Path | None = None) -> tuple[ImageDataset, dict[str, Any]]:
    """Return the images of :func:`held_out_images` as a data set, and the record of where they come from.

    Raises as :func:`held_out_images`.
    """
    config = image_config(run)
    if path is None:
        source = str(config.path or config.source)
        return data.val, {"path": source, "part": "validation split", "n": len(data.val), "notes": []}
    if not path.expanduser().exists():
        raise DataError(f"{path}: no such folder or npz file; correct --data")
    spec = data.spec
    unseen = config.model_copy(
        update={
            "source": "images",
            "path": path,
            "image_size": (spec.height, spec.width),
            "channels": spec.channels + (len(spec.condition.given) if spec.condition else 0),
            "val_fraction": 0.0,
        }
    )
    loaded = load_data(unseen, spec=spec)
    notes = list(loaded.warnings)
    return loaded.train, {"path": str(path), "part": "all", "n": len(loaded.train), "notes": notes}


def images_of(data: ImageDataset) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and labels (N,) of ``data``, at most 10,000, spread evenly over its order."""
    count = min(len(data), MAX_REAL_IMAGES)
    # Images are sorted by class folder: the first ones alone would leave whole classes out.
    return data.batch(np.linspace(0, len(data) - 1, count).round().astype(np.int64).tolist())


def count_seen(images: Iterable[Tensor], train: ImageDataset) -> int:
    """Number of ``images``, each (C, H, W), that are training images, bit by bit."""
    known: set[bytes] = set()
    for start in range(0, len(train), 256):
        part, _ = train.batch(range(start, min(start + 256, len(train))))
        known.update(_digest(image) for image in part)
    return sum(_digest(image) in known for image in images)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
