"""Every file format x depth x channel count comes back as it was written."""

import ast
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from heterodiff.data.decoding import decode_file

HEIGHT, WIDTH = 11, 7


def random_image(channels: int, dtype: str, seed: int = 0) -> np.ndarray:
    """A (C, H, W) image over the whole range of ``dtype``."""
    generator = np.random.default_rng(seed)
    shape = (channels, HEIGHT, WIDTH)
    if np.dtype(dtype).kind == "b":
        return generator.random(shape) < 0.5
    if np.dtype(dtype).kind == "f":
        return generator.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    return generator.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def assert_decoded(path: Path, image: np.ndarray, channels: int | None = None) -> None:
    decoded = decode_file(path, channels)
    expected = image if image.dtype.name in ("bool", "uint8", "uint16") else image.astype(np.float32)
    assert decoded.dtype == expected.dtype
    assert decoded.flags.c_contiguous
    assert decoded.dtype.isnative
    np.testing.assert_array_equal(decoded, expected)


EIGHT_BITS = [*((".png", mode) for mode in ("L", "LA", "RGB", "RGBA")), (".bmp", "L"), (".bmp", "RGB"), (".PNG", "L")]


@pytest.mark.parametrize(("suffix", "mode"), EIGHT_BITS)
def test_eight_bit_pictures_round_trip(tmp_path, suffix, mode):
    image = random_image(len(mode), "uint8")
    path = tmp_path / f"image{suffix}"
    Image.fromarray(image[0] if mode == "L" else image.transpose(1, 2, 0), mode=None).save(path)
    assert_decoded(path, image)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_what_pillow_decodes(tmp_path, mode):
    path = tmp_path / "image.jpg"
    image = random_image(len(mode), "uint8")
    Image.fromarray(image[0] if mode == "L" else image.transpose(1, 2, 0)).save(path, quality=95)
    with Image.open(path) as opened:
        expected = np.asarray(opened).reshape(HEIGHT, WIDTH, -1).transpose(2, 0, 1)
    assert_decoded(path, expected)


def test_jpeg_is_turned_upright(tmp_path):
    path = tmp_path / "image.jpeg"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    Image.fromarray(np.full((8, 16), 100, np.uint8)).save(path, exif=exif)
    assert decode_file(path).shape == (1, 16, 8)


def test_sixteen_bit_grey_png_round_trips(tmp_path):
    image = random_image(1, "uint16")
    Image.fromarray(image[0]).save(tmp_path / "image.png")
    assert_decoded(tmp_path / "image.png", image)


def test_one_bit_png_is_black_and_white(tmp_path):
    image = random_image(1, "bool")
    Image.fromarray(image[0]).save(tmp_path / "image.png")
    assert_decoded(tmp_path / "image.png", image.astype(np.uint8) * 255)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_becomes_colour(tmp_path, transparent):
    indices = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
    colours = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], np.uint8)
    picture = Image.fromarray(indices, mode=None).convert("P")
    picture.putpalette(colours.tobytes())
    picture.putdata(indices.ravel().tolist())
    picture.save(tmp_path / "image.png", **({"transparency": 1} if transparent else {}))
    expected = colours[indices].transpose(2, 0, 1)
    if transparent:
        expected = np.concatenate([expected, np.where(indices == 1, 0, 255).astype(np.uint8)[None]])
    assert_decoded(tmp_path / "image.png", expected)


def test_eight_bit_pictures_convert_to_the_channels_asked_for(tmp_path):
    rgba = np.zeros((4, HEIGHT, WIDTH), np.uint8)
    rgba[0], rgba[3, :, 3:] = 255, 255  # left: transparent, right: red
    Image.fromarray(rgba.transpose(1, 2, 0)).save(tmp_path / "rgba.png")
    rgb = decode_file(tmp_path / "rgba.png", 3)
    assert rgb[:, 0, 0].tolist() == [255, 255, 255]
    assert rgb[:, 0, 5].tolist() == [255, 0, 0]
    grey = decode_file(tmp_path / "rgba.png", 1)
    assert (grey[0, 0, 0], grey[0, 0, 5]) == (255, 76)
    Image.fromarray(random_image(1, "uint8")[0]).save(tmp_path / "grey.png")
    assert_decoded(tmp_path / "grey.png", np.repeat(random_image(1, "uint8"), 3, axis=0), 3)
    assert decode_file(tmp_path / "grey.png", 4).shape[0] == 4


def test_sixteen_bit_pictures_are_not_converted(tmp_path):
    image = random_image(1, "uint16")
    Image.fromarray(image[0]).save(tmp_path / "image.png")
    assert_decoded(tmp_path / "image.png", image, channels=3)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float16", "float32", "float64"])
def test_tiff_round_trips(tmp_path, dtype, channels, layout, compression):
    image = random_image(channels, dtype)
    stored = image[0] if channels == 1 else image if layout == "first" else image.transpose(1, 2, 0)
    planar = {} if channels == 1 else {"planarconfig": "separate" if layout == "first" else "contig"}
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, stored, photometric="minisblack", compression=compression, **planar)
    assert_decoded(path, image)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_tiff_pages_are_channels(tmp_path, byteorder):
    image = random_image(5, "uint16")
    tifffile.imwrite(tmp_path / "image.tiff", image, photometric="minisblack", byteorder=byteorder)
    assert_decoded(tmp_path / "image.tiff", image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "F"])
@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_tiff_written_by_pillow(tmp_path, mode, compression):
    depth = {"I;16": "uint16", "F": "float32", "1": "bool"}.get(mode, "uint8")
    channels = len(mode) if mode.startswith("RGB") else 1
    image = random_image(channels, depth)
    picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
    expected = image
    if mode == "P":
        picture = Image.fromarray(image[0]).convert("P")
        expected = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    picture.save(tmp_path / "image.tif", compression=compression)
    decoded = decode_file(tmp_path / "image.tif")
    scale = 255 if mode == "1" and decoded.dtype == np.uint8 else 1
    np.testing.assert_array_equal(decoded, expected.astype(decoded.dtype) * scale)


ARRAY_TYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64", ">u2"]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 16])
@pytest.mark.parametrize("dtype", ARRAY_TYPES)
def test_arrays_round_trip(tmp_path, dtype, channels, layout, suffix):
    image = random_image(channels, np.dtype(dtype).newbyteorder("=").name)
    stored = image if layout == "first" else np.asfortranarray(image.transpose(1, 2, 0))
    path = tmp_path / f"image{suffix}"
    if suffix == ".npy":
        np.save(path, stored.astype(dtype))
    else:
        np.savez_compressed(path, image=stored.astype(dtype), other=np.zeros(3))
    assert_decoded(path, image, channels)


def test_two_axis_array_is_one_channel(tmp_path):
    np.save(tmp_path / "image.npy", random_image(1, "uint8")[0])
    assert_decoded(tmp_path / "image.npy", random_image(1, "uint8"))


def test_channel_axis_without_channels_is_the_shorter(tmp_path):
    np.save(tmp_path / "image.npy", random_image(5, "uint8").transpose(1, 2, 0))
    assert_decoded(tmp_path / "image.npy", random_image(5, "uint8"))


def test_reading_survives_a_parser_that_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of Python 3.11 raise a SystemError now and then where several threads read headers."""
    values = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    np.save(tmp_path / "x.npy", values)
    np.savez(tmp_path / "x.npz", image=values)
    calls: list[str] = []
    literal = ast.literal_eval

    def failing(text: str) -> object:
        calls.append(text)
        if len(calls) % 2:
            raise SystemError("AST constructor recursion depth mismatch (before=48, after=45)")
        return literal(text)

    monkeypatch.setattr(ast, "literal_eval", failing)
    for name in ("x.npy", "x.npz"):
        np.testing.assert_array_equal(decode_file(tmp_path / name), values)
    assert len(calls) >= 4
