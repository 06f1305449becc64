"""Decode PNG, JPEG and BMP with Pillow, refusing what Pillow would change silently."""

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from heterodiff.data.decoding.layout import channels_first, check_size
from heterodiff.data.findings import BadImage

SUFFIX_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP"}
SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"RIFF": "WebP or another RIFF file",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\x93NUMPY": "npy",
    b"PK\x03\x04": "a zip archive (npz)",
    b"<": "XML, SVG or HTML",
    b"%PDF": "PDF",
}
BACKGROUND = "white"
"""Colour under what is transparent."""
_CONVERTED = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N", "I"}


def content_hint(head: bytes) -> str:
    """Return `` (the content looks like X)`` for the first bytes of a file, or an empty string."""
    for signature, name in SIGNATURES.items():
        if head.startswith(signature):
            return f" (the content looks like {name})"
    return ""


def _refuse_deep_colour_png(head: bytes) -> None:
    """Pillow silently reduces 16-bit colour to 8 bits; bytes 24 and 25 of a PNG are bit depth and colour type."""
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) > 25 and head[24] == 16 and head[25] != 0:
        raise BadImage("16-bit PNG with more than one channel cannot be read without loss: save it as TIFF or npy")


def _convert(image: Image.Image, channels: int, background: str) -> Image.Image:
    """Turn an 8-bit picture into 1 (grey), 3 (RGB) or 4 (RGBA) channels; alpha is laid over ``background``."""
    if channels != 4 and image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def picture_array(image: Image.Image, channels: int | None, background: str = BACKGROUND) -> np.ndarray:
    """Return an opened Pillow ``image`` as (C, H, W) uint8, uint16 or float32.

    8-bit pictures are converted to ``channels`` when that is 1, 3 or 4, over the colour ``background`` where that
    loses transparency; otherwise palettes become RGB (RGBA with transparency), 1-bit pictures 0 and 255, and all else
    stays as stored.

    Raises:
        BadImage: a colour mode that has no direct meaning here, such as CMYK.
    """
    mode = image.mode
    if mode in _SIXTEEN_BIT:
        return np.asarray(image).astype(np.uint16)[None]
    if mode == "F":
        return np.asarray(image, dtype=np.float32)[None]
    if mode not in _CONVERTED:
        raise BadImage(f"colour mode {mode} is not supported: convert it to RGB")
    if channels in (1, 3, 4):
        image = _convert(image, channels, background)
    elif mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif mode == "1":
        image = image.convert("L")
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else channels_first(array, array.shape[2])


def decode_picture(
    file: BinaryIO, suffix: str, channels: int | None = None, background: str = BACKGROUND
) -> np.ndarray:
    """Decode one PNG, JPEG or BMP file to (C, H, W), uint8 or (16-bit grey PNG) uint16; see `picture_array`.

    Raises:
        BadImage: the content is not what the suffix says, is too large or cannot be kept exactly.
        OSError: Pillow cannot decode it (truncated, damaged).
    """
    expected = SUFFIX_FORMATS[suffix]
    head = file.read(32)
    _refuse_deep_colour_png(head)
    file.seek(0)
    try:
        image = Image.open(file, formats=[expected])
    except UnidentifiedImageError:
        raise BadImage(f"suffix {suffix} but not a readable {expected}{content_hint(head)}") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too many pixels: {error}") from None
    with image:
        check_size(image.height, image.width)
        if expected == "PNG" and getattr(image, "n_frames", 1) > 1:
            raise BadImage("animated PNG: save one frame")
        image.load()
        upright = ImageOps.exif_transpose(image) if expected == "JPEG" else image
        return picture_array(upright, channels, background)
