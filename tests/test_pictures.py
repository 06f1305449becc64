"""Pictures: shapes, modes, stored units, captions."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from heterodiff.errors import DataError
from heterodiff.pictures import image_grid, save_image, to_pil


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA"), (2, "L"), (7, "L"), (16, "L")])
def test_any_channel_count_can_be_looked_at(channels, mode):
    picture = to_pil(torch.rand(channels, 5, 7))
    assert picture.mode == mode
    cells = (1, 1) if channels in (1, 3, 4) else (math.ceil(channels**0.5), round(channels**0.5))
    assert picture.size == (8 * cells[0] - 1, 6 * cells[1] - 1)


def test_mosaic_puts_channels_side_by_side_row_by_row():
    image = torch.stack([torch.full((2, 3), value / 10) for value in range(5)])
    pixels = np.asarray(to_pil(image))
    assert pixels.shape == (5, 11)
    for channel in range(5):
        row, column = divmod(channel, 3)
        assert (pixels[3 * row : 3 * row + 2, 4 * column : 4 * column + 3] == round(25.5 * channel)).all()
    assert (pixels[2] == 217).all()
    assert (pixels[:2, [3, 7]] == 217).all()
    assert (pixels[3:, 8:] == 255).all()


def test_mosaic_on_request_for_modalities():
    assert to_pil(torch.rand(4, 8, 8), mosaic=True).size == (17, 17)
    assert to_pil(torch.rand(1, 8, 8), mosaic=True).size == (8, 8)


def test_values_are_clipped_rounded_and_nan_is_black():
    pixels = np.asarray(to_pil(torch.tensor([[[-1.0, 0.5, 2.0, float("nan")]]])))
    assert pixels.tolist() == [[0, 128, 255, 0]]


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"\(C, H, W\), found \(4, 4\)"):
        to_pil(torch.rand(4, 4))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_eight_bit_round_trip(tmp_path, channels):
    stored = torch.randint(0, 256, (channels, 4, 6))
    path = save_image(stored / 255, tmp_path / "new" / "image_0.5")
    assert path == tmp_path / "new" / "image_0.5.png"
    read = np.asarray(Image.open(path)).reshape(4, 6, channels).transpose(2, 0, 1)
    assert (read == stored.numpy()).all()


def test_sixteen_bit_round_trip_in_stored_units(tmp_path):
    stored = torch.randint(100, 4000, (1, 4, 6)).double()
    path = save_image((stored - 100) / 3900, tmp_path / "image", "uint16", (100, 4000))
    with Image.open(path) as picture:
        assert picture.mode.startswith("I")
        assert np.abs(np.asarray(picture).astype(int) - stored[0].numpy()).max() <= 0


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 1), ("uint8", 2), ("uint16", 3), ("int16", 1)])
def test_what_png_cannot_hold_becomes_an_array(tmp_path, dtype, channels):
    image = torch.rand(channels, 4, 6)
    path = save_image(image, tmp_path / "image", dtype, (-2.0, 6.0))
    read = np.load(path, allow_pickle=False)
    assert path.suffix == ".npy"
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, image.numpy() * 8 - 2, rtol=1e-6, atol=1e-6)


def test_nan_is_not_saved(tmp_path):
    with pytest.raises(DataError, match="NaN"):
        save_image(torch.full((1, 2, 2), float("nan")), tmp_path / "image")
    assert not list(tmp_path.iterdir())


def test_grid_enlarges_by_an_integer_factor_without_smoothing():
    images = torch.tensor([0.0, 1.0]).repeat(32).reshape(1, 1, 8, 8).repeat(6, 1, 1, 1)
    picture = image_grid(images, columns=3)
    pixels = np.asarray(picture.convert("L"))
    assert picture.mode == "RGB"
    assert pixels.shape == (2 * 12 + 2 * 64 + 6, 2 * 12 + 3 * 64 + 2 * 6)
    expected = np.kron(images[0, 0].numpy(), np.ones((8, 8))) * 255
    assert (pixels[12:76, 12:76] == expected).all()
    assert (pixels[:12] == 255).all()


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (3, 3, 4, 60), (7, 4, 100, 20), (1, 2, 300, 300)])
def test_grid_takes_any_size_with_captions_title_and_row_names(shape):
    captions = [f"class number {index} with a very long name" for index in range(shape[0])]
    with_captions = image_grid(torch.rand(shape), captions, title="Ärger → Ωmega")
    plain = image_grid(torch.rand(shape))
    assert with_captions.height > plain.height
    rows = image_grid(torch.rand(shape), ["only row"], columns=shape[0])
    assert rows.width >= image_grid(torch.rand(shape), columns=shape[0]).width


def test_captions_are_drawn_and_empty_ones_are_not():
    def ink(labels):
        return (np.asarray(image_grid(torch.ones(4, 1, 8, 8), labels).convert("L")) < 128).sum()

    assert ink(["", "", "", ""]) == 0
    assert ink(["zero", "one", "two", "three"]) > 100


def test_a_label_that_fills_its_row_is_drawn_once_at_the_left():
    images = torch.rand(6, 1, 8, 8)
    names = ["swipe", "double_tap_in"]
    by_image = image_grid(images, [name for name in names for _ in range(3)], columns=3)
    assert by_image.tobytes() == image_grid(images, names, columns=3).tobytes()
    plain = image_grid(images, columns=3)
    assert by_image.height == plain.height
    column = by_image.width - plain.width
    wider = image_grid(images, ["swipe", "double_tap_inside"], columns=3)
    assert wider.width > by_image.width
    assert image_grid(images, ["swipe", "x" * 500], columns=3).width - plain.width < 2 * column + 120
    mixed = image_grid(images, ["a", "a", "b", "b", "b", "b"], columns=3)
    assert mixed.width == plain.width
    assert mixed.height > plain.height


@pytest.mark.parametrize("label", ["", "none"])
def test_labels_that_name_nothing_are_left_out(label):
    images = torch.rand(6, 1, 8, 8)
    assert image_grid(images, [label] * 6, columns=3).tobytes() == image_grid(images, columns=3).tobytes()


def test_lines_of_an_enlarged_mosaic_stay_thin():
    picture = image_grid(torch.zeros(1, 13, 4, 4), mosaic=True)
    assert picture.size == (64 + 3 + 24, 64 + 3 + 24)


@pytest.mark.parametrize("labels", [["a"], ["a"] * 5])
def test_wrong_number_of_labels(labels):
    with pytest.raises(ValueError, match="expected 6 labels"):
        image_grid(torch.rand(6, 1, 8, 8), labels, columns=3)


def test_no_images():
    with pytest.raises(ValueError, match="B >= 1"):
        image_grid(torch.rand(0, 1, 8, 8))
