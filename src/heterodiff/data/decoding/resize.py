"""Bring an image of any channel count and number type to one size."""

from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from heterodiff.data.decoding.layout import MAX_PIXELS
from heterodiff.data.findings import BadImage

Size = tuple[int, int]
_AT_ONCE = 2**24
"""Values that are resized together."""


def _interpolate(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    if pixels.shape[1:] == size:
        return pixels
    return functional.interpolate(pixels[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def _to_dtype(pixels: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """Return float ``pixels`` in the stored number type; bilinear weights never leave its range."""
    array = pixels.contiguous().numpy()
    if dtype == np.bool_:
        return array >= 0.5
    return np.rint(array).astype(dtype) if dtype.kind == "u" else array


def covering_size(shape: tuple[int, ...], size: Size) -> Size:
    """Return (height, width) of an image of ``shape`` (C, H, W) scaled until it just covers ``size``.

    Raises:
        BadImage: it would be huge, because the image is much longer than wide.
    """
    scale = max(size[0] / shape[1], size[1] / shape[2])
    height, width = max(size[0], round(shape[1] * scale)), max(size[1], round(shape[2] * scale))
    if height * width > MAX_PIXELS:
        raise BadImage(f"{shape[1]}x{shape[2]} scaled to cover {size[0]}x{size[1]} is too large; cut it into tiles")
    return height, width


def resize_image(image: np.ndarray, size: Size, how: Literal["crop", "stretch"]) -> np.ndarray:
    """Resize ``image`` (C, H, W) to ``size`` = (height, width), bilinear with antialiasing.

    ``crop`` scales both sides alike until they cover ``size`` and cuts the centre; ``stretch`` scales each side.

    Returns:
        (C, height, width) in the number type of ``image``; integers are rounded.
    """
    if image.shape[1:] == size:
        return image
    height, width = size if how == "stretch" else covering_size(image.shape, size)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    fitted = np.empty((len(image), *size), image.dtype)
    together = max(1, _AT_ONCE // (image.shape[1] * image.shape[2]))
    for first in range(0, len(image), together):  # as floats, a large image takes four times its bytes
        part = slice(first, first + together)
        pixels = _interpolate(torch.from_numpy(image[part].astype(np.float32)), (height, width))
        fitted[part] = _to_dtype(pixels[:, top : top + size[0], left : left + size[1]], image.dtype)
    return fitted
