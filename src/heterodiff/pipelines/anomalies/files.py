"""Segmenting a folder of patients: volumes or slices in, masks and anomaly maps of the same shape and place out."""

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
from heterodiff.data.decoding.nifti import find_patients
from heterodiff.data.findings import printable
from heterodiff.data.sources.slice_files import find_slice_patients, holds_slices
from heterodiff.data.sources.volumes import channel_names, known_fingerprint, layout_of
from heterodiff.devices import Device
from heterodiff.errors import CheckpointError, DataError, RunError
from heterodiff.files import read_json, replacing, write_json, write_text
from heterodiff.pictures import RED, image_grid, tinted
from heterodiff.pipelines.anomalies.calibrated import Finder, open_finder
from heterodiff.pipelines.anomalies.known_patients import KnownPatients
from heterodiff.pipelines.anomalies.patients import AnyPatient, input_files, open_patient, result_files
from heterodiff.pipelines.anomalies.segment import Progress, Segmentation
from heterodiff.pipelines.load import check_preprocessing
from heterodiff.pipelines.output_folder import writing
from heterodiff.pipelines.sharing import team
from heterodiff.run_folder import RunFolder

SLICES_AT_ONCE = 16
SHOWN, SHOWN_SIDE, SLICES_A_ROW = 6, 128, 10
DONE_FILE = "scores.json"
PICTURE_FILE, SLICES_FILE = "overlay.png", "slices.png"
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
    shape and affine of its first volume, or of slices in npz files ``mask.npy`` and ``anomaly.npy`` (slices, H, W) in
    the order of their numbers, ``overlay.png`` of the slices with the largest masks, ``slices.png`` of all,
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
    finder = open_finder(run, config.segmentation, device)
    made = known_fingerprint(config.data.model_copy(update={"path": data}))
    layout = layout_of(config.data.volumes)
    if made is not None and len(layout.modalities) != finder.in_channels:
        raise RunError(
            f"{run}: its images have {finder.in_channels} channels, but data.volumes names {len(layout.modalities)} "
            f"modalities ({', '.join(layout.modalities)}); it cannot segment volumes"
        )
    check_preprocessing(run, made)
    known = KnownPatients.load(RunFolder(run).known_patients_file)
    names = channel_names(config.data.model_copy(update={"path": data}), finder.in_channels)
    results: list[tuple[dict[str, Any] | None, str]] = []
    for number, patient in team().own(list(enumerate(patients, 1))):
        place, folder = f"{number} of {len(patients)}  {printable(patient.name)}", out / patient.name
        try:
            key = _key(run, patient)
            row, state, notes = _done(folder, key, patient), "done before", list[str]()
            if row is None:
                row, notes = _segment(patient, folder, finder, config.data, key, known, names, progress)
                state = "done"
        except DataError as error:
            results.append((None, str(error)))
            report(f"{place}: left out, {printable(str(error))}")
            continue
        results.append((row, ""))
        marked = f"{row['mask_voxels']:,} pixels" if row["mask_ml"] is None else f"{row['mask_ml']:.2f} ml"
        report(f"{place}: {marked} marked, {state}")
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


def prepare_folders(run: Path, data: Path, out: Path) -> tuple[RunConfig, Sequence[AnyPatient]]:
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
    patients: Sequence[AnyPatient]
    patients = find_slice_patients(data) if holds_slices(data) else find_patients(data, layout_of(config.data.volumes))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return config, patients


def _key(run: Path, patient: AnyPatient) -> str:
    """Return a digest of a result's inputs: settings, calibration and weights of the run, and the patient's files."""
    files = [*sorted((run / "unet").glob("*")), *input_files(patient)]
    try:
        stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError as error:  # such as a link to nowhere
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); copy it again") from None
    content = json.dumps([RunFolder(run).calibration_file.read_text("utf-8"), stamps])
    return hashlib.sha256(content.encode()).hexdigest()


def _done(folder: Path, key: str, patient: AnyPatient) -> dict[str, Any] | None:
    """Return the patient's row if all its files have the sizes they were written with."""
    try:
        content = read_json(folder / DONE_FILE)
        found = content["key"], content["sizes"]
        return content["patient"] if found == (key, _sizes(folder, patient)) else None
    except (OSError, CheckpointError, KeyError, TypeError):
        return None


def _sizes(folder: Path, patient: AnyPatient) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in (*result_files(patient), PICTURE_FILE, SLICES_FILE)}


def _segment(
    patient: AnyPatient,
    folder: Path,
    finder: Finder,
    config: DataConfig,
    key: str,
    known: KnownPatients | None,
    names: Sequence[str],
    progress: Progress,
) -> tuple[dict[str, Any], list[str]]:
    """Segment a patient and write the files; the row of the table, and in what its channels differ from those known."""
    opened = open_patient(patient, config)
    images, index = opened.images, opened.index
    if images.shape[1] != finder.in_channels:
        raise DataError(f"{patient.name}: {images.shape[1]} channels, expected {finder.in_channels} as at training")
    parts = [
        finder.segment(images[first : first + SLICES_AT_ONCE], first, progress)
        for first in range(0, len(images), SLICES_AT_ONCE)
    ]
    found = Segmentation.join(parts)
    mask, anomaly = opened.restored(found)
    voxels = int(mask.sum())
    row = {
        "patient": patient.name,
        "slices": len(index),
        "unhealthy_slices": int(found.unhealthy.sum()),
        "mask_voxels": voxels,
        "mask_ml": None if opened.voxel_ml is None else voxels * opened.voxel_ml,
        "highest_score": float(found.score.max()),
    }
    of_slices = [
        {"slice": int(z), "score": float(score), "unhealthy": bool(unhealthy)}
        for z, score, unhealthy in zip(index, found.score, found.unhealthy, strict=True)
    ]
    grey = images[:, finder.shown_channel]
    pictures = {PICTURE_FILE: _overlay(grey, found, index), SLICES_FILE: _all_slices(grey, found, index)}
    notes = known.differences(images.numpy(), names) if known else []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DONE_FILE).unlink(missing_ok=True)  # first: it is not valid for the new files
        mask_file, map_file = result_files(patient)
        opened.save(folder / mask_file, mask.astype(np.uint8))
        opened.save(folder / map_file, anomaly)
        for name, picture in pictures.items():
            with replacing(folder / name) as file:
                picture.save(file, format="PNG")
        content = {"key": key, "patient": row, "sizes": _sizes(folder, patient), "notes": notes, "slices": of_slices}
        write_json(folder / DONE_FILE, content)  # last: with it, the patient is done
    return row, notes


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
