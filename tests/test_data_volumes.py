"""Volumes become slices once, are kept, and go back to where they came from."""

import json
import os
import pickle
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from heterodiff.config import DataConfig
from heterodiff.config.file import parse_config
from heterodiff.data.decoding.nifti import Patient
from heterodiff.data.findings import BadImage
from heterodiff.data.sources import load_data, load_test, open_source
from heterodiff.data.sources.slices import (
    from_pictures,
    resize_slices,
    restore_slices,
    scale_volume,
    slice_patient,
    stretch_slice,
    to_pictures,
)
from heterodiff.data.sources.volumes import fingerprint, open_volumes, preprocessing
from heterodiff.errors import ConfigError, DataError

SHAPE = (20, 26, 9)
MODALITIES = {"flair": "*_flair", "t1": "*_t1"}


def head(seed: int = 0) -> np.ndarray:
    """An ellipsoid of noise (2, X, Y, Z), empty in the first and the last slices."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij")
    inside = x**2 + y**2 + (1.3 * z) ** 2 < 0.9
    values = np.random.default_rng(seed).uniform(50, 150, (2, *SHAPE)).astype(np.float32)
    return values * inside


def lesion() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:8, 15:20, 4:6] = 1
    return mask


def patients(root: Path, count: int = 3, masks: bool = True, ill: tuple[int, ...] = (0, 2)) -> Path:
    for number in range(count):
        folder = root / f"p{number}"
        folder.mkdir(parents=True, exist_ok=True)
        image = head(number)
        files = {"flair": image[0], "t1": image[1]}
        if masks:
            files["seg"] = lesion() * (number in ill)
        for kind, content in files.items():
            nibabel.save(nibabel.Nifti1Image(content, np.eye(4)), folder / f"p{number}_{kind}.nii.gz")
    return root


def settings(path: Path, **more: object) -> DataConfig:
    volumes = {"modalities": MODALITIES, **more.pop("volumes", {})}  # type: ignore[dict-item]
    content = {"source": "volumes", "path": str(path), "image_size": 32, "volumes": volumes, **more}
    return parse_config({"data": content}).data


# --- slices ------------------------------------------------------------------------------------


def test_pictures_have_the_front_up_and_the_right_left() -> None:
    volume = np.zeros((1, *SHAPE))
    volume[0, -1, -1, 3] = 1  # the patient's right, in front
    pictures = to_pictures(volume)
    assert pictures.shape == (9, 1, 26, 20)
    assert pictures[3, 0, 0, 0] == 1
    np.testing.assert_array_equal(from_pictures(pictures), volume)


@pytest.mark.parametrize("shape", [(26, 20), (15, 31), (12, 12)])
def test_slices_come_back_at_their_size(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.random((2, 3, 4, 4)), np.ones((1, 1, 8, 8)))[:, :, : shape[0], : shape[1]].astype(np.float32)
    back = restore_slices(resize_slices(smooth, (64, 64), "bilinear"), shape, "bilinear")
    assert back.shape == smooth.shape
    assert np.abs(back - smooth).mean() < 0.05
    mask = (smooth[:, :1] > 0.5).astype(np.float32)
    larger = (4 * max(shape), 4 * max(shape))
    np.testing.assert_array_equal(
        restore_slices(resize_slices(mask, larger, "nearest-exact"), shape, "nearest-exact"), mask
    )


def test_nothing_is_stretched() -> None:
    """A circle stays one in a picture that is not square."""
    y, x = np.mgrid[:60, :30]
    circle = ((y - 30) ** 2 + (x - 15) ** 2 < 100).astype(np.float32)[None, None]
    found = resize_slices(circle, (40, 40), "bilinear")[0, 0] > 0.5
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    assert abs(len(rows) - len(columns)) <= 1
    assert abs((rows[0] + rows[-1]) / 2 - 19.5) <= 1
    assert abs((columns[0] + columns[-1]) / 2 - 19.5) <= 1


def test_scaling_is_by_the_foreground() -> None:
    volume = np.zeros((10, 10, 10), np.float32)
    volume[:5] = np.arange(500).reshape(5, 10, 10) + 1
    top = np.percentile(np.arange(1, 501), 99)
    np.testing.assert_allclose(scale_volume(volume), np.clip(volume / top, 0, 1), rtol=1e-6)


def test_slices_that_show_too_little_are_left_out() -> None:
    found = slice_patient(Patient(head(), lesion() > 0), (32, 32), 0.02)
    share = (head() > 0).any(axis=0).mean(axis=(0, 1))
    assert found.index.tolist() == [z for z in range(9) if share[z] >= 0.02]
    assert 0 < len(found.index) < 9
    assert found.image.shape == (len(found.index), 2, 32, 32)
    assert found.unhealthy is not None
    assert [z for z, ill in zip(found.index, found.unhealthy, strict=True) if ill] == [4, 5]
    assert found.mask is not None
    assert found.mask.any(axis=(1, 2)).tolist() == found.unhealthy.tolist()


def test_channels_of_a_slice_are_stretched_each() -> None:
    image = np.stack([np.linspace(2, 5, 12).reshape(3, 4), np.full((3, 4), 7.0), -np.linspace(0, 1, 12).reshape(3, 4)])
    found = stretch_slice(image)
    np.testing.assert_allclose(found[0], np.linspace(0, 1, 12).reshape(3, 4), atol=1e-6)
    assert not found[1].any()
    np.testing.assert_allclose(found[2], np.linspace(1, 0, 12).reshape(3, 4), atol=1e-6)


# --- the source --------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["patient", "slice"])
def test_patients_become_labelled_slices(tmp_path: Path, normalization: str) -> None:
    found = open_volumes(settings(patients(tmp_path / "data"), volumes={"normalization": normalization}))
    assert found.groups is not None
    assert found.mask is not None
    assert len({*found.names}) == len(found.names)
    for row, name in enumerate(found.names):
        number, z = int(name[1]), int(name.split("/")[1])
        assert found.groups[row] == f"p{number}"
        assert found.class_of[row] == ("unhealthy" if number in (0, 2) and z in (4, 5) else "healthy")
        expected = slice_patient(Patient(head(number), None), (32, 32), 0.02)
        picture = expected.image[expected.index.tolist().index(z)]
        shown = picture if normalization == "patient" else stretch_slice(picture)
        np.testing.assert_allclose(found.read(row), shown, atol=2e-3)  # kept in half precision
        assert found.mask(row).any() == (found.class_of[row] == "unhealthy")
    assert pickle.loads(pickle.dumps(found.read))(3).shape == (2, 32, 32)


def test_splits_keep_patients_together(tmp_path: Path) -> None:
    config = settings(patients(tmp_path / "data", 8), val_fraction=0.3, test_fraction=0.25)
    data = load_data(config)
    test = load_test(config, data.spec)
    parts = [{name.split("/")[0] for name in names} for names in (data.train.names, data.val.names, test.images.names)]
    assert [len(part) for part in parts] == [4, 2, 2]
    assert len(set.union(*parts)) == 8
    assert set(test.patients) == parts[2]
    assert data.spec.class_names == ("healthy", "unhealthy")


def test_scans_of_a_patient_stay_together(tmp_path: Path) -> None:
    for folder in patients(tmp_path / "made", 4).iterdir():
        for session in ("ses-1", "ses-2"):
            shutil.copytree(folder, tmp_path / "data" / f"sub-{folder.name[1:]}" / session / "anat")
    config = settings(tmp_path / "data", val_fraction=0.3, test_patients=["sub-1"])
    found = open_volumes(config)
    assert found.names[0].startswith("sub-0/ses-1/")
    assert len({*found.names}) == len(found.names)
    assert found.groups == tuple(name.split("/")[0] for name in found.names)
    data = load_data(config)
    test = load_test(config, data.spec)
    assert {*test.patients} == {"sub-1"}
    parts = [{name.split("/")[0] for name in names} for names in (data.train.names, data.val.names)]
    assert [len(part) for part in parts] == [2, 1]
    assert not parts[0] & parts[1]


def test_progress_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a command prints as JSON must stay JSON."""
    open_volumes(settings(patients(tmp_path / "data", 4)))
    printed = capsys.readouterr()
    assert not printed.out
    assert "patient 4 of 4: p3" in printed.err


@pytest.mark.parametrize("kept_bytes", [-100, 0])
def test_kept_files_that_were_cut_off(tmp_path: Path, kept_bytes: int) -> None:
    config = settings(patients(tmp_path / "data"))
    found = open_volumes(config)
    assert found.mask is not None
    for path in (tmp_path / "data_slices" / fingerprint(config)).glob("p1_*.npy"):
        path.write_bytes(path.read_bytes()[:kept_bytes])
    row = next(row for row, name in enumerate(found.names) if name.startswith("p1/"))
    found.mask(0)
    with pytest.raises(DataError, match=r"p1_.*\.mask\.npy: kept slices cannot be read.*delete the folder"):
        found.mask(row)
    with pytest.raises(BadImage, match=r"p1_.*\.image\.npy: kept slices cannot be read.*delete the folder"):
        found.read(row)


def test_slices_are_made_once(tmp_path: Path) -> None:
    config = settings(patients(tmp_path / "data"))
    open_volumes(config)
    folder = tmp_path / "data_slices" / fingerprint(config)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(written) == 9
    open_volumes(config)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    changed = tmp_path / "data" / "p1" / "p1_t1.nii.gz"
    nibabel.save(nibabel.Nifti1Image(head(7)[0], np.eye(4)), changed)
    os.utime(changed, ns=(1, 1))
    open_volumes(config)
    again = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != written[path]}
    assert len(again) == 3
    assert all(name.startswith("p1_") for name in again)


def test_an_interrupted_start_goes_on(tmp_path: Path) -> None:
    config = settings(patients(tmp_path / "data"))
    whole = open_volumes(config)
    folder = tmp_path / "data_slices" / fingerprint(config)
    (index,) = folder.glob("p1_*.json")
    index.unlink()
    for path in folder.glob("p2_*.image.npy"):
        path.unlink()
    again = open_volumes(config)
    assert again.names == whole.names
    np.testing.assert_array_equal(again.read(len(again.names) - 2), whole.read(len(whole.names) - 2))


def test_other_preprocessing_has_a_folder_of_its_own(tmp_path: Path) -> None:
    config = settings(patients(tmp_path / "data"))
    others = [
        settings(tmp_path / "data", image_size=16),
        settings(tmp_path / "data", volumes={"least_brain": 0.1}),
        settings(tmp_path / "data", volumes={"modalities": {"flair": "*_flair"}}),
    ]
    assert len({fingerprint(one) for one in (config, *others)}) == 4
    assert fingerprint(settings(tmp_path / "elsewhere")) == fingerprint(config)
    assert json.loads(json.dumps(preprocessing(config))) == preprocessing(config)
    cache = tmp_path / "kept"
    open_volumes(settings(tmp_path / "data", volumes={"cache": str(cache)}))
    assert (cache / fingerprint(config)).is_dir()
    assert not (tmp_path / "data_slices").exists()


def test_without_masks_slices_have_no_class(tmp_path: Path) -> None:
    found = open_volumes(settings(patients(tmp_path / "data", masks=False)))
    assert found.mask is None
    assert set(found.class_of) == {None}


def test_some_masks_alone_are_an_error(tmp_path: Path) -> None:
    root = patients(tmp_path / "data")
    (root / "p1" / "p1_seg.nii.gz").unlink()
    with pytest.raises(DataError, match=r"2 of 3 patients have a mask \*\[_-\]seg\.nii\[\.gz\], p1 has none"):
        open_volumes(settings(root))


@pytest.mark.parametrize(
    ("path", "message"),
    [(None, r"needs data\.path"), ("nowhere", r"nowhere: no such folder of patients; correct data\.path")],
)
def test_no_folder(tmp_path: Path, path: str | None, message: str) -> None:
    config = DataConfig(source="volumes", path=None if path is None else tmp_path / path)
    with pytest.raises(DataError, match=message):
        open_source(config)


def test_no_modality_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="expected at least one pattern"):
        parse_config({"data": {"source": "volumes", "volumes": {"modalities": {}}}})


# --- npz ---------------------------------------------------------------------------------------


def arrays(**more: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros((6, 20, 14), bool)
    mask[1::2, 5:9, 4:8] = True
    image = rng.integers(0, 256, (6, 2, 20, 14), np.uint8)
    return {"image": image, "mask": mask, "patient": np.array([7, 7, 7, 19, 19, 19]), "z": np.arange(6) % 3 + 10} | more


@pytest.mark.parametrize("normalization", ["patient", "slice"])
def test_slices_of_an_npz_file(tmp_path: Path, normalization: str) -> None:
    """Of a patient every slice, and no slice of another, counts for the scale of a channel."""
    np.savez(tmp_path / "slices.npz", **arrays())
    config = settings(tmp_path / "slices.npz", image_size=20, volumes={"normalization": normalization})
    found = open_volumes(config)
    assert found.names == ("7/0010", "7/0011", "7/0012", "19/0010", "19/0011", "19/0012")
    assert found.class_of == ("healthy", "unhealthy") * 3
    assert found.mask is not None
    content = arrays()
    for row in range(6):
        square = np.pad(content["image"][row], ((0, 0), (0, 0), (3, 3))).astype(np.float32)
        own = content["image"][content["patient"] == content["patient"][row]]
        tops = [np.percentile(own[:, c][own[:, c] > 0], 99) for c in range(2)]
        scaled = np.clip(square / np.array(tops)[:, None, None], 0, 1)
        shown = scaled if normalization == "patient" else stretch_slice(square)
        np.testing.assert_allclose(found.read(row), shown, atol=1e-6)
        np.testing.assert_array_equal(found.mask(row), np.pad(content["mask"][row], ((0, 0), (3, 3))))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mask": np.zeros((6, 20, 13), bool)}, r"'mask' has the shape \(6, 20, 13\), expected \(6, 20, 14\)"),
        ({"patient": np.arange(5)}, r"'patient' has the shape \(5,\), expected \(6,\)"),
        ({"image": np.zeros((6, 20, 14))}, r"'image' has the shape \(6, 20, 14\), expected \(N, C, H, W\)"),
        ({"image": np.full((6, 2, 20, 14), np.nan)}, "'image' holds NaN"),
        ({"mask": np.full((6, 20, 14), -1)}, "'mask': a mask has whole numbers from 0 up, found -1"),
        ({"mask": np.full((6, 20, 14), 0.3)}, r"'mask': a mask has whole numbers from 0 up, found 0\.3"),
        ({"z": np.zeros(6, int)}, "share a number in 'z'"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, more: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "slices.npz", **arrays(**more))
    with pytest.raises(DataError, match=message):
        open_volumes(settings(tmp_path / "slices.npz"))


def test_an_npz_without_patients(tmp_path: Path) -> None:
    np.savez(tmp_path / "slices.npz", image=arrays()["image"])
    with pytest.raises(DataError, match=r"no array 'patient'; expected image, patient and mask, found \['image'\]"):
        open_volumes(settings(tmp_path / "slices.npz"))


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "slices.npz").write_text("hello")
    with pytest.raises(DataError, match="not readable as npz"):
        open_volumes(settings(tmp_path / "slices.npz"))


def test_real_slices(real_data: Path) -> None:
    found = open_volumes(settings(real_data / "ms_lesion_slices" / "ms_slices.npz", image_size=64))
    assert len(found.names) == 291
    assert sum(name == "unhealthy" for name in found.class_of) == 210
    assert found.groups is not None
    assert len({*found.groups}) == 3
    assert found.read(100).shape == (4, 64, 64)


# --- heights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every_patient", [True, False])
def test_labels_that_are_heights_are_warned_of(tmp_path: Path, every_patient: bool) -> None:
    """A lesion in the same slices of every patient; patients without one tell places from lesions."""
    patients(tmp_path / "data", 6, ill=tuple(range(6)) if every_patient else (0, 1, 2))
    warnings = open_volumes(settings(tmp_path / "data")).warnings
    assert any("the height of a slice tells its label almost always (AUROC 1.000)" in line for line in warnings) == (
        every_patient
    )
