"""Evaluation of a run that finds anomalies, on its test images."""

import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL.Image import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from heterodiff.data.dataset import ImageDataset
from heterodiff.data.heights import SLICED, by_height, held_out_auroc, overlap_weights, patients_and_heights
from heterodiff.data.sources import TestImages, load_test, open_source
from heterodiff.data.sources.volumes import channel_names, known_fingerprint
from heterodiff.devices import Device
from heterodiff.errors import ConfigError, DataError, RunError
from heterodiff.evaluation import class_images
from heterodiff.evaluation.held_out import count_seen
from heterodiff.evaluation.runs import Evaluation, Request, image_config, run_data
from heterodiff.metrics.segmentation import (
    evaluate_segmentation,
    mean_and_interval,
    overlap,
    precision_recall_area,
    threshold_baseline,
)
from heterodiff.pictures import GREEN, RED, image_grid, tinted
from heterodiff.pipelines.anomalies.calibrated import Finder, load_calibration, open_finder
from heterodiff.pipelines.anomalies.known_patients import KnownPatients
from heterodiff.pipelines.anomalies.label_weights import FOREGROUND
from heterodiff.pipelines.anomalies.masks import drop_small
from heterodiff.pipelines.anomalies.segment import AnomalyMaps, Segmentation, Segmenter, intensity_alone
from heterodiff.pipelines.load import check_preprocessing
from heterodiff.pipelines.sharing import team
from heterodiff.progress import progress_tasks
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import task_of

if TYPE_CHECKING:
    from heterodiff.config import DataConfig

IMAGES_AT_ONCE = 32
SHOWN, SHOWN_SIDE = 8, 128
IMAGE_COLUMNS = ("image", "patient", "unhealthy", "judged_unhealthy", "score", "dice")
COMPARED = 300
"""Most images with a lesion, evenly spread, that the intensity threshold is chosen and measured on."""


def finds_anomalies(run: Path, elsewhere: "DataConfig | None" = None) -> bool:
    """Tell whether the run's images, or those ``elsewhere``, have masks to compare with."""
    if not RunFolder(run).has_config or "segment" not in task_of(RunFolder(run).config()).commands:
        return False
    return open_source(elsewhere or image_config(run)).mask is not None


def other_patients(run: Path, path: Path) -> "DataConfig | None":
    """Settings that read the patients at ``path``, a folder of volumes or an npz file of slices, as the run's own.

    ``None`` for a run that was not trained on slices of volumes, real or simulated.

    Raises:
        DataError: nothing is at ``path``, or no masks, though the run's own images have some.
    """
    if not RunFolder(run).has_config or image_config(run).source not in SLICED:
        return None
    if not (path.expanduser().is_dir() or (path.suffix.lower() == ".npz" and path.expanduser().is_file())):
        raise DataError(f"{path}: no such folder or npz file; correct --data")
    config = image_config(run)
    volumes = config.volumes.model_copy(update={"cache": run / "slices"})  # beside PATH may be read-only
    found = config.model_copy(update={"source": "volumes", "path": path, "volumes": volumes})
    if open_source(found).mask is None and finds_anomalies(run):
        raise DataError(f"{path}: no masks to compare with; `heterodiff segment {run} {path}` finds anomalies without")
    return found


def parts_of(images: ImageDataset) -> Iterator[Tensor]:
    for first in range(0, len(images), IMAGES_AT_ONCE):
        yield images.batch(range(first, min(first + IMAGES_AT_ONCE, len(images))))[0]


def all_maps(segmenter: Segmenter, images: ImageDataset, progress: Callable[[int], None]) -> Iterator[AnomalyMaps]:
    for number, part in enumerate(parts_of(images)):
        first, count = number * IMAGES_AT_ONCE, len(part)
        yield segmenter.maps(part, first, lambda step, total, f=first, c=count: progress(f + c * step // total))  # type: ignore[misc]


def _found(finder: Finder, images: ImageDataset, progress: Callable[[int], None]) -> Iterator[Segmentation]:
    """Segment this process's part of the images; the first process gets those of all, one after the other."""
    for first in team().own(range(0, len(images), IMAGES_AT_ONCE)):
        count = min(IMAGES_AT_ONCE, len(images) - first)
        part = images.batch(range(first, first + count))[0]
        yield finder.segment(part, first, lambda step, total, f=first, c=count: progress(f + c * step // total))  # type: ignore[misc]


def evaluate_anomalies(run: Path, elsewhere: "DataConfig | None" = None, device: Device | None = None) -> Evaluation:
    """Find anomalies in the run's test images and compare them with the true masks; one pass over all of them.

    Writes ``evaluation/segmentation.png``, ``evaluation/images.csv`` (a row for each image; Dice where there is a
    lesion) and ``evaluation.json`` into the run folder.

    Args:
        elsewhere: other images, all of which are measured in place of the run's, see :func:`other_patients`.
        device: see :func:`heterodiff.load`; the precision is that of the calibration.

    Raises:
        HeterodiffError: no usable run, not calibrated, or no test images.
    """
    folder = RunFolder(run)
    config = folder.config()
    settings = config.segmentation
    load_calibration(run, settings)  # before images are read
    of = elsewhere or image_config(run)
    test = _test_images(run, of, own=elsewhere is None)
    assert test.mask is not None  # checked before, by `finds_anomalies`
    finder, count = open_finder(run, settings, device), len(test.images)
    calibration, small = finder.calibration, partial(drop_small, least=settings.drop_small)
    with progress_tasks() as start:
        every = Segmentation.join(team().collect(_found(finder, test.images, start("test images", count))))
    foreground = np.concatenate([part.mean(dim=1).numpy() > FOREGROUND for part in parts_of(test.images)])
    truth = np.stack([test.mask(row) for row in range(count)])
    shown = ill = np.asarray(truth.any(axis=(1, 2)))
    if settings.healthy in (classes := test.images.spec.class_names):
        labels = test.images.labels
        ill = np.where(labels >= 0, labels != classes.index(settings.healthy), shown)
    metrics = evaluate_segmentation(
        every.masks, every.unhealthy, every.smoothed, every.score, truth, foreground, test.patients, ill
    )
    dice, of_patient = overlap(every.masks, truth)[0], np.array(test.patients)
    if compared := _spread(np.flatnonzero(shown), COMPARED):
        images = test.images.batch(compared)[0].numpy()
        of_threshold = (images, truth[compared], foreground[compared], small, settings.smoothing)
        threshold = threshold_baseline(*of_threshold)
        gain = mean_and_interval(dice[compared] - threshold.pop("each"), of_patient[compared])
        metrics["threshold"] = {"n": len(compared), **threshold, "gain": gain}
    if calibration.intensity is not None:
        parts = [part.numpy() for part in parts_of(test.images)]
        alone = Segmentation.join([intensity_alone(part, calibration, settings, finder.channels) for part in parts])
        metrics["intensity"] = {
            "dice": float(overlap(alone.masks, truth)[0][shown].mean()) if shown.any() else None,
            "auprc": precision_recall_area(truth[shown], alone.maps[shown], foreground[shown]),
            "auroc": float(roc_auc_score(ill, alone.score)) if 0 < ill.sum() < len(ill) else None,
            "gain": mean_and_interval((dice - overlap(alone.masks, truth)[0])[shown], of_patient[shown]),
        }
    _, heights = patients_and_heights(test.images.names, of.source)
    if heights is not None and 0 < ill.sum() < count:
        importance = overlap_weights(heights, ill)
        metrics["image"]["auroc_at_equal_heights"] = float(roc_auc_score(ill, every.score, sample_weight=importance))
        metrics["image"]["auroc_of_height"] = held_out_auroc(by_height(heights, ill), ill, of_patient, np.ones(count))
    each = zip(test.images.names, of_patient, ill, every.unhealthy, every.score, shown, dice, strict=True)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([IMAGE_COLUMNS, *(_image_row(*one) for one in each)])
    metrics["data"] = {
        "path": str(of.path or of.source),
        "part": "all" if elsewhere else "kept for testing",
        "notes": [*_seen_in_training(run, test.images), *_other_channels(run, test)] if elsewhere else [],
    }
    metrics["settings"] = settings.model_dump(mode="json")
    metrics["calls_per_image"] = float(every.calls.mean())
    metrics["found_by"] = "denoiser" if calibration.network is None else "segmentation network"
    few = min(int((~shown).sum()), SHOWN // 4)
    rows = [*_spread(np.flatnonzero(shown), SHOWN - few), *_spread(np.flatnonzero(~shown), few)]
    first = test.images.batch(rows)[0][:, [finder.shown_channel]]
    overview = overlays(first, truth[rows], every.maps[rows], every.mixed_masks[rows])
    folder.write_picture(folder.anomalies_picture, overview)
    folder.write_text(folder.images_file, table.getvalue())
    folder.write_json(folder.evaluation_file, metrics)
    return Evaluation(metrics, folder.anomalies_picture)


def _image_row(
    name: str, patient: str, unhealthy: bool, judged: bool, score: float, shown: bool, dice: float
) -> tuple[str, ...]:
    overlap_with_truth = f"{dice:.4f}" if shown else ""
    return name, patient, str(int(unhealthy)), str(int(judged)), f"{score:.6g}", overlap_with_truth


def _test_images(run: Path, config: "DataConfig", own: bool) -> TestImages:
    """Load the run's test images, or all those of ``config`` where they are not its ``own``."""
    folder = RunFolder(run)
    spec = folder.spec()
    if spec is None or not folder.split_file.is_file():
        raise RunError(f"{run}: data.json or split.json is missing, so the run's images are not known here")
    made = known_fingerprint(config)
    if made or own:
        check_preprocessing(run, made)
    return load_test(config, spec, split=folder.split()) if own else load_test(config, spec, "all")


def _seen_in_training(run: Path, images: ImageDataset) -> list[str]:
    """Note on those of ``images`` that the run was trained on."""
    seen = count_seen((image for part in parts_of(images) for image in part), run_data(run).train)
    return [f"{seen:,} of these {len(images):,} images are training images too: they are not held out"] if seen else []


def _other_channels(run: Path, test: TestImages) -> list[str]:
    """Notes on patients whose channels are not as those that the run knows."""
    known = KnownPatients.load(RunFolder(run).known_patients_file)
    if known is None:
        return []
    names, patients = channel_names(image_config(run), test.images.spec.channels), np.array(test.patients)
    notes = []
    for patient in np.unique(patients):
        images = test.images.batch(np.flatnonzero(patients == patient).tolist())[0].numpy()
        notes += [f"patient {patient}: {line}" for line in known.differences(images, names)]
    return notes


def overlays(images: Tensor, truth: np.ndarray, maps: np.ndarray, marked: np.ndarray) -> Image:
    """Draw a column for each image: as it is, true mask, found mask, map.

    Args:
        images: (N, 1, H, W) in [0, 1].
        truth, marked: (N, H, W) bool.
        maps: (N, H, W).
    """
    grey = images.expand(-1, 3, -1, -1)
    bright = torch.from_numpy(maps).float()[:, None]
    bright = (bright / bright.quantile(0.995).clamp(min=1e-6)).clamp(0, 1).expand(-1, 3, -1, -1)
    true, found = (torch.from_numpy(masks) for masks in (truth, marked))
    rows = [grey, tinted(grey, true, GREEN), tinted(grey, found, RED), bright]
    names = ["image", "true mask", "found", "anomaly map"]
    return image_grid(torch.cat(rows), names, columns=len(images), min_side=SHOWN_SIDE)


def _spread(rows: np.ndarray, count: int) -> list[int]:
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)].tolist()


def evaluate(run: Path, request: Request) -> Evaluation:
    """Evaluate a run that finds anomalies as asked for on the command line; as class images where masks are missing.

    Raises:
        ConfigError: options that the calibration has fixed.
    """
    patients = other_patients(run, request.data) if request.data else None
    if not finds_anomalies(run, patients):
        return class_images.evaluate(run, request)
    given = {
        "-n": request.number,
        "--steps": request.steps,
        "--guidance": request.guidance,
        "--sampler": request.sampler,
        "--batch-size": request.batch_size,
    }
    if unused := [name for name, value in given.items() if value is not None]:
        raise ConfigError(
            f"{unused[0]}: {run} finds anomalies in all test images, as its segmentation settings say; leave it "
            "out, or change these and calibrate again"
        )
    return evaluate_anomalies(run, patients, request.device)
