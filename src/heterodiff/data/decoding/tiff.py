"""Decode TIFF with tifffile: any depth and channel count; Pillow helps with compressions tifffile lacks."""

import logging
import lzma
import struct
import zlib
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

from heterodiff.data.decoding.layout import channel_axis, check_size
from heterodiff.data.decoding.pillow import picture_array
from heterodiff.data.findings import BadImage

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it finds wrong becomes one error here

_INFLATE: dict[int, Any] = {8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor}
"""Decompressors, by compression, that can stop at a number of bytes."""
_AS_STORED = ("MINISBLACK", "RGB")


def _refuse_missing_pixels(page: tifffile.TiffPage, file_size: int) -> None:
    """tifffile fills absent strips with zeros, which would be a silent black image."""
    expected = int(np.prod(page.keyframe.chunked, dtype=np.int64))
    if len(page.dataoffsets) < expected:
        raise BadImage(f"{expected - len(page.dataoffsets)} of {expected} strips or tiles are missing")
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count == 0 or offset == 0:
            raise BadImage("some strips or tiles have no data")
        if offset + count > file_size:
            raise BadImage(f"truncated: pixel data up to byte {offset + count:,}, the file has {file_size:,}")


def _refuse_bombs(page: tifffile.TiffPage, itemsize: int) -> None:
    """tifffile inflates a strip whatever its size: a few megabytes can be gigabytes."""
    compression = page.keyframe.compression
    if compression not in _INFLATE:
        return
    most = int(np.prod(page.keyframe.chunks, dtype=np.int64)) * itemsize
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        page.parent.filehandle.seek(offset)
        stream = _INFLATE[compression]()
        if len(stream.decompress(page.parent.filehandle.read(count), most + 1)) > most:
            raise BadImage(f"a strip or tile inflates to more than the {most:,} bytes of its pixels")


def _refuse_lost_pages(file: tifffile.TiffFile) -> None:
    """tifffile ends the list of pages at a link it cannot follow: channels would be missing."""
    form, last = file.tiff, file.pages[len(file.pages) - 1]
    file.filehandle.seek(last.offset)
    (tags,) = struct.unpack(form.tagnoformat, file.filehandle.read(form.tagnosize))
    file.filehandle.seek(last.offset + form.tagnosize + tags * form.tagsize)
    (following,) = struct.unpack(form.offsetformat, file.filehandle.read(form.offsetsize))
    if following != 0:
        raise BadImage(f"truncated: no page at byte {following:,}, to which page {len(file.pages)} links")


def _with_pillow(stream: BinaryIO, file: tifffile.TiffFile, why: str) -> np.ndarray:
    """Decode through libtiff what Pillow keeps exactly: one page, 8 bits, or one channel of 16 bits or float."""
    page = file.pages[0]
    eight_bits = page.bitspersample in (1, 8)
    if len(file.pages) != 1 or not (eight_bits or page.samplesperpixel == 1):
        raise BadImage(f"{why}: save it without compression, or install imagecodecs")
    stream.seek(0)
    with Image.open(stream, formats=["TIFF"]) as image:
        image.load()
        array = picture_array(image, None)
    if (array.dtype == np.uint8) != eight_bits:
        raise BadImage(f"{why}: save it without compression, or install imagecodecs")
    return array


def _to_channels_first(array: np.ndarray, axes: str, channels: int | None) -> np.ndarray:
    if array.ndim == 2:
        return array[None]
    if "S" in axes:  # samples of a pixel: the file itself says which axis
        return np.moveaxis(array, axes.index("S"), 0)
    try:
        return np.moveaxis(array, channel_axis(array.shape, channels), 0)
    except BadImage:
        return array  # pages of a TIFF are channels unless the shape says otherwise


def decode_tiff(stream: BinaryIO, suffix: str, channels: int | None = None, background: str = "") -> np.ndarray:
    """Decode one TIFF to (C, H, W) in its stored number type; ``channels`` tells pages from rows if unclear.

    Raises:
        BadImage: several images, more than three axes, missing pixels, too large, or a colour space or
            compression that cannot be read exactly.
        Exception: whatever tifffile raises for damaged files.
    """
    with tifffile.TiffFile(stream) as file:
        _refuse_lost_pages(file)
        if len(file.series) != 1:
            raise BadImage(f"holds {len(file.series)} images of different kinds; expected one image per file")
        series = file.series[0]
        page = series.keyframe
        shape, axes = series.shape, series.axes
        if len(shape) not in (2, 3):
            raise BadImage(f"shape {shape} with axes {axes}; expected one image with at most three axes")
        dtype = np.dtype(series.dtype)
        check_size(page.imagelength, page.imagewidth, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        for each in series.pages:
            if each is not None:
                _refuse_missing_pixels(each, file.filehandle.size)
                _refuse_bombs(each, dtype.itemsize)
        if page.photometric.name not in _AS_STORED:
            return _with_pillow(stream, file, f"colour space {page.photometric.name} is not supported")
        try:
            array = series.asarray(maxworkers=1)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            return _with_pillow(stream, file, f"compression {page.compression.name} is not supported")
    return _to_channels_first(array, axes, channels)
