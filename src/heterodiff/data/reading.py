"""Reading image files as the images of a run were read."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from heterodiff.data.dataset import ImageSpec
from heterodiff.data.decoding import decode_file
from heterodiff.data.decoding.pillow import BACKGROUND
from heterodiff.data.decoding.resize import resize_image
from heterodiff.data.findings import BadImage, printable
from heterodiff.errors import DataError


def read_image(
    path: str | Path, spec: ImageSpec, resize: Literal["crop", "stretch"] | None, background: str = BACKGROUND
) -> torch.Tensor:
    """Return the image file ``path`` as (C, H, W) in [0, 1], resized and scaled to ``spec``, over ``background``.

    With ``resize=None`` it keeps its size.

    Raises:
        DataError: a file that is missing, cannot be decoded, or holds another number of channels or number type.
    """
    path = Path(path).expanduser()
    name = printable(str(path))
    if not path.exists():
        raise DataError(f"{name}: no such image file")
    try:
        image = decode_file(path, spec.channels, background)
        if image.shape[0] != spec.channels or image.dtype != np.dtype(spec.dtype):
            raise BadImage(
                f"{image.shape[0]} channels of {image.dtype}; the run was trained on {spec.channels} of {spec.dtype}"
            )
        fitted = image if resize is None else resize_image(image, (spec.height, spec.width), resize)
    except BadImage as reason:
        raise DataError(f"{name}: {reason}") from None
    low, high = spec.value_range
    return torch.from_numpy(fitted).to(torch.float32, copy=True).sub_(low).div_(high - low).clamp_(0, 1)


def read_mask(path: str | Path, image: str | Path, spec: ImageSpec, resize: Literal["crop", "stretch"]) -> torch.Tensor:
    """Return the mask file ``path`` of the image file ``image`` as (1, 1, H, W), resized with it: 1 where it is bright.

    Raises:
        DataError: a file that is missing or cannot be decoded, another size than the image's, or more or fewer than two
            values.
    """
    path, name = Path(path).expanduser(), printable(str(path))
    if not path.exists():
        raise DataError(f"{name}: no such mask file")
    try:
        mask, shape = decode_file(path, 1), decode_file(Path(image).expanduser(), spec.channels).shape
        if mask.shape != (1, *shape[1:]):
            sizes = [f"{height}x{width}" for height, width in (shape[1:], mask.shape[1:])]
            raise BadImage(f"expected the size of the image, {sizes[0]}, found {sizes[1]}")
        values = np.unique(mask)
        if len(values) != 2:
            found = f"the single value {values[0]:g}" if len(values) == 1 else f"{len(values)} different values"
            raise BadImage(f"expected two values, the higher one where to draw anew, found {found}; save it as png")
        bright = resize_image(mask == values[1], (spec.height, spec.width), resize)
    except BadImage as reason:
        raise DataError(f"{name}: {reason}") from None
    return torch.from_numpy(bright[None]).float()


def read_images(
    paths: Sequence[str | Path],
    spec: ImageSpec,
    resize: Literal["crop", "stretch"],
    background: str = BACKGROUND,
) -> torch.Tensor:
    """Return image files as (B, C, H, W), see :func:`read_image`."""
    return torch.stack([read_image(path, spec, resize, background) for path in paths])


def read_condition(
    path: str | Path, spec: ImageSpec, whole: bool, resize: Literal["crop", "stretch"], background: str = BACKGROUND
) -> torch.Tensor:
    """Return the condition image in file ``path`` as (1, C', h, w) in [0, 1], for a run with images as conditions.

    Args:
        whole: whether the file is a whole image, of which conditions are made; then this is what is returned.

    Raises:
        DataError: a file that is missing, cannot be decoded, or holds other channels than in training.
    """
    condition = spec.condition
    assert condition is not None
    if condition.kind == "mask" and not whole:
        return read_mask(path, path, replace(spec, channels=1), resize)
    every = spec.channels + len(condition.given)
    channels = every if whole or (condition.given and _channels(path) == every) else condition.channels
    kept = condition.factor > 1 and not whole  # a low resolution has a size of its own
    return read_image(path, replace(spec, channels=channels), None if kept else resize, background)[None]


def _channels(path: str | Path) -> int | None:
    try:
        return len(decode_file(Path(path).expanduser(), None))
    except (BadImage, OSError):
        return None  # reading it properly says why
