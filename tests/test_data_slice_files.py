"""Slices that another program made, as of AnoFPDM: read, scaled, split by patient, trained on and segmented."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from heterodiff.cli import main
from heterodiff.config import DataConfig
from heterodiff.config.file import parse_config
from heterodiff.data.sources import load_data, load_test, open_source
from heterodiff.data.sources.recognise import source_hint
from heterodiff.errors import DataError
from heterodiff.pipelines.anomalies.calibrated import save_calibration
from heterodiff.pipelines.anomalies.masks import Calibration
from heterodiff.run_folder import RunFolder

SIZE = 32


def arrays(patient: int, number: int) -> dict[str, np.ndarray]:
    """An image of two channels on a black ground, and a mask in every other slice."""
    rng = np.random.default_rng(100 * patient + number)
    x = np.zeros((2, SIZE, SIZE), np.float32)
    x[:, 6:26, 6:26] = rng.uniform(1, 100, (2, 20, 20))
    y = np.zeros((SIZE, SIZE), np.uint8)
    y[10:14, 10:13] = 4 * (number % 2)  # labels of BraTS
    return {"x": x, "y": y}


def write(root: Path, patients: int = 4, slices: int = 4, part: str = "", **changes: Any) -> Path:
    for patient in range(patients):
        folder = root / part / f"patient_{patient:03d}"
        folder.mkdir(parents=True)
        for number in range(slices):
            content = {**arrays(patient, number), **changes}
            np.savez_compressed(
                folder / f"slice_{8 + number}.npz", **{k: v for k, v in content.items() if v is not None}
            )
    return root


def settings(path: Path, normalization: str = "slice", **more: Any) -> DataConfig:
    data = {"source": "volumes", "path": str(path), "image_size": SIZE, "volumes": {"normalization": normalization}}
    return parse_config({"data": data | more}).data


@pytest.mark.parametrize("part", ["", "npy_train"])
@pytest.mark.parametrize("limit", [4.0, 0.0], ids=["in memory", "read at each access"])
def test_slices_are_read_and_scaled_by_slice(part: str, limit: float, tmp_path: Path) -> None:
    data = load_data(settings(write(tmp_path, part=part), memory_limit_gb=limit, val_fraction=0))
    assert data.spec.class_names == ("healthy", "unhealthy")
    assert len(data.train) == 16
    for row, name in enumerate(data.train.names):
        patient, number = int(name[8:11]), int(name[-4:]) - 8
        x = arrays(patient, number)["x"]
        low, high = x.min(axis=(1, 2), keepdims=True), x.max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(data.train.batch([row])[0][0], (x - low) / (high - low), atol=1e-6)
        assert data.train.labels[row] == number % 2


def test_slices_are_scaled_by_patient(tmp_path: Path) -> None:
    data = load_data(settings(write(tmp_path), "patient", val_fraction=0))
    for row, name in enumerate(data.train.names):
        patient, number = int(name[8:11]), int(name[-4:]) - 8
        whole = np.stack([arrays(patient, k)["x"] for k in range(4)])
        top = [np.percentile(channel[channel > 0], 99) for channel in whole.transpose(1, 0, 2, 3)]
        expected = np.clip(arrays(patient, number)["x"] / np.array(top)[:, None, None], 0, 1)
        np.testing.assert_allclose(data.train.batch([row])[0][0], expected, atol=1e-6)


def test_masks_and_patients(tmp_path: Path) -> None:
    found = open_source(settings(write(tmp_path)))
    assert found.mask is not None
    assert found.groups is not None
    assert set(found.groups) == {f"patient_{k:03d}" for k in range(4)}
    for row, name in enumerate(found.names):
        np.testing.assert_array_equal(found.mask(row), arrays(0, int(name[-4:]) - 8)["y"] > 0)
    config = settings(tmp_path, test_fraction=0.5, val_fraction=0.3)
    data = load_data(config)
    test = load_test(config, data.spec)
    parts = [{name.split("/")[0] for name in names} for names in (data.train.names, data.val.names, test.images.names)]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_slices_without_masks_have_no_classes(tmp_path: Path) -> None:
    found = open_source(settings(write(tmp_path, y=None)))
    assert (found.mask, set(found.class_of)) == (None, {None})


def test_a_mask_may_have_a_channel_axis(tmp_path: Path) -> None:
    found = open_source(settings(write(tmp_path, y=np.ones((1, SIZE, SIZE), bool))))
    assert set(found.class_of) == {"unhealthy"}


def test_the_folder_is_recognised(tmp_path: Path) -> None:
    hint = source_hint(DataConfig(path=write(tmp_path)))
    assert hint is not None
    assert "preprocessed slices (patient_*/slice_*.npz)" in hint
    assert hint.endswith("set data.source=volumes")


@pytest.mark.parametrize(
    ("normalization", "changes", "message"),
    [
        ("slice", {"x": None}, r"patient_000/0008: no array 'x'; expected x \(C, H, W\) and y \(mask\)"),
        ("slice", {"x": np.zeros((SIZE, SIZE))}, r"'x' has the shape \(32, 32\)"),
        ("slice", {"x": np.full((2, SIZE, SIZE), np.nan)}, "NaN"),
        ("slice", {"x": np.array(["a"])}, "shape"),
        ("slice", {"y": np.zeros((3, SIZE, SIZE))}, r"'y' has the shape \(3, 32, 32\)"),
        ("slice", {"y": np.full((SIZE, SIZE), 0.5)}, "whole numbers from 0 up"),
        ("patient", {"x": np.full((2, SIZE, SIZE), -1.0)}, r"values below 0.*normalization=slice"),
    ],
)
def test_unusable_arrays(normalization: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(settings(write(tmp_path, 2, 2, **changes), normalization))


def test_damaged_files_may_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path) / "patient_001" / "slice_9.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"patient_001/slice_9\.npz: not readable as npz"):
        load_data(settings(tmp_path))
    data = load_data(settings(tmp_path, on_bad="skip", val_fraction=0))
    assert len(data.train) == 15
    assert "patient_001/slice_9.npz" in [name for name, _ in data.skipped]


def test_folders_that_cannot_be_meant(tmp_path: Path) -> None:
    write(tmp_path / "some", 1, 2)
    np.savez(tmp_path / "some" / "patient_000" / "slice_8.npz", x=arrays(0, 0)["x"])
    with pytest.raises(DataError, match=r"1 of 2 slices have a mask 'y', patient_000/slice_8\.npz has none"):
        open_source(settings(tmp_path / "some"))
    write(tmp_path / "twice", 1, 1, part="train")
    write(tmp_path / "twice", 1, 1, part="test")
    with pytest.raises(DataError, match="patient_000 is there twice"):
        open_source(settings(tmp_path / "twice"))
    write(tmp_path / "same", 1, 1)
    np.savez(tmp_path / "same" / "patient_000" / "slice_08.npz", **arrays(0, 0))
    with pytest.raises(DataError, match="the same slice"):
        open_source(settings(tmp_path / "same"))
    write(tmp_path / "unnumbered", 1, 1)
    np.savez(tmp_path / "unnumbered" / "patient_000" / "slice_a.npz", **arrays(0, 0))
    with pytest.raises(DataError, match="number of the slice"):
        open_source(settings(tmp_path / "unnumbered"))


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_from_check_to_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "data": {
            "source": "volumes",
            "path": str(write(tmp_path / "slices", 6)),
            "image_size": SIZE,
            "volumes": {"normalization": "slice"},
            "val_fraction": 0.3,
            "test_fraction": 0.3,
        },
        "model": {"variant": "unet", "model_channels": 32, "channel_mult": [1, 1], "layers_per_block": 1},
        "sampling": {"num_inference_steps": 2},
        "segmentation": {"method": "forward-process", "depth": 300, "num_inference_steps": 2, "network_steps": 0},
        "training": {"steps": 1, "batch_size": 4, "warmup_steps": 0, "tensorboard": False},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    assert call("check", tmp_path / "mine.yaml") == 0
    assert "healthy" in capsys.readouterr().out
    assert call("train", tmp_path / "mine.yaml", f"output={run}", "--quiet") == 0
    save_calibration(run, Calibration((0.5, 0.5), -2.0, 10, 5, 1), RunFolder(run).config().segmentation)
    others = write(tmp_path / "others", 2, 3, y=None)
    assert call("segment", run, others, "--device", "cpu") == 0
    folder = run / "segmented" / "patient_001"
    mask, anomaly = np.load(folder / "mask.npy"), np.load(folder / "anomaly.npy")
    assert (mask.shape, mask.dtype, anomaly.shape) == ((3, SIZE, SIZE), np.uint8, (3, SIZE, SIZE))
    with (run / "segmented" / "patients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["patient"], row["slices"], row["mask_ml"]) for row in rows] == [
        ("patient_000", "3", ""),
        ("patient_001", "3", ""),
    ]
    assert int(rows[1]["mask_voxels"]) == mask.sum()
    assert [one["slice"] for one in json.loads((folder / "scores.json").read_text())["slices"]] == [8, 9, 10]
    capsys.readouterr()
    assert call("segment", run, others, "--device", "cpu") == 0
    assert "done before" in capsys.readouterr().out
    assert call("evaluate", run, "--device", "cpu") == 0
    assert call("evaluate", run, "--data", write(tmp_path / "more", 2, 4), "--device", "cpu") == 0
    assert json.loads((run / "evaluation.json").read_text())["n"] == 8
    one = write(tmp_path / "one", 1, 1, x=np.zeros((1, SIZE, SIZE)))
    assert call("segment", run, one, "--out", tmp_path / "out", "--device", "cpu") == 1
    assert "1 channels, expected 2 as at training" in capsys.readouterr().err
