"""Loading: shapes, value ranges, labels, sizes, policy for bad images, memory, saved splits and specifications."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from heterodiff.config import DataConfig
from heterodiff.config.file import parse_config
from heterodiff.data.check import check_data
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.reading import read_images
from heterodiff.data.sources import list_sources, load_data
from heterodiff.errors import ConfigError, DataError


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


def test_class_folders(tmp_path):
    make_folder(tmp_path, ("cat", "ape"))
    (tmp_path / "ape" / "deeper").mkdir()
    Image.fromarray(noise(6, 9)).save(tmp_path / "ape" / "deeper" / "x.png")
    data = load_data(DataConfig(path=tmp_path))
    assert data.spec == ImageSpec(6, 9, 1, ("ape", "cat"), (0.0, 255.0), "uint8")
    assert (len(data.train), len(data.val), data.skipped, data.warnings) == (9, 2, (), ())
    assert all(
        name.startswith(("ape/", "cat/")[label])
        for name, label in zip(data.train.names, data.train.labels, strict=True)
    )
    image, label = data.train[0]
    assert (image.shape, image.dtype, label) == ((1, 6, 9), torch.float32, data.train.labels[0])
    with Image.open(tmp_path / data.train.names[0]) as opened:
        np.testing.assert_array_equal(image[0], np.asarray(opened).astype(np.float32) / 255)


def test_batch_equals_items_and_checks_bounds(tmp_path):
    data = load_data(DataConfig(path=make_folder(tmp_path)))
    images, labels = data.train.batch([3, 0, 3])
    assert (images.shape, labels.dtype) == ((3, 1, 6, 9), torch.int64)
    for row, index in enumerate([3, 0, 3]):
        assert torch.equal(images[row], data.train[index][0])
        assert labels[row] == data.train[index][1]
    with pytest.raises(IndexError):
        data.train[len(data.train)]
    before = data.train[0][0].clone()
    data.train[0][0].zero_()
    assert torch.equal(data.train[0][0], before)


def test_flat_folder_is_unlabelled(tmp_path):
    Image.fromarray(noise(4, 4)).save(tmp_path / "x.png")
    Image.fromarray(noise(4, 4)).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("x")
    data = load_data(DataConfig(path=tmp_path))
    assert data.spec.class_names == ()
    assert data.train.labels.tolist() == [-1]
    assert data.train.names == ["x.png"]
    assert data.warnings == ("1 files are not images by their suffix and were ignored (1 x .txt)",)


def test_labels_none_ignores_class_folders(tmp_path):
    data = load_data(DataConfig(path=make_folder(tmp_path), labels="none"))
    assert data.spec.class_names == ()
    assert set(data.train.labels) == {-1}


def test_loose_images_have_no_label_and_empty_folders_are_no_class(tmp_path):
    make_folder(tmp_path)
    Image.fromarray(noise(6, 9)).save(tmp_path / "loose.png")
    (tmp_path / "empty").mkdir()
    data = load_data(DataConfig(path=tmp_path, val_fraction=0))
    assert data.spec.class_names == ("a", "b")
    assert data.train.labels[data.train.names.index("loose.png")] == -1
    assert any("1 images lie beside" in warning for warning in data.warnings)
    assert any("not classes: empty" in warning for warning in data.warnings)


def test_class_with_a_single_image_is_a_warning(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "rare").mkdir()
    Image.fromarray(noise(6, 9)).save(tmp_path / "rare" / "x.png")
    assert load_data(DataConfig(path=tmp_path)).warnings == ("classes with a single image: rare",)


def test_thirteen_channels_not_square(tmp_path):
    for index in range(4):
        np.save(tmp_path / f"{index}.npy", noise(20, 30, 13, seed=index).astype(np.float32))
    data = load_data(DataConfig(path=tmp_path, value_range=(0, 255)))
    assert (data.spec.channels, data.spec.height, data.spec.width) == (13, 20, 30)
    index = int(data.train.names[0][0])
    expected = noise(20, 30, 13, seed=index).transpose(2, 0, 1).astype(np.float32) / 255
    np.testing.assert_array_equal(data.train[0][0], expected)


def test_value_range_is_measured_on_training_images_only(tmp_path):
    for index in range(10):
        tifffile.imwrite(tmp_path / f"{index}.tif", np.array([[100 + index, 500 - index]], np.uint16))
    data = load_data(DataConfig(path=tmp_path, val_fraction=0.2))
    train = {int(name[0]) for name in data.train.names}
    assert data.spec.dtype == "uint16"
    assert data.spec.value_range == (100 + min(train), 500 - min(train))
    assert any("measured on the training images" in warning for warning in data.warnings)
    images = data.train.batch(range(len(data.train)))[0]
    assert (images.min(), images.max()) == (0, 1)


def test_values_outside_the_range_are_clamped_and_counted(tmp_path):
    for index, top in enumerate([1.0, 1.5, 3.0]):
        np.save(tmp_path / f"{index}.npy", np.array([[0.0, top]], np.float32))
    data = load_data(DataConfig(path=tmp_path, value_range=(0, 1), val_fraction=0))
    assert data.train.batch([0, 1, 2])[0].flatten().tolist() == [0, 1] * 3
    assert data.warnings == ("2 images have values outside 0 to 1; these are clamped",)


@pytest.mark.parametrize(("dtype", "full"), [("uint8", 255), ("uint16", 15)])
def test_a_range_that_makes_images_white_is_refused(tmp_path, dtype, full):
    """A range of floats, given for images of whole numbers."""
    np.save(tmp_path / "x.npy", np.arange(16, dtype=dtype).reshape(4, 4))
    with pytest.raises(DataError, match=rf"value_range: \[0, 1\] makes images of {dtype} .* such as \[0, {full}\]"):
        load_data(DataConfig(path=tmp_path, value_range=(0, 1)))
    assert load_data(DataConfig(path=tmp_path, value_range=(0, 15))).train[0][0].max() == 1


def test_bool_arrays_are_zero_and_one(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(4, dtype=bool))
    data = load_data(DataConfig(path=tmp_path))
    assert (data.spec.value_range, data.spec.dtype) == ((0.0, 1.0), "bool")
    assert torch.equal(data.train[0][0][0], torch.eye(4))


def test_nearly_uniform_images_are_a_warning(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(4, dtype=np.uint8))
    assert "nearly uniform; check data.value_range" in load_data(DataConfig(path=tmp_path)).warnings[0]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_constant_images_are_refused(tmp_path, dtype):
    np.save(tmp_path / "x.npy", np.full((4, 4), 7, dtype))
    with pytest.raises(DataError, match="single value 7"):
        load_data(DataConfig(path=tmp_path))


def test_wrong_value_range_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data.value_range: .*lower first"):
        load_data(DataConfig(path=make_folder(tmp_path), value_range=(1, 0)))


def test_differing_sizes_need_image_size(tmp_path):
    make_folder(tmp_path)
    Image.fromarray(noise(4, 4)).save(tmp_path / "a" / "small.png")
    with pytest.raises(DataError, match=r"6x9 \(10 images\), 4x4 \(1 images\); set data.image_size, .*\[6, 9\]"):
        load_data(DataConfig(path=tmp_path))
    data = load_data(DataConfig(path=tmp_path, image_size=(5, 8)))
    assert data.train.batch(range(len(data.train)))[0].shape[1:] == (1, 5, 8)


@pytest.mark.parametrize("limit", [4.0, 0.0])
@pytest.mark.parametrize("size", [None, (5, 8), (12, 12)])
def test_lazy_is_the_same_as_in_memory(tmp_path, size, limit):
    make_folder(tmp_path)
    config = DataConfig(path=tmp_path, image_size=size, memory_limit_gb=limit)
    data = load_data(config)
    same_data(data, load_data(config.model_copy(update={"memory_limit_gb": 4.0})))
    assert any("decoded at every access" in warning for warning in data.warnings) == (limit == 0)
    same_data(data, pickle.loads(pickle.dumps(data)))  # as DataLoader workers that are spawned need
    assert data.val.batch([])[0].shape == (0, 1, *(size or (6, 9)))


def test_file_lost_after_loading_is_named(tmp_path):
    data = load_data(DataConfig(path=make_folder(tmp_path), memory_limit_gb=0))
    (tmp_path / data.train.names[2]).unlink()
    with pytest.raises(DataError, match=f"{data.train.names[2]} can no longer be read.*restore"):
        data.train[2]
    Image.fromarray(noise(3, 3)).save(tmp_path / data.train.names[2])
    with pytest.raises(DataError, match=f"{data.train.names[2]} has changed"):
        data.train[2]


BAD = {"a/empty.png": b"", "b/text.png": b"text", "b/new\nline.png": b""}


def test_bad_images_stop_or_are_skipped(tmp_path):
    make_folder(tmp_path)
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "a" / "two.npy", noise(2, 6, 9))
    np.save(tmp_path / "a" / "wide.npy", noise(6, 9).astype(np.uint16))
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(path=tmp_path))
    message = str(caught.value)
    assert "5 of 15 images cannot be used" in message
    for part in (str(tmp_path), "a/empty.png: empty file", "b/text.png: suffix .png", "'b/new\\nline.png'"):
        assert part in message
    assert "a/two.npy: 2 channels, the first image (a/0.png) has 1" in message
    assert "a/wide.npy: values of type uint16, the first image (a/0.png) has uint8" in message
    assert "data.on_bad=skip" in message
    data = load_data(DataConfig(path=tmp_path, on_bad="skip"))
    assert len(data.train) + len(data.val) == 10
    assert {name for name, _ in data.skipped} == {*BAD, "a/two.npy", "a/wide.npy"}
    assert any("5 images cannot be used and were skipped" in warning for warning in data.warnings)


def test_only_the_first_bad_images_are_listed(tmp_path):
    make_folder(tmp_path)
    for index in range(25):
        (tmp_path / "a" / f"bad{index}.png").touch()
    with pytest.raises(DataError, match=r"(?s)25 of 35 images.*\.\.\. and 15 more") as caught:
        load_data(DataConfig(path=tmp_path))
    assert str(caught.value).count("empty file") == 10


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"none of 1 images can be used:\n  a.png: empty file"):
        load_data(DataConfig(path=tmp_path, on_bad="skip"))


def write_modes(folder: Path, *modes: str) -> Path:
    for mode in modes:
        Image.fromarray(noise(6, 6, 3)).convert(mode).save(folder / f"{mode}.png")
    return folder


@pytest.mark.parametrize(
    ("modes", "channels", "note"),
    [
        (("L", "RGB", "P", "1"), 3, "pictures of several kinds (2 grey, 2 RGB) are all read as RGB"),
        (("L", "RGB", "RGBA"), 4, "pictures of several kinds (1 grey, 1 RGB, 1 RGBA) are all read as RGBA"),
        (("L", "LA"), 4, "pictures of several kinds (1 grey, 1 grey with transparency) are all read as RGBA"),
        (("L", "1"), 1, None),
        (("RGB", "P"), 3, None),
    ],
)
@pytest.mark.parametrize("memory_limit_gb", [4.0, 0.0])
def test_pictures_of_several_kinds_are_one_set(modes, channels, note, memory_limit_gb, tmp_path):
    """As if their channels had been given; and a run that goes on reads them in the same way."""
    config = DataConfig(path=write_modes(tmp_path, *modes), memory_limit_gb=memory_limit_gb, val_fraction=0)
    data = load_data(config)
    assert data.spec.channels == channels
    assert [warning.partition(";")[0] for warning in data.warnings if "several kinds" in warning] == [note] * bool(note)
    again = load_data(config, split=data.split_to_dict(), spec=data.spec)
    given = load_data(config.model_copy(update={"channels": channels}))
    for name in data.train.names:
        expected = given.train.batch([given.train.names.index(name)])[0]
        for found in (data, again):
            assert torch.equal(found.train.batch([found.train.names.index(name)])[0], expected)
    assert check_data(config).bad == ()


def test_colour_modes_convert_to_the_channels_that_are_given(tmp_path):
    write_modes(tmp_path, "L", "RGB", "RGBA", "P", "1")
    for channels in (1, 3, 4):
        data = load_data(DataConfig(path=tmp_path, channels=channels))
        assert data.spec.channels == channels
        assert len(data.train) + len(data.val) == 5


def test_arrays_and_pictures_of_other_channels_are_no_mixture(tmp_path):
    write_modes(tmp_path, "RGB")
    np.save(tmp_path / "x.npy", noise(6, 6))
    with pytest.raises(DataError, match=r"1 of 2 images cannot be used:\n  x.npy: 1 channel, data.channels is 3"):
        load_data(DataConfig(path=tmp_path))


@pytest.mark.parametrize(("background", "expected"), [("white", 1.0), ("black", 0.0), ("#336699", 0.2)])
def test_background_of_what_is_transparent(background, expected, tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (4, 4), (0, 0, 255, 255)).save(tmp_path / "blue.png")
    data = load_data(DataConfig(path=tmp_path, channels=3, background=background, val_fraction=0))
    red = {name: float(data.train.batch([row])[0][0, 0].mean()) for row, name in enumerate(data.train.names)}
    assert red == pytest.approx({"clear.png": expected, "blue.png": 0.0})
    image = read_images([tmp_path / "clear.png"], data.spec, "crop", background)
    assert float(image[0, 0].mean()) == pytest.approx(expected)


@pytest.mark.parametrize("background", ["sky", "", "#12", "rgba(1,2,3,4)"])
def test_a_background_that_is_no_colour(background):
    with pytest.raises(ConfigError, match=r"data.background: .*expected the name of a colour"):
        parse_config({"data": {"background": background}})


def test_channels_given_and_not_found(tmp_path):
    np.save(tmp_path / "x.npy", noise(2, 6, 9))
    with pytest.raises(DataError, match=r"x.npy: 2 channels, data.channels is 5"):
        load_data(DataConfig(path=tmp_path, channels=5))


def test_far_too_long_image_is_refused_before_it_is_scaled(tmp_path):
    np.save(tmp_path / "x.npy", noise(1, 2_000_000))
    with pytest.raises(DataError, match=r"x.npy: 1x2000000 scaled to cover 64x64 is too large"):
        load_data(DataConfig(path=tmp_path, image_size=64))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "needs data.path"),
        ("absent", "absent: no such folder"),
        ("file.png", "file.png: a file; expected a folder"),
        ("empty", "empty: no images found; expected files of type .png"),
    ],
)
def test_nothing_to_load(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").touch()
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(path=path and tmp_path / path))


@pytest.mark.parametrize("labels", ["auto", "required"])
def test_a_single_class_is_refused(tmp_path, labels):
    make_folder(tmp_path, ("only",))
    with pytest.raises(DataError, match=r"one class found \(only\).*at least two.*data.labels=none"):
        load_data(DataConfig(path=tmp_path, labels=labels))


def test_required_labels_are_missed(tmp_path):
    np.save(tmp_path / "x.npy", noise(6, 9))
    with pytest.raises(DataError, match=r"data.labels=required but no image has a label; .*metadata.csv"):
        load_data(DataConfig(path=tmp_path, labels="required"))


def test_unknown_source_names_the_nearest():
    with pytest.raises(DataError, match=r"unknown source 'digit' \(did you mean 'digits'\?\)"):
        load_data(DataConfig().model_copy(update={"source": "digit"}))
    assert list_sources() == [
        *("images", "captions", "webdataset", "hf-dataset", "volumes", "latents"),
        *("digits", "microdoppler", "shapes", "brain-phantom"),
    ]


@pytest.mark.parametrize("size", [None, 12])
def test_digits(size):
    data = load_data(DataConfig(source="digits", image_size=size))
    side = size or 8
    assert data.spec == ImageSpec(side, side, 1, tuple("0123456789"), (0.0, 16.0), "float32")
    assert len(data.train) + len(data.val) == 1797
    assert data.warnings == ()
    images, labels = data.val.batch(range(len(data.val)))
    assert 0 <= images.min() < images.max() <= 1
    assert set(labels.tolist()) == set(range(10))


def test_training_on_some_classes_leaves_the_others_for_validation_and_the_saved_split_valid(tmp_path):
    make_folder(tmp_path, ("healthy", "ill", "worse"), count=10)
    whole = DataConfig(path=tmp_path, val_fraction=0.3)
    some = whole.model_copy(update={"train_classes": ("healthy", "worse")})
    data, every = load_data(some), load_data(whole)
    assert data.spec == every.spec
    assert data.val.names == every.val.names
    assert set(data.train.labels.tolist()) == {0, 2}
    assert [name for name in every.train.names if "ill" not in name] == list(data.train.names)
    assert sorted(data.split_to_dict()["train"]) == sorted(every.train.names)
    same_data(load_data(some, split=data.split_to_dict(), spec=data.spec), data)


def test_classes_to_train_on_must_be_there(tmp_path):
    make_folder(tmp_path, ("healthy", "ill"))
    with pytest.raises(DataError, match=r"train_classes: .* has no class well; its classes are healthy, ill"):
        load_data(DataConfig(path=tmp_path, train_classes=("well",)))
    with pytest.raises(DataError, match=r"train_classes: .* has no class ill; its classes are none"):
        load_data(DataConfig(path=tmp_path, labels="none", train_classes=("ill",)))
    split = {"train": [f"healthy/{k}.png" for k in range(5)], "val": [f"ill/{k}.png" for k in range(5)]}
    with pytest.raises(DataError, match=r"no image of data\.train_classes, ill, is left for training"):
        load_data(DataConfig(path=tmp_path, train_classes=("ill",)), split=split)
