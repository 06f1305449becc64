"""Patients in, masks and maps out: same shape, same place, whatever the orientation; done patients are left."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from heterodiff.cli import main
from heterodiff.config import RunConfig
from heterodiff.config_file import parse_config
from heterodiff.data.nifti import LAYOUTS, find_patients, load_nifti, read_patient
from heterodiff.data.slices import slice_patient
from heterodiff.data.volumes import fingerprint
from heterodiff.errors import DataError, RunError
from heterodiff.pipelines.anomaly_masks import Calibration
from heterodiff.pipelines.segment import Segmentation, save_calibration
from heterodiff.pipelines.segment_files import save_like, segment_folder, to_volumes
from heterodiff.training.start import train
from tests.test_data_nifti import AFFINES
from tests.test_data_volumes import MODALITIES, SHAPE, head, lesion, patients

CALIBRATION = Calibration((0.5, 0.5), -2.0, 10, 5, 1)  # judges every image unhealthy


def settings(output: Path, data: Path) -> RunConfig:
    content = {
        "output": str(output),
        "data": {"source": "volumes", "path": str(data), "image_size": 32, "volumes": {"modalities": MODALITIES}},
        "model": {"variant": "unet", "model_channels": 32, "channel_mult": [1, 1], "layers_per_block": 1},
        "sampling": {"num_inference_steps": 2},
        "segmentation": {"depth": 300, "num_inference_steps": 3},
        "training": {"steps": 1, "batch_size": 4, "warmup_steps": 1, "tensorboard": False},
    }
    return parse_config(content)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    config = settings(folder / "run", patients(folder / "data"))
    train(config, quiet=True)
    save_calibration(folder / "run", CALIBRATION, config.segmentation, fingerprint(config.data))
    return folder / "run"


def write_patient(root: Path, name: str, affine: np.ndarray) -> None:
    (root / name).mkdir(parents=True)
    for kind, content in zip(("flair", "t1"), head(), strict=True):
        nibabel.save(nibabel.Nifti1Image(content, affine), root / name / f"{name}_{kind}.nii.gz")


@pytest.mark.parametrize("name", AFFINES)
def test_a_mask_goes_back_to_where_it_came_from(tmp_path: Path, name: str) -> None:
    """The true mask, cut into slices of more pixels than the volume has and put back, is itself, voxel by voxel."""
    write_patient(tmp_path, "p", AFFINES[name])
    path = tmp_path / "p" / "p_seg.nii.gz"
    true = lesion()
    nibabel.save(nibabel.Nifti1Image(true, AFFINES[name]), path)
    layout = type(LAYOUTS["brats"])(MODALITIES, "*_seg")
    (files,) = find_patients(tmp_path, layout)
    read = read_patient(files)
    slices = slice_patient(read, (4 * max(SHAPE), 4 * max(SHAPE)), 0.0)
    assert slices.mask is not None
    every = np.ones(len(slices.index), bool)
    found = Segmentation(slices.mask, every, slices.image[:, 0], every.astype(float))
    volumes = to_volumes(found, slices.index, read.image.shape[1:])
    save_like(tmp_path / "mask.nii.gz", volumes.mask.astype(np.uint8), load_nifti(files.volumes[0]))
    written = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), true)
    np.testing.assert_array_equal(written.affine, nibabel.load(path).affine)


def test_results_lie_on_their_volumes(run: Path, tmp_path: Path) -> None:
    for name in ("LPS", "oblique"):
        write_patient(tmp_path / "data", name, AFFINES[name])
    told: list[str] = []
    rows = segment_folder(run, tmp_path / "data", tmp_path / "out", told.append)
    assert len(rows) == len(told) == 2
    with (tmp_path / "out" / "patients.csv").open() as file:
        assert [row["patient"] for row in csv.DictReader(file)] == sorted(row["patient"] for row in rows)
    for row in rows:
        folder = tmp_path / "out" / row["patient"]
        original = nibabel.load(tmp_path / "data" / row["patient"] / f"{row['patient']}_flair.nii.gz")
        for kind in ("mask", "anomaly"):
            written = nibabel.load(folder / f"{kind}.nii.gz")
            assert written.shape == original.shape == SHAPE
            np.testing.assert_array_equal(written.affine, original.affine)
            assert nibabel.aff2axcodes(written.affine) == nibabel.aff2axcodes(original.affine)
        mask, anomaly = (np.asarray(nibabel.load(folder / f"{kind}.nii.gz").dataobj) for kind in ("mask", "anomaly"))
        assert set(np.unique(mask)) <= {0, 1}
        assert mask.sum() == row["mask_voxels"]
        assert row["mask_ml"] == pytest.approx(mask.sum() * abs(np.linalg.det(original.affine[:3, :3])) / 1000)
        assert np.isfinite(anomaly).all()
        assert anomaly.any()
        with Image.open(folder / "overlay.png") as picture:
            assert picture.width > 100


def test_patients_that_are_done_are_left(run: Path, tmp_path: Path) -> None:
    write_patient(tmp_path / "data", "a", np.eye(4))
    write_patient(tmp_path / "data", "b", np.eye(4))
    first = segment_folder(run, tmp_path / "data", tmp_path / "out")
    kept = (tmp_path / "out" / "a" / "mask.nii.gz").stat().st_mtime_ns
    (tmp_path / "out" / "b" / "scores.json").unlink()  # as if it had been stopped there
    told: list[str] = []
    assert segment_folder(run, tmp_path / "data", tmp_path / "out", told.append) == first
    assert [line.rsplit(", ")[1] for line in told] == ["done before", "done"]
    assert (tmp_path / "out" / "a" / "mask.nii.gz").stat().st_mtime_ns == kept
    nibabel.save(nibabel.Nifti1Image(head(5)[0], np.eye(4)), tmp_path / "data" / "a" / "a_flair.nii.gz")
    segment_folder(run, tmp_path / "data", tmp_path / "out", told.append)
    assert [line.rsplit(", ")[1] for line in told[2:]] == ["done", "done before"]


def test_from_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_patient(tmp_path / "data", "a", np.eye(4))
    with pytest.raises(SystemExit) as ended:
        main(["segment", str(run), str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert "masks and maps of 1 patients" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["segment", str(run)])
    assert ended.value.code == 1
    assert "--calibrate" in capsys.readouterr().err


def test_other_preprocessing_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "calibration.json"
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content) | {"preprocessing": "0123456789abcdef"}))
    try:
        with pytest.raises(RunError, match=r"made in another way.*0123456789abcdef.*train and calibrate again"):
            segment_folder(run, tmp_path, tmp_path / "out")
        path.unlink()
        with pytest.raises(RunError, match="not calibrated yet"):
            segment_folder(run, tmp_path, tmp_path / "out")
    finally:
        path.write_text(content)


def test_what_cannot_be_segmented(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of patients"):
        segment_folder(run, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(RunError, match=r"no config\.yaml"):
        segment_folder(tmp_path, tmp_path, tmp_path / "out")
    write_patient(tmp_path / "data", "a", np.eye(4))
    dark = -np.abs(head()[0]) - 1
    dark[0, 0, 0] = -50
    for kind in ("flair", "t1"):
        nibabel.save(nibabel.Nifti1Image(dark, np.eye(4)), tmp_path / "data" / "a" / f"a_{kind}.nii.gz")
    with pytest.raises(DataError, match="no slice shows enough of the brain"):
        segment_folder(run, tmp_path / "data", tmp_path / "out")
