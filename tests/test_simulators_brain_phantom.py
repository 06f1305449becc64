"""Simulated heads: what the class says is what the mask and the picture show, and no threshold finds the lesions."""

import pickle

import numpy as np
import pytest
from scipy import ndimage

from heterodiff.config import BrainPhantomConfig, DataConfig
from heterodiff.data.collection import Collection
from heterodiff.data.sources import load_data, open_source, part_of
from heterodiff.errors import DataError
from heterodiff.simulators.brain_phantom import CLASSES, head_of, open_brain_phantom
from heterodiff.simulators.brain_phantom.head import INTENSITY, render

FLAIR, T1, T1CE, T2 = range(4)


def part(config, name):
    return part_of(open_source(config), config, name)


def phantom(size: int | None = None, **settings: object) -> Collection:
    config = BrainPhantomConfig(**{"patients": 12, **settings})  # type: ignore[arg-type]
    return open_brain_phantom(DataConfig(source="brain-phantom", image_size=size, brain_phantom=config))


def unhealthy_rows(collection: Collection) -> list[int]:
    return [row for row, name in enumerate(collection.class_of) if name == "unhealthy"]


def best_threshold_dice(images: np.ndarray, masks: np.ndarray) -> float:
    """The mean Dice of the threshold that is best for just these images (N, H, W)."""
    best = 0.0
    for threshold in np.linspace(images.min(), images.max(), 60):
        found = images > threshold
        both, all_ = (found & masks).sum(axis=(1, 2)), found.sum(axis=(1, 2)) + masks.sum(axis=(1, 2))
        best = max(best, float((2 * both / all_).mean()))
    return best


def test_the_class_is_what_the_mask_shows() -> None:
    collection = phantom()
    assert collection.mask is not None
    for row, name in enumerate(collection.class_of):
        mask = collection.mask(row)
        assert mask.shape == (64, 64)
        assert mask.dtype == bool
        assert CLASSES[int(mask.any())] == name
        if mask.any():
            parts, count = ndimage.label(mask)
            assert (parts == 1 + np.argmax(np.bincount(parts[parts > 0])[1:])).sum() >= 0.9 * mask.sum()
            assert count <= 3
            assert mask.sum() >= 10


def test_images_are_four_modalities_from_nothing_to_one() -> None:
    collection = phantom()
    for row in (0, 7, 30):
        image = collection.read(row)
        assert image.shape == (4, 64, 64)
        assert image.dtype == np.float32
        assert image.min(axis=(1, 2)).tolist() == [0] * 4
        assert image.max(axis=(1, 2)).tolist() == [1] * 4


def test_modalities_show_tissues_as_mri_does() -> None:
    """Fluid is dark but for T2; grey matter is darker than white on T1 and brighter on FLAIR and T2."""
    for patient in range(3):
        head, rng = head_of(BrainPhantomConfig(), patient), np.random.RandomState(0)
        image, _ = render(head, 7, 0.0, rng, (128, 128), contrast=1, bias=0, noise=0)
        tissue = dict(zip(INTENSITY, head.intensity, strict=True))
        fluid, grey, white = (
            (np.abs(image - tissue[name][:, None, None]) < 0.005).all(axis=0) for name in ("fluid", "grey", "white")
        )
        for found in (fluid, grey, white):
            assert found.mean() > 0.005
        of = {name: image[:, found].mean(axis=1) for name, found in (("f", fluid), ("g", grey), ("w", white))}
        assert (of["f"][[FLAIR, T1, T1CE]] < of["w"][[FLAIR, T1, T1CE]] - 0.2).all()
        assert of["f"][T2] > of["g"][T2] + 0.2
        assert (of["g"][[T1, T1CE]] < of["w"][[T1, T1CE]] - 0.1).all()
        assert (of["g"][[FLAIR, T2]] > of["w"][[FLAIR, T2]] + 0.05).all()


@pytest.mark.parametrize(("share", "low", "high"), [(0, 0, 0), (0.4, 0.35, 0.45), (1, 0.8, 1)])
def test_so_large_a_share_shows_a_lesion(share: float, low: float, high: float) -> None:
    collection = phantom(patients=200, unhealthy=share)
    assert low <= len(unhealthy_rows(collection)) / len(collection.names) <= high


def test_no_threshold_finds_lesions_of_the_default() -> None:
    collection = phantom()
    assert collection.mask is not None
    rows = unhealthy_rows(collection)
    images = np.stack([collection.read(row) for row in rows])
    masks = np.stack([collection.mask(row) for row in rows])
    for seen in (images[:, FLAIR], images[:, T2], images[:, [FLAIR, T2]].mean(axis=1), -images[:, T1]):
        assert best_threshold_dice(seen, masks) < 0.4


def test_contrast_makes_lesions_plain_or_invisible() -> None:
    plain, hidden = phantom(contrast=3), phantom(contrast=0, noise=0)
    assert plain.mask is not None
    assert hidden.mask is not None
    rows = unhealthy_rows(plain)
    images, masks = np.stack([plain.read(row) for row in rows]), np.stack([plain.mask(row) for row in rows])
    assert best_threshold_dice(images[:, [FLAIR, T2]].mean(axis=1), masks) > 0.6
    for row in rows[:20]:  # what of the lesion lies in white matter looks like white matter around it
        image, mask = hidden.read(row)[T1CE], ndimage.binary_erosion(hidden.mask(row))
        if mask.any():
            assert np.ptp(image[mask]) < 0.1


def test_a_patient_depends_on_seed_and_number_alone() -> None:
    few, many, other = phantom(), phantom(patients=20), phantom(seed=1)
    assert few.names == many.names[: len(few.names)]
    np.testing.assert_array_equal(few.read(37), many.read(37))
    assert (few.read(37) != other.read(37)).any()
    again = pickle.loads(pickle.dumps(few.read))
    np.testing.assert_array_equal(few.read(37), again(37))


def test_a_mask_is_the_same_at_every_size() -> None:
    small, large = phantom(), phantom(size=128)
    assert small.mask is not None
    assert large.mask is not None
    for row in unhealthy_rows(small)[:10]:
        shrunk = large.mask(row).reshape(64, 2, 64, 2).mean(axis=(1, 3)) >= 0.5
        overlap = 2 * (shrunk & small.mask(row)).sum() / (shrunk.sum() + small.mask(row).sum())
        assert overlap > 0.85


def test_a_lesion_lies_in_neighbouring_slices_and_is_largest_in_their_middle() -> None:
    config = BrainPhantomConfig()
    seen = 0
    for patient in range(20):
        lesion = head_of(config, patient).lesion
        if lesion is None:
            continue
        radii = [lesion.radius_at(index) for index in range(config.slices_per_patient)]
        shown = np.flatnonzero(radii)
        assert np.ptp(shown) + 1 == len(shown) == lesion.count
        assert max(radii) <= lesion.radius
        middle = shown[len(shown) // 2]
        assert (np.diff(radii[shown[0] : middle + 1]) >= -1e-12).all()
        assert (np.diff(radii[middle : shown[-1] + 1]) <= 1e-12).all()
        seen += 1
    assert seen > 10


# --- parts -----------------------------------------------------------------------------------


def patients_of(names: tuple[str, ...] | list[str]) -> set[str]:
    return {name.split("/")[0] for name in names}


def test_a_patient_is_in_one_part_alone() -> None:
    settings = BrainPhantomConfig(patients=20, slices_per_patient=4)
    config = DataConfig(source="brain-phantom", image_size=32, brain_phantom=settings, val_fraction=0.25)
    config = config.model_copy(update={"test_fraction": 0.2})
    data, test = load_data(config), part(config, "test")
    parts = [patients_of(data.train.names), patients_of(data.val.names), patients_of(test.names)]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert len(set.union(*parts)) == 20
    whole = part(config.model_copy(update={"test_fraction": 0.0}), "train")
    assert test.mask is not None
    assert whole.mask is not None
    for row, name in enumerate(test.names):
        origin = whole.names.index(name)
        np.testing.assert_array_equal(test.read(row), whole.read(origin))
        np.testing.assert_array_equal(test.mask(row), whole.mask(origin))
        assert test.class_of[row] == whole.class_of[origin]


def test_patients_are_kept_by_name() -> None:
    config = DataConfig(
        source="brain-phantom",
        brain_phantom=BrainPhantomConfig(patients=3, slices_per_patient=6),
        val_fraction=0.25,
        split_by="image",
    )
    known = sorted(patients_of(part(config, "train").names))
    one = config.model_copy(update={"test_patients": (known[1],)})
    data, test = load_data(one), part(one, "test")
    assert patients_of(test.names) == {known[1]}
    assert patients_of(data.train.names) == {known[0], known[2]}
    assert patients_of(data.val.names) <= {known[0], known[2]}
    assert len(data.val.names) == 3
    assert load_data(one, data.split_to_dict()).split_to_dict() == data.split_to_dict()
    with pytest.raises(DataError, match=rf"test_patients: .* has no patient nobody, but {known[0]}, {known[1]}"):
        part(config.model_copy(update={"test_patients": ("nobody",)}), "test")
    with pytest.raises(DataError, match=r"all of the images of .* would be kept for testing"):
        load_data(config.model_copy(update={"test_patients": tuple(known)}))
    with pytest.raises(ValueError, match="both choose the test set; leave one out"):
        DataConfig(source="brain-phantom", test_patients=("p",), test_fraction=0.1)


def test_images_of_their_own_are_kept_for_testing_too() -> None:
    config = DataConfig(source="digits", test_fraction=0.3)
    data, test = load_data(config), part(config, "test")
    assert len(test.names) == round(0.3 * 1797)
    assert not {*data.train.names, *data.val.names} & {*test.names}


def test_no_images_are_kept_for_testing_unless_asked_for() -> None:
    with pytest.raises(DataError, match=r"data\.test_fraction=0 keeps no images.*for example to 0\.2"):
        part(DataConfig(source="digits"), "test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 16}, r"at least 32, found \[16, 16\]; set it to \[32, 32\]"),
        ({"channels": 3}, "'brain-phantom' has 4, found 3; leave it out"),
    ],
)
def test_what_it_cannot_draw(settings: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_brain_phantom(DataConfig(source="brain-phantom", **settings))  # type: ignore[arg-type]


def test_a_saved_split_that_tears_a_patient_apart_is_refused() -> None:
    config = DataConfig(source="brain-phantom", brain_phantom=BrainPhantomConfig(patients=4, slices_per_patient=2))
    split = load_data(config).split_to_dict()
    assert load_data(config, split).split_to_dict() == split
    split["val"].append(split["train"].pop())
    with pytest.raises(DataError, match="are both in 'train' and in 'val'"):
        load_data(config, split)
