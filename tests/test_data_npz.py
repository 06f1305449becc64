"""One npz file that holds all images and labels."""

import numpy as np
import pytest

from heterodiff.config import DataConfig
from heterodiff.data.sources import load_data
from heterodiff.errors import DataError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
@pytest.mark.parametrize("keys", [("image", "label"), ("images", "labels")])
def test_npz_of_many_images(tmp_path, layout, keys):
    images = noise(6, 5, 7, 9)  # N, C, H, W
    stored = {"NHW": images[:, 0], "NHWC": images.transpose(0, 2, 3, 1), "NCHW": images}[layout]
    np.savez(tmp_path / "all.npz", **{keys[0]: stored, keys[1]: np.array([10, 2, -1, 10, 2, 2])})
    data = load_data(DataConfig(path=tmp_path / "all.npz", val_fraction=0))
    assert data.spec.class_names == ("2", "10")
    assert data.train.labels.tolist() == [1, 0, -1, 1, 0, 0]
    expected = images[:, :1] if layout == "NHW" else images
    np.testing.assert_array_equal(data.train.batch(range(6))[0], expected.astype(np.float32) / 255)


def test_npz_text_labels(tmp_path):
    np.savez(tmp_path / "all.npz", image=noise(3, 7, 9), label=np.array(["dog", "", "cat"]))
    data = load_data(DataConfig(path=tmp_path / "all.npz"))
    assert (data.spec.class_names, data.train.labels.tolist()) == (("cat", "dog"), [1, -1, 0])


@pytest.mark.parametrize(
    ("arrays", "changed", "message"),
    [
        ({"pictures": noise(3, 4, 5)}, {}, "expected one named 'image' or 'images'"),
        ({"image": noise(4, 5)}, {}, r"shape \(4, 5\)"),
        ({"image": noise(2, 4, 5, 4)}, {}, "set data.channels"),
        ({"image": noise(3, 4, 5), "label": np.arange(2)}, {}, r"labels of shape \(2,\).*data.labels=none"),
        ({"image": noise(3, 4, 5), "label": np.ones(3)}, {}, "type float64; expected"),
        ({"image": np.array([{}], dtype=object)}, {}, "not readable as npz: Object arrays"),
        ({"image": noise(3, 4, 5)}, {"memory_limit_gb": 1e-9}, "60 bytes; at most 1: raise data.memory_limit_gb"),
        ({"image": np.array([[[np.nan, 1]]])}, {}, "0: 1 of 2 values are NaN"),
    ],
)
def test_unusable_npz(tmp_path, arrays, changed, message):
    np.savez(tmp_path / "all.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(path=tmp_path / "all.npz", **changed))


def test_not_an_npz(tmp_path):
    (tmp_path / "all.npz").write_bytes(b"text")
    with pytest.raises(DataError, match=r"all.npz: not readable as npz.*savez"):
        load_data(DataConfig(path=tmp_path / "all.npz"))
