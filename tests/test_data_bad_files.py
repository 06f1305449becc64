"""Files that cannot be read exactly are refused with the reason, before memory is spent; nothing in them runs."""

import io
import lzma
import os
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from heterodiff.data.decoding import decode_file
from heterodiff.data.findings import BadImage


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bytes(width: int, height: int, depth: int, colour_type: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npy_header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npz_bytes(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def tiff_bytes(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


RGB = Image.fromarray(noise(40, 30, 3))
NAN = np.full((4, 4), np.nan, np.float32)
BAD_FILES = {
    "zero.png": (b"", "empty file"),
    "truncated.png": (half(saved(RGB, "PNG")), "truncated|decoded"),
    "truncated.jpg": (half(saved(RGB, "JPEG")), "truncated"),
    "truncated.bmp": (half(saved(RGB, "BMP")), "truncated"),
    "truncated.tif": (half(tiff_bytes(noise(40, 30))), "truncated|decoded"),
    "truncated_zlib.tif": (half(tiff_bytes(noise(40, 30), compression="zlib")), "truncated|decoded"),
    "truncated_pages.tif": (tiff_bytes(noise(5, 40, 30), photometric="minisblack")[:-500], "truncated|decoded"),
    "truncated.npy": (half(npy_bytes(noise(40, 30))), "truncated: .* bytes are missing"),
    "truncated.npz": (half(npz_bytes(image=npy_bytes(noise(40, 30)))), "zip"),
    "damaged.npz": (damaged(npz_bytes(image=npy_bytes(noise(40, 30)))), "decoded"),
    "jpeg.png": (saved(RGB, "JPEG"), "suffix .png .*looks like JPEG"),
    "png.jpg": (saved(RGB, "PNG"), "suffix .jpg .*looks like PNG"),
    "gif.bmp": (saved(RGB.quantize(), "GIF"), "looks like GIF"),
    "text.tif": (b"this is a text", "not a TIFF"),
    "html.png": (b"<html>not found</html>", "HTML"),
    "png.npy": (saved(RGB, "PNG"), "not an npy file .*PNG"),
    "npy.npz": (npy_bytes(noise(4, 4)), "not an npz file .*npy"),
    "cmyk.jpg": (saved(RGB.convert("CMYK"), "JPEG"), "CMYK"),
    "animated.png": (saved(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]), "animated"),
    "deep_rgb.png": (png_bytes(2, 1, 16, 2, b"\0" + bytes(12)), "16-bit PNG .*save it as TIFF or npy"),
    "deep_la.png": (png_bytes(2, 1, 16, 4, b"\0" + bytes(8)), "16-bit PNG"),
    "huge.png": (png_bytes(50_000, 50_000, 1, 0, b""), "pixels"),
    "large.png": (png_bytes(10_001, 10_001, 1, 0, b""), "pixels"),
    "huge.npy": (npy_header((50_000, 50_000)), "pixels"),
    "huge_values.npy": (npy_header((9_000, 9_000, 100)), "bytes when decoded"),
    "huge.npz": (npz_bytes(image=npy_header((50_000, 50_000)) + bytes(10_000_000)), "pixels"),
    "nan.npy": (npy_bytes(NAN), "16 of 16 values are NaN"),
    "nan.tif": (tiff_bytes(NAN), "NaN"),
    "infinite.npy": (npy_bytes(np.array([[1.0, np.inf]])), "1 of 2 values"),
    "overflow.npy": (npy_bytes(np.array([[1.0, 1e300]])), "too large for float32"),
    "object.npy": (npy_bytes(np.array([[{}, None]], dtype=object)), "values of type object"),
    "object.npz": (npz_bytes(image=npy_bytes(np.array([[{}]], dtype=object))), "values of type object"),
    "complex.npy": (npy_bytes(np.ones((2, 2), complex)), "complex"),
    "text.npy": (npy_bytes(np.array([["a", "b"]])), "<U1"),
    "one_axis.npy": (npy_bytes(noise(5)), "shape"),
    "four_axes.npy": (npy_bytes(noise(2, 3, 4, 5)), "shape"),
    "four_axes.tif": (tiff_bytes(noise(2, 3, 4, 5), photometric="minisblack"), "axes"),
    "no_pixels.npy": (npy_bytes(np.empty((0, 4), np.uint8)), "no pixels"),
    "cube.npy": (npy_bytes(noise(4, 5, 4)), "set data.channels"),
    "two_arrays.npz": (npz_bytes(a=npy_bytes(noise(4, 4)), b=npy_bytes(noise(4, 4))), "expected one array"),
    "image.webp": (b"RIFF", "suffix '.webp' is not one of"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_the_reason(tmp_path, name):
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadImage, match=f"(?i){reason}"):
        decode_file(tmp_path / name)


def test_every_truncation_of_a_tiff_is_refused(tmp_path):
    content = tiff_bytes(noise(8, 8, 3), photometric="rgb", compression="zlib", rowsperstrip=2)
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    whole = decode_file(path)
    for length in range(1, len(content), 7):
        path.write_bytes(content[:length])
        try:
            decoded = decode_file(path)
        except BadImage:
            continue
        np.testing.assert_array_equal(decoded, whole)


def test_every_truncation_of_a_tiff_of_pages_is_refused(tmp_path):
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for page in noise(5, 8, 8):
            writer.write(page, contiguous=False, metadata=None)
    path = tmp_path / "image.tif"
    for length in range(1, len(stream.getvalue()), 7):
        path.write_bytes(stream.getvalue()[:length])
        with pytest.raises(BadImage):
            decode_file(path)


def test_tiff_strip_without_data_is_refused(tmp_path):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(8, 8), rowsperstrip=2)
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = list(file.pages[0].databytecounts)
        file.pages[0].tags["StripByteCounts"].overwrite([*counts[:-1], 0])
    with pytest.raises(BadImage, match="no data"):
        decode_file(path)


def test_tiff_that_lists_too_few_strips_is_refused(tmp_path):
    """The rows of strips that are not listed would be black."""
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(8, 8), rowsperstrip=2)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag in ("StripOffsets", "StripByteCounts"):
            listed = file.pages[0].tags[tag]
            listed.overwrite(listed.value[:3])
    with pytest.raises(BadImage, match="1 of 4 strips or tiles are missing"):
        decode_file(path)


@pytest.mark.parametrize("compression", ["zlib", "lzma"])
def test_tiff_strip_that_inflates_without_end_is_refused(tmp_path, compression):
    """A hundred megabytes in a hundred kilobytes, of an image of 64 bytes."""
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(8, 8), compression=compression)
    assert decode_file(path).shape == (1, 8, 8)
    bomb = {"zlib": zlib.compress, "lzma": lzma.compress}[compression](bytes(10**8))
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["StripOffsets"].overwrite((path.stat().st_size,))
        file.pages[0].tags["StripByteCounts"].overwrite((len(bomb),))
    path.write_bytes(path.read_bytes() + bomb)
    tracemalloc.start()
    with pytest.raises(BadImage, match="inflates to more than the 64 bytes"):
        decode_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e7  # 8 MB of which are the dictionary of LZMA


def test_tiff_of_two_kinds_of_images_is_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "image.tif") as writer:
        writer.write(noise(8, 8))
        writer.write(noise(9, 9))
    with pytest.raises(BadImage, match="2 images"):
        decode_file(tmp_path / "image.tif")


def test_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImage, match="not a regular file"):
        decode_file(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(BadImage, match="No such file"):
        decode_file(tmp_path / "gone.png")


def test_pickles_never_run(tmp_path):
    marker = tmp_path / "marker"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for name, content in {
        "a.npy": npy_bytes(np.array([[Hostile()]], dtype=object)),
        "b.npz": npz_bytes(image=npy_bytes(np.array([[Hostile()]], dtype=object))),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage):
            decode_file(tmp_path / name)
    assert not marker.exists()
