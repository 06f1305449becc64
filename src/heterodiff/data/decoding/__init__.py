"""Decoding of an image file to an array: the only code path, whatever is kept in memory."""

import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, TypeVar

import numpy as np

from heterodiff.data.decoding.layout import channels_first, check_array_header, plain_numbers
from heterodiff.data.decoding.pillow import BACKGROUND, SIGNATURES, SUFFIX_FORMATS, content_hint, decode_picture
from heterodiff.data.decoding.tiff import decode_tiff
from heterodiff.data.findings import BadImage
from heterodiff.errors import DataError, HeterodiffError, reason

_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


T = TypeVar("T")
TRIES = 5


def steadily(read: Callable[[], T]) -> T:
    """Return what ``read`` returns, called again where Python's parser has failed.

    NumPy parses the headers of arrays as Python. In some releases of Python 3.11, the parser counts its depth for all
    threads together, and rarely raises a SystemError though nothing is wrong (bug 106905 of CPython).
    """
    for _ in range(TRIES - 1):
        try:
            return read()
        except SystemError:
            continue
    return read()


_SUFFIXES_OF = {"PNG": ".png", "JPEG": ".jpg", "BMP": ".bmp", "TIFF": ".tif", "npy": ".npy"}


def suffix_of(head: bytes, named: str = "") -> str:
    """Return the suffix for content that begins with ``head``; ``named`` if that is not known."""
    kind = next((name for signature, name in SIGNATURES.items() if head.startswith(signature)), "")
    return _SUFFIXES_OF.get(kind, named)


@contextmanager
def opened_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an npz file that holds a data set.

    Raises:
        DataError: not an npz file; or what is raised as `BadImage` while it is open.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except BadImage as problem:
        raise DataError(f"{path}: {problem}") from None
    except (HeterodiffError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything on damaged files
        raise DataError(f"{path}: not readable as npz: {reason(error)}; save it with numpy.savez_compressed") from None


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the arrays in an npz ``archive``."""
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype of the npy stream ``file``, which is left behind its header."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADER_READERS:
        raise BadImage(f"npy format version {version} is not supported; save it with numpy.save")
    start = file.tell()

    def read() -> tuple[tuple[int, ...], np.dtype]:
        file.seek(start)
        shape, _, dtype = _HEADER_READERS[version](file)
        return shape, dtype

    return steadily(read)


def read_member(archive: zipfile.ZipFile, key: str, max_bytes: int | None) -> np.ndarray:
    """Return array ``key`` of an npz ``archive``; its header is checked before anything is decompressed.

    Args:
        max_bytes: refuse larger arrays; ``None``: the limits of a single image.

    Raises:
        BadImage: too large, or not an array of numbers.
    """
    with archive.open(f"{key}.npy") as file:
        shape, dtype = read_header(file)
    if max_bytes is None:
        check_array_header(shape, dtype)
    elif math.prod(shape) * dtype.itemsize > max_bytes:
        raise BadImage(f"array '{key}' needs {math.prod(shape) * dtype.itemsize:,} bytes; at most {max_bytes:,}")

    def read() -> np.ndarray:
        with archive.open(f"{key}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # at the end of the member zipfile compares the checksum
        return array

    return steadily(read)


def _decode_npy(file: BinaryIO, suffix: str, channels: int | None, background: str) -> np.ndarray:
    head = file.read(8)
    if not head.startswith(b"\x93NUMPY"):
        raise BadImage(f"suffix {suffix} but not an npy file{content_hint(head)}")
    file.seek(0)
    shape, dtype = read_header(file)
    check_array_header(shape, dtype)
    start = file.tell()
    missing = math.prod(shape) * dtype.itemsize - (file.seek(0, os.SEEK_END) - start)
    if missing > 0:
        raise BadImage(f"truncated: {missing:,} bytes are missing for shape {shape} of {dtype}")

    def read() -> np.ndarray:
        file.seek(0)
        found: np.ndarray = np.load(file, allow_pickle=False)
        return found

    return channels_first(steadily(read), channels)


def _decode_npz(file: BinaryIO, suffix: str, channels: int | None, background: str) -> np.ndarray:
    head = file.read(8)
    if not head.startswith(b"PK"):
        raise BadImage(f"suffix {suffix} but not an npz file{content_hint(head)}")
    with zipfile.ZipFile(file) as archive:
        keys = array_names(archive)
        key = "image" if "image" in keys else keys[0] if len(keys) == 1 else None
        if key is None:
            raise BadImage(f"arrays {keys[:5]}; expected one array, or one named 'image'")
        return channels_first(read_member(archive, key, None), channels)


_DECODERS: dict[str, Callable[[BinaryIO, str, int | None, str], np.ndarray]] = {
    **dict.fromkeys(SUFFIX_FORMATS, decode_picture),
    **dict.fromkeys((".tif", ".tiff"), decode_tiff),
    ".npy": _decode_npy,
    ".npz": _decode_npz,
}
SUFFIXES = tuple(_DECODERS)


def decode_file(path: Path, channels: int | None = None, background: str = BACKGROUND) -> np.ndarray:
    """Decode the image file ``path``; see :func:`decode_stream`.

    Raises:
        BadImage: with the reason, whatever is wrong with the file.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        with path.open("rb") as file:
            return decode_stream(file, path.suffix, status.st_size, channels, background)
    except OSError as error:
        raise BadImage(f"cannot be decoded: {reason(error)}") from error


def decode_stream(
    file: BinaryIO, suffix: str, size: int, channels: int | None = None, background: str = BACKGROUND
) -> np.ndarray:
    """Decode the content of an image file.

    Args:
        file: open, at its beginning, and able to seek.
        suffix: of its name, which decides how it is read.
        size: bytes.
        channels: wanted channels; converts 8-bit pictures (PNG, JPEG, BMP) to 1, 3 or 4 and tells the channel
            axis of arrays. The result may still have another count: the caller compares.
        background: colour under what is transparent in pictures that are converted to 1 or 3 channels.

    Returns:
        (C, H, W) bool, uint8, uint16 or float32 (all other number types), contiguous and finite.

    Raises:
        BadImage: with the reason, whatever is wrong with the content.
    """
    if size == 0:
        raise BadImage("empty file (0 bytes)")
    if suffix.lower() not in SUFFIXES:
        raise BadImage(f"suffix '{suffix}' is not one of {', '.join(SUFFIXES)}")
    try:
        return plain_numbers(_DECODERS[suffix.lower()](file, suffix.lower(), channels, background))
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files; the file is bad all the same
        raise BadImage(f"cannot be decoded: {reason(error)}") from error
