"""Segmenting a folder of patients: NIfTI volumes in, masks and anomaly maps of the same shape and place out."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heterodiff.config import DataConfig, RunConfig
from heterodiff.data.decoding.nifti import PatientFiles, find_patients, load_nifti, read_patient
from heterodiff.data.findings import printable
from heterodiff.data.sources.slices import from_pictures, restore_slices, slice_patient
from heterodiff.data.sources.volumes import DEFAULT_SIZE, fingerprint, finish_slice, layout_of
from heterodiff.devices import Device
from heterodiff.errors import CheckpointError, DataError, RunError
from heterodiff.files import fresh, read_json, replacing, write_json, write_text
from heterodiff.pictures import RED, image_grid, tinted
from heterodiff.pipelines.anomalies.calibrated import Finder, open_finder
from heterodiff.pipelines.anomalies.known_patients import KnownPatients
from heterodiff.pipelines.anomalies.segment import Progress, Segmentation
from heterodiff.pipelines.load import check_preprocessing
from heterodiff.pipelines.output_folder import writing
from heterodiff.pipelines.sharing import team
from heterodiff.run_folder import RunFolder

SLICES_AT_ONCE = 16
SHOWN, SHOWN_SIDE, SLICES_A_ROW = 6, 128, 10
DONE_FILE = "scores.json"
MASK_FILE, MAP_FILE, PICTURE_FILE, SLICES_FILE = "mask.nii.gz", "anomaly.nii.gz", "overlay.png", "slices.png"
SUMMARY_FILE = "patients.csv"
COLUMNS = ("patient", "slices", "unhealthy_slices", "mask_voxels", "mask_ml", "highest_score")


def segment_folder(
    run: Path,
    data: Path,
    out: Path,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda step, total: None,
    device: Device | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Find anomalies in all patients below ``data`` that are not done yet, in the precision of the calibration.

    Writes for each patient a folder with ``mask.nii.gz`` (0 or 1), ``anomaly.nii.gz`` (squared difference), both with
    shape and affine of its first volume, ``overlay.png`` of the slices with the largest masks, ``slices.png`` of all,
    and ``scores.json``; and ``patients.csv`` for all. A patient whose volumes cannot be used does not stop the others;
    one whose channels differ from those of the patients trained on is reported.

    Processes of a team share the patients; the first one writes the table and returns, see
    :meth:`heterodiff.pipelines.sharing.Team.collect`.

    Args:
        report: gets a line about each patient of this process.
        progress: called after each step of a batch of slices; if it raises, finished patients are kept.
        device: see :func:`heterodiff.load`.

    Returns:
        the rows of ``patients.csv``, and the errors of the patients missing there.

    Raises:
        HeterodiffError: a run that was not trained on volumes or is not calibrated, or folders that cannot be used.
    """
    config, patients = prepare_folders(run, data, out)
    layout, finder = layout_of(config.data.volumes), open_finder(run, config.segmentation, device)
    if len(layout.modalities) != finder.in_channels:
        raise RunError(
            f"{run}: its images have {finder.in_channels} channels, but data.volumes names {len(layout.modalities)} "
            f"modalities ({', '.join(layout.modalities)}); it cannot segment volumes"
        )
    check_preprocessing(run, fingerprint(config.data))
    known, names = KnownPatients.load(RunFolder(run).known_patients_file), list(layout.modalities)
    results: list[tuple[dict[str, Any] | None, str]] = []
    for number, patient in team().own(list(enumerate(patients, 1))):
        place, folder = f"{number} of {len(patients)}  {printable(patient.name)}", out / patient.name
        try:
            key = _key(run, patient)
            row, state, notes = _done(folder, key), "done before", list[str]()
            if row is None:
                row, notes = _segment(patient, folder, finder, config.data, key, known, names, progress)
                state = "done"
        except DataError as error:
            results.append((None, str(error)))
            report(f"{place}: left out, {printable(str(error))}")
            continue
        results.append((row, ""))
        report(f"{place}: {row['mask_ml']:.2f} ml marked, {state}")
        for note in notes:
            report(f"{place}: warning: {note}")
    results = team().collect(results)
    rows, problems = [row for row, _ in results if row], [problem for _, problem in results if problem]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    with writing(out):  # names that are not UTF-8 are written as they are on disk
        write_text(out / SUMMARY_FILE, table.getvalue(), "surrogateescape")
    return rows, problems


def prepare_folders(run: Path, data: Path, out: Path) -> tuple[RunConfig, list[PatientFiles]]:
    """Return the run's configuration and the patients below ``data``, and make ``out``; raises HeterodiffError."""
    if not RunFolder(run).has_config:
        raise RunError(f"{run}: no config.yaml, which describes how its images were made; train a run here")
    config = RunFolder(run).config()
    if config.data.source != "volumes":
        raise RunError(
            f"{run}: trained on source '{config.data.source}', not on volumes, so it cannot make slices of "
            "them; use a run with data.source=volumes"
        )
    if not data.is_dir():
        raise DataError(f"{data}: no such folder of patients")
    if out.resolve().is_relative_to(data.resolve()):
        raise RunError(
            f"{out}: lies in the folder of patients {data}, where masks would be taken for patients at the next start; "
            "choose an --out elsewhere"
        )
    patients = find_patients(data, layout_of(config.data.volumes))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return config, patients


def _key(run: Path, patient: PatientFiles) -> str:
    """Return a digest of a result's inputs: settings, calibration and weights of the run, and the patient's files."""
    files = [*sorted((run / "unet").glob("*")), *patient.volumes]
    try:
        stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError as error:  # such as a link to nowhere
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); copy it again") from None
    content = json.dumps([RunFolder(run).calibration_file.read_text("utf-8"), stamps])
    return hashlib.sha256(content.encode()).hexdigest()


def _done(folder: Path, key: str) -> dict[str, Any] | None:
    """Return the patient's row if all its files have the sizes they were written with."""
    try:
        content = read_json(folder / DONE_FILE)
        found = content["key"], content["sizes"]
        return content["patient"] if found == (key, _sizes(folder)) else None
    except (OSError, CheckpointError, KeyError, TypeError):
        return None


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in (MASK_FILE, MAP_FILE, PICTURE_FILE, SLICES_FILE)}


def _segment(
    patient: PatientFiles,
    folder: Path,
    finder: Finder,
    config: DataConfig,
    key: str,
    known: KnownPatients | None,
    names: Sequence[str],
    progress: Progress,
) -> tuple[dict[str, Any], list[str]]:
    """Segment a patient and write the files; the row of the table, and in what its channels differ from those known."""
    read = read_patient(PatientFiles(patient.name, patient.volumes, None))
    slices = slice_patient(read, config.image_size or DEFAULT_SIZE, config.volumes.least_brain)
    if not len(slices.index):
        raise DataError(f"{patient.volumes[0].parent}: no slice shows enough of the brain to be judged")
    finish = finish_slice(config.volumes)
    images = torch.from_numpy(np.stack([finish(image) for image in slices.image]))
    parts = [
        finder.segment(images[first : first + SLICES_AT_ONCE], first, progress)
        for first in range(0, len(images), SLICES_AT_ONCE)
    ]
    found = Segmentation.join(parts)
    mask, anomaly = to_volumes(found, slices.index, read.image.shape[1:])
    reference = load_nifti(patient.volumes[0])
    row = {
        "patient": patient.name,
        "slices": len(slices.index),
        "unhealthy_slices": int(found.unhealthy.sum()),
        "mask_voxels": int(mask.sum()),
        "mask_ml": float(mask.sum() * abs(np.linalg.det(reference.affine[:3, :3])) / 1000),
        "highest_score": float(found.score.max()),
    }
    of_slices = [
        {"slice": int(z), "score": float(score), "unhealthy": bool(unhealthy)}
        for z, score, unhealthy in zip(slices.index, found.score, found.unhealthy, strict=True)
    ]
    grey = images[:, finder.shown_channel]
    pictures = {PICTURE_FILE: _overlay(grey, found, slices.index), SLICES_FILE: _all_slices(grey, found, slices.index)}
    notes = known.differences(images.numpy(), names) if known else []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DONE_FILE).unlink(missing_ok=True)  # first: it is not valid for the new files
        save_like(folder / MASK_FILE, mask.astype(np.uint8), reference)
        save_like(folder / MAP_FILE, anomaly, reference)
        for name, picture in pictures.items():
            with replacing(folder / name) as file:
                picture.save(file, format="PNG")
        content = {"key": key, "patient": row, "sizes": _sizes(folder), "notes": notes, "slices": of_slices}
        write_json(folder / DONE_FILE, content)  # last: with it, the patient is done
    return row, notes


def to_volumes(found: Segmentation, index: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Put masks and maps of slices back into volumes (X, Y, Z) of canonical orientation.

    Args:
        index: (S,) of each slice along the last axis.

    Returns:
        mask, bool, empty in slices judged healthy; anomaly map, float32, 0 in slices that show no brain.
    """
    across, along, depth = shape
    mask, anomaly = np.zeros((depth, 1, along, across), np.float32), np.zeros((depth, 1, along, across), np.float32)
    mask[index] = restore_slices(found.mixed_masks[:, None].astype(np.float32), (along, across), "nearest-exact")
    anomaly[index] = restore_slices(found.maps[:, None].astype(np.float32), (along, across), "bilinear")
    return from_pictures(mask)[0] > 0.5, from_pictures(anomaly)[0]


def save_like(path: Path, canonical: np.ndarray, reference: Any) -> None:
    """Write a canonical volume atomically as NIfTI, with shape, affine and orientation of ``reference``."""
    import nibabel

    own = nibabel.io_orientation(reference.affine)
    back = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), own)
    voxels = nibabel.orientations.apply_orientation(canonical, back)
    header = reference.header.copy()
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # viewers would show a mask in the window of the volume: black
    image = nibabel.Nifti1Image(np.ascontiguousarray(voxels), reference.affine, header)
    temporary = path.with_name(f".unfinished.{path.name}")  # nibabel goes by the suffix, and hidden it is no volume
    nibabel.save(image, fresh(temporary))
    temporary.replace(path)


def _all_slices(grey: torch.Tensor, found: Segmentation, index: np.ndarray) -> Any:
    """Draw every slice with its mask in red; what is judged unhealthy says so."""
    marked = tinted(grey[:, None].expand(-1, 3, -1, -1), torch.from_numpy(found.mixed_masks), RED)
    labels = [f"{z} unhealthy" if ill else str(z) for z, ill in zip(index, found.unhealthy, strict=True)]
    return image_grid(marked, labels, columns=min(len(labels), SLICES_A_ROW), min_side=SHOWN_SIDE)


def _overlay(grey: torch.Tensor, found: Segmentation, index: np.ndarray) -> Any:
    """Draw the slices with the largest masks, or the middle ones: plain, and with the mask in red."""
    area = found.mixed_masks.sum(axis=(1, 2))
    order = np.argsort(-area, kind="stable")[:SHOWN] if area.any() else len(index) // 2 + np.arange(SHOWN) - SHOWN // 2
    chosen = np.unique(order.clip(0, len(index) - 1))
    plain = grey[chosen][:, None].expand(-1, 3, -1, -1)
    marked = tinted(plain, torch.from_numpy(found.mixed_masks[chosen]), RED)
    names = [f"slice {z}" for z in index[chosen]]
    labels = [*names, *["found"] * len(names)]
    return image_grid(torch.cat([plain, marked]), labels, columns=len(names), min_side=SHOWN_SIDE)
