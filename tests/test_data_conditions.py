"""Condition images and columns of metadata: what is read, made and refused, against obvious loops and scipy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from heterodiff.config import DataConfig
from heterodiff.config.file import parse_config
from heterodiff.data.attributes import encode_attribute, outside
from heterodiff.data.conditions import condition_image, edges, split_condition, to_maps
from heterodiff.data.reading import read_condition
from heterodiff.data.sources import load_data, load_test
from heterodiff.errors import ConfigError, DataError
from heterodiff.image_spec import AttributeSpec, ImageSpec

SIZE = (8, 12)


def write(path: Path, seed: int, channels: int = 1, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Write a random picture and return it as (C, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    Image.fromarray(values[..., 0] if channels == 1 else values).save(path)
    return np.moveaxis(values, 2, 0)


def two_folders(root: Path, count: int = 6) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Grey pictures in ``images`` and coloured ones of the same names, but for the suffix, in ``maps``."""
    images = {f"{k}.png": write(root / "images" / f"{k}.png", k) for k in range(count)}
    maps = {f"{k}.png": write(root / "maps" / f"{k}.bmp", 100 + k, channels=3) for k in range(count)}
    return images, maps


def config(**content: Any) -> DataConfig:
    return DataConfig.model_validate(content)


@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "at every access"])
@pytest.mark.parametrize("way", ["folder", "column"])
def test_condition_images_of_files_lie_beside_their_images(tmp_path: Path, way: str, memory: float) -> None:
    images, maps = two_folders(tmp_path)
    if way == "folder":
        data = {"path": tmp_path / "images", "condition": {"folder": str(tmp_path / "maps")}}
    else:
        lines = [f"images/{name},maps/{Path(name).stem}.bmp" for name in images]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,beside", *lines]))
        data = {"path": tmp_path, "condition": {"column": "beside"}}
    found = load_data(config(**data, memory_limit_gb=memory))
    assert found.spec.channels == 1
    assert (found.spec.condition.kind, found.spec.condition.channels) == ("images", 3)
    for part in (found.train, found.val):
        for row, name in enumerate(part.names):
            image, condition = split_condition(part.inputs([row])[0], found.spec)
            name = name.removeprefix("images/")
            np.testing.assert_array_equal(image[0].numpy(), images[name] / np.float32(255))
            np.testing.assert_array_equal(condition[0].numpy(), maps[name] / np.float32(255))
            assert torch.equal(part.batch([row])[0], image)  # others see the image alone
    again = load_data(config(**data), found.split_to_dict(), ImageSpec.from_dict(found.spec.to_dict()))
    assert torch.equal(again.train.inputs([0])[0], found.train.inputs([0])[0])


def test_images_and_conditions_are_resized_and_augmented_alike(tmp_path: Path) -> None:
    for k in range(4):
        values = write(tmp_path / "images" / f"{k}.png", k, size=(16, 16))
        (tmp_path / "copies").mkdir(exist_ok=True)
        Image.fromarray(values[0]).save(tmp_path / "copies" / f"{k}.png")
    found = load_data(config(path=tmp_path / "images", condition={"folder": str(tmp_path / "copies")}, image_size=8))
    image, condition = split_condition(found.train.inputs([0, 1])[0], found.spec)
    assert torch.equal(image, condition)


@pytest.mark.parametrize("channels", [[0, 2], [1]])
def test_some_channels_are_given_and_the_others_drawn(channels: list[int]) -> None:
    phantom = {"source": "brain-phantom", "image_size": 32, "brain_phantom": {"patients": 4, "slices_per_patient": 2}}
    whole = load_data(config(**phantom))
    found = load_data(config(**phantom, condition={"channels": channels}))
    others = [channel for channel in range(4) if channel not in channels]
    image, condition = split_condition(found.train.inputs([1])[0], found.spec)
    expected = whole.train.batch([whole.train.names.index(found.train.names[1])])[0]
    assert torch.equal(image, expected[:, others])
    assert torch.equal(condition, expected[:, channels])
    for given in (expected, expected[:, channels]):  # a user has all channels, or those
        assert torch.equal(condition_image(given, found.spec, ready=True), condition)


def test_masks_are_conditions() -> None:
    phantom = {"source": "brain-phantom", "image_size": 32, "brain_phantom": {"patients": 6, "slices_per_patient": 4}}
    found = load_data(config(**phantom, test_fraction=0.3, condition={"mask": True}))
    test = load_test(config(**phantom, test_fraction=0.3, condition={"mask": True}), found.spec)
    image, condition = split_condition(test.images.inputs(range(len(test.images)))[0], found.spec)
    assert image.shape[1:] == (4, 32, 32)
    expected = np.stack([test.mask(row) for row in range(len(test.images))])
    assert expected.any()
    np.testing.assert_array_equal(condition[:, 0].numpy(), expected)


def test_low_resolution_is_the_mean_of_squares_enlarged() -> None:
    found = load_data(config(source="digits", condition={"downscale": 4}))
    images = found.val.batch(range(3))[0]
    _, condition = split_condition(images, found.spec)
    small = np.array(
        [[[x[0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean() for j in (0, 1)] for i in (0, 1)] for x in images]
    )
    pictures = [Image.fromarray(x.astype(np.float32)).resize((8, 8), Image.Resampling.BICUBIC) for x in small]
    expected = np.clip(np.stack([np.array(x) for x in pictures]), 0, 1)
    # Pillow's cubic has a = -0.5, torch's -0.75: another overshoot, the same picture.
    assert np.abs(condition[:, 0].numpy() - expected).max() < 0.1
    given = torch.from_numpy(small).float()[:, None]
    torch.testing.assert_close(condition_image(given, found.spec, ready=True), condition, atol=1e-6, rtol=0)
    torch.testing.assert_close(condition_image(images, found.spec, ready=False), condition)


def test_edges_are_those_of_scipy() -> None:
    images = torch.rand(3, 2, 9, 11, generator=torch.Generator().manual_seed(0))
    images[2] = 0.5
    found = edges(images)
    for image, edge in zip(images[:2], found, strict=False):
        grey = image.mean(dim=0).double().numpy()
        expected = np.hypot(*(scipy.ndimage.sobel(grey, axis=axis, mode="nearest") for axis in (0, 1)))
        np.testing.assert_allclose(edge[0].numpy(), expected / expected.max(), atol=1e-5)
    assert found[2].abs().max() == 0  # nothing there, and no division by zero


@pytest.mark.parametrize("factor", [1, 4])
def test_maps_hold_every_pixel_of_a_condition(factor: int) -> None:
    condition = torch.rand(2, 3, 8, 12)
    maps = to_maps(condition, factor)
    assert maps.shape == (2, 3 * factor**2, 8 // factor, 12 // factor)
    for y, x, c in ((0, 0, 0), (5, 9, 2), (7, 11, 1)):
        place = c * factor**2 + (y % factor) * factor + x % factor
        assert maps[1, place, y // factor, x // factor] == condition[1, c, y, x] * 2 - 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"folder": "maps"}, r"no condition image for 2\.png in .*maps; add the files"),
    "folder": ({"folder": "nowhere"}, "no such folder"),
    "size": ({"folder": "sizes"}, "its condition image has the size 4x4, the image itself 8x12"),
    "type": ({"folder": "types"}, "its condition image has the type float32, the image itself uint8"),
    "channels": ({"folder": "colours"}, "its condition image has 3 channels, that of the first image has 1"),
    "no metadata": ({"column": "beside"}, "has no column beside; it has none"),
    "no mask": ({"mask": True}, "has no masks; use a source with masks"),
    "every channel": ({"channels": [0]}, "have the channels 0 to 0, of which at least one is to be drawn"),
    "factor": ({"downscale": 3}, "downscale=3: the images are 8x12; expected a divisor of both"),
    "no such channel": ({"channels": [3]}, "data.condition.channels asks for channel 3, it has 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_condition_images_that_cannot_be_used_are_named(tmp_path: Path, case: str) -> None:
    condition, message = WRONG[case]
    for k in range(4):
        write(tmp_path / "images" / f"{k}.png", k)
        if k != 2:
            write(tmp_path / "maps" / f"{k}.png", k)
        write(tmp_path / "sizes" / f"{k}.png", k, size=SIZE if k != 1 else (4, 4))
        write(tmp_path / "colours" / f"{k}.png", k, channels=3 if k == 3 else 1)
        (tmp_path / "types").mkdir(exist_ok=True)
        np.save(tmp_path / "types" / f"{k}.npy", np.random.default_rng(k).random((1, *SIZE), np.float32))
    if "folder" in condition:
        condition = {"folder": str(tmp_path / condition["folder"])}
    with pytest.raises(DataError, match=message):
        load_data(config(path=tmp_path / "images", condition=condition))


@pytest.mark.parametrize("given", [{}, {"edges": True, "downscale": 2}, {"downscale": 1}, {"edges": False}, 4])
def test_a_condition_is_one_thing(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.condition"):
        parse_config({"data": {"source": "digits", "condition": given}})


# ---- columns of metadata


def decode_attribute(spec: AttributeSpec, value: float) -> float:
    return value * spec.std + spec.mean


def with_metadata(root: Path, rows: list[dict[str, Any]], label: bool = False) -> Path:
    names = ["file_name", *(["label"] if label else []), *(key for key in rows[0] if key != "label")]
    lines = [",".join(names)]
    for k, row in enumerate(rows):
        write(root / f"{k}.png", k)
        lines.append(",".join([f"{k}.png", *(str(row.get(name, "")) for name in names[1:])]))
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


ROWS = [
    {"user": f"u{k % 3}" if k != 4 else "", "angle": 10 * k if k != 5 else "", "label": "ab"[k % 2]} for k in range(12)
]


@pytest.mark.parametrize("label", [True, False])
def test_columns_are_conditions(tmp_path: Path, label: bool) -> None:
    root = with_metadata(tmp_path, ROWS, label)
    found = load_data(config(path=root, conditions={"user": "class", "angle": "number"}))
    assert found.spec.class_names == (("a", "b") if label else ())
    user, angle = found.spec.attributes
    assert user.classes == ("u0", "u1", "u2")
    trained = [ROWS[int(Path(name).stem)]["angle"] for name in found.train.names]
    trained = [value for value in trained if value != ""]
    assert (angle.low, angle.high) == (min(trained), max(trained))
    assert angle.mean == pytest.approx(np.mean(trained))
    assert angle.std == pytest.approx(np.std(trained))
    for part in (found.train, found.val):
        rows = part.conditions_of(range(len(part)))
        assert rows.shape == (len(part), 3)
        for name, (number, of_user, of_angle) in zip(part.names, rows.tolist(), strict=True):
            row = ROWS[int(Path(name).stem)]
            assert number == ("ab".index(row["label"]) if label else -1)
            assert math.isnan(of_user) if row["user"] == "" else user.classes[int(of_user)] == row["user"]
            assert (
                math.isnan(of_angle)
                if row["angle"] == ""
                else decode_attribute(angle, of_angle) == pytest.approx(row["angle"], abs=1e-4)
            )
    again = load_data(
        config(path=root, conditions={"user": "class", "angle": "number"}),
        found.split_to_dict(),
        ImageSpec.from_dict(found.spec.to_dict()),
    )
    torch.testing.assert_close(again.train.conditions_of([0, 3]), found.train.conditions_of([0, 3]), equal_nan=True)
    assert torch.equal(
        found.train.take([2, 3]).conditions_of([1]).nan_to_num(9), found.train.conditions_of([3]).nan_to_num(9)
    )


BAD_ROWS: dict[str, tuple[dict[int, dict[str, Any]], str]] = {
    "not a number": ({3: {"angle": "steep"}}, "holds steep, which is not a finite number; correct it"),
    "infinite": ({3: {"angle": "inf"}}, "holds inf, which is not a finite number"),
    "all the same": ({k: {"angle": 7} for k in range(12)}, "has the single value 7 there"),
    "all empty": ({k: {"angle": ""} for k in range(12)}, "has no values there"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_columns_that_cannot_be_conditions_are_named(tmp_path: Path, case: str) -> None:
    changes, message = BAD_ROWS[case]
    root = with_metadata(tmp_path, [row | changes.get(k, {}) for k, row in enumerate(ROWS)])
    with pytest.raises(DataError, match=rf"data\.conditions\.angle: .*{message}"):
        load_data(config(path=root, conditions={"angle": "number"}, val_fraction=0.0))


def test_a_column_that_is_not_there_is_named_with_those_that_are_meant(tmp_path: Path) -> None:
    root = with_metadata(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"data\.conditions: .* has no column angel.*angle.*; it has angle, user"):
        load_data(config(path=root, conditions={"angel": "number", "user": "class"}))


def test_npz_files_have_columns(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, speed=np.arange(6) * 0.5, site=np.array(list("aabbab")))
    found = load_data(
        config(path=tmp_path / "x.npz", conditions={"speed": "number", "site": "class"}, val_fraction=0.0)
    )
    assert found.spec.attributes[1].classes == ("a", "b")
    speeds = [decode_attribute(found.spec.attributes[0], v) for v in found.train.attributes[:, 0]]
    assert speeds == pytest.approx([0.5 * int(name) for name in found.train.names], abs=1e-5)


def test_simulated_radar_knows_speed_and_aspect() -> None:
    from heterodiff.simulators.microdoppler import random_state, simulate

    radar = {"source": "microdoppler", "image_size": 32, "microdoppler": {"images_per_class": 3}}
    wanted = {"speed_m_s": "number", "aspect_deg": "number", "elevation_deg": "number"}
    found = load_data(config(**radar, conditions=wanted, val_fraction=0.0))
    for row in (0, 4, 17):
        name, _, picture = found.train.names[row].partition("/")
        number = list(dict.fromkeys(n.partition("/")[0] for n in found.train.names)).index(name)
        facts = simulate(name, random_state(0, number, int(picture)), found_config(radar), 32, 32)[1]
        for attribute, value in zip(found.spec.attributes, found.train.attributes[row], strict=True):
            assert decode_attribute(attribute, float(value)) == pytest.approx(getattr(facts, attribute.name), abs=1e-3)


def found_config(radar: dict[str, Any]) -> Any:
    return config(**radar).microdoppler


def test_slices_know_their_height() -> None:
    phantom = {"source": "brain-phantom", "image_size": 32, "brain_phantom": {"patients": 3, "slices_per_patient": 5}}
    found = load_data(config(**phantom, conditions={"height": "number"}, val_fraction=0.0))
    heights = [decode_attribute(found.spec.attributes[0], v) for v in found.train.attributes[:, 0].tolist()]
    assert heights == pytest.approx([int(name[-3:]) / 4 for name in found.train.names], abs=1e-6)


def test_values_that_a_user_gives() -> None:
    number = AttributeSpec("angle", (), mean=10.0, std=4.0, low=2.0, high=20.0)
    user = AttributeSpec("user", ("ann", "bob"))
    assert encode_attribute(number, "14") == 1.0
    assert encode_attribute(user, "bob") == 1.0
    assert math.isnan(encode_attribute(user, None))
    assert outside(number, "20") is None
    assert outside(user, "bob") is None
    assert "angle=21 is outside the training images' 2 to 20" in str(outside(number, 21))
    for spec, value, message in (
        (number, "fast", "angle: expected a finite number, found fast"),
        (number, "nan?", "expected a finite number"),
        (number, float("inf"), "expected a finite number"),
        (number, True, "expected a finite number"),
        (user, "bo", "user: no class bo.*bob.*; it has ann, bob"),
    ):
        with pytest.raises(ConfigError, match=message):
            encode_attribute(spec, value)


def test_condition_files_are_read_as_in_training(tmp_path: Path) -> None:
    two_folders(tmp_path)
    found = load_data(config(path=tmp_path / "images", condition={"folder": str(tmp_path / "maps")}))
    name = found.train.names[0]
    read = read_condition(tmp_path / "maps" / f"{Path(name).stem}.bmp", found.spec, False, "crop")
    assert torch.equal(read, split_condition(found.train.inputs([0])[0], found.spec)[1])
    np.save(tmp_path / "two.npy", np.zeros((2, *SIZE), np.uint8))
    for path, message in (("none.png", "no such image file"), ("two.npy", "the run was trained on 3 of uint8")):
        with pytest.raises(DataError, match=message):
            read_condition(tmp_path / path, found.spec, False, "crop")
    with pytest.raises(ConfigError, match="are not made of images; give them themselves"):
        condition_image(torch.rand(1, 1, 8, 12), found.spec, ready=False)
    with pytest.raises(ConfigError, match="condition images of 1 channels: expected 3"):
        condition_image(torch.rand(1, 1, 8, 12), found.spec, ready=True)
