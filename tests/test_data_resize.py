"""Resizing keeps number type, value range and, with crop, the aspect ratio."""

import numpy as np
import pytest
from PIL import Image

from heterodiff.data.decoding.resize import resize_image


@pytest.mark.parametrize("how", ["crop", "stretch"])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "float32"])
def test_number_type_range_and_size_are_kept(dtype, how):
    image = (np.random.default_rng(0).random((13, 20, 31)) * (65535 if dtype == "uint16" else 255)).astype(dtype)
    for size in ((20, 31), (8, 8), (7, 40), (64, 50)):
        resized = resize_image(image, size, how)
        assert resized.shape == (13, *size)
        assert resized.dtype == image.dtype
        assert image.min() <= resized.min() <= resized.max() <= image.max()
    assert resize_image(image, (20, 31), how) is image


def test_stretch_matches_pillow():
    image = np.random.default_rng(0).random((1, 40, 30), dtype=np.float32)
    expected = np.asarray(Image.fromarray(image[0]).resize((12, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resize_image(image, (16, 12), "stretch")[0], expected, atol=1e-5)


def test_crop_takes_the_centre():
    image = np.zeros((1, 10, 30), np.uint8)
    image[:, :, 10:20] = 200
    assert (resize_image(image, (10, 10), "crop") == 200).all()
    assert (resize_image(image.transpose(0, 2, 1), (10, 10), "crop") == 200).all()
    assert (resize_image(image, (10, 10), "stretch") == 0).any()


def test_channels_are_resized_alike():
    image = np.random.default_rng(0).random((16, 9, 9), dtype=np.float32)
    one_by_one = [resize_image(channel[None], (5, 6), "crop")[0] for channel in image]
    np.testing.assert_array_equal(resize_image(image, (5, 6), "crop"), np.stack(one_by_one))
