"""Real data sets kept beside the project: skipped where they are absent."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from heterodiff.config import DataConfig
from heterodiff.data.sources import load_data

ROOT = Path(os.environ.get("HETERODIFF_DATA") or Path(__file__).parents[1].parent / "shared" / "data")


def real(name: str) -> Path:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set HETERODIFF_DATA to the folder of real data sets")
    return path


def test_radar_gestures():
    data = load_data(DataConfig(path=real("radar_gestures/png/train")))
    assert (data.spec.height, data.spec.width, data.spec.channels) == (64, 64, 1)
    assert len(data.spec.class_names) == 5
    assert len(data.train) + len(data.val) == 495
    assert set(data.val.labels) == set(range(5))
    assert data.warnings == ()


def test_nuclei(tmp_path):
    source = real("nuclei_uint16/img2d.tif")
    shutil.copyfile(source, tmp_path / "image.tif")
    data = load_data(DataConfig(path=tmp_path))
    stored = tifffile.imread(source)
    assert data.spec.dtype == "uint16"
    assert data.spec.value_range == (stored.min(), stored.max())
    scaled = (stored.astype(np.float64) - stored.min()) / (float(stored.max()) - stored.min())
    np.testing.assert_allclose(data.train[0][0][0], scaled, atol=1e-6)


def test_sentinel2(tmp_path):
    scenes = np.load(real("sentinel2_13band/REFERENCE_SCENES.npy"), allow_pickle=False)
    for index, scene in enumerate(scenes):
        np.save(tmp_path / f"{index}.npy", scene)
    data = load_data(DataConfig(path=tmp_path, val_fraction=0))
    assert (data.spec.channels, data.spec.height, data.spec.width) == (13, 101, 100)
    low, high = data.spec.value_range
    expected = ((scenes - low) / (high - low)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(data.train.batch(range(5))[0], expected, atol=1e-6)


@pytest.mark.parametrize("channels", [None, 3])
def test_noto_emoji(tmp_path, channels):
    for path in sorted(real("noto_emoji/png128").iterdir())[:200]:
        (tmp_path / path.name).symlink_to(path)
    data = load_data(DataConfig(path=tmp_path, channels=channels, image_size=32))
    assert data.spec.channels == (channels or 4)
    assert len(data.train) + len(data.val) == 200
    assert data.spec.class_names == ()
    if channels == 3:
        assert data.train.batch(range(64))[0][:, :, 0, 0].mean() > 0.9
