"""Patients in, masks and maps out: same shape, same place, whatever the orientation; done patients are left."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from heterodiff.cli import main
from heterodiff.config import RunConfig, SegmentationConfig
from heterodiff.config.file import load_config, parse_config
from heterodiff.data.decoding.nifti import LAYOUTS, find_patients, load_nifti, read_patient
from heterodiff.data.sources.slices import slice_patient
from heterodiff.data.sources.volumes import fingerprint
from heterodiff.errors import DataError, RunError
from heterodiff.evaluation.anomalies import evaluate_anomalies
from heterodiff.evaluation.calibration import calibrate_run
from heterodiff.pipelines.anomalies import files as segment_files
from heterodiff.pipelines.anomalies.calibrated import save_calibration
from heterodiff.pipelines.anomalies.files import segment_folder
from heterodiff.pipelines.anomalies.masks import Calibration
from heterodiff.pipelines.anomalies.patients import save_like, to_volumes
from heterodiff.pipelines.anomalies.segment import Segmentation
from heterodiff.training.build import load_run_data
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
        "segmentation": {"method": "forward-process", "depth": 300, "num_inference_steps": 3, "network_steps": 0},
        "training": {"steps": 1, "batch_size": 4, "warmup_steps": 1, "tensorboard": False},
    }
    return parse_config(content)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    config = settings(folder / "run", patients(folder / "data"))
    train(config, quiet=True)
    save_calibration(folder / "run", CALIBRATION, config.segmentation)
    return folder / "run"


def write_patient(root: Path, name: str, affine: np.ndarray) -> Path:
    (root / name).mkdir(parents=True)
    for kind, content in zip(("flair", "t1"), head(), strict=True):
        nibabel.save(nibabel.Nifti1Image(content, affine), root / name / f"{name}_{kind}.nii.gz")
    return root


def command(*arguments: object) -> int | str | None:
    """Exit code of ``heterodiff segment``."""
    with pytest.raises(SystemExit) as ended:
        main(["segment", *map(str, arguments)])
    return ended.value.code


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
    maps, score = slices.image[:, 0], every.astype(float)
    found = Segmentation(slices.mask, every, maps, score, maps, score)
    mask, _ = to_volumes(found, slices.index, read.image.shape[1:])
    save_like(tmp_path / "mask.nii.gz", mask.astype(np.uint8), load_nifti(files.volumes[0]))
    written = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), true)
    np.testing.assert_array_equal(written.affine, nibabel.load(path).affine)


def test_results_lie_on_their_volumes(run: Path, tmp_path: Path) -> None:
    for name in ("LPS", "oblique"):
        write_patient(tmp_path / "data", name, AFFINES[name])
    told: list[str] = []
    rows, problems = segment_folder(run, tmp_path / "data", tmp_path / "out", told.append)
    assert (len(rows), len(told), problems) == (2, 2, [])
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


@pytest.mark.parametrize("name", ["mask.nii.gz", "anomaly.nii.gz", "overlay.png", "slices.png"])
@pytest.mark.parametrize("emptied", [True, False])
def test_files_that_are_lost_are_made_again(run: Path, tmp_path: Path, name: str, emptied: bool) -> None:
    data, out = write_patient(tmp_path / "data", "a", np.eye(4)), tmp_path / "out"
    first = segment_folder(run, data, out)
    size = (out / "a" / name).stat().st_size
    if emptied:
        (out / "a" / name).write_bytes(b"")
    else:
        (out / "a" / name).unlink()
    assert segment_folder(run, data, out) == first
    assert (out / "a" / name).stat().st_size == size
    assert len(list((out / "a").iterdir())) == 5  # with scores.json, and nothing unfinished


@pytest.mark.parametrize("at", [0, 1])
def test_no_mask_is_half_written_or_beside_scores_of_another(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The power fails while a patient whose volumes have changed is written."""
    data, out = write_patient(tmp_path / "data", "a", np.eye(4)), tmp_path / "out"
    segment_folder(run, data, out)
    nibabel.save(nibabel.Nifti1Image(head(5)[0], np.eye(4)), data / "a" / "a_flair.nii.gz")
    save = nibabel.save
    saved: list[Path] = []

    def failing(image: Any, path: Path) -> None:
        if len(saved) == at:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(nibabel, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        segment_folder(run, data, out)
    monkeypatch.undo()
    assert not (out / "a" / "scores.json").exists()
    for kind in ("mask", "anomaly"):
        assert nibabel.load(out / "a" / f"{kind}.nii.gz").get_fdata().shape == SHAPE
    told: list[str] = []
    segment_folder(run, data, out, told.append)
    assert told[0].endswith(", done")


def test_from_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_patient(tmp_path / "data", "a", np.eye(4))
    assert command(run, data, "--out", tmp_path / "out") == 0
    assert "masks and maps of 1 patients" in capsys.readouterr().out
    assert command(run) == 1
    assert "--calibrate" in capsys.readouterr().err


def test_a_patient_that_cannot_be_used_is_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c", "d"):
        data = write_patient(tmp_path / "data", name, np.eye(4))
    damaged, lost = data / "a" / "a_t1.nii.gz", data / "c" / "c_t1.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    lost.unlink()
    lost.symlink_to("nowhere.nii.gz")
    assert command(run, data, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert f"1 of 4  a: left out, {damaged}: " in said.out
    assert "masks and maps of 2 patients" in said.out
    first, second = said.err.strip().splitlines()[-2:]
    assert first.startswith(f"error: {damaged}: cannot be read to its end")
    assert second.startswith(f"error: {lost}: cannot be read (No such file")
    with (tmp_path / "out" / "patients.csv").open() as file:
        assert [row["patient"] for row in csv.DictReader(file)] == ["b", "d"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_finished_patients(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    for name in ("a", "b"):
        data = write_patient(tmp_path / "data", name, np.eye(4))
    segment = segment_files._segment

    def stopped(patient: Any, *arguments: Any) -> dict[str, Any]:
        if patient.name == "b":
            os.kill(os.getpid(), number)
        return segment(patient, *arguments)

    monkeypatch.setattr(segment_files, "_segment", stopped)
    assert command(run, data, "--out", tmp_path / "out") == 128 + number
    monkeypatch.undo()
    said = f"stopped by {number.name}; finished patients are kept, the same command goes on\n"
    assert capsys.readouterr().err.endswith(said)
    assert not (tmp_path / "out" / "b").exists()
    assert command(run, data, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("done before") == 1


def test_names_that_are_no_utf8(run: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"p\xe9")
    data, out = write_patient(tmp_path / "data", name, np.eye(4)), tmp_path / "out"
    told: list[str] = []
    first = segment_folder(run, data, out, told.append)
    assert segment_folder(run, data, out, told.append) == first
    assert all(line.isprintable() for line in told)
    assert b"p\xe9," in (out / "patients.csv").read_bytes()


def test_where_masks_cannot_be_written(run: Path, tmp_path: Path) -> None:
    data, out = write_patient(tmp_path / "data", "a", np.eye(4)), tmp_path / "out"
    (tmp_path / "link").symlink_to(data)
    for inside in (data, data / "masks", tmp_path / "link" / "masks"):
        with pytest.raises(RunError, match=r"lies in the folder of patients .*; choose an --out elsewhere"):
            segment_folder(run, data, inside)
    assert [path.name for path in data.iterdir()] == ["a"]
    segment_folder(run, data, tmp_path)  # which holds the patients, but not among them
    out.write_bytes(b"")
    for where in (out, out / "below"):
        with pytest.raises(RunError, match=r"out.*: cannot be written: .* choose another --out"):
            segment_folder(run, data, where)
    out.unlink()
    out.mkdir()
    (out / "a").write_bytes(b"")
    with pytest.raises(RunError, match=r"a: cannot be written: File exists"):
        segment_folder(run, data, out)
    (out / "a").unlink()
    (out / "patients.csv").mkdir()
    with pytest.raises(RunError, match=r"out: cannot be written: Is a directory"):
        segment_folder(run, data, out)


def test_folders_are_looked_at_before_calibrating(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("heterodiff.evaluation.calibration.calibrate_run", lambda run: pytest.fail("calibrated"))
    data = write_patient(tmp_path / "data", "a", np.eye(4))
    for folder, out, message in (
        (tmp_path / "nowhere", tmp_path / "out", "no such folder of patients"),
        (data, data / "out", "lies in the folder of patients"),
    ):
        assert command(run, folder, "--out", out, "--calibrate") == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"settings": {', r"not readable as JSON.*run `heterodiff segment .* --calibrate`"),
        ("[]", r"expected a JSON object, found list; run `heterodiff segment .* --calibrate`"),
        (
            {"settings": settings(Path(), Path()).segmentation.model_dump(mode="json") | {"later": 1}},
            r"calibration\.json: calibrated with another segmentation\.later; run `heterodiff segment",
        ),
        (
            {"score_limit": float("nan")},
            r"calibration\.json: saved calibration: expected finite thresholds.*calibrate again",
        ),
        ({"largest_divergence": [1.0]}, r"calibration\.json: .*expected 2 channels, found 1; calibrate again"),
    ],
)
def test_a_damaged_calibration_is_refused(run: Path, tmp_path: Path, content: Any, message: str) -> None:
    data, path = write_patient(tmp_path / "data", "a", np.eye(4)), run / "calibration.json"
    before = path.read_text()
    path.write_text(
        content if isinstance(content, str) else json.dumps(json.loads(before) | content | {"checksum": None})
    )
    try:
        with pytest.raises(RunError, match=message):
            segment_folder(run, data, tmp_path / "out")
    finally:
        path.write_text(before)


def test_a_calibration_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_calibration(tmp_path, CALIBRATION, SegmentationConfig())
    before = path.read_text()

    def full(self: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match=r"calibration\.json: cannot be written: No space"):
        save_calibration(tmp_path, CALIBRATION, SegmentationConfig(depth=10))
    assert path.read_text() == before


def test_other_preprocessing_is_refused(run: Path, tmp_path: Path) -> None:
    """When segmenting, calibrating, evaluating and going on with the training."""
    data, path = write_patient(tmp_path / "data", "a", np.eye(4)), run / "data.json"
    content, config = path.read_text(), load_config(run / "config.yaml")
    for other in ("0123456789abcdef", None):
        path.write_text(json.dumps(json.loads(content) | {"preprocessing": other, "checksum": None}))
        try:
            for use in (
                lambda: segment_folder(run, data, tmp_path / "out"),
                lambda: calibrate_run(run),
                lambda: evaluate_anomalies(run),
                lambda: load_run_data(config),
            ):
                with pytest.raises(RunError, match=rf"{other or 'unknown'}, .* of {fingerprint(config.data)}: cut or"):
                    use()
        finally:
            path.write_text(content)


def test_limits_hold_for_the_weights_they_were_learned_with(run: Path, tmp_path: Path) -> None:
    data = write_patient(tmp_path / "data", "a", np.eye(4))
    weights = next((run / "unet").glob("*.safetensors"))
    before, calibration = weights.read_bytes(), (run / "calibration.json").read_text()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(RunError, match=r"before the run was trained further.*--calibrate"):
            segment_folder(run, data, tmp_path / "out")
        weights.write_bytes(before)
        (run / "calibration.json").unlink()
        with pytest.raises(RunError, match="not calibrated yet"):
            segment_folder(run, data, tmp_path / "out")
    finally:
        weights.write_bytes(before)
        (run / "calibration.json").write_text(calibration)


def test_masks_are_shown_whatever_the_window_of_the_volume(run: Path, tmp_path: Path) -> None:
    data = write_patient(tmp_path / "data", "a", np.eye(4))
    for path in sorted((data / "a").iterdir()):
        image = nibabel.load(path)
        voxels = np.asarray(image.dataobj)
        header = image.header.copy()
        header["cal_max"] = 1500
        nibabel.save(nibabel.Nifti1Image(voxels, image.affine, header), path)
    segment_folder(run, data, tmp_path / "out")
    for name in ("mask", "anomaly"):
        header = nibabel.load(tmp_path / "out" / "a" / f"{name}.nii.gz").header
        assert (header["cal_min"], header["cal_max"]) == (0, 0)


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
    rows, (problem,) = segment_folder(run, tmp_path / "data", tmp_path / "out")
    assert rows == []
    assert "no slice shows enough of the brain" in problem


# ---- label-difference ---------------------------------------------------------------------------------------------


def write_heads(root: Path, names: list[str], exchanged: bool = False, masks: bool = True) -> Path:
    """Heads of two tissues and a scalp; every second patient has a lesion that is bright on FLAIR in two slices."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + (1.2 * z) ** 2)
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        inner, outer = radius < 0.55, radius < 0.9
        ill = lesion() * (number % 2)
        scalp = outer & (radius > 0.8)
        flair = np.where(scalp, 160, np.where(inner, 40, 80)) * outer + 60 * (ill > 0)
        t1 = np.where(scalp, 160, np.where(inner, 90, 50)) * outer
        volumes = [np.abs(volume + rng.normal(0, 2, SHAPE)) * outer for volume in (flair, t1)]
        (root / name).mkdir(parents=True)
        for kind, volume in zip(("t1", "flair") if exchanged else ("flair", "t1"), volumes, strict=True):
            nibabel.save(
                nibabel.Nifti1Image(volume.astype(np.float32), np.eye(4)), root / name / f"{name}_{kind}.nii.gz"
            )
        if masks:
            nibabel.save(nibabel.Nifti1Image(ill, np.eye(4)), root / name / f"{name}_seg.nii.gz")
    return root


def test_labels_teach_where_lesions_are_and_exchanged_sequences_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Bright lesions are found by a network of one step, as intensities are weighed, too."""
    data = write_heads(tmp_path / "data", [f"p{k}" for k in range(12)])
    config = settings(tmp_path / "run", data)
    segmentation = {"method": "label-difference", "depth": None, "num_inference_steps": 2, "network_steps": 0}
    content = config.model_dump(mode="json") | {"segmentation": segmentation}
    content["data"]["val_fraction"] = 0.5
    train(parse_config(content, tolerated=None), quiet=True)
    assert command(tmp_path / "run", "--calibrate") == 0
    assert "intensity flair +" in capsys.readouterr().out
    others = write_heads(tmp_path / "others", ["a", "b"], masks=False)
    assert command(tmp_path / "run", others, "--out", tmp_path / "out") == 0
    assert "warning" not in capsys.readouterr().out
    healthy, ill = (np.asarray(nibabel.load(tmp_path / "out" / name / "mask.nii.gz").dataobj) > 0 for name in "ab")
    true = lesion() > 0
    assert 2 * (ill & true).sum() / (ill.sum() + true.sum()) > 0.6
    assert healthy.sum() < 0.5 * true.sum()
    with Image.open(tmp_path / "out" / "b" / "slices.png") as picture:
        assert picture.width > 300
    maps = nibabel.load(tmp_path / "out" / "b" / "anomaly.nii.gz").get_fdata()
    assert 0 <= maps.min() <= maps.max() <= 1
    exchanged = write_heads(tmp_path / "exchanged", ["c"], exchanged=True, masks=False)
    assert command(tmp_path / "run", exchanged, "--out", tmp_path / "wrong") == 0
    assert "c: warning: 'flair' looks like 't1' of the patients trained on" in capsys.readouterr().out
    notes = json.loads((tmp_path / "wrong" / "c" / "scores.json").read_text())["notes"]
    assert any("'t1' looks like 'flair'" in note for note in notes)
