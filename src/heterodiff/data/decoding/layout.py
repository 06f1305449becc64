"""Axes, number types and size limits of decoded images."""

import math

import numpy as np

from heterodiff.data.findings import BadImage

MAX_PIXELS = 100_000_000
MAX_BYTES = 16 * MAX_PIXELS
KEPT_DTYPES = ("bool", "uint8", "uint16", "float32")


def check_size(height: int, width: int, num_bytes: int = 0) -> None:
    """Refuse an image by its header, before memory is asked for.

    Raises:
        BadImage: no pixels, more than 100 million pixels or more than 1.6 GB decoded.
    """
    if height < 1 or width < 1:
        raise BadImage(f"no pixels ({height}x{width})")
    if height * width > MAX_PIXELS:
        raise BadImage(
            f"{height:,}x{width:,} is {height * width:,} pixels; at most {MAX_PIXELS:,} are read: cut it into tiles"
        )
    if num_bytes > MAX_BYTES:
        raise BadImage(f"{num_bytes:,} bytes when decoded; at most {MAX_BYTES:,} are read: cut it into tiles")


def channel_axis(shape: tuple[int, ...], channels: int | None) -> int:
    """Return which of axes 0 and 2 of a three-axis image holds the channels.

    With ``channels`` it is the axis of that length, otherwise the shorter one.

    Raises:
        BadImage: both fit equally well.
    """
    first, last = shape[0], shape[2]
    if channels is not None and (first == channels) != (last == channels):
        return 0 if first == channels else 2
    if first == last:
        raise BadImage(
            f"shape {tuple(shape)} can be (C, H, W) or (H, W, C): "
            + ("set data.channels" if channels is None else "save it so that only one axis has data.channels values")
        )
    return 0 if first < last else 2


def check_array_header(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse an array that cannot be one image, from its header alone.

    Raises:
        BadImage: not two or three axes, not numbers, or too large.
    """
    if len(shape) not in (2, 3):
        raise BadImage(f"shape {tuple(shape)}; expected (H, W), (H, W, C) or (C, H, W)")
    if dtype.kind not in "buif":
        raise BadImage(f"values of type {dtype}; expected integers, floats or booleans")
    num_bytes = math.prod(shape) * dtype.itemsize
    longest = sorted(shape)[-2:]  # the channel axis is normally the shortest: a bound is enough here
    check_size(longest[0], longest[1], num_bytes)
    if min(shape) < 1:
        raise BadImage(f"no pixels (shape {tuple(shape)})")


def channels_first(array: np.ndarray, channels: int | None) -> np.ndarray:
    """Return (H, W), (H, W, C) or (C, H, W) as (C, H, W), see :func:`channel_axis`."""
    if array.ndim == 2:
        return array[None]
    return np.moveaxis(array, channel_axis(array.shape, channels), 0)


def plain_numbers(array: np.ndarray) -> np.ndarray:
    """Return ``array`` contiguous, in native byte order, as bool, uint8, uint16 or float32 (all other types).

    Raises:
        BadImage: no values, or NaN or infinite ones, also those that float32 cannot hold.
    """
    if array.size == 0:
        raise BadImage("holds no pixels")
    native = array.dtype.newbyteorder("=")
    if native.name in KEPT_DTYPES:
        result = np.ascontiguousarray(array, dtype=native)
    else:
        with np.errstate(over="ignore"):
            result = np.ascontiguousarray(array, dtype=np.float32)
    if result.dtype.kind == "f" and not np.isfinite(result).all():
        count = int(result.size - np.isfinite(result).sum())
        raise BadImage(f"{count:,} of {result.size:,} values are NaN, infinite or too large for float32")
    return result
