"""A saved split and specification are reused, and refused where they do not fit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from heterodiff.config import DataConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.sources import load_data
from heterodiff.errors import DataError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_folder(root, classes=("a", "b"), count=5, size=(6, 9)):
    """Grey PNGs in class subfolders; the first pixel tells them apart."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(noise(*size, seed=index)).save(root / name / f"{index}.png")
    return root


def same_data(one, other):
    for part in ("train", "val"):
        left, right = getattr(one, part), getattr(other, part)
        assert left.names == right.names
        for mine, theirs in zip(left.batch(range(len(left))), right.batch(range(len(right))), strict=True):
            assert torch.equal(mine, theirs)


def test_saved_split_and_spec_are_reused(tmp_path):
    make_folder(tmp_path)
    config = DataConfig(path=tmp_path, val_fraction=0.3)
    data = load_data(config)
    split = json.loads(json.dumps(data.split_to_dict()))
    spec = ImageSpec.from_dict(json.loads(json.dumps(data.spec.to_dict())))
    assert spec == data.spec
    same_data(data, load_data(config.model_copy(update={"split_seed": 9, "val_fraction": 0.0}), split=split, spec=spec))
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "renamed.png")
    with pytest.raises(DataError, match=r"1 are missing, 1 are new \(missing a/0.png, new a/renamed.png\)"):
        load_data(config, split=split, spec=spec)


def test_split_without_training_images_is_refused(tmp_path):
    data = load_data(DataConfig(path=make_folder(tmp_path)))
    with pytest.raises(DataError, match="no image is left for training"):
        load_data(DataConfig(path=tmp_path), split={"train": [], "val": [*data.train.names, *data.val.names]})


def test_spec_keeps_range_and_class_order(tmp_path):
    make_folder(tmp_path)
    spec = ImageSpec(6, 9, 1, ("b", "zebra", "a"), (0.0, 510.0), "uint8")
    data = load_data(DataConfig(path=tmp_path), spec=spec)
    assert data.spec == spec
    assert all(
        label == (2 if name[0] == "a" else 0) for name, label in zip(data.train.names, data.train.labels, strict=True)
    )
    assert data.train.batch(range(8))[0].max() <= 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"channels": 3}, "channels: the run expects 3, found 1"),
        ({"height": 7}, r"height and width: the run expects \(7, 9\), found \(6, 9\); set data.image_size"),
        ({"dtype": "uint16"}, "number type: the run expects uint16, found uint8"),
        ({"class_names": ("b", "c")}, r"classes a are not among those of the run \(b, c\); .*data.labels=none"),
    ],
)
def test_images_unlike_the_spec_are_refused(tmp_path, changed, message):
    content = ImageSpec(6, 9, 1, ("a", "b"), (0.0, 255.0), "uint8").to_dict() | changed
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(path=make_folder(tmp_path)), spec=ImageSpec.from_dict(content))


def test_malformed_spec_is_refused():
    with pytest.raises(DataError, match="expected height, width, channels"):
        ImageSpec.from_dict({"height": 3})


def test_known_images_are_not_read_before_they_are_used(tmp_path):
    """A run on more images than memory holds goes on at once; files are read in the batches that need them."""
    config = DataConfig(path=make_folder(tmp_path, size=(6, 6)), val_fraction=0.3, memory_limit_gb=0)
    data = load_data(config)
    split, spec = data.split_to_dict(), data.spec
    same_data(data, load_data(config, split=split, spec=spec))
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no picture")
    again = load_data(config, split=split, spec=spec)
    assert again.train.names == data.train.names
    assert again.val.names == data.val.names
    with pytest.raises(DataError, match="can no longer be read"):
        again.train.batch([0])
    for changes in ({"memory_limit_gb": 4.0}, {"image_size": (3, 3)}):  # to be held in memory; of another size
        with pytest.raises(DataError, match="none of 10 images can be used"):
            load_data(config.model_copy(update=changes), split=split, spec=spec)
    with pytest.raises(DataError, match="none of 10 images can be used"):
        load_data(config)


def test_images_that_the_run_does_not_know_are_read(tmp_path):
    config = DataConfig(path=make_folder(tmp_path, size=(6, 6)), memory_limit_gb=0, on_bad="skip")
    data = load_data(config)
    (tmp_path / "a" / "bad.png").write_bytes(b"no picture")
    again = load_data(config, split=data.split_to_dict(), spec=data.spec)
    assert [name for name, _ in again.skipped] == ["a/bad.png"]
    Image.fromarray(noise(6, 6)).save(tmp_path / "a" / "new.png")
    with pytest.raises(DataError, match="1 are new"):
        load_data(config, split=data.split_to_dict(), spec=data.spec)
